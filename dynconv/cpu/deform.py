"""Deformable convolution and aggregation on the CPU: taps that sample the input between its pixels.

With position(s, o, tap) where site s samples by a tap for the offset group o, and the four pixels p around it,

    share(p)        (1 - |y - py|) * (1 - |x - px|), zero for pixels outside of the input
    column[s, tap]  = scale[s, o, tap] * sum over p of share(p) * x[p], of which the channels of o
    aggregation     y[s] = sum over taps of column[s, tap]
    convolution     y[s] = sum over taps of column[s, tap] @ weight[tap]: a 1x1 convolution of the columns

The columns are made for some sites at a time, never for all: kH * kW times the input. The gradients of what is sampled
come from the rows r[s, tap], the gradients of the columns (of an aggregation those of y, the same for every tap):

    input           dx[p] += scale * share(p) * r[s, tap]
    scale, offset   from the four dots of x[p] with r[s, tap]

The first is a scatter: a thread adds up some groups of one sample, or a slice of a group's channels, site by site, so
that no two threads write the same element and the order is always the same.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .._geometry import Geometry
from . import masked_conv
from ._common import Window, array, ceil, clear, vector_lanes
from ._layout import Compute, Flag, Storage, UInt8
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .dynamic_filter import cache_lines
from .llvm.elements import address_of, is_given, store
from .llvm.sampling import (
    CORNERS,
    SHARES,
    corner_dots,
    locate,
    position_grads,
    sample_columns,
    sample_sum,
    scatter,
)
from .llvm.tiles import ROWS

_CHUNKS_PER_THREAD = 8
_COLUMNS_BYTES = 1 << 21  # of the columns that are made at a time: they are read again at once, from the cache
_SLICE = 16  # channels that a thread adds up at a time, at least


@njit(inline="always")
def _memory(tables, size, room, block, taps, inner, window, compute_size, compute):
    """A thread's own: tables of taps, of channels, addresses of pixels and targets, shares, dots, and two rows.

    The first row stays zeros, for what is read outside of the input; the second takes what is added there. They are of
    `inner` channels, and the tables of `block` groups' taps; all begin at an address.
    """
    shifts = tables + 2 * room * compute_size
    pixels = shifts + 8 * room
    targets = pixels + 8 * CORNERS * room
    shares = targets + 8 * CORNERS * room
    dots = shares + SHARES * room * compute_size
    zeros = dots + CORNERS * room * compute_size
    clear(array(tables, compute), 0, size // compute_size, compute)
    for t in range(block * taps):
        tap = t % taps
        store(array(tables, compute), t, compute(tap // window.kernel_width * window.dilation_y))
        store(array(tables, compute), room + t, compute(tap % window.kernel_width * window.dilation_x))
        store(array(shifts, np.int64), t, t // taps * inner)
    return (
        array(tables, compute), array(shifts, np.int64), array(pixels, np.int64), array(targets, np.int64),
        array(shares, compute), array(dots, compute), zeros, zeros + inner * compute_size,
    )  # fmt: skip


@njit(inline="always")
def _site_place(window, site):
    """The first pixel's row of a site's sample, and the line and column of its tap (0, 0)."""
    line = site // window.out_width
    sample = line // window.out_height
    y = (line - sample * window.out_height) * window.stride_y - window.pad_y
    x = (site - line * window.out_width) * window.stride_x - window.pad_x
    return sample * window.height * window.width, y, x


@kernel
def _sample_kernel(
    shared, compute, source: Storage, out: Storage, offsets: Storage, scales: Storage, has_scales, begin, end, chunk,
    channels, groups, taps, element_size, compute_size, room, is_sum: Flag, memory: UInt8, memory_size, window: Window,
):  # fmt: skip
    """The columns of the sites begin..end, in the compute type, or their sums over the taps, in the storage type."""
    columns, inner, count = array(address_of(out), compute), channels // groups, groups * taps
    tables, shifts, pixels, targets, shares, _, zeros, _ = _memory(
        address_of(memory) + next_worker(shared) * memory_size, memory_size, room, groups, taps, inner, window,
        compute_size, compute,
    )  # fmt: skip
    while True:
        first = begin + next_item(shared) * chunk
        if first >= end:
            return
        for site in range(first, min(end, first + chunk)):
            pixel, y, x = _site_place(window, site)
            locate(
                has_targets=False, tables=tables, shifts=shifts, room=room, count=count, y=compute(y), x=compute(x),
                height=window.height, width=window.width, channels=channels, offsets=offsets, scales=scales,
                at=site * count, has_scales=has_scales, base=address_of(source) + pixel * channels * element_size,
                outside=zeros, target_base=0, target_outside=0, pixels=pixels, targets=targets, shares=shares,
            )  # fmt: skip
            if is_sum:
                target = address_of(out) + site * channels * element_size
                sample_sum(groups, taps, room, pixels, shares, source, inner, target, 0, out)
            else:
                step = channels * compute_size
                target = address_of(out) + (site - begin) * taps * step
                sample_columns(groups, taps, room, pixels, shares, source, inner, target, step, columns)


@kernel
def _grad_kernel(
    shared, compute, source: Storage, grad_input: Compute, grad_offsets: Storage, grad_scales: Storage,
    offsets: Storage, scales: Storage, has_scales, rows: Compute, begin, end, chunk, channels, groups, taps,
    site_stride, tap_stride, element_size, compute_size, room, block, slices, memory: UInt8, memory_size,
    window: Window,
):  # fmt: skip
    """The gradients of input, offsets and scales from the rows of the sites begin..end, those that are asked for.

    An item of work is, for the input, a slice of the channels of some groups of a sample, else `chunk` sites.
    """
    area, inner = window.out_height * window.out_width, channels // groups
    scatters, has_positions = is_given(grad_input), is_given(grad_offsets) or is_given(grad_scales)
    tables, shifts, pixels, targets, shares, dots, zeros, nowhere = _memory(
        address_of(memory) + next_worker(shared) * memory_size, memory_size, room, block, taps, inner, window,
        compute_size, compute,
    )  # fmt: skip
    blocks, first_sample = (groups + block - 1) // block, begin // area
    while True:
        item = next_item(shared)
        group, channel, width = 0, 0, inner
        if scatters:
            sample, part = first_sample + item // (blocks * slices), item % (blocks * slices)
            first, last = max(begin, sample * area), min(end, (sample + 1) * area)
            group, part = part // slices * block, part % slices
            channel = inner * part // slices
            width = inner * (part + 1) // slices - channel
        else:
            first = begin + item * chunk
            last = min(end, first + chunk)
        if first >= end:
            return
        some = min(block, groups - group)
        shift, count = group * inner + channel, some * taps
        if scatters and first == sample * area:  # here, while it is near: a pass of its own would fetch all of it twice
            pixels_here = window.height * window.width
            for pixel in range(sample * pixels_here, (sample + 1) * pixels_here):
                clear(grad_input, pixel * channels + shift, width + (some - 1) * inner, compute)
        for site in range(first, last):
            pixel, y, x = _site_place(window, site)
            base = pixel * channels + shift
            at = (site * groups + group) * taps
            locate(
                has_targets=scatters, tables=tables, shifts=shifts, room=room, count=count, y=compute(y), x=compute(x),
                height=window.height, width=window.width, channels=channels, offsets=offsets, scales=scales, at=at,
                has_scales=has_scales, base=address_of(source) + base * element_size, outside=zeros,
                target_base=address_of(grad_input) + base * compute_size, target_outside=nowhere, pixels=pixels,
                targets=targets, shares=shares,
            )  # fmt: skip
            row = address_of(rows) + ((site - begin) * site_stride + shift) * compute_size
            group_step, tap_step = inner * compute_size, tap_stride * compute_size
            if has_positions:
                corner_dots(some, taps, room, pixels, source, row, group_step, tap_step, inner, dots)
                position_grads(
                    count, room, shares, dots, at, grad_offsets, is_given(grad_offsets), grad_scales,
                    is_given(grad_scales),
                )  # fmt: skip
            if scatters:
                scatter(some, taps, room, targets, shares, row, group_step, tap_step, width)


class Sampling:
    """One call's operands, geometry and what its kernels share.

    Args:
        input: [N, C, H, W], as the others in channels_last.
        offset: [N, 2 * G * kH * kW, Ho, Wo].
        scales: [N, G * kH * kW, Ho, Wo], the mask of a convolution or the weights of an aggregation, or None.
    """

    def __init__(self, input: Tensor, offset: Tensor, scales: Tensor | None, geometry: Geometry) -> None:
        self.input, self.offset, self.scales = input, offset, scales
        self.dtype, self.compute = input.dtype, compute_type(input.dtype)
        self.taps = geometry.kernel[0] * geometry.kernel[1]
        self.channels, self.groups = input.shape[1], offset.shape[1] // (2 * self.taps)
        self.sites = offset.shape[0] * offset.shape[2] * offset.shape[3]
        self.window = Window(
            *offset.shape[2:], *input.shape[2:], *geometry.kernel, *geometry.stride, *geometry.padding,
            *geometry.dilation,
        )  # fmt: skip

    def chunks(self) -> list[tuple[int, int]]:
        """The sites whose columns are made at a time: begin and end of each; their number depends on shapes alone."""
        row = self.taps * self.channels * self.compute.itemsize
        size = max(16, _COLUMNS_BYTES // max(1, row))
        return [(begin, min(self.sites, begin + size)) for begin in range(0, self.sites, size)]

    def aggregate(self, out: Tensor) -> None:
        """Into `out` [N, C, Ho, Wo], channels_last."""
        self._sample(0, self.sites, out, is_sum=True)

    def columns(self, begin: int, end: int) -> Tensor:
        """[end - begin and some, kH * kW, C] in the compute type: what the sites sample, times the scale."""
        columns = _with_room(end - begin, self.taps * self.channels, self.compute)
        self._sample(begin, end, columns, is_sum=False)
        return columns.view(-1, self.taps, self.channels)

    def grads(
        self,
        rows: Tensor,
        begin: int,
        end: int,
        grad_input: Tensor | None,
        grad_offset: Tensor | None,
        grad_scales: Tensor | None,
    ) -> None:
        """Add to `grad_input`, which a sample's first site clears, and write the rows begin..end of the others.

        Args:
            rows: in the compute type; [sites, kH * kW, C], or [sites, C] where all taps have the same.
            begin, end: the sites of these rows.
            grad_input: like the input, but in the compute type; or None, as the next two.
            grad_offset, grad_scales: like offset and scales.
        """
        positions = {"grad_offsets": grad_offset, "grad_scales": grad_scales}
        has_positions = grad_offset is not None or grad_scales is not None
        if grad_input is None:
            if has_positions:
                self._grads(rows, begin, end, grad_input=None, **positions)
            return
        # A thread has a part of a sample to itself: some of its groups, of a single one perhaps a slice of channels.
        area, threads = self.window.out_height * self.window.out_width, torch.get_num_threads()
        samples = (end - 1) // area - begin // area + 1
        parts = ceil(threads, samples)
        block = ceil(self.groups, parts)
        inner = self.channels // self.groups
        slices = max(1, min(ceil(parts, self.groups), inner // _SLICE)) if block == 1 else 1
        if slices > 1 and has_positions:  # whose dots are those of all channels
            self._grads(rows, begin, end, grad_input=None, **positions)
            positions = dict.fromkeys(positions)
        self._grads(rows, begin, end, grad_input=grad_input, **positions, block=block, slices=slices)

    def _sample(self, begin: int, end: int, out: Tensor, is_sum: bool) -> None:
        common = self._common(begin, end, self.groups)
        _sample_kernel(self.dtype, workers(end - begin), out=out, is_sum=is_sum, **common)

    def _grads(self, rows: Tensor, begin: int, end: int, block: int | None = None, slices: int = 1, **grads) -> None:
        block = block or self.groups
        _grad_kernel(
            self.dtype, workers(end - begin), rows=rows, site_stride=rows.stride(0),
            tap_stride=rows.stride(1) if rows.dim() == 3 else 0, block=block, slices=slices, **grads,
            **self._common(begin, end, block),
        )  # fmt: skip

    def _common(self, begin: int, end: int, block: int) -> dict:
        """The arguments that both kernels take for the sites begin..end; a thread has tables of `block` groups."""
        threads, compute, lanes = workers(end - begin), self.compute.itemsize, vector_lanes(self.dtype)
        room, width = ceil(block * self.taps, lanes) * lanes, self.channels // self.groups
        memory = cache_lines(room * (8 + 2 * 8 * CORNERS + compute * (2 + SHARES + CORNERS)) + 2 * width * compute)
        # Where there are no scales the kernels have something else to read.
        scales, has_scales = (self.offset, False) if self.scales is None else (self.scales, True)
        return {
            "source": self.input, "offsets": self.offset, "scales": scales, "has_scales": has_scales, "begin": begin,
            "end": end, "chunk": ceil(end - begin, _CHUNKS_PER_THREAD * threads), "channels": self.channels,
            "groups": self.groups, "taps": self.taps, "element_size": self.input.element_size(),
            "compute_size": compute, "room": room, "memory_size": memory, "window": self.window,
            "memory": torch.empty(threads * memory, dtype=torch.uint8),
        }  # fmt: skip


class Product:
    """The 1x1 convolution of columns that a deformable convolution ends with, in the order of PyTorch's weight.

    Matrix products whose bits do not depend on the threads, as those of BLAS may.

    Args:
        weight: [Cout, C / groups, kH, kW].
        bias: [Cout], or None; for the forward.
        channels: C.
        dtype: the compute type.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, channels: int, dtype: torch.dtype) -> None:
        self.weight, self.groups, self.dtype = weight, channels // weight.shape[1], dtype
        # [groups, filters of a group, kH * kW * channels of a group], taps before channels.
        self.matrices = weight.to(dtype).permute(0, 2, 3, 1).reshape(self.groups, -1, weight[0].numel())
        self.shifts = [None] * self.groups if bias is None else bias.to(dtype).view(self.groups, -1)
        self.grad = None

    def forward(self, columns: Tensor, out: Tensor) -> None:
        """out [sites, Cout] = columns [sites and some, kH * kW, C] @ weight + bias, in any of the types."""
        products = [
            _multiply(part, len(out), matrix, shift, out if self.groups == 1 else None)
            for part, matrix, shift in zip(self._split(columns), self.matrices, self.shifts)
        ]
        if products[0] is not out:
            torch.cat(products, 1, out=out) if out.dtype == self.dtype else out.copy_(torch.cat(products, 1))

    @functools.cached_property
    def transposed(self) -> Tensor:
        """The matrices, as the gradient of the columns is multiplied by them: made once for all its sites."""
        return self.matrices.transpose(1, 2).contiguous()

    def column_grads(self, rows: Tensor, begin: int, end: int) -> Tensor:
        """[end - begin, kH * kW, C] from these rows of the output's gradient [sites, Cout], in the compute type."""
        filters, some = rows.shape[1] // self.groups, rows[begin : end + ROWS]
        parts = [
            _multiply(part, end - begin, matrix, None, None).view(end - begin, -1, self.weight.shape[1])
            for part, matrix in zip(some.split(filters, 1), self.transposed)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def add_weight_grad(self, columns: Tensor, rows: Tensor) -> None:
        """Add the share of some sites to `grad`, like the matrices."""
        grad, filters = torch.empty_like(self.matrices), rows.shape[1] // self.groups
        index = _numbers(len(rows))
        for part, given, target in zip(self._split(columns), rows.split(filters, 1), grad):
            padded = _with_room(len(rows), filters, self.dtype)
            padded[: len(rows)] = given
            padded[len(rows) :] = 0
            masked_conv.weight_grad(padded, part, None, None, index, len(rows), target[:, :, None, None], 1)
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def weight_grad(self) -> Tensor:
        """Return what has been added up, like the weight."""
        filters, channels, *kernel = self.weight.shape
        return self.grad.view(filters, *kernel, channels).permute(0, 3, 1, 2).to(self.weight.dtype).contiguous()

    def _split(self, columns: Tensor) -> list[Tensor]:
        """For each group [sites and some, kH * kW * channels of the group], contiguous."""
        # With one channel a group, or one tap, `flatten` gives a view of rows that are far apart.
        return [part.flatten(1).contiguous() for part in columns.split(self.weight.shape[1], 2)]


def bias_grad(rows: Tensor) -> Tensor:
    """The sum of rows [sites, Cout]."""
    return masked_conv.bias_grad(rows, _numbers(len(rows)), len(rows))


def _multiply(rows: Tensor, count: int, matrix: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """rows [count, depth] @ matrix [filters, depth].T + bias; into `out` [count, filters] where it is of the same type.

    Rows with room behind them, see `_with_room`, are read where they lie instead of being copied.
    """
    result = out
    if out is None or out.dtype != rows.dtype:
        result = torch.empty(count, matrix.shape[0], dtype=rows.dtype)
    masked_conv.forward(
        rows.contiguous(), matrix[:, :, None, None], bias, table=None, index=_numbers(count), count=count, gate=None,
        residual=None, out=result, inactive=None, in_place=True, groups=1, activation="none", reads=(None, (0,) * 12),
    )  # fmt: skip
    return result


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def _with_room(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows and some, columns]: tiles may read a few rows past the last."""
    return torch.empty(rows + ROWS, columns, dtype=dtype)
