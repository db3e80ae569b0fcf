"""Batch normalisation of packed features: over the active sites, and no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import epilogue as ops
from ..packed import PackedFeatures


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """An `nn.BatchNorm2d` of packed features: in training its statistics are those of the active sites.

    Same constructor, parameters, buffers and `state_dict`. With no active site the running statistics stay as they
    are. The activation, the residual and the way back to a dense tensor come with it, in the same pass.
    """

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

        Raises TypeError where `module` is not an `nn.BatchNorm2d`.
        """
        if not isinstance(module, nn.BatchNorm2d):
            raise TypeError(f"module: expected an nn.BatchNorm2d, got {type(module).__name__}")
        masked = cls(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
        )
        masked._parameters, masked._buffers = dict(module._parameters), dict(module._buffers)
        return masked.train(module.training)


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether the layer normalises by the statistics of its input rather than by its running ones."""
    return norm.training or norm.running_mean is None


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
