"""Write a recorded run into the README and docs/results.md, between their `results` marks, and draw docs/density.svg.

    python benchmarks/readme.py benchmarks/results/<machine>/bench.json

The record is what `python -m dynconv bench --json` wrote, with networks.json, that of whole networks, and filters.json,
that of the filters of pixels, beside it. The README gets a short table of all three; docs/results.md has every line and
shows the plots of the same folder. tests/test_docs.py holds that what was written is what the record says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS, PICTURE = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "density.svg"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# (family, kernel; 0 are whole blocks, None all layers) -> title, and the densities to show, or all.
GROUPS = {
    ("resnet50", 3): ("ResNet-50, 3×3", None),
    ("sbnet", 3): ("SBNet, 3×3", None),
    ("sige-ddpm", 3): ("SIGE (DDPM), 3×3, edited share", None),
    ("mobilenetv2", 3): ("MobileNetV2, depthwise 3×3", (0.5, 0.25)),
    ("lasnet", 3): ("RegNetY-800MF, 3×3 in groups of 16", (0.5, 0.25)),
    ("resnet50", 0): ("ResNet-50, bottlenecks", (0.5, 0.25)),
    ("sbnet", 0): ("SBNet, bottlenecks", None),
    ("mobilenetv2", 0): ("MobileNetV2, inverted residuals", (0.5, 0.25)),
    ("dynconv-pose", 0): ("DynConv's pose network, 57 blocks", None),
    ("laudnet groups of 16", None): ("LAUDNet, channels in groups of 16", (0.5, 0.25)),
    ("laudnet groups of 1", None): ("LAUDNet, single channels", (0.5, 0.25)),
    ("linear groups of 16", None): ("linear 4096 and 1024, features in groups of 16", (0.5, 0.25)),
}


def table(record: dict) -> list[str]:
    """Geometric means over the 3×3 layers or the blocks of a family, a line for each density."""
    lines = [
        "| layers | density, keep rate | a call | in place | forward + backward |",
        "|---|---|---|---|---|",
    ]
    for (family, kernel), (title, shown) in GROUPS.items():
        rows = [row for row in record["rows"] if row["family"] == family and kernel in (None, row["kernel"])]
        if (family, kernel) == ("dynconv-pose", 0):
            rows = [row for row in rows if row["layer"] == "57 blocks in a row"]
        for asked in sorted({row["asked"] for row in rows}, reverse=True):
            if shown is not None and asked not in shown:
                continue
            cells = []
            for mode in ("plain", "in-place", "backward"):
                chosen = [row for row in rows if row["mode"] == mode and row["asked"] == asked]
                if not chosen:
                    cells.append("")
                    continue
                ratio = geometric_mean([row["ratio"] for row in chosen])
                share = geometric_mean([row["share"] for row in chosen])
                cells.append(f"{ratio:.2f}× ({share:.0%})" if ratio < 10 else f"{ratio:.0f}× ({share:.0%})")
            lines.append(f"| {title} | {asked:.2g} | {' | '.join(cells)} |")
    return lines


NETWORKS = {
    "resnet50": "ResNet-50",
    "mobilenetv2": "MobileNetV2",
    "regnety-800mf without se": "RegNetY-800MF without squeeze-and-excitation",
}


def networks(record: dict) -> list[str]:
    """A line for each network, batch and density."""
    lines = [
        "| network, 224×224 | batch | density | dense | compiled | sparse | automatic | to dense | to compiled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["networks"]:
        if row["failure"]:
            continue
        dense, compiled, sparse, automatic = (row[way] for way in ("dense", "compiled", "sparse", "automatic"))
        cells = [
            "" if timing is None else f"{timing['median']:.1f} ms" for timing in (dense, compiled, sparse, automatic)
        ]
        cells.append(f"{row['ratio']:.2f}×")
        cells.append("" if compiled is None else f"{compiled['median'] / automatic['median']:.2f}×")
        lines.append(f"| {NETWORKS[row['network']]} | {row['batch']} | {row['asked']:.2g} | {' | '.join(cells)} |")
    return lines


def network_section(path: Path, folder: str) -> list[str]:
    """The lines on networks.json."""
    record = json.loads(path.read_text())
    machine, bar = record["environment"], record["summary"]["networks"]
    return [
        "## Whole networks",
        "Whole networks in inference, every layer once in a forward pass, as they are used: milliseconds of a pass on",
        f"**{machine['cpu']}, {machine['threads']} threads**, the median of passes that take turns. Each block has a "
        "mask of its own",
        "at that density, and finding its pixels is in the time. Dense is eager, in channels_last with normalisation",
        "folded in and activations in place; compiled is the same by `torch.compile` with frozen parameters;",
        '`execution("automatic")` is calibrated. Stem, classifier and the blocks of MobileNetV2 without a shortcut are',
        f"dense on every side. Of {bar['rows']} blocks and layers within these passes {bar['below']} are slower than",
        f"the bar ({bar['bar']});",
        f"so are {bar['noise']} of dense itself, measured once more ([all of them]({folder}/networks.json)).",
        "",
        *networks(record),
        "",
    ]


# family -> title, and the usual idiom
FILTERS = {
    "involution": ("involution, RedNet-50's stages, 7×7, 16 channels a group", "unfold"),
    "ddf": ("DDF, 256 channels, 3×3, spatial × channel", "unfold"),
    "carafe": ("CARAFE, 256 channels, 5×5, to twice the size", "unfold"),
    "dcn": ("DCNv4, 4 groups of 16 channels, 3×3", "grid_sample"),
}


def filters(record: dict) -> list[str]:
    """Geometric means over the layers of a family."""
    lines = [
        "| filters of pixels | idiom | a call | to a loop over taps | forward + backward |",
        "|---|---|---|---|---|",
    ]
    means = {(mean["family"], mean["mode"]): mean for mean in record["summary"]["means_filters"]}
    for family, (title, idiom) in FILTERS.items():
        call, both = (means.get((family, mode)) for mode in ("plain", "backward"))
        if not call:
            continue
        taps = f"{call['tapped_ratio']:.1f}×" if call["tapped_ratio"] else ""
        cells = [f"{mean['ratio']:.1f}× ({mean['of_floor']:.0%})" if mean else "" for mean in (call, both)]
        lines.append(f"| {title} | `F.{idiom}` | {cells[0]} | {taps} | {cells[1]} |")
    return lines


def filter_section(path: Path, folder: str) -> list[str]:
    """The lines on filters.json."""
    record = json.loads(path.read_text())
    return [
        "",
        "## Filters of pixels",
        "Filters of pixels, times faster than PyTorch's usual idiom on contiguous tensors; in brackets the share of",
        "the floor: operands and results moved once a pass at the speed of a copy, "
        f"{record['ceilings']['copy'] / 1e9:.0f} GB/s, or what",
        f"is computed at the rate of a product ([every layer]({folder}/filters.json)):",
        "",
        *filters(record),
    ]


def device_of(record: dict) -> str:
    """The machine of a record, for people."""
    machine = record["environment"]
    return machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"


def section(path: Path) -> str:
    """What docs/results.md says of the record at `path`."""
    record = json.loads(path.read_text())
    machine, folder = record["environment"], f"../{path.resolve().parent.relative_to(ROOT).as_posix()}"
    return "\n".join(
        [
            *network_section(path.with_name("networks.json"), folder),
            "## Layers and blocks",
            f"Times faster than PyTorch's dense channels_last convolutions on **{device_of(record)}** "
            f"({machine.get('cpu_features') or 'GPU'}), {record['dtype']}, PyTorch {machine['torch']}, "
            f"{record['masks']} masks: geometric means of medians, in brackets the share of what the products allow.",
            "A call includes finding the active pixels and writing the zeros; in place updates a cached output with",
            "shared sites. Dense blocks have normalisation folded in and activations in place; the masked ones keep",
            "features packed between their layers, and in training normalise over the computed pixels.",
            "LAUDNet's layers and the linear ones keep that share of the inputs and of the outputs of each sample, so",
            "that the products allow its inverse square.",
            f"Every layer is in [{path.name}]({folder}/{path.name}).",
            "",
            *table(record),
            *filter_section(path.with_name("filters.json"), folder),
            "",
            "## Pictures",
            f"![time relative to dense against density]({folder}/bench.png)",
            "",
            "The cost is a line in the active pixels, through a small constant:",
            "",
            f"![time and memory against active pixels]({folder}/scaling.png)",
            "",
            "And on a photo (`python -m dynconv demo`): a cached network follows an edit, and how many of a network's",
            "blocks compute each pixel.",
            "",
            f"![the edit demo]({folder}/edit.png)",
            f"![the ponder map]({folder}/ponder.png)",
            "",
            "And a network that chooses its channels for each of scikit-learn's digits, beside its dense twin:",
            "",
            f"![the channels that each layer keeps of each digit]({folder}/channels.png)",
        ]
    )


# The README's rows of layers: (family, kernel, mode, density, text). Gains and losses both.
SHORT = (
    ("resnet50", 3, "plain", 0.25, "ResNet-50's 3×3 layers"),
    ("sbnet", 0, "plain", 0.1, "SBNet's bottlenecks"),
    ("laudnet groups of 16", None, "plain", 0.5, "LAUDNet's layers, channels in groups of 16"),
    ("mobilenetv2", 3, "backward", 0.5, "MobileNetV2's depthwise layers, forward + backward"),
)


def short_table(path: Path) -> list[str]:
    """At most twelve rows of the three records: whole networks, some layers, two kinds of filters of pixels."""
    bench, networks, filters = (
        json.loads(path.with_name(name).read_text()) for name in (path.name, "networks.json", "filters.json")
    )
    lines = ["| what | density | compared with | times faster |", "|---|---|---|---|"]
    for row in networks["networks"]:
        if row["batch"] == 1 and row["asked"] in (0.5, 0.25):
            compiled = row["compiled"]["median"] / row["automatic"]["median"]
            title = f"{NETWORKS[row['network']]}, whole, batch 1"
            faster = f"{row['ratio']:.2f}×, {compiled:.2f}×"
            lines.append(f"| {title} | {row['asked']:.2g} | dense, `torch.compile` | {faster} |")
    for family, kernel, mode, density, title in SHORT:
        rows = [row for row in bench["rows"] if (row["family"], row["mode"], row["asked"]) == (family, mode, density)]
        ratio = geometric_mean([row["ratio"] for row in rows if kernel in (None, row["kernel"])])
        lines.append(f"| {title} | {density:.2g} | dense | {ratio:.2f}× |")
    for family in ("involution", "dcn"):
        mean = next(m for m in filters["summary"]["means_filters"] if (m["family"], m["mode"]) == (family, "plain"))
        title, idiom = FILTERS[family]
        lines.append(f"| {title} |  | `F.{idiom}` | {mean['ratio']:.1f}× |")
    return lines


def readme_section(path: Path) -> str:
    """What the README says of the record at `path`."""
    record = json.loads(path.read_text())
    return "\n".join(
        [
            f"On **{device_of(record)}**, {record['dtype']}, PyTorch {record['environment']['torch']}: medians of "
            "calls that take turns;",
            "finding the active pixels and writing the zeros is in the time. Layers are geometric means of their kind.",
            "",
            *short_table(path),
        ]
    )


# The picture's layers: (family, layer, text). The network is ResNet-50, at the largest batch there is.
LAYERS = (
    ("resnet50", "56x56 64->64 3x3", "3×3, 64 channels, 56×56"),
    ("lasnet", "28x28 128->128 3x3 in 8 groups", "3×3 in 8 groups, 128 channels, 28×28"),
    ("mobilenetv2", "28x28 192 depthwise 3x3", "3×3 depthwise, 192 channels, 28×28"),
)


def curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """For each line of the picture its (density, time relative to dense), from the records beside `path`."""
    bench, networks = (json.loads(path.with_name(name).read_text()) for name in (path.name, "networks.json"))
    found = {}
    for family, layer, title in LAYERS:
        rows = [r for r in bench["rows"] if (r["family"], r["layer"], r["mode"]) == (family, layer, "plain")]
        found[f"{title}, batch {rows[0]['batch']}"] = sorted(
            (r["density"], r["sparse"]["median"] / r["dense"]["median"]) for r in rows
        )
    rows = [row for row in networks["networks"] if row["network"] == "resnet50"]
    batch = max(row["batch"] for row in rows)
    found[f"ResNet-50, whole, batch {batch}"] = sorted(
        (row["asked"], row["sparse"]["median"] / row["dense"]["median"]) for row in rows if row["batch"] == batch
    )
    return {title: [(round(x, 3), round(y, 3)) for x, y in points] for title, points in found.items()}


def draw(path: Path, picture: Path) -> None:
    """Time relative to dense against density; the points stand in the picture's description as well."""
    from dynconv.cli.plots import pyplot

    plt = pyplot()
    lines = curves(path)
    plt.rcParams.update({"svg.hashsalt": "dynconv", "font.size": 11})
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    ax.plot((0, 1), (0, 1), "--", color="0.5", linewidth=1.2, label="the density itself: the share of the products")
    ax.axhline(1, color="0.3", linewidth=1.2)
    ax.annotate("dense", (0, 1), xytext=(3, 4), textcoords="offset points", color="0.3")
    for (title, points), marker in zip(lines.items(), "osD^"):
        is_network = title.startswith("ResNet")
        ax.plot(*zip(*points), marker=marker, color="black" if is_network else None, linewidth=2.4, label=title)
    ax.set(xlabel="density: active share of the output pixels", ylabel="time / dense time", xlim=(0, 1.02), ylim=0)
    ax.legend(loc="lower right", fontsize=10)
    metadata = {"Date": None, "Description": json.dumps(lines, ensure_ascii=False)}
    figure.savefig(picture, format="svg", metadata=metadata, facecolor="white")
    plt.close(figure)


def between(page: Path, text: str) -> str:
    """The page with the text between its marks. Raises ValueError where it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page.relative_to(ROOT)}: expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="a bench.json in a folder of this repository")
    path = parser.parse_args().record
    try:
        texts = {README: readme_section(path), RESULTS: section(path)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        parser.error(f"argument record: expected what `dynconv bench --json` wrote, got {str(path)!r}: {reason}")
    try:
        pages = {page: between(page, text) for page, text in texts.items()}
    except ValueError as error:
        parser.error(str(error))
    for page, text in pages.items():
        page.write_text(text)
    draw(path, PICTURE)


if __name__ == "__main__":
    main()
