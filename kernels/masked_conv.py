"""Masked convolution (groups == 1) as an implicit GEMM over the active output sites.

Sites and pixels are flat: s = (n*Ho + oy)*Wo + ox, p = (n*H + iy)*W + ix, with iy = oy*stride - pad + kh*dilation.
Features are NHWC: row s (or p) of a [rows, channels] matrix, whose address is computed from the row number and
never from the tensor's strides. `index[:count]` lists the active sites in ascending order; what lies past count
is never used. Everything stays on the device: grids cover the capacity, and programs past count return at once.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    accumulator,
    architecture,
    arithmetic,
    bucket,
    divisor,
    is_inside,
    on_device,
    split_site,
    undo_stride,
    unit,
)

# Taps whose validity one int32 word per row holds.
TAP_GROUP = tl.constexpr(32)

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
    "sm_90": _AMPERE_WGRAD | {("half", 128): (128, 128, 64, 8, 5)},
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

# Programs that wgrad wants in flight, and the fewest K steps that are worth a split.
WEIGHT_GRAD_PROGRAMS = 512
WEIGHT_GRAD_STEPS = 8
BIAS_GRAD_SPLITS = 256
BIAS_GRAD_TILE = 2048  # elements of grad a program adds up at a time
REDUCE_BLOCK = 1024

# `input_precision` of tl.dot; it says nothing of fp16, bf16 and fp64.
PRECISION = {"half": "ieee", "tf32": "tf32", "ieee": "ieee", "double": "ieee"}

_VARIES = ["source_height", "source_width", "site_height", "height_multiplier", "height_shift"]
_VARIES += ["site_width", "width_multiplier", "width_shift", "pad_top", "pad_left"]
_VARIES += ["dilation_h", "dilation_w", "splits", "sites", "channel_units", "filter_units"]


def config(kind, channels, filters, arch):
    """Tile of the implicit GEMM for `channels` summed per tap and `filters` columns.

    kind is the class of arithmetic ("half", "tf32", "ieee", "double"), arch a row of CONV_TILES.
    """
    tile = _tile(CONV_TILES[arch], kind, filters, _is_aligned(kind, channels))
    # Channels past those of the tap are multiplied by zero: a tap of 16 takes steps of 16.
    tile["BLOCK_K"] = min(tile["BLOCK_K"], bucket(channels, (16, 32, 64)))
    return tile


def weight_grad_config(kind, channels, filters, arch):
    """Tile of wgrad: BLOCK_M of Cout (`filters`) by BLOCK_N of Cin (`channels`), BLOCK_K active rows a step."""
    is_aligned = _is_aligned(kind, channels) and _is_aligned(kind, filters)
    return _tile(WEIGHT_GRAD_TILES[arch], kind, min(channels, filters), is_aligned)


def _is_aligned(kind, channels):
    """Whether every row of that many channels starts on 16 bytes."""
    return unit(channels) * {"half": 2, "tf32": 4, "ieee": 4, "double": 8}[kind] >= 16


def _tile(table, kind, width, is_aligned):
    # Rows that do not start on 16 bytes are loaded in pieces, each with an address in a register: the largest tiles
    # would spill.
    widths = [size for name, size in table if name == kind and (is_aligned or size <= 64)]
    block_m, block_n, block_k, num_warps, num_stages = table[kind, bucket(width, widths)]
    if not is_aligned:
        block_k = min(block_k, 16)
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages)


@triton.jit(do_not_specialize=_VARIES)
def _masked_conv_kernel(
    source,
    weight,
    bias,
    gate,
    index,
    count,
    inverse,
    grad,
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
    WEIGHT_K_CONTIGUOUS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Implicit GEMM over the rows listed in index[:count]: M = sites, K = taps x channels, N = filters.

    forward     out[s, n] = gate[s] * (sum over tap, k of source[p(s, tap), k] * weight[tap, k, n] + bias[n])
    TRANSPOSED  out[p, n] = sum over tap, k of gate[s] * source[s, k] * weight[tap, k, n], s = s(p, tap) active
    grad given  out[tile, s] = sum over n in the tile of grad[s, n] * (the forward's sum + bias[n])

    source [source rows, channels], out [site rows, filters] (or [tiles of N, sites]),
    weight [filters, taps, channels] if WEIGHT_K_CONTIGUOUS, else [channels, taps, filters], inverse int32 [source rows]
    (TRANSPOSED only), gate [rows of the convolution's output].
    Skips sites not listed, taps that fall outside the source and, if TRANSPOSED, sources that are not active.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    # A product with a constant shows the compiler what divides the row length, hence how wide a load may be.
    channels = channel_units * CHANNEL_UNIT
    filters = filter_units * FILTER_UNIT
    # The tiles of N of the same sites are neighbours in launch order: they share the gathered rows in L2.
    tiles_n = tl.cdiv(filters, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    rows = tl.load(count)
    start = tile_m.to(tl.int64) * BLOCK_M
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
    first_pointer = source + first_row.to(tl.int64) * channels

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if WEIGHT_K_CONTIGUOUS:
        weight_pointer = weight + n.to(tl.int64)[None, :] * (TAPS * channels) + k[:, None]
    else:
        weight_pointer = weight + k.to(tl.int64)[:, None] * (TAPS * filters) + n[None, :]
    n_inside = n[None, :] < filters

    total = tl.zeros([BLOCK_M, BLOCK_N], ACCUMULATOR)
    for first_tap in range(0, TAPS, TAP_GROUP):
        # Which taps a row has is the same for every block of channels, so it is found once, ahead of the
        # pipelined loop: a bit per tap. In dgrad this also keeps a dependent load out of that loop.
        has_tap = tl.zeros([BLOCK_M], tl.int32)
        for bit in tl.static_range(TAPS if TAPS < TAP_GROUP else TAP_GROUP):
            tap = first_tap + bit
            tap_y = tap // KERNEL_WIDTH * dilation_h
            tap_x = tap % KERNEL_WIDTH * dilation_w
            if TRANSPOSED:
                source_y, source_x, valid = undo_stride(y - tap_y, x - tap_x, STRIDE_H, STRIDE_W)
                valid &= is_inside(source_y, source_x, source_height, source_width) & listed & (tap < TAPS)
                source_row = (sample_row + source_y) * source_width + source_x
                valid = tl.load(inverse + source_row, mask=valid, other=-1) >= 0
            else:
                valid = is_inside(y + tap_y, x + tap_x, source_height, source_width) & listed & (tap < TAPS)
            has_tap |= valid.to(tl.int32) << bit

        bit = 0
        channel = 0
        steps = tl.minimum(TAPS - first_tap, TAP_GROUP) * tl.cdiv(channels, BLOCK_K)
        for _ in range(0, steps):
            tap = first_tap + bit
            tap_y = tap // KERNEL_WIDTH * dilation_h
            tap_x = tap % KERNEL_WIDTH * dilation_w
            valid = ((has_tap >> bit) & 1) != 0
            k_inside = channel + k < channels
            if LINEAR:
                shift = tap_y * source_width + tap_x
                if TRANSPOSED:
                    shift = -shift
                a_pointer = first_pointer + (shift.to(tl.int64) * channels + channel)
            else:
                source_row = (sample_row + (y - tap_y) // STRIDE_H) * source_width + (x - tap_x) // STRIDE_W
                a_pointer = source + source_row.to(tl.int64) * channels + channel
            a = tl.load(a_pointer[:, None] + k[None, :], mask=valid[:, None] & k_inside[None, :], other=0.0)
            if TRANSPOSED and gate is not None:
                if LINEAR:
                    source_row = first_row + shift
                scale = tl.load(gate + source_row, mask=valid, other=0.0).to(ACCUMULATOR)
                a = (a.to(ACCUMULATOR) * scale[:, None]).to(source.dtype.element_ty)
            if WEIGHT_K_CONTIGUOUS:
                b_offset = tap.to(tl.int64) * channels + channel
            else:
                b_offset = (channel.to(tl.int64) * TAPS + tap) * filters
            b = tl.load(weight_pointer + b_offset, mask=k_inside[:, None] & n_inside, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            channel += BLOCK_K
            bit += (channel >= channels).to(tl.int32)
            channel = tl.where(channel >= channels, 0, channel)

    if bias is not None:
        total += tl.load(bias + n, mask=n < filters, other=0.0).to(ACCUMULATOR)[None, :]
    out_mask = listed[:, None] & n_inside
    out_offset = site.to(tl.int64)[:, None] * filters + n[None, :]
    if grad is not None:
        dual = tl.load(grad + out_offset, mask=out_mask, other=0.0).to(ACCUMULATOR)
        # Columns past `filters` are an input times zero, which is not zero where the input is infinite.
        share = tl.sum(tl.where(n_inside, total * dual, 0.0), axis=1)
        tl.store(out + tile_n.to(tl.int64) * sites + site, share, mask=listed)
    else:
        if gate is not None and not TRANSPOSED:
            total *= tl.load(gate + site, mask=listed, other=0.0).to(ACCUMULATOR)[:, None]
        tl.store(out + out_offset, total.to(out.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=_VARIES)
def _weight_grad_kernel(
    source,
    grad,
    gate,
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
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, m, tap, n] = sum over s in the split of gate[s] * grad[s, m] * source[p(s, tap), n].

    source [N*H*W, channels], grad [N*Ho*Wo, filters], partial [splits, filters, taps, channels].
    Split i takes the i-th equal share of index[:count]: which rows meet in a sum depends on count alone.
    Skips inactive sites; taps outside the source contribute zeros.
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
    split = tile // tiles_m

    rows = tl.load(count)
    share = tl.cdiv(tl.cdiv(rows, splits), BLOCK_K) * BLOCK_K
    begin = tl.minimum(split.to(tl.int64) * share, rows).to(tl.int32)
    end = tl.minimum(split.to(tl.int64) * share + share, rows).to(tl.int32)

    tap_y = tap // KERNEL_WIDTH * dilation_h - pad_top
    tap_x = tap % KERNEL_WIDTH * dilation_w - pad_left
    m_inside = m[None, :] < filters
    n_inside = n[None, :] < channels
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
        a_offset = site.to(tl.int64)[:, None] * filters + m[None, :]
        a = tl.load(grad + a_offset, mask=listed[:, None] & m_inside, other=0.0)
        if gate is not None:
            scale = tl.load(gate + site, mask=listed, other=0.0).to(ACCUMULATOR)
            a = (a.to(ACCUMULATOR) * scale[:, None]).to(grad.dtype.element_ty)
        b_offset = source_row.to(tl.int64)[:, None] * channels + n[None, :]
        b = tl.load(source + b_offset, mask=valid[:, None] & n_inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    first = ((split.to(tl.int64) * filters + m) * TAPS + tap) * channels
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
    ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial[split, n] = sum over s in the split of gate[s] * grad[s, n], with the splits of wgrad."""
    filters = filter_units * FILTER_UNIT
    tiles_n = tl.cdiv(filters, BLOCK_N)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = (tl.program_id(0) // tiles_n).to(tl.int64)
    rows = tl.load(count)
    share = tl.cdiv(tl.cdiv(rows, splits), BLOCK_K) * BLOCK_K
    begin = tl.minimum(split * share, rows).to(tl.int32)
    end = tl.minimum(split * share + share, rows).to(tl.int32)
    total = tl.zeros([BLOCK_K, BLOCK_N], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        listed = row < end
        site = tl.load(index + row, mask=listed, other=0)
        offset = site.to(tl.int64)[:, None] * filters + n[None, :]
        tile = tl.load(grad + offset, mask=listed[:, None] & (n[None, :] < filters), other=0.0).to(ACCUMULATOR)
        if gate is not None:
            tile *= tl.load(gate + site, mask=listed, other=0.0).to(ACCUMULATOR)[:, None]
        total += tile
    tl.store(partial + split * filters + n, tl.sum(total, axis=0), mask=n < filters)


def forward(input, weight, bias, index, count, gate, out, *, stride, padding, dilation, allow_tf32):
    """out[s] = gate[s] * (conv2d(input, weight)[s] + bias) at the active sites; the rest of out is left alone.

    input [N, Cin, H, W] and out [N, Cout, Ho, Wo] are channels_last-contiguous. weight [Cout, Cin, kH, kW] is read in
    place if it is channels_last, and copied into that layout if not. padding is (top, left).
    """
    _launch_conv(
        input,
        _channels_last_rows(weight),
        bias,
        gate,
        index,
        count,
        out,
        shape=weight.shape,
        site_size=out.shape[2:],
        geometry=(stride, padding, dilation),
        allow_tf32=allow_tf32,
    )


def input_grad(
    grad,
    weight,
    inverse,
    touched_index,
    touched_count,
    gate,
    grad_input,
    *,
    stride,
    padding,
    dilation,
    allow_tf32,
):
    """grad_input[p] = sum of gate[s] * grad[s] @ weight[tap] over the active sites s that read p.

    inverse is the inverse map of the active output sites; touched_index[:touched_count] lists the pixels to compute,
    and the rest of grad_input is left alone: it comes filled with zeros.
    """
    filters, channels, kernel_height, kernel_width = weight.shape
    # 16-bit tensor cores take B contiguous along N as well: the forward's layout, [Cout, taps, Cin], serves.
    # wgmma takes TF32 operands contiguous along K only: the weight becomes [Cin, taps, Cout].
    k_contiguous = weight.dtype not in (torch.float16, torch.bfloat16) or not _is_aligned("half", channels)
    _launch_conv(
        grad,
        weight.permute(1, 2, 3, 0).contiguous() if k_contiguous else _channels_last_rows(weight),
        None,
        gate,
        touched_index,
        touched_count,
        grad_input,
        shape=(channels, filters, kernel_height, kernel_width),
        site_size=grad_input.shape[2:],
        geometry=(stride, padding, dilation),
        allow_tf32=allow_tf32,
        inverse=inverse,
        k_contiguous=k_contiguous,
    )


def gate_grad(input, weight, bias, grad, index, count, *, stride, padding, dilation, allow_tf32):
    """[N*Ho*Wo], fp32 (fp64 for fp64): sum over channels of grad * (conv2d + bias) at active sites, 0 elsewhere."""
    filters = weight.shape[0]
    sites = grad.shape[0] * grad.shape[2] * grad.shape[3]
    with on_device(input):
        block_n = config(arithmetic(input.dtype, allow_tf32), weight.shape[1], filters, architecture())["BLOCK_N"]
    tiles = max(1, triton.cdiv(filters, block_n))
    partial = torch.zeros((tiles, sites), dtype=_partial_dtype(input), device=input.device)
    _launch_conv(
        input,
        _channels_last_rows(weight),
        bias,
        None,
        index,
        count,
        partial,
        shape=weight.shape,
        site_size=grad.shape[2:],
        geometry=(stride, padding, dilation),
        allow_tf32=allow_tf32,
        grad=grad,
    )
    return partial[0] if tiles == 1 else partial.sum(0)


def weight_grad(input, grad, index, count, gate, weight, *, stride, padding, dilation, allow_tf32):
    """Like weight (only its shape and layout are used): sum over active s of gate[s] * grad[s] x input[p(s, tap)].

    The active rows are split between programs; how many splits depends on the shapes alone. Partial sums are fp32
    (fp64 for fp64) and are added in a fixed order.
    """
    filters, channels, kernel_height, kernel_width = weight.shape
    capacity = index.numel()
    grad_weight = torch.empty_like(weight)
    size = grad_weight.numel()
    if capacity == 0 or size == 0:
        return grad_weight.zero_()
    with on_device(input):
        kind = arithmetic(input.dtype, allow_tf32)
        tile = weight_grad_config(kind, channels, filters, architecture())
        tiles = triton.cdiv(filters, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_N"])
        tiles *= kernel_height * kernel_width
        splits = min(
            triton.cdiv(WEIGHT_GRAD_PROGRAMS, tiles), triton.cdiv(capacity, tile["BLOCK_K"] * WEIGHT_GRAD_STEPS)
        )
        partial = torch.empty((splits, size), dtype=_partial_dtype(input), device=grad.device)
        _weight_grad_kernel[(tiles * splits,)](
            input,
            grad,
            gate,
            index,
            count,
            partial,
            *input.shape[2:],
            *divisor(grad.shape[2]),
            *divisor(grad.shape[3]),
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
    """[Cout] of grad's dtype: sum over active s of gate[s] * grad[s], added in a fixed order."""
    filters = grad.shape[1]
    capacity = index.numel()
    if capacity == 0 or filters == 0:
        return torch.zeros(filters, dtype=grad.dtype, device=grad.device)
    block_n = bucket(filters, (16, 64))
    block_k = BIAS_GRAD_TILE // block_n
    splits = min(BIAS_GRAD_SPLITS, triton.cdiv(capacity, block_k))
    partial = torch.empty((splits, filters), dtype=_partial_dtype(grad), device=grad.device)
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
    index,
    count,
    out,
    *,
    shape,
    site_size,
    geometry,
    allow_tf32,
    inverse=None,
    grad=None,
    k_contiguous=True,
):
    """Launches the implicit GEMM. shape is (N, K of a tap, kH, kW) as the GEMM sees them; inverse makes it dgrad."""
    filters, channels, kernel_height, kernel_width = shape
    capacity = index.numel()
    if capacity == 0 or filters == 0:
        return
    (stride_h, stride_w), padding, dilation = geometry
    with on_device(source):
        kind = arithmetic(source.dtype, allow_tf32)
        tile = config(kind, channels, filters, architecture())
        programs = triton.cdiv(capacity, tile["BLOCK_M"]) * triton.cdiv(filters, tile["BLOCK_N"])
        _masked_conv_kernel[(programs,)](
            source,
            weight,
            bias,
            gate,
            index,
            count,
            inverse,
            grad,
            out,
            *source.shape[2:],
            *divisor(site_size[0]),
            *divisor(site_size[1]),
            capacity,
            channels // unit(channels),
            filters // unit(filters),
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride_h,
            STRIDE_W=stride_w,
            CHANNEL_UNIT=unit(channels),
            FILTER_UNIT=unit(filters),
            TRANSPOSED=inverse is not None,
            WEIGHT_K_CONTIGUOUS=k_contiguous,
            ACCUMULATOR=accumulator(source.dtype),
            PRECISION=PRECISION[kind],
            **tile,
        )


def _channels_last_rows(weight):
    """[Cout, kH, kW, Cin] contiguous: 16-byte loads along Cin. A view if the weight is channels_last already."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _partial_dtype(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
