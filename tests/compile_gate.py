"""Ahead-of-time compile gate: every kernel, config and dtype, compiled for GPUs that are not here.

The launchers themselves run, on CPU tensors and under a driver that claims to be the target, with the launch
itself left out. So what is compiled is what the launcher would run: its specialisation, options and config.

    python tests/compile_gate.py            prints the table
    python tests/compile_gate.py --json     prints the rows as JSON
    python tests/compile_gate.py --all      compiles what repeats another case as well (see is_repetition)

Must run without TRITON_INTERPRET: under the interpreter the kernels are not compilable functions.
"""

import argparse
import concurrent.futures
import json
import os
import re
import sys
import tempfile

from dynconv._launches import TARGETS, recorded
from dynconv._machine_code import matrix_loops, resources, sass

TABLE_ROW = {"sm_89": "default"}
# Shared memory a program may use, bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 65536,
}

# Whose machine code is read: to disassemble a kernel takes about as long as to compile it.
LOOPS_SHOWN = ("sm_80", "sm_90")

# What is counted, in the target's assembly.
PATTERNS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma",
    "cp_async_16": r"cp\.async\.cg\.shared\.global(?:\.[\w:]+)* \[[^]]*\], \[[^]]*\], 0x10",
    "cp_async": r"\bcp\.async\.c[ag]\.shared",
    # Loads of 16 bytes or more into registers.
    "vector_16": r"\bld\.global(?:\.\w+)*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|\b(?:global|buffer)_load_dwordx4",
}


ACTIVATIONS = ("relu", "relu6", "silu", "gelu", "hardswish")
# The options that a case's variant, "a+b+c", may name besides an activation:
#   gate, bias, residual   that operand is given
#   packed                 source and result are packed
#   grouped, depthwise     2 groups of that many channels and filters; as many groups as channels
#   stride2, 1x1, 7x7      another geometry than 3 x 3
#   large                  of so many pixels that the tiles are larger
#   split                  of K: says so, the number of channels makes it true
#   unaligned              rows do not start on 16 bytes: says so to the tests, the number of channels makes it true, or
#                          in gathered convolution that kept channels do not lie side by side
#   mask                   of deformable convolution
#   rows, linear           of gathered convolution: at listed sites; of one pixel by one tap
#   rows, scale2, softmax, l2, channel     of dynamic filters: at listed sites, at a scale_factor, their normalisation,
#                          with channel filters
CASE = ("target", "kernel", "dtype", "allow_tf32", "channels", "filters", "variant")
DTYPES = {"half": ("float16", "bfloat16"), "tf32": ("float32",), "ieee": ("float32",), "double": ("float64",)}


# The kernels of masked convolution, of which a launcher is a variant: forward, input_grad and gate_grad are one kernel.
MASKED = ("forward", "input_grad", "gate_grad", "weight_grad", "bias_grad")


def cases(everything=False):
    """What is compiled, as tuples of CASE: each row of the config tables in each of its dtypes, and then the variants.

    channels and filters are the K of a tap and the N of the GEMM, of one group. everything includes what is_repetition.
    """
    return [case for case in all_cases() if everything or not is_repetition(case)]


def is_repetition(case):
    """Whether other cases show what this one does, but for the registers that the assembler takes for this target.

    Every kernel, row of the tables and dtype is compiled for sm_80, sm_90, sm_100 and gfx942. Not all of their
    variants: each option must compile, fit and keep its instructions where a compiler pass can tell the targets apart.
    """
    target, kernel, dtype, allow_tf32, _, _, variant = case
    flags = variant.split("+")
    tensor_core = dtype in DTYPES["half"] or allow_tf32
    # The most that a forward holds, which takes the most registers and shared memory.
    fullest = kernel == "forward" and "packed" in flags and "gelu" in flags
    if target == "sm_89":
        # Not one of the four. Of the kernels whose tiles depend on no table it gets the IR that sm_80 and sm_90 get,
        # and of the others the passes are theirs: the rows of "default" stay, in one dtype of each arithmetic. So do
        # depthwise kernels in fp64, whose input_grad is the only kernel that ever spilled here and nowhere else.
        if "depthwise" in flags:
            return variant != "depthwise" or dtype != "float64"
        return not (fullest or (kernel in ("forward", "weight_grad") and variant == "")) or dtype == "bfloat16"
    if kernel == "input_grad" and dtype == "bfloat16":
        return True  # the kernel and the tile are forward's, which has bf16; the rest of dgrad is shown in fp16
    if "depthwise" in flags:
        # 40 to 90 registers, no tensor cores. The IR is the same for sm_80 and sm_90, and sm_100 only orders constants
        # differently and adds fp32 in pairs. sm_90 and gfx942 have the variants.
        return variant != "depthwise" and target in ("sm_80", "sm_100")
    if kernel.startswith("epilogue"):
        return "unaligned" in flags and target in ("sm_80", "sm_100")  # likewise
    if kernel not in MASKED or fullest:
        return False
    if kernel == "bias_grad":
        return "packed" in flags and target in ("sm_80", "sm_100")  # no tensor cores: likewise
    if allow_tf32:
        # Shared memory and 16-byte pieces are those of fp16, at half of the K. On sm_90 and sm_100 the matrix unit
        # takes TF32 along K only, which changes how operands get there: these have the variants.
        return variant != "" and target in ("sm_80", "gfx942")
    if not tensor_core:
        # IEEE fp32 and fp64: again one IR for sm_80 and sm_90, and a thread's own arithmetic on every target. Addresses
        # of single elements take the most registers, so unaligned rows stay.
        return variant not in ("", "unaligned") and target in ("sm_80", "sm_100")
    return False


def all_cases():
    from dynconv.kernels import masked_conv

    for target in TARGETS:
        yield from depthwise_cases(target)
        yield from epilogue_cases(target)
        yield from gathered_cases(target)
        yield from deform_cases(target)
        yield from dynamic_filter_cases(target)
        row = TABLE_ROW.get(target, target)
        table = masked_conv.CONV_TILES[row]
        for (kind, width), (_, _, depth, _, _) in table.items():
            tf32 = kind == "tf32"
            for dtype in DTYPES[kind]:
                # The step of a tap with fewer channels than BLOCK_K: the shortest (32 of 64 is between it and the
                # full one). bf16, the same instructions as fp16, takes the full step only.
                if depth > 16 and dtype != "bfloat16":
                    yield target, "forward", dtype, tf32, 16, width, ""
                yield target, "forward", dtype, tf32, depth, width, ""
                yield target, "input_grad", dtype, tf32, depth, width, ""
            dtype = DTYPES[kind][0]
            if width == 64:  # the largest that unaligned rows take; narrower ones load them alike
                yield target, "forward", dtype, tf32, depth - 1, width, "unaligned"
            if width == max(size for name, size in table if name == kind):
                if kind in ("half", "tf32"):
                    # Rows of 16-byte pieces whose length is no multiple of 16; and more taps than has_tap has bits,
                    # with what follows the loop: one over 3 x 3 taps leaves it more registers.
                    yield target, "forward", dtype, tf32, 24, width, "1x1"
                    yield target, "forward", dtype, tf32, depth, width, "7x7+gate+bias"
                else:
                    yield target, "forward", dtype, tf32, depth, width, "gate+bias"
                yield target, "input_grad", dtype, tf32, depth, width, "stride2+gate"
                yield target, "gate_grad", dtype, tf32, depth, width, ""
                yield target, "bias_grad", dtype, False, depth, width, "gate"
                # The most that a forward holds at once.
                yield target, "forward", dtype, tf32, depth, width, "packed+gate+bias+residual+gelu"
                long = masked_conv.SPLIT_FROM // 8  # and divided by any depth
                yield target, "forward", dtype, tf32, long, width, "split"
                if kind in ("half", "tf32"):
                    yield target, "input_grad", dtype, tf32, long, width, "split"
                    yield target, "input_grad", dtype, tf32, depth, width, "packed"
                if kind == "half":
                    yield target, "forward", dtype, tf32, long, width, "split+packed+gate+bias+residual+gelu"
                    yield target, "gate_grad", dtype, tf32, long, width, "split+bias"
                    yield target, "input_grad", dtype, tf32, long, width, "split+stride2+gate"
                    yield target, "forward", dtype, tf32, depth - 1, width, "packed+residual+silu+unaligned"
                    yield target, "input_grad", dtype, tf32, depth, width, "packed+stride2+gate"
                    if row in masked_conv.LARGE_TILES:
                        yield target, "forward", dtype, tf32, depth, width, "large"
                        yield target, "forward", dtype, tf32, depth, width, "large+7x7+gate+bias"
                        yield target, "input_grad", dtype, tf32, depth, width, "large"
                        yield target, "input_grad", dtype, tf32, depth, width, "large+stride2+gate"
                        yield target, "gate_grad", dtype, tf32, depth, width, "large+bias"
                    yield target, "gate_grad", dtype, tf32, depth, width, "packed+bias"
                    yield target, "bias_grad", dtype, tf32, depth, width, "packed+gate"
            if width == 16 and kind in ("half", "tf32"):
                yield target, "forward", dtype, tf32, 16, 16, "grouped"
                yield target, "input_grad", dtype, tf32, 16, 16, "grouped"
                if kind == "half":
                    yield target, "forward", dtype, tf32, 3, 3, "grouped+unaligned"
                    yield target, "forward", dtype, tf32, 16, 16, "grouped+packed+residual+relu"
        table = masked_conv.WEIGHT_GRAD_TILES[row]
        for kind, width in table:
            for dtype in DTYPES[kind]:
                yield target, "weight_grad", dtype, kind == "tf32", width, width, ""
            if width == max(size for name, size in table if name == kind):
                yield target, "weight_grad", DTYPES[kind][0], kind == "tf32", width, width, "gate"
                yield target, "weight_grad", DTYPES[kind][0], kind == "tf32", width - 1, width - 1, "unaligned"
                if kind in ("half", "tf32"):
                    yield target, "weight_grad", DTYPES[kind][0], kind == "tf32", width, width, "packed"
                    yield target, "weight_grad", DTYPES[kind][0], kind == "tf32", 16, 16, "grouped+gate"
        yield target, "compaction", "bool", False, 1, 1, ""


def depthwise_cases(target):
    """The stencil with 128 bytes of each row, and with an odd number of channels."""
    for dtype, width in (("float16", 64), ("bfloat16", 64), ("float32", 32), ("float64", 16)):
        for kernel in ("forward", "input_grad", "weight_grad"):
            yield target, kernel, dtype, False, width, width, "depthwise"
            if dtype != "bfloat16":
                yield target, kernel, dtype, False, width - 1, width - 1, "depthwise+unaligned"
    yield target, "forward", "float16", False, 64, 64, "depthwise+packed+gate+bias+residual+gelu"
    yield target, "forward", "float16", False, 64, 64, "depthwise+7x7"
    yield target, "forward", "float16", False, 24, 24, "depthwise+residual+relu6"
    yield target, "input_grad", "float16", False, 64, 64, "depthwise+packed+stride2+gate"
    yield target, "gate_grad", "float16", False, 64, 64, "depthwise+bias"
    yield target, "weight_grad", "float16", False, 64, 64, "depthwise+packed+gate"


def epilogue_cases(target):
    everything = "gate+residual"
    for dtype, width in (("float16", 64), ("float32", 32), ("float64", 16)):
        yield target, "epilogue", dtype, False, width, width, f"{everything}+gelu"
        yield target, "epilogue_backward", dtype, False, width, width, f"{everything}+gelu"
        yield target, "moments", dtype, False, width, width, ""
    yield target, "epilogue_backward", "bfloat16", False, 64, 64, f"packed+{everything}+silu"
    for kernel in ("epilogue", "epilogue_backward"):
        yield target, kernel, "float16", False, 63, 63, f"{everything}+silu+unaligned"
    yield target, "gather", "float16", False, 64, 64, ""


def gathered_cases(target):
    """Tiles are masked convolution's: the largest in each arithmetic, and what changes the code around them."""
    for kernel in ("forward", "input_grad", "weight_grad"):
        yield target, f"gathered_{kernel}", "float16", False, 256, 256, ""
        yield target, f"gathered_{kernel}", "float32", True, 256, 256, ""
    yield target, "gathered_forward", "float32", False, 128, 128, ""
    yield target, "gathered_input_grad", "float32", False, 128, 128, "unaligned"
    yield target, "gathered_forward", "float64", False, 128, 128, ""
    yield target, "gathered_weight_grad", "float64", False, 128, 128, ""
    # The most that a forward holds at once.
    yield target, "gathered_forward", "float16", False, 256, 256, "packed+rows+gate+bias+residual+gelu"
    yield target, "gathered_forward", "float32", True, 256, 256, "rows+gate+bias+residual+gelu"
    yield target, "gathered_forward", "float16", False, 256, 256, "packed+rows+residual+silu+unaligned"
    yield target, "gathered_forward", "float16", False, 256, 256, "linear+bias"
    yield target, "gathered_forward", "bfloat16", False, 32, 32, "grouped+bias"
    yield target, "gathered_input_grad", "float16", False, 256, 256, "packed+rows+stride2"
    yield target, "gathered_weight_grad", "float16", False, 256, 256, "packed+rows"
    yield target, "gathered_weight_grad", "float16", False, 256, 256, "unaligned"


def deform_cases(target):
    """The largest tiles, of the operands that take the most registers."""
    yield target, "deform_forward", "float16", False, 128, 128, "mask+bias"
    yield target, "deform_forward", "bfloat16", False, 256, 256, "mask+bias"
    yield target, "deform_forward", "float32", True, 64, 64, "mask"
    yield target, "deform_forward", "float16", False, 15, 15, "grouped+mask+unaligned"
    yield target, "deform_weight_grad", "bfloat16", False, 64, 64, "mask"
    yield target, "deform_input_grad", "float16", False, 64, 64, "mask"
    yield target, "deform_input_grad", "float32", True, 64, 64, "mask"
    yield target, "deform_input_grad", "float64", False, 64, 64, "mask"
    yield target, "aggregate", "float16", False, 16, 16, ""
    yield target, "aggregate", "float16", False, 8, 8, ""
    yield target, "aggregate", "float32", False, 15, 15, "unaligned"
    yield target, "aggregate_grad", "float16", False, 16, 16, ""
    yield target, "aggregate_grad", "float16", False, 15, 15, "unaligned"


def dynamic_filter_cases(target):
    """channels are those of a group, filters the groups: involution, CARAFE and DDF, and what holds the most."""
    yield target, "dynamic_filter_forward", "float16", False, 16, 4, "7x7+rows"
    yield target, "dynamic_filter_forward", "float16", False, 16, 4, "7x7"
    yield target, "dynamic_filter_forward", "float16", False, 63, 1, "rows+softmax+channel+unaligned"
    yield target, "dynamic_filter_forward", "bfloat16", False, 64, 1, "5x5+scale2+softmax"
    yield target, "dynamic_filter_forward", "float64", False, 16, 1, "5x5+rows+softmax+channel"
    yield target, "dynamic_filter_forward", "float32", False, 63, 1, "unaligned"
    yield target, "dynamic_filter_input_grad", "float16", False, 16, 4, "7x7+rows"
    yield target, "dynamic_filter_input_grad", "float32", False, 32, 1, "rows+scale2+channel"
    yield target, "dynamic_filter_filter_grad", "float16", False, 16, 4, "7x7+rows+l2+channel"
    yield target, "dynamic_filter_channel_grad", "float32", False, 32, 1, "rows+channel"


def launch(case):
    """Calls the launcher of one case on small CPU tensors."""
    import torch

    from dynconv.kernels import compaction, epilogue, masked_conv

    _, kernel, dtype, allow_tf32, channels, filters, variant = case
    if kernel.startswith("gathered"):
        launch_gathered(case)
        return
    if kernel.startswith(("deform", "aggregate")):
        launch_deform(case)
        return
    if kernel.startswith("dynamic_filter"):
        launch_dynamic_filter(case)
        return
    if kernel == "compaction":
        mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
        reads = compaction.Reads((8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
        # A small mask, and one whose blocks others count: as it is, by its strides, and by the taps of a convolution.
        for blocks in (1, compaction.SELF_COUNTED + 1):
            size = blocks * compaction.SCAN_BLOCK
            large = torch.ones(1, 1, size // 8, 8, dtype=torch.bool)
            wide = torch.empty(1, 24, size // 8, 8, dtype=torch.float16)
            fill = compaction.Fill(wide.contiguous(memory_format=torch.channels_last), None)
            compaction.compact(large, with_mask=True, with_inverse=True)
            compaction.compact(large, fill=fill)
            compaction.compact(large.double(), with_mask=True)
            compaction.compact(large[:, :, :1].expand(-1, -1, size // 8, -1), with_mask=True)
            compaction.compact(large, reads=reads._replace(input_size=(size // 8, 8)), fill=fill, with_inverse=True)
        _, index, count, _ = compaction.compact(mask)
        compaction.inverse_map(index, count, mask.numel())
        _, index, count = compaction.compact_channels(torch.ones(2, 64, dtype=torch.bool), 64)
        compaction.channel_places(index, count)
        for dtype in (torch.float16, torch.float64):
            out = torch.zeros(2, 24, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
            compaction.fill_skipped(mask, compaction.Fill(out, None))
            compaction.fill_skipped(mask, compaction.Fill(out, out.clone()))
        return
    dtype = getattr(torch, dtype)
    flags = variant.split("+")
    groups = channels if "depthwise" in flags else 2 if "grouped" in flags else 1
    # channels and filters are those of a group, except where a group has one of each.
    channels, filters = (1, 1) if "depthwise" in flags else (channels, filters)
    step = 2 if "stride2" in flags else 1
    taps = 1 if "1x1" in flags else 7 if "7x7" in flags else 3
    packed = "packed" in flags
    side = 192 if "large" in flags else 8
    index = torch.arange(2 * side**2, dtype=torch.int32)
    count = torch.full((1,), len(index), dtype=torch.int32)

    def features(columns, size):
        if packed:
            return torch.zeros(2 * size * size, columns, dtype=dtype)
        return torch.zeros(2, columns, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    source, grad = features(groups * channels, side), features(groups * filters, side // step)
    lookup = index if packed else None
    weight = torch.zeros(groups * filters, channels, taps, taps, dtype=dtype)
    gate = torch.ones(len(index) // step**2, dtype=dtype) if "gate" in flags else None
    bias = torch.zeros(groups * filters, dtype=dtype) if "bias" in flags else None
    residual = grad.clone() if "residual" in flags else None
    activation = next((name for name in flags if name in ACTIVATIONS), "none")
    geometry = dict(stride=(step, step), padding=(taps // 2, taps // 2), dilation=(1, 1))
    geometry |= dict(
        input_size=(side, side), site_size=(side // step, side // step), groups=groups, allow_tf32=allow_tf32
    )
    if kernel == "forward":
        masked_conv.forward(
            source, weight, bias, index, count, gate, residual, lookup, grad, activation=activation, **geometry
        )
    elif kernel == "input_grad":
        # The GEMM of dgrad sums over Cout and has Cin columns.
        weight = torch.zeros(groups * channels, filters, taps, taps, dtype=dtype)
        grad, source = features(groups * channels, side // step), features(groups * filters, side)
        inverse = index[: len(index) // step**2]
        masked_conv.input_grad(grad, weight, inverse, index, count, gate, source, **geometry)
    elif kernel == "gate_grad":
        masked_conv.gate_grad(source, weight, bias, grad, index, count, lookup, **geometry)
    elif kernel == "weight_grad":
        masked_conv.weight_grad(source, grad, index, count, gate, lookup, weight, **geometry)
    elif kernel == "bias_grad":
        masked_conv.bias_grad(grad, index, count, gate)
    else:
        rows = torch.zeros(128, channels, dtype=dtype)
        vector = torch.zeros(channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        operands = (rows, index, count, vector, vector, vector, gate, residual)
        if kernel == "epilogue":
            epilogue.forward(*operands, grad, activation=activation)
        elif kernel == "epilogue_backward":
            grad_rows, grad_residual = torch.zeros_like(rows), torch.zeros_like(grad)
            epilogue.backward(grad, *operands, grad_rows, grad_residual, activation=activation, wanted=(True, True))
        elif kernel == "moments":
            epilogue.moments(rows, count)
        elif kernel == "gather":
            epilogue.gather(source, index, count, rows)


def launch_gathered(case):
    import torch

    from dynconv.kernels import gathered_conv

    _, kernel, dtype, allow_tf32, channels, filters, variant = case
    dtype, flags = getattr(torch, dtype), variant.split("+")
    groups, size, taps = 2 if "grouped" in flags else 1, 1 if "linear" in flags else 16, 1 if "linear" in flags else 3
    step = 2 if "stride2" in flags else 1
    widths = (groups * channels, groups * filters)
    source, out = (
        torch.zeros(2, columns, pixels, pixels, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for columns, pixels in zip(widths, (size, size // step), strict=True)
    )
    ins, outs = (
        (torch.arange(columns, dtype=torch.int32).repeat(2, 1), torch.full((2,), columns, dtype=torch.int32))
        for columns in widths
    )
    weight = torch.zeros(groups * filters, channels, taps, taps, dtype=dtype)

    def listed(sites):
        return torch.arange(2 * sites, dtype=torch.int32), torch.tensor([0, sites, 2 * sites], dtype=torch.int32)

    rows = listed(out[0, 0].numel()) if "rows" in flags else None
    where = dict(input_size=(size, size), site_size=(size // step, size // step), stride=(step, step), groups=groups)
    where |= dict(padding=(taps // 2, taps // 2), dilation=(1, 1), allow_tf32=allow_tf32)
    where |= dict(packed_source="packed" in flags, packed_out="packed" in flags)
    where |= dict(granularity=1 if "unaligned" in flags else 8)
    if kernel == "gathered_forward":
        bias = weight[:, 0, 0, 0].contiguous() if "bias" in flags else None
        gate = torch.ones(2, groups * filters, dtype=dtype) if "gate" in flags else None
        residual = out.clone() if "residual" in flags else None
        activation = next((name for name in flags if name in ACTIVATIONS), "none")
        gathered_conv.forward(
            source, weight, bias, gate, residual, out, ins, outs, rows, activation=activation, **where
        )
    elif kernel == "gathered_input_grad":
        reads = None if rows is None else (rows[0], *listed(source[0, 0].numel()))
        gathered_conv.input_grad(out, weight, source, ins, outs, reads, **where)
    else:
        gathered_conv.weight_grad(source, out, weight, ins, outs, rows, **where)


def launch_deform(case):
    """Of an aggregation, four groups of that many channels; groups of a convolution share their offsets."""
    import torch

    from dynconv.kernels import deform

    _, kernel, dtype, allow_tf32, channels, filters, variant = case
    dtype, flags = getattr(torch, dtype), variant.split("+")
    groups = 4 if kernel.startswith("aggregate") else 2 if "grouped" in flags else 1
    offset_groups = groups if kernel.startswith("aggregate") else 1

    def features(columns):
        return torch.zeros(2, columns, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)

    source, grad, offset = features(groups * channels), features(groups * filters), features(18 * offset_groups)
    mask = features(9 * offset_groups) if kernel.startswith("aggregate") or "mask" in flags else None
    geometry = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    if kernel == "aggregate":
        deform.aggregate(source, offset, mask, grad, kernel_size=(3, 3), **geometry)
        return
    wants = dict(wants_input=True, wants_offset=True)
    if kernel == "aggregate_grad":
        deform.aggregate_grad(grad, source, offset, mask, wants_weights=True, kernel_size=(3, 3), **wants, **geometry)
        return
    weight = torch.zeros(groups * filters, channels, 3, 3, dtype=dtype)
    geometry |= dict(allow_tf32=allow_tf32)
    if kernel == "deform_forward":
        bias = weight[:, 0, 0, 0].contiguous() if "bias" in flags else None
        deform.conv(source, offset, mask, weight, bias, grad, **geometry)
    elif kernel == "deform_input_grad":
        deform.conv_input_grad(grad, source, offset, mask, weight, wants_mask=True, **wants, **geometry)
    else:
        deform.conv_weight_grad(source, offset, mask, grad, weight, **geometry)


def launch_dynamic_filter(case):
    import torch

    from dynconv.kernels import dynamic_filter

    _, kernel, dtype, _, group_channels, groups, variant = case
    dtype, flags = getattr(torch, dtype), variant.split("+")
    taps = next((int(flag[0]) for flag in flags if flag in ("5x5", "7x7")), 3)
    scale, step = 2 if "scale2" in flags else 1, 2 if "stride2" in flags else 1
    sites = 8 // step * scale

    def features(channels, size):
        return torch.zeros(2, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    source, out = features(groups * group_channels, 8), features(groups * group_channels, sites)
    filters = features(groups * taps**2, sites)
    channel = torch.zeros(2, groups * group_channels, taps, taps, dtype=dtype) if "channel" in flags else None
    inverse = torch.arange(2 * sites * sites, dtype=torch.int32) if "rows" in flags else None
    listed = inverse, None if inverse is None else torch.full((1,), len(inverse), dtype=torch.int32)
    normalization = next((name for name in flags if name in ("softmax", "sigmoid", "l2")), "none")
    where = dict(site_size=(sites, sites), kernel_size=(taps, taps), stride=(step, step), dilation=(1, 1))
    where |= dict(padding=(taps // 2, taps // 2), scale_factor=scale)
    if kernel == "dynamic_filter_forward":
        dynamic_filter.forward(source, filters, channel, out, *listed, **where, normalization=normalization)
    elif kernel == "dynamic_filter_input_grad":
        dynamic_filter.input_grad(out, filters, channel, source, inverse, **where)
    elif kernel == "dynamic_filter_filter_grad":
        if normalization != "none":
            result = torch.zeros_like(filters)
            tap_row = dict(groups=groups, taps=taps**2, normalization=normalization)
            dynamic_filter.normalize(filters, result, *listed, **tap_row)
        dynamic_filter.filter_grad(
            out, source, filters, filters, channel, filters, *listed, **where, normalization=normalization
        )
    else:
        dynamic_filter.channel_grad(out, source, filters, *listed, **where)


def compile_case(case):
    """Rows of the table for one case: one for each kernel that its launcher would run."""
    try:
        with recorded(case[0]) as launches:
            launch(case)
    except Exception as error:  # a failed compile is a row of the table, not the end of it
        return [
            dict.fromkeys(COLUMNS, "") | {"loops": []} | dict(zip(CASE, case, strict=True)) | {"error": repr(error)}
        ]
    return [describe(case, launched) for launched in launches]


def describe(case, launched):
    target, kernel, dtype, _, channels, filters, variant = case
    arguments, compiled = launched.arguments, launched.kernel
    row = dict(
        target=target,
        kernel=kernel,
        function=launched.name,
        error="",
        dtype=dtype,
        precision=arguments.get("PRECISION", ""),
        channels=channels,
        filters=filters,
        variant=variant,
        tile="x".join(str(arguments[key]) for key in TILE if key in arguments),
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        warnings=" ".join(launched.warnings),
        seconds=round(launched.seconds, 2),
        hash=compiled.hash,
    )
    row |= resources(compiled)._asdict()
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    row |= {name: len(re.findall(pattern, assembly)) for name, pattern in PATTERNS.items()}
    loops = []
    if target in LOOPS_SHOWN and (row["wgmma"] or row["mma"]):
        loops = matrix_loops(sass(compiled))
    return row | {"loops": [loop._asdict() | {"is_pipelined": loop.is_pipelined} for loop in loops]}


def compile_all(selected, processes=2):
    """Rows of all selected cases, compiled in a pool of processes with a cache of their own.

    A kernel that several launchers share, or that an option leaves as it was, has one row: that of the first case.
    """
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with concurrent.futures.ProcessPoolExecutor(processes) as pool:
            rows = [row for rows in pool.map(compile_case, selected, chunksize=4) for row in rows]
    first = {row.pop("hash", number): row for number, row in reversed(list(enumerate(rows)))}
    return list(reversed(first.values()))


TILE = ("BLOCK_T", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C")
COLUMNS = "target kernel function channels filters dtype precision variant tile num_warps num_stages registers spills"
COLUMNS += " scalar_spills shared wgmma tcgen05 mma mfma cp_async_16 cp_async vector_16 instructions loops warnings"
COLUMNS += " seconds error"
COLUMNS = COLUMNS.split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--kernel", action="append")
    arguments = parser.parse_args()
    selected = [
        case
        for case in cases(arguments.all)
        if (not arguments.target or case[0] in arguments.target)
        and (not arguments.kernel or case[1] in arguments.kernel)
    ]
    rows = compile_all(selected)
    if arguments.json:
        json.dump(rows, sys.stdout)
        return
    for row in rows:  # of each loop: instructions, barriers and the copies in flight at its waits
        shown = (f"{one['instructions']}/{one['barriers']}/{max(one['waits'], default=0)}" for one in row["loops"])
        row["loops"] = " ".join(shown)
    lines = [COLUMNS] + [[str(row[column]) for column in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
