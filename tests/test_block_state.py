"""What blocks keep between calls, and what they keep of a batch: parameters, statistics, types under autocast."""

import copy
from threading import Event, Thread

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dynconv import ActiveSites, backend, execution, prepare
from dynconv.nn import GatheredBlock, GatheredBottleneck, MaskedBlock, MaskedBottleneck

# Of random numbers in float64: sums of fewer than 300 products of a few units, then normalised.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
INPUT = torch.randn(2, 12, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MASK = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(4)) < 0.5
CHANNELS = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)


def block_of(kind):
    torch.manual_seed(0)
    block = kind(12, 3).double()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return block.eval()


KINDS = {"masked": MaskedBottleneck, "gathered": GatheredBottleneck}


def run(block):
    """Run a block in inference by both of its ways; each must use the parameters as they are at the call."""
    mask = CHANNELS if isinstance(block, GatheredBottleneck) else MASK
    results = []
    for way in ("sparse", "dense"):
        with execution(way):
            results.append(block(INPUT.to(block.conv1.weight.dtype), mask))
    return torch.stack(results)


def in_training(has_mask, statistics="active"):
    """Passes in training move the running statistics."""

    def passes(block):
        block.statistics = statistics
        second = CHANNELS if isinstance(block, GatheredBottleneck) else MASK
        block.train()(3 * INPUT + 1, second if has_mask else None)
        block.eval()

    return passes


def frozen_but_one(block):
    block.bn2.train()
    block(3 * INPUT + 1)
    block.eval()


def step(optimizer, **options):
    def stepped(block):
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(block.parameters(), lr=0.1, **options).step()

    return stepped


def exchange(block):
    """The same numbers elsewhere."""
    weight, bias = block.bn1.weight.data.clone(), block.bn1.bias.data.clone()
    block.bn1.weight.data.copy_(bias)
    block.bn1.bias.data.copy_(weight)


def one_bit(block):
    block.conv2.weight.data.view(-1).view(torch.int64)[17] ^= 1 << 62


def average(block):
    """An exponential moving average, written by hand."""
    other = block_of(type(block))
    for mine, theirs in zip(block.parameters(), other.parameters()):
        mine.data.mul_(0.5).add_(theirs.data, alpha=0.1)


def assign(block):
    state = {name: value * 1.5 for name, value in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


def replace_data(block):
    block.conv3.weight.data = block.conv3.weight.data * 2


def replace_module(block):
    block.conv2 = nn.Conv2d(3, 3, 3, padding=1).double()


def transpose_memory(block):
    """The same bytes in another order: what changes is the strides alone."""
    block.conv2.weight.data = block.conv2.weight.data.transpose(0, 1)


def batch_norm_function(block):
    F.batch_norm(INPUT[:, :3] + 5, block.bn1.running_mean, block.bn1.running_var, training=True)


COUNTED = {  # what PyTorch counts, or what gives a parameter another address
    "in place": lambda b: b.conv1.weight.mul_(-1),
    "in place, a statistic": lambda b: b.bn2.running_var.mul_(2),
    "all at once": lambda b: torch._foreach_mul_(list(b.parameters()), 1.5),
    "load_state_dict": lambda b: b.load_state_dict({k: v * 1.5 for k, v in b.state_dict().items()}),
    "load_state_dict, assign": assign,
    "data = other": replace_data,
    "data = the same, transposed": transpose_memory,
    "another module": replace_module,
    "another type": lambda b: b.float(),
    "there and back": lambda b: b.float().double(),
    "eps": lambda b: setattr(b.bn1, "eps", 0.5),
    "reset_running_stats": lambda b: b.bn3.reset_running_stats(),
    "no weight": lambda b: setattr(b.bn2, "weight", None),
    "training without a mask": in_training(False),
    "training with a mask": in_training(True),
    "training with dense statistics": in_training(True, "dense"),
    "training of one normalisation": frozen_but_one,
    **{
        f"{optimizer.__name__}{' foreach' * foreach}": step(optimizer, foreach=foreach)
        for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
        for foreach in (False, True)
    },
}
UNCOUNTED = {
    "data.copy_": lambda b: b.conv1.weight.data.copy_(torch.ones_like(b.conv1.weight)),
    "a view of data": lambda b: b.conv2.weight.data.view(-1)[5:6].fill_(9),
    "data.neg_": lambda b: b.conv2.weight.data.neg_(),
    "data.clamp_": lambda b: b.conv3.weight.data.clamp_(-0.1, 0.1),
    "data of a statistic": lambda b: b.bn2.running_mean.data.add_(1),
    "detach().numpy()": lambda b: b.bn1.weight.detach().numpy().__setitem__(1, 7),
    "numpy view kept": lambda b: b.conv1.weight.data.numpy().__imul__(2),
    "pruning by a mask": lambda b: b.conv3.weight.data.mul_(torch.rand(12, 3, 1, 1) < 0.5),
    "moving average": average,
    "exchange": exchange,
    "one bit": one_bit,
    "F.batch_norm": batch_norm_function,
    **{
        f"{optimizer.__name__} fused": step(optimizer, fused=True)
        for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    },
}


@pytest.mark.parametrize("way", [*UNCOUNTED, *COUNTED])
@pytest.mark.parametrize("kind", KINDS)
def test_no_write_is_missed(kind, way):
    """Before and after each way of changing a block, its result is that of its parameters at that moment."""
    for is_prepared in (False, True) if way in COUNTED else (False,):
        block = block_of(KINDS[kind])
        with torch.no_grad():
            if is_prepared:
                prepare(block)
            before = run(block)
            assert torch.equal(run(block), before)
            {**UNCOUNTED, **COUNTED}[way](block)
            actual = run(block)
            with backend("reference"):  # folds at each call
                expected = run(block)
        close = CLOSE if expected.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        assert torch.allclose(actual, expected, **close)
        # Each way makes a difference, but for the two that round to float32.
        assert way in ("another type", "there and back") or not torch.allclose(before, actual, **CLOSE)


def test_the_same_parameters_are_folded_once():
    """By a write that changes no value neither is thrown away; in training, nothing is kept."""
    block = block_of(MaskedBottleneck)
    with torch.no_grad():
        layers = block._frozen(INPUT, "cpu")
        assert block._frozen(INPUT, "cpu") is layers
        block.bn1.momentum = 0.5
        block.conv1.weight.data.copy_(block.conv1.weight.data.clone())
        assert block._frozen(INPUT, "cpu") is layers
        with execution("sparse"):
            block(INPUT, MASK)
        # One form of the parameters, that of the way that was taken.
        assert all("sparse" in vars(layer) and "dense" not in vars(layer) for layer in layers)
        prepare(block)
        layers = block._frozen(INPUT, "cpu")
        assert block._frozen(INPUT, "cpu") is layers
        assert copy.deepcopy(block)._kept is None
        block.conv1.weight.data.mul_(2)
        assert block._frozen(INPUT, "cpu") is layers  # as documented: what PyTorch does not count
        assert prepare(block)._frozen(INPUT, "cpu") is not layers
        block.train().eval()
        assert not block._is_prepared and block._kept is None
        with torch.inference_mode():  # parameters without a version
            inside = prepare(block_of(MaskedBottleneck))
            before = run(inside)
            inside.conv1.weight.mul_(2)
            assert not torch.allclose(run(inside), before)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3, TypeError, "model: expected an nn.Module, got int"),
        (nn.Conv2d(1, 1, 1), ValueError, "model: expected a masked or gathered block of dynconv.nn in it, got Conv2d"),
        (MaskedBottleneck(12, 3), ValueError, "model: expected blocks in eval mode"),
    ],
)
def test_what_cannot_be_prepared_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        prepare(model)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 3),
    st.data(),
)
def test_every_bit_is_in_the_fingerprint(sizes, dtype, threads, data):
    from dynconv.cpu.fingerprint import fingerprint

    tensors = [torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in sizes]
    before = fingerprint(tensors)
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert fingerprint([t.clone() for t in tensors]) == before
        values = data.draw(st.sampled_from(tensors)).view(torch.uint8)
        if len(values):
            byte, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 7))
            values[byte] ^= 1 << bit
            assert fingerprint(tensors) != before
            values[byte] ^= 1 << bit
            assert fingerprint(tensors) == before
            again = data.draw(st.integers(0, len(values) - 1))
            if values[again] != values[byte]:
                values[[byte, again]] = values[[again, byte]]
                assert fingerprint(tensors) != before
    finally:
        torch.set_num_threads(used)


def test_a_fingerprint_of_gaps():
    """Memory that is not dense is read by its elements."""
    from dynconv.cpu.fingerprint import fingerprint

    wide = torch.randn(8, 6, 3, 3)
    tensor = wide[:, ::2]
    before = fingerprint([tensor])
    wide[:, 1::2] = 5
    assert fingerprint([tensor]) == before
    tensor[7, 2, 2, 2] += 1
    assert fingerprint([tensor]) != before


class Plain(nn.Module):
    """Without normalisation, so that nothing is folded."""

    def __init__(self, *_):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, input):
        return self.conv2(self.conv1(input).relu()) + input


@pytest.mark.parametrize("way", ("sparse", "dense"))
@pytest.mark.parametrize("is_prepared", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_parameters_that_were_replaced_by_equal_ones_are_let_go(kind, is_prepared, way):
    """As by `torch.func.functional_call` with an average that goes on moving."""
    block = (MaskedBlock if kind == "masked" else GatheredBlock).from_dense(Plain().double()).eval()
    if is_prepared:
        prepare(block)
    with execution(way):
        before = block(INPUT, CHANNELS if kind == "gathered" else MASK)
        for conv in (block.conv1, block.conv2):
            for name, old in list(conv.named_parameters()):
                setattr(conv, name, nn.Parameter(old.clone()))
                old.mul_(3)
        assert torch.equal(block(INPUT, CHANNELS if kind == "gathered" else MASK), before)


def projecting(kind):
    """A block whose shortcut has layers, and of which each training step moves these alone."""
    shortcut = nn.Sequential(nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12))
    block = kind(12, 3, downsample=shortcut).double().eval().requires_grad_(False)
    shortcut.requires_grad_(True)
    return block


@pytest.mark.parametrize("way", ("sparse", "dense"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_shortcut_is_trained_beside_frozen_convolutions(kind, way):
    block = projecting(KINDS[kind])
    chosen = torch.ones(2, 3, dtype=torch.bool) if kind == "gathered" else MASK
    with execution(way):
        have = torch.autograd.grad(block(INPUT, chosen).square().sum(), [*block.downsample.parameters()])
    expected = torch.where(MASK if kind == "masked" else ~MASK | MASK, block(INPUT), block.downsample(INPUT))
    want = torch.autograd.grad(expected.square().sum(), [*block.downsample.parameters()])
    for a, b in zip(have, want, strict=True):
        assert torch.allclose(a, b, **CLOSE)


@pytest.mark.parametrize("part", ("conv1", "bn2", "all"))
def test_parameters_on_another_device_are_refused(part):
    """Rather than read at an address that is none of this one."""
    block = block_of(MaskedBottleneck).requires_grad_(False)
    (block if part == "all" else getattr(block, part)).to("meta")
    with pytest.raises((ValueError, RuntimeError), match=r"meta|device"):
        block(INPUT, MASK)


@pytest.mark.parametrize("mode", ("sparse", "dense", "batch statistics"))
@pytest.mark.parametrize("shape", ((1, 6, 5), (2, 1, 5), (2, 6, 6)))
@pytest.mark.parametrize("kind", KINDS)
def test_sites_of_another_shape_are_refused_on_every_way(kind, shape, mode):
    """Rather than broadcast, which a mask that is a tensor does and sites, which are indices, do not."""
    block = block_of(KINDS[kind]).requires_grad_(False)
    block.statistics = "dense"
    block.train(mode == "batch statistics")
    sites = ActiveSites(torch.ones(shape, dtype=torch.bool)[:, None])
    with (
        execution(mode if mode != "batch statistics" else "automatic"),
        pytest.raises(ValueError, match=r"mask: expected sites of \[2, 6, 5\]"),
    ):
        block(INPUT, *([CHANNELS] if kind == "gathered" else []), mask=sites)


def test_threads_do_not_share_computed_weights():
    """One that infers leaves no weight without a gradient, or of a moment ago, to another one that trains."""
    block = block_of(MaskedBottleneck)
    weight_norm(block.conv2)
    size, gradients, begun, ended = block.conv2.parametrizations.weight.original0, [], Event(), Event()

    def infer():
        with torch.no_grad():
            while not ended.is_set():
                block(INPUT, MASK)
                begun.set()

    threads = [Thread(target=infer) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(60)
        for _ in range(20):
            gradients += torch.autograd.grad(block(INPUT, MASK).sum(), size, allow_unused=True)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert all(gradient is not None and torch.allclose(gradient, gradients[0]) for gradient in gradients)
