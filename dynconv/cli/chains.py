"""Packed chains, their epilogues and whole residual blocks for `verify`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dynconv
from dynconv import nn as modules
from dynconv.nn.blocks import MaskedBlock

from .blocks import geometry_of, smooth
from .bounds import (
    Arithmetic,
    Bounded,
    BoundedChain,
    Link,
    Verdict,
    gamma,
    judge,
    judge_training,
    unit_roundoff,
    worst_of,
)
from .layers import blob_mask

SIZE = (13, 11)


@dataclass(frozen=True)
class ChainCase:
    """Convolutions in a row and what surrounds them; `layers`: (output channels, kernel, stride, groups, activation).

    A chain of one layer is `masked_conv2d` with an epilogue; in longer ones the features stay packed in between.
    """

    name: str
    layers: tuple[tuple[int, int, int, int, str | None], ...]
    channels: int = 24
    gate: bool = False
    residual: bool = True
    inactive: bool = False
    packed_input: bool = False
    unpack: bool = False  # the last layer's result is packed as well, and `unpack` has the epilogue


@dataclass(frozen=True)
class BlockCase:
    """A residual block of `dynconv.nn`."""

    name: str
    make: Callable[[], MaskedBlock]
    channels: int
    gate: bool = False


CHAINS = (
    ChainCase("relu 3x3 gate", ((40, 3, 1, 1, "relu"),), gate=True, inactive=True),
    ChainCase("relu6 depthwise 3x3", ((24, 3, 1, 24, "relu6"),), inactive=True),
    ChainCase("silu 1x1 gate", ((40, 1, 1, 1, "silu"),), gate=True),
    ChainCase("gelu 3x3 stride 2", ((17, 3, 2, 1, "gelu"),)),
    ChainCase("hardswish groups of 8", ((48, 3, 1, 3, "hardswish"),), gate=True, inactive=True),
    ChainCase(
        "inverted residual packed", ((48, 1, 1, 1, "relu6"), (48, 3, 1, 48, "relu6"), (16, 1, 1, 1, None)), 16,
        gate=True, inactive=True,
    ),
    ChainCase(
        "packed input, 3x3 stride 2, unpack", ((32, 3, 1, 1, "silu"), (24, 3, 2, 2, "relu")), packed_input=True,
        unpack=True, inactive=True,
    ),
)  # fmt: skip


def _downsample(cin: int, cout: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


BLOCKS = (
    BlockCase("basic block stride 2", lambda: modules.MaskedBasicBlock(16, 24, 2, _downsample(16, 24, 2)), 16, True),
    BlockCase("bottleneck", lambda: modules.MaskedBottleneck(48, 12), 48, True),
    BlockCase("inverted residual", lambda: modules.MaskedInvertedResidual(16, 16, 1, 6), 16, True),
    BlockCase("inverted residual stride 2", lambda: modules.MaskedInvertedResidual(16, 24, 2, 6), 16),
)


class _Chain:
    """Tensors by name, what they have to become, and the verdict on what they did."""

    expected: dict[str, tuple[Tensor, ...]]

    def __init__(self, case: ChainCase | BlockCase, number: int, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self._generator = torch.Generator().manual_seed(number)
        self.expected, self.bounds = {}, {}

    def tensor(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """The same numbers for every backend and run, rounded once to the type under test."""
        made = (torch.randn(shape, generator=self._generator) * scale + shift).to(self.dtype).to(self.device)
        return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made

    def gates(self, height: int, width: int) -> None:
        """A mask of the output and, where the case has one, its gate."""
        self.mask = blob_mask(2, height, width, 0.4, self._generator).to(self.device)
        self.gate = torch.where(self.mask, self.tensor(*self.mask.shape, scale=0.2, shift=1.0), 0)

    def _expect(self, quantity: str, values: list[Bounded | Tensor]) -> None:
        values = [Bounded.of(value) for value in values]
        self.expected[quantity] = tuple(value.value for value in values)
        self.bounds[quantity] = tuple(value.error for value in values)

    def _expect_outputs(self, output: Bounded, inactive: Tensor | int, cache: Tensor | None) -> None:
        self._expect("output", [_where(self.mask, output, inactive)])
        self._expect("output, autograd", [_where(self.mask, output, inactive)])
        if cache is not None:
            self._expect("in place", [_where(self.mask, output, cache)])

    def source(self, quantity: str) -> str:
        """What n of the bound counts."""
        return "exact" if quantity == "grad inactive" else "each layer's own, passed on"

    def judge(self, quantity: str, actual: tuple[Tensor, ...]) -> Verdict:
        """The worst of a quantity's tensors."""
        expected, bounds = self.expected[quantity], self.bounds[quantity]
        return worst_of([judge(*triple) for triple in zip(actual, expected, bounds, strict=True)])


def _where(mask: Tensor, value: Bounded, other: Tensor | int) -> Bounded:
    return Bounded(torch.where(mask, value.value, other), torch.where(mask, value.error, 0))


class MaskedChain(_Chain):
    """masked_conv2d with its epilogue, and chains of it that stay packed."""

    cases = CHAINS

    def __init__(self, case: ChainCase, dtype: torch.dtype, device: str) -> None:
        super().__init__(case, CHAINS.index(case), dtype, device)
        self.op = "packed chain" if len(case.layers) > 1 else "fused epilogue"
        channels, sizes = case.channels, [SIZE]
        self.leaves = {"input": self.tensor(2, channels, *SIZE)}
        for number, (width, kernel, stride, groups, _) in enumerate(case.layers):
            terms = channels // groups * kernel**2
            self.leaves[f"weight {number}"] = self.tensor(width, channels // groups, kernel, kernel, scale=terms**-0.5)
            self.leaves[f"bias {number}"] = self.tensor(width, scale=0.5)
            sizes.append(tuple((length - 1) // stride + 1 for length in sizes[-1]))
            channels = width
        self.sizes, shape = sizes, (2, channels, *sizes[-1])
        self.gates(*sizes[-1])
        self.read = blob_mask(2, *SIZE, 0.7, self._generator).to(device) if case.packed_input else None
        if case.gate:
            self.leaves["gate"] = self.gate
        for name in ("residual", "inactive"):
            if getattr(case, name):
                self.leaves[name] = self.tensor(*shape)
        self.cache, self.grad = self.tensor(*shape), self.tensor(*shape)

    def expect(self, rules: Callable[..., Arithmetic], backend: str) -> None:
        """Dense, in float64."""
        leaf = {name: tensor.double() for name, tensor in self.leaves.items()}
        links = []
        for number, (_, kernel, stride, groups, activation) in enumerate(self.case.layers):
            last = number == len(self.case.layers) - 1
            geometry = (stride, kernel // 2, 1, groups)
            weight, bias = leaf[f"weight {number}"], leaf[f"bias {number}"]
            links.append(Link(weight, bias, geometry, None if last else activation))
        read = torch.ones_like(leaf["input"][:, :1], dtype=torch.bool) if self.read is None else self.read
        input = torch.where(read, leaf["input"], 0)
        activation = self.case.layers[-1][-1]
        chain = BoundedChain(rules(), links, input, activation, leaf.get("gate"), leaf.get("residual"))
        self._expect_outputs(chain.output, leaf.get("inactive", 0), self.cache.double())
        grads = chain.backward(torch.where(self.mask, self.grad, 0).double())
        self._expect("grad input", [_where(read, grads["input"], 0)])
        for name in ("weight", "bias"):
            self._expect(f"grad {name}", [grads[f"{name} {number}"] for number in range(len(links))])
        if "gate" in leaf:
            self._expect("grad gate", [_where(self.mask, grads["gate"], 0)])
        if "residual" in leaf:
            self._expect("grad residual", [_where(self.mask, grads["shortcut"], 0)])
        if "inactive" in leaf:
            self._expect("grad inactive", [torch.where(self.mask, 0, self.grad).double()])

    def actual(self) -> dict[str, tuple[Tensor, ...]]:
        """Every quantity of the ops under test."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.leaves.items()}
        output = self._run(leaves)
        grads = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), self.grad), strict=True))
        with torch.no_grad():
            fused = self._run(leaves)
            updated = self._run(leaves, self.cache.clone(memory_format=torch.preserve_format))
        results = {"output": (fused,), "output, autograd": (output.detach(),), "in place": (updated,)}
        for name in ("weight", "bias"):
            results[f"grad {name}"] = tuple(grads.pop(f"{name} {number}") for number in range(len(self.case.layers)))
        return results | {f"grad {name}": (grad,) for name, grad in grads.items()}

    def _run(self, leaves: dict[str, Tensor], out: Tensor | None = None) -> Tensor:
        layers = self.case.layers
        computed = [dynconv.ActiveSites(leaves.get("gate", self.mask))]
        for (_, kernel, stride, _, _), size in zip(layers[:0:-1], self.sizes[-2:0:-1], strict=True):
            computed.insert(0, computed[0].touched(size, kernel, stride, kernel // 2))
        features = leaves["input"]
        if self.read is not None:
            features = dynconv.pack(features, dynconv.ActiveSites(self.read))
        finish = {"residual": leaves.get("residual"), "out": out, "activation": layers[-1][-1]}
        finish["inactive"] = leaves.get("inactive") if out is None else None
        for number, (_, kernel, stride, groups, activation) in enumerate(layers):
            last = number == len(layers) - 1
            after = finish if last else {"activation": activation, "packed": True}
            if last and self.case.unpack:
                after = {"packed": True}
            weight, bias = leaves[f"weight {number}"], leaves[f"bias {number}"]
            features = dynconv.masked_conv2d(
                features, weight, bias, stride, kernel // 2, 1, groups, mask=computed[number], **after
            )
        return features.unpack(**finish) if self.case.unpack else features


class _Block(_Chain):
    """A block with parameters and running statistics that are not the initial ones."""

    cases = BLOCKS

    def __init__(self, case: BlockCase, dtype: torch.dtype, device: str) -> None:
        number = BLOCKS.index(case)
        super().__init__(case, len(CHAINS) + number, dtype, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            block = case.make()
            for norm in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
                nn.init.normal_(norm.running_mean, 0, 0.3)
                nn.init.normal_(norm.bias, 0, 0.3)
                nn.init.uniform_(norm.running_var, 0.2, 0.8)
                nn.init.uniform_(norm.weight, 0.5, 1.5)
        self.block = block.to(device, dtype, memory_format=torch.channels_last)
        self.input = self.tensor(2, case.channels, *SIZE)
        with torch.no_grad():
            shape = copy.deepcopy(block).float().eval()(self.input.float()).shape
        self.gates(*shape[2:])
        self.grad = self.tensor(*shape)
        self.name = type(block).__name__.removeprefix("Masked")


class EvalBlock(_Block):
    """A block in eval mode against its dense form, the normalisation folded into each convolution."""

    def __init__(self, case: BlockCase, dtype: torch.dtype, device: str) -> None:
        super().__init__(case, dtype, device)
        self.op = f"{self.name}, eval"
        self.block.eval()
        self.modules = [(self.block.get_submodule(s.conv), self.block.get_submodule(s.norm)) for s in self.block.stages]

    def expect(self, rules: Callable[..., Arithmetic], backend: str) -> None:
        """Dense, in float64."""
        rules, block, input = rules(), self.block, self.input.double()
        with torch.no_grad():
            folds = [_Fold(conv, norm) for conv, norm in self.modules]
            activations = [stage.activation for stage in block.stages[:-1]] + [None]
            links = [fold.link(activation) for fold, activation in zip(folds, activations, strict=True)]
            side = None
            if block.shortcut_path == "downsample":
                side = BoundedChain(rules, [_Fold(*block.downsample).link(None)], input, None)
            shortcut = {None: None, "identity": Bounded.of(input)}.get(block.shortcut_path, side and side.output)
            last = block.last_activation if block.shortcut_path else block.stages[-1].activation
            gate = self.gate.double() if self.case.gate else None
            chain = BoundedChain(rules, links, input, last, gate, shortcut)
            outside = 0 if shortcut is None else shortcut.value
            self._expect_outputs(chain.output, outside, outside if block.shortcut_path == "identity" else None)
            if side is not None:  # the skipped sites are computed too
                error = torch.where(self.mask, chain.output.error, side.output.error)
                self.bounds["output"] = self.bounds["output, autograd"] = (error,)
            grads = chain.backward(torch.where(self.mask, self.grad, 0).double())
            through = _where(self.mask, grads["shortcut"], self.grad.double())
            if side is not None:
                through = side.backward(through)["input"]
            if block.shortcut_path is not None:
                grads["input"] = _add(rules, grads["input"], through)
            self._expect("grad input", [grads["input"]])
            if gate is not None:
                self._expect("grad gate", [_where(self.mask, grads["gate"], 0)])
            pairs = [(grads[f"weight {number}"], grads[f"bias {number}"]) for number in range(len(folds))]
            self._expect("grad weight", [fold.grad_weight(rules, pair[0]) for fold, pair in zip(folds, pairs)])
            norms = [grad for fold, pair in zip(folds, pairs) for grad in fold.grad_norm(rules, *pair)]
            self._expect("grad norm", norms)

    def actual(self) -> dict[str, tuple[Tensor, ...]]:
        """Every quantity of the block under test."""
        input = self.input.detach().requires_grad_()
        mask = self.gate.detach().requires_grad_() if self.case.gate else self.mask
        output = self.block(input, mask)
        weights = [conv.weight for conv, _ in self.modules]
        norms = [parameter for _, norm in self.modules for parameter in (norm.weight, norm.bias)]
        leaves = [input, *weights, *norms] + ([mask] if self.case.gate else [])
        grads = torch.autograd.grad(output, leaves, self.grad)
        after = 1 + len(weights)
        results = {"output, autograd": (output.detach(),), "grad input": grads[:1]}
        results |= {"grad weight": grads[1:after], "grad norm": grads[after : after + len(norms)]}
        if self.case.gate:
            results["grad gate"] = grads[-1:]
        with torch.no_grad():
            results["output"] = (self.block(input, mask),)
            if self.block.shortcut_path == "identity":
                updated = self.input.clone(memory_format=torch.preserve_format)
                results["in place"] = (self.block(updated, mask, inplace=True),)
        return results


class _Fold:
    """A convolution with its normalisation by running statistics folded in, in float64, and the error of folding.

    Folding goes through at most six roundings to the parameters' type: eps, root, weight, mean, bias, product.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        self.conv, self.relative = conv, gamma(6, unit_roundoff(conv.weight.dtype))
        self.own, self.mean = conv.weight.double(), norm.running_mean.double()
        self.inverse = self._rounded((norm.running_var.double() + norm.eps).rsqrt())
        self.scale = self._rounded(self.inverse.value * norm.weight.double())
        bias, moved = norm.bias.double(), self.mean * self.scale.value
        self.weight = self._rounded(self.own * self.scale.value.view(-1, 1, 1, 1))
        self.bias = Bounded(bias - moved, self.relative * (bias.abs() + moved.abs()))

    def _rounded(self, value: Tensor) -> Bounded:
        return Bounded(value, self.relative * value.abs())

    def link(self, activation: str | None) -> Link:
        return Link(self.weight, self.bias, geometry_of(self.conv), activation)

    def grad_weight(self, rules: Arithmetic, grad: Bounded) -> Bounded:
        """Of the convolution's own weight."""
        return rules.product(lambda g, scale: g * scale.view(-1, 1, 1, 1), grad, self.scale, 1)

    def grad_norm(self, rules: Arithmetic, weight: Bounded, bias: Bounded) -> tuple[Bounded, Bounded]:
        """Of the normalisation's weight and bias: with s = weight / root, d/ds = sum(grad * own) - mean * grad bias."""
        products = rules.product(torch.mul, weight, self.own, 1)
        ones = torch.ones_like(self.own)
        summed = rules.product(lambda g, one: (g * one).sum((1, 2, 3)), products, ones, self.own[0].numel())
        grad = _add(rules, rules.product(torch.mul, bias, -self.mean, 1), summed)
        return rules.product(torch.mul, grad, self.inverse, 1), bias


def _add(rules: Arithmetic, a: Bounded, b: Bounded) -> Bounded:
    return rules.product(torch.mul, a, torch.ones_like(a.value), 0, b)


class BlockTraining(_Block):
    """A training step of a block against the reference's in float64.

    Where roundings are larger than float64's, SiLU takes the place of ReLU and ReLU6, as it may in timm's blocks: one
    value that a rounding puts on the other side of a kink changes the gradients of all layers before it.
    """

    def __init__(self, case: BlockCase, dtype: torch.dtype, device: str) -> None:
        super().__init__(case, dtype, device)
        self.op = f"{self.name}, train"
        if dtype != torch.float64:
            smooth(self.block)

    def expect(self, rules: Callable[..., Arithmetic], backend: str) -> None:
        """The reference in float64, and in the type under test for the size of its errors."""
        with dynconv.backend("reference"):
            self.expected = self._run(torch.float64)
            # For want of a higher precision float64's own errors are those of float32, scaled.
            self.plain = self._run(torch.float32 if self.dtype == torch.float64 else self.dtype)

    def actual(self) -> dict[str, tuple[Tensor, ...]]:
        """Every quantity of the block under test."""
        return self._run(self.dtype)

    def _run(self, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
        block = copy.deepcopy(self.block).to(dtype)
        input = self.input.to(dtype).requires_grad_()
        mask = self.gate.to(dtype).requires_grad_() if self.case.gate else self.mask
        output = block(input, mask)
        leaves = [input, *block.parameters()] + ([mask] if self.case.gate else [])
        grads = torch.autograd.grad(output, leaves, self.grad.to(dtype))
        results = {"output": (output.detach(),), "grad input": grads[:1]}
        if self.case.gate:
            results["grad gate"], grads = grads[-1:], grads[:-1]
        statistics = tuple(buffer for buffer in block.buffers() if buffer.is_floating_point())
        return results | {"grad parameters": grads[1:], "running statistics": statistics}

    def source(self, quantity: str) -> str:
        """What the error is relative to."""
        return "4 x plain PyTorch's error"

    def judge(self, quantity: str, actual: tuple[Tensor, ...]) -> Verdict:
        """In norm."""
        return judge_training(actual, self.plain[quantity], self.expected[quantity], self.dtype)
