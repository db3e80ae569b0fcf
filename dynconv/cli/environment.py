"""What a result has to carry to be worth keeping: machine, versions, date, commit. No paths, no names of hosts."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

import dynconv

from .._timing import cpu_model


def environment(device: str) -> dict:
    """The record that goes with results made on `device`."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dynconv": dynconv.__version__,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cpu_features": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "numba": version("numba"),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported."""
    return importlib.util.find_spec(module) is not None


def _commit() -> str | None:
    """The commit of the source tree that runs, "+" where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: str | Path, content: dict) -> None:
    """Write a record, with the folders above it."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def partial_of(target: Path) -> Path:
    """Where a file is while it is written."""
    return target.with_name(target.name + ".part")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when all is written; who is stopped leaves the file before."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _finite(content):
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
