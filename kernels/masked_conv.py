"""Masked convolution as an implicit GEMM over the active output sites, one product for each group.

Sites and pixels are flat: s = (n*Ho + oy)*Wo + ox, p = (n*H + iy)*W + ix, with iy = oy*stride - pad + kh*dilation.
`index[:count]` lists the active sites in ascending order; what lies past count is never used. Everything stays on the
device: grids cover the capacity, and programs past count return at once, or write zeros and do.

Features are dense or packed, told apart by their number of dimensions, and their addresses are computed from row
numbers, never from the tensor's strides:
  dense   [N, C, H, W] in channels_last: row s (or p) of a [rows, C] matrix;
  packed  [capacity, C]: row m belongs to the m-th listed site (or pixel). Rows past count are not read, and written as
          zeros.
          A convolution finds the pixels of a packed source through `lookup`, int32 [N*H*W]: the row of each pixel, or
          -1 where it has none and counts as zero.
One channel a group (depthwise) is no matrix product: depthwise.py has it.
"""

import torch
import triton
import triton.language as tl

from . import depthwise
from ._common import (
    TAP_GROUP,
    accumulator,
    architecture,
    arithmetic,
    bucket,
    divisor,
    find_taps,
    is_inside,
    is_packed,
    multiprocessors,
    on_device,
    partial_dtype,
    rows_capacity,
    rows_written,
    split_rows,
    split_site,
    split_step,
    split_steps,
    store_rows,
    unit,
    zero_rows,
)

# Tiles of the implicit GEMM, by (arithmetic, bucket of its N): (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages).
# BLOCK_K is an upper bound: it shrinks with the channels of a tap (see config). Nothing here depends on the active
# count: it varies with every input, and a table keyed on it would recompile during training.
_AMPERE = {
    ("half", 16): (128, 16, 64, 4, 3),
    ("half", 64): (128, 64, 64, 4, 3),
    ("half", 128): (128, 128, 32, 8, 4),
    ("tf32", 16): (128, 16, 32, 4, 3),
    ("tf32", 64): (128, 64, 32, 4, 3),
    ("tf32", 128): (128, 128, 16, 8, 4),
    ("ieee", 16): (64, 16, 16, 4, 3),
    ("ieee", 64): (64, 64, 16, 4, 3),
    ("double", 16): (32, 16, 16, 4, 3),
    ("double", 64): (32, 64, 16, 4, 3),
}
CONV_TILES = {
    "sm_80": _AMPERE,
    # Four warps for 128 x 128: two programs fit an SM, and one's prologue hides behind the other's products.
    # 128 x 256 x 64 with eight warps would read a quarter less of L2 for the same products, in 134 instructions a step
    # and 242 registers. It is for layers that fill the GPU with half as many tiles: at 14 x 14 with 256 channels, batch
    # 128 and density 0.25 there would be 49 on 132 multiprocessors, and their steps take twice as long; at 7 x 7 with
    # 512, 26, which splits of K make as fast as the smaller ones. With a residual or an activation it spills.
    "sm_90": _AMPERE | {("half", 128): (128, 128, 64, 4, 3), ("tf32", 128): (128, 128, 32, 8, 3)},
    "sm_100": _AMPERE | {("half", 128): (128, 128, 64, 4, 3), ("tf32", 128): (128, 128, 32, 8, 3)},
    # 64 KiB of LDS; two stages are what its software pipeline uses.
    "gfx942": {
        ("half", 16): (128, 16, 64, 8, 2),
        ("half", 64): (128, 64, 64, 8, 2),
        ("half", 128): (128, 128, 32, 8, 2),
        ("tf32", 16): (128, 16, 32, 8, 2),
        ("tf32", 64): (128, 64, 32, 8, 2),
        ("tf32", 128): (128, 128, 16, 8, 2),
        ("ieee", 16): (64, 16, 16, 4, 2),
        ("ieee", 64): (64, 64, 16, 4, 2),
        ("double", 16): (32, 16, 16, 4, 2),
        ("double", 64): (32, 64, 16, 4, 2),
    },
    # Anything else: within 64 KiB of shared memory.
    "default": {
        ("half", 16): (64, 16, 32, 4, 2),
        ("half", 64): (64, 64, 32, 4, 3),
        ("tf32", 16): (64, 16, 32, 4, 2),
        ("tf32", 64): (64, 64, 32, 4, 2),
        ("ieee", 16): (64, 16, 16, 4, 2),
        ("ieee", 64): (64, 64, 16, 4, 2),
        ("double", 16): (32, 16, 16, 4, 2),
        ("double", 64): (32, 64, 16, 4, 2),
    },
}

# Tiles for rows enough to occupy the multiprocessors twice over. A step multiplies as much as two of the tile that they
# stand in for, and takes three quarters of what those do from L2, which is what binds them.
LARGE_TILES = {"sm_90": {("half", 128): (256, 128, 64, 8, 3)}}
LARGE_ROWS, LARGE_WAVES = 256, 2

# Tiles of wgrad, in which K runs over the active rows: (arithmetic, bucket of min(Cout, Cin)) -> as above.
_AMPERE_WGRAD = {
    ("half", 16): (16, 16, 64, 4, 5),
    ("half", 64): (64, 64, 64, 4, 5),
    ("half", 128): (128, 128, 32, 8, 5),
    ("tf32", 16): (16, 16, 32, 4, 5),
    ("tf32", 64): (64, 64, 32, 4, 5),
    ("ieee", 16): (16, 16, 64, 4, 3),
    ("ieee", 64): (64, 64, 16, 8, 3),
    ("double", 16): (16, 16, 16, 4, 3),
    ("double", 64): (64, 64, 16, 8, 3),
}
WEIGHT_GRAD_TILES = {
    # Triton shares the stages out between the site list and the loads whose addresses depend on it: of 5, the
    # latter get 3 buffers.
    "sm_80": _AMPERE_WGRAD,
    # Four warps: with eight, Triton 3.6.0 lets wgmma wait for itself.
    "sm_90": _AMPERE_WGRAD | {("half", 128): (128, 128, 64, 4, 5)},
    "sm_100": _AMPERE_WGRAD
    | {
        ("half", 64): (64, 64, 64, 8, 5),
        ("half", 128): (128, 128, 64, 8, 5),
        ("tf32", 64): (64, 64, 32, 4, 4),
    },
    "gfx942": {key: (*tile[:4], 2) for key, tile in _AMPERE_WGRAD.items()},
    "default": {key: (*tile[:4], 2) for key, tile in _AMPERE_WGRAD.items() if key[1] < 128}
    | {("double", 64): (64, 64, 16, 4, 2)},
}

# A product of few tiles splits K between programs, one for each multiprocessor as far as they go. Two on one would
# share its path to L2, which one nearly fills by itself: 32 KiB a step of 128 x 128 x 64, at 64 bytes a cycle, beside
# 512 cycles of products. A split's partial sums take as long on their way to L2 and back as four such steps, and a
# program has as much to do before its first. So K has to be this long, and leaves each split this much.
SPLIT_FROM = 2048
SPLIT_LEAST = 512
# The sum over the splits is a launch, which takes about 2 us even if it has nothing to do: products that have so many
# tiles that a quarter of the sites occupies half of the multiprocessors go without.
SPLIT_TILES = 2  # for each multiprocessor, at most
SPLIT_ELEMENTS = 2048  # of a tile that a program sums

# Programs of wgrad that a multiprocessor has room for, by registers and shared memory as compiled: of the largest tile,
# by architecture, and of any smaller one, of which there is room for four or more everywhere.
WEIGHT_GRAD_PLACES = {"sm_80": 1, "sm_90": 2, "sm_100": 1, "gfx942": 2}
WEIGHT_GRAD_SMALL_PLACES = 4
# How full the last wave of programs is at least, and the fewest K steps that are worth a split.
WEIGHT_GRAD_FULL = 0.8
WEIGHT_GRAD_STEPS = 8
BIAS_GRAD_SPLITS = 256
BIAS_GRAD_TILE = 2048  # elements of grad a program adds up at a time
REDUCE_BLOCK = 1024

# `input_precision` of tl.dot; it says nothing of fp16, bf16 and fp64.
PRECISION = {"half": "ieee", "tf32": "tf32", "ieee": "ieee", "double": "ieee"}

_VARIES = ["source_height", "source_width", "site_height", "height_multiplier", "height_shift"]
_VARIES += ["site_width", "width_multiplier", "width_shift", "pad_top", "pad_left"]
_VARIES += ["dilation_h", "dilation_w", "splits", "parallel", "sites", "channel_units", "filter_units"]
# `groups` stays specialised: where it is 1 it is a constant, and the kernel is the ungrouped one.


def config(kind, channels, filters, arch, *, packed=False, finished=False, large=False, piece=None):
    """Tile of the implicit GEMM for `channels` summed per tap and `filters` columns, both of one group.

    kind is the class of arithmetic ("half", "tf32", "ieee", "double"), arch a row of CONV_TILES. packed says that the
    source is, finished that a residual or an activation follows the product, large that there are rows enough for
    LARGE_TILES. piece is how many channels a load finds side by side; None is all of them.
    """
    table = CONV_TILES[arch]
    if large and not (packed or finished):  # which take more registers
        table = table | LARGE_TILES.get(arch, {})
    tile = _tile(table, kind, filters, is_aligned(kind, piece or channels))
    # Channels past those of the tap are multiplied by zero: a tap of 16 takes steps of 16.
    tile["BLOCK_K"] = min(tile["BLOCK_K"], bucket(channels, (16, 32, 64)))
    if packed:
        # Triton shares the stages out along a chain of loads: with the lookup ahead of it, a row gets as many buffers
        # as before from twice the stages.
        tile["num_stages"] = (tile["num_stages"] - 1) * 2 + 1
    if finished:
        # A residual, or what an activation computes, needs registers next to the accumulators: 64 of those a thread.
        tile["num_warps"] = max(tile["num_warps"], tile["BLOCK_M"] * tile["BLOCK_N"] // (64 * 32))
    return tile


def reads_ahead(kind, tile, taps, arch, *, gated):
    """Whether a step's rows of the source wait in registers, loaded by the step before, not in copies to shared memory.

    Such copies go past L1, and the taps of a block of channels read much the same pixels: of nine taps L2 would have to
    hand out all, which bounds tiles with few columns, whose source is most of what they read. Wider tiles are bound by
    shared memory, which the rows pass once more this way. gated says that they are multiplied on their way, in a layout
    that takes barriers of its own.
    """
    return arch == "sm_90" and kind == "half" and taps > 1 and tile["BLOCK_N"] <= 64 and not gated


def weight_grad_config(kind, channels, filters, arch, *, packed=False, piece=None):
    """Tile of wgrad: BLOCK_M of Cout (`filters`) by BLOCK_N of Cin (`channels`), BLOCK_K active rows a step."""
    aligned = is_aligned(kind, piece or channels) and is_aligned(kind, piece or filters)
    tile = _tile(WEIGHT_GRAD_TILES[arch], kind, min(channels, filters), aligned)
    if packed:
        # The lookup makes a chain of two loads one of three; see config.
        tile["num_stages"] = max(tile["num_stages"], (tile["num_stages"] - 1) // 2 * 3 + 1)
        if arch == "sm_100" and kind == "tf32" and tile["BLOCK_M"] == 64:
            tile["num_warps"] = 8  # with four it spills
    return tile


def weight_grad_splits(tiles, rows, tile, device):
    """How many splits of at most `rows` rows wgrad takes where there are so many tiles: whole waves of programs.

    The fewest waves of which the last is nearly full: every split more costs a weight's size of partial sums. How many
    there are depends on the shapes and the device alone.
    """
    places = weight_grad_places(tile["BLOCK_M"], architecture()) * multiprocessors(device)
    return min(whole_waves(tiles, places), triton.cdiv(rows, tile["BLOCK_K"] * WEIGHT_GRAD_STEPS))


def weight_grad_places(block_m, arch):
    return WEIGHT_GRAD_PLACES[arch] if block_m >= 128 else WEIGHT_GRAD_SMALL_PLACES


def whole_waves(tiles, places):
    """The fewest splits of each tile with which their programs fill all waves of so many places."""
    waves = triton.cdiv(tiles, places)
    while waves * places // tiles * tiles < WEIGHT_GRAD_FULL * waves * places:
        waves += 1
    return waves * places // tiles


def is_aligned(kind, channels):
    """Whether every row of that many channels starts on 16 bytes."""
    return unit(channels) * {"half": 2, "tf32": 4, "ieee": 4, "double": 8}[kind] >= 16


def _tile(table, kind, width, aligned):
    # Rows that do not start on 16 bytes are loaded in pieces, each with an address in a register: the largest tiles
    # would spill.
    widths = [size for name, size in table if name == kind and (aligned or size <= 64)]
    block_m, block_n, block_k, num_warps, num_stages = table[kind, bucket(width, widths)]
    if not aligned:
        block_k = min(block_k, 16)
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages)


def most_splits(terms, tiles, parallel):
    """How many splits of K a tile has at most: 1 where that brings nothing, whatever the mask.

    terms are those of a sum, tiles those of all sites, parallel the multiprocessors.
    """
    return terms // SPLIT_LEAST if terms >= SPLIT_FROM and tiles <= SPLIT_TILES * parallel else 1


@triton.jit
def find_splits(rows, row_tiles, splits, parallel, BLOCK_M: tl.constexpr):
    """(tiles, splits of each) of that many rows: at most `splits`, and all at most `parallel` unless it is one each.

    row_tiles are those of the same rows. Where K is split there are few of them; see most_splits.
    """
    tiles = tl.cdiv(rows, BLOCK_M) * row_tiles
    return tiles, tl.maximum(tl.minimum(parallel // tl.maximum(tiles, 1), splits), 1)


@triton.jit
def finish_rows(
    total,
    bias,
    gate,
    residual,
    grad,
    out,
    row,
    site,
    listed,
    tile,
    n,
    sites,
    groups,
    filters,
    tiles_n,
    PACKED_SITES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """What follows the sum over K in _masked_conv_kernel; tile counts the tiles of N of all groups, n is in its group.

    total [M, N] in the accumulator's type, row, site and listed [M], n [N].
    """
    column = tile // tiles_n * filters + n
    n_inside = n[None, :] < filters
    if bias is not None:
        total += tl.load(bias + column, mask=n < filters, other=0.0).to(total.dtype)[None, :]
    if PACKED_SITES:
        out_row = row
    else:
        out_row = site.to(tl.int64)
    inside = listed[:, None] & n_inside
    offset = out_row[:, None] * (filters * groups) + column[None, :]
    if grad is not None:
        dual = tl.load(grad + offset, mask=inside, other=0.0).to(total.dtype)
        # Columns past `filters` are an input times zero, which is not zero where the input is infinite.
        share = tl.sum(tl.where(n_inside, total * dual, 0.0), axis=1)
        tl.store(out + tile.to(tl.int64) * sites + site, share, mask=listed)
    else:
        store_rows(total, gate, residual, out, site, offset, listed, inside, ACTIVATION)


@triton.jit
def load_source(
    step,
    end,
    first_tap,
    taps,
    tap_bits,
    source,
    first_pointer,
    rows,
    sample_row,
    y,
    x,
    lookup,
    gate,
    k,
    channels,
    source_width,
    source_columns,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LINEAR: tl.constexpr,
    PACKED_SOURCE: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """[M, K] of the source: what a step of _masked_conv_kernel multiplies; AHEAD of it, zeros from `end` on.

    What is of a row is [M, 1], k is [K].
    """
    block, bit = split_step(step, taps, KERNEL_HEIGHT * KERNEL_WIDTH)
    channel = block * k.shape[0]
    tap = first_tap + bit
    tap_y = tap // KERNEL_WIDTH * dilation_h
    tap_x = tap % KERNEL_WIDTH * dilation_w
    valid = ((tap_bits >> bit) & 1) != 0
    if AHEAD:
        valid = valid & (step < end)
    if LINEAR:
        shift = tap_y * source_width + tap_x
        if TRANSPOSED:
            shift = -shift
        source_row = rows + shift
    else:
        source_row = (sample_row + (y - tap_y) // STRIDE_H) * source_width + (x - tap_x) // STRIDE_W
    if PACKED_SOURCE:
        packed_row = tl.load(lookup + source_row, mask=valid, other=-1)
        valid = packed_row >= 0
        pointer = source + packed_row.to(tl.int64) * source_columns + (channel + k)[None, :]
    elif LINEAR:
        pointer = first_pointer + (shift.to(tl.int64) * source_columns + channel)
    else:
        pointer = source + source_row.to(tl.int64) * source_columns + (channel + k)[None, :]
    if EVEN:
        a = tl.load(pointer, mask=valid, other=0.0)
    else:
        a = tl.load(pointer, mask=valid & (channel + k < channels)[None, :], other=0.0)
    if TRANSPOSED and gate is not None:
        scale = tl.load(gate + source_row, mask=valid, other=0.0).to(ACCUMULATOR)
        a = (a.to(ACCUMULATOR) * scale).to(source.dtype.element_ty)
    return a


@triton.jit(do_not_specialize=_VARIES)
def _masked_conv_kernel(
    source,
    weight,
    bias,
    gate,
    residual,
    lookup,
    index,
    count,
    grad,
    out,
    partial,
    splits,
    parallel,
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
    filter_units,
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
    TRANSPOSED: tl.constexpr,
    PACKED_SOURCE: tl.constexpr,
    PACKED_SITES: tl.constexpr,
    WEIGHT_K_CONTIGUOUS: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Implicit GEMM over the rows listed in index[:count]: M = sites, K = taps x channels, N = filters of a group.

    conv        = sum over tap, k of source[p(s, tap), k] * weight[n, tap, k] + bias[n]
    forward     out[s, n] = activation(gate[s] * conv + residual[s, n])
    grad given  out[tile, s] = sum over n in the tile of grad[s, n] * conv
    TRANSPOSED  out[p, n] = sum over tap, k of gate[s] * source[s, k] * weight[k, tap, n], s = s(p, tap) active

    channels and filters are those of a group, its columns lie side by side: source [source rows, groups * channels],
    out, residual and grad [site rows, groups * filters], out for a grad [groups * tiles of N, sites],
    weight [groups * filters, taps, channels] if WEIGHT_K_CONTIGUOUS, else [groups * channels, taps, filters],
    gate [rows of the convolution's output]. lookup int32 [source rows] names the row of a PACKED_SOURCE, and the active
    sites to TRANSPOSED. With PACKED_SITES the m-th listed site is row m of out, residual and grad, and out's rows past
    count become zeros. `sites` counts out's rows. EVEN says that tiles of K and N are full. With AHEAD a step loads the
    source's rows of the next one; see reads_ahead.
    partial [splits, tiles, BLOCK_M, BLOCK_N], if given, takes the sums of the tiles that several programs share, for
    _add_splits_kernel to finish: as many as find_splits says of `splits` and `parallel`. Which products meet in a sum
    depends on count alone.
    Skips sites not listed, taps that fall outside the source, and sources that lookup does not have.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    # A product with a constant shows the compiler what divides the row length, hence how wide a load may be.
    channels = channel_units * CHANNEL_UNIT
    filters = filter_units * FILTER_UNIT
    # The tiles of N of the same sites are neighbours in launch order: they share the gathered rows in L2.
    tiles_n = tl.cdiv(filters, BLOCK_N)
    rows = tl.load(count)
    tile = tl.program_id(0)
    if PACKED_SITES and grad is None:
        start = (tile // tiles_n // groups).to(tl.int64) * BLOCK_M
        if start + BLOCK_M > rows:
            n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            past = start + tl.arange(0, BLOCK_M)
            zero_rows(out, past, rows, sites, tile // tiles_n % groups * filters + n, n < filters, filters * groups)
    if partial is not None:
        tiles, splits = find_splits(rows, tiles_n * groups, splits, parallel, BLOCK_M)
        if tile >= tiles * splits:
            return
        split = tile // tiles
        tile -= split * tiles
    tile_n = tile % tiles_n
    group = tile // tiles_n % groups
    start = (tile // tiles_n // groups).to(tl.int64) * BLOCK_M
    if start >= rows:
        return

    row = start + tl.arange(0, BLOCK_M)
    listed = row < rows
    site = tl.load(index + row, mask=listed, other=0)
    sample, y, x = split_site(
        site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
    )
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
    source_columns = channels * groups
    source += group * channels
    # What the pipelined loop takes of a row is a column of two dimensions, made before it: one made inside it would go
    # through shared memory at every step, with barriers around.
    rows_2d = first_row[:, None]
    y_2d, x_2d, sample_row_2d = y[:, None], x[:, None], sample_row[:, None]

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first_pointer = source + rows_2d.to(tl.int64) * source_columns + k[None, :]
    if WEIGHT_K_CONTIGUOUS:
        weight_pointer = weight + (group * filters + n).to(tl.int64)[None, :] * (TAPS * channels) + k[:, None]
    else:
        weight_pointer = weight + (group * channels + k).to(tl.int64)[:, None] * (TAPS * filters) + n[None, :]
    n_inside = n[None, :] < filters

    blocks = tl.cdiv(channels, BLOCK_K)
    if partial is not None:
        first_step, last_step = split_steps(split, splits, TAPS * blocks)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for first_tap in range(0, TAPS, TAP_GROUP):
        # Which taps a row has is the same for every block of channels, so it is found once, ahead of the
        # pipelined loop: a bit per tap. In dgrad this also keeps a dependent load out of that loop. The rows of a
        # packed source are looked up inside it, because nothing but registers could carry them there.
        if PACKED_SOURCE:
            tap_lookup = None
        else:
            tap_lookup = lookup
        has_tap = find_taps(
            first_tap,
            y,
            x,
            sample_row,
            tap_lookup,
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
        # All that a step reads follows from its number, as in gathered_conv.py.
        taps = tl.minimum(TAPS - first_tap, TAP_GROUP)
        begin = 0
        end = taps * blocks
        if partial is not None:
            begin = tl.maximum(first_step - first_tap * blocks, 0)
            end = tl.minimum(last_step - first_tap * blocks, end)
        if AHEAD:
            a = load_source(
                begin,
                end,
                first_tap,
                taps,
                tap_bits,
                source,
                first_pointer,
                rows_2d,
                sample_row_2d,
                y_2d,
                x_2d,
                lookup,
                gate,
                k,
                channels,
                source_width,
                source_columns,
                dilation_h,
                dilation_w,
                KERNEL_HEIGHT,
                KERNEL_WIDTH,
                STRIDE_H,
                STRIDE_W,
                TRANSPOSED,
                LINEAR,
                PACKED_SOURCE,
                EVEN,
                AHEAD,
                ACCUMULATOR,
            )
        for step in range(begin, end):
            loaded = load_source(
                step + 1 if AHEAD else step,
                end,
                first_tap,
                taps,
                tap_bits,
                source,
                first_pointer,
                rows_2d,
                sample_row_2d,
                y_2d,
                x_2d,
                lookup,
                gate,
                k,
                channels,
                source_width,
                source_columns,
                dilation_h,
                dilation_w,
                KERNEL_HEIGHT,
                KERNEL_WIDTH,
                STRIDE_H,
                STRIDE_W,
                TRANSPOSED,
                LINEAR,
                PACKED_SOURCE,
                EVEN,
                AHEAD,
                ACCUMULATOR,
            )
            if not AHEAD:
                a = loaded
            block, bit = split_step(step, taps, TAPS)
            channel = block * BLOCK_K
            tap = first_tap + bit
            if WEIGHT_K_CONTIGUOUS:
                b_pointer = weight_pointer + (tap.to(tl.int64) * channels + channel)
            else:
                b_pointer = weight_pointer + (channel.to(tl.int64) * TAPS + tap) * filters
            if EVEN:
                b = tl.load(b_pointer)
            else:
                b = tl.load(b_pointer, mask=(channel + k < channels)[:, None] & n_inside, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            if AHEAD:
                a = loaded

    if partial is not None and splits > 1:
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partial + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N) + place, total)
        return
    if TRANSPOSED:
        gate = None  # it is in the sum
    finish_rows(
        total,
        bias,
        gate,
        residual,
        grad,
        out,
        row,
        site,
        listed,
        group * tiles_n + tile_n,
        n,
        sites,
        groups,
        filters,
        tiles_n,
        PACKED_SITES,
        ACTIVATION,
    )


@triton.jit(do_not_specialize=_VARIES)
def _add_splits_kernel(
    partial,
    bias,
    gate,
    residual,
    index,
    count,
    grad,
    out,
    splits,
    parallel,
    sites,
    groups,
    filter_units,
    FILTER_UNIT: tl.constexpr,
    PACKED_SITES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the sums over K that _masked_conv_kernel leaves in partial, in order, and does what follows them.

    A program takes ROWS of a tile's BLOCK_M rows. Does nothing where each tile has one split.
    """
    filters = filter_units * FILTER_UNIT
    tiles_n = tl.cdiv(filters, BLOCK_N)
    rows = tl.load(count)
    tiles, splits = find_splits(rows, tiles_n * groups, splits, parallel, BLOCK_M)
    SHARES: tl.constexpr = BLOCK_M // ROWS
    tile = tl.program_id(0) // SHARES
    first = tl.program_id(0) % SHARES * ROWS
    start = (tile // (tiles_n * groups)).to(tl.int64) * BLOCK_M + first
    if (splits == 1) | (start >= rows):
        return

    row = start + tl.arange(0, ROWS)
    listed = row < rows
    site = tl.load(index + row, mask=listed, other=0)
    place = (first + tl.arange(0, ROWS))[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    pointer = partial + tile.to(tl.int64) * (BLOCK_M * BLOCK_N) + place
    total = tl.load(pointer)
    for _split in range(1, splits):
        pointer += tiles.to(tl.int64) * (BLOCK_M * BLOCK_N)
        total += tl.load(pointer)
    tile = tile % (tiles_n * groups)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    finish_rows(
        total,
        bias,
        gate,
        residual,
        grad,
        out,
        row,
        site,
        listed,
        tile,
        n,
        sites,
        groups,
        filters,
        tiles_n,
        PACKED_SITES,
        ACTIVATION,
    )


@triton.jit(do_not_specialize=_VARIES)
def _weight_grad_kernel(
    source,
    grad,
    gate,
    lookup,
    index,
    count,
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
    channel_units,
    filter_units,
    splits,
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
    PACKED_SITES: tl.constexpr,
    GATES_SOURCE: tl.constexpr,
    EVEN: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, m, tap, n] = sum over s in the split of gate[s] * grad[s, m] * source[p(s, tap), n].

    source [source rows, groups * channels], grad [site rows, groups * filters], and m and n of the same group:
    partial [splits, groups * filters, taps, channels]. lookup, if given, names the rows of a packed source; with
    PACKED_SITES the m-th listed site is row m of grad. With GATES_SOURCE the gate multiplies the source's rows. EVEN
    says that tiles of M and N are full.
    Split i takes the i-th equal share of index[:count]: which rows meet in a sum depends on count alone.
    Skips inactive sites; taps outside the source, and sources that lookup does not have, contribute zeros.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    channels = channel_units * CHANNEL_UNIT
    filters = filter_units * FILTER_UNIT
    # The split varies slowest: the tiles of one split read the same rows, and find them in L2.
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tiles_m = tl.cdiv(filters, BLOCK_M)
    tile = tl.program_id(0)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tile // tiles_n
    tap = tile % TAPS
    tile = tile // TAPS
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tile // tiles_m
    group = tile % groups
    begin, end = split_rows(tile // groups, splits, tl.load(count), BLOCK_K)

    tap_y = tap // KERNEL_WIDTH * dilation_h - pad_top
    tap_x = tap % KERNEL_WIDTH * dilation_w - pad_left
    m_inside = m[None, :] < filters
    n_inside = n[None, :] < channels
    source += group * channels
    grad += group * filters
    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        listed = row < end
        site = tl.load(index + row, mask=listed, other=0)
        sample, y, x = split_site(
            site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
        )
        y = y * STRIDE_H + tap_y
        x = x * STRIDE_W + tap_x
        valid = listed & is_inside(y, x, source_height, source_width)
        source_row = (sample * source_height + y) * source_width + x
        if lookup is not None:
            source_row = tl.load(lookup + source_row, mask=valid, other=-1)
            valid = source_row >= 0
        if PACKED_SITES:
            grad_row = row
        else:
            grad_row = site
        a_offset = grad_row.to(tl.int64)[:, None] * (filters * groups) + m[None, :]
        b_offset = source_row.to(tl.int64)[:, None] * (channels * groups) + n[None, :]
        if EVEN:
            a = tl.load(grad + a_offset, mask=listed[:, None], other=0.0)
            b = tl.load(source + b_offset, mask=valid[:, None], other=0.0)
        else:
            a = tl.load(grad + a_offset, mask=listed[:, None] & m_inside, other=0.0)
            b = tl.load(source + b_offset, mask=valid[:, None] & n_inside, other=0.0)
        if gate is not None:
            scale = tl.load(gate + site, mask=listed, other=0.0).to(ACCUMULATOR)[:, None]
            if GATES_SOURCE:
                b = (b.to(ACCUMULATOR) * scale).to(source.dtype.element_ty)
            else:
                a = (a.to(ACCUMULATOR) * scale).to(grad.dtype.element_ty)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    # tile is split * groups + group, so this counts the filters of all groups.
    first = ((tile.to(tl.int64) * filters + m) * TAPS + tap) * channels
    tl.store(partial + first[:, None] + n[None, :], total, mask=(m[:, None] < filters) & n_inside)


@triton.jit(do_not_specialize=["splits", "channels", "size", "stride_m", "stride_n", "stride_y", "stride_x"])
def _reduce_weight_grad_kernel(
    partial,
    out,
    splits,
    channels,
    size,
    stride_m,
    stride_n,
    stride_y,
    stride_x,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m, n, tap] = sum over splits, in order, of partial[split, m, tap, n]; size = filters * taps * channels.

    out is [filters, channels, kH, kW] by its strides.
    """
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    total = tl.zeros([BLOCK], partial.dtype.element_ty)
    for split in range(0, splits):
        total += tl.load(partial + size.to(tl.int64) * split + offset, mask=inside, other=0.0)
    # A weight has far fewer than 2^31 elements.
    offset = offset.to(tl.int32)
    row = offset // channels
    n = offset - row * channels
    x = row % KERNEL_WIDTH
    y = row // KERNEL_WIDTH % KERNEL_HEIGHT
    m = row // (KERNEL_WIDTH * KERNEL_HEIGHT)
    target = m * stride_m + n * stride_n + y * stride_y + x * stride_x
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "filter_units"])
def _bias_grad_kernel(
    grad,
    gate,
    index,
    count,
    partial,
    filter_units,
    splits,
    FILTER_UNIT: tl.constexpr,
    PACKED_SITES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial[split, n] = sum over s in the split of gate[s] * grad[s, n], with the splits and rows of wgrad."""
    filters = filter_units * FILTER_UNIT
    tiles_n = tl.cdiv(filters, BLOCK_N)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(0) // tiles_n
    begin, end = split_rows(split, splits, tl.load(count), BLOCK_K)
    total = tl.zeros([BLOCK_K, BLOCK_N], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        listed = row < end
        site = tl.load(index + row, mask=listed, other=0)
        if PACKED_SITES:
            grad_row = row
        else:
            grad_row = site
        offset = grad_row.to(tl.int64)[:, None] * filters + n[None, :]
        tile = tl.load(grad + offset, mask=listed[:, None] & (n[None, :] < filters), other=0.0).to(ACCUMULATOR)
        if gate is not None:
            tile *= tl.load(gate + site, mask=listed, other=0.0).to(ACCUMULATOR)[:, None]
        total += tile
    tl.store(partial + split.to(tl.int64) * filters + n, tl.sum(total, axis=0), mask=n < filters)


def forward(
    input,
    weight,
    bias,
    index,
    count,
    gate,
    residual,
    lookup,
    out,
    *,
    input_size,
    site_size,
    activation,
    stride,
    padding,
    dilation,
    groups,
    allow_tf32,
):
    """out[s] = activation(gate[s] * (conv2d(input, weight)[s] + bias) + residual[s]) at the active sites alone.

    The rest of a dense out is left alone, that of a packed one becomes zeros. input, and out with residual, are dense
    or packed each; a packed input comes with its lookup. residual may be out itself. gate is [N*Ho*Wo] in every case.
    weight [Cout, Cin/groups, kH, kW] is read in place if it is channels_last, and copied into that layout if not.
    input_size is (H, W), site_size (Ho, Wo), padding (top, left), activation a name that `_common.activate` knows.
    bias, gate, residual and lookup may be None.
    """
    geometry = dict(input_size=input_size, site_size=site_size, stride=stride, padding=padding, dilation=dilation)
    if _is_depthwise(weight, groups):
        depthwise.forward(
            input, weight, bias, index, count, gate, residual, lookup, out, activation=activation, **geometry
        )
        return
    _launch_conv(
        input,
        channels_last_rows(weight),
        bias,
        gate,
        residual,
        lookup,
        index,
        count,
        out,
        shape=weight.shape,
        groups=groups,
        activation=activation,
        allow_tf32=allow_tf32,
        **geometry,
    )


def input_grad(
    grad,
    weight,
    inverse,
    pixel_index,
    pixel_count,
    gate,
    grad_input,
    *,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    groups,
    allow_tf32,
):
    """grad_input[p] = sum of gate[s] * grad[s] @ weight[tap] over the active sites s that read p.

    inverse is the inverse map of the active output sites, hence the lookup of a packed grad.
    pixel_index[:pixel_count] lists the pixels to compute: row m of a packed grad_input is the m-th of them, and its
    other rows become zeros. The rest of a dense one is left alone: it comes filled with zeros.
    """
    # The product runs the other way: over the sites as its source, onto the pixels.
    geometry = dict(input_size=site_size, site_size=input_size, stride=stride, padding=padding, dilation=dilation)
    if _is_depthwise(weight, groups):
        depthwise.input_grad(grad, weight, inverse, pixel_index, pixel_count, gate, grad_input, **geometry)
        return
    total_filters, channels, kernel_height, kernel_width = weight.shape
    filters = total_filters // groups
    # 16-bit tensor cores take B contiguous along N as well: the forward's layout, [Cout, taps, Cin/groups], serves.
    # wgmma takes TF32 operands contiguous along K only: the weight becomes [Cin, taps, Cout/groups].
    k_contiguous = weight.dtype not in (torch.float16, torch.bfloat16) or not is_aligned("half", channels)
    if k_contiguous:
        rows = transposed_rows(weight, groups)
    else:
        rows = channels_last_rows(weight)
    _launch_conv(
        grad,
        rows,
        None,
        gate,
        None,
        inverse,
        pixel_index,
        pixel_count,
        grad_input,
        shape=(groups * channels, filters, kernel_height, kernel_width),
        groups=groups,
        transposed=True,
        k_contiguous=k_contiguous,
        allow_tf32=allow_tf32,
        **geometry,
    )


def gate_grad(
    input,
    weight,
    bias,
    grad,
    index,
    count,
    lookup,
    *,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    groups,
    allow_tf32,
):
    """[N*Ho*Wo], fp32 (fp64 for fp64): sum over channels of grad * (conv2d + bias) at active sites, 0 elsewhere.

    index has an entry for each of the N*Ho*Wo sites. input and grad are dense or packed each, as in forward.
    """
    geometry = dict(input_size=input_size, site_size=site_size, stride=stride, padding=padding, dilation=dilation)
    if _is_depthwise(weight, groups):
        return depthwise.gate_grad(input, weight, bias, grad, index, count, lookup, **geometry)
    filters = weight.shape[0] // groups
    with on_device(input):
        block_n = config(arithmetic(input.dtype, allow_tf32), weight.shape[1], filters, architecture())["BLOCK_N"]
    tiles = max(1, groups * triton.cdiv(filters, block_n))
    partial = torch.zeros((tiles, index.numel()), dtype=partial_dtype(input.dtype), device=input.device)
    _launch_conv(
        input,
        channels_last_rows(weight),
        bias,
        None,
        None,
        lookup,
        index,
        count,
        partial,
        shape=weight.shape,
        groups=groups,
        grad=grad,
        allow_tf32=allow_tf32,
        **geometry,
    )
    return partial[0] if tiles == 1 else partial.sum(0)


def weight_grad(
    input,
    grad,
    index,
    count,
    gate,
    lookup,
    weight,
    *,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    groups,
    allow_tf32,
):
    """Like weight (only its shape and layout are used): sum over active s of gate[s] * grad[s] x input[p(s, tap)].

    input and grad are dense or packed each, as in forward. The active rows are split between programs; how many splits
    depends on the shapes alone. Partial sums are fp32 (fp64 for fp64) and are added in a fixed order.
    """
    if _is_depthwise(weight, groups):
        geometry = dict(input_size=input_size, site_size=site_size, stride=stride, padding=padding, dilation=dilation)
        return depthwise.weight_grad(input, grad, index, count, gate, lookup, weight, **geometry)
    total_filters, channels, kernel_height, kernel_width = weight.shape
    filters = total_filters // groups
    capacity = rows_capacity(index, grad)
    grad_weight = torch.empty_like(weight)
    size = grad_weight.numel()
    if capacity == 0 or size == 0:
        return grad_weight.zero_()
    with on_device(input):
        kind = arithmetic(input.dtype, allow_tf32)
        tile = weight_grad_config(kind, channels, filters, architecture(), packed=is_packed(input))
        tiles = triton.cdiv(filters, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_N"])
        tiles *= kernel_height * kernel_width * groups
        splits = weight_grad_splits(tiles, capacity, tile, input.device)
        partial = torch.empty((splits, size), dtype=partial_dtype(input.dtype), device=grad.device)
        _weight_grad_kernel[(tiles * splits,)](
            input,
            grad,
            gate,
            lookup if is_packed(input) else None,
            index,
            count,
            partial,
            *input_size,
            *divisor(site_size[0]),
            *divisor(site_size[1]),
            groups,
            channels // unit(channels),
            filters // unit(filters),
            splits,
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            CHANNEL_UNIT=unit(channels),
            FILTER_UNIT=unit(filters),
            PACKED_SITES=is_packed(grad),
            # wgmma waits for itself where its A comes from registers, as what has been multiplied does.
            GATES_SOURCE=architecture() == "sm_90" and kind in ("half", "tf32") and tile["BLOCK_M"] >= 64,
            # Of TF32 the compiler would keep more loads in flight than there are registers (sm_100), and gfx942 has too
            # few scalar ones.
            EVEN=kind == "half"
            and architecture() != "gfx942"
            and filters % tile["BLOCK_M"] == 0
            and channels % tile["BLOCK_N"] == 0,
            ACCUMULATOR=accumulator(input.dtype),
            PRECISION=PRECISION[kind],
            **tile,
        )
        _reduce_weight_grad_kernel[(triton.cdiv(size, REDUCE_BLOCK),)](
            partial,
            grad_weight,
            splits,
            channels,
            size,
            *grad_weight.stride(),
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            BLOCK=REDUCE_BLOCK,
        )
    return grad_weight


def bias_grad(grad, index, count, gate):
    """[Cout] of grad's dtype: sum over active s of gate[s] * grad[s], added in a fixed order; grad dense or packed."""
    filters = grad.shape[1]
    capacity = rows_capacity(index, grad)
    if capacity == 0 or filters == 0:
        return torch.zeros(filters, dtype=grad.dtype, device=grad.device)
    block_n = bucket(filters, (16, 64))
    block_k = BIAS_GRAD_TILE // block_n
    splits = min(BIAS_GRAD_SPLITS, triton.cdiv(capacity, block_k))
    partial = torch.empty((splits, filters), dtype=partial_dtype(grad.dtype), device=grad.device)
    with on_device(grad):
        _bias_grad_kernel[(splits * triton.cdiv(filters, block_n),)](
            grad,
            gate,
            index,
            count,
            partial,
            filters // unit(filters),
            splits,
            FILTER_UNIT=unit(filters),
            PACKED_SITES=is_packed(grad),
            ACCUMULATOR=accumulator(grad.dtype),
            BLOCK_K=block_k,
            BLOCK_N=block_n,
        )
    return partial.sum(0).to(grad.dtype)


def _launch_conv(
    source,
    weight,
    bias,
    gate,
    residual,
    lookup,
    index,
    count,
    out,
    *,
    shape,
    groups,
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    allow_tf32,
    activation="none",
    grad=None,
    transposed=False,
    k_contiguous=True,
):
    """Launches the implicit GEMM. shape is (N of all groups, K of a tap, kH, kW), and input_size and site_size those
    of source and out, as the GEMM sees them.
    """
    total_filters, channels, kernel_height, kernel_width = shape
    filters = total_filters // groups
    result = out if grad is None else grad
    rows = rows_written(index, out) if grad is None else index.numel()
    capacity = rows if grad is None else rows_capacity(index, grad)
    if capacity == 0 or filters == 0:
        return
    with on_device(source):
        kind = arithmetic(source.dtype, allow_tf32)
        finished = residual is not None or activation != "none" or (grad is not None and is_packed(source))
        parallel = multiprocessors(source.device)
        large = triton.cdiv(capacity, LARGE_ROWS) * triton.cdiv(filters, 128) * groups >= LARGE_WAVES * parallel
        tile = config(kind, channels, filters, architecture(), packed=is_packed(source), finished=finished, large=large)
        block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
        tiles = triton.cdiv(capacity, block_m) * triton.cdiv(filters, block_n) * groups
        splits, shared, partial = most_splits(kernel_height * kernel_width * channels, tiles, parallel), 0, None
        if splits > 1:
            shared = min(parallel, tiles * splits)
            partial = torch.empty((shared, block_m, block_n), dtype=partial_dtype(source.dtype), device=source.device)
        _masked_conv_kernel[(max(tiles, shared),)](
            source,
            weight,
            bias,
            gate,
            residual,
            lookup if transposed or is_packed(source) else None,
            index,
            count,
            grad,
            out,
            partial,
            splits,
            parallel,
            *input_size,
            *divisor(site_size[0]),
            *divisor(site_size[1]),
            rows,
            groups,
            channels // unit(channels),
            filters // unit(filters),
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            CHANNEL_UNIT=unit(channels),
            FILTER_UNIT=unit(filters),
            TRANSPOSED=transposed,
            PACKED_SOURCE=is_packed(source),
            PACKED_SITES=is_packed(result),
            WEIGHT_K_CONTIGUOUS=k_contiguous,
            # Without tensor cores the compiler would keep more loads in flight than there are registers.
            EVEN=kind in ("half", "tf32") and channels % tile["BLOCK_K"] == 0 and filters % tile["BLOCK_N"] == 0,
            AHEAD=reads_ahead(
                kind, tile, kernel_height * kernel_width, architecture(), gated=transposed and gate is not None
            ),
            ACTIVATION=activation,
            ACCUMULATOR=accumulator(source.dtype),
            PRECISION=PRECISION[kind],
            **tile,
        )
        if partial is None:
            return
        share = min(block_m, SPLIT_ELEMENTS // block_n)
        # Tiles that have splits have two at least.
        _add_splits_kernel[(shared // 2 * (block_m // share),)](
            partial,
            bias,
            None if transposed else gate,
            residual,
            index,
            count,
            grad,
            out,
            splits,
            parallel,
            index.numel(),
            groups,
            filters // unit(filters),
            FILTER_UNIT=unit(filters),
            PACKED_SITES=is_packed(result),
            ACTIVATION=activation,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            ROWS=share,
        )


def _is_depthwise(weight, groups):
    return 1 < groups == weight.shape[0] and weight.shape[1] == 1


def channels_last_rows(weight):
    """[Cout, kH, kW, Cin/groups] contiguous: 16-byte loads along Cin. A view if the weight is channels_last already."""
    return weight.permute(0, 2, 3, 1).contiguous()


def transposed_rows(weight, groups):
    """[groups, Cin/groups, kH, kW, Cout/groups] contiguous: 16-byte loads along Cout."""
    by_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return by_group.permute(0, 2, 3, 4, 1).contiguous()
