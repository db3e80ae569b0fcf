"""Masked convolution on the CPU: three indexed matrix products over a neighbour table.

All geometry is in the table `neighbours[site, tap]`: the input pixel that an active site reads through a tap, or
-1 in the padding. With X the pixels' rows [pixels, Cin], G the output gradient's rows at the active sites
[sites, Cout] and W[tap] the filter's slices [Cin, Cout]:

    forward       out[index[m]] = gate[m] * (sum over taps of X[neighbours[m, tap]] @ W[tap]  +  bias)
    input grad    dX[neighbours[m, tap]] += gate[m] * (G[m] @ W[tap]^T)
    weight grad   dW[tap] = sum over sites of (gate[m] * X[neighbours[m, tap]])^T @ G[m]

Each does the FLOPs of the active sites and no others. Work is cut so that no two threads write the same element,
and the order of every sum follows from the shapes and the mask alone: the same bits on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from . import sites
from ._llvm import (
    ROWS,
    TILE_VECTORS,
    VECTOR_BYTES,
    add_vector,
    copy_vector,
    fetch_add,
    load,
    multiply_tile,
    multiply_transposed_tile,
    pointer,
    store,
    transpose_vectors,
)
from ._threads import compute_type, kernel, workers

# In elements; together they keep a chunk's gathered rows and one tile's columns of the weights in a 1 MiB L2.
GATHERED = 56 * 1024
DEPTH = 1152
_SERIAL = 1 << 15  # elements that a second thread has to save before it is worth waking


@njit(inline="always")
def _array(address, dtype):
    return carray(pointer(address, dtype), (1 << 40,))  # no length: all offsets are computed


@njit
def _copy(source, at, count, target, to, lanes, compute):
    """`count` contiguous elements, widened. Whole vectors explicitly: LLVM's own loop first checks for overlap."""
    whole = count - count % lanes
    for c in range(0, whole, lanes):
        copy_vector(source, at + c, target, to + c)
    for c in range(whole, count):
        store(target, to + c, load(source, at + c, compute))


@njit
def _clear(target, at, count, compute):
    for c in range(count):
        store(target, at + c, compute(0))


@njit
def _add(source, at, count, scale, target, to, lanes, compute):
    """target += scale * source over `count` contiguous elements, both in the compute type."""
    whole = count - count % lanes
    for c in range(0, whole, lanes):
        add_vector(source, at + c, scale, target, to + c)
    for c in range(whole, count):
        store(target, to + c, load(target, to + c, compute) + scale * load(source, at + c, compute))


@njit
def _lower_bound(index, count, value):
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if index[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@njit
def _pack_panel(weight, cout, depth, panel, first, end, packed, at, lanes, compute):
    """The columns k = first..end of `lanes` rows of weight [cout, depth] as packed[at:] [k, lane], zero-padded."""
    source, valid = panel * lanes * depth, min(lanes, cout - panel * lanes)
    k = first
    if valid == lanes:
        while k + lanes <= end:
            transpose_vectors(weight, source + k, depth, packed, at + (k - first) * lanes)
            k += lanes
    while k < end:
        target = at + (k - first) * lanes
        for j in range(valid):
            store(packed, target + j, load(weight, source + j * depth + k, compute))
        _clear(packed, target + valid, lanes - valid, compute)
        k += 1


@njit
def _pack_by_output_kernel(arguments, storage, compute):
    """weight [cout, depth] -> [panel of output channels, depth, lane]."""
    a = carray(arguments, (16,))
    weight, packed = _array(a[2], storage), _array(a[3], compute)
    cout, depth, lanes, chunk, chunks = a[4], a[5], a[6], a[7], a[8]
    panels = (cout + lanes - 1) // lanes
    while True:
        item = fetch_add(a, 1)
        if item >= panels * chunks:
            return
        panel, first = item // chunks, item % chunks * chunk
        at = (panel * depth + first) * lanes
        _pack_panel(weight, cout, depth, panel, first, min(depth, first + chunk), packed, at, lanes, compute)


@njit
def _pack_by_input_kernel(arguments, storage, compute):
    """weight [cout, tap, cin] -> [panel of input channels, tap, cout, lane], the channels zero-padded."""
    a = carray(arguments, (16,))
    weight, packed = _array(a[2], storage), _array(a[3], compute)
    cout, taps, cin, lanes = a[4], a[5], a[6], a[7]
    panels = (cin + lanes - 1) // lanes
    while True:
        item = fetch_add(a, 1)
        if item >= panels * taps:
            return
        channel, tap = item // taps * lanes, item % taps
        valid = min(lanes, cin - channel)
        for out in range(cout):
            source, target = (out * taps + tap) * cin + channel, (item * cout + out) * lanes
            if valid == lanes:
                copy_vector(weight, source, packed, target)
            else:
                _copy(weight, source, valid, packed, target, lanes, compute)
                _clear(packed, target + valid, lanes - valid, compute)


@njit
def _forward_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    source, out = _array(a[2], storage), _array(a[3], storage)
    packed, bias, gate = _array(a[4], compute), _array(a[5], compute), _array(a[6], compute)
    table, index = _array(a[7], np.int32), _array(a[8], np.int32)
    is_packed, has_bias, has_gate = a[4] != 0, a[5] != 0, a[6] != 0
    sites, taps, cin, cout, lanes = a[9], a[10], a[11], a[12], a[13]
    chunk_rows, chunks, split_panels, splits, block_taps = a[14], a[15], a[16], a[17], a[18]
    scratch, scratch_size, weight = _array(a[19], compute), a[20], _array(a[21], storage)
    panels = (cout + lanes - 1) // lanes
    gathered = fetch_add(a[1:], 1) * scratch_size
    products = gathered + chunk_rows * block_taps * cin
    columns = products + chunk_rows * split_panels * lanes
    while True:
        item = fetch_add(a, 1)
        if item >= chunks * splits:
            return
        first = item // splits * chunk_rows
        rows = min(chunk_rows, sites - first)
        first_panel = item % splits * split_panels
        item_panels = min(split_panels, panels - first_panel)
        width = item_panels * lanes
        for first_tap in range(0, taps, block_taps):
            tap_count = min(block_taps, taps - first_tap)
            depth = tap_count * cin
            for r in range(rows):
                entry, at = (first + r) * taps + first_tap, gathered + r * depth
                t = 0
                while t < tap_count:
                    pixel, run = np.int64(table[entry + t]), 1
                    if pixel < 0:
                        _clear(scratch, at + t * cin, cin, compute)
                    else:
                        # The taps of a kernel's row usually read neighbouring pixels: one copy.
                        while t + run < tap_count and table[entry + t + run] == pixel + run:
                            run += 1
                        _copy(source, pixel * cin, run * cin, scratch, at + t * cin, lanes, compute)
                    t += run
            for panel in range(0, item_panels, TILE_VECTORS):
                vectors = min(TILE_VECTORS, item_panels - panel)
                start = first_tap * cin
                if is_packed:
                    weights, weight_at, stride = (
                        packed,
                        ((first_panel + panel) * taps * cin + start) * lanes,
                        taps * cin * lanes,
                    )
                else:
                    weights, weight_at, stride = scratch, columns, depth * lanes
                    for v in range(vectors):
                        _pack_panel(
                            weight, cout, taps * cin, first_panel + panel + v, start, start + depth,
                            scratch, columns + v * stride, lanes, compute,
                        )  # fmt: skip
                for r in range(0, rows, ROWS):
                    multiply_tile(
                        vectors,
                        scratch, gathered + r * depth, depth,
                        weights, weight_at, stride,
                        scratch, products + r * width + panel * lanes, width,
                        depth, first_tap > 0,
                    )  # fmt: skip
        channel = first_panel * lanes
        for r in range(rows):
            site = np.int64(index[first + r])
            at = site * cout + channel
            scale = gate[site] if has_gate else compute(1)
            for c in range(min(width, cout - channel)):
                value = load(scratch, products + r * width + c, compute)
                if has_bias:
                    value += load(bias, channel + c, compute)
                store(out, at + c, value * scale)


@njit
def _gather_rows_kernel(arguments, storage, compute):
    a = carray(arguments, (16,))
    source, target, index = _array(a[2], storage), _array(a[3], compute), _array(a[4], np.int32)
    sites, channels, chunk_rows, lanes = a[5], a[6], a[7], a[8]
    while True:
        first = fetch_add(a, 1) * chunk_rows
        if first >= sites:
            return
        for row in range(first, min(sites, first + chunk_rows)):
            _copy(source, np.int64(index[row]) * channels, channels, target, row * channels, lanes, compute)


@njit
def _bias_grad_kernel(arguments, storage, compute):
    """One panel of channels at a time, its sum in the order of the sites."""
    a = carray(arguments, (16,))
    grad, gate, grad_bias = _array(a[2], compute), _array(a[3], compute), _array(a[4], compute)
    index, has_gate = _array(a[5], np.int32), a[3] != 0
    sites, channels, lanes = a[6], a[7], a[8]
    while True:
        channel = fetch_add(a, 1) * lanes
        if channel >= channels:
            return
        valid = min(lanes, channels - channel)
        _clear(grad_bias, channel, valid, compute)
        for row in range(sites):
            scale = gate[np.int64(index[row])] if has_gate else compute(1)
            _add(grad, row * channels + channel, valid, scale, grad_bias, channel, lanes, compute)


@njit
def _input_grad_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    grad, weights, grad_input = _array(a[2], compute), _array(a[3], compute), _array(a[4], compute)
    gate, source, gate_grad = _array(a[5], compute), _array(a[6], storage), _array(a[7], compute)
    table, index = _array(a[8], np.int32), _array(a[9], np.int32)
    has_grad_input, has_gate, has_gate_grad = a[4] != 0, a[5] != 0, a[7] != 0
    sites, taps, cin, cout, lanes = a[10], a[11], a[12], a[13], a[14]
    band_sites, bands, colour, chunk_rows, groups = a[15], a[16], a[17], a[18], a[19]
    scratch, scratch_size = _array(a[20], compute), a[21]
    panels = (cin + lanes - 1) // lanes
    products = fetch_add(a[1:], 1) * scratch_size
    while True:
        item = fetch_add(a, 1)
        band, group = item // groups * 2 + colour, item % groups
        if band >= bands:
            return
        vectors = min(TILE_VECTORS, panels - group * TILE_VECTORS)
        width = vectors * lanes
        channel = group * TILE_VECTORS * lanes
        valid = min(width, cin - channel)
        begin = _lower_bound(index, sites, band * band_sites)
        end = _lower_bound(index, sites, (band + 1) * band_sites)
        for first in range(begin, end, chunk_rows):
            rows = min(chunk_rows, end - first)
            for tap in range(taps):
                weight_at = (group * TILE_VECTORS * taps + tap) * cout * lanes
                for r in range(0, rows, ROWS):
                    multiply_tile(
                        vectors,
                        grad, (first + r) * cout, cout,
                        weights, weight_at, taps * cout * lanes,
                        scratch, products + r * width, width,
                        cout, False,
                    )  # fmt: skip
                for r in range(rows):
                    pixel = np.int64(table[(first + r) * taps + tap])
                    if pixel < 0:
                        continue
                    at, product = pixel * cin + channel, products + r * width
                    if has_gate_grad:
                        total = compute(0)
                        for c in range(valid):
                            total += load(scratch, product + c, compute) * load(source, at + c, compute)
                        gate_grad[group * sites + first + r] += total
                    if has_grad_input:
                        scale = gate[np.int64(index[first + r])] if has_gate else compute(1)
                        _add(scratch, product, valid, scale, grad_input, at, lanes, compute)


@njit
def _weight_grad_kernel(arguments, storage, compute):
    a = carray(arguments, (32,))
    source, grad_weight = _array(a[2], storage), _array(a[3], storage)
    grad, gate = _array(a[4], compute), _array(a[5], compute)
    table, index = _array(a[6], np.int32), _array(a[7], np.int32)
    has_gate = a[5] != 0
    sites, taps, kernel_width, cin, cout, lanes = a[8], a[9], a[10], a[11], a[12], a[13]
    out_stride, in_stride, row_stride, tap_stride = a[14], a[15], a[16], a[17]
    chunk_rows, group_vectors, groups, split_channels, splits = a[18], a[19], a[20], a[21], a[22]
    scratch, scratch_size = _array(a[23], compute), a[24]
    panels = (cin + lanes - 1) // lanes
    gathered = fetch_add(a[1:], 1) * scratch_size
    products = gathered + chunk_rows * group_vectors * lanes
    while True:
        item = fetch_add(a, 1)
        if item >= taps * groups * splits:
            return
        tap, group, split = item // (groups * splits), item // splits % groups, item % splits
        vectors = min(group_vectors, panels - group * group_vectors)
        width = vectors * lanes
        channel = group * group_vectors * lanes
        first_out, end_out = split * split_channels, min(cout, (split + 1) * split_channels)
        for first in range(0, sites, chunk_rows):
            rows = min(chunk_rows, sites - first)
            for r in range(rows):
                pixel = np.int64(table[(first + r) * taps + tap])
                at = gathered + r * width
                valid = min(width, cin - channel) if pixel >= 0 else 0
                _copy(source, pixel * cin + channel, valid, scratch, at, lanes, compute)
                _clear(scratch, at + valid, width - valid, compute)
                if has_gate:
                    scale = gate[np.int64(index[first + r])]
                    for c in range(width):
                        store(scratch, at + c, scale * load(scratch, at + c, compute))
            for out in range(first_out, end_out, ROWS):
                multiply_transposed_tile(
                    vectors,
                    grad, first * cout + out, cout,
                    scratch, gathered,
                    scratch, products + (out - first_out) * width, width,
                    rows, first > 0,
                )  # fmt: skip
        target = tap // kernel_width * row_stride + tap % kernel_width * tap_stride + channel * in_stride
        for out in range(first_out, end_out):
            for c in range(min(width, cin - channel)):
                value = load(scratch, products + (out - first_out) * width + c, compute)
                store(grad_weight, target + out * out_stride + c * in_stride, value)


_run_pack_by_output = kernel(_pack_by_output_kernel)
_run_pack_by_input = kernel(_pack_by_input_kernel)
_run_forward = kernel(_forward_kernel)
_run_gather_rows = kernel(_gather_rows_kernel)
_run_bias_grad = kernel(_bias_grad_kernel)
_run_input_grad = kernel(_input_grad_kernel)
_run_weight_grad = kernel(_weight_grad_kernel)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _lanes(dtype: torch.dtype) -> int:
    return VECTOR_BYTES // (8 if dtype == torch.float64 else 4)


def _packed(weight: Tensor, by_output: bool) -> Tensor:
    """The weight's columns (output channels, or input channels) in panels of one vector, as the tiles read them."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    cout, cin = weight.shape[:2]
    taps, lanes = weight.shape[2] * weight.shape[3], _lanes(weight.dtype)
    panels = _ceil(cout if by_output else cin, lanes)
    size = panels * lanes * taps * (cin if by_output else cout)
    packed = torch.empty(size, dtype=compute_type(weight.dtype))
    if by_output:
        chunk = 16 * lanes
        chunks = _ceil(taps * cin, chunk)
        threads = workers(size // _SERIAL)
        shape = (cout, taps * cin, lanes, chunk, chunks)
        _run_pack_by_output(weight.dtype, threads, weight.data_ptr(), packed.data_ptr(), *shape)
    else:
        threads = workers(size // _SERIAL)
        _run_pack_by_input(weight.dtype, threads, weight.data_ptr(), packed.data_ptr(), cout, taps, cin, lanes)
    return packed


def _table(neighbours: Tensor | None, input, weight, mask, index, count, stride, padding, dilation) -> Tensor:
    """The neighbour table that layers share, or one for this call alone."""
    if neighbours is not None:
        return neighbours
    geometry = (*mask.shape[2:], *input.shape[2:], *weight.shape[2:], *stride, *padding, *dilation)
    return sites.neighbours(index, count, geometry)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    index: Tensor,
    count: Tensor,
    neighbours: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Write gate * (conv + bias) into `out` at the first `count` sites of `index`, and nowhere else.

    `input` and `out` are channels_last; `gate` has one element for each site of `out`, in the compute type.
    """
    active = int(count)
    if active == 0:
        return
    table = _table(neighbours, input, weight, mask, index, count, stride, padding, dilation)
    dtype, compute = input.dtype, compute_type(input.dtype)
    bias = None if bias is None else bias.to(compute).contiguous()
    weight = weight.contiguous(memory_format=torch.channels_last)
    cout, cin = weight.shape[:2]
    taps, lanes = weight.shape[2] * weight.shape[3], _lanes(dtype)
    blocks = _ceil(taps, max(1, DEPTH // cin))
    block_taps = _ceil(taps, blocks)
    depth = block_taps * cin
    panels = _ceil(cout, lanes)
    groups = _ceil(panels, TILE_VECTORS)
    threads = torch.get_num_threads()
    most_rows = max(ROWS, min(96, GATHERED // depth) // ROWS * ROWS)
    # Few rows: each column of the weight is used in one chunk alone, which packs it where it stays in the cache.
    packed = None
    chunks = 1
    if active > most_rows or groups < threads:
        packed = _packed(weight, by_output=True)
        chunks = max(_ceil(active, most_rows), min(4 * threads, _ceil(active, 4 * ROWS)))
    chunk_rows = _ceil(_ceil(active, chunks), ROWS) * ROWS
    chunks = _ceil(active, chunk_rows)
    # Too few rows to go round: threads share a chunk's columns, each gathering it for itself.
    splits = min(groups, _ceil(4 * threads, chunks)) if threads > 1 else 1
    split_panels = _ceil(groups, splits) * TILE_VECTORS
    splits = _ceil(panels, split_panels)
    threads = workers(chunks * splits)
    size = chunk_rows * (depth + split_panels * lanes) + (TILE_VECTORS * lanes * depth if packed is None else 0)
    scratch = torch.empty(threads * size, dtype=compute)
    _run_forward(
        dtype, threads, input.data_ptr(), out.data_ptr(), _address(packed), _address(bias), _address(gate),
        table.data_ptr(), index.data_ptr(), active, taps, cin, cout, lanes,
        chunk_rows, chunks, split_panels, splits, block_taps, scratch.data_ptr(), size, weight.data_ptr(),
    )  # fmt: skip


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    index: Tensor,
    count: Tensor,
    neighbours: Tensor | None,
    gate: Tensor | None,
    wanted: Sequence[bool],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """The wanted gradients of `input`, `weight`, `bias` and `gate`, None for the others.

    `grad` and `input` are channels_last.
    """
    table = _table(neighbours, input, weight, mask, index, count, stride, padding, dilation)
    active = int(count)
    input_wanted, weight_wanted, bias_wanted, gate_wanted = wanted
    rows = _grad_rows(grad, index, active)
    compute = rows.dtype
    grad_input = grad_weight = grad_bias = grad_gate = None
    if input_wanted:
        grad_input = torch.empty(input.shape, dtype=compute, memory_format=torch.channels_last).zero_()
    if (input_wanted or gate_wanted) and active:
        # Bands of so many output lines that those two apart read no common input line.
        overlap = max(1, _ceil(dilation[0] * (weight.shape[2] - 1) + 1, stride[0]) - 1)
        products = _input_grad(rows, weight, gate, input, table, mask, index, active, overlap, grad_input, gate_wanted)
    if input_wanted:
        grad_input = grad_input.to(input.dtype)
    if gate_wanted:
        grad_gate = torch.zeros(gate.shape, dtype=compute)
        if active:
            if bias is not None:
                products += (rows[:active] * bias.to(compute)).sum(1)
            grad_gate.view(-1)[index[:active]] = products
    if weight_wanted:
        grad_weight = torch.empty_like(weight)
        _weight_grad(rows, input, gate, table, index, active, grad_weight)
    if bias_wanted:
        grad_bias = torch.empty(weight.shape[0], dtype=compute)
        lanes = _lanes(weight.dtype)
        _run_bias_grad(
            compute, workers(rows.numel() // _SERIAL), rows.data_ptr(), _address(gate), grad_bias.data_ptr(),
            index.data_ptr(), active, weight.shape[0], lanes,
        )  # fmt: skip
        grad_bias = grad_bias.to(weight.dtype)
    return grad_input, grad_weight, grad_bias, grad_gate


def _grad_rows(grad: Tensor, index: Tensor, count: int) -> Tensor:
    """The rows of a channels_last gradient at the active sites, [count + ROWS, C] in the compute type.

    The rows past `count` are never used; tiles may read them.
    """
    channels = grad.shape[1]
    rows = torch.empty(count + ROWS, channels, dtype=compute_type(grad.dtype))
    rows[count:] = 0
    chunk, threads = 64, workers(count * channels // _SERIAL)
    sizes = (count, channels, chunk, _lanes(grad.dtype))
    _run_gather_rows(grad.dtype, threads, grad.data_ptr(), rows.data_ptr(), index.data_ptr(), *sizes)
    return rows


def _input_grad(
    rows: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    input: Tensor,
    table: Tensor,
    mask: Tensor,
    index: Tensor,
    count: int,
    overlap_lines: int,
    grad_input: Tensor | None,
    gate_grad_wanted: bool,
) -> Tensor | None:
    """Scatter-add the active sites' gradients into `grad_input` (zero-filled, compute type), if given.

    Returns the gate's gradient [count] without the bias's share, where wanted. Sites are cut into bands of at least
    `overlap_lines` output lines, so that bands two apart share no input line: the even ones run together, then the
    odd ones.
    """
    dtype, compute = weight.dtype, rows.dtype
    cout, cin = weight.shape[:2]
    taps, lanes = weight.shape[2] * weight.shape[3], _lanes(dtype)
    packed = _packed(weight, by_output=False)
    groups = _ceil(_ceil(cin, lanes), TILE_VECTORS)
    gate_grad = torch.zeros(groups, count, dtype=compute) if gate_grad_wanted else None
    lines, line_sites = mask.shape[0] * mask.shape[2], mask.shape[3]
    bands = max(1, min(64, count // 48))
    band_lines = max(overlap_lines, _ceil(lines, bands))
    bands = _ceil(lines, band_lines)
    chunk_rows = 8 * ROWS
    threads = workers(_ceil(bands, 2) * groups)
    size = chunk_rows * TILE_VECTORS * lanes
    scratch = torch.empty(threads * size, dtype=compute)
    for colour in range(min(2, bands)):
        _run_input_grad(
            dtype, threads, rows.data_ptr(), packed.data_ptr(), _address(grad_input), _address(gate),
            input.data_ptr(), _address(gate_grad), table.data_ptr(), index.data_ptr(),
            count, taps, cin, cout, lanes, band_lines * line_sites, bands, colour, chunk_rows, groups,
            scratch.data_ptr(), size,
        )  # fmt: skip
    return None if gate_grad is None else gate_grad.sum(0)


def _weight_grad(
    rows: Tensor,
    input: Tensor,
    gate: Tensor | None,
    table: Tensor,
    index: Tensor,
    count: int,
    grad_weight: Tensor,
) -> None:
    """Write the weight's gradient into `grad_weight` [Cout, Cin, kH, kW], any strides, the input's type."""
    if count == 0:
        grad_weight.zero_()
        return
    dtype, compute = input.dtype, rows.dtype
    cout, cin, _, kernel_width = grad_weight.shape
    taps, lanes = grad_weight.shape[2] * kernel_width, _lanes(dtype)
    panels = _ceil(cin, lanes)
    threads = torch.get_num_threads()
    group_vectors = TILE_VECTORS
    while group_vectors > 2 and taps * _ceil(panels, group_vectors) < 6 * threads:
        group_vectors -= 2
    groups = _ceil(panels, group_vectors)
    splits = min(_ceil(cout, 8 * ROWS), _ceil(6 * threads, taps * groups))
    split_channels = _ceil(_ceil(cout, splits), ROWS) * ROWS
    splits = _ceil(cout, split_channels)
    chunk_rows = 128
    threads = workers(taps * groups * splits)
    size = (chunk_rows + split_channels) * group_vectors * lanes
    scratch = torch.empty(threads * size, dtype=compute)
    _run_weight_grad(
        dtype, threads, input.data_ptr(), grad_weight.data_ptr(), rows.data_ptr(), _address(gate),
        table.data_ptr(), index.data_ptr(), count, taps, kernel_width, cin, cout, lanes,
        *grad_weight.stride(), chunk_rows, group_vectors, groups, split_channels, splits, scratch.data_ptr(), size,
    )  # fmt: skip
