"""`python -m dynconv roofline`: what the published layers cannot be faster than, on this machine or on a data sheet's.

Nothing is run but, on this machine, a copy and a matrix product to measure its ceilings.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from ..roofline import DATA_SHEETS, Device, measure
from . import console, options, table
from .bench import BATCH, DENSITIES, DTYPES, MODES, WIDTH_BATCH
from .environment import environment, write_json
from .floors import estimate
from .layers import FILTERS, LAYERS, MASKS, Filter, Width, modes_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `roofline`."""
    parser.add_argument("--device", choices=("cpu", "cuda", *DATA_SHEETS), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--shapes", nargs="*", choices=(*LAYERS, *FILTERS), default=["resnet50"])
    parser.add_argument("--layers", metavar="TEXT", help="only the layers whose name contains this, e.g. 3x3")
    parser.add_argument(
        "--density", nargs="+", type=options.density, default=DENSITIES, metavar="D",
        help="of layers without published ones",
    )  # fmt: skip
    parser.add_argument("--masks", choices=tuple(MASKS), default="blob")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--json", type=options.output_file(), metavar="FILE")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse a device that is not here, and a filter that no layer passes."""
    options.check_device(parser, arguments.device)
    found = [layer for family in arguments.shapes for layer in _layers(family, arguments)]
    if arguments.shapes and not any(modes_of(layer, arguments.modes) for layer in found):
        parser.error(options.nothing_left(arguments))


def main(arguments: argparse.Namespace) -> int:
    """Print the ceilings and the floors."""
    dtype = getattr(torch, arguments.dtype)
    is_here = arguments.device in ("cpu", "cuda")
    # All types at once on a GPU, where it takes no time: this is what records them.
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16) if arguments.device == "cuda" else (dtype,)
    on = measure(arguments.device, dtypes) if is_here else DATA_SHEETS[arguments.device]
    rows = [row for family in arguments.shapes for row in _rows(family, arguments, dtype, on)]
    _print(rows, on, arguments)
    if arguments.json:
        machine = environment(arguments.device) if is_here else {"device": on.name, "source": "data sheet"}
        write_json(arguments.json, {"environment": machine, "ceilings": on.record(), "rows": rows})
    return 0


def _layers(family: str, arguments: argparse.Namespace) -> list:
    published = (*LAYERS.get(family, ()), *FILTERS.get(family, ()))
    return [layer for layer in published if not arguments.layers or arguments.layers in layer.name]


def _rows(family: str, arguments: argparse.Namespace, dtype: torch.dtype, on: Device) -> list[dict]:
    kind, rows = "cuda" if on.multiprocessors else "cpu", []
    for layer in _layers(family, arguments):
        named = {"family": layer.family, "layer": layer.name}
        if isinstance(layer, Filter):
            found = named | {"batch": layer.batch_on(kind), "density": 1.0}
            for mode in modes_of(layer, arguments.modes):
                made = estimate(layer, None, mode, found["batch"], dtype, on)
                rows.append(found | {"mode": mode} | asdict(made))
            continue
        batch = layer.batch or (WIDTH_BATCH if isinstance(layer, Width) else BATCH)[kind]
        generator = torch.Generator().manual_seed(0)
        for asked in layer.densities or arguments.density:
            mask = layer.active(asked, arguments.masks, batch, generator)
            found = named | {"batch": batch, "density": mask.float().mean().item()}
            for mode in modes_of(layer, arguments.modes):
                rows.append(found | {"mode": mode} | asdict(estimate(layer, mask, mode, batch, dtype, on)))
    return rows


def _print(rows: list[dict], on: Device, arguments: argparse.Namespace) -> None:
    out = console()
    source = lambda name: "measured" if name in on.measured else "data sheet"
    out.print(f"{on.name}: {on.copy / 1e9:,.1f} GB/s read and written by a copy ({source('copy')})")
    for what, rates in (("products", on.products), ("arithmetic", on.arithmetic)):
        text = ", ".join(f"{name} {rate / 1e12:,.3g}" for name, rate in rates.items())
        if text:
            out.print(f"{what}, TFLOP/s: {text} ({source(what)})")
    shown = table(
        f"\nfloors, {arguments.dtype}",
        "<family|<layer|batch|density|<mode|GFLOP|MB|floor ms|<set by|tiles filled|waves|predicted",
        "floor: the least time at these ceilings. tiles filled, waves: the parts of the forward's tiles, and of their "
        "waves, that are asked for. predicted: the share of what the FLOPs allow that bytes and tiles leave",
    )
    for row in rows:
        tiles = row["tiles"]
        shown.add_row(
            row["family"], row["layer"], str(row["batch"]), f"{row['density']:.3f}", row["mode"],
            f"{row['flops'] / 1e9:.3f}", f"{row['bytes'] / 1e6:.2f}", f"{row['floor_ms']:.4f}", row["limit"],
            f"{tiles[0]:.0%}", f"{tiles[1]:.0%}", "" if row["predicted"] is None else f"{row['predicted']:.0%}",
        )  # fmt: skip
    if rows:
        out.print(shown)
