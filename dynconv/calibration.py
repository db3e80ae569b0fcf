"""Dense or sparse, call by call: what was measured to be faster on this machine.

Above some density, the crossover, a dense convolution that computes everything is faster than one that picks its
sites. Where it lies depends on the machine and on the layer, so it is measured: `calibrate` times both ways of every
masked or gathered layer and block that a model runs, and keeps the times in a file. From then on each call looks at its
masks' density, the share of the dense products that they keep, and takes the faster way. Both give the same values and
gradients, up to rounding.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ._backend import Setting
from ._folders import user_cache
from ._masks import blob_mask
from ._timing import LEAST_SAMPLES, Timing, cpu_model, take_turns
from ._version import __version__
from .sites import ActiveSites

MODES = ("automatic", "sparse", "dense")
DENSITIES = (0.05, 0.25, 0.5, 0.75, 1.0)
_SAMPLES = 15  # of each way of a call at most
# Milliseconds that the next call takes longer on a CPU where the ways change: what runs only now and then is no longer
# in the cache. On an AMD Zen 4 0.02 where they change at every layer, 0.1 where they do twice in a network.
_CHANGE = 0.04


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"execution: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = Setting(_checked(os.environ.get("DYNCONV_EXECUTION") or "automatic"))


def execution(mode: str) -> AbstractContextManager[None]:
    """Choose between dense and sparse inside the `with` block, for the calls of its thread.

    "automatic" (the default, but for the environment variable `DYNCONV_EXECUTION`) takes what `calibrate` measured to
    be faster at the mask's density, and the sparse way where nothing was measured. "sparse" and "dense" force one:
    the same kernels whatever the mask, for graphs and for the same bits on every machine. A backward pass goes by the
    mode of its forward pass. What has no dense way stays sparse: packed outputs and inputs, blocks in training, the
    gradient of a site's gate, float16 gradients on the CPU, half types with a gate, a residual or a smooth activation,
    which it would round twice, and gathered linear layers and blocks in half types.

    On the GPU the mask's count is not waited for: a call goes by the last count that has arrived from earlier calls of
    its shape, and is sparse where there is none, and in the capture of a graph. Raises ValueError for another mode.

    Example:
        >>> conv, x = dynconv.nn.MaskedConv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
        >>> mask = torch.rand(1, 1, 6, 6) < 0.5
        >>> with torch.no_grad(), dynconv.execution("dense"):
        ...     y = conv(x, mask)
    """
    return _mode.using(_checked(mode))


def mode() -> str:
    """The mode that calls take now."""
    return _mode.value


def is_watched() -> bool:
    """Whether each call has to be looked at: for `explain`, or to be calibrated."""
    return bool(_explanations.value) or _recorded.value is not None


class Call(Protocol):
    """A masked or gathered layer or block with its operands, and the two ways to run it."""

    device: torch.device
    work: int  # what there is to compute without masks, in any unit
    has_choice: bool  # whether there is a dense way for these operands

    def kept(self) -> int:
        """What the masks leave of `work`; waits for the device."""

    def kept_on_device(self) -> Tensor:
        """The same as an integer tensor of one element on the device."""

    def key(self) -> tuple:
        """What the times depend on beside the density, in numbers, bools and strings."""

    def name(self) -> str:
        """The same for people, in short."""

    def sparse(self):
        """The result, from the active sites alone."""

    def dense(self):
        """The same from everything, the skipped sites overwritten."""

    def at(self, density: float) -> Call:
        """The same call with a mask of that density and operands that nobody else sees change."""


class SiteCall:
    """The work of a call whose cost is linear in its active sites."""

    active: ActiveSites  # or what has its mask, index, count and length

    @property
    def device(self) -> torch.device:
        return self.active.mask.device

    @property
    def work(self) -> int:
        """All sites."""
        return self.active.mask.numel()

    def kept(self) -> int:
        """The active sites."""
        return len(self.active)

    def kept_on_device(self) -> Tensor:
        """The same, where the mask is."""
        return self.active.count


@dataclass(frozen=True)
class Times:
    """Milliseconds of the two ways of a call at some densities, ascending."""

    name: str
    densities: Sequence[float]
    sparse: Sequence[float]
    dense: Sequence[float]
    is_dense: Sequence[bool] | None = None  # the way to take there; None: the faster one

    def predict(self, density: float) -> tuple[float, float]:
        """(sparse, dense) at a density, linear between what was measured, as the cost is."""
        points = self.densities
        last = len(points) - 1
        right = next((i for i, point in enumerate(points) if point >= density), last)
        left = max(0, right - 1)
        span = points[right] - points[left]
        share = min(1.0, max(0.0, (density - points[left]) / span)) if span else 0.0
        return tuple(times[left] + share * (times[right] - times[left]) for times in (self.sparse, self.dense))

    @functools.cached_property
    def crossover(self) -> float | None:
        """The lowest density from which on the dense way is taken; None where it never is."""
        gaps = [sparse - dense for sparse, dense in zip(self.sparse, self.dense, strict=True)]
        is_dense = [gap > 0 for gap in gaps] if self.is_dense is None else self.is_dense
        if not is_dense[-1]:
            return None
        i = max((i for i, dense in enumerate(is_dense) if not dense), default=None)
        if i is None:
            return 0.0
        # Where the times cross, or half-way where they do not but the calls around this one are dense.
        share = gaps[i] / (gaps[i] - gaps[i + 1]) if gaps[i] <= 0 < gaps[i + 1] else 0.5
        return self.densities[i] + (self.densities[i + 1] - self.densities[i]) * share


@dataclass
class Decision:
    """How one call was run, and why. Times in milliseconds; None where nothing was measured."""

    path: str  # "sparse" or "dense"
    reason: str
    density: float | None = None
    predicted_sparse: float | None = None
    predicted_dense: float | None = None
    measured: float | None = None
    call: str = ""

    def __str__(self) -> str:
        def cell(value: float | None, digits: int) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        predicted = f"{cell(self.predicted_sparse, 3):>9} {cell(self.predicted_dense, 3):>9}"
        numbers = f"{cell(self.density, 3):>7} {predicted} {cell(self.measured, 3):>9}"
        return f"{self.path:<6} {numbers}  {self.call}: {self.reason}"


@dataclass
class Explanation:
    """The decisions of a run, in order; `print` shows them as a table."""

    decisions: list[Decision] = field(default_factory=list)

    def __str__(self) -> str:
        heading = f"{'path':<6} {'density':>7} {'sparse ms':>9} {'dense ms':>9} {'took ms':>9}  call: reason"
        return "\n".join([heading, *map(str, self.decisions)])


_explanations = Setting(())  # each an Explanation, the innermost last
_recorded = Setting(None)  # while `calibrate` runs a model: its calls, and their keys in order
_tables: dict[str, dict[tuple, Times]] | None = None  # by machine; None: not read yet
_arriving: dict[tuple, tuple[Tensor, object]] = {}  # counts on their way from the GPU, and the events to ask
_known: dict[tuple, int] = {}
edition = 0  # of the tables: another one when a call may have to go another way


@contextmanager
def explain() -> Iterator[Explanation]:
    """Collect how every masked or gathered call inside the `with` block is run, why, its predicted and measured cost.

    Measured on the CPU, around the call; on the GPU not, as that would wait for it. What has no dense way (packed
    features, blocks in training) is not listed.

    Example:
        >>> conv, x = dynconv.nn.MaskedConv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
        >>> with torch.no_grad(), dynconv.execution("sparse"), dynconv.explain() as why:
        ...     y = conv(x, torch.rand(1, 1, 6, 6) < 0.5)
        >>> [(decision.path, decision.reason) for decision in why.decisions]
        [('sparse', 'forced')]
    """
    explanation = Explanation()
    with _explanations.using((*_explanations.value, explanation)), _backward_in_this_thread():
        yield explanation


def _backward_in_this_thread() -> AbstractContextManager:
    """Keeps backward passes of CUDA tensors out of threads of PyTorch's own, which see no setting of this one."""
    return torch.autograd.set_multithreading_enabled(False)


def run(execution: str, call: Call):
    """The call's result by its faster way, or the forced one."""
    if is_watched():
        return _watched(execution, call)
    least = least_dense(execution, call)
    if least == math.inf:
        if counts.value and call.device.type != "cpu" and _has_choice(call):
            call.kept_on_device()
        return call.sparse()
    kept = _kept(call) if execution == "automatic" else call.work
    return call.dense() if kept is not None and kept >= least else call.sparse()


# Whether calls on a GPU that nobody has timed list what they keep ahead of all else, as timed ones do to count it.
counts = Setting(False)


def least_dense(execution: str, call: Call) -> float:
    """The kept work from which on a call goes the dense way; infinity where it never does."""
    times = _times(call) if execution == "automatic" else None
    crossover = 0 if execution == "dense" else None if times is None else times.crossover
    return math.inf if crossover is None or not _has_choice(call) else crossover * call.work


def _watched(execution: str, call: Call):
    """The same, told to those who calibrate or want it explained."""
    if not _has_choice(call):
        return call.sparse()
    decision = _decide(call) if execution == "automatic" else Decision(execution, "forced")
    way = call.dense if decision.path == "dense" else call.sparse
    return _explained(call, decision, way) if _explanations.value else way()


def _has_choice(call: Call) -> bool:
    return call.work > 0 and call.has_choice


def _times(call: Call) -> Times | None:
    global _tables
    if _tables is None:
        _tables = _read()
    return _tables.get(machine(call.device), {}).get(call.key()) if _tables else None


def _explained(call: Call, decision: Decision, way: Callable):
    decision.call = call.name()
    if decision.density is None and call.device.type == "cpu":
        decision.density = call.kept() / call.work
    if decision.density == 1:
        decision.reason += ", no mask skips anything"
    begin = time.perf_counter()
    result = way()
    if call.device.type == "cpu":
        decision.measured = (time.perf_counter() - begin) * 1e3
    for explanation in _explanations.value:
        explanation.decisions.append(decision)
    return result


def _decide(call: Call) -> Decision:
    if _recorded.value is not None:
        calls, order = _recorded.value
        order.append(call.key())
        calls.setdefault(order[-1], call)
        return Decision("sparse", "being calibrated")
    times = _times(call)
    if times is None:
        return Decision("sparse", "not calibrated")
    kept = _kept(call)
    if kept is None:
        return Decision("sparse", "no count has arrived yet")
    path = "dense" if kept >= least_dense("automatic", call) else "sparse"
    density = kept / call.work
    predicted = times.predict(density)
    is_faster = (path == "dense") == (predicted[1] < predicted[0])
    reason = "faster at this density" if is_faster else "as the calls around it go at this density"
    return Decision(path, reason, density, *predicted)


def _kept(call: Call) -> int | None:
    """The kept work; of an earlier call of this key where the masks are not on the CPU, None where none is known."""
    if call.device.type == "cpu":
        return call.kept()
    # The stream that the count is made on is one of its own device, which need not be the current one.
    with torch.cuda.device(call.device):
        if torch.cuda.is_current_stream_capturing():
            return None
        return _latest(call.key(), call.kept_on_device(), torch.cuda.Event)


def _latest(key: tuple, count: Tensor, event_type: Callable) -> int | None:
    """The last count of this key that has arrived; sends this call's on its way where none is travelling."""
    host, event = _arriving.get(key, (None, None))
    if event is not None and event.query():
        _known[key] = int(host)
    elif event is not None:
        return _known.get(key)
    if host is None:
        host, event = torch.empty(1, dtype=count.dtype, pin_memory=count.is_cuda), event_type()
        _arriving[key] = host, event
    host.copy_(count, non_blocking=True)
    event.record()
    return _known.get(key)


def machine(device: torch.device) -> str:
    """What times hold for: the device, its threads, and the versions of PyTorch and dynconv."""
    return _machine(device.type, device.index, torch.get_num_threads())


@functools.cache
def _machine(kind: str, index: int | None, threads: int) -> str:
    name = f"{cpu_model()}, {threads} threads" if kind == "cpu" else torch.cuda.get_device_name(index)
    return f"{name}; torch {torch.__version__}; dynconv {__version__}"


def calibration_file() -> Path:
    """Return where the times are kept: `DYNCONV_CALIBRATION`, or `dynconv/calibration.json` in the user's cache folder.

    A JSON file by machine, layer and density, to look at and to delete.

    Example:
        >>> dynconv.calibration_file().suffix
        '.json'
    """
    given = os.environ.get("DYNCONV_CALIBRATION")
    if given:
        return Path(given)
    return (user_cache() or Path()) / "calibration.json"


def _read() -> dict[str, dict[tuple, Times]]:
    """The file's times by machine; what is no times is left out, with one warning that says what is wrong with it."""
    tables: dict[str, dict[tuple, Times]] = {}
    faults = []
    try:
        file = calibration_file()
        content = json.loads(file.read_text())
        for name, entries in content.items():
            for number, entry in enumerate(entries):
                try:
                    times = _times_of(entry)
                    tables.setdefault(name, {})[tuple(entry["key"])] = times
                except (ValueError, KeyError, TypeError) as error:
                    faults.append(f"entry {number} of {name!r}: {error!r}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{file} is not a calibration and is ignored: {error!r}", stacklevel=4)
        return {}
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        warnings.warn(f"{file} has entries that are not times and are ignored: {faults[0]}{more}", stacklevel=4)
    return tables


def _times_of(entry: dict) -> Times:
    """An entry of the file, whose numbers every call goes by. Raises ValueError, KeyError or TypeError."""
    times = Times(entry["call"], entry["densities"], entry["sparse_ms"], entry["dense_ms"], entry["is_dense"])
    lists = {"densities": times.densities, "sparse_ms": times.sparse, "dense_ms": times.dense}
    right = lambda number: type(number) in (int, float) and 0 <= number <= sys.float_info.max
    for name, numbers in lists.items():
        if not isinstance(numbers, list) or not numbers or not all(map(right, numbers)):
            raise ValueError(f"{name}: expected a list of finite numbers that are not negative, got {numbers!r:.100}")
    if len({len(numbers) for numbers in lists.values()}) > 1:
        raise ValueError(f"{', '.join(lists)}: expected as many numbers in each, got {[*map(len, lists.values())]}")
    is_dense = times.is_dense
    is_named = is_dense is None or (isinstance(is_dense, list) and all(type(way) is bool for way in is_dense))
    if not is_named or (is_dense is not None and len(is_dense) != len(times.densities)):
        raise ValueError(f"is_dense: expected a true or false for each density, or null, got {is_dense!r:.100}")
    ascends = all(one < other for one, other in itertools.pairwise(times.densities))
    if not ascends or not 0 < times.densities[0] <= times.densities[-1] <= 1:
        raise ValueError(f"densities: expected ascending numbers above 0 and at most 1, got {times.densities!r}")
    return times


def _write() -> None:
    content = {
        name: [
            {
                "call": times.name,
                "crossover": times.crossover,
                "densities": times.densities,
                "sparse_ms": times.sparse,
                "dense_ms": times.dense,
                "is_dense": times.is_dense,
                "key": key,
            }
            for key, times in table.items()
        ]
        for name, table in _tables.items()
    }
    target = calibration_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(target)  # at once: another process may be reading


def calibrate(
    run: Callable[[], object],
    *,
    densities: float | Sequence[float] = DENSITIES,
    seconds: float = 0.1,
    store: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float | None]:
    """Measure where dense becomes faster than sparse, for every masked or gathered layer and block that `run` runs.

    `run` is called once, for example `lambda: model(image)`, with a training step in it where that is to be
    calibrated; each of its calls that has a dense way is then timed both ways, on its own operands with masks of blobs.
    On the CPU that is done in passes over all of them, each call once a pass, as in a network: in a loop by itself a
    call finds more in the cache. There a call goes the way of those around it where its own is not faster by more than
    a change of ways costs.
    Times of earlier calibrations are kept, but for calls measured anew.

    Args:
        run: the model on an input of the shape that it will meet.
        densities: at which to measure, above 0 and at most 1: numbers, or one.
        seconds: for each call and density, roughly.
        store: also write `calibration_file()`, for other processes; this one knows at once either way.
        progress: told the number of densities measured, of all, and what comes next.

    Returns:
        For each call its crossover, the density from which on it goes the dense way, None where it never does.

    Raises TypeError where a density is no number, ValueError where one is not in (0, 1] or `run` has no call with a
    dense way.

    Example:
        >>> conv, x = dynconv.nn.MaskedConv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
        >>> mask = torch.rand(1, 1, 6, 6) < 0.5
        >>> with torch.no_grad():
        ...     found = dynconv.calibrate(lambda: conv(x, mask), densities=(0.25, 1.0), seconds=0.001, store=False)
        >>> list(found)
        ['conv 6x6 8->8 3x3, batch 1, float32']
    """
    global _tables, edition
    densities = _checked_densities(densities)
    recorded: dict[tuple, Call] = {}
    order: list[tuple] = []
    with _recorded.using((recorded, order)), execution("automatic"), _backward_in_this_thread():
        run()
    if not recorded:
        raise ValueError("run: expected at least one masked or gathered layer or block with a dense way, got none")
    if _tables is None or store:
        _tables = _merged(_read(), _tables or {})
    crossovers = {}
    found = _measured(list(recorded.values()), densities, seconds, progress)
    ways = _ways(
        order,
        dict(zip(recorded, found, strict=True)),
        _CHANGE if next(iter(recorded.values())).device.type == "cpu" else 0.0,
    )
    for (key, call), times in zip(recorded.items(), found, strict=True):
        times = _ascending(replace(times, is_dense=ways[key]))
        _tables.setdefault(machine(call.device), {})[key] = times
        crossovers[times.name] = times.crossover
    edition += 1
    if store:
        _write()
    return crossovers


def _checked_densities(densities: float | Iterable[float]) -> list[float]:
    """Return them sorted, without doubles."""
    wanted = "densities: expected numbers above 0 and at most 1, or one, got"
    given = densities
    if isinstance(densities, Real):
        given = [densities]
    elif isinstance(densities, Tensor):
        given = densities.reshape(-1).tolist()
    elif isinstance(densities, (str, bytes)) or not isinstance(densities, Iterable):
        raise TypeError(f"{wanted} {densities!r}")
    given = list(given)
    if any(not isinstance(density, Real) or isinstance(density, bool) for density in given):
        raise TypeError(f"{wanted} {densities!r}")
    if not given or not all(0 < density <= 1 for density in given):
        raise ValueError(f"{wanted} {densities!r}")
    return sorted({float(density) for density in given})


def _merged(*tables: dict[str, dict[tuple, Times]]) -> dict[str, dict[tuple, Times]]:
    merged: dict[str, dict[tuple, Times]] = {}
    for table in tables:
        for name, entries in table.items():
            merged.setdefault(name, {}).update(entries)
    return merged


def forget() -> None:
    """Drop what this process knows; the file, if there is one, is read again at the next call."""
    global _tables, edition
    _tables = None
    edition += 1
    _arriving.clear()
    _known.clear()


def _ways(order: Sequence[tuple], found: dict[tuple, Times], change: float) -> dict[tuple, list[bool]]:
    """Whether each call is to be dense, at each density, so that the run as a whole takes little.

    One call after the other may be either; `change` is what it costs where two that follow each other are not the same.
    Least of all where no call comes twice; one that does is what it is to be most often, unless all sparse, all dense,
    or each the faster one by itself, takes less.
    """
    ways: dict[tuple, list[bool]] = {key: [] for key in found}
    for number in range(min(len(times.densities) for times in found.values())):
        times = {key: (of.sparse[number], of.dense[number]) for key, of in found.items()}
        faster = {key: sparse > dense for key, (sparse, dense) in times.items()}
        tried = [_voted(order, times, change), faster, dict.fromkeys(found, False), dict.fromkeys(found, True)]
        taken = min(tried, key=lambda way: _cost(order, times, change, way))
        for key, is_dense in taken.items():
            ways[key].append(is_dense)
    return ways


def _voted(order: Sequence[tuple], times: dict[tuple, tuple[float, float]], change: float) -> dict[tuple, bool]:
    """The way of each call on the shortest path through a run; the most frequent one of a call that comes again."""
    total, before = (0.0, 0.0), []  # of the best paths up to here that end sparse and dense, and what came before
    for key in order:
        best = [min((total[came] + change * (came != way), came) for came in (0, 1)) for way in (0, 1)]
        before.append([came for _, came in best])
        total = best[0][0] + times[key][0], best[1][0] + times[key][1]
    way, votes = int(total[1] < total[0]), dict.fromkeys(times, 0)
    for key, came in zip(reversed(order), reversed(before)):
        votes[key] += 2 * way - 1
        way = came[way]
    return {key: vote > 0 for key, vote in votes.items()}


def _cost(order: Sequence[tuple], times: dict[tuple, tuple[float, float]], change: float, way: dict) -> float:
    changes = sum(way[one] != way[other] for one, other in itertools.pairwise(order))
    return sum(times[key][way[key]] for key in order) + change * changes


def _ascending(times: Times) -> Times:
    """Without the points of small masks that keep nothing, or as much as at the density before."""
    places = [i for i, one in enumerate(times.densities) if one > max([0.0, *times.densities[:i]])]
    of = {name: [getattr(times, name)[i] for i in places] for name in ("densities", "sparse", "dense", "is_dense")}
    return replace(times, **of)


def _measured(calls: list[Call], densities: Sequence[float], seconds: float, progress) -> list[Times]:
    sparse, dense, reached = ([[] for _ in calls] for _ in range(3))
    # Without modes of the caller's: a default device is not where masks are drawn and kernels have their memory.
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for number, density in enumerate(densities):
            if progress is not None:
                progress(number, len(densities), f"{len(calls)} calls at density {density:g}")
            for i, (times, share) in enumerate(_measured_at(calls, density, seconds)):
                # What disturbs a sample only adds to it: the lower quantile of few says more than their median.
                sparse[i].append(round(times["sparse"].low, 6))
                dense[i].append(round(times["dense"].low, 6))
                reached[i].append(round(share, 6))
    return [Times(call.name(), *of) for call, *of in zip(calls, reached, sparse, dense, strict=True)]


def _measured_at(calls: list[Call], density: float, seconds: float) -> Iterator[tuple[dict[str, Timing], float]]:
    """The times of both ways of each call, and the density that its masks reach.

    On the CPU in passes over all calls, sparse and dense ones in turn, as in a network: each layer runs once and does
    not find its weights in the cache. On the GPU, whose times are those of a full queue, call by call.
    """
    if calls[0].device.type != "cpu":
        for call in calls:
            at = call.at(density)
            ways = {"sparse": lambda _, at=at: at.sparse(), "dense": lambda _, at=at: at.dense()}
            yield take_turns(ways, at.device.type, _SAMPLES, seconds), at.kept() / at.work
        return
    samples = [{"sparse": [], "dense": []} for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    for turn in range(-2, 2 * _SAMPLES):
        for i, call in enumerate(calls):
            at = call.at(density)  # anew: what a mask costs is in the time, and the input has just been written
            way = ("sparse", "dense")[turn % 2]
            run = at.sparse if way == "sparse" else at.dense
            begin = time.perf_counter()
            run()
            if turn >= 0:  # the first two warm up
                samples[i][way].append((time.perf_counter() - begin) * 1e3)
        if turn + 1 >= 2 * LEAST_SAMPLES and time.perf_counter() > end:
            break
    for call, ways in zip(calls, samples, strict=True):
        at = call.at(density)
        yield {way: Timing.of(taken) for way, taken in ways.items()}, at.kept() / at.work


def sites_at(density: float, like: Tensor) -> ActiveSites:
    """Sites for a bool mask of the shape of `like` [N, 1, H, W], about that share of them active, in blobs."""
    samples, _, height, width = like.shape
    return ActiveSites._of(_mask_at(samples, height, width, density, like.device))


@functools.lru_cache(256)
def _mask_at(samples: int, height: int, width: int, density: float, device: torch.device) -> Tensor:
    return blob_mask(samples, height, width, density, torch.Generator().manual_seed(0)).to(device)
