"""Masked convolution on the CPU: three indexed matrix products over a neighbour table.

All geometry is in the table `table[site, tap]`: the row of the input (a pixel, or the place of a pixel among packed
features) that an active site reads through a tap, or -1 in the padding; no table at all is the 1x1 convolution of
features packed over the same sites. With X the input's rows [rows, Cin], G the output gradient's rows at the active
sites [sites, Cout] and W[tap] the filter's slices [Cin, Cout], for each of the groups:

    forward       out[row(m)] = activation(gate[m] * (sum over taps of X[table[m, tap]] @ W[tap]  +  bias) + residual)
    input grad    dX[table[m, tap]] += gate[m] * (G[m] @ W[tap]^T)
    weight grad   dW[tap] = sum over sites of (gate[m] * X[table[m, tap]])^T @ G[m]

row(m) is index[m] in a dense output and m in a packed one. Each does the FLOPs of the active sites and no others.
Work is cut so that no two threads write the same element, and the order of every sum follows from the shapes and the
mask alone: the same bits on any number of threads. Depthwise filters are a stencil instead, see `depthwise`.
"""

from __future__ import annotations

from array import array as array_of
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .._geometry import is_stencil
from . import stencil
from ._common import (
    SERIAL,
    add,
    address,
    array,
    ceil,
    clear,
    copy,
    fill_all,
    fill_skipped,
    filling,
    gather_rows,
    gather_scattered,
    lower_bound,
    multiply_rows,
    multiply_scattered,
    pack_panel,
    vector_lanes,
)
from ._llvm import (
    ACTIVATIONS,
    ROWS,
    TILE_VECTORS,
    fetch_add,
    finish_row,
    load,
    multiply_tile,
    multiply_transposed_tile,
    positive,
    store,
)
from ._threads import compute_type, kernel, workers
from .packing import Packing, packed_weight

# In elements; together they keep a chunk's gathered rows and one tile's columns of the weights in a 1 MiB L2.
GATHERED = 56 * 1024
DEPTH = 1152
_SUMMED_CHUNKS = 8  # of 128 rows, whose products one sum of the weight's gradient adds up


_FORWARD = 33  # int64 arguments of the forward kernel


@njit
def _forward_kernel(arguments, storage, compute):
    a = carray(arguments, (_FORWARD,))
    source, out, residual = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    packed, bias, gate = array(a[5], compute), array(a[6], compute), array(a[7], compute)
    table, index, weight = array(a[8], np.int32), array(a[9], np.int32), array(a[10], storage)
    has_packed, has_gate, has_table, has_residual = a[5] != 0, a[7] != 0, a[8] != 0, a[4] != 0
    sites, taps, cin, cout, groups, lanes = a[11], a[12], a[13], a[14], a[15], a[16]
    chunk_rows, chunks, split_groups, split_panels, splits, block_taps = a[17], a[18], a[19], a[20], a[21], a[22]
    is_direct, out_is_packed, activation = a[23] != 0, a[24] != 0, a[25]
    scratch, scratch_size = array(a[26], compute), a[27]
    fill, inactive, all_sites, is_large = a[28], array(a[29], storage), a[30], a[31] != 0
    rows_in_place = array(a[2], compute)
    channels, filters = cin // groups, cout // groups
    panels = (filters + lanes - 1) // lanes
    panel_splits = (panels + split_panels - 1) // split_panels
    gathered = fetch_add(a[1:], 1) * scratch_size
    products = gathered + (0 if is_direct else chunk_rows * block_taps * split_groups * channels)
    columns = products + chunk_rows * split_groups * split_panels * lanes
    reads_runs, runs = a[32] != 0, columns
    while True:
        item = fetch_add(a, 1)
        if item >= chunks * splits:
            return
        first, split = item // splits * chunk_rows, item % splits
        rows = min(chunk_rows, sites - first)
        first_group, first_panel = split // panel_splits * split_groups, split % panel_splits * split_panels
        item_groups, item_panels = min(split_groups, groups - first_group), min(split_panels, panels - first_panel)
        group_width = item_panels * lanes
        width = item_groups * group_width
        for first_tap in range(0, taps, positive(block_taps)):
            tap_count = min(block_taps, taps - first_tap)
            depth = tap_count * channels
            entry = first * taps + first_tap if has_table else first
            if reads_runs:
                gather_scattered(
                    source, cin, cin, table, entry, taps, rows, tap_count, scratch, gathered, runs, lanes, compute
                )  # fmt: skip
            elif not is_direct:
                gather_rows(
                    source, cin, table, has_table, entry, taps, rows, tap_count, first_group * channels, channels,
                    item_groups, scratch, gathered, lanes, compute,
                )  # fmt: skip
            start = first_tap * channels
            if is_direct:
                at = (first_group * panels + first_panel) * channels * lanes
                multiply_rows(
                    rows_in_place, first * cin + first_group * channels, cin, channels, rows, depth, False,
                    packed, at, channels * lanes, panels * channels * lanes, item_panels, item_groups,
                    scratch, products, width, lanes,
                )  # fmt: skip
            elif reads_runs:
                panel_stride = taps * channels * lanes
                multiply_scattered(
                    rows_in_place, cin, cin, table, entry, taps, rows, tap_count, scratch, gathered, runs,
                    first_tap > 0, packed, first_panel * panel_stride + start * lanes, panel_stride, item_panels,
                    scratch, products, width, lanes, compute,
                )  # fmt: skip
            elif has_packed:
                panel_stride = taps * channels * lanes
                at = (first_group * panels + first_panel) * panel_stride + start * lanes
                multiply_rows(
                    scratch, gathered, depth, rows * depth, rows, depth, first_tap > 0,
                    packed, at, panel_stride, panels * panel_stride, item_panels, item_groups,
                    scratch, products, width, lanes,
                )  # fmt: skip
            else:
                for panel in range(0, item_panels, TILE_VECTORS):
                    vectors = min(TILE_VECTORS, item_panels - panel)
                    for v in range(vectors):
                        filter_ = (first_panel + panel + v) * lanes
                        pack_panel(
                            weight, filter_ * taps * channels, min(lanes, filters - filter_), taps * channels, start,
                            start + depth, scratch, columns + v * depth * lanes, lanes, compute,
                        )  # fmt: skip
                    multiply_rows(
                        scratch, gathered, depth, 0, rows, depth, first_tap > 0,
                        scratch, columns, depth * lanes, 0, vectors, 1,
                        scratch, products + panel * lanes, width, lanes,
                    )  # fmt: skip
        if split == 0:
            fill_skipped(fill, inactive, out, index, first, rows, sites, all_sites, cout, is_large)
        for r in range(rows):
            site = np.int64(index[first + r])
            scale = gate[site] if has_gate else compute(1)
            row = (first + r if out_is_packed else site) * cout
            for g in range(item_groups):
                channel = (first_group + g) * filters + first_panel * lanes
                finish_row(
                    scratch, products + r * width + g * group_width, bias, channel, scale,
                    residual, row + channel if has_residual else 0, out, row + channel,
                    min(group_width, filters - first_panel * lanes), activation,
                )  # fmt: skip


@njit
def _gather_rows_kernel(arguments, storage, compute):
    a = carray(arguments, (16,))
    source, target, index = array(a[2], storage), array(a[3], compute), array(a[4], np.int32)
    sites, channels, chunk_rows, lanes = a[5], a[6], a[7], a[8]
    while True:
        first = fetch_add(a, 1) * chunk_rows
        if first >= sites:
            return
        for row in range(first, min(sites, first + chunk_rows)):
            copy(source, np.int64(index[row]) * channels, channels, target, row * channels, lanes, compute)


@njit
def _bias_grad_kernel(arguments, storage, compute):
    """One panel of channels at a time, its sum in the order of the sites."""
    a = carray(arguments, (16,))
    grad, gate, grad_bias = array(a[2], compute), array(a[3], compute), array(a[4], compute)
    index, has_gate = array(a[5], np.int32), a[3] != 0
    sites, channels, lanes = a[6], a[7], a[8]
    while True:
        channel = fetch_add(a, 1) * lanes
        if channel >= channels:
            return
        valid = min(lanes, channels - channel)
        clear(grad_bias, channel, valid, compute)
        for row in range(sites):
            scale = gate[np.int64(index[row])] if has_gate else compute(1)
            add(grad, row * channels + channel, valid, scale, grad_bias, channel, lanes, compute)


@njit
def _input_grad_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    grad, weights, grad_input = array(a[2], compute), array(a[3], compute), array(a[4], compute)
    gate, source, gate_grad = array(a[5], compute), array(a[6], storage), array(a[7], compute)
    table, index = array(a[8], np.int32), array(a[9], np.int32)
    has_grad_input, has_gate, has_gate_grad, has_table = a[4] != 0, a[5] != 0, a[7] != 0, a[8] != 0
    sites, taps, cin, cout, groups, lanes = a[10], a[11], a[12], a[13], a[14], a[15]
    band_sites, bands, colour, chunk_rows = a[16], a[17], a[18], a[19]
    scratch, scratch_size = array(a[20], compute), a[21]
    channels, filters = cin // groups, cout // groups
    panels = (channels + lanes - 1) // lanes
    tiles = (panels + TILE_VECTORS - 1) // TILE_VECTORS
    products = fetch_add(a[1:], 1) * scratch_size
    while True:
        item = fetch_add(a, 1)
        band, strip = item // (groups * tiles) * 2 + colour, item % (groups * tiles)
        if band >= bands:
            return
        group, tile = strip // tiles, strip % tiles
        vectors = min(TILE_VECTORS, panels - tile * TILE_VECTORS)
        width = vectors * lanes
        channel = group * channels + tile * TILE_VECTORS * lanes
        valid = min(width, channels - tile * TILE_VECTORS * lanes)
        begin = lower_bound(index, sites, band * band_sites)
        end = lower_bound(index, sites, (band + 1) * band_sites)
        for first in range(begin, end, positive(chunk_rows)):
            rows = min(chunk_rows, end - first)
            for tap in range(taps):
                weight_at = ((group * panels + tile * TILE_VECTORS) * taps + tap) * filters * lanes
                for r in range(0, rows, ROWS):
                    multiply_tile(
                        vectors,
                        grad, (first + r) * cout + group * filters, cout,
                        weights, weight_at, taps * filters * lanes,
                        scratch, products + r * width, width,
                        filters, False,
                    )  # fmt: skip
                for r in range(rows):
                    pixel = np.int64(table[(first + r) * taps + tap]) if has_table else first + r
                    if pixel < 0:
                        continue
                    at, product = pixel * cin + channel, products + r * width
                    if has_gate_grad:
                        total = compute(0)
                        for c in range(valid):
                            total += load(scratch, product + c, compute) * load(source, at + c, compute)
                        gate_grad[strip * sites + first + r] += total
                    if has_grad_input:
                        scale = gate[np.int64(index[first + r])] if has_gate else compute(1)
                        add(scratch, product, valid, scale, grad_input, at, lanes, compute)


@njit
def _weight_grad_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    source, grad_weight = array(a[2], storage), array(a[3], storage)
    grad, gate = array(a[4], compute), array(a[5], compute)
    table, index = array(a[6], np.int32), array(a[7], np.int32)
    has_gate, has_table = a[5] != 0, a[6] != 0
    sites, taps, kernel_width, cin, cout, groups, lanes = a[8], a[9], a[10], a[11], a[12], a[13], a[14]
    out_stride, in_stride, row_stride, tap_stride = a[15], a[16], a[17], a[18]
    chunk_rows, tile_vectors, split_filters = a[19], a[20], a[21]
    scratch, scratch_size = array(a[22], compute), a[23]
    channels, filters = cin // groups, cout // groups
    panels = (channels + lanes - 1) // lanes
    tiles = (panels + tile_vectors - 1) // tile_vectors
    splits = (filters + split_filters - 1) // split_filters
    gathered = fetch_add(a[1:], 1) * scratch_size
    products = gathered + chunk_rows * tile_vectors * lanes
    totals = products + split_filters * tile_vectors * lanes
    while True:
        item = fetch_add(a, 1)
        if item >= groups * taps * tiles * splits:
            return
        split, tile = item % splits, item // splits % tiles
        tap, group = item // (splits * tiles) % taps, item // (splits * tiles * taps)
        vectors = min(tile_vectors, panels - tile * tile_vectors)
        width = vectors * lanes
        channel = tile * tile_vectors * lanes
        first_out = group * filters + split * split_filters
        end_out = group * filters + min(filters, (split + 1) * split_filters)
        size = (end_out - first_out) * width
        clear(scratch, totals, size, compute)
        for first in range(0, sites, positive(chunk_rows)):
            # A sum over all sites, one by one, would lose what sums of sums keep.
            is_start = first % (_SUMMED_CHUNKS * chunk_rows) == 0
            if is_start and first > 0:
                add(scratch, products, size, compute(1), scratch, totals, lanes, compute)
            rows = min(chunk_rows, sites - first)
            for r in range(rows):
                pixel = np.int64(table[(first + r) * taps + tap]) if has_table else first + r
                at = gathered + r * width
                valid = min(width, channels - channel) if pixel >= 0 else 0
                copy(source, pixel * cin + group * channels + channel, valid, scratch, at, lanes, compute)
                clear(scratch, at + valid, width - valid, compute)
                if has_gate:
                    scale = gate[np.int64(index[first + r])]
                    for c in range(width):
                        store(scratch, at + c, scale * load(scratch, at + c, compute))
            for out in range(first_out, end_out, ROWS):
                multiply_transposed_tile(
                    vectors,
                    grad, first * cout + out, cout,
                    scratch, gathered,
                    scratch, products + (out - first_out) * width, width,
                    rows, not is_start,
                )  # fmt: skip
        target = tap // kernel_width * row_stride + tap % kernel_width * tap_stride + channel * in_stride
        for out in range(first_out, end_out):
            for c in range(min(width, channels - channel)):
                at = (out - first_out) * width + c
                value = load(scratch, totals + at, compute) + load(scratch, products + at, compute)
                store(grad_weight, target + out * out_stride + c * in_stride, value)


_run_forward = kernel(_forward_kernel)
_run_gather_rows = kernel(_gather_rows_kernel)
_run_bias_grad = kernel(_bias_grad_kernel)
_run_input_grad = kernel(_input_grad_kernel)
_run_weight_grad = kernel(_weight_grad_kernel)


class Forward:
    """The forward pass over operands of one size and type: what of a call their values do not change.

    Args:
        weight: like those to come.
        groups: of the convolution.
        activation: its name.
        dtype: of the features.
    """

    def __init__(self, weight: Tensor, groups: int, activation: str, dtype: torch.dtype) -> None:
        self.dtype, self.compute = dtype, compute_type(dtype)
        cout, channels, height, width = weight.shape
        taps, lanes, self.groups = height * width, vector_lanes(dtype), groups
        block_taps = ceil(taps, ceil(taps, max(1, DEPTH // channels)))
        self.depth, self.panels, self.lanes = block_taps * channels, ceil(cout // groups, lanes), lanes
        # Groups share a chunk as far as their gathered rows stay in the cache.
        self.split_groups = max(1, min(groups, GATHERED // (4 * ROWS * self.depth)))
        self.most_rows = max(ROWS, min(96, GATHERED // (self.split_groups * self.depth)) // ROWS * ROWS)
        self.threads, self.packing = torch.get_num_threads(), Packing(weight, groups)
        self.no_bias = torch.zeros(cout, dtype=self.compute)
        self.numbers = array_of("q", bytes(8 * _FORWARD))
        self.numbers[12:17] = array_of("q", (taps, channels * groups, cout, groups, lanes))
        self.numbers[22], self.numbers[25] = block_taps, ACTIVATIONS.index(activation)

    def in_order(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The parameters in the memory order and type that `run` takes them in; themselves if they are."""
        bias = None if bias is None else bias.to(self.compute).contiguous()
        return weight.contiguous(memory_format=torch.channels_last), bias

    def run(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: Tensor | None,
        index: Tensor,
        active: int,
        gate: Tensor | None,
        residual: Tensor | None,
        out: Tensor,
        inactive: Tensor | None,
        in_place: bool,
    ) -> None:
        """As `forward`, for one site or more; weight and bias are `in_order`."""
        groups, threads, panels, lanes = self.groups, self.threads, self.panels, self.lanes
        numbers, depth, split_groups, split_panels = self.numbers[:], self.depth, self.split_groups, panels
        strips, chunks, packed_size = ceil(panels, TILE_VECTORS), 1, 0
        # Few rows: each column of the weight is used in one chunk alone, which packs it where it stays in the cache.
        if groups > 1 or active > self.most_rows or strips < threads:
            packed_size = self.packing.size
            chunks = max(ceil(active, self.most_rows), min(4 * threads, ceil(active, 4 * ROWS)))
        is_same_type = self.dtype == self.compute
        # The last tile of rows may read past the last site.
        is_direct = table is None and packed_size > 0 and is_same_type and input.shape[0] >= active + ROWS
        chunk_rows = ceil(active, chunks * ROWS) * ROWS
        chunks = ceil(active, chunk_rows)
        # Too few rows to go round: threads share a chunk's columns, each gathering it for itself.
        shares = ceil(4 * threads, chunks)
        if threads > 1 and shares > 1:
            if groups > 1:
                split_groups = min(split_groups, ceil(groups, shares))
            else:
                split_panels = ceil(strips, min(strips, shares)) * TILE_VECTORS
        splits = ceil(groups, split_groups) * ceil(panels, split_panels)
        threads = min(threads, chunks * splits)
        size = chunk_rows * split_groups * ((0 if is_direct else depth) + split_panels * lanes)
        size += chunk_rows // ROWS if packed_size else TILE_VECTORS * lanes * depth
        scratch = torch.empty(packed_size + threads * size, dtype=self.compute)
        at = scratch.data_ptr()
        if packed_size:
            self.packing.run(weight, at)
            numbers[5], numbers[32] = at, table is not None and groups == 1 and is_same_type
        numbers[2], numbers[3], numbers[9], numbers[10] = (
            input.data_ptr(), out.data_ptr(), index.data_ptr(), weight.data_ptr()
        )  # fmt: skip
        numbers[4], numbers[7], numbers[8] = address(residual), address(gate), address(table)
        numbers[6] = (self.no_bias if bias is None else bias).data_ptr()
        numbers[11], numbers[17], numbers[18], numbers[19] = active, chunk_rows, chunks, split_groups
        numbers[20], numbers[21], numbers[23], numbers[24] = split_panels, splits, is_direct, out.dim() == 2
        numbers[26], numbers[27] = at + packed_size * self.compute.itemsize, size
        numbers[28], numbers[29], numbers[30], numbers[31] = filling(out, inactive, in_place)
        _run_forward.start(self.dtype, threads, numbers)


def forward_of(
    weight: Tensor, groups: int, activation: str, dtype: torch.dtype, geometry: Sequence[int]
) -> Forward | stencil.Stencil:
    """What runs a dense input's forward pass, by a table or, where `is_stencil`, by the geometry of `stencil.Reads`."""
    if is_stencil(weight.shape, groups):
        return stencil.Stencil(weight, groups, ACTIVATIONS.index(activation), dtype, geometry)
    return Forward(weight, groups, activation, dtype)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    index: Tensor,
    count: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    inactive: Tensor | None,
    in_place: bool,
    groups: int,
    activation: str,
    reads: tuple[Tensor | None, Sequence[int]],
) -> None:
    """Write activation(gate * (conv + bias) + residual) into `out` at the active sites.

    `input`, `residual` and `out` are channels_last, or packed rows [capacity, C]; `residual` may be `out` itself.
    `gate` has one element for each site, in the compute type. The skipped sites of a dense `out` get zeros, or what
    is `inactive` there; `in_place` leaves them alone. Depthwise filters find what they read by `reads` and need no
    table.
    """
    active = int(count)
    if active == 0:
        fill_all(out, inactive, in_place)
        return
    if is_stencil(weight.shape, groups):
        stencil.forward(
            input, weight, bias, groups, reads, index, active, gate, residual, out, inactive, in_place,
            ACTIVATIONS.index(activation),
        )  # fmt: skip
        return
    made = Forward(weight, groups, activation, input.dtype)
    made.run(input, *made.in_order(weight, bias), table, index, active, gate, residual, out, inactive, in_place)


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    readers: Tensor | None,
    pixels: Sequence[Tensor],
    index: Tensor,
    count: Tensor,
    gate: Tensor | None,
    wanted: Sequence[bool],
    site_count: int,
    overlap_sites: int,
    groups: int,
    reads: tuple[Tensor | None, Sequence[int]],
) -> tuple[Tensor | None, ...]:
    """The wanted gradients of `input`, `weight`, `bias` and `gate`, None for the others.

    `grad` and `input` are channels_last, or packed rows. `site_count`: of all sites, active or not. `overlap_sites`:
    sites that far apart, whole lines of them, read no common row of the input. `pixels`: the index and count of packed
    features' sites, or of the pixels that `readers` is for; `readers`, for depthwise filters alone, is the table of
    `cpu.sites.readers`.
    """
    active = int(count)
    input_wanted, weight_wanted, bias_wanted, gate_wanted = wanted
    rows = _grad_rows(grad, index, active)
    compute = rows.dtype
    grad_input = grad_weight = grad_bias = products = None
    if input_wanted:
        layout = torch.channels_last if input.dim() == 4 else torch.contiguous_format
        grad_input = torch.empty(input.shape, dtype=compute, memory_format=layout).zero_()
    if is_stencil(weight.shape, groups):
        if gate_wanted:
            products = stencil.gate_grad(rows, input, weight, bias, groups, reads, index, active)
        scaled = rows if gate is None else stencil.scale_rows(rows, gate, index, active)
        if input_wanted:
            stencil.input_grad(scaled, weight, groups, readers, pixels[0], int(pixels[1]), grad_input)
    elif (input_wanted or gate_wanted) and active:
        products = _input_grad(
            rows, weight, gate, input, table, index, active, site_count, overlap_sites, grad_input, gate_wanted, groups
        )
        if gate_wanted and bias is not None:
            products += (rows[:active] * bias.to(compute)).sum(1)
    if weight_wanted and is_stencil(weight.shape, groups):
        grad_weight = stencil.weight_grad(scaled, input, table, active, weight, groups)
    elif weight_wanted:
        grad_weight = torch.empty_like(weight)
        weight_grad(rows, input, gate, table, index, active, grad_weight, groups)
    grad_gate = None
    if gate_wanted:
        grad_gate = torch.zeros(gate.shape, dtype=compute)
        if active:
            grad_gate.view(-1)[index[:active]] = products
    if input_wanted:
        grad_input = grad_input.to(input.dtype)
    if bias_wanted:
        grad_bias = bias_grad(rows, index, active, gate).to(weight.dtype)
    return grad_input, grad_weight, grad_bias, grad_gate


def bias_grad(rows: Tensor, index: Tensor, count: int, gate: Tensor | None = None) -> Tensor:
    """The sum of the first `count` rows [., C], times their sites' gates; in the compute type, as the rows."""
    result = torch.empty(rows.shape[1], dtype=rows.dtype)
    _run_bias_grad(
        rows.dtype, workers(rows.numel() // SERIAL), rows.data_ptr(), address(gate), result.data_ptr(),
        index.data_ptr(), count, rows.shape[1], vector_lanes(rows.dtype),
    )  # fmt: skip
    return result


def _grad_rows(grad: Tensor, index: Tensor, count: int) -> Tensor:
    """The rows of a gradient at the active sites, [count + ROWS or more, C] in the compute type.

    The rows past `count` are never used; tiles may read them.
    """
    channels = grad.shape[1]
    is_packed = grad.dim() == 2
    if is_packed and grad.dtype == compute_type(grad.dtype) and grad.shape[0] >= count + ROWS:
        return grad
    rows = torch.empty(count + ROWS, channels, dtype=compute_type(grad.dtype))
    rows[count:] = 0
    if is_packed:
        rows[:count] = grad[:count]
        return rows
    chunk, threads = 64, workers(count * channels // SERIAL)
    sizes = (count, channels, chunk, vector_lanes(grad.dtype))
    _run_gather_rows(grad.dtype, threads, grad.data_ptr(), rows.data_ptr(), index.data_ptr(), *sizes)
    return rows


def _input_grad(
    rows: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    input: Tensor,
    table: Tensor | None,
    index: Tensor,
    count: int,
    site_count: int,
    overlap_sites: int,
    grad_input: Tensor | None,
    gate_grad_wanted: bool,
    groups: int,
) -> Tensor | None:
    """Scatter-add the active sites' gradients into `grad_input` (zero-filled, compute type), if given.

    Returns the gate's gradient [count] without the bias's share, where wanted. Sites are cut into bands of at least
    `overlap_sites`, so that bands two apart share no row of the input: the even ones run together, then the odd ones.
    """
    dtype, compute = weight.dtype, rows.dtype
    cout, channels = weight.shape[:2]
    taps, lanes = weight.shape[2] * weight.shape[3], vector_lanes(dtype)
    packed = packed_weight(weight, groups, by_output=False)
    strips = groups * ceil(ceil(channels, lanes), TILE_VECTORS)
    gate_grad = torch.zeros(strips, count, dtype=compute) if gate_grad_wanted else None
    bands = max(1, min(64, count // 48))
    band_sites = ceil(ceil(site_count, bands), overlap_sites) * overlap_sites
    bands = ceil(site_count, band_sites)
    chunk_rows = 8 * ROWS
    threads = workers(ceil(bands, 2) * strips)
    size = chunk_rows * TILE_VECTORS * lanes
    scratch = torch.empty(threads * size, dtype=compute)
    for colour in range(min(2, bands)):
        _run_input_grad(
            dtype, threads, rows.data_ptr(), packed.data_ptr(), address(grad_input), address(gate),
            input.data_ptr(), address(gate_grad), address(table), index.data_ptr(),
            count, taps, channels * groups, cout, groups, lanes, band_sites, bands, colour, chunk_rows,
            scratch.data_ptr(), size,
        )  # fmt: skip
    return None if gate_grad is None else gate_grad.sum(0)


def weight_grad(
    rows: Tensor,
    input: Tensor,
    gate: Tensor | None,
    table: Tensor | None,
    index: Tensor,
    count: int,
    grad_weight: Tensor,
    groups: int,
) -> None:
    """Write the weight's gradient into `grad_weight` [Cout, Cin / groups, kH, kW], any strides, the input's type."""
    if count == 0:
        grad_weight.zero_()
        return
    dtype, compute = input.dtype, rows.dtype
    cout, channels, _, kernel_width = grad_weight.shape
    filters = cout // groups
    taps, lanes = grad_weight.shape[2] * kernel_width, vector_lanes(dtype)
    panels = ceil(channels, lanes)
    threads = torch.get_num_threads()
    tile_vectors = TILE_VECTORS
    while tile_vectors > 2 and groups * taps * ceil(panels, tile_vectors) < 6 * threads:
        tile_vectors -= 2
    tiles = groups * taps * ceil(panels, tile_vectors)
    splits = min(ceil(filters, 8 * ROWS), ceil(6 * threads, tiles))
    split_filters = ceil(ceil(filters, splits), ROWS) * ROWS
    splits = ceil(filters, split_filters)
    chunk_rows = 128
    threads = workers(tiles * splits)
    size = (chunk_rows + 2 * split_filters) * tile_vectors * lanes
    scratch = torch.empty(threads * size, dtype=compute)
    _run_weight_grad(
        dtype, threads, input.data_ptr(), grad_weight.data_ptr(), rows.data_ptr(), address(gate),
        address(table), index.data_ptr(), count, taps, kernel_width, channels * groups, cout, groups, lanes,
        *grad_weight.stride(), chunk_rows, tile_vectors, split_filters, scratch.data_ptr(), size,
    )  # fmt: skip
