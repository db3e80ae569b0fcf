"""The modules: constructor, parameters, state_dict and values of the torch.nn classes they replace."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from dynconv import ActiveSites
from dynconv.nn import GatheredBatchNorm2d, GatheredConv2d, GatheredLinear, MaskedBatchNorm2d, MaskedConv2d

CONSTRUCTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 1), "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "dtype": torch.float64},
]


def exact(layer: nn.Conv2d) -> nn.Conv2d:
    """Integer parameters, so that every backend gives the same bits."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=2)
        parameter.data.round_()
    return layer


@pytest.mark.parametrize("keywords", CONSTRUCTIONS, ids=str)
def test_equals_the_masked_dense_layer(target, keywords):
    dense = exact(nn.Conv2d(3, 4, **keywords)).to(target.device)
    masked = MaskedConv2d.from_dense(dense)
    assert repr(masked) == repr(dense).replace("Conv2d", "MaskedConv2d", 1)
    input = torch.randn(2, 3, 8, 9, device=target.device, dtype=dense.weight.dtype).round()
    expected = dense(input)
    mask = torch.rand(2, 1, *expected.shape[2:], device=target.device) < 0.5
    inactive = torch.randn_like(expected)
    with target.use():
        assert torch.equal(masked(input, mask, inactive=inactive), torch.where(mask, expected, inactive))
        assert torch.equal(masked(input), expected)
        assert torch.equal(masked(input, ActiveSites(mask)), torch.where(mask, expected, 0))
        out = inactive.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert masked(input, mask, out=out) is out


def test_constructor_and_state_dict_are_those_of_conv2d():
    assert inspect.signature(MaskedConv2d) == inspect.signature(nn.Conv2d)
    dense, masked = nn.Conv2d(4, 6, 3, groups=2), MaskedConv2d(4, 6, 3, groups=2)
    assert list(masked.state_dict()) == list(dense.state_dict())
    masked.load_state_dict(dense.state_dict(), strict=True)
    dense.load_state_dict(masked.state_dict(), strict=True)
    assert torch.equal(masked.weight, dense.weight)
    assert isinstance(masked, nn.Conv2d)


def test_from_dense_shares_parameters_and_keeps_their_state():
    dense = nn.Conv2d(2, 2, 3, dtype=torch.float64).eval().requires_grad_(False)
    masked = MaskedConv2d.from_dense(dense)
    assert masked.weight is dense.weight and masked.bias is dense.bias
    assert not masked.training and not masked.weight.requires_grad
    with pytest.raises(TypeError, match=r"module: expected an nn.Conv2d, got Linear"):
        MaskedConv2d.from_dense(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"module: expected an nn.Conv2d, got LazyConv2d"):
        MaskedConv2d.from_dense(nn.LazyConv2d(2, 3))


class Scaled(nn.Conv2d):
    def forward(self, input):
        return super().forward(2 * input)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Activated(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Halved(nn.Linear):
    def forward(self, input):
        return super().forward(input / 2)


class Renamed(nn.Conv2d):
    """Nothing of its own but a name."""


class Tied(nn.Conv2d):
    """Its weight is computed from another parameter."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.row = nn.Parameter(self.weight.detach()[:1])
        del self.weight

    @property
    def weight(self):
        return self.row.expand(2, -1, -1, -1)


def patched(layer):
    layer.forward = lambda input: input
    return layer


def hooked(register, layer):
    register(layer, lambda *_: None)
    return layer


CONV, NORM, LINEAR = (lambda: nn.Conv2d(2, 2, 3)), (lambda: nn.BatchNorm2d(2)), (lambda: nn.Linear(2, 2))
STANDS_FOR = [
    (MaskedConv2d, CONV), (GatheredConv2d, CONV), (GatheredLinear, LINEAR),
    (MaskedBatchNorm2d, NORM), (GatheredBatchNorm2d, NORM),
]  # fmt: skip
OWN = {nn.Conv2d: (Scaled, Standardised), nn.BatchNorm2d: (Activated,), nn.Linear: (Halved,)}
LAZY = {nn.Conv2d: (nn.LazyConv2d, (2, 3)), nn.BatchNorm2d: (nn.LazyBatchNorm2d, ()), nn.Linear: (nn.LazyLinear, (2,))}
PARAMETRIZED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrization": nn.utils.parametrizations.weight_norm,
    "parametrization of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
}


@pytest.mark.parametrize("kind, make", STANDS_FOR, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_from_dense_refuses_what_it_would_not_compute(kind, make):
    """Subclasses with a forward of their own, lazy layers, hooks and computed parameters, for every kind of layer."""
    dense = make()
    shared = kind.from_dense(dense)
    assert all(
        a is b for a, b in zip(shared.state_dict(keep_vars=True).values(), dense.state_dict(keep_vars=True).values())
    )
    again = kind.from_dense(shared)
    assert list(again.state_dict()) == list(dense.state_dict())
    arguments = (2, 2, 3)[: {nn.Conv2d: 3, nn.Linear: 2, nn.BatchNorm2d: 1}[type(dense)]]
    for own in OWN[type(dense)]:
        with pytest.raises(
            TypeError, match=f"module: expected an nn.{type(dense).__name__}, got {own.__name__}, whose"
        ):
            kind.from_dense(own(*arguments))
    with pytest.raises(TypeError, match=r"module: expected .* whose forward is its own"):
        kind.from_dense(patched(make()))
    lazy, arguments = LAZY[type(dense)]
    with pytest.raises(TypeError, match=f"module: expected an nn.{type(dense).__name__}, got {lazy.__name__}$"):
        kind.from_dense(lazy(*arguments))
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        layer = hooked(getattr(nn.Module, f"register_{register}"), make())
        with pytest.raises(ValueError, match=r"module: expected .* without hooks, got one with the .*hook"):
            kind.from_dense(layer)
    for name, change in PARAMETRIZED.items():
        layer = make()
        if isinstance(layer, nn.BatchNorm2d) and name != "parametrization of the bias":
            continue  # of matrices
        change(layer)
        with pytest.raises(
            ValueError, match=r"module: expected .* whose `(weight|bias)` is a parameter, got one that is"
        ):
            kind.from_dense(layer)
    if type(dense) is nn.Conv2d:
        with pytest.raises(ValueError, match="whose `weight` is a parameter"):
            kind.from_dense(Tied(2, 2, 3))
        assert kind.from_dense(Renamed(2, 2, 3)).weight.shape == (2, 2, 3, 3)


def test_trains():
    torch.manual_seed(0)
    layer = MaskedConv2d(2, 3, 3, padding=1)
    teacher = MaskedConv2d(2, 3, 3, padding=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(100):
        input, mask = torch.randn(4, 2, 8, 8), torch.rand(4, 1, 8, 8) < 0.4
        loss = (layer(input, mask) - teacher(input, mask).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
