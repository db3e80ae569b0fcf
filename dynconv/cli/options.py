"""The types of the commands' options: what cannot be right is refused before any work, with exit status 2.

argparse names the option; a type says what was expected and what came. Files and folders are tried where they will be
written, and nothing is left there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from .environment import partial_of

# What matplotlib draws without more packages.
PICTURES = (".png", ".pdf", ".svg", ".jpg")


def _refused(expected: str, text: str, reason: object = "") -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r}" + (f": {reason}" if reason else ""))


def number(expected: str, is_right: Callable[[float], bool], kind: type = float) -> Callable[[str], float]:
    """The type of a number for which `is_right`; `expected` says for which that is."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise _refused(expected, text) from None
        if not is_right(value):
            raise _refused(expected, text)
        return value

    return parse


positive = number("a whole number of at least 1", lambda value: value >= 1, int)
seconds = number("a finite number of seconds, 0 or more", lambda value: 0 <= value < math.inf)
limit = number("a number of seconds, 0 or more", lambda value: value >= 0)
density = number("a density above 0 and at most 1", lambda value: 0 < value <= 1)
share = number("a share between 0 and 1", lambda value: 0 < value < 1)


def pattern(text: str) -> str:
    """The type of a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise _refused("a regular expression", text, error) from None
    return text


def output_folder(text: str) -> Path:
    """The type of a folder that is there or can be made, to write to."""
    folder = Path(text)
    try:
        _look_up(folder)
        _try_to_write(folder)
    except (OSError, ValueError) as error:
        raise _refused("a folder that can be written", text, error) from None
    return folder


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """The type of a file to write, with one of the suffixes if there are any, in a folder that is there or is made."""
    expected = f"a file that ends in {', '.join(suffixes)}" if suffixes else "a file"

    def parse(text: str) -> Path:
        file = Path(text)
        try:
            if suffixes and file.suffix.lower() not in suffixes:
                raise _refused(expected, text)
            if not os.path.basename(text) or (os.path.lexists(file) and not file.is_file()):
                raise _refused(expected, text, "it names something else")
            _look_up(partial_of(file))
            _try_to_write(file.parent)
        except (OSError, ValueError) as error:
            raise _refused(f"{expected} in a folder that can be written", text, error) from None
        return file

    return parse


def _look_up(path: Path) -> None:
    """Raise OSError where the system does not take the name."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.stat()


def _try_to_write(folder: Path) -> None:
    """Write a file without a name in the folder, or in the lowest one above it that is there; raises OSError."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is no folder")
    tempfile.TemporaryFile(dir=existing).close()


def check_outputs(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """That no two options name the same file, or one a folder of another: exit with status 2."""
    outputs = [(name, value) for name, value in vars(arguments).items() if isinstance(value, Path)]
    for (name, path), (other, other_path) in itertools.permutations(outputs, 2):
        real, other_real = path.resolve(), other_path.resolve()
        if real == other_real or real in other_real.parents:
            parser.error(
                f"argument --{other}: expected another file than --{name}, got {str(other_path)!r} beside {path}"
            )


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """That PyTorch has the device: exit with status 2."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: expected another one, got 'cuda': PyTorch finds no CUDA device here")


def nothing_left(arguments: argparse.Namespace) -> str:
    """The message where no layer passes --layers, --shapes and --modes."""
    option, given = ("layers", arguments.layers) if arguments.layers else ("modes", " ".join(arguments.modes))
    return f"argument --{option}: expected what some layer of --shapes {' '.join(arguments.shapes)} has, got {given!r}"
