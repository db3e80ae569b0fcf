"""Deformable convolution and aggregation: taps that sample the input between its pixels, at positions it is given.

Sites and pixels are flat, as in masked_conv.py, and every site counts. Tap t of offset group o samples site s at

    position(s, o, t) = (oy*stride - pad + kh*dilation + dy, ox*stride - pad + kw*dilation + dx)
    sample(position, c) = sum over the four pixels around it of (1 - |y - py|) * (1 - |x - px|) * input[p, c]

where pixels outside the input count as zero. A position that no pixel of the input is less than one away from, or that
is not finite, samples zero, and nothing has a gradient from it.

All features are channels_last [N, columns, H, W], hence rows of columns, and addresses are computed from row numbers:
input [pixels, C], out and grad [sites, Cout] (aggregation: C), offset [sites, groups, taps, (dy, dx)], mask and weights
[sites, groups, taps].

The input's gradient is a scatter: any number of samples meet in a pixel. Sums of floats would depend on their order, so
contributions become integers, multiples of a power of two that leaves room for all that can meet (see _fixed_point),
which atomic additions add in any order to the same bits.
"""

import math

import torch
import triton
import triton.language as tl

from ._common import (
    accumulator,
    arithmetic,
    bucket,
    divisor,
    is_inside,
    on_device,
    partial_dtype,
    split_rows,
    split_site,
    unit,
    warps,
)
from .masked_conv import PRECISION, channels_last_rows, is_aligned, transposed_rows, weight_grad_splits

# Tiles, by (arithmetic, bucket of what N is): (BLOCK_M, BLOCK_N, BLOCK_K, threads, num_stages). The same for every
# architecture: four pixels are loaded for a sample, and it is their registers and shared memory, not the matrix
# product, that bound a tile. BLOCK_K is an upper bound.
# M = sites, N = filters, K = channels of a tap.
CONV_TILES = {
    ("half", 16): (64, 16, 32, 128, 2),
    ("half", 64): (64, 64, 32, 128, 2),
    ("half", 128): (64, 128, 32, 128, 2),
    ("tf32", 16): (64, 16, 16, 128, 2),
    ("tf32", 64): (64, 64, 16, 256, 2),
    ("ieee", 16): (64, 16, 16, 256, 2),
    ("ieee", 64): (64, 64, 16, 256, 2),
    ("double", 16): (32, 16, 16, 256, 2),
    ("double", 64): (32, 64, 16, 256, 2),
}
# M = filters, N = channels (the bucket is that of the fewer), K = sites.
WEIGHT_GRAD_TILES = {
    ("half", 16): (16, 16, 32, 128, 2),
    ("half", 64): (64, 64, 32, 256, 2),
    ("tf32", 16): (16, 16, 32, 128, 2),
    ("tf32", 64): (64, 64, 16, 128, 2),
    ("ieee", 16): (16, 16, 32, 128, 2),
    ("ieee", 64): (64, 64, 16, 256, 2),
    ("double", 16): (16, 16, 16, 128, 2),
    ("double", 64): (32, 32, 16, 128, 2),
}
# M = sites, N = channels, K = filters.
INPUT_GRAD_TILES = {
    ("half", 16): (64, 16, 16, 256, 2),
    ("half", 32): (32, 32, 32, 256, 2),
    ("tf32", 16): (64, 16, 16, 256, 2),
    ("tf32", 32): (32, 32, 32, 256, 2),
    ("ieee", 16): (32, 16, 16, 256, 2),
    ("ieee", 32): (16, 32, 16, 256, 2),
    ("double", 16): (32, 16, 16, 256, 2),
    ("double", 32): (32, 32, 16, 256, 2),
}
# Rows that do not start on 16 bytes are loaded element by element, each with an address in a register: smaller tiles.
INPUT_GRAD_UNALIGNED = (16, 16, 16, 128, 2)

# What a program of the aggregation holds of each of the four pixels: two 16-byte loads for each thread.
AGGREGATE_THREADS = 128
AGGREGATE_BYTES = 4096
# A gradient has addresses and integers of 64 bits as well.
AGGREGATE_GRAD_ELEMENTS = 512
UNALIGNED_ELEMENTS = 256

# Bits of the sums of fixed-point contributions: one more, next to the sign, is for what bounds leave out (rounding).
FIXED_POINT_BITS = 62

_VARIES = ["source_height", "source_width", "site_height", "height_multiplier", "height_shift"]
_VARIES += ["site_width", "width_multiplier", "width_shift", "sites", "pad_top", "pad_left"]
_VARIES += ["dilation_h", "dilation_w", "splits", "channel_units", "run_units", "filter_units"]
# The numbers of groups and of runs in them stay specialised: mostly they are 1, and what they count falls away.


def conv_config(kind, channels, filters):
    """Tile of the implicit GEMM: `channels` of a run, `filters` of a group."""
    tile = _tile(CONV_TILES, kind, filters, is_aligned(kind, channels))
    tile["BLOCK_K"] = min(tile["BLOCK_K"], bucket(channels, (16, 32)))
    return tile


def weight_grad_config(kind, channels, filters):
    """Tile of wgrad: BLOCK_M of `filters`, BLOCK_N of the `channels` of a run, BLOCK_K sites a step."""
    aligned = is_aligned(kind, channels) and is_aligned(kind, filters)
    return _tile(WEIGHT_GRAD_TILES, kind, min(channels, filters), aligned)


def input_grad_config(kind, channels, filters):
    """Tile of the gradients of what is sampled and where: BLOCK_N `channels` of a run, BLOCK_K of `filters` a step."""
    if not (is_aligned(kind, channels) and is_aligned(kind, filters)):
        return _named(*INPUT_GRAD_UNALIGNED)
    tile = _tile(INPUT_GRAD_TILES, kind, channels, True)
    tile["BLOCK_K"] = min(tile["BLOCK_K"], bucket(filters, (16, 32)))
    return tile


def aggregate_config(dtype, channels, *, grads=False):
    """Tile of the aggregation: BLOCK_C channels of a group, at most a 128-byte line, by BLOCK_M pairs of site, group.

    A site's groups lie side by side, so narrow groups fill a line as well.
    """
    block_c = min(128 // dtype.itemsize, bucket(channels, (8, 16, 32, 64)))
    elements = AGGREGATE_BYTES // dtype.itemsize
    if unit(channels) * dtype.itemsize < 16:
        elements = min(elements, UNALIGNED_ELEMENTS)
    elif grads:
        elements = min(elements // 2, AGGREGATE_GRAD_ELEMENTS)
    return dict(BLOCK_M=elements // block_c, BLOCK_C=block_c, num_warps=warps(AGGREGATE_THREADS))


def _tile(table, kind, width, aligned):
    # Rows that do not start on 16 bytes: the large tiles would spill.
    widths = [size for name, size in table if name == kind and (aligned or size == 16)]
    block_m, block_n, block_k, threads, num_stages = table[kind, bucket(width, widths)]
    if not aligned:
        block_m, block_k, threads = min(block_m, 32), 16, 256
    return _named(block_m, block_n, block_k, threads, num_stages)


def _named(block_m, block_n, block_k, threads, num_stages):
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps(threads), num_stages=num_stages)


@triton.jit
def locate(offset, pair, y, x, listed, source_height, source_width, ACCUMULATOR: tl.constexpr):
    """(top, left, below, right, inside): the pixel above and to the left of (y, x) + (dy, dx), how far below and to the
    right of it that is, in [0, 1), and whether any pixel of the source is less than one away.

    All have the shape of pair, int64, where (dy, dx) are in offset. Where not inside, top and left are 0: safe to
    convert, not to be used.
    """
    y = y.to(ACCUMULATOR) + tl.load(offset + pair, mask=listed, other=0.0).to(ACCUMULATOR)
    x = x.to(ACCUMULATOR) + tl.load(offset + pair + 1, mask=listed, other=0.0).to(ACCUMULATOR)
    # False for NaN as well.
    inside = (y > -1.0) & (y < source_height.to(ACCUMULATOR)) & (x > -1.0) & (x < source_width.to(ACCUMULATOR)) & listed
    y = tl.where(inside, y, 0.0)
    x = tl.where(inside, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, inside


@triton.jit
def as_column(rows):
    """What belongs to rows, as it is spread over channels: [M] as [M, 1], what has that dimension already as it is."""
    if len(rows.shape) == 1:
        rows = rows[:, None]
    return rows


@triton.jit
def find_corner(corner, sample, top, left, below, right, inside, source_height, source_width):
    """(row, valid, share_y, share_x), shaped as `top` is, of one of the four pixels around a position: see `locate`.

    Its row of the source, whether it has one, and its shares of the sample along either axis, 1 - distance. The corners
    0 to 3 are those above on the left and right, then those below.
    """
    down = corner // 2
    beside = corner % 2
    valid = inside & is_inside(top + down, left + beside, source_height, source_width)
    row = (sample * source_height + top + down) * source_width + left + beside
    return row, valid, tl.abs((1 - down) - below), tl.abs((1 - beside) - right)


@triton.jit
def sample_pixels(
    source,
    sample,
    top,
    left,
    below,
    right,
    inside,
    scale,
    c,
    c_inside,
    columns,
    source_height,
    source_width,
    ACCUMULATOR: tl.constexpr,
):
    """scale * sample(position, c), [..., C] in the accumulator's type: see `locate`.

    What belongs to a position is [M] or [..., 1], scale too, which may be None. c, which broadcasts with it as a
    column, are elements of a source row, which has that many columns.
    """
    # Unrolled: the four loads do not wait for one another.
    for corner in tl.static_range(4):
        row, valid, share_y, share_x = find_corner(
            corner, sample, top, left, below, right, inside, source_height, source_width
        )
        share = share_y * share_x
        if scale is not None:
            share *= scale
        element = as_column(row.to(tl.int64)) * columns + c
        value = tl.load(source + element, mask=as_column(valid) & c_inside, other=0.0)
        if corner == 0:
            total = as_column(share) * value.to(ACCUMULATOR)
        else:
            total += as_column(share) * value.to(ACCUMULATOR)
    return total


@triton.jit
def sample_grads(
    column,
    source,
    fixed,
    fixed_scale,
    sample,
    top,
    left,
    below,
    right,
    inside,
    scale,
    c,
    c_inside,
    columns,
    source_height,
    source_width,
    along_y,
    along_x,
    value,
    WANTS_SUMS: tl.constexpr,
):
    """The backward of `sample_pixels`, of the grad `column` [..., C] of scale * sample(position, c).

    Adds the source's share, times fixed_scale and rounded, to fixed, if given. Returns along_y, along_x and value, each
    shaped as `top`, with sums over c added if WANTS_SUMS: of column * d sample / d position, and of column * sample.
    """
    LAST: tl.constexpr = len(column.shape) - 1
    # Not unrolled: what a corner needs, addresses and integers of 64 bits, would not find registers four times.
    for corner in tl.range(0, 4, loop_unroll_factor=1):
        row, valid, share_y, share_x = find_corner(
            corner, sample, top, left, below, right, inside, source_height, source_width
        )
        element = as_column(row.to(tl.int64)) * columns + c
        reads = as_column(valid) & c_inside
        if WANTS_SUMS:
            # Columns past the channels are a weight times zero, which is not zero where the weight is infinite.
            pixels = tl.load(source + element, mask=reads, other=0.0).to(column.dtype)
            total = tl.sum(tl.where(reads, column * pixels, 0.0), axis=LAST, keep_dims=len(top.shape) > 1)
            value += share_y * share_x * total
            along_y += (corner // 2 * 2 - 1) * share_x * total
            along_x += (corner % 2 * 2 - 1) * share_y * total
        if fixed is not None:
            share = share_y * share_x
            if scale is not None:
                share *= scale
            # A position on a pixel has shares of 0. So have all without a finite bound, where fixed_scale is 0: what is
            # not finite must not become an integer.
            adds = as_column(valid & (tl.abs(share) * tl.minimum(fixed_scale, 1.0) > 0)) & c_inside
            # Scaled last: of small grads, the scale times a weight may overflow.
            number = tl.where(adds, column * as_column(share), 0.0) * fixed_scale
            number = tl.floor(number + 0.5).to(tl.int64)
            tl.atomic_add(fixed + element, number, mask=adds, sem="relaxed")
    return along_y, along_x, value


@triton.jit(do_not_specialize=_VARIES)
def _deform_conv_kernel(
    source,
    offset,
    mask,
    weight,
    bias,
    out,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    site_width,
    width_multiplier,
    width_shift,
    sites,
    groups,
    offset_groups,
    group_runs,
    offset_group_runs,
    run_units,
    filter_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RUN_UNIT: tl.constexpr,
    FILTER_UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Implicit GEMM: M = sites, K = runs x taps x channels of a run, N = filters of a group.

    out[s, n] = bias[n] + sum over tap, k of mask[s, o(k), tap] * sample(position(s, o(k), tap), k) * weight[n, tap, k]

    A run is channels that share both a group and an offset group, so that a tile of K has one position a site:
    group_runs and offset_group_runs of them are a group. source [pixels, groups * group_runs * run],
    weight [groups * filters, taps, group_runs * run], out [sites, groups * filters].
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    # A product with a constant shows the compiler what divides the row length, hence how wide a load may be.
    run = run_units * RUN_UNIT
    filters = filter_units * FILTER_UNIT
    # The tiles of N of the same sites are neighbours in launch order: they share the sampled rows in L2.
    tiles_n = tl.cdiv(filters, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    group = tl.program_id(0) // tiles_n % groups
    row = (tl.program_id(0) // tiles_n // groups).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    listed = row < sites
    site = row.to(tl.int32)
    sample, y, x = split_site(
        site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
    y = y * STRIDE_H - pad_top
    x = x * STRIDE_W - pad_left
    first_tap = row * (offset_groups * TAPS)

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight_pointer = weight + (group * filters + n).to(tl.int64)[None, :] * (TAPS * group_runs * run) + k[:, None]
    n_inside = n[None, :] < filters

    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    part = 0
    tap = 0
    channel = 0
    # One loop, not three, for the software pipeline; a position is computed again for each step of its channels.
    for _ in range(0, group_runs * TAPS * tl.cdiv(run, BLOCK_K)):
        run_index = group * group_runs + part
        place = first_tap + (run_index // offset_group_runs * TAPS + tap)
        top, left, below, right, inside = locate(
            offset,
            2 * place,
            y + tap // KERNEL_WIDTH * dilation_h,
            x + tap % KERNEL_WIDTH * dilation_w,
            listed,
            source_height,
            source_width,
            ACCUMULATOR,
        )
        if mask is None:
            scale = None
        else:
            scale = tl.load(mask + place, mask=listed, other=0.0).to(ACCUMULATOR)
        k_inside = channel + k < run
        a = sample_pixels(
            source + (run_index * run + channel),
            sample,
            top,
            left,
            below,
            right,
            inside,
            scale,
            k[None, :],
            k_inside[None, :],
            groups * group_runs * run,
            source_height,
            source_width,
            ACCUMULATOR,
        )
        b_offset = (tap * group_runs + part) * run + channel
        b = tl.load(weight_pointer + b_offset, mask=k_inside[:, None] & n_inside, other=0.0)
        total = tl.dot(a.to(source.dtype.element_ty), b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        channel += BLOCK_K
        tap += (channel >= run).to(tl.int32)
        channel = tl.where(channel >= run, 0, channel)
        part += (tap >= TAPS).to(tl.int32)
        tap = tl.where(tap >= TAPS, 0, tap)

    column = group * filters + n
    if bias is not None:
        total += tl.load(bias + column, mask=n < filters, other=0.0).to(ACCUMULATOR)[None, :]
    target = row[:, None] * (groups * filters) + column[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=listed[:, None] & n_inside)


@triton.jit(do_not_specialize=_VARIES)
def _deform_weight_grad_kernel(
    source,
    offset,
    mask,
    grad,
    partial,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    site_width,
    width_multiplier,
    width_shift,
    sites,
    groups,
    offset_groups,
    group_runs,
    offset_group_runs,
    run_units,
    filter_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    splits,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RUN_UNIT: tl.constexpr,
    FILTER_UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, m, tap, n] = sum over s in the split of grad[s, m] * mask[s, tap] * sample(position(s, tap), n).

    m and n are of the same group: partial [splits, groups * filters, taps, group_runs * run], with the runs of
    _deform_conv_kernel. Split i takes the i-th equal share of the sites.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    run = run_units * RUN_UNIT
    filters = filter_units * FILTER_UNIT
    # The split varies slowest: the tiles of one split read the same rows, and find them in L2.
    tiles_n = tl.cdiv(run, BLOCK_N)
    tiles_m = tl.cdiv(filters, BLOCK_M)
    tile = tl.program_id(0)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tile // tiles_n
    tap = tile % TAPS
    tile = tile // TAPS
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tile // tiles_m
    run_index = tile % (groups * group_runs)
    split = tile // (groups * group_runs)
    group = run_index // group_runs
    begin, end = split_rows(split, splits, sites, BLOCK_K)

    tap_y = tap // KERNEL_WIDTH * dilation_h - pad_top
    tap_x = tap % KERNEL_WIDTH * dilation_w - pad_left
    m_inside = m[None, :] < filters
    n_inside = n[None, :] < run
    source += run_index * run
    grad += group * filters
    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        site = start + tl.arange(0, BLOCK_K)
        listed = site < end
        sample, y, x = split_site(
            site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
        )
        row = site.to(tl.int64)
        place = row * (offset_groups * TAPS) + (run_index // offset_group_runs * TAPS + tap)
        top, left, below, right, inside = locate(
            offset,
            2 * place,
            y * STRIDE_H + tap_y,
            x * STRIDE_W + tap_x,
            listed,
            source_height,
            source_width,
            ACCUMULATOR,
        )
        if mask is None:
            scale = None
        else:
            scale = tl.load(mask + place, mask=listed, other=0.0).to(ACCUMULATOR)
        b = sample_pixels(
            source,
            sample,
            top,
            left,
            below,
            right,
            inside,
            scale,
            n[None, :],
            n_inside,
            groups * group_runs * run,
            source_height,
            source_width,
            ACCUMULATOR,
        )
        a = tl.load(grad + (row[:, None] * (groups * filters) + m[None, :]), mask=listed[:, None] & m_inside, other=0.0)
        b = b.to(source.dtype.element_ty)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    first = (((split * groups + group).to(tl.int64) * filters + m) * TAPS + tap) * group_runs + run_index % group_runs
    tl.store(partial + (first[:, None] * run + n[None, :]), total, mask=(m[:, None] < filters) & n_inside)


@triton.jit(do_not_specialize=_VARIES)
def _deform_input_grad_kernel(
    grad,
    source,
    offset,
    mask,
    weight,
    scales,
    fixed,
    grad_offset,
    grad_mask,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    site_width,
    width_multiplier,
    width_shift,
    sites,
    groups,
    offset_groups,
    group_runs,
    offset_group_runs,
    run_units,
    filter_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    RUN_UNIT: tl.constexpr,
    FILTER_UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of input, offset and mask from one tap of one offset group at BLOCK_M sites.

    column[s, c] = sum over f of grad[s, f] * weight[c, tap, f]           a product of matrices, for a tile of channels
    fixed[p, c] += scales[0] * mask * share of p in the sample * column   for the four pixels p around the position
    grad_mask    = sum over c of column * sample
    grad_offset  = mask * sum over c of column * d sample / d position

    grad [sites, groups * filters], weight [groups * group_runs * run, taps, filters], with the runs of
    _deform_conv_kernel. fixed int64 [pixels, C], scales float64 [2] (see _fixed_point). Each of fixed, grad_offset and
    grad_mask may be None.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    run = run_units * RUN_UNIT
    filters = filter_units * FILTER_UNIT
    # The taps of the same sites are neighbours in launch order: they share the rows of grad in L2.
    tap = tl.program_id(0) % TAPS
    offset_group = tl.program_id(0) // TAPS % offset_groups
    row = (tl.program_id(0) // TAPS // offset_groups).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    listed = row < sites
    sample, y, x = split_site(
        row.to(tl.int32), site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
    place = row * (offset_groups * TAPS) + (offset_group * TAPS + tap)
    top, left, below, right, inside = locate(
        offset,
        2 * place,
        y * STRIDE_H + (tap // KERNEL_WIDTH * dilation_h - pad_top),
        x * STRIDE_W + (tap % KERNEL_WIDTH * dilation_w - pad_left),
        listed,
        source_height,
        source_width,
        ACCUMULATOR,
    )
    if mask is None:
        scale = None
    else:
        scale = tl.load(mask + place, mask=listed, other=0.0).to(ACCUMULATOR)
    fixed_scale = None
    if fixed is not None:
        fixed_scale = tl.load(scales).to(ACCUMULATOR)

    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    along_y = tl.zeros([BLOCK_M], ACCUMULATOR)
    along_x = tl.zeros([BLOCK_M], ACCUMULATOR)
    value = tl.zeros([BLOCK_M], ACCUMULATOR)
    for part in range(0, offset_group_runs):
        run_index = offset_group * offset_group_runs + part
        grad_pointer = grad + (row * (groups * filters) + run_index // group_runs * filters)
        for channel in range(0, run, BLOCK_N):
            n_inside = channel + n < run
            c = run_index * run + channel + n
            weight_pointer = weight + (c.to(tl.int64) * TAPS + tap) * filters
            column = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
            for first in range(0, filters, BLOCK_K):
                f = first + k
                a_inside = listed[:, None] & (f < filters)[None, :]
                a = tl.load(grad_pointer[:, None] + f[None, :], mask=a_inside, other=0.0)
                b_inside = (f < filters)[:, None] & n_inside[None, :]
                b = tl.load(weight_pointer[None, :] + f[:, None], mask=b_inside, other=0.0)
                column = tl.dot(a, b, column, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            along_y, along_x, value = sample_grads(
                column,
                source,
                fixed,
                fixed_scale,
                sample,
                top,
                left,
                below,
                right,
                inside,
                scale,
                c[None, :],
                n_inside[None, :],
                groups * group_runs * run,
                source_height,
                source_width,
                along_y,
                along_x,
                value,
                grad_offset is not None or grad_mask is not None,
            )

    if grad_mask is not None:
        tl.store(grad_mask + place, value.to(grad_mask.dtype.element_ty), mask=listed)
    if grad_offset is not None:
        if scale is not None:
            along_y *= scale
            along_x *= scale
        along_y = tl.where(inside, along_y, 0.0)
        along_x = tl.where(inside, along_x, 0.0)
        tl.store(grad_offset + 2 * place, along_y.to(grad_offset.dtype.element_ty), mask=listed)
        tl.store(grad_offset + 2 * place + 1, along_x.to(grad_offset.dtype.element_ty), mask=listed)


@triton.jit
def find_pairs(start, groups, sites, BLOCK_M: tl.constexpr, PIECES: tl.constexpr):
    """(row int64, site int32, group, listed) of BLOCK_M pairs of site and group from the int64 `start`-th on.

    All are [BLOCK_M, PIECES, 1]: every thread that has a piece of a pair's channels finds for itself what belongs to
    the pair. One that found it for others would hand it over through shared memory, at every tap.
    """
    first = start // groups
    place = tl.arange(0, BLOCK_M)[:, None, None] + tl.zeros([BLOCK_M, PIECES, 1], tl.int32)
    pair = (start - first * groups).to(tl.int32) + place
    site = first + pair // groups
    return start + place, site.to(tl.int32), pair % groups, site < sites


@triton.jit
def find_columns(first, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """PIECES * PIECE channels from the `first` on, [1, PIECES, PIECE]."""
    return first + tl.arange(0, PIECES)[None, :, None] * PIECE + tl.arange(0, PIECE)[None, None, :]


@triton.jit(do_not_specialize=_VARIES)
def _aggregate_kernel(
    source,
    offset,
    weights,
    out,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    site_width,
    width_multiplier,
    width_shift,
    sites,
    groups,
    channel_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[s, g, c] = sum over tap of weights[s, g, tap] * sample(position(s, g, tap), (g, c)).

    A row is a pair of site and group: offset [rows, taps, 2], weights [rows, taps], out [rows, channels of a group],
    source [pixels, groups * channels].
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    PIECE: tl.constexpr = 8 if BLOCK_C >= 8 else BLOCK_C
    PIECES: tl.constexpr = BLOCK_C // PIECE
    channels = channel_units * CHANNEL_UNIT
    # The tiles of C of the same rows are neighbours in launch order: they share offsets and weights in L2.
    tiles_c = tl.cdiv(channels, BLOCK_C)
    c = find_columns(tl.program_id(0) % tiles_c * BLOCK_C, PIECES, PIECE)
    start = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M
    row, site, group, listed = find_pairs(start, groups, sites, BLOCK_M, PIECES)
    sample, y, x = split_site(
        site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
    y = y * STRIDE_H - pad_top
    x = x * STRIDE_W - pad_left
    c_inside = c < channels
    column = group * channels + c

    total = tl.zeros([BLOCK_M, PIECES, PIECE], ACCUMULATOR)
    for tap in range(0, TAPS):
        place = row * TAPS + tap
        top, left, below, right, inside = locate(
            offset,
            2 * place,
            y + tap // KERNEL_WIDTH * dilation_h,
            x + tap % KERNEL_WIDTH * dilation_w,
            listed,
            source_height,
            source_width,
            ACCUMULATOR,
        )
        total += sample_pixels(
            source,
            sample,
            top,
            left,
            below,
            right,
            inside,
            tl.load(weights + place, mask=listed, other=0.0).to(ACCUMULATOR),
            column,
            c_inside,
            groups * channels,
            source_height,
            source_width,
            ACCUMULATOR,
        )
    tl.store(out + (row * channels + c), total.to(out.dtype.element_ty), mask=listed & c_inside)


@triton.jit(do_not_specialize=_VARIES)
def _aggregate_grad_kernel(
    grad,
    source,
    offset,
    weights,
    scales,
    fixed,
    grad_offset,
    grad_weights,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    site_width,
    width_multiplier,
    width_shift,
    sites,
    groups,
    channel_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of _aggregate_kernel's operands from one tap at BLOCK_M rows, pairs of site and group.

    fixed[p, c] += scales[0] * weights[row, tap] * share of p in the sample * grad[row, c]
    grad_weights = sum over c of grad * sample
    grad_offset  = weights * sum over c of grad * d sample / d position

    fixed int64 [pixels, groups * channels], scales float64 [2] (see _fixed_point). Each of fixed, grad_offset and
    grad_weights may be None.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    PIECE: tl.constexpr = 8 if BLOCK_C >= 8 else BLOCK_C
    PIECES: tl.constexpr = BLOCK_C // PIECE
    channels = channel_units * CHANNEL_UNIT
    # The taps of the same rows are neighbours in launch order: they share the rows of grad in L2.
    tap = tl.program_id(0) % TAPS
    start = (tl.program_id(0) // TAPS).to(tl.int64) * BLOCK_M
    row, site, group, listed = find_pairs(start, groups, sites, BLOCK_M, PIECES)
    sample, y, x = split_site(
        site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
    place = row * TAPS + tap
    top, left, below, right, inside = locate(
        offset,
        2 * place,
        y * STRIDE_H + (tap // KERNEL_WIDTH * dilation_h - pad_top),
        x * STRIDE_W + (tap % KERNEL_WIDTH * dilation_w - pad_left),
        listed,
        source_height,
        source_width,
        ACCUMULATOR,
    )
    scale = tl.load(weights + place, mask=listed, other=0.0).to(ACCUMULATOR)
    fixed_scale = None
    if fixed is not None:
        fixed_scale = tl.load(scales).to(ACCUMULATOR)

    along_y = tl.zeros([BLOCK_M, PIECES, 1], ACCUMULATOR)
    along_x = tl.zeros([BLOCK_M, PIECES, 1], ACCUMULATOR)
    value = tl.zeros([BLOCK_M, PIECES, 1], ACCUMULATOR)
    for channel in range(0, channels, BLOCK_C):
        c = find_columns(channel, PIECES, PIECE)
        c_inside = c < channels
        dual = tl.load(grad + (row * channels + c), mask=listed & c_inside, other=0.0)
        along_y, along_x, value = sample_grads(
            dual.to(ACCUMULATOR),
            source,
            fixed,
            fixed_scale,
            sample,
            top,
            left,
            below,
            right,
            inside,
            scale,
            group * channels + c,
            c_inside,
            groups * channels,
            source_height,
            source_width,
            along_y,
            along_x,
            value,
            grad_offset is not None or grad_weights is not None,
        )

    # The pieces of a pair, which have each their share of the sums, meet here; the first one's thread writes.
    writes = listed & (tl.arange(0, PIECES)[None, :, None] == 0)
    if grad_weights is not None:
        value = tl.sum(value, axis=1, keep_dims=True)
        tl.store(grad_weights + place, value.to(grad_weights.dtype.element_ty), mask=writes)
    if grad_offset is not None:
        along_y = tl.where(inside, tl.sum(along_y, axis=1, keep_dims=True) * scale, 0.0)
        along_x = tl.where(inside, tl.sum(along_x, axis=1, keep_dims=True) * scale, 0.0)
        tl.store(grad_offset + 2 * place, along_y.to(grad_offset.dtype.element_ty), mask=writes)
        tl.store(grad_offset + 2 * place + 1, along_x.to(grad_offset.dtype.element_ty), mask=writes)


def conv(input, offset, mask, weight, bias, out, *, stride, padding, dilation, allow_tf32):
    """out = deform_conv2d(input, offset, weight, bias, ..., mask): every element of it is written.

    input [N, C, H, W], offset [N, 2 * offset groups * taps, Ho, Wo], mask [N, offset groups * taps, Ho, Wo] or None and
    out [N, Cout, Ho, Wo] are channels_last; weight [Cout, C/groups, kH, kW] is read in place if it is, and copied into
    that layout if not; bias is [Cout] or None. The numbers of groups follow from the shapes: any that divide C.
    stride, padding (top, left) and dilation are pairs. allow_tf32: fp32 products may be of TF32.
    """
    sites, run, filters, arguments = _conv_arguments(input, offset, weight, stride, padding, dilation, allow_tf32)
    if sites == 0 or filters == 0:
        return
    with on_device(input):
        tile = conv_config(arithmetic(input.dtype, allow_tf32), run, filters)
        tiles = triton.cdiv(sites, tile["BLOCK_M"]) * triton.cdiv(filters, tile["BLOCK_N"]) * arguments["groups"]
        weight = channels_last_rows(weight)
        _deform_conv_kernel[(tiles,)](input, offset, mask, weight, bias, out, **arguments, **tile)


def conv_weight_grad(input, offset, mask, grad, weight, *, stride, padding, dilation, allow_tf32):
    """The gradient of conv's weight, like weight, of which only the shape and layout are used.

    grad is [N, Cout, Ho, Wo] in channels_last, the rest as in conv. The sites are split between programs; how many
    splits depends on the shapes alone. Partial sums are fp32 (fp64 for fp64) and are added in a fixed order.
    """
    sites, run, filters, arguments = _conv_arguments(input, offset, weight, stride, padding, dilation, allow_tf32)
    grad_weight = torch.empty_like(weight)
    if sites == 0 or weight.numel() == 0:
        return grad_weight.zero_()
    total_filters, channels, kernel_height, kernel_width = weight.shape
    with on_device(input):
        tile = weight_grad_config(arithmetic(input.dtype, allow_tf32), run, filters)
        tiles = triton.cdiv(filters, tile["BLOCK_M"]) * triton.cdiv(run, tile["BLOCK_N"])
        tiles *= kernel_height * kernel_width * arguments["groups"] * arguments["group_runs"]
        splits = weight_grad_splits(tiles, sites, tile, input.device)
        shape = (splits, total_filters, kernel_height, kernel_width, channels)
        partial = torch.empty(shape, dtype=partial_dtype(input.dtype), device=input.device)
        _deform_weight_grad_kernel[(tiles * splits,)](
            input, offset, mask, grad, partial, splits=splits, **arguments, **tile
        )
    return grad_weight.copy_(partial.sum(0).permute(0, 3, 1, 2))


def conv_input_grad(
    grad,
    input,
    offset,
    mask,
    weight,
    *,
    wants_input,
    wants_offset,
    wants_mask,
    stride,
    padding,
    dilation,
    allow_tf32,
):
    """(grad_input, grad_offset, grad_mask) of conv in channels_last: None what is not wanted, or of no mask.

    grad is [N, Cout, Ho, Wo] in channels_last, the rest as in conv. If grad, weight or mask is not finite somewhere, or
    so large that a product may not be, grad_input is NaN everywhere.
    """
    sites, run, filters, arguments = _conv_arguments(input, offset, weight, stride, padding, dilation, allow_tf32)
    fixed, grad_offset, grad_mask = _grads(input, offset, mask, wants_input, wants_offset, wants_mask)
    scales = None
    if sites and input.numel() and filters and (wants_input or wants_offset or grad_mask is not None):
        if wants_input:
            by_group = weight.unflatten(0, (-1, filters))
            reach = _peak(grad) * by_group.abs().sum(1, dtype=torch.float64).amax()
            scales = _fixed_point(reach, mask, offset.shape, weight.shape[2:], input.dtype)
        with on_device(input):
            tile = input_grad_config(arithmetic(input.dtype, allow_tf32), run, filters)
            taps = weight.shape[2] * weight.shape[3]
            # wgmma takes TF32 operands contiguous along K only, the filters: the weight becomes [C, taps, filters].
            weight = transposed_rows(weight, arguments["groups"])
            _deform_input_grad_kernel[(triton.cdiv(sites, tile["BLOCK_M"]) * arguments["offset_groups"] * taps,)](
                grad, input, offset, mask, weight, scales, fixed, grad_offset, grad_mask, **arguments, **tile
            )
    return _from_fixed_point(fixed, scales, input.dtype), grad_offset, grad_mask


def aggregate(input, offset, weights, out, *, kernel_size, stride, padding, dilation):
    """out[s, g, c] = sum over taps of weights[s, g, tap] * sample(position(s, g, tap), (g, c)).

    input and out [N, C, H, W] and [N, C, Ho, Wo], offset [N, 2 * groups * taps, Ho, Wo] and weights
    [N, groups * taps, Ho, Wo], already normalised, are channels_last. kernel_size, stride, padding (top, left) and
    dilation are pairs. Every element of out is written.
    """
    rows, channels, arguments = _aggregate_arguments(input, offset, kernel_size, stride, padding, dilation)
    if rows == 0 or channels == 0:
        return
    with on_device(input):
        tile = aggregate_config(input.dtype, channels)
        programs = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_C"])
        _aggregate_kernel[(programs,)](input, offset, weights, out, **arguments, **tile)


def aggregate_grad(
    grad,
    input,
    offset,
    weights,
    *,
    wants_input,
    wants_offset,
    wants_weights,
    kernel_size,
    stride,
    padding,
    dilation,
):
    """(grad_input, grad_offset, grad_weights) of aggregate in channels_last; None what is not wanted.

    grad is [N, C, Ho, Wo] in channels_last, the rest as in aggregate. If grad or weights is not finite somewhere, or so
    large that a product may not be, grad_input is NaN everywhere.
    """
    rows, channels, arguments = _aggregate_arguments(input, offset, kernel_size, stride, padding, dilation)
    fixed, grad_offset, grad_weights = _grads(input, offset, weights, wants_input, wants_offset, wants_weights)
    scales = None
    if rows and input.numel() and (wants_input or wants_offset or wants_weights):
        if wants_input:
            scales = _fixed_point(_peak(grad), weights, offset.shape, kernel_size, input.dtype)
        with on_device(input):
            tile = aggregate_config(input.dtype, channels, grads=True)
            taps = kernel_size[0] * kernel_size[1]
            _aggregate_grad_kernel[(triton.cdiv(rows, tile["BLOCK_M"]) * taps,)](
                grad, input, offset, weights, scales, fixed, grad_offset, grad_weights, **arguments, **tile
            )
    return _from_fixed_point(fixed, scales, input.dtype), grad_offset, grad_weights


def _conv_arguments(input, offset, weight, stride, padding, dilation, allow_tf32):
    """(sites, channels of a run, filters of a group, arguments that the kernels of the convolution share)."""
    total_filters, channels, kernel_height, kernel_width = weight.shape
    groups = max(1, input.shape[1] // max(1, channels))
    offset_groups = max(1, offset.shape[1] // (2 * kernel_height * kernel_width))
    filters, offset_channels = total_filters // groups, input.shape[1] // offset_groups
    run = max(1, math.gcd(channels, offset_channels))
    geometry, sites = _geometry(input, offset, (kernel_height, kernel_width), stride, padding, dilation)
    return (
        sites,
        run,
        filters,
        dict(
            **geometry,
            groups=groups,
            offset_groups=offset_groups,
            group_runs=channels // run,
            offset_group_runs=offset_channels // run,
            run_units=run // unit(run),
            filter_units=filters // unit(filters) if filters else 0,
            RUN_UNIT=unit(run),
            FILTER_UNIT=unit(filters),
            PRECISION=PRECISION[arithmetic(input.dtype, allow_tf32)],
        ),
    )


def _aggregate_arguments(input, offset, kernel_size, stride, padding, dilation):
    """(pairs of site and group, channels of a group, arguments that the kernels of the aggregation share)."""
    groups = max(1, offset.shape[1] // (2 * kernel_size[0] * kernel_size[1]))
    channels = input.shape[1] // groups
    geometry, sites = _geometry(input, offset, kernel_size, stride, padding, dilation)
    units = dict(channel_units=channels // unit(channels), CHANNEL_UNIT=unit(channels))
    return sites * groups, channels, dict(**geometry, groups=groups, **units)


def _geometry(input, offset, kernel_size, stride, padding, dilation):
    """(arguments that all kernels share, sites)."""
    samples, _, site_height, site_width = offset.shape
    sites = samples * site_height * site_width
    names = ("height_multiplier", "height_shift", "width_multiplier", "width_shift")
    divisors = divisor(max(1, site_height))[1:] + divisor(max(1, site_width))[1:]
    return dict(
        **dict(zip(names, divisors, strict=True)),
        source_height=input.shape[2],
        source_width=input.shape[3],
        site_height=site_height,
        site_width=site_width,
        sites=sites,
        pad_top=padding[0],
        pad_left=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        KERNEL_HEIGHT=kernel_size[0],
        KERNEL_WIDTH=kernel_size[1],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        ACCUMULATOR=accumulator(input.dtype),
    ), sites


def _grads(input, offset, weights, wants_input, wants_offset, wants_weights):
    """Zeros for the sums of input's fixed-point gradient and for the other two gradients, or None."""
    channels_last = torch.channels_last
    return (
        torch.zeros_like(input, dtype=torch.int64, memory_format=channels_last) if wants_input else None,
        torch.zeros_like(offset, memory_format=channels_last) if wants_offset else None,
        torch.zeros_like(weights, memory_format=channels_last) if wants_weights and weights is not None else None,
    )


def _peak(tensor):
    """max |tensor| as float64, on the device; NaN if there is one."""
    return torch.linalg.vector_norm(tensor, math.inf).double()


def _fixed_point(reach, weights, offset_shape, kernel_size, dtype):
    """float64 [2] on the device: 2**s, what contributions to an input gradient are multiplied by, and 2**-s.

    A contribution is at most bound = reach * max |weights| (weights may be None), reach a float64 on the device. A
    pixel's channel gets one at most from each site of its sample and each tap, since the four pixels of a sample are
    different ones, so with sites * taps * bound * 2**s <= 2**FIXED_POINT_BITS no sum overflows. s follows from powers
    of two above the bound and the number of contributions. It is kept to where 2**s and 2**-s are normal numbers: past
    that, contributions below the smallest of those are lost.
    Where a contribution may be infinite or NaN there is no such s, and the two are 0 and NaN.
    """
    bound = reach if weights is None else reach * _peak(weights)
    info = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    limit = -math.frexp(info.smallest_normal)[1] + 1
    contributions = math.prod(offset_shape[2:]) * math.prod(kernel_size)
    exponent = FIXED_POINT_BITS - contributions.bit_length() - torch.frexp(bound).exponent.long()
    exponent = exponent.clamp(-limit, limit)
    # The bits of a double: exact, whatever the device makes of exp2.
    scales = ((torch.stack((exponent, -exponent)) + 1023) << 52).view(torch.float64)
    # An infinite product ahead of a small weight is infinite still. NaN compares as false.
    is_finite = torch.maximum(reach, bound) <= info.max
    return torch.where(is_finite, scales, torch.stack((torch.zeros_like(bound), torch.full_like(bound, math.nan))))


def _from_fixed_point(fixed, scales, dtype):
    """fixed * 2**-s in dtype, in one pass, with the scales of _fixed_point; None if there was nothing to add up."""
    if fixed is None:
        return None
    grad = torch.zeros_like(fixed, dtype=dtype)
    return grad if scales is None else torch.mul(fixed, scales[1], out=grad)
