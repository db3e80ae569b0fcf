"""masked_conv2d: a convolution that computes the active output sites and skips the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_dynamo_compiling

from .. import calibration, reference
from .._backend import backend_for, module, unwatched
from .._flops import register_flop_formula
from .._geometry import Geometry, IntPair, Padding, is_stencil, plain
from .._likeness import Likeness, can_be_like
from ..packed import PackedFeatures
from ..sites import ActiveSites, fill
from ._common import (
    Compacted,
    Settled,
    allow_tf32,
    autocast,
    channels_last,
    check_activation,
    check_convolution,
    check_out,
    check_overlap,
    check_residual,
    check_result,
    check_rows,
    check_types,
    expanded_inactive,
    gate_of,
    in_rows,
    is_autocast,
    is_same_memory,
    is_unbatched,
    new_rows,
    once_differentiable,
    register_autograd,
    settle,
)
from .epilogue import epilogue

# A packed input brings `source`: the packed row of each pixel [N, 1, H, W] (-1: none), its sites' index and count.
# `shared` is what layers with the same sites share, or None: what `_shared` returns. A GPU's call with gradients and a
# mask of its own has the sites' inverse alone there. Neither is ever an empty list, which AOTInductor hands to an op as
# None.
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups, str backend, str execution"
_OPERANDS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor mask, Tensor index, Tensor count, Tensor[]? shared, "
    "Tensor[]? source, Tensor? gate"
)
_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(
    f"masked_conv2d({_OPERANDS}, Tensor? residual, Tensor? inactive, str activation, bool packed, {_GEOMETRY}) "
    "-> Tensor"
)
_library.define(
    f"masked_conv2d_(Tensor(a!) out, {_OPERANDS}, Tensor? residual, bool accumulate, str activation, {_GEOMETRY}) -> ()"
)
_library.define(
    f"masked_conv2d_backward(Tensor grad, {_OPERANDS}, {_GEOMETRY}, bool[4] wanted) -> "
    "(Tensor input, Tensor weight, Tensor bias, Tensor gate)"
)


_POINTWISE = (1, 1, 1, 1, 0, 0)  # kernel, stride and padding of a 1x1 convolution


def _input_size(input: Tensor, source: list[Tensor] | None) -> tuple[int, int]:
    return tuple((source[0] if source else input).shape[2:])


def _reads(input, weight, mask, source, stride, padding, dilation) -> tuple[Tensor | None, tuple[int, ...]]:
    """The packed row of each pixel, if any, and the geometry as the CPU kernels take it."""
    geometry = (*mask.shape[2:], *_input_size(input, source), *weight.shape[2:], *stride, *padding, *dilation)
    return source[0] if source else None, geometry


def _reads_itself(geometry: tuple[int, ...]) -> bool:
    """Whether each site reads the pixel where it is, and no other: its place in the index is its neighbour table."""
    return geometry[:2] == geometry[2:4] and geometry[4:10] == _POINTWISE


def _table(reads, index, count, shared) -> Tensor | None:
    """The neighbour table that layers share, or one for this call alone; none where row m reads row m."""
    if shared:
        return shared[0] if shared[0].dim() == 2 else None
    lookup, geometry = reads
    if lookup is None and _reads_itself(geometry):
        return index.view(-1, 1)
    return module(".cpu.sites").neighbours(index, count, geometry, lookup)


def _forward_into(
    out, input, weight, bias, sites, shared, source, gate, residual, inactive, in_place, activation,
    stride, padding, dilation, groups, backend,
) -> None:  # fmt: skip
    """What the functional and the in-place forward share."""
    input, residual, mask = in_rows(input), in_rows(residual), sites.mask
    if backend == "cpu":
        index, count = sites.index, sites.count
        if source:
            check_rows(input, source[2])
        if residual is not None and out.dim() == 2:
            check_rows(residual, count, "residual")
        reads = _reads(input, weight, mask, source, stride, padding, dilation)
        table = None if is_stencil(weight.shape, groups) else _table(reads, index, count, shared)
        module(".cpu.masked_conv").forward(
            input, weight, bias, table, index, count, gate, residual, out, in_rows(inactive), in_place, groups,
            activation, reads,
        )  # fmt: skip
    else:
        if not in_place and out.dim() == 4:  # before anything asks for the index, which this may make beside it
            sites._fill(module(".kernels.compaction").Fill(out, in_rows(inactive)))
        module(".kernels.masked_conv").forward(
            input, weight, bias, sites.index, sites.count, gate, residual, source[0].view(-1) if source else None, out,
            input_size=_input_size(input, source), site_size=tuple(mask.shape[2:]), activation=activation,
            stride=stride, padding=padding, dilation=dilation, groups=groups, allow_tf32=allow_tf32(),
        )  # fmt: skip


def _forward(input, weight, bias, mask, index, count, *rest) -> Tensor:
    return _forward_at(input, weight, bias, Compacted(mask, index, count), *rest)


def _forward_at(
    input, weight, bias, sites, shared, source, gate, residual, inactive, activation, packed, *geometry
) -> Tensor:
    operands = (input, weight, bias, sites, shared, source, gate)
    *geometry, execution = geometry
    if packed:
        return _sparse(*operands, residual, inactive, activation, packed, *geometry)
    call = _Forward(operands, (residual, inactive, activation), None, geometry)
    return calibration.run(execution, call)


def _sparse(
    input, weight, bias, sites, shared, source, gate, residual, inactive, activation, packed, *geometry
) -> Tensor:
    shape = sites.mask.shape
    # Before anything else is allocated: the memory that the last call's output has left is then still in one piece.
    if packed:
        out = new_rows(sites.index.shape[0], weight.shape[0], input, sites.count, geometry[-1])
    else:
        out = channels_last((shape[0], weight.shape[0], shape[2], shape[3]), input)
    operands = (input, weight, bias, sites, shared, source, gate)
    _forward_into(out, *operands, residual, inactive, False, activation, *geometry)
    return out


def _backward(
    grad, input, weight, bias, mask, index, count, shared, source, gate, stride, padding, dilation, groups, backend,
    execution, wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad, input = in_rows(grad), in_rows(input)
    operands = (input, weight, bias, Compacted(mask, index, count), shared, source, gate)
    call = _Backward(operands, grad, wanted, (stride, padding, dilation, groups, backend))
    return tuple(grad.new_empty(0) if g is None else g for g in calibration.run(execution, call))


def _cpu_backward(grad, input, weight, bias, sites, shared, source, gate, stride, padding, dilation, groups, wanted):
    mask, index, count = sites.mask, sites.index, sites.count
    reads = _reads(input, weight, mask, source, stride, padding, dilation)
    # A stencil's own gradient alone reads a table.
    needs_table = wanted[1] or not is_stencil(weight.shape, groups)
    table = _table(reads, index, count, shared) if needs_table else None
    readers, pixels = None, source[1:] if source else []
    if wanted[0] and is_stencil(weight.shape, groups) and shared and len(shared) > 1:
        readers, *pixels = shared[1:]
    elif wanted[0] and is_stencil(weight.shape, groups):
        kernels, size = module(".cpu.sites"), _input_size(input, source)
        if not source:
            pixels = kernels.compact(kernels.touched(mask, size, weight.shape[2:], stride, padding, dilation))
        readers = kernels.readers(*pixels, reads[1], kernels.inverse(index, count, mask.numel()))
    # Sites so many lines apart read no common line of the input.
    overlap = max(1, -(-(dilation[0] * (weight.shape[2] - 1) + 1) // stride[0]) - 1)
    return module(".cpu.masked_conv").backward(
        grad, input, weight, bias, table, readers, pixels, index, count, gate, wanted, mask.numel(),
        overlap * mask.shape[3], groups, reads,
    )  # fmt: skip


def _triton_backward(grad, input, weight, bias, sites, shared, source, gate, stride, padding, dilation, groups, wanted):
    mask, index, count = sites.mask, sites.index, sites.count
    kernels, compaction = module(".kernels.masked_conv"), module(".kernels.compaction")
    lookup = source[0].view(-1) if source else None
    sizes = dict(input_size=_input_size(input, source), site_size=tuple(mask.shape[2:]))
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, allow_tf32=allow_tf32())
    grad_input = grad_weight = grad_bias = grad_gate = None
    if wanted[0]:
        inverse, *pixels = shared or [compaction.compact(mask, with_inverse=True).inverse]
        pixels = source[1:] if source else pixels
        if source:
            grad_input = torch.empty_like(input)  # rows, of which the kernels write all
        elif pixels:
            grad_input = torch.zeros_like(input)
        else:
            grad_input = torch.empty_like(input)
            where = map(tuple, (input.shape[2:], weight.shape[2:], stride, padding, dilation))
            fill = compaction.Fill(grad_input, None)
            _, *pixels, _ = compaction.compact(mask, reads=compaction.Reads(*where), fill=fill)
        kernels.input_grad(grad, weight, inverse, *pixels, gate, grad_input, **sizes, **geometry)
    if wanted[1]:
        grad_weight = kernels.weight_grad(input, grad, index, count, gate, lookup, weight, **sizes, **geometry)
    if wanted[2]:
        grad_bias = kernels.bias_grad(grad, index, count, gate)
    if wanted[3]:
        grad_gate = kernels.gate_grad(input, weight, bias, grad, index, count, lookup, **sizes, **geometry)
        grad_gate = grad_gate.view(gate.shape)
    return grad_input, grad_weight, grad_bias, grad_gate


class _Call(calibration.SiteCall):
    """What the two directions share as `dynconv.calibration.Call`."""

    def __init__(self, operands: tuple, geometry: Sequence) -> None:
        self.operands, self.geometry = operands, geometry
        self.active = operands[3]

    @property
    def has_choice(self) -> bool:
        """Whether it is a call of F.conv2d: from dense to dense, with the same padding on both sides."""
        input, weight, _, sites, _, source, _ = self.operands
        stride, padding, dilation = self.geometry[:3]
        return not source and all(
            sites.mask.shape[i] == (input.shape[i] + 2 * p - d * (weight.shape[i] - 1) - 1) // s + 1
            for i, s, p, d in zip((2, 3), stride, padding, dilation)
        )

    @property
    def has_tables(self) -> bool:
        """Whether layers share what `shared` holds: of a mask of its own a GPU's call has the inverse alone there."""
        shared, backend = self.operands[4], self.geometry[4]
        return bool(shared) and (backend == "cpu" or len(shared) > 1)

    def _key(self) -> tuple:
        input, weight, _, sites, shared, source, gate = self.operands
        stride, padding, dilation, groups, backend = self.geometry
        return (
            backend, str(input.dtype), *input.shape, *weight.shape, *sites.mask.shape[2:], *stride, *padding, *dilation,
            groups, len(shared or ()), len(source or ()), gate is not None,
        )  # fmt: skip

    def _name(self, *details: str) -> str:
        input, weight, *_, gate = self.operands
        stride, _, dilation, groups, _ = self.geometry
        height, width = input.shape[2:]
        what = [f"{height}x{width} {input.shape[1]}->{weight.shape[0]} {weight.shape[2]}x{weight.shape[3]}"]
        what += [f"{n} {list(v)}" for n, v in (("stride", stride), ("dilation", dilation)) if tuple(v) != (1, 1)]
        what += [f"groups {groups}"] * (groups > 1) + [f"batch {input.shape[0]}", str(input.dtype)[6:]]
        what += ["shared sites"] * self.has_tables + ["gate"] * (gate is not None)
        return "conv " + ", ".join([*what, *details])

    def _operands_at(self, density: float) -> tuple:
        input, weight, bias, sites, shared, source, gate = self.operands
        sites = calibration.sites_at(density, sites.mask)
        if self.has_tables:
            stride, padding, dilation, _, backend = self.geometry
            geometry = Geometry.of(tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
            shared = _shared_tables(sites, tuple(input.shape[2:]), None, geometry, backend, len(shared) > 1)
        elif shared:
            shared = [sites.inverse]
        gate = None if gate is None else sites.mask.to(gate.dtype)
        input = input.clone(memory_format=torch.preserve_format)  # as from the layer before
        return input, weight, bias, sites, shared, source, gate


class _Forward(_Call):
    """A dense output from a dense input, of its own or in place."""

    def __init__(self, operands: tuple, epilogue: tuple, out: Tensor | None, geometry: Sequence) -> None:
        super().__init__(operands, geometry)
        self.epilogue, self.out = epilogue, out
        self._ways: list[_Ways] = []  # of this call and those that `at` makes of it

    @property
    def is_plain(self) -> bool:
        """Whether it is what a `_Ways` can do: on the CPU, from the tensors and sites of an unwatched call."""
        *_, sites, _, source, gate = self.operands
        backend, is_listed = self.geometry[4], isinstance(sites, ActiveSites)
        return backend == "cpu" and is_listed and source is gate is self.out is None

    @property
    def ways(self) -> _Ways:
        """Made once, for a layer that shares its sites' table as for one that does not."""
        if not self._ways:
            self._ways.append(_Ways(self, bool(self.operands[4])))
        return self._ways[0]

    @property
    def has_choice(self) -> bool:
        """Half types are rounded once, and a dense convolution rounds before a gate, a residual or a curve."""
        residual, _, activation = self.epilogue
        is_half = self.operands[0].element_size() == 2
        if is_half and not (self.operands[-1] is residual is None and activation in ("none", "relu", "relu6")):
            return False
        return super().has_choice

    def key(self) -> tuple:
        residual, inactive, activation = self.epilogue
        what = "conv in place" if self.out is not None else "conv"
        return what, *self._key(), residual is not None, inactive is not None, activation

    def name(self) -> str:
        residual, inactive, activation = self.epilogue
        details = ["in place"] * (self.out is not None) + [activation] * (activation != "none")
        return self._name(*details, *["residual"] * (residual is not None), *["inactive"] * (inactive is not None))

    def sparse(self) -> Tensor:
        if self.is_plain:
            input, weight, bias, sites, shared, *_ = self.operands
            residual, inactive, _ = self.epilogue
            return self.ways.sparse(input, weight, bias, sites if shared else sites.mask, residual, inactive)
        if self.out is None:
            return _sparse(*self.operands, *self.epilogue, False, *self.geometry)
        residual, _, activation = self.epilogue
        _forward_into(self.out, *self.operands, residual, None, True, activation, *self.geometry)
        torch.autograd.graph.increment_version(self.out)  # a graph that saved what was overwritten has to notice
        return self.out

    def dense(self) -> Tensor:
        input, weight, bias, sites, _, _, gate = self.operands
        residual, inactive, activation = self.epilogue
        if self.is_plain:
            return self.ways.dense(input, weight, bias, sites.mask, len(sites), residual, inactive)
        result = F.conv2d(in_rows(input), weight, bias, *self.geometry[:4])
        return settle(result, sites, gate, residual, inactive, activation, self.out)

    def at(self, density: float) -> _Forward:
        out = None if self.out is None else self.out.clone(memory_format=torch.preserve_format)
        call = _Forward(self._operands_at(density), self.epilogue, out, self.geometry)
        call._ways = self._ways
        return call


class _Ways:
    """The two ways of a plain call in inference on the CPU, with all that its tensors' values do not change.

    Every function more that a call goes through takes 1 to 3 us where the layer before has pushed it out of the cache:
    what others would call stands here in one piece.
    """

    def __init__(self, call: _Forward, is_shared: bool) -> None:
        input, weight, bias, sites, *_ = call.operands
        residual, inactive, kind = call.epilogue
        stride, padding, dilation, groups, _ = call.geometry
        samples, _, height, width = sites.mask.shape
        self.shape, self.sites = (samples, weight.shape[0], height, width), samples * height * width
        self.dtype, self.conv2d, self.is_shared = input.dtype, call.geometry[:4], is_shared
        self.is_in_rows = all(t is None or in_rows(t) is t for t in (input, residual, inactive))
        self.settled = Settled(self.shape, input.dtype, kind, adds=residual is not None)
        kernels = module(".cpu.sites")
        self.list_active, self.neighbours = kernels.list_active, kernels.neighbours
        self.taps = Geometry(tuple(weight.shape[2:]), stride, padding, padding, dilation)
        self.reads = _reads(input, weight, sites.mask, None, stride, padding, dilation)[1]
        self.is_stencil, self.is_pointwise = is_stencil(weight.shape, groups), _reads_itself(self.reads)
        self.forward = module(".cpu.masked_conv").forward_of(weight, groups, kind, input.dtype, self.reads)
        read = self.forward.in_order(weight, bias)
        self.is_in_order = read[0] is weight and read[1] is bias

    def sparse(self, input, weight, bias, mask: Tensor | ActiveSites, residual, inactive) -> Tensor:
        """`mask`: sites, where they are shared."""
        # Before anything else is allocated: the memory that the last call's output has left is then still in one piece.
        out = torch.empty(self.shape, dtype=self.dtype, memory_format=torch.channels_last)
        if self.is_shared:
            index, active = mask.index, len(mask)
        else:
            index = torch.empty(self.sites, dtype=torch.int32)
            active = self.list_active(mask, index)
        if not self.is_in_rows:
            input, residual, inactive = in_rows(input), in_rows(residual), in_rows(inactive)
        if active == 0:
            fill(out, inactive, False)
            return out
        table = None
        if self.is_pointwise:
            table = index
        elif not self.is_stencil and self.is_shared:
            table = mask._neighbours(self.reads[2:4], self.taps)
        elif not self.is_stencil:
            table = self.neighbours(index, active, self.reads)
        if not self.is_in_order:
            weight, bias = self.forward.in_order(weight, bias)
        self.forward.run(input, weight, bias, table, index, active, None, residual, out, inactive, False)
        return out

    def dense(self, input, weight, bias, mask: Tensor, active: int, residual, inactive) -> Tensor:
        """`active`: how many sites of the mask are."""
        if not self.is_in_rows:
            input, residual, inactive = in_rows(input), in_rows(residual), in_rows(inactive)
        result = F.conv2d(input, weight, bias, *self.conv2d)
        return self.settled(result, mask, active, residual, inactive)


class _Backward(_Call):
    """The gradients of a dense output's convolution over a dense input."""

    def __init__(self, operands: tuple, grad: Tensor, wanted: Sequence[bool], geometry: Sequence) -> None:
        super().__init__(operands, geometry)
        self.grad, self.wanted = grad, wanted

    @property
    def has_choice(self) -> bool:
        """A gate's gradient needs the convolution's own result: only the sparse way has that at hand.

        PyTorch's own gradients in half types round on the way on a CPU without instructions for them, to three times
        the error of one rounding.
        """
        rounds = self.grad.is_cpu and self.grad.element_size() == 2
        return self.grad.dim() == 4 and not self.wanted[3] and not rounds and super().has_choice

    def key(self) -> tuple:
        return "conv backward", *self._key(), *self.wanted

    def name(self) -> str:
        wanted = [n for n, want in zip(("input", "weight", "bias"), self.wanted) if want]
        return self._name("gradients of " + " and ".join(wanted))

    def sparse(self) -> tuple[Tensor | None, ...]:
        *geometry, backend = self.geometry
        run = _cpu_backward if backend == "cpu" else _triton_backward
        return run(self.grad, *self.operands, *geometry, self.wanted)

    def dense(self) -> tuple[Tensor | None, ...]:
        input, weight, _, sites, _, _, gate = self.operands
        stride, padding, dilation, groups, backend = self.geometry
        mask = sites.mask
        grad = torch.where(mask, self.grad, 0)
        if gate is not None:
            grad *= gate.to(grad.dtype)
        if self.wanted[1]:  # zero times NaN, in a pixel that only skipped sites would read, is NaN
            size = tuple(input.shape[2:])
            touched = torch.ops.dynconv.touched(mask, size, weight.shape[2:], stride, padding, dilation, backend)
            if touched.is_cuda or not touched.all():
                input = torch.where(touched, input, 0)
        grads = torch.ops.aten.convolution_backward(
            grad, input, weight, weight.shape[:1], stride, padding, dilation, False, (0, 0), groups, self.wanted[:3]
        )
        grad_input, grad_weight, grad_bias = grads
        if grad_weight is not None and grad_weight.stride() != weight.stride():
            grad_weight = torch.empty_like(weight).copy_(grad_weight)
        return in_rows(grad_input), grad_weight, grad_bias, None

    def at(self, density: float) -> _Backward:
        return _Backward(self._operands_at(density), self.grad, self.wanted, self.geometry)


def _in_place(out, input, weight, bias, mask, index, count, *rest) -> None:
    _in_place_at(out, input, weight, bias, Compacted(mask, index, count), *rest)


def _in_place_at(
    out, input, weight, bias, sites, shared, source, gate, residual, accumulate, activation, *geometry
) -> None:
    check_overlap("out", out, input=input, weight=weight, bias=bias, mask=sites.mask, gate=gate, residual=residual)
    operands = (input, weight, bias, sites, shared, source, gate)
    *geometry, execution = geometry
    call = _Forward(operands, (out if accumulate else residual, None, activation), out, geometry)
    calibration.run(execution, call)


for _key in ("CPU", "CUDA"):
    _library.impl("masked_conv2d", _forward, _key)
    _library.impl("masked_conv2d_", _in_place, _key)
    _library.impl("masked_conv2d_backward", _backward, _key)


@torch.library.register_fake("dynconv::masked_conv2d", lib=_library)
def _(input, weight, bias, mask, index, count, shared, source, gate, residual, inactive, activation, packed, *geometry):
    if packed:
        return input.new_empty(index.shape[0], weight.shape[0])
    return channels_last((mask.shape[0], weight.shape[0], mask.shape[2], mask.shape[3]), input)


@torch.library.register_fake("dynconv::masked_conv2d_", lib=_library)
def _(out, *operands):
    return None


@torch.library.register_fake("dynconv::masked_conv2d_backward", lib=_library)
def _(
    grad, input, weight, bias, mask, index, count, shared, source, gate, stride, padding, dilation, groups, backend,
    execution, wanted,
):  # fmt: skip
    like_input = input.new_empty(input.shape) if source else channels_last(input.shape, input)
    return (
        like_input if wanted[0] else grad.new_empty(0),
        torch.empty_like(weight) if wanted[1] else grad.new_empty(0),
        weight.new_empty(weight.shape[0]) if wanted[2] else grad.new_empty(0),
        torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted[3] else grad.new_empty(0),
    )


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, weight, bias, mask, index, count, shared, source, gate, residual, inactive, activation, packed,
        *geometry,
    ):  # fmt: skip
        if residual is not None or activation != "none":
            raise RuntimeError("dynconv::masked_conv2d: differentiable without residual and activation only")
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.dynconv.masked_conv2d(
                input, weight, bias, mask, index, count, shared, source, gate, residual, inactive, activation, packed,
                *geometry,
            )  # fmt: skip
        ctx.save_for_backward(input, weight, bias, mask, index, count, gate, *(shared or ()), *(source or ()))
        ctx.geometry, ctx.shared = geometry, len(shared or ())
        return out

    @staticmethod
    def backward(ctx, grad):
        # Once: checkpointing recomputes what it unpacks.
        input, weight, bias, mask, index, count, gate, *tables = ctx.saved_tensors
        shared, source = tables[: ctx.shared] or None, tables[ctx.shared :] or None
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[1], needs[2], needs[8]]
        grads = [None] * 4
        if any(wanted):
            results = torch.ops.dynconv.masked_conv2d_backward(
                grad, input, weight, bias, mask, index, count, shared, source, gate, *ctx.geometry, wanted
            )
            grads = [result if want else None for result, want in zip(results, wanted, strict=True)]
        inactive = grad.masked_fill(mask, 0) if needs[10] else None
        nothing = (None,) * 2 + (None,) * len(ctx.geometry)
        return (*grads[:3], None, None, None, None, None, grads[3], None, inactive, *nothing)


def _autograd(*arguments):
    """In inference the graph is not built, and the epilogue may be fused."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        return _MaskedConv2d.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.dynconv.masked_conv2d(*arguments)


register_autograd(_library, "masked_conv2d", _autograd)
register_autograd(_library, "masked_conv2d_")
once_differentiable(_library, "masked_conv2d")


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
    input: Tensor | PackedFeatures,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    mask: Tensor | ActiveSites | None = None,
    activation: str | None = None,
    residual: Tensor | PackedFeatures | None = None,
    inactive: Tensor | float | None = None,
    out: Tensor | None = None,
    packed: bool = False,
) -> Tensor | PackedFeatures:
    """Convolve at the active output sites only, in 2-D: `where(mask, conv2d(input), inactive)`.

    Skipped sites are not computed, forward or backward: the cost falls with the mask, and NaN or Inf in pixels
    that only skipped sites would read reaches neither the output nor a gradient. An active site reads its whole
    neighbourhood, active or not (this is not a submanifold convolution). float32, float64, float16 and bfloat16;
    half types accumulate in float32. Differentiable once, in `input`, `weight`, `bias`, a floating `mask`, `residual`
    and `inactive`.

    In full, `where(mask, activation(gate * (conv2d(input) + bias) + residual), inactive)`: one pass in inference; where
    a gradient is needed, the epilogue is a pass of its own over the active sites.

    The masks of DynConv (Verelst & Tuytelaars, CVPR 2020) and LASNet (Han et al., NeurIPS 2022), the in-place
    update of SIGE (Li et al., NeurIPS 2022).

    Args:
        input: [N, Cin, H, W]; channels_last is the fast path, anything else is copied first. Or one image [Cin, H, W],
            with a result of its own kind. Or PackedFeatures: equal to the dense features with zeros outside their
            sites, but only their rows are read.
        weight: [Cout, Cin / groups, kH, kW].
        bias: [Cout].
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, "same" and "valid" included.
        mask: bool, broadcastable to [N, 1, Ho, Wo] ([N, 1, 1, 1] skips whole samples), or `ActiveSites` made
            once for several layers. A floating mask is a gate: active where it is not zero, its value multiplies
            the output, and its gradient is the sum over channels of grad * conv at the active sites and zero
            elsewhere. None computes every site: plain `conv2d`.
        activation: None, "relu", "relu6", "silu", "gelu" or "hardswish".
        residual: added before the activation; of the output's type, broadcastable to its shape, or PackedFeatures where
            `packed`.
        inactive: the output at the skipped sites, of the output's type and broadcastable to its shape, or a number;
            None is zeros.
        out: inference only: a channels_last tensor of the output's shape and type to update in place at the active
            sites and nowhere else. The cost is then proportional to the active sites alone. It may be the residual, and
            otherwise has no memory in common with what is read.
        packed: return the active sites alone, for the next layer of a chain.

    Returns:
        [N, Cout, Ho, Wo] in channels_last (without a mask in the memory format that `conv2d` gives), `out`, or
        PackedFeatures for the sites of `mask`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or memory format, or arguments that exclude each other.
            Nothing has been written then.

    Example:
        >>> x, weight = torch.randn(1, 8, 6, 6), torch.randn(4, 8, 3, 3)
        >>> mask = torch.rand(1, 1, 6, 6) < 0.25
        >>> y = dynconv.masked_conv2d(x, weight, padding=1, mask=mask)
        >>> torch.allclose(y, torch.where(mask, nn.functional.conv2d(x, weight, padding=1), 0), atol=1e-4)
        True
    """
    remembers = out is None and not packed and not is_dynamo_compiling()
    if remembers:
        for passed in _passed.get(id(weight), ()):
            if passed.is_like(
                input, weight, bias, stride, padding, dilation, groups, mask, activation, residual, inactive
            ):
                return passed(input, weight, bias, mask, residual, inactive)
        operands, given = Operands(input, weight, bias, mask, residual, inactive), (stride, padding, dilation, groups)
    stride, padding, dilation, groups = plain(stride, padding, dilation, groups)
    if is_unbatched(input, out, packed):
        result = masked_conv2d(
            input[None], weight, bias, stride, padding, dilation, groups, mask=mask, activation=activation,
            residual=residual, inactive=inactive, out=out if out is None else out[None],
        )  # fmt: skip
        return result[0] if out is None else out
    geometry, size = check_convolution(input, weight, bias, stride, padding, dilation, groups)
    check_activation(activation)
    source = input.sites if isinstance(input, PackedFeatures) else None
    tensor = input if source is None else input.rows
    tensor, weight, bias, inactive, residual = autocast(tensor, weight, bias, inactive, residual)
    check_types(tensor, weight=weight, bias=bias)
    samples = tensor.shape[0] if source is None else source.shape[0]
    shape = (samples, weight.shape[0], *size)
    inactive = expanded_inactive(inactive, shape, tensor)
    check_result("out", out, shape, tensor)
    gate = mask.gate if isinstance(mask, ActiveSites) else mask
    is_unwatched = unwatched(out, tensor, weight, bias, gate, inactive, residual)
    sites = _sites(mask, tensor, source, shape, is_unwatched and not packed)
    if sites is None and (packed or source is not None):
        raise ValueError("mask: expected sites for packed features, got None")
    if packed and inactive is not None:
        raise ValueError("inactive: expected None for a packed output, which has no skipped sites, got a tensor")
    addend = check_residual(residual, sites, shape, tensor, packed)
    gate = None if sites is None else gate_of(sites, tensor.dtype)
    if out is not None:
        check_out(out, inactive, packed, tensor, weight, bias, gate, addend)
    if sites is None:
        result = _dense(tensor, weight, bias, stride, padding, dilation, groups, activation, addend, inactive)
        return result if out is None else out.copy_(result)
    backend = backend_for(tensor.device)
    if backend == "reference":
        return reference.masked_conv2d(
            tensor if source is None else PackedFeatures(tensor, source), weight, bias, stride, padding, dilation,
            groups, mask=sites, activation=activation, residual=residual, inactive=inactive, out=out, packed=packed,
        )  # fmt: skip
    shared = packed_source = None
    if sites is mask or source is not None:
        shared = _shared(sites, tensor, source, geometry, weight, groups, backend)
    elif backend != "cpu" and _needs_grad(tensor):
        shared = [sites.inverse]  # the launch that listed the sites has made it
    if source is not None:
        packed_source = [source.inverse.view(samples, 1, *source.shape[1:]), source.index, source.count]
    rest = (shared, packed_source, gate)
    where = (geometry.stride, geometry.padding, geometry.dilation, groups, backend, calibration.mode())
    kind = activation or "none"
    accumulate = out is not None and is_same_memory(addend, out)
    addend = None if accumulate else addend
    if is_unwatched and out is not None:
        _in_place_at(out, tensor, weight, bias, sites, *rest, addend, accumulate, kind, *where)
        return out
    if remembers and is_unwatched and backend == "cpu" and sites.gate is None and source is None:
        # Not what has been cast or broadcast, or a mask that has been copied.
        is_as_given = tensor is input and addend is operands.residual and inactive is operands.inactive
        is_as_given &= can_be_like(*operands.tensors()) and not is_autocast("cpu")
        if is_as_given and (sites is mask or sites.mask is mask):
            call = _Forward((tensor, weight, bias, sites, *rest), (addend, inactive, kind), None, where[:-1])
            _remember(_Passed(call, operands, given, activation), weight)
    listed = sites
    if packed or _needs_epilogue(activation, addend, tensor, weight, bias, gate, inactive):
        listed = Compacted(sites.mask, sites._packed_index(backend), sites.count)
    if is_unwatched:
        result = _forward_at(tensor, weight, bias, listed, *rest, addend, inactive, kind, packed, *where)
        return PackedFeatures(result, sites) if packed else result
    arguments = (tensor, weight, bias, listed.mask, listed.index, listed.count, *rest)
    if out is not None:
        torch.ops.dynconv.masked_conv2d_(out, *arguments, addend, accumulate, kind, *where)
        return out
    if _needs_epilogue(activation, addend, tensor, weight, bias, gate, inactive):
        rows = torch.ops.dynconv.masked_conv2d(*arguments[:-1], None, None, None, "none", True, *where)
        features = PackedFeatures(rows, sites)
        return epilogue(features, activation=activation, residual=residual, inactive=inactive, packed=packed)
    result = torch.ops.dynconv.masked_conv2d(*arguments, addend, inactive, kind, packed, *where)
    return PackedFeatures(result, sites) if packed else result


class Operands(NamedTuple):
    """The tensors of a call of `masked_conv2d`, as they were given."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | ActiveSites
    residual: Tensor | None
    inactive: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All of them, each once; the mask of sites for the sites."""
        _, _, bias, mask, residual, inactive = self
        tensors = [self.input, self.weight, mask.mask if isinstance(mask, ActiveSites) and mask.gate is None else mask]
        if bias is not None:
            tensors.append(bias)
        if residual is not None:
            tensors.append(residual)
        if inactive is not None and inactive is not residual:
            tensors.append(inactive)
        return tensors


class _Passed:
    """A plain call in inference on the CPU whose like has passed all checks before: straight to its faster way."""

    def __init__(self, call: _Forward, operands: Operands, given: tuple, activation: str | None) -> None:
        _, _, bias, mask, residual, inactive = operands
        self.activation, self.plain = activation, plain(*given)
        self.given = given if all(map(_is_constant, given)) else (_NOTHING,) * 4
        self.has_bias, self.has_residual, self.has_inactive = (t is not None for t in (bias, residual, inactive))
        self.adds_what_it_skips = residual is inactive
        self.is_shared = isinstance(mask, ActiveSites)
        self.likeness = Likeness(*operands.tensors())
        self.least_dense = calibration.least_dense(calibration.mode(), call)
        self.ways = _Ways(call, self.is_shared)
        self.count_active = module(".cpu.sites").count_active

    def is_like(
        self, input, weight, bias, stride, padding, dilation, groups, mask, activation, residual, inactive
    ) -> bool:
        """Whether these arguments may take the same way, with no more to look at than the tensors' values."""
        same = self.given  # mostly the very objects of the call before
        if (
            stride is not same[0] or padding is not same[1] or dilation is not same[2] or groups is not same[3]
        ) and plain(stride, padding, dilation, groups) != self.plain:  # fmt: skip
            return False
        if activation is not self.activation:
            return False
        if self.is_shared:
            if not isinstance(mask, ActiveSites) or mask.gate is not None:
                return False
            mask = mask.mask
        tensors = [input, weight, mask]
        if self.has_bias:
            tensors.append(bias)
        elif bias is not None:
            return False
        if self.has_residual:
            tensors.append(residual)
        elif residual is not None:
            return False
        if (residual is inactive) is not self.adds_what_it_skips:
            return False
        if not self.adds_what_it_skips:
            if self.has_inactive:
                tensors.append(inactive)
            elif inactive is not None:
                return False
        return self.likeness.holds(*tensors)

    def __call__(self, input, weight, bias, mask, residual, inactive) -> Tensor:
        if self.least_dense < math.inf:
            active = len(mask) if self.is_shared else self.count_active(mask)
            if active >= self.least_dense:
                plain = mask.mask if self.is_shared else mask
                return self.ways.dense(input, weight, bias, plain, active, residual, inactive)
        return self.ways.sparse(input, weight, bias, mask, residual, inactive)


_NOTHING = object()  # like no argument


def _is_constant(value: IntPair | str) -> bool:
    """Whether an argument cannot change in itself: a list can, and a tensor."""
    return type(value) in (int, str) or (type(value) is tuple and all(type(each) is int for each in value))


# By the weight's id, which another tensor may have later: the calls to be like, the newest last.
_passed: dict[int, tuple[_Passed, ...]] = {}
_MOST_WEIGHTS, _MOST_CALLS = 1024, 8


def _remember(passed: _Passed, weight: Tensor) -> None:
    if len(_passed) >= _MOST_WEIGHTS:  # other weights at every call
        _passed.clear()
    _passed[id(weight)] = (*_passed.get(id(weight), ()), passed)[-_MOST_CALLS:]


def _needs_epilogue(activation: str | None, residual: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the epilogue is a pass of its own, behind a packed convolution, for the derivatives."""
    return (residual is not None or activation is not None) and _needs_grad(residual, *tensors)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _dense(input, weight, bias, stride, padding, dilation, groups, activation, residual, inactive) -> Tensor:
    """Every site, by PyTorch's own convolution."""
    result = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        result = result + residual
    result = reference.ACTIVATIONS[activation](result)
    if inactive is not None:  # nothing is inactive; its gradient is zero, not None
        result = torch.where(torch.ones((), dtype=torch.bool, device=input.device), result, inactive)
    return result


def _shared(
    sites: ActiveSites,
    input: Tensor,
    source: ActiveSites | None,
    geometry: Geometry,
    weight: Tensor,
    groups: int,
    backend: str,
) -> list[Tensor] | None:
    """What layers with the same sites share; a call with a mask of its own makes it inside the op.

    The CPU kernels read addresses from the neighbour table, but for stencils in inference. The Triton kernels compute
    them in registers, and need the inverse map and the pixels that the sites read for the input's gradient, as do the
    CPU's stencils.
    """
    size = tuple(input.shape[2:]) if source is None else source.shape[1:]
    needs_grad = _needs_grad(input)
    if is_stencil(weight.shape, groups):
        if backend == "cpu" and not _needs_grad(input, weight):
            return None
    elif backend == "cpu":
        needs_grad = False
    return _shared_tables(sites, size, source, geometry, backend, needs_grad)


def _shared_tables(
    sites: ActiveSites,
    size: tuple[int, int],
    source: ActiveSites | None,
    geometry: Geometry,
    backend: str,
    with_input_grad: bool,
) -> list[Tensor] | None:
    shared = []
    if backend == "cpu":
        shared.append(
            sites._neighbours(size, geometry) if source is None else sites._packed_neighbours(source, geometry)
        )
    if not with_input_grad:
        return shared or None
    pixels = sites._touched_by(size, geometry) if source is None else source
    shared.append(sites._readers(pixels, geometry) if backend == "cpu" else sites.inverse)
    return [*shared, pixels.index, pixels.count]


def _sites(
    mask: Tensor | ActiveSites | None,
    input: Tensor,
    source: ActiveSites | None,
    shape: tuple[int, ...],
    borrows: bool,
) -> ActiveSites | None:
    """The mask's sites; `borrows` where they do not outlive the call, so that the mask need not be copied."""
    if mask is None:
        return None
    size = (shape[0], shape[2], shape[3])
    if isinstance(mask, ActiveSites):
        sites = mask
    else:
        sites = ActiveSites._borrowed(mask, size) if borrows else ActiveSites(mask, size)
    if sites.shape != size:
        raise ValueError(f"mask: expected sites of {list(size)} (N, Ho, Wo), got {list(sites.shape)}")
    if sites.mask.device != input.device:
        raise ValueError(f"mask: expected a mask on {input.device}, where the input is, got {sites.mask.device}")
    sites._check_pixels(tuple(input.shape[2:]) if source is None else source.shape[1:])
    return sites
