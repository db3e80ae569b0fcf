"""Which implementation an op runs."""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import forward_ad, profiler

BACKENDS = ("triton", "cpu", "reference")


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class _Current(threading.local):
    """What a call has noted of all settings of its thread together; None where one of them may have changed since."""

    settings: tuple | None = None


current = _Current()


class Setting(threading.local):
    """A value that `with` blocks change, each for its own thread: those of other threads may overlap it in any way.

    Thread-local rather than a ContextVar, which torch.compile cannot read; of this it guards on the value.
    """

    def __init__(self, value) -> None:
        self.value = value

    @contextmanager
    def using(self, value) -> Iterator[None]:
        before, self.value = self.value, value
        current.settings = None
        try:
            yield
        finally:
            self.value = before
            current.settings = None


# The GPU that kernels are compiled for, while none of them run; see _launches.
_target = Setting(None)
# Whether calls are run as they are where a profiler or another mode of PyTorch looks on; see `warmup`.
observed = Setting(False)
_forced = Setting(_checked(os.environ["DYNCONV_BACKEND"]) if os.environ.get("DYNCONV_BACKEND") else None)


def backend(name: str) -> AbstractContextManager[None]:
    """Force a backend inside the `with` block, for the calls of its thread: "triton", "cpu" or "reference".

    Without it, and without the environment variable `DYNCONV_BACKEND`, CUDA tensors take "triton" and CPU tensors
    "cpu". "triton" takes CPU tensors only under Triton's interpreter (`TRITON_INTERPRET=1`), "cpu" CPU tensors
    only; "reference" is plain PyTorch and takes any; a program exported under it holds PyTorch's own operators alone,
    which `torch.onnx.export` gets without being told. A backward pass, in whatever thread, takes the backend of its
    forward pass. Raises ValueError for another name.

    Example:
        >>> x, mask = torch.ones(1, 8, 4, 4), torch.rand(1, 1, 4, 4) < 0.5
        >>> with dynconv.backend("reference"):
        ...     y = dynconv.masked_conv2d(x, torch.ones(8, 8, 1, 1), mask=mask)
    """
    return _forced.using(_checked(name))


@contextmanager
def compiled_for(target: str) -> Iterator[None]:
    """Let CPU tensors take the "triton" backend, whose kernels somebody compiles for that GPU and does not run."""
    with _target.using(target), _forced.using("triton"):
        yield


def forced_backend() -> str | None:
    """The backend of the innermost `backend` block, or of the environment variable."""
    return _forced.value


def in_onnx_export() -> bool:
    """Whether `torch.onnx.export(..., dynamo=True)` records what runs."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def is_reference() -> bool:
    """Whether ops are plain PyTorch: where that is forced, and for ONNX, which knows no op of this package."""
    return forced_backend() == "reference" or in_onnx_export()


def backend_for(device: torch.device) -> str:
    """The backend that runs an op on tensors of that device.

    Raises ValueError where the forced one cannot, RuntimeError as `check_tracer`.
    """
    check_tracer(device)
    if is_reference():
        return "reference"
    name = _forced.value or ("cpu" if device.type == "cpu" else "triton")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' takes CPU tensors, got tensors on {device}")
    runs_on_cpu = os.environ.get("TRITON_INTERPRET") == "1" or _target.value is not None
    if name == "triton" and device.type == "cpu" and not runs_on_cpu:
        raise ValueError("backend: 'triton' takes CPU tensors under TRITON_INTERPRET=1 only")
    return name


def check_tracer(value: object) -> None:
    """Refuse what records plain operators, or the active set of its example alone: TorchScript and `torch.fx`."""
    if torch.jit.is_tracing():
        refuse_tracer("torch.jit.trace, or torch.onnx.export(dynamo=False)")
    if isinstance(value, torch.fx.Proxy):
        refuse_tracer("torch.fx.symbolic_trace")


def refuse_tracer(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name}: cannot record dynconv, whose work depends on the values of masks; expected torch.export.export, "
        "torch.compile or torch.onnx.export(..., dynamo=True)"
    )


def is_transformed() -> bool:
    """Whether something is differentiated in forward mode, or transformed by torch.func, at the moment."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_intercepted() -> bool:
    """Whether somebody profiles, differentiates in forward mode or has a mode on, which no tensor need show."""
    return (
        _len_torch_function_stack() > 0
        or _len_torch_dispatch_stack() > 0
        or profiler._is_profiler_enabled
        or observed.value
        or forward_ad._current_level >= 0
    )


def unwatched(*tensors: torch.Tensor | None) -> bool:
    """Whether an op on these tensors may run as the function behind it, without PyTorch's dispatcher.

    Nobody compiles, traces, profiles or intercepts, and no gradient is asked for. The dispatcher takes about 10 us for
    a call that passes it twice, Autograd and all, which small layers notice.
    """
    if torch.compiler.is_compiling() or is_intercepted() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    is_grad_enabled = torch.is_grad_enabled()
    for tensor in tensors:  # a loop, not all(): a generator costs more than all that it does here
        if tensor is not None and (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or (is_grad_enabled and tensor.requires_grad)
            or not (tensor.is_cpu or tensor.is_cuda)
            or tensor.is_neg()  # a view that the dispatcher would resolve
        ):
            return False
    return True


def is_capturing() -> bool:
    """Whether a CUDA graph is captured: what is computed now has values when the graph is replayed, and new ones then.

    So nothing may be kept of it for calls outside of the capture, nor of what is computed there for a graph's sites.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


class kept_property(functools.cached_property):
    """A `functools.cached_property` that does not keep what is made while a CUDA graph is captured."""

    def __get__(self, instance, owner=None):
        if instance is not None and is_capturing():  # not asked for what is kept, which is an attribute then
            return self.func(instance)
        return super().__get__(instance, owner)


def kept(function: Callable, *arguments, **keywords):
    """Call a function whose tensors are kept: they are normal ones in `torch.inference_mode()`, too.

    Training may use them later, and autograd cannot save the tensors that inference mode makes. A compiler has modes of
    its own.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return function(*arguments, **keywords)
    with torch.inference_mode(False):
        return function(*arguments, **keywords)


def keeps_tensors(function: Callable) -> Callable:
    """Let a function always be called as `kept` calls it."""

    @functools.wraps(function)
    def run(*arguments, **keywords):
        return kept(function, *arguments, **keywords)

    return run


def saveable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy of one that inference mode has made, which autograd could not save."""
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


@functools.cache
def module(name: str):
    """A module of this package by its relative name, imported at its first use.

    Importing dynconv needs neither Numba nor Triton, and compiles nothing.
    """
    return importlib.import_module(name, __package__)
