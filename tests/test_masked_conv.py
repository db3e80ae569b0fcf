"""masked_conv2d on every backend against the dense reference: values, gradients, contract."""

import itertools
import os
import platform
import subprocess
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU, Target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dynconv
from dynconv import ActiveSites, masked_conv2d, reference
from dynconv.ops._common import allow_tf32

NAMES = ("input", "weight", "bias", "gate", "inactive")


def integers(*shape, low=-3, high=4, dtype=torch.float32, seed=0):
    """Integer values: every backend's sums are exact, whatever their order, so results must be equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(n, height, width, density=0.5, seed=0):
    return torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(seed)) < density


def case(
    n=2, cin=5, cout=7, size=(6, 5), kernel=(3, 3), stride=1, padding=1, dilation=1, groups=1, dtype=torch.float32
):  # fmt: skip
    """Integer-valued operands, a gate among them, of one geometry."""
    input = integers(n, cin, *size, dtype=dtype)
    weight = integers(cout, cin // groups, *kernel, dtype=dtype, seed=1)
    bias = integers(cout, dtype=dtype, seed=2)
    shape = F.conv2d(input.float(), weight.float(), None, stride, padding, dilation, groups).shape
    mask = random_mask(n, *shape[2:])
    gate = torch.where(mask, integers(n, 1, *shape[2:], low=1, seed=3), 0).to(dtype)
    inactive = integers(*shape, dtype=dtype, seed=4)
    grad = integers(*shape, dtype=dtype, seed=5)
    return (input, weight, bias, gate, inactive), grad, (stride, padding, dilation, groups), mask


def run(function, operands, grad, geometry, mask):
    """[output, *gradients of whatever operand there is]; the mask where there is no gate."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands]
    input, weight, bias, gate, inactive = leaves
    chosen = mask if gate is None else gate
    output = function(input, weight, bias, *geometry, mask=chosen, inactive=inactive)
    output.backward(grad)
    return [output.detach(), *(t.grad for t in leaves if t is not None)]


def assert_equal_to_reference(target, operands, grad, geometry, mask):
    to = lambda t: None if t is None else t.to(target.device)
    double = [None if t is None else t.double() for t in operands]
    expected = run(reference.masked_conv2d, double, grad.double(), geometry, mask)
    with target.use():
        actual = run(masked_conv2d, [to(t) for t in operands], to(grad), geometry, to(mask))
    names = ["output", *(name for name, t in zip(NAMES, operands, strict=True) if t is not None)]
    for name, want, have in zip(names, expected, actual, strict=True):
        assert have.dtype == grad.dtype, name
        assert torch.equal(have.cpu(), want.to(grad.dtype)), f"{name}: {(have.cpu() - want).abs().max()}"


@pytest.mark.parametrize("gated", [False, True], ids=["mask", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_equal_the_reference(target, dtype, gated):
    target.skip_unless(dtype)
    operands, grad, geometry, mask = case(dtype=dtype, cin=3, cout=4, size=(5, 4))
    if not gated:
        operands = (*operands[:3], None, operands[4])
    assert_equal_to_reference(target, operands, grad, geometry, mask)


GEOMETRIES = {
    "1x1": {"kernel": (1, 1), "padding": 0},
    "1x1-stride-2": {"kernel": (1, 1), "padding": 0, "stride": 2},
    "stride-2": {"stride": 2},
    "stride-3-1": {"stride": (3, 1)},
    "dilation-2": {"dilation": 2, "padding": 2},
    "even-same": {"kernel": (2, 4), "padding": "same"},
    "valid": {"padding": "valid"},
    "5x2": {"kernel": (5, 2), "padding": (2, 0)},
    "kernel-over-input": {"size": (2, 3), "kernel": (5, 5), "padding": 2},
    "one-pixel": {"size": (1, 1)},
    "one-channel": {"cin": 1, "cout": 1},
    "17-to-33-channels": {"cin": 17, "cout": 33, "size": (3, 4)},
    "no-sample": {"n": 0},
    "stride-over-kernel": {"kernel": (1, 2), "stride": 3, "padding": 0},
    "groups": {"cin": 6, "cout": 8, "groups": 2},
    "groups-of-16": {"cin": 48, "cout": 48, "groups": 3, "size": (4, 5), "stride": 2},
    "groups-of-1-to-3": {"cin": 4, "cout": 12, "groups": 4},
    "groups-1x1": {"cin": 8, "cout": 4, "groups": 2, "kernel": (1, 1), "padding": 0},
    "depthwise": {"cin": 7, "cout": 7, "groups": 7},
    "depthwise-wide": {"cin": 52, "cout": 52, "groups": 52, "size": (5, 4)},
    "depthwise-5x5-stride-2": {"cin": 18, "cout": 18, "groups": 18, "kernel": (5, 5), "stride": 2, "padding": 2},
    "depthwise-uneven": {
        "cin": 3,
        "cout": 3,
        "groups": 3,
        "kernel": (2, 4),
        "stride": (1, 2),
        "padding": (0, 3),
        "dilation": (2, 1),
    },
    "depthwise-1x1": {"cin": 5, "cout": 5, "groups": 5, "kernel": (1, 1), "padding": 0},
}


# F.conv2d says so of its own dense path, when the test asks it for the output's shape.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(target, name):
    assert_equal_to_reference(target, *case(**GEOMETRIES[name]))


@st.composite
def geometries(draw):
    pair = lambda low, high: draw(st.tuples(st.integers(low, high), st.integers(low, high)))
    size, kernel, stride, dilation = pair(1, 8), pair(1, 4), pair(1, 3), pair(1, 2)
    padding = pair(0, 3)
    if any(s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        padding = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    groups, cin, cout = draw(st.integers(1, 6)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    if groups > 1:
        cin, cout = draw(st.sampled_from([1, 1, 3, 16])) * groups, draw(st.sampled_from([1, 1, 2, 17])) * groups
    return {
        "n": draw(st.integers(1, 3)), "cin": cin, "cout": cout, "groups": groups,
        "size": size, "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation,
    }  # fmt: skip


def check_random_case(backend, geometry, density, layout, seed):
    operands, grad, where, _ = case(**geometry)
    mask = random_mask(grad.shape[0], *grad.shape[2:], density, seed)
    gate = torch.where(mask, integers(*mask.shape, low=1, seed=3), 0)
    options = (operands[2], gate, operands[4])
    present = [t if seed >> bit & 1 else None for bit, t in enumerate(options)]
    operands = (LAYOUTS[layout](operands[0]), LAYOUTS[layout](operands[1]), *present)
    assert_equal_to_reference(Target(backend), operands, LAYOUTS[layout](grad), where, mask)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "offset": lambda t: torch.cat([t[:, :1], t], 1).contiguous(memory_format=torch.channels_last)[:, 1:],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
densities = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


@settings(max_examples=80, deadline=None)
@given(geometries(), densities, st.sampled_from(list(LAYOUTS)), st.integers(0, 99))
def test_random_cases_on_the_cpu(geometry, density, layout, seed):
    check_random_case("cpu", geometry, density, layout, seed)


@pytest.mark.gpu
@settings(max_examples=6, deadline=None)
@given(geometries(), densities, st.sampled_from(list(LAYOUTS)), st.integers(0, 99))
def test_random_cases_in_triton(geometry, density, layout, seed):
    check_random_case("triton", geometry, density, layout, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(target, layout):
    operands, grad, geometry, mask = case()
    change = LAYOUTS[layout]
    operands = (change(operands[0]), change(operands[1]), operands[2], operands[3], change(operands[4]))
    assert_equal_to_reference(target, operands, change(grad), geometry, mask)


# The CPU kernels cut what is larger than a tile, a chunk, a band or the cache: each cut once.
LARGE = {
    "channel-groups": {"n": 1, "cin": 130, "cout": 100, "size": (9, 9)},
    "depth-blocks": {"n": 1, "cin": 400, "cout": 20, "size": (6, 7)},
    "packed-in-place": {"n": 1, "cin": 40, "cout": 300, "size": (5, 5)},
    "groups-of-16": {"n": 1, "cin": 640, "cout": 640, "groups": 40, "size": (7, 7)},
    "wide-groups-share-chunks": {"n": 1, "cin": 640, "cout": 640, "groups": 16, "size": (7, 7)},
    "few-rows-wide-groups": {"n": 1, "cin": 108, "cout": 216, "groups": 3, "size": (3, 3)},
    "group-blocks": {"n": 1, "cin": 30, "cout": 34, "groups": 2, "size": (24, 24)},
    "depthwise-channels": {"n": 1, "cin": 700, "cout": 700, "groups": 700, "size": (9, 9)},
    "depthwise-blocks": {"n": 1, "cin": 20, "cout": 20, "groups": 20, "size": (30, 30)},
    "bands": {"n": 2, "cin": 3, "cout": 4, "size": (40, 12), "kernel": (5, 3), "padding": (2, 1)},
    "bands-stride": {
        "n": 1,
        "cin": 3,
        "cout": 4,
        "size": (90, 20),
        "kernel": (4, 2),
        "stride": (2, 1),
        "dilation": (3, 1),
    },
}


@pytest.mark.parametrize("name", LARGE)
def test_what_the_cpu_cuts_into_pieces(name):
    assert_equal_to_reference(Target("cpu"), *case(**LARGE[name]))


def test_narrower_vectors():
    """The AVX2 tiles on any x86 host: Numba is told to compile for one that has no AVX-512."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("Haswell is an x86 processor")
    from dynconv.cpu.llvm import build

    if build.VECTOR_BYTES <= 32:
        pytest.skip("this processor has no wider vectors: all other tests run the AVX2 tiles")
    with tempfile.TemporaryDirectory() as cache:
        features = "+64bit,+cx16,+popcnt,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
        processor = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
        environment = {**os.environ, **processor, "NUMBA_CACHE_DIR": cache, "DYNCONV_BACKEND": ""}
        lanes = "from dynconv.cpu.llvm import build; assert (build.VECTOR_BYTES, build.TILE_VECTORS) == (32, 2)"
        run_tests = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
        chosen = ["-q", "-p", "no:cacheprovider", __file__, "-k", "(pieces or values_and_gradients) and not triton"]
        subprocess.run(
            [sys.executable, "-c", f"{lanes}; {run_tests}", *chosen], env=environment, check=True, timeout=300
        )


def test_expanded_gradient(target):
    operands, grad, geometry, mask = case()
    assert_equal_to_reference(target, operands, torch.ones(()).expand_as(grad), geometry, mask)


@pytest.mark.parametrize("mask", ["empty", "full", "first-sample", "last-site", "broadcast-row"])
def test_special_masks(target, mask):
    operands, grad, geometry, _ = case(n=3)
    n, _, height, width = grad.shape
    masks = {
        "empty": torch.zeros(n, 1, height, width, dtype=torch.bool),
        "full": torch.ones(n, 1, height, width, dtype=torch.bool),
        "first-sample": (torch.arange(n) == 0).view(n, 1, 1, 1),
        "last-site": (torch.arange(n * height * width) == n * height * width - 1).view(n, 1, height, width),
        "broadcast-row": (torch.arange(height) == 2).view(height, 1),
    }
    assert_equal_to_reference(target, (*operands[:3], None, operands[4]), grad, geometry, masks[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_real_values_stay_within_the_bound(target, dtype):
    """Any order of K products and sums in float32 errs by at most K * eps * sum |x w|, then rounds once."""
    target.skip_unless(dtype)
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 24, 9, 8, generator=generator).to(dtype)
    weight = torch.randn(20, 24, 3, 3, generator=generator).to(dtype)
    mask = random_mask(2, 9, 8)
    with target.use():
        actual = masked_conv2d(*(t.to(target.device) for t in (input, weight)), padding=1, mask=mask.to(target.device))
    expected = reference.masked_conv2d(input.double(), weight.double(), padding=1, mask=mask)
    magnitude = reference.masked_conv2d(input.double().abs(), weight.double().abs(), padding=1, mask=mask)
    terms = weight[0].numel()
    bound = terms * torch.finfo(torch.float32).eps * magnitude
    if dtype != torch.float32:
        bound += torch.finfo(dtype).eps / 2 * (expected.abs() + bound)
    assert ((actual.cpu().double() - expected).abs() <= bound).all()
    assert (actual.cpu() != 0).any()


def test_gradcheck(target):
    operands, _, _, mask = case(n=1, cin=2, cout=2, size=(3, 4), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in operands]
    operands[3] = torch.where(mask, operands[3].abs() + 0.5, 0)
    # A finite difference must not move a skipped site's gate off zero: that would make the site active.
    leaves = [t.to(target.device).requires_grad_() for t in operands]
    on_device = mask.to(target.device)

    def function(input, weight, bias, gate, inactive):
        held = torch.where(on_device, gate, 0)
        return masked_conv2d(input, weight, bias, (1, 2), 1, mask=held[..., ::2], inactive=inactive[..., ::2])

    with target.use():
        # In the interpreter by random projections of the Jacobian: every element takes a minute.
        assert torch.autograd.gradcheck(function, leaves, fast_mode=target.is_interpreted)


def test_a_second_derivative_is_refused():
    operands, _, _, mask = case()
    input, weight = operands[0].requires_grad_(), operands[1].requires_grad_()
    output = masked_conv2d(input, weight, padding=1, mask=mask)
    # d/dweight of d/dinput exists although the loss is linear: it must not come out as "no gradient".
    (grad,) = torch.autograd.grad(output.sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_conv2d: differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_only_skipped_sites_read_reaches_nothing(target, poison):
    operands, grad, geometry, mask = case(n=3, size=(8, 8))
    mask = random_mask(3, 8, 8, 0.1) & (torch.arange(3) < 2).view(3, 1, 1, 1)
    read = ActiveSites(mask).touched((8, 8), 3, 1, 1).mask
    assert not read.all() and read.any()
    clean = (*operands[:2], operands[2], None, None)
    dirty = (torch.where(read, operands[0], poison), *clean[1:])
    dirty_grad = torch.where(mask, grad, poison)
    with target.use():
        on = lambda ts: [None if t is None else t.to(target.device) for t in ts]
        expected = run(masked_conv2d, on(clean), grad.to(target.device), geometry, mask.to(target.device))
        actual = run(masked_conv2d, on(dirty), dirty_grad.to(target.device), geometry, mask.to(target.device))
    for want, have in zip(expected, actual, strict=True):
        assert have.isfinite().all()
        assert torch.equal(have, want)


def test_uninitialised_memory_is_never_read(target):
    """Deterministic mode fills torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for operands, grad, geometry, mask in (case(), case(cin=17, cout=33, size=(9, 9))):
            assert_equal_to_reference(target, operands, grad, geometry, mask)
    finally:
        torch.use_deterministic_algorithms(False)


def test_output_is_channels_last_and_gradients_are_full(target):
    operands, grad, geometry, mask = case()
    with target.use():
        results = run(masked_conv2d, [t.to(target.device) for t in operands], grad.to(target.device), geometry, mask)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    for operand, result in zip(operands, results[1:], strict=True):
        assert result.shape == operand.shape


def test_a_batch_equals_its_samples(target):
    operands, _, geometry, mask = case(n=3)
    input, weight, bias = (t.to(target.device) for t in operands[:3])
    mask = mask.to(target.device)
    with target.use():
        together = masked_conv2d(input, weight, bias, *geometry, mask=mask)
        alone = [
            masked_conv2d(x[None], weight, bias, *geometry, mask=m[None]) for x, m in zip(input, mask, strict=True)
        ]
    assert torch.equal(together, torch.cat(alone))


def test_the_same_bits_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(2, 40, 40, 0.4)
    input, weight = torch.randn(2, 40, 40, 40, generator=generator), torch.randn(50, 40, 3, 3, generator=generator)
    gate = torch.where(mask, torch.rand(mask.shape, generator=generator) + 0.1, 0)
    grad = torch.randn(2, 50, 40, 40, generator=generator)
    wide = torch.randn(1, 1, 300, 300, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(masked_conv2d, (input, weight, weight[:, 0, 0, 0], gate, None), grad, (1, 1, 1), mask))
            # ATen would sum one channel's gradient in as many parts as there are threads.
            one = (weight[:1, :1], weight[:1, 0, 0, 0], None, None)
            results[-1] += run(masked_conv2d, (wide, *one), wide, (1, 1, 1), torch.ones((), dtype=torch.bool))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_the_same_bits_at_every_call(target):
    operands, grad, geometry, mask = case(cin=20, cout=20, size=(9, 9))
    operands = [torch.randn(t.shape, generator=torch.Generator().manual_seed(6)).to(target.device) for t in operands]
    operands[3] = torch.where(mask.to(target.device), operands[3], 0)
    with target.use():
        first, second = (run(masked_conv2d, operands, grad.to(target.device), geometry, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wide", ["input", "output"])
def test_more_than_2_to_the_31_elements(target, wide):
    """Only the last site is active, so of the huge tensor only the last pixel's memory is ever touched."""
    if target.device.type == "cpu" and target.backend == "triton":
        pytest.skip("a grid over 2^20 sites takes minutes in Triton's interpreter; it runs on a GPU")
    channels, side = 2100, 1024
    assert channels * side * side > 2**31
    cin, cout = (channels, 3) if wide == "input" else (3, channels)
    empty = {"dtype": torch.float16, "device": target.device, "memory_format": torch.channels_last}
    input, out = torch.empty(1, cin, side, side, **empty), torch.empty(1, cout, side, side, **empty)
    pixel = input[..., -1:, -1:].copy_(integers(1, cin, 1, 1))
    weight = integers(cout, cin, 1, 1, dtype=torch.float16, low=0, high=2, seed=1).to(target.device)
    weight[:, 8:] = 0  # small sums are exact in float16
    mask = torch.zeros(1, 1, side, side, dtype=torch.bool, device=target.device)
    mask[..., -1, -1] = True
    with target.use():
        masked_conv2d(input, weight, mask=mask, out=out)
    expected = F.conv2d(pixel.double(), weight.double())
    assert torch.equal(out[..., -1:, -1:].double(), expected) and expected.any()


def test_gradients_through_shared_sites(target):
    """Layers and their backward passes read the same tables; they are made once."""
    operands, grad, geometry, mask = case(cin=4, cout=4)
    with target.use():
        sites = ActiveSites(mask.to(target.device))
        results = []
        for chosen in (sites, mask.to(target.device)):
            input, weight = (t.to(target.device).requires_grad_() for t in operands[:2])
            hidden = masked_conv2d(input, weight, None, *geometry, mask=chosen)
            masked_conv2d(hidden, weight, None, *geometry, mask=chosen).backward(grad.to(target.device))
            results.append((input.grad, weight.grad))
    assert all(torch.equal(shared, own) for shared, own in zip(*results, strict=True))
    assert len(sites._tables if target.backend == "cpu" else sites._touched) == 1


def test_sites_do_not_follow_the_mask_they_were_made_from(target):
    mask = random_mask(2, 6, 5).to(target.device)
    with target.use():
        sites, before = ActiveSites(mask), mask.clone()
        mask.logical_not_()
        assert torch.equal(sites.mask, before) and len(sites) == before.sum()


def test_an_in_place_update_is_seen_by_a_graph_that_saved_its_tensor():
    operands, _, _, mask = case(cin=7)
    out = integers(2, 7, 6, 5).contiguous(memory_format=torch.channels_last)
    scale = torch.ones((), requires_grad=True)
    saved = (out * scale).sum()
    with torch.no_grad():
        masked_conv2d(*operands[:2], padding=1, mask=mask, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    operands, grad, geometry, mask = case()

    def checkpointed(input, weight, bias, *geometry, mask, inactive):
        call = lambda *tensors: masked_conv2d(*tensors[:3], *geometry, mask=tensors[3], inactive=tensors[4])
        return checkpoint(call, input, weight, bias, mask, inactive, use_reentrant=reentrant)

    for one, two in zip(
        run(masked_conv2d, operands, grad, geometry, mask),
        run(checkpointed, operands, grad, geometry, mask),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_nothing_is_inactive_without_a_mask(target):
    operands, grad, _, _ = case()
    inactive = operands[4].to(target.device).requires_grad_()
    with target.use():
        masked_conv2d(
            operands[0].to(target.device), operands[1].to(target.device), inactive=inactive, padding=1
        ).backward(grad.to(target.device))
    assert torch.equal(inactive.grad, torch.zeros_like(inactive))


def test_shared_sites_serve_several_layers(target):
    operands, _, geometry, mask = case(cin=4, cout=4)
    input, weight = operands[0].to(target.device), operands[1].to(target.device)
    mask = mask.to(target.device)
    with target.use():
        sites = ActiveSites(mask)
        for _ in range(2):
            shared = masked_conv2d(input, weight, None, *geometry, mask=sites)
            assert torch.equal(shared, masked_conv2d(input, weight, None, *geometry, mask=mask))
            input = shared


def test_no_mask_is_conv2d(target):
    operands, _, geometry, _ = case(dtype=torch.float64)
    input, weight, bias = (t.to(target.device) for t in operands[:3])
    with target.use():
        output = masked_conv2d(input, weight, bias, *geometry)
    dense = F.conv2d(input, weight, bias, *geometry)
    assert torch.equal(output, dense)
    assert output.stride() == dense.stride()


class TestInPlace:
    def operands(self, target):
        operands, _, geometry, mask = case()
        input, weight, bias, gate, inactive = (t.to(target.device) for t in operands)
        out = inactive.contiguous(memory_format=torch.channels_last)
        return input, weight, bias, gate, out, geometry, mask.to(target.device)

    @pytest.mark.parametrize("gated", [False, True])
    def test_only_active_sites_change(self, target, gated):
        input, weight, bias, gate, out, geometry, mask = self.operands(target)
        chosen = gate if gated else mask
        expected = reference.masked_conv2d(input, weight, bias, *geometry, mask=chosen, inactive=out)
        with target.use(), torch.no_grad():
            result = masked_conv2d(input, weight, bias, *geometry, mask=chosen, out=out)
        assert result is out
        assert torch.equal(out, expected)

    def test_nothing_else_is_read_or_written(self, target):
        input, weight, bias, _, out, geometry, mask = self.operands(target)
        out.masked_fill_(~mask, float("nan"))
        with target.use():
            masked_conv2d(input, weight, bias, *geometry, mask=mask, out=out)
        assert out.isnan().equal((~mask).expand_as(out))

    def test_refusals_leave_out_untouched(self, target):
        input, weight, bias, gate, out, geometry, mask = self.operands(target)
        before = out.clone()
        refusals = [
            ({"mask": mask, "out": out, "inactive": out}, ValueError, "out: expected no `inactive`"),
            ({"mask": mask, "out": out.contiguous()}, ValueError, "out: expected a channels_last tensor"),
            ({"mask": mask, "out": out[:1]}, ValueError, r"out: expected shape \[2, 7, 6, 5\], got"),
            ({"mask": mask, "out": out.double()}, TypeError, "out: expected torch.float32"),
            ({"mask": mask, "out": 3}, TypeError, "out: expected a tensor, got int"),
            ({"mask": gate.requires_grad_(), "out": out}, ValueError, r"out: expected torch.no_grad\(\)"),
            ({"mask": mask[..., :2], "out": out}, ValueError, "mask: expected a shape that broadcasts"),
        ]
        with target.use():
            for keywords, error, match in refusals:
                with pytest.raises(error, match=match):
                    masked_conv2d(input, weight, bias, *geometry, **keywords)
            with pytest.raises(ValueError, match=r"out: expected torch.no_grad\(\)"):
                masked_conv2d(input, weight.requires_grad_(), bias, *geometry, mask=mask, out=out)
            square = integers(7, 7, 3, 3).to(target.device)
            with pytest.raises(ValueError, match="out: expected memory of its own"):
                masked_conv2d(out, square, padding=1, mask=mask, out=out)
        assert torch.equal(out, before)


def bad(change, error, match):
    return pytest.param(change, error, match, id=match[:40])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        bad({"input": [[1.0]]}, TypeError, "input: expected a tensor or PackedFeatures, got list"),
        bad({"input": torch.zeros(2, 5, 6, 5).int()}, TypeError, "input: expected float32.*got torch.int32"),
        bad({"input": torch.zeros(6, 5)}, ValueError, r"input: .*\[N, Cin, H, W\] or \[Cin, H, W\], got \[6, 5\]"),
        bad({"input": torch.zeros(2, 5, 1, 1), "padding": 0}, ValueError, "input: expected a padded height"),
        bad({"weight": torch.zeros(7, 5, 3)}, ValueError, "weight: expected a shape"),
        bad({"weight": torch.zeros(0, 5, 3, 3)}, ValueError, "weight: expected a shape .* of no zeros"),
        bad({"weight": torch.zeros(7, 4, 3, 3)}, ValueError, "weight: expected 5 input channels"),
        bad({"weight": torch.zeros(7, 5, 3, 3).double()}, TypeError, "weight: expected torch.float32"),
        bad({"weight": torch.zeros(7, 5, 3, 3, device="meta")}, ValueError, "weight: expected a tensor on"),
        bad({"bias": torch.zeros(6)}, ValueError, r"bias: expected shape \[7\], got \[6\]"),
        bad({"bias": torch.zeros(7).half()}, TypeError, "bias: expected torch.float32"),
        bad({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        bad({"stride": 0}, ValueError, "stride: expected values of at least 1, got 0"),
        bad({"stride": 1.5}, TypeError, "stride: expected an int or a pair of ints, got 1.5"),
        bad({"stride": (1, 2, 3)}, TypeError, "stride: expected an int or a pair"),
        bad({"padding": -1}, ValueError, "padding: expected values of at least 0, got -1"),
        bad({"padding": "full"}, ValueError, "padding: expected an int, a pair, 'same' or 'valid', got 'full'"),
        bad({"padding": "same", "stride": 2}, ValueError, "padding: 'same' needs stride 1"),
        bad({"dilation": (1, 0)}, ValueError, "dilation: expected values of at least 1"),
        bad({"groups": 2}, ValueError, "groups: expected a divisor of Cin = 5 and Cout = 7, got 2"),
        bad({"groups": "all"}, TypeError, "groups: expected an int, got 'all'"),
        bad({"mask": torch.ones(2, 1, 6, 4, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts"),
        bad({"mask": torch.ones(2, 7, 6, 5, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts"),
        bad({"mask": torch.ones(2, 1, 6, 5, dtype=torch.uint8)}, TypeError, "mask: expected a bool or floating tensor"),
        bad({"mask": "all"}, TypeError, "mask: expected a bool or floating tensor, got str"),
        bad({"mask": torch.ones(2, 1, 6, 5, device="meta")}, ValueError, "mask: expected a mask on"),
        bad({"inactive": torch.zeros(2, 7, 6, 4)}, ValueError, "inactive: expected a shape that broadcasts"),
        bad({"inactive": torch.zeros(2, 7, 6, 5).half()}, TypeError, "inactive: expected torch.float32"),
        bad({"inactive": "0"}, TypeError, "inactive: expected a tensor or a number, got str"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, error, match):
    operands, _, _, mask = case()
    arguments = {"input": operands[0], "weight": operands[1], "bias": operands[2], "padding": 1, "mask": mask}
    with pytest.raises(error, match=match):
        masked_conv2d(**{**arguments, **change})


def test_sites_of_another_shape_are_refused():
    operands, _, _, _ = case()
    with pytest.raises(ValueError, match=r"mask: expected sites of \[2, 6, 5\]"):
        masked_conv2d(*operands[:2], padding=1, mask=ActiveSites(random_mask(2, 4, 4)))


@pytest.mark.parametrize("groups", [1, 2, 8], ids=["dense", "groups", "depthwise"])
def test_skipped_nan_stays_out_of_all_gradients(target, groups):
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool, device=target.device)
    mask[..., 0, 0] = True
    input = integers(1, 8, 6, 6)
    input[..., 2:, 2:] = float("nan")
    input, weight = input.to(target.device).requires_grad_(), integers(8, 8 // groups, 3, 3).to(target.device)
    with target.use():
        output = masked_conv2d(input, weight.requires_grad_(), padding=1, groups=groups, mask=mask)
        output.sum().backward()
    assert output.isfinite().all() and input.grad.isfinite().all()
    assert weight.grad.isfinite().all() and (weight.grad != 0).any()


class TestRegistration:
    def arguments(self, target, share=False, execution="sparse"):
        operands, grad, _, mask = case(n=1, cin=3, cout=4, size=(4, 4))
        input, weight, bias, gate, inactive = (t.to(target.device) for t in operands)
        mask = mask.to(target.device)
        with target.use():
            sites = ActiveSites(mask)
            touched = sites.touched((4, 4), 3, 1, 1)
            triton_shares = [sites.inverse, touched.index, touched.count]
            shared = [sites.neighbours((4, 4), 3, 1, 1)] if target.backend == "cpu" else triton_shares
        site_operands = (sites.mask, sites.index, sites.count, shared if share else [], [], gate)
        where = ((1, 1), (1, 1), (1, 1), 1, target.backend, execution)
        return (input, weight, bias), site_operands, inactive, where, grad

    @pytest.mark.parametrize("share, execution", [(False, "sparse"), (True, "sparse"), (False, "dense")])
    def test_opcheck_forward(self, target, share, execution):
        operands, sites, inactive, where, _ = self.arguments(target, share, execution)
        for t in (*operands, sites[-1], inactive):
            t.requires_grad_()
        arguments = (*operands, *sites, None, inactive, "none", False, *where)
        torch.library.opcheck(torch.ops.dynconv.masked_conv2d.default, arguments)

    @pytest.mark.parametrize("execution", ["sparse", "dense"])
    def test_opcheck_backward(self, target, execution):
        operands, sites, _, where, grad = self.arguments(target, execution=execution)
        for wanted in ([True] * 4, [True, False, True, False], [False, True, False, True]):
            arguments = (grad.to(target.device), *operands, *sites, *where, wanted)
            torch.library.opcheck(torch.ops.dynconv.masked_conv2d_backward.default, arguments)

    @pytest.mark.parametrize("execution", ["sparse", "dense"])
    def test_opcheck_in_place(self, target, execution):
        operands, sites, inactive, where, _ = self.arguments(target, execution=execution)
        out = inactive.contiguous(memory_format=torch.channels_last)
        for rest in ((None, False, "none"), (None, True, "relu"), (torch.zeros_like(out), False, "silu")):
            arguments = (out, *operands, *sites, *rest, *where)
            torch.library.opcheck(torch.ops.dynconv.masked_conv2d_.default, arguments)

    def test_opcheck_sites(self, target):
        full = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=target.device)  # no unspecified entries to compare
        with target.use():
            sites = ActiveSites(full)
        name, geometry = target.backend, ((4, 4), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1))
        torch.library.opcheck(torch.ops.dynconv.compact.default, (full, name))
        torch.library.opcheck(torch.ops.dynconv.inverse_map.default, (sites.index, sites.count, name))
        for lookup in (None, sites.inverse):
            arguments = (sites.index, sites.count, *geometry, lookup, name)
            torch.library.opcheck(torch.ops.dynconv.neighbours.default, arguments)
        torch.library.opcheck(torch.ops.dynconv.touched.default, (full, *geometry[1:], name))

    def test_fakes_have_the_real_strides(self, target):
        """opcheck compares strides: the op's fake and its result agree for an input of any layout."""
        operands, sites, _, where, _ = self.arguments(target)
        for change in LAYOUTS.values():
            input = change(operands[0])
            arguments = (input, *operands[1:], *sites, None, None, "none", False, *where)
            torch.library.opcheck(torch.ops.dynconv.masked_conv2d.default, arguments, test_utils=["test_faketensor"])


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def without_geometry(block):
    return lambda input, weight, bias, mask, inactive: block(input, weight, bias, mask, inactive)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_forward_and_backward(target, dynamic, fresh_dynamo):
    backend = "inductor" if ON_GPU or target.backend == "cpu" else "aot_eager"  # the interpreter is not traceable

    def block(input, weight, bias, gate, inactive):
        hidden = masked_conv2d(input, weight, bias, padding=1, mask=gate, inactive=inactive)
        return hidden.relu() * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=backend)
    with target.use():
        for size in [(6, 5), (7, 9)]:
            operands, grad, _, mask = case(size=size)
            operands, grad = [t.to(target.device) for t in operands], grad.to(target.device)
            expected = run(without_geometry(block), operands, grad, (), mask)
            actual = run(without_geometry(compiled), operands, grad, (), mask)
            for want, have in zip(expected, actual, strict=True):
                assert torch.equal(want, have)


def test_dynamic_sizes_compile_once(fresh_dynamo):
    counter = torch._dynamo.testing.CompileCounter()
    weight = integers(4, 3, 3, 3)
    compiled = torch.compile(lambda x, m: masked_conv2d(x, weight, padding=1, mask=m), dynamic=True, backend=counter)
    for size in (6, 7, 9, 12):
        input, mask = integers(2, 3, size, size + 1), random_mask(2, size, size + 1)
        assert torch.equal(compiled(input, mask), masked_conv2d(input, weight, padding=1, mask=mask))
    assert counter.frame_count == 1


def test_compile_in_place_and_shared_sites(target, fresh_dynamo):
    operands, _, _, mask = case(cin=4, cout=4)
    input, weight, mask = operands[0].to(target.device), operands[1].to(target.device), mask.to(target.device)

    def stack(input, mask, first, second):
        sites = ActiveSites(mask)
        hidden = masked_conv2d(input, weight, padding=1, mask=sites, out=first)
        return masked_conv2d(hidden, weight, padding=1, mask=sites, out=second)

    def caches():
        return [integers(2, 4, 6, 5, seed=s).to(target.device, memory_format=torch.channels_last) for s in (7, 8)]

    with target.use(), torch.no_grad():
        eager, compiled = caches(), caches()
        expected = stack(input, mask, *eager)
        actual = torch.compile(stack, fullgraph=True, backend="aot_eager")(input, mask, *compiled)
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_export(target):
    layer = dynconv.nn.MaskedConv2d(3, 4, 3, padding=1).to(target.device)
    input, mask = torch.randn(2, 3, 6, 6, device=target.device), random_mask(2, 6, 6).to(target.device)
    height = torch.export.Dim("height", min=3, max=64)
    with target.use():
        program = torch.export.export(layer, (input, mask), dynamic_shapes=({2: height}, {2: height}))
        for size in (6, 11):
            input, mask = torch.randn(2, 3, size, 6, device=target.device), random_mask(2, size, 6).to(target.device)
            assert torch.equal(program.module()(input, mask), layer(input, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_conv2d(target, dtype):
    target.skip_unless(dtype)
    operands, _, geometry, mask = case()
    input, weight, bias = (t.to(target.device).requires_grad_() for t in operands[:3])
    with target.use(), torch.autocast(target.device.type, dtype):
        output = masked_conv2d(input, weight, bias, *geometry, mask=mask.to(target.device))
        dense = F.conv2d(input, weight, bias, *geometry)
    assert output.dtype == dense.dtype == dtype
    assert torch.equal(output.cpu(), torch.where(mask, dense.cpu(), 0))
    output.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_backward_inside_autocast(target):
    """Autocast must not reach the sums inside the op."""
    operands, grad, geometry, mask = case(cout=40)
    expected = run(masked_conv2d, operands, grad, geometry, mask)
    leaves = [t.to(target.device).requires_grad_() for t in operands]
    with target.use():
        output = masked_conv2d(*leaves[:3], *geometry, mask=leaves[3], inactive=leaves[4])
        with torch.autocast(target.device.type, torch.bfloat16):
            output.backward(grad.to(target.device))
    for want, leaf in zip(expected[1:], leaves, strict=True):
        assert torch.equal(leaf.grad.cpu(), want)


def test_tf32_follows_the_switches_of_conv2d():
    """Reading the old switch raises once a program has used the new one."""
    legacy = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            assert allow_tf32() is allowed
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert allow_tf32() is (precision == "tf32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = legacy


def test_flops_follow_the_active_sites(target):
    operands, grad, geometry, mask = case()
    with target.use():
        leaves = [t.to(target.device).requires_grad_() for t in operands[:3]]
        with FlopCounterMode(display=False) as counter:
            output = masked_conv2d(*leaves, *geometry, mask=mask.to(target.device))
        assert counter.get_total_flops() == 2 * int(mask.sum()) * 7 * 5 * 9
        with FlopCounterMode(display=False) as counter:
            output.backward(grad.to(target.device))
        assert counter.get_total_flops() == 4 * int(mask.sum()) * 7 * 5 * 9


def test_gate_semantics(target):
    """A gate is where(gate != 0, gate * conv, inactive), differentiable at the active sites only."""
    operands, grad, geometry, _ = case()
    gate = torch.tensor([0.0, 2.0, -1.0]).repeat(20).view(2, 1, 6, 5).to(target.device).requires_grad_()
    input, weight, bias = (t.to(target.device) for t in operands[:3])
    with target.use():
        output = masked_conv2d(input, weight, bias, *geometry, mask=gate)
    conv = F.conv2d(input, weight, bias, *geometry)
    assert torch.equal(output, gate.detach() * conv)
    output.backward(grad.to(target.device))
    expected = (grad.to(target.device) * conv).sum(1, keepdim=True)
    assert torch.equal(gate.grad, torch.where(gate != 0, expected, 0))


def test_a_broadcast_gate_sums_its_gradient(target):
    operands, grad, geometry, _ = case(n=3)
    gate = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    assert_equal_to_reference(target, (*operands[:3], gate, operands[4]), grad, geometry, None)


def test_forced_backends_are_checked(monkeypatch):
    operands, _, _, mask = case()
    with pytest.raises(ValueError, match="backend: expected one of triton, cpu, reference, got 'gpu'"):
        dynconv.backend("gpu").__enter__()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with dynconv.backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        masked_conv2d(*operands[:2], padding=1, mask=mask)
    with dynconv.backend("reference"), dynconv.backend("cpu"):
        assert dynconv._backend.forced_backend() == "cpu"
    assert dynconv._backend.forced_backend() is None


def test_backends_agree():
    operands, grad, geometry, mask = case()
    results = []
    for name in dynconv._backend.BACKENDS:
        target = Target(name)
        with target.use():
            moved = [t.to(target.device) for t in operands]
            results.append([t.cpu() for t in run(masked_conv2d, moved, grad.to(target.device), geometry, mask)])
    for one, two in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class TestDispatch:
    """Calls that nobody watches skip PyTorch's dispatcher; whoever watches sees the ops."""

    def call(self, **options):
        return masked_conv2d(torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3), padding=1, **options)

    def test_profilers_see_the_ops(self):
        mask = random_mask(1, 6, 6)
        with dynconv.backend("cpu"), torch.no_grad(), torch.profiler.profile() as profile:
            self.call(mask=mask)
            self.call(mask=mask, out=torch.zeros(1, 4, 6, 6).contiguous(memory_format=torch.channels_last))
        seen = {event.key for event in profile.key_averages()}
        assert {"dynconv::compact", "dynconv::masked_conv2d", "dynconv::masked_conv2d_"} <= seen

    def test_modes_see_the_ops(self):
        seen = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                seen.append(str(function))
                return function(*arguments, **(options or {}))

        with dynconv.backend("cpu"), torch.no_grad(), Watch():
            self.call(mask=random_mask(1, 6, 6))
        assert {"dynconv.compact.default", "dynconv.masked_conv2d.default"} <= set(seen)

    def test_otherwise_they_run_directly(self, monkeypatch):
        def refused(*arguments):
            raise AssertionError("through the dispatcher")

        monkeypatch.setattr(torch.ops.dynconv, "masked_conv2d", refused)
        with dynconv.backend("cpu"):
            with torch.no_grad():
                self.call(mask=random_mask(1, 6, 6))
            with pytest.raises(AssertionError, match="through the dispatcher"):
                masked_conv2d(
                    torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3).requires_grad_(), padding=1,
                    mask=random_mask(1, 6, 6),
                )  # fmt: skip

    def test_an_update_in_place_is_noticed_either_way(self):
        with dynconv.backend("cpu"):
            out = torch.zeros(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(4, requires_grad=True)
            product = (out * weight.view(1, 4, 1, 1)).sum()  # saves `out`
            with torch.no_grad():
                self.call(mask=random_mask(1, 6, 6), out=out)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()


@pytest.mark.parametrize("strided", [False, True])
def test_a_pointwise_layer_makes_no_table(monkeypatch, strided):
    """Its sites read the pixels where they are; with a stride they do not."""
    from dynconv.cpu import sites

    made, right = [], sites.neighbours
    monkeypatch.setattr(sites, "neighbours", lambda *arguments: made.append(arguments) or right(*arguments))
    input, weight = torch.randint(-3, 4, (2, 5, 6, 6)).float(), torch.randint(-3, 4, (7, 5, 1, 1)).float()
    weight.requires_grad_()
    stride = 2 if strided else 1
    mask = torch.rand(2, 1, 6 // stride, 6 // stride) < 0.5
    with dynconv.backend("cpu"), dynconv.execution("sparse"):
        output = dynconv.masked_conv2d(input, weight, stride=stride, mask=mask)
        (grad,) = torch.autograd.grad(output.sum(), weight)
    expected = torch.where(mask, torch.nn.functional.conv2d(input, weight, stride=stride), 0)
    assert torch.equal(output, expected) and torch.equal(grad, torch.autograd.grad(expected.sum(), weight)[0])
    assert len(made) == (2 if strided else 0)


def maps(memory, n, channels, height, width):
    """A channels_last view of a buffer's beginning."""
    return memory[: n * channels * height * width].view(n, height, width, channels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("mode", ("sparse", "dense"))
@pytest.mark.parametrize("shift", (-33, -1, 0, 1, 42))
@pytest.mark.parametrize("operand", ("input", "residual", "weight", "bias", "gate"))
def test_out_shares_no_memory_with_what_is_read(operand, shift, mode):
    """But for a residual that is `out` itself; what only touches its ends is fine."""
    size = 2 * 4 * 6 * 5
    memory = torch.randn(3 * size)
    out = maps(memory[size:], 2, 4, 6, 5)
    operands = dict(input=torch.randn(2, 4, 6, 5), weight=torch.randn(4, 4, 3, 3), bias=torch.randn(4), residual=None)
    mask = random_mask(2, 6, 5, 0.5)
    at = memory[size + shift :]
    operands[operand] = {
        "input": maps(at, 2, 4, 6, 5), "residual": maps(at, 2, 4, 6, 5), "weight": at[:144].view(4, 4, 3, 3),
        "bias": at[:4], "gate": at[:60].view(2, 1, 6, 5),
    }[operand]  # fmt: skip
    mask = operands.pop("gate", mask)
    residual, before = operands.pop("residual"), memory.clone()
    call = lambda **keywords: masked_conv2d(*operands.values(), padding=1, mask=mask, residual=residual, **keywords)
    is_apart = shift < 0 and size + shift + operands.get(operand, at[:60]).numel() <= size
    with dynconv.execution(mode), torch.no_grad():
        if is_apart or (operand == "residual" and shift == 0):
            expected = torch.where(mask != 0, call(), out)
            assert torch.equal(call(out=out), out)
            torch.testing.assert_close(out, expected)
        else:
            with pytest.raises(ValueError, match="out: expected memory of its own, got a tensor that overlaps"):
                call(out=out)
            assert torch.equal(memory, before)
