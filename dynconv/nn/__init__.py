"""Drop-in modules over the ops."""

from .._backend import refuse_tracer
from .blocks import MaskedBasicBlock, MaskedBlock, MaskedBottleneck, MaskedInvertedResidual
from .deform import DCNv2, DCNv4, DeformConv2d
from .dynamic_filter import CARAFE, DDF, DDFUp, DynamicFilter2d, FilterNorm, Involution2d
from .gathered_blocks import GatheredBasicBlock, GatheredBlock, GatheredBottleneck
from .gathered_conv import GatheredConv2d, GatheredLinear
from .masked_conv import MaskedConv2d
from .normalization import (
    GatheredBatchNorm2d,
    GatheredSyncBatchNorm2d,
    MaskedBatchNorm2d,
    MaskedSyncBatchNorm2d,
    convert_sync_batchnorm,
)
from .pixel_adaptive import PacConv2d, PacPool2d, pac_kernel

__all__ = [
    "CARAFE",
    "DDF",
    "DCNv2",
    "DCNv4",
    "DDFUp",
    "DeformConv2d",
    "DynamicFilter2d",
    "FilterNorm",
    "GatheredBasicBlock",
    "GatheredBatchNorm2d",
    "GatheredBlock",
    "GatheredBottleneck",
    "GatheredConv2d",
    "GatheredLinear",
    "GatheredSyncBatchNorm2d",
    "Involution2d",
    "MaskedBasicBlock",
    "MaskedBatchNorm2d",
    "MaskedBlock",
    "MaskedBottleneck",
    "MaskedConv2d",
    "MaskedInvertedResidual",
    "MaskedSyncBatchNorm2d",
    "PacConv2d",
    "PacPool2d",
    "convert_sync_batchnorm",
    "pac_kernel",
]


def _refuse_script(module) -> None:
    """TorchScript asks a module's hook of this name first, and would otherwise fail at some line of its `forward`."""
    refuse_tracer("torch.jit.script")


for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__prepare_scriptable__ = _refuse_script
