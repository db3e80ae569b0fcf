"""Layers over deform_conv2d and deform_aggregate2d: the published formulas in plain PyTorch, parameters, types."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynconv
from dynconv.nn import DCNv2, DCNv4, DeformConv2d


def bilinear(values, y, x):
    """[N, D, H, W] at positions [N, Ho, Wo] -> [N, D, Ho, Wo], zeros outside."""
    height, width = values.shape[2:]
    top, left = y.detach().floor(), x.detach().floor()
    result = 0
    for line, below in ((top, y - top), (top + 1, y - top)):
        for column, beside in ((left, x - left), (left + 1, x - left)):
            share = (below if line is not top else 1 - below) * (beside if column is not left else 1 - beside)
            inside = (line >= 0) & (line < height) & (column >= 0) & (column < width)
            pixel = line.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            found = torch.stack([v[:, p] for v, p in zip(values.flatten(2), pixel.long())])
            result = result + found * (share * inside)[:, None]
    return result


def grid(layer, input, stride=(1, 1), padding=(0, 0)):
    """Lines [Ho, 1] and columns [1, Wo] of the sites' first taps, and the size."""
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, k, s, p, d in zip(input.shape[2:], layer.kernel_size, stride, padding, layer.dilation)
    ]
    lines, columns = (torch.arange(n, dtype=input.dtype) * s - p for n, s, p in zip(size, stride, padding))
    return lines[:, None], columns[None]


def deform_conv(layer, input, offset, mask=None):
    """Tap by tap, offset group by offset group; a group's channels 2 * tap are lines, 2 * tap + 1 columns."""
    lines, columns = grid(layer, input, layer.stride, layer.padding)
    height, width = layer.kernel_size
    taps = height * width
    groups = offset.shape[1] // (2 * taps)
    result = 0
    for tap in range(taps):
        sampled = []
        for group, values in enumerate(input.chunk(groups, 1)):
            y = lines + tap // width * layer.dilation[0] + offset[:, 2 * (group * taps + tap)]
            x = columns + tap % width * layer.dilation[1] + offset[:, 2 * (group * taps + tap) + 1]
            modulation = 1 if mask is None else mask[:, group * taps + tap, None]
            sampled.append(bilinear(values, y, x) * modulation)
        kernel = layer.weight[:, :, tap // width, tap % width, None, None]
        result = result + F.conv2d(torch.cat(sampled, 1), kernel, groups=layer.groups)
    return result if layer.bias is None else result + layer.bias[:, None, None]


def dcn_v2(layer, input):
    """mmcv's forward: three equal parts, the first two the offsets, the third the modulation."""
    conv = layer.conv_offset
    predicted = F.conv2d(input, conv.weight, conv.bias, layer.stride, layer.padding, layer.dilation)
    first, second, modulation = predicted.chunk(3, 1)
    return deform_conv(layer, input, torch.cat((first, second), 1), modulation.sigmoid())


def dcn_v4(layer, input):
    """The authors' kernel, in its own layout: a group's (x, y) pairs, then its weights; columns outside, lines inside.

    A tap's position is site - scale * centre + scale * (tap * dilation + offset).
    """
    samples, _, height, width = input.shape
    read = input
    if layer.offset_mask_dw is not None:
        conv = layer.offset_mask_dw
        read = F.conv2d(input, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    predicted = F.linear(read.flatten(2).mT, layer.offset_mask.weight, layer.offset_mask.bias)
    predicted = predicted.view(samples, height, width, -1)
    values = input
    if not layer.without_pointwise:
        values = F.linear(input.movedim(1, 3), layer.value_proj.weight, layer.value_proj.bias).movedim(3, 1)
    size, scale, taps = layer.kernel_size, layer.offset_scale, layer.kernel_size**2
    centre = layer.dilation * (size - 1) // 2
    lines, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    sums = []
    for group, part in enumerate(values.chunk(layer.group, 1)):
        mine = predicted[..., 3 * taps * group : 3 * taps * (group + 1)]
        total, number = 0, 0
        for column in range(size):
            for line in range(size):
                x = columns - scale * centre + scale * (column * layer.dilation + mine[..., 2 * number])
                y = lines - scale * centre + scale * (line * layer.dilation + mine[..., 2 * number + 1])
                total = total + mine[..., 2 * taps + number][:, None] * bilinear(part, y, x)
                number += 1
        sums.append(total)
    result = torch.cat(sums, 1)
    if layer.without_pointwise:
        return result
    return F.linear(result.movedim(1, 3), layer.output_proj.weight, layer.output_proj.bias).movedim(3, 1)


def offsets(groups, taps, size, masked=True):
    """Offsets of about a pixel and a modulation, for two samples."""
    offset = torch.randn(2, 2 * groups * taps, *size, dtype=torch.float64) * 1.5
    return (offset, torch.rand(2, groups * taps, *size, dtype=torch.float64))[: 1 + masked]


# name: layer, its formula, further inputs, number of parameters
CASES = {
    "deform": (lambda: DeformConv2d(4, 3, 3, padding=1), deform_conv, lambda: offsets(2, 9, (5, 6)), 4 * 3 * 9 + 3),
    "deform_groups": (
        lambda: DeformConv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2, False), deform_conv,
        lambda: offsets(1, 6, (3, 8), False), 4 * 6 * 6 // 2,
    ),
    "dcn_v2": (lambda: DCNv2(4, 3, 3, padding=1), dcn_v2, tuple, 4 * 3 * 9 + 3 + 4 * 9 * 27 + 27),
    "dcn_v2_groups": (
        lambda: DCNv2(4, 2, (1, 3), 2, (0, 1), 1, 2, 2, False), dcn_v2, tuple, 4 * 3 + 4 * 3 * 18 + 18
    ),
    "dcn_v4": (lambda: DCNv4(4, group=2), dcn_v4, tuple, (4 * 56 + 56) + 2 * (16 + 4)),  # 54 rows, to the next 8
    "dcn_v4_scaled": (
        lambda: DCNv4(6, dilation=2, pad=2, group=2, offset_scale=1.5, dw_kernel_size=3, output_bias=False), dcn_v4,
        tuple, (6 * 9 + 6) + (6 * 56 + 56) + (36 + 6) + 36,
    ),
    "dcn_v4_core": (lambda: DCNv4(4, 5, group=1, without_pointwise=True), dcn_v4, tuple, 4 * 80 + 80),
}  # fmt: skip


def make(name, dtype=torch.float64):
    """The layer, its formula, inputs."""
    torch.manual_seed(0)
    layer, formula, further, _ = CASES[name]
    layer = layer()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)  # what is zero at first would hide much
    inputs = [torch.randn(2, layer.in_channels if hasattr(layer, "in_channels") else layer.channels, 5, 6), *further()]
    return layer.to(dtype), formula, [tensor.to(dtype) for tensor in inputs]


def close(actual, expected):
    # Two orders of the same sums, of fewer than 1000 terms a stage. A position that is off by some eps moves a sample
    # by as much times the difference of two pixels, and a derivative not at all: none lies on a pixel's edge.
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
    other = CASES[name][0]().double()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(*inputs), layer(*inputs))
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in CASES[name][0]().parameters())


STATE_DICTS = {  # name: shapes under the names of torchvision, mmcv and the authors of DCNv4
    "deform": (lambda: DeformConv2d(6, 4, 3, groups=2), {"weight": (4, 3, 3, 3), "bias": (4,)}),
    "dcn_v2": (
        lambda: DCNv2(6, 4, 3, deform_groups=2),
        {
            "weight": (4, 6, 3, 3), "bias": (4,), "conv_offset.weight": (54, 6, 3, 3), "conv_offset.bias": (54,),
        },
    ),
    "dcn_v4": (
        lambda: DCNv4(64, 3, 1, 1, 1, 4, 1.0, 5),
        {
            "offset_mask_dw.weight": (64, 1, 5, 5), "offset_mask_dw.bias": (64,), "offset_mask.weight": (112, 64),
            "offset_mask.bias": (112,), "value_proj.weight": (64, 64), "value_proj.bias": (64,),
            "output_proj.weight": (64, 64), "output_proj.bias": (64,),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_has_the_public_names(name):
    make, shapes = STATE_DICTS[name]
    layer = make()
    layer.load_state_dict({key: torch.zeros(shape) for key, shape in shapes.items()}, strict=True)
    assert list(layer.state_dict()) == list(shapes)


def test_first_parameters():
    """A new layer is a convolution; a new DCNv4 gives its output's bias, as the authors'."""
    torch.manual_seed(0)
    input = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    layer = DCNv2(4, 2, 3, padding=1, dtype=torch.float64)
    # Products of 36 terms, twice: (terms + 2) * eps of the sum of absolute values bounds each.
    size = F.conv2d(input.abs(), layer.weight.abs(), padding=1).max().item()
    bound = 2 * 38 * torch.finfo(torch.float64).eps * size
    torch.testing.assert_close(layer(input), F.conv2d(input, layer.weight, padding=1) / 2, rtol=0, atol=bound)
    assert not DCNv4(4, group=1, dtype=torch.float64)(input).any()
    dense, deform = nn.Conv2d(4, 6, 3, groups=2), DeformConv2d(4, 6, 3, groups=2)
    assert deform.weight.shape == dense.weight.shape and deform.bias.shape == dense.bias.shape
    assert deform.weight.abs().max() <= 18**-0.5 and deform.weight.std() > 0.4 * 18**-0.5  # 0.58 for a uniform one


@pytest.mark.parametrize("name", ["deform", "dcn_v2", "dcn_v4"])
def test_bfloat16(name):
    layer, _, inputs = make(name, torch.bfloat16)
    actual = layer(*inputs)
    assert actual.dtype == torch.bfloat16
    exact = layer.double()(*[tensor.double() for tensor in inputs])
    # Offsets of up to 8 pixels are rounded to half an eps of themselves, which moves a sample by as much times the
    # difference of two pixels, up to about twice their size; then at most four stages that round their results.
    bound = (8 + 4) * torch.finfo(torch.bfloat16).eps
    assert (actual.double() - exact).norm() <= bound * exact.norm()


def test_autocast():
    layer, _, inputs = make("dcn_v4", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(*inputs)
    actual.float().sum().backward()
    assert actual.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_compile():
    layer, _, inputs = make("dcn_v4_scaled")
    expected = layer(*inputs)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, list(layer.parameters()), grad)
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    close(actual, expected)
    for have, want in zip(torch.autograd.grad(actual, list(layer.parameters()), grad), expected_grads):
        close(have, want)


WRONG = [
    (lambda: DeformConv2d(4, 4, 3, groups=3), ValueError, "groups: expected a divisor of the 4 channels, got 3"),
    (lambda: DeformConv2d(4, 4, 3, padding="same"), TypeError, "padding: expected an int or a pair of ints"),
    (lambda: DeformConv2d(0, 4, 3), ValueError, "in_channels: expected at least 1, got 0"),
    (lambda: DCNv2(4, 4, 3, deform_groups=3), ValueError, "deform_groups: expected a divisor of the 4 channels"),
    (lambda: DCNv2(4, 4, 3)(torch.zeros(1, 3, 5, 5)), ValueError, r"input: expected shape \[N, 4, H, W\]"),
    (lambda: DCNv4(6), ValueError, "group: expected a divisor of the 6 channels, got 4"),
    (lambda: DCNv4(4, 2), ValueError, "kernel_size: expected an odd number, got 2"),
    (lambda: DCNv4(4, stride=2), ValueError, "stride: expected 1, got 2"),
    (lambda: DCNv4(4, pad=0), ValueError, "pad: expected 1, half the reach of the kernel, got 0"),
    (lambda: DCNv4(4, offset_scale="1"), TypeError, "offset_scale: expected a float, got '1'"),
    (lambda: DCNv4(4)(None), TypeError, "input: expected a tensor, got NoneType"),
]


@pytest.mark.parametrize("call, kind, message", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
