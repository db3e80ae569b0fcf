"""Features at active sites, or of kept channels, only: what travels between the layers of a packed chain."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ._backend import module
from .channels import ActiveChannels
from .sites import ActiveSites


def _lacks(self, name: str):
    """Say what took packed features for a tensor: `nn.BatchNorm2d`, or what a conversion has made of a layer."""
    raise AttributeError(
        f"{type(self).__name__} is no tensor and has no attribute {name!r}: expected a layer of dynconv.nn, such as "
        "MaskedBatchNorm2d (which dynconv.nn.convert_sync_batchnorm converts, and PyTorch's function of that name not)"
    )


class PackedFeatures(NamedTuple):
    """Features at the active sites of an `ActiveSites`, the others being zero: dense [N, C, H, W] without its zeros.

    `dynconv.pack` and `masked_conv2d(..., packed=True)` make them, `masked_conv2d` takes them, `unpack` spreads them
    out again.

    Attributes:
        rows: [M, C] with M >= the number of active sites, and no more than that on a CPU, outside of compiled graphs;
            sites.capacity elsewhere, known without waiting for the device. Row m belongs to the site sites.index[m];
            what dynconv makes has zeros past `sites.count`, and what lies there is not read.
        sites: where the rows belong, in an [N, 1, H, W] mask.

    Example:
        >>> sites = dynconv.ActiveSites(torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3))
        >>> packed = dynconv.pack(torch.ones(1, 8, 3, 3), sites)
        >>> packed.rows.shape, packed.shape
        (torch.Size([3, 8]), (1, 8, 3, 3))
    """

    rows: Tensor
    sites: ActiveSites

    __getattr__ = _lacks

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the dense features."""
        n, height, width = self.sites.shape
        return n, self.rows.shape[1], height, width

    def unpack(
        self,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
        inactive: Tensor | float | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Spread out to a dense tensor [N, C, H, W] in channels_last.

        That is `where(active, activation(features + residual), inactive)`.

        Differentiable in the rows, `residual` and `inactive`. A gate of the sites does not take part.

        Args:
            activation: None, "relu", "relu6", "silu", "gelu" or "hardswish".
            residual: broadcastable to [N, C, H, W], added at the active sites.
            inactive: broadcastable to [N, C, H, W], or a number: the values elsewhere; None is zeros.
            out: inference only: channels_last, updated in place at the active sites and nowhere else; may be the
                residual, and otherwise has no memory in common with what is read.

        Raises:
            TypeError, ValueError: as `masked_conv2d` does for these arguments.
        """
        epilogue = module(".ops.epilogue").epilogue
        ungated = PackedFeatures(self.rows, self.sites.ungated)
        return epilogue(ungated, activation=activation, residual=residual, inactive=inactive, out=out)


class PackedChannels(NamedTuple):
    """Features of the channels that each sample keeps, the others being zero: dense [N, C, H, W] without its zeros.

    `dynconv.pack` and `gathered_conv2d(..., packed=True)` make them, `gathered_conv2d` takes them, `unpack` spreads
    them out again. A gate of the channels has been applied by whoever made them, and is not applied again.

    Attributes:
        features: [N, K, H, W] in channels_last, K at least the most channels that a sample keeps: the i-th channel of
            sample n is its channel channels.index[n, i]. Zeros from channels.count[n] on.
        channels: which channels these are, of [N, C].

    Example:
        >>> packed = dynconv.pack(torch.ones(1, 3, 2, 2), dynconv.ActiveChannels(torch.tensor([[True, False, True]])))
        >>> packed.features.shape, packed.unpack()[0, :, 0, 0].tolist()
        (torch.Size([1, 2, 2, 2]), [1.0, 0.0, 1.0])
    """

    features: Tensor
    channels: ActiveChannels

    __getattr__ = _lacks

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the dense features."""
        return (*self.channels.shape, *self.features.shape[2:])

    def unpack(self) -> Tensor:
        """Spread out to a dense tensor [N, C, H, W] in channels_last, zeros in the other channels; differentiable.

        Raises TypeError, ValueError: the features are not those of the channels.
        """
        return module(".ops.gathered_conv").unpack(self)


def pack(input: Tensor, active: ActiveSites | ActiveChannels) -> PackedFeatures | PackedChannels:
    """Take the rows of a dense tensor [N, C, H, W] at the active sites, or its kept channels; differentiable.

    A gate does not take part. Raises TypeError where `input` is no floating tensor or `active` neither ActiveSites nor
    ActiveChannels, ValueError where their sizes or devices differ.

    Example:
        >>> x = torch.arange(4.0).view(1, 1, 2, 2)
        >>> dynconv.pack(x, dynconv.ActiveSites(x > 1)).rows.flatten().tolist()
        [2.0, 3.0]
    """
    if isinstance(active, ActiveChannels):
        return module(".ops.gathered_conv").pack(input, active)
    return module(".ops.epilogue").pack(input, active)
