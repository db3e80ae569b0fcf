"""dynamic_filter2d against the unfold formula: values, gradients, contract."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import dynconv
from dynconv import ActiveSites, dynamic_filter2d, reference
from dynconv._geometry import Geometry

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NORMALIZATIONS = ["softmax", "sigmoid", "l2"]


def integers(*shape, low=-2, high=3, dtype=torch.float32, seed=0):
    """Integer values: every sum is exact, whatever its order, so results must be equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(
    n=2, channels=10, groups=2, size=(6, 7), kernel_size=3, stride=1, padding=1, dilation=1, scale_factor=1,
    channel_filters=False, density=None, dtype=torch.float32, make=integers,
):  # fmt: skip
    """The operands input, filters and channel_filters, the output's gradient, and the options of the call."""
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    area = [length * scale_factor for length in geometry.output_size(*size)]
    taps = geometry.kernel[0] * geometry.kernel[1]
    operands = [
        make(n, channels, *size, dtype=dtype),
        make(n, groups * taps, *area, dtype=dtype, seed=1),
        make(n, channels, *geometry.kernel, dtype=dtype, seed=2) if channel_filters else None,
    ]
    options = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    options |= dict(scale_factor=scale_factor, mask=None)
    if density is not None:
        options["mask"] = torch.rand(n, 1, *area, generator=torch.Generator().manual_seed(3)) < density
    return operands, make(n, channels, *area, dtype=dtype, seed=4), options


def run(function, operands, grad, options):
    """[output, *gradients of the operands and of a floating mask]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands]
    input, filters, channel_filters = leaves
    mask = options["mask"]
    if torch.is_tensor(mask) and mask.is_floating_point():
        mask = mask.detach().clone().requires_grad_()
        leaves.append(mask)
    output = function(input, filters, **options | {"channel_filters": channel_filters, "mask": mask})
    output.backward(grad)
    return [output.detach(), *(t.grad for t in leaves if t is not None)]


def moved(target, operands, grad, options):
    to = lambda t: t.to(target.device) if torch.is_tensor(t) else t
    return [to(t) for t in operands], to(grad), {name: to(value) for name, value in options.items()}


def assert_equal_to_reference(target, operands, grad, options):
    double = lambda t: t.double() if torch.is_tensor(t) and t.is_floating_point() else t
    exact = {name: double(value) for name, value in options.items()}
    expected = run(reference.dynamic_filter2d, [double(t) for t in operands], grad.double(), exact)
    with target.use():
        actual = run(dynamic_filter2d, *moved(target, operands, grad, options))
    assert len(actual) == len(expected)
    for which, (want, have) in enumerate(zip(expected, actual, strict=True)):
        assert have.dtype == grad.dtype, which
        assert torch.equal(have.cpu(), want.to(grad.dtype)), f"{which}: {(have.cpu() - want).abs().max()}"
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_filters", [False, True], ids=["filters", "two filters"])
@pytest.mark.parametrize("density", [None, 0.4], ids=["all sites", "active sites"])
def test_values_and_gradients_equal_the_reference(target, dtype, channel_filters, density):
    target.skip_unless(dtype)
    wide = dict(channels=40, groups=2) if target.backend == "cpu" else dict(size=(4, 3), channels=6)
    assert_equal_to_reference(target, *case(dtype=dtype, channel_filters=channel_filters, density=density, **wide))


GEOMETRIES = {
    "1x1": dict(kernel_size=1, padding=0),
    "2x4": dict(kernel_size=(2, 4), padding=(1, 2)),
    "7x7 on a smaller input": dict(kernel_size=7, padding=3, size=(5, 4)),
    "stride 2": dict(stride=2),
    "stride 3 x 2 without padding": dict(stride=(3, 2), padding=0, size=(8, 9)),
    "dilation 2 x 3": dict(dilation=(2, 3), padding=(2, 3)),
    "same": dict(kernel_size=(2, 4), padding="same"),
    "padding beyond the kernel": dict(padding=4),
    "upsampling": dict(scale_factor=2, kernel_size=5, padding=2),
    "upsampling by 3 with a stride": dict(scale_factor=3, stride=2, dilation=2, padding=1),
}
KINDS = {
    "filters": dict(),
    "two filters": dict(channel_filters=True),
    "active sites": dict(density=0.3),
    "two filters, active sites": dict(channel_filters=True, density=0.3),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("change", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(change, kind):
    assert_equal_to_reference(Target("cpu"), *case(**change, **kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [KINDS["filters"], KINDS["two filters, active sites"]], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["2x4", "stride 2", "upsampling by 3 with a stride"])
def test_geometries_of_triton(name, kind):
    assert_equal_to_reference(Target("triton"), *case(n=1, channels=4, **{"size": (4, 5)} | GEOMETRIES[name], **kind))


CHANNELS = {
    "one": dict(channels=1, groups=1),
    "three, a group each": dict(channels=3, groups=3),
    "a vector and some": dict(channels=19, groups=1),
    "groups of a vector and some": dict(channels=38, groups=2),
    "groups of 16": dict(channels=64, groups=4),
    "no sample": dict(n=0),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("change", CHANNELS.values(), ids=CHANNELS)
def test_channels(change, kind):
    assert_equal_to_reference(Target("cpu"), *case(**change, **kind))


@pytest.mark.parametrize("kind", [KINDS["two filters"], KINDS["active sites"]], ids=["two filters", "active sites"])
def test_a_large_output(kind):
    """Which is written around the cache: 8 MiB and more, in rows of whole cache lines."""
    operands, grad, options = case(n=1, channels=64, groups=2, size=(190, 181), **kind)
    assert grad.numel() * 4 > 2**23
    expected = run(reference.dynamic_filter2d, operands, grad, options)
    actual = run(dynamic_filter2d, operands, grad, options)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["none", "all"])
def test_no_site_and_all_sites(density):
    assert_equal_to_reference(Target("cpu"), *case(n=1, channels=4, size=(4, 3), channel_filters=True, density=density))


def test_an_empty_sample():
    operands, grad, options = case(n=3, channels=4, size=(4, 3), channel_filters=True, density=0.5)
    options["mask"][1] = False
    assert_equal_to_reference(Target("cpu"), operands, grad, options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_geometry(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    kernel, dilation, padding = ((draw(1, high), draw(1, high)) for high in (4, 3, 4))
    reach = [d * (k - 1) + 1 - 2 * (p - 1) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    groups = draw(1, 3)
    change = dict(
        n=draw(1, 3), groups=groups, channels=groups * draw(1, 20), size=[max(1, r) + draw(0, 6) for r in reach],
        kernel_size=kernel, dilation=dilation, padding=tuple(p - 1 for p in padding), stride=(draw(1, 3), draw(1, 3)),
        scale_factor=draw(1, 3), channel_filters=data.draw(st.booleans()),
        density=data.draw(st.sampled_from([None, 0.1, 0.5, 1.0])),
    )  # fmt: skip
    assert_equal_to_reference(Target("cpu"), *case(**change))


def bounded(actual, operands, grad, options):
    """Whether each result lies within the bound of a sum of T products, of which the normalised weight is one factor.

    |error| <= (T + 30) * eps * the same sum of absolute values (Higham, 2002, section 3.1), and the output's own
    rounding. 30 covers the weight: the exponential, good to 2 eps at |x| <= 8 with its argument's rounding of 8 eps,
    the sum of 9 to 49 of them added in 8 lanes, and the division. A weight's gradient is w * (dw - dot), so what it is
    bounded by has the magnitude of both terms.
    """
    name = options.get("normalization") or "none"
    input, filters, channel_filters = (None if t is None else t.double() for t in operands)
    expected = run(reference.dynamic_filter2d, (input, filters, channel_filters), grad.double(), options)
    # The magnitudes, from weights taken as they are.
    geometry = Geometry.of(*(options[key] for key in ("kernel_size", "stride", "padding", "dilation")))
    taps = geometry.kernel[0] * geometry.kernel[1]
    grouped = filters.unflatten(1, (-1, taps))
    weights = reference.NORMALIZATIONS[name](grouped, dim=2)
    plain = options | {"normalization": None}
    absolute = [input.abs(), weights.abs().flatten(1, 2), None if channel_filters is None else channel_filters.abs()]
    sizes = run(reference.dynamic_filter2d, absolute, grad.double().abs(), plain)
    if name != "none":
        own = sizes[2].unflatten(1, (-1, taps))
        dot = (own * weights.abs()).sum(2, keepdim=True)
        slope = {"softmax": weights, "sigmoid": weights, "l2": 1 / grouped.norm(dim=2, keepdim=True)}[name].abs()
        sizes[2] = (slope * (own + dot * (weights.abs() if name == "l2" else 1))).flatten(1, 2)
    eps = max(torch.finfo(grad.dtype).eps, 0) if grad.dtype == torch.float64 else torch.finfo(torch.float32).eps
    channels = input.shape[1] // grouped.shape[1]
    sites = filters[0, 0].numel()
    terms = [taps, taps * options["scale_factor"] ** 2, channels + 2 * taps, sites]
    for which, (have, want, size, count) in enumerate(zip(actual, expected, sizes, terms)):
        bound = (count + 30) * eps * size + torch.finfo(grad.dtype).eps * want.abs()
        if grad.dtype == torch.float16:
            bound = bound + 2.0**-24  # half of its smallest step below 2^-14, where it has no more digits to lose
        error = (have.cpu().double() - want).abs()
        assert (error <= bound).all(), f"{which}: {(error / bound).max()} of the bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalization", [None, *NORMALIZATIONS])
def test_normalised_filters_lie_within_the_bound(normalization, dtype):
    operands, grad, options = case(
        channels=24, size=(9, 8), channel_filters=True, density=0.6, dtype=dtype, make=normal
    )
    options["normalization"] = normalization
    bounded(run(dynamic_filter2d, operands, grad, options), operands, grad, options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("normalization", "dtype"),
    [("softmax", torch.float16), ("softmax", torch.float32), ("sigmoid", torch.float32), ("l2", torch.float64)],
    ids=str,
)
def test_normalised_filters_of_triton_lie_within_the_bound(normalization, dtype):
    operands, grad, options = case(
        n=1, channels=4, size=(3, 4), channel_filters=True, density=0.6, dtype=dtype, make=normal
    )
    options["normalization"] = normalization
    target = Target("triton")
    with target.use():
        actual = run(dynamic_filter2d, *moved(target, operands, grad, options))
    bounded(actual, operands, grad, options)


@pytest.mark.parametrize("kernel_size", [1, 5, 7])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalised_filters_of_any_size(normalization, kernel_size):
    operands, grad, options = case(
        channels=6, kernel_size=kernel_size, padding=kernel_size // 2, scale_factor=2, make=normal
    )
    options["normalization"] = normalization
    bounded(run(dynamic_filter2d, [None if t is None else t.float() for t in operands], grad.float(), options),
            [None if t is None else t.float() for t in operands], grad.float(), options)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_far_apart(target, dtype):
    """Softmax of large values and of -inf, the sigmoid of large ones, a filter of zeros divided by its norm."""
    operands, _, options = case(n=1, channels=4, size=(3, 4), dtype=dtype)
    filters = operands[1]
    filters[:, 0:9] = 1000 * filters[:, 0:9]
    filters[:, 9:13] = -torch.inf
    for normalization in NORMALIZATIONS:
        given = filters.clone()
        if normalization == "l2":
            given[:, 9:18] = 0
        options["normalization"] = normalization
        expected = reference.dynamic_filter2d(operands[0].double(), given.double(), **options)
        with target.use():
            actual = dynamic_filter2d(operands[0].to(target.device), given.to(target.device), **options).cpu()
        assert expected.isfinite().all()
        assert (actual - expected).abs().max() <= 40 * torch.finfo(dtype).eps * operands[0].abs().max() * 9


def test_the_reference_is_the_unfold_formula():
    (input, filters, channel_filters), _, options = case(channels=6, groups=2, channel_filters=True)
    columns = F.unfold(input, 3, padding=1).view(2, 2, 3, 9, 6, 7) * channel_filters.view(2, 2, 3, 9, 1, 1)
    expected = (columns * filters.view(2, 2, 1, 9, 6, 7)).sum(3).view(2, 6, 6, 7)
    options["channel_filters"] = channel_filters
    assert torch.equal(reference.dynamic_filter2d(input, filters, **options), expected)


def test_the_same_filter_everywhere_is_a_depthwise_convolution():
    """An independent oracle: F.conv2d, with a stride and dilation."""
    input = integers(2, 5, 9, 8)
    weight = integers(5, 1, 3, 3, seed=1)
    expected = F.conv2d(input, weight, None, 2, 2, 2, 5)
    filters = weight.reshape(1, 45, 1, 1).expand(2, -1, *expected.shape[2:])
    result = dynamic_filter2d(input, filters, kernel_size=3, stride=2, padding=2, dilation=2)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("change", [dict(), dict(stride=2, channel_filters=True), dict(scale_factor=2)], ids=str)
@pytest.mark.parametrize("normalization", [None, *NORMALIZATIONS])
def test_gradcheck(normalization, change):
    operands, _, options = case(n=1, channels=4, size=(3, 4), make=normal, dtype=torch.float64, density=0.7, **change)
    gate = torch.where(options["mask"], 1 + normal(*options["mask"].shape, seed=7).abs(), 0)
    leaves = [t.requires_grad_() for t in (*operands, gate) if t is not None]

    def call(input, filters, *rest):
        closed = torch.where(options["mask"], rest[-1], 0)  # a finite difference must not open a closed gate
        second = rest[0] if len(rest) == 2 else None
        chosen = {"normalization": normalization, "channel_filters": second, "mask": closed}
        return dynamic_filter2d(input, filters, **options | chosen)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_multiplies_and_gets_a_gradient(dtype):
    operands, grad, options = case(dtype=dtype, channels=6, density=0.5, make=lambda *a, **k: integers(*a, **k) % 2)
    options["mask"] = torch.where(options["mask"], 2.0, 0.0).to(dtype)
    assert_equal_to_reference(Target("cpu"), operands, grad, options)


@pytest.mark.parametrize("normalization", [None, "softmax"])
def test_what_is_skipped_is_not_read(target, normalization):
    operands, grad, options = case(n=2, channels=4, size=(6, 5), channel_filters=True)
    mask = torch.zeros(2, 1, 6, 5, dtype=torch.bool)
    mask[0, 0, :2, :2] = True
    options |= dict(mask=mask, normalization=normalization)
    with target.use():
        expected = run(dynamic_filter2d, *moved(target, operands, grad, options))
    read = ActiveSites(mask).touched((6, 5), 3, 1, 1).mask
    nan = float("nan")
    dirty = [torch.where(read, operands[0], nan), torch.where(mask, operands[1], nan), operands[2]]
    with target.use():
        actual = run(dynamic_filter2d, *moved(target, dirty, torch.where(mask, grad, nan), options))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(t.isfinite().all() for t in actual)


def test_nan_reaches_only_what_reads_it():
    (input, filters, _), _, options = case(n=1, channels=2, groups=1, size=(5, 5))
    input[0, :, 2, 2] = float("nan")
    result = dynamic_filter2d(input, filters, **options)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(result[0, 0].isnan(), expected)


def test_a_batch_equals_its_samples():
    operands, grad, options = case(n=3, channels=20, size=(9, 8), channel_filters=True, density=0.5, make=normal)
    together = run(dynamic_filter2d, [t.float() for t in operands], grad.float(), options)
    for n in range(3):
        alone = [t[n : n + 1].float() for t in operands]
        single = run(dynamic_filter2d, alone, grad[n : n + 1].float(), options | {"mask": options["mask"][n : n + 1]})
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(together, single, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_read_does_not_meet_the_channels_filters(stride):
    """NaN of a channel's filter reaches the sites that read by its tap, and the pixels that are read by it, alone."""
    input = torch.ones(1, 1, 5, 5, requires_grad=True)
    channel_filters = torch.ones(1, 1, 3, 3)
    channel_filters[..., 0, 0] = float("nan")
    size = (input.shape[2] - 1) // stride + 1
    output = dynamic_filter2d(
        input, torch.ones(1, 9, size, size), kernel_size=3, padding=1, stride=stride, channel_filters=channel_filters
    )
    output.sum().backward()
    sites, pixels = output[0, 0].isnan(), input.grad[0, 0].isnan()
    lines = torch.arange(size) * stride >= 1  # tap (0, 0) is inside
    assert torch.equal(sites, lines.view(-1, 1) & lines)
    read = (torch.arange(5) + 1) % stride == 0
    read &= (torch.arange(5) + 1) // stride < size
    assert torch.equal(pixels, read.view(-1, 1) & read)


def test_the_same_bits_on_any_number_of_threads():
    operands, grad, options = case(channels=24, size=(40, 41), channel_filters=True, density=0.7, make=normal)
    operands, grad = [t.float() for t in operands], grad.float()
    options["normalization"] = "softmax"
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(run(dynamic_filter2d, operands, grad, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_no_uninitialised_memory_is_read():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        for kind in KINDS.values():
            operands, grad, options = case(channels=11, groups=1, scale_factor=2, make=normal, **kind)
            results = run(dynamic_filter2d, operands, grad, options | {"normalization": "softmax"})
            assert all(t.isfinite().all() for t in results)
    finally:
        torch.use_deterministic_algorithms(False)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "with an offset": lambda t: F.pad(t, (1, 0))[..., 1:],
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(change):
    operands, grad, options = case(channel_filters=True, density=0.5)
    operands = [change(t) for t in operands]
    grad = change(grad)
    leaves = [t.detach().requires_grad_() for t in operands]
    expected = run(reference.dynamic_filter2d, operands, grad, options)
    output = dynamic_filter2d(*leaves[:2], channel_filters=leaves[2], **options)
    grads = torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip([output, *grads], expected, strict=True))


def test_shared_sites():
    operands, grad, options = case(density=0.5)
    expected = run(dynamic_filter2d, operands, grad, options)
    actual = run(dynamic_filter2d, operands, grad, options | {"mask": ActiveSites(options["mask"])})
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_only_what_is_asked_for_is_differentiated():
    operands, grad, options = case(channel_filters=True)
    expected = run(dynamic_filter2d, operands, grad, options)[1:]
    for which in range(3):
        leaves = [t.clone().requires_grad_(n == which) for n, t in enumerate(operands)]
        output = dynamic_filter2d(*leaves[:2], channel_filters=leaves[2], **options)
        assert torch.equal(torch.autograd.grad(output, leaves[which], grad)[0], expected[which])


def test_the_forward_needs_no_memory_of_its_own():
    """Beside the output: lists for each thread, well below a tenth of operands and result; unfold needs 49 times."""
    operands, _, options = case(n=1, channels=64, groups=4, size=(56, 56), kernel_size=7, padding=3)
    input, filters = (t.contiguous(memory_format=torch.channels_last) for t in operands[:2])
    dynamic_filter2d(input, filters, **options)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = dynamic_filter2d(input, filters, **options)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    size = 4 * (input.numel() + filters.numel() + output.numel())
    assert 4 * output.numel() <= allocated <= 4 * output.numel() + 0.1 * size


def test_flops_fall_with_the_sites():
    operands, _, options = case(n=1, channel_filters=True, density=0.4)
    leaves = [t.requires_grad_() for t in operands]
    options |= {"channel_filters": leaves[2]}
    expected = 3 * int(options["mask"].sum()) * 10 * 9
    with FlopCounterMode(display=False) as counter:
        output = dynamic_filter2d(*leaves[:2], **options)
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 3 * expected


class TestRegistration:
    def arguments(self, change):
        operands, grad, options = case(n=1, channels=4, size=(4, 5), **change)
        sites = []
        if options["mask"] is not None:
            active = ActiveSites(options["mask"])
            sites = [active.mask, active.index, active.count]
        where = (tuple(grad.shape[2:]), (3, 3), (1, 1), (1, 1), (1, 1), 1, "softmax", "cpu")
        return operands, grad, sites, where

    @pytest.mark.parametrize("change", KINDS.values(), ids=KINDS)
    def test_opcheck(self, change):
        operands, grad, sites, where = self.arguments(change)
        leaves = [None if t is None else t.requires_grad_() for t in operands]
        torch.library.opcheck(torch.ops.dynconv.dynamic_filter2d.default, (*leaves, sites, *where))
        operands, grad, sites, where = self.arguments(change)
        for wanted in ([True, True, operands[2] is not None], [False, True, False], [True, False, False]):
            arguments = (grad, *operands, sites, *where, wanted)
            torch.library.opcheck(torch.ops.dynconv.dynamic_filter2d_backward.default, arguments)

    def test_second_derivative_is_refused(self):
        operands, _, options = case()
        leaves = [t.requires_grad_() for t in operands[:2]]
        output = dynamic_filter2d(*leaves, **options)
        (grad,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="dynamic_filter2d: differentiable once"):
            grad.sum().backward()


@pytest.mark.parametrize(("dynamic", "backend"), [(False, "inductor"), (True, "aot_eager")], ids=["static", "dynamic"])
def test_compile_forward_and_backward(dynamic, backend):
    def block(input, filters, channel_filters, mask, **options):
        input = torch.relu(input)
        return 2 * dynamic_filter2d(input, filters, channel_filters=channel_filters, mask=mask, **options)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in ((6, 5), (7, 9)):
        operands, grad, options = case(size=size, channel_filters=True, density=0.5)
        expected, actual = run(block, operands, grad, options), run(compiled, operands, grad, options)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    torch._dynamo.reset()


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, input, filters, mask):
            return dynamic_filter2d(input, filters, kernel_size=3, padding=1, mask=mask)

    operands, _, options = case(density=0.5)
    arguments = (*operands[:2], options["mask"])
    program = torch.export.export(Layer(), arguments)
    assert torch.equal(program.module()(*arguments), Layer()(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_conv2d(dtype):
    operands, _, options = case(channel_filters=True)
    leaves = [t.requires_grad_() for t in operands]
    with torch.autocast("cpu", dtype):
        output = dynamic_filter2d(*leaves[:2], **options | {"channel_filters": leaves[2]})
    assert output.dtype == dtype
    output.float().sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3


BAD = {
    "input: expected a tensor, got list": dict(input=[1]),
    "input: expected float32, float64, float16 or bfloat16, got torch.int64": dict(
        input=torch.ones(2, 10, 6, 7).long()
    ),
    "input: expected shape [N, C, H, W] with at least one channel, got [6, 7]": dict(input=torch.ones(6, 7)),
    "input: expected shape [N, C, H, W] with at least one channel, got [2, 0, 6, 7]": dict(
        input=torch.ones(2, 0, 6, 7)
    ),
    "filters: expected a tensor, got NoneType": dict(filters=None),
    "filters: expected float32, float64, float16 or bfloat16, got torch.bool": dict(
        filters=torch.ones(2, 18, 6, 7) > 0
    ),
    "filters: expected shape [2, G * 9, 6, 7], got [2, 18, 6, 6]": dict(filters=torch.ones(2, 18, 6, 6)),
    "filters: expected shape [2, G * 9, 6, 7], got [1, 18, 6, 7]": dict(filters=torch.ones(1, 18, 6, 7)),
    "filters: expected G * 9 channels for a G that divides C = 10, got 10": dict(filters=torch.ones(2, 10, 6, 7)),
    "filters: expected G * 9 channels for a G that divides C = 10, got 27": dict(filters=torch.ones(2, 27, 6, 7)),
    "filters: expected torch.float32, the input's type, got torch.float64": dict(
        filters=torch.ones(2, 18, 6, 7).double()
    ),
    "channel_filters: expected shape [2, 10, 3, 3], got [10, 3, 3]": dict(channel_filters=torch.ones(10, 3, 3)),
    "kernel_size: expected an int or a pair of ints, got 3.0": dict(kernel_size=3.0),
    "stride: expected values of at least 1, got 0": dict(stride=0),
    "input: expected a padded height of at least 11, the reach of the kernel, got 8": dict(dilation=5),
    "scale_factor: expected an int, got 2.0": dict(scale_factor=2.0),
    "scale_factor: expected at least 1, got 0": dict(scale_factor=0),
    "normalization: expected None, softmax, sigmoid or l2, got 'max'": dict(normalization="max"),
    "mask: expected a bool or floating tensor, got torch.int64 (.bool() makes a bool one)": dict(
        mask=torch.ones(2, 1, 6, 7).long()
    ),
    "mask: expected a shape that broadcasts to [2, 1, 6, 7], got [2, 1, 6, 6]; "
    "a mask has the height and width of the output, not of the input": dict(mask=torch.ones(2, 1, 6, 6) > 0),
    "mask: expected sites of [2, 1, 6, 7], got (2, 6, 6)": dict(mask=ActiveSites(torch.ones(2, 1, 6, 6) > 0)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    (input, filters, _), _, options = case()
    arguments = {"input": input, "filters": filters} | options | BAD[message]
    with pytest.raises((TypeError, ValueError)) as error:
        dynamic_filter2d(**arguments)
    assert str(error.value) == message


def test_meta_tensors_have_the_right_shape():
    operands, _, options = case(scale_factor=2)
    result = dynamic_filter2d(*(t.to("meta") for t in operands[:2]), **options)
    assert result.shape == (2, 10, 12, 14) and result.is_contiguous(memory_format=torch.channels_last)


def test_the_reference_can_be_forced():
    operands, _, options = case(density=0.5)
    with dynconv.backend("reference"):
        result = dynamic_filter2d(*operands[:2], **options)
    assert torch.equal(result, reference.dynamic_filter2d(*operands[:2], **options))
