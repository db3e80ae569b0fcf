"""How many kernels an op launches on a GPU: beside layers of 10 to 30 us each launch takes its 2 to 5.

Counted where there is no GPU as well: Triton's launches in its interpreter, PyTorch's by what it dispatches.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dynconv
from dynconv import ActiveChannels, ActiveSites, _backend, backend, channels, gathered_conv2d, masked_conv2d, sites
from dynconv.nn import MaskedBottleneck
from dynconv.ops import gathered_conv, masked_conv

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What hands out memory, or another view of it.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "contiguous", "detach", "empty", "empty_like",
    "empty_strided", "expand", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split",
    "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip
# On a CPU a count is at hand, and some ways look at it.
WAITS = {"_local_scalar_dense", "equal", "nonzero"}
# Of an op of this package, what it is made of counts.
OPS = {
    "compact": sites._compact, "inverse_map": sites._inverse_map, "touched": sites._touched,
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
        copies = name in ("contiguous", "reshape") and result.data_ptr() != arguments[0].data_ptr()
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


COMPACT = ["count_kernel", "compact_kernel"]


def test_masked(count):
    x, w, cold, out = operand(*X), operand(*WEIGHT), mask(), operand(*X)
    with torch.no_grad():
        shared = ActiveSites(cold)
        assert count(lambda: masked_conv2d(x, w, padding=1, mask=cold)) == [
            *COMPACT, "fill_skipped_kernel", "masked_conv_kernel"
        ]  # fmt: skip
        count(lambda: shared.index)
        call = lambda **more: count(lambda: masked_conv2d(x, w, padding=1, mask=shared, **more))
        assert call() == ["fill_skipped_kernel", "masked_conv_kernel"]
        assert call(out=out) == ["masked_conv_kernel"]
        assert call(packed=True) == ["zero_", "masked_conv_kernel"]


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
    with torch.no_grad():
        compacted = ["compact_channels_kernel"] * 2
        last = ["zero_", "gathered_conv_kernel"]
        assert count(lambda: gathered_conv2d(x, w, padding=1, in_mask=ins, out_mask=outs)) == [*compacted, *last]
        with backend("triton"):
            sets = dict(in_mask=ActiveChannels(ins), out_mask=ActiveChannels(outs))
        assert count(lambda: gathered_conv2d(x, w, padding=1, **sets)) == last


@pytest.mark.parametrize(
    ("op", "most"),
    [
        # The mask's copy, compaction, the pixels that sites read and theirs, the inverse, three sums.
        (lambda x, w, m, ins, outs: masked_conv2d(x, w, padding=1, mask=m), 15),
        (lambda x, w, m, ins, outs: gathered_conv2d(x, w, padding=1, in_mask=ins, out_mask=outs), 13),
    ],
    ids=["masked", "gathered"],
)
def test_forward_and_backward(count, op, most):
    x, w, grad, masks = operand(*X, grad=True), operand(*WEIGHT, grad=True), operand(*X), (mask(), kept(), kept())
    found = count(lambda: torch.autograd.grad(op(x, w, *masks), (x, w), grad))
    assert len(found) <= most, found


def test_a_block_in_inference(count):
    """The mask's copy, compaction of it and of the pixels that the second layer reads, three products, three fills."""
    block = dynconv.prepare(MaskedBottleneck(32, 8).eval().to(DEVICE).to(memory_format=torch.channels_last))
    x, cold = operand(2, 32, 8, 8), mask()
    with torch.no_grad():
        with backend("triton"):
            block(x, cold)
        found = count(lambda: block(x, cold))
    assert found.count("masked_conv_kernel") == 3 and len(found) <= 12, found
