"""Pixel-adaptive convolution (Su et al., CVPR 2019): taps weighed by how alike two pixels of a guidance are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._geometry import Geometry, IntPair, Padding
from ..channels import check_int
from ..ops._common import autocast, check_operand, check_types, in_rows
from ..ops.dynamic_filter import dynamic_filter2d
from .dynamic_filter import check_map


def pac_kernel(
    guidance: Tensor,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    *,
    normalize: bool = False,
) -> Tensor:
    """Compute the Gaussian kernel of pixel-adaptive convolution, `exp(-|f_j - f_i|^2 / 2)`, for site i and tap j.

    The taps are taken one after the other, forward and backward, so that no kH * kW copies of the guidance are made.
    Half types are computed in float32.

    Args:
        guidance: f, [N, F, H, W]; scale it by 1 / sigma for a Gaussian of another width.
        kernel_size: kH and kW, odd; an int or a pair, as the next three.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`, "same" and "valid" included. A site's own f_i is
            that of its middle tap, zeros outside of the image.
        normalize: divide by the sum over the taps, where it is not zero: a joint bilateral filter.

    Returns:
        [N, kH * kW, Ho, Wo] in channels_last and the guidance's type, values in 0..1: the `filters` of
        `dynconv.dynamic_filter2d`. Zeros for taps outside of the image.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape or value.
        RuntimeError: for a second derivative: it is differentiable once.

    Example:
        >>> kernel = dynconv.nn.pac_kernel(torch.ones(1, 3, 6, 6), 3, padding=1)
        >>> kernel.shape, kernel[0, :, 0, 0].sum().item()  # 4 of the 9 taps of a corner are inside
        (torch.Size([1, 9, 6, 6]), 4.0)
    """
    check_map("guidance", guidance)
    geometry = _odd(Geometry.of(kernel_size, stride, padding, dilation))
    geometry.output_size(*guidance.shape[2:])  # raises where the kernel does not fit
    wide = guidance.to(torch.promote_types(guidance.dtype, torch.float32))
    kernel = _Gaussian.apply(in_rows(wide), geometry)
    if normalize:
        total = kernel.sum(1, keepdim=True)
        kernel = kernel / torch.where(total == 0, 1, total)
    return kernel.to(guidance.dtype)


class _Gaussian(torch.autograd.Function):
    """Here so that the backward takes the differences anew: autograd would keep those of every tap."""

    @staticmethod
    def forward(ctx, guidance: Tensor, geometry: Geometry) -> Tensor:
        padded, size = _padded(guidance, geometry), geometry.output_size(*guidance.shape[2:])
        centre = _windows(padded, geometry, size)[_middle(geometry)]
        squares = [(window - centre).square_().sum(1) for window in _windows(padded, geometry, size)]
        kernel = torch.stack(squares, -1).mul_(-0.5).exp_()
        outside = ~_inside(guidance, geometry, size)
        kernel = kernel.masked_fill_(outside, 0).permute(0, 3, 1, 2)
        ctx.save_for_backward(guidance, kernel)
        ctx.geometry = geometry
        return kernel

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        guidance, kernel = ctx.saved_tensors
        geometry, size = ctx.geometry, kernel.shape[2:]
        padded, slope = _padded(guidance, geometry), -grad * kernel
        grad_padded = torch.zeros_like(padded)
        windows, into = _windows(padded, geometry, size), _windows(grad_padded, geometry, size)
        middle = _middle(geometry)
        grad_centre = torch.zeros_like(windows[middle])
        for tap, window in enumerate(windows):
            step = slope[:, tap : tap + 1] * (window - windows[middle])
            into[tap].add_(step)
            grad_centre.sub_(step)
        into[middle].add_(grad_centre)
        (top, left), (height, width) = geometry.padding, guidance.shape[2:]
        return grad_padded[:, :, top : top + height, left : left + width], None


class _Pac(nn.Module):
    """What the layers share: geometry, and the kernel of a call."""

    def __init__(self, kernel_size, stride, padding, dilation, normalize_kernel: bool) -> None:
        super().__init__()
        geometry = _odd(Geometry.of(kernel_size, stride, padding, dilation))
        if not isinstance(normalize_kernel, bool):
            raise TypeError(f"normalize_kernel: expected a bool, got {normalize_kernel!r}")
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation
        self.padding = padding if isinstance(padding, str) else geometry.padding
        self.normalize_kernel = normalize_kernel

    def _kernel(self, input: Tensor, guidance: Tensor | None, kernel: Tensor | None) -> Tensor:
        if (guidance is None) == (kernel is None):
            raise ValueError(f"guidance: expected it or a kernel, got {'neither' if kernel is None else 'both'}")
        if kernel is None:
            check_map("guidance", guidance)
            if guidance.shape[0] != input.shape[0] or guidance.shape[2:] != input.shape[2:]:
                wanted = [input.shape[0], "F", *input.shape[2:]]
                raise ValueError(f"guidance: expected shape {wanted}, got {list(guidance.shape)}")
            kernel = pac_kernel(
                guidance, self.kernel_size, self.stride, self.padding, self.dilation, normalize=self.normalize_kernel
            )
        else:
            geometry = self._geometry()
            taps = geometry.kernel[0] * geometry.kernel[1]
            wanted = (input.shape[0], taps, *geometry.output_size(*input.shape[2:]))
            check_operand("kernel", kernel, input)
            if kernel.shape != wanted:
                raise ValueError(f"kernel: expected shape {list(wanted)}, got {list(kernel.shape)}")
        return kernel.to(input.dtype)

    def _geometry(self) -> Geometry:
        return Geometry.of(self.kernel_size, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, normalize_kernel={self.normalize_kernel}"
        )


class PacConv2d(_Pac):
    """Pixel-adaptive convolution: out_i = sum over taps j of kernel(f_i, f_j) * weight_j @ input_j + bias.

    Parameters `weight` and `bias`, and their initialisation, are those of the authors' `PacConv2d` (with its Gaussian
    kernel). The kernel is `pac_kernel` of the guidance.

    With a weight for each pair of channels every tap is one matrix product, so that inference needs the memory of one
    tap; in training autograd keeps the weighed input of every tap. Half types: products are rounded to the type tap by
    tap, and added in float32. With `shared_filters` the layer is `dynconv.dynamic_filter2d`.

    Args:
        in_channels, out_channels: Cin and Cout, the same with `shared_filters`.
        kernel_size: odd; an int or a pair, as the next three.
        stride, padding, dilation: as for `nn.Conv2d`, "same" and "valid" included.
        bias: whether there is one.
        normalize_kernel: divide the kernel by its sum over the taps inside of the image.
        shared_filters: one weight [1, 1, kH, kW] for all channels, each of which is filtered by itself, instead of
            [Cout, Cin, kH, kW].

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> conv, guidance = dynconv.nn.PacConv2d(8, 4, 3, padding=1), torch.randn(1, 3, 6, 6)
        >>> conv(torch.randn(1, 8, 6, 6), guidance).shape
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
        bias: bool = True,
        normalize_kernel: bool = False,
        shared_filters: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, normalize_kernel)
        in_channels = check_int("in_channels", in_channels)
        out_channels = check_int("out_channels", out_channels)
        if shared_filters and in_channels != out_channels:
            raise ValueError(f"out_channels: expected {in_channels}, as in_channels, with shared_filters")
        self.in_channels, self.out_channels, self.shared_filters = in_channels, out_channels, shared_filters
        factory = {"device": device, "dtype": dtype}
        pair = (1, 1) if shared_filters else (out_channels, in_channels)
        self.weight = nn.Parameter(torch.empty(*pair, *self.kernel_size, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw them uniformly within 1 / sqrt(Cin * kH * kW), times Cin where all channels share the filter."""
        bound = (self.in_channels * self.kernel_size[0] * self.kernel_size[1]) ** -0.5
        bound *= self.in_channels if self.shared_filters else 1
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, guidance: Tensor | None = None, kernel: Tensor | None = None) -> Tensor:
        """Map [N, Cin, H, W] to [N, Cout, Ho, Wo] in channels_last.

        `guidance` is [N, F, H, W]; layers with the same guidance may share its `kernel` [N, kH * kW, Ho, Wo] instead.
        Raises TypeError or ValueError for arguments of the wrong kind or shape.
        """
        check_map("input", input, self.in_channels)
        kernel = self._kernel(input, guidance, kernel)
        input, kernel, weight, bias = autocast(input, kernel, self.weight, self.bias)
        check_types(input, weight=weight)
        if not self.shared_filters:
            return _weighed_products(input, kernel, weight, bias, self._geometry())
        result = dynamic_filter2d(
            input, kernel * weight.reshape(1, -1, 1, 1), kernel_size=self.kernel_size, stride=self.stride,
            padding=self.padding, dilation=self.dilation,
        )  # fmt: skip
        return result if bias is None else result + bias.reshape(-1, 1, 1)

    def extra_repr(self) -> str:
        shared = f", shared_filters={self.shared_filters}"
        return f"{self.in_channels}, {self.out_channels}, {super().extra_repr()}{shared}, bias={self.bias is not None}"


class PacPool2d(_Pac):
    """Pixel-adaptive pooling: out_i = sum over taps j of kernel(f_i, f_j) * input_j, no parameters.

    With `normalize_kernel` it is a joint bilateral filter: an average over the pixels that look alike in the guidance.

    Args:
        kernel_size: odd; an int or a pair, as the next three.
        stride, padding, dilation: as for `nn.Conv2d`, "same" and "valid" included.
        normalize_kernel: divide the kernel by its sum over the taps inside of the image.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> smooth, photo = dynconv.nn.PacPool2d(3, padding=1, normalize_kernel=True), torch.rand(1, 3, 6, 6)
        >>> smooth(photo, 4 * photo).shape  # a bilateral filter
        torch.Size([1, 3, 6, 6])
    """

    def __init__(
        self,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        normalize_kernel: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, normalize_kernel)

    def forward(self, input: Tensor, guidance: Tensor | None = None, kernel: Tensor | None = None) -> Tensor:
        """Map [N, C, H, W] to [N, C, Ho, Wo] in channels_last; guidance or kernel as for `PacConv2d`."""
        check_map("input", input)
        kernel = self._kernel(input, guidance, kernel)
        return dynamic_filter2d(
            input, kernel, kernel_size=self.kernel_size, stride=self.stride, padding=self.padding,
            dilation=self.dilation,
        )  # fmt: skip


def _weighed_products(input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """sum over taps of weight[:, :, tap] @ (kernel[tap] * input shifted by the tap) + bias, a product for each tap."""
    size, channels = kernel.shape[2:], input.shape[1]
    padded = _padded(in_rows(input), geometry)
    wide = torch.promote_types(input.dtype, torch.float32)
    taps = weight.flatten(2).permute(2, 1, 0)  # [tap, Cin, Cout]
    result = None
    for tap, window in enumerate(_windows(padded, geometry, size)):
        rows = (window * kernel[:, tap : tap + 1]).permute(0, 2, 3, 1).reshape(-1, channels)
        product = (rows @ taps[tap]).to(wide)
        result = product if result is None else result.add_(product)
    if bias is not None:
        result = result + bias
    result = result.to(input.dtype).reshape(input.shape[0], *size, weight.shape[0])
    return result.permute(0, 3, 1, 2)


def _odd(geometry: Geometry) -> Geometry:
    if geometry.kernel[0] % 2 == 0 or geometry.kernel[1] % 2 == 0:
        raise ValueError(f"kernel_size: expected odd numbers, for a middle tap, got {geometry.kernel}")
    return geometry


def _middle(geometry: Geometry) -> int:
    return geometry.kernel[0] * geometry.kernel[1] // 2


def _padded(features: Tensor, geometry: Geometry) -> Tensor:
    (top, left), (bottom, right) = geometry.padding, geometry.padding_end
    return F.pad(features, (left, right, top, bottom))


def _windows(padded: Tensor, geometry: Geometry, size: tuple[int, int]) -> list[Tensor]:
    """For each tap a view [N, C, Ho, Wo] of what every site reads by it."""

    def reach(axis: int) -> Iterator[slice]:
        stride = geometry.stride[axis]
        for number in range(geometry.kernel[axis]):
            start = number * geometry.dilation[axis]
            yield slice(start, start + (size[axis] - 1) * stride + 1, stride)

    columns = list(reach(1))
    return [padded[:, :, lines, line] for lines in reach(0) for line in columns]


def _inside(like: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """bool [Ho, Wo, tap]: whether the tap of a site is a pixel of the image."""
    both = []
    for axis, length in enumerate(like.shape[2:]):
        site = torch.arange(size[axis], device=like.device) * geometry.stride[axis] - geometry.padding[axis]
        pixel = site[:, None] + torch.arange(geometry.kernel[axis], device=like.device) * geometry.dilation[axis]
        both.append((pixel >= 0) & (pixel < length))
    lines, columns = both
    return (lines[:, None, :, None] & columns[None, :, None, :]).flatten(2)
