"""A fingerprint of tensors' values: whether anybody has written to them, by whatever way."""

from __future__ import annotations

from array import array as numbers
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ._common import SERIAL, ceil
from ._llvm import DIGEST_BYTES, digest_blocks, fetch_add, mixed, pointer
from ._threads import kernel, workers

_CHUNK = 1 << 15  # bytes for one thread at a time
_HEADER = 6  # int64 arguments before the first tensor's address and bytes
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


@njit
def _fingerprint_kernel(arguments, storage, compute):
    """digests[chunk] = 64 bits of a chunk of a tensor's memory: the tensors one behind the other, each cut anew."""
    header = carray(arguments, (_HEADER,))
    tensors, chunks, digests = header[2], header[3], carray(pointer(header[4], np.uint64), (header[3],))
    a = carray(arguments, (_HEADER + 2 * tensors,))
    while True:
        chunk = fetch_add(header, 1)
        if chunk >= chunks:
            return
        at, first = _HEADER, chunk
        while first * _CHUNK >= max(a[at + 1], 1):
            first -= max(1, (a[at + 1] + _CHUNK - 1) // _CHUNK)
            at += 2
        start = first * _CHUNK
        digests[chunk] = _digest(a[at] + start, min(_CHUNK, a[at + 1] - start))


_run = kernel(_fingerprint_kernel)


def fingerprint(tensors: Sequence[Tensor]) -> bytes:
    """Another one when a value in the tensors' memory is another one, of tensors whose shapes and strides are the same.

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
    digests = numbers("Q", bytes(8 * chunks))
    threads = workers(size // (4 * SERIAL))
    _run(torch.float32, threads, len(places) // 2, chunks, digests.buffer_info()[0], 0, *places)
    return digests.tobytes()
