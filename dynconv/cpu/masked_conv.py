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

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._geometry import is_stencil
from ..sites import fill
from . import stencil
from ._common import (
    SERIAL,
    Skipped,
    add,
    address,
    array,
    ceil,
    clear,
    copy,
    fill_skipped,
    gather_rows,
    gather_scattered,
    lower_bound,
    multiply_rows,
    multiply_scattered,
    pack_panel,
    skipped_sites,
    vector_lanes,
)
from ._layout import Compute, Flag, Int32, Storage
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .llvm.activations import ACTIVATIONS, epilogue_row
from .llvm.build import TILE_VECTORS
from .llvm.elements import address_of, is_given, load, positive, store
from .llvm.tiles import ROWS, multiply_tile, multiply_transposed_tile
from .packing import Packing, packed_weight

# In elements; together they keep a chunk's gathered rows and one tile's columns of the weights in a 1 MiB L2.
GATHERED = 56 * 1024
DEPTH = 1152
_SUMMED_CHUNKS = 8  # of 128 rows, whose products one sum of the weight's gradient adds up


@kernel
def _forward_kernel(
    shared, compute, source: Storage, out: Storage, residual: Storage, packed: Compute, bias: Compute, gate: Compute,
    table: Int32, index: Int32, weight: Storage, sites, taps, cin, cout, groups, lanes, chunk_rows, chunks,
    split_groups, split_panels, splits, block_taps, is_direct: Flag, out_is_packed: Flag, activation,
    scratch: Compute, scratch_size, skipped: Skipped, reads_runs: Flag,
):  # fmt: skip
    """Chunks of sites, and in them splits of the output's channels.

    Without `packed`, the weight as `Packing` leaves it, a chunk packs its columns itself. With `is_direct` the
    products read the rows of the source where they lie, with `reads_runs` those that follow each other.
    """
    has_packed, has_gate, has_table = is_given(packed), is_given(gate), is_given(table)
    has_residual, rows_in_place = is_given(residual), array(address_of(source), compute)
    channels, filters = cin // groups, cout // groups
    panels = (filters + lanes - 1) // lanes
    panel_splits = (panels + split_panels - 1) // split_panels
    gathered = next_worker(shared) * scratch_size
    products = gathered + (0 if is_direct else chunk_rows * block_taps * split_groups * channels)
    columns = products + chunk_rows * split_groups * split_panels * lanes
    runs = columns
    while True:
        item = next_item(shared)
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
                    source=source, width=cin, channels=cin, table=table, entry=entry, taps=taps, rows=rows,
                    tap_count=tap_count, target=scratch, at=gathered, runs=runs, lanes=lanes, compute=compute,
                )  # fmt: skip
            elif not is_direct:
                gather_rows(
                    source=source, width=cin, table=table, has_table=has_table, entry=entry, taps=taps, rows=rows,
                    tap_count=tap_count, channel=first_group * channels, channels=channels, groups=item_groups,
                    target=scratch, at=gathered, lanes=lanes, compute=compute,
                )  # fmt: skip
            start = first_tap * channels
            if is_direct:
                at = (first_group * panels + first_panel) * channels * lanes
                multiply_rows(
                    a=rows_in_place, at=first * cin + first_group * channels, row=cin, group=channels, rows=rows,
                    depth=depth, accumulate=False, weights=packed, weight_at=at, panel_stride=channels * lanes,
                    group_stride=panels * channels * lanes, panels=item_panels, groups=item_groups, products=scratch,
                    products_at=products, width=width, lanes=lanes,
                )  # fmt: skip
            elif reads_runs:
                panel_stride = taps * channels * lanes
                multiply_scattered(
                    source=rows_in_place, width=cin, channels=cin, table=table, entry=entry, taps=taps, rows=rows,
                    tap_count=tap_count, a=scratch, at=gathered, runs=runs, accumulate=first_tap > 0, weights=packed,
                    weight_at=first_panel * panel_stride + start * lanes, panel_stride=panel_stride, panels=item_panels,
                    products=scratch, products_at=products, product_width=width, lanes=lanes, compute=compute,
                )  # fmt: skip
            elif has_packed:
                panel_stride = taps * channels * lanes
                at = (first_group * panels + first_panel) * panel_stride + start * lanes
                multiply_rows(
                    a=scratch, at=gathered, row=depth, group=rows * depth, rows=rows, depth=depth,
                    accumulate=first_tap > 0, weights=packed, weight_at=at, panel_stride=panel_stride,
                    group_stride=panels * panel_stride, panels=item_panels, groups=item_groups, products=scratch,
                    products_at=products, width=width, lanes=lanes,
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
                        a=scratch, at=gathered, row=depth, group=0, rows=rows, depth=depth, accumulate=first_tap > 0,
                        weights=scratch, weight_at=columns, panel_stride=depth * lanes, group_stride=0, panels=vectors,
                        groups=1, products=scratch, products_at=products + panel * lanes, width=width, lanes=lanes,
                    )  # fmt: skip
        if split == 0:
            fill_skipped(skipped, out, index, first, rows, sites, cout)
        for r in range(rows):
            site = np.int64(index[first + r])
            scale = gate[site] if has_gate else compute(1)
            row = (first + r if out_is_packed else site) * cout
            for g in range(item_groups):
                channel = (first_group + g) * filters + first_panel * lanes
                epilogue_row(
                    scratch, products + r * width + g * group_width, bias, channel, scale,
                    residual, row + channel if has_residual else 0, out, row + channel,
                    min(group_width, filters - first_panel * lanes), activation,
                )  # fmt: skip


@kernel
def _gather_rows_kernel(
    shared, compute, source: Storage, target: Compute, index: Int32, sites, channels, chunk_rows, lanes
):
    while True:
        first = next_item(shared) * chunk_rows
        if first >= sites:
            return
        for row in range(first, min(sites, first + chunk_rows)):
            copy(source, np.int64(index[row]) * channels, channels, target, row * channels, lanes, compute)


@kernel
def _bias_grad_kernel(
    shared, compute, grad: Compute, gate: Compute, grad_bias: Compute, index: Int32, sites, channels, lanes
):
    """One panel of channels at a time, its sum in the order of the sites."""
    has_gate = is_given(gate)
    while True:
        channel = next_item(shared) * lanes
        if channel >= channels:
            return
        valid = min(lanes, channels - channel)
        clear(grad_bias, channel, valid, compute)
        for row in range(sites):
            scale = gate[np.int64(index[row])] if has_gate else compute(1)
            add(grad, row * channels + channel, valid, scale, grad_bias, channel, lanes, compute)


@kernel
def _input_grad_kernel(
    shared, compute, grad: Compute, weights: Compute, grad_input: Compute, gate: Compute, source: Storage,
    gate_grad: Compute, table: Int32, index: Int32, sites, taps, cin, cout, groups, lanes, band_sites, bands, colour,
    chunk_rows, scratch: Compute, scratch_size,
):  # fmt: skip
    has_grad_input, has_gate = is_given(grad_input), is_given(gate)
    has_gate_grad, has_table = is_given(gate_grad), is_given(table)
    channels, filters = cin // groups, cout // groups
    panels = (channels + lanes - 1) // lanes
    tiles = (panels + TILE_VECTORS - 1) // TILE_VECTORS
    products = next_worker(shared) * scratch_size
    while True:
        item = next_item(shared)
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


@kernel
def _weight_grad_kernel(
    shared, compute, source: Storage, grad_weight: Storage, grad: Compute, gate: Compute, table: Int32, index: Int32,
    sites, taps, kernel_width, cin, cout, groups, lanes, out_stride, in_stride, row_stride, tap_stride, chunk_rows,
    tile_vectors, split_filters, scratch: Compute, scratch_size,
):  # fmt: skip
    has_gate, has_table = is_given(gate), is_given(table)
    channels, filters = cin // groups, cout // groups
    panels = (channels + lanes - 1) // lanes
    tiles = (panels + tile_vectors - 1) // tile_vectors
    splits = (filters + split_filters - 1) // split_filters
    gathered = next_worker(shared) * scratch_size
    products = gathered + chunk_rows * tile_vectors * lanes
    totals = products + split_filters * tile_vectors * lanes
    while True:
        item = next_item(shared)
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


_AT = _forward_kernel.at


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
        self.numbers = _forward_kernel.pack(
            source=None, out=None, residual=None, packed=None, bias=self.no_bias, gate=None, table=None, index=None,
            weight=None, sites=0, taps=taps, cin=channels * groups, cout=cout, groups=groups, lanes=lanes,
            chunk_rows=0, chunks=0, split_groups=0, split_panels=0, splits=0, block_taps=block_taps, is_direct=False,
            out_is_packed=False, activation=ACTIVATIONS.index(activation), scratch=None, scratch_size=0,
            skipped=(0, 0, 0, False), reads_runs=False,
        )  # fmt: skip

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
        """Do what `forward` does, for one site or more; weight and bias are `in_order`."""
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
            numbers[_AT.packed] = at
            numbers[_AT.reads_runs] = table is not None and groups == 1 and is_same_type
        if bias is not None:
            numbers[_AT.bias] = bias.data_ptr()
        numbers[_AT.source], numbers[_AT.weight], numbers[_AT.out] = input.data_ptr(), weight.data_ptr(), out.data_ptr()
        numbers[_AT.residual], numbers[_AT.gate] = address(residual), address(gate)
        numbers[_AT.table], numbers[_AT.index], numbers[_AT.sites] = address(table), index.data_ptr(), active
        numbers[_AT.chunk_rows], numbers[_AT.chunks], numbers[_AT.splits] = chunk_rows, chunks, splits
        numbers[_AT.split_groups], numbers[_AT.split_panels] = split_groups, split_panels
        numbers[_AT.is_direct], numbers[_AT.out_is_packed] = is_direct, out.dim() == 2
        numbers[_AT.scratch], numbers[_AT.scratch_size] = at + packed_size * self.compute.itemsize, size
        numbers[_AT.fill], numbers[_AT.inactive], numbers[_AT.all_sites], numbers[_AT.is_large] = skipped_sites(
            out, inactive, in_place
        )
        _forward_kernel.start(self.dtype, threads, numbers)


def forward_of(
    weight: Tensor, groups: int, activation: str, dtype: torch.dtype, geometry: Sequence[int]
) -> Forward | stencil.Stencil:
    """Return what runs a dense input's forward pass, by a table or, where `is_stencil`, by the geometry of `Reads`."""
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
        fill(out, inactive, in_place)
        return
    if is_stencil(weight.shape, groups):
        stencil.forward(
            input, weight, bias, groups, reads, index, active, gate=gate, residual=residual, out=out,
            inactive=inactive, in_place=in_place, activation=ACTIVATIONS.index(activation),
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
            rows, weight, gate, input, table, index, active, groups=groups, site_count=site_count,
            overlap_sites=overlap_sites, grad_input=grad_input, gate_grad_wanted=gate_wanted,
        )  # fmt: skip
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
    _bias_grad_kernel(
        rows.dtype, workers(rows.numel() // SERIAL), grad=rows, gate=gate, grad_bias=result, index=index, sites=count,
        channels=rows.shape[1], lanes=vector_lanes(rows.dtype),
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
    _gather_rows_kernel(
        grad.dtype, workers(count * channels // SERIAL), source=grad, target=rows, index=index, sites=count,
        channels=channels, chunk_rows=64, lanes=vector_lanes(grad.dtype),
    )  # fmt: skip
    return rows


def _input_grad(
    rows: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    input: Tensor,
    table: Tensor | None,
    index: Tensor,
    count: int,
    *,
    groups: int,
    site_count: int,
    overlap_sites: int,
    grad_input: Tensor | None,
    gate_grad_wanted: bool,
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
        _input_grad_kernel(
            dtype, threads, grad=rows, weights=packed, grad_input=grad_input, gate=gate, source=input,
            gate_grad=gate_grad, table=table, index=index, sites=count, taps=taps, cin=channels * groups, cout=cout,
            groups=groups, lanes=lanes, band_sites=band_sites, bands=bands, colour=colour, chunk_rows=chunk_rows,
            scratch=scratch, scratch_size=size,
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
    out_stride, in_stride, row_stride, tap_stride = grad_weight.stride()
    _weight_grad_kernel(
        dtype, threads, source=input, grad_weight=grad_weight, grad=rows, gate=gate, table=table, index=index,
        sites=count, taps=taps, kernel_width=kernel_width, cin=channels * groups, cout=cout, groups=groups, lanes=lanes,
        out_stride=out_stride, in_stride=in_stride, row_stride=row_stride, tap_stride=tap_stride,
        chunk_rows=chunk_rows, tile_vectors=tile_vectors, split_filters=split_filters, scratch=scratch,
        scratch_size=size,
    )  # fmt: skip
