"""What the published layers cannot be faster than: `dynconv.roofline` for each row of `bench`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import roofline
from ..roofline import Device, Tiles, Work
from .layers import Block, Filter, Layer, Width


@dataclass(frozen=True)
class Estimate:
    """Of one call. `predicted` is the share of the ideal that bytes and tiles leave; None where nothing is skipped.

    In words: what a kernel at the ceilings gains over a dense one at the ceilings, over what the FLOPs allow.
    """

    flops: int
    bytes: int
    floor_ms: float
    limit: str
    tiles: Tiles
    predicted: float | None

    def __str__(self) -> str:
        return f"{self.floor_ms:.3f} {self.limit[0].lower()}"


def estimate(
    layer: Layer | Block | Width | Filter, mask: Tensor | None, mode: str, batch: int, dtype: torch.dtype, on: Device
) -> Estimate:
    """The floor of a layer's call on a device, and what the tiles of the forward leave of it.

    mask: as the layer's `active` makes it; None for a `Filter`, which computes every site.
    """
    make = _WORK[type(layer)]
    sparse, tiles = make(layer, mask, mode, batch, dtype, on)
    floor, predicted = on.floor(sparse, dtype), None
    if mask is not None:
        usual = "plain" if mode == "in-place" else mode
        dense = make(layer, None, usual, batch, dtype, on)
        predicted = on.predicted_share(dense[0], sparse, dtype, dense[1], tiles)
    return Estimate(sparse.flops, sparse.bytes, floor.seconds * 1e3, floor.limit, tiles, predicted)


def together(estimates: list[Estimate]) -> Estimate:
    """Of calls one after the other; nothing is predicted of their ideal."""
    flops, moved, floor = (sum(getattr(e, name) for e in estimates) for name in ("flops", "bytes", "floor_ms"))
    longest = max(estimates, key=lambda e: e.floor_ms)
    return Estimate(flops, moved, floor, longest.limit, roofline.FULL, None)


# Each gives the work and the tiles of a call; without a mask those of the dense one.


def _layer(layer: Layer, mask, mode, batch, dtype, on) -> tuple[Work, Tiles]:
    shapes = (batch, layer.in_channels, layer.height, layer.width), (
        layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel
    )  # fmt: skip
    options = dict(padding=layer.padding, groups=layer.groups, dtype=dtype, mode=mode)
    sites = batch * layer.height * layer.width if mask is None else int(mask.sum())
    tiles = _conv_tiles(sites, layer.in_channels, layer.out_channels, layer.groups, dtype, on)
    return roofline.masked_conv2d(*shapes, mask, **options), tiles


def _conv_tiles(sites: int, channels: int, filters: int, groups: int, dtype: torch.dtype, on: Device) -> Tiles:
    """Of a masked convolution. A stencil has no tiles to fill."""
    if groups == channels > 1:
        return roofline.FULL
    tile = roofline.conv_tile(channels // groups, filters // groups, dtype, on)
    return roofline.fill(sites, filters // groups, tile, on.multiprocessors, groups)


def _block(layer: Block, mask, mode, batch, dtype, on) -> tuple[Work, Tiles]:
    """Fewest bytes: the block's input and output and its weights, as if what lies between stayed in a cache."""
    channels, inner = layer.channels, layer.channels // 4 if layer.kind == "bottleneck" else 6 * layer.channels
    groups = 1 if layer.kind == "bottleneck" else inner
    convs = ((channels, inner, 1, 1), (inner, inner, 3, groups), (inner, channels, 1, 1))
    weights = [cin // g * cout * kernel**2 for cin, cout, kernel, g in convs]
    pixels, element = batch * layer.height * layer.width, dtype.itemsize
    active = reached = pixels
    if mask is not None:
        active, reached = int(mask.sum()), int((F.max_pool2d(mask.float(), 3, 1, 1) > 0).sum())
    sites = reached, active, active
    read, written = (reached, active) if mode == "in-place" else (pixels, pixels)
    flops = 2 * sum(n * w for n, w in zip(sites, weights))
    moved = ((read + written) * channels + sum(weights)) * element + (0 if mask is None else pixels)
    if mode == "backward":  # the gradient and the input again, the gradients of input and weights
        flops, moved = 3 * flops, moved + ((written + read + pixels) * channels + 2 * sum(weights)) * element
    each = [_conv_tiles(n, cin, cout, g, dtype, on) for (cin, cout, _, g), n in zip(convs, sites)]
    asked, computed, waited = (
        sum(n * w / part for n, w, part in zip(sites, weights, parts))
        for parts in ([1.0] * 3, [tiles.filled for tiles in each], [tiles.share for tiles in each])
    )
    return Work(flops, moved), Tiles(asked / computed, computed / waited) if asked else roofline.FULL


def _width(layer: Width, mask, mode, batch, dtype, on) -> tuple[Work, Tiles]:
    ins, outs = (None, None) if mask is None else mask.split([layer.in_channels, layer.out_channels], 1)
    shapes = (batch, layer.in_channels, layer.height, layer.width), (
        layer.out_channels, layer.in_channels, layer.kernel, layer.kernel
    )  # fmt: skip
    work = roofline.gathered_conv2d(*shapes, ins, outs, padding=layer.padding, dtype=dtype, mode=mode)
    if layer.linear and on.architecture == "cpu":  # a kernel of its own, without tiles of rows
        return work, roofline.FULL
    shape = layer.height * layer.width, layer.in_channels, layer.out_channels, layer.granularity
    kept = torch.full((batch,), layer.out_channels) if outs is None else outs.sum(1).cpu()
    sites, tile = torch.full((batch,), shape[0]), roofline.gathered_tile(*shape, dtype, on)
    return work, roofline.fill(sites, kept, tile, on.multiprocessors)


def _filter(layer: Filter, mask, mode, batch, dtype, on) -> tuple[Work, Tiles]:
    input_shape, options = (batch, layer.channels, layer.height, layer.width), dict(dtype=dtype, mode=mode)
    weights = layer.groups * layer.taps
    if layer.offsets:
        shape = (batch, 2 * weights, *layer.size)
        return roofline.deform_aggregate2d(input_shape, shape, kernel_size=layer.kernel, **options), roofline.FULL
    work = roofline.dynamic_filter2d(
        input_shape, (batch, weights, *layer.size), kernel_size=layer.kernel, channel_filters=layer.channel_filters,
        **options,
    )  # fmt: skip
    return work, roofline.FULL


_WORK = {Layer: _layer, Block: _block, Width: _width, Filter: _filter}
