"""The modules: constructor, parameters, state_dict and values of the torch.nn classes they replace."""

import inspect

import pytest
import torch
from torch import nn

from dynconv import ActiveSites
from dynconv.nn import MaskedConv2d

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
