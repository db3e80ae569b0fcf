"""Activations and their derivatives, and the epilogue of a row that ends with one."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .build import (
    call,
    constant,
    data_of,
    for_channels,
    for_vectors,
    i64,
    internal_function,
    lanes_of,
    like,
    nullable,
    read,
    read_some,
    splat,
    write,
    write_some,
)

# Activations of the epilogue, by their numbers in the kernels.
ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "hardswish")


# Polynomials fitted at Chebyshev nodes, from the constant term up: exp(r) for |r| <= log(2) / 2 (relative error
# 1e-7), erf(z) / z in z^2 for |z| <= 1 and -log(erfc(z)) for 1 <= z <= 4 (absolute error of erf 1.5e-7).
_EXP = (1.0, 1.0, 0.50000001, 0.16666415, 0.04166622, 0.00837514, 0.00139486)


_ERF = (
    1.12837917, -0.376126385, 0.112837826, -0.0268654383, 0.00522105342, -0.000848439662, 0.000112682544,
    -0.00000967359205,
)  # fmt: skip


_LOG_ERFC = (
    7.56968621e-04, 1.12592595, 6.39093319e-01, 1.03318980e-01, -2.26219859e-02, 3.43686760e-03, -3.17572035e-04,
    1.33093904e-05,
)  # fmt: skip


def _elementwise(builder: ir.IRBuilder, name: str, x: ir.Value) -> ir.Value:
    """A function of libm on each element, for float64: exact rather than fast."""
    double = ir.DoubleType()
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(double, [double]), name)
    if not isinstance(x.type, ir.VectorType):
        return builder.call(function, [x])
    result = ir.Constant(x.type, ir.Undefined)
    for i in range(x.type.count):
        lane = ir.IntType(32)(i)
        result = builder.insert_element(result, builder.call(function, [builder.extract_element(x, lane)]), lane)
    return result


def _polynomial(builder: ir.IRBuilder, coefficients: tuple[float, ...], x: ir.Value) -> ir.Value:
    total = constant(x.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = call(builder, "fma", total, x, constant(x.type, coefficient))
    return total


def _is_double(value_type: ir.Type) -> bool:
    return isinstance(getattr(value_type, "element", value_type), ir.DoubleType)


def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x), for float32 zero below exp(-87), exp(88) from there on, and infinite where that is; NaN stays NaN."""
    if _is_double(x.type):
        return _elementwise(builder, "exp", x)
    kind, integer = x.type, like(ir.IntType(32), x.type)
    # Ordered comparisons are false for NaN. What is beyond the ends has to end there: it may be multiplied by x.
    is_low = builder.fcmp_ordered("<", x, constant(kind, -87.0))
    is_high = builder.fcmp_ordered(">", x, constant(kind, 88.722839))
    x = _between(builder, x, -87.0, 88.0)
    n = call(builder, "rint", builder.fmul(x, constant(kind, 1.4426950408889634)))
    rest = call(builder, "fma", n, constant(kind, -0.693359375), x)  # log(2) in two parts, the first exact times n
    rest = call(builder, "fma", n, constant(kind, 2.12194440054690583e-4), rest)
    exponent = builder.shl(builder.fptosi(n, integer), constant(integer, 23))
    bits = builder.bitcast(_polynomial(builder, _EXP, rest), integer)
    power = builder.bitcast(builder.add(bits, exponent), kind)
    power = builder.select(is_high, constant(kind, float("inf")), builder.select(is_low, constant(kind, 0.0), power))
    return builder.select(builder.fcmp_unordered("uno", x, x), x, power)


def _erf(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    if _is_double(x.type):
        return _elementwise(builder, "erf", x)
    kind = x.type
    magnitude = call(builder, "fabs", x)
    square = builder.fmul(x, x)
    near = builder.fmul(x, _polynomial(builder, _ERF, square))
    four = constant(kind, 4.0)  # where erf is 1 in float32
    capped = builder.select(builder.fcmp_ordered(">", magnitude, four), four, magnitude)
    tail = exp(builder, builder.fneg(_polynomial(builder, _LOG_ERFC, capped)))
    far = call(builder, "copysign", builder.fsub(constant(kind, 1.0), tail), x)
    return builder.select(builder.fcmp_ordered("<=", magnitude, constant(kind, 1.0)), near, far)


def _between(builder: ir.IRBuilder, x: ir.Value, low: float, high: float | None) -> ir.Value:
    """max(low, min(high, x)); NaN stays NaN."""
    x = builder.select(builder.fcmp_ordered("<", x, constant(x.type, low)), constant(x.type, low), x)
    if high is None:
        return x
    return builder.select(builder.fcmp_ordered(">", x, constant(x.type, high)), constant(x.type, high), x)


def sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    one = constant(x.type, 1.0)
    return builder.fdiv(one, builder.fadd(one, exp(builder, builder.fneg(x))))


def _normal(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The standard normal distribution function, (1 + erf(x / sqrt(2))) / 2."""
    scaled = builder.fmul(x, constant(x.type, 0.7071067811865476))
    return builder.fmul(constant(x.type, 0.5), builder.fadd(constant(x.type, 1.0), _erf(builder, scaled)))


def _activate(builder: ir.IRBuilder, activation: str, x: ir.Value) -> ir.Value:
    if activation == "relu":
        return _between(builder, x, 0.0, None)
    if activation == "relu6":
        return _between(builder, x, 0.0, 6.0)
    if activation == "silu":
        return builder.fmul(x, sigmoid(builder, x))
    if activation == "gelu":
        return builder.fmul(x, _normal(builder, x))
    if activation == "hardswish":
        factor = _between(builder, builder.fadd(x, constant(x.type, 3.0)), 0.0, 6.0)
        return builder.fmul(x, builder.fmul(factor, constant(x.type, 1 / 6)))
    return x


def _slope(builder: ir.IRBuilder, activation: str, x: ir.Value) -> ir.Value:
    """The activation's derivative at x, at its kinks as PyTorch has it."""
    zero, one = constant(x.type, 0.0), constant(x.type, 1.0)
    if activation in ("relu", "relu6"):
        passes = builder.fcmp_unordered(">", x, zero)
        if activation == "relu6":
            passes = builder.and_(passes, builder.fcmp_unordered("<", x, constant(x.type, 6.0)))
        return builder.select(passes, one, zero)
    if activation == "silu":
        s = sigmoid(builder, x)
        return builder.fmul(s, builder.fadd(one, builder.fmul(x, builder.fsub(one, s))))
    if activation == "gelu":
        square = builder.fmul(builder.fmul(x, x), constant(x.type, -0.5))
        density = builder.fmul(exp(builder, square), constant(x.type, 0.3989422804014327))
        return builder.fadd(_normal(builder, x), builder.fmul(x, density))
    if activation == "hardswish":
        middle = builder.fadd(builder.fmul(x, constant(x.type, 1 / 3)), constant(x.type, 0.5))
        slope = builder.select(builder.fcmp_ordered("<=", x, constant(x.type, -3.0)), zero, middle)
        return builder.select(builder.fcmp_ordered(">=", x, constant(x.type, 3.0)), one, slope)
    return one


def per_activation(builder: ir.IRBuilder, activation: ir.Value, build) -> None:
    """build(builder, name) in a branch of its own for each activation."""
    done = builder.append_basic_block()
    switch = builder.switch(activation, done)
    for number, name in enumerate(ACTIVATIONS):
        block = builder.append_basic_block()
        switch.add_case(i64(number), block)
        builder.position_at_end(block)
        build(builder, name)
        builder.branch(done)
    builder.position_at_end(done)


@intrinsic
def epilogue_row(typingctx, values, at, shift, shift_at, scale, residual, residual_at, out, out_at, count, activation):
    """out[c] = activation(scale * (values[c] + shift[c]) + residual[c]) for `count` channels c, from the offsets given.

    `values` and `shift` are in the compute type; `residual` may be an array at address 0: none. `activation` is a
    number, see ACTIVATIONS.
    """
    storage = out.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(values.dtype)
        lanes = lanes_of(element)
        stored = data_of(context, builder, signature, args, 7)

        def build(builder, arguments):
            values, shift, scale, residual, out, count, activation = arguments
            has_residual = builder.icmp_unsigned("!=", residual, ir.Constant(residual.type, None))

            def loop(builder, name):
                def body(builder, at, some):
                    compute = types.float64 if isinstance(element, ir.DoubleType) else types.float32
                    value = builder.fadd(
                        read_some(builder, values, at, lanes, compute, some),
                        read_some(builder, shift, at, lanes, compute, some),
                    )
                    value = builder.fmul(value, splat(builder, scale, value.type))
                    before = builder.block
                    with builder.if_then(has_residual):
                        sum_ = builder.fadd(value, read_some(builder, residual, at, lanes, storage, some))
                        inside = builder.block
                    merged = builder.phi(value.type)
                    merged.add_incoming(value, before)
                    merged.add_incoming(sum_, inside)
                    write_some(builder, _activate(builder, name, merged), out, at, lanes, storage, some)

                for_vectors(builder, count, lanes, body)

            per_activation(builder, activation, loop)

        compute_pointer = element.as_pointer()
        function = internal_function(
            builder.module,
            f"dynconv_epilogue_{storage}_{values.dtype}",
            [compute_pointer, compute_pointer, element, stored.type, stored.type, i64, i64],
            build,
        )
        builder.call(
            function,
            [
                builder.gep(data_of(context, builder, signature, args, 0), [args[1]]),
                builder.gep(data_of(context, builder, signature, args, 2), [args[3]]),
                args[4],
                nullable(builder, data_of(context, builder, signature, args, 5), args[6]),
                builder.gep(stored, [args[8]]),
                args[9],
                args[10],
            ],
        )
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, i, shift, i, scale, residual, i, out, i, i, i), codegen


@intrinsic
def slope_row(typingctx, values, at, grad, grad_at, count, activation):
    """values[c] = grad[c] * activation'(values[c]) for `count` channels; `grad` is in the storage type."""
    storage = grad.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(values.dtype)
        incoming = data_of(context, builder, signature, args, 2)
        compute = values.dtype

        def build(builder, arguments):
            values, grad, count, activation = arguments

            def loop(builder, name):
                def body(builder, at, width):
                    slope = _slope(builder, name, read(builder, values, at, width, compute))
                    slope = builder.fmul(slope, read(builder, grad, at, width, storage))
                    write(builder, slope, values, at, width, compute)

                for_channels(builder, count, lanes_of(element), body)

            per_activation(builder, activation, loop)

        function = internal_function(
            builder.module,
            f"dynconv_slope_{storage}_{values.dtype}",
            [element.as_pointer(), incoming.type, i64, i64],
            build,
        )
        builder.call(
            function,
            [
                builder.gep(data_of(context, builder, signature, args, 0), [args[1]]),
                builder.gep(incoming, [args[3]]),
                args[4],
                args[5],
            ],
        )
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, i, grad, i, i, i), codegen
