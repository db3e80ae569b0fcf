"""`python -m dynconv bench`: dense against dynconv on published layers, after a check of every result."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import geometric_mean

import torch
import torch.nn.functional as F
from torch import Tensor

import dynconv

from .._timing import CPU_SAMPLE, MOST_CALLS, Timing, input_sets, keep_freed_memory, take_turns
from ..roofline import Device
from ..roofline import measure as measure_ceilings
from . import console, extra, options, table
from .blocks import BlockBench, BlockCheck, PoseBench
from .bounds import Verdict, arithmetic, judge, worst_of
from .environment import environment, write_json
from .filters import FilterRow, measure_filters, print_filters, summarise_filters
from .floors import Estimate, estimate, together
from .gathered import WidthBench, WidthCheck
from .layers import FILTERS, LAYERS, MASKS, POSE_DENSITIES, Block, Filter, Layer, Width, modes_of
from .networks import (
    BATCHES,
    NETWORKS,
    LayerRow,
    NetworkRow,
    measure_network,
    print_networks,
    summarise_networks,
)
from .networks import DENSITIES as NETWORK_DENSITIES

MODES = ("plain", "in-place", "backward")
DTYPES = ("float32", "float16", "bfloat16")
DENSITIES = (0.9, 0.75, 0.5, 0.25, 0.1)
QUICK_DENSITIES = (0.5, 0.25)
QUICK_SHAPES = ("resnet50", "sige-ddpm")
BATCH = {"cpu": 4, "cuda": 128}
WIDTH_BATCH = {"cpu": 8, "cuda": 64}  # of layers of dynamic width


@dataclass
class Row:
    """One layer at one density in one mode. Times are in milliseconds; None where the result was wrong."""

    family: str
    layer: str
    kernel: int
    mode: str
    batch: int
    asked: float
    density: float
    check: Verdict
    work: float  # the share of the dense products that the active sites need
    failure: str | None = None
    dense: Timing | None = None
    sparse: Timing | None = None
    compaction: Timing | None = None
    masked_dense: Timing | None = None
    compiled: Timing | None = None
    sliced: Timing | None = None  # of a layer of dynamic width: a sample after the other
    grouped: Timing | None = None  # the same: all samples' slices as the groups of one convolution
    estimate: Estimate | None = None
    kind: str = "layer"  # or "block" or "width"

    @property
    def ratio(self) -> float | None:
        """How many times faster than dense, by the medians."""
        return None if self.dense is None or self.sparse is None else self.dense.median / self.sparse.median

    @property
    def ideal(self) -> float:
        """What the FLOPs allow: 1 / density for a layer; a block's first layers have more to compute.

        1 / (kept in * kept out) for a layer of dynamic width.
        """
        return 1 / self.work

    @property
    def share(self) -> float | None:
        """The part of the ideal that is reached."""
        return None if self.ratio is None else self.ratio / self.ideal

    @property
    def of_floor(self) -> float | None:
        """The least time that the device allows, over the time taken; above 1 where data stay in a cache."""
        return None if self.sparse is None or self.estimate is None else self.estimate.floor_ms / self.sparse.median

    def record(self) -> dict:
        """For JSON."""
        derived = ("ratio", "ideal", "share", "of_floor")
        return asdict(self) | {name: getattr(self, name) for name in derived}


class Bench:
    """A layer's tensors, its dense results, and the calls to compare at each density."""

    def __init__(self, layer: Layer, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.layer, self.batch, self.dtype, self.device = layer, batch, dtype, device
        self.generator = torch.Generator().manual_seed(seed)  # of the masks, the same on every device
        self._values = torch.Generator(device).manual_seed(seed)
        input_shape = (batch, layer.in_channels, layer.height, layer.width)
        weight_shape = (layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
        self.output_shape = (batch, layer.out_channels, layer.height, layer.width)
        element = torch.finfo(dtype).bits // 8
        self.sets = input_sets(device, element * (math.prod(input_shape) + math.prod(self.output_shape)))
        self.inputs = [self._tensor(*input_shape) for _ in range(self.sets)]
        self.grads = [self._tensor(*self.output_shape) for _ in range(self.sets)]
        self.caches = [self._tensor(*self.output_shape) for _ in range(self.sets)]
        self.weight = self._tensor(*weight_shape, scale=layer.products**-0.5)

    def _tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = (torch.randn(shape, generator=self._values, device=self.device) * scale).to(self.dtype)
        return made.contiguous(memory_format=torch.channels_last)

    def dense(self, number: int) -> Tensor:
        """What users run today: PyTorch's own convolution, channels_last."""
        return F.conv2d(self.inputs[number], self.weight, padding=self.layer.padding, groups=self.layer.groups)

    def masked_dense(self, number: int, mask: Tensor) -> Tensor:
        """The usual idiom of the papers' code: compute everything, then multiply by the mask."""
        return self.dense(number) * mask

    def sparse(self, number: int, mask: Tensor | dynconv.ActiveSites, out: Tensor | None = None) -> Tensor:
        """The op."""
        geometry = dict(padding=self.layer.padding, groups=self.layer.groups)
        return dynconv.masked_conv2d(self.inputs[number], self.weight, **geometry, mask=mask, out=out)

    def gradients(self, operation, number: int, *arguments) -> tuple[Tensor, ...]:
        """Forward, and the gradients of input and weight."""
        input, weight = self.inputs[number].requires_grad_(), self.weight.requires_grad_()
        try:
            grads = torch.autograd.grad(operation(number, *arguments), (input, weight), self.grads[number])
        finally:
            input.requires_grad_(False), weight.requires_grad_(False)
        return grads

    def cache(self) -> Tensor:
        """What an update in place starts from."""
        return self.caches[0].clone(memory_format=torch.preserve_format)

    def work(self, mask: Tensor) -> float:
        """The share of the dense products that the active sites need."""
        return mask.float().mean().item()

    def compact(self, mask: Tensor) -> dynconv.ActiveSites:
        """What layers that share a mask pay once: the active set and, on the CPU, the table of its neighbours."""
        sites = dynconv.ActiveSites(mask)
        if self.device == "cpu":
            size, layer = (self.layer.height, self.layer.width), self.layer
            sites.neighbours(size, (layer.kernel, layer.kernel), padding=layer.padding)
        return sites


class Check:
    """The op against a dense convolution of more precision, by the bound of `dynconv.cli.bounds`."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        # On a CPU float64 would take longer than all the measurements; float32's own error is in the bound.
        self.precision = torch.float64 if bench.device == "cuda" else torch.float32
        self.arithmetic = arithmetic(bench.dtype, bench.device)
        self.operands = [tensor.to(self.precision) for tensor in (bench.inputs[0], bench.weight)]
        self.dense, self.magnitude = (
            F.conv2d(*operands, padding=bench.layer.padding, groups=bench.layer.groups)
            for operands in (self.operands, self._absolute())
        )
        self.output_bound = self.arithmetic.bound(self.dense, self.magnitude, bench.layer.products, self.precision)

    def _absolute(self) -> list[Tensor]:
        return [tensor.abs() for tensor in self.operands]

    def output(self, actual: Tensor, mask: Tensor, inactive: Tensor | None = None) -> Verdict:
        """The skipped sites have to be `inactive`, or zero, exactly."""
        expected = torch.where(mask, self.dense, 0 if inactive is None else inactive.to(self.precision))
        return judge(actual, expected, torch.where(mask, self.output_bound, 0))

    def gradients(self, mask: Tensor) -> Verdict:
        """Of input and weight; the worse of the two verdicts."""
        actual = self.bench.gradients(self.bench.sparse, 0, mask)
        grad = torch.where(mask, self.bench.grads[0], 0).to(self.precision)
        expected = self._gradients(self.operands, grad)
        magnitude = self._gradients(self._absolute(), grad.abs())
        layer = self.bench.layer
        terms = (layer.out_channels // layer.groups * layer.kernel**2, int(mask.sum()))
        verdicts = [
            judge(a, e, self.arithmetic.bound(e, m, n, self.precision))
            for a, e, m, n in zip(actual, expected, magnitude, terms)
        ]
        return worst_of(verdicts)

    def _gradients(self, operands: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
        padding = [self.bench.layer.padding] * 2
        return torch.ops.aten.convolution_backward(
            grad, *operands, None, (1, 1), padding, (1, 1), False, (0, 0), self.bench.layer.groups, (True, True, False)
        )[:2]


_KINDS = {
    Layer: ("layer", Bench, Check),
    Block: ("block", BlockBench, BlockCheck),
    Width: ("width", WidthBench, WidthCheck),
}


def prepare(layer: Layer | Block | Width, batch: int, dtype: torch.dtype, device: str):
    """What times a layer or a block, and what checks it."""
    kinds = _KINDS[type(layer)][1:]
    bench = kinds[0](layer, batch, dtype, device)
    return bench, kinds[1](bench)


def measure(
    layer: Layer | Block | Width,
    densities: Sequence[float],
    modes: Sequence[str],
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    masks: str = "blob",
    repeats: int = 25,
    seconds: float = 1.0,
    baselines: bool = False,
    automatic: bool = False,
    ceilings: Device | None = None,
) -> Iterator[Row]:
    """Check and time one layer: a row for each density and mode. A row whose check fails carries no time.

    With the device's `ceilings` a row has its floor.

    `automatic` lets each call choose between dense and sparse, by a calibration made first and not stored.
    """
    modes = modes_of(layer, modes)
    bench, check = prepare(layer, batch, dtype, device)
    has_choice = not (isinstance(layer, Block) and tuple(modes) == ("backward",))
    if automatic and has_choice:
        mask = layer.active(0.5, masks, batch, torch.Generator().manual_seed(1)).to(device)
        dynconv.calibrate(lambda: _each_once(bench, mask, modes), store=False)
    compiled = _compiled(bench) if baselines and "plain" in modes else None
    for asked in densities:
        mask = layer.active(asked, masks, batch, bench.generator).to(device)
        density = mask.float().mean().item()
        rows = {}
        for mode in modes:
            verdict, failure = check_mode(bench, check, mask, mode)
            rows[mode] = Row(
                layer.family, layer.name, layer.kernel, mode, batch, asked, density, verdict, bench.work(mask), failure,
                kind=_KINDS[type(layer)][0],
                estimate=ceilings and estimate(layer, mask, mode, batch, dtype, ceilings),
            )  # fmt: skip
        sound = [mode for mode, row in rows.items() if row.failure is None]
        timings = _timed(bench, mask, sound, repeats, seconds, compiled)
        for mode in sound:
            row = rows[mode]
            row.dense = timings["dense backward" if mode == "backward" else "dense"]
            row.sparse, row.compaction = timings[mode], timings.get("compaction")
            if mode == "plain":
                row.masked_dense, row.compiled = timings.get("masked dense"), timings.get("compiled")
                row.sliced, row.grouped = timings.get("sliced"), timings.get("grouped")
        yield from rows.values()


def _each_once(bench: Bench, mask: Tensor, modes: Sequence[str]) -> None:
    with torch.no_grad():
        if "plain" in modes:
            bench.sparse(0, mask)
        if "in-place" in modes:
            bench.sparse(0, bench.compact(mask), bench.cache())
    if "backward" in modes:
        bench.gradients(bench.sparse, 0, mask)


def measure_pose(
    batch: int,
    dtype: torch.dtype,
    device: str,
    masks: str,
    repeats: int,
    seconds: float,
    automatic: bool = False,
    ceilings: Device | None = None,
) -> Row:
    """Check and time DynConv's pose network, all its blocks in one call."""
    bench = PoseBench(batch, dtype, device, masks)
    if automatic:
        with torch.no_grad():
            dynconv.calibrate(lambda: bench.sparse(0), store=False)
    verdict = bench.check()
    failure = None if verdict.passed else f"wrong result: {verdict}"
    asked = sum(POSE_DENSITIES) / len(POSE_DENSITIES)
    row = Row(
        "dynconv-pose", bench.name, 0, "plain", batch, asked, bench.density, verdict, bench.work, failure, kind="block"
    )  # fmt: skip
    if ceilings is not None:
        each = [estimate(block.layer, mask, "plain", batch, dtype, ceilings) for block, mask in bench.blocks]
        row.estimate = together(each)
    if failure is None:
        calls = {"dense": bench.dense, "plain": bench.sparse, "compaction": bench.compaction}
        with torch.no_grad():
            timings = take_turns(calls, device, repeats, seconds, bench.sets)
        row.dense, row.sparse, row.compaction = timings["dense"], timings["plain"], timings["compaction"]
    return row


def _compiled(bench: Bench) -> Callable[[int, Tensor], Tensor]:
    """The usual idiom, compiled by torch.compile; where that has no compiler, as it is, with a line that says so."""
    torch._dynamo.reset()  # after eight layers it would compile no more
    # Always the same input set: its number is compiled in.
    made = torch.compile(lambda mask: bench.masked_dense(0, mask), dynamic=False)
    compiled = lambda number, mask: made(mask)
    mask = torch.ones(bench.batch, 1, *bench.output_shape[2:], dtype=torch.bool, device=bench.device)
    try:
        with torch.no_grad():
            compiled(0, mask)
    except Exception as error:
        message = f"torch.compile does not work here, so `compiled` is the uncompiled idiom: {type(error).__name__}"
        console(stderr=True).print(message)
        return bench.masked_dense
    return compiled


def check_mode(bench: Bench, check: Check, mask: Tensor, mode: str) -> tuple[Verdict, str | None]:
    """The verdict on one mode, and what to print where it is not good."""
    try:
        if mode == "backward":
            verdict = check.gradients(mask)
        else:
            with torch.no_grad():
                out = bench.cache() if mode == "in-place" else None
                cache = None if out is None else out.clone(memory_format=torch.preserve_format)
                verdict = check.output(bench.sparse(0, mask, out), mask, cache)
    except Exception as error:
        return Verdict(math.inf, 0.0, math.inf, False), f"{type(error).__name__}: {error}"
    return verdict, None if verdict.passed else f"wrong result: {verdict}"


def _timed(bench: Bench, mask: Tensor, modes: Sequence[str], repeats, seconds, compiled) -> dict[str, Timing]:
    timings: dict[str, Timing] = {}
    forward = {}
    if "plain" in modes:
        forward["plain"] = lambda number: bench.sparse(number, mask)
    if "in-place" in modes:
        sites = bench.compact(mask)
        forward["in-place"] = lambda number: bench.sparse(number, sites, bench.caches[number])
    if forward:
        forward = {"dense": bench.dense, "compaction": lambda number: bench.compact(mask)} | forward
        if isinstance(bench, WidthBench) and bench.device == "cpu":  # on a GPU it waits for every sample's counts
            forward["sliced"] = lambda number: bench.sliced(number, mask)
        if compiled is not None:
            forward["masked dense"] = lambda number: bench.masked_dense(number, mask)
            forward["compiled"] = lambda number: compiled(number, mask)
            if isinstance(bench, WidthBench):
                kept = bench.lists(mask)  # to find them waits for a GPU: not in the time
                forward["grouped"] = lambda number: bench.grouped(number, kept)
        with torch.no_grad():
            timings |= take_turns(forward, bench.device, repeats, seconds, bench.sets)
    if "backward" in modes:
        backward = {
            "dense backward": lambda number: bench.gradients(bench.dense, number),
            "backward": lambda number: bench.gradients(bench.sparse, number, mask),
        }
        timings |= take_turns(backward, bench.device, repeats, seconds, bench.sets)
        if not forward:
            compact = {"compaction": lambda number: bench.compact(mask)}
            timings |= take_turns(compact, bench.device, repeats, seconds / 10, bench.sets)
    return timings


@dataclass(frozen=True)
class Crossover:
    """The density at which dynconv stops being faster than dense; `density` is None where none was measured."""

    density: float | None
    text: str


def crossover(points: Sequence[tuple[float, float]]) -> Crossover:
    """From (density, ratio) pairs: the lowest density at which the ratio falls to 1.

    Between two densities the time relative to dense, 1 / ratio, is taken as linear: cost is linear in the sites.
    """
    points = sorted(points)
    if not points:
        return Crossover(None, "not measured")
    if points[0][1] <= 1:
        return Crossover(None, f"below {points[0][0]:.2g}")
    for (density, ratio), (next_density, next_ratio) in itertools.pairwise(points):
        if next_ratio <= 1:
            time, next_time = 1 / ratio, 1 / next_ratio
            crossing = density + (next_density - density) * (1 - time) / (next_time - time)
            return Crossover(crossing, f"{crossing:.2f}")
    return Crossover(None, f"above {points[-1][0]:.2g}")


def curves(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The timed rows of each (family, layer, mode), by density."""
    grouped = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.density):
        if row.ratio is not None:
            grouped[row.family, row.layer, row.mode].append(row)
    return grouped


def summarise(rows: Sequence[Row]) -> dict:
    """Crossover densities, and geometric means over the layers of each family, as plain data for JSON.

    Over its 3x3 layers, its blocks, and its layers of dynamic width.
    """
    means = defaultdict(list)
    for row in rows:
        name = {"block": "means_blocks", "width": "means_width"}.get(row.kind, "means_3x3" if row.kernel == 3 else None)
        if row.ratio is not None and name is not None:
            means[row.family, name, row.mode, row.asked].append(row)
    summary = {"crossover": [], "means_3x3": [], "means_blocks": [], "means_width": []}
    for (family, layer, mode), curve in curves(rows).items():
        crossing = crossover([(r.density, r.ratio) for r in curve])
        summary["crossover"].append({"family": family, "layer": layer, "mode": mode} | asdict(crossing))
    for (family, name, mode, asked), group in means.items():
        mean = {"family": family, "mode": mode, "asked": asked, "layers": len(group)}
        mean["ratio"] = geometric_mean([row.ratio for row in group])
        mean["share"] = geometric_mean([row.share for row in group])
        floors = [row.of_floor for row in group if row.of_floor]
        mean["of_floor"] = geometric_mean(floors) if floors else None
        summary[name].append(mean)
    return summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=sorted({*LAYERS, *FILTERS, "all"}),
        default=("all",),
        help="published layers; tiny: a few of no network, not in all",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=(*NETWORKS, "all", "none"),
        help="whole networks, in float32 on the CPU; by default all with --shapes all, none with others; named without "
        "--shapes: these alone",
    )
    parser.add_argument("--layers", metavar="TEXT", help="only the layers whose name contains this, e.g. 3x3")
    parser.add_argument(
        "--density",
        nargs="+",
        type=options.density,
        default=DENSITIES,
        metavar="D",
        help="of layers without published ones",
    )
    parser.add_argument("--masks", choices=tuple(MASKS), default="blob")
    parser.add_argument(
        "--batch",
        type=options.positive,
        help="of layers without a published one; cpu 4, cuda 128; of dynamic width 8, 64",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--baselines", action="store_true", help="also the compiled idioms, and peers where there are some"
    )
    parser.add_argument(
        "--automatic", action="store_true", help="calibrate each layer first, then let calls choose dense or sparse"
    )
    parser.add_argument("--repeats", type=options.positive, default=25, help="samples of each call at most")
    parser.add_argument(
        "--seconds", type=options.seconds, default=0.5, help="after which a row stops sampling; 5 samples at least"
    )
    parser.add_argument(
        "--limit",
        type=options.limit,
        default=math.inf,
        metavar="SECONDS",
        help="after which no layer begins; the rest is named",
    )
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer shapes, densities and samples")
    parser.add_argument("--json", type=options.output_file(), metavar="FILE")
    picture = {"type": options.output_file(*options.PICTURES), "metavar": "FILE"}
    parser.add_argument("--plot", **picture, help="time against density, as a picture; of filters alone: bars")
    parser.add_argument("--scaling", **picture, help="also time and memory against the active sites, as a picture")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse a device that is not here, and filters that leave nothing to measure."""
    options.check_device(parser, arguments.device)
    networks, (families, layers, filters) = _networks(arguments), _chosen(arguments)
    if networks and (arguments.device, arguments.dtype) != ("cpu", "float32"):
        parser.error("argument --networks: expected --device cpu and --dtype float32, in which they are measured")
    has_mode = any(modes_of(layer, arguments.modes) for layer in (*layers, *filters))
    if not has_mode and not networks and not _has_pose(families, arguments):
        parser.error(options.nothing_left(arguments))


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a result was wrong."""
    if arguments.plot or arguments.scaling:
        extra("matplotlib")  # now, not after minutes of measuring
    if arguments.quick:
        densities = QUICK_DENSITIES if arguments.density == DENSITIES else arguments.density
        repeats, seconds = min(arguments.repeats, 5), min(arguments.seconds, 0.2)
    else:
        densities = arguments.density
        repeats, seconds = arguments.repeats, arguments.seconds
    keeps_memory = keep_freed_memory()
    networks = _networks(arguments)
    families, layers, filters = _chosen(arguments)
    # Dense gets cuDNN's fastest algorithm.
    torch.backends.cudnn.benchmark = True
    begin = time.perf_counter()
    ceilings = measure_ceilings(arguments.device, [getattr(torch, arguments.dtype)], min(1.0, 2 * seconds))
    record = {
        "environment": environment(arguments.device) | {"malloc_keeps_freed_memory": keeps_memory},
        "automatic": arguments.automatic,
        "dtype": arguments.dtype,
        "masks": arguments.masks,
        "repeats": repeats,
        "seconds": seconds,
        "ceilings": ceilings.record(),
    }
    rows: list[Row] = []
    filter_rows: list[FilterRow] = []
    network_rows: list[NetworkRow] = []
    network_layers: list[LayerRow] = []
    left_out: list[str] = []

    def is_late(name: str) -> bool:
        if time.perf_counter() - begin > arguments.limit:
            left_out.append(name)
        return bool(left_out)

    def save(**more) -> None:
        """After each layer as well: what is known survives a run that is stopped."""
        kinds = {
            "networks": network_rows, "network_layers": network_layers, "rows": rows, "filters": filter_rows,
        }  # fmt: skip
        found = {kind: [row.record() for row in found] for kind, found in kinds.items()}
        if arguments.json:
            write_json(arguments.json, record | found | {"left_out": left_out} | more)

    progress = extra("rich.progress")
    with (
        dynconv.execution("automatic" if arguments.automatic else "sparse"),
        progress.Progress(
            *progress.Progress.get_default_columns(),
            progress.TimeElapsedColumn(),
            console=console(stderr=True),
            transient=True,
        ) as bar,
    ):
        total = sum(_cost(layer) * len(layer.densities or densities) for layer in layers)
        runs = [(name, batch) for name in networks for batch in _batches(arguments)]
        task = bar.add_task("bench", total=total + sum(map(_filter_cost, filters)) + _NETWORK_COST * len(runs))
        for name, batch in runs:
            if is_late(f"{name} batch {batch}"):
                continue
            bar.update(task, description=f"{name} batch {batch}")
            of_network, of_layers = measure_network(
                name, batch, NETWORK_DENSITIES if densities == DENSITIES else densities, masks=arguments.masks,
                repeats=repeats, seconds=seconds * _NETWORK_COST, calibration_seconds=min(0.1, seconds),
            )  # fmt: skip
            network_rows += of_network
            network_layers += of_layers
            bar.advance(task, _NETWORK_COST)
            save()
        for layer in layers:
            if is_late(f"{layer.family} {layer.name}"):
                continue
            bar.update(task, description=f"{layer.family} {layer.name}")
            usual = WIDTH_BATCH if isinstance(layer, Width) else BATCH
            batch = layer.batch or arguments.batch or usual[arguments.device]
            for row in measure(
                layer, layer.densities or densities, arguments.modes, batch=batch,
                dtype=getattr(torch, arguments.dtype), device=arguments.device, masks=arguments.masks,
                repeats=repeats, seconds=seconds, baselines=arguments.baselines, automatic=arguments.automatic,
                ceilings=ceilings,
            ):  # fmt: skip
                rows.append(row)
                bar.advance(task, _cost(layer) / len(arguments.modes))
            save()
        if _has_pose(families, arguments) and not left_out:
            bar.update(task, description=f"dynconv-pose {PoseBench.name}")
            dtype = getattr(torch, arguments.dtype)
            rows.append(
                measure_pose(
                    32, dtype, arguments.device, arguments.masks, repeats, seconds, arguments.automatic, ceilings
                )
            )
        for layer in filters:
            if is_late(f"{layer.family} {layer.name}"):
                continue
            bar.update(task, description=f"{layer.family} {layer.name}")
            filter_rows += measure_filters(
                layer, arguments.modes, ceilings, dtype=getattr(torch, arguments.dtype), device=arguments.device,
                repeats=repeats, seconds=seconds, baselines=arguments.baselines,
            )  # fmt: skip
            bar.advance(task, _filter_cost(layer))
            save()
    summary = summarise(rows) | {"means_filters": summarise_filters(filter_rows)}
    if network_rows:
        summary["networks"] = summarise_networks(network_layers)
        print_networks(network_rows, network_layers, summary["networks"])
    if rows:
        _print(rows, summary, arguments)
    if filter_rows:
        print_filters(filter_rows, summary["means_filters"], ceilings)
    _print_closing([*network_rows, *rows, *filter_rows], arguments, record["environment"], ceilings)
    if left_out:
        console().print(f"no time for {len(left_out)} layers: {', '.join(left_out)}", style="yellow")
    closing = {"elapsed_s": round(time.perf_counter() - begin, 1), "summary": summary}
    save(**closing)  # before the plots, whatever becomes of them
    if arguments.plot and (rows or filter_rows):
        from .plots import plot_filters, plot_rows

        where = f"{record['environment']['device']}, {arguments.dtype}"
        if rows:
            plot_rows(rows, summary, where, arguments.plot)
        else:
            plot_filters(filter_rows, where, arguments.plot)
    if arguments.scaling:
        from .scaling import run_scaling

        dtype = getattr(torch, arguments.dtype)
        save(**closing, scaling=run_scaling(arguments.device, dtype, ceilings, arguments.scaling))
    return 1 if any(row.failure for row in [*network_rows, *rows, *filter_rows]) else 0


# A network's time in rows of layers, for the progress bar and the time it may take.
_NETWORK_COST = 32


def _networks(arguments: argparse.Namespace) -> list[str]:
    """The networks to measure."""
    named = arguments.networks
    if named is None:
        is_default = arguments.shapes == ("all",) and not arguments.quick and not arguments.layers
        named = ["all"] if is_default and arguments.device == "cpu" and arguments.dtype == "float32" else []
    return [name for name in NETWORKS if name in named or ("all" in named and name != "tiny")]


def _batches(arguments: argparse.Namespace) -> tuple[int, ...]:
    """Of networks."""
    return (arguments.batch,) if arguments.batch else BATCHES[:1] if arguments.quick else BATCHES


def _chosen(arguments: argparse.Namespace) -> tuple[Sequence[str], list, list]:
    """The families, layers and filters that the options leave."""
    shapes = QUICK_SHAPES if arguments.quick and arguments.shapes == ("all",) else arguments.shapes
    if arguments.shapes == ("all",) and arguments.networks and _networks(arguments):
        shapes = ()  # networks alone
    families = [name for name in (*LAYERS, *FILTERS) if name != "tiny"] if "all" in shapes else shapes
    layers, filters = (
        [
            layer
            for family in families
            for layer in published.get(family, ())
            if not arguments.layers or arguments.layers in layer.name
        ]
        for published in (LAYERS, FILTERS)
    )
    return families, layers, [layer for layer in filters if layer.on_cpu or arguments.device == "cuda"]


def _has_pose(families: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Whether the pose network as a whole is among what is measured."""
    is_named = not arguments.layers or arguments.layers in PoseBench.name
    return "dynconv-pose" in families and "plain" in arguments.modes and not arguments.quick and is_named


def _cost(layer: Layer | Block | Width) -> float:
    """Roughly the time that a row takes, for the progress bar: a fixed part, and one that grows with the FLOPs."""
    return 1 + layer.height * layer.width * layer.products * layer.out_channels / 2e9


def _filter_cost(layer: Filter) -> float:
    """As `_cost`; the idioms beside the op take most of it."""
    return 1 + math.prod(layer.size) * layer.channels * layer.taps / 2e7


def _print(rows: Sequence[Row], summary: dict, arguments: argparse.Namespace) -> None:
    out = console()
    for mode in arguments.modes:
        baselines = "|conv2d·mask|compiled" if arguments.baselines and mode == "plain" else ""
        if any(row.sliced for row in rows if row.mode == mode):
            baselines += "|sample by sample"
        if any(row.grouped for row in rows if row.mode == mode):
            baselines += "|grouped"
        columns = (
            "<family|<layer|batch|density|dense ms [20-80 %]|dynconv ms [20-80 %]|ratio|ideal|share|predicted|floor ms|"
            "of floor|compaction ms"
        )
        caption = (
            "ideal: what the FLOPs allow; share: reached of it, predicted: what bytes and tiles leave of it with dense "
            "at the ceilings. floor: the least time at this machine's ceilings, by bytes (b) or FLOPs (f); above "
            "100 %: data stay in a cache, or zeros are written without a read. ~: the 80 % quantile of a time is more "
            "than 1.3 times its 20 % quantile"
        )
        shown = table(f"\n{mode}: {CAPTIONS[mode]}", columns + baselines, caption)
        previous = None
        for row in (row for row in rows if row.mode == mode):
            if previous not in (None, (row.family, row.layer)):
                shown.add_section()
            previous = row.family, row.layer
            cells = [row.family, row.layer, str(row.batch), f"{row.density:.3f}"]
            if row.failure:
                shown.add_row(*cells, "[red]FAILED", "see below")
                continue
            style = "green" if row.ratio > 1 else "yellow"
            noisy = "~" if row.dense.is_noisy or row.sparse.is_noisy else ""
            cells += [str(row.dense), str(row.sparse), f"[{style}]{noisy}{row.ratio:.2f}x", f"{row.ideal:.2f}x"]
            floor = row.estimate
            cells += [f"{row.share:.0%}", "" if floor.predicted is None else f"{floor.predicted:.0%}"]
            cells += [str(floor), f"{row.of_floor:.0%}"]
            cells += [f"{row.compaction.median:.3f}"]
            cells += [f"{timing.median:.2f}" for timing in (row.masked_dense, row.compiled) if timing]
            headers = [column.header for column in shown.columns]
            for header, timing in (("sample by sample", row.sliced), ("grouped", row.grouped)):
                if timing:
                    cells += [""] * (headers.index(header) - len(cells))
                    cells.append(f"{timing.median:.2f} ({row.dense.median / timing.median:.2f}x)")
            shown.add_row(*cells)
        out.print(shown)
    named = (("means_3x3", "3x3 layers"), ("means_blocks", "blocks"), ("means_width", "layers of dynamic width"))
    for name, what in named:
        if not summary[name]:
            continue
        means = table(
            f"\ngeometric means over the {what}", "<family|<mode|density asked|layers|ratio|share of the ideal|of floor"
        )
        for mean in summary[name]:
            means.add_row(
                mean["family"], mean["mode"], f"{mean['asked']:g}", str(mean["layers"]), f"{mean['ratio']:.2f}x",
                f"{mean['share']:.0%}", "" if mean["of_floor"] is None else f"{mean['of_floor']:.0%}",
            )  # fmt: skip
        out.print(means)
    crossings = table(
        "\ncrossover density: dynconv is faster below it", "<family|<layer" + "".join(f"|{m}" for m in arguments.modes)
    )
    found = {(c["family"], c["layer"], c["mode"]): c["text"] for c in summary["crossover"]}
    for family, layer in dict.fromkeys((row.family, row.layer) for row in rows):
        measured = {row.mode for row in rows if (row.family, row.layer) == (family, layer)}
        texts = [found.get((family, layer, mode), "failed" if mode in measured else "-") for mode in arguments.modes]
        crossings.add_row(family, layer, *texts)
    out.print(crossings)
    if arguments.automatic:
        worst = min((row for row in rows if row.ratio is not None), key=lambda row: row.ratio, default=None)
        if worst is not None:
            text = f"{worst.ratio:.2f}x dense, {worst.family} {worst.layer} {worst.mode} at {worst.density:.2f}"
            out.print(f"automatic: calls choose dense or sparse by a calibration; the slowest is {text}")


def _print_closing(
    rows: Sequence[Row | FilterRow | NetworkRow], arguments: argparse.Namespace, machine: dict, ceilings: Device
) -> None:
    """Where and how it was measured, and what went wrong."""
    out = console()
    where = machine["device"] if arguments.device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    software = f"torch {machine['torch']}, dynconv {machine['dynconv']} ({machine['commit'] or 'no commit'})"
    out.print(f"{where}; {arguments.dtype}; {software}")
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in ceilings.products.items())
    out.print(f"ceilings: {ceilings.copy / 1e9:,.1f} GB/s read and written by a copy; products {rates}")
    if arguments.device == "cuda":
        out.print("GPU time of calls queued ahead of the GPU, as in a CUDA graph; Python's own time is not in it")
    if arguments.device == "cpu":
        out.print(
            f"a sample: the mean of calls in a row for about {CPU_SAMPLE:g} ms, at most {MOST_CALLS}; "
            f"malloc {'keeps' if machine['malloc_keeps_freed_memory'] else 'may return'} freed memory, for both sides"
        )
    checked = sum(row.failure is None for row in rows)
    out.print(
        f"{checked} of {len(rows)} results within their bounds of the dense reference, checked before they were timed"
    )
    if machine["load_before"] is not None and machine["load_before"] > 0.8 * machine["threads"]:
        out.print(
            f"Other programs kept this machine busy (load {machine['load_before']}): the times say little",
            style="yellow",
        )
    for row in rows:
        if row.failure:
            if isinstance(row, NetworkRow):
                what = f"{row.network} batch {row.batch} at {row.density:.3f}"
            else:
                density = f" at {row.density:.3f}" if isinstance(row, Row) else ""
                what = f"{row.family} {row.layer} {row.mode}{density}"
            out.print(f"FAILED {what}: {row.failure}", style="red", markup=False)


CAPTIONS = {
    "plain": "the call with bool masks; compaction and the zeros included",
    "in-place": "out= on a cached output, ActiveSites shared; compaction, paid once for all layers, beside it",
    "backward": "forward, and the gradients of input and weight; compaction included",
}
