"""The active channels of each sample: which to read or to compute, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor


class ActiveChannels:
    """The channels that a mask keeps for each sample, made once and shared by every layer that uses them.

    Args:
        mask: bool or floating, broadcastable to [N, C]. A floating mask is a gate: a channel is kept where it is not
            zero, and its value multiplies the channel. With a granularity, broadcastable to [N, ceil(C / granularity)].
        size: (N, C), needed where the mask itself is smaller and broadcasts, and with a granularity.
        granularity: the channels that each element of the mask stands for, at least 1: the channel groups of LAUDNet
            (Han et al., 2023).

    Attributes:
        mask: bool [N, C].
        gate: the floating mask [N, C] itself, part of the autograd graph and not to be changed in place, or None.
        index: int32 [N, C]; the first `count[n]` entries of row n are the sample's kept channels in ascending order,
            the others are -1.
        count: int32 [N].

    All are on the mask's device, and making them waits for nothing there.

    Raises:
        TypeError: the mask is neither bool nor floating, or the granularity is no int.
        ValueError: the mask does not broadcast to [N, C] or the coarser groups, or the granularity is below 1.
    """

    def __init__(self, mask: Tensor, size: tuple[int, int] | None = None, *, granularity: int = 1) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a bool or floating tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask: expected a bool or floating tensor, got {mask.dtype}")
        if not isinstance(granularity, int) or isinstance(granularity, bool):
            raise TypeError(f"granularity: expected an int, got {granularity!r}")
        if granularity < 1:
            raise ValueError(f"granularity: expected at least 1, got {granularity}")
        if size is None:
            if granularity != 1:
                raise ValueError("size: expected (N, C) beside a granularity, got None")
            if mask.dim() != 2:
                raise ValueError(f"mask: expected shape [N, C], got {list(mask.shape)}")
            size = (mask.shape[0], mask.shape[1])
        coarse = (size[0], -(-size[1] // granularity))
        shape = mask.shape
        if len(shape) > 2 or any(have not in (1, want) for have, want in zip(shape[::-1], coarse[::-1], strict=False)):
            raise ValueError(f"mask: expected a shape that broadcasts to {list(coarse)}, got {list(shape)}")
        mask = mask.expand(coarse)
        if granularity != 1:
            mask = mask.repeat_interleave(granularity, 1)[:, : size[1]]
        self.gate = None if mask.dtype == torch.bool else mask
        # A copy: whoever refills the mask afterwards must not change half of what is derived from it.
        self.mask = mask.clone(memory_format=torch.contiguous_format) if self.gate is None else mask.detach() != 0
        self.count = self.mask.sum(1, dtype=torch.int32)
        order = self.mask.byte().argsort(stable=True, dim=1, descending=True)
        place = torch.arange(size[1], device=mask.device)
        self.index = torch.where(place < self.count[:, None], order, -1).int()

    @classmethod
    def _all(cls, size: tuple[int, int], device: torch.device) -> ActiveChannels:
        channels = cls.__new__(cls)
        channels.gate = None
        channels.mask = torch.ones(size, dtype=torch.bool, device=device)
        channels.count = torch.full(size[:1], size[1], dtype=torch.int32, device=device)
        channels.index = torch.arange(size[1], dtype=torch.int32, device=device).expand(size).contiguous()
        return channels

    @staticmethod
    def _mask_of(index: Tensor) -> Tensor:
        """The mask behind an index."""
        listed = index >= 0
        mask = torch.zeros_like(index)
        return mask.scatter_reduce_(1, torch.where(listed, index, 0).long(), listed.int(), "amax").bool()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C)."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def inverse(self) -> Tensor:
        """int32 [N, C]: each channel's place among its sample's kept ones, or -1 where it is not kept."""
        place = self.mask.cumsum(1, dtype=torch.int32) - 1
        return torch.where(self.mask, place, -1)

    @property
    def density(self) -> float:
        """The share of channels that is kept; waits for the device."""
        return float(self.mask.float().mean()) if self.mask.numel() else 0.0
