"""Residual blocks at active sites: features stay packed from the first convolution to the last."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import calibration
from .._backend import backend_for, in_onnx_export, kept_property, module, unwatched
from .._likeness import Likeness, can_be_like
from ..ops._common import (
    Counted,
    Settled,
    activate_,
    channels_last,
    expanded,
    gate_of,
    in_rows,
    is_autocast,
    settle,
)
from ..ops.epilogue import epilogue
from ..ops.masked_chain import Layer, chain_of, masked_chain, prepare, run_chain
from ..ops.masked_conv import masked_conv2d
from ..packed import PackedFeatures
from ..reference import ACTIVATIONS
from ..sites import ActiveSites
from .normalization import batch_norm, uses_batch_statistics
from .recognition import Chain, Stage
from .residual import (
    BasicBlock,
    Bottleneck,
    ResidualBlock,
    Unchanged,
    check_input,
    computing_once,
    fold,
    geometry_of,
    make_norm,
    needs_grad,
)


class MaskedBlock(ResidualBlock):
    """A chain of convolutions with a shortcut, computed at the active sites of its output.

    `block(x, mask)` is `where(mask, block(x), shortcut)`, in which the shortcut is `x`, the result of the block's
    `downsample`, or zeros where the block has neither: the masks of DynConv (Verelst & Tuytelaars, CVPR 2020). Each
    convolution is computed at the sites that the next one reads and nowhere else. A floating mask is a gate: it
    multiplies the branch before the shortcut is added, and gets a gradient.

    In training, batch normalisation takes its statistics over the sites that its convolution computed (`statistics`
    "active"), or over all sites ("dense"), which costs what the dense block does and equals it exactly. In eval mode
    it is folded into the convolutions.

    Children and `state_dict` are those of the dense block. Without a mask the block is that dense block. `from_dense`
    makes it; the classes derived from it have constructors.

    Example:
        >>> dense = dynconv.nn.MaskedBasicBlock(8, 8)  # or torchvision's, timm's, your own
        >>> block, x = dynconv.nn.MaskedBlock.from_dense(dense).eval(), torch.randn(2, 8, 6, 6)
        >>> mask = torch.rand(2, 1, 6, 6) < 0.5
        >>> with torch.no_grad():
        ...     torch.allclose(block(x, mask), torch.where(mask, block(x), x), atol=1e-4)
        True
    """

    def forward(self, input: Tensor, mask: Tensor | ActiveSites | None = None, *, inplace: bool = False) -> Tensor:
        """Map [N, Cin, H, W] to [N, Cout, Ho, Wo] in channels_last.

        Args:
            input: the features, best in channels_last.
            mask: bool or floating, broadcastable to [N, 1, Ho, Wo], or ActiveSites of that size; None computes all.
            inplace: inference only, for blocks whose shortcut is the input: update `input` itself, at the active
                sites alone, and return it. The cost is then proportional to the active sites.

        Raises TypeError where `input` is no dense tensor, ValueError where `inplace` is not possible or an inner layer
        has hooks that would not run, and what `dynconv.masked_conv2d` does.
        """
        if not torch.compiler.is_compiling() and (kept := self._kept) is not None:
            for passed in kept.passed:
                if passed.is_like(self, input, mask, inplace):
                    return passed(self, input, mask)
        check_input(input)
        if self._check_layers(mask is not None, "mask"):
            with computing_once():
                return self._forward(input, mask, inplace)
        return self._forward(input, mask, inplace)

    def _forward(self, input: Tensor, mask: Tensor | ActiveSites | None, inplace: bool) -> Tensor:
        if inplace:
            self._check_inplace(input)
        if mask is None:
            return input.copy_(self._dense(input)) if inplace else self._dense(input)
        used = backend_for(input.device)
        layers = None if used == "reference" else self._frozen(input, used)
        if layers is None:
            geometries = [geometry_of(self._submodule(stage.conv)) for stage in self.stages]
        else:
            geometries = [layer.geometry for layer in layers]
        sizes = [tuple(input.shape[2:])]
        for geometry in geometries:
            sizes.append(geometry.output_size(*sizes[-1]))
        sites = self._sites(mask, input, sizes[-1])
        if self.statistics == "dense" and any(self._uses_batch_statistics(stage) for stage in self.stages):
            return self._masked_dense(input, sites)
        if in_onnx_export() and not inplace and not any(self._uses_batch_statistics(stage) for stage in self.stages):
            return self._masked_dense(input, sites)  # nothing to pack: a graph of what the dense block has, and a mask
        features = input.contiguous(memory_format=torch.channels_last)
        merges = self._activates_branch  # the gate, too, then multiplies what the epilogue has made
        computed = sites.ungated if merges else sites
        if layers is None or needs_grad(sites.gate):
            output = self._packed(features, layers, computed, sizes, geometries, inplace)
        else:
            _check_channels(input, layers)
            if inplace and (layers[-1].conv.weight.shape[0], *sizes[-1]) != tuple(input.shape[1:]):
                got = [input.shape[0], layers[-1].conv.weight.shape[0], *sizes[-1]]
                raise ValueError(f"inplace: expected an output of the input's shape {list(input.shape)}, got {got}")
            call = _BlockCall(self, features, layers, computed, inplace, used, (sizes, geometries))
            self._remember(call, input, mask)
            output = calibration.run(calibration.mode(), call)
        return self._merge(output, features, sites) if merges else output

    def _packed(
        self, features, layers: list[_Folded] | None, sites: ActiveSites, sizes: list, geometries: list, inplace: bool
    ) -> Tensor:
        """Stage by stage: features are packed from the first convolution to the last."""
        computed = self._computed(sites, sizes, geometries)
        last = len(self.stages) - 1
        finish = self._finish(features, inplace)
        on_cpu = features.device.type == "cpu" and backend_for(features.device) == "cpu"
        if not (inplace or on_cpu or sites._is_listed):
            finish = self._filled(finish, layers, features, sites)
        for number, active in enumerate(computed):
            after = finish if number == last else {"activation": self.stages[number].activation}
            layer = None if layers is None or on_cpu else layers[number]  # the CPU's are for its one kernel
            features = self._run(self.stages[number], layer, features, active, packed=number < last, **after)
        return features

    def _filled(self, finish: dict, layers: list[_Folded] | None, input: Tensor, sites: ActiveSites) -> dict:
        """`finish` for an output whose skipped sites have been written, in the launch that lists the active ones."""
        shortcut = finish.get("residual")
        if layers is None or is_autocast(input.device.type) or not unwatched(input, sites.mask, shortcut):
            return finish
        shape = (sites.shape[0], layers[-1].conv.weight.shape[0], *sites.shape[1:])
        if shortcut is not None and (shortcut.shape != shape or shortcut.dtype != input.dtype):
            return finish
        out, shortcut = channels_last(shape, input), in_rows(shortcut)
        sites._fill(module(".kernels.compaction").Fill(out, shortcut), with_inverse=True)
        return {"activation": finish["activation"], "residual": shortcut, "out": out}

    def _remember(self, call: _BlockCall, input: Tensor, mask: Tensor | ActiveSites) -> None:
        """Let the next call of this kind in inference on the CPU go straight to its faster way."""
        kept, gate = self._kept, call.active.gate
        if kept is None or call.layers is not kept.layers or self._activates_branch or gate is not None:
            return
        if not call.is_one_kernel or torch.is_grad_enabled():
            return
        is_shared = call.active is mask
        if not is_shared and (mask.shape != call.active.mask.shape or not mask.is_contiguous()):
            return
        plain = call.active.mask if is_shared else mask
        if not unwatched(input, plain) or not can_be_like(input, plain):
            return
        unchanged = kept.passed[-1].unchanged if kept.passed else None
        if unchanged is None or not unchanged.holds(self):
            unchanged = Unchanged(self)
            # Once more, as another thread may have written to what has been kept before that was noted.
            if not unchanged.is_known or self._key(self._parts(), call.used) != kept.key:
                return
        kept.passed = (*kept.passed, _Passed(call, input, plain, is_shared, unchanged))[-_MOST_CALLS:]

    def _shortcut_of(self, input: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """The shortcut of the last convolution's epilogue in the output's shape, which kernels take it to have."""
        fused = self._fused_shortcut
        if fused is None or (fused == "identity" and input.shape == shape):
            return None if fused is None else input
        return expanded("shortcut", self._dense_shortcut(input), shape, input)

    def _run(self, stage: Stage, layer: _Folded | None, features, sites: ActiveSites, **finish):
        residual, out = finish.get("residual"), finish.get("out")
        if self._is_promoted(residual):
            made = self._run(stage, layer, features, sites.ungated, packed=True)
            dtype = torch.promote_types(made.rows.dtype, residual.dtype) if out is None else out.dtype
            finish.update({name: finish[name].to(dtype) for name in ("residual", "inactive") if name in finish})
            with torch.autocast(made.rows.device.type, enabled=False):
                return epilogue(PackedFeatures(made.rows.to(dtype), sites), **finish)
        conv, norm = self._submodule(stage.conv), self._norm(stage)
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if layer is not None:
            return masked_conv2d(features, *layer.sparse, *geometry, mask=sites, **finish)
        if norm is None or not uses_batch_statistics(norm):
            return masked_conv2d(features, *fold(conv, norm), *geometry, mask=sites, **finish)
        features = masked_conv2d(features, conv.weight, conv.bias, *geometry, mask=sites.ungated, packed=True)
        return batch_norm(norm, features._replace(sites=sites), **finish)

    def _finish(self, input: Tensor, inplace: bool) -> dict:
        """What the last convolution does with the shortcut."""
        if self._fused_shortcut is None:
            return {"activation": self.stages[-1].activation}
        if inplace:
            return {"activation": self.last_activation, "residual": input, "out": input}
        shortcut = self._dense_shortcut(input)
        return {"activation": self.last_activation, "residual": shortcut, "inactive": shortcut}

    @property
    def _fused_shortcut(self) -> str | tuple[str, ...] | None:
        """The shortcut, where it is part of the last convolution's epilogue."""
        return None if self._activates_branch else self.shortcut_path

    def _check_inplace(self, input: Tensor) -> None:
        if self.shortcut_path != "identity":
            raise ValueError("inplace: expected a block whose shortcut is its input, got one that changes its shape")
        if self._activates_branch:
            raise ValueError("inplace: expected a block without an activation between its last layer and the shortcut")
        if torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in self.parameters())):
            raise ValueError("inplace: expected torch.no_grad() (it is for inference only)")
        if any(self._uses_batch_statistics(stage) for stage in self.stages):
            raise ValueError("inplace: expected a block in eval mode (it is for inference only)")
        if not input.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"inplace: expected a channels_last input, got strides {list(input.stride())}")

    def _masked_dense(self, input: Tensor, sites: ActiveSites) -> Tensor:
        shortcut = None if self.shortcut_path is None else self._dense_shortcut(input)
        branch = self._dense_branch(input)
        if sites.gate is not None:
            branch = branch * sites.gate.to(branch.dtype)
        if shortcut is not None:
            branch = ACTIVATIONS[self.last_activation](branch + shortcut)
        return torch.where(sites.mask, branch, 0 if shortcut is None else shortcut)

    def _prepare(self, stage: Stage, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, used: str) -> _Folded:
        activation = stage.activation
        if stage is self.stages[-1] and self._fused_shortcut is not None:
            activation = self.last_activation
        return _Folded(conv, norm, used, activation)


class _Folded:
    """A stage in inference, the normalisation folded into its convolution.

    Both forms of the parameters are as large as the parameters themselves, and most blocks always go the same way: each
    is made when it is first needed.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, used: str, activation: str | None) -> None:
        self.conv, self.norm, self.used, self.activation = conv, norm, used, activation
        self.geometry, self.groups = geometry_of(conv), conv.groups

    @kept_property
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for F.conv2d."""
        with torch.no_grad():
            return fold(self.conv, self.norm)

    @kept_property
    def conv2d(self) -> tuple:
        """What F.conv2d takes behind its input, where both sides are padded alike."""
        where = self.geometry
        return *self.dense, where.stride, where.padding, where.dilation, self.groups

    @kept_property
    def sparse(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the backend's sparse kernels read them."""
        with torch.no_grad():
            if self.used == "cpu":
                return prepare(*fold(self.conv, self.norm), self.groups)
            weight, bias = self.dense
            return _as_read(weight, self.groups), bias

    @kept_property
    def layer(self) -> Layer:
        """For the CPU's one kernel."""
        return Layer(self.conv.weight, self.sparse, self.geometry, self.groups, self.activation)


class _BlockCall(calibration.SiteCall):
    """A block in inference, as `dynconv.calibration.Call`."""

    def __init__(self, block, input: Tensor, layers: list[_Folded], sites: ActiveSites, inplace, used, shapes) -> None:
        self.block, self.input, self.layers, self.active = block, input, layers, sites
        self.inplace, self.used, self.shapes = inplace, used, shapes
        self._chain: list = []

    @property
    def has_choice(self) -> bool:
        """F.conv2d pads both sides alike, as does the CPU's one kernel."""
        return all(layer.geometry.padding == layer.geometry.padding_end for layer in self.layers)

    def key(self) -> tuple:
        block, layers = self.block, []
        for layer in self.layers:
            where = [*layer.geometry.stride, *layer.geometry.padding, *layer.geometry.dilation]
            layers.append(f"{list(layer.conv.weight.shape)} {where} {layer.groups} {layer.activation}")
        what = "block in place" if self.inplace else "block"
        gated = self.active.gate is not None
        shape = (self.used, str(self.input.dtype), *self.input.shape)
        shortcut = block._fused_shortcut
        return what, *shape, "; ".join(layers), shortcut is None, shortcut == "identity", gated

    def name(self) -> str:
        samples, channels, height, width = self.input.shape
        what = [f"{type(self.block).__name__} {height}x{width} {channels}->{self.layers[-1].conv.out_channels}"]
        what += [f"batch {samples}", str(self.input.dtype)[6:]] + ["in place"] * self.inplace
        return ", ".join(what + ["gate"] * (self.active.gate is not None))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        samples, _, height, width = self.active.mask.shape
        return samples, self.layers[-1].conv.weight.shape[0], height, width

    def sparse(self) -> Tensor:
        if not self.is_one_kernel:
            return self.block._packed(self.input, self.layers, self.active, *self.shapes, self.inplace)
        shortcut = None if self.inplace else self.block._shortcut_of(self.input, self.shape)
        if unwatched(self.input, self.active.mask, shortcut):
            gate = gate_of(self.active, self.input.dtype)
            return run_chain(self.chain, self.input, self.active.mask, gate, shortcut, self.inplace)
        layers, others = [layer.layer for layer in self.layers], dict(residual=shortcut, inactive=shortcut)
        return masked_chain(self.input, layers, self.active, inplace=self.inplace, **others)

    @property
    def is_one_kernel(self) -> bool:
        """Whether the sparse way is the CPU's kernel for all layers."""
        return self.used == "cpu" and self.has_choice and len(self.layers) <= module(".cpu.chain").MOST_STAGES

    @property
    def chain(self):
        """What the CPU's kernel needs of all but the tensors of a call; made once."""
        if not self._chain:
            self._chain.append(chain_of(self.input, [layer.layer for layer in self.layers]))
        return self._chain[0]

    def dense(self) -> Tensor:
        """All sites, and then what a mask leaves of them."""
        input, active = self.input, self.active
        with torch.no_grad():
            result = _branch(input, self.layers)
            shortcut = self.block._shortcut_of(input, self.shape)
            inactive, out = (None, input) if self.inplace else (shortcut, None)
            gate, activation = gate_of(active, input.dtype), self.layers[-1].activation
            return settle(result, active, gate, shortcut, inactive, activation, out)

    def at(self, density: float) -> _BlockCall:
        sites = calibration.sites_at(density, self.active.mask)
        if self.active.gate is not None:
            sites.gate = sites.mask.to(self.active.gate.dtype)
        call = copy.copy(self)  # with the chain that this one may have made
        call.active, call.input = sites, self.input.clone(memory_format=torch.preserve_format)
        return call


def _branch(input: Tensor, layers: list[_Folded]) -> Tensor:
    """The convolutions at all sites, without the last activation."""
    value, last = input, layers[-1]
    for layer in layers:
        value = F.conv2d(value, *layer.conv2d)
        if layer is not last:
            value = activate_(value, layer.activation)
    return value


_MOST_CALLS = 8  # that a block remembers


class _Passed:
    """A block's call in inference on the CPU whose like has passed all checks before: straight to its faster way.

    The block, which keeps it, comes with each call.
    """

    def __init__(self, call: _BlockCall, input: Tensor, mask: Tensor, is_shared: bool, unchanged: Unchanged) -> None:
        self.layers, self.shape, self.inplace = call.layers, call.shape, call.inplace
        self.is_shared, self.unchanged = is_shared, unchanged
        self.likeness = Likeness(input, mask, *unchanged.tensors)
        self.least_dense = calibration.least_dense(calibration.mode(), call)
        self.chain = call.chain if self.least_dense > 0 else None
        self.is_in_rows = input.is_contiguous(memory_format=torch.channels_last)
        self.adds_input = call.block._fused_shortcut == "identity" and input.shape == call.shape
        adds, self.activation = call.block._fused_shortcut is not None, call.layers[-1].activation
        self.settled = Settled(self.shape, input.dtype, self.activation, adds=adds)
        self.count_active = module(".cpu.sites").count_active

    def is_like(self, block: MaskedBlock, input: Tensor, mask: Tensor | ActiveSites | None, inplace: bool) -> bool:
        """Whether a call may take the same way, with no more to look at than its values."""
        if inplace is not self.inplace:
            return False
        if self.is_shared:
            if not isinstance(mask, ActiveSites) or mask.gate is not None:
                return False
            mask = mask.mask
        return self.likeness.holds(input, mask, *self.unchanged.tensors) and self.unchanged.holds(block)

    def __call__(self, block: MaskedBlock, input: Tensor, mask: Tensor | ActiveSites) -> Tensor:
        if not self.is_in_rows:
            input = in_rows(input)
        plain = mask.mask if self.is_shared else mask
        if self.least_dense < math.inf:
            active = len(mask) if self.is_shared else self.count_active(mask)
            if active >= self.least_dense:
                return self._dense(block, input, plain, active)
        if self.inplace or self.adds_input:
            return run_chain(self.chain, input, plain, None, input, self.inplace)
        shortcut = block._shortcut_of(input, self.shape)
        if unwatched(shortcut):
            return run_chain(self.chain, input, plain, None, shortcut, False)
        layers, others = [layer.layer for layer in self.layers], dict(residual=shortcut, inactive=shortcut)
        return masked_chain(input, layers, ActiveSites._of(plain), **others)

    def _dense(self, block: MaskedBlock, input: Tensor, mask: Tensor, active: int) -> Tensor:
        """As `_BlockCall.dense`."""
        result = _branch(input, self.layers)
        shortcut = input if self.adds_input else block._shortcut_of(input, self.shape)
        if self.inplace:
            return settle(result, Counted(mask, active), None, shortcut, None, self.activation, input)
        return self.settled(result, mask, active, shortcut, shortcut)


def _as_read(weight: Tensor, groups: int) -> Tensor:
    """A depthwise weight in the memory order that the Triton kernels read, taps before channels."""
    if groups == 1 or weight.shape[1] > 1:
        return weight
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def _check_channels(input: Tensor, layers: list[_Folded]) -> None:
    """What `masked_conv2d` checks of its input, for each layer."""
    channels = layers[0].conv.weight.shape[1] * layers[0].groups
    if input.shape[1] != channels:
        raise ValueError(f"input: expected shape [N, {channels}, H, W], got {list(input.shape)}")
    for layer in layers:
        filters, depth = layer.conv.weight.shape[:2]
        if depth * layer.groups != channels:
            raise ValueError(f"weight: expected {channels // layer.groups} input channels, got {depth}")
        channels = filters


class MaskedBasicBlock(BasicBlock, MaskedBlock):
    """The block of ResNet-18 and 34 (He et al., CVPR 2016) at active sites: 3x3, 3x3; see `MaskedBlock`.

    The constructor is torchvision's `BasicBlock`, with `statistics` ("active" or "dense") beside it.

    Example:
        >>> block = dynconv.nn.MaskedBasicBlock(8, 8).eval()
        >>> block(torch.randn(2, 8, 6, 6), torch.rand(2, 1, 6, 6) < 0.25).shape
        torch.Size([2, 8, 6, 6])
    """


class MaskedBottleneck(Bottleneck, MaskedBlock):
    """The bottleneck of ResNet-50 and up, ResNeXt and Wide ResNet at active sites: 1x1, 3x3, 1x1; see `MaskedBlock`.

    The constructor is torchvision's `Bottleneck` (the stride is in the 3x3), with `statistics` beside it.

    Example:
        >>> block = dynconv.nn.MaskedBottleneck(32, 8).eval()
        >>> block(torch.randn(2, 32, 6, 6), torch.rand(2, 1, 6, 6) < 0.25).shape
        torch.Size([2, 32, 6, 6])
    """


class MaskedInvertedResidual(MaskedBlock):
    """The inverted residual of MobileNetV2 (Sandler et al., CVPR 2018) at active sites: 1x1, depthwise 3x3, 1x1.

    See `MaskedBlock`. The constructor is torchvision's `InvertedResidual`, with `statistics` beside it. `from_dense`
    takes chains of any length, such as those of MobileNetV3 and EfficientNetV2 without squeeze-and-excitation.

    Example:
        >>> block = dynconv.nn.MaskedInvertedResidual(8, 8, stride=1, expand_ratio=2).eval()
        >>> block(torch.randn(2, 8, 6, 6), torch.rand(2, 1, 6, 6) < 0.25).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self, inp: int, oup: int, stride: int, expand_ratio: float,
        norm_layer: Callable[..., nn.Module] | None = None, *, statistics: str = "active",
    ) -> None:  # fmt: skip
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
        hidden = round(inp * expand_ratio)

        def unit(cin: int, cout: int, *geometry: int) -> nn.Sequential:
            norm = make_norm(norm_layer, cout)
            return nn.Sequential(nn.Conv2d(cin, cout, *geometry, bias=False), norm, nn.ReLU6(inplace=True))

        units = [] if expand_ratio == 1 else [unit(inp, hidden, 1)]
        units.append(unit(hidden, hidden, 3, stride, 1, 1, hidden))
        last = make_norm(norm_layer, oup)
        stages = [Stage(f"conv.{i}.0", f"conv.{i}.1", "relu6") for i in range(len(units))]
        stages.append(Stage(f"conv.{len(units)}", f"conv.{len(units) + 1}", None))
        if type(last) is nn.Identity:
            stages = [stage._replace(norm=None) for stage in stages]
        shortcut = "identity" if stride == 1 and inp == oup else None
        super().__init__(Chain(tuple(stages), shortcut), statistics)
        self.conv = nn.Sequential(*units, nn.Conv2d(hidden, oup, 1, bias=False), last)
        self._note_layers()
