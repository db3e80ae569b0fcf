"""Statistics of batch normalisation over several batches, `momentum=None`, and over several processes.

Two processes with a part of a batch each are one process with all of it.
"""

import copy
import datetime
import tempfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynconv import ActiveChannels, ActiveSites, pack
from dynconv.nn import (
    GatheredBatchNorm2d,
    GatheredBottleneck,
    GatheredSyncBatchNorm2d,
    MaskedBatchNorm2d,
    MaskedBottleneck,
    MaskedInvertedResidual,
    MaskedSyncBatchNorm2d,
    convert_sync_batchnorm,
)

RANKS, SAMPLES = 2, 2
# Of random numbers in float64: sums of fewer than 300 products of a few units, then normalised.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


class MaskedLayers(nn.Module):
    """A chain of a user's own."""

    def __init__(self, channels, activation):
        super().__init__()
        self.norm, self.activation = MaskedBatchNorm2d(channels), activation

    def forward(self, input, mask):
        features = self.norm(pack(input, ActiveSites(mask)))
        return features.unpack(activation=self.activation)


class GatheredLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = GatheredBatchNorm2d(12)

    def forward(self, input, channels):
        return self.norm(pack(input, ActiveChannels(channels.repeat(1, 4)))).unpack()


def models():
    torch.manual_seed(0)
    return {
        "bottleneck": (MaskedBottleneck(12, 3), "site"),
        "inverted": (MaskedInvertedResidual(12, 12, 1, 2), "site"),
        "gathered": (GatheredBottleneck(12, 3), "channel"),
        "masked layers": (MaskedLayers(12, "silu"), "site"),
        "gathered layers": (GatheredLayers(), "channel"),
        "cumulative": (MaskedBottleneck(12, 3), "site"),
    }


def batches():
    """What each rank gets: the input, sites and channels; in the second batch a rank has no site and no channel."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for batch in range(3):
        parts = []
        for rank in range(RANKS):
            keep = not (batch == 1 and rank == 1)
            input = torch.randn(SAMPLES, 12, 5, 4, generator=generator, dtype=torch.float64) + 30 * rank
            sites = torch.rand(SAMPLES, 1, 5, 4, generator=generator) < 0.4 + 0.3 * rank
            channels = torch.rand(SAMPLES, 3, generator=generator) < 0.7
            parts.append((input, sites & keep, channels & keep))
        made.append(parts)
    return made


def outcome(name, model, kind, parts):
    """Outputs, gradients of the input and of the parameters, and statistics, after some batches."""
    results = []
    if name == "cumulative":
        for module in model.modules():
            if hasattr(module, "momentum"):
                module.momentum = None
    for input, sites, channels in parts:
        input = input.clone().requires_grad_()
        output = model(input, sites if kind == "site" else channels)
        weights = torch.linspace(-1, 1, output[0].numel(), dtype=torch.float64).view(output[0].shape)
        grads = torch.autograd.grad((output * weights).square().sum(), [input, *model.parameters()])
        results.append((output.detach(), *grads))
    return results, {k: v.clone() for k, v in model.state_dict().items()}


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=120)
    )
    parts, results = [batch[rank] for batch in batches()], {}
    for name, (model, kind) in models().items():
        model = model.double()
        if "layers" in name:
            model = convert_sync_batchnorm(model)
        else:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        results[name] = outcome(name, model, kind, parts)
        results[f"{name}, eval"] = evaluated(model.eval(), kind, parts[0]) if rank == 0 else None  # nobody else calls
    # A group of its own: nothing to synchronise.
    groups = [torch.distributed.new_group([r]) for r in range(RANKS)]
    alone = convert_sync_batchnorm(MaskedLayers(12, None).double(), groups[rank])
    results["alone"] = outcome("alone", alone, "site", parts)
    torch.save(results, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def evaluated(model, kind, part):
    with torch.no_grad():
        return model(part[0], part[1] if kind == "site" else part[2])


def test_two_processes_are_one():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), RANKS)
        ranks = [torch.load(f"{folder}/{rank}") for rank in range(RANKS)]
    for name, (model, kind) in models().items():
        model = model.double()
        joined = [tuple(torch.cat(tensors) for tensors in zip(*batch)) for batch in batches()]
        expected, state = outcome(name, model, kind, joined)
        for number, (output, grad, *grads) in enumerate(expected):
            have = [rank[name][0][number] for rank in ranks]
            assert torch.allclose(torch.cat([h[0] for h in have]), output, **CLOSE), (name, number)
            assert torch.allclose(torch.cat([h[1] for h in have]), grad, rtol=1e-8, atol=1e-8), (name, number)
            for mine, *theirs in zip(grads, *(h[2:] for h in have), strict=True):
                # Each process has the part of its own samples; DistributedDataParallel adds them up.
                assert torch.allclose(sum(theirs), mine, rtol=1e-8, atol=1e-7), (name, number)
        for key, value in state.items():
            assert all(torch.allclose(rank[name][1][key], value, **CLOSE) for rank in ranks), (name, key)
        assert torch.allclose(ranks[0][f"{name}, eval"], evaluated(model.eval(), kind, batches()[0][0]), **CLOSE)
    for rank in range(RANKS):
        expected, state = outcome("alone", MaskedLayers(12, None).double(), "site", [b[rank] for b in batches()])
        have, kept = ranks[rank]["alone"]
        assert all(torch.equal(a, b) for one, two in zip(expected, have) for a, b in zip(one, two))
        assert all(torch.equal(kept[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("kind", "converted"), [(MaskedBatchNorm2d, MaskedSyncBatchNorm2d), (GatheredBatchNorm2d, GatheredSyncBatchNorm2d)]
)
def test_conversion_shares_and_keeps(kind, converted):
    """Without processes it is the layer that it was made from."""
    norm = kind(12, eps=0.1, momentum=0.3, affine=False)
    active = ActiveSites if kind is MaskedBatchNorm2d else ActiveChannels
    mask = torch.ones(2, 1, 3, 3) if kind is MaskedBatchNorm2d else torch.eye(2, 12)
    features = pack(torch.randn(2, 12, 3, 3), active(mask > 0))
    model = nn.Sequential(nn.BatchNorm2d(3), copy.deepcopy(norm).eval(), nn.Sequential(norm))
    assert convert_sync_batchnorm(model, 7) is model
    assert type(model[0]) is nn.SyncBatchNorm and type(model[1]) is type(model[2][0]) is converted
    assert model[1].process_group == 7 and not model[1].training and model[2][0].eps == 0.1
    assert model[2][0].running_mean is norm.running_mean and convert_sync_batchnorm(model[1]) is model[1]
    assert torch.equal(model[2][0](features)[0], copy.deepcopy(norm)(features)[0])
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        convert_sync_batchnorm(3)
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    with pytest.raises(AttributeError, match=r"is no tensor .*dynconv\.nn\.convert_sync_batchnorm"):
        plain(features)


def mean_of(batches):
    """By the definition: the mean of the batches' means and of their unbiased variances, of those that have any."""
    batches = [batch for batch in batches if batch.numel()]
    return torch.stack([b.mean() for b in batches]).mean(), torch.stack([b.var() for b in batches]).mean()


def random_batches(count=6):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=generator) * 2 + 1 for _ in range(count)]
    masks = [torch.rand(3, 1, 5, 5, generator=generator) < 0.4 for _ in range(count)]
    return inputs, masks, [torch.rand(3, 4, generator=generator) < 0.5 for _ in range(count)]


def test_the_cumulative_average_counts_batches_with_sites():
    """`momentum=None`: a batch without a site is none, before, between and behind others."""
    inputs, masks, _ = random_batches()
    for empty in (0, 2, 5):
        masks[empty] = masks[empty] & False
    norm = MaskedBatchNorm2d(4, momentum=None).double()
    for _ in range(2):
        norm.reset_running_stats()
        for input, mask in zip(inputs, masks):
            norm(pack(input, ActiveSites(mask)))
        assert norm.num_batches_tracked == 3
        for channel in range(4):
            batches = [input[:, channel][mask[:, 0]] for input, mask in zip(inputs, masks)]
            have = torch.stack([norm.running_mean[channel], norm.running_var[channel]])
            assert torch.allclose(have, torch.stack(mean_of(batches)), **CLOSE)


def gathered_statistics(norm, inputs, kept):
    for channel in range(4):
        batches = [input[:, channel][keep[:, channel]] for input, keep in zip(inputs, kept)]
        have = torch.stack([norm.running_mean[channel], norm.running_var[channel]])
        assert torch.allclose(have, torch.stack(mean_of(batches)), **CLOSE), channel


def test_the_cumulative_average_counts_batches_that_keep_the_channel():
    """Each channel for itself; after a reset, and from a state that is loaded."""
    inputs, _, kept = random_batches()
    for batch, channel in ((0, 0), (3, 0), (1, 2), (5, 3)):
        kept[batch][:, channel] = False
    kept[4] = kept[4] & False
    norm = GatheredBatchNorm2d(4, momentum=None).double()
    keys = list(norm.state_dict())
    for stop in (5, 6):  # the counter after the second reset is below the one before it
        norm.reset_running_stats()
        for number in range(stop):
            norm(pack(inputs[number], ActiveChannels(kept[number])))
        gathered_statistics(norm, inputs[:stop], kept[:stop])
        assert norm.num_batches_tracked == stop - 1
    assert list(norm.state_dict()) == keys == list(nn.BatchNorm2d(4).state_dict())
    loaded = GatheredBatchNorm2d(4, momentum=None).double()
    loaded.load_state_dict(norm.state_dict())  # five batches, of each channel as far as it tells
    loaded(pack(inputs[0], ActiveChannels(kept[2] | True)))
    expected = norm.running_mean + (inputs[0].mean((0, 2, 3)) - norm.running_mean) / 6
    assert torch.allclose(loaded.running_mean, expected, **CLOSE)


@pytest.mark.parametrize("kind", [MaskedBottleneck, GatheredBottleneck])
def test_update_bn_over_blocks(kind):
    """`torch.optim.swa_utils.update_bn`, as users call it: its batches are the first layer's, each as large."""
    torch.manual_seed(0)
    block = kind(12, 3).double().eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, batch):
            return self.block(batch[:, :12], batch[:, 12, 0, :1].expand(-1, 3) > 0)

    if kind is MaskedBottleneck:
        Model.forward = lambda self, batch: self.block(batch[:, :12], batch[:, 12:] > 0)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 13, 6, 5, dtype=torch.float64, generator=generator) for _ in range(4)]
    batches[1][:, 12:] = -1  # no site, no channel
    torch.optim.swa_utils.update_bn(batches, Model())
    seen = []
    for batch in batches[:1] + batches[2:]:
        made = F.conv2d(batch[:, :12], block.conv1.weight)
        if kind is MaskedBottleneck:
            active = ActiveSites(batch[:, 12:] > 0).touched((6, 5), 3, 1, 1).mask.expand_as(made)
        else:
            active = (batch[:, 12:, :1, :1] > 0).expand_as(made)
        seen.append([made[:, c][active[:, c]] for c in range(3)])
    for channel in range(3):
        mean, variance = mean_of([batch[channel] for batch in seen])
        assert torch.allclose(block.bn1.running_mean[channel], mean, **CLOSE)
        assert torch.allclose(block.bn1.running_var[channel], variance, **CLOSE)
