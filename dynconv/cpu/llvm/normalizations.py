"""Normalisations of filters, and their gradients."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .activations import exp, sigmoid
from .build import (
    call,
    carry_vectors,
    constant,
    data_of,
    for_range,
    i64,
    internal_function,
    lanes_of,
    read_some,
    splat,
    sum_lanes,
    write_some,
)

NORMALIZATIONS = ("none", "softmax", "sigmoid", "l2")


LEAST_NORM = 1e-12  # F.normalize's: a filter of zeros stays one


def _normalise_groups(name: str):
    @intrinsic
    def groups(typingctx, filters, at, count, taps, out, out_at):
        storage, compute = filters.dtype, out.dtype

        def codegen(context, builder, signature, args):
            element, lanes = context.get_value_type(compute), lanes_of(context.get_value_type(compute))
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                filters, count, taps, out = arguments
                zero = constant(vector, 0.0)

                def group(builder, number, values):
                    first = builder.mul(number, taps)
                    place = lambda builder, at: builder.add(first, at)

                    def mapped(source, kind, carried, change):
                        """out = change(source), carrying a sum of what is written."""

                        def round_(builder, at, totals, some):
                            value = read_some(builder, source, place(builder, at), lanes, kind, some)
                            value = change(builder, value)
                            write_some(builder, value, out, place(builder, at), lanes, compute, some)
                            if some is not None:
                                value = builder.select(some, value, zero)
                            return [builder.fadd(total, value) for total in totals]

                        return carry_vectors(builder, taps, lanes, carried, round_)

                    if name == "none":
                        mapped(filters, storage, [], lambda builder, x: x)
                    elif name == "sigmoid":
                        mapped(filters, storage, [], sigmoid)
                    elif name == "softmax":

                        def largest(builder, at, most, some):
                            value = read_some(builder, filters, place(builder, at), lanes, storage, some)
                            larger = builder.fcmp_ordered(">", value, most[0])
                            larger = larger if some is None else builder.and_(larger, some)
                            return [builder.select(larger, value, most[0])]

                        lowest = constant(vector, float("-inf"))
                        (most,) = carry_vectors(builder, taps, lanes, [lowest], largest)
                        peak = builder.extract_element(most, ir.IntType(32)(0))
                        for lane in range(1, lanes):
                            other = builder.extract_element(most, ir.IntType(32)(lane))
                            peak = builder.select(builder.fcmp_ordered(">", other, peak), other, peak)
                        peak = splat(builder, peak, vector)

                        def power(builder, x):
                            x = builder.fsub(x, peak)
                            # exp stops at exp(-87): a tap of -inf weighs nothing.
                            return builder.select(
                                builder.fcmp_ordered("<", x, constant(vector, -87.0)), zero, exp(builder, x)
                            )

                        (total,) = mapped(filters, storage, [zero], power)
                        share = builder.fdiv(ir.Constant(element, 1.0), sum_lanes(builder, total))
                        share = splat(builder, share, vector)
                        mapped(out, compute, [], lambda builder, x: builder.fmul(x, share))
                    else:
                        norm = _norm(builder, filters, first, taps, lanes, storage, vector)
                        norm = splat(builder, norm, vector)
                        mapped(filters, storage, [], lambda builder, x: builder.fdiv(x, norm))
                    return []

                for_range(builder, i64(0), count, 1, [], group)

            data = [data_of(context, builder, signature, args, which) for which in (0, 4)]
            function = internal_function(
                builder.module,
                f"dynconv_normalise_{name}_{storage}_{compute}",
                [data[0].type, i64, i64, data[1].type],
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
        value = read_some(builder, filters, builder.add(first, at), lanes, storage, some)
        return [call(builder, "fma", value, value, totals[0])]

    (total,) = carry_vectors(builder, taps, lanes, [constant(vector, 0.0)], squares)
    norm, least = call(builder, "sqrt", sum_lanes(builder, total)), ir.Constant(vector.element, LEAST_NORM)
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
            element, lanes = context.get_value_type(compute), lanes_of(context.get_value_type(compute))
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                grads, weights, filters, count, taps = arguments
                one = constant(vector, 1.0)

                def group(builder, number, values):
                    first = builder.mul(number, taps)

                    def both(builder, at, some):
                        place = builder.add(first, at)
                        return [read_some(builder, v, place, lanes, compute, some) for v in (grads, weights)]

                    def projected(builder, at, totals, some):
                        return [call(builder, "fma", *both(builder, at, some), totals[0])]

                    dot = norm = None
                    if name in ("softmax", "l2"):
                        (total,) = carry_vectors(builder, taps, lanes, [constant(vector, 0.0)], projected)
                        dot = splat(builder, sum_lanes(builder, total), vector)
                    if name == "l2":
                        norm = _norm(builder, filters, first, taps, lanes, storage, vector)
                        # Below it the norm is a constant.
                        is_least = builder.fcmp_ordered("<=", norm, ir.Constant(element, LEAST_NORM))
                        dot = builder.select(is_least, constant(vector, 0.0), dot)
                        norm = splat(builder, norm, vector)

                    def change(builder, at, values, some):
                        grad, weight = both(builder, at, some)
                        if name == "softmax":
                            result = builder.fmul(weight, builder.fsub(grad, dot))
                        elif name == "sigmoid":
                            result = builder.fmul(grad, builder.fmul(weight, builder.fsub(one, weight)))
                        else:
                            result = builder.fdiv(builder.fsub(grad, builder.fmul(weight, dot)), norm)
                        write_some(builder, result, grads, builder.add(first, at), lanes, compute, some)
                        return []

                    carry_vectors(builder, taps, lanes, [], change)
                    return []

                for_range(builder, i64(0), count, 1, [], group)

            data = [data_of(context, builder, signature, args, which) for which in (0, 2, 4)]
            function = internal_function(
                builder.module,
                f"dynconv_normalise_grad_{name}_{storage}_{compute}",
                [*(d.type for d in data), i64, i64],
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
