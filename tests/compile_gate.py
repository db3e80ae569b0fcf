"""Ahead-of-time compile gate: every kernel, config and dtype, compiled for GPUs that are not here.

The launchers themselves run, on CPU tensors and under a driver that claims to be the target, with the launch
itself left out. So what is compiled is what the launcher would run: its specialisation, options and config.

    python tests/compile_gate.py            prints the table
    python tests/compile_gate.py --json     prints the rows as JSON

Must run without TRITON_INTERPRET: under the interpreter the kernels are not compilable functions.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),  # has no row of its own in the tables: takes "default"
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TABLE_ROW = {"sm_89": "default"}
# Shared memory a program may use, bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 65536,
}

# What is counted, in the target's assembly.
PATTERNS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
    "cp_async_16": r"cp\.async\.cg\.shared\.global(?:\.[\w:]+)* \[[^]]*\], \[[^]]*\], 0x10",
    "cp_async": r"\bcp\.async\.c[ag]\.shared",
}


CASE = ("target", "kernel", "dtype", "allow_tf32", "channels", "filters", "variant")
DTYPES = {"half": ("float16", "bfloat16"), "tf32": ("float32",), "ieee": ("float32",), "double": ("float64",)}


def cases():
    """Everything that has to compile, as tuples of CASE: each row of the config tables in each of its dtypes.

    channels and filters are the K of a tap and the N of the GEMM.
    """
    from dynconv.kernels import masked_conv

    for target in TARGETS:
        row = TABLE_ROW.get(target, target)
        table = masked_conv.CONV_TILES[row]
        for (kind, width), (_, _, depth, _, _) in table.items():
            tf32 = kind == "tf32"
            for dtype in DTYPES[kind]:
                # The steps of a tap with fewer channels than BLOCK_K. bf16, the same instructions as fp16, takes
                # the full step only.
                for channels in (16, 32, 64):
                    if channels == depth or (channels < depth and dtype != "bfloat16"):
                        yield target, "forward", dtype, tf32, channels, width, ""
                yield target, "input_grad", dtype, tf32, depth, width, ""
            dtype = DTYPES[kind][0]
            yield target, "forward", dtype, tf32, depth - 1, width, "unaligned"
            if width == max(size for name, size in table if name == kind):
                yield target, "forward", dtype, tf32, depth, width, "gate+bias"
                if kind in ("half", "tf32"):
                    # Rows of 16-byte pieces whose length is no multiple of 16; and more taps than has_tap has bits.
                    yield target, "forward", dtype, tf32, 24, width, "1x1"
                    yield target, "forward", dtype, tf32, depth, width, "7x7"
                yield target, "input_grad", dtype, tf32, depth, width, "stride2+gate"
                yield target, "gate_grad", dtype, tf32, depth, width, ""
                yield target, "bias_grad", dtype, False, depth, width, "gate"
        table = masked_conv.WEIGHT_GRAD_TILES[row]
        for kind, width in table:
            for dtype in DTYPES[kind]:
                yield target, "weight_grad", dtype, kind == "tf32", width, width, ""
            if width == max(size for name, size in table if name == kind):
                yield target, "weight_grad", DTYPES[kind][0], kind == "tf32", width, width, "gate"
                yield target, "weight_grad", DTYPES[kind][0], kind == "tf32", width - 1, width - 1, "unaligned"
        yield target, "compaction", "bool", False, 1, 1, ""


class TargetDriver:
    """What Triton's launcher asks of a driver before it compiles."""

    def __init__(self, name):
        from triton.backends.compiler import GPUTarget

        self.name = name
        self.target = GPUTarget(*TARGETS[name])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.name  # the key of the kernels' caches

    def get_current_stream(self, device):
        return 0


def launch(case):
    """Calls the launcher of one case on small CPU tensors."""
    import torch

    from dynconv.kernels import compaction, masked_conv

    _, kernel, dtype, allow_tf32, channels, filters, variant = case
    if kernel == "compaction":
        mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
        index, count = compaction.compact(mask)
        compaction.inverse_map(index, count, mask.numel())
        compaction.touched(mask, (8, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
        return
    dtype = getattr(torch, dtype)
    step = 2 if "stride2" in variant else 1
    size = 8 // step
    source = torch.zeros(2, channels, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.zeros(2, filters, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    taps = {"1x1": 1, "7x7": 7}.get(variant, 3)
    weight = torch.zeros(filters, channels, taps, taps, dtype=dtype)
    index = torch.arange(128, dtype=torch.int32)
    inverse = index[: 2 * size * size]
    count = torch.full((1,), 128, dtype=torch.int32)
    gate = torch.ones(2 * size * size, dtype=dtype) if "gate" in variant else None
    bias = torch.zeros(filters, dtype=dtype) if "bias" in variant else None
    geometry = dict(stride=(step, step), padding=(taps // 2, taps // 2), dilation=(1, 1), allow_tf32=allow_tf32)
    if kernel == "forward":
        masked_conv.forward(source, weight, bias, index, count, gate, grad, **geometry)
    elif kernel == "input_grad":
        # The GEMM of dgrad sums over Cout and has Cin columns.
        weight = torch.zeros(channels, filters, 3, 3, dtype=dtype)
        grad, source = (
            source[:, :, ::step, ::step],
            grad.repeat_interleave(step, 2).repeat_interleave(step, 3),
        )
        grad, source = (t.contiguous(memory_format=torch.channels_last) for t in (grad, source))
        masked_conv.input_grad(grad, weight, inverse, index, count, gate, source, **geometry)
    elif kernel == "gate_grad":
        masked_conv.gate_grad(source, weight, bias, grad, index, count, **geometry)
    elif kernel == "weight_grad":
        masked_conv.weight_grad(source, grad, index, count, gate, weight, **geometry)
    elif kernel == "bias_grad":
        masked_conv.bias_grad(grad, index, count, gate)


def compile_case(case):
    """Rows of the table for one case: one for each kernel that its launcher would run."""
    import triton
    from triton.runtime.jit import JITFunction

    target = case[0]
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        began = time.perf_counter()
        binary = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, options, binary, time.perf_counter() - began))

    triton.runtime.driver.set_active(TargetDriver(target))
    JITFunction.run = compile_only
    try:
        launch(case)
    except Exception as error:  # a failed compile is a row of the table, not the end of it
        return [dict.fromkeys(COLUMNS, "") | dict(zip(CASE, case, strict=True)) | {"error": repr(error)}]
    finally:
        JITFunction.run = run
    return [
        describe(case, name, options, binary) | {"seconds": round(seconds, 2)}
        for name, options, binary, seconds in compiled
    ]


def describe(case, name, options, binary):
    target, kernel, dtype, _, channels, filters, variant = case
    tile = "x".join(str(options[key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if key in options)
    row = dict(
        target=target,
        kernel=kernel,
        function=name.strip("_"),
        error="",
        dtype=dtype,
        precision=options.get("PRECISION", ""),
        channels=channels,
        filters=filters,
        variant=variant,
        tile=tile,
        num_warps=binary.metadata.num_warps,
        num_stages=binary.metadata.num_stages,
        shared=binary.metadata.shared,
    )
    if "ptx" in binary.asm:
        assembly = binary.asm["ptx"]
        row |= nvidia_resources(binary.asm["cubin"])
    else:
        assembly = binary.asm["amdgcn"]
        row |= amd_resources(assembly)
    return row | {name: len(re.findall(pattern, assembly)) for name, pattern in PATTERNS.items()}


def nvidia_resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    instructions = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+((?:@!?U?P\w+ )?[A-Z][\w.]*)[^;]*;", sass, re.MULTILINE)
    return dict(
        registers=int(found["REG"]),
        spills=int(found["STACK"]) + int(found["LOCAL"]),
        instructions=len(instructions),
    )


def amd_resources(assembly):
    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))

    instructions = re.findall(r"^\t[a-z]\w+", assembly, re.MULTILINE)
    return dict(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size"),
        instructions=len(instructions),
    )


@functools.cache
def _path(name):
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _tool(name, *arguments):
    return subprocess.run([_path(name), *arguments], check=True, capture_output=True, text=True).stdout


def compile_all(selected, processes=2):
    """Rows of all selected cases, compiled in a pool of processes with a cache of their own."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with concurrent.futures.ProcessPoolExecutor(processes) as pool:
            return [row for rows in pool.map(compile_case, selected, chunksize=4) for row in rows]


COLUMNS = (
    "target kernel function channels filters dtype precision variant tile num_warps num_stages registers spills shared"
)
COLUMNS = (COLUMNS + " wgmma tcgen05 mma mfma cp_async_16 cp_async instructions seconds error").split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--kernel", action="append")
    arguments = parser.parse_args()
    selected = [
        case
        for case in cases()
        if (not arguments.target or case[0] in arguments.target)
        and (not arguments.kernel or case[1] in arguments.kernel)
    ]
    rows = compile_all(selected)
    if arguments.json:
        json.dump(rows, sys.stdout)
        return
    lines = [COLUMNS] + [[str(row[column]) for column in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
