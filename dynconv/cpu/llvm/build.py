"""What LLVM IR is written with: the machine's vectors, elements of every storage type, loops and functions.

Half types have no Numba type on the CPU; they travel as their bits: bfloat16 as `uint16`, float16 as `int16`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

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


i64 = ir.IntType(64)


def like(element: ir.Type, value_type: ir.Type) -> ir.Type:
    """`element`, in a vector as long as the type's if that is one."""
    return ir.VectorType(element, value_type.count) if isinstance(value_type, ir.VectorType) else element


def constant(value_type: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(value_type, [value] * value_type.count if isinstance(value_type, ir.VectorType) else value)


def widen(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """A loaded element, or a vector of them, in the type to compute in."""
    if storage == types.uint16:  # bfloat16 is the upper half of a float32
        wide = builder.zext(value, like(ir.IntType(32), value.type))
        return builder.bitcast(builder.shl(wide, constant(wide.type, 16)), like(ir.FloatType(), value.type))
    if storage == types.int16:
        half = builder.bitcast(value, like(ir.HalfType(), value.type))
        return builder.fpext(half, like(ir.FloatType(), value.type))
    return value


def load_vector(builder: ir.IRBuilder, address: ir.Value, storage: types.Type) -> ir.Value:
    lanes = VECTOR_BYTES // (8 if storage == types.float64 else 4)
    vector = ir.VectorType(address.type.pointee, lanes)
    value = builder.load(builder.bitcast(address, vector.as_pointer()), align=storage.bitwidth // 8)
    return widen(builder, value, storage)


def splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    undefined, index = ir.Constant(vector, ir.Undefined), ir.IntType(32)
    first = builder.insert_element(undefined, scalar, index(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, vector.count), [0] * vector.count))


def store_vector(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    size = 8 if isinstance(value.type.element, ir.DoubleType) else 4
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=size)


def prefetch_line(builder: ir.IRBuilder, address: ir.Value) -> None:
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind, name = ir.FunctionType(ir.VoidType(), [byte, number, number, number]), "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [builder.bitcast(address, byte), number(0), number(3), number(1)])  # to read, to keep, data


def narrow(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """A computed element, or a vector of them, as the storage type: rounded to nearest even where that is a half."""
    if storage == types.uint16:
        i32 = like(ir.IntType(32), value.type)
        bits = builder.bitcast(value, i32)
        odd = builder.and_(builder.lshr(bits, constant(i32, 16)), constant(i32, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, constant(i32, 0x7FFF)), odd), constant(i32, 16))
        # The carry of the rounding would turn some NaNs into infinities.
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), constant(i32, 0x7FC0), rounded)
        return builder.trunc(rounded, like(ir.IntType(16), value.type))
    if storage == types.int16:
        half = builder.fptrunc(value, like(ir.HalfType(), value.type))
        return builder.bitcast(half, like(ir.IntType(16), value.type))
    return value


# Sites whose taps a stencil adds up at a time, and vectors of channels: 8 accumulators in all.
STENCIL_ROWS, STENCIL_VECTORS = 4, 2


def call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    """An LLVM intrinsic over floats, overloaded on the type of its operands."""
    kind = values[0].type
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    suffix = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    name = f"llvm.{name}.{suffix}{'f64' if isinstance(element, ir.DoubleType) else 'f32'}"
    globals_ = builder.module.globals
    function = globals_.get(name) or ir.Function(builder.module, ir.FunctionType(kind, [kind] * len(values)), name)
    return builder.call(function, values)


def clamp(builder: ir.IRBuilder, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """max(low, min(high, x)); NaN stays NaN."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def lanes_of(element: ir.Type) -> int:
    return VECTOR_BYTES // (8 if isinstance(element, ir.DoubleType) else 4)


def read(builder: ir.IRBuilder, base: ir.Value, at: ir.Value, lanes: int, storage: types.Type) -> ir.Value:
    """base[at : at + lanes] widened; one element, not a vector, where lanes is 1."""
    address = builder.gep(base, [at])
    if lanes == 1:
        return widen(builder, builder.load(address), storage)
    return load_vector(builder, address, storage)


def write(
    builder: ir.IRBuilder, value: ir.Value, base: ir.Value, at: ir.Value, lanes: int, storage: types.Type
) -> None:
    value, address = narrow(builder, value, storage), builder.gep(base, [at])
    if lanes > 1:
        address = builder.bitcast(address, value.type.as_pointer())
    builder.store(value, address, align=storage.bitwidth // 8)


def write_around(builder: ir.IRBuilder, value: ir.Value, base: ir.Value, at: ir.Value, *rest) -> None:
    """`write` of a whole, aligned vector around the cache: what is written is not read from memory first."""
    address = builder.bitcast(builder.gep(base, [at]), value.type.as_pointer())
    written = builder.store(value, address, align=VECTOR_BYTES)
    written.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def for_range(builder: ir.IRBuilder, begin: ir.Value, end: ir.Value, step: int, carried: list[ir.Value], body):
    """for at in range(begin, end, step), carrying values: body(builder, at, values) -> their next ones.

    Returns the values after the last round. Leaves the builder behind the loop.
    """
    before = builder.block
    loop, work, done = (builder.append_basic_block() for _ in range(3))
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(i64)
    values = [builder.phi(value.type) for value in carried]
    builder.cbranch(builder.icmp_signed("<", at, end), work, done)
    builder.position_at_end(work)
    following = body(builder, at, values)
    at.add_incoming(begin, before)
    at.add_incoming(builder.add(at, i64(step)), builder.block)
    for value, first, next_value in zip(values, carried, following, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(next_value, builder.block)
    builder.branch(loop)
    builder.position_at_end(done)
    return values


def for_channels(builder: ir.IRBuilder, count: ir.Value, lanes: int, body) -> None:
    """body(builder, at, lanes) for each whole vector of `count` channels, then body(builder, at, 1) for the others."""
    whole = builder.and_(count, i64(-lanes))

    def of(width):
        def round_(builder, at, values):
            body(builder, at, width)
            return []

        return round_

    for_range(builder, i64(0), whole, lanes, [], of(lanes))
    for_range(builder, whole, count, 1, [], of(1))


def for_strips(builder: ir.IRBuilder, count: ir.Value, lanes: int, body) -> None:
    """body(builder, at, vectors, lanes) for strips of `count` channels: STENCIL_VECTORS vectors, one, one element."""
    begin = i64(0)
    for vectors, width in ((STENCIL_VECTORS, lanes), (1, lanes), (1, 1)):
        end = builder.and_(count, i64(-vectors * width))

        def strip(builder, at, values, vectors=vectors, width=width):
            body(builder, at, vectors, width)
            return []

        for_range(builder, begin, end, vectors * width, [], strip)
        begin = end


def carry_vectors(builder: ir.IRBuilder, count: ir.Value, lanes: int, carried: list[ir.Value], body) -> list[ir.Value]:
    """body(builder, at, values, some) -> values: for each whole vector of `count` elements with None, then once more
    with a mask of those left."""
    whole = builder.and_(count, i64(-lanes))
    values = for_range(builder, i64(0), whole, lanes, carried, lambda b, at, v: body(b, at, v, None))
    numbers = ir.VectorType(ir.IntType(32), lanes)
    left = splat(builder, builder.trunc(builder.sub(count, whole), ir.IntType(32)), numbers)
    some = builder.icmp_signed("<", ir.Constant(numbers, list(range(lanes))), left)
    return for_range(builder, whole, count, lanes, values, lambda b, at, v: body(b, at, v, some))


def for_vectors(builder: ir.IRBuilder, count: ir.Value, lanes: int, body) -> None:
    """`carry_vectors` of nothing: body(builder, at, some)."""

    def round_(builder, at, values, some):
        body(builder, at, some)
        return []

    carry_vectors(builder, count, lanes, [], round_)


def _masked(builder: ir.IRBuilder, name: str, kind: ir.Type, result: ir.Type, operands: list[ir.Value]) -> ir.Value:
    """LLVM's masked load or store of vectors of that kind."""
    element = {"half": "f16", "float": "f32", "double": "f64"}.get(str(kind.element), str(kind.element))
    name = f"llvm.masked.{name}.v{kind.count}{element}.p0"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [v.type for v in operands]), name)
    return builder.call(function, operands)


def read_some(
    builder, base: ir.Value, at: ir.Value, lanes: int, storage: types.Type, some: ir.Value | None
) -> ir.Value:
    """base[at : at + lanes] widened; of a mask's lanes only, zeros in the others."""
    if some is None:
        return read(builder, base, at, lanes, storage)
    kind = ir.VectorType(base.type.pointee, lanes)
    address = builder.bitcast(builder.gep(base, [at]), kind.as_pointer())
    alignment, nothing = ir.IntType(32)(storage.bitwidth // 8), constant(kind, 0)
    return widen(builder, _masked(builder, "load", kind, kind, [address, alignment, some, nothing]), storage)


def write_some(builder, value: ir.Value, base, at, lanes: int, storage: types.Type, some: ir.Value | None) -> None:
    if some is None:
        write(builder, value, base, at, lanes, storage)
        return
    value = narrow(builder, value, storage)
    address = builder.bitcast(builder.gep(base, [at]), value.type.as_pointer())
    alignment = ir.IntType(32)(storage.bitwidth // 8)
    _masked(builder, "store", value.type, ir.VoidType(), [value, address, alignment, some])


def internal_function(module: ir.Module, name: str, arguments: list[ir.Type], build) -> ir.Function:
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


def data_of(context, builder, signature, args, which: int) -> ir.Value:
    return context.make_array(signature.args[which])(context, builder, args[which]).data


def nullable(builder: ir.IRBuilder, base: ir.Value, at: ir.Value) -> ir.Value:
    """&base[at], or null where base is."""
    null = ir.Constant(base.type, None)
    return builder.select(builder.icmp_unsigned("==", base, null), null, builder.gep(base, [at]))


def at_address(builder: ir.IRBuilder, address: ir.Value, storage_type: ir.Type) -> ir.Value:
    return builder.inttoptr(address, storage_type.as_pointer())


def int32_at(builder: ir.IRBuilder, numbers: ir.Value, at: ir.Value) -> ir.Value:
    """numbers[at], of int32."""
    return builder.sext(builder.load(builder.gep(numbers, [at])), i64)


def sum_lanes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
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


def transposed_sum(builder: ir.IRBuilder, rows: list[ir.Value]) -> ir.Value:
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
