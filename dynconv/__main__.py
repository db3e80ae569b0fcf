"""python -m dynconv verify | bench | roofline | demo | warmup"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .calibration import execution
from .cli import bench, demo, options, roofline, told, verify, warmup

COMMANDS = {
    "verify": (verify, "compare every op with its dense reference on this machine"),
    "bench": (bench, "time dense against dynconv on published layers"),
    "roofline": (roofline, "say what the published layers cannot be faster than, here or on a named GPU"),
    "demo": (demo, "run photos and digits through networks that compute only what matters, or what changed"),
    "warmup": (warmup, "compile the CPU kernels now, so that no later process has to"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status is 0 if every result was right, 2 for an option that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m dynconv", description="Sparse-compute ops for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
    chosen = parser.parse_args(arguments)
    module, command = COMMANDS[chosen.command][0], commands.choices[chosen.command]
    options.check_outputs(command, chosen)
    if hasattr(module, "check"):
        module.check(command, chosen)
    # What is calibrated here must not decide what is measured; commands may ask for more.
    try:
        with execution("sparse"), told():
            return module.main(chosen)
    except KeyboardInterrupt:
        print("dynconv: stopped", file=sys.stderr)
        return 130  # as shells say it


if __name__ == "__main__":
    sys.exit(main())
