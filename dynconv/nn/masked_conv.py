"""Masked convolution as a module."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.masked_conv import masked_conv2d
from ..packed import PackedFeatures
from ..sites import ActiveSites
from .dense import check_layer, share_tensors


class MaskedConv2d(nn.Conv2d):
    """An `nn.Conv2d` that computes the active sites of a mask: same constructor, parameters and `state_dict`.

    Every `padding_mode` of `nn.Conv2d` works; those other than "zeros" copy the input to pad it.

    Example:
        >>> conv, x = dynconv.nn.MaskedConv2d(8, 8, 3, padding=1), torch.randn(2, 8, 6, 6)
        >>> y = conv(x, torch.rand(2, 1, 6, 6) < 0.25, inactive=x)  # skipped pixels keep the input
    """

    stands_for = nn.Conv2d

    def forward(
        self,
        input: Tensor | PackedFeatures,
        mask: Tensor | ActiveSites | None = None,
        *,
        activation: str | None = None,
        residual: Tensor | PackedFeatures | None = None,
        inactive: Tensor | float | None = None,
        out: Tensor | None = None,
        packed: bool = False,
    ) -> Tensor | PackedFeatures:
        """Map [N, Cin, H, W] to [N, Cout, Ho, Wo], either of them packed, or [Cin, H, W] to [Cout, Ho, Wo].

        The keywords and errors of `masked_conv2d`.
        """
        padding = self.padding
        if self.padding_mode != "zeros":
            if isinstance(input, PackedFeatures):
                raise ValueError(f"input: expected a dense tensor for padding_mode {self.padding_mode!r}, got packed")
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return masked_conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            mask=mask, activation=activation, residual=residual, inactive=inactive, out=out, packed=packed,
        )  # fmt: skip

    @classmethod
    def from_dense(cls, module: nn.Conv2d) -> MaskedConv2d:
        """Make a masked layer that shares the dense layer's parameters.

        Raises TypeError where `module` is not an `nn.Conv2d`, one whose parameters do not exist yet, or one with a
        forward of its own; ValueError where it has hooks, or parameters that are computed at each call.
        """
        check_layer(module, nn.Conv2d)
        masked = cls(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, module.groups, module.bias is not None, module.padding_mode, device="meta",
        )  # fmt: skip
        return share_tensors(masked, module)
