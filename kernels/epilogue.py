"""The end of a convolution as a step of its own, for training: normalisation, gate, residual and activation.

Batch normalisation needs the moments of what the convolution gives before it can be applied to it, so in training the
epilogue cannot be fused into the product as it is in masked_conv.py. It works on packed rows, [capacity, C]: row m
belongs to the m-th active site, index[m]; rows past count are not read, and written as zeros. What it writes is dense,
[N, C, H, W] in channels_last, or packed as well. Everything stays on the device, grids cover the capacity, and programs
past count return at once, or write zeros and do. Sums are taken in an order that count and the shapes alone decide.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    accumulator,
    activation_slope,
    bucket,
    is_packed,
    on_device,
    partial_dtype,
    split_rows,
    store_rows,
    unit,
    warps,
    zero_rows,
)

THREADS = 128
# Bytes of a tensor that a program handles at a time: two 16-byte loads for each thread. One in the backward,
# which reads three tensors and writes two.
TILE_BYTES = 4096
BACKWARD_TILE_BYTES = 2048
# Rows that do not start on 16 bytes are loaded element by element, each with an address in a register.
UNALIGNED_ELEMENTS = 512
# Most shares of the rows for each tile of channels: sums are taken by share. moments() combines them all at once.
SPLITS = 256
COMBINE_CHANNELS = 16

_VARIES = ["capacity", "sites", "channel_units", "channels", "splits"]


def config(dtype, channels, tile_bytes=TILE_BYTES):
    """Tile: BLOCK_C channels, at most one 128-byte line of a row, by BLOCK_M rows; for every architecture alike."""
    block_c = min(128 // dtype.itemsize, bucket(channels, (16, 32, 64)))
    elements = tile_bytes // dtype.itemsize
    if unit(channels) * dtype.itemsize < 16:
        elements = min(elements, UNALIGNED_ELEMENTS)
    return dict(BLOCK_M=elements // block_c, BLOCK_C=block_c, num_warps=warps(THREADS))


@triton.jit
def _load_vector(vector, c, c_inside, absent, ACCUMULATOR: tl.constexpr):
    """[1, BLOCK_C] of a vector [channels], or `absent` where there is none."""
    if vector is not None:
        values = tl.load(vector + c, mask=c_inside, other=0.0).to(ACCUMULATOR)
    else:
        values = tl.full(c.shape, absent, ACCUMULATOR)
    return values[None, :]


@triton.jit(do_not_specialize=_VARIES)
def _epilogue_kernel(
    rows,
    index,
    count,
    mean,
    scale,
    shift,
    gate,
    residual,
    out,
    capacity,
    channel_units,
    CHANNEL_UNIT: tl.constexpr,
    PACKED_SITES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[s, c] = activation(gate[s] * ((rows[m, c] - mean[c]) * scale[c] + shift[c]) + residual[s, c]), s = index[m].

    rows [rows, channels], out and residual [site rows, channels]: row m of them with PACKED_SITES, where out has
    `capacity` rows and those past count become zeros, else row s. Skips the sites that are not listed.
    """
    # A product with a constant shows the compiler what divides the row length, hence how wide a load may be.
    channels = channel_units * CHANNEL_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels
    active = tl.load(count)
    start = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    if PACKED_SITES:  # noqa: SIM102 (decided at compile time, and the other is not)
        if start + BLOCK_M > active:
            zero_rows(out, row, active, capacity, c, c_inside, channels)
    if start >= active:
        return

    listed = row < active
    site = tl.load(index + row, mask=listed, other=0)
    inside = listed[:, None] & c_inside[None, :]
    row_offset = row[:, None] * channels + c[None, :]
    if PACKED_SITES:
        offset = row_offset
    else:
        offset = site.to(tl.int64)[:, None] * channels + c[None, :]
    mean_c = _load_vector(mean, c, c_inside, 0.0, ACCUMULATOR)
    scale_c = _load_vector(scale, c, c_inside, 1.0, ACCUMULATOR)
    shift_c = _load_vector(shift, c, c_inside, 0.0, ACCUMULATOR)
    centred = tl.load(rows + row_offset, mask=inside, other=0.0).to(ACCUMULATOR) - mean_c
    store_rows(centred * scale_c + shift_c, gate, residual, out, site, offset, listed, inside, ACTIVATION)


@triton.jit(do_not_specialize=_VARIES)
def _epilogue_backward_kernel(
    grad,
    rows,
    index,
    count,
    mean,
    scale,
    shift,
    gate,
    residual,
    grad_rows,
    grad_residual,
    partial,
    partial_gate,
    capacity,
    sites,
    channel_units,
    splits,
    CHANNEL_UNIT: tl.constexpr,
    PACKED_SITES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With d = grad[s, c] * activation'(what the forward activates) and s = index[m]:

    grad_rows[m, c]         = d * gate[s] * scale[c]
    grad_residual[s, c]     = d
    partial[split, 0, c]    = sum over the rows of the split of d * gate[s] * (rows[m, c] - mean[c])
    partial[split, 1, c]    = sum over the rows of the split of d * gate[s]
    partial_gate[tile, s]   = sum over c in the tile of d * ((rows[m, c] - mean[c]) * scale[c] + shift[c])

    Each result may be None. rows and grad_rows [capacity, channels]; grad, residual and grad_residual
    [site rows, channels]: row m of them with PACKED_SITES, else row s.
    Split i takes the i-th equal share of the listed rows. Skips the sites that are not listed.
    """
    channels = channel_units * CHANNEL_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tile_c = tl.program_id(0) % tiles_c
    split = tl.program_id(0) // tiles_c
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels
    mean_c = _load_vector(mean, c, c_inside, 0.0, ACCUMULATOR)
    scale_c = _load_vector(scale, c, c_inside, 1.0, ACCUMULATOR)
    shift_c = _load_vector(shift, c, c_inside, 0.0, ACCUMULATOR)
    begin, end = split_rows(split, splits, tl.load(count), BLOCK_M)

    if partial is not None:
        partial += split.to(tl.int64) * 2 * channels
    if partial_gate is not None:
        partial_gate += tile_c.to(tl.int64) * sites

    # A sum for each row of a step: they meet once, after the loop.
    scale_total = tl.zeros([BLOCK_M, BLOCK_C], ACCUMULATOR)
    shift_total = tl.zeros([BLOCK_M, BLOCK_C], ACCUMULATOR)
    for start in range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        listed = row < end
        site = tl.load(index + row, mask=listed, other=0)
        inside = listed[:, None] & c_inside[None, :]
        row_offset = row.to(tl.int64)[:, None] * channels + c[None, :]
        if PACKED_SITES:
            offset = row_offset
        else:
            offset = site.to(tl.int64)[:, None] * channels + c[None, :]
        centred = tl.load(rows + row_offset, mask=inside, other=0.0).to(ACCUMULATOR) - mean_c
        affine = centred * scale_c + shift_c
        d = tl.load(grad + offset, mask=inside, other=0.0).to(ACCUMULATOR)
        if gate is not None:
            factor = tl.load(gate + site, mask=listed, other=0.0).to(ACCUMULATOR)[:, None]
        if ACTIVATION != "none":
            x = affine
            if gate is not None:
                x *= factor
            if residual is not None:
                x += tl.load(residual + offset, mask=inside, other=0.0).to(ACCUMULATOR)
            d *= activation_slope(x, ACTIVATION)
        if grad_residual is not None:
            tl.store(grad_residual + offset, d.to(grad_residual.dtype.element_ty), mask=inside)
        if partial_gate is not None:
            tl.store(partial_gate + site, tl.sum(d * affine, axis=1), mask=listed)
        if gate is not None:
            d *= factor
        if grad_rows is not None:
            tl.store(grad_rows + row_offset, (d * scale_c).to(grad_rows.dtype.element_ty), mask=inside)
        if partial is not None:
            scale_total += d * centred
            shift_total += d

    # Of the rows past count as well, each program takes its share.
    active = tl.load(count)
    begin, end = split_rows(split, splits, capacity - active, BLOCK_M)
    for start in range(begin, end, BLOCK_M):
        row = (active + start).to(tl.int64) + tl.arange(0, BLOCK_M)
        if grad_rows is not None:
            zero_rows(grad_rows, row, active, active + end, c, c_inside, channels)
        if PACKED_SITES and grad_residual is not None:
            zero_rows(grad_residual, row, active, active + end, c, c_inside, channels)

    if partial is not None:
        tl.store(partial + c, tl.sum(scale_total, axis=0), mask=c_inside)
        tl.store(partial + channels + c, tl.sum(shift_total, axis=0), mask=c_inside)


@triton.jit(do_not_specialize=_VARIES)
def _moments_kernel(
    rows,
    count,
    partial,
    channel_units,
    splits,
    CHANNEL_UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[split, 0, c], partial[split, 1, c] = mean of y, sum of (y - mean)^2 over the rows of the split.

    y = rows[m, c] - rows[0, c]: what all rows have in common is taken away before anything is rounded. Each of the
    BLOCK_M lanes runs Welford's recurrence over its rows, and lanes are combined as Chan, Golub and LeVeque do.
    """
    channels = channel_units * CHANNEL_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(0) // tiles_c
    c_inside = c < channels
    active = tl.load(count)
    begin, end = split_rows(split, splits, active, BLOCK_M)
    origin = tl.load(rows + c, mask=c_inside & (active > 0), other=0.0).to(ACCUMULATOR)[None, :]

    lane = tl.arange(0, BLOCK_M)
    mean = tl.zeros([BLOCK_M, BLOCK_C], ACCUMULATOR)
    squares = tl.zeros([BLOCK_M, BLOCK_C], ACCUMULATOR)
    for start in range(begin, end, BLOCK_M):
        row = start + lane
        inside = (row < end)[:, None] & c_inside[None, :]
        y = tl.load(rows + row.to(tl.int64)[:, None] * channels + c[None, :], mask=inside, other=0.0).to(ACCUMULATOR)
        y -= origin
        delta = tl.where(inside, y - mean, 0.0)
        mean += delta / ((start - begin) // BLOCK_M + 1)
        squares += delta * (y - mean)

    rows_of_lane = tl.cdiv(end - begin - lane, BLOCK_M).to(ACCUMULATOR)[:, None]
    total = tl.maximum(end - begin, 1).to(ACCUMULATOR)
    mean_of_split = tl.sum(rows_of_lane * mean, axis=0) / total
    apart = mean - mean_of_split[None, :]
    squares_of_split = tl.sum(squares + rows_of_lane * apart * apart, axis=0)
    first = partial + split.to(tl.int64) * 2 * channels
    tl.store(first + c, mean_of_split, mask=c_inside)
    tl.store(first + channels + c, squares_of_split, mask=c_inside)


@triton.jit(do_not_specialize=_VARIES)
def _combine_moments_kernel(
    rows,
    count,
    partial,
    mean_out,
    variance_out,
    channels,
    splits,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean_out[c], variance_out[c] = mean and biased variance of rows[:count, c], zeros where count is 0.

    partial [splits, 2, channels] is what _moments_kernel gives, with its BLOCK_M.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels
    active = tl.load(count)
    split = tl.arange(0, BLOCK_SPLITS)
    begin, end = split_rows(split, splits, active, BLOCK_M)
    rows_of_split = tl.where(split < splits, end - begin, 0).to(ACCUMULATOR)[:, None]
    inside = (split < splits)[:, None] & c_inside[None, :]
    first = partial + split[:, None] * (2 * channels) + c[None, :]
    mean = tl.load(first, mask=inside, other=0.0)
    squares = tl.load(first + channels, mask=inside, other=0.0)
    total = tl.maximum(active, 1).to(ACCUMULATOR)
    mean_of_all = tl.sum(rows_of_split * mean, axis=0) / total
    apart = mean - mean_of_all[None, :]
    squares_of_all = tl.sum(squares + rows_of_split * apart * apart, axis=0)
    origin = tl.load(rows + c, mask=c_inside & (active > 0), other=0.0).to(ACCUMULATOR)
    tl.store(mean_out + c, origin + mean_of_all, mask=c_inside)
    tl.store(variance_out + c, squares_of_all / total, mask=c_inside)


@triton.jit(do_not_specialize=_VARIES)
def _gather_kernel(
    source,
    index,
    count,
    out,
    capacity,
    channel_units,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[m, c] = source[index[m], c], zeros from m = count on. source [rows, channels], out [capacity, channels]."""
    channels = channel_units * CHANNEL_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    active = tl.load(count)
    row = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    listed = row < active
    site = tl.load(index + row, mask=listed, other=0)
    c_inside = (c < channels)[None, :]
    offset = site.to(tl.int64)[:, None] * channels + c[None, :]
    values = tl.load(source + offset, mask=listed[:, None] & c_inside, other=0.0)
    tl.store(out + row[:, None] * channels + c[None, :], values, mask=(row < capacity)[:, None] & c_inside)


def forward(rows, index, count, mean, scale, shift, gate, residual, out, *, activation):
    """out[s] = activation(gate[s] * ((rows[m] - mean) * scale + shift) + residual[s]), s = index[m], for m < count.

    rows [capacity, C]; mean, scale and shift [C], gate [N*Ho*Wo] and residual may be None: 0, 1, 0, 1 and 0. out is
    dense or packed, residual like it, or out itself; the rest of a dense out is left alone, and of a packed one zeros.
    """
    channels = rows.shape[1]
    capacity = len(out) if is_packed(out) else min(index.numel(), len(rows))
    if capacity == 0 or channels == 0:
        return
    with on_device(rows):
        tile = config(rows.dtype, channels)
        _epilogue_kernel[(triton.cdiv(capacity, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_C"]),)](
            rows,
            index,
            count,
            mean,
            scale,
            shift,
            gate,
            residual,
            out,
            capacity,
            channels // unit(channels),
            CHANNEL_UNIT=unit(channels),
            PACKED_SITES=is_packed(out),
            ACTIVATION=activation,
            ACCUMULATOR=accumulator(rows.dtype),
            **tile,
        )


def backward(
    grad,
    rows,
    index,
    count,
    mean,
    scale,
    shift,
    gate,
    residual,
    grad_rows,
    grad_residual,
    *,
    activation,
    wanted,
):
    """Gradients of forward: (grad_scale [C], grad_shift [C], grad_gate [N*Ho*Wo]) in fp32 (fp64 for fp64).

    grad, residual and grad_residual are dense or packed alike. grad_rows [capacity, C] and grad_residual are written in
    place, at the active sites alone (a dense one comes filled with zeros, a packed one gets them past count), or None
    where they are not wanted.
    wanted = (vectors, gate): where False, grad_scale and grad_shift, or grad_gate, are None. grad_gate is zero at the
    sites that are not active, of which index has an entry for each. The gradient of mean is -scale * grad_shift.
    """
    capacity, channels = rows.shape
    dtype = partial_dtype(rows.dtype)
    with on_device(rows):
        tile = config(rows.dtype, channels, BACKWARD_TILE_BYTES)
    tiles_c = triton.cdiv(channels, tile["BLOCK_C"])
    splits = min(SPLITS, triton.cdiv(capacity, tile["BLOCK_M"]))
    vectors_wanted, gate_wanted = wanted
    # With no rows there are no splits, and the sums over them below are zeros.
    partial = torch.empty((splits, 2, channels), dtype=dtype, device=rows.device) if vectors_wanted else None
    partial_gate = None
    if gate_wanted:
        partial_gate = torch.zeros((max(tiles_c, 1), index.numel()), dtype=dtype, device=rows.device)
    results = (partial, partial_gate, grad_rows, grad_residual)
    if capacity > 0 and channels > 0 and any(result is not None for result in results):
        with on_device(rows):
            _epilogue_backward_kernel[(splits * tiles_c,)](
                grad,
                rows,
                index,
                count,
                mean,
                scale,
                shift,
                gate,
                residual,
                grad_rows,
                grad_residual,
                partial,
                partial_gate,
                capacity,
                index.numel(),
                channels // unit(channels),
                splits,
                CHANNEL_UNIT=unit(channels),
                PACKED_SITES=is_packed(grad),
                ACTIVATION=activation,
                ACCUMULATOR=accumulator(rows.dtype),
                **tile,
            )
    grad_scale = grad_shift = grad_gate = None
    if vectors_wanted:
        grad_scale, grad_shift = partial[:, 0].sum(0), partial[:, 1].sum(0)
    if gate_wanted:
        grad_gate = partial_gate[0] if len(partial_gate) == 1 else partial_gate.sum(0)
    return grad_scale, grad_shift, grad_gate


def moments(rows, count):
    """(mean, variance) of rows[:count], each [C] in fp32 (fp64 for fp64); the variance is biased. Zeros for no rows."""
    capacity, channels = rows.shape
    mean, variance = (torch.zeros(channels, dtype=partial_dtype(rows.dtype), device=rows.device) for _ in range(2))
    if capacity == 0 or channels == 0:
        return mean, variance
    with on_device(rows):
        tile = config(rows.dtype, channels)
        tiles_c = triton.cdiv(channels, tile["BLOCK_C"])
        splits = min(SPLITS, triton.cdiv(capacity, tile["BLOCK_M"]))
        partial = torch.empty((splits, 2, channels), dtype=mean.dtype, device=rows.device)
        _moments_kernel[(splits * tiles_c,)](
            rows,
            count,
            partial,
            channels // unit(channels),
            splits,
            CHANNEL_UNIT=unit(channels),
            ACCUMULATOR=accumulator(rows.dtype),
            **tile,
        )
        _combine_moments_kernel[(triton.cdiv(channels, COMBINE_CHANNELS),)](
            rows,
            count,
            partial,
            mean,
            variance,
            channels,
            splits,
            ACCUMULATOR=accumulator(rows.dtype),
            BLOCK_M=tile["BLOCK_M"],
            BLOCK_SPLITS=SPLITS,
            BLOCK_C=COMBINE_CHANNELS,
            num_warps=warps(THREADS),
        )
    return mean, variance


def gather(input, index, count, out):
    """out[m] = input at index[m], zeros from count on: dense [N, C, H, W] in channels_last -> packed [capacity, C]."""
    capacity, channels = out.shape
    if capacity == 0 or channels == 0:
        return
    with on_device(input):
        tile = config(out.dtype, channels)
        _gather_kernel[(triton.cdiv(capacity, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_C"]),)](
            input,
            index,
            count,
            out,
            capacity,
            channels // unit(channels),
            CHANNEL_UNIT=unit(channels),
            **tile,
        )
