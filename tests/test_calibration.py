"""Dense or sparse: both ways give the same, and what was measured decides."""

import contextlib
import itertools
import json
import math
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dynconv
from dynconv import backend, calibrate, calibration, execution, explain, masked_conv2d, reference
from dynconv._backend import forced_backend
from dynconv.nn import MaskedBasicBlock, MaskedBottleneck, MaskedInvertedResidual
from dynconv.ops import masked_conv


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    """A calibration file of its own for each test, and nothing known."""
    monkeypatch.setenv("DYNCONV_CALIBRATION", str(tmp_path / "folder" / "calibration.json"))
    calibration.forget()
    yield tmp_path / "folder" / "calibration.json"
    calibration.forget()


def _integers(*shape, low=-3, high=4, dtype=torch.float32):
    return torch.randint(low, high, shape).to(dtype)


def _mask(*shape, density=0.5):
    return torch.rand(*shape) < density


GEOMETRIES = {
    "3x3": dict(weight=(8, 6, 3, 3), padding=1),
    "1x1": dict(weight=(8, 6, 1, 1)),
    "strided": dict(weight=(8, 6, 3, 3), padding=1, stride=2),
    "dilated": dict(weight=(8, 6, 3, 3), padding=2, dilation=2),
    "grouped": dict(weight=(8, 3, 3, 3), padding=1, groups=2),
    "depthwise": dict(weight=(6, 1, 3, 3), padding=1, groups=6),
    "uneven padding": dict(weight=(8, 6, 2, 2), padding="same"),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_both_ways_give_the_same_values_and_gradients(target, geometry, density):
    if target.is_interpreted and density == 1.0:
        pytest.skip("all sites take the interpreter seconds a geometry; some and none go both ways as well")
    options = dict(GEOMETRIES[geometry])
    shape = options.pop("weight")
    torch.manual_seed(0)
    input, weight, bias = _integers(2, 6, 7, 8), _integers(*shape), _integers(shape[0])
    # PyTorch warns where "same" has to pad one side more.
    size = (2, 8, 7, 8) if options.get("padding") == "same" else F.conv2d(input, weight, bias, **options).shape
    gate = _mask(2, 1, *size[2:], density=density) * _integers(2, 1, *size[2:], low=1)
    grad = _integers(*size)
    results = {}
    for mode in ("sparse", "dense"):
        operands = [t.clone().to(target.device).requires_grad_() for t in (input, weight, bias)]
        with target.use(), dynconv.execution(mode):
            output = dynconv.masked_conv2d(*operands, **options, mask=gate.to(target.device))
        # The backward pass outside of the block: it goes by the mode of its forward pass.
        with target.use(), dynconv.explain() as explanation:
            grads = torch.autograd.grad(output, operands, grad.to(target.device))
        paths = {decision.path for decision in explanation.decisions}
        assert paths == (set() if geometry == "uneven padding" else {mode})
        results[mode] = [output.detach(), *grads]
    for sparse, dense in zip(results["sparse"], results["dense"], strict=True):
        assert torch.equal(sparse, dense)
        assert sparse.stride() == dense.stride()


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("kind", ["plain", "residual", "inactive", "in place"])
def test_the_dense_way_has_the_whole_epilogue(target, activation, kind):
    torch.manual_seed(0)
    input, weight = torch.randn(2, 6, 7, 8), torch.randn(8, 6, 3, 3)
    mask = _mask(2, 1, 7, 8)
    like = torch.randn(2, 8, 7, 8).contiguous(memory_format=torch.channels_last)
    results = {}
    for mode in ("sparse", "dense"):
        options = {"residual": dict(residual=like), "inactive": dict(inactive=like)}.get(kind, {})
        if kind == "in place":
            options = dict(out=like.clone(memory_format=torch.preserve_format).to(target.device))
        options = {name: tensor.to(target.device) for name, tensor in options.items()}
        with target.use(), dynconv.execution(mode), torch.no_grad(), dynconv.explain() as explanation:
            results[mode] = dynconv.masked_conv2d(
                input.to(target.device), weight.to(target.device), padding=1, mask=mask.to(target.device),
                activation=activation, **options,
            )  # fmt: skip
        assert [decision.path for decision in explanation.decisions] == [mode]
    # Sums of 54 products of either way, each within 54 roundings of the exact one; then GELU's slope of at most 1.13.
    bound = 2 * 1.13 * 54 * torch.finfo(torch.float32).eps * F.conv2d(input.abs(), weight.abs(), padding=1)
    bound = bound + 1e-6 * (1 + like.abs())
    assert torch.all((results["sparse"].cpu() - results["dense"].cpu()).abs() <= bound)
    skipped = ~mask.expand(2, 8, 7, 8)
    expected = like if kind in ("inactive", "in place") else torch.zeros_like(like)
    assert torch.equal(results["dense"].cpu()[skipped], expected[skipped])


def test_the_dense_way_keeps_nan_of_skipped_sites_out(target):
    torch.manual_seed(0)
    input, weight = _integers(2, 6, 9, 9), _integers(8, 6, 3, 3)
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    mask[0, 0, :4, :4] = True
    poisoned = input.clone()
    poisoned[:, :, 6:], poisoned[1] = torch.nan, torch.inf
    results = []
    for values in (input, poisoned):
        operands = [
            values.clone().to(target.device).requires_grad_(),
            weight.clone().to(target.device).requires_grad_(),
        ]
        with target.use(), dynconv.execution("dense"):
            output = dynconv.masked_conv2d(*operands, padding=1, mask=mask.to(target.device))
            grad = torch.full_like(output, torch.nan).masked_fill(mask.to(target.device), 2.0)
            results.append([output, *torch.autograd.grad(output, operands, grad)])
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize("epilogue", ["none", "relu", "silu", "residual", "gate"])
def test_half_types_are_not_rounded_twice(epilogue):
    """A dense convolution in half precision rounds before what follows it: only a clamp may follow."""
    input, weight = torch.randn(1, 4, 6, 6).half(), torch.randn(4, 4, 1, 1).half()
    mask = _mask(1, 1, 6, 6)
    options = {"mask": mask}
    if epilogue == "gate":
        options["mask"] = mask * 0.3
    elif epilogue == "residual":
        options["residual"] = torch.randn(1, 4, 6, 6).half()
    elif epilogue != "none":
        options["activation"] = epilogue
    with dynconv.backend("cpu"), dynconv.execution("dense"), torch.no_grad(), dynconv.explain() as explanation:
        dynconv.masked_conv2d(input, weight, **options)
    assert [decision.path for decision in explanation.decisions] == ["dense"] * (epilogue in ("none", "relu"))


def _block(name: str):
    torch.manual_seed(0)
    made = {
        "basic": lambda: MaskedBasicBlock(8, 8),
        "bottleneck": lambda: MaskedBottleneck(16, 4),
        "downsampling": lambda: MaskedBottleneck(
            8, 4, 2, torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1, 2, bias=False), torch.nn.BatchNorm2d(16))
        ),
        "inverted": lambda: MaskedInvertedResidual(8, 8, 1, 6),
        "no shortcut": lambda: MaskedInvertedResidual(8, 16, 2, 6),
    }[name]()
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "downsampling", "inverted", "no shortcut"])
@pytest.mark.parametrize("gated", [False, True], ids=["mask", "gate"])
def test_blocks_have_a_dense_way(target, name, gated):
    block = _block(name).to(target.device)
    channels = 16 if name == "bottleneck" else 8
    input = torch.randn(2, channels, 8, 8, device=target.device).contiguous(memory_format=torch.channels_last)
    size = block(input).shape
    mask = _mask(2, 1, *size[2:]).to(target.device)
    if gated:
        mask = mask * torch.rand(mask.shape, device=target.device)
    results = {}
    for mode in ("sparse", "dense"):
        with target.use(), dynconv.execution(mode), dynconv.explain() as explanation:
            results[mode] = [block(input, mask)]
            if block.shortcut_path == "identity":
                results[mode].append(block(input.clone(memory_format=torch.preserve_format), mask, inplace=True))
        assert {decision.path for decision in explanation.decisions} == {mode}
    for sparse, dense in zip(results["sparse"], results["dense"], strict=True):
        # Three layers of at most 72 products whose sums stay below 10: a rounding of each.
        torch.testing.assert_close(dense, sparse, rtol=0, atol=3 * 72 * 10 * torch.finfo(torch.float32).eps)
        assert torch.equal(dense[~mask.bool().expand(size)], sparse[~mask.bool().expand(size)])


def _calibrated(monkeypatch, sparse, dense):
    """A layer whose times are given, and a call of it at a density that takes a decision."""
    monkeypatch.setattr(
        calibration,
        "_measured",
        lambda calls, *_: [calibration.Times(call.name(), [0.1, 1.0], sparse, dense) for call in calls],
    )
    input, weight = torch.randn(1, 4, 10, 10), torch.randn(4, 4, 3, 3)

    def call(density):
        mask = torch.arange(100).view(1, 1, 10, 10) < round(100 * density)
        with dynconv.backend("cpu"), torch.no_grad(), dynconv.explain() as explanation:
            dynconv.masked_conv2d(input, weight, padding=1, mask=mask)
        return explanation.decisions[0]

    return call


def test_the_calibration_decides(monkeypatch, own_file):
    call = _calibrated(monkeypatch, sparse=[1.0, 10.0], dense=[5.5, 5.5])
    assert call(0.9).reason == "not calibrated" and call(0.9).path == "sparse"
    assert dynconv.calibration_file() == own_file
    crossovers = dynconv.calibrate(lambda: call(0.5))
    assert crossovers == {"conv 10x10 4->4 3x3, batch 1, float32": pytest.approx(0.55)}
    low, high = call(0.5), call(0.6)
    assert (low.path, high.path) == ("sparse", "dense")
    assert low.density == pytest.approx(0.5) and low.predicted_sparse == pytest.approx(5.0)
    assert high.predicted_sparse == pytest.approx(6.0) and high.predicted_dense == pytest.approx(5.5)
    assert low.measured > 0
    assert call(0.0).path == "sparse"
    with dynconv.execution("sparse"):
        assert call(1.0).path == "sparse"
    # In another process: what is in the file.
    calibration.forget()
    assert call(0.6).path == "dense"
    content = json.loads(own_file.read_text())
    (machine,) = content
    assert "threads" in machine and torch.__version__ in machine
    own_file.unlink()
    calibration.forget()
    assert call(0.6).path == "sparse"


def test_a_calibration_need_not_be_stored(monkeypatch, own_file):
    call = _calibrated(monkeypatch, sparse=[1.0, 10.0], dense=[5.5, 5.5])
    dynconv.calibrate(lambda: call(0.5), store=False)
    assert not own_file.exists()
    assert call(0.6).path == "dense"


def test_calibrations_add_up(monkeypatch, own_file):
    call = _calibrated(monkeypatch, sparse=[1.0, 10.0], dense=[5.5, 5.5])
    dynconv.calibrate(lambda: call(0.5))
    calibration.forget()
    block, input = _block("basic"), torch.randn(1, 8, 8, 8)
    with dynconv.backend("cpu"):
        dynconv.calibrate(lambda: block(input, _mask(1, 1, 8, 8)))
    (entries,) = json.loads(own_file.read_text()).values()
    assert [entry["call"].split()[0] for entry in entries] == ["conv", "MaskedBasicBlock"]
    assert call(0.6).path == "dense"


def test_calibrate_measures(own_file, monkeypatch):
    # In CPU time, and the best of three: other work on the machine slows some measurements down, but not all.
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=time.process_time))
    input, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3, requires_grad=True)

    def step():
        dynconv.masked_conv2d(input, weight, padding=1, mask=_mask(1, 1, 64, 64)).sum().backward()

    ratios = []
    for _ in range(3):
        calibration.forget()
        told = []
        with dynconv.backend("cpu"):
            dynconv.calibrate(
                step, densities=(0.01, 1.0), seconds=0.01, progress=lambda *args, told=told: told.append(args)
            )
        assert told == [(0, 2, "2 calls at density 0.01"), (1, 2, "2 calls at density 1")]
        (entries,) = json.loads(own_file.read_text()).values()
        for entry in entries:
            assert entry["densities"] == [round(41 / 64**2, 6), 1.0]
            assert min(entry["sparse_ms"] + entry["dense_ms"]) > 0
        ratios.append([entry["sparse_ms"][1] / entry["sparse_ms"][0] for entry in entries])
    # A hundred times the sites: were the masks not what they are called, this would be about 1.
    assert all(max(of_call) > 2 for of_call in zip(*ratios, strict=True)), ratios


def test_calibrating_changes_nothing_of_the_callers(own_file):
    torch.manual_seed(0)
    input = torch.randn(1, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 1, 1)
    mask, out = _mask(1, 1, 8, 8), torch.zeros_like(input)
    block, cache = _block("basic"), input.clone(memory_format=torch.preserve_format)

    def run():
        with torch.no_grad():
            dynconv.masked_conv2d(input, weight, mask=mask, out=out)
            block(cache, mask, inplace=True)

    with dynconv.backend("cpu"):
        run()
        expected = out.clone(), block(cache.clone(memory_format=torch.preserve_format), mask, inplace=True)
        dynconv.calibrate(run, densities=(1.0,), seconds=0.01)
    assert torch.equal(out, expected[0]) and torch.equal(cache, expected[1])


def test_calibrating_takes_no_default_device_of_the_callers(own_file):
    """Its masks, and what the kernels work in, belong where the operands are."""
    input, weight, mask = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 3, 3), _mask(1, 1, 8, 8)
    with backend("cpu"), torch.device("meta"):
        found = calibrate(lambda: masked_conv2d(input, weight, padding=1, mask=mask), densities=0.5, seconds=0.01)
    assert len(found) == 1


def test_times_between_and_beyond_the_measured_densities():
    times = calibration.Times("", [0.2, 0.6, 1.0], [1.0, 3.0, 7.0], [4.0, 4.0, 4.0])
    assert times.predict(0.4) == pytest.approx((2.0, 4.0))
    assert times.predict(0.1) == pytest.approx((1.0, 4.0)) and times.predict(1.0) == pytest.approx((7.0, 4.0))
    assert times.crossover == pytest.approx(0.7)
    assert calibration.Times("", [0.2, 1.0], [1.0, 3.0], [4.0, 4.0]).crossover is None
    assert calibration.Times("", [0.2, 1.0], [5.0, 9.0], [4.0, 4.0]).crossover == 0.0
    assert calibration.Times("", [1.0], [5.0], [4.0]).predict(0.3) == (5.0, 4.0)


def test_a_calls_way_is_that_of_the_run():
    """The crossover follows the ways that were settled: half-way where the call's own times do not cross."""
    densities, sparse, dense = [0.2, 0.6, 1.0], [1.0, 3.0, 7.0], [4.0, 4.0, 4.0]
    for is_dense, crossover in (
        (None, 0.7), ([False, False, True], 0.7), ([False, True, True], 0.4), ([True] * 3, 0.0), ([False] * 3, None),
        ([True, False, True], 0.7), ([False, True, False], None),
    ):  # fmt: skip
        times = calibration.Times("", densities, sparse, dense, is_dense)
        assert times.crossover == (None if crossover is None else pytest.approx(crossover))


def _total(own, change, way):
    changes = sum(one != other for one, other in itertools.pairwise(way))
    return sum(times[dense] for times, dense in zip(own, way, strict=True)) + change * changes


def test_ways_of_a_run_take_least_as_a_whole():
    """The shortest of all ways through the run, changes included, by trying every one of them."""
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        length, change = 2 + number % 6, (0.0, 0.1, 0.5)[number % 3]
        keys = [("call", i) for i in range(length)]
        times = torch.rand(2, length, 3, generator=generator, dtype=torch.float64).tolist()
        found = {k: calibration.Times("", [0.1, 0.5, 1.0], *(side[i] for side in times)) for i, k in enumerate(keys)}
        ways = calibration._ways(keys, found, change)

        for density in range(3):
            own = [[side[i][density] for side in times] for i in range(length)]
            taken = [ways[key][density] for key in keys]
            least = min(_total(own, change, way) for way in itertools.product((False, True), repeat=length))
            assert _total(own, change, taken) == pytest.approx(least)
            if not change:
                assert taken == [found[key].sparse[density] > found[key].dense[density] for key in keys]
    # A call that comes several times is what it is most often.
    once = {"a": calibration.Times("", [1.0], [1.0], [1.05]), "b": calibration.Times("", [1.0], [2.0], [1.0])}
    assert calibration._ways(["a", "b", "a", "b", "a", "b"], once, 0.2) == {"a": [True], "b": [True]}
    assert calibration._ways([*5 * ["a"], "b"], once, 0.2) == {"a": [False], "b": [True]}


def test_calls_in_a_run_go_one_way(monkeypatch, own_file):
    """What is a little faster by itself is not worth a change on the CPU; it is recorded, and read again."""
    monkeypatch.setattr(calibration, "_measured", lambda calls, *_: [
        calibration.Times(call.name(), [0.5, 1.0], [0.1, 0.1 + gain], [0.2, 0.1])
        for call, gain in zip(calls, (0.3, -0.001, 0.3), strict=True)
    ])  # fmt: skip
    inputs = [torch.randn(1, 4, 8, 8 + i) for i in range(3)]

    def run(density=1.0):
        for input in inputs:
            dynconv.masked_conv2d(input, torch.ones(4, 4, 1, 1), mask=torch.rand(1, 1, *input.shape[2:]) < density)

    with torch.no_grad(), backend("cpu"):
        calibrate(run)
        for _ in range(2):
            with explain() as explanation:
                run()
            assert [decision.path for decision in explanation.decisions] == ["dense"] * 3
            calibration.forget()  # and from the file
    entries = next(iter(json.loads(own_file.read_text()).values()))
    assert [entry["is_dense"] for entry in entries] == [[False, True]] * 3


def test_counts_on_another_device_arrive_later():
    """What a call goes by on the GPU, where nothing waits for the count: an earlier call's."""

    class Event:
        done = False

        def record(self):
            self.recorded = True

        def query(self):
            return Event.done

    key, counts = ("layer",), [torch.tensor([n], dtype=torch.int32) for n in (7, 8, 9)]
    assert calibration._latest(key, counts[0], Event) is None
    assert calibration._latest(key, counts[1], Event) is None  # the first one's count is still on its way
    Event.done = True
    assert calibration._latest(key, counts[2], Event) == 7
    assert calibration._latest(key, counts[0], Event) == 9
    assert calibration._latest(("other",), counts[0], Event) is None


def test_a_count_is_sent_from_its_own_device(monkeypatch):
    """An event of the current device's stream would say that a count has arrived that is still to be made."""
    current, seen = [0], []

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    class Call:
        device = torch.device("cuda", 1)
        key = lambda self: "a layer"
        kept_on_device = lambda self: torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.append(current[-1]))
    monkeypatch.setattr(calibration, "_latest", lambda *_: seen.append(current[-1]) or 5)
    assert calibration._kept(Call()) == 5
    assert seen == [1, 1] and current == [0]


def _without(entry, name):
    return {key: value for key, value in entry.items() if key != name}


# What may stand in a calibration in place of an entry, and what of it the warning names.
FAULTS = {
    f"{field} {label}": (lambda entry, field=field, value=value: entry | {field: value}, field)
    for field in ("densities", "sparse_ms", "dense_ms")
    for label, value in {
        "empty": [], "nothing": None, "a number": 0.5, "a text": "fast", "texts": ["1", "2"], "a table": {"0.1": 1.0},
        "shorter": [0.1], "longer": [0.1, 0.5, 1.0], "NaN": [0.1, math.nan], "infinite": [0.1, math.inf],
        "negative": [-0.1, 1.0], "nested": [[0.1], [1.0]], "truth": [False, True], "huge": [0.1, 10**400],
    }.items()
} | {
    "densities descending": (lambda entry: entry | {"densities": [1.0, 0.1]}, "densities"),
    "densities equal": (lambda entry: entry | {"densities": [0.5, 0.5]}, "densities"),
    "densities from 0": (lambda entry: entry | {"densities": [0.0, 1.0]}, "densities"),
    "densities above 1": (lambda entry: entry | {"densities": [0.1, 1.5]}, "densities"),
    **{f"no {name}": (lambda entry, name=name: _without(entry, name), name)
       for name in ("key", "call", "densities", "sparse_ms", "dense_ms", "is_dense")},
    **{f"is_dense {value!r}": (lambda entry, value=value: entry | {"is_dense": value}, "is_dense")
       for value in ([True], [0, 1], "dense", [None, True], {"0.1": True}, True)},
    "a nested key": (lambda entry: entry | {"key": [[1]]}, "unhashable"),
    "a text": (lambda entry: "times", "indices"),
    "a list": (lambda entry: [1, 2], "indices"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_entry_that_is_no_times_is_ignored_with_one_warning(own_file, fault):
    """Whatever is wrong with one of them: the warning names the file and the fault, and the other entries count."""
    good = {
        "key": ["conv", 1, True],
        "call": "a",
        "densities": [0.1, 1.0],
        "sparse_ms": [1, 10.0],
        "dense_ms": [5.5, 5.5],
        "is_dense": [False, True],
    }
    change, named = FAULTS[fault]
    own_file.parent.mkdir(parents=True)
    own_file.write_text(json.dumps({"another machine": [], "m": [change(good), good, change(good)]}))
    with pytest.warns(UserWarning, match=f"^{re.escape(str(own_file))} has entries .*{named}.*, and 1 more$") as told:
        tables = calibration._read()
    assert len(told) == 1
    assert tables == {
        "m": {("conv", 1, True): calibration.Times("a", [0.1, 1.0], [1, 10.0], [5.5, 5.5], [False, True])}
    }


def test_calls_go_by_the_entries_that_are_times(monkeypatch, own_file):
    call = _calibrated(monkeypatch, sparse=[1.0, 10.0], dense=[5.5, 5.5])
    dynconv.calibrate(lambda: call(0.5))
    ((machine, (entry,)),) = json.loads(own_file.read_text()).items()
    for entries, path in (([entry | {"sparse_ms": ["1", "2"]}], "sparse"), ([entry, {}], "dense")):
        own_file.write_text(json.dumps({machine: entries}))
        calibration.forget()
        with pytest.warns(UserWarning, match="has entries that are not times") as told:
            assert [call(0.6).path for _ in range(2)] == [path] * 2
        assert len(told) == 1


@pytest.mark.parametrize(
    "text", ["[1, 2", "", "[1, 2]", "7", '{"machine": 7}', "\x00", "[" * 100000, '{"machine": {}, "m": null}']
)
def test_a_file_that_is_no_calibration_is_ignored_with_a_warning(own_file, text):
    own_file.parent.mkdir(parents=True)
    own_file.write_text(text)
    operands = torch.randn(1, 4, 4, 4), torch.randn(4, 4, 1, 1)
    with dynconv.backend("cpu"), pytest.warns(UserWarning, match="is not a calibration"):
        dynconv.masked_conv2d(*operands, mask=_mask(1, 1, 4, 4))


def test_errors():
    expected = "execution: expected one of automatic, sparse, dense, got 'fast'"
    with pytest.raises(ValueError, match=expected), dynconv.execution("fast"):
        pass
    with pytest.raises(ValueError, match="run: expected at least one masked or gathered layer"):
        dynconv.calibrate(lambda: None)
    for densities in ((), (0.0, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="densities: expected numbers above 0 and at most 1"):
            dynconv.calibrate(lambda: None, densities=densities)


def test_explanations_are_readable(monkeypatch):
    call = _calibrated(monkeypatch, sparse=[1.0, 10.0], dense=[5.5, 5.5])
    dynconv.calibrate(lambda: call(0.5))
    with dynconv.explain() as explanation:
        call(0.6)
    heading, line = str(explanation).splitlines()
    assert heading.split()[0] == "path"
    assert line.split()[:4] == ["dense", "0.600", "6.000", "5.500"]
    assert line.endswith("conv 10x10 4->4 3x3, batch 1, float32: faster at this density")


def test_a_compiled_graph_decides_when_it_runs(monkeypatch):
    call = _calibrated(monkeypatch, sparse=[1.0, 10.0], dense=[5.5, 5.5])
    dynconv.calibrate(lambda: call(0.5), store=False)
    input, weight = torch.randn(1, 4, 10, 10), torch.randn(4, 4, 3, 3)
    compiled = torch.compile(lambda mask: dynconv.masked_conv2d(input, weight, padding=1, mask=mask), fullgraph=True)
    paths = []
    for active in (30, 90):
        mask = torch.arange(100).view(1, 1, 10, 10) < active
        with dynconv.backend("cpu"), torch.no_grad():
            compiled(mask)
            with dynconv.explain() as explanation:
                output = compiled(mask)
            expected = dynconv.reference.masked_conv2d(input, weight, padding=1, mask=mask)
        paths += [decision.path for decision in explanation.decisions]
        torch.testing.assert_close(output, expected)
    assert paths == ["sparse", "dense"]


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str)
def test_half_gradients_on_the_cpu_accumulate_in_float32(dtype, unit):
    """PyTorch's own do not, so there is no dense way to take."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 14, 13), torch.randn(64, 64, 3, 3) / 24
    x, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight))
    mask, grad = torch.rand(2, 1, 14, 13) < 0.6, torch.randn(2, 64, 14, 13).to(dtype)

    def dense_gradients(change):
        operands = [change(t.detach().double()).requires_grad_() for t in (x, weight)]
        output = F.conv2d(*operands, padding=1)
        return torch.autograd.grad(output, operands, change(grad.double()) * mask)

    with dynconv.execution("dense"):
        output = dynconv.masked_conv2d(x, weight, padding=1, mask=mask)
    with dynconv.explain() as explanation:
        actual = torch.autograd.grad(output, (x, weight), grad)
    assert not explanation.decisions
    products = (9 * 64, int(mask.sum()))  # behind each value
    for one, value, magnitude, n in zip(actual, dense_gradients(lambda t: t), dense_gradients(torch.abs), products):
        # One rounding to the type, and float32's error over the sum.
        assert ((one.double() - value).abs() <= unit * value.abs() + n * 2**-23 * magnitude).all()


@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shared", [False, True], ids=["mask", "sites"])
def test_a_call_like_an_earlier_one_with_operands_of_the_outputs_shape(shared, density, way):
    """Each twice, as the second one skips the checks; what is not like it, though nearly, must not."""
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(6, 8, 3, 3)
    dense, mask = F.conv2d(x, weight, padding=1), torch.rand(2, 1, 9, 7) < density
    whole, row = torch.randn(2, 2, 6, 9, 7), torch.randn(2, 1, 6, 1, 1)
    sites = dynconv.ActiveSites(mask) if shared else mask
    call = lambda **operands: dynconv.masked_conv2d(x, weight, padding=1, mask=sites, **operands)
    with torch.no_grad(), dynconv.backend("cpu"), dynconv.execution(way):
        for activation in (None, "relu6", "gelu"):
            function = reference.ACTIVATIONS[activation]
            for residual, inactive in itertools.product((None, whole[0], row[0]), (None, whole[1], row[1])):
                expected = torch.where(mask, function(dense + (0 if residual is None else residual)),
                                       0 if inactive is None else inactive)  # fmt: skip
                for _ in range(2):
                    actual = call(activation=activation, residual=residual, inactive=inactive)
                    assert torch.allclose(actual, expected, atol=1e-4)
                    assert actual.is_contiguous(memory_format=torch.channels_last)
        for name in ("residual", "inactive"):
            with pytest.raises(ValueError, match=name):
                call(**{"residual": whole[0], "inactive": whole[1], name: whole[0][:, :5]})
            with pytest.raises(TypeError, match=name):
                call(**{"residual": whole[0], "inactive": whole[1], name: whole[0].double()})
    residual = whole[0].clone().requires_grad_()
    assert call(residual=residual, inactive=whole[1]).requires_grad


def test_a_call_like_an_earlier_one_is_still_seen_for_what_it_is():
    """Plain calls in inference skip the checks once their like has passed them: everything else must not."""
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(6, 8, 3, 3)
    first, second = torch.rand(2, 1, 9, 7) < 0.5, torch.rand(2, 1, 9, 7) < 0.8
    expected = [torch.where(mask, F.conv2d(x, weight, padding=1), 0) for mask in (first, second)]

    def call(mask, **changes):
        return dynconv.masked_conv2d(x, **{"weight": weight, "padding": 1, "mask": mask, **changes})

    masked_conv._passed.clear()
    with torch.no_grad():
        for mask, value in 2 * list(zip((first, second), expected, strict=True)):
            assert torch.allclose(call(mask), value, atol=1e-4)
            assert torch.allclose(call(dynconv.ActiveSites(mask)), value, atol=1e-4)
        assert len(masked_conv._passed[id(weight)]) == 2  # with a mask, and with sites
        gate = first.float() * 0.5
        assert torch.allclose(call(gate), 0.5 * expected[0], atol=1e-4)
        assert torch.allclose(call(dynconv.ActiveSites(gate)), 0.5 * expected[0], atol=1e-4)
        assert torch.allclose(call(first, activation="relu"), expected[0].relu(), atol=1e-4)
        spread = first[:1]  # one sample's mask for both
        both = torch.where(spread, F.conv2d(x, weight, padding=1), 0)
        assert torch.allclose(call(spread), both, atol=1e-4)
        assert call(first, packed=True).rows.shape == (int(first.sum()), 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(first).dtype == torch.bfloat16
        with dynconv.execution("dense"), dynconv.explain() as explanation:
            assert torch.allclose(call(first), expected[0], atol=1e-4)
        assert [decision.path for decision in explanation.decisions] == ["dense"]
        with dynconv.backend("reference"):
            assert torch.allclose(call(first), expected[0], atol=1e-4)
        with pytest.raises(TypeError, match="weight"):
            call(first, weight=weight.double())
        with pytest.raises(ValueError, match="mask"):
            call(first[:, :, 1:])
        with pytest.raises(TypeError, match="mask"):
            call(first.int())
        with pytest.raises(ValueError, match="meta"):
            call(first.to("meta"))
    result = call(first, weight=weight.clone().requires_grad_())
    assert result.requires_grad
    x[:, 0, 0, 0] = float("nan")  # read by sites that are not active, or by nobody
    first[:, :, :2, :2] = False
    with torch.no_grad():
        assert call(first).isfinite().all()
        assert torch.allclose(call(first.clone().fill_(False)), torch.zeros(()))


def test_a_call_that_another_thread_forgets_is_checked_anew(monkeypatch):
    class Forgetful(dict):
        """Cleared by another thread at the worst time."""

        def get(self, *arguments):
            found = super().get(*arguments)
            self.clear()
            return found

    monkeypatch.setattr(masked_conv, "_passed", Forgetful())
    input, weight, mask = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 1, 1), _mask(1, 1, 5, 5)
    with torch.no_grad():
        first, second = (masked_conv2d(input, weight, mask=mask) for _ in range(2))
    assert torch.equal(first, second)


def test_settings_of_overlapping_threads_are_their_own(own_file):
    """Two threads enter and leave their blocks in turn, the first one out first."""
    step, seen = threading.Barrier(2, timeout=60), {}
    x, weight, mask = _integers(1, 3, 6, 6), _integers(4, 3, 3, 3), _mask(1, 1, 6, 6)
    conv = dynconv.nn.MaskedConv2d(3, 4, 3)

    def run(number, leaves_first):
        name, mode = (("reference", "dense"), ("cpu", "sparse"))[number]
        with contextlib.ExitStack() as stack:
            if number:
                step.wait()
            stack.enter_context(backend(name))
            stack.enter_context(execution(mode))
            explanation = stack.enter_context(explain())
            ponder = stack.enter_context(dynconv.ponder_map())
            if not number:
                step.wait()
            step.wait()  # both are inside
            masked_conv2d(x, weight, mask=mask[..., :4, :4])
            conv(x, mask[..., :4, :4])
            inside = forced_backend(), calibration.mode(), len(explanation.decisions), len(ponder.masks)
            step.wait()
            if not leaves_first:
                step.wait()
        if leaves_first:
            step.wait()
        seen[number] = inside, forced_backend(), calibration.mode()

    threads = [threading.Thread(target=run, args=(number, number == 0)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The reference has no ways to explain.
    assert seen == {
        0: (("reference", "dense", 0, 1), None, "automatic"),
        1: (("cpu", "sparse", 2, 1), None, "automatic"),
    }
    assert forced_backend() is None and calibration.mode() == "automatic" and not calibration.is_watched()


def test_calibrating_threads_record_their_own_calls(own_file):
    step, found = threading.Barrier(2, timeout=60), {}
    x = _integers(1, 3, 6, 6)

    def run(channels):
        def model():
            step.wait()
            masked_conv2d(x, _integers(channels, 3, 3, 3), mask=_mask(1, 1, 4, 4))
            step.wait()

        found[channels] = list(calibrate(model, densities=[0.5], seconds=0.001, store=False))

    threads = [threading.Thread(target=run, args=(channels,)) for channels in (4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(len(found[c]), f"3->{c}" in found[c][0]) for c in (4, 5)] == [(1, True)] * 2


@pytest.mark.parametrize("setting", ("backend", "execution"))
def test_a_compiled_graph_follows_the_settings(setting, own_file):
    x, weight, mask = _integers(1, 3, 6, 6), _integers(4, 3, 3, 3), _mask(1, 1, 4, 4)
    call = torch.compile(lambda x: masked_conv2d(x, weight, mask=mask), fullgraph=True, backend="eager")
    use = {"backend": lambda: backend("reference"), "execution": lambda: execution("dense")}[setting]
    expected = call(x)
    with explain() as explanation:
        for context in (use, contextlib.nullcontext, use):
            with context():
                assert torch.equal(call(x), expected)
    ways = [decision.path for decision in explanation.decisions]
    assert ways == (["sparse"] if setting == "backend" else ["dense", "sparse", "dense"])
