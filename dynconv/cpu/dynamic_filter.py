"""Filters that differ from pixel to pixel on the CPU: a stencil that reads each filter once a group of channels.

With p(s, tap) the pixel that site s reads, g(c) the group of channel c, w the normalised filters, v the filters of
the channels (ones where there are none) and n the sample:

    forward         y[s, c] = sum over taps of w[s, g(c), tap] * v[n, tap, c] * x[p(s, tap), c]
    input grad      dx[p, c] = sum over taps and sites s with p(s, tap) = p of w[s, g(c), tap] * v[n, tap, c] * dy[s, c]
    filter grad     dw[s, g, tap] = sum over channels c of g of dy[s, c] * v[n, tap, c] * x[p(s, tap), c]
    channel grad    dv[n, tap, c] = sum over sites s of n of w[s, g(c), tap] * dy[s, c] * x[p(s, tap), c]

The first two are one kernel, over sites or over pixels: rows that share their channels are added up ROWS at a time,
from lists of what each reads. No two threads write the same row, and sums run in an order that the shapes alone fix.
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
from . import sites as site_tables
from ._common import address, array, ceil, clear, fill_skipped, filling
from ._llvm import (
    DOT_VECTORS,
    STENCIL_VECTORS,
    VECTOR_BYTES,
    _at_address,
    _call,
    _carry_vectors,
    _constant,
    _data,
    _exp,
    _for,
    _for_strips,
    _for_vectors,
    _function,
    _i64,
    _lanes,
    _prefetch,
    _read,
    _read_some,
    _sigmoid,
    _splat,
    _sum_lanes,
    _transposed_sum,
    _write,
    _write_around,
    _write_some,
    fetch_add,
    store,
)
from ._llvm import STENCIL_ROWS as ROWS
from ._threads import compute_type, kernel, workers

NORMALIZATIONS = ("none", "softmax", "sigmoid", "l2")
LEAST_NORM = 1e-12  # F.normalize's: a filter of zeros stays one

_CHUNKS_PER_THREAD = 8
_STREAMED = 1 << 23  # bytes of an output that are not worth a place in the cache
_BLOCK_SITES = 32  # whose lists of pixels are kept for the gradient of the channels' filters
_PART_SITES = 1024  # that one partial sum of that gradient covers, at least
_MOST_PARTS = 64  # partial sums a sample


def _filter_rows(is_direct: bool, has_channel: bool):
    @intrinsic
    def rows(typingctx, count, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters,
             channels, groups, group_weights, targets, out, ahead):  # fmt: skip
        storage, compute, result = source.dtype, like.dtype, out.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(compute)
            stored, written = (_data(context, builder, signature, args, which).type.pointee for which in (6, 13))
            lanes = _lanes(element)

            def build(builder, arguments):
                (count, pixels, weights, pixel_steps, weight_steps, taps, channel_filters, channels, groups,
                 group_weights, targets, ahead) = arguments  # fmt: skip
                is_streamed = builder.icmp_signed("!=", ahead, _i64(0))
                inner = builder.sdiv(channels, groups)
                at = lambda numbers, place: builder.load(builder.gep(numbers, [place]))
                ends = [_at_address(builder, at(targets, _i64(i)), written) for i in range(ROWS)]
                starts = [(at(pixels, _i64(i)), at(weights, _i64(i))) for i in range(ROWS)] if is_direct else None

                def sums(builder, channel, shift, vectors, lanes):
                    zero = _constant(element if lanes == 1 else ir.VectorType(element, lanes), 0.0)
                    load = lambda numbers, place: builder.load(builder.gep(numbers, [place]))

                    def tap_round(builder, t, totals):
                        following, shares = [], None
                        if has_channel:
                            base = builder.add(builder.mul(load(taps, t), channels), channel)
                            shares = [
                                _read(builder, channel_filters, builder.add(base, _i64(v * lanes)), lanes, compute)
                                for v in range(vectors)
                            ]
                        if is_direct:
                            steps = load(pixel_steps, t), load(weight_steps, t)
                        for i in range(ROWS):
                            if is_direct:
                                places = [builder.add(start, step) for start, step in zip(starts[i], steps)]
                            else:
                                entry = builder.add(builder.mul(t, _i64(ROWS)), _i64(i))
                                places = load(pixels, entry), load(weights, entry)
                                is_read = builder.icmp_signed("!=", *places)
                            row, weight = (
                                _at_address(builder, places[0], stored),
                                _at_address(builder, places[1], element),
                            )
                            factor = _read(builder, weight, shift, 1, compute)
                            factor = factor if lanes == 1 else _splat(builder, factor, zero.type)
                            for v in range(vectors):
                                value = _read(builder, row, builder.add(channel, _i64(v * lanes)), lanes, storage)
                                if has_channel:
                                    value = builder.fmul(value, shares[v])
                                    if not is_direct:  # a zero that is not read stays one, even times NaN
                                        value = builder.select(is_read, value, zero)
                                following.append(_call(builder, "fma", factor, value, totals[i * vectors + v]))
                        return following

                    may_stream = is_direct and vectors == STENCIL_VECTORS and result == compute
                    if may_stream:
                        with builder.if_then(is_streamed):
                            for start, _ in starts:
                                row = _at_address(builder, builder.add(start, ahead), stored)
                                _prefetch(builder, builder.gep(row, [channel]))
                    totals = _for(builder, _i64(0), count, 1, [zero] * (ROWS * vectors), tap_round)

                    def finish(builder, write):
                        for i in range(ROWS):
                            for v in range(vectors):
                                place = builder.add(channel, _i64(v * lanes))
                                write(builder, totals[i * vectors + v], ends[i], place, lanes, result)

                    if may_stream:
                        with builder.if_else(is_streamed) as (around, through):
                            with around:
                                finish(builder, _write_around)
                            with through:
                                finish(builder, _write)
                    else:
                        finish(builder, _write)

                def group_round(builder, group, values):
                    first, shift = builder.mul(group, inner), builder.mul(group, group_weights)
                    _for_strips(
                        builder, inner, lanes,
                        lambda builder, at, vectors, lanes: sums(
                            builder, builder.add(first, at), shift, vectors, lanes
                        ),
                    )  # fmt: skip
                    return []

                _for(builder, _i64(0), groups, 1, [], group_round)

            numbers = _i64.as_pointer()
            kind = f"{'direct' if is_direct else 'listed'}{'_channel' if has_channel else ''}"
            function = _function(
                builder.module,
                f"dynconv_filter_{kind}_{storage}_{compute}_{result}",
                [_i64, *[numbers] * 5, element.as_pointer(), _i64, _i64, _i64, numbers, _i64],
                build,
            )
            data = lambda which: _data(context, builder, signature, args, which)
            builder.call(function, [args[0], *map(data, range(1, 6)), data(8), *args[9:12], data(12), args[14]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(
            i, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters, i, i, i, targets, out, i
        ), codegen

    return rows


_direct, _listed = _filter_rows(True, False), _filter_rows(False, False)
_direct_channel, _listed_channel = _filter_rows(True, True), _filter_rows(False, True)


@njit(inline="always")
def filter_rows(
    is_direct, has_channel, count, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters,
    channels, groups, group_weights, targets, out, ahead,
):  # fmt: skip
    """target(i)[c] = sum over t < count of weight(t, i)[g(c)] * v[taps[t], c] * pixel(t, i)[c], for i < ROWS.

    The addresses of pixel(t, i) and weight(t, i) are pixels[i] + pixel_steps[t] and weights[i] + weight_steps[t] where
    `is_direct`, else pixels[t * ROWS + i] and weights[t * ROWS + i], the same zeros for what row i does not read; that
    of target(i) is targets[i]. Group g's weight
    lies g * group_weights elements behind the address, in the type of `like`. v is 1 without `has_channel`. Unless
    `ahead` is 0, the pixels so far behind pixels[i] are fetched into the cache, and the targets written around it.
    """
    if is_direct and has_channel:
        _direct_channel(
            count, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters, channels, groups,
            group_weights, targets, out, ahead,
        )  # fmt: skip
    elif is_direct:
        _direct(
            count, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters, channels, groups,
            group_weights, targets, out, ahead,
        )  # fmt: skip
    elif has_channel:
        _listed_channel(
            count, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters, channels, groups,
            group_weights, targets, out, ahead,
        )  # fmt: skip
    else:
        _listed(
            count, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters, channels, groups,
            group_weights, targets, out, ahead,
        )  # fmt: skip


def _dot_taps(has_channel: bool):
    @intrinsic
    def dots(typingctx, taps, pixels, source, grad, like, channel_filters, channel, inner, channels, out, out_at):
        storage, compute, given = source.dtype, out.dtype, like.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(compute)
            stored, rows_stored = (_data(context, builder, signature, args, which).type.pointee for which in (2, 4))
            lanes = _lanes(element)

            def build(builder, arguments):
                taps, pixels, grad, channel_filters, channel, inner, channels, out = arguments
                zero = _constant(ir.VectorType(element, lanes), 0.0)

                def totals_of(builder, first, tap_count, unrolled):
                    """One vector for each of some taps, whose sum is the tap's dot product."""
                    rows = [
                        _at_address(builder, builder.load(builder.gep(pixels, [builder.add(first, _i64(t))])), stored)
                        for t in range(tap_count)
                    ]
                    grads = _at_address(builder, grad, rows_stored)

                    def products(builder, at, totals, some):
                        place = builder.add(channel, at)
                        value = _read_some(builder, grads, place, lanes, given, some)
                        following = []
                        for t, row in enumerate(rows):
                            factor = _read_some(builder, row, place, lanes, storage, some)
                            if has_channel:
                                share = builder.add(builder.mul(builder.add(first, _i64(t)), channels), place)
                                share = _read_some(builder, channel_filters, share, lanes, compute, some)
                                factor = builder.fmul(factor, share)
                            following.append(_call(builder, "fma", factor, value, totals[t]))
                        return following

                    def several(builder, at, totals):
                        following = []
                        for u in range(unrolled):
                            part = totals[u * tap_count : (u + 1) * tap_count]
                            following += products(builder, builder.add(at, _i64(u * lanes)), part, None)
                        return following

                    whole = builder.and_(inner, _i64(-lanes * unrolled))
                    totals = _for(builder, _i64(0), whole, lanes * unrolled, [zero] * (tap_count * unrolled), several)
                    for u in range(1, unrolled):
                        totals[:tap_count] = [
                            builder.fadd(*pair) for pair in zip(totals[:tap_count], totals[u * tap_count :])
                        ]
                    left = builder.sub(inner, whole)
                    base = whole
                    shifted = lambda builder, at, totals, some: products(builder, builder.add(base, at), totals, some)
                    return _carry_vectors(builder, left, lanes, totals[:tap_count], shifted)

                def block(builder, first, values):
                    totals = totals_of(builder, first, lanes, 1)
                    _write(builder, _transposed_sum(builder, totals), out, first, lanes, compute)
                    return []

                def single(builder, tap, values):
                    (total,) = totals_of(builder, tap, 1, DOT_VECTORS)
                    _write(builder, _sum_lanes(builder, total), out, tap, 1, compute)
                    return []

                # An odd kernel, squared, has one tap more than whole vectors of 4 or 8.
                whole = builder.and_(taps, _i64(-lanes))
                _for(builder, _i64(0), whole, lanes, [], block)
                _for(builder, whole, taps, 1, [], single)

            pointer = element.as_pointer()
            function = _function(
                builder.module,
                f"dynconv_dot_taps{'_channel' * has_channel}_{storage}_{given}_{compute}",
                [_i64, _i64.as_pointer(), _i64, pointer, _i64, _i64, _i64, pointer],
                build,
            )
            data = lambda which: _data(context, builder, signature, args, which)
            outs = builder.gep(data(9), [args[10]])
            builder.call(function, [args[0], data(1), args[3], data(5), *args[6:9], outs])
            return context.get_dummy_value()

        i = types.int64
        return types.void(i, pixels, source, i, like, channel_filters, i, i, i, out, i), codegen

    return dots


_dots, _dots_channel = _dot_taps(False), _dot_taps(True)


@njit(inline="always")
def dot_taps(has_channel, taps, pixels, source, grad, like, channel_filters, channel, inner, channels, out, out_at):
    """out[out_at + tap] = sum over `inner` channels c from `channel` on of grad[c] * v[tap, c] * pixel(tap)[c].

    pixels[tap] is the address of a row of the type of `source`, `grad` that of one of the type of `like`. v has rows of
    `channels` and is 1 without `has_channel`.
    """
    if has_channel:
        _dots_channel(taps, pixels, source, grad, like, channel_filters, channel, inner, channels, out, out_at)
    else:
        _dots(taps, pixels, source, grad, like, channel_filters, channel, inner, channels, out, out_at)


@intrinsic
def channel_products(typingctx, sites, pixels, pixels_row, source, weights, grads, groups, inner, taps, out):
    """out[tap, c] += sum over sites of weight(site)[g(c), tap] * grad(site)[c] * pixel(site, tap)[c].

    pixels[site * pixels_row + tap], grads[site] and weights[site] are addresses, the last of `out`'s type, the others
    of the type of `source`. `inner` channels a group.
    """
    storage, compute = source.dtype, out.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)
        stored = _data(context, builder, signature, args, 3).type.pointee
        lanes = _lanes(element)

        def build(builder, arguments):
            sites, pixels, pixels_row, weights, grads, groups, inner, taps, out = arguments
            channels = builder.mul(groups, inner)
            zero = _constant(ir.VectorType(element, lanes), 0.0)

            def row(builder, numbers, at, kind):
                return _at_address(builder, builder.load(builder.gep(numbers, [at])), kind)

            def sums(builder, group, channel, tap, tap_count, some):
                shift = builder.add(builder.mul(group, taps), tap)

                def site_round(builder, site, totals):
                    entry = builder.add(builder.mul(site, pixels_row), tap)
                    grad = _read_some(builder, row(builder, grads, site, stored), channel, lanes, storage, some)
                    weight = row(builder, weights, site, element)
                    following = []
                    for t in range(tap_count):
                        pixel = row(builder, pixels, builder.add(entry, _i64(t)), stored)
                        product = builder.fmul(_read_some(builder, pixel, channel, lanes, storage, some), grad)
                        factor = _splat(
                            builder, _read(builder, weight, builder.add(shift, _i64(t)), 1, compute), zero.type
                        )
                        following.append(_call(builder, "fma", factor, product, totals[t]))
                    return following

                totals = _for(builder, _i64(0), sites, 1, [zero] * tap_count, site_round)
                for t in range(tap_count):
                    place = builder.add(builder.mul(builder.add(tap, _i64(t)), channels), channel)
                    before = _read_some(builder, out, place, lanes, compute, some)
                    _write_some(builder, builder.fadd(before, totals[t]), out, place, lanes, compute, some)

            def group_round(builder, group, values):
                def strip(builder, at, some):
                    channel, begin = builder.add(builder.mul(group, inner), at), _i64(0)
                    for tap_count in (4, 1):
                        end = builder.sub(taps, builder.and_(taps, _i64(tap_count - 1)))

                        def tap_round(builder, tap, values, tap_count=tap_count):
                            sums(builder, group, channel, tap, tap_count, some)
                            return []

                        _for(builder, begin, end, tap_count, [], tap_round)
                        begin = end

                _for_vectors(builder, inner, lanes, strip)
                return []

            _for(builder, _i64(0), groups, 1, [], group_round)

        numbers = _i64.as_pointer()
        function = _function(
            builder.module,
            f"dynconv_channel_products_{storage}_{compute}",
            [_i64, numbers, _i64, numbers, numbers, _i64, _i64, _i64, element.as_pointer()],
            build,
        )
        data = lambda which: _data(context, builder, signature, args, which)
        builder.call(function, [args[0], data(1), args[2], data(4), data(5), *args[6:9], data(9)])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, pixels, i, source, weights, grads, i, i, i, out), codegen


def _normalise_groups(name: str):
    @intrinsic
    def groups(typingctx, filters, at, count, taps, out, out_at):
        storage, compute = filters.dtype, out.dtype

        def codegen(context, builder, signature, args):
            element, lanes = context.get_value_type(compute), _lanes(context.get_value_type(compute))
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                filters, count, taps, out = arguments
                zero = _constant(vector, 0.0)

                def group(builder, number, values):
                    first = builder.mul(number, taps)
                    place = lambda builder, at: builder.add(first, at)

                    def mapped(source, kind, carried, change):
                        """out = change(source), carrying a sum of what is written."""

                        def round_(builder, at, totals, some):
                            value = _read_some(builder, source, place(builder, at), lanes, kind, some)
                            value = change(builder, value)
                            _write_some(builder, value, out, place(builder, at), lanes, compute, some)
                            if some is not None:
                                value = builder.select(some, value, zero)
                            return [builder.fadd(total, value) for total in totals]

                        return _carry_vectors(builder, taps, lanes, carried, round_)

                    if name == "none":
                        mapped(filters, storage, [], lambda builder, x: x)
                    elif name == "sigmoid":
                        mapped(filters, storage, [], _sigmoid)
                    elif name == "softmax":

                        def largest(builder, at, most, some):
                            value = _read_some(builder, filters, place(builder, at), lanes, storage, some)
                            larger = builder.fcmp_ordered(">", value, most[0])
                            larger = larger if some is None else builder.and_(larger, some)
                            return [builder.select(larger, value, most[0])]

                        lowest = _constant(vector, float("-inf"))
                        (most,) = _carry_vectors(builder, taps, lanes, [lowest], largest)
                        peak = builder.extract_element(most, ir.IntType(32)(0))
                        for lane in range(1, lanes):
                            other = builder.extract_element(most, ir.IntType(32)(lane))
                            peak = builder.select(builder.fcmp_ordered(">", other, peak), other, peak)
                        peak = _splat(builder, peak, vector)

                        def power(builder, x):
                            x = builder.fsub(x, peak)
                            # exp stops at exp(-87): a tap of -inf weighs nothing.
                            return builder.select(
                                builder.fcmp_ordered("<", x, _constant(vector, -87.0)), zero, _exp(builder, x)
                            )

                        (total,) = mapped(filters, storage, [zero], power)
                        share = builder.fdiv(ir.Constant(element, 1.0), _sum_lanes(builder, total))
                        share = _splat(builder, share, vector)
                        mapped(out, compute, [], lambda builder, x: builder.fmul(x, share))
                    else:
                        norm = _norm(builder, filters, first, taps, lanes, storage, vector)
                        norm = _splat(builder, norm, vector)
                        mapped(filters, storage, [], lambda builder, x: builder.fdiv(x, norm))
                    return []

                _for(builder, _i64(0), count, 1, [], group)

            data = [_data(context, builder, signature, args, which) for which in (0, 4)]
            function = _function(
                builder.module,
                f"dynconv_normalise_{name}_{storage}_{compute}",
                [data[0].type, _i64, _i64, data[1].type],
                build,
            )
            places = builder.gep(data[0], [args[1]]), builder.gep(data[1], [args[5]])
            builder.call(function, [places[0], args[2], args[3], places[1]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(filters, i, i, i, out, i), codegen

    return groups


def _norm(builder, filters, first, taps, lanes: int, storage: types.Type, vector: ir.VectorType) -> ir.Value:
    """max(|filter|, LEAST_NORM) of a group."""

    def squares(builder, at, totals, some):
        value = _read_some(builder, filters, builder.add(first, at), lanes, storage, some)
        return [_call(builder, "fma", value, value, totals[0])]

    (total,) = _carry_vectors(builder, taps, lanes, [_constant(vector, 0.0)], squares)
    norm, least = _call(builder, "sqrt", _sum_lanes(builder, total)), ir.Constant(vector.element, LEAST_NORM)
    return builder.select(builder.fcmp_ordered("<", norm, least), least, norm)


_none, _softmax, _sigmoids, _l2 = (_normalise_groups(name) for name in NORMALIZATIONS)


@njit(inline="always")
def normalise(normalization, filters, at, groups, taps, out, out_at):
    """out[out_at:] = the normalised filters[at:] of `groups` groups, by the number in NORMALIZATIONS."""
    if normalization == 1:
        _softmax(filters, at, groups, taps, out, out_at)
    elif normalization == 2:
        _sigmoids(filters, at, groups, taps, out, out_at)
    elif normalization == 3:
        _l2(filters, at, groups, taps, out, out_at)
    else:
        _none(filters, at, groups, taps, out, out_at)


def _normalise_grad(name: str):
    @intrinsic
    def groups(typingctx, grads, grads_at, weights, weights_at, filters, at, count, taps):
        storage, compute = filters.dtype, grads.dtype

        def codegen(context, builder, signature, args):
            element, lanes = context.get_value_type(compute), _lanes(context.get_value_type(compute))
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                grads, weights, filters, count, taps = arguments
                one = _constant(vector, 1.0)

                def group(builder, number, values):
                    first = builder.mul(number, taps)

                    def both(builder, at, some):
                        place = builder.add(first, at)
                        return [_read_some(builder, v, place, lanes, compute, some) for v in (grads, weights)]

                    def projected(builder, at, totals, some):
                        return [_call(builder, "fma", *both(builder, at, some), totals[0])]

                    dot = norm = None
                    if name in ("softmax", "l2"):
                        (total,) = _carry_vectors(builder, taps, lanes, [_constant(vector, 0.0)], projected)
                        dot = _splat(builder, _sum_lanes(builder, total), vector)
                    if name == "l2":
                        norm = _norm(builder, filters, first, taps, lanes, storage, vector)
                        # Below it the norm is a constant.
                        is_least = builder.fcmp_ordered("<=", norm, ir.Constant(element, LEAST_NORM))
                        dot = builder.select(is_least, _constant(vector, 0.0), dot)
                        norm = _splat(builder, norm, vector)

                    def change(builder, at, values, some):
                        grad, weight = both(builder, at, some)
                        if name == "softmax":
                            result = builder.fmul(weight, builder.fsub(grad, dot))
                        elif name == "sigmoid":
                            result = builder.fmul(grad, builder.fmul(weight, builder.fsub(one, weight)))
                        else:
                            result = builder.fdiv(builder.fsub(grad, builder.fmul(weight, dot)), norm)
                        _write_some(builder, result, grads, builder.add(first, at), lanes, compute, some)
                        return []

                    _carry_vectors(builder, taps, lanes, [], change)
                    return []

                _for(builder, _i64(0), count, 1, [], group)

            data = [_data(context, builder, signature, args, which) for which in (0, 2, 4)]
            function = _function(
                builder.module,
                f"dynconv_normalise_grad_{name}_{storage}_{compute}",
                [*(d.type for d in data), _i64, _i64],
                build,
            )
            places = [builder.gep(d, [args[which]]) for d, which in zip(data, (1, 3, 5))]
            builder.call(function, [*places, args[6], args[7]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(grads, i, weights, i, filters, i, i, i), codegen

    return groups


_softmax_grad, _sigmoid_grad, _l2_grad = (_normalise_grad(name) for name in NORMALIZATIONS[1:])


@njit(inline="always")
def normalise_grad(normalization, grads, grads_at, weights, weights_at, filters, at, groups, taps):
    """The gradients of normalised weights, from grads_at on, become those of the filters[at:] that they are from."""
    if normalization == 1:
        _softmax_grad(grads, grads_at, weights, weights_at, filters, at, groups, taps)
    elif normalization == 2:
        _sigmoid_grad(grads, grads_at, weights, weights_at, filters, at, groups, taps)
    elif normalization == 3:
        _l2_grad(grads, grads_at, weights, weights_at, filters, at, groups, taps)


@njit(inline="always")
def _locate(row, height, width, line):
    """line[2:] = (sample, y, x) of a row of a grid; line[:2] are where the grid's line that it lies in begins and ends.

    Rows of one line follow each other, and divisions are slow.
    """
    if not line[0] <= row < line[1]:
        number = row // width
        line[0], line[1], line[2] = number * width, (number + 1) * width, number // height
        line[3] = number - line[2] * height
    line[4] = row - line[0]


@njit(inline="always")
def _share(item, parts, starts):
    """The rows begin..end of a piece of work, part of a sample's (of all rows, where `starts` has two entries)."""
    sample, part = item // parts, item % parts
    first, rows = starts[sample], starts[sample + 1] - starts[sample]
    return sample, first + rows * part // parts, first + rows * (part + 1) // parts


@njit
def _stencil_kernel(arguments, storage, compute):
    a = carray(arguments, (64,))
    source, out, filters = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    like, index, inverse, starts = (
        array(a[4], compute),
        array(a[6], np.int32),
        array(a[7], np.int32),
        array(a[8], np.int64),
    )
    items, parts, channels, groups, taps = a[9], a[10], a[11], a[12], a[13]
    is_transposed, normalization, is_scratch, size, compute_size = a[14] != 0, a[15], a[16] != 0, a[17], a[18]
    fill, inactive, sites, is_large, active = a[20], array(a[21], storage), a[22], a[23] != 0, a[24]
    has_index, has_inverse, has_channel = a[6] != 0, a[7] != 0, a[5] != 0
    site_height, site_width, height, width, kernel_height, kernel_width = a[30], a[31], a[32], a[33], a[34], a[35]
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, scale = a[36], a[37], a[38], a[39], a[40], a[41], a[42]
    base_height, base_width = site_height // scale, site_width // scale
    reach_y, reach_x = (kernel_height - 1) * dilation_y, (kernel_width - 1) * dilation_x
    row_size, filter_row = channels * size, groups * taps
    weight_row = filter_row * compute_size
    # In the caller's memory: Numba would count references to arrays of its own, atomically, at every use.
    memory, entries = a[26] + fetch_add(a[1:], 1) * a[27], taps * scale * scale
    line, place, targets, bases = (
        array(memory, np.int64), array(memory + 64, np.int64), array(memory + 192, np.int64),
        array(memory + 224, np.int64),
    )  # fmt: skip
    memory += 288
    pixels, weights = array(memory, np.int64), array(memory + 8 * ROWS * entries, np.int64)
    memory += 16 * ROWS * entries
    pixel_steps, weight_steps, numbers, listed = (
        array(memory, np.int64), array(memory + 8 * entries, np.int64), array(memory + 16 * entries, np.int64),
        array(memory + 24 * entries, np.int64),
    )  # fmt: skip
    zeros = memory + 32 * entries
    clear(array(zeros, compute), 0, max(channels, filter_row), compute)
    scratch_at = zeros + max(channels, filter_row) * compute_size
    scratch = array(scratch_at, compute)
    for tap in range(taps):
        step = tap // kernel_width * dilation_y * (site_width if is_transposed else width)
        step += tap % kernel_width * dilation_x
        pixel_steps[tap] = -step * row_size if is_transposed else step * row_size
        weight_steps[tap] = tap * compute_size - (step * weight_row if is_transposed else 0)
        numbers[tap] = tap
    # Of a large output: from the first pixel of a row to the last that the next rows read.
    ahead = (ROWS * row_size + (0 if is_transposed else pixel_steps[taps - 1])) if a[19] != 0 else 0
    line[0] = line[1] = 0
    while True:
        item = fetch_add(a, 1)
        if item >= items:
            return
        sample, begin, end = _share(item, parts, starts)
        if end > begin:
            fill_skipped(fill, inactive, out, index, begin, end - begin, active, sites, channels, is_large)
        channel_filters = array(a[5] + sample * taps * channels * compute_size, compute)
        for first in range(begin, end, ROWS):
            is_direct = not has_inverse and (not is_transposed or (scale == 1 and stride_y == 1 and stride_x == 1))
            for i in range(ROWS):
                row = min(first + i, end - 1)
                site = np.int64(index[row]) if has_index else row
                if is_transposed:
                    _locate(site, height, width, line)
                    y, x = line[3] + pad_y, line[4] + pad_x  # the site of tap (0, 0), a stride not yet undone
                    start = (line[2] * site_height + y) * site_width + x
                    is_direct = is_direct and reach_y <= y < site_height and reach_x <= x < site_width
                    bases[2 * i + 1] = a[4] + start * weight_row
                else:
                    _locate(site, site_height, site_width, line)
                    y, x = line[3] // scale * stride_y - pad_y, line[4] // scale * stride_x - pad_x
                    start = (line[2] * height + y) * width + x
                    is_direct = is_direct and 0 <= y < height - reach_y and 0 <= x < width - reach_x
                    bases[2 * i + 1] = a[4] + site * weight_row
                    if is_scratch:
                        normalise(normalization, filters, site * filter_row, groups, taps, scratch, i * filter_row)
                        bases[2 * i + 1] = scratch_at + i * weight_row
                bases[2 * i], targets[i] = a[2] + start * row_size, a[3] + site * row_size
                place[3 * i], place[3 * i + 1], place[3 * i + 2] = line[2], y, x
            if is_direct:
                for i in range(ROWS):
                    pixels[i], weights[i] = bases[2 * i], bases[2 * i + 1]
                filter_rows(
                    True, has_channel, taps, pixels, weights, pixel_steps, weight_steps, numbers, source, like,
                    channel_filters, channels, groups, taps, targets, out, ahead,
                )  # fmt: skip
                continue
            count = 0
            for tap in range(taps):
                tap_y, tap_x = tap // kernel_width * dilation_y, tap % kernel_width * dilation_x
                if not is_transposed:
                    is_read = False
                    for i in range(ROWS):
                        entry = count * ROWS + i
                        y, x = place[3 * i + 1] + tap_y, place[3 * i + 2] + tap_x
                        pixels[entry] = weights[entry] = zeros
                        if 0 <= y < height and 0 <= x < width:
                            pixels[entry] = bases[2 * i] + pixel_steps[tap]
                            weights[entry] = bases[2 * i + 1] + weight_steps[tap]
                            is_read = True
                    listed[count] = tap
                    count += is_read
                    continue
                for part in range(scale * scale):
                    is_read = False
                    for i in range(ROWS):
                        entry = count * ROWS + i
                        y, x = place[3 * i + 1] - tap_y, place[3 * i + 2] - tap_x
                        pixels[entry] = weights[entry] = zeros
                        if y < 0 or x < 0 or y % stride_y != 0 or x % stride_x != 0:
                            continue
                        y, x = y // stride_y, x // stride_x
                        if y >= base_height or x >= base_width:
                            continue
                        y, x = y * scale + part // scale, x * scale + part % scale
                        site = (place[3 * i] * site_height + y) * site_width + x
                        if has_inverse and inverse[site] < 0:
                            continue
                        pixels[entry] = a[2] + site * row_size
                        weights[entry] = a[4] + site * weight_row + tap * compute_size
                        is_read = True
                    listed[count] = tap
                    count += is_read
            filter_rows(
                False, has_channel, count, pixels, weights, pixel_steps, weight_steps, listed, source, like,
                channel_filters, channels, groups, taps, targets, out, 0,
            )  # fmt: skip


@njit
def _filter_grad_kernel(arguments, storage, compute):
    a = carray(arguments, (64,))
    source, filters, grad_filters = array(a[2], storage), array(a[3], storage), array(a[4], storage)
    normalised, index, starts = array(a[5], compute), array(a[6], np.int32), array(a[8], np.int64)
    items, parts, channels, groups, taps = a[9], a[10], a[11], a[12], a[13]
    normalization, size, compute_size = a[15], a[17], a[18]
    has_channel, wants_filters, wants_channel, has_index = a[19] != 0, a[4] != 0, a[20] != 0, a[6] != 0
    site_height, site_width, height, width, kernel_width = a[30], a[31], a[32], a[33], a[35]
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, scale = a[36], a[37], a[38], a[39], a[40], a[41], a[42]
    row_size, filter_row, inner = channels * size, groups * taps, channels // groups
    memory = a[26] + fetch_add(a[1:], 1) * a[27]
    line, grads, weights = (
        array(memory, np.int64), array(memory + 64, np.int64), array(memory + 64 + 8 * _BLOCK_SITES, np.int64)
    )  # fmt: skip
    memory += 64 + 16 * _BLOCK_SITES
    pixels_at = memory
    zeros = memory + 8 * _BLOCK_SITES * taps
    clear(array(zeros, compute), 0, channels, compute)
    scratch = array(zeros + channels * compute_size, compute)
    line[0] = line[1] = 0
    while True:
        item = fetch_add(a, 1)
        if item >= items:
            return
        sample, begin, end = _share(item, parts, starts)
        channel_filters = array(a[19] + sample * taps * channels * compute_size, compute)
        sums = array(a[20] + item * taps * channels * compute_size, compute)
        for block in range(begin, end, _BLOCK_SITES):
            count = min(_BLOCK_SITES, end - block)
            for j in range(count):
                site = np.int64(index[block + j]) if has_index else block + j
                _locate(site, site_height, site_width, line)
                y, x = line[3] // scale * stride_y - pad_y, line[4] // scale * stride_x - pad_x
                corner = line[2] * height
                pixels = array(pixels_at + 8 * j * taps, np.int64)
                for tap in range(taps):
                    tap_y = y + tap // kernel_width * dilation_y
                    tap_x = x + tap % kernel_width * dilation_x
                    pixels[tap] = zeros
                    if 0 <= tap_y < height and 0 <= tap_x < width:
                        pixels[tap] = a[2] + ((corner + tap_y) * width + tap_x) * row_size
                grads[j] = a[7] + site * row_size
                weights[j] = a[5] + site * filter_row * compute_size
                if not wants_filters:
                    continue
                for group in range(groups):
                    dot_taps(
                        has_channel, taps, pixels, source, grads[j], source, channel_filters, group * inner, inner,
                        channels, scratch, group * taps,
                    )  # fmt: skip
                normalise_grad(
                    normalization, scratch, 0, normalised, site * filter_row, filters, site * filter_row, groups, taps
                )
                for k in range(filter_row):
                    store(grad_filters, site * filter_row + k, scratch[k])
            if wants_channel:
                channel_products(
                    count, array(pixels_at, np.int64), taps, source, weights, grads, groups, inner, taps, sums
                )


@njit
def _normalise_kernel(arguments, storage, compute):
    a = carray(arguments, (16,))
    filters, out, index, weights = (
        array(a[2], storage),
        array(a[3], compute),
        array(a[4], np.int32),
        array(a[10], compute),
    )
    rows, groups, taps, chunk_rows, normalization = a[5], a[6], a[7], a[8], a[9]
    has_index, is_grad = a[4] != 0, a[10] != 0
    while True:
        begin = fetch_add(a, 1) * chunk_rows
        if begin >= rows:
            return
        for row in range(begin, min(rows, begin + chunk_rows)):
            at = (np.int64(index[row]) if has_index else row) * groups * taps
            if is_grad:
                normalise_grad(normalization, out, at, weights, at, filters, at, groups, taps)
            else:
                normalise(normalization, filters, at, groups, taps, out, at)


_run_stencil = kernel(_stencil_kernel)
_run_filter_grad = kernel(_filter_grad_kernel)
_run_normalise = kernel(_normalise_kernel)


def normalized(
    filters: Tensor, taps: int, normalization: str, index: Tensor | None = None, active: int | None = None
) -> Tensor:
    """The normalised filters [N, G * K, Ho, Wo], channels_last, in the compute type: all, or of those listed."""
    out = torch.empty_like(filters, dtype=compute_type(filters.dtype))
    _normalise(filters, out, None, taps, normalization, index, active)
    return out


def normalized_grad_(grads: Tensor, weights: Tensor, filters: Tensor, taps: int, normalization: str) -> None:
    """Turn the gradients of `weights` = normalized(filters), both in the compute type, into those of the filters."""
    _normalise(filters, grads, weights, taps, normalization, None, None)


def _normalise(filters, out, weights, taps, normalization, index, active) -> None:
    if active is None:
        active = filters.shape[0] * filters.shape[2] * filters.shape[3]
    chunk = max(1, ceil(active, _CHUNKS_PER_THREAD * torch.get_num_threads()))
    _run_normalise(
        filters.dtype, workers(ceil(active, chunk)), address(filters), address(out), address(index), active,
        filters.shape[1] // taps, taps, chunk, NORMALIZATIONS.index(normalization), address(weights),
    )  # fmt: skip


class Filters:
    """One call's geometry and active sites, and what its kernels share.

    Args:
        input: [N, C, H, W] in channels_last, as `filters` [N, G * K, Ho, Wo].
        channel_filters: [N, C, kH, kW], or None.
        sites: None, or the mask [N, 1, Ho, Wo], index and count of an ActiveSites.
    """

    def __init__(
        self, input: Tensor, filters: Tensor, channel_filters: Tensor | None, sites: list[Tensor] | None,
        geometry: Geometry, scale: int, normalization: str,
    ) -> None:  # fmt: skip
        self.input, self.filters, self.sites = input, filters, sites
        self.dtype, self.compute = input.dtype, compute_type(input.dtype)
        self.samples, self.channels = input.shape[:2]
        self.kernel, self.taps = geometry.kernel, geometry.kernel[0] * geometry.kernel[1]
        self.groups = filters.shape[1] // self.taps
        self.normalization = NORMALIZATIONS.index(normalization)
        self.index = sites[1] if sites else None
        self.active = int(sites[2]) if sites else filters.shape[0] * filters.shape[2] * filters.shape[3]
        self.place = (
            *filters.shape[2:], *input.shape[2:], *geometry.kernel, *geometry.stride, *geometry.padding,
            *geometry.dilation, scale,
        )  # fmt: skip
        self.scale = scale
        self.channel_filters = None
        if channel_filters is not None:
            # Taps before channels, as pixels lie.
            self.channel_filters = channel_filters.to(self.compute).flatten(2).transpose(1, 2).contiguous()

    def forward(self, out: Tensor) -> None:
        """Into `out` [N, C, Ho, Wo], channels_last: zeros at the skipped sites."""
        if self.active == 0:
            out.zero_()
            return
        is_scratch = self.normalization != 0 or self.dtype != self.compute
        area = out.shape[2] * out.shape[3]
        self._stencil(self.input, out, self.filters, self.index, None, area, self.active, False, is_scratch)

    def input_grad(self, grad: Tensor, grad_input: Tensor) -> None:
        """Into `grad_input`, like the input, from `grad`, like the output."""
        inverse = site_tables.inverse(self.index, self.sites[2], self.index.numel()) if self.sites else None
        area = grad_input.shape[2] * grad_input.shape[3]
        rows = self.samples * area
        self._stencil(grad, grad_input, self.weights, None, inverse, area, rows, True, False)

    @functools.cached_property
    def weights(self) -> Tensor:
        """The normalised filters in the compute type, at the active sites: made once, the backward reads them often."""
        if self.normalization == 0 and self.dtype == self.compute:
            return self.filters
        return normalized(self.filters, self.taps, NORMALIZATIONS[self.normalization], self.index, self.active)

    def filter_grads(
        self, grad: Tensor, wants_filters: bool, wants_channel: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the filters, zeros at the skipped sites, and of the channels' [N, C, kH, kW]."""
        grad_filters = sums = None
        if wants_filters:
            grad_filters = (torch.zeros_like if self.sites else torch.empty_like)(self.filters)
        area = grad.shape[2] * grad.shape[3]
        if self.channel_filters is not None:
            parts = max(1, min(_MOST_PARTS, ceil(area, _PART_SITES)))
            starts = self._starts(area)
        else:
            parts, starts = _CHUNKS_PER_THREAD * torch.get_num_threads(), torch.tensor([0, self.active])
        items = parts * (len(starts) - 1)
        if wants_channel:
            sums = torch.zeros(items, self.taps, self.channels, dtype=self.compute)
        element, compute = grad.element_size(), self.compute.itemsize
        memory = 64 + 8 * _BLOCK_SITES * (2 + self.taps)
        memory += compute * (self.channels + self.groups * self.taps)
        memory, threads = cache_lines(memory), workers(items)
        scratch = torch.empty(threads * memory, dtype=torch.uint8)
        weights = self.weights if self.normalization or wants_channel else None
        _run_filter_grad(
            self.dtype, threads, address(self.input), address(self.filters), address(grad_filters), address(weights),
            address(self.index), address(grad), address(starts), items, parts, self.channels, self.groups, self.taps,
            0, self.normalization, 0, element, compute, address(self.channel_filters), address(sums),
            *(0,) * 5, address(scratch), memory, 0, 0, *self.place,
        )  # fmt: skip
        if sums is not None:
            sums = sums.view(self.samples, -1, self.taps, self.channels).sum(1).transpose(1, 2)
            sums = sums.to(self.dtype).contiguous().view(self.samples, self.channels, *self.kernel)
        return grad_filters, sums

    def _starts(self, area: int, is_pixels: bool = False) -> Tensor:
        """int64 [N + 1]: where each sample's rows begin."""
        if not self.sites or is_pixels:
            return torch.arange(self.samples + 1) * area
        counts = self.sites[0].flatten(1).sum(1)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def _stencil(self, source, out, weights, index, inverse, area, rows, is_transposed, is_scratch) -> None:
        parts = _CHUNKS_PER_THREAD * torch.get_num_threads()
        starts = torch.tensor([0, rows]) if self.channel_filters is None else self._starts(area, is_transposed)
        items, threads = parts * (len(starts) - 1), workers(ceil(rows, ROWS))
        element, compute = source.element_size(), self.compute.itemsize
        filter_row, entries = self.groups * self.taps, self.taps * self.scale**2
        memory = 288 + 8 * entries * (2 * ROWS + 4)
        memory += compute * (max(self.channels, filter_row) + ROWS * filter_row * is_scratch + 64)
        memory = cache_lines(memory)
        scratch = torch.empty(threads * memory, dtype=torch.uint8)
        tile = STENCIL_VECTORS * VECTOR_BYTES
        is_streamed = out.numel() * element > _STREAMED and out.data_ptr() % tile == 0
        is_streamed = is_streamed and self.channels // self.groups * element % tile == 0
        fill = filling(out, None, self.index is None or is_transposed)
        _run_stencil(
            self.dtype, threads, address(source), address(out), address(weights), address(self.channel_filters),
            address(index), address(inverse), address(starts), items, parts, self.channels, self.groups, self.taps,
            is_transposed, self.normalization, is_scratch, element, compute, is_streamed, *fill, rows, 0,
            address(scratch), memory, 0, 0, *self.place,
        )  # fmt: skip


def cache_lines(size: int) -> int:
    """In whole cache lines: no two threads write the same one."""
    return ceil(size, 64) * 64
