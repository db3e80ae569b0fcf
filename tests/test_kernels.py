"""The Triton launchers against plain dense formulations: interpreted on CPU tensors where there is no GPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynconv import kernels

compaction, epilogue, masked_conv = kernels.compaction, kernels.epilogue, kernels.masked_conv

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NOT_A_SITE = 2**31 - 1  # a kernel that used it would read outside every tensor here


def dtypes(*selected):
    broken = "bfloat16 is broken in Triton's interpreter (products, rounding); the compile gate builds the kernels"
    skip = pytest.mark.skipif(not ON_GPU, reason=broken)
    return [pytest.param(dtype, id=str(dtype)[6:], marks=skip if dtype == torch.bfloat16 else ()) for dtype in selected]


def integers(*shape, dtype=torch.float32, low=-2, high=3, seed=0):
    """Small integers: every sum below is exact in any order, so the results have to be equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def random_mask(*shape, density=0.4):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) < density).to(DEVICE)


def pack(dense, index, count, spare=2):
    """Packed rows of the listed sites, and a few more: what lies past count is not to be used."""
    rows = torch.full((count.item() + spare, dense.shape[1]), torch.nan, dtype=dense.dtype, device=DEVICE)
    rows[: count.item()] = dense.permute(0, 2, 3, 1).flatten(0, 2)[index[: count.item()]]
    return rows


def unpack(rows, index, count, background):
    """background with the packed rows at their sites. Rows past count have to be zeros."""
    assert (rows[count.item() :] == 0).all()
    dense = background.permute(0, 2, 3, 1).flatten(0, 2).clone()
    dense[index[: count.item()]] = rows[: count.item()]
    n, _, height, width = background.shape
    return channels_last(dense.view(n, height, width, rows.shape[1]).permute(0, 3, 1, 2))


def active_set(mask):
    _, index, count, _ = compaction.compact(mask)
    index[count.item() :] = NOT_A_SITE
    return index, count


EXACT = ("none", "relu", "relu6")
ACTIVATIONS = {
    "none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
}  # fmt: skip


def assert_rounded(have, want, bound):
    """have is the fp64 want, off by bound at most and then rounded to have's dtype."""
    info = torch.finfo(have.dtype)
    rounding = info.eps / 2 * (want.abs() + bound) + info.smallest_normal * info.eps
    assert ((have.double() - want).abs() <= bound + rounding).all()


def activation_error(x, value, name, dtype):
    """Bound on the error of `activate` at the exact x, before rounding: u is the accumulator's unit roundoff.

    exp(-x) is 2**(-x log2(e)) with a rounded exponent, and 2 u off itself: (|x| + 3) u, relatively, and silu takes it
    over with two roundings more. gelu is a product with 1 + erf, which is 4 u off absolutely (erf is 2 u off), with two
    roundings more. hardswish ends in a division, which a GPU may get 2 ulp wrong.
    """
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    return (
        u
        * {
            "silu": (x.abs() + 6) * value.abs(),
            "gelu": 4 * x.abs() + 4 * value.abs(),
            "hardswish": 4 * value.abs() if ON_GPU else torch.zeros_like(value),
        }[name]
    )


class Case:
    """Operands of one masked convolution, and its dense results in fp64.

    `packed` names what is packed: "", "input", "output" or "input+output". The grad goes with the output. A packed
    input has rows for some pixels only; the others count as zero.
    """

    def __init__(
        self, n=2, cin=5, cout=7, size=(6, 7), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
        groups=1, density=0.4, gated=True, packed="", residual=False, activation="none", dtype=torch.float32,
    ):  # fmt: skip
        self.geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        self.size, self.kernel, self.dtype, self.activation = size, kernel, dtype, activation
        self.input = channels_last(integers(n, cin, *size, dtype=dtype))
        self.weight = integers(cout, cin // groups, *kernel, dtype=dtype, seed=1)
        self.bias = integers(cout, dtype=dtype, seed=2)
        shape = F.conv2d(self.input.double(), self.weight.double(), None, **self.geometry).shape
        self.mask = random_mask(n, 1, *shape[2:], density=density)
        self.gate = integers(n, 1, *shape[2:], dtype=dtype, low=1, seed=3) if gated else None
        self.grad = channels_last(integers(*shape, dtype=dtype, seed=4))
        self.cache = channels_last(integers(*shape, dtype=dtype, seed=5))
        self.residual = channels_last(integers(*shape, dtype=dtype, low=-9, high=9, seed=6)) if residual else None
        self.shape = shape
        self.sites = active_set(self.mask)
        self.input_is_packed, self.output_is_packed = "input" in packed, "output" in packed
        if self.input_is_packed:
            present = random_mask(n, 1, *size, density=0.7)
            self.input = channels_last(self.input * present)
            self.pixels = active_set(present)

    def expected_output(self, background):
        """Also the input of the activation, from which the bound of its error is derived."""
        result = F.conv2d(self.input.double(), self.weight.double(), self.bias.double(), **self.geometry)
        if self.gate is not None:
            result = result * self.gate.double()
        if self.residual is not None:
            result = result + self.residual.double()
        return torch.where(self.mask, ACTIVATIONS[self.activation](result), background.double()), result

    def expected_grads(self):
        """Of gate * (conv + bias) by input, weight, bias and gate; without a gate, by a gate of ones."""
        input, weight, bias = (t.double().requires_grad_() for t in (self.input, self.weight, self.bias))
        gate = torch.ones_like(self.mask, dtype=torch.double) if self.gate is None else self.gate.double()
        gate.requires_grad_()
        result = torch.where(self.mask, F.conv2d(input, weight, bias, **self.geometry) * gate, 0.0)
        grads = list(torch.autograd.grad(result, (input, weight, bias, gate), self.grad.double()))
        if self.input_is_packed:  # the other pixels have no row
            grads[0] = grads[0] * (self.input_lookup() >= 0).view(len(grads[0]), 1, *self.size)
        return grads

    def input_lookup(self):
        return compaction.inverse_map(*self.pixels, len(self.input) * self.size[0] * self.size[1])

    def packed_operands(self):
        """input, lookup, grad and residual as the launchers take them."""
        input, lookup, grad, residual = self.input, None, self.grad, self.residual
        if self.input_is_packed:
            input, lookup = pack(input, *self.pixels), self.input_lookup()
        if self.output_is_packed:
            grad = pack(grad, *self.sites)
            residual = None if residual is None else pack(residual, *self.sites)
        return input, lookup, grad, residual

    def common(self):
        return dict(input_size=self.size, site_size=tuple(self.shape[2:]), **self.geometry, allow_tf32=False)

    def actual_output(self, aliased=False):
        input, lookup, grad, residual = self.packed_operands()
        out = residual if aliased else torch.full_like(grad, torch.nan) if self.output_is_packed else self.cache.clone()
        gate = None if self.gate is None else self.gate.flatten()
        masked_conv.forward(
            input, self.weight, self.bias, *self.sites, gate, residual, lookup, out,
            activation=self.activation, **self.common(),
        )  # fmt: skip
        return unpack(out, *self.sites, self.cache) if self.output_is_packed else out

    def actual_grads(self):
        input, lookup, grad, _ = self.packed_operands()
        sites, common = self.sites, self.common()
        gate = None if self.gate is None else self.gate.flatten()
        inverse = compaction.inverse_map(*sites, self.mask.numel())
        pixels = self.pixels if self.input_is_packed else active_set(self.touched())
        grad_input = torch.full_like(input, torch.nan if self.input_is_packed else 0)
        masked_conv.input_grad(grad, self.weight, inverse, *pixels, gate, grad_input, **common)
        if self.input_is_packed:
            grad_input = unpack(grad_input, *pixels, torch.zeros_like(self.input))
        return [
            grad_input,
            masked_conv.weight_grad(input, grad, *sites, gate, lookup, self.weight, **common),
            masked_conv.bias_grad(grad, *sites, gate),
            masked_conv.gate_grad(input, self.weight, self.bias, grad, *sites, lookup, **common).view_as(self.mask),
        ]

    def actual(self):
        return [self.actual_output(), *self.actual_grads()]

    def touched(self):
        return compaction.compact(self.mask, reads=self.reads(), with_mask=True).mask

    def reads(self):
        where = (self.geometry[name] for name in ("stride", "padding", "dilation"))
        return compaction.Reads(self.size, self.kernel, *where)

    def check(self):
        self.check_output()
        names = ("input", "weight", "bias", "gate")
        for name, want, have in zip(names, self.expected_grads(), self.actual_grads(), strict=True):
            assert have.shape == want.shape, name
            assert torch.equal(have.double(), want), f"{name}: {(have.double() - want).abs().max()} apart"

    def check_output(self, aliased=False):
        background = self.residual if aliased and not self.output_is_packed else self.cache
        want, x = self.expected_output(background.clone())
        have = self.actual_output(aliased)
        if self.activation in EXACT:
            assert torch.equal(have.double(), want), f"{(have.double() - want).abs().max()} apart"
        else:
            assert torch.equal(have[~self.mask.expand_as(have)], background[~self.mask.expand_as(have)])
            assert_rounded(have, want, activation_error(x, want, self.activation, self.dtype))


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


# Products of matrices by group, and the stencil that takes over where a group has one channel each way.
GROUPS = {
    "groups_of_3_to_2": dict(cin=6, cout=4, groups=2),
    "groups_of_1_to_2": dict(cin=3, cout=6, groups=3, n=1),
    "groups_of_2_to_1": dict(cin=6, cout=3, groups=3, n=1),
    "groups_of_16": dict(cin=48, cout=48, groups=3, n=1, size=(4, 5)),
    "groups_of_several_tiles": dict(cin=40, cout=140, groups=2, n=1, size=(3, 3)),
    "depthwise": dict(cin=7, cout=7, groups=7),
    "depthwise_aligned": dict(cin=16, cout=16, groups=16, n=1),
    "depthwise_of_several_tiles": dict(cin=70, cout=70, groups=70, n=1, size=(5, 5)),
    "depthwise_many_taps": dict(cin=3, cout=3, groups=3, kernel=(5, 7), padding=(2, 3), n=1),
    "depthwise_several_tiles_of_sites": dict(cin=17, cout=17, groups=17, n=1, size=(7, 9), density=0.8),
}
PACKED = ("input", "output", "input+output")


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_dense(name, gated):
    Case(**GEOMETRIES[name], gated=gated).check()


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name):
    Case(**GROUPS[name]).check()


@pytest.mark.parametrize("channels", [dict(cin=4, cout=6, groups=2), dict(cin=4, cout=4, groups=4)],
                         ids=["groups_of_2", "depthwise"])  # fmt: skip
@pytest.mark.parametrize("name", ["1x1", "stride_2", "uneven", "stride_and_dilation", "kernel_larger_than_image"])
def test_groups_of_any_geometry(name, channels):
    Case(**(GEOMETRIES[name] | channels)).check()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["3x3", "1x1", "stride_2", "uneven", "stride_and_dilation", "more_taps_than_bits",
                                  "one_channel", "steps_and_tiles", "several_tiles_of_sites"])  # fmt: skip
def test_packed(name, packed):
    Case(**GEOMETRIES[name], packed=packed).check()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", GROUPS)
def test_packed_groups(name, packed):
    Case(**GROUPS[name], packed=packed, gated=packed == "input").check()


@pytest.mark.parametrize("channels", [dict(cin=32, cout=48, groups=2), dict(cin=7, cout=7, groups=7)],
                         ids=["groups_of_16", "depthwise"])  # fmt: skip
@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float16))
def test_groups_in(dtype, channels):
    Case(**channels, n=1, dtype=dtype).check()


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["stride_2", "uneven", "stride_and_dilation"])
def test_packed_depthwise_of_any_geometry(name, packed):
    Case(**GEOMETRIES[name] | dict(cin=4, cout=4, groups=4), packed=packed, gated=False).check()


@pytest.mark.parametrize("channels", [dict(), dict(cin=6, cout=4, groups=2), dict(cin=7, cout=7, groups=7)],
                         ids=["plain", "groups", "depthwise"])  # fmt: skip
@pytest.mark.parametrize("packed", ["", *PACKED], ids=["dense", *PACKED])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_of_forward(activation, packed, channels):
    case = Case(**channels, packed=packed, residual=True, activation=activation, n=1)
    case.check_output()
    case.check_output(aliased=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_without_residual_or_gate(activation):
    Case(activation=activation, gated=False).check_output()


@pytest.mark.parametrize("channels", [dict(), dict(cin=7, cout=7, groups=7)], ids=["plain", "depthwise"])
@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_of_forward_in(activation, dtype, channels):
    # 45 products of at most 4, mean zero, times a gate of at most 2: within the integers that bfloat16 holds.
    case = Case(**channels, packed="input+output", residual=True, activation=activation, dtype=dtype, n=1)
    case.check_output()


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", "hardswish"])
def test_activation_of_nan(activation):
    case = Case(activation=activation, gated=False, density=1.0)
    case.input.fill_(torch.nan)
    assert case.actual_output().isnan().all()


@pytest.mark.parametrize("name", ["3x3", "uneven", "one_channel", "aligned"])
@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float16, torch.bfloat16))
def test_equals_dense_in(dtype, name):
    # Halves: products are at most 4 and gates 2, so sums stay below the 256 up to which bf16 holds every integer
    # as long as there are few of them; GEOMETRIES has at most 16 * 9 terms, of mean zero.
    if dtype == torch.bfloat16 and name == "aligned":
        pytest.skip("sums of 144 products leave the integers that bfloat16 holds")
    Case(**GEOMETRIES[name], dtype=dtype).check()


@pytest.mark.parametrize("packed", ["", "input+output"], ids=["dense", "packed"])
@pytest.mark.parametrize("density", [0.0, 1.0], ids=["empty", "full"])
@pytest.mark.parametrize("name", ["3x3", "stride_2", "depthwise"])
def test_mask(name, density, packed):
    Case(**((GEOMETRIES | GROUPS)[name] | dict(density=density)), packed=packed).check()


@pytest.mark.parametrize("packed", ["", "input+output"], ids=["dense", "packed"])
@pytest.mark.parametrize("channels", [dict(), dict(cin=7, cout=7, groups=7)], ids=["plain", "depthwise"])
def test_empty_sample(channels, packed):
    case = Case(**channels, n=3, packed=packed)
    case.mask[1] = False
    case.sites = active_set(case.mask)
    case.check()


@pytest.mark.parametrize("channels", [dict(), dict(cin=7, cout=7, groups=7)], ids=["plain", "depthwise"])
def test_empty_packed_input(channels):
    """No pixel has a row: the output is the bias, and the weight gets no gradient."""
    case = Case(**channels, packed="input+output")
    case.input.zero_()
    case.pixels = active_set(torch.zeros(len(case.input), 1, *case.size, dtype=torch.bool, device=DEVICE))
    case.check()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("groups", [1, 3], ids=["plain", "depthwise"])
def test_no_samples(groups, packed):
    nothing = torch.zeros(0, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    _, index, count, _ = compaction.compact(nothing)
    assert index.shape == (0,)
    assert count.item() == 0
    shape = (0, 3) if packed else (0, 3, 4, 4)
    input, grad, out = (torch.zeros(shape, device=DEVICE) for _ in range(3))
    weight = torch.ones(3, 3 // groups, 3, 3, device=DEVICE)
    common = dict(input_size=(4, 4), site_size=(4, 4), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    common |= dict(groups=groups, allow_tf32=False)
    lookup = index if packed else None
    masked_conv.forward(input, weight, None, index, count, None, None, lookup, out, activation="none", **common)
    masked_conv.input_grad(grad, weight, index, index, count, None, input, **common)
    assert torch.equal(
        masked_conv.weight_grad(input, grad, index, count, None, lookup, weight, **common), torch.zeros_like(weight)
    )
    assert torch.equal(masked_conv.bias_grad(grad, index, count, None), torch.zeros(3, device=DEVICE))
    assert masked_conv.gate_grad(input, weight, None, grad, index, count, lookup, **common).shape == (0,)
    reads = compaction.Reads((4, 4), (3, 3), (1, 1), (1, 1), (1, 1))
    assert compaction.compact(nothing, reads=reads, with_mask=True).mask.shape == (0, 1, 4, 4)


@pytest.mark.parametrize("channels", [
    dict(), dict(cin=6, cout=4, groups=2), dict(cin=7, cout=7, groups=7),
    dict(cin=3, cout=3, groups=3, kernel=(3, 5), density=0.05),
], ids=["plain", "groups", "depthwise", "wide_depthwise"])  # fmt: skip
@pytest.mark.parametrize("packed", ["", "input"], ids=["dense", "packed"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["stride_1", "stride_2"])
def test_what_only_skipped_sites_use_is_not_read(stride, packed, channels):
    case = Case(**dict(density=0.15) | channels, stride=stride, size=(9, 9), packed=packed, residual=True, n=1)
    clean = case.actual()
    touched = case.touched()
    assert not touched.all()
    case.input = torch.where(touched, case.input, torch.nan)
    case.grad = channels_last(torch.where(case.mask, case.grad, torch.nan))
    case.residual = channels_last(torch.where(case.mask, case.residual, torch.nan))
    case.gate = torch.where(case.mask, case.gate, torch.nan)
    for before, after in zip(clean, case.actual(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every_other"])
@pytest.mark.parametrize("channels", [dict(), dict(cin=6, cout=4, groups=2)], ids=["plain", "groups"])
def test_weight_layout(layout, channels):
    case = Case(**channels, n=1)
    weight = case.weight
    if layout == "channels_last":
        case.weight = channels_last(weight)
    elif layout == "transposed":
        case.weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        case.weight = weight.repeat_interleave(2, 1)[:, ::2]
        assert not case.weight.is_contiguous()
    case.check()
    assert case.actual_grads()[1].stride() == torch.empty_like(case.weight).stride()


@pytest.mark.parametrize("stride", [2, 40], ids=["taps_first", "far_apart"])
def test_depthwise_weight_layout(stride):
    case = Case(cin=5, cout=5, groups=5)
    spread = torch.zeros(3, 3, 1, 5 * stride, device=DEVICE)
    spread[..., ::stride] = case.weight.permute(2, 3, 1, 0)
    case.weight = spread[..., ::stride].permute(3, 2, 0, 1)
    case.check()
    assert case.actual_grads()[1].stride() == torch.empty_like(case.weight).stride()


def test_gate_in_fp32_over_halves():
    case = Case(dtype=torch.float16)
    case.gate = case.gate.float()
    case.check()


@pytest.mark.parametrize("groups", [1, 2, 20])
def test_same_bits_every_time(groups):
    case = Case(cin=20, cout=20, groups=groups)
    case.input = channels_last(torch.randn(case.input.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    first, second = (case.actual() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_written_before_it_is_read():
    """PyTorch's deterministic mode fills what torch.empty returns with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        Case(n=1, density=0.1).check()
        Case(n=1, density=0.1, cin=7, groups=7, packed="input+output").check()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def splits(monkeypatch):
    """Sums so short are split, on a GPU of 24 multiprocessors; a list of what is then asked: most splits of a call."""
    asked, most_splits = [], masked_conv.most_splits

    def ask(*arguments):
        asked.append(most_splits(*arguments))
        return asked[-1]

    monkeypatch.setattr(masked_conv, "multiprocessors", lambda device: 24)
    monkeypatch.setattr(masked_conv, "SPLIT_FROM", 16)
    monkeypatch.setattr(masked_conv, "SPLIT_LEAST", 16)
    monkeypatch.setattr(masked_conv, "most_splits", ask)
    return asked


# Those whose sums are long enough in all of forward, input_grad and gate_grad.
SPLIT = {
    "3x3": dict(gated=False),
    "gated": dict(activation="relu6", residual=True),
    "stride_2": dict(stride=(2, 2)),
    "stride_and_dilation": GEOMETRIES["stride_and_dilation"],
    "more_taps_than_bits": GEOMETRIES["more_taps_than_bits"],
    "steps_and_tiles": dict(cin=24, cout=70, size=(3, 4)),
    "aligned": dict(cin=16, cout=32, size=(4, 4)),
    "several_tiles_of_sites": dict(size=(11, 13), cin=4, cout=4, density=0.8),
    "groups": dict(cin=20, cout=24, groups=2),
    "input": dict(packed="input"),
    "output": dict(packed="output", activation="silu", residual=True),
    "input+output": dict(packed="input+output", stride=(2, 1), cin=12, cout=12, groups=2),
    "empty": dict(density=0.0),
    "one_site": dict(density=0.01, size=(5, 9)),
    "full": dict(density=1.0),
    "halves": dict(dtype=torch.float16),
    "doubles": dict(dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPLIT)
def test_split(splits, name):
    case = Case(**dict(n=1) | SPLIT[name])
    case.check()
    assert len(splits) == 3 and min(splits) > 1


@pytest.mark.parametrize("name", ["3x3", "gated", "stride_2", "more_taps_than_bits", "aligned", "input+output"])
@pytest.mark.parametrize("has_splits", [False, True], ids=["whole", "split"])
def test_rows_that_are_loaded_ahead(name, has_splits, request, monkeypatch):
    """The same products in the same order."""
    if has_splits:
        request.getfixturevalue("splits")
    case = Case(**dict(n=1) | SPLIT[name])
    before = case.actual()
    monkeypatch.setattr(masked_conv, "reads_ahead", lambda *_arguments, **_options: True)
    for expected, found in zip(before, case.actual(), strict=True):
        assert torch.equal(expected, found)


def test_tiles_for_many_rows():
    tile = masked_conv.config("half", 128, 128, "sm_90", large=True)
    assert (tile["BLOCK_M"], tile["BLOCK_N"]) == (masked_conv.LARGE_ROWS, 128)
    for others in (dict(packed=True), dict(finished=True), dict(piece=1)):
        small = masked_conv.config("half", 128, 128, "sm_90", **others)
        assert masked_conv.config("half", 128, 128, "sm_90", large=True, **others) == small
    assert masked_conv.reads_ahead("half", masked_conv.config("half", 64, 64, "sm_90"), 9, "sm_90", gated=False)
    assert not masked_conv.reads_ahead("half", tile, 9, "sm_90", gated=False)


@settings(max_examples=20, deadline=None)
@given(
    sites=st.integers(1, 150), share=st.integers(0, 150), channels=st.integers(16, 120), filters=st.integers(1, 70),
    parallel=st.integers(2, 40), least=st.integers(1, 64),
)  # fmt: skip
def test_splits_take_every_product_once(sites, share, channels, filters, parallel, least):
    """Whatever there is of sites, steps and multiprocessors: sums of integers are exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_conv, "multiprocessors", lambda device: parallel)
        patch.setattr(masked_conv, "SPLIT_FROM", 1)
        patch.setattr(masked_conv, "SPLIT_LEAST", least)
        case = Case(n=1, cin=channels, cout=filters, size=(1, sites), kernel=(1, 1), padding=(0, 0), gated=False)
        case.mask = (torch.arange(sites, device=DEVICE) < share).view(1, 1, 1, sites)
        case.sites = active_set(case.mask)
        case.check_output()


@settings(max_examples=200, deadline=None)
@given(steps=st.integers(1, 5000), splits=st.integers(1, 64))
def test_shares_of_steps(steps, splits):
    shares = [kernels._common.split_steps.fn(split, splits, steps) for split in range(splits)]
    assert [step for begin, end in shares for step in range(begin, end)] == list(range(steps))
    lengths = [end - begin for begin, end in shares]
    assert max(lengths) - min(lengths) <= 1


def test_splits_follow_the_tiles():
    """Of what the shapes allow; an H100 has 132."""
    assert masked_conv.most_splits(9 * 512, 196, 132) == 9
    assert masked_conv.most_splits(9 * 256, 264, 132) == 4
    assert masked_conv.most_splits(9 * 128, 8, 132) == 1  # too short
    assert masked_conv.most_splits(9 * 512, 265, 132) == 1  # a quarter of so many tiles is enough


@settings(max_examples=200, deadline=None)
@given(tiles=st.integers(1, 10**6), places=st.integers(1, 1216))
def test_whole_waves(tiles, places):
    splits = masked_conv.whole_waves(tiles, places)
    waves = -(-tiles * splits // places)
    assert splits >= 1 and tiles * splits >= 0.8 * waves * places
    # No smaller number of whole waves is as full.
    for fewer in range(-(-tiles // places), waves):
        assert fewer * places // tiles * tiles < 0.8 * fewer * places


def test_sums_of_splits_have_a_kernel_of_their_own(splits, monkeypatch):
    """What the other tests of splits would not notice: that K is split at all."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    monkeypatch.setattr(masked_conv, "_add_splits_kernel", Nothing())
    case = Case(packed="output")
    assert case.actual_output()[case.mask.expand_as(case.cache)].isnan().all()
    # As many tiles as multiprocessors: each has one split, whose program finishes it.
    monkeypatch.setattr(masked_conv, "multiprocessors", lambda device: 1)
    case.check_output()


def test_splits_give_the_same_bits_every_time(splits):
    case = Case(cin=20, cout=20, n=1, activation="gelu")
    case.input = channels_last(torch.randn(case.input.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    first, second = (case.actual() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_splits_write_their_memory_before_it_is_read(splits):
    torch.use_deterministic_algorithms(True)
    try:
        Case(cin=10, cout=20, n=1).check()
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
        case.input, case.weight, None, *case.sites, None, None, None, out, activation="none", **case.common()
    )  # fmt: skip
    exact = F.conv2d(case.input.double(), case.weight.double(), None, **case.geometry)
    magnitude = F.conv2d(case.input.double().abs(), case.weight.double().abs(), None, **case.geometry)
    summation = (case.weight[0].numel() + 1) * 2.0**-24 * magnitude
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + summation)
    assert ((out.double() - exact).abs() <= summation + rounding)[case.mask.expand_as(out)].all()
    assert (out[~case.mask.expand_as(out)] == 0).all()


@pytest.fixture
def tf32(monkeypatch):
    """Let Triton's interpreter, which multiplies TF32 as float32, cut the operands as tensor cores do: to 10 bits."""
    if ON_GPU:
        return
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    exact = interpreter.InterpreterBuilder.create_dot

    def cut(handle):
        bits = handle.data.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(self, a, b, total, precision, most):
        assert precision == ir.INPUT_PRECISION.TF32
        return exact(self, cut(a), cut(b), total, precision, most)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("groups", [1, 2])
def test_tf32(tf32, groups):
    """Operands of 10 bits after the point, off by 2^-10 each where they are cut; sums in float32. Also, it is TF32."""
    case = Case(cin=40, cout=24, groups=groups, gated=False)
    generator = torch.Generator().manual_seed(0)
    draw = lambda like: torch.randn(like.shape, generator=generator).to(DEVICE)
    case.input, case.grad = channels_last(draw(case.input)), channels_last(draw(case.grad))
    case.weight, case.bias = draw(case.weight), torch.zeros_like(case.bias)
    case.common = lambda: Case.common(case) | dict(allow_tf32=True)
    have = [case.actual_output(), *case.actual_grads()[:2]]
    expected = [case.expected_output(case.cache)[0], *case.expected_grads()[:2]]
    case.input, case.grad, case.weight = case.input.abs(), case.grad.abs(), case.weight.abs()
    # Of the same sums' absolute values; 2^-10 twice, their product, and what float32 rounds.
    magnitude = [case.expected_output(case.cache.abs())[0], *case.expected_grads()[:2]]
    for want, got, most in zip(expected, have, magnitude, strict=True):
        error = (got.double() - want).abs()
        assert (error <= 2.0**-8.9 * most.abs()).all()
        assert error.max() > 2.0**-18 * most.abs().max()  # further than float32 is


class Epilogue:
    """Operands of one epilogue over packed rows, and its dense results in fp64."""

    def __init__(
        self, n=2, channels=5, size=(6, 7), density=0.4, vectors=("mean", "scale", "shift"), gated=True, residual=True,
        packed=False, activation="none", dtype=torch.float32,
    ):  # fmt: skip
        shape = (n, channels, *size)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.activation, self.packed, self.dtype = activation, packed, dtype
        self.mask = random_mask(n, 1, *size, density=density)
        self.sites = active_set(self.mask)
        self.input, self.grad, self.cache = (
            channels_last(integers(*shape, dtype=dtype, low=-3, high=4, seed=seed)) for seed in range(3)
        )
        self.residual = channels_last(integers(*shape, dtype=dtype, low=-4, high=5, seed=3)) if residual else None
        self.gate = integers(n, 1, *size, dtype=dtype, low=1, seed=4) if gated else None
        names = ("mean", "scale", "shift")
        self.vectors = [
            integers(channels, dtype=wide, seed=5 + i) if name in vectors else None for i, name in enumerate(names)
        ]

    def expected(self):
        """(out, its input to the activation), and the gradients of rows, residual, scale, shift and gate.

        Each gradient comes with a bound on its error, which is zero where the slope of the activation is an integer.
        """
        defaults = [torch.zeros(()), torch.ones(()), torch.zeros(())]
        mean, scale, shift = (
            (d if v is None else v).double().to(DEVICE).expand(self.input.shape[1]).view(-1, 1, 1)
            for v, d in zip(self.vectors, defaults, strict=True)
        )
        gate = torch.ones_like(self.mask, dtype=torch.double) if self.gate is None else self.gate.double()
        centred = self.input.double() - mean
        affine = centred * scale + shift
        x = gate * affine + (0 if self.residual is None else self.residual.double())
        x.requires_grad_()
        out = ACTIVATIONS[self.activation](x)
        (slope,) = torch.autograd.grad(out.sum(), x)
        out, x = out.detach(), x.detach()
        zero = torch.zeros((), dtype=torch.double, device=DEVICE)
        grad = torch.where(self.mask, self.grad.double(), zero)
        d = grad * slope
        u = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps / 2
        # d is rounded once; a sum of terms with two more factors, at most len(terms) + 2 times.
        error = grad.abs() * slope_error(x, self.activation, u) + u * d.abs()
        grads = []
        for factor, dims in (
            (gate * scale, None), (torch.ones_like(d), None), (gate * centred, (0, 2, 3)),
            (gate.expand_as(d), (0, 2, 3)), (affine, 1),
        ):  # fmt: skip
            terms, bound = d * factor, error * factor.abs()
            length = 1 if dims is None else d.shape[1] if dims == 1 else int(self.sites[1])
            bound = bound + (length + 2) * u * terms.abs()
            if dims is not None:
                terms, bound = terms.sum(dims), bound.sum(dims)
            grads.append((terms, None if self.activation in EXACT else bound))
        return (torch.where(self.mask, out, self.cache.double()), x), grads

    def actual(self, wanted=(True, True), aliased=False):
        rows = pack(self.input, *self.sites)
        gate = None if self.gate is None else self.gate.flatten()
        out, grad, residual = self.cache.clone(), self.grad, self.residual
        grad_rows, grad_residual = torch.full_like(rows, torch.nan), torch.zeros_like(grad)
        if self.packed:
            grad = pack(grad, *self.sites)
            residual = None if residual is None else pack(residual, *self.sites)
            out, grad_residual = torch.full_like(rows, torch.nan), torch.full_like(rows, torch.nan)
        common = (rows, *self.sites, *self.vectors, gate, residual)
        vectors_and_gate = epilogue.backward(
            grad, *common, grad_rows, grad_residual, activation=self.activation, wanted=wanted
        )
        if aliased:
            out = residual
        epilogue.forward(*common, out, activation=self.activation)
        if self.packed:
            out = unpack(out, *self.sites, self.cache)
            grad_residual = unpack(grad_residual, *self.sites, torch.zeros_like(self.grad))
        return out, [unpack(grad_rows, *self.sites, torch.zeros_like(self.input)), grad_residual, *vectors_and_gate]

    def check(self):
        (want, x), expected = self.expected()
        have, grads = self.actual()
        if self.activation in EXACT:
            assert torch.equal(have.double(), want)
        else:
            assert torch.equal(have[~self.mask.expand_as(have)], self.cache[~self.mask.expand_as(have)])
            assert_rounded(have, want, activation_error(x, want, self.activation, self.dtype))
        names = ("rows", "residual", "scale", "shift", "gate")
        for name, have, (want, bound) in zip(names, grads, expected, strict=True):
            have = have.view_as(want)
            if bound is None:
                assert torch.equal(have.double(), want), f"{name}: {(have.double() - want).abs().max()} apart"
            else:
                assert_rounded(have, want, bound)


def slope_error(x, name, u):
    """Bound on the error of `activation_slope` at the exact x; see activation_error for exp and erf.

    silu: the sigmoid s is (|x| + 4) u off, relatively, which s (1 + x (1 - s)) takes over at most 1 + |x| times.
    gelu: 1 + erf is 4 u off, and x times the density (x^2 / 2 + 5) u, relatively. hardswish: a division and a sum.
    """
    if name == "silu":
        return u * (x.abs() + 8) * (1 + x.abs()) * torch.sigmoid(x)
    if name == "gelu":
        return u * (4 + (x * x / 2 + 6) * x.abs() * torch.exp(-x * x / 2))
    return u * (2 * x.abs() + 2) if name == "hardswish" else torch.zeros_like(x)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, packed):
    Epilogue(activation=activation, packed=packed).check()


@pytest.mark.parametrize("operands", [
    dict(vectors=()), dict(vectors=("mean",)), dict(vectors=("scale",)), dict(vectors=("shift",)), dict(gated=False),
    dict(residual=False), dict(vectors=(), gated=False, residual=False),
], ids=["no_vectors", "mean", "scale", "shift", "no_gate", "no_residual", "nothing"])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_epilogue_without(operands, packed):
    Epilogue(**operands, packed=packed, activation="relu").check()


@pytest.mark.parametrize("shape", [
    dict(channels=1), dict(channels=16), dict(channels=70), dict(n=3, size=(9, 20), density=0.9), dict(density=0.0),
    dict(density=1.0), dict(n=0),
], ids=["one_channel", "aligned", "several_tiles", "several_tiles_of_rows", "empty", "full", "no_samples"])  # fmt: skip
@pytest.mark.parametrize("splits", [2, epilogue.SPLITS])
def test_epilogue_of_any_shape(shape, splits, monkeypatch):
    monkeypatch.setattr(epilogue, "SPLITS", splits)
    Epilogue(**shape, activation="relu6").check()
    Epilogue(**shape, packed=True).check()


@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_in(activation, dtype):
    Epilogue(activation=activation, dtype=dtype).check()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_epilogue_in_place(packed):
    case = Epilogue(activation="relu", packed=packed)
    out = case.actual()[0]
    case.residual = case.residual.clone()
    again = case.actual(aliased=True)[0]
    assert torch.equal(again[case.mask.expand_as(out)], out[case.mask.expand_as(out)])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_epilogue_reads_nothing_of_skipped_sites(packed):
    case = Epilogue(activation="relu", packed=packed)
    clean = case.actual()
    for name in ("input", "grad", "residual", "gate"):
        setattr(case, name, torch.where(case.mask, getattr(case, name), torch.nan))
    case.grad, case.residual = channels_last(case.grad), channels_last(case.residual)
    poisoned = case.actual()
    for before, after in zip([clean[0], *clean[1]], [poisoned[0], *poisoned[1]], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)], ids=str)
def test_epilogue_gives_what_is_wanted(wanted):
    case = Epilogue(activation="relu")
    everything, some = case.actual()[1], case.actual(wanted)[1]
    for have, want, is_wanted in zip(some, everything, [True, True, wanted[0], wanted[0], wanted[1]], strict=True):
        assert torch.equal(have, want) if is_wanted else have is None
    rows, grad = pack(case.input, *case.sites), case.grad
    nothing = (*case.vectors, None, None, None, None)
    vectors = epilogue.backward(grad, rows, *case.sites, *nothing, activation="none", wanted=wanted)
    assert [value is not None for value in vectors] == [wanted[0], wanted[0], wanted[1]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_where_it_jumps(activation):
    points = torch.tensor([-4, -3.5, -3, -2.5, -0.0, 0, 0.5, 2.5, 3, 3.5, 6, 7, torch.nan], device=DEVICE)[:, None]
    index, count = active_set(torch.ones(1, 1, 1, len(points), dtype=torch.bool, device=DEVICE))
    grad_rows = torch.empty_like(points)
    epilogue.backward(
        torch.ones_like(points), points, index, count, None, None, None, None, None, grad_rows, None,
        activation=activation, wanted=(False, False),
    )  # fmt: skip
    x = points.clone().requires_grad_()
    ACTIVATIONS[activation](x).sum().backward()
    assert torch.equal(grad_rows.isnan(), x.grad.isnan())
    number = ~x.grad.isnan()
    if activation in EXACT:
        assert torch.equal(grad_rows[number], x.grad[number])
    else:  # PyTorch's own value is as far off
        bound = 2 * slope_error(points.double(), activation, torch.finfo(torch.float32).eps / 2).nan_to_num(0)
        assert_rounded(grad_rows[number], x.grad[number].double(), bound[number])


@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("splits", [2, epilogue.SPLITS])
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (37, 16), (700, 20), (150, 70)], ids=str)
def test_moments(shape, splits, offset, dtype, monkeypatch):
    """Within the bound of Chan, Golub & LeVeque (1983) for the pairwise algorithm, n u kappa, relatively.

    kappa = sqrt(1 + mean^2 / variance), here of what is left when the first row is taken away, in n + 4 roundings.
    """
    monkeypatch.setattr(epilogue, "SPLITS", splits)
    count = torch.tensor([shape[0]], dtype=torch.int32, device=DEVICE)
    rows = torch.full((shape[0] + 5, shape[1]), torch.nan, dtype=dtype, device=DEVICE)
    rows[: shape[0]] = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + offset).to(DEVICE)
    mean, variance = epilogue.moments(rows, count)
    assert mean.dtype == variance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = rows[: shape[0]].double()
    want = exact.var(0, correction=0)
    u = torch.finfo(mean.dtype).eps / 2
    left = exact - exact[0]
    summation = (shape[0] + 4) * u
    # The expected values, in fp64 themselves, are off by as much in their own unit.
    own = (shape[0] + 4) * 2.0**-53
    bound = (summation + own) * left.abs().mean(0) + (u + own) * exact.abs().mean(0)
    assert ((mean - exact.mean(0)).abs() <= bound).all()
    kappa = (left.square().mean(0) / want).sqrt().nan_to_num(0)
    bound = (summation * kappa + own * (exact.square().mean(0) / want).sqrt().nan_to_num(0)) * want
    assert ((variance - want).abs() <= bound).all()


def test_moments_of_nothing_and_of_a_constant():
    rows = torch.full((40, 3), torch.nan, device=DEVICE)
    for empty in (rows, rows[:0]):
        count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        assert torch.equal(torch.stack(epilogue.moments(empty, count)), torch.zeros(2, 3, device=DEVICE))
    rows[:33] = 12345.678
    mean, variance = epilogue.moments(rows, torch.tensor([33], dtype=torch.int32, device=DEVICE))
    assert torch.equal(mean, rows[0])
    assert torch.equal(variance, torch.zeros_like(mean))


@pytest.mark.parametrize("dtype", dtypes(torch.float32, torch.float16, torch.float64))
@pytest.mark.parametrize("channels", [1, 16, 70])
def test_gather(channels, dtype):
    dense = channels_last(integers(2, channels, 6, 7, dtype=dtype))
    mask = random_mask(2, 1, 6, 7)
    index, count = active_set(mask)
    dense = channels_last(torch.where(mask, dense, torch.nan))
    out = torch.full((count.item() + 3, channels), torch.nan, dtype=dtype, device=DEVICE)
    epilogue.gather(dense, index, count, out)
    assert torch.equal(out[: count.item()], pack(dense, index, count)[: count.item()])
    assert (out[count.item() :] == 0).all()
    epilogue.gather(dense, index, torch.zeros_like(count), out.fill_(1))
    assert (out == 0).all()


@pytest.fixture(params=[0, 8], ids=["two_launches", "one_launch"])
def launches(request, monkeypatch):
    """Whether a program counts by itself what lies before its block, or reads what others have counted."""
    for name in ("SELF_COUNTED", "SELF_COUNTED_BY_STRIDES"):
        monkeypatch.setattr(compaction, name, request.param)


def check_compact(given, active, **options):
    """The set of a mask, or of what another makes active, and all that goes with it."""
    made = compaction.compact(given, with_mask=True, with_inverse=True, **options)
    expected = active.flatten().nonzero().flatten().int()
    assert made.index.dtype == made.count.dtype == made.inverse.dtype == torch.int32
    assert made.index.shape == made.inverse.shape == (active.numel(),)
    assert made.count.tolist() == [len(expected)]
    assert torch.equal(made.index[: len(expected)], expected)
    assert made.mask.shape == active.shape and made.mask.is_contiguous()
    assert torch.equal(made.mask.view(torch.uint8), active.to(torch.uint8))
    assert torch.equal(made.inverse, compaction.inverse_map(made.index, made.count, active.numel()))
    again = compaction.compact(given, **options)
    assert again.mask is again.inverse is None and torch.equal(again.index[: len(expected)], expected)


@pytest.mark.parametrize("shape", [(1,), (37,), (2, 1, 9, 5), (2 * compaction.SCAN_BLOCK + 16,)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_compact(shape, density, launches):
    mask = random_mask(*shape, density=density)
    check_compact(mask, mask)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:]
)
def test_compact_reads_masks_as_they_are(dtype, launches, monkeypatch):
    """By any strides; NaN, infinity and denormal numbers are active, -0.0 is not; a bool's bytes may be any."""
    monkeypatch.setattr(compaction, "SCAN_BLOCK", 64)
    active = random_mask(3, 1, 6, 8)
    if dtype == torch.bool:
        given = (active.to(torch.uint8) * 254).view(torch.bool)
    else:
        denormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        values = torch.tensor([torch.nan, torch.inf, denormal, -1], dtype=torch.float64)
        values = values.to(dtype).to(DEVICE).repeat(36).view(3, 1, 6, 8)
        given = torch.where(active, values, torch.tensor(-0.0, dtype=dtype, device=DEVICE))
    sample = slice(1, 2)
    for change in (
        lambda mask: mask, lambda mask: mask.transpose(2, 3), lambda mask: mask[:, :, ::2, 1::3],
        lambda mask: mask[sample].expand(5, -1, -1, -1), lambda mask: mask[:, :, :1, :1].expand(-1, -1, 5, 7),
    ):  # fmt: skip
        check_compact(change(given), change(active).contiguous())


def test_compact_adds_up_more_blocks_than_a_chunk(monkeypatch):
    monkeypatch.setattr(compaction, "SCAN_BLOCK", 16)
    monkeypatch.setattr(compaction, "CHUNK", 16)
    mask = random_mask(16 * 40 + 5, density=0.5)
    check_compact(mask, mask)


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("channels", [1, 5, 16, compaction.CHANNEL_BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
def test_compact_channels(dtype, channels, granularity):
    """Samples that keep none, some and all; masks of either stride zero; bytes of a bool that are not one; NaN."""
    groups = -(-channels // granularity)
    own = random_mask(3, groups) & torch.tensor([[False], [True], [True]], device=DEVICE)
    own[2] = True
    for of in (own, own[1:2].expand(3, -1), own[:, :1].expand(-1, groups), own.t().contiguous().t(), own[:0]):
        if dtype == torch.bool:
            mask = (of.to(torch.uint8) * 254).view(torch.bool) if of.is_contiguous() else of
        else:
            mask = torch.where(of, torch.tensor(torch.nan, dtype=dtype, device=DEVICE), 0)
        made, index, count = compaction.compact_channels(mask, channels, granularity)
        expected = of.repeat_interleave(granularity, 1)[:, :channels]
        assert torch.equal(made.view(torch.uint8), expected.to(torch.uint8))
        assert torch.equal(count, expected.sum(1, dtype=torch.int32))
        for row, kept in zip(index, expected, strict=True):
            listed, others = kept.nonzero().flatten().int(), (~kept).nonzero().flatten().int()
            assert torch.equal(row, torch.cat([listed, ~others.flip(0)]))
        before = F.pad(expected.int().cumsum(1), (1, 0)).int()
        for step in (1, channels):
            assert torch.equal(compaction.channel_places(index, count, step), before[:, ::step])


@pytest.mark.parametrize("channels", [0, 5, compaction.CHANNEL_BLOCK + 7])
def test_all_channels(channels):
    mask = torch.ones(2, channels, dtype=torch.bool, device=DEVICE)
    pairs = zip(compaction.all_channels(2, channels, mask.device), compaction.compact_channels(mask, channels))
    assert all(torch.equal(have, want) for have, want in pairs)


def test_compact_channels_of_none():
    made, index, count = compaction.compact_channels(torch.ones(2, 0, dtype=torch.bool, device=DEVICE), 0)
    assert made.shape == index.shape == (2, 0) and count.tolist() == [0, 0]


@pytest.mark.parametrize("channels", [1, 7, 64, compaction.FILL_COLUMNS + 24])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_fill_skipped(density, filled, channels, launches, monkeypatch):
    """Active sites keep what they have, whatever that is; in a launch of its own, and beside a compaction."""
    monkeypatch.setattr(compaction, "SCAN_BLOCK", 32)
    mask, shape = random_mask(2, 1, 9, 5, density=density), (2, channels, 9, 5)
    inactive = channels_last(integers(*shape)) if filled else None
    reads = compaction.Reads((9, 5), (3, 3), (1, 1), (1, 1), (1, 1))
    near = F.max_pool2d(mask.float(), 3, 1, 1) > 0
    for of, active, options in ((mask, mask, None), (mask, mask, {}), (mask[:1].expand(2, -1, -1, -1),) * 2 + ({},),
                                (mask, near, dict(reads=reads))):  # fmt: skip
        out = channels_last(torch.full(shape, torch.nan, device=DEVICE))
        fill = compaction.Fill(out, inactive)
        if options is None:
            compaction.fill_skipped(of, fill)
        else:
            assert compaction.compact(of, fill=fill, **options).count.item() == active.sum()
        expected = torch.where(active, torch.nan, inactive if filled else 0.0).expand(shape)
        assert torch.equal(out.nan_to_num(99), expected.nan_to_num(99))


def test_inverse_map():
    mask = random_mask(3, 1, 20, 21)
    _, index, count, _ = compaction.compact(mask)
    index[count.item() :] = NOT_A_SITE
    inverse = compaction.inverse_map(index, count, mask.numel())
    expected = torch.where(mask.flatten(), mask.flatten().cumsum(0) - 1, -1)
    assert torch.equal(inverse, expected.int())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_touched(name, monkeypatch):
    monkeypatch.setattr(compaction, "SCAN_BLOCK", 128)  # some in one launch, others in two
    case = Case(**(GEOMETRIES[name] | {"density": 0.1}))
    pixels = torch.zeros(len(case.mask), 1, *case.size, device=DEVICE, requires_grad=True)
    ones = torch.ones(1, 1, *case.kernel, device=DEVICE)
    F.conv2d(pixels, ones, None, **case.geometry).backward(case.mask.float())
    check_compact(case.mask, pixels.grad > 0, reads=case.reads())


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
