"""Filters that differ from pixel to pixel on the CPU: a stencil that reads each filter once a group of channels.

With p(s, tap) the pixel that site s reads, g(c) the group of channel c, w the normalised filters, v the filters of
the channels (ones where there are none) and n the sample:

    forward         y[s, c] = sum over taps of w[s, g(c), tap] * v[n, tap, c] * x[p(s, tap), c]
    input grad      dx[p, c] = sum over taps and sites s with p(s, tap) = p of w[s, g(c), tap] * v[n, tap, c] * dy[s, c]
    filter grad     dw[s, g, tap] = sum over channels c of g of dy[s, c] * v[n, tap, c] * x[p(s, tap), c]
    channel grad    dv[n, tap, c] = sum over sites s of n of w[s, g(c), tap] * dy[s, c] * x[p(s, tap), c]

The first two are one kernel, over sites or over pixels: rows that share their channels are added up STENCIL_ROWS at a
time, from lists of what each reads. No two threads write the same row, and sums run in an order that the shapes alone
fix.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .._geometry import Geometry
from . import sites as site_tables
from ._common import Skipped, Window, array, ceil, clear, fill_skipped, skipped_sites
from ._layout import Compute, Flag, Int32, Int64, Storage, UInt8
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .llvm.build import STENCIL_ROWS, STENCIL_VECTORS, VECTOR_BYTES
from .llvm.elements import address_of, is_given, store
from .llvm.filters import channel_products, dot_taps, filter_rows
from .llvm.normalizations import NORMALIZATIONS, normalise, normalise_grad

_CHUNKS_PER_THREAD = 8
_STREAMED = 1 << 23  # bytes of an output that are not worth a place in the cache
_BLOCK_SITES = 32  # whose lists of pixels are kept for the gradient of the channels' filters
_PART_SITES = 1024  # that one partial sum of that gradient covers, at least
_MOST_PARTS = 64  # partial sums a sample


@njit(inline="always")
def _locate(row, height, width, line):
    """line[2:] = (sample, y, x) of a row of a grid; line[:2] are where the grid's line that it lies in begins and ends.

    Rows of one line follow each other, and divisions are slow.
    """
    if not line[0] <= row < line[1]:
        number = row // width
        line[0], line[1], line[2] = number * width, (number + 1) * width, number // height
        line[3] = number - line[2] * height
    line[4] = row - line[0]


@njit(inline="always")
def _share(item, parts, starts):
    """The rows begin..end of a piece of work, part of a sample's (of all rows, where `starts` has two entries)."""
    sample, part = item // parts, item % parts
    first, rows = starts[sample], starts[sample + 1] - starts[sample]
    return sample, first + rows * part // parts, first + rows * (part + 1) // parts


@kernel
def _stencil_kernel(
    shared, compute, source: Storage, out: Storage, filters: Storage, channel_filters: Compute, index: Int32,
    inverse: Int32, starts: Int64, items, parts, channels, groups, taps, is_transposed: Flag, normalization,
    is_scratch: Flag, element_size, compute_size, is_streamed: Flag, skipped: Skipped, active, memory: UInt8,
    memory_size, window: Window, scale,
):  # fmt: skip
    """The forward, or (`is_transposed`) the input's gradient, whose source is the output's gradient.

    The filters are in the compute type if they are read as they are: all but those that are normalised here, one row
    of sites at a time (`is_scratch`).
    """
    (site_height, site_width, height, width, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y,
     dilation_x) = window  # fmt: skip
    has_index, has_inverse, has_channel = is_given(index), is_given(inverse), is_given(channel_filters)
    source_at, out_at, filters_at = address_of(source), address_of(out), address_of(filters)
    like = array(filters_at, compute)
    base_height, base_width = site_height // scale, site_width // scale
    reach_y, reach_x = (kernel_height - 1) * dilation_y, (kernel_width - 1) * dilation_x
    row_size, filter_row = channels * element_size, groups * taps
    weight_row = filter_row * compute_size
    # In the caller's memory: Numba would count references to arrays of its own, atomically, at every use.
    entries, at = taps * scale * scale, address_of(memory) + next_worker(shared) * memory_size
    line, place, targets, bases = (
        array(at, np.int64), array(at + 64, np.int64), array(at + 192, np.int64), array(at + 224, np.int64)
    )  # fmt: skip
    at += 288
    pixels, weights = array(at, np.int64), array(at + 8 * STENCIL_ROWS * entries, np.int64)
    at += 16 * STENCIL_ROWS * entries
    pixel_steps, weight_steps, numbers, listed = (
        array(at, np.int64), array(at + 8 * entries, np.int64), array(at + 16 * entries, np.int64),
        array(at + 24 * entries, np.int64),
    )  # fmt: skip
    zeros = at + 32 * entries
    clear(array(zeros, compute), 0, max(channels, filter_row), compute)
    scratch_at = zeros + max(channels, filter_row) * compute_size
    scratch = array(scratch_at, compute)
    for tap in range(taps):
        step = tap // kernel_width * dilation_y * (site_width if is_transposed else width)
        step += tap % kernel_width * dilation_x
        pixel_steps[tap] = -step * row_size if is_transposed else step * row_size
        weight_steps[tap] = tap * compute_size - (step * weight_row if is_transposed else 0)
        numbers[tap] = tap
    # Of a large output: from the first pixel of a row to the last that the next rows read.
    ahead = (STENCIL_ROWS * row_size + (0 if is_transposed else pixel_steps[taps - 1])) if is_streamed else 0
    line[0] = line[1] = 0
    while True:
        item = next_item(shared)
        if item >= items:
            return
        sample, begin, end = _share(item, parts, starts)
        if end > begin:
            fill_skipped(skipped, out, index, begin, end - begin, active, channels)
        of_channels = channel_filters[sample * taps * channels :]
        for first in range(begin, end, STENCIL_ROWS):
            is_direct = not has_inverse and (not is_transposed or (scale == 1 and stride_y == 1 and stride_x == 1))
            for i in range(STENCIL_ROWS):
                row = min(first + i, end - 1)
                site = np.int64(index[row]) if has_index else row
                if is_transposed:
                    _locate(site, height, width, line)
                    y, x = line[3] + pad_y, line[4] + pad_x  # the site of tap (0, 0), a stride not yet undone
                    start = (line[2] * site_height + y) * site_width + x
                    is_direct = is_direct and reach_y <= y < site_height and reach_x <= x < site_width
                    bases[2 * i + 1] = filters_at + start * weight_row
                else:
                    _locate(site, site_height, site_width, line)
                    y, x = line[3] // scale * stride_y - pad_y, line[4] // scale * stride_x - pad_x
                    start = (line[2] * height + y) * width + x
                    is_direct = is_direct and 0 <= y < height - reach_y and 0 <= x < width - reach_x
                    bases[2 * i + 1] = filters_at + site * weight_row
                    if is_scratch:
                        normalise(normalization, filters, site * filter_row, groups, taps, scratch, i * filter_row)
                        bases[2 * i + 1] = scratch_at + i * weight_row
                bases[2 * i], targets[i] = source_at + start * row_size, out_at + site * row_size
                place[3 * i], place[3 * i + 1], place[3 * i + 2] = line[2], y, x
            if is_direct:
                for i in range(STENCIL_ROWS):
                    pixels[i], weights[i] = bases[2 * i], bases[2 * i + 1]
                filter_rows(
                    is_direct=True, has_channel=has_channel, count=taps, pixels=pixels, weights=weights,
                    pixel_steps=pixel_steps, weight_steps=weight_steps, taps=numbers, source=source, like=like,
                    channel_filters=of_channels, channels=channels, groups=groups, group_weights=taps, targets=targets,
                    out=out, ahead=ahead,
                )  # fmt: skip
                continue
            count = 0
            for tap in range(taps):
                tap_y, tap_x = tap // kernel_width * dilation_y, tap % kernel_width * dilation_x
                if not is_transposed:
                    is_read = False
                    for i in range(STENCIL_ROWS):
                        entry = count * STENCIL_ROWS + i
                        y, x = place[3 * i + 1] + tap_y, place[3 * i + 2] + tap_x
                        pixels[entry] = weights[entry] = zeros
                        if 0 <= y < height and 0 <= x < width:
                            pixels[entry] = bases[2 * i] + pixel_steps[tap]
                            weights[entry] = bases[2 * i + 1] + weight_steps[tap]
                            is_read = True
                    listed[count] = tap
                    count += is_read
                    continue
                for part in range(scale * scale):
                    is_read = False
                    for i in range(STENCIL_ROWS):
                        entry = count * STENCIL_ROWS + i
                        y, x = place[3 * i + 1] - tap_y, place[3 * i + 2] - tap_x
                        pixels[entry] = weights[entry] = zeros
                        if y < 0 or x < 0 or y % stride_y != 0 or x % stride_x != 0:
                            continue
                        y, x = y // stride_y, x // stride_x
                        if y >= base_height or x >= base_width:
                            continue
                        y, x = y * scale + part // scale, x * scale + part % scale
                        site = (place[3 * i] * site_height + y) * site_width + x
                        if has_inverse and inverse[site] < 0:
                            continue
                        pixels[entry] = source_at + site * row_size
                        weights[entry] = filters_at + site * weight_row + tap * compute_size
                        is_read = True
                    listed[count] = tap
                    count += is_read
            filter_rows(
                is_direct=False, has_channel=has_channel, count=count, pixels=pixels, weights=weights,
                pixel_steps=pixel_steps, weight_steps=weight_steps, taps=listed, source=source, like=like,
                channel_filters=of_channels, channels=channels, groups=groups, group_weights=taps, targets=targets,
                out=out, ahead=0,
            )  # fmt: skip


@kernel
def _filter_grad_kernel(
    shared, compute, source: Storage, filters: Storage, grad_filters: Storage, normalised: Compute, index: Int32,
    grad: Storage, starts: Int64, items, parts, channels, groups, taps, normalization, element_size, compute_size,
    channel_filters: Compute, channel_sums: Compute, memory: UInt8, memory_size, window: Window, scale,
):  # fmt: skip
    """The gradients of the filters and, item by item, the sums for those of the channels' filters, where given."""
    (site_height, site_width, height, width, _, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y,
     dilation_x) = window  # fmt: skip
    has_channel, wants_filters = is_given(channel_filters), is_given(grad_filters)
    wants_channel, has_index = is_given(channel_sums), is_given(index)
    row_size, filter_row, inner = channels * element_size, groups * taps, channels // groups
    pixels_at = address_of(memory) + next_worker(shared) * memory_size
    line, grads, weights = (
        array(pixels_at, np.int64), array(pixels_at + 64, np.int64), array(pixels_at + 64 + 8 * _BLOCK_SITES, np.int64)
    )  # fmt: skip
    pixels_at += 64 + 16 * _BLOCK_SITES
    zeros = pixels_at + 8 * _BLOCK_SITES * taps
    clear(array(zeros, compute), 0, channels, compute)
    scratch = array(zeros + channels * compute_size, compute)
    line[0] = line[1] = 0
    while True:
        item = next_item(shared)
        if item >= items:
            return
        sample, begin, end = _share(item, parts, starts)
        of_channels = channel_filters[sample * taps * channels :]
        sums = channel_sums[item * taps * channels :]
        for block in range(begin, end, _BLOCK_SITES):
            count = min(_BLOCK_SITES, end - block)
            for j in range(count):
                site = np.int64(index[block + j]) if has_index else block + j
                _locate(site, site_height, site_width, line)
                y, x = line[3] // scale * stride_y - pad_y, line[4] // scale * stride_x - pad_x
                corner = line[2] * height
                pixels = array(pixels_at + 8 * j * taps, np.int64)
                for tap in range(taps):
                    tap_y = y + tap // kernel_width * dilation_y
                    tap_x = x + tap % kernel_width * dilation_x
                    pixels[tap] = zeros
                    if 0 <= tap_y < height and 0 <= tap_x < width:
                        pixels[tap] = address_of(source) + ((corner + tap_y) * width + tap_x) * row_size
                grads[j] = address_of(grad) + site * row_size
                weights[j] = address_of(normalised) + site * filter_row * compute_size
                if not wants_filters:
                    continue
                for group in range(groups):
                    dot_taps(
                        has_channel, taps, pixels, source, grads[j], source, of_channels, group * inner, inner,
                        channels, scratch, group * taps,
                    )  # fmt: skip
                normalise_grad(
                    normalization, scratch, 0, normalised, site * filter_row, filters, site * filter_row, groups, taps
                )
                for k in range(filter_row):
                    store(grad_filters, site * filter_row + k, scratch[k])
            if wants_channel:
                channel_products(
                    count, array(pixels_at, np.int64), taps, source, weights, grads, groups, inner, taps, sums
                )


@kernel
def _normalise_kernel(
    shared,
    filters: Storage,
    out: Compute,
    index: Int32,
    rows,
    groups,
    taps,
    chunk_rows,
    normalization,
    weights: Compute,
):
    """out = the normalised filters or, where `weights` are these, the gradients in it become those of the filters."""
    has_index, is_grad = is_given(index), is_given(weights)
    while True:
        begin = next_item(shared) * chunk_rows
        if begin >= rows:
            return
        for row in range(begin, min(rows, begin + chunk_rows)):
            at = (np.int64(index[row]) if has_index else row) * groups * taps
            if is_grad:
                normalise_grad(normalization, out, at, weights, at, filters, at, groups, taps)
            else:
                normalise(normalization, filters, at, groups, taps, out, at)


def normalized(
    filters: Tensor, taps: int, normalization: str, index: Tensor | None = None, active: int | None = None
) -> Tensor:
    """The normalised filters [N, G * K, Ho, Wo], channels_last, in the compute type: all, or of those listed."""
    out = torch.empty_like(filters, dtype=compute_type(filters.dtype))
    _normalise(filters, out, None, taps, normalization, index, active)
    return out


def normalized_grad_(grads: Tensor, weights: Tensor, filters: Tensor, taps: int, normalization: str) -> None:
    """Turn the gradients of `weights` = normalized(filters), both in the compute type, into those of the filters."""
    _normalise(filters, grads, weights, taps, normalization, None, None)


def _normalise(filters, out, weights, taps, normalization, index, active) -> None:
    if active is None:
        active = filters.shape[0] * filters.shape[2] * filters.shape[3]
    chunk = max(1, ceil(active, _CHUNKS_PER_THREAD * torch.get_num_threads()))
    _normalise_kernel(
        filters.dtype, workers(ceil(active, chunk)), filters=filters, out=out, index=index, rows=active,
        groups=filters.shape[1] // taps, taps=taps, chunk_rows=chunk,
        normalization=NORMALIZATIONS.index(normalization), weights=weights,
    )  # fmt: skip


class Filters:
    """One call's geometry and active sites, and what its kernels share.

    Args:
        input: [N, C, H, W] in channels_last, as `filters` [N, G * K, Ho, Wo].
        channel_filters: [N, C, kH, kW], or None.
        sites: None, or the mask [N, 1, Ho, Wo], index and count of an ActiveSites.
    """

    def __init__(
        self, input: Tensor, filters: Tensor, channel_filters: Tensor | None, sites: list[Tensor] | None,
        geometry: Geometry, scale: int, normalization: str,
    ) -> None:  # fmt: skip
        self.input, self.filters, self.sites = input, filters, sites
        self.dtype, self.compute = input.dtype, compute_type(input.dtype)
        self.samples, self.channels = input.shape[:2]
        self.kernel, self.taps = geometry.kernel, geometry.kernel[0] * geometry.kernel[1]
        self.groups = filters.shape[1] // self.taps
        self.normalization = NORMALIZATIONS.index(normalization)
        self.index = sites[1] if sites else None
        self.active = int(sites[2]) if sites else filters.shape[0] * filters.shape[2] * filters.shape[3]
        self.window = Window(
            *filters.shape[2:], *input.shape[2:], *geometry.kernel, *geometry.stride, *geometry.padding,
            *geometry.dilation,
        )  # fmt: skip
        self.scale = scale
        self.channel_filters = None
        if channel_filters is not None:
            # Taps before channels, as pixels lie.
            self.channel_filters = channel_filters.to(self.compute).flatten(2).transpose(1, 2).contiguous()

    def forward(self, out: Tensor) -> None:
        """Into `out` [N, C, Ho, Wo], channels_last: zeros at the skipped sites."""
        if self.active == 0:
            out.zero_()
            return
        is_scratch = self.normalization != 0 or self.dtype != self.compute
        area = out.shape[2] * out.shape[3]
        self._stencil(self.input, out, self.filters, self.index, None, area, self.active, False, is_scratch)

    def input_grad(self, grad: Tensor, grad_input: Tensor) -> None:
        """Into `grad_input`, like the input, from `grad`, like the output."""
        inverse = site_tables.inverse(self.index, self.sites[2], self.index.numel()) if self.sites else None
        area = grad_input.shape[2] * grad_input.shape[3]
        rows = self.samples * area
        self._stencil(grad, grad_input, self.weights, None, inverse, area, rows, True, False)

    @functools.cached_property
    def weights(self) -> Tensor:
        """The normalised filters in the compute type, at the active sites: made once, the backward reads them often."""
        if self.normalization == 0 and self.dtype == self.compute:
            return self.filters
        return normalized(self.filters, self.taps, NORMALIZATIONS[self.normalization], self.index, self.active)

    def filter_grads(
        self, grad: Tensor, wants_filters: bool, wants_channel: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the filters, zeros at the skipped sites, and of the channels' [N, C, kH, kW]."""
        grad_filters = sums = None
        if wants_filters:
            grad_filters = (torch.zeros_like if self.sites else torch.empty_like)(self.filters)
        area = grad.shape[2] * grad.shape[3]
        if self.channel_filters is not None:
            parts = max(1, min(_MOST_PARTS, ceil(area, _PART_SITES)))
            starts = self._starts(area)
        else:
            parts, starts = _CHUNKS_PER_THREAD * torch.get_num_threads(), torch.tensor([0, self.active])
        items = parts * (len(starts) - 1)
        if wants_channel:
            sums = torch.zeros(items, self.taps, self.channels, dtype=self.compute)
        element, compute = grad.element_size(), self.compute.itemsize
        memory = 64 + 8 * _BLOCK_SITES * (2 + self.taps)
        memory += compute * (self.channels + self.groups * self.taps)
        memory, threads = cache_lines(memory), workers(items)
        scratch = torch.empty(threads * memory, dtype=torch.uint8)
        weights = self.weights if self.normalization or wants_channel else None
        _filter_grad_kernel(
            self.dtype, threads, source=self.input, filters=self.filters, grad_filters=grad_filters,
            normalised=weights, index=self.index, grad=grad, starts=starts, items=items, parts=parts,
            channels=self.channels, groups=self.groups, taps=self.taps, normalization=self.normalization,
            element_size=element, compute_size=compute, channel_filters=self.channel_filters, channel_sums=sums,
            memory=scratch, memory_size=memory, window=self.window, scale=self.scale,
        )  # fmt: skip
        if sums is not None:
            sums = sums.view(self.samples, -1, self.taps, self.channels).sum(1).transpose(1, 2)
            sums = sums.to(self.dtype).contiguous().view(self.samples, self.channels, *self.kernel)
        return grad_filters, sums

    def _starts(self, area: int, is_pixels: bool = False) -> Tensor:
        """int64 [N + 1]: where each sample's rows begin."""
        if not self.sites or is_pixels:
            return torch.arange(self.samples + 1) * area
        counts = self.sites[0].flatten(1).sum(1)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def _stencil(self, source, out, weights, index, inverse, area, rows, is_transposed, is_scratch) -> None:
        parts = _CHUNKS_PER_THREAD * torch.get_num_threads()
        starts = torch.tensor([0, rows]) if self.channel_filters is None else self._starts(area, is_transposed)
        items, threads = parts * (len(starts) - 1), workers(ceil(rows, STENCIL_ROWS))
        element, compute = source.element_size(), self.compute.itemsize
        filter_row, entries = self.groups * self.taps, self.taps * self.scale**2
        memory = 288 + 8 * entries * (2 * STENCIL_ROWS + 4)
        memory += compute * (max(self.channels, filter_row) + STENCIL_ROWS * filter_row * is_scratch + 64)
        memory = cache_lines(memory)
        scratch = torch.empty(threads * memory, dtype=torch.uint8)
        tile = STENCIL_VECTORS * VECTOR_BYTES
        is_streamed = out.numel() * element > _STREAMED and out.data_ptr() % tile == 0
        is_streamed = is_streamed and self.channels // self.groups * element % tile == 0
        _stencil_kernel(
            self.dtype, threads, source=source, out=out, filters=weights, channel_filters=self.channel_filters,
            index=index, inverse=inverse, starts=starts, items=items, parts=parts, channels=self.channels,
            groups=self.groups, taps=self.taps, is_transposed=is_transposed, normalization=self.normalization,
            is_scratch=is_scratch, element_size=element, compute_size=compute, is_streamed=is_streamed,
            skipped=skipped_sites(out, None, self.index is None or is_transposed), active=rows, memory=scratch,
            memory_size=memory, window=self.window, scale=self.scale,
        )  # fmt: skip


def cache_lines(size: int) -> int:
    """In whole cache lines: no two threads write the same one."""
    return ceil(size, 64) * 64
