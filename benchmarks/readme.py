"""Write a recorded run into the README, between its `results` marks.

    python benchmarks/readme.py benchmarks/results/<machine>/bench.json

The record is what `python -m dynconv bench --json` wrote; the plots beside it are linked.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
FAMILIES = {
    "resnet50": "ResNet-50, 3×3",
    "sbnet": "SBNet, 3×3",
    "sige-ddpm": "SIGE (DDPM), 3×3, edited share",
}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(record: dict) -> list[str]:
    """Geometric means over the 3×3 layers of a family, a line for each density."""
    lines = [
        "| layers | density | a call | in place | forward + backward |",
        "|---|---|---|---|---|",
    ]
    for family, title in FAMILIES.items():
        rows = [row for row in record["rows"] if row["family"] == family and row["kernel"] == 3]
        for asked in sorted({row["asked"] for row in rows}, reverse=True):
            cells = []
            for mode in ("plain", "in-place", "backward"):
                chosen = [row for row in rows if row["mode"] == mode and row["asked"] == asked]
                ratio = geometric_mean([row["ratio"] for row in chosen])
                share = geometric_mean([row["share"] for row in chosen])
                cells.append(f"{ratio:.2f}× ({share:.0%})" if ratio < 10 else f"{ratio:.0f}× ({share:.0%})")
            lines.append(f"| {title} | {asked:g} | {' | '.join(cells)} |")
    return lines


def section(path: Path) -> str:
    """The README's text for the record at `path`."""
    record = json.loads(path.read_text())
    machine, folder = record["environment"], path.resolve().parent.relative_to(ROOT).as_posix()
    device = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['threads']} threads"
    return "\n".join(
        [
            f"Times faster than PyTorch's dense channels_last convolution on **{device}** "
            f"({machine.get('cpu_features') or 'GPU'}), {record['dtype']}, PyTorch {machine['torch']}, "
            f"{record['masks']} masks: geometric means of medians, in brackets the share of the ideal, 1/density.",
            "A call includes finding the active pixels and writing the zeros; in place updates a cached output with",
            f"shared sites. Every layer is in [{folder}]({folder}/bench.json).",
            "",
            *table(record),
            "",
            f"![time relative to dense against density]({folder}/bench.png)",
            "",
            "The cost is a line in the active pixels, through a small constant:",
            "",
            f"![time and memory against active pixels]({folder}/scaling.png)",
            "",
            "And on a photo (`python -m dynconv demo`): a cached network follows an edit.",
            "",
            f"![the edit demo]({folder}/edit.png)",
        ]
    )


def main() -> None:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{section(Path(sys.argv[1]))}\n{END}{after}")


if __name__ == "__main__":
    main()
