"""The few operations that Numba has no words for, written as LLVM intrinsics.

`multiply_tile` is the register-tiled inner product under every matrix product here, `stencil_rows` its counterpart for
depthwise filters, `finish_row` the epilogue behind both. It exists because the matrix
product that ATen offers is not the fast one everywhere: on an AMD Zen 5 MKL's `mm` runs at 0.36-0.47 of the
rate that oneDNN's convolution reaches on the same cores, this tile at 1.0-1.2 of it, and it reads gathered rows
where they lie. LLVM lowers the vectors to whatever the host has (AVX-512, AVX2, NEON).

Half types have no Numba type on the CPU; they travel as their bits: bfloat16 as `uint16`, float16 as `int16`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# What Numba compiles for, which its environment variables may have narrowed to less than the host has.
_triple, _, _features = cpu_target.target_context.codegen().magic_tuple()
# Vector width, and how many vectors of columns a tile holds beside its ROWS broadcast rows: 6 x 4 accumulators
# leave room for the operands in 32 registers, 6 x 2 in AVX2's 16.
if "+avx512f" in _features:
    VECTOR_BYTES, TILE_VECTORS = 64, 4
elif "+avx2" in _features:
    VECTOR_BYTES, TILE_VECTORS = 32, 2
elif "x86" in _triple:
    VECTOR_BYTES, TILE_VECTORS = 16, 2
else:
    VECTOR_BYTES, TILE_VECTORS = 16, 4
# Without the instructions LLVM calls a library that is not there, and takes the process down.
CONVERTS_FLOAT16 = "x86" not in _triple or "+f16c" in _features
ROWS = 6

_i64 = ir.IntType(64)


def _like(element: ir.Type, value_type: ir.Type) -> ir.Type:
    """`element`, in a vector as long as the type's if that is one."""
    return ir.VectorType(element, value_type.count) if isinstance(value_type, ir.VectorType) else element


def _constant(value_type: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(value_type, [value] * value_type.count if isinstance(value_type, ir.VectorType) else value)


@intrinsic
def pointer(typingctx, address, dtype):
    """The address as a pointer to `dtype` elements."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), codegen


@intrinsic
def fetch_add(typingctx, array, value):
    """Add `value` to the first element atomically; the element before the addition."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, args[1], "seq_cst")

    return types.int64(array, types.int64), codegen


@intrinsic
def positive(typingctx, step):
    """The step of a `range`, promised to be above zero: Numba then has no check of it left that could raise."""

    def codegen(context, builder, signature, args):
        kind, name = ir.FunctionType(ir.VoidType(), [ir.IntType(1)]), "llvm.assume"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [builder.icmp_signed(">", args[0], _i64(0))])
        return args[0]

    return types.int64(types.int64), codegen


def _widen(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """A loaded element, or a vector of them, in the type to compute in."""
    if storage == types.uint16:  # bfloat16 is the upper half of a float32
        wide = builder.zext(value, _like(ir.IntType(32), value.type))
        return builder.bitcast(builder.shl(wide, _constant(wide.type, 16)), _like(ir.FloatType(), value.type))
    if storage == types.int16:
        half = builder.bitcast(value, _like(ir.HalfType(), value.type))
        return builder.fpext(half, _like(ir.FloatType(), value.type))
    return value


def _load_vector(builder: ir.IRBuilder, address: ir.Value, storage: types.Type) -> ir.Value:
    lanes = VECTOR_BYTES // (8 if storage == types.float64 else 4)
    vector = ir.VectorType(address.type.pointee, lanes)
    value = builder.load(builder.bitcast(address, vector.as_pointer()), align=storage.bitwidth // 8)
    return _widen(builder, value, storage)


def _splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    undefined, index = ir.Constant(vector, ir.Undefined), ir.IntType(32)
    first = builder.insert_element(undefined, scalar, index(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, vector.count), [0] * vector.count))


def _store_vector(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    size = 8 if isinstance(value.type.element, ir.DoubleType) else 4
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=size)


@intrinsic
def load(typingctx, array, offset, compute):
    """array[offset] as a `compute` float, whatever the storage type (see the module's docstring)."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _widen(builder, builder.load(builder.gep(data, [args[1]])), array.dtype)

    return compute.dtype(array, types.int64, compute), codegen


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind, name = ir.FunctionType(ir.VoidType(), [byte, number, number, number]), "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [builder.bitcast(address, byte), number(0), number(3), number(1)])  # to read, to keep, data


@intrinsic
def prefetch(typingctx, array, offset):
    """Ask for the cache line of array[offset], which may lie past its end."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        _prefetch(builder, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def copy_vector(typingctx, source, source_at, target, target_at):
    """Copy one vector of elements, widened to the compute type."""

    def codegen(context, builder, signature, args):
        source_data, target_data = (
            context.make_array(signature.args[which])(context, builder, args[which]).data for which in (0, 2)
        )
        value = _load_vector(builder, builder.gep(source_data, [args[1]]), source.dtype)
        _store_vector(builder, value, builder.gep(target_data, [args[3]]))
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), codegen


@intrinsic
def add_vector(typingctx, source, source_at, scale, target, target_at):
    """Add scale times one vector of elements, both in the compute type."""

    def codegen(context, builder, signature, args):
        source_data, target_data = (
            context.make_array(signature.args[which])(context, builder, args[which]).data for which in (0, 3)
        )
        address = builder.gep(target_data, [args[4]])
        value = _load_vector(builder, builder.gep(source_data, [args[1]]), source.dtype)
        before = _load_vector(builder, address, target.dtype)
        factor = _splat(builder, args[2], value.type)
        _store_vector(builder, builder.fadd(before, builder.fmul(factor, value)), address)
        return context.get_dummy_value()

    return types.void(source, types.int64, scale, target, types.int64), codegen


@intrinsic
def transpose_vectors(typingctx, source, source_at, source_row, target, target_at):
    """target[target_at + j * lanes + i] = source[source_at + i * source_row + j] for i, j < lanes, widened."""

    def codegen(context, builder, signature, args):
        source_data, target_data = (
            context.make_array(signature.args[which])(context, builder, args[which]).data for which in (0, 3)
        )
        lanes = VECTOR_BYTES // (8 if source.dtype == types.float64 else 4)
        rows = []
        for i in range(lanes):
            offset = builder.add(args[1], builder.mul(args[2], _i64(i)))
            rows.append(_load_vector(builder, builder.gep(source_data, [offset]), source.dtype))
        # A perfect shuffle of the rows rotates the bits of (row, lane) by one; log2(lanes) of them transpose.
        half = lanes // 2
        low, high = (
            ir.Constant(ir.VectorType(ir.IntType(32), lanes), [n for i in range(half) for n in (b + i, b + i + lanes)])
            for b in (0, half)
        )
        for _ in range(lanes.bit_length() - 1):
            rows = [builder.shuffle_vector(rows[i], rows[i + half], mask) for i in range(half) for mask in (low, high)]
        for j, row in enumerate(rows):
            _store_vector(builder, row, builder.gep(target_data, [builder.add(args[4], _i64(j * lanes))]))
        return context.get_dummy_value()

    i = types.int64
    return types.void(source, i, i, target, i), codegen


def _narrow(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """A computed element, or a vector of them, as the storage type: rounded to nearest even where that is a half."""
    if storage == types.uint16:
        i32 = _like(ir.IntType(32), value.type)
        bits = builder.bitcast(value, i32)
        odd = builder.and_(builder.lshr(bits, _constant(i32, 16)), _constant(i32, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, _constant(i32, 0x7FFF)), odd), _constant(i32, 16))
        # The carry of the rounding would turn some NaNs into infinities.
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), _constant(i32, 0x7FC0), rounded)
        return builder.trunc(rounded, _like(ir.IntType(16), value.type))
    if storage == types.int16:
        half = builder.fptrunc(value, _like(ir.HalfType(), value.type))
        return builder.bitcast(half, _like(ir.IntType(16), value.type))
    return value


@intrinsic
def store(typingctx, array, offset, value):
    """array[offset] = value, rounded to nearest even where the storage type is a half."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.store(_narrow(builder, args[2], array.dtype), builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


def _tile_function(
    module: ir.Module, element: ir.Type, vectors: int, transposed: bool, finished: bool = False
) -> ir.Function:
    """C[i, j] (+)= sum_k A[i, k] B[k, j] for i < ROWS and j < vectors * lanes, all sums held in registers.

    Plain: A's rows are contiguous in k, and so are B's vectors. Transposed: A's columns are contiguous in i, and
    B's rows in j. Each leaves one stride of A and one of B free. With all four free the loop runs at half the
    rate: LLVM then walks the operands by one serial chain of pointer additions.

    Finished: the sums begin with a shift for each column, and end between a low and a high value.
    """
    double = isinstance(element, ir.DoubleType)
    size = 8 if double else 4
    lanes = VECTOR_BYTES // size
    kind = "_transposed" if transposed else "_finished" if finished else ""
    name = f"dynconv_tile{kind}_{'f64' if double else 'f32'}_{vectors}x{lanes}"
    if name in module.globals:
        return module.globals[name]
    pointer_type, vector = element.as_pointer(), ir.VectorType(element, lanes)
    function = ir.Function(
        module,
        ir.FunctionType(
            ir.VoidType(),
            [pointer_type, _i64, pointer_type, _i64, pointer_type, _i64, _i64]
            + ([pointer_type, element, element] if finished else [ir.IntType(1)]),
        ),
        name,
    )
    function.linkage = "internal"
    function.attributes.add("noinline")
    a, a_stride, b, b_stride, c, c_row, depth, *rest = function.args
    if transposed:
        a_row, a_k, b_k, b_vector = _i64(1), a_stride, _i64(vectors * lanes), _i64(lanes)
    else:
        a_row, a_k, b_k, b_vector = a_stride, _i64(1), _i64(lanes), b_stride
    for operand in (a, b, c):
        operand.add_attribute("noalias")
    fma_name = f"llvm.fma.v{lanes}{'f64' if double else 'f32'}"
    fma = module.globals.get(fma_name) or ir.Function(module, ir.FunctionType(vector, [vector] * 3), fma_name)

    entry, loop, done = (function.append_basic_block(n) for n in ("entry", "loop", "done"))
    zero = ir.Constant(vector, [ir.Constant(element, 0.0)] * lanes)

    def vector_at(builder: ir.IRBuilder, base: ir.Value) -> ir.Value:
        return builder.bitcast(base, vector.as_pointer())

    build = ir.IRBuilder(entry)
    outputs = [
        [build.gep(c, [build.add(build.mul(c_row, _i64(i)), _i64(j * lanes))]) for j in range(vectors)]
        for i in range(ROWS)
    ]
    starts = []  # (block in front of the loop, the sums it begins with)
    if finished:
        shift, low, high = rest
        shifts = [build.load(vector_at(build, build.gep(shift, [_i64(j * lanes)])), align=size) for j in range(vectors)]
        starts.append((entry, [shifts] * ROWS))
        build.branch(loop)
    else:
        resume = function.append_basic_block("resume")
        build.cbranch(rest[0], resume, loop)
        build = ir.IRBuilder(resume)
        before = [[build.load(vector_at(build, out), align=size) for out in row] for row in outputs]
        build.branch(loop)
        starts += [(entry, [[zero] * vectors] * ROWS), (resume, before)]

    build = ir.IRBuilder(loop)
    k = build.phi(_i64)
    sums = [[build.phi(vector) for _ in range(vectors)] for _ in range(ROWS)]
    for block, values in starts:
        k.add_incoming(_i64(0), block)
        for i in range(ROWS):
            for j in range(vectors):
                sums[i][j].add_incoming(values[i][j], block)
    b_base = build.mul(k, b_k)
    columns = [
        build.load(vector_at(build, build.gep(b, [build.add(b_base, build.mul(b_vector, _i64(j)))])), align=size)
        for j in range(vectors)
    ]
    a_base = build.mul(k, a_k)
    updated = []
    for i in range(ROWS):
        scalar = build.load(build.gep(a, [build.add(a_base, build.mul(a_row, _i64(i)))]), align=size)
        row = _splat(build, scalar, vector)
        updated.append([build.call(fma, [row, columns[j], sums[i][j]]) for j in range(vectors)])
    following = build.add(k, _i64(1))
    k.add_incoming(following, loop)
    for i in range(ROWS):
        for j in range(vectors):
            sums[i][j].add_incoming(updated[i][j], loop)
    build.cbranch(build.icmp_signed("<", following, depth), loop, done)

    build = ir.IRBuilder(done)
    for i in range(ROWS):
        for j in range(vectors):
            value = updated[i][j]
            if finished:
                value = _clamp(build, value, _splat(build, low, vector), _splat(build, high, vector))
            build.store(value, vector_at(build, outputs[i][j]), align=size)
    build.ret_void()
    return function


def _tile(vectors: int, transposed: bool):
    @intrinsic
    def tile(typingctx, a, a_at, a_stride, b, b_at, b_stride, c, c_at, c_row, depth, accumulate):
        def codegen(context, builder, signature, args):
            operands = []
            for which in (0, 3, 6):
                data = context.make_array(signature.args[which])(context, builder, args[which]).data
                operands += [builder.gep(data, [args[which + 1]]), args[which + 2]]
            element = context.get_value_type(a.dtype)
            function = _tile_function(builder.module, element, vectors, transposed)
            builder.call(function, [*operands, *args[9:]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, b, i, i, c, i, i, i, types.boolean), codegen

    return tile


def _finished_tile(vectors: int):
    @intrinsic
    def tile(typingctx, a, a_at, a_stride, b, b_at, b_stride, c, c_at, c_row, depth, shift, shift_at, low, high):
        def codegen(context, builder, signature, args):
            operands = []
            for which in (0, 3, 6):
                data = context.make_array(signature.args[which])(context, builder, args[which]).data
                operands += [builder.gep(data, [args[which + 1]]), args[which + 2]]
            shifts = context.make_array(signature.args[10])(context, builder, args[10]).data
            function = _tile_function(builder.module, context.get_value_type(a.dtype), vectors, False, finished=True)
            builder.call(function, [*operands, args[9], builder.gep(shifts, [args[11]]), args[12], args[13]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, b, i, i, c, i, i, i, shift, i, low, high), codegen

    return tile


_finished1, _finished2, _finished3, _finished4 = (_finished_tile(vectors) for vectors in (1, 2, 3, 4))
_tile1, _tile2, _tile3, _tile4 = (_tile(vectors, False) for vectors in (1, 2, 3, 4))
_transposed1, _transposed2, _transposed3, _transposed4 = (_tile(vectors, True) for vectors in (1, 2, 3, 4))


@njit(inline="always")
def multiply_tile(vectors, a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, accumulate):
    """C[i, j] (+)= sum over k < depth of A[i, k] * B[k, j], for ROWS rows i and `vectors` vectors of columns j.

    A[i, k] lies at a_at + i * a_row + k, B[k, (vector, lane)] at b_at + vector * b_vector + k * lanes + lane,
    C[i, j] at c_at + i * c_row + j, in elements. The order of the sum depends on k alone.
    """
    if vectors == 4:
        _tile4(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, accumulate)
    elif vectors == 3:
        _tile3(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, accumulate)
    elif vectors == 2:
        _tile2(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, accumulate)
    else:
        _tile1(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, accumulate)


@njit(inline="always")
def finished_tile(vectors, a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high):
    """C[i, j] = multiply_tile's sum + shift[shift_at + j], no less than low, no more than high; NaN stays NaN."""
    if vectors == 4:
        _finished4(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)
    elif vectors == 3:
        _finished3(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)
    elif vectors == 2:
        _finished2(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)
    else:
        _finished1(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)


@njit(inline="always")
def multiply_transposed_tile(vectors, a, a_at, a_k, b, b_at, c, c_at, c_row, depth, accumulate):
    """The same with A[i, k] at a_at + i + k * a_k and B[k, j] at b_at + k * vectors * lanes + j."""
    if vectors == 4:
        _transposed4(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)
    elif vectors == 3:
        _transposed3(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)
    elif vectors == 2:
        _transposed2(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)
    else:
        _transposed1(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)


# Activations of the epilogue, by their numbers in the kernels.
ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu", "hardswish")
# Sites whose taps a stencil adds up at a time, and vectors of channels: 8 accumulators in all.
STENCIL_ROWS, STENCIL_VECTORS = 4, 2
STENCIL_TAPS, STENCIL_WEIGHT_VECTORS = 3, 2  # the same for the stencil's weight gradient

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


def _call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    """An LLVM intrinsic over floats, overloaded on the type of its operands."""
    kind = values[0].type
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    suffix = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    name = f"llvm.{name}.{suffix}{'f64' if isinstance(element, ir.DoubleType) else 'f32'}"
    globals_ = builder.module.globals
    function = globals_.get(name) or ir.Function(builder.module, ir.FunctionType(kind, [kind] * len(values)), name)
    return builder.call(function, values)


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
    total = _constant(x.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = _call(builder, "fma", total, x, _constant(x.type, coefficient))
    return total


def _is_double(value_type: ir.Type) -> bool:
    return isinstance(getattr(value_type, "element", value_type), ir.DoubleType)


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x), for float32 zero below exp(-87), exp(88) from there on, and infinite where that is; NaN stays NaN."""
    if _is_double(x.type):
        return _elementwise(builder, "exp", x)
    kind, integer = x.type, _like(ir.IntType(32), x.type)
    # Ordered comparisons are false for NaN. What is beyond the ends has to end there: it may be multiplied by x.
    is_low = builder.fcmp_ordered("<", x, _constant(kind, -87.0))
    is_high = builder.fcmp_ordered(">", x, _constant(kind, 88.722839))
    x = _between(builder, x, -87.0, 88.0)
    n = _call(builder, "rint", builder.fmul(x, _constant(kind, 1.4426950408889634)))
    rest = _call(builder, "fma", n, _constant(kind, -0.693359375), x)  # log(2) in two parts, the first exact times n
    rest = _call(builder, "fma", n, _constant(kind, 2.12194440054690583e-4), rest)
    exponent = builder.shl(builder.fptosi(n, integer), _constant(integer, 23))
    bits = builder.bitcast(_polynomial(builder, _EXP, rest), integer)
    power = builder.bitcast(builder.add(bits, exponent), kind)
    power = builder.select(is_high, _constant(kind, float("inf")), builder.select(is_low, _constant(kind, 0.0), power))
    return builder.select(builder.fcmp_unordered("uno", x, x), x, power)


def _erf(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    if _is_double(x.type):
        return _elementwise(builder, "erf", x)
    kind = x.type
    magnitude = _call(builder, "fabs", x)
    square = builder.fmul(x, x)
    near = builder.fmul(x, _polynomial(builder, _ERF, square))
    four = _constant(kind, 4.0)  # where erf is 1 in float32
    capped = builder.select(builder.fcmp_ordered(">", magnitude, four), four, magnitude)
    tail = _exp(builder, builder.fneg(_polynomial(builder, _LOG_ERFC, capped)))
    far = _call(builder, "copysign", builder.fsub(_constant(kind, 1.0), tail), x)
    return builder.select(builder.fcmp_ordered("<=", magnitude, _constant(kind, 1.0)), near, far)


def _clamp(builder: ir.IRBuilder, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """max(low, min(high, x)); NaN stays NaN."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def _between(builder: ir.IRBuilder, x: ir.Value, low: float, high: float | None) -> ir.Value:
    """max(low, min(high, x)); NaN stays NaN."""
    x = builder.select(builder.fcmp_ordered("<", x, _constant(x.type, low)), _constant(x.type, low), x)
    if high is None:
        return x
    return builder.select(builder.fcmp_ordered(">", x, _constant(x.type, high)), _constant(x.type, high), x)


def _sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    one = _constant(x.type, 1.0)
    return builder.fdiv(one, builder.fadd(one, _exp(builder, builder.fneg(x))))


def _normal(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The standard normal distribution function, (1 + erf(x / sqrt(2))) / 2."""
    scaled = builder.fmul(x, _constant(x.type, 0.7071067811865476))
    return builder.fmul(_constant(x.type, 0.5), builder.fadd(_constant(x.type, 1.0), _erf(builder, scaled)))


def _activate(builder: ir.IRBuilder, activation: str, x: ir.Value) -> ir.Value:
    if activation == "relu":
        return _between(builder, x, 0.0, None)
    if activation == "relu6":
        return _between(builder, x, 0.0, 6.0)
    if activation == "silu":
        return builder.fmul(x, _sigmoid(builder, x))
    if activation == "gelu":
        return builder.fmul(x, _normal(builder, x))
    if activation == "hardswish":
        factor = _between(builder, builder.fadd(x, _constant(x.type, 3.0)), 0.0, 6.0)
        return builder.fmul(x, builder.fmul(factor, _constant(x.type, 1 / 6)))
    return x


def _slope(builder: ir.IRBuilder, activation: str, x: ir.Value) -> ir.Value:
    """The activation's derivative at x, at its kinks as PyTorch has it."""
    zero, one = _constant(x.type, 0.0), _constant(x.type, 1.0)
    if activation in ("relu", "relu6"):
        passes = builder.fcmp_unordered(">", x, zero)
        if activation == "relu6":
            passes = builder.and_(passes, builder.fcmp_unordered("<", x, _constant(x.type, 6.0)))
        return builder.select(passes, one, zero)
    if activation == "silu":
        s = _sigmoid(builder, x)
        return builder.fmul(s, builder.fadd(one, builder.fmul(x, builder.fsub(one, s))))
    if activation == "gelu":
        square = builder.fmul(builder.fmul(x, x), _constant(x.type, -0.5))
        density = builder.fmul(_exp(builder, square), _constant(x.type, 0.3989422804014327))
        return builder.fadd(_normal(builder, x), builder.fmul(x, density))
    if activation == "hardswish":
        middle = builder.fadd(builder.fmul(x, _constant(x.type, 1 / 3)), _constant(x.type, 0.5))
        slope = builder.select(builder.fcmp_ordered("<=", x, _constant(x.type, -3.0)), zero, middle)
        return builder.select(builder.fcmp_ordered(">=", x, _constant(x.type, 3.0)), one, slope)
    return one


def _lanes(element: ir.Type) -> int:
    return VECTOR_BYTES // (8 if isinstance(element, ir.DoubleType) else 4)


def _read(builder: ir.IRBuilder, base: ir.Value, at: ir.Value, lanes: int, storage: types.Type) -> ir.Value:
    """base[at : at + lanes] widened; one element, not a vector, where lanes is 1."""
    address = builder.gep(base, [at])
    if lanes == 1:
        return _widen(builder, builder.load(address), storage)
    return _load_vector(builder, address, storage)


def _write(
    builder: ir.IRBuilder, value: ir.Value, base: ir.Value, at: ir.Value, lanes: int, storage: types.Type
) -> None:
    value, address = _narrow(builder, value, storage), builder.gep(base, [at])
    if lanes > 1:
        address = builder.bitcast(address, value.type.as_pointer())
    builder.store(value, address, align=storage.bitwidth // 8)


def _write_around(builder: ir.IRBuilder, value: ir.Value, base: ir.Value, at: ir.Value, *rest) -> None:
    """`_write` of a whole, aligned vector around the cache: what is written is not read from memory first."""
    address = builder.bitcast(builder.gep(base, [at]), value.type.as_pointer())
    written = builder.store(value, address, align=VECTOR_BYTES)
    written.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def _for(builder: ir.IRBuilder, begin: ir.Value, end: ir.Value, step: int, carried: list[ir.Value], body):
    """for at in range(begin, end, step), carrying values: body(builder, at, values) -> their next ones.

    Returns the values after the last round. Leaves the builder behind the loop.
    """
    before = builder.block
    loop, work, done = (builder.append_basic_block() for _ in range(3))
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(_i64)
    values = [builder.phi(value.type) for value in carried]
    builder.cbranch(builder.icmp_signed("<", at, end), work, done)
    builder.position_at_end(work)
    following = body(builder, at, values)
    at.add_incoming(begin, before)
    at.add_incoming(builder.add(at, _i64(step)), builder.block)
    for value, first, next_value in zip(values, carried, following, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(next_value, builder.block)
    builder.branch(loop)
    builder.position_at_end(done)
    return values


def _for_channels(builder: ir.IRBuilder, count: ir.Value, lanes: int, body) -> None:
    """body(builder, at, lanes) for each whole vector of `count` channels, then body(builder, at, 1) for the others."""
    whole = builder.and_(count, _i64(-lanes))

    def of(width):
        def round_(builder, at, values):
            body(builder, at, width)
            return []

        return round_

    _for(builder, _i64(0), whole, lanes, [], of(lanes))
    _for(builder, whole, count, 1, [], of(1))


def _for_strips(builder: ir.IRBuilder, count: ir.Value, lanes: int, body) -> None:
    """body(builder, at, vectors, lanes) for strips of `count` channels: STENCIL_VECTORS vectors, one, one element."""
    begin = _i64(0)
    for vectors, width in ((STENCIL_VECTORS, lanes), (1, lanes), (1, 1)):
        end = builder.and_(count, _i64(-vectors * width))

        def strip(builder, at, values, vectors=vectors, width=width):
            body(builder, at, vectors, width)
            return []

        _for(builder, begin, end, vectors * width, [], strip)
        begin = end


def _carry_vectors(builder: ir.IRBuilder, count: ir.Value, lanes: int, carried: list[ir.Value], body) -> list[ir.Value]:
    """body(builder, at, values, some) -> values: for each whole vector of `count` elements with None, then once more
    with a mask of those left."""
    whole = builder.and_(count, _i64(-lanes))
    values = _for(builder, _i64(0), whole, lanes, carried, lambda b, at, v: body(b, at, v, None))
    numbers = ir.VectorType(ir.IntType(32), lanes)
    left = _splat(builder, builder.trunc(builder.sub(count, whole), ir.IntType(32)), numbers)
    some = builder.icmp_signed("<", ir.Constant(numbers, list(range(lanes))), left)
    return _for(builder, whole, count, lanes, values, lambda b, at, v: body(b, at, v, some))


def _for_vectors(builder: ir.IRBuilder, count: ir.Value, lanes: int, body) -> None:
    """`_carry_vectors` of nothing: body(builder, at, some)."""

    def round_(builder, at, values, some):
        body(builder, at, some)
        return []

    _carry_vectors(builder, count, lanes, [], round_)


def _masked(builder: ir.IRBuilder, name: str, kind: ir.Type, result: ir.Type, operands: list[ir.Value]) -> ir.Value:
    """LLVM's masked load or store of vectors of that kind."""
    element = {"half": "f16", "float": "f32", "double": "f64"}.get(str(kind.element), str(kind.element))
    name = f"llvm.masked.{name}.v{kind.count}{element}.p0"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [v.type for v in operands]), name)
    return builder.call(function, operands)


def _read_some(
    builder, base: ir.Value, at: ir.Value, lanes: int, storage: types.Type, some: ir.Value | None
) -> ir.Value:
    """base[at : at + lanes] widened; of a mask's lanes only, zeros in the others."""
    if some is None:
        return _read(builder, base, at, lanes, storage)
    kind = ir.VectorType(base.type.pointee, lanes)
    address = builder.bitcast(builder.gep(base, [at]), kind.as_pointer())
    alignment, nothing = ir.IntType(32)(storage.bitwidth // 8), _constant(kind, 0)
    return _widen(builder, _masked(builder, "load", kind, kind, [address, alignment, some, nothing]), storage)


def _write_some(builder, value: ir.Value, base, at, lanes: int, storage: types.Type, some: ir.Value | None) -> None:
    if some is None:
        _write(builder, value, base, at, lanes, storage)
        return
    value = _narrow(builder, value, storage)
    address = builder.bitcast(builder.gep(base, [at]), value.type.as_pointer())
    alignment = ir.IntType(32)(storage.bitwidth // 8)
    _masked(builder, "store", value.type, ir.VoidType(), [value, address, alignment, some])


def _function(module: ir.Module, name: str, arguments: list[ir.Type], build) -> ir.Function:
    """The internal function of that name; build(builder, arguments) writes it where the module has none yet."""
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    build(builder, function.args)
    builder.ret_void()
    return function


def _per_activation(builder: ir.IRBuilder, activation: ir.Value, build) -> None:
    """build(builder, name) in a branch of its own for each activation."""
    done = builder.append_basic_block()
    switch = builder.switch(activation, done)
    for number, name in enumerate(ACTIVATIONS):
        block = builder.append_basic_block()
        switch.add_case(_i64(number), block)
        builder.position_at_end(block)
        build(builder, name)
        builder.branch(done)
    builder.position_at_end(done)


def _data(context, builder, signature, args, which: int) -> ir.Value:
    return context.make_array(signature.args[which])(context, builder, args[which]).data


def _nullable(builder: ir.IRBuilder, base: ir.Value, at: ir.Value) -> ir.Value:
    """&base[at], or null where base is."""
    null = ir.Constant(base.type, None)
    return builder.select(builder.icmp_unsigned("==", base, null), null, builder.gep(base, [at]))


@intrinsic
def finish_row(typingctx, values, at, shift, shift_at, scale, residual, residual_at, out, out_at, count, activation):
    """out[c] = activation(scale * (values[c] + shift[c]) + residual[c]) for `count` channels c, from the offsets given.

    `values` and `shift` are in the compute type; `residual` may be an array at address 0: none. `activation` is a
    number, see ACTIVATIONS.
    """
    storage = out.dtype

    def codegen(context, builder, signature, args):
        element = context.get_value_type(values.dtype)
        lanes = _lanes(element)
        stored = _data(context, builder, signature, args, 7)

        def build(builder, arguments):
            values, shift, scale, residual, out, count, activation = arguments
            has_residual = builder.icmp_unsigned("!=", residual, ir.Constant(residual.type, None))

            def loop(builder, name):
                def body(builder, at, some):
                    compute = types.float64 if isinstance(element, ir.DoubleType) else types.float32
                    value = builder.fadd(
                        _read_some(builder, values, at, lanes, compute, some),
                        _read_some(builder, shift, at, lanes, compute, some),
                    )
                    value = builder.fmul(value, _splat(builder, scale, value.type))
                    before = builder.block
                    with builder.if_then(has_residual):
                        sum_ = builder.fadd(value, _read_some(builder, residual, at, lanes, storage, some))
                        inside = builder.block
                    merged = builder.phi(value.type)
                    merged.add_incoming(value, before)
                    merged.add_incoming(sum_, inside)
                    _write_some(builder, _activate(builder, name, merged), out, at, lanes, storage, some)

                _for_vectors(builder, count, lanes, body)

            _per_activation(builder, activation, loop)

        compute_pointer = element.as_pointer()
        function = _function(
            builder.module,
            f"dynconv_finish_{storage}_{values.dtype}",
            [compute_pointer, compute_pointer, element, stored.type, stored.type, _i64, _i64],
            build,
        )
        builder.call(
            function,
            [
                builder.gep(_data(context, builder, signature, args, 0), [args[1]]),
                builder.gep(_data(context, builder, signature, args, 2), [args[3]]),
                args[4],
                _nullable(builder, _data(context, builder, signature, args, 5), args[6]),
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
        incoming = _data(context, builder, signature, args, 2)
        compute = values.dtype

        def build(builder, arguments):
            values, grad, count, activation = arguments

            def loop(builder, name):
                def body(builder, at, width):
                    slope = _slope(builder, name, _read(builder, values, at, width, compute))
                    slope = builder.fmul(slope, _read(builder, grad, at, width, storage))
                    _write(builder, slope, values, at, width, compute)

                _for_channels(builder, count, _lanes(element), body)

            _per_activation(builder, activation, loop)

        function = _function(
            builder.module,
            f"dynconv_slope_{storage}_{values.dtype}",
            [element.as_pointer(), incoming.type, _i64, _i64],
            build,
        )
        builder.call(
            function,
            [
                builder.gep(_data(context, builder, signature, args, 0), [args[1]]),
                builder.gep(incoming, [args[3]]),
                args[4],
                args[5],
            ],
        )
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, i, grad, i, i, i), codegen


def _at_address(builder: ir.IRBuilder, address: ir.Value, storage_type: ir.Type) -> ir.Value:
    return builder.inttoptr(address, storage_type.as_pointer())


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
        stored, written = (_data(context, builder, signature, args, which).type.pointee for which in (1, 8))
        lanes = _lanes(element)
        compute = weight.dtype

        def build(builder, arguments):
            pixels, weight, taps, channels, shift, low, high = arguments

            def sums(builder, at, vectors, lanes):
                kind = element if lanes == 1 else ir.VectorType(element, lanes)
                start = [
                    _read(builder, shift, builder.add(at, _i64(v * lanes)), lanes, compute) for v in range(vectors)
                ]
                least, most = (_splat(builder, v, kind) if lanes > 1 else v for v in (low, high))

                def tap_round(builder, tap, totals):
                    base = builder.add(builder.mul(tap, channels), at)
                    filters = [
                        _read(builder, weight, builder.add(base, _i64(v * lanes)), lanes, compute)
                        for v in range(vectors)
                    ]
                    first = builder.mul(tap, _i64(STENCIL_ROWS))
                    following = []
                    for i in range(STENCIL_ROWS):
                        address = builder.load(builder.gep(pixels, [builder.add(first, _i64(i))]))
                        row = _at_address(builder, address, stored)
                        for v in range(vectors):
                            value = _read(builder, row, builder.add(at, _i64(v * lanes)), lanes, storage)
                            following.append(_call(builder, "fma", filters[v], value, totals[i * vectors + v]))
                    return following

                totals = _for(builder, _i64(0), taps, 1, start * STENCIL_ROWS, tap_round)
                first = builder.mul(taps, _i64(STENCIL_ROWS))
                for i in range(STENCIL_ROWS):
                    address = builder.load(builder.gep(pixels, [builder.add(first, _i64(i))]))
                    target = _at_address(builder, address, written)
                    for v in range(vectors):
                        total = _clamp(builder, totals[i * vectors + v], least, most)
                        _write(builder, total, target, builder.add(at, _i64(v * lanes)), lanes, result)

            _for_strips(builder, channels, lanes, sums)

        function = _function(
            builder.module,
            f"dynconv_stencil_{storage}_{compute}_{result}",
            [_i64.as_pointer(), element.as_pointer(), _i64, _i64, element.as_pointer(), element, element],
            build,
        )
        builder.call(
            function,
            [
                _data(context, builder, signature, args, 0),
                _data(context, builder, signature, args, 2),
                args[3],
                args[4],
                _data(context, builder, signature, args, 5),
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
            stored, written = (_data(context, builder, signature, args, which).type.pointee for which in (1, 13))
            lanes, compute = _lanes(element), weight.dtype
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                pixels, weight, taps, depth, shift, low, high, *places = arguments
                sources, targets = places[:units], places[units : 2 * units]
                unit_size = builder.mul(builder.mul(taps, depth), _i64(lanes))
                filters = [builder.gep(weight, [builder.mul(unit_size, _i64(u))]) for u in range(units)]

                def address(builder, tap, i):
                    number = builder.add(builder.mul(tap, _i64(STENCIL_ROWS)), _i64(i))
                    return builder.load(builder.gep(pixels, [number]))

                def tap_round(builder, tap, totals):
                    rows = [_at_address(builder, address(builder, tap, i), stored) for i in range(STENCIL_ROWS)]
                    rows = [builder.gep(row, [at]) for at in sources for row in rows]
                    base = builder.mul(tap, builder.mul(depth, _i64(lanes)))
                    columns = [builder.gep(column, [base]) for column in filters]

                    def channel(builder, k, totals):
                        at = builder.mul(k, _i64(lanes))
                        following = []
                        for u in range(units):
                            column = _read(builder, columns[u], at, lanes, compute)
                            for i in range(STENCIL_ROWS):
                                value = _read(builder, rows[u * STENCIL_ROWS + i], k, 1, storage)
                                value = _splat(builder, value, vector)
                                following.append(_call(builder, "fma", value, column, totals[len(following)]))
                        return following

                    return _for(builder, _i64(0), depth, 1, totals, channel)

                start = [_read(builder, shift, to, lanes, compute) for to in targets for _ in range(STENCIL_ROWS)]
                totals = _for(builder, _i64(0), taps, 1, start, tap_round)
                least, most = (_splat(builder, v, vector) for v in (low, high))
                for u in range(units):
                    for i in range(STENCIL_ROWS):
                        target = _at_address(builder, address(builder, taps, i), written)
                        total = _clamp(builder, totals[u * STENCIL_ROWS + i], least, most)
                        _write(builder, total, target, targets[u], lanes, result)

            function = _function(
                builder.module,
                f"dynconv_group_{units}_{storage}_{compute}_{result}",
                [_i64.as_pointer(), element.as_pointer(), _i64, _i64, element.as_pointer(), element, element]
                + [_i64] * (2 * units),
                build,
            )
            builder.call(
                function,
                [
                    _data(context, builder, signature, args, 0),
                    builder.gep(_data(context, builder, signature, args, 2), [args[3]]),
                    args[4],
                    args[5],
                    _data(context, builder, signature, args, 8),
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
            stored = _data(context, builder, signature, args, 3).type
            lanes, compute = _lanes(element), out.dtype

            def build(builder, arguments):
                table, taps, source, stride, zeros, grad, rows, channels, out = arguments

                def strip(vectors, lanes):
                    def round_(builder, at, values):
                        places = [
                            builder.add(builder.add(at, builder.mul(channels, _i64(t))), _i64(v * lanes))
                            for t in range(tap_count)
                            for v in range(vectors)
                        ]
                        totals = [_read(builder, out, place, lanes, compute) for place in places]

                        def site(builder, m, totals):
                            row = builder.add(builder.mul(m, stride), at)
                            grads = [
                                _read(builder, grad, builder.add(row, _i64(v * lanes)), lanes, compute)
                                for v in range(vectors)
                            ]
                            following = []
                            for t in range(tap_count):
                                entry = builder.add(builder.mul(m, taps), _i64(t))
                                pixel = builder.sext(builder.load(builder.gep(table, [entry])), _i64)
                                inside = builder.gep(source, [builder.mul(pixel, stride)])
                                outside = builder.icmp_signed("<", pixel, _i64(0))
                                pixels = builder.select(outside, zeros, inside)
                                for v in range(vectors):
                                    value = _read(builder, pixels, builder.add(at, _i64(v * lanes)), lanes, storage)
                                    following.append(_call(builder, "fma", grads[v], value, totals[len(following)]))
                            return following

                        for place, total in zip(places, _for(builder, _i64(0), rows, 1, totals, site), strict=True):
                            _write(builder, total, out, place, lanes, compute)
                        return []

                    return round_

                begin = _i64(0)
                for vectors, width in ((STENCIL_WEIGHT_VECTORS, lanes), (1, lanes), (1, 1)):
                    end = builder.and_(channels, _i64(-vectors * width))
                    _for(builder, begin, end, vectors * width, [], strip(vectors, width))
                    begin = end

            number = ir.IntType(32).as_pointer()
            function = _function(
                builder.module,
                f"dynconv_stencil_weight_{tap_count}_{storage}_{out.dtype}",
                [number, _i64, stored, _i64, stored, element.as_pointer(), _i64, _i64, element.as_pointer()],
                build,
            )
            builder.call(
                function,
                [
                    builder.gep(_data(context, builder, signature, args, 0), [args[1]]),
                    args[2],
                    builder.gep(_data(context, builder, signature, args, 3), [args[4]]),
                    args[5],
                    _data(context, builder, signature, args, 6),
                    builder.gep(_data(context, builder, signature, args, 7), [args[8]]),
                    args[9],
                    args[10],
                    builder.gep(_data(context, builder, signature, args, 11), [args[12]]),
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
            stored = _data(context, builder, signature, args, 2).type
            lanes, compute = _lanes(element), out.dtype
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                table, taps, source, stride, zeros, grad, grad_stride, rows, out = arguments

                def site(builder, m, totals):
                    slope = _read(builder, grad, builder.mul(m, grad_stride), lanes, compute)
                    pixel = builder.sext(builder.load(builder.gep(table, [builder.mul(m, taps)])), _i64)
                    inside = builder.gep(source, [builder.mul(pixel, stride)])
                    row = builder.select(builder.icmp_signed("<", pixel, _i64(0)), zeros, inside)
                    values = [
                        _splat(builder, _read(builder, row, _i64(c), 1, storage), vector) for c in range(channels)
                    ]
                    return [_call(builder, "fma", v, slope, total) for v, total in zip(values, totals, strict=True)]

                start = [ir.Constant(vector, [0.0] * lanes)] * channels
                for c, total in enumerate(_for(builder, _i64(0), rows, 1, start, site)):
                    place = _i64(c * lanes)
                    total = builder.fadd(total, _read(builder, out, place, lanes, compute))
                    _write(builder, total, out, place, lanes, compute)

            number = ir.IntType(32).as_pointer()
            function = _function(
                builder.module,
                f"dynconv_group_weight_{channels}_{storage}_{out.dtype}",
                [number, _i64, stored, _i64, stored, element.as_pointer(), _i64, _i64, element.as_pointer()],
                build,
            )
            builder.call(
                function,
                [
                    _data(context, builder, signature, args, 0),
                    args[1],
                    builder.gep(_data(context, builder, signature, args, 2), [args[3]]),
                    args[4],
                    _data(context, builder, signature, args, 5),
                    builder.gep(_data(context, builder, signature, args, 6), [args[7]]),
                    args[8],
                    args[9],
                    builder.gep(_data(context, builder, signature, args, 10), [args[11]]),
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


# Rows that a dot product takes at a time, and vectors of one row that it adds up side by side: 8 accumulators in all.
DOT_ROWS, DOT_VECTORS = 4, 2
SUMMED_VECTORS = 8  # vectors whose sums over rows are held in registers


def _offset(builder: ir.IRBuilder, numbers: ir.Value, at: ir.Value) -> ir.Value:
    """numbers[at], of int32."""
    return builder.sext(builder.load(builder.gep(numbers, [at])), _i64)


def _sum_lanes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The sum of a vector's elements: of its halves, and so on."""
    count = value.type.count
    while count > 1:
        count //= 2
        half = ir.VectorType(ir.IntType(32), count)
        low, high = (
            builder.shuffle_vector(value, value, ir.Constant(half, list(range(first, first + count))))
            for first in (0, count)
        )
        value = builder.fadd(low, high)
    return builder.extract_element(value, ir.IntType(32)(0))


def _transposed_sum(builder: ir.IRBuilder, rows: list[ir.Value]) -> ir.Value:
    """The sums of vectors, at most as many as lanes, one in each lane: pairs share the additions of their halves."""
    width = rows[0].type.count
    while width > 1:
        # Of each partial sum, `width` lanes, pick the low and the high half: of two vectors, at last of the single one.
        half, joined = width // 2, 2 if len(rows) > 1 else 1
        length = joined * rows[0].type.count
        low = [first + k for first in range(0, length, width) for k in range(half)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), len(low)), [k + by for k in low]) for by in (0, half)]
        rows = [
            builder.fadd(*(builder.shuffle_vector(rows[i], rows[i + joined - 1], mask) for mask in masks))
            for i in range(0, len(rows), joined)
        ]
        width = half
    return rows[0]


def _dot_rows(row_count: int):
    @intrinsic
    def products(typingctx, rows, rows_at, row, index, index_at, values, values_at, blocks, blocks_at, number, out, at):
        storage = rows.dtype

        def codegen(context, builder, signature, args):
            element = context.get_value_type(out.dtype)
            stored = _data(context, builder, signature, args, 0).type
            lanes, compute = _lanes(element), out.dtype
            zero = ir.Constant(ir.VectorType(element, lanes), [0.0] * lanes)

            def build(builder, arguments):
                rows, row, index, values, blocks, number, out = arguments
                starts = [
                    builder.gep(rows, [builder.mul(_offset(builder, index, _i64(i)), row)]) for i in range(row_count)
                ]

                def vectors(count):
                    def round_(builder, at, totals):
                        following = []
                        for v in range(count):
                            block = _offset(builder, blocks, builder.add(at, _i64(v)))
                            value = _read(builder, values, block, lanes, compute)
                            for start in starts:
                                factor = _read(builder, start, block, lanes, storage)
                                following.append(_call(builder, "fma", factor, value, totals[len(following)]))
                        return following

                    return round_

                whole = builder.and_(number, _i64(-DOT_VECTORS))
                totals = _for(
                    builder, _i64(0), whole, DOT_VECTORS, [zero] * (DOT_VECTORS * row_count), vectors(DOT_VECTORS)
                )
                totals[:row_count] = _for(builder, whole, number, 1, totals[:row_count], vectors(1))
                for i in range(row_count):
                    total = totals[i]
                    for v in range(1, DOT_VECTORS):
                        total = builder.fadd(total, totals[v * row_count + i])
                    before = _read(builder, out, _i64(i), 1, compute)
                    _write(builder, builder.fadd(before, _sum_lanes(builder, total)), out, _i64(i), 1, compute)

            number_type = ir.IntType(32).as_pointer()
            function = _function(
                builder.module,
                f"dynconv_dot_rows_{row_count}_{storage}_{out.dtype}",
                [stored, _i64, number_type, element.as_pointer(), number_type, _i64, element.as_pointer()],
                build,
            )
            at = lambda which: builder.gep(_data(context, builder, signature, args, which), [args[which + 1]])
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
            scaling, stored = (_data(context, builder, signature, args, which).type for which in (0, 6))
            lanes, compute = _lanes(element), out.dtype
            vector = ir.VectorType(element, lanes)

            def build(builder, arguments):
                scales, step, index, count, rows, row, blocks, out, accumulate = arguments
                places = [_offset(builder, blocks, _i64(v)) for v in range(vector_count)]
                before = builder.block
                with builder.if_then(accumulate):
                    totals = [_read(builder, out, place, lanes, compute) for place in places]
                    inside = builder.block
                sums = [builder.phi(vector) for _ in places]
                for phi, total in zip(sums, totals, strict=True):
                    phi.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
                    phi.add_incoming(total, inside)

                def round_(builder, j, sums):
                    at = _offset(builder, index, j)
                    scale = _read(builder, scales, builder.mul(at, step), 1, signature.args[0].dtype)
                    scale, start = _splat(builder, scale, vector), builder.gep(rows, [builder.mul(at, row)])
                    values = [_read(builder, start, place, lanes, signature.args[6].dtype) for place in places]
                    return [_call(builder, "fma", v, scale, total) for v, total in zip(values, sums, strict=True)]

                for place, total in zip(places, _for(builder, _i64(0), count, 1, sums, round_), strict=True):
                    _write(builder, total, out, place, lanes, compute)

            number_type, flag = ir.IntType(32).as_pointer(), ir.IntType(1)
            function = _function(
                builder.module,
                f"dynconv_add_row_products_{vector_count}_{scales.dtype}_{rows.dtype}_{out.dtype}",
                [scaling, _i64, number_type, _i64, stored, _i64, number_type, element.as_pointer(), flag],
                build,
            )
            at = lambda which: builder.gep(_data(context, builder, signature, args, which), [args[which + 1]])
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


@intrinsic
def fill_elements(typingctx, source, out, begin, end, is_large):
    """out[begin:end] = source[begin:end], or zeros where `source` is an array at address 0; whole vectors go around
    the cache where `is_large`: what is written is then not read from memory first, and pushes nothing out."""

    def codegen(context, builder, signature, args):
        stored = _data(context, builder, signature, args, 1)

        def build(builder, arguments):
            source, out, begin, end, is_large = arguments
            element = stored.type.pointee
            size = out_size(element)
            lanes = VECTOR_BYTES // size
            vector = ir.VectorType(element, lanes)
            has_source = builder.icmp_unsigned("!=", source, ir.Constant(source.type, None))

            def fill(vectorised, nontemporal):
                def round_(builder, at, values):
                    kind = vector if vectorised else element
                    before = builder.block
                    zero = ir.Constant(kind, [0] * lanes if vectorised else 0)
                    with builder.if_then(has_source):
                        address = builder.bitcast(builder.gep(source, [at]), kind.as_pointer())
                        loaded = builder.load(address, align=size)
                        inside = builder.block
                    value = builder.phi(kind)
                    value.add_incoming(zero, before)
                    value.add_incoming(loaded, inside)
                    if nontemporal:
                        _write_around(builder, value, out, at)
                    else:
                        address = builder.bitcast(builder.gep(out, [at]), kind.as_pointer())
                        builder.store(value, address, align=size)
                    return []

                return round_

            # The first element on a vector's boundary, and the last vector that fits.
            offset = builder.sub(_i64(0), builder.ptrtoint(builder.gep(out, [begin]), _i64))
            head = builder.udiv(builder.and_(offset, _i64(VECTOR_BYTES - 1)), _i64(size))
            first = builder.add(begin, head)
            first = builder.select(builder.icmp_signed("<", first, end), first, end)
            whole = builder.and_(builder.sub(end, first), _i64(-lanes))
            last = builder.add(first, whole)
            _for(builder, begin, first, 1, [], fill(False, False))
            with builder.if_else(is_large) as (around, through):
                with around:
                    _for(builder, first, last, lanes, [], fill(True, True))
                with through:
                    _for(builder, first, last, lanes, [], fill(True, False))
            _for(builder, last, end, 1, [], fill(False, False))

        def out_size(element):
            return 2 if element == ir.IntType(16) else 8 if isinstance(element, ir.DoubleType) else 4

        function = _function(
            builder.module,
            f"dynconv_fill_{out.dtype}",
            [stored.type, stored.type, _i64, _i64, ir.IntType(1)],
            build,
        )
        builder.call(function, [_data(context, builder, signature, args, 0), stored, args[2], args[3], args[4]])
        return context.get_dummy_value()

    i = types.int64
    return types.void(source, out, i, i, types.boolean), codegen


@intrinsic
def merge_bytes(typingctx, source, source_at, target, target_at, count):
    """target[i] |= source[i] for `count` contiguous bytes, from the offsets given."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8)

        def build(builder, arguments):
            source, target, count = arguments

            def body(builder, at, width):
                kind = ir.VectorType(byte, width) if width > 1 else byte
                one, other = (builder.bitcast(builder.gep(p, [at]), kind.as_pointer()) for p in (source, target))
                merged = builder.or_(builder.load(one, align=1), builder.load(other, align=1))
                builder.store(merged, other, align=1)

            _for_channels(builder, count, 16, body)

        pointer_type = byte.as_pointer()
        function = _function(builder.module, "dynconv_merge_bytes", [pointer_type, pointer_type, _i64], build)
        operands = [builder.gep(_data(context, builder, signature, args, which), [args[which + 1]]) for which in (0, 2)]
        builder.call(function, [*operands, args[4]])
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64, types.int64), codegen


DIGEST_BYTES = 256  # four vectors of AVX-512, as each has to wait for its own multiplication
_FACTOR = 0x9E3779B97F4A7C15  # odd: multiplying by it is a bijection of 64 bits


def _mixed(builder: ir.IRBuilder, state: ir.Value, word: ir.Value) -> ir.Value:
    """A bijection of either argument while the other one stands still, in every lane."""
    product = builder.mul(builder.xor(state, word), _constant(state.type, _FACTOR))
    high = builder.shl(product, _constant(state.type, 31))
    return builder.or_(high, builder.lshr(product, _constant(state.type, 33)))


@intrinsic
def mixed(typingctx, state, word):
    """A bijection of either number while the other one stands still."""

    def codegen(context, builder, signature, args):
        return _mixed(builder, *args)

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic
def digest_blocks(typingctx, address, blocks):
    """64 bits of so many blocks of DIGEST_BYTES: each lane mixes its words in turn, and then they are mixed."""

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(_i64, DIGEST_BYTES // 8)
        base = builder.inttoptr(args[0], vector.as_pointer())

        def body(builder, block, carried):
            return [_mixed(builder, carried[0], builder.load(builder.gep(base, [block]), align=1))]

        (states,) = _for(builder, _i64(0), args[1], 1, [_constant(vector, _FACTOR)], body)
        result = _i64(_FACTOR)
        for lane in range(vector.count):
            result = _mixed(builder, result, builder.extract_element(states, ir.IntType(32)(lane)))
        return result

    return types.uint64(types.int64, types.int64), codegen
