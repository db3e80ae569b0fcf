"""A chain of convolutions at active sites, in one pass over the output: inference on the CPU.

The output's lines are cut into bands. For each band a thread finds the sites that each layer has to compute, computes
them into memory of its own, layer by layer, and writes the output: what lies between the layers never leaves the
cache, and nothing is computed that no active site reads. Sites on both sides of a cut that neighbouring bands both
read are computed twice.

Every sum has the order it has in `masked_conv`, whatever the bands: the same bits on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .._geometry import is_depthwise
from . import masked_conv
from ._common import (
    LARGE,
    address,
    array,
    ceil,
    fill_all,
    fill_elements,
    finish_rows,
    gather_rows,
    multiply_rows,
    vector_lanes,
)
from ._llvm import (
    ACTIVATIONS,
    ROWS,
    STENCIL_ROWS,
    fetch_add,
    finish_row,
    merge_bytes,
    pointer,
    positive,
    stencil_rows,
)
from ._threads import compute_type, kernel, workers
from .packing import packed_weight

BAND_BYTES = 1 << 19  # of features between two layers: half of a 1 MiB L2
_MOST_ROWS = 96
_MOST_BANDS, _MOST_STAGES = 1024, 16
_HEADER, _STAGE = 32, 24  # int64 arguments before the first stage, and of each


@njit
def _plan_kernel(arguments, storage, compute):
    """Cut the lines into bands of about the same number of active sites: bands[b] = (first line, end, sites before).

    The result's first two entries are the number of bands and of active sites, the third the most lines of a band.
    """
    a = carray(arguments, (16,))
    mask, lines, width, target, threads, most_bands = a[2], a[3], a[4], a[5], a[6], a[7]
    result = carray(pointer(a[8], np.int64), (3 + 3 * most_bands,))
    counts = carray(pointer(a[9], np.int32), (lines,))
    total = 0
    for line in range(lines):
        start = mask + line * width
        words = carray(pointer(start, np.uint64), (width // 8,))
        bytes_ = carray(pointer(start, np.uint8), (width,))
        count = 0
        for word in range(width // 8):  # each byte is 0 or 1: the product adds them up in its highest byte
            count += np.int64((words[word] * np.uint64(0x0101010101010101)) >> np.uint64(56))
        for x in range(width // 8 * 8, width):
            count += bytes_[x]
        counts[line] = count
        total += count
    # As many bands for each thread, and none larger than what the cache should hold.
    wanted = min(most_bands - 1, max(1, (total + target * threads - 1) // (target * threads)) * threads)
    target = max(1, (total + wanted - 1) // wanted)
    bands, first, before, count, most_lines = 0, 0, 0, 0, 0
    for line in range(lines):
        count += counts[line]
        if line == lines - 1 or (count + counts[line + 1] // 2 >= target and bands < most_bands - 1):
            result[3 + 3 * bands] = first
            result[4 + 3 * bands] = line + 1
            result[5 + 3 * bands] = before
            most_lines = max(most_lines, line + 1 - first)
            before, count, first, bands = before + count, 0, line + 1, bands + 1
    result[0], result[1], result[2] = bands, total, most_lines


@njit
def _list_sites(active, places, sites, rows):
    """The places of the active bytes, in order, and each place's position among them or -1; how many there are."""
    count = 0
    for place in range(places):
        is_active = np.int32(active[place])
        sites[count] = place
        rows[place] = count if is_active else -1
        count += is_active
    return count


@njit
def _spread(out_map, out_first, out_lines, in_map, in_first, g):
    """Mark in `in_map` the pixels that the active sites of `out_map` read; g: the reading layer's arguments."""
    kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x = g[5], g[6], g[7], g[8], g[9], g[10]
    dilation_y, dilation_x, height, width, out_height, out_width = g[11], g[12], g[13], g[14], g[15], g[16]
    for line in range(out_lines):
        sample, y = (out_first + line) // out_height, (out_first + line) % out_height
        for ky in range(kernel_height):
            tap_y = y * stride_y - pad_y + ky * dilation_y
            if not 0 <= tap_y < height:
                continue
            target = (sample * height + tap_y - in_first) * width
            for kx in range(kernel_width):
                offset = kx * dilation_x - pad_x
                begin = max(0, -(offset // stride_x))
                end = min(out_width, (width - 1 - offset) // stride_x + 1)
                if stride_x == 1:
                    merge_bytes(out_map, line * out_width + begin, in_map, target + offset + begin, max(0, end - begin))
                else:
                    for x in range(begin, end):
                        in_map[target + offset + x * stride_x] |= out_map[line * out_width + x]


@njit
def _tabulate(sites, first, rows, set_first, rows_of_pixel, in_first, is_input, table, g):
    """table[r, tap]: the row that the site sites[first + r] reads, or -1; a pixel of the input, if that is read."""
    kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x = g[5], g[6], g[7], g[8], g[9], g[10]
    dilation_y, dilation_x, height, width, out_height, out_width = g[11], g[12], g[13], g[14], g[15], g[16]
    entry = 0
    for r in range(rows):
        place = np.int64(sites[first + r])
        line, x = set_first + place // out_width, place % out_width
        sample, y = line // out_height, line % out_height
        for ky in range(kernel_height):
            tap_y = y * stride_y - pad_y + ky * dilation_y
            start = (sample * height + tap_y - in_first) * width
            for kx in range(kernel_width):
                tap_x = x * stride_x - pad_x + kx * dilation_x
                if 0 <= tap_y < height and 0 <= tap_x < width:
                    table[entry] = start + tap_x if is_input else rows_of_pixel[start + tap_x]
                else:
                    table[entry] = -1
                entry += 1


@njit
def _first_input_line(line, g):
    """The first line that an output line reads, of its own sample."""
    stride_y, pad_y, height, out_height = g[7], g[9], g[13], g[15]
    return line // out_height * height + min(height - 1, max(0, line % out_height * stride_y - pad_y))


@njit
def _last_input_line(line, g):
    kernel_height, stride_y, pad_y, dilation_y, height, out_height = g[5], g[7], g[9], g[11], g[13], g[15]
    reach = (kernel_height - 1) * dilation_y
    return line // out_height * height + min(height - 1, max(0, line % out_height * stride_y - pad_y + reach))


@njit
def _chain_kernel(arguments, storage, compute):
    a = carray(arguments, (_HEADER + _MOST_STAGES * _STAGE,))
    source, out, residual, inactive = (
        array(a[2], storage),
        array(a[3], storage),
        array(a[4], storage),
        array(a[9], storage),
    )
    gate, has_gate, has_residual = array(a[6], compute), a[6] != 0, a[4] != 0
    out_width, stages, lanes = a[7], a[8], a[10]
    bands = carray(pointer(a[11], np.int64), (3 + 3 * _MOST_BANDS,))
    fill, is_large, is_packed, index = a[12], a[13] != 0, a[14] != 0, array(a[15], np.int32)
    scratch, scratch_size = array(a[16], compute), a[17]
    numbers, numbers_size = a[18], a[19]
    chunk_rows, gathered_size, zeros, element_size = a[20], a[21], a[22], a[23]
    nothing, zero_row, infinity = array(0, compute), array(a[22], compute), compute(np.inf)
    worker = fetch_add(a[1:], 1)
    gathered = worker * scratch_size
    products = gathered + gathered_size
    numbers += worker * numbers_size
    table = array(numbers, np.int32)
    # In the caller's memory: Numba would count references to arrays of its own, atomically, at every use.
    state = a[25] + 8 * worker * a[26]
    counts, firsts, line_counts = array(state, np.int64), array(state + 128, np.int64), array(state + 256, np.int64)
    maps, lists, places = array(state + 384, np.int64), array(state + 512, np.int64), array(state + 640, np.int64)
    pixels = array(state + 768, np.int64)
    while True:
        band = fetch_add(a, 1)
        if band >= bands[0]:
            return
        # The sites of each layer, from the last to the first. Of layer s: its map of bytes, its list of sites and, by
        # place, their rows; a layer that the next one reads pixel by pixel has the sites of that one.
        last = stages - 1
        firsts[last], line_counts[last] = bands[3 + 3 * band], bands[4 + 3 * band] - bands[3 + 3 * band]
        maps[last] = a[5] + firsts[last] * out_width
        for s in range(stages - 1, -1, -1):
            g = a[_HEADER + s * _STAGE :]
            lists[s] = numbers + 4 * g[19]
            places[s] = lists[s] + 4 * g[20]
            if s < last:
                following = a[_HEADER + (s + 1) * _STAGE :]
                if following[17] != 0:
                    firsts[s], line_counts[s], maps[s] = firsts[s + 1], line_counts[s + 1], maps[s + 1]
                    lists[s], places[s], counts[s] = lists[s + 1], places[s + 1], counts[s + 1]
                    continue
                firsts[s] = _first_input_line(firsts[s + 1], following)
                end = _last_input_line(firsts[s + 1] + line_counts[s + 1] - 1, following) + 1
                line_counts[s] = end - firsts[s]
                maps[s] = places[s] + 4 * g[20]
                marked = carray(pointer(maps[s], np.uint8), (1 << 40,))
                for place in range((end - firsts[s]) * g[16]):
                    marked[place] = 0
                read_by = carray(pointer(maps[s + 1], np.uint8), (1 << 40,))
                _spread(read_by, firsts[s + 1], line_counts[s + 1], marked, firsts[s], following)
            counts[s] = _list_sites(
                carray(pointer(maps[s], np.uint8), (1 << 40,)), line_counts[s] * g[16], array(lists[s], np.int32),
                array(places[s], np.int32),
            )  # fmt: skip
        for s in range(stages):
            g = a[_HEADER + s * _STAGE :]
            weights, bias, cin, cout, groups = array(g[0], compute), array(g[1], compute), g[2], g[3], g[4]
            taps, activation, block_taps = g[5] * g[6], g[18], g[21]
            channels, filters = cin // groups, cout // groups
            panels = (filters + lanes - 1) // lanes
            is_input, is_pointwise, is_depthwise = s == 0, g[17] != 0, g[23] != 0
            width = cin if is_depthwise else groups * panels * lanes
            read = 0 if is_input else worker * scratch_size + a[_HEADER + (s - 1) * _STAGE + 22]
            rows_out = worker * scratch_size + g[22]
            # What only shifts and clamps is done with the sums still in registers.
            is_clamp = s < last and activation <= 2 and (is_depthwise or (groups == 1 and filters % lanes == 0))
            is_clamp = is_clamp and (is_depthwise or block_taps >= taps)
            low, high = compute(-np.inf) if activation == 0 else compute(0), compute(6 if activation == 2 else np.inf)
            sites = array(lists[s], np.int32)
            for first in range(0, counts[s], positive(chunk_rows)):
                rows = min(chunk_rows, counts[s] - first)
                if is_input or not is_pointwise or is_depthwise:
                    in_first = 0 if is_input else firsts[s - 1]
                    rows_of_pixel = sites if is_input else array(places[s - 1], np.int32)
                    _tabulate(sites, first, rows, firsts[s], rows_of_pixel, in_first, is_input, table, g)
                if is_depthwise:
                    for r in range(0, rows, STENCIL_ROWS):
                        for i in range(STENCIL_ROWS):
                            entry = min(r + i, rows - 1) * taps
                            for tap in range(taps):
                                row = np.int64(table[entry + tap])
                                if row < 0:
                                    pixel = zeros
                                elif is_input:
                                    pixel = a[2] + row * cin * element_size
                                else:
                                    pixel = a[16] + (read + row * cin) * a[24]
                                pixels[tap * STENCIL_ROWS + i] = pixel
                        if is_clamp:
                            shift, least, most, target = bias, low, high, rows_out + (first + r) * cin
                        else:
                            shift, least, most, target = zero_row, -infinity, infinity, products + r * width
                        for i in range(STENCIL_ROWS):
                            row = min(i, rows - 1 - r)
                            pixels[taps * STENCIL_ROWS + i] = a[16] + (target + row * cin) * a[24]
                        if is_input:
                            stencil_rows(pixels, source, weights, taps, cin, shift, least, most, scratch)
                        else:
                            stencil_rows(pixels, scratch, weights, taps, cin, shift, least, most, scratch)
                elif is_pointwise and not is_input:
                    depth = channels
                    if is_clamp:
                        finish_rows(
                            scratch, read + first * cin, cin, rows, depth, weights, depth * lanes, panels, bias, low,
                            high, scratch, rows_out + first * cout, cout, lanes,
                        )  # fmt: skip
                        continue
                    multiply_rows(
                        scratch, read + first * cin, cin, channels, rows, depth, False, weights, 0, depth * lanes,
                        panels * depth * lanes, panels, groups, scratch, products, width, lanes,
                    )  # fmt: skip
                else:
                    for first_tap in range(0, taps, positive(block_taps)):
                        tap_count = min(block_taps, taps - first_tap)
                        depth, stride = tap_count * channels, taps * channels * lanes
                        if is_input:
                            gather_rows(
                                source, cin, table, True, first_tap, taps, rows, tap_count, 0, channels, groups,
                                scratch, gathered, lanes, compute,
                            )  # fmt: skip
                        else:
                            gather_rows(
                                scratch, cin, table, True, first_tap, taps, rows, tap_count, read, channels, groups,
                                scratch, gathered, lanes, compute,
                            )  # fmt: skip
                        if is_clamp:
                            finish_rows(
                                scratch, gathered, depth, rows, depth, weights, stride, panels, bias, low, high,
                                scratch, rows_out + first * cout, cout, lanes,
                            )  # fmt: skip
                            continue
                        multiply_rows(
                            scratch, gathered, depth, rows * depth, rows, depth, first_tap > 0,
                            weights, first_tap * channels * lanes, stride, panels * stride, panels, groups,
                            scratch, products, width, lanes,
                        )  # fmt: skip
                if is_clamp:
                    continue
                for r in range(rows):
                    site, scale = np.int64(sites[first + r]), compute(1)
                    place = (first + r) * cout
                    if s == last:
                        site += firsts[last] * out_width
                        if has_gate:
                            scale = gate[site]
                        place = site * cout
                        if is_packed:
                            position = bands[5 + 3 * band] + first + r
                            index[position] = site
                            place = position * cout
                    for group in range(groups if not is_depthwise else 1):
                        channel, product = group * filters, products + r * width + group * panels * lanes
                        size = cout if is_depthwise else filters
                        if s < last:
                            finish_row(
                                scratch, product, bias, channel, scale, nothing, 0, scratch,
                                rows_out + place + channel, size, activation,
                            )  # fmt: skip
                        else:
                            at = site * cout + channel if has_residual else 0
                            finish_row(
                                scratch, product, bias, channel, scale, residual, at, out, place + channel, size,
                                activation,
                            )  # fmt: skip
        if fill != 0:
            cout = a[_HEADER + last * _STAGE + 3]
            at, sites = firsts[last] * out_width, array(lists[last], np.int32)
            for m in range(counts[last] + 1):
                end = firsts[last] * out_width
                end += np.int64(sites[m]) if m < counts[last] else line_counts[last] * out_width
                if end > at:
                    fill_elements(inactive, out, at * cout, end * cout, is_large)
                at = end + 1


_run_plan = kernel(_plan_kernel)
_run_chain = kernel(_chain_kernel)


class Stage(NamedTuple):
    """A layer of a chain: its geometry, and the weight and bias as the kernel reads them."""

    weight: Tensor
    bias: Tensor
    channels: int
    filters: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    activation: str


def prepare(weight: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """A layer's weight and bias in the compute type, as the kernel reads them: to be kept while they do not change."""
    bias_copy = torch.zeros(weight.shape[0], dtype=compute_type(weight.dtype))
    if bias is not None:
        bias_copy.copy_(bias)
    if is_depthwise(weight.shape, groups):
        return torch.empty(*prepared_shape(weight.shape, weight.dtype, groups)[0], dtype=bias_copy.dtype).copy_(
            weight.flatten(1).t()
        ), bias_copy
    return packed_weight(weight, groups, by_output=True), bias_copy


def prepared_shape(shape: Sequence[int], dtype: torch.dtype, groups: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of what `prepare` makes of a weight of that shape and type."""
    cout, channels, height, width = shape
    compute = compute_type(dtype)
    if is_depthwise(shape, groups):
        return (height * width, cout), compute
    lanes = vector_lanes(dtype)
    return (groups * ceil(cout // groups, lanes) * lanes * height * width * channels,), compute


def run(
    input: Tensor,
    mask: Tensor,
    gate: Tensor | None,
    stages: Sequence[Stage],
    sizes: Sequence[tuple[int, int]],
    residual: Tensor | None,
    inactive: Tensor | None,
    out: Tensor,
    in_place: bool,
) -> None:
    """Write activation(gate * chain(input) + residual) into `out` at the sites of `mask`.

    Everything dense is channels_last; `sizes` are (H, W) of the input and of each layer's output. The skipped sites get
    zeros, or what is `inactive` there; `in_place` leaves them alone, and `out` may be `input` and `residual` then.
    """
    dtype, compute = input.dtype, compute_type(input.dtype)
    lines, width = mask.shape[0] * mask.shape[2], mask.shape[3]
    hidden = max((stage.filters for stage in stages[:-1]), default=stages[-1].filters)
    threads = torch.get_num_threads()
    bands = torch.empty(3 + 3 * _MOST_BANDS, dtype=torch.int64)
    line_counts = torch.empty(lines, dtype=torch.int32)
    compute_size = 8 if compute == torch.float64 else 4
    _run_plan(
        torch.float32, 1, mask.data_ptr(), lines, width, max(1, BAND_BYTES // (hidden * compute_size)), threads,
        _MOST_BANDS, bands.data_ptr(), line_counts.data_ptr(),
    )  # fmt: skip
    band_count, active, most_lines = bands[:3].tolist()
    channels = stages[-1].filters
    if active == 0:
        fill_all(out, inactive, in_place)
        return
    lanes = vector_lanes(dtype)
    widths = [s.filters if _is_depthwise(s) else s.groups * ceil(s.filters // s.groups, lanes) * lanes for s in stages]
    depths, arguments = [], []
    for stage in stages:
        taps, inner = stage.kernel[0] * stage.kernel[1], stage.channels // stage.groups
        block_taps = ceil(taps, ceil(taps, max(1, masked_conv.DEPTH // inner)))
        depths.append((block_taps, stage.groups * inner * block_taps))
    largest = max(depth for _, depth in depths) + max(widths)
    chunk_rows = max(12, min(_MOST_ROWS, 2 * masked_conv.GATHERED // largest) // 12 * 12)
    most_taps = max(stage.kernel[0] * stage.kernel[1] for stage in stages)
    gathered = chunk_rows * max(depth for _, depth in depths)
    table = chunk_rows * most_taps
    # The features between two layers, and the lists of sites, one layer behind the other.
    at, number_at = gathered + chunk_rows * max(widths), table
    most = most_lines
    for number in range(len(stages) - 1, -1, -1):
        stage, (height, stage_width) = stages[number], sizes[number + 1]
        places = min(most, mask.shape[0] * height) * stage_width
        block_taps, _ = depths[number]
        is_pointwise = stage.kernel == stage.stride == (1, 1) and stage.padding == (0, 0)
        arguments[:0] = (
            stage.weight.data_ptr(), stage.bias.data_ptr(), stage.channels, stage.filters, stage.groups, *stage.kernel,
            *stage.stride, *stage.padding, *stage.dilation, *sizes[number], height, stage_width, is_pointwise,
            ACTIVATIONS.index(stage.activation), number_at, places, block_taps, at, _is_depthwise(stage),
        )  # fmt: skip
        number_at += 2 * places + places // 4 + 16
        if number < len(stages) - 1:
            at += (places + ROWS) * stage.filters
        reach = (stage.kernel[0] - 1) * stage.dilation[0] + 1
        # Samples that a band spans are read whole between its first and its last.
        most = min(
            mask.shape[0] * sizes[number][0], (most - 1) * stage.stride[0] + reach + _across(most, sizes, number)
        )
    rows, index = out, None
    if in_place:
        # Neighbouring bands still read what this one would overwrite.
        rows = torch.empty(active, channels, dtype=dtype)
        index = torch.empty(active, dtype=torch.int32)
    zeros = torch.zeros(max(stage.channels for stage in stages), dtype=compute)
    threads = workers(band_count)
    scratch = torch.empty(threads * at, dtype=compute)
    numbers = torch.empty(threads * number_at, dtype=torch.int32)
    state_size = ceil(6 * _MOST_STAGES + (most_taps + 1) * STENCIL_ROWS, 16) * 16  # no cache line of two threads
    state = torch.empty(threads * state_size, dtype=torch.int64)
    fill = 0 if in_place else 1 if inactive is None else 2
    is_large = out.numel() * out.element_size() > LARGE
    header = (
        input.data_ptr(), rows.data_ptr(), address(residual), mask.data_ptr(), address(gate), width, len(stages),
        address(inactive), lanes, bands.data_ptr(), fill, is_large, in_place, address(index), scratch.data_ptr(), at,
        numbers.data_ptr(), 4 * number_at, chunk_rows, gathered, zeros.data_ptr(), input.element_size(),
        compute_size, state.data_ptr(), state_size,
    )  # fmt: skip
    padding = (0,) * (_HEADER - 2 - len(header))
    _run_chain(dtype, threads, *header, *padding, *arguments)
    if in_place:
        out.permute(0, 2, 3, 1).reshape(-1, channels).index_copy_(0, index.long(), rows)


def _is_depthwise(stage: Stage) -> bool:
    return is_depthwise((stage.filters, stage.channels // stage.groups), stage.groups)


def _across(lines: int, sizes: Sequence[tuple[int, int]], number: int) -> int:
    """Lines of the input that belong to none of the output's, between the samples that so many output lines touch."""
    height, out_height = sizes[number][0], sizes[number + 1][0]
    return ceil(lines, out_height) * height
