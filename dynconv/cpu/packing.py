"""Weights in the memory order in which the CPU's tiles read them."""

from __future__ import annotations

from array import array as array_of

import torch
from numba import carray, njit
from torch import Tensor

from ._common import SERIAL, array, ceil, clear, copy, pack_panel, vector_lanes
from ._llvm import copy_vector, fetch_add
from ._threads import compute_type, kernel, workers


@njit
def _pack_by_output_kernel(arguments, storage, compute):
    """weight [group, Cout of a group, depth] -> [group, panel of output channels, depth, lane]."""
    a = carray(arguments, (16,))
    weight, packed = array(a[2], storage), array(a[3], compute)
    groups, filters, depth, lanes, chunk, chunks = a[4], a[5], a[6], a[7], a[8], a[9]
    panels = (filters + lanes - 1) // lanes
    while True:
        item = fetch_add(a, 1)
        if item >= groups * panels * chunks:
            return
        panel, first = item // chunks, item % chunks * chunk
        filter_ = panel % panels * lanes
        source, valid = (panel // panels * filters + filter_) * depth, min(lanes, filters - filter_)
        at = (panel * depth + first) * lanes
        pack_panel(weight, source, valid, depth, first, min(depth, first + chunk), packed, at, lanes, compute)


@njit
def _pack_by_input_kernel(arguments, storage, compute):
    """weight [group, Cout of a group, tap, Cin of a group] -> [group, panel of input channels, tap, Cout, lane]."""
    a = carray(arguments, (16,))
    weight, packed = array(a[2], storage), array(a[3], compute)
    groups, filters, taps, channels, lanes = a[4], a[5], a[6], a[7], a[8]
    panels = (channels + lanes - 1) // lanes
    while True:
        item = fetch_add(a, 1)
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


_run_pack_by_output = kernel(_pack_by_output_kernel)
_run_pack_by_input = kernel(_pack_by_input_kernel)


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
        if by_output:
            chunk = 16 * lanes
            shape = (groups, filters, taps * channels, lanes, chunk, ceil(taps * channels, chunk))
        else:
            shape = (groups, filters, taps, channels, lanes)
        self.start = (_run_pack_by_output if by_output else _run_pack_by_input).start
        self.numbers = array_of("q", (0, 0, 0, 0, *shape))

    def run(self, weight: Tensor, at: int) -> None:
        """Write the channels_last weight's `size` elements to an address, in the compute type."""
        numbers = self.numbers[:]
        numbers[2], numbers[3] = weight.data_ptr(), at
        self.start(self.dtype, self.threads, numbers)


def packed_weight(weight: Tensor, groups: int, by_output: bool) -> Tensor:
    """The weight as `Packing` writes it."""
    packing = Packing(weight, groups, by_output)
    packed = torch.empty(packing.size, dtype=compute_type(weight.dtype))
    packing.run(weight.contiguous(memory_format=torch.channels_last), packed.data_ptr())
    return packed
