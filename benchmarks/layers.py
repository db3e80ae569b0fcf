"""The published layers by name. They live in the package, where `python -m dynconv bench` finds them installed."""

from dynconv.cli.layers import LAYERS, MASKS, Layer, blob_mask, modes_of, patch, random_mask, reached

__all__ = ["LAYERS", "MASKS", "Layer", "blob_mask", "modes_of", "patch", "random_mask", "reached"]
