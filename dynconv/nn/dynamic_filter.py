"""Layers that predict a filter for every pixel: dynamic filters, involution, CARAFE, decoupled dynamic filters."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import kind_of
from .._geometry import Geometry, IntPair, Padding
from ..channels import check_int
from ..ops._common import check_features, check_normalization, in_rows, sites_of, unsqueezed
from ..ops.dynamic_filter import dynamic_filter2d
from ..sites import ActiveSites
from .masked_conv import MaskedConv2d

Mask = Tensor | ActiveSites | None


class DynamicFilter2d(nn.Module):
    """Predicts the filters of every site from the window that they are applied to, and applies them.

    Dynamic filter networks (Jia et al., NeurIPS 2016) and, with normalized filters and a guidance, kernel prediction
    networks (Mildenhall et al., CVPR 2018). The generator is a convolution with the filter's own kernel, stride,
    padding and dilation, a ReLU, and a 1x1 convolution to groups * kH * kW channels: `generator.0` and `generator.2`
    in the `state_dict`. With a mask both are computed at the active sites only.

    Args:
        in_channels: C, channels of the input and of the output.
        kernel_size, stride, padding, dilation: as for `nn.Conv2d`, "same" and "valid" included.
        groups: G, a divisor of C; the channels of a group share their filters. 1: one filter a site, as in both papers.
        normalization: of the taps of a filter: None, "softmax", "sigmoid" or "l2".
        guidance_channels: channels of the features that the filters are predicted from; None: the input itself.
        hidden_channels: between the generator's convolutions; None: as many as it reads.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> layer = dynconv.nn.DynamicFilter2d(8, 3, padding=1, normalization="softmax")
        >>> layer(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        *,
        normalization: str | None = None,
        guidance_channels: int | None = None,
        hidden_channels: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        in_channels = check_int("in_channels", in_channels)
        groups = check_groups("groups", groups, in_channels)
        geometry = Geometry.of(kernel_size, stride, padding, dilation)
        check_normalization(normalization)
        read = in_channels if guidance_channels is None else guidance_channels
        read = check_int("guidance_channels", read)
        hidden = read if hidden_channels is None else hidden_channels
        hidden = check_int("hidden_channels", hidden)
        self.in_channels, self.groups, self.guidance_channels = in_channels, groups, guidance_channels
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation
        self.padding = padding if isinstance(padding, str) else geometry.padding
        self.normalization = normalization
        factory = {"device": device, "dtype": dtype}
        filters = groups * self.kernel_size[0] * self.kernel_size[1]
        self.generator = nn.Sequential(
            MaskedConv2d(read, hidden, self.kernel_size, self.stride, self.padding, self.dilation, **factory),
            nn.ReLU(),
            MaskedConv2d(hidden, filters, 1, **factory),
        )

    def forward(self, input: Tensor, guidance: Tensor | None = None, mask: Mask = None) -> Tensor:
        """Map [N, C, H, W] to [N, C, Ho, Wo] in channels_last.

        Args:
            input: the features to filter.
            guidance: [N, guidance_channels, H, W], what to predict the filters from, where the layer has its channels.
            mask: the sites to compute, as for `dynconv.dynamic_filter2d`; the others become zeros.

        Raises TypeError or ValueError for arguments of the wrong kind or shape.
        """
        check_map("input", input, self.in_channels)
        guidance = _guidance(input, guidance, self.guidance_channels)
        if mask is None:
            filters, sites = self.generator(guidance), None
        else:
            geometry = Geometry.of(self.kernel_size, self.stride, self.padding, self.dilation)
            sites = sites_of(mask, (input.shape[0], *geometry.output_size(*input.shape[2:])), input)
            first, _, last = self.generator
            # The gate is for the output alone: the filters of an active site do not depend on its value.
            hidden = first(guidance, sites.ungated, activation="relu", packed=True)
            filters = last(hidden, sites.ungated)
        return dynamic_filter2d(
            input, filters, kernel_size=self.kernel_size, stride=self.stride, padding=self.padding,
            dilation=self.dilation, normalization=self.normalization, mask=sites,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, groups={self.groups}, normalization={self.normalization!r}"
        )


class Involution2d(nn.Module):
    """Involution (Li et al., CVPR 2021): a filter of its own for each pixel, shared by the channels of a group.

    The filters come from the pixel alone: a 1x1 convolution with batch normalisation and a ReLU (`conv1.conv`,
    `conv1.bn`), then one to groups * kernel_size^2 channels (`conv2.conv`), which is what the authors' layer has in its
    `state_dict`. With a stride, features are averaged over stride x stride pixels before.

    Args:
        channels: C, of the input and of the output.
        kernel_size: an odd int.
        stride: an int of at least 1; height and width of the input have to be multiples of it.
        group_channels: channels that share a filter, a divisor of C.
        reduction_ratio: the first convolution has C // reduction_ratio channels.
        dilation: of the filters' taps.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> layer = dynconv.nn.Involution2d(16, kernel_size=3)
        >>> layer(torch.randn(2, 16, 6, 6)).shape
        torch.Size([2, 16, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        group_channels: int = 16,
        reduction_ratio: int = 4,
        dilation: int = 1,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        channels = check_int("channels", channels)
        kernel_size = check_odd("kernel_size", kernel_size)
        stride = check_int("stride", stride)
        dilation = check_int("dilation", dilation)
        group_channels = check_groups("group_channels", group_channels, channels)
        reduction_ratio = check_int("reduction_ratio", reduction_ratio, most=channels)
        self.channels, self.kernel_size, self.stride, self.dilation = channels, kernel_size, stride, dilation
        self.group_channels, self.groups = group_channels, channels // group_channels
        factory = {"device": device, "dtype": dtype}
        reduced = channels // reduction_ratio
        conv = nn.Conv2d(channels, reduced, 1, bias=False, **factory)
        span = MaskedConv2d(reduced, self.groups * kernel_size**2, 1, **factory)
        self.conv1 = nn.Sequential(
            OrderedDict(conv=conv, bn=nn.BatchNorm2d(reduced, **factory), activate=nn.ReLU(inplace=True))
        )
        self.conv2 = nn.Sequential(OrderedDict(conv=span))
        for layer in (conv, span):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(span.bias)

    def forward(self, input: Tensor, mask: Mask = None) -> Tensor:
        """Map [N, C, H, W] to [N, C, H / stride, W / stride] in channels_last.

        `mask` has the sites to compute, as for `dynconv.dynamic_filter2d`: the filters of the others are not made, and
        their outputs are zeros. The first convolution is computed everywhere, for its batch normalisation.

        Raises TypeError or ValueError for arguments of the wrong kind or shape.
        """
        check_map("input", input, self.channels)
        height, width = input.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"input: expected a height and a width that are multiples of the stride, {self.stride}, got "
                f"{list(input.shape)}"
            )
        input = in_rows(input)
        pooled = input if self.stride == 1 else F.avg_pool2d(input, self.stride)
        sites = None if mask is None else sites_of(mask, (input.shape[0], *pooled.shape[2:]), input)
        filters = self.conv2.conv(self.conv1(pooled), None if sites is None else sites.ungated)
        return dynamic_filter2d(
            input, filters, kernel_size=self.kernel_size, stride=self.stride,
            padding=self.dilation * (self.kernel_size // 2), dilation=self.dilation, mask=sites,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"group_channels={self.group_channels}, dilation={self.dilation}"
        )


class CARAFE(nn.Module):
    """Content-aware upsampling (Wang et al., ICCV 2019): each pixel of the result has a softmax filter of its own.

    A 1x1 convolution compresses the channels (`channel_compressor`), another one (`content_encoder`) predicts the
    filters of the scale_factor^2 pixels that a pixel becomes, in the order of `F.pixel_shuffle`: names and order are
    those of the authors' `CARAFEPack` in mmcv.

    Args:
        channels: C, of the input and of the output.
        scale_factor: an int of at least 1.
        kernel_size: of the predicted filters, odd; mmcv's `up_kernel`.
        encoder_kernel, encoder_dilation: of the content encoder; the kernel is odd.
        compressed_channels: between the two convolutions.
        groups: a divisor of C; the channels of a group share their filters; mmcv's `up_group`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> layer = dynconv.nn.CARAFE(8)
        >>> layer(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 8, 12, 12])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int = 2,
        kernel_size: int = 5,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        *,
        groups: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        channels = check_int("channels", channels)
        scale_factor = check_int("scale_factor", scale_factor)
        kernel_size = check_odd("kernel_size", kernel_size)
        encoder_kernel = check_odd("encoder_kernel", encoder_kernel)
        encoder_dilation = check_int("encoder_dilation", encoder_dilation)
        compressed_channels = check_int("compressed_channels", compressed_channels)
        groups = check_groups("groups", groups, channels)
        self.channels, self.scale_factor, self.kernel_size, self.groups = channels, scale_factor, kernel_size, groups
        factory = {"device": device, "dtype": dtype}
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1, **factory)
        self.content_encoder = nn.Conv2d(
            compressed_channels, groups * (kernel_size * scale_factor) ** 2, encoder_kernel,
            padding=encoder_dilation * (encoder_kernel // 2), dilation=encoder_dilation, **factory,
        )  # fmt: skip
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)  # close to averaging at first
        nn.init.zeros_(self.channel_compressor.bias)
        nn.init.zeros_(self.content_encoder.bias)

    def forward(self, input: Tensor, mask: Mask = None) -> Tensor:
        """Map [N, C, H, W] to [N, C, H * scale_factor, W * scale_factor] in channels_last.

        `mask` has the pixels of the result to compute, as for `dynconv.dynamic_filter2d`; the filters are predicted for
        all of them. Raises TypeError or ValueError for arguments of the wrong kind or shape.
        """
        check_map("input", input, self.channels)
        input = in_rows(input)
        filters = F.pixel_shuffle(self.content_encoder(self.channel_compressor(input)), self.scale_factor)
        return dynamic_filter2d(
            input, filters, kernel_size=self.kernel_size, padding=self.kernel_size // 2,
            scale_factor=self.scale_factor, normalization="softmax", mask=mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, scale_factor={self.scale_factor}, kernel_size={self.kernel_size}, groups={self.groups}"
        )


class FilterNorm(nn.Module):
    """Filter normalisation (Zhou et al., CVPR 2021): every predicted filter gets mean 0 and a set standard deviation.

    out = (filter - mean) / (standard deviation + 1e-10) * std + mean, over the kernel_size^2 taps of a filter, where
    `std` is gain(nonlinearity) / kernel_size, or a parameter for each channel and tap (`running_std`), and the last
    `mean` a parameter (`running_mean`) or nothing. Both parameters are of shape [in_channels * kernel_size^2], as in
    the authors' code. Half types are computed in float32.

    Args:
        in_channels: filters side by side, one behind the other in the channels: 1 for filters of pixels.
        kernel_size: an int of at least 2.
        nonlinearity: that follows, as for `torch.nn.init.calculate_gain`.
        running_std, running_mean: whether these are parameters.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> filters = dynconv.nn.FilterNorm(1, kernel_size=3)(torch.randn(1, 9, 6, 6))
        >>> torch.allclose(filters.mean(1), torch.zeros(1, 6, 6), atol=1e-6)
        True
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        nonlinearity: str = "linear",
        running_std: bool = False,
        running_mean: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        in_channels = check_int("in_channels", in_channels)
        kernel_size = check_int("kernel_size", kernel_size, 2)
        self.in_channels, self.kernel_size = in_channels, kernel_size
        entries = in_channels * kernel_size**2
        try:
            std = nn.init.calculate_gain(nonlinearity) / kernel_size
        except ValueError:
            raise ValueError(
                f"nonlinearity: expected a name that torch.nn.init.calculate_gain knows, got {nonlinearity!r}"
            ) from None
        self.std = nn.Parameter(torch.randn(entries, device=device, dtype=dtype) * std) if running_std else std
        self.mean = nn.Parameter(torch.randn(entries, device=device, dtype=dtype)) if running_mean else None

    def forward(self, filters: Tensor) -> Tensor:
        """Map [N, in_channels * kernel_size^2, ...] to the same shape and type.

        Raises TypeError or ValueError for filters of another kind or shape.
        """
        check_features("filters", filters)
        entries = self.in_channels * self.kernel_size**2
        if filters.dim() < 2 or filters.shape[1] != entries:
            raise ValueError(f"filters: expected shape [N, {entries}, ...], got {list(filters.shape)}")
        taps = filters.unflatten(1, (self.in_channels, self.kernel_size**2))
        taps = taps.to(torch.promote_types(filters.dtype, torch.float32))
        centred = taps - taps.mean(2, keepdim=True)
        # Not `std`, which warns of no samples; this has a zero gradient, too, where all the taps are the same.
        std = torch.linalg.vector_norm(centred, dim=2, keepdim=True) / (self.kernel_size**2 - 1) ** 0.5
        result = (centred / (std + 1e-10)).flatten(1, 2)
        shape = (entries, *(1,) * (filters.dim() - 2))
        result = result * (self.std.reshape(shape) if isinstance(self.std, Tensor) else self.std)
        if self.mean is not None:
            result = result + self.mean.reshape(shape)
        return result.to(filters.dtype)

    def extra_repr(self) -> str:
        running = f"running_std={isinstance(self.std, Tensor)}, running_mean={self.mean is not None}"
        return f"{self.in_channels}, {self.kernel_size}, {running}"


class DDF(nn.Module):
    """Decoupled dynamic filters (Zhou et al., CVPR 2021): a filter of each pixel times one of each channel.

    The filters of pixels come from a 1x1 convolution, those of channels from squeeze-and-excitation, both through
    `FilterNorm`. Children and `state_dict` are those of the authors' `DDFPack` (`spatial_branch`, `channel_branch`), of
    which it is the 'mul' combination with one head.

    Args:
        channels: C, of the input and of the output.
        kernel_size: odd, at least 3.
        stride: an int; Ho = ceil(H / stride).
        dilation: of the filters' taps.
        se_ratio: the channel branch has int(C * se_ratio) channels in the middle, at least one.
        nonlinearity: that follows the layer, as for `torch.nn.init.calculate_gain`.
        gen_kernel_size: above 1 a depthwise convolution of that odd size before the 1x1 one of the spatial branch.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> layer = dynconv.nn.DDF(8)
        >>> layer(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        gen_kernel_size: int = 1,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        channels = check_int("channels", channels)
        kernel_size = check_odd("kernel_size", kernel_size, 3)
        stride = check_int("stride", stride)
        dilation = check_int("dilation", dilation)
        gen_kernel_size = check_odd("gen_kernel_size", gen_kernel_size)
        self.channels, self.kernel_size, self.stride, self.dilation = channels, kernel_size, stride, dilation
        factory = {"device": device, "dtype": dtype}
        self.spatial_branch = _spatial_branch(channels, kernel_size, stride, nonlinearity, gen_kernel_size, factory)
        self.channel_branch = _channel_branch(channels, kernel_size, nonlinearity, se_ratio, factory)

    def forward(self, input: Tensor, mask: Mask = None) -> Tensor:
        """Map [N, C, H, W] to [N, C, Ho, Wo] in channels_last.

        `mask` has the sites to compute, as for `dynconv.dynamic_filter2d`; the filters are predicted for all of them.
        Raises TypeError or ValueError for arguments of the wrong kind or shape.
        """
        check_map("input", input, self.channels)
        input = in_rows(input)
        return _ddf(input, input, self.spatial_branch, self.channel_branch, self, self.stride, mask)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


class DDFUp(nn.Module):
    """Upsampling with decoupled dynamic filters (Zhou et al., CVPR 2021).

    Each of the scale_factor^2 pixels that a pixel becomes has a `DDF` of its own, in the order of `F.pixel_shuffle`.
    Children and `state_dict` are those of the authors' `DDFUpPack` (`spatial_branch.<i>`, `channel_branch.<i>`).

    Args:
        channels: C, of the input and of the output.
        kernel_size, dilation, se_ratio, nonlinearity, gen_kernel_size: as for `DDF`.
        scale_factor: an int of at least 1.
        joint_channels: channels of the guidance that the filters of pixels are predicted from, with a
            `gen_kernel_size` of at least 3; None: the input itself.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> layer = dynconv.nn.DDFUp(8)
        >>> layer(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 8, 12, 12])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        scale_factor: int = 2,
        dilation: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "linear",
        gen_kernel_size: int = 1,
        joint_channels: int | None = None,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        channels = check_int("channels", channels)
        kernel_size = check_odd("kernel_size", kernel_size, 3)
        scale_factor = check_int("scale_factor", scale_factor)
        dilation = check_int("dilation", dilation)
        gen_kernel_size = check_odd("gen_kernel_size", gen_kernel_size)
        if joint_channels is not None:
            joint_channels = check_int("joint_channels", joint_channels)
            gen_kernel_size = max(gen_kernel_size, 3)
        self.channels, self.kernel_size, self.dilation = channels, kernel_size, dilation
        self.scale_factor, self.joint_channels = scale_factor, joint_channels
        factory = {"device": device, "dtype": dtype}
        read, parts = joint_channels or channels, range(scale_factor**2)
        self.spatial_branch = nn.ModuleList(
            _spatial_branch(read, kernel_size, 1, nonlinearity, gen_kernel_size, factory) for _ in parts
        )
        self.channel_branch = nn.ModuleList(
            _channel_branch(channels, kernel_size, nonlinearity, se_ratio, factory) for _ in parts
        )

    def forward(self, input: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Map [N, C, H, W] to [N, C, H * scale_factor, W * scale_factor] in channels_last.

        `guidance` [N, joint_channels, H, W], where the layer has its channels, is what the filters of pixels are
        predicted from. Raises TypeError or ValueError for arguments of the wrong kind or shape.
        """
        check_map("input", input, self.channels)
        guidance = _guidance(input, guidance, self.joint_channels)
        input = in_rows(input)
        parts = [
            _ddf(input, guidance, spatial, channel, self)
            for spatial, channel in zip(self.spatial_branch, self.channel_branch, strict=True)
        ]
        return in_rows(F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), self.scale_factor))

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, scale_factor={self.scale_factor}, "
            f"dilation={self.dilation}"
        )


def _ddf(input, guidance, spatial_branch, channel_branch, layer: nn.Module, stride: int = 1, mask: Mask = None):
    size = layer.kernel_size
    return dynamic_filter2d(
        input, spatial_branch(guidance), kernel_size=size, stride=stride, padding=layer.dilation * (size // 2),
        dilation=layer.dilation, channel_filters=channel_branch(input).reshape(*input.shape[:2], size, size), mask=mask,
    )  # fmt: skip


def _spatial_branch(channels, kernel_size, stride, nonlinearity, gen_kernel_size, factory) -> nn.Sequential:
    layers = []
    if gen_kernel_size > 1:
        around = {"padding": gen_kernel_size // 2, "groups": channels}
        layers.append(nn.Conv2d(channels, channels, gen_kernel_size, stride, **around, **factory))
        stride = 1
    layers.append(nn.Conv2d(channels, kernel_size**2, 1, stride, **factory))
    return nn.Sequential(*layers, FilterNorm(1, kernel_size, nonlinearity, **factory))


def _channel_branch(channels, kernel_size, nonlinearity, se_ratio, factory) -> nn.Sequential:
    if not isinstance(se_ratio, (int, float)) or isinstance(se_ratio, bool):
        raise TypeError(f"se_ratio: expected a float, got {se_ratio!r}")
    middle = int(channels * se_ratio) if math.isfinite(se_ratio) else 0
    if middle < 1:
        raise ValueError(f"se_ratio: expected at least one of the {channels} channels to remain, got {se_ratio}")
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(channels, middle, 1, **factory),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, channels * kernel_size**2, 1, **factory),
        FilterNorm(channels, kernel_size, nonlinearity, running_std=True, **factory),
    )


def check_odd(name: str, value: int, least: int = 1) -> int:
    """Return an argument that is an odd int: filters with a middle tap."""
    value = check_int(name, value, least)
    if value % 2 == 0:
        raise ValueError(f"{name}: expected an odd number, got {value}")
    return value


def check_groups(name: str, value: int, channels: int) -> int:
    """Return an argument that is an int which divides a number of channels."""
    value = check_int(name, value)
    if channels % value:
        raise ValueError(f"{name}: expected a divisor of the {channels} channels, got {value}")
    return value


def check_map(name: str, features: Tensor, channels: int | None = None) -> None:
    """That an argument is a feature map, with so many channels."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(features)}")
    check_features(name, features)
    if features.dim() != 4 or (channels is not None and features.shape[1] != channels):
        wanted = "C" if channels is None else channels
        raise ValueError(
            f"{name}: expected shape [N, {wanted}, H, W], got {list(features.shape)}{unsqueezed(name, features)}"
        )


def _guidance(input: Tensor, guidance: Tensor | None, channels: int | None) -> Tensor:
    """What filters are predicted from: the input, or a guidance of its size where the layer has channels for one."""
    if channels is None:
        if guidance is not None:
            raise ValueError("guidance: expected none, as the layer was made without, got one")
        return in_rows(input)
    check_map("guidance", guidance, channels)
    if guidance.shape[0] != input.shape[0] or guidance.shape[2:] != input.shape[2:]:
        wanted = [input.shape[0], channels, *input.shape[2:]]
        raise ValueError(f"guidance: expected shape {wanted}, got {list(guidance.shape)}")
    return in_rows(guidance)
