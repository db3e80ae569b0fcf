"""Filters that differ from pixel to pixel, for `bench` and `verify`: dynamic_filter2d."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dynconv

from .._geometry import Geometry
from .._masks import blob_mask
from .._timing import Timing, input_sets, take_turns
from ..reference import NORMALIZATIONS
from .bounds import Arithmetic, Bounded, Verdict, arithmetic, judge, worst_of
from .layers import Filter

MODES = ("plain", "backward")
LEAST = 3  # samples of each call, at least: some idioms take seconds


@dataclass
class FilterRow:
    """One layer in one mode. Times are in milliseconds; None where the result was wrong.

    `floor_ms` is what reading every operand and writing every result once takes at the speed of a copy. The memory is
    the most that PyTorch's allocator holds in a call beyond its operands: what a call returns is in it.
    """

    family: str
    layer: str
    mode: str
    batch: int
    check: Verdict
    failure: str | None = None
    idiom: Timing | None = None
    tapped: Timing | None = None
    dynconv: Timing | None = None
    floor_bytes: int = 0
    floor_ms: float = 0.0
    idiom_memory: int | None = None
    memory: int | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the idiom, by the medians."""
        return self.idiom.median / self.dynconv.median if self.idiom and self.dynconv else None

    @property
    def tapped_ratio(self) -> float | None:
        """How many times faster than the loop over taps."""
        return self.tapped.median / self.dynconv.median if self.tapped and self.dynconv else None

    @property
    def bandwidth_share(self) -> float | None:
        """Of the speed of a copy, over the bytes that have to be moved. Above 1 where they stay in a cache."""
        return self.floor_ms / self.dynconv.median if self.dynconv else None

    def record(self) -> dict:
        """For JSON."""
        derived = ("ratio", "tapped_ratio", "bandwidth_share")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def unfolded(layer: Filter, input: Tensor, filters: Tensor, channel_filters: Tensor | None = None) -> Tensor:
    """The usual idiom: F.unfold, times the filters, summed over the taps. Contiguous operands are its best layout."""
    n, c, h, w = input.shape
    g, k, s = layer.groups, layer.taps, layer.scale_factor
    columns = F.unfold(input, layer.kernel, padding=layer.padding).view(n, g, c // g, k, h, 1, w, 1)
    if channel_filters is not None:
        columns = columns * channel_filters.view(n, g, c // g, k, 1, 1, 1, 1)
    weights = NORMALIZATIONS[layer.normalization or "none"](filters.view(n, g, 1, k, h, s, w, s), dim=3)
    return (columns * weights).sum(3).view(n, c, h * s, w * s)


def tapped(layer: Filter, input: Tensor, filters: Tensor, channel_filters: Tensor | None = None) -> Tensor:
    """The best of plain PyTorch: nothing unfolded, a tap after the other added up in place."""
    n, c, h, w = input.shape
    g, k, s = layer.groups, layer.kernel, layer.scale_factor
    weights = NORMALIZATIONS[layer.normalization or "none"](filters.view(n, g, 1, k * k, h, s, w, s), dim=3)
    padded = F.pad(input, (layer.padding,) * 4)
    padded = padded.view(n, g, c // g, padded.shape[2], 1, padded.shape[3], 1)
    out = input.new_zeros(n, g, c // g, h, s, w, s)
    for tap in range(k * k):
        y, x = divmod(tap, k)
        pixels = padded[:, :, :, y : y + h, :, x : x + w]
        if channel_filters is not None:
            pixels = pixels * channel_filters[:, :, y, x].view(n, g, c // g, 1, 1, 1, 1)
        out.addcmul_(pixels, weights[:, :, :, tap])
    return out.view(n, c, h * s, w * s)


class FilterBench:
    """A layer's tensors, and the calls to compare: operands channels_last for dynconv, contiguous for the others."""

    def __init__(self, layer: Filter, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.layer, self.batch, self.dtype, self.device = layer, batch, dtype, device
        self._values = torch.Generator(device).manual_seed(seed)
        c, (height, width) = layer.channels, layer.size
        shapes = [(batch, c, layer.height, layer.width), (batch, layer.groups * layer.taps, height, width)]
        if layer.channel_filters:
            shapes.append((batch, c, layer.kernel, layer.kernel))
        out = (batch, c, height, width)
        self.operand_bytes, self.out_bytes = (
            torch.finfo(dtype).bits // 8 * sum(map(math.prod, some)) for some in (shapes, [out])
        )
        self.sets = input_sets(device, self.operand_bytes + self.out_bytes)
        self.operands = [[self._tensor(*shape) for shape in shapes] for _ in range(self.sets)]
        self.grads = [self._tensor(*out) for _ in range(self.sets)]
        contiguous = torch.Tensor.contiguous
        self.contiguous = [[contiguous(operand) for operand in some] for some in self.operands]
        self.contiguous_grads = [contiguous(grad) for grad in self.grads]

    def _tensor(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self._values, device=self.device).to(self.dtype)
        return made.contiguous(memory_format=torch.channels_last)

    def apply(self, input: Tensor, filters: Tensor, channel_filters: Tensor | None = None) -> Tensor:
        """The op."""
        layer = self.layer
        return dynconv.dynamic_filter2d(
            input, filters, kernel_size=layer.kernel, padding=layer.padding, scale_factor=layer.scale_factor,
            normalization=layer.normalization, channel_filters=channel_filters,
        )  # fmt: skip

    def calls(self, mode: str) -> dict[str, Callable[[int], object]]:
        """What is timed: "dynconv", the "idiom", and a second one, "tapped"; each of the number of an input set."""
        layer = self.layer
        made = {
            "dynconv": (self.apply, self.operands, self.grads),
            "idiom": (lambda *operands: unfolded(layer, *operands), self.contiguous, self.contiguous_grads),
            "tapped": (lambda *operands: tapped(layer, *operands), self.contiguous, self.contiguous_grads),
        }
        run = self.gradients if mode == "backward" else self.forward
        return {
            name: lambda number, call=call, some=some, grads=grads: run(call, some[number], grads[number])
            for name, (call, some, grads) in made.items()
        }

    @staticmethod
    def forward(operation: Callable[..., Tensor], operands: Sequence[Tensor], grad: Tensor) -> Tensor:
        """The result alone."""
        with torch.no_grad():
            return operation(*operands)

    @staticmethod
    def gradients(operation: Callable[..., Tensor], operands: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """Forward, and the gradients of all operands."""
        leaves = [operand.detach().requires_grad_() for operand in operands]
        return torch.autograd.grad(operation(*leaves), leaves, grad)

    def floor_bytes(self, mode: str) -> int:
        """Every operand read and every result written once; the backward reads the operands again, and a gradient."""
        forward = self.operand_bytes + self.out_bytes
        return forward if mode == "plain" else 2 * forward + self.operand_bytes


class FilterCheck:
    """The op against sums in float64, a sample and a tap at a time, by the bounds of `dynconv.cli.bounds`."""

    def __init__(self, bench: FilterBench) -> None:
        self.bench = bench
        self.rules = arithmetic(bench.dtype, bench.device)

    def verdict(self, mode: str) -> Verdict:
        """The worst of the output, or of the gradients of all operands, over the samples."""
        bench, wants = self.bench, mode == "backward"
        results = bench.calls(mode)["dynconv"](0)
        results = results if wants else (results,)
        verdicts = []
        for n in range(bench.batch):
            operands = [operand[n].double() for operand in bench.operands[0]]
            expected = self._expected(*operands, grad=bench.grads[0][n].double() if wants else None)
            verdicts += [judge(r[n], e.value.view_as(r[n]), e.error.view_as(r[n])) for r, e in zip(results, expected)]
        return worst_of(verdicts)

    def _expected(
        self, input: Tensor, filters: Tensor, channel_filters: Tensor | None = None, grad: Tensor | None = None
    ) -> list[Bounded]:
        rules, layer = self.rules, self.bench.layer
        name = layer.normalization or "none"
        rows = filters.view(layer.groups, layer.taps, *layer.size)
        weights = rules.normalize(rows, name, 1)
        others = input, channel_filters, grad
        largest = [None if other is None else other.abs() for other in others]
        sums = lambda w, x, v, g: filter_sums(layer, x, w, v, g)
        values, magnitudes = sums(weights.value, *others), sums(weights.magnitude, *largest)
        passed = sums(weights.error, *largest) if weights.error.any() else None
        # Beside the sum's own terms: the product with the channel's filter.
        terms = [layer.taps, layer.taps * layer.scale_factor**2, layer.channels // layer.groups, math.prod(layer.size)]
        made = {}
        for i, quantity in enumerate(("output", "input", "weights", "channel")):
            if values[i] is None:
                continue
            own = rules.unstored if quantity == "weights" else rules
            error = own.bound(values[i], magnitudes[i], terms[i] + 1)
            # The weights are no factor of their own gradient.
            made[quantity] = Bounded(
                values[i], error if passed is None or quantity == "weights" else error + passed[i]
            )
        if grad is None:
            return [made["output"]]
        filters = rules.activate(rules.normalize_grad(rows, weights, made["weights"], name, 1), None)
        return [made["input"], filters, *([made["channel"]] if "channel" in made else [])]


def filter_sums(
    layer: Filter, input: Tensor, weights: Tensor, channel_filters: Tensor | None, grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The output of a sample and, from its gradient, those of input, weights and channel_filters; else None.

    input [C, H, W], weights [G, K, Ho, Wo], channel_filters [C, kH, kW], grad [C, Ho, Wo].
    """
    (c, h, w), g, k, s, p = input.shape, layer.groups, layer.kernel, layer.scale_factor, layer.padding
    padded = F.pad(input, (p, p, p, p)).view(g, c // g, h + 2 * p, 1, w + 2 * p, 1)
    weights = weights.view(g, 1, k * k, h, s, w, s)
    out = input.new_zeros(g, c // g, h, s, w, s)
    if grad is not None:
        grad = grad.reshape(out.shape)
        of_input, of_weights = torch.zeros_like(padded), torch.empty_like(weights)
        of_channel = None if channel_filters is None else torch.empty_like(channel_filters)
    for tap in range(k * k):
        y, x = divmod(tap, k)
        place = (..., slice(y, y + h), slice(None), slice(x, x + w), slice(None))
        pixels, weight, share = padded[place], weights[:, :, tap], None
        if channel_filters is not None:
            share = channel_filters[:, y, x].view(g, c // g, 1, 1, 1, 1)
            shared = pixels * share
        else:
            shared = pixels
        if grad is None:
            out.addcmul_(shared, weight)
            continue
        of_weights[:, :, tap] = (grad * shared).sum(1, keepdim=True)
        back = (grad * weight).sum((3, 5), keepdim=True)
        if share is not None:
            of_channel[:, y, x] = (back * pixels).sum((2, 3, 4, 5)).flatten()
            back *= share
        of_input[place] += back
    if grad is None:
        return out.view(c, h * s, w * s), None, None, None
    of_input = of_input.view(c, h + 2 * p, w + 2 * p)[:, p : p + h, p : p + w]
    return None, of_input, of_weights.view(g, k * k, h * s, w * s), of_channel


def copy_speed(device: str) -> float:
    """Bytes a millisecond, read and written, of a copy too large for a cache."""
    source = torch.ones(2**25 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    taken = take_turns({"copy": lambda number: target.copy_(source)}, device, 10, 1.0)["copy"]
    return 2 * source.numel() * source.element_size() / taken.median


def measure_filters(
    layer: Filter,
    modes: Sequence[str],
    speed: float,
    *,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 25,
    seconds: float = 1.0,
) -> Iterator[FilterRow]:
    """Check and time one layer: a row for each of the modes "plain" and "backward". `speed`: of a copy."""
    from .scaling import peak_extra_bytes  # which imports bench

    batch = batch or layer.batch_on(device)
    bench = FilterBench(layer, batch, dtype, device)
    check = FilterCheck(bench)
    for mode in modes:
        if mode not in MODES:
            continue
        try:
            verdict = check.verdict(mode)
            failure = None if verdict.passed else f"wrong result: {verdict}"
        except Exception as error:
            verdict, failure = Verdict(math.inf, 0.0, math.inf, False), f"{type(error).__name__}: {error}"
        row = FilterRow(layer.family, layer.name, mode, batch, verdict, failure, floor_bytes=bench.floor_bytes(mode))
        row.floor_ms = row.floor_bytes / speed
        if failure is None:
            calls = bench.calls(mode)
            taken = take_turns(calls, device, repeats, seconds, bench.sets, LEAST)
            row.idiom, row.tapped, row.dynconv = (taken.get(name) for name in ("idiom", "tapped", "dynconv"))
            row.idiom_memory, row.memory = (
                peak_extra_bytes(lambda call=calls[name]: call(0), device) for name in ("idiom", "dynconv")
            )
        yield row
