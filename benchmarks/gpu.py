"""Everything that needs a GPU, in calls of nine minutes, each of which goes on where the last one stopped: `make gpu`.

    python benchmarks/gpu.py [--out DIR] [--resume FILE] [--again] [--dry-run]

Needs PyTorch with CUDA, Triton, NumPy, rich and, for the parts of that name, pytest and compute-sanitizer; downloads
and installs nothing, and takes pytest-xdist and matplotlib where they are.

Kernels are compiled by the very calls that run them, in as many processes as there are cores: what Triton's cache goes
by is then what any launch has, and each process says whether its results are right. What is timed runs alone,
afterwards, and finds its kernels compiled. First comes a case of each family of kernels, then a layer of each, timed,
then all the rest.

--out, by default $OUT or build/gpu, gets results.json, log.txt and pictures. results.json is written after each row
and kept in build/gpu as well, where the next call finds it; --resume names one from elsewhere. What passed is not run
again while its command, its sources and the kind of machine are the same (--again runs all of it); what failed or was
stopped comes last, after all that never began. A case begins where the time left is enough for what it should take, by
the kernels that it compiles. The exit status is 0 when everything has passed, in this call or one before.
--dry-run walks through the same parts without a GPU, interpreted, on tiny shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "gpu"  # the last call's results.json
CACHE = ROOT / "build" / "gpu-cache"  # compiled kernels, and what a case writes while it runs
BUDGET = 9 * 60.0  # seconds for everything
CORES = os.cpu_count() or 1
# What somebody gets back of --out, and sees of what is printed: its end.
MOST_FILES, MOST_BYTES = 8, 16 << 20
MOST_PRINTED, MOST_KEPT = 11_000, 6_000  # of all output in the end, and of a failure's; in characters
PATIENCE = 60.0  # seconds that a case may take beside twice what it should
PACKAGE = ("dynconv", "kernels")

# The numbers of kernels are counted, for sm_90, by what their launchers ask Triton for.
# A case of `verify` for each family of kernels.
FIRST = {
    "bottleneck": 37, "inverted residual packed": 24, "packed width at sites": 18, "3x3 gate": 12, "depthwise 3x3": 11,
    "linear width": 9, "3x3 width": 9, "filters, softmax": 7, "deformable": 3, "aggregation, softmax": 2,
}  # fmt: skip
# The cases of `verify --quick`, in as many processes.
QUICK = {
    "blocks": (["bottleneck"], 37),
    "chains": (["inverted residual packed", "relu6 depthwise 3x3"], 30),
    "masked": (["3x3", "3x3 gate", "3x3 stride 2", "1x1", "3x3 empty"], 28),
    "widths": (["3x3 width", "packed width at sites", "linear width"], 28),
    "filters": (
        ["filters, softmax", "filters of channels", "filters to twice the size", "deformable", "aggregation, softmax"],
        19,
    ),
}
# Published layers, by family and a part of their names: each call of those compiles so many kernels.
LAYERS = (
    ("mobilenetv2", "inverted", 46), ("resnet50", "bottleneck", 35), ("lasnet", "bottleneck", 35),
    ("laudnet", "3x3", 22), ("sbnet", "3x3", 17), ("sbnet", "1x1", 16), ("resnet50", "3x3", 14),
    ("resnet50", "1x1", 12), ("sbnet", "bottleneck", 11), ("lasnet", "groups", 11), ("laudnet", "1x1", 9),
    ("mobilenetv2", "depthwise", 9), ("linear", "linear", 9), ("ddf", "3x3", 4), ("carafe", "5x5", 4),
    ("involution", "7x7", 3), ("dcn", "3x3", 2),
)  # fmt: skip
# Test files, by what they are about; counted in Triton's interpreter, which has no bfloat16 and no TF32.
TESTS = {
    "kernels": ("gathered_kernels deform_kernels dynamic_filter_kernels launches channel_calls", 301),
    "ops": ("gathered_conv deform dynamic_filter masked_conv sites packed", 664),
    "modules": ("blocks drop_in nn calibration", 272),
    "masked kernels": ("kernels", 833),
}
# Of benchmarks/probe.py: its calls, and kernels in two element types.
PROBES = {
    "masked": 20, "depthwise": 18, "gathered": 18, "linear": 13, "filters": 11, "block": 11, "deform": 6, "in-place": 4,
    "aggregate": 4,
}  # fmt: skip

MACHINE = """
import json, sys, torch
import dynconv.kernels, triton
found = {"torch": torch.__version__, "triton": triton.__version__, "device": "cpu"}
if torch.cuda.is_available():
    of = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda").add_(1).item()
    found |= {"device": of.name, "capability": [of.major, of.minor], "multiprocessors": of.multi_processor_count}
    found |= {"memory": of.total_memory, "cuda": torch.version.cuda or torch.version.hip}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Case:
    """A command that is done, or not, as a whole.

    Attributes:
        name: within its part.
        command: what follows Python's name, with paths from the repository on.
        kernels: that it compiles where nobody has before.
        runs: seconds that it takes beside that and its start: assumed, and no result.
        workers: processes of its own that compile.
        writes: it takes --json FILE.
        stops: it takes --limit SECONDS, after which it begins nothing new.
        pictures: options that take a picture's file, and that file's name.
        under: what runs Python, and its options.
        environment: more variables.
        fills: whoever is timed later finds its kernels in the cache.
        after: the part whose case of this name compiles the same kernels.
        sources: files and folders of the repository that decide what comes out.
    """

    name: str
    command: Sequence[str]
    kernels: int = 0
    runs: float = 2.0
    workers: int = 1
    writes: bool = False
    stops: bool = False
    pictures: Sequence[tuple[str, str]] = ()
    under: Sequence[str] = ()
    environment: Sequence[tuple[str, str]] = ()
    fills: bool = False
    after: str = ""
    sources: tuple[str, ...] = PACKAGE

    def belongs_to(self, machine: dict) -> str:
        """What its result is one of: sources, command, kind of machine."""
        kind = [machine.get(name) for name in ("device", "torch", "triton")]
        content = [list(self.command), list(self.under[1:]), kind, digest(self.sources)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Part:
    """Cases of a kind.

    Attributes:
        name: of all parts another one.
        cases: in the order in which they begin.
        at_once: how many of them run at the same time.
        missing: why they cannot run here, where they cannot.
        is_fatal: whether a failure is one, or only told.
        compiles: its cases do little else, and so say how long a kernel takes.
    """

    name: str
    cases: Sequence[Case]
    at_once: int = 1
    missing: str | None = None
    is_fatal: bool = True
    compiles: bool = False


@functools.cache
def digest(names: tuple[str, ...]) -> str:
    """Of the Python files that these paths of the repository are or hold."""
    found = hashlib.sha256()
    for path in (ROOT / name for name in names):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def sanitizer() -> str | None:
    """Where compute-sanitizer is, which CUDA installs beside its compiler and not on the path."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def parts(dry_run: bool, cores: int = CORES) -> Iterator[Part]:
    """What runs, in this order: whether results are right, how fast the kernels are, and then the rest."""
    device, dtype = ("cpu", "float32") if dry_run else ("cuda", "bfloat16")  # the interpreter has no bfloat16
    verify = ["-m", "dynconv", "verify", "--backends", "triton"]
    bench = ["-m", "dynconv", "bench", "--device", device]
    roofline = ["-m", "dynconv", "roofline", "--device", device]
    # The calls that are timed later, and checked: what they take beside other processes is not recorded. Those at
    # batch 128 want gigabytes of the GPU each, for their references in float64.
    once = ["--density", "0.5", "--repeats", "1", "--seconds", "0"]
    shapes = [("tiny", "1x1", 0), ("tiny", "offsets", 0)] if dry_run else LAYERS
    names = {name: FIRST[name] for name in ("linear width", "deformable")} if dry_run else FIRST
    ways = ["--ways", "sparse"] if dry_run else []
    first = [
        Case(name, [*verify, "--dtypes", dtype, *ways, "--cases", name], kernels, writes=True)
        for name, kernels in names.items()
    ] + [
        Case(
            f"{family} {text}", [*bench, "--dtype", dtype, *once, "--shapes", family, "--layers", text], kernels,
            runs=6, fills=True,
        )
        for family, text, kernels in shapes
    ]  # fmt: skip
    yield Part("first", first, cores, compiles=True)
    if dry_run:  # The interpreter compiles nothing: for a GPU that is not here.
        compiled = [
            Case(name, ["benchmarks/probe.py", name, "--target", "sm_90"], 4, environment=[("TRITON_INTERPRET", "0")])
            for name in ("linear", "aggregate")
        ]
        yield Part("compile", compiled, cores, compiles=True)

    def timed(name: str, families: str, runs: float, *options: str, tiny: str = "1x1", **more) -> Case:
        """A dry run has the tiny layers of that name."""
        few = ["--shapes", *families.split(), "--repeats", "15", "--seconds", "0.2"]
        if dry_run:
            few = [*once, "--shapes", "tiny", "--layers", tiny]
            options = [option for option in options if option in ("--baselines", "--automatic")]
        command = [*bench, "--dtype", more.pop("dtype", dtype), *few, *options]
        return Case(name, command, runs=runs, writes=True, stops=True, **more)

    alike = "resnet50 laudnet mobilenetv2 lasnet involution dcn"
    one = [
        timed("14x14", alike, 45, "--layers", "14x14", "--density", "0.25", tiny="x"),
        timed("linear", "linear", 5, "--layers", "1024"),
    ]
    yield Part("a layer of each family", one[:1] if dry_run else one)
    predicted = Case("kernels", [*roofline, "--kernels", "--measure"], 20, runs=20, writes=True)
    yield Part("prediction beside measurement", [predicted], is_fatal=False)
    yield Part("ceilings", [Case("of this machine", [*roofline, "--shapes"], writes=True)])

    has_plots = importlib.util.find_spec("matplotlib") is not None
    several = ["--density", "0.75", "0.5", "0.25"]
    plot = [("--plot", "bench.png")] if has_plots else []
    yield Part(
        "layers",
        [
            timed("filters", "dcn involution ddf carafe", 40, tiny="offsets"),
            timed("networks", "resnet50 laudnet mobilenetv2 linear lasnet sbnet", 90, *several, pictures=plot),
        ],
    )

    def probed(*options: str, **more) -> list[Case]:
        script = ["benchmarks/probe.py"]
        few = {name: PROBES[name] for name in ("linear", "block")} if dry_run else PROBES
        more["sources"] = (*PACKAGE, *script)
        return [
            Case(name, [*script, name, "--device", device, *options], kernels, **more) for name, kernels in few.items()
        ]

    missing, tool = "a dry run has no GPU" if dry_run else None, sanitizer()
    yield Part("probe", probed(), cores)
    yield Part("graphs", probed("--graph", after="probe"), cores, missing)
    missing = missing or (None if tool else "compute-sanitizer is not here")

    def sanitized(check: str) -> list[Case]:
        # Without PyTorch's cache every tensor is an allocation of its own, with its own bounds.
        alone = [("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")]
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9"]
        return probed(under=command, runs=25, environment=alone, after="probe")

    yield Part("memcheck", sanitized("memcheck"), max(1, cores // 4), missing)

    more = [] if dry_run else ["bfloat16", "tf32", "float16", "float32", "float64"]
    quick = [
        Case(f"{name}, {kind}", [*verify, "--quick", "--dtypes", kind, "--cases", *of], kernels, writes=True)
        for kind in more
        for name, (of, kernels) in QUICK.items()
    ]
    yield Part("verify", quick, cores, None if quick else "a dry run has verified one", compiles=True)

    pytest = ["-m", "pytest", "-v", "-rf", "--tb=short", "--maxfail=50", "-m", "gpu", "-p", "no:cacheprovider"]
    workers = min(2, cores) if dry_run else cores
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    tests = [
        Case(
            name, [*pytest, *parallel, *(f"tests/test_{file}.py" for file in files.split())], kernels, runs=30,
            workers=workers if parallel else 1, sources=(*PACKAGE, "tests"),
        )
        for name, (files, kernels) in TESTS.items()
    ]  # fmt: skip
    if dry_run:
        empty = [*pytest, *parallel, "tests/test_masked_conv.py", "-k", "triton and empty"]
        tests = [Case("empty masks", empty, sources=(*PACKAGE, "tests"))]
    yield Part("tests", tests)
    # What torch.compile makes takes seconds to compile: one size of each. torchvision has no bfloat16.
    peers = ["--baselines", "--modes", "plain", "--layers", "56x56", *several]
    automatic = ["--automatic", "--modes", "plain", "--layers", "3x3", *several]
    rest = [
        timed("peers", "resnet50 laudnet", 50, *peers),
        timed("filter peers", "dcn involution", 40, *peers, tiny="offsets", dtype="float32" if dry_run else "float16"),
        timed("automatic", "resnet50", 20, *automatic),
    ]
    if has_plots and not dry_run:
        rest.append(
            timed("scaling", "resnet50", 30, "--layers", "56x56 64->64", pictures=[("--scaling", "scaling.png")])
        )
    yield Part("more layers", rest)
    # Of asynchronous copies it reports what is none: told, and not fatal.
    yield Part("racecheck", sanitized("racecheck"), max(1, cores // 4), missing, is_fatal=False)
    swept = ["--shapes", "resnet50", "dcn", "involution", "laudnet", "mobilenetv2", "--one", "--dtype", dtype]
    if dry_run:
        swept = ["--shapes", "tiny", "--dtype", dtype, "--repeats", "1", "--most", "1", "--layers", "1x1"]
    script = "benchmarks/sweep.py"
    sweep = Case(
        "tiles", [script, "--device", device, *swept], 60, runs=30, writes=True, stops=True, sources=(*PACKAGE, script)
    )
    yield Part("sweep", [sweep])


class Clock:
    """The seconds of this call, and how long processes and kernels take to be started and compiled here."""

    def __init__(self, budget: float) -> None:
        self.begin, self.budget = time.monotonic(), budget
        # Until they are measured: what a process with PyTorch and CUDA, and a kernel with its launcher, take.
        self.startup, self.kernel = 8.0, 1.4
        self.is_measured = False

    def left(self) -> float:
        return self.begin + self.budget - time.monotonic()

    def needs(self, case: Case, is_compiled: bool = False) -> float:
        """The seconds that a case should take."""
        compiling = 0.0 if is_compiled else case.kernels * self.kernel / case.workers
        return self.startup + case.runs + compiling

    def learn(self, finished: Sequence[Running], compiled: int) -> None:
        """Take the time of a kernel from cases that do little but compile, if they had to."""
        cases = [one.case for one in finished if not one.stopped]
        kernels = sum(case.kernels for case in cases)
        seconds = sum(one.seconds for one in finished if not one.stopped)
        compiling = seconds - sum(self.startup + case.runs for case in cases)
        # Several processes compile a kernel that they share, each for itself, and the cache then holds one.
        if compiled > kernels / 3 and compiling > 0:
            self.kernel, self.is_measured = compiling / kernels, True


def kernels_compiled() -> int:
    """How many Triton's cache holds."""
    return sum(1 for _ in CACHE.glob("triton/*/__grp__*.json"))


def cache_name() -> str:
    """Which cache this is: one that is gone is another one when it is back."""
    file = CACHE / "name"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{time.time_ns():x}")
    return file.read_text()


class Results:
    """What is known of each case, in results.json: in --out, and in build/gpu for the next call."""

    def __init__(self, out: Path, machine: dict, dry_run: bool, known: dict) -> None:
        self.folders = {out.resolve(), KEPT.resolve()}
        self.machine, self.cases = machine, known["cases"]
        self.told: list[tuple[str, str]] = []
        self.kernel_seconds = known.get("kernel_seconds") if known.get("machine") == machine else None
        self.content = {
            "dry_run": dry_run, "machine": machine, "sources": digest(PACKAGE), "parts": [],
            "kernel_seconds": self.kernel_seconds, "cases": self.cases,
        }  # fmt: skip
        self.cache = cache_name()
        self.fills_again = False

    def of(self, part: Part, case: Case) -> dict | None:
        """What is known of a case with these sources on this kind of machine; where that matters, in this cache."""
        found = self.cases.get(f"{part.name}: {case.name}")
        if not found or found.get("belongs_to") != case.belongs_to(self.machine):
            return None
        return None if case.fills and self.fills_again and found.get("cache") != self.cache else found

    def is_compiled(self, case: Case) -> bool:
        """Whether another part has compiled its kernels into this cache."""
        found = self.cases.get(f"{case.after}: {case.name}", {})
        return found.get("outcome") == "passed" and found.get("cache") == self.cache

    def is_done(self, part: Part, case: Case) -> bool:
        """Whether it need not run again."""
        return (self.of(part, case) or {}).get("outcome") in ("passed", "reported")

    def note(self, part: Part, case: Case, **found) -> None:
        """Write down what is known of a case by now."""
        known = {"belongs_to": case.belongs_to(self.machine), "cache": self.cache} | found
        self.cases[f"{part.name}: {case.name}"] = known
        self.write()

    def summarise(self, name: str, told: str, seconds: float) -> None:
        """Write down what became of the cases of a part."""
        self.told.append((name, f"{told} in {seconds:.0f} s"))
        self.content["parts"].append({"part": name, "outcome": told, "seconds": round(seconds, 1)})
        self.write()

    def write(self) -> None:
        text = json.dumps(self.content, indent=1) + "\n"
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / "results.json.part"
            partial.write_text(text)
            partial.replace(folder / "results.json")


class Running:
    """A case whose process runs, or has ended."""

    def __init__(self, part: Part, case: Case, limit: float, out: Path, environment: dict) -> None:
        self.part, self.case, self.limit = part, case, limit
        self.begin, self.ended, self.stopped = time.monotonic(), None, None
        file = re.sub(r"\W+", "-", f"{part.name} {case.name}")
        self.json, self.log = CACHE / "rows" / f"{file}.json", CACHE / "rows" / f"{file}.txt"
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.unlink(missing_ok=True)
        self.size, self.looked = 0, self.begin
        command = [*case.under, sys.executable, *case.command]
        command += ["--json", str(self.json)] if case.writes else []
        command += ["--limit", f"{0.6 * limit:.0f}"] if case.stops else []
        for option, name in case.pictures:
            command += [option, str(out / name)]
        with self.log.open("wb") as file:
            # A group of its own, to be stopped with its compilers and sanitizers. Of the same session, which a machine
            # may end as a whole where this call itself is stopped.
            group = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment | dict(case.environment), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, **group,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Since it began, until it ended."""
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.monotonic()
        return (self.ended or time.monotonic()) - self.begin

    def stop(self, why: str) -> None:
        """End it, with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stopped = why

    def has_more(self) -> bool:
        """Whether it has written rows since the last look, of which there is one a second."""
        if time.monotonic() - self.looked < 1:
            return False
        self.looked, before = time.monotonic(), self.size
        self.size = self.json.stat().st_size if self.json.exists() else 0
        self.size += self.log.stat().st_size if "pytest" in self.case.command else 0
        return self.size != before

    def rows(self) -> dict | None:
        """What it has found by now."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(self.json.read_text())
        return tests_in(self.output()) if "pytest" in self.case.command else None

    def output(self) -> str:
        """What it has printed by now."""
        return self.log.read_text(errors="replace")


class Run:
    """A call: runs cases, and tells what becomes of them on the screen, in the log and in the results."""

    def __init__(self, out: Path, results: Results, clock: Clock, environment: dict) -> None:
        self.out, self.results, self.clock, self.environment = out, results, clock, environment
        self.failures: list[tuple[str, str]] = []  # what failed, and its output
        self.log = out / "log.txt"
        self.log.write_text("")

    def note(self, text: str) -> None:
        """Write to the log."""
        with self.log.open("a") as file:
            file.write(text + "\n")

    def tell(self, text: str) -> None:
        """Print, and write to the log."""
        print(text, flush=True)
        self.note(text)

    def part(self, part: Part, cases: Sequence[Case]) -> None:
        """Run some cases of a part."""
        waiting, running, finished, outcomes = list(cases), [], [], Counter()
        begin, in_cache = time.monotonic(), kernels_compiled()
        self.tell(f"\n=== {part.name}: {len(waiting)} to do, {self.clock.left():.0f} s left ===")
        try:
            while waiting or running:
                while waiting and len(running) < part.at_once:
                    begun = self.begin(part, waiting.pop(0))
                    if isinstance(begun, Running):
                        running.append(begun)
                    else:
                        outcomes[begun] += 1
                for one in [one for one in running if self.is_over(one)]:
                    running.remove(one)
                    finished.append(one)
                    outcomes[self.end(part, one)] += 1
                time.sleep(0.02)
        finally:
            for one in running:  # where this call is stopped
                one.stop("with all that ran")
                outcomes[self.end(part, one)] += 1
            counted = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
            self.results.summarise(part.name, counted, time.monotonic() - begin)
        if part.compiles:
            self.clock.learn(finished, kernels_compiled() - in_cache)
            self.results.content["kernel_seconds"] = self.clock.kernel if self.clock.is_measured else None

    def begin(self, part: Part, case: Case) -> Running | str:
        """Start a case, or say why not."""
        need, left = self.clock.needs(case, self.results.is_compiled(case)), self.clock.left() - 5
        if need > left:
            self.tell(f"{case.name}: not begun: needs about {need:.0f} s, {max(0, left):.0f} s left")
            return "not begun"
        environment = self.environment | {"OMP_NUM_THREADS": str(max(1, CORES // part.at_once))}
        try:
            return Running(part, case, min(left, PATIENCE + 2 * need), self.out, environment)
        except OSError as error:
            self.failures.append((f"{part.name}: {case.name}: FAILED: {error}", ""))
            self.results.note(part, case, outcome="FAILED", told=str(error))
            self.tell(f"{case.name}: FAILED: {error}")
            return "FAILED"

    def is_over(self, one: Running) -> bool:
        """Whether a process has ended, or is stopped now; what it has written by now is kept."""
        if one.process.poll() is None and one.seconds > one.limit:
            one.stop(f"stopped after {one.limit:.0f} s")
        is_over = one.process.poll() is not None
        if one.has_more() and not is_over:
            self.results.note(one.part, one.case, outcome="running", seconds=round(one.seconds, 1), rows=one.rows())
        return is_over

    def end(self, part: Part, one: Running) -> str:
        """Take down what a process has left; the outcome, as one counts it."""
        rows, output, status = one.rows(), one.output(), one.process.returncode
        left_out = (rows or {}).get("left_out")
        outcome, more = "passed", ""
        if one.stopped:
            outcome, more = "stopped", f": {one.stopped}"
        elif status:
            outcome, more = "FAILED" if part.is_fatal else "reported", f": exit status {status}"
        elif left_out:
            outcome, more = "stopped", f": no time for {len(left_out)} layers"
        found = {"outcome": outcome, "told": outcome + more, "seconds": round(one.seconds, 1), "rows": rows}
        if outcome != "passed":
            found["output"] = output[-MOST_KEPT:]
            self.failures.append((f"{part.name}: {one.case.name}: {outcome}{more}", output.strip()))
        self.results.note(part, one.case, **found)
        self.note(f"--- {part.name}: {one.case.name}\n{output}")
        self.tell(f"{one.case.name}: {outcome}{more} in {one.seconds:.1f} s")
        for line in lines_of(rows):
            self.tell("    " + line)
        return outcome


def lines_of(rows: dict | None) -> Iterator[str]:
    """What `verify`, `bench` and the tests have found, a line for each op, layer or failure."""
    worst: dict[tuple[str, str], list[str]] = {}
    for row in (rows or {}).get("rows", ()):
        if "quantity" in row:
            text = f"{row['quantity']} {shown(row['worst'], 2)}" + ("" if row["passed"] else " WRONG")
            worst.setdefault((row["op"], row["dtype"]), []).append(text)
    for (op, dtype), found in worst.items():
        yield f"{op} {dtype}, of the bounds: {', '.join(found)}"
    for row in [*(rows or {}).get("rows", ()), *(rows or {}).get("filters", ())]:
        if "mode" not in row or "check" not in row:
            continue
        name = f"{row['family']} {row['layer']} {row['mode']}" + (f" {row['density']:.2f}" if "density" in row else "")
        times = {key: row[key]["median"] for key in ("dense", "idiom", "sparse", "dynconv") if row.get(key)}
        if row.get("failure") or not times:
            yield f"{name}: {row.get('failure') or 'not timed'}"
            continue
        floor = f", floor / time {shown(row['of_floor'], 2)}" if row.get("of_floor") else ""
        yield f"{name}: {', '.join(f'{key} {shown(value, 4)} ms' for key, value in times.items())}{floor}"
    if "tests" in (rows or {}):
        yield ", ".join(f"{number} {outcome}" for outcome, number in rows["tests"].items())
        yield from rows["failed"]


def shown(value: float | str, digits: int) -> str:
    """A number; JSON has words for those that are not finite."""
    return value if isinstance(value, str) else f"{value:.{digits}f}"


# With pytest-xdist, and without.
TESTED = re.compile(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.*::.*?) *$|^(\S+::.*?) ([A-Z]{5,})\b", re.MULTILINE)


def tests_in(output: str) -> dict | None:
    """What `pytest -v` has printed by now: how many tests of each outcome, and which did not pass."""
    found = [(first or second, name or other) for first, name, other, second in TESTED.findall(output)]
    failed = [name for outcome, name in found if outcome in ("FAILED", "ERROR")]
    return {"tests": dict(Counter(outcome.lower() for outcome, _ in found)), "failed": failed} if found else None


def machine(environment: dict) -> tuple[dict | str, float]:
    """What is here, or the error that says what is not, and the seconds a process takes to find out."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MACHINE], cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1], seconds
    return json.loads(done.stdout.splitlines()[-1]), seconds


def earlier(text: str) -> dict:
    """The type of --resume: what an earlier call has written."""
    try:
        found = json.loads(Path(text).read_text())
        if isinstance(found["cases"], dict) and isinstance(found["dry_run"], bool):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"expected the results.json of an earlier call, got {text!r}")


def variables(dry_run: bool) -> dict:
    """The environment of all processes: the sources that are here, and a place for what they compile."""
    found = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DYNCONV_BACKEND")}
    if dry_run:
        found |= {"TRITON_INTERPRET": "1", "DYNCONV_BACKEND": "triton"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return found | {f"{name}_CACHE_DIR": str(CACHE / name.lower()) for name in ("TRITON", "TORCHINDUCTOR")}


def main() -> int:
    """Run what is left of the parts; 0 if all of them have passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or KEPT))
    parser.add_argument("--resume", type=earlier, metavar="FILE", help="results.json of an earlier call")
    parser.add_argument("--again", action="store_true", help="run what has passed as well")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"argument --out: expected a folder that can be written, got {str(arguments.out)!r}: {error}")
    clock, environment = Clock(BUDGET), variables(arguments.dry_run)
    here, clock.startup = machine(environment)
    if clock.startup > 10:  # the first process reads all files of PyTorch from a disk
        here, clock.startup = machine(environment)
    if isinstance(here, str):
        print(f"make gpu: this Python does not run what it needs: {here}; GPU_PYTHON=... names another")
        return 1
    if "capability" not in here and not arguments.dry_run:
        print("make gpu: PyTorch finds no CUDA device here; --dry-run walks through the parts without one")
        return 1
    known = arguments.resume
    if known is None and (KEPT / "results.json").exists():
        with contextlib.suppress(argparse.ArgumentTypeError):
            known = earlier(str(KEPT / "results.json"))
    if known is None or arguments.again or known["dry_run"] != arguments.dry_run:
        known = {"cases": {}}
    results = Results(out, here, arguments.dry_run, known)
    if results.kernel_seconds:
        clock.kernel, clock.is_measured = results.kernel_seconds, True
    run = Run(out, results, clock, environment)
    results.write()
    run.tell(json.dumps(here))
    if smi := shutil.which("nvidia-smi"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.note(subprocess.run([smi], capture_output=True, text=True, timeout=20).stdout)
    everything = list(parts(arguments.dry_run))
    # A cache may be younger than the results.
    results.fills_again = any(
        case.stops and not results.is_done(part, case) for part in everything for case in part.cases
    )
    fresh = {(part.name, case.name) for part in everything for case in part.cases if not results.of(part, case)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for is_fresh in (True, False):
            for part in everything:
                cases = [
                    case
                    for case in part.cases
                    if ((part.name, case.name) in fresh) == is_fresh and not results.is_done(part, case)
                ]
                if cases and not part.missing:
                    run.part(part, cases)
    except KeyboardInterrupt:
        run.tell("stopped")
    is_done = closing(run, everything)
    return 0 if is_done else 1


def closing(run: Run, everything: Sequence[Part]) -> bool:
    """Tell at the end what matters, as somebody may see no more than that; whether all is done."""
    results, clock, figures = run.results, run.clock, []
    for part in everything:
        if part.name == "a layer of each family":
            figures = [line for case in part.cases for line in lines_of((results.of(part, case) or {}).get("rows"))]
    lines = []
    for part in everything:
        done = sum(results.is_done(part, case) for case in part.cases)
        now = [text for name, text in results.told if name == part.name] or ["done before" if done else "not begun"]
        state = f"skipped: {part.missing}" if part.missing else "; ".join(now)
        lines.append(f"{part.name:<30} {done:>3} of {len(part.cases):<3} {state}")
    is_done = all(part.missing or all(results.is_done(part, case) for case in part.cases) for part in everything)
    how = "measured" if clock.is_measured else "assumed"
    lines.append(f"{clock.startup:.1f} s to start a process, {clock.kernel:.2f} s to compile a kernel ({how})")
    lines.append(f"{kernels_compiled()} kernels in the cache, {clock.left():.0f} s left of {clock.budget:.0f}")
    files = sorted(path for path in run.out.iterdir() if path.is_file())
    for path in files:
        much = ", MORE than come back" if path.stat().st_size > MOST_BYTES else ""
        lines.append(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB{much}")
    if len(files) > MOST_FILES:
        lines.append(f"{len(files)} files, MORE than the {MOST_FILES} that come back")
    lines.append("all done" if is_done else "not all done: another call goes on from here")
    summary = "\n=== summary ===\n" + "\n".join(lines)
    room = (MOST_PRINTED - len(summary)) // 2
    if figures:
        run.tell("\n=== figures ===\n" + "\n".join(figures)[:room])
    if run.failures:
        each = max(0, room // len(run.failures) - 100)
        found = (f"--- {what}\n{output[len(output) - min(len(output), each) :]}" for what, output in run.failures)
        run.tell("\n=== failures ===\n" + "\n".join(found))
    run.tell(summary)
    return is_done


if __name__ == "__main__":
    sys.exit(main())
