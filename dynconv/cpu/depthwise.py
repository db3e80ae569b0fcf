"""Depthwise masked convolution on the CPU: a stencil at the active sites.

With w[tap, c] the filter and table[site, tap] the row of `source` that a site reads, or -1:

    sum         y[m, c] = sum over taps of w[tap, c] * source[table[m, tap], c]
    weight grad dW[tap, c] = sum over sites of source[table[m, tap], c] * G[m, c]

The input's gradient is the first over the pixels that any active site reads, with the table of their readers: no two
threads write the same row, and nothing is added up twice.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ._common import SERIAL, add, address, array, ceil, clear, fill_skipped, filling, vector_lanes
from ._llvm import STENCIL_ROWS, STENCIL_TAPS, fetch_add, finish_row, load, stencil_rows, stencil_weight, store
from ._threads import compute_type, kernel, workers

_ROWS_PER_CHUNK = 64
_SITES_PER_BLOCK = 256  # of the weight's gradient: their rows stay in the cache from one row of taps to the next


@njit
def _stencil_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    source, out, residual = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    weight, bias, gate = array(a[5], compute), array(a[6], compute), array(a[7], compute)
    table, index, zeros = array(a[8], np.int32), array(a[9], np.int32), a[10]
    grad, gate_grad = array(a[11], compute), array(a[12], compute)
    has_gate, wants_gate_grad, has_residual, is_packed = a[7] != 0, a[12] != 0, a[4] != 0, a[21]
    sites, taps, channels, element_size = a[13], a[14], a[15], a[16]
    chunk_rows, activation = a[17], a[18]
    scratch, scratch_size = array(a[19], compute), a[20]
    fill, inactive, all_sites, is_large = a[22], array(a[23], storage), a[24], a[25] != 0
    infinity, nothing = compute(np.inf), array(a[10], compute)
    sums = fetch_add(a[1:], 1) * scratch_size
    pixels = np.empty(taps * STENCIL_ROWS, np.int64)
    while True:
        begin = fetch_add(a, 1) * chunk_rows
        if begin >= sites:
            return
        end = min(sites, begin + chunk_rows)
        fill_skipped(fill, inactive, out, index, begin, end - begin, sites, all_sites, channels, is_large)
        for first in range(begin, end, STENCIL_ROWS):
            for i in range(STENCIL_ROWS):
                entry = min(first + i, end - 1) * taps
                for tap in range(taps):
                    pixel = np.int64(table[entry + tap])
                    where = a[2] + pixel * channels * element_size if pixel >= 0 else zeros
                    pixels[tap * STENCIL_ROWS + i] = where
            stencil_rows(pixels, source, weight, taps, channels, bias, -infinity, infinity, scratch, sums)
            for i in range(min(STENCIL_ROWS, end - first)):
                m, at = first + i, sums + i * channels
                if wants_gate_grad:
                    total = compute(0)
                    for c in range(channels):
                        total += load(scratch, at + c, compute) * grad[m * channels + c]
                    gate_grad[m] = total
                    continue
                site = np.int64(index[m])
                scale = gate[site] if has_gate else compute(1)
                place = (m if is_packed else site) * channels
                finish_row(
                    scratch, at, nothing, 0, scale, residual, place if has_residual else 0, out, place,
                    channels, activation,
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
        for first in range(0, sites, block_sites):
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
_run_scale_rows = kernel(_scale_rows_kernel)


def taps_by_channels(weight: Tensor) -> Tensor:
    """[C, 1, kH, kW] -> [kH * kW, C] in the compute type."""
    return weight.flatten(1).t().to(compute_type(weight.dtype)).contiguous()


def _stencil(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    table: Tensor | None,
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
    """The stencil over `count` rows of the table, finished into `out` or multiplied with `grad` into `gate_grad`.

    `out` is written at the rows `index`, or from the first on if it is packed [rows, C]; `grad` is packed and
    `gate_grad` [count]. `weight` is [taps, C], in the compute type like `bias`.
    """
    taps, channels = weight.shape
    table = _given(table, count)
    dtype, compute = source.dtype, weight.dtype
    bias = torch.zeros(channels, dtype=compute) if bias is None else bias.to(compute).contiguous()
    zeros = torch.zeros(channels, dtype=compute)
    threads = workers(count * channels * taps // SERIAL)
    chunk_rows = max(STENCIL_ROWS, min(_ROWS_PER_CHUNK, ceil(count, 4 * threads)) // STENCIL_ROWS * STENCIL_ROWS)
    size = STENCIL_ROWS * channels
    scratch = torch.empty(threads * size, dtype=compute)
    _run_stencil(
        dtype, threads, source.data_ptr(), address(out), address(residual), weight.data_ptr(), bias.data_ptr(),
        address(gate), table.data_ptr(), address(index), zeros.data_ptr(), address(grad), address(gate_grad),
        count, taps, channels, source.element_size(), chunk_rows, activation, scratch.data_ptr(), size,
        out is not None and out.dim() == 2, *((0, 0, 0, 0) if out is None else filling(out, inactive, in_place)),
    )  # fmt: skip


def _given(table: Tensor | None, count: int) -> Tensor:
    """The table, or that of a 1x1 filter over rows packed for the same sites."""
    return torch.arange(count, dtype=torch.int32) if table is None else table


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
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
    _stencil(
        input, taps_by_channels(weight), bias, gate, table, index, count, residual, out, inactive, in_place, activation
    )


def scale_rows(rows: Tensor, gate: Tensor, index: Tensor, count: int) -> Tensor:
    """gate[index[m]] * rows[m] for the first `count` rows."""
    scaled = torch.empty_like(rows)
    threads = workers(rows.numel() // SERIAL)
    _run_scale_rows(
        rows.dtype, threads, rows.data_ptr(), gate.data_ptr(), scaled.data_ptr(), index.data_ptr(),
        count, rows.shape[1], _ROWS_PER_CHUNK, vector_lanes(rows.dtype),
    )  # fmt: skip
    return scaled


def input_grad(rows: Tensor, weight: Tensor, readers: Tensor, pixels: Tensor, count: int, grad_input: Tensor) -> None:
    """Write the gradient of the listed pixels into their rows of `grad_input` (0 to count - 1 if that is packed).

    `rows` [sites, C] is the output's gradient, gate included, in the compute type like `grad_input`; `readers` the
    table of `cpu.sites.readers`.
    """
    _stencil(rows, taps_by_channels(weight).to(rows.dtype), None, None, readers, pixels, count, out=grad_input)


def gate_grad(
    rows: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor | None, count: int
) -> Tensor:
    """[count]: the sum over channels of rows * (sum + bias)."""
    result = torch.empty(count, dtype=rows.dtype)
    _stencil(input, taps_by_channels(weight), bias, None, table, None, count, grad=rows, gate_grad=result)
    return result


def weight_grad(rows: Tensor, input: Tensor, table: Tensor | None, count: int, weight: Tensor) -> Tensor:
    """Like `weight`; `rows` [sites, C] is the output's gradient, gate included, in the compute type."""
    channels = weight.shape[0]
    table = _given(table, count)
    taps, lanes = weight[0].numel(), vector_lanes(input.dtype)
    grad_weight = torch.zeros(weight.shape, dtype=rows.dtype)
    block_channels = min(8 * lanes, ceil(ceil(channels, 2 * torch.get_num_threads()), lanes) * lanes)
    zeros = torch.zeros(channels, dtype=input.dtype)
    threads = workers(ceil(channels, block_channels))
    size = taps * block_channels
    scratch = torch.empty(threads * size, dtype=rows.dtype)
    _run_weight_grad(
        input.dtype, threads, input.data_ptr(), zeros.data_ptr(), rows.data_ptr(), grad_weight.data_ptr(),
        table.data_ptr(), count, taps, channels, block_channels, _SITES_PER_BLOCK, scratch.data_ptr(), size,
    )  # fmt: skip
    return torch.empty_like(weight).copy_(grad_weight)
