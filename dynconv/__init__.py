"""dynconv: sparse-compute ops that make the sparsity of dynamic networks real wall-clock speedup."""

from . import _source_tree as _source_tree  # first: makes dynconv.kernels importable from a source tree
from . import gating as gating
from . import nn as nn
from . import reference as reference
from . import roofline as roofline
from ._backend import backend
from ._version import __version__
from ._warmup import warmup
from .calibration import calibrate, calibration_file, execution, explain
from .channels import ActiveChannels
from .nn.ponder import ponder_map
from .nn.residual import prepare
from .ops.deform import deform_aggregate2d, deform_conv2d
from .ops.dynamic_filter import dynamic_filter2d
from .ops.gathered_conv import gathered_conv2d
from .ops.gathered_linear import gathered_linear
from .ops.masked_conv import masked_conv2d
from .packed import PackedChannels, PackedFeatures, pack
from .sites import ActiveSites

# Not the modules `nn`, `gating`, `reference` and `roofline`: a star import must not hide the caller's `torch.nn`.
__all__ = [
    "ActiveChannels",
    "ActiveSites",
    "PackedChannels",
    "PackedFeatures",
    "__version__",
    "backend",
    "calibrate",
    "calibration_file",
    "deform_aggregate2d",
    "deform_conv2d",
    "dynamic_filter2d",
    "execution",
    "explain",
    "gathered_conv2d",
    "gathered_linear",
    "masked_conv2d",
    "pack",
    "ponder_map",
    "prepare",
    "warmup",
]
