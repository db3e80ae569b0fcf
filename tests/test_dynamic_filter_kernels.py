"""The Triton launchers of dynamic filters against plain loops over taps in fp64: interpreted where there is no GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from test_kernels import DEVICE, active_set, assert_rounded, channels_last, dtypes, integers, random_mask

from dynconv import kernels

compaction, dynamic_filter = kernels.compaction, kernels.dynamic_filter

pytestmark = pytest.mark.gpu


def normalized(filters, groups, name):
    """[N, G * K, Ho, Wo], over the taps of each group."""
    rows = filters.unflatten(1, (groups, -1))
    rows = {
        "none": lambda: rows,
        "softmax": lambda: rows.softmax(2),
        "sigmoid": lambda: rows.sigmoid(),
        "l2": lambda: F.normalize(rows, dim=2),
    }[name]()
    return rows.flatten(1, 2)


def shifted(input, tap, site_size, kernel_size, stride, padding, dilation, scale_factor):
    """[N, C, Ho, Wo]: the pixel that each site reads at a tap, zero outside the input."""
    where = []
    for axis, size in enumerate(site_size):
        step = divmod(tap, kernel_size[1])[axis]
        site = torch.arange(size, device=input.device)
        where.append(site // scale_factor * stride[axis] - padding[axis] + step * dilation[axis])
    inside = [(at >= 0) & (at < size) for at, size in zip(where, input.shape[2:], strict=True)]
    y, x = (at.clamp(0, size - 1) for at, size in zip(where, input.shape[2:], strict=True))
    return input[:, :, y[:, None], x] * (inside[0][:, None] & inside[1])


class Case:
    """Operands of one dynamic filter, all integers, and its results in fp64. What is skipped is NaN."""

    def __init__(
        self, n=2, group_channels=3, groups=2, size=(3, 4), kernel_size=(3, 3), stride=(1, 1), padding=(1, 1),
        dilation=(1, 1), scale_factor=1, normalization="none", channel_filters=False, density=None,
        dtype=torch.float32,
    ):  # fmt: skip
        self.groups, self.taps, self.normalization, self.dtype = groups, math.prod(kernel_size), normalization, dtype
        channels = groups * group_channels
        base_size = F.conv2d(torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel_size), None, stride, padding, dilation)
        site_size = tuple(base * scale_factor for base in base_size.shape[2:])
        self.geometry = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
        self.geometry |= dict(site_size=site_size, scale_factor=scale_factor)
        self.input = channels_last(integers(n, channels, *size, dtype=dtype))
        self.filters = channels_last(integers(n, groups * self.taps, *site_size, dtype=dtype, seed=1))
        self.grad = channels_last(integers(n, channels, *site_size, dtype=dtype, seed=2))
        self.channel_filters = integers(n, channels, *kernel_size, dtype=dtype, seed=3) if channel_filters else None
        self.mask = torch.ones(n, 1, *site_size, dtype=torch.bool, device=DEVICE)
        self.sites, self.inverse = (None, None), None
        if density is not None:
            self.mask = random_mask(n, 1, *site_size, density=density)
            self.mask[-1] = False
            self.sites = active_set(self.mask)
            self.inverse = compaction.inverse_map(*self.sites, self.mask.numel())
            self.filters = channels_last(torch.where(self.mask, self.filters, torch.nan))
            self.grad = channels_last(torch.where(self.mask, self.grad, torch.nan))
            input = self.input.double().requires_grad_()
            reads = self.formula(input, torch.ones_like(self.filters, dtype=torch.double)).sum()
            self.is_read = torch.autograd.grad(reads, input)[0] > 0
            self.input = channels_last(torch.where(self.is_read, self.input, torch.nan))

    def formula(self, input, weights, channel_filters=None):
        """The output of normalised filters, tap by tap."""
        out = 0
        for tap in range(self.taps):
            weight = weights.unflatten(1, (self.groups, self.taps))[:, :, tap]
            term = shifted(input, tap, **self.geometry) * weight.repeat_interleave(input.shape[1] // self.groups, 1)
            out = out + (term if channel_filters is None else term * channel_filters.flatten(2)[:, :, tap, None, None])
        return torch.where(self.mask, out, 0.0)

    def operands(self):
        """input, filters, grad and, if there are any, channel filters, in fp64 and with zeros for what is skipped."""
        given = (self.input, self.filters, self.grad, self.channel_filters)
        return [tensor.nan_to_num().double() for tensor in given if tensor is not None]

    def expected(self):
        """The output, and its gradients by input, filters and channel filters."""
        input, filters, grad, *channel_filters = self.operands()
        leaves = [leaf.requires_grad_() for leaf in (input, filters, *channel_filters)]
        out = self.formula(input, normalized(filters, self.groups, self.normalization), *channel_filters)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def weights(self):
        """Rows of sites that are skipped stay NaN: nobody may read them."""
        out = torch.full_like(self.filters, torch.nan)
        dynamic_filter.normalize(
            self.filters, out, *self.sites, groups=self.groups, taps=self.taps, normalization=self.normalization
        )
        assert torch.equal(out.isnan(), ~self.mask.expand_as(out)), "normalize has to write what is listed, all of it"
        return out

    def actual(self):
        """As expected(), from the launchers."""
        weights, normalization = self.weights(), dict(normalization=self.normalization)
        out, grad_filters = torch.zeros_like(self.grad), torch.zeros_like(self.filters)
        grad_input = torch.full_like(self.input, torch.nan)
        channel_filters, where = self.channel_filters, self.geometry
        dynamic_filter.forward(
            self.input, self.filters, channel_filters, out, *self.sites, **where, **normalization
        )  # fmt: skip
        dynamic_filter.input_grad(self.grad, weights, channel_filters, grad_input, self.inverse, **where)
        dynamic_filter.filter_grad(
            self.grad, self.input, weights, self.filters, channel_filters, grad_filters, *self.sites, **where,
            **normalization,
        )  # fmt: skip
        results = [out, grad_input, grad_filters]
        if channel_filters is not None:
            results.append(dynamic_filter.channel_grad(self.grad, self.input, weights, *self.sites, **where))
        return results

    def check(self):
        """Integers that every type here holds: the results are equal."""
        for name, want, have in zip(NAMES, self.expected(), self.actual(), strict=False):
            assert have.shape == want.shape and have.is_contiguous(memory_format=FORMATS[name]), name
            assert torch.equal(have.double(), want), f"{name}: {(have.double() - want).abs().max()} apart"

    def bounds(self):
        """Of what expected() is off, with filters of -2 to 2; u is the accumulator's unit roundoff, K the taps.

        A weight is off by at most (K + 20) u of itself: in a softmax an exponential of at most 4 by 7 u, their sum of
        positive terms by K - 1 more, and its reciprocal and their product by 3 and 3; a sigmoid by 5 u of the
        exponential and 1 + 2 + 4 of sum and quotient; l2, whose sum of squares is exact, by 4 + 4 + 1. One more where
        it is stored. A sum of T products, with two roundings each, adds T + 2, both relative to the sum of magnitudes.
        The gradient of the filters has exact d = the sum over c; what follows has two weights as factors, a sum of K
        terms and less than 12 roundings more. So (3 K + 55 + T) u times the magnitudes holds for everything.
        """
        input, filters, grad, *channel_filters = self.operands()
        weights = normalized(filters, self.groups, self.normalization)
        leaves = [leaf.abs().requires_grad_() for leaf in (input, weights, *channel_filters)]
        out = self.formula(*leaves)
        by_input, by_weight, *rest = torch.autograd.grad(out, leaves, grad.abs())
        weights, by_weight = (t.unflatten(1, (self.groups, self.taps)) for t in (weights.abs(), by_weight))
        along = weights * (weights * by_weight).sum(2, keepdim=True)
        by_filter = {
            "softmax": lambda: weights * by_weight + along,
            "sigmoid": lambda: weights * by_weight,
            "l2": lambda: (
                (by_weight + along)
                / filters.unflatten(1, (self.groups, self.taps)).norm(dim=2, keepdim=True).clamp_min(1e-12)
            ),
        }[self.normalization]()
        site_height, site_width = self.geometry["site_size"]
        terms = max(self.taps * self.geometry["scale_factor"] ** 2, site_height * site_width)
        u = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps / 2
        magnitudes = [out.detach(), by_input, by_filter.flatten(1, 2), *rest]
        return [(3 * self.taps + 55 + terms) * u * magnitude for magnitude in magnitudes]

    def check_rounded(self):
        for want, have, bound in zip(self.expected(), self.actual(), self.bounds(), strict=True):
            # The bound covers what is expected as well where that has the accumulator's precision.
            assert_rounded(have, want, 2 * bound if self.dtype == torch.float64 else bound)


NAMES = ("output", "input", "filters", "channel_filters")
FORMATS = dict.fromkeys(NAMES[:3], torch.channels_last) | {"channel_filters": torch.contiguous_format}
CASES = {
    "3x3": dict(),
    "one_group": dict(groups=1, group_channels=5, channel_filters=True),
    "channel_groups": dict(groups=3, group_channels=2, channel_filters=True, density=0.4),
    "groups_of_one_channel": dict(groups=5, group_channels=1, density=0.4),
    "groups_of_16": dict(groups=3, group_channels=16, density=0.4, size=(2, 3)),
    "several_tiles": dict(groups=1, group_channels=72, kernel_size=(1, 2), size=(3, 5), channel_filters=True),
    "stride_2": dict(stride=(2, 2), density=0.6, size=(5, 4)),
    "uneven": dict(
        kernel_size=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), size=(5, 3), channel_filters=True
    ),
    "scale_2": dict(scale_factor=2, size=(2, 3), density=0.5, channel_filters=True),
    "scale_3_of_stride_2": dict(scale_factor=3, stride=(2, 1), size=(3, 2), kernel_size=(1, 3), padding=(0, 1)),
    "7x7": dict(kernel_size=(7, 7), padding=(3, 3), n=1, size=(2, 2)),
    "row_of_11": dict(kernel_size=(1, 11), padding=(0, 5), size=(1, 3), density=0.5),
    "runs_of_4": dict(group_channels=4, size=(3, 7), channel_filters=True),
    "runs_of_2": dict(group_channels=4, size=(2, 6), kernel_size=(3, 5), padding=(1, 2)),
    "runs_of_4_at_scale_2": dict(group_channels=4, size=(2, 4), scale_factor=2, channel_filters=True),
    "no_samples": dict(n=0, channel_filters=True),
}


@pytest.mark.parametrize("name", CASES)
def test_triton_equals_formula(name):
    Case(**CASES[name]).check()


@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float16, torch.bfloat16))
def test_triton_equals_formula_in(dtype):
    Case(groups=2, group_channels=8, channel_filters=True, density=0.5, dtype=dtype, size=(3, 3)).check()


@pytest.mark.parametrize("taps", [1, 3, 5, 7])
def test_triton_loads_half_precision_filters_by_words(taps):
    """Of rows that begin on even and odd elements, the last one at the very end; and not by words if that is odd."""
    kernel = dict(dtype=torch.float16, groups=1, group_channels=8, kernel_size=(1, taps), padding=(0, taps // 2))
    for size, is_even in (((2, 4), True), ((1, 7), False)):
        case = Case(n=1, size=size, **kernel)
        assert dynamic_filter.has_words(case.filters, taps, taps) == is_even
        case.check()


def test_triton_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(dynamic_filter, "offset_type", lambda *sizes: tl.int64)
    Case(**CASES["runs_of_4_at_scale_2"]).check()
    Case(**CASES["groups_of_16"]).check()


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid", "l2"])
def test_triton_normalization_in_runs(normalization):
    Case(group_channels=4, size=(2, 4), scale_factor=2, normalization=normalization).check_rounded()


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid", "l2"])
def test_triton_normalization(normalization):
    """Of more taps than a block of them holds."""
    case = dict(kernel_size=(3, 6), padding=(1, 2), size=(3, 2), density=0.6, channel_filters=True)
    Case(**case, normalization=normalization).check_rounded()


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid", "l2"])
def test_triton_normalization_at_every_site_of_float64(normalization):
    Case(normalization=normalization, scale_factor=2, size=(1, 2), n=1, dtype=torch.float64).check_rounded()


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid", "l2"])
def test_triton_normalization_of_half_precision(normalization):
    """In fp32, rounded once."""
    case = Case(normalization=normalization, dtype=torch.float16, n=1, size=(2, 3))
    out = torch.zeros_like(case.grad)
    where = case.geometry | dict(normalization=normalization)
    dynamic_filter.forward(case.input, case.filters, None, out, *case.sites, **where)
    assert_rounded(out, case.expected()[0], case.bounds()[0])


def normalize(rows, normalization):
    """Of one filter."""
    filters = torch.tensor(rows, device=DEVICE)[None, :, None, None].contiguous(memory_format=torch.channels_last)
    out = torch.zeros_like(filters)
    taps = filters.shape[1]
    dynamic_filter.normalize(filters, out, None, None, groups=1, taps=taps, normalization=normalization)
    return out.flatten()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_triton_softmax_of_infinities():
    """Minus infinity leaves a tap out, even a block of them; NaN and nothing but minus infinity give NaN."""
    inf, nan = math.inf, math.nan
    assert normalize([-inf] * 16 + [3.0], "softmax").tolist() == [0.0] * 16 + [1.0]
    assert normalize([-500.0, -500.0, -inf], "softmax").tolist() == [0.5, 0.5, 0.0]
    for filters in ([-inf, -inf], [0.0, nan], [0.0, inf]):
        assert torch.equal(normalize(filters, "softmax").isnan(), torch.tensor(filters).softmax(0).isnan().to(DEVICE))


def test_triton_l2_of_nothing():
    assert normalize([0.0, 0.0], "l2").tolist() == [0.0, 0.0]
    assert normalize([0.0, math.nan], "l2").isnan().all()
    # A norm below the least one: the divisor is a constant, and so is the gradient's.
    grad, filters = (torch.full((1, 1, 1, 1), value, device=DEVICE) for value in (1.0, 2.0**-50))
    weights, out = filters * 1e12, torch.zeros_like(filters)
    where = dict(site_size=(1, 1), kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), scale_factor=1)
    dynamic_filter.filter_grad(grad, grad, weights, filters, None, out, None, None, **where, normalization="l2")
    assert_rounded(out, torch.full_like(out, 1e12, dtype=torch.double), 1e12 * 2**-21)


def test_triton_channel_gradient_in_splits(monkeypatch):
    case = Case(
        n=3,
        groups=1,
        group_channels=20,
        size=(5, 5),
        kernel_size=(3, 1),
        padding=(1, 0),
        channel_filters=True,
        density=0.9,
    )
    monkeypatch.setattr(dynamic_filter, "CHANNEL_GRAD_STEPS", 1)  # 25 sites at most: two parts of 16 and 9
    case.check()
