"""The epilogue as an op of its own, for training, and the moments of packed rows.

With x the packed rows and vectors mean, scale, shift:

    out[m] = activation(gate[m] * ((x[m] - mean) * scale + shift) + residual[m])

Sums over the sites are taken in blocks whose size the shapes alone decide: the same bits on any number of threads.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .._backend import kept
from ..sites import fill
from ._common import SERIAL, Skipped, address, array, ceil, clear, fill_skipped, skipped_sites
from ._layout import Compute, Flag, Int32, Storage, UInt8
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .llvm.activations import ACTIVATIONS, epilogue_row, slope_row
from .llvm.elements import address_of, fill_elements, is_given, load, positive, store

_BLOCK = 128  # rows
_ZEROS = 4096  # elements of a run of sites that has its epilogue at a time


@kernel
def _forward_kernel(
    shared, compute, rows: Storage, out: Storage, residual: Storage, mean: Compute, scale: Compute, shift: Compute,
    gate: Compute, index: Int32, sites, channels, block, activation, scratch: Compute, is_packed: Flag,
    skipped: Skipped,
):  # fmt: skip
    has_gate, has_residual = is_given(gate), is_given(residual)
    values = next_worker(shared) * channels
    while True:
        begin = next_item(shared) * block
        if begin >= sites:
            return
        rows_here = min(block, sites - begin)
        fill_skipped(skipped, out, index, begin, rows_here, sites, channels)
        for m in range(begin, begin + rows_here):
            for c in range(channels):
                store(scratch, values + c, (load(rows, m * channels + c, compute) - mean[c]) * scale[c])
            site = np.int64(index[m])
            factor = gate[site] if has_gate else compute(1)
            place = (m if is_packed else site) * channels
            epilogue_row(
                scratch, values, shift, 0, factor, residual, place if has_residual else 0, out, place,
                channels, activation,
            )  # fmt: skip


@kernel
def _dense_kernel(
    shared, storage, compute, result: Storage, out: Storage, inactive: Storage, mask: UInt8, residual: Storage,
    gate: Compute, zeros: Compute, sites, channels, chunk, activation, has_epilogue: Flag, copies: Flag,
):  # fmt: skip
    """The epilogue behind a dense convolution; `has_epilogue` where the storage type is the one that is computed in."""
    has_residual, has_gate = is_given(residual), is_given(gate)
    values = array(address_of(result), compute)
    most = 1 if has_gate else max(1, _ZEROS // channels)
    while True:
        begin = next_item(shared) * chunk
        if begin >= sites:
            return
        end, site = min(sites, begin + chunk), begin
        while site < end:  # run by run
            first, is_active = site, mask[site] != 0  # any byte but zero is true
            while site < end and (mask[site] != 0) == is_active:
                site += 1
            if not is_active:
                if not copies:
                    fill_elements(inactive, out, first * channels, site * channels, False)
            elif has_epilogue:
                for some in range(first, site, positive(most)):
                    at, count = some * channels, (min(site, some + most) - some) * channels
                    factor = gate[some] if has_gate else compute(1)
                    epilogue_row(
                        values, at, zeros, 0, factor, residual, at if has_residual else 0, out, at, count, activation
                    )  # fmt: skip
            elif copies:
                fill_elements(result, out, first * channels, site * channels, False)


@kernel
def _backward_kernel(
    shared, compute, grad: Storage, rows: Storage, residual: Storage, mean: Compute, scale: Compute, shift: Compute,
    gate: Compute, index: Int32, grad_rows: Storage, grad_residual: Storage, partial: Compute, gate_grad: Compute,
    sites, channels, block, activation, scratch: Compute, is_packed: Flag, elsewhere: Skipped,
):  # fmt: skip
    has_gate, has_residual = is_given(gate), is_given(residual)
    wants_rows, wants_residual = is_given(grad_rows), is_given(grad_residual)
    wants_vectors, wants_gate = is_given(partial), is_given(gate_grad)
    values = next_worker(shared) * channels
    while True:
        item = next_item(shared)
        begin = item * block
        if begin >= sites:
            return
        sums = item * 2 * channels
        rows_here = min(block, sites - begin)
        fill_skipped(elsewhere, grad_residual, index, begin, rows_here, sites, channels)
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


@kernel
def _moments_kernel(
    shared, compute, rows: Storage, mean: Compute, partial: Compute, sites, channels, block, is_square: Flag
):
    """Write each block of rows' sum of x - mean, or of its square, to partial[block, channel]."""
    while True:
        item = next_item(shared)
        begin = item * block
        if begin >= sites:
            return
        sums = item * channels
        clear(partial, sums, channels, compute)
        for m in range(begin, min(sites, begin + block)):
            if is_square:
                for c in range(channels):
                    value = load(rows, m * channels + c, compute) - mean[c]
                    partial[sums + c] += value * value
            else:
                for c in range(channels):
                    partial[sums + c] += load(rows, m * channels + c, compute) - mean[c]


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
        fill(out, inactive, in_place)
        return
    mean, scale, shift = _vectors(channels, compute, mean, scale, shift)
    threads = workers(sites * channels // SERIAL)
    scratch = torch.empty(threads * channels, dtype=compute)
    _forward_kernel(
        rows.dtype, threads, rows=rows, out=out, residual=residual, mean=mean, scale=scale, shift=shift, gate=gate,
        index=index, sites=sites, channels=channels, block=_BLOCK, activation=ACTIVATIONS.index(activation),
        scratch=scratch, is_packed=out.dim() == 2, skipped=skipped_sites(out, inactive, in_place),
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
    skipped = (0, 0, 0, 0)
    if grad_residual is not None:
        skipped = skipped_sites(grad_residual, elsewhere, False)
        if sites == 0:
            fill(grad_residual, elsewhere, False)
    partial = torch.empty(ceil(sites, _BLOCK), 2, channels, dtype=compute) if wanted[0] else None
    gate_grad = torch.zeros(gate.numel(), dtype=compute) if wanted[1] else None
    _backward_kernel(
        rows.dtype, threads, grad=grad, rows=rows, residual=residual, mean=mean, scale=scale, shift=shift, gate=gate,
        index=index, grad_rows=grad_rows, grad_residual=grad_residual, partial=partial, gate_grad=gate_grad,
        sites=sites, channels=channels, block=_BLOCK, activation=ACTIVATIONS.index(activation), scratch=scratch,
        is_packed=grad.dim() == 2, elsewhere=skipped,
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
    for is_square in (False, True):
        _moments_kernel(
            rows.dtype, threads, rows=rows, mean=mean, partial=partial, sites=sites, channels=channels, block=_BLOCK,
            is_square=is_square,
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


_AT = _dense_kernel.at


class DenseEpilogue:
    """The epilogue behind a dense convolution, over results of one size and type: what no tensor of a call changes.

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
        has_epilogue = adds or activation != "none"
        self.zeros = _zeros(max(_ZEROS, channels), compute_type(dtype)) if has_epilogue else None
        self.threads = workers(places * channels // SERIAL)
        self.numbers = _dense_kernel.pack(
            result=None, out=None, inactive=None, mask=None, residual=None, gate=None, zeros=self.zeros, sites=places,
            channels=channels, chunk=max(_BLOCK, ceil(places, 8 * self.threads)),
            activation=ACTIVATIONS.index(activation), has_epilogue=has_epilogue, copies=copies,
        )  # fmt: skip

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
        numbers = self.numbers[:]
        numbers[_AT.result], numbers[_AT.out], numbers[_AT.inactive] = (
            result.data_ptr(),
            out.data_ptr(),
            address(inactive),
        )
        numbers[_AT.mask], numbers[_AT.residual], numbers[_AT.gate] = mask.data_ptr(), address(residual), address(gate)
        _dense_kernel.start(self.dtype, self.threads, numbers)


@functools.lru_cache(64)
def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    return kept(torch.zeros, count, dtype=dtype, device="cpu")  # whatever the default device of the first call
