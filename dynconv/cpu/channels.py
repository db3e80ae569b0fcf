"""The kept channels of each sample on the CPU."""

from __future__ import annotations

import torch

from ._layout import Int32, UInt8
from ._threads import kernel


@kernel
def _compact_kernel(mask: UInt8, index: Int32, count: Int32, samples, channels):
    for sample in range(samples):
        at, kept = sample * channels, 0
        for channel in range(channels):
            is_kept = mask[at + channel] != 0
            place = kept if is_kept else channels - 1 - (channel - kept)
            index[at + place] = channel if is_kept else ~channel
            kept += is_kept
        count[sample] = kept


def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index [N, C] and the count [N] of a contiguous bool mask [N, C]; see `dynconv.ActiveChannels`."""
    index = torch.empty(mask.shape, dtype=torch.int32)
    count = torch.empty(mask.shape[0], dtype=torch.int32)
    samples, channels = mask.shape
    _compact_kernel(torch.float32, 1, mask=mask, index=index, count=count, samples=samples, channels=channels)
    return index, count
