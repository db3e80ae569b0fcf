"""Drop-in modules over the ops."""

from .blocks import MaskedBasicBlock, MaskedBottleneck, MaskedInvertedResidual
from .gathered_blocks import GatheredBasicBlock, GatheredBottleneck
from .gathered_conv import GatheredConv2d, GatheredLinear
from .masked_conv import MaskedConv2d
from .normalization import GatheredBatchNorm2d, MaskedBatchNorm2d

__all__ = [
    "GatheredBasicBlock",
    "GatheredBatchNorm2d",
    "GatheredBottleneck",
    "GatheredConv2d",
    "GatheredLinear",
    "MaskedBasicBlock",
    "MaskedBatchNorm2d",
    "MaskedBottleneck",
    "MaskedConv2d",
    "MaskedInvertedResidual",
]
