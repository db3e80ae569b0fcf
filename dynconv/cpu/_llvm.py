"""The few operations that Numba has no words for, written as LLVM intrinsics.

`multiply_tile` is the register-tiled inner product under every CPU kernel. It exists because the matrix
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


def _widen(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """A loaded element, or a vector of them, in the type to compute in."""

    def like(element: ir.Type) -> ir.Type:
        return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element

    if storage == types.uint16:  # bfloat16 is the upper half of a float32
        wide = builder.zext(value, like(ir.IntType(32)))
        sixteen = ir.IntType(32)(16) if wide.type == ir.IntType(32) else wide.type([16] * wide.type.count)
        return builder.bitcast(builder.shl(wide, sixteen), like(ir.FloatType()))
    if storage == types.int16:
        return builder.fpext(builder.bitcast(value, like(ir.HalfType())), like(ir.FloatType()))
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


@intrinsic
def store(typingctx, array, offset, value):
    """array[offset] = value, rounded to nearest even where the storage type is a half."""
    storage = array.dtype

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        value = args[2]
        if storage == types.uint16:
            i32 = ir.IntType(32)
            bits = builder.bitcast(value, i32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
            rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(i32, 0x7FFF)), odd), ir.Constant(i32, 16))
            # The carry of the rounding would turn some NaNs into infinities.
            rounded = builder.select(builder.fcmp_unordered("uno", value, value), ir.Constant(i32, 0x7FC0), rounded)
            value = builder.trunc(rounded, ir.IntType(16))
        elif storage == types.int16:
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        builder.store(value, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


def _tile_function(module: ir.Module, element: ir.Type, vectors: int, transposed: bool) -> ir.Function:
    """C[i, j] (+)= sum_k A[i, k] B[k, j] for i < ROWS and j < vectors * lanes, all sums held in registers.

    Plain: A's rows are contiguous in k, and so are B's vectors. Transposed: A's columns are contiguous in i, and
    B's rows in j. Each leaves one stride of A and one of B free. With all four free the loop runs at half the
    rate: LLVM then walks the operands by one serial chain of pointer additions.
    """
    double = isinstance(element, ir.DoubleType)
    size = 8 if double else 4
    lanes = VECTOR_BYTES // size
    name = f"dynconv_tile{'_transposed' if transposed else ''}_{'f64' if double else 'f32'}_{vectors}x{lanes}"
    if name in module.globals:
        return module.globals[name]
    pointer_type, vector = element.as_pointer(), ir.VectorType(element, lanes)
    function = ir.Function(
        module,
        ir.FunctionType(
            ir.VoidType(),
            [pointer_type, _i64, pointer_type, _i64, pointer_type, _i64, _i64, ir.IntType(1)],
        ),
        name,
    )
    function.linkage = "internal"
    function.attributes.add("noinline")
    a, a_stride, b, b_stride, c, c_row, depth, accumulate = function.args
    if transposed:
        a_row, a_k, b_k, b_vector = _i64(1), a_stride, _i64(vectors * lanes), _i64(lanes)
    else:
        a_row, a_k, b_k, b_vector = a_stride, _i64(1), _i64(lanes), b_stride
    for operand in (a, b, c):
        operand.add_attribute("noalias")
    fma_name = f"llvm.fma.v{lanes}{'f64' if double else 'f32'}"
    fma = module.globals.get(fma_name) or ir.Function(module, ir.FunctionType(vector, [vector] * 3), fma_name)

    entry, resume, loop, done = (function.append_basic_block(n) for n in ("entry", "resume", "loop", "done"))
    zero = ir.Constant(vector, [ir.Constant(element, 0.0)] * lanes)

    def vector_at(builder: ir.IRBuilder, base: ir.Value) -> ir.Value:
        return builder.bitcast(base, vector.as_pointer())

    build = ir.IRBuilder(entry)
    outputs = [
        [build.gep(c, [build.add(build.mul(c_row, _i64(i)), _i64(j * lanes))]) for j in range(vectors)]
        for i in range(ROWS)
    ]
    build.cbranch(accumulate, resume, loop)

    build = ir.IRBuilder(resume)
    before = [[build.load(vector_at(build, out), align=size) for out in row] for row in outputs]
    build.branch(loop)

    build = ir.IRBuilder(loop)
    k = build.phi(_i64)
    sums = [[build.phi(vector) for _ in range(vectors)] for _ in range(ROWS)]
    k.add_incoming(_i64(0), entry)
    k.add_incoming(_i64(0), resume)
    for sum_row, before_row in zip(sums, before, strict=True):
        for total, value in zip(sum_row, before_row, strict=True):
            total.add_incoming(zero, entry)
            total.add_incoming(value, resume)
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
            build.store(updated[i][j], vector_at(build, outputs[i][j]), align=size)
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
