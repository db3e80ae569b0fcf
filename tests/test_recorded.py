"""Kernels are compiled for a GPU that is not here by the very calls that would run them there."""

import subprocess
import sys

import pytest

from dynconv._launches import recorded

SCRIPT = """
import torch, dynconv
from dynconv._launches import recorded
mask = torch.rand(2, 1, 8, 8) < 0.5
x, w = torch.ones(2, 32, 8, 8), torch.ones(32, 32, 1, 1)
before = dynconv.masked_conv2d(x, w, mask=mask)
with recorded("sm_90") as launches, torch.no_grad():
    dynconv.masked_conv2d(x, w, mask=mask)
*_, last = launches
assert last.name == "masked_conv_kernel" and last.grid[1:] == (1, 1), launches
assert last.arguments["KERNEL_HEIGHT"] == 1 and last.arguments["source_height"] == 8
assert last.kernel.metadata.target.arch == 90 and last.kernel.asm["cubin"]
with recorded("gfx942") as launches, torch.no_grad():
    dynconv.masked_conv2d(x, w, mask=mask)
assert "amdgcn" in launches[-1].kernel.asm
assert torch.equal(dynconv.masked_conv2d(x, w, mask=mask), before)  # outside of it, the CPU backend runs as it did
"""


def test_launches_are_compiled_and_noted(tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*got 'sm_42'"), recorded("sm_42"):
        pass
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected unset"), recorded("sm_90"):
        pass
