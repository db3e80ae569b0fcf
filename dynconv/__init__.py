"""dynconv: sparse-compute ops that make the sparsity of dynamic networks real wall-clock speedup."""

from . import _source_tree as _source_tree  # first: makes dynconv.kernels importable from a source tree
from . import gating, nn, reference, roofline
from ._backend import backend
from ._version import __version__
from .calibration import calibrate, calibration_file, execution, explain
from .channels import ActiveChannels
from .nn.ponder import ponder_map
from .ops.deform import deform_aggregate2d, deform_conv2d
from .ops.dynamic_filter import dynamic_filter2d
from .ops.gathered_conv import gathered_conv2d
from .ops.gathered_linear import gathered_linear
from .ops.masked_conv import masked_conv2d
from .packed import PackedChannels, PackedFeatures, pack
from .sites import ActiveSites

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
    "gating",
    "masked_conv2d",
    "nn",
    "pack",
    "ponder_map",
    "reference",
    "roofline",
]
