"""Drop-in modules over the ops."""

from .blocks import MaskedBasicBlock, MaskedBottleneck, MaskedInvertedResidual
from .masked_conv import MaskedConv2d
from .normalization import MaskedBatchNorm2d

__all__ = ["MaskedBasicBlock", "MaskedBatchNorm2d", "MaskedBottleneck", "MaskedConv2d", "MaskedInvertedResidual"]
