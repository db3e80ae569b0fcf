"""Layers and blocks of chosen channels as `dynconv.calibration.Call`: their work, and masks of some density."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._masks import channel_mask
from ..channels import ActiveChannels

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kept(NamedTuple):
    """What an op gets of an `ActiveChannels`: index [N, C], count [N], and whether a mask chose them, not None."""

    index: Tensor
    count: Tensor
    is_chosen: bool

    @classmethod
    def of(cls, channels: ActiveChannels, is_chosen: bool) -> Kept:
        return cls(channels.index, channels.count, is_chosen)

    @property
    def are_all(self) -> bool:
        """Whether it is known, without waiting for a device, that every sample keeps every channel."""
        if not self.is_chosen:
            return True
        return self.count.is_cpu and min(self.count.tolist(), default=0) == self.index.shape[1]

    def keep(self, values: Tensor, dimension: int) -> Tensor:
        """`values`, zeros at the channels that its sample does not keep, NaN or not; itself where all are kept."""
        if self.are_all:
            return values
        samples, width = self.index.shape
        place = torch.where(self.index >= 0, self.index, width).long()
        kept = torch.zeros(samples, width + 1, dtype=torch.bool, device=place.device).scatter_(1, place, True)
        shape = [samples, *(1,) * (values.dim() - 1)]
        shape[dimension] = width
        return keep_where(kept[:, :-1].reshape(shape), values)

    def at(self, share: float, granularity: int) -> Kept:
        """Others: about that share of the channels kept, by groups."""
        return Kept.of(_made(self.index, granularity, share), True) if self.is_chosen else self


def channels_at(share: float, like: ActiveChannels) -> ActiveChannels:
    """About that share of the channels kept, by the groups and in the shape of `like`, and a gate if that has one."""
    channels = _made(like.index, like.granularity, share)
    channels.granularity = like.granularity
    channels.gate = None if like.gate is None else channels.mask.to(like.gate.dtype)
    return channels


def _made(index: Tensor, granularity: int, share: float) -> ActiveChannels:
    mask = channel_mask(*index.shape, granularity, share, torch.Generator().manual_seed(0))
    return ActiveChannels(mask.to(index.device))


def keep_where(mask: Tensor, values: Tensor) -> Tensor:
    """`torch.where(mask, values, 0)` as a bitwise product, which is several times as fast on a CPU."""
    integer = _INTEGERS[values.element_size()]
    return (values.view(integer) & torch.where(mask, -1, 0).to(integer)).view(values.dtype)


def share_at(density: float, products: Sequence[tuple[float, int]]) -> float:
    """The share to keep along each axis that masks choose from, so that `density` of all products is left.

    `products` are (products without masks, chosen axes of input channels, output channels and sites) of each layer.
    """
    total, low, high = sum(each for each, _ in products), 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        left = sum(each * share**axes for each, axes in products)
        low, high = (low, share) if left > density * total else (share, high)
    return high


class ChannelCall:
    """A convolution or a linear layer of chosen channels: what its two directions share."""

    def __init__(self, ins: Kept, outs: Kept, sites: Tensor | None, each: int) -> None:
        self.ins, self.outs, self.sites, self.each = ins, outs, sites, each

    @property
    def device(self) -> torch.device:
        return self.ins.index.device

    @property
    def work(self) -> int:
        """Pairs of an input and an output channel, at each site of each sample."""
        samples, channels = self.ins.index.shape
        return samples * channels * self.outs.index.shape[1] * self.each

    def kept(self) -> int:
        """The pairs that masks leave; groups are taken to share their channels evenly."""
        counts = [self.ins.count.tolist(), self.outs.count.tolist()]
        if self.sites is None:
            return self.each * sum(map(operator.mul, *counts))
        return sum(map(math.prod, zip(*counts, self.sites.flatten(1).sum(1).tolist(), strict=True)))

    def kept_on_device(self) -> Tensor:
        """The same, where the masks are."""
        sites = self.each if self.sites is None else self.sites.flatten(1).sum(1)
        return (self.ins.count.long() * self.outs.count * sites).sum().view(1)

    def _share_at(self, density: float) -> float:
        axes = self.ins.is_chosen + self.outs.is_chosen + (self.sites is not None)
        return share_at(density, [(1, axes)])
