"""The kept channels of each sample on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from ._common import array
from ._threads import kernel


@njit
def _compact_kernel(arguments, storage, compute):
    a = carray(arguments, (8,))
    mask, index, count = array(a[2], np.uint8), array(a[3], np.int32), array(a[4], np.int32)
    samples, channels = a[5], a[6]
    for sample in range(samples):
        at, kept = sample * channels, 0
        for channel in range(channels):
            index[at + kept] = channel
            kept += mask[at + channel] != 0
        count[sample] = kept
        for place in range(kept, channels):
            index[at + place] = -1


_run_compact = kernel(_compact_kernel)


def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index [N, C] and the count [N] of a contiguous bool mask [N, C]; see `dynconv.ActiveChannels`."""
    index = torch.empty(mask.shape, dtype=torch.int32)
    count = torch.empty(mask.shape[0], dtype=torch.int32)
    _run_compact(torch.float32, 1, mask.data_ptr(), index.data_ptr(), count.data_ptr(), *mask.shape)
    return index, count
