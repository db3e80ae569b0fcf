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
    """Of one call. `predicted` is the share of the ideal that bytes and tiles leave; None where nothing is skipped."""

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
    dense, sparse, tiles = _WORK[type(layer)](layer, mask, mode, batch, dtype, on)
    floor = on.floor(sparse, dtype)
    predicted = None if dense is None else on.predicted_share(dense, sparse, dtype, tiles)
    return Estimate(sparse.flops, sparse.bytes, floor.seconds * 1e3, floor.limit, tiles, predicted)


def together(estimates: list[Estimate]) -> Estimate:
    """Of calls one after the other; nothing is predicted of their ideal."""
    flops, moved, floor = (sum(getattr(e, name) for e in estimates) for name in ("flops", "bytes", "floor_ms"))
    longest = max(estimates, key=lambda e: e.floor_ms)
    return Estimate(flops, moved, floor, longest.limit, roofline.FULL, None)


def _layer(layer: Layer, mask, mode, batch, dtype, on) -> tuple[Work, Work, Tiles]:
    shapes = (batch, layer.in_channels, layer.height, layer.width), (
        layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel
    )  # fmt: skip
    options = dict(padding=layer.padding, groups=layer.groups, dtype=dtype)
    dense = roofline.masked_conv2d(*shapes, **options, mode="backward" if mode == "backward" else "plain")
    sparse = roofline.masked_conv2d(*shapes, mask, **options, mode=mode)
    tiles = _conv_tiles(int(mask.sum()), layer.in_channels, layer.out_channels, layer.groups, dtype, on)
    return dense, sparse, tiles


def _conv_tiles(sites: int, channels: int, filters: int, groups: int, dtype: torch.dtype, on: Device) -> Tiles:
    """Of a masked convolution. A stencil has no tiles to fill."""
    if groups == channels > 1:
        return roofline.FULL
    tile = roofline.conv_tile(channels // groups, filters // groups, dtype, on)
    return roofline.fill(sites, filters // groups, tile, on.multiprocessors, groups)


def _block(layer: Block, mask, mode, batch, dtype, on) -> tuple[Work, Work, Tiles]:
    """Fewest bytes: the block's input and output and its weights, as if what lies between stayed in a cache."""
    channels, inner = layer.channels, layer.channels // 4 if layer.kind == "bottleneck" else 6 * layer.channels
    groups = 1 if layer.kind == "bottleneck" else inner
    convs = ((channels, inner, 1, 1), (inner, inner, 3, groups), (inner, channels, 1, 1))
    weights = [cin // g * cout * kernel**2 for cin, cout, kernel, g in convs]
    active = int(mask.sum())
    reached = int((F.max_pool2d(mask.float(), 3, 1, 1) > 0).sum())
    sites, pixels, element = (reached, active, active), mask.numel(), dtype.itemsize
    in_place, backward = mode == "in-place", mode == "backward"

    def work(of_each, read, written, listed) -> Work:
        flops = 2 * sum(n * w for n, w in zip(of_each, weights))
        moved = (read + written) * channels * element + sum(weights) * element + listed
        if backward:  # the gradient and the input again, the gradients of input and weights
            flops, moved = 3 * flops, moved + ((written + read + pixels) * channels + 2 * sum(weights)) * element
        return Work(flops, moved)

    dense = work((pixels,) * 3, pixels, pixels, 0)
    sparse = work(sites, reached if in_place else pixels, active if in_place else pixels, pixels)
    tiles, computed = roofline.FULL, 0.0
    for (cin, cout, _, g), n, weight in zip(convs, sites, weights):
        computed += n * weight / _conv_tiles(n, cin, cout, g, dtype, on).share
    if computed:
        tiles = Tiles(filled=sum(n * w for n, w in zip(sites, weights)) / computed)
    return dense, sparse, tiles


def _width(layer: Width, mask, mode, batch, dtype, on) -> tuple[Work, Work, Tiles]:
    ins, outs = mask[:, : layer.in_channels], mask[:, layer.in_channels :]
    shapes = (batch, layer.in_channels, layer.height, layer.width), (
        layer.out_channels, layer.in_channels, layer.kernel, layer.kernel
    )  # fmt: skip
    options = dict(padding=layer.padding, dtype=dtype, mode=mode)
    dense = roofline.gathered_conv2d(*shapes, **options)
    sparse = roofline.gathered_conv2d(*shapes, ins, outs, **options)
    sites, kept = torch.full((batch,), layer.height * layer.width), outs.sum(1).cpu()
    shape = layer.height * layer.width, layer.in_channels, layer.out_channels, layer.granularity
    tile = roofline.gathered_tile(*shape, dtype, on)
    return dense, sparse, roofline.fill(sites, kept, tile, on.multiprocessors)


def _filter(layer: Filter, mask, mode, batch, dtype, on) -> tuple[None, Work, Tiles]:
    input_shape, options = (batch, layer.channels, layer.height, layer.width), dict(dtype=dtype, mode=mode)
    weights = layer.groups * layer.taps
    if layer.offsets:
        shape = (batch, 2 * weights, *layer.size)
        return None, roofline.deform_aggregate2d(input_shape, shape, kernel_size=layer.kernel, **options), roofline.FULL
    work = roofline.dynamic_filter2d(
        input_shape, (batch, weights, *layer.size), kernel_size=layer.kernel, channel_filters=layer.channel_filters,
        **options,
    )  # fmt: skip
    return None, work, roofline.FULL


_WORK = {Layer: _layer, Block: _block, Width: _width, Filter: _filter}
