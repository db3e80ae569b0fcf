"""The active channels of each sample: which to read or to compute, and what follows from it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._arguments import check_mask, check_size
from ._backend import backend_for, is_capturing, is_reference, keeps_tensors, kept, module, saveable, unwatched
from ._geometry import integer
from .sites import warn_if_nothing_is_skipped


def check_int(name: str, value: int, least: int = 1, most: int | None = None) -> int:
    """Return an argument that is an int from `least` to `most`; raises TypeError or ValueError where it is not."""
    value = integer(value, name)
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return value


def _is_grouped(mask: Tensor, size: int) -> bool:
    return torch.equal(mask, _spread(mask, size))


def _spread(mask: Tensor, size: int) -> Tensor:
    """The first channel of each group in the place of all."""
    return mask[:, ::size].repeat_interleave(size, 1)[:, : mask.shape[1]]


def _cure(mask: Tensor) -> str:
    """Name what makes a mask of channels of one that has the dimensions of a feature map."""
    if mask.dim() not in (3, 4) or mask.shape[-2:] != (1, 1):
        return ""
    return "; .flatten(1) makes [N, C] of [N, C, 1, 1]" if mask.dim() == 4 else "; .flatten() makes [C] of [C, 1, 1]"


def _places(mask: Tensor) -> Tensor:
    """The place of each channel among its sample's kept ones, or -1."""
    return torch.where(mask, mask.cumsum(1, dtype=torch.int32) - 1, -1)


def _compact(mask: Tensor, channels: int, granularity: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mask bool [N, C], index, count) of a mask [N, ceil(C / granularity)]; see `ActiveChannels`."""
    if backend == "triton":
        return module(".kernels.compaction").compact_channels(mask, channels, granularity)
    if granularity != 1:
        mask = mask.repeat_interleave(granularity, 1)[:, :channels]
    # A copy: whoever refills the mask afterwards must not change half of what is derived from it. Compared, as the
    # bytes behind a bool tensor may be others than zeros and ones.
    mask = (mask != 0).contiguous()
    if backend == "cpu":
        return mask, *module(".cpu.channels").compact(mask)
    # In int32 and of numbers that differ: ONNX has no stable sort.
    own = torch.arange(channels, dtype=torch.int32, device=mask.device)
    index = torch.where(mask, own, 2 * channels - 1 - own).sort(1).values
    return mask, torch.where(index < channels, index, index - 2 * channels), mask.sum(1, dtype=torch.int32)


_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define(
    "compact_channels(Tensor mask, SymInt channels, SymInt granularity, str backend) "
    "-> (Tensor mask, Tensor index, Tensor count)"
)
for _key in ("CPU", "CUDA"):
    _library.impl("compact_channels", _compact, _key)


@torch.library.register_fake("dynconv::compact_channels", lib=_library)
def _(mask, channels, granularity, backend):
    shape = (mask.shape[0], channels)
    of = lambda shape, dtype: mask.new_empty(shape, dtype=dtype)
    return of(shape, torch.bool), of(shape, torch.int32), of(shape[:1], torch.int32)


def _compacted(mask: Tensor, channels: int, granularity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the backend in force: one launch on a GPU, plain PyTorch for the reference."""
    if is_reference():
        return _compact(mask, channels, granularity, "reference")
    run = _compact if unwatched(mask) else torch.ops.dynconv.compact_channels
    return run(mask, channels, granularity, backend_for(mask.device))


class ActiveChannels:
    """The channels that a mask keeps for each sample, made once and shared by every layer that uses them.

    Args:
        mask: bool or floating, broadcastable to [N, C]. A floating mask is a gate: a channel is kept where it is not
            zero, and its value multiplies the channel. With a granularity, broadcastable to [N, ceil(C / granularity)].
        size: (N, C), needed where the mask itself is smaller and broadcasts, and with a granularity.
        granularity: the channels that each element of the mask stands for, at least 1: the channel groups of LAUDNet
            (Han et al., 2023). Kernels move whole groups at a time; see `from_groups` for a mask of single channels.
        capacity: the most channels that any sample keeps, where that is known: packed features have room for so many.
            None: counted on the CPU, all channels elsewhere, where counting would wait for the device.

    Attributes:
        mask: bool [N, C].
        gate: the floating mask [N, C] itself, part of the autograd graph and not to be changed in place, or None.
        index: int32 [N, C]; the first `count[n]` entries of row n are the sample's kept channels in ascending order,
            the others, negative, are ~channel of those that are not kept, in descending order.
        count: int32 [N].
        granularity: kept channels come in aligned groups of so many; the last group may be cut off by C.

    All are on the mask's device, and making them waits for nothing there.

    Raises:
        TypeError: the mask is neither bool nor floating, or the granularity or the capacity is no int.
        ValueError: the mask does not broadcast to [N, C] or the coarser groups, the granularity is below 1, or a sample
            keeps more channels than the capacity (on a GPU that is an assertion on the device).

    Example:
        >>> channels = dynconv.ActiveChannels(torch.tensor([[True, False], [True, True]]), (2, 32), granularity=16)
        >>> channels.count.tolist(), channels.density
        ([16, 32], 0.75)
    """

    @keeps_tensors
    def __init__(
        self,
        mask: Tensor,
        size: tuple[int, int] | None = None,
        *,
        granularity: int = 1,
        capacity: int | None = None,
    ) -> None:
        check_mask(mask)
        granularity = check_int("granularity", granularity, 1)
        if capacity is not None:
            capacity = check_int("capacity", capacity, 0)
        if size is None:
            if granularity != 1:
                raise ValueError("size: expected (N, C) beside a granularity, got None")
            if mask.dim() != 2:
                raise ValueError(f"mask: expected shape [N, C], got {list(mask.shape)}{_cure(mask)}")
            size = (mask.shape[0], mask.shape[1])
        check_size(size, "N, C")
        coarse = (size[0], -(-size[1] // granularity))
        shape = mask.shape
        if len(shape) > 2 or any(have not in (1, want) for have, want in zip(shape[::-1], coarse[::-1], strict=False)):
            raise ValueError(
                f"mask: expected a shape that broadcasts to {list(coarse)}, got {list(shape)}{_cure(mask)}"
            )
        mask = mask.expand(coarse)
        self.mask, self.index, self.count = _compacted(mask.detach(), size[1], granularity)
        self.gate = None
        if mask.dtype != torch.bool:
            spread = mask if granularity == 1 else mask.repeat_interleave(granularity, 1)[:, : size[1]]
            self.gate = saveable(spread)
        warn_if_nothing_is_skipped(self.mask, self.gate)
        self.granularity, self._capacity, self._inverse = granularity, None, []
        self._is_captured = is_capturing()
        if capacity is not None and capacity < size[1]:
            self._bound(capacity)

    @keeps_tensors
    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> ActiveChannels:
        """Return the same channels on a device, the gate with its gradient: itself where they are there already."""
        mask = self.mask.to(torch.device(device), non_blocking=non_blocking)
        if mask is self.mask:
            return self
        channels = copy.copy(self)
        channels.mask, channels._inverse, channels._is_captured = mask, [], is_capturing()
        channels.gate, channels.index, channels.count = (
            None if tensor is None else tensor.to(mask.device, non_blocking=non_blocking)
            for tensor in (self.gate, self.index, self.count)
        )
        return channels

    def _bound(self, capacity: int) -> None:
        fits = (self.count <= capacity).all()
        if fits.is_cpu and not torch.compiler.is_compiling() and not is_fake(fits):
            if not fits:
                raise ValueError(f"capacity: expected at least {int(self.count.max())}, the most channels of a sample, "
                                 f"got {capacity}")  # fmt: skip
        else:
            torch._assert_async(fits, f"capacity: a sample keeps more than {capacity} channels")
        self._capacity = capacity

    @classmethod
    def from_groups(cls, mask: Tensor, granularity: int | None = None) -> ActiveChannels:
        """Make them of a mask [N, C] of single channels that keeps or drops neighbouring channels together.

        Args:
            mask: bool [N, C].
            granularity: how many; None finds the largest of 32, 16, 8 and 1 that fits, and waits for the device.

        Raises TypeError where the mask is not bool, ValueError where it has another shape or does not keep and drop
        whole groups (on a GPU that is an assertion on the device).
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape [N, C], got {list(mask.shape)}")
        if granularity is None:
            granularity = next(size for size in (32, 16, 8, 1) if _is_grouped(mask, size))
        else:
            granularity = check_int("granularity", granularity, 1)
            message = f"mask: expected whole groups of {granularity} channels to be kept or dropped"
            if not mask.is_cpu or torch.compiler.is_compiling():
                torch._assert_async((mask == _spread(mask, granularity)).all(), message)
            elif not _is_grouped(mask, granularity):
                raise ValueError(message)
        return cls(mask[:, ::granularity], (mask.shape[0], mask.shape[1]), granularity=granularity)

    @classmethod
    def _all(cls, size: tuple[int, int], device: torch.device) -> ActiveChannels:
        channels = cls.__new__(cls)
        channels.gate, channels.granularity, channels._capacity, channels._inverse = None, 32, size[1], []
        channels._is_captured = is_capturing()
        if unwatched() and device.type in ("cpu", "cuda") and backend_for(device) == "triton":
            made = kept(module(".kernels.compaction").all_channels, *size, device)
            channels.mask, channels.index, channels.count = made
            return channels
        channels.mask = torch.ones(size, dtype=torch.bool, device=device)
        channels.count = torch.full(size[:1], size[1], dtype=torch.int32, device=device)
        channels.index = torch.arange(size[1], dtype=torch.int32, device=device).expand(size).contiguous()
        return channels

    @staticmethod
    def _mask_of(index: Tensor) -> Tensor:
        """The mask behind an index."""
        listed = index >= 0
        mask = torch.zeros_like(index)
        return mask.scatter_reduce_(1, torch.where(listed, index, 0).long(), listed.int(), "amax").bool()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C)."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def capacity(self) -> int:
        """The most channels that any sample keeps, as far as that is known without waiting for a device."""
        known = self._known_capacity
        return self.mask.shape[1] if known is None else known

    @property
    def _known_capacity(self) -> int | None:
        if self._capacity is None and self.mask.is_cpu and not torch.compiler.is_compiling() and not is_fake(self.mask):
            self._capacity = int(self.count.max()) if self.count.numel() else 0
        return self._capacity

    @property
    def inverse(self) -> Tensor:
        """Each channel's place among its sample's kept ones, int32 [N, C], or -1 where it is not kept."""
        if self._inverse:
            return self._inverse[0]
        inverse = kept(_places, self.mask)
        if self._is_captured == is_capturing():  # as ActiveSites keeps what it derives
            self._inverse.append(inverse)
        return inverse

    @property
    def ungated(self) -> ActiveChannels:
        """The same channels without the gate."""
        if self.gate is None:
            return self
        channels = copy.copy(self)
        channels.gate = None
        return channels

    def _gather(self, values: Tensor, width: int) -> Tensor:
        """[N, C] or [C] -> [N, width]: the values of each sample's kept channels, and zeros; differentiable."""
        index = self.index[:, :width]
        kept = values.expand(self.shape).gather(1, index.clamp(min=0).long())
        return torch.where(index >= 0, kept, 0)

    @property
    def density(self) -> float:
        """The share of channels that is kept; waits for the device."""
        return float(self.mask.float().mean()) if self.mask.numel() else 0.0
