"""gathered_conv2d: a convolution of the channels that each sample keeps."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from .._backend import backend_for, forced_backend, module, unwatched
from .._geometry import IntPair, Padding
from ..channels import ActiveChannels
from ._common import autocast, channels_last, check_convolution, check_types, in_rows, once_differentiable

_SETS = "Tensor in_index, Tensor in_count, Tensor out_index, Tensor out_count"
_GEOMETRY = "SymInt[2] size, int[2] stride, int[2] padding, int[2] dilation, int groups"
_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(f"gathered_conv2d(Tensor input, Tensor weight, Tensor? bias, {_SETS}, {_GEOMETRY}) -> Tensor")
_library.define(
    f"gathered_conv2d_backward(Tensor grad, Tensor input, Tensor weight, {_SETS}, {_GEOMETRY}, bool[3] wanted) -> "
    "(Tensor input, Tensor weight, Tensor bias)"
)


def _place(size, input, weight, stride, padding, dilation) -> tuple[int, ...]:
    """The geometry as the CPU kernels take it."""
    return (*size, *input.shape[2:], *weight.shape[2:], *stride, *padding, *dilation)


def _forward(
    input, weight, bias, in_index, in_count, out_index, out_count, size, stride, padding, dilation, groups
) -> Tensor:
    out = channels_last((input.shape[0], weight.shape[0], *size), input)
    if out.numel() == 0:
        return out
    kernels = module(".cpu.gathered_conv")
    ins, outs = (in_index, in_count), (out_index, out_count)
    packed = kernels.pack(in_rows(input), ins, groups)
    where = _place(size, input, weight, stride, padding, dilation)
    kernels.products(packed, ins, outs, weight, bias, out, groups, where, False)
    return out


def _backward(
    grad, input, weight, in_index, in_count, out_index, out_count, size, stride, padding, dilation, groups, wanted
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [grad.new_empty(0) for _ in wanted]  # not one three times: outputs must not alias
    ins, outs = (in_index, in_count), (out_index, out_count)
    if input.shape[0] == 0:
        like = (channels_last(input.shape, input), torch.zeros_like(weight), weight.new_zeros(weight.shape[0]))
        return tuple(zeros if want else none for zeros, want, none in zip(like, wanted, grads, strict=True))
    kernels = module(".cpu.gathered_conv")
    where = _place(size, input, weight, stride, padding, dilation)
    packed = kernels.pack(in_rows(grad), outs, groups)
    if wanted[0]:
        grads[0] = channels_last(input.shape, input)
        kernels.products(packed, outs, ins, weight, None, grads[0], groups, where, True)
    if wanted[1]:
        source = kernels.pack(in_rows(input), ins, groups)
        grads[1] = kernels.weight_grad(source, packed, ins, outs, weight, groups, where)
    if wanted[2]:
        sums = grad.sum((2, 3), dtype=packed.dtype)
        kept = ActiveChannels._mask_of(out_index)
        grads[2] = torch.where(kept, sums, 0).sum(0).to(weight.dtype)
    return tuple(grads)


_library.impl("gathered_conv2d", _forward, "CPU")
_library.impl("gathered_conv2d_backward", _backward, "CPU")


@torch.library.register_fake("dynconv::gathered_conv2d", lib=_library)
def _(input, weight, bias, in_index, in_count, out_index, out_count, size, *geometry):
    return channels_last((input.shape[0], weight.shape[0], *size), input)


@torch.library.register_fake("dynconv::gathered_conv2d_backward", lib=_library)
def _(grad, input, weight, in_index, in_count, out_index, out_count, *rest):
    wanted = rest[-1]
    return (
        channels_last(input.shape, input) if wanted[0] else grad.new_empty(0),
        torch.empty_like(weight) if wanted[1] else grad.new_empty(0),
        weight.new_empty(weight.shape[0]) if wanted[2] else grad.new_empty(0),
    )


class _GatheredConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, in_index, in_count, out_index, out_count, *geometry):
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.dynconv.gathered_conv2d(
                input, weight, bias, in_index, in_count, out_index, out_count, *geometry
            )
        ctx.save_for_backward(input, weight, in_index, in_count, out_index, out_count)
        ctx.geometry = geometry
        return out

    @staticmethod
    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:3])
        results = torch.ops.dynconv.gathered_conv2d_backward(grad, *ctx.saved_tensors, *ctx.geometry, wanted)
        grads = [result if want else None for result, want in zip(results, wanted, strict=True)]
        return (*grads, None, None, None, None, *(None,) * len(ctx.geometry))


_library.impl("gathered_conv2d", _GatheredConv2d.apply, "Autograd")
once_differentiable(_library, "gathered_conv2d")


@register_flop_formula(torch.ops.dynconv.gathered_conv2d, get_raw=True)
def _forward_flops(input, weight, bias, *rest, **unused) -> int:
    return _product_flops(input, weight, *rest)


@register_flop_formula(torch.ops.dynconv.gathered_conv2d_backward, get_raw=True)
def _backward_flops(grad, input, weight, *rest, **unused) -> int:
    *rest, wanted = rest
    return (wanted[0] + wanted[1]) * _product_flops(input, weight, *rest)


def _product_flops(input, weight, in_index, in_count, out_index, out_count, size, *rest) -> int:
    """2 * sites * kH * kW * sum over samples and groups of kept in * kept out; all where the sets are not known."""
    groups = rest[-1]
    kept = []
    for index, width in ((in_index, weight.shape[1] * groups), (out_index, weight.shape[0])):
        mask = torch.ones(1) if index.is_meta or is_fake(index) else ActiveChannels._mask_of(index)
        kept.append(mask.expand(input.shape[0], width).view(-1, groups, width // groups).sum(2, dtype=torch.int64))
    sites = size[0] * size[1] * weight.shape[2] * weight.shape[3]
    return 2 * sites * int((kept[0] * kept[1]).sum())


def gathered_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    in_mask: Tensor | ActiveChannels | None = None,
    out_mask: Tensor | ActiveChannels | None = None,
) -> Tensor:
    """2-D convolution of the channels that each sample keeps: from the kept input channels to the kept output channels.

    Equal to `where(out_mask, conv2d(where(in_mask, input, 0)), 0)`, at the cost of (kept in) * (kept out), forward and
    backward. What a sample does not keep is not read: NaN or Inf there reaches neither the output nor a gradient.
    float32, float64, float16 and bfloat16; half types accumulate in float32. Differentiable once, in `input`, `weight`,
    `bias` and floating masks.

    The dynamic channels of FBS (Gao et al., ICLR 2019), DS-Net (Li et al., CVPR 2021) and LAUDNet (Han et al., 2023).

    On the CPU. Tensors elsewhere take the dense computation of `dynconv.reference`, with a warning the first time.

    Args:
        input: [N, Cin, H, W]; channels_last is the fast path, anything else is copied first.
        weight: [Cout, Cin / groups, kH, kW].
        bias: [Cout].
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, "same" and "valid" included.
        in_mask: bool, broadcastable to [N, Cin], or `ActiveChannels` made once for several layers; None keeps all. A
            floating mask is a gate: a channel is kept where it is not zero, and its value multiplies the input. Its
            gradient is zero at the other channels.
        out_mask: the same for [N, Cout] and the output.

    Returns:
        [N, Cout, Ho, Wo] in channels_last, zeros in the channels that a sample does not keep.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or device.
    """
    geometry, size = check_convolution(input, weight, bias, stride, padding, dilation, groups)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    input, weight, bias = autocast(input, weight, bias)
    check_types(input, weight, bias)
    ins = _channels("in_mask", in_mask, (input.shape[0], input.shape[1]), input)
    outs = _channels("out_mask", out_mask, (input.shape[0], weight.shape[0]), input)
    if _backend(input) == "reference":
        return reference.gathered_conv2d(
            input, weight, bias, stride, padding, dilation, groups, in_mask=ins, out_mask=outs
        )
    if ins.gate is not None:
        # The gate's gradient is a sum over the channel: what a sample does not keep must not be in it.
        kept = torch.where(ins.mask[:, :, None, None], input, 0)
        input = (kept * ins.gate[:, :, None, None]).to(input.dtype)
    sets = (ins.index, ins.count, outs.index, outs.count)
    where = (size, geometry.stride, geometry.padding, geometry.dilation, groups)
    run = _forward if unwatched(input, weight, bias) else torch.ops.dynconv.gathered_conv2d
    result = run(input, weight, bias, *sets, *where)
    if outs.gate is not None:
        result = in_rows((result * outs.gate[:, :, None, None]).to(result.dtype))
    return result


def _channels(name: str, mask: Tensor | ActiveChannels | None, size: tuple[int, int], input: Tensor) -> ActiveChannels:
    if mask is None:
        return ActiveChannels._all(size, input.device)
    if not isinstance(mask, ActiveChannels):
        try:
            mask = ActiveChannels(mask, size)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}{str(error).removeprefix('mask')}") from None
    if mask.shape != size:
        raise ValueError(f"{name}: expected channels of {list(size)} (N, C), got {list(mask.shape)}")
    if mask.mask.device != input.device:
        raise ValueError(f"{name}: expected a mask on {input.device}, where the input is, got {mask.mask.device}")
    return mask


def _backend(input: Tensor) -> str:
    name = backend_for(input.device)
    if name != "triton":
        return name
    if forced_backend() == "triton":
        raise ValueError("backend: expected 'cpu' or 'reference' for gathered_conv2d, got 'triton'")
    _warn_dense(input.device.type)
    return "reference"


@functools.cache
def _warn_dense(device: str) -> None:
    warnings.warn(f"gathered_conv2d: computes every channel on {device}, where it has no kernels yet", stacklevel=4)
