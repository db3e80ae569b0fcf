"""How many kernels an op launches on a GPU: beside layers of 10 to 30 us each launch takes its 2 to 5.

Counted where there is no GPU as well: Triton's launches in its interpreter, PyTorch's by what it dispatches.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dynconv
from dynconv import (
    ActiveChannels,
    ActiveSites,
    _backend,
    backend,
    channels,
    gathered_conv2d,
    kernels,
    masked_conv2d,
    sites,
)
from dynconv.nn import MaskedBottleneck
from dynconv.ops import gathered_conv, masked_conv

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What hands out memory, or another view of it.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "contiguous", "detach", "empty", "empty_like",
    "empty_strided", "expand", "flatten", "new_empty", "new_empty_strided", "permute", "promote_types", "reshape",
    "select", "slice", "split", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip
# On a CPU a count is at hand, and some ways look at it.
WAITS = {"_local_scalar_dense", "all", "equal", "max", "nonzero"}
# Of an op of this package, what it is made of counts.
OPS = {
    "compact": sites._compact, "inverse_map": sites._inverse_map, "touched": sites._touched,
    "active_set": sites._active_set, "touched_set": sites._touched_set,
    "compact_channels": channels._compact,
    "masked_conv2d": masked_conv._forward, "masked_conv2d_backward": masked_conv._backward,
    "gathered_conv2d": gathered_conv._forward, "gathered_conv2d_backward": gathered_conv._backward,
}  # fmt: skip


class Launches(TorchDispatchMode):
    """The names of what is launched, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        name = function._schema.name.partition("::")[2]
        if function.namespace == "dynconv":
            with self:
                return OPS[name](*arguments, **(keywords or {}))
        if name in WAITS:
            assert DEVICE == "cpu", f"{name} waits for the device"
            return function(*arguments, **(keywords or {}))
        result = function(*arguments, **(keywords or {}))
        copies = name in ("contiguous", "flatten", "reshape") and result.data_ptr() != arguments[0].data_ptr()
        if name not in FREE or copies:
            self.names.append(name)
        return result


@pytest.fixture
def count(monkeypatch):
    """count(call): the names of what it launches."""
    seen = Launches()

    def watch(kind, method):
        run = getattr(kind, method)

        def launch(self, *arguments, **keywords):
            seen.names.append((getattr(self, "fn", None) or self).__name__.strip("_"))
            with _disable_current_modes():
                return run(self, *arguments, **keywords)

        monkeypatch.setattr(kind, method, launch)

    if DEVICE == "cuda":
        from triton.runtime.jit import JITFunction

        watch(JITFunction, "run")
    else:
        from triton.runtime.interpreter import GridExecutor

        watch(GridExecutor, "__call__")
    # The way of a call that nobody watches, which this mode would keep it from.
    monkeypatch.setattr(_backend, "_len_torch_dispatch_stack", lambda: 0)

    def count(call):
        seen.names.clear()
        with backend("triton"), seen:
            call()
        return list(seen.names)

    return count


def operand(*shape, grad=False):
    made = torch.randn(*shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return made.requires_grad_(grad)


X, WEIGHT = (2, 16, 8, 8), (16, 16, 3, 3)


def mask():
    return torch.rand(2, 1, 8, 8, device=DEVICE) < 0.4


def kept():
    return torch.rand(2, 16, device=DEVICE) < 0.5


CONV, GATHERED, FILL = "masked_conv_kernel", "gathered_conv_kernel", "fill_skipped_kernel"
CHANNELS = ["compact_channels_kernel"] * 2


@pytest.fixture(params=["small", "large"])
def compact(request, monkeypatch):
    """What lists the sites of a small mask, and of one whose blocks are too many to be counted by each program."""
    if request.param == "small":
        return ["compact_kernel"]
    monkeypatch.setattr(kernels.compaction, "SELF_COUNTED", 0)
    monkeypatch.setattr(kernels.compaction, "SELF_COUNTED_BY_STRIDES", 0)
    return ["count_kernel", "compact_kernel"]


def test_masked(count, compact):
    """What stands at the skipped sites is written in the launch that lists the active ones, if there is one."""
    x, w, cold, out = operand(*X), operand(*WEIGHT), mask(), operand(*X)
    call = lambda mask, **more: count(lambda: masked_conv2d(x, w, padding=1, mask=mask, **more))
    with torch.no_grad():
        with backend("triton"):
            shared = ActiveSites(cold)
        assert call(cold) == call(cold, inactive=out) == [*compact, CONV]
        assert call(cold, out=out) == call(cold, packed=True) == [*compact, CONV]
        # A gate, and a mask that broadcasts, are read as they are; the sites' own mask is made beside the list.
        for other in (cold.float(), cold[:, :, :1]):
            assert call(other) == [*compact, FILL, CONV]
        assert call(shared) == [FILL, CONV]
        assert call(shared, out=out) == call(shared, packed=True) == [CONV]


def test_sites(count, compact):
    """The pixels that sites read are found while they are listed."""
    with torch.no_grad():
        for given in (mask(), mask().float(), mask()[:, :, :, ::2]):
            size = given.shape[2:]
            assert count(lambda: ActiveSites(given)) == compact  # noqa: B023
            assert count(lambda: ActiveSites(given).touched(size, 3, 1, 1).inverse) == compact * 2  # noqa: B023


def test_masked_of_few_tiles(count):
    """Long sums are split between programs, and added up."""
    x, w, cold = operand(1, 256, 4, 4), operand(16, 256, 3, 3), torch.rand(1, 1, 4, 4, device=DEVICE) < 0.4
    with torch.no_grad():
        shared = ActiveSites(cold)
        count(lambda: shared.index)
        call = lambda: masked_conv2d(x, w, padding=1, mask=shared)
        assert count(call) == ["fill_skipped_kernel", "masked_conv_kernel", "add_splits_kernel"]


def test_gathered(count):
    x, w, ins, outs = operand(*X), operand(*WEIGHT), kept(), kept()
    call = lambda **more: count(lambda: gathered_conv2d(x, w, padding=1, **more))
    with torch.no_grad():
        assert call(in_mask=ins, out_mask=outs) == call(in_mask=ins) == [*CHANNELS, GATHERED]
        with backend("triton"):
            sets = dict(in_mask=ActiveChannels(ins), out_mask=ActiveChannels(outs))
        assert call(**sets) == call(**sets, packed=True) == [GATHERED]
        assert call(**sets, residual=x, activation="relu") == [GATHERED]


def gradients(count, op, *masks):
    x, w, grad = operand(*X, grad=True), operand(*WEIGHT, grad=True), operand(*X)
    return count(lambda: torch.autograd.grad(op(x, w, *masks), (x, w), grad))


def test_masked_forward_and_backward(count, compact):
    """The weight is transposed for its product with float32; the sums of wgrad are added up."""
    product = ["contiguous", CONV, "weight_grad_kernel", "reduce_weight_grad_kernel"]
    op = lambda x, w, m: masked_conv2d(x, w, padding=1, mask=m)
    assert gradients(count, op, mask()) == [*compact, FILL, CONV, *compact, *product]
    with backend("triton"):
        shared = ActiveSites(mask())
        shared.touched((8, 8), 3, 1, 1)
    assert gradients(count, op, shared) == [FILL, CONV, "zeros_like", *product]


def test_gathered_forward_and_backward(count):
    op = lambda x, w, ins, outs: gathered_conv2d(x, w, padding=1, in_mask=ins, out_mask=outs)
    weight_grad = ["channel_places_kernel"] * 2 + ["gathered_weight_grad_kernel", "reduce_gathered_weight_grad_kernel"]
    expected = [GATHERED, "contiguous", GATHERED, "zeros", *weight_grad, "copy_"]
    assert gradients(count, op, kept(), kept()) == [*CHANNELS, *expected]
    with backend("triton"):
        sets = ActiveChannels(kept()), ActiveChannels(kept())
    assert gradients(count, op, *sets) == expected


def test_a_block_in_inference(count, compact):
    """The sites, those that the second layer reads, and three products."""
    block = dynconv.prepare(MaskedBottleneck(32, 8).eval().to(DEVICE).to(memory_format=torch.channels_last))
    x, cold = operand(2, 32, 8, 8), mask()
    with torch.no_grad():
        with backend("triton"):
            shared = ActiveSites(cold)
            expected = block(x, shared)
            assert torch.equal(block(x, cold), expected)
        assert count(lambda: block(x, cold)) == [*compact, *compact, CONV, CONV, CONV]
        assert count(lambda: block(x, shared)) == [CONV, CONV, FILL, CONV]
        assert count(lambda: block(x, shared, inplace=True)) == [CONV, CONV, CONV]
