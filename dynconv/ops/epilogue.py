"""What follows a convolution in a packed chain: normalisation, gate, residual, activation, and where it is written.

In inference the convolutions do all of that themselves. Training needs the convolution's own result for its
derivatives, so there it is an op: out = activation(gate * ((rows - mean) * scale + shift) + residual).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._backend import backend_for, module
from ..packed import PackedFeatures
from ..sites import ActiveSites
from ._common import (
    autocast,
    channels_last,
    check_activation,
    check_features,
    check_out,
    check_residual,
    check_result,
    fill,
    gate_of,
    in_rows,
)

_library = torch.library.Library("dynconv", "FRAGMENT")
_SITES = "Tensor mask, Tensor index, Tensor count"
_OPERANDS = f"Tensor rows, {_SITES}, Tensor? mean, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual"
_library.define(f"epilogue({_OPERANDS}, Tensor? inactive, str activation, bool packed, str backend) -> Tensor")
_library.define(f"epilogue_(Tensor(a!) out, {_OPERANDS}, bool accumulate, str activation, str backend) -> ()")
_library.define(
    f"epilogue_backward(Tensor grad, {_OPERANDS}, str activation, str backend, bool[4] wanted) -> "
    "(Tensor rows, Tensor scale, Tensor shift, Tensor gate, Tensor residual)"
)
_library.define("moments(Tensor rows, Tensor index, Tensor count, str backend) -> (Tensor mean, Tensor variance)")
_library.define("pack(Tensor input, Tensor mask, Tensor index, Tensor count, str backend) -> Tensor")


def _kernels(backend: str):
    return module(".cpu.epilogue" if backend == "cpu" else ".kernels.epilogue")


def _into(out, rows, index, count, mean, scale, shift, gate, residual, inactive, in_place, activation, backend) -> None:
    operands = (in_rows(rows), index, count, mean, scale, shift, gate, in_rows(residual), out)
    if backend == "cpu":
        module(".cpu.epilogue").forward(*operands, in_rows(inactive), in_place, activation)
    else:
        fill(out, inactive, in_place)
        module(".kernels.epilogue").forward(*operands, activation=activation)


def _epilogue(
    rows, mask, index, count, mean, scale, shift, gate, residual, inactive, activation, packed, backend
) -> Tensor:
    if packed:
        out = rows.new_empty(rows.shape)
    else:
        out = channels_last((mask.shape[0], rows.shape[1], mask.shape[2], mask.shape[3]), rows)
    _into(out, rows, index, count, mean, scale, shift, gate, residual, inactive, False, activation, backend)
    return out


def _in_place(
    out, rows, mask, index, count, mean, scale, shift, gate, residual, accumulate, activation, backend
) -> None:
    residual = out if accumulate else residual
    _into(out, rows, index, count, mean, scale, shift, gate, residual, None, True, activation, backend)
    torch.autograd.graph.increment_version(out)


def _backward(
    grad, rows, mask, index, count, mean, scale, shift, gate, residual, activation, backend, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, rows = in_rows(grad), in_rows(rows)
    grad_rows = torch.empty_like(rows) if wanted[0] else None
    grad_residual = None
    if wanted[3]:
        grad_residual = torch.empty_like(grad)
        if grad.dim() == 4:
            grad_residual.zero_()
    operands = (grad, rows, index, count, mean, scale, shift, gate, in_rows(residual), grad_rows, grad_residual)
    results = _kernels(backend).backward(*operands, activation=activation, wanted=(wanted[1], wanted[2]))
    grad_scale, grad_shift, grad_gate = results
    if grad_gate is not None:
        grad_gate = grad_gate.view(gate.shape)
    results = (grad_rows, grad_scale, grad_shift, grad_gate, grad_residual)
    return tuple(grad.new_empty(0) if g is None else g for g in results)


def _moments(rows, index, count, backend) -> tuple[Tensor, Tensor]:
    return _kernels(backend).moments(in_rows(rows), count)


def _pack(input, mask, index, count, backend) -> Tensor:
    rows = input.new_empty(index.shape[0], input.shape[1])
    _kernels(backend).gather(in_rows(input), index, count, rows)
    return rows


for _key in ("CPU", "CUDA"):
    _library.impl("epilogue", _epilogue, _key)
    _library.impl("epilogue_", _in_place, _key)
    _library.impl("epilogue_backward", _backward, _key)
    _library.impl("moments", _moments, _key)
    _library.impl("pack", _pack, _key)


@torch.library.register_fake("dynconv::epilogue", lib=_library)
def _(rows, mask, index, count, mean, scale, shift, gate, residual, inactive, activation, packed, backend):
    if packed:
        return rows.new_empty(rows.shape)
    return channels_last((mask.shape[0], rows.shape[1], mask.shape[2], mask.shape[3]), rows)


@torch.library.register_fake("dynconv::epilogue_", lib=_library)
def _(out, rows, mask, index, count, mean, scale, shift, gate, residual, accumulate, activation, backend):
    return None


@torch.library.register_fake("dynconv::epilogue_backward", lib=_library)
def _(grad, rows, mask, index, count, mean, scale, shift, gate, residual, activation, backend, wanted):
    vector = rows.new_empty(rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    like_grad = channels_last(grad.shape, grad) if grad.dim() == 4 else grad.new_empty(grad.shape)
    return (
        rows.new_empty(rows.shape) if wanted[0] else grad.new_empty(0),
        vector if wanted[1] else grad.new_empty(0),
        torch.empty_like(vector) if wanted[1] else grad.new_empty(0),
        torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted[2] else grad.new_empty(0),
        like_grad if wanted[3] else grad.new_empty(0),
    )


@torch.library.register_fake("dynconv::moments", lib=_library)
def _(rows, index, count, backend):
    vector = rows.new_empty(rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    return vector, torch.empty_like(vector)


@torch.library.register_fake("dynconv::pack", lib=_library)
def _(input, mask, index, count, backend):
    return input.new_empty(index.shape[0], input.shape[1])


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, mask, index, count, mean, scale, shift, gate, residual, inactive, *rest):
        operands = (rows, mask, index, count, mean, scale, shift, gate, residual)
        ctx.save_for_backward(*operands)
        ctx.activation, _, ctx.backend = rest
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dynconv.epilogue(*operands, inactive, *rest)

    @staticmethod
    def backward(ctx, grad):
        operands = ctx.saved_tensors
        _, mask, _, _, _, scale, *_ = operands
        needs = ctx.needs_input_grad
        wanted = [needs[0], any(needs[4:7]), needs[7], needs[8]]
        rows, grad_scale, grad_shift, gate, residual = torch.ops.dynconv.epilogue_backward(
            grad, *operands, ctx.activation, ctx.backend, wanted
        )
        mean = None
        if needs[4]:
            mean = -grad_shift if scale is None else -grad_shift * scale
        return (
            rows if needs[0] else None, None, None, None, mean, grad_scale if needs[5] else None,
            grad_shift if needs[6] else None, gate if needs[7] else None, residual if needs[8] else None,
            grad.masked_fill(mask, 0) if needs[9] else None, None, None, None,
        )  # fmt: skip


class _EpilogueBackward(torch.autograd.Function):
    """Here so that a second derivative is refused rather than silently taken as zero."""

    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dynconv.epilogue_backward(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("epilogue: differentiable once, got a second derivative (create_graph=True)")


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, count, backend):
        with torch._C._AutoDispatchBelowAutograd():
            mean, variance = torch.ops.dynconv.moments(rows, index, count, backend)
        ctx.save_for_backward(rows, index, count, mean)
        ctx.backend = backend
        return mean, variance

    @staticmethod
    def backward(ctx, grad_mean, grad_variance):
        rows, index, count, mean = ctx.saved_tensors
        sites = count.clamp(min=1)
        # (grad_mean + 2 * (rows - mean) * grad_variance) / sites is an epilogue too; packed, it has no use for a mask.
        scale, shift = 2 * grad_variance / sites, grad_mean / sites
        rest = (None, None, None, "none", True, ctx.backend)
        grad = torch.ops.dynconv.epilogue(rows, count, index, count, mean, scale, shift, *rest)
        return grad, None, None, None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, mask, index, count, backend):
        ctx.save_for_backward(mask, index, count)
        ctx.backend = backend
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dynconv.pack(input, mask, index, count, backend)

    @staticmethod
    def backward(ctx, grad):
        nothing = (None,) * 6
        grad = torch.ops.dynconv.epilogue(grad, *ctx.saved_tensors, *nothing, "none", False, ctx.backend)
        return grad, None, None, None, None


_library.impl("epilogue", _Epilogue.apply, "Autograd")
_library.impl("epilogue_backward", _EpilogueBackward.apply, "Autograd")
_library.impl("moments", _Moments.apply, "Autograd")
_library.impl("pack", _Pack.apply, "Autograd")


def epilogue(
    features: PackedFeatures,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | PackedFeatures | None = None,
    inactive: Tensor | None = None,
    out: Tensor | None = None,
    packed: bool = False,
) -> Tensor | PackedFeatures:
    """where(active, activation(gate * ((features - mean) * scale + shift) + residual), inactive), dense or packed.

    `mean`, `scale` and `shift` are [C] in the type that the features are computed in (float32, float64 for float64);
    the other arguments and the errors are those of `masked_conv2d`.
    """
    rows = check_features("features", features)
    check_activation(activation)
    sites = features.sites
    rows, inactive, residual = autocast(rows, inactive, residual)
    shape = features.shape
    check_result("inactive", inactive, shape, rows)
    check_result("out", out, shape, rows)
    addend = check_residual(residual, sites, shape, rows, packed)
    if packed and inactive is not None:
        raise ValueError("inactive: expected None for a packed output, which has no skipped sites, got a tensor")
    if out is not None:
        check_out(out, inactive, packed, rows, mean, scale, shift, sites.gate, addend)
    backend = backend_for(rows.device)
    if backend == "reference":
        return reference.epilogue(
            PackedFeatures(rows, sites), mean=mean, scale=scale, shift=shift, activation=activation, residual=residual,
            inactive=inactive, out=out, packed=packed,
        )  # fmt: skip
    gate, kind = gate_of(sites, rows.dtype), activation or "none"
    operands = (rows, sites.mask, sites.index, sites.count, mean, scale, shift, gate)
    if out is not None:
        accumulate = addend is not None and addend.data_ptr() == out.data_ptr()
        torch.ops.dynconv.epilogue_(out, *operands, None if accumulate else addend, accumulate, kind, backend)
        return out
    result = torch.ops.dynconv.epilogue(*operands, addend, inactive, kind, packed, backend)
    return PackedFeatures(result, sites) if packed else result


def moments(features: PackedFeatures) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) over the active sites, each [C] in float32 (float64 for float64); zeros for no site."""
    rows = check_features("features", features)
    backend = backend_for(rows.device)
    if backend == "reference":
        return reference.moments(features)
    return torch.ops.dynconv.moments(rows, features.sites.index, features.sites.count, backend)


def pack(input: Tensor, sites: ActiveSites) -> PackedFeatures:
    """See `dynconv.pack`."""
    if not isinstance(sites, ActiveSites):
        raise TypeError(f"sites: expected ActiveSites, got {type(sites).__name__}")
    if isinstance(input, PackedFeatures):
        raise TypeError("input: expected a dense tensor, got PackedFeatures")
    check_features("input", input)
    n, height, width = sites.shape
    if input.dim() != 4 or (input.shape[0], input.shape[2], input.shape[3]) != (n, height, width):
        raise ValueError(f"input: expected shape [{n}, C, {height}, {width}], as the sites, got {list(input.shape)}")
    if input.device != sites.mask.device:
        raise ValueError(f"input: expected a tensor on {sites.mask.device}, where the sites are, got {input.device}")
    backend = backend_for(input.device)
    if backend == "reference":
        return reference.pack(input, sites)
    return PackedFeatures(torch.ops.dynconv.pack(input, sites.mask, sites.index, sites.count, backend), sites)
