"""The scenes of the demo that filter a photo, pixel by pixel: `denoise` and `upsample`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dynconv

from .._timing import take_turns
from . import console, table
from .bounds import Arithmetic, Verdict, judge, worst_of
from .environment import environment, write_json
from .filters import bounded_filter, unfolded
from .layers import Filter

SIGMA = 25 / 255  # of the noise, in units of the photo's range
SECONDS = 1.5  # of timing, for each scene

# (range, radius in pixels) of the bilateral passes, and of the upsampling's kernel.
PASSES = ((0.05, 1.5), (0.06, 1.5))
UPSAMPLING = (0.03, 0.8)


def psnr(image: Tensor, truth: Tensor) -> float:
    """The peak signal-to-noise ratio of images in 0..1, in dB."""
    return -10 * math.log10((image.clamp(0, 1) - truth).double().square().mean().item())


def affinities(guide: Tensor, centre: Tensor, layer: Filter, range_: float, radius: float) -> Tensor:
    """Logits [1, taps, Ho, Wo] of a bilateral kernel: close in colour to `centre`, and close by.

    -|colour of the tap - centre|^2 / (2 range^2) - |tap - site|^2 / (2 radius^2), distances in pixels of the guide.
    Beyond its border the guide is so far from any colour that softmax leaves nothing.
    """
    scale, (h, w), p = layer.scale_factor, guide.shape[2:], layer.padding
    padded = F.pad(guide, (p, p, p, p), value=1e3)
    # Where a site lies beside the middle of the pixel that it is a part of.
    beside = lambda length: ((torch.arange(scale) + 0.5) / scale - 0.5).repeat(length)
    dy, dx = beside(h).view(-1, 1), beside(w).view(1, -1)
    logits = torch.empty(1, layer.taps, *layer.size)
    for tap in range(layer.taps):
        y, x = divmod(tap, layer.kernel)
        pixels = padded[:, :, y : y + h, x : x + w].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        colour = (pixels - centre).square().sum(1) / (2 * range_**2)
        logits[:, tap] = -colour - ((y - p - dy).square() + (x - p - dx).square()) / (2 * radius**2)
    return logits


class Filtered(NamedTuple):
    """A photo filtered by the op, and by the usual idiom beside it."""

    image: Tensor
    check: Verdict  # the worse of the two against sums in float64
    difference: float  # the largest, of the two
    calls: dict[str, Callable[[int], Tensor]]  # "dynconv", and "dense": F.unfold


def filtered(layer: Filter, image: Tensor, logits: Tensor) -> Filtered:
    """softmax(logits) filters the image, and once more by F.unfold on contiguous operands."""
    channels_last = lambda tensor: tensor.contiguous(memory_format=torch.channels_last)
    operands = channels_last(image), channels_last(logits)
    options = dict(kernel_size=layer.kernel, padding=layer.padding, scale_factor=layer.scale_factor)
    calls = {
        "dynconv": lambda number: dynconv.dynamic_filter2d(*operands, **options, normalization="softmax"),
        "dense": lambda number: unfolded(layer, image, logits),
    }
    results = {name: call(0) for name, call in calls.items()}
    (expected,) = bounded_filter(Arithmetic(torch.float32), layer, image[0].double(), logits[0].double())
    check = worst_of([judge(result[0], expected.value, expected.error) for result in results.values()])
    difference = (results["dynconv"] - results["dense"]).abs().max().item()
    return Filtered(results["dynconv"].contiguous(), check, difference, calls)


def denoise(image: Tensor) -> tuple[dict, dict[str, Tensor]]:
    """Noise, then two bilateral passes: the first is guided by the blurred noisy photo, the second by the first."""
    noisy = image + SIGMA * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    layer = Filter("denoise", *image.shape[2:], 3, 7, 1, normalization="softmax")
    guide, steps = F.avg_pool2d(noisy, 3, 1, 1, count_include_pad=False), []
    for range_, radius in PASSES:
        steps.append(filtered(layer, noisy, affinities(guide, guide, layer, range_, radius)))
        guide = steps[-1].image
    pictures = {"photo": image, "noisy": noisy, "denoised": guide}
    return _record(layer, steps, pictures, image), pictures


def upsample(image: Tensor) -> tuple[dict, dict[str, Tensor]]:
    """Twice the size of a half-size photo: each pixel averages those of its surroundings that are like its estimate.

    CARAFE's way with kernels from no training. The estimate is bilinear, corrected by what its own half size misses.
    """
    smaller = lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    larger = lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    half = smaller(image)
    bilinear = larger(half)
    estimate = bilinear + larger(half - smaller(bilinear))
    layer = Filter("upsample", *half.shape[2:], 3, 5, 1, scale_factor=2, normalization="softmax")
    made = filtered(layer, half, affinities(half, estimate, layer, *UPSAMPLING))
    pictures = {
        "photo": image, "nearest": F.interpolate(half, scale_factor=2), "bilinear": bilinear, "its estimate": estimate,
        "content-dependent": made.image,
    }  # fmt: skip
    return _record(layer, [made], pictures, image), pictures


def _record(layer: Filter, steps: list[Filtered], pictures: dict[str, Tensor], truth: Tensor) -> dict:
    """What goes to JSON; the last step is timed, if all were right."""
    passed = all(step.check.passed for step in steps)
    times = take_turns(steps[-1].calls, "cpu", 7, SECONDS, least=3) if passed else {}
    return {
        "layer": layer.name, "steps": len(steps), "passed": passed, "of_bound": max(step.check.worst for step in steps),
        "difference": max(step.difference for step in steps),
        "psnr_db": {name: psnr(picture, truth) for name, picture in pictures.items() if name != "photo"},
        "ms": {name: taken.median for name, taken in times.items()},
    }  # fmt: skip


def report(title: str, record: dict) -> None:
    """The table of a scene."""
    shown = table(
        f"\n{title}",
        "<filter|passes|unfold ms|dynconv ms|ratio|largest difference|of its bound|<result",
        "ms: a pass, its filters given. of its bound: the worse of the two results against sums in float64.",
    )
    cells = ["", "", ""]
    if record["passed"]:
        dense, ours = record["ms"]["dense"], record["ms"]["dynconv"]
        cells = [f"{dense:.1f}", f"{ours:.1f}", f"{dense / ours:.2f}x"]
    verdict = "[green]equal" if record["passed"] else "[red]WRONG"
    cells += [f"{record['difference']:.1e}", f"{record['of_bound']:.3f}", verdict]
    shown.add_row(record["layer"], str(record["steps"]), *cells)
    out = console()
    out.print(shown)
    out.print("PSNR against the photo: " + ", ".join(f"{n} {db:.2f} dB" for n, db in record["psnr_db"].items()))


def draw(title: str, record: dict, pictures: dict[str, Tensor], path: str) -> None:
    """The pictures side by side, and a part of each enlarged."""
    from .plots import pyplot, save

    plt = pyplot()
    figure, axes = plt.subplots(2, len(pictures), figsize=(3.3 * len(pictures), 5.2), layout="constrained")
    cost = "WRONG RESULT"
    if record["passed"]:
        cost = "a pass in {dense:.0f} ms with F.unfold, {dynconv:.0f} ms with dynconv".format(**record["ms"])
    figure.suptitle(f"{title}: {cost}", fontsize=12)
    height, width = pictures["photo"].shape[2:]
    rows, columns = (slice(length * 2 // 5, length * 2 // 5 + max(1, height // 5)) for length in (height, width))
    for column, (name, picture) in enumerate(pictures.items()):
        shown = picture[0].clamp(0, 1).permute(1, 2, 0).numpy()
        quality = f": {record['psnr_db'][name]:.2f} dB" if name in record["psnr_db"] else ""
        for ax, part in zip(axes[:, column], (shown, shown[rows, columns])):
            ax.imshow(part, interpolation="nearest")
            ax.set_axis_off()
        axes[0][column].set_title(f"{name}{quality}", loc="left", fontsize=9)
    save(figure, path)


SCENES = {
    "denoise": ("Denoise: a filter for each pixel of a noisy photo", denoise),
    "upsample": ("Upsample: twice the size, by kernels that follow the edges", upsample),
}


def scene(name: str, image: Tensor, folder: Path) -> bool:
    """Run a scene, with its table, picture and figures in the folder; whether its results were right."""
    title, run = SCENES[name]
    with console(stderr=True).status(f"{name} ..."):
        record, pictures = run(image)
    report(title, record)
    target = folder / f"{name}.png"
    draw(title.partition(":")[0], record, pictures, str(target))
    write_json(str(target.with_suffix(".json")), {"environment": environment("cpu"), **record})
    console().print(f"picture: {target}, figures: {target.with_suffix('.json')}")
    return record["passed"]
