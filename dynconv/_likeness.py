"""Whether a call is like an earlier one in all that its checks and its way go by, but for the values of its tensors.

What a call checks takes up to 0.1 ms where the layer before has pushed Python out of the cache; a layer of a small
network takes as long. The comparison here is two calls into PyTorch: `torch.compile` guards its graphs by the same.
"""

from __future__ import annotations

from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.autograd import forward_ad, profiler

from . import calibration
from ._backend import current, forced_backend, observed

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # private to PyTorch: without it every call is checked anew
    TensorGuards = None


class Likeness:
    """What a call of `unwatched` tensors, all of them other objects, has been made with."""

    def __init__(self, *tensors: Tensor) -> None:
        self._settings, self._calibration, self._threads = _settings(), calibration.edition, get_num_threads()
        self._is_grad_enabled = is_grad_enabled()
        sizes, strides = ([list(of(t)) for t in tensors] for of in (Tensor.size, Tensor.stride))
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def holds(self, *tensors: Tensor | None) -> bool:
        """Whether as many others have the kinds, types, devices, sizes and strides of those, under the same settings.

        These are the modes of PyTorch and of this package that a call may be run in, transforms and whether gradients
        are asked for; that nobody compiles is for the caller to see. What is no tensor is like none.
        """
        settings = current.settings
        if settings is None:
            settings = current.settings = _settings()
        # PyTorch's own modes, as of fake tensors, hide from the guards. Here stands what `is_intercepted` calls: each
        # function more that has left the cache takes 1 to 2 us.
        return (
            self._guards.check(*tensors)
            and settings == self._settings
            # The guards look at what a tensor requires, not at whether anybody asks for it now.
            and is_grad_enabled() is self._is_grad_enabled
            and _len_torch_function_stack() == 0
            and _len_torch_dispatch_stack() == 0
            and not profiler._is_profiler_enabled
            and forward_ad._current_level < 0
            and calibration.edition == self._calibration
            and get_num_threads() == self._threads
        )


def can_be_like(*tensors: object) -> bool:
    """Whether there may be a `Likeness` for a call: of other tensors, and not where each call has to be looked at."""
    different = {id(tensor) for tensor in tensors}
    return TensorGuards is not None and not calibration.is_watched() and len(different) == len(tensors)


def _settings() -> tuple:
    return calibration.is_watched(), calibration.mode(), forced_backend(), observed.value
