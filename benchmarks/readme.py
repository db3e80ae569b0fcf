"""Write a recorded run into the README, between its `results` marks.

    python benchmarks/readme.py benchmarks/results/<machine>/bench.json

The record is what `python -m dynconv bench --json` wrote; networks.json beside it is that of whole networks, shown
first, and filters.json that of the filters of pixels. The plots in the same folder are linked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parent.parent
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
    """The text for networks.json, where there is one."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    machine, bar = record["environment"], record["summary"]["networks"]
    return [
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
    """The text for filters.json, where there is one."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    return [
        "",
        "Filters of pixels, times faster than PyTorch's usual idiom on contiguous tensors; in brackets the share of",
        "the floor: operands and results moved once a pass at the speed of a copy, "
        f"{record['ceilings']['copy'] / 1e9:.0f} GB/s, or what",
        f"is computed at the rate of a product ([every layer]({folder}/filters.json)):",
        "",
        *filters(record),
    ]


def section(path: Path) -> str:
    """The README's text for the record at `path`."""
    record = json.loads(path.read_text())
    machine, folder = record["environment"], path.resolve().parent.relative_to(ROOT).as_posix()
    device = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"
    return "\n".join(
        [
            *network_section(path.with_name("networks.json"), folder),
            f"Times faster than PyTorch's dense channels_last convolutions on **{device}** "
            f"({machine.get('cpu_features') or 'GPU'}), {record['dtype']}, PyTorch {machine['torch']}, "
            f"{record['masks']} masks: geometric means of medians, in brackets the share of what the products allow.",
            "A call includes finding the active pixels and writing the zeros; in place updates a cached output with",
            "shared sites. Dense blocks have normalisation folded in and activations in place; the masked ones keep",
            "features packed between their layers, and in training normalise over the computed pixels.",
            "LAUDNet's layers and the linear ones keep that share of the inputs and of the outputs of each sample, so",
            "that the products allow its inverse square.",
            f"Every layer is in [{folder}]({folder}/bench.json).",
            "",
            *table(record),
            *filter_section(path.with_name("filters.json"), folder),
            "",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="a bench.json in a folder of this repository")
    path, readme = parser.parse_args().record, ROOT / "README.md"
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"README.md: expected the marks {BEGIN} and {END}")
    try:
        text = section(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"argument record: expected what `dynconv bench --json` wrote, got {str(path)!r}: {error!r}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
