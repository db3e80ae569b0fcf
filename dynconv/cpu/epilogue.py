"""The epilogue as an op of its own, for training, and the moments of packed rows.

With x the packed rows and vectors mean, scale, shift:

    out[m] = activation(gate[m] * ((x[m] - mean) * scale + shift) + residual[m])

Sums over the sites are taken in blocks whose size the shapes alone decide: the same bits on any number of threads.
"""

from __future__ import annotations

import functools
from array import array as array_of

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .._backend import kept
from ._common import SERIAL, address, array, ceil, clear, fill_all, fill_skipped, filling
from ._llvm import ACTIVATIONS, fetch_add, fill_elements, finish_row, load, positive, slope_row, store
from ._threads import compute_type, kernel, workers

_BLOCK = 128  # rows
_ZEROS = 4096  # elements of a run of sites that are finished at a time


@njit
def _forward_kernel(arguments, storage, compute):
    a = carray(arguments, (24,))
    rows, out, residual = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    mean, scale, shift, gate = array(a[5], compute), array(a[6], compute), array(a[7], compute), array(a[8], compute)
    index = array(a[9], np.int32)
    has_gate, has_residual = a[8] != 0, a[4] != 0
    sites, channels, block, activation, scratch, is_packed = a[10], a[11], a[12], a[13], array(a[14], compute), a[15]
    fill, inactive, all_sites, is_large = a[16], array(a[17], storage), a[18], a[19] != 0
    values = fetch_add(a[1:], 1) * channels
    while True:
        begin = fetch_add(a, 1) * block
        if begin >= sites:
            return
        rows_here = min(block, sites - begin)
        fill_skipped(fill, inactive, out, index, begin, rows_here, sites, all_sites, channels, is_large)
        for m in range(begin, begin + rows_here):
            for c in range(channels):
                store(scratch, values + c, (load(rows, m * channels + c, compute) - mean[c]) * scale[c])
            site = np.int64(index[m])
            factor = gate[site] if has_gate else compute(1)
            place = (m if is_packed else site) * channels
            finish_row(
                scratch, values, shift, 0, factor, residual, place if has_residual else 0, out, place,
                channels, activation,
            )  # fmt: skip


@njit
def _settle_kernel(arguments, storage, compute):
    a = carray(arguments, (20,))
    result, target, inactive = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    values, mask, residual, gate = (
        array(a[2], compute),
        array(a[5], np.uint8),
        array(a[6], storage),
        array(a[7], compute),
    )
    zeros, sites, channels, chunk = array(a[8], compute), a[9], a[10], a[11]
    activation, finishes, copies = a[12], a[13] != 0, a[14] != 0
    has_residual, has_gate = a[6] != 0, a[7] != 0
    most = 1 if has_gate else max(1, _ZEROS // channels)
    while True:
        begin = fetch_add(a, 1) * chunk
        if begin >= sites:
            return
        end, site = min(sites, begin + chunk), begin
        while site < end:  # run by run
            first, is_active = site, mask[site] != 0  # any byte but zero is true
            while site < end and (mask[site] != 0) == is_active:
                site += 1
            if not is_active:
                if not copies:
                    fill_elements(inactive, target, first * channels, site * channels, False)
            elif finishes:
                for some in range(first, site, positive(most)):
                    at, count = some * channels, (min(site, some + most) - some) * channels
                    factor = gate[some] if has_gate else compute(1)
                    finish_row(
                        values, at, zeros, 0, factor, residual, at if has_residual else 0, target, at, count, activation
                    )  # fmt: skip
            elif copies:
                fill_elements(result, target, first * channels, site * channels, False)


@njit
def _backward_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    grad, rows, residual = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    mean, scale, shift, gate = array(a[5], compute), array(a[6], compute), array(a[7], compute), array(a[8], compute)
    index = array(a[9], np.int32)
    grad_rows, grad_residual = array(a[10], storage), array(a[11], storage)
    partial, gate_grad = array(a[12], compute), array(a[13], compute)
    has_gate, has_residual = a[8] != 0, a[4] != 0
    wants_rows, wants_residual, wants_vectors, wants_gate = a[10] != 0, a[11] != 0, a[12] != 0, a[13] != 0
    sites, channels, block, activation, scratch, is_packed = a[14], a[15], a[16], a[17], array(a[18], compute), a[19]
    fill, elsewhere, all_sites, is_large = a[20], array(a[21], storage), a[22], a[23] != 0
    values = fetch_add(a[1:], 1) * channels
    while True:
        item = fetch_add(a, 1)
        begin = item * block
        if begin >= sites:
            return
        sums = item * 2 * channels
        rows_here = min(block, sites - begin)
        fill_skipped(fill, elsewhere, grad_residual, index, begin, rows_here, sites, all_sites, channels, is_large)
        if wants_vectors:
            clear(partial, sums, 2 * channels, compute)
        for m in range(begin, min(sites, begin + block)):
            site = np.int64(index[m])
            factor = gate[site] if has_gate else compute(1)
            at, place = m * channels, (m if is_packed else site) * channels
            for c in range(channels):
                value = factor * ((load(rows, at + c, compute) - mean[c]) * scale[c] + shift[c])
                store(scratch, values + c, value)
            if has_residual:
                for c in range(channels):
                    value = load(scratch, values + c, compute) + load(residual, place + c, compute)
                    store(scratch, values + c, value)
            slope_row(scratch, values, grad, place, channels, activation)
            if wants_residual:
                for c in range(channels):
                    store(grad_residual, place + c, load(scratch, values + c, compute))
            if wants_gate:
                total = compute(0)
                for c in range(channels):
                    linear = (load(rows, at + c, compute) - mean[c]) * scale[c] + shift[c]
                    total += load(scratch, values + c, compute) * linear
                gate_grad[site] = total
            if has_gate:
                for c in range(channels):
                    store(scratch, values + c, factor * load(scratch, values + c, compute))
            if wants_rows:
                for c in range(channels):
                    store(grad_rows, at + c, load(scratch, values + c, compute) * scale[c])
            if wants_vectors:
                for c in range(channels):
                    slope = load(scratch, values + c, compute)
                    partial[sums + c] += slope * (load(rows, at + c, compute) - mean[c])
                    partial[sums + channels + c] += slope


@njit
def _moments_kernel(arguments, storage, compute):
    """Of each block of rows: the sum of x - mean, or of its square, into partial[block, channel]."""
    a = carray(arguments, (16,))
    rows, mean, partial = array(a[2], storage), array(a[3], compute), array(a[4], compute)
    sites, channels, block, is_square = a[5], a[6], a[7], a[8]
    while True:
        item = fetch_add(a, 1)
        begin = item * block
        if begin >= sites:
            return
        sums = item * channels
        clear(partial, sums, channels, compute)
        for m in range(begin, min(sites, begin + block)):
            if is_square != 0:
                for c in range(channels):
                    value = load(rows, m * channels + c, compute) - mean[c]
                    partial[sums + c] += value * value
            else:
                for c in range(channels):
                    partial[sums + c] += load(rows, m * channels + c, compute) - mean[c]


_run_settle = kernel(_settle_kernel)
_run_forward = kernel(_forward_kernel)
_run_backward = kernel(_backward_kernel)
_run_moments = kernel(_moments_kernel)


def _vectors(channels: int, dtype: torch.dtype, *vectors: Tensor | None) -> list[Tensor]:
    """mean, scale and shift in the compute type; 0, 1 and 0 where there is none."""
    return [
        torch.full((channels,), float(default), dtype=dtype) if v is None else v.to(dtype).contiguous()
        for v, default in zip(vectors, (0, 1, 0), strict=True)
    ]


def forward(
    rows: Tensor,
    index: Tensor,
    count: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    inactive: Tensor | None,
    in_place: bool,
    activation: str,
) -> None:
    """Write `out` at the active sites (rows 0 to count - 1 if it is packed [capacity, C]).

    The skipped sites of a dense `out` get zeros, or what is `inactive` there; `in_place` leaves them alone.
    """
    sites, channels, compute = int(count), rows.shape[1], compute_type(rows.dtype)
    if sites == 0:
        fill_all(out, inactive, in_place)
        return
    mean, scale, shift = _vectors(channels, compute, mean, scale, shift)
    threads = workers(sites * channels // SERIAL)
    scratch = torch.empty(threads * channels, dtype=compute)
    _run_forward(
        rows.dtype, threads, rows.data_ptr(), out.data_ptr(), address(residual), mean.data_ptr(), scale.data_ptr(),
        shift.data_ptr(), address(gate), index.data_ptr(), sites, channels, _BLOCK, ACTIVATIONS.index(activation),
        scratch.data_ptr(), out.dim() == 2, *filling(out, inactive, in_place),
    )  # fmt: skip


def backward(
    grad: Tensor,
    rows: Tensor,
    index: Tensor,
    count: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    grad_rows: Tensor | None,
    grad_residual: Tensor | None,
    elsewhere: Tensor | None,
    activation: str,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of scale, shift and gate, where wanted (vectors, gate); fills grad_rows and grad_residual.

    `grad_residual` is like `grad`; where that is dense its skipped sites get zeros, or what is `elsewhere` there.
    """
    sites, channels, compute = int(count), rows.shape[1], compute_type(rows.dtype)
    mean, scale, shift = _vectors(channels, compute, mean, scale, shift)
    threads = workers(sites * channels // SERIAL)
    scratch = torch.empty(threads * channels, dtype=compute)
    filled = (0, 0, 0, 0)
    if grad_residual is not None:
        filled = filling(grad_residual, elsewhere, False)
        if sites == 0:
            fill_all(grad_residual, elsewhere, False)
    partial = torch.empty(ceil(sites, _BLOCK), 2, channels, dtype=compute) if wanted[0] else None
    gate_grad = torch.zeros(gate.numel(), dtype=compute) if wanted[1] else None
    _run_backward(
        rows.dtype, threads, grad.data_ptr(), rows.data_ptr(), address(residual), mean.data_ptr(), scale.data_ptr(),
        shift.data_ptr(), address(gate), index.data_ptr(), address(grad_rows), address(grad_residual),
        address(partial), address(gate_grad), sites, channels, _BLOCK, ACTIVATIONS.index(activation),
        scratch.data_ptr(), grad.dim() == 2, *filled,
    )  # fmt: skip
    if partial is None:
        return None, None, gate_grad
    return partial[:, 0].sum(0), partial[:, 1].sum(0), gate_grad


def moments(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of rows[:count], each [C] in the compute type; zeros for no row. In two passes."""
    sites, channels, compute = int(count), rows.shape[1], compute_type(rows.dtype)
    mean = torch.zeros(channels, dtype=compute)
    if sites == 0:
        return mean, mean.clone()
    partial = torch.empty(ceil(sites, _BLOCK), channels, dtype=compute)
    threads = workers(sites * channels // SERIAL)
    for is_square in (0, 1):
        _run_moments(
            rows.dtype, threads, rows.data_ptr(), mean.data_ptr(), partial.data_ptr(), sites, channels, _BLOCK,
            is_square,
        )  # fmt: skip
        result = partial.sum(0) / sites
        if not is_square:
            mean = result
    return mean, result


def gather(input: Tensor, index: Tensor, count: Tensor, out: Tensor) -> None:
    """out[m] = the row of the channels_last `input` at index[m], for m < count; the rest of `out` is left alone."""
    active = int(count)
    rows = input.permute(0, 2, 3, 1).reshape(-1, input.shape[1])
    torch.index_select(rows, 0, index[:active], out=out[:active])


class Settling:
    """The pass behind a dense convolution, over results of one size and type: what of a call its tensors do not change.

    Args:
        shape: [N, C, H, W] of the results.
        dtype: theirs.
        activation: its name; half types have neither activation nor gate nor residual here, which would be rounded on
            the way.
        adds: whether there is a gate or a residual.
        copies: whether the active sites go elsewhere, and nothing else does.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, activation: str, *, adds: bool, copies: bool
    ) -> None:
        samples, channels, height, width = shape
        places, self.dtype = samples * height * width, dtype
        finishes = adds or activation != "none"
        self.zeros = _zeros(max(_ZEROS, channels), compute_type(dtype)) if finishes else None
        self.threads = workers(places * channels // SERIAL)
        chunk = max(_BLOCK, ceil(places, 8 * self.threads))
        self.arguments = array_of("q", (
            0, 0, 0, 0, 0, 0, 0, 0, address(self.zeros), places, channels, chunk, ACTIVATIONS.index(activation),
            finishes, copies,
        ))  # fmt: skip

    def run(
        self,
        result: Tensor,
        mask: Tensor,
        gate: Tensor | None,
        residual: Tensor | None,
        inactive: Tensor | None,
        out: Tensor,
    ) -> None:
        """Make activation(gate * result + residual) of `result` at the active sites, in `out`, which it may be.

        All are channels_last. The skipped sites get zeros or what is `inactive` there.
        """
        arguments = self.arguments[:]
        arguments[2], arguments[3], arguments[4] = result.data_ptr(), out.data_ptr(), address(inactive)
        arguments[5], arguments[6], arguments[7] = mask.data_ptr(), address(residual), address(gate)
        _run_settle.start(self.dtype, self.threads, arguments)


@functools.lru_cache(64)
def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    return kept(torch.zeros, count, dtype=dtype, device="cpu")  # whatever the default device of the first call
