"""Residual blocks of dynamic width against the dense blocks that they are made from: eval and train, both axes."""

import copy
import functools
import re

import pytest
import torch
from test_blocks import CLOSE, basic, bottleneck, timm_bottleneck
from torch import nn

from dynconv import ActiveChannels, ActiveSites, PackedChannels, backend, gathered_conv2d, gathered_linear, pack
from dynconv.nn import GatheredBasicBlock, GatheredBatchNorm2d, GatheredBottleneck, GatheredConv2d, GatheredLinear

BLOCKS = {
    "basic": (GatheredBasicBlock, lambda: basic(8, 8), 8),
    "basic-downsampling": (GatheredBasicBlock, lambda: basic(8, 12, 2), 8),
    "bottleneck": (GatheredBottleneck, lambda: bottleneck(12, 8, 12), 12),
    "bottleneck-downsampling": (GatheredBottleneck, lambda: bottleneck(12, 8, 16, 2), 12),
    "bottleneck-groups-dilation": (GatheredBottleneck, lambda: bottleneck(12, 8, 12, groups=2, dilation=2), 12),
    "bottleneck-timm-silu": (GatheredBottleneck, lambda: timm_bottleneck(12, 8), 12),
}
SAMPLES = 3


def random_block(name):
    """The dense block and the gathered one's class, with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    kind, make, channels = BLOCKS[name]
    dense = make().double()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return dense, kind, torch.randn(SAMPLES, channels, 7, 6, dtype=torch.float64)


def stages(dense):
    """(conv, norm, activation) of each stage; the last activation comes behind the shortcut."""
    count = 3 if hasattr(dense, "conv3") else 2
    activation = lambda i: getattr(dense, f"act{i}", None) or dense.relu
    return [(getattr(dense, f"conv{i}"), getattr(dense, f"bn{i}"), activation(i)) for i in range(1, count + 1)]


def widths(dense):
    return [conv.out_channels for conv, _, _ in stages(dense)[:-1]]


def gates(dense, kind):
    """A gate [N, C] for each inner convolution; the first sample keeps none, the second all."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for width in widths(dense):
        kept = torch.rand(SAMPLES, width, generator=generator) < (0 if kind == "none" else 0.5)
        if kind != "none":
            kept[0], kept[1], kept[:, -1] = False, True, False  # no sample keeps the last channel
        made.append(torch.where(kept, torch.rand(kept.shape, generator=generator).double() + 0.5, 0))
    return made


def batch_norm(norm, x, kept, mask):
    """By the definition: each channel over the samples that keep it, at the computed sites."""
    channels = []
    for c in range(x.shape[1]):
        computed = (kept[:, c, None, None] & mask[:, 0]).expand_as(x[:, c])
        values = x[:, c][computed]
        if not norm.training:
            mean, variance = norm.running_mean[c], norm.running_var[c]
        elif values.numel() == 0:
            channels.append(torch.zeros_like(x[:, c]))
            continue
        else:
            mean, variance = values.mean(), values.var(unbiased=False)
        normal = (x[:, c] - mean) * (variance + norm.eps).rsqrt() * norm.weight[c] + norm.bias[c]
        channels.append(torch.where(computed, normal, 0))
        if norm.training:
            spread = values.detach().var(unbiased=values.numel() > 1)
            for running, value in ((norm.running_mean, values.detach().mean()), (norm.running_var, spread)):
                with torch.no_grad():
                    running[c] += norm.momentum * (value - running[c])
    return torch.stack(channels, 1)


def by_definition(dense, input, gates, mask=None):
    """The dense block computed densely, and multiplied by its masks; its batch statistics are of what they keep."""
    shortcut = input if dense.downsample is None else dense.downsample(input)
    chain, x = stages(dense), input
    sizes = [tuple(input.shape[2:])]
    for conv, _, _ in chain:
        sizes.append(tuple(conv(torch.zeros(1, conv.in_channels, *sizes[-1]).double()).shape[2:]))
    output = torch.ones(SAMPLES, 1, *sizes[-1], dtype=torch.bool) if mask is None else mask
    masks = [output]
    for (conv, _, _), size in zip(chain[:0:-1], sizes[-2:0:-1]):
        touched = ActiveSites(masks[0]).touched(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        masks.insert(0, masks[0] if mask is None and size == sizes[-1] else touched.mask)
    for i, (conv, norm, activation) in enumerate(chain):
        gate = gates[i] if i < len(gates) else torch.ones(SAMPLES, conv.out_channels).double()
        x = batch_norm(norm, conv(x), gate != 0, masks[i]) * gate[:, :, None, None]
        if i < len(gates):
            x = activation(x)
    return torch.where(output, chain[-1][2](x + shortcut), shortcut)


def masks(dense, input):
    with torch.no_grad():
        size = copy.deepcopy(dense).eval()(input).shape[2:]
    random = torch.rand(SAMPLES, 1, *size, generator=torch.Generator().manual_seed(2)) < 0.4
    random[2] = False
    return {"all sites": None, "random": random, "no site": random & False}


@pytest.mark.parametrize("kind", ["some", "none"])
@pytest.mark.parametrize("name", BLOCKS)
def test_eval(name, kind):
    """Values and all gradients, with the normalisation folded; in one pass a layer and in steps."""
    dense, make, input = random_block(name)
    block = make.from_dense(dense.eval())
    assert list(block.state_dict()) == list(dense.state_dict())
    assert all(a is b for a, b in zip(block.parameters(), dense.parameters(), strict=True))
    chosen = gates(dense, kind)
    for mask in masks(dense, input).values():
        results = []
        for function in (functools.partial(by_definition, dense), block):
            leaves = [t.clone().requires_grad_() for t in (input, *chosen)]
            output = function(leaves[0], leaves[1:], mask)
            grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).double()
            results.append([output, *torch.autograd.grad(output, [*leaves, *dense.parameters()], grad)])
        results[0][2 : 2 + len(chosen)] = [  # a gate that is closed gets no gradient
            torch.where(c != 0, g, 0) for c, g in zip(chosen, results[0][2:])
        ]
        for position, (want, have) in enumerate(zip(*results, strict=True)):
            assert torch.allclose(want, have, **CLOSE), position
        assert results[1][0].is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert torch.allclose(block(input, chosen, mask), results[0][0], **CLOSE)


@pytest.mark.parametrize("name", BLOCKS)
def test_training_over_what_is_kept(name):
    dense, make, input = random_block(name)
    block, start = make.from_dense(dense), copy.deepcopy(dense.state_dict())
    chosen = gates(dense, "some")
    for mask in masks(dense, input).values():
        results = []
        for function in (functools.partial(by_definition, dense), block):
            dense.load_state_dict(start)
            leaves = [t.clone().requires_grad_() for t in (input, *chosen)]
            output = function(leaves[0], leaves[1:], mask)
            grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).double()
            parameters = [*leaves, *dense.parameters()]
            grads = torch.autograd.grad(output, parameters, grad, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]
            statistics = [t.clone() for n, t in dense.state_dict().items() if "running" in n]
            results.append([output, *grads, *statistics])
        results[0][2 : 2 + len(chosen)] = [torch.where(c != 0, g, 0) for c, g in zip(chosen, results[0][2:])]
        for position, (want, have) in enumerate(zip(*results, strict=True)):
            assert torch.allclose(want, have, rtol=1e-8, atol=1e-9), position


@pytest.mark.parametrize("name", BLOCKS)
def test_all_kept_is_the_dense_block(name):
    """In training as well; dense statistics are the dense block's at any masks."""
    dense, make, input = random_block(name)
    block, start = make.from_dense(dense), copy.deepcopy(dense.state_dict())
    expected = dense(input)
    after = copy.deepcopy(dense.state_dict())
    every = [torch.ones(SAMPLES, width, dtype=torch.bool) for width in widths(dense)]
    for channels in (every, None):
        dense.load_state_dict(start)
        assert torch.allclose(block(input, channels), expected, **CLOSE)
        assert all(torch.allclose(dense.state_dict()[key], value, **CLOSE) for key, value in after.items())
    dense.load_state_dict(start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_dense_statistics_are_the_masked_dense_block(name, dtype):
    """To the bit, at any masks: everything is computed, and what is not kept is set to zero."""
    dense, make, input = random_block(name)
    dense, input = dense.to(dtype), input.to(dtype)
    exact, start, chosen = make.from_dense(dense, statistics="dense"), copy.deepcopy(dense.state_dict()), []
    chosen = gates(dense, "some")
    if dtype != torch.float64:
        chosen = [gate.float() for gate in chosen]  # of a head that stays in float32
    for mask in masks(dense, input).values():
        results = []
        for function in (exact, None):
            dense.load_state_dict(start)
            leaves = [t.clone().requires_grad_() for t in (input, *chosen)]
            if function is not None:
                output = function(leaves[0], leaves[1:], mask)
            else:
                shortcut = leaves[0] if dense.downsample is None else dense.downsample(leaves[0])
                output = leaves[0]
                for i, (conv, norm, activation) in enumerate(stages(dense)):
                    output = norm(conv(output))
                    if i < len(chosen):
                        output = activation((output * leaves[1 + i][:, :, None, None]).to(dtype))
                output = stages(dense)[-1][2](output + shortcut)
                output = output if mask is None else torch.where(mask, output, shortcut)
            grads = torch.autograd.grad(output, [*leaves, *dense.parameters()], torch.ones_like(output))
            results.append([output, *grads, *(t.clone() for t in dense.state_dict().values())])
        for gate, grad in zip(chosen, results[1][2:]):
            grad[gate == 0] = 0  # a gate that is closed gets no gradient
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_reference_backend_agrees():
    dense, make, input = random_block("bottleneck")
    chosen = gates(dense, "some")
    for train in (False, True):
        block = make.from_dense(dense.train(train))
        with backend("reference"):
            expected = block(input, chosen)
        assert torch.allclose(block(input, chosen), expected, **CLOSE)


def test_one_mask_stands_for_all():
    dense, make, input = random_block("bottleneck")
    block, (gate, _) = make.from_dense(dense.eval()), gates(dense, "some")
    with torch.no_grad():
        assert torch.equal(block(input, ActiveChannels(gate)), block(input, [gate, gate]))
        assert torch.equal(block(input, [None, gate]), block(input, [torch.ones_like(gate) > 0, gate]))


def test_a_sample_does_not_leak_into_another():
    dense, make, input = random_block("bottleneck")
    block, chosen = make.from_dense(dense.eval()), gates(dense, "some")
    with torch.no_grad():
        whole = block(input, chosen)
        for n in range(SAMPLES):
            poisoned = torch.full_like(input, float("nan"))
            poisoned[n] = input[n]
            assert torch.equal(block(poisoned, chosen)[n], whole[n])


def test_compiles():
    torch._dynamo.reset()
    dense, make, input = random_block("basic")
    for train in (False, True):
        block, start = make.from_dense(dense.train(train)), copy.deepcopy(dense.state_dict())
        expected = block(input, gates(dense, "some"))
        dense.load_state_dict(start)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(input, gates(dense, "some")), expected, **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(channels=[None]), ValueError, "channels: expected 2 masks, one for each convolution but the last, got 1"),
        (
            dict(channels=torch.ones(3, 9) > 0),
            ValueError,
            "channels: expected a shape that broadcasts to [3, 8], got [3, 9]",
        ),
        (dict(input=torch.ones(3, 5, 7, 6).double()), ValueError, "weight: expected 5 input channels"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    dense, make, input = random_block("bottleneck")
    block = make.from_dense(dense.eval())
    with pytest.raises(error, match="^" + re.escape(message)), torch.no_grad():
        block(**{"input": input, "channels": torch.ones(3, 8) > 0, **change})


def test_constructors_are_those_of_torchvision():
    basic_block = GatheredBasicBlock(8, 12, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12)))
    assert basic_block(torch.ones(2, 8, 6, 6), torch.ones(2, 12) > 0).shape == (2, 12, 3, 3)
    assert GatheredBottleneck(16, 4)(torch.ones(2, 16, 6, 6), torch.ones(2, 4) > 0).shape == (2, 16, 6, 6)
    with pytest.raises(TypeError, match="module: expected a block of several layers, got Conv2d"):
        GatheredBasicBlock.from_dense(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="statistics: expected 'active' or 'dense', got 'none'"):
        GatheredBottleneck(16, 4, statistics="none")


class TestLayers:
    def test_the_convolution_is_the_op(self):
        dense = nn.Conv2d(6, 8, 3, 2, 1, groups=2)
        layer = GatheredConv2d.from_dense(dense)
        assert layer.weight is dense.weight
        assert list(layer.state_dict()) == list(dense.state_dict())
        input, ins, outs = torch.randn(3, 6, 5, 5), torch.rand(3, 6) < 0.5, torch.rand(3, 8) < 0.5
        expected = gathered_conv2d(input, dense.weight, dense.bias, 2, 1, 1, 2, in_mask=ins, out_mask=outs)
        assert torch.equal(layer(input, ins, outs), expected)
        assert torch.equal(layer(input, ins, outs, packed=True).unpack(), expected)
        with pytest.raises(TypeError, match=r"module: expected an nn\.Conv2d, got Linear"):
            GatheredConv2d.from_dense(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="padding_mode: expected 'zeros', got 'circular'"):
            GatheredConv2d(2, 2, 1, padding_mode="circular")

    def test_the_linear_layer_is_the_op(self):
        dense = nn.Linear(6, 8)
        layer = GatheredLinear.from_dense(dense)
        assert layer.weight is dense.weight
        assert list(layer.state_dict()) == list(dense.state_dict())
        input, ins, outs = torch.randn(3, 2, 6), torch.rand(3, 6) < 0.5, torch.rand(3, 8) < 0.5
        expected = gathered_linear(input, dense.weight, dense.bias, in_mask=ins, out_mask=outs)
        assert torch.equal(layer(input, ins, outs), expected)
        with pytest.raises(TypeError, match=r"module: expected an nn\.Linear, got Conv2d"):
            GatheredLinear.from_dense(nn.Conv2d(2, 2, 1))

    @pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
    def test_the_normalisation_is_that_of_each_channels_samples(self, train):
        torch.manual_seed(0)
        dense = nn.BatchNorm2d(5).double().train(train)
        nn.init.normal_(dense.weight)
        nn.init.uniform_(dense.running_var, 0.5, 2)
        kept = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
        mask = torch.rand(3, 1, 4, 3) < 0.6
        input = torch.randn(3, 5, 4, 3).double()
        layer = GatheredBatchNorm2d.from_dense(copy.deepcopy(dense))
        features = pack(input * mask, ActiveChannels(kept))
        assert torch.allclose(layer(features, mask).unpack(), batch_norm(dense, input, kept, mask), **CLOSE)
        for name, value in dense.state_dict().items():
            if "running" in name:
                assert torch.allclose(layer.state_dict()[name], value, **CLOSE), name
        everywhere = pack(input, ActiveChannels(kept))  # skipped sites that hold something
        layer = GatheredBatchNorm2d.from_dense(copy.deepcopy(dense))
        again = GatheredBatchNorm2d.from_dense(copy.deepcopy(dense))
        assert torch.equal(layer(everywhere, mask).features, again(features, mask).features)
        with pytest.raises(TypeError, match=r"features: expected PackedChannels .*, got Tensor"):
            layer(input)
        with pytest.raises(TypeError, match=r"mask: expected a bool tensor or ActiveSites, got torch\.float32"):
            layer(features, mask.float())
        with pytest.raises(ValueError, match="features: expected 4 channels, got 5"):
            GatheredBatchNorm2d(4)(features)
        nothing = PackedChannels(torch.zeros(3, 0, 4, 3).double(), ActiveChannels(kept & False))
        assert layer(nothing).features.shape == (3, 0, 4, 3)
