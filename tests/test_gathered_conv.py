"""gathered_conv2d and ActiveChannels against the dense reference: values, gradients, contract."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import dynconv
from dynconv import ActiveChannels, ActiveSites, PackedChannels, gathered_conv2d, gathered_linear, pack, reference

NAMES = ("output", "input", "weight", "bias", "in_mask", "out_mask")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def integers(*shape, low=-2, high=3, dtype=torch.float32, seed=0):
    """Integer values: every sum is exact, whatever its order, so results must be equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_channels(n, channels, seed=0, granularity=1):
    """bool [n, channels], about half of them; the first sample keeps none, the second all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, math.ceil(channels / granularity), generator=generator) < 0.5
    mask = mask.repeat_interleave(granularity, 1)[:, :channels]
    mask[0], mask[1] = False, True
    return mask


def case(
    n=4, cin=5, cout=7, size=(6, 5), kernel=(3, 3), stride=1, padding=1, dilation=1, groups=1, dtype=torch.float32,
    granularity=1,
):  # fmt: skip
    """Integer-valued operands of one geometry, the output's gradient and the masks."""
    input = integers(n, cin, *size, dtype=dtype)
    weight = integers(cout, cin // groups, *kernel, dtype=dtype, seed=1)
    geometry = (stride, padding, dilation, groups)
    shape = reference.gathered_conv2d(input.float(), weight.float(), None, *geometry).shape
    masks = random_channels(n, cin, 3, granularity), random_channels(n, cout, 4, granularity)[torch.arange(n) - 1]
    return (input, weight, integers(cout, dtype=dtype, seed=2)), integers(*shape, dtype=dtype, seed=5), geometry, masks


def run(function, operands, grad, geometry, masks):
    """[output, *gradients of the operands and of the floating masks]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands]
    masks = [m.clone().requires_grad_() if torch.is_tensor(m) and m.is_floating_point() else m for m in masks]
    output = function(*leaves, *geometry, in_mask=masks[0], out_mask=masks[1])
    output.backward(grad)
    return [output.detach(), *(t.grad for t in (*leaves, *masks) if torch.is_tensor(t) and t.requires_grad)]


def assert_equal_to_reference(operands, grad, geometry, masks, target=None):
    double = [m.double() if torch.is_tensor(m) and m.is_floating_point() else m for m in masks]
    exact = [None if t is None else t.double() for t in operands]
    expected = run(reference.gathered_conv2d, exact, grad.double(), geometry, double)
    if target is not None:
        place = lambda tensors: [None if t is None else t.to(target.device) for t in tensors]
        operands, masks, grad = place(operands), place(masks), grad.to(target.device)
    with target.use() if target is not None else contextlib.nullcontext():
        actual = run(gathered_conv2d, operands, grad, geometry, masks)
    assert len(actual) == len(expected)
    for which, (want, have) in enumerate(zip(expected, actual, strict=True)):
        assert have.dtype == grad.dtype, which
        have = have.cpu()
        assert torch.equal(have, want.to(grad.dtype)), f"{which}: {(have - want).abs().max()}"
    if masks != (None, None):  # without any it is plain conv2d
        assert actual[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [1, 8, 16])
def test_values_and_gradients_equal_the_reference(target, dtype, granularity):
    target.skip_unless(dtype)
    made = case(cin=40, cout=52, size=(5, 4), kernel=(1, 3), dtype=dtype, granularity=granularity)
    assert_equal_to_reference(*made, target)


GEOMETRIES = {
    "1x1": dict(kernel=(1, 1), padding=0),
    "strided": dict(stride=2, size=(7, 8)),
    "strided 1x1": dict(kernel=(1, 1), stride=2, padding=0, size=(7, 8)),
    "dilated": dict(dilation=2, padding=2, size=(9, 8)),
    "asymmetric": dict(kernel=(3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2), size=(8, 9)),
    "same": dict(kernel=(2, 4), padding="same"),
    "kernel wider than the image": dict(kernel=(5, 5), padding=3, size=(2, 3)),
    "one pixel": dict(kernel=(1, 1), padding=0, size=(1, 1)),
    "one channel": dict(cin=1, cout=1),
    "two groups": dict(cin=6, cout=8, groups=2),
    "wide groups": dict(cin=72, cout=68, groups=2),
    "depthwise": dict(cin=6, cout=6, groups=6),
    "depth multiplier": dict(cin=3, cout=12, groups=3),
    "taps in blocks": dict(cin=300, cout=20, size=(4, 8)),
    "more rows than a chunk": dict(cin=18, cout=70, size=(30, 41)),
    "one sample, shared by threads": dict(n=2, cin=20, cout=20, size=(20, 20)),
}


@pytest.mark.parametrize("change", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(change):
    assert_equal_to_reference(*case(**change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_multiply_and_get_a_gradient(dtype):
    operands, grad, geometry, masks = case(dtype=dtype, size=(3, 4))
    gates = [torch.where(m, integers(*m.shape, low=1, high=3, seed=9), 0).to(dtype) for m in masks]
    for chosen in (gates, (gates[0], masks[1]), (masks[0], gates[1]), (None, gates[1])):
        assert_equal_to_reference(operands, grad, geometry, chosen)


@pytest.mark.parametrize("which", ["neither", "in", "out"])
def test_no_mask_keeps_all(which):
    operands, grad, geometry, masks = case()
    chosen = (masks[0] if which == "in" else None, masks[1] if which == "out" else None)
    assert_equal_to_reference(operands, grad, geometry, chosen)
    if which == "neither":
        assert torch.equal(gathered_conv2d(*operands, *geometry), F.conv2d(*operands, *geometry))


@pytest.mark.parametrize("groups", [1, 2])
def test_nothing_kept(groups):
    operands, grad, geometry, masks = case(cin=6, cout=8, groups=groups)
    none = [torch.zeros_like(m) for m in masks]
    assert_equal_to_reference(operands, grad, geometry, none)
    assert_equal_to_reference(operands, grad, geometry, (none[0], masks[1]))  # the bias alone
    assert_equal_to_reference(operands, grad, geometry, (masks[0], none[1]))


def test_no_samples_and_no_bias():
    operands, grad, geometry, masks = case()
    assert_equal_to_reference((*operands[:2], None), grad, geometry, masks)
    output, *grads = run(gathered_conv2d, [operands[0][:0], *operands[1:]], grad[:0], geometry, [m[:0] for m in masks])
    assert output.shape == (0, 7, 6, 5)
    assert [g.shape for g in grads] == [(0, 5, 6, 5), (7, 5, 3, 3), (7,)]
    assert not grads[1].any() and not grads[2].any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_geometry(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    groups = draw(1, 3)
    kernel, stride, padding, dilation = [(draw(low, 3), draw(low, 3)) for low in (1, 1, 0, 1)]
    size = [draw(max(1, d * (k - 1) + 1 - 2 * p), 9) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    assert_equal_to_reference(
        *case(n=draw(2, 4), cin=groups * draw(1, 20), cout=groups * draw(1, 20), size=size, kernel=kernel,
              stride=stride, padding=padding, dilation=dilation, groups=groups, granularity=draw(1, 4))
    )  # fmt: skip


def test_gradcheck():
    operands, _, _, masks = case(n=3, cin=4, cout=4, size=(4, 3), groups=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    gates = [torch.where(m, 1 + torch.rand(m.shape, generator=generator).double(), 0) for m in masks]
    leaves = [t.requires_grad_() for t in (*operands, *gates)]

    def call(input, weight, bias, in_gate, out_gate):
        # The step of the finite differences must not open a closed gate.
        closed = [torch.where(m, g, 0) for m, g in zip(masks, (in_gate, out_gate), strict=True)]
        return gathered_conv2d(input, weight, bias, 1, 1, 1, 2, in_mask=closed[0], out_mask=closed[1])

    assert torch.autograd.gradcheck(call, leaves)


def test_rounding_errors_stay_within_the_bound():
    """Sums of K products: |error| <= (K + 2) * eps * the same sum of absolute values (Higham, 2002, section 3.1)."""
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(2, 40, 30, 30, generator=generator), torch.randn(36, 40, 3, 3, generator=generator)
    grad = torch.randn(2, 36, 30, 30, generator=generator)
    masks = torch.rand(2, 40, generator=generator) < 0.5, torch.rand(2, 36, generator=generator) < 0.5
    geometry = (1, 1, 1, 1)
    have = run(gathered_conv2d, (input, weight, None), grad, geometry, masks)
    want = run(reference.gathered_conv2d, (input.double(), weight.double(), None), grad.double(), geometry, masks)
    size = [t.abs().double() for t in (input, weight, grad)]
    bounds = run(reference.gathered_conv2d, (*size[:2], None), size[2], geometry, masks)
    for name, a, b, bound, terms in zip(NAMES, have, want, bounds, (360, 324, 1800), strict=False):
        assert ((a - b).abs() <= (terms + 2) * 2**-24 * bound).all(), name


def test_what_is_not_kept_is_not_read():
    operands, grad, geometry, masks = case()
    expected = run(gathered_conv2d, operands, grad, geometry, masks)
    poisoned = torch.where(masks[0][:, :, None, None], operands[0], math.nan)
    poisoned_grad = torch.where(masks[1][:, :, None, None], grad, math.inf)
    actual = run(gathered_conv2d, (poisoned, *operands[1:]), poisoned_grad, geometry, masks)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    gates = [m.float() for m in masks]
    expected = run(gathered_conv2d, operands, grad, geometry, (gates[0], masks[1]))
    actual = run(gathered_conv2d, (poisoned, *operands[1:]), poisoned_grad, geometry, (gates[0], masks[1]))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_a_batch_equals_its_samples():
    (input, weight, bias), _, geometry, masks = case(cin=20, cout=40, dtype=torch.float32)
    input = input + torch.rand(input.shape, generator=torch.Generator().manual_seed(0))
    whole = gathered_conv2d(input, weight, bias, *geometry, in_mask=masks[0], out_mask=masks[1])
    for n in range(input.shape[0]):
        one = [t[n : n + 1] for t in (input, *masks)]
        alone = gathered_conv2d(one[0], weight, bias, *geometry, in_mask=one[1], out_mask=one[2])
        assert torch.equal(whole[n : n + 1], alone)


def test_the_same_bits_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(3, 40, 40, 40, generator=generator), torch.randn(70, 40, 3, 3, generator=generator)
    grad = torch.randn(3, 70, 40, 40, generator=generator)
    masks = torch.rand(3, 40, generator=generator) < 0.5, torch.rand(3, 70, generator=generator) < 0.5
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(gathered_conv2d, (input, weight, None), grad, (1, 1, 1, 1), masks))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_no_uninitialised_memory_is_read():
    """PyTorch then fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for change in ({}, dict(cin=17, cout=33, size=(9, 9)), dict(cin=6, cout=6, groups=6)):
            assert_equal_to_reference(*case(**change))
    finally:
        torch.use_deterministic_algorithms(False)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "slice": lambda t: torch.cat([t, t], 3)[:, :, :, : t.shape[3]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(change):
    operands, grad, geometry, masks = case()
    changed = lambda function: lambda x, w, *rest, **masks: function(change(x), change(w), *rest, **masks)
    grad = change(grad)
    expected = run(changed(reference.gathered_conv2d), operands, grad, geometry, masks)
    actual = run(changed(gathered_conv2d), operands, grad, geometry, masks)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_shared_channels_and_kinds_of_masks():
    operands, _, geometry, masks = case()
    expected = gathered_conv2d(*operands, *geometry, in_mask=masks[0], out_mask=masks[1])
    shared = [ActiveChannels(m) for m in masks]
    assert torch.equal(gathered_conv2d(*operands, *geometry, in_mask=shared[0], out_mask=shared[1]), expected)
    row = masks[1][3]
    by_row = gathered_conv2d(*operands, *geometry, out_mask=row)
    assert torch.equal(by_row, gathered_conv2d(*operands, *geometry, out_mask=row.expand(4, -1)))


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])  # these are exact
@pytest.mark.parametrize("kind", ["runs", "single channels", "all out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_epilogue_is_that_of_the_reference(activation, kind, dtype):
    """In one pass without gradients, in steps with them."""
    granularity = 8 if kind == "runs" else 1
    operands, grad, _, masks = case(cin=24, cout=32, size=(4, 3), dtype=dtype, granularity=granularity)
    gate = torch.where(masks[1], integers(*masks[1].shape, low=1, high=3, seed=9), 0).to(dtype)
    residual, inactive = integers(*grad.shape, seed=11, dtype=dtype), integers(*grad.shape, seed=12, dtype=dtype)
    sites = torch.arange(48).view(4, 1, 4, 3) % 3 > 0
    out_mask = None if kind == "all out" else gate
    for finish in (
        {},
        dict(residual=residual),
        dict(mask=sites),
        dict(mask=sites, residual=residual, inactive=inactive),
    ):
        finish = {"activation": activation, "out_mask": out_mask, "in_mask": masks[0], **finish}
        expected = reference.gathered_conv2d(*operands, 1, 1, **finish)
        with torch.no_grad():
            assert torch.equal(gathered_conv2d(*operands, 1, 1, **finish), expected)
        tracked = ("out_mask", "residual", "inactive")
        results = []
        for function in (reference.gathered_conv2d, gathered_conv2d):
            leaves = [t.clone().requires_grad_() for t in operands]
            mine = {k: v.clone().requires_grad_() if k in tracked and v is not None else v for k, v in finish.items()}
            output = function(*leaves, 1, 1, **mine)
            output.backward(grad)
            leaves += [mine[k] for k in tracked if mine.get(k) is not None]
            results.append([output.detach(), *(t.grad for t in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu", "hardswish"])
def test_smooth_activations(activation):
    """Within a few units in the last place of max(1, |x|): exp and erf are polynomials, see dynconv.cli.bounds."""
    operands, grad, _, masks = case(cin=24, cout=32)
    finish = dict(in_mask=masks[0], out_mask=masks[1], residual=integers(*grad.shape, seed=11) / 8)
    before = reference.gathered_conv2d(*operands, 1, 1, **finish)
    expected = reference.ACTIVATIONS[activation](before.double())
    with torch.no_grad():
        actual = gathered_conv2d(*operands, 1, 1, **finish, activation=activation)
    assert ((actual - expected).abs() <= 9 * 2**-23 * before.abs().clamp(min=1)).all()


SITES = {
    "random": lambda n, h, w: torch.rand(n, 1, h, w, generator=torch.Generator().manual_seed(7)) < 0.4,
    "none": lambda n, h, w: torch.zeros(n, 1, h, w, dtype=torch.bool),
    "all": lambda n, h, w: torch.ones(n, 1, h, w, dtype=torch.bool),
    "no site of a sample": lambda n, h, w: (torch.arange(n) > 0).view(n, 1, 1, 1).expand(n, 1, h, w),
}


@pytest.mark.parametrize("sites", SITES.values(), ids=SITES)
@pytest.mark.parametrize("name", ["1x1", "strided", "dilated", "wide groups", "depthwise", "taps in blocks"])
def test_both_axes_at_once(sites, name):
    operands, grad, geometry, masks = case(**GEOMETRIES[name])
    mask = sites(grad.shape[0], *grad.shape[2:])
    both = lambda function: lambda *leaves, **chosen: function(*leaves, mask=mask, **chosen)
    expected = run(both(reference.gathered_conv2d), operands, grad, geometry, masks)
    actual = run(both(gathered_conv2d), operands, grad, geometry, masks)
    for which, (want, have) in enumerate(zip(expected, actual, strict=True)):
        assert torch.equal(have, want), f"{which}: {(have - want).abs().max()}"
    # What only skipped sites would read, and the gradient at skipped sites, reach nothing.
    read = ActiveSites(mask).touched(operands[0].shape[2:], operands[1].shape[2:], *geometry[:3]).mask
    poisoned = torch.where(read, operands[0], math.nan), *operands[1:]
    again = run(both(gathered_conv2d), poisoned, torch.where(mask, grad, math.nan), geometry, masks)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("gated", ["channels", "sites", "both"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_gates_get_no_gradient_from_what_is_not_kept(packed, gated, activation):
    """Such as that of a square root, which is infinite where an output is zero."""
    operands, grad, geometry, (_, keep) = case(dtype=torch.float64)
    mask = torch.rand(grad.shape[0], 1, *grad.shape[2:], generator=torch.Generator().manual_seed(7)) < 0.5

    def gradients(grad):
        gates = [m.double().requires_grad_() for m in (keep, mask)]
        chosen = [
            m if gated not in ("both", name) else gate
            for name, m, gate in zip(("channels", "sites"), (keep, mask), gates)
        ]
        output = gathered_conv2d(
            *operands, *geometry, out_mask=chosen[0], mask=chosen[1], activation=activation, packed=packed
        )
        (output.unpack() if packed else output).backward(grad)
        return [gate.grad for gate in gates if gate.grad is not None]

    expected = gradients(grad)
    actual = gradients(torch.where(mask & keep[:, :, None, None], grad, math.inf))
    assert len(expected) == (2 if gated == "both" else 1)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_spatial_gate_gets_a_gradient():
    operands, grad, geometry, masks = case()
    gates = []
    for function in (reference.gathered_conv2d, gathered_conv2d):
        gate = (torch.arange(120).view(4, 1, 6, 5) % 3).float().requires_grad_()
        output = function(*operands, *geometry, in_mask=masks[0], out_mask=masks[1], mask=gate)
        output.backward(grad)
        gates.append((output.detach(), gate.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gates, strict=True))


def chain(function, input, weights, biases, channels, mask=None, activation="relu"):
    """Three layers whose features stay packed; `channels[i]` are the outputs of layer i, all of the last one's."""
    features = input
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = i == len(weights) - 1
        padding = weight.shape[2] // 2
        features = function(
            features, weight, bias, 1, padding, out_mask=None if last else channels[i], packed=not last,
            mask=mask if last else None, activation=None if last else activation,
        )  # fmt: skip
    return features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("gated", [False, True], ids=["mask", "gate"])
def test_chains_stay_packed(dtype, granularity, gated):
    widths = (5, 24, 20, 7)
    channels = [random_channels(3, c, seed, granularity)[torch.arange(3) - seed] for seed, c in enumerate(widths[1:3])]
    if gated:
        channels = [torch.where(c, integers(*c.shape, low=1, high=3, seed=3), 0).to(dtype) for c in channels]
    channels = [ActiveChannels(c) for c in channels]
    input = integers(3, widths[0], 5, 4, low=-1, high=2, dtype=dtype)
    weights = [
        integers(b, a, k, k, low=-1, high=2, dtype=dtype, seed=20 + a) for a, b, k in zip(widths, widths[1:], (1, 3, 1))
    ]
    biases = [integers(b, dtype=dtype, seed=30 + b) for b in widths[1:]]
    grad = integers(3, widths[-1], 5, 4, low=0, high=2, dtype=dtype, seed=40)
    mask = torch.arange(60).view(3, 1, 5, 4) % 3 > 0
    results = []
    for function in (reference.gathered_conv2d, gathered_conv2d):
        leaves = [t.clone().requires_grad_() for t in (input, *weights, *biases)]
        output = chain(function, leaves[0], leaves[1:4], leaves[4:], channels, mask)
        if dtype in (torch.float32, torch.float64):  # half types would round the sums of the chain
            output.backward(grad)
        results.append([output.detach(), *(t.grad for t in leaves if t.grad is not None)])
        with torch.no_grad():
            assert torch.equal(chain(function, input, weights, biases, channels, mask), results[-1][0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
class TestTriton:
    """What goes around the Triton kernels: filled outputs, listed rows, packed features, what is fused."""

    target = Target("triton")

    def compare(self, function, *leaves):
        """Values, fused and not, and gradients on the reference backend and on this one."""
        results = []
        for used in (dynconv.backend("reference"), self.target.use()):
            mine = [t.to(self.target.device).clone().requires_grad_() for t in leaves]
            with used:
                output = function(*mine)
                grad = integers(*output.shape, low=0, high=2, seed=40).to(output)
                grads = torch.autograd.grad(output, mine, grad)
                with torch.no_grad():
                    fused = function(*mine)
            results.append([output.detach(), fused, *grads])
        for which, (want, have) in enumerate(zip(*results, strict=True)):
            assert torch.equal(want, have), which

    @pytest.mark.parametrize("kind", ["bool", "gate", "residual", "at sites"])
    def test_epilogue(self, kind):
        (input, weight, bias), grad, _, masks = case(n=2, cin=8, cout=16, size=(4, 3), granularity=8)
        ins, outs = (m.to(self.target.device) for m in masks)
        gate = torch.where(masks[1], integers(*masks[1].shape, low=1, high=3, seed=9), 0).float()
        residual, inactive = integers(*grad.shape, seed=11), integers(*grad.shape, seed=12)
        sites = (torch.arange(24).view(2, 1, 4, 3) % 3 > 0).to(self.target.device)
        call = lambda x, w, b, **options: gathered_conv2d(x, w, b, 1, 1, in_mask=ins, activation="relu6", **options)
        if kind == "bool":
            self.compare(lambda x, w, b: call(x, w, b, out_mask=outs), input, weight, bias)
        elif kind == "gate":
            self.compare(lambda x, w, b, g: call(x, w, b, out_mask=g), input, weight, bias, gate)
        elif kind == "residual":
            self.compare(lambda x, w, b, r: call(x, w, b, out_mask=outs, residual=r), input, weight, bias, residual)
        else:
            self.compare(
                lambda x, w, b, r, i: call(x, w, b, out_mask=outs, residual=r, inactive=i, mask=sites),
                input, weight, bias, residual, inactive,
            )  # fmt: skip

    @pytest.mark.parametrize("granularity", [1, 8])
    def test_chain_at_sites(self, granularity):
        widths = (5, 16, 8, 7)
        channels = [random_channels(2, c, seed, granularity) for seed, c in enumerate(widths[1:3])]
        channels = [ActiveChannels(c.to(self.target.device)) for c in channels]
        weights = [integers(b, a, k, k, low=-1, high=2, seed=20 + a) for a, b, k in zip(widths, widths[1:], (1, 3, 1))]
        biases = [integers(b, seed=30 + b) for b in widths[1:]]
        mask = (torch.arange(24).view(2, 1, 4, 3) % 3 > 0).to(self.target.device)
        function = lambda x, *rest: chain(gathered_conv2d, x, rest[:3], rest[3:], channels, mask)
        self.compare(function, integers(2, 5, 4, 3, low=-1, high=2), *weights, *biases)

    @pytest.mark.parametrize("positions", [(), (3,)], ids=str)
    def test_linear(self, positions):
        masks = [m.to(self.target.device) for m in (random_channels(3, 24, 1, 8), random_channels(3, 20, 2))]
        function = lambda x, w, b: gathered_linear(x, w, b, in_mask=masks[0], out_mask=masks[1])
        self.compare(function, integers(3, *positions, 24), integers(20, 24, seed=1), integers(20, seed=2))


def test_packed_features_are_the_kept_channels():
    operands, _, geometry, masks = case()
    outs = ActiveChannels(masks[1])
    dense = gathered_conv2d(*operands, *geometry, in_mask=masks[0], out_mask=outs)
    packed = gathered_conv2d(*operands, *geometry, in_mask=masks[0], out_mask=outs, packed=True)
    assert packed.shape == dense.shape
    assert packed.features.shape == (4, 7, 6, 5)
    assert packed.features.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed.unpack(), dense)
    assert torch.equal(pack(dense, outs).features, packed.features)
    assert not packed.features[torch.arange(4), outs.count.clamp(max=6).long()][outs.count < 7].any()
    few = ActiveChannels(masks[1] & (torch.arange(7) < 3))
    packed = gathered_conv2d(*operands, *geometry, out_mask=few, packed=True)
    assert packed.features.shape[1] == few.capacity == 3
    assert torch.equal(packed.unpack(), gathered_conv2d(*operands, *geometry, out_mask=few))
    nothing = gathered_conv2d(*operands, *geometry, out_mask=torch.zeros(4, 7) > 0, packed=True)
    assert nothing.features.shape[1] == 0 and not nothing.unpack().any()
    after = torch.ones(2, 7, 1, 1)
    assert torch.equal(gathered_conv2d(nothing, after, torch.ones(2)), torch.ones(4, 2, 6, 5))


def test_an_empty_set_stays_in_the_graph():
    """Gradients are zeros, never None, whatever the gates have chosen."""
    (input, weight, bias), _, geometry, masks = case()
    for used in ("cpu", "reference"):
        leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
        with dynconv.backend(used):
            packed = gathered_conv2d(*leaves, *geometry, out_mask=masks[1] & False, packed=True)
            (packed.unpack().sum() + gathered_conv2d(packed, torch.ones(2, 7, 1, 1)).sum()).backward()
        assert all(t.grad is not None and not t.grad.any() for t in leaves)


def test_packed_features_cross_the_border_of_a_compiled_graph():
    """Inside nobody knows the count, so the features have room for all channels."""
    torch._dynamo.reset()
    (input, weight, bias), _, geometry, masks = case()
    mask, after = masks[1] & (torch.arange(7) < 3), integers(2, 7, 1, 1, seed=9)
    first = lambda x, m: gathered_conv2d(x, weight, bias, *geometry, out_mask=m, packed=True)
    second = lambda features: gathered_conv2d(features, after)
    expected = second(first(input, mask))
    compiled = torch.compile(first, backend="eager", fullgraph=True)(input, mask)
    assert compiled.features.shape[1] == 7
    assert torch.equal(second(compiled), expected)
    assert torch.equal(compiled.unpack(), first(input, mask).unpack())
    assert torch.equal(torch.compile(second, backend="eager", fullgraph=True)(first(input, mask)), expected)
    torch._dynamo.reset()


def test_packed_features_without_room_are_refused():
    channels = ActiveChannels(torch.ones(2, 5, dtype=torch.bool), capacity=5)
    sets = (channels.index, channels.count, channels.index, channels.count)
    where = ((3, 3), (1, 1), (0, 0), (1, 1), 1, 1, "cpu", "sparse", [False, False])
    arguments = (torch.ones(2, 4, 3, 3), torch.ones(5, 5, 1, 1), None, *sets, [], None, None, None, "none", True, -1)
    with pytest.raises(ValueError, match="input: expected room for 5 packed channels, got 4"):
        torch.ops.dynconv.gathered_conv2d(*arguments, *where)


def test_an_input_gate_does_not_read_what_no_active_site_reads():
    (input, weight, bias), grad, geometry, masks = case()
    gate = masks[0].float().requires_grad_()
    mask = torch.zeros(4, 1, 6, 5, dtype=torch.bool)
    mask[:, :, 0, 0] = True
    poisoned = input.clone()
    poisoned[:, :, 3:] = math.nan
    grads = []
    for function, x in ((reference.gathered_conv2d, input), (gathered_conv2d, poisoned)):
        output = function(x, weight, bias, *geometry, in_mask=gate, out_mask=masks[1], mask=mask)
        grads.append(torch.autograd.grad(output, gate, grad)[0])
    assert torch.equal(*grads)


def test_an_image_without_lines():
    """Padding alone makes an output; the bias has a gradient."""
    weight, bias = integers(3, 2, 1, 1).requires_grad_(), integers(3).requires_grad_()
    input = torch.ones(2, 2, 0, 5, requires_grad=True)
    output = gathered_conv2d(input, weight, bias, 1, 1, out_mask=torch.ones(1, 3) > 0)
    output.sum().backward()
    assert torch.equal(output, bias.view(1, 3, 1, 1).expand(2, 3, 2, 7))
    assert input.grad.shape == input.shape and not weight.grad.any() and bias.grad.tolist() == [28.0] * 3


def test_packing_is_differentiable():
    input, mask = torch.randn(3, 6, 2, 2, dtype=torch.float64, requires_grad=True), random_channels(3, 6)
    channels = ActiveChannels(mask)
    assert torch.autograd.gradcheck(lambda x: pack(x, channels).features, input)
    features = pack(input, channels).features.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: PackedChannels(f, channels).unpack(), features)


def test_flops_fall_with_both_sets():
    for groups in (1, 2):
        operands, _, geometry, masks = case(cin=6, cout=8, groups=groups)
        kept = [m.view(4, groups, -1).sum(2) for m in masks]
        expected = 2 * 6 * 5 * 9 * int((kept[0] * kept[1]).sum())
        leaves = [t.requires_grad_() for t in operands]
        with FlopCounterMode(display=False) as counter:
            output = gathered_conv2d(*leaves, *geometry, in_mask=masks[0], out_mask=masks[1])
        assert counter.get_total_flops() == expected
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        assert counter.get_total_flops() == 2 * expected


class TestRegistration:
    def arguments(self, listed):
        operands, grad, _, masks = case(cin=4, cout=6, groups=2)
        ins, outs = (ActiveChannels(m) for m in masks)
        sites = ActiveSites(torch.arange(120).view(4, 1, 6, 5) % 3 > 0)
        sets = (ins.index, ins.count, outs.index, outs.count, [sites.mask, sites.index, sites.count] if listed else [])
        return operands, grad, sets, ((6, 5), (1, 1), (1, 1), (1, 1), 2, 1, "cpu", "sparse", [True, True])

    @pytest.mark.parametrize("listed", [False, True], ids=["all sites", "listed sites"])
    def test_opcheck_forward(self, listed):
        operands, _, sets, where = self.arguments(listed)
        leaves = [t.requires_grad_() for t in operands]
        plain = (None, None, None, "none", False, -1, *where)
        op = torch.ops.dynconv.gathered_conv2d.default
        torch.library.opcheck(op, (*leaves, *sets, *plain))
        torch.library.opcheck(op, (*leaves[:2], None, *sets, *plain))
        operands, grad, sets, where = self.arguments(listed)
        finish = (torch.ones(4, 6), grad.clone(), grad.clone() if listed else None, "silu")
        torch.library.opcheck(op, (*operands, *sets, *finish, False, -1, *where))
        finish = (torch.ones(4, 6), None, None, "relu")
        torch.library.opcheck(op, (*operands, *sets, *finish, True, 6, *where))

    @pytest.mark.parametrize("listed", [False, True], ids=["all sites", "listed sites"])
    @pytest.mark.parametrize("wanted", [[True] * 3, [True, False, False], [False, True, True]])
    def test_opcheck_backward(self, wanted, listed):
        (input, weight, _), grad, sets, where = self.arguments(listed)
        arguments = (grad, input, weight, *sets, False, False, *where, wanted)
        torch.library.opcheck(torch.ops.dynconv.gathered_conv2d_backward.default, arguments)

    def test_what_is_fused_has_no_gradient(self):
        operands, _, sets, where = self.arguments(False)
        leaves = [t.requires_grad_() for t in operands]
        output = torch.ops.dynconv.gathered_conv2d(*leaves, *sets, None, None, None, "relu", False, -1, *where)
        with pytest.raises(RuntimeError, match="expected no gate, residual, inactive or activation"):
            output.sum().backward()

    def test_second_derivative_is_refused(self):
        operands, _, geometry, masks = case()
        leaves = [t.requires_grad_() for t in operands]
        output = gathered_conv2d(*leaves, *geometry, in_mask=masks[0], out_mask=masks[1])
        (first,) = torch.autograd.grad((output**2).sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            first.sum().backward()


@pytest.mark.parametrize(("dynamic", "backend"), [(False, "inductor"), (True, "aot_eager")], ids=["static", "dynamic"])
def test_compile_forward_and_backward(dynamic, backend):
    torch._dynamo.reset()
    block = lambda x, w, b, in_mask, out_mask: gathered_conv2d(x, w, b, 1, 1, in_mask=in_mask, out_mask=out_mask).relu()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in ((6, 5), (7, 9)):
        operands, grad, _, masks = case(size=size)
        gates = masks[0].float(), masks[1]
        expected = run(block, operands, grad, (), gates)
        actual = run(compiled, operands, grad, (), gates)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    torch._dynamo.reset()


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, input, weight, mask):
            return gathered_conv2d(input, weight, padding=1, in_mask=mask)

    (input, weight, _), _, _, masks = case()
    program = torch.export.export(Layer(), (input, weight, masks[0]))
    expected = gathered_conv2d(input, weight, padding=1, in_mask=masks[0])
    assert torch.equal(program.module()(input, weight, masks[0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_conv2d(dtype):
    operands, _, geometry, masks = case()
    leaves = [t.requires_grad_() for t in operands]
    with torch.autocast("cpu", dtype):
        output = gathered_conv2d(*leaves, *geometry, in_mask=masks[0], out_mask=masks[1])
    assert output.dtype == dtype
    output.float().sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3


BAD = {
    "in_mask: expected a bool or floating tensor, got torch.int64": dict(in_mask=torch.ones(4, 5, dtype=torch.int64)),
    "in_mask: expected a bool or floating tensor, got list": dict(in_mask=[True]),
    "in_mask: expected a shape that broadcasts to [4, 5], got [4, 6]": dict(in_mask=torch.ones(4, 6) > 0),
    "out_mask: expected a shape that broadcasts to [4, 7], got [4, 1, 7]": dict(out_mask=torch.ones(4, 1, 7) > 0),
    "out_mask: expected channels of [4, 7] (N, C), got [4, 5]": dict(out_mask=ActiveChannels(torch.ones(4, 5) > 0)),
    "in_mask: expected a mask on cpu, where the input is, got meta": dict(
        in_mask=torch.ones(4, 5, dtype=torch.bool, device="meta")
    ),
    "weight: expected torch.float32, the input's type, got torch.float64": dict(weight=torch.ones(7, 5, 3, 3).double()),
    "groups: expected a divisor": dict(groups=2),
    "input: expected shape [N, Cin, H, W] or [Cin, H, W], got [5, 6]": dict(input=torch.ones(5, 6)),
    "input: expected a tensor": dict(input=None),
    "input: expected features [4, 5 or more, H, W], got [4, 4, 6, 5]": dict(
        input=PackedChannels(torch.ones(4, 4, 6, 5), ActiveChannels(torch.ones(4, 5) > 0)), in_mask=None
    ),
    "in_mask: expected None beside packed channels": dict(
        input=PackedChannels(torch.ones(4, 5, 6, 5), ActiveChannels(torch.ones(4, 5) > 0))
    ),
    "activation: expected None or one of relu": dict(activation="tanh"),
    "residual: expected a shape that broadcasts to [4, 7, 6, 5], got [4, 7, 6, 4]": dict(
        residual=torch.ones(4, 7, 6, 4)
    ),
    "residual: expected None for a packed output": dict(residual=torch.ones(4, 7, 6, 5), packed=True),
    "inactive: expected a mask beside it": dict(inactive=torch.ones(4, 7, 6, 5)),
    "mask: expected sites of [4, 1, 6, 5], got (4, 6, 4)": dict(mask=ActiveSites(torch.ones(4, 1, 6, 4) > 0)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    operands, _, _, masks = case()
    arguments = dict(zip(("input", "weight", "bias"), operands, strict=True), in_mask=masks[0], out_mask=masks[1])
    with pytest.raises((TypeError, ValueError)) as raised:
        gathered_conv2d(**{**arguments, "padding": 1, **BAD[message]})
    assert str(raised.value).startswith(message)


def test_meta_tensors_have_the_right_shape():
    input, weight = torch.ones(2, 3, 4, 4, device="meta"), torch.ones(5, 3, 1, 1, device="meta")
    assert gathered_conv2d(input, weight, out_mask=torch.ones(2, 5, device="meta") > 0).shape == (2, 5, 4, 4)


def test_the_reference_can_be_forced():
    operands, _, geometry, masks = case()
    with dynconv.backend("reference"):
        output = gathered_conv2d(*operands, *geometry, in_mask=masks[0], out_mask=masks[1])
    assert torch.equal(output, reference.gathered_conv2d(*operands, *geometry, in_mask=masks[0], out_mask=masks[1]))


class TestActiveChannels:
    def test_index_count_and_inverse(self):
        mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
        channels = ActiveChannels(mask)
        assert channels.shape == (3, 4)
        assert channels.count.tolist() == [3, 0, 4]
        assert channels.index.tolist() == [[0, 2, 3, ~1], [~3, ~2, ~1, ~0], [0, 1, 2, 3]]
        assert channels.inverse.tolist() == [[0, -1, 1, 2], [-1] * 4, [0, 1, 2, 3]]
        assert {channels.index.dtype, channels.count.dtype, channels.inverse.dtype} == {torch.int32}
        assert channels.density == pytest.approx(7 / 12)
        assert torch.equal(ActiveChannels._mask_of(channels.index), mask)

    def test_a_coarser_mask_stands_for_groups(self):
        channels = ActiveChannels(torch.tensor([[True, False, True]]), (2, 7), granularity=3)
        assert channels.mask.tolist() == [[True, True, True, False, False, False, True]] * 2

    def test_a_gate_is_kept_and_a_mask_is_copied(self):
        gate = torch.tensor([[0.0, 2.0]], requires_grad=True)
        assert ActiveChannels(gate).mask.tolist() == [[False, True]]
        assert ActiveChannels(gate).gate.grad_fn is not None
        mask = torch.ones(1, 2, dtype=torch.bool)
        channels = ActiveChannels(mask)
        mask.zero_()
        assert channels.mask.all()

    def test_groups_are_found_or_checked(self):
        mask = torch.tensor([[True] * 8 + [False] * 8 + [True] * 4, [False] * 16 + [True] * 4])
        assert ActiveChannels.from_groups(mask).granularity == 8
        assert torch.equal(ActiveChannels.from_groups(mask, 4).mask, mask)
        assert ActiveChannels.from_groups(~torch.eye(3, dtype=torch.bool)).granularity == 1
        with pytest.raises(ValueError, match="mask: expected whole groups of 16"):
            ActiveChannels.from_groups(mask, 16)
        with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got torch.float32"):
            ActiveChannels.from_groups(mask.float())
        compiled = torch.compile(lambda m: ActiveChannels.from_groups(m, 16).mask, backend="eager", fullgraph=True)
        assert torch.equal(compiled(mask[1:]), mask[1:])
        with pytest.raises(RuntimeError, match="mask: expected whole groups of 16"):
            compiled(mask)
        torch._dynamo.reset()

    def test_capacity_is_counted_or_given(self):
        mask = torch.tensor([[True, False, True], [False] * 3])
        assert ActiveChannels(mask).capacity == 2
        assert ActiveChannels(mask, capacity=3).capacity == 2  # no more than there are
        assert ActiveChannels(mask.repeat(1, 2), capacity=5).capacity == 5
        with pytest.raises(ValueError, match="capacity: expected at least 2, the most channels of a sample, got 1"):
            ActiveChannels(mask, capacity=1)
        with pytest.raises(TypeError, match=r"capacity: expected an int, got 1\.0"):
            ActiveChannels(mask, capacity=1.0)
        assert ActiveChannels(mask.to("meta")).capacity == 3

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (dict(mask=1), TypeError, "mask: expected a bool or floating tensor, got int"),
            (dict(mask=torch.ones(3) > 0), ValueError, r"mask: expected shape \[N, C\], got \[3\]"),
            (dict(mask=torch.ones(1, 3) > 0, granularity=2), ValueError, "size: expected"),
            (dict(mask=torch.ones(1, 3) > 0, granularity=0), ValueError, "granularity: expected at least 1, got 0"),
            (dict(mask=torch.ones(1, 3) > 0, granularity=2.0), TypeError, "granularity: expected an int, got 2.0"),
            (
                dict(mask=torch.ones(1, 3) > 0, size=(2, 7), granularity=2),
                ValueError,
                r"mask: expected a shape that broadcasts to \[2, 4\], got \[1, 3\]",
            ),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, error, message):
        with pytest.raises(error, match=message):
            ActiveChannels(**arguments)
