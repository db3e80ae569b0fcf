"""A chain of convolutions at active sites, in one pass over the output: inference on the CPU.

The output's lines are cut into bands. For each band a thread finds the sites that each layer has to compute, computes
them into memory of its own, layer by layer, and writes the output: what lies between the layers never leaves the
cache, and nothing is computed that no active site reads. Sites on both sides of a cut that neighbouring bands both
read are computed twice.

Every sum has the order it has in `masked_conv`, whatever the bands: the same bits on any number of threads.
"""

from __future__ import annotations

from array import array as array_of
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
_MOST_BANDS, MOST_STAGES = 1024, 16  # bands, and layers, that the kernels have room for
_HEADER, _STAGE = 32, 24  # int64 arguments before the first stage, and of each
_PLAN = 14  # int64 arguments of the plan
_BANDS_SIZE = 3 + 3 * _MOST_BANDS + 13  # whole cache lines


@njit
def _plan_kernel(arguments, storage, compute):
    """Copy the mask's bytes, of which any but zero is true, as zeros and ones to a[13].

    Then cut the lines into bands of about the same number of active sites: bands[b] = (first line, end, sites before).

    The first three entries are the number of bands, of active sites, and the most lines of a band. Then lay out what a
    thread needs for such a band, behind what is there already: the features between two layers, of a[11] elements so
    far, and the lists of sites, of a[12] int32 so far. Both, with all of it, come back in the same places.
    """
    a = carray(arguments, (_PLAN,))
    mask, lines, width, target, threads, chain = a[13], a[3], a[4], a[5], a[6], a[9]
    given, kept = carray(pointer(a[2], np.uint8), (lines * width,)), carray(pointer(mask, np.uint8), (lines * width,))
    for place in range(lines * width):
        kept[place] = given[place] != 0
    result = carray(pointer(a[7], np.int64), (3 + 3 * _MOST_BANDS,))
    counts = carray(pointer(a[8], np.int32), (lines,))
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
    wanted = min(_MOST_BANDS - 1, max(1, (total + target * threads - 1) // (target * threads)) * threads)
    target = max(1, (total + wanted - 1) // wanted)
    bands, first, before, count, most_lines = 0, 0, 0, 0, 0
    for line in range(lines):
        count += counts[line]
        if line == lines - 1 or (count + counts[line + 1] // 2 >= target and bands < _MOST_BANDS - 1):
            result[3 + 3 * bands] = first
            result[4 + 3 * bands] = line + 1
            result[5 + 3 * bands] = before
            most_lines = max(most_lines, line + 1 - first)
            before, count, first, bands = before + count, 0, line + 1, bands + 1
    result[0], result[1], result[2] = bands, total, most_lines
    stages = carray(pointer(chain, np.int64), (_HEADER + MOST_STAGES * _STAGE,))
    last, samples = stages[8] - 1, a[10]
    for s in range(last, -1, -1):
        g = stages[_HEADER + s * _STAGE :]
        kernel_height, stride_y, dilation_y, height, out_height = g[5], g[7], g[11], g[13], g[15]
        places = min(most_lines, samples * out_height) * g[16]
        g[19], g[20], g[22] = a[12], places, a[11]
        a[12] += 2 * places + places // 4 + 16
        if s < last:
            a[11] += (places + ROWS) * g[3]
        # Samples that a band spans are read whole between its first and its last.
        across = (most_lines + out_height - 1) // out_height * height
        reach = (kernel_height - 1) * dilation_y + 1
        most_lines = min(samples * height, (most_lines - 1) * stride_y + reach + across)


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
    a = carray(arguments, (_HEADER + MOST_STAGES * _STAGE,))
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


class Chain:
    """Layers one behind the other, over inputs of one size and type: what of a call the mask does not change.

    Args:
        stages: the layers.
        sizes: (H, W) of the input and of each layer's output.
        samples: N.
        dtype: of the input and the output.

    Raises ValueError for more than `MOST_STAGES` layers.
    """

    def __init__(
        self, stages: Sequence[Stage], sizes: Sequence[tuple[int, int]], samples: int, dtype: torch.dtype
    ) -> None:
        if len(stages) > MOST_STAGES:
            raise ValueError(f"layers: expected at most {MOST_STAGES} in a chain, got {len(stages)}")
        self.stages, self.dtype, compute = tuple(stages), dtype, compute_type(dtype)
        self.channels, (height, self.width) = stages[-1].filters, sizes[-1]
        self.samples, self.lines = samples, samples * height
        hidden = max((stage.filters for stage in stages[:-1]), default=self.channels)
        self.compute_size, lanes = compute.itemsize, vector_lanes(dtype)
        self.most_sites = max(1, BAND_BYTES // (hidden * self.compute_size))
        widths, depths = [], []
        for stage in stages:
            padded = stage.groups * ceil(stage.filters // stage.groups, lanes) * lanes
            widths.append(stage.filters if _is_depthwise(stage) else padded)
            taps, inner = stage.kernel[0] * stage.kernel[1], stage.channels // stage.groups
            block_taps = ceil(taps, ceil(taps, max(1, masked_conv.DEPTH // inner)))
            depths.append((block_taps, stage.groups * inner * block_taps))
        deepest = max(depth for _, depth in depths)
        chunk_rows = max(12, min(_MOST_ROWS, 2 * masked_conv.GATHERED // (deepest + max(widths))) // 12 * 12)
        most_taps = max(stage.kernel[0] * stage.kernel[1] for stage in stages)
        gathered = chunk_rows * deepest
        self.elements, self.numbers = gathered + chunk_rows * max(widths), chunk_rows * most_taps
        self.zeros = torch.zeros(max(stage.channels for stage in stages), dtype=compute)
        # No cache line of two threads.
        self.state_size = ceil(6 * MOST_STAGES + (most_taps + 1) * STENCIL_ROWS, 16) * 16
        header = array_of("q", bytes(8 * _HEADER))
        header[7], header[8], header[10] = self.width, len(stages), lanes
        header[20], header[21], header[22] = chunk_rows, gathered, self.zeros.data_ptr()
        header[23], header[24], header[26] = dtype.itemsize, self.compute_size, self.state_size
        for number, stage in enumerate(stages):
            is_pointwise = stage.kernel == stage.stride == (1, 1) and stage.padding == (0, 0)
            numbers = (
                stage.weight.data_ptr(), stage.bias.data_ptr(), stage.channels, stage.filters, stage.groups,
                *stage.kernel, *stage.stride, *stage.padding, *stage.dilation, *sizes[number], *sizes[number + 1],
                is_pointwise, ACTIVATIONS.index(stage.activation), 0, 0, depths[number][0], 0, _is_depthwise(stage),
            )  # fmt: skip
            header.extend(numbers)
        self.arguments = header
        self.is_large = samples * self.channels * height * self.width * dtype.itemsize > LARGE

    def run(
        self,
        input: Tensor,
        mask: Tensor,
        gate: Tensor | None,
        residual: Tensor | None,
        inactive: Tensor | None,
        out: Tensor,
        in_place: bool,
    ) -> None:
        """Write activation(gate * chain(input) + residual) into `out` at the active sites of `mask`, contiguous bool.

        Everything dense is channels_last. The skipped sites get zeros, or what is `inactive` there; `in_place` leaves
        them alone, and `out` may be `input` and `residual` then.
        """
        threads, arguments = torch.get_num_threads(), self.arguments[:]
        chain, line_counts = arguments.buffer_info()[0], _BANDS_SIZE
        state = line_counts + ceil(self.lines, 32) * 16
        copy = state + threads * self.state_size
        work = torch.empty(copy + ceil(self.lines * self.width, 8), dtype=torch.int64)
        bands = work.data_ptr()
        mask_at = bands + 8 * copy
        plan = array_of("q", (
            0, 0, mask.data_ptr(), self.lines, self.width, self.most_sites, threads, bands, bands + 8 * line_counts,
            chain, self.samples, self.elements, self.numbers, mask_at,
        ))  # fmt: skip
        _run_plan.start(torch.float32, 1, plan)
        band_count, active = work[:2].tolist()
        if active == 0:
            fill_all(out, inactive, in_place)
            return
        elements, numbers, threads = plan[11], plan[12], workers(band_count)
        rows, index = out, None
        if in_place:
            # Neighbouring bands still read what this one would overwrite.
            rows = torch.empty(active, self.channels, dtype=self.dtype)
            index = torch.empty(active, dtype=torch.int32)
        scratch = torch.empty(threads * (self.compute_size * elements + 4 * numbers), dtype=torch.uint8)
        at = scratch.data_ptr()
        arguments[2], arguments[3] = input.data_ptr(), rows.data_ptr()
        arguments[4], arguments[5] = address(residual), mask_at
        arguments[6], arguments[9], arguments[11] = address(gate), address(inactive), bands
        arguments[12], arguments[13] = 0 if in_place else 1 if inactive is None else 2, self.is_large
        arguments[14], arguments[15], arguments[16], arguments[17] = in_place, address(index), at, elements
        arguments[18], arguments[19] = at + threads * self.compute_size * elements, 4 * numbers
        arguments[25] = bands + 8 * state
        _run_chain.start(self.dtype, threads, arguments)
        if in_place:
            out.permute(0, 2, 3, 1).reshape(-1, self.channels).index_copy_(0, index.long(), rows)


def _is_depthwise(stage: Stage) -> bool:
    return is_depthwise((stage.filters, stage.channels // stage.groups), stage.groups)
