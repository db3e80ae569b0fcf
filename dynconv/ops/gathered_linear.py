"""gathered_linear: a linear layer between the features that each sample keeps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .. import calibration, reference
from .._arguments import kind_of
from .._backend import backend_for, module, unwatched
from .._flops import register_flop_formula
from ..channels import ActiveChannels
from . import gathered_conv
from ._channel_calls import ChannelCall, Kept
from ._common import FLOATING, autocast, check_types, once_differentiable, register_autograd

# Positions a sample from which on its share of the weight is worth packing: then the layer is a 1x1 convolution.
PACKED_POSITIONS = 8

_SETS = "Tensor in_index, Tensor in_count, Tensor out_index, Tensor out_count"
_CHOICE = "int granularity, str execution, bool[2] is_chosen"  # as of gathered_conv2d
_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(f"gathered_linear(Tensor input, Tensor weight, Tensor? bias, {_SETS}, {_CHOICE}) -> Tensor")
_library.define(
    f"gathered_linear_backward(Tensor grad, Tensor input, Tensor weight, {_SETS}, {_CHOICE}, bool[3] wanted) -> "
    "(Tensor input, Tensor weight, Tensor bias)"
)


def _forward(
    input, weight, bias, in_index, in_count, out_index, out_count, granularity, execution, is_chosen
) -> Tensor:
    ins, outs = Kept(in_index, in_count, is_chosen[0]), Kept(out_index, out_count, is_chosen[1])
    return calibration.run(execution, _Forward(input, weight, bias, ins, outs, granularity))


def _sparse(input, weight, bias, ins, outs) -> Tensor:
    samples, positions = input.shape[:2]
    out = input.new_empty(samples, positions, weight.shape[0])
    if out.numel() == 0:
        return out
    kernels = module(".cpu.gathered_linear")
    kernels.forward(kernels.Spread(input, ins[:2]), outs[:2], weight, bias, out)
    return out


def _backward(
    grad, input, weight, in_index, in_count, out_index, out_count, granularity, execution, is_chosen, wanted
) -> tuple[Tensor, Tensor, Tensor]:
    ins, outs = Kept(in_index, in_count, is_chosen[0]), Kept(out_index, out_count, is_chosen[1])
    return calibration.run(execution, _Backward(grad, input, weight, ins, outs, granularity, wanted))


def _sparse_backward(grad, input, weight, ins, outs, wanted) -> tuple[Tensor, Tensor, Tensor]:
    grads = [grad.new_empty(0) for _ in wanted]  # not one three times: outputs must not alias
    if input.numel() == 0:
        like = (input.new_empty(input.shape), torch.zeros_like(weight), weight.new_zeros(weight.shape[0]))
        return tuple(zeros if want else none for zeros, want, none in zip(like, wanted, grads, strict=True))
    kernels = module(".cpu.gathered_linear")
    ins, outs, grad = ins[:2], outs[:2], grad.contiguous()
    spread = kernels.Spread(input, ins) if wanted[0] or wanted[1] else None
    if wanted[0]:
        grads[0] = input.new_empty(input.shape)
        kernels.input_grad(grad, spread, ins, outs, weight, grads[0])
    if wanted[1]:
        grads[1] = kernels.weight_grad(grad, spread, outs, weight)
    if wanted[2]:
        grads[2] = kernels.bias_grad(grad, outs)
    return tuple(grads)


class _Call(ChannelCall):
    """What the two directions share as `dynconv.calibration.Call`."""

    def __init__(self, input: Tensor, weight: Tensor, ins: Kept, outs: Kept, granularity: int) -> None:
        super().__init__(ins, outs, None, input.shape[1])
        self.input, self.weight, self.granularity = input, weight, granularity

    @property
    def has_choice(self) -> bool:
        """Not in half types, whose products PyTorch does not add in float32 on every CPU."""
        return self.input.element_size() > 2

    def key(self) -> tuple:
        what, chosen = str(self.input.dtype), (self.ins.is_chosen, self.outs.is_chosen)
        return self._kind, what, *self.input.shape, self.weight.shape[0], self.granularity, *chosen

    def name(self) -> str:
        samples, positions, channels = self.input.shape
        what = [f"{self._kind} {channels}->{self.weight.shape[0]}"] + [f"positions {positions}"] * (positions > 1)
        what += [f"batch {samples}", str(self.input.dtype)[6:]]
        chosen = [n for n, c in (("in", self.ins.is_chosen), ("out", self.outs.is_chosen)) if c]
        return ", ".join([*what, f"chosen {' and '.join(chosen) or 'nothing'}", f"granularity {self.granularity}"])

    def _sets_at(self, density: float) -> tuple[Kept, Kept, int]:
        share = self._share_at(density)
        return self.ins.at(share, self.granularity), self.outs.at(share, self.granularity), self.granularity


class _Forward(_Call):
    _kind = "gathered linear"

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, *sets) -> None:
        super().__init__(input, weight, *sets)
        self.bias = bias

    def sparse(self) -> Tensor:
        return _sparse(self.input, self.weight, self.bias, self.ins, self.outs)

    def dense(self) -> Tensor:
        return self.outs.keep(F.linear(self.ins.keep(self.input, 2), self.weight, self.bias), 2)

    def at(self, density: float) -> _Forward:
        return _Forward(self.input.clone(), self.weight, self.bias, *self._sets_at(density))


class _Backward(_Call):
    _kind = "gathered linear backward"

    def __init__(self, grad: Tensor, input: Tensor, weight: Tensor, *sets_wanted) -> None:
        *sets, self.wanted = sets_wanted
        super().__init__(input, weight, *sets)
        self.grad = grad

    @property
    def has_choice(self) -> bool:
        return any(self.wanted) and super().has_choice

    def key(self) -> tuple:
        return *super().key(), *self.wanted

    def name(self) -> str:
        wanted = [n for n, want in zip(("input", "weight", "bias"), self.wanted) if want]
        return ", ".join([super().name(), "gradients of " + " and ".join(wanted)])

    def sparse(self) -> tuple[Tensor, Tensor, Tensor]:
        return _sparse_backward(self.grad, self.input, self.weight, self.ins, self.outs, self.wanted)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        grads = [self.grad.new_empty(0) for _ in self.wanted]
        grad = self.outs.keep(self.grad.contiguous(), 2)
        if self.wanted[0]:
            grads[0] = self.ins.keep(grad @ self.weight, 2)
        if self.wanted[1]:
            input = self.ins.keep(self.input, 2)
            grads[1] = torch.empty_like(self.weight).copy_(grad.flatten(0, 1).t() @ input.flatten(0, 1))
        if self.wanted[2]:
            grads[2] = grad.sum((0, 1))
        return tuple(grads)

    def at(self, density: float) -> _Backward:
        return _Backward(self.grad, self.input, self.weight, *self._sets_at(density), self.wanted)


_library.impl("gathered_linear", _forward, "CPU")
_library.impl("gathered_linear_backward", _backward, "CPU")


@torch.library.register_fake("dynconv::gathered_linear", lib=_library)
def _(input, weight, bias, in_index, in_count, out_index, out_count, *choice):
    return input.new_empty(*input.shape[:2], weight.shape[0])


@torch.library.register_fake("dynconv::gathered_linear_backward", lib=_library)
def _(grad, input, weight, in_index, in_count, out_index, out_count, *choice_wanted):
    wanted = choice_wanted[-1]
    return (
        input.new_empty(input.shape) if wanted[0] else grad.new_empty(0),
        torch.empty_like(weight) if wanted[1] else grad.new_empty(0),
        weight.new_empty(weight.shape[0]) if wanted[2] else grad.new_empty(0),
    )


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, in_index, in_count, out_index, out_count, *choice):
        sets = (in_index, in_count, out_index, out_count)
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.dynconv.gathered_linear(input, weight, bias, *sets, *choice)
        ctx.save_for_backward(input, weight, *sets)
        ctx.choice = choice
        return out

    @staticmethod
    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:3])
        results = torch.ops.dynconv.gathered_linear_backward(grad, *ctx.saved_tensors, *ctx.choice, wanted)
        grads = [result if want else None for result, want in zip(results, wanted, strict=True)]
        return (*grads, None, None, None, None, None, None, None)


register_autograd(_library, "gathered_linear", _GatheredLinear.apply)
once_differentiable(_library, "gathered_linear")


@register_flop_formula(torch.ops.dynconv.gathered_linear, get_raw=True)
def _forward_flops(input, weight, bias, *sets, **unused) -> int:
    return _product_flops(input, weight, *sets[:4])


@register_flop_formula(torch.ops.dynconv.gathered_linear_backward, get_raw=True)
def _backward_flops(grad, input, weight, *rest, **unused) -> int:
    wanted = rest[-1]
    return (wanted[0] + wanted[1]) * _product_flops(input, weight, *rest[:4])


def _product_flops(input, weight, in_index, in_count, out_index, out_count) -> int:
    """2 * positions * sum over samples of kept in * kept out; all where the sets are not known."""
    if any(count.is_meta or is_fake(count) for count in (in_count, out_count)):
        kept = input.shape[0] * weight.shape[0] * weight.shape[1]
    else:
        kept = int((in_count.long() * out_count.long()).sum())
    return 2 * input.shape[1] * kept


def gathered_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_mask: Tensor | ActiveChannels | None = None,
    out_mask: Tensor | ActiveChannels | None = None,
) -> Tensor:
    """Apply a linear layer to the features that each sample keeps: from the kept input to the kept output features.

    Equal to `where(out_mask, linear(where(in_mask, input, 0)), 0)`, at a cost that falls with (kept in) * (kept out),
    forward and backward. What a sample does not keep is not read: NaN or Inf there reaches neither the output nor a
    gradient. float32, float64, float16 and bfloat16; half types accumulate in float32, and float32 on a GPU obeys the
    TF32 switch of F.conv2d. Differentiable once, in `input`, `weight`, `bias` and floating masks.

    The dynamic widths of FBS (Gao et al., ICLR 2019) and DS-Net (Li et al., CVPR 2021) for linear layers; contextual
    sparsity of a transformer's MLP (Liu et al., Deja Vu, ICML 2023).

    On the CPU samples of fewer than 8 positions skip all output features that are not kept, and input features by whole
    vectors: keep them in aligned groups of 16. Otherwise it is `gathered_conv2d` of one pixel a position.

    Args:
        input: [N, Cin] or [N, ..., Cin]: all positions of a sample share its masks. Or one sample [Cin].
        weight: [Cout, Cin].
        bias: [Cout].
        in_mask: bool, broadcastable to [N, Cin], or `ActiveChannels` made once for several layers; None keeps all. A
            floating mask is a gate: a feature is kept where it is not zero, and its value multiplies the input. Its
            gradient is zero at the other features.
        out_mask: the same for [N, Cout] and the output.

    Returns:
        [N, Cout], [N, ..., Cout] or [Cout], contiguous, zeros in the features that a sample does not keep. Without any
        mask it is plain `F.linear`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or device.

    Example:
        >>> x, weight, keep = torch.randn(2, 8), torch.randn(4, 8), torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).bool()
        >>> y = dynconv.gathered_linear(x, weight, out_mask=keep)
        >>> torch.allclose(y, torch.where(keep, x @ weight.t(), 0), atol=1e-4)
        True
    """
    if isinstance(input, Tensor) and input.dim() == 1:  # one sample, as F.linear takes it
        return gathered_linear(input[None], weight, bias, in_mask=in_mask, out_mask=out_mask)[0]
    _check(input, weight, bias)
    input, weight, bias = autocast(input, weight, bias)
    check_types(input, weight=weight, bias=bias)
    if in_mask is out_mask is None:
        return F.linear(input, weight, bias)
    ins = gathered_conv.check_channels("in_mask", in_mask, (input.shape[0], input.shape[-1]), input)
    outs = gathered_conv.check_channels("out_mask", out_mask, (input.shape[0], weight.shape[0]), input)
    backend, shape = backend_for(input.device), (*input.shape[:-1], weight.shape[0])
    if backend == "reference" or input.numel() == 0:
        return reference.gathered_linear(input, weight, bias, in_mask=ins, out_mask=outs)
    input = input.flatten(1, -2) if input.dim() > 2 else input[:, None]
    if backend == "triton" or input.shape[1] >= PACKED_POSITIONS:
        # [N, L, C] as [N, C, L, 1] in channels_last, without a copy where it is contiguous.
        image, filters = input.transpose(1, 2)[..., None], weight[:, :, None, None]
        image = gathered_conv.gathered_conv2d(
            image, filters, bias, in_mask=None if in_mask is None else ins, out_mask=None if out_mask is None else outs
        )
        return image[..., 0].transpose(1, 2).reshape(shape)
    if ins.gate is not None:
        # The gate's gradient is a sum over the positions: what a sample does not keep must not be in it.
        kept = torch.where(ins.mask[:, None], input, 0)
        input = (kept * ins.gate[:, None]).to(input.dtype)
    run = _forward if unwatched(input, weight, bias) else torch.ops.dynconv.gathered_linear
    choice = (math.gcd(ins.granularity, outs.granularity), calibration.mode())
    choice += ([in_mask is not None, out_mask is not None],)
    result = run(input, weight, bias, ins.index, ins.count, outs.index, outs.count, *choice)
    if outs.gate is not None:
        # Zeros already where not kept; the gate's gradient is a sum that must not have NaN of the output's from there.
        result = torch.where(outs.mask[:, None], result * outs.gate[:, None], 0).to(result.dtype)
    return result.view(shape)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, operand in (("input", input), ("weight", weight), ("bias", bias)):
        if operand is None and name == "bias":
            continue
        if not isinstance(operand, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {kind_of(operand)}")
        if operand.dtype not in FLOATING:
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {operand.dtype}")
        if operand.device != input.device:
            raise ValueError(f"{name}: expected a tensor on {input.device}, where the input is, got {operand.device}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a shape [Cout, Cin] of no zeros, got {list(weight.shape)}")
    if input.dim() < 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: expected shape [N, ..., {weight.shape[1]}] or [{weight.shape[1]}], got {list(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
