"""Layers over `dynconv.deform_conv2d` and `dynconv.deform_aggregate2d`.

They keep the parameter names and the order of channels of the public implementations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._geometry import Geometry, IntPair, Padding
from ..channels import check_int
from ..ops.deform import deform_aggregate2d, deform_conv2d
from .dynamic_filter import check_groups, check_map, check_odd


class DeformConv2d(nn.Module):
    """Deformable convolution: the constructor, parameters and forward of `torchvision.ops.DeformConv2d`.

    DCN v1 (Dai et al., ICCV 2017), and v2 with a mask (Zhu et al., CVPR 2019).

    Args:
        in_channels, out_channels: of the convolution.
        kernel_size: an int or a pair, as the next three.
        stride, padding, dilation: as in `nn.Conv2d`, "same" and "valid" included.
        groups: of the convolution; a divisor of both numbers of channels.
        bias: whether to learn one.

    Raises TypeError and ValueError for an argument of the wrong kind or value.

    Example:
        >>> conv = dynconv.nn.DeformConv2d(8, 4, 3, padding=1)
        >>> conv(torch.randn(1, 8, 6, 6), torch.randn(1, 2 * 9, 6, 6)).shape
        torch.Size([1, 4, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        in_channels = check_int("in_channels", in_channels)
        out_channels = check_int("out_channels", out_channels)
        groups = check_int("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name}: expected a multiple of groups = {groups}, got {channels}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        geometry = Geometry.of(kernel_size, stride, padding, dilation)
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation
        self.padding = padding if isinstance(padding, str) else geometry.padding
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw them as `nn.Conv2d` does: uniform within 1 / sqrt(inputs of an output)."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map [N, Cin, H, W] to [N, Cout, Ho, Wo]: `dynconv.deform_conv2d` with this layer's parameters.

        Args:
            input: [N, Cin, H, W].
            offset: [N, 2 * OG * kH * kW, Ho, Wo], (dy, dx) of each tap.
            mask: [N, OG * kH * kW, Ho, Wo], a factor for each sample.

        Raises TypeError or ValueError for arguments of the wrong kind or shape.
        """
        check_map("input", input, self.in_channels)
        return deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask=mask
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class DCNv2(DeformConv2d):
    """A deformable convolution that predicts its offsets and its mask (Zhu et al., CVPR 2019).

    `conv_offset`, of the same geometry, makes the offsets and, through a sigmoid, the mask. It begins with zeros: no
    offset, and a mask of 1/2. Parameters and order of channels are those of `mmcv.ops.ModulatedDeformConv2dPack`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for `DeformConv2d`.
        offset_groups: groups of input channels with offsets and a mask of their own (`deform_groups`).

    Raises TypeError and ValueError for an argument of the wrong kind or value.

    Example:
        >>> conv = dynconv.nn.DCNv2(8, 4, 3, padding=1)
        >>> conv(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 4, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        *,
        device=None,
        dtype=None,
    ) -> None:
        in_channels = check_int("in_channels", in_channels)
        offset_groups = check_groups("offset_groups", offset_groups, in_channels)
        made = dict(device=device, dtype=dtype)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **made)
        self.offset_groups = offset_groups
        self.conv_offset = nn.Conv2d(
            in_channels, 3 * offset_groups * math.prod(self.kernel_size), self.kernel_size, self.stride, self.padding,
            self.dilation, **made,
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw them as `DeformConv2d` does, and zeros for `conv_offset`."""
        super().reset_parameters()
        if hasattr(self, "conv_offset"):  # not yet where the parent makes its own parameters
            nn.init.zeros_(self.conv_offset.weight)
            nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, Cin, H, W] to [N, Cout, Ho, Wo]. Raises TypeError or ValueError for another kind or shape."""
        check_map("input", input, self.in_channels)
        predicted = self.conv_offset(input)
        masks = predicted.shape[1] // 3
        offset, mask = predicted.split([2 * masks, masks], dim=1)
        return super().forward(input, offset, mask.sigmoid())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}"


class DCNv4(nn.Module):
    """The operator of DCNv4 (Xiong et al., CVPR 2024): predicted weights add up what predicted positions sample.

    `value_proj` projects every pixel, `offset_mask` predicts from the layer's input the offsets and the weights, which
    are not normalised, of each group of channels, and `output_proj` projects the sums. Unlike the authors' code it
    takes and gives [N, C, H, W], yet its parameters are theirs, with their order of the taps (column by column, dx
    before dy) and the unused rows that fill `offset_mask` up to a multiple of 8; `remove_center` and
    `center_feature_scale` are not there. The stride is 1 and the padding keeps the size.

    Args:
        channels: C, of the input and of the output.
        kernel_size: an odd int.
        dilation: an int.
        groups: G groups of channels with offsets and weights of their own (`group`).
        offset_scale: positions are the centre plus offset_scale * (tap + offset).
        dw_kernel_size: of a depthwise convolution before `offset_mask`, `offset_mask_dw`; an odd int, or None.
        bias: of `output_proj` (`output_bias`).
        pointwise: whether there are `value_proj` and `output_proj` (not `without_pointwise`).

    Raises TypeError and ValueError for an argument of the wrong kind or value.

    Example:
        >>> layer = dynconv.nn.DCNv4(8, groups=2)
        >>> layer(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        groups: int = 4,
        offset_scale: float = 1.0,
        *,
        dw_kernel_size: int | None = None,
        bias: bool = True,
        pointwise: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        channels = check_int("channels", channels)
        dilation = check_int("dilation", dilation)
        kernel_size = check_odd("kernel_size", kernel_size)
        groups = check_groups("groups", groups, channels)
        if not isinstance(offset_scale, (int, float)) or isinstance(offset_scale, bool):
            raise TypeError(f"offset_scale: expected a float, got {offset_scale!r}")
        if not math.isfinite(offset_scale):
            raise ValueError(f"offset_scale: expected a finite number, got {offset_scale}")
        self.channels, self.kernel_size, self.dilation, self.groups = channels, kernel_size, dilation, groups
        self.offset_scale = offset_scale
        made = dict(device=device, dtype=dtype)
        self.offset_mask_dw = None
        if dw_kernel_size is not None:
            dw_kernel_size = check_odd("dw_kernel_size", dw_kernel_size)
            self.offset_mask_dw = nn.Conv2d(
                channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels, **made
            )
        taps = kernel_size**2
        self.offset_mask = nn.Linear(channels, math.ceil(3 * groups * taps / 8) * 8, **made)
        self.value_proj = nn.Linear(channels, channels, **made) if pointwise else None
        self.output_proj = nn.Linear(channels, channels, bias=bias, **made) if pointwise else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as published: no offset and no weight, so that the output is zero at first but for biases."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        for projection in (self.value_proj, self.output_proj):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, H, W]. Raises TypeError or ValueError for another kind or shape."""
        check_map("input", input, self.channels)
        value = input if self.value_proj is None else _project(input, self.value_proj.weight, self.value_proj.bias)
        seen = input if self.offset_mask_dw is None else self.offset_mask_dw(input)
        # Rows of the weight are put in order, not the channels of a picture.
        linear, rows = self.offset_mask, self._rows(input.device)
        predicted = _project(seen, linear.weight[rows], linear.bias[rows])
        count = predicted.shape[1] // 3
        offset, weights = predicted.split([2 * count, count], dim=1)
        if self.offset_scale != 1:
            offset = offset * self.offset_scale + self._spread(offset)
        result = deform_aggregate2d(
            value, offset, weights, kernel_size=self.kernel_size, padding=self.dilation * (self.kernel_size // 2),
            dilation=self.dilation,
        )  # fmt: skip
        return result if self.output_proj is None else _project(result, self.output_proj.weight, self.output_proj.bias)

    def _rows(self, device: torch.device) -> Tensor:
        """The rows of `offset_mask` in the op's order: a group's offsets are 2 K rows, its weights the next K."""
        taps = self.kernel_size**2
        group = 3 * taps * torch.arange(self.groups, device=device).view(-1, 1, 1)
        tap = torch.arange(taps, device=device).view(self.kernel_size, -1).T.reshape(1, -1, 1)
        offsets = group + 2 * tap + torch.arange(1, -1, -1, device=device)
        return torch.cat([offsets.flatten(), (group + 2 * taps + tap).flatten()])

    def _spread(self, offset: Tensor) -> Tensor:
        """[1, 2 * G * K, 1, 1]: how far `offset_scale` moves each tap from where the op has it."""
        steps = torch.arange(self.kernel_size, device=offset.device, dtype=offset.dtype) - self.kernel_size // 2
        steps = steps * (self.dilation * (self.offset_scale - 1))
        taps = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).flatten()
        return taps.repeat(self.groups).view(1, -1, 1, 1)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, dilation={self.dilation}, groups={self.groups}, "
            f"offset_scale={self.offset_scale}"
        )


def _project(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer over the channels of [N, C, H, W]."""
    return F.conv2d(features, weight[:, :, None, None], bias)
