"""Where the op tests run: the CPU backend, and the Triton kernels natively or, without a GPU, interpreted."""

import os
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

# What was measured on this machine must not decide what is tested.
os.environ["DYNCONV_CALIBRATION"] = str(Path(tempfile.gettempdir()) / f"dynconv-tests-{os.getpid()}" / "none.json")

import pytest

import dynconv

ON_GPU = torch.cuda.is_available()


class Target:
    """A backend and the device it takes; `use()` forces it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.device = torch.device("cuda" if backend == "triton" and ON_GPU else "cpu")

    def use(self):
        return dynconv.backend(self.backend)

    def skip_unless(self, dtype: torch.dtype) -> None:
        if self.backend == "triton" and not ON_GPU and dtype == torch.bfloat16:
            pytest.skip("bfloat16 dot products are broken in Triton's interpreter; the compile gate builds them")


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.gpu)])
def target(request) -> Target:
    return Target(request.param)
