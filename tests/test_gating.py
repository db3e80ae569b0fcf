"""dynconv.gating: what the selectors keep, the gradients that train them, and the losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from dynconv import gathered_conv2d, gating
from dynconv.gating import ChannelGate, SlimmableGate, TopKGate

IN = 6
CHANNELS = 10  # in groups of 4: two and a half
SIZES = torch.tensor([4, 4, 2])
MAKE = {
    "channel": lambda **options: ChannelGate(IN, CHANNELS, 4, initial_rate=0.5, **options),
    "channel, hidden": lambda **options: ChannelGate(IN, CHANNELS, 4, hidden=5, initial_rate=0.5, **options),
    "top k": lambda **options: TopKGate(IN, CHANNELS, 2, 4, **options),
    "top k, no boost": lambda **options: TopKGate(IN, CHANNELS, 2, 4, boost=False, **options),
    "slimmable": lambda **options: SlimmableGate(IN, CHANNELS, (4, 8, 10), **options),
}
every_gate = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
NOISY = [name for name in MAKE if name != "top k"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def features(n=5, seed=0, dtype=torch.float32):
    return torch.randn(n, IN, 4, 3, generator=seeded(seed)).to(dtype)


def integers(*shape, seed=0):
    return torch.randint(-2, 3, shape, generator=seeded(seed)).float()


def made(make, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return make(**options).to(dtype)


def close(actual, expected, roundings, scale=None):
    """Within so many roundings of the largest number that was added."""
    scale = expected.abs() if scale is None else scale
    assert bool(((actual - expected).abs() <= roundings * torch.finfo(actual.dtype).eps * scale).all())


# --- selectors


@every_gate
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shapes_and_rates(make, training, dtype):
    gate = made(make, dtype).train(training)
    selection = gate(features(dtype=dtype), generator=seeded(1))
    assert selection.channels.shape == (5, CHANNELS)
    assert selection.scores.shape == (5, 3)
    assert torch.equal(selection.rate, selection.channels.count.to(selection.rate.dtype) / CHANNELS)
    mask = selection.channels.mask
    for start in (0, 4, 8):  # groups of 4 are kept or skipped together
        assert torch.equal(mask[:, start : start + 4].all(1), mask[:, start : start + 4].any(1))


@pytest.mark.parametrize("name", [name for name in MAKE if name != "top k"])
def test_gates_are_exactly_one_or_zero(name):
    gate = made(MAKE[name])
    for seed in range(20):
        values = gate(features(64, seed) * 100).channels.gate
        assert torch.equal(values, (values != 0).float())


@every_gate
def test_without_gradients_there_is_only_a_mask(make):
    gate = made(make).eval()
    with torch.no_grad():
        plain = gate(features())
    watched = gate(features())
    assert torch.equal(plain.channels.mask, watched.channels.mask)
    boosts = getattr(gate, "boost", False)
    assert (plain.channels.gate is None) != boosts
    assert watched.channels.gate.requires_grad
    assert plain.kept.gate is None and watched.kept.gate is None
    assert torch.equal(watched.kept.index, watched.channels.index)
    assert watched.kept.granularity == watched.channels.granularity


@every_gate
def test_evaluation_repeats_and_a_generator_decides_in_training(make):
    gate = made(make).eval()
    assert torch.equal(gate(features()).channels.mask, gate(features()).channels.mask)
    gate.train()
    chosen = lambda seed: gate(features(64), generator=seeded(seed)).channels.mask
    assert torch.equal(chosen(3), chosen(3))
    assert torch.equal(chosen(3), chosen(4)) == (getattr(gate, "boost", False) is True)
    torch.manual_seed(7)
    first = gate(features(64)).channels.mask
    torch.manual_seed(7)
    assert torch.equal(first, gate(features(64)).channels.mask)


def test_a_channel_gate_keeps_positive_logits():
    gate = made(MAKE["channel"]).eval()
    selection = gate(features())
    assert torch.equal(selection.channels.mask, (selection.scores > 0).repeat_interleave(4, 1)[:, :CHANNELS])
    assert 0 < selection.channels.density < 1


def test_the_noise_keeps_a_channel_with_its_probability():
    gate = ChannelGate(1, 3)
    probability = torch.tensor([0.1, 0.5, 0.85])
    with torch.no_grad():
        gate.head.weight.zero_()
        gate.head.bias.copy_(probability.logit())
        n = 20000
        share = gate(torch.zeros(n, 1, 1, 1), generator=seeded()).channels.mask.float().mean(0)
    deviation = (probability * (1 - probability) / n).sqrt()
    assert bool(((share - probability).abs() < 4 * deviation).all())
    assert ChannelGate(1, 3, initial_rate=0.85).head.bias.detach().sigmoid().tolist() == pytest.approx([0.85] * 3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_straight_through_gradients_of_a_channel_gate(temperature):
    gate = made(MAKE["channel"], torch.float64, temperature=temperature)
    selection = gate(features(dtype=torch.float64), generator=seeded(3))
    selection.scores.retain_grad()
    factors = integers(5, CHANNELS).double()
    (selection.channels.gate * factors).sum().backward()
    logits = selection.scores.detach()
    noise = torch.rand(5, 3, generator=seeded(3), dtype=torch.float64).logit()
    soft = ((logits + noise) / temperature).sigmoid()
    grouped = torch.stack([part.sum(1) for part in factors.split([4, 4, 2], 1)], 1)
    close(selection.scores.grad, grouped * soft * (1 - soft) / temperature, 8)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_straight_through_gradients_of_a_slimmable_gate(temperature):
    gate = made(MAKE["slimmable"], torch.float64, temperature=temperature)
    selection = gate(features(dtype=torch.float64), generator=seeded(3))
    selection.scores.retain_grad()
    factors = integers(5, CHANNELS).double()
    (selection.channels.gate * factors).sum().backward()
    uniform = torch.rand(5, 3, generator=seeded(3), dtype=torch.float64)
    noisy = selection.scores.detach() - (-uniform.log()).log()
    assert torch.equal(selection.channels.count, torch.tensor([4, 8, 10])[noisy.argmax(1)].int())
    soft = (noisy / temperature).softmax(1)
    towards = torch.stack([factors[:, :width].sum(1) for width in (4, 8, 10)], 1)  # d loss / d one-hot
    expected = soft * (towards - (soft * towards).sum(1, keepdim=True)) / temperature
    close(selection.scores.grad, expected, 32, towards.abs().amax(1, keepdim=True).expand_as(expected) / temperature)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_rates_gradient_reaches_every_gate(training):
    gate = made(MAKE["channel"], torch.float64).train(training)
    selection = gate(features(dtype=torch.float64))
    selection.scores.retain_grad()
    selection.rate.sum().backward()
    probability = selection.scores.detach().sigmoid()
    close(selection.scores.grad, SIZES / CHANNELS * probability * (1 - probability), 8)

    gate = made(MAKE["slimmable"], torch.float64).train(training)
    selection = gate(features(dtype=torch.float64))
    selection.scores.retain_grad()
    selection.rate.sum().backward()
    soft = selection.scores.detach().softmax(1)
    widths = torch.tensor([4.0, 8.0, 10.0]).double() / CHANNELS
    expected = soft * (widths - (soft * widths).sum(1, keepdim=True))
    close(selection.scores.grad, expected, 32, torch.ones_like(expected))


def test_the_task_reaches_kept_gates_and_the_rate_the_others():
    gate = made(MAKE["channel"])
    weight = torch.randn(CHANNELS, IN, 3, 3, generator=seeded(2))
    gradients = {}
    for loss in ("task", "budget"):
        selection = gate(features(), generator=seeded(3))
        selection.scores.retain_grad()
        output = gathered_conv2d(features(), weight, padding=1, out_mask=selection.channels)
        (output.square().sum() if loss == "task" else gating.budget_loss([selection.rate], 0.1)).backward()
        gradients[loss] = selection.scores.grad
    kept = selection.channels.mask[:, ::4]
    assert 0 < kept.float().mean() < 1
    assert torch.equal(gradients["task"] != 0, kept)
    assert bool((gradients["budget"] > 0).all())


@every_gate
def test_a_convolution_of_the_selection_is_the_masked_one(make):
    selection = made(make).eval()(features())
    input, weight = integers(5, IN, 4, 3), integers(CHANNELS, IN, 3, 3, seed=1)
    output = gathered_conv2d(input, weight, padding=1, out_mask=selection.kept)
    dense = F.conv2d(input, weight, padding=1)
    assert torch.equal(output, torch.where(selection.channels.mask[:, :, None, None], dense, 0))


# --- fixed budgets


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_budget_is_exactly_met(k, training):
    torch.manual_seed(0)
    gate = TopKGate(IN, 12, k, 4, boost=False).train(training)
    selection = gate(features(64))
    assert torch.equal(selection.channels.count, torch.full((64,), 4 * k, dtype=torch.int32))
    assert torch.equal(selection.rate, torch.full((64,), k / 3))
    assert not selection.rate.requires_grad
    if not training:
        best = selection.scores.topk(k, 1).indices
        assert torch.equal(selection.channels.mask[:, ::4].gather(1, best), torch.ones(64, k) > 0)


def test_noise_gives_every_group_its_turn():
    gate = made(MAKE["top k, no boost"])
    assert bool(gate(features(1).expand(256, -1, -1, -1)).channels.mask.any(0).all())


def test_saliencies_multiply_winners_and_silent_winners_are_skipped():
    gate = TopKGate(2, 4, 2)
    with torch.no_grad():
        gate.head.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1], [2, -2]]))
        gate.head.bias.zero_()
    means = torch.tensor([[1.0, 3.0], [2.0, 1.0], [0.0, 0.0]])
    input = means[:, :, None, None] * torch.tensor([1.0, -1.0])  # FBS pools absolute values
    selection = gate(input)
    assert selection.scores.tolist() == [[1, 3, 0, 0], [2, 1, 0, 2], [0, 0, 0, 0]]
    assert selection.channels.gate.tolist() == [[1, 3, 0, 0], [2, 0, 0, 2], [0, 0, 0, 0]]
    assert torch.equal(selection.rate, torch.tensor([0.5, 0.5, 0.0]))
    selection.channels.gate.sum().backward()
    assert gate.head.bias.grad.tolist() == [2, 1, 0, 1]
    gate.zero_grad()
    gating.l1_loss([gate(input).scores]).backward()  # all with a saliency, winners or not
    close(gate.head.bias.grad, torch.tensor([2.0, 2.0, 0.0, 1.0]) / 3, 4)


# --- losses


def test_budget_loss():
    rates = [torch.tensor([0.25, 0.75]), torch.tensor(1.0)]
    assert gating.budget_loss(rates, 0.5).item() == 0.0625
    assert gating.budget_loss(rates, 0.5, (3, 1)).item() == 0.015625
    leaves = [rate.clone().requires_grad_() for rate in rates]
    gating.budget_loss(leaves, 0.5, (3, 1)).backward()
    # 2 * (0.625 - 0.5) * weight / samples
    assert leaves[0].grad.tolist() == [0.09375, 0.09375]
    assert leaves[1].grad.item() == 0.0625


def test_bounds_widen_from_the_target_to_everything():
    rates = [torch.tensor([0.25]), torch.tensor([0.5, 1.0])]
    both = [0.25, 0.75]
    squares = lambda upper, lower: sum(max(0, r - upper) ** 2 + max(0, lower - r) ** 2 for r in both) / 2
    for progress, annealed in ((0, 1.0), (0.5, 0.5), (1, 0.0), (7, 0.0)):
        loss = gating.bounds_loss(rates, 0.5, progress)
        assert loss.item() == pytest.approx(squares(1 - annealed * 0.5, annealed * 0.5), abs=1e-7)
    # At the start the bounds are the target itself: ConvNet-AIG's loss.
    assert gating.bounds_loss(rates, 0.5, 0).item() == 0.0625
    assert gating.bounds_loss([torch.tensor(1.0)], 0.5, 0.5).item() == pytest.approx((1 - 0.75) ** 2)


def test_l1_loss():
    scores = [torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[4.0], [2.0]])]
    assert gating.l1_loss(scores).item() == 6.0


def test_product_rates_are_those_of_the_layers():
    rates = [1.0, torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.25]), 1.0]
    first, second, third = gating.product_rates(rates)
    assert first.tolist() == [0.5, 1.0]
    assert second.tolist() == [0.25, 0.25]
    assert third.tolist() == [0.5, 0.25]


def test_training_reaches_the_budget():
    """Half of the channels copy the input, which the task rewards; it is charged for the others."""
    torch.manual_seed(0)
    gate = ChannelGate(8, 16, hidden=8)
    weight = torch.cat([torch.eye(8), -torch.eye(8)])[:, :, None, None]
    optimizer = torch.optim.Adam(gate.parameters(), 0.02)
    for step in range(200):
        gate.train(step < 133)  # at last as it will be used
        input = torch.randn(32, 8, 3, 3)
        selection = gate(input)
        output = gathered_conv2d(input, weight, out_mask=selection.channels)
        task = -(output * input.repeat(1, 2, 1, 1)).mean()
        (task + 10 * gating.budget_loss([selection.rate], 0.25)).backward()
        optimizer.step()
        optimizer.zero_grad()
    gate.eval()
    with torch.no_grad():
        selection = gate(torch.randn(256, 8, 3, 3))
    # The reward, 1 for the whole rate, balances the budget at 0.25 + 1 / (2 * 10); one channel more or less.
    assert selection.rate.mean().item() == pytest.approx(0.3, abs=1 / 16)
    assert not selection.channels.mask[:, 8:].any()


# --- contract


@pytest.mark.parametrize("name", MAKE)
def test_compile(name):
    torch._dynamo.reset()
    torch.manual_seed(0)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = MAKE[name]()
            self.weight = torch.nn.Parameter(torch.randn(CHANNELS, IN, 3, 3))
            self.next = torch.nn.Parameter(torch.randn(4, CHANNELS, 1, 1))

        def forward(self, input):
            selection = self.gate(input)
            output = gathered_conv2d(input, self.weight, padding=1, out_mask=selection.channels).relu()
            return gathered_conv2d(output, self.next, in_mask=selection.kept), selection.rate

    layer = Layer()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        torch.manual_seed(1)
        output, rate = run(features())
        (output.sum() + rate.sum()).backward()
        results.append([output, rate, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NOISY)
def test_autocast(name):
    gate = made(MAKE[name])
    with torch.autocast("cpu", torch.bfloat16):
        selection = gate(features())
        output = gathered_conv2d(features(), torch.ones(CHANNELS, IN, 1, 1), out_mask=selection.channels)
    assert output.dtype == torch.bfloat16
    (output.float().sum() + selection.rate.sum()).backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in gate.parameters())


@every_gate
def test_an_empty_batch(make):
    selection = made(make).eval()(features(0))
    assert selection.channels.shape == (0, CHANNELS)
    assert selection.rate.shape == (0,)


def test_the_state_is_that_of_the_head():
    assert set(MAKE["channel"]().state_dict()) == {"head.weight", "head.bias"}
    assert "granularity=4" in repr(MAKE["channel"]()) and "k=2" in repr(MAKE["top k"]())


RATES = [torch.tensor([0.5]), torch.tensor([0.25])]
BAD = {
    "in_channels: expected an int, got 2.0": lambda: ChannelGate(2.0, 4),
    "channels: expected at least 1, got 0": lambda: TopKGate(2, 0, 1),
    "granularity: expected at least 1, got -1": lambda: ChannelGate(2, 4, -1),
    "hidden: expected at least 1, got 0": lambda: ChannelGate(2, 4, hidden=0),
    "temperature: expected above 0, got 0": lambda: ChannelGate(2, 4, temperature=0),
    "initial_rate: expected between 0 and 1, got 1": lambda: ChannelGate(2, 4, initial_rate=1),
    "k: expected 1 to 2, got 3": lambda: TopKGate(2, 4, 3, 2),
    "widths: expected ascending numbers in 1 to 4, got [2, 2]": lambda: SlimmableGate(2, 4, [2, 2]),
    "widths: expected ascending numbers in 1 to 4, got [2, 5]": lambda: SlimmableGate(2, 4, [2, 5]),
    "widths: expected ascending numbers in 1 to 4, got []": lambda: SlimmableGate(2, 4, []),
    "widths: expected an int, got 0.5": lambda: SlimmableGate(2, 4, [0.5, 1.0]),
    "temperature: expected above 0, got -1": lambda: SlimmableGate(2, 4, [2], temperature=-1),
    "input: expected shape [N, 2, H, W], got [5, 6, 4, 3]": lambda: ChannelGate(2, 4)(features()),
    "input: expected a tensor, got NoneType": lambda: TopKGate(2, 4, 1)(None),
    "rates: expected a sequence of tensors, one for each layer, got a tensor": lambda: gating.budget_loss(
        RATES[0], 0.5
    ),
    "rates: expected a sequence of tensors, one for each layer, got ['float']": lambda: gating.bounds_loss(
        [0.5], 0.5, 0
    ),
    "rates: expected a tensor for each layer, got none": lambda: gating.bounds_loss([], 0.5, 0),
    "target: expected between 0 and 1, got 2": lambda: gating.budget_loss(RATES, 2),
    "weights: expected 2, one for each rate, got 1": lambda: gating.budget_loss(RATES, 0.5, [1]),
    "weights: expected costs that are not negative, and not all zero, got [0, 0]": lambda: gating.budget_loss(
        RATES, 0.5, [0, 0]
    ),
    "progress: expected at least 0, got nan": lambda: gating.bounds_loss(RATES, 0.5, math.nan),
    "scores: expected a sequence of tensors, one for each layer, got a tensor": lambda: gating.l1_loss(RATES[0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((TypeError, ValueError)) as raised:
        BAD[message]()
    assert str(raised.value) == message


@pytest.mark.parametrize("make", [lambda: SlimmableGate(4, 16, (4, 8)), lambda: TopKGate(4, 16, 8, boost=False)])
def test_features_that_overflowed_keep_to_the_budget(make):
    """One step of a half-precision run that a gradient scaler would skip."""
    gate = make()
    for train in (True, False):
        selection = gate.train(train)(torch.full((2, 4, 3, 3), float("nan")))
        assert int(selection.channels.count.max()) <= 8


def test_layers_without_a_gate_are_numbers_in_a_budget():
    rate = torch.tensor([0.5, 0.25], requires_grad=True)
    shares = gating.product_rates([1, 1, rate, 1])
    loss = gating.budget_loss(shares, 0.5, [1, 2, 1])
    assert loss.item() == pytest.approx(((1 + 2 * 0.375 + 0.375) / 4 - 0.5) ** 2)
    loss.backward()
    assert rate.grad.abs().sum() > 0
