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
    divide,
    divisor,
    is_inside,
    offset_type,
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
    ("half", 256): (64, 256, 32, 256, 2),
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

# What a program of the aggregation holds of each of the four pixels: two 16-byte loads for each thread, of one pair
# where a group is as wide.
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
_VARIES += ["groups_multiplier", "groups_shift"]
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
    piece, elements = 16 // dtype.itemsize, AGGREGATE_BYTES // dtype.itemsize
    pieces = 1 if grads else min(2, block_c // piece)
    if unit(channels) * dtype.itemsize < 16:
        elements, pieces, piece = min(elements, UNALIGNED_ELEMENTS), 1, 1
    elif grads:
        elements = min(elements // 2, AGGREGATE_GRAD_ELEMENTS)
    block_m = min(elements // block_c, AGGREGATE_THREADS * piece * pieces // block_c)
    even = channels % block_c == 0
    tile = dict(BLOCK_M=block_m, BLOCK_C=block_c, PIECES=pieces, PIECE=piece, EVEN=even)
    return tile | dict(num_warps=warps(AGGREGATE_THREADS))


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
def load_pair(pairs, place, listed, PAIRED: tl.constexpr):
    """The two numbers at pairs[2 * place], zero where not listed (None: all are). PAIRED: in one load, as a word."""
    if PAIRED:
        BITS: tl.constexpr = pairs.dtype.element_ty.primitive_bitwidth
        HALF: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
        WORD: tl.constexpr = tl.uint32 if BITS == 16 else tl.uint64
        word = _load(pairs.to(tl.pointer_type(WORD), bitcast=True) + place, listed)
        first = word.to(HALF).to(pairs.dtype.element_ty, bitcast=True)
        second = (word >> BITS).to(HALF).to(pairs.dtype.element_ty, bitcast=True)
    else:
        first = _load(pairs + 2 * place, listed)
        second = _load(pairs + 2 * place + 1, listed)
    return first, second


@triton.jit
def _load(pointer, listed):
    if listed is None:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=listed, other=0)
    return value


@triton.jit
def locate(offset, place, y, x, listed, source_height, source_width, ACCUMULATOR: tl.constexpr, PAIRED: tl.constexpr):
    """(top, left, below, right): the pixel above and to the left of (y, x) + (dy, dx), and how far below and to the
    right of it that is, in [0, 1).

    y and x are in the accumulator's type. All have the shape of place, the pair of offset that (dy, dx) is. listed:
    None where all are. Along an axis on which no pixel of the source is less than one away, or where not listed, the
    pixel is outside of it, and so is the next one: see is_near.
    """
    dy, dx = load_pair(offset, place, listed, PAIRED)
    top, below = _split_position(y + dy.to(ACCUMULATOR), listed, source_height.to(ACCUMULATOR))
    left, right = _split_position(x + dx.to(ACCUMULATOR), None, source_width.to(ACCUMULATOR))
    return top, left, below, right


@triton.jit
def _split_position(position, listed, size):
    """(whole int32, rest): floor(position) and what is left; -2 and 0 where not above -1 (NaN) and size and 0 past it.

    A condition for each axis and side: of their conjunction the compiler makes three times the instructions.
    """
    inside = position > -1.0
    if listed is not None:
        inside &= listed
    position = tl.where(inside, tl.minimum(position, size), -2.0)
    whole = tl.floor(position)
    return whole.to(tl.int32), position - whole


@triton.jit
def is_near(top, left, source_height, source_width):
    """Whether any pixel of the source is less than one away from a position: see `locate`."""
    return (top >= -1) & (top < source_height) & (left >= -1) & (left < source_width)


@triton.jit
def as_column(rows):
    """What belongs to rows, as it is spread over channels: [M] as [M, 1], what has that dimension already as it is."""
    if len(rows.shape) == 1:
        rows = rows[:, None]
    return rows


@triton.jit
def find_corner(corner, sample, top, left, below, right, source_height, source_width):
    """(row, valid, share_y, share_x), shaped as `top` is, of one of the four pixels around a position: see `locate`.

    Its row of the source, whether it has one, and its shares of the sample along either axis, 1 - distance. The corners
    0 to 3 are those above on the left and right, then those below.
    """
    down = corner // 2
    beside = corner % 2
    valid = is_inside(top + down, left + beside, source_height, source_width)
    row = (sample * source_height + top + down) * source_width + left + beside
    return row, valid, tl.abs((1 - down) - below), tl.abs((1 - beside) - right)


@triton.jit
def weigh_corner(corner: tl.constexpr, sample, top, left, below, right, scale, source_height, source_width):
    """(row, valid, share) of a corner: as find_corner, of one known at compile time, with its scaled share of all."""
    if corner // 2 == 0:
        share = 1 - below
    else:
        share = below
    if scale is not None:
        share *= scale
    if corner % 2 == 0:
        share *= 1 - right
    else:
        share *= right
    valid = is_inside(top + corner // 2, left + corner % 2, source_height, source_width)
    row = (sample * source_height + top) * source_width + left
    return row + (corner // 2 * source_width + corner % 2), valid, share


@triton.jit
def sample_pixels(
    source,
    sample,
    top,
    left,
    below,
    right,
    scale,
    c_inside,
    columns,
    source_height,
    source_width,
    OFFSET: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """scale * sample(position, c), [M, C] in the accumulator's type: see `locate`.

    What belongs to a position is [M], scale too, which may be None. source points to c of the source's first row,
    [1, C] as c_inside is; a row has that many columns. OFFSET is the integer that counts the elements of the source.
    """
    # Unrolled: the four loads do not wait for one another.
    for corner in tl.static_range(4):
        row, valid, share = weigh_corner(corner, sample, top, left, below, right, scale, source_height, source_width)
        element = row.to(OFFSET) * columns
        value = tl.load(source + element[:, None], mask=valid[:, None] & c_inside, other=0.0).to(ACCUMULATOR)
        if corner == 0:
            total = share[:, None] * value
        else:
            total += share[:, None] * value
    return total


@triton.jit
def add_pixels(
    total,
    other,
    source,
    other_source,
    sample,
    top,
    left,
    below,
    right,
    scale,
    inside,
    other_inside,
    columns,
    source_height,
    source_width,
    PIECES: tl.constexpr,
    OFFSET: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """(total, other) + scale * sample(position, c): as sample_pixels, with positions [M, 1] and c [M, C].

    other are more channels of the same positions, if PIECES is 2. Of inside, None says that all c are. The source has a
    row at least: what is outside of it reads the first one and is not added, a condition of the addition's own. Zeros
    in its place would have to be written to the registers ahead of each load.
    """
    for corner in tl.static_range(4):
        row, valid, share = weigh_corner(corner, sample, top, left, below, right, scale, source_height, source_width)
        element = tl.where(valid, row, 0).to(OFFSET) * columns
        total = tl.where(valid, total + share * _load(source + element, inside).to(ACCUMULATOR), total)
        if PIECES == 2:
            other = tl.where(valid, other + share * _load(other_source + element, other_inside).to(ACCUMULATOR), other)
    return total, other


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
    scale,
    c,
    c_inside,
    columns,
    source_height,
    source_width,
    along_y,
    along_x,
    value,
    OFFSET: tl.constexpr,
    WANTS_SUMS: tl.constexpr,
):
    """The backward of `sample_pixels`, of the grad `column` [..., C] of scale * sample(position, c).

    Adds the source's share, times fixed_scale and rounded, to fixed, if given. Returns along_y, along_x and value, each
    shaped as `top`, with sums over c added if WANTS_SUMS: of column * d sample / d position, and of column * sample.
    """
    LAST: tl.constexpr = len(column.shape) - 1
    # Not unrolled: what a corner needs, addresses and integers of 64 bits, would not find registers four times.
    for corner in tl.range(0, 4, loop_unroll_factor=1):
        row, valid, share_y, share_x = find_corner(corner, sample, top, left, below, right, source_height, source_width)
        element = as_column(row.to(OFFSET)) * columns + c
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
    PAIRED: tl.constexpr,
    OFFSET: tl.constexpr,
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
    first_tap = row.to(OFFSET) * (offset_groups * TAPS)

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight_pointer = weight + (group * filters + n).to(tl.int64)[:, None] * (TAPS * group_runs * run) + k[None, :]
    n_inside = n[:, None] < filters

    # The product is transposed: wgmma takes its second operand from shared memory, into which the samples go. As the
    # first they would come out of registers, and the assembler would let no two products overlap.
    total = tl.zeros([BLOCK_N, BLOCK_M], ACCUMULATOR)
    part = 0
    tap = 0
    channel = 0
    # One loop, not three, for the software pipeline; a position is computed again for each step of its channels.
    for _ in range(0, group_runs * TAPS * tl.cdiv(run, BLOCK_K)):
        run_index = group * group_runs + part
        place = first_tap + (run_index // offset_group_runs * TAPS + tap)
        top, left, below, right = locate(
            offset,
            place,
            (y + tap // KERNEL_WIDTH * dilation_h).to(ACCUMULATOR),
            (x + tap % KERNEL_WIDTH * dilation_w).to(ACCUMULATOR),
            listed,
            source_height,
            source_width,
            ACCUMULATOR,
            PAIRED,
        )
        if mask is None:
            scale = None
        else:
            scale = tl.load(mask + place, mask=listed, other=0.0).to(ACCUMULATOR)
        k_inside = channel + k < run
        a = sample_pixels(
            source + (run_index * run + channel + k)[None, :],
            sample,
            top,
            left,
            below,
            right,
            scale,
            k_inside[None, :],
            groups * group_runs * run,
            source_height,
            source_width,
            OFFSET,
            ACCUMULATOR,
        )
        b_offset = (tap * group_runs + part) * run + channel
        b = tl.load(weight_pointer + b_offset, mask=k_inside[None, :] & n_inside, other=0.0)
        total = tl.dot(
            b, tl.trans(a.to(source.dtype.element_ty)), total, input_precision=PRECISION, out_dtype=ACCUMULATOR
        )
        channel += BLOCK_K
        tap += (channel >= run).to(tl.int32)
        channel = tl.where(channel >= run, 0, channel)
        part += (tap >= TAPS).to(tl.int32)
        tap = tl.where(tap >= TAPS, 0, tap)

    column = group * filters + n
    if bias is not None:
        total += tl.load(bias + column, mask=n < filters, other=0.0).to(ACCUMULATOR)[:, None]
    target = row[:, None] * (groups * filters) + column[None, :]
    tl.store(out + target, tl.trans(total).to(out.dtype.element_ty), mask=listed[:, None] & tl.trans(n_inside))


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
    PAIRED: tl.constexpr,
    OFFSET: tl.constexpr,
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
    source += run_index * run + n[None, :]
    grad += group * filters
    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        site = start + tl.arange(0, BLOCK_K)
        listed = site < end
        sample, y, x = split_site(
            site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
        )
        row = site.to(tl.int64)
        place = row.to(OFFSET) * (offset_groups * TAPS) + (run_index // offset_group_runs * TAPS + tap)
        top, left, below, right = locate(
            offset,
            place,
            (y * STRIDE_H + tap_y).to(ACCUMULATOR),
            (x * STRIDE_W + tap_x).to(ACCUMULATOR),
            listed,
            source_height,
            source_width,
            ACCUMULATOR,
            PAIRED,
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
            scale,
            n_inside,
            groups * group_runs * run,
            source_height,
            source_width,
            OFFSET,
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
    PAIRED: tl.constexpr,
    OFFSET: tl.constexpr,
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
    place = row.to(OFFSET) * (offset_groups * TAPS) + (offset_group * TAPS + tap)
    top, left, below, right = locate(
        offset,
        place,
        (y * STRIDE_H + (tap // KERNEL_WIDTH * dilation_h - pad_top)).to(ACCUMULATOR),
        (x * STRIDE_W + (tap % KERNEL_WIDTH * dilation_w - pad_left)).to(ACCUMULATOR),
        listed,
        source_height,
        source_width,
        ACCUMULATOR,
        PAIRED,
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
                scale,
                c[None, :],
                n_inside[None, :],
                groups * group_runs * run,
                source_height,
                source_width,
                along_y,
                along_x,
                value,
                OFFSET,
                grad_offset is not None or grad_mask is not None,
            )

    if grad_mask is not None:
        tl.store(grad_mask + place, value.to(grad_mask.dtype.element_ty), mask=listed)
    if grad_offset is not None:
        if scale is not None:
            along_y *= scale
            along_x *= scale
        inside = is_near(top, left, source_height, source_width)
        along_y = tl.where(inside, along_y, 0.0)
        along_x = tl.where(inside, along_x, 0.0)
        tl.store(grad_offset + 2 * place, along_y.to(grad_offset.dtype.element_ty), mask=listed)
        tl.store(grad_offset + 2 * place + 1, along_x.to(grad_offset.dtype.element_ty), mask=listed)


@triton.jit
def find_pairs(local, start, groups, groups_multiplier, groups_shift, sites):
    """(row, site int32, group, listed), like `local`, of pairs of site and group: the local-th from the `start`-th on.

    Row is of start's type. Past the last pair, where not listed, it is the last one again: what it reads needs no mask.
    """
    rest = tl.minimum(sites.to(start.dtype) * groups - start, 2**30).to(tl.int32)
    listed = local < rest
    local = tl.minimum(local, rest - 1)
    if start.dtype == tl.int32:
        site = divide(start + local, groups_multiplier, groups_shift)
        group = start + local - site * groups
    else:
        first = start // groups
        group = (start - first * groups).to(tl.int32) + local
        step = divide(group, groups_multiplier, groups_shift)
        site = first.to(tl.int32) + step
        group -= step * groups
    return start + local, site, group, listed


@triton.jit
def find_columns(first, BLOCK_M: tl.constexpr, LANES: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """(c, other): PIECES * LANES * PIECE channels from the `first` on, of each of BLOCK_M pairs.

    A thread has PIECE channels of a pair, 16 bytes, hence LANES threads: [BLOCK_M * LANES, PIECE]. With PIECES == 2 it
    has as many `other` ones. Which come first alternates between the pairs of one 128-byte line and those of the next:
    together the threads of a warp read all of a line, not twice the same half of it.
    """
    LINE_PAIRS: tl.constexpr = max(1, 8 // (PIECES * LANES))
    thread = tl.arange(0, BLOCK_M * LANES)[:, None]
    inner = thread % LANES * PIECE + tl.arange(0, PIECE)[None, :]
    if PIECES == 1:
        turn = 0
    else:
        tl.static_assert(PIECES == 2)
        turn = thread // (LANES * LINE_PAIRS) % 2
    return first + turn * (LANES * PIECE) + inner, first + (1 - turn) * (LANES * PIECE) + inner


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
    groups_multiplier,
    groups_shift,
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
    PAIRED: tl.constexpr,
    OFFSET: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """out[s, g, c] = sum over tap of weights[s, g, tap] * sample(position(s, g, tap), (g, c)).

    A row is a pair of site and group: offset [rows, taps, 2], weights [rows, taps], out [rows, channels of a group],
    source [pixels, groups * channels].
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    LANES: tl.constexpr = BLOCK_C // (PIECES * PIECE)
    channels = channel_units * CHANNEL_UNIT
    # The tiles of C of the same rows are neighbours in launch order: they share offsets and weights in L2.
    tiles_c = tl.cdiv(channels, BLOCK_C)
    start = (tl.program_id(0) // tiles_c).to(OFFSET) * BLOCK_M
    # What belongs to a pair is [BLOCK_M * LANES, 1]: each thread with channels of it finds that for itself. One that
    # found it for others would hand it over through shared memory, at every tap.
    thread = tl.arange(0, BLOCK_M * LANES)[:, None]
    row, site, group, listed = find_pairs(thread // LANES, start, groups, groups_multiplier, groups_shift, sites)
    sample, y, x = split_site(
        site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
    y = y * STRIDE_H - pad_top
    x = x * STRIDE_W - pad_left
    c, other_c = find_columns(tl.program_id(0) % tiles_c * BLOCK_C, BLOCK_M, LANES, PIECES, PIECE)
    inside = None if EVEN else c < channels
    other_inside = None if EVEN else other_c < channels
    first = source + group * channels

    total = tl.zeros([BLOCK_M * LANES, PIECE], ACCUMULATOR)
    other = total
    for tap_row in range(KERNEL_HEIGHT):
        tap_y = (y + tap_row * dilation_h).to(ACCUMULATOR)
        for tap_column in tl.static_range(KERNEL_WIDTH):
            place = row * TAPS + tap_row * KERNEL_WIDTH + tap_column
            top, left, below, right = locate(
                offset,
                place,
                tap_y,
                (x + tap_column * dilation_w).to(ACCUMULATOR),
                None,
                source_height,
                source_width,
                ACCUMULATOR,
                PAIRED,
            )
            total, other = add_pixels(
                total,
                other,
                first + c,
                first + other_c,
                sample,
                top,
                left,
                below,
                right,
                tl.load(weights + place).to(ACCUMULATOR),
                inside,
                other_inside,
                groups * channels,
                source_height,
                source_width,
                PIECES,
                OFFSET,
                ACCUMULATOR,
            )
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + (row * channels + c), total.to(dtype), mask=listed if EVEN else listed & inside)
    if PIECES == 2:
        tl.store(out + (row * channels + other_c), other.to(dtype), mask=listed if EVEN else listed & other_inside)


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
    groups_multiplier,
    groups_shift,
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
    PAIRED: tl.constexpr,
    OFFSET: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The gradients of _aggregate_kernel's operands from one tap at BLOCK_M rows, pairs of site and group.

    fixed[p, c] += scales[0] * weights[row, tap] * share of p in the sample * grad[row, c]
    grad_weights = sum over c of grad * sample
    grad_offset  = weights * sum over c of grad * d sample / d position

    fixed int64 [pixels, groups * channels], scales float64 [2] (see _fixed_point). Each of fixed, grad_offset and
    grad_weights may be None.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    LANES: tl.constexpr = BLOCK_C // (PIECES * PIECE)
    channels = channel_units * CHANNEL_UNIT
    # The taps of the same rows are neighbours in launch order: they share the rows of grad in L2.
    tap = tl.program_id(0) % TAPS
    start = (tl.program_id(0) // TAPS).to(OFFSET) * BLOCK_M
    thread = tl.arange(0, BLOCK_M * LANES)[:, None]
    row, site, group, listed = find_pairs(thread // LANES, start, groups, groups_multiplier, groups_shift, sites)
    sample, y, x = split_site(
        site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
    place = row * TAPS + tap
    top, left, below, right = locate(
        offset,
        place,
        (y * STRIDE_H + (tap // KERNEL_WIDTH * dilation_h - pad_top)).to(ACCUMULATOR),
        (x * STRIDE_W + (tap % KERNEL_WIDTH * dilation_w - pad_left)).to(ACCUMULATOR),
        listed,
        source_height,
        source_width,
        ACCUMULATOR,
        PAIRED,
    )
    scale = tl.load(weights + place, mask=listed, other=0.0).to(ACCUMULATOR)
    fixed_scale = None
    if fixed is not None:
        fixed_scale = tl.load(scales).to(ACCUMULATOR)

    along_y = tl.zeros([BLOCK_M * LANES, 1], ACCUMULATOR)
    along_x = tl.zeros([BLOCK_M * LANES, 1], ACCUMULATOR)
    value = tl.zeros([BLOCK_M * LANES, 1], ACCUMULATOR)
    for channel in range(0, channels, BLOCK_C):
        c, _ = find_columns(channel, BLOCK_M, LANES, PIECES, PIECE)
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
            scale,
            group * channels + c,
            c_inside,
            groups * channels,
            source_height,
            source_width,
            along_y,
            along_x,
            value,
            OFFSET,
            grad_offset is not None or grad_weights is not None,
        )

    # The threads of a pair, which have each their share of the sums, meet here.
    pair, _, _, writes = find_pairs(tl.arange(0, BLOCK_M), start, groups, groups_multiplier, groups_shift, sites)
    place = pair * TAPS + tap
    if grad_weights is not None:
        value = tl.sum(tl.reshape(value, [BLOCK_M, LANES]), axis=1)
        tl.store(grad_weights + place, value.to(grad_weights.dtype.element_ty), mask=writes)
    if grad_offset is not None:
        inside = is_near(top, left, source_height, source_width)
        along_y = tl.sum(tl.reshape(tl.where(inside, along_y * scale, 0.0), [BLOCK_M, LANES]), axis=1)
        along_x = tl.sum(tl.reshape(tl.where(inside, along_x * scale, 0.0), [BLOCK_M, LANES]), axis=1)
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
    if input.numel() == 0:  # no pixel to read: all positions are outside
        out.zero_()
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
    multiplier, shift = divisor(groups)[1:]
    units |= dict(groups=groups, groups_multiplier=multiplier, groups_shift=shift)
    return sites * groups, channels, dict(**geometry, **units)


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
        # Whether a pair of offsets is a word of its own; Triton itself looks no finer than 16 bytes.
        PAIRED=offset.element_size() <= 4 and offset.data_ptr() % (2 * offset.element_size()) == 0,
        OFFSET=offset_type(input.numel(), offset.numel(), sites * input.shape[1]),
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
