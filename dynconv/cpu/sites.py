"""The active set on the CPU: compaction, its inverse, the neighbour table and the pixels that are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit

from ._llvm import fetch_add, pointer
from ._threads import kernel, workers


@njit(inline="always")
def _entries(address):
    return carray(pointer(address, np.int32), (1 << 40,))  # no length: all offsets are computed


@njit
def _compact(arguments, storage, compute):
    a = carray(arguments, (8,))
    sites = a[5]
    mask = carray(pointer(a[2], np.uint8), (sites,))
    words = carray(pointer(a[2], np.uint64), (sites // 8,))
    index = carray(pointer(a[3], np.int32), (sites,))
    count = 0
    for word in range(sites // 8):
        if words[word] == 0:  # a mask is mostly runs
            continue
        for site in range(word * 8, word * 8 + 8):
            index[count] = site
            count += mask[site] != 0
    for site in range(sites // 8 * 8, sites):
        if mask[site] != 0:
            index[count] = site
            count += 1
    carray(pointer(a[4], np.int32), (1,))[0] = count


@njit
def _inverse(arguments, storage, compute):
    a = carray(arguments, (8,))
    count, chunk = a[4], a[5]
    index = _entries(a[2])
    inverse = _entries(a[3])
    while True:
        first = fetch_add(a, 1) * chunk
        if first >= count:
            return
        for m in range(first, min(count, first + chunk)):
            inverse[np.int64(index[m])] = m


@njit
def _neighbours(arguments, storage, compute):
    a = carray(arguments, (24,))
    index, table = _entries(a[2]), _entries(a[3])
    count, chunk = a[4], a[5]
    out_height, out_width, height, width = a[6], a[7], a[8], a[9]
    kernel_height, kernel_width, stride_y, stride_x = a[10], a[11], a[12], a[13]
    pad_y, pad_x, dilation_y, dilation_x = a[14], a[15], a[16], a[17]
    taps = kernel_height * kernel_width
    offsets = np.empty(taps, np.int32)
    for ky in range(kernel_height):
        for kx in range(kernel_width):
            offsets[ky * kernel_width + kx] = ky * dilation_y * width + kx * dilation_x
    last_y, last_x = height - (kernel_height - 1) * dilation_y, width - (kernel_width - 1) * dilation_x
    while True:
        first = fetch_add(a, 1) * chunk
        if first >= count:
            return
        for m in range(first, min(count, first + chunk)):
            site = np.int64(index[m])
            line, ox = site // out_width, site % out_width
            sample, oy = line // out_height, line % out_height
            y, x = oy * stride_y - pad_y, ox * stride_x - pad_x
            corner = (sample * height + y) * width + x
            if 0 <= y < last_y and 0 <= x < last_x:  # no tap in the padding, as nearly everywhere
                for tap in range(taps):
                    table[m * taps + tap] = corner + offsets[tap]
                continue
            for tap in range(taps):
                tap_y, tap_x = y + tap // kernel_width * dilation_y, x + tap % kernel_width * dilation_x
                inside = 0 <= tap_y < height and 0 <= tap_x < width
                table[m * taps + tap] = corner + offsets[tap] if inside else -1


_run_compact = kernel(_compact)
_run_inverse = kernel(_inverse)
_run_neighbours = kernel(_neighbours)
_CHUNK = 512
_SERIAL = 1 << 13  # entries that a second thread has to save before it is worth waking


def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat positions of a contiguous bool mask's active elements, int32 in order, and their count [1]."""
    index = torch.full((mask.numel(),), -1, dtype=torch.int32)  # past the count: the same bits at every call
    count = torch.zeros(1, dtype=torch.int32)
    _run_compact(torch.float32, 1, mask.data_ptr(), index.data_ptr(), count.data_ptr(), mask.numel())
    return index, count


def inverse(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Each site's position in the index, or -1."""
    inverse = torch.full_like(index, -1)
    n = int(count)
    _run_inverse(torch.float32, workers(n // _SERIAL), index.data_ptr(), inverse.data_ptr(), n, _CHUNK)
    return inverse


def neighbours(index: torch.Tensor, count: torch.Tensor, geometry: tuple[int, ...]) -> torch.Tensor:
    """[capacity, taps]; see `dynconv.sites.ActiveSites.neighbours`."""
    taps = geometry[4] * geometry[5]
    table = torch.empty(index.numel(), taps, dtype=torch.int32)
    n = int(count)
    _run_neighbours(
        torch.float32, workers(n * taps // _SERIAL), index.data_ptr(), table.data_ptr(), n, _CHUNK, *geometry
    )
    return table


def touched(
    mask: torch.Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """bool [N, 1, H, W]: the input pixels that any active site of `mask` [N, 1, Ho, Wo] reads."""
    height, width = input_size
    touched = mask.new_zeros(mask.shape[0], 1, height, width)
    for ky in range(kernel_size[0]):
        for kx in range(kernel_size[1]):
            rows = _span(mask.shape[2], height, ky * dilation[0] - padding[0], stride[0])
            columns = _span(mask.shape[3], width, kx * dilation[1] - padding[1], stride[1])
            if rows is not None and columns is not None:
                touched[:, :, rows[1], columns[1]] |= mask[:, :, rows[0], columns[0]]
    return touched


def _span(outputs: int, inputs: int, offset: int, stride: int) -> tuple[slice, slice] | None:
    """The outputs o for which o * stride + offset is an input, and those inputs."""
    first = max(0, -(offset // stride))
    last = min(outputs - 1, (inputs - 1 - offset) // stride)
    if first > last:
        return None
    start = first * stride + offset
    return slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride)
