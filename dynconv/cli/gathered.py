"""Layers of dynamic width for `bench` and `verify`: gathered_conv2d and gathered_linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dynconv
from dynconv import ActiveChannels, ActiveSites

from .._geometry import Geometry
from .._masks import blob_mask
from .._timing import input_sets
from .bounds import Arithmetic, Bounded, Verdict, arithmetic, judge, worst_of
from .layers import Width, kept_groups


class WidthBench:
    """A layer's tensors, and the calls to compare; what `bench.Bench` is for a masked layer.

    A mask is bool [batch, Cin + Cout]: the kept inputs of each sample, then its kept outputs.
    """

    def __init__(self, layer: Width, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.layer, self.batch, self.dtype, self.device = layer, batch, dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self._values = torch.Generator(device).manual_seed(seed)
        area = () if layer.linear else (layer.height, layer.width)
        self.input_shape = (batch, layer.in_channels, *area)
        self.output_shape = (batch, layer.out_channels, *area)
        weight_shape = (layer.out_channels, layer.in_channels, *(() if layer.linear else 2 * (layer.kernel,)))
        element = torch.finfo(dtype).bits // 8
        self.sets = input_sets(device, element * (math.prod(self.input_shape) + math.prod(self.output_shape)))
        self.inputs = [self._tensor(*self.input_shape) for _ in range(self.sets)]
        self.grads = [self._tensor(*self.output_shape) for _ in range(self.sets)]
        self.weight = self._tensor(*weight_shape, scale=layer.products**-0.5)

    def _tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = (torch.randn(shape, generator=self._values, device=self.device) * scale).to(self.dtype)
        return made if made.dim() == 2 else made.contiguous(memory_format=torch.channels_last)

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(kept inputs, kept outputs)."""
        return mask[:, : self.layer.in_channels], mask[:, self.layer.in_channels :]

    def dense(self, number: int) -> Tensor:
        """What users run today: PyTorch's own layer, channels_last."""
        return self.apply(self.inputs[number], self.weight)

    def apply(self, input: Tensor, weight: Tensor) -> Tensor:
        """The dense layer on other operands."""
        return F.linear(input, weight) if self.layer.linear else F.conv2d(input, weight, padding=self.layer.padding)

    def masked_dense(self, number: int, mask: Tensor) -> Tensor:
        """The usual idiom of the papers' code: compute everything, then multiply by the masks."""
        ins, outs = (m.view(*m.shape, *(1,) * (self.inputs[0].dim() - 2)) for m in self.split(mask))
        return self.apply(self.inputs[number] * ins, self.weight) * outs

    def sliced(self, number: int, mask: Tensor) -> Tensor:
        """The other idiom: a sample after the other, each with the slice of the weight that it needs."""
        out = torch.zeros_like(self.grads[number])
        for n, (ins, outs) in enumerate(zip(*(m.unbind() for m in self.split(mask)))):
            ins, outs = ins.nonzero().flatten(), outs.nonzero().flatten()
            if len(ins) and len(outs):
                weight = self.weight.index_select(0, outs).index_select(1, ins)
                out[n].index_copy_(0, outs, self.apply(self.inputs[number][n : n + 1].index_select(1, ins), weight)[0])
        return out

    def lists(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [N, kept]: the kept inputs, and outputs, of masks that keep the same number for each sample."""
        return tuple(m.nonzero()[:, 1].view(len(m), -1) for m in self.split(mask))

    def grouped(self, number: int, kept: tuple[Tensor, Tensor]) -> Tensor:
        """Another idiom: every sample's slice of the weight gathered, and one convolution in N groups.

        It returns the kept outputs alone, without zeros between them.
        """
        ins, outs = kept
        weight = self.weight.view(*self.weight.shape[:2], -1)
        weight = weight[outs[:, :, None], ins[:, None, :]]  # [N, kept outputs, kept inputs, taps]
        input = self.inputs[number]
        if self.layer.linear:
            return torch.bmm(weight[..., 0], input.gather(1, ins)[:, :, None])[:, :, 0]
        packed = input.gather(1, ins[:, :, None, None].expand(-1, -1, *input.shape[2:]))
        weight = weight.flatten(0, 1).unflatten(2, (self.layer.kernel, self.layer.kernel))
        result = F.conv2d(
            packed.reshape(1, -1, *input.shape[2:]), weight, padding=self.layer.padding, groups=len(input)
        )
        return result.view(len(input), -1, *input.shape[2:])

    def sparse(self, number: int, mask: Tensor | tuple, out: Tensor | None = None) -> Tensor:
        """The op."""
        ins, outs = mask if isinstance(mask, tuple) else self.compact(mask)
        if self.layer.linear:
            return dynconv.gathered_linear(self.inputs[number], self.weight, in_mask=ins, out_mask=outs)
        return dynconv.gathered_conv2d(
            self.inputs[number], self.weight, padding=self.layer.padding, in_mask=ins, out_mask=outs
        )

    def compact(self, mask: Tensor) -> tuple[ActiveChannels, ActiveChannels]:
        """What layers that share their masks pay once."""
        size = self.layer.granularity
        ins, outs = self.split(mask)
        return tuple(ActiveChannels(m[:, ::size], tuple(m.shape), granularity=size) for m in (ins, outs))

    def gradients(self, operation: Callable, number: int, *arguments) -> tuple[Tensor, ...]:
        """Forward, and the gradients of input and weight."""
        input, weight = self.inputs[number].requires_grad_(), self.weight.requires_grad_()
        try:
            return torch.autograd.grad(operation(number, *arguments), (input, weight), self.grads[number])
        finally:
            input.requires_grad_(False), weight.requires_grad_(False)

    def work(self, mask: Tensor) -> float:
        """The share of the dense products: the mean over the samples of kept in * kept out."""
        ins, outs = (m.float().mean(1) for m in self.split(mask))
        return (ins * outs).mean().item()


class WidthCheck:
    """The op against a dense layer of more precision, by the bound of `dynconv.cli.bounds`."""

    def __init__(self, bench: WidthBench) -> None:
        self.bench = bench
        # As for masked layers: on a CPU float32's own error is in the bound.
        self.precision = torch.float64 if bench.device == "cuda" else torch.float32
        self.arithmetic = arithmetic(bench.dtype, bench.device)

    def _masks(self, mask: Tensor) -> list[Tensor]:
        dims = (1,) * (self.bench.inputs[0].dim() - 2)
        return [m.view(*m.shape, *dims) for m in self.bench.split(mask)]

    def output(self, actual: Tensor, mask: Tensor, inactive: Tensor | None = None) -> Verdict:
        """The channels that are not kept have to be zero, exactly."""
        bench, (ins, outs) = self.bench, self._masks(mask)
        input, weight = bench.inputs[0].to(self.precision) * ins, bench.weight.to(self.precision)
        expected, magnitude = bench.apply(input, weight) * outs, bench.apply(input.abs(), weight.abs())
        bound = self.arithmetic.bound(expected, magnitude, bench.layer.products, self.precision)
        return judge(actual, expected, torch.where(outs, bound, 0))

    def gradients(self, mask: Tensor) -> Verdict:
        """Of input and weight; the worse of the two verdicts."""
        bench, (ins, outs) = self.bench, self._masks(mask)
        actual = bench.gradients(bench.sparse, 0, mask)
        operands = [bench.inputs[0].to(self.precision) * ins, bench.weight.to(self.precision)]
        grad = bench.grads[0].to(self.precision) * outs
        expected = self._gradients(operands, grad, ins)
        magnitude = self._gradients([t.abs() for t in operands], grad.abs(), ins)
        layer = bench.layer
        terms = (layer.out_channels * layer.kernel**2, bench.batch * layer.height * layer.width)
        bounds = [self.arithmetic.bound(e, m, n, self.precision) for e, m, n in zip(expected, magnitude, terms)]
        bounds[0] = torch.where(ins, bounds[0], 0)
        return worst_of([judge(*triple) for triple in zip(actual, expected, bounds)])

    def _gradients(self, operands: list[Tensor], grad: Tensor, ins: Tensor) -> list[Tensor]:
        input, weight = (t.detach().requires_grad_() for t in operands)
        grads = torch.autograd.grad(self.bench.apply(input, weight), (input, weight), grad)
        return [grads[0] * ins, grads[1]]


@dataclass(frozen=True)
class WidthCase:
    """One gathered layer of `verify`, or two in a packed chain; the tensors follow from it."""

    name: str
    channels: tuple[int, ...] = (24, 40)
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    granularity: int = 8
    rate: float = 0.5
    gate: bool = False
    sites: float | None = None  # the density of a spatial mask
    linear: bool = False


WIDTHS = (
    WidthCase("3x3 width", gate=True),
    WidthCase("3x3 width, single channels", granularity=1),
    WidthCase("3x3 width stride 2", stride=2, dilation=2),
    WidthCase("1x1 width", (64, 48), 1, granularity=16),
    WidthCase("3x3 width in 2 groups", groups=2, gate=True),
    WidthCase("depthwise width", (40, 40), groups=40),
    WidthCase("3x3 width, nothing kept", rate=0.0),
    WidthCase("3x3 width at sites", sites=0.4, gate=True),
    WidthCase("packed width", (24, 40, 32, 24), gate=True),
    WidthCase("packed width at sites", (24, 40, 32, 24), sites=0.4),
    WidthCase("linear width", (200, 96), linear=True, gate=True),
    WidthCase("linear width, single channels", (200, 96), linear=True, granularity=1),
)
SIZE = (13, 11)
BATCH = 3


class Gathered:
    """gathered_conv2d, chains of it that stay packed, and gathered_linear: forward, and every operand's gradient."""

    cases = WIDTHS

    def __init__(self, case: WidthCase, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.layers = len(case.channels) - 1
        self.op = "gathered_linear" if case.linear else "gathered_conv2d" if self.layers == 1 else "packed channels"
        self._generator = torch.Generator().manual_seed(1000 + WIDTHS.index(case))
        area, taps = ((), ()) if case.linear else (SIZE, (case.kernel, case.kernel))
        self.leaves = {"input": self._tensor(BATCH, case.channels[0], *area)}
        self.sizes = [area]
        for number, (cin, cout) in enumerate(zip(case.channels, case.channels[1:])):
            shape = (cout, cin // case.groups, *taps)
            self.leaves[f"weight {number}"] = self._tensor(*shape, scale=math.prod(shape[1:]) ** -0.5)
            self.leaves[f"bias {number}"] = self._tensor(cout, scale=0.5)
            if not case.linear:
                geometry = Geometry.of(taps, *self.geometry(number)[:3])
                self.sizes.append(geometry.output_size(*self.sizes[-1]))
        self.size = () if case.linear else self.sizes[-1]
        # A chain begins and ends with all channels: what it keeps lies between its layers.
        self.masks = [kept_groups(BATCH, c, case.granularity, case.rate, self._generator) for c in case.channels]
        self.masks = [m.to(device) for m in self.masks]
        if self.layers > 1:
            self.masks[0] = self.masks[-1] = None
        if case.gate:
            for number, mask in enumerate(self.masks):
                if mask is not None:
                    gate = self._tensor(*mask.shape)
                    self.leaves[f"gate {number}"] = torch.where(mask, torch.where(gate == 0, 1, gate), 0)
        self.sites = None
        if case.sites is not None:
            self.sites = blob_mask(BATCH, *self.size, case.sites, self._generator).to(device)
        self.grad = self._tensor(BATCH, case.channels[-1], *self.size)

    def _tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = (torch.randn(shape, generator=self._generator) * scale).to(self.dtype).to(self.device)
        return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made

    def geometry(self, number: int) -> tuple:
        """Stride, padding, dilation and groups of a layer; a chain strides in its first one."""
        case = self.case
        return case.stride if number == 0 else 1, case.kernel // 2 * case.dilation, case.dilation, case.groups

    def source(self, quantity: str) -> str:
        """What n of the bound counts."""
        return "each layer's own, passed on"

    def expect(self, rules: Callable[..., Arithmetic], backend: str) -> None:
        """Dense, in float64: a running error analysis of the products that are kept, forward and backward."""
        rules = rules()
        leaf = {name: tensor.double() for name, tensor in self.leaves.items()}
        kept = [self._factor(number, leaf) for number in range(self.layers + 1)]
        active = [None if s is None else s.mask for s in self._computed()]
        inputs, before = [Bounded.of(leaf["input"])], []
        with torch.no_grad():
            inputs[0] = self._scale(rules, inputs[0], kept[0])
            for number in range(self.layers):
                weight, bias = leaf[f"weight {number}"], self._column(leaf[f"bias {number}"])
                terms = math.prod(weight.shape[1:])
                made = rules.product(lambda x, w: self._apply(x, w, number), inputs[-1], weight, terms, bias)  # noqa: B023
                before.append(made)
                made = self._at(active[number], self._scale(rules, made, kept[number + 1]))
                if number < self.layers - 1:
                    inputs.append(rules.activate(made, "relu"))
                    before[-1] = (before[-1], made)
                else:
                    output = made
            self._expect = {"output": (output,), "output, autograd": (output,)}
            self._backward(rules, leaf, kept, active, inputs, before)
        self.expected = {name: tuple(b.value for b in value) for name, value in self._expect.items()}
        self.bounds = {name: tuple(b.error for b in value) for name, value in self._expect.items()}

    def _backward(self, rules, leaf, kept, active, inputs, before) -> None:
        grad = Bounded.of(self.grad.double())
        weights, biases, gates = [], [], {}
        dims = tuple(range(2, self.grad.dim()))
        for number in reversed(range(self.layers)):
            made = before[number]
            if isinstance(made, tuple):
                made, activated = made
                slope = rules.slope(activated, "relu")
                grad = rules.product(torch.mul, grad, slope, 1)
            grad = self._at(active[number], grad)
            mask, gate = kept[number + 1]
            if gate is not None:
                total = lambda a, b: (a * b).sum(dims) if dims else a * b
                count = math.prod(self.grad.shape[2:]) if dims else 1
                own = rules.product(total, self._at(active[number], made), grad, count)
                gates[number + 1] = Bounded(torch.where(mask, own.value, 0), torch.where(mask, own.error, 0))
            grad = self._scale(rules, grad, kept[number + 1])
            weight, input = leaf[f"weight {number}"], inputs[number]
            sites = BATCH * math.prod(self.sizes[number + 1]) if dims else BATCH
            of_weight = lambda x, g: self._grads(x, weight, g, number)[1]  # noqa: B023
            of_input = lambda g, w: self._grads(input.value, w, g, number)[0]  # noqa: B023
            weights.insert(0, rules.product(of_weight, input, grad, sites))
            ones = torch.ones_like(grad.value)
            sums = lambda g, one: (g * one).sum((0, *dims))
            biases.insert(0, rules.product(sums, grad, ones, sites))
            terms = math.prod(weight.shape[2:]) * weight.shape[0] // self.case.groups
            grad = rules.product(of_input, grad, weight, terms)
        mask, gate = kept[0]
        if gate is not None:
            total = lambda a, b: (a * b).sum(dims) if dims else a * b
            own = rules.product(total, leaf["input"], grad, math.prod(self.grad.shape[2:]) if dims else 1)
            gates[0] = Bounded(torch.where(mask, own.value, 0), torch.where(mask, own.error, 0))
        self._expect["grad input"] = (self._scale(rules, grad, kept[0]),)
        self._expect["grad weight"], self._expect["grad bias"] = tuple(weights), tuple(biases)
        if gates:
            self._expect["grad gate"] = tuple(gates[number] for number in sorted(gates))

    def _factor(self, number: int, leaf: dict) -> tuple[Tensor | None, Tensor | None]:
        return self.masks[number], leaf.get(f"gate {number}")

    def _column(self, vector: Tensor) -> Tensor:
        """[C] or [N, C] against features."""
        vector = vector if vector.dim() == 2 else vector[None]
        return vector if self.case.linear else vector[:, :, None, None]

    def _scale(self, rules: Arithmetic, value: Bounded, factor: tuple) -> Bounded:
        """The kept channels, times their gates, among zeros."""
        mask, gate = factor
        if mask is None:
            return value
        if gate is not None:
            value = rules.product(torch.mul, value, self._column(gate), 1)
        mask = self._column(mask)
        return Bounded(torch.where(mask, value.value, 0), torch.where(mask, value.error, 0))

    @staticmethod
    def _at(active: Tensor | None, value: Bounded) -> Bounded:
        if active is None:
            return value
        return Bounded(torch.where(active, value.value, 0), torch.where(active, value.error, 0))

    def _apply(self, input: Tensor, weight: Tensor, number: int) -> Tensor:
        return F.linear(input, weight) if self.case.linear else F.conv2d(input, weight, None, *self.geometry(number))

    def _grads(self, input: Tensor, weight: Tensor, grad: Tensor, number: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
            return torch.autograd.grad(self._apply(input, weight, number), (input, weight), grad)

    def _computed(self) -> list[ActiveSites | None]:
        if self.sites is None:
            return [None] * self.layers
        computed = [ActiveSites(self.sites)]
        for number in range(self.layers - 1, 0, -1):
            stride, padding, dilation, _ = self.geometry(number)
            kernel = (self.case.kernel, self.case.kernel)
            computed.insert(0, computed[0].touched(self.sizes[number], kernel, stride, padding, dilation))
        return computed

    def actual(self) -> dict[str, tuple[Tensor, ...]]:
        """Every quantity of the ops under test."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.leaves.items()}
        output = self._run(leaves)
        grads = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), self.grad), strict=True))
        with torch.no_grad():
            results = {"output": (self._run(leaves),), "output, autograd": (output.detach(),)}
        for name in ("input", "weight", "bias", "gate"):
            found = [grads[key] for key in sorted(grads) if key.split()[0] == name]
            if found:
                results[f"grad {name}"] = tuple(found)
        return results

    def _run(self, leaves: dict[str, Tensor]) -> Tensor:
        case, computed = self.case, self._computed()
        channels = []
        for number, mask in enumerate(self.masks):
            mask = leaves.get(f"gate {number}", mask)
            size = case.granularity
            # A gate is of single channels; a bool mask says which groups it keeps.
            if mask is not None and mask.dtype == torch.bool:
                mask = ActiveChannels(mask[:, ::size], tuple(mask.shape), granularity=size)
            channels.append(mask)
        features = leaves["input"]
        for number in range(self.layers):
            weight, bias = leaves[f"weight {number}"], leaves[f"bias {number}"]
            masks = dict(in_mask=channels[number] if number == 0 else None, out_mask=channels[number + 1])
            if case.linear:
                return dynconv.gathered_linear(features, weight, bias, **masks)
            last = number == self.layers - 1
            features = dynconv.gathered_conv2d(
                features, weight, bias, *self.geometry(number), **masks, mask=computed[number],
                activation=None if last else "relu", packed=not last,
            )  # fmt: skip
        return features

    def judge(self, quantity: str, actual: tuple[Tensor, ...]) -> Verdict:
        """The worst of a quantity's tensors."""
        return worst_of([judge(*t) for t in zip(actual, self.expected[quantity], self.bounds[quantity], strict=True)])
