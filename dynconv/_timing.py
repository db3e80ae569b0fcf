"""Time calls that take turns, on the CPU or on the GPU, and name the CPU."""

from __future__ import annotations

import ctypes
import functools
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# A call gets as many samples as fit into the budget, but at least this many.
LEAST_SAMPLES = 5
# Milliseconds, and calls, that a sample on the CPU takes.
CPU_SAMPLE, MOST_CALLS = 3.0, 16
# Milliseconds after which a call is warm.
LONG = 500.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and the 20 % and 80 % quantiles of the samples."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """The quantiles, interpolated between samples."""
        quantiles = torch.tensor(milliseconds, dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        )
        return cls(*quantiles.tolist(), len(milliseconds))

    @property
    def is_noisy(self) -> bool:
        """Whether the samples differ too much for the median to mean a lot."""
        return self.high > 1.3 * self.low

    def __str__(self) -> str:
        digits = 3 if self.median < 1 else 2 if self.median < 10 else 1
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}-{self.high:.{digits}f}]"


def take_turns(
    calls: dict[str, Callable[[int], object]],
    device: str,
    repeats: int,
    seconds: float = 1.0,
    sets: int = 1,
    least: int = LEAST_SAMPLES,
) -> dict[str, Timing]:
    """Time each call, one sample of every call in turn, so that a disturbance of the machine meets them all.

    On the CPU a sample is as many calls in a row as take about `CPU_SAMPLE`: after a long call of something else
    nothing is left in the caches, not even Python's own code, and a network does not call one layer alone.

    Args:
        calls: by name; each takes the number of an input set, 0 to sets - 1.
        device: "cpu" or "cuda".
        repeats: samples of each call at most; fewer, but `least`, once `seconds` have passed.
        sets: how many input sets a sample on the GPU rotates through, to push the data of one out of its cache.

    Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    names = list(calls)
    measure = _cuda_sample if device == "cuda" else _cpu_sample
    rounds = dict.fromkeys(names, sets)
    for name in names:  # compilation, caches, the allocator's first pages
        for _ in range(3):
            once = measure(calls[name], sets, sets)
            if once * sets > LONG:  # such a call has warmed up by itself
                break
        if device == "cpu":
            rounds[name] = sets * max(1, min(MOST_CALLS, round(CPU_SAMPLE / max(once * sets, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    order = random.Random(0)
    for turn in range(repeats):
        # Any call comes after any other one: none always finds the same data in the cache.
        for name in order.sample(names, len(names)):
            samples[name].append(measure(calls[name], sets, rounds[name]))
        if turn + 1 >= least and time.perf_counter() > end:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def _cpu_sample(call: Callable[[int], object], sets: int, rounds: int) -> float:
    begin = time.perf_counter()
    for number in range(rounds):
        call(number % sets)
    return (time.perf_counter() - begin) * 1e3 / rounds


def _cuda_sample(call: Callable[[int], object], sets: int, rounds: int) -> float:
    """The GPU's time for a call when its queue is full, as in a CUDA graph: Python's own time is not in it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    pause = 2.0 + rounds  # milliseconds that the GPU waits while the calls are queued behind it
    while True:
        torch.cuda.synchronize()
        torch.cuda._sleep(int(pause * 1e-3 * 2e9))
        start.record()
        for number in range(rounds):
            call(number % sets)
        end.record()
        ran_dry = start.query()  # the GPU began before all was queued: what it waited for is in the time
        end.synchronize()
        if not ran_dry or pause > LONG:
            return start.elapsed_time(end) / rounds
        pause *= 4


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, for every call that is timed here; whether it could be told so (glibc only).

    By default glibc returns a large freed tensor to the system, or not, by what happens to lie next to it; getting it
    back costs a page fault for each 4 KiB, more than some layers' whole convolution. PyTorch's tuning guide
    recommends allocators that keep memory, jemalloc or tcmalloc.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, (1 << 31) - 1))
    except (AttributeError, OSError, TypeError):
        return False


def input_sets(device: str, bytes_per_set: int) -> int:
    """How many input sets hold twice what the GPU's L2 cache does; 1 on the CPU, where the caller's data stay."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(8, -(-2 * cache // max(1, bytes_per_set))))


def wait(device: str) -> None:
    """Let the GPU finish."""
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def cpu_model() -> str:
    """The CPU's name, as far as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
