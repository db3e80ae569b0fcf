"""Residual blocks at active sites: features stay packed from the first convolution to the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import calibration
from .._backend import backend_for
from .._geometry import Geometry
from ..ops._common import activate_, gate_of, settle
from ..ops.masked_chain import Layer, masked_chain, prepare
from ..ops.masked_conv import masked_conv2d
from ..reference import ACTIVATIONS
from ..sites import ActiveSites
from .masked_conv import MaskedConv2d
from .normalization import batch_norm, uses_batch_statistics

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


class MaskedBlock(nn.Module):
    """A chain of convolutions with a shortcut, computed at the active sites of its output.

    `block(x, mask)` is `where(mask, block(x), shortcut)`, in which the shortcut is `x`, the result of the block's
    `downsample`, or zeros where the block has neither: the masks of DynConv (Verelst & Tuytelaars, CVPR 2020). Each
    convolution is computed at the sites that the next one reads and nowhere else. A floating mask is a gate: it
    multiplies the branch before the shortcut is added, and gets a gradient.

    In training, batch normalisation takes its statistics over the sites that its convolution computed (`statistics`
    "active"), or over all sites ("dense"), which costs what the dense block does and equals it exactly. In eval mode
    it is folded into the convolutions.

    Children and `state_dict` are those of the dense block. Without a mask the block is that dense block.
    """

    def __init__(self, stages: Iterable[Stage], shortcut: str | None, activation: str | None, statistics: str) -> None:
        super().__init__()
        if statistics not in ("active", "dense"):
            raise ValueError(f"statistics: expected 'active' or 'dense', got {statistics!r}")
        self.stages = tuple(stages)
        self.shortcut = shortcut  # "identity", the path of a module, or None
        self.activation = activation  # after the shortcut has been added
        self.statistics = statistics
        self._kept: tuple[list, list[Layer], list] | None = None

    def forward(self, input: Tensor, mask: Tensor | ActiveSites | None = None, *, inplace: bool = False) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, Ho, Wo] in channels_last.

        Args:
            input: the features, best in channels_last.
            mask: bool or floating, broadcastable to [N, 1, Ho, Wo], or ActiveSites of that size; None computes all.
            inplace: inference only, for blocks whose shortcut is the input: update `input` itself, at the active
                sites alone, and return it. The cost is then proportional to the active sites.

        Raises ValueError where `inplace` is not possible, and what `dynconv.masked_conv2d` does.
        """
        if mask is None:
            return self._dense(input)
        if inplace:
            self._check_inplace(input)
        used = backend_for(input.device)
        layers = None if used == "reference" else self._frozen(input, used)
        if layers is None:
            geometries = [_geometry(self._submodule(stage.conv)) for stage in self.stages]
        else:
            geometries = [layer.geometry for layer in layers]
        sizes = [tuple(input.shape[2:])]
        for geometry in geometries:
            sizes.append(geometry.output_size(*sizes[-1]))
        sites = mask if isinstance(mask, ActiveSites) else ActiveSites(mask, (input.shape[0], *sizes[-1]))
        if self.statistics == "dense" and any(self._uses_batch_statistics(stage) for stage in self.stages):
            return self._masked_dense(input, sites)
        features = input.contiguous(memory_format=torch.channels_last)
        if layers is None or _needs_grad(sites.gate):
            return self._packed(features, layers, sites, sizes, geometries, inplace)
        _check_sites(sites, input, layers)
        call = _BlockCall(self, features, layers, sites, inplace, used, (sizes, geometries))
        return calibration.run(calibration.mode(), call)

    def _packed(
        self, features, layers: list[Layer] | None, sites: ActiveSites, sizes: list, geometries: list, inplace: bool
    ) -> Tensor:
        """Stage by stage: features are packed from the first convolution to the last."""
        computed = [sites]
        for size, geometry in zip(sizes[-2:0:-1], geometries[:0:-1], strict=True):
            later = computed[0]
            pointwise = geometry.kernel == geometry.stride == (1, 1) and later.shape[1:] == size
            computed.insert(0, later.ungated if pointwise else later._touched_by(size, geometry))
        last = len(self.stages) - 1
        finish = self._finish(features, inplace)
        on_cpu = features.device.type == "cpu" and backend_for(features.device) == "cpu"
        for number, active in enumerate(computed):
            after = finish if number == last else {"activation": self.stages[number].activation}
            layer = None if layers is None or on_cpu else layers[number]  # the CPU's are for its one kernel
            features = self._run(self.stages[number], layer, features, active, packed=number < last, **after)
        return features

    def _frozen(self, input: Tensor, used: str) -> list[Layer] | None:
        """In inference, the layers with normalisation folded in; else None.

        They are kept, and made anew when a parameter or a statistic has changed.
        """
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type) or _needs_grad(input):
            return None
        layers, key, held = [], [used], []
        for stage in self.stages:
            conv, norm = self._submodule(stage.conv), self._norm(stage)
            operands = _operands(conv, norm)
            if conv.weight.dtype != input.dtype or (norm is not None and uses_batch_statistics(norm)):
                return None
            if _needs_grad(*operands) or any(t is not None and t.is_inference() for t in operands):
                return None
            eps = None if norm is None else norm.eps
            where = (conv.stride, conv.padding, conv.dilation, conv.groups, eps)
            key.append((where, [None if t is None else (t.data_ptr(), t._version) for t in operands]))
            held += operands
        if self._kept is None or self._kept[0] != key:
            with torch.no_grad():
                for stage in self.stages:
                    conv, norm = self._submodule(stage.conv), self._norm(stage)
                    weight, bias = fold(conv, norm)
                    if used == "cpu":
                        made = prepare(weight, bias, conv.groups)
                    else:
                        made = _as_read(weight, conv.groups), bias
                    layers.append(Layer(weight, made, _geometry(conv), conv.groups, stage.activation))
            if self.shortcut is not None:
                layers[-1] = layers[-1]._replace(activation=self.activation)
            # Held, so that no other tensor can come to lie at their addresses.
            self._kept = key, layers, [None if t is None else t.detach() for t in held]
        return self._kept[1]

    def _chain(self, input: Tensor, layers: list[Layer], sites: ActiveSites, inplace: bool) -> Tensor:
        """In one kernel, on the CPU."""
        if inplace:
            return masked_chain(input, layers, sites, inplace=True)
        shortcut = None if self.shortcut is None else self._dense_shortcut(input)
        return masked_chain(input, layers, sites, residual=shortcut, inactive=shortcut)

    def _run(self, stage: Stage, layer: Layer | None, features, sites: ActiveSites, **finish):
        conv, norm = self._submodule(stage.conv), self._norm(stage)
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if layer is not None:
            return masked_conv2d(features, *layer.prepared, *geometry, mask=sites, **finish)
        if norm is None or not uses_batch_statistics(norm):
            return masked_conv2d(features, *fold(conv, norm), *geometry, mask=sites, **finish)
        features = masked_conv2d(features, conv.weight, conv.bias, *geometry, mask=sites.ungated, packed=True)
        return batch_norm(norm, features._replace(sites=sites), **finish)

    def _finish(self, input: Tensor, inplace: bool) -> dict:
        """What the last convolution does with the shortcut."""
        last = self.stages[-1].activation
        if self.shortcut is None:
            return {"activation": last}
        if inplace:
            return {"activation": self.activation, "residual": input, "out": input}
        shortcut = input if self.shortcut == "identity" else self._submodule(self.shortcut)(input)
        return {"activation": self.activation, "residual": shortcut, "inactive": shortcut}

    def _check_inplace(self, input: Tensor) -> None:
        if self.shortcut != "identity":
            raise ValueError("inplace: expected a block whose shortcut is its input, got one that changes its shape")
        if torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise ValueError("inplace: expected torch.no_grad() (it is for inference only)")
        if any(self._uses_batch_statistics(stage) for stage in self.stages):
            raise ValueError("inplace: expected a block in eval mode (it is for inference only)")
        if not input.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"inplace: expected a channels_last input, got strides {list(input.stride())}")

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

    def _masked_dense(self, input: Tensor, sites: ActiveSites) -> Tensor:
        shortcut = None if self.shortcut is None else self._dense_shortcut(input)
        branch = self._dense_branch(input)
        if sites.gate is not None:
            branch = branch * sites.gate.to(branch.dtype)
        if shortcut is not None:
            branch = ACTIVATIONS[self.activation](branch + shortcut)
        return torch.where(sites.mask, branch, 0 if shortcut is None else shortcut)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}

    @classmethod
    def _share(cls, module: nn.Module, stages: list[Stage], shortcut, activation, statistics: str) -> MaskedBlock:
        """A block over the very children of a dense block."""
        block = cls.__new__(cls)
        MaskedBlock.__init__(block, stages, shortcut, activation, statistics)
        for name, child in module.named_children():
            block.add_module(name, child)
        return block.train(module.training)


class _BlockCall:
    """A block in inference, as `dynconv.calibration.Call`."""

    def __init__(self, block, input: Tensor, layers: list[Layer], sites: ActiveSites, inplace, used, shapes) -> None:
        self.block, self.input, self.layers, self.active = block, input, layers, sites
        self.inplace, self.used, self.shapes = inplace, used, shapes

    @property
    def has_choice(self) -> bool:
        """F.conv2d pads both sides alike."""
        return all(layer.geometry.padding == layer.geometry.padding_end for layer in self.layers)

    def key(self) -> tuple:
        block, layers = self.block, []
        for layer in self.layers:
            where = [*layer.geometry.stride, *layer.geometry.padding, *layer.geometry.dilation]
            layers.append(f"{list(layer.weight.shape)} {where} {layer.groups} {layer.activation}")
        what = "block in place" if self.inplace else "block"
        gated = self.active.gate is not None
        shape = (self.used, str(self.input.dtype), *self.input.shape)
        return what, *shape, "; ".join(layers), block.shortcut is None, block.shortcut == "identity", gated

    def name(self) -> str:
        samples, channels, height, width = self.input.shape
        what = [f"{type(self.block).__name__} {height}x{width} {channels}->{self.layers[-1].weight.shape[0]}"]
        what += [f"batch {samples}", str(self.input.dtype)[6:]] + ["in place"] * self.inplace
        return ", ".join(what + ["gate"] * (self.active.gate is not None))

    def sparse(self) -> Tensor:
        if self.used == "cpu":
            return self.block._chain(self.input, self.layers, self.active, self.inplace)
        return self.block._packed(self.input, self.layers, self.active, *self.shapes, self.inplace)

    def dense(self) -> Tensor:
        with torch.no_grad():
            value = self.input
            for layer in self.layers:
                weight, bias, where = layer.weight, layer.prepared[1], layer.geometry
                bias = None if bias is None else bias.to(weight.dtype)
                value = F.conv2d(value, weight, bias, where.stride, where.padding, where.dilation, layer.groups)
                if layer is not self.layers[-1]:
                    value = activate_(value, layer.activation)
            shortcut = None if self.block.shortcut is None else self.block._dense_shortcut(self.input)
            sites, out = self.active, self.input if self.inplace else None
            inactive = None if self.inplace else shortcut
            gate = gate_of(sites, value.dtype)
            activation = self.layers[-1].activation
            return settle(value, sites, gate, shortcut, inactive, activation, out)

    def at(self, density: float) -> _BlockCall:
        sites = calibration.sites_at(density, self.active.mask)
        if self.active.gate is not None:
            sites.gate = sites.mask.to(self.active.gate.dtype)
        input = self.input.clone(memory_format=torch.preserve_format)
        return _BlockCall(self.block, input, self.layers, sites, self.inplace, self.used, self.shapes)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _geometry(conv: nn.Conv2d) -> Geometry:
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


def _as_read(weight: Tensor, groups: int) -> Tensor:
    """A depthwise weight in the memory order that the Triton kernels read, taps before channels."""
    if groups == 1 or weight.shape[1] > 1:
        return weight
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def _check_sites(sites: ActiveSites, input: Tensor, layers: list[Layer]) -> None:
    """What `masked_conv2d` checks of its operands."""
    channels = layers[0].weight.shape[1] * layers[0].groups
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(f"input: expected shape [N, {channels}, H, W], got {list(input.shape)}")
    size = tuple(input.shape[2:])
    for layer in layers:
        size = layer.geometry.output_size(*size)
    if sites.shape != (input.shape[0], *size):
        raise ValueError(f"mask: expected sites of {[input.shape[0], *size]} (N, Ho, Wo), got {list(sites.shape)}")
    if sites.mask.device != input.device:
        raise ValueError(f"mask: expected a mask on {input.device}, where the input is, got {sites.mask.device}")


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


def _refuse(module: nn.Module, *names: str) -> None:
    """Raise where a block has parts that look at all sites, or that drop whole samples."""
    for name in names:
        part = getattr(module, name, None)
        if not _is_identity(part) and getattr(part, "drop_prob", None) != 0:
            raise ValueError(f"module: expected a block without `{name}`, which has no masked form, got {part}")


def _stage(module: nn.Module, conv: str, norm: str | None, activation: nn.Module | None) -> Stage:
    convolution = module.get_submodule(conv)
    if type(convolution) not in (nn.Conv2d, MaskedConv2d) or convolution.padding_mode != "zeros":
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


def _require(module: nn.Module, kind: str, *names: str) -> None:
    missing = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        raise TypeError(
            f"module: expected a {kind} of torchvision or timm, got {type(module).__name__} without "
            f"{', '.join(missing)}"
        )


class _ResNetBlock(MaskedBlock):
    """What the blocks of ResNet share: stages conv1, bn1, conv2, bn2, … and `downsample`."""

    _convolutions = 2

    @classmethod
    def from_dense(cls, module: nn.Module, *, statistics: str = "active") -> MaskedBlock:
        """A masked block over the children of torchvision's or timm's block of that name; they are shared, not copied.

        Raises TypeError where `module` lacks the block's parts, ValueError where it has others that have no masked
        form (squeeze-and-excitation, anti-aliasing, drop path, dropped blocks).
        """
        count = cls._convolutions
        names = [name for i in range(1, count + 1) for name in (f"conv{i}", f"bn{i}")]
        _require(module, cls.__name__.replace("Masked", ""), *names)
        if count == 2 and hasattr(module, "conv3"):
            raise TypeError(f"module: expected a block of two convolutions, got {type(module).__name__} with conv3")
        _refuse(module, "aa", "se", "drop_block", "drop_path")
        activations = [getattr(module, f"act{i}", getattr(module, "relu", None)) for i in range(1, count + 1)]
        stages = [
            _stage(module, f"conv{i}", f"bn{i}", activations[i - 1] if i < count else None) for i in range(1, count + 1)
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


class MaskedBasicBlock(_ResNetBlock):
    """The block of ResNet-18 and 34 (He et al., CVPR 2016) at active sites: 3x3, 3x3; see `MaskedBlock`.

    The constructor is torchvision's `BasicBlock`, with `statistics` ("active" or "dense") beside it.
    """

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


class MaskedBottleneck(_ResNetBlock):
    """The bottleneck of ResNet-50 and up, ResNeXt and Wide ResNet at active sites: 1x1, 3x3, 1x1; see `MaskedBlock`.

    The constructor is torchvision's `Bottleneck` (the stride is in the 3x3), with `statistics` beside it.
    """

    expansion = 4
    _convolutions = 3

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


class MaskedInvertedResidual(MaskedBlock):
    """The inverted residual of MobileNetV2 (Sandler et al., CVPR 2018) at active sites: 1x1, depthwise 3x3, 1x1.

    See `MaskedBlock`. The constructor is torchvision's `InvertedResidual`, with `statistics` beside it.
    """

    def __init__(
        self, inp: int, oup: int, stride: int, expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None, *, statistics: str = "active",
    ) -> None:  # fmt: skip
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
        norm_layer = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)

        def unit(cin: int, cout: int, *geometry: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(cin, cout, *geometry, bias=False), norm_layer(cout), nn.ReLU6(inplace=True))

        units = [] if expand_ratio == 1 else [unit(inp, hidden, 1)]
        units.append(unit(hidden, hidden, 3, stride, 1, 1, hidden))
        stages = [Stage(f"conv.{i}.0", f"conv.{i}.1", "relu6") for i in range(len(units))]
        stages.append(Stage(f"conv.{len(units)}", f"conv.{len(units) + 1}", None))
        shortcut = "identity" if stride == 1 and inp == oup else None
        super().__init__(stages, shortcut, None, statistics)
        self.conv = nn.Sequential(*units, nn.Conv2d(hidden, oup, 1, bias=False), norm_layer(oup))

    @classmethod
    def from_dense(cls, module: nn.Module, *, statistics: str = "active") -> MaskedBlock:
        """A masked block over the children of a dense one; they are shared, not copied.

        Takes the `InvertedResidual` of torchvision (MobileNetV2, and MobileNetV3 without squeeze-and-excitation) and of
        timm, and timm's `DepthwiseSeparableConv`. Raises TypeError where `module` is none of these, ValueError where
        it has parts that have no masked form.
        """
        _refuse(module, "aa", "se", "drop_path", "conv_s2d")
        if isinstance(getattr(module, "conv_dw", None), nn.Module):
            pairs = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
            if not hasattr(module, "conv_pwl"):
                pairs = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
            _require(module, "InvertedResidual", *(name for pair in pairs for name in pair))
            stages = [_stage(module, conv, norm, None) for conv, norm in pairs]
            has_skip = getattr(module, "has_skip", False)
        else:
            path = next(
                (name for name in ("conv", "block") if isinstance(getattr(module, name, None), nn.Sequential)), ""
            )
            if not path:
                raise TypeError(
                    f"module: expected an InvertedResidual of torchvision or timm, got {type(module).__name__}"
                )
            stages = _flat_stages(module, path)
            has_skip = getattr(module, "use_res_connect", False)
        return cls._share(module, stages, "identity" if has_skip else None, None, statistics)


def _flat_stages(module: nn.Module, path: str) -> list[Stage]:
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
            raise ValueError(f"module: expected a convolution at `{conv}`, got {child}, which has no masked form")
        norm = leaves.pop(0)[0] if leaves and isinstance(leaves[0][1], nn.BatchNorm2d) else None
        activation = leaves.pop(0)[1] if leaves and type(leaves[0][1]) in _ACTIVATION_MODULES else None
        stages.append(_stage(module, conv, norm, activation))
    return stages
