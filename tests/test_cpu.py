"""The CPU backend's kernels: what holds for all of them."""

import pytest
import torch
from conftest import can_raise
from numba import carray, njit

from dynconv import ActiveSites, masked_conv2d
from dynconv.cpu import _threads


@njit
def _divide(arguments, storage, compute):
    a = carray(arguments, (8,))
    a[0] = a[2] // a[3]


@njit
def _refuse(arguments, storage, compute):
    a = carray(arguments, (8,))
    if a[2] == 0:
        raise ValueError("zero")


@pytest.fixture
def compile_kernel(monkeypatch):
    """Run a kernel; what was compiled for it, which leaves no trace."""
    monkeypatch.setattr(_threads, "KERNELS", {})

    def compiled(body, *arguments):
        run = _threads.kernel(body)
        run(torch.float32, 1, *arguments)
        (of_types,) = _threads.KERNELS.values()
        return of_types[torch.float32]

    return compiled


def test_a_division_in_a_kernel_cannot_raise(compile_kernel):
    assert not can_raise(compile_kernel(_divide, 1, 0))


def test_what_raises_in_a_kernel_is_found(compile_kernel):
    assert can_raise(compile_kernel(_refuse, 1))


def test_what_a_kernel_raises_reaches_pytest(compile_kernel, monkeypatch):
    caught = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: caught.append(what.exc_type))
    compile_kernel(_refuse, 0)
    assert caught == [ValueError]


@pytest.mark.parametrize("groups", (1, 2, 4, 8, 16))
@pytest.mark.parametrize("kind", ("bool", "sites", "gate"))
@pytest.mark.parametrize("samples", (0, 1))
def test_nothing_to_compute_has_zero_gradients(samples, kind, groups):
    """Of an empty batch, and of a mask without a site, in every kernel: dense, grouped and depthwise."""
    x = torch.randn(samples, 16, 5, 5).requires_grad_()
    weight, bias = torch.randn(16, 16 // groups, 3, 3).requires_grad_(), torch.randn(16).requires_grad_()
    mask = torch.zeros(samples, 1, 5, 5, dtype=torch.float32 if kind == "gate" else torch.bool)
    operands = [x, weight, bias, *([mask.requires_grad_()] if kind == "gate" else [])]
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        result = masked_conv2d(x, weight, bias, 1, 1, 1, groups, mask=ActiveSites(mask) if kind == "sites" else mask)
        grads = torch.autograd.grad(result.sum(), operands)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (result, *grads):
        assert torch.equal(tensor, torch.zeros_like(tensor))
