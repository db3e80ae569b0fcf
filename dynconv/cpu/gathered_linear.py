"""Gathered linear layers on the CPU: for each sample, from the features it keeps to the features it keeps.

With few positions a sample there is nothing to amortise a packed weight over, and gathering single columns of it costs
as much as multiplying them. So the weight is read where it lies, by whole vectors. A block is one vector of input
features, and a row of `spread` holds a position's input in the compute type, zeros at what its sample does not keep.
For each position m of sample n, with F the output features that n keeps, and B the blocks with a feature that it keeps:

    forward       out[m, f]  = sum over b in B of W[f, b] . spread[m, b]  +  bias[f]      for f in F
    input grad    dx[m, b]   = sum over f in F of g[m, f] * W[f, b]                       for b in B
    weight grad   dW[f, b]   = sum over the m whose sample keeps f of g[m, f] * spread[m, b]

So what is skipped is exact in the output features, and in the input features where they are kept by aligned groups of
whole vectors. The order of every sum follows from the shapes and the kept features alone: the same bits on any number
of threads.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from ._common import SERIAL, ceil, clear, copy, lower_bound, vector_lanes
from ._layout import Compute, Int32, Storage
from ._threads import compute_type, kernel, next_item, next_worker, workers
from .llvm.elements import load, positive, store
from .llvm.rows import SUMMED_VECTORS, add_row_products, dot_rows

# Output features, in the forward and in the gradients, and columns of a tile of the weight, which stays in the cache
# while all samples use it.
FEATURES, GRAD_FEATURES, COLUMNS = 32, 64, 1024
TILED = 16  # positions in all from which on a tile is worth a copy


@kernel
def _edges_kernel(index: Int32, counts: Int32, edges: Int32, samples, width, number, step):
    """edges[sample, i] = the first place in a sample's ascending `index` that is not below i * step."""
    for sample in range(samples):
        for i in range(number):
            edges[sample * number + i] = lower_bound(index[sample * width :], np.int64(counts[sample]), i * step)


@kernel
def _spread_kernel(
    shared, compute, source: Storage, spread: Compute, index: Int32, counts: Int32, blocks: Int32, block_counts: Int32,
    samples, positions, features, most_blocks, pitch, lanes,
):  # fmt: skip
    """source [sample, position, feature] -> spread [sample, position, pitch]; blocks [sample, .] and their counts."""
    while True:
        sample = next_item(shared)
        if sample >= samples:
            return
        at, count, to, number = sample * features, np.int64(counts[sample]), sample * most_blocks, 0
        for i in range(count):
            block = np.int64(index[at + i]) // lanes * lanes
            if number == 0 or blocks[to + number - 1] != block:
                blocks[to + number] = block
                number += 1
        block_counts[sample] = number
        for position in range(sample * positions, (sample + 1) * positions):
            clear(spread, position * pitch, pitch, compute)
            for i in range(count):
                feature = np.int64(index[at + i])
                store(spread, position * pitch + feature, load(source, position * features + feature, compute))


@njit
def _copy_tile(weight, begin, end, column, stop, width, tile, at, pitch, lanes, compute):
    """The weight's rows begin..end, columns column..stop, as tile[at:] with rows `pitch` apart.

    In the weight rows may be a power of two apart, and would then push each other out of the cache.
    """
    for feature in range(begin, end):
        copy(weight, feature * width + column, stop - column, tile, at + (feature - begin) * pitch, lanes, compute)


@kernel
def _forward_kernel(
    shared, compute, spread: Compute, blocks: Int32, block_edges: Int32, weight: Storage, bias: Compute, out: Storage,
    index: Int32, edges: Int32, scratch: Compute, samples, positions, features, width, pitch, lanes, tile_pitch,
    scratch_size,
):  # fmt: skip
    """Chunks of output features; each goes through the columns, and in them through the samples."""
    chunks, strips, rows = (features + FEATURES - 1) // FEATURES, (width + COLUMNS - 1) // COLUMNS, samples * positions
    tile = next_worker(shared) * scratch_size
    products = tile + FEATURES * tile_pitch
    while True:
        chunk = next_item(shared)
        if chunk >= chunks:
            return
        begin, end = chunk * FEATURES, min(features, (chunk + 1) * FEATURES)
        clear(scratch, products, rows * FEATURES, compute)
        for strip in range(strips):
            column = strip * COLUMNS
            if rows >= TILED:
                stop = min(width, column + COLUMNS)
                _copy_tile(weight, begin, end, column, stop, width, scratch, tile, tile_pitch, lanes, compute)
            for sample in range(samples):
                edge, block = sample * (chunks + 1) + chunk, sample * (strips + 1) + strip
                at, count = sample * features + np.int64(edges[edge]), np.int64(edges[edge + 1] - edges[edge])
                low, number = np.int64(block_edges[block]), np.int64(block_edges[block + 1] - block_edges[block])
                low += sample * (width // lanes)
                for position in range(sample * positions, (sample + 1) * positions):
                    to = products + position * FEATURES
                    if rows >= TILED:
                        dot_rows(
                            scratch, tile - begin * tile_pitch - column, tile_pitch, index, at, count,
                            spread, position * pitch, blocks, low, number, scratch, to,
                        )  # fmt: skip
                    else:
                        dot_rows(
                            weight, 0, width, index, at, count, spread, position * pitch, blocks, low, number,
                            scratch, to,
                        )  # fmt: skip
        for sample in range(samples):
            edge = sample * (chunks + 1) + chunk
            at, count = sample * features + np.int64(edges[edge]), np.int64(edges[edge + 1] - edges[edge])
            for position in range(sample * positions, (sample + 1) * positions):
                clear(out, position * features + begin, end - begin, compute)
                for i in range(count):
                    feature = np.int64(index[at + i])
                    value = load(scratch, products + position * FEATURES + i, compute) + bias[feature]
                    store(out, position * features + feature, value)


@kernel
def _input_grad_kernel(
    shared, compute, grad: Storage, weight: Storage, out: Storage, sums: Compute, tiles: Compute, in_index: Int32,
    in_edges: Int32, out_index: Int32, out_edges: Int32, blocks: Int32, block_edges: Int32, samples, positions, inner,
    outer, width, pitch, lanes, columns, tile_pitch,
):  # fmt: skip
    """Chunks of columns; each goes through the output features, and in them through the samples."""
    chunks, strips = (outer + GRAD_FEATURES - 1) // GRAD_FEATURES, (width + columns - 1) // columns
    tile = next_worker(shared) * GRAD_FEATURES * tile_pitch
    while True:
        strip = next_item(shared)
        if strip >= strips:
            return
        column, stop = strip * columns, min(width, (strip + 1) * columns)
        for chunk in range(chunks):
            begin, end = chunk * GRAD_FEATURES, min(outer, (chunk + 1) * GRAD_FEATURES)
            if samples * positions >= TILED:
                _copy_tile(weight, begin, end, column, stop, width, tiles, tile, tile_pitch, lanes, compute)
            for sample in range(samples):
                edge, block = sample * (chunks + 1) + chunk, sample * (strips + 1) + strip
                at, count = sample * outer + np.int64(out_edges[edge]), np.int64(out_edges[edge + 1] - out_edges[edge])
                low, number = np.int64(block_edges[block]), np.int64(block_edges[block + 1] - block_edges[block])
                low += sample * (width // lanes)
                for position in range(sample * positions, (sample + 1) * positions):
                    if samples * positions >= TILED:
                        add_row_products(
                            grad, position * outer, 1, out_index, at, count,
                            tiles, tile - begin * tile_pitch - column, tile_pitch, blocks, low, number,
                            sums, position * pitch, chunk > 0,
                        )  # fmt: skip
                    else:
                        add_row_products(
                            grad, position * outer, 1, out_index, at, count, weight, 0, width, blocks, low, number,
                            sums, position * pitch, chunk > 0,
                        )  # fmt: skip
        for sample in range(samples):
            at, edge = sample * inner, sample * (strips + 1) + strip
            for position in range(sample * positions, (sample + 1) * positions):
                clear(out, position * inner + column, min(inner, stop) - column, compute)
                for i in range(at + np.int64(in_edges[edge]), at + np.int64(in_edges[edge + 1])):
                    feature = np.int64(in_index[i])
                    store(out, position * inner + feature, load(sums, position * pitch + feature, compute))


@kernel
def _weight_grad_kernel(
    shared, grad: Storage, spread: Compute, total: Compute, index: Int32, edges: Int32, blocks: Int32, lists: Int32,
    list_counts: Int32, samples, positions, outer, width, pitch, lanes,
):  # fmt: skip
    """Chunks of output features; each goes through the columns, and in them from feature to feature."""
    chunks, rows, strip = (outer + GRAD_FEATURES - 1) // GRAD_FEATURES, samples * positions, SUMMED_VECTORS * lanes
    worker = next_worker(shared)
    listed, counted = worker * GRAD_FEATURES * rows, worker * GRAD_FEATURES
    while True:
        chunk = next_item(shared)
        if chunk >= chunks:
            return
        begin, end = chunk * GRAD_FEATURES, min(outer, (chunk + 1) * GRAD_FEATURES)
        for feature in range(end - begin):
            list_counts[counted + feature] = 0
        for sample in range(samples):
            at, edge = sample * outer, sample * (chunks + 1) + chunk
            for i in range(at + np.int64(edges[edge]), at + np.int64(edges[edge + 1])):
                feature = np.int64(index[i]) - begin
                for position in range(sample * positions, (sample + 1) * positions):
                    place = np.int64(list_counts[counted + feature])
                    lists[listed + feature * rows + place] = position
                    list_counts[counted + feature] = place + 1
        for column in range(0, width, positive(strip)):
            number = (min(width, column + strip) - column) // lanes
            for feature in range(end - begin):
                count = np.int64(list_counts[counted + feature])
                add_row_products(
                    grad, begin + feature, outer, lists, listed + feature * rows, count,
                    spread, 0, pitch, blocks, column // lanes, number,
                    total, (begin + feature) * width, False,
                )  # fmt: skip


@kernel
def _bias_grad_kernel(compute, grad: Storage, index: Int32, counts: Int32, sums: Compute, samples, positions, features):
    """sums[f] += g[m, f] over the positions m whose sample keeps f; one thread."""
    for sample in range(samples):
        for position in range(sample * positions, (sample + 1) * positions):
            for i in range(sample * features, sample * features + np.int64(counts[sample])):
                feature = np.int64(index[i])
                sums[feature] += load(grad, position * features + feature, compute)


Features = tuple[Tensor, Tensor]  # index [N, C] and count [N] of an ActiveChannels


def _whole_vectors(weight: Tensor) -> Tensor:
    """The weight, contiguous; its rows end with a vector, those of another length in a copy among zeros."""
    missing = -weight.shape[1] % vector_lanes(weight.dtype)
    return F.pad(weight, (0, missing)) if missing else weight.contiguous()


def _pitch(width: int, dtype: torch.dtype) -> int:
    """Elements from one row to the next: an odd number of cache lines, so that rows do not fall on each other's."""
    line = 64 // dtype.itemsize
    return (ceil(width, line) | 1) * line


def _edges(index: Tensor, counts: Tensor, width: int, step: int) -> Tensor:
    """[N, i]: where the i-th `step` of the width begins among each sample's ascending entries of `index`."""
    samples, number = index.shape[0], ceil(width, step) + 1
    edges = torch.empty(samples, number, dtype=torch.int32)
    _edges_kernel(
        torch.float32, 1, index=index, counts=counts, edges=edges, samples=samples, width=index.shape[1],
        number=number, step=step,
    )  # fmt: skip
    return edges


class Spread:
    """The input [N, L, C] as the kernels read it: see the module's docstring."""

    def __init__(self, input: Tensor, kept: Features) -> None:
        samples, positions, features = input.shape
        lanes, compute = vector_lanes(input.dtype), compute_type(input.dtype)
        self.width = ceil(features, lanes) * lanes
        self.pitch = _pitch(self.width, compute)
        self.rows = torch.empty(samples, positions, self.pitch, dtype=compute)
        self.blocks = torch.empty(samples, self.width // lanes, dtype=torch.int32)
        self.block_counts, input = torch.empty(samples, dtype=torch.int32), input.contiguous()
        _spread_kernel(
            input.dtype, workers(min(samples, self.rows.numel() // SERIAL)), source=input, spread=self.rows,
            index=kept[0], counts=kept[1], blocks=self.blocks, block_counts=self.block_counts, samples=samples,
            positions=positions, features=features, most_blocks=self.width // lanes, pitch=self.pitch, lanes=lanes,
        )  # fmt: skip

    def edges(self, columns: int) -> Tensor:
        """Where each strip of so many columns begins among the blocks."""
        return _edges(self.blocks, self.block_counts, self.width, columns)


def forward(spread: Spread, outs: Features, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the layer's output to `out` [N, L, Cout], contiguous."""
    samples, positions, features = out.shape
    compute = spread.rows.dtype
    threads, tile_pitch = workers(ceil(features, FEATURES)), _pitch(min(COLUMNS, spread.width), compute)
    size = FEATURES * (tile_pitch + samples * positions)
    scratch = torch.empty(threads * size, dtype=compute)
    shift = torch.zeros(features, dtype=compute) if bias is None else bias.to(compute).contiguous()
    weight, edges, block_edges = _whole_vectors(weight), _edges(*outs, features, FEATURES), spread.edges(COLUMNS)
    _forward_kernel(
        out.dtype, threads, spread=spread.rows, blocks=spread.blocks, block_edges=block_edges, weight=weight,
        bias=shift, out=out, index=outs[0], edges=edges, scratch=scratch, samples=samples, positions=positions,
        features=features, width=spread.width, pitch=spread.pitch, lanes=vector_lanes(out.dtype),
        tile_pitch=tile_pitch, scratch_size=size,
    )  # fmt: skip


def input_grad(grad: Tensor, spread: Spread, ins: Features, outs: Features, weight: Tensor, out: Tensor) -> None:
    """Write the input's gradient to `out` [N, L, Cin], from the output's, both contiguous."""
    inner, outer = out.shape[2], grad.shape[2]
    sums, weight = torch.empty_like(spread.rows), _whole_vectors(weight)
    lanes, threads = vector_lanes(out.dtype), torch.get_num_threads()
    # No sum depends on how wide a strip is: all threads get one.
    whole = SUMMED_VECTORS * lanes
    columns = min(COLUMNS, ceil(ceil(spread.width, threads), whole) * whole)
    threads, tile_pitch = workers(ceil(spread.width, columns)), _pitch(columns, sums.dtype)
    tiles = torch.empty(threads * GRAD_FEATURES * tile_pitch, dtype=sums.dtype)
    in_edges, out_edges = _edges(*ins, spread.width, columns), _edges(*outs, outer, GRAD_FEATURES)
    block_edges = spread.edges(columns)
    _input_grad_kernel(
        out.dtype, threads, grad=grad, weight=weight, out=out, sums=sums, tiles=tiles, in_index=ins[0],
        in_edges=in_edges, out_index=outs[0], out_edges=out_edges, blocks=spread.blocks, block_edges=block_edges,
        samples=out.shape[0], positions=out.shape[1], inner=inner, outer=outer, width=spread.width,
        pitch=spread.pitch, lanes=lanes, columns=columns, tile_pitch=tile_pitch,
    )  # fmt: skip


def weight_grad(grad: Tensor, spread: Spread, outs: Features, weight: Tensor) -> Tensor:
    """The weight's gradient, of its type and strides, from the output's, contiguous."""
    samples, positions, outer = grad.shape
    lanes, rows = vector_lanes(grad.dtype), samples * positions
    total = torch.empty(outer, spread.width, dtype=spread.rows.dtype)
    blocks = torch.arange(0, spread.width, lanes, dtype=torch.int32)
    edges, threads = _edges(*outs, outer, GRAD_FEATURES), workers(ceil(outer, GRAD_FEATURES))
    lists = torch.empty(threads * GRAD_FEATURES * rows, dtype=torch.int32)
    list_counts = torch.empty(threads * GRAD_FEATURES, dtype=torch.int32)
    _weight_grad_kernel(
        grad.dtype, threads, grad=grad, spread=spread.rows, total=total, index=outs[0], edges=edges, blocks=blocks,
        lists=lists, list_counts=list_counts, samples=samples, positions=positions, outer=outer, width=spread.width,
        pitch=spread.pitch, lanes=lanes,
    )  # fmt: skip
    total = total[:, : weight.shape[1]]
    if total.dtype == weight.dtype and total.stride() == weight.stride():
        return total
    return torch.empty_like(weight).copy_(total)


def bias_grad(grad: Tensor, outs: Features) -> Tensor:
    """The bias's gradient, from the output's, contiguous."""
    samples, positions, features = grad.shape
    sums = torch.zeros(features, dtype=compute_type(grad.dtype))
    _bias_grad_kernel(
        grad.dtype, 1, grad=grad, index=outs[0], counts=outs[1], sums=sums, samples=samples, positions=positions,
        features=features,
    )  # fmt: skip
    return sums.to(grad.dtype)
