"""Deformable convolution and aggregation on the CPU: taps that sample the input between its pixels.

With position(s, o, tap) where site s samples by a tap for the offset group o, and the four pixels p around it,

    share(p)        (1 - |y - py|) * (1 - |x - px|), zero for pixels outside of the input
    column[s, tap]  = scale[s, o, tap] * sum over p of share(p) * x[p], of which the channels of o
    aggregation     y[s] = sum over taps of column[s, tap]
    convolution     y[s] = sum over taps of column[s, tap] @ weight[tap]: a 1x1 convolution of the columns

The columns are made for some sites at a time, never for all: kH * kW times the input. The gradients of what is sampled
come from the rows r[s, tap], the gradients of the columns (of an aggregation those of y, the same for every tap):

    input           dx[p] += scale * share(p) * r[s, tap]
    scale, offset   from the four dots of x[p] with r[s, tap]

The first is a scatter: a thread adds up one slice of the channels of one sample, site by site, so that no two threads
write the same element and the order is always the same.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .._geometry import Geometry
from . import masked_conv
from ._common import add, address, array, ceil, clear, vector_lanes
from ._llvm import ROWS as TILE_ROWS
from ._llvm import fetch_add, load, store
from ._threads import compute_type, kernel, workers
from .dynamic_filter import ROWS, cache_lines, dot_taps, filter_rows

_CHUNKS_PER_THREAD = 8
_COLUMNS_BYTES = 1 << 21  # of the columns that are made at a time: they are read again at once, from the cache
_SLICE = 16  # channels that a thread adds up at a time
_CORNERS = 4


@njit(inline="always")
def _locate_taps(a, offsets, site, group, place, pixels, shares, slopes, compute):
    """What the taps of a site sample: of the tap t and corner k the pixel's row in pixels[4 * t + k], or -1 outside of
    the input, and its share in shares[4 * t + k]; the slopes of the shares down and to the right are
    slopes[8 * t + k] and slopes[8 * t + 4 + k].

    place: the sample, and where the tap (0, 0) lies without an offset.
    """
    height, width, taps, kernel_width = a[32], a[33], a[13], a[35]
    dilation_y, dilation_x, groups = a[40], a[41], a[12]
    at = (site * groups + group) * taps * 2
    for tap in range(taps):
        y = compute(place[1] + tap // kernel_width * dilation_y) + load(offsets, at + 2 * tap, compute)
        x = compute(place[2] + tap % kernel_width * dilation_x) + load(offsets, at + 2 * tap + 1, compute)
        first = _CORNERS * tap
        # False for NaN.
        if y > -1 and y < height and x > -1 and x < width:
            top, left = np.floor(y), np.floor(x)
            below, right = y - top, x - left
            above, before = compute(1) - below, compute(1) - right
            row, column = np.int64(top), np.int64(left)
            start = (place[0] * height + row) * width + column
            is_top, is_bottom, is_left, is_right = row >= 0, row + 1 < height, column >= 0, column + 1 < width
            pixels[first] = start if is_top and is_left else -1
            pixels[first + 1] = start + 1 if is_top and is_right else -1
            pixels[first + 2] = start + width if is_bottom and is_left else -1
            pixels[first + 3] = start + width + 1 if is_bottom and is_right else -1
            shares[first], shares[first + 1] = above * before, above * right
            shares[first + 2], shares[first + 3] = below * before, below * right
            slope = 2 * first
            slopes[slope], slopes[slope + 1], slopes[slope + 2], slopes[slope + 3] = -before, -right, before, right
            slopes[slope + 4], slopes[slope + 5], slopes[slope + 6], slopes[slope + 7] = -above, above, -below, below
        else:
            for k in range(_CORNERS):
                pixels[first + k], shares[first + k] = -1, compute(0)
                slopes[2 * first + k] = slopes[2 * first + 4 + k] = compute(0)


@njit(inline="always")
def _locate_site(a, site, place):
    """place = the sample of a site, and the line and column of its tap (0, 0)."""
    line = site // a[31]
    place[0] = line // a[30]
    place[1] = (line - place[0] * a[30]) * a[36] - a[38]
    place[2] = (site - line * a[31]) * a[37] - a[39]


@njit(inline="always")
def _scale(a, scales, site, group, tap, compute):
    """1 without a mask."""
    if a[6] == 0:
        return compute(1)
    return load(scales, (site * a[12] + group) * a[13] + tap, compute)


@njit
def _sample_kernel(arguments, storage, compute):
    """The columns of the sites begin..end, or their sums over the taps."""
    a = carray(arguments, (64,))
    source, like, sums = array(a[2], storage), array(a[2], compute), array(a[4], storage)
    columns, offsets, scales = array(a[3], compute), array(a[5], storage), array(a[6], storage)
    begin, end, chunk, channels, groups, taps = a[8], a[9], a[10], a[11], a[12], a[13]
    is_sum, size, compute_size, inner, entries = a[4] != 0, a[16], a[17], channels // groups, _CORNERS * taps
    memory = a[26] + fetch_add(a[1:], 1) * a[27]
    place, targets, found = array(memory, np.int64), array(memory + 32, np.int64), array(memory + 64, np.int64)
    pixels_at = memory + 64 + 8 * entries
    weights_at = pixels_at + 8 * ROWS * entries
    factors_at = weights_at + 8 * ROWS * entries
    shares_at = factors_at + compute_size * ROWS * entries
    zeros = shares_at + 3 * compute_size * entries
    pixels, weights, factors = array(pixels_at, np.int64), array(weights_at, np.int64), array(factors_at, compute)
    shares, slopes = array(shares_at, compute), array(shares_at + compute_size * entries, compute)
    clear(array(zeros, compute), 0, channels, compute)
    rows = ROWS if is_sum else 1
    while True:
        first_site = begin + fetch_add(a, 1) * chunk
        if first_site >= end:
            return
        last_site = min(end, first_site + chunk)
        for first in range(first_site, last_site, rows):
            for group in range(groups):
                shift = group * inner
                for i in range(rows):
                    site = min(first + i, last_site - 1)
                    _locate_site(a, site, place)
                    _locate_taps(a, offsets, site, group, place, found, shares, slopes, compute)
                    targets[i] = a[4] + (site * channels + shift) * size
                    for tap in range(taps):
                        scale = _scale(a, scales, site, group, tap, compute)
                        for k in range(_CORNERS):
                            # Of a sum the rows are sites, and what is added up taps and corners; of columns the rows
                            # are taps, four at a time, and what is added up corners.
                            entry = _CORNERS * tap + k
                            slot = entry * ROWS + i if is_sum else (tap // ROWS * _CORNERS + k) * ROWS + tap % ROWS
                            pixel = found[entry]
                            pixels[slot] = zeros if pixel < 0 else a[2] + (pixel * channels + shift) * size
                            factors[slot] = scale * shares[entry]
                            weights[slot] = factors_at + slot * compute_size
                if is_sum:
                    filter_rows(
                        False, False, entries, pixels, weights, pixels, weights, pixels, source, like, like, inner, 1,
                        0, targets, sums, 0,
                    )  # fmt: skip
                    continue
                for tap in range(0, taps, ROWS):
                    block = 8 * tap * _CORNERS
                    some_pixels, some_weights = array(pixels_at + block, np.int64), array(weights_at + block, np.int64)
                    for i in range(ROWS):
                        at = min(i, taps - 1 - tap)  # rows past the last tap are that tap again
                        targets[i] = a[3] + (((first - begin) * taps + tap + at) * channels + shift) * compute_size
                        for k in range(_CORNERS if at < i else 0):
                            some_pixels[k * ROWS + i] = some_pixels[k * ROWS + at]
                            some_weights[k * ROWS + i] = some_weights[k * ROWS + at]
                    filter_rows(
                        False, False, _CORNERS, some_pixels, some_weights, pixels, weights, pixels, source, like, like,
                        inner, 1, 0, targets, columns, 0,
                    )  # fmt: skip


@njit
def _position_kernel(arguments, storage, compute):
    """The gradients of offsets and scales at the sites begin..end, from the rows of these sites."""
    a = carray(arguments, (64,))
    source, offsets, scales = array(a[2], storage), array(a[5], storage), array(a[6], storage)
    grad_offsets, grad_scales, like = array(a[3], storage), array(a[4], storage), array(a[7], compute)
    begin, end, chunk, channels, groups, taps = a[8], a[9], a[10], a[11], a[12], a[13]
    site_stride, tap_stride, size, compute_size = a[14], a[15], a[16], a[17]
    inner, entries, row_size = channels // groups, _CORNERS * taps, channels * size
    memory = a[26] + fetch_add(a[1:], 1) * a[27]
    place, found, pixels_at = array(memory, np.int64), array(memory + 64, np.int64), memory + 64 + 8 * entries
    pixels = array(pixels_at, np.int64)
    dots_at = pixels_at + 8 * entries
    shares_at = dots_at + compute_size * entries
    zeros = shares_at + 3 * compute_size * entries
    dots, shares, slopes = (
        array(dots_at, compute), array(shares_at, compute), array(shares_at + compute_size * entries, compute)
    )  # fmt: skip
    clear(array(zeros, compute), 0, channels, compute)
    while True:
        first_site = begin + fetch_add(a, 1) * chunk
        if first_site >= end:
            return
        for site in range(first_site, min(end, first_site + chunk)):
            _locate_site(a, site, place)
            row = a[7] + (site - begin) * site_stride * compute_size
            for group in range(groups):
                _locate_taps(a, offsets, site, group, place, found, shares, slopes, compute)
                for entry in range(entries):
                    pixels[entry] = zeros if found[entry] < 0 else a[2] + found[entry] * row_size
                # One row for all taps, or one for each.
                step = entries if tap_stride == 0 else _CORNERS
                for entry in range(0, entries, step):
                    some = array(pixels_at + 8 * entry, np.int64)
                    at = row + entry // _CORNERS * tap_stride * compute_size
                    dot_taps(False, step, some, source, at, like, like, group * inner, inner, channels, dots, entry)
                for tap in range(taps):
                    scale, first = _scale(a, scales, site, group, tap, compute), _CORNERS * tap
                    total = down = right = compute(0)
                    for k in range(_CORNERS):
                        dot = dots[first + k]
                        total += shares[first + k] * dot
                        down += slopes[2 * first + k] * dot
                        right += slopes[2 * first + _CORNERS + k] * dot
                    at = (site * groups + group) * taps + tap
                    if a[3] != 0:
                        is_inside = (
                            found[first] >= 0 or found[first + 1] >= 0 or found[first + 2] >= 0 or found[first + 3] >= 0
                        )
                        store(grad_offsets, 2 * at, scale * down if is_inside else compute(0))
                        store(grad_offsets, 2 * at + 1, scale * right if is_inside else compute(0))
                    if a[4] != 0:
                        store(grad_scales, at, total)


@njit
def _scatter_kernel(arguments, storage, compute):
    """The input's gradient from the rows of the sites begin..end: a slice of a sample's channels at a time."""
    a = carray(arguments, (64,))
    offsets, scales = array(a[5], storage), array(a[6], storage)
    grad_input, rows = array(a[3], compute), array(a[7], compute)
    begin, end, lanes, channels, groups, taps = a[8], a[9], a[10], a[11], a[12], a[13]
    site_stride, tap_stride, compute_size, area = a[14], a[15], a[17], a[30] * a[31]
    inner, entries = channels // groups, _CORNERS * taps
    slices = (inner + _SLICE - 1) // _SLICE
    memory = a[26] + fetch_add(a[1:], 1) * a[27]
    place, found, shares_at = array(memory, np.int64), array(memory + 64, np.int64), memory + 64 + 8 * entries
    shares, slopes = array(shares_at, compute), array(shares_at + compute_size * entries, compute)
    first_sample, last_sample = begin // area, (end - 1) // area
    while True:
        item = fetch_add(a, 1)
        sample, part = first_sample + item // (groups * slices), item % (groups * slices)
        if sample > last_sample:
            return
        group, channel = part // slices, part // slices * inner + part % slices * _SLICE
        count = min(_SLICE, (group + 1) * inner - channel)
        for site in range(max(begin, sample * area), min(end, (sample + 1) * area)):
            _locate_site(a, site, place)
            _locate_taps(a, offsets, site, group, place, found, shares, slopes, compute)
            for tap in range(taps):
                scale = _scale(a, scales, site, group, tap, compute)
                row = (site - begin) * site_stride + tap * tap_stride + channel
                for k in range(_CORNERS):
                    pixel = found[_CORNERS * tap + k]
                    if pixel >= 0:
                        share = scale * shares[_CORNERS * tap + k]
                        add(rows, row, count, share, grad_input, pixel * channels + channel, lanes, compute)


_run_sample = kernel(_sample_kernel)
_run_position = kernel(_position_kernel)
_run_scatter = kernel(_scatter_kernel)


class Sampling:
    """One call's operands, geometry and what its kernels share.

    Args:
        input: [N, C, H, W], as the others in channels_last.
        offset: [N, 2 * G * kH * kW, Ho, Wo].
        scales: [N, G * kH * kW, Ho, Wo], the mask of a convolution or the weights of an aggregation, or None.
    """

    def __init__(self, input: Tensor, offset: Tensor, scales: Tensor | None, geometry: Geometry) -> None:
        self.input, self.offset, self.scales = input, offset, scales
        self.dtype, self.compute = input.dtype, compute_type(input.dtype)
        self.taps = geometry.kernel[0] * geometry.kernel[1]
        self.channels, self.groups = input.shape[1], offset.shape[1] // (2 * self.taps)
        self.sites = offset.shape[0] * offset.shape[2] * offset.shape[3]
        self.place = (
            *offset.shape[2:], *input.shape[2:], *geometry.kernel, *geometry.stride, *geometry.padding,
            *geometry.dilation,
        )  # fmt: skip

    def chunks(self) -> list[tuple[int, int]]:
        """The sites whose columns are made at a time: begin and end of each; their number depends on shapes alone."""
        row = self.taps * self.channels * (8 if self.compute == torch.float64 else 4)
        size = max(16, _COLUMNS_BYTES // max(1, row))
        return [(begin, min(self.sites, begin + size)) for begin in range(0, self.sites, size)]

    def aggregate(self, out: Tensor) -> None:
        """Into `out` [N, C, Ho, Wo], channels_last."""
        self._run(_run_sample, 0, self.sites, 0, address(out))

    def columns(self, begin: int, end: int) -> Tensor:
        """[end - begin, kH * kW, C] in the compute type: what the sites sample, times the scale."""
        columns = _with_room(end - begin, self.taps * self.channels, self.compute)
        self._run(_run_sample, begin, end, address(columns), 0)
        return columns[: end - begin].view(-1, self.taps, self.channels)

    def position_grads(
        self, rows: Tensor, begin: int, end: int, grad_offset: Tensor | None, grad_scales: Tensor | None
    ) -> None:
        """Into the rows begin..end of `grad_offset` and `grad_scales`, like offset and scales.

        rows: in the compute type; [sites, kH * kW, C], or [sites, C] where all taps have the same.
        """
        self._run(_run_position, begin, end, address(grad_offset), address(grad_scales), rows)

    def scatter(self, rows: Tensor, begin: int, end: int, grad_input: Tensor) -> None:
        """Add to `grad_input`, like the input but in the compute type."""
        self._run(_run_scatter, begin, end, address(grad_input), 0, rows)

    def _run(self, run, begin: int, end: int, first: int, second: int, rows: Tensor | None = None) -> None:
        threads = workers(end - begin)
        chunk = max(ROWS, ceil(end - begin, _CHUNKS_PER_THREAD * threads))
        if run is _run_scatter:
            chunk = vector_lanes(self.dtype)
        site_stride = tap_stride = 0
        if rows is not None:
            site_stride, tap_stride = rows.stride(0), rows.stride(1) if rows.dim() == 3 else 0
        element, compute = self.input.element_size(), 8 if self.compute == torch.float64 else 4
        entries = _CORNERS * self.taps
        memory = cache_lines(64 + 8 * entries * (1 + 2 * ROWS) + compute * (entries * (ROWS + 4) + self.channels + 64))
        scratch = torch.empty(threads * memory, dtype=torch.uint8)
        run(
            self.dtype, threads, address(self.input), first, second, address(self.offset), address(self.scales),
            address(rows), begin, end, chunk, self.channels, self.groups, self.taps, site_stride, tap_stride, element,
            compute, *(0,) * 8, address(scratch), memory, 0, 0, *self.place,
        )  # fmt: skip


class Product:
    """The 1x1 convolution of columns that a deformable convolution ends with, in the order of PyTorch's weight.

    Matrix products whose bits do not depend on the threads, as those of BLAS may.

    Args:
        weight: [Cout, C / groups, kH, kW].
        channels: C.
        dtype: the compute type.
    """

    def __init__(self, weight: Tensor, channels: int, dtype: torch.dtype) -> None:
        self.weight, self.groups, self.dtype = weight, channels // weight.shape[1], dtype
        # [groups, filters of a group, kH * kW * channels of a group], taps before channels.
        self.matrices = weight.to(dtype).permute(0, 2, 3, 1).reshape(self.groups, -1, weight[0].numel())
        self.grad = None

    def forward(self, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out [sites, Cout] = columns [sites, kH * kW, C] @ weight + bias, in any of the types."""
        products = [
            _multiply(part, matrix, shift, out if self.groups == 1 else None)
            for part, matrix, shift in zip(self._split(columns), self.matrices, self._shifts(bias))
        ]
        if products[0] is not out:
            torch.cat(products, 1, out=out) if out.dtype == self.dtype else out.copy_(torch.cat(products, 1))

    def column_grads(self, rows: Tensor) -> Tensor:
        """[sites, kH * kW, C] from the output's gradient [sites, Cout], in the compute type."""
        filters = rows.shape[1] // self.groups
        parts = [
            _multiply(part, matrix.t().contiguous(), None, None).view(len(rows), -1, self.weight.shape[1])
            for part, matrix in zip(rows.split(filters, 1), self.matrices)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def add_weight_grad(self, columns: Tensor, rows: Tensor) -> None:
        """Add the share of some sites to `grad`, like the matrices."""
        grad, filters = torch.empty_like(self.matrices), rows.shape[1] // self.groups
        index = _numbers(len(rows))
        for part, given, target in zip(self._split(columns), rows.split(filters, 1), grad):
            padded = _with_room(len(rows), filters, self.dtype)
            padded[: len(rows)] = given
            padded[len(rows) :] = 0
            masked_conv._weight_grad(padded, part, None, None, index, len(rows), target[:, :, None, None], 1)
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def weight_grad(self) -> Tensor:
        """What has been added up, like the weight."""
        filters, channels, *kernel = self.weight.shape
        return self.grad.view(filters, *kernel, channels).permute(0, 3, 1, 2).to(self.weight.dtype).contiguous()

    def _split(self, columns: Tensor) -> list[Tensor]:
        """For each group [sites (and room behind them), kH * kW * channels of the group]."""
        if self.groups == 1:
            return [columns.flatten(1)]
        return [part.flatten(1) for part in columns.split(self.weight.shape[1], 2)]

    def _shifts(self, bias: Tensor | None) -> list[Tensor | None]:
        filters = self.weight.shape[0] // self.groups
        return [None] * self.groups if bias is None else list(bias.to(self.dtype).split(filters))


def bias_grad(rows: Tensor) -> Tensor:
    """The sum of rows [sites, Cout]."""
    return masked_conv.bias_grad(rows, _numbers(len(rows)), len(rows))


def _multiply(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """rows [n, depth] @ matrix [filters, depth].T + bias; into `out` [n, filters] where it is of the same type."""
    result = out
    if out is None or out.dtype != rows.dtype:
        result = torch.empty(len(rows), matrix.shape[0], dtype=rows.dtype)
    rows = rows.contiguous()
    masked_conv.forward(
        rows, matrix[:, :, None, None], bias, None, _numbers(len(rows)), len(rows), None, None, result, None, True, 1,
        "none", (None, (0,) * 12),
    )  # fmt: skip
    return result


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def _with_room(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows and some, columns]: tiles may read a few rows past the last."""
    return torch.empty(rows + TILE_ROWS, columns, dtype=dtype)
