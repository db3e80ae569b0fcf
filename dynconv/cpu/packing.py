"""Weights in the memory order in which the CPU's tiles read them."""

from __future__ import annotations

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


def packed_weight(weight: Tensor, groups: int, by_output: bool) -> Tensor:
    """The weight's columns (output channels, or input channels) in panels of one vector, as the tiles read them."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    filters, channels = weight.shape[0] // groups, weight.shape[1]
    taps, lanes = weight.shape[2] * weight.shape[3], vector_lanes(weight.dtype)
    panels = groups * ceil(filters if by_output else channels, lanes)
    size = panels * lanes * taps * (channels if by_output else filters)
    packed = torch.empty(size, dtype=compute_type(weight.dtype))
    addresses = (weight.data_ptr(), packed.data_ptr())
    threads = workers(size // SERIAL)
    if by_output:
        chunk = 16 * lanes
        shape = (groups, filters, taps * channels, lanes, chunk, ceil(taps * channels, chunk))
        _run_pack_by_output(weight.dtype, threads, *addresses, *shape)
    else:
        _run_pack_by_input(weight.dtype, threads, *addresses, groups, filters, taps, channels, lanes)
    return packed
