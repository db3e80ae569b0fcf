"""`python -m dynconv`: what is right passes, what is wrong fails, and the numbers are what they say."""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dynconv
from dynconv import _timing as timing
from dynconv.__main__ import COMMANDS, main
from dynconv.cli import bench, bounds, chains, deform, demo, digits, extra, filters, gathered, photos, scaling, verify
from dynconv.cli.bench import Row, crossover, geometric_mean, measure, prepare, summarise
from dynconv.cli.environment import replacing
from dynconv.cli.layers import FILTERS, LAYERS, Block, Filter, Layer, Width, blob_mask, patch, random_mask, reached
from dynconv.nn import MaskedBottleneck
from dynconv.roofline import Device

ROOT = Path(__file__).resolve().parent.parent
TINY = Layer("tiny", 12, 10, 8, 16, 3)
FORWARD = {"output", "output, autograd", "in place"}
GATHERED = {"output", "output, autograd", "grad input", "grad weight", "grad bias", "grad gate"}
QUANTITIES = {
    "masked_conv2d": {
        "output", "in place", "grad input", "grad weight", "grad bias", "grad gate", "grad inactive",
    },
    "fused epilogue": FORWARD | {f"grad {name}" for name in ("input", "weight", "bias", "residual", "inactive")},
    "packed chain": FORWARD | {f"grad {name}" for name in ("input", "weight", "bias", "gate", "residual", "inactive")},
    "Bottleneck, eval": FORWARD | {"grad input", "grad weight", "grad norm", "grad gate"},
    "Bottleneck, train": {"output", "grad input", "grad gate", "grad parameters", "running statistics"},
    "gathered_conv2d": GATHERED,
    "packed channels": GATHERED - {"grad gate"},
    "gathered_linear": GATHERED,
    "deform_conv2d": {
        "output", "output, autograd", "grad input", "grad offset", "grad weight", "grad bias", "grad mask",
    },
    "deform_aggregate2d": {"output", "output, autograd", "grad input", "grad offset", "grad weights"},
    "dynamic_filter2d": {
        "output", "output, autograd", "grad input", "grad filters", "grad channel_filters", "grad gate",
    },
}  # fmt: skip


@pytest.fixture
def broken(monkeypatch):
    """The op with a result that is slightly off."""
    right = dynconv.masked_conv2d

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        if isinstance(result, dynconv.PackedFeatures):
            return result._replace(rows=result.rows * 1.001)
        return result * 1.001 if options.get("out") is None else result.mul_(1.001)

    monkeypatch.setattr(dynconv, "masked_conv2d", wrong)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(LAYERS, "resnet50", (TINY,))


@pytest.fixture
def tiny_block(monkeypatch):
    monkeypatch.setitem(LAYERS, "resnet50", (TINY, Block("resnet50", "bottleneck", 6, 5, 16)))


# --- bounds


def test_a_sum_lies_within_its_bound_and_a_wrong_one_does_not():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 500, generator=generator), torch.randn(500, 64, generator=generator)
    expected, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = bounds.Arithmetic(torch.float32).bound(expected, magnitude, 500)
    assert bounds.judge(a @ b, expected, bound).passed
    one_term_short = a[:, 1:] @ b[1:]
    assert not bounds.judge(one_term_short, expected, bound).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_rounding_is_allowed_and_two_units_are_not(dtype):
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound = bounds.Arithmetic(dtype).bound(exact, torch.zeros_like(exact), 0)
    assert bounds.judge(exact.to(dtype), exact, bound).passed
    assert not bounds.judge(exact.to(dtype) * (1 + 4 * torch.finfo(dtype).eps), exact, bound).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value):
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, value, 1.0])
    assert bounds.judge(good, good, torch.zeros(4)).passed
    for actual, expected, bound in ((bad, good, good), (good, bad, good), (good, good, bad)):
        assert not bounds.judge(actual, expected, bound).passed


def test_another_shape_fails():
    assert not bounds.judge(torch.ones(4), torch.ones(1, 4), torch.ones(1, 4)).passed


# --- masks and shapes


@pytest.mark.parametrize("make", [random_mask, blob_mask])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.25, 0.9, 1.0])
def test_masks_have_their_density_and_repeat(make, density):
    mask, again = (make(3, 28, 20, density, torch.Generator().manual_seed(5)) for _ in range(2))
    assert mask.shape == (3, 1, 28, 20)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == round(density * mask.numel())
    assert torch.equal(mask, again)


def test_blobs_are_smoother_than_noise():
    edges = []
    for make in (random_mask, blob_mask):
        mask = make(1, 64, 64, 0.5, torch.Generator().manual_seed(0))
        edges.append(int((mask[..., 1:] != mask[..., :-1]).sum()))
    assert edges[1] < edges[0] / 3


@pytest.mark.parametrize("share", [0.012, 0.05, 0.15])
def test_a_patch_covers_its_share(share):
    assert patch(256, 256, share).float().mean().item() == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (5, 2)])
def test_reached_is_what_a_change_changes(kernel, stride):
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(2, 1, 13, 12, generator=generator)
    change = torch.rand(2, 1, 13, 12, generator=generator) < 0.05
    weight = torch.ones(1, 1, kernel, kernel)
    results = [F.conv2d(x.double(), weight.double(), None, stride, kernel // 2) for x in (before, before + 2 * change)]
    assert torch.equal(reached(change, kernel, stride), (results[1] - results[0]) > 1)


def test_published_layers():
    assert [layer.name for layer in LAYERS["resnet50"][:2]] == ["56x56 64->64 3x3", "28x28 128->128 3x3"]
    assert {layer.kernel for layer in LAYERS["sbnet"] if isinstance(layer, Layer)} == {1, 3}
    blocks = {family: [layer.name for layer in LAYERS[family] if isinstance(layer, Block)] for family in LAYERS}
    assert blocks["sbnet"][0] == "400x700 256 bottleneck"
    assert blocks["lasnet"][::3] == ["56x56 256 bottleneck in cells of 4x4", "7x7 2048 bottleneck"]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import layers
    finally:
        sys.path.pop(0)
    assert layers.LAYERS is LAYERS


# --- timing and statistics


def test_quantiles():
    taken = timing.Timing.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    assert (taken.median, taken.low, taken.high, taken.samples) == (3.5, 2.0, 5.0, 6)


def test_calls_take_turns(monkeypatch):
    # A clock that every look at it moves on: how many calls make a sample must not depend on the machine's other work.
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=itertools.count(0, 1e-6).__next__))
    order = []
    calls = {name: lambda _, name=name: order.append(name) for name in "abc"}
    taken = timing.take_turns(calls, "cpu", repeats=8, seconds=0)
    assert taken["a"].samples == timing.LEAST_SAMPLES
    assert order[:9] == [*"aaabbbccc"]  # the warm-up
    samples = order[9 :: timing.MOST_CALLS]
    assert order[9:] == [name for name in samples for _ in range(timing.MOST_CALLS)]
    assert all(sorted(samples[turn : turn + 3]) == [*"abc"] for turn in range(0, len(samples), 3))
    order.clear()
    timing.take_turns(calls, "cpu", repeats=40, seconds=60)
    samples = order[9 :: timing.MOST_CALLS]
    before = Counter(itertools.pairwise(samples))
    assert all(before[one, other] > 5 for one in "abc" for other in "abc" if one != other)
    with pytest.raises(ValueError, match="repeats"):
        timing.take_turns(calls, "cpu", repeats=0)


def test_a_slow_call_is_a_sample_of_its_own():
    calls = []
    timing.take_turns({"slow": lambda _: calls.append(time.sleep(timing.CPU_SAMPLE * 1e-3))}, "cpu", 8, seconds=0)
    assert len(calls) == 3 + timing.LEAST_SAMPLES


def test_crossover_of_a_line():
    # Time relative to dense 0.2 + 1.6 d: dense is reached at d = 0.5.
    points = [(density, 1 / (0.2 + 1.6 * density)) for density in (0.9, 0.1, 0.3, 0.7)]
    assert crossover(points).density == pytest.approx(0.5)
    assert crossover(points).text == "0.50"


@pytest.mark.parametrize(
    "points, text",
    [([(0.1, 5.0), (0.9, 1.1)], "above 0.9"), ([(0.1, 0.9), (0.9, 0.2)], "below 0.1"), ([], "not measured")],
)
def test_crossover_outside_of_what_was_measured(points, text):
    assert crossover(points) == (type(crossover([]))(None, text))


def test_summary_takes_the_3x3_layers_that_were_right():
    def row(layer, kernel, ratio, failure=None, kind="layer"):
        check = bounds.Verdict(0.0, 1.0, 0.0, failure is None)
        made = Row("f", layer, kernel, "plain", 1, 0.25, 0.25, check, 0.25, failure, kind=kind)
        if failure is None:
            made.dense, made.sparse = timing.Timing(ratio, ratio, ratio, 5), timing.Timing(1.0, 1.0, 1.0, 5)
        return made

    rows = [
        row("a", 3, 1.0),
        row("b", 3, 4.0),
        row("c", 1, 100.0),
        row("d", 3, 9.0, "wrong"),
        row("e", 0, 3.0, kind="block"),
        row("g", 1, 5.0, kind="width"),
    ]
    summary = summarise(rows)
    assert [(mean["layers"], mean["ratio"]) for mean in summary["means_blocks"]] == [(1, pytest.approx(3.0))]
    assert [(mean["layers"], mean["ratio"]) for mean in summary["means_width"]] == [(1, pytest.approx(5.0))]
    (mean,) = summary["means_3x3"]
    assert mean["layers"] == 2
    assert mean["ratio"] == pytest.approx(2.0)
    assert mean["share"] == pytest.approx(0.5)
    assert geometric_mean([1.0, 100.0]) == pytest.approx(10.0)


def test_least_squares():
    slope, intercept = scaling.least_squares([(x, 3 * x + 2) for x in range(5)])
    assert (slope, intercept) == pytest.approx((3, 2))


def test_peak_memory_is_that_of_the_allocator():
    def call():
        held = torch.empty(2**20)
        torch.empty(2**20).zero_()
        return held

    assert 8 * 2**20 <= scaling.peak_extra_bytes(call, "cpu") < 9 * 2**20


# --- verify


def test_verify_passes_and_records_every_quantity(tmp_path, capsys):
    target = tmp_path / "verify.json"
    status = main(["verify", "--quick", "--backends", "cpu", "--dtypes", "float32", "--json", str(target)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "PASS" in printed
    assert "FAIL" not in printed
    record = json.loads(target.read_text())
    assert record["passed"]
    for op, quantities in QUANTITIES.items():
        assert {row["quantity"] for row in record["rows"] if row["op"] == op} == quantities
    for row in record["rows"]:
        assert row["op"] in QUANTITIES
        assert (row["backend"], row["dtype"]) == ("cpu", "float32")
        assert row["passed"]
        assert row["cases"] > 0
        assert row["elements"] > 0
        assert 0 <= row["worst"] <= 1
        assert row["source"]
    assert {"date", "torch", "numba", "threads", "commit"} <= record["environment"].keys()
    assert str(ROOT) not in target.read_text()


def test_verify_takes_the_cases_that_are_named():
    chosen = {
        kind.__name__: [case.name for case in cases] for kind, cases in verify.cases_of(True, ["1x1", "bottleneck"])
    }
    few = {"MaskedConv2d": ["1x1"], "EvalBlock": ["bottleneck"], "BlockTraining": ["bottleneck"]}
    assert {name: cases for name, cases in chosen.items() if cases} == few
    assert not any(cases for _, cases in verify.cases_of(True, ["3x3 full"]))


def test_verify_fails_a_wrong_op(broken, capsys):
    assert main(["verify", "--quick", "--backends", "cpu", "--dtypes", "float32"]) == 1
    printed = capsys.readouterr().out
    for op in ("masked_conv2d", "fused epilogue", "packed chain"):
        assert f"FAILED {op} cpu float32 output: out of bound" in printed


def test_verify_fails_a_wrong_block(monkeypatch, capsys):
    right = MaskedBottleneck.forward

    def wrong(self, input, mask=None, **options):
        output = right(self, input, mask, **options)
        return output if dynconv._backend.forced_backend() == "reference" else output * 1.001

    monkeypatch.setattr(MaskedBottleneck, "forward", wrong)
    assert main(["verify", "--quick", "--backends", "cpu", "--dtypes", "float32"]) == 1
    printed = capsys.readouterr().out
    for op in ("Bottleneck, eval", "Bottleneck, train"):
        for quantity in ("output", "grad input"):
            assert f"FAILED {op} cpu float32 {quantity}: out of bound" in printed
    assert "FAILED masked_conv2d" not in printed


def test_verify_fails_an_op_that_raises(monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise ValueError("no such thing")

    monkeypatch.setattr(dynconv, "masked_conv2d", refuse)
    assert main(["verify", "--quick", "--backends", "cpu", "--dtypes", "float32"]) == 1
    assert "ValueError: no such thing, in 10 of 10 cases" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "kind, name",
    [
        (verify.MaskedConv2d, "3x3 gate"),
        (chains.MaskedChain, "relu 3x3 gate"),
        (chains.MaskedChain, "inverted residual packed"),
        (chains.EvalBlock, "bottleneck"),
        (chains.BlockTraining, "bottleneck"),
        (filters.DynamicFilter, "filters of channels"),
        (filters.DynamicFilter, "filters, softmax"),
        (deform.Deformable, "deformable"),
        (deform.Deformable, "aggregation, softmax"),
    ],
)
def test_verify_sees_one_wrong_element_of_any_quantity(monkeypatch, kind, name):
    cases = [case for case in kind.cases if case.name == name]
    right = kind.actual

    def failed(wrong):
        def actual(self):
            results = right(self)
            if wrong is not None:
                values = results[wrong]
                last = (values if isinstance(values, torch.Tensor) else values[-1]).clone()
                last[(-1,) * last.dim()] += 0.01
                results[wrong] = last if isinstance(values, torch.Tensor) else (*values[:-1], last)
            return results

        monkeypatch.setattr(kind, "actual", actual)
        rows = list(verify.verify("cpu", "float64", [(kind, cases)]))
        return {row.quantity for row in rows if not row.passed}, {row.quantity for row in rows}

    nothing, quantities = failed(None)
    assert nothing == set()
    for quantity in quantities:
        assert failed(quantity)[0] == {quantity}


@pytest.mark.parametrize("kind", [chains.MaskedChain, chains.EvalBlock, filters.DynamicFilter, deform.Deformable])
def test_expectations_of_chains_are_the_reference(kind):
    """The dense float64 values, and gradients written out by hand, are those of autograd on the reference backend."""
    for case in kind.cases:
        checked = kind(case, torch.float64, "cpu")
        checked.expect(lambda: bounds.Arithmetic(torch.float64), "cpu")
        with dynconv.backend("reference"):
            actual = checked.actual()
        assert actual.keys() == checked.expected.keys()
        for quantity, expected in checked.expected.items():
            for one, other in zip(actual[quantity], expected, strict=True):
                assert torch.allclose(one, other, rtol=1e-10, atol=1e-12), (case.name, quantity)


def test_a_slope_is_open_where_an_error_reaches_across_the_kink():
    value, error = torch.tensor([-1.0, -1e-3, 1e-3, 1.0]), torch.tensor([1e-2] * 4)
    slope = bounds.Arithmetic(torch.float32).slope(bounds.Bounded(value, error), "relu")
    assert slope.value.tolist() == [0, 0, 1, 1]
    assert slope.error.tolist() == [0, 1, 1, 0]


def test_training_is_judged_by_plain_pytorch():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1000, generator=generator, dtype=torch.float64)
    rounded = exact.float()
    judged = lambda actual: bounds.judge_training([actual], [rounded], [exact], actual.dtype)
    assert judged(rounded).passed
    assert not judged(rounded * (1 + 1e-5)).passed
    one_off = rounded.clone()
    for change in (1e-3, math.nan):
        one_off[3] += change
        assert not judged(one_off).passed
    assert not judged(rounded[1:]).passed
    # The error of float32 stands for that of float64, 2^29 times smaller.
    assert judged(exact * (1 + 2.0**-52)).passed
    assert not judged(exact * (1 + 1e-12)).passed


def test_verify_says_what_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in verify.unavailable("triton", "float32")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert verify.unavailable("triton", "float32") is None
    assert "interpreter" in verify.unavailable("triton", "bfloat16")
    assert verify.unavailable("cpu", "float32") is None


# --- bench


def run_bench(*arguments):
    return main(["bench", "--quick", "--repeats", "3", "--shapes", "resnet50", "--batch", "2", *arguments])


def test_bench_writes_consistent_results(tiny, tmp_path, capsys):
    results, plot = tmp_path / "made" / "bench.json", tmp_path / "bench.png"
    assert run_bench("--density", "0.5", "0.1", "--json", str(results), "--plot", str(plot)) == 0
    record = json.loads(results.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(record["rows"]) == 2 * 3
    for row in record["rows"]:
        assert row["check"]["passed"]
        assert row["ratio"] == pytest.approx(row["dense"]["median"] / row["sparse"]["median"])
        assert row["ideal"] == pytest.approx(1 / row["density"])
        assert row["share"] == pytest.approx(row["ratio"] / row["ideal"])
        for name in ("dense", "sparse", "compaction"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    assert {crossing["mode"] for crossing in record["summary"]["crossover"]} == {"plain", "in-place", "backward"}
    assert str(ROOT) not in results.read_text()
    printed = capsys.readouterr().out
    assert "6 of 6 results within their bounds" in printed


def test_bench_draws_blocks_beside_layers(tiny_block, tmp_path):
    plot = tmp_path / "bench.png"
    assert run_bench("--density", "0.5", "--modes", "plain", "--plot", str(plot)) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_prints_no_speedup_of_a_wrong_op(tiny, broken, tmp_path, capsys):
    results = tmp_path / "bench.json"
    plot = tmp_path / "bench.png"
    status = run_bench("--density", "0.5", "--modes", "plain", "in-place", "--json", str(results), "--plot", str(plot))
    assert status == 1
    printed = capsys.readouterr().out
    assert "FAILED tiny 12x10 8->16 3x3 plain at 0.500: wrong result" in printed.replace("\n", " ")
    assert "%|" not in printed
    for row in json.loads(results.read_text())["rows"]:
        assert row["ratio"] is None
        assert row["sparse"] is None


def test_bench_sees_a_wrong_gradient(monkeypatch):
    right = torch.autograd.grad

    def wrong(output, inputs, grad):
        grads = right(output, inputs, grad)
        return grads[0], grads[1] * 1.01

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    (row,) = measure(TINY, [0.5], ["backward"], batch=1, repeats=1)
    assert row.failure.startswith("wrong result")


@pytest.mark.parametrize("kind", ["bottleneck", "inverted"])
def test_bench_checks_and_times_whole_blocks(kind):
    block = Block("tiny", kind, 9, 8, 16)
    rows = list(measure(block, [0.5, 0.2], ["plain", "in-place", "backward"], batch=2, repeats=1))
    assert [row.failure for row in rows] == [None] * 6
    assert all(row.ratio > 0 and 1 < row.ideal <= 1 / row.density for row in rows)


WIDTHS = {
    "groups": Width("tiny", 6, 5, 32, 48, 3, 16),
    "single channels": Width("tiny", 6, 5, 24, 20, 1, 1),
    "linear": Width("tiny", 1, 1, 64, 48, 1, 16, linear=True),
}


@pytest.mark.parametrize("layer", WIDTHS.values(), ids=WIDTHS)
def test_bench_checks_and_times_dynamic_width(layer):
    rows = list(measure(layer, [0.5, 0.25], ["plain", "in-place", "backward"], batch=3, repeats=1))
    assert [(row.mode, row.failure) for row in rows] == 2 * [("plain", None), ("backward", None)]
    assert all(row.kind == "width" and row.ratio > 0 for row in rows)
    assert all((row.sliced is not None) == (row.mode == "plain") for row in rows)
    assert [row.ideal for row in rows] == pytest.approx([1 / row.work for row in rows])
    assert rows[0].ideal == pytest.approx(4, rel=0.4)  # whole groups: 1 of 2, and 2 of 3


@pytest.mark.parametrize("layer", WIDTHS.values(), ids=WIDTHS)
def test_the_idioms_beside_dynamic_width_are_right(layer):
    bench, check = prepare(layer, 3, torch.float32, "cpu")
    mask = layer.active(0.5, "blob", 3, bench.generator)
    for idiom in (bench.sliced, bench.masked_dense):
        assert check.output(idiom(0, mask), mask).passed


@pytest.mark.parametrize("mode", ["plain", "backward"])
@pytest.mark.parametrize("name", ["gathered_conv2d", "gathered_linear"])
def test_bench_and_verify_see_wrong_width(monkeypatch, capsys, name, mode):
    right = getattr(dynconv, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        if isinstance(result, dynconv.PackedChannels):
            return result._replace(features=result.features * 1.001)
        return result * 1.001

    monkeypatch.setattr(dynconv, name, wrong)
    layer = WIDTHS["linear" if name == "gathered_linear" else "groups"]
    (row,) = measure(layer, [0.5], [mode], batch=3, repeats=1)
    assert row.failure.startswith("wrong result")
    if mode == "plain":
        chosen = "linear width" if name == "gathered_linear" else "3x3 width"
        cases = [case for case in gathered.WIDTHS if case.name == chosen]
        rows = list(verify.verify("cpu", "float32", [(gathered.Gathered, cases)], ["sparse"]))
        assert rows and not any(row.passed for row in rows if row.quantity.startswith("output"))


def test_a_block_may_be_measured_in_inference_alone():
    block = Block("tiny", "bottleneck", 9, 8, 16, inference=True)
    rows = list(measure(block, [0.5], ["plain", "backward"], batch=1, repeats=1))
    assert [row.mode for row in rows] == ["plain"]


def test_masks_of_cells():
    block = Block("tiny", "bottleneck", 9, 8, 16, granularity=4)
    mask = block.active(0.5, "random", 3, torch.Generator().manual_seed(0))
    assert mask.shape == (3, 1, 9, 8)
    assert mask[..., ::4, ::4].float().mean() == pytest.approx(0.5)
    for y in range(0, 9, 4):
        for x in range(0, 8, 4):
            cell = mask[..., y : y + 4, x : x + 4].flatten(1)
            assert torch.equal(cell.all(1), cell.any(1))
    bench, _ = prepare(block, 3, torch.float32, "cpu")
    assert torch.equal(bench.compact(mask).mask, mask)
    for row in measure(block, [0.5], ["plain", "in-place", "backward"], batch=2, repeats=1):
        assert row.failure is None


@pytest.mark.parametrize("mode", ["plain", "in-place", "backward"])
def test_bench_sees_a_wrong_block(monkeypatch, mode):
    right = MaskedBottleneck.forward

    def wrong(self, input, mask=None, **options):
        output = right(self, input, mask, **options)
        return output if mask is None or dynconv._backend.forced_backend() else output.mul(1.001)

    monkeypatch.setattr(MaskedBottleneck, "forward", wrong)
    (row,) = measure(Block("tiny", "bottleneck", 9, 8, 16), [0.5], [mode], batch=2, repeats=1)
    assert row.failure.startswith("wrong result")


@pytest.mark.parametrize("mask", ["patch", "rectangle"])
def test_bench_takes_published_densities(mask):
    layer = Layer("tiny", 16, 16, 8, 8, 3, mask, (0.25,), 1)
    (row,) = measure(layer, layer.densities, ["in-place"], batch=1, repeats=1)
    assert row.failure is None
    assert row.density == pytest.approx({"patch": 100, "rectangle": 64}[mask] / 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bench_checks_half_types(dtype):
    rows = list(measure(TINY, [0.5], ["plain", "in-place", "backward"], batch=1, dtype=dtype, repeats=1))
    assert [row.failure for row in rows] == [None] * 3


# Ceilings that are not measured anew for every test.
CEILINGS = Device("tiny", 1e9, {"float32": 1e15}, {"float32": 1e15}, 0, "cpu", ("copy", "products"))


@pytest.fixture(autouse=True)
def fixed_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "measure_ceilings", lambda *options: CEILINGS)


PIXELS = {
    "groups": Filter("tiny", 6, 5, 8, 3, 2, groups=2),
    "channel filters": Filter("tiny", 5, 6, 6, 3, 2, channel_filters=True),
    "upsampling": Filter("tiny", 5, 4, 8, 5, 1, scale_factor=2, normalization="softmax"),
    "offsets": Filter("tiny", 5, 6, 8, 3, 2, groups=2, offsets=True),
}


@pytest.mark.parametrize("layer", PIXELS.values(), ids=PIXELS)
def test_bench_checks_and_times_filters(layer):
    rows = list(filters.measure_filters(layer, bench.MODES, CEILINGS, repeats=1, seconds=0))
    assert [(row.mode, row.failure) for row in rows] == [("plain", None), ("backward", None)]
    n, c, (h, w) = layer.batch, layer.channels, layer.size
    operands = n * c * layer.height * layer.width + (3 if layer.offsets else 1) * n * layer.groups * layer.taps * h * w
    operands += n * c * layer.taps * layer.channel_filters
    assert [row.estimate.bytes for row in rows] == [
        4 * (operands + n * c * h * w),
        4 * (3 * operands + 2 * n * c * h * w),
    ]
    for row in rows:
        assert row.ratio == pytest.approx(row.idiom.median / row.dynconv.median)
        assert row.estimate.limit == "bytes"
        assert row.of_floor == pytest.approx(row.estimate.bytes / 1e6 / row.dynconv.median)
        assert (row.tapped_ratio is None) == layer.offsets
    # What is returned, and the columns of the idiom on top: taps times the input.
    assert rows[0].memory >= 4 * n * c * h * w
    assert rows[0].idiom_memory >= 4 * n * c * (layer.taps * layer.height * layer.width + h * w)


@pytest.mark.parametrize("mode", filters.MODES)
@pytest.mark.parametrize("layer", PIXELS.values(), ids=PIXELS)
def test_the_idioms_beside_filters_are_right(layer, mode):
    # In float64, by the bounds of float32: F.grid_sample rounds positions, which are no part of the bounds.
    dtype = torch.float64 if layer.offsets else torch.float32
    check = filters.FilterCheck(filters.FilterBench(layer, layer.batch, dtype, "cpu"))
    check.rules = bounds.Arithmetic(torch.float32)
    for name in check.bench.calls(mode):
        assert check.verdict(mode, name).passed, name


@pytest.mark.parametrize("mode", filters.MODES)
@pytest.mark.parametrize("op, layer", [("dynamic_filter2d", "channel filters"), ("deform_aggregate2d", "offsets")])
def test_bench_sees_wrong_filters(monkeypatch, mode, op, layer):
    right = getattr(dynconv, op)
    monkeypatch.setattr(dynconv, op, lambda *operands, **options: right(*operands, **options) * 1.001)
    (row,) = filters.measure_filters(PIXELS[layer], [mode], CEILINGS, repeats=1)
    assert row.failure.startswith("wrong result")
    assert row.ratio is None


def test_bench_leaves_out_an_idiom_that_pytorch_does_not_have(monkeypatch):
    def refuse(*operands):
        raise NotImplementedError("no kernel for that type")

    monkeypatch.setattr(filters, "sampled", refuse)
    (row,) = filters.measure_filters(PIXELS["offsets"], ["plain"], CEILINGS, repeats=1)
    assert (row.failure, row.idiom, row.ratio, row.idiom_memory) == (None, None, None, None)
    assert row.dynconv.median > 0
    filters.print_filters([row], filters.summarise_filters([row]), CEILINGS)


def test_bench_writes_filters(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(FILTERS, "involution", (PIXELS["groups"], PIXELS["upsampling"]))
    results, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    command = ["bench", "--quick", "--repeats", "3", "--shapes", "involution", "--json", str(results)]
    assert main([*command, "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    record = json.loads(results.read_text())
    assert record["rows"] == []
    assert [row["mode"] for row in record["filters"]] == 2 * ["plain", "backward"]
    means = {mean["mode"]: mean for mean in record["summary"]["means_filters"]}
    for mode, mean in means.items():
        ratios = [row["ratio"] for row in record["filters"] if row["mode"] == mode]
        assert mean["ratio"] == pytest.approx(math.sqrt(math.prod(ratios)))
    printed = capsys.readouterr().out
    assert "4 of 4 results within their bounds" in printed
    assert "1.0 GB/s" in printed


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "l2"])
def test_normalized_weights_lie_within_their_bound(name):
    logits = torch.randn(4, 9, 50, generator=torch.Generator().manual_seed(0)) * 4
    rules = bounds.Arithmetic(torch.float32)
    expected = rules.normalize(logits.double(), name, 1)
    actual = dynconv.reference.NORMALIZATIONS[name](logits, dim=1)
    assert bounds.judge(actual, expected.value, expected.error).passed
    assert not bounds.judge(actual * (1 + 1e-4), expected.value, expected.error).passed


# --- demo


def small_stack():
    convs = [("first", 3, 16, 3, 1), ("second", 16, 16, 3, 1), ("half", 16, 8, 3, 2), ("point", 8, 8, 1, 1)]
    return [demo.Conv.random(*conv) for conv in convs]


@torch.no_grad()
def test_an_edit_in_place_equals_computing_everything(monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    torch.manual_seed(0)
    result = demo.edit(torch.rand(1, 3, 32, 40), 0.06, small_stack())
    assert result.passed
    assert "unchanged sites bitwise as before: yes" in result.notes
    densities = [line.density for line in result.lines]
    assert densities == sorted(densities)
    assert 0.06 < densities[0] < densities[-1] < 0.5
    assert all(line.error < 1e-5 for line in result.lines)


@torch.no_grad()
def test_the_demo_sees_a_wrong_op(broken, monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    torch.manual_seed(0)
    assert not demo.edit(torch.rand(1, 3, 32, 40), 0.06, small_stack()).passed


@torch.no_grad()
def test_attend_equals_the_masked_dense_network(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    monkeypatch.setattr(demo, "resnet", lambda resnet=demo.resnet: resnet((1, 1, 1, 1)))
    torch.manual_seed(0)
    result = demo.attend(torch.rand(1, 3, 64, 96), 0.25)
    assert result.passed
    assert all(line.density == pytest.approx(0.25, abs=0.1) for line in result.lines)
    demo.draw("title", result, str(tmp_path / "attend.png"))
    assert (tmp_path / "attend.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_ponder_draws_how_often_a_pixel_was_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    torch.manual_seed(0)
    image = torch.rand(1, 3, 64, 96)
    image[..., 48:] = 0.5  # nothing to see on the right
    result = demo.ponder(image, 0.25, (3, 1, 1, 2))
    assert result.passed
    count = result.pictures["ponder"]
    assert count.shape == (1, 1, 64, 96)
    assert result.pictures["calls"] == 7
    assert count.max() == 7
    assert count.min() == 4  # the first block of each stage computes everything
    assert count[..., :32].mean() > count[..., 64:].mean() == 4
    assert "a pixel is computed by" in result.notes[-1]
    assert all(line.dense_flops > line.flops > 0 for line in (result.lines[0], result.lines[3]))
    demo.draw("title", result, str(tmp_path / "ponder.png"))
    assert (tmp_path / "ponder.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_ponder_sees_a_wrong_block(monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    right = MaskedBottleneck.forward

    def wrong(self, input, mask=None, **options):
        output = right(self, input, mask, **options)
        return output if mask is None else output * 1.001

    monkeypatch.setattr(MaskedBottleneck, "forward", wrong)
    torch.manual_seed(0)
    assert not demo.ponder(torch.rand(1, 3, 64, 64), 0.25, (2, 1, 1, 1)).passed


@pytest.fixture
def few_digits(monkeypatch):
    """The scene with a few images, narrow layers and two epochs."""
    found = digits.Digits.load()
    few = digits.Digits(found.train[:64], found.train_labels[:64], found.test[:40], found.test_labels[:40])
    scene = digits.channels
    monkeypatch.setattr(digits, "channels", lambda: scene(few, 2, (16, 16, 16)))


def test_channels_trains_both_networks_and_counts_what_it_computes(few_digits, tmp_path, capsys):
    assert main(["demo", "--scene", "channels", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "channels.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "channels.json").read_text())
    assert record["passed"]
    assert str(ROOT) not in (tmp_path / "channels.json").read_text()
    assert record["images"] == {"train": 64, "test": 40}
    layers = record["layers"]
    assert [layer["products"] for layer in layers] == [64 * 9 * 16, 64 * 9 * 16 * 16, 16 * 9 * 16 * 16]
    for layer in layers:
        assert layer["share"] == pytest.approx(layer["computed"] / layer["all"])
        assert len(layer["kept_by_class"]) == 10
    assert layers[0]["share"] == pytest.approx(layers[0]["kept"])  # the image itself is always read
    computed = sum(layer["share"] * layer["products"] for layer in layers)
    assert record["products"] == pytest.approx(computed / sum(layer["products"] for layer in layers))
    for name in ("dense", "gated"):
        assert len(record[name]["accuracy"]) == 2
        assert record[name]["training_s"] > 0 and record[name]["inference_s"] > 0
    printed = capsys.readouterr().out
    assert "points of accuracy" in printed and "WRONG" not in printed


def test_channels_sees_a_wrong_op(few_digits, monkeypatch):
    right = dynconv.gathered_conv2d
    monkeypatch.setattr(dynconv, "gathered_conv2d", lambda *arguments, **options: right(*arguments, **options) * 1.001)
    assert not digits.channels()["passed"]


@pytest.fixture
def small_photo(monkeypatch):
    """A smooth picture with an edge."""
    ramp = torch.linspace(0.2, 0.6, 40).expand(1, 3, 32, 40).clone()
    ramp[..., 20:] += 0.3
    monkeypatch.setattr(demo, "photo", lambda name: ramp)
    monkeypatch.setattr(photos, "SECONDS", 0.0)


def test_denoise_raises_the_quality(small_photo, tmp_path, capsys):
    assert main(["demo", "--scene", "denoise", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "denoise.json").read_text())
    assert record["passed"]
    assert record["psnr_db"]["denoised"] > record["psnr_db"]["noisy"] + 3
    assert record["ms"]["dense"] > 0 and record["ms"]["dynconv"] > 0
    assert (tmp_path / "denoise.png").read_bytes().startswith(b"\x89PNG")
    assert f"denoised {record['psnr_db']['denoised']:.2f} dB" in capsys.readouterr().out.replace("\n", " ")


def test_upsample_keeps_an_edge_that_bilinear_blurs(small_photo, tmp_path):
    assert main(["demo", "--scene", "upsample", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "upsample.json").read_text())
    assert record["psnr_db"]["content-dependent"] > record["psnr_db"]["bilinear"]
    assert record["psnr_db"].keys() == {"nearest", "bilinear", "its estimate", "content-dependent"}
    assert (tmp_path / "upsample.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", photos.SCENES)
def test_filtered_photos_see_a_wrong_op(small_photo, monkeypatch, tmp_path, capsys, name):
    right = dynconv.dynamic_filter2d
    monkeypatch.setattr(dynconv, "dynamic_filter2d", lambda *operands, **options: right(*operands, **options) * 1.001)
    assert main(["demo", "--scene", name, "--out", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out


# --- the command itself


def test_the_command_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "dynconv", "--help"], capture_output=True, text=True, check=True)
    for command in ("verify", "bench", "demo"):
        assert command in run.stdout


WHOLE, NAMES = ("0", "-3", "1.5", "nan", "x", ""), ("nothing", "")
FILES = ("", "folder", "file/x", "file/x/y", "/dev/null", "/dev/null/x", "folder/" + 251 * "n", "folder/nul\0")
# What no command takes, by option.
BAD_VALUES = {
    "--json": FILES,
    "--plot": (*FILES, "x", "x.xyz", "folder/x.png/", "file/x.png", "/dev/null/x.png", 248 * "n" + ".png"),
    "--markdown": (*FILES, "x", "x.txt", "folder/x.md/", "file/x.md", "/dev/null/x.md", 248 * "n" + ".md"),
    "--out": ("file", "file/x", "/dev/null", 300 * "n"),
    "--seconds": ("nan", "inf", "-1", "x", ""),
    "--limit": ("nan", "-1", "x", ""),
    "--density": ("0", "-0.1", "1.5", "nan", "inf", "x", ""),
    "--layers": ("no such layer",),
    "--resume": ("folder", "file", "nothing.json", ""),
    "--device": ("tpu", "", *(() if torch.cuda.is_available() else ("cuda",))),
} | dict.fromkeys(("--batch", "--repeats", "--most", "--jobs"), WHOLE)
BAD_VALUES |= {"--scaling": BAD_VALUES["--plot"], "--edited": (*BAD_VALUES["--density"], "1")}


def script(name):
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def parser_of(command):
    """What parses the options of a command or a script."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: parsers.append(self) or sys.exit())
        call(command, [])
    actions = [action for action in parsers[0]._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices[command] if actions else parsers[0]


def call(command, arguments):
    if command in COMMANDS:
        return main([command, *arguments])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{command}.py", *arguments])
        return script(command).main()


def bad_options():
    """Every option of every command with each of the values that it must not take."""
    found = []
    for command in (*COMMANDS, "sweep", "gpu"):
        for action in parser_of(command)._actions:
            option = action.option_strings[-1]
            if action.nargs != 0 and option != "--help":
                values = NAMES if action.choices and option != "--device" else BAD_VALUES[option]
                found += [pytest.param(command, option, v, id=f"{command} {option}={v!r:.20}") for v in values]
    return found


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    """An empty place to be in, where no command gets to work; what was there is all that is there afterwards."""

    def works(*arguments, **options):
        raise AssertionError("the work has begun")

    for module, _ in COMMANDS.values():
        monkeypatch.setattr(module, "main", works)
    monkeypatch.setattr("dynconv.cli.environment.environment", works)  # the first thing that a sweep asks for
    monkeypatch.setattr(subprocess, "run", works)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path)
    yield
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command, option, value", bad_options())
def test_a_bad_option_is_refused_before_the_work(no_work, capsys, command, option, value):
    with pytest.raises(SystemExit) as exit:
        call(command, [*{"gpu": ["--dry-run"], "sweep": ["--device", "cpu"]}.get(command, ()), option, value])
    told = capsys.readouterr().err
    assert exit.value.code == 2
    assert f"error: argument {option}: " in told and repr(value)[1:-1][:200] in told
    assert "expected" in told or "invalid choice" in told


TOGETHER = {
    "the same file": ("bench --json a.png --plot a.png", "--plot"),
    "the same file in other words": ("bench --plot folder/../a.png --scaling ./a.png", "--scaling"),
    "a file in a file": ("bench --json a --plot a/b.png", "--plot"),
    "no mode of filters": ("bench --shapes involution --modes in-place", "--modes"),
    "no mode of widths": ("roofline --shapes laudnet --modes in-place", "--modes"),
    "the pose network, quickly": ("bench --shapes dynconv-pose --quick --layers row", "--layers"),
    "no layer with tiles": ("sweep --device cpu --shapes linear", "--layers"),
}


@pytest.mark.parametrize("arguments, option", TOGETHER.values(), ids=TOGETHER)
def test_options_that_do_not_go_together_are_refused(no_work, capsys, arguments, option):
    command, *options = arguments.split()
    with pytest.raises(SystemExit) as exit:
        call(command, options)
    assert exit.value.code == 2
    assert f"error: argument {option}: expected" in capsys.readouterr().err


def test_the_readme_is_written_from_a_record_alone(monkeypatch, tmp_path, capsys):
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "text.json").write_text("no record")
    (tmp_path / "other.json").write_text('{"rows": []}')
    for path in (tmp_path, tmp_path / "nothing.json", tmp_path / "text.json", tmp_path / "other.json"):
        with pytest.raises(SystemExit) as exit:
            call("readme", [str(path)])
        assert exit.value.code == 2
        assert f"argument record: expected what `dynconv bench --json` wrote, got '{path}'" in capsys.readouterr().err
    assert (ROOT / "README.md").read_text() == readme


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_who_is_stopped_while_it_writes_leaves_the_file_before(tmp_path, error):
    target = tmp_path / "made" / "file"

    def stop():
        with replacing(target) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        stop()
    assert list(tmp_path.rglob("*")) == [tmp_path / "made"]
    with replacing(target) as partial:
        partial.write_text("whole")
    with pytest.raises(error):
        stop()
    assert list(target.parent.iterdir()) == [target] and target.read_text() == "whole"


def test_a_missing_extra_is_one_line():
    with pytest.raises(SystemExit, match=r"^dynconv: no_such_module is missing; .*pip install dynconv\[bench\]$"):
        extra("no_such_module")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """benchmarks/gpu.py in folders of its own, on a machine that starts processes at once; gpu.call(*parts, ...)."""
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(gpu, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(gpu, "machine", lambda environment: ({"device": "cpu", "torch": "2", "triton": "3"}, 0.1))
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)

    def call(*parts, options=(), out="out"):
        monkeypatch.setattr(gpu, "parts", lambda dry_run: parts)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path / out), *options])
        status = gpu.main()
        written = (tmp_path / out / "results.json").read_text()
        assert written == (tmp_path / "kept" / "results.json").read_text()
        found = json.loads(written)
        return status, {name: case["outcome"] for name, case in found["cases"].items()}, found

    gpu.call = call
    return gpu


def python(gpu, name, code, **more):
    return gpu.Case(name, ["-c", code], **({"runs": 0.0} | more))


WRITES = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text({!r})"


def test_gpu_script_survives_failing_cases(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PATIENCE", 3.0)
    pulse = tmp_path / "pulse"
    child = f"import time\nwhile True: open({str(pulse)!r}, 'a').write('x'); time.sleep(0.02)"
    slow = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    status, outcomes, found = gpu.call(
        gpu.Part(
            "a",
            [
                python(gpu, "good", WRITES.format('{"figure": 7}'), writes=True, runs=30),
                python(gpu, "half written", WRITES.format('{"figure":'), writes=True, runs=30),
                python(gpu, "bad", "print('why'); raise SystemExit(3)", runs=30),
                python(gpu, "slow", slow),
                python(gpu, "left out", WRITES.format('{"left_out": ["one"]}'), writes=True, runs=30),
            ],
            at_once=3,
        ),
        gpu.Part("b", [python(gpu, "not there", "", under=[str(tmp_path / "nothing")])]),
        gpu.Part("c", [python(gpu, "later", "print('still here')")], missing="because"),
        gpu.Part("d", [python(gpu, "told", "raise SystemExit(9)", runs=30)], is_fatal=False),
    )
    assert status == 1
    assert outcomes == {
        "a: good": "passed", "a: half written": "passed", "a: bad": "FAILED", "a: slow": "stopped",
        "a: left out": "stopped", "b: not there": "FAILED", "d: told": "reported",
    }  # fmt: skip
    assert found["cases"]["a: good"]["rows"] == {"figure": 7}
    assert found["cases"]["a: half written"]["rows"] is None
    assert found["cases"]["a: slow"]["told"].startswith("stopped: stopped after 3")
    size = pulse.stat().st_size
    time.sleep(0.2)
    assert pulse.stat().st_size == size > 0  # what a stopped process has started is stopped as well
    told = capsys.readouterr().out
    failures = told[told.index("=== failures ===") :]
    assert "--- a: bad: FAILED: exit status 3\nwhy" in failures and "--- d: told: reported: exit status 9" in failures
    assert re.search(r"^c +0 of 1 +skipped: because$", failures, re.MULTILINE)
    assert re.search(r"^a +2 of 5 +\d .* in \d+ s$", failures, re.MULTILINE)
    assert "results.json: 0.00 MiB" in failures and "not all done" in failures


def test_gpu_script_goes_on_where_it_stopped(gpu, monkeypatch, tmp_path):
    """What passed is not run again, what failed comes last; other sources, or --again, begin anew."""
    trace, good = tmp_path / "trace", tmp_path / "good"

    def case(name, more="", **options):
        code = f"import pathlib, sys; open({str(trace)!r}, 'a').write('{name} '); {more}"
        return python(gpu, name, code, **options)

    def ran(*given, **options):
        trace.write_text("")
        status, outcomes, _ = gpu.call(*given, **options)
        return status, trace.read_text().split(), outcomes

    fails = case("fails", f"sys.exit(not pathlib.Path({str(good)!r}).exists())")
    long = case("long", kernels=1000)
    first = [gpu.Part("a", [case("passes"), fails]), gpu.Part("b", [long])]
    assert ran(*first) == (1, ["passes", "fails"], {"a: passes": "passed", "a: fails": "FAILED"})
    good.touch()
    short = gpu.Part("b", [case("long", kernels=1000, workers=1000), case("new")])
    status, names, outcomes = ran(first[0], short)
    assert (status, names) == (0, ["long", "new", "fails"]) and set(outcomes.values()) == {"passed"}
    assert ran(first[0], short)[:2] == (0, [])
    # On a machine that has kept nothing, from the file that came back.
    (tmp_path / "kept" / "results.json").rename(tmp_path / "earlier.json")
    assert ran(first[0], short, options=["--resume", str(tmp_path / "earlier.json")])[:2] == (0, [])
    assert ran(first[0], short, options=["--again"])[1] == ["passes", "fails", "long", "new"]
    monkeypatch.setattr(gpu, "digest", lambda names: "other sources")
    assert ran(first[0], short)[1] == ["passes", "fails", "long", "new"]
    # What only fills the cache is done where that is there, or where nobody needs it any more.
    fills, timed = case("fills", fills=True), case("timed", stops=True)
    assert ran(gpu.Part("c", [fills]), gpu.Part("d", [timed]))[:2] == (0, ["fills", "timed"])
    (tmp_path / "cache" / "name").unlink()
    assert ran(gpu.Part("c", [fills]), gpu.Part("d", [timed]))[:2] == (0, [])
    assert ran(gpu.Part("c", [fills]), gpu.Part("d", [timed, case("too", stops=True)]))[1] == ["fills", "too"]


def test_gpu_script_begins_what_fits(gpu, monkeypatch, capsys):
    """By the kernels that a case compiles, once it is known how long that takes here."""

    def compiled(number):
        code = f"import pathlib, time; [pathlib.Path({str(gpu.CACHE)!r}, 'triton', str(n)).mkdir(parents=True) or "
        code += f"pathlib.Path({str(gpu.CACHE)!r}, 'triton', str(n), '__grp__k.json').touch() for n in range({number})]"
        return code + "; time.sleep(1)"

    monkeypatch.setattr(gpu, "BUDGET", 30.0)
    compiles = gpu.Part("a", [python(gpu, "compiles", compiled(4), kernels=4)], compiles=True)
    many = gpu.Part("b", [python(gpu, "many", "", kernels=1000), python(gpu, "few", "", kernels=20)])
    status, outcomes, _ = gpu.call(compiles, many)
    told = capsys.readouterr().out
    assert status == 1 and outcomes == {"a: compiles": "passed", "b: few": "passed"}
    need, left = map(int, re.search(r"many: not begun: needs about (\d+) s, (\d+) s left", told).groups())
    assert 200 < need < 1300 and left < 25  # 0.25 s a kernel, and what starting Python took
    assert re.search(r"0\.\d\d s to compile a kernel \(measured\)", told) and "4 kernels in the cache" in told

    _, _, found = gpu.call(many)  # the next call knows it
    assert found["kernel_seconds"] == pytest.approx((need - 0.1) / 1000, abs=1e-3)
    assert re.search(r"many: not begun: needs about (\d+) s", capsys.readouterr().out).group(1) == str(need)

    clock, case = gpu.Clock(30.0), gpu.Case("x", [], kernels=10, runs=5.0, workers=2)
    assert clock.needs(case) == 8 + 5 + 10 * 1.4 / 2 and clock.needs(case, is_compiled=True) == 13
    clock.learn([], 10)
    assert not clock.is_measured


def test_gpu_script_keeps_what_it_has_when_it_is_stopped(gpu, monkeypatch, capsys):
    """Of a case that runs, its rows so far."""
    monkeypatch.setattr(gpu.Running, "has_more", lambda self: self.json.exists())
    noted = gpu.Results.note

    def note(self, part, case, **found):
        noted(self, part, case, **found)
        if found["outcome"] == "running":
            assert json.loads((gpu.KEPT / "results.json").read_text())["cases"]["a: b"]["rows"] == {"rows": []}
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Results, "note", note)
    forever = WRITES.format('{"rows": []}') + "; import time; time.sleep(60)"
    status, outcomes, found = gpu.call(gpu.Part("a", [python(gpu, "b", forever, writes=True), python(gpu, "c", "")]))
    assert status == 1 and outcomes == {"a: b": "stopped"} and found["cases"]["a: b"]["rows"] == {"rows": []}
    assert "=== summary ===" in capsys.readouterr().out


def test_gpu_script_compiles_for_a_gpu(gpu, capsys):
    """Interpreted processes compile nothing: as in a dry run, for a GPU that is not here."""
    parts = {part.name: part for part in gpu.parts(True, 2)}
    case = next(case for case in parts["compile"].cases if case.name == "aggregate")
    status, outcomes, _ = gpu.call(dataclasses.replace(parts["compile"], cases=[dataclasses.replace(case, kernels=2)]))
    assert (status, outcomes) == (0, {"compile: aggregate": "passed"}), capsys.readouterr().out
    assert gpu.kernels_compiled() >= 2 and "(measured)" in capsys.readouterr().out


def test_probe_sees_a_graph_that_is_stale(monkeypatch):
    """One that computes nothing when it is replayed, beside one that does, of graphs that are none."""
    probe, seen = script("probe"), []
    results = probe.results
    monkeypatch.setattr(probe, "results", lambda *given: seen.append((given, results(*given))) or seen[-1][1])

    class Graph:
        def replay(self):
            if self.computes:
                for old, new in zip(self.made, results(*self.given), strict=True):
                    old.copy_(new)

    @contextlib.contextmanager
    def capture(graph):
        yield
        graph.given, graph.made = seen[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(Stream=lambda: stream, current_stream=lambda: stream, stream=lambda given: contextlib.nullcontext())
    for name, fake in (fakes | dict(CUDAGraph=Graph, graph=capture)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with dynconv.backend("reference"):
        for Graph.computes in (True, False):
            make = probe.Operands("cpu", torch.float32)
            assert list(probe.captured(probe.FAMILIES["linear"](make), make)) == [Graph.computes] * 3


def test_gpu_script_tells_what_was_found(gpu):
    row = {"op": "o", "dtype": "float16", "quantity": "output", "worst": 0.125, "passed": True}
    rows = [row, row | {"quantity": "grad", "worst": "inf", "passed": False}]
    layer = {"family": "f", "layer": "l", "mode": "plain", "check": {}, "of_floor": 0.5}
    rows += [layer | {"density": 0.25, "dense": {"median": 2.0}, "sparse": {"median": 1.0}}]
    filters = [layer | {"failure": "wrong result"}]
    assert list(gpu.lines_of({"rows": rows, "filters": filters})) == [
        "o float16, of the bounds: output 0.12, grad inf WRONG",
        "f l plain 0.25: dense 2.0000 ms, sparse 1.0000 ms, floor / time 0.50",
        "f l plain: wrong result",
    ]
    parallel = "[gw1] [  1%] PASSED tests/a.py::b[c d] \n[gw0] [100%] FAILED tests/a.py::e \n"
    alone = "tests/a.py::b[c d] PASSED        [ 50%]\ntests/a.py::e FAILED       [100%]\n"
    for output in (parallel, alone):
        found = gpu.tests_in("collected 2 items\n" + output + "FAILED tests/a.py::e - assert 1 == 2\n")
        assert found == {"tests": {"passed": 1, "failed": 1}, "failed": ["tests/a.py::e"]}
        assert list(gpu.lines_of(found)) == ["1 passed, 1 failed", "tests/a.py::e"]
    assert gpu.tests_in("no tests ran") is None


@pytest.mark.parametrize("dry_run", [True, False])
def test_gpu_script_asks_for_what_there_is(dry_run):
    """Names are not given twice, the commands know all of their options, and a case alone fits into a call."""
    gpu = script("gpu")
    found = list(gpu.parts(dry_run, 16))
    assert [part.name for part in found[:1]] == ["first"] and len({part.name for part in found}) == len(found)
    assert {"tests", "verify", "graphs", "memcheck", "racecheck", "layers", "sweep"} <= {part.name for part in found}
    pictures = [name for part in found for case in part.cases for _, name in case.pictures]
    assert len({*pictures, "results.json", "log.txt"}) == len(pictures) + 2 <= gpu.MOST_FILES
    probe = parser_of("probe")
    for part in found:
        assert len({case.name for case in part.cases}) == len(part.cases)
        for case in part.cases:
            assert gpu.Clock(0).needs(case) < 0.5 * gpu.BUDGET
            assert not case.after or case.after in {part.name for part in found}
            options = [
                *case.command,
                *(["--limit", "7"] if case.stops else []),
                *(["--json", "x"] if case.writes else []),
            ]
            if "dynconv" in case.command and part.is_fatal:
                parser = argparse.ArgumentParser()
                COMMANDS[case.command[2]][0].add_arguments(parser)
                parser.parse_args(options[3:])
            elif case.command[0] == "benchmarks/probe.py":
                probe.parse_args(options[1:])
            elif "pytest" in case.command:
                assert all((ROOT / name).is_file() for name in case.command if name.startswith("tests/"))
    assert gpu.BUDGET <= 540


def test_sweep_of_tiles(tmp_path):
    """Interpreted, in a process of its own: whoever runs these tests may have a GPU."""
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "--device", "cpu", "--dtype", "float32"]
    options = ["--shapes", "tiny", "--layers", "depthwise", "--repeats", "1", "--most", "2", "--density", "0.5"]
    results = tmp_path / "sweep.json"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, *options, "--json", str(results)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(results.read_text())
    assert [(row["mode"], row["kernel"]) for row in record["rows"]] == [
        ("plain", "depthwise.config"), ("backward", "depthwise.weight_grad_config")
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["ratios"]["table"] == 1
        assert len(row["ratios"]) + len(row["refused"]) >= 3
        assert row["best"] == row["tile"] | row["change"]
    assert record["environment"]["device"] == "cpu"


def test_sweep_leaves_out_wrong_and_refused_tiles(monkeypatch):
    """Tiles are asked of a kernel's table; one that changes the result, or that raises, is named with its reason."""
    sweep = script("sweep")
    table = SimpleNamespace(config=lambda: {"BLOCK_M": 16, "num_stages": 2, "num_warps": 4})
    monkeypatch.setattr(sweep, "module", lambda name: table)

    def call(number):
        tile = table.config()
        if tile["num_stages"] == 3:
            raise ValueError("out of resource: shared memory")
        if tile["BLOCK_M"] == 32:
            time.sleep(0.002)
        elif tile["num_warps"] != 8:
            time.sleep(0.02)
        return torch.full((2, 2), 1.0 if tile["num_warps"] != 2 else 1.1)

    arguments = SimpleNamespace(most=None, repeats=3, device="cpu", dtype_=torch.float32)
    found = sweep.sweep(call, ("nothing", "config"), 1, arguments)
    assert found["refused"]["num_stages=3"] == "ValueError: out of resource: shared memory"
    assert found["refused"]["num_warps=2"].startswith("wrong result: 0.1")
    assert found["change"] in ({"BLOCK_M": 32, "num_warps": 8}, {"num_warps": 8})
    assert found["ratio"] > 2


def test_bench_keeps_what_it_has_when_it_is_stopped(monkeypatch, tmp_path):
    results = tmp_path / "bench.json"
    right = bench.measure

    def stopped(layer, *arguments, **options):
        if layer.groups > 1:
            raise KeyboardInterrupt
        return right(layer, *arguments, **options)

    monkeypatch.setattr(bench, "measure", stopped)
    command = ["bench", "--shapes", "tiny", "--density", "0.5", "--repeats", "1", "--seconds", "0"]
    assert main([*command, "--json", str(results)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    record = json.loads(results.read_text())
    assert {row["layer"] for row in record["rows"]} == {"6x5 16->16 3x3"}
    assert record["ceilings"]["name"] == "tiny"


def test_grouped_slices_are_the_kept_outputs():
    layer = Width("tiny", 5, 4, 16, 24, 3, 8, 2, (0.5,))
    for each in (layer, Width("tiny", 1, 1, 16, 24, 1, 8, 2, (0.5,), linear=True)):
        maker, _ = prepare(each, 2, torch.float32, "cpu")
        mask = each.active(0.5, "blob", 2, maker.generator)
        outs = maker.split(mask)[1]
        full, kept = maker.sparse(0, mask), maker.grouped(0, maker.lists(mask))
        torch.testing.assert_close(kept, full[outs].view(kept.shape), rtol=1e-4, atol=1e-5)


def test_bench_stops_at_its_limit(tmp_path, capsys):
    results = tmp_path / "bench.json"
    plot = ["--plot", str(tmp_path / "nothing.png")]
    assert main(["bench", "--shapes", "tiny", "--limit", "0", "--json", str(results), *plot]) == 0
    assert not (tmp_path / "nothing.png").exists()
    record = json.loads(results.read_text())
    assert record["rows"] == record["filters"] == []
    assert len(record["left_out"]) == 5
    assert "no time for 5 layers" in capsys.readouterr().out


def test_gpu_script_says_what_is_missing(tmp_path):
    gpu = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    (tmp_path / "torch.py").write_text("raise RuntimeError('CUDA is broken here')")
    broken = os.environ | {"PYTHONPATH": str(tmp_path)}
    out = ["--out", str(tmp_path / "out")]
    done = subprocess.run([*gpu, *out, "--dry-run"], capture_output=True, text=True, env=broken)
    assert done.returncode == 1 and not done.stderr
    assert "this Python does not run what it needs: RuntimeError: CUDA is broken here" in done.stdout
    if not torch.cuda.is_available():
        done = subprocess.run([*gpu, *out], capture_output=True, text=True)
        assert done.returncode == 1
        assert "no CUDA device" in done.stdout
    assert "--dry-run" in subprocess.run([*gpu, "--help"], capture_output=True, text=True, check=True).stdout
