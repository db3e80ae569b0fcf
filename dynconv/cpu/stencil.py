"""Masked convolution with few channels a group on the CPU, depthwise above all: a stencil at the active sites.

With w the filter and table[site, tap] the row of `source` that a site reads, or -1 (the forward sum finds it from the
geometry: a table would take longer to write than to compute):

    depthwise   y[m, c] = sum over taps of w[tap, c] * source[table[m, tap], c]
    grouped     y[m, (g, f)] = sum over taps and channels c of w[g, tap, c, f] * source[table[m, tap], (g, c)]
    weight grad dW[tap, c] = sum over sites of source[table[m, tap], c] * G[m, c], and dW[g, tap, c, f] likewise

The input's gradient is the first over the pixels that any active site reads, with the table of their readers: no two
threads write the same row, and nothing is added up twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .._geometry import is_depthwise
from ._common import (
    SERIAL,
    Skipped,
    Window,
    add,
    address,
    array,
    ceil,
    clear,
    fill_skipped,
    skipped_sites,
    vector_lanes,
)
from ._layout import Compute, Flag, Int32, Storage
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .llvm.activations import epilogue_row
from .llvm.build import STENCIL_ROWS
from .llvm.elements import address_of, is_given, load, positive, store
from .llvm.stencils import STENCIL_TAPS, group_rows, group_weight, stencil_rows, stencil_weight
from .packing import Packing

_ROWS_PER_CHUNK = 64  # of what needs one row for another
_CHUNKS_PER_THREAD = 8  # of the stencil
_SITES_PER_BLOCK = 256  # of the weight's gradient: their rows stay in the cache from one row of taps to the next


@njit(inline="always")
def _read_by_table(source_at, row_size, table, taps, first, last, pixels, zeros):
    """pixels[tap, i] = the address that row min(first + i, last) of the table reads, for STENCIL_ROWS rows i.

    That of the row of zeros where it reads none. Rows of the source are `row_size` bytes apart.
    """
    for i in range(STENCIL_ROWS):
        entry = min(first + i, last) * taps
        for tap in range(taps):
            pixel = np.int64(table[entry + tap])
            pixels[tap * STENCIL_ROWS + i] = source_at + pixel * row_size if pixel >= 0 else zeros


@njit(inline="always")
def _read_by_geometry(source_at, row_size, lookup, window, index, first, last, offsets, pixels, state, zeros):
    """pixels[tap, i] = what the site index[min(first + i, last)] reads through a tap, from the geometry alone.

    offsets[tap] lies between a site's first tap and the tap, in bytes; `state` is the line that the last site was in.
    """
    (out_height, out_width, height, width, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y,
     dilation_x) = window  # fmt: skip
    is_packed = is_given(lookup)
    last_y, last_x = height - (kernel_height - 1) * dilation_y, width - (kernel_width - 1) * dilation_x
    line_begin, line_end, y, start = state[0], state[1], state[2], state[3]
    for i in range(STENCIL_ROWS):
        site = np.int64(index[min(first + i, last)])
        if site >= line_end:  # sites of one line follow each other, and divisions are slow
            line = np.int64(np.uint32(site) // np.uint32(out_width))
            sample = np.int64(np.uint32(line) // np.uint32(out_height))
            line_begin, y = line * out_width, (line - sample * out_height) * stride_y - pad_y
            line_end, start = line_begin + out_width, (sample * height + y) * width
        x = (site - line_begin) * stride_x - pad_x
        corner = source_at + (start + x) * row_size
        if not is_packed and 0 <= y < last_y and 0 <= x < last_x:  # no tap in the padding, as nearly everywhere
            for tap in range(kernel_height * kernel_width):
                pixels[tap * STENCIL_ROWS + i] = corner + offsets[tap]
            continue
        tap = 0
        for ky in range(kernel_height):
            is_line = 0 <= y + ky * dilation_y < height
            for kx in range(kernel_width):
                address, tap_x = zeros, x + kx * dilation_x
                if is_line and 0 <= tap_x < width:
                    address = corner + offsets[tap]
                    if is_packed:
                        row = np.int64(lookup[start + ky * dilation_y * width + tap_x])
                        address = source_at + row * row_size if row >= 0 else zeros
                pixels[tap * STENCIL_ROWS + i] = address
                tap += 1
    state[0], state[1], state[2], state[3] = line_begin, line_end, y, start


@kernel
def _stencil_kernel(
    shared, storage, compute, source: Storage, out: Storage, residual: Storage, weight_at, bias: Compute,
    gate: Compute, table: Int32, index: Int32, grad: Compute, gate_grad: Compute, sites, taps, channels, filters,
    groups, lanes, element_size, compute_size, chunk_rows, activation, memory_at, memory_size, head_size,
    out_is_packed: Flag, is_depthwise: Flag, skipped: Skipped, lookup: Int32, window: Window,
):  # fmt: skip
    """The stencil at rows of `out`, or its products with `grad`, where `gate_grad` is given.

    The weight lies at an address: of depthwise filters in the storage type, of others as `Packing` leaves it. Threads
    have `memory_size` bytes each, of which the first `head_size` are for a line's state and the taps' offsets.
    """
    given, packed, source_at = array(weight_at, storage), array(weight_at, compute), address_of(source)
    has_table, has_gate, has_residual = is_given(table), is_given(gate), is_given(residual)
    wants_gate_grad = is_given(gate_grad)
    row_size, out_size, sums_row = channels * element_size, filters * element_size, filters + lanes
    inner, outer = channels // groups, filters // groups
    infinity = compute(np.inf)
    # What only shifts and clamps is done with the sums still in registers, and written where it belongs.
    is_clamp = activation <= 2 and not (has_gate or has_residual or wants_gate_grad)
    # Groups of filters that do not fill their vectors are written next to each other first.
    is_direct = is_clamp and (is_depthwise or outer % lanes == 0)
    low = compute(0) if is_clamp and activation > 0 else -infinity
    high = compute(6) if is_clamp and activation == 2 else infinity
    # In the caller's memory: Numba would count references to arrays of its own, atomically, at every use.
    memory_at += next_worker(shared) * memory_size
    state, offsets, pixels_at = array(memory_at, np.int64), array(memory_at + 32, np.int64), memory_at + head_size
    pixels, sums_at = array(pixels_at, np.int64), pixels_at + 8 * (taps + 1) * STENCIL_ROWS
    shift_at = sums_at + STENCIL_ROWS * sums_row * compute_size
    zeros = shift_at + sums_row * compute_size
    weight = array(zeros + max(channels, filters) * compute_size, compute)
    scratch, shift, nothing = array(sums_at, compute), array(shift_at, compute), array(zeros, compute)
    clear(nothing, 0, max(channels, filters), compute)
    clear(shift, 0, sums_row, compute)
    for channel in range(filters if is_given(bias) else 0):
        store(shift, channel, load(bias, channel, compute))
    for channel in range(channels if is_depthwise else 0):  # taps before channels
        for tap in range(taps):
            store(weight, tap * channels + channel, load(given, channel * taps + tap, compute))
    for tap in range(taps if not has_table else 0):
        y, x = tap // window.kernel_width * window.dilation_y, tap % window.kernel_width * window.dilation_x
        offsets[tap] = (y * window.width + x) * row_size
    state[1] = 0
    while True:
        begin = next_item(shared) * chunk_rows
        if begin >= sites:
            return
        end = min(sites, begin + chunk_rows)
        fill_skipped(skipped, out, index, begin, end - begin, sites, filters)
        for first in range(begin, end, STENCIL_ROWS):
            if has_table:
                _read_by_table(source_at, row_size, table, taps, first, end - 1, pixels, zeros)
            else:
                _read_by_geometry(
                    source_at, row_size, lookup, window, index, first, end - 1, offsets, pixels, state, zeros
                )  # fmt: skip
            for i in range(STENCIL_ROWS):
                target = sums_at + i * sums_row * compute_size
                if is_direct:
                    m = min(first + i, end - 1)
                    target = address_of(out) + (m if out_is_packed else np.int64(index[m])) * out_size
                pixels[taps * STENCIL_ROWS + i] = target
            if is_direct and is_depthwise:
                stencil_rows(pixels, source, weight, taps, channels, shift, low, high, out)
                continue
            if is_direct:
                group_rows(
                    pixels=pixels, source=source, groups=groups, inner=inner, outer=outer, weight=packed, taps=taps,
                    shift=shift, low=low, high=high, out=out, lanes=lanes,
                )  # fmt: skip
                continue
            if is_depthwise:
                stencil_rows(pixels, source, weight, taps, channels, shift, low, high, scratch)
            else:
                group_rows(
                    pixels=pixels, source=source, groups=groups, inner=inner, outer=outer, weight=packed, taps=taps,
                    shift=shift, low=low, high=high, out=scratch, lanes=lanes,
                )  # fmt: skip
            for i in range(min(STENCIL_ROWS, end - first)):
                m, at = first + i, i * sums_row
                if wants_gate_grad:
                    total = compute(0)
                    for c in range(filters):
                        total += load(scratch, at + c, compute) * grad[m * filters + c]
                    gate_grad[m] = total
                    continue
                site = np.int64(index[m])
                scale = gate[site] if has_gate else compute(1)
                place = (m if out_is_packed else site) * filters
                epilogue_row(
                    scratch, at, nothing, 0, scale, residual, place if has_residual else 0, out, place,
                    filters, activation,
                )  # fmt: skip


@kernel
def _weight_grad_kernel(
    shared, compute, source: Storage, zeros: Storage, grad: Compute, grad_weight: Compute, table: Int32, sites, taps,
    channels, block_channels, block_sites, scratch: Compute, scratch_size,
):  # fmt: skip
    blocks = (channels + block_channels - 1) // block_channels
    sums = next_worker(shared) * scratch_size
    while True:
        item = next_item(shared)
        if item >= blocks:
            return
        channel = item * block_channels
        width = min(block_channels, channels - channel)
        clear(scratch, sums, taps * width, compute)
        for first in range(0, sites, positive(block_sites)):
            rows = min(block_sites, sites - first)
            tap = 0
            while tap < taps:
                tap_count = STENCIL_TAPS if tap + STENCIL_TAPS <= taps else 1
                stencil_weight(
                    tap_count=tap_count, table=table, entry=first * taps + tap, taps=taps, source=source,
                    channel=channel, stride=channels, zeros=zeros, grad=grad, grad_at=first * channels + channel,
                    rows=rows, channels=width, out=scratch, at=sums + tap * width,
                )  # fmt: skip
                tap += tap_count
        for c in range(width):
            for tap in range(taps):
                store(grad_weight, (channel + c) * taps + tap, load(scratch, sums + tap * width + c, compute))


@kernel
def _group_weight_grad_kernel(
    shared, compute, source: Storage, zeros: Storage, grad: Compute, grad_weight: Compute, table: Int32, sites, taps,
    inner, outer, groups, block_sites, lanes, scratch: Compute, scratch_size,
):  # fmt: skip
    """One vector of a group's filters at a time, block by block of sites."""
    panels, sums = (outer + lanes - 1) // lanes, next_worker(shared) * scratch_size
    while True:
        item = next_item(shared)
        if item >= groups * panels:
            return
        group, panel = item // panels, item % panels
        first_filter = group * outer + panel * lanes
        clear(scratch, sums, taps * inner * lanes, compute)
        for first in range(0, sites, positive(block_sites)):
            rows, grad_at = min(block_sites, sites - first), first * groups * outer + first_filter
            for tap in range(taps):
                group_weight(
                    table=table[first * taps + tap :], taps=taps, source=source, channel=group * inner, channels=inner,
                    stride=groups * inner, zeros=zeros, grad=grad, grad_at=grad_at, grad_stride=groups * outer,
                    rows=rows, out=scratch, at=sums + tap * inner * lanes, lanes=lanes,
                )  # fmt: skip
        for f in range(min(lanes, outer - panel * lanes)):
            for c in range(inner):
                for tap in range(taps):
                    value = load(scratch, sums + (tap * inner + c) * lanes + f, compute)
                    store(grad_weight, ((first_filter + f) * inner + c) * taps + tap, value)


@kernel
def _scale_rows_kernel(
    shared, compute, rows: Compute, gate: Compute, out: Compute, index: Int32, sites, channels, chunk_rows, lanes
):
    while True:
        begin = next_item(shared) * chunk_rows
        if begin >= sites:
            return
        for m in range(begin, min(sites, begin + chunk_rows)):
            clear(out, m * channels, channels, compute)
            add(rows, m * channels, channels, gate[np.int64(index[m])], out, m * channels, lanes, compute)


_AT = _stencil_kernel.at

# What sites read, other than by a table: each pixel's packed row, where the source is packed, and Ho, Wo, H, W, kernel,
# stride, padding and dilation, two numbers each.
Reads = tuple[Tensor | None, Sequence[int]]


class Stencil:
    """The stencil over sources of one type: what of a call the operands' values do not change.

    Args:
        weight: [Cout, Cin / groups, kH, kW], like those to come.
        groups: of the convolution.
        activation: its place in `ACTIVATIONS`.
        dtype: of the source, the weight and the output.
        geometry: Ho, Wo, H, W, kernel, stride, padding and dilation, two numbers each, where sites read by it.
    """

    def __init__(
        self, weight: Tensor, groups: int, activation: int, dtype: torch.dtype, geometry: Sequence[int] = (0,) * 12
    ) -> None:
        filters, inner, height, width = weight.shape
        channels, taps, compute_size = inner * groups, height * width, compute_type(dtype).itemsize
        self.is_depthwise, self.dtype, lanes = is_depthwise(weight.shape, groups), dtype, vector_lanes(dtype)
        self.packing = None if self.is_depthwise else Packing(weight, groups)
        self.products, self.threads = filters * inner * taps, torch.get_num_threads()
        # A line's state, the taps' offsets, addresses, sums, zeros and the weight; no cache line of two threads.
        head = 8 * (4 + taps)
        values = (STENCIL_ROWS + 1) * (filters + lanes) + max(channels, filters) + taps * channels * self.is_depthwise
        self.memory_size = ceil(head + 8 * (taps + 1) * STENCIL_ROWS + compute_size * values, 128) * 128
        self.numbers = _stencil_kernel.pack(
            source=None, out=None, residual=None, weight_at=0, bias=None, gate=None, table=None, index=None, grad=None,
            gate_grad=None, sites=0, taps=taps, channels=channels, filters=filters, groups=groups, lanes=lanes,
            element_size=dtype.itemsize, compute_size=compute_size, chunk_rows=0, activation=activation, memory_at=0,
            memory_size=self.memory_size, head_size=head, out_is_packed=False, is_depthwise=self.is_depthwise,
            skipped=(0, 0, 0, False), lookup=None, window=geometry,
        )  # fmt: skip

    def in_order(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The parameters in the memory order and type that `run` takes them in; themselves if they are."""
        bias = None if bias is None else bias.to(compute_type(self.dtype)).contiguous()
        if self.is_depthwise:
            return weight.contiguous(), bias
        return weight.contiguous(memory_format=torch.channels_last), bias

    def run(
        self,
        source: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: Tensor | None,
        index: Tensor | None,
        active: int,
        gate: Tensor | None,
        residual: Tensor | None,
        out: Tensor | None,
        inactive: Tensor | None,
        in_place: bool,
        *,
        lookup: Tensor | None = None,
        grad: Tensor | None = None,
        gate_grad: Tensor | None = None,
    ) -> None:
        """Do what `_stencil` does; weight and bias are `in_order`."""
        numbers = self.numbers[:]
        threads = max(1, min(self.threads, active * self.products // SERIAL))
        # Long chunks: at each cut, lines that another thread has in its cache are read again.
        numbers[_AT.chunk_rows] = ceil(active, _CHUNKS_PER_THREAD * threads * STENCIL_ROWS) * STENCIL_ROWS
        packed_size = 0 if self.packing is None else self.packing.size * compute_type(self.dtype).itemsize
        memory = torch.empty(packed_size + threads * self.memory_size, dtype=torch.uint8)
        at = memory.data_ptr()
        if self.packing is None:
            numbers[_AT.weight_at] = weight.data_ptr()
        else:
            numbers[_AT.weight_at] = at
            self.packing.run(weight, at)
        numbers[_AT.source], numbers[_AT.bias], numbers[_AT.gate] = source.data_ptr(), address(bias), address(gate)
        numbers[_AT.table], numbers[_AT.lookup], numbers[_AT.index] = address(table), address(lookup), address(index)
        numbers[_AT.grad], numbers[_AT.gate_grad], numbers[_AT.sites] = address(grad), address(gate_grad), active
        numbers[_AT.memory_at] = at + packed_size
        if out is not None:
            numbers[_AT.out], numbers[_AT.residual] = out.data_ptr(), address(residual)
            numbers[_AT.out_is_packed] = out.dim() == 2
            numbers[_AT.fill], numbers[_AT.inactive], numbers[_AT.all_sites], numbers[_AT.is_large] = skipped_sites(
                out, inactive, in_place
            )
        _stencil_kernel.start(self.dtype, threads, numbers)


def _stencil(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    gate: Tensor | None,
    reads: Reads | Tensor,
    index: Tensor | None,
    count: int,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    inactive: Tensor | None = None,
    in_place: bool = True,
    activation: int = 0,
    grad: Tensor | None = None,
    gate_grad: Tensor | None = None,
) -> None:
    """The stencil over `count` sites, written to `out` or multiplied with `grad` into `gate_grad`.

    `reads`: a table of what each of them reads, or the geometry that tells it from `index`. `out` is written at the
    rows `index`, or from the first on if it is packed [rows, C]; `grad` is packed and `gate_grad` [count]. `weight`
    [Cout, Cin / groups, kH, kW] is of the type of `source`.
    """
    table, lookup, geometry = (None, *reads) if isinstance(reads, tuple) else (reads, None, (0,) * 12)
    made = Stencil(weight, groups, activation, source.dtype, geometry)
    made.run(
        source, *made.in_order(weight, bias), table, index, count, gate, residual, out, inactive, in_place,
        lookup=lookup, grad=grad, gate_grad=gate_grad,
    )  # fmt: skip


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    reads: Reads,
    index: Tensor,
    count: int,
    *,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    inactive: Tensor | None,
    in_place: bool,
    activation: int,
) -> None:
    """Write activation(gate * (sum + bias) + residual) to the rows `index` of `out`; 0 to count - 1 if it is packed."""
    _stencil(
        input, weight, bias, groups, gate, reads, index, count, residual=residual, out=out, inactive=inactive,
        in_place=in_place, activation=activation,
    )  # fmt: skip


def scale_rows(rows: Tensor, gate: Tensor, index: Tensor, count: int) -> Tensor:
    """gate[index[m]] * rows[m] for the first `count` rows."""
    scaled = torch.empty_like(rows)
    threads = workers(rows.numel() // SERIAL)
    _scale_rows_kernel(
        rows.dtype, threads, rows=rows, gate=gate, out=scaled, index=index, sites=count, channels=rows.shape[1],
        chunk_rows=_ROWS_PER_CHUNK, lanes=vector_lanes(rows.dtype),
    )  # fmt: skip
    return scaled


def input_grad(
    rows: Tensor, weight: Tensor, groups: int, readers: Tensor, pixels: Tensor, count: int, grad_input: Tensor
) -> None:
    """Write the gradient of the listed pixels into their rows of `grad_input` (0 to count - 1 if that is packed).

    `rows` [sites, C] is the output's gradient, gate included, in the compute type like `grad_input`; `readers` the
    table of `cpu.sites.readers`.
    """
    filters, channels, *size = weight.shape
    turned = weight.view(groups, filters // groups, channels, *size).transpose(1, 2)
    turned = turned.reshape(groups * channels, filters // groups, *size).to(rows.dtype)
    _stencil(rows, turned, None, groups, None, readers, pixels, count, out=grad_input)


def gate_grad(
    rows: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    reads: Reads,
    index: Tensor,
    count: int,
) -> Tensor:
    """[count]: the sum over channels of rows * (sum + bias)."""
    result = torch.empty(count, dtype=rows.dtype)
    _stencil(input, weight, bias, groups, None, reads, index, count, grad=rows, gate_grad=result)
    return result


def weight_grad(rows: Tensor, input: Tensor, table: Tensor | None, count: int, weight: Tensor, groups: int) -> Tensor:
    """Like `weight`; `rows` [sites + 1 or more, Cout] is the output's gradient, gate included, in the compute type."""
    filters, inner = weight.shape[:2]
    if table is None:  # a 1x1 filter over rows packed for the same sites
        table = torch.arange(count, dtype=torch.int32)
    taps, lanes = weight.shape[2] * weight.shape[3], vector_lanes(input.dtype)
    grad_weight = torch.zeros(weight.shape, dtype=rows.dtype)
    zeros = torch.zeros(inner * groups, dtype=input.dtype)
    operands = {"source": input, "zeros": zeros, "grad": rows, "grad_weight": grad_weight, "table": table}
    if is_depthwise(weight.shape, groups):
        block_channels = min(8 * lanes, ceil(ceil(filters, 2 * torch.get_num_threads()), lanes) * lanes)
        threads, size = workers(ceil(filters, block_channels)), taps * block_channels
        kernel_, sizes = _weight_grad_kernel, {"channels": filters, "block_channels": block_channels}
    else:
        outer = filters // groups
        threads, size = workers(groups * ceil(outer, lanes)), taps * inner * lanes
        kernel_, sizes = _group_weight_grad_kernel, {"inner": inner, "outer": outer, "groups": groups, "lanes": lanes}
    scratch = torch.empty(threads * size, dtype=rows.dtype)
    kernel_(
        input.dtype, threads, **operands, sites=count, taps=taps, **sizes, block_sites=_SITES_PER_BLOCK,
        scratch=scratch, scratch_size=size,
    )  # fmt: skip
    return torch.empty_like(weight).copy_(grad_weight)
