"""Time the tiles beside those that a kernel's table has, layer by layer, and write down the best of each.

    python benchmarks/sweep.py --device cuda --dtype bfloat16 --shapes resnet50 laudnet involution --json sweep.json

Every number of a tile is halved and doubled by itself (stages: one more, one less), then what was faster is combined.
A tile whose result differs from the table's, or that the device has no room for, is left out, with its reason.
"backward" times forward and all gradients, of which the kernel named is a part. The file is written after each row, and
no layer begins after `--limit` seconds.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import dynconv
from dynconv._backend import module
from dynconv._timing import take_turns
from dynconv.cli import console, options, table
from dynconv.cli.bench import BATCH, WIDTH_BATCH, prepare
from dynconv.cli.environment import environment, write_json
from dynconv.cli.filters import FilterBench
from dynconv.cli.layers import FILTERS, LAYERS, Block, Filter, Layer, Width

VARIED = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "num_warps", "num_stages")
# Relative to the largest element of the result: another tile adds up in another order, and half types round.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def tables(layer: Layer | Width | Filter) -> dict[str, tuple[str, str]]:
    """mode -> (kernel module, the function with its tiles) of a layer."""
    if isinstance(layer, Filter):
        if layer.offsets:
            return {"plain": ("deform", "aggregate_config")}
        return {"plain": ("dynamic_filter", "config"), "backward": ("dynamic_filter", "filter_grad_config")}
    name = "gathered_conv" if isinstance(layer, Width) else "masked_conv"
    if isinstance(layer, Layer) and layer.groups == layer.in_channels > 1:
        name = "depthwise"
    return {"plain": (name, "config"), "backward": (name, "weight_grad_config")}


def calls(layer: Layer | Width | Filter, density: float, batch: int, dtype: torch.dtype, device: str) -> dict:
    """mode -> call of an input set's number."""
    if isinstance(layer, Filter):
        bench = FilterBench(layer, batch, dtype, device)
        return {mode: bench.calls(mode)["dynconv"] for mode in ("plain", "backward")} | {"sets": bench.sets}
    bench, _ = prepare(layer, batch, dtype, device)
    mask = layer.active(density, "blob", batch, bench.generator).to(device)
    shared = bench.compact(mask)  # the sites or channels: made once, the kernel alone is timed

    def plain(number: int) -> Tensor:
        with torch.no_grad():
            return bench.sparse(number, shared)

    backward = lambda number: bench.gradients(bench.sparse, number, shared)
    return {"plain": plain, "backward": backward, "sets": bench.sets}


def neighbours(tile: dict) -> Iterator[dict]:
    """The changes to try."""
    for key in (key for key in VARIED if key in tile):
        if key == "num_stages":
            yield from ({key: value} for value in (tile[key] - 1, tile[key] + 1) if value > 0)
        else:
            yield from ({key: value} for value in (tile[key] // 2, tile[key] * 2) if value > 0)


def sweep(call: Callable[[int], object], where: tuple[str, str], sets: int, arguments: argparse.Namespace) -> dict:
    """The times of a call with the table's tile and its neighbours, and the best of them."""
    kernels, tile = module(f".kernels.{where[0]}"), {}
    original = getattr(kernels, where[1])

    def remember(*options, **named):
        tile.update(original(*options, **named))
        return dict(tile)

    with mock.patch.object(kernels, where[1], remember):
        expected = _tensors(call(0))
    changes, refused, timed = list(neighbours(tile))[: arguments.most], {}, {"table": {}}

    def changed(change: dict) -> Callable[[int], object]:
        patched = lambda *options, **named: original(*options, **named) | change

        def run(number: int) -> object:
            with mock.patch.object(kernels, where[1], patched):
                return call(number)

        return run

    def try_out(change: dict) -> None:
        name = " ".join(f"{key}={value}" for key, value in change.items())
        try:
            worst = max(_difference(*pair) for pair in zip(_tensors(changed(change)(0)), expected, strict=True))
        except Exception as error:  # no room for it, or nothing that Triton compiles
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            return
        if worst > TOLERANCE[arguments.dtype_]:
            refused[name] = f"wrong result: {worst:.2g} of the largest element"
        else:
            timed[name] = change

    for change in changes:
        try_out(change)
    ratios = _ratios(timed, changed, sets, arguments)
    best_of_key: dict[str, str] = {}
    for name in sorted((name for name in timed if ratios[name] > 1.01), key=lambda name: -ratios[name]):
        best_of_key.setdefault(next(iter(timed[name])), name)
    if len(best_of_key) > 1:
        before = set(timed)
        try_out({key: value for name in best_of_key.values() for key, value in timed[name].items()})
        for name in set(timed) - before:
            ratios |= _ratios({"table": {}, name: timed[name]}, changed, sets, arguments)
    # A noisy hundredth is not worth a row of its own in a table.
    best = max((name for name in timed if ratios[name] > 1.01), key=lambda name: ratios[name], default="table")
    return {
        "tile": tile, "best": tile | timed[best], "change": timed[best], "ratio": ratios[best], "ratios": ratios,
        "refused": refused,
    }  # fmt: skip


def _ratios(timed: dict, changed: Callable, sets: int, arguments: argparse.Namespace) -> dict[str, float]:
    """How many times faster than the table's tile each is, in one run: times of two are not to be compared."""
    runs = {name: changed(change) for name, change in timed.items()}
    taken = take_turns(runs, arguments.device, arguments.repeats, 2.0, sets)
    return {name: taken["table"].median / timing.median for name, timing in taken.items()}


def _tensors(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _difference(actual: Tensor, expected: Tensor) -> float:
    largest = expected.abs().max().item() if expected.numel() else 0.0
    worst = (actual - expected).abs().max().item() if expected.numel() else 0.0
    return math.inf if math.isnan(worst) else worst / max(largest, 1e-30)


def main() -> int:
    """Sweep the layers; 1 if any of them failed as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=(*LAYERS, *FILTERS), default=["resnet50"])
    parser.add_argument("--layers", default="", help="only the layers whose name contains this")
    parser.add_argument("--density", type=options.density, default=0.25)
    parser.add_argument("--batch", type=options.positive)
    parser.add_argument("--repeats", type=options.positive, default=15)
    parser.add_argument("--one", action="store_true", help="only the first layer of each of the shapes")
    parser.add_argument("--most", type=options.positive, help="changes to try for each kernel at most")
    parser.add_argument("--limit", type=options.limit, default=math.inf, help="seconds after which no layer begins")
    parser.add_argument("--json", type=options.output_file(), metavar="FILE")
    arguments = parser.parse_args()
    options.check_device(parser, arguments.device)
    arguments.dtype_ = getattr(torch, arguments.dtype)
    layers = []
    for family in arguments.shapes:
        found = [
            layer
            for layer in (*LAYERS.get(family, ()), *FILTERS.get(family, ()))
            if arguments.layers in layer.name and not isinstance(layer, Block) and not getattr(layer, "linear", False)
        ]
        layers += found[:1] if arguments.one else found
    if not layers:
        where = " ".join(arguments.shapes)
        parser.error(
            f"argument --layers: expected a part of a layer's name in --shapes {where}, got {arguments.layers!r}"
        )
    record = {"environment": environment(arguments.device), "dtype": arguments.dtype, "density": arguments.density}
    rows, left_out, begin = [], [], time.perf_counter()

    def save_so_far() -> None:
        if arguments.json:
            write_json(arguments.json, record | {"rows": rows, "left_out": left_out})

    with dynconv.backend("triton"), dynconv.execution("sparse"):
        for layer in layers:
            named = {"family": layer.family, "layer": layer.name}
            if time.perf_counter() - begin > arguments.limit:
                left_out.append(named)
                continue
            usual = WIDTH_BATCH if isinstance(layer, Width) else BATCH
            batch = arguments.batch or layer.batch or usual[arguments.device]
            named["batch"], made = batch, None
            for mode, where in tables(layer).items():
                row = named | {"mode": mode, "kernel": ".".join(where)}
                try:
                    made = made or calls(layer, arguments.density, batch, arguments.dtype_, arguments.device)
                    rows.append(row | sweep(made[mode], where, made["sets"], arguments))
                except Exception as error:
                    rows.append(row | {"failure": f"{type(error).__name__}: {error}"})
                save_so_far()
    save_so_far()
    _print(rows, left_out)
    return 1 if any("failure" in row for row in rows) else 0


def _print(rows: list[dict], left_out: list[dict]) -> None:
    out = console()
    shown = table("tiles", "<family|<layer|<mode|<kernel|best to table|<the best is the table's but for")
    for row in rows:
        cells = [row["family"], row["layer"], row["mode"], row["kernel"]]
        if "failure" in row:
            shown.add_row(*cells, "[red]FAILED", row["failure"][:60])
            continue
        change = " ".join(f"{key}={value}" for key, value in row["change"].items())
        shown.add_row(*cells, f"{row['ratio']:.2f}x", change or "nothing")
    out.print(shown)
    if left_out:
        out.print(f"no time for {len(left_out)} layers: {', '.join(row['layer'] for row in left_out)}")


if __name__ == "__main__":
    raise SystemExit(main())
