"""Weights in the memory order in which the CPU's tiles read them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import SERIAL, ceil, clear, copy, pack_panel, vector_lanes
from ._layout import Compute, Storage
from ._threads import compute_type, kernel, next_item, workers
from .llvm.elements import copy_vector


@kernel
def _by_output_kernel(shared, compute, weight: Storage, packed: Compute, groups, filters, depth, lanes, chunk, chunks):
    """weight [group, Cout of a group, depth] -> [group, panel of output channels, depth, lane]."""
    panels = (filters + lanes - 1) // lanes
    while True:
        item = next_item(shared)
        if item >= groups * panels * chunks:
            return
        panel, first = item // chunks, item % chunks * chunk
        filter_ = panel % panels * lanes
        source, valid = (panel // panels * filters + filter_) * depth, min(lanes, filters - filter_)
        at = (panel * depth + first) * lanes
        pack_panel(weight, source, valid, depth, first, min(depth, first + chunk), packed, at, lanes, compute)


@kernel
def _by_input_kernel(shared, compute, weight: Storage, packed: Compute, groups, filters, taps, channels, lanes):
    """weight [group, Cout of a group, tap, Cin of a group] -> [group, panel of input channels, tap, Cout, lane]."""
    panels = (channels + lanes - 1) // lanes
    while True:
        item = next_item(shared)
        if item >= groups * panels * taps:
            return
        panel, tap = item // taps, item % taps
        channel, first = panel % panels * lanes, panel // panels * filters
        valid = min(lanes, channels - channel)
        for filter_ in range(filters):
            source = ((first + filter_) * taps + tap) * channels + channel
            target = (item * filters + filter_) * lanes
            if valid == lanes:
                copy_vector(weight, source, packed, target)
            else:
                copy(weight, source, valid, packed, target, lanes, compute)
                clear(packed, target + valid, lanes - valid, compute)


class Packing:
    """A weight's columns (output channels, or input channels) in panels of one vector, as the tiles read them.

    Args:
        weight: of the size and type of those to pack.
        groups: of the convolution.
        by_output: whether the columns are output channels.
    """

    def __init__(self, weight: Tensor, groups: int, by_output: bool = True) -> None:
        filters, channels, height, width = weight.shape
        filters, taps, lanes = filters // groups, height * width, vector_lanes(weight.dtype)
        panels = groups * ceil(filters if by_output else channels, lanes)
        self.dtype, self.size = weight.dtype, panels * lanes * taps * (channels if by_output else filters)
        self.threads = workers(self.size // SERIAL)
        kernel_ = _by_output_kernel if by_output else _by_input_kernel
        sizes = {"groups": groups, "filters": filters, "lanes": lanes}
        if by_output:
            chunk = 16 * lanes
            sizes |= {"depth": taps * channels, "chunk": chunk, "chunks": ceil(taps * channels, chunk)}
        else:
            sizes |= {"taps": taps, "channels": channels}
        self.start, self.at = kernel_.start, kernel_.at
        self.numbers = kernel_.pack(weight=None, packed=None, **sizes)

    def run(self, weight: Tensor, at: int) -> None:
        """Write the channels_last weight's `size` elements to an address, in the compute type."""
        numbers = self.numbers[:]
        numbers[self.at.weight], numbers[self.at.packed] = weight.data_ptr(), at
        self.start(self.dtype, self.threads, numbers)


def packed_weight(weight: Tensor, groups: int, by_output: bool) -> Tensor:
    """The weight as `Packing` writes it."""
    packing = Packing(weight, groups, by_output)
    packed = torch.empty(packing.size, dtype=compute_type(weight.dtype))
    packing.run(weight.contiguous(memory_format=torch.channels_last), packed.data_ptr())
    return packed
