"""Deformable convolutions as modules: torchvision's, and those that predict their own offsets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._geometry import IntPair, pair
from ..channels import check_int
from ..ops._common import in_rows
from ..ops.deform import deform_aggregate2d, deform_conv2d
from .dynamic_filter import check_groups, check_map, check_odd


class DeformConv2d(nn.Module):
    """`dynconv.deform_conv2d` as a layer (Dai et al., ICCV 2017; with a mask Zhu et al., CVPR 2019).

    Constructor, initialisation, parameters (`weight`, `bias`), `state_dict` and call are those of
    `torchvision.ops.DeformConv2d`.

    Args:
        in_channels, out_channels: Cin and Cout, multiples of `groups`.
        kernel_size, stride, padding, dilation: ints or pairs, as for `nn.Conv2d`.
        groups: of the weight; the offset groups are found from the offsets' shape.
        bias: whether there is one.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_int("in_channels", in_channels)
        check_int("out_channels", out_channels)
        check_groups("groups", groups, in_channels)
        check_groups("groups", groups, out_channels)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1)
        self.padding, self.dilation = pair(padding, "padding", 0), pair(dilation, "dilation", 1)
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Conv2d`: uniform within 1 / sqrt(fan-in)."""
        bound = self.weight[0].numel() ** -0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, Ho, Wo] in channels_last; arguments and errors of `dynconv.deform_conv2d`."""
        return deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class DCNv2(DeformConv2d):
    """A deformable convolution that predicts its offsets and modulation itself (Zhu et al., CVPR 2019).

    One convolution of the layer's own geometry, `conv_offset`, makes both; it is zero at first, so that the layer
    starts as a convolution times sigmoid(0). Parameters, their order and initialisation are those of mmcv's
    `ModulatedDeformConv2dPack`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for `DeformConv2d`.
        deform_groups: a divisor of Cin; the channels of a group share their offsets and modulation.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **factory)
        check_groups("deform_groups", deform_groups, in_channels)
        self.deform_groups = deform_groups
        predicted = 3 * deform_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels, predicted, self.kernel_size, self.stride, self.padding, self.dilation, **factory
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform within 1 / sqrt(Cin * kH * kW), everything else zero."""
        bound = (self.in_channels * self.kernel_size[0] * self.kernel_size[1]) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if hasattr(self, "conv_offset"):  # not yet where DeformConv2d makes its own parameters
            nn.init.zeros_(self.conv_offset.weight)
            nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, Ho, Wo] in channels_last.

        Raises TypeError or ValueError for an input of the wrong kind or shape.
        """
        check_map("input", input, self.in_channels)
        input = in_rows(input)
        predicted = self.conv_offset(input)
        share = predicted.shape[1] // 3
        offset, mask = predicted.split((2 * share, share), 1)
        return super().forward(input, offset, mask.sigmoid())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deform_groups={self.deform_groups}"


class DCNv4(nn.Module):
    """Deformable convolution v4 (Xiong et al., CVPR 2024): each pixel adds up samples at places of its own.

    A projection of the values (`value_proj`), the samples of `dynconv.deform_aggregate2d` at predicted offsets and with
    predicted weights that nothing normalises (`offset_mask`), a projection of the result (`output_proj`). Parameters,
    their shapes, order and initialisation are those of the authors' `DCNv4`, whose input is [N, H * W, C] and whose
    taps go column by column, (x, y) each; the layer sorts the predicting rows accordingly. Not offered: a stride,
    `remove_center`, `center_feature_scale`.

    Args:
        channels: C, of the input and of the output.
        kernel_size: odd.
        stride: 1.
        pad: dilation * (kernel_size // 2), so that the output has the input's size; None for just that.
        dilation: of the places without offsets.
        group: a divisor of C; the channels of a group share their offsets and weights.
        offset_scale: multiplies offsets and the places without them, about the site.
        dw_kernel_size: of a depthwise convolution (`offset_mask_dw`) before the offsets are predicted, odd; None: none.
        output_bias: whether `output_proj` has a bias.
        without_pointwise: leave out both projections.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int | None = None,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        *,
        output_bias: bool = True,
        without_pointwise: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_int("channels", channels)
        check_odd("kernel_size", kernel_size)
        check_int("stride", stride)
        if stride != 1:
            raise ValueError(f"stride: expected 1, got {stride}")
        check_int("dilation", dilation)
        padding = dilation * (kernel_size // 2)
        if pad is not None and pad != padding:
            raise ValueError(f"pad: expected {padding}, half the reach of the kernel, got {pad!r}")
        check_groups("group", group, channels)
        if not isinstance(offset_scale, (int, float)) or isinstance(offset_scale, bool):
            raise TypeError(f"offset_scale: expected a float, got {offset_scale!r}")
        self.channels, self.kernel_size, self.dilation, self.group = channels, kernel_size, dilation, group
        self.offset_scale, self.without_pointwise = offset_scale, without_pointwise
        factory = {"device": device, "dtype": dtype}
        self.offset_mask_dw = None
        if dw_kernel_size is not None:
            check_odd("dw_kernel_size", dw_kernel_size)
            around = {"padding": dw_kernel_size // 2, "groups": channels}
            self.offset_mask_dw = nn.Conv2d(channels, channels, dw_kernel_size, **around, **factory)
        predicted = -(-3 * group * kernel_size**2 // 8) * 8  # the authors fill the rows up to a multiple of 8
        self.offset_mask = nn.Linear(channels, predicted, **factory)
        if not without_pointwise:
            self.value_proj = nn.Linear(channels, channels, **factory)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero offsets and weights (so zero samples), Xavier for the projections."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        for projection in () if self.without_pointwise else (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W] in channels_last.

        Raises TypeError or ValueError for an input of the wrong kind or shape.
        """
        check_map("input", input, self.channels)
        input = in_rows(input)
        read = input if self.offset_mask_dw is None else in_rows(self.offset_mask_dw(input))
        offset, weights = (_linear(read, *rows) for rows in self._rows())
        values = input if self.without_pointwise else _linear(input, self.value_proj.weight, self.value_proj.bias)
        result = deform_aggregate2d(
            values, offset, weights, kernel_size=self.kernel_size, padding=self.dilation * (self.kernel_size // 2),
            dilation=self.dilation,
        )  # fmt: skip
        return result if self.without_pointwise else _linear(result, self.output_proj.weight, self.output_proj.bias)

    def _rows(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weight and bias that predict offsets, and those that predict weights, in the order of deform_aggregate2d.

        In `offset_mask` a group has (x, y) for each tap, then a weight for each, column by column; the op takes all
        groups' (y, x), and line by line.
        """
        size, group = self.kernel_size, self.group
        offsets, weights = [], []
        for rows in (self.offset_mask.weight, self.offset_mask.bias):
            rows = rows[: 3 * group * size**2].unflatten(0, (group, 3 * size**2))
            pairs, singles = rows.split((2 * size**2, size**2), 1)
            pairs = pairs.unflatten(1, (size, size, 2)).transpose(1, 2).flip(3)
            offsets.append(pairs.flatten(0, 3))
            weights.append(singles.unflatten(1, (size, size)).transpose(1, 2).flatten(0, 2))
        if self.offset_scale != 1:
            # The op leaves the places without offsets where they are, so their scaling goes into the offsets.
            places = (torch.arange(size, device=offsets[1].device) - size // 2) * self.dilation
            lines, columns = torch.meshgrid(places, places, indexing="ij")
            shift = (self.offset_scale - 1) * torch.stack((lines, columns), -1).flatten().repeat(group)
            offsets = [rows * self.offset_scale for rows in offsets]
            offsets[1] = offsets[1] + shift.to(offsets[1].dtype)
        return tuple(offsets), tuple(weights)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, dilation={self.dilation}, group={self.group}, "
            f"offset_scale={self.offset_scale}"
        )


def _linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer over the channels of a channels_last map."""
    return F.linear(features.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
