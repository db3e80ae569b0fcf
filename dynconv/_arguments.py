"""What the checks of arguments share: how an error names what came, and the cure where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._backend import check_tracer


def kind_of(value: object) -> str:
    """Name the kind of an argument that should be a tensor, and how to make one of it where that is known."""
    check_tracer(value)
    kind = type(value).__name__
    return f"{kind} (torch.from_numpy makes a tensor of it)" if type(value).__module__ == "numpy" else kind


def check_size(size: Sequence[int], names: str) -> None:
    """Raise where the size that a mask broadcasts to is not a tuple or list of as many numbers as it has names."""
    if not isinstance(size, (tuple, list)):
        raise TypeError(f"size: expected ({names}), got {size!r}")
    if len(size) != names.count(",") + 1:
        raise ValueError(f"size: expected ({names}), got {tuple(size)}")


def check_mask(mask: Tensor) -> None:
    """Raise TypeError where a mask is neither a bool nor a floating tensor."""
    check_tracer(mask)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a bool or floating tensor, got {kind_of(mask)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask: expected a bool or floating tensor, got {mask.dtype} (.bool() makes a bool one)")


def check_pixels(name: str, samples: int, height: int, width: int) -> None:
    """Raise ValueError where a map has more pixels than the kernels can number, which do so in int32."""
    if samples * height * width >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2^31 pixels, got {samples} x [{height}, {width}]")
