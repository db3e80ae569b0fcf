"""Whole networks for `bench`: each layer runs once in a forward pass, as users run it, dense and masked passes in turn.

A layer in a loop finds its operands, and Python's own code, in the cache, and comes out faster than in a network. So
every block is timed where it stands, within passes of the whole network, and the network as their sum.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

import dynconv

from .._timing import LEAST_SAMPLES, Timing
from ..nn.blocks import MaskedBlock
from ..nn.recognition import Chain, Stage
from ..ops._common import activate_
from . import console, table
from .bounds import Arithmetic, BoundedChain, Link, Verdict, arithmetic, judge, worst_of
from .layers import MASKS

DENSITIES = (1.0, 0.75, 0.5, 0.25)
BATCHES = (1, 4)
SIZE = 224
# A block or layer of at least so many milliseconds may take 1 / SHARE of the dense time, a smaller one so much more.
LARGE_MS, SHARE, MORE_MS = 1.0, 0.97, 0.05


class Block(MaskedBlock):
    """A residual block with its normalisation folded into its convolutions: masked, or dense at a user's best."""

    def __init__(self, convolutions: Sequence[nn.Conv2d], activations, shortcut: str | nn.Conv2d | None, last) -> None:
        path = "downsample" if isinstance(shortcut, nn.Conv2d) else shortcut
        stages = tuple(Stage(f"conv{i}", None, activation) for i, activation in enumerate(activations))
        super().__init__(Chain(stages, path, last), "active")
        for number, conv in enumerate(convolutions):
            self.add_module(f"conv{number}", conv)
        if path == "downsample":
            self.downsample = shortcut
        first, final = convolutions[0], convolutions[-1]
        self.name = f"{first.in_channels}->{final.out_channels} in {len(convolutions)} layers"

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        return [self.get_submodule(stage.conv) for stage in self.stages]

    def dense(self, input: Tensor) -> Tensor:
        """What a user of PyTorch runs in inference: folded, activations and shortcut in place."""
        value = input
        for stage in self.stages:
            value = activate_(self._submodule(stage.conv)(value), stage.activation)
        if self.shortcut_path is None:
            return value
        return activate_(value.add_(self._dense_shortcut(input)), self.last_activation)


class Network(nn.Module):
    """A stem, blocks and a classifier. Its forward is the dense one, for torch.compile."""

    def __init__(self, stem: nn.Module, blocks: Sequence[Block], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, input: Tensor) -> Tensor:
        value = self.stem(input)
        for block in self.blocks:
            value = block.dense(value)
        return self.head(value)


def _conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, 1, groups)


def _bottleneck(cin: int, inner: int, cout: int, stride: int, groups: int) -> Block:
    """1x1, 3x3 and 1x1 with ReLU: of ResNet, and of RegNet without squeeze-and-excitation."""
    layers = [_conv(cin, inner, 1), _conv(inner, inner, 3, stride, groups), _conv(inner, cout, 1)]
    shortcut = "identity" if stride == 1 and cin == cout else _conv(cin, cout, 1, stride)
    return Block(layers, ("relu", "relu", None), shortcut, "relu")


def _inverted(cin: int, cout: int, stride: int, expansion: int) -> Block:
    inner = cin * expansion
    layers = [_conv(cin, inner, 1)] * (expansion > 1)
    layers += [_conv(inner, inner, 3, stride, inner), _conv(inner, cout, 1)]
    activations = ["relu6"] * (len(layers) - 1) + [None]
    return Block(layers, activations, "identity" if stride == 1 and cin == cout else None, None)


def _head(channels: int, *before: nn.Module) -> nn.Sequential:
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def _resnet50() -> Network:
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    blocks, cin = [], 64
    for number, (depth, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for i in range(depth):
            blocks.append(_bottleneck(cin, width, 4 * width, 2 if i == 0 and number else 1, 1))
            cin = 4 * width
    return Network(stem, blocks, _head(cin))


def _mobilenetv2() -> Network:
    stem = nn.Sequential(_conv(3, 32, 3, 2), nn.ReLU6(inplace=True))
    blocks, cin = [], 32
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, cout, depth, stride in settings:
        for i in range(depth):
            blocks.append(_inverted(cin, cout, stride if i == 0 else 1, expansion))
            cin = cout
    return Network(stem, blocks, _head(1280, _conv(cin, 1280, 1), nn.ReLU6(inplace=True)))


def _regnet_800mf() -> Network:
    stem = nn.Sequential(_conv(3, 32, 3, 2), nn.ReLU(inplace=True))
    blocks, cin = [], 32
    for depth, width in ((1, 64), (3, 144), (8, 320), (2, 784)):
        for i in range(depth):
            blocks.append(_bottleneck(cin, width, width, 2 if i == 0 else 1, width // 16))
            cin = width
    return Network(stem, blocks, _head(cin))


def _tiny() -> Network:
    """Of no use but to see that everything runs: a block of each kind."""
    stem = nn.Sequential(_conv(3, 8, 3, 8), nn.ReLU(inplace=True))
    return Network(stem, [_bottleneck(8, 16, 16, 2, 2), _inverted(16, 16, 1, 2), _inverted(16, 24, 2, 2)], _head(24))


# RegNetY-800MF has squeeze-and-excitation between its 3x3 and its last layer, which looks at all pixels and has no
# sparse form: it is left out of both sides.
NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet50": _resnet50,
    "mobilenetv2": _mobilenetv2,
    "regnety-800mf without se": _regnet_800mf,
    "tiny": _tiny,
}


def make(name: str) -> Network:
    """A network with random parameters, of which each layer keeps the size of the values; frozen on every side."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    return dynconv.prepare(network.to(memory_format=torch.channels_last).eval().requires_grad_(False))


@dataclass
class NetworkRow:
    """A network at one density of its masked blocks. Milliseconds of a forward pass; None where it was wrong."""

    network: str
    batch: int
    asked: float
    density: float  # of all sites of the masked blocks
    check: Verdict
    masked: int  # blocks, of `blocks`
    blocks: int
    failure: str | None = None
    dense: Timing | None = None
    compiled: Timing | None = None
    compile_seconds: float | None = None
    no_compiler: str | None = None  # why there is no `compiled`
    sparse: Timing | None = None
    automatic: Timing | None = None

    def record(self) -> dict:
        """For JSON."""
        sides = {"ratio": "automatic", "sparse_ratio": "sparse", "compiled_ratio": "compiled"}
        times = {name: getattr(self, side) for name, side in sides.items()}
        return asdict(self) | {n: None if t is None else self.dense.median / t.median for n, t in times.items()}


@dataclass
class LayerRow:
    """A block, or a layer of one, within the passes of a network, by execution("automatic")."""

    network: str
    batch: int
    kind: str  # "block", or "layer" where each convolution is masked by itself
    place: int  # in the network
    layer: str
    asked: float
    dense: Timing
    again: Timing  # dense as well, in passes of its own
    automatic: Timing
    path: str  # "dense" or "sparse"

    @property
    def ratio(self) -> float:
        """How many times faster than dense, by the medians."""
        return self.dense.median / self.automatic.median

    @property
    def is_below_bar(self) -> bool:
        return _is_below_bar(self.dense, self.automatic)

    @property
    def is_noise(self) -> bool:
        """Whether dense itself is below the bar, measured once more."""
        return _is_below_bar(self.dense, self.again)

    def record(self) -> dict:
        """For JSON."""
        return asdict(self) | {"ratio": self.ratio, "is_below_bar": self.is_below_bar, "is_noise": self.is_noise}


def _is_below_bar(dense: Timing, other: Timing) -> bool:
    """Below SHARE of dense's speed, or more than MORE_MS slower where dense takes less than LARGE_MS."""
    if dense.median >= LARGE_MS:
        return dense.median / other.median < SHARE
    return other.median - dense.median > MORE_MS


@dataclass
class Unit:
    """A step of a pass: the dense function and, where it is masked, the masked one, of (value, shortcut)."""

    name: str
    kind: str | None  # "block", "layer", or None for what is dense in both networks
    dense: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    masked: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]] | None = None
    chain: Callable[[Tensor, Tensor | None, Arithmetic], tuple] | None = None  # -> (Bounded, the skipped sites' values)
    mask_shape: tuple[int, int, int] | None = None
    masks: dict[float, Tensor] = field(default_factory=dict)


def _links(block: Block, numbers: Sequence[int]) -> list[Link]:
    found = []
    for number in numbers:
        conv, activation = block.convolutions[number], block.stages[number].activation
        found.append(Link(conv.weight, conv.bias, (conv.stride, conv.padding, conv.dilation, conv.groups), activation))
    return found


def _block_unit(block: Block, name: str) -> Unit:
    if block.shortcut_path is None:  # DynConv leaves these dense: nothing takes the place of what is skipped
        return Unit(name, None, lambda value, _: (block.dense(value), None))

    def chain(value: Tensor, _, rules: Arithmetic) -> tuple:
        shortcut, links = block._dense_shortcut(value), _links(block, range(len(block.stages)))
        return BoundedChain(rules, links, value, block.last_activation, shortcut=shortcut).output, shortcut

    return Unit(
        name,
        "block",
        lambda value, _: (block.dense(value), None),
        lambda value, _, mask: (block(value, mask), None),
        chain,
    )


def _layer_units(block: Block, name: str) -> Iterator[Unit]:
    """The convolutions of a block, each masked by itself, for a network that is converted layer by layer."""
    if block.shortcut_path is not None:
        yield Unit(f"{name} shortcut", None, lambda value, _: (value, block._dense_shortcut(value)))
    last = len(block.stages) - 1
    for number, (conv, stage) in enumerate(zip(block.convolutions, block.stages, strict=True)):
        joins = number == last and block.shortcut_path is not None
        activation = block.last_activation if joins else stage.activation
        layer = f"{conv.in_channels}->{conv.out_channels} {conv.kernel_size[0]}x{conv.kernel_size[1]}"
        if conv.groups > 1:
            layer = f"{conv.in_channels} {conv.kernel_size[0]}x{conv.kernel_size[1]} in {conv.groups} groups"
        layer += " stride 2" * (conv.stride == (2, 2))

        def dense(value, shortcut, conv=conv, activation=activation, joins=joins):
            value = conv(value)
            return activate_(value.add_(shortcut) if joins else value, activation), shortcut

        def masked(value, shortcut, mask, conv=conv, activation=activation, joins=joins):
            others = dict(residual=shortcut, inactive=shortcut) if joins else {}
            where = (conv.stride, conv.padding, conv.dilation, conv.groups)
            made = dynconv.masked_conv2d(
                value, conv.weight, conv.bias, *where, mask=mask, activation=activation, **others
            )
            return made, shortcut

        def chain(value, shortcut, rules, number=number, activation=activation, joins=joins):
            skipped = shortcut if joins else None
            made = BoundedChain(rules, _links(block, [number]), value, activation, shortcut=skipped).output
            return made, 0 if skipped is None else skipped

        yield Unit(layer, "layer", dense, masked, chain)


class NetworkBench:
    """A network of blocks, or of layers, its masks at each density, and passes with a clock on every unit."""

    def __init__(self, name: str, batch: int, densities: Sequence[float], masks: str, size: int = SIZE) -> None:
        self.network, self.batch, self.densities = make(name), batch, sorted(densities)
        generator = torch.Generator().manual_seed(0)
        self.input = torch.randn(batch, 3, size, size, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        network = self.network
        ends = [
            Unit(end, None, lambda value, _, f=f: (f(value), None))
            for end, f in (("stem", network.stem), ("head", network.head))
        ]
        self.units: dict[str, list[Unit]] = {"block": [ends[0]], "layer": [ends[0]]}
        value = network.stem(self.input)
        for number, block in enumerate(network.blocks):
            place = f"{value.shape[2]}x{value.shape[3]} {block.name}"
            self.units["block"].append(_block_unit(block, place))
            self.units["layer"] += _layer_units(block, f"{number} {place}")
            value = block.dense(value)
        for units in self.units.values():
            units.append(ends[1])
            value, shortcut = self.input, None
            for unit in units:
                before = value.shape[2:]
                value, shortcut = unit.dense(value, shortcut)
                if unit.kind == "layer":
                    unit.name = f"{before[0]}x{before[1]} {unit.name}"
                if unit.masked is not None:
                    shape = (batch, *value.shape[2:])
                    unit.masks = {d: MASKS[masks](*shape, d, generator) for d in self.densities}

    def masked(self, kind: str) -> list[Unit]:
        """The units that are masked."""
        return [unit for unit in self.units[kind] if unit.masked is not None]

    def density(self, asked: float) -> float:
        """Of all sites of the masked blocks."""
        masks = [unit.masks[asked] for unit in self.masked("block")]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def run(self, kind: str, density: float | None) -> list[float]:
        """A forward pass, dense without a density: the milliseconds of each unit. ActiveSites are made in it."""
        value, shortcut, times = self.input, None, []
        for unit in self.units[kind]:
            begin = time.perf_counter()
            if density is None or unit.masked is None:
                value, shortcut = unit.dense(value, shortcut)
            else:
                value, shortcut = unit.masked(value, shortcut, unit.masks[density])
            times.append((time.perf_counter() - begin) * 1e3)
        return times

    def check(self, kind: str, modes: Sequence[str]) -> dict[tuple[str, float], Verdict]:
        """(mode, density) -> the worst verdict of all masked units, each on the dense network's features."""
        rules, found = arithmetic(torch.float32, "cpu"), {}
        value, shortcut = self.input, None
        for unit in self.units[kind]:
            if unit.masked is not None:
                bounded, skipped = unit.chain(value, shortcut, rules)
                for density, mask in unit.masks.items():
                    expected = torch.where(mask, bounded.value, skipped)
                    bound = torch.where(mask, bounded.error, 0)
                    for mode in modes:
                        with dynconv.execution(mode):
                            verdict = judge(unit.masked(value, shortcut, mask)[0], expected, bound)
                        found.setdefault((mode, density), []).append(verdict)
            value, shortcut = unit.dense(value, shortcut)
        return {way: worst_of(verdicts) for way, verdicts in found.items()}

    def paths(self, kind: str, density: float) -> list[str]:
        """How the automatic mode runs each masked unit."""
        with dynconv.execution("automatic"), dynconv.explain() as explanation:
            self.run(kind, density)
        return [decision.path for decision in explanation.decisions]

    def compile(self) -> tuple[Callable[[], Tensor] | None, float | None, str | None]:
        """(the dense network compiled with frozen parameters, the seconds that took, or why there is none)."""
        from torch._inductor import config

        torch._dynamo.reset()
        expected, begin = self.network(self.input), time.perf_counter()
        try:
            with config.patch(freezing=True):
                made = torch.compile(self.network, dynamic=False)
                actual = made(self.input)
        except Exception as error:
            return None, None, f"torch.compile does not work here: {type(error).__name__}"
        seconds = time.perf_counter() - begin
        if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
            return None, seconds, "torch.compile gives another result"
        return lambda: made(self.input), seconds, None


def _passes(calls: dict, repeats: int, seconds: float) -> dict[tuple, list[list[float]]]:
    """The units' times in passes of each call, one of every call in turn, in any order."""
    for call in calls.values():
        call()
    samples, order, names = {name: [] for name in calls}, random.Random(0), list(calls)
    end = time.perf_counter() + seconds
    for turn in range(repeats):
        for name in order.sample(names, len(names)):
            samples[name].append(calls[name]())
        if turn + 1 >= LEAST_SAMPLES and time.perf_counter() > end:
            break
    return samples


def _totals(passes: list[list[float]]) -> Timing:
    return Timing.of([sum(times) for times in passes])


def measure_network(
    name: str,
    batch: int,
    densities: Sequence[float] = DENSITIES,
    *,
    masks: str = "blob",
    repeats: int = 25,
    seconds: float = 16.0,
    calibration_seconds: float = 0.1,
    size: int = SIZE,
    compiled: bool = True,
) -> tuple[list[NetworkRow], list[LayerRow]]:
    """Check and time a network: a row for each density, and a row for each of its blocks and layers at each.

    `seconds` is for the passes over blocks, and again for those over layers; dense ones are run twice in each turn.
    """
    rows, layers = [], []
    with torch.no_grad():
        bench = NetworkBench(name, batch, densities, masks, size)
        middle = bench.densities[len(bench.densities) // 2]

        def both() -> None:
            bench.run("block", middle)
            bench.run("layer", middle)

        dynconv.calibrate(both, store=False, seconds=calibration_seconds)
        verdicts = bench.check("block", ("sparse", "automatic"))
        layer_verdicts = bench.check("layer", ("automatic",))
        made, compile_seconds, no_compiler = bench.compile() if compiled else (None, None, "not asked for")

        def masked(kind: str, mode: str, density: float) -> Callable[[], list[float]]:
            def call() -> list[float]:
                with dynconv.execution(mode):
                    return bench.run(kind, density)

            return call

        def timed_compiled() -> list[float]:
            begin = time.perf_counter()
            made()
            return [(time.perf_counter() - begin) * 1e3]

        calls = {("dense", turn): lambda: bench.run("block", None) for turn in (0, 1)}
        if made is not None:
            calls["compiled", None] = timed_compiled
        calls |= {way: masked("block", *way) for way, verdict in verdicts.items() if verdict.passed}
        passes = _passes(calls, repeats, seconds)
        calls = {("dense", turn): lambda: bench.run("layer", None) for turn in (0, 1)}
        calls |= {way: masked("layer", *way) for way, verdict in layer_verdicts.items() if verdict.passed}
        layer_passes = _passes(calls, repeats, seconds)
        for density in reversed(bench.densities):
            of_all = [verdicts[mode, density] for mode in ("sparse", "automatic")] + [
                layer_verdicts["automatic", density]
            ]
            verdict = worst_of(of_all)
            row = NetworkRow(
                name, batch, density, bench.density(density), verdict, len(bench.masked("block")),
                len(bench.network.blocks), None if verdict.passed else f"wrong result: {verdict}",
                compile_seconds=compile_seconds, no_compiler=no_compiler,
            )  # fmt: skip
            rows.append(row)
            if row.failure:
                continue
            row.dense = _totals(passes["dense", 0])
            row.compiled = _totals(passes["compiled", None]) if made is not None else None
            row.sparse, row.automatic = (_totals(passes[mode, density]) for mode in ("sparse", "automatic"))
            for kind, found in (("block", passes), ("layer", layer_passes)):
                layers += _layer_rows(name, bench, kind, density, found)
    return rows, layers


def _layer_rows(name: str, bench: NetworkBench, kind: str, density: float, passes: dict) -> Iterator[LayerRow]:
    paths = iter(bench.paths(kind, density))
    for place, unit in enumerate(bench.units[kind]):
        if unit.masked is None:
            continue
        of = (("dense", 0), ("dense", 1), ("automatic", density))
        times = [Timing.of([times[place] for times in passes[way]]) for way in of]
        yield LayerRow(name, bench.batch, kind, place, unit.name, density, *times, next(paths))


def summarise_networks(layers: Sequence[LayerRow]) -> dict:
    """How many blocks and layers are below the bar, as plain data for JSON."""
    below = [row for row in layers if row.is_below_bar]
    return {
        "bar": f"{SHARE}x dense, or {MORE_MS} ms more where dense takes less than {LARGE_MS:g} ms",
        "rows": len(layers),
        "below": len(below),
        "noise": sum(row.is_noise for row in layers),
        "worst_large": min((row.ratio for row in layers if row.dense.median >= LARGE_MS), default=None),
        "worst_small_ms": max(
            (row.automatic.median - row.dense.median for row in layers if row.dense.median < LARGE_MS), default=None
        ),
    }


def print_networks(rows: Sequence[NetworkRow], layers: Sequence[LayerRow], summary: dict) -> None:
    """Whole networks first, then what the bar says about their blocks and layers."""
    out = console()
    shown = table(
        "\nnetworks: forward passes, every layer once in each; a mask of its own for every block, compaction included",
        "<network|batch|density|dense ms [20-80 %]|compiled ms|sparse ms [20-80 %]|automatic ms [20-80 %]|sparse|"
        "automatic|to compiled|compile s|masked blocks",
        "dense: eager, channels_last, normalisation folded, in place; compiled: the same by torch.compile with frozen "
        "parameters; ratios are times faster than dense, `to compiled`: automatic than compiled. Stem, classifier and "
        "blocks without a shortcut are dense on every side",
    )
    for row in rows:
        cells = [row.network, str(row.batch), f"{row.density:.2f}"]
        if row.failure:
            shown.add_row(*cells, "[red]FAILED", "see below")
            continue
        compiled = [f"{row.compiled.median:.1f}"] if row.compiled else [row.no_compiler]
        cells += [str(row.dense), *compiled, str(row.sparse), str(row.automatic)]
        cells += [f"{row.dense.median / timing.median:.2f}x" for timing in (row.sparse, row.automatic)]
        cells.append(f"{row.compiled.median / row.automatic.median:.2f}x" if row.compiled else "")
        cells.append("" if row.compile_seconds is None else f"{row.compile_seconds:.0f}")
        shown.add_row(*cells, f"{row.masked} of {row.blocks}")
    out.print(shown)
    below = sorted((row for row in layers if row.is_below_bar), key=lambda row: row.ratio)
    if below:
        listed = table(
            "\nblocks and layers below the bar, slowest first",
            "<network|batch|<kind|<layer|density|dense ms [20-80 %]|automatic ms [20-80 %]|ratio|<way",
        )
        for row in below[:20]:
            listed.add_row(
                row.network, str(row.batch), row.kind, row.layer, f"{row.asked:g}", str(row.dense), str(row.automatic),
                f"{row.ratio:.2f}x", row.path,
            )  # fmt: skip
        out.print(listed)
    out.print(
        f"blocks and layers below the bar ({summary['bar']}): {summary['below']} of {summary['rows']}; dense itself, "
        f"measured once more: {summary['noise']}"
    )
