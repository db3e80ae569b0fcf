"""The timing model: against values worked out by hand, and on kernels compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dynconv
from dynconv import _kernel_model as model
from dynconv import roofline
from dynconv.__main__ import main
from dynconv._machine_code import decode_text
from dynconv._programs import Access, LoopTrips, Trace, trace
from dynconv._warp import matrix_cycles, walk
from dynconv.cli import console, kernels
from dynconv.cli.layers import LAYERS
from dynconv.kernels import compaction
from dynconv.roofline import DATA_SHEETS, Measured, Prediction, Predictions


# NVIDIA's occupancy calculator: warps take registers in units of 256 from a quarter's 16384, programs shared memory in
# units of 128 bytes, 1 KiB of it reserved.
@pytest.mark.parametrize(
    ("device", "registers", "shared", "warps", "programs", "limit"),
    [
        ("H100", 32, 0, 8, 8, "warps"),
        ("H100", 16, 0, 1, 32, "blocks"),
        ("H100", 136, 32768, 4, 3, "registers"),  # 3 warps of 4352 registers a quarter
        ("H100", 128, 73728, 4, 3, "shared memory"),  # 4 warps a quarter; three times 73 KiB of 228
        ("H100", 255, 0, 8, 1, "registers"),
        ("H100", 168, 0, 4, 3, "registers"),
        ("A100", 64, 81920, 4, 2, "shared memory"),
        ("H100", 64, 227 * 1024, 4, 1, "shared memory"),
    ],
)
def test_occupancy(device, registers, shared, warps, programs, limit):
    found = model.occupancy(registers, shared, warps, model.GPUS[device])
    assert (found.programs, found.limit) == (programs, limit)


def test_what_fits_no_multiprocessor_is_refused():
    with pytest.raises(ValueError, match="shared memory: expected what fits a multiprocessor of NVIDIA A100"):
        model.occupancy(64, 164 * 1024, 4, model.GPUS["A100"])


def test_clocks_follow_from_the_data_sheets():
    """Four tensor cores of 512 products (A100: 256) a cycle make the data sheets' rates at the published clocks."""
    assert model.GPUS["H100"].clock == pytest.approx(1.83e9, rel=1e-3)
    assert model.GPUS["A100"].clock == pytest.approx(1.41e9, rel=5e-3)
    assert {name: gpu.multiprocessors for name, gpu in model.GPUS.items()} == {
        name: sheet.multiprocessors for name, sheet in DATA_SHEETS.items()
    }


def listing(*instructions):
    """What `nvdisasm -c -hex` prints of (text, stall, barrier that it sets, barriers that it waits for), and labels."""
    lines, address = [], 0
    for one in instructions:
        if isinstance(one, str):
            lines.append(f"{one}:")
            continue
        text, stall, sets, waits = (*one, *(1, None, ())[len(one) - 1 :])
        bits = stall | (7 if sets is None else sets) << 5 | 7 << 8 | sum(1 << 11 + wait for wait in waits)
        lines.append(f"        /*{address:04x}*/                   {text} ;   /* 0x{0:016x} */")
        lines.append(f"                                            /* 0x{bits << 41:016x} */")
        address += 16
    return decode_text("\n".join(lines))


def instruction(text):
    return listing((text,)).instructions[0]


@pytest.mark.parametrize(
    ("text", "arch", "expected"),
    [
        # 64 x 64 x 16 products at 4 x 512 a cycle; operands of 2 KiB each at 128 bytes a cycle.
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", 90, (32, 32)),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", 90, (64, 48)),
        ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24", 90, (64, 32)),  # A in registers
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24", 90, (32, 32)),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 80, (8, 0)),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 80, (8, 0)),
        ("DMMA.8x8x4 R4, R8, R12, R4", 80, (16, 0)),
    ],
)
def test_matrix_instructions(text, arch, expected):
    assert matrix_cycles(instruction(text), arch) == expected


def test_a_warp_stalls_as_the_assembler_says():
    code = listing(("MOV R1, R2", 4), ("FADD R3, R1, R1", 5), ("EXIT", 1), ("MOV R1, R2", 9))
    assert not code.loops
    made = walk(code, [], latency=400, arch=90)
    assert (made.cycles, made.issued) == (10, 3)
    # A load's 400 cycles count once somebody waits for it.
    load = ("LDG.E R4, desc[UR4][R2.64]", 2, 0)
    assert walk(listing(load, ("FADD R3, R3, R3", 4), ("EXIT", 1)), [], latency=400, arch=90).cycles == 7
    assert walk(listing(load, ("FADD R3, R4, R4", 4, None, (0,)), ("EXIT", 1)), [], latency=400, arch=90).cycles == 405


def test_loops_are_walked_as_often_as_told():
    code = listing(
        ("MOV R1, R2", 4), ".L_x_0", ("IADD3 R1, R1, 0x1, RZ", 4), ("@P0 BRA `(.L_x_0)", 5), ("EXIT", 1)
    )  # fmt: skip
    assert code.loops == ((1, 3),)
    for trips in (0, 1, 5, 1000):
        made = walk(code, [trips], latency=400, arch=90)
        assert made.issued == 2 + 2 * trips
        assert made.pipes["integer"] == 2 * trips
        if trips:
            assert made.cycles == 5 + 9 * trips
            assert (made.step.instructions, made.step.cycles, made.trips) == (2, 9, trips)
    with pytest.raises(ValueError, match="trips: expected one for each of 1 loops, got 2"):
        walk(code, [1, 2], latency=400, arch=90)


def test_a_loop_is_not_left_out():
    """Where the case without iterations comes first, and jumps over the loop; nested loops multiply."""
    code = listing(
        ("@P5 BRA `(.L_x_0)", 5), ("MOV R1, R2", 4), ("BRA `(.L_x_1)", 5), ".L_x_0", ("MOV R1, R2", 4), ".L_x_2",
        ("MOV R1, R2", 4), ".L_x_3", ("IADD3 R1, R1, 0x1, RZ", 4), ("@P0 BRA `(.L_x_3)", 5), ("@P1 BRA `(.L_x_2)", 5),
        ".L_x_1", ("EXIT", 1),
    )  # fmt: skip
    assert code.loops == ((4, 8), (5, 7))
    assert walk(code, [3, 10], latency=400, arch=90).issued == 2 + 3 * (2 + 10 * 2) + 1
    assert walk(code, [0, 0], latency=400, arch=90).issued == 4
    # A loop behind a jump that nothing decides is never come to, and that is told.
    code = listing(("BRA `(.L_x_1)", 5), ".L_x_0", ("MOV R1, R2", 4), ("@P0 BRA `(.L_x_0)", 5), ".L_x_1", ("EXIT", 1))
    assert walk(code, [3], latency=400, arch=90).missed == 1


def test_unrolled_loops_take_their_share():
    """Ten iterations in a loop of four at once and one for the two that are left; 256 threads load 4 bytes each."""
    load, store = ("LDG.E R4, desc[UR4][R2.64]", 2, 0), ("STG.E desc[UR4][R2.64], R4", 2)
    four = [".L_x_0", *[load] * 4, ("@P0 BRA `(.L_x_0)", 5)]
    one = [".L_x_1", load, ("@P1 BRA `(.L_x_1)", 5)]
    source = Access("partial", False, (256,), 4, 0, 10.0, 32.0)
    found = Trace(1, 1, 1, (LoopTrips(0, 1.0, 10.0),), (source,), {}, ())
    assert model._trips(found, listing(*four, *one, store), 256) == ([2.0, 2.0], [])
    assert model._trips(found, listing(*four, store), 256) == ([2.0], [])
    assert model._trips(found, listing(*one, store), 256) == ([10.0], [])
    trips, notes = model._trips(found, listing(*one, *four, store), 256)
    assert (trips, notes) == ([10.0, 1.0], ["2 loops in the machine code, 1 in the source"])
    # The loop that a compiler unrolls whole is the one with the fewest trips.
    nested = Trace(1, 1, 1, (LoopTrips(0, 1.0, 9.0), LoopTrips(1, 9.0, 18.0)), (source,), {}, ())
    assert model._trips(nested, listing(*one, store), 256) == ([9.0], [])


@pytest.mark.parametrize(("in_flight", "step"), [(0, 416), (1, 208), (2, 139), (3, 104)])
def test_copies_in_flight_hide_their_latency(in_flight, step):
    """Little's law: with n groups of copies in flight a step takes at least the latency over n + 1."""
    code = listing(
        ".L_x_0", ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", 4), ("LDGDEPBAR", 4, 0),
        (f"DEPBAR.LE SB0, 0x{in_flight:x}", 4), ("@P0 BRA `(.L_x_0)", 4), ("EXIT", 1),
    )  # fmt: skip
    made = walk(code, [600], latency=400, arch=90)
    assert made.inside / 600 == pytest.approx(step, rel=0.05)


def test_the_tensor_core_is_a_queue():
    """Eight instructions of 32 cycles a step, and the warp waits for the step before alone."""
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    code = listing(
        ".L_x_0", *[(product, 2)] * 7, (product + ", gsb0", 2), ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 4),
        ("@P0 BRA `(.L_x_0)", 4), ("EXIT", 1),
    )  # fmt: skip
    made = walk(code, [100], latency=400, arch=90)
    assert made.pipes["tensor"] == made.pipes["shared"] == 100 * 8 * 32
    assert made.step.cycles == 8 * 32


IR = """
module {
  tt.func public @kernel(%index: !tt.ptr<i32> {d = 16 : i32}, %count: !tt.ptr<i32>, %out: !tt.ptr<f32>, %taps: i32) {
    %c4_i32 = arith.constant 4 : i32
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %zero = arith.constant dense<0.000000e+00> : tensor<4xf32>
    %program = tt.get_program_id x : i32
    %rows = tt.load %count : !tt.ptr<i32>
    %start = arith.muli %program, %c4_i32 : i32
    %past = arith.cmpi sge, %start, %rows : i32
    cf.cond_br %past, ^bb1, ^bb2
  ^bb1:  // pred: ^bb0
    tt.return
  ^bb2:  // pred: ^bb0
    %lane = tt.make_range {end = 4 : i32, start = 0 : i32} : tensor<4xi32>
    %first = tt.splat %start : i32 -> tensor<4xi32>
    %row = arith.addi %first, %lane : tensor<4xi32>
    %limit = tt.splat %rows : i32 -> tensor<4xi32>
    %listed = arith.cmpi slt, %row, %limit : tensor<4xi32>
    %pointers = tt.splat %index : !tt.ptr<i32> -> tensor<4x!tt.ptr<i32>>
    %at = tt.addptr %pointers, %row : tensor<4x!tt.ptr<i32>>, tensor<4xi32>
    scf.for %tap = %c0_i32 to %taps step %c1_i32  : i32 {
      scf.for %part = %c0_i32 to %tap step %c1_i32  : i32 {
        %site = tt.load %at, %listed : tensor<4x!tt.ptr<i32>>
      }
    }
    %site = tt.load %at, %listed : tensor<4x!tt.ptr<i32>>
    %outs = tt.splat %out : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>>
    %where = tt.addptr %outs, %site : tensor<4x!tt.ptr<f32>>, tensor<4xi32>
    tt.store %where, %zero, %listed : tensor<4x!tt.ptr<f32>>
    tt.return
  }
}
"""


def test_programs_are_traced():
    """Ten listed rows by fours, of eight programs: three have work; rows 0, 100, 200, ... of out, a sector each."""
    arguments = dict(index=torch.arange(32, dtype=torch.int32) * 100, count=torch.tensor([10], dtype=torch.int32))
    arguments |= dict(out=torch.empty(3200), taps=5, BLOCK=4)
    found = trace(IR, arguments, (8, 1, 1), lambda name: True)
    assert (found.programs, found.working, found.storing, found.unknown) == (8, 3, 3, ())
    outer, inner = found.loops
    assert (outer.depth, outer.per_entry, inner.depth, inner.trips) == (0, 5, 1, 0 + 1 + 2 + 3 + 4)
    count, inside, site, out = found.accesses
    assert (count.executions, inside.executions, site.executions) == (8, 30, 3)
    assert [access.argument for access in found.accesses] == ["count", "index", "index", "out"]
    assert out.is_store
    assert out.sectors == pytest.approx(10 / 3)
    assert inside.sectors == 1
    assert found.touched["out", True] == pytest.approx(32 * 10 / 3)
    assert found.touched["index", False] == 32


def test_elements_that_no_kernel_has_written_are_not_believed():
    arguments = dict(index=torch.zeros(32, dtype=torch.int32), count=torch.tensor([2**30]), out=torch.empty(8), taps=1)
    found = trace(IR, arguments, (8, 1, 1), lambda name: name != "count")
    assert "the elements of count" in found.unknown
    assert found.working == 8  # all go where there is more to do
    arguments["count"] = torch.zeros(1, dtype=torch.int32)
    assert trace(IR, arguments, (8, 1, 1), lambda name: True).working == 0


def interpreted(monkeypatch):
    """The launches of kernels that Triton interprets from here on, as (name, arguments)."""
    from triton.runtime.interpreter import GridExecutor

    seen, run = [], GridExecutor.__call__

    def launch(self, *arguments, **keywords):
        run(self, *arguments, **keywords)
        seen.append((self.fn.__name__.strip("_"), dict(zip(self.arg_names, arguments)) | keywords))

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels themselves run")
def test_what_the_host_writes_is_what_kernels_write(monkeypatch):
    seen = interpreted(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    with dynconv.backend("triton"):
        sites = dynconv.ActiveSites(torch.rand(2, 1, 7, 6, generator=generator) < 0.4)
        assert len(sites.index) and len(sites.inverse)
        for stride, dilation in ((1, 1), (2, 1), (1, 2)):
            size = tuple((n - 1) * stride + 1 for n in (7, 6))
            assert len(sites.touched(size, 3, stride, dilation, dilation).index)
        kept = torch.rand(3, 6, generator=generator) < 0.5
        assert len(dynconv.ActiveChannels(kept, (3, 22), granularity=4).index)
        channels = dynconv.ActiveChannels(torch.rand(3, 24, generator=generator))
        assert len(compaction.channel_places(channels.index, channels.count, 4))
    assert {name for name, _ in seen} <= set(model.EMULATED)
    assert len(seen) > 5
    for name, arguments in seen:
        copied = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        reads = {"mask", "given"} if name != "compact_channels_kernel" else {"given"}
        if name in ("inverse_kernel", "channel_places_kernel"):
            reads = {"index", "count"}
        written = [key for key, value in copied.items() if isinstance(value, torch.Tensor) and key not in reads]
        if name == "inverse_kernel":  # what is not listed stays as it was
            copied["inverse"].fill_(-1)
        else:
            for key in written:
                copied[key].fill_(7)
        model.EMULATED[name](copied)
        for key in set(written) - {"block_counts"}:
            expected, actual = arguments[key], copied[key]
            if key == "index" and name != "compact_channels_kernel":  # past the count it is unspecified
                count = arguments["count"].view(-1, 1)
                listed = torch.arange(expected.shape[-1]) < count
                expected, actual = (value.view(len(count), -1)[listed] for value in (expected, actual))
            assert torch.equal(expected.view_as(actual), actual), (name, key)


SCRIPT = """
import json, sys
import torch, dynconv
from dynconv import roofline
from dynconv._masks import blob_mask
from dynconv._kernel_model import seen, GPUS

def made(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)

x, w, out = made(128, 64, 28, 28), made(64, 64, 3, 3), made(128, 64, 28, 28)
results = {}
def note(name, run, work=None, **options):
    found = roofline.predict(run, **options)
    floor = work and roofline.DATA_SHEETS["H100"].floor(work, torch.bfloat16).seconds
    kernels = [kernel.record() for kernel in found.kernels]
    results[name] = dict(seconds=found.seconds, notes=found.notes, floor=floor, kernels=kernels)

with torch.no_grad():
    for density in (0.1, 0.25, 0.5, 1.0):
        mask = blob_mask(128, 28, 28, density, torch.Generator().manual_seed(0)) | (density == 1)
        work = lambda mode: roofline.masked_conv2d(x.shape, w.shape, mask, padding=1, dtype=x.dtype, mode=mode)
        note(f"plain {density}", lambda: dynconv.masked_conv2d(x, w, padding=1, mask=mask), work("plain"))
        sites = dynconv.ActiveSites(mask)
        run = lambda: dynconv.masked_conv2d(x, w, padding=1, mask=sites, out=out)
        note(f"in place {density}", run, work("in-place"))
    mask = torch.zeros(128, 1, 28, 28, dtype=torch.bool); mask.view(-1)[:1000] = True
    run = lambda: dynconv.masked_conv2d(x, w, padding=1, mask=mask)
    note("1000", run)
    note("eager", run, launches="eager")
    note("A100", run, device="A100")
    kept = torch.arange(64).expand(128, 64) % 32 < 16
    note("gathered", lambda: dynconv.gathered_conv2d(x, w, padding=1, in_mask=dynconv.ActiveChannels(kept)))
leaf = x.detach().requires_grad_()
def step():
    torch.autograd.grad(dynconv.masked_conv2d(leaf, w, padding=1, mask=mask), leaf, torch.empty_like(out))
note("step", step)
assert roofline.predict(run).seconds == results["1000"]["seconds"]
json.dump(results, sys.stdout)
"""


def clean(cache):
    """An environment in which kernels are compiled."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DYNCONV_BACKEND")}
    return kept | {"TRITON_CACHE_DIR": str(cache)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def found(cache):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=clean(cache), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_predictions_of_compiled_kernels(found):
    assert not [one["notes"] for one in found.values() if one["notes"]]
    for way in ("plain", "in place"):
        calls = [found[f"{way} {density}"] for density in (0.1, 0.25, 0.5, 1.0)]
        assert all(call["seconds"] > call["floor"] for call in calls)
        # Of a plain call the zeros get fewer as the sites get more.
        times = [call["kernels"][-1]["seconds"] for call in calls]
        assert times == sorted(set(times))
    assert found["in place 0.25"]["seconds"] < found["plain 0.25"]["seconds"]
    kernels = {kernel["name"]: kernel for kernel in found["1000"]["kernels"]}
    assert list(kernels)[-1] == "masked_conv_kernel"
    conv = kernels["masked_conv_kernel"]
    # 1000 rows in tiles of 128 rows and all 64 columns; 9 taps of 64 channels, a step each.
    assert (conv["working"], conv["steps"]) == (8, 9)
    assert conv["step_barriers"] <= 2
    # Eight wgmma of 64 x 64 x 16, 32 cycles each, a step; one program on the busiest multiprocessor.
    assert conv["parts"]["tensor"] == pytest.approx(9 * 8 * 32 / model.GPUS["H100"].clock)
    # Fewest: 1000 rows of 64 channels written, at least as many read, and the weight.
    assert conv["bytes"] >= 2 * (2 * 1000 * 64 + 9 * 64 * 64)
    assert len(found["eager"]["kernels"]) == len(kernels)
    assert found["eager"]["seconds"] - found["1000"]["seconds"] == pytest.approx(len(kernels) * 1.5e-6)
    assert found["A100"]["seconds"] > found["1000"]["seconds"]
    gathered = found["gathered"]["kernels"][-1]
    assert gathered["name"] == "gathered_conv_kernel"
    assert gathered["steps"] > 0
    assert "aten::" not in found["1000"]["kernels"][-1]["name"]


def test_a_training_step_is_predicted(found):
    names = [kernel["name"] for kernel in found["step"]["kernels"]]
    assert names.count("masked_conv_kernel") == 2
    # The mask's sites, and the pixels that they read.
    assert names.count("compact_kernel") == 2
    dgrad = found["step"]["kernels"][-1]
    assert (dgrad["name"], dgrad["steps"]) == ("masked_conv_kernel", 9)
    # The pixels around the first 1000 sites: one line and one pixel more at the end, none before the image.
    assert dgrad["working"] == -(-(1000 + 28 + 1) // 128)


def test_what_cannot_be_predicted_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="device: expected one of H200, H100, A100 or None, got 'V100'"):
        roofline.predict(lambda: None, device="V100")
    with pytest.raises(ValueError, match="launches: expected one of graph, eager, got 'later'"):
        roofline.predict(lambda: None, launches="later")
    with pytest.raises(ValueError, match="launches: expected one of graph, eager, got 'later'"):
        roofline.predict_dense(roofline.Work(1, 1), torch.bfloat16, launches="later")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device: expected a GPU that is one of .* got no GPU, 0"):
            roofline.predict(lambda: None, device=None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected unset"):
        roofline.predict(lambda: None, device="H100")


def test_dense_calls():
    """600 TFLOP/s and 3.0 TB/s of an H100, and a microsecond to launch."""
    product = roofline.Work(6 * 10**10, 1)
    assert roofline.predict_dense(product, torch.bfloat16) == pytest.approx(1e-6 + 100e-6)
    moved = roofline.Work(1, 3 * 10**8)
    assert roofline.predict_dense(moved, torch.bfloat16) == pytest.approx(1e-6 + 100e-6, rel=0.01)


def prediction(name, seconds):
    return Prediction(name, parts={"launch": 1e-6, "bytes": seconds})


def test_measured_times_stand_beside_predictions():
    predicted = Predictions(
        tuple(map(prediction, ("a_kernel", "aten::zero_", "aten::sum", "b_kernel"), (2.0, 3.0, 4.0, 5.0)))
    )
    took = {"_a_kernel": 4.0, "fill": 1.0, "reduce, 1": 2.0, "_b_kernel": 5.0}
    kernels = [Measured(name, seconds) for name, seconds in took.items()]
    rows = roofline.compare(predicted, kernels)
    assert [row.name for row in rows] == ["a_kernel", "aten::zero_", "aten::sum", "b_kernel"]
    assert [row.measured for row in rows] == [4.0, 1.0, 2.0, 5.0]
    assert rows[0].ratio == pytest.approx(2.0)
    # A reduction in two kernels: PyTorch's own are taken together.
    rows = roofline.compare(predicted, [*kernels[:3], Measured("reduce, 2", 8.0), kernels[3]])
    assert [(row.name, row.measured) for row in rows[1:2]] == [("aten::zero_ + aten::sum", 11.0)]
    # What nobody predicted is shown.
    rows = roofline.compare(Predictions(predicted.kernels[:1]), [*kernels[:1], Measured("memset", 0.5)])
    assert (rows[1].name, rows[1].predicted, rows[1].measured, rows[1].ratio) == ("memset", None, 0.5, None)
    with pytest.raises(ValueError, match="measured: expected b_kernel after 1 kernels"):
        roofline.compare(predicted, kernels[:3])
    with pytest.raises(ValueError, match="measured: expected the kernels"):
        roofline.compare(predicted, [kernels[0], *kernels])


def test_kernels_are_measured_by_their_median():
    clock = iter([9.0, 1.0, 5.0, 3.0])  # the first starts the profiler
    calls = []

    def profile(run):
        run()
        return [("_a_kernel", next(clock)), ("fill", 1.0)]

    found = model.measure(lambda: calls.append(1), 3, profile)
    assert found == [Measured("_a_kernel", 3.0), Measured("fill", 1.0)]
    assert len(calls) == 2 + 4
    seen = iter([[], [("a", 1.0)], [("a", 1.0), ("b", 1.0)]])
    with pytest.raises(RuntimeError, match="run: expected the same kernels each time"):
        model.measure(lambda: None, 2, lambda run: next(seen))


def test_profiled_kernels_are_those_of_the_device(monkeypatch):
    from torch.autograd import DeviceType

    event = lambda name, kind, start: SimpleNamespace(
        name=name, device_type=kind, time_range=SimpleNamespace(start=start, elapsed_us=lambda: 2.0)
    )
    events = [event("b", DeviceType.CUDA, 5), event("launch", DeviceType.CPU, 1), event("a", DeviceType.CUDA, 2)]

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("torch.profiler.profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: real(1, **options))
    assert model._profile(lambda: None) == [("a", 2e-6), ("b", 2e-6)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the kernels of a GPU")
def test_a_gpu_is_measured():
    x = torch.randn(8, 64, 56, 56, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, mask = (
        torch.randn(64, 64, 3, 3, device="cuda", dtype=x.dtype),
        torch.rand(8, 1, 56, 56, device="cuda") < 0.25,
    )
    run = lambda: dynconv.masked_conv2d(x, weight, padding=1, mask=mask)
    with torch.no_grad():
        rows = roofline.compare(roofline.predict(run, device=None), roofline.measure_kernels(run, 3))
    assert rows[-1].name == "masked_conv_kernel"
    assert all(row.ratio is not None and row.ratio > 0.2 for row in rows if row.name.endswith("_kernel"))


def test_measured_layers_are_shown(monkeypatch, capsys):
    """With a clock of its own; a layer that cannot be measured does not keep the others from it."""
    predicted = Predictions((prediction("a_kernel", 2e-6), prediction("aten::zero_", 3e-6)))
    monkeypatch.setattr(kernels, "call", lambda *arguments: None)
    monkeypatch.setattr(roofline, "predict", lambda run, **options: predicted)
    took = iter([[Measured("_a_kernel", 4e-6), Measured("fill", 3e-6)], [Measured("other", 1e-6)]])
    monkeypatch.setattr(roofline, "measure_kernels", lambda run: next(took))
    layer = LAYERS["tiny"][0]
    mask = layer.active(0.5, "random", 1, torch.Generator().manual_seed(0))
    options = dict(device=None, on="H100", launches="graph", measured=True)
    rows = list(kernels.rows(layer, mask, 1, torch.bfloat16, ("plain", "in-place"), **options))
    assert [one.ratio for one in rows[0].compared] == [pytest.approx(2.0), pytest.approx(3 / 4)]
    assert rows[1].error.startswith("ValueError: measured: expected a_kernel after 0 kernels, got ['other']")
    assert json.loads(json.dumps(rows[0].record()))["compared"][0]["ratio"] == pytest.approx(2.0)
    kernels.show(rows, console(), "H100", "bfloat16")
    printed = capsys.readouterr().out
    assert "measured / predicted" in printed
    assert "2.00x" in printed
    assert "in-place: not measured: ValueError" in printed


def test_the_command(cache, tmp_path, found):
    files = ["--json", str(tmp_path / "kernels.json"), "--markdown", str(tmp_path / "kernels.md")]
    options = [
        "--kernels",
        "--device",
        "H100",
        "--dtype",
        "bfloat16",
        "--shapes",
        "tiny",
        "--modes",
        "plain",
        "in-place",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "dynconv", "roofline", *options, "--density", "0.5", *files], env=clean(cache),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "PREDICTIONS for an NVIDIA H100 SXM, bfloat16: no measurement" in run.stdout
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["environment"] == {"device": "NVIDIA H100 SXM", "source": "data sheet"}
    rows = record["predictions"]
    assert {row["mode"] for row in rows} == {"plain", "in-place", "shared"}
    assert all(row["seconds"] > row["floor"] > 0 and row["kernels"] for row in rows)
    shared, plain = (
        next(row for row in rows if row["mode"] == mode and "1x1" in row["layer"]) for mode in ("shared", "plain")
    )
    assert len(shared["kernels"]) < len(plain["kernels"])
    page = (tmp_path / "kernels.md").read_text()
    assert "**Predictions, no measurement.**" in page
    assert "masked_conv_kernel" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernels"], "argument --device: expected cuda or one of H200, H100, A100 with --kernels, got 'cpu'"),
        (["--kernels", "--device", "H100", "--measure"], "argument --measure: expected --device cuda, got 'H100'"),
        (["--measure", "--device", "H100"], "argument --measure: expected --kernels beside it"),
        (["--kernels", "--device", "H100"], "argument --kernels: expected TRITON_INTERPRET unset"),
        (["--layers", "("], "argument --layers: expected a regular expression, got '('"),
    ],
)  # fmt: skip
def test_the_command_refuses(options, message, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        main(["roofline", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
