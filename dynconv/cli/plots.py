"""The pictures that bench draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import extra
from .bench import Row, crossover, curves
from .environment import replacing
from .filters import FilterRow


def pyplot():
    """matplotlib without a display."""
    extra("matplotlib").use("Agg")
    made = extra("matplotlib.pyplot")
    made.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
        "legend.frameon": False, "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True,
    })  # fmt: skip
    return made


def save(figure, path: str | Path) -> None:
    """At 150 dots an inch, with the folders above it."""
    with replacing(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:].lower(), dpi=150, bbox_inches="tight", facecolor="white")
    pyplot().close(figure)


def plot_rows(rows: Sequence[Row], summary: dict, subtitle: str, path: str) -> None:
    """Time relative to dense against density: a column for each mode, a row for each family."""
    plt = pyplot()
    ticker = extra("matplotlib.ticker")
    families = list(dict.fromkeys(row.family for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    figure, axes = plt.subplots(
        len(families), len(modes), figsize=(3.6 * len(modes) + 2.2, 3.1 * len(families) + 0.5), squeeze=False,
        sharey="row", layout="constrained",
    )  # fmt: skip
    figure.suptitle(f"Time relative to the dense convolution: {subtitle}", fontsize=11)
    drawn = curves(rows)
    for i, family in enumerate(families):
        layers = list(dict.fromkeys(row.layer for row in rows if row.family == family))
        shades = {0: plt.cm.Greens, 1: plt.cm.Oranges, 3: plt.cm.Blues}  # blocks, 1x1 and 3x3 layers
        kernels = {row.layer: row.kernel for row in rows if row.family == family}
        for j, mode in enumerate(modes):
            ax = axes[i][j]
            found = [row.density for row in rows if row.family == family]
            lowest, highest = min(found) / 1.3, 1.0
            power = 2 if any(row.kind == "width" for row in rows if row.family == family) else 1
            ideal = "ideal: the density" if power == 1 else "ideal: kept in · kept out"
            ax.plot((lowest, highest), (lowest**power, highest), "--", color="0.4", linewidth=1, label=ideal)
            ax.axhline(1, color="0.2", linewidth=1)
            ax.annotate("dense", (lowest, 1), xytext=(2, 2), textcoords="offset points", color="0.2", fontsize=8)
            for layer in layers:
                curve = drawn.get((family, layer, mode))
                if not curve:
                    continue
                same = [name for name in layers if kernels[name] == kernels[layer]]
                tone = 0.45 + 0.5 * (same.index(layer) + 0.5) / len(same)
                color = shades[kernels[layer]](tone)
                density = [row.density for row in curve]
                style = dict(color=color, linewidth=1.6, marker="os^D"[same.index(layer) % 4], markersize=4)
                ax.plot(density, [1 / row.ratio for row in curve], label=layer, **style)
                # The samples' 20 and 80 % quantiles.
                low, high = ([getattr(row.sparse, q) / row.dense.median for row in curve] for q in ("low", "high"))
                ax.fill_between(density, low, high, color=color, alpha=0.15, linewidth=0)
                crossing = crossover([(row.density, row.ratio) for row in curve]).density
                if crossing is not None:
                    ax.plot(crossing, 1, "o", markersize=9, markerfacecolor="none", markeredgecolor=color)
            ax.set(xscale="log", yscale="log", xlim=(lowest, highest * 1.03))
            ax.set_title(f"{family}: {mode}", loc="left")
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
                axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(ticker.NullFormatter())
            if j == 0:
                ax.set_ylabel("time / dense time")
            if i == len(families) - 1:
                ax.set_xlabel("density (active share of the outputs)")
        # Where a mode failed throughout, its axes know no layer.
        handles = {label: handle for ax in axes[i] for handle, label in zip(*ax.get_legend_handles_labels())}
        axes[i][-1].legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.text(
        0.01, -0.02, "Circles: crossover. Bands: 20 and 80 % quantiles of dynconv's time.", fontsize=8, color="0.35"
    )
    save(figure, path)


def plot_filters(rows: Sequence[FilterRow], subtitle: str, path: str) -> None:
    """Times faster than the idiom, and than the loop over taps: a panel for each mode, a bar for each layer."""
    plt = pyplot()
    ticker = extra("matplotlib.ticker")
    modes = list(dict.fromkeys(row.mode for row in rows))
    layers = list(dict.fromkeys((row.family, row.layer) for row in rows))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(4.6 * len(modes) + 2.4, 0.42 * len(layers) + 1.3), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    figure.suptitle(f"Filters of pixels, times faster: {subtitle}", fontsize=11)
    series = (("than F.unfold or F.grid_sample", "ratio", "C0"), ("than a loop over taps", "tapped_ratio", "0.72"))
    for ax, mode in zip(axes[0], modes):
        for shift, (label, name, color) in zip((-0.2, 0.2), series):
            timed = [row for row in rows if row.mode == mode and getattr(row, name) is not None]
            places = [layers.index((row.family, row.layer)) + shift for row in timed]
            bars = ax.barh(places, [getattr(row, name) for row in timed], 0.38, color=color, label=label)
            ax.bar_label(bars, [f" {getattr(row, name):.1f}x" for row in timed], fontsize=8, color="0.3")
        ax.axvline(1, color="0.2", linewidth=1)
        ax.set(xscale="log", xlabel="times faster")
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_title(mode, loc="left")
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(layers)), [f"{family} {layer}" for family, layer in layers])
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    save(figure, path)
