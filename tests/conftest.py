"""Where the op tests run: the CPU backend, and the Triton kernels natively or, without a GPU, interpreted."""

import os
import pickle
import re
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two threads show what depends on their number. The other workers have the cores as well: who waits must not spin.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

# What was measured on this machine must not decide what is tested.
os.environ["DYNCONV_CALIBRATION"] = str(Path(tempfile.gettempdir()) / f"dynconv-tests-{os.getpid()}" / "none.json")

import pytest

import dynconv

ON_GPU = torch.cuda.is_available()


def group(nodeid: str) -> str:
    """What one worker of pytest-xdist has to itself: tests of a group share what a process makes once.

    The gate's rows, the built wheel, the built pages, and the CPU backend, whose Numba kernels two workers would both
    compile, in two parts. A test of the Triton kernels is a group of its own. By the id: pytest-xdist 3.8 loses its own
    groups with pytest 9.2.
    """
    file, _, name = nodeid.rpartition("/")[2].partition("::")
    if file in ("test_compile_gate.py", "test_packaging.py", "test_docs.py"):
        return file
    if file == "test_kernels.py" or "triton" in name:
        return nodeid
    # Nearly all kernels of these are their own, and as much work as a second worker has left beside the others.
    is_example = file == "test_examples.py" and re.search("filter|deform|pixel_adaptive", name)
    return "filters" if is_example or file.startswith(("test_dynamic", "test_deform")) else "cpu"


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody calls it
def pytest_xdist_make_scheduler(config, log):
    """Hand out the tests by group, the largest first."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return GroupScheduling(config, log)


def can_raise(kernel) -> bool:
    """Whether a compiled kernel of the CPU backend holds a pickled exception: what a `raise` in it would report."""
    code = kernel._library._compiled_object
    if code is None:  # read from its file, and given to the linker
        (_, _, (code, _)), *_ = pickle.loads(kernel._cache.read())
    return b"\x80\x04\x95" in code


@pytest.fixture(scope="session", autouse=True)
def _no_kernel_can_raise():
    """Look at every Numba kernel that the tests have compiled or loaded.

    An exception in a kernel is printed and ignored, and the result stays unwritten. (One that happens all the same
    fails its test: pytest hands what is printed so to the warnings, which are errors here.)
    """
    yield
    threads = sys.modules.get("dynconv.cpu._threads")
    if threads is not None:
        compiled = [kernel for of_types in threads.KERNELS.values() for kernel in of_types.values()]
        assert not [kernel._cache.name for kernel in compiled if can_raise(kernel)]


@pytest.fixture(autouse=True)
def _exact_float32():
    """Float32 means float32: PyTorch's default for convolutions on a GPU is TF32, which has tests of its own."""
    torch.backends.cudnn.allow_tf32 = False


class Target:
    """A backend and the device it takes; `use()` forces it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.device = torch.device("cuda" if backend == "triton" and ON_GPU else "cpu")

    @property
    def is_interpreted(self) -> bool:
        """Whether it runs in Triton's interpreter, thousands of times slower."""
        return self.backend == "triton" and not ON_GPU

    def use(self):
        return dynconv.backend(self.backend)

    def skip_unless(self, dtype: torch.dtype) -> None:
        if self.is_interpreted and dtype == torch.bfloat16:
            pytest.skip("bfloat16 dot products are broken in Triton's interpreter; the compile gate builds them")


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.gpu)])
def target(request) -> Target:
    return Target(request.param)
