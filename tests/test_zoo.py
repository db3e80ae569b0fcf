"""Blocks of other people's: which convert, which are refused and for what step; `python tests/test_zoo.py` prints them.

A case that converts must equal the dense block at a full mask and `where(mask, dense, shortcut)` at a random one.
"""

import copy
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_blocks import CLOSE, Dense, downsample
from torch import nn

from dynconv.nn import GatheredBlock, MaskedBlock

C = 6


def conv(cin=C, cout=C, kernel=3, stride=1, **options):
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False, **options)


def layers(*norms, channels=C):
    """conv1, bn1, conv2, bn2."""
    one, two = norms or (nn.BatchNorm2d(channels), nn.BatchNorm2d(channels))
    return dict(conv1=conv(channels, channels), bn1=one, conv2=conv(channels, channels), bn2=two)


class Frozen(nn.Module):
    """FrozenBatchNorm2d of detection backbones: buffers, and arithmetic."""

    def __init__(self, channels, eps=1e-3):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x):
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0 or not self.training:
            return x
        return x * torch.rand(x.shape[0], 1, 1, 1).lt(1 - self.rate)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class FunctionalNorm(nn.BatchNorm2d):
    """A subclass that calls the function itself, and activates."""

    def forward(self, x):
        return F.silu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1))


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def functional(self, x):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def written_by(forward, **more):
    return lambda: Dense(forward, **{**layers(), **more})


def skip(self, x):
    return F.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.skip(x), inplace=True)


def in_place(self, x):
    y = self.bn1(self.conv1(x)).relu_()
    y = self.bn2(self.conv2(y))
    y += x
    return F.relu_(y)


def shared_activation(self, x):
    y = self.act(self.bn1(self.conv1(x)))
    return self.act(torch.add(x, self.bn2(self.conv2(y))))


def without_normalisation(self, x):
    return F.hardswish(self.conv2(F.hardswish(self.conv1(x)))).add(x).contiguous()


def activated_branch(self, x):
    return F.relu(x + F.gelu(self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x)))))))


def without_shortcut(self, x):
    return self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(x)))))


def chain_of_two(self, x):
    y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(y + self.norm(self.pool(x)))


def sequence():
    unit = lambda i, o: [conv(i, o), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*unit(C, 8), nn.Sequential(*unit(8, 5)))


def drop_path(self, x):
    return F.relu(x + self.path(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))


def pre_activation(self, x):
    y = self.conv1(F.relu(self.bn1(x)))
    return self.conv2(F.relu(self.bn2(y))) + x


def pre_norm(self, x):
    return self.bn2(self.conv2(self.conv1(self.bn1(x)))) + x


def layer_scale(self, x):
    return F.relu(self.gamma * self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def scaled():
    block = written_by(layer_scale)()
    block.gamma = nn.Parameter(torch.ones(C, 1, 1))
    return block


def unused_parameter():
    block = written_by(functional)()
    block.gamma = nn.Parameter(torch.ones(C, 1, 1))
    return block


def attention(self, x):
    return F.relu(self.squeeze(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))) + x)


def dropout(self, x):
    return F.relu(self.bn2(self.conv2(F.dropout(F.relu(self.bn1(self.conv1(x))), 0.1, self.training))) + x)


def dropped(self, x):
    return F.relu(self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(x)))))) + x)


def parametric(self, x):
    return self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x))))) + x


def norm_after_addition(self, x):
    return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))) + x)


def norm_after_activation(self, x):
    return self.bn2(self.conv2(self.bn1(F.relu(self.conv1(x))))) + x


def scaled_sum(self, x):
    return F.relu(torch.add(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))), x, alpha=0.5))


def approximate(self, x):
    return self.bn2(self.conv2(F.gelu(self.bn1(self.conv1(x)), approximate="tanh"))) + x


def two_shortcuts(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return self.bn2(self.conv2(y)) + x + x


def inner_shortcut(self, x):
    y = self.bn1(self.conv1(x))
    return F.relu(self.bn2(self.conv2(F.relu(y))) + y)


def activated_shortcut(self, x):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + F.relu(x))


def skipped_at_random(self, x):
    if self.training and torch.rand(1) < 1e-6:
        return x
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def skipped_by_numpy(self, x):
    if self.training and np.random.rand() < 1e-6:
        return x
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def pooled_by_function(self, x):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + F.avg_pool2d(x, 3, 1, 1))


def ignored_result(self, x):
    y = self.bn1(self.conv1(x))
    y.mul_(2)
    return F.relu(self.bn2(self.conv2(F.relu(y))) + x)


def overwritten(self, x):
    y = self.bn1(self.conv1(x))
    z = F.relu(y, inplace=True)
    return self.bn2(self.conv2(z)) + x + 0 * y


def depends_on_values(self, x):
    y = self.bn1(self.conv1(x))
    return self.bn2(self.conv2(F.relu(y))) + x if y.sum() > 0 else x


def only_in_training(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return self.bn2(self.conv2(y)) + (x if self.training else self.skip(x))


def stopped(self, x):
    with torch.no_grad():
        y = F.relu(self.bn1(self.conv1(x)))
    return self.bn2(self.conv2(y)) + x


def not_a_tensor(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return self.bn2(self.conv2(y)) + x, y


def own_convolution(self, x):
    return F.relu(self.bn2(F.conv2d(F.relu(self.bn1(self.conv1(x))), self.conv2.weight, padding=1)) + x)


# Case: block, and what names the refusal; or None and how the test computes the shortcut (None: there is none).
FOREIGN = {
    "functional": (written_by(functional), None, lambda m, x: x),
    "projection called skip": (written_by(skip, skip=downsample(C, C, 1)), None, lambda m, x: m.skip(x)),
    "in place": (written_by(in_place), None, lambda m, x: x),
    "shared activation": (written_by(shared_activation, act=nn.SiLU()), None, lambda m, x: x),
    "no normalisation": (lambda: Dense(without_normalisation, conv1=conv(), conv2=conv()), None, lambda m, x: x),
    "fused, with Identity": (lambda: Dense(functional, **layers(nn.Identity(), nn.Identity())), None, lambda m, x: x),
    "frozen norm": (lambda: Dense(functional, **layers(Frozen(C), Frozen(C, 1e-5))), None, lambda m, x: x),
    "sync norm": (lambda: Dense(functional, **layers(nn.SyncBatchNorm(C), nn.BatchNorm2d(C))), None, lambda m, x: x),
    "norm as a function": (
        lambda: Dense(functional, **layers(nn.BatchNorm2d(C), nn.BatchNorm2d(C)) | {"bn1": FunctionalNorm(C)}),
        "`relu` at test_zoo.py:", None,
    ),
    "activated branch": (written_by(activated_branch), None, lambda m, x: x),
    "no shortcut": (written_by(without_shortcut), None, None),
    "sequence": (sequence, None, None),
    "shortcut of two modules": (
        written_by(chain_of_two, pool=nn.AvgPool2d(3, 1, 1), norm=nn.BatchNorm2d(C)), None,
        lambda m, x: m.norm(m.pool(x)),
    ),
    "dropout of 0": (written_by(dropped, drop=nn.Dropout(0.0)), None, lambda m, x: x),
    "drop path of 0": (written_by(drop_path, path=DropPath(0.0)), None, lambda m, x: x),
    "child called shortcut": (
        lambda: Dense(lambda self, x: F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)),
                      **layers(), shortcut=nn.Sequential()),
        None, lambda m, x: x,
    ),
    "drop path": (written_by(drop_path, path=DropPath(0.1)), "in training `path` (DropPath) at test_zoo.py", None),
    "pre-activation": (written_by(pre_activation), "`bn1` (BatchNorm2d", None),
    "norm first": (written_by(pre_norm), "`bn1` (BatchNorm2d", None),
    "activation first": (
        written_by(lambda self, x: self.bn2(self.conv2(self.bn1(self.conv1(F.relu(x))))) + x),
        "`relu` at test_zoo.py", None,
    ),
    "layer scale": (scaled, "`mul` at test_zoo.py", None),
    "parameter of its own": (unused_parameter, "`gamma` of its own", None),
    "attention": (written_by(attention, squeeze=Attention(C)), "`mean` in `squeeze` (Attention)", None),
    "dropout": (written_by(dropped, drop=nn.Dropout(0.1)), "in training `drop` (Dropout(p=0.1", None),
    "dropout as a function": (written_by(dropout), "in training `dropout` at test_zoo.py", None),
    "prelu": (written_by(parametric, prelu=nn.PReLU()), "`prelu` (PReLU", None),
    "norm behind the shortcut": (written_by(norm_after_addition), "`bn2` (BatchNorm2d", None),
    "norm behind the activation": (written_by(norm_after_activation), "`bn1` (BatchNorm2d", None),
    "scaled sum": (written_by(scaled_sum), "`add` at test_zoo.py", None),
    "approximate gelu": (written_by(approximate), "`gelu` at test_zoo.py", None),
    "two shortcuts": (written_by(two_shortcuts), "a second addition", None),
    "shortcut from inside": (written_by(inner_shortcut), "shortcut shares a convolution with the branch", None),
    "shortcut by a function": (written_by(activated_shortcut), "`relu` at test_zoo.py", None),
    "skipped at random": (written_by(skipped_at_random), "in training Dense, which draws random numbers", None),
    "skipped by NumPy": (written_by(skipped_by_numpy), "in training Dense, which draws random numbers", None),
    "pooled by a function": (written_by(pooled_by_function), "`avg_pool2d` at test_zoo.py", None),
    "result ignored": (written_by(ignored_result), "`mul_` at test_zoo.py", None),
    "read after writing": (written_by(overwritten), "`add` at test_zoo.py", None),
    "control flow on values": (written_by(depends_on_values), "its control flow depends on values", None),
    "another in training": (
        written_by(only_in_training, skip=downsample(C, C, 1)), "which computes something else in training", None,
    ),
    "gradient stopped": (written_by(stopped), "got other gradients in a comparison", None),
    "two outputs": (written_by(not_a_tensor), "more than one output tensor", None),
    "convolution as a function": (written_by(own_convolution), "`conv2d` at test_zoo.py", None),
    "convolution of its own": (
        lambda: Dense(functional, **layers() | {"conv2": OwnForward(C, C, 3, padding=1)}),
        "`conv2` (OwnForward(6, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)))", None,
    ),
    "norm of its own": (
        lambda: Dense(functional, **layers(Subclass(C), nn.BatchNorm2d(C))), "`mul` in `bn1` (Subclass)", None,
    ),
    "group norm": (lambda: Dense(functional, **layers(nn.GroupNorm(2, C), nn.Identity())), "`bn1` (GroupNorm(2", None),
}  # fmt: skip


def settled(dense, seed=0):
    """The block in float64 and eval mode, with statistics and parameters that are not the initial ones."""
    torch.manual_seed(seed)
    dense = dense.double().eval()
    for module in dense.modules():
        if getattr(module, "running_mean", None) is not None:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_floating_point():
                    with torch.no_grad():
                        tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else torch.randn(tensor.shape))
    return dense


def check(dense, block, shortcut, channels):
    input = torch.randn(2, channels, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = dense(input.clone())
        mask = torch.rand(2, 1, *expected.shape[2:]) < 0.4
        skipped = torch.zeros_like(expected) if shortcut is None else shortcut(dense, input)
        assert torch.allclose(block(input), expected, **CLOSE)
        for chosen in (mask | True, mask):
            assert torch.allclose(block(input, chosen), torch.where(chosen, expected, skipped), **CLOSE)


def state_of(module):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    flags = [m.training for m in module.modules()]
    return hooks, flags, {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_block_is_what_it_computes(name):
    """Not what its parts are called; and a conversion leaves the dense block and the random numbers as they are."""
    make, refusal, shortcut = FOREIGN[name]
    dense = settled(make())
    next(iter(dense.children())).train()
    before = state_of(dense)
    if refusal is not None:
        with pytest.raises(ValueError, match=re.escape(refusal)) as raised:
            MaskedBlock.from_dense(dense)
        assert str(raised.value).startswith("module: expected ")
    else:
        block = MaskedBlock.from_dense(dense)
        assert list(block.state_dict()) == list(dense.state_dict())
        assert dict(block.named_children()) == dict(dense.named_children())
    for have, want in zip(state_of(dense), before):
        if isinstance(want, dict):
            assert have.keys() == want.keys() and all(torch.equal(have[k], want[k]) for k in want)
        else:
            assert torch.equal(have, want) if isinstance(want, torch.Tensor) else have == want
    if refusal is None:
        check(dense.eval(), block, shortcut, C)
        # The initial values, zeros in the last normalisation among them, and tensors without memory tell as much.
        meta = copy.deepcopy(dense).to("meta")
        assert MaskedBlock.from_dense(meta).stages == block.stages


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_last_activation_comes_before_gate_and_shortcut(shortcut):
    """On every way: inference in one kernel, the gate's gradient, training with both statistics, the reference."""
    dense = settled(Dense(activated_branch if shortcut else lambda self, x: F.silu(self.conv1(x)), **layers()))
    block = MaskedBlock.from_dense(dense)
    input = torch.randn(2, C, 7, 6, dtype=torch.float64)
    gate = torch.where(torch.rand(2, 1, 7, 6) < 0.5, torch.rand(2, 1, 7, 6).double() + 0.5, 0)

    def expected(x, g):
        branch = F.silu(dense.bn1(dense.conv1(x))) if shortcut else F.silu(dense.conv1(x))
        if not shortcut:
            return branch * g
        branch = F.gelu(dense.bn2(dense.conv2(branch)))
        return torch.where(g != 0, F.relu(x + branch * g), x)

    results = []
    for function in (expected, block):
        x, g = input.clone().requires_grad_(), gate.clone().requires_grad_()
        output = function(x, g)
        grads = torch.autograd.grad(output.square().sum(), [x, g])
        with torch.no_grad():
            results.append([output, grads[0], torch.where(gate != 0, grads[1], 0), function(input, gate)])
    assert all(torch.allclose(a, b, **CLOSE) for a, b in zip(*results))
    if shortcut:
        with torch.no_grad(), pytest.raises(ValueError, match="inplace: expected a block without an activation"):
            block(input.contiguous(memory_format=torch.channels_last), gate, inplace=True)
    exact = MaskedBlock.from_dense(dense, statistics="dense").train()
    assert torch.allclose(exact(input, gate), expected(input, gate), **CLOSE)
    assert torch.allclose(block.train()(input, torch.ones_like(gate)), expected(input, torch.ones_like(gate)), **CLOSE)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_gathered_branch_ends_in_its_activation_too(training):
    """All channels kept: what the masked block computes, with sites and without."""
    dense = settled(Dense(activated_branch, **layers())).train(training)
    input, kept = torch.randn(2, C, 7, 6, dtype=torch.float64), torch.ones(2, C, dtype=torch.bool)
    gate = torch.where(torch.rand(2, 1, 7, 6) < 0.5, torch.rand(2, 1, 7, 6).double() + 0.5, 0)
    for statistics in ("active", "dense"):
        masked, gathered = (kind.from_dense(dense, statistics=statistics) for kind in (MaskedBlock, GatheredBlock))
        for mask in (gate, None):
            start = copy.deepcopy(dense.state_dict())
            expected = masked(input, mask)
            dense.load_state_dict(start)
            assert torch.allclose(gathered(input, kept, mask), expected, **CLOSE)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu"),
                                     lambda: torch.device("meta")])  # fmt: skip
def test_a_conversion_is_the_same_in_every_context(context):
    make = written_by(functional)
    expected, outside = MaskedBlock.from_dense(make()), make()
    with context():
        for dense in (make(), outside):
            block = MaskedBlock.from_dense(dense)
            assert (block.stages, block.shortcut_path) == (expected.stages, expected.shortcut_path)


def torchvision():
    """torchvision's models, whose operators do not load beside a PyTorch for the CPU: two are declared then."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    schemas = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(schemas)
    return importlib.import_module("torchvision.models")


def timm():
    torchvision()
    return importlib.import_module("timm")


_KEPT = []  # a library's schemas live as long as it does
LIBRARIES = {"torchvision": torchvision, "timm": timm}


def own(path, *arguments, **options):
    """Make a block by its class, by the path in the library."""

    def make(library):
        file, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"{library.__name__}.{file}"), name)(*arguments, **options)

    return make


def mobilenet_v3(squeeze):
    def make(library):
        file = library.mobilenetv3
        return file.InvertedResidual(file.InvertedResidualConfig(8, 3, 24, 8, squeeze, "HS", 1, 1, 1), nn.BatchNorm2d)

    return make


def fused(expand, probability=0.0):
    def make(library):
        file = library.efficientnet
        return file.FusedMBConv(file.FusedMBConvConfig(expand, 3, 1, 8, 8, 1), probability, nn.BatchNorm2d)

    return make


def mbconv(library):
    file = library.efficientnet
    return file.MBConv(file.MBConvConfig(4, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d)


def regnet(library, squeeze=None):
    return library.regnet.ResBottleneckBlock(8, 16, 2, nn.BatchNorm2d, nn.ReLU, 8, 1.0, squeeze)


# Library, family, block, its input channels, how it is made, and what names the refusal.
ZOO = [
    ("torchvision", "ResNet-18", "BasicBlock", 8, lambda t: t.resnet.BasicBlock(8, 8), None),
    ("torchvision", "ResNet-50", "Bottleneck", 16, lambda t: t.resnet.Bottleneck(16, 4), None),
    ("torchvision", "ResNeXt", "Bottleneck", 16, lambda t: t.resnet.Bottleneck(16, 4, groups=2, base_width=64), None),
    ("torchvision", "detection", "Bottleneck, FrozenBatchNorm2d", 16,
     lambda t: t.resnet.Bottleneck(16, 4, norm_layer=importlib.import_module("torchvision.ops").FrozenBatchNorm2d),
     None),
    ("torchvision", "MobileNetV2", "InvertedResidual", 8, lambda t: t.mobilenetv2.InvertedResidual(8, 8, 1, 6), None),
    ("torchvision", "MobileNetV2", "InvertedResidual, stride 2", 8,
     lambda t: t.mobilenetv2.InvertedResidual(8, 12, 2, 6), None),
    ("torchvision", "MobileNetV3", "InvertedResidual", 8, mobilenet_v3(False), None),
    ("torchvision", "MobileNetV3", "InvertedResidual, SE", 8, mobilenet_v3(True), "`block.2.avgpool`"),
    ("torchvision", "MNASNet", "_InvertedResidual", 8, lambda t: t.mnasnet._InvertedResidual(8, 8, 3, 1, 3), None),
    ("torchvision", "EfficientNetV2", "FusedMBConv, expand 1", 8, fused(1), None),
    ("torchvision", "EfficientNetV2", "FusedMBConv, expand 4", 8, fused(4), None),
    ("torchvision", "EfficientNetV2", "FusedMBConv, stochastic depth", 8, fused(1, 0.2), "in `stochastic_depth`"),
    ("torchvision", "EfficientNet", "MBConv", 8, mbconv, "`block.2.avgpool`"),
    ("torchvision", "RegNetX", "ResBottleneckBlock", 8, regnet, None),
    ("torchvision", "RegNetY", "ResBottleneckBlock", 8, lambda t: regnet(t, 0.25), "`f.se.avgpool`"),
    ("torchvision", "ShuffleNetV2", "InvertedResidual", 8, lambda t: t.shufflenetv2.InvertedResidual(8, 8, 1),
     "`chunk`"),
    ("torchvision", "DenseNet", "_DenseLayer", 8, lambda t: t.densenet._DenseLayer(8, 4, 2, 0.0), "`cat`"),
    ("torchvision", "ConvNeXt", "CNBlock", 8, lambda t: t.convnext.CNBlock(8, 1e-6, 0.0), "`permute` in `block.1`"),
    ("torchvision", "GoogLeNet", "Inception", 8, own("googlenet.Inception", 8, 4, 4, 4, 4, 4, 4), "`branch4.0`"),
    ("timm", "ResNet-18", "BasicBlock", 8, own("models.resnet.BasicBlock", 8, 8), None),
    ("timm", "ResNet-50", "Bottleneck", 16, own("models.resnet.Bottleneck", 16, 4), None),
    ("timm", "ResNet-50", "Bottleneck, SiLU", 16, own("models.resnet.Bottleneck", 16, 4, act_layer=nn.SiLU), None),
    ("timm", "ResNet-50", "Bottleneck, drop path", 16,
     lambda t: own("models.resnet.Bottleneck", 16, 4, drop_path=t.layers.DropPath(0.1))(t), "in `drop_path`"),
    ("timm", "ResNet-50", "Bottleneck, drop block", 16,
     lambda t: own("models.resnet.Bottleneck", 16, 4, drop_block=lambda: t.layers.DropBlock2d(0.1))(t),
     "`drop_block"),
    ("timm", "SE-ResNet", "Bottleneck", 16,
     lambda t: own("models.resnet.Bottleneck", 16, 4, attn_layer=t.layers.SEModule)(t), "`mean` in `se` (SEModule)"),
    ("timm", "ECA-ResNet", "Bottleneck", 16,
     lambda t: own("models.resnet.Bottleneck", 16, 4, attn_layer=t.layers.EcaModule)(t), "`mean` in `se` (EcaModule)"),
    ("timm", "ResNet-blur", "Bottleneck", 16,
     lambda t: own("models.resnet.Bottleneck", 16, 4, 2, aa_layer=t.layers.BlurPool2d,
                   downsample=downsample(16, 16, 2))(t), "`pad` in `aa` (BlurPool2d)"),
    ("timm", "MobileNetV1", "DepthwiseSeparableConv", 8,
     own("models._efficientnet_blocks.DepthwiseSeparableConv", 8, 8), None),
    ("timm", "MobileNetV1", "DepthwiseSeparableConv, pw_act", 8,
     own("models._efficientnet_blocks.DepthwiseSeparableConv", 8, 8, pw_act=True), None),
    ("timm", "MobileNetV2", "InvertedResidual", 8, own("models._efficientnet_blocks.InvertedResidual", 8, 8), None),
    ("timm", "MobileNetV2", "InvertedResidual, frozen", 8,
     lambda t: t.layers.freeze_batch_norm_2d(own("models._efficientnet_blocks.InvertedResidual", 8, 8)(t)), None),
    ("timm", "MobileNetV2", "InvertedResidual, drop path", 8,
     own("models._efficientnet_blocks.InvertedResidual", 8, 8, drop_path_rate=0.1), "in `drop_path`"),
    ("timm", "MobileNetV3", "InvertedResidual, SE", 8,
     lambda t: own("models._efficientnet_blocks.InvertedResidual", 8, 8, se_layer=t.layers.SqueezeExcite)(t),
     "`mean` in `se`"),
    ("timm", "EfficientNet-lite (tf)", "InvertedResidual, same padding", 8,
     own("models._efficientnet_blocks.InvertedResidual", 8, 8, stride=2, pad_type="same"), "`conv_dw` (Conv2dSame"),
    ("timm", "EfficientNetV2", "EdgeResidual", 8, own("models._efficientnet_blocks.EdgeResidual", 8, 8), None),
    ("timm", "MobileNetV4", "UniversalInvertedResidual", 8,
     own("models._efficientnet_blocks.UniversalInvertedResidual", 8, 8, layer_scale_init_value=None), None),
    ("timm", "MobileNetV4", "UniversalInvertedResidual, layer scale", 8,
     own("models._efficientnet_blocks.UniversalInvertedResidual", 8, 8, layer_scale_init_value=1e-5),
     "in `layer_scale`"),
    ("timm", "CondConv", "CondConvResidual", 8,
     own("models._efficientnet_blocks.CondConvResidual", 8, 8, num_experts=2), "in `conv_pw` (CondConv2d)"),
    ("timm", "RegNetX", "Bottleneck", 16, own("models.regnet.Bottleneck", 16, 16, group_size=8, se_ratio=0), None),
    ("timm", "RegNetY", "Bottleneck", 16, own("models.regnet.Bottleneck", 16, 16, group_size=8), "`mean` in `se`"),
    ("timm", "RegNetV", "PreBottleneck", 16, own("models.regnet.PreBottleneck", 16, 16, group_size=8), "`norm1`"),
    ("timm", "GERNet", "BasicBlock", 8, own("models.byobnet.BasicBlock", 8, 8), None),
    ("timm", "GERNet", "BottleneckBlock", 16, own("models.byobnet.BottleneckBlock", 16, 16), None),
    ("timm", "Darknet (byob)", "DarkBlock", 8, own("models.byobnet.DarkBlock", 8, 8), None),
    ("timm", "RepVGG", "RepVggBlock", 8, own("models.byobnet.RepVggBlock", 8, 8),
     "two branches of as many convolutions"),
    ("timm", "MobileOne", "MobileOneBlock", 8, own("models.byobnet.MobileOneBlock", 8, 8), "conv"),
    ("timm", "CSPResNet", "BottleneckBlock", 16, own("models.cspnet.BottleneckBlock", 16, 16), None),
    ("timm", "CSPDarknet", "DarkBlock, leaky ReLU", 8,
     own("models.cspnet.DarkBlock", 8, 8, act_layer=nn.LeakyReLU), "(LeakyReLU"),
    ("timm", "DLA-34", "DlaBasic", 8, own("models.dla.DlaBasic", 8, 8), None),
    ("timm", "DLA-60", "DlaBottleneck", 16, own("models.dla.DlaBottleneck", 16, 16), None),
    ("timm", "Res2Net", "Bottle2neck", 16,
     own("models.res2net.Bottle2neck", 16, 4, base_width=52, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d),
     "`split`"),
    ("timm", "ResNeSt", "ResNestBottleneck", 16, own("models.resnest.ResNestBottleneck", 16, 4),
     "in `conv2` (SplitAttn)"),
    ("timm", "SKNet", "SelectiveKernelBasic", 16, own("models.sknet.SelectiveKernelBasic", 16, 16),
     "in `conv1` (SelectiveKernel)"),
    ("timm", "ResNetV2", "PreActBottleneck", 16,
     lambda t: own("models.resnetv2.PreActBottleneck", 16, norm_layer=t.layers.BatchNormAct2d)(t), "in `norm1`"),
    ("timm", "NF-ResNet", "NormFreeBlock", 16, own("models.nfnet.NormFreeBlock", 16, act_layer=nn.ReLU), "`act1`"),
    ("timm", "TResNet", "BasicBlock", 8, own("models.tresnet.BasicBlock", 8, 8, use_se=False), "(LeakyReLU"),
    ("timm", "DPN", "DualPathBlock", 16, own("models.dpn.DualPathBlock", 16, 8, 8, 16, 4, 1), "c1x1"),
    ("timm", "RexNet", "LinearBottleneck", 8, own("models.rexnet.LinearBottleneck", 8, 8, 1, (1, 1), se_ratio=0.0),
     "`getitem`"),
    ("timm", "GhostNet", "GhostBottleneck", 8, own("models.ghostnet.GhostBottleneck", 8, 8, 8), "`cat` in `ghost1`"),
    ("timm", "Xception", "Block", 8, own("models.xception.Block", 8, 8, 2), "`rep.0` (ReLU"),
    ("timm", "EfficientViT", "ConvBlock", 8, own("models.efficientvit_mit.ConvBlock", 8, 8), None),
    ("timm", "EfficientViT", "MBConv", 8, own("models.efficientvit_mit.MBConv", 8, 8), None),
    ("timm", "ConvNeXt", "ConvNeXtBlock", 8, own("models.convnext.ConvNeXtBlock", 8), "`permute` at convnext.py"),
    ("timm", "RepViT", "RepViTBlock", 8,
     own("models.repvit.RepViTBlock", 8, 2, 3, False, nn.GELU, False), "two branches of as many convolutions"),
    ("timm", "FasterNet", "MLPBlock", 8, own("models.fasternet.MLPBlock", 8, 4, 2.0, 0.0, 0), "`split`"),
    ("timm", "StarNet", "Block", 8, own("models.starnet.Block", 8), "`mul`"),
]  # fmt: skip


def library_or_skip(name):
    if (
        folder := str(Path(sys.prefix) / "zoo")
    ) not in sys.path:  # where the Makefile puts them; what is installed wins
        sys.path.append(folder)
    try:
        return LIBRARIES[name]()
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


def shortcut_of(block):
    if block.shortcut_path is None:
        return None

    def shortcut(dense, x):
        for path in () if block.shortcut_path == "identity" else block._shortcut_paths():
            x = dense.get_submodule(path)(x)
        return x

    return shortcut


@pytest.mark.parametrize("row", ZOO, ids=lambda row: "-".join(row[:3]))
def test_zoo(row):
    library, _, _, channels, make, refusal = row
    dense = settled(make(library_or_skip(library)))
    if refusal is not None:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            MaskedBlock.from_dense(dense)
        return
    block = MaskedBlock.from_dense(dense)
    check(dense, block, shortcut_of(block), channels)


def table():
    """One line a row of the zoo: what converts and what is refused, with the step that is named."""
    lines = ["| library | family | block | converts | shortcut, or what is refused |", "|---|---|---|---|---|"]
    for library, family, name, _, make, _ in ZOO:
        try:
            block = MaskedBlock.from_dense(make(library_or_skip(library)))
            answer = f"yes | {block.shortcut_path}"
        except ValueError as error:
            answer = f"no | {str(error).partition('; got ')[2]}"
        lines.append(f"| {library} | {family} | {name} | {answer} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
