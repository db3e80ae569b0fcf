"""Whole residual blocks for `bench`: the dense block of PyTorch's own layers against the masked one."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynconv
from dynconv.nn import MaskedBottleneck, MaskedInvertedResidual
from dynconv.nn.blocks import MaskedBlock
from dynconv.nn.residual import fold

from .._timing import input_sets
from .bounds import Arithmetic, Bounded, BoundedChain, Link, Verdict, arithmetic, judge, judge_training, worst_of
from .layers import MASKS, POSE_DENSITIES, POSE_SIZES, Block

_CLAMPS = {None: lambda x: x, "relu": lambda x: F.relu(x, inplace=True), "relu6": lambda x: F.relu6(x, inplace=True)}


class BlockBench:
    """A block's parameters and inputs, and the calls to compare; what `bench.Bench` is for a layer."""

    def __init__(self, layer: Block, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.layer, self.batch, self.dtype, self.device = layer, batch, dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        values = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)
        self.block = make(layer).to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.output_shape = (batch, layer.channels, layer.height, layer.width)
        size = torch.Size(self.output_shape).numel()
        self.sets = input_sets(device, 2 * torch.finfo(dtype).bits // 8 * size)

        def tensors() -> list[Tensor]:
            made = (torch.randn(self.output_shape, generator=values, device=device) for _ in range(self.sets))
            return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in made]

        self.inputs, self.grads = tensors(), tensors()
        # Updated in place over and over, each by a share of itself that does not let it grow.
        self.caches = [t.clone(memory_format=torch.preserve_format) for t in self.inputs]
        with torch.no_grad():
            self.folded = folded_layers(self.block)

    def cache(self) -> Tensor:
        """What an update in place starts from."""
        return self.inputs[0].clone(memory_format=torch.preserve_format)

    def dense(self, number: int) -> Tensor:
        """Normalisation folded in, activations and shortcut in place; in training, the dense block itself."""
        input = self.inputs[number]
        if self.block.training:
            return self.block(input)
        return dense_block(self.block, self.folded, input)

    def masked_dense(self, number: int, mask: Tensor) -> Tensor:
        """The papers' own code: everything, then a choice by the mask."""
        return torch.where(mask, self.dense(number), self.inputs[number])

    def sparse(self, number: int, mask: Tensor | dynconv.ActiveSites, out: Tensor | None = None) -> Tensor:
        """The masked block; in place where `out` is given."""
        if self.layer.granularity > 1 and isinstance(mask, Tensor):
            mask = self.compact(mask)
        if out is not None:
            return self.block(out, mask, inplace=True)
        return self.block(self.inputs[number], mask)

    def gradients(self, operation, number: int, *arguments) -> tuple[Tensor, ...]:
        """A training step's forward and backward: the gradients of the input and of every parameter."""
        input = self.inputs[number].requires_grad_()
        self.block.train().requires_grad_()
        try:
            output = operation(number, *arguments)
            return torch.autograd.grad(output, (input, *self.block.parameters()), self.grads[number])
        finally:
            input.requires_grad_(False)
            self.block.eval().requires_grad_(False)

    def compact(self, mask: Tensor) -> dynconv.ActiveSites:
        """What blocks that share a mask pay once; made of the mask's cells, where it has such."""
        cell = self.layer.granularity
        return dynconv.ActiveSites(mask[..., ::cell, ::cell], (self.batch, *mask.shape[2:]), granularity=cell)

    def work(self, mask: Tensor) -> float:
        """The share of the dense block's products that the active sites need, layer by layer."""
        sites, needed, total = dynconv.ActiveSites(mask), 0, 0
        size = (self.layer.height, self.layer.width)
        for weight, _, conv, _ in reversed(self.folded):
            total += mask.numel() * weight.numel()
            needed += len(sites) * weight.numel()
            sites = sites.touched(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        return needed / total


class BlockCheck:
    """The masked block against a dense one of more precision."""

    def __init__(self, bench: BlockBench) -> None:
        self.bench = bench
        # As for layers: on a CPU float32's own error is in the bound.
        self.precision = torch.float64 if bench.device == "cuda" else torch.float32
        self.arithmetic = arithmetic(bench.dtype, bench.device)
        with torch.no_grad():
            self.bounded = bounded_block(bench.block, bench.folded, bench.inputs[0].to(self.precision), self.arithmetic)

    def output(self, actual: Tensor, mask: Tensor, inactive: Tensor | None = None) -> Verdict:
        """The skipped sites have to be the input's, exactly."""
        input = self.bench.inputs[0].to(self.precision)
        return judge(actual, torch.where(mask, self.bounded.value, input), torch.where(mask, self.bounded.error, 0))

    def gradients(self, mask: Tensor) -> Verdict:
        """Against the reference in float64, as far as the reference in the bench's own type is from it; without kinks.

        One of a million values that a rounding puts on the other side of a kink changes the gradients of all layers
        before it by a thousand times what roundings otherwise do.
        """
        bench, exact = self._smooth(self.bench.dtype), self._smooth(torch.float64)
        actual = bench.gradients(bench.sparse, 0, mask)
        with dynconv.backend("reference"):
            plain, expected = (each.gradients(each.sparse, 0, mask) for each in (bench, exact))
        return judge_training(actual, plain, expected, self.bench.dtype)

    def _smooth(self, dtype: torch.dtype) -> BlockBench:
        """The bench in another type, of a block without kinks."""
        bench = copy.copy(self.bench)
        bench.block = smooth(copy.deepcopy(bench.block).to(dtype))
        bench.inputs, bench.grads = [bench.inputs[0].to(dtype)], [bench.grads[0].to(dtype)]
        return bench


def smooth(block: MaskedBlock) -> MaskedBlock:
    """The block with SiLU in the place of ReLU and ReLU6, as timm's blocks may have it."""
    block.stages = tuple(stage._replace(activation=stage.activation and "silu") for stage in block.stages)
    block.last_activation = block.last_activation and "silu"
    return block


class PoseBench:
    """The 57 blocks of DynConv's pose network, each at its published density, one call for all of them."""

    name = "57 blocks in a row"

    def __init__(self, batch: int, dtype: torch.dtype, device: str, masks: str) -> None:
        generator = torch.Generator().manual_seed(0)
        shared: dict[int, BlockBench] = {}
        self.blocks: list[tuple[BlockBench, Tensor]] = []
        for number, (size, density) in enumerate(zip(POSE_SIZES, POSE_DENSITIES, strict=True)):
            bench = BlockBench(Block("dynconv-pose", "inverted", size, size, 96), batch, dtype, device, number)
            first = shared.setdefault(size, bench)
            bench.inputs, bench.caches, bench.grads = first.inputs, first.caches, first.grads
            self.blocks.append((bench, MASKS[masks](batch, size, size, density, generator).to(device)))
        self.sets = min(bench.sets for bench, _ in self.blocks)

    @property
    def density(self) -> float:
        """Of all sites."""
        return sum(int(mask.sum()) for _, mask in self.blocks) / sum(mask.numel() for _, mask in self.blocks)

    @property
    def work(self) -> float:
        """The share of the dense products: the blocks have the same channels, so sites are their weights."""
        return sum(b.work(m) * m.numel() for b, m in self.blocks) / sum(m.numel() for _, m in self.blocks)

    def check(self) -> Verdict:
        """The worst verdict of all blocks."""
        with torch.no_grad():
            verdicts = [BlockCheck(bench).output(bench.sparse(0, mask), mask) for bench, mask in self.blocks]
        return worst_of(verdicts)

    def dense(self, number: int) -> None:
        """Every block, dense."""
        for bench, _ in self.blocks:
            bench.dense(number % bench.sets)

    def sparse(self, number: int) -> None:
        """Every block with a mask of its own, compaction included."""
        for bench, mask in self.blocks:
            bench.sparse(number % bench.sets, mask)

    def compaction(self, number: int) -> None:
        """Of every mask."""
        for bench, mask in self.blocks:
            bench.compact(mask)


def make(layer: Block) -> MaskedBlock:
    """A published block, its last normalisation's scale small: in place it adds little to its input."""
    if layer.kind == "bottleneck":
        block = MaskedBottleneck(layer.channels, layer.channels // 4)
        last = block.bn3
    else:
        block = MaskedInvertedResidual(layer.channels, layer.channels, 1, 6)
        last = block.conv[-1]
    nn.init.constant_(last.weight, 1e-2)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # what is measured in training leaves the block as it was
    return block


def folded_layers(block: MaskedBlock) -> list[tuple[Tensor, Tensor, nn.Conv2d, str | None]]:
    """(weight, bias, convolution, activation) of each layer, normalisation folded in, for the dense block."""
    layers = []
    for stage in block.stages:
        conv, norm = block.get_submodule(stage.conv), block.get_submodule(stage.norm)
        layers.append((*fold(conv, norm), conv, stage.activation))
    return layers


def bounded_block(block: MaskedBlock, folded: list, input: Tensor, rules: Arithmetic) -> Bounded:
    """The dense block's value in the input's precision, and the bound of an implementation's error."""
    links = [Link(w.to(input.dtype), b.to(input.dtype), geometry_of(conv), a) for w, b, conv, a in folded]
    return BoundedChain(rules, links, input, block.last_activation, shortcut=input).output


def geometry_of(conv: nn.Conv2d) -> tuple:
    """F.conv2d's arguments after the bias."""
    return conv.stride, conv.padding, conv.dilation, conv.groups


def dense_block(block: MaskedBlock, folded: list, input: Tensor) -> Tensor:
    """What a user of PyTorch runs in inference: folded, in place, channels_last."""
    value = input
    for weight, bias, conv, activation in folded:
        value = F.conv2d(value, weight, bias, *geometry_of(conv))
        value = _CLAMPS[activation](value)
    return _CLAMPS[block.last_activation](value.add_(input))
