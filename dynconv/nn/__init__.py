"""Drop-in modules over the ops."""

from .masked_conv import MaskedConv2d

__all__ = ["MaskedConv2d"]
