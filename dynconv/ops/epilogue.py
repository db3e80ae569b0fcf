"""What follows a convolution in a packed chain: normalisation, gate, residual, activation, and where it is written.

In inference the convolutions do all of that themselves. Training needs the convolution's own result for its
derivatives, so there it is an op: out = activation(gate * ((rows - mean) * scale + shift) + residual).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._arguments import kind_of
from .._backend import backend_for, module
from ..packed import PackedFeatures
from ..sites import ActiveSites
from ._common import (
    autocast,
    channels_last,
    check_activation,
    check_features,
    check_operand,
    check_out,
    check_overlap,
    check_residual,
    check_result,
    check_rows,
    expanded_inactive,
    gate_of,
    in_rows,
    is_same_memory,
    new_rows,
    once_differentiable,
    register_autograd,
)

_library = torch.library.Library("dynconv", "FRAGMENT")
_SITES = "Tensor mask, Tensor index, Tensor count"
_OPERANDS = f"Tensor rows, {_SITES}, Tensor? mean, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual"
_library.define(f"epilogue({_OPERANDS}, Tensor? inactive, str activation, bool packed, str backend) -> Tensor")
_library.define(f"epilogue_(Tensor(a!) out, {_OPERANDS}, bool accumulate, str activation, str backend) -> ()")
_library.define(
    f"epilogue_backward(Tensor grad, {_OPERANDS}, str activation, str backend, bool is_shortcut, bool[4] wanted) -> "
    "(Tensor rows, Tensor scale, Tensor shift, Tensor gate, Tensor residual)"
)
_NORM = f"Tensor rows, {_SITES}, Tensor? weight, Tensor? bias, Tensor? gate, Tensor? residual"
_library.define(
    f"batch_norm({_NORM}, Tensor? inactive, float eps, str activation, bool packed, str backend) -> "
    "(Tensor out, Tensor mean, Tensor variance)"
)
_library.define(
    f"batch_norm_backward(Tensor grad, Tensor mean, Tensor variance, {_NORM}, float eps, str activation, str backend, "
    "bool is_shortcut, bool[4] wanted) -> (Tensor rows, Tensor weight, Tensor bias, Tensor gate, Tensor residual)"
)
_library.define("pack(Tensor input, Tensor mask, Tensor index, Tensor count, str backend) -> Tensor")


def _fill(mask: Tensor, out: Tensor, inactive: Tensor | None) -> None:
    """Write the skipped sites of a dense tensor on a GPU; the CPU kernels do it as they go."""
    compaction = module(".kernels.compaction")
    compaction.fill_skipped(mask, compaction.Fill(out, in_rows(inactive)))


def _kernels(backend: str):
    return module(".cpu.epilogue" if backend == "cpu" else ".kernels.epilogue")


def _into(
    out, rows, mask, index, count, mean, scale, shift, gate, residual, inactive, in_place, activation, backend
) -> None:
    operands = (in_rows(rows), index, count, mean, scale, shift, gate, in_rows(residual), out)
    if backend == "cpu":
        check_rows(rows, count)
        module(".cpu.epilogue").forward(*operands, in_rows(inactive), in_place, activation)
    else:
        if not in_place and out.dim() == 4:
            _fill(mask, out, inactive)
        module(".kernels.epilogue").forward(*operands, activation=activation)


def _epilogue(
    rows, mask, index, count, mean, scale, shift, gate, residual, inactive, activation, packed, backend
) -> Tensor:
    if packed:
        out = new_rows(*rows.shape, rows, count, backend)
    else:
        out = channels_last((mask.shape[0], rows.shape[1], mask.shape[2], mask.shape[3]), rows)
    _into(out, rows, mask, index, count, mean, scale, shift, gate, residual, inactive, False, activation, backend)
    return out


def _in_place(
    out, rows, mask, index, count, mean, scale, shift, gate, residual, accumulate, activation, backend
) -> None:
    check_overlap("out", out, rows=rows, mask=mask, mean=mean, scale=scale, shift=shift, gate=gate, residual=residual)
    residual = out if accumulate else residual
    _into(out, rows, mask, index, count, mean, scale, shift, gate, residual, None, True, activation, backend)
    torch.autograd.graph.increment_version(out)


def _backward(
    grad, rows, mask, index, count, mean, scale, shift, gate, residual, activation, backend, is_shortcut, wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`is_shortcut`: the residual stands at the skipped sites as well, and its gradient there is the output's."""
    grad, rows = in_rows(grad), in_rows(rows)
    grad_rows = new_rows(*rows.shape, rows, count, backend) if wanted[0] else None
    grad_residual = None
    if wanted[3]:
        grad_residual = torch.empty_like(grad) if grad.dim() == 4 else new_rows(*grad.shape, grad, count, backend)
    elsewhere = grad if is_shortcut else None
    operands = (grad, rows, index, count, mean, scale, shift, gate, in_rows(residual), grad_rows, grad_residual)
    vectors_and_gate = (wanted[1], wanted[2])
    if backend == "cpu":
        results = module(".cpu.epilogue").backward(*operands, elsewhere, activation, vectors_and_gate)
    else:
        if grad_residual is not None and grad_residual.dim() == 4:
            _fill(mask, grad_residual, elsewhere)
        results = module(".kernels.epilogue").backward(*operands, activation=activation, wanted=vectors_and_gate)
    grad_scale, grad_shift, grad_gate = results
    if grad_gate is not None:
        grad_gate = grad_gate.view(gate.shape)
    results = (grad_rows, grad_scale, grad_shift, grad_gate, grad_residual)
    return tuple(grad.new_empty(0) if g is None else g for g in results)


def _scale(variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = (variance + eps).rsqrt()
    return scale if weight is None else scale * weight


def _batch_norm(
    rows, mask, index, count, weight, bias, gate, residual, inactive, eps, activation, packed, backend
) -> tuple[Tensor, Tensor, Tensor]:
    rows = in_rows(rows)
    mean, variance = _kernels(backend).moments(rows, count)
    scale, shift = _scale(variance, weight, eps), None if bias is None else bias.to(mean.dtype)
    operands = (rows, mask, index, count, mean, scale, shift, gate, residual)
    return _epilogue(*operands, inactive, activation, packed, backend), mean, variance


def _batch_norm_backward(
    grad, mean, variance, rows, mask, index, count, weight, bias, gate, residual, eps, activation, backend,
    is_shortcut, wanted,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = in_rows(rows)
    scale, shift = _scale(variance, weight, eps), None if bias is None else bias.to(mean.dtype)
    operands = (rows, mask, index, count, mean, scale, shift, gate, residual)
    vectors = wanted[0] or wanted[1]
    grad_rows, grad_scale, grad_shift, *others = _backward(
        grad, *operands, activation, backend, is_shortcut, [wanted[0], vectors, *wanted[2:]]
    )
    if not vectors:
        return grad_rows, grad_scale, grad_shift, *others
    spread = (variance + eps).rsqrt()
    if wanted[0]:
        # The mean and the variance depend on every row: + (rows - mean) * a + b, which is an epilogue in place.
        sites = count.clamp(min=1)
        slope = -grad_scale * scale * spread * spread / sites
        _into(
            grad_rows, rows, mask, index, count, mean, slope, -scale * grad_shift / sites, None, grad_rows, None, True,
            "none", backend,
        )  # fmt: skip
    grad_weight = grad.new_empty(0) if weight is None else (grad_scale * spread).to(weight.dtype)
    grad_bias = grad.new_empty(0) if bias is None else grad_shift.to(bias.dtype)
    return grad_rows, grad_weight, grad_bias, *others


def _pack(input, mask, index, count, backend) -> Tensor:
    rows = new_rows(index.shape[0], input.shape[1], input, count, backend)
    _kernels(backend).gather(in_rows(input), index, count, rows)
    return rows


for _key in ("CPU", "CUDA"):
    _library.impl("epilogue", _epilogue, _key)
    _library.impl("epilogue_", _in_place, _key)
    _library.impl("epilogue_backward", _backward, _key)
    _library.impl("batch_norm", _batch_norm, _key)
    _library.impl("batch_norm_backward", _batch_norm_backward, _key)
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
def _(grad, rows, mask, index, count, mean, scale, shift, gate, residual, activation, backend, is_shortcut, wanted):
    vector = rows.new_empty(rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    like_grad = channels_last(grad.shape, grad) if grad.dim() == 4 else grad.new_empty(grad.shape)
    return (
        rows.new_empty(rows.shape) if wanted[0] else grad.new_empty(0),
        vector if wanted[1] else grad.new_empty(0),
        torch.empty_like(vector) if wanted[1] else grad.new_empty(0),
        torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted[2] else grad.new_empty(0),
        like_grad if wanted[3] else grad.new_empty(0),
    )


@torch.library.register_fake("dynconv::batch_norm", lib=_library)
def _(rows, mask, index, count, weight, bias, gate, residual, inactive, eps, activation, packed, backend):
    vector = rows.new_empty(rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    size = (mask.shape[0], rows.shape[1], mask.shape[2], mask.shape[3])
    out = rows.new_empty(rows.shape) if packed else channels_last(size, rows)
    return out, vector, torch.empty_like(vector)


@torch.library.register_fake("dynconv::batch_norm_backward", lib=_library)
def _(
    grad, mean, variance, rows, mask, index, count, weight, bias, gate, residual, eps, activation, backend,
    is_shortcut, wanted,
):  # fmt: skip
    def vector(like):
        return grad.new_empty(0) if like is None else like.new_empty(like.shape)

    vectors = wanted[0] or wanted[1]
    like_grad = channels_last(grad.shape, grad) if grad.dim() == 4 else grad.new_empty(grad.shape)
    return (
        rows.new_empty(rows.shape) if wanted[0] else grad.new_empty(0),
        vector(weight if vectors else None),
        vector(bias if vectors else None),
        torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted[2] else grad.new_empty(0),
        like_grad if wanted[3] else grad.new_empty(0),
    )


@torch.library.register_fake("dynconv::pack", lib=_library)
def _(input, mask, index, count, backend):
    return input.new_empty(index.shape[0], input.shape[1])


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, mask, index, count, mean, scale, shift, gate, residual, inactive, *rest):
        operands = (rows, mask, index, count, mean, scale, shift, gate, residual)
        ctx.save_for_backward(*operands)
        ctx.activation, _, ctx.backend = rest
        ctx.is_shortcut = inactive is not None and inactive is residual
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dynconv.epilogue(*operands, inactive, *rest)

    @staticmethod
    def backward(ctx, grad):
        operands = ctx.saved_tensors
        _, mask, _, _, _, scale, *_ = operands
        needs = ctx.needs_input_grad
        wanted = [needs[0], any(needs[4:7]), needs[7], needs[8]]
        rows, grad_scale, grad_shift, gate, residual = torch.ops.dynconv.epilogue_backward(
            grad, *operands, ctx.activation, ctx.backend, ctx.is_shortcut, wanted
        )
        mean = None
        if needs[4]:
            mean = -grad_shift if scale is None else -grad_shift * scale
        return (
            rows if needs[0] else None, None, None, None, mean, grad_scale if needs[5] else None,
            grad_shift if needs[6] else None, gate if needs[7] else None, residual if needs[8] else None,
            grad.masked_fill(mask, 0) if needs[9] and not ctx.is_shortcut else None, None, None, None,
        )  # fmt: skip


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, mask, index, count, weight, bias, gate, residual, inactive, *rest):
        operands = (rows, mask, index, count, weight, bias, gate, residual)
        with torch._C._AutoDispatchBelowAutograd():
            out, mean, variance = torch.ops.dynconv.batch_norm(*operands, inactive, *rest)
        ctx.save_for_backward(mean, variance, *operands)
        ctx.mark_non_differentiable(mean, variance)
        ctx.eps, ctx.activation, _, ctx.backend = rest
        ctx.is_shortcut = inactive is not None and inactive is residual
        return out, mean, variance

    @staticmethod
    def backward(ctx, grad, *nothing):
        operands = ctx.saved_tensors
        needs, mask = ctx.needs_input_grad, operands[3]
        wanted = [needs[0], needs[4] or needs[5], needs[6], needs[7]]
        rows, weight, bias, gate, residual = torch.ops.dynconv.batch_norm_backward(
            grad, *operands, ctx.eps, ctx.activation, ctx.backend, ctx.is_shortcut, wanted
        )
        return (
            rows if needs[0] else None, None, None, None, weight if needs[4] else None, bias if needs[5] else None,
            gate if needs[6] else None, residual if needs[7] else None,
            grad.masked_fill(mask, 0) if needs[8] and not ctx.is_shortcut else None, None, None, None, None,
        )  # fmt: skip


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


register_autograd(_library, "epilogue", _Epilogue.apply)
register_autograd(_library, "epilogue_")
once_differentiable(_library, "epilogue")
register_autograd(_library, "batch_norm", _BatchNorm.apply)
once_differentiable(_library, "batch_norm")
register_autograd(_library, "pack", _Pack.apply)


def epilogue(
    features: PackedFeatures,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | PackedFeatures | None = None,
    inactive: Tensor | float | None = None,
    out: Tensor | None = None,
    packed: bool = False,
) -> Tensor | PackedFeatures:
    """where(active, activation(gate * ((features - mean) * scale + shift) + residual), inactive), dense or packed.

    `mean`, `scale` and `shift` are [C] in the type that the features are computed in (float32, float64 for float64);
    the other arguments and the errors are those of `masked_conv2d`.
    """
    rows, addend, inactive, residual = _check(features, activation, residual, inactive, out, packed)
    _check_vectors(rows, mean=mean, scale=scale, shift=shift)
    sites = features.sites
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
        accumulate = is_same_memory(addend, out)
        torch.ops.dynconv.epilogue_(out, *operands, None if accumulate else addend, accumulate, kind, backend)
        return out
    result = torch.ops.dynconv.epilogue(*operands, addend, inactive, kind, packed, backend)
    return PackedFeatures(result, sites) if packed else result


def batch_norm(
    features: PackedFeatures,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | PackedFeatures | None = None,
    inactive: Tensor | float | None = None,
    packed: bool = False,
) -> tuple[Tensor | PackedFeatures, Tensor, Tensor]:
    """The epilogue with the features normalised by their own mean and biased variance over the active sites.

    `weight` and `bias` are [C] or None. Returns the result, the mean and the variance, the latter two [C] in float32
    (float64 for float64), zeros where no site is active, and not differentiable. Ioffe & Szegedy, ICML 2015.
    """
    rows, addend, inactive, residual = _check(features, activation, residual, inactive, None, packed)
    _check_vectors(rows, weight=weight, bias=bias)
    sites, backend = features.sites, backend_for(rows.device)
    if backend == "reference":
        return reference.batch_norm(
            PackedFeatures(rows, sites), weight, bias, eps, activation=activation, residual=residual,
            inactive=inactive, packed=packed,
        )  # fmt: skip
    operands = (rows, sites.mask, sites.index, sites.count, weight, bias, gate_of(sites, rows.dtype), addend)
    result, mean, variance = torch.ops.dynconv.batch_norm(
        *operands, inactive, eps, activation or "none", packed, backend
    )
    return PackedFeatures(result, sites) if packed else result, mean, variance


def _check(features, activation, residual, inactive, out, packed):
    """The features' rows, the residual's, and both in autocast's type with what is inactive."""
    rows = check_features("features", features)
    check_activation(activation)
    rows, inactive, residual = autocast(rows, inactive, residual)
    shape = features.shape
    inactive = expanded_inactive(inactive, shape, rows)
    check_result("out", out, shape, rows)
    if packed and inactive is not None:
        raise ValueError("inactive: expected None for a packed output, which has no skipped sites, got a tensor")
    addend = check_residual(residual, features.sites, shape, rows, packed)
    if packed and addend is not None and addend.shape != rows.shape:  # one of them was made by hand, or in a graph
        least = min(rows.shape[0], addend.shape[0])
        rows, addend = rows[:least], addend[:least]
        residual = PackedFeatures(addend, features.sites)
    return rows, addend, inactive, residual


def _check_vectors(rows: Tensor, **vectors: Tensor | None) -> None:
    """That there is a number for each channel: the kernels read as many."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_operand(name, vector, rows)
        if vector.shape != rows.shape[1:]:
            raise ValueError(f"{name}: expected shape {list(rows.shape[1:])}, got {list(vector.shape)}")


def pack(input: Tensor, sites: ActiveSites) -> PackedFeatures:
    """See `dynconv.pack`."""
    if not isinstance(sites, ActiveSites):
        raise TypeError(f"active: expected ActiveSites or ActiveChannels, got {kind_of(sites)}")
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
    return PackedFeatures(
        torch.ops.dynconv.pack(input, sites.mask, sites._packed_index(backend), sites.count, backend), sites
    )
