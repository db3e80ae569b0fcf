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
from numba import njit
from torch import Tensor

from .._geometry import is_depthwise
from ..sites import fill
from . import masked_conv
from ._common import (
    Skipped,
    array,
    ceil,
    clamped_rows,
    gather_rows,
    multiply_rows,
    skipped_sites,
    vector_lanes,
)
from ._layout import Compute, Flag, Int32, Result, Storage, UInt8, record
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .llvm.activations import ACTIVATIONS, epilogue_row
from .llvm.build import STENCIL_ROWS
from .llvm.elements import address_of, fill_elements, is_given, merge_bytes, positive
from .llvm.stencils import stencil_rows
from .llvm.tiles import ROWS
from .packing import packed_weight

BAND_BYTES = 1 << 19  # of features between two layers: half of a 1 MiB L2
_MOST_ROWS = 96
_MOST_BANDS, MOST_STAGES = 1024, 16  # bands, and layers, that the kernels have room for


class _Layer(NamedTuple):
    """A layer as the kernels see it."""

    weight_at: int  # the addresses of what `prepare` has made
    bias_at: int
    channels: int
    filters: int
    groups: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    pad_y: int
    pad_x: int
    dilation_y: int
    dilation_x: int
    height: int
    width: int
    out_height: int
    out_width: int
    is_pointwise: int
    is_depthwise: int
    activation: int
    block_taps: int  # whose products are summed up at a time
    # What the plan lays out: where in a thread's memory the lists of its sites and its rows begin, and how many
    # places of the output the largest band has.
    lists: int
    rows: int
    places: int


_SIZE, _PLACE = len(_Layer._fields), _Layer(*range(len(_Layer._fields)))  # of a layer's numbers, and each one's place
_read_layer = record(_Layer)


@kernel
def _plan_kernel(
    mask: UInt8, kept_at, lines, width, most_sites, threads, bands_at, counts_at, layers_at, layer_count, samples,
    band_count: Result, active: Result, elements: Result, entries: Result,
):  # fmt: skip
    """Copy the mask's bytes, of which any but zero is true, as zeros and ones.

    Then cut the lines into bands of about the same number of active sites, as many bands for each thread and none of
    more than `most_sites` if the lines allow it: bands[b] = (first line, end, sites before). Then lay out what a thread
    needs for the largest, behind what is there already: the features between two layers, of `elements` so far, and the
    lists of sites, of `entries` int32 so far. Both, with all of it, come back in the same places.
    """
    kept, bands, counts = array(kept_at, np.uint8), array(bands_at, np.int64), array(counts_at, np.int32)
    for place in range(lines * width):
        kept[place] = mask[place] != 0
    total = 0
    for line in range(lines):
        start, count = kept_at + line * width, 0
        words, bytes_ = array(start, np.uint64), array(start, np.uint8)
        for word in range(width // 8):  # each byte is 0 or 1: the product adds them up in its highest byte
            count += np.int64((words[word] * np.uint64(0x0101010101010101)) >> np.uint64(56))
        for x in range(width // 8 * 8, width):
            count += bytes_[x]
        counts[line] = count
        total += count
    wanted = min(_MOST_BANDS - 1, max(1, (total + most_sites * threads - 1) // (most_sites * threads)) * threads)
    target = max(1, (total + wanted - 1) // wanted)
    number, first, before, count, most_lines = 0, 0, 0, 0, 0
    for line in range(lines):
        count += counts[line]
        if line == lines - 1 or (count + counts[line + 1] // 2 >= target and number < _MOST_BANDS - 1):
            bands[3 * number], bands[3 * number + 1], bands[3 * number + 2] = first, line + 1, before
            most_lines = max(most_lines, line + 1 - first)
            before, count, first, number = before + count, 0, line + 1, number + 1
    band_count[0], active[0], layers, last = number, total, array(layers_at, np.int64), layer_count - 1
    for s in range(last, -1, -1):
        layer, at = _read_layer(layers, s * _SIZE), s * _SIZE
        places = min(most_lines, samples * layer.out_height) * layer.out_width
        layers[at + _PLACE.lists], layers[at + _PLACE.places] = entries[0], places
        layers[at + _PLACE.rows] = elements[0]
        entries[0] += 2 * places + places // 4 + 16
        if s < last:
            elements[0] += (places + ROWS) * layer.filters
        # Samples that a band spans are read whole between its first and its last.
        across = (most_lines + layer.out_height - 1) // layer.out_height * layer.height
        reach = (layer.kernel_height - 1) * layer.dilation_y + 1
        most_lines = min(samples * layer.height, (most_lines - 1) * layer.stride_y + reach + across)


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
def _spread(out_map, out_first, out_lines, in_map, in_first, layer):
    """Mark in `in_map` the pixels that the active sites of `out_map` read, of the layer that reads them."""
    kernel_height, kernel_width, stride_y, stride_x = (
        layer.kernel_height,
        layer.kernel_width,
        layer.stride_y,
        layer.stride_x,
    )
    pad_y, pad_x, dilation_y, dilation_x = layer.pad_y, layer.pad_x, layer.dilation_y, layer.dilation_x
    height, width, out_height, out_width = layer.height, layer.width, layer.out_height, layer.out_width
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
def _tabulate(sites, first, rows, set_first, rows_of_pixel, in_first, is_input, table, layer):
    """table[r, tap]: the row that the site sites[first + r] reads, or -1; a pixel of the input, if that is read."""
    kernel_height, kernel_width, stride_y, stride_x = (
        layer.kernel_height,
        layer.kernel_width,
        layer.stride_y,
        layer.stride_x,
    )
    pad_y, pad_x, dilation_y, dilation_x = layer.pad_y, layer.pad_x, layer.dilation_y, layer.dilation_x
    height, width, out_height, out_width = layer.height, layer.width, layer.out_height, layer.out_width
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
def _input_lines(first, last, layer):
    """The first line that the output line `first` reads, of its own sample, and the last one that `last` does."""
    above, below = first % layer.out_height * layer.stride_y - layer.pad_y, last % layer.out_height * layer.stride_y
    below += (layer.kernel_height - 1) * layer.dilation_y - layer.pad_y
    most = layer.height - 1
    return (
        first // layer.out_height * layer.height + min(most, max(0, above)),
        last // layer.out_height * layer.height + min(most, max(0, below)),
    )


@kernel
def _chain_kernel(
    shared, storage, compute, source: Storage, out: Storage, residual: Storage, gate: Compute, index: Int32, mask_at,
    bands_at, band_count, layers_at, layer_count, out_width, lanes, skipped: Skipped, is_packed: Flag, scratch: Compute,
    scratch_size, lists_at, lists_size, chunk_rows, gathered_size, zero_row: Compute, element_size, compute_size,
    state_at, state_size,
):  # fmt: skip
    """Each band, from the sites of its last layer to the rows of its output, or (`is_packed`) packed rows and `index`.

    A thread has `scratch_size` elements, `lists_size` int32 and `state_size` int64 of its own.
    """
    has_gate, has_residual = is_given(gate), is_given(residual)
    bands, layers = array(bands_at, np.int64), array(layers_at, np.int64)
    zeros, scratch_at, source_at = address_of(zero_row), address_of(scratch), address_of(source)
    nothing, infinity = array(0, compute), compute(np.inf)
    worker = next_worker(shared)
    gathered = worker * scratch_size
    products = gathered + gathered_size
    lists_at += 4 * worker * lists_size
    table = array(lists_at, np.int32)
    # In the caller's memory: Numba would count references to arrays of its own, atomically, at every use.
    state = state_at + 8 * worker * state_size
    counts, firsts, line_counts = array(state, np.int64), array(state + 128, np.int64), array(state + 256, np.int64)
    maps, lists, places = array(state + 384, np.int64), array(state + 512, np.int64), array(state + 640, np.int64)
    pixels = array(state + 768, np.int64)
    while True:
        band = next_item(shared)
        if band >= band_count:
            return
        # The sites of each layer, from the last to the first. Of layer s: its map of bytes, its list of sites and, by
        # place, their rows; a layer that the next one reads pixel by pixel has the sites of that one.
        last = layer_count - 1
        firsts[last], line_counts[last] = bands[3 * band], bands[3 * band + 1] - bands[3 * band]
        maps[last] = mask_at + firsts[last] * out_width
        for s in range(last, -1, -1):
            layer = _read_layer(layers, s * _SIZE)
            lists[s] = lists_at + 4 * layer.lists
            places[s] = lists[s] + 4 * layer.places
            if s < last:
                following = _read_layer(layers, (s + 1) * _SIZE)
                if following.is_pointwise != 0:
                    firsts[s], line_counts[s], maps[s] = firsts[s + 1], line_counts[s + 1], maps[s + 1]
                    lists[s], places[s], counts[s] = lists[s + 1], places[s + 1], counts[s + 1]
                    continue
                firsts[s], end = _input_lines(firsts[s + 1], firsts[s + 1] + line_counts[s + 1] - 1, following)
                line_counts[s] = end + 1 - firsts[s]
                maps[s] = places[s] + 4 * layer.places
                marked, read_by = array(maps[s], np.uint8), array(maps[s + 1], np.uint8)
                for place in range(line_counts[s] * layer.out_width):
                    marked[place] = 0
                _spread(read_by, firsts[s + 1], line_counts[s + 1], marked, firsts[s], following)
            counts[s] = _list_sites(
                array(maps[s], np.uint8), line_counts[s] * layer.out_width, array(lists[s], np.int32),
                array(places[s], np.int32),
            )  # fmt: skip
        for s in range(layer_count):
            layer = _read_layer(layers, s * _SIZE)
            weights, bias = array(layer.weight_at, compute), array(layer.bias_at, compute)
            cin, cout, groups = layer.channels, layer.filters, layer.groups
            taps, activation, block_taps = layer.kernel_height * layer.kernel_width, layer.activation, layer.block_taps
            channels, filters = cin // groups, cout // groups
            panels = (filters + lanes - 1) // lanes
            is_input, is_pointwise, is_depthwise = s == 0, layer.is_pointwise != 0, layer.is_depthwise != 0
            width = cin if is_depthwise else groups * panels * lanes
            read = 0 if is_input else worker * scratch_size + layers[(s - 1) * _SIZE + _PLACE.rows]
            rows_out = worker * scratch_size + layer.rows
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
                    _tabulate(sites, first, rows, firsts[s], rows_of_pixel, in_first, is_input, table, layer)
                if is_depthwise:
                    for r in range(0, rows, STENCIL_ROWS):
                        for i in range(STENCIL_ROWS):
                            entry = min(r + i, rows - 1) * taps
                            for tap in range(taps):
                                row = np.int64(table[entry + tap])
                                if row < 0:
                                    pixel = zeros
                                elif is_input:
                                    pixel = source_at + row * cin * element_size
                                else:
                                    pixel = scratch_at + (read + row * cin) * compute_size
                                pixels[tap * STENCIL_ROWS + i] = pixel
                        if is_clamp:
                            shift, least, most, target = bias, low, high, rows_out + (first + r) * cin
                        else:
                            shift, least, most, target = zero_row, -infinity, infinity, products + r * width
                        for i in range(STENCIL_ROWS):
                            row = min(i, rows - 1 - r)
                            pixels[taps * STENCIL_ROWS + i] = scratch_at + (target + row * cin) * compute_size
                        if is_input:
                            stencil_rows(pixels, source, weights, taps, cin, shift, least, most, scratch)
                        else:
                            stencil_rows(pixels, scratch, weights, taps, cin, shift, least, most, scratch)
                elif is_pointwise and not is_input:
                    depth = channels
                    if is_clamp:
                        clamped_rows(
                            a=scratch, at=read + first * cin, row=cin, rows=rows, depth=depth, weights=weights,
                            panel_stride=depth * lanes, panels=panels, shift=bias, low=low, high=high, out=scratch,
                            out_at=rows_out + first * cout, width=cout, lanes=lanes,
                        )  # fmt: skip
                        continue
                    multiply_rows(
                        a=scratch, at=read + first * cin, row=cin, group=channels, rows=rows, depth=depth,
                        accumulate=False, weights=weights, weight_at=0, panel_stride=depth * lanes,
                        group_stride=panels * depth * lanes, panels=panels, groups=groups, products=scratch,
                        products_at=products, width=width, lanes=lanes,
                    )  # fmt: skip
                else:
                    for first_tap in range(0, taps, positive(block_taps)):
                        tap_count = min(block_taps, taps - first_tap)
                        depth, stride = tap_count * channels, taps * channels * lanes
                        if is_input:
                            gather_rows(
                                source=source, width=cin, table=table, has_table=True, entry=first_tap, taps=taps,
                                rows=rows, tap_count=tap_count, channel=0, channels=channels, groups=groups,
                                target=scratch, at=gathered, lanes=lanes, compute=compute,
                            )  # fmt: skip
                        else:
                            gather_rows(
                                source=scratch, width=cin, table=table, has_table=True, entry=first_tap, taps=taps,
                                rows=rows, tap_count=tap_count, channel=read, channels=channels, groups=groups,
                                target=scratch, at=gathered, lanes=lanes, compute=compute,
                            )  # fmt: skip
                        if is_clamp:
                            clamped_rows(
                                a=scratch, at=gathered, row=depth, rows=rows, depth=depth, weights=weights,
                                panel_stride=stride, panels=panels, shift=bias, low=low, high=high, out=scratch,
                                out_at=rows_out + first * cout, width=cout, lanes=lanes,
                            )  # fmt: skip
                            continue
                        multiply_rows(
                            a=scratch, at=gathered, row=depth, group=rows * depth, rows=rows, depth=depth,
                            accumulate=first_tap > 0, weights=weights, weight_at=first_tap * channels * lanes,
                            panel_stride=stride, group_stride=panels * stride, panels=panels, groups=groups,
                            products=scratch, products_at=products, width=width, lanes=lanes,
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
                            position = bands[3 * band + 2] + first + r
                            index[position] = site
                            place = position * cout
                    for group in range(groups if not is_depthwise else 1):
                        channel, product = group * filters, products + r * width + group * panels * lanes
                        size = cout if is_depthwise else filters
                        if s < last:
                            epilogue_row(
                                scratch, product, bias, channel, scale, nothing, 0, scratch,
                                rows_out + place + channel, size, activation,
                            )  # fmt: skip
                        else:
                            at = site * cout + channel if has_residual else 0
                            epilogue_row(
                                scratch, product, bias, channel, scale, residual, at, out, place + channel, size,
                                activation,
                            )  # fmt: skip
        if skipped.fill != 0:
            cout = layers[last * _SIZE + _PLACE.filters]
            at, sites = firsts[last] * out_width, array(lists[last], np.int32)
            for m in range(counts[last] + 1):
                end = firsts[last] * out_width
                end += np.int64(sites[m]) if m < counts[last] else line_counts[last] * out_width
                if end > at:
                    fill_elements(skipped.inactive, out, at * cout, end * cout, skipped.is_large)
                at = end + 1


_PLANNED = slice(_plan_kernel.at.band_count, _plan_kernel.at.entries + 1)


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
        self.gathered_size, self.chunk_rows, self.lanes = gathered, chunk_rows, lanes
        self.elements, self.entries = gathered + chunk_rows * max(widths), chunk_rows * most_taps
        self.zeros = torch.zeros(max(stage.channels for stage in stages), dtype=compute)
        # No cache line of two threads.
        self.state_size = ceil(6 * MOST_STAGES + (most_taps + 1) * STENCIL_ROWS, 16) * 16
        self.layers = array_of("q")
        for number, stage in enumerate(stages):
            (kernel_height, kernel_width), (stride_y, stride_x) = stage.kernel, stage.stride
            (pad_y, pad_x), (dilation_y, dilation_x) = stage.padding, stage.dilation
            (height, width), (out_height, out_width) = sizes[number], sizes[number + 1]
            layer = _Layer(
                weight_at=stage.weight.data_ptr(), bias_at=stage.bias.data_ptr(), channels=stage.channels,
                filters=stage.filters, groups=stage.groups, kernel_height=kernel_height, kernel_width=kernel_width,
                stride_y=stride_y, stride_x=stride_x, pad_y=pad_y, pad_x=pad_x, dilation_y=dilation_y,
                dilation_x=dilation_x, height=height, width=width, out_height=out_height, out_width=out_width,
                is_pointwise=stage.kernel == stage.stride == (1, 1) and stage.padding == (0, 0),
                is_depthwise=_is_depthwise(stage), activation=ACTIVATIONS.index(stage.activation),
                block_taps=depths[number][0], lists=0, rows=0, places=0,
            )  # fmt: skip
            self.layers.extend(layer)

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
        threads, layers = torch.get_num_threads(), self.layers[:]
        layers_at, line_counts = layers.buffer_info()[0], 3 * _MOST_BANDS
        state = line_counts + ceil(self.lines, 32) * 16
        copy = state + threads * self.state_size
        work = torch.empty(copy + ceil(self.lines * self.width, 8), dtype=torch.int64)
        bands = work.data_ptr()
        mask_at = bands + 8 * copy
        plan = _plan_kernel.pack(
            mask=mask, kept_at=mask_at, lines=self.lines, width=self.width, most_sites=self.most_sites,
            threads=threads, bands_at=bands, counts_at=bands + 8 * line_counts, layers_at=layers_at,
            layer_count=len(self.stages), samples=self.samples, band_count=0, active=0, elements=self.elements,
            entries=self.entries,
        )  # fmt: skip
        _plan_kernel.start(torch.float32, 1, plan)
        band_count, active, elements, entries = plan[_PLANNED]
        if active == 0:
            fill(out, inactive, in_place)
            return
        threads, rows, index = workers(band_count), out, None
        if in_place:
            # Neighbouring bands still read what this one would overwrite.
            rows = torch.empty(active, self.channels, dtype=self.dtype)
            index = torch.empty(active, dtype=torch.int32)
        scratch = torch.empty(threads * (self.compute_size * elements + 4 * entries), dtype=torch.uint8)
        _chain_kernel(
            self.dtype, threads, source=input, out=rows, residual=residual, gate=gate, index=index, mask_at=mask_at,
            bands_at=bands, band_count=band_count, layers_at=layers_at, layer_count=len(self.stages),
            out_width=self.width, lanes=self.lanes, skipped=skipped_sites(out, inactive, in_place), is_packed=in_place,
            scratch=scratch, scratch_size=elements,
            lists_at=scratch.data_ptr() + threads * self.compute_size * elements, lists_size=entries,
            chunk_rows=self.chunk_rows, gathered_size=self.gathered_size, zero_row=self.zeros,
            element_size=self.dtype.itemsize, compute_size=self.compute_size, state_at=bands + 8 * state,
            state_size=self.state_size,
        )  # fmt: skip
        if in_place:
            out.permute(0, 2, 3, 1).reshape(-1, self.channels).index_copy_(0, index.long(), rows)


def _is_depthwise(stage: Stage) -> bool:
    return is_depthwise((stage.filters, stage.channels // stage.groups), stage.groups)
