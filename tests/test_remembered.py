"""Calls that are like an earlier one go straight to their kernels: whatever is other about them must still show."""

import contextlib
import copy
import gc
import threading
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dynconv
from dynconv import ActiveSites, _likeness, backend, calibration, execution, masked_conv2d, prepare
from dynconv.nn import MaskedBasicBlock, MaskedBottleneck, MaskedInvertedResidual, blocks
from dynconv.ops import masked_conv

SIZE = (2, 8, 7, 6)


@pytest.fixture(autouse=True)
def nothing_known():
    masked_conv._passed.clear()
    yield
    masked_conv._passed.clear()
    calibration.forget()


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def channels_last(*shape, seed=0):
    return draw(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def mask_of(density=0.5, seed=0):
    return draw(2, 1, 7, 6, seed=seed).sigmoid() < density


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class Own(torch.Tensor):
    """A subclass that sees what is done with it."""


def outcome(call):
    """What a call gives, or the error that it raises."""
    try:
        result = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return result


def assert_same(actual, expected):
    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected
        return
    if isinstance(expected, FakeTensor):  # which has no values
        assert isinstance(actual, FakeTensor)
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
        return
    assert type(actual) is type(expected) and actual.requires_grad == expected.requires_grad
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


# What may be other about a call: the operands' changes, and what it is made within.
OPERANDS = {
    "the same": lambda o: {},
    "other values": lambda o: {"input": channels_last(*SIZE, seed=5), "mask": mask_of(0.3, seed=6)},
    "not channels_last": lambda o: {"input": draw(*SIZE)},
    "one sample more": lambda o: {"input": channels_last(3, *SIZE[1:])},
    "another width": lambda o: {"input": channels_last(2, 8, 7, 7)},
    "other channels": lambda o: {"input": channels_last(2, 6, 7, 6)},
    "one image": lambda o: {"input": draw(8, 7, 6), "mask": o["mask"][0]},
    "no samples": lambda o: {"input": o["input"][:0], "mask": o["mask"][:0]},
    "double input": lambda o: {"input": o["input"].double()},
    "half all": lambda o: {k: v.bfloat16() for k, v in o.items() if k not in ("mask", "activation")},
    "meta input": lambda o: {"input": o["input"].to("meta")},
    "sparse input": lambda o: {"input": o["input"].to_sparse()},
    "a subclass": lambda o: {"input": o["input"].as_subclass(Own)},
    "negative view": lambda o: {"input": torch._neg_view(o["input"])},
    "an array": lambda o: {"input": o["input"].numpy()},
    "wants a gradient": lambda o: {"input": o["input"].clone().requires_grad_()},
    "an integer mask": lambda o: {"mask": o["mask"].int()},
    "a gate": lambda o: {"mask": o["mask"] * 0.5},
    "sites": lambda o: {"mask": ActiveSites(o["mask"])},
    "sites of a subclass": lambda o: {"mask": Sites(o["mask"])},
    "gated sites": lambda o: {"mask": ActiveSites(o["mask"] * 0.5)},
    "a broadcasting mask": lambda o: {"mask": o["mask"][:1]},
    "a mask in other memory": lambda o: {"mask": o["mask"].transpose(2, 3).contiguous().transpose(2, 3)},
    "a mask of other bytes": lambda o: {"mask": (o["mask"].to(torch.uint8) * 254).view(torch.bool)},
    "a mask without a dimension": lambda o: {"mask": o["mask"][:, 0]},
    "a mask on meta": lambda o: {"mask": o["mask"].to("meta")},
    "no mask": lambda o: {"mask": None},
    "nothing active": lambda o: {"mask": torch.zeros_like(o["mask"])},
    "all active": lambda o: {"mask": torch.ones_like(o["mask"])},
}


def several(*makers):
    @contextlib.contextmanager
    def within():
        with contextlib.ExitStack() as stack:
            for make in makers:
                stack.enter_context(make())
            yield

    return within


class Sites(ActiveSites):
    pass


WITHIN = {
    "nothing": contextlib.nullcontext,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "sparse": lambda: execution("sparse"),
    "dense": lambda: execution("dense"),
    "reference": lambda: backend("reference"),
    "a function mode": Functions,
    "a dispatch mode": Dispatches,
    "a profiler": torch.profiler.profile,
    "forward mode": torch.autograd.forward_ad.dual_level,
    "a default device": lambda: torch.device("meta"),
    "dense on a default device": several(lambda: execution("dense"), lambda: torch.device("meta")),
    "fake tensors": FakeTensorMode,
    "fake tensors beside others": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}
OF_LAYERS = {
    "a double weight": lambda o: {"weight": o["weight"].double()},
    "fewer inputs": lambda o: {"weight": o["weight"][:, :4]},
    "more filters": lambda o: {"weight": draw(10, 8, 3, 3)},
    "no bias": lambda o: {"bias": None},
    "a long bias": lambda o: {"bias": draw(7)},
    "stride 2": lambda o: {"stride": 2},
    "stride 1.0": lambda o: {"stride": 1.0},
    "padding True": lambda o: {"padding": True},
    "padding in a list": lambda o: {"padding": [1, 1]},
    "padding by name": lambda o: {"padding": "same"},
    "groups 2": lambda o: {"groups": 2},
    "no activation": lambda o: {"activation": None},
    "a wrong activation": lambda o: {"activation": "tanh"},
    "an activation's list": lambda o: {"activation": ["relu"]},
    "a residual": lambda o: {"residual": channels_last(2, 6, 7, 6, seed=8)},
    "a broadcasting residual": lambda o: {"residual": draw(6, 1, 1, seed=8)},
    "a wrong residual": lambda o: {"residual": draw(2, 5, 7, 6)},
    "inactive": lambda o: {"inactive": channels_last(2, 6, 7, 6, seed=9)},
    "both": lambda o: dict.fromkeys(("residual", "inactive"), channels_last(2, 6, 7, 6, seed=9)),
    "a number": lambda o: {"inactive": 0.5},
    "packed": lambda o: {"packed": True},
    "out": lambda o: {"out": channels_last(2, 6, 7, 6, seed=9)},
    "input as residual": lambda o: {"weight": draw(8, 8, 3, 3), "bias": None, "residual": o["input"]},
}


def layer_call(changes=()):
    operands = {
        "input": channels_last(*SIZE), "weight": draw(6, 8, 3, 3), "bias": draw(6), "padding": 1, "mask": mask_of(),
        "activation": "relu",
    }  # fmt: skip
    operands.update(changes(operands) if changes else {})
    result = masked_conv2d(**operands)
    return result.rows if isinstance(result, dynconv.PackedFeatures) else result


def remember(run, **options):
    """Call until that is remembered, in each way that it may go; a block with operands, or what takes none."""
    given = (channels_last(*SIZE), mask_of()) if isinstance(run, nn.Module) else ()
    with torch.no_grad():
        for mode in ("automatic", "sparse", "dense"):
            with execution(mode):
                run(*given, **options)


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("change", [*OPERANDS, *OF_LAYERS])
def test_a_layer_like_an_earlier_one(change, within):
    if within != "nothing" and change in OF_LAYERS:
        within = "sparse"  # one of the two is enough
    change, weight = {**OPERANDS, **OF_LAYERS}[change], draw(6, 8, 3, 3)

    def call(changes=lambda o: {}):
        made = {"weight": weight}
        return layer_call(lambda o: made | changes(o | made))

    def changed():
        with torch.no_grad(), WITHIN[within]():
            return outcome(lambda: call(change))

    remember(call)
    actual = changed()
    masked_conv._passed.clear()
    assert_same(actual, changed())


@pytest.mark.parametrize("shared", [False, True], ids=["mask", "sites"])
@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual", "inactive"])
def test_a_layer_trains_after_inference(name, before, shared):
    """A call without gradients is no call with them, though its operands are the very same."""
    mask = ActiveSites(mask_of()) if shared else mask_of()
    operands = {
        "input": channels_last(*SIZE), "weight": draw(6, 8, 3, 3), "bias": draw(6),
        "residual": channels_last(2, 6, 7, 6, seed=8), "inactive": channels_last(2, 6, 7, 6, seed=9),
    }  # fmt: skip
    operands[name].requires_grad_()
    call = lambda: masked_conv2d(**operands, padding=1, mask=mask)
    with before():
        expected = [call().clone() for _ in range(3)][-1]
    actual = call()
    assert actual.requires_grad and torch.allclose(actual, expected, atol=1e-5)
    gradient = torch.autograd.grad(actual.sum(), operands[name])[0]
    conv = F.conv2d(operands["input"], operands["weight"], operands["bias"], padding=1) + operands["residual"]
    dense = torch.where(mask_of(), conv, operands["inactive"])
    assert torch.allclose(gradient, torch.autograd.grad(dense.sum(), operands[name])[0], atol=1e-4)


def test_layers_are_remembered_and_differ_by_their_weights(monkeypatch):
    """The second call of a kind is not checked any more; eight kinds of each weight are kept, the newest ones."""
    checked, right = [], masked_conv.check_convolution
    monkeypatch.setattr(masked_conv, "check_convolution", lambda *a: checked.append(1) or right(*a))
    weight, mask = draw(6, 8, 3, 3), mask_of()
    inputs = [channels_last(2, 8, 5 + n, 6, seed=n) for n in range(10)]
    masks = [draw(2, 1, 5 + n, 6, seed=n) > 0 for n in range(10)]
    with torch.no_grad(), execution("sparse"):
        for _ in range(3):
            masked_conv2d(channels_last(*SIZE), weight, padding=1, mask=mask)
        assert len(checked) == 1
        for input, mask in zip(inputs, masks, strict=True):
            actual = masked_conv2d(input, weight, padding=1, mask=mask)
            assert torch.allclose(actual, torch.where(mask, F.conv2d(input, weight, padding=1), 0), atol=1e-4)
        assert len(masked_conv._passed[id(weight)]) == masked_conv._MOST_CALLS
        del checked[:]
        masked_conv2d(inputs[-1], weight, padding=1, mask=masks[-1])
        assert not checked
        masked_conv2d(inputs[0], weight, padding=1, mask=masks[0])
        assert checked
        monkeypatch.setattr(masked_conv, "_MOST_WEIGHTS", 3)
        for _ in range(9):
            masked_conv2d(inputs[0], weight.clone(), padding=1, mask=masks[0])
            assert len(masked_conv._passed) <= 3


def block_of(kind):
    torch.manual_seed(0)
    if kind == "inverted":
        block = MaskedInvertedResidual(8, 8, 1, 2)
    elif kind == "projected":
        block = MaskedBottleneck(8, 3, downsample=nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)))
    else:
        block = MaskedBasicBlock(8, 8)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 2)
    return block.eval()


def block_outcome(block, changes, within, **options):
    operands = {"input": channels_last(*SIZE), "mask": mask_of()}
    operands |= changes(operands)
    with torch.no_grad(), WITHIN[within]():
        return outcome(lambda: block(operands["input"].clone(), operands["mask"], **options))


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("change", [name for name in OPERANDS if name not in ("an array", "half all", "a subclass")])
def test_a_block_like_an_earlier_one(change, within):
    for kind, is_prepared, inplace in (("basic", False, False), ("projected", True, False), ("inverted", True, True)):
        block = block_of(kind)
        if is_prepared:
            prepare(block)
        remember(block, inplace=inplace)
        actual = block_outcome(block, OPERANDS[change], within, inplace=inplace)
        expected = block_outcome(copy.deepcopy(block), OPERANDS[change], within, inplace=inplace)
        assert_same(actual, expected)


def without_relu(block):
    block.relu = nn.Tanh()


def own_forward(block):
    block.conv1.forward = lambda x: x


def shared(block):
    """One convolution in both places."""
    block.conv2 = block.conv1


def computed_weight(block):
    """A weight that is no parameter, and then another one."""
    weight = block.conv1.weight.detach()
    del block.conv1.weight
    block.conv1.weight = weight
    remember(block)
    block.conv1.weight = weight * 2


def computed_bias(block):
    block.conv1.bias = nn.Parameter(torch.ones(block.conv1.out_channels))
    remember(block)
    del block.conv1.bias
    block.conv1.bias = torch.full((block.conv1.out_channels,), 3.0)


def weight_norm_written_to(block):
    parametrizations.weight_norm(block.conv1)
    block.eval()
    remember(block)
    with torch.no_grad():
        block.conv1.parametrizations.weight.original0.mul_(3)


class Gained(nn.Conv2d):
    """A weight that is computed when it is read."""

    gain = 1.0

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value * self.gain if name == "weight" else value


def gained(block):
    block.conv1.__class__ = Gained
    block._note_layers()
    remember(block)
    block.conv1.gain = 2.0


def padding_in_a_list(block):
    conv = block.conv1
    conv.padding, conv.dilation = list(conv.padding), list(conv.dilation)
    remember(block)
    if conv.kernel_size == (3, 3):
        conv.padding[:] = conv.dilation[:] = [2, 2]


def hooks_removed_and_another(block):
    for module in block.modules():
        module._forward_hooks = OrderedDict()
    block.conv1.register_forward_hook(lambda *_: None)


STATES = {  # what may become other about the block itself
    "a hook": lambda b: b.conv1.register_forward_hook(lambda *_: None),
    "a pre-hook": lambda b: b.bn1.register_forward_pre_hook(lambda *_: None),
    "a hook of the shortcut": lambda b: b.downsample[0].register_forward_hook(lambda m, i, o: o * 2),
    "hooks removed, and another": hooks_removed_and_another,
    "a shadowed weight": lambda b: object.__setattr__(b.conv1, "weight", b.conv1.weight.detach() * 2),
    "a weight that is computed": computed_weight,
    "a bias that is computed": computed_bias,
    "a weight that is read otherwise": gained,
    "other parameters": lambda b: b.conv1.__dict__.update(
        _parameters=copy.deepcopy(block_of("basic").conv1._parameters)
    ),
    "a part of weight norm": weight_norm_written_to,
    "padding in a list": padding_in_a_list,
    "a shortcut's weight": lambda b: b.downsample[0].weight.data.mul_(2),
    "another shortcut": lambda b: setattr(b, "downsample", nn.Conv2d(8, 12, 1)),
    "weight norm": lambda b: parametrizations.weight_norm(b.conv2),
    "another activation": without_relu,
    "another forward": own_forward,
    "a shared convolution": shared,
    "another stride": lambda b: setattr(b.conv2, "stride", (2, 2)),
    "padding of reflections": lambda b: setattr(b.conv2, "padding_mode", "reflect"),
    "training": lambda b: b.train(),
    "training of one": lambda b: b.bn1.train(),
    "no statistics": lambda b: setattr(b.bn1, "running_mean", None),
    "eps": lambda b: setattr(b.bn2, "eps", 3.0),
    "double": lambda b: b.double(),
    "a bias": lambda b: setattr(b.conv1, "bias", nn.Parameter(torch.ones(b.conv1.out_channels))),
}


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_a_block_that_is_another(state, is_prepared):
    for kind in ("projected", "basic"):
        if "shortcut" in state and kind == "basic":
            continue
        block = block_of(kind)
        if is_prepared:
            prepare(block)
        remember(block)
        STATES[state](block)
        expected = block_outcome(copy.deepcopy(block), OPERANDS["the same"], "sparse")
        assert_same(block_outcome(block, OPERANDS["the same"], "sparse"), expected)


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["basic", "projected", "inverted"])
def test_a_block_trains_after_inference(kind, before):
    block, input, mask = block_of(kind), channels_last(*SIZE), mask_of()
    with before():
        for _ in range(3):
            block(input, mask)
    result = block(input, mask)
    assert result.requires_grad
    wanted = [parameter for parameter in block.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(result.sum(), wanted, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_blocks_are_remembered(monkeypatch, is_prepared):
    """The second call of a kind, of any of its masks' values, is not looked at any more; eight kinds are kept."""
    entered, right = [], blocks.MaskedBlock._forward
    monkeypatch.setattr(blocks.MaskedBlock, "_forward", lambda self, *a: entered.append(1) or right(self, *a))
    block = block_of("basic")
    if is_prepared:
        prepare(block)
    with torch.no_grad():
        for number in range(4):
            input, mask = channels_last(*SIZE, seed=number), mask_of((0, 0.3, 0.6, 1)[number], seed=number)
            with backend("reference"):
                expected = block(input, mask)
            del entered[:]
            for way in ("sparse", "dense"):
                with execution(way):
                    assert torch.allclose(block(input, mask), expected, atol=1e-4)
            assert len(entered) == (2 if number == 0 else 0)
        for height in range(4, 16):
            block(channels_last(1, 8, height, 6), draw(1, 1, height, 6) > 0)
        assert len(block._kept.passed) == blocks._MOST_CALLS
        block.train()
        assert block._kept is None


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_sizes_in_any_form(name):
    """What stands for an int; the caller's own list, which may change, is no part of what is remembered."""
    given, input, weight = [1, 1], channels_last(*SIZE), draw(6, 8, 3, 3)
    options = {"padding": 2} if name == "dilation" else {}
    with torch.no_grad():
        for values in ([1, 1], [2, 2], [1, 1]):
            given[:] = values
            options[name] = given
            with backend("reference"):
                size = F.conv2d(input, weight, **{**options, name: tuple(values)}).shape
                mask = draw(2, 1, *size[2:]) > 0
                expected = masked_conv2d(input, weight, mask=mask, **options)
            numbers = np.int64(values[0]), torch.tensor(values[0])
            for form in (given, tuple(values), values[0], *numbers, [numbers[0]], (numbers[1],) * 2, given):
                actual = masked_conv2d(input, weight, mask=mask, **{**options, name: form})
                assert torch.allclose(actual, expected, atol=1e-4)


def test_a_block_that_is_dropped_is_freed():
    for is_prepared in (False, True):
        block = block_of("basic")
        if is_prepared:
            prepare(block)
        remember(block)
        assert block._kept.passed
        gone = weakref.ref(block)
        gc.disable()
        try:
            del block
            assert gone() is None
        finally:
            gc.enable()


def test_a_write_between_the_fold_and_what_is_remembered_of_it(monkeypatch):
    block, remembers = block_of("basic"), blocks.MaskedBlock._remember
    operands = channels_last(*SIZE), mask_of()

    def late(self, *arguments):
        self.conv1.weight.mul_(3.0)
        remembers(self, *arguments)

    with torch.no_grad():
        with dynconv.explain():  # folded, and not remembered
            block(*operands)
        monkeypatch.setattr(blocks.MaskedBlock, "_remember", late)
        block(*operands)
        monkeypatch.undo()
        assert torch.equal(block(*operands), copy.deepcopy(block)(*operands))


def test_a_replica_computes_with_its_own_layers():
    block, operands = block_of("basic"), (channels_last(*SIZE), mask_of())
    remember(block)
    replica = block._replicate_for_data_parallel()
    replica.conv1 = block_of("basic").conv2
    with torch.no_grad():
        actual = replica(*operands)
        with backend("reference"):
            assert torch.allclose(actual, replica(*operands), atol=1e-4)


class Negative(nn.Module):
    def forward(self, input):
        return torch._neg_view(input.clone(memory_format=torch.preserve_format))


def test_a_shortcut_that_makes_no_plain_tensor():
    torch.manual_seed(0)
    block = MaskedBasicBlock(8, 8, downsample=Negative()).eval()
    operands = channels_last(*SIZE), mask_of()
    with torch.no_grad(), execution("sparse"):
        first = block(*operands)
        assert torch.equal(block(*operands), first)
        with backend("reference"):
            assert torch.allclose(first, block(*operands), atol=1e-4)


@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_a_graph_notices_what_is_overwritten(way):
    block, mask = block_of("basic"), mask_of()
    for _ in range(2):  # remembered the second time
        input, weight = channels_last(*SIZE), torch.ones(1, requires_grad=True)
        loss = (input * weight).sum()
        with torch.no_grad(), execution(way):
            block(input, mask, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_is_remembered_without_pytorchs_guards(monkeypatch):
    assert _likeness.TensorGuards is not None  # with the PyTorch that this runs on
    monkeypatch.setattr(_likeness, "TensorGuards", None)
    block = block_of("basic")
    remember(layer_call)
    remember(block)
    assert not masked_conv._passed and not block._kept.passed


def test_threads_share_what_is_remembered():
    """One block and one weight, several sizes, four threads: each gets what its own operands make."""
    block, weight, faults = prepare(block_of("basic")), draw(8, 8, 3, 3), []
    with torch.no_grad():
        cases = []
        for height in range(4, 14):
            input, mask = channels_last(1, 8, height, 6, seed=height), draw(1, 1, height, 6, seed=height) > 0
            with backend("reference"):
                cases.append((input, mask, block(input, mask), masked_conv2d(input, weight, padding=1, mask=mask)))

    def run(seed):
        with torch.no_grad():
            for turn in range(60):
                input, mask, of_block, of_layer = cases[(turn * (seed + 1)) % len(cases)]
                with execution(("sparse", "dense")[turn // 7 % 2]):
                    if not torch.allclose(block(input, mask), of_block, atol=1e-4):
                        faults.append(("block", turn))
                    if not torch.allclose(masked_conv2d(input, weight, padding=1, mask=mask), of_layer, atol=1e-4):
                        faults.append(("layer", turn))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
