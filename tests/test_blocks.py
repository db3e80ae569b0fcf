"""Masked residual blocks against the dense blocks that they are made from: eval and train, values and gradients."""

import copy
import functools

import pytest
import torch
from conftest import ON_GPU, Target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dynconv import ActiveSites, backend, execution, prepare
from dynconv.nn import (
    GatheredBottleneck,
    MaskedBasicBlock,
    MaskedBlock,
    MaskedBottleneck,
    MaskedConv2d,
    MaskedInvertedResidual,
)


def downsample(cin, cout, stride):
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class Dense(nn.Module):
    """A dense block in the layout of a library's own: children by the library's names, nothing of dynconv."""

    def __init__(self, forward, **children):
        super().__init__()
        self.run = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, input):
        return self.run(self, input)


def resnet(self, x):
    shortcut = x if self.downsample is None else self.downsample(x)
    x = self.relu(self.bn1(self.conv1(x)))
    x = self.bn2(self.conv2(x))
    if hasattr(self, "conv3"):
        x = self.bn3(self.conv3(self.relu(x)))
    return self.relu(x + shortcut)


def basic(cin, cout, stride=1):
    """torchvision.models.resnet.BasicBlock."""
    return Dense(
        resnet, conv1=nn.Conv2d(cin, cout, 3, stride, 1, bias=False), bn1=nn.BatchNorm2d(cout), relu=nn.ReLU(),
        conv2=nn.Conv2d(cout, cout, 3, 1, 1, bias=False), bn2=nn.BatchNorm2d(cout),
        downsample=downsample(cin, cout, stride) if (cin, stride) != (cout, 1) else None,
    )  # fmt: skip


def bottleneck(cin, width, cout, stride=1, groups=1, dilation=1):
    """torchvision.models.resnet.Bottleneck."""
    return Dense(
        resnet, conv1=nn.Conv2d(cin, width, 1, bias=False), bn1=nn.BatchNorm2d(width), relu=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False), bn2=nn.BatchNorm2d(width),
        conv3=nn.Conv2d(width, cout, 1, bias=False), bn3=nn.BatchNorm2d(cout),
        downsample=downsample(cin, cout, stride) if (cin, stride) != (cout, 1) else None,
    )  # fmt: skip


def timm_bottleneck(channels, width, act=nn.SiLU):
    """timm.models.resnet.Bottleneck."""

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(y)))))
        return self.act3(self.bn3(self.conv3(y)) + x)

    return Dense(
        forward, conv1=nn.Conv2d(channels, width, 1, bias=False), bn1=nn.BatchNorm2d(width), act1=act(),
        conv2=nn.Conv2d(width, width, 3, 1, 1, bias=False), bn2=nn.BatchNorm2d(width), drop_block=nn.Identity(),
        act2=act(), aa=nn.Identity(), conv3=nn.Conv2d(width, channels, 1), bn3=nn.BatchNorm2d(channels), act3=act(),
        se=None, drop_path=None, downsample=None,
    )  # fmt: skip


class NormAct(nn.BatchNorm2d):
    """timm.layers.BatchNormAct2d."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def timm_inverted(cin, cout, stride, act=nn.Hardswish):
    """timm's InvertedResidual."""

    def forward(self, x):
        y = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        y = self.drop_path(self.bn3(self.conv_pwl(self.se(y))))
        return y + x if self.has_skip else y

    hidden = 3 * cin
    return Dense(
        forward, conv_pw=nn.Conv2d(cin, hidden, 1, bias=False), bn1=NormAct(hidden, act),
        conv_dw=nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False), bn2=NormAct(hidden, act),
        se=nn.Identity(), conv_pwl=nn.Conv2d(hidden, cout, 1, bias=False), bn3=NormAct(cout, nn.Identity),
        drop_path=nn.Identity(), has_skip=stride == 1 and cin == cout,
    )  # fmt: skip


def inverted(cin, cout, stride, expand=6):
    """torchvision.models.mobilenetv2.InvertedResidual."""

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)

    unit = lambda i, o, *rest: nn.Sequential(nn.Conv2d(i, o, *rest, bias=False), nn.BatchNorm2d(o), nn.ReLU6())
    hidden = cin * expand
    units = [unit(cin, hidden, 1)] if expand > 1 else []
    units += [unit(hidden, hidden, 3, stride, 1, 1, hidden), nn.Conv2d(hidden, cout, 1, bias=False)]
    return Dense(forward, conv=nn.Sequential(*units, nn.BatchNorm2d(cout)), use_res_connect=stride == 1 and cin == cout)


BLOCKS = {
    "basic": (MaskedBasicBlock, lambda: basic(8, 8), 8),
    "basic-downsampling": (MaskedBasicBlock, lambda: basic(8, 12, 2), 8),
    "bottleneck": (MaskedBottleneck, lambda: bottleneck(12, 4, 12), 12),
    "bottleneck-downsampling": (MaskedBottleneck, lambda: bottleneck(12, 4, 16, 2), 12),
    "bottleneck-groups-dilation": (MaskedBottleneck, lambda: bottleneck(12, 6, 12, groups=2, dilation=2), 12),
    "bottleneck-timm-silu": (MaskedBottleneck, lambda: timm_bottleneck(12, 4), 12),
    "inverted": (MaskedInvertedResidual, lambda: inverted(4, 4, 1), 4),
    "inverted-stride-2": (MaskedInvertedResidual, lambda: inverted(4, 6, 2), 4),
    "inverted-unexpanded": (MaskedInvertedResidual, lambda: inverted(4, 4, 1, expand=1), 4),
    "inverted-timm-hardswish": (MaskedInvertedResidual, lambda: timm_inverted(4, 4, 1), 4),
    "inverted-timm-gelu-stride-2": (MaskedInvertedResidual, lambda: timm_inverted(4, 6, 2, nn.GELU), 4),
}
# Of random numbers in float64: sums of fewer than 300 products of a few units, then normalised.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def random_block(name, device="cpu"):
    """The dense block and its masked form, with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    kind, make, channels = BLOCKS[name]
    dense = make().double()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return dense.to(device), kind, torch.randn(2, channels, 7, 6, dtype=torch.float64, device=device)


def masked_dense(block, dense, input, mask, gate=None):
    """where(mask, dense(input), shortcut), by the dense block alone."""
    output = dense(input)
    if block.shortcut_path is None:
        shortcut = torch.zeros_like(output)
    else:
        shortcut = input if block.shortcut_path == "identity" else dense.downsample(input)
    return torch.where(mask, output, shortcut)


def masks(dense, input, target=None):
    """Random, with an empty sample, empty, full: at the block's output.

    Interpreted only the second and third: the first has nothing that it has not, and a full mask, which takes as long
    as the others together, is in test_training_over_all_sites.
    """
    with torch.no_grad():
        size = copy.deepcopy(dense).eval()(input).shape[2:]
    random = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1)).to(input.device) < 0.4
    sample = random.clone()
    sample[1] = False
    chosen = {"random": random, "sample": sample, "empty": random & False, "full": random | True}
    if target is not None and target.is_interpreted:
        return {name: chosen[name] for name in ("sample", "empty")}
    return chosen


@pytest.mark.parametrize("name", BLOCKS)
def test_eval(target, name):
    """Values and all gradients, with the normalisation folded; fused and not."""
    dense, kind, input = random_block(name, target.device)
    block = kind.from_dense(dense).eval()
    assert list(block.state_dict()) == list(dense.state_dict())
    assert all(a is b for a, b in zip(block.parameters(), dense.parameters(), strict=True))
    for mask in masks(dense.eval(), input, target).values():
        one, two = (input.clone().requires_grad_() for _ in range(2))
        expected = masked_dense(block, dense, one, mask)
        grad = torch.randn(expected.shape, dtype=torch.float64, device=target.device)
        with target.use():
            with torch.no_grad():
                assert torch.allclose(block(input, mask), expected, **CLOSE)
            actual = block(two, mask)
            assert actual.is_contiguous(memory_format=torch.channels_last)
            have = torch.autograd.grad(actual, [two, *block.parameters()], grad)
        want = torch.autograd.grad(expected, [one, *dense.parameters()], grad)
        assert torch.allclose(actual, expected, **CLOSE)
        for parameter, (a, b) in enumerate(zip(want, have, strict=True)):
            assert torch.allclose(a, b, **CLOSE), parameter


@pytest.mark.parametrize("name", BLOCKS)
def test_training_over_active_sites(target, name):
    """Against the same block on the reference backend: values, gradients, a gate's too, and running statistics."""
    dense, kind, input = random_block(name, target.device)
    block = kind.from_dense(dense)
    start = copy.deepcopy(dense.state_dict())
    for mask in masks(dense, input, target).values():
        gate = torch.where(mask, torch.rand(mask.shape, dtype=torch.float64, device=target.device) + 0.5, 0)
        results = []
        for used in (target.use(), backend("reference")):
            dense.load_state_dict(start)
            x, g = input.clone().requires_grad_(), gate.clone().requires_grad_()
            with used:
                output = block(x, g)
                grad = torch.ones_like(output) if not results else results[0][-1]
                grad = torch.randn(output.shape, dtype=torch.float64, device=target.device) if not results else grad
                grads = torch.autograd.grad(output, [x, g, *block.parameters()], grad)
            results.append([output, *grads, *(t.clone() for t in block.state_dict().values()), grad])
        for position, (have, want) in enumerate(zip(*results, strict=True)):
            assert torch.allclose(have, want, rtol=1e-8, atol=1e-9), position


@pytest.mark.parametrize("name", BLOCKS)
def test_training_over_all_sites(target, name):
    """A full mask is the dense block; dense statistics are the masked dense block, to the bit, at any mask."""
    dense, kind, input = random_block(name, target.device)
    start = copy.deepcopy(dense.state_dict())
    block, exact = kind.from_dense(dense), kind.from_dense(dense, statistics="dense")
    every = masks(dense, input)
    expected = dense(input)
    after = copy.deepcopy(dense.state_dict())
    dense.load_state_dict(start)
    with target.use():
        assert torch.allclose(block(input, every["full"]), expected, **CLOSE)
        for key, value in after.items():
            assert torch.allclose(dense.state_dict()[key], value, **CLOSE), key
        dense.load_state_dict(start)
        one, two = (input.clone().requires_grad_() for _ in range(2))
        actual = exact(one, every["random"])
    have = torch.autograd.grad(actual.sum(), [one, *exact.parameters()])
    dense.load_state_dict(start)
    expected = masked_dense(block, dense, two, every["random"])
    want = torch.autograd.grad(expected.sum(), [two, *dense.parameters()])
    assert torch.equal(actual, expected)
    assert all(torch.allclose(a, b, **CLOSE) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_without_a_mask_it_is_the_dense_block(name):
    dense, kind, input = random_block(name)
    block = kind.from_dense(dense.eval())
    assert torch.allclose(block(input), dense(input), **CLOSE)
    start = copy.deepcopy(dense.state_dict())
    expected = dense.train()(input)
    dense.load_state_dict(start)
    assert torch.allclose(block.train()(input), expected, **CLOSE)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted"])
def test_in_place(target, name):
    dense, kind, input = random_block(name, target.device)
    block = kind.from_dense(dense.eval())
    input = input.contiguous(memory_format=torch.channels_last)
    for mask in masks(dense, input).values():
        expected, updated = masked_dense(block, dense, input, mask), input.clone(memory_format=torch.preserve_format)
        with target.use(), torch.no_grad():
            assert block(updated, ActiveSites(mask), inplace=True) is updated
        assert torch.allclose(updated, expected, **CLOSE)
        assert torch.equal(torch.where(mask, 0, updated), torch.where(mask, 0, input))
    with torch.no_grad():
        assert block(updated.copy_(input), inplace=True) is updated  # without a mask, all of it
        assert torch.allclose(updated, dense(input), **CLOSE)


def _strided():
    return MaskedBottleneck(16, 4, stride=2), (1, 1, 3, 3)


def _widened():
    return MaskedBottleneck(16, 8), (1, 1, 6, 6)


def _replaced():
    block = MaskedBottleneck(16, 4)
    block.conv2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
    return block, (1, 1, 6, 6)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("make", [_strided, _widened, _replaced])
def test_parts_that_do_not_fit_each_other_are_refused(make, way, inplace):
    """In inference, where kernels take the shortcut to have the output's shape, and a layer the channels before it."""
    block, shape = make()
    input = torch.randn(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    before = input.clone()
    with torch.no_grad(), execution(way), pytest.raises(ValueError, match=r"(shortcut|inplace|weight): expected"):
        block.eval()(input, torch.arange(shape[2] * shape[3]).view(shape) < 3, inplace=inplace)
    assert torch.equal(input, before)


@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("kind", [MaskedBottleneck, GatheredBottleneck])
def test_a_shortcut_broadcasts_as_in_the_dense_block(kind, way):
    block = kind(16, 4, downsample=nn.Conv2d(16, 1, 1)).eval()
    input, mask = torch.randn(2, 16, 6, 6), torch.rand(2, 1, 6, 6) < 0.5
    with torch.no_grad(), execution(way):
        expected = torch.where(mask, block(input), block.downsample(input))
        assert torch.allclose(block(input, mask=mask), expected, atol=1e-5)


def test_in_place_is_refused_where_it_cannot_be():
    dense, kind, input = random_block("basic")
    mask = masks(dense, input)["random"]
    block = kind.from_dense(dense.eval())
    with pytest.raises(ValueError, match=r"inplace: expected torch.no_grad\(\)"):
        block(input, mask, inplace=True)
    with torch.no_grad():
        with pytest.raises(ValueError, match="inplace: expected a channels_last input"):
            block(input, mask, inplace=True)
        with pytest.raises(ValueError, match="inplace: expected a block in eval mode"):
            block.train()(input, mask, inplace=True)
        dense, kind, input = random_block("basic-downsampling")
        with pytest.raises(ValueError, match="inplace: expected a block whose shortcut is its input"):
            kind.from_dense(dense.eval())(input, masks(dense, input)["random"], inplace=True)


def test_folded_parameters_follow_the_modules():
    """They are kept between calls, and made anew when a parameter or a statistic has changed."""
    dense, kind, input = random_block("bottleneck")
    block = kind.from_dense(dense.eval())
    mask = masks(dense, input)["random"]
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: dense.bn2.running_var.mul_(2),
            lambda: dense.conv1.weight.mul_(-1),
            lambda: setattr(dense.bn1, "eps", 0.5),
            lambda: block.load_state_dict({k: v * 1.5 for k, v in block.state_dict().items()}),
        ):
            change()
            assert torch.allclose(block(input, mask), masked_dense(block, dense, input, mask), **CLOSE)
        duplicate = copy.deepcopy(block)
        duplicate.conv3.weight.mul_(3)
        assert torch.allclose(block(input, mask), masked_dense(block, dense, input, mask), **CLOSE)


@pytest.mark.parametrize("kind", [MaskedBasicBlock, MaskedBottleneck])
def test_constructors_of_resnet_blocks(kind):
    """Parameters by torchvision's names, and a block that has been built is one that could have been converted."""
    torch.manual_seed(0)
    width = 8 * kind.expansion
    block = kind(width, 8, norm_layer=nn.BatchNorm2d).double().eval()
    names = {name.split(".")[0] for name in block.state_dict()}
    assert names == {f"{part}{i}" for part in ("conv", "bn") for i in range(1, kind._convolutions + 1)}
    input = torch.randn(2, width, 5, 6, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 6) < 0.5
    dense = copy.deepcopy(block)
    dense = Dense(resnet, **dict(dense.named_children()), downsample=None)
    assert torch.allclose(block(input, mask), masked_dense(block, dense, input, mask), **CLOSE)
    strided = kind(width, 8, 2, downsample(width, width, 2)).eval()
    assert strided(input.float(), torch.ones(2, 1, 3, 3, dtype=torch.bool)).shape == (2, width, 3, 3)


def test_constructor_of_inverted_residual():
    dense = inverted(4, 4, 1)
    block = MaskedInvertedResidual(4, 4, 1, 6)
    block.load_state_dict(dense.state_dict(), strict=True)
    input, mask = torch.randn(2, 4, 5, 6), torch.rand(2, 1, 5, 6) < 0.5
    expected = masked_dense(block.eval(), dense.eval(), input, mask)
    assert torch.allclose(block(input, mask), expected, atol=1e-5)
    with pytest.raises(ValueError, match="stride: expected 1 or 2, got 3"):
        MaskedInvertedResidual(4, 4, 3, 6)


def test_what_has_no_masked_form_is_refused():
    dense = basic(8, 8)
    dense.stages = nn.Identity()
    with pytest.raises(ValueError, match="module: expected no child named `stages`, which MaskedBasicBlock has itself"):
        MaskedBasicBlock.from_dense(dense)
    with pytest.raises(TypeError, match="module: expected a Bottleneck of 3 convolutions, got Dense of 2"):
        MaskedBottleneck.from_dense(basic(8, 8))
    with pytest.raises(TypeError, match="module: expected a BasicBlock of 2 convolutions, got Dense of 3"):
        MaskedBasicBlock.from_dense(bottleneck(8, 4, 8))
    for module in (nn.Conv2d(3, 3, 1), nn.ReLU(), 3):
        with pytest.raises(TypeError, match="module: expected a block of several layers, got"):
            MaskedInvertedResidual.from_dense(module)
    dense = basic(8, 8)
    dense.relu = nn.Tanh()
    with pytest.raises(ValueError, match=r"module: expected .* got `relu` \(Tanh\(\)\) at test_blocks.py"):
        MaskedBasicBlock.from_dense(dense)
    dense = basic(8, 8)
    dense.conv1 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"module: expected .* got `conv1` .* whose padding_mode is 'reflect'"):
        MaskedBasicBlock.from_dense(dense)
    dense.conv1 = nn.LazyConv2d(8, 3, padding=1)
    with pytest.raises(ValueError, match=r"module: expected parameters that exist, got a lazy `conv1.weight`"):
        MaskedBasicBlock.from_dense(dense)
    with pytest.raises(ValueError, match="statistics: expected 'active' or 'dense', got 'batch'"):
        MaskedBasicBlock(8, 8, statistics="batch")
    for first in (nn.ReLU(inplace=True), nn.Sequential(nn.Hardswish(inplace=True))):
        with pytest.raises(ValueError, match="shortcut: expected layers that leave the block's input as it is, got "):
            MaskedBasicBlock(8, 8, downsample=nn.Sequential(first, nn.Conv2d(8, 8, 1)))
    scaled = type("Scaled", (MaskedBasicBlock,), {"forward": lambda self, input, mask=None: None})
    with pytest.raises(ValueError, match=r"module: expected a block of dynconv.nn, got Scaled with its own forward"):
        MaskedBlock.from_dense(scaled(8, 8))
    for dense in (basic(8, 8), MaskedBasicBlock(8, 8)):
        dense.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="module: expected a block without hooks, got the forward hook"):
            MaskedBlock.from_dense(dense)


def test_mixed_precision(target):
    """Under autocast a block in eval mode computes in the low precision, as the dense one does."""
    dense, kind, input = random_block("bottleneck", target.device)
    dense, input = dense.float().eval(), input.float()
    block, mask = kind.from_dense(dense), masks(dense, input)["random"]
    target.skip_unless(torch.bfloat16)
    with torch.autocast(target.device.type, dtype=torch.bfloat16), target.use(), torch.no_grad():
        actual = block(input, mask)
    expected = masked_dense(block, dense, input, mask)
    # Three convolutions, each rounding its operands and its result to 8 bits.
    assert (actual.float() - expected).abs().max() <= 12 * 2**-8 * expected.abs().max()


def padded_unevenly():
    """A kernel of an even size, which "same" pads by one more at the end than at the start."""
    block = basic(8, 8)
    block.conv1, block.conv2 = nn.Conv2d(8, 8, (2, 4), padding="same"), nn.Conv2d(8, 8, 3, padding="same", dilation=2)
    return MaskedBlock.from_dense(block)


CPU_BLOCKS = {
    "inverted": lambda: MaskedInvertedResidual(16, 16, 1, 6),
    "inverted-stride-2": lambda: MaskedInvertedResidual(20, 24, 2, 3),
    "inverted-unexpanded": lambda: MaskedInvertedResidual(8, 8, 1, 1),
    "bottleneck": lambda: MaskedBottleneck(32, 8),
    "bottleneck-stride-2": lambda: MaskedBottleneck(32, 8, 2, downsample(32, 32, 2)),
    "bottleneck-groups": lambda: MaskedBottleneck(32, 8, groups=2),
    "bottleneck-dilation": lambda: MaskedBottleneck(128, 32, dilation=2),
    "basic-17": lambda: MaskedBasicBlock(17, 17),
    "basic-uneven": padded_unevenly,
    "basic-stride-2": lambda: MaskedBasicBlock(16, 24, 2, downsample(16, 24, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=90, deadline=None)
@given(
    st.sampled_from(list(CPU_BLOCKS)), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]), st.booleans(), st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_one_kernel_for_a_whole_block(name, n, height, width, density, gated, threads, seed):
    """What inference on the CPU runs, over maps of any size and bands of any number: the reference, to rounding."""
    torch.manual_seed(seed)
    block = CPU_BLOCKS[name]().double().eval().requires_grad_(False)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    input = torch.randn(n, channels, height, width, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    mask = torch.rand(n, 1, *block(input).shape[2:]) < density
    if gated:
        mask = torch.where(mask, torch.rand(mask.shape, dtype=torch.float64) + 0.5, 0)
    with backend("reference"):
        expected = block(input, mask)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = block(input, mask)
        assert torch.allclose(actual, expected, **CLOSE)
        torch.set_num_threads(before)
        if block.shortcut_path != "downsample":  # that is PyTorch's own convolution, whose bits depend on the threads
            assert torch.equal(actual, block(input, mask))
        if block.shortcut_path == "identity":
            assert torch.equal(block(input, mask, inplace=True), actual)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["inverted", "bottleneck", "basic-17"])
def test_one_kernel_in_every_type(name, dtype):
    """Half types keep float32 between the layers: one rounding of the parameters and one of the result."""
    torch.manual_seed(0)
    block = CPU_BLOCKS[name]().eval().requires_grad_(False).to(dtype)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    input, mask = torch.randn(2, channels, 9, 8).to(dtype), torch.rand(2, 1, 9, 8) < 0.5
    actual = block(input, mask)
    with backend("reference"):
        expected = block.double()(input.double(), mask)
    assert actual.dtype == dtype
    # Folding rounds each of three layers' weights once; float32 adds up to 1152 products.
    bound = 4 * torch.finfo(dtype).eps + 1152 * torch.finfo(torch.float32).eps
    assert (actual.double() - expected).abs().max() <= bound * expected.abs().max()


def test_opcheck_of_the_chain():
    block = MaskedInvertedResidual(8, 8, 1, 2).eval().requires_grad_(False)
    input = torch.randn(1, 8, 4, 5).contiguous(memory_format=torch.channels_last)
    sites = ActiveSites(torch.rand(1, 1, 4, 5) < 0.5)
    layers = block._frozen(input, "cpu")
    geometry = [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 16, 1, 1, 0, 0, 1, 1, 1]
    operands = (
        sites.mask, None, [layer.conv.weight for layer in layers], [t for layer in layers for t in layer.sparse],
        geometry, ["relu6", "relu6", "none"],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dynconv.masked_chain.default, (input, *operands, input, None))
    torch.library.opcheck(torch.ops.dynconv.masked_chain_.default, (input, *operands))
    for layer in layers:
        arguments = (layer.conv.weight, torch.randn(layer.conv.out_channels), layer.groups)
        torch.library.opcheck(torch.ops.dynconv.prepare_chain.default, arguments)


def test_flops_of_the_chain_are_those_of_its_layers():
    block = MaskedBottleneck(16, 4).eval().requires_grad_(False)
    input, mask = torch.randn(1, 16, 6, 6), torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2, 2] = True
    with FlopCounterMode(display=False) as counter:
        block(input, mask)
    # One site reads nine, each made of one pixel.
    assert counter.get_total_flops() == 2 * (9 * 16 * 4 + 9 * 4 * 4 + 4 * 16)


@pytest.mark.parametrize("name", ["bottleneck", "inverted"])
def test_compiled_block(name):
    torch._dynamo.reset()
    dense, kind, input = random_block(name)
    mask = masks(dense, input)["random"]
    for training in (False, True):
        block = kind.from_dense(dense.train(training))
        start = copy.deepcopy(dense.state_dict())
        results = []
        for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            dense.load_state_dict(start)
            x = input.clone().requires_grad_()
            output = call(x, mask)
            results.append([output, *torch.autograd.grad(output.sum(), [x, *block.parameters()])])
        assert all(torch.allclose(a, b, **CLOSE) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_launches_of_a_block(monkeypatch, shared):
    """Compaction, and three convolutions: no kernel between the layers, nothing folded or repacked again."""
    target = Target("triton")
    launched = []
    if ON_GPU:
        from triton.runtime.jit import JITFunction as Launcher

        name, original = "run", Launcher.run
    else:
        from triton.runtime.interpreter import GridExecutor as Launcher

        name, original = "__call__", Launcher.__call__

    def launch(self, *arguments, **options):
        launched.append(getattr(self, "fn", self).__name__)
        return original(self, *arguments, **options)

    block = prepare(MaskedInvertedResidual(8, 8, 1, 2).eval().requires_grad_(False).to(target.device))
    input = torch.randn(1, 8, 6, 5, device=target.device).contiguous(memory_format=torch.channels_last)
    mask = torch.rand(1, 1, 6, 5, device=target.device) < 0.5
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with target.use(), torch.no_grad():
        sites = ActiveSites(mask) if shared else mask
        block(input, sites)  # folds, compiles, and makes what shared sites keep
        monkeypatch.setattr(Launcher, name, launch)
        with Ops():
            block(input, sites, inplace=True)
    convolutions = [kernel for kernel in launched if "conv" in kernel or "depthwise" in kernel]
    compaction = {"_count_kernel", "_compact_kernel"}
    assert len(convolutions) == 3
    assert shared == (launched == convolutions)
    assert set(launched) - set(convolutions) <= compaction
    # Nothing else runs on the device.
    others = {str(op) for op in seen if not str(op).startswith("dynconv")}
    assert others <= {"aten.expand.default", "aten.view.default", "aten.detach.default"}, others


def test_other_inputs_and_norms_are_refused_by_name():
    block, mask = MaskedBasicBlock(8, 8), torch.ones(1, 1, 5, 6, dtype=torch.bool)
    for chosen in (mask, None):
        with pytest.raises(ValueError, match=r"input: expected a tensor \[N, C, H, W\], got shape \[8, 5, 6\]"):
            block(torch.ones(8, 5, 6), chosen)
        with pytest.raises(TypeError, match=r"input: expected a tensor \[N, C, H, W\], got ndarray"):
            block(torch.ones(1, 8, 5, 6).numpy(), chosen)
    for kind in (MaskedBasicBlock, MaskedBottleneck):
        for norm in (nn.GroupNorm, lambda channels: nn.GroupNorm(2, channels), NormAct, nn.InstanceNorm2d):
            with pytest.raises(TypeError, match=r"norm_layer: expected one that makes nn\.BatchNorm2d, .*, got"):
                kind(8 * kind.expansion, 8, norm_layer=norm)
    with pytest.raises(TypeError, match=r"norm_layer: expected .* got GroupNorm"):
        MaskedInvertedResidual(8, 8, 1, 2, lambda channels: nn.GroupNorm(2, channels))
    for block in (MaskedBasicBlock(8, 8, norm_layer=nn.Identity), MaskedInvertedResidual(8, 8, 1, 2, nn.Identity)):
        input = torch.randn(1, 8, 5, 6)
        assert torch.allclose(block(input, mask), block(input), atol=1e-5)


REGISTER = {
    "forward": nn.Module.register_forward_hook,
    "forward pre": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
    "backward pre": nn.Module.register_full_backward_pre_hook,
}
REWRITE = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("way", [*REGISTER, *REWRITE])
@pytest.mark.parametrize("make", [basic, inverted])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_hooks_of_inner_layers_run_or_are_refused(make, way):
    """Of every layer, registered before the conversion or after it: a call runs them, or names the layer."""
    torch.manual_seed(0)
    original = make(4, 4, 1)
    converted = MaskedBlock.from_dense(original)
    for path, layer in original.named_modules():
        if path == "" or (way in REWRITE and not isinstance(layer, nn.Conv2d)):
            continue
        (dense, block), called = copy.deepcopy((original, converted)), []
        layer = dense.get_submodule(path)
        if way in REWRITE:
            REWRITE[way](layer)
        else:
            REGISTER[way](layer, functools.partial(lambda called, *_: called.append(1), called))
        refusal = f"expected a block whose inner layers have no hooks, got the .*hook .* of `{path}`, which would not"
        with pytest.raises(ValueError, match=f"module: {refusal}"):
            MaskedBlock.from_dense(dense)
        for training in (False, True):
            dense.train(training)
            block.train(training)
            input = torch.randn(2, 4, 7, 6, requires_grad=True)
            with pytest.raises(ValueError, match=f"mask: {refusal}"):
                block(input, torch.ones(2, 1, 7, 6, dtype=torch.bool))
            if not isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
                with pytest.raises(ValueError, match=f"mask: {refusal}"):
                    block(input)
                continue
            start, results = copy.deepcopy(dense.state_dict()), []
            for function in (dense, block):
                dense.load_state_dict(start)
                del called[:]
                output = function(input)
                output.sum().backward()
                results.append((output, len(called)))
            (expected, runs), (actual, again) = results
            assert torch.equal(actual, expected) and runs == again == (way in REGISTER)


def test_hooks_of_a_shortcut_run():
    dense = basic(4, 8, 2).eval()
    called = []
    dense.downsample.register_forward_hook(lambda *_: called.append("downsample"))
    dense.downsample[0].register_forward_pre_hook(lambda *_: called.append("convolution"))
    block = MaskedBasicBlock.from_dense(dense)
    assert called == []
    block(torch.randn(1, 4, 6, 6), torch.ones(1, 1, 3, 3, dtype=torch.bool))
    assert called == ["convolution", "downsample"]


@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_layers_compute_their_weight_once_a_call(way):
    """Whichever way the block goes, and with the values of the time: the dense block, also after a step."""
    dense, kind, input = random_block("bottleneck")
    getattr(nn.utils.parametrizations, way)(dense.conv2)
    block, mask = kind.from_dense(dense), masks(dense, input)["random"]
    reads = []
    nn.utils.parametrize.register_parametrization(dense.conv2, "weight", Counted(reads))
    for training in (False, True):
        dense.train(training)
        block.train(training)
        for _ in range(2):
            start = copy.deepcopy(dense.state_dict())
            expected = dense(input)
            dense.load_state_dict(start)
            del reads[:]
            assert torch.allclose(block(input, mask | True), expected, **CLOSE)
            assert len(reads) == 1
            if not training:
                with torch.no_grad():
                    assert torch.allclose(block(input, mask), masked_dense(block, dense, input, mask), **CLOSE)
            block(input, mask).square().sum().backward()
            with torch.no_grad():
                for parameter in dense.parameters():
                    parameter.sub_(parameter.grad, alpha=1e-4)


class Counted(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def forward(self, weight):
        self.reads.append(1)
        return weight


REPLACED = {
    "circular": ("conv1", lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), False),
    "own forward": ("conv2", lambda: type("Scaled", (nn.Conv2d,), {"forward": lambda *_: None})(8, 8, 3), False),
    "several layers": ("conv2", lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), False),
    "group": ("bn1", lambda: nn.GroupNorm(2, 8), False),
    "instance": ("bn2", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), False),
    "no norm": ("bn2", nn.Identity, False),
    "norm and activation": ("bn1", lambda: NormAct(8, nn.ReLU), False),
    "activation": ("relu", nn.GELU, False),
    "masked": ("conv1", lambda: MaskedConv2d(8, 8, 3, padding=1), True),
    "another": ("bn1", lambda: nn.BatchNorm2d(8, eps=0.1), True),
    "parametrized": ("conv2", lambda: weight_norm(nn.Conv2d(8, 8, 3, padding=1)), True),
}


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("case", REPLACED)
def test_a_layer_that_is_replaced_counts_or_is_refused(case, training):
    """What the stages do is that of the layers there were."""
    path, make, is_right = REPLACED[case]
    dense, kind, input = random_block("basic")
    blocks = [kind.from_dense(copy.deepcopy(dense)), MaskedBasicBlock(8, 8).double(), kind.from_dense(dense)]
    layer, mask = make().double(), masks(dense, input)["random"]
    for block in blocks:
        setattr(block, path, layer)
        block.train(training)
        if is_right:
            block(input, mask)
            continue
        for chosen in (mask, None):
            with pytest.raises(ValueError, match=f"block: expected the .* that has been in `{path}`, .* got "):
                block(input, chosen)
    if is_right:
        setattr(dense, path, layer)
        assert torch.allclose(block.eval()(input, mask), masked_dense(block, dense.eval(), input, mask), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kept_chain_takes_any_mask_and_number_of_threads(dtype):
    """What of a chain the mask does not change is made once, and its memory laid out anew at each call."""
    from dynconv.nn.residual import geometry_of
    from dynconv.ops.masked_chain import Layer, chain_of, run_chain
    from dynconv.ops.masked_chain import prepare as prepared

    torch.manual_seed(0)
    for geometry in ((3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), (3, 1, 2, 2), (5, 1, 0, 1), (2, 3, 1, 1)):
        kernel, stride, padding, dilation = geometry
        convs = [
            nn.Conv2d(6, 24, 1),
            nn.Conv2d(24, 24, kernel, stride, padding, dilation, groups=24),
            nn.Conv2d(24, 7, 3, 1, 1),
        ]
        convs = [conv.to(dtype).requires_grad_(False) for conv in convs]
        layers = [
            Layer(c.weight, prepared(c.weight, c.bias, c.groups), geometry_of(c), c.groups, activation)
            for c, activation in zip(convs, ("relu6", "relu", "silu"), strict=True)
        ]
        input = torch.randn(3, 6, 19, 13, dtype=dtype).contiguous(memory_format=torch.channels_last)
        chain, expected = chain_of(input, layers), input
        for conv, activation in zip(convs, (nn.ReLU6(), nn.ReLU(), nn.SiLU()), strict=True):
            expected = activation(conv(expected))
        size, threads = (3, 1, *expected.shape[2:]), torch.get_num_threads()
        try:
            bits = {}
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                for density in (0.0, 0.02, 0.3, 1.0):
                    mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) < density
                    actual = run_chain(chain, input, mask, None, None, False)
                    torch.testing.assert_close(actual, torch.where(mask, expected, 0), rtol=1e-4, atol=1e-4)
                    assert torch.equal(bits.setdefault(density, actual), actual)
                for lone in (0, -1):  # one line, at an edge
                    mask = torch.zeros(size, dtype=torch.bool)
                    mask[lone, 0, lone] = True
                    actual = run_chain(chain, input, mask, None, None, False)
                    torch.testing.assert_close(actual, torch.where(mask, expected, 0), rtol=1e-4, atol=1e-4)
        finally:
            torch.set_num_threads(threads)


class _Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))

    def forward(self, x):
        y = x
        for conv in self.convs[:-1]:
            y = torch.relu(conv(y))
        return torch.relu(self.convs[-1](y) + x)


@pytest.mark.parametrize("depth", [1, 16, 17, 20])
def test_blocks_of_any_depth(depth):
    """The CPU's one kernel has room for sixteen layers; more go one by one."""
    from dynconv.ops.masked_chain import masked_chain

    torch.manual_seed(0)
    block = MaskedBlock.from_dense(_Deep(depth).eval())
    input, mask = torch.randn(2, 4, 9, 9), torch.rand(2, 1, 9, 9) < 0.2
    with torch.no_grad():
        with backend("reference"):
            expected = block(input, mask)
        for way in ("sparse", "dense"):
            with backend("cpu"), execution(way):
                for _ in range(2):
                    assert torch.allclose(block(input, mask), expected, atol=1e-4)
        if depth > 16:
            layers = [layer.layer for layer in block._frozen(input, "cpu")]
            with pytest.raises(ValueError, match=f"layers: expected at most 16 in a chain, got {depth}"):
                masked_chain(input, layers, ActiveSites(mask))
