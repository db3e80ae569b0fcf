"""What a call cannot be faster than: its FLOPs and its fewest bytes, over the ceilings of a device.

The roofline model (Williams, Waterman and Patterson, CACM 2009): a call takes at least the time of its multiplications
and additions at the device's rate, and at least that of moving every operand and every result once. `Work` is what a
call has to do, a function for each op; a `Device` has the ceilings, measured here or from a data sheet; `floor` is the
quotient. `Tiles` says how much of what a kernel computes is asked for: a tile is computed as a whole, and a wave of
them lasts as long as its last one.

`predict` goes further: what the kernels of a call will take on a GPU that need not be here, from their machine code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _kernel_model
from ._backend import module
from ._geometry import Geometry, IntPair, Padding
from ._kernel_model import Compared, Measured, Prediction
from ._timing import cpu_model, take_turns
from .channels import ActiveChannels
from .sites import ActiveSites

MODES = ("plain", "in-place", "backward")


class Work(NamedTuple):
    """What a call has to do at least.

    Attributes:
        flops: a multiplication and an addition are two; taps in the padding count, as FLOP counters have it.
        bytes: every operand read and every result written once a pass, of which forward and backward are two.
        is_product: whether they are matrix products, which have units of their own on a GPU.

    Example:
        >>> dynconv.roofline.Work(100, 10).plus(dynconv.roofline.Work(50, 5))
        Work(flops=150, bytes=15, is_product=True)
    """

    flops: int
    bytes: int
    is_product: bool = True

    def plus(self, other: Work) -> Work:
        """Add up the work of two calls."""
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.is_product and other.is_product)


class Floor(NamedTuple):
    """The least time of a call, in seconds, and what sets it: "bytes" or "FLOPs".

    Example:
        >>> dynconv.roofline.DATA_SHEETS["A100"].floor(dynconv.roofline.Work(0, 2039), torch.float32)
        Floor(seconds=1e-09, limit='bytes')
    """

    seconds: float
    limit: str


class Tiles(NamedTuple):
    """How much of what the tiles of a call compute is asked for, each in 0..1.

    Attributes:
        filled: the elements asked for, of those in tiles.
        waves: the tiles, of those in whole waves over the device.

    Example:
        >>> dynconv.roofline.Tiles(filled=0.5, waves=0.5).share
        0.25
    """

    filled: float = 1.0
    waves: float = 1.0

    @property
    def share(self) -> float:
        """The share that both leave together."""
        return self.filled * self.waves


FULL = Tiles()


@dataclass(frozen=True)
class Device:
    """The ceilings of a device.

    Attributes:
        name: as a person knows it.
        copy: bytes a second, read and written, of a copy larger than any cache.
        products: FLOP/s of a matrix product for each precision: "float64", "float32", "tf32", "float16", "bfloat16".
        arithmetic: the same of multiply-adds elsewhere; missing where nobody knows.
        multiprocessors: that take tiles; 0 for a CPU, whose threads take them one by one.
        architecture: the row of the kernels' tables of tiles; "cpu" for a CPU.
        measured: which of "copy", "products" and "arithmetic" were measured; the others are a data sheet's.

    Example:
        >>> device = dynconv.roofline.DATA_SHEETS["H100"]
        >>> device.name, device.multiprocessors, device.architecture
        ('NVIDIA H100 SXM', 132, 'sm_90')
    """

    name: str
    copy: float
    products: Mapping[str, float]
    arithmetic: Mapping[str, float]
    multiprocessors: int
    architecture: str
    measured: tuple[str, ...] = ()

    def record(self) -> dict:
        """Return the attributes, for JSON."""
        return dataclasses.asdict(self)

    def floor(self, work: Work, dtype: torch.dtype, tiles: Tiles = FULL) -> Floor:
        """Find the least time of a call in that type; with `tiles`, what these add to its FLOPs included."""
        precision = precision_of(dtype, self)
        rate = (self.products if work.is_product else self.arithmetic).get(precision)
        computed = work.flops / tiles.share / rate if rate else 0.0
        moved = work.bytes / self.copy
        return Floor(max(moved, computed), "FLOPs" if computed > moved else "bytes")

    def predicted_share(
        self, dense: Work, sparse: Work, dtype: torch.dtype, dense_tiles: Tiles = FULL, tiles: Tiles = FULL
    ) -> float:
        """Return the part that bytes and tiles leave of what the FLOPs allow, with both calls at the ceilings.

        Above it is what makes better use of the device than a dense call that does not reach them.
        """
        ratio = self.floor(dense, dtype, dense_tiles).seconds / self.floor(sparse, dtype, tiles).seconds
        return ratio * sparse.flops / dense.flops if sparse.flops else 1.0


_HALF = ("float16", "bfloat16")


def _data_sheet(name, copy, half, tf32, double, single, plain_double, multiprocessors, architecture) -> Device:
    products = dict.fromkeys(_HALF, half) | {"tf32": tf32, "float32": single, "float64": double}
    arithmetic = dict.fromkeys((*_HALF, "tf32", "float32"), single) | {"float64": plain_double}
    return Device(name, copy, products, arithmetic, multiprocessors, architecture)


#: Devices by name, from their data sheets, with dense rates, so without the factor of two for structured sparsity.
#:
#: :meta hide-value:
DATA_SHEETS = {
    "H200": _data_sheet("NVIDIA H200 SXM", 4.8e12, 989.5e12, 494.7e12, 66.9e12, 66.9e12, 33.5e12, 132, "sm_90"),
    "H100": _data_sheet("NVIDIA H100 SXM", 3.35e12, 989.5e12, 494.7e12, 66.9e12, 66.9e12, 33.5e12, 132, "sm_90"),
    "A100": _data_sheet("NVIDIA A100 SXM 80 GB", 2.039e12, 312e12, 156e12, 19.5e12, 19.5e12, 9.7e12, 108, "sm_80"),
}


def precision_of(dtype: torch.dtype, device: Device) -> str:
    """Name the precision of products of a type on a device: float32 on a GPU obeys the TF32 switch of F.conv2d.

    Example:
        >>> dynconv.roofline.precision_of(torch.bfloat16, dynconv.roofline.DATA_SHEETS["H100"])
        'bfloat16'
    """
    if dtype == torch.float32 and device.multiprocessors and torch.backends.cudnn.conv.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def measure(device: str = "cpu", dtypes: Sequence[torch.dtype] = (torch.float32,), seconds: float = 1.0) -> Device:
    """Measure the ceilings of this machine: the speed of a copy, the best of a matrix product and a convolution.

    On a GPU the rate outside of the matrix units is the data sheet's, where its name has one here.

    Args:
        device: "cpu" or "cuda".
        dtypes: whose products to measure.
        seconds: for each of the measurements.

    Raises ValueError for another device.

    Example:
        >>> device = dynconv.roofline.measure("cpu", seconds=0.001)
        >>> device.architecture, device.measured
        ('cpu', ('copy', 'products', 'arithmetic'))
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    is_gpu = device == "cuda"
    copy = _copy_rate(device, seconds)
    name, multiprocessors, architecture, sheet = cpu_model(), 0, "cpu", None
    if is_gpu:
        properties = torch.cuda.get_device_properties(0)
        name, multiprocessors = properties.name, properties.multi_processor_count
        architecture = module(".kernels._common").architecture()
        sheet = next((d for key, d in DATA_SHEETS.items() if key in name), None)
    found = Device(name, copy, {}, {}, multiprocessors, architecture)
    products = {precision_of(dtype, found): _product_rate(device, dtype, seconds) for dtype in dtypes}
    if not is_gpu and any(name in products for name in _HALF):
        # The ops compute half types in float32, PyTorch where it can in their own.
        single = _product_rate(device, torch.float32, seconds)
        products = {name: max(rate, single) for name, rate in products.items()}
    if is_gpu:
        return dataclasses.replace(
            found, products=products, arithmetic=sheet.arithmetic if sheet else {}, measured=("copy", "products")
        )
    # A CPU multiplies and adds in the same units everywhere.
    return dataclasses.replace(
        found, products=products, arithmetic=products, measured=("copy", "products", "arithmetic")
    )


def _copy_rate(device: str, seconds: float) -> float:
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    taken = take_turns({"copy": lambda number: target.copy_(source)}, device, 10, seconds)["copy"]
    return 2 * source.numel() * source.element_size() / taken.low * 1e3  # a ceiling: of the best samples


def _product_rate(device: str, dtype: torch.dtype, seconds: float) -> float:
    size = 8192 if device == "cuda" else 1024 if dtype != torch.float16 else 128  # which few CPUs multiply
    made = lambda *shape: torch.randn(shape, device=device).to(dtype)
    a, b = made(size, size), made(size, size)
    side, channels = (56, 256) if device == "cuda" else (28, 256)
    batch = 64 if device == "cuda" else 2
    layout = {"memory_format": torch.channels_last}
    input, weight = made(batch, channels, side, side).contiguous(**layout), made(channels, channels, 3, 3)
    weight = weight.contiguous(**layout)
    flops = {"product": 2 * size**3, "convolution": 2 * batch * side**2 * 9 * channels**2}
    calls = {"product": lambda number: a @ b, "convolution": lambda number: F.conv2d(input, weight, padding=1)}
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = True  # the fastest algorithm is the ceiling
        with torch.no_grad():
            taken = take_turns(calls, device, 10, seconds)
    finally:
        torch.backends.cudnn.benchmark = before
    return max(flops[name] / timing.low * 1e3 for name, timing in taken.items())


@dataclass(frozen=True)
class Predictions:
    """What a call's kernels are predicted to take, in the order of their launches.

    Example:
        >>> dynconv.roofline.Predictions(()).seconds  # of a call that launches nothing
        0
    """

    kernels: tuple[Prediction, ...]

    @property
    def seconds(self) -> float:
        """Of all together, one after the other."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be read from the kernels and was assumed."""
        return tuple(f"{kernel.name}: {note}" for kernel in self.kernels for note in kernel.notes)


def predict(run: Callable[[], object], *, device: str | None = "H100", launches: str = "graph") -> Predictions:
    """Predict what each kernel that `run` launches takes on a GPU, from the kernel as it is compiled for that GPU.

    The model is that of `dynconv/_kernel_model.py`, which says what it leaves out; nothing of it was fitted to a
    measurement. `run` is called twice, the sparse way forced, and the second call counts: the first leaves behind what
    calls share. For a GPU that is not here it runs on CPU tensors whose values do not matter but for the masks: take
    `torch.empty`, which takes no memory before it is written. Kernels are compiled and not run, so results are whatever
    memory held.

    Args:
        run: makes the calls, as for `dynconv.warmup`.
        device: "H200", "H100" or "A100"; None for the GPU that is here, on which the kernels run.
        launches: "graph", as in a CUDA graph, or "eager", one by one.

    Raises ValueError for another device or way to launch, and RuntimeError under TRITON_INTERPRET=1.

    Example:
        >>> x, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((8, 64, 56, 56), (64, 64, 3, 3)))
        >>> mask = torch.rand(8, 1, 56, 56) < 0.25
        >>> with torch.no_grad():
        ...     found = dynconv.roofline.predict(lambda: dynconv.masked_conv2d(x, weight, padding=1, mask=mask))
        >>> found.kernels[-1].name, found.kernels[-1].seconds < found.seconds
        ('masked_conv_kernel', True)
    """
    return Predictions(_kernel_model.predict(run, device, launches))


def predict_dense(work: Work, dtype: torch.dtype, *, device: str = "H100", launches: str = "graph") -> float:
    """Predict the seconds of a dense call, whose kernel is cuDNN's: at the part of the ceilings that it reaches.

    Args:
        work: of the call without a mask.
        dtype: of the tensors.
        device, launches: as for `predict`.

    Raises ValueError for another device or way to launch.

    Example:
        >>> work = dynconv.roofline.masked_conv2d((128, 64, 56, 56), (64, 64, 3, 3), padding=1, dtype=torch.bfloat16)
        >>> f"{dynconv.roofline.predict_dense(work, torch.bfloat16) * 1e6:.0f} us"
        '50 us'
    """
    between = _kernel_model.launch_seconds(launches)
    sheet = DATA_SHEETS[next(key for key, gpu in _kernel_model.GPUS.items() if gpu is _kernel_model.gpu_of(device))]
    rates = sheet.products if work.is_product else sheet.arithmetic
    computed = work.flops / (_kernel_model.DENSE_SHARE * rates[precision_of(dtype, sheet)])
    return between + max(computed, work.bytes / (_kernel_model.COPY_SHARE * sheet.copy))


def measure_kernels(run: Callable[[], object], repeats: int = 10) -> list[Measured]:
    """Measure each kernel that `run` launches on the GPU that is here, with PyTorch's profiler and an empty L2.

    Args:
        run: makes the calls, the sparse way forced.
        repeats: of which the median counts.

    Raises RuntimeError where two repeats do not launch the same kernels.

    Example:
        >>> if torch.cuda.is_available():
        ...     x, mask = torch.ones(1, 8, 6, 6, device="cuda"), torch.ones(1, 1, 6, 6, device="cuda")
        ...     weight = torch.ones(8, 8, 1, 1, device="cuda")
        ...     kernels = dynconv.roofline.measure_kernels(lambda: dynconv.masked_conv2d(x, weight, mask=mask))
    """
    return _kernel_model.measure(run, repeats)


def compare(predicted: Predictions, measured: Sequence[Measured]) -> list[Compared]:
    """Put what was measured beside what was predicted, a row for each launch, without the time between launches.

    Raises ValueError where they are not of the same kernels.

    Example:
        >>> dynconv.roofline.compare(dynconv.roofline.Predictions(()), [])  # of a call that launches nothing
        []
    """
    return _kernel_model.compare(predicted.kernels, measured)


def masked_conv2d(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    mask: Tensor | ActiveSites | None = None,
    *,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    mode: str = "plain",
) -> Work:
    """Count the work of `dynconv.masked_conv2d`, or without a mask of the dense convolution.

    Args:
        input_shape: [N, Cin, H, W].
        weight_shape: [Cout, Cin / groups, kH, kW].
        mask: bool or floating [N, 1, Ho, Wo], or ActiveSites: the sites to compute. Counting them waits for a GPU.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        dtype: of the tensors.
        mode: "plain", the call; "in-place", into a cached output by shared sites; or "backward", forward and the
            gradients of input and weight.

    Raises ValueError for another mode, and for shapes that do not fit.

    Example:
        >>> mask = torch.eye(6, dtype=torch.bool).view(1, 1, 6, 6)
        >>> dynconv.roofline.masked_conv2d((1, 8, 6, 6), (4, 8, 3, 3), mask, padding=1).flops  # 2 * 6 sites * 4 * 8 * 9
        3456
    """
    _check_mode(mode)
    geometry = Geometry.of(tuple(weight_shape[2:]), stride, padding, dilation)
    samples, channels, *area = input_shape
    size, element = geometry.output_size(*area), dtype.itemsize
    pixels, sites, filters = samples * area[0] * area[1], samples * size[0] * size[1], weight_shape[0]
    active, read = sites, samples * _read_of_all(area, geometry)
    if mask is not None:
        found = _sites(mask, (samples, *size))
        active, read = int(found.sum()), _read(found, area, geometry)
    flops, weights = 2 * active * math.prod(weight_shape), math.prod(weight_shape) * element
    listed = 0 if mask is None else 4 * active if mode == "in-place" else sites
    written = active if mode == "in-place" else sites
    moved = read * channels * element + weights + listed + written * filters * element
    if mode == "backward":
        flops *= 3
        # The gradient at the active sites, the input again, the weight; the gradients of both.
        moved += active * filters * element + read * channels * element + weights
        moved += pixels * channels * element + weights
    is_product = groups == 1 or channels // groups > 1
    return Work(flops, moved, is_product)


def gathered_conv2d(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    in_mask: Tensor | ActiveChannels | None = None,
    out_mask: Tensor | ActiveChannels | None = None,
    *,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    dtype: torch.dtype = torch.float32,
    mode: str = "plain",
) -> Work:
    """Count the work of `dynconv.gathered_conv2d` without groups; see `masked_conv2d`.

    in_mask [N, Cin] and out_mask [N, Cout]: bool or floating, or ActiveChannels: what each sample keeps.

    Example:
        >>> keep = torch.tensor([[True, False, True, False]])
        >>> dynconv.roofline.gathered_conv2d((1, 4, 6, 6), (4, 4, 1, 1), keep, keep).flops  # 2 * 36 sites * 2 * 2
        288
    """
    _check_mode(mode)
    geometry = Geometry.of(tuple(weight_shape[2:]), stride, padding, dilation)
    samples, channels, *area = input_shape
    size, element, filters = geometry.output_size(*area), dtype.itemsize, weight_shape[0]
    ins, outs = _kept(in_mask, samples, channels), _kept(out_mask, samples, filters)
    taps, sites = math.prod(geometry.kernel), size[0] * size[1]
    pixels = _read_of_all(area, geometry)
    flops = 2 * int((ins * outs).sum()) * taps * sites
    weights = _met_weights(in_mask, out_mask, channels, filters) * taps * element
    masks = sum(samples * c for m, c in ((in_mask, channels), (out_mask, filters)) if m is not None)
    read, kept = int(ins.sum()) * pixels * element, int(outs.sum()) * sites * element
    moved = read + weights + masks + samples * filters * sites * element
    if mode == "backward":
        flops *= 3
        moved += (
            kept + read + weights + samples * channels * math.prod(area) * element + math.prod(weight_shape) * element
        )
    return Work(flops, moved)


def gathered_linear(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    in_mask: Tensor | ActiveChannels | None = None,
    out_mask: Tensor | ActiveChannels | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    mode: str = "plain",
) -> Work:
    """Count the work of `dynconv.gathered_linear`: input [N, ..., Fin], weight [Fout, Fin]; see `gathered_conv2d`.

    Example:
        >>> keep = torch.tensor([[True, False, True, False]])
        >>> dynconv.roofline.gathered_linear((1, 4), (4, 4), keep, keep).flops  # 2 * 2 * 2
        8
    """
    positions = math.prod(input_shape[1:-1])
    return gathered_conv2d(
        (input_shape[0], input_shape[-1], positions, 1), (*weight_shape, 1, 1), in_mask, out_mask, dtype=dtype,
        mode=mode,
    )  # fmt: skip


def dynamic_filter2d(
    input_shape: Sequence[int],
    filters_shape: Sequence[int],
    *,
    kernel_size: IntPair,
    channel_filters: bool = False,
    mask: Tensor | ActiveSites | None = None,
    dtype: torch.dtype = torch.float32,
    mode: str = "plain",
) -> Work:
    """Count the work of `dynconv.dynamic_filter2d`, its normalisation not counted.

    Args:
        input_shape: [N, C, H, W]; counted as a whole where there is any site, so with few a floor that is too high.
        filters_shape: [N, G * kH * kW, Ho, Wo].
        kernel_size: kH and kW.
        channel_filters: whether there are such: a product more for each tap.
        mask, dtype, mode: as for `masked_conv2d`; the gradients are those of all operands.

    Example:
        >>> dynconv.roofline.dynamic_filter2d((1, 8, 6, 6), (1, 9, 6, 6), kernel_size=3).flops  # 2 * 36 sites * 8 * 9
        5184
    """
    _check_mode(mode)
    kernel = Geometry.of(kernel_size, 1, 0, 1).kernel
    samples, channels = input_shape[:2]
    taps, sites, element = math.prod(kernel), samples * filters_shape[2] * filters_shape[3], dtype.itemsize
    active = sites
    if mask is not None:
        active = int(_sites(mask, (samples, *filters_shape[2:])).sum())
    products = active * channels * taps
    listed = 0 if mask is None else sites
    operands = math.prod(input_shape) * (active > 0) + active * filters_shape[1]
    operands += channel_filters * samples * channels * taps
    flops, moved = (3 if channel_filters else 2) * products, (operands + sites * channels) * element + listed
    if mode == "backward":
        flops *= 4 if channel_filters else 3
        results = math.prod(input_shape) + math.prod(filters_shape) + channel_filters * samples * channels * taps
        moved += (operands + active * channels + results) * element
    return Work(flops, moved, False)


def deform_conv2d(
    input_shape: Sequence[int],
    offset_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
    mode: str = "plain",
) -> Work:
    """Count the work of `dynconv.deform_conv2d`: the product alone; sampling adds 8 FLOPs for each of its operands.

    Args:
        input_shape: [N, C, H, W].
        offset_shape: [N, 2 * OG * kH * kW, Ho, Wo].
        weight_shape: [Cout, C / groups, kH, kW].
        masked: whether there is a factor for each sample.
        dtype, mode: as for `masked_conv2d`; the gradients are those of all operands.

    Example:
        >>> dynconv.roofline.deform_conv2d((1, 8, 6, 6), (1, 18, 6, 6), (4, 8, 3, 3)).flops  # 2 * 36 sites * 4 * 8 * 9
        20736
    """
    _check_mode(mode)
    sites, element = offset_shape[0] * offset_shape[2] * offset_shape[3], dtype.itemsize
    flops, out = 2 * sites * math.prod(weight_shape), sites * weight_shape[0]
    operands = math.prod(input_shape) + math.prod(offset_shape) + math.prod(weight_shape)
    operands += masked * math.prod(offset_shape) // 2
    moved = operands + out
    if mode == "backward":
        flops, moved = 3 * flops, moved + 2 * operands + out
    return Work(flops, moved * element)


def deform_aggregate2d(
    input_shape: Sequence[int],
    offset_shape: Sequence[int],
    *,
    kernel_size: IntPair,
    dtype: torch.dtype = torch.float32,
    mode: str = "plain",
) -> Work:
    """Count the work of `dynconv.deform_aggregate2d`: four pixels a tap and channel; see `deform_conv2d`.

    Example:
        >>> work = dynconv.roofline.deform_aggregate2d((1, 8, 6, 6), (1, 18, 6, 6), kernel_size=3)
        >>> work.is_product
        False
    """
    _check_mode(mode)
    taps, element = math.prod(Geometry.of(kernel_size, 1, 0, 1).kernel), dtype.itemsize
    sites, channels = offset_shape[0] * offset_shape[2] * offset_shape[3], input_shape[1]
    flops, out = 8 * sites * channels * taps, sites * channels
    operands = math.prod(input_shape) + math.prod(offset_shape) * 3 // 2
    moved = operands + out
    if mode == "backward":
        flops, moved = 3 * flops, moved + 2 * operands + out
    return Work(flops, moved * element, False)


def compaction(mask_shape: Sequence[int], active: int) -> Work:
    """Count the work of making ActiveSites of a bool mask [N, 1, H, W]: read it, write an int32 for each active one.

    Example:
        >>> dynconv.roofline.compaction((1, 1, 6, 6), active=6).bytes  # 36 of the mask, 6 * 4 of the index
        60
    """
    return Work(0, math.prod(mask_shape) + 4 * active, False)


def fill(
    rows: int | Tensor, columns: int | Tensor, tile: tuple[int, int], multiprocessors: int = 0, groups: int = 1
) -> Tiles:
    """Say what tiles of `tile` rows and columns fill of a result, or of one for each sample.

    Args:
        rows, columns: of the result; or int64 tensors with an entry for each sample, which tiles do not cross.
        tile: rows and columns of one.
        multiprocessors: that take one tile at a time; 0: no waves.
        groups: how many such results there are.

    Example:
        >>> dynconv.roofline.fill(rows=100, columns=64, tile=(128, 64)).filled
        0.78125
    """
    rows, columns = torch.as_tensor(rows), torch.as_tensor(columns)
    up = lambda value, unit: (value + unit - 1) // unit
    count = groups * int((up(rows, tile[0]) * up(columns, tile[1])).sum())
    if count == 0:
        return FULL
    waves = count / (math.ceil(count / multiprocessors) * multiprocessors) if multiprocessors else 1.0
    return Tiles(groups * int((rows * columns).sum()) / (count * tile[0] * tile[1]), waves)


def conv_tile(channels: int, filters: int, dtype: torch.dtype, device: Device) -> tuple[int, int]:
    """Name (sites, output channels) of a tile of `masked_conv2d`, of `channels` and `filters` of a group, on a device.

    Example:
        >>> sites, filters = dynconv.roofline.conv_tile(64, 64, torch.bfloat16, dynconv.roofline.DATA_SHEETS["H100"])
    """
    if device.architecture == "cpu":
        return _cpu_tile(dtype)
    tile = module(".kernels.masked_conv").config(_kind(dtype, device), channels, filters, device.architecture)
    return tile["BLOCK_M"], tile["BLOCK_N"]


def gathered_tile(
    sites: int, channels: int, filters: int, granularity: int, dtype: torch.dtype, device: Device
) -> tuple[int, int]:
    """Name (sites, output channels) of a tile of `gathered_conv2d`, of `sites` a sample, channels by `granularity`.

    Example:
        >>> device = dynconv.roofline.DATA_SHEETS["H100"]
        >>> sites, filters = dynconv.roofline.gathered_tile(196, 64, 64, 16, torch.bfloat16, device)
    """
    if device.architecture == "cpu":
        return _cpu_tile(dtype)
    tile = module(".kernels.gathered_conv").config(
        _kind(dtype, device), sites, channels, filters, device.architecture, piece=granularity
    )
    return tile["BLOCK_M"], tile["BLOCK_N"]


def _cpu_tile(dtype: torch.dtype) -> tuple[int, int]:
    rows, width = module(".cpu.llvm.tiles").ROWS, module(".cpu.llvm.build").VECTOR_BYTES
    return rows, width // (8 if dtype == torch.float64 else 4)


def _kind(dtype: torch.dtype, device: Device) -> str:
    """The key of the kernels' tables of tiles."""
    kinds = {"tf32": "tf32", "float32": "ieee", "float64": "double"}
    return kinds.get(precision_of(dtype, device), "half")


def _sites(mask: Tensor | ActiveSites, size: tuple[int, int, int]) -> Tensor:
    """bool [N, 1, Ho, Wo] on the CPU: the active sites. Nothing of them is compacted, which would take a kernel."""
    return (mask if isinstance(mask, ActiveSites) else ActiveSites(mask, size)).mask.cpu()


def _read(sites: Tensor, area: Sequence[int], geometry: Geometry) -> int:
    """How many pixels of an input of that size the active sites, bool [N, 1, Ho, Wo], read; in plain PyTorch."""
    where = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    return int(_kernel_model.pixels_read(sites[:, 0], tuple(area), *where).sum())


def _read_of_all(area: Sequence[int], geometry: Geometry) -> int:
    """The same of one sample and all sites: not all pixels where strides skip some."""
    lines = [_read(torch.ones(1, 1, n, 1, dtype=torch.bool), (a, 1), _axis(geometry, axis))
             for axis, (n, a) in enumerate(zip(geometry.output_size(*area), area))]  # fmt: skip
    return math.prod(lines)


def _axis(geometry: Geometry, axis: int) -> Geometry:
    """One axis of a geometry, as the vertical one."""
    return Geometry(*((values[axis], neutral) for values, neutral in zip(geometry, (1, 1, 0, 0, 1))))


def _kept(mask: Tensor | ActiveChannels | None, samples: int, channels: int) -> Tensor:
    """int64 [N]: channels that each sample keeps."""
    if mask is None:
        return torch.full((samples,), channels)
    return _mask_of(mask).sum(1).cpu()


def _met_weights(in_mask, out_mask, channels: int, filters: int) -> int:
    """How many pairs of an input and an output any sample keeps both of."""
    kept = lambda mask, count: torch.ones(1, count) if mask is None else _mask_of(mask).float().cpu()
    ins, outs = kept(in_mask, channels), kept(out_mask, filters)
    if len(ins) != len(outs):  # one side has no mask: every sample keeps all of it
        return int(ins.amax(0).sum() * outs.amax(0).sum()) if len(ins) and len(outs) else 0
    return int((ins.T @ outs > 0).sum())


def _mask_of(mask: Tensor | ActiveChannels) -> Tensor:
    return mask.mask if isinstance(mask, ActiveChannels) else mask != 0


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
