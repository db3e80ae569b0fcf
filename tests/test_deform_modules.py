"""The deformable layers against their papers' formulas: values, gradients, parameters, arguments.

Samples come from F.grid_sample, whose zero padding and bilinear form are those of the ops.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynconv
from dynconv.nn import DCNv2, DCNv4, DeformConv2d


def sample(input, y, x):
    """[N, C, H, W] at [N, Ho, Wo], in pixels -> [N, C, Ho, Wo]."""
    height, width = input.shape[2:]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    return F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def base(count, stride, padding, axis):
    """Where the first tap of each line of sites is, [count, 1] for lines of pixels and [1, count] for columns."""
    return (torch.arange(count, dtype=torch.float64) * stride - padding).unsqueeze(1 - axis)


def deform_conv(layer, input, offset, mask=None):
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    groups = offset.shape[1] // (2 * taps)
    shares = input.chunk(groups, 1)
    columns = []
    for tap in range(taps):
        row, column = divmod(tap, layer.kernel_size[1])
        parts = []
        for group, share in enumerate(shares):
            at = 2 * (group * taps + tap)
            y = base(offset.shape[2], layer.stride[0], layer.padding[0], 0) + row * layer.dilation[0]
            x = base(offset.shape[3], layer.stride[1], layer.padding[1], 1) + column * layer.dilation[1]
            part = sample(share, y + offset[:, at], x + offset[:, at + 1])
            parts.append(part if mask is None else part * mask[:, group * taps + tap, None])
        columns.append(torch.cat(parts, 1))
    columns = torch.stack(columns, 2).unflatten(1, (layer.groups, -1))
    weight = layer.weight.flatten(2).unflatten(0, (layer.groups, -1))
    result = torch.einsum("ngckhw,gock->ngohw", columns, weight).flatten(1, 2)
    return result if layer.bias is None else result + layer.bias.view(1, -1, 1, 1)


def dcn_v2(layer, input):
    conv = layer.conv_offset
    first, second, mask = F.conv2d(
        input, conv.weight, conv.bias, layer.stride, layer.padding, layer.dilation
    ).chunk(3, 1)  # fmt: skip
    return deform_conv(layer, input, torch.cat([first, second], 1), mask.sigmoid())


def dcn_v4(layer, input):
    """In the authors' layout [N, H, W, C], with their order of rows: by column of taps, dx before dy, then weights."""
    taps, half = layer.kernel_size**2, layer.dilation * (layer.kernel_size - 1) // 2
    pixels = input.movedim(1, -1)
    seen = pixels
    if layer.offset_mask_dw is not None:
        conv = layer.offset_mask_dw
        seen = F.conv2d(input, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups).movedim(1, -1)
    value = pixels if layer.value_proj is None else layer.value_proj(pixels)
    predicted = layer.offset_mask(seen)
    shares = value.movedim(-1, 1).chunk(layer.groups, 1)
    sums = []
    for group, share in enumerate(shares):
        rows = predicted[..., 3 * taps * group :]
        total = 0
        for column in range(layer.kernel_size):
            for row in range(layer.kernel_size):
                tap = column * layer.kernel_size + row
                dx, dy = rows[..., 2 * tap], rows[..., 2 * tap + 1]
                x = base(input.shape[3], 1, 0, 1) + layer.offset_scale * (column * layer.dilation - half + dx)
                y = base(input.shape[2], 1, 0, 0) + layer.offset_scale * (row * layer.dilation - half + dy)
                total = total + rows[..., 2 * taps + tap].unsqueeze(1) * sample(share, y, x)
        sums.append(total)
    result = torch.cat(sums, 1)
    return result if layer.output_proj is None else layer.output_proj(result.movedim(1, -1)).movedim(-1, 1)


# Constructor, formula, and the channels of each input; offsets and masks are of the size of the output.
LAYERS = {
    "deform conv": (lambda **made: DeformConv2d(4, 6, 3, padding=1, **made), deform_conv, [4, 18]),
    "deform conv with a mask": (
        lambda **made: DeformConv2d(4, 6, (3, 1), (1, 1), (2, 0), 2, groups=2, bias=False, **made),
        deform_conv,
        [4, 12, 6],
    ),
    "dcn v2": (lambda **made: DCNv2(4, 3, 3, padding=1, **made), dcn_v2, [4]),
    "dcn v2, groups": (lambda **made: DCNv2(4, 6, 3, 2, 1, groups=2, offset_groups=2, **made), dcn_v2, [4]),
    "dcn v4": (lambda **made: DCNv4(8, groups=2, **made), dcn_v4, [8]),
    "dcn v4, scaled": (lambda **made: DCNv4(6, 3, 2, 3, 0.7, dw_kernel_size=3, bias=False, **made), dcn_v4, [6]),
    "dcn v4 without projections": (lambda **made: DCNv4(6, 5, groups=1, pointwise=False, **made), dcn_v4, [6]),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    make, formula, channels = LAYERS[name]
    layer = make(dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, formula, [torch.randn(2, c, 5, 6, dtype=dtype, requires_grad=True) for c in channels]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_formula(name, backend):
    layer, formula, inputs = build(name)
    leaves = [*inputs, *layer.parameters()]
    expected = formula(layer, *inputs)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, grad)
    with dynconv.backend(backend):
        actual = layer(*inputs)
        found = torch.autograd.grad(actual, leaves, grad)
    # grid_sample takes positions from -1 to 1 and back, an error of some 10 eps of a position of about 10 pixels, that
    # is 2e-14, times slopes and sums of at most some hundred terms of order 1 to 10.
    for want, have in zip((expected, *wanted), (actual, *found), strict=True):
        assert (want - have).abs().max() <= 2e-11 * max(1, want.abs().max())


NAMES = {
    "deform conv": ["weight", "bias"],
    "dcn v2": ["weight", "bias", "conv_offset.weight", "conv_offset.bias"],
    "dcn v4": [
        f"{part}.{kind}" for part in ("offset_mask", "value_proj", "output_proj") for kind in ("weight", "bias")
    ],
    "dcn v4 without projections": ["offset_mask.weight", "offset_mask.bias"],
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names(name):
    assert list(build(name)[0].state_dict()) == NAMES[name]


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_round_trip(name):
    layer, _, inputs = build(name)
    other = LAYERS[name][0](dtype=torch.float64)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(*inputs), other(*inputs))
    assert repr(other) == repr(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_made_without_memory(name):
    """From the meta device; what fills it is its `state_dict` or `reset_parameters`."""
    layer, _, inputs = build(name)
    with torch.device("meta"):
        other = LAYERS[name][0](dtype=torch.float64)
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(layer(*inputs), other(*inputs))
    other.reset_parameters()
    predicted = getattr(other, "conv_offset", getattr(other, "offset_mask", None))
    assert predicted is None or not (predicted.weight.any() or predicted.bias.any())


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(padding):
    torch.manual_seed(0)
    input, layer = torch.randn(1, 4, 6, 7), DCNv2(4, 2, (3, 5), padding=padding)
    expected = 0.5 * F.conv2d(input, layer.weight, padding=padding) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(input), expected)


def count(layer):
    return sum(parameter.numel() for parameter in layer.parameters())


def test_parameter_counts():
    assert count(DeformConv2d(8, 12, 3, groups=4)) == count(nn.Conv2d(8, 12, 3, groups=4))
    # Three numbers for each tap and group, predicted by a convolution of the same size.
    assert count(DCNv2(8, 12, 3, offset_groups=2)) == count(nn.Conv2d(8, 12, 3)) + count(nn.Conv2d(8, 3 * 2 * 9, 3))
    # 3 G K = 108 rows, filled up to 112.
    assert count(DCNv4(64, groups=4)) == 65 * 112 + 2 * 65 * 64


def test_at_first_the_offsets_are_zero():
    torch.manual_seed(0)
    input = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    layer = DCNv2(4, 6, 3, padding=1, dtype=torch.float64)
    expected = 0.5 * F.conv2d(input, layer.weight, padding=1) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(input), expected)
    assert not DCNv4(4, dtype=torch.float64)(input).any()


@pytest.mark.parametrize("name", ["dcn v2", "dcn v4"])
def test_half_types(name):
    """Against float64 with the same rounded numbers.

    Parameters of a sixteenth keep the offsets below two pixels. An offset is rounded by eps, which a slope of at most 2
    * 4 (the difference of two neighbours) turns into as much of a sample; sums of fewer than 40 samples of random
    signs, and two roundings of intermediate results: 64 eps of the largest element or of 1.
    """
    layer, _, inputs = build(name, dtype=torch.float16)
    for parameter in layer.parameters():
        parameter.data.div_(8)
    double = build(name)[0]
    double.load_state_dict(layer.state_dict())
    with torch.no_grad():
        actual, expected = layer(*inputs), double(*(t.double() for t in inputs))
    assert actual.dtype == torch.float16
    assert (actual - expected).abs().max() <= 64 * torch.finfo(torch.float16).eps * max(1, expected.abs().max())


ERRORS = {
    "in_channels: expected a multiple of groups = 2, got 3": lambda: DeformConv2d(3, 4, 3, groups=2),
    "out_channels: expected a multiple of groups = 2, got 5": lambda: DeformConv2d(4, 5, 3, groups=2),
    "offset_groups: expected a divisor of the 4 channels, got 3": lambda: DCNv2(4, 4, 3, offset_groups=3),
    "groups: expected a divisor of the 6 channels, got 4": lambda: DCNv4(6),
    "kernel_size: expected an odd number, got 4": lambda: DCNv4(4, 4),
    "dw_kernel_size: expected an odd number, got 2": lambda: DCNv4(4, dw_kernel_size=2),
    "padding: expected values of at least 0, got -1": lambda: DeformConv2d(4, 4, 3, padding=-1),
    "offset_scale: expected a finite number, got inf": lambda: DCNv4(4, offset_scale=float("inf")),
    "input: expected shape [N, 4, H, W], got [1, 8, 5, 5]": lambda: DeformConv2d(4, 4, 3, padding=1)(
        torch.zeros(1, 8, 5, 5), torch.zeros(1, 18, 5, 5)
    ),
    "input: expected shape [N, 4, H, W], got [4, 5, 5]; input.unsqueeze(0) makes a batch of one image": lambda: DCNv2(
        4, 4, 3
    )(torch.zeros(4, 5, 5)),
    "input: expected shape [N, 8, H, W], got [1, 4, 5, 5]": lambda: DCNv4(8)(torch.zeros(1, 4, 5, 5)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_values_are_checked(message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        ERRORS[message]()
    with pytest.raises(TypeError, match=r"kernel_size: expected an int or a pair of ints, got 'three'"):
        DeformConv2d(4, 4, "three")
