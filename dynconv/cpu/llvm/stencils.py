"""The sums of stencils, of one channel or of few channels a group, and their weights' gradients."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .build import (
    STENCIL_ROWS,
    at_address,
    call,
    clamp,
    data_of,
    for_range,
    for_strips,
    i64,
    internal_function,
    lanes_of,
    read,
    splat,
    write,
)

STENCIL_TAPS, STENCIL_WEIGHT_VECTORS = 3, 2  # the same for the stencil's weight gradient


@intrinsic
def stencil_rows(typingctx, pixels, source, weight, taps, channels, shift, low, high, out):
    """target(i)[c] = shift[c] + sum over taps of weight[tap * channels + c] * pixel(tap, i)[c], for i < STENCIL_ROWS.

    No less than low and no more than high. pixels[tap * STENCIL_ROWS + i] is the address of a pixel's row, in the
    element type of `source`, and pixels[taps * STENCIL_ROWS + i] that of a target, in the type of `out`; `weight` and
    `shift` are in the compute type.
    """
    storage, result = source.dtype, out.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(weight.dtype)
        stored, written = (data_of(context, builder, signature, args, which).type.pointee for which in (1, 8))
        lanes = lanes_of(element)
        compute = weight.dtype

        def build(builder, arguments):
            pixels, weight, taps, channels, shift, low, high = arguments

            def sums(builder, at, vectors, lanes):
                kind = element if lanes == 1 else ir.VectorType(element, lanes)
                start = [read(builder, shift, builder.add(at, i64(v * lanes)), lanes, compute) for v in range(vectors)]
                least, most = (splat(builder, v, kind) if lanes > 1 else v for v in (low, high))

                def tap_round(builder, tap, totals):
                    base = builder.add(builder.mul(tap, channels), at)
                    filters = [
                        read(builder, weight, builder.add(base, i64(v * lanes)), lanes, compute) for v in range(vectors)
                    ]
                    first = builder.mul(tap, i64(STENCIL_ROWS))
                    following = []
                    for i in range(STENCIL_ROWS):
                        address = builder.load(builder.gep(pixels, [builder.add(first, i64(i))]))
                        row = at_address(builder, address, stored)
                        for v in range(vectors):
                            value = read(builder, row, builder.add(at, i64(v * lanes)), lanes, storage)
                            following.append(call(builder, "fma", filters[v], value, totals[i * vectors + v]))
                    return following

                totals = for_range(builder, i64(0), taps, 1, start * STENCIL_ROWS, tap_round)
                first = builder.mul(taps, i64(STENCIL_ROWS))
                for i in range(STENCIL_ROWS):
                    address = builder.load(builder.gep(pixels, [builder.add(first, i64(i))]))
                    target = at_address(builder, address, written)
                    for v in range(vectors):
                        total = clamp(builder, totals[i * vectors + v], least, most)
                        write(builder, total, target, builder.add(at, i64(v * lanes)), lanes, result)

            for_strips(builder, channels, lanes, sums)

        function = internal_function(
            builder.module,
            f"dynconv_stencil_{storage}_{compute}_{result}",
            [i64.as_pointer(), element.as_pointer(), i64, i64, element.as_pointer(), element, element],
            build,
        )
        builder.call(
            function,
            [
                data_of(context, builder, signature, args, 0),
                data_of(context, builder, signature, args, 2),
                args[3],
                args[4],
                data_of(context, builder, signature, args, 5),
                args[6],
                args[7],
            ],
        )
        return context.get_dummy_value()

    i = types.int64
    return types.void(pixels, source, weight, i, i, shift, low, high, out), codegen


def _group_rows(units: int):
    @intrinsic
    def products(
        typingctx, pixels, source, weight, weight_at, taps, depth, first_at, second_at, shift, first_to, second_to,
        low, high, out,
    ):  # fmt: skip
        storage, result = source.dtype, out.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(weight.dtype)
            stored, written = (data_of(context, builder, signature, args, which).type.pointee for which in (1, 13))
            lanes, compute = lanes_of(element), weight.dtype
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                pixels, weight, taps, depth, shift, low, high, *places = arguments
                sources, targets = places[:units], places[units : 2 * units]
                unit_size = builder.mul(builder.mul(taps, depth), i64(lanes))
                filters = [builder.gep(weight, [builder.mul(unit_size, i64(u))]) for u in range(units)]

                def address(builder, tap, i):
                    number = builder.add(builder.mul(tap, i64(STENCIL_ROWS)), i64(i))
                    return builder.load(builder.gep(pixels, [number]))

                def tap_round(builder, tap, totals):
                    rows = [at_address(builder, address(builder, tap, i), stored) for i in range(STENCIL_ROWS)]
                    rows = [builder.gep(row, [at]) for at in sources for row in rows]
                    base = builder.mul(tap, builder.mul(depth, i64(lanes)))
                    columns = [builder.gep(column, [base]) for column in filters]

                    def channel(builder, k, totals):
                        at = builder.mul(k, i64(lanes))
                        following = []
                        for u in range(units):
                            column = read(builder, columns[u], at, lanes, compute)
                            for i in range(STENCIL_ROWS):
                                value = read(builder, rows[u * STENCIL_ROWS + i], k, 1, storage)
                                value = splat(builder, value, vector)
                                following.append(call(builder, "fma", value, column, totals[len(following)]))
                        return following

                    return for_range(builder, i64(0), depth, 1, totals, channel)

                start = [read(builder, shift, to, lanes, compute) for to in targets for _ in range(STENCIL_ROWS)]
                totals = for_range(builder, i64(0), taps, 1, start, tap_round)
                least, most = (splat(builder, v, vector) for v in (low, high))
                for u in range(units):
                    for i in range(STENCIL_ROWS):
                        target = at_address(builder, address(builder, taps, i), written)
                        total = clamp(builder, totals[u * STENCIL_ROWS + i], least, most)
                        write(builder, total, target, targets[u], lanes, result)

            function = internal_function(
                builder.module,
                f"dynconv_group_{units}_{storage}_{compute}_{result}",
                [i64.as_pointer(), element.as_pointer(), i64, i64, element.as_pointer(), element, element]
                + [i64] * (2 * units),
                build,
            )
            builder.call(
                function,
                [
                    data_of(context, builder, signature, args, 0),
                    builder.gep(data_of(context, builder, signature, args, 2), [args[3]]),
                    args[4],
                    args[5],
                    data_of(context, builder, signature, args, 8),
                    args[11],
                    args[12],
                    *args[6 : 6 + units],
                    *args[9 : 9 + units],
                ],
            )
            return context.get_dummy_value()

        i = types.int64
        return types.void(pixels, source, weight, i, i, i, i, i, shift, i, i, low, high, out), codegen

    return products


_group_rows1, _group_rows2 = _group_rows(1), _group_rows(2)


@njit(inline="always")
def group_rows(pixels, source, groups, inner, outer, weight, taps, shift, low, high, out, lanes):
    """target(i)[g, f] = shift[g, f] + sum over taps and channels c of weight[g, tap, c, f] * pixel(tap, i)[g, c].

    No less than low and no more than high, for i < STENCIL_ROWS, `groups` groups g of `inner` channels and `outer`
    filters. Addresses and types as in `stencil_rows`; `weight` is packed in panels of one vector of filters. Up to
    lanes - 1 elements past a target's last filter are written, and as many of `shift` read.
    """
    panels = (outer + lanes - 1) // lanes
    size, units = taps * inner * lanes, groups * panels
    for unit in range(0, units - 1, 2):
        other = unit + 1
        _group_rows2(
            pixels, source, weight, unit * size, taps, inner, unit // panels * inner, other // panels * inner,
            shift, unit // panels * outer + unit % panels * lanes, other // panels * outer + other % panels * lanes,
            low, high, out,
        )  # fmt: skip
    if units % 2 != 0:
        unit = units - 1
        to = unit // panels * outer + unit % panels * lanes
        at = unit // panels * inner
        _group_rows1(pixels, source, weight, unit * size, taps, inner, at, at, shift, to, to, low, high, out)


def _stencil_weight(tap_count: int):
    @intrinsic
    def products(typingctx, table, entry, taps, source, channel, stride, zeros, grad, grad_at, rows, channels, out, at):
        storage = source.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(out.dtype)
            stored = data_of(context, builder, signature, args, 3).type
            lanes, compute = lanes_of(element), out.dtype

            def build(builder, arguments):
                table, taps, source, stride, zeros, grad, rows, channels, out = arguments

                def strip(vectors, lanes):
                    def round_(builder, at, values):
                        places = [
                            builder.add(builder.add(at, builder.mul(channels, i64(t))), i64(v * lanes))
                            for t in range(tap_count)
                            for v in range(vectors)
                        ]
                        totals = [read(builder, out, place, lanes, compute) for place in places]

                        def site(builder, m, totals):
                            row = builder.add(builder.mul(m, stride), at)
                            grads = [
                                read(builder, grad, builder.add(row, i64(v * lanes)), lanes, compute)
                                for v in range(vectors)
                            ]
                            following = []
                            for t in range(tap_count):
                                entry = builder.add(builder.mul(m, taps), i64(t))
                                pixel = builder.sext(builder.load(builder.gep(table, [entry])), i64)
                                inside = builder.gep(source, [builder.mul(pixel, stride)])
                                outside = builder.icmp_signed("<", pixel, i64(0))
                                pixels = builder.select(outside, zeros, inside)
                                for v in range(vectors):
                                    value = read(builder, pixels, builder.add(at, i64(v * lanes)), lanes, storage)
                                    following.append(call(builder, "fma", grads[v], value, totals[len(following)]))
                            return following

                        for place, total in zip(places, for_range(builder, i64(0), rows, 1, totals, site), strict=True):
                            write(builder, total, out, place, lanes, compute)
                        return []

                    return round_

                begin = i64(0)
                for vectors, width in ((STENCIL_WEIGHT_VECTORS, lanes), (1, lanes), (1, 1)):
                    end = builder.and_(channels, i64(-vectors * width))
                    for_range(builder, begin, end, vectors * width, [], strip(vectors, width))
                    begin = end

            number = ir.IntType(32).as_pointer()
            function = internal_function(
                builder.module,
                f"dynconv_stencil_weight_{tap_count}_{storage}_{out.dtype}",
                [number, i64, stored, i64, stored, element.as_pointer(), i64, i64, element.as_pointer()],
                build,
            )
            builder.call(
                function,
                [
                    builder.gep(data_of(context, builder, signature, args, 0), [args[1]]),
                    args[2],
                    builder.gep(data_of(context, builder, signature, args, 3), [args[4]]),
                    args[5],
                    data_of(context, builder, signature, args, 6),
                    builder.gep(data_of(context, builder, signature, args, 7), [args[8]]),
                    args[9],
                    args[10],
                    builder.gep(data_of(context, builder, signature, args, 11), [args[12]]),
                ],
            )
            return context.get_dummy_value()

        i = types.int64
        return types.void(table, i, i, source, i, i, zeros, grad, i, i, i, out, i), codegen

    return products


_stencil_weight1, _stencil_weight3 = _stencil_weight(1), _stencil_weight(STENCIL_TAPS)


@njit(inline="always")
def stencil_weight(
    tap_count, table, entry, taps, source, channel, stride, zeros, grad, grad_at, rows, channels, out, at
):
    """out[at + t * channels + c] += sum over m < rows of grad[m, c] * pixel(m, t)[c], for t < tap_count, 1 or 3.

    pixel(m, t) is the row table[entry + m * taps + t] of `source` from its channel `channel` on, `zeros` where that
    is -1; rows of `source` and `grad` are `stride` apart. `grad` and `out` are in the compute type.
    """
    if tap_count == 3:
        _stencil_weight3(table, entry, taps, source, channel, stride, zeros, grad, grad_at, rows, channels, out, at)
    else:
        _stencil_weight1(table, entry, taps, source, channel, stride, zeros, grad, grad_at, rows, channels, out, at)


def _group_weight(channels: int):
    @intrinsic
    def products(typingctx, table, taps, source, channel, stride, zeros, grad, grad_at, grad_stride, rows, out, at):
        storage = source.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(out.dtype)
            stored = data_of(context, builder, signature, args, 2).type
            lanes, compute = lanes_of(element), out.dtype
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                table, taps, source, stride, zeros, grad, grad_stride, rows, out = arguments

                def site(builder, m, totals):
                    slope = read(builder, grad, builder.mul(m, grad_stride), lanes, compute)
                    pixel = builder.sext(builder.load(builder.gep(table, [builder.mul(m, taps)])), i64)
                    inside = builder.gep(source, [builder.mul(pixel, stride)])
                    row = builder.select(builder.icmp_signed("<", pixel, i64(0)), zeros, inside)
                    values = [splat(builder, read(builder, row, i64(c), 1, storage), vector) for c in range(channels)]
                    return [call(builder, "fma", v, slope, total) for v, total in zip(values, totals, strict=True)]

                start = [ir.Constant(vector, [0.0] * lanes)] * channels
                for c, total in enumerate(for_range(builder, i64(0), rows, 1, start, site)):
                    place = i64(c * lanes)
                    total = builder.fadd(total, read(builder, out, place, lanes, compute))
                    write(builder, total, out, place, lanes, compute)

            number = ir.IntType(32).as_pointer()
            function = internal_function(
                builder.module,
                f"dynconv_group_weight_{channels}_{storage}_{out.dtype}",
                [number, i64, stored, i64, stored, element.as_pointer(), i64, i64, element.as_pointer()],
                build,
            )
            builder.call(
                function,
                [
                    data_of(context, builder, signature, args, 0),
                    args[1],
                    builder.gep(data_of(context, builder, signature, args, 2), [args[3]]),
                    args[4],
                    data_of(context, builder, signature, args, 5),
                    builder.gep(data_of(context, builder, signature, args, 6), [args[7]]),
                    args[8],
                    args[9],
                    builder.gep(data_of(context, builder, signature, args, 10), [args[11]]),
                ],
            )
            return context.get_dummy_value()

        i = types.int64
        return types.void(table, i, source, i, i, zeros, grad, i, i, i, out, i), codegen

    return products


_group_weight1, _group_weight4, _group_weight8 = (_group_weight(channels) for channels in (1, 4, 8))


@njit(inline="always")
def group_weight(
    table, taps, source, channel, channels, stride, zeros, grad, grad_at, grad_stride, rows, out, at, lanes
):
    """out[at:] [c, lane] += sum over m < rows of pixel(m)[channel + c] * grad[m, lane], for `channels` channels c.

    pixel(m) is the row table[m * taps] of `source`, rows of `stride` elements, or `zeros` where that is -1; grad[m]
    lies at grad_at + m * grad_stride. Each call's own sum begins at zero.
    """
    c = 0
    while c < channels:
        width = 8 if channels - c >= 8 else 4 if channels - c >= 4 else 1
        first, target = channel + c, at + c * lanes
        if width == 8:
            _group_weight8(table, taps, source, first, stride, zeros, grad, grad_at, grad_stride, rows, out, target)
        elif width == 4:
            _group_weight4(table, taps, source, first, stride, zeros, grad, grad_at, grad_stride, rows, out, target)
        else:
            _group_weight1(table, taps, source, first, stride, zeros, grad, grad_at, grad_stride, rows, out, target)
        c += width
