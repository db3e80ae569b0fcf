"""deform_conv2d and deform_aggregate2d against grid_sample and the reference: values, gradients, contract."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Target
from torch.utils.flop_counter import FlopCounterMode

import dynconv
from dynconv import deform_aggregate2d, deform_conv2d, reference
from dynconv._geometry import Geometry

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPS = ("conv", "aggregate")


def case(
    op="conv", n=2, channels=6, filters=4, size=(6, 7), kernel_size=3, stride=1, padding=1, dilation=1, groups=1,
    offset_groups=1, masked=True, reach=2.0, steps=None, dtype=torch.float64, normalization=None,
):  # fmt: skip
    """Function, operands, the output's gradient. Offsets reach `reach` pixels, in multiples of 1 / `steps`."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    area, taps = geometry.output_size(*size), geometry.kernel[0] * geometry.kernel[1]
    offset = normal(n, 2 * offset_groups * taps, *area) * reach
    if steps is not None:
        offset = (offset * steps).round() / steps
    scales = normal(n, offset_groups * taps, *area)
    where = dict(stride=stride, padding=padding, dilation=dilation)
    if op == "conv":
        weight = normal(filters, channels // groups, *geometry.kernel)
        operands = [normal(n, channels, *size), offset, weight, normal(filters), scales if masked else None]
        filters = operands[2].shape[0]
        call = lambda module, x, o, w, b, m: module.deform_conv2d(x, o, w, b, mask=m, **where)
    else:
        operands, filters = [normal(n, channels, *size), offset, scales], channels
        where |= dict(kernel_size=kernel_size, normalization=normalization)
        call = lambda module, x, o, w: module.deform_aggregate2d(x, o, w, **where)
    grad = normal(n, filters, *area)
    to = lambda t: None if t is None else t.to(dtype)
    return call, [to(t) for t in operands], to(grad)


def run(call, module, operands, grad):
    """[output, *gradients]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands]
    output = call(module, *leaves)
    wanted = [t for t in leaves if t is not None]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


def on(target, call, operands, grad):
    to = lambda t: None if t is None else t.to(target.device)
    with target.use():
        return [t.cpu() for t in run(call, dynconv, [to(t) for t in operands], to(grad))]


def assert_close(actual, operands, grad, call, terms):
    """Within (terms + 60) * eps of the same sums of absolute values, and the rounding of the result.

    Each result is a sum of at most `terms` products of a few factors (Higham, 2002, section 3.1). A factor, the share
    of a pixel, comes from a position y that is off by eps * |y|, at most 60 eps for |y| < 20 here; it moves the share,
    and so the value, by that many eps of the differences between the four pixels, which absolute values bound twice.
    """
    double = [None if t is None else t.double() for t in operands]
    expected = run(call, reference, double, grad.double())
    size = [None if t is None else t.abs() for t in double]
    size[1] = double[1]  # positions decide what is read
    sizes = run(call, _Magnitudes, size, grad.double().abs())
    eps = torch.finfo(torch.float64 if grad.dtype == torch.float64 else torch.float32).eps
    for which, (have, want, scale) in enumerate(zip(actual, expected, sizes, strict=True)):
        assert have.dtype == grad.dtype and have.shape == want.shape
        bound = (terms + 60) * eps * 4 * scale + torch.finfo(grad.dtype).eps * want.abs()
        if grad.dtype == torch.float16:
            bound = bound + 2.0**-24
        error = (have.double() - want).abs()
        assert (error <= bound).all(), f"{which}: {(error / bound.clamp(min=1e-300)).max()} of the bound"


class _Magnitudes:
    """The reference on absolute values, with every slope of a share positive: what bounds the offsets' gradients."""

    @staticmethod
    def deform_conv2d(*operands, **options):
        with _positive_slopes():
            return reference.deform_conv2d(*operands, **options)

    @staticmethod
    def deform_aggregate2d(*operands, **options):
        with _positive_slopes():
            return reference.deform_aggregate2d(*operands, **options | {"normalization": None})


class _positive_slopes:
    """1 - x differentiates as 1 + x does: the shares keep their values, their slopes become absolute."""

    def __enter__(self):
        class Share(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 1 - x

            @staticmethod
            def backward(ctx, grad):
                return grad

        self.before, reference._complement = reference._complement, Share.apply

    def __exit__(self, *error):
        reference._complement = self.before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_are_those_of_the_reference(target, op, dtype):
    target.skip_unless(dtype)
    # Multiples of a quarter of a pixel: positions are exact in every type, and many lie on a pixel.
    small = dict(n=1, channels=4, size=(3, 4)) if target.is_interpreted else dict(channels=36, filters=10, groups=2)
    call, operands, grad = case(op, dtype=dtype, offset_groups=2, steps=4, **small)
    assert_close(on(target, call, operands, grad), operands, grad, call, 500)


GEOMETRIES = {
    "1x1": dict(kernel_size=1, padding=0),
    "2x3": dict(kernel_size=(2, 3), padding=(1, 0)),
    "stride 2": dict(stride=2),
    "stride 1 x 3, dilation 2": dict(stride=(1, 3), dilation=2, padding=2),
    "a kernel larger than the input": dict(kernel_size=5, padding=3, size=(3, 2)),
    "one channel": dict(channels=1),
    "a vector and some": dict(channels=19, filters=3),
    "groups of offsets": dict(channels=36, offset_groups=3),
    "groups of weights": dict(channels=12, filters=8, groups=4, offset_groups=2),
    "far outside": dict(reach=9.0),
    "no offset": dict(reach=0.0),
    "on the pixels": dict(steps=1),
    "no mask": dict(masked=False),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("change", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(change, op):
    call, operands, grad = case(op, **change)
    assert_close(on(Target("cpu"), call, operands, grad), operands, grad, call, 500)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_a_geometry_of_triton(op):
    change = GEOMETRIES["stride 1 x 3, dilation 2"] | dict(n=1, channels=4, size=(4, 5), groups=2, offset_groups=2)
    call, operands, grad = case(op, **change, dtype=torch.float32, steps=8)
    assert_close(on(Target("triton"), call, operands, grad), operands, grad, call, 500)


def grid_sample_columns(input, offset, kernel_size, stride, padding, dilation):
    """[N, G, C / G, taps, Ho, Wo] by F.grid_sample, whose coordinates are -1 and 1 at the first and last pixel."""
    samples, channels, *size = input.shape
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    taps, area = geometry.kernel[0] * geometry.kernel[1], offset.shape[2:]
    steps = offset.unflatten(1, (-1, taps, 2))
    groups, places = steps.shape[1], []
    for axis in range(2):
        site = torch.arange(area[axis]) * geometry.stride[axis] - geometry.padding[axis]
        tap = torch.arange(geometry.kernel[axis]) * geometry.dilation[axis]
        site, tap = (site.view(-1, 1), tap.view(-1, 1)) if axis == 0 else (site, tap.view(1, -1))
        tap = tap.expand(geometry.kernel).reshape(-1, 1, 1)
        places.append(2 * (site + tap + steps[:, :, :, axis]) / (size[axis] - 1) - 1)
    grid = torch.stack(places[::-1], -1).flatten(0, 1).flatten(1, 2)
    sampled = F.grid_sample(input.reshape(samples * groups, -1, *size), grid, align_corners=True)
    return sampled.view(samples, groups, channels // groups, taps, *area)


class _GridSample:
    """An independent formulation: PyTorch's own sampling, unfolded."""

    @staticmethod
    def deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation):
        columns = grid_sample_columns(input, offset, tuple(weight.shape[2:]), stride, padding, dilation)
        if mask is not None:
            columns = columns * mask.unflatten(1, (columns.shape[1], -1)).unsqueeze(2)
        columns = columns.flatten(1, 2).flatten(1, 2).flatten(2)
        return (weight.flatten(1) @ columns).unflatten(2, offset.shape[2:]) + bias.view(1, -1, 1, 1)

    @staticmethod
    def deform_aggregate2d(input, offset, weights, kernel_size, stride, padding, dilation, normalization):
        columns = grid_sample_columns(input, offset, kernel_size, stride, padding, dilation)
        return (columns * weights.unflatten(1, (columns.shape[1], -1)).unsqueeze(2)).sum(3).flatten(1, 2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("change", [dict(), dict(stride=2, dilation=2, padding=3), dict(reach=6.0)], ids=str)
def test_grid_sample_gives_the_same(op, change):
    """Between pixels, where both have the same slopes; in float64 the two round differently by 1e-13 of the values."""
    call, operands, grad = case(op, offset_groups=2, **change)
    expected, actual = (run(call, module, operands, grad) for module in (_GridSample, dynconv))
    for want, have in zip(expected, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


def test_torchvision_gives_the_same():
    try:
        from torchvision import ops

        torch.ops.torchvision.deform_conv2d.default  # noqa: B018
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"torchvision's operator is not here, a peer where it is: {error}")
    call, operands, grad = case(offset_groups=2, groups=2)
    expected, actual = run(call, ops, operands, grad), run(call, dynconv, operands, grad)
    for want, have in zip(expected, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels, groups, kernel_size", [(4, 4, 3), (6, 2, 1), (6, 6, 1), (20, 5, (1, 2))])
def test_groups_of_one_channel_or_one_tap(channels, groups, kernel_size):
    """Whose columns, split into groups, are views of rows that lie far apart."""
    call, operands, grad = case(channels=channels, filters=2 * groups, groups=groups, kernel_size=kernel_size)
    expected, actual = run(call, reference, operands, grad), run(call, dynconv, operands, grad)
    for want, have in zip(expected, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_no_offset_is_a_convolution():
    call, (input, offset, weight, bias, _), _ = case(reach=0.0, masked=False, dilation=2, padding=2)
    torch.testing.assert_close(call(dynconv, input, offset, weight, bias, None), F.conv2d(input, weight, bias, 1, 2, 2))


@pytest.mark.parametrize("op", OPS)
def test_at_the_border(target, op):
    """Half a pixel outside a sample fades; a whole one outside it is zero, and so are its gradients."""
    for position, value in ((-0.5, 0.5), (-1.0, 0.0), (-1.5, 0.0), (2.5, 0.5), (3.0, 0.0), (float("nan"), 0.0),
                            (float("inf"), 0.0), (-float("inf"), 0.0), (1e30, 0.0)):  # fmt: skip
        input = torch.ones(1, 1, 3, 3, device=target.device, requires_grad=True)
        offset = torch.zeros(1, 2, 3, 3, device=target.device)
        offset[0, 0, 0] = position  # of the first line of sites: down
        offset.requires_grad_()
        ones = torch.ones(1, 1, 3, 3, device=target.device)
        with target.use():
            if op == "conv":
                output = deform_conv2d(input, offset, ones[:, :, :1, :1])
            else:
                output = deform_aggregate2d(input, offset, ones, kernel_size=1)
            output.sum().backward()
        assert output[0, 0, 0].tolist() == [value] * 3
        slope = {-0.5: 1.0, 2.5: -1.0}.get(position, 0.0)
        assert offset.grad[0, 0, 0].tolist() == [slope] * 3
        assert input.grad.isfinite().all() and offset.grad.isfinite().all()
        assert input.grad.sum().item() == 6 + 3 * value


@pytest.mark.parametrize("normalization", ["softmax", "sigmoid", "l2"])
def test_normalised_weights(normalization):
    call, operands, grad = case("aggregate", offset_groups=2, normalization=normalization)
    expected, actual = run(call, reference, operands, grad), run(call, dynconv, operands, grad)
    for want, have in zip(expected, actual, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    """Positions stay a step of finite differences away from the kinks on the pixels."""
    call, operands, _ = case(op, n=1, channels=4, filters=2, size=(3, 4), offset_groups=2, reach=1.0)
    fraction = operands[1] - operands[1].floor()
    operands[1] = operands[1].floor() + fraction.clamp(0.01, 0.99)
    leaves = [t.requires_grad_() for t in operands]
    assert torch.autograd.gradcheck(lambda *t: call(dynconv, *t), leaves)


@pytest.mark.parametrize("op", OPS)
def test_no_samples(op):
    call, operands, grad = case(op, n=0)
    output, *grads = run(call, dynconv, operands, grad)
    assert output.shape == grad.shape
    assert [g.shape for g in grads] == [t.shape for t in operands]
    assert not any(g.any() for g in grads)


def test_no_pixels():
    """An empty map has sites where it is padded: the bias, and its gradient, remain."""
    call, operands, _ = case(size=(0, 0), kernel_size=1)
    output, *grads = run(call, dynconv, operands, torch.ones(2, 4, 2, 2).double())
    assert torch.equal(output, operands[3].view(1, 4, 1, 1).expand(2, 4, 2, 2))
    assert torch.equal(output, call(reference, *operands))
    assert grads[3].tolist() == [8.0] * 4
    assert not any(g.any() for i, g in enumerate(grads) if i != 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalised_weights_of_half_types(dtype):
    """ "l2" of zeros is zero, and squares do not overflow; the reference finds its pixels on a map of 40 x 64."""
    input, offset = torch.ones(1, 1, 40, 64, dtype=dtype), torch.zeros(1, 18, 40, 64, dtype=dtype)
    weights = torch.zeros(1, 9, 40, 64, dtype=dtype)
    weights[:, :, 1:] = 3e4
    for backend in ("cpu", "reference"):
        leaf = weights.clone().requires_grad_()
        with dynconv.backend(backend):
            output = deform_aggregate2d(input, offset, leaf, kernel_size=3, padding=1, normalization="l2")
            output.sum().backward()
        assert not output[:, :, 0].any() and leaf.grad[:, :, 1:].isfinite().all()
        torch.testing.assert_close(output[0, 0, 2:-1, 1:-1], torch.full((37, 62), 3.0, dtype=dtype))


@pytest.mark.parametrize("op", OPS)
def test_a_batch_equals_its_samples(op):
    call, operands, _ = case(op, n=3, dtype=torch.float32)
    output = call(dynconv, *operands)
    for n in range(3):
        alone = [t[n : n + 1] if t.dim() == 4 and t.shape[0] == 3 else t for t in operands]
        torch.testing.assert_close(output[n : n + 1], call(dynconv, *alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "op, normalization, offset_groups",
    [("conv", None, 1), ("conv", None, 2), ("aggregate", "softmax", 1), ("aggregate", "sigmoid", 2)],
)
def test_the_same_bits_on_any_number_of_threads(op, normalization, offset_groups):
    """One sample with one group of offsets: threads share its channels; otherwise its groups, or samples."""
    call, operands, grad = case(
        op, n=offset_groups, channels=40, filters=24, size=(40, 41), offset_groups=offset_groups, dtype=torch.float32,
        normalization=normalization,
    )  # fmt: skip
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(call, dynconv, operands, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_again(target, op):
    """The input's gradient is a scatter: every pixel of a small input is met by many samples."""
    call, operands, grad = case(op, n=1, channels=4, size=(3, 3), dtype=torch.float32)
    first, second = (on(target, call, operands, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("op", OPS)
def test_no_uninitialised_memory_is_read(op):
    call, operands, grad = case(op, channels=18, offset_groups=2, reach=5.0)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert all(t.isfinite().all() for t in run(call, dynconv, operands, grad))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", OPS)
def test_layouts(op):
    call, operands, grad = case(op, dtype=torch.float32)
    expected = run(call, dynconv, operands, grad)
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.repeat_interleave(2, 3)[..., ::2],
    ):
        changed = [change(t) if t.dim() == 4 else t for t in operands]
        actual = run(call, dynconv, changed, change(grad))
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", OPS)
def test_only_what_is_asked_for_is_differentiated(op):
    call, operands, grad = case(op, dtype=torch.float32)
    expected = run(call, dynconv, operands, grad)[1:]
    for which in range(len(operands)):
        leaves = [t.clone().requires_grad_(n == which) for n, t in enumerate(operands)]
        found = torch.autograd.grad(call(dynconv, *leaves), leaves[which], grad)[0]
        assert torch.equal(found, expected[which])


def test_flops():
    for op, forward, backward in (("conv", 2 * 84 * 216, 2), ("aggregate", 8 * 84 * 6 * 9, 2)):
        call, operands, _ = case(op)
        leaves = [t.requires_grad_() for t in operands]
        with FlopCounterMode(display=False) as counter:
            output = call(dynconv, *leaves)
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        assert counter.get_total_flops() == backward * forward


class TestRegistration:
    WHERE = ((1, 1), (1, 1), (1, 1), "cpu")

    def test_opcheck_conv(self):
        _, operands, grad = case(n=1, size=(4, 5), groups=2)
        leaves = [t.requires_grad_() for t in operands]
        op = torch.ops.dynconv.deform_conv2d.default
        torch.library.opcheck(op, (*leaves, *self.WHERE))
        torch.library.opcheck(op, (*leaves[:3], None, None, *self.WHERE))
        input, offset, weight, _, mask = (t.detach() for t in operands)
        backward = torch.ops.dynconv.deform_conv2d_backward.default
        for wanted in ([True] * 5, [False, True, False, True, False], [True, False, True, False, False]):
            torch.library.opcheck(backward, (grad, input, offset, weight, mask, *self.WHERE, wanted))

    def test_opcheck_aggregate(self):
        _, operands, grad = case("aggregate", n=1, size=(4, 5))
        leaves = [t.requires_grad_() for t in operands]
        torch.library.opcheck(torch.ops.dynconv.deform_aggregate2d.default, (*leaves, (3, 3), *self.WHERE))
        backward = torch.ops.dynconv.deform_aggregate2d_backward.default
        plain = [t.detach() for t in operands]
        for wanted in ([True] * 3, [False, True, False]):
            torch.library.opcheck(backward, (grad, *plain, (3, 3), *self.WHERE, wanted))

    def test_opcheck_normalize_taps(self):
        weights = torch.randn(1, 18, 4, 5, dtype=torch.float64).requires_grad_()
        torch.library.opcheck(torch.ops.dynconv.normalize_taps.default, (weights, 9, "softmax"))
        grad = torch.randn(1, 18, 4, 5, dtype=torch.float64)
        backward = torch.ops.dynconv.normalize_taps_backward.default
        torch.library.opcheck(backward, (grad, weights.detach(), 9, "l2"))


@pytest.mark.parametrize("op, normalization", [("conv", None), ("aggregate", "softmax")])
def test_compile_forward_and_backward(op, normalization):
    call, operands, grad = case(op, dtype=torch.float32, normalization=normalization)
    compiled = torch.compile(lambda module, *t: call(module, *t) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    doubled = lambda module, *t: call(module, *t) * 2
    expected, actual = run(doubled, dynconv, operands, grad), run(compiled, dynconv, operands, grad)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    torch._dynamo.reset()


def test_autocast():
    """In float32, whatever comes: half types would move the samples."""
    for op in OPS:
        call, operands, _ = case(op, dtype=torch.float32)
        leaves = [t.requires_grad_() for t in operands]
        with torch.autocast("cpu", torch.bfloat16):
            output = call(dynconv, *leaves)
            narrow = call(dynconv, leaves[0].bfloat16(), *leaves[1:])
        assert torch.equal(output, call(dynconv, *leaves))
        assert narrow.dtype == torch.bfloat16
        output.sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own, at the first dual tensor
@pytest.mark.parametrize("op, normalization", [("conv", None), ("aggregate", None), ("aggregate", "softmax")])
def test_other_derivatives_are_refused(op, normalization):
    """Forward mode, even where no tensor asks for a gradient, and the second derivative."""
    call, operands, _ = case(op, normalization=normalization)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in operands]
        with pytest.raises((RuntimeError, NotImplementedError), match=r"forward mode AD|jvp"):
            call(dynconv, *duals)
    leaves = [t.requires_grad_() for t in operands]
    (grad,) = torch.autograd.grad(call(dynconv, *leaves).square().sum(), leaves[-1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


BAD = {
    "input: expected a tensor, got int": dict(input=1),
    "input: expected a strided tensor, got torch.sparse_coo": dict(input=torch.ones(2, 6, 6, 7).to_sparse()),
    "input: expected shape [N, C, H, W] with at least one channel, got [6, 7]": dict(input=torch.ones(6, 7)),
    "offset: expected shape [2, G * 18, 6, 7], got [2, 18, 6, 6]": dict(offset=torch.ones(2, 18, 6, 6)),
    "offset: expected G * 18 channels for a G that divides C = 6, got 9": dict(offset=torch.ones(2, 9, 6, 7)),
    "offset: expected G * 18 channels for a G that divides C = 6, got 72": dict(offset=torch.ones(2, 72, 6, 7)),
    "offset: expected torch.float32, the input's type, got torch.float64": dict(
        offset=torch.ones(2, 18, 6, 7).double()
    ),
    "weight: expected [Cout, C / groups, ...] for groups that divide C = 6 and Cout, got [4, 4, 3, 3]": dict(
        weight=torch.ones(4, 4, 3, 3)
    ),
    "weight: expected a shape [Cout, C / groups, kH, kW] of no zeros, got [4, 6, 3]": dict(weight=torch.ones(4, 6, 3)),
    "bias: expected shape [4], got [3]": dict(bias=torch.ones(3)),
    "mask: expected shape [2, 9, 6, 7], got [2, 1, 6, 7]": dict(mask=torch.ones(2, 1, 6, 7)),
    "mask: expected float32, float64, float16 or bfloat16, got torch.bool": dict(mask=torch.ones(2, 9, 6, 7) > 0),
    "stride: expected values of at least 1, got 0": dict(stride=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    _, (input, offset, weight, bias, mask), _ = case(dtype=torch.float32)
    arguments = dict(input=input, offset=offset, weight=weight, bias=bias, mask=mask, padding=1) | BAD[message]
    with pytest.raises((TypeError, ValueError)) as error:
        deform_conv2d(**arguments)
    assert str(error.value) == message


def test_bad_arguments_of_the_aggregation_are_named():
    _, (input, offset, weights), _ = case("aggregate", dtype=torch.float32)
    for name in ("max", "none"):
        with pytest.raises(ValueError, match=f"normalization: expected None, softmax, sigmoid or l2, got '{name}'"):
            deform_aggregate2d(input, offset, weights, kernel_size=3, padding=1, normalization=name)
    with pytest.raises(TypeError, match=r"normalization: expected None or a str, got \['l2'\]"):
        deform_aggregate2d(input, offset, weights, kernel_size=3, padding=1, normalization=["l2"])
    with pytest.raises(ValueError, match=r"weights: expected shape \[2, 9, 6, 7\], got \[2, 8, 6, 7\]"):
        deform_aggregate2d(input, offset, weights[:, :8], kernel_size=3, padding=1)


def test_the_reference_can_be_forced():
    for op in OPS:
        call, operands, _ = case(op)
        with dynconv.backend("reference"):
            result = call(dynconv, *operands)
        assert torch.equal(result, call(reference, *operands))
