"""Samples between the pixels of an input: where they lie, their sums, and the gradients of both."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .build import (
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
    read,
    read_some,
    splat,
    transposed_sum,
    write,
    write_some,
)

CORNERS = 4


SHARES = CORNERS + 4  # what `locate` writes down of a tap


def _locate(has_targets: bool):
    @intrinsic
    def locate(
        typingctx, tables, shifts, room, count, y, x, height, width, channels, offsets, scales, at, has_scales, base,
        outside, target_base, target_outside, pixels, targets, shares,
    ):  # fmt: skip
        storage, compute = offsets.dtype, tables.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(compute)
            stored = data_of(context, builder, signature, args, 9).type.pointee
            lanes, i32 = lanes_of(element), ir.IntType(32)
            vector, rows, wide = (ir.VectorType(kind, lanes) for kind in (element, i32, i64))

            def build(builder, arguments):
                (tables, shifts, room, count, y, x, height, width, channels, offsets, scales, has_scales, base, outside,
                 target_base, target_outside, pixels, targets, shares) = arguments  # fmt: skip
                one, zero = constant(vector, 1.0), constant(vector, 0.0)
                begin = [splat(builder, v, vector) for v in (y, x)]
                size = [splat(builder, builder.sitofp(v, element), vector) for v in (height, width)]
                columns = splat(builder, builder.trunc(width, i32), rows)
                of_row = splat(builder, builder.sext(builder.trunc(channels, i32), i64), wide)
                steps = {0: i64(0), 1: channels, 2: builder.mul(channels, width)}
                steps[3] = builder.add(steps[1], steps[2])
                has_scales = builder.icmp_signed("!=", has_scales, i64(0))
                ends = [(base, outside, storage, pixels)]
                ends += [(target_base, target_outside, compute, targets)] if has_targets else []

                def tap_offsets(builder, t, some):
                    """The dy and the dx of a vector of taps, which lie in pairs."""
                    halves = [
                        read_some(builder, offsets, at, lanes, storage, mask)
                        for at, mask in _halves(builder, count, t, some, lanes)
                    ]
                    return _apart(builder, *halves)

                def vector_of_taps(builder, t, some):
                    place = lambda which: builder.add(t, builder.mul(room, i64(which)))
                    positions = []
                    for axis, step in enumerate(tap_offsets(builder, t, some)):
                        tap = builder.fadd(begin[axis], read(builder, tables, place(axis), lanes, compute))
                        positions.append(builder.fadd(tap, step))
                    inside = constant(ir.VectorType(ir.IntType(1), lanes), 1)
                    for value, most in zip(positions, size):  # false for NaN
                        inside = builder.and_(inside, builder.fcmp_ordered(">", value, constant(vector, -1.0)))
                        inside = builder.and_(inside, builder.fcmp_ordered("<", value, most))
                    positions = [builder.select(inside, value, zero) for value in positions]
                    first = [call(builder, "floor", value) for value in positions]
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
                    scale = read_some(builder, scales, t, lanes, storage, some)
                    scale = builder.select(has_scales, scale, one)
                    for k in range(CORNERS):
                        down, right = divmod(k, 2)
                        valid = builder.and_(is_in[0][down], is_in[1][right])
                        for start, nowhere, kind, addresses in ends:
                            bytes_ = kind.bitwidth // 8
                            shift = constant(wide, bytes_.bit_length() - 1)
                            corner_base = builder.add(start, builder.mul(steps[k], i64(bytes_)))
                            address = builder.add(splat(builder, corner_base, wide), builder.shl(corner, shift))
                            address = builder.select(valid, address, splat(builder, nowhere, wide))
                            target = builder.bitcast(builder.gep(addresses, [place(k)]), wide.as_pointer())
                            builder.store(address, target, align=8)
                        share = builder.fmul((behind if down else before)[0], (behind if right else before)[1])
                        write(builder, builder.fmul(scale, share), shares, place(k), lanes, compute)
                    kept = (*behind, builder.select(inside, one, zero), scale)  # inside: one of the pixels at least
                    for which, value in enumerate(kept, CORNERS):
                        write(builder, value, shares, place(which), lanes, compute)

                for_vectors(builder, count, lanes, vector_of_taps)

            pointer, places = element.as_pointer(), i64.as_pointer()
            function = internal_function(
                builder.module,
                f"dynconv_locate{'_targets' * has_targets}_{storage}_{compute}",
                [pointer, places, i64, i64, element, element, *[i64] * 3, *[stored.as_pointer()] * 2, *[i64] * 5,
                 places, places, pointer],
                build,
            )  # fmt: skip
            data = lambda which: data_of(context, builder, signature, args, which)
            from_site = [builder.gep(data(9), [builder.mul(args[11], i64(2))]), builder.gep(data(10), [args[11]])]
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
    """(place, mask or None) of the two vectors in which the pairs of a vector of taps lie; see `for_vectors`."""
    i32, found = ir.IntType(32), []
    for begin in (0, lanes):
        mask = None
        if some is not None:
            kind = ir.VectorType(i32, lanes)
            left = splat(builder, builder.mul(builder.trunc(builder.sub(count, t), i32), i32(2)), kind)
            mask = builder.icmp_signed("<", ir.Constant(kind, list(range(begin, begin + lanes))), left)
        found.append((builder.add(builder.mul(t, i64(2)), i64(begin)), mask))
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
    kind = ir.VectorType(i64, lanes)
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

    for_range(builder, i64(0), groups, 1, [], group_round)


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
            stored, written = (data_of(context, builder, signature, args, which).type.pointee for which in (5, 9))

            def build(builder, arguments):
                groups, taps, room, pixels, shares, inner, target, step = arguments
                size = i64(result.bitwidth // 8)

                def of_group(builder, group, first):
                    start = builder.add(target, builder.mul(builder.mul(group, inner), size))

                    def strip(builder, channel, vectors, lanes):
                        zero = constant(element if lanes == 1 else ir.VectorType(element, lanes), 0.0)

                        def tap(builder, t, totals):
                            following = []
                            for k in range(CORNERS):
                                at = builder.add(builder.add(first, t), builder.mul(room, i64(k)))
                                row = at_address(builder, builder.load(builder.gep(pixels, [at])), stored)
                                share = read(builder, shares, at, 1, compute)
                                share = share if lanes == 1 else splat(builder, share, zero.type)
                                for v in range(vectors):
                                    value = read(builder, row, builder.add(channel, i64(v * lanes)), lanes, storage)
                                    following.append(call(builder, "fma", share, value, totals[k * vectors + v]))
                            if is_sum:
                                return following
                            write_totals(builder, following, builder.add(start, builder.mul(step, t)))
                            return []

                        def write_totals(builder, totals, place):
                            row = at_address(builder, place, written)
                            for v in range(vectors):
                                upper, lower = (
                                    builder.fadd(totals[k * vectors + v], totals[(k + 1) * vectors + v]) for k in (0, 2)
                                )
                                at = builder.add(channel, i64(v * lanes))
                                write(builder, builder.fadd(upper, lower), row, at, lanes, result)

                        zeros = [zero] * (CORNERS * vectors)
                        if is_sum:  # four sums, one for each corner: a single one would wait for itself
                            write_totals(builder, for_range(builder, i64(0), taps, 1, zeros, tap), start)
                        else:
                            for_range(builder, i64(0), taps, 1, [], lambda builder, t, nothing: tap(builder, t, zeros))

                    for_strips(builder, inner, lanes_of(element), strip)

                _for_groups(builder, groups, taps, of_group)

            function = internal_function(
                builder.module,
                f"dynconv_sample_{'sum' if is_sum else 'columns'}_{storage}_{compute}_{result}",
                [i64, i64, i64, i64.as_pointer(), element.as_pointer(), i64, i64, i64],
                build,
            )
            data = lambda which: data_of(context, builder, signature, args, which)
            builder.call(function, [*args[:3], data(3), data(4), *args[6:9]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(i, i, i, pixels, shares, source, i, i, i, out), codegen

    return sample


sample_sum, sample_columns = _sample(True), _sample(False)


@intrinsic
def scatter(typingctx, groups, taps, room, targets, shares, row, group_step, tap_step, count):
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
                    places = [builder.add(channel, i64(v * lanes)) for v in range(vectors)]

                    def tap(builder, t, nothing):
                        given = at_address(builder, builder.add(start, builder.mul(tap_step, t)), element)
                        values = [read(builder, given, place, lanes, compute) for place in places]
                        for k in range(CORNERS):
                            at = builder.add(builder.add(first, t), builder.mul(room, i64(k)))
                            target = at_address(builder, builder.load(builder.gep(targets, [at])), element)
                            share = read(builder, shares, at, 1, compute)
                            share = share if lanes == 1 else splat(builder, share, kind)
                            for value, place in zip(values, places):
                                total = read(builder, target, place, lanes, compute)
                                total = call(builder, "fma", share, value, total)
                                write(builder, total, target, place, lanes, compute)
                        return []

                    for_range(builder, i64(0), taps, 1, [], tap)

                for_strips(builder, count, lanes_of(element), strip)

            _for_groups(builder, groups, taps, of_group)

        function = internal_function(
            builder.module,
            f"dynconv_scatter_{compute}",
            [i64, i64, i64, i64.as_pointer(), element.as_pointer(), *[i64] * 4],
            build,
        )
        data = lambda which: data_of(context, builder, signature, args, which)
        builder.call(function, [*args[:3], data(3), data(4), *args[5:9]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, targets, shares, i, i, i, i), codegen


@intrinsic
def corner_dots(typingctx, groups, taps, room, pixels, source, row, group_step, tap_step, inner, dots):
    """dots[4 * t + k] = the dot of the row at pixels[k * room + t] with that of the tap's gradient, see `scatter`."""
    storage, compute = source.dtype, dots.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)
        stored = data_of(context, builder, signature, args, 4).type.pointee
        lanes = lanes_of(element)
        zero = constant(ir.VectorType(element, lanes), 0.0)

        def build(builder, arguments):
            groups, taps, room, pixels, row, group_step, tap_step, inner, dots = arguments

            def of_group(builder, group, first):
                start = builder.add(row, builder.mul(group_step, group))

                def block(builder, t, count):
                    """Write, of `count` taps, the dots: a vector of partial sums for each of their corners."""
                    taps_of = [builder.add(t, i64(j)) for j in range(count)]
                    rows = [
                        at_address(builder, builder.add(start, builder.mul(tap_step, tap)), element) for tap in taps_of
                    ]
                    entries = [
                        builder.add(builder.add(first, tap), builder.mul(room, i64(k)))
                        for tap in taps_of
                        for k in range(CORNERS)
                    ]
                    corners = [at_address(builder, builder.load(builder.gep(pixels, [at])), stored) for at in entries]

                    def products(builder, at, totals, some):
                        grads = [read_some(builder, given, at, lanes, compute, some) for given in rows]
                        return [
                            call(
                                builder, "fma", read_some(builder, corner, at, lanes, storage, some),
                                grads[i // CORNERS], totals[i],
                            )
                            for i, corner in enumerate(corners)
                        ]  # fmt: skip

                    totals = carry_vectors(builder, inner, lanes, [zero] * len(corners), products)
                    place = builder.mul(builder.add(first, t), i64(CORNERS))
                    for i in range(0, len(totals), lanes):
                        some = totals[i : i + lanes]
                        at = builder.add(place, i64(i))
                        write(builder, transposed_sum(builder, some), dots, at, len(some), compute)

                together = max(1, lanes // CORNERS)  # taps whose dots fill a vector
                begin = i64(0)
                for count in (together, 1) if together > 1 else (1,):
                    end = builder.sub(taps, builder.and_(taps, i64(count - 1)))

                    def some_taps(builder, t, nothing, count=count):
                        block(builder, t, count)
                        return []

                    for_range(builder, begin, end, count, [], some_taps)
                    begin = end

            _for_groups(builder, groups, taps, of_group)

        function = internal_function(
            builder.module,
            f"dynconv_corner_dots_{storage}_{compute}",
            [i64, i64, i64, i64.as_pointer(), *[i64] * 4, element.as_pointer()],
            build,
        )
        data = lambda which: data_of(context, builder, signature, args, which)
        builder.call(function, [*args[:3], data(3), *args[5:9], data(9)])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, i, pixels, source, i, i, i, i, dots), codegen


@intrinsic
def position_grads(typingctx, count, room, shares, dots, at, grad_offsets, has_offsets, grad_scales, has_scales):
    """The gradients of the offset pairs and the scales `at` + t, from what `locate` and `corner_dots` have left."""
    storage, compute = grad_offsets.dtype, shares.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(compute)
        stored = data_of(context, builder, signature, args, 5).type.pointee
        lanes = lanes_of(element)
        vector = ir.VectorType(element, lanes)
        zero, one = constant(vector, 0.0), constant(vector, 1.0)

        def build(builder, arguments):
            count, room, shares, dots, offsets, has_offsets, scales, has_scales = arguments

            def vector_of_taps(builder, t, some):
                place = lambda which: builder.add(t, builder.mul(room, i64(which)))
                kept = [read(builder, shares, place(CORNERS + which), lanes, compute) for which in range(4)]
                below, right, is_read, scale = kept
                first = builder.mul(t, i64(CORNERS))
                quarters = [
                    read(builder, dots, builder.add(first, i64(q * lanes)), lanes, compute) for q in range(CORNERS)
                ]
                evens, odds = zip(*(_apart(builder, *quarters[q : q + 2]) for q in (0, 2)))
                (d0, d2), (d1, d3) = _apart(builder, *evens), _apart(builder, *odds)
                above, before = builder.fsub(one, below), builder.fsub(one, right)
                mix = lambda p, x, q, y: call(builder, "fma", p, x, builder.fmul(q, y))
                upper, lower = mix(before, d0, right, d1), mix(before, d2, right, d3)
                with builder.if_then(builder.icmp_signed("!=", has_offsets, i64(0))):
                    across = mix(above, builder.fsub(d1, d0), below, builder.fsub(d3, d2))
                    # Where nothing is read there is no gradient, even if the scale is NaN.
                    reads = builder.fcmp_ordered(">", is_read, zero)
                    pair = [
                        builder.select(reads, builder.fmul(scale, slope), zero)
                        for slope in (builder.fsub(lower, upper), across)
                    ]
                    halves = zip(_together(builder, *pair), _halves(builder, count, t, some, lanes))
                    for value, (at, mask) in halves:
                        write_some(builder, value, offsets, at, lanes, storage, mask)
                with builder.if_then(builder.icmp_signed("!=", has_scales, i64(0))):
                    write_some(builder, mix(above, upper, below, lower), scales, t, lanes, storage, some)

            for_vectors(builder, count, lanes, vector_of_taps)

        pointer, of_storage = element.as_pointer(), stored.as_pointer()
        function = internal_function(
            builder.module,
            f"dynconv_position_grads_{storage}_{compute}",
            [i64, i64, pointer, pointer, of_storage, i64, of_storage, i64],
            build,
        )
        data = lambda which: data_of(context, builder, signature, args, which)
        offsets = builder.gep(data(5), [builder.mul(args[4], i64(2))])
        scales = builder.gep(data(7), [args[4]])
        builder.call(function, [args[0], args[1], data(2), data(3), offsets, args[6], scales, args[8]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, i, shares, dots, i, grad_offsets, i, grad_scales, i), codegen
