"""python -m dynconv verify | bench | roofline | demo"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .calibration import execution
from .cli import bench, demo, roofline, verify

COMMANDS = {
    "verify": (verify, "compare every op with its dense reference on this machine"),
    "bench": (bench, "time dense against dynconv on published layers"),
    "roofline": (roofline, "say what the published layers cannot be faster than, here or on a named GPU"),
    "demo": (demo, "run photos and digits through networks that compute only what matters, or what changed"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status is 0 if every result was right."""
    parser = argparse.ArgumentParser(prog="python -m dynconv", description="Sparse-compute ops for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
    chosen = parser.parse_args(arguments)
    with execution("sparse"):  # what is calibrated here must not decide what is measured; commands may ask for more
        return COMMANDS[chosen.command][0].main(chosen)


if __name__ == "__main__":
    sys.exit(main())
