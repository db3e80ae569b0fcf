"""Batch normalisation of packed features: over what is computed, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._arguments import kind_of
from ..ops import epilogue as ops
from ..ops.gathered_conv import check_packed
from ..packed import PackedChannels, PackedFeatures
from ..sites import ActiveSites
from .dense import check_layer, share_tensors


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """An `nn.BatchNorm2d` of packed features: in training its statistics are those of the active sites.

    Same constructor, parameters, buffers and `state_dict`. With no active site the running statistics stay as they
    are. The activation, the residual and the way back to a dense tensor come with it, in the same pass.
    """

    stands_for = nn.BatchNorm2d

    def forward(
        self,
        features: PackedFeatures,
        *,
        activation: str | None = None,
        residual: Tensor | PackedFeatures | None = None,
        inactive: Tensor | None = None,
        packed: bool = True,
    ) -> PackedFeatures | Tensor:
        """activation(gate * normalised + residual) for the sites of `features`, packed or dense [N, C, H, W].

        The keywords and errors of `dynconv.masked_conv2d`; the gate is that of the sites, if they have one.
        """
        return batch_norm(self, features, activation=activation, residual=residual, inactive=inactive, packed=packed)

    @classmethod
    def from_dense(cls, module: nn.BatchNorm2d) -> MaskedBatchNorm2d:
        """A masked layer that shares the dense layer's parameters and buffers.

        Raises TypeError where `module` is not an `nn.BatchNorm2d`, or one with a forward of its own; ValueError where
        it has hooks, or parameters that are computed at each call.
        """
        return _share(cls, module)


class GatheredBatchNorm2d(nn.BatchNorm2d):
    """An `nn.BatchNorm2d` of packed channels: in training its statistics are those of the samples that keep a channel.

    Same constructor, parameters, buffers and `state_dict`. The running statistics of a channel that no sample keeps
    stay as they are.
    """

    stands_for = nn.BatchNorm2d

    def forward(self, features: PackedChannels, mask: Tensor | ActiveSites | None = None) -> PackedChannels:
        """The features normalised, zeros where they are none.

        Args:
            features: the result of `dynconv.gathered_conv2d(..., packed=True)`.
            mask: bool [N, 1, H, W] or ActiveSites, where only these sites were computed.

        Raises TypeError where `features` are not PackedChannels or a mask is not bool, ValueError for another number of
        channels.
        """
        if not isinstance(features, PackedChannels):
            raise TypeError(f"features: expected PackedChannels (dynconv.pack makes them), got {kind_of(features)}")
        check_packed("features", features)
        if features.channels.shape[1] != self.num_features:
            raise ValueError(f"features: expected {self.num_features} channels, got {features.channels.shape[1]}")
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor or ActiveSites, got {mask.dtype}")
        return gathered_batch_norm(self, features, mask.mask if isinstance(mask, ActiveSites) else mask)

    @classmethod
    def from_dense(cls, module: nn.BatchNorm2d) -> GatheredBatchNorm2d:
        """A layer that shares the dense layer's parameters and buffers.

        Raises TypeError where `module` is not an `nn.BatchNorm2d`, or one with a forward of its own; ValueError where
        it has hooks, or parameters that are computed at each call.
        """
        return _share(cls, module)


def _share(cls, module: nn.BatchNorm2d) -> nn.BatchNorm2d:
    check_layer(module, nn.BatchNorm2d)
    shared = cls(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
    )
    return share_tensors(shared, module)


def gathered_batch_norm(norm: nn.BatchNorm2d, features: PackedChannels, mask: Tensor | None) -> PackedChannels:
    """What `norm` does, over each channel's samples that keep it and over the active sites of `mask` [N, 1, H, W].

    In steps of PyTorch's own, at the cost of the kept channels.
    """
    rows, channels = features
    width = rows.shape[1]
    index = channels.index[:, :width]
    computed = (index >= 0)[:, :, None, None]
    if mask is not None:
        computed = computed & mask
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))

    def total(values: Tensor) -> Tensor:
        """[N, capacity, H, W], zeros where nothing is -> [C], one sample after the other."""
        sums = values.sum((2, 3))
        if sums.shape[1] == 0:
            return sums.new_zeros(channels.shape[1])
        kept = sums.gather(1, channels.inverse.clamp(min=0).long())
        return torch.where(channels.mask, kept, 0).sum(0)

    def spread(values: Tensor) -> Tensor:
        return channels._gather(values, width)[:, :, None, None]

    if uses_batch_statistics(norm):
        sites = wide.new_full((channels.shape[0],), rows.shape[2] * rows.shape[3])
        if mask is not None:
            sites = mask.expand(rows.shape[0], 1, *rows.shape[2:]).sum((1, 2, 3)).to(wide.dtype)
        count = torch.where(channels.mask, sites[:, None], 0).sum(0)
        mean = total(torch.where(computed, wide, 0)) / count.clamp(min=1)
        centred = torch.where(computed, wide - spread(mean), 0)
        variance = total(centred * centred) / count.clamp(min=1)
        if norm.training and norm.track_running_stats:
            _track(norm, mean.detach(), variance.detach(), count)
    else:
        mean, variance = norm.running_mean, norm.running_var
        centred = torch.where(computed, wide - spread(mean.to(wide.dtype)), 0)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    result = centred * spread(scale.to(wide.dtype))
    if norm.bias is not None:
        result = torch.where(computed, result + spread(norm.bias.to(wide.dtype)), 0)
    return PackedChannels(result.to(rows.dtype), channels)


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether the layer normalises by the statistics of its input rather than by its running ones.

    Frozen batch normalisation, which is no `_BatchNorm`, never does.
    """
    return (norm.training or norm.running_mean is None) and isinstance(norm, _BatchNorm)


def batch_norm(norm: nn.BatchNorm2d, features: PackedFeatures, **finish) -> PackedFeatures | Tensor:
    """What `norm` does, over the active sites of `features`, and then the epilogue."""
    if uses_batch_statistics(norm):
        result, mean, variance = ops.batch_norm(features, norm.weight, norm.bias, norm.eps, **finish)
        if norm.training and norm.track_running_stats:
            _track(norm, mean, variance, features.sites.count)
        return result
    mean, scale = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = None if norm.bias is None else norm.bias.to(scale.dtype)
    return ops.epilogue(features, mean=mean.to(scale.dtype), scale=scale, shift=shift, **finish)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Move the running statistics towards these, which are of `count` sites; no wait for the device."""
    norm.num_batches_tracked.add_(1)
    sites = count.to(mean.dtype)
    momentum = 1 / norm.num_batches_tracked.to(mean.dtype) if norm.momentum is None else norm.momentum
    share = momentum * (sites > 0).to(mean.dtype)
    unbiased = variance * (sites / (sites - 1).clamp(min=1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_((share * (value - running)).to(running.dtype))
