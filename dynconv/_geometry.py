"""Where a convolution's taps land: the numbers that every backend shares."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

IntPair = int | Sequence[int]
Padding = IntPair | str


def integer(value: int, name: str) -> int:
    """Return an argument as a Python int: what stands for an int (NumPy's integers, one in a tensor) but a bool."""
    if type(value) is int:
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # said below, with the argument's name
        pass
    raise TypeError(f"{name}: expected an int, got {value!r}")


def pair(value: IntPair, name: str, least: int) -> tuple[int, int]:
    """Return (vertical, horizontal), neither below `least`, from what `torch.nn.functional.conv2d` takes for both.

    That is an int, or one or two of them in a tuple or list. Raises TypeError or ValueError for anything else.
    """
    if type(value) is int:  # nearly always this or the next; the rest is for other kinds and for errors
        both = value, value
    elif type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        both = value
    else:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        try:
            both = tuple(integer(v, name) for v in values)
        except TypeError:
            both = ()
        if len(both) not in (1, 2):
            raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
        both = both[0], both[-1]
    if both[0] < least or both[1] < least:
        raise ValueError(f"{name}: expected values of at least {least}, got {value!r}")
    return both


def plain(
    stride: IntPair, padding: Padding, dilation: IntPair, groups: int
) -> tuple[tuple[int, int], tuple[int, int] | str, tuple[int, int], int]:
    """Return a convolution's arguments, checked by themselves, in one form: equal and hashable where they mean one."""
    return (
        pair(stride, "stride", 1),
        padding if isinstance(padding, str) else pair(padding, "padding", 0),
        pair(dilation, "dilation", 1),
        integer(groups, "groups"),
    )


def is_depthwise(weight_shape: Sequence[int], groups: int) -> bool:
    """Whether every channel has a filter of its own and makes one output: a stencil, not a matrix product."""
    return groups > 1 and groups == weight_shape[0] and weight_shape[1] == 1


def is_stencil(weight_shape: Sequence[int], groups: int) -> bool:
    """Whether the CPU computes a convolution site by site: with few channels a group, gathering them costs as much."""
    return groups > 1 and weight_shape[0] // groups <= 32 and weight_shape[1] <= 32


class Geometry(NamedTuple):
    """Input pixel of output line oy through tap ky: oy * stride - padding + ky * dilation; likewise columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]  # above and to the left
    padding_end: tuple[int, int]  # below and to the right; "same" may differ by one
    dilation: tuple[int, int]

    @classmethod
    def of(cls, kernel_size: IntPair, stride: IntPair, padding: Padding, dilation: IntPair) -> Geometry:
        """Checked, from the arguments of `torch.nn.functional.conv2d`."""
        kernel = pair(kernel_size, "kernel_size", 1)
        stride = pair(stride, "stride", 1)
        dilation = pair(dilation, "dilation", 1)
        if isinstance(padding, str):
            if padding == "valid":
                begin = end = (0, 0)
            elif padding == "same":
                if stride != (1, 1):
                    raise ValueError(f"padding: 'same' needs stride 1, got stride {stride}")
                total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
                begin = (total[0] // 2, total[1] // 2)
                end = (total[0] - begin[0], total[1] - begin[1])
            else:
                raise ValueError(f"padding: expected an int, a pair, 'same' or 'valid', got {padding!r}")
        else:
            begin = end = pair(padding, "padding", 0)
        return cls(kernel, stride, begin, end, dilation)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(Ho, Wo) of a convolution over an input of that size; raises where a kernel does not fit."""
        sizes = []
        for axis, length in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            padded = length + self.padding[axis] + self.padding_end[axis]
            if padded < reach:
                raise ValueError(
                    f"input: expected a padded {('height', 'width')[axis]} of at least {reach}, the reach of the "
                    f"kernel, got {padded}"
                )
            sizes.append((padded - reach) // self.stride[axis] + 1)
        return sizes[0], sizes[1]
