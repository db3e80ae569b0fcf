"""Taps that sample between the pixels, for `bench` and `verify`: deform_conv2d and deform_aggregate2d.

Offsets are multiples of 1/64 below 4: exact in every type, as are the positions and the shares of the pixels around
them, so that no rounding moves a sample across a pixel, where the slopes jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dynconv

from .._geometry import Geometry
from .bounds import Arithmetic, Bounded, Verdict, judge
from .layers import Filter

GRID = 64


def random_offsets(
    shape: tuple[int, ...],
    generator: torch.Generator,
    device: str = "cpu",
    scale: float = 1,
    meets_pixels: bool = True,
) -> Tensor:
    """Normal, on the grid; without `meets_pixels` on its odd points, whose rounding by F.grid_sample crosses none."""
    made = torch.randn(shape, generator=generator, device=device) * scale * GRID
    made = made.round() if meets_pixels else (made / 2).floor() * 2 + 1
    return (made / GRID).clamp(1 / GRID - 4, 4 - 1 / GRID)


def sampled(layer: Filter, input: Tensor, offset: Tensor, weights: Tensor) -> Tensor:
    """The usual idiom: F.grid_sample of every tap, a group of channels as a sample of its own, times the weights."""
    (n, c, h, w), g, k, p = input.shape, layer.groups, layer.kernel, layer.padding
    steps = offset.view(n, g, k * k, 2, h, w)
    lines = lambda length: torch.arange(length, device=input.device)
    tap = lines(k) - p
    y = steps[:, :, :, 0] + (lines(h).view(-1, 1) + tap.repeat_interleave(k).view(-1, 1, 1))
    x = steps[:, :, :, 1] + (lines(w).view(1, -1) + tap.repeat(k).view(-1, 1, 1))
    grid = torch.stack((x * (2 / max(w - 1, 1)) - 1, y * (2 / max(h - 1, 1)) - 1), -1).view(n * g, k * k * h, w, 2)
    values = F.grid_sample(input.view(n * g, c // g, h, w), grid, align_corners=True)
    values = values.view(n, g, c // g, k * k, h, w)
    return (values * weights.view(n, g, 1, k * k, h, w)).sum(3).view(n, c, h, w)


class Samples:
    """What the taps of every site sample, as bilinear operations with bounds of their errors; in float64.

    Corners come first: [4, N, G, C / G, taps, Ho, Wo], with one in place of C / G where channels share something.
    """

    def __init__(self, rules: Arithmetic, input: Tensor, offset: Tensor, geometry: Geometry, fixed_point: bool) -> None:
        self.rules, self.inner, self.fixed_point = rules, rules.unstored, fixed_point
        (n, c, h, w), taps = input.shape, math.prod(geometry.kernel)
        self.groups = g = offset.shape[1] // (2 * taps)
        self.input_shape, self.taps, self.area = input.shape, taps, tuple(offset.shape[2:])
        steps, places = offset.view(n, g, 1, taps, 2, *self.area), []
        numbers = lambda count: torch.arange(count, device=offset.device)
        for axis, tap in enumerate((numbers(taps) // geometry.kernel[1], numbers(taps) % geometry.kernel[1])):
            site = numbers(self.area[axis]) * geometry.stride[axis] - geometry.padding[axis]
            site = site.view((-1, 1) if axis == 0 else (1, -1)) + (tap * geometry.dilation[axis]).view(-1, 1, 1)
            places.append(site.to(offset) + steps[:, :, :, :, axis])
        y, x = places
        inside = (y > -1) & (y < h) & (x > -1) & (x < w)
        top, left = y.floor(), x.floor()
        below, right = y - top, x - left
        index, share, down, along = [], [], [], []
        for row, of_y, slope_y in ((top, 1 - below, -1), (top + 1, below, 1)):
            for column, of_x, slope_x in ((left, 1 - right, -1), (left + 1, right, 1)):
                valid = inside & (row >= 0) & (row < h) & (column >= 0) & (column < w)
                index.append(torch.where(valid, row * w + column, 0).long())
                share.append(torch.where(valid, of_y * of_x, 0))
                down.append(torch.where(valid, slope_y * of_x, 0))
                along.append(torch.where(valid, slope_x * of_y, 0))
        self.index = torch.stack(index).expand(4, n, g, c // g, taps, *self.area)
        self.share, self.down, self.along = torch.stack(share), torch.stack(down), torch.stack(along)
        pixels = input.reshape(1, n, g, c // g, 1, h * w).expand(4, -1, -1, -1, taps, -1)
        self.pixels = pixels.gather(5, self.index.flatten(5)).view(self.index.shape)
        self.most = int(self._scatter((self.share != 0).to(self.share).expand(self.index.shape)).max().item())

    def _scatter(self, corners: Tensor) -> Tensor:
        """To every pixel what the samples that read it have."""
        n, c, h, w = self.input_shape
        pixels = corners.new_zeros(n, self.groups, c // self.groups, h * w)
        flat = lambda tensor: tensor.movedim(0, 3).flatten(3)
        return pixels.scatter_add_(3, flat(self.index), flat(corners)).view(self.input_shape)

    def scaled(self, rules: Arithmetic, scale: Bounded | Tensor) -> Bounded:
        """scale [N, G, 1, taps, Ho, Wo] times each sample."""
        return rules.product(lambda x, s: (x * self.share).sum(0) * s, self.pixels, scale, 6)

    def total(self, scale: Bounded | Tensor) -> Bounded:
        """[N, C, Ho, Wo]: the sum of the scaled samples over the taps."""
        sums = lambda x, s: ((x * self.share).sum(0) * s).sum(3).flatten(1, 2)
        return self.rules.product(sums, self.pixels, scale, 4 * self.taps + 2)

    def grads(self, grad: Bounded, scale: Bounded, reach: float) -> tuple[Bounded, Bounded, Bounded]:
        """Of input, offset and scale from the gradient of the scaled samples, [N, G, C / G, taps or 1, Ho, Wo].

        reach: the most that an absolute value of `grad` can be, which the fixed point of a GPU's scatter follows.
        """
        rules, inner, channels = self.rules, self.inner, self.pixels.shape[3]
        spread = lambda g, s: self._scatter((g * s * self.share).expand(self.index.shape))
        of_input = rules.product(spread, grad, scale, self.most + 3)
        if self.fixed_point:
            # Each contribution is rounded to a multiple of 2^-s <= 4 * sites * taps * bound * 2^-62.
            bound = reach * scale.magnitude.max().item()
            unit = 4 * math.prod(self.area) * self.taps * bound * 2.0**-62
            of_input = Bounded(of_input.value, of_input.error + self.most * unit)
        along = []
        for slope in (self.down, self.along):
            dots = lambda x, g, slope=slope: ((x * slope).sum(0) * g).sum(2, keepdim=True)
            value = dots(self.pixels, grad.value)
            # The slopes have signs, so the magnitudes are not their product's own.
            magnitude, passed = (dots(self.pixels.abs(), g, slope.abs()) for g in (grad.magnitude, grad.error))
            made = Bounded(value, passed + inner.bound(value, magnitude, channels + 6))
            along.append(rules.product(torch.mul, made, scale, 2))
        stack = lambda tensors: torch.stack(tensors, 4).flatten(1, 4)
        of_offset = Bounded(stack([a.value for a in along]), stack([a.error for a in along]))
        dots = lambda x, g: ((x * self.share).sum(0) * g).sum(2, keepdim=True)
        of_scale = rules.product(dots, self.pixels, grad, channels + 6)
        return of_input, of_offset, of_scale


def bounded_aggregate(
    rules: Arithmetic,
    input: Tensor,
    offset: Tensor,
    weights: Tensor,
    geometry: Geometry,
    normalization: str | None,
    grad: Tensor,
    fixed_point: bool,
) -> tuple[Bounded, list[Bounded]]:
    """The output, and the gradients of input, offset and weights."""
    samples = Samples(rules, input, offset, geometry, fixed_point)
    name, n, g = normalization or "none", input.shape[0], samples.groups
    rows = weights.view(n, g, 1, samples.taps, *samples.area)
    # PyTorch's own normalisation, so its result is in the tensors' type.
    scale = rules.normalize(rows, name, 3)
    scale = scale if name == "none" else rules.activate(scale, None)
    groups = Bounded.of(grad.view(n, g, -1, 1, *samples.area))
    of_input, of_offset, of_scale = samples.grads(groups, scale, grad.abs().max().item())
    if name != "none":
        of_scale = rules.activate(rules.normalize_grad(rows, scale, of_scale, name, 3), None)
    flat = Bounded(of_scale.value.reshape(weights.shape), of_scale.error.reshape(weights.shape))
    return samples.total(scale), [of_input, of_offset, flat]


@dataclass(frozen=True)
class DeformCase:
    """One call of deform_conv2d or, without `out_channels`, of deform_aggregate2d."""

    name: str
    channels: int = 16
    out_channels: int | None = None
    offset_groups: int = 1
    groups: int = 1
    size: tuple[int, int] = (8, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    bias: bool = True
    mask: bool = True
    normalization: str | None = None
    reach: float = 1.0  # of the offsets; beyond the input they sample zeros


DEFORM_CASES = (
    DeformCase("deformable", out_channels=24),
    DeformCase("deformable v1, stride 2", out_channels=12, mask=False, bias=False, stride=2),
    DeformCase(
        "deformable in 2 groups, 4 of offsets", out_channels=20, groups=2, offset_groups=4, dilation=2, padding=2
    ),
    DeformCase("deformable, far", out_channels=8, channels=3, reach=3.0, size=(5, 4)),
    DeformCase("aggregation", offset_groups=2),
    DeformCase("aggregation, softmax", offset_groups=4, normalization="softmax", stride=2),
    DeformCase("aggregation, sigmoid", normalization="sigmoid", kernel=(3, 2), padding=0, reach=3.0),
)
DEFORM_BATCH = 2


class Deformable:
    """deform_conv2d and deform_aggregate2d: forward, and the gradient of every operand."""

    cases = DEFORM_CASES

    def __init__(self, case: DeformCase, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.is_convolution = case.out_channels is not None
        self.op = "deform_conv2d" if self.is_convolution else "deform_aggregate2d"
        generator = torch.Generator().manual_seed(3000 + DEFORM_CASES.index(case))
        self.geometry = Geometry.of(case.kernel, case.stride, case.padding, case.dilation)
        size, taps = self.geometry.output_size(*case.size), math.prod(case.kernel)
        normal = lambda *shape: torch.randn(shape, generator=generator)
        n, g = DEFORM_BATCH, case.offset_groups
        leaves = {
            "input": normal(n, case.channels, *case.size),
            "offset": random_offsets((n, 2 * g * taps, *size), generator, scale=case.reach),
        }
        if self.is_convolution:
            shape = (case.out_channels, case.channels // case.groups, *case.kernel)
            leaves["weight"] = normal(*shape) * math.prod(shape[1:]) ** -0.5
            if case.bias:
                leaves["bias"] = normal(case.out_channels)
            if case.mask:
                leaves["mask"] = normal(n, g * taps, *size)
        else:
            leaves["weights"] = normal(n, g * taps, *size)
        leaves["grad"] = normal(n, case.out_channels or case.channels, *size)
        made = {name: leaf.to(dtype).to(device) for name, leaf in leaves.items()}
        layout = {"memory_format": torch.channels_last}
        self.leaves = {name: leaf.contiguous(**layout) if leaf.dim() == 4 else leaf for name, leaf in made.items()}
        self.grad = self.leaves.pop("grad")

    def source(self, quantity: str) -> str:
        """What n of the bound counts."""
        return "each step's own, passed on"

    @torch.no_grad()
    def expect(self, rules: Callable[..., Arithmetic], backend: str) -> None:
        """In float64: a running error analysis of every step, forward and backward."""
        rules, case = rules(), self.case
        leaf = {name: tensor.double().cpu() for name, tensor in self.leaves.items()}
        grad, fixed_point = self.grad.double().cpu(), backend == "triton"
        if self.is_convolution:
            output, grads = self._convolve(rules, leaf, grad, fixed_point)
        else:
            output, found = bounded_aggregate(
                rules, leaf["input"], leaf["offset"], leaf["weights"], self.geometry, case.normalization, grad,
                fixed_point,
            )  # fmt: skip
            grads = dict(zip(("input", "offset", "weights"), found))
        bounded = {"output": output, "output, autograd": output}
        bounded |= {f"grad {name}": grads[name] for name in leaf}
        self.expected = {name: value.value.to(self.device) for name, value in bounded.items()}
        self.bounds = {name: value.error.to(self.device) for name, value in bounded.items()}

    def _convolve(self, rules: Arithmetic, leaf: dict, grad: Tensor, fixed_point: bool) -> tuple[Bounded, dict]:
        """Columns and their gradients are taken as rounded to the tensors' type: kept wider, they are closer."""
        case, weight = self.case, leaf["weight"]
        samples = Samples(rules, leaf["input"], leaf["offset"], self.geometry, fixed_point)
        n, g, taps, area = DEFORM_BATCH, samples.groups, samples.taps, samples.area
        in_groups = (n, g, 1, taps, *area)
        mask = leaf["mask"].view(in_groups) if case.mask else torch.ones(in_groups, dtype=torch.float64)
        columns = samples.scaled(rules, mask)
        split = lambda tensor: tensor.reshape(n, case.groups, -1, taps, *area)
        columns = Bounded(split(columns.value), split(columns.error))
        kernels = weight.view(case.groups, case.out_channels // case.groups, -1, taps)
        grad = grad.view(n, case.groups, -1, *area)
        bias = leaf.get("bias")
        multiply = lambda x, w: torch.einsum("ngcthw,gfct->ngfhw", x, w).flatten(1, 2)
        shift = None if bias is None else bias.view(1, -1, 1, 1)
        output = rules.product(multiply, columns, kernels, kernels[0, 0].numel(), shift)
        sites = n * math.prod(area)
        of_weight = lambda x, d: torch.einsum("ngcthw,ngfhw->gfct", x, d).reshape(weight.shape)
        grads = {"weight": rules.product(of_weight, columns, grad, sites)}
        if bias is not None:
            ones = torch.ones_like(grad)
            grads["bias"] = rules.product(lambda d, one: (d * one).sum((0, 3, 4)).flatten(), grad, ones, sites)
        of_columns = lambda d, w: torch.einsum("ngfhw,gfct->ngcthw", d, w)
        rows = rules.product(of_columns, grad, kernels, kernels.shape[1])
        shape = (n, g, case.channels // g, taps, *area)
        rows = Bounded(rows.value.reshape(shape), rows.error.reshape(shape))
        reach = grad.abs().max().item() * kernels.abs().sum(1).max().item()
        grads["input"], grads["offset"], of_mask = samples.grads(rows, Bounded.of(mask), reach)
        if case.mask:
            shape = leaf["mask"].shape
            grads["mask"] = Bounded(of_mask.value.reshape(shape), of_mask.error.reshape(shape))
        return output, grads

    def actual(self) -> dict[str, Tensor]:
        """Every quantity of the op under test."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.leaves.items()}
        output = self._run(leaves)
        grads = torch.autograd.grad(output, list(leaves.values()), self.grad)
        with torch.no_grad():
            results = {"output": self._run(leaves), "output, autograd": output.detach()}
        return results | {f"grad {name}": grad for name, grad in zip(leaves, grads)}

    def _run(self, leaves: dict[str, Tensor]) -> Tensor:
        case = self.case
        options = dict(stride=case.stride, padding=case.padding, dilation=case.dilation)
        input, offset = leaves["input"], leaves["offset"]
        if self.is_convolution:
            bias, mask = leaves.get("bias"), leaves.get("mask")
            return dynconv.deform_conv2d(input, offset, leaves["weight"], bias, **options, mask=mask)
        options |= dict(kernel_size=case.kernel, normalization=case.normalization)
        return dynconv.deform_aggregate2d(input, offset, leaves["weights"], **options)

    def judge(self, quantity: str, actual: Tensor) -> Verdict:
        """Of one quantity."""
        return judge(actual, self.expected[quantity], self.bounds[quantity])
