"""The published layers that the benchmarks measure, by name, and the masks they are measured with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._masks import blob_mask, random_mask


@dataclass(frozen=True)
class Layer:
    """A convolution of a published network, "same" padding, with the masks that the network meets.

    `mask` is "field" (random or blobs, at the densities the user asks for), "patch" (the outputs that an edited
    square of the input reaches) or "rectangle". `densities` are the published ones: edited shares of the input
    for a patch, active shares of the output for a rectangle; None where the user chooses.
    """

    family: str
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: int
    mask: str = "field"
    densities: tuple[float, ...] | None = None
    batch: int | None = None  # None: the user's
    groups: int = 1
    inference: bool = False  # not measured in training

    @property
    def name(self) -> str:
        """For example "56x56 64->64 3x3", "56x56 144 depthwise 3x3" or "28x28 128->128 3x3 in 8 groups"."""
        size, kernel = f"{self.height}x{self.width}", f"{self.kernel}x{self.kernel}"
        if self.groups == self.in_channels > 1:
            return f"{size} {self.in_channels} depthwise {kernel}"
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{size} {self.in_channels}->{self.out_channels} {kernel}{groups}"

    @property
    def padding(self) -> int:
        """What keeps the output the size of the input."""
        return self.kernel // 2

    @property
    def products(self) -> int:
        """Terms of the sum behind one output element: Cin / groups * kH * kW."""
        return self.in_channels // self.groups * self.kernel**2

    def active(self, density: float, kind: str, batch: int, generator: torch.Generator) -> Tensor:
        """A bool mask [batch, 1, H, W]; `kind` ("blob" or "random") counts for the layers of mask "field"."""
        if self.mask == "patch":
            return reached(patch(self.height, self.width, density), self.kernel).expand(batch, -1, -1, -1).contiguous()
        if self.mask == "rectangle":
            return patch(self.height, self.width, density).expand(batch, -1, -1, -1).contiguous()
        return MASKS[kind](batch, self.height, self.width, density, generator)


@dataclass(frozen=True)
class Block:
    """A residual block of a published network: "bottleneck" (1x1, 3x3, 1x1) or "inverted" (1x1, depthwise 3x3, 1x1).

    `mask` is "field" or "rectangle", as of a layer. With a `granularity` a field is of cells of that many lines and
    columns, each computed as a whole or not at all.
    """

    family: str
    kind: str
    height: int
    width: int
    channels: int
    mask: str = "field"
    densities: tuple[float, ...] | None = None
    batch: int | None = None
    granularity: int = 1
    inference: bool = False  # not measured in training
    kernel: int = 0  # of no single size: not in the means over 3x3 layers

    @property
    def name(self) -> str:
        """For example "56x56 256 bottleneck" or "56x56 256 bottleneck in cells of 4x4"."""
        cells = f" in cells of {self.granularity}x{self.granularity}" if self.granularity > 1 else ""
        return f"{self.height}x{self.width} {self.channels} {self.kind}{cells}"

    @property
    def products(self) -> int:
        """Products behind one output element, over all layers and output channels of the block."""
        if self.kind == "bottleneck":
            return self.channels // 4 * 2 + 9 * self.channels // 16
        return 12 * self.channels + 54

    @property
    def out_channels(self) -> int:
        """Of the block."""
        return self.channels

    def active(self, density: float, kind: str, batch: int, generator: torch.Generator) -> Tensor:
        """As `Layer.active`."""
        if self.mask == "rectangle":
            return patch(self.height, self.width, density).expand(batch, -1, -1, -1).contiguous()
        cell = self.granularity
        coarse = MASKS[kind](batch, -(-self.height // cell), -(-self.width // cell), density, generator)
        return coarse.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[..., : self.height, : self.width]


@dataclass(frozen=True)
class Width:
    """A layer of which each sample keeps some input and output channels, in groups of `granularity`.

    A convolution, "same" padding, or (`linear`) a linear layer of one position. `densities` are the keep rates, the
    same on both sides, so that the products fall with their square.
    """

    family: str
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: int
    granularity: int
    batch: int | None = None
    densities: tuple[float, ...] = (0.75, 0.5, 0.25)
    linear: bool = False

    @property
    def name(self) -> str:
        """For example "56x56 64->64 3x3" or "4096->4096 linear"."""
        channels = f"{self.in_channels}->{self.out_channels}"
        if self.linear:
            return f"{channels} linear"
        return f"{self.height}x{self.width} {channels} {self.kernel}x{self.kernel}"

    @property
    def padding(self) -> int:
        """What keeps the output the size of the input."""
        return self.kernel // 2

    @property
    def products(self) -> int:
        """Terms of the sum behind one output element."""
        return self.in_channels * self.kernel**2

    def active(self, density: float, kind: str, batch: int, generator: torch.Generator) -> Tensor:
        """bool [batch, Cin + Cout]: what each sample keeps of its inputs, then of its outputs, at random."""
        sides = (self.in_channels, self.out_channels)
        return torch.cat([kept_groups(batch, c, self.granularity, density, generator) for c in sides], 1)


@dataclass(frozen=True)
class Filter:
    """A layer that filters every pixel with a filter of its own: dynamic_filter2d, or deform_aggregate2d.

    "same" padding and stride 1; `channel_filters`, `normalization` and `scale_factor` are the op's arguments. With
    `offsets` every tap of every pixel reads where an offset of its own moves it.
    """

    family: str
    height: int
    width: int
    channels: int
    kernel: int
    batch: int
    groups: int = 1
    scale_factor: int = 1
    normalization: str | None = None
    channel_filters: bool = False
    offsets: bool = False
    cpu_batch: int | None = None  # None: the same
    on_cpu: bool = True  # False: too large for one

    @property
    def name(self) -> str:
        """For example "56x56 64 in 4 groups 7x7" or "50x76 256 5x5 to 2 times the size"."""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        scale = f" to {self.scale_factor} times the size" if self.scale_factor > 1 else ""
        offsets = " with offsets" if self.offsets else ""
        return f"{self.height}x{self.width} {self.channels}{groups} {self.kernel}x{self.kernel}{scale}{offsets}"

    @property
    def padding(self) -> int:
        """What keeps the output, before it is scaled, the size of the input."""
        return self.kernel // 2

    @property
    def taps(self) -> int:
        """Weights of a filter."""
        return self.kernel**2

    @property
    def size(self) -> tuple[int, int]:
        """Of the output."""
        return self.height * self.scale_factor, self.width * self.scale_factor

    def batch_on(self, device: str) -> int:
        """Samples of a call on "cpu" or "cuda"."""
        return self.cpu_batch or self.batch if device == "cpu" else self.batch


def kept_groups(batch: int, channels: int, size: int, rate: float, generator: torch.Generator) -> Tensor:
    """bool [batch, channels]: of each sample's groups of `size` channels the same number, at random ones.

    At least one where the rate is above zero.
    """
    groups = math.ceil(channels / size)
    number = max(1, round(rate * groups)) if rate > 0 else 0
    order = torch.rand(batch, groups, generator=generator).argsort(1)
    return (order < number).repeat_interleave(size, 1)[:, :channels]


def _resnet50() -> tuple[Layer | Block, ...]:
    """The 3x3 layers of the bottlenecks, and a 1x1 layer of each stage."""
    spatial = ((56, 64), (28, 128), (14, 256), (7, 512))
    pointwise = ((56, 64, 256), (28, 512, 128), (14, 1024, 256), (7, 2048, 512))
    return (
        *(Layer("resnet50", size, size, channels, channels, 3) for size, channels in spatial),
        *(Layer("resnet50", size, size, cin, cout, 1) for size, cin, cout in pointwise),
        *(Block("resnet50", "bottleneck", size, size, 4 * channels) for size, channels in spatial),
    )


def _sige_ddpm() -> tuple[Layer, ...]:
    """Image editing with a diffusion model (SIGE): one patch changes, the cached outputs follow."""
    return tuple(
        Layer("sige-ddpm", size, size, channels, channels, 3, "patch", (0.15, 0.05, 0.012), 1)
        for size, channels in ((256, 128), (128, 128), (64, 256))
    )


def _sbnet() -> tuple[Layer | Block, ...]:
    """Bottlenecks over a bird's-eye view (SBNet): one rectangle, published sparsities 0.6 to 0.99.

    Whole blocks in inference alone, which is what the network is for: to check a training step at 400x700 takes a
    minute and 20 GB.
    """
    maps = ((400, 700, 256, 64), (200, 350, 512, 128), (100, 175, 1024, 256), (50, 88, 2048, 512))
    masks = ("rectangle", (0.4, 0.1, 0.01), 1)
    return (
        *(
            Layer("sbnet", height, width, cin, cout, kernel, *masks)
            for height, width, channels, inner in maps
            for cin, cout, kernel in ((channels, inner, 1), (inner, inner, 3))
        ),
        *(
            Block("sbnet", "bottleneck", height, width, channels, *masks, inference=True)
            for height, width, channels, _ in maps
        ),
    )


def _inverted(
    family: str, maps: tuple[tuple[int, int], ...], batch: int, inference: bool = False
) -> tuple[Layer | Block, ...]:
    """The 3x3 layers of inverted residuals, expansion 6, and the whole blocks, over maps of (size, channels)."""
    return (
        *(
            Layer(family, size, size, 6 * channels, 6 * channels, 3, batch=batch, groups=6 * channels)
            for size, channels in maps
        ),
        *(Block(family, "inverted", size, size, channels, batch=batch, inference=inference) for size, channels in maps),
    )


def _lasnet() -> tuple[Layer | Block, ...]:
    """LASNet: RegNetY-800MF's 3x3 layers in groups of 16 channels; ResNet-101's bottlenecks, masks 4-4-2-1 coarser."""
    return (
        *(
            Layer("lasnet", size, size, channels, channels, 3, groups=channels // 16)
            for size, channels in ((56, 64), (28, 128), (14, 288), (7, 672))
        ),
        *(
            Block("lasnet", "bottleneck", size, size, channels, granularity=cell)
            for size, channels, cell in ((56, 256, 4), (28, 512, 4), (14, 1024, 2), (7, 2048, 1))
        ),
    )


def _laudnet() -> tuple[Width, ...]:
    """LAUDNet's channel mode: the bottlenecks' 3x3 layers and a 1x1 layer, channel groups of 16, 32, 8 and 1."""
    shapes = ((56, 64, 3), (28, 128, 3), (14, 256, 3), (7, 512, 3), (28, 256, 1))
    return tuple(
        Width(f"laudnet groups of {group}", size, size, channels, channels, kernel, group)
        for group in (16, 32, 8, 1)
        for size, channels, kernel in shapes
    )


def _linear() -> tuple[Width, ...]:
    """Fully connected layers with dropped neurons, in groups and one by one."""
    return tuple(
        Width(f"linear groups of {group}", 1, 1, width, width, 1, group, 64, linear=True)
        for group in (16, 1)
        for width in (4096, 1024)
    )


def hourglass(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of an hourglass's blocks in the order they run: beside the pooling, then before, inside and after."""
    inside = hourglass(sizes[1:]) if len(sizes) > 2 else (sizes[1],)
    return (sizes[0], sizes[1], *inside, sizes[1])


# DynConv's pose network of the published s = 0.125 model: a block, then four times an hourglass and a block. Weighted
# with the sites, the published densities of its 57 blocks make 15.95 % in that order; 15.9 % is what was published.
POSE_SIZES = (64, *4 * (*hourglass((64, 32, 16, 8, 4)), 64))
POSE_DENSITIES = tuple(
    percent / 100
    for percent in (
        11, 6, 0, 58, 0, 75, 77, 72, 64, 63, 80, 97, 62, 37, 26, 1, 21, 25, 33, 42, 66, 31, 61, 46, 87, 97, 42, 31, 22,
        1, 14, 18, 27, 31, 32, 27, 59, 45, 95, 50, 34, 31, 21, 0, 4, 10, 28, 15, 29, 26, 51, 47, 58, 44, 20, 21, 13,
    )
)  # fmt: skip


def modes_of(layer: Layer | Block | Width | Filter, modes: Sequence[str]) -> list[str]:
    """Those of some modes in which a layer is measured."""
    if isinstance(layer, (Width, Filter)):
        return [mode for mode in modes if mode != "in-place"]
    return [mode for mode in modes if not (layer.inference and mode == "backward")]


# DynConv's training batch is 32, for pose estimation as published; its MobileNetV2 layers are measured at the same.
LAYERS: dict[str, tuple[Layer | Block | Width, ...]] = {
    "resnet50": _resnet50(),
    "mobilenetv2": _inverted("mobilenetv2", ((56, 24), (28, 32), (14, 64), (14, 96), (7, 160)), 32),
    # Blocks in inference alone: to check a training step at 64x64 and batch 32 takes 20 GB.
    "dynconv-pose": _inverted("dynconv-pose", ((64, 96), (32, 96), (16, 96), (8, 96), (4, 96)), 32, inference=True),
    "lasnet": _lasnet(),
    "sige-ddpm": _sige_ddpm(),
    "sbnet": _sbnet(),
    "laudnet": _laudnet(),
    "linear": _linear(),
    # Of no network: a layer of each kind, to see in seconds, or interpreted, that everything runs. Not in "all".
    "tiny": (
        Layer("tiny", 6, 5, 16, 16, 3, batch=1),
        Layer("tiny", 6, 5, 8, 8, 3, batch=1, groups=8),
        Width("tiny", 5, 4, 16, 32, 1, 8, 2, (0.5,)),
    ),
}

# RedNet-50's stages; DDF's two settings; CARAFE in a feature pyramid; DCNv4's table, 4 groups of 16 channels.
FILTERS: dict[str, tuple[Filter, ...]] = {
    "involution": tuple(
        Filter("involution", size, size, channels, 7, 64, groups=channels // 16, cpu_batch=8)
        for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512))
    ),
    "ddf": (
        Filter("ddf", 200, 300, 256, 3, 2, channel_filters=True),
        *(
            Filter("ddf", size, size, 256, 3, 32, channel_filters=True, on_cpu=size <= 56)
            for size in (224, 112, 56, 28, 14, 7)
        ),
    ),
    "carafe": tuple(
        Filter("carafe", height, width, 256, 5, 2, scale_factor=2, normalization="softmax", cpu_batch=1)
        for height, width in ((25, 38), (50, 76), (100, 152))
    ),
    "tiny": (Filter("tiny", 5, 4, 8, 3, 1, groups=2), Filter("tiny", 5, 4, 8, 3, 1, groups=2, offsets=True)),
    "dcn": tuple(Filter("dcn", size, size, 64, 3, 64, groups=4, offsets=True, cpu_batch=8) for size in (56, 28, 14, 7)),
}


MASKS = {"blob": blob_mask, "random": random_mask}


def patch(height: int, width: int, share: float) -> Tensor:
    """[1, 1, height, width]: a centred rectangle of the image's own proportions that covers `share` of it."""
    rows, columns = (max(1, round(length * math.sqrt(share))) for length in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    mask[:, :, top : top + rows, left : left + columns] = True
    return mask


def reached(changed: Tensor, kernel: int, stride: int = 1) -> Tensor:
    """The outputs of a "same"-padded convolution that read a changed input: bool [N, 1, H, W] -> [N, 1, Ho, Wo].

    An output changes if any of its taps does, which is max pooling with the convolution's own geometry.
    """
    return F.max_pool2d(changed.float(), kernel, stride, kernel // 2).bool()
