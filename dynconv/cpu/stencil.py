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

from array import array as array_of
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .._geometry import is_depthwise
from ._common import SERIAL, add, address, array, ceil, clear, fill_skipped, filling, vector_lanes
from ._llvm import (
    STENCIL_ROWS,
    STENCIL_TAPS,
    fetch_add,
    finish_row,
    group_rows,
    group_weight,
    load,
    positive,
    stencil_rows,
    stencil_weight,
    store,
)
from ._threads import compute_type, kernel, workers
from .packing import Packing

_ROWS_PER_CHUNK = 64  # of what needs one row for another
_CHUNKS_PER_THREAD = 8  # of the stencil
_SITES_PER_BLOCK = 256  # of the weight's gradient: their rows stay in the cache from one row of taps to the next


@njit(inline="always")
def _read_by_table(a, table, first, last, pixels, zeros, row_size):
    """pixels[tap, i] = the address that row min(first + i, last) of the table reads, for STENCIL_ROWS rows i."""
    taps = a[13]
    for i in range(STENCIL_ROWS):
        entry = min(first + i, last) * taps
        for tap in range(taps):
            pixel = np.int64(table[entry + tap])
            pixels[tap * STENCIL_ROWS + i] = a[2] + pixel * row_size if pixel >= 0 else zeros


@njit(inline="always")
def _read_by_geometry(a, index, first, last, offsets, pixels, state, zeros, row_size):
    """The same for the sites index[first + i], from the geometry alone.

    offsets[tap] lies between a site's first tap and the tap, in bytes; `state` is the line that the last site was in.
    """
    lookup, is_packed = array(a[25], np.int32), a[25] != 0
    out_height, out_width, height, width = a[26], a[27], a[28], a[29]
    kernel_height, kernel_width, stride_y, stride_x = a[30], a[31], a[32], a[33]
    pad_y, pad_x, dilation_y, dilation_x = a[34], a[35], a[36], a[37]
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
        corner = a[2] + (start + x) * row_size
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
                        address = a[2] + row * row_size if row >= 0 else zeros
                pixels[tap * STENCIL_ROWS + i] = address
                tap += 1
    state[0], state[1], state[2], state[3] = line_begin, line_end, y, start


_STENCIL = 44  # int64 arguments of the stencil


@njit
def _stencil_kernel(arguments, storage, compute):
    a = carray(arguments, (_STENCIL,))
    source, out, residual = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    given, packed, gate = array(a[5], storage), array(a[5], compute), array(a[7], compute)
    table, index = array(a[8], np.int32), array(a[9], np.int32)
    grad, gate_grad = array(a[10], compute), array(a[11], compute)
    has_table, has_gate, wants_gate_grad, has_residual, is_packed = a[8] != 0, a[7] != 0, a[11] != 0, a[4] != 0, a[20]
    sites, taps, channels, filters, groups, lanes = a[12], a[13], a[14], a[40], a[41], a[42]
    row_size, out_size, sums_row = channels * a[15], filters * a[15], filters + lanes
    inner, outer, is_depthwise = channels // groups, filters // groups, a[43] != 0
    chunk_rows, activation = a[16], a[17]
    fill, inactive, all_sites, is_large = a[21], array(a[22], storage), a[23], a[24] != 0
    infinity = compute(np.inf)
    # What only shifts and clamps is done with the sums still in registers, and written where it belongs.
    is_clamp = activation <= 2 and not (has_gate or has_residual or wants_gate_grad)
    # Groups of filters that do not fill their vectors are written next to each other first.
    is_direct = is_clamp and (is_depthwise or outer % lanes == 0)
    low = compute(0) if is_clamp and activation > 0 else -infinity
    high = compute(6) if is_clamp and activation == 2 else infinity
    # In the caller's memory: Numba would count references to arrays of its own, atomically, at every use.
    memory = a[18] + fetch_add(a[1:], 1) * a[19]
    state, offsets, pixels = array(memory, np.int64), array(memory + 32, np.int64), array(memory + a[39], np.int64)
    sums_at = memory + a[39] + 8 * (taps + 1) * STENCIL_ROWS
    bias_at = sums_at + STENCIL_ROWS * sums_row * a[38]
    zeros = bias_at + sums_row * a[38]
    weight_at = zeros + max(channels, filters) * a[38]
    scratch, bias, nothing, weight = (
        array(sums_at, compute), array(bias_at, compute), array(zeros, compute), array(weight_at, compute)
    )  # fmt: skip
    clear(nothing, 0, max(channels, filters), compute)
    clear(bias, 0, sums_row, compute)
    for channel in range(filters if a[6] != 0 else 0):
        store(bias, channel, load(array(a[6], compute), channel, compute))
    for channel in range(channels if is_depthwise else 0):  # taps before channels
        for tap in range(taps):
            store(weight, tap * channels + channel, load(given, channel * taps + tap, compute))
    for tap in range(taps if not has_table else 0):
        offsets[tap] = (tap // a[31] * a[36] * a[29] + tap % a[31] * a[37]) * row_size
    state[1] = 0
    while True:
        begin = fetch_add(a, 1) * chunk_rows
        if begin >= sites:
            return
        end = min(sites, begin + chunk_rows)
        fill_skipped(fill, inactive, out, index, begin, end - begin, sites, all_sites, filters, is_large)
        for first in range(begin, end, STENCIL_ROWS):
            if has_table:
                _read_by_table(a, table, first, end - 1, pixels, zeros, row_size)
            else:
                _read_by_geometry(a, index, first, end - 1, offsets, pixels, state, zeros, row_size)
            for i in range(STENCIL_ROWS):
                target = sums_at + i * sums_row * a[38]
                if is_direct:
                    m = min(first + i, end - 1)
                    target = a[3] + (m if is_packed else np.int64(index[m])) * out_size
                pixels[taps * STENCIL_ROWS + i] = target
            if is_direct and is_depthwise:
                stencil_rows(pixels, source, weight, taps, channels, bias, low, high, out)
                continue
            if is_direct:
                group_rows(pixels, source, groups, inner, outer, packed, taps, bias, low, high, out, lanes)
                continue
            if is_depthwise:
                stencil_rows(pixels, source, weight, taps, channels, bias, low, high, scratch)
            else:
                group_rows(pixels, source, groups, inner, outer, packed, taps, bias, low, high, scratch, lanes)
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
                place = (m if is_packed else site) * filters
                finish_row(
                    scratch, at, nothing, 0, scale, residual, place if has_residual else 0, out, place,
                    filters, activation,
                )  # fmt: skip


@njit
def _weight_grad_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    source, zeros = array(a[2], storage), array(a[3], storage)
    grad, grad_weight, table = array(a[4], compute), array(a[5], compute), array(a[6], np.int32)
    sites, taps, channels, block_channels, block_sites = a[7], a[8], a[9], a[10], a[11]
    scratch, scratch_size = array(a[12], compute), a[13]
    blocks = (channels + block_channels - 1) // block_channels
    sums = fetch_add(a[1:], 1) * scratch_size
    while True:
        item = fetch_add(a, 1)
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
                    tap_count, table, first * taps + tap, taps, source, channel, channels, zeros,
                    grad, first * channels + channel, rows, width, scratch, sums + tap * width,
                )  # fmt: skip
                tap += tap_count
        for c in range(width):
            for tap in range(taps):
                store(grad_weight, (channel + c) * taps + tap, load(scratch, sums + tap * width + c, compute))


@njit
def _group_weight_grad_kernel(arguments, storage, compute):
    """One vector of a group's filters at a time, block by block of sites."""
    a = carray(arguments, (32,))
    source, zeros = array(a[2], storage), array(a[3], storage)
    grad, grad_weight = array(a[4], compute), array(a[5], compute)
    sites, taps, inner, outer, groups, block_sites, lanes = a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    panels = (outer + lanes - 1) // lanes
    totals_at = a[14] + fetch_add(a[1:], 1) * a[15]
    totals = array(totals_at, compute)
    while True:
        item = fetch_add(a, 1)
        if item >= groups * panels:
            return
        group, panel = item // panels, item % panels
        first_filter = group * outer + panel * lanes
        clear(totals, 0, taps * inner * lanes, compute)
        for first in range(0, sites, positive(block_sites)):
            rows, grad_at = min(block_sites, sites - first), first * groups * outer + first_filter
            for tap in range(taps):
                group_weight(
                    array(a[6] + 4 * (first * taps + tap), np.int32), taps,
                    source, group * inner, inner, groups * inner, zeros,
                    grad, grad_at, groups * outer, rows, totals, tap * inner * lanes, lanes,
                )  # fmt: skip
        for f in range(min(lanes, outer - panel * lanes)):
            for c in range(inner):
                for tap in range(taps):
                    value = load(totals, (tap * inner + c) * lanes + f, compute)
                    store(grad_weight, ((first_filter + f) * inner + c) * taps + tap, value)


@njit
def _scale_rows_kernel(arguments, storage, compute):
    a = carray(arguments, (16,))
    rows, gate, out, index = array(a[2], compute), array(a[3], compute), array(a[4], compute), array(a[5], np.int32)
    sites, channels, chunk_rows, lanes = a[6], a[7], a[8], a[9]
    while True:
        begin = fetch_add(a, 1) * chunk_rows
        if begin >= sites:
            return
        for m in range(begin, min(sites, begin + chunk_rows)):
            clear(out, m * channels, channels, compute)
            add(rows, m * channels, channels, gate[np.int64(index[m])], out, m * channels, lanes, compute)


_run_stencil = kernel(_stencil_kernel)
_run_weight_grad = kernel(_weight_grad_kernel)
_run_group_weight_grad = kernel(_group_weight_grad_kernel)
_run_scale_rows = kernel(_scale_rows_kernel)


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
        numbers = array_of("q", bytes(8 * _STENCIL))
        numbers[13], numbers[14], numbers[15], numbers[17] = taps, channels, dtype.itemsize, activation
        numbers[19], numbers[26:38] = self.memory_size, array_of("q", geometry)
        numbers[38:44] = array_of("q", (compute_size, head, filters, groups, lanes, self.is_depthwise))
        self.numbers = numbers

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
        """As `_stencil`; weight and bias are `in_order`."""
        numbers = self.numbers[:]
        threads = max(1, min(self.threads, active * self.products // SERIAL))
        # Long chunks: at each cut, lines that another thread has in its cache are read again.
        numbers[16] = ceil(active, _CHUNKS_PER_THREAD * threads * STENCIL_ROWS) * STENCIL_ROWS
        packed_size = 0 if self.packing is None else self.packing.size * numbers[38]
        memory = torch.empty(packed_size + threads * self.memory_size, dtype=torch.uint8)
        at = numbers[5] = memory.data_ptr()
        if self.packing is None:
            numbers[5] = weight.data_ptr()
        else:
            self.packing.run(weight, at)
        numbers[2], numbers[3], numbers[4] = source.data_ptr(), address(out), address(residual)
        numbers[6], numbers[7], numbers[8] = address(bias), address(gate), address(table)
        numbers[9], numbers[10], numbers[11], numbers[12] = address(index), address(grad), address(gate_grad), active
        numbers[18], numbers[25] = at + packed_size, address(lookup)
        if out is not None:
            numbers[20] = out.dim() == 2
            numbers[21], numbers[22], numbers[23], numbers[24] = filling(out, inactive, in_place)
        _run_stencil.start(self.dtype, threads, numbers)


def _stencil(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    gate: Tensor | None,
    reads: Reads | Tensor,
    index: Tensor | None,
    count: int,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    inactive: Tensor | None = None,
    in_place: bool = True,
    activation: int = 0,
    grad: Tensor | None = None,
    gate_grad: Tensor | None = None,
) -> None:
    """The stencil over `count` sites, finished into `out` or multiplied with `grad` into `gate_grad`.

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
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    inactive: Tensor | None,
    in_place: bool,
    activation: int,
) -> None:
    """out = activation(gate * (sum + bias) + residual) at the rows `index` of `out`; 0 to count - 1 if it is packed."""
    _stencil(input, weight, bias, groups, gate, reads, index, count, residual, out, inactive, in_place, activation)


def scale_rows(rows: Tensor, gate: Tensor, index: Tensor, count: int) -> Tensor:
    """gate[index[m]] * rows[m] for the first `count` rows."""
    scaled = torch.empty_like(rows)
    threads = workers(rows.numel() // SERIAL)
    _run_scale_rows(
        rows.dtype, threads, rows.data_ptr(), gate.data_ptr(), scaled.data_ptr(), index.data_ptr(),
        count, rows.shape[1], _ROWS_PER_CHUNK, vector_lanes(rows.dtype),
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
    addresses = (input.data_ptr(), zeros.data_ptr(), rows.data_ptr(), grad_weight.data_ptr(), table.data_ptr())
    if is_depthwise(weight.shape, groups):
        block_channels = min(8 * lanes, ceil(ceil(filters, 2 * torch.get_num_threads()), lanes) * lanes)
        threads, size = workers(ceil(filters, block_channels)), taps * block_channels
        scratch = torch.empty(threads * size, dtype=rows.dtype)
        _run_weight_grad(
            input.dtype, threads, *addresses, count, taps, filters, block_channels, _SITES_PER_BLOCK,
            scratch.data_ptr(), size,
        )  # fmt: skip
    else:
        outer = filters // groups
        threads, size = workers(groups * ceil(outer, lanes)), taps * inner * lanes
        scratch = torch.empty(threads * size, dtype=rows.dtype)
        _run_group_weight_grad(
            input.dtype, threads, *addresses, count, taps, inner, outer, groups, _SITES_PER_BLOCK, lanes,
            scratch.data_ptr(), size * scratch.element_size(),
        )  # fmt: skip
    return torch.empty_like(weight).copy_(grad_weight)
