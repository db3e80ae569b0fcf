"""Ponder maps: what the hook sees of a model, and what it makes of it."""

import pytest
import torch
from torch import nn

import dynconv
from dynconv import ActiveSites
from dynconv.nn import MaskedBottleneck, MaskedConv2d, MaskedInvertedResidual


class Network(nn.Module):
    """A layer at 8x12, two blocks at 4x6, with masks in every form that they take."""

    def __init__(self):
        super().__init__()
        self.layer = MaskedConv2d(3, 8, 3, padding=1)
        self.down = MaskedInvertedResidual(8, 16, 2, 2)
        self.block = MaskedBottleneck(16, 4)

    def forward(self, photo, fine, coarse, packed=False):
        features = self.layer(photo, fine, packed=packed)
        if packed:
            features = features.unpack()
        return self.block(self.down(features), mask=coarse)


def masks():
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (torch.rand(2, 1, *size, generator=generator) < 0.5 for size in ((8, 12), (4, 6)))
    return torch.randn(2, 3, 8, 12, generator=generator), fine, coarse


@pytest.mark.parametrize("kind", ["bool", "gate", "sites", "packed"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_counts_every_call_of_a_layer_or_block(kind, mode):
    photo, fine, coarse = masks()
    network = Network().train(mode == "train")
    form = {"gate": lambda mask: mask * 0.5, "sites": ActiveSites}.get(kind, lambda mask: mask)
    with dynconv.ponder_map() as ponder:
        network(photo, form(fine), form(coarse), packed=kind == "packed")
    # In the order of the calls; without a mask everything is computed.
    assert [tuple(mask.shape) for mask in ponder.masks] == [(2, 1, 8, 12), (2, 1, 4, 6), (2, 1, 4, 6)]
    assert torch.equal(ponder.masks[0], fine) and ponder.masks[1].all() and torch.equal(ponder.masks[2], coarse)
    spread = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(ponder.count(), fine.float() + 1 + spread)
    large = ponder.count((16, 24))
    assert torch.equal(large[:, :, ::2, ::2], ponder.count()) and large.dtype == torch.float32


def test_a_mask_broadcasts_and_may_be_refilled():
    photo, _, _ = masks()
    mask = torch.tensor([True, False]).view(2, 1, 1, 1)
    with dynconv.ponder_map() as ponder:
        Network().layer(photo, mask)
    mask.fill_(True)
    assert torch.equal(ponder.count(), torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 8, 12))


def test_records_inside_the_block_alone():
    photo, fine, coarse = masks()
    network = Network()
    with pytest.raises(ValueError, match="mask: expected"), dynconv.ponder_map() as ponder:
        network(photo, fine, fine)
    network(photo, fine, coarse)
    assert len(ponder.masks) == 2  # the last block refused its mask
    assert not torch.nn.modules.module._has_any_global_hook()


def test_results_do_not_change():
    photo, fine, coarse = masks()
    network = Network().eval()
    with torch.no_grad():
        expected = network(photo, fine, coarse)
        with dynconv.ponder_map():
            assert torch.equal(network(photo, fine, coarse), expected)


def test_what_cannot_be_counted_is_refused():
    photo, fine, _ = masks()
    with dynconv.ponder_map() as ponder:
        pass
    with pytest.raises(ValueError, match="masks: expected at least one call"):
        ponder.count()
    with dynconv.ponder_map() as ponder:
        for size in (1, 2):
            Network().layer(photo[:size], fine[:size])
    with pytest.raises(ValueError, match="masks: expected calls of one batch size, got 1, 2"):
        ponder.count()
