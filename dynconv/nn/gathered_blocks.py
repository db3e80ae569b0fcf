"""Residual blocks of the channels that each sample keeps."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import calibration
from .._backend import backend_for
from ..channels import ActiveChannels
from ..ops._channel_calls import Kept, channels_at, share_at
from ..ops._common import activate_, gate_of, settle
from ..ops.gathered_conv import check_channels, finish, gathered_conv2d
from ..packed import PackedChannels
from ..reference import ACTIVATIONS
from ..sites import ActiveSites
from .gathered_conv import Channels
from .normalization import gathered_batch_norm, process_group, uses_batch_statistics
from .recognition import Stage
from .residual import (
    BasicBlock,
    Bottleneck,
    ResidualBlock,
    check_input,
    computing_once,
    fold,
    geometry_of,
    needs_grad,
    normalise,
)


class GatheredBlock(ResidualBlock):
    """A chain of convolutions with a shortcut, in which each sample keeps some of the channels between them.

    `block(x, channels)` is the dense block with the channels that `channels` does not keep set to zero before the
    activation of their convolution: the dynamic width of FBS, DS-Net and LAUDNet. Features stay packed from the first
    convolution to the last, whose output has all channels. A floating mask is a gate: it multiplies its channel, before
    the activation, and gets a gradient. With a spatial `mask` as well, each convolution is computed at the sites that
    the next one reads, as in `MaskedBlock`.

    In training, batch normalisation takes its statistics over the samples that keep a channel (`statistics` "active"),
    or over all ("dense"), which costs what the dense block does. In eval mode it is folded into the convolutions.

    Children and `state_dict` are those of the dense block. Without masks the block is that dense block. `from_dense`
    makes it; the classes derived from it have constructors.

    Example:
        >>> dense = dynconv.nn.MaskedBasicBlock(8, 8)  # or torchvision's, timm's, your own
        >>> block, x = dynconv.nn.GatheredBlock.from_dense(dense).eval(), torch.randn(2, 8, 6, 6)
        >>> y = block(x, torch.rand(2, 8) < 0.5, torch.rand(2, 1, 6, 6) < 0.5)
    """

    def forward(
        self, input: Tensor, channels: Sequence[Channels] | Channels = None, mask: Tensor | ActiveSites | None = None
    ) -> Tensor:
        """Map [N, Cin, H, W] to [N, Cout, Ho, Wo] in channels_last.

        Args:
            input: the features, best in channels_last.
            channels: for each convolution but the last one a mask [N, C] of its output, bool or floating, or
                ActiveChannels, or None for all. One that is no sequence stands for every one of them.
            mask: as for `MaskedBlock`: skipped sites of the output are the shortcut's.

        Raises TypeError, ValueError: another number of masks than of convolutions between which there are channels, and
        as `dynconv.gathered_conv2d`.
        """
        check_input(input)
        kept = channels if isinstance(channels, (list, tuple)) else [channels]
        sparse = mask is not None or any(c is not None for c in kept)
        if self._check_layers(sparse, "channels" if mask is None else "mask"):
            with computing_once():
                return self._forward(input, channels, mask)
        return self._forward(input, channels, mask)

    def _forward(self, input: Tensor, channels, mask: Tensor | ActiveSites | None) -> Tensor:
        inner = len(self.stages) - 1
        chosen = list(channels) if isinstance(channels, (list, tuple)) else [channels] * inner
        if len(chosen) != inner:
            raise ValueError(
                f"channels: expected {inner} masks, one for each convolution but the last, got {len(chosen)}"
            )
        if mask is None and all(c is None for c in chosen):
            return self._dense(input)
        samples, is_chosen = input.shape[0], [c is not None for c in chosen]
        chosen = [
            check_channels("channels", c, (samples, width), input)
            for c, width in zip(chosen, [self._submodule(stage.conv).out_channels for stage in self.stages])
        ]
        sizes, geometries = [tuple(input.shape[2:])], [geometry_of(self._submodule(s.conv)) for s in self.stages]
        for geometry in geometries:
            sizes.append(geometry.output_size(*sizes[-1]))
        sites = None if mask is None else self._sites(mask, input, sizes[-1])
        if self.statistics == "dense" and any(self._uses_batch_statistics(stage) for stage in self.stages):
            return self._all_dense(input, chosen, sites)
        used = backend_for(input.device)
        tracked = needs_grad(*(c.gate for c in chosen), None if sites is None else sites.gate)
        folded = None if tracked or used == "reference" else self._frozen(input, used)
        if folded is None:
            return self._packed(input, None, chosen, sites, sizes, geometries)
        call = _BlockCall(self, input, folded, chosen, is_chosen, sites, used, sizes, geometries)
        return calibration.run(calibration.mode(), call)

    def _packed(
        self, input: Tensor, folded: list | None, chosen: list[ActiveChannels], sites: ActiveSites | None, sizes: list,
        geometries: list,
    ) -> Tensor:  # fmt: skip
        """Stage by stage: features are packed from the first convolution to the last."""
        inner = len(self.stages) - 1
        computed = [None] * (inner + 1) if sites is None else self._computed(sites, sizes, geometries)
        merges = self._activates_branch  # the gate, too, then multiplies what the epilogue has made
        shortcut = None if merges or self.shortcut_path is None else self._dense_shortcut(input)
        if merges and sites is not None:
            computed[-1] = sites.ungated
        features = input
        for number, stage in enumerate(self.stages):
            active, parameters = computed[number], None if folded is None else folded[number]
            if number < inner:
                features = self._run(stage, parameters, features, chosen[number], active, stage.activation)
                continue
            activation = stage.activation if shortcut is None else self.last_activation
            skipped = None if active is None else shortcut
            features = self._run(stage, parameters, features, None, active, activation, shortcut, skipped)
        return self._merge(features, input, sites) if merges else features

    def _run(
        self, stage: Stage, parameters, features, channels: ActiveChannels | None, sites, activation,
        residual: Tensor | None = None, inactive: Tensor | None = None,
    ) -> Tensor | PackedChannels:  # fmt: skip
        """A stage: packed for the next one where it is told its `channels`, with all of them and dense without."""
        if self._is_promoted(residual):
            made = self._run(stage, parameters, features, None, None if sites is None else sites.ungated, None)
            dtype, every = (
                torch.promote_types(made.dtype, residual.dtype),
                ActiveChannels._all(made.shape[:2], made.device),
            )
            with torch.autocast(made.device.type, enabled=False):
                return finish(made.to(dtype), every, sites, activation, residual, inactive)
        conv, norm, packed = self._submodule(stage.conv), self._norm(stage), channels is not None
        where = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if norm is None or not uses_batch_statistics(norm):
            parameters = fold(conv, norm) if parameters is None else parameters
            return gathered_conv2d(
                features, *parameters, *where, out_mask=channels, mask=sites, activation=activation, residual=residual,
                inactive=inactive, packed=packed,
            )  # fmt: skip
        made = gathered_conv2d(
            features, conv.weight, conv.bias, *where, out_mask=channels.ungated if packed else None,
            mask=None if sites is None else sites.ungated, packed=packed,
        )  # fmt: skip
        if not packed:
            channels = ActiveChannels._all(tuple(made.shape[:2]), made.device)
            made = PackedChannels(made, channels)
        if not packed and sites is None and process_group(norm) is None:
            rows = normalise(norm, made.features)
        else:
            rows = gathered_batch_norm(norm, made, None if sites is None else sites.mask).features
        rows = finish(rows, channels, sites, activation, residual, inactive, packed)
        return PackedChannels(rows, channels) if packed else rows

    def _prepare(self, stage: Stage, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, used: str):
        return fold(conv, norm)

    def _all_dense(self, input: Tensor, channels: list[ActiveChannels], sites: ActiveSites | None) -> Tensor:
        """Everything computed, and multiplied by the masks."""
        shortcut = None if self.shortcut_path is None else self._dense_shortcut(input)
        result = input
        for number, stage in enumerate(self.stages):
            conv, norm = self._submodule(stage.conv), self._norm(stage)
            result = nn.Conv2d.forward(conv, result)
            if norm is not None:
                result = normalise(norm, result)
            if number < len(channels):
                kept, gate = channels[number].mask[:, :, None, None], channels[number].gate
                if gate is not None:
                    result = (result * gate[:, :, None, None]).to(result.dtype)
                result = torch.where(kept, result, 0)
            result = ACTIVATIONS[stage.activation](result)
        if sites is not None and sites.gate is not None:
            result = result * sites.gate.to(result.dtype)
        if shortcut is not None:
            result = ACTIVATIONS[self.last_activation](result + shortcut)
        return result if sites is None else torch.where(sites.mask, result, 0 if shortcut is None else shortcut)


class _BlockCall:
    """A block in inference, as `dynconv.calibration.Call`."""

    def __init__(
        self, block: GatheredBlock, input: Tensor, folded: list, channels: list[ActiveChannels], is_chosen: list[bool],
        sites: ActiveSites | None, used: str, sizes: list, geometries: list,
    ) -> None:  # fmt: skip
        self.block, self.input, self.folded, self.channels, self.is_chosen = block, input, folded, channels, is_chosen
        self.sites, self.used, self.sizes, self.geometries = sites, used, sizes, geometries
        self.device = input.device

    @property
    def has_choice(self) -> bool:
        """F.conv2d pads both sides alike. Half types it would round twice, before the shortcut.

        A branch that ends in an activation of its own is merged behind it by the sparse way alone.
        """
        if self.input.element_size() == 2 or self.block._activates_branch:
            return False
        return all(g.padding == g.padding_end for g in self.geometries)

    @property
    def _products(self) -> list[int]:
        """Of each convolution without masks."""
        samples = self.input.shape[0]
        areas = [height * width for height, width in self.sizes[1:]]
        return [samples * area * weight.numel() for area, (weight, _) in zip(areas, self.folded, strict=True)]

    @property
    def work(self) -> int:
        """Products of all convolutions."""
        return sum(self._products)

    def kept(self) -> int:
        """Those between kept channels, at the block's active share of each map."""
        if self.device.type != "cpu":
            return int(self.kept_on_device())
        samples, kept = self.input.shape[0], 0.0  # in Python, as so few numbers take tensors longer
        ends = [1.0] * samples
        shares = [[n / c.shape[1] for n in c.count.tolist()] if chosen else ends for c, chosen in self._chosen()]
        for each, ins, outs in zip(self._products, [ends, *shares], [*shares, ends], strict=True):
            kept += each * sum(map(operator.mul, ins, outs))
        return int(kept / samples * (1 if self.sites is None else self.sites.density))

    def kept_on_device(self) -> Tensor:
        """The same, where the masks are."""
        shares = [1, *[c.count / c.shape[1] if chosen else 1 for c, chosen in self._chosen()], 1]
        kept = sum(each * ins * outs for each, ins, outs in zip(self._products, shares[:-1], shares[1:], strict=True))
        # A number, where no channels are chosen, is filled in: a copy from the host would wait for the device.
        is_number = not isinstance(kept, Tensor)
        kept = torch.full((), kept, dtype=torch.float64, device=self.device) if is_number else kept.double().mean()
        return (kept if self.sites is None else kept * self.sites.mask.double().mean()).long().view(1)

    def key(self) -> tuple:
        layers = []
        for (weight, _), stage, geometry in zip(self.folded, self.block.stages, self.geometries, strict=True):
            where = [*geometry.stride, *geometry.padding, *geometry.dilation]
            layers.append(f"{list(weight.shape)} {where} {stage.activation}")
        chosen = [f"{c.granularity} {c.gate is not None}" if is_chosen else "" for c, is_chosen in self._chosen()]
        shape = (self.used, str(self.input.dtype), *self.input.shape)
        shortcut = (
            self.block.shortcut_path is None,
            self.block.shortcut_path == "identity",
            self.block.last_activation,
        )
        masked = (self.sites is not None, self.sites is not None and self.sites.gate is not None)
        return "gathered block", *shape, "; ".join(layers), *shortcut, "; ".join(chosen), *masked

    def _chosen(self):
        return zip(self.channels, self.is_chosen, strict=True)

    def name(self) -> str:
        samples, channels, height, width = self.input.shape
        what = [f"{type(self.block).__name__} {height}x{width} {channels}->{self.folded[-1][0].shape[0]}"]
        what += [f"batch {samples}", str(self.input.dtype)[6:]]
        what += [f"granularity {max((c.granularity for c, is_chosen in self._chosen() if is_chosen), default=1)}"]
        return ", ".join(what + ["sites"] * (self.sites is not None))

    def sparse(self) -> Tensor:
        return self.block._packed(self.input, self.folded, self.channels, self.sites, self.sizes, self.geometries)

    def dense(self) -> Tensor:
        with torch.no_grad():
            value, last = self.input.contiguous(memory_format=torch.channels_last), len(self.folded) - 1
            for number, ((weight, bias), stage) in enumerate(zip(self.folded, self.block.stages, strict=True)):
                geometry, groups = self.geometries[number], self.block._submodule(stage.conv).groups
                value = F.conv2d(value, weight, bias, geometry.stride, geometry.padding, geometry.dilation, groups)
                if number < last:
                    channels = self.channels[number]
                    if channels.gate is not None:
                        value *= channels.gate[:, :, None, None]
                    value = Kept.of(channels, self.is_chosen[number]).keep(value, 1)
                    value = activate_(value, stage.activation)
            block = self.block
            shortcut = None if block.shortcut_path is None else block._dense_shortcut(self.input)
            activation = stage.activation if shortcut is None else block.last_activation
            if self.sites is not None:
                gate = gate_of(self.sites, value.dtype)
                return settle(value, self.sites, gate, shortcut, shortcut, activation, None)
            if shortcut is not None:
                value += shortcut
            return activate_(value, activation).contiguous(memory_format=torch.channels_last)

    def at(self, density: float) -> _BlockCall:
        sides = [False, *self.is_chosen, False]
        chosen = [ins + outs + (self.sites is not None) for ins, outs in itertools.pairwise(sides)]
        share = share_at(density, list(zip(self._products, chosen, strict=True)))
        channels = [channels_at(share, c) if is_chosen else c for c, is_chosen in self._chosen()]
        sites = None
        if self.sites is not None:
            sites = calibration.sites_at(share, self.sites.mask)
            sites.gate = None if self.sites.gate is None else sites.mask.to(self.sites.gate.dtype)
        others = (self.used, self.sizes, self.geometries)
        input = self.input.clone(memory_format=torch.preserve_format)  # as from the layer before
        return _BlockCall(self.block, input, self.folded, channels, self.is_chosen, sites, *others)


class GatheredBasicBlock(BasicBlock, GatheredBlock):
    """The block of ResNet-18 and 34 (He et al., CVPR 2016), 3x3, 3x3, with dynamic width between; see `GatheredBlock`.

    The constructor is torchvision's `BasicBlock`, with `statistics` ("active" or "dense") beside it.

    Example:
        >>> block = dynconv.nn.GatheredBasicBlock(8, 8).eval()
        >>> block(torch.randn(2, 8, 6, 6), torch.rand(2, 8) < 0.5).shape
        torch.Size([2, 8, 6, 6])
    """


class GatheredBottleneck(Bottleneck, GatheredBlock):
    """The bottleneck of ResNet-50 and up, 1x1, 3x3, 1x1, with dynamic width between; see `GatheredBlock`.

    The constructor is torchvision's `Bottleneck` (the stride is in the 3x3), with `statistics` beside it.

    Example:
        >>> block = dynconv.nn.GatheredBottleneck(32, 8).eval()
        >>> block(torch.randn(2, 32, 6, 6), torch.rand(2, 8) < 0.5).shape
        torch.Size([2, 32, 6, 6])
    """
