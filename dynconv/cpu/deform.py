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

The first is a scatter: a thread adds up one slice of the channels of one sample, site by site, so that no two threads
write the same element and the order is always the same.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from .._geometry import Geometry
from . import masked_conv
from ._common import address, array, ceil, clear, vector_lanes
from ._llvm import ROWS as TILE_ROWS
from ._llvm import (
    _at_address,
    _call,
    _constant,
    _data,
    _for,
    _for_strips,
    _function,
    _i64,
    _lanes,
    _read,
    _splat,
    _write,
    fetch_add,
    load,
    store,
)
from ._threads import compute_type, kernel, workers
from .dynamic_filter import cache_lines, dot_rows

_CHUNKS_PER_THREAD = 8
_COLUMNS_BYTES = 1 << 21  # of the columns that are made at a time: they are read again at once, from the cache
_SLICE = 16  # channels that a thread adds up at a time
_CORNERS = 4


@intrinsic
def _locate(typingctx, places, room, y, x, height, width, base, row_size, outside, addresses, shares):
    """Where `room` taps, whole vectors, sample, and by how much.

    The tap t lies at (y + places[t], x + places[room + t]). addresses[k * room + t] is that of the pixel k of the four
    around it, `base` being that of the pixel (0, 0), or `outside`; shares[k * room + t] the pixel's share times
    places[2 * room + t], and shares[(4, 5) * room + t] how far below and to the right of the first pixel the tap lies.
    """
    compute = places.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)
        lanes, i32 = _lanes(element), ir.IntType(32)
        vector, rows, wide = (ir.VectorType(kind, lanes) for kind in (element, i32, _i64))

        def build(builder, arguments):
            places, room, y, x, height, width, base, row_size, outside, addresses, shares = arguments
            one, zero = _constant(vector, 1.0), _constant(vector, 0.0)
            begin = [_splat(builder, v, vector) for v in (y, x)]
            size = [_splat(builder, builder.sitofp(v, element), vector) for v in (height, width)]
            columns = _splat(builder, builder.trunc(width, i32), rows)
            base, row_size, outside = (_splat(builder, v, wide) for v in (base, row_size, outside))
            line_size = builder.mul(row_size, _splat(builder, width, wide))

            def taps(builder, t, values):
                place = lambda which: builder.add(t, builder.mul(room, _i64(which)))
                read = lambda which: _read(builder, places, place(which), lanes, compute)
                at = [builder.fadd(start, read(axis)) for axis, start in enumerate(begin)]
                inside = _constant(ir.VectorType(ir.IntType(1), lanes), 1)
                for value, most in zip(at, size):  # false for NaN
                    inside = builder.and_(inside, builder.fcmp_ordered(">", value, _constant(vector, -1.0)))
                    inside = builder.and_(inside, builder.fcmp_ordered("<", value, most))
                at = [builder.select(inside, value, zero) for value in at]
                first = [_call(builder, "floor", value) for value in at]
                behind = [builder.fsub(value, start) for value, start in zip(at, first)]
                before = [builder.fsub(one, value) for value in behind]
                is_in = [
                    (
                        builder.and_(inside, builder.fcmp_ordered(">=", start, zero)),
                        builder.and_(inside, builder.fcmp_ordered("<", start, builder.fsub(most, one))),
                    )
                    for start, most in zip(first, size)
                ]
                row, column = (builder.fptosi(start, rows) for start in first)
                pixel = builder.sext(builder.add(builder.mul(row, columns), column), wide)
                corner = builder.add(base, builder.mul(pixel, row_size))
                scale = read(2)
                for k in range(_CORNERS):
                    down, right = divmod(k, 2)
                    address = builder.add(corner, line_size) if down else corner
                    address = builder.add(address, row_size) if right else address
                    valid = builder.and_(is_in[0][down], is_in[1][right])
                    address = builder.select(valid, address, outside)
                    target = builder.bitcast(builder.gep(addresses, [place(k)]), wide.as_pointer())
                    builder.store(address, target, align=8)
                    share = builder.fmul((behind if down else before)[0], (behind if right else before)[1])
                    _write(builder, builder.fmul(scale, share), shares, place(k), lanes, compute)
                for axis in range(2):
                    _write(builder, behind[axis], shares, place(_CORNERS + axis), lanes, compute)
                return []

            _for(builder, _i64(0), room, lanes, [], taps)

        pointer = element.as_pointer()
        function = _function(
            builder.module,
            f"dynconv_locate_{compute}",
            [pointer, _i64, element, element, *[_i64] * 5, _i64.as_pointer(), pointer],
            build,
        )
        data = lambda which: _data(context, builder, signature, args, which)
        builder.call(function, [data(0), *args[1:9], data(9), data(10)])
        return context.get_dummy_value()

    i = types.int64
    return types.void(places, i, compute, compute, i, i, i, i, i, addresses, shares), codegen


def _sample(is_sum: bool):
    @intrinsic
    def sample(typingctx, taps, room, addresses, shares, source, inner, target, step, out):
        storage, compute, result = source.dtype, shares.dtype, out.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(compute)
            stored, written = (_data(context, builder, signature, args, which).type.pointee for which in (4, 8))

            def build(builder, arguments):
                taps, room, addresses, shares, inner, target, step = arguments

                def strip(builder, channel, vectors, lanes):
                    zero = _constant(element if lanes == 1 else ir.VectorType(element, lanes), 0.0)

                    def tap(builder, t, totals):
                        following = []
                        for k in range(_CORNERS):
                            at = builder.add(t, builder.mul(room, _i64(k)))
                            row = _at_address(builder, builder.load(builder.gep(addresses, [at])), stored)
                            share = _read(builder, shares, at, 1, compute)
                            share = share if lanes == 1 else _splat(builder, share, zero.type)
                            for v in range(vectors):
                                value = _read(builder, row, builder.add(channel, _i64(v * lanes)), lanes, storage)
                                following.append(_call(builder, "fma", share, value, totals[k * vectors + v]))
                        if is_sum:
                            return following
                        finish(builder, following, builder.add(target, builder.mul(step, t)))
                        return []

                    def finish(builder, totals, place):
                        row = _at_address(builder, place, written)
                        for v in range(vectors):
                            upper, lower = (
                                builder.fadd(totals[k * vectors + v], totals[(k + 1) * vectors + v]) for k in (0, 2)
                            )
                            at = builder.add(channel, _i64(v * lanes))
                            _write(builder, builder.fadd(upper, lower), row, at, lanes, result)

                    start = [zero] * (_CORNERS * vectors)
                    if is_sum:  # four sums, one for each corner: a single one would wait for itself
                        finish(builder, _for(builder, _i64(0), taps, 1, start, tap), target)
                    else:
                        _for(builder, _i64(0), taps, 1, [], lambda builder, t, nothing: tap(builder, t, start))

                _for_strips(builder, inner, _lanes(element), strip)

            function = _function(
                builder.module,
                f"dynconv_sample_{'sum' if is_sum else 'columns'}_{storage}_{compute}_{result}",
                [_i64, _i64, _i64.as_pointer(), element.as_pointer(), _i64, _i64, _i64],
                build,
            )
            data = lambda which: _data(context, builder, signature, args, which)
            builder.call(function, [args[0], args[1], data(2), data(3), *args[5:8]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(i, i, addresses, shares, source, i, i, i, out), codegen

    return sample


_sample_sum, _sample_columns = _sample(True), _sample(False)


@intrinsic
def _scatter(typingctx, taps, room, addresses, shares, row, step, count):
    """The rows addresses[k * room + t] += shares[k * room + t] * the row at `row` + t * step, of `count` elements."""
    compute = shares.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)

        def build(builder, arguments):
            taps, room, addresses, shares, row, step, count = arguments

            def strip(builder, channel, vectors, lanes):
                kind = element if lanes == 1 else ir.VectorType(element, lanes)
                places = [builder.add(channel, _i64(v * lanes)) for v in range(vectors)]

                def tap(builder, t, nothing):
                    given = _at_address(builder, builder.add(row, builder.mul(step, t)), element)
                    values = [_read(builder, given, place, lanes, compute) for place in places]
                    for k in range(_CORNERS):
                        at = builder.add(t, builder.mul(room, _i64(k)))
                        target = _at_address(builder, builder.load(builder.gep(addresses, [at])), element)
                        share = _read(builder, shares, at, 1, compute)
                        share = share if lanes == 1 else _splat(builder, share, kind)
                        for value, place in zip(values, places):
                            total = _read(builder, target, place, lanes, compute)
                            total = _call(builder, "fma", share, value, total)
                            _write(builder, total, target, place, lanes, compute)
                    return []

                _for(builder, _i64(0), taps, 1, [], tap)

            _for_strips(builder, count, _lanes(element), strip)

        function = _function(
            builder.module,
            f"dynconv_scatter_{compute}",
            [_i64, _i64, _i64.as_pointer(), element.as_pointer(), _i64, _i64, _i64],
            build,
        )
        data = lambda which: _data(context, builder, signature, args, which)
        builder.call(function, [args[0], args[1], data(2), data(3), *args[4:7]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, addresses, shares, i, i, i), codegen


@njit(inline="always")
def _place_taps(a, offsets, scales, site, group, places, room, compute):
    """places = the taps of a site from its first, offsets included, and their scales: 1 without any."""
    taps, kernel_width, dilation_y, dilation_x = a[13], a[35], a[40], a[41]
    at = (site * a[12] + group) * taps
    for tap in range(taps):
        places[tap] = compute(tap // kernel_width * dilation_y) + load(offsets, 2 * (at + tap), compute)
        places[room + tap] = compute(tap % kernel_width * dilation_x) + load(offsets, 2 * (at + tap) + 1, compute)
        places[2 * room + tap] = load(scales, at + tap, compute) if a[6] != 0 else compute(1)


@njit(inline="always")
def _place_site(a, site, place):
    """place = the first pixel's row of the sample of a site, and the line and column of its tap (0, 0)."""
    line = site // a[31]
    sample = line // a[30]
    place[0] = sample * a[32] * a[33]
    place[1] = (line - sample * a[30]) * a[36] - a[38]
    place[2] = (site - line * a[31]) * a[37] - a[39]


@njit(inline="always")
def _memory(a, compute_size, room):
    """Addresses of a thread's own: places, of a site, of taps, of pixels, shares, dots, and a row of zeros."""
    memory = a[26] + fetch_add(a[1:], 1) * a[27]
    places = memory + 64
    pixels = places + 3 * room * compute_size
    shares = pixels + _CORNERS * room * 8
    dots = shares + 6 * room * compute_size
    return memory, places, pixels, shares, dots, dots + _CORNERS * room * compute_size


@njit
def _sample_kernel(arguments, storage, compute):
    """The columns of the sites begin..end, or their sums over the taps."""
    a = carray(arguments, (64,))
    source, sums, columns = array(a[2], storage), array(a[4], storage), array(a[3], compute)
    offsets, scales = array(a[5], storage), array(a[6], storage)
    begin, end, chunk, channels, groups, taps = a[8], a[9], a[10], a[11], a[12], a[13]
    is_sum, size, compute_size, room, inner = a[4] != 0, a[16], a[17], a[18], channels // groups
    site_at, places_at, pixels_at, shares_at, _, zeros = _memory(a, compute_size, room)
    place, places, pixels, shares = (
        array(site_at, np.int64), array(places_at, compute), array(pixels_at, np.int64), array(shares_at, compute)
    )  # fmt: skip
    clear(places, 0, 3 * room, compute)
    clear(array(zeros, compute), 0, channels, compute)
    while True:
        first = begin + fetch_add(a, 1) * chunk
        if first >= end:
            return
        for site in range(first, min(end, first + chunk)):
            _place_site(a, site, place)
            for group in range(groups):
                shift = group * inner
                _place_taps(a, offsets, scales, site, group, places, room, compute)
                base = a[2] + (place[0] * channels + shift) * size
                _locate(
                    places, room, compute(place[1]), compute(place[2]), a[32], a[33], base, channels * size, zeros,
                    pixels, shares,
                )  # fmt: skip
                if is_sum:
                    target = a[4] + (site * channels + shift) * size
                    _sample_sum(taps, room, pixels, shares, source, inner, target, 0, sums)
                else:
                    target = a[3] + ((site - begin) * taps * channels + shift) * compute_size
                    _sample_columns(taps, room, pixels, shares, source, inner, target, channels * compute_size, columns)


@njit
def _position_kernel(arguments, storage, compute):
    """The gradients of offsets and scales at the sites begin..end, from the rows of these sites."""
    a = carray(arguments, (64,))
    source, offsets, scales = array(a[2], storage), array(a[5], storage), array(a[6], storage)
    grad_offsets, grad_scales, like = array(a[3], storage), array(a[4], storage), array(a[7], compute)
    begin, end, chunk, channels, groups, taps = a[8], a[9], a[10], a[11], a[12], a[13]
    site_stride, tap_stride, size, compute_size, room = a[14], a[15], a[16], a[17], a[18]
    inner = channels // groups
    site_at, places_at, pixels_at, shares_at, dots_at, zeros = _memory(a, compute_size, room)
    place, places, pixels, shares, dots = (
        array(site_at, np.int64), array(places_at, compute), array(pixels_at, np.int64), array(shares_at, compute),
        array(dots_at, compute),
    )  # fmt: skip
    clear(places, 0, 3 * room, compute)
    clear(array(zeros, compute), 0, channels, compute)
    one = compute(1)
    while True:
        first = begin + fetch_add(a, 1) * chunk
        if first >= end:
            return
        for site in range(first, min(end, first + chunk)):
            _place_site(a, site, place)
            for group in range(groups):
                shift = group * inner
                _place_taps(a, offsets, scales, site, group, places, room, compute)
                base = a[2] + (place[0] * channels + shift) * size
                _locate(
                    places, room, compute(place[1]), compute(place[2]), a[32], a[33], base, channels * size, zeros,
                    pixels, shares,
                )  # fmt: skip
                row = a[7] + ((site - begin) * site_stride + shift) * compute_size
                step = tap_stride * compute_size
                for k in range(_CORNERS):
                    some = array(pixels_at + 8 * k * room, np.int64)
                    dot_rows(taps, some, source, row, step, like, 0, inner, dots, k * room)
                at = (site * groups + group) * taps
                for tap in range(taps):
                    below, right = shares[4 * room + tap], shares[5 * room + tap]
                    above, before = one - below, one - right
                    upper = before * dots[tap] + right * dots[room + tap]
                    lower = before * dots[2 * room + tap] + right * dots[3 * room + tap]
                    if a[3] != 0:
                        scale = places[2 * room + tap]
                        across = above * (dots[room + tap] - dots[tap])
                        across += below * (dots[3 * room + tap] - dots[2 * room + tap])
                        is_read = False  # else a scale of NaN gives none either
                        for k in range(_CORNERS):
                            is_read = is_read or pixels[k * room + tap] != zeros
                        store(grad_offsets, 2 * (at + tap), scale * (lower - upper) if is_read else compute(0))
                        store(grad_offsets, 2 * (at + tap) + 1, scale * across if is_read else compute(0))
                    if a[4] != 0:
                        store(grad_scales, at + tap, above * upper + below * lower)


@njit
def _scatter_kernel(arguments, storage, compute):
    """The input's gradient from the rows of the sites begin..end: a slice of a sample's channels at a time."""
    a = carray(arguments, (64,))
    offsets, scales = array(a[5], storage), array(a[6], storage)
    begin, end, channels, groups, taps = a[8], a[9], a[11], a[12], a[13]
    site_stride, tap_stride, compute_size, room, area = a[14], a[15], a[17], a[18], a[30] * a[31]
    inner = channels // groups
    slices = (inner + _SLICE - 1) // _SLICE
    site_at, places_at, pixels_at, shares_at, _, nowhere = _memory(a, compute_size, room)
    place, places, pixels, shares = (
        array(site_at, np.int64), array(places_at, compute), array(pixels_at, np.int64), array(shares_at, compute)
    )  # fmt: skip
    clear(places, 0, 3 * room, compute)
    first_sample, last_sample = begin // area, (end - 1) // area
    while True:
        item = fetch_add(a, 1)
        sample, part = first_sample + item // (groups * slices), item % (groups * slices)
        if sample > last_sample:
            return
        group, channel = part // slices, part // slices * inner + part % slices * _SLICE
        count = min(_SLICE, (group + 1) * inner - channel)
        for site in range(max(begin, sample * area), min(end, (sample + 1) * area)):
            _place_site(a, site, place)
            _place_taps(a, offsets, scales, site, group, places, room, compute)
            base = a[3] + (place[0] * channels + channel) * compute_size
            _locate(
                places, room, compute(place[1]), compute(place[2]), a[32], a[33], base, channels * compute_size,
                nowhere, pixels, shares,
            )  # fmt: skip
            row = a[7] + ((site - begin) * site_stride + channel) * compute_size
            _scatter(taps, room, pixels, shares, row, tap_stride * compute_size, count)


_run_sample = kernel(_sample_kernel)
_run_position = kernel(_position_kernel)
_run_scatter = kernel(_scatter_kernel)


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
        self.place = (
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
        self._run(_run_sample, 0, self.sites, 0, address(out))

    def columns(self, begin: int, end: int) -> Tensor:
        """[end - begin, kH * kW, C] in the compute type: what the sites sample, times the scale."""
        columns = _with_room(end - begin, self.taps * self.channels, self.compute)
        self._run(_run_sample, begin, end, address(columns), 0)
        return columns[: end - begin].view(-1, self.taps, self.channels)

    def position_grads(
        self, rows: Tensor, begin: int, end: int, grad_offset: Tensor | None, grad_scales: Tensor | None
    ) -> None:
        """Into the rows begin..end of `grad_offset` and `grad_scales`, like offset and scales.

        rows: in the compute type; [sites, kH * kW, C], or [sites, C] where all taps have the same.
        """
        self._run(_run_position, begin, end, address(grad_offset), address(grad_scales), rows)

    def scatter(self, rows: Tensor, begin: int, end: int, grad_input: Tensor) -> None:
        """Add to `grad_input`, like the input but in the compute type."""
        self._run(_run_scatter, begin, end, address(grad_input), 0, rows)

    def _run(self, run, begin: int, end: int, first: int, second: int, rows: Tensor | None = None) -> None:
        threads = workers(end - begin)
        chunk = ceil(end - begin, _CHUNKS_PER_THREAD * threads)
        site_stride = tap_stride = 0
        if rows is not None:
            site_stride, tap_stride = rows.stride(0), rows.stride(1) if rows.dim() == 3 else 0
        element, compute = self.input.element_size(), self.compute.itemsize
        room = ceil(self.taps, vector_lanes(self.dtype)) * vector_lanes(self.dtype)
        memory = cache_lines(64 + 8 * _CORNERS * room + compute * ((9 + _CORNERS) * room + self.channels + _SLICE))
        scratch = torch.empty(threads * memory, dtype=torch.uint8)
        run(
            self.dtype, threads, address(self.input), first, second, address(self.offset), address(self.scales),
            address(rows), begin, end, chunk, self.channels, self.groups, self.taps, site_stride, tap_stride, element,
            compute, room, *(0,) * 7, address(scratch), memory, 0, 0, *self.place,
        )  # fmt: skip


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
        """out [sites, Cout] = columns [sites, kH * kW, C] @ weight + bias, in any of the types."""
        products = [
            _multiply(part, matrix, shift, out if self.groups == 1 else None)
            for part, matrix, shift in zip(self._split(columns), self.matrices, self.shifts)
        ]
        if products[0] is not out:
            torch.cat(products, 1, out=out) if out.dtype == self.dtype else out.copy_(torch.cat(products, 1))

    @functools.cached_property
    def transposed(self) -> Tensor:
        """The matrices, as the gradient of the columns is multiplied by them: made once for all its sites."""
        return self.matrices.transpose(1, 2).contiguous()

    def column_grads(self, rows: Tensor) -> Tensor:
        """[sites, kH * kW, C] from the output's gradient [sites, Cout], in the compute type."""
        filters = rows.shape[1] // self.groups
        parts = [
            _multiply(part, matrix, None, None).view(len(rows), -1, self.weight.shape[1])
            for part, matrix in zip(rows.split(filters, 1), self.transposed)
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
        """What has been added up, like the weight."""
        filters, channels, *kernel = self.weight.shape
        return self.grad.view(filters, *kernel, channels).permute(0, 3, 1, 2).to(self.weight.dtype).contiguous()

    def _split(self, columns: Tensor) -> list[Tensor]:
        """For each group [sites (and room behind them), kH * kW * channels of the group]."""
        if self.groups == 1:
            return [columns.flatten(1)]
        return [part.flatten(1) for part in columns.split(self.weight.shape[1], 2)]


def bias_grad(rows: Tensor) -> Tensor:
    """The sum of rows [sites, Cout]."""
    return masked_conv.bias_grad(rows, _numbers(len(rows)), len(rows))


def _multiply(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """rows [n, depth] @ matrix [filters, depth].T + bias; into `out` [n, filters] where it is of the same type."""
    result = out
    if out is None or out.dtype != rows.dtype:
        result = torch.empty(len(rows), matrix.shape[0], dtype=rows.dtype)
    rows = rows.contiguous()
    masked_conv.forward(
        rows, matrix[:, :, None, None], bias, None, _numbers(len(rows)), len(rows), None, None, result, None, True, 1,
        "none", (None, (0,) * 12),
    )  # fmt: skip
    return result


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def _with_room(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows and some, columns]: tiles may read a few rows past the last."""
    return torch.empty(rows + TILE_ROWS, columns, dtype=dtype)
