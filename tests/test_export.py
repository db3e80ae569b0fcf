"""What leaves Python: torch.compile with other sizes, torch.export, AOTInductor, ONNX, and who has to be refused."""

import copy
import io
import pickle
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import dynconv
from dynconv import ActiveSites, dynamic_filter2d
from dynconv._geometry import Geometry
from dynconv.gating import ChannelGate, SlimmableGate, TopKGate
from dynconv.nn import (
    DeformConv2d,
    GatheredBasicBlock,
    GatheredBottleneck,
    GatheredConv2d,
    GatheredLinear,
    Involution2d,
    MaskedBasicBlock,
    MaskedBatchNorm2d,
    MaskedBottleneck,
    MaskedConv2d,
    MaskedInvertedResidual,
)

CLOSE = dict(rtol=1e-4, atol=1e-5)

SELECTORS = {
    "channel": lambda: ChannelGate(8, 16, 4),
    "channel hidden": lambda: ChannelGate(8, 16, 4, hidden=8),
    "top k": lambda: TopKGate(8, 16, 2, 4, boost=False),
    "top k boost": lambda: TopKGate(8, 16, 2, 4),
    "slimmable": lambda: SlimmableGate(8, 16, [4, 8, 16]),
}


class Chosen(nn.Module):
    """A selector with tensors for results."""

    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def forward(self, input):
        chosen = self.selector(input)
        return chosen.channels.mask, chosen.rate, chosen.scores


class Chain(nn.Module):
    """A packed chain and layers that share sites, which are made inside."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = MaskedConv2d(8, 8, 1), MaskedBatchNorm2d(8)
        self.second, self.depthwise = MaskedConv2d(8, 8, 3, padding=1), MaskedConv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, input, mask):
        sites = ActiveSites(mask, (input.shape[0], input.shape[2], input.shape[3]))
        features = self.first(input, sites.touched(input.shape[2:], 3, 1, 1), packed=True)
        output = self.second(self.norm(features, activation="relu"), sites, residual=input)
        return self.depthwise(output, sites, inactive=input)


class Gated(nn.Module):
    """A gate, a block of dynamic width and one of active sites that a layer chooses, and a gathered layer."""

    def __init__(self):
        super().__init__()
        self.gate, self.block = ChannelGate(8, 2), GatheredBottleneck(8, 2)
        self.saliency, self.masked = MaskedConv2d(8, 1, 1), MaskedBottleneck(8, 2)
        self.top, self.last = TopKGate(8, 8, 2, 2), GatheredConv2d(8, 8, 3, padding=1)

    def forward(self, input):
        output = self.block(input, self.gate(input).channels)
        output = self.masked(output, self.saliency(output) > 0)
        return self.last(output, out_mask=self.top(output).channels)


class Filters(nn.Module):
    def forward(self, input, filters, mask):
        return dynamic_filter2d(input, filters, kernel_size=3, padding=1, normalization="softmax", mask=mask)


def operands(kinds, samples=2, size=8, density=0.4):
    """Tensors by their letters: i(nput), m(ask), c(hannels), w (channels of a bottleneck), f(ilters), o(ffsets)."""
    shapes = {"i": (8, size, size), "m": (1, size, size), "c": (8,), "w": (2,), "l": (8,), "f": (18, size, size)}
    shapes["o"] = shapes["f"]
    made = []
    for kind in kinds:
        shape = (samples, *shapes[kind])
        made.append(torch.rand(shape) < density if kind in "mcw" else torch.randn(shape))
    return tuple(made)


MODULES = {
    "masked": (lambda: MaskedConv2d(8, 8, 3, padding=1), "im"),
    "depthwise": (lambda: MaskedConv2d(8, 8, 3, padding=1, groups=8), "im"),
    "chain": (Chain, "im"),
    "basic block": (lambda: MaskedBasicBlock(8, 8), "im"),
    "bottleneck": (lambda: MaskedBottleneck(8, 2), "im"),
    "inverted residual": (lambda: MaskedInvertedResidual(8, 8, 1, 2), "im"),
    "gathered": (lambda: GatheredConv2d(8, 8, 3, padding=1), "icc"),
    "gathered linear": (lambda: GatheredLinear(8, 8), "lcc"),
    "gathered bottleneck": (lambda: GatheredBottleneck(8, 2), "iw"),
    "gathered basic block at sites": (lambda: GatheredBasicBlock(8, 8), "icm"),
    "gated": (Gated, "i"),
    "filters": (Filters, "ifm"),
    "involution": (lambda: Involution2d(8, 3, reduction_ratio=2, group_channels=4), "i"),
    "deformable": (lambda: DeformConv2d(8, 8, 3, padding=1), "io"),
}


def of_dynconv(graph):
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("dynconv")]


def same_noise(module, *operands):
    torch.manual_seed(3)
    return module(*operands)


def with_dynamic_sizes(module, arguments):
    batch, height, width = (
        torch.export.Dim("batch"),
        torch.export.Dim("height", min=4),
        torch.export.Dim("width", min=4),
    )
    shapes = [{0: batch, 2: height, 3: width} if t.dim() == 4 else {0: batch} for t in arguments]
    return torch.export.export(module, arguments, dynamic_shapes=tuple(shapes))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_take_other_batch_sizes(name, training):
    """Compiled in one graph, where the size is dynamic from the first call or from the second; and exported."""
    torch.manual_seed(0)
    module = Chosen(SELECTORS[name]()).train(training)
    inputs = [torch.randn(samples, 8, 6, 6) for samples in (2, 3, 5)]
    for dynamic in (None, True) if name == "channel" else (True,):
        torch.compiler.reset()
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=dynamic, backend="eager")
        eager = copy.deepcopy(module)
        for input in inputs:
            for expected, actual in zip(same_noise(eager, input), same_noise(compiled, input), strict=True):
                assert torch.allclose(expected, actual)
    program = torch.export.export(module, (inputs[0],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for expected, actual in zip(same_noise(module, inputs[2]), same_noise(program, inputs[2]), strict=True):
        assert torch.allclose(expected, actual)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ["chain", "gathered bottleneck", "filters"])
def test_exported_programs_take_other_sizes_and_are_saved(name, training):
    torch.manual_seed(0)
    make, kinds = MODULES[name]
    module, file = make().train(training), io.BytesIO()
    torch.export.save(with_dynamic_sizes(module, operands(kinds)), file)
    file.seek(0)
    program = torch.export.load(file).module()
    arguments = operands(kinds, 5, 10, 0.2)
    assert torch.allclose(same_noise(program, *arguments), same_noise(module, *arguments), **CLOSE)


@pytest.mark.parametrize("name", ["masked", "basic block"])
def test_changing_sizes_and_densities_compile_three_graphs_at_most(name):
    """The sizes of the first call, other batches, other maps; a density is no reason to compile."""
    torch.compiler.reset()
    torch.manual_seed(0)
    make, kinds = MODULES[name]
    module, counter = make().eval(), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for samples, size, density in ((2, 8, 0.4), (3, 8, 0.0), (4, 8, 1.0), (4, 10, 0.3), (6, 12, 0.6)):
        arguments = operands(kinds, samples, size, density)
        assert torch.allclose(compiled(*arguments), module(*arguments), **CLOSE)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles(name):
    torch.manual_seed(0)
    make, kinds = MODULES[name]
    module, arguments = make().eval(), operands(kinds)
    expected = module(*arguments)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*arguments), expected)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors(name, training):
    make, kinds = MODULES[name]
    module, arguments = make().train(training), operands(kinds)
    for has_gradient in (False, True):
        with torch.set_grad_enabled(has_gradient):
            expected = module(*arguments)
            result = copy.deepcopy(module).to("meta")(*(t.to("meta") for t in arguments))
        assert result.is_meta
        assert (result.shape, result.stride(), result.dtype) == (expected.shape, expected.stride(), expected.dtype)


class Wrapped(nn.Module):
    """So that the old ONNX exporter meets `forward` with the arguments that it is given."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, first, second=None, third=None):
        given = [t for t in (first, second, third) if t is not None]
        return self.module(*given)


TRACERS = {
    "torch.jit.trace": lambda module, arguments: torch.jit.trace(module, arguments),
    "torch.jit.script": lambda module, arguments: torch.jit.script(module),
    "torch.fx.symbolic_trace": lambda module, arguments: torch.fx.symbolic_trace(module),
    "dynamo=False": lambda module, arguments: torch.onnx.export(Wrapped(module), arguments, io.BytesIO(), dynamo=False),
}


@pytest.mark.filterwarnings("ignore")  # all of them are deprecated, or warn of what they are about to record
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("chain", "gated", "filters")])
def test_tracers_are_refused(name, tracer):
    """They would keep the sites of the example, or fail at some line inside; the error says what to use."""
    make, kinds = MODULES[name]
    with pytest.raises(RuntimeError, match=f"{tracer}.*torch.export.export"):
        TRACERS[tracer](make().eval(), operands(kinds))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("tracer", [name for name in TRACERS if name != "dynamo=False"])
def test_tracers_of_selectors_are_refused(name, tracer):
    with pytest.raises(RuntimeError, match=f"{tracer}.*torch.export.export"):
        TRACERS[tracer](SELECTORS[name]().eval(), (torch.randn(2, 8, 6, 6),))


def test_a_block_without_a_mask_can_be_traced():
    """It is the dense block, and nothing in it depends on values."""
    block, (input,) = MaskedBottleneck(8, 2).eval(), operands("i")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(block, (input,))
    assert torch.equal(traced(2 * input), block(2 * input))


@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize(
    "geometry",
    [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), ((2, 3), (3, 1), (0, 2), (2, 1)), (1, 3, 1, 1), (2, 1, "same", 1)],
    ids=str,
)
def test_the_reference_derives_the_same_sites(geometry, samples):
    """In plain PyTorch what the kernels derive: index, inverse, tables, and the pixels that are read."""
    size, placed = (7, 9), Geometry.of(*geometry)
    for density in (0.0, 0.4, 1.0):
        mask = torch.rand(samples, 1, *placed.output_size(*size)) < density
        expected = ActiveSites(mask)
        with dynconv.backend("reference"):
            sites = ActiveSites(mask)
            count = len(sites)
            assert torch.equal(sites.index[:count], expected.index[: len(expected)])
            assert torch.equal(sites.count, expected.count) and torch.equal(sites.inverse, expected.inverse)
            for of in (sites, expected):
                assert of.index.dtype == of.count.dtype == of.inverse.dtype == torch.int32
            table = sites.neighbours(size, *geometry)
            read = sites.touched(size, *geometry).mask
        assert torch.equal(table[:count], ActiveSites(mask).neighbours(size, *geometry)[:count])
        assert torch.equal(read, ActiveSites(mask).touched(size, *geometry).mask)


@pytest.mark.parametrize("name", MODULES)
def test_onnx_gets_plain_operators(name, monkeypatch):
    """Inside `torch.onnx.export` each op is its dense form; so it is under the reference, for any other converter."""
    torch.manual_seed(0)
    make, kinds = MODULES[name]
    module, arguments, others = make().eval(), operands(kinds), operands(kinds, 3, 10, 0.7)
    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        programs = [with_dynamic_sizes(module, arguments)]
    if name in ("masked", "basic block", "filters"):
        with dynconv.backend("reference"):
            programs.append(with_dynamic_sizes(module, arguments))
    expected = module(*others)
    for program in programs:
        assert not of_dynconv(program.graph)
        assert torch.allclose(program.module()(*others), expected, **CLOSE)
    if isinstance(module, (MaskedBasicBlock, MaskedBottleneck, MaskedInvertedResidual)):
        written = {str(node.target) for node in programs[0].graph.nodes}
        assert not {"aten.scatter.src", "aten.index.Tensor", "aten.gather.default"} & written  # nothing is packed


@pytest.mark.parametrize("name", ["gated"])
def test_onnx(name):
    """The file that torch.onnx.export writes, run by ONNX Runtime at other sizes."""
    reason = "needs onnxscript and onnxruntime, which the test requirements leave out"
    pytest.importorskip("onnxscript", reason=reason)
    runtime = pytest.importorskip("onnxruntime", reason=reason)
    torch.manual_seed(0)
    make, kinds = MODULES[name]
    module, arguments, others = make().eval(), operands(kinds), operands(kinds, 3, 10, 0.7)
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    shapes = tuple({0: batch, 2: height, 3: width} for _ in arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        program = torch.onnx.export(module, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, [t.numpy() for t in others], strict=True)))
    assert torch.allclose(torch.from_numpy(output), module(*others).detach(), **CLOSE)


class Package(nn.Module):
    """Every op that takes lists of tensors, with and without them, and a block: a package takes seconds to compile."""

    def __init__(self):
        super().__init__()
        self.masked, self.block = MaskedConv2d(8, 8, 3, padding=1), MaskedBasicBlock(8, 8)
        self.gathered = GatheredConv2d(8, 8, 3, padding=1)

    def forward(self, input, mask, filters):
        channels = mask[:, 0, :, 0]
        output = self.block(self.masked(input, mask), mask)
        output = self.gathered(self.gathered(output, channels), out_mask=channels, mask=mask)
        output = dynamic_filter2d(output, filters, kernel_size=3, padding=1)
        return dynamic_filter2d(output, filters, kernel_size=3, padding=1, mask=mask)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="AOTInductor needs a C++ compiler")
@pytest.mark.slow
def test_aot_inductor_package(tmp_path):
    """What an op takes must be what AOTInductor can pass on: it makes None of an empty list."""
    torch.manual_seed(0)
    module = Package().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Inductor's own
        program = torch.export.export(module, operands("imf"))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for density in (0.3, 0.8):
            arguments = operands("imf", density=density)
            assert torch.allclose(package(*arguments), module(*arguments), rtol=1e-3, atol=1e-3)
