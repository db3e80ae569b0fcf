"""Dynamic filters: every output site brings its own taps, shared by a group of channels. Bound by memory, and by L1.

    out[n, c, s] = sum over tap of w[n, g(c), tap, s] * channel_filters[n, c, tap] * input[n, c, p(s, tap)]

w are the filters, normalised over the taps of a group at a site. Site (oy, ox) reads at the tap (ky, kx) the pixel
(oy // scale_factor * stride_h - pad_top + ky * dilation_h, ox // scale_factor * stride_w - pad_left + kx * dilation_w),
and zero outside the input.

All tensors are channels_last: input [N, C, H, W] has a row of C channels for each pixel, filters [N, G * K, Ho, Wo] a
row of G * K for each site. Both are the same memory as rows of one *group*, [pixels * G, C / G] and [sites * G, K], and
that is how the kernels see them: BLOCK_M rows, each a group of a site, by BLOCK_C channels of the group. A filter is
then one number for a row, read once for all channels of the tile, and neighbouring rows are neighbouring groups of one
pixel: the threads of a warp read whole 128-byte lines, 16 bytes each, however small the groups are (16 half-precision
channels of involution are 32 bytes) and however many.

`index` int32 [N * Ho * Wo] and `count` int32 [1] name the sites; None is all of them. Rows of other sites, of filters,
grad and out, are neither read nor written.
"""

import math

import torch
import triton
import triton.language as tl

from ._common import (
    accumulator,
    divide,
    divisor,
    is_inside,
    offset_type,
    on_device,
    partial_dtype,
    sigmoid,
    split_rows,
    split_site,
    undo_stride,
    unit,
    warps,
)

THREADS = 128
# What a program loads for a pixel: one 16-byte load for each thread. The taps of a kernel's row are in flight together,
# UNROLL of them at most.
TILE_BYTES = 2048
UNROLL = 7
# What a gradient of filters loads at a time, for all its taps: four 16-byte loads for each thread.
GRAD_BYTES = 8192
# Filters that a block of the normalisation holds, and the most taps of a row that it takes at once.
NORMALIZE_ELEMENTS = 1024
NORMALIZE_TAPS = 16
# Rows that do not start on 16 bytes are loaded element by element, each with an address and a condition in registers:
# by a stencil one for each thread and UNALIGNED_UNROLL taps at a time, with more it spills; by a gradient one tile.
UNALIGNED_ELEMENTS = 128
UNALIGNED_UNROLL = 3
UNALIGNED_GRAD_ELEMENTS = 1024
# The gradient of the channel filters: programs in flight, the fewest steps that are worth a split, and the most taps of
# a program.
CHANNEL_GRAD_PROGRAMS = 1024
CHANNEL_GRAD_STEPS = 8
CHANNEL_GRAD_TAPS = 16
# The least norm that a filter is divided by, as in torch.nn.functional.normalize.
LEAST_NORM = tl.constexpr(1e-12)

_VARIES = ["source_height", "source_width", "site_height", "height_multiplier", "height_shift"]
_VARIES += ["site_width", "width_multiplier", "width_shift", "groups", "groups_multiplier", "groups_shift"]
_VARIES += ["sites", "runs", "runs_width", "group_units", "pad_top", "pad_left", "dilation_h", "dilation_w", "splits"]


def config(dtype, group_channels, taps):
    """Tile: BLOCK_C channels of a group, at most one 128-byte line, by BLOCK_M rows, or runs of them.

    A thread has PIECE channels of a row. BLOCK_T is the normalisation's.

    The same for every architecture: what it is made of, 16-byte loads and 128-byte lines, is too.
    """
    block_c = _line(dtype, group_channels)
    block_m = _elements(dtype, group_channels, TILE_BYTES, UNALIGNED_ELEMENTS) // block_c
    block_t = min(NORMALIZE_TAPS, NORMALIZE_ELEMENTS // block_m, triton.next_power_of_2(taps))
    piece = 16 // dtype.itemsize if _is_aligned(dtype, group_channels) else 1
    return dict(BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_T=block_t, PIECE=piece, num_warps=warps(THREADS))


def normalize_config(taps):
    """Tile: BLOCK_M rows by BLOCK_T of their taps."""
    block_t = min(NORMALIZE_TAPS, triton.next_power_of_2(taps))
    return dict(BLOCK_T=block_t, BLOCK_M=NORMALIZE_ELEMENTS // block_t, num_warps=warps(THREADS))


def filter_grad_config(dtype, group_channels, taps):
    """Tile: all taps, BLOCK_T, by BLOCK_M rows by BLOCK_C channels: the normalisation's gradient needs all of them."""
    elements = _elements(dtype, group_channels, GRAD_BYTES, UNALIGNED_GRAD_ELEMENTS)
    block_t = triton.next_power_of_2(taps)
    block_c = min(_line(dtype, group_channels), max(1, elements // block_t))
    block_m = max(1, elements // (block_t * block_c))
    return dict(BLOCK_T=block_t, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=warps(THREADS))


def channel_grad_config(dtype, group_channels, taps):
    """Tile: BLOCK_T taps, BLOCK_K sites a step, BLOCK_C channels of a group."""
    elements = _elements(dtype, group_channels, GRAD_BYTES, UNALIGNED_GRAD_ELEMENTS)
    block_c = _line(dtype, group_channels)
    block_t = min(CHANNEL_GRAD_TAPS, triton.next_power_of_2(taps))
    block_k = max(2, elements // (block_t * block_c))
    return dict(BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_C=block_c, num_warps=warps(THREADS))


def _line(dtype, group_channels):
    return min(128 // dtype.itemsize, triton.next_power_of_2(group_channels))


def _elements(dtype, group_channels, tile_bytes, unaligned):
    elements = tile_bytes // dtype.itemsize
    if not _is_aligned(dtype, group_channels):
        return min(elements, unaligned)
    # With more, ptxas spills for sm_100 in the gradient of filters.
    return min(elements, 512) if dtype == torch.float64 else elements


def _is_aligned(dtype, group_channels):
    return unit(group_channels) * dtype.itemsize >= 16


@triton.jit
def _find_rows(index, local, start, sites, groups, groups_multiplier, groups_shift):
    """(site, group, listed), int32 and bool, of the rows start + local: groups run fastest, then sites.

    Rows are numbered in the type of start, int64 if there are that many; from their first site on, 32 bits and no
    division will do. Past the last listed site, of which there is one, it is that one again: it may be read.
    """
    first = start // groups
    local += (start - first * groups).to(tl.int32)
    step = divide(local, groups_multiplier, groups_shift)
    listed = first + step < sites
    row = tl.minimum(first + step, sites - 1)
    if index is not None:
        site = tl.load(index + row)
    else:
        site = row.to(tl.int32)
    return site, local - step * groups, listed


@triton.jit
def _load_filters(filters, row, tap, listed, absent, TAPS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """[BLOCK_M, BLOCK_T] of the rows [rows, TAPS]: `absent` past the last tap, zero in rows not listed."""
    tap_inside = (tap < TAPS)[None, :]
    offset = row[:, None] * TAPS + tap[None, :]
    values = tl.load(filters + offset, mask=listed[:, None] & tap_inside, other=0.0).to(ACCUMULATOR)
    return tl.where(tap_inside, values, absent)


@triton.jit
def _statistics(
    filters,
    row,
    listed,
    NORMALIZATION: tl.constexpr,
    TAPS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(shift, scale), each [BLOCK_M]: what _normalized needs to know of all taps of a row.

    Blocks of taps rather than tap by tap: threads that share a row in a stencil would each take every exponential.
    The largest filter comes before the sum, not along with it: minus infinity, a tap left out, may fill a block.
    """
    shift = tl.zeros(row.shape, ACCUMULATOR)
    scale = tl.full(row.shape, 1.0, ACCUMULATOR)
    if NORMALIZATION == "softmax":
        shift = tl.full(row.shape, float("-inf"), ACCUMULATOR)
        for first in range(0, TAPS, BLOCK_T):
            tap = first + tl.arange(0, BLOCK_T)
            values = _load_filters(filters, row, tap, listed, float("-inf"), TAPS, ACCUMULATOR)
            shift = tl.maximum(shift, tl.max(values, axis=1))
        total = tl.zeros(row.shape, ACCUMULATOR)
        for first in range(0, TAPS, BLOCK_T):
            tap = first + tl.arange(0, BLOCK_T)
            values = _load_filters(filters, row, tap, listed, float("-inf"), TAPS, ACCUMULATOR)
            total += tl.sum(tl.exp(values - shift[:, None]), axis=1)
        scale = 1.0 / total
    elif NORMALIZATION == "l2":
        total = tl.zeros(row.shape, ACCUMULATOR)
        for first in range(0, TAPS, BLOCK_T):
            tap = first + tl.arange(0, BLOCK_T)
            values = _load_filters(filters, row, tap, listed, 0.0, TAPS, ACCUMULATOR)
            total += tl.sum(values * values, axis=1)
        norm = tl.sqrt(total)
        scale = 1.0 / tl.where(norm < LEAST_NORM, LEAST_NORM, norm)  # not a maximum: NaN stays NaN
    return shift, scale.to(ACCUMULATOR)


@triton.jit
def _normalized(filter, shift, scale, NORMALIZATION: tl.constexpr):
    """The weight that a filter is, with the statistics of its row."""
    if NORMALIZATION == "softmax":
        filter = tl.exp(filter - shift) * scale
    elif NORMALIZATION == "sigmoid":
        filter = sigmoid(filter)
    elif NORMALIZATION == "l2":
        filter = filter * scale
    else:
        tl.static_assert(NORMALIZATION == "none", "unknown normalization")
    return filter


@triton.jit
def _load_words(filters, first, TAPS: tl.constexpr):
    """Four words with the half-precision filters first to first + TAPS - 1, two to a word; TAPS is odd, 7 at most.

    A row begins on any of them, a load on an even one: with an odd first, a word is put together from two.
    """
    pointer = filters.to(tl.pointer_type(tl.uint32), bitcast=True) + (first >> 1)
    shift = ((first & 1) * 16).to(tl.uint32)
    word0 = tl.load(pointer)
    word1 = tl.load(pointer + 1) if TAPS > 1 else word0
    word2 = tl.load(pointer + 2) if TAPS > 3 else word1
    word3 = tl.load(pointer + 3) if TAPS > 5 else word2
    return _funnel(word0, word1, shift), _funnel(word1, word2, shift), _funnel(word2, word3, shift), word3 >> shift


@triton.jit
def _funnel(low, high, shift):
    return (low >> shift) | (high << 1 << (shift ^ 31))


@triton.jit
def _find_turn(row, turn, x, groups, site_width, RUN: tl.constexpr):
    """The row of a run's site: of the last one where the line of sites is over. row and x are those of its first."""
    if RUN > 1:
        row += tl.minimum(turn, site_width - 1 - x) * groups
    return row


@triton.jit
def _of_turn(statistic, turn, RUN: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """[BLOCK_M * LANES, 1]: a run's one of [RUN * BLOCK_M], for each thread of the row."""
    if RUN > 1:
        of_turn = (tl.arange(0, RUN) == turn)[:, None]
        statistic = tl.sum(tl.where(of_turn, tl.reshape(statistic, [RUN, BLOCK_M]), 0.0), axis=0)
    return tl.reshape(tl.broadcast_to(statistic[:, None], [BLOCK_M, LANES]), [BLOCK_M * LANES, 1])


@triton.jit
def _replaced(values, place: tl.constexpr, value):
    return values[:place] + (value,) + values[place + 1 :]  # noqa: RUF005, which Triton does not know


@triton.jit
def _half_of(words, tap: tl.constexpr, DTYPE: tl.constexpr):
    """The filter `tap` of the words of _load_words."""
    return (words[tap // 2] >> (tap % 2 * 16)).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit(do_not_specialize=_VARIES)
def _dynamic_filter_kernel(
    source,
    filters,
    channel_filters,
    lookup,
    index,
    count,
    out,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    runs_width,
    width_multiplier,
    width_shift,
    groups,
    groups_multiplier,
    groups_shift,
    runs,
    group_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    site_width,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    OFFSET: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    RUN: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Stencil with filters of its own at each listed site, group by group.

    forward     out[s, g, c] = sum over tap of w[s, g, tap] * channel[n, tap, g, c] * source[p(s, tap), g, c]
    TRANSPOSED  out[p, g, c] = sum over tap, s of w[s, g, tap] * channel[n, tap, g, c] * source[s, g, c], p(s, tap) = p

    source [source rows, groups, channels of one], out likewise by site (pixel, where TRANSPOSED), filters
    [sites, groups, taps], w = normalised filters, channel_filters [samples, taps, groups, channels] or None. lookup
    int32 [source rows], where TRANSPOSED, is negative at the sites that do not count; None: all count.
    Skips rows not listed, taps that fall outside the source, and sites that lookup does not have: neither their filters
    nor their source are read.

    A run is RUN sites side by side, which mostly read the same pixels: each is loaded and converted once for all of
    them. runs_width runs are a line of sites, the last one maybe cut; of the listed sites, in whatever order, a run has
    one. Runs of more have a stride and dilation of 1 along the line, UNROLL == KERNEL_WIDTH, and RUN is a multiple of
    SCALE. WORDS: filters are loaded by _load_words.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    LANES: tl.constexpr = BLOCK_C // PIECE
    # How many pixels the last site of a run is ahead of the first one.
    AHEAD: tl.constexpr = (RUN - 1) // SCALE if RUN > 1 else 0
    if count is not None:
        runs = tl.load(count)
    # A product with a constant shows the compiler what divides the row length, hence how wide a load may be.
    channels = group_units * GROUP_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    # The tiles of C of the same rows are neighbours in launch order: they share filters in L2.
    tile_c = tl.program_id(0) % tiles_c
    start = (tl.program_id(0) // tiles_c).to(OFFSET) * BLOCK_M
    if start // groups >= runs:
        return

    shifts = (0.0, 0.0, 0.0, 0.0)
    scales = (1.0, 1.0, 1.0, 1.0)
    if not TRANSPOSED and (NORMALIZATION == "softmax" or NORMALIZATION == "l2"):
        # By rows alone: the threads of a row would each read all of its filters. Ahead of all else, which does not have
        # to outlast the divisions then.
        number = tl.arange(0, RUN * BLOCK_M)
        run, group, listed = _find_rows(index, number % BLOCK_M, start, runs, groups, groups_multiplier, groups_shift)
        sample, y, x = split_site(
            run, site_height, height_multiplier, height_shift, runs_width, width_multiplier, width_shift
        )
        x *= RUN
        row = ((sample * site_height + y) * site_width + x).to(OFFSET) * groups + group
        row = _find_turn(row, number // BLOCK_M, x, groups, site_width, RUN)
        # Of the row that stands in for one not listed as well: its filters are read, and meet their own statistics.
        shift, scale = _statistics(filters, row, row >= 0, NORMALIZATION, TAPS, ACCUMULATOR, BLOCK_T)
        shifts = ()
        scales = ()
        for turn in tl.static_range(RUN):
            shifts += (_of_turn(shift, turn, RUN, BLOCK_M, LANES),)
            scales += (_of_turn(scale, turn, RUN, BLOCK_M, LANES),)

    # A thread has PIECE channels of a row, 16 bytes: [BLOCK_M * LANES, PIECE]. What belongs to a row, [.., 1], each of
    # its threads finds for itself, or it would go through shared memory.
    thread = tl.arange(0, BLOCK_M * LANES)[:, None]
    run, group, listed = _find_rows(index, thread // LANES, start, runs, groups, groups_multiplier, groups_shift)
    sample, y, x = split_site(
        run, site_height, height_multiplier, height_shift, runs_width, width_multiplier, width_shift
    )
    x *= RUN
    site_x = x
    row = ((sample * site_height + y) * site_width + x).to(OFFSET) * groups + group
    if TRANSPOSED:
        y += pad_top
        x += pad_left
    else:
        y = y // SCALE * STRIDE_H - pad_top
        x = x // SCALE * STRIDE_W - pad_left
    c = tile_c * BLOCK_C + thread % LANES * PIECE + tl.arange(0, PIECE)[None, :]
    c_inside = c < channels
    columns = groups.to(OFFSET) * channels
    source += group * channels + c
    channel_row = (sample.to(OFFSET) * TAPS * groups + group) * channels + c

    rows = ()
    totals = ()
    for turn in tl.static_range(RUN):
        rows += (_find_turn(row, turn, site_x, groups, site_width, RUN),)
        totals += (tl.zeros([BLOCK_M * LANES, PIECE], ACCUMULATOR),)
    # scale_factor**2 sites stand on one position of the kernel.
    for position in range(SCALE * SCALE if TRANSPOSED else 1):
        for tap_row in range(KERNEL_HEIGHT):
            tap_y = tap_row * dilation_h
            if not TRANSPOSED:
                in_line = listed & is_inside(y + tap_y, tl.zeros_like(y), source_height, 1)
                line = ((sample * source_height + y + tap_y) * source_width + x).to(OFFSET) * columns
                if WORDS:
                    words = ()
                    for turn in tl.static_range(RUN):
                        words += (_load_words(filters, rows[turn] * TAPS + tap_row * KERNEL_WIDTH, KERNEL_WIDTH),)
            for first_column in range(0, KERNEL_WIDTH, UNROLL):
                # Unrolled taps do not wait for one another.
                for step in tl.static_range(UNROLL + AHEAD):
                    tap_x = (first_column + step) * dilation_w
                    if TRANSPOSED:
                        source_y, source_x, valid = undo_stride(y - tap_y, x - tap_x, STRIDE_H, STRIDE_W)
                        source_y = source_y * SCALE + position // SCALE
                        source_x = source_x * SCALE + position % SCALE
                        valid &= listed & is_inside(source_y, source_x, source_height, source_width)
                        source_row = (sample * source_height + source_y) * source_width + source_x
                        if lookup is not None:
                            valid = tl.load(lookup + source_row, mask=valid, other=-1) >= 0
                        element = source_row.to(OFFSET) * columns
                    else:
                        valid = in_line & is_inside(tl.zeros_like(x), x + tap_x, 1, source_width)
                        element = line + tap_x * columns
                    a = tl.load(source + element, mask=valid & c_inside, other=0.0).to(ACCUMULATOR)
                    for turn in tl.static_range(RUN):
                        # A site's first pixel is turn // SCALE ahead of its run's.
                        if step >= turn // SCALE and step - turn // SCALE < UNROLL:
                            tap = tap_row * KERNEL_WIDTH + first_column + (step - turn // SCALE)
                            if TRANSPOSED:
                                filter_row = source_row.to(OFFSET) * groups + group
                                weight = tl.load(filters + (filter_row * TAPS + tap), mask=valid, other=0.0)
                                weight = weight.to(ACCUMULATOR)
                            else:
                                # Outside the source as well: a filter that is not finite gives NaN, as unfold does.
                                if WORDS:
                                    weight = _half_of(words[turn], step - turn // SCALE, filters.dtype.element_ty)
                                else:
                                    weight = tl.load(filters + (rows[turn] * TAPS + tap))
                                weight = _normalized(weight.to(ACCUMULATOR), shifts[turn], scales[turn], NORMALIZATION)
                            if channel_filters is not None:
                                channel = tl.load(
                                    channel_filters + (channel_row + tap * columns), mask=c_inside, other=0.0
                                )
                                weight = weight * channel.to(ACCUMULATOR)
                            totals = _replaced(totals, turn, totals[turn] + a * weight)

    for turn in tl.static_range(RUN):
        writes = listed & c_inside
        if RUN > 1:
            writes &= site_x + turn < site_width
        tl.store(out + ((row + turn * groups) * channels + c), totals[turn].to(out.dtype.element_ty), mask=writes)


@triton.jit(do_not_specialize=_VARIES)
def _normalize_kernel(
    filters,
    index,
    count,
    out,
    groups,
    groups_multiplier,
    groups_shift,
    sites,
    TAPS: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out[s, g, tap] = the normalised filters[s, g, tap], both [sites, groups, taps]. Skips sites not listed."""
    if count is not None:
        sites = tl.load(count)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    if start // groups >= sites:
        return
    site, group, listed = _find_rows(
        index, tl.arange(0, BLOCK_M), start, sites, groups, groups_multiplier, groups_shift
    )
    row = site.to(tl.int64) * groups + group
    shift, scale = _statistics(filters, row, listed, NORMALIZATION, TAPS, ACCUMULATOR, BLOCK_T)
    for first_tap in range(0, TAPS, BLOCK_T):
        tap = first_tap + tl.arange(0, BLOCK_T)
        absent: tl.constexpr = float("-inf") if NORMALIZATION == "softmax" else 0.0
        values = _load_filters(filters, row, tap, listed, absent, TAPS, ACCUMULATOR)
        values = _normalized(values, shift[:, None], scale[:, None], NORMALIZATION)
        inside = listed[:, None] & (tap < TAPS)[None, :]
        tl.store(out + row[:, None] * TAPS + tap[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARIES)
def _dynamic_filter_grad_kernel(
    source,
    grad,
    weights,
    filters,
    channel_filters,
    index,
    count,
    out,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    site_width,
    width_multiplier,
    width_shift,
    groups,
    groups_multiplier,
    groups_shift,
    sites,
    group_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_UNIT: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[s, g, :] = J(s, g)^T d, where d[tap] = sum over c of grad[s, g, c] * channel[n, tap, g, c] * source[p, g, c].

    p = p(s, tap). J is the Jacobian of the normalisation w of the filters f over the taps of a group:
    softmax  J^T d = w * (d - w.d)      sigmoid  J^T d = w * (1 - w) * d
    l2       J^T d = (d - w * w.d) / |f|, d / LEAST_NORM where |f| is less      none  J^T d = d

    source [source rows, groups, channels of one], grad likewise by site, weights (w), filters (f, for l2) and out
    [sites, groups, taps], channel_filters [samples, taps, groups, channels] or None.
    All taps of a row are in the tile: grad is read once, and a row of out is written side by side.
    Skips sites not listed; taps outside the source are not read.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    if count is not None:
        sites = tl.load(count)
    channels = group_units * GROUP_UNIT
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    if start // groups >= sites:
        return

    site, group, listed = _find_rows(
        index, tl.arange(0, BLOCK_M), start, sites, groups, groups_multiplier, groups_shift
    )
    sample, y, x = split_site(
        site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
    row = site.to(tl.int64) * groups + group
    tap = tl.arange(0, BLOCK_T)
    tap_inside = (tap < TAPS)[:, None] & listed[None, :]
    y = (y // SCALE * STRIDE_H - pad_top)[None, :] + (tap // KERNEL_WIDTH * dilation_h)[:, None]
    x = (x // SCALE * STRIDE_W - pad_left)[None, :] + (tap % KERNEL_WIDTH * dilation_w)[:, None]
    valid = tap_inside & is_inside(y, x, source_height, source_width)
    source_row = ((sample * source_height)[None, :] + y) * source_width + x
    source_row = source_row.to(tl.int64) * groups + group[None, :]
    channel_row = (sample.to(tl.int64)[None, :] * TAPS + tap[:, None]) * groups + group[None, :]

    # The taps lie across the rows of a tile, not side by side: rows that neighbour in memory are neighbours in a warp.
    total = tl.zeros([BLOCK_T, BLOCK_M, BLOCK_C], ACCUMULATOR)
    for first_c in range(0, channels, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        c_inside = c < channels
        offset = row[:, None] * channels + c[None, :]
        dual = tl.load(grad + offset, mask=listed[:, None] & c_inside[None, :], other=0.0).to(ACCUMULATOR)
        inside = valid[:, :, None] & c_inside[None, None, :]
        offset = source_row[:, :, None] * channels + c[None, None, :]
        a = tl.load(source + offset, mask=inside, other=0.0).to(ACCUMULATOR)
        if channel_filters is not None:
            offset = channel_row[:, :, None] * channels + c[None, None, :]
            a *= tl.load(channel_filters + offset, mask=inside, other=0.0).to(ACCUMULATOR)
        total += a * dual[None, :, :]

    grad_weight = tl.sum(total, axis=2)
    offset = row[None, :] * TAPS + tap[:, None]
    if NORMALIZATION != "none":
        weight = tl.load(weights + offset, mask=tap_inside, other=0.0).to(ACCUMULATOR)
    if NORMALIZATION == "softmax":
        grad_weight = weight * (grad_weight - tl.sum(weight * grad_weight, axis=0)[None, :])
    elif NORMALIZATION == "sigmoid":
        grad_weight = weight * (1 - weight) * grad_weight
    elif NORMALIZATION == "l2":
        filter = tl.load(filters + offset, mask=tap_inside, other=0.0).to(ACCUMULATOR)
        norm = tl.sqrt(tl.sum(filter * filter, axis=0))[None, :]
        along = tl.where(norm < LEAST_NORM, 0.0, tl.sum(weight * grad_weight, axis=0)[None, :])
        grad_weight = (grad_weight - weight * along) / tl.where(norm < LEAST_NORM, LEAST_NORM, norm)
    else:
        tl.static_assert(NORMALIZATION == "none", "unknown normalization")
    tl.store(out + offset, grad_weight.to(out.dtype.element_ty), mask=tap_inside)


@triton.jit(do_not_specialize=_VARIES)
def _channel_filter_grad_kernel(
    source,
    grad,
    weights,
    index,
    starts,
    partial,
    source_height,
    source_width,
    site_height,
    height_multiplier,
    height_shift,
    site_width,
    width_multiplier,
    width_shift,
    groups,
    group_units,
    splits,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_UNIT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[n, split, tap, g, c] = sum over s in the split of w[s, g, tap] * grad[s, g, c] * source[p(s, tap), g, c].

    source [source rows, groups, channels of one], grad likewise by site, weights (w) [sites, groups, taps], partial
    [samples, splits, taps, groups, channels]. The sites of sample n are index[starts[n] : starts[n + 1]], or all of its
    sites. A split is an equal share of them: which sites meet in a sum depends on their number alone.
    Skips sites not listed; taps outside the source are not read. A program has one group: DDF, which this serves, has
    one in all.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    channels = group_units * GROUP_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tile // tiles_c
    group = tile % groups
    tile = tile // groups
    tap = tile % tl.cdiv(TAPS, BLOCK_T) * BLOCK_T + tl.arange(0, BLOCK_T)
    tile = tile // tl.cdiv(TAPS, BLOCK_T)
    split = tile % splits
    sample = tile // splits
    if starts is not None:
        first = tl.load(starts + sample)
        listed_sites = tl.load(starts + sample + 1) - first
    else:
        first = sample * site_height * site_width
        listed_sites = site_height * site_width
    begin, end = split_rows(split, splits, listed_sites, BLOCK_K)

    tap_y = (tap // KERNEL_WIDTH * dilation_h - pad_top)[:, None]
    tap_x = (tap % KERNEL_WIDTH * dilation_w - pad_left)[:, None]
    tap_inside = (tap < TAPS)[:, None]
    c_inside = c < channels
    # A sum for each site of a step: they meet once, after the loop.
    total = tl.zeros([BLOCK_T, BLOCK_K, BLOCK_C], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        local = start + tl.arange(0, BLOCK_K)
        listed = local < end
        if index is not None:
            site = tl.load(index + first + local, mask=listed, other=0)
        else:
            site = first + local
        _, y, x = split_site(
            site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
        )
        y = (y // SCALE * STRIDE_H)[None, :] + tap_y
        x = (x // SCALE * STRIDE_W)[None, :] + tap_x
        valid = listed[None, :] & tap_inside & is_inside(y, x, source_height, source_width)
        row = site.to(tl.int64) * groups + group
        weight = tl.load(weights + row[None, :] * TAPS + tap[:, None], mask=valid, other=0.0).to(ACCUMULATOR)
        offset = row[:, None] * channels + c[None, :]
        dual = tl.load(grad + offset, mask=listed[:, None] & c_inside[None, :], other=0.0).to(ACCUMULATOR)
        source_row = (sample * source_height + y) * source_width + x
        offset = (source_row.to(tl.int64) * groups + group)[:, :, None] * channels + c[None, None, :]
        a = tl.load(source + offset, mask=valid[:, :, None] & c_inside[None, None, :], other=0.0).to(ACCUMULATOR)
        total += a * (weight[:, :, None] * dual[None, :, :])

    offset = (((sample.to(tl.int64) * splits + split) * TAPS + tap) * groups + group)[:, None] * channels + c[None, :]
    tl.store(partial + offset, tl.sum(total, axis=1), mask=tap_inside & c_inside[None, :])


def forward(
    input,
    filters,
    channel_filters,
    out,
    index,
    count,
    *,
    site_size,
    kernel_size,
    stride,
    padding,
    dilation,
    scale_factor,
    normalization,
):
    """Writes out [N, C, Ho, Wo] at the listed sites. channels_last: input, filters [N, G * K, Ho, Wo] and out.

    channel_filters [N, C, kH, kW] or None; normalization "none", "softmax", "sigmoid" or "l2", of the same pass.
    """
    groups = filters.shape[1] // math.prod(kernel_size)
    where = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, scale_factor=scale_factor)
    _launch(
        input, filters, channel_filters, None, index, count, out, source_size=input.shape[2:], site_size=site_size,
        groups=groups, normalization=normalization, transposed=False, **where,
    )  # fmt: skip


def input_grad(
    grad,
    weights,
    channel_filters,
    grad_input,
    inverse,
    *,
    site_size,
    kernel_size,
    stride,
    padding,
    dilation,
    scale_factor,
):
    """Writes all of grad_input [N, C, H, W], a gather over the sites that read a pixel. All channels_last.

    weights [N, G * K, Ho, Wo] are the normalised filters; inverse int32 [N * Ho * Wo] is negative at the sites that are
    skipped, None: no site is.
    """
    groups = weights.shape[1] // math.prod(kernel_size)
    where = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, scale_factor=scale_factor)
    _launch(
        grad, weights, channel_filters, inverse, None, None, grad_input, source_size=site_size,
        site_size=grad_input.shape[2:], groups=groups, normalization="none", transposed=True, **where,
    )  # fmt: skip


def normalize(filters, out, index, count, *, groups, taps, normalization):
    """Writes the normalised filters to out, in its dtype, at the listed sites: [N, G * K, Ho, Wo], channels_last."""
    sites = _sites(filters)
    if sites == 0:
        return
    with on_device(filters):
        tile = normalize_config(taps)
        _normalize_kernel[(triton.cdiv(sites * groups, tile["BLOCK_M"]),)](
            filters,
            index,
            count,
            out,
            *divisor(groups),
            sites,
            TAPS=taps,
            NORMALIZATION=normalization,
            ACCUMULATOR=accumulator(filters.dtype),
            **tile,
        )


def filter_grad(
    grad,
    input,
    weights,
    filters,
    channel_filters,
    grad_filters,
    index,
    count,
    *,
    site_size,
    kernel_size,
    stride,
    padding,
    dilation,
    scale_factor,
    normalization,
):
    """Writes grad_filters [N, G * K, Ho, Wo], by the filters before their normalisation, at the listed sites.

    weights are the normalised filters (not read for "none"), filters the raw ones (read for "l2" alone); each of that
    shape, or None where it is not read. All channels_last.
    """
    kernel_height, kernel_width = kernel_size
    taps = kernel_height * kernel_width
    groups = grad_filters.shape[1] // taps
    group_channels = input.shape[1] // groups
    sites = _sites(grad)
    if sites == 0:
        return
    with on_device(input):
        tile = filter_grad_config(input.dtype, group_channels, taps)
        _dynamic_filter_grad_kernel[(triton.cdiv(sites * groups, tile["BLOCK_M"]),)](
            input,
            grad,
            weights if normalization != "none" else None,
            filters if normalization == "l2" else None,
            _by_tap(channel_filters),
            index,
            count,
            grad_filters,
            *input.shape[2:],
            *divisor(site_size[0]),
            *divisor(site_size[1]),
            *divisor(groups),
            sites,
            group_channels // unit(group_channels),
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            SCALE=scale_factor,
            GROUP_UNIT=unit(group_channels),
            NORMALIZATION=normalization,
            ACCUMULATOR=accumulator(input.dtype),
            **tile,
        )


def channel_grad(
    grad,
    input,
    weights,
    index,
    count,
    *,
    site_size,
    kernel_size,
    stride,
    padding,
    dilation,
    scale_factor,
):
    """Gradient of the channel filters, [N, C, kH, kW] in the compute type (fp32, fp64 for fp64).

    weights [N, G * K, Ho, Wo] are the normalised filters. index has to be in ascending order. All channels_last.
    """
    kernel_height, kernel_width = kernel_size
    taps = kernel_height * kernel_width
    groups = weights.shape[1] // taps
    samples, channels = input.shape[:2]
    group_channels = channels // groups
    sample_sites = site_size[0] * site_size[1]
    dtype = partial_dtype(input.dtype)
    if samples * sample_sites == 0:
        return torch.zeros((samples, channels, *kernel_size), dtype=dtype, device=input.device)
    with on_device(input):
        tile = channel_grad_config(input.dtype, group_channels, taps)
        tiles = samples * groups * triton.cdiv(group_channels, tile["BLOCK_C"]) * triton.cdiv(taps, tile["BLOCK_T"])
        splits = min(
            triton.cdiv(CHANNEL_GRAD_PROGRAMS, tiles),
            triton.cdiv(sample_sites, tile["BLOCK_K"] * CHANNEL_GRAD_STEPS),
        )
        partial = torch.empty((samples, splits, taps, channels), dtype=dtype, device=input.device)
        _channel_filter_grad_kernel[(tiles * splits,)](
            input,
            grad,
            weights,
            index,
            None if index is None else _starts(index, count, samples, sample_sites),
            partial,
            *input.shape[2:],
            *divisor(site_size[0]),
            *divisor(site_size[1]),
            groups,
            group_channels // unit(group_channels),
            splits,
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            SCALE=scale_factor,
            GROUP_UNIT=unit(group_channels),
            ACCUMULATOR=accumulator(input.dtype),
            **tile,
        )
    return partial.sum(1).transpose(1, 2).contiguous().view(samples, channels, *kernel_size)


def _starts(index, count, samples, sample_sites):
    """int32 [samples + 1]: where in index[:count] the sites of each sample begin, found without reading count here."""
    order = torch.arange(len(index), device=index.device)
    listed = torch.where(order < count, index, samples * sample_sites)
    bounds = torch.arange(samples + 1, dtype=index.dtype, device=index.device) * sample_sites
    return torch.searchsorted(listed, bounds, out_int32=True)


def _sites(features):
    return features.shape[0] * features.shape[2] * features.shape[3]


def _by_tap(channel_filters):
    """[N, K, C]: 16-byte loads along the channels, as those of the input; the copy is as large as a weight a sample."""
    return None if channel_filters is None else channel_filters.flatten(2).transpose(1, 2).contiguous()


def _unroll(kernel_width, aligned):
    """Taps of a kernel's row in flight: the largest divisor of its width, so that none is left over."""
    return next(taps for taps in range(UNROLL if aligned else UNALIGNED_UNROLL, 0, -1) if kernel_width % taps == 0)


def _run(site_width, scale_factor):
    """Sites of a line that are computed together: up to four, unless over a fifth of the last ones would be no site."""
    fits = (run for run in (4, 2) if run % scale_factor == 0 and triton.cdiv(site_width, run) * run <= 1.2 * site_width)
    return next(fits, 1)


def has_words(filters, kernel_width, unroll):
    """Whether a kernel's row of taps can be loaded by words, which begin at even elements and end past the row."""
    is_half = filters.element_size() == 2 and filters.data_ptr() % 4 == 0 and filters.numel() % 2 == 0
    return is_half and kernel_width % 2 == 1 and unroll == kernel_width


def _launch(
    source,
    filters,
    channel_filters,
    lookup,
    index,
    count,
    out,
    *,
    source_size,
    site_size,
    kernel_size,
    stride,
    padding,
    dilation,
    scale_factor,
    groups,
    normalization,
    transposed,
):
    """Launches the stencil; source_size and site_size are those of source and out."""
    kernel_height, kernel_width = kernel_size
    group_channels = out.shape[1] // groups
    sites = _sites(out)
    if sites == 0:
        return
    with on_device(source):
        aligned = _is_aligned(source.dtype, group_channels)
        unroll = _unroll(kernel_width, aligned)
        run = 1
        if (
            not transposed
            and index is None
            and aligned
            and unroll == kernel_width
            and (stride[1], dilation[1]) == (1, 1)
        ):
            run = _run(site_size[1], scale_factor)
        runs_width = triton.cdiv(site_size[1], run)
        runs = sites // site_size[1] * runs_width
        tile = config(source.dtype, group_channels, kernel_height * kernel_width)
        programs = triton.cdiv(runs * groups, tile["BLOCK_M"]) * triton.cdiv(group_channels, tile["BLOCK_C"])
        _dynamic_filter_kernel[(programs,)](
            source,
            filters,
            _by_tap(channel_filters),
            lookup,
            index,
            count,
            out,
            *source_size,
            *divisor(site_size[0]),
            *divisor(runs_width),
            *divisor(groups),
            runs,
            group_channels // unit(group_channels),
            *padding,
            *dilation,
            site_size[1],
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            UNROLL=unroll,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            SCALE=scale_factor,
            GROUP_UNIT=unit(group_channels),
            TRANSPOSED=transposed,
            NORMALIZATION=normalization,
            OFFSET=offset_type(
                *(tensor.numel() for tensor in (source, filters, channel_filters, out) if tensor is not None)
            ),
            ACCUMULATOR=accumulator(source.dtype),
            RUN=run,
            WORDS=not transposed and has_words(filters, kernel_width, unroll),
            **tile,
        )
