"""The sums of filters that differ from pixel to pixel, and the gradients of these filters."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .build import (
    STENCIL_ROWS,
    STENCIL_VECTORS,
    at_address,
    call,
    carry_vectors,
    constant,
    data_of,
    for_range,
    for_strips,
    for_vectors,
    i64,
    internal_function,
    lanes_of,
    prefetch_line,
    read,
    read_some,
    splat,
    sum_lanes,
    transposed_sum,
    write,
    write_around,
    write_some,
)
from .rows import DOT_VECTORS


def _filter_rows(is_direct: bool, has_channel: bool):
    @intrinsic
    def rows(typingctx, count, pixels, weights, pixel_steps, weight_steps, taps, source, like, channel_filters,
             channels, groups, group_weights, targets, out, ahead):  # fmt: skip
        storage, compute, result = source.dtype, like.dtype, out.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(compute)
            stored, written = (data_of(context, builder, signature, args, which).type.pointee for which in (6, 13))
            lanes = lanes_of(element)

            def build(builder, arguments):
                (count, pixels, weights, pixel_steps, weight_steps, taps, channel_filters, channels, groups,
                 group_weights, targets, ahead) = arguments  # fmt: skip
                is_streamed = builder.icmp_signed("!=", ahead, i64(0))
                inner = builder.sdiv(channels, groups)
                at = lambda numbers, place: builder.load(builder.gep(numbers, [place]))
                ends = [at_address(builder, at(targets, i64(i)), written) for i in range(STENCIL_ROWS)]
                starts = [(at(pixels, i64(i)), at(weights, i64(i))) for i in range(STENCIL_ROWS)] if is_direct else None

                def sums(builder, channel, shift, vectors, lanes):
                    zero = constant(element if lanes == 1 else ir.VectorType(element, lanes), 0.0)
                    load = lambda numbers, place: builder.load(builder.gep(numbers, [place]))

                    def tap_round(builder, t, totals):
                        following, shares = [], None
                        if has_channel:
                            base = builder.add(builder.mul(load(taps, t), channels), channel)
                            shares = [
                                read(builder, channel_filters, builder.add(base, i64(v * lanes)), lanes, compute)
                                for v in range(vectors)
                            ]
                        if is_direct:
                            steps = load(pixel_steps, t), load(weight_steps, t)
                        for i in range(STENCIL_ROWS):
                            if is_direct:
                                places = [builder.add(start, step) for start, step in zip(starts[i], steps)]
                            else:
                                entry = builder.add(builder.mul(t, i64(STENCIL_ROWS)), i64(i))
                                places = load(pixels, entry), load(weights, entry)
                                is_read = builder.icmp_signed("!=", *places)
                            row, weight = (
                                at_address(builder, places[0], stored),
                                at_address(builder, places[1], element),
                            )
                            factor = read(builder, weight, shift, 1, compute)
                            factor = factor if lanes == 1 else splat(builder, factor, zero.type)
                            for v in range(vectors):
                                value = read(builder, row, builder.add(channel, i64(v * lanes)), lanes, storage)
                                if has_channel:
                                    value = builder.fmul(value, shares[v])
                                    if not is_direct:  # a zero that is not read stays one, even times NaN
                                        value = builder.select(is_read, value, zero)
                                following.append(call(builder, "fma", factor, value, totals[i * vectors + v]))
                        return following

                    may_stream = is_direct and vectors == STENCIL_VECTORS and result == compute
                    if may_stream:
                        with builder.if_then(is_streamed):
                            for start, _ in starts:
                                row = at_address(builder, builder.add(start, ahead), stored)
                                prefetch_line(builder, builder.gep(row, [channel]))
                    totals = for_range(builder, i64(0), count, 1, [zero] * (STENCIL_ROWS * vectors), tap_round)

                    def write_totals(builder, write):
                        for i in range(STENCIL_ROWS):
                            for v in range(vectors):
                                place = builder.add(channel, i64(v * lanes))
                                write(builder, totals[i * vectors + v], ends[i], place, lanes, result)

                    if may_stream:
                        with builder.if_else(is_streamed) as (around, through):
                            with around:
                                write_totals(builder, write_around)
                            with through:
                                write_totals(builder, write)
                    else:
                        write_totals(builder, write)

                def group_round(builder, group, values):
                    first, shift = builder.mul(group, inner), builder.mul(group, group_weights)
                    for_strips(
                        builder, inner, lanes,
                        lambda builder, at, vectors, lanes: sums(
                            builder, builder.add(first, at), shift, vectors, lanes
                        ),
                    )  # fmt: skip
                    return []

                for_range(builder, i64(0), groups, 1, [], group_round)

            numbers = i64.as_pointer()
            kind = f"{'direct' if is_direct else 'listed'}{'_channel' if has_channel else ''}"
            function = internal_function(
                builder.module,
                f"dynconv_filter_{kind}_{storage}_{compute}_{result}",
                [i64, *[numbers] * 5, element.as_pointer(), i64, i64, i64, numbers, i64],
                build,
            )
            data = lambda which: data_of(context, builder, signature, args, which)
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
    """target(i)[c] = sum over t < count of weight(t, i)[g(c)] * v[taps[t], c] * pixel(t, i)[c], for i < STENCIL_ROWS.

    The addresses of pixel(t, i) and weight(t, i) are pixels[i] + pixel_steps[t] and weights[i] + weight_steps[t] where
    `is_direct`, else pixels[t * STENCIL_ROWS + i] and weights[t * STENCIL_ROWS + i], the same zeros for what row i does
    not read; that of target(i) is targets[i]. Group g's weight lies g * group_weights elements behind the address, in
    the type of `like`. v is 1 without `has_channel`. Unless `ahead` is 0, the pixels so far behind pixels[i] are
    fetched into the cache, and the targets written around it.
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
            stored, rows_stored = (data_of(context, builder, signature, args, which).type.pointee for which in (2, 4))
            lanes = lanes_of(element)

            def build(builder, arguments):
                taps, pixels, grad, channel_filters, channel, inner, channels, out = arguments
                zero = constant(ir.VectorType(element, lanes), 0.0)

                def totals_of(builder, first, tap_count, unrolled):
                    """One vector for each of some taps, whose sum is the tap's dot product."""
                    rows = [
                        at_address(builder, builder.load(builder.gep(pixels, [builder.add(first, i64(t))])), stored)
                        for t in range(tap_count)
                    ]
                    grads = at_address(builder, grad, rows_stored)

                    def products(builder, at, totals, some):
                        place = builder.add(channel, at)
                        value = read_some(builder, grads, place, lanes, given, some)
                        following = []
                        for t, row in enumerate(rows):
                            factor = read_some(builder, row, place, lanes, storage, some)
                            if has_channel:
                                share = builder.add(builder.mul(builder.add(first, i64(t)), channels), place)
                                share = read_some(builder, channel_filters, share, lanes, compute, some)
                                factor = builder.fmul(factor, share)
                            following.append(call(builder, "fma", factor, value, totals[t]))
                        return following

                    def several(builder, at, totals):
                        following = []
                        for u in range(unrolled):
                            part = totals[u * tap_count : (u + 1) * tap_count]
                            following += products(builder, builder.add(at, i64(u * lanes)), part, None)
                        return following

                    whole = builder.and_(inner, i64(-lanes * unrolled))
                    totals = for_range(
                        builder, i64(0), whole, lanes * unrolled, [zero] * (tap_count * unrolled), several
                    )
                    for u in range(1, unrolled):
                        totals[:tap_count] = [
                            builder.fadd(*pair) for pair in zip(totals[:tap_count], totals[u * tap_count :])
                        ]
                    left = builder.sub(inner, whole)
                    base = whole
                    shifted = lambda builder, at, totals, some: products(builder, builder.add(base, at), totals, some)
                    return carry_vectors(builder, left, lanes, totals[:tap_count], shifted)

                def block(builder, first, values):
                    totals = totals_of(builder, first, lanes, 1)
                    write(builder, transposed_sum(builder, totals), out, first, lanes, compute)
                    return []

                def single(builder, tap, values):
                    (total,) = totals_of(builder, tap, 1, DOT_VECTORS)
                    write(builder, sum_lanes(builder, total), out, tap, 1, compute)
                    return []

                # An odd kernel, squared, has one tap more than whole vectors of 4 or 8.
                whole = builder.and_(taps, i64(-lanes))
                for_range(builder, i64(0), whole, lanes, [], block)
                for_range(builder, whole, taps, 1, [], single)

            pointer = element.as_pointer()
            function = internal_function(
                builder.module,
                f"dynconv_dot_taps{'_channel' * has_channel}_{storage}_{given}_{compute}",
                [i64, i64.as_pointer(), i64, pointer, i64, i64, i64, pointer],
                build,
            )
            data = lambda which: data_of(context, builder, signature, args, which)
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
        stored = data_of(context, builder, signature, args, 3).type.pointee
        lanes = lanes_of(element)

        def build(builder, arguments):
            sites, pixels, pixels_row, weights, grads, groups, inner, taps, out = arguments
            channels = builder.mul(groups, inner)
            zero = constant(ir.VectorType(element, lanes), 0.0)

            def row(builder, numbers, at, kind):
                return at_address(builder, builder.load(builder.gep(numbers, [at])), kind)

            def sums(builder, group, channel, tap, tap_count, some):
                shift = builder.add(builder.mul(group, taps), tap)

                def site_round(builder, site, totals):
                    entry = builder.add(builder.mul(site, pixels_row), tap)
                    grad = read_some(builder, row(builder, grads, site, stored), channel, lanes, storage, some)
                    weight = row(builder, weights, site, element)
                    following = []
                    for t in range(tap_count):
                        pixel = row(builder, pixels, builder.add(entry, i64(t)), stored)
                        product = builder.fmul(read_some(builder, pixel, channel, lanes, storage, some), grad)
                        factor = splat(
                            builder, read(builder, weight, builder.add(shift, i64(t)), 1, compute), zero.type
                        )
                        following.append(call(builder, "fma", factor, product, totals[t]))
                    return following

                totals = for_range(builder, i64(0), sites, 1, [zero] * tap_count, site_round)
                for t in range(tap_count):
                    place = builder.add(builder.mul(builder.add(tap, i64(t)), channels), channel)
                    before = read_some(builder, out, place, lanes, compute, some)
                    write_some(builder, builder.fadd(before, totals[t]), out, place, lanes, compute, some)

            def group_round(builder, group, values):
                def strip(builder, at, some):
                    channel, begin = builder.add(builder.mul(group, inner), at), i64(0)
                    for tap_count in (4, 1):
                        end = builder.sub(taps, builder.and_(taps, i64(tap_count - 1)))

                        def tap_round(builder, tap, values, tap_count=tap_count):
                            sums(builder, group, channel, tap, tap_count, some)
                            return []

                        for_range(builder, begin, end, tap_count, [], tap_round)
                        begin = end

                for_vectors(builder, inner, lanes, strip)
                return []

            for_range(builder, i64(0), groups, 1, [], group_round)

        numbers = i64.as_pointer()
        function = internal_function(
            builder.module,
            f"dynconv_channel_products_{storage}_{compute}",
            [i64, numbers, i64, numbers, numbers, i64, i64, i64, element.as_pointer()],
            build,
        )
        data = lambda which: data_of(context, builder, signature, args, which)
        builder.call(function, [args[0], data(1), args[2], data(4), data(5), *args[6:9], data(9)])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, pixels, i, source, weights, grads, i, i, i, out), codegen
