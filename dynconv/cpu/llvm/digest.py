"""Digests of memory."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .build import constant, for_range, i64

DIGEST_BYTES = 256  # four vectors of AVX-512, as each has to wait for its own multiplication


_FACTOR = 0x9E3779B97F4A7C15  # odd: multiplying by it is a bijection of 64 bits


def _mixed(builder: ir.IRBuilder, state: ir.Value, word: ir.Value) -> ir.Value:
    """A bijection of either argument while the other one stands still, in every lane."""
    product = builder.mul(builder.xor(state, word), constant(state.type, _FACTOR))
    high = builder.shl(product, constant(state.type, 31))
    return builder.or_(high, builder.lshr(product, constant(state.type, 33)))


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
        vector = ir.VectorType(i64, DIGEST_BYTES // 8)
        base = builder.inttoptr(args[0], vector.as_pointer())

        def body(builder, block, carried):
            return [_mixed(builder, carried[0], builder.load(builder.gep(base, [block]), align=1))]

        (states,) = for_range(builder, i64(0), args[1], 1, [constant(vector, _FACTOR)], body)
        result = i64(_FACTOR)
        for lane in range(vector.count):
            result = _mixed(builder, result, builder.extract_element(states, ir.IntType(32)(lane)))
        return result

    return types.uint64(types.int64, types.int64), codegen
