"""masked_conv2d: a convolution that computes the active output sites and skips the others."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from .._backend import backend_for, module
from .._geometry import Geometry, IntPair, Padding
from ..sites import ActiveSites

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, str backend"
_OPERANDS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor mask, Tensor index, Tensor count, Tensor[] shared, Tensor? gate"
)
_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(f"masked_conv2d({_OPERANDS}, Tensor? inactive, {_GEOMETRY}) -> Tensor")
_library.define(f"masked_conv2d_(Tensor(a!) out, {_OPERANDS}, {_GEOMETRY}) -> ()")
_library.define(
    f"masked_conv2d_backward(Tensor grad, {_OPERANDS}, {_GEOMETRY}, bool[4] wanted) -> "
    "(Tensor input, Tensor weight, Tensor bias, Tensor gate)"
)

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _channels_last(shape, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _forward_into(
    out, input, weight, bias, mask, index, count, shared, gate, stride, padding, dilation, backend
) -> None:
    """What the functional and the in-place forward share."""
    input = _rows(input)
    if backend == "cpu":
        neighbours = shared[0] if shared else None
        module(".cpu.masked_conv").forward(
            input, weight, bias, mask, index, count, neighbours, gate, out, stride, padding, dilation
        )
    else:
        module(".kernels.masked_conv").forward(
            input, weight, bias, index, count, gate, out,
            stride=stride, padding=padding, dilation=dilation, allow_tf32=_allow_tf32(),
        )  # fmt: skip


def _forward(
    input, weight, bias, mask, index, count, shared, gate, inactive, stride, padding, dilation, backend
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], mask.shape[2], mask.shape[3])
    out = _channels_last(shape, input)
    if inactive is None:
        out.zero_()
    else:
        out.copy_(inactive)
    _forward_into(out, input, weight, bias, mask, index, count, shared, gate, stride, padding, dilation, backend)
    return out


def _backward(
    grad,
    input,
    weight,
    bias,
    mask,
    index,
    count,
    shared,
    gate,
    stride,
    padding,
    dilation,
    backend,
    wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, input = _rows(grad), _rows(input)
    if backend == "cpu":
        neighbours = shared[0] if shared else None
        grads = module(".cpu.masked_conv").backward(
            grad, input, weight, bias, mask, index, count, neighbours, gate, wanted, stride, padding, dilation
        )
    else:
        grads = _triton_backward(
            grad, input, weight, bias, mask, index, count, shared, gate, wanted,
            stride=stride, padding=padding, dilation=dilation, allow_tf32=_allow_tf32(),
        )  # fmt: skip
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


def _triton_backward(grad, input, weight, bias, mask, index, count, shared, gate, wanted, **geometry):
    kernels, compaction = module(".kernels.masked_conv"), module(".kernels.compaction")
    grad_input = grad_weight = grad_bias = grad_gate = None
    if wanted[0]:
        grad_input = _channels_last(input.shape, input).zero_()
        if not shared:
            where = (geometry["stride"], geometry["padding"], geometry["dilation"])
            touched = compaction.touched(mask, mask.shape[2:], input.shape[2:], weight.shape[2:], *where)
            shared = [compaction.inverse_map(index, count, index.numel()), *compaction.compact(touched)]
        kernels.input_grad(grad, weight, *shared, gate, grad_input, **geometry)
    if wanted[1]:
        grad_weight = kernels.weight_grad(input, grad, index, count, gate, weight, **geometry)
    if wanted[2]:
        grad_bias = kernels.bias_grad(grad, index, count, gate)
    if wanted[3]:
        grad_gate = kernels.gate_grad(input, weight, bias, grad, index, count, **geometry).view(gate.shape)
    return grad_input, grad_weight, grad_bias, grad_gate


def _allow_tf32() -> bool:
    """The switch that F.conv2d obeys for float32 on CUDA."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _in_place(out, input, *rest) -> None:
    if torch._C._is_alias_of(out, input):
        raise ValueError("out: expected memory of its own, got a tensor that shares the input's")
    _forward_into(out, input, *rest)
    torch.autograd.graph.increment_version(out)  # a graph that saved what was overwritten has to notice


for _key in ("CPU", "CUDA"):
    _library.impl("masked_conv2d", _forward, _key)
    _library.impl("masked_conv2d_", _in_place, _key)
    _library.impl("masked_conv2d_backward", _backward, _key)


@torch.library.register_fake("dynconv::masked_conv2d", lib=_library)
def _(input, weight, bias, mask, index, count, shared, gate, inactive, stride, padding, dilation, backend):
    return _channels_last((input.shape[0], weight.shape[0], mask.shape[2], mask.shape[3]), input)


@torch.library.register_fake("dynconv::masked_conv2d_", lib=_library)
def _(out, input, weight, bias, mask, index, count, shared, gate, stride, padding, dilation, backend):
    return None


@torch.library.register_fake("dynconv::masked_conv2d_backward", lib=_library)
def _(
    grad,
    input,
    weight,
    bias,
    mask,
    index,
    count,
    shared,
    gate,
    stride,
    padding,
    dilation,
    backend,
    wanted,
):
    return (
        _channels_last(input.shape, input) if wanted[0] else grad.new_empty(0),
        torch.empty_like(weight) if wanted[1] else grad.new_empty(0),
        weight.new_empty(weight.shape[0]) if wanted[2] else grad.new_empty(0),
        torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted[3] else grad.new_empty(0),
    )


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, mask, index, count, shared, gate, inactive, *geometry):
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.dynconv.masked_conv2d(
                input, weight, bias, mask, index, count, shared, gate, inactive, *geometry
            )
        ctx.save_for_backward(input, weight, bias, mask, index, count, gate, *shared)
        ctx.geometry = geometry
        return out

    @staticmethod
    def backward(ctx, grad):
        # Once: checkpointing recomputes what it unpacks.
        input, weight, bias, mask, index, count, gate, *shared = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[1], needs[2], needs[7]]
        grads = [None] * 4
        if any(wanted):
            results = torch.ops.dynconv.masked_conv2d_backward(
                grad, input, weight, bias, mask, index, count, shared, gate, *ctx.geometry, wanted
            )
            grads = [result if want else None for result, want in zip(results, wanted, strict=True)]
        inactive = grad.masked_fill(mask, 0) if needs[8] else None
        return (*grads[:3], None, None, None, None, grads[3], inactive, None, None, None, None)


class _MaskedConv2dBackward(torch.autograd.Function):
    """Here so that a second derivative is refused rather than silently taken as zero."""

    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dynconv.masked_conv2d_backward(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("masked_conv2d: differentiable once, got a second derivative (create_graph=True)")


_library.impl("masked_conv2d", _MaskedConv2d.apply, "Autograd")
_library.impl("masked_conv2d_backward", _MaskedConv2dBackward.apply, "Autograd")


@register_flop_formula(torch.ops.dynconv.masked_conv2d, get_raw=True)
def _forward_flops(input, weight, bias, mask, index, count, *rest, **unused) -> int:
    return _product_flops(weight, index, count)


@register_flop_formula(torch.ops.dynconv.masked_conv2d_, get_raw=True)
def _in_place_flops(out, input, weight, bias, mask, index, count, *rest, **unused) -> int:
    return _product_flops(weight, index, count)


@register_flop_formula(torch.ops.dynconv.masked_conv2d_backward, get_raw=True)
def _backward_flops(grad, input, weight, bias, mask, index, count, *rest, **unused) -> int:
    input_wanted, weight_wanted, _, gate_wanted = rest[-1]
    return (weight_wanted + (input_wanted or gate_wanted)) * _product_flops(weight, index, count)


def _product_flops(weight: Tensor, index: Tensor, count: Tensor) -> int:
    """2 * active sites * Cout * Cin * kH * kW; every site counts where the mask is not known (fake tensors)."""
    sites = index.numel() if count.is_meta or is_fake(count) else int(count)
    return 2 * sites * weight.numel()


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    mask: Tensor | ActiveSites | None = None,
    inactive: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """2-D convolution at the active output sites only: `where(mask, conv2d(input), inactive)`.

    Skipped sites are not computed, forward or backward: the cost falls with the mask, and NaN or Inf in pixels
    that only skipped sites would read reaches neither the output nor a gradient. An active site reads its whole
    neighbourhood, active or not (this is not a submanifold convolution). float32, float64, float16 and bfloat16;
    half types accumulate in float32. Differentiable once, in `input`, `weight`, `bias`, a floating `mask` and
    `inactive`. `groups` > 1 computes every site (one warning says so).

    The masks of DynConv (Verelst & Tuytelaars, CVPR 2020) and LASNet (Han et al., NeurIPS 2022), the in-place
    update of SIGE (Li et al., NeurIPS 2022).

    Args:
        input: [N, Cin, H, W]; channels_last is the fast path, anything else is copied first.
        weight: [Cout, Cin / groups, kH, kW].
        bias: [Cout].
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, "same" and "valid" included.
        mask: bool, broadcastable to [N, 1, Ho, Wo] ([N, 1, 1, 1] skips whole samples), or `ActiveSites` made
            once for several layers. A floating mask is a gate: active where it is not zero, its value multiplies
            the output, and its gradient is the sum over channels of grad * conv at the active sites and zero
            elsewhere. None computes every site.
        inactive: the output at the skipped sites, of the output's shape and type; None is zeros.
        out: inference only: a channels_last tensor of the output's shape and type to update in place at the active
            sites and nowhere else. The cost is then proportional to the active sites alone.

    Returns:
        [N, Cout, Ho, Wo] in channels_last, or `out`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or memory format, or arguments that exclude each other.
            Nothing has been written then.
    """
    geometry, size = _check_operands(input, weight, bias, stride, padding, dilation, groups)
    input, weight, bias, inactive = _autocast(input, weight, bias, inactive)
    _check_types(input, weight, bias)
    shape = (input.shape[0], weight.shape[0], *size)
    _check_result("inactive", inactive, shape, input)
    _check_result("out", out, shape, input)
    sites = _sites(mask, input, shape, geometry)
    if out is not None:
        _check_out(out, inactive, input, weight, bias, sites)
    backend = backend_for(input.device)
    if groups > 1 and sites is not None and backend != "reference":
        if not torch.compiler.is_compiling():
            warn_once("masked_conv2d: groups > 1 computes every site; the mask saves no time there")
        return _grouped(input, weight, bias, stride, padding, dilation, groups, sites, inactive, out)
    if backend == "reference":
        return reference.masked_conv2d(
            input, weight, bias, stride, padding, dilation, groups, mask=sites, inactive=inactive, out=out
        )
    if sites is None:
        result = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        result = result.contiguous(memory_format=torch.channels_last)
        if inactive is not None:  # nothing is inactive; its gradient is zero, not None
            result = torch.where(torch.ones((), dtype=torch.bool, device=input.device), result, inactive)
        return result if out is None else out.copy_(result)
    gate = sites.gate
    if gate is not None:
        gate = gate.to(torch.promote_types(input.dtype, torch.float32)).contiguous()
    shared = _shared(sites, input, geometry, backend) if sites is mask else []
    operands = (input, weight, bias, sites.mask, sites.index, sites.count, shared, gate)
    where = (geometry.stride, geometry.padding, geometry.dilation, backend)
    if out is None:
        return torch.ops.dynconv.masked_conv2d(*operands, inactive, *where)
    torch.ops.dynconv.masked_conv2d_(out, *operands, *where)
    return out


def _shared(sites: ActiveSites, input: Tensor, geometry: Geometry, backend: str) -> list[Tensor]:
    """What layers with the same sites share; a call with a mask of its own makes it inside the op.

    The CPU kernels read addresses from the neighbour table. The Triton kernels compute them in registers, and need the
    inverse map and the pixels that the sites read for the input's gradient.
    """
    size = (input.shape[2], input.shape[3])
    if backend == "cpu":
        return [sites._neighbours(size, geometry)]
    if not (torch.is_grad_enabled() and input.requires_grad):
        return []
    touched = sites._touched_by(size, geometry)
    return [sites.inverse, touched.index, touched.count]


def _grouped(input, weight, bias, stride, padding, dilation, groups, sites, inactive, out) -> Tensor:
    """The dense path. ATen's grouped float16 gradients on a CPU add up in float16: there, all of it in float32."""
    wide = torch.float32 if input.device.type == "cpu" and input.dtype == torch.float16 else input.dtype
    operands = [None if t is None else t.to(wide) for t in (input, weight, bias)]
    filler = out if inactive is None else inactive
    filler = None if filler is None else filler.to(wide)
    result = reference.masked_conv2d(*operands, stride, padding, dilation, groups, mask=sites, inactive=filler)
    result = result.to(input.dtype)
    return result if out is None else out.copy_(result)


def _check_operands(input, weight, bias, stride, padding, dilation, groups) -> tuple[Geometry, tuple[int, int]]:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATING:
            raise TypeError(f"{name}: expected a float32, float64, float16 or bfloat16 tensor, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected a tensor on {input.device}, where the input is, got {tensor.device}")
    if input.dim() != 4:
        raise ValueError(f"input: expected shape [N, Cin, H, W], got {list(input.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight: expected a shape [Cout, Cin / groups, kH, kW] of no zeros, got {list(weight.shape)}")
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups: expected an int, got {groups!r}")
    if groups < 1 or weight.shape[0] % groups or input.shape[1] % groups:
        raise ValueError(
            f"groups: expected a divisor of Cin = {input.shape[1]} and Cout = {weight.shape[0]}, got {groups}"
        )
    if weight.shape[1] * groups != input.shape[1]:
        raise ValueError(
            f"weight: expected {input.shape[1] // groups} input channels for an input of {input.shape[1]} and groups "
            f"{groups}, got {weight.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    geometry = Geometry.of(tuple(weight.shape[2:]), stride, padding, dilation)
    return geometry, geometry.output_size(input.shape[2], input.shape[3])


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does for F.conv2d: everything but float64 in its lower precision."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check_types(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected {input.dtype}, the input's type, got {tensor.dtype}")


def _check_result(name: str, tensor: Tensor | None, shape: tuple[int, ...], input: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != input.dtype:
        raise TypeError(f"{name}: expected {input.dtype}, the output's type, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected a tensor on {input.device}, where the input is, got {tensor.device}")


def _sites(
    mask: Tensor | ActiveSites | None, input: Tensor, shape: tuple[int, ...], geometry: Geometry
) -> ActiveSites | None:
    if mask is None:
        return None
    size = (shape[0], shape[2], shape[3])
    sites = mask if isinstance(mask, ActiveSites) else ActiveSites(mask, size)
    if sites.shape != size:
        raise ValueError(f"mask: expected sites of {list(size)} (N, Ho, Wo), got {list(sites.shape)}")
    if sites.mask.device != input.device:
        raise ValueError(f"mask: expected a mask on {input.device}, where the input is, got {sites.mask.device}")
    sites._check((input.shape[2], input.shape[3]), geometry)
    return sites


def _check_out(out, inactive, input, weight, bias, sites) -> None:
    if inactive is not None:
        raise ValueError("out: expected no `inactive` beside it (out itself holds the skipped sites), got both")
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out: expected a channels_last tensor, got strides {list(out.stride())}")
    gate = None if sites is None else sites.gate
    tracked = [t for t in (out, input, weight, bias, gate) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and tracked:
        raise ValueError("out: expected torch.no_grad() (it is for inference only), got tensors that need gradients")


@functools.cache
def warn_once(message: str) -> None:
    """A UserWarning at the first call with that message, and never again in this process."""
    warnings.warn(message, stacklevel=3)
