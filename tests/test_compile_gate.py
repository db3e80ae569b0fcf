"""Every kernel, config and dtype compiles for every target, and into the instructions it was written for.

The compiling is done by compile_gate.py in a process of its own: under TRITON_INTERPRET, which the other tests need
where there is no GPU, kernels cannot be compiled.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compile_gate import LOOPS_SHOWN, SHARED_LIMIT, TABLE_ROW, TARGETS

from dynconv import kernels

pytestmark = pytest.mark.slow

GATE = Path(__file__).with_name("compile_gate.py")
PINNED = re.search(r"triton==([\d.]+)", (GATE.parents[1] / "Makefile").read_text()).group(1)
GATHERED = ("gathered_conv_kernel", "gathered_weight_grad_kernel")
DEFORMABLE = ("deform_conv_kernel", "deform_weight_grad_kernel")
GEMMS = ("masked_conv_kernel", "weight_grad_kernel", *GATHERED, *DEFORMABLE)
# The matrix instruction of the target, and its older one for tiles of fewer than 64 rows.
TENSOR_CORE = {
    "sm_80": ("mma",),
    "sm_89": ("mma",),
    "sm_90": ("wgmma", "mma"),
    "sm_100": ("tcgen05", "mma"),
    "gfx942": ("mfma",),
}
# The targets for which every kernel is compiled: the fifth, sm_89, has what differs there.
FULL = ("sm_80", "sm_90", "sm_100", "gfx942")
# Kernels that read rows into registers, and the fewest 16-byte loads: of a depthwise kernel row's three taps the source
# and the weight; of wgrad the source and grad; rows, grad and residual; of a tile two splits, by 4 warps of AMD 8
# elements each; the source of all taps in a row of a dynamic filter, and of the four that a thread has in its
# gradients; four pixels around a position; one load elsewhere.
STREAMING = {
    "depthwise_conv_kernel": 6,
    "depthwise_weight_grad_kernel": 2,
    "epilogue_kernel": 2,
    "epilogue_backward_kernel": 3,
    "moments_kernel": 2,
    "gather_kernel": 1,
    "add_splits_kernel": 4,
    "aggregate_kernel": 4,
    "dynamic_filter_kernel": 3,
    "dynamic_filter_grad_kernel": 4,
    "channel_filter_grad_kernel": 4,
}


@functools.cache
def gate():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(GATE), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def compiled(target):
    return [row for row in gate() if row["target"] == target]


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def rows(target):
    return [row for row in compiled(target) if not row["error"]]


SHOWN = ("kernel", "function", "channels", "filters", "dtype", "precision", "variant", "tile", "registers", "spills")
SHOWN += ("shared", "warnings", "error")


def describe(rows):
    return "\n" + "\n".join(" ".join(f"{name}={row[name]}" for name in SHOWN if row[name] != "") for row in rows)


def is_gemm(row):
    return row["function"] in GEMMS


def test_all_compile(target):
    failed = [row for row in compiled(target) if row["error"]]
    assert not failed, describe(failed)


def test_every_config_is_compiled(target, rows):
    tiles = {(row["function"], row["tile"], row["num_warps"]) for row in rows}
    name = TABLE_ROW.get(target, target)
    for function, table in (
        ("masked_conv_kernel", kernels.masked_conv.CONV_TILES[name]),
        ("weight_grad_kernel", kernels.masked_conv.WEIGHT_GRAD_TILES[name]),
    ):
        for key, (block_m, block_n, block_k, num_warps, _) in table.items():
            assert (function, f"{block_m}x{block_n}x{block_k}", num_warps) in tiles, key


def test_no_spills(rows):
    # Another release than the pinned one (`make gate TRITON=...`) may be two registers short.
    most = 0 if triton.__version__ == PINNED else 8
    spilling = [row for row in rows if row["spills"] > most]
    assert not spilling, describe(spilling)
    # The constants of fp64's erf and exp together outnumber the scalar registers of gfx942; a few wait in lanes of
    # vector registers.
    spilling = [
        row for row in rows if row["scalar_spills"] > 0 and not ("gelu" in row["variant"] and row["dtype"] == "float64")
    ]
    assert not spilling, describe(spilling)


def test_shared_memory_fits(target, rows):
    too_large = [row for row in rows if row["shared"] > SHARED_LIMIT[target]]
    assert not too_large, describe(too_large)


def places(row):
    """How many programs of a kernel a multiprocessor has room for, by their shared memory and registers."""
    if row["target"] == "gfx942":  # four units of 512 registers for each of 64 lanes
        return min(65536 // row["shared"], 4 * (512 // (-(-row["registers"] // 8) * 8)) // row["num_warps"])
    shared = SHARED_LIMIT[row["target"]] + 1024  # of which each program takes 1 KiB more than its own
    registers = -(-row["registers"] // 8) * 8 * 32 * row["num_warps"]
    return min(shared // (row["shared"] + 1024), 65536 // registers)


def test_multiprocessors_have_room_for_the_programs_of_wgrad(target, rows):
    """As many as their splits count on: of tensor cores, and of rows that start on 16 bytes."""
    if target not in FULL:
        pytest.skip(f"{target} has not all of the tiles")
    found = [
        row
        for row in rows
        if row["function"] in ("weight_grad_kernel", "gathered_weight_grad_kernel")
        and (row["precision"] == "tf32" or row["dtype"] in ("float16", "bfloat16"))
        and "unaligned" not in row["variant"]
    ]
    seen = set()
    for row in found:
        block_m = int(row["tile"].split("x")[0])
        seen.add(block_m)
        assert places(row) >= kernels.masked_conv.weight_grad_places(block_m, target), describe([row])
    assert seen == {16, 64, 128}


def test_products_use_tensor_cores(target, rows):
    best, *_, older = TENSOR_CORE[target] * 2
    for row in rows:
        if not is_gemm(row) and row["function"] != "deform_input_grad_kernel":
            continue
        if row["dtype"] == "float64" or (row["precision"] == "ieee" and row["dtype"] == "float32"):
            continue  # fp64 and IEEE fp32: exactness, not tensor cores, is asked for
        # The product of deformable convolution is transposed: its rows are filters.
        block_m = int(row["tile"].split("x")[row["function"] == "deform_conv_kernel"])
        assert row[best if block_m >= 64 else older] > 0, describe([row])


def test_aligned_rows_are_copied_16_bytes_at_a_time(target, rows):
    if target == "gfx942":
        pytest.skip("gfx942 has no cp.async: its loads go through registers")
    for row in filter(is_gemm, rows):
        if "unaligned" in row["variant"]:
            continue
        is_wgrad = row["function"] in ("weight_grad_kernel", "gathered_weight_grad_kernel")
        if is_wgrad and row["precision"] == "tf32" and target in ("sm_90", "sm_100"):
            # Both operands of wgrad lie across K (K is the site), and wgmma takes TF32 along K only: they are
            # transposed on the way into shared memory, 4 bytes at a time.
            assert row["cp_async"] > 0, describe([row])
            continue
        copied = row["cp_async_16"]
        if target == "sm_90" and row["kernel"] in ("forward", "input_grad") and row["tile"] == "128x16x16":
            # Rows that are read a step ahead come into registers, and so small a tile of the weight in smaller pieces.
            copied += row["vector_16"]
        assert copied > 0, describe([row])


def is_copied(row):
    """Whether cp.async takes its elements: by 4 bytes or more, which single half-precision numbers are not."""
    return "unaligned" not in row["variant"] or row["dtype"] == "float32"


def most_barriers(row):
    """Of a step of its loop: one hands the tiles over, and one takes them back.

    What is loaded of a row inside of the loop goes to the threads that need it through shared memory, with barriers of
    its own: the place of a packed row, wgrad's sites, dgrad's gate.
    """
    flags = row["variant"].split("+")
    loads_rows = "packed" in flags or row["kernel"] in ("weight_grad", "gathered_weight_grad")
    if row["kernel"] == "input_grad" and "gate" in flags:
        return 6
    # A gathered convolution's packed source is so by columns.
    return 5 if loads_rows and row["kernel"] != "gathered_forward" else 2


def test_products_are_pipelined(target, rows):
    """In machine code: Triton gives up silently, and then each step waits for its own copies."""
    if target not in LOOPS_SHOWN:
        pytest.skip(f"the machine code of {', '.join(LOOPS_SHOWN)} is read; {target} has their IR, or other copies")
    # Deformable convolution samples into registers; fp64 is for exactness.
    found = [
        row
        for row in rows
        if is_gemm(row) and row["function"] not in DEFORMABLE and row["dtype"] != "float64" and is_copied(row)
    ]
    found = [row for row in found if row["wgmma"] or row["mma"]]
    assert {row["function"] for row in found} == set(GEMMS) - set(DEFORMABLE)
    for row in found:
        assert row["loops"], describe([row])
        for loop in row["loops"]:
            # In front of the loop lie the copies of the steps that its buffers hold, at least of one.
            assert loop["is_pipelined"] and loop["copies_before"] >= loop["copies"], (loop, describe([row]))
            assert loop["barriers"] <= most_barriers(row), (loop, describe([row]))


def test_the_assembler_serialises_no_product(rows):
    """But where A comes out of registers: rows multiplied by a gate of their tap."""
    warned = [row for row in rows if row["warnings"]]
    unknown = [row for row in warned if row["kernel"] != "input_grad" or "gate" not in row["variant"]]
    assert not unknown, describe(unknown)


def test_runs_of_channels_are_loaded_16_bytes_at_a_time(target, rows):
    """Through registers where there is no cp.async: the hints on gathered columns have to reach the loads."""
    found = [row for row in rows if row["function"] in GATHERED and "unaligned" not in row["variant"]]
    assert {row["function"] for row in found} == set(GATHERED if target in FULL else ())
    for row in found:
        if target != "gfx942":
            assert row["cp_async"] > 0, describe([row])
        elif "grouped" not in row["variant"]:  # the small tile of a group has less than 16 bytes for each thread
            # Both operands, in the loop and ahead of it: the loads are pipelined.
            assert row["vector_16"] >= 4, describe([row])


def test_what_belongs_to_a_row_stays_with_its_threads(rows):
    """Or it would go through shared memory at every tap, with barriers. What a softmax knows of a row does, once."""
    functions = ("aggregate_kernel", "dynamic_filter_kernel")
    found = [row for row in rows if row["function"] in functions and "softmax" not in row["variant"]]
    shared = [row for row in found if row["shared"]]
    assert not shared, describe(shared)


def test_aligned_rows_of_stencils_are_loaded_16_bytes_at_a_time(target, rows):
    """What streams through registers: by the thread, and for all taps of the kernel row that is unrolled."""
    found = {row["function"] for row in rows}
    for function, least in STREAMING.items():
        assert target not in FULL or function in found
        for row in rows:
            if row["function"] != function or "unaligned" in row["variant"]:
                continue
            assert row["vector_16"] >= least, describe([row])
