"""What a piece of code launches, and with which machine code: on the GPU that is here, or compiled for another one.

The launchers themselves run. For a GPU that is not here they run on CPU tensors, under a driver that claims to be the
target and with the launch itself left out: what is compiled is what the launcher would run, its specialisation, options
and config. Nothing writes the results then.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from . import _backend

# (backend, architecture, threads to a warp) as Triton names them.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),  # stands for "default", having no row of its own in the tables
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel.

    Attributes:
        name: of the kernel's function, without underscores around it.
        grid: how many programs, in three axes.
        arguments: by the names of the function's parameters, compile-time constants and tensors included.
        kernel: Triton's compiled kernel: `asm`, `metadata`, `hash`.
        warnings: the assembler's about what it could not do as it was told, such as "C7510", which are of wgmma; of a
            compilation for another GPU alone, and where the kernel did not come from Triton's cache.
        seconds: how long it took to compile and, on the GPU that is here, to launch.
    """

    name: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, object]
    kernel: object
    warnings: tuple[str, ...]
    seconds: float


class _Target:
    """What Triton's launcher asks of a driver before it compiles."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.name = name
        self.target = GPUTarget(*TARGETS[name])

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.name  # the key of the kernels' caches

    def get_current_stream(self, device) -> int:
        return 0


@contextmanager
def recorded(target: str | None = None, tell: Callable[[Launch], object] | None = None) -> Iterator[list[Launch]]:
    """Note each launch of a Triton kernel inside the `with` block, in order.

    Args:
        target: one of TARGETS: CPU tensors take the Triton backend, kernels are compiled for that GPU and not run, and
            results are whatever memory held. None: for the GPU that is here, and kernels run.
        tell: called with each launch, which may write what the kernel would have.

    Raises ValueError for another target, and RuntimeError under TRITON_INTERPRET=1, whose kernels are not compiled.
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    import triton
    from triton import knobs
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset, as interpreted kernels are not compiled, got 1")
    found: list[Launch] = []
    run = JITFunction.run

    def launch(self, *arguments, grid, warmup, **options):
        log = io.StringIO()
        began = time.perf_counter()
        with contextlib.nullcontext() if target is None else contextlib.redirect_stdout(log):
            kernel = run(self, *arguments, grid=grid, warmup=warmup or target is not None, **options)
        seconds = time.perf_counter() - began
        named = dict(zip(self.arg_names, arguments)) | options
        size = grid(named) if callable(grid) else grid
        warnings = tuple(sorted(set(re.findall(r"\((C75\d\d)\)", log.getvalue()))))
        found.append(Launch(self.__name__.strip("_"), (*size, 1, 1)[:3], named, kernel, warnings, seconds))
        if tell is not None:
            tell(found[-1])
        return kernel

    with _patched(JITFunction, "run", launch):
        if target is None:
            yield found
            return
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Target(target))
        try:
            with _patched(knobs.nvidia, "dump_ptxas_log", True), _backend.compiled_for(target):
                yield found
        finally:
            triton.runtime.driver._active = before


@contextmanager
def _patched(owner: object, name: str, value: Callable | bool) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
