"""Triton kernels, one file per family. Imports torch and triton only; knows nothing of dynconv's ops."""

from . import compaction, deform, depthwise, dynamic_filter, epilogue, gathered_conv, masked_conv

__all__ = ["compaction", "deform", "depthwise", "dynamic_filter", "epilogue", "gathered_conv", "masked_conv"]
