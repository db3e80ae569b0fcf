"""The CPU backend's kernels: what holds for all of them."""

import itertools

import pytest
import torch
from conftest import can_raise
from numba import carray, njit

from dynconv import ActiveSites, execution, masked_conv2d, reference
from dynconv.cpu import _threads
from dynconv.ops._common import Counted, settle


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


@pytest.mark.parametrize("channels", [1, 3, 16, 4097])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "gelu", "hardswish"])
def test_a_dense_result_is_settled_in_one_pass(activation, channels):
    """The dense way: gate, shortcut and activation at the active sites, and nothing of the others, whatever it is."""
    torch.manual_seed(channels)
    for dtype, has_gate, has_residual, has_inactive, has_out in itertools.product(
        (torch.float32, torch.float64), *4 * [(False, True)]
    ):
        if has_out and has_inactive:
            continue
        like = {"dtype": dtype}
        result, residual, inactive, out = (
            torch.randn(2, channels, 3, 5, **like).contiguous(memory_format=torch.channels_last) for _ in range(4)
        )
        bytes_ = torch.randint(0, 3, (2, 1, 3, 5), dtype=torch.uint8)  # any but zero is true
        mask = bytes_.view(torch.bool)
        gate = torch.rand(2, 1, 3, 5, **like)
        is_active = bytes_ != 0
        poisoned = torch.where(is_active, result, float("nan")).contiguous(memory_format=torch.channels_last)
        expected = result * (gate if has_gate else 1) + (residual if has_residual else 0)
        expected = reference.ACTIVATIONS[activation](expected)
        skipped = out if has_out else inactive if has_inactive else torch.zeros_like(out)
        expected, before = torch.where(is_active, expected, skipped), out.clone()
        chosen = zip((has_gate, has_residual, has_inactive), (gate, residual, inactive), strict=True)
        operands = [operand if has else None for has, operand in chosen]
        sites = Counted(mask, int(is_active.sum()))
        actual = settle(poisoned, sites, *operands, activation, out if has_out else None)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert (actual is out) == has_out and torch.equal(
            torch.where(is_active, 0, out), torch.where(is_active, 0, before)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "hardswish"])
def test_activations_far_out(activation, dtype):
    """Up to the type's ends, where an exponential is zero or infinite, NaN and infinities as well: as PyTorch."""
    most = torch.finfo(dtype).max / 8  # which PyTorch's hard-swish multiplies by 6
    far = [30.0, 86.5, 87.5, 88.5, 89.0, 104.0, 1e3, 1e10, 1e30, most, float("inf")]
    x = torch.tensor([*far, *[-v for v in far], 0.0, float("nan")], dtype=dtype).view(1, 1, 1, -1)
    mask, weight = torch.ones_like(x, dtype=torch.bool), torch.ones(1, 1, 1, 1, dtype=dtype)
    expected = reference.ACTIVATIONS[activation](x)
    if activation == "gelu":  # PyTorch's vectors make NaN of an infinity, its scalars do not
        expected[x == float("inf")] = float("inf")
    mask[..., -2] = False  # one is skipped, so that the dense way, too, has the kernel's activation
    expected[..., -2] = 0
    for way in ("sparse", "dense"):
        with execution(way), torch.no_grad():
            actual = masked_conv2d(x, weight, mask=mask, activation=activation)
        if activation == "gelu":
            actual[x == float("inf")] = float("inf")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
