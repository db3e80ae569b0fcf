"""The Triton launchers against plain dense formulations: interpreted on CPU tensors where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynconv import kernels

compaction, masked_conv = kernels.compaction, kernels.masked_conv

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NOT_A_SITE = 2**31 - 1  # a kernel that used it would read outside every tensor here


def dtypes(*selected):
    broken = "bfloat16 dot products are broken in Triton's interpreter; the compile gate builds them"
    skip = pytest.mark.skipif(not ON_GPU, reason=broken)
    return [pytest.param(dtype, id=str(dtype)[6:], marks=skip if dtype == torch.bfloat16 else ()) for dtype in selected]


def integers(*shape, dtype=torch.float32, low=-2, high=3, seed=0):
    """Small integers: every sum below is exact in any order, so the results have to be equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def random_mask(*shape, density=0.4):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) < density).to(DEVICE)


class Case:
    """Operands of one masked convolution, and its dense results in fp64."""

    def __init__(
        self, n=2, cin=5, cout=7, size=(6, 7), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
        density=0.4, gated=True, dtype=torch.float32,
    ):  # fmt: skip
        self.geometry = dict(stride=stride, padding=padding, dilation=dilation)
        self.size, self.kernel, self.dtype = size, kernel, dtype
        self.input = channels_last(integers(n, cin, *size, dtype=dtype))
        self.weight = integers(cout, cin, *kernel, dtype=dtype, seed=1)
        self.bias = integers(cout, dtype=dtype, seed=2)
        shape = F.conv2d(self.input.double(), self.weight.double(), None, stride, padding, dilation).shape
        self.mask = random_mask(n, 1, *shape[2:], density=density)
        self.gate = integers(n, 1, *shape[2:], dtype=dtype, low=1, seed=3) if gated else None
        self.grad = channels_last(integers(*shape, dtype=dtype, seed=4))
        self.shape = shape
        self.index, self.count = compaction.compact(self.mask)
        self.index[self.count.item() :] = NOT_A_SITE

    def expected(self, cache):
        """output, and the gradients of input, weight, bias and gate (without a gate: of a gate of ones)."""
        input, weight, bias = (t.double().requires_grad_() for t in (self.input, self.weight, self.bias))
        gate = torch.ones_like(self.mask, dtype=torch.double) if self.gate is None else self.gate.double()
        gate.requires_grad_()
        result = F.conv2d(input, weight, bias, **self.geometry) * gate
        output = torch.where(self.mask, result, cache.double())
        return [output.detach(), *torch.autograd.grad(output, (input, weight, bias, gate), self.grad.double())]

    def actual(self, out, allow_tf32=False):
        gate = None if self.gate is None else self.gate.flatten()
        common = dict(**self.geometry, allow_tf32=allow_tf32)
        masked_conv.forward(self.input, self.weight, self.bias, self.index, self.count, gate, out, **common)
        geometry = (self.kernel, *self.geometry.values())
        touched = compaction.touched(self.mask, tuple(self.shape[2:]), self.size, *geometry)
        pixels, pixel_count = compaction.compact(touched)
        pixels[pixel_count.item() :] = NOT_A_SITE
        inverse = compaction.inverse_map(self.index, self.count, self.mask.numel())
        grad_input = torch.zeros_like(self.input)
        masked_conv.input_grad(
            self.grad, self.weight, inverse, pixels, pixel_count, gate, grad_input, **common
        )  # fmt: skip
        sites = (self.index, self.count)
        return [
            out,
            grad_input,
            masked_conv.weight_grad(self.input, self.grad, *sites, gate, self.weight, **common),
            masked_conv.bias_grad(self.grad, *sites, gate),
            masked_conv.gate_grad(self.input, self.weight, self.bias, self.grad, *sites, **common).view_as(self.mask),
        ]

    def check(self):
        cache = channels_last(integers(*self.shape, dtype=self.dtype, seed=5))
        expected = self.expected(cache)
        actual = self.actual(cache.clone())
        names = ("output", "input", "weight", "bias", "gate")
        for name, want, have in zip(names, expected, actual, strict=True):
            assert have.shape == want.shape, name
            assert torch.equal(have.double(), want), f"{name}: {(have.double() - want).abs().max()} apart"


GEOMETRIES = {
    "3x3": dict(),
    "1x1": dict(kernel=(1, 1), padding=(0, 0), cin=33, cout=17),
    "no_padding": dict(padding=(0, 0)),
    "uneven_kernel": dict(kernel=(2, 3), padding=(0, 1)),
    "stride_2": dict(stride=(2, 2)),
    "stride_3_over_2x2": dict(stride=(3, 3), kernel=(2, 2), padding=(0, 0)),
    "uneven": dict(stride=(2, 1), padding=(0, 2), dilation=(2, 1), size=(9, 6)),
    "stride_and_dilation": dict(stride=(2, 3), dilation=(3, 2), padding=(3, 2)),
    "more_taps_than_bits": dict(kernel=(7, 5), padding=(3, 2), n=1, cin=2, cout=3),
    "kernel_larger_than_image": dict(kernel=(5, 5), padding=(2, 2), size=(2, 3)),
    "one_channel": dict(cin=1, cout=1),
    "one_pixel": dict(size=(1, 1), n=3),
    "aligned": dict(cin=16, cout=32),
    "rows_of_8": dict(cin=24, cout=8),
    "steps_and_tiles": dict(cin=70, cout=130, n=1, size=(4, 4)),
    "several_tiles_of_sites": dict(n=3, size=(9, 11), cin=3, cout=2, density=0.6),
}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_dense(name, gated):
    Case(**GEOMETRIES[name], gated=gated).check()


@pytest.mark.parametrize("name", ["3x3", "uneven", "one_channel", "aligned"])
@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float16, torch.bfloat16))
def test_equals_dense_in(dtype, name):
    # Halves: products are at most 4 and gates 2, so sums stay below the 256 up to which bf16 holds every integer
    # as long as there are few of them; GEOMETRIES has at most 16 * 9 terms, of mean zero.
    if dtype == torch.bfloat16 and name == "aligned":
        pytest.skip("sums of 144 products leave the integers that bfloat16 holds")
    Case(**GEOMETRIES[name], dtype=dtype).check()


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["empty", "full"])
@pytest.mark.parametrize("name", ["3x3", "stride_2"])
def test_mask(name, density):
    Case(**GEOMETRIES[name], density=density).check()


def test_empty_sample():
    case = Case(n=3)
    case.mask[1] = False
    case.index, case.count = compaction.compact(case.mask)
    case.check()


def test_no_samples():
    index, count = compaction.compact(torch.zeros(0, 1, 4, 4, dtype=torch.bool, device=DEVICE))
    assert index.shape == (0,)
    assert count.item() == 0
    input, weight = torch.zeros(0, 3, 4, 4, device=DEVICE), torch.ones(2, 3, 3, 3, device=DEVICE)
    grad = out = torch.zeros(0, 2, 4, 4, device=DEVICE)
    common = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), allow_tf32=False)
    masked_conv.forward(input, weight, None, index, count, None, out, **common)
    masked_conv.input_grad(grad, weight, index, index, count, None, input, **common)
    assert torch.equal(
        masked_conv.weight_grad(input, grad, index, count, None, weight, **common), torch.zeros_like(weight)
    )
    assert torch.equal(masked_conv.bias_grad(grad, index, count, None), torch.zeros(2, device=DEVICE))
    assert masked_conv.gate_grad(input, weight, None, grad, index, count, **common).shape == (0,)
    assert compaction.touched(torch.zeros(0, 1, 4, 4, dtype=torch.bool, device=DEVICE), (4, 4), (4, 4),
                              (3, 3), (1, 1), (1, 1), (1, 1)).shape == (0, 1, 4, 4)  # fmt: skip


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride_1", "stride_2"])
def test_what_only_skipped_sites_use_is_not_read(stride):
    case = Case(stride=stride, density=0.15, size=(9, 9))
    clean = case.actual(torch.zeros_like(case.grad))
    geometry = (tuple(case.shape[2:]), case.size, case.kernel, *case.geometry.values())
    touched = compaction.touched(case.mask, *geometry)
    assert not touched.all()
    poison = float("nan")
    case.input = torch.where(touched, case.input, poison)
    case.grad = channels_last(torch.where(case.mask, case.grad, poison))
    case.gate = torch.where(case.mask, case.gate, poison)
    poisoned = case.actual(torch.zeros_like(case.grad).masked_fill_(case.mask.logical_not(), 0))
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every_other"])
def test_weight_layout(layout):
    case = Case()
    weight = case.weight
    if layout == "channels_last":
        case.weight = channels_last(weight)
    elif layout == "transposed":
        case.weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        case.weight = weight.repeat_interleave(2, 1)[:, ::2]
        assert not case.weight.is_contiguous()
    case.check()
    result = case.actual(torch.zeros_like(case.grad))[2]
    assert result.stride() == torch.empty_like(case.weight).stride()


def test_gate_in_fp32_over_halves():
    case = Case(dtype=torch.float16)
    case.gate = case.gate.float()
    case.check()


def test_same_bits_every_time():
    case = Case(n=3, cin=20, cout=20)
    case.input = channels_last(torch.randn(case.input.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    first, second = (case.actual(torch.zeros_like(case.grad)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_written_before_it_is_read():
    """PyTorch's deterministic mode fills what torch.empty returns with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        Case(n=1, density=0.1).check()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", dtypes(torch.float16, torch.float32, torch.bfloat16))
def test_rounding(dtype):
    """Forward on random numbers, within the bound for sums in fp32 and one rounding to dtype.

    Products of halves are exact in fp32. A sum of K of them, in any order, is off by at most K u32 S, where S is the
    sum of their absolute values (fp32 rounds the products too: (K + 1) u32 S). The result is then rounded to dtype.
    """
    case = Case(cin=40, gated=False, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    case.input = channels_last(torch.randn(case.input.shape, generator=generator).to(DEVICE, dtype))
    case.weight = torch.randn(case.weight.shape, generator=generator).to(DEVICE, dtype)
    out = torch.zeros_like(case.grad)
    masked_conv.forward(
        case.input, case.weight, None, case.index, case.count, None, out, **case.geometry, allow_tf32=False
    )
    exact = F.conv2d(case.input.double(), case.weight.double(), None, **case.geometry)
    magnitude = F.conv2d(case.input.double().abs(), case.weight.double().abs(), None, **case.geometry)
    summation = (case.weight[0].numel() + 1) * 2.0**-24 * magnitude
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + summation)
    assert ((out.double() - exact).abs() <= summation + rounding)[case.mask.expand_as(out)].all()
    assert (out[~case.mask.expand_as(out)] == 0).all()


@pytest.mark.parametrize("shape", [(1,), (37,), (2, 1, 9, 5), (3 * compaction.SCAN_BLOCK + 16,)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_compact(shape, density):
    mask = random_mask(*shape, density=density)
    index, count = compaction.compact(mask)
    expected = mask.flatten().nonzero().flatten().int()
    assert index.dtype == count.dtype == torch.int32
    assert index.shape == (mask.numel(),)
    assert count.tolist() == [len(expected)]
    assert torch.equal(index[: len(expected)], expected)


def test_compact_adds_up_more_blocks_than_a_chunk(monkeypatch):
    monkeypatch.setattr(compaction, "SCAN_BLOCK", 16)
    monkeypatch.setattr(compaction, "CHUNK", 16)
    test_compact((16 * 40 + 5,), 0.5)


def test_inverse_map():
    mask = random_mask(3, 1, 20, 21)
    index, count = compaction.compact(mask)
    index[count.item() :] = NOT_A_SITE
    inverse = compaction.inverse_map(index, count, mask.numel())
    expected = torch.where(mask.flatten(), mask.flatten().cumsum(0) - 1, -1)
    assert torch.equal(inverse, expected.int())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_touched(name):
    case = Case(**(GEOMETRIES[name] | {"density": 0.1}))
    geometry = (case.kernel, *case.geometry.values())
    actual = compaction.touched(case.mask, tuple(case.shape[2:]), case.size, *geometry)
    pixels = torch.zeros(len(case.mask), 1, *case.size, device=DEVICE, requires_grad=True)
    ones = torch.ones(1, 1, *case.kernel, device=DEVICE)
    F.conv2d(pixels, ones, None, **case.geometry).backward(case.mask.float())
    assert actual.dtype == torch.bool
    assert torch.equal(actual, pixels.grad > 0)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=300, deadline=None)
def test_divisor(size, dividend):
    _, multiplier, shift = kernels._common.divisor(size)
    high = (multiplier % 2**32) * dividend >> 32
    assert high + dividend < 2**32
    assert (high + dividend) >> shift == dividend // size


@pytest.mark.parametrize("arch", masked_conv.CONV_TILES)
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee", "double"])
def test_config_of_any_width(arch, kind):
    for channels in (1, 3, 16, 17, 24, 64, 96, 100, 512):
        for filters in (1, 3, 16, 24, 64, 65, 128, 512):
            tile = masked_conv.config(kind, channels, filters, arch)
            assert tile["BLOCK_N"] >= min(filters, 64)
            assert 16 <= tile["BLOCK_K"] <= max(16, 2 * channels)
            tile = masked_conv.weight_grad_config(kind, channels, filters, arch)
            assert min(tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]) >= 16
