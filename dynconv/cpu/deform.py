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
    _carry_vectors,
    _constant,
    _data,
    _for,
    _for_strips,
    _for_vectors,
    _function,
    _i64,
    _lanes,
    _read,
    _read_some,
    _splat,
    _transposed_sum,
    _write,
    _write_some,
    fetch_add,
    store,
)
from ._threads import compute_type, kernel, workers
from .dynamic_filter import cache_lines

_CHUNKS_PER_THREAD = 8
_COLUMNS_BYTES = 1 << 21  # of the columns that are made at a time: they are read again at once, from the cache
_SLICE = 16  # channels that a thread adds up at a time, at least
_CORNERS = 4
_SHARES = _CORNERS + 4  # what `locate` writes down of a tap


def _locate(has_targets: bool):
    @intrinsic
    def locate(
        typingctx, tables, shifts, room, count, y, x, height, width, channels, offsets, scales, at, has_scales, base,
        outside, target_base, target_outside, pixels, targets, shares,
    ):  # fmt: skip
        storage, compute = offsets.dtype, tables.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(compute)
            stored = _data(context, builder, signature, args, 9).type.pointee
            lanes, i32 = _lanes(element), ir.IntType(32)
            vector, rows, wide = (ir.VectorType(kind, lanes) for kind in (element, i32, _i64))

            def build(builder, arguments):
                (tables, shifts, room, count, y, x, height, width, channels, offsets, scales, has_scales, base, outside,
                 target_base, target_outside, pixels, targets, shares) = arguments  # fmt: skip
                one, zero = _constant(vector, 1.0), _constant(vector, 0.0)
                begin = [_splat(builder, v, vector) for v in (y, x)]
                size = [_splat(builder, builder.sitofp(v, element), vector) for v in (height, width)]
                columns = _splat(builder, builder.trunc(width, i32), rows)
                of_row = _splat(builder, builder.sext(builder.trunc(channels, i32), _i64), wide)
                steps = {0: _i64(0), 1: channels, 2: builder.mul(channels, width)}
                steps[3] = builder.add(steps[1], steps[2])
                has_scales = builder.icmp_signed("!=", has_scales, _i64(0))
                ends = [(base, outside, storage, pixels)]
                ends += [(target_base, target_outside, compute, targets)] if has_targets else []

                def tap_offsets(builder, t, some):
                    """The dy and the dx of a vector of taps, which lie in pairs."""
                    halves = [
                        _read_some(builder, offsets, at, lanes, storage, mask)
                        for at, mask in _halves(builder, count, t, some, lanes)
                    ]
                    return _apart(builder, *halves)

                def vector_of_taps(builder, t, some):
                    place = lambda which: builder.add(t, builder.mul(room, _i64(which)))
                    positions = []
                    for axis, step in enumerate(tap_offsets(builder, t, some)):
                        tap = builder.fadd(begin[axis], _read(builder, tables, place(axis), lanes, compute))
                        positions.append(builder.fadd(tap, step))
                    inside = _constant(ir.VectorType(ir.IntType(1), lanes), 1)
                    for value, most in zip(positions, size):  # false for NaN
                        inside = builder.and_(inside, builder.fcmp_ordered(">", value, _constant(vector, -1.0)))
                        inside = builder.and_(inside, builder.fcmp_ordered("<", value, most))
                    positions = [builder.select(inside, value, zero) for value in positions]
                    first = [_call(builder, "floor", value) for value in positions]
                    behind = [builder.fsub(value, start) for value, start in zip(positions, first)]
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
                    corner = builder.mul(pixel, of_row)
                    corner = builder.add(corner, _read_wide(builder, shifts, t, lanes))
                    scale = _read_some(builder, scales, t, lanes, storage, some)
                    scale = builder.select(has_scales, scale, one)
                    for k in range(_CORNERS):
                        down, right = divmod(k, 2)
                        valid = builder.and_(is_in[0][down], is_in[1][right])
                        for start, nowhere, kind, addresses in ends:
                            bytes_ = kind.bitwidth // 8
                            shift = _constant(wide, bytes_.bit_length() - 1)
                            corner_base = builder.add(start, builder.mul(steps[k], _i64(bytes_)))
                            address = builder.add(_splat(builder, corner_base, wide), builder.shl(corner, shift))
                            address = builder.select(valid, address, _splat(builder, nowhere, wide))
                            target = builder.bitcast(builder.gep(addresses, [place(k)]), wide.as_pointer())
                            builder.store(address, target, align=8)
                        share = builder.fmul((behind if down else before)[0], (behind if right else before)[1])
                        _write(builder, builder.fmul(scale, share), shares, place(k), lanes, compute)
                    kept = (*behind, builder.select(inside, one, zero), scale)  # inside: one of the pixels at least
                    for which, value in enumerate(kept, _CORNERS):
                        _write(builder, value, shares, place(which), lanes, compute)

                _for_vectors(builder, count, lanes, vector_of_taps)

            pointer, places = element.as_pointer(), _i64.as_pointer()
            function = _function(
                builder.module,
                f"dynconv_locate{'_targets' * has_targets}_{storage}_{compute}",
                [pointer, places, _i64, _i64, element, element, *[_i64] * 3, *[stored.as_pointer()] * 2, *[_i64] * 5,
                 places, places, pointer],
                build,
            )  # fmt: skip
            data = lambda which: _data(context, builder, signature, args, which)
            from_site = [builder.gep(data(9), [builder.mul(args[11], _i64(2))]), builder.gep(data(10), [args[11]])]
            builder.call(
                function, [data(0), data(1), *args[2:9], *from_site, *args[12:17], data(17), data(18), data(19)]
            )
            return context.get_dummy_value()

        i = types.int64
        return types.void(
            tables, shifts, i, i, compute, compute, i, i, i, offsets, scales, i, i, i, i, i, i, pixels, targets, shares
        ), codegen

    return locate


def _halves(builder: ir.IRBuilder, count: ir.Value, t: ir.Value, some: ir.Value | None, lanes: int) -> list[tuple]:
    """(place, mask or None) of the two vectors in which the pairs of a vector of taps lie; see `_for_vectors`."""
    i32, found = ir.IntType(32), []
    for begin in (0, lanes):
        mask = None
        if some is not None:
            kind = ir.VectorType(i32, lanes)
            left = _splat(builder, builder.mul(builder.trunc(builder.sub(count, t), i32), i32(2)), kind)
            mask = builder.icmp_signed("<", ir.Constant(kind, list(range(begin, begin + lanes))), left)
        found.append((builder.add(builder.mul(t, _i64(2)), _i64(begin)), mask))
    return found


def _apart(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> list[ir.Value]:
    """The even and the odd elements of two vectors that follow each other."""
    lanes = low.type.count
    masks = [ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(odd, 2 * lanes, 2))) for odd in range(2)]
    return [builder.shuffle_vector(low, high, mask) for mask in masks]


def _together(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> list[ir.Value]:
    """The inverse of `_apart`."""
    lanes = even.type.count
    pairs = [n for i in range(lanes) for n in (i, i + lanes)]
    masks = [ir.Constant(ir.VectorType(ir.IntType(32), lanes), pairs[h * lanes : (h + 1) * lanes]) for h in range(2)]
    return [builder.shuffle_vector(even, odd, mask) for mask in masks]


def _read_wide(builder: ir.IRBuilder, numbers: ir.Value, at: ir.Value, lanes: int) -> ir.Value:
    kind = ir.VectorType(_i64, lanes)
    return builder.load(builder.bitcast(builder.gep(numbers, [at]), kind.as_pointer()), align=8)


_locate_pixels, _locate_both = _locate(False), _locate(True)


@njit(inline="always")
def locate(
    has_targets, tables, shifts, room, count, y, x, height, width, channels, offsets, scales, at, has_scales, base,
    outside, target_base, target_outside, pixels, targets, shares,
):  # fmt: skip
    """Where the `count` taps of a site sample, and by how much; `room` is `count` in whole vectors.

    The tap t lies at (y + tables[t] + dy, x + tables[room + t] + dx), where dy and dx are the pair `at` + t of
    `offsets`, in the channels from shifts[t] on. pixels[k * room + t] is the address of the pixel k of the four
    around it, `base` being that of the pixel (0, 0), or `outside`; likewise, if `has_targets`, targets[k * room + t]
    in a tensor of the compute type. shares[k * room + t] is the pixel's share times the scale, and further rows of
    `shares` have how far below and to the right of the first pixel the tap lies, whether it reads any pixel (1 or 0),
    and the scale: scales[at + t], or 1.
    """
    if has_targets:
        _locate_both(
            tables, shifts, room, count, y, x, height, width, channels, offsets, scales, at, has_scales, base, outside,
            target_base, target_outside, pixels, targets, shares,
        )  # fmt: skip
    else:
        _locate_pixels(
            tables, shifts, room, count, y, x, height, width, channels, offsets, scales, at, has_scales, base, outside,
            target_base, target_outside, pixels, targets, shares,
        )  # fmt: skip


def _for_groups(builder: ir.IRBuilder, groups: ir.Value, taps: ir.Value, body) -> None:
    """body(builder, group, the number of its first tap)."""

    def group_round(builder, group, nothing):
        body(builder, group, builder.mul(group, taps))
        return []

    _for(builder, _i64(0), groups, 1, [], group_round)


def _sample(is_sum: bool):
    """Makes an intrinsic that writes what the taps of a site sample, group by group of `inner` channels, to `target`.

    Their sum over the taps [groups * inner], or (not `is_sum`) a row of all groups for each tap, `step` bytes apart.
    `target` is an address, of elements of the type of `out`; the other operands are what `locate` has left.
    """

    @intrinsic
    def sample(typingctx, groups, taps, room, pixels, shares, source, inner, target, step, out):
        storage, compute, result = source.dtype, shares.dtype, out.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(compute)
            stored, written = (_data(context, builder, signature, args, which).type.pointee for which in (5, 9))

            def build(builder, arguments):
                groups, taps, room, pixels, shares, inner, target, step = arguments
                size = _i64(result.bitwidth // 8)

                def of_group(builder, group, first):
                    start = builder.add(target, builder.mul(builder.mul(group, inner), size))

                    def strip(builder, channel, vectors, lanes):
                        zero = _constant(element if lanes == 1 else ir.VectorType(element, lanes), 0.0)

                        def tap(builder, t, totals):
                            following = []
                            for k in range(_CORNERS):
                                at = builder.add(builder.add(first, t), builder.mul(room, _i64(k)))
                                row = _at_address(builder, builder.load(builder.gep(pixels, [at])), stored)
                                share = _read(builder, shares, at, 1, compute)
                                share = share if lanes == 1 else _splat(builder, share, zero.type)
                                for v in range(vectors):
                                    value = _read(builder, row, builder.add(channel, _i64(v * lanes)), lanes, storage)
                                    following.append(_call(builder, "fma", share, value, totals[k * vectors + v]))
                            if is_sum:
                                return following
                            finish(builder, following, builder.add(start, builder.mul(step, t)))
                            return []

                        def finish(builder, totals, place):
                            row = _at_address(builder, place, written)
                            for v in range(vectors):
                                upper, lower = (
                                    builder.fadd(totals[k * vectors + v], totals[(k + 1) * vectors + v]) for k in (0, 2)
                                )
                                at = builder.add(channel, _i64(v * lanes))
                                _write(builder, builder.fadd(upper, lower), row, at, lanes, result)

                        zeros = [zero] * (_CORNERS * vectors)
                        if is_sum:  # four sums, one for each corner: a single one would wait for itself
                            finish(builder, _for(builder, _i64(0), taps, 1, zeros, tap), start)
                        else:
                            _for(builder, _i64(0), taps, 1, [], lambda builder, t, nothing: tap(builder, t, zeros))

                    _for_strips(builder, inner, _lanes(element), strip)

                _for_groups(builder, groups, taps, of_group)

            function = _function(
                builder.module,
                f"dynconv_sample_{'sum' if is_sum else 'columns'}_{storage}_{compute}_{result}",
                [_i64, _i64, _i64, _i64.as_pointer(), element.as_pointer(), _i64, _i64, _i64],
                build,
            )
            data = lambda which: _data(context, builder, signature, args, which)
            builder.call(function, [*args[:3], data(3), data(4), *args[6:9]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(i, i, i, pixels, shares, source, i, i, i, out), codegen

    return sample


_sample_sum, _sample_columns = _sample(True), _sample(False)


@intrinsic
def _scatter(typingctx, groups, taps, room, targets, shares, row, group_step, tap_step, count):
    """The rows targets[k * room + t] += shares[k * room + t] * the row of the tap's gradient, of `count` elements.

    That of the tap t of the group g lies at `row` + g * group_step + t * tap_step.
    """
    compute = shares.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)

        def build(builder, arguments):
            groups, taps, room, targets, shares, row, group_step, tap_step, count = arguments

            def of_group(builder, group, first):
                start = builder.add(row, builder.mul(group_step, group))

                def strip(builder, channel, vectors, lanes):
                    kind = element if lanes == 1 else ir.VectorType(element, lanes)
                    places = [builder.add(channel, _i64(v * lanes)) for v in range(vectors)]

                    def tap(builder, t, nothing):
                        given = _at_address(builder, builder.add(start, builder.mul(tap_step, t)), element)
                        values = [_read(builder, given, place, lanes, compute) for place in places]
                        for k in range(_CORNERS):
                            at = builder.add(builder.add(first, t), builder.mul(room, _i64(k)))
                            target = _at_address(builder, builder.load(builder.gep(targets, [at])), element)
                            share = _read(builder, shares, at, 1, compute)
                            share = share if lanes == 1 else _splat(builder, share, kind)
                            for value, place in zip(values, places):
                                total = _read(builder, target, place, lanes, compute)
                                total = _call(builder, "fma", share, value, total)
                                _write(builder, total, target, place, lanes, compute)
                        return []

                    _for(builder, _i64(0), taps, 1, [], tap)

                _for_strips(builder, count, _lanes(element), strip)

            _for_groups(builder, groups, taps, of_group)

        function = _function(
            builder.module,
            f"dynconv_scatter_{compute}",
            [_i64, _i64, _i64, _i64.as_pointer(), element.as_pointer(), *[_i64] * 4],
            build,
        )
        data = lambda which: _data(context, builder, signature, args, which)
        builder.call(function, [*args[:3], data(3), data(4), *args[5:9]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, targets, shares, i, i, i, i), codegen


@intrinsic
def _corner_dots(typingctx, groups, taps, room, pixels, source, row, group_step, tap_step, inner, dots):
    """dots[4 * t + k] = the dot of the row at pixels[k * room + t] with that of the tap's gradient, see `_scatter`."""
    storage, compute = source.dtype, dots.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)
        stored = _data(context, builder, signature, args, 4).type.pointee
        lanes = _lanes(element)
        zero = _constant(ir.VectorType(element, lanes), 0.0)

        def build(builder, arguments):
            groups, taps, room, pixels, row, group_step, tap_step, inner, dots = arguments

            def of_group(builder, group, first):
                start = builder.add(row, builder.mul(group_step, group))

                def block(builder, t, count):
                    """Of `count` taps: a vector of partial sums for each of their corners."""
                    taps_of = [builder.add(t, _i64(j)) for j in range(count)]
                    rows = [
                        _at_address(builder, builder.add(start, builder.mul(tap_step, tap)), element) for tap in taps_of
                    ]
                    entries = [
                        builder.add(builder.add(first, tap), builder.mul(room, _i64(k)))
                        for tap in taps_of
                        for k in range(_CORNERS)
                    ]
                    corners = [_at_address(builder, builder.load(builder.gep(pixels, [at])), stored) for at in entries]

                    def products(builder, at, totals, some):
                        grads = [_read_some(builder, given, at, lanes, compute, some) for given in rows]
                        return [
                            _call(
                                builder, "fma", _read_some(builder, corner, at, lanes, storage, some),
                                grads[i // _CORNERS], totals[i],
                            )
                            for i, corner in enumerate(corners)
                        ]  # fmt: skip

                    totals = _carry_vectors(builder, inner, lanes, [zero] * len(corners), products)
                    place = builder.mul(builder.add(first, t), _i64(_CORNERS))
                    for i in range(0, len(totals), lanes):
                        some = totals[i : i + lanes]
                        at = builder.add(place, _i64(i))
                        _write(builder, _transposed_sum(builder, some), dots, at, len(some), compute)

                together = max(1, lanes // _CORNERS)  # taps whose dots fill a vector
                begin = _i64(0)
                for count in (together, 1) if together > 1 else (1,):
                    end = builder.sub(taps, builder.and_(taps, _i64(count - 1)))

                    def some_taps(builder, t, nothing, count=count):
                        block(builder, t, count)
                        return []

                    _for(builder, begin, end, count, [], some_taps)
                    begin = end

            _for_groups(builder, groups, taps, of_group)

        function = _function(
            builder.module,
            f"dynconv_corner_dots_{storage}_{compute}",
            [_i64, _i64, _i64, _i64.as_pointer(), *[_i64] * 4, element.as_pointer()],
            build,
        )
        data = lambda which: _data(context, builder, signature, args, which)
        builder.call(function, [*args[:3], data(3), *args[5:9], data(9)])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, pixels, source, i, i, i, i, dots), codegen


@intrinsic
def _position_grads(typingctx, count, room, shares, dots, at, grad_offsets, has_offsets, grad_scales, has_scales):
    """The gradients of the offset pairs and the scales `at` + t, from what `locate` and `_corner_dots` have left."""
    storage, compute = grad_offsets.dtype, shares.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)
        stored = _data(context, builder, signature, args, 5).type.pointee
        lanes = _lanes(element)
        vector = ir.VectorType(element, lanes)
        zero, one = _constant(vector, 0.0), _constant(vector, 1.0)

        def build(builder, arguments):
            count, room, shares, dots, offsets, has_offsets, scales, has_scales = arguments

            def vector_of_taps(builder, t, some):
                place = lambda which: builder.add(t, builder.mul(room, _i64(which)))
                kept = [_read(builder, shares, place(_CORNERS + which), lanes, compute) for which in range(4)]
                below, right, is_read, scale = kept
                first = builder.mul(t, _i64(_CORNERS))
                quarters = [
                    _read(builder, dots, builder.add(first, _i64(q * lanes)), lanes, compute) for q in range(_CORNERS)
                ]
                evens, odds = zip(*(_apart(builder, *quarters[q : q + 2]) for q in (0, 2)))
                (d0, d2), (d1, d3) = _apart(builder, *evens), _apart(builder, *odds)
                above, before = builder.fsub(one, below), builder.fsub(one, right)
                mix = lambda p, x, q, y: _call(builder, "fma", p, x, builder.fmul(q, y))
                upper, lower = mix(before, d0, right, d1), mix(before, d2, right, d3)
                with builder.if_then(builder.icmp_signed("!=", has_offsets, _i64(0))):
                    across = mix(above, builder.fsub(d1, d0), below, builder.fsub(d3, d2))
                    # Where nothing is read there is no gradient, even if the scale is NaN.
                    reads = builder.fcmp_ordered(">", is_read, zero)
                    pair = [
                        builder.select(reads, builder.fmul(scale, slope), zero)
                        for slope in (builder.fsub(lower, upper), across)
                    ]
                    halves = zip(_together(builder, *pair), _halves(builder, count, t, some, lanes))
                    for value, (at, mask) in halves:
                        _write_some(builder, value, offsets, at, lanes, storage, mask)
                with builder.if_then(builder.icmp_signed("!=", has_scales, _i64(0))):
                    _write_some(builder, mix(above, upper, below, lower), scales, t, lanes, storage, some)

            _for_vectors(builder, count, lanes, vector_of_taps)

        pointer, of_storage = element.as_pointer(), stored.as_pointer()
        function = _function(
            builder.module,
            f"dynconv_position_grads_{storage}_{compute}",
            [_i64, _i64, pointer, pointer, of_storage, _i64, of_storage, _i64],
            build,
        )
        data = lambda which: _data(context, builder, signature, args, which)
        offsets = builder.gep(data(5), [builder.mul(args[4], _i64(2))])
        scales = builder.gep(data(7), [args[4]])
        builder.call(function, [args[0], args[1], data(2), data(3), offsets, args[6], scales, args[8]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, shares, dots, i, grad_offsets, i, grad_scales, i), codegen


@njit(inline="always")
def _memory(a, compute):
    """A thread's own: tables of taps, of channels, addresses of pixels and targets, shares, dots, and two rows.

    The first row stays zeros, for what is read outside of the input; the second takes what is added there.
    """
    compute_size, room, taps, inner = a[17], a[18], a[13], a[11] // a[12]
    tables = a[26] + fetch_add(a[1:], 1) * a[27]
    shifts = tables + 2 * room * compute_size
    pixels = shifts + 8 * room
    targets = pixels + 8 * _CORNERS * room
    shares = targets + 8 * _CORNERS * room
    dots = shares + _SHARES * room * compute_size
    zeros = dots + _CORNERS * room * compute_size
    clear(array(tables, compute), 0, a[27] // compute_size, compute)
    for t in range(a[20] * taps):
        tap = t % taps
        store(array(tables, compute), t, compute(tap // a[35] * a[40]))
        store(array(tables, compute), room + t, compute(tap % a[35] * a[41]))
        store(array(shifts, np.int64), t, t // taps * inner)
    return (
        array(tables, compute), array(shifts, np.int64), array(pixels, np.int64), array(targets, np.int64),
        array(shares, compute), array(dots, compute), zeros, zeros + inner * compute_size,
    )  # fmt: skip


@njit(inline="always")
def _site_place(a, site):
    """The first pixel's row of a site's sample, and the line and column of its tap (0, 0)."""
    line = site // a[31]
    sample = line // a[30]
    return sample * a[32] * a[33], (line - sample * a[30]) * a[36] - a[38], (site - line * a[31]) * a[37] - a[39]


@njit
def _sample_kernel(arguments, storage, compute):
    """The columns of the sites begin..end, or their sums over the taps."""
    a = carray(arguments, (64,))
    source, sums, columns = array(a[2], storage), array(a[3], storage), array(a[3], compute)
    # Where there are no scales, something to read instead.
    offsets, scales = array(a[5], storage), array(a[6] if a[6] != 0 else a[5], storage)
    begin, end, chunk, channels, groups, taps = a[8], a[9], a[10], a[11], a[12], a[13]
    is_sum, size, compute_size, room, inner, count = a[22] != 0, a[16], a[17], a[18], a[11] // a[12], a[12] * a[13]
    tables, shifts, pixels, targets, shares, _, zeros, _ = _memory(a, compute)
    while True:
        first = begin + fetch_add(a, 1) * chunk
        if first >= end:
            return
        for site in range(first, min(end, first + chunk)):
            pixel, y, x = _site_place(a, site)
            locate(
                False, tables, shifts, room, count, compute(y), compute(x), a[32], a[33], channels, offsets, scales,
                site * count, a[6], a[2] + pixel * channels * size, zeros, 0, 0, pixels, targets, shares,
            )  # fmt: skip
            if is_sum:
                target = a[3] + site * channels * size
                _sample_sum(groups, taps, room, pixels, shares, source, inner, target, 0, sums)
            else:
                target, step = a[3] + (site - begin) * taps * channels * compute_size, channels * compute_size
                _sample_columns(groups, taps, room, pixels, shares, source, inner, target, step, columns)


@njit
def _grad_kernel(arguments, storage, compute):
    """The gradients of input, offsets and scales from the rows of the sites begin..end, those that are asked for.

    An item of work is, for the input, a slice of the channels of some groups of a sample, else `chunk` sites.
    """
    a = carray(arguments, (64,))
    source, grad_offsets, grad_scales = array(a[2], storage), array(a[4], storage), array(a[19], storage)
    offsets, scales = array(a[5], storage), array(a[6] if a[6] != 0 else a[5], storage)
    begin, end, chunk, channels, groups, taps = a[8], a[9], a[10], a[11], a[12], a[13]
    site_stride, tap_stride, size, compute_size, room = a[14], a[15], a[16], a[17], a[18]
    block, slices, area, inner = a[20], a[21], a[30] * a[31], a[11] // a[12]
    scatters, has_positions = a[3] != 0, a[4] != 0 or a[19] != 0
    tables, shifts, pixels, targets, shares, dots, zeros, nowhere = _memory(a, compute)
    blocks, first_sample = (groups + block - 1) // block, begin // area
    while True:
        item = fetch_add(a, 1)
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
            total = array(a[3], compute)
            for pixel in range(sample * a[32] * a[33], (sample + 1) * a[32] * a[33]):
                clear(total, pixel * channels + shift, width + (some - 1) * inner, compute)
        for site in range(first, last):
            pixel, y, x = _site_place(a, site)
            base = pixel * channels + shift
            at = (site * groups + group) * taps
            locate(
                scatters, tables, shifts, room, count, compute(y), compute(x), a[32], a[33], channels, offsets, scales,
                at, a[6], a[2] + base * size, zeros, a[3] + base * compute_size, nowhere, pixels, targets, shares,
            )  # fmt: skip
            row = a[7] + ((site - begin) * site_stride + shift) * compute_size
            group_step, tap_step = inner * compute_size, tap_stride * compute_size
            if has_positions:
                _corner_dots(some, taps, room, pixels, source, row, group_step, tap_step, inner, dots)
                _position_grads(count, room, shares, dots, at, grad_offsets, a[4], grad_scales, a[19])
            if scatters:
                _scatter(some, taps, room, targets, shares, row, group_step, tap_step, width)


_run_sample, _run_grad = kernel(_sample_kernel), kernel(_grad_kernel)


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
        self._run(_run_sample, 0, self.sites, address(out), is_sum=1)

    def columns(self, begin: int, end: int) -> Tensor:
        """[end - begin and some, kH * kW, C] in the compute type: what the sites sample, times the scale."""
        columns = _with_room(end - begin, self.taps * self.channels, self.compute)
        self._run(_run_sample, begin, end, address(columns))
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
        positions = address(grad_offset), address(grad_scales)
        if grad_input is None:
            if any(positions):
                self._run(_run_grad, begin, end, 0, *positions, rows)
            return
        # A thread has a part of a sample to itself: some of its groups, of a single one perhaps a slice of channels.
        area, threads = self.place[0] * self.place[1], torch.get_num_threads()
        samples = (end - 1) // area - begin // area + 1
        parts = ceil(threads, samples)
        block = ceil(self.groups, parts)
        inner = self.channels // self.groups
        slices = max(1, min(ceil(parts, self.groups), inner // _SLICE)) if block == 1 else 1
        if slices > 1 and any(positions):  # whose dots are those of all channels
            self._run(_run_grad, begin, end, 0, *positions, rows)
            positions = 0, 0
        self._run(_run_grad, begin, end, address(grad_input), *positions, rows, block=block, slices=slices)

    def _run(
        self,
        run,
        begin: int,
        end: int,
        target: int,
        grad_offset: int = 0,
        grad_scales: int = 0,
        rows: Tensor | None = None,
        *,
        is_sum: int = 0,
        block: int | None = None,
        slices: int = 1,
    ) -> None:
        threads, block = workers(end - begin), block or self.groups
        chunk = ceil(end - begin, _CHUNKS_PER_THREAD * threads)
        site_stride = tap_stride = 0
        if rows is not None:
            site_stride, tap_stride = rows.stride(0), rows.stride(1) if rows.dim() == 3 else 0
        compute, lanes = self.compute.itemsize, vector_lanes(self.dtype)
        room = ceil(block * self.taps, lanes) * lanes
        width = self.channels // self.groups
        memory = cache_lines(room * (8 + 2 * 8 * _CORNERS + compute * (2 + _SHARES + _CORNERS)) + 2 * width * compute)
        scratch = torch.empty(threads * memory, dtype=torch.uint8)
        run(
            self.dtype, threads, address(self.input), target, grad_offset, address(self.offset), address(self.scales),
            address(rows), begin, end, chunk, self.channels, self.groups, self.taps, site_stride, tap_stride,
            self.input.element_size(), compute, room, grad_scales, block, slices, is_sum, *(0,) * 3, address(scratch),
            memory, 0, 0, *self.place,
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
        filters, some = rows.shape[1] // self.groups, rows[begin : end + TILE_ROWS]
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
        """What has been added up, like the weight."""
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
        rows.contiguous(), matrix[:, :, None, None], bias, None, _numbers(count), count, None, None, result, None, True,
        1, "none", (None, (0,) * 12),
    )  # fmt: skip
    return result


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def _with_room(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows and some, columns]: tiles may read a few rows past the last."""
    return torch.empty(rows + TILE_ROWS, columns, dtype=dtype)
