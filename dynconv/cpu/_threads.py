"""Compiled kernels on PyTorch's own thread pool.

A second pool would fight PyTorch's for the cores: its workers spin for a while after each parallel region. So a
kernel runs in the OpenMP runtime that PyTorch has loaded, with `torch.get_num_threads()` threads. Every thread
runs the same function and takes chunks of work from a shared counter until none is left, so results never depend
on the number of threads. Where the runtime has no such entry point (a PyTorch built without OpenMP), the calling
thread does all the work.

A kernel is called by keywords, the names of its body's parameters; see `_layout`.
"""

from __future__ import annotations

import ctypes
import functools
import re
from array import array as array_of
from collections.abc import Callable

import numpy
import torch
from numba import carray, njit, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from . import _cache
from ._common import array
from ._layout import Layout
from .llvm.build import CONVERTS_FLOAT16

# Storage type of the elements -> (how Numba sees them, what it computes in).
STORAGE = {
    torch.float32: (types.float32, types.float32),
    torch.float64: (types.float64, types.float64),
    torch.bfloat16: (types.uint16, types.float32),
    torch.float16: (types.int16, types.float32),
}

try:
    _parallel = ctypes.CDLL(None).GOMP_parallel
    _parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    _parallel.restype = None
except (AttributeError, OSError, TypeError):
    _parallel = None


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """The type that the elements of a storage type are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# By name, what has been compiled for which element type; this also keeps it alive.
KERNELS: dict[str, dict[torch.dtype, CFunc]] = {}
_SIGNATURE = types.void(types.CPointer(types.int64))
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@intrinsic
def _fetch_add(typingctx, shared, place):
    """Add 1 to a shared counter atomically; its value before the addition."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[1].type(1), "seq_cst")

    return types.int64(shared, types.int64), codegen


@njit(inline="always")
def next_item(shared):
    """The number of a piece of work that no other thread has taken: 0, 1 and so on, past the last one as well."""
    return _fetch_add(shared, 0)


@njit(inline="always")
def next_worker(shared):
    """A number from 0 on that no other thread has, to find its scratch memory by; asked for once."""
    return _fetch_add(shared, 1)


def kernel(body: Callable) -> Callable[..., None]:
    """Turn a body into `run(dtype, threads, *, ...)`, with a keyword for each of its parameters.

    The parameters are the layout of an int64 array, and their annotations say how the body sees it: `_layout.Layout`.
    `run.pack(...)` makes that array of the same keywords, `run.start(dtype, threads, numbers)` takes it as a whole, and
    `run.at` has each number's place in it by name, for who keeps one and changes a few numbers from call to call.
    Compiled at the first call for each element type, then kept on disk.

    Of the parameters `shared` has the counters, see `next_item` and `next_worker`, and `storage` and `compute` are the
    types of the elements and of what is computed with them.

    Nothing in a body can raise: Numba would print the exception and go on. A division by zero gives zero, in every
    function that the entry calls (they inherit its error model), `positive` is the step of a `range`, and memory comes
    from the caller.

    Example:
        @kernel
        def _double_kernel(shared, compute, rows: Storage, out: Storage, count, chunk):
            while True:
                begin = next_item(shared) * chunk
                if begin >= count:
                    return
                for i in range(begin, min(count, begin + chunk)):
                    store(out, i, 2 * load(rows, i, compute))

        _double_kernel(rows.dtype, threads, rows=rows, out=out, count=rows.numel(), chunk=4096)
    """
    full_name, layout = f"{body.__module__}.{body.__qualname__}".removeprefix("dynconv.cpu."), Layout(body)
    KERNELS[full_name] = {}
    # Numba sees the operands' arrays where they are made, and that nothing counts references to them.
    inlined = njit(inline="always")(body)

    @functools.cache
    def compiled(dtype: torch.dtype) -> int:
        if dtype == torch.float16 and not CONVERTS_FLOAT16:
            raise TypeError("input: expected another type than torch.float16, which this CPU cannot convert (no F16C)")
        storage, compute = STORAGE[dtype]
        name = f"{full_name}-{dtype}".replace("torch.", "")
        names = {"array": array, "carray": carray, "numpy": numpy, "storage": storage, "compute": compute}
        entry = layout.entry(names | {"body": inlined})
        # Numba names the symbol after it, and every process numbers its symbols anew.
        entry.__qualname__ = re.sub(r"\W", "_", name)
        KERNELS[full_name][dtype] = _cache.compiled(name, entry, _SIGNATURE, error_model="numpy")
        return KERNELS[full_name][dtype].address

    def start(dtype: torch.dtype, threads: int, numbers: array_of) -> None:
        address, (packed, _) = compiled(dtype), numbers.buffer_info()
        if _parallel is not None and threads > 1:
            _parallel(address, packed, threads, 0)
        else:
            _FUNCTION(address)(packed)

    pack, run = layout.callers(start)
    run.start, run.pack, run.at = start, pack, layout.at
    return run


def workers(items: int) -> int:
    """How many threads to put on that many independent pieces of work."""
    return max(1, min(torch.get_num_threads(), items))
