"""Active sets on the device: mask -> ordered index list and count, its inverse, and the gather set of dgrad."""

import torch
import triton
import triton.language as tl

from ._common import is_inside, on_device, undo_stride, unit

# One program scans this many mask bytes: 16 for each of 256 threads, and 98 programs (less than one wave)
# for 128 x 56 x 56 sites.
SCAN_BLOCK = 4096
SCAN_WARPS = 8
# Block counts that the second pass adds up at a time.
CHUNK = 1024
MAP_BLOCK = 1024
CHANNEL_BLOCK = 1024  # channels of a sample that its program scans at a time
# Elements that a program fills at a time, and the columns of them that lie side by side at most.
FILL_ELEMENTS = 4096
FILL_COLUMNS = 128


# `sites` stays specialised on divisibility by 16 in these two: it is what lets a thread read 16 mask bytes at once.
@triton.jit
def _count_kernel(mask, block_counts, sites, BLOCK: tl.constexpr):
    """block_counts[b] = number of active sites in block b. mask uint8 [sites]."""
    block = tl.program_id(0)
    site = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(mask + site, mask=site < sites, other=0) != 0
    tl.store(block_counts + block, tl.sum(active.to(tl.int32), axis=0))


@triton.jit
def _compact_kernel(mask, block_counts, index, count, inverse, sites, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """index[rank(s)] = s for each active site s, where rank(s) = number of active sites below s.

    mask uint8 [sites], block_counts int32 [blocks], index int32 [sites], count int32 [1]; inverse int32 [sites], if
    given, is rank(s), or -1 where s is not active. Entries of index past count are not written.
    """
    block = tl.program_id(0)
    # The mask is read first, so that it is on its way while the counts are added up.
    site = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = (tl.load(mask + site, mask=site < sites, other=0) != 0).to(tl.int32)

    # Every block adds up the counts before it by itself: O(blocks^2) reads from L2 in all, but no third launch.
    lane = tl.arange(0, CHUNK)
    before = tl.zeros([CHUNK], tl.int32)
    for start in range(0, block, CHUNK):
        before += tl.load(block_counts + start + lane, mask=start + lane < block, other=0)
    base = tl.sum(before, axis=0)

    rank = base + tl.cumsum(active, axis=0) - active
    tl.store(index + rank, site.to(tl.int32), mask=active != 0)
    if inverse is not None:
        tl.store(inverse + site, tl.where(active != 0, rank, -1), mask=site < sites)
    if block == tl.num_programs(0) - 1:
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


@triton.jit(
    do_not_specialize=[
        "pixels",
        "height",
        "width",
        "out_height",
        "out_width",
        "pad_top",
        "pad_left",
        "dilation_h",
        "dilation_w",
    ],
    # A byte at a time is read of it, so its address makes no other code.
    do_not_specialize_on_alignment=["mask"],
)
def _touched_kernel(
    mask,
    out,
    pixels,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[p] = any over taps of mask[s], s the output site that reads pixel p through that tap.

    mask uint8 [N*Ho*Wo], out uint8 [N*H*W].
    """
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    # Pixels may number more than 2^31, so these are plain 64-bit divisions: two for each pixel, once.
    row = pixel // width
    sample = row // height
    y = (row - sample * height).to(tl.int32) + pad_top
    x = (pixel - row * width).to(tl.int32) + pad_left
    touched = tl.zeros([BLOCK], tl.uint8)
    for tap in range(0, KERNEL_HEIGHT * KERNEL_WIDTH):
        out_y, out_x, exact = undo_stride(
            y - tap // KERNEL_WIDTH * dilation_h, x - tap % KERNEL_WIDTH * dilation_w, STRIDE_H, STRIDE_W
        )
        reads = inside & exact & is_inside(out_y, out_x, out_height, out_width)
        site = (sample * out_height + out_y) * out_width + out_x
        touched |= tl.load(mask + site, mask=reads, other=0)
    tl.store(out + pixel, (touched != 0).to(tl.uint8), mask=inside)


# Gates of several layers are often views of one tensor. An element at a time is read, whatever the address.
@triton.jit(
    do_not_specialize=["stride_n", "stride_c", "channels", "granularity"], do_not_specialize_on_alignment=["given"]
)
def _compact_channels_kernel(given, stride_n, stride_c, mask, index, count, channels, granularity, BLOCK: tl.constexpr):
    """Of each sample: mask[c] = given[c // granularity] is not zero; index, the channels where it is, then -1; count.

    given is [N, ceil(channels / granularity)] by its strides, mask uint8 and index int32 [N, channels], count
    int32 [N].
    """
    sample = tl.program_id(0).to(tl.int64)
    given += sample * stride_n
    mask += sample * channels
    index += sample * channels
    lane = tl.arange(0, BLOCK)
    base = 0
    for start in range(0, channels, BLOCK):
        channel = start + lane
        inside = channel < channels
        value = tl.load(given + (channel // granularity).to(tl.int64) * stride_c, mask=inside, other=0)
        kept = (value != 0).to(tl.int32)
        tl.store(mask + channel, kept.to(tl.uint8), mask=inside)
        tl.store(index + (base + tl.cumsum(kept, axis=0) - kept), channel, mask=kept != 0)
        base += tl.sum(kept, axis=0)
    tl.store(count + sample, base)
    for start in range(0, channels, BLOCK):
        place = start + lane
        tl.store(index + place, tl.full([BLOCK], -1, tl.int32), mask=(place >= base) & (place < channels))


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


@triton.jit(do_not_specialize=["sites", "column_units"])
def _fill_skipped_kernel(
    mask, inactive, out, sites, column_units, COLUMN_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[s] = inactive[s], or zeros if that is None, where mask[s] is 0; out and inactive [sites, columns]."""
    columns = column_units * COLUMN_UNIT
    tiles_c = tl.cdiv(columns, BLOCK_C)
    site = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    skipped = tl.load(mask + site, mask=site < sites, other=1) == 0
    writes = skipped[:, None] & (column < columns)[None, :]
    offset = site[:, None] * columns + column[None, :]
    if inactive is None:
        value = tl.zeros([BLOCK_M, BLOCK_C], out.dtype.element_ty)
    else:
        value = tl.load(inactive + offset, mask=writes, other=0.0)
    tl.store(out + offset, value, mask=writes)


def fill_skipped(mask, out, inactive):
    """Write zeros, or what `inactive` has there, at the sites that a mask skips, and nothing at the others.

    mask bool [N, 1, H, W] is contiguous; out and inactive [N, C, H, W], the latter or None, are channels_last. A pass
    over all of out would write the active sites twice.
    """
    sites, channels = mask.numel(), out.shape[1]
    if sites == 0 or channels == 0:
        return
    block_c = min(FILL_COLUMNS, triton.next_power_of_2(channels))
    block_m = FILL_ELEMENTS // block_c
    with on_device(out):
        _fill_skipped_kernel[(triton.cdiv(sites, block_m) * triton.cdiv(channels, block_c),)](
            mask.view(torch.uint8),
            inactive,
            out,
            sites,
            channels // unit(channels),
            COLUMN_UNIT=unit(channels),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
        )


def compact_channels(mask, channels, granularity=1):
    """The kept channels of each sample, in one launch: (mask bool [N, channels], index int32 like it, count int32 [N]).

    mask [N, ceil(channels / granularity)] is bool, whose bytes may be any, or floating, in any strides; an element
    stands for as many channels. index has a sample's kept channels in ascending order, then -1.
    """
    samples = mask.shape[0]
    made = torch.empty((samples, channels), dtype=torch.bool, device=mask.device)
    index = torch.empty((samples, channels), dtype=torch.int32, device=mask.device)
    count = torch.empty(samples, dtype=torch.int32, device=mask.device)
    given = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if channels == 0:
        count.zero_()
    elif samples > 0:
        with on_device(mask):
            _compact_channels_kernel[(samples,)](
                given,
                *given.stride(),
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


def compact(mask, inverse=None):
    """Ordered stream compaction: bool mask of any shape, contiguous -> (index int32 [numel], count int32 [1]).

    index[:count] are the flat positions of the active sites, ascending; the rest is unspecified. inverse, int32 [numel]
    if given, becomes what inverse_map makes of them, without launches of its own.
    """
    sites = mask.numel()
    index = torch.empty(sites, dtype=torch.int32, device=mask.device)
    if sites == 0:
        return index, torch.zeros(1, dtype=torch.int32, device=mask.device)
    count = torch.empty(1, dtype=torch.int32, device=mask.device)
    blocks = triton.cdiv(sites, SCAN_BLOCK)
    block_counts = torch.empty(blocks, dtype=torch.int32, device=mask.device)
    mask = mask.view(torch.uint8)
    with on_device(mask):
        _count_kernel[(blocks,)](mask, block_counts, sites, BLOCK=SCAN_BLOCK, num_warps=SCAN_WARPS)
        _compact_kernel[(blocks,)](
            mask, block_counts, index, count, inverse, sites, BLOCK=SCAN_BLOCK, CHUNK=CHUNK, num_warps=SCAN_WARPS
        )
    return index, count


def inverse_map(index, count, sites):
    """int32 [sites]: position of each site in index, or -1 where the site is not active."""
    inverse = torch.full((sites,), -1, dtype=torch.int32, device=index.device)
    capacity = index.numel()
    if capacity > 0:
        with on_device(index):
            _inverse_kernel[(triton.cdiv(capacity, MAP_BLOCK),)](index, count, inverse, BLOCK=MAP_BLOCK)
    return inverse


def touched(mask, out_size, in_size, kernel_size, stride, padding, dilation):
    """bool [N, 1, H, W]: the input pixels that an active output site reads.

    mask is bool with N*Ho*Wo elements, contiguous; padding is (top, left); the other pairs are (height, width).
    """
    samples = mask.numel() // max(out_size[0] * out_size[1], 1)
    out = torch.empty((samples, 1, *in_size), dtype=torch.bool, device=mask.device)
    pixels = out.numel()
    if pixels == 0:
        return out
    with on_device(mask):
        _touched_kernel[(triton.cdiv(pixels, MAP_BLOCK),)](
            mask.view(torch.uint8),
            out.view(torch.uint8),
            pixels,
            *in_size,
            *out_size,
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_size[0],
            KERNEL_WIDTH=kernel_size[1],
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            BLOCK=MAP_BLOCK,
        )
    return out
