"""Gathered convolution on the CPU: for each sample, the convolution of the channels it keeps, and no others.

Kept channels lie side by side: `pack` copies what a sample keeps of each row (pixel or site) of a tensor, and the
products run over these rows, so that their cost is kept in * kept out. For each sample n and group, with K the kept
input channels, F the kept output channels, and the neighbour table `table[site, tap]` (-1: padding):

    forward       out[n, site, F] = activation(gate * (sum over taps of x[n, table[site, tap], K] @ W[tap][K, F]
                                                       + bias[F]) + residual[n, site, F])
    input grad    dx[n, pixel, K] = sum over taps of g[n, readers[pixel, tap], F] @ W[tap][K, F]^T
    weight grad   dW[tap][K, F]  += x[n, table[., tap], K]^T @ g[n, ., F]

The first two are one kernel: `readers[pixel, tap]` is the site that reads a pixel through a tap. Without a list of rows
all samples share one table of one sample; a list of active rows comes with a table of its own, and each sample's share
of it. Everything a call writes, zeros of the other channels included, is written once; rows that are not listed are
left alone. The order of every sum follows from the shapes and what is kept alone: the same bits on any number of
threads.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import sites
from ._common import (
    SERIAL,
    add,
    ceil,
    clear,
    copy,
    gather_scattered,
    lower_bound,
    multiply_scattered,
    pack_panel,
    vector_lanes,
)
from ._layout import Compute, Flag, Int32, Storage
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .llvm.activations import ACTIVATIONS, epilogue_row
from .llvm.build import TILE_VECTORS
from .llvm.elements import is_given, load, positive, prefetch, store, transpose_vectors
from .llvm.tiles import ROWS, multiply_transposed_tile

# In elements, as for masked convolution: a chunk's gathered rows and a tile's columns of the weight stay in the cache.
GATHERED = 64 * 1024
DEPTH = 1152
MOST_ROWS = 96
WEIGHT_ROWS = 128  # rows of a chunk of the weight's gradient, and
SUMMED_CHUNKS = 8  # chunks that one running sum adds up
AHEAD = 8  # rows that are asked for ahead of the one that is copied
SHORT = 6  # channels of a run that is not worth a copy of its own, on average
FILTERS = 48  # output channels of a piece of the weight's gradient


@njit
def _kept(index, at, count, begin, end):
    """The places, among a sample's kept channels index[at:at + count], of those in begin..end."""
    first = lower_bound(index[at:], count, begin)
    return first, lower_bound(index[at:], count, end)


@njit
def _find_runs(index, at, first, end, runs, to):
    """runs[to:] = place and length of each run of neighbouring channels in index[at + first:at + end]; their number."""
    number, place = 0, first
    while place < end:
        length = 1
        while place + length < end and index[at + place + length] == index[at + place] + length:
            length += 1
        runs[to + 2 * number], runs[to + 2 * number + 1] = place, length
        number += 1
        place += length
    return number


@njit
def _copy_kept(source, at, index, index_at, runs, run_at, run_count, count, target, to, lanes, compute):
    """target[to + i] = source[at + index[index_at + i]] for `count` channels, `run_count` runs; see `_find_runs`."""
    if run_count * SHORT > count:
        for i in range(count):
            store(target, to + i, load(source, at + np.int64(index[index_at + i]), compute))
        return
    for r in range(run_at, run_at + 2 * run_count, 2):
        place, length = np.int64(runs[r]), np.int64(runs[r + 1])
        copy(source, at + np.int64(index[index_at + place]), length, target, to + place, lanes, compute)


@kernel
def _pack_kernel(
    shared, compute, source: Storage, packed: Compute, index: Int32, counts: Int32, all_runs: Int32, listed: Int32,
    starts: Int32, is_compact: Flag, samples, rows, channels, width, lanes, chunk_rows, most, is_packed: Flag,
):  # fmt: skip
    """Each row's kept channels of `source`, one row behind the other in the sample's share of `packed`.

    A row keeps its place among the sample's rows, or (`is_compact`) has that of its entry in the list.
    """
    has_list = is_given(listed)
    chunks = (rows + chunk_rows - 1) // chunk_rows
    runs = next_worker(shared) * 2 * channels
    while True:
        item = next_item(shared)
        if item >= samples * chunks:
            return
        sample = item // chunks
        begin, end = sample * rows, (sample + 1) * rows
        if has_list:
            begin, end = np.int64(starts[sample]), np.int64(starts[sample + 1])
        count, at, number = np.int64(counts[sample]), sample * channels, 0
        share = (begin if has_list and is_compact else sample * rows) * (most - count)
        begin += item % chunks * chunk_rows
        end = min(end, begin + chunk_rows)
        if begin < end and not is_packed:
            number = _find_runs(index, at, 0, count, all_runs, runs)
        for m in range(begin, end):
            row = np.int64(listed[m]) if has_list else m
            target = share + (m if is_compact else row) * count
            # Rows with gaps are no stream that the hardware would see: it waits for each line.
            for r in range(runs, runs + 2 * number, 2):
                ahead = (row + AHEAD) * width + np.int64(index[at + all_runs[r]])
                for c in range(0, np.int64(all_runs[r + 1]), positive(lanes)):
                    prefetch(source, ahead + c)
            if is_packed:
                copy(source, row * width, count, packed, target, lanes, compute)
            else:
                _copy_kept(
                    source, row * width, index, at, all_runs, runs, number, count, packed, target, lanes, compute
                )  # fmt: skip


@njit
def _pack_weight(
    weight, taps, channels, base, in_index, in_at, ins, runs, run_at, run_count, out_index, out_at, outs, target,
    compact, packed, lanes, compute,
):  # fmt: skip
    """One sample's share of a group's weight as target[packed:] [panel of output channels, tap, input channel, lane].

    The kept channels are in_index[in_at:in_at + ins] and out_index[out_at:out_at + outs], `runs` those of the former,
    `base` the group's first input channel. target[compact:] holds a panel's rows, where they are not already one by
    one in the weight.
    """
    depth, row = taps * ins, taps * channels
    are_vectors = True
    for r in range(run_at, run_at + 2 * run_count, 2):
        are_vectors = are_vectors and runs[r + 1] % lanes == 0
    for panel in range((outs + lanes - 1) // lanes):
        first = out_at + panel * lanes
        to, valid = packed + panel * lanes * depth, min(lanes, outs - panel * lanes)
        if are_vectors and valid == lanes and out_index[first + lanes - 1] == out_index[first] + lanes - 1:
            for tap in range(taps):
                source = np.int64(out_index[first]) * row + tap * channels - base
                k = tap * ins
                for r in range(run_at, run_at + 2 * run_count, 2):
                    at = source + np.int64(in_index[in_at + runs[r]])
                    for c in range(0, np.int64(runs[r + 1]), positive(lanes)):
                        transpose_vectors(weight, at + c, row, target, to + k * lanes)
                        k += lanes
            continue
        for out in range(valid):
            k = compact + out * depth
            for tap in range(taps):
                source = np.int64(out_index[first + out]) * row + tap * channels - base
                _copy_kept(weight, source, in_index, in_at, runs, run_at, run_count, ins, target, k, lanes, compute)
                k += ins
        pack_panel(target, compact, valid, depth, 0, depth, target, to, lanes, compute)


@njit
def _pack_transposed_weight(
    weight, taps, channels, base, in_index, in_at, ins, out_index, out_at, outs, target, packed, lanes, compute
):
    """A sample's share of a group's weight as target[packed:] [panel of input channels, tap, output channel, lane]."""
    for panel in range((ins + lanes - 1) // lanes):
        first, valid = in_at + panel * lanes, min(lanes, ins - panel * lanes)
        is_run = in_index[first + valid - 1] == in_index[first] + valid - 1
        for tap in range(taps):
            for out in range(outs):
                source = (np.int64(out_index[out_at + out]) * taps + tap) * channels - base
                to = packed + ((panel * taps + tap) * outs + out) * lanes
                if is_run:
                    copy(weight, source + np.int64(in_index[first]), valid, target, to, lanes, compute)
                else:
                    for lane in range(valid):
                        at = source + np.int64(in_index[first + lane])
                        store(target, to + lane, load(weight, at, compute))
                clear(target, to + valid, lanes - valid, compute)


@kernel
def _products_kernel(
    shared, compute, source: Compute, out: Storage, weight: Storage, bias: Compute, gate: Compute, residual: Storage,
    activation, table: Int32, listed: Int32, starts: Int32, from_index: Int32, from_counts: Int32, to_index: Int32,
    to_counts: Int32, samples, taps, from_rows, to_rows, from_width, to_width, from_stride, to_stride,
    to_is_packed: Flag, groups, lanes, is_transposed: Flag, parts, part_rows, scratch: Compute, scratch_size,
    all_runs: Int32, compact_size, packed_size, products_size, gathered_size, runs_size, is_tight: Flag,
    source_starts: Int32,
):  # fmt: skip
    """The forward, and the input's gradient, whose source is the output's gradient (`is_transposed`)."""
    has_gate, has_residual, has_list = is_given(gate), is_given(residual), is_given(listed)
    is_compact = is_given(source_starts)
    from_channels, to_channels = from_width // groups, to_width // groups
    worker = next_worker(shared)
    runs = worker * 2 * (from_width + to_width)
    compact = worker * scratch_size
    packed = compact + compact_size
    products = packed + packed_size
    gathered = products + products_size
    is_run = gathered + gathered_size
    shift = is_run + runs_size  # of the kept channels, then their gates, a whole row, and zeros
    gates = shift + to_channels
    whole = gates + to_channels
    zeros = whole + to_channels
    clear(scratch, zeros, to_channels, compute)
    before = -1
    kept, first, filters, to_first, to_end, to_runs, to_number = 0, 0, 0, 0, 0, runs, 0
    while True:
        item = next_item(shared)
        if item >= samples * groups * parts:
            return
        unit, part = item // parts, item % parts
        sample, group = unit // groups, unit % groups
        begin, end_row = 0, to_rows
        if has_list:
            begin, end_row = np.int64(starts[sample]), np.int64(starts[sample + 1])
        begin += part * part_rows
        end_row = min(end_row, begin + part_rows)
        if begin >= end_row:
            continue
        from_at, to_at = sample * from_width, sample * to_width
        if unit != before:
            before = unit
            first, end = _kept(
                from_index, from_at, np.int64(from_counts[sample]), group * from_channels, (group + 1) * from_channels
            )
            to_first, to_end = _kept(
                to_index, to_at, np.int64(to_counts[sample]), group * to_channels, (group + 1) * to_channels
            )
            kept, filters = end - first, to_end - to_first
            to_runs = runs + 2 * from_width
            to_number = _find_runs(to_index, to_at, to_first, to_end, all_runs, to_runs)
            if is_transposed:
                _pack_transposed_weight(
                    weight=weight, taps=taps, channels=to_channels, base=group * to_channels, in_index=to_index,
                    in_at=to_at + to_first, ins=filters, out_index=from_index, out_at=from_at + first, outs=kept,
                    target=scratch, packed=packed, lanes=lanes, compute=compute,
                )  # fmt: skip
            else:
                number = _find_runs(from_index, from_at + first, 0, kept, all_runs, runs)
                _pack_weight(
                    weight=weight, taps=taps, channels=from_channels, base=group * from_channels, in_index=from_index,
                    in_at=from_at + first, ins=kept, runs=all_runs, run_at=runs, run_count=number, out_index=to_index,
                    out_at=to_at + to_first, outs=filters, target=scratch, compact=compact, packed=packed, lanes=lanes,
                    compute=compute,
                )  # fmt: skip
            for c in range(filters):
                channel = np.int64(to_index[to_at + to_first + c])
                factor = gate[to_at + channel] if has_gate else compute(1)
                scratch[gates + c], scratch[shift + c] = factor, bias[channel] * factor
        panels = (filters + lanes - 1) // lanes
        width = panels * lanes
        block_taps = max(1, min(taps, DEPTH // max(1, kept)))
        blocks = (taps + block_taps - 1) // block_taps
        block_taps = (taps + blocks - 1) // blocks
        chunk_rows = max(ROWS, min(MOST_ROWS, GATHERED // max(1, block_taps * kept)) // ROWS * ROWS)
        stride = np.int64(from_counts[sample]) if is_tight else from_stride
        # A list's table counts the rows of the batch, the other one those of a sample.
        begins = np.int64(source_starts[sample]) if is_compact else sample * from_rows
        source_at = first + begins * (from_stride - (stride if has_list else 0))
        for first_row in range(begin, end_row, positive(chunk_rows)):
            rows = min(chunk_rows, end_row - first_row)
            if kept == 0:
                clear(scratch, products, rows * width, compute)
            for first_tap in range(0, taps if kept > 0 and filters > 0 else 0, positive(block_taps)):
                tap_count = min(block_taps, taps - first_tap)
                entry = first_row * taps + first_tap
                gather_scattered(
                    source=source[source_at:], width=stride, channels=kept, table=table, entry=entry, taps=taps,
                    rows=rows, tap_count=tap_count, target=scratch, at=gathered, runs=is_run, lanes=lanes,
                    compute=compute,
                )  # fmt: skip
                multiply_scattered(
                    source=source[source_at:], width=stride, channels=kept, table=table, entry=entry, taps=taps,
                    rows=rows, tap_count=tap_count, a=scratch, at=gathered, runs=is_run, accumulate=first_tap > 0,
                    weights=scratch, weight_at=packed + first_tap * kept * lanes, panel_stride=taps * kept * lanes,
                    panels=panels, products=scratch, products_at=products, product_width=width, lanes=lanes,
                    compute=compute,
                )  # fmt: skip
            for r in range(rows):
                m = first_row + r
                row = np.int64(listed[m]) if has_list else sample * to_rows + m
                value = products + r * width
                if has_gate:
                    for c in range(filters):
                        scratch[value + c] *= scratch[gates + c]
                if to_is_packed:
                    at = row * to_stride
                    epilogue_row(
                        scratch, value, scratch, shift, compute(1), residual, 0, out, at + to_first, filters,
                        activation,
                    )  # fmt: skip
                    if group == groups - 1:
                        clear(out, at + to_end, to_stride - to_end, compute)
                    continue
                at = row * to_stride + group * to_channels
                if to_number * SHORT > filters and not has_residual and activation == 0:
                    clear(out, at, to_channels, compute)
                    for c in range(filters):
                        to = at + np.int64(to_index[to_at + to_first + c]) - group * to_channels
                        store(out, to, load(scratch, value + c, compute) + scratch[shift + c])
                    continue
                if to_number * SHORT > filters or (has_residual and filters < to_channels):
                    clear(scratch, whole, to_channels, compute)
                    for c in range(filters):
                        to = whole + np.int64(to_index[to_at + to_first + c]) - group * to_channels
                        scratch[to] = scratch[value + c] + scratch[shift + c]
                    epilogue_row(
                        scratch, whole, scratch, zeros, compute(1), residual, at if has_residual else 0, out, at,
                        to_channels, activation,
                    )  # fmt: skip
                    continue
                channel = 0
                for run in range(to_runs, to_runs + 2 * to_number, 2):
                    place, length = np.int64(all_runs[run]), np.int64(all_runs[run + 1])
                    start, place = np.int64(to_index[to_at + place]) - group * to_channels, place - to_first
                    clear(out, at + channel, start - channel, compute)
                    epilogue_row(
                        scratch, value + place, scratch, shift + place, compute(1), residual,
                        at + start if has_residual else 0, out, at + start, length, activation,
                    )  # fmt: skip
                    channel = start + length
                clear(out, at + channel, to_channels - channel, compute)


@kernel
def _weight_grad_kernel(
    shared, compute, source: Compute, grad: Compute, total: Compute, table: Int32, in_index: Int32, in_counts: Int32,
    out_index: Int32, out_counts: Int32, samples, taps, pixels, sites, cin, cout, groups, lanes, scratch: Compute,
    scratch_size, pieces, in_most, out_most, all_runs: Int32, starts: Int32, is_tight: Flag,
):  # fmt: skip
    """Each piece, a tap and some of a group's output channels, goes through the samples in order."""
    has_list = is_given(starts)
    channels, filters = cin // groups, cout // groups
    worker = next_worker(shared)
    gathered, runs = worker * scratch_size, worker * 2 * TILE_VECTORS * lanes
    products = gathered + WEIGHT_ROWS * TILE_VECTORS * lanes
    while True:
        item = next_item(shared)
        if item >= groups * taps * pieces:
            return
        group, tap, piece = item // (taps * pieces), item // pieces % taps, item % pieces
        first_filter = group * filters + piece * FILTERS
        end_filter = min((group + 1) * filters, first_filter + FILTERS)
        for sample in range(samples):
            in_at, out_at = sample * cin, sample * cout
            first, end = _kept(in_index, in_at, np.int64(in_counts[sample]), group * channels, (group + 1) * channels)
            out_first, out_end = _kept(out_index, out_at, np.int64(out_counts[sample]), first_filter, end_filter)
            kept, outs, begin, end_row = end - first, out_end - out_first, 0, sites
            source_at, grad_at = first, out_first
            in_stride = np.int64(in_counts[sample]) if is_tight else in_most
            out_stride = np.int64(out_counts[sample])
            source_at += sample * pixels * in_most
            grad_at += sample * sites * out_most
            if has_list:  # its table counts the pixels of the batch, and its gradient is compact
                begin, end_row = np.int64(starts[sample]), np.int64(starts[sample + 1])
                source_at -= sample * pixels * in_stride
                grad_at += begin * (out_most - out_stride) - sample * sites * out_most
            for column in range(0, kept if outs > 0 else 0, positive(TILE_VECTORS * lanes)):
                valid = min(TILE_VECTORS * lanes, kept - column)
                vectors = (valid + lanes - 1) // lanes
                width = vectors * lanes
                number = _find_runs(in_index, in_at + first + column, 0, valid, all_runs, runs)
                for first_row in range(begin, end_row, WEIGHT_ROWS):
                    rows = min(WEIGHT_ROWS, end_row - first_row)
                    for r in range(rows):
                        pixel = np.int64(table[(first_row + r) * taps + tap])
                        to, size = gathered + r * width, valid if pixel >= 0 else 0
                        copy(source, source_at + pixel * in_stride + column, size, scratch, to, lanes, compute)
                        clear(scratch, to + size, width - size, compute)
                    chunk = (first_row - begin) // WEIGHT_ROWS
                    for out in range(0, outs, ROWS):
                        multiply_transposed_tile(
                            vectors,
                            grad, grad_at + first_row * out_stride + out, out_stride,
                            scratch, gathered,
                            scratch, products + out * width, width,
                            rows, chunk % SUMMED_CHUNKS > 0,
                        )  # fmt: skip
                    # A sum over all sites, one by one, would lose what sums of sums keep.
                    if chunk % SUMMED_CHUNKS < SUMMED_CHUNKS - 1 and first_row + rows < end_row:
                        continue
                    for out in range(outs):
                        row = (np.int64(out_index[out_at + out_first + out]) * taps + tap - group) * channels
                        if number * SHORT > valid:
                            for c in range(valid):
                                to = row + np.int64(in_index[in_at + first + column + c])
                                total[to] += scratch[products + out * width + c]
                            continue
                        for r in range(runs, runs + 2 * number, 2):
                            place, length = np.int64(all_runs[r]), np.int64(all_runs[r + 1])
                            to = row + np.int64(in_index[in_at + first + column + place])
                            at = products + out * width + place
                            add(scratch, at, length, compute(1), total, to, lanes, compute)


Channels = tuple[Tensor, Tensor]  # index [N, C] and count [N] of an ActiveChannels
Listed = tuple[Tensor, Tensor]  # index of the active rows of a batch; int32 [N + 1], where each sample's begin


@functools.lru_cache(64)
def _table(is_transposed: bool, geometry: tuple[int, ...]) -> Tensor:
    """[site, tap]: the pixel of one sample that a site reads, or -1; transposed [pixel, tap]: the site reading it."""
    site, pixel = (torch.arange(h * w, dtype=torch.int32) for h, w in (geometry[:2], geometry[2:4]))
    rows = pixel if is_transposed else site
    count = torch.tensor([rows.numel()], dtype=torch.int32)
    if is_transposed:
        return sites.readers(pixel, count, geometry, site)
    return sites.neighbours(site, count, geometry)


def _buffer(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width], uninitialised; tiles may read past the last row."""
    return torch.empty(rows * width + ROWS, dtype=dtype)[: rows * width].view(rows, width)


def pack(
    tensor: Tensor, kept: Channels, listed: Listed | None = None, is_compact: bool = False, is_packed: bool = False
) -> Tensor:
    """The kept channels of each row of a channels_last tensor [N, C, H, W], side by side, in the compute type.

    [N * H * W, the most channels that any sample keeps]; "tight": a sample that keeps fewer has its rows one behind the
    other at the beginning of its share. What lies behind is not initialised. With a list of rows, those alone, at their
    own place or (`is_compact`) in the order of the list. `is_packed`: the tensor's channels are the kept ones already.
    """
    index, count = kept
    samples, channels = index.shape
    rows, chunk_rows = tensor.shape[2] * tensor.shape[3], 256
    most = int(count.max())
    packed = _buffer(samples * rows, most, compute_type(tensor.dtype))
    threads = workers(min(samples * rows * most // SERIAL, samples * ceil(rows, chunk_rows)))
    runs = torch.empty(threads * 2 * channels, dtype=torch.int32)
    listed, starts = listed or (None, None)
    _pack_kernel(
        tensor.dtype, threads, source=tensor, packed=packed, index=index, counts=count, all_runs=runs, listed=listed,
        starts=starts, is_compact=is_compact, samples=samples, rows=rows, channels=channels, width=tensor.shape[1],
        lanes=vector_lanes(tensor.dtype), chunk_rows=chunk_rows, most=most, is_packed=is_packed,
    )  # fmt: skip
    return packed


def rows_of(tensor: Tensor) -> Tensor:
    """A channels_last tensor [N, C, H, W] as [N * H * W, C] in the compute type."""
    return tensor.permute(0, 2, 3, 1).flatten(0, 2).to(compute_type(tensor.dtype)).contiguous()


def products(
    source: Tensor,
    source_channels: Channels,
    channels: Channels,
    weight: Tensor,
    out: Tensor,
    groups: int,
    geometry: tuple[int, ...],
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    is_transposed: bool = False,
    is_packed: bool = False,
    is_tight: bool = True,
    listed: Listed | None = None,
    source_listed: Listed | None = None,
    table: Tensor | None = None,
) -> None:
    """Write the convolution of the `source_channels`, as `pack` or `rows_of` leave them, to the `channels` of `out`.

    `out` is channels_last; its other channels become activation(residual), or zero; where `is_packed`, its channels are
    the kept ones, and zeros. Where `is_transposed`, `source` is of the output's gradient and `out` the input's. Of
    listed rows, only they are written, `table` being theirs; `source_listed` is the list of a compact source.
    `geometry`: Ho, Wo, H, W, kernel, stride, padding and dilation, two numbers each. `bias` [Cout], `gate` [N, Cout],
    `residual` as `out`.
    """
    dtype, compute = out.dtype, compute_type(out.dtype)
    lanes, threads = vector_lanes(dtype), torch.get_num_threads()
    weight = weight.contiguous(memory_format=torch.channels_last)
    sizes = [geometry[0] * geometry[1], geometry[2] * geometry[3]]
    to_rows, from_rows = sizes[::-1] if is_transposed else sizes
    if to_rows == 0:
        return
    samples, to_width = channels[0].shape
    from_width, taps = source_channels[0].shape[1], geometry[4] * geometry[5]
    # Threads share a sample where there are few, each with the sample's weight packed for itself.
    units = samples * groups
    parts = 1 if units >= 4 * threads else min(ceil(4 * threads, max(1, units)), ceil(to_rows, 4 * ROWS))
    part_rows = ceil(ceil(to_rows, parts), ROWS) * ROWS
    parts = ceil(to_rows, part_rows)
    threads = workers(units * parts)
    most_from = min(from_width // groups, int(source_channels[1].max()))
    most_to = min(to_width // groups, int(channels[1].max()))
    columns = ceil(most_to, lanes) * lanes
    weights, compact = taps * most_from * columns, taps * most_from * lanes
    gathered = max(GATHERED, ROWS * max(DEPTH, most_from))
    product = (MOST_ROWS + ROWS) * columns
    size = compact + weights + product + gathered + MOST_ROWS + 4 * (to_width // groups)
    scratch = torch.empty(threads * size, dtype=compute)
    runs = torch.empty(threads * 2 * (from_width + to_width), dtype=torch.int32)
    bias = torch.zeros(to_width, dtype=compute) if bias is None else bias.to(compute).contiguous()
    gate = None if gate is None else gate.to(compute).contiguous()
    table = _table(is_transposed, geometry) if table is None else table
    listed, starts = listed or (None, None)
    _products_kernel(
        dtype, threads, source=source, out=out, weight=weight, bias=bias, gate=gate, residual=residual,
        activation=ACTIVATIONS.index(activation), table=table, listed=listed, starts=starts,
        from_index=source_channels[0], from_counts=source_channels[1], to_index=channels[0], to_counts=channels[1],
        samples=samples, taps=taps, from_rows=from_rows, to_rows=to_rows, from_width=from_width, to_width=to_width,
        from_stride=source.shape[1], to_stride=out.shape[1], to_is_packed=is_packed, groups=groups, lanes=lanes,
        is_transposed=is_transposed, parts=parts, part_rows=part_rows, scratch=scratch, scratch_size=size,
        all_runs=runs, compact_size=compact, packed_size=weights, products_size=product, gathered_size=gathered,
        runs_size=MOST_ROWS, is_tight=is_tight, source_starts=source_listed and source_listed[1],
    )  # fmt: skip


def weight_grad(
    source: Tensor,
    grad: Tensor,
    ins: Channels,
    outs: Channels,
    weight: Tensor,
    groups: int,
    geometry: tuple[int, ...],
    listed: Listed | None = None,
    table: Tensor | None = None,
    is_tight: bool = True,
) -> Tensor:
    """The weight's gradient, of its type and strides, from the input and the gradient as `pack` leaves them.

    Of listed sites, `grad` is compact and `table` theirs. The input may be that of `rows_of`, which is not tight.
    """
    compute, lanes = source.dtype, vector_lanes(source.dtype)
    cout, channels, height, width = weight.shape
    total = torch.zeros(weight.shape, dtype=compute).contiguous(memory_format=torch.channels_last)
    pixels, outputs, samples = geometry[2] * geometry[3], geometry[0] * geometry[1], ins[0].shape[0]
    pieces = ceil(cout // groups, FILTERS)
    threads = workers(groups * height * width * pieces)
    size = (WEIGHT_ROWS + FILTERS) * TILE_VECTORS * lanes
    scratch = torch.empty(threads * size, dtype=compute)
    runs = torch.empty(threads * 2 * TILE_VECTORS * lanes, dtype=torch.int32)
    table = _table(False, geometry) if table is None else table
    _weight_grad_kernel(
        compute, threads, source=source, grad=grad, total=total, table=table, in_index=ins[0], in_counts=ins[1],
        out_index=outs[0], out_counts=outs[1], samples=samples, taps=height * width, pixels=pixels, sites=outputs,
        cin=channels * groups, cout=cout, groups=groups, lanes=lanes, scratch=scratch, scratch_size=size, pieces=pieces,
        in_most=source.shape[1], out_most=grad.shape[1], all_runs=runs, starts=listed and listed[1], is_tight=is_tight,
    )  # fmt: skip
    if total.dtype == weight.dtype and total.stride() == weight.stride():
        return total
    return torch.empty_like(weight).copy_(total)


def bias_grad(grad: Tensor, outs: Channels, listed: Listed | None) -> Tensor:
    """[C] in the compute type: the sums of `grad`, as `pack` leaves it (compact, where listed), over its rows."""
    index, count = outs
    samples, width = index.shape
    rows, most = grad.shape
    bounds = range(0, rows + 1, rows // samples) if listed is None else listed[1].tolist()
    values, total = grad.view(-1), grad.new_zeros(width)
    for channels, kept, (begin, end) in zip(index, count.tolist(), itertools.pairwise(bounds)):
        share = values[begin * most : begin * most + (end - begin) * kept].view(end - begin, kept)
        total[channels[:kept].long()] += share.sum(0)
    return total
