"""How far a correct result may lie from the reference: bounds derived from the arithmetic, never tuned.

A sum of n products, in any order, with unit roundoff u: |computed - exact| <= gamma(n) * sum|products| with
gamma(n) = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The sum of
absolute products is what the reference itself returns for the operands' absolute values, so the bound is known
for each element. Half types are summed in float32 and rounded once: one half unit in the last place is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def _largest(values: Tensor) -> float:
    return values.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
