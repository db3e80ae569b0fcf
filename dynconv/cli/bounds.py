"""How far a correct result may lie from the reference: bounds derived from the arithmetic, never tuned.

A sum of n products, in any order, with unit roundoff u: |computed - exact| <= gamma(n) * sum|products| with
gamma(n) = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The sum of
absolute products is what the reference itself returns for the operands' absolute values, so the bound is known
for each element. Half types are summed in float32 and rounded once: one half unit in the last place is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import ACTIVATIONS, NORMALIZATIONS


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, unit: float) -> float:
    """terms * unit / (1 - terms * unit)."""
    if terms * unit >= 1:
        raise ValueError(f"terms: expected fewer than {1 / unit:g}, where the bound ends, got {terms}")
    return terms * unit / (1 - terms * unit)


@dataclass(frozen=True)
class Arithmetic:
    """How an op computes with tensors of one dtype.

    `operand_error` is the relative error that each product has before it is summed. `truncates`: tensor cores cut
    what they add instead of rounding it, which doubles the unit roundoff (Blanchard, Higham, Lopez, Mary and
    Pranesh, Mixed precision block fused multiply-add, 2020).
    """

    dtype: torch.dtype
    operand_error: float = 0.0
    truncates: bool = False

    @property
    def accumulator(self) -> torch.dtype:
        """The type of the sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def bound(self, expected: Tensor, magnitude: Tensor, terms: int, reference: torch.dtype = torch.float64) -> Tensor:
        """Elementwise bound of |computed - expected|, float64.

        Args:
            expected: the reference's result, computed in the dtype `reference`, whose own error is in the bound.
            magnitude: the sum of the absolute products of each element, of the same shape.
            terms: how many roundings a product goes through at most: its own, and the additions after it.
        """
        # The magnitude is a sum of positive terms in the reference's arithmetic, so it may be too small by gamma.
        growth = gamma(terms, unit_roundoff(reference))
        magnitude = magnitude.double() * (1 + growth)
        sums = gamma(terms, unit_roundoff(self.accumulator) * (2 if self.truncates else 1))
        summed = (sums * (1 + self.operand_error) + self.operand_error) * magnitude
        rounding = 0.0
        if self.dtype != self.accumulator:
            information = torch.finfo(self.dtype)
            subnormal = information.tiny * information.eps
            rounding = (
                unit_roundoff(self.dtype) * (expected.double().abs() + summed + growth * magnitude) + subnormal / 2
            )
        return summed + rounding + growth * magnitude

    @property
    def unstored(self) -> Arithmetic:
        """Of what stays in the accumulator's type and is not rounded to the tensors'."""
        return replace(self, dtype=self.accumulator)

    def product(
        self,
        operation: Callable[[Tensor, Tensor], Tensor],
        a: Tensor | Bounded,
        b: Tensor | Bounded,
        terms: int,
        shift: Tensor | Bounded | None = None,
    ) -> Bounded:
        """A bilinear operation of sums of `terms` products (a convolution, its gradients, a scaling), plus a shift."""
        a, b = Bounded.of(a), Bounded.of(b)
        value = operation(a.value, b.value)
        magnitude = operation(a.magnitude, b.magnitude)
        passed = operation(a.error, b.value.abs()) if a.error.any() else torch.zeros_like(value)
        if b.error.any():
            passed = passed + operation(a.magnitude, b.error)
        if shift is not None:
            shift = Bounded.of(shift)
            value, magnitude, passed = value + shift.value, magnitude + shift.magnitude, passed + shift.error
            terms += 1
        return Bounded(value, passed + self.bound(value, magnitude, terms, value.dtype).to(value.dtype))

    def activate(self, a: Bounded, name: str | None) -> Bounded:
        """activation(a), rounded to the tensors' type."""
        if name is None and self.dtype == self.accumulator:
            return a
        value, curve = ACTIVATIONS[name](a.value), CURVES[name]
        rounding = self.bound(value, torch.zeros_like(value), 0, value.dtype).to(value.dtype)
        return Bounded(value, curve.slope * a.error + self._evaluation(a, curve) + rounding)

    def slope(self, a: Bounded, name: str | None) -> Bounded:
        """activation'(a). Where the error reaches across a kink, either side's slope is right."""
        curve = CURVES[name]
        with torch.enable_grad():
            point = a.value.detach().requires_grad_()
            (value,) = torch.autograd.grad(ACTIVATIONS[name](point).sum(), point)
        error = curve.curvature * a.error + self._evaluation(a, curve)
        for kink, jump in curve.kinks:
            error = error + jump * ((a.value - kink).abs() <= a.error)
        return Bounded(value, error)

    def normalize(self, a: Tensor, name: str, dim: int) -> Bounded:
        """normalization(a) over a dimension ("none", "softmax", "sigmoid", "l2"), in the accumulator's type."""
        value, unit = NORMALIZATIONS[name](a, dim=dim), unit_roundoff(self.accumulator)
        if name == "none":
            return Bounded.of(value)
        if name == "l2":  # of the squares and their sum; the root and the quotient, to two eps each
            return Bounded(value, gamma(a.shape[dim] + 8, unit) * value.abs())
        if name == "sigmoid":
            return Bounded(value, value * (_exponential(a, unit) + 4 * unit))
        # exp of the difference from the largest one, their sum, and the quotient.
        relative = _exponential(a - a.amax(dim, keepdim=True), unit)
        total = (value * relative).sum(dim, keepdim=True) + gamma(a.shape[dim], unit)
        return Bounded(value, value * ((1 + relative) * (1 + 4 * unit) / (1 - total) - 1))

    def normalize_grad(self, a: Tensor, weights: Bounded, grad: Bounded, name: str, dim: int) -> Bounded:
        """The gradient of `a`, in the accumulator's type, from that of weights = normalize(a)."""
        rules, one = self.unstored, torch.ones((), dtype=a.dtype, device=a.device)
        if name == "none":
            return grad
        if name == "sigmoid":
            rest = Bounded(1 - weights.value, weights.error + unit_roundoff(self.accumulator))
            return rules.product(torch.mul, grad, rules.product(torch.mul, weights, rest, 1), 1)
        total = lambda w, g: (w * g).sum(dim, keepdim=True)
        projected = rules.product(total, weights, grad, a.shape[dim])
        if name == "softmax":
            return rules.product(torch.mul, rules.product(torch.mul, projected, -one, 1, shift=grad), weights, 1)
        across = rules.product(torch.mul, weights, projected, 1)
        norm = a.square().sum(dim, keepdim=True).sqrt()
        inverse = Bounded(1 / norm, gamma(a.shape[dim] + 8, unit_roundoff(self.accumulator)) / norm)
        return rules.product(torch.mul, rules.product(torch.mul, across, -one, 1, shift=grad), inverse, 1)

    def _evaluation(self, a: Bounded, curve: Curve) -> Tensor:
        return curve.evaluation * torch.finfo(self.accumulator).eps * a.value.abs().clamp(min=1)


def _exponential(a: Tensor, unit: float) -> Tensor:
    """The relative error of exp(a), a relative 1e-7 and the rounding of a, as of the curves below."""
    return 16 * unit * a.abs().clamp(min=1)


class Curve(NamedTuple):
    """An activation: its largest slope and curvature, the (place, jump of the slope) of its kinks.

    `evaluation`: its own error in units of eps * max(1, |x|): exp to a relative 1e-7, erf to an absolute 1.5e-7.
    """

    slope: float
    curvature: float = 0.0
    kinks: tuple[tuple[float, float], ...] = ()
    evaluation: float = 0.0


CURVES = {
    None: Curve(1.0),
    "relu": Curve(1.0, kinks=((0.0, 1.0),)),
    "relu6": Curve(1.0, kinks=((0.0, 1.0), (6.0, 1.0))),
    "silu": Curve(1.1, 0.5, evaluation=8.0),
    "gelu": Curve(1.13, 0.8, evaluation=8.0),
    "hardswish": Curve(1.5, 1 / 3, ((-3.0, 0.5), (3.0, 0.5)), 8.0),
}


@dataclass(frozen=True)
class Bounded:
    """A value in the reference's precision, and how far from it an implementation's may be, element by element.

    A running error analysis (Higham, section 3.3): each step of a chain adds its own error to what it passes on.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def of(cls, value: Tensor | Bounded) -> Bounded:
        """A tensor is exact."""
        return value if isinstance(value, Bounded) else cls(value, torch.zeros_like(value))

    @property
    def magnitude(self) -> Tensor:
        """The most that an implementation's absolute value can be."""
        return self.value.abs() + self.error


class Link(NamedTuple):
    """A convolution of a chain, `geometry` being F.conv2d's arguments after the bias, and what follows it."""

    weight: Tensor | Bounded
    bias: Tensor | Bounded | None
    geometry: tuple
    activation: str | None


class BoundedChain:
    """activation(gate * chain(input) + shortcut) with a bound of its error, and its gradients with theirs.

    The last link's own activation is the `activation` here. Every link's result, before and after its activation, is
    taken as rounded to the tensors' type: an implementation that keeps it wider is closer.

    Args:
        rules: how an implementation computes.
        links: the convolutions.
        input: [N, C, H, W], as the other tensors in the reference's precision.
        activation: the last one.
        gate: [N, 1, Ho, Wo].
        shortcut: [N, Cout, Ho, Wo].
    """

    def __init__(
        self,
        rules: Arithmetic,
        links: Sequence[Link],
        input: Tensor | Bounded,
        activation: str | None,
        gate: Tensor | None = None,
        shortcut: Tensor | Bounded | None = None,
    ) -> None:
        self.rules, self.links, self.activation, self.gate = rules, links, activation, gate
        self.inputs, self.sums = [Bounded.of(input)], []
        for link in links:
            weight = Bounded.of(link.weight).value
            convolve = lambda x, w, geometry=link.geometry: torch.nn.functional.conv2d(x, w, None, *geometry)
            shift = None if link.bias is None else _channelwise(Bounded.of(link.bias))
            self.sums.append(rules.product(convolve, self.inputs[-1], link.weight, weight[0].numel(), shift))
            self.inputs.append(rules.activate(self.sums[-1], link.activation))
        # These stay in the accumulator.
        ones = torch.ones((), dtype=self.sums[-1].value.dtype, device=self.sums[-1].value.device)
        self.total = rules.unstored.product(torch.mul, self.sums[-1], ones if gate is None else gate, 1, shortcut)
        self.output = rules.activate(self.total, activation)

    def backward(self, grad: Tensor | Bounded) -> dict[str, Bounded]:
        """The gradients, by name: "input", "shortcut", "gate", and "weight 0", "bias 0" of the first link."""
        rules = self.rules
        grad = rules.product(torch.mul, rules.slope(self.total, self.activation), grad, 1)
        grads = {"shortcut": grad}
        if self.gate is not None:
            channels = grad.value.shape[1]
            grads["gate"] = rules.product(lambda g, z: (g * z).sum(1, keepdim=True), grad, self.sums[-1], channels)
            grad = rules.product(torch.mul, grad, self.gate, 1)
        for number in range(len(self.links) - 1, -1, -1):
            link, input = self.links[number], self.inputs[number]
            weight = Bounded.of(link.weight).value
            sites = max(1, int(grad.magnitude.amax(1).count_nonzero()))
            by_weight, by_input = _adjoints(input.value.shape, weight.shape, link.geometry)
            grads[f"weight {number}"] = rules.product(by_weight, input, grad, sites)
            ones = torch.ones_like(grad.value[:, :1])
            grads[f"bias {number}"] = rules.product(lambda g, one: (g * one).sum((0, 2, 3)), grad, ones, sites)
            grad = rules.product(by_input, grad, link.weight, weight.numel() // weight.shape[1])
            if number:
                slope = rules.slope(self.sums[number - 1], self.links[number - 1].activation)
                grad = rules.product(torch.mul, grad, slope, 1)
        grads["input"] = grad
        return grads


def _channelwise(bias: Bounded) -> Bounded:
    return Bounded(bias.value.view(1, -1, 1, 1), bias.error.view(1, -1, 1, 1))


def _adjoints(input_shape, weight_shape, geometry) -> tuple[Callable, Callable]:
    """The gradients of a convolution as bilinear operations: of (input, grad), and of (grad, weight)."""
    return (
        lambda x, g: torch.nn.grad.conv2d_weight(x, weight_shape, g, *geometry),
        lambda g, w: torch.nn.grad.conv2d_input(input_shape, w, g, *geometry),
    )


def arithmetic(dtype: torch.dtype, device: str, gated: bool = False) -> Arithmetic:
    """How dynconv computes with `dtype` on "cpu" or "cuda", by the TF32 switch as it stands.

    `gated`: a gradient of a half type is multiplied by its gate and rounded again before the product, because
    tensor cores take halves.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    is_tf32 = device == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    operand_error = 0.0
    if is_tf32:
        operand_error = (1 + 2.0**-10) ** 2 - 1  # both factors cut to 10 bits of mantissa
    elif is_half and gated:
        operand_error = unit_roundoff(dtype)
    return Arithmetic(dtype, operand_error, truncates=device == "cuda" and (is_half or is_tf32))


@dataclass(frozen=True)
class Verdict:
    """How a result compares with its reference; `worst` is the largest error / bound of an element."""

    error: float
    bound: float
    worst: float
    passed: bool

    def __str__(self) -> str:
        return f"error {self.error:.2e}, {self.worst:.2g} of its bound"


def judge(actual: Tensor, expected: Tensor, bound: Tensor) -> Verdict:
    """Compare elementwise. A NaN anywhere fails, in the bound as well; so does a wrong shape."""
    if actual.shape != expected.shape:
        return Verdict(float("inf"), 0.0, float("inf"), False)
    if actual.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, True)
    error = (actual.double() - expected.double()).abs_()
    bound = bound.double().expand_as(error)
    passed = bool((error <= bound).all()) and bool(bound.isfinite().all())
    share = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=float("inf"))
    return Verdict(_largest(error), _largest(bound), share.max().item(), passed)


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The one that failed, or came closest to it."""
    return max(verdicts, key=lambda verdict: (not verdict.passed, verdict.worst))


# How much larger than the error of plain PyTorch a training block's may be: both add up the same products, in other
# orders, and normalise by statistics that are off by as much.
TRAINING_ERROR = 4


def judge_training(
    actual: Sequence[Tensor], plain: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> Verdict:
    """Compare tensors in norm, as far as plain PyTorch's of some type are from the reference in float64.

    The normalisation's statistics make an elementwise bound meaningless. Each tensor's error norm is relative to its
    own norm; what is judged is their root sum of squares, because a tensor of four numbers may be exact by chance.

    Args:
        actual: of `dtype`.
        plain: of `dtype`, or of a lower precision: its error is then taken to shrink with the unit roundoff.
        expected: in float64.
        dtype: the type under test.
    """
    errors, others = [], []
    for mine, theirs, wanted in zip(actual, plain, expected, strict=True):
        if mine.shape != wanted.shape or not mine.isfinite().all():
            return Verdict(float("inf"), 0.0, float("inf"), False)
        size, unit = max(wanted.norm().item(), 1e-30), torch.finfo(dtype).eps
        error, other = ((tensor.double() - wanted).norm().item() / size for tensor in (mine, theirs))
        errors.append(error)
        others.append(max(other * min(1.0, unit / torch.finfo(theirs.dtype).eps), unit))
    quotient = math.hypot(*errors) / math.hypot(*others)
    return Verdict(quotient, TRAINING_ERROR, quotient / TRAINING_ERROR, quotient <= TRAINING_ERROR)


def _largest(values: Tensor) -> float:
    return values.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
