"""`python -m dynconv roofline`: what the published layers cannot be faster than, on this machine or on a data sheet's.

Nothing is run but, on this machine, a copy and a matrix product to measure its ceilings. With `--kernels` it is the
kernels of the calls, compiled for the device, and what they are predicted to take: see kernels.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict

import torch

from .. import _kernel_model
from ..roofline import DATA_SHEETS, Device, measure
from . import console, kernels, options, table
from .bench import BATCH, DENSITIES, DTYPES, MODES, WIDTH_BATCH
from .environment import environment, replacing, write_json
from .floors import estimate
from .layers import FILTERS, LAYERS, MASKS, Filter, Width, modes_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `roofline`."""
    parser.add_argument("--device", choices=("cpu", "cuda", *DATA_SHEETS), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--shapes", nargs="*", choices=(*LAYERS, *FILTERS), default=["resnet50"])
    parser.add_argument(
        "--layers",
        type=options.pattern,
        metavar="PATTERN",
        help="only the layers in whose family and name this regular expression is found, e.g. 3x3",
    )
    parser.add_argument(
        "--density", nargs="+", type=options.density, default=DENSITIES, metavar="D",
        help="of layers without published ones",
    )  # fmt: skip
    parser.add_argument("--masks", choices=tuple(MASKS), default="blob")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--json", type=options.output_file(), metavar="FILE")
    group = parser.add_argument_group("predictions of the kernels, which are compiled for the device")
    group.add_argument("--kernels", action="store_true", help="predict each kernel from its machine code")
    group.add_argument("--launches", choices=tuple(_kernel_model.LAUNCH), default="graph", help="how they are launched")
    group.add_argument("--batch", type=options.positive, metavar="N", help="of layers without a published one")
    group.add_argument("--measure", action="store_true", help="run them as well, on --device cuda")
    group.add_argument("--markdown", type=options.output_file(".md"), metavar="FILE", help="a page of the predictions")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse a device that is not here, and a filter that no layer passes."""
    options.check_device(parser, arguments.device)
    found = [layer for family in arguments.shapes for layer in _layers(family, arguments)]
    if arguments.shapes and not any(modes_of(layer, arguments.modes) for layer in found):
        parser.error(options.nothing_left(arguments))
    if not arguments.kernels:
        for name in ("measure", "markdown", "batch"):
            if getattr(arguments, name):
                parser.error(f"argument --{name}: expected --kernels beside it")
        return
    if arguments.device == "cpu":
        parser.error(f"argument --device: expected cuda or one of {', '.join(DATA_SHEETS)} with --kernels, got 'cpu'")
    if arguments.measure and arguments.device != "cuda":
        parser.error(f"argument --measure: expected --device cuda, got {arguments.device!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error(
            "argument --kernels: expected TRITON_INTERPRET unset, as interpreted kernels are not compiled, got 1"
        )
    if arguments.device == "cuda":
        try:
            _kernel_model.gpu_of(None)
        except ValueError as error:
            parser.error(f"argument --device: {error}")


def main(arguments: argparse.Namespace) -> int:
    """Print the ceilings and the floors, or the predictions."""
    if arguments.kernels:
        return _kernels(arguments)
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


def _kernels(arguments: argparse.Namespace) -> int:
    dtype = getattr(torch, arguments.dtype)
    device = None if arguments.device == "cuda" else arguments.device
    gpu = _kernel_model.gpu_of(device)
    on = next(name for name, known in _kernel_model.GPUS.items() if known is gpu)
    options = dict(device=device, on=on, launches=arguments.launches, measured=arguments.measure)
    found: list[kernels.Row] = []

    def save() -> None:
        if arguments.json:
            machine = environment("cuda") if device is None else {"device": gpu.name, "source": "data sheet"}
            rows = [row.record() for row in found]
            write_json(arguments.json, {"environment": machine, "gpu": asdict(gpu), "predictions": rows})

    for family in arguments.shapes:
        for layer, mask, batch in _masked(family, arguments, "cuda"):
            found.extend(kernels.rows(layer, mask, batch, dtype, tuple(arguments.modes), **options))
            save()  # as they come: a machine may be gone before the last
    kernels.show(found, console(), on, arguments.dtype)
    if arguments.markdown:
        words = ["python", "-m", "dynconv", "roofline", "--kernels"]
        for name in (
            "device",
            "dtype",
            "shapes",
            "layers",
            "density",
            "masks",
            "modes",
            "batch",
            "launches",
            "markdown",
        ):
            value = getattr(arguments, name)
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        with replacing(arguments.markdown) as partial:
            partial.write_text(kernels.markdown(found, on, arguments.launches, shlex.join(words)))
    return int(any(row.error for row in found))


def _layers(family: str, arguments: argparse.Namespace) -> list:
    published = (*LAYERS.get(family, ()), *FILTERS.get(family, ()))
    wanted = arguments.layers or ""
    return [layer for layer in published if re.search(wanted, f"{layer.family} {layer.name}")]


def _masked(family: str, arguments: argparse.Namespace, kind: str) -> Iterator[tuple]:
    """Each layer, with each of its masks, None for a `Filter`, and its batch on that kind of device."""
    for layer in _layers(family, arguments):
        if isinstance(layer, Filter):
            yield layer, None, layer.batch_on(kind)
            continue
        batch = layer.batch or arguments.batch or (WIDTH_BATCH if isinstance(layer, Width) else BATCH)[kind]
        generator = torch.Generator().manual_seed(0)
        for asked in layer.densities or arguments.density:
            yield layer, layer.active(asked, arguments.masks, batch, generator), batch


def _rows(family: str, arguments: argparse.Namespace, dtype: torch.dtype, on: Device) -> list[dict]:
    kind, rows = "cuda" if on.multiprocessors else "cpu", []
    for layer, mask, batch in _masked(family, arguments, kind):
        density = 1.0 if mask is None else mask.float().mean().item()
        found = {"family": layer.family, "layer": layer.name, "batch": batch, "density": density}
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
