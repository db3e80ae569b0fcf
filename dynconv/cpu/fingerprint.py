"""A fingerprint of tensors' values: whether anybody has written to them, by whatever way."""

from __future__ import annotations

from array import array as array_of
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ._common import SERIAL, array, ceil
from ._threads import kernel, next_item, workers
from .llvm.digest import DIGEST_BYTES, digest_blocks, mixed
from .llvm.elements import pointer

_CHUNK = 1 << 15  # bytes for one thread at a time
_BLOCK = DIGEST_BYTES


@njit
def _digest(start, size):
    """64 bits of a chunk's bytes."""
    blocks = size // _BLOCK
    result = digest_blocks(start, blocks)
    rest = carray(pointer(start, np.uint8), (size,))
    for byte in range(blocks * _BLOCK, size):
        result = mixed(result, np.uint64(rest[byte]))
    return result


@kernel
def _fingerprint_kernel(shared, places_at, digests_at, chunks):
    """digests[chunk] = 64 bits of a chunk of a tensor's memory: the tensors one behind the other, each cut anew.

    `places_at` is the address of the address and the number of bytes of each.
    """
    places, digests = array(places_at, np.int64), array(digests_at, np.uint64)
    while True:
        chunk = next_item(shared)
        if chunk >= chunks:
            return
        at, first = 0, chunk
        while first * _CHUNK >= max(places[at + 1], 1):
            first -= max(1, (places[at + 1] + _CHUNK - 1) // _CHUNK)
            at += 2
        start = first * _CHUNK
        digests[chunk] = _digest(places[at] + start, min(_CHUNK, places[at + 1] - start))


def fingerprint(tensors: Sequence[Tensor]) -> bytes:
    """Tell whether a value in the memory of tensors of certain shapes and strides has changed: it then changes as well.

    A change of one aligned word of 8 bytes always shows: every step is a bijection. Of several changes in one chunk,
    that they cancel has a chance of about 2^-64.
    """
    places, copies, chunks, size = [], [], 0, 0
    for tensor in tensors:
        if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
            tensor = tensor.contiguous()
            copies.append(tensor)
        bytes_ = tensor.nbytes
        places += (tensor.data_ptr(), bytes_)
        chunks += max(1, ceil(bytes_, _CHUNK))
        size += bytes_
    places, digests = array_of("q", places), array_of("Q", bytes(8 * chunks))
    places_at, digests_at = places.buffer_info()[0], digests.buffer_info()[0]
    threads = workers(size // (4 * SERIAL))
    _fingerprint_kernel(torch.float32, threads, places_at=places_at, digests_at=digests_at, chunks=chunks)
    return digests.tobytes()
