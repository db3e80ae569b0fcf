"""Layers over dynamic_filter2d: the published formulas in plain PyTorch, parameters, masks, types."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynconv
from dynconv.nn import (
    CARAFE,
    DDF,
    DDFUp,
    DynamicFilter2d,
    FilterNorm,
    Involution2d,
    PacConv2d,
    PacPool2d,
    pac_kernel,
)


def columns(input, kernel_size, stride=1, padding=0, dilation=1):
    """[N, C, H, W] -> [N, C, tap, Ho, Wo]."""
    pair = nn.modules.utils._pair
    (kernel, stride, padding, dilation) = map(pair, (kernel_size, stride, padding, dilation))
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, k, s, p, d in zip(input.shape[2:], kernel, stride, padding, dilation)
    ]
    return F.unfold(input, kernel, dilation, padding, stride).view(*input.shape[:2], -1, *size)


def dynamic_filter(layer, input, guidance=None):
    first, _, last = layer.generator
    geometry = (layer.stride, layer.padding, layer.dilation)
    filters = F.conv2d(input if guidance is None else guidance, first.weight, first.bias, *geometry)
    filters = F.conv2d(F.relu(filters), last.weight, last.bias).unflatten(1, (layer.groups, -1)).unsqueeze(2)
    if layer.normalization == "softmax":
        filters = filters.softmax(3)
    patches = columns(input, layer.kernel_size, *geometry).unflatten(1, (layer.groups, -1))
    return (filters * patches).sum(3).flatten(1, 2)


def involution(layer, input):
    small = F.avg_pool2d(input, layer.stride) if layer.stride > 1 else input
    norm = layer.conv1.bn
    reduced = F.batch_norm(F.conv2d(small, layer.conv1.conv.weight), None, None, norm.weight, norm.bias, True)
    filters = F.conv2d(F.relu(reduced), layer.conv2.conv.weight, layer.conv2.conv.bias)
    filters = filters.unflatten(1, (layer.groups, 1, -1))
    patches = columns(
        input, layer.kernel_size, layer.stride, layer.dilation * (layer.kernel_size - 1) // 2, layer.dilation
    )
    return (filters * patches.unflatten(1, (layer.groups, layer.group_channels))).sum(3).flatten(1, 2)


def carafe(layer, input):
    compressed = F.conv2d(input, layer.channel_compressor.weight, layer.channel_compressor.bias)
    encoder = layer.content_encoder
    filters = F.conv2d(compressed, encoder.weight, encoder.bias, 1, encoder.padding, encoder.dilation)
    filters = F.pixel_shuffle(filters, layer.scale_factor).unflatten(1, (layer.groups, 1, -1)).softmax(3)
    patches = columns(input, layer.kernel_size, padding=layer.kernel_size // 2)
    nearest = F.interpolate(patches.flatten(1, 2), scale_factor=layer.scale_factor).unflatten(1, patches.shape[1:3])
    return (filters * nearest.unflatten(1, (layer.groups, -1))).sum(3).flatten(1, 2)


def standardised(filters, gain, kernel_size, scale):
    """Over dimension 2, with n - 1 in the variance."""
    centred = filters - filters.mean(2, keepdim=True)
    deviation = (centred.square().sum(2, keepdim=True) / (filters.shape[2] - 1)).sqrt()
    return centred / (deviation + 1e-10) * (gain / kernel_size if scale is None else scale)


def decoupled(spatial, channel, input, guidance, kernel_size, stride, dilation, gain):
    """One DDF from its two branches, modules of which only the parameters are taken."""
    pixels = guidance
    for conv in spatial[:-1]:
        pixels = F.conv2d(pixels, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
    pixels = standardised(pixels.unsqueeze(1), gain, kernel_size, None)
    squeezed = F.relu(F.conv2d(input.mean((2, 3), keepdim=True), channel[1].weight, channel[1].bias))
    excited = F.conv2d(squeezed, channel[3].weight, channel[3].bias).view(*input.shape[:2], -1)
    excited = standardised(excited, None, None, channel[4].std.view(1, input.shape[1], -1))
    patches = columns(input, kernel_size, stride, dilation * (kernel_size // 2), dilation)
    return (patches * pixels * excited[..., None, None]).sum(2)


def ddf(layer, input):
    branches, gain = (layer.spatial_branch, layer.channel_branch), math.sqrt(2)
    return decoupled(*branches, input, input, layer.kernel_size, layer.stride, layer.dilation, gain)


def ddf_up(layer, input, guidance=None):
    guidance = input if guidance is None else guidance
    size, factor = layer.kernel_size, layer.scale_factor
    branches = list(zip(layer.spatial_branch, layer.channel_branch))
    out = input.new_empty(*input.shape[:2], input.shape[2] * factor, input.shape[3] * factor)
    for number, branch in enumerate(branches):
        part = decoupled(*branch, input, guidance, size, 1, layer.dilation, 1)
        out[:, :, number // factor :: factor, number % factor :: factor] = part
    return out


def gaussian(guidance, kernel_size, stride=1, padding=0, dilation=1, normalize=False):
    """exp(-|f_j - f_i|^2 / 2) [N, 1, tap, Ho, Wo], zeros outside of the image."""
    patches = columns(guidance, kernel_size, stride, padding, dilation)
    inside = columns(torch.ones_like(guidance[:, :1]), kernel_size, stride, padding, dilation)
    middle = patches.shape[2] // 2
    kernel = (-0.5 * (patches - patches[:, :, middle : middle + 1]).square().sum(1, keepdim=True)).exp() * inside
    return kernel / kernel.sum(2, keepdim=True) if normalize else kernel


def pac_conv(layer, input, guidance):
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    weighed = columns(input, *geometry) * gaussian(guidance, *geometry, layer.normalize_kernel)
    if layer.shared_filters:
        result = torch.einsum("nctyx,t->ncyx", weighed, layer.weight.flatten())
    else:
        result = torch.einsum("nctyx,oct->noyx", weighed, layer.weight.flatten(2))
    return result if layer.bias is None else result + layer.bias[:, None, None]


def pac_pool(layer, input, guidance):
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (columns(input, *geometry) * gaussian(guidance, *geometry, layer.normalize_kernel)).sum(2)


# name: layer, its formula, channels of its inputs, number of parameters
CASES = {
    "dynamic_filter": (
        lambda: DynamicFilter2d(4, 3, 2, 1, groups=2, hidden_channels=3), dynamic_filter, (4,),
        (4 * 9 * 3 + 3) + (3 * 18 + 18),
    ),
    "kernel_prediction": (
        lambda: DynamicFilter2d(2, (3, 5), 1, (2, 4), 2, normalization="softmax", guidance_channels=3), dynamic_filter,
        (2, 3), (3 * 15 * 3 + 3) + (3 * 15 + 15),
    ),
    "involution": (lambda: Involution2d(8, 3, 1, 4, 2), involution, (8,), (8 * 4 + 2 * 4) + (4 * 2 * 9 + 2 * 9)),
    "involution_stride": (
        lambda: Involution2d(8, 5, 2, 8, 4, dilation=2), involution, (8,), (8 * 2 + 2 * 2) + (2 * 25 + 25)
    ),
    "carafe": (lambda: CARAFE(4, compressed_channels=3), carafe, (4,), (4 * 3 + 3) + (3 * 9 * 100 + 100)),
    "carafe_groups": (
        lambda: CARAFE(4, 3, 3, 5, 2, compressed_channels=2, groups=2), carafe, (4,),
        (4 * 2 + 2) + (2 * 25 * 162 + 162),
    ),
    "ddf": (lambda: DDF(6, se_ratio=0.5), ddf, (6,), (6 * 9 + 9) + (6 * 3 + 3) + (3 * 54 + 54) + 54),
    "ddf_stride": (
        lambda: DDF(5, 3, 2, 2, gen_kernel_size=3), ddf, (5,),
        (5 * 9 + 5) + (5 * 9 + 9) + (5 + 1) + (45 + 45) + 45,
    ),
    "ddf_up": (lambda: DDFUp(5), ddf_up, (5,), 4 * ((5 * 9 + 9) + (5 + 1) + (45 + 45) + 45)),
    "ddf_up_joint": (
        lambda: DDFUp(5, joint_channels=2), ddf_up, (5, 2),
        4 * ((2 * 9 + 2) + (2 * 9 + 9) + (5 + 1) + (45 + 45) + 45),
    ),
    "pac_conv": (lambda: PacConv2d(4, 3, 3, padding=1), pac_conv, (4, 2), 4 * 3 * 9 + 3),
    "pac_conv_stride": (
        lambda: PacConv2d(4, 3, (3, 5), 2, (2, 3), 2, bias=False, normalize_kernel=True), pac_conv, (4, 2), 4 * 3 * 15
    ),
    "pac_shared": (
        lambda: PacConv2d(4, 4, 3, padding=1, normalize_kernel=True, shared_filters=True), pac_conv, (4, 2), 9 + 4
    ),
    "pac_pool": (lambda: PacPool2d(5, padding=2, normalize_kernel=True), pac_pool, (4, 2), 0),
}  # fmt: skip


def make(name, dtype=torch.float64, size=(6, 8)):
    """The layer, its formula, inputs."""
    torch.manual_seed(0)
    layer, formula, channels, _ = CASES[name]
    layer = layer()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)  # no zeros, and no near-average filters
    return layer.to(dtype), formula, [torch.randn(2, c, *size).to(dtype) for c in channels]


def close(actual, expected):
    # Two orders of the same sums, of at most 1000 terms a stage and a few stages, of values of the largest's order.
    bound = 4000 * torch.finfo(torch.float64).eps * max(expected.abs().max().item(), 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_formula(name, backend):
    layer, formula, inputs = make(name)
    for tensor in inputs:
        tensor.requires_grad_()
    wanted = [*inputs, *layer.parameters()]
    expected = formula(layer, *inputs)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, wanted, grad)
    with dynconv.backend(backend):
        actual = layer(*inputs)
        actual_grads = torch.autograd.grad(actual, wanted, grad)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    close(actual, expected)
    for have, want in zip(actual_grads, expected_grads):
        close(have, want)


@pytest.mark.parametrize("name", CASES)
def test_parameters(name):
    layer, _, inputs = make(name)
    assert sum(parameter.numel() for parameter in layer.parameters()) == CASES[name][3]
    layer.eval()
    other = CASES[name][0]().double().eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(*inputs), layer(*inputs))
    on_meta = CASES[name][0]  # device and dtype go to every parameter
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in on_meta().parameters())


STATE_DICTS = {  # name: shapes under the names of the public implementations
    "involution": (
        lambda: Involution2d(32),
        {
            "conv1.conv.weight": (8, 32, 1, 1), "conv1.bn.weight": (8,), "conv1.bn.bias": (8,),
            "conv1.bn.running_mean": (8,), "conv1.bn.running_var": (8,), "conv1.bn.num_batches_tracked": (),
            "conv2.conv.weight": (98, 8, 1, 1), "conv2.conv.bias": (98,),
        },
    ),
    "carafe": (
        lambda: CARAFE(32),
        {
            "channel_compressor.weight": (64, 32, 1, 1), "channel_compressor.bias": (64,),
            "content_encoder.weight": (100, 64, 3, 3), "content_encoder.bias": (100,),
        },
    ),
    "ddf": (
        lambda: DDF(10),
        {
            "spatial_branch.0.weight": (9, 10, 1, 1), "spatial_branch.0.bias": (9,),
            "channel_branch.1.weight": (2, 10, 1, 1), "channel_branch.1.bias": (2,),
            "channel_branch.3.weight": (90, 2, 1, 1), "channel_branch.3.bias": (90,), "channel_branch.4.std": (90,),
        },
    ),
    "ddf_up": (
        lambda: DDFUp(10, scale_factor=1, joint_channels=4),
        {
            "spatial_branch.0.0.weight": (4, 1, 3, 3), "spatial_branch.0.0.bias": (4,),
            "spatial_branch.0.1.weight": (9, 4, 1, 1), "spatial_branch.0.1.bias": (9,),
            "channel_branch.0.1.weight": (2, 10, 1, 1), "channel_branch.0.1.bias": (2,),
            "channel_branch.0.3.weight": (90, 2, 1, 1), "channel_branch.0.3.bias": (90,),
            "channel_branch.0.4.std": (90,),
        },
    ),
    "pac": (lambda: PacConv2d(4, 6, 5), {"weight": (6, 4, 5, 5), "bias": (6,)}),
    "pac_shared": (lambda: PacConv2d(4, 4, 5, shared_filters=True), {"weight": (1, 1, 5, 5), "bias": (4,)}),
    "filter_norm": (lambda: FilterNorm(2, 3, "relu", True, True), {"std": (18,), "mean": (18,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_has_the_public_names(name):
    make, shapes = STATE_DICTS[name]
    made = {key: torch.zeros(shape) for key, shape in shapes.items()}
    layer = make()
    layer.load_state_dict(made, strict=True)
    assert list(layer.state_dict()) == list(shapes)


@pytest.mark.parametrize("gated", [False, True], ids=["mask", "gate"])
@pytest.mark.parametrize("name", ["dynamic_filter", "kernel_prediction", "involution_stride", "carafe", "ddf"])
def test_mask(name, gated):
    layer, _, inputs = make(name)
    layer.eval()
    dense = layer(*inputs)
    mask = torch.rand(2, 1, *dense.shape[2:], dtype=torch.float64)
    mask = torch.where(mask < 0.5, mask, 0) if gated else mask < 0.5
    actual = layer(*inputs, mask=mask)
    close(actual, torch.where(mask != 0, dense * mask, 0))
    assert torch.equal(actual == 0, (mask == 0).expand_as(actual))


@pytest.mark.parametrize("name", ["dynamic_filter", "involution_stride"])
def test_nan_where_no_active_site_reads(name):
    layer, _, (input,) = make(name, size=(8, 12))
    layer.eval()
    mask = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    mask[:, :, :, :2] = True
    expected = layer(input, mask=mask)
    input[..., 9:] = math.nan  # the active sites' windows end before
    assert torch.equal(layer(input, mask=mask), expected) and expected.isfinite().all()


@pytest.mark.parametrize("name", ["kernel_prediction", "involution", "carafe", "ddf", "pac_conv", "pac_shared"])
def test_bfloat16(name):
    layer, _, inputs = make(name, torch.bfloat16)
    actual = layer(*inputs)
    assert actual.dtype == torch.bfloat16
    exact = layer.double()(*[tensor.double() for tensor in inputs])
    # At most eight stages, each of which rounds its results by half an eps, and takes the errors of those before it
    # along; normalising a filter may double one. As a norm, since single values cancel.
    bound = 8 * torch.finfo(torch.bfloat16).eps
    assert (actual.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    layer, _, inputs = make(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(*inputs)
    assert actual.dtype == torch.bfloat16
    if actual.requires_grad:
        actual.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_compile():
    layer, _, inputs = make("pac_shared")  # an autograd.Function of its own, and the op
    expected = layer(*inputs)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, list(layer.parameters()), grad)
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    close(actual, expected)
    for have, want in zip(torch.autograd.grad(actual, list(layer.parameters()), grad), expected_grads):
        close(have, want)


def test_filter_norm():
    torch.manual_seed(0)
    filters = torch.randn(2, 18, 3, 4, dtype=torch.float64) * 5 + 3
    taps = FilterNorm(2, 3, "relu").double()(filters).view(2, 2, 9, 3, 4)
    close(taps.mean(2), torch.zeros(2, 2, 3, 4, dtype=torch.float64))
    deviation = filters.view(2, 2, 9, 3, 4).std(2)
    close(taps.std(2), math.sqrt(2) / 3 * deviation / (deviation + 1e-10))
    learned = FilterNorm(2, 3, "relu", running_std=True, running_mean=True).double()
    with torch.no_grad():
        learned.std.fill_(2).mul_(torch.arange(18))
        learned.mean.copy_(torch.arange(18))
    expected = taps.flatten(1, 2) * 3 / math.sqrt(2) * learned.std[:, None, None] + learned.mean[:, None, None]
    close(learned(filters), expected)
    same = torch.full((1, 9, 1, 1), 0.5, requires_grad=True)  # no deviation at all
    result = FilterNorm(1, 3)(same)
    result.sum().backward()
    assert torch.equal(result, torch.zeros_like(result)) and same.grad.isfinite().all()
    assert FilterNorm(1, 3)(same.half()).dtype == torch.float16


def test_pac_kernel():
    torch.manual_seed(0)
    guidance = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    for geometry in ((3, 1, 1), ((5, 3), (2, 1), (4, 1), (2, 1))):
        kernel = pac_kernel(guidance, *geometry)
        close(kernel, gaussian(guidance, *geometry).squeeze(1))
        assert torch.autograd.gradcheck(
            lambda f, g=geometry: pac_kernel(f, *g, normalize=True), guidance, fast_mode=True
        )
    # At the border the taps outside are not there: constant features stay as they are.
    kernel = pac_kernel(guidance, 3, padding=1, normalize=True)
    close(kernel.sum(1), torch.ones(2, 5, 4, dtype=torch.float64))
    same = PacPool2d(3, padding=1, normalize_kernel=True)(torch.ones(2, 1, 5, 4, dtype=torch.float64), guidance)
    close(same, torch.ones_like(same))
    # Windows that hold nothing of the image have no kernel, rather than 0 / 0.
    empty = pac_kernel(torch.full((1, 1, 2, 2), 50.0), 3, padding=5, normalize=True)
    assert empty.isfinite().all() and not empty[:, :, 0].any()
    half = pac_kernel(torch.full((1, 4, 3, 3), 200.0).half().requires_grad_(), 3)  # squares overflow float16
    assert half.dtype == torch.float16 and torch.equal(half, torch.ones_like(half))


def test_pac_layers_share_a_kernel():
    layer, _, (input, guidance) = make("pac_conv")
    kernel = pac_kernel(guidance, 3, padding=1)
    assert torch.equal(layer(input, kernel=kernel), layer(input, guidance))


def test_second_derivatives_of_pac_are_refused():
    layer, _, (input, guidance) = make("pac_conv")
    guidance.requires_grad_()
    (grad,) = torch.autograd.grad(layer(input, guidance).square().sum(), guidance, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiable once"):
        grad.sum().backward()


def test_no_samples():
    for name in CASES:
        layer, _, inputs = make(name)
        full, empty = layer.eval()(*inputs), layer(*(tensor[:0] for tensor in inputs))
        assert empty.shape == (0, *full.shape[1:])


WRONG = [
    (lambda: DynamicFilter2d(4, 3, groups=3), ValueError, "groups: expected a divisor of the 4 channels, got 3"),
    (lambda: DynamicFilter2d(4, 3.0), TypeError, "kernel_size: expected an int or a pair"),
    (lambda: DynamicFilter2d(4, 3, normalization="relu"), ValueError, "normalization: expected None, softmax"),
    (lambda: DynamicFilter2d(4, 3, hidden_channels=0), ValueError, "hidden_channels: expected at least 1, got 0"),
    (lambda: Involution2d(24), ValueError, "group_channels: expected a divisor of the 24 channels, got 16"),
    (lambda: Involution2d(16, 4), ValueError, "kernel_size: expected an odd number, got 4"),
    (lambda: Involution2d(16, reduction_ratio=17), ValueError, "reduction_ratio: expected 1 to 16, got 17"),
    (lambda: CARAFE(4, 0), ValueError, "scale_factor: expected at least 1, got 0"),
    (lambda: CARAFE(4, encoder_kernel=2), ValueError, "encoder_kernel: expected an odd number, got 2"),
    (lambda: DDF(4), ValueError, "se_ratio: expected at least one of the 4 channels"),
    (lambda: DDF(8, 1), ValueError, "kernel_size: expected at least 3, got 1"),
    (lambda: DDF(8, se_ratio=float("nan")), ValueError, "se_ratio: expected at least one of the 8 channels"),
    (lambda: DDF(8, nonlinearity="x"), ValueError, "nonlinearity: expected a name that"),
    (lambda: DynamicFilter2d(4, 3, normalization=["l2"]), TypeError, "normalization: expected None or a str"),
    (lambda: PacPool2d(3)(*torch.ones(1, 1, 9, 4, 4), kernel=torch.ones(1, 9, 2, 2).int()), TypeError, "kernel: exp"),
    (lambda: PacConv2d(4, 4, 3)(*torch.ones(2, 1, 4, 4, 4).half()), TypeError, "weight: expected torch.float16"),
    (lambda: DDFUp(8, se_ratio="0.2"), TypeError, "se_ratio: expected a float, got '0.2'"),
    (lambda: FilterNorm(1, 1), ValueError, "kernel_size: expected at least 2, got 1"),
    (lambda: PacConv2d(4, 4, 2), ValueError, "kernel_size: expected odd numbers"),
    (lambda: PacConv2d(4, 3, 3, shared_filters=True), ValueError, "out_channels: expected 4"),
    (lambda: PacPool2d(3, normalize_kernel=1), TypeError, "normalize_kernel: expected a bool, got 1"),
    (lambda: Involution2d(16)(torch.zeros(1, 8, 4, 4)), ValueError, r"input: expected shape \[N, 16, H, W\]"),
    (lambda: Involution2d(16, 3, 2)(torch.zeros(1, 16, 5, 4)), ValueError, "multiples of the stride, 2"),
    (lambda: CARAFE(4)([1]), TypeError, "input: expected a tensor, got list"),
    (lambda: CARAFE(4)(torch.zeros(1, 4, 2, 2).int()), TypeError, "input: expected float32"),
    (lambda: DynamicFilter2d(1, 1)(*torch.zeros(2, 1, 1, 2, 2)), ValueError, "guidance: expected none"),
    (
        lambda: DDFUp(5, joint_channels=1)(torch.zeros(1, 5, 4, 4), torch.zeros(1, 1, 8, 8)), ValueError,
        r"guidance: expected shape \[1, 1, 4, 4\], got \[1, 1, 8, 8\]",
    ),
    (lambda: PacPool2d(3)(torch.zeros(1, 1, 4, 4)), ValueError, "guidance: expected it or a kernel, got neither"),
    (lambda: PacPool2d(3)(*torch.zeros(3, 1, 9, 4, 4)), ValueError, "guidance: expected it or a kernel, got both"),
    (lambda: PacPool2d(3)(*torch.zeros(1, 1, 9, 4, 4), kernel=torch.zeros(1, 9, 4, 4)), ValueError, "kernel: expected"),
    (lambda: FilterNorm(1, 3)(torch.zeros(1, 8)), ValueError, r"filters: expected shape \[N, 9, ...\], got \[1, 8\]"),
    (lambda: pac_kernel(torch.zeros(1, 4, 4), 3), ValueError, r"guidance: expected shape \[N, C, H, W\]"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
