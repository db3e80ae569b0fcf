"""Active sets on the device: mask -> ordered index list and count, its inverse, and the gather set of dgrad."""

import torch
import triton
import triton.language as tl

from ._common import is_inside, on_device, undo_stride

# One program scans this many mask bytes: 16 for each of 256 threads, and 98 programs (less than one wave)
# for 128 x 56 x 56 sites.
SCAN_BLOCK = 4096
SCAN_WARPS = 8
# Block counts that the second pass adds up at a time.
CHUNK = 1024
MAP_BLOCK = 1024


# `sites` stays specialised on divisibility by 16 in these two: it is what lets a thread read 16 mask bytes at once.
@triton.jit
def _count_kernel(mask, block_counts, sites, BLOCK: tl.constexpr):
    """block_counts[b] = number of active sites in block b. mask uint8 [sites]."""
    block = tl.program_id(0)
    site = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(mask + site, mask=site < sites, other=0) != 0
    tl.store(block_counts + block, tl.sum(active.to(tl.int32), axis=0))


@triton.jit
def _compact_kernel(mask, block_counts, index, count, sites, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """index[rank(s)] = s for each active site s, where rank(s) = number of active sites below s.

    mask uint8 [sites], block_counts int32 [blocks], index int32 [sites], count int32 [1].
    Entries of index past count are not written.
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
    ]
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


def compact(mask):
    """Ordered stream compaction: bool mask of any shape, contiguous -> (index int32 [numel], count int32 [1]).

    index[:count] are the flat positions of the active sites, ascending; the rest is unspecified.
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
            mask, block_counts, index, count, sites, BLOCK=SCAN_BLOCK, CHUNK=CHUNK, num_warps=SCAN_WARPS
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
