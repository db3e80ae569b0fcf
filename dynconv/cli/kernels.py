"""`python -m dynconv roofline --kernels`: what the published layers' kernels are predicted to take on a GPU.

Nothing of a prediction is a measurement. With `--measure`, on a GPU, the times of the same kernels stand beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import dynconv

from .. import roofline
from ..roofline import DATA_SHEETS, Compared, Predictions
from . import table
from .blocks import make
from .floors import estimate
from .layers import Block, Filter, Layer, Width, modes_of

PAGE = """# What the kernels are predicted to take

**Predictions, no measurement.** No GPU has given a figure of this page. Each time follows from a kernel as Triton
{triton} compiles it for the GPU: its instructions, registers, shared memory, loops and what they read and write, and
from the data sheet of an {device}; see `dynconv.roofline.predict`. The model leans to the fast side: it leaves out bank
conflicts, what warps wait for each other at barriers, and clocks below boost. Launches are those of a CUDA graph,
{launch:.1f} us each; dense is cuDNN at {share:.0%} of the data sheet's matrix rate, or a copy at {copy:.0%} of its
bandwidth. A GPU says how far this is off:
`python -m dynconv roofline --kernels --device cuda --measure`.

Made by

    {command}

- *us*: predicted; *floor*: FLOPs and fewest bytes at the data sheet's ceilings, and *of it*: the part of the prediction
  that the floor is. *gain*: dense over predicted; *ideal*: what the products allow.
- *binds*: what takes longest in a kernel. "issue": the instructions, of the unit that is named; "tensor", "shared",
  "L2", "bytes": tensor cores, shared memory with L1, L2, memory; "latency": one warp alone, a wave of programs after
  the other; "idle": programs that return at once; "launch".
- *programs*: those with work, of the grid; *held*: by a multiprocessor at a time; *steps*: of the longest loop, *a
  step*: its instructions of a warp and its barriers.

"""


@dataclass(frozen=True)
class Row:
    """A layer's call: its prediction and what it is compared with, in seconds; `compared` where it was measured."""

    family: str
    layer: str
    batch: int
    density: float
    mode: str
    predictions: Predictions
    floor: float
    dense: float | None
    ideal: float | None
    compared: tuple[Compared, ...] = ()
    error: str = ""  # why it could not be measured

    @property
    def gain(self) -> float | None:
        """Of the dense call's predicted time, how many times this one."""
        return None if self.dense is None else self.dense / self.predictions.seconds

    def record(self) -> dict:
        """For JSON."""
        named = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("predictions", "compared")
        }
        kernels = [kernel.record() for kernel in self.predictions.kernels]
        compared = [dataclasses.asdict(one) | {"ratio": one.ratio} for one in self.compared]
        return named | {
            "seconds": self.predictions.seconds,
            "gain": self.gain,
            "kernels": kernels,
            "compared": compared,
        }


def modes(layer: Layer | Block | Width | Filter, asked: tuple[str, ...]) -> list[str]:
    """Those of a layer. A plain call of gathered layers has a row with shared channel sets as well."""
    found = modes_of(layer, asked)
    return [*found, "shared"] if isinstance(layer, Width) and "plain" in found else found


def rows(
    layer: Layer | Block | Width | Filter,
    mask: Tensor | None,
    batch: int,
    dtype: torch.dtype,
    asked: tuple[str, ...],
    *,
    device: str | None,
    on: str,
    launches: str,
    measured: bool = False,
) -> Iterator[Row]:
    """Of a layer, for each of its modes.

    mask: as the layer's `active` makes it; None for a `Filter`. device: as for `roofline.predict`; on: the name of its
    data sheet. measured: run the kernels as well, on the GPU that is here.
    """  # fmt: skip
    sheet = DATA_SHEETS[on]
    for mode in modes(layer, asked):
        with nullcontext() if mode == "backward" else torch.no_grad():
            run = call(layer, mask, mode, batch, dtype, "cpu" if device else "cuda")
            found = roofline.predict(run, device=device, launches=launches)
            compared, error = _measured(run, found) if measured else ((), "")
        floor_mode = "plain" if mode == "shared" else mode
        made = estimate(layer, mask, floor_mode, batch, dtype, sheet)
        dense = ideal = None
        density = 1.0
        if mask is not None:
            density = mask.float().mean().item()
            work = dense_work(layer, floor_mode, batch, dtype)
            dense = roofline.predict_dense(work, dtype, device=on, launches=launches)
            ideal = work.flops / made.flops if made.flops else math.inf
        yield Row(
            layer.family, layer.name, batch, density, mode, found, made.floor_ms / 1e3, dense, ideal, compared, error
        )


def _measured(run: Callable[[], object], found: Predictions) -> tuple[tuple[Compared, ...], str]:
    """What was measured beside what was predicted, or why not: the other layers are measured all the same."""
    try:
        return tuple(roofline.compare(found, roofline.measure_kernels(run))), ""
    except (ValueError, RuntimeError) as error:
        return (), f"{type(error).__name__}: {error}"


def dense_work(layer: Layer | Block | Width, mode: str, batch: int, dtype: torch.dtype) -> roofline.Work:
    """Of the call that a user would make instead; of a block, of its three layers one after the other."""
    mode = "plain" if mode == "in-place" else mode
    if not isinstance(layer, Block):
        shapes = (batch, layer.in_channels, layer.height, layer.width), (
            layer.out_channels, layer.in_channels // getattr(layer, "groups", 1), layer.kernel, layer.kernel
        )  # fmt: skip
        options = dict(padding=layer.padding, groups=getattr(layer, "groups", 1), dtype=dtype, mode=mode)
        return roofline.masked_conv2d(*shapes, **options)
    inner = layer.channels // 4 if layer.kind == "bottleneck" else 6 * layer.channels
    groups = 1 if layer.kind == "bottleneck" else inner
    total = roofline.Work(0, 0)
    for cin, cout, kernel, g in (
        (layer.channels, inner, 1, 1),
        (inner, inner, 3, groups),
        (inner, layer.channels, 1, 1),
    ):
        shapes = (batch, cin, layer.height, layer.width), (cout, cin // g, kernel, kernel)
        work = roofline.masked_conv2d(*shapes, padding=kernel // 2, groups=g, dtype=dtype, mode=mode)
        total = roofline.Work(total.flops + work.flops, total.bytes + work.bytes)
    return total


def call(
    layer: Layer | Block | Width | Filter, mask: Tensor | None, mode: str, batch: int, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    """A layer's call in a mode, on tensors that on a CPU hold nothing and take no memory.

    What calls share is made by the first of them.
    """
    is_here = device == "cuda"

    def made(*shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        return tensor.normal_() if is_here else tensor

    mask = mask if mask is None else mask.to(device)
    forward, leaves = _FORWARD[type(layer)](layer, mask, mode, batch, dtype, made, device)
    if mode != "backward":
        return forward
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> None:
        output = forward()
        grad = torch.empty_like(output) if not is_here else torch.ones_like(output)
        torch.autograd.grad(output, leaves, grad)

    return step


# Each gives the forward call and the tensors that want a gradient.


def _layer(layer: Layer, mask, mode, batch, dtype, made, device):
    input = made(batch, layer.in_channels, layer.height, layer.width)
    weight = made(layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
    options = dict(padding=layer.padding, groups=layer.groups)
    if mode == "in-place":
        sites, out = (
            functools.cache(lambda: dynconv.ActiveSites(mask)),
            made(batch, layer.out_channels, *mask.shape[2:]),
        )
        return lambda: dynconv.masked_conv2d(input, weight, **options, mask=sites(), out=out), ()
    return lambda: dynconv.masked_conv2d(input, weight, **options, mask=mask), (input, weight)


def _width(layer: Width, mask, mode, batch, dtype, made, device):
    input = made(batch, layer.in_channels, layer.height, layer.width)
    weight = made(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
    sides = mask.split([layer.in_channels, layer.out_channels], 1)

    def compacted() -> dict[str, dynconv.ActiveChannels]:
        size = layer.granularity
        sets = (dynconv.ActiveChannels(side[:, ::size], tuple(side.shape), granularity=size) for side in sides)
        return dict(zip(("in_mask", "out_mask"), sets))

    kept = functools.cache(compacted) if mode == "shared" else compacted
    if layer.linear:
        flat, matrix = input.flatten(1), weight.flatten(1)
        return lambda: dynconv.gathered_linear(flat, matrix, **kept()), (flat, matrix)
    return lambda: dynconv.gathered_conv2d(input, weight, padding=layer.padding, **kept()), (input, weight)


def _filter(layer: Filter, mask, mode, batch, dtype, made, device):
    input, weights = made(batch, layer.channels, layer.height, layer.width), layer.groups * layer.taps
    filters = made(batch, weights, *layer.size)
    options = dict(kernel_size=layer.kernel, padding=layer.padding, normalization=layer.normalization)
    if layer.offsets:
        offset = made(batch, 2 * weights, *layer.size)
        return lambda: dynconv.deform_aggregate2d(input, offset, filters, **options), (input, offset, filters)
    options |= dict(scale_factor=layer.scale_factor)
    shares = made(batch, layer.channels, layer.kernel, layer.kernel) if layer.channel_filters else None
    leaves = (input, filters, *(() if shares is None else (shares,)))
    return lambda: dynconv.dynamic_filter2d(input, filters, channel_filters=shares, **options), leaves


def _block(layer: Block, mask, mode, batch, dtype, made, device):
    block = make(layer).to(device, dtype, memory_format=torch.channels_last).train(mode == "backward")
    block.requires_grad_(mode == "backward")
    if mode != "backward":
        dynconv.prepare(block)  # as who serves it does
    input, cell = made(batch, layer.channels, layer.height, layer.width), layer.granularity
    sites = lambda: dynconv.ActiveSites(mask[..., ::cell, ::cell], (batch, *mask.shape[2:]), granularity=cell)
    if mode == "in-place":
        kept = functools.cache(sites)
        return lambda: block(input, kept(), inplace=True), ()
    return lambda: block(input, sites()), (input, *block.parameters())


_FORWARD = {Layer: _layer, Width: _width, Filter: _filter, Block: _block}


CALLS = "<family|<layer|batch|density|<mode|us|floor us|of it|dense us|gain|ideal|<kernels"
KERNELS = "<layer|density|<kernel|programs|held|waves|registers|steps|a step|MB|us|<binds|<notes"
COMPARED = "<layer|density|<mode|<kernel|predicted us|measured us|measured / predicted"


def cells(found: list[Row]) -> dict[str, tuple[str, list[list[str]]]]:
    """The tables: columns as `table` takes them, and the text of each cell. A kernel of several calls is shown once."""
    us = lambda seconds: "" if seconds is None else f"{seconds * 1e6:.1f}"
    times = lambda ratio: "" if ratio is None else f"{ratio:.2f}x"
    named = lambda row: [row.layer, f"{row.density:.2f}", row.mode]
    calls, kernels, compared, shown = [], [], [], set()
    for row in found:
        parts = " ".join(f"{us(kernel.seconds)}" for kernel in row.predictions.kernels)
        seconds = row.predictions.seconds
        calls.append([row.family, row.layer, str(row.batch), f"{row.density:.2f}", row.mode, us(seconds),
                      us(row.floor), f"{row.floor / seconds:.0%}", us(row.dense), times(row.gain),
                      times(row.ideal), parts])  # fmt: skip
        for kernel in row.predictions.kernels:
            met = row.layer, row.density, tuple(sorted(kernel.parts.items())), kernel.name
            if met in shown:  # in another mode, or twice in this one
                continue
            shown.add(met)
            if kernel.is_torch:
                counts = [""] * 6
            else:
                step = f"{kernel.step_instructions} / {kernel.step_barriers}"
                counts = [f"{kernel.working} of {kernel.programs}", str(kernel.occupancy), str(kernel.waves),
                          str(kernel.registers), f"{kernel.steps:.0f}", step]  # fmt: skip
            binds = f"issue: {kernel.busiest}" if kernel.binds == "issue" else kernel.binds
            kernels.append([row.layer, f"{row.density:.2f}", kernel.name, *counts, f"{kernel.bytes / 1e6:.1f}",
                            us(kernel.seconds), binds, "; ".join(kernel.notes)])  # fmt: skip
        compared += [
            [*named(row), one.name, us(one.predicted), us(one.measured), times(one.ratio)] for one in row.compared
        ]
    has_notes = any(line[-1] for line in kernels)
    columns, lines = (KERNELS, kernels) if has_notes else (KERNELS.rpartition("|")[0], [line[:-1] for line in kernels])
    made = {"calls": (CALLS, calls), "kernels": (columns, lines)}
    return made | ({"measured": (COMPARED, compared)} if compared else {})


def show(found: list[Row], out, on: str, dtype: str) -> None:
    """Print the tables."""
    titles = {
        "calls": f"\nPREDICTIONS for an {DATA_SHEETS[on].name}, {dtype}: no measurement",
        "kernels": "\nPREDICTIONS: the kernels of these calls",
        "measured": "\nmeasured on this GPU, beside the prediction; without the time between launches",
    }
    for name, (columns, lines) in cells(found).items():
        shown = table(titles[name], columns)
        for line in lines:
            shown.add_row(*line)
        out.print(shown)
    for row in found:
        if row.error:
            out.print(f"{row.family}, {row.layer}, {row.density:.2f}, {row.mode}: not measured: {row.error}")


def markdown(found: list[Row], on: str, launches: str, command: str) -> str:
    """A page of the tables."""
    import triton

    from .. import _kernel_model

    text = PAGE.format(
        device=DATA_SHEETS[on].name, triton=triton.__version__, launch=_kernel_model.LAUNCH[launches] * 1e6,
        share=_kernel_model.DENSE_SHARE, copy=_kernel_model.COPY_SHARE, command=command,
    )  # fmt: skip
    for name, (columns, lines) in cells(found).items():
        headings = columns.split("|")
        rule = ["---" if heading.startswith("<") else "---:" for heading in headings]
        text += f"## The {name}\n\n"
        for line in ([heading.lstrip("<") for heading in headings], rule, *lines):
            text += "| " + " | ".join(line) + " |\n"
        text += "\n"
    return text.rstrip() + "\n"
