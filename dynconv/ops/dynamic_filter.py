"""dynamic_filter2d: a filter of its own for every pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .. import reference
from .._arguments import check_pixels
from .._backend import backend_for, module, unwatched
from .._flops import register_flop_formula
from .._geometry import Geometry, IntPair, Padding
from ..channels import check_int
from ..sites import ActiveSites
from ._common import (
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
    sites_of,
)

# `sites`: None (AOTInductor makes that of an empty list), or the mask, index and count of an ActiveSites.
_GEOMETRY = (
    "SymInt[2] size, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int scale_factor, "
    "str normalization, str backend"
)
_OPERANDS = "Tensor input, Tensor filters, Tensor? channel_filters, Tensor[]? sites"
_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(f"dynamic_filter2d({_OPERANDS}, {_GEOMETRY}) -> Tensor")
_library.define(
    f"dynamic_filter2d_backward(Tensor grad, {_OPERANDS}, {_GEOMETRY}, bool[3] wanted) -> "
    "(Tensor input, Tensor filters, Tensor channel_filters)"
)


def _forward(
    input, filters, channel_filters, sites, size, kernel_size, stride, padding, dilation, scale_factor, normalization,
    backend,
) -> Tensor:  # fmt: skip
    out = channels_last((*input.shape[:2], *size), input)
    if out.numel() == 0:
        return out
    input, filters = in_rows(input), in_rows(filters)
    if backend == "triton":
        index = count = None
        if sites:
            out.zero_()
            _, index, count = sites
        module(".kernels.dynamic_filter").forward(
            input, filters, channel_filters, out, index, count, normalization=normalization,
            **_sizes(size, kernel_size, stride, padding, dilation, scale_factor),
        )  # fmt: skip
        return out
    geometry = placed(kernel_size, stride, padding, dilation)
    module(".cpu.dynamic_filter").Filters(
        input, filters, channel_filters, sites, geometry, scale_factor, normalization
    ).forward(out)
    return out


def _backward(
    grad, input, filters, channel_filters, sites, size, kernel_size, stride, padding, dilation, scale_factor,
    normalization, backend, wanted,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [grad.new_empty(0) for _ in wanted]  # not one three times: outputs must not alias
    if input.numel() == 0:
        like = (channels_last(input.shape, input), channels_last(filters.shape, filters), channel_filters)
        return tuple(torch.zeros_like(t) if want else none for t, want, none in zip(like, wanted, grads, strict=True))
    grad, input, filters = in_rows(grad), in_rows(input), in_rows(filters)
    if backend == "triton":
        sizes = _sizes(size, kernel_size, stride, padding, dilation, scale_factor)
        found = _triton_backward(grad, input, filters, channel_filters, sites, sizes, normalization, wanted)
    else:
        geometry = placed(kernel_size, stride, padding, dilation)
        call = module(".cpu.dynamic_filter").Filters(
            input, filters, channel_filters, sites, geometry, scale_factor, normalization
        )
        found = [None, None, None]
        if wanted[0]:
            found[0] = channels_last(input.shape, input)
            call.input_grad(grad, found[0])
        if wanted[1] or wanted[2]:
            found[1:] = call.filter_grads(grad, wanted[1], wanted[2])
    return tuple(none if made is None else made for made, none in zip(found, grads, strict=True))


def _triton_backward(grad, input, filters, channel_filters, sites, sizes, normalization, wanted) -> list[Tensor | None]:
    kernels = module(".kernels.dynamic_filter")
    index = count = inverse = None
    if sites:
        mask, index, count = sites
        inverse = module(".kernels.compaction").inverse_map(index, count, mask.numel())
    taps = sizes["kernel_size"][0] * sizes["kernel_size"][1]
    weights, found = filters, [None, None, None]
    if normalization != "none":
        weights = torch.empty_like(filters, dtype=torch.promote_types(filters.dtype, torch.float32))
        kernels.normalize(
            filters, weights, index, count, groups=filters.shape[1] // taps, taps=taps, normalization=normalization
        )
    if wanted[0]:
        found[0] = channels_last(input.shape, input)
        kernels.input_grad(grad, weights, channel_filters, found[0], inverse, **sizes)
    if wanted[1]:
        found[1] = channels_last(filters.shape, filters)
        if sites:
            found[1].zero_()
        kernels.filter_grad(
            grad, input, weights, filters, channel_filters, found[1], index, count, normalization=normalization, **sizes
        )
    if wanted[2]:
        sums = kernels.channel_grad(grad, input, weights, index, count, **sizes)
        found[2] = sums.to(channel_filters.dtype)
    return found


def _sizes(size, kernel_size, stride, padding, dilation, scale_factor) -> dict:
    """The geometry as the Triton launchers take it."""
    return dict(
        site_size=tuple(size), kernel_size=tuple(kernel_size), stride=tuple(stride), padding=tuple(padding),
        dilation=tuple(dilation), scale_factor=scale_factor,
    )  # fmt: skip


for _key in ("CPU", "CUDA"):
    _library.impl("dynamic_filter2d", _forward, _key)
    _library.impl("dynamic_filter2d_backward", _backward, _key)


@torch.library.register_fake("dynconv::dynamic_filter2d", lib=_library)
def _(input, filters, channel_filters, sites, size, *rest):
    return channels_last((*input.shape[:2], *size), input)


@torch.library.register_fake("dynconv::dynamic_filter2d_backward", lib=_library)
def _(grad, input, filters, channel_filters, *rest):
    wanted = rest[-1]
    return (
        channels_last(input.shape, input) if wanted[0] else grad.new_empty(0),
        channels_last(filters.shape, filters) if wanted[1] else grad.new_empty(0),
        channel_filters.new_empty(channel_filters.shape) if wanted[2] else grad.new_empty(0),
    )


class _DynamicFilter2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, filters, channel_filters, sites, *geometry):
        out = below_autograd("dynamic_filter2d", _forward, input, filters, channel_filters, sites, *geometry)
        ctx.save_for_backward(input, filters, channel_filters, *(sites or ()))
        ctx.geometry = geometry
        return out

    @staticmethod
    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:3])
        operands, sites = ctx.saved_tensors[:3], list(ctx.saved_tensors[3:]) or None
        run = _backward if unwatched(grad, *operands) else torch.ops.dynconv.dynamic_filter2d_backward
        results = run(grad, *operands, sites, *ctx.geometry, wanted)
        grads = [result if want else None for result, want in zip(results, wanted, strict=True)]
        return (*grads, None, *(None,) * len(ctx.geometry))


register_autograd(_library, "dynamic_filter2d", _DynamicFilter2d.apply)
once_differentiable(_library, "dynamic_filter2d")


@register_flop_formula(torch.ops.dynconv.dynamic_filter2d, get_raw=True)
def _forward_flops(input, filters, channel_filters, sites, size, kernel_size, *rest, **unused) -> int:
    return _product_flops(input, channel_filters, sites, size, kernel_size)


@register_flop_formula(torch.ops.dynconv.dynamic_filter2d_backward, get_raw=True)
def _backward_flops(grad, input, filters, channel_filters, sites, size, kernel_size, *rest, **unused) -> int:
    return sum(rest[-1]) * _product_flops(input, channel_filters, sites, size, kernel_size)


def _product_flops(input, channel_filters, sites, size, kernel_size) -> int:
    """2 a channel, active site and tap, 3 with filters of the channels; all sites where the mask is not known."""
    active = input.shape[0] * size[0] * size[1]
    if sites and not (sites[0].is_meta or is_fake(sites[0])):
        active = int(sites[0].sum())
    return (2 if channel_filters is None else 3) * active * input.shape[1] * kernel_size[0] * kernel_size[1]


def dynamic_filter2d(
    input: Tensor,
    filters: Tensor,
    *,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    scale_factor: int = 1,
    normalization: str | None = None,
    channel_filters: Tensor | None = None,
    mask: Tensor | ActiveSites | None = None,
) -> Tensor:
    """Filter every pixel with a filter of its own, shared by the channels of a group.

    out[n, c, y, x] = sum over taps of w[n, g(c), tap, y, x] * v[n, c, tap] * input[n, c, pixel(y, x, tap)], where w are
    the normalised `filters`, g(c) = c // (C / G), v the `channel_filters` (1 without them), and a site reads, by the
    tap (ky, kx), the pixel (y // scale_factor * stride - padding + ky * dilation, likewise x): zeros outside of the
    input.

    One op for dynamic filter and kernel prediction networks (Jia et al., NeurIPS 2016; Mildenhall et al., CVPR 2018),
    with G = 1; involution (Li et al., CVPR 2021); CARAFE's upsampling (Wang et al., ICCV 2019), `scale_factor` above 1
    and "softmax"; decoupled dynamic filters (Zhou et al., CVPR 2021) with `channel_filters`; pixel-adaptive convolution
    (Su et al., CVPR 2019). Every filter is read once for each group and nothing is unfolded: the forward needs no
    memory beside its operands and result, where `F.unfold` needs kH * kW times the input.

    float32, float64, float16 and bfloat16; half types accumulate in float32. The same input gives the same bits.
    Differentiable once, in `input`, `filters`, `channel_filters` and a floating mask. What only skipped sites read, and
    their filters, is not read: NaN or Inf there reaches neither the output nor a gradient.

    Args:
        input: [N, C, H, W]; channels_last is the fast path, anything else is copied first.
        filters: [N, G * kH * kW, Ho, Wo], the groups' filters one after the other, taps line by line; any G that
            divides C. channels_last, as a convolution with channels_last inputs makes them, is the fast path.
        kernel_size: kH and kW; an int or a pair, as the next three.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`, "same" and "valid" included.
        scale_factor: an int of at least 1; (Ho, Wo) is that many times the size of a convolution's output.
        normalization: of the kH * kW weights of each filter: None, "softmax", "sigmoid", or "l2" (by
            max(norm, 1e-12), as `F.normalize`). Weights of taps outside of the input take part.
        channel_filters: [N, C, kH, kW], a second filter for each channel of each sample, the same at all sites.
        mask: bool, broadcastable to [N, 1, Ho, Wo], or `ActiveSites`: the sites to compute, the others become zeros. A
            floating mask is a gate: its value multiplies the output, and it gets a gradient at the active sites.

    Returns:
        [N, C, Ho, Wo] in channels_last.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, value or device.

    Example:
        >>> x, filters = torch.randn(1, 8, 6, 6), torch.zeros(1, 2 * 9, 6, 6)  # two groups of 4 channels
        >>> y = dynconv.dynamic_filter2d(x, filters, kernel_size=3, padding=1, normalization="softmax")
        >>> torch.allclose(y, nn.functional.avg_pool2d(x, 3, 1, 1), atol=1e-5)  # the same weight for every tap
        True
    """
    scale_factor = check_int("scale_factor", scale_factor)
    geometry, size = _check(input, filters, channel_filters, kernel_size, stride, padding, dilation, scale_factor)
    check_normalization(normalization)
    input, filters, channel_filters = autocast(input, filters, channel_filters)
    check_types(input, filters=filters, channel_filters=channel_filters)
    sites = None if mask is None else sites_of(mask, (input.shape[0], *size), input)
    backend = backend_for(input.device)
    if backend == "reference":
        return reference.dynamic_filter2d(
            input, filters, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation,
            scale_factor=scale_factor, normalization=normalization,
            channel_filters=channel_filters, mask=sites,
        )  # fmt: skip
    listed = None if sites is None else [sites.mask, sites.index, sites.count]
    run = _forward if unwatched(input, filters, channel_filters) else torch.ops.dynconv.dynamic_filter2d
    result = run(
        input, filters, channel_filters, listed, size, geometry.kernel, geometry.stride, geometry.padding,
        geometry.dilation, scale_factor, normalization or "none", backend,
    )  # fmt: skip
    if sites is not None and sites.gate is not None:
        # At the skipped sites both factors are zero.
        result = in_rows((result * sites.gate).to(result.dtype))
    return result


def _check(
    input, filters, channel_filters, kernel_size, stride, padding, dilation, scale_factor
) -> tuple[Geometry, tuple[int, int]]:
    """The geometry and (Ho, Wo)."""
    check_map(input)
    check_operand("filters", filters, input)
    if channel_filters is not None:
        check_operand("channel_filters", channel_filters, input)
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    height, width = geometry.output_size(*input.shape[2:])
    size = (height * scale_factor, width * scale_factor)
    taps = geometry.kernel[0] * geometry.kernel[1]
    if filters.dim() != 4 or filters.shape[0] != input.shape[0] or tuple(filters.shape[2:]) != size:
        raise ValueError(
            f"filters: expected shape [{input.shape[0]}, G * {taps}, {size[0]}, {size[1]}], got {list(filters.shape)}"
        )
    if filters.shape[1] == 0 or filters.shape[1] % taps or input.shape[1] % (filters.shape[1] // taps):
        raise ValueError(
            f"filters: expected G * {taps} channels for a G that divides C = {input.shape[1]}, got {filters.shape[1]}"
        )
    wanted = (*input.shape[:2], *geometry.kernel)
    if channel_filters is not None and channel_filters.shape != wanted:
        raise ValueError(f"channel_filters: expected shape {list(wanted)}, got {list(channel_filters.shape)}")
    check_pixels("input", input.shape[0], *input.shape[2:])
    check_pixels("filters", input.shape[0], *size)
    return geometry, size
