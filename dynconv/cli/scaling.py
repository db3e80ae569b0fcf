"""How the cost of an in-place call grows with the active sites: time, and memory beyond the operands."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .._timing import take_turns
from ..roofline import Device
from . import console, table
from .bench import Bench, Check
from .floors import estimate
from .layers import LAYERS, Layer, blob_mask
from .plots import pyplot, save

FRACTIONS = (0.0, 0.002, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """What PyTorch's allocator holds at most during the call beyond what it held before.

    On the CPU it is read from the profiler's record of every allocation and release: memory that goes through
    neither (oneDNN's own scratch) is not in it, so a dense convolution's figure is a lower bound.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports every start and stop on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def least_squares(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope, intercept) of the straight line through (x, y)."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return slope.item(), (y.mean() - slope * x.mean()).item()


def measure_scaling(
    layer: Layer, device: str, dtype: torch.dtype, ceilings: Device, batch: int = 1, repeats: int = 30
) -> dict:
    """Time and memory of one layer from no active site to all of them, every result checked first.

    Raises RuntimeError for a wrong result: there is no speed of a wrong result to report.
    """
    bench = Bench(layer, batch, dtype, device)
    check = Check(bench)
    sites, masks = [], []
    for fraction in FRACTIONS:
        mask = blob_mask(batch, layer.height, layer.width, fraction, bench.generator).to(device)
        masks.append(mask)
        sites.append(bench.compact(mask))
    with torch.no_grad():
        for mask, active in zip(masks, sites):
            verdict = check.output(bench.sparse(0, active, bench.caches[0].clone()), mask, bench.caches[0])
            if not verdict.passed:
                raise RuntimeError(f"{layer.name} at {active.density:.3f}: wrong result: {verdict}")

        def call(active) -> Callable[[int], Tensor]:
            return lambda number: bench.sparse(number, active, bench.caches[number])

        calls = {str(i): call(active) for i, active in enumerate(sites)}
        timings = take_turns({"dense": bench.dense} | calls, device, repeats, 8.0, bench.sets)
        memory = [peak_extra_bytes(lambda run=run: run(0), device) for run in calls.values()]
        dense_memory = peak_extra_bytes(lambda: bench.dense(0), device)
    counts = [len(active) for active in sites]
    medians = [timings[str(i)].median for i in range(len(sites))]
    slope, intercept = least_squares(list(zip(counts, medians)))
    floor = estimate(layer, torch.ones_like(masks[0]), "in-place", batch, dtype, ceilings)
    return {
        "layer": layer.name, "batch": batch, "sites": masks[0].numel(), "dense_ms": timings["dense"].median,
        "dense_extra_bytes": dense_memory, "slope_ns_per_site": slope * 1e6, "intercept_us": intercept * 1e3,
        "floor_ns_per_site": floor.floor_ms * 1e6 / masks[0].numel(),
        "empty_us": medians[0] * 1e3, "noisy": sum(timings[str(i)].is_noisy for i in range(len(sites))),
        "points": [
            {"count": count, "median": t.median, "low": t.low, "high": t.high, "extra_bytes": extra_bytes}
            for count, t, extra_bytes in zip(counts, (timings[str(i)] for i in range(len(sites))), memory)
        ],
    }  # fmt: skip


def run_scaling(device: str, dtype: torch.dtype, ceilings: Device, path: str) -> list[dict]:
    """Measure two layers, print their lines and draw them; the record for JSON."""
    batch = 128 if device == "cuda" else 4
    chosen = ((LAYERS["sige-ddpm"][0], 1), (LAYERS["resnet50"][0], batch))
    records = [measure_scaling(layer, device, dtype, ceilings, size) for layer, size in chosen]
    shown = table(
        "\nin-place calls: time against the active sites, a least-squares line",
        "<layer|batch|no site us|intercept us|ns a site|floor|of floor|dense ms|all / dense|noisy points|"
        "extra MiB at 10 %, 100 %",
        "floor: of a site, at this machine's ceilings. Extra memory: the most that PyTorch's allocator holds during a "
        "call beyond its operands.",
    )
    for record in records:
        points = record["points"]
        tenth = next(point for point in points if point["count"] >= 0.099 * record["sites"])
        shown.add_row(
            record["layer"], str(record["batch"]), f"{record['empty_us']:.0f}", f"{record['intercept_us']:.0f}",
            f"{record['slope_ns_per_site']:.0f}", f"{record['floor_ns_per_site']:.0f}",
            f"{record['floor_ns_per_site'] / record['slope_ns_per_site']:.0%}", f"{record['dense_ms']:.2f}",
            f"{points[-1]['median'] / record['dense_ms']:.2f}", f"{record['noisy']} of {len(points)}",
            f"{tenth['extra_bytes'] / 2**20:.2f}, {points[-1]['extra_bytes'] / 2**20:.2f}",
        )  # fmt: skip
    console().print(shown)
    _plot(records, path)
    return records


def _plot(records: Sequence[dict], path: str) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(2, len(records), figsize=(4.6 * len(records), 5.6), squeeze=False, layout="constrained")
    figure.suptitle("The cost of an in-place call grows with the active sites", fontsize=11)
    for column, record in enumerate(records):
        points = record["points"]
        counts = [point["count"] for point in points]
        time, memory = axes[0][column], axes[1][column]
        time.errorbar(
            counts, [p["median"] for p in points],
            yerr=([max(0, p["median"] - p["low"]) for p in points], [max(0, p["high"] - p["median"]) for p in points]),
            fmt="o", markersize=4, color="C0", label="dynconv, out= (20-80 %)",
        )  # fmt: skip
        line = [record["intercept_us"] / 1e3 + record["slope_ns_per_site"] / 1e6 * count for count in counts]
        label = f"{record['slope_ns_per_site']:.0f} ns a site + {record['intercept_us']:.0f} us"
        time.plot(counts, line, color="C0", linewidth=1, label=label)
        time.axhline(record["dense_ms"], color="0.3", linestyle="--", linewidth=1, label="dense")
        time.set(ylabel="ms", ylim=(0, None), xlim=(0, None))
        time.set_title(f"{record['layer']}, batch {record['batch']}", loc="left")
        time.legend(fontsize=8)
        memory.plot(
            counts, [p["extra_bytes"] / 2**20 for p in points], "o-", markersize=4, color="C2", label="dynconv, out="
        )
        memory.axhline(
            record["dense_extra_bytes"] / 2**20, color="0.3", linestyle="--", linewidth=1, label="dense: its output"
        )  # fmt: skip
        memory.set(ylabel="extra memory, MiB", xlabel="active sites", ylim=(0, None), xlim=(0, None))
        memory.legend(fontsize=8)
    save(figure, path)
