"""Filters that differ from pixel to pixel: dynamic_filter2d for `verify`, and all layers of the kind for `bench`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import geometric_mean

import torch
import torch.nn.functional as F
from torch import Tensor

import dynconv

from .._geometry import Geometry
from .._masks import blob_mask
from .._timing import Timing, input_sets, take_turns
from ..reference import NORMALIZATIONS
from ..roofline import Device
from . import console, table
from .bounds import Arithmetic, Bounded, Verdict, arithmetic, judge, worst_of
from .deform import bounded_aggregate, random_offsets, sampled
from .environment import is_installed
from .floors import Estimate, estimate
from .layers import Filter

MODES = ("plain", "backward")
LEAST = 3  # samples of each call, at least: some idioms take seconds


@dataclass
class FilterRow:
    """One layer in one mode. Times are in milliseconds; None where the result was wrong.

    The memory is the most that PyTorch's allocator holds in a call beyond its operands: what a call returns is in it.
    """

    family: str
    layer: str
    mode: str
    batch: int
    check: Verdict
    estimate: Estimate
    failure: str | None = None
    idiom: Timing | None = None
    tapped: Timing | None = None
    compiled: Timing | None = None  # the loop over taps, by torch.compile
    torchvision: Timing | None = None  # its deform_conv2d with ones for weights
    dynconv: Timing | None = None
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
    def of_floor(self) -> float | None:
        """The least time that the device allows, over the time taken; above 1 where data stay in a cache."""
        return self.estimate.floor_ms / self.dynconv.median if self.dynconv else None

    def record(self) -> dict:
        """For JSON."""
        derived = ("ratio", "tapped_ratio", "of_floor")
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
        if layer.offsets:
            shapes.insert(1, (batch, 2 * layer.groups * layer.taps, height, width))
        if layer.channel_filters:
            shapes.append((batch, c, layer.kernel, layer.kernel))
        out = (batch, c, height, width)
        self.sets = input_sets(device, dtype.itemsize * sum(map(math.prod, [*shapes, out])))
        self.operands = [[self._tensor(*shape) for shape in shapes] for _ in range(self.sets)]
        if layer.offsets:
            for some in self.operands:
                offsets = random_offsets(shapes[1], self._values, device, meets_pixels=False).to(dtype)
                some[1] = offsets.contiguous(memory_format=torch.channels_last)
        self.grads = [self._tensor(*out) for _ in range(self.sets)]
        contiguous = torch.Tensor.contiguous
        self.contiguous = [[contiguous(operand) for operand in some] for some in self.operands]
        self.contiguous_grads = [contiguous(grad) for grad in self.grads]

    def _tensor(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self._values, device=self.device).to(self.dtype)
        return made.contiguous(memory_format=torch.channels_last)

    def apply(self, input: Tensor, *operands: Tensor) -> Tensor:
        """The op."""
        layer = self.layer
        if layer.offsets:
            options = dict(kernel_size=layer.kernel, padding=layer.padding, normalization=layer.normalization)
            return dynconv.deform_aggregate2d(input, *operands, **options)
        filters, channel_filters = operands if layer.channel_filters else (*operands, None)
        return dynconv.dynamic_filter2d(
            input, filters, kernel_size=layer.kernel, padding=layer.padding, scale_factor=layer.scale_factor,
            normalization=layer.normalization, channel_filters=channel_filters,
        )  # fmt: skip

    def calls(self, mode: str, baselines: bool = False) -> dict[str, Callable[[int], object]]:
        """What is timed: "dynconv", the "idiom", and a second one, "tapped"; each of the number of an input set.

        With `baselines` also "compiled", the second or else the first one by torch.compile, and "torchvision".
        """
        layer = self.layer
        made = {"dynconv": (self.apply, self.operands, self.grads)}
        idioms = {"idiom": sampled} if layer.offsets else {"idiom": unfolded, "tapped": tapped}
        for name, idiom in idioms.items():
            run = lambda *operands, idiom=idiom: idiom(layer, *operands)
            made[name] = run, self.contiguous, self.contiguous_grads
        if baselines:
            torch._dynamo.reset()  # after eight compilations it would compile no more
            plain = made.get("tapped", made["idiom"])[0]
            made["compiled"] = torch.compile(plain, dynamic=False), self.contiguous, self.contiguous_grads
            if layer.offsets and is_installed("torchvision"):
                made["torchvision"] = self.torchvision, self.contiguous, self.contiguous_grads
        run = self.gradients if mode == "backward" else self.forward
        return {
            name: lambda number, call=call, some=some, grads=grads: run(call, some[number], grads[number])
            for name, (call, some, grads) in made.items()
        }

    def torchvision(self, input: Tensor, offset: Tensor, weights: Tensor) -> Tensor:
        """Its operator, with the weights as its mask: one filter of ones for each channel, not what it is best at."""
        ones = input.new_ones(input.shape[1], 1, self.layer.kernel, self.layer.kernel)
        from torchvision.ops import deform_conv2d

        return deform_conv2d(input, offset, ones, padding=self.layer.padding, mask=weights)

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


class FilterCheck:
    """The op against sums in float64, a sample and a tap at a time, by the bounds of `dynconv.cli.bounds`."""

    def __init__(self, bench: FilterBench) -> None:
        self.bench = bench
        self.rules = arithmetic(bench.dtype, bench.device)

    def verdict(self, mode: str, name: str = "dynconv") -> Verdict:
        """Of one of the bench's calls: the worst of the output, or of the gradients, over the samples."""
        bench, wants = self.bench, mode == "backward"
        results = bench.calls(mode)[name](0)
        results = results if wants else (results,)
        verdicts = []
        for n in range(bench.batch):
            operands = [operand[n].double() for operand in bench.operands[0]]
            expected = self._expected(operands, bench.grads[0][n].double(), wants)
            verdicts += [judge(r[n], e.value.view_as(r[n]), e.error.view_as(r[n])) for r, e in zip(results, expected)]
        return worst_of(verdicts)

    def _expected(self, operands: Sequence[Tensor], grad: Tensor, wants_grads: bool) -> list[Bounded]:
        """The output of a sample, or the gradients of its operands."""
        layer = self.bench.layer
        if not layer.offsets:
            return bounded_filter(self.rules, layer, *operands, grad=grad if wants_grads else None)
        geometry, fixed_point = Geometry.of(layer.kernel, 1, layer.padding, 1), self.bench.device == "cuda"
        batched = [operand[None] for operand in operands]
        output, grads = bounded_aggregate(self.rules, *batched, geometry, layer.normalization, grad[None], fixed_point)
        return grads if wants_grads else [output]


def bounded_filter(
    rules: Arithmetic,
    layer: Filter,
    input: Tensor,
    filters: Tensor,
    channel_filters: Tensor | None = None,
    grad: Tensor | None = None,
) -> list[Bounded]:
    """The output of a sample or, with `grad`, the gradients of all operands, with bounds of their errors."""
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
        made[quantity] = Bounded(values[i], error if passed is None or quantity == "weights" else error + passed[i])
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


def measure_filters(
    layer: Filter,
    modes: Sequence[str],
    ceilings: Device,
    *,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 25,
    seconds: float = 1.0,
    baselines: bool = False,
) -> Iterator[FilterRow]:
    """Check and time one layer: a row for each of the modes "plain" and "backward"."""
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
        floor = estimate(layer, None, mode, batch, dtype, ceilings)
        row = FilterRow(layer.family, layer.name, mode, batch, verdict, floor, failure)
        if failure is None:
            calls = bench.calls(mode, baselines)
            calls = {name: call for name, call in calls.items() if name == "dynconv" or _runs(call)}
            taken = take_turns(calls, device, repeats, seconds, bench.sets, LEAST)
            for name in ("idiom", "tapped", "compiled", "torchvision", "dynconv"):
                setattr(row, name, taken.get(name))
            row.idiom_memory, row.memory = (
                peak_extra_bytes(lambda call=calls[name]: call(0), device) if name in calls else None
                for name in ("idiom", "dynconv")
            )
        yield row


def _runs(call: Callable[[int], object]) -> bool:
    """Whether PyTorch has an idiom's operations for this type on this device, and a compiler where it needs one."""
    try:
        call(0)
    except (RuntimeError, ImportError):  # NotImplementedError and torch.compile's own errors are of the first
        return False
    return True


def summarise_filters(rows: Sequence[FilterRow]) -> list[dict]:
    """Geometric means over the layers of each family and mode, for JSON."""
    means = []
    for family, mode in dict.fromkeys((row.family, row.mode) for row in rows):
        group = [row for row in rows if (row.family, row.mode) == (family, mode) and row.ratio is not None]
        if group:
            mean = {"family": family, "mode": mode, "layers": len(group)}
            for name in ("ratio", "tapped_ratio", "of_floor"):
                values = [getattr(row, name) for row in group if getattr(row, name) is not None]
                mean[name] = geometric_mean(values) if values else None
            means.append(mean)
    return means


CAPTIONS = {"plain": "the call", "backward": "forward, and the gradients of all operands"}


def print_filters(rows: Sequence[FilterRow], means: Sequence[dict], ceilings: Device) -> None:
    """A table for each mode, and the means."""
    out = console()
    peers = [name for name in ("compiled", "torchvision") if any(getattr(row, name) for row in rows)]
    for mode in dict.fromkeys(row.mode for row in rows):
        shown = table(
            f"\nfilters of pixels, {mode}: {CAPTIONS[mode]}",
            "<family|<layer|batch|idiom ms|taps ms|dynconv ms [20-80 %]|ratio|to taps|floor ms|of floor|"
            "idiom MiB|dynconv MiB" + "".join(f"|{peer} ms" for peer in peers),
            "idiom: F.unfold, or F.grid_sample for offsets, times the filters, summed. taps: a loop of addcmul_. "
            "floor: the least time at this machine's ceilings, by bytes (b) or FLOPs (f): operands and results once at "
            f"the speed of a copy, {ceilings.copy / 1e9:.1f} GB/s read and written. MiB: the most that PyTorch's "
            "allocator holds in a call beyond the operands, its results included. ~: the 80 % quantile of a "
            "time is more than 1.3 times its 20 % quantile",
        )
        for row in (row for row in rows if row.mode == mode):
            cells = [row.family, row.layer, str(row.batch)]
            if row.failure:
                shown.add_row(*cells, "[red]FAILED", "see below")
                continue
            times = [timing for timing in (row.idiom, row.dynconv) if timing]
            noisy = "~" if any(timing.is_noisy for timing in times) else ""
            style = "green" if row.ratio and row.ratio > 1 else "yellow"
            number = lambda value, form: "" if value is None else f"{value:{form}}"
            mib = lambda size: "" if size is None else f"{size / 2**20:.1f}"
            shown.add_row(
                *cells, number(row.idiom and row.idiom.median, ".2f"), number(row.tapped and row.tapped.median, ".2f"),
                str(row.dynconv), f"[{style}]{noisy}{number(row.ratio, '.2f')}x" if row.ratio else "",
                f"{row.tapped_ratio:.2f}x" if row.tapped else "", str(row.estimate),
                f"{row.of_floor:.0%}",
                mib(row.idiom_memory), mib(row.memory),
                *(number(timing and timing.median, ".2f") for timing in (getattr(row, peer) for peer in peers)),
            )  # fmt: skip
        out.print(shown)
    if not means:
        return
    shown = table("\ngeometric means over the layers of a family", "<family|<mode|layers|ratio|to taps|of floor")
    for mean in means:
        to_taps = "" if mean["tapped_ratio"] is None else f"{mean['tapped_ratio']:.2f}x"
        shown.add_row(
            mean["family"], mean["mode"], str(mean["layers"]), f"{mean['ratio']:.2f}x", to_taps,
            f"{mean['of_floor']:.0%}",
        )  # fmt: skip
    out.print(shown)


@dataclass(frozen=True)
class FilterCase:
    """One call of dynamic_filter2d in `verify`; the tensors follow from it."""

    name: str
    channels: int = 24
    groups: int = 1
    size: tuple[int, int] = (9, 8)
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 1
    dilation: int = 1
    scale_factor: int = 1
    normalization: str | None = None
    channel_filters: bool = False
    density: float | None = None  # of a mask
    gate: bool = False


FILTER_CASES = (
    FilterCase("filters"),
    FilterCase("filters, softmax", normalization="softmax", density=0.4),
    FilterCase("filters, sigmoid", normalization="sigmoid", channel_filters=True),
    FilterCase("filters, l2", normalization="l2", groups=2),
    FilterCase("filters of channels", channel_filters=True, density=0.4, gate=True),
    FilterCase("involution 7x7", channels=32, groups=2, kernel=(7, 7), padding=3),
    FilterCase("filters to twice the size", kernel=(5, 5), padding=2, scale_factor=2, normalization="softmax"),
    FilterCase("filters to twice the size, gate", scale_factor=2, groups=3, density=0.3, gate=True, stride=2),
    FilterCase("filters stride 2 dilation 2", stride=2, padding=2, dilation=2, groups=4),
    FilterCase("filters 5x2 stride 2x1", stride=(2, 1), padding=(2, 0), kernel=(5, 2), channels=17),
    FilterCase("filters 5x2 same", padding="same", kernel=(5, 2), channels=15, groups=15, gate=True, density=0.5),
    FilterCase("filters, no site", density=0.0, channel_filters=True),
    FilterCase("filters, all sites", density=1.0, gate=True, normalization="l2"),
)
FILTER_BATCH = 2


class DynamicFilter:
    """dynamic_filter2d: forward, and the gradient of every operand and of a gate. Skipped filters hold NaN."""

    op = "dynamic_filter2d"
    cases = FILTER_CASES

    def __init__(self, case: FilterCase, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self._generator = torch.Generator().manual_seed(2000 + FILTER_CASES.index(case))
        geometry = Geometry.of(case.kernel, case.stride, case.padding, case.dilation)
        self.geometry, self.taps = geometry, math.prod(case.kernel)
        self.inner_size = geometry.output_size(*case.size)
        self.size = tuple(length * case.scale_factor for length in self.inner_size)
        self.leaves = {
            "input": self._tensor(FILTER_BATCH, case.channels, *case.size),
            "filters": self._tensor(FILTER_BATCH, case.groups * self.taps, *self.size),
        }
        if case.channel_filters:
            self.leaves["channel_filters"] = self._tensor(FILTER_BATCH, case.channels, *case.kernel)
        self.mask = None
        if case.density is not None:
            self.mask = blob_mask(FILTER_BATCH, *self.size, case.density, self._generator).to(device)
            self.leaves["filters"] = torch.where(self.mask, self.leaves["filters"], math.nan)
        if case.gate:
            gate = self._tensor(*self.mask.shape)
            self.leaves["gate"] = torch.where(self.mask, torch.where(gate == 0, 1, gate), 0)
        self.grad = self._tensor(FILTER_BATCH, case.channels, *self.size)

    def _tensor(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self._generator).to(self.dtype).to(self.device)
        return made.contiguous(memory_format=torch.channels_last)

    def source(self, quantity: str) -> str:
        """What n of the bound counts."""
        return "each step's own, passed on"

    def _columns(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, G, C / G, taps, Ho, Wo]: what every tap of every site reads."""
        case, geometry = self.case, self.geometry
        (top, left), (bottom, right) = geometry.padding, geometry.padding_end
        padded = F.pad(input, (left, right, top, bottom))
        columns = F.unfold(padded, geometry.kernel, geometry.dilation, 0, geometry.stride)
        columns = columns.view(FILTER_BATCH, case.groups, -1, self.taps, *self.inner_size)
        return columns.repeat_interleave(case.scale_factor, 4).repeat_interleave(case.scale_factor, 5)

    def _scatter(self, columns: Tensor) -> Tensor:
        """The adjoint: to every pixel what the taps that read it have."""
        pixels = torch.zeros(FILTER_BATCH, self.case.channels, *self.case.size, dtype=columns.dtype)
        with torch.enable_grad():
            pixels = pixels.to(columns.device).requires_grad_()
            return torch.autograd.grad(self._columns(pixels), pixels, columns)[0]

    def _at(self, value: Bounded) -> Bounded:
        """Zeros at the skipped sites, exactly."""
        if self.mask is None:
            return value
        return Bounded(*(torch.where(self.mask, tensor, 0) for tensor in (value.value, value.error)))

    @torch.no_grad()
    def expect(self, rules: Callable[..., Arithmetic], backend: str) -> None:
        """In float64: a running error analysis of every step, forward and backward."""
        rules, case = rules(), self.case
        inner = rules.unstored
        leaf = {name: tensor.double() for name, tensor in self.leaves.items()}
        in_groups = (FILTER_BATCH, case.groups, case.channels // case.groups)
        rows = leaf["filters"].view(FILTER_BATCH, case.groups, 1, self.taps, *self.size).nan_to_num(0.0)
        name = case.normalization or "none"
        weights = inner.normalize(rows, name, 3)
        pixels = shared = Bounded.of(self._columns(leaf["input"]))
        share = leaf.get("channel_filters")
        if share is not None:
            share = share.view(*in_groups, self.taps, 1, 1)
            shared = inner.product(torch.mul, pixels, share, 1)
        total = lambda x, w: (x * w).sum(3).flatten(1, 2)
        made = output = self._at(rules.product(total, shared, weights, self.taps))
        grad, grads = self._at(Bounded.of(self.grad.double())), {}
        if case.gate:
            gate = leaf["gate"]
            output = rules.product(torch.mul, made, gate, 1)
            ones = torch.ones_like(grad.value)
            channels = lambda p, one: (p * one).sum(1, keepdim=True)
            grads["gate"] = rules.product(channels, rules.product(torch.mul, made, grad, 1), ones, case.channels)
            grad = rules.product(torch.mul, grad, gate, 1)
        view = lambda tensor: tensor.reshape(*in_groups, 1, *self.size)
        grad = self._at(grad)
        grad = Bounded(view(grad.value), view(grad.error))
        back = grad if share is None else inner.product(torch.mul, grad, share, 1)
        terms = self.taps * case.scale_factor**2
        grads["input"] = rules.product(lambda g, w: self._scatter(g * w), back, weights, terms)
        of_weights = inner.product(lambda x, g: (x * g).sum(2, keepdim=True), shared, grad, in_groups[2])
        found = rules.activate(inner.normalize_grad(rows, weights, of_weights, name, 3), None)
        grads["filters"] = self._at(Bounded(*(t.reshape(leaf["filters"].shape) for t in (found.value, found.error))))
        if share is not None:
            weighted = inner.product(torch.mul, pixels, weights, 1)
            sums = lambda x, g: (x * g).sum((4, 5)).reshape(leaf["channel_filters"].shape)
            grads["channel_filters"] = rules.product(sums, weighted, grad, math.prod(self.size))
        bounded = {"output": self._at(output), "output, autograd": self._at(output)}
        if case.gate:
            grads["gate"] = self._at(grads["gate"])
        bounded |= {f"grad {name}": value for name, value in grads.items()}
        self.expected = {name: value.value for name, value in bounded.items()}
        self.bounds = {name: value.error for name, value in bounded.items()}

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
        return dynconv.dynamic_filter2d(
            leaves["input"], leaves["filters"], kernel_size=case.kernel, stride=case.stride, padding=case.padding,
            dilation=case.dilation, scale_factor=case.scale_factor, normalization=case.normalization,
            channel_filters=leaves.get("channel_filters"), mask=leaves.get("gate", self.mask),
        )  # fmt: skip

    def judge(self, quantity: str, actual: Tensor) -> Verdict:
        """Of one quantity."""
        return judge(actual, self.expected[quantity], self.bounds[quantity])
