"""Every example that a reader may paste: the code blocks of README.md and docs/, and those in docstrings."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dynconv
from dynconv import calibration

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.stem: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S) for name, page in PAGES.items()}
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "dynconv").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process():
    """What an example has measured must not decide how other tests run."""
    torch.manual_seed(0)
    calibration.forget()
    yield
    calibration.forget()


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_the_blocks_of_a_page_run_as_pasted_in_order(name):
    names = {}
    for number, block in enumerate(BLOCKS[name], 1):
        exec(compile(block, f"{PAGES[name].name}, block {number}", "exec"), names)


def test_the_pages_have_blocks():
    assert all(BLOCKS[name] for name in ("README", "masked", "channels", "filters", "deform", "gating", "packed"))


def check_examples(name):
    """Run a module's examples, with the names that docs/index.md says they assume."""
    module = importlib.import_module(name)
    names = {"dynconv": dynconv, "torch": torch, "nn": nn}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names):
        example.globs = dict(names)  # as for a reader, not with what the module happens to have imported
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


# Whose examples compile kernels, which cannot be done where they are interpreted.
COMPILES = ("dynconv.roofline",)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_say_what_comes(name):
    if name not in COMPILES:
        check_examples(name)
        return
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


if __name__ == "__main__":
    check_examples(sys.argv[1])
