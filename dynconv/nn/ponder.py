"""Ponder maps: how often each pixel was computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks_with_kwargs, register_module_forward_hook

from .._backend import Setting
from ..sites import ActiveSites
from .blocks import MaskedBlock
from .masked_conv import MaskedConv2d


class PonderMap:
    """The masks with which masked layers and blocks were called, and their sum over the picture.

    Attributes:
        masks: bool [N, 1, Ho, Wo] for each call, in order, at the resolution of its output; all true for a call
            without a mask.
    """

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def count(self, size: tuple[int, int] | None = None) -> Tensor:
        """float32 [N, 1, H, W] in 0 .. len(masks): how often each pixel was computed, each mask scaled by nearest.

        Args:
            size: (H, W), the photo's for example; None takes the finest mask's.

        Raises ValueError where nothing was recorded, or calls of different batch sizes were.
        """
        if not self.masks:
            raise ValueError("masks: expected at least one call of a masked layer or block, got none")
        batches = sorted({mask.shape[0] for mask in self.masks})
        if len(batches) > 1:
            raise ValueError(f"masks: expected calls of one batch size, got {', '.join(map(str, batches))}")
        if size is None:
            size = max((tuple(mask.shape[2:]) for mask in self.masks), key=lambda size: size[0] * size[1])
        total = torch.zeros(batches[0], 1, *size, device=self.masks[0].device)
        for mask in self.masks:
            total += F.interpolate(mask.to(total.device, total.dtype), size, mode="nearest")
        return total

    def _record(self, module, arguments, keywords, output) -> None:
        if self not in _recording.value or not isinstance(module, (MaskedBlock, MaskedConv2d)):
            return
        mask = arguments[1] if len(arguments) > 1 else keywords.get("mask")
        *samples, _, height, width = output.shape  # no samples where the input was one image
        if mask is None:
            active = torch.ones((), dtype=torch.bool, device=_device(output))
        elif isinstance(mask, ActiveSites):
            active = mask.mask
        else:
            active = mask.detach() != 0
        # A copy: a mask may be refilled for the next picture.
        self.masks.append(active.expand(*(samples or (1,)), 1, height, width).clone())


def _device(output) -> torch.device:
    return output.device if isinstance(output, Tensor) else output.rows.device


_recording = Setting(())  # the maps of this thread


@contextmanager
def ponder_map() -> Iterator[PonderMap]:
    """Record where the modules of `dynconv.nn` compute inside the `with` block, in its thread.

    The ponder cost map of DynConv (Verelst & Tuytelaars, CVPR 2020). A residual block is one call, with the mask of
    its output. Calls of `dynconv.masked_conv2d` itself are not seen; compiled models are not supported. Outside of the
    block nothing is recorded and nothing costs time.

    Example:
        >>> conv, photo = dynconv.nn.MaskedConv2d(3, 8, 3, padding=1), torch.randn(1, 3, 6, 6)
        >>> with dynconv.ponder_map() as ponder:
        ...     y = conv(photo, torch.eye(6, dtype=torch.bool).view(1, 1, 6, 6))
        >>> ponder.count(photo.shape[2:]).sum().item()  # how many of the len(ponder.masks) calls computed each pixel
        6.0
    """
    ponder = PonderMap()
    handle = register_module_forward_hook(ponder._record, with_kwargs=True)
    try:
        with _recording.using((*_recording.value, ponder)):
            yield ponder
    finally:
        handle.remove()
        # PyTorch 2.13 forgets this entry, and torch.compile warns of a hook as long as it is there.
        _global_forward_hooks_with_kwargs.pop(handle.id, None)
