"""The Triton launchers of deformable convolution and aggregation: interpreted where there is no GPU.

Against the plain formula in float64, by gathers and autograd. Offsets are multiples of 1/4 and all else is small
integers, so that every product and sum is exact and the results have to be equal, rounded once to the type.
"""

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from test_kernels import DEVICE, channels_last, dtypes, integers

from dynconv import kernels

deform = kernels.deform

pytestmark = pytest.mark.gpu


def sample(input, offset, kernel, stride, padding, dilation):
    """float64 [N, offset groups, channels, taps, Ho, Wo]: input at (dy, dx) from the taps of a convolution."""
    n, channels, height, width = input.shape
    site_height, site_width = offset.shape[2:]
    taps = kernel[0] * kernel[1]
    groups = offset.shape[1] // (2 * taps)
    offset = offset.view(n, groups, taps, 2, site_height, site_width)

    def positions(axis, sites):
        tap = torch.arange(taps, device=DEVICE)
        tap = tap // kernel[1] if axis == 0 else tap % kernel[1]
        site = torch.arange(sites, device=DEVICE) * stride[axis] - padding[axis]
        grid = tap[:, None] * dilation[axis] + site[None, :]
        return offset[:, :, :, axis] + (grid[:, :, None] if axis == 0 else grid[:, None, :])

    y, x = positions(0, site_height), positions(1, site_width)
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, 0.0), torch.where(inside, x, 0.0)
    top, left = y.detach().floor(), x.detach().floor()
    pixels = input.reshape(n, groups, channels // groups, height * width)
    total = 0
    for down in (0, 1):
        for right in (0, 1):
            row, column = (top + down).long(), (left + right).long()
            valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            share = (y - top if down else 1 - (y - top)) * (x - left if right else 1 - (x - left))
            index = torch.where(valid, row * width + column, 0).flatten(2)[:, :, None]
            values = pixels.gather(3, index.expand(-1, -1, channels // groups, -1))
            total = total + torch.where(valid, share, 0.0)[:, :, None] * values.view(*pixels.shape[:3], *y.shape[2:])
    return total


class Case:
    """Operands of one deformable convolution or aggregation."""

    def __init__(
        self, n=2, cin=5, cout=3, size=(4, 5), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
        groups=1, offset_groups=1, masked=True, dtype=torch.float32,
    ):  # fmt: skip
        self.geometry = dict(stride=stride, padding=padding, dilation=dilation)
        self.kernel, self.dtype = kernel, dtype
        self.input = channels_last(integers(n, cin, *size, dtype=dtype))
        self.weight = integers(cout, cin // groups, *kernel, dtype=dtype, seed=1)
        self.bias = integers(cout, dtype=dtype, seed=2)
        self.groups = groups
        sites = F.conv2d(self.input.double(), self.weight.double(), None, **self.geometry, groups=groups).shape[2:]
        taps = kernel[0] * kernel[1]
        # Up to two pixels and a half away: some on pixels, some between them, some outside.
        offset = integers(n, 2 * offset_groups * taps, *sites, low=-10, high=11, dtype=torch.float64, seed=3) / 4
        self.offset = channels_last(offset.to(dtype))
        weights = channels_last(integers(n, offset_groups * taps, *sites, low=-2, dtype=dtype, seed=4))
        self.mask = weights if masked else None
        self.grad = channels_last(integers(n, cout, *sites, dtype=dtype, seed=5))

    def operands(self):
        tensors = (self.input, self.offset, self.mask, self.weight, self.bias)
        return [None if tensor is None else tensor.double().requires_grad_() for tensor in tensors]

    def expected_conv(self):
        """The output, and the gradients of input, offset, mask and weight."""
        input, offset, mask, weight, bias = self.operands()
        sampled = sample(input, offset, self.kernel, **self.geometry)
        if mask is not None:
            sampled = sampled * mask.view(*sampled.shape[:2], 1, *sampled.shape[3:])
        columns = sampled.flatten(1, 2).unflatten(1, (self.groups, -1))
        filters = weight.flatten(2).unflatten(0, (self.groups, -1))
        out = torch.einsum("ngckyx,gfck->ngfyx", columns, filters).flatten(1, 2) + bias.view(-1, 1, 1)
        return [out, *self.gradients(out, self.grad, input, offset, mask, weight)]

    def gradients(self, out, grad, *operands):
        wanted = [operand for operand in operands if operand is not None]
        found = iter(torch.autograd.grad(out, wanted, grad.double()))
        return [None if operand is None else next(found) for operand in operands]

    def actual_conv(self, wants=(True, True, True)):
        common = dict(**self.geometry, allow_tf32=False)
        out = torch.full_like(self.grad, torch.nan)
        deform.conv(self.input, self.offset, self.mask, self.weight, self.bias, out, **common)
        wanted = dict(zip(("wants_input", "wants_offset", "wants_mask"), wants, strict=True))
        grads = deform.conv_input_grad(
            self.grad, self.input, self.offset, self.mask, self.weight, **wanted, **common
        )  # fmt: skip
        grad_weight = deform.conv_weight_grad(self.input, self.offset, self.mask, self.grad, self.weight, **common)
        return [out, *grads, grad_weight]

    def expected_aggregate(self):
        """The output, and the gradients of input, offset and weights."""
        input, offset, weights, *_ = self.operands()
        sampled = sample(input, offset, self.kernel, **self.geometry)
        out = (sampled * weights.view(*sampled.shape[:2], 1, *sampled.shape[3:])).sum(3).flatten(1, 2)
        return [out, *self.gradients(out, self.aggregate_grad(), input, offset, weights)]

    def aggregate_grad(self):
        return channels_last(integers(len(self.grad), self.input.shape[1], *self.grad.shape[2:], dtype=self.dtype))

    def actual_aggregate(self, wants=(True, True, True)):
        common = dict(kernel_size=self.kernel, **self.geometry)
        grad = self.aggregate_grad()
        out = torch.full_like(grad, torch.nan)
        deform.aggregate(self.input, self.offset, self.mask, out, **common)
        wanted = dict(zip(("wants_input", "wants_offset", "wants_weights"), wants, strict=True))
        return [out, *deform.aggregate_grad(grad, self.input, self.offset, self.mask, **wanted, **common)]


def check(have, want):
    names = ("output", "input", "offset", "mask or weights", "weight")
    for name, a, b in zip(names, have, want, strict=False):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape, name
            assert torch.equal(a, b.to(a.dtype)), f"{name}: {(a.double() - b).abs().max()} apart"
    assert len(have) == len(want)


CONVOLUTIONS = {
    "3x3": dict(size=(3, 4)),
    "1x1_without_mask": dict(kernel=(1, 1), padding=(0, 0), masked=False),
    "stride_and_dilation": dict(kernel=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), size=(5, 3), n=1),
    "groups": dict(cin=6, cout=4, groups=2, kernel=(1, 2), size=(3, 3), n=1),
    "offset_groups": dict(cin=6, offset_groups=3, kernel=(2, 1), size=(3, 2)),
    "groups_across_offset_groups": dict(cin=12, cout=4, groups=2, offset_groups=3, kernel=(1, 1), size=(2, 3), n=1),
    "more_groups_than_offset_groups": dict(cin=4, cout=4, groups=4, offset_groups=2, kernel=(1, 1), size=(2, 3), n=1),
    "aligned_tiles": dict(cin=80, cout=72, kernel=(1, 1), n=1, size=(2, 3)),
    "several_splits": dict(cin=8, cout=8, kernel=(1, 1), padding=(0, 0), size=(13, 10), n=1),
    "float64": dict(cin=4, kernel=(1, 2), offset_groups=2, size=(3, 3), dtype=torch.float64),
    "float16": dict(cin=16, cout=8, kernel=(1, 2), offset_groups=2, size=(3, 3), dtype=torch.float16),
    "float16_unaligned": dict(cin=3, kernel=(2, 2), n=1, size=(3, 3), dtype=torch.float16),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_triton_convolution_equals_formula(name):
    case = Case(**CONVOLUTIONS[name])
    check(case.actual_conv(), case.expected_conv())


AGGREGATIONS = {
    "one_group": dict(kernel=(2, 3), size=(3, 4)),
    "groups": dict(cin=12, offset_groups=3, kernel=(2, 2), stride=(2, 1), dilation=(2, 1)),
    "several_tiles_of_channels": dict(cin=70, kernel=(1, 2), size=(2, 2), n=1),
    "float64": dict(cin=8, offset_groups=2, kernel=(2, 1), size=(3, 3), dtype=torch.float64),
    "float16": dict(cin=32, offset_groups=4, kernel=(2, 1), size=(3, 3), dtype=torch.float16),
    "float16_two_pieces": dict(cin=32, offset_groups=2, kernel=(2, 1), size=(3, 3), dtype=torch.float16),
    "float16_one_and_a_half": dict(cin=48, offset_groups=2, kernel=(1, 1), size=(3, 3), dtype=torch.float16),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_triton_aggregation_equals_formula(name):
    case = Case(**AGGREGATIONS[name])
    check(case.actual_aggregate(), case.expected_aggregate())


@pytest.mark.parametrize("family", ["conv", "aggregate"])
def test_triton_offsets_of_64_bits(family, monkeypatch):
    monkeypatch.setattr(deform, "offset_type", lambda *sizes: tl.int64)
    case = Case(cin=8, offset_groups=2, kernel=(1, 2), size=(3, 2))
    check(getattr(case, f"actual_{family}")(), getattr(case, f"expected_{family}")())


def test_triton_pairs_of_offsets_that_are_no_words():
    """Where the first does not start on a word, they are loaded one by one."""
    case = Case(cin=16, dtype=torch.float16, kernel=(1, 1), padding=(0, 0), size=(3, 2))
    rows = case.offset.permute(0, 2, 3, 1)
    moved = torch.empty(case.offset.numel() + 1, dtype=torch.float16, device=DEVICE)[1:].view(rows.shape).copy_(rows)
    want = case.expected_aggregate()
    case.offset = moved.permute(0, 3, 1, 2)
    assert case.offset.data_ptr() % 4
    check(case.actual_aggregate(), want)


def test_triton_aggregation_adds_nothing_from_outside():
    """Not of the first pixel either, which stands in for those that there are not; and there may be no pixel at all."""
    case = Case(n=1, cin=8, size=(3, 3), kernel=(1, 1), padding=(0, 0))
    case.input[:, :, 0, 0] = 64
    case.offset[:] = -9
    case.offset[0, :, 2, 2] = -0.5  # of the pixels (1, 1) to (2, 2)
    out = case.actual_aggregate()[0]
    pixels = case.input[0, :, 1:, 1:].mean((1, 2))
    assert torch.equal(out[0, :, 2, 2], pixels * case.mask[0, 0, 2, 2])
    out[0, :, 2, 2] = 0
    assert not out.any()
    case.input = channels_last(case.input[:, :, :0])
    assert not case.actual_aggregate()[0].any()


@pytest.mark.parametrize("dtype", dtypes(torch.bfloat16))
def test_triton_bfloat16_equals_formula(dtype):
    case = Case(cin=16, cout=16, dtype=dtype)
    check(case.actual_conv(), case.expected_conv())
    check(case.actual_aggregate(), case.expected_aggregate())


@pytest.mark.parametrize("family", ["conv", "aggregate"])
def test_triton_positions_outside_or_not_finite_sample_zero(family):
    """Also far outside of what int32 holds; nothing of them has a gradient. A corner exactly at -1 or H is outside."""
    case = Case(n=1, cin=4, size=(4, 4), kernel=(1, 1), padding=(0, 0))
    rows = case.offset.permute(0, 2, 3, 1).view(16, 2)
    far = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e10)
    for number, value in enumerate(far):
        rows[number, number % 2] = value
    rows[8, 0], rows[12, 0], rows[11, 1] = -3.0, 1.0, 1.0  # (2, 0), (3, 0) and (2, 3): to -1, to H, to W
    out, grad_input, grad_offset, grad_mask, *_ = have = getattr(case, f"actual_{family}")()
    check(have, getattr(case, f"expected_{family}")())
    outside = [*range(len(far)), 8, 11, 12]
    for tensor in (grad_offset, grad_mask):
        assert not tensor.permute(0, 2, 3, 1).flatten(0, 2)[outside].any()
    assert grad_input.any()
    value = case.bias if family == "conv" else torch.zeros(4, device=DEVICE)
    assert torch.equal(out.permute(0, 2, 3, 1).flatten(0, 2)[outside], value.expand(len(outside), -1))


@pytest.mark.parametrize("family", ["conv", "aggregate"])
def test_triton_grads_not_wanted_are_none(family):
    case = Case(n=1, cin=4, kernel=(1, 1), padding=(0, 0), size=(3, 3))
    want = getattr(case, f"expected_{family}")()
    for wants in ((True, False, False), (False, True, False), (False, False, True)):
        have = getattr(case, f"actual_{family}")(wants)
        check(have, [grad if i not in (1, 2, 3) or wants[i - 1] else None for i, grad in enumerate(want)])


def fractions(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return channels_last(torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE))


@pytest.mark.parametrize("family", ["conv", "aggregate"])
def test_triton_input_grad_does_not_depend_on_the_order_of_addition(family, monkeypatch):
    """The same bits twice, and from other tiles, whose atomic additions come in another order.

    Of integers the products of matrices are the same in any tile; contributions are rounded, and floats would add up to
    other bits.
    """
    case = Case(n=1, cin=4, cout=8, size=(5, 5), kernel=(1, 2), padding=(0, 0))
    case.offset, case.mask = fractions(*case.offset.shape, seed=3), fractions(*case.mask.shape, seed=4)
    actual = getattr(case, f"actual_{family}")
    first, second = actual(), actual()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    name = "input_grad_config" if family == "conv" else "aggregate_config"
    config = getattr(deform, name)
    block_m = 16 if family == "conv" else 8
    monkeypatch.setattr(deform, name, lambda *sizes, **flags: config(*sizes, **flags) | dict(BLOCK_M=block_m))
    assert torch.equal(first[1], actual()[1])


@pytest.mark.parametrize("dtype", dtypes(torch.float32, torch.float64))
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30], ids=["1", "tiny", "huge"])
def test_triton_fixed_point_is_as_exact_as_the_type(dtype, scale):
    """A contribution is grad * weight * share, and share a product of two distances that come off a position: off by
    the rounding of a position of at most 8 (its ulp is 16 u, half of it for each axis), and of six operations, all in
    all by 22 u of the bound. A sum adds up contributions that came from `contributions` sites and taps, and its own
    resolution and rounding, less than one u each.
    """
    case = Case(n=1, cin=3, size=(4, 4), kernel=(2, 2), dtype=dtype)
    case.offset = fractions(*case.offset.shape, seed=3, dtype=dtype).clamp(-2, 2)
    case.mask = fractions(*case.mask.shape, seed=4, dtype=dtype) * 16
    grad = fractions(1, 3, *case.grad.shape[2:], seed=5, dtype=dtype) * scale
    case.aggregate_grad = lambda: grad
    want, have = case.expected_aggregate()[1], case.actual_aggregate((True, False, False))[1]
    contributions = 4 * grad[0, 0].numel()
    bound = case.mask.abs().max().double() * grad.abs().max().double()
    error = (22 * contributions + 2) * torch.finfo(dtype).eps / 2 * bound
    assert ((have.double() - want).abs() <= error).all()
    assert want.abs().max() > 1e3 * error


@pytest.mark.parametrize("operand", ["grad", "mask", "weight"])
def test_triton_input_grad_without_a_bound_is_nan(operand):
    case = Case(n=1, cin=4, size=(3, 3), kernel=(1, 1), padding=(0, 0))
    getattr(case, operand)[0, 0, 0, 0] = torch.nan
    _, grad_input, grad_offset, *_ = case.actual_conv()
    assert grad_input.isnan().all()
    assert not grad_offset.isnan().all()


@pytest.mark.parametrize("n, size, cout", [(0, (4, 5), 3), (2, (4, 5), 0)], ids=["no_samples", "no_filters"])
def test_triton_empty(n, size, cout):
    case = Case(n=2, size=size, cout=3)
    case.input, case.offset, case.mask, case.grad = (t[:n] for t in (case.input, case.offset, case.mask, case.grad))
    case.weight, case.bias, case.grad = case.weight[:cout], case.bias[:cout], case.grad[:, :cout]
    out, *grads = case.actual_conv()
    assert out.shape == case.grad.shape
    for grad, operand in zip(grads, (case.input, case.offset, case.mask, case.weight), strict=True):
        assert grad.shape == operand.shape
        assert not grad.any()
