"""Convolution of the channels that each sample keeps: an implicit GEMM for each sample, over its own columns.

Of a set of channels, index int32 [N, C] lists sample n's kept channels in ascending order in its first count[n]
entries, then ~channel of the dropped ones in descending order; count is int32 [N]. The i-th of them has the place i.
Nothing waits for the device: grids cover all channels, and programs past count write what stands at dropped ones.

Features are channels_last [N, columns, H, W], told apart by a flag:
  dense   a channel is its own column, C of them;
  packed  the channel at place i is column i, and C >= columns >= every count. Those past count are not read, and
          written as zeros.
Kept channels come in aligned runs of `granularity` (the last may be cut by C), whose power of two up to 8 is the piece
that a load takes at a time: with 8 half-precision channels, 16 bytes.

Sites and pixels are flat, as in masked_conv.py. `rows` are the sites to compute, or None for all of them: (index,
starts), int32, sample n's sites in ascending order at index[starts[n]:starts[n + 1]].
Depthwise convolution takes the same kernels, a group to a tile: right, but all but one row of a tile's K and column of
its N are zeros.
"""

import math

import torch
import triton
import triton.language as tl

from . import masked_conv
from ._common import (
    TAP_GROUP,
    accumulator,
    architecture,
    arithmetic,
    divide,
    divisor,
    find_taps,
    is_inside,
    on_device,
    partial_dtype,
    split_rows,
    split_step,
    store_rows,
    unit,
)
from .compaction import channel_places
from .masked_conv import (
    PRECISION,
    REDUCE_BLOCK,
    channels_last_rows,
    is_aligned,
    transposed_rows,
    weight_grad_splits,
)

# Room for the partial sums of wgrad: samples beyond it wait for their turn.
PARTIAL_BYTES = 64 * 2**20

_VARIES = ["source_height", "source_width", "sites", "site_width", "width_multiplier", "width_shift"]
_VARIES += ["channel_units", "filter_units", "source_units", "out_units", "pad_top", "pad_left"]
_VARIES += ["dilation_h", "dilation_w", "first_sample", "splits"]
# `groups` stays specialised, as in masked_conv.py.


def config(kind, sites, channels, filters, arch, *, piece, finished=False):
    """Tile of the implicit GEMM for `sites` of a sample, `channels` and `filters` of a group; see masked_conv.config.

    piece is how many channels lie side by side.
    """
    # Half of the channels is what a sample is expected to keep: tiles for all of them would be half empty.
    channels, filters = triton.cdiv(channels, 2), triton.cdiv(filters, 2)
    if finished and kind == "tf32":
        filters = min(filters, 64)
    # The columns are looked up ahead of what is loaded from them, as a packed source's rows are. With stages for the
    # lookup Triton for AMD pipelines none of the loads; without, many small ones run out of scalar registers.
    aligned = is_aligned(kind, piece)
    chained = arch != "gfx942" or not aligned
    tile = masked_conv.config(kind, channels, filters, arch, packed=chained, finished=finished, piece=piece)
    if finished and kind == "tf32" and arch != "sm_80":
        # Where a thread holds a row (tcgen05), bias and gate take as many registers as the accumulators and a residual.
        # On sm_80 ptxas would spill rather than take more than 128 of them, which eight warps have room for.
        tile["num_warps"] = 8
    if not aligned:
        # Every element has an address of its own: more of them for each thread spill.
        tile["BLOCK_M"] = min(tile["BLOCK_M"], 64)
        if kind == "ieee":
            tile["num_warps"] = 8
    # A tile does not cross samples.
    block_m = max(16, triton.next_power_of_2(sites))
    if block_m < tile["BLOCK_M"]:
        tile |= dict(BLOCK_M=block_m, num_warps=min(tile["num_warps"], 4))
    return tile


def weight_grad_config(kind, channels, filters, arch, *, piece, listed):
    """Tile of wgrad; see masked_conv.weight_grad_config. listed says that the sites are."""
    channels, filters = triton.cdiv(channels, 2), triton.cdiv(filters, 2)
    tile = masked_conv.weight_grad_config(kind, channels, filters, arch, piece=piece)
    if not listed:
        # Without a list ahead of them the loads keep all stages to themselves: half as many are as many buffers.
        tile["num_stages"] = triton.cdiv(tile["num_stages"] - 1, 2) + 1
    if (arch, kind, tile["BLOCK_M"]) in (("sm_100", "tf32", 64), ("sm_90", "half", 128)):
        tile["num_warps"] = 8  # with four it spills
    return tile


@triton.jit
def find_places(bounds, sample, group, groups, GROUPED: tl.constexpr, UNIT: tl.constexpr):
    """(first, end): the places of the kept channels of a group. bounds is the count, or [N, groups + 1] if GROUPED."""
    if GROUPED:
        bounds += sample.to(tl.int64) * (groups + 1) + group
        # A product with a constant shows the compiler what divides a place.
        first = tl.load(bounds) // UNIT * UNIT
        end = tl.load(bounds + 1) // UNIT * UNIT
    else:
        first = 0
        end = tl.load(bounds + sample) // UNIT * UNIT
    return first, end


@triton.jit
def find_channels(index, place, inside, UNIT: tl.constexpr):
    """The channels, int64, at those places of a sample's index, UNIT of them side by side."""
    if UNIT == 1:
        channel = tl.load(index + place, mask=inside, other=0)
    else:
        channel = tl.load(index + place // UNIT * UNIT, mask=inside, other=0) + place % UNIT
        # It is how wide a load may be that this says: alignment follows from the runs' being aligned.
        channel = tl.max_contiguous(tl.multiple_of(channel, UNIT), UNIT)
    # Wide: where an int32 sum is added to a pointer, Triton for AMD makes another sum that lacks the hints.
    return channel.to(tl.int64)


@triton.jit
def find_dropped(index, place, inside, UNIT: tl.constexpr):
    """The channels, int64, that a sample does not keep, at places of its index; of UNIT side by side in any order."""
    # Those of a run are in descending order: the first is the last one.
    last = -1 - tl.load(index + place // UNIT * UNIT, mask=inside, other=0)
    channel = last - (UNIT - 1) + place % UNIT
    return tl.max_contiguous(tl.multiple_of(channel, UNIT), UNIT).to(tl.int64)


@triton.jit(do_not_specialize=_VARIES)
def _gathered_conv_kernel(
    source,
    weight,
    bias,
    gate,
    residual,
    lookup,
    source_index,
    source_bounds,
    out_index,
    out_bounds,
    row_index,
    row_starts,
    out,
    source_height,
    source_width,
    sites,
    site_width,
    width_multiplier,
    width_shift,
    groups,
    channel_units,
    filter_units,
    source_units,
    out_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    FILTER_UNIT: tl.constexpr,
    SOURCE_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    GROUPED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED_SOURCE: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    WEIGHT_K_CONTIGUOUS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Implicit GEMM of a sample: M = its sites, K = taps x kept source channels, N = kept channels of out, by group.

    forward     out[s, f] = activation(gate[n, f] * (sum over tap, c of source[p(s, tap), c] * weight[f, tap, c]
                            + bias[f]) + residual[s, f])
    TRANSPOSED  out[p, c] = sum over tap, f of source[s, f] * weight[f, tap, c], s = s(p, tap)

    channels and filters are all those of a group on the side of the source and of out: weight [groups * filters, taps,
    channels] if WEIGHT_K_CONTIGUOUS, else [groups * channels, taps, filters]. source [source rows, columns], out and
    residual [site rows, columns], gate [N, groups * filters]. lookup int32 [source rows], if given, is not negative at
    the active sites. The sum is zero at channels of a dense out that are not kept, and so are columns of a packed one
    past count. Skips source channels not kept, sites not listed, taps that fall outside the source, and sources that
    lookup does not have.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    PIECE: tl.constexpr = 16
    # A product with a constant shows the compiler what divides the row length, hence how wide a load may be.
    channels = channel_units * CHANNEL_UNIT
    filters = filter_units * FILTER_UNIT
    source_columns = source_units * SOURCE_UNIT
    out_columns = out_units * OUT_UNIT
    # The tiles of N of the same sites are neighbours in launch order: they share the gathered rows in L2.
    tiles_n = tl.cdiv(filters, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    tile = tl.program_id(0) // tiles_n
    group = tile % groups
    tile = tile // groups
    tiles_m = tl.cdiv(sites, BLOCK_M)
    start = tile % tiles_m * BLOCK_M
    sample = tile // tiles_m

    if row_index is not None:
        begin = tl.load(row_starts + sample)
        rows = tl.load(row_starts + sample + 1) - begin
    else:
        begin = sample * sites
        rows = sites
    if start >= rows:
        return
    n_first, n_end = find_places(out_bounds, sample, group, groups, GROUPED, FILTER_UNIT)
    # Of all groups; the weight's inner dimension is that of one.
    out_index += sample.to(tl.int64) * (filters * groups)

    row = start + tl.arange(0, BLOCK_M)
    listed = row < rows
    if row_index is not None:
        site = tl.load(row_index + begin + row, mask=listed, other=0)
        # Of a row past the last one: any site of the sample.
        local = tl.where(listed, site - sample * sites, 0)
    else:
        site = begin + row
        local = row
    # The tiles of a group cover its kept channels, and then the dropped ones. What stands there does not wait for the
    # product, and is written in pieces that take fewer registers than that.
    kept = n_end - n_first
    for first in range(tl.maximum(tile_n * BLOCK_N, kept // PIECE * PIECE), tile_n * BLOCK_N + BLOCK_N, PIECE):
        column = first + tl.arange(0, PIECE)
        is_dropped = (column >= kept) & (column < filters)
        place = n_first + column
        if GROUPED:  # behind the kept channels of all groups, those of the last group come first
            place += (groups - 1 - group) * filters
        if PACKED_OUT:
            is_dropped &= place < out_columns
            out_column = place
        else:
            out_column = find_dropped(out_index, place, is_dropped, FILTER_UNIT)
        offset = site.to(tl.int64)[:, None] * out_columns + out_column[None, :]
        inside = listed[:, None] & is_dropped[None, :]
        nothing = tl.zeros([BLOCK_M, PIECE], ACCUMULATOR)
        if PACKED_OUT:
            tl.store(out + offset, nothing.to(out.dtype.element_ty), mask=inside)
        else:
            store_rows(nothing, None, residual, out, site, offset, listed, inside, ACTIVATION)
    n_first += tile_n * BLOCK_N
    if n_first >= n_end:
        return

    y = divide(local, width_multiplier, width_shift)
    x = local - y * site_width
    if TRANSPOSED:
        y += pad_top
        x += pad_left
    else:
        y = y * STRIDE_H - pad_top
        x = x * STRIDE_W - pad_left
    # Source row of tap (0, 0); the others are a scalar away from it, except when a stride has to be undone.
    LINEAR: tl.constexpr = not TRANSPOSED or (STRIDE_H == 1 and STRIDE_W == 1)
    sample_row = sample * source_height
    first_row = (sample_row + y) * source_width + x
    # What the pipelined loop reads of a row is a column of two dimensions before it: made inside, it would go through
    # shared memory at every step.
    first_pointer = (source + first_row.to(tl.int64) * source_columns)[:, None]

    source_index += sample.to(tl.int64) * (channels * groups)
    k_first, k_end = find_places(source_bounds, sample, group, groups, GROUPED, CHANNEL_UNIT)
    n_place = n_first + tl.arange(0, BLOCK_N)
    n_inside = n_place < n_end
    n = find_channels(out_index, n_place, n_inside, FILTER_UNIT)
    k = tl.arange(0, BLOCK_K)
    if WEIGHT_K_CONTIGUOUS:
        weight_pointer = weight + (n * (TAPS * channels) - group * channels)[None, :]
    else:
        weight_pointer = weight + (n - group * filters)[None, :]

    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for first_tap in range(0, TAPS, TAP_GROUP):
        # Which taps a row has is found once, ahead of the pipelined loop, as in masked_conv.py.
        has_tap = find_taps(
            first_tap,
            y,
            x,
            sample_row,
            lookup,
            listed,
            source_height,
            source_width,
            dilation_h,
            dilation_w,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            STRIDE_H,
            STRIDE_W,
            TRANSPOSED,
        )
        tap_bits = has_tap[:, None]
        # All that a step reads follows from its number: what one step left to the next would keep Triton from
        # pipelining the loop. The taps of a block of channels are neighbours: they find its pixels in the cache.
        taps = tl.minimum(TAPS - first_tap, TAP_GROUP)
        for step in range(0, taps * tl.cdiv(k_end - k_first, BLOCK_K)):
            block, bit = split_step(step, taps, TAPS)
            k_place = k_first + block * BLOCK_K + k
            k_inside = k_place < k_end
            channel = find_channels(source_index, k_place, k_inside, CHANNEL_UNIT)
            tap = first_tap + bit
            tap_y = tap // KERNEL_WIDTH * dilation_h
            tap_x = tap % KERNEL_WIDTH * dilation_w
            if LINEAR:
                shift = tap_y * source_width + tap_x
                if TRANSPOSED:
                    shift = -shift
                a_pointer = first_pointer + shift.to(tl.int64) * source_columns
            else:
                source_row = (sample_row + (y - tap_y) // STRIDE_H) * source_width + (x - tap_x) // STRIDE_W
                a_pointer = (source + source_row.to(tl.int64) * source_columns)[:, None]
            if PACKED_SOURCE:
                column = k_place
            else:
                column = channel
            valid = ((tap_bits >> bit) & 1) != 0
            a = tl.load(a_pointer + column[None, :], mask=valid & k_inside[None, :], other=0.0)
            # A weight has fewer than 2**31 elements; the sum is wide for what find_channels says.
            if WEIGHT_K_CONTIGUOUS:
                b_offset = (tap * channels + channel.to(tl.int32)).to(tl.int64)
            else:
                b_offset = (channel.to(tl.int32) * (TAPS * filters) + tap * filters).to(tl.int64)
            # A column past the last one has a channel as well: read, but not stored. fp32 masks it, or ptxas spills for
            # sm_80.
            b_inside = k_inside[:, None]
            if source.dtype.element_ty.primitive_bitwidth > 16:
                b_inside = b_inside & n_inside[None, :]
            b = tl.load(weight_pointer + b_offset[:, None], mask=b_inside, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    if bias is not None:
        total += tl.load(bias + n, mask=n_inside, other=0.0).to(ACCUMULATOR)[None, :]
    if gate is not None:
        gate += sample.to(tl.int64) * (filters * groups)
        total *= tl.load(gate + n, mask=n_inside, other=0.0).to(ACCUMULATOR)[None, :]
    if PACKED_OUT:
        out_column = n_place
    else:
        out_column = n
    inside = listed[:, None] & n_inside[None, :]
    offset = site.to(tl.int64)[:, None] * out_columns + out_column[None, :]
    store_rows(total, None, residual, out, site, offset, listed, inside, ACTIVATION)


@triton.jit(do_not_specialize=_VARIES)
def _gathered_weight_grad_kernel(
    source,
    grad,
    source_index,
    source_places,
    grad_index,
    grad_places,
    row_index,
    row_starts,
    partial,
    first_sample,
    splits,
    source_height,
    source_width,
    sites,
    site_width,
    width_multiplier,
    width_shift,
    groups,
    channel_units,
    filter_units,
    source_units,
    out_units,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    FILTER_UNIT: tl.constexpr,
    SOURCE_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    PACKED_SOURCE: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[i, split, m, tap, n] = sum over s in the split of grad[s, f(m)] * source[p(s, tap), c(n)].

    s are the sites of sample first_sample + i, f(m) and c(n) its kept channels: m counts those of all groups of grad, n
    those of m's group of source. source_places and grad_places are [N, channels of all groups + 1] (channel_places);
    source [source rows, columns], grad [site rows, columns], partial [samples of the chunk, splits, groups * filters,
    taps, channels], of which only the kept places are written. Which sites meet in a sum depends on their count alone.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    channels = channel_units * CHANNEL_UNIT
    filters = filter_units * FILTER_UNIT
    source_columns = source_units * SOURCE_UNIT
    grad_columns = out_units * OUT_UNIT
    # The tiles of a sample's split are neighbours in launch order: they read the same rows, and find them in L2.
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tiles_m = tl.cdiv(filters, BLOCK_M)
    tile = tl.program_id(0)
    tile_n = tile % tiles_n
    tile = tile // tiles_n
    tap = tile % TAPS
    tile = tile // TAPS
    tile_m = tile % tiles_m
    tile = tile // tiles_m
    group = tile % groups
    part = tile // groups  # of all samples of the chunk
    sample = first_sample + part // splits

    source_places += sample.to(tl.int64) * (channels * groups + 1) + group * channels
    grad_places += sample.to(tl.int64) * (filters * groups + 1) + group * filters
    group_first = tl.load(source_places) // CHANNEL_UNIT * CHANNEL_UNIT
    n_first = group_first + tile_n * BLOCK_N
    n_end = tl.load(source_places + channels) // CHANNEL_UNIT * CHANNEL_UNIT
    m_first = tl.load(grad_places) // FILTER_UNIT * FILTER_UNIT + tile_m * BLOCK_M
    m_end = tl.load(grad_places + filters) // FILTER_UNIT * FILTER_UNIT
    if (m_first >= m_end) | (n_first >= n_end):
        return

    m_place = m_first + tl.arange(0, BLOCK_M)
    n_place = n_first + tl.arange(0, BLOCK_N)
    m_inside = (m_place < m_end)[None, :]
    n_inside = (n_place < n_end)[None, :]
    if PACKED_OUT:
        m = m_place
    else:
        m = find_channels(grad_index + sample.to(tl.int64) * (filters * groups), m_place, m_place < m_end, FILTER_UNIT)
    if PACKED_SOURCE:
        n = n_place
    else:
        n = find_channels(
            source_index + sample.to(tl.int64) * (channels * groups), n_place, n_place < n_end, CHANNEL_UNIT
        )
    if row_index is not None:
        first_row = tl.load(row_starts + sample)
        rows = tl.load(row_starts + sample + 1) - first_row
    else:
        first_row = sample * sites
        rows = sites
    begin, end = split_rows(part % splits, splits, rows, BLOCK_K)

    tap_y = tap // KERNEL_WIDTH * dilation_h - pad_top
    tap_x = tap % KERNEL_WIDTH * dilation_w - pad_left
    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        listed = row < end
        if row_index is not None:
            site = tl.load(row_index + first_row + row, mask=listed, other=0)
            local = tl.where(listed, site - sample * sites, 0)
        else:
            site = first_row + row
            local = row
        y = divide(local, width_multiplier, width_shift)
        x = (local - y * site_width) * STRIDE_W + tap_x
        y = y * STRIDE_H + tap_y
        valid = listed & is_inside(y, x, source_height, source_width)
        source_row = (sample * source_height + y) * source_width + x
        a_offset = site.to(tl.int64)[:, None] * grad_columns + m[None, :]
        a = tl.load(grad + a_offset, mask=listed[:, None] & m_inside, other=0.0)
        b_offset = source_row.to(tl.int64)[:, None] * source_columns + n[None, :]
        b = tl.load(source + b_offset, mask=valid[:, None] & n_inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    first = ((part.to(tl.int64) * (filters * groups) + m_place) * TAPS + tap) * channels
    offset = first[:, None] + (n_place - group_first)[None, :]
    tl.store(partial + offset, total, mask=(m_place < m_end)[:, None] & n_inside)


@triton.jit(do_not_specialize=["first_sample", "samples", "splits", "channels", "filters"])
def _reduce_gathered_weight_grad_kernel(
    partial,
    in_places,
    out_places,
    total,
    first_sample,
    samples,
    splits,
    groups,
    channels,
    filters,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total[f, tap, c] += partial[i, split, m(f), tap, n(c)], by i and split in order, where sample i keeps f and c.

    partial is what _gathered_weight_grad_kernel leaves for `samples` samples from first_sample on.
    """
    # A weight has far fewer than 2^31 elements.
    size = TAPS * channels
    tiles = tl.cdiv(size, BLOCK)
    f = tl.program_id(0) // tiles
    element = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    tap = element // channels
    group = f // filters
    group_first = group * channels
    c = group_first + element - tap * channels
    out_places += first_sample.to(tl.int64) * (filters * groups + 1)
    in_places += first_sample.to(tl.int64) * (channels * groups + 1)
    sum_pointer = total + f.to(tl.int64) * size + element
    sums = tl.load(sum_pointer, mask=inside, other=0.0)
    part_size = size.to(tl.int64) * (filters * groups)
    for _sample in range(0, samples):
        m = tl.load(out_places + f)
        if tl.load(out_places + f + 1) > m:
            place = tl.load(in_places + c, mask=inside, other=0)
            kept = tl.load(in_places + c + 1, mask=inside, other=0) > place
            n = place - tl.load(in_places + group_first)
            row = partial + m.to(tl.int64) * size
            for _split in range(0, splits):
                sums += tl.load(row + tap * channels + n, mask=kept, other=0.0)
                row += part_size
        partial += splits * part_size
        out_places += filters * groups + 1
        in_places += channels * groups + 1
    tl.store(sum_pointer, sums, mask=inside)


def forward(
    source,
    weight,
    bias,
    gate,
    residual,
    out,
    ins,
    outs,
    rows,
    *,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    groups,
    activation,
    packed_source,
    packed_out,
    granularity,
    allow_tf32,
):
    """out[s, f] = activation(gate[n, f] * (conv2d(source, weight)[s, f] + bias[f]) + residual[s, f]) at kept f.

    At the others activation(residual[s, f]), and of a packed out zeros past the kept ones. Sites that are not listed
    are left alone. The sum is over the kept channels of source; ins and outs are (index, count) of the
    channels of source and out. residual has out's columns, or is out itself. gate is [N, Cout], weight
    [Cout, Cin/groups, kH, kW], read in place if it is channels_last and copied into that layout if not. input_size is
    (H, W), site_size (Ho, Wo), padding (top, left), activation a name that `_common.activate` knows. bias, gate,
    residual and rows may be None.
    """
    _launch(
        source,
        channels_last_rows(weight),
        bias,
        gate,
        residual,
        None,
        ins,
        outs,
        rows,
        out,
        shape=weight.shape,
        activation=activation,
        input_size=input_size,
        site_size=site_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        packed_source=packed_source,
        packed_out=packed_out,
        granularity=granularity,
        allow_tf32=allow_tf32,
    )


def input_grad(
    grad,
    weight,
    grad_input,
    ins,
    outs,
    rows,
    *,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    groups,
    packed_source,
    packed_out,
    granularity,
    allow_tf32,
):
    """grad_input[p, c] = sum of grad[s] @ weight[tap] over the kept channels of grad and the sites s that read p.

    At kept c, and zeros at the others. Pixels that are not listed are left alone. rows is None
    or (inverse, pixel_index, pixel_starts): int32 [N*Ho*Wo], not negative at the active sites, and the pixels to
    compute, listed as the sites are. packed_source says that grad_input is packed, packed_out that grad is.
    """
    # 16-bit tensor cores take B contiguous along N as well: the forward's layout, [Cout, taps, Cin/groups], serves.
    # wgmma takes TF32 operands contiguous along K only: the weight becomes [Cin, taps, Cout/groups].
    total_filters, channels, kernel_height, kernel_width = weight.shape
    filters = total_filters // groups
    k_contiguous = weight.dtype not in (torch.float16, torch.bfloat16)
    inverse, *pixels = rows or (None,)
    # The product runs the other way: over the sites as its source, onto the pixels.
    _launch(
        grad,
        transposed_rows(weight, groups) if k_contiguous else channels_last_rows(weight),
        None,
        None,
        None,
        inverse,
        outs,
        ins,
        pixels,
        grad_input,
        shape=(groups * channels, filters, kernel_height, kernel_width),
        transposed=True,
        k_contiguous=k_contiguous,
        input_size=site_size,
        site_size=input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        packed_source=packed_out,
        packed_out=packed_source,
        granularity=granularity,
        allow_tf32=allow_tf32,
    )


def weight_grad(
    source,
    grad,
    weight,
    ins,
    outs,
    rows,
    *,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    groups,
    packed_source,
    packed_out,
    granularity,
    allow_tf32,
):
    """Like weight (only its shape and layout are used): [f, c, tap] = sum of grad[s, f] * source[p(s, tap), c].

    The sum is over the sites of the samples that keep f and c. Each sample's products of kept channels are partial sums
    in fp32 (fp64 for fp64), which are then added in the order of the samples. How many samples there are partial sums
    of at a time, and how many parts a sample has, depends on the shapes alone.
    """
    total_filters, channels, kernel_height, kernel_width = weight.shape
    filters = total_filters // groups
    samples, sites, taps = source.shape[0], site_size[0] * site_size[1], kernel_height * kernel_width
    total = torch.zeros(
        (total_filters, kernel_height, kernel_width, channels), dtype=partial_dtype(source.dtype), device=source.device
    )
    if samples == 0 or sites == 0 or total.numel() == 0:
        return torch.zeros_like(weight)
    channel_unit, filter_unit = piece(granularity, channels), piece(granularity, filters)
    source_unit, grad_unit = piece(source.shape[1], channel_unit), piece(grad.shape[1], filter_unit)
    in_places, out_places = channel_places(*ins), channel_places(*outs)
    with on_device(source):
        kind = arithmetic(source.dtype, allow_tf32)
        narrowest = min(channel_unit, filter_unit, source_unit, grad_unit)
        tile = weight_grad_config(kind, channels, filters, architecture(), piece=narrowest, listed=rows is not None)
        tiles = triton.cdiv(filters, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_N"]) * taps * groups
        splits = weight_grad_splits(tiles * samples, sites, tile, source.device)
        chunk = max(1, min(samples, PARTIAL_BYTES // (splits * total.numel() * total.element_size())))
        partial = torch.empty((chunk * splits, total.numel()), dtype=total.dtype, device=source.device)
        block = min(REDUCE_BLOCK, triton.next_power_of_2(taps * channels))
        for first in range(0, samples, chunk):
            chunk = min(chunk, samples - first)
            _gathered_weight_grad_kernel[(tiles * splits * chunk,)](
                source,
                grad,
                ins[0],
                in_places,
                outs[0],
                out_places,
                *(rows or (None, None)),
                partial,
                first,
                splits,
                *input_size,
                sites,
                *divisor(site_size[1]),
                groups,
                channels // channel_unit,
                filters // filter_unit,
                source.shape[1] // source_unit,
                grad.shape[1] // grad_unit,
                *padding,
                *dilation,
                KERNEL_HEIGHT=kernel_height,
                KERNEL_WIDTH=kernel_width,
                STRIDE_H=stride[0],
                STRIDE_W=stride[1],
                CHANNEL_UNIT=channel_unit,
                FILTER_UNIT=filter_unit,
                SOURCE_UNIT=source_unit,
                OUT_UNIT=grad_unit,
                PACKED_SOURCE=packed_source,
                PACKED_OUT=packed_out,
                ACCUMULATOR=accumulator(source.dtype),
                PRECISION=PRECISION[kind],
                **tile,
            )
            _reduce_gathered_weight_grad_kernel[(total_filters * triton.cdiv(taps * channels, block),)](
                partial,
                in_places,
                out_places,
                total,
                first,
                chunk,
                splits,
                groups,
                channels,
                filters,
                TAPS=taps,
                BLOCK=block,
            )
    return torch.empty_like(weight).copy_(total.permute(0, 3, 1, 2))


def bias_grad(grad, outs, rows, packed):
    """[Cout] of grad's dtype: sum of grad[s, f] over the sites of the samples that keep f, added in a fixed order.

    grad is packed if `packed`. Reads all of grad, since it takes no product to be skipped.
    """
    dtype = partial_dtype(grad.dtype)
    if grad.numel() == 0:
        return torch.zeros(outs[0].shape[1], dtype=grad.dtype, device=grad.device)
    if rows is not None:
        sites, starts = rows
        listed = torch.arange(len(sites), device=grad.device) < starts[-1]
        samples, _, height, width = grad.shape
        # What is past the last site is sent to a place of its own.
        active = torch.zeros(len(sites) + 1, dtype=torch.bool, device=grad.device)
        active.scatter_(0, torch.where(listed, sites, len(sites)).long(), True)
        grad = torch.where(active[:-1].view(samples, 1, height, width), grad, 0)
    sums = grad.sum((2, 3), dtype=dtype)
    place = channel_places(*outs)
    kept = place[:, 1:] > place[:, :-1]
    if packed:
        sums = sums.gather(1, torch.where(kept, place[:, :-1], 0).long())
    return torch.where(kept, sums, 0).sum(0).to(grad.dtype)


def _launch(
    source,
    weight,
    bias,
    gate,
    residual,
    lookup,
    source_channels,
    out_channels,
    rows,
    out,
    *,
    shape,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    groups,
    packed_source,
    packed_out,
    granularity,
    allow_tf32,
    activation="none",
    transposed=False,
    k_contiguous=True,
):
    """Launches the implicit GEMM. shape is (N of all groups, K of a tap, kH, kW); what is of the source and of out is
    as the GEMM sees them.
    """
    total_filters, channels, kernel_height, kernel_width = shape
    if math.prod(shape) >= 2**31:
        raise ValueError(f"weight: expected fewer than 2**31 elements, got {math.prod(shape)}")
    filters = total_filters // groups
    samples, sites = out.shape[0], site_size[0] * site_size[1]
    if samples == 0 or sites == 0 or filters == 0:
        return
    channel_unit, filter_unit = piece(granularity, channels), piece(granularity, filters)
    source_unit, out_unit = piece(source.shape[1], channel_unit), piece(out.shape[1], filter_unit)
    with on_device(source):
        kind = arithmetic(source.dtype, allow_tf32)
        finished = residual is not None or activation != "none"
        tile = config(
            kind, sites, channels, filters, architecture(), piece=min(channel_unit, source_unit), finished=finished
        )
        programs = samples * triton.cdiv(sites, tile["BLOCK_M"]) * groups * triton.cdiv(filters, tile["BLOCK_N"])
        _gathered_conv_kernel[(programs,)](
            source,
            weight,
            bias,
            gate,
            residual,
            lookup,
            *_bounded(source_channels, groups),
            *_bounded(out_channels, groups),
            *(rows or (None, None)),
            out,
            *input_size,
            sites,
            *divisor(site_size[1]),
            groups,
            channels // channel_unit,
            filters // filter_unit,
            source.shape[1] // source_unit,
            out.shape[1] // out_unit,
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            CHANNEL_UNIT=channel_unit,
            FILTER_UNIT=filter_unit,
            SOURCE_UNIT=source_unit,
            OUT_UNIT=out_unit,
            GROUPED=groups > 1,
            TRANSPOSED=transposed,
            PACKED_SOURCE=packed_source,
            PACKED_OUT=packed_out,
            WEIGHT_K_CONTIGUOUS=k_contiguous,
            ACTIVATION=activation,
            ACCUMULATOR=accumulator(source.dtype),
            PRECISION=PRECISION[kind],
            **tile,
        )


def piece(granularity, channels):
    """Kept channels side by side that a load may take: a power of two up to 8 that divides every run and the row."""
    return unit(math.gcd(granularity, channels))


def _bounded(channels, groups):
    """(index, bounds): what find_places takes as the bounds of the channels' groups."""
    index, count = channels
    return index, count if groups == 1 else channel_places(index, count, index.shape[1] // groups)
