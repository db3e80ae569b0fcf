"""The active set on the CPU: compaction, its inverse, the neighbour table and the pixels that are read."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from ._common import Window, array
from ._layout import Int32, Result, UInt8
from ._threads import kernel, next_item, workers
from .llvm.elements import address_of, is_given, merge_bytes


@kernel
def _compact_kernel(mask: UInt8, index: Int32, sites, active: Result):
    """List the active sites of a mask in `index`, and count them."""
    words, count = array(address_of(mask), np.uint64), 0
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
    active[0] = count


@kernel
def _count_kernel(mask: UInt8, sites, active: Result):
    count = 0
    for site in range(sites):
        count += mask[site] != 0
    active[0] = count


@kernel
def _inverse_kernel(shared, index: Int32, inverse: Int32, count, chunk):
    while True:
        first = next_item(shared) * chunk
        if first >= count:
            return
        for m in range(first, min(count, first + chunk)):
            inverse[np.int64(index[m])] = m


@kernel
def _neighbours_kernel(shared, index: Int32, table: Int32, count, chunk, window: Window, lookup: Int32, offsets: Int32):
    (out_height, out_width, height, width, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y,
     dilation_x) = window  # fmt: skip
    is_packed, taps = is_given(lookup), kernel_height * kernel_width
    last_y, last_x = height - (kernel_height - 1) * dilation_y, width - (kernel_width - 1) * dilation_x
    while True:
        first = next_item(shared) * chunk
        if first >= count:
            return
        for m in range(first, min(count, first + chunk)):
            site = np.int64(index[m])
            line, ox = site // out_width, site % out_width
            sample, oy = line // out_height, line % out_height
            y, x = oy * stride_y - pad_y, ox * stride_x - pad_x
            corner = (sample * height + y) * width + x
            entry = m * taps
            if not (0 <= y < last_y and 0 <= x < last_x):
                for tap in range(taps):
                    tap_y, tap_x = y + tap // kernel_width * dilation_y, x + tap % kernel_width * dilation_x
                    if 0 <= tap_y < height and 0 <= tap_x < width:
                        pixel = corner + offsets[tap]
                        table[entry + tap] = lookup[pixel] if is_packed else pixel
                    else:
                        table[entry + tap] = -1
            elif is_packed:  # no tap in the padding, as nearly everywhere
                for tap in range(taps):
                    table[entry + tap] = lookup[corner + offsets[tap]]
            else:
                for tap in range(taps):
                    table[entry + tap] = corner + offsets[tap]


@kernel
def _readers_kernel(shared, pixels: Int32, table: Int32, count, chunk, window: Window, inverse: Int32):
    (out_height, out_width, height, width, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y,
     dilation_x) = window  # fmt: skip
    taps = kernel_height * kernel_width
    while True:
        first = next_item(shared) * chunk
        if first >= count:
            return
        for m in range(first, min(count, first + chunk)):
            pixel = np.int64(pixels[m])
            line, x = pixel // width, pixel % width
            sample, y = line // height, line % height
            for tap in range(taps):
                tap_y, tap_x = y + pad_y - tap // kernel_width * dilation_y, x + pad_x - tap % kernel_width * dilation_x
                out_y, out_x = tap_y // stride_y, tap_x // stride_x
                inside = 0 <= out_y < out_height and 0 <= out_x < out_width
                reads = inside and out_y * stride_y == tap_y and out_x * stride_x == tap_x
                table[m * taps + tap] = inverse[(sample * out_height + out_y) * out_width + out_x] if reads else -1


@kernel
def _touched_kernel(shared, mask: UInt8, touched: UInt8, lines, chunk, window: Window):
    (out_height, out_width, height, width, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y,
     dilation_x) = window  # fmt: skip
    while True:
        first = next_item(shared) * chunk
        if first >= lines:
            return
        for line in range(first, min(lines, first + chunk)):
            sample, y, target = line // height, line % height, line * width
            for ky in range(kernel_height):
                tap_y = y + pad_y - ky * dilation_y
                out_y = tap_y // stride_y
                if out_y * stride_y != tap_y or not 0 <= out_y < out_height:
                    continue
                source = (sample * out_height + out_y) * out_width
                for kx in range(kernel_width):
                    # The sites whose tap lies inside the line: contiguous on both sides for stride 1.
                    offset = kx * dilation_x - pad_x
                    begin = max(0, -(offset // stride_x))
                    end = min(out_width, (width - 1 - offset) // stride_x + 1)
                    if stride_x == 1:
                        merge_bytes(mask, source + begin, touched, target + offset + begin, max(0, end - begin))
                    else:
                        for x in range(begin, end):
                            touched[target + offset + x * stride_x] |= mask[source + x]


_CHUNK, _LINES = 512, 16
_SERIAL = 1 << 13  # entries that a second thread has to save before it is worth waking


def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat positions of a contiguous bool mask's active elements, int32 in order, and their count [1]."""
    index = torch.full((mask.numel(),), -1, dtype=torch.int32)  # past the count: the same bits at every call
    return index, torch.tensor([list_active(mask, index)], dtype=torch.int32)


def list_active(mask: torch.Tensor, index: torch.Tensor) -> int:
    """Write the flat positions of a contiguous bool mask's active elements into `index`, in order; how many there are.

    `index` int32 has room for all elements.
    """
    numbers = _compact_kernel.pack(mask=mask, index=index, sites=mask.numel(), active=0)
    _compact_kernel.start(torch.float32, 1, numbers)
    return numbers[_compact_kernel.at.active]


def count_active(mask: torch.Tensor) -> int:
    """How many elements of a contiguous bool mask are active."""
    numbers = _count_kernel.pack(mask=mask, sites=mask.numel(), active=0)
    _count_kernel.start(torch.float32, 1, numbers)
    return numbers[_count_kernel.at.active]


def inverse(index: torch.Tensor, count: torch.Tensor, sites: int) -> torch.Tensor:
    """Each of so many sites' position in the index, or -1."""
    inverse = torch.full((sites,), -1, dtype=torch.int32)
    n = int(count)
    _inverse_kernel(torch.float32, workers(n // _SERIAL), index=index, inverse=inverse, count=n, chunk=_CHUNK)
    return inverse


def neighbours(
    index: torch.Tensor, count: torch.Tensor, geometry: tuple[int, ...], lookup: torch.Tensor | None = None
) -> torch.Tensor:
    """[capacity, taps]: the pixel, or what `lookup` has for it; see `dynconv.sites.ActiveSites.neighbours`."""
    _, _, _, width, *kernel_size, _, _, _, _, dilation_y, dilation_x = geometry
    offsets = _tap_offsets(*kernel_size, dilation_y * width, dilation_x)
    return _table(_neighbours_kernel, index.numel(), count, geometry, index=index, lookup=lookup, offsets=offsets)


@functools.lru_cache(256)
def _tap_offsets(height: int, width: int, line: int, column: int) -> torch.Tensor:
    """int32 [taps]: how far each tap reads from the first one, in pixels."""
    offsets = [ky * line + kx * column for ky in range(height) for kx in range(width)]
    return torch.tensor(offsets, dtype=torch.int32)


def readers(
    pixels: torch.Tensor, count: torch.Tensor, geometry: tuple[int, ...], inverse: torch.Tensor
) -> torch.Tensor:
    """[capacity, taps]: the position of the active site that reads each listed input pixel through each tap, or -1."""
    return _table(_readers_kernel, pixels.numel(), count, geometry, pixels=pixels, inverse=inverse)


def _table(kernel_, capacity, count, window, **operands) -> torch.Tensor:
    taps, n = window[4] * window[5], int(count)
    table = torch.empty(capacity, taps, dtype=torch.int32)
    threads = workers(n * taps // _SERIAL)
    kernel_(torch.float32, threads, table=table, count=n, chunk=_CHUNK, window=window, **operands)
    return table


def touched(
    mask: torch.Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """bool [N, 1, H, W]: the input pixels that any active site of the contiguous `mask` [N, 1, Ho, Wo] reads."""
    touched = mask.new_zeros(mask.shape[0], 1, *input_size)
    lines = mask.shape[0] * input_size[0]
    window = (*mask.shape[2:], *input_size, *kernel_size, *stride, *padding, *dilation)
    threads = workers(touched.numel() * kernel_size[0] * kernel_size[1] // (64 * _SERIAL))
    _touched_kernel(torch.float32, threads, mask=mask, touched=touched, lines=lines, chunk=_LINES, window=window)
    return touched
