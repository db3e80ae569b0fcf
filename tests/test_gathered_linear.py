"""gathered_linear against the dense reference: values, gradients, contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import dynconv
from dynconv import ActiveChannels, gathered_linear, reference

NAMES = ("output", "input", "weight", "bias", "in_mask", "out_mask")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
POSITIONS = [(), (3,), (2, 5)]  # none, a few, and so many that the layer is a 1x1 convolution


def integers(*shape, low=-2, high=3, dtype=torch.float32, seed=0):
    """Integer values: every sum is exact, whatever its order, so results must be equal."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_features(n, features, seed=0, granularity=1):
    """bool [n, features], about half of them; the first sample keeps none, the second all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, math.ceil(features / granularity), generator=generator) < 0.5
    mask = mask.repeat_interleave(granularity, 1)[:, :features]
    mask[:1], mask[1:2] = False, True
    return mask


def case(n=5, cin=21, cout=37, positions=(), dtype=torch.float32, granularity=1):
    """Integer-valued operands, the output's gradient and the masks."""
    operands = (
        integers(n, *positions, cin, dtype=dtype),
        integers(cout, cin, dtype=dtype, seed=1),
        integers(cout, dtype=dtype, seed=2),
    )
    out_mask = random_features(n, cout, 4, granularity)[torch.arange(n) - 1]
    masks = random_features(n, cin, 3, granularity), out_mask
    return operands, integers(n, *positions, cout, dtype=dtype, seed=5), masks


def run(function, operands, grad, masks):
    """[output, *gradients of the operands and of the floating masks]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands]
    masks = [m.clone().requires_grad_() if torch.is_tensor(m) and m.is_floating_point() else m for m in masks]
    output = function(*leaves, in_mask=masks[0], out_mask=masks[1])
    output.backward(grad)
    return [output.detach(), *(t.grad for t in (*leaves, *masks) if torch.is_tensor(t) and t.requires_grad)]


def assert_equal_to_reference(operands, grad, masks):
    double = [m.double() if torch.is_tensor(m) and m.is_floating_point() else m for m in masks]
    exact = [None if t is None else t.double() for t in operands]
    expected = run(reference.gathered_linear, exact, grad.double(), double)
    actual = run(gathered_linear, operands, grad, masks)
    assert len(actual) == len(expected)
    for which, (want, have) in enumerate(zip(expected, actual, strict=True)):
        assert have.dtype == grad.dtype, which
        assert torch.equal(have, want.to(grad.dtype)), f"{which}: {(have - want).abs().max()}"
    assert actual[0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("granularity", [1, 8, 16])
def test_values_and_gradients_equal_the_reference(dtype, positions, granularity):
    assert_equal_to_reference(*case(cin=40, cout=70, positions=positions, dtype=dtype, granularity=granularity))


def test_the_reference_is_a_masked_linear_layer():
    (input, weight, bias), _, (ins, outs) = case(positions=(3,))
    expected = F.linear(input * ins[:, None], weight, bias) * outs[:, None]
    assert torch.equal(reference.gathered_linear(input, weight, bias, in_mask=ins, out_mask=outs), expected)


SHAPES = {
    "one feature": dict(cin=1, cout=1),
    "narrower than a vector": dict(cin=3, cout=5),
    "whole vectors": dict(cin=64, cout=64),
    "columns in strips": dict(cin=1100, cout=20),
    "strips and rows of a vector's part": dict(cin=1031, cout=20, positions=(2,)),
    "features in chunks": dict(cin=30, cout=200),
    "a tile for many samples": dict(n=20, cin=1100, cout=70),
    "seven positions": dict(positions=(7,)),
    "eight positions": dict(positions=(8,)),
    "positions of three dimensions": dict(positions=(1, 2, 3)),
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_shapes(change):
    assert_equal_to_reference(*case(**change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_gates_multiply_and_get_a_gradient(dtype, positions):
    operands, grad, masks = case(positions=positions, dtype=dtype, cin=12, cout=10)
    gates = [torch.where(m, integers(*m.shape, low=1, high=3, seed=9), 0).to(dtype) for m in masks]
    for chosen in (gates, (gates[0], masks[1]), (masks[0], gates[1]), (None, gates[1])):
        assert_equal_to_reference(operands, grad, chosen)


@pytest.mark.parametrize("which", ["neither", "in", "out"])
def test_no_mask_keeps_all(which):
    operands, grad, masks = case()
    chosen = (masks[0] if which == "in" else None, masks[1] if which == "out" else None)
    assert_equal_to_reference(operands, grad, chosen)
    if which == "neither":
        assert torch.equal(gathered_linear(*operands), F.linear(*operands))


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_nothing_kept(positions):
    operands, grad, masks = case(positions=positions)
    none = [torch.zeros_like(m) for m in masks]
    assert_equal_to_reference(operands, grad, none)
    assert_equal_to_reference(operands, grad, (none[0], masks[1]))  # the bias alone
    assert_equal_to_reference(operands, grad, (masks[0], none[1]))


def test_no_samples_no_positions_and_no_bias():
    operands, grad, masks = case()
    assert_equal_to_reference((*operands[:2], None), grad, masks)
    for n, positions in ((0, ()), (0, (3,)), (0, (9,)), (5, (0,))):
        operands, grad, masks = case(n=n, positions=positions)
        output, *grads = run(gathered_linear, operands, grad, masks)
        assert output.shape == (n, *positions, 37)
        assert [g.shape for g in grads] == [(n, *positions, 21), (37, 21), (37,)]
        assert not grads[1].any() and not grads[2].any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    assert_equal_to_reference(
        *case(n=draw(1, 6), cin=draw(1, 90), cout=draw(1, 90), positions=(draw(1, 9),), granularity=draw(1, 9))
    )


@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
def test_gradcheck(positions):
    operands, _, masks = case(n=3, cin=5, cout=4, positions=positions, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    gates = [torch.where(m, 1 + torch.rand(m.shape, generator=generator).double(), 0) for m in masks]
    leaves = [t.requires_grad_() for t in (*operands, *gates)]

    def call(input, weight, bias, in_gate, out_gate):
        # The step of the finite differences must not open a closed gate.
        closed = [torch.where(m, g, 0) for m, g in zip(masks, (in_gate, out_gate), strict=True)]
        return gathered_linear(input, weight, bias, in_mask=closed[0], out_mask=closed[1])

    assert torch.autograd.gradcheck(call, leaves)


def test_rounding_errors_stay_within_the_bound():
    """Sums of K products: |error| <= (K + 2) * eps * the same sum of absolute values (Higham, 2002, section 3.1)."""
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(20, 1500, generator=generator), torch.randn(300, 1500, generator=generator)
    grad = torch.randn(20, 300, generator=generator)
    masks = torch.rand(20, 1500, generator=generator) < 0.5, torch.rand(20, 300, generator=generator) < 0.5
    have = run(gathered_linear, (input, weight, None), grad, masks)
    want = run(reference.gathered_linear, (input.double(), weight.double(), None), grad.double(), masks)
    size = [t.abs().double() for t in (input, weight, grad)]
    bounds = run(reference.gathered_linear, (*size[:2], None), size[2], masks)
    for name, a, b, bound, terms in zip(NAMES, have, want, bounds, (1500, 300, 20), strict=False):
        assert ((a - b).abs() <= (terms + 2) * 2**-24 * bound).all(), name


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_what_is_not_kept_is_not_read(positions):
    operands, grad, masks = case(positions=positions)
    at = [m.view(m.shape[0], *(1,) * len(positions), -1) for m in masks]
    poisoned, poisoned_grad = torch.where(at[0], operands[0], math.nan), torch.where(at[1], grad, math.inf)
    for chosen in (masks, (masks[0].float(), masks[1]), [m.float() for m in masks]):
        expected = run(gathered_linear, operands, grad, chosen)
        actual = run(gathered_linear, (poisoned, *operands[1:]), poisoned_grad, chosen)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_a_batch_equals_its_samples(positions):
    (input, weight, bias), _, masks = case(n=20, cin=1100, cout=100, positions=positions)
    input = input + torch.rand(input.shape, generator=torch.Generator().manual_seed(0))
    whole = gathered_linear(input, weight, bias, in_mask=masks[0], out_mask=masks[1])
    for n in range(input.shape[0]):
        one = [t[n : n + 1] for t in (input, *masks)]
        assert torch.equal(whole[n : n + 1], gathered_linear(one[0], weight, bias, in_mask=one[1], out_mask=one[2]))


def test_the_same_bits_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(20, 1300, generator=generator), torch.randn(300, 1300, generator=generator)
    grad = torch.randn(20, 300, generator=generator)
    masks = torch.rand(20, 1300, generator=generator) < 0.5, torch.rand(20, 300, generator=generator) < 0.5
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(gathered_linear, (input, weight, None), grad, masks))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_no_uninitialised_memory_is_read():
    """PyTorch then fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for change in ({}, dict(cin=1031, cout=70), dict(n=20, cin=19, cout=9), dict(positions=(8,))):
            assert_equal_to_reference(*case(**change))
    finally:
        torch.use_deterministic_algorithms(False)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "slice": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_layouts(change, positions):
    operands, grad, masks = case(positions=positions)
    changed = lambda function: lambda x, w, *rest, **masks: function(change(x), change(w), *rest, **masks)
    grad = change(grad)
    expected = run(changed(reference.gathered_linear), operands, grad, masks)
    actual = run(changed(gathered_linear), operands, grad, masks)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_shared_features_and_kinds_of_masks():
    operands, _, masks = case()
    expected = gathered_linear(*operands, in_mask=masks[0], out_mask=masks[1])
    shared = [ActiveChannels(m) for m in masks]
    assert torch.equal(gathered_linear(*operands, in_mask=shared[0], out_mask=shared[1]), expected)
    row = masks[1][3]
    by_row = gathered_linear(*operands, out_mask=row)
    assert torch.equal(by_row, gathered_linear(*operands, out_mask=row.expand(5, -1)))


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_flops_fall_with_both_sets(positions):
    operands, _, masks = case(positions=positions)
    kept = [m.sum(1) for m in masks]
    expected = 2 * math.prod(positions) * int((kept[0] * kept[1]).sum())
    leaves = [t.requires_grad_() for t in operands]
    with FlopCounterMode(display=False) as counter:
        output = gathered_linear(*leaves, in_mask=masks[0], out_mask=masks[1])
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("positions", [2, 9])
class TestRegistration:
    def arguments(self, positions):
        operands, grad, masks = case(cin=4, cout=6, positions=(positions,))
        ins, outs = (ActiveChannels(m) for m in masks)
        return operands, grad, (ins.index, ins.count, outs.index, outs.count, 1, "sparse", [True, True])

    def test_opcheck_forward(self, positions):
        operands, _, sets = self.arguments(positions)
        leaves = [t.requires_grad_() for t in operands]
        torch.library.opcheck(torch.ops.dynconv.gathered_linear.default, (*leaves, *sets))
        torch.library.opcheck(torch.ops.dynconv.gathered_linear.default, (*leaves[:2], None, *sets))

    @pytest.mark.parametrize("wanted", [[True] * 3, [True, False, False], [False, True, True]])
    def test_opcheck_backward(self, positions, wanted):
        (input, weight, _), grad, sets = self.arguments(positions)
        arguments = (grad, input, weight, *sets, wanted)
        torch.library.opcheck(torch.ops.dynconv.gathered_linear_backward.default, arguments)


def test_second_derivative_is_refused():
    operands, _, masks = case()
    leaves = [t.requires_grad_() for t in operands]
    output = gathered_linear(*leaves, in_mask=masks[0], out_mask=masks[1])
    (first,) = torch.autograd.grad((output**2).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize(("dynamic", "backend"), [(False, "inductor"), (True, "aot_eager")], ids=["static", "dynamic"])
def test_compile_forward_and_backward(dynamic, backend):
    torch._dynamo.reset()
    layer = lambda x, w, b, in_mask, out_mask: gathered_linear(x, w, b, in_mask=in_mask, out_mask=out_mask).relu()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for positions in ((3,), (9,)):
        operands, grad, masks = case(positions=positions)
        gates = masks[0].float(), masks[1]
        expected = run(layer, operands, grad, gates)
        actual = run(compiled, operands, grad, gates)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    torch._dynamo.reset()


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, input, weight, mask):
            return gathered_linear(input, weight, in_mask=mask)

    (input, weight, _), _, masks = case()
    program = torch.export.export(Layer(), (input, weight, masks[0]))
    expected = gathered_linear(input, weight, in_mask=masks[0])
    assert torch.equal(program.module()(input, weight, masks[0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_linear(dtype):
    operands, _, masks = case()
    leaves = [t.requires_grad_() for t in operands]
    with torch.autocast("cpu", dtype):
        output = gathered_linear(*leaves, in_mask=masks[0], out_mask=masks[1])
        assert output.dtype == F.linear(*leaves).dtype == dtype
    output.float().sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3


BAD = {
    "in_mask: expected a bool or floating tensor, got torch.int64": dict(in_mask=torch.ones(5, 21, dtype=torch.int64)),
    "in_mask: expected a bool or floating tensor, got list": dict(in_mask=[True]),
    "in_mask: expected a shape that broadcasts to [5, 21], got [5, 6]": dict(in_mask=torch.ones(5, 6) > 0),
    "out_mask: expected a shape that broadcasts to [5, 37], got [5, 1, 37]": dict(out_mask=torch.ones(5, 1, 37) > 0),
    "out_mask: expected channels of [5, 37] (N, C), got [5, 21]": dict(out_mask=ActiveChannels(torch.ones(5, 21) > 0)),
    "in_mask: expected a mask on cpu, where the input is, got meta": dict(
        in_mask=torch.ones(5, 21, dtype=torch.bool, device="meta")
    ),
    "weight: expected torch.float32, the input's type, got torch.float64": dict(weight=torch.ones(37, 21).double()),
    "weight: expected a tensor on cpu, where the input is, got meta": dict(weight=torch.ones(37, 21, device="meta")),
    "weight: expected a shape [Cout, Cin] of no zeros, got [0, 21]": dict(weight=torch.ones(0, 21)),
    "weight: expected float32, float64, float16 or bfloat16, got torch.int64": dict(
        weight=torch.ones(37, 21, dtype=torch.int64)
    ),
    "bias: expected shape [37], got [21]": dict(bias=torch.ones(21)),
    "input: expected shape [N, ..., 21] or [21], got [5, 22]": dict(input=torch.ones(5, 22)),
    "input: expected shape [N, ..., 21] or [21], got []": dict(input=torch.ones(())),
    "input: expected a tensor, got NoneType": dict(input=None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    operands, _, masks = case()
    arguments = dict(zip(("input", "weight", "bias"), operands, strict=True), in_mask=masks[0], out_mask=masks[1])
    with pytest.raises((TypeError, ValueError)) as raised:
        gathered_linear(**{**arguments, **BAD[message]})
    assert str(raised.value).startswith(message)


def test_meta_tensors_have_the_right_shape():
    input, weight = torch.ones(2, 3, device="meta"), torch.ones(5, 3, device="meta")
    assert gathered_linear(input, weight).shape == (2, 5)
    assert gathered_linear(input[:, None], weight).shape == (2, 1, 5)


def test_the_reference_can_be_forced():
    operands, _, masks = case()
    with dynconv.backend("reference"):
        output = gathered_linear(*operands, in_mask=masks[0], out_mask=masks[1])
    assert torch.equal(output, reference.gathered_linear(*operands, in_mask=masks[0], out_mask=masks[1]))
