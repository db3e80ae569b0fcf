"""The register-tiled inner product under every matrix product of the CPU kernels.

It exists because the matrix product that ATen offers is not the fast one everywhere: on an AMD Zen 5 MKL's `mm` runs at
0.36-0.47 of the rate that oneDNN's convolution reaches on the same cores, this tile at 1.0-1.2 of it, and it reads
gathered rows where they lie. LLVM lowers the vectors to whatever the host has (AVX-512, AVX2, NEON).
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .build import VECTOR_BYTES, clamp, i64, splat

ROWS = 6


def _tile_function(
    module: ir.Module, element: ir.Type, vectors: int, transposed: bool, clamped: bool = False
) -> ir.Function:
    """C[i, j] (+)= sum_k A[i, k] B[k, j] for i < ROWS and j < vectors * lanes, all sums held in registers.

    Plain: A's rows are contiguous in k, and so are B's vectors. Transposed: A's columns are contiguous in i, and
    B's rows in j. Each leaves one stride of A and one of B free. With all four free the loop runs at half the
    rate: LLVM then walks the operands by one serial chain of pointer additions.

    Clamped: the sums begin with a shift for each column, and end between a low and a high value.
    """
    double = isinstance(element, ir.DoubleType)
    size = 8 if double else 4
    lanes = VECTOR_BYTES // size
    kind = "_transposed" if transposed else "_clamped" if clamped else ""
    name = f"dynconv_tile{kind}_{'f64' if double else 'f32'}_{vectors}x{lanes}"
    if name in module.globals:
        return module.globals[name]
    pointer_type, vector = element.as_pointer(), ir.VectorType(element, lanes)
    function = ir.Function(
        module,
        ir.FunctionType(
            ir.VoidType(),
            [pointer_type, i64, pointer_type, i64, pointer_type, i64, i64]
            + ([pointer_type, element, element] if clamped else [ir.IntType(1)]),
        ),
        name,
    )
    function.linkage = "internal"
    function.attributes.add("noinline")
    a, a_stride, b, b_stride, c, c_row, depth, *rest = function.args
    if transposed:
        a_row, a_k, b_k, b_vector = i64(1), a_stride, i64(vectors * lanes), i64(lanes)
    else:
        a_row, a_k, b_k, b_vector = a_stride, i64(1), i64(lanes), b_stride
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
        [build.gep(c, [build.add(build.mul(c_row, i64(i)), i64(j * lanes))]) for j in range(vectors)]
        for i in range(ROWS)
    ]
    starts = []  # (block in front of the loop, the sums it begins with)
    if clamped:
        shift, low, high = rest
        shifts = [build.load(vector_at(build, build.gep(shift, [i64(j * lanes)])), align=size) for j in range(vectors)]
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
    k = build.phi(i64)
    sums = [[build.phi(vector) for _ in range(vectors)] for _ in range(ROWS)]
    for block, values in starts:
        k.add_incoming(i64(0), block)
        for i in range(ROWS):
            for j in range(vectors):
                sums[i][j].add_incoming(values[i][j], block)
    b_base = build.mul(k, b_k)
    columns = [
        build.load(vector_at(build, build.gep(b, [build.add(b_base, build.mul(b_vector, i64(j)))])), align=size)
        for j in range(vectors)
    ]
    a_base = build.mul(k, a_k)
    updated = []
    for i in range(ROWS):
        scalar = build.load(build.gep(a, [build.add(a_base, build.mul(a_row, i64(i)))]), align=size)
        row = splat(build, scalar, vector)
        updated.append([build.call(fma, [row, columns[j], sums[i][j]]) for j in range(vectors)])
    following = build.add(k, i64(1))
    k.add_incoming(following, loop)
    for i in range(ROWS):
        for j in range(vectors):
            sums[i][j].add_incoming(updated[i][j], loop)
    build.cbranch(build.icmp_signed("<", following, depth), loop, done)

    build = ir.IRBuilder(done)
    for i in range(ROWS):
        for j in range(vectors):
            value = updated[i][j]
            if clamped:
                value = clamp(build, value, splat(build, low, vector), splat(build, high, vector))
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


def _clamped_tile(vectors: int):
    @intrinsic
    def tile(typingctx, a, a_at, a_stride, b, b_at, b_stride, c, c_at, c_row, depth, shift, shift_at, low, high):
        def codegen(context, builder, signature, args):
            operands = []
            for which in (0, 3, 6):
                data = context.make_array(signature.args[which])(context, builder, args[which]).data
                operands += [builder.gep(data, [args[which + 1]]), args[which + 2]]
            shifts = context.make_array(signature.args[10])(context, builder, args[10]).data
            function = _tile_function(builder.module, context.get_value_type(a.dtype), vectors, False, clamped=True)
            builder.call(function, [*operands, args[9], builder.gep(shifts, [args[11]]), args[12], args[13]])
            return context.get_dummy_value()

        i = types.int64
        return types.void(a, i, i, b, i, i, c, i, i, i, shift, i, low, high), codegen

    return tile


_clamped1, _clamped2, _clamped3, _clamped4 = (_clamped_tile(vectors) for vectors in (1, 2, 3, 4))


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
def clamped_tile(vectors, a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high):
    """C[i, j] = multiply_tile's sum + shift[shift_at + j], no less than low, no more than high; NaN stays NaN."""
    if vectors == 4:
        _clamped4(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)
    elif vectors == 3:
        _clamped3(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)
    elif vectors == 2:
        _clamped2(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)
    else:
        _clamped1(a, a_at, a_row, b, b_at, b_vector, c, c_at, c_row, depth, shift, shift_at, low, high)


@njit(inline="always")
def multiply_transposed_tile(vectors, a, a_at, a_k, b, b_at, c, c_at, c_row, depth, accumulate):
    """`multiply_tile` with A[i, k] at a_at + i + k * a_k and B[k, j] at b_at + k * vectors * lanes + j."""
    if vectors == 4:
        _transposed4(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)
    elif vectors == 3:
        _transposed3(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)
    elif vectors == 2:
        _transposed2(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)
    else:
        _transposed1(a, a_at, a_k, b, b_at, 0, c, c_at, c_row, depth, accumulate)
