"""Everything that needs a GPU, in one call of less than nine minutes: `make gpu`.

    python benchmarks/gpu.py [--out DIR] [--dry-run]

Needs PyTorch with CUDA, Triton, NumPy, pytest, matplotlib and rich; downloads nothing, and takes pytest-xdist where it
is. Each part runs in a process of its own with a time limit, and a failing part does not stop the others; the last
lines say which failed. --out, by default $OUT or build/gpu, gets results.json, with the machine and what each part has
written, two plots and log.txt.
--dry-run walks through the same parts without a GPU, interpreted, with tiny shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 9 * 60.0  # seconds for everything

# Forward and backward with a gate, a stride, and channels that fill no tile; small, the sanitizers are slow.
PROBE = """
import torch, dynconv
generator = torch.Generator(device="cuda").manual_seed(0)
for dtype, channels, stride in ((torch.float16, 64, 1), (torch.float32, 17, 2)):
    input = torch.randn(2, channels, 15, 13, device="cuda", generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, channels, 3, 3, device="cuda", generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(40, device="cuda", generator=generator).to(dtype).requires_grad_()
    size = [(length - 1) // stride + 1 for length in (15, 13)]
    gate = torch.rand(2, 1, *size, device="cuda", generator=generator).to(dtype)
    gate = torch.where(gate > 0.6, gate, 0).requires_grad_()
    output = dynconv.masked_conv2d(input, weight, bias, stride, 1, mask=gate)
    output.backward(torch.ones_like(output))
    with torch.no_grad():
        dynconv.masked_conv2d(input, weight, bias, stride, 1, mask=gate.detach() != 0, out=output.detach().clone())
    ins, outs = (torch.rand(2, c, device="cuda", generator=generator) < 0.5 for c in (channels, 40))
    sites = gate.detach() != 0
    output = dynconv.gathered_conv2d(input, weight, bias, stride, 1, in_mask=ins, out_mask=outs, mask=sites)
    output.backward(torch.ones_like(output))
    normal = lambda *shape: torch.randn(*shape, device="cuda", generator=generator).to(dtype).requires_grad_()
    filters, offset, weights = (normal(2, count, *size) for count in (9, 18, 9))
    output = dynconv.dynamic_filter2d(
        input, filters, kernel_size=3, stride=stride, padding=1, normalization="softmax", mask=sites
    )
    output.backward(torch.ones_like(output))
    output = dynconv.deform_conv2d(input, offset, weight, bias, stride, 1, mask=weights)
    output.backward(torch.ones_like(output))
    output = dynconv.deform_aggregate2d(input, offset, weights, kernel_size=3, stride=stride, padding=1)
    output.backward(torch.ones_like(output))
torch.cuda.synchronize()
print("probe done")
"""


@dataclass(frozen=True)
class Part:
    """A command and its time limit in seconds; `missing` says why it cannot run, where it cannot.

    `stops`: the seconds after which the command begins nothing new, and writes what it has; handed to it as --limit,
    less where less time is left.
    """

    name: str
    command: Sequence[str]
    limit: float
    missing: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    stops: float | None = None


def sanitizer() -> str | None:
    """Where compute-sanitizer is, which CUDA installs beside its compiler and not on the path."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def parts(out: Path, made: Path, dry_run: bool) -> Iterator[Part]:
    """What runs, in this order: first what says whether results are right. JSON goes to `made`, plots to `out`."""
    python, package = sys.executable, [sys.executable, "-m", "dynconv"]
    if not is_importable():
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
        yield Part("install", install, 60)
    smi = shutil.which("nvidia-smi")
    yield Part("device", [smi or "nvidia-smi"], 20, None if smi else "nvidia-smi is not here")
    interpreted = (("TRITON_INTERPRET", "1"), ("DYNCONV_BACKEND", "triton")) if dry_run else ()
    device = "cpu" if dry_run else "cuda"

    def writes(name: str, command: list[str], limit: float, stops: float | None = None) -> Part:
        file = name.replace(" ", "-") + ".json"
        return Part(name, [*command, "--json", str(made / file)], limit, None, interpreted, stops)

    yield writes("ceilings", [*package, "roofline", "--device", device, "--shapes"], 30)
    # A few cases: every geometry compiles its own kernels, and the tests have them all.
    dtypes = ["float32"] if dry_run else ["bfloat16", "tf32"]
    yield writes(
        "verify", [*package, "verify", "--quick", "--backends", "triton", "--dtypes", *dtypes], 300 if dry_run else 100
    )
    # Failures are told as they come: a part that is stopped has said what it saw.
    pytest = [python, "-m", "pytest", "-v", "-rf", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "2" if dry_run else "8"]  # most of it is compiling
    chosen = ["tests/test_masked_conv.py", "-k", "triton and empty"] if dry_run else ["tests", "-m", "gpu"]
    yield Part("tests", [*pytest, *chosen], 140)
    tool = sanitizer()
    for check in ("memcheck", "racecheck"):
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", python, "-c", PROBE]
        missing = "a dry run has no GPU" if dry_run else None if tool else "compute-sanitizer is not here"
        # Without PyTorch's cache every tensor is an allocation of its own, with its own bounds.
        yield Part(check, command, 45, missing, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))
    plots = ["--plot", str(out / "bench.png")] + ([] if dry_run else ["--scaling", str(out / "scaling.png")])
    # What torch.compile makes takes seconds to compile: one size of each. torchvision has no bfloat16.
    peers = ["--baselines", "--modes", "plain", "--layers", "56x56"]
    for name, families, dtype, options, limit, stops in (
        ("layers", "resnet50 laudnet mobilenetv2 linear lasnet sbnet", "bfloat16", plots, 100, 60),
        ("filters", "dcn involution ddf carafe", "bfloat16", [], 55, 35),
        ("peers", "resnet50 laudnet", "bfloat16", peers, 50, 30),
        ("filter peers", "dcn involution", "float16", peers, 40, 25),
        ("float16", "resnet50", "float16", [], 30, 18),
        ("automatic", "resnet50", "bfloat16", ["--automatic", "--modes", "plain"], 25, 12),
    ):
        measured = [*package, "bench", "--device", device, "--shapes", *families.split()]
        measured += ["--density", "0.75", "0.5", "0.25", "--repeats", "15", "--seconds", "0.2", "--dtype", dtype]
        if dry_run:
            options = [option for option in options if option not in ("--layers", "56x56")]
            measured = [*package, "bench", "--shapes", "tiny", "--density", "0.5", "--repeats", "1", "--seconds", "0"]
        yield writes(f"bench {name}", [*measured, *options], limit, stops)
    sweep = [python, str(ROOT / "benchmarks" / "sweep.py"), "--device", device]
    swept = ["--shapes", "resnet50", "dcn", "involution", "laudnet", "mobilenetv2", "--one"]
    if dry_run:  # Triton's interpreter has no products of bfloat16
        swept = ["--shapes", "tiny", "--dtype", "float32", "--repeats", "1", "--most", "1"]
    yield writes("sweep", [*sweep, *swept], 60, 35)


def is_importable() -> bool:
    """Whether a process started in the repository root finds dynconv and its kernels."""
    probe = [sys.executable, "-c", "import dynconv, dynconv.kernels"]
    return subprocess.run(probe, cwd=ROOT, capture_output=True).returncode == 0


def run(part: Part, limit: float, log: Path) -> str:
    """Run one part, its output to the screen and the log; "passed", or what went wrong."""
    if part.missing:
        return f"skipped: {part.missing}"
    if limit < 5:
        return "FAILED: no time left"
    heading = f"\n=== {part.name} (at most {limit:.0f} s) ===\n"
    print(heading, end="", flush=True)
    with log.open("a") as file:
        file.write(heading)
        begin = file.tell()
        file.flush()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(part.environment)
        stops = [] if part.stops is None else ["--limit", f"{min(part.stops, 0.6 * limit):.0f}"]
        command = [*part.command, *stops]
        try:
            # A session of its own: what is stopped takes its compilers and sanitizers along.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
                outcome = "passed" if status == 0 else f"FAILED: exit status {status}"
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = f"FAILED: not done after {limit:.0f} s"
        except OSError as error:
            outcome = f"FAILED: {error}"
    with log.open(errors="replace") as file:
        file.seek(begin)
        print(file.read(), end="", flush=True)
    return outcome


def collect(folder: Path) -> dict:
    """What parts have written, by name; of one that was stopped while it wrote, nothing."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(json.JSONDecodeError):
            found[path.stem] = json.loads(path.read_text())
    return found


def main() -> int:
    """Run the parts; 1 if one failed or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"argument --out: expected a folder that can be written, got {str(arguments.out)!r}: {error}")
    if not arguments.dry_run:
        try:
            import torch
        except ModuleNotFoundError:
            print("make gpu: this Python has no PyTorch; name one that has with GPU_PYTHON=...")
            return 1
        if not torch.cuda.is_available():
            print("make gpu: PyTorch finds no CUDA device here; --dry-run walks through the parts without one")
            return 1
    log = out / "log.txt"
    log.write_text("")
    start = time.monotonic()
    summary: list[dict] = []
    results: dict = {"dry_run": arguments.dry_run, "parts": summary}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        for part in parts(out, made, arguments.dry_run):
            begin = time.monotonic()
            outcome = run(part, min(part.limit, BUDGET - (begin - start)), log)
            summary.append({"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - begin, 1)})
            # After each part: what is known survives a machine that is taken back.
            results |= collect(made)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [f"{done['part']:<16}{done['seconds']:>7.1f} s  {done['outcome']}" for done in summary]
    text = "\n".join(["", "=== summary ===", *lines, f"results in {arguments.out}"])
    print(text)
    with log.open("a") as file:
        file.write(text + "\n")
    return 1 if any(done["outcome"].startswith("FAILED") for done in summary) else 0


if __name__ == "__main__":
    sys.exit(main())
