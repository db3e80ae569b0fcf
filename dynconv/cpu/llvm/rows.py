"""Dot products and sums of rows of a matrix that an index lists, over blocks of their columns."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .build import (
    call,
    data_of,
    for_range,
    i64,
    int32_at,
    internal_function,
    lanes_of,
    read,
    splat,
    sum_lanes,
    write,
)

# Rows that a dot product takes at a time, and vectors of one row that it adds up side by side: 8 accumulators in all.
DOT_ROWS, DOT_VECTORS = 4, 2


SUMMED_VECTORS = 8  # vectors whose sums over rows are held in registers


def _dot_rows(row_count: int):
    @intrinsic
    def products(typingctx, rows, rows_at, row, index, index_at, values, values_at, blocks, blocks_at, number, out, at):
        storage = rows.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(out.dtype)
            stored = data_of(context, builder, signature, args, 0).type
            lanes, compute = lanes_of(element), out.dtype
            zero = ir.Constant(ir.VectorType(element, lanes), [0.0] * lanes)

            def build(builder, arguments):
                rows, row, index, values, blocks, number, out = arguments
                starts = [
                    builder.gep(rows, [builder.mul(int32_at(builder, index, i64(i)), row)]) for i in range(row_count)
                ]

                def vectors(count):
                    def round_(builder, at, totals):
                        following = []
                        for v in range(count):
                            block = int32_at(builder, blocks, builder.add(at, i64(v)))
                            value = read(builder, values, block, lanes, compute)
                            for start in starts:
                                factor = read(builder, start, block, lanes, storage)
                                following.append(call(builder, "fma", factor, value, totals[len(following)]))
                        return following

                    return round_

                whole = builder.and_(number, i64(-DOT_VECTORS))
                totals = for_range(
                    builder, i64(0), whole, DOT_VECTORS, [zero] * (DOT_VECTORS * row_count), vectors(DOT_VECTORS)
                )
                totals[:row_count] = for_range(builder, whole, number, 1, totals[:row_count], vectors(1))
                for i in range(row_count):
                    total = totals[i]
                    for v in range(1, DOT_VECTORS):
                        total = builder.fadd(total, totals[v * row_count + i])
                    before = read(builder, out, i64(i), 1, compute)
                    write(builder, builder.fadd(before, sum_lanes(builder, total)), out, i64(i), 1, compute)

            number_type = ir.IntType(32).as_pointer()
            function = internal_function(
                builder.module,
                f"dynconv_dot_rows_{row_count}_{storage}_{out.dtype}",
                [stored, i64, number_type, element.as_pointer(), number_type, i64, element.as_pointer()],
                build,
            )
            at = lambda which: builder.gep(data_of(context, builder, signature, args, which), [args[which + 1]])
            builder.call(function, [at(0), args[2], at(3), at(5), at(7), args[9], at(10)])
            return context.get_dummy_value()

        i = types.int64
        return types.void(rows, i, i, index, i, values, i, blocks, i, i, out, i), codegen

    return products


_dot_rows1, _dot_rows2, _dot_rows4 = (_dot_rows(count) for count in (1, 2, DOT_ROWS))


@njit(inline="always")
def dot_rows(rows, rows_at, row, index, index_at, count, values, values_at, blocks, blocks_at, number, out, at):
    """out[at + i] += rows[index[i]] . values for i < count, over the `number` vectors that begin at the `blocks`.

    Rows are `row` elements apart; `values` and `out` are in the compute type, `index` and `blocks` int32, from the
    offsets given. The order of a row's sum depends on the blocks alone.
    """
    i = 0
    while i < count:
        if count - i >= 4:
            _dot_rows4(
                rows, rows_at, row, index, index_at + i, values, values_at, blocks, blocks_at, number, out, at + i
            )
            i += 4
        elif count - i >= 2:
            _dot_rows2(
                rows, rows_at, row, index, index_at + i, values, values_at, blocks, blocks_at, number, out, at + i
            )
            i += 2
        else:
            _dot_rows1(
                rows, rows_at, row, index, index_at + i, values, values_at, blocks, blocks_at, number, out, at + i
            )
            i += 1


def _add_row_products(vector_count: int):
    @intrinsic
    def products(
        typingctx, scales, scales_at, step, index, index_at, count, rows, rows_at, row, blocks, blocks_at, out, at,
        accumulate,
    ):  # fmt: skip
        def codegen(context, builder, signature, args):
            element = context.get_value_type(out.dtype)
            scaling, stored = (data_of(context, builder, signature, args, which).type for which in (0, 6))
            lanes, compute = lanes_of(element), out.dtype
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                scales, step, index, count, rows, row, blocks, out, accumulate = arguments
                places = [int32_at(builder, blocks, i64(v)) for v in range(vector_count)]
                before = builder.block
                with builder.if_then(accumulate):
                    totals = [read(builder, out, place, lanes, compute) for place in places]
                    inside = builder.block
                sums = [builder.phi(vector) for _ in places]
                for phi, total in zip(sums, totals, strict=True):
                    phi.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
                    phi.add_incoming(total, inside)

                def round_(builder, j, sums):
                    at = int32_at(builder, index, j)
                    scale = read(builder, scales, builder.mul(at, step), 1, signature.args[0].dtype)
                    scale, start = splat(builder, scale, vector), builder.gep(rows, [builder.mul(at, row)])
                    values = [read(builder, start, place, lanes, signature.args[6].dtype) for place in places]
                    return [call(builder, "fma", v, scale, total) for v, total in zip(values, sums, strict=True)]

                for place, total in zip(places, for_range(builder, i64(0), count, 1, sums, round_), strict=True):
                    write(builder, total, out, place, lanes, compute)

            number_type, flag = ir.IntType(32).as_pointer(), ir.IntType(1)
            function = internal_function(
                builder.module,
                f"dynconv_add_row_products_{vector_count}_{scales.dtype}_{rows.dtype}_{out.dtype}",
                [scaling, i64, number_type, i64, stored, i64, number_type, element.as_pointer(), flag],
                build,
            )
            at = lambda which: builder.gep(data_of(context, builder, signature, args, which), [args[which + 1]])
            operands = [at(0), args[2], at(3), args[5], at(6), args[8], at(9), at(11), args[13]]
            builder.call(function, operands)
            return context.get_dummy_value()

        i = types.int64
        return types.void(scales, i, i, index, i, i, rows, i, i, blocks, i, out, i, types.boolean), codegen

    return products


_add_row_products1, _add_row_products2, _add_row_products4, _add_row_products8 = (
    _add_row_products(count) for count in (1, 2, 4, SUMMED_VECTORS)
)


@njit(inline="always")
def add_row_products(
    scales, scales_at, step, index, index_at, count, rows, rows_at, row, blocks, blocks_at, number, out, at, accumulate
):
    """out[b] (+)= sum over j < count of scales[index[j] * step] * rows[index[j]][b], for each of `number` vectors b.

    The vectors begin at the `blocks`, rows are `row` elements apart; `out` is in the compute type, `index` and
    `blocks` int32, all from the offsets given. The order of the sum is that of `index`.
    """
    b = 0
    while b < number:
        if number - b >= 8:
            _add_row_products8(
                scales, scales_at, step, index, index_at, count, rows, rows_at, row, blocks, blocks_at + b, out, at,
                accumulate,
            )  # fmt: skip
            b += 8
        elif number - b >= 4:
            _add_row_products4(
                scales, scales_at, step, index, index_at, count, rows, rows_at, row, blocks, blocks_at + b, out, at,
                accumulate,
            )  # fmt: skip
            b += 4
        elif number - b >= 2:
            _add_row_products2(
                scales, scales_at, step, index, index_at, count, rows, rows_at, row, blocks, blocks_at + b, out, at,
                accumulate,
            )  # fmt: skip
            b += 2
        else:
            _add_row_products1(
                scales, scales_at, step, index, index_at, count, rows, rows_at, row, blocks, blocks_at + b, out, at,
                accumulate,
            )  # fmt: skip
            b += 1
