"""What the CPU kernels share: arrays at addresses, rows of channels, and how work is cut."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ._layout import Flag, Storage
from .llvm.build import TILE_VECTORS, VECTOR_BYTES
from .llvm.elements import add_vector, copy_vector, fill_elements, load, pointer, positive, store, transpose_vectors
from .llvm.tiles import ROWS, clamped_tile, multiply_tile

LARGE = 1 << 21  # bytes of an output whose zeros are not worth a place in the cache
SERIAL = 1 << 15  # elements that a second thread has to save before it is worth waking


@njit(inline="always")
def array(address, dtype):
    return carray(pointer(address, dtype), (1 << 40,))  # no length: all offsets are computed


@njit
def copy(source, at, count, target, to, lanes, compute):
    """`count` contiguous elements, widened. Whole vectors explicitly: LLVM's own loop first checks for overlap."""
    whole = count - count % lanes
    for c in range(0, whole, positive(lanes)):
        copy_vector(source, at + c, target, to + c)
    for c in range(whole, count):
        store(target, to + c, load(source, at + c, compute))


@njit
def clear(target, at, count, compute):
    for c in range(count):
        store(target, at + c, compute(0))


@njit
def add(source, at, count, scale, target, to, lanes, compute):
    """target += scale * source over `count` contiguous elements, both in the compute type."""
    whole = count - count % lanes
    for c in range(0, whole, positive(lanes)):
        add_vector(source, at + c, scale, target, to + c)
    for c in range(whole, count):
        store(target, to + c, load(target, to + c, compute) + scale * load(source, at + c, compute))


@njit
def gather_rows(
    source, width, table, has_table, entry, taps, rows, tap_count, channel, channels, groups, target, at, lanes, compute
):
    """target[at:] [group, row, tap, channel] = what `rows` rows read through `tap_count` taps, zeros where that is -1.

    table[entry + r * taps + t] is the row of `source` [., width] for row r and tap t; without a table that is row
    entry + r. Groups of `channels` channels follow each other from the channel `channel` on.
    """
    depth = tap_count * channels
    for r in range(rows):
        first = entry + r * taps
        t = 0
        while t < tap_count:
            pixel, run = np.int64(table[first + t]) if has_table else entry + r, 1
            if channels == width and pixel >= 0:
                # The taps of a kernel's row usually read neighbouring pixels: one copy.
                while t + run < tap_count and table[first + t + run] == pixel + run:
                    run += 1
            for g in range(groups):
                place, size = at + (g * rows + r) * depth + t * channels, run * channels
                if pixel < 0:
                    clear(target, place, size, compute)
                else:
                    copy(source, pixel * width + channel + g * channels, size, target, place, lanes, compute)
            t += run


@njit
def multiply_rows(
    a,
    at,
    row,
    group,
    rows,
    depth,
    accumulate,
    weights,
    weight_at,
    panel_stride,
    group_stride,
    panels,
    groups,
    products,
    products_at,
    width,
    lanes,
):
    """products[r, (g, panel, lane)] (+)= sum over k < depth of a[r, g, k] * weights[g, panel, k, lane].

    a[r, g, k] lies at a[at + r * row + g * group + k]; the strides of the others are given likewise. Up to ROWS - 1
    rows past the last one are read, and written.
    """
    tiles = (panels + TILE_VECTORS - 1) // TILE_VECTORS
    for g in range(groups):
        for tile in range(tiles):
            panel = panels * tile // tiles  # tiles of about the same width
            vectors = panels * (tile + 1) // tiles - panel
            columns = weight_at + g * group_stride + panel * panel_stride
            target = products_at + (g * panels + panel) * lanes
            for r in range(0, rows, ROWS):
                multiply_tile(
                    vectors,
                    a, at + g * group + r * row, row,
                    weights, columns, panel_stride,
                    products, target + r * width, width,
                    depth, accumulate,
                )  # fmt: skip


@njit
def gather_scattered(source, width, channels, table, entry, taps, rows, tap_count, target, at, runs, lanes, compute):
    """`gather_rows` of one group with a table, but for tiles of ROWS rows that read runs of rows through every tap.

    `channels` channels from the beginning of each row of `source` [., width].

    target[runs + tile] becomes 1 for these, where the products may read the source itself, and 0 for the others.
    """
    for first in range(0, rows, ROWS):
        count, is_run = min(ROWS, rows - first), first + ROWS <= rows
        for t in range(tap_count):
            start = table[entry + first * taps + t]
            is_run = is_run and start >= 0
            for r in range(1, count):
                is_run = is_run and table[entry + (first + r) * taps + t] == start + r
        store(target, runs + first // ROWS, compute(is_run))
        if not is_run:
            place = at + first * tap_count * channels
            gather_rows(
                source=source, width=width, table=table, has_table=True, entry=entry + first * taps, taps=taps,
                rows=count, tap_count=tap_count, channel=0, channels=channels, groups=1, target=target, at=place,
                lanes=lanes, compute=compute,
            )  # fmt: skip


@njit
def multiply_scattered(
    source, width, channels, table, entry, taps, rows, tap_count, a, at, runs, accumulate, weights, weight_at,
    panel_stride, panels, products, products_at, product_width, lanes, compute,
):  # fmt: skip
    """`multiply_rows` of one group, of what `gather_scattered` has gathered and what it has left in the source."""
    depth = tap_count * channels
    tiles = (panels + TILE_VECTORS - 1) // TILE_VECTORS
    for tile in range(tiles):
        panel = panels * tile // tiles
        vectors = panels * (tile + 1) // tiles - panel
        columns = weight_at + panel * panel_stride
        for r in range(0, rows, ROWS):
            target = products_at + panel * lanes + r * product_width
            if load(a, runs + r // ROWS, compute) == 0:
                multiply_tile(
                    vectors, a, at + r * depth, depth, weights, columns, panel_stride, products, target, product_width,
                    depth, accumulate,
                )  # fmt: skip
                continue
            first, t = entry + r * taps, 0
            while t < tap_count:
                pixel, run = np.int64(table[first + t]), 1
                while channels == width and t + run < tap_count and table[first + t + run] == pixel + run:
                    run += 1
                multiply_tile(
                    vectors, source, pixel * width, width, weights, columns + t * channels * lanes, panel_stride,
                    products, target, product_width, run * channels, accumulate or t > 0,
                )  # fmt: skip
                t += run


@njit
def clamped_rows(a, at, row, rows, depth, weights, panel_stride, panels, shift, low, high, out, out_at, width, lanes):
    """out[r, (panel, lane)] = the products of one group + shift, no less than low and no more than high.

    Rows of `out` are `width` apart, whole vectors. Up to ROWS - 1 rows past the last one are read, and written.
    """
    tiles = (panels + TILE_VECTORS - 1) // TILE_VECTORS
    for tile in range(tiles):
        panel = panels * tile // tiles
        vectors = panels * (tile + 1) // tiles - panel
        for r in range(0, rows, ROWS):
            clamped_tile(
                vectors,
                a, at + r * row, row,
                weights, panel * panel_stride, panel_stride,
                out, out_at + r * width + panel * lanes, width,
                depth, shift, panel * lanes, low, high,
            )  # fmt: skip


@njit
def pack_panel(weight, source, valid, depth, first, end, packed, at, lanes, compute):
    """The columns k = first..end of `valid` rows of a weight [Cout, depth] as packed[at:] [k, lane], zero-padded.

    `source` is the offset of the first of these rows, no more than `lanes`.
    """
    k = first
    if valid == lanes:
        while k + lanes <= end:
            transpose_vectors(weight, source + k, depth, packed, at + (k - first) * lanes)
            k += lanes
    while k < end:
        target = at + (k - first) * lanes
        for j in range(valid):
            store(packed, target + j, load(weight, source + j * depth + k, compute))
        clear(packed, target + valid, lanes - valid, compute)
        k += 1


@njit
def lower_bound(index, count, value):
    """The first position in index[:count], ascending, whose entry is not below `value`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if index[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


class Window(NamedTuple):
    """A convolution's place: the sizes of the output and of the input, and the geometry."""

    out_height: int
    out_width: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    pad_y: int
    pad_x: int
    dilation_y: int
    dilation_x: int


class Skipped(NamedTuple):
    """The kernels' arguments for the skipped sites of a dense output; see `skipped_sites`."""

    fill: int  # 0: leave them alone, 1: zeros, 2: `inactive`
    inactive: Storage
    all_sites: int
    is_large: Flag  # too large for the cache


@njit
def fill_skipped(skipped, out, index, first, rows, active, channels):
    """Write the skipped sites next to rows first..first + rows of `index`, the first `active` of which count.

    A row answers for the sites between the one before it and itself, the last row for all that follow as well.
    """
    inactive, is_large = skipped.inactive, skipped.is_large
    if skipped.fill == 0:
        return
    at = np.int64(index[first - 1]) + 1 if first > 0 else 0
    for m in range(first, first + rows):
        site = np.int64(index[m])
        if site > at:
            fill_elements(inactive, out, at * channels, site * channels, is_large)
        at = site + 1
    if first + rows == active:
        fill_elements(inactive, out, at * channels, skipped.all_sites * channels, is_large)


def skipped_sites(out: Tensor, inactive: Tensor | None, in_place: bool) -> tuple[int, int, int, bool]:
    """The numbers of `Skipped` for `out`: none are to be filled `in_place` and where it is packed."""
    fill = 0 if in_place or out.dim() == 2 else 1 if inactive is None else 2
    sites = out.numel() // max(1, out.shape[1])
    return fill, address(inactive), sites, out.numel() * out.element_size() > LARGE


def address(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def ceil(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def vector_lanes(dtype: torch.dtype) -> int:
    """The elements of a vector in the type that this storage type is computed in."""
    return VECTOR_BYTES // (8 if dtype == torch.float64 else 4)
