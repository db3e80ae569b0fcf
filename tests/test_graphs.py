"""CUDA graphs, streams and devices: what is captured stays right for other masks, and nothing waits or compiles in it.

Without a GPU everything but the capture itself runs: a replay is the call again, a stream is none, and the GPU path
runs on tensors without values (claimed_gpu.py).
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ON_GPU
from graph_cases import CASES, DENSITIES, LAYERS, Case

import dynconv
from dynconv import ActiveChannels, ActiveSites, backend, calibration, masked_conv2d
from dynconv.nn import MaskedBottleneck

DEVICE = "cuda" if ON_GPU else "cpu"
gpu = pytest.mark.gpu
# Of interpreted kernels, for which a replay is a call like any other, one is enough: the ops' own tests have the rest.
REPLAYED = DENSITIES if ON_GPU else (0.3,)

# What a kernel may be compiled for the value of: numbers that shapes and the layer alone give. A count, a chunk or an
# offset is none of them: a later call with the same shapes would compile.
OF_SHAPES = {"sites", "groups", "offset_groups", "group_runs", "offset_group_runs"}


@pytest.fixture(scope="module")
def claimed():
    """What claimed_gpu.py finds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("claimed_gpu.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", [*CASES, *LAYERS, "channels at an odd address"])
def test_nothing_waits_or_is_compiled_after_the_warm_up(claimed, name):
    """No launch depends on a mask's values, nothing comes from the host, and every kernel is one of the warm-up's."""
    assert claimed["cases"][name] == []


def test_what_waits_or_compiles_is_found(claimed):
    said = {
        "item": "item() cannot be called", "branch": "item() cannot be called", "nonzero": "nonzero",
        "to the host": "Cannot copy out", "from the host": "torch.tensor copies from the host",
        "length": "item() cannot be called", "no launch": "nothing was launched", "odd address": "masked_conv_kernel",
    }  # fmt: skip
    assert claimed["seeded"].keys() == said.keys()
    for name, text in said.items():
        assert any(text in fault for fault in claimed["seeded"][name]), name


def test_kernels_are_compiled_for_what_shapes_give(claimed):
    assert {name.partition(" ")[2] for name in claimed["specialised"]} <= OF_SHAPES


def test_the_example_of_the_docs_is_right():
    page = Path(__file__).parent.parent.joinpath("docs", "running-on-a-gpu.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "CUDAGraph" in block)
    names = {}
    exec(compile(example, "running-on-a-gpu.md", "exec"), names)
    with backend("reference"), torch.no_grad():
        expected = names["model"](names["x"], names["mask"])
    # Three layers one after another, of sums of 64 to 576 terms that are rounded by 2^-24 of the largest at each.
    bound = (256 + 576 + 64) * 2**-24 * float(expected.abs().max())
    torch.testing.assert_close(names["y"], expected, rtol=0, atol=bound)


def captured(run):
    """Capture a call after its warm-up in a CUDA graph: returns what replays it and gives its results.

    Without a GPU each replay is another call.
    """
    if not ON_GPU:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        dynconv.warmup(run)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay():
        graph.replay()
        return results

    return replay


def assert_as_reference(case: Case, replay) -> None:
    """That a replay gives what the reference gives for the values that the tensors have now.

    A sum here has at most 288 terms and is rounded by 2^-24 of its largest partial sum at each, four of them one after
    another: 7e-5 of what is largest.
    """
    before = {name: tensor.detach().clone() for name, tensor in case.tensors.items()}
    actual = [result.clone() for result in replay()]
    for name, tensor in case.tensors.items():  # an in-place call has written to one
        tensor.detach().copy_(before[name])
    with backend("reference"):
        expected = case.run()
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=7e-5 * max(1.0, float(other.abs().max())))


@gpu
@pytest.mark.parametrize("name", CASES)
def test_a_replay_follows_its_masks(name):
    case = CASES[name](DEVICE)
    case.refill(0.5)
    with backend("triton"):
        replay = captured(case.run)
        for density in REPLAYED if case.has_masks else (1.0,):
            case.refill(density)
            assert_as_reference(case, replay)


@gpu
def test_a_calibrated_call_fetches_no_count_in_a_capture(monkeypatch):
    """It takes the sparse way; a count on its way to the host would be part of the graph, and is asked for there."""

    def fetch(*_):
        raise AssertionError("a count is sent to the host")

    case = CASES["masked"](DEVICE)
    case.refill(0.5)
    times = calibration.Times("", [1.0], [1.0], [0.5], [True])  # dense at any density
    monkeypatch.setattr(calibration, "_times", lambda call: times)
    monkeypatch.setattr(calibration, "_latest", fetch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if not ON_GPU:  # where a call looks at its mask, which waits for nothing
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(dynconv.ops.masked_conv._Call, "device", torch.device("cuda", 0))
    with backend("triton"), dynconv.explain() as explanation:
        case.run()
    assert [(one.path, one.reason) for one in explanation.decisions] == [("sparse", "no count has arrived yet")]


@pytest.fixture
def capturing(monkeypatch):
    """capturing(): a block in which a capture seems to be under way."""

    @contextlib.contextmanager
    def block():
        with monkeypatch.context() as patch:
            for name in ("is_initialized", "is_current_stream_capturing"):
                patch.setattr(torch.cuda, name, lambda: True)
            yield

    return block


@gpu
def test_a_capture_leaves_nothing_to_calls_outside(capturing):
    """What it computes is there after a replay alone; a call outside that took it would read uninitialised memory."""
    with backend("triton"):
        sites = ActiveSites(torch.rand(2, 1, 4, 4, device=DEVICE) < 0.5)
        channels = ActiveChannels(torch.rand(2, 8, device=DEVICE) < 0.5)
        read = lambda: sites.touched((4, 4), 3, padding=1)
        with capturing():
            in_capture = read(), sites.neighbours((4, 4), 3, padding=1), channels.inverse
        assert read() is not in_capture[0] and read() is read()
        assert sites.neighbours((4, 4), 3, padding=1) is not in_capture[1]
        assert channels.inverse is not in_capture[2] and channels.inverse is channels.inverse
        with capturing():  # what is there already is used
            assert read() is sites.touched((4, 4), 3, padding=1)


@gpu
def test_sites_of_a_capture_keep_what_it_derives_alone(capturing):
    """Derived after a replay it would be that replay's, and stay so at the next."""
    with backend("triton"):
        with capturing():
            sites = ActiveSites(torch.rand(2, 1, 4, 4, device=DEVICE) < 0.5)
            read = lambda: sites.touched((4, 4), 3, padding=1)
            assert read() is read()  # shared by the layers of the graph
        assert sites.neighbours((4, 4), 3, padding=1) is not sites.neighbours((4, 4), 3, padding=1)
        before = len(sites)
        sites.mask.logical_not_()  # as a replay with another mask would
        sites.count.copy_(sites.mask.sum())
        assert len(sites) == sites.mask.numel() - before


@gpu
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_a_prepared_block_keeps_no_parameters_of_a_capture(capturing, way):
    block = MaskedBottleneck(32, 8).eval().to(DEVICE).to(memory_format=torch.channels_last)
    block = dynconv.prepare(block)
    x, mask = torch.randn(2, 32, 4, 4, device=DEVICE), torch.rand(2, 1, 4, 4, device=DEVICE) < 0.5
    forms = lambda: {"sparse", "dense"} & {name for layer in block._kept.layers for name in layer.__dict__}
    with backend("triton"), torch.no_grad():
        with capturing(), dynconv.execution(way):
            block(x, mask)
        assert block._kept is None
        with dynconv.execution("dense"):  # which makes one form of the parameters; the sparse way needs another as well
            block(x, mask)
        before = forms()
        with capturing(), dynconv.execution(way):
            block(x, mask)
        assert forms() == before
        with dynconv.execution(way):
            block(x, mask)
        assert way in forms()


@contextlib.contextmanager
def on_stream(stream):
    """Run on a stream, behind what the current one has been given; it then waits in its turn. None: where we are."""
    if stream is None:
        yield
        return
    before = torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


@gpu
@pytest.mark.parametrize("name", ["masked, training", "gathered, training", "bottleneck"])
def test_another_stream(name):
    stream = torch.cuda.Stream() if ON_GPU else None
    with on_stream(stream), backend("triton"):
        case = CASES[name](DEVICE)
        case.refill(0.3)
        assert_as_reference(case, case.run)


@gpu
def test_sites_of_one_stream_serve_another():
    """Behind an event, as any tensor's; what is derived of them there is made there."""
    x, w = torch.randn(2, 16, 4, 4, device=DEVICE), torch.randn(16, 16, 3, 3, device=DEVICE)
    mask = torch.rand(2, 1, 4, 4, device=DEVICE) < 0.3
    first, second = (torch.cuda.Stream(), torch.cuda.Stream()) if ON_GPU else (None, None)
    with backend("triton"):
        with on_stream(first):
            sites = ActiveSites(mask)
            made = torch.cuda.Event() if ON_GPU else None
            if made is not None:
                made.record()
        with on_stream(second):
            if made is not None:
                second.wait_event(made)
            read = sites.touched((4, 4), 3, padding=1)
            rows = masked_conv2d(x, w, padding=1, mask=read, packed=True)
            actual = masked_conv2d(rows, w, padding=1, mask=sites)
    with backend("reference"):
        hidden = masked_conv2d(x, w, padding=1, mask=read.mask)
        expected = masked_conv2d(hidden, w, padding=1, mask=mask)
    # Two sums of 144 products of normal numbers, rounded by 2^-24 of the largest at each.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 * 144 * 2**-24 * float(expected.abs().max()))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CASES)
def test_another_device(name):
    """Tensors on the second GPU while the first is the current one."""
    case = CASES[name]("cuda:1")
    case.refill(0.3)
    assert_as_reference(case, case.run)
    assert torch.cuda.current_device() == 0


@gpu
def test_a_compiled_model_that_captures_itself():
    """torch.compile(mode="reduce-overhead") replays CUDA graphs, forward and backward; other masks at each call."""
    torch.manual_seed(0)
    w, v = torch.randn(16, 16, 3, 3, device=DEVICE) / 12, torch.randn(16, 16, 1, 1, device=DEVICE) / 4
    leaves = w.requires_grad_(), v.requires_grad_()

    def model(x, mask):
        sites = ActiveSites(mask)
        hidden = masked_conv2d(x, w, padding=1, mask=sites, activation="relu")
        return masked_conv2d(hidden, v, mask=sites).square().sum()

    # Without a GPU there is nothing to replay, and Inductor would ask for a C++ compiler.
    options = {"mode": "reduce-overhead"} if ON_GPU else {"backend": "aot_eager"}
    compiled = torch.compile(model, fullgraph=True, **options)
    warm = (0.5,) * 3 if ON_GPU else ()  # warmed up, recorded, replayed
    for density in (*warm, *REPLAYED):
        x = torch.randn(2, 16, 4, 4, device=DEVICE)
        mask = torch.rand(2, 1, 4, 4, device=DEVICE) < density
        with backend("triton"):
            actual = [grad.clone() for grad in torch.autograd.grad(compiled(x, mask), leaves)]
        with backend("reference"):
            expected = torch.autograd.grad(model(x, mask), leaves)
        for one, other in zip(actual, expected):
            torch.testing.assert_close(one, other, rtol=0, atol=7e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU; claimed_gpu.py shows it without one")
@gpu
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_after_the_warm_up(name, monkeypatch):
    """On the GPU itself, by real masks."""
    from triton import knobs

    compiled = []
    case = CASES[name](DEVICE)
    case.refill(0.5)
    dynconv.warmup(case.run)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    for density in DENSITIES:
        case.refill(density)
        for way in ("sparse", "dense", "automatic"):
            with dynconv.execution(way):
                case.run()
    assert compiled == []
