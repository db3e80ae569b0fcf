"""Residual blocks of the channels that each sample keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._backend import backend_for
from ..channels import ActiveChannels
from ..ops.gathered_conv import check_channels, finish, gathered_conv2d
from ..packed import PackedChannels
from ..reference import ACTIVATIONS
from ..sites import ActiveSites
from .gathered_conv import Channels
from .normalization import gathered_batch_norm, uses_batch_statistics
from .residual import BasicBlock, Bottleneck, ResidualBlock, Stage, fold, geometry_of, needs_grad


class GatheredBlock(ResidualBlock):
    """A chain of convolutions with a shortcut, in which each sample keeps some of the channels between them.

    `block(x, channels)` is the dense block with the channels that `channels` does not keep set to zero before the
    activation of their convolution: the dynamic width of FBS, DS-Net and LAUDNet. Features stay packed from the first
    convolution to the last, whose output has all channels. A floating mask is a gate: it multiplies its channel, before
    the activation, and gets a gradient. With a spatial `mask` as well, each convolution is computed at the sites that
    the next one reads, as in `MaskedBlock`.

    In training, batch normalisation takes its statistics over the samples that keep a channel (`statistics` "active"),
    or over all ("dense"), which costs what the dense block does. In eval mode it is folded into the convolutions.

    Children and `state_dict` are those of the dense block. Without masks the block is that dense block.
    """

    def forward(
        self, input: Tensor, channels: Sequence[Channels] | Channels = None, mask: Tensor | ActiveSites | None = None
    ) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, Ho, Wo] in channels_last.

        Args:
            input: the features, best in channels_last.
            channels: for each convolution but the last one a mask [N, C] of its output, bool or floating, or
                ActiveChannels, or None for all. One that is no sequence stands for every one of them.
            mask: as for `MaskedBlock`: skipped sites of the output are the shortcut's.

        Raises TypeError, ValueError: another number of masks than of convolutions between which there are channels, and
        as `dynconv.gathered_conv2d`.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        inner = len(self.stages) - 1
        chosen = list(channels) if isinstance(channels, (list, tuple)) else [channels] * inner
        if len(chosen) != inner:
            raise ValueError(
                f"channels: expected {inner} masks, one for each convolution but the last, got {len(chosen)}"
            )
        if mask is None and all(c is None for c in chosen):
            return self._dense(input)
        samples = input.shape[0]
        chosen = [
            check_channels("channels", c, (samples, width), input)
            for c, width in zip(chosen, [self._submodule(stage.conv).out_channels for stage in self.stages])
        ]
        sizes, geometries = [tuple(input.shape[2:])], [geometry_of(self._submodule(s.conv)) for s in self.stages]
        for geometry in geometries:
            sizes.append(geometry.output_size(*sizes[-1]))
        sites = mask
        if mask is not None and not isinstance(mask, ActiveSites):
            sites = ActiveSites(mask, (samples, *sizes[-1]))
        if self.statistics == "dense" and any(self._uses_batch_statistics(stage) for stage in self.stages):
            return self._all_dense(input, chosen, sites)
        used = backend_for(input.device)
        tracked = needs_grad(*(c.gate for c in chosen), None if sites is None else sites.gate)
        folded = None if tracked or used == "reference" else self._frozen(input, used)
        computed = [None] * (inner + 1) if sites is None else self._computed(sites, sizes, geometries)
        shortcut = None if self.shortcut is None else self._dense_shortcut(input)
        features = input
        for number, stage in enumerate(self.stages):
            active, parameters = computed[number], None if folded is None else folded[number]
            if number < inner:
                features = self._run(stage, parameters, features, chosen[number], active, stage.activation)
                continue
            activation = stage.activation if shortcut is None else self.activation
            skipped = None if active is None else shortcut
            features = self._run(stage, parameters, features, None, active, activation, shortcut, skipped)
        return features

    def _run(
        self, stage: Stage, parameters, features, channels: ActiveChannels | None, sites, activation,
        residual: Tensor | None = None, inactive: Tensor | None = None,
    ) -> Tensor | PackedChannels:  # fmt: skip
        """A stage: packed for the next one where it is told its `channels`, with all of them and dense without."""
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
        if not packed and sites is None:
            rows = nn.BatchNorm2d.forward(norm, made.features)
        else:
            rows = gathered_batch_norm(norm, made, None if sites is None else sites.mask).features
        rows = finish(rows, channels, sites, activation, residual, inactive, packed)
        return PackedChannels(rows, channels) if packed else rows

    def _prepare(self, stage: Stage, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, used: str):
        return fold(conv, norm)

    def _all_dense(self, input: Tensor, channels: list[ActiveChannels], sites: ActiveSites | None) -> Tensor:
        """Everything computed, and multiplied by the masks."""
        shortcut = None if self.shortcut is None else self._dense_shortcut(input)
        result = input
        for number, stage in enumerate(self.stages):
            conv, norm = self._submodule(stage.conv), self._norm(stage)
            result = nn.Conv2d.forward(conv, result)
            if norm is not None:
                result = nn.BatchNorm2d.forward(norm, result)
            if number < len(channels):
                kept, gate = channels[number].mask[:, :, None, None], channels[number].gate
                if gate is not None:
                    result = (result * gate[:, :, None, None]).to(result.dtype)
                result = torch.where(kept, result, 0)
            elif sites is not None and sites.gate is not None:
                result = result * sites.gate.to(result.dtype)
            result = ACTIVATIONS[stage.activation](result)
        if shortcut is not None:
            result = ACTIVATIONS[self.activation](result + shortcut)
        return result if sites is None else torch.where(sites.mask, result, 0 if shortcut is None else shortcut)


class GatheredBasicBlock(BasicBlock, GatheredBlock):
    """The block of ResNet-18 and 34 (He et al., CVPR 2016), 3x3, 3x3, with dynamic width between; see `GatheredBlock`.

    The constructor is torchvision's `BasicBlock`, with `statistics` ("active" or "dense") beside it.
    """


class GatheredBottleneck(Bottleneck, GatheredBlock):
    """The bottleneck of ResNet-50 and up, 1x1, 3x3, 1x1, with dynamic width between; see `GatheredBlock`.

    The constructor is torchvision's `Bottleneck` (the stride is in the 3x3), with `statistics` beside it.
    """
