"""What `python -m dynconv` runs: verify, bench, roofline, demo and warmup.

Nothing of the package imports this. Tables, plots and the photo need the extra `bench`; each command loads what
it uses when it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType


def extra(module: str) -> ModuleType:
    """Import a module of the optional dependencies; where it is missing, exit with the line that gets it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"dynconv: {error.name} is missing; get it with: pip install dynconv[bench]") from None


class _Lines(logging.Handler):
    """Each message as a line of stderr, which rich's progress bars know how to move out of the way of."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Say on stderr what is compiled, which takes seconds."""
    log, lines = logging.getLogger("dynconv"), _Lines(logging.INFO)
    before = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(before)


def console(stderr: bool = False):
    """A rich console; tables keep their columns when the output goes to a file or a pipe."""
    rich = extra("rich.console")
    made = rich.Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else rich.Console(stderr=stderr, highlight=False, width=160)


def table(title: str, columns: str, caption: str | None = None):
    """A rich table; columns are separated by `|`, and those that begin with `<` are aligned to the left."""
    made = extra("rich.table").Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in columns.split("|"):
        made.add_column(column.lstrip("<"), justify="left" if column.startswith("<") else "right")
    return made
