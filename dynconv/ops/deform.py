"""deform_conv2d and deform_aggregate2d: taps that sample the input at positions of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._arguments import check_pixels
from .._backend import backend_for, module, unwatched
from .._flops import register_flop_formula
from .._geometry import Geometry, IntPair, Padding
from ._common import (
    allow_tf32,
    autocast,
    below_autograd,
    channels_last,
    check_map,
    check_normalization,
    check_operand,
    check_types,
    in_rows,
    once_differentiable,
    placed,
    register_autograd,
)

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, str backend"
_CONVOLUTION = "Tensor input, Tensor offset, Tensor weight, Tensor? mask"
_AGGREGATION = "Tensor input, Tensor offset, Tensor weights, int[2] kernel_size"
_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(
    f"deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, {_GEOMETRY}) -> Tensor"
)
_library.define(
    f"deform_conv2d_backward(Tensor grad, {_CONVOLUTION}, {_GEOMETRY}, bool[5] wanted) -> "
    "(Tensor input, Tensor offset, Tensor weight, Tensor bias, Tensor mask)"
)
_library.define("normalize_taps(Tensor weights, int taps, str normalization) -> Tensor")
_library.define("normalize_taps_backward(Tensor grad, Tensor weights, int taps, str normalization) -> Tensor")
_library.define(f"deform_aggregate2d({_AGGREGATION}, {_GEOMETRY}) -> Tensor")
_library.define(
    f"deform_aggregate2d_backward(Tensor grad, {_AGGREGATION}, {_GEOMETRY}, bool[3] wanted) -> "
    "(Tensor input, Tensor offset, Tensor weights)"
)


def _sizes(stride, padding, dilation) -> dict:
    """The geometry as the Triton launchers take it."""
    return dict(stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))


def _conv_forward(input, offset, weight, bias, mask, stride, padding, dilation, backend) -> Tensor:
    out = channels_last((input.shape[0], weight.shape[0], *offset.shape[2:]), input)
    if out.numel() == 0:
        return out
    input, offset, mask = in_rows(input), in_rows(offset), in_rows(mask)
    if backend == "triton":
        sizes = _sizes(stride, padding, dilation)
        module(".kernels.deform").conv(input, offset, mask, weight, bias, out, allow_tf32=allow_tf32(), **sizes)
        return out
    sampling = module(".cpu.deform").Sampling(input, offset, mask, placed(weight.shape[2:], stride, padding, dilation))
    product, rows = module(".cpu.deform").Product(weight, bias, input.shape[1], sampling.compute), _rows(out)
    for begin, end in sampling.chunks():
        product.forward(sampling.columns(begin, end), rows[begin:end])
    return out


def _rows(tensor: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last as [pixels, C]."""
    return tensor.permute(0, 2, 3, 1).flatten(0, 2)


def _conv_backward(
    grad, input, offset, weight, mask, stride, padding, dilation, backend, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [grad.new_empty(0) for _ in wanted]  # not one five times: outputs must not alias
    if grad.numel() == 0 or input.numel() == 0:
        like = (
            _like(input),
            _like(offset),
            weight,
            weight.new_empty(weight.shape[0]),
            mask if mask is None else _like(mask),
        )
        grads = [
            torch.zeros_like(t) if want and t is not None else made
            for t, want, made in zip(like, wanted, grads, strict=True)
        ]
        if wanted[3]:  # an empty input can have sites, in its padding
            grads[3] = _bias_grad(grad)
        return tuple(grads)
    grad, input, offset, mask = in_rows(grad), in_rows(input), in_rows(offset), in_rows(mask)
    if backend == "triton":
        kernels, sizes = module(".kernels.deform"), _sizes(stride, padding, dilation) | {"allow_tf32": allow_tf32()}
        found: list[Tensor | None] = [None] * 5
        if wanted[0] or wanted[1] or wanted[4]:
            found[0], found[1], found[4] = kernels.conv_input_grad(
                grad, input, offset, mask, weight, wants_input=wanted[0], wants_offset=wanted[1], wants_mask=wanted[4],
                **sizes,
            )  # fmt: skip
        if wanted[3]:
            found[3] = _bias_grad(grad)
        if wanted[2]:
            found[2] = kernels.conv_weight_grad(input, offset, mask, grad, weight, **sizes)
        return tuple(none if made is None else made for made, none in zip(found, grads, strict=True))
    sampling = module(".cpu.deform").Sampling(input, offset, mask, placed(weight.shape[2:], stride, padding, dilation))
    product = module(".cpu.deform").Product(weight, None, input.shape[1], sampling.compute)
    of_input = torch.empty_like(input, dtype=sampling.compute) if wanted[0] else None
    rows = _rows(grad).to(sampling.compute)
    for which, like in ((1, offset), (4, mask)):
        if wanted[which]:
            grads[which] = torch.empty_like(like)
    for begin, end in sampling.chunks():
        if wanted[2]:
            product.add_weight_grad(sampling.columns(begin, end), rows[begin:end])
        if wanted[0] or wanted[1] or wanted[4]:
            columns = product.column_grads(rows, begin, end)
            of = [grads[which] if wanted[which] else None for which in (1, 4)]
            sampling.grads(columns, begin, end, of_input, *of)
    if wanted[0]:
        grads[0] = of_input.to(input.dtype)
    if wanted[2]:
        grads[2] = product.weight_grad()
    if wanted[3]:
        grads[3] = module(".cpu.deform").bias_grad(rows).to(weight.dtype)
    return tuple(grads)


def _bias_grad(grad: Tensor) -> Tensor:
    return grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


def _like(tensor: Tensor) -> Tensor:
    """An uninitialised one of that shape, in channels_last."""
    return channels_last(tensor.shape, tensor)


def _aggregate_forward(input, offset, weights, kernel_size, stride, padding, dilation, backend) -> Tensor:
    out = channels_last((*input.shape[:2], *offset.shape[2:]), input)
    if out.numel() == 0:
        return out
    input, offset, weights = in_rows(input), in_rows(offset), in_rows(weights)
    if backend == "triton":
        module(".kernels.deform").aggregate(
            input, offset, weights, out, kernel_size=tuple(kernel_size), **_sizes(stride, padding, dilation)
        )
    else:
        geometry = placed(kernel_size, stride, padding, dilation)
        module(".cpu.deform").Sampling(input, offset, weights, geometry).aggregate(out)
    return out


def _aggregate_backward(
    grad, input, offset, weights, kernel_size, stride, padding, dilation, backend, wanted
) -> tuple[Tensor, Tensor, Tensor]:
    operands = (input, offset, weights)
    grads = [grad.new_empty(0) for _ in wanted]
    if grad.numel() == 0 or input.numel() == 0:
        return tuple(torch.zeros_like(_like(t)) if w else g for t, w, g in zip(operands, wanted, grads, strict=True))
    grad, input, offset, weights = in_rows(grad), *map(in_rows, operands)
    if backend == "triton":
        found = module(".kernels.deform").aggregate_grad(
            grad, input, offset, weights, wants_input=wanted[0], wants_offset=wanted[1], wants_weights=wanted[2],
            kernel_size=tuple(kernel_size), **_sizes(stride, padding, dilation),
        )  # fmt: skip
        return tuple(none if made is None else made for made, none in zip(found, grads, strict=True))
    geometry = placed(kernel_size, stride, padding, dilation)
    sampling = module(".cpu.deform").Sampling(input, offset, weights, geometry)
    rows = _rows(grad).to(sampling.compute)
    for which, like in ((1, offset), (2, weights)):
        if wanted[which]:
            grads[which] = torch.empty_like(like)
    of_input = torch.empty_like(input, dtype=sampling.compute) if wanted[0] else None
    of = [grads[which] if wanted[which] else None for which in (1, 2)]
    sampling.grads(rows, 0, sampling.sites, of_input, *of)
    if wanted[0]:
        grads[0] = of_input.to(input.dtype)
    return tuple(grads)


def _normalize(weights: Tensor, taps: int, normalization: str) -> Tensor:
    return module(".cpu.dynamic_filter").normalized(in_rows(weights), taps, normalization).to(weights.dtype)


def _normalize_backward(grad: Tensor, weights: Tensor, taps: int, normalization: str) -> Tensor:
    kernels, weights = module(".cpu.dynamic_filter"), in_rows(weights)
    normalized = kernels.normalized(weights, taps, normalization)
    grads = torch.empty_like(normalized).copy_(grad)
    kernels.normalized_grad_(grads, normalized, weights, taps, normalization)
    return grads.to(weights.dtype)


_library.impl("normalize_taps", _normalize, "CPU")
_library.impl("normalize_taps_backward", _normalize_backward, "CPU")
for _key in ("CPU", "CUDA"):
    _library.impl("deform_conv2d", _conv_forward, _key)
    _library.impl("deform_conv2d_backward", _conv_backward, _key)
    _library.impl("deform_aggregate2d", _aggregate_forward, _key)
    _library.impl("deform_aggregate2d_backward", _aggregate_backward, _key)


@torch.library.register_fake("dynconv::deform_conv2d", lib=_library)
def _(input, offset, weight, bias, mask, *geometry):
    return channels_last((input.shape[0], weight.shape[0], *offset.shape[2:]), input)


@torch.library.register_fake("dynconv::deform_conv2d_backward", lib=_library)
def _(grad, input, offset, weight, mask, stride, padding, dilation, backend, wanted):
    nothing = lambda: grad.new_empty(0)
    return (
        _like(input) if wanted[0] else nothing(),
        _like(offset) if wanted[1] else nothing(),
        weight.new_empty(weight.shape) if wanted[2] else nothing(),
        weight.new_empty(weight.shape[0]) if wanted[3] else nothing(),
        _like(mask) if wanted[4] else nothing(),
    )


@torch.library.register_fake("dynconv::deform_aggregate2d", lib=_library)
def _(input, offset, *rest):
    return channels_last((*input.shape[:2], *offset.shape[2:]), input)


@torch.library.register_fake("dynconv::deform_aggregate2d_backward", lib=_library)
def _(grad, *rest):
    return tuple(_like(t) if want else grad.new_empty(0) for t, want in zip(rest[:3], rest[-1]))


@torch.library.register_fake("dynconv::normalize_taps", lib=_library)
def _(weights, taps, normalization):
    return _like(weights)


@torch.library.register_fake("dynconv::normalize_taps_backward", lib=_library)
def _(grad, weights, taps, normalization):
    return _like(weights)


class _NormalizeTaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, *options):
        ctx.save_for_backward(weights)
        ctx.options = options
        return below_autograd("normalize_taps", _normalize, weights, *options)

    @staticmethod
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        run = _normalize_backward if unwatched(grad, weights) else torch.ops.dynconv.normalize_taps_backward
        return run(grad, weights, *ctx.options), None, None


class _DeformConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, offset, weight, bias, mask, *geometry):
        out = below_autograd("deform_conv2d", _conv_forward, input, offset, weight, bias, mask, *geometry)
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.geometry = geometry
        return out

    @staticmethod
    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:5])
        run = _conv_backward if unwatched(grad, *ctx.saved_tensors) else torch.ops.dynconv.deform_conv2d_backward
        results = run(grad, *ctx.saved_tensors, *ctx.geometry, wanted)
        return (*(r if want else None for r, want in zip(results, wanted)), *(None,) * len(ctx.geometry))


class _DeformAggregate2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, offset, weights, *geometry):
        out = below_autograd("deform_aggregate2d", _aggregate_forward, input, offset, weights, *geometry)
        ctx.save_for_backward(input, offset, weights)
        ctx.geometry = geometry
        return out

    @staticmethod
    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:3])
        op = torch.ops.dynconv.deform_aggregate2d_backward
        run = _aggregate_backward if unwatched(grad, *ctx.saved_tensors) else op
        results = run(grad, *ctx.saved_tensors, *ctx.geometry, wanted)
        return (*(r if want else None for r, want in zip(results, wanted)), *(None,) * len(ctx.geometry))


register_autograd(_library, "normalize_taps", _NormalizeTaps.apply)
register_autograd(_library, "deform_conv2d", _DeformConv2d.apply)
register_autograd(_library, "deform_aggregate2d", _DeformAggregate2d.apply)
once_differentiable(_library, "normalize_taps")
once_differentiable(_library, "deform_conv2d")
once_differentiable(_library, "deform_aggregate2d")


@register_flop_formula(torch.ops.dynconv.deform_conv2d, get_raw=True)
def _conv_flops(input, offset, weight, *rest, **unused) -> int:
    return 2 * offset.shape[0] * offset.shape[2] * offset.shape[3] * weight.numel()


@register_flop_formula(torch.ops.dynconv.deform_conv2d_backward, get_raw=True)
def _conv_backward_flops(grad, input, offset, weight, *rest, **unused) -> int:
    wanted = rest[-1]
    return ((wanted[0] or wanted[1] or wanted[4]) + wanted[2]) * _conv_flops(input, offset, weight)


@register_flop_formula(torch.ops.dynconv.deform_aggregate2d, get_raw=True)
def _aggregate_flops(input, offset, weights, kernel_size, *rest, **unused) -> int:
    return 8 * offset.shape[0] * offset.shape[2] * offset.shape[3] * input.shape[1] * kernel_size[0] * kernel_size[1]


@register_flop_formula(torch.ops.dynconv.deform_aggregate2d_backward, get_raw=True)
def _aggregate_backward_flops(grad, input, offset, weights, kernel_size, *rest, **unused) -> int:
    wanted = rest[-1]
    return (wanted[0] + (wanted[1] or wanted[2])) * _aggregate_flops(input, offset, weights, kernel_size)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve deformably: every tap of every site reads the input where an offset says, between the pixels.

    The arguments and values of `torchvision.ops.deform_conv2d`: DCN v1 (Dai et al., ICCV 2017), and v2 with a `mask`
    (Zhu et al., CVPR 2019). A sample is the bilinear interpolation of four pixels, those outside of the input being
    zero. A position at a distance of a pixel or more from the input, or that is not finite, samples zero and has no
    gradient.

    float32, float64, float16 and bfloat16; half types accumulate in float32, and float32 on a GPU obeys the TF32 switch
    of F.conv2d. Under autocast all is float32 and the result of the input's type, as with torchvision: half types are
    too coarse for positions. Differentiable once, in all of its tensors. The input's gradient is a scatter, yet the
    same input gives the same bits: on the CPU it is added up in a fixed order, on a GPU as integers, multiples of a
    power of two well below the largest contribution's precision; there NaN or Inf in `grad`, `weight` or `mask` makes
    all of it NaN.

    Args:
        input: [N, C, H, W]; channels_last is the fast path, as for offset and mask.
        offset: [N, 2 * OG * kH * kW, Ho, Wo] in pixels: (dy, dx) of each tap, of each of OG groups of channels.
        weight: [Cout, C / groups, kH, kW], any groups that divide C and Cout.
        bias: [Cout].
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.
        mask: [N, OG * kH * kW, Ho, Wo], a factor for each sample.

    Returns:
        [N, Cout, Ho, Wo] in channels_last.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or device.

    Example:
        >>> x, weight, offset = torch.randn(1, 8, 6, 6), torch.randn(4, 8, 3, 3), torch.zeros(1, 2 * 9, 6, 6)
        >>> y = dynconv.deform_conv2d(x, offset, weight, padding=1)
        >>> torch.allclose(y, nn.functional.conv2d(x, weight, padding=1), atol=1e-4)
        True
    """
    check_map(input)
    for name, operand in (("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if operand is not None or name in ("offset", "weight"):
            check_operand(name, operand, input)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight: expected a shape [Cout, C / groups, kH, kW] of no zeros, got {list(weight.shape)}")
    geometry = _check_offset(input, offset, tuple(weight.shape[2:]), stride, padding, dilation)
    channels = input.shape[1]
    if channels % weight.shape[1] or weight.shape[0] % (channels // weight.shape[1]):
        raise ValueError(
            f"weight: expected [Cout, C / groups, ...] for groups that divide C = {channels} and Cout, got "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    _check_scales("mask", mask, offset)
    dtype = input.dtype
    input, offset, weight, bias, mask = autocast(input, offset, weight, bias, mask, dtype=torch.float32)
    check_types(input, offset=offset, weight=weight, bias=bias, mask=mask)
    backend = backend_for(input.device)
    where = (geometry.stride, geometry.padding, geometry.dilation)
    if backend == "reference":
        return reference.deform_conv2d(input, offset, weight, bias, *where, mask).to(dtype)
    run = _conv_forward if unwatched(input, offset, weight, bias, mask) else torch.ops.dynconv.deform_conv2d
    return run(input, offset, weight, bias, mask, *where, backend).to(dtype)


def deform_aggregate2d(
    input: Tensor,
    offset: Tensor,
    weights: Tensor,
    *,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    normalization: str | None = None,
) -> Tensor:
    """Add up what the taps of every site sample, with a weight for each: the core of DCNv3 and DCNv4, no dense weight.

    out[n, c, y, x] = sum over taps of w[n, g(c), tap, y, x] * sample(input[n, c], position(y, x, g(c), tap)), where
    g(c) = c // (C / G), and samples and positions are those of `deform_conv2d`.

    DCNv3 (Wang et al., CVPR 2023) normalises the weights by "softmax", DCNv4 (Xiong et al., CVPR 2024) not at all.
    Types, gradients and their determinism are those of `deform_conv2d`.

    Args:
        input: [N, C, H, W]; channels_last is the fast path, as for the others.
        offset: [N, 2 * G * kH * kW, Ho, Wo] in pixels: (dy, dx) of each tap, taps line by line. (Their authors' code
            has (dx, dy), and taps column by column.)
        weights: [N, G * kH * kW, Ho, Wo].
        kernel_size: kH and kW; an int or a pair, as the next three.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.
        normalization: of the kH * kW weights of a group and site: None, "softmax", "sigmoid" or "l2".

    Returns:
        [N, C, Ho, Wo] in channels_last.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, value or device.

    Example:
        >>> x, offset, weights = torch.randn(1, 8, 6, 6), torch.zeros(1, 2 * 9, 6, 6), torch.zeros(1, 9, 6, 6)
        >>> y = dynconv.deform_aggregate2d(x, offset, weights, kernel_size=3, padding=1, normalization="softmax")
        >>> torch.allclose(y, nn.functional.avg_pool2d(x, 3, 1, 1), atol=1e-5)  # the same weight for every tap
        True
    """
    check_map(input)
    check_operand("offset", offset, input)
    check_operand("weights", weights, input)
    geometry = _check_offset(input, offset, kernel_size, stride, padding, dilation)
    check_normalization(normalization)
    _check_scales("weights", weights, offset)
    dtype = input.dtype
    input, offset, weights = autocast(input, offset, weights, dtype=torch.float32)
    check_types(input, offset=offset, weights=weights)
    backend = backend_for(input.device)
    weights = _normalized(weights, geometry.kernel[0] * geometry.kernel[1], normalization, backend)
    where = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    if backend == "reference":
        names = ("kernel_size", "stride", "padding", "dilation")
        return reference.deform_aggregate2d(input, offset, weights, **dict(zip(names, where))).to(dtype)
    run = _aggregate_forward if unwatched(input, offset, weights) else torch.ops.dynconv.deform_aggregate2d
    return run(input, offset, weights, *where, backend).to(dtype)


def _normalized(weights: Tensor, taps: int, normalization: str | None, backend: str) -> Tensor:
    """A step of its own: beside four times as many reads of the input, a pass over the weights is little."""
    if normalization is None or weights.numel() == 0:
        return weights
    if backend != "cpu":
        return reference.normalised(weights, taps, normalization)
    # Not PyTorch's: on the CPU its bits depend on where its threads begin.
    run = _normalize if unwatched(weights) else torch.ops.dynconv.normalize_taps
    return run(weights, taps, normalization)


def _check_offset(input, offset, kernel_size, stride, padding, dilation) -> Geometry:
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    size, taps = geometry.output_size(*input.shape[2:]), geometry.kernel[0] * geometry.kernel[1]
    if offset.dim() != 4 or offset.shape[0] != input.shape[0] or tuple(offset.shape[2:]) != size:
        raise ValueError(
            f"offset: expected shape [{input.shape[0]}, G * {2 * taps}, {size[0]}, {size[1]}], got {list(offset.shape)}"
        )
    groups = offset.shape[1] // (2 * taps)
    if groups == 0 or offset.shape[1] % (2 * taps) or input.shape[1] % groups:
        raise ValueError(
            f"offset: expected G * {2 * taps} channels for a G that divides C = {input.shape[1]}, got {offset.shape[1]}"
        )
    for name, sizes in (("input", input.shape), ("offset", offset.shape)):
        check_pixels(name, sizes[0], *sizes[2:])
    return geometry


def _check_scales(name: str, scales: Tensor | None, offset: Tensor) -> None:
    wanted = [offset.shape[0], offset.shape[1] // 2, *offset.shape[2:]]
    if scales is not None and list(scales.shape) != wanted:
        raise ValueError(f"{name}: expected shape {wanted}, got {list(scales.shape)}")
