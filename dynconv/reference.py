"""The oracle: every op in its plainest dense form, same signature. What all backends must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._geometry import Geometry, IntPair, Padding
from .sites import ActiveSites


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    mask: Tensor | ActiveSites | None = None,
    inactive: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """where(mask, gate * conv2d(input), inactive); see `dynconv.masked_conv2d`."""
    geometry = Geometry.of(tuple(weight.shape[2:]), stride, padding, dilation)
    size = geometry.output_size(*input.shape[2:])
    if mask is None:
        active, gate = input.new_ones((), dtype=torch.bool), None
        read = active
    else:
        sites = mask if isinstance(mask, ActiveSites) else ActiveSites(mask, (input.shape[0], *size))
        active, gate = sites.mask, sites.gate
        # A skipped pixel may hold anything, and 0 * NaN is NaN in the weight's gradient.
        read = sites.touched(tuple(input.shape[2:]), tuple(weight.shape[2:]), stride, padding, dilation).mask
    (top, left), (bottom, right) = geometry.padding, geometry.padding_end
    padded = F.pad(torch.where(read, input, 0), (left, right, top, bottom))
    result = F.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, groups)
    if gate is not None:
        # Half types compute in float32, and so does the gate's product.
        result = (result * torch.where(active, gate, 0)).to(result.dtype)
    if out is not None:
        return out.copy_(torch.where(active, result, out))
    result = torch.where(active, result, 0 if inactive is None else inactive)
    return result.contiguous(memory_format=torch.channels_last)
