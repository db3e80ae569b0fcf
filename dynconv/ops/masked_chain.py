"""masked_chain: the convolutions of a block at active sites, in inference on the CPU; one call for all of them.

A block of three layers pays Python, the dispatcher and three neighbour tables for each call of `masked_conv2d`; on
small feature maps that is more than the arithmetic. Here it is one kernel that keeps what lies between the layers in
the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import module, unwatched
from .._flops import register_flop_formula
from .._geometry import Geometry
from ..sites import ActiveSites
from ._common import channels_last, check_overlap, gate_of, in_rows, register_autograd

_library = torch.library.Library("dynconv", "FRAGMENT")
_OPERANDS = "Tensor mask, Tensor? gate, Tensor[] weights, Tensor[] prepared, int[] geometry, str[] activations"
_library.define(f"masked_chain(Tensor input, {_OPERANDS}, Tensor? residual, Tensor? inactive) -> Tensor")
_library.define(f"masked_chain_(Tensor(a!) input, {_OPERANDS}) -> ()")
_library.define("prepare_chain(Tensor weight, Tensor? bias, int groups) -> (Tensor weight, Tensor bias)")


class Layer(NamedTuple):
    """A convolution of a chain: weight [Cout, Cin / groups, kH, kW] and what `prepare` made of it, and what follows."""

    weight: Tensor
    prepared: tuple[Tensor, Tensor]
    geometry: Geometry
    groups: int
    activation: str | None


def _stages(weights, prepared, geometry, activations):
    kernels = module(".cpu.chain")
    stages = []
    for number, (weight, activation) in enumerate(zip(weights, activations, strict=True)):
        stride, padding, dilation = (tuple(geometry[7 * number + i : 7 * number + i + 2]) for i in (0, 2, 4))
        groups = geometry[7 * number + 6]
        stages.append(
            kernels.Stage(
                prepared[2 * number], prepared[2 * number + 1], weight.shape[1] * groups, weight.shape[0], groups,
                tuple(weight.shape[2:]), stride, padding, dilation, activation,
            )
        )  # fmt: skip
    return stages


def _sizes(input: Tensor, weights, geometry) -> list[tuple[int, int]]:
    """(H, W) of the input and of every layer's output."""
    sizes = [tuple(input.shape[2:])]
    for number, weight in enumerate(weights):
        where = geometry[7 * number : 7 * number + 6]
        sizes.append(
            tuple(
                (sizes[-1][i] + 2 * where[2 + i] - where[4 + i] * (weight.shape[2 + i] - 1) - 1) // where[i] + 1
                for i in (0, 1)
            )
        )
    return sizes


def _chain_of(input, weights, prepared, geometry, activations):
    stages, sizes = _stages(weights, prepared, geometry, activations), _sizes(input, weights, geometry)
    return module(".cpu.chain").Chain(stages, sizes, input.shape[0], input.dtype)


def run_chain(
    chain, input: Tensor, mask: Tensor, gate: Tensor | None, shortcut: Tensor | None, in_place: bool
) -> Tensor:
    """Run a chain that `chain_of` has made on tensors that nobody watches; the shortcut is what skipped sites are."""
    return _run_in_place(chain, input, mask, gate) if in_place else _run(chain, input, mask, gate, shortcut, shortcut)


def _run(chain, input, mask, gate, residual, inactive) -> Tensor:
    out = channels_last((mask.shape[0], chain.channels, *mask.shape[2:]), input)
    chain.run(in_rows(input), mask, gate, in_rows(residual), in_rows(inactive), out, in_place=False)
    return out


def _run_in_place(chain, input, mask, gate) -> Tensor:
    check_overlap("input", input, mask=mask, gate=gate)
    chain.run(input, mask, gate, input, None, input, in_place=True)
    torch.autograd.graph.increment_version(input)
    return input


def _chain(input, mask, gate, weights, prepared, geometry, activations, residual, inactive) -> Tensor:
    chain = _chain_of(input, weights, prepared, geometry, activations)
    return _run(chain, input, mask, gate, residual, inactive)


def _in_place(input, mask, gate, weights, prepared, geometry, activations) -> None:
    _run_in_place(_chain_of(input, weights, prepared, geometry, activations), input, mask, gate)


def _prepare(weight, bias, groups) -> tuple[Tensor, Tensor]:
    return module(".cpu.chain").prepare(weight, bias, groups)


_library.impl("masked_chain", _chain, "CPU")
_library.impl("masked_chain_", _in_place, "CPU")
_library.impl("prepare_chain", _prepare, "CPU")
for _name in ("masked_chain", "masked_chain_", "prepare_chain"):
    register_autograd(_library, _name)


@torch.library.register_fake("dynconv::masked_chain", lib=_library)
def _(input, mask, gate, weights, *rest):
    return channels_last((mask.shape[0], weights[-1].shape[0], *mask.shape[2:]), input)


@torch.library.register_fake("dynconv::masked_chain_", lib=_library)
def _(input, *rest):
    return None


@torch.library.register_fake("dynconv::prepare_chain", lib=_library)
def _(weight, bias, groups):
    shape, dtype = module(".cpu.chain").prepared_shape(weight.shape, weight.dtype, groups)
    return weight.new_empty(shape, dtype=dtype), weight.new_empty(weight.shape[0], dtype=dtype)


@register_flop_formula(torch.ops.dynconv.masked_chain, get_raw=True)
def _flops(input, mask, gate, weights, prepared, geometry, activations, *rest, **unused) -> int:
    """2 * sites * Cout * Cin / groups * kH * kW of each layer at the sites that the next one reads."""
    total, sites, sizes = 0, ActiveSites(mask), _sizes(input, weights, geometry)
    for number in range(len(weights) - 1, -1, -1):
        stride, padding, dilation = (tuple(geometry[7 * number + i : 7 * number + i + 2]) for i in (0, 2, 4))
        total += 2 * len(sites) * weights[number].numel()
        sites = sites.touched(sizes[number], tuple(weights[number].shape[2:]), stride, padding, dilation)
    return total


@register_flop_formula(torch.ops.dynconv.masked_chain_, get_raw=True)
def _in_place_flops(*arguments, **unused) -> int:
    return _flops(*arguments)


def _operands_of(layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor], list[int], list[str]]:
    geometry = []
    for layer in layers:
        where = layer.geometry
        geometry += [*where.stride, *where.padding, *where.dilation, layer.groups]
    prepared = [tensor for layer in layers for tensor in layer.prepared]
    return [layer.weight for layer in layers], prepared, geometry, [layer.activation or "none" for layer in layers]


def chain_of(input: Tensor, layers: Sequence[Layer]):
    """What `run_chain` runs on inputs like this one: to be kept while the layers do not change."""
    return _chain_of(input, *_operands_of(layers))


def prepare(weight: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """What the kernel reads of a layer: to be kept while its parameters do not change."""
    return torch.ops.dynconv.prepare_chain(weight, bias, groups)


def masked_chain(
    input: Tensor,
    layers: Sequence[Layer],
    sites: ActiveSites,
    *,
    residual: Tensor | None = None,
    inactive: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """where(mask, activation(gate * chain(input) + residual), inactive): inference, CPU tensors, checked by the caller.

    Every layer is computed at the sites that the next one reads. The last layer's activation comes after the
    residual. `inplace` adds to `input` itself at the active sites.
    """
    operands = sites.mask, gate_of(sites, input.dtype), *_operands_of(layers)
    is_unwatched = unwatched(input, sites.mask, residual, inactive)
    if inplace:
        (_in_place if is_unwatched else torch.ops.dynconv.masked_chain_)(input, *operands)
        return input
    return (_chain if is_unwatched else torch.ops.dynconv.masked_chain)(input, *operands, residual, inactive)
