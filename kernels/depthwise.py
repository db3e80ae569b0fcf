"""Masked depthwise convolution (groups == Cin == Cout): a stencil over the active output sites, bound by memory.

Sites, pixels, dense and packed features and lookups are those of masked_conv.py, whose launchers come here; so are the
operands. There is no product of matrices to feed: a program holds BLOCK_M sites by one 128-byte line of channels, walks
the taps, and finds the neighbours that its sites share in L1.
"""

import torch
import triton
import triton.language as tl

from ._common import (
    accumulator,
    bucket,
    divisor,
    is_inside,
    is_packed,
    on_device,
    partial_dtype,
    rows_capacity,
    rows_written,
    split_rows,
    split_site,
    store_rows,
    undo_stride,
    unit,
    warps,
    zero_rows,
)

THREADS = 128
# What a program loads for a tap: two 16-byte loads for each thread. Few registers for each thread, so that many
# programs fit an SM, hide a chain of dependent loads better than many loads of one thread.
TILE_BYTES = 4096
# Rows that do not start on 16 bytes are loaded element by element, each with an address in a register.
UNALIGNED_ELEMENTS = 256
# Programs that wgrad wants in flight, the fewest steps that are worth a split, and the most taps a program takes: all
# nine of a 3 x 3 kernel, so that grad is read once.
WEIGHT_GRAD_PROGRAMS = 1024
WEIGHT_GRAD_STEPS = 8
WEIGHT_GRAD_TAPS = 16

_VARIES = ["source_height", "source_width", "site_height", "height_multiplier", "height_shift"]
_VARIES += ["site_width", "width_multiplier", "width_shift", "pad_top", "pad_left"]
_VARIES += ["dilation_h", "dilation_w", "splits", "sites", "channel_units"]


def config(dtype, channels):
    """Tile: BLOCK_C channels, at most one 128-byte line of a row, by BLOCK_M sites.

    The same for every architecture: what it is made of, 16-byte loads and 128-byte lines, is too.
    """
    block_c, elements = _line(dtype, channels)
    return dict(BLOCK_M=elements // block_c, BLOCK_C=block_c, num_warps=warps(THREADS))


def weight_grad_config(dtype, channels, taps):
    """Tile of wgrad: BLOCK_T taps, BLOCK_K active rows a step, BLOCK_C channels."""
    block_c, elements = _line(dtype, channels)
    block_t = min(WEIGHT_GRAD_TAPS, triton.next_power_of_2(taps))
    # Twice the tile of the forward: up to half of its taps are there to fill a power of two.
    block_k = max(2, 2 * elements // (block_t * block_c))
    return dict(BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_C=block_c, num_warps=warps(THREADS))


def _line(dtype, channels):
    block_c = min(128 // dtype.itemsize, bucket(channels, (16, 32, 64)))
    elements = TILE_BYTES // dtype.itemsize
    if dtype == torch.float64:
        elements //= 2  # with more, ptxas spills for sm_89
    if unit(channels) * dtype.itemsize < 16:
        elements = min(elements, UNALIGNED_ELEMENTS)
    return block_c, elements


@triton.jit(do_not_specialize=_VARIES)
def _depthwise_conv_kernel(
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
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED_SOURCE: tl.constexpr,
    PACKED_SITES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stencil over the rows listed in index[:count], channel by channel.

    conv        = sum over tap of source[p(s, tap), c] * weight[tap, c] + bias[c]
    forward     out[s, c] = activation(gate[s] * conv + residual[s, c])
    grad given  out[tile, s] = sum over c in the tile of grad[s, c] * conv
    TRANSPOSED  out[p, c] = sum over tap of gate[s] * source[s, c] * weight[tap, c], s = s(p, tap) active

    source [source rows, channels], out, residual and grad [site rows, channels] (out [tiles of C, sites] for a grad),
    weight [taps, channels], gate [rows of the convolution's output]. lookup int32 [source rows] names the row of a
    PACKED_SOURCE, and the active sites to TRANSPOSED. With PACKED_SITES the m-th listed site is row m of out, residual
    and grad, and out's rows past count become zeros. `sites` counts out's rows.
    Skips sites not listed, taps that fall outside the source, and sources that lookup does not have.
    """
    UNROLL: tl.constexpr = KERNEL_WIDTH if KERNEL_WIDTH <= 3 else 4
    # A product with a constant shows the compiler what divides the row length, hence how wide a load may be.
    channels = channel_units * CHANNEL_UNIT
    # The tiles of C of the same sites are neighbours in launch order: they share index and lookup in L2.
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tile_c = tl.program_id(0) % tiles_c
    rows = tl.load(count)
    start = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M
    if PACKED_SITES and grad is None:  # noqa: SIM102 (decided at compile time, and the other is not)
        if start + BLOCK_M > rows:
            c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
            zero_rows(out, start + tl.arange(0, BLOCK_M), rows, sites, c, c < channels, channels)
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
    sample_row = sample * source_height
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels

    total = tl.zeros([BLOCK_M, BLOCK_C], ACCUMULATOR)
    for tap_row in range(0, KERNEL_HEIGHT):
        for first_column in range(0, KERNEL_WIDTH, UNROLL):
            # Unrolled taps do not wait for one another; a long row of them would not find registers.
            for step in tl.static_range(UNROLL):
                column = first_column + step
                tap_y = tap_row * dilation_h
                tap_x = column * dilation_w
                if TRANSPOSED:
                    source_y, source_x, valid = undo_stride(y - tap_y, x - tap_x, STRIDE_H, STRIDE_W)
                    valid &= listed
                else:
                    source_y = y + tap_y
                    source_x = x + tap_x
                    valid = listed
                valid &= is_inside(source_y, source_x, source_height, source_width)
                weight_inside = c_inside
                if KERNEL_WIDTH % UNROLL != 0:
                    valid &= column < KERNEL_WIDTH
                    weight_inside = c_inside & (column < KERNEL_WIDTH)
                pixel = (sample_row + source_y) * source_width + source_x
                source_row = pixel
                if lookup is not None:
                    packed_row = tl.load(lookup + pixel, mask=valid, other=-1)
                    valid = packed_row >= 0
                    if PACKED_SOURCE:
                        source_row = packed_row
                offset = source_row.to(tl.int64)[:, None] * channels + c[None, :]
                a = tl.load(source + offset, mask=valid[:, None] & c_inside[None, :], other=0.0).to(ACCUMULATOR)
                if TRANSPOSED and gate is not None:
                    a *= tl.load(gate + pixel, mask=valid, other=0.0).to(ACCUMULATOR)[:, None]
                tap = tap_row * KERNEL_WIDTH + column
                b = tl.load(weight + tap * channels + c, mask=weight_inside, other=0.0).to(ACCUMULATOR)
                total += a * b[None, :]

    if bias is not None:
        total += tl.load(bias + c, mask=c_inside, other=0.0).to(ACCUMULATOR)[None, :]
    if PACKED_SITES:
        out_row = row
    else:
        out_row = site.to(tl.int64)
    inside = listed[:, None] & c_inside[None, :]
    offset = out_row[:, None] * channels + c[None, :]
    if grad is not None:
        dual = tl.load(grad + offset, mask=inside, other=0.0).to(ACCUMULATOR)
        tl.store(out + tile_c.to(tl.int64) * sites + site, tl.sum(total * dual, axis=1), mask=listed)
    elif TRANSPOSED:
        tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)
    else:
        store_rows(total, gate, residual, out, site, offset, listed, inside, ACTIVATION)


@triton.jit(do_not_specialize=_VARIES)
def _depthwise_weight_grad_kernel(
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
    channel_units,
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
    PACKED_SITES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[split, tap, c] = sum over s in the split of gate[s] * grad[s, c] * source[p(s, tap), c].

    source [source rows, channels], grad [site rows, channels], partial [splits, taps, channels]. lookup, if given,
    names the rows of a packed source; with PACKED_SITES the m-th listed site is row m of grad.
    Split i takes the i-th equal share of index[:count]: which rows meet in a sum depends on count alone.
    Skips inactive sites; taps outside the source, and sources that lookup does not have, contribute zeros.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    channels = channel_units * CHANNEL_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tile // tiles_c
    tap = tile % tl.cdiv(TAPS, BLOCK_T) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tile // tl.cdiv(TAPS, BLOCK_T)
    begin, end = split_rows(split, splits, tl.load(count), BLOCK_K)

    tap_y = (tap // KERNEL_WIDTH * dilation_h - pad_top)[:, None]
    tap_x = (tap % KERNEL_WIDTH * dilation_w - pad_left)[:, None]
    tap_inside = (tap < TAPS)[:, None]
    c_inside = c < channels
    # A sum for each row of a step: they meet once, after the loop.
    total = tl.zeros([BLOCK_T, BLOCK_K, BLOCK_C], ACCUMULATOR)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        listed = row < end
        site = tl.load(index + row, mask=listed, other=0)
        sample, y, x = split_site(
            site, site_height, height_multiplier, height_shift, site_width, width_multiplier, width_shift
        )
        y = (y * STRIDE_H)[None, :] + tap_y
        x = (x * STRIDE_W)[None, :] + tap_x
        valid = listed[None, :] & tap_inside & is_inside(y, x, source_height, source_width)
        source_row = ((sample * source_height)[None, :] + y) * source_width + x
        if lookup is not None:
            source_row = tl.load(lookup + source_row, mask=valid, other=-1)
            valid = source_row >= 0
        offset = source_row.to(tl.int64)[:, :, None] * channels + c[None, None, :]
        a = tl.load(source + offset, mask=valid[:, :, None] & c_inside[None, None, :], other=0.0)
        if PACKED_SITES:
            grad_row = row
        else:
            grad_row = site
        offset = grad_row.to(tl.int64)[:, None] * channels + c[None, :]
        dual = tl.load(grad + offset, mask=listed[:, None] & c_inside[None, :], other=0.0).to(ACCUMULATOR)
        if gate is not None:
            dual *= tl.load(gate + site, mask=listed, other=0.0).to(ACCUMULATOR)[:, None]
        total += a.to(ACCUMULATOR) * dual[None, :, :]

    offset = (split.to(tl.int64) * TAPS + tap)[:, None] * channels + c[None, :]
    tl.store(partial + offset, tl.sum(total, axis=1), mask=tap_inside & c_inside[None, :])


def forward(input, weight, bias, index, count, gate, residual, lookup, out, *, activation, **geometry):
    """masked_conv.forward where groups == Cin == Cout."""
    _launch(input, weight, bias, gate, residual, lookup, index, count, out, activation=activation, **geometry)


def input_grad(grad, weight, inverse, pixel_index, pixel_count, gate, grad_input, **geometry):
    """masked_conv.input_grad where groups == Cin == Cout, with input_size and site_size as the stencil sees them."""
    _launch(grad, weight, None, gate, None, inverse, pixel_index, pixel_count, grad_input, transposed=True, **geometry)


def gate_grad(input, weight, bias, grad, index, count, lookup, **geometry):
    """masked_conv.gate_grad where groups == Cin == Cout."""
    with on_device(input):
        tiles = max(1, triton.cdiv(len(weight), config(input.dtype, len(weight))["BLOCK_C"]))
    partial = torch.zeros((tiles, index.numel()), dtype=partial_dtype(input.dtype), device=input.device)
    _launch(input, weight, bias, None, None, lookup, index, count, partial, grad=grad, **geometry)
    return partial[0] if tiles == 1 else partial.sum(0)


def weight_grad(input, grad, index, count, gate, lookup, weight, *, input_size, site_size, stride, padding, dilation):
    """masked_conv.weight_grad where groups == Cin == Cout."""
    channels, _, kernel_height, kernel_width = weight.shape
    taps = kernel_height * kernel_width
    capacity = rows_capacity(index, grad)
    grad_weight = torch.empty_like(weight)
    if capacity == 0:
        return grad_weight.zero_()
    with on_device(input):
        tile = weight_grad_config(input.dtype, channels, taps)
        tiles = triton.cdiv(channels, tile["BLOCK_C"]) * triton.cdiv(taps, tile["BLOCK_T"])
        splits = min(
            triton.cdiv(WEIGHT_GRAD_PROGRAMS, tiles), triton.cdiv(capacity, tile["BLOCK_K"] * WEIGHT_GRAD_STEPS)
        )
        shape = (splits, kernel_height, kernel_width, 1, channels)
        partial = torch.empty(shape, dtype=partial_dtype(input.dtype), device=grad.device)
        _depthwise_weight_grad_kernel[(tiles * splits,)](
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
            channels // unit(channels),
            splits,
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            CHANNEL_UNIT=unit(channels),
            PACKED_SITES=is_packed(grad),
            ACCUMULATOR=accumulator(input.dtype),
            **tile,
        )
    # Many splits of a small weight: PyTorch adds them in parallel, and in a fixed order.
    return grad_weight.copy_(partial.sum(0).permute(3, 2, 0, 1))


def _launch(
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
    input_size,
    site_size,
    stride,
    padding,
    dilation,
    activation="none",
    grad=None,
    transposed=False,
):
    """Launches the stencil; input_size and site_size are those of source and out, as it sees them."""
    channels, _, kernel_height, kernel_width = weight.shape
    result = out if grad is None else grad
    rows = rows_written(index, out) if grad is None else index.numel()
    capacity = rows if grad is None else rows_capacity(index, grad)
    if capacity == 0:
        return
    # [taps, channels]: a tap's weights are 16-byte loads along the channels, as the source is. Read in place they would
    # be eight loads each, more than those of the source; the copy is a few kilobytes.
    weight = weight.reshape(channels, kernel_height * kernel_width).t().contiguous()
    with on_device(source):
        tile = config(source.dtype, channels)
        programs = triton.cdiv(capacity, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_C"])
        _depthwise_conv_kernel[(programs,)](
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
            *input_size,
            *divisor(site_size[0]),
            *divisor(site_size[1]),
            rows,
            channels // unit(channels),
            *padding,
            *dilation,
            KERNEL_HEIGHT=kernel_height,
            KERNEL_WIDTH=kernel_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            CHANNEL_UNIT=unit(channels),
            TRANSPOSED=transposed,
            PACKED_SOURCE=is_packed(source),
            PACKED_SITES=is_packed(result),
            ACTIVATION=activation,
            ACCUMULATOR=accumulator(source.dtype),
            **tile,
        )
