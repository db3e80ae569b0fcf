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

    Example:
        >>> norm, mask = dynconv.nn.MaskedBatchNorm2d(8), torch.rand(2, 1, 6, 6) < 0.5
        >>> packed = dynconv.masked_conv2d(torch.randn(2, 8, 6, 6), torch.randn(8, 8, 1, 1), mask=mask, packed=True)
        >>> y = norm(packed, activation="relu")
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
        """Compute `activation(gate * normalised + residual)` at the sites of `features`, packed or dense [N, C, H, W].

        The keywords and errors of `dynconv.masked_conv2d`; the gate is that of the sites, if they have one.
        """
        if not isinstance(features, PackedFeatures):
            raise TypeError(f"features: expected PackedFeatures (dynconv.pack makes them), got {kind_of(features)}")
        if features.shape[1] != self.num_features:
            raise ValueError(f"features: expected {self.num_features} channels, got {features.shape[1]}")
        return batch_norm(self, features, activation=activation, residual=residual, inactive=inactive, packed=packed)

    @classmethod
    def from_dense(cls, module: nn.BatchNorm2d) -> MaskedBatchNorm2d:
        """Make a masked layer that shares the dense layer's parameters and buffers.

        Raises TypeError where `module` is not an `nn.BatchNorm2d`, or one with a forward of its own; ValueError where
        it has hooks, or parameters that are computed at each call.
        """
        return _share(cls, module)


class GatheredBatchNorm2d(nn.BatchNorm2d):
    """An `nn.BatchNorm2d` of packed channels: in training its statistics are those of the samples that keep a channel.

    Same constructor, parameters, buffers and `state_dict`. The running statistics of a channel that no sample keeps
    stay as they are.

    Example:
        >>> norm, keep = dynconv.nn.GatheredBatchNorm2d(8), torch.rand(2, 8) < 0.5
        >>> x, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 1, 1)
        >>> packed = dynconv.gathered_conv2d(x, weight, out_mask=keep, packed=True)
        >>> y = norm(packed)
    """

    stands_for = nn.BatchNorm2d

    def forward(self, features: PackedChannels, mask: Tensor | ActiveSites | None = None) -> PackedChannels:
        """Normalise the features, with zeros where there are none.

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
        """Make a layer that shares the dense layer's parameters and buffers.

        Raises TypeError where `module` is not an `nn.BatchNorm2d`, or one with a forward of its own; ValueError where
        it has hooks, or parameters that are computed at each call.
        """
        return _share(cls, module)


class MaskedSyncBatchNorm2d(nn.SyncBatchNorm):
    """A `MaskedBatchNorm2d` whose statistics are those of all processes, as `nn.SyncBatchNorm`'s.

    Every process of the group has to call it, with sites or without. `convert_sync_batchnorm` makes it.

    Example:
        >>> dynconv.nn.convert_sync_batchnorm(dynconv.nn.MaskedBatchNorm2d(8))
        MaskedSyncBatchNorm2d(8, ...)
    """

    stands_for = nn.SyncBatchNorm
    forward = MaskedBatchNorm2d.forward


class GatheredSyncBatchNorm2d(nn.SyncBatchNorm):
    """A `GatheredBatchNorm2d` whose statistics are those of all processes, as `nn.SyncBatchNorm`'s.

    Every process of the group has to call it. `convert_sync_batchnorm` makes it.

    Example:
        >>> dynconv.nn.convert_sync_batchnorm(dynconv.nn.GatheredBatchNorm2d(8))
        GatheredSyncBatchNorm2d(8, ...)
    """

    stands_for = nn.SyncBatchNorm
    forward = GatheredBatchNorm2d.forward


def convert_sync_batchnorm(model: nn.Module, process_group=None) -> nn.Module:
    """Convert the batch normalisation in a model, that of packed features as well, to statistics of all processes.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does the same for `nn.BatchNorm2d`, alone or in a block of
    `dynconv.nn`, but makes layers of `MaskedBatchNorm2d` and `GatheredBatchNorm2d` that do not take packed features.

    Args:
        model: the model, changed in place, or one layer.
        process_group: over which to take the statistics; None is the whole world.

    Returns the model, or the converted layer. Parameters and buffers are shared. Raises TypeError where `model` is not
    a module; TypeError, ValueError where a layer of packed features has a forward of its own, or hooks.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> type(dynconv.nn.convert_sync_batchnorm(model)[1]).__name__
        'SyncBatchNorm'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for masked, synchronised in (
        (MaskedBatchNorm2d, MaskedSyncBatchNorm2d),
        (GatheredBatchNorm2d, GatheredSyncBatchNorm2d),
    ):
        if isinstance(model, masked):
            converted = _share(synchronised, model)
            converted.process_group = process_group
            return converted
    if isinstance(model, (MaskedSyncBatchNorm2d, GatheredSyncBatchNorm2d)):
        return model
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    for name, child in model.named_children():
        model.add_module(name, convert_sync_batchnorm(child, process_group))
    return model


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
        """Map [N, capacity, H, W], zeros where nothing is, to [C], one sample after the other."""
        sums = values.sum((2, 3))
        if sums.shape[1] == 0:
            # Part of the graph all the same: other processes may wait for this one's part of a gradient.
            return sums.new_zeros(channels.shape[1]) + sums.sum()
        kept = sums.gather(1, channels.inverse.clamp(min=0).long())
        return torch.where(channels.mask, kept, 0).sum(0)

    def spread(values: Tensor) -> Tensor:
        return channels._gather(values, width)[:, :, None, None]

    if uses_batch_statistics(norm):
        sites = wide.new_full((channels.shape[0],), rows.shape[2] * rows.shape[3])
        if mask is not None:
            sites = mask.expand(rows.shape[0], 1, *rows.shape[2:]).sum((1, 2, 3)).to(wide.dtype)
        group = process_group(norm)
        count = torch.where(channels.mask, sites[:, None], 0).sum(0)
        sums, count = _summed(torch.stack([total(torch.where(computed, wide, 0)), count]), group).unbind()
        mean = sums / count.clamp(min=1)
        centred = torch.where(computed, wide - spread(mean), 0)
        variance = _summed(total(centred * centred), group) / count.clamp(min=1)
        if norm.training and norm.track_running_stats:
            _track(norm, mean, variance, count)
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
        group, count = process_group(norm), features.sites.count
        if group is None:
            result, mean, variance = ops.batch_norm(features, norm.weight, norm.bias, norm.eps, **finish)
        else:
            mean, variance, count = _synchronised_moments(features, group)
            result = _normalised(norm, features, mean, variance, finish)
        if norm.training and norm.track_running_stats:
            _track(norm, mean, variance, count)
        return result
    return _normalised(norm, features, norm.running_mean, norm.running_var, finish)


def _normalised(norm: nn.BatchNorm2d, features: PackedFeatures, mean: Tensor, variance: Tensor, finish: dict):
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = None if norm.bias is None else norm.bias.to(scale.dtype)
    return ops.epilogue(features, mean=mean.to(scale.dtype), scale=scale, shift=shift, **finish)


def process_group(norm: nn.BatchNorm2d | nn.SyncBatchNorm):
    """The processes over which the layer takes its statistics together; None where there is nobody else."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


class _SumOfProcesses(torch.autograd.Function):
    """Each process has a loss of its own, so the gradient is a sum over the processes as well."""

    @staticmethod
    def forward(ctx, values, group):
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _SumOfProcesses.apply(grad, ctx.group), None


@torch._disable_dynamo  # torch.compiler.disable, which imports a compiler here and not at the first call
def _exchanged(values: Tensor, group) -> Tensor:
    """Exchange between processes, outside of compiled graphs."""
    return _SumOfProcesses.apply(values, group)


def _summed(values: Tensor, group) -> Tensor:
    """The sum over the processes of a group; differentiable."""
    return values if group is None else _exchanged(values, group)


def _synchronised_moments(features: PackedFeatures, group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] over the active sites of all processes, and how many sites these are [1].

    Differentiable. In steps of PyTorch's own, in two passes: sums of squares would lose what the mean is large beside.
    """
    rows, sites = features
    active = torch.arange(rows.shape[0], device=rows.device)[:, None] < sites.count
    wide = torch.where(active, rows.to(torch.promote_types(rows.dtype, torch.float32)), 0)
    total = _summed(torch.cat([wide.sum(0), sites.count.to(wide.dtype)]), group)
    count = total[-1:].detach()
    mean = total[:-1] / count.clamp(min=1)
    centred = torch.where(active, wide - mean, 0)
    return mean, _summed((centred * centred).sum(0), group) / count.clamp(min=1), count


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Move the running statistics towards these, which are of `count` sites, [1] or [C]; no wait for the device.

    A batch without a site is no batch, and one in which no sample keeps a channel is none of that channel: neither
    counts in the cumulative average of `momentum=None`, which `torch.optim.swa_utils.update_bn` asks for.
    """
    # Not under torch.no_grad(), which an exported program cannot be saved with.
    mean, variance, count = mean.detach(), variance.detach(), count.detach()
    kept = count > 0
    norm.num_batches_tracked.add_(kept.any())
    momentum = norm.momentum
    if momentum is None:
        batches = norm.num_batches_tracked if count.numel() == 1 else norm.num_batches_tracked - _missed(norm, kept)
        momentum = 1 / batches.clamp(min=1).to(mean.dtype)
    sites = count.to(mean.dtype)
    share = momentum * kept.to(mean.dtype)
    unbiased = variance * (sites / (sites - 1).clamp(min=1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_((share * (value - running)).to(running.dtype))


def _missed(norm: nn.BatchNorm2d, kept: Tensor) -> Tensor:
    """Of the batches that the layer has tracked, this one included, how many did not have each channel: int64 [C].

    `num_batches_tracked` is one number for all channels, and the `state_dict` stays that of `nn.BatchNorm2d`: so the
    rest is a buffer that is not saved. A counter below the last one seen has been reset or loaded: with it begins a new
    average, in which all batches so far have all channels.
    """
    tracked = norm.num_batches_tracked
    if not hasattr(norm, "_missed_batches"):
        norm.register_buffer("_missed_batches", kept.new_zeros(kept.shape, dtype=torch.int64), persistent=False)
        norm.register_buffer("_missed_until", torch.zeros_like(tracked), persistent=False)
    is_new = tracked - kept.any().long() < norm._missed_until
    norm._missed_batches.copy_(torch.where(is_new, 0, norm._missed_batches) + (kept.any() & ~kept))
    norm._missed_until.copy_(tracked)
    return norm._missed_batches
