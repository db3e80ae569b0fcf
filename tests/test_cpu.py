"""The CPU backend's kernels: what holds for all of them."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import can_raise

from dynconv import ActiveSites, execution, masked_conv2d, reference
from dynconv.cpu import _threads
from dynconv.cpu._layout import Compute, Flag, Int32, Result, Storage, UInt8
from dynconv.cpu._threads import next_item, next_worker
from dynconv.cpu.llvm.elements import is_given, load
from dynconv.ops._common import Counted, settle


def _divide(divided, divisor, quotient: Result):
    quotient[0] = divided // divisor


def _refuse(number):
    if number == 0:
        raise ValueError("zero")


@pytest.fixture
def compile_kernel(monkeypatch):
    """Run a kernel; what was compiled for it, which leaves no trace."""
    monkeypatch.setattr(_threads, "KERNELS", {})

    def compiled(body, **arguments):
        run = _threads.kernel(body)
        run(torch.float32, 1, **arguments)
        (of_types,) = _threads.KERNELS.values()
        return of_types[torch.float32]

    return compiled


def test_a_division_in_a_kernel_cannot_raise(compile_kernel):
    assert not can_raise(compile_kernel(_divide, divided=1, divisor=0, quotient=0))


def test_what_raises_in_a_kernel_is_found(compile_kernel):
    assert can_raise(compile_kernel(_refuse, number=1))


def test_what_a_kernel_raises_reaches_pytest(compile_kernel, monkeypatch):
    caught = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: caught.append(what.exc_type))
    compile_kernel(_refuse, number=0)
    assert caught == [ValueError]


class _Pair(NamedTuple):
    first: int
    second: Int32


def _everything(
    shared, storage, compute, bytes_: UInt8, values: Storage, sums: Compute, pair: _Pair, none: Int32, flag: Flag,
    number, written: Result,
):  # fmt: skip
    """All that a layout knows, and the counters: what is seen of each, in `sums`."""
    item, worker = next_item(shared), next_worker(shared)
    sums[0], sums[1] = item + 10 * next_item(shared), worker
    sums[2], sums[3] = np.float64(bytes_[1]), load(values, 2, compute)
    sums[4], sums[5] = pair.first, pair.second[0]
    sums[6], sums[7], sums[8] = is_given(none), flag, number
    written[0] = number + 1


def test_a_kernel_sees_its_parameters_by_name(monkeypatch):
    monkeypatch.setattr(_threads, "KERNELS", {})
    run, sums, index = _threads.kernel(_everything), torch.full((9,), -1.0), torch.tensor([5], dtype=torch.int32)
    values = torch.tensor([0, 0, 3.5], dtype=torch.bfloat16)
    operands = {"bytes_": torch.tensor([0, 2], dtype=torch.uint8), "values": values, "sums": sums, "none": None}
    numbers = run.pack(pair=(4, index.data_ptr()), flag=True, number=8, written=0, **operands)
    run.start(torch.bfloat16, 1, numbers)
    assert sums.tolist() == [10, 0, 2, 3.5, 4, 5, 0, 1, 8]
    assert numbers[run.at.written] == 9 and numbers[run.at.number] == 8
    assert (numbers[run.at.first], numbers[run.at.second]) == (4, index.data_ptr())
    assert len(numbers) == 2 + 9  # the counters, and a place for each field of the pair


@pytest.mark.parametrize(
    "change, said",
    [
        ({"number": None}, "missing 1 required keyword-only argument: 'number'"),
        ({"other": 1}, "unexpected keyword argument 'other'"),
        ({"pair": (1, 2, 3)}, "_everything: expected 11 numbers, got 12"),
    ],
)
@pytest.mark.parametrize("how", ["pack", "run"])
def test_a_kernel_refuses_wrong_names(how, change, said, monkeypatch):
    monkeypatch.setattr(_threads, "KERNELS", {})
    run = _threads.kernel(_everything)
    call = run.pack if how == "pack" else functools.partial(run, torch.float32, 1)
    operands = dict.fromkeys(("bytes_", "values", "sums", "none"))
    given = {**operands, "pair": (0, 0), "flag": False, "number": 0, "written": 0, **change}
    with pytest.raises(TypeError, match=said):
        call(**{name: value for name, value in given.items() if (name, value) != ("number", None)})


def test_a_layout_has_every_name_once(monkeypatch):
    monkeypatch.setattr(_threads, "KERNELS", {})

    def twice(first, pair: _Pair): ...

    with pytest.raises(TypeError, match=r"twice: expected every name once, got \['first', 'first', 'second'\]"):
        _threads.kernel(twice)


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
