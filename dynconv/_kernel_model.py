"""Predict what the kernels of a call take on a GPU that is not here, from their machine code; see `roofline.predict`.

A kernel's time is
    launch + idle programs + max(the busiest unit + fill, latency)
where each unit of a multiprocessor (issuing instructions, the integer, multiply-add and special units, the tensor
cores, shared memory with L1) has what its programs ask of it (`_warp.walk`), and L2 and memory what all programs move
(`_programs.trace`). latency is that of one warp alone, once for each wave of programs; fill is that before and behind
the main loop, which nothing hides in the first and the last wave.

Left out: conflicts of banks and partial sectors; what a warp waits for others at barriers; rates of L2 and memory that
fall with few requests in flight, beyond the latency of a wave; clocks below boost; what a kernel finds in L2 of the one
before; the order in which programs end. So it leans to the fast side. Nothing of it has been fitted to a measurement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _backend
from ._launches import Launch, recorded
from ._machine_code import Code, Span, decode, resources
from ._programs import Trace, flattened, trace
from ._warp import Walk, memory_bytes, walk

# Seconds from the end of one kernel to the first instruction of the next. Assumed: in a CUDA graph about 1 us; launched
# one by one the CPU takes 2 to 5 us each, which GPU work hides where it is longer.
LAUNCH = {"graph": 1.0e-6, "eager": 2.5e-6}
# Cycles of a multiprocessor to take a program. Assumed.
PROGRAM_CYCLES = 80
# Bytes a cycle that a multiprocessor takes from L2, however few others do (NVIDIA A100 whitepaper).
FILL_BYTES = 64
# What cuDNN reaches of the data sheet's matrix rate in dense convolutions: 600 of H100's 989.5 TFLOP/s. Assumed.
DENSE_SHARE = 600 / 989.5
# What a long copy reaches of the data sheet's bandwidth: 3.0 of H100's 3.35 TB/s.
COPY_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """What a kernel finds on a GPU.

    Attributes:
        name: as a person knows it.
        target: what kernels are compiled for.
        multiprocessors: of the GPU.
        clock: of them, a second; with it the matrix rates of the data sheet come out.
        copy: bytes a second that a long copy reaches, read and written: nine tenths of the data sheet's.
        l2: bytes a second from L2: two thirds of 5120 a cycle (NVIDIA A100 whitepaper; of H100 no more is said).
        l2_latency, latency: cycles of a load from L2 and from memory. Assumed, of the order that microbenchmarks find
            (such as Luo et al., https://arxiv.org/abs/2402.13499).
        registers, shared, warps, blocks: of a multiprocessor: 32-bit registers, bytes for programs, most warps and
            programs at a time (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    copy: float
    l2: float
    l2_latency: int
    latency: int
    registers: int = 65536
    shared: int = 228 * 1024
    warps: int = 64
    blocks: int = 32

    @property
    def arch(self) -> int:
        """80 or 90."""
        return int(self.target.removeprefix("sm_"))


def _gpu(name, target, multiprocessors, half, per_cycle, bandwidth, l2_latency, latency, shared) -> Gpu:
    clock = half / multiprocessors / per_cycle
    return Gpu(name, target, multiprocessors, clock, COPY_SHARE * bandwidth, 2 / 3 * 5120 * clock, l2_latency, latency,
               shared=shared * 1024)  # fmt: skip


GPUS = {
    "H200": _gpu("NVIDIA H200 SXM", "sm_90", 132, 989.5e12, 4096, 4.8e12, 260, 480, 228),
    "H100": _gpu("NVIDIA H100 SXM", "sm_90", 132, 989.5e12, 4096, 3.35e12, 260, 480, 228),
    "A100": _gpu("NVIDIA A100 SXM 80GB", "sm_80", 108, 312e12, 2048, 2.039e12, 200, 470, 164),
}
# Triton's own share of shared memory, which CUDA takes of every program.
RESERVED_SHARED = 1024
REGISTER_UNIT = 256  # of a warp
SHARED_UNIT = 128


@dataclass(frozen=True)
class Occupancy:
    """How many programs a multiprocessor holds, and what allows no more: registers, shared memory, warps, blocks."""

    programs: int
    limit: str


def occupancy(registers: int, shared: int, warps: int, gpu: Gpu) -> Occupancy:
    """Programs of so many registers a thread, bytes of shared memory and warps, that a multiprocessor holds."""
    of_warp = math.ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    of_program = math.ceil((shared + RESERVED_SHARED) / SHARED_UNIT) * SHARED_UNIT
    quarter = gpu.registers // 4 // of_warp  # warps that a quarter's registers hold
    most = {
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
        "shared memory": gpu.shared // of_program,
        "registers": quarter * 4 // warps,
    }
    limit = min(most, key=most.get)
    if most[limit] == 0:
        raise ValueError(
            f"{limit}: expected what fits a multiprocessor of {gpu.name}, got {registers} registers, {shared} bytes "
            f"and {warps} warps"
        )
    return Occupancy(most[limit], limit)


@dataclass(frozen=True)
class Prediction:
    """Of one launch: what was counted, the seconds that each resource takes, and their sum.

    Attributes:
        name: of the kernel, or "aten::..." of what PyTorch launches.
        programs, working: of the grid, and those of them that do not return early.
        registers: of a thread.
        shared: bytes of a program.
        warps: of a program.
        occupancy: programs that a multiprocessor holds at a time.
        occupancy_limit: what allows no more.
        waves: in which a multiprocessor takes its programs.
        instructions: that a warp issues in all.
        step_instructions, step_barriers, steps: of the loop that takes most.
        bytes, l2_bytes: that memory and L2 move.
        parts: seconds of "launch", "idle", "fill", and of each resource, of which the longest counts: "issue",
            "tensor", "shared", "L2", "bytes", "latency".
        busiest: which unit "issue" is about.
        seconds: predicted.
        notes: what could not be read from the kernel and was assumed.
    """

    name: str
    programs: int = 0
    working: int = 0
    registers: int = 0
    shared: int = 0
    warps: int = 0
    occupancy: int = 0
    occupancy_limit: str = ""
    waves: int = 0
    instructions: float = 0.0
    step_instructions: int = 0
    step_barriers: int = 0
    steps: float = 0.0
    bytes: float = 0.0
    l2_bytes: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    busiest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def is_torch(self) -> bool:
        """Whether PyTorch launches it, and its bytes are all that is known."""
        return self.name.startswith("aten::")

    @property
    def seconds(self) -> float:
        """Predicted, the launch included."""
        taken = {name: self.parts.get(name, 0.0) for name in RESOURCES}
        latency = taken.pop("latency")
        return (
            self.parts.get("launch", 0.0)
            + self.parts.get("idle", 0.0)
            + max(max(taken.values()) + self.parts.get("fill", 0.0), latency)
        )

    @property
    def binds(self) -> str:
        """What takes longest: one of RESOURCES, "launch" or "idle"."""
        return max(("launch", "idle", *RESOURCES), key=lambda name: self.parts.get(name, 0.0))

    def record(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self) | {"seconds": self.seconds, "binds": self.binds}


RESOURCES = ("issue", "tensor", "shared", "L2", "bytes", "latency")


def gpu_of(device: str | None) -> Gpu:
    """Of that name, or with None the one that is here.

    Raises ValueError for another, and where PyTorch finds none that is known, or a part of one.
    """
    if device is None:
        here = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
        name, count = (here.name, here.multi_processor_count) if here else ("no GPU", 0)
        found = next((gpu for key, gpu in GPUS.items() if key in name), None)
        if found is None or found.multiprocessors != count:
            known = ", ".join(f"{key} of {gpu.multiprocessors} multiprocessors" for key, gpu in GPUS.items())
            raise ValueError(f"device: expected a GPU that is one of {known} for None, got {name}, {count}")
        return found
    if device not in GPUS:
        raise ValueError(f"device: expected one of {', '.join(GPUS)} or None, got {device!r}")
    return GPUS[device]


def launch_seconds(launches: str) -> float:
    """Between two kernels, in a graph or launched one by one; raises ValueError for another word."""
    if launches not in LAUNCH:
        raise ValueError(f"launches: expected one of {', '.join(LAUNCH)}, got {launches!r}")
    return LAUNCH[launches]


def predict(run: Callable[[], object], device: str | None, launches: str) -> tuple[Prediction, ...]:
    """See `roofline.predict`."""
    between, gpu = launch_seconds(launches), gpu_of(device)
    events, first = seen(run, None if device is None else gpu.target)
    unwritten: set[int] = set()
    made = [
        _prediction(event, gpu, between, unwritten, device is not None, n >= first) for n, event in enumerate(events)
    ]
    return tuple(made[first:])


def seen(run: Callable[[], object], target: str | None) -> tuple[list[Launch | TorchLaunch], int]:
    """What a run launches twice, in order, with its tensors; and where the second time begins."""
    from .calibration import execution

    events: list[Launch | TorchLaunch] = []

    def tell(launch: Launch) -> None:
        if target is not None:
            emulate(launch)
        events.append(launch)

    before = _backend._len_torch_dispatch_stack
    with recorded(target, tell), execution("sparse"):
        run()  # outside of a mode, in which nothing is kept
        first = len(events)
        with _TorchLaunches(events):
            try:
                # An op that sees the mode would take another way than the one that is asked about.
                _backend._len_torch_dispatch_stack = lambda: 0
                run()
            finally:
                _backend._len_torch_dispatch_stack = before
    return events, first


def _prediction(
    event: Launch | TorchLaunch, gpu: Gpu, between: float, unwritten: set[int], is_elsewhere: bool, counts: bool
) -> Prediction | None:
    """Of a launch; where it does not count, only what it leaves unwritten is noted."""
    if isinstance(event, TorchLaunch):
        parts = {"launch": between, "bytes": event.bytes / gpu.copy}
        return Prediction(event.name, bytes=event.bytes, l2_bytes=event.bytes, parts=parts)

    arguments = flattened(event.arguments)

    def is_known(name: str) -> bool:
        return arguments[name].untyped_storage().data_ptr() not in unwritten

    found = trace(event.kernel.asm["ttir"], arguments, event.grid, is_known)
    if is_elsewhere and event.name not in EMULATED:
        for access in found.accesses:
            if access.is_store:
                unwritten.add(arguments[access.argument].untyped_storage().data_ptr())
    return kernel_prediction(event, found, _code(event.kernel), gpu, between) if counts else None


_DECODED: dict[str, Code] = {}  # by hash: to disassemble a kernel takes half a second


def _code(kernel) -> Code:
    if kernel.hash not in _DECODED:
        _DECODED[kernel.hash] = decode(kernel)
    return _DECODED[kernel.hash]


def kernel_prediction(launch: Launch, found: Trace, code: Code, gpu: Gpu, between: float) -> Prediction:
    """Of a Triton kernel, of which the programs and the machine code are known."""
    of_kernel, warps = resources(launch.kernel), launch.kernel.metadata.num_warps
    held = occupancy(of_kernel.registers, of_kernel.shared, warps, gpu)
    moved, l2_bytes = _bytes(launch, found, code)
    trips, notes = _trips(found, code, 32 * warps)
    # Of what L2 hands out the first time it has to wait for memory.
    share = min(1.0, moved / l2_bytes) if l2_bytes else 1.0
    latency = gpu.l2_latency + share * (gpu.latency - gpu.l2_latency)
    made = walk(code, trips, latency=latency, arch=gpu.arch)
    if made.missed:
        notes.append(f"{made.missed} loops that the walk along the code did not come to")
    idle = walk(code, trips, latency=gpu.l2_latency, arch=gpu.arch, until_exit=True).cycles
    parts, waves = _parts(found, made, idle, warps, held.programs, moved, l2_bytes, gpu)
    parts["launch"] = between
    step = made.step
    return Prediction(
        launch.name, found.programs, found.working, of_kernel.registers, of_kernel.shared, warps, held.programs,
        held.limit, waves, made.issued, step.instructions if step else 0, step.barriers if step else 0, made.trips,
        moved, l2_bytes, parts, made.busiest[0], (*found.unknown, *notes),
    )  # fmt: skip


def _parts(
    found: Trace, made: Walk, idle_cycles: float, warps: int, held: int, moved: float, l2_bytes: float, gpu: Gpu
) -> tuple[dict[str, float], int]:
    of_one = math.ceil(found.working / gpu.multiprocessors)  # programs of the multiprocessor that has most
    waves = math.ceil(of_one / held)
    second = lambda cycles: cycles / gpu.clock
    # Four quarters share a program's warps.
    unit = lambda cycles: second(of_one * cycles * max(warps, 4) / 4)
    others = {name: cycles for name, cycles in made.pipes.items() if name not in ("tensor", "shared")}
    busy = max(made.issued, *others.values(), 0.0) if others else made.issued
    around = made.cycles - made.inside
    idle = math.ceil((found.programs - found.working) / gpu.multiprocessors)
    parts = {
        "idle": second(idle * max(PROGRAM_CYCLES, idle_cycles / min(gpu.blocks, gpu.warps // warps))),
        "issue": unit(busy),
        "tensor": unit(made.pipes["tensor"]),
        "shared": unit(made.pipes["shared"]),
        "L2": max(l2_bytes / gpu.l2, second(l2_bytes * of_one / max(found.working, 1) / FILL_BYTES)),
        "bytes": moved / gpu.copy,
        "latency": second(waves * (made.cycles + PROGRAM_CYCLES)),
        "fill": second(around * (waves if held == 1 else 1)),
    }
    return parts, waves


def _bytes(launch: Launch, found: Trace, code: Code) -> tuple[float, float]:
    """That memory moves, of each operand no more than there is; and that L2 moves.

    What a program reads again comes from L1, but for tiles that are copied past it to shared memory.
    """
    bypasses = any("LDGSTS" in one.opcode and "BYPASS" in one.opcode for one in code.instructions)
    l2: dict[tuple[str, bool], float] = {}
    asked: dict[tuple[str, bool], float] = {}
    for access in found.accesses:
        key = access.argument, access.is_store
        asked[key] = asked.get(key, 0.0) + access.bytes
        # Rows that wait in registers for their step have come through L1.
        is_ahead = launch.arguments.get("AHEAD") is True and access.argument == "source"
        if access.is_store or (bypasses and access.loop >= 0 and len(access.shape) > 1 and not is_ahead):
            l2[key] = l2.get(key, 0.0) + access.bytes
    arguments = flattened(launch.arguments)
    whole = lambda name: arguments[name].numel() * arguments[name].element_size()
    moved = 0.0
    for key, amount in asked.items():
        distinct = min(amount, found.touched.get(key, amount) * found.storing)
        l2.setdefault(key, distinct)
        moved += min(whole(key[0]), distinct)
    return moved, sum(l2.values())


def _trips(found: Trace, code: Code, threads: int) -> tuple[list[float], list[str]]:
    """Of each loop of the machine code, each time it is entered: those of the source, which come in the same order.

    Of a loop inside no other: of a program, as not all may come to it.

    Of more loops in the source those that are taken least were unrolled. A loop of several iterations at once may have
    one behind it for the rest.
    """
    loops, left = list(enumerate(found.loops)), list(code.loops)
    if len(loops) > len(left):
        kept = sorted(loops, key=lambda loop: -loop[1].per_entry)[: len(left)]
        loops = sorted(kept, key=lambda loop: loop[0])
    trips: list[float] = []
    notes = []
    for place, (number, loop) in enumerate(loops):
        span, times = left.pop(0), loop.per_entry if loop.depth else loop.trips
        at_once, has_rest = _iterations(span, number, found, code, threads), False
        if len(left) > len(loops) - place - 1 and left[0].begin >= span.end:
            # What the loop for the rest moves is one iteration's.
            ratio = round(_moved(span, code) / max(1, _moved(left[0], code)))
            has_rest, at_once = ratio > 1, max(at_once, ratio)
        trips.append(times if at_once == 1 else float(times // at_once))
        if has_rest:
            left.pop(0)
            trips.append(times % at_once)
    if left:
        notes = [f"{len(code.loops)} loops in the machine code, {len(found.loops)} in the source"]
    return trips + [1.0] * len(left), notes


def _moved(span: Span, code: Code) -> int:
    """Bytes of a thread that the loads and stores of a loop move."""
    inside = code.instructions[span.begin : span.end]
    return sum(memory_bytes(one) for one in inside if one.name in ("LDG", "STG"))


def _iterations(span: Span, number: int, found: Trace, code: Code, threads: int) -> int:
    """Of a loop of the source that one of the machine code makes at once, from the bytes that its vectors move.

    1 where it moves tiles: their rows and columns may be in several threads, and no compiler unrolls such a loop.
    """
    inside = [access for access in found.accesses if access.loop == number]
    if not inside or any(len(access.shape) != 1 for access in inside):
        return 1
    expected = sum(max(access.shape[0], threads) * access.element for access in inside)
    return max(1, round(threads * _moved(span, code) / expected))


# What the device computes before others read it: written on the host in place of a kernel that does not run.


def _compact(a: dict) -> None:
    active = _active(a)
    found = active.nonzero()[:, 0]
    a["index"].view(-1)[: len(found)] = found.int()
    a["count"].fill_(len(found))
    if a["inverse"] is not None:
        a["inverse"].view(-1).copy_(torch.where(active, active.cumsum(0) - 1, -1))
    if a.get("made") is not None:
        a["made"].view(-1).copy_(active)


def _active(a: dict) -> Tensor:
    """bool [sites]: where a mask, or where one by whose sites pixels are read, is not zero."""
    bits = lambda mask: (mask << 1 if a.get("SIGNED") else mask) != 0  # -0.0 is zero
    if a.get("where") is None:
        return bits(a["mask"].reshape(-1)[: a["sites"]])
    (height, _, _, width, *_), size, strides, padding, dilation = a["where"]
    samples = a["sites"] // (height * width)
    mask = bits(a["mask"].as_strided((samples, *size), strides))
    return pixels_read(mask, (height, width), a["KERNEL"], a["STRIDE"], padding, dilation).view(-1)


def _invert(a: dict) -> None:
    count = int(a["count"])
    a["inverse"].view(-1)[a["index"].view(-1)[:count].long()] = torch.arange(count, dtype=torch.int32)


def _compact_channels(a: dict) -> None:
    samples, channels = a["mask"].shape
    kept = torch.ones(samples, channels, dtype=torch.bool)
    if a["given"] is not None:
        groups = -(-channels // a["granularity"])
        given = a["given"].as_strided((samples, groups), (a["stride_n"], a["stride_c"]))
        kept = (given != 0).repeat_interleave(a["granularity"], 1)[:, :channels]
    channel = torch.arange(channels)
    order = torch.where(kept, channel, 2 * channels - channel).argsort(1)  # the others behind, the last one first
    a["mask"].copy_(kept)
    a["index"].copy_(torch.where(kept.gather(1, order), order, ~order))
    a["count"].copy_(kept.sum(1))


def _channel_places(a: dict) -> None:
    index, count = a["index"], a["count"]
    bounds = torch.arange(a["columns"]) * a["step"]
    is_kept = torch.arange(index.shape[1]) < count[:, None]
    a["places"].copy_((is_kept[:, None] & (index[:, None] < bounds[:, None])).sum(2))


def pixels_read(mask: Tensor, size, kernel, stride, padding, dilation) -> Tensor:
    """bool [N, height, width]: the pixels that the taps of a mask's sites read."""
    made = torch.zeros(len(mask), *size, dtype=torch.bool)
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            y = torch.arange(mask.shape[1]) * stride[0] - padding[0] + ky * dilation[0]
            x = torch.arange(mask.shape[2]) * stride[1] - padding[1] + kx * dilation[1]
            ys, xs = (y >= 0) & (y < size[0]), (x >= 0) & (x < size[1])
            made[:, y[ys][:, None], x[xs]] |= mask[:, ys][:, :, xs]
    return made


EMULATED = {
    "count_kernel": lambda a: None,  # its results are read by no scalar
    "compact_kernel": _compact,
    "inverse_kernel": _invert,
    "compact_channels_kernel": _compact_channels,
    "channel_places_kernel": _channel_places,
}


def emulate(launch: Launch) -> None:
    """Write what a kernel of compaction would, into its CPU tensors."""
    with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        if launch.name in EMULATED:
            EMULATED[launch.name](dict(launch.arguments))


@dataclass(frozen=True)
class TorchLaunch:
    """A kernel of PyTorch's own, known by what it reads and writes."""

    name: str
    bytes: int


# What hands out memory; what is nonzero on a CPU is looked for where a count is at hand.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "nonzero"}


class _TorchLaunches(TorchDispatchMode):
    """Notes the kernels that PyTorch launches, among those of Triton."""

    def __init__(self, events: list) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.namespace == "dynconv":  # of an op of this package, what it is made of
            with self:
                key = "CUDA" if any(isinstance(a, Tensor) and a.is_cuda for a in arguments) else "CPU"
                return function._op_dk(getattr(torch._C.DispatchKey, key), *arguments, **keywords)
        result = function(*arguments, **keywords)
        name = function._schema.name.partition("::")[2]
        is_tensor = lambda value: isinstance(value, Tensor)
        given = list(filter(is_tensor, (*arguments, *keywords.values())))
        made = list(filter(is_tensor, result if isinstance(result, (tuple, list)) else [result]))
        storages = {value.untyped_storage().data_ptr() for value in given}
        is_view = all(value.untyped_storage().data_ptr() in storages for value in made)
        if name not in _FREE and (function._schema.is_mutable or not is_view):
            read = [] if name in ("zero_", "fill_") else given
            moved = sum(value.numel() * value.element_size() for value in read + made)
            self.events.append(TorchLaunch(f"aten::{name}", moved))
        return result


@dataclass(frozen=True)
class Measured:
    """A kernel that ran: its name as CUDA has it, and the median of its seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Compared:
    """A launch: predicted, measured or both. Several kernels of PyTorch's own in a row may be measured as one."""

    name: str
    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted: above 1 what is slower than predicted."""
        return self.measured / self.predicted if self.predicted and self.measured is not None else None


def measure(run: Callable[[], object], repeats: int, profile: Callable | None = None) -> list[Measured]:
    """The kernels that a run launches on the GPU that is here, in order, with L2 emptied before each repeat.

    profile gives (name, seconds) of the kernels of a call; None is PyTorch's profiler.
    Raises RuntimeError where two repeats do not launch the same kernels.
    """
    from .calibration import execution

    profile = profile or _profile
    with execution("sparse"):
        for _ in range(2):
            run()
        profile(run)  # the first time the profiler starts itself
        seen = [profile(run) for _ in range(repeats)]
    names = [[name for name, _ in kernels] for kernels in seen]
    if any(some != names[0] for some in names):
        raise RuntimeError(
            f"run: expected the same kernels each time, got {min(names, key=len)} and {max(names, key=len)}"
        )
    middle = lambda values: sorted(values)[len(values) // 2]
    return [Measured(name, middle([kernels[n][1] for kernels in seen])) for n, name in enumerate(names[0])]


def _profile(run: Callable[[], object]) -> list[tuple[str, float]]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()  # more than any L2 holds
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]


def compare(predicted: Sequence[Prediction], measured: Sequence[Measured]) -> list[Compared]:
    """Put the measured kernels of a run beside its predictions.

    Triton's are found by their names, in order. What was measured between two of them belongs to the launches of
    PyTorch's own between these: one by one where they are as many, and else together.
    Raises ValueError where a kernel of Triton was predicted and not measured, or the other way round.
    """
    rows: list[Compared] = []
    waiting: list[Prediction] = []
    at = 0
    ours = {prediction.name for prediction in predicted if not prediction.is_torch}

    def between(end: int) -> None:
        found = measured[at:end]
        for one in found:
            if _plain(one.name) in ours:
                raise ValueError(f"measured: expected the kernels {[p.name for p in predicted]} in this order, got "
                                 f"{[m.name for m in measured]}")  # fmt: skip
        if waiting and len(found) != len(waiting):
            name = " + ".join(prediction.name for prediction in waiting)
            total = sum(one.seconds for one in found) if found else None
            rows.append(Compared(name, sum(prediction.seconds for prediction in waiting), total))
        elif waiting:
            rows.extend(Compared(p.name, p.seconds, one.seconds) for p, one in zip(waiting, found, strict=True))
        else:
            rows.extend(Compared(one.name, None, one.seconds) for one in found)
        waiting.clear()

    for prediction in predicted:
        if prediction.is_torch:
            waiting.append(prediction)
            continue
        names = [_plain(one.name) for one in measured]
        if prediction.name not in names[at:]:
            raise ValueError(f"measured: expected {prediction.name} after {at} kernels, got {names}")
        found = names.index(prediction.name, at)
        between(found)
        # A profiler times the kernel alone, from its first instruction to its last.
        rows.append(Compared(prediction.name, prediction.seconds - prediction.parts["launch"], measured[found].seconds))
        at = found + 1
    between(len(measured))
    return rows


def _plain(name: str) -> str:
    return name.strip("_")
