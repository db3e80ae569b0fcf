"""What the residual blocks share: the chain of convolutions, its shortcut, and where a dense block has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._geometry import Geometry
from ..reference import ACTIVATIONS
from ..sites import ActiveSites
from .gathered_conv import GatheredConv2d
from .masked_conv import MaskedConv2d
from .normalization import uses_batch_statistics

_ACTIVATION_MODULES = {
    nn.Identity: None,
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}


class Stage(NamedTuple):
    """A convolution, its normalisation and its activation: the paths of the two modules in the block, and a name."""

    conv: str
    norm: str | None
    activation: str | None


class ResidualBlock(nn.Module):
    """A chain of convolutions with a shortcut, over the children of the dense block.

    Args:
        stages: the convolutions in order.
        shortcut: "identity", the path of the module that makes it from the input, or None.
        activation: after the shortcut has been added.
        statistics: of batch normalisation in training: "active", of what is computed, or "dense", of everything.
    """

    def __init__(self, stages: Iterable[Stage], shortcut: str | None, activation: str | None, statistics: str) -> None:
        super().__init__()
        if statistics not in ("active", "dense"):
            raise ValueError(f"statistics: expected 'active' or 'dense', got {statistics!r}")
        self.stages = tuple(stages)
        self.shortcut = shortcut
        self.activation = activation
        self.statistics = statistics
        self._kept: tuple[list, list, list] | None = None

    def _prepare(self, stage: Stage, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, used: str):
        """What inference on the backend `used` keeps of a stage."""
        raise RuntimeError(f"{type(self).__name__} does not say what to keep of a stage")

    def _frozen(self, input: Tensor, used: str) -> list | None:
        """In inference, what `_prepare` makes of each stage, which is kept until a parameter or a statistic changes.

        None where a gradient, autocast, a compiler or the batch's own statistics stand against it.
        """
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type) or needs_grad(input):
            return None
        layers, key, held = [], [used], []
        for stage in self.stages:
            conv, norm = self._submodule(stage.conv), self._norm(stage)
            operands = _operands(conv, norm)
            if conv.weight.dtype != input.dtype or (norm is not None and uses_batch_statistics(norm)):
                return None
            if needs_grad(*operands) or any(t is not None and t.is_inference() for t in operands):
                return None
            eps = None if norm is None else norm.eps
            where = (conv.stride, conv.padding, conv.dilation, conv.groups, eps)
            key.append((where, [None if t is None else (t.data_ptr(), t._version) for t in operands]))
            held += operands
        if self._kept is None or self._kept[0] != key:
            with torch.no_grad():
                for stage in self.stages:
                    conv, norm = self._submodule(stage.conv), self._norm(stage)
                    layers.append(self._prepare(stage, conv, norm, used))
            # Held, so that no other tensor can come to lie at their addresses.
            self._kept = key, layers, [None if t is None else t.detach() for t in held]
        return self._kept[1]

    def _computed(self, sites: ActiveSites, sizes: list, geometries: list[Geometry]) -> list[ActiveSites]:
        """The sites that each stage computes: the last one `sites`, the others what the next one reads.

        `sizes`: (H, W) of the input and of each stage's output.
        """
        computed = [sites]
        for size, geometry in zip(sizes[-2:0:-1], geometries[:0:-1], strict=True):
            later = computed[0]
            pointwise = geometry.kernel == geometry.stride == (1, 1) and later.shape[1:] == size
            computed.insert(0, later.ungated if pointwise else later._touched_by(size, geometry))
        return computed

    def _submodule(self, path: str) -> nn.Module:
        module = self
        for name in path.split("."):
            module = module._modules[name]
        return module

    def _norm(self, stage: Stage) -> nn.BatchNorm2d | None:
        return None if stage.norm is None else self._submodule(stage.norm)

    def _uses_batch_statistics(self, stage: Stage) -> bool:
        norm = self._norm(stage)
        return norm is not None and uses_batch_statistics(norm)

    def _dense(self, input: Tensor) -> Tensor:
        shortcut = None if self.shortcut is None else self._dense_shortcut(input)
        branch = self._dense_branch(input)
        return branch if shortcut is None else ACTIVATIONS[self.activation](branch + shortcut)

    def _dense_branch(self, input: Tensor) -> Tensor:
        """All stages at all sites. In the last one the activation waits for the shortcut, if there is one."""
        for stage in self.stages:
            conv, norm = self._submodule(stage.conv), self._norm(stage)
            input = nn.Conv2d.forward(conv, input)
            if norm is not None:
                input = nn.BatchNorm2d.forward(norm, input)
            input = ACTIVATIONS[stage.activation](input)
        return input

    def _dense_shortcut(self, input: Tensor) -> Tensor:
        return input if self.shortcut == "identity" else self._submodule(self.shortcut)(input)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}

    @classmethod
    def _share(cls, module: nn.Module, stages: list[Stage], shortcut, activation, statistics: str) -> ResidualBlock:
        """A block over the very children of a dense block."""
        block = cls.__new__(cls)
        ResidualBlock.__init__(block, stages, shortcut, activation, statistics)
        for name, child in module.named_children():
            block.add_module(name, child)
        return block.train(module.training)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def geometry_of(conv: nn.Conv2d) -> Geometry:
    return Geometry.of(conv.kernel_size, conv.stride, conv.padding, conv.dilation)


def _operands(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> list[Tensor | None]:
    if norm is None:
        return [conv.weight, conv.bias]
    return [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """The convolution's weight and bias with the normalisation by running statistics folded in."""
    if norm is None:
        return conv.weight, conv.bias
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = (conv.weight * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype)
    return weight.contiguous(memory_format=torch.channels_last), shift.to(weight.dtype)


def _activation_of(module: nn.Module | None, where: str) -> str | None:
    """The name of an activation module."""
    if module is None:
        return None
    if type(module) not in _ACTIVATION_MODULES or getattr(module, "approximate", "none") != "none":
        known = ", ".join(kind.__name__ for kind in _ACTIVATION_MODULES)
        raise ValueError(f"module: expected {where} to be one of {known} (GELU in its exact form), got {module}")
    return _ACTIVATION_MODULES[type(module)]


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def refuse(module: nn.Module, *names: str) -> None:
    """Raise where a block has parts that look at all sites, or that drop whole samples."""
    for name in names:
        part = getattr(module, name, None)
        if not _is_identity(part) and getattr(part, "drop_prob", None) != 0:
            raise ValueError(f"module: expected a block without `{name}`, which has no sparse form, got {part}")


def stage_of(module: nn.Module, conv: str, norm: str | None, activation: nn.Module | None) -> Stage:
    convolution = module.get_submodule(conv)
    if type(convolution) not in (nn.Conv2d, MaskedConv2d, GatheredConv2d) or convolution.padding_mode != "zeros":
        raise ValueError(f"module: expected `{conv}` to be an nn.Conv2d with zero padding, got {convolution}")
    name = _activation_of(activation, f"the activation after `{conv}`")
    if norm is None or _is_identity(module.get_submodule(norm)):
        return Stage(conv, None, name)
    normalisation = module.get_submodule(norm)
    if not isinstance(normalisation, nn.BatchNorm2d):
        raise ValueError(f"module: expected `{norm}` to be an nn.BatchNorm2d, got {normalisation}")
    # timm's BatchNormAct2d holds the activation, and a dropout in front of it.
    if not _is_identity(getattr(normalisation, "drop", None)):
        raise ValueError(f"module: expected `{norm}` without dropout, got {normalisation}")
    own = _activation_of(getattr(normalisation, "act", None), f"`{norm}.act`")
    if own is not None and name is not None:
        raise ValueError(f"module: expected one activation after `{conv}`, got {own} and {name}")
    return Stage(conv, norm, own or name)


def require(module: nn.Module, kind: str, *names: str) -> None:
    missing = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        raise TypeError(
            f"module: expected a {kind} of torchvision or timm, got {type(module).__name__} without "
            f"{', '.join(missing)}"
        )


class ResNetBlock(ResidualBlock):
    """What the blocks of ResNet share: stages conv1, bn1, conv2, bn2, … and `downsample`."""

    _convolutions = 2
    kind = "BasicBlock"

    @classmethod
    def from_dense(cls, module: nn.Module, *, statistics: str = "active") -> ResidualBlock:
        """A block over the children of torchvision's or timm's block of that name; they are shared, not copied.

        Raises TypeError where `module` lacks the block's parts, ValueError where it has others that have no masked
        form (squeeze-and-excitation, anti-aliasing, drop path, dropped blocks).
        """
        count = cls._convolutions
        names = [name for i in range(1, count + 1) for name in (f"conv{i}", f"bn{i}")]
        require(module, cls.kind, *names)
        if count == 2 and hasattr(module, "conv3"):
            raise TypeError(f"module: expected a block of two convolutions, got {type(module).__name__} with conv3")
        refuse(module, "aa", "se", "drop_block", "drop_path")
        activations = [getattr(module, f"act{i}", getattr(module, "relu", None)) for i in range(1, count + 1)]
        stages = [
            stage_of(module, f"conv{i}", f"bn{i}", activations[i - 1] if i < count else None)
            for i in range(1, count + 1)
        ]
        shortcut = "identity" if getattr(module, "downsample", None) is None else "downsample"
        return cls._share(module, stages, shortcut, _activation_of(activations[-1], "the last one"), statistics)

    def _build(self, convolutions: list[nn.Conv2d], norm_layer, downsample) -> None:
        for i, conv in enumerate(convolutions, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm_layer(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @classmethod
    def _stages(cls) -> list[Stage]:
        last = cls._convolutions
        return [Stage(f"conv{i}", f"bn{i}", "relu" if i < last else None) for i in range(1, last + 1)]


class BasicBlock(ResNetBlock):
    """Two 3x3 convolutions: ResNet-18 and 34."""

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: Callable[..., nn.Module] | None = None, *,
        statistics: str = "active",
    ) -> None:  # fmt: skip
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError("groups, base_width, dilation: expected 1, 64 and 1 in a BasicBlock")
        super().__init__(self._stages(), "identity" if downsample is None else "downsample", "relu", statistics)
        first = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        second = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self._build([first, second], norm_layer or nn.BatchNorm2d, downsample)


class Bottleneck(ResNetBlock):
    """1x1, 3x3 and 1x1: ResNet-50 and up, ResNeXt, Wide ResNet."""

    expansion = 4
    _convolutions = 3
    kind = "Bottleneck"

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: Callable[..., nn.Module] | None = None, *,
        statistics: str = "active",
    ) -> None:  # fmt: skip
        super().__init__(self._stages(), "identity" if downsample is None else "downsample", "relu", statistics)
        width = int(planes * (base_width / 64.0)) * groups
        convolutions = [
            nn.Conv2d(inplanes, width, 1, bias=False),
            nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False),
            nn.Conv2d(width, planes * self.expansion, 1, bias=False),
        ]
        self._build(convolutions, norm_layer or nn.BatchNorm2d, downsample)


def flat_stages(module: nn.Module, path: str) -> list[Stage]:
    """The stages of nested Sequentials of convolutions, each with its normalisation and activation behind it."""
    leaves = []

    def visit(name: str, child: nn.Module) -> None:
        if isinstance(child, nn.Sequential):
            for key, grandchild in child.named_children():
                visit(f"{name}.{key}", grandchild)
        else:
            leaves.append((name, child))

    visit(path, module.get_submodule(path))
    stages = []
    while leaves:
        conv, child = leaves.pop(0)
        if not isinstance(child, nn.Conv2d):
            raise ValueError(f"module: expected a convolution at `{conv}`, got {child}, which has no sparse form")
        norm = leaves.pop(0)[0] if leaves and isinstance(leaves[0][1], nn.BatchNorm2d) else None
        activation = leaves.pop(0)[1] if leaves and type(leaves[0][1]) in _ACTIVATION_MODULES else None
        stages.append(stage_of(module, conv, norm, activation))
    return stages
