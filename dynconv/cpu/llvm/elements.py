"""Operations on single elements, vectors and runs of them that Numba has no words for."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .build import (
    VECTOR_BYTES,
    data_of,
    for_channels,
    for_range,
    i64,
    internal_function,
    load_vector,
    narrow,
    prefetch_line,
    splat,
    store_vector,
    widen,
    write_around,
)


@intrinsic
def pointer(typingctx, address, dtype):
    """The address as a pointer to `dtype` elements."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), codegen


@intrinsic
def address_of(typingctx, array):
    """The address of an array's first element."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, i64)

    return types.int64(array), codegen


@njit(inline="always")
def is_given(array):
    """Whether an operand is a tensor, and not None."""
    return address_of(array) != 0


@intrinsic
def positive(typingctx, step):
    """The step of a `range`, promised to be above zero: Numba then has no check of it left that could raise."""

    def codegen(context, builder, signature, args):
        kind, name = ir.FunctionType(ir.VoidType(), [ir.IntType(1)]), "llvm.assume"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [builder.icmp_signed(">", args[0], i64(0))])
        return args[0]

    return types.int64(types.int64), codegen


@intrinsic
def load(typingctx, array, offset, compute):
    """array[offset] as a `compute` float, whatever the storage type (see the module's docstring)."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return widen(builder, builder.load(builder.gep(data, [args[1]])), array.dtype)

    return compute.dtype(array, types.int64, compute), codegen


@intrinsic
def prefetch(typingctx, array, offset):
    """Ask for the cache line of array[offset], which may lie past its end."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        prefetch_line(builder, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def copy_vector(typingctx, source, source_at, target, target_at):
    """Copy one vector of elements, widened to the compute type."""

    def codegen(context, builder, signature, args):
        source_data, target_data = (
            context.make_array(signature.args[which])(context, builder, args[which]).data for which in (0, 2)
        )
        value = load_vector(builder, builder.gep(source_data, [args[1]]), source.dtype)
        store_vector(builder, value, builder.gep(target_data, [args[3]]))
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
        value = load_vector(builder, builder.gep(source_data, [args[1]]), source.dtype)
        before = load_vector(builder, address, target.dtype)
        factor = splat(builder, args[2], value.type)
        store_vector(builder, builder.fadd(before, builder.fmul(factor, value)), address)
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
            offset = builder.add(args[1], builder.mul(args[2], i64(i)))
            rows.append(load_vector(builder, builder.gep(source_data, [offset]), source.dtype))
        # A perfect shuffle of the rows rotates the bits of (row, lane) by one; log2(lanes) of them transpose.
        half = lanes // 2
        low, high = (
            ir.Constant(ir.VectorType(ir.IntType(32), lanes), [n for i in range(half) for n in (b + i, b + i + lanes)])
            for b in (0, half)
        )
        for _ in range(lanes.bit_length() - 1):
            rows = [builder.shuffle_vector(rows[i], rows[i + half], mask) for i in range(half) for mask in (low, high)]
        for j, row in enumerate(rows):
            store_vector(builder, row, builder.gep(target_data, [builder.add(args[4], i64(j * lanes))]))
        return context.get_dummy_value()

    i = types.int64
    return types.void(source, i, i, target, i), codegen


@intrinsic
def store(typingctx, array, offset, value):
    """array[offset] = value, rounded to nearest even where the storage type is a half."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.store(narrow(builder, args[2], array.dtype), builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), codegen


@intrinsic
def fill_elements(typingctx, source, out, begin, end, is_large):
    """out[begin:end] = source[begin:end], or zeros where `source` is an array at address 0; whole vectors go around
    the cache where `is_large`: what is written is then not read from memory first, and pushes nothing out."""

    def codegen(context, builder, signature, args):
        stored = data_of(context, builder, signature, args, 1)

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
                        write_around(builder, value, out, at)
                    else:
                        address = builder.bitcast(builder.gep(out, [at]), kind.as_pointer())
                        builder.store(value, address, align=size)
                    return []

                return round_

            # The first element on a vector's boundary, and the last vector that fits.
            offset = builder.sub(i64(0), builder.ptrtoint(builder.gep(out, [begin]), i64))
            head = builder.udiv(builder.and_(offset, i64(VECTOR_BYTES - 1)), i64(size))
            first = builder.add(begin, head)
            first = builder.select(builder.icmp_signed("<", first, end), first, end)
            whole = builder.and_(builder.sub(end, first), i64(-lanes))
            last = builder.add(first, whole)
            for_range(builder, begin, first, 1, [], fill(False, False))
            with builder.if_else(is_large) as (around, through):
                with around:
                    for_range(builder, first, last, lanes, [], fill(True, True))
                with through:
                    for_range(builder, first, last, lanes, [], fill(True, False))
            for_range(builder, last, end, 1, [], fill(False, False))

        def out_size(element):
            return 2 if element == ir.IntType(16) else 8 if isinstance(element, ir.DoubleType) else 4

        function = internal_function(
            builder.module,
            f"dynconv_fill_{out.dtype}",
            [stored.type, stored.type, i64, i64, ir.IntType(1)],
            build,
        )
        builder.call(function, [data_of(context, builder, signature, args, 0), stored, args[2], args[3], args[4]])
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

            for_channels(builder, count, 16, body)

        pointer_type = byte.as_pointer()
        function = internal_function(builder.module, "dynconv_merge_bytes", [pointer_type, pointer_type, i64], build)
        operands = [
            builder.gep(data_of(context, builder, signature, args, which), [args[which + 1]]) for which in (0, 2)
        ]
        builder.call(function, [*operands, args[4]])
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64, types.int64), codegen
