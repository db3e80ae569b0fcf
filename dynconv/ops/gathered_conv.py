"""gathered_conv2d: a convolution of the channels that each sample keeps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .. import calibration, reference
from .._arguments import check_pixels, kind_of
from .._backend import backend_for, module, unwatched
from .._flops import register_flop_formula
from .._geometry import Geometry, IntPair, Padding, plain
from ..channels import ActiveChannels
from ..packed import PackedChannels
from ..sites import ActiveSites
from ._channel_calls import ChannelCall, Kept, keep_where
from ._common import (
    FLOATING,
    Compacted,
    activate_,
    allow_tf32,
    autocast,
    channels_last,
    check_activation,
    check_convolution,
    check_types,
    expanded,
    expanded_inactive,
    in_rows,
    is_unbatched,
    once_differentiable,
    register_autograd,
    settle,
    sites_of,
)
from .masked_conv import masked_conv2d

# `sites`: None (AOTInductor makes that of an empty list), or the mask, index and count of an ActiveSites.
# `capacity`: the channels of a packed output, or -1.
# `is_chosen`: whether a mask was given for the input's channels, and for the output's.
_SETS = "Tensor in_index, Tensor in_count, Tensor out_index, Tensor out_count, Tensor[]? sites"
_GEOMETRY = (
    "SymInt[2] size, int[2] stride, int[2] padding, int[2] dilation, int groups, int granularity, str backend, "
    "str execution, bool[2] is_chosen"
)
_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(
    f"gathered_conv2d(Tensor input, Tensor weight, Tensor? bias, {_SETS}, Tensor? gate, Tensor? residual, "
    f"Tensor? inactive, str activation, bool packed_input, SymInt capacity, {_GEOMETRY}) -> Tensor"
)
_library.define(
    f"gathered_conv2d_backward(Tensor grad, Tensor input, Tensor weight, {_SETS}, bool packed_input, bool packed, "
    f"{_GEOMETRY}, bool[3] wanted) -> (Tensor input, Tensor weight, Tensor bias)"
)


def _place(size, input, weight, stride, padding, dilation) -> tuple[int, ...]:
    """The geometry as the CPU kernels take it."""
    return (*size, *input.shape[2:], *weight.shape[2:], *stride, *padding, *dilation)


def _forward(
    input, weight, bias, in_index, in_count, out_index, out_count, sites, gate, residual, inactive, activation,
    packed_input, capacity, *where,
) -> Tensor:  # fmt: skip
    *geometry, execution, is_chosen = where
    sets = (Kept(in_index, in_count, is_chosen[0]), Kept(out_index, out_count, is_chosen[1]), sites)
    finish = (gate, residual, inactive, activation)
    if packed_input or capacity >= 0:
        return _sparse(input, weight, bias, *sets, *finish, packed_input, capacity, *geometry)
    return calibration.run(execution, _Forward((input, weight, bias), sets, finish, geometry))


def _sparse(
    input, weight, bias, in_channels, out_channels, sites, gate, residual, inactive, activation, packed_input, capacity,
    size, stride, padding, dilation, groups, granularity, backend,
) -> Tensor:  # fmt: skip
    (in_index, in_count, _), (out_index, out_count, _) = in_channels, out_channels
    out = channels_last((input.shape[0], weight.shape[0] if capacity < 0 else capacity, *size), input)
    if out.numel() == 0:
        return out
    input, ins, residual = in_rows(input), (in_index, in_count), in_rows(residual)
    if backend == "triton":
        if sites:  # the kernels write all channels of the others
            compaction = module(".kernels.compaction")
            compaction.fill_skipped(sites[0], compaction.Fill(out, in_rows(inactive)))
        module(".kernels.gathered_conv").forward(
            input, weight, bias, None if gate is None else gate.contiguous(), residual, out, ins,
            (out_index, out_count), _listed(sites), activation=activation, packed_source=packed_input,
            packed_out=capacity >= 0, granularity=granularity, **_sizes(size, input, stride, padding, dilation, groups),
        )  # fmt: skip
        return out
    if packed_input and int(in_count.max()) > input.shape[1]:
        raise ValueError(f"input: expected room for {int(in_count.max())} packed channels, got {input.shape[1]}")
    kernels, tables = module(".cpu.gathered_conv"), module(".cpu.sites")
    where = _place(size, input, weight, stride, padding, dilation)
    listed = table = read = None
    if sites:
        mask, index, count = sites
        listed, table = _listed(sites), tables.neighbours(index, count, where)
        read = _read_rows(mask, input, weight, stride, padding, dilation)
        out.zero_() if inactive is None else out.copy_(inactive)
    source = kernels.rows_of(input) if packed_input else kernels.pack(input, ins, read)
    kernels.products(
        source, ins, (out_index, out_count), weight, out, groups, where, bias=bias, gate=gate,
        residual=residual, activation=activation, is_packed=capacity >= 0, is_tight=not packed_input, listed=listed,
        table=table,
    )  # fmt: skip
    return out


def _listed(sites) -> tuple[Tensor, Tensor] | None:
    """The active sites as the kernels take a list of rows: their index, and where each sample's begin [N + 1]."""
    return (sites[1], _starts(sites[0])) if sites else None


def _starts(mask: Tensor) -> Tensor:
    ends = mask.flatten(1).sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def _sizes(size, input, stride, padding, dilation, groups) -> dict:
    """The geometry as the Triton launchers take it."""
    return dict(
        input_size=tuple(input.shape[2:]), site_size=tuple(size), stride=tuple(stride), padding=tuple(padding),
        dilation=tuple(dilation), groups=groups, allow_tf32=allow_tf32(),
    )  # fmt: skip


def _read_rows(mask, input, weight, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """The pixels that active sites read, as the CPU kernels take a list of rows."""
    tables = module(".cpu.sites")
    touched = tables.touched(mask, input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return tables.compact(touched)[0], _starts(touched)


def _backward(
    grad, input, weight, in_index, in_count, out_index, out_count, sites, packed_input, packed, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    *geometry, execution, is_chosen, wanted = rest
    sets = (Kept(in_index, in_count, is_chosen[0]), Kept(out_index, out_count, is_chosen[1]), sites)
    call = _Backward((grad, input, weight), sets, packed_input, packed, wanted, geometry)
    return calibration.run(execution, call)


def _sparse_backward(
    grad, input, weight, in_channels, out_channels, sites, packed_input, packed, size, stride, padding, dilation,
    groups, granularity, backend, wanted,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (in_index, in_count, _), (out_index, out_count, _) = in_channels, out_channels
    grads = [grad.new_empty(0) for _ in wanted]  # not one three times: outputs must not alias
    ins, outs = (in_index, in_count), (out_index, out_count)
    if input.shape[0] == 0:
        like = (channels_last(input.shape, input), torch.zeros_like(weight), weight.new_zeros(weight.shape[0]))
        return tuple(zeros if want else none for zeros, want, none in zip(like, wanted, grads, strict=True))
    grad, input = in_rows(grad), in_rows(input)
    if backend == "triton":
        geometry = (size, stride, padding, dilation, groups)
        found = _triton_backward(
            grad, input, weight, ins, outs, sites, packed_input, packed, geometry, granularity, wanted
        )
        return tuple(none if made is None else made for made, none in zip(found, grads, strict=True))
    kernels, tables = module(".cpu.gathered_conv"), module(".cpu.sites")
    where = _place(size, input, weight, stride, padding, dilation)
    listed = read = table = readers = None
    if sites:
        mask, index, count = sites
        listed, read = _listed(sites), _read_rows(mask, input, weight, stride, padding, dilation)
        if wanted[0]:
            readers = tables.readers(read[0], read[1][-1:], where, tables.inverse(index, count, mask.numel()))
        if wanted[1]:
            table = tables.neighbours(index, count, where)
    rows = kernels.pack(grad, outs, listed, is_compact=True, is_packed=packed)
    if wanted[0]:
        grads[0] = channels_last(input.shape, input)
        if sites:
            grads[0].zero_()
        kernels.products(
            rows, outs, ins, weight, grads[0], groups, where, is_transposed=True, is_packed=packed_input, listed=read,
            source_listed=listed, table=readers,
        )  # fmt: skip
    if wanted[1]:
        source = kernels.rows_of(input) if packed_input else kernels.pack(input, ins, read)
        grads[1] = kernels.weight_grad(source, rows, ins, outs, weight, groups, where, listed, table, not packed_input)
    if wanted[2]:
        grads[2] = kernels.bias_grad(rows, outs, listed).to(weight.dtype)
    return tuple(grads)


def _triton_backward(
    grad, input, weight, ins, outs, sites, packed_input, packed, geometry, granularity, wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    kernels, compaction = module(".kernels.gathered_conv"), module(".kernels.compaction")
    size, stride, padding, dilation, groups = geometry
    listed, options = _listed(sites), _sizes(size, input, stride, padding, dilation, groups)
    options |= dict(packed_source=packed_input, packed_out=packed, granularity=granularity)
    grad_input = grad_weight = grad_bias = read = None
    if wanted[0]:
        grad_input = channels_last(input.shape, input)
        if sites:
            mask, index, count = sites
            where = map(tuple, (input.shape[2:], weight.shape[2:], stride, padding, dilation))
            fill = compaction.Fill(grad_input, None)
            touched, pixels, *_ = compaction.compact(mask, reads=compaction.Reads(*where), fill=fill, with_mask=True)
            read = (compaction.inverse_map(index, count, mask.numel()), pixels, _starts(touched))
        kernels.input_grad(grad, weight, grad_input, ins, outs, read, **options)
    if wanted[1]:
        grad_weight = kernels.weight_grad(input, grad, weight, ins, outs, listed, **options)
    if wanted[2]:
        grad_bias = kernels.bias_grad(grad, outs, listed, packed)
    return grad_input, grad_weight, grad_bias


class _Call(ChannelCall):
    """What the two directions share as `dynconv.calibration.Call`."""

    def __init__(self, input: Tensor, weight: Tensor, sets: tuple, geometry: list) -> None:
        ins, outs, self.listed = sets
        super().__init__(ins, outs, self.listed[0] if self.listed else None, math.prod(geometry[0]))
        self.input, self.weight, self.sets, self.geometry = input, weight, sets, geometry

    @property
    def has_choice(self) -> bool:
        """Whether it is a call of F.conv2d, which pads both sides alike."""
        size, stride, padding, dilation, *_ = self.geometry
        return all(
            size[i] == (self.input.shape[2 + i] + 2 * p - d * (self.weight.shape[2 + i] - 1) - 1) // s + 1
            for i, s, p, d in zip((0, 1), stride, padding, dilation)
        )

    def _key(self) -> tuple:
        size, stride, padding, dilation, groups, granularity, backend = self.geometry
        return (
            backend, str(self.input.dtype), *self.input.shape, *self.weight.shape, *size, *stride, *padding, *dilation,
            groups, granularity, self.ins.is_chosen, self.outs.is_chosen, bool(self.listed),
        )  # fmt: skip

    def _name(self, *details: str) -> str:
        _, stride, _, dilation, groups, granularity, _ = self.geometry
        (samples, channels, height, width), weight = self.input.shape, self.weight.shape
        what = [f"{height}x{width} {channels}->{weight[0]} {weight[2]}x{weight[3]}"]
        what += [f"{n} {list(v)}" for n, v in (("stride", stride), ("dilation", dilation)) if tuple(v) != (1, 1)]
        what += [f"groups {groups}"] * (groups > 1) + [f"batch {samples}", str(self.input.dtype)[6:]]
        chosen = [n for n, c in (("in", self.ins.is_chosen), ("out", self.outs.is_chosen), ("sites", self.listed)) if c]
        what += [f"chosen {' and '.join(chosen) or 'nothing'}", f"granularity {granularity}"]
        return "gathered conv " + ", ".join([*what, *details])

    def _sets_at(self, density: float) -> tuple:
        share, granularity = self._share_at(density), self.geometry[5]
        sites = self.listed
        if sites:
            active = calibration.sites_at(share, sites[0])
            sites = [active.mask, active.index, active.count]
        return self.ins.at(share, granularity), self.outs.at(share, granularity), sites


class _Forward(_Call):
    """A dense output from a dense input."""

    def __init__(self, operands: tuple, sets: tuple, finish: tuple, geometry: list) -> None:
        super().__init__(*operands[:2], sets, geometry)
        self.operands, self.finish = operands, finish

    @property
    def has_choice(self) -> bool:
        """Half types are rounded once, and a dense convolution rounds before a gate, a residual or a curve."""
        gate, residual, _, activation = self.finish
        is_plain = gate is residual is None and activation in ("none", "relu", "relu6")
        return (is_plain or self.input.element_size() != 2) and super().has_choice

    def key(self) -> tuple:
        gate, residual, inactive, activation = self.finish
        has = (gate is not None, residual is not None, inactive is not None)
        return "gathered conv", *self._key(), *has, activation

    def name(self) -> str:
        *tensors, activation = self.finish
        has = [n for n, t in zip(("gate", "residual", "inactive"), tensors, strict=True) if t is not None]
        return self._name(*[activation] * (activation != "none"), *has)

    def sparse(self) -> Tensor:
        return _sparse(*self.operands, *self.sets, *self.finish, False, -1, *self.geometry)

    def dense(self) -> Tensor:
        gate, residual, inactive, activation = self.finish
        result = self._convolved()
        if gate is not None:
            result *= gate[:, :, None, None]
        result = self.outs.keep(result, 1)
        if self.listed:
            return settle(result, Compacted(*self.listed), None, residual, inactive, activation, None)
        if residual is not None:
            result += residual
        return in_rows(activate_(result, activation))

    def _convolved(self) -> Tensor:
        """All output channels from the kept input channels."""
        _, weight, bias = self.operands
        size, stride, padding, dilation, groups, *_ = self.geometry
        input = self.ins.keep(in_rows(self.input), 1)
        is_pointwise = weight.shape[2:] == (1, 1) and input.shape[2:] == tuple(size) and groups == 1
        if not is_pointwise or input.shape[3] > 1:
            return in_rows(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
        # The positions of a linear layer, which is what its users compare with.
        return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)

    def at(self, density: float) -> _Forward:
        gate, *others = self.finish
        sets = self._sets_at(density)
        if gate is not None:
            gate = sets[1].keep(torch.ones_like(gate), 1)
        input, *parameters = self.operands
        operands = (input.clone(memory_format=torch.preserve_format), *parameters)  # as from the layer before
        return _Forward(operands, sets, (gate, *others), self.geometry)


class _Backward(_Call):
    """The gradients of input, weight and bias."""

    def __init__(self, operands, sets, packed_input: bool, packed: bool, wanted: list[bool], geometry: list) -> None:
        self.grad, *others = operands
        super().__init__(*others, sets, geometry)
        self.packed, self.wanted = (packed_input, packed), wanted

    @property
    def has_choice(self) -> bool:
        """PyTorch's own gradients in half types round on the way on a CPU, as in `masked_conv2d`."""
        rounds = self.grad.is_cpu and self.grad.element_size() == 2
        return not any(self.packed) and not rounds and any(self.wanted) and super().has_choice

    def key(self) -> tuple:
        return "gathered conv backward", *self._key(), *self.wanted

    def name(self) -> str:
        wanted = [n for n, want in zip(("input", "weight", "bias"), self.wanted) if want]
        return self._name("gradients of " + " and ".join(wanted))

    def sparse(self) -> tuple[Tensor, ...]:
        return _sparse_backward(
            self.grad, self.input, self.weight, *self.sets, *self.packed, *self.geometry, self.wanted
        )

    def dense(self) -> tuple[Tensor, ...]:
        _, stride, padding, dilation, groups, _, backend = self.geometry
        grad, input = self.outs.keep(in_rows(self.grad), 1), in_rows(self.input)
        if self.sites is not None:
            grad = keep_where(self.sites, grad)
        if self.wanted[1]:  # zero times NaN, in what is not kept or what only skipped sites would read, is NaN
            input = self.ins.keep(input, 1)
            if self.sites is not None:
                size, kernel = tuple(input.shape[2:]), self.weight.shape[2:]
                touched = torch.ops.dynconv.touched(self.sites, size, kernel, stride, padding, dilation, backend)
                input = keep_where(touched, input)
        where = (stride, padding, dilation, False, (0, 0), groups, self.wanted)
        grads = list(torch.ops.aten.convolution_backward(grad, input, self.weight, self.weight.shape[:1], *where))
        if self.wanted[0]:
            grads[0] = self.ins.keep(in_rows(grads[0]), 1)
        if self.wanted[1] and grads[1].stride() != self.weight.stride():
            grads[1] = torch.empty_like(self.weight).copy_(grads[1])
        return tuple(self.grad.new_empty(0) if made is None else made for made in grads)

    def at(self, density: float) -> _Backward:
        operands = (self.grad, self.input, self.weight)
        return _Backward(operands, self._sets_at(density), *self.packed, self.wanted, self.geometry)


for _key in ("CPU", "CUDA"):
    _library.impl("gathered_conv2d", _forward, _key)
    _library.impl("gathered_conv2d_backward", _backward, _key)


@torch.library.register_fake("dynconv::gathered_conv2d", lib=_library)
def _(
    input, weight, bias, in_index, in_count, out_index, out_count, sites, gate, residual, inactive, activation,
    packed_input, capacity, size, *geometry,
):  # fmt: skip
    return channels_last((input.shape[0], weight.shape[0] if capacity < 0 else capacity, *size), input)


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
    def forward(ctx, input, weight, bias, in_index, in_count, out_index, out_count, sites, *rest):
        operands = (input, weight, in_index, in_count, out_index, out_count)
        finish, (packed_input, capacity), where = rest[:4], rest[4:6], rest[6:]
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.dynconv.gathered_conv2d(
                input, weight, bias, in_index, in_count, out_index, out_count, sites, *rest
            )
        ctx.save_for_backward(*operands, *(sites or ()))
        ctx.is_finished = any(f is not None for f in finish[:3]) or finish[3] != "none"
        ctx.geometry = (packed_input, capacity >= 0, *where)
        ctx.rest = len(rest)
        return out

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_finished:
            raise RuntimeError("gathered_conv2d: expected no gate, residual, inactive or activation for a gradient")
        wanted = list(ctx.needs_input_grad[:3])
        (*operands,) = ctx.saved_tensors[:6]
        results = torch.ops.dynconv.gathered_conv2d_backward(
            grad, *operands, list(ctx.saved_tensors[6:]) or None, *ctx.geometry, wanted
        )
        grads = [result if want else None for result, want in zip(results, wanted, strict=True)]
        return (*grads, None, None, None, None, None, *(None,) * ctx.rest)


register_autograd(_library, "gathered_conv2d", _GatheredConv2d.apply)
once_differentiable(_library, "gathered_conv2d")


@register_flop_formula(torch.ops.dynconv.gathered_conv2d, get_raw=True)
def _forward_flops(input, weight, bias, in_index, in_count, out_index, out_count, sites, *rest, **unused) -> int:
    return _product_flops(weight, in_index, out_index, sites, *rest[-9:])


@register_flop_formula(torch.ops.dynconv.gathered_conv2d_backward, get_raw=True)
def _backward_flops(grad, input, weight, in_index, in_count, out_index, out_count, sites, *rest, **unused) -> int:
    *rest, wanted = rest
    return (wanted[0] + wanted[1]) * _product_flops(weight, in_index, out_index, sites, *rest[-9:])


def _product_flops(weight, in_index, out_index, sites, size, stride, padding, dilation, groups, *rest) -> int:
    """2 * kH * kW * sum over samples of sites * sum over groups of kept in * kept out; all where sets are not known."""
    kept = []
    for index, width in ((in_index, weight.shape[1] * groups), (out_index, weight.shape[0])):
        mask = torch.ones(1) if index.is_meta or is_fake(index) else ActiveChannels._mask_of(index)
        kept.append(mask.expand(in_index.shape[0], width).view(-1, groups, width // groups).sum(2, dtype=torch.int64))
    active = size[0] * size[1]
    if sites and not (sites[0].is_meta or is_fake(sites[0])):
        active = sites[0].flatten(1).sum(1, dtype=torch.int64)
    return 2 * weight.shape[2] * weight.shape[3] * int(((kept[0] * kept[1]).sum(1) * active).sum())


def gathered_conv2d(
    input: Tensor | PackedChannels,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    in_mask: Tensor | ActiveChannels | None = None,
    out_mask: Tensor | ActiveChannels | None = None,
    mask: Tensor | ActiveSites | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inactive: Tensor | float | None = None,
    packed: bool = False,
) -> Tensor | PackedChannels:
    """Convolve the channels that each sample keeps: from the kept input channels to the kept output channels.

    Equal to `where(mask, activation(kept + residual), inactive)` with
    `kept = where(out_mask, gates * conv2d(where(in_mask, gate * input, 0)), 0)`, at the cost of
    (kept in) * (kept out) * (active sites), forward and backward. What a sample does not keep, or no active site reads,
    is not read: NaN or Inf there reaches neither the output nor a gradient.
    float32, float64, float16 and bfloat16; half types accumulate in float32, and float32 on a GPU obeys the TF32 switch
    of F.conv2d. Differentiable once, in `input`, `weight`, `bias`, `residual`, `inactive` and floating masks. In
    inference all of it is one pass, but a floating `in_mask` or `mask`.

    The dynamic channels of FBS (Gao et al., ICLR 2019), DS-Net (Li et al., CVPR 2021) and LAUDNet (Han et al., 2023).

    Args:
        input: [N, Cin, H, W]; channels_last is the fast path, anything else is copied first. Or one image [Cin, H, W],
            with a result of its own kind. Or PackedChannels, the result of a layer before, whose channels are then the
            kept ones.
        weight: [Cout, Cin / groups, kH, kW].
        bias: [Cout].
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, "same" and "valid" included.
        in_mask: bool, broadcastable to [N, Cin], or `ActiveChannels` made once for several layers; None keeps all. A
            floating mask is a gate: a channel is kept where it is not zero, and its value multiplies the input. Its
            gradient is zero at the other channels.
        out_mask: the same for [N, Cout] and the output.
        mask: bool or floating, broadcastable to [N, 1, Ho, Wo], or `ActiveSites`: as for `masked_conv2d`; None computes
            all sites.
        activation: None, "relu", "relu6", "silu", "gelu" or "hardswish".
        residual: broadcastable to [N, Cout, Ho, Wo], added to every channel, kept or not, before the activation.
        inactive: broadcastable to [N, Cout, Ho, Wo], or a number: the values at skipped sites; None is zeros.
        packed: return the kept channels alone, for the next layer; without `residual` and `inactive`.

    Returns:
        [N, Cout, Ho, Wo] in channels_last (without any mask it is plain `conv2d`, in the memory format of that), or
        PackedChannels of `out_mask`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or device, or operands that do not go together.

    Example:
        >>> x, weight, keep = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.rand(2, 8) < 0.5
        >>> y = dynconv.gathered_conv2d(x, weight, padding=1, in_mask=keep, out_mask=keep)
        >>> dense = nn.functional.conv2d(torch.where(keep[:, :, None, None], x, 0), weight, padding=1)
        >>> torch.allclose(y, torch.where(keep[:, :, None, None], dense, 0), atol=1e-4)
        True
    """
    if not isinstance(input, (Tensor, PackedChannels)):
        raise TypeError(f"input: expected a tensor or PackedChannels, got {kind_of(input)}")
    stride, padding, dilation, groups = plain(stride, padding, dilation, groups)
    if is_unbatched(input, packed=packed):
        return gathered_conv2d(
            input[None], weight, bias, stride, padding, dilation, groups, in_mask=in_mask, out_mask=out_mask, mask=mask,
            activation=activation, residual=residual, inactive=inactive,
        )[0]  # fmt: skip
    is_packed = isinstance(input, PackedChannels)
    if in_mask is out_mask is mask is inactive is None and not (is_packed or packed):
        where = (stride, padding, dilation, groups)
        return masked_conv2d(input, weight, bias, *where, activation=activation, residual=residual)
    if is_packed:
        ins = check_packed("input", input)
        if in_mask is not None:
            raise ValueError("in_mask: expected None beside packed channels, which have theirs, got a mask")
        geometry, size = _check_packed_convolution(input, weight, bias, stride, padding, dilation, groups)
        input = input.features
    else:
        geometry, size = check_convolution(input, weight, bias, stride, padding, dilation, groups)
    check_activation(activation)
    check_pixels("input", input.shape[0], *input.shape[2:])
    check_pixels("padding", input.shape[0], *size)  # which alone makes more of them
    input, weight, bias, residual, inactive = autocast(input, weight, bias, residual, inactive)
    check_types(input, weight=weight, bias=bias)
    shape = (input.shape[0], weight.shape[0], *size)
    residual, inactive = expanded("residual", residual, shape, input), expanded_inactive(inactive, shape, input)
    for name, tensor in (("residual", residual), ("inactive", inactive)):
        if packed and tensor is not None:
            raise ValueError(f"{name}: expected None for a packed output, got a tensor")
    if inactive is not None and mask is None:
        raise ValueError("inactive: expected a mask beside it, got None")
    if not is_packed:
        ins = check_channels("in_mask", in_mask, (shape[0], input.shape[1]), input)
    outs = check_channels("out_mask", out_mask, shape[:2], input)
    sites = None if mask is None else _sites(mask, shape, input)
    backend = backend_for(input.device)
    if backend == "reference":
        return reference.gathered_conv2d(
            PackedChannels(input, ins) if is_packed else input, weight, bias, stride, padding, dilation, groups,
            in_mask=None if is_packed else ins, out_mask=outs, mask=sites, activation=activation, residual=residual,
            inactive=inactive, packed=packed,
        )  # fmt: skip
    if ins.gate is not None and not is_packed:
        # The gate's gradient is a sum over the channel: what a sample does not keep must not be in it.
        kept = ins.mask[:, :, None, None]
        if sites is not None:  # nor what no active site reads
            kept = kept & sites._touched_by(tuple(input.shape[2:]), geometry).mask
        kept = torch.where(kept, input, 0)
        input = (kept * ins.gate[:, :, None, None]).to(input.dtype)
    gates = [outs.gate, None if sites is None else sites.gate]
    listed = None if sites is None else [sites.mask, sites.index, sites.count]
    operands = (input, weight, bias, ins.index, ins.count, outs.index, outs.count, listed)
    where = (is_packed, outs.capacity if packed else -1)
    where += (size, geometry.stride, geometry.padding, geometry.dilation, groups)
    where += (math.gcd(ins.granularity, outs.granularity), backend, calibration.mode())
    where += ([is_packed or in_mask is not None, out_mask is not None],)
    # A gradient needs what comes after the convolution as steps of their own, over the kept channels where packed.
    is_one_pass = gates[1] is None and not (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (input, weight, bias, residual, inactive, *gates))
    )
    run = _forward if unwatched(input, weight, bias, *gates, residual, inactive) else torch.ops.dynconv.gathered_conv2d
    if is_one_pass:
        result = run(*operands, gates[0], residual, inactive, activation or "none", *where)
    else:
        result = run(*operands, None, None, None, "none", *where)
        result = finish(result, outs, sites, activation, residual, inactive, packed)
    return PackedChannels(result, outs) if packed else result


def finish(
    result: Tensor,
    outs: ActiveChannels,
    sites: ActiveSites | None,
    activation: str | None,
    residual: Tensor | None = None,
    inactive: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """What follows a gathered convolution, step by step: gates, residual, activation, skipped sites."""
    dtype = result.dtype
    gates = [outs.gate, None if sites is None else sites.gate]
    if outs.gate is not None:
        gate = outs._gather(outs.gate, result.shape[1]) if packed else outs.gate
        result = (result * gate[:, :, None, None]).to(dtype)
    if sites is not None and sites.gate is not None:
        result = (result * sites.gate).to(dtype)
    if torch.is_grad_enabled() and any(gate is not None and gate.requires_grad for gate in gates):
        # Zeros already, but not in the gradient that comes back, which is infinite or NaN for a root of zeros: it must
        # not get into the gates' own, which are sums.
        kept = (outs.index[:, : result.shape[1]] >= 0 if packed else outs.mask)[:, :, None, None]
        result = torch.where(kept if sites is None else kept & sites.mask, result, 0)
    if residual is not None:
        result = result + (residual if sites is None else torch.where(sites.mask, residual, 0))
    result = reference.ACTIVATIONS[activation](result)
    if inactive is not None or (sites is not None and residual is not None):
        result = torch.where(sites.mask, result, 0 if inactive is None else inactive)
    return in_rows(result)


def check_packed(name: str, packed: PackedChannels) -> ActiveChannels:
    features, channels = packed
    if not isinstance(features, Tensor) or features.dtype not in FLOATING:
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name}: expected features in float32, float64, float16 or bfloat16, got {got}")
    if not isinstance(channels, ActiveChannels):
        raise TypeError(f"{name}: expected channels in an ActiveChannels, got {type(channels).__name__}")
    if features.device != channels.mask.device:
        raise ValueError(f"{name}: expected features on {channels.mask.device}, where the channels are")
    samples, most = channels.shape[0], channels._known_capacity or 0
    if features.dim() != 4 or features.shape[0] != samples or not most <= features.shape[1] <= channels.shape[1]:
        raise ValueError(f"{name}: expected features [{samples}, {most} or more, H, W], got {list(features.shape)}")
    return channels


def _check_packed_convolution(input, weight, bias, *geometry) -> tuple[Geometry, tuple[int, int]]:
    """`check_convolution` of what the features stand for."""
    features, channels = input
    dense = features[:, :1] if features.shape[1] else features.new_empty(features.shape[0], 1, *features.shape[2:])
    return check_convolution(dense.expand(-1, channels.shape[1], -1, -1), weight, bias, *geometry)


def _sites(mask: Tensor | ActiveSites, shape: tuple[int, ...], input: Tensor) -> ActiveSites:
    sites = sites_of(mask, (shape[0], *shape[2:]), input)
    sites._check_pixels(input.shape[2:])
    return sites


def pack(input: Tensor, channels: ActiveChannels) -> PackedChannels:
    """See `dynconv.pack`."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a dense tensor, got {kind_of(input)}")
    if input.dtype not in FLOATING:
        raise TypeError(f"input: expected float32, float64, float16 or bfloat16, got {input.dtype}")
    if input.dim() != 4 or input.shape[:2] != channels.shape:
        n, width = channels.shape
        raise ValueError(f"input: expected shape [{n}, {width}, H, W], as the channels, got {list(input.shape)}")
    if input.device != channels.mask.device:
        raise ValueError(f"input: expected a tensor on {channels.mask.device}, where the channels are")
    return reference.pack_channels(input, channels)


def unpack(features: PackedChannels) -> Tensor:
    """See `dynconv.PackedChannels.unpack`."""
    check_packed("features", features)
    return reference.unpack_channels(features)


def check_channels(
    name: str, mask: Tensor | ActiveChannels | None, size: tuple[int, int], input: Tensor
) -> ActiveChannels:
    """The argument as ActiveChannels of that size, all of them for None; errors name the argument."""
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
