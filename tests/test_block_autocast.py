"""The types of a block's result under autocast: those of the dense block, and skipped pixels that nothing rounds."""

import copy

import pytest
import torch
from torch import nn

from dynconv import backend
from dynconv.nn import GatheredBottleneck, MaskedBottleneck, MaskedInvertedResidual


def branch_and_shortcut(block, input):
    shortcut = None if block.shortcut_path is None else block._dense_shortcut(input)
    return block._dense_branch(input), shortcut


def downsampling(kind):
    return kind(8, 3, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)))


AUTOCAST_BLOCKS = {
    "masked": (lambda: MaskedBottleneck(12, 3), 12),
    "masked, downsampling": (lambda: downsampling(MaskedBottleneck), 8),
    "masked, linear": (lambda: MaskedInvertedResidual(8, 8, 1, 2), 8),
    "masked, no shortcut": (lambda: MaskedInvertedResidual(8, 6, 1, 2), 8),
    "gathered": (lambda: GatheredBottleneck(12, 3), 12),
    "gathered, downsampling": (lambda: downsampling(GatheredBottleneck), 8),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AUTOCAST_BLOCKS)
def test_autocast_promotes_as_the_dense_block_does(name, low, training):
    """The type, the skipped pixels to the bit, the others up to autocast's rounding; on both backends."""
    torch.manual_seed(0)
    make, width = AUTOCAST_BLOCKS[name]
    is_gathered = name.startswith("gathered")
    for dtype, statistics in ((torch.float32, "active"), (low, "active"), (torch.float32, "dense")):
        block = make().train(training)
        block.statistics = statistics
        input = torch.randn(2, width, 6, 4).to(dtype).contiguous(memory_format=torch.channels_last)
        start = copy.deepcopy(block.state_dict())
        with torch.no_grad(), torch.autocast("cpu", low):
            expected = block(input)
            branch, shortcut = branch_and_shortcut(block, input)
        mask = torch.rand(2, 1, *expected.shape[2:]) < 0.5
        full = mask | True
        every = [torch.ones(2, 3) > 0] if is_gathered else []
        # Three layers each round their weights, their input, their result and that of the normalisation.
        bound = 16 * torch.finfo(low).eps * max(1, float(branch.float().abs().max()))
        for used in ("cpu", "reference")[: 1 + (dtype != low)]:
            block.load_state_dict(start)
            with torch.autocast("cpu", low), backend(used):
                actual, everywhere = block(input, *every, mask), block(input, *every, full)
                gated = block(input, *every, mask.float())
                skipped = torch.zeros_like(actual) if shortcut is None else block._dense_shortcut(input)
            assert actual.dtype == everywhere.dtype == gated.dtype == expected.dtype
            assert (everywhere - expected).abs().max() <= bound
            for result in (actual, gated):
                assert torch.equal(torch.where(mask, 0, result), torch.where(mask, 0, skipped))
                if not training or statistics == "dense":  # the others have statistics of their own
                    assert torch.where(mask, result - expected, 0).abs().max() <= bound
            if training:
                everywhere.sum().backward()
                assert all(p.grad.isfinite().all() for p in block.parameters())
            elif name == "masked" and used == "cpu":
                with torch.no_grad(), torch.autocast("cpu", low):
                    updated = block(input.clone(memory_format=torch.preserve_format), mask, inplace=True)
                assert updated.dtype == dtype
                assert torch.equal(torch.where(mask, 0, updated), torch.where(mask, 0, input))
                assert torch.where(mask, updated - expected, 0).abs().max() <= bound
