"""Compile ahead of time: every kernel that a model or an op needs, before the first call that has to be fast."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ._backend import backend, module, observed
from .calibration import counts, execution, mode
from .nn import GatheredBottleneck, MaskedBottleneck, MaskedInvertedResidual
from .ops.deform import deform_aggregate2d, deform_conv2d
from .ops.dynamic_filter import dynamic_filter2d
from .ops.gathered_conv import gathered_conv2d
from .ops.gathered_linear import gathered_linear
from .ops.masked_conv import masked_conv2d
from .packed import pack
from .sites import ActiveSites

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CHANNELS = 32


def warmup(
    run: Callable[[], object] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    ops: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Compile what `run` needs, or the CPU kernels of some ops and element types, and keep what can be kept on disk.

    A kernel is compiled at its first call, which takes seconds; later processes read it from disk.
    `python -m dynconv warmup` does the same from the shell. What is compiled, how long that takes and where it is kept
    is told to the logger `dynconv`.

    Args:
        run: `lambda: model(image)`, a training step, or anything else: called as under a profiler, as after a
            calibration, with the sparse way forced, with the dense way, and then in the mode in force, which
            `torch.compile` compiles for by itself. Nothing is left to compile then for operands of these kinds, shapes,
            strides and types, whatever the masks keep, as in the capture of a CUDA graph. On a GPU a view that begins
            at another multiple of 16 bytes is no other, but one that begins in between is.
        dtypes: without `run`: some of float32, float64, float16 and bfloat16.
        ops: without `run`: some of `masked_conv2d`, `gathered_conv2d`, `gathered_linear`, `dynamic_filter2d`,
            `deform_conv2d`, `deform_aggregate2d` and `blocks` (those of `dynconv.nn`); None is all of them.
        progress: told the number of pieces done, of all, and the next one's name.

    Raises ValueError for another op or type, and for ops beside `run`.

    Example:
        >>> conv, x = dynconv.nn.MaskedConv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
        >>> with torch.no_grad():
        ...     dynconv.warmup(lambda: conv(x, torch.rand(1, 1, 6, 6) < 0.5))
    """
    if run is not None:
        if ops is not None:
            raise ValueError(f"ops: expected None beside run, which says what to compile, got {ops!r}")
        ways = dict.fromkeys(("sparse", "dense", mode()))
        # The mode in force comes last, so that what is remembered of the last call is what the next ones need.
        ways[mode()] = ways.pop(mode())
        pieces = {"run, observed": lambda: _observed(run)}
        if mode() == "automatic":
            pieces["run, counted"] = lambda: _counted(run)
        pieces |= {f"run, {way}": lambda way=way: _forced(way, run) for way in ways}
    else:
        for name, given, known in (("ops", ops or OPS, OPS), ("dtypes", dtypes, DTYPES)):
            if isinstance(given, str) or not set(given) <= set(known):
                raise ValueError(f"{name}: expected some of {', '.join(map(str, known))}, got {given!r}")
        pieces = {
            f"{op} {str(dtype).removeprefix('torch.')}": lambda op=op, dtype=dtype: _compile(OPS[op], dtype)
            for op, dtype in itertools.product(OPS if ops is None else ops, dtypes)
        }
    for number, (name, piece) in enumerate(pieces.items()):
        if progress is not None:
            progress(number, len(pieces), name)
        piece()
    if run is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def _forced(way: str, run: Callable[[], object]) -> None:
    with execution(way):
        run()


def _observed(run: Callable[[], object]) -> None:
    """Run as under a profiler, where calls take the way through PyTorch's dispatcher and launch other kernels."""
    with observed.using(True):
        _forced("sparse", run)


def _counted(run: Callable[[], object]) -> None:
    """Run as after a calibration, where calls list their sites ahead of all else, to know how many there are."""
    with counts.using(True):
        run()


def _compile(calls: Callable[[torch.dtype], Iterator[Tensor]], dtype: torch.dtype) -> None:
    """Make an op's calls on the CPU backend, both ways, as in inference and with the gradients of all operands.

    On the CPU whatever the default device is.
    """
    for way, is_training in itertools.product(("sparse", "dense"), (False, True)):
        with (
            torch._C.DisableTorchFunction(),
            backend("cpu"),
            execution(way),
            torch.set_grad_enabled(is_training),
        ):
            for result in calls(dtype):
                if is_training:
                    result.float().sum().backward(retain_graph=True)  # calls share packed operands


def _leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Operands, which want a gradient where gradients are made."""
    return [torch.zeros(shape, dtype=dtype, requires_grad=torch.is_grad_enabled()) for shape in shapes]


def _masks(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Every second element, as a bool mask and as a gate, whose gradient has kernels of its own."""
    mask = (torch.arange(torch.Size(shape).numel()) % 2 == 0).view(shape)
    return mask, mask.to(dtype).requires_grad_(torch.is_grad_enabled())


def _masked_conv2d(dtype: torch.dtype) -> Iterator[Tensor]:
    shape = (2, CHANNELS, 6, 6)
    # What a calibrated call knows of a mask that it may not have to list.
    module(".cpu.sites").count_active(_masks(dtype, (2, 1, 6, 6))[0])
    for groups, kernel, mask in itertools.product((1, 2, CHANNELS), (3, 1), _masks(dtype, (2, 1, 6, 6))):
        weight_shape = (CHANNELS, CHANNELS // groups, kernel, kernel)
        input, weight, bias, residual, inactive = _leaves(dtype, shape, weight_shape, (CHANNELS,), shape, shape)
        options = {"padding": kernel // 2, "groups": groups, "mask": ActiveSites(mask)}
        yield masked_conv2d(input, weight, bias, **options)
        yield masked_conv2d(input, weight, bias, **options, activation="silu", residual=residual, inactive=inactive)
        packed = masked_conv2d(input, weight, bias, **options, packed=True)
        yield masked_conv2d(packed, weight, bias, **options)
        yield masked_conv2d(packed, weight, bias, **options, packed=True).unpack(activation="silu", residual=residual)
        yield pack(input, options["mask"]).unpack()
        if not torch.is_grad_enabled():
            yield masked_conv2d(
                input, weight, bias, **options, out=torch.zeros_like(input, memory_format=torch.channels_last)
            )


def _gathered_conv2d(dtype: torch.dtype) -> Iterator[Tensor]:
    shape, mask = (2, CHANNELS, 6, 6), _masks(dtype, (2, 1, 6, 6))[0]
    for groups, kernel, keep in itertools.product((1, 2, CHANNELS), (3, 1), _masks(dtype, (2, CHANNELS))):
        weight_shape = (CHANNELS, CHANNELS // groups, kernel, kernel)
        input, weight, bias = _leaves(dtype, shape, weight_shape, (CHANNELS,))
        options = {"padding": kernel // 2, "groups": groups, "in_mask": keep}
        yield gathered_conv2d(input, weight, bias, **options)
        yield gathered_conv2d(input, weight, bias, **options, out_mask=keep, mask=mask)
        packed = gathered_conv2d(input, weight, bias, **options, out_mask=keep, packed=True)
        yield gathered_conv2d(packed, weight, bias, padding=kernel // 2, groups=groups)
        yield packed.unpack()


def _gathered_linear(dtype: torch.dtype) -> Iterator[Tensor]:
    for keep in _masks(dtype, (2, CHANNELS)):
        input, weight, bias = _leaves(dtype, (2, 3, CHANNELS), (CHANNELS, CHANNELS), (CHANNELS,))
        yield gathered_linear(input, weight, bias, in_mask=keep, out_mask=keep)


def _dynamic_filter2d(dtype: torch.dtype) -> Iterator[Tensor]:
    for scale, normalization, mask in itertools.product(
        (1, 2), (None, "softmax"), (None, *_masks(dtype, (2, 1, 6, 6)))
    ):
        side = 6 // scale
        input, filters, channel_filters = _leaves(dtype, (2, CHANNELS, side, side), (2, 18, 6, 6), (2, CHANNELS, 3, 3))
        options = {"kernel_size": 3, "padding": 1, "scale_factor": scale, "mask": mask, "normalization": normalization}
        yield dynamic_filter2d(input, filters, **options)
        if scale == 1:
            yield dynamic_filter2d(input, filters[:, :9], channel_filters=channel_filters, **options)


def _deform_conv2d(dtype: torch.dtype) -> Iterator[Tensor]:
    for is_modulated in (False, True):
        input, offset, weight, bias, mask = _leaves(
            dtype, (2, CHANNELS, 6, 6), (2, 18, 6, 6), (CHANNELS, CHANNELS, 3, 3), (CHANNELS,), (2, 9, 6, 6)
        )
        yield deform_conv2d(input, offset, weight, bias, padding=1, mask=mask if is_modulated else None)


def _deform_aggregate2d(dtype: torch.dtype) -> Iterator[Tensor]:
    for normalization in (None, "softmax"):
        input, offset, weights = _leaves(dtype, (2, CHANNELS, 6, 6), (2, 18, 6, 6), (2, 9, 6, 6))
        yield deform_aggregate2d(input, offset, weights, kernel_size=3, padding=1, normalization=normalization)


def _blocks(dtype: torch.dtype) -> Iterator[Tensor]:
    made = (
        MaskedBottleneck(CHANNELS, 8),
        MaskedInvertedResidual(CHANNELS, CHANNELS, 1, 2),
        GatheredBottleneck(CHANNELS, 8),
    )
    for block, is_training in itertools.product(made, (False, True)):
        block.to(dtype).train(is_training)
        (input,) = _leaves(dtype, (2, CHANNELS, 6, 6))
        for mask in _masks(dtype, (2, 8) if isinstance(block, GatheredBottleneck) else (2, 1, 6, 6)):
            yield block(input, mask)


OPS = {
    "masked_conv2d": _masked_conv2d,
    "gathered_conv2d": _gathered_conv2d,
    "gathered_linear": _gathered_linear,
    "dynamic_filter2d": _dynamic_filter2d,
    "deform_conv2d": _deform_conv2d,
    "deform_aggregate2d": _deform_aggregate2d,
    "blocks": _blocks,
}
