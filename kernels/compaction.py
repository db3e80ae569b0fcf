"""Active sets on the device: mask -> ordered index list and count, its inverse, and the gather set of dgrad."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import divisor, is_inside, on_device, split_site, undo_stride, unit

# One program scans this many mask bytes: 16 for each of 256 threads, and 98 programs (less than one wave)
# for 128 x 56 x 56 sites.
SCAN_BLOCK = 4096
SCAN_WARPS = 8
# Block counts that the second pass adds up at a time.
CHUNK = 1024
# The most blocks of which each program counts by itself what lies before its own, which saves a launch of 2 to 5 us:
# seven loads of 16 bytes a thread, all on their way at once, are one latency of L2, below 1 us. Of elements that are
# loaded one by one (by strides, or by the taps of a convolution) as many are 1000 loads a thread, and one block 150.
SELF_COUNTED = 8
SELF_COUNTED_BY_STRIDES = 2
MAP_BLOCK = 1024
CHANNEL_BLOCK = 1024  # channels of a sample that its program scans at a time
# Elements that a program fills at a time, 32 for each thread, and the columns of them that lie side by side at most.
FILL_ELEMENTS = 8192
FILL_COLUMNS = 128
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# `sites` stays specialised on divisibility by 16: it is what lets a thread read 16 mask bytes at once.
_VARIES = ["where", "blocks", "column_units"]


class Reads(NamedTuple):
    """A convolution by whose output sites pixels are read: (height, width) each, `padding` (top, left)."""

    input_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


class Fill(NamedTuple):
    """An output [N, C, H, W] whose skipped sites are to become `inactive`, or zeros for None; both channels_last."""

    out: torch.Tensor
    inactive: torch.Tensor | None


class ActiveSet(NamedTuple):
    """What `compact` makes: index[:count] are the active sites, ascending, and the rest is unspecified.

    mask bool, contiguous, index int32 [sites], count int32 [1]; inverse int32 [sites], of each site its position in
    index, or -1 where it is not active. mask and inverse are None where they were not asked for.
    """

    mask: torch.Tensor | None
    index: torch.Tensor
    count: torch.Tensor
    inverse: torch.Tensor | None


@triton.jit
def _is_active(
    mask,
    site,
    sites,
    where,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    UNROLL: tl.constexpr = 1,
):
    """Whether sites, an int64 vector, are below `sites` and active.

    With `where` None site s is active where mask[s] is not zero. Otherwise s is a pixel of [N, height, width], active
    where an element is not zero of those of mask [N, mask_height, mask_width], by its strides, whose taps read s: with
    a single tap, the one in its own place. mask holds the bits of its elements; SIGNED ones have a sign, which does not
    count, as -0.0 is zero.
    """
    inside = site < sites
    if where is None:
        value = tl.load(mask + site, mask=inside, other=0)
        if SIGNED:
            value = value << 1
        active = value != 0
    else:
        size, mask_size, strides, padding, dilation = where
        sample, y, x = split_site(
            tl.where(inside, site, 0).to(tl.int32), size[0], size[1], size[2], size[3], size[4], size[5]
        )
        y += padding[0]
        x += padding[1]
        first = sample * strides[0]
        # Integers: truth values that a loop carries take as many registers, and conversions.
        found = tl.zeros(site.shape, tl.int32)
        for tap in tl.range(0, KERNEL[0] * KERNEL[1], loop_unroll_factor=UNROLL):
            mask_y, mask_x, reads = undo_stride(
                y - tap // KERNEL[1] * dilation[0], x - tap % KERNEL[1] * dilation[1], STRIDE[0], STRIDE[1]
            )
            reads &= inside & is_inside(mask_y, mask_x, mask_size[0], mask_size[1])
            value = tl.load(mask + (first + mask_y * strides[1] + mask_x * strides[2]), mask=reads, other=0)
            if SIGNED:
                value = value << 1
            found |= (value != 0).to(tl.int32)
        active = found != 0
    return active


@triton.jit(do_not_specialize=_VARIES)
def _count_kernel(
    mask,
    block_counts,
    sites,
    where,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """block_counts[b] = number of active sites in block b; see _is_active."""
    block = tl.program_id(0)
    site = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = _is_active(mask, site, sites, where, KERNEL, STRIDE, SIGNED)
    tl.store(block_counts + block, tl.sum(active.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=_VARIES)
def _compact_kernel(
    mask,
    block_counts,
    index,
    count,
    inverse,
    made,
    out,
    inactive,
    sites,
    blocks,
    column_units,
    where,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SIGNED: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """index[rank(s)] = s for each active site s, where rank(s) = number of active sites below s; see _is_active.

    index int32 [sites], count int32 [1]; inverse int32 [sites], if given, is rank(s), or -1 where s is not active, and
    made uint8 [sites] 1 or 0. Entries of index past count are not written. block_counts int32 [blocks]; without it
    each block counts by itself what lies before it, in BEFORE blocks at most. The programs behind the blocks fill out,
    if there is one.
    """
    block = tl.program_id(0)
    if out is not None:  # noqa: SIM102 (decided at compile time, and the other is not)
        if block >= blocks:
            tile = block - blocks
            tiles_c = tl.cdiv(column_units * COLUMN_UNIT, BLOCK_C)
            filled = (tile // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            # Few sites to a program: their taps had better be on their way together.
            stays = _is_active(mask, filled, sites, where, KERNEL, STRIDE, SIGNED, 9) | (filled >= sites)
            _fill(out, inactive, filled, stays, tile % tiles_c, column_units, COLUMN_UNIT, BLOCK_C)
            return

    # The mask is read first, so that it is on its way while the counts are added up.
    lane = tl.arange(0, BLOCK)
    site = block.to(tl.int64) * BLOCK + lane
    active = _is_active(mask, site, sites, where, KERNEL, STRIDE, SIGNED).to(tl.int32)

    if block_counts is not None:
        # Every block adds up the counts before it by itself: O(blocks^2) reads from L2 in all, but no third launch.
        entry = tl.arange(0, CHUNK)
        before = tl.zeros([CHUNK], tl.int32)
        for start in range(0, block, CHUNK):
            before += tl.load(block_counts + start + entry, mask=start + entry < block, other=0)
        base = tl.sum(before, axis=0)
    else:
        earlier = tl.zeros([BLOCK], tl.int32)
        # Unrolled: none of these loads waits for another.
        for number in tl.static_range(BEFORE):
            own = number * BLOCK + lane.to(tl.int64)
            earlier += _is_active(mask, own, block * BLOCK, where, KERNEL, STRIDE, SIGNED).to(tl.int32)
        base = tl.sum(earlier, axis=0)

    rank = base + tl.cumsum(active, axis=0) - active
    tl.store(index + rank, site.to(tl.int32), mask=active != 0)
    if inverse is not None:
        tl.store(inverse + site, tl.where(active != 0, rank, -1), mask=site < sites)
    if made is not None:
        tl.store(made + site, active.to(tl.uint8), mask=site < sites)
    if block == blocks - 1:
        tl.store(count, base + tl.sum(active, axis=0))


@triton.jit
def _inverse_kernel(index, count, inverse, BLOCK: tl.constexpr):
    """inverse[index[i]] = i for i < count. Programs past count return at once."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    active = tl.load(count)
    if start >= active:
        return
    position = start + tl.arange(0, BLOCK)
    site = tl.load(index + position, mask=position < active, other=0)
    tl.store(inverse + site, position.to(tl.int32), mask=position < active)


# Gates of several layers are often views of one tensor. An element at a time is read, whatever the address.
@triton.jit(
    do_not_specialize=["stride_n", "stride_c", "channels", "granularity"], do_not_specialize_on_alignment=["given"]
)
def _compact_channels_kernel(given, stride_n, stride_c, mask, index, count, channels, granularity, BLOCK: tl.constexpr):
    """Of each sample: mask[c] = given[c // granularity] is not zero; index, the channels c where it is, ascending, then
    ~c of the others, descending; count.

    given is [N, ceil(channels / granularity)] by its strides, or None to keep all; mask uint8 and index int32
    [N, channels], count int32 [N].
    """
    sample = tl.program_id(0).to(tl.int64)
    if given is not None:
        given += sample * stride_n
    mask += sample * channels
    index += sample * channels
    lane = tl.arange(0, BLOCK)
    base = 0
    for start in range(0, channels, BLOCK):
        channel = start + lane
        inside = channel < channels
        if given is None:
            kept = inside.to(tl.int32)
        else:
            value = tl.load(given + (channel // granularity).to(tl.int64) * stride_c, mask=inside, other=0)
            kept = (value != 0).to(tl.int32)
        tl.store(mask + channel, kept.to(tl.uint8), mask=inside)
        place = base + tl.cumsum(kept, axis=0) - kept
        # The others from the end on: as many are behind one as there are before it.
        place = tl.where(kept != 0, place, channels - 1 - (channel - place))
        tl.store(index + place, tl.where(kept != 0, channel, -1 - channel), mask=inside)
        base += tl.sum(kept, axis=0)
    tl.store(count + sample, base)


@triton.jit(do_not_specialize=["channels", "columns", "step", "halvings"])
def _channel_places_kernel(index, count, places, channels, columns, step, halvings, BLOCK: tl.constexpr):
    """places[n, i] = how many of a sample's kept channels are less than i * step; int32 [N, columns]."""
    sample = tl.program_id(0).to(tl.int64)
    index += sample * channels
    kept = tl.load(count + sample)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        low = tl.zeros([BLOCK], tl.int32)
        high = low + kept
        for _ in range(halvings):
            middle = (low + high) // 2
            is_less = tl.load(index + middle, mask=low < high, other=channels) < column * step
            low = tl.where(is_less, middle + 1, low)
            high = tl.where(is_less, high, middle)
        tl.store(places + sample * columns + column, low, mask=column < columns)


@triton.jit
def _fill(out, inactive, site, stays, tile_c, column_units, COLUMN_UNIT: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[s] = inactive[s], or zeros if that is None, for the sites of a vector that do not stay, in a tile of columns.

    out and inactive [sites, columns].
    """
    columns = column_units * COLUMN_UNIT
    column = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    writes = (stays == 0)[:, None] & (column < columns)[None, :]
    offset = site[:, None] * columns + column[None, :]
    if inactive is None:
        value = tl.zeros([site.shape[0], BLOCK_C], out.dtype.element_ty)
    else:
        value = tl.load(inactive + offset, mask=writes, other=0.0)
    tl.store(out + offset, value, mask=writes)


@triton.jit(do_not_specialize=["sites", "column_units"])
def _fill_skipped_kernel(
    mask, inactive, out, sites, column_units, COLUMN_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[s] = inactive[s], or zeros if that is None, where mask[s] is 0; mask uint8 [sites]."""
    tiles_c = tl.cdiv(column_units * COLUMN_UNIT, BLOCK_C)
    site = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    stays = tl.load(mask + site, mask=site < sites, other=1) != 0
    _fill(out, inactive, site, stays, tl.program_id(0) % tiles_c, column_units, COLUMN_UNIT, BLOCK_C)


def _fill_tile(sites, fill):
    """(programs, options of the kernels) to fill an output of so many sites."""
    channels = 1 if fill is None else fill.out.shape[1]
    block_c = min(FILL_COLUMNS, triton.next_power_of_2(channels))
    block_m = FILL_ELEMENTS // block_c
    programs = 0 if fill is None else triton.cdiv(sites, block_m) * triton.cdiv(channels, block_c)
    return programs, dict(COLUMN_UNIT=unit(channels), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=SCAN_WARPS)


def fill_skipped(mask, fill):
    """Write zeros, or what `fill.inactive` has there, at the sites that a mask skips, and nothing at the others.

    mask bool [N, 1, H, W] is contiguous. A pass over all of fill.out would write the active sites twice. Where the mask
    is still to be compacted, `compact` does it beside that.
    """
    sites, channels = mask.numel(), fill.out.shape[1]
    if sites == 0 or channels == 0:
        return
    programs, tile = _fill_tile(sites, fill)
    with on_device(fill.out):
        _fill_skipped_kernel[(programs,)](
            mask.view(torch.uint8), fill.inactive, fill.out, sites, channels // tile["COLUMN_UNIT"], **tile
        )


def compact_channels(mask, channels, granularity=1):
    """The kept channels of each sample, in one launch: (mask bool [N, channels], index int32 like it, count int32 [N]).

    mask [N, ceil(channels / granularity)] is bool, whose bytes may be any, or floating, in any strides; an element
    stands for as many channels. index has a sample's kept channels in ascending order, then, as ~channel, the
    others in descending order.
    """
    given = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return _compact_channels(given, given.stride(), mask.shape[0], channels, granularity, mask.device)


def all_channels(samples, channels, device):
    """What compact_channels makes of a mask that keeps all channels, without a mask."""
    return _compact_channels(None, (0, 0), samples, channels, 1, device)


def _compact_channels(given, strides, samples, channels, granularity, device):
    made = torch.empty((samples, channels), dtype=torch.bool, device=device)
    index = torch.empty((samples, channels), dtype=torch.int32, device=device)
    count = torch.empty(samples, dtype=torch.int32, device=device)
    if channels == 0:
        count.zero_()
    elif samples > 0:
        with on_device(made):
            _compact_channels_kernel[(samples,)](
                given,
                *strides,
                made.view(torch.uint8),
                index,
                count,
                channels,
                granularity,
                BLOCK=min(CHANNEL_BLOCK, triton.next_power_of_2(channels)),
            )
    return made, index, count


def channel_places(index, count, step=1):
    """int32 [N, C // step + 1]: how many of a sample's kept channels come before every step-th one, at last all.

    index [N, C] and count [N] are those of compact_channels; step divides C.
    """
    samples, channels = index.shape
    columns = channels // step + 1
    places = torch.empty((samples, columns), dtype=torch.int32, device=index.device)
    if samples > 0:
        with on_device(index):
            _channel_places_kernel[(samples,)](
                index,
                count,
                places,
                channels,
                columns,
                step,
                channels.bit_length(),
                BLOCK=min(CHANNEL_BLOCK, triton.next_power_of_2(columns)),
            )
    return places


def compact(mask, *, reads=None, fill=None, with_mask=False, with_inverse=False):
    """Ordered stream compaction of a mask, an `ActiveSet`: in two launches, or in one where the mask is small.

    mask: bool, whose bytes may be any, or floating, active where it is not zero: [N, 1, H, W] in any strides, or of any
        shape where contiguous.
    reads: list the pixels that the mask's sites read through these `Reads`, instead of the sites; mask [N, 1, Ho, Wo].
    fill: what else the second launch writes: its output has the mask's sites, or those pixels.
    with_mask: make a mask of what is listed as well, of bytes 0 and 1. with_inverse: make the inverse map.
    """
    is_flat = reads is None and mask.is_contiguous()
    shape = mask.shape if reads is None else (mask.shape[0], 1, *reads.input_size)
    sites = math.prod(shape)
    empty = functools.partial(torch.empty, device=mask.device)
    made = empty(shape, dtype=torch.bool) if with_mask else None
    index, inverse = empty(sites, dtype=torch.int32), empty(sites, dtype=torch.int32) if with_inverse else None
    if sites == 0:
        return ActiveSet(made, index, torch.zeros(1, dtype=torch.int32, device=mask.device), inverse)
    kernel_size, stride, padding, dilation = reads[1:] if reads else ((1, 1), (1, 1), (0, 0), (1, 1))
    where = None
    if not is_flat:
        # The kernels' sums of them are 32 bits wide, which takes half of the registers.
        if sum((length - 1) * step for length, step in zip(mask.shape, mask.stride())) >= 2**31:
            mask = mask.contiguous()
        strides = (mask.stride(0), mask.stride(2), mask.stride(3))
        where = ((*divisor(shape[2]), *divisor(shape[3])), tuple(mask.shape[2:]), strides, padding, dilation)
    count = empty(1, dtype=torch.int32)
    options = dict(KERNEL=kernel_size, STRIDE=stride, SIGNED=mask.dtype != torch.bool, BLOCK=SCAN_BLOCK)
    blocks = triton.cdiv(sites, SCAN_BLOCK)
    counts_itself = blocks <= (SELF_COUNTED if is_flat else SELF_COUNTED_BY_STRIDES)
    block_counts = None if counts_itself else empty(blocks, dtype=torch.int32)
    if fill is not None and fill.out.shape[1] == 0:
        fill = None
    programs, tile = _fill_tile(sites, fill)
    out, inactive = fill or (None, None)
    mask = mask.view(_BITS[mask.element_size()])
    with on_device(mask):
        if not counts_itself:
            _count_kernel[(blocks,)](mask, block_counts, sites, where, **options, num_warps=SCAN_WARPS)
        _compact_kernel[(blocks + programs,)](
            mask,
            block_counts,
            index,
            count,
            inverse,
            None if made is None else made.view(torch.uint8),
            out,
            inactive,
            sites,
            blocks,
            0 if out is None else out.shape[1] // tile["COLUMN_UNIT"],
            where,
            **options,
            # A power of two less one, lest every number of blocks be a kernel of its own.
            BEFORE=triton.next_power_of_2(blocks) - 1 if counts_itself else 0,
            CHUNK=CHUNK,
            **tile,
        )
    return ActiveSet(made, index, count, inverse)


def inverse_map(index, count, sites):
    """int32 [sites]: position of each site in index, or -1 where the site is not active."""
    inverse = torch.full((sites,), -1, dtype=torch.int32, device=index.device)
    capacity = index.numel()
    if capacity > 0:
        with on_device(index):
            _inverse_kernel[(triton.cdiv(capacity, MAP_BLOCK),)](index, count, inverse, BLOCK=MAP_BLOCK)
    return inverse
