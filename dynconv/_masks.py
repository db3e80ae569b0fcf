"""Masks to measure with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_mask(batch: int, height: int, width: int, density: float, generator: torch.Generator) -> Tensor:
    """[batch, 1, height, width] with round(density * sites) active sites, anywhere: the worst case for locality."""
    return _largest(torch.rand(batch, 1, height, width, generator=generator), density)


def blob_mask(batch: int, height: int, width: int, density: float, generator: torch.Generator) -> Tensor:
    """The same number of sites in blobs, as real masks have them: a smooth random field above a threshold."""
    coarse = torch.randn(batch, 1, max(2, height // 8), max(2, width // 8), generator=generator)
    return _largest(F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False), density)


def channel_mask(samples: int, channels: int, granularity: int, share: float, generator: torch.Generator) -> Tensor:
    """[samples, channels] that keeps round(share * all groups of `granularity` channels), spread over the samples."""
    groups = -(-channels // granularity)
    ends = torch.arange(samples + 1) * round(share * samples * groups) // max(1, samples)
    order = torch.rand(samples, groups, generator=generator).argsort(1)
    return (order < ends.diff()[:, None]).repeat_interleave(granularity, 1)[:, :channels]


def _largest(field: Tensor, density: float) -> Tensor:
    """The share `density` of all sites where the field is largest."""
    mask = torch.zeros(field.numel(), dtype=torch.bool)
    mask[field.flatten().topk(round(density * field.numel())).indices] = True
    return mask.view(field.shape)
