"""GatheredConv2d and GatheredLinear: drop-in layers of the channels that each sample keeps."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from .._backend import check_tracer
from ..channels import ActiveChannels
from ..ops.gathered_conv import gathered_conv2d
from ..ops.gathered_linear import gathered_linear
from ..packed import PackedChannels
from .dense import check_layer, share_tensors

Channels = Tensor | ActiveChannels | None


class GatheredConv2d(nn.Conv2d):
    """An `nn.Conv2d` that computes, for each sample, the channels that masks keep.

    Same constructor, parameters and `state_dict` (`padding_mode` "zeros" only).

    Example:
        >>> conv, keep = dynconv.nn.GatheredConv2d(8, 8, 3, padding=1), torch.rand(2, 8) < 0.5
        >>> y = conv(torch.randn(2, 8, 6, 6), keep, keep)
    """

    stands_for = nn.Conv2d

    @functools.wraps(nn.Conv2d.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {self.padding_mode!r}")

    def forward(
        self, input: Tensor | PackedChannels, in_mask: Channels = None, out_mask: Channels = None, **options
    ) -> Tensor | PackedChannels:
        """Map [N, Cin, H, W], or one image, to [N, Cout, Ho, Wo]: `dynconv.gathered_conv2d` with these parameters.

        `options` are its keywords `mask`, `activation`, `residual`, `inactive` and `packed`.
        """
        check_tracer(input)  # here, as torch.fx passes `options` that cannot be unpacked
        return gathered_conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, in_mask=in_mask,
            out_mask=out_mask, **options,
        )  # fmt: skip

    @classmethod
    def from_dense(cls, module: nn.Conv2d) -> GatheredConv2d:
        """Make a gathered layer that shares the dense layer's parameters.

        Raises TypeError where `module` is not an `nn.Conv2d`, or one with a forward of its own; ValueError where its
        padding is not of zeros, or it has hooks or parameters that are computed at each call.
        """
        check_layer(module, nn.Conv2d)
        gathered = cls(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, module.groups, module.bias is not None, module.padding_mode, device="meta",
        )  # fmt: skip
        return share_tensors(gathered, module)


class GatheredLinear(nn.Linear):
    """An `nn.Linear` that computes, for each sample, the features that masks keep.

    Same constructor, parameters and `state_dict`.

    Example:
        >>> layer = dynconv.nn.GatheredLinear(8, 16)
        >>> y = layer(torch.randn(2, 8), out_mask=torch.rand(2, 16) < 0.5)
    """

    stands_for = nn.Linear

    def forward(self, input: Tensor, in_mask: Channels = None, out_mask: Channels = None) -> Tensor:
        """Map [N, ..., Cin] to [N, ..., Cout]: `dynconv.gathered_linear` with this layer's parameters."""
        return gathered_linear(input, self.weight, self.bias, in_mask=in_mask, out_mask=out_mask)

    @classmethod
    def from_dense(cls, module: nn.Linear) -> GatheredLinear:
        """Make a gathered layer that shares the dense layer's parameters.

        Raises TypeError where `module` is not an `nn.Linear`, or one with a forward of its own; ValueError where it has
        hooks, or parameters that are computed at each call.
        """
        check_layer(module, nn.Linear)
        gathered = cls(module.in_features, module.out_features, module.bias is not None, device="meta")
        return share_tensors(gathered, module)
