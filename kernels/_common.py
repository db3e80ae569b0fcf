"""What every kernel family shares: the target it runs on, its arithmetic, and index arithmetic on a grid."""

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl

# Taps whose validity one int32 word per row holds.
TAP_GROUP = tl.constexpr(32)


def on_device(tensor):
    """Context in which a launch goes to the tensor's device (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def architecture():
    """Row of the config tables for the current device: "sm_80", "sm_90", "sm_100", "gfx942" or "default"."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no GPU: Triton's interpreter
        return "default"
    return architecture_of(target.backend, target.arch)


@functools.cache
def architecture_of(backend, arch):
    if backend == "cuda":
        # sm_86, 87, 89 and 12x have less shared memory than their family's first member: they take the default.
        return {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(arch, "default")
    return "gfx942" if str(arch).startswith("gfx942") else "default"


@functools.cache
def multiprocessors(device):
    """How many the device has; 132, an H100's, where it is no GPU: kernels are interpreted, or compiled for another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def warps(threads):
    """num_warps of that many threads on the current device: AMD's data-centre GPUs have 64 to a warp."""
    try:
        return threads // triton.runtime.driver.active.get_current_target().warp_size
    except RuntimeError:  # no GPU: Triton's interpreter
        return threads // 32


def accumulator(dtype):
    """Sums run in fp32 for fp16, bf16 and fp32, and in fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def partial_dtype(dtype):
    """What accumulator() names, as torch calls it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arithmetic(dtype, allow_tf32):
    """Class of the matrix product, the key of the config tables: "half", "tf32", "ieee" or "double"."""
    if dtype in (torch.float16, torch.bfloat16):
        return "half"
    if dtype == torch.float64:
        return "double"
    if dtype == torch.float32:
        return "tf32" if allow_tf32 and _has_tf32() else "ieee"
    raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


def _has_tf32():
    # On AMD only gfx942 takes "tf32"; the interpreter takes it and computes in fp32.
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        return True
    return target.backend == "cuda" or str(target.arch).startswith("gfx942")


def bucket(channels, buckets):
    """Smallest of the ascending `buckets` that holds `channels`, else the largest."""
    for size in buckets:
        if channels <= size:
            return size
    return buckets[-1]


def unit(channels):
    """Largest power of two up to 8 that divides `channels`: 8 half-precision channels are one 16-byte load.

    Triton itself looks no finer than divisibility by 16, which 24, 40 or 72 channels do not have.
    """
    return math.gcd(channels, 8)


def offset_type(*sizes):
    """The integer in which a kernel counts elements, of tensors with so many: 32 bits where they will do."""
    return tl.int32 if max(sizes) < 2**31 else tl.int64


def is_packed(features):
    """Features are [N, C, H, W] (dense) or [capacity, C] (packed)."""
    return features.dim() == 2


def rows_capacity(index, features):
    """How many rows a grid has to read: packed features have room for count rows, but maybe not for every site."""
    return min(index.numel(), features.shape[0]) if is_packed(features) else index.numel()


def rows_written(index, out):
    """How many rows a grid has to write: all of a packed output, whose rows past count become zeros."""
    return out.shape[0] if is_packed(out) else index.numel()


@functools.cache
def divisor(size):
    """(size, multiplier, shift) for split_site: n // size = (umulhi(n, multiplier) + n) >> shift, 0 <= n < 2**31.

    A kernel divides a vector of sites by sizes that it cannot know at compile time; the hardware has no integer
    division, and the compiler's stand-in was over half of the instructions in wgrad's inner loop.
    """
    shift = (size - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - size)) // size + 1
    # The kernel takes it as the 32 bits of an int32: beyond int32 Triton would pass 64 bits.
    return size, multiplier - (1 << 32) if multiplier >= 1 << 31 else multiplier, shift


@triton.jit
def divide(dividend, multiplier, shift):
    """dividend // size, exact for 0 <= dividend < 2**31; see divisor."""
    n = dividend.to(tl.uint32, bitcast=True)
    high = tl.umulhi(n, tl.zeros_like(n) + multiplier.to(tl.uint32, bitcast=True))
    return ((high + n) >> shift.to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def split_site(site, height, height_multiplier, height_shift, width, width_multiplier, width_shift):
    """Flat site -> (sample, y, x), each int32. height and width come with the constants of `divisor`."""
    row = divide(site, width_multiplier, width_shift)
    sample = divide(row, height_multiplier, height_shift)
    return sample, row - sample * height, site - row * width


@triton.jit
def is_inside(y, x, height, width):
    """0 <= y < height and 0 <= x < width, with one unsigned comparison for each axis."""
    return (y.to(tl.uint32, bitcast=True) < height) & (x.to(tl.uint32, bitcast=True) < width)


@triton.jit
def undo_stride(y, x, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """(y, x) / stride, and whether both divisions are exact."""
    if STRIDE_H == 1 and STRIDE_W == 1:
        exact = y == y
    else:
        exact = (y % STRIDE_H == 0) & (x % STRIDE_W == 0)
    return y // STRIDE_H, x // STRIDE_W, exact


@triton.jit
def find_taps(
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
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """int32 [M], bit i set where tap first_tap + i of the listed site (y, x) finds a source pixel, for TAP_GROUP taps.

    y and x are those of tap (0, 0), a stride not yet undone where TRANSPOSED; sample_row is the source row on which
    the sample begins. lookup, if given, is not negative at the pixels that count.
    """
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    has_tap = tl.zeros(listed.shape, tl.int32)
    for bit in tl.static_range(TAPS if TAPS < TAP_GROUP else TAP_GROUP):
        tap = first_tap + bit
        tap_y = tap // KERNEL_WIDTH * dilation_h
        tap_x = tap % KERNEL_WIDTH * dilation_w
        if TRANSPOSED:
            source_y, source_x, valid = undo_stride(y - tap_y, x - tap_x, STRIDE_H, STRIDE_W)
            valid &= is_inside(source_y, source_x, source_height, source_width) & listed & (tap < TAPS)
            if lookup is not None:
                source_row = (sample_row + source_y) * source_width + source_x
                valid = tl.load(lookup + source_row, mask=valid, other=-1) >= 0
        else:
            valid = is_inside(y + tap_y, x + tap_x, source_height, source_width) & listed & (tap < TAPS)
        has_tap |= valid.to(tl.int32) << bit
    return has_tap


@triton.jit
def split_step(step, taps, TAPS: tl.constexpr):
    """(block of channels, bit of the tap) of a product's step, of which `taps` of TAPS follow each other."""
    if TAPS <= TAP_GROUP:  # all of them: the compiler divides by a constant
        block = step // TAPS
        bit = step % TAPS
    else:
        block = step // taps
        bit = step - block * taps
    return block, bit


@triton.jit
def split_steps(split, splits, steps):
    """(begin, end) of the split-th of shares of a product's steps that differ by one at most."""
    return split * steps // splits, (split + 1) * steps // splits


@triton.jit
def zero_rows(out, row, active, rows, column, inside, columns):
    """Zeros in out [rows, columns] at rows of a vector, int64, from `active` on, in the columns that are inside."""
    unlisted = (row >= active) & (row < rows)
    zeros = tl.zeros([row.shape[0], column.shape[0]], out.dtype.element_ty)
    tl.store(out + row[:, None] * columns + column[None, :], zeros, mask=unlisted[:, None] & inside[None, :])


@triton.jit
def split_rows(split, splits, rows, BLOCK: tl.constexpr):
    """(begin, end) of the split-th equal share of `rows`, in whole blocks: it depends on rows and splits alone."""
    share = tl.cdiv(tl.cdiv(rows, splits), BLOCK) * BLOCK
    begin = tl.minimum(split.to(tl.int64) * share, rows).to(tl.int32)
    end = tl.minimum(split.to(tl.int64) * share + share, rows).to(tl.int32)
    return begin, end


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) with an exponential that cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """torch.nn.functional's function of that name, of x in the accumulator's type. NaN stays NaN, as it does there."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        x = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        x = x * tl.where(x < -3, 0.0, tl.where(x > 3, 6.0, x + 3)) / 6
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """Derivative of `activate` at x; PyTorch's choice of side where it jumps."""
    if ACTIVATION == "relu":
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        slope = tl.where((x <= 0) | (x >= 6), 0.0, 1.0)
    elif ACTIVATION == "silu":
        share = sigmoid(x)
        slope = share * (1 + x * (1 - share))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "hardswish":
        slope = tl.where(x <= -3, 0.0, tl.where(x < 3, x / 3 + 0.5, 1.0))
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        slope = tl.full(x.shape, 1.0, x.dtype)
    return slope.to(x.dtype)


@triton.jit
def store_rows(total, gate, residual, out, site, offset, listed, inside, ACTIVATION: tl.constexpr):
    """out[offset] = activation(gate[site] * total + residual[offset]): the end of every forward.

    total [M, N] in the accumulator's type, site and listed [M], offset and inside [M, N]; gate and residual or None.
    residual may be out itself: every element is read and written by the same program, the write depending on the read.
    """
    if gate is not None:
        total *= tl.load(gate + site, mask=listed, other=0.0).to(total.dtype)[:, None]
    if residual is not None:
        total += tl.load(residual + offset, mask=inside, other=0.0).to(total.dtype)
    tl.store(out + offset, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=inside)
