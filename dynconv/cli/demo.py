"""`python -m dynconv demo`: networks that compute only what matters in a photo, what changed, or what a digit needs.

And photos that are filtered by what is in them, pixel by pixel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynconv
from dynconv.nn import MaskedBottleneck

from . import console, digits, extra, options, photos, table
from .blocks import bounded_block, dense_block, folded_layers
from .bounds import Arithmetic, judge
from .layers import patch, reached

SCENES = ("attend", "ponder", "edit", *photos.SCENES, "channels")
# Passes that are timed: as many as fit into the seconds, between the two numbers.
PASSES = (3, 7)
SECONDS = 5.0


@dataclass(frozen=True)
class Conv:
    """One convolution of a stack, "same" padding, followed by a ReLU."""

    group: str  # layers of one group share a line of the table
    weight: Tensor
    stride: int = 1
    stage: int = 0

    @classmethod
    def random(cls, group: str, cin: int, cout: int, kernel: int, stride: int = 1, stage: int = 0) -> Conv:
        """He's initialisation keeps the signal's size from layer to layer."""
        weight = torch.randn(cout, cin, kernel, kernel) * (2 / (cin * kernel**2)) ** 0.5
        return cls(group, weight.contiguous(memory_format=torch.channels_last), stride, stage)

    @property
    def options(self) -> dict[str, int]:
        """For F.conv2d and masked_conv2d."""
        return {"stride": self.stride, "padding": self.weight.shape[2] // 2}

    def dense(self, input: Tensor) -> Tensor:
        """Every site."""
        return F.conv2d(input, self.weight, **self.options)


@dataclass
class Line:
    """What a group of layers costs, in milliseconds, and how far it is from dense."""

    name: str
    density: float = 0.0
    dense: list[float] = field(default_factory=list)
    sparse: list[float] = field(default_factory=list)
    dense_flops: float = 0.0
    flops: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    of_bound: float = 0.0
    passed: bool = True

    @property
    def ideal(self) -> float:
        """By the FLOPs."""
        return self.dense_flops / self.flops if self.flops else float("inf")


@dataclass
class Result:
    """A scene's outcome; `passed` is False where a result was not the dense one."""

    lines: list[Line]
    total: Line
    notes: list[str]
    passed: bool
    pictures: dict[str, object]


class Stopwatch:
    """Milliseconds of calls, added up by name over one pass."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, name: str, call: Callable, *arguments, **options):
        begin = time.perf_counter()
        result = call(*arguments, **options)
        self.spent[name] = self.spent.get(name, 0.0) + (time.perf_counter() - begin) * 1e3
        return result


def alternate(dense: Callable[[Stopwatch], object], sparse: Callable[[Stopwatch], object]) -> dict[str, list[dict]]:
    """The spent times of some passes of each, in turn, after one of each that does not count."""
    passes: dict[str, list[dict]] = {"dense": [], "sparse": []}
    end = time.perf_counter() + SECONDS
    while len(passes["dense"]) <= PASSES[0] or (len(passes["dense"]) <= PASSES[1] and time.perf_counter() < end):
        for name, run in (("dense", dense), ("sparse", sparse)):
            watch = Stopwatch()
            watch("total", run, watch)
            passes[name].append(watch.spent)
    return {name: spent[1:] for name, spent in passes.items()}


def photo(name: str, height: int | None = None, width: int | None = None, multiple: int = 32) -> Tensor:
    """A photo from scikit-learn, [1, 3, H, W] in 0..1, resized to that size or to the nearest multiples.

    With a size, the centre of that aspect ratio is cut out first.
    """
    pixels = extra("sklearn.datasets").load_sample_image(f"{name}.jpg")
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    rows, columns = image.shape[2:]
    if height is None:
        height, width = (round(length / multiple) * multiple for length in (rows, columns))
    else:
        scale = min(rows / height, columns / width)
        cut_rows, cut_columns = round(height * scale), round(width * scale)
        top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
        image = image[:, :, top : top + cut_rows, left : left + cut_columns]
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def channels_last(tensor: Tensor) -> Tensor:
    """The format that convolutions are fast in."""
    return tensor.contiguous(memory_format=torch.channels_last)


def compare(line: Line, conv: Conv, input: Tensor, result: Tensor, dense: Tensor, mask: Tensor, skipped: Tensor | int):
    """Judge one layer's result before its ReLU against a dense convolution of the same input.

    `dense` is what the network that computes everything has there, for the error that the user sees.
    """
    expected = torch.where(mask, conv.dense(input), skipped)
    magnitude = F.conv2d(input.abs(), conv.weight.abs(), **conv.options)
    bound = Arithmetic(torch.float32).bound(expected, magnitude, conv.weight[0].numel(), torch.float32)
    verdict = judge(result, expected, torch.where(mask, bound, 0))
    line.passed &= verdict.passed
    line.of_bound = max(line.of_bound, verdict.worst)
    line.error = max(line.error, (result - dense).abs().max().item())
    line.largest = max(line.largest, dense.abs().max().item())


def gradient_energy(image: Tensor) -> Tensor:
    """[1, 3, H, W] -> [1, 1, H, W]: where the photo has detail; the squared differences of neighbours, smoothed."""
    grey = image.mean(1, keepdim=True)
    dx = F.pad(grey[..., 1:] - grey[..., :-1], (0, 1)).square()
    dy = F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1)).square()
    return F.avg_pool2d(dx + dy, 25, 1, 12, count_include_pad=False)


def resnet(blocks: Sequence[int] = (3, 4, 6, 3)) -> list[Conv]:
    """The bottlenecks of ResNet-50, the stride in the first 1x1 layer as first published, without shortcuts."""
    stack, channels = [], 256
    for stage, count in enumerate(blocks):
        inner = 64 * 2**stage
        for block in range(count):
            name = f"stage {stage + 1}: {count} x "
            stride = 2 if stage and not block else 1
            stack.append(Conv.random(f"{name}1x1 to {inner}", channels, inner, 1, stride, stage))
            stack.append(Conv.random(f"{name}3x3 {inner}", inner, inner, 3, 1, stage))
            stack.append(Conv.random(f"{name}1x1 to {inner * 4}", inner, inner * 4, 1, 1, stage))
            channels = inner * 4
    return stack


def attend(image: Tensor, density: float) -> Result:
    """Only the parts with detail: one active set for each stage, shared by its layers.

    The reference is the same stack computed everywhere, and set to zero outside the mask after each layer.
    """
    stack = resnet()
    stem = Conv.random("stem", 3, 256, 7, 2)
    start = channels_last(F.max_pool2d(torch.relu(stem.dense(channels_last(image))), 3, 2, 1))
    energy = gradient_energy(image)
    masks = []
    for stage in range(4):
        pooled = F.avg_pool2d(energy, 4 * 2**stage)
        threshold = pooled.flatten().kthvalue(max(1, round(pooled.numel() * (1 - density)))).values
        masks.append(pooled > threshold)

    def dense(watch: Stopwatch) -> None:
        value = start
        for conv in stack:
            value = watch(conv.group, conv.dense, value).relu_()

    def sparse(watch: Stopwatch) -> None:
        value, sites = start, [watch("active sets", dynconv.ActiveSites, mask) for mask in masks]
        for conv in stack:
            options = conv.options | {"mask": sites[conv.stage]}
            value = watch(conv.group, dynconv.masked_conv2d, value, conv.weight, **options).relu_()

    lines = {conv.group: Line(conv.group) for conv in stack}
    value = reference = start
    for conv in stack:
        line, mask = lines[conv.group], masks[conv.stage]
        expected = torch.where(mask, conv.dense(reference), 0)
        result = dynconv.masked_conv2d(value, conv.weight, **conv.options, mask=mask)
        compare(line, conv, value, result, expected, mask, 0)
        _count(line, conv, mask)
        value, reference = result.relu(), channels_last(expected.relu())
    return _result(
        list(lines.values()), alternate(dense, sparse), "active sets",
        {"photo": image, "mask": F.interpolate(masks[0].float(), image.shape[2:]), "masks": masks},
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A block of a network; where it has a mask, the layers that the dense network runs in its place."""

    group: str
    block: MaskedBottleneck
    mask: Tensor | None = None
    folded: list | None = None

    def dense(self, input: Tensor) -> Tensor:
        """Every site, normalisation folded in."""
        return self.block(input) if self.mask is None else dense_block(self.block, self.folded, input)


def gated_resnet(energy: Tensor, density: float, blocks: Sequence[int] = (3, 4, 6, 3)) -> list[Step]:
    """ResNet-50's bottlenecks, random weights. The first of a stage is computed everywhere, as it changes the shape.

    The others look at less and less of the photo: the first at up to twice the density, on average at the density.
    """
    steps, channels = [], 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        pooled = F.avg_pool2d(energy, 4 * 2**stage)
        group = f"stage {stage + 1}: {count} bottlenecks of {4 * width}"
        for number in range(count):
            stride, downsample = 1, None
            if number == 0:
                stride = 2 if stage else 1
                downsample = nn.Sequential(
                    nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
                )
            block = MaskedBottleneck(channels, width, stride, downsample)
            for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight)
            nn.init.constant_(block.bn3.weight, 0.2)  # the sum of many branches stays near one
            block.eval().to(memory_format=torch.channels_last)
            share = min(1.0, 2 * density * (count - number) / count)
            threshold = pooled.flatten().kthvalue(max(1, round(pooled.numel() * (1 - share)))).values
            chooses = () if number == 0 else (pooled > threshold, folded_layers(block))
            steps.append(Step(group, block, *chooses))
            channels = 4 * width
    return steps


def ponder(image: Tensor, density: float, blocks: Sequence[int] = (3, 4, 6, 3)) -> Result:
    """Each block has a mask of its own; the ponder map adds them up over the photo.

    The reference is the same network computed everywhere, each block's result being its input outside of the mask.
    """
    stem = Conv.random("stem", 3, 64, 7, 2)
    start = channels_last(F.max_pool2d(torch.relu(stem.dense(channels_last(image))), 3, 2, 1))
    steps = gated_resnet(gradient_energy(image), density, blocks)

    def dense(watch: Stopwatch) -> None:
        value = start
        for step in steps:
            value = watch(step.group, step.dense, value)

    def sparse(watch: Stopwatch) -> None:
        value = start
        sites = watch(
            "active sets", lambda: [None if step.mask is None else dynconv.ActiveSites(step.mask) for step in steps]
        )
        for step, active in zip(steps, sites):
            value = watch(step.group, step.block, value, active)

    with dynconv.ponder_map() as record:
        sparse(Stopwatch())
    lines = {step.group: Line(step.group) for step in steps}
    value = reference = start
    for step in steps:
        line = lines[step.group]
        with FlopCounterMode(display=False) as counter:
            everything = step.dense(reference)
        line.dense_flops += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            result = step.block(value, step.mask)
        line.flops += counter.get_total_flops()
        line.density += (1.0 if step.mask is None else step.mask.float().mean().item()) / blocks[int(step.group[6]) - 1]
        if step.mask is not None:
            everything = torch.where(step.mask, everything, reference)
            bounded = bounded_block(step.block, step.folded, value, Arithmetic(torch.float32))
            expected = torch.where(step.mask, bounded.value, value)
            verdict = judge(result, expected, torch.where(step.mask, bounded.error, 0))
            line.passed &= verdict.passed
            line.of_bound = max(line.of_bound, verdict.worst)
        line.error = (result - everything).abs().max().item()
        line.largest = everything.abs().max().item()
        value, reference = result, everything
    result = _result(
        list(lines.values()), alternate(dense, sparse), "active sets",
        {"photo": image, "ponder": record.count(image.shape[2:]), "calls": len(record.masks)},
    )  # fmt: skip
    counted = record.count(image.shape[2:]) / len(record.masks)
    result.notes.append(
        f"a pixel is computed by {counted.mean():.0%} of {len(record.masks)} blocks, "
        f"the least by {counted.min():.0%}, the most by {counted.max():.0%}"
    )
    return result


def edit_stack() -> list[Conv]:
    """The resolutions and channels of a diffusion model's encoder (DDPM at 256 x 256)."""
    return [
        Conv.random("256x256: 3 to 128", 3, 128, 3),
        Conv.random("256x256: 128 to 128", 128, 128, 3),
        Conv.random("256x256: 128 to 128 again", 128, 128, 3),
        Conv.random("128x128: 128 to 128, stride 2", 128, 128, 3, 2),
        Conv.random("128x128: 128 to 128", 128, 128, 3),
        Conv.random("64x64: 128 to 256, stride 2", 128, 256, 3, 2),
        Conv.random("64x64: 256 to 256", 256, 256, 3),
    ]


def edited_photo(image: Tensor, share: float) -> Tensor:
    """The photo with a blurred and brighter square over that share of it."""
    inside = patch(*image.shape[2:], share)
    blurred = F.avg_pool2d(image, 9, 1, 4, count_include_pad=False)
    return torch.where(inside, (blurred * 1.3 + 0.05).clamp(max=1), image)


def edit(image: Tensor, share: float, stack: Sequence[Conv] | None = None) -> Result:
    """Every layer keeps its output; after an edit it is updated in place, where the change reaches."""
    stack = edit_stack() if stack is None else stack
    changed_image = channels_last(edited_photo(image, share))
    original = channels_last(image)
    caches, value = [], original
    for conv in stack:
        caches.append(channels_last(conv.dense(value).relu_()))
        value = caches[-1]
    change = (changed_image != original).any(1, keepdim=True)

    def grow() -> list[tuple[dynconv.ActiveSites, tuple]]:
        """Layer by layer, the outputs that read something changed, and the box around them."""
        grown, mask = [], change
        for conv in stack:
            mask = reached(mask, conv.weight.shape[2], conv.stride)
            rows, columns = (mask[0, 0].any(axis).nonzero() for axis in (1, 0))
            box = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
            grown.append((dynconv.ActiveSites(mask), box))
        return grown

    def dense(watch: Stopwatch) -> None:
        value = changed_image
        for conv in stack:
            value = watch(conv.group, conv.dense, value).relu_()

    def update(watch: Stopwatch, kept: Sequence[Tensor]) -> None:
        value = changed_image
        for conv, (sites, box), cache in zip(stack, watch("what changed", grow), kept):
            options = conv.options | {"mask": sites, "out": cache}
            watch(conv.group, dynconv.masked_conv2d, value, conv.weight, **options)
            # ReLU of a cached ReLU changes nothing, so the box around the change is all that needs it.
            cache[box].relu_()
            value = cache

    updated = [cache.clone(memory_format=torch.preserve_format) for cache in caches]
    update(Stopwatch(), updated)
    lines, identical = [], True
    value, everything = changed_image, changed_image
    masks = [sites.mask for sites, _ in grow()]
    for conv, mask, before, after in zip(stack, masks, caches, updated):
        line = Line(conv.group)
        everything = conv.dense(everything).relu_()
        raw = dynconv.masked_conv2d(value, conv.weight, **conv.options, mask=mask, out=before.clone())
        compare(line, conv, value, raw, everything, mask, before)
        # What the user gets: the updated cache against everything computed again.
        line.error = (after - everything).abs().max().item()
        identical &= torch.equal(torch.where(mask, 0, after), torch.where(mask, 0, before))
        _count(line, conv, mask)
        lines.append(line)
        value = after
    result = _result(
        lines, alternate(dense, lambda watch: update(watch, updated)), "what changed",
        {"photo": changed_image, "before": image, "mask": change, "masks": masks},
    )  # fmt: skip
    result.notes.append(f"unchanged sites bitwise as before: {'yes' if identical else 'NO'}")
    result.passed &= identical
    return result


def _count(line: Line, conv: Conv, mask: Tensor) -> None:
    line.density = mask.float().mean().item()
    line.dense_flops += mask.numel() * conv.weight.numel()
    line.flops += int(mask.sum()) * conv.weight.numel()


def _result(lines: list[Line], passes: dict[str, list[dict]], overhead: str, pictures: dict) -> Result:
    for line in lines:
        line.dense = [spent[line.name] for spent in passes["dense"]]
        line.sparse = [spent[line.name] for spent in passes["sparse"]]
    total = Line(
        "whole pass, ReLU and mask included", 0.0,
        [spent["total"] for spent in passes["dense"]], [spent["total"] for spent in passes["sparse"]],
        sum(line.dense_flops for line in lines), sum(line.flops for line in lines),
        lines[-1].error, lines[-1].largest, max(line.of_bound for line in lines), all(line.passed for line in lines),
    )  # fmt: skip
    total.density = total.flops / total.dense_flops
    spent = median(spent[overhead] for spent in passes["sparse"])
    return Result(lines, total, [f"{overhead}: {spent:.2f} ms of dynconv's pass"], total.passed, pictures)


def report(title: str, result: Result) -> None:
    """The table of a scene."""
    shown = table(
        f"\n{title}",
        "<layers|active|dense ms|dynconv ms|ratio|ideal|max error|largest value|of its bound|<result",
        "max error: against the dense network, with those of the layers before. of its bound: a layer or block alone.",
    )
    for line in [*result.lines, result.total]:
        if line is result.total:
            shown.add_section()
        dense, sparse = median(line.dense), median(line.sparse)
        # The total is the network's output; the bound holds for a layer.
        shown.add_row(
            line.name, f"{line.density:.3f}", f"{dense:.1f}", f"{sparse:.1f}", f"{dense / sparse:.2f}x",
            f"{line.ideal:.2f}x", f"{line.error:.1e}", f"{line.largest:.1f}", f"{line.of_bound:.3f}",
            "[green]equal" if line.passed else "[red]WRONG",
        )  # fmt: skip
    out = console()
    out.print(shown)
    for note in result.notes:
        out.print(note)


def draw(title: str, result: Result, path: str) -> None:
    """The photo, its mask, and what each layer costs."""
    from .plots import pyplot, save

    plt = pyplot()
    figure = plt.figure(figsize=(13.5, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.25), wspace=0.03)
    dense, sparse = median(result.total.dense), median(result.total.sparse)
    verdict = "equal to dense at every layer" if result.passed else "WRONG RESULT"
    figure.suptitle(
        f"{title}: {dense:.0f} ms dense, {sparse:.0f} ms with dynconv, {dense / sparse:.1f}x "
        f"(ideal {result.total.ideal:.1f}x), {verdict}", fontsize=12,
    )  # fmt: skip
    image = result.pictures["photo"][0].permute(1, 2, 0).numpy()
    top = grid[0, 0].subgridspec(1, 2) if "before" in result.pictures else None
    ax = figure.add_subplot(top[1] if top else grid[0, 0])
    ax.imshow(image)
    ax.set_title("edited" if top else "photo", loc="left")
    ax.set_axis_off()
    if top:
        ax = figure.add_subplot(top[0])
        ax.imshow(result.pictures["before"][0].permute(1, 2, 0).numpy())
        ax.set_title("before", loc="left")
        ax.set_axis_off()
        panels = [result.pictures["masks"][i] for i in (0, -1)]
        names = [f"{m.shape[3]} x {m.shape[2]}: {m.float().mean():.1%} computed" for m in panels]
    elif "mask" in result.pictures:
        mask = result.pictures["mask"]
        panels, names = [mask], [f"{mask.bool().float().mean():.0%} computed, the rest skipped"]
    else:
        panels, names = [], []
        _draw_ponder(figure, figure.add_subplot(grid[1, 0]), image, result.pictures)
    for i, (panel, name) in enumerate(zip(panels, names)):
        ax = figure.add_subplot(grid[1, 0].subgridspec(1, len(panels))[i])
        shown = F.interpolate(panel.float(), image.shape[:2])[0, 0].bool().numpy()
        dimmed = image.mean(2, keepdims=True).repeat(3, 2) * 0.25
        ax.imshow(image * shown[..., None] + dimmed * ~shown[..., None])
        ax.set_title(name, loc="left", fontsize=9)
        ax.set_axis_off()
    ax = figure.add_subplot(grid[:, 1])
    lines = result.lines
    rows = range(len(lines))
    series = (
        ("dense", "0.72", [median(line.dense) for line in lines]),
        ("dynconv", "C0", [median(line.sparse) for line in lines]),
        ("ideal: dense x active share", "C1", [median(line.dense) / line.ideal for line in lines]),
    )
    for shift, (name, color, values) in zip((-0.28, 0.0, 0.28), series):
        bars = ax.barh([row + shift for row in rows], values, 0.27, color=color, label=name)
        if name == "dynconv":
            ratios = [f" {d / s:.1f}x" for d, s in zip(series[0][2], values)]
            ax.bar_label(bars, ratios, fontsize=8, color="C0")
    ax.set_yticks(rows, [line.name for line in lines])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="ms, median of the passes")
    ax.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    save(figure, path)


def _draw_ponder(figure, ax, image, pictures: dict) -> None:
    """The ponder map over the photo in grey, so that both are seen."""
    calls = pictures["calls"]
    ax.imshow(image.mean(2), cmap="gray")
    drawn = ax.imshow(pictures["ponder"][0, 0].numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=calls)
    figure.colorbar(drawn, ax=ax, fraction=0.03, pad=0.01)
    ax.set_title(f"ponder map: how many of {calls} blocks computed a pixel", loc="left", fontsize=9)
    ax.set_axis_off()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    parser.add_argument("--scene", choices=(*SCENES, "all"), default="all")
    parser.add_argument("--photo", choices=("china", "flower"), default="china")
    parser.add_argument(
        "--density", type=options.share, default=0.25, help="attend, ponder: the share of the photo to compute"
    )
    parser.add_argument("--edited", type=options.share, default=0.05, help="edit: the share of the photo that changes")
    parser.add_argument(
        "--out", type=options.output_folder, metavar="DIR", default="dynconv-demo", help="for the pictures and figures"
    )


@torch.no_grad()
def main(arguments: argparse.Namespace) -> int:
    """Run the scenes on the CPU; 1 if a result was not the dense one."""
    extra("matplotlib")
    torch.manual_seed(0)
    scenes = {
        "attend": ("Attend: a ResNet-50 that looks where the photo has detail",
                   lambda: attend(photo(arguments.photo), arguments.density)),
        "ponder": ("Ponder: a ResNet-50 in which every block chooses its pixels",
                   lambda: ponder(photo(arguments.photo), arguments.density)),
        "edit": ("Edit: cached layers follow a change of the photo",
                 lambda: edit(photo(arguments.photo, 256, 256), arguments.edited)),
    }  # fmt: skip
    passed = True
    for name, (title, run) in scenes.items():
        if arguments.scene not in (name, "all"):
            continue
        with console(stderr=True).status(f"{name} ..."):
            result = run()
        report(title, result)
        target = str(Path(arguments.out) / f"{name}.png")
        draw(title.partition(":")[0], result, target)
        console().print(f"picture: {target}")
        passed &= result.passed
    for name in photos.SCENES:
        if arguments.scene in (name, "all"):
            passed &= photos.scene(name, photo(arguments.photo), Path(arguments.out))
    if arguments.scene in ("channels", "all"):
        passed &= digits.scene(Path(arguments.out))
    return 0 if passed else 1
