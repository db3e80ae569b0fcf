"""Triton kernels of dynconv, installed as ``dynconv.kernels``. They import torch and triton only."""

from . import compaction, deform, depthwise, dynamic_filter, epilogue, gathered_conv, masked_conv

__all__ = ["compaction", "deform", "depthwise", "dynamic_filter", "epilogue", "gathered_conv", "masked_conv"]
