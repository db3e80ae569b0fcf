"""`python -m dynconv warmup`: compile the CPU kernels of ops and element types now, and keep them on disk.

A kernel is otherwise compiled at its first call. Several processes share the work; what is kept already takes no time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from .._warmup import DTYPES, OPS
from .._warmup import warmup as compile_ahead
from . import options, told

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `warmup`."""
    parser.add_argument("--dtypes", nargs="+", choices=tuple(_DTYPES), default=("float32",))
    parser.add_argument("--ops", nargs="+", choices=tuple(OPS), default=tuple(OPS), help="blocks: those of dynconv.nn")
    parser.add_argument("--jobs", type=options.positive, default=os.cpu_count() or 1, help="processes")


def main(arguments: argparse.Namespace) -> int:
    """Compile, and say where it is kept; 1 where there is no folder to keep it in, or something did not compile."""
    from ..cpu import _cache

    folder = _cache.writable_folder()
    if folder is None:  # which has been said
        return 1
    begin, failed = time.perf_counter(), 0
    pieces = [(op, dtype) for op in arguments.ops for dtype in arguments.dtypes]
    context = multiprocessing.get_context("spawn")  # a process that has used threads must not be forked
    with ProcessPoolExecutor(min(arguments.jobs, len(pieces)), context, initializer=_begin) as pool:
        running = {pool.submit(_compile, *piece): piece for piece in pieces}
        try:
            for number, done in enumerate(as_completed(running), 1):
                error, name = done.exception(), " ".join(running[done])
                failed += error is not None
                print(f"{number} of {len(pieces)}: {name}" + (f" FAILED: {error}" if error else ""), flush=True)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()  # what it has compiled is kept
            raise
    print(f"{time.perf_counter() - begin:.0f} s; kept in {folder}")
    return 1 if failed else 0


def _begin() -> None:
    """Set up a process that compiles: in one thread, and stopped by this one alone."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile(op: str, dtype: str) -> None:
    with told():
        compile_ahead(ops=(op,), dtypes=(_DTYPES[dtype],))
