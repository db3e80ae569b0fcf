"""The oracle: every op in its plainest dense form, same signature. What all backends must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._geometry import Geometry, IntPair, Padding
from .channels import ActiveChannels
from .packed import PackedChannels, PackedFeatures
from .sites import ActiveSites

__all__ = [
    "deform_aggregate2d",
    "deform_conv2d",
    "dynamic_filter2d",
    "gathered_conv2d",
    "gathered_linear",
    "masked_conv2d",
]

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


def masked_conv2d(
    input: Tensor | PackedFeatures,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    mask: Tensor | ActiveSites | None = None,
    activation: str | None = None,
    residual: Tensor | PackedFeatures | None = None,
    inactive: Tensor | float | None = None,
    out: Tensor | None = None,
    packed: bool = False,
) -> Tensor | PackedFeatures:
    """Compute where(mask, activation(gate * conv2d(input) + residual), inactive); see `dynconv.masked_conv2d`."""
    input = _dense(input)
    geometry = Geometry.of(tuple(weight.shape[2:]), stride, padding, dilation)
    size = geometry.output_size(*input.shape[2:])
    sites = gate = None
    active = read = input.new_ones((), dtype=torch.bool)
    if mask is not None:
        sites = mask if isinstance(mask, ActiveSites) else ActiveSites(mask, (input.shape[0], *size))
        active, gate = sites.mask, sites.gate
        # A skipped pixel may hold anything, and 0 * NaN is NaN in the weight's gradient.
        read = sites.touched(tuple(input.shape[2:]), tuple(weight.shape[2:]), stride, padding, dilation).mask
    (top, left), (bottom, right) = geometry.padding, geometry.padding_end
    padded = F.pad(torch.where(read, input, 0), (left, right, top, bottom))
    result = F.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, groups)
    return _finish(result, active, gate, activation, residual, inactive, out, sites if packed else None)


def gathered_conv2d(
    input: Tensor | PackedChannels,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    in_mask: Tensor | ActiveChannels | None = None,
    out_mask: Tensor | ActiveChannels | None = None,
    mask: Tensor | ActiveSites | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inactive: Tensor | float | None = None,
    packed: bool = False,
) -> Tensor | PackedChannels:
    """Compute where(mask, activation(kept + residual), inactive), see `dynconv.gathered_conv2d`.

    kept = where(out_mask, out_gate * gate * conv2d(where(in_mask, in_gate * input, 0)), 0)
    """
    geometry = Geometry.of(tuple(weight.shape[2:]), stride, padding, dilation)
    size = geometry.output_size(*input.shape[2:])
    features = unpack_channels(input) if isinstance(input, PackedChannels) else input
    active = None
    if mask is not None:
        sites = mask if isinstance(mask, ActiveSites) else ActiveSites(mask, (input.shape[0], *size))
        active, gate = sites.mask, sites.gate
        read = sites.touched(tuple(input.shape[2:]), tuple(weight.shape[2:]), stride, padding, dilation).mask
        features = torch.where(read, features, 0)
    if not isinstance(input, PackedChannels):
        features = _keep(features, in_mask)
    (top, left), (bottom, right) = geometry.padding, geometry.padding_end
    padded = F.pad(features, (left, right, top, bottom))
    result = F.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, groups)
    result = _keep(result, out_mask)
    if active is not None and gate is not None:
        result = (result * torch.where(active, gate, 0)).to(result.dtype)
    if residual is not None:
        result = result + (residual if active is None else torch.where(active, residual, 0))
    result = ACTIVATIONS[activation](result)
    if active is not None:
        result = torch.where(active, result, 0 if inactive is None else inactive)
    if packed:
        size = tuple(result.shape[:2])
        if out_mask is None:
            out_mask = ActiveChannels._all(size, result.device)
        return pack_channels(
            result, out_mask if isinstance(out_mask, ActiveChannels) else ActiveChannels(out_mask, size)
        )
    return result.contiguous(memory_format=torch.channels_last)


NORMALIZATIONS = {
    "none": lambda filters, dim: filters,
    "softmax": F.softmax,
    "sigmoid": lambda filters, dim: filters.sigmoid(),
    "l2": lambda filters, dim: F.normalize(filters, dim=dim),
}


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
    """Compute (unfold(input) * channel_filters * normalised filters).sum(taps), see `dynconv.dynamic_filter2d`."""
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    (samples, channels, *area), taps = input.shape, geometry.kernel[0] * geometry.kernel[1]
    height, width = (length * scale_factor for length in geometry.output_size(*area))
    gate = None
    if mask is not None:
        sites = mask if isinstance(mask, ActiveSites) else ActiveSites(mask, (samples, height, width))
        # A site of the unfolded input is read where any of the sites that it becomes is active.
        coarse = F.max_pool2d(sites.mask.to(input.dtype), scale_factor) > 0
        read = ActiveSites(coarse)._touched_by(tuple(area), geometry)
        input, filters = torch.where(read.mask, input, 0), torch.where(sites.mask, filters, 0)
        gate = sites.mask if sites.gate is None else sites.gate
    (top, left), (bottom, right) = geometry.padding, geometry.padding_end
    padded = F.pad(input, (left, right, top, bottom))
    columns = F.unfold(padded, geometry.kernel, geometry.dilation, 0, geometry.stride)
    columns = columns.view(samples, channels, taps, height // scale_factor, width // scale_factor)
    columns = columns.repeat_interleave(scale_factor, 3).repeat_interleave(scale_factor, 4)
    if channel_filters is not None:
        columns = columns * channel_filters.reshape(samples, channels, taps, 1, 1)
    groups = filters.shape[1] // taps
    weights = filters.reshape(samples, groups, taps, height, width)
    weights = _normalized(weights, normalization)
    columns = columns.reshape(samples, groups, channels // groups, taps, height, width)
    result = (columns * weights.unsqueeze(2)).sum(3).reshape(samples, channels, height, width)
    if mask is not None:
        result = torch.where(sites.mask, result * gate, 0).to(result.dtype)
    return result.contiguous(memory_format=torch.channels_last)


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
    """Compute mask * sampled columns @ weight + bias, see `dynconv.deform_conv2d`."""
    dtype = input.dtype
    input, offset, weight, bias, mask = map(_wide, (input, offset, weight, bias, mask))
    columns = _sample(input, offset, Geometry.of(tuple(weight.shape[2:]), stride, padding, dilation))
    if mask is not None:
        taps = columns.shape[3]
        columns = columns * mask.unflatten(1, (mask.shape[1] // taps, taps)).unsqueeze(2)
    samples, area = input.shape[0], offset.shape[2:]
    groups = input.shape[1] // weight.shape[1]
    columns = columns.reshape(samples, groups, weight.shape[1] * columns.shape[3], area[0] * area[1])
    kernels = weight.reshape(groups, weight.shape[0] // groups, columns.shape[2])
    result = (kernels @ columns).reshape(samples, weight.shape[0], *area)
    result = result if bias is None else result + bias.view(1, -1, 1, 1)
    return result.to(dtype).contiguous(memory_format=torch.channels_last)


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
    """Compute (weights * sampled columns).sum(taps), see `dynconv.deform_aggregate2d`."""
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    columns = _sample(_wide(input), _wide(offset), geometry)
    weights = _wide(normalised(weights, columns.shape[3], normalization)).unflatten(1, (columns.shape[1], -1))
    result = (columns * weights.unsqueeze(2)).sum(3).to(input.dtype)
    return result.flatten(1, 2).contiguous(memory_format=torch.channels_last)


def normalised(weights: Tensor, taps: int, normalization: str | None) -> Tensor:
    """Weights [N, G * taps, H, W] with the taps of each group normalised."""
    return _normalized(weights.unflatten(1, (weights.shape[1] // taps, taps)), normalization).flatten(1, 2)


def _normalized(weights: Tensor, normalization: str | None) -> Tensor:
    """Over the taps, dimension 2; half types in float32, where the squares of "l2" do not overflow."""
    return NORMALIZATIONS[normalization or "none"](_wide(weights), dim=2).to(weights.dtype)


def _wide(tensor: Tensor | None) -> Tensor | None:
    """In the type that the ops compute in."""
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _complement(share: Tensor) -> Tensor:
    return 1 - share


def _sample(input: Tensor, offset: Tensor, geometry: Geometry) -> Tensor:
    """[N, G, C / G, taps, Ho, Wo]: the input between its pixels; zero outside, and where a position is not finite."""
    (samples, channels, height, width), taps = input.shape, geometry.kernel[0] * geometry.kernel[1]
    groups, area = offset.shape[1] // (2 * taps), offset.shape[2:]
    if height * width == 0:
        return input.new_zeros(samples, groups, channels // groups, taps, *area)
    steps = offset.unflatten(1, (groups, taps, 2))
    places = []
    for axis in range(2):
        site = torch.arange(area[axis], device=input.device) * geometry.stride[axis] - geometry.padding[axis]
        tap = torch.arange(geometry.kernel[axis], device=input.device) * geometry.dilation[axis]
        tap = tap.repeat_interleave(geometry.kernel[1]) if axis == 0 else tap.repeat(geometry.kernel[0])
        site = site.view(-1, 1) if axis == 0 else site.view(1, -1)
        places.append((site + tap.view(-1, 1, 1)).to(offset.dtype) + steps[:, :, :, axis])
    y, x = places  # [N, G, taps, Ho, Wo]
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    pixels = input.reshape(samples, groups, channels // groups, height * width)
    total = 0
    for down in (0, 1):
        for right in (0, 1):
            row, column = top + down, left + right
            # On a pixel the slope is that towards the next one.
            share = (y - top if down else _complement(y - top)) * (x - left if right else _complement(x - left))
            valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(valid, row.long() * width + column.long(), 0).flatten(2).unsqueeze(2)
            found = pixels.gather(3, index.expand(-1, -1, channels // groups, -1))
            found = found.unflatten(3, (taps, *area))
            total = total + torch.where(valid.unsqueeze(2), found * share.unsqueeze(2), 0)
    return total


def gathered_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_mask: Tensor | ActiveChannels | None = None,
    out_mask: Tensor | ActiveChannels | None = None,
) -> Tensor:
    """Compute where(out_mask, out_gate * linear(where(in_mask, in_gate * input, 0)), 0).

    See `dynconv.gathered_linear`.
    """
    result = F.linear(_keep(input.movedim(-1, 1), in_mask).movedim(1, -1), weight, bias)
    return _keep(result.movedim(-1, 1), out_mask).movedim(1, -1).contiguous()


def _keep(input: Tensor, mask: Tensor | ActiveChannels | None) -> Tensor:
    """The kept channels, dimension 1, times their gates, among zeros."""
    if mask is None:
        return input
    channels = mask if isinstance(mask, ActiveChannels) else ActiveChannels(mask, tuple(input.shape[:2]))
    shape = (*channels.shape, *(1,) * (input.dim() - 2))
    kept = torch.where(channels.mask.view(shape), input, 0)
    return kept if channels.gate is None else (kept * channels.gate.reshape(shape)).to(input.dtype)


def pack_channels(input: Tensor, channels: ActiveChannels) -> PackedChannels:
    """The kept channels of each sample, in the order of `channels.index`; zeros past them."""
    index = channels.index[:, : channels.capacity, None, None]
    kept = input.gather(1, index.clamp(min=0).long().expand(-1, -1, *input.shape[2:]))
    kept = torch.where(index >= 0, kept, 0).contiguous(memory_format=torch.channels_last)
    return PackedChannels(kept, channels.ungated)


def unpack_channels(features: PackedChannels) -> Tensor:
    """The dense features, among zeros."""
    rows, place = features.features, features.channels.inverse[:, :, None, None]
    # Whatever is not kept reads a channel of zeros.
    place = torch.where(place >= 0, place, rows.shape[1]).long().expand(-1, -1, *rows.shape[2:])
    return F.pad(rows, (0, 0, 0, 0, 0, 1)).gather(1, place).contiguous(memory_format=torch.channels_last)


def epilogue(
    features: PackedFeatures,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | PackedFeatures | None = None,
    inactive: Tensor | float | None = None,
    out: Tensor | None = None,
    packed: bool = False,
) -> Tensor | PackedFeatures:
    """where(active, activation(gate * ((features - mean) * scale + shift) + residual), inactive)."""
    result, sites = _dense(features), features.sites
    wide = torch.promote_types(result.dtype, torch.float32)
    vectors = [default if v is None else v.view(1, -1, 1, 1) for v, default in zip((mean, scale, shift), (0, 1, 0))]
    result = ((result.to(wide) - vectors[0]) * vectors[1] + vectors[2]).to(result.dtype)
    return _finish(result, sites.mask, sites.gate, activation, residual, inactive, out, sites if packed else None)


def batch_norm(
    features: PackedFeatures,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **finish,
) -> tuple[Tensor | PackedFeatures, Tensor, Tensor]:
    """The epilogue of features normalised over the active sites, and their mean and biased variance, zeros for none."""
    rows, active = features.rows, features.sites.mask.flatten()
    wide = _dense(features).permute(0, 2, 3, 1).flatten(0, 2).to(torch.promote_types(rows.dtype, torch.float32))
    count = active.sum().clamp(min=1)
    mean = wide.sum(0) / count
    variance = torch.where(active[:, None], (wide - mean) ** 2, 0).sum(0) / count
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return epilogue(features, mean=mean, scale=scale, shift=bias, **finish), mean.detach(), variance.detach()


def pack(input: Tensor, sites: ActiveSites) -> PackedFeatures:
    """The rows at the active sites, in the order of `sites.index`; zeros past them."""
    rows = input.permute(0, 2, 3, 1).flatten(0, 2)
    place = torch.arange(rows.shape[0], device=input.device)
    listed = place < sites.count
    index = torch.where(listed, sites.index.long(), 0)
    return PackedFeatures(torch.where(listed[:, None], rows[index], 0), sites)


def _dense(features: Tensor | PackedFeatures | None) -> Tensor | None:
    """Packed features spread out among zeros; anything else as it is."""
    if not isinstance(features, PackedFeatures):
        return features
    rows, sites = features
    n, channels, height, width = features.shape
    active = sites.mask.flatten()
    place = torch.where(active, active.cumsum(0) - 1, 0)
    if rows.shape[0] == 0:  # a row to read, so that the result stays in the graph
        rows = F.pad(rows, (0, 0, 0, 1))
    dense = torch.where(active[:, None], rows[place], 0)
    return dense.view(n, height, width, channels).permute(0, 3, 1, 2)


def _finish(result, active, gate, activation, residual, inactive, out, packed_for) -> Tensor | PackedFeatures:
    if gate is not None:
        # Half types compute in float32, and so does the gate's product.
        result = (result * torch.where(active, gate, 0)).to(result.dtype)
    if residual is not None:
        # Whatever a skipped residual holds, it must not reach the activation's gradient.
        result = result + torch.where(active, _dense(residual), 0)
    result = ACTIVATIONS[activation](result)
    if packed_for is not None:
        return pack(torch.where(active, result, 0), packed_for)
    if out is not None:
        return out.copy_(torch.where(active, result, out))
    result = torch.where(active, result, 0 if inactive is None else inactive)
    return result.contiguous(memory_format=torch.channels_last) if active.dim() else result
