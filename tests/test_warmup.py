"""Compiling ahead of time: all that is needed, in this process or on disk for others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynconv

ROOT = Path(__file__).resolve().parent.parent


EVERYTHING = """
import importlib, pkgutil, torch
from dynconv import _warmup, cpu, warmup
from dynconv.cpu import _threads
told = []
warmup(progress=lambda *piece: told.append(piece))
assert told == [(number, len(_warmup.OPS), f"{op} float32") for number, op in enumerate(_warmup.OPS)]
for module in pkgutil.iter_modules(cpu.__path__):
    importlib.import_module(f"{cpu.__name__}.{module.name}")
assert len(_threads.KERNELS) > 30
assert [name for name, dtypes in _threads.KERNELS.items() if torch.float32 not in dtypes] == []
"""


def test_warmup_leaves_no_kernel_out():
    """In a process of its own: in this one other tests have compiled some."""
    result = subprocess.run([sys.executable, "-c", EVERYTHING], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_warmup_takes_no_default_device_of_the_callers():
    with torch.device("meta"):
        dynconv.warmup(ops=["gathered_linear", "blocks"])


def test_warmup_runs_a_model_both_ways():
    paths = []
    input, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    mask = torch.rand(1, 1, 6, 6) < 0.5

    def model():
        with dynconv.explain() as explanation:
            dynconv.masked_conv2d(input, weight, mask=mask, padding=1)
        paths.extend(decision.path for decision in explanation.decisions)

    dynconv.warmup(model)
    # First as under a profiler and as after a calibration; the last in the automatic mode, where nothing is measured.
    assert paths == ["sparse", "sparse", "sparse", "dense", "sparse"]
    paths.clear()
    with dynconv.execution("sparse"):
        dynconv.warmup(model)
    assert paths == ["sparse", "dense", "sparse"]


def test_warmup_leaves_no_compiled_graph_to_make():
    """A graph is compiled for the mode in force: a call in another one would compile again."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    input, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    mask = torch.rand(1, 1, 6, 6) < 0.5
    model = torch.compile(lambda mask: dynconv.masked_conv2d(input, weight, mask=mask, padding=1), backend=compiler)
    dynconv.warmup(lambda: model(mask))
    made = len(graphs)
    assert made == 3
    model(~mask)
    assert len(graphs) == made


@pytest.mark.parametrize(
    "options, named",
    [
        ({"ops": ["conv"]}, "ops: expected some of masked_conv2d"),
        ({"ops": "blocks"}, "ops: expected some of"),
        ({"dtypes": [torch.int32]}, "dtypes: expected some of torch.float32"),
        ({"dtypes": ["float32"]}, "dtypes: expected some of"),
        ({"run": print, "ops": ["blocks"]}, "ops: expected None beside run"),
    ],
    ids=str,
)
def test_errors(options, named):
    with pytest.raises(ValueError, match=named):
        dynconv.warmup(**options)


def test_what_the_command_compiled_no_process_compiles_again(tmp_path):
    shutil.copytree(ROOT / "dynconv", tmp_path / "dynconv", ignore=shutil.ignore_patterns("__pycache__"))
    # No folder of the user's, and none beside the source, which is read as well.
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def process(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout, done.stderr

    printed, told = process("-m", "dynconv", "warmup", "--ops", "gathered_linear", "--jobs", "1")
    assert "1 of 1: gathered_linear float32" in printed and f"kept in {tmp_path / 'cache'}" in printed
    assert told.count("compiling gathered_linear.") == len(list(tmp_path.rglob("gathered_linear.*.kernel"))) == 6
    calls = """
import logging, torch, dynconv
logging.basicConfig(level=logging.INFO)
input, weight = torch.randn(3, 40, requires_grad=True), torch.randn(24, 40, requires_grad=True)
dynconv.gathered_linear(input, weight, torch.randn(24), in_mask=torch.rand(3, 40) < 0.5).sum().backward()
"""
    assert process("-c", calls) == ("", "")
