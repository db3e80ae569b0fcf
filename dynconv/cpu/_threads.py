"""Compiled kernels on PyTorch's own thread pool.

A second pool would fight PyTorch's for the cores: its workers spin for a while after each parallel region. So a
kernel runs in the OpenMP runtime that PyTorch has loaded, with `torch.get_num_threads()` threads. Every thread
runs the same function and takes chunks of work from a shared counter until none is left, so results never depend
on the number of threads. Where the runtime has no such entry point (a PyTorch built without OpenMP), the calling
thread does all the work.
"""

from __future__ import annotations

import ctypes
import functools
import re
from array import array
from collections.abc import Callable
from types import FunctionType

import torch
from numba import types
from numba.core.ccallback import CFunc

from . import _cache, _llvm

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
    """What the elements of a storage type are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# By name, what has been compiled for which element type; this also keeps it alive.
KERNELS: dict[str, dict[torch.dtype, CFunc]] = {}
_SIGNATURE = types.void(types.CPointer(types.int64))
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _entry(address):
    """What Numba compiles for a kernel, whose body and types come in as globals."""
    body(address, storage, compute)  # noqa: F821


def kernel(body: Callable) -> Callable[..., None]:
    """Turn `body(arguments, storage, compute)`, an njit function, into `run(dtype, threads, *arguments)`.

    The body sees an int64 array: elements 0 and 1 are shared counters that start at zero (the next chunk of work
    and the next worker's number), the caller's sizes and addresses follow from element 2. `run.start(dtype, threads,
    numbers)` takes that array as a whole, which the body may write to. Compiled at the first call for each element
    type, then kept on disk.

    Nothing in a body can raise: Numba would print the exception and go on. A division by zero gives zero, in every
    function that the entry calls (they inherit its error model), `positive` is the step of a `range`, and memory comes
    from the caller.
    """
    full_name = f"{body.__module__}.{body.__qualname__}".removeprefix("dynconv.cpu.")
    KERNELS[full_name] = {}

    @functools.cache
    def compiled(dtype: torch.dtype) -> int:
        if dtype == torch.float16 and not _llvm.CONVERTS_FLOAT16:
            raise TypeError("input: expected another type than torch.float16, which this CPU cannot convert (no F16C)")
        storage, compute = STORAGE[dtype]
        name = f"{full_name}-{dtype}".replace("torch.", "")
        names = {"body": body, "storage": storage, "compute": compute, "__name__": __name__}
        entry = FunctionType(_entry.__code__, names)
        # Numba names the symbol after it, and every process numbers its symbols anew.
        entry.__qualname__ = re.sub(r"\W", "_", name)
        KERNELS[full_name][dtype] = _cache.compiled(name, entry, _SIGNATURE, error_model="numpy")
        return KERNELS[full_name][dtype].address

    def start(dtype: torch.dtype, threads: int, numbers: array) -> None:
        address, (packed, _) = compiled(dtype), numbers.buffer_info()
        if _parallel is not None and threads > 1:
            _parallel(address, packed, threads, 0)
        else:
            _FUNCTION(address)(packed)

    def run(dtype: torch.dtype, threads: int, *arguments: int) -> None:
        start(dtype, threads, array("q", (0, 0, *arguments)))

    run.start = start
    return run


def workers(items: int) -> int:
    """How many threads to put on that many independent pieces of work."""
    return max(1, min(torch.get_num_threads(), items))
