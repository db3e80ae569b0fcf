"""The active set of a masked convolution: which output sites to compute, and what follows from it."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import check_mask, check_pixels, check_size
from ._backend import backend_for, is_capturing, is_reference, keeps_tensors, kept, module, saveable, unwatched
from ._geometry import Geometry, IntPair, Padding, pair

if TYPE_CHECKING:
    from .kernels.compaction import Fill

_library = torch.library.Library("dynconv", "FRAGMENT")
_library.define("compact(Tensor mask, str backend) -> (Tensor index, Tensor count)")
_library.define("inverse_map(Tensor index, Tensor count, str backend) -> Tensor")
_library.define(
    "neighbours(Tensor index, Tensor count, SymInt[2] output_size, SymInt[2] input_size, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, Tensor? lookup, str backend) -> Tensor"
)
_library.define(
    "readers(Tensor pixels, Tensor count, SymInt[2] output_size, SymInt[2] input_size, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, Tensor inverse) -> Tensor"
)
_library.define(
    "touched(Tensor mask, SymInt[2] input_size, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation, str backend) -> Tensor"
)
# All of an ActiveSites in one call: on a GPU, where nothing waits for what is never asked for.
_SET = "(Tensor mask, Tensor index, Tensor count, Tensor inverse)"
_library.define(f"active_set(Tensor mask) -> {_SET}")
_library.define(
    "touched_set(Tensor mask, SymInt[2] input_size, int[2] kernel_size, int[2] stride, int[2] padding, "
    f"int[2] dilation) -> {_SET}"
)


def _compact(mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        active = mask.flatten()
        return _scattered(torch.where(active, active.cumsum(0) - 1, -1), 0), active.sum(dtype=torch.int32).view(1)
    return module(".cpu.sites").compact(mask)


def _active_set(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return module(".kernels.compaction").compact(mask, with_mask=True, with_inverse=True)


def _touched_set(mask, *reads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compaction = module(".kernels.compaction")
    return compaction.compact(mask, reads=compaction.Reads(*map(tuple, reads)), with_mask=True, with_inverse=True)


def _scattered(places: Tensor, fill: int) -> Tensor:
    """int32: i at places[i], where that is not negative, and `fill` at the places that are left."""
    last = places.numel()  # one more, for what has no place
    result = places.new_full((last + 1,), fill, dtype=torch.int32)
    own = torch.arange(last, dtype=torch.int32, device=places.device)
    return result.scatter(0, torch.where(places < 0, last, places), own)[:last]


def _inverse_map(index: Tensor, count: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        listed = torch.arange(index.numel(), device=index.device) < count
        return _scattered(torch.where(listed, index.long(), -1), -1)
    if backend == "cpu":
        return module(".cpu.sites").inverse(index, count, index.numel())
    return module(".kernels.compaction").inverse_map(index, count, index.numel())


def _neighbours(
    index, count, output_size, input_size, kernel_size, stride, padding, dilation, lookup, backend
) -> Tensor:
    if backend == "cpu":
        geometry = (*output_size, *input_size, *kernel_size, *stride, *padding, *dilation)
        return module(".cpu.sites").neighbours(index, count, geometry, lookup)
    # The Triton kernels compute addresses in registers; this is for those who read the table, and for the reference.
    (height, width), site = input_size, index.long()
    y = site // output_size[1] % output_size[0] * stride[0] - padding[0]
    x = site % output_size[1] * stride[1] - padding[1]
    y = y[:, None] + torch.arange(kernel_size[0], device=index.device) * dilation[0]
    x = x[:, None] + torch.arange(kernel_size[1], device=index.device) * dilation[1]
    y, x = y[:, :, None], x[:, None, :]
    sample = (site // (output_size[0] * output_size[1]))[:, None, None]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = (sample * height + y) * width + x
    if lookup is not None:
        pixel = lookup.view(-1)[torch.where(inside, pixel, 0).clamp(0, lookup.numel() - 1)]
    return torch.where(inside, pixel, -1).flatten(1).int()


def _readers(pixels, count, output_size, input_size, kernel_size, stride, padding, dilation, inverse) -> Tensor:
    """On the CPU alone: the Triton kernels compute it in registers."""
    geometry = (*output_size, *input_size, *kernel_size, *stride, *padding, *dilation)
    return module(".cpu.sites").readers(pixels, count, geometry, inverse)


_library.impl("readers", _readers, "CPU")


def _touched(mask, input_size, kernel_size, stride, padding, dilation, backend) -> Tensor:
    if backend == "reference":
        # Every site adds to the pixels that it reads, as in the gradient of a convolution with a filter of ones.
        ones = torch.ones(1, 1, *kernel_size, device=mask.device)
        sums = F.conv_transpose2d(mask.to(ones.dtype), ones, stride=tuple(stride), dilation=tuple(dilation))
        (top, left), (height, width) = padding, input_size
        beyond = (-left, left + width - sums.shape[3], -top, top + height - sums.shape[2])
        return F.pad(sums, beyond) > 0.5
    if backend == "cpu":
        return module(".cpu.sites").touched(mask, input_size, kernel_size, stride, padding, dilation)
    return _touched_set(mask, input_size, kernel_size, stride, padding, dilation)[0]


for _name, _implementation in (
    ("compact", _compact),
    ("inverse_map", _inverse_map),
    ("neighbours", _neighbours),
    ("touched", _touched),
    ("active_set", _active_set),
    ("touched_set", _touched_set),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)


@torch.library.register_fake("dynconv::compact", lib=_library)
def _(mask, backend):
    return mask.new_empty(mask.numel(), dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)


@torch.library.register_fake("dynconv::inverse_map", lib=_library)
def _(index, count, backend):
    return torch.empty_like(index)


@torch.library.register_fake("dynconv::neighbours", lib=_library)
def _(index, count, output_size, input_size, kernel_size, stride, padding, dilation, lookup, backend):
    return index.new_empty(index.shape[0], kernel_size[0] * kernel_size[1])


@torch.library.register_fake("dynconv::readers", lib=_library)
def _(pixels, count, output_size, input_size, kernel_size, stride, padding, dilation, inverse):
    return pixels.new_empty(pixels.shape[0], kernel_size[0] * kernel_size[1])


@torch.library.register_fake("dynconv::touched", lib=_library)
def _(mask, input_size, kernel_size, stride, padding, dilation, backend):
    return mask.new_empty(mask.shape[0], 1, *input_size)


def _fake_set(mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = mask.new_empty(mask.shape[0], 1, *size, dtype=torch.bool)
    index = mask.new_empty(made.numel(), dtype=torch.int32)
    return made, index, mask.new_empty(1, dtype=torch.int32), torch.empty_like(index)


@torch.library.register_fake("dynconv::active_set", lib=_library)
def _(mask):
    return _fake_set(mask, mask.shape[2:])


@torch.library.register_fake("dynconv::touched_set", lib=_library)
def _(mask, input_size, kernel_size, stride, padding, dilation):
    return _fake_set(mask, input_size)


def fill(out: Tensor, inactive: Tensor | None, in_place: bool) -> None:
    """Write zeros, or what stands at skipped sites, all over a dense output, where no site is active."""
    if in_place or out.dim() == 2:
        return
    if inactive is None:
        out.zero_()
    else:
        out.copy_(inactive)


def warn_if_nothing_is_skipped(mask: Tensor, gate: Tensor | None) -> None:
    """Warn of a floating mask of logits or probabilities, whose values all keep something; on a CPU, without a wait."""
    if gate is None or not mask.is_cpu or not unwatched(mask) or not mask.numel() or not mask.all():
        return
    low, high = gate.detach().aminmax()
    if low != high:
        warnings.warn(
            "mask: a floating mask keeps all that is not zero, and here nothing is; to skip where a score is low, "
            "multiply it by the decision: score * (score > threshold)",
            stacklevel=2,
        )


_POINTWISE = Geometry.of(1, 1, 0, 1)
_FUNCTIONS = {"compact": _compact, "inverse_map": _inverse_map, "neighbours": _neighbours, "touched": _touched}


def _run(name: str, *operands_and_backend):
    """Run `dynconv::{name}`, or its plain PyTorch for the reference: then no graph holds an op of this package."""
    if is_reference():
        return _FUNCTIONS[name](*operands_and_backend[:-1], "reference")
    return getattr(torch.ops.dynconv, name)(*operands_and_backend)


# Tables that sites keep of one kind. A network's layers share theirs within a forward pass, which has fewer; over
# hundreds of frames, whose sources are new ones, they must not pile up.
_KEPT = 16


def _find(kept: list[tuple], input_size: tuple[int, int], geometry: Geometry):
    for size, of, value in kept:
        if of == geometry and size == tuple(input_size):
            return value
    return None


def _check_map(size: tuple[int, int, int]) -> None:
    """Raise where the size of a map of sites is not (N, Ho, Wo), or has more of them than an int32 can number."""
    check_size(size, "N, Ho, Wo")
    if size[0] * size[1] * size[2] >= 2**31:
        raise ValueError(f"mask: expected fewer than 2^31 sites, got {size[0] * size[1] * size[2]}")


def _cure(mask: Tensor, full: tuple[int, int, int, int]) -> str:
    """Name what makes a mask of this shape, which does not broadcast to `full` [N, 1, Ho, Wo], one that does."""
    shape = tuple(mask.shape)
    if len(shape) == 3 and shape == (full[0], *full[2:]):
        return "; .unsqueeze(1) makes it of [N, Ho, Wo]"
    if len(shape) == 4 and shape[1] not in (1, full[1]):
        return "; a mask has one channel, for all of the output's"
    if any(have not in (1, want) for have, want in zip(shape[:-3:-1], full[:-3:-1])):
        return "; a mask has the height and width of the output, not of the input"
    return ""


class ActiveSites:
    """The output sites that a mask keeps, made once and shared by every layer and backward pass that uses them.

    Args:
        mask: bool or floating, broadcastable to [N, 1, Ho, Wo]. A floating mask is a gate: active where it is
            not zero, and its value multiplies the output there. With a granularity, broadcastable to the coarser grid
            [N, 1, ceil(Ho / vertical), ceil(Wo / horizontal)], each of whose cells stands for so many lines and columns
            of sites: the patches of LASNet (Han et al., NeurIPS 2022).
        size: (N, Ho, Wo), needed where the mask itself is smaller and broadcasts, and with a granularity.
        granularity: an int, or (vertical, horizontal), at least 1.

    Attributes:
        mask: bool [N, 1, Ho, Wo].
        gate: the floating mask [N, 1, Ho, Wo] itself, part of the autograd graph and not to be changed in place, or
            None.
        index: int32 [N * Ho * Wo]; the first `count` entries are the active sites (n * Ho + y) * Wo + x in
            ascending order, the others are unspecified.
        count: int32 [1], on the mask's device. Nothing here waits for it, except `len()` and `density`.

    On the CPU both are made when they are first asked for. A CUDA graph that is to follow a mask makes its sites in the
    capture: those made before stay what they are.

    Raises:
        TypeError: the mask is neither bool nor floating.
        ValueError: the mask does not broadcast to [N, 1, Ho, Wo] or the coarser grid, or has 2^31 sites or more.

    Example:
        >>> sites = dynconv.ActiveSites(torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3))
        >>> sites.index[: len(sites)].tolist()
        [0, 4, 8]
    """

    @keeps_tensors
    def __init__(self, mask: Tensor, size: tuple[int, int, int] | None = None, *, granularity: IntPair = 1) -> None:
        check_mask(mask)
        cell = pair(granularity, "granularity", 1)
        if size is None:
            if cell != (1, 1):
                raise ValueError("size: expected (N, Ho, Wo) beside a granularity, got None")
            if mask.dim() != 4 or mask.shape[1] != 1:
                cure = "; .unsqueeze(1) makes it of [N, Ho, Wo]" if mask.dim() == 3 else ""
                raise ValueError(f"mask: expected shape [N, 1, Ho, Wo], got {list(mask.shape)}{cure}")
            size = (mask.shape[0], mask.shape[2], mask.shape[3])
        _check_map(size)
        full = (size[0], 1, -(-size[1] // cell[0]), -(-size[2] // cell[1]))
        if mask.dim() > 4 or any(
            have not in (1, want) for have, want in zip(mask.shape[::-1], full[::-1], strict=False)
        ):
            cure = _cure(mask, full) if cell == (1, 1) else ""
            raise ValueError(f"mask: expected a shape that broadcasts to {list(full)}, got {list(mask.shape)}{cure}")
        mask = mask.expand(full)
        if cell != (1, 1):
            mask = mask.repeat_interleave(cell[0], 2).repeat_interleave(cell[1], 3)[:, :, : size[1], : size[2]]
        self._make(mask.detach(), None if mask.dtype == torch.bool else saveable(mask))
        warn_if_nothing_is_skipped(self.mask, self.gate)

    @classmethod
    @keeps_tensors
    def from_boxes(cls, boxes: Tensor, size: tuple[int, int, int]) -> ActiveSites:
        """Take the sites inside any rectangle: regions of interest, the blocks of SBNet (Ren et al., CVPR 2018).

        Args:
            boxes: integers [K, 5], on the device of the sites: sample, top, left, bottom, right, the last two behind
                the rectangle. What lies outside of the map is cut off.
            size: (N, Ho, Wo).

        Raises TypeError where the boxes are not integers, ValueError where they have another shape or there are 2^31
        sites or more.
        """
        if not isinstance(boxes, Tensor) or boxes.dtype not in (torch.int32, torch.int64):
            got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
            raise TypeError(f"boxes: expected a tensor of int32 or int64, got {got}")
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(f"boxes: expected shape [K, 5], got {list(boxes.shape)}")
        _check_map(size)
        sample, y, x = (torch.arange(length, device=boxes.device) for length in size)
        number, top, left, bottom, right = boxes.unbind(1)
        # [K, N], [K, H] and [K, W]: a site is inside where all three are, for some box.
        samples = (number[:, None] == sample).float()
        lines = ((top[:, None] <= y) & (y < bottom[:, None])).float()
        columns = ((left[:, None] <= x) & (x < right[:, None])).float()
        covered = torch.einsum("kn,ky,kx->nyx", samples, lines, columns)
        return cls._of((covered > 0).unsqueeze(1).contiguous())

    @classmethod
    def _of(cls, mask: Tensor, *, later: bool = False) -> ActiveSites:
        """Of a contiguous bool mask [N, 1, Ho, Wo] that nobody else holds, or that outlives the sites unchanged.

        `later`: an op lists them, beside what else it has to do, before anybody asks for what is derived from them.
        """
        sites = cls.__new__(cls)
        sites._make(mask, None, is_own=True, later=later)
        return sites

    @classmethod
    def _borrowed(cls, mask: Tensor, size: tuple[int, int, int]) -> ActiveSites:
        """Of a mask for one call of an op in inference, with no copy of one that is as the op reads it.

        The mask of no call that is recorded or keeps it for a derivative. The caller checks the size of what it gets.
        """
        is_plain = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.is_contiguous()
        if not is_plain or mask.shape != (size[0], 1, size[1], size[2]):
            return cls(mask, size)
        check_pixels("mask", *size)
        return cls._of(mask, later=True)

    @classmethod
    def _listed(cls, mask: Tensor, index: Tensor, count: Tensor, inverse: Tensor) -> ActiveSites:
        """Of what an op has made of a mask."""
        sites = cls._of(mask, later=True)
        sites._compacted.extend((index, count))
        sites._inverse.append(inverse)
        return sites

    def _make(self, mask: Tensor, gate: Tensor | None, *, is_own: bool = False, later: bool = False) -> None:
        self.mask, self.gate = mask, gate
        self._backend = backend_for(mask.device)
        if self._backend == "reference":
            self._backend = "cpu" if mask.device.type == "cpu" else "triton"
        self._is_captured = self._backend != "cpu" and is_capturing()
        self._length: int | None = None
        self._compacted: list[Tensor] = []
        self._active: list[Tensor] = []
        self._inverse: list[Tensor] = []
        if self._backend != "cpu" and not is_reference():
            if not later:  # now, not in the capture of a graph that only uses it
                self._list(is_own)
        elif not is_own:
            # A copy: whoever refills the mask afterwards must not change half of what is derived from it. Compared, as
            # the bytes behind a bool tensor may be others than zeros and ones.
            self.mask = (mask != 0).contiguous()
        # Lists, not dicts: hashing a symbolic size would tie a compiled graph to that size.
        self._tables: list[tuple] = []
        self._packed_tables: list[tuple] = []
        self._reader_tables: list[tuple] = []
        self._touched: list[tuple] = []

    @property
    def _keeps(self) -> bool:
        """Whether what is derived now may be kept.

        In the capture of a CUDA graph, of sites made in it; outside, of others. What a capture derives is computed at
        the graph's next replay; and what is derived later of a graph's sites would be that of one replay.
        """
        return self._backend == "cpu" or self._is_captured == is_capturing()

    def _keep(self, tables: list[tuple], *entry) -> None:
        """Append, and drop the oldest where there are too many."""
        if self._keeps:
            tables.append(entry)
            del tables[:-_KEPT]

    def _list(self, is_own: bool = True, fill: Fill | None = None, with_inverse: bool = True) -> None:
        """List the sites by the Triton kernels, with a mask of their own; the inverse is 4 bytes a site beside that."""
        if unwatched(self.mask):
            options = dict(fill=fill, with_mask=not is_own, with_inverse=with_inverse)
            mask, index, count, inverse = kept(module(".kernels.compaction").compact, self.mask, **options)
        else:
            mask, index, count, inverse = kept(torch.ops.dynconv.active_set, self.mask)
        if not is_own:
            self.mask = mask
        self._compacted.extend((index, count))
        if inverse is not None:
            self._inverse.append(inverse)

    @property
    def _is_listed(self) -> bool:
        """Whether the index has been made; if not, `_fill` makes it beside what it writes."""
        return bool(self._compacted)

    def _fill(self, fill: Fill, *, with_inverse: bool = False) -> None:
        """Write the skipped sites of an output, in the launch that lists the sites if that is still to come.

        `with_inverse`: make the inverse as well, then, for layers that read features packed for these sites.
        """
        if self._is_listed:
            module(".kernels.compaction").fill_skipped(self.mask, fill)
        else:
            self._list(fill=fill, with_inverse=with_inverse)

    def _compact(self) -> list[Tensor]:
        if self._compacted:
            return self._compacted
        if self._backend != "cpu" and not is_reference():
            self._list()
        elif unwatched(self.mask) and not is_reference():
            self._compacted.extend(kept(_compact, self.mask, "cpu"))
        else:
            self._compacted.extend(kept(_run, "compact", self.mask, self._backend))
        return self._compacted

    @property
    def index(self) -> Tensor:
        return self._compact()[0]

    @property
    def count(self) -> Tensor:
        return self._compact()[1]

    @property
    def ungated(self) -> ActiveSites:
        """The same sites, sharing all that was derived from them, without the gate."""
        if self.gate is None:
            return self
        sites = copy.copy(self)
        sites.gate = None
        return sites

    @keeps_tensors
    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> ActiveSites:
        """Return the same sites on a device, the gate with its gradient: itself where they are there already.

        What is derived from the mask is made anew there. `non_blocking` is that of `torch.Tensor.to`.
        """
        mask = self.mask.to(torch.device(device), non_blocking=non_blocking)
        if mask is self.mask:
            return self
        gate = None if self.gate is None else self.gate.to(mask.device, non_blocking=non_blocking)
        sites = ActiveSites.__new__(ActiveSites)
        sites._make(mask, gate)
        return sites

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, Ho, Wo)."""
        return self.mask.shape[0], self.mask.shape[2], self.mask.shape[3]

    @property
    def capacity(self) -> int:
        """The most sites there can be; what is packed for them has no more rows."""
        return self.mask.numel()

    def _packed_index(self, backend: str) -> Tensor:
        """The index, whose length is that of what is packed for these sites.

        On the CPU without its unspecified entries, where nobody records the call for another mask: a packed result has
        then no row that nobody writes. Elsewhere that would wait for the device.
        """
        if backend != "cpu" or not unwatched(self.mask):
            return self.index
        if not self._active:
            self._active.append(kept(self.index.narrow, 0, 0, len(self)))
        return self._active[0]

    @property
    def inverse(self) -> Tensor:
        """Each site's position in `index`, int32 [N * Ho * Wo], or -1 where it is not active."""
        if self._inverse:
            return self._inverse[0]
        inverse = kept(_run, "inverse_map", self.index, self.count, self._backend)
        if self._keeps:
            self._inverse.append(inverse)
        return inverse

    def neighbours(
        self,
        input_size: tuple[int, int],
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
    ) -> Tensor:
        """Tell the input pixel (n * H + y) * W + x that each active site reads by each tap.

        int32 [N * Ho * Wo, kH * kW], -1 in the padding; only the first `count` rows are specified. Made once for each
        geometry and kept.
        Raises ValueError where a convolution of that geometry over `input_size` = (H, W) has other sites.
        """
        geometry = Geometry.of(kernel_size, stride, padding, dilation)
        self._check(input_size, geometry)
        return self._neighbours(input_size, geometry)

    def _neighbours(self, input_size: tuple[int, int], geometry: Geometry) -> Tensor:
        if geometry == _POINTWISE:
            return self.index.view(-1, 1)
        table = _find(self._tables, input_size, geometry)
        if table is None:
            table = kept(
                _run, "neighbours", self.index, self.count, self.shape[1:], input_size,
                geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, None, self._backend,
            )  # fmt: skip
            self._keep(self._tables, tuple(input_size), geometry, table)
        return table

    def _packed_neighbours(self, source: ActiveSites, geometry: Geometry) -> Tensor:
        """The same in rows packed for `source`: -1 for pixels that are not in it, too. Empty: row m of row m."""
        if geometry == _POINTWISE and source.index is self.index:
            return self.index[:0]
        for of, by, table in self._packed_tables:
            if of is source.index and by == geometry:
                return table
        table = kept(
            _run, "neighbours", self.index, self.count, self.shape[1:], source.shape[1:],
            geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, source.inverse, self._backend,
        )  # fmt: skip
        self._keep(self._packed_tables, source.index, geometry, table)
        return table

    def _readers(self, pixels: ActiveSites, geometry: Geometry) -> Tensor:
        """int32 [capacity of pixels, kH * kW]: the position in `index` of the site that reads a pixel by each tap."""
        for of, by, table in self._reader_tables:
            if of is pixels.index and by == geometry:
                return table
        table = kept(
            torch.ops.dynconv.readers, pixels.index, pixels.count, self.shape[1:], pixels.shape[1:],
            geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, self.inverse,
        )  # fmt: skip
        self._keep(self._reader_tables, pixels.index, geometry, table)
        return table

    def touched(
        self,
        input_size: tuple[int, int],
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
    ) -> ActiveSites:
        """Find the input pixels that the active sites read, as the sites of an [N, 1, H, W] mask; kept by geometry.

        What the layer before has to provide, and where the input's gradient is not zero.
        """
        geometry = Geometry.of(kernel_size, stride, padding, dilation)
        self._check(input_size, geometry)
        return self._touched_by(input_size, geometry)

    def _touched_by(self, input_size: tuple[int, int], geometry: Geometry) -> ActiveSites:
        touched = _find(self._touched, input_size, geometry)
        if touched is None:
            reads = (tuple(input_size), geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
            if self._backend == "cpu" or is_reference():
                touched = ActiveSites._of(kept(_run, "touched", self.mask, *reads, self._backend))
            else:
                run = _touched_set if unwatched(self.mask) else torch.ops.dynconv.touched_set
                touched = ActiveSites._listed(*kept(run, self.mask, *reads))
            self._keep(self._touched, tuple(input_size), geometry, touched)
        return touched

    def _check(self, input_size: tuple[int, int], geometry: Geometry) -> None:
        if self.shape[1:] != geometry.output_size(*input_size):
            raise ValueError(
                f"mask: expected {list(geometry.output_size(*input_size))} sites for that convolution over an input "
                f"of {list(input_size)}, got {list(self.shape[1:])}"
            )
        self._check_pixels(input_size)

    def _check_pixels(self, input_size: tuple[int, int]) -> None:
        check_pixels("input", self.shape[0], *input_size)

    def __len__(self) -> int:
        """The number of active sites. Waits for the device."""
        if self._length is not None:
            return self._length
        length = int(self._compacted[1] if self._compacted else torch.count_nonzero(self.mask))
        if self._keeps:
            self._length = length
        return length

    def __bool__(self) -> bool:
        """Refuse to be true or false: with a length it would be false, like None, where no site is active."""
        raise ValueError("the truth of ActiveSites is ambiguous: ask `sites is None` or `len(sites) == 0`")

    @property
    def density(self) -> float:
        """The active share of all sites, 0 for none at all. Waits for the device."""
        return len(self) / max(1, self.mask.numel())

    def __repr__(self) -> str:
        n, height, width = self.shape
        return f"ActiveSites({n} x {height} x {width} on {self.mask.device})"
