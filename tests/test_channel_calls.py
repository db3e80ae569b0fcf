"""Layers and blocks of chosen channels choose between dense and sparse, and either way gives the same."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import dynconv
from dynconv import ActiveChannels, calibration, gathered_conv2d, gathered_linear
from dynconv.nn import GatheredBasicBlock, GatheredBottleneck
from dynconv.ops import _channel_calls

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    """A calibration file of its own for each test, and nothing known."""
    monkeypatch.setenv("DYNCONV_CALIBRATION", str(tmp_path / "calibration.json"))
    calibration.forget()
    yield tmp_path / "calibration.json"
    calibration.forget()


def integers(*shape, low=-2, high=3, dtype=torch.float32, seed=0):
    """Integer values: every sum is exact, whatever its order, so results must be equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(n, channels, seed):
    """bool [n, channels]: the first sample keeps none, the second all, the others about half."""
    mask = torch.rand(n, channels, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0], mask[1] = False, True
    return mask


GEOMETRIES = {
    "3x3": dict(weight=(8, 6, 3, 3), padding=1),
    "1x1": dict(weight=(8, 6, 1, 1)),
    "strided": dict(weight=(8, 6, 3, 3), padding=1, stride=2),
    "dilated in groups": dict(weight=(8, 3, 3, 3), padding=2, dilation=2, groups=2),
    "depthwise": dict(weight=(6, 1, 3, 3), padding=1, groups=6),
    "uneven padding": dict(weight=(8, 6, 2, 2), padding="same"),
}
MASKS = ["in", "out", "in out", "in out sites"]


def conv_case(geometry, masks, dtype, fused=False):
    """A function of leaves that runs the op, the leaves, and the gradient of its result."""
    options = dict(GEOMETRIES[geometry])
    shape = options.pop("weight")
    leaves = [integers(3, 6, 7, 8), integers(*shape, seed=1), integers(shape[0], seed=2)]
    size = dynconv.reference.gathered_conv2d(leaves[0], leaves[1], **options).shape
    options["in_mask"] = some(3, 6, 3) if "in" in masks else None
    options["out_mask"] = some(3, shape[0], 4) if "out" in masks else None
    options["mask"] = some(3, size[2] * size[3], 5).view(3, 1, *size[2:]) if "sites" in masks else None
    if fused:
        options["out_mask"] = options["out_mask"] * 2.0
        options["residual"] = integers(*size, seed=6).to(dtype)
        options["activation"] = "relu"
        options["inactive"] = integers(*size, seed=7).to(dtype) if "sites" in masks else None
    return (lambda *leaves: gathered_conv2d(*leaves, **options)), leaves, integers(*size, dtype=dtype, seed=8)


def both_ways(call, leaves, grad, mode, dtype):
    """[output, *gradients], and the paths that forward and backward took."""
    leaves = [t.to(dtype).requires_grad_(grad is not None) for t in leaves]
    with dynconv.backend("cpu"), dynconv.execution(mode), dynconv.explain() as explanation:
        output = call(*leaves)
    # The backward pass outside of the block: it goes by the mode of its forward pass.
    if grad is None:
        return [output], [decision.path for decision in explanation.decisions]
    with dynconv.backend("cpu"), dynconv.explain() as backward:
        grads = torch.autograd.grad(output, leaves, grad)
    return [output.detach(), *grads], [decision.path for decision in explanation.decisions + backward.decisions]


def assert_same(sparse, dense):
    for one, other in zip(sparse, dense, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_both_ways_of_a_convolution_give_the_same_values_and_gradients(geometry, masks, dtype):
    call, leaves, grad = conv_case(geometry, masks, dtype)
    results = {}
    for mode in ("sparse", "dense"):
        results[mode], paths = both_ways(call, leaves, grad, mode, dtype)
        # Half gradients on the CPU stay sparse: PyTorch's own round on the way.
        expected = [] if geometry == "uneven padding" else [mode] if dtype.itemsize == 2 else [mode] * 2
        assert paths == expected
    assert_same(*results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", ["in out", "in out sites"])
def test_the_dense_way_has_the_whole_epilogue(masks, dtype):
    call, leaves, _ = conv_case("3x3", masks, dtype, fused=True)
    results = {}
    with torch.no_grad():
        for mode in ("sparse", "dense"):
            results[mode], paths = both_ways(call, leaves, None, mode, dtype)
            assert paths == ([] if dtype.itemsize == 2 else [mode])
    assert_same(*results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", ["in", "out", "in out"])
@pytest.mark.parametrize("positions", [(), (3,), (2, 5)], ids=str)
def test_both_ways_of_a_linear_layer_give_the_same_values_and_gradients(positions, masks, dtype):
    leaves = [integers(5, *positions, 21), integers(37, 21, seed=1), integers(37, seed=2)]
    ins, outs = some(5, 21, 3) if "in" in masks else None, some(5, 37, 4) if "out" in masks else None
    call = lambda *leaves: gathered_linear(*leaves, in_mask=ins, out_mask=outs)
    grad, results = integers(5, *positions, 37, dtype=dtype, seed=8), {}
    for mode in ("sparse", "dense"):
        results[mode], paths = both_ways(call, leaves, grad, mode, dtype)
        is_convolution = math.prod(positions) >= 8
        assert paths == ([mode] * (2 if dtype.itemsize > 2 else is_convolution))
    assert_same(*results.values())


@pytest.mark.parametrize("op", ["conv", "linear", "positions"])
def test_the_dense_way_keeps_nan_of_what_is_not_kept_out(op):
    torch.manual_seed(0)
    ins, outs, mask = some(4, 6, 3), some(4, 8, 4), None
    if op == "conv":
        input, weight = integers(4, 6, 9, 9), integers(8, 6, 3, 3, seed=1)
        mask = torch.zeros(4, 1, 9, 9, dtype=torch.bool)
        mask[:, :, :4, :4] = True
        call = lambda x, w: gathered_conv2d(x, w, padding=1, in_mask=ins, out_mask=outs, mask=mask)
    else:
        input, weight = integers(4, 9 if op == "positions" else 1, 6), integers(8, 6, seed=1)
        call = lambda x, w: gathered_linear(x, w, in_mask=ins, out_mask=outs)
    channel = 1 if op == "conv" else 2
    shape = [4, *(1,) * (input.dim() - 1)]
    kept = ins.view([6 if i == channel else n for i, n in enumerate(shape)])
    poisoned = torch.where(kept, input, torch.nan)
    if op == "conv":
        poisoned[:, :, 6:] = torch.inf
    results = []
    for values in (input, poisoned):
        operands = [values.clone().requires_grad_(), weight.clone().requires_grad_()]
        with dynconv.backend("cpu"), dynconv.execution("dense"):
            output = call(*operands)
            used = outs.view([8 if i == channel else n for i, n in enumerate(shape)])
            used = used if mask is None else used & mask
            grad = torch.where(used, 2.0, torch.full_like(output, torch.nan))
            results.append([output.detach(), *torch.autograd.grad(output, operands, grad)])
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)


def test_the_dense_way_is_the_same_on_every_backend(target):
    call, leaves, _ = conv_case("3x3", "in out sites", torch.float32)
    with target.use(), dynconv.execution("dense"):
        output = call(*[t.to(target.device) for t in leaves])
    with dynconv.backend("reference"):
        assert torch.equal(output.cpu(), call(*leaves))


def block_case(name, dtype=torch.float32):
    torch.manual_seed(0)
    shortcut = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1, 2, bias=False), torch.nn.BatchNorm2d(16))
    made = {
        "basic": lambda: GatheredBasicBlock(8, 8),
        "bottleneck": lambda: GatheredBottleneck(8, 2),
        "downsampling": lambda: GatheredBottleneck(8, 4, 2, shortcut),
    }[name]()
    return made.to(dtype).eval().requires_grad_(False), torch.randn(3, 8, 8, 8, dtype=dtype)


@pytest.mark.parametrize("masks", ["channels", "first", "gates", "channels sites", "gates gated sites"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "downsampling"])
def test_blocks_have_a_dense_way(name, masks):
    block, input = block_case(name)
    widths = [block._submodule(stage.conv).out_channels for stage in block.stages[:-1]]
    channels = [some(3, width, seed) for seed, width in enumerate(widths)]
    channels = [c * torch.rand(c.shape) for c in channels] if "gates" in masks else channels
    channels = [channels[0], *[None] * (len(channels) - 1)] if masks == "first" else channels
    size = block(input).shape
    mask = torch.rand(3, 1, *size[2:]) < 0.5 if "sites" in masks else None
    mask = mask * torch.rand(mask.shape) if "gated" in masks else mask
    results = {}
    for mode in ("sparse", "dense"):
        with dynconv.backend("cpu"), dynconv.execution(mode), dynconv.explain() as explanation:
            results[mode] = block(input, channels, mask)
        assert [decision.path for decision in explanation.decisions] == [mode]
    # Three layers of at most 72 products whose sums stay below 10: a rounding of each.
    close = dict(rtol=0, atol=3 * 72 * 10 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(results["dense"], results["sparse"], **close)
    assert results["dense"].stride() == results["sparse"].stride()
    if mask is not None:
        skipped = ~mask.bool().expand(size)
        assert torch.equal(results["dense"][skipped], results["sparse"][skipped])


def test_a_branch_with_an_activation_of_its_own_has_no_dense_way():
    block, input = block_case("basic")
    block.stages = (*block.stages[:-1], block.stages[-1]._replace(activation="relu"))
    results = []
    for name in ("cpu", "reference"):
        with dynconv.backend(name), dynconv.execution("dense"), dynconv.explain() as explanation:
            results.append(block(input, some(3, 8, 0)))
        assert explanation.decisions == []
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def automatic_calls():
    """name -> a function of the share of channels (and sites) to keep that runs one call."""
    conv, weight = torch.randn(4, 32, 6, 6), torch.randn(32, 32, 1, 1)
    linear, matrix = torch.randn(4, 64), torch.randn(64, 64)
    block, input = GatheredBottleneck(32, 8).eval().requires_grad_(False), torch.randn(4, 32, 6, 6)
    keep = lambda share, width: torch.arange(width).expand(4, width) < round(share * width)
    sites = lambda share: torch.arange(36).view(1, 1, 6, 6).expand(4, 1, 6, 6) < round(36 * share)
    return {
        "conv, in and out": lambda s: gathered_conv2d(conv, weight, in_mask=keep(s, 32), out_mask=keep(s, 32)),
        "conv, out and sites": lambda s: gathered_conv2d(conv, weight, out_mask=keep(s, 32), mask=sites(s)),
        "linear": lambda s: gathered_linear(linear, matrix, in_mask=keep(s, 64), out_mask=keep(s, 64)),
        "block": lambda s: block(input, keep(s, 8)),
    }


@pytest.mark.parametrize("name", ["conv, in and out", "conv, out and sites", "linear", "block"])
def test_the_calibration_decides_by_the_share_of_the_products(name, monkeypatch, own_file):
    call = automatic_calls()[name]
    given = calibration.Times("", [0.1, 1.0], [1.0, 10.0], [5.5, 5.5])  # the crossover is at 0.55 of the products
    monkeypatch.setattr(calibration, "_measured", lambda calls, *rest: [given] * len(calls))

    def decision(share):
        with dynconv.backend("cpu"), torch.no_grad(), dynconv.explain() as explanation:
            call(share)
        (made,) = explanation.decisions
        return made

    assert decision(0.5).reason == "not calibrated"
    dynconv.calibrate(lambda: decision(0.5))
    # A bottleneck's first and last layers are of 256 products a site, in one mask; its 3x3 of 576 in both.
    density = (lambda s: (512 * s + 576 * s * s) / 1088) if name == "block" else lambda s: s * s
    for share in (0.25, 0.5, 0.75, 1.0):
        made = decision(share)
        assert made.density == pytest.approx(density(share), abs=1e-3)
        assert made.path == ("dense" if density(share) >= 0.55 else "sparse")
    calibration.forget()
    assert decision(1.0).path == "dense"  # from the file
    assert len(json.loads(own_file.read_text())) == 1


@pytest.mark.parametrize("name", ["conv, in and out", "conv, out and sites", "linear", "block"])
def test_a_gathered_call_is_measured_at_the_density_it_is_asked_for(name):
    call, found = automatic_calls()[name], []
    with dynconv.backend("cpu"), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "run", lambda execution, call: found.append(call) or call.sparse())
        call(0.5)
    (recorded,) = found
    for density in (0.1, 0.5, 0.9, 1.0):
        at = recorded.at(density)
        assert at.key() == recorded.key()
        assert at.kept() == int(at.kept_on_device())
        assert at.kept() / at.work == pytest.approx(density, abs=0.04)
        assert at.sparse().shape == at.dense().shape


def test_calibrate_measures_gathered_layers(own_file):
    x, weight, matrix = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3), torch.randn(8, 8)
    x.requires_grad_()
    block, input = block_case("bottleneck")

    def step():
        mask = some(2, 8, 0)
        gathered_conv2d(x, weight, padding=1, in_mask=mask, out_mask=mask).sum().backward()
        gathered_linear(x[:, :, 0, 0], matrix, in_mask=mask).sum().backward()
        block(input, some(3, 2, 1))

    with dynconv.backend("cpu"):
        crossovers = dynconv.calibrate(step, densities=(0.3, 1.0), seconds=0.001)
    kinds = [" ".join(name.split()[:2]) for name in crossovers]
    assert kinds.count("gathered conv") == 2 and kinds.count("gathered linear") == 2
    assert kinds.count("GatheredBottleneck 8x8") == 1
    (entries,) = json.loads(own_file.read_text()).values()
    assert len(entries) == 5 and all(min(e["sparse_ms"] + e["dense_ms"]) > 0 for e in entries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bitwise_product_is_where(dtype):
    values = torch.randn(3, 4, 2, 2).to(dtype).contiguous(memory_format=torch.channels_last)
    values[0], values[1] = torch.nan, -torch.inf
    mask = torch.rand(3, 4, 1, 1) < 0.5
    kept = _channel_calls.keep_where(mask, values)
    assert torch.equal(kept.nan_to_num(7), torch.where(mask, values, 0).nan_to_num(7))
    assert kept.stride() == values.stride()


def test_a_compiled_graph_decides_when_it_runs(monkeypatch):
    given = calibration.Times("", [0.1, 1.0], [1.0, 10.0], [5.5, 5.5])
    monkeypatch.setattr(calibration, "_measured", lambda calls, *rest: [given] * len(calls))
    x, weight = torch.randn(4, 32, 6, 6), torch.randn(32, 32, 1, 1)
    call = lambda mask: gathered_conv2d(x, weight, out_mask=mask)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    masks = [torch.arange(32).expand(4, 32) < kept for kept in (8, 30)]
    with dynconv.backend("cpu"), torch.no_grad():
        dynconv.calibrate(lambda: call(masks[0]), store=False)
        for mask, path in zip(masks, ("sparse", "dense"), strict=True):
            compiled(mask)
            with dynconv.explain() as explanation:
                output = compiled(mask)
            assert [decision.path for decision in explanation.decisions] == [path]
            expected = torch.where(mask[:, :, None, None], F.conv2d(x, weight), 0)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_whole_layers_need_no_masks():
    """Where everything is kept the dense way passes over nothing but the convolution."""
    everything = ActiveChannels(torch.ones(2, 4, dtype=torch.bool))
    values = torch.randn(2, 4, 3, 3)
    for is_chosen in (True, False):
        assert _channel_calls.Kept.of(everything, is_chosen).keep(values, 1) is values
