"""Packed chains: features at active sites from one layer to the next, and the epilogue between them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynconv import ActiveSites, PackedFeatures, backend, masked_conv2d, pack, reference
from dynconv.nn import MaskedBatchNorm2d
from dynconv.ops.epilogue import batch_norm, epilogue

ACTIVATIONS = [None, "relu", "relu6", "silu", "gelu", "hardswish"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Roundings of the activation's own value, relative to what enters it: those of silu and gelu in float32 come from
# polynomials of a relative error of 1e-7 (exp) and an absolute one of 1.5e-7 (erf), the others are exact.
ACTIVATION_ERROR = 8


def integers(*shape, low=-3, high=4, dtype=torch.float32, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(n, height, width, density=0.5, seed=0):
    return torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(seed)) < density


def packed_rows(sites, target):
    """How many rows features packed for these sites have."""
    return len(sites) if target.backend == "cpu" else sites.capacity


def poisoned(features):
    """The same features with rows for every site, those past the count NaN: nothing may look there."""
    active = len(features.sites)
    nothing = features.rows.new_full((features.sites.capacity - active, features.rows.shape[1]), float("nan"))
    return PackedFeatures(torch.cat([features.rows[:active], nothing]), features.sites)


def test_pack_and_unpack_undo_each_other(target):
    input, mask = integers(2, 5, 6, 7).to(target.device), random_mask(2, 6, 7).to(target.device)
    inactive = integers(2, 5, 6, 7, seed=1).to(target.device)
    with target.use():
        sites = ActiveSites(mask)
        features = pack(input, sites)
        assert features.shape == (2, 5, 6, 7) and features.rows.shape == (packed_rows(sites, target), 5)
        assert torch.equal(features.rows[: len(sites)], input.permute(0, 2, 3, 1)[mask[:, 0]])
        dense = poisoned(features).unpack(inactive=inactive)
        assert dense.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(dense, torch.where(mask, input, inactive))
        assert torch.equal(poisoned(features).unpack(), torch.where(mask, input, 0))


@pytest.mark.parametrize("packing", ["cpu", "reference"])
@pytest.mark.parametrize("unpacking", ["cpu", "reference"])
@pytest.mark.parametrize("density", [0.0, 0.4])
def test_features_of_one_backend_are_those_of_another(packing, unpacking, density):
    """They have other numbers of rows, none on the CPU where no site is active, and stay in the graph."""
    input, mask = integers(2, 5, 6, 7).requires_grad_(), random_mask(2, 6, 7, density)
    with backend(packing):
        features = pack(input, ActiveSites(mask))
    with backend(unpacking):
        output = features.unpack()
    output.sum().backward()
    assert torch.equal(output, torch.where(mask, input, 0))
    assert torch.equal(input.grad, mask.expand_as(input).to(input.dtype))


def test_a_packed_input_is_its_dense_form(target):
    """Pixels outside the packed set count as zeros, whichever of them the sites read."""
    source, mask = random_mask(2, 6, 7, seed=1).to(target.device), random_mask(2, 6, 7).to(target.device)
    input, weight = integers(2, 5, 6, 7).to(target.device), integers(4, 5, 3, 3, seed=2).to(target.device)
    with target.use():
        features = poisoned(pack(input, ActiveSites(source)))
        output = masked_conv2d(features, weight, padding=1, mask=mask)
        expected = torch.where(mask, F.conv2d(torch.where(source, input, 0), weight, padding=1), 0)
        assert torch.equal(output, expected)


@st.composite
def chains(draw):
    """Layers from the last to the first: (kernel, stride, dilation, groups kind, activation)."""
    layer = st.tuples(
        st.sampled_from([1, 1, 3, 5]), st.sampled_from([1, 1, 2]), st.sampled_from([1, 2]),
        st.sampled_from(["dense", "groups", "depthwise"]), st.sampled_from([None, "relu", "relu6"]),
    )  # fmt: skip
    return draw(st.lists(layer, min_size=1, max_size=4))


def run_chain(layers, masks, operands, is_packed):
    """[output, input's gradient, weights' gradients]; dense layers where not packed, each at the very same sites."""
    input, *weights = (t.detach().clone().requires_grad_() for t in operands)
    features = input
    for number, ((kernel, stride, dilation, _, activation), mask, weight) in enumerate(
        zip(layers, masks, weights, strict=True)
    ):
        packed = is_packed and number < len(layers) - 1
        options = dict(stride=stride, padding=dilation * (kernel // 2), dilation=dilation)
        groups = features.shape[1] // weight.shape[1]
        features = masked_conv2d(
            features, weight, groups=groups, mask=mask, activation=activation, packed=packed, **options
        )
        if packed:
            features = poisoned(features) if not features.rows.requires_grad else features
    features.sum().backward()
    return [features.detach(), input.grad, *(weight.grad for weight in weights)]


def check_chain(target, layers, density, seed):
    sizes, channels = [(9, 8)], [8]
    for kernel, stride, dilation, _, _ in layers:
        reach = dilation * (kernel - 1) + 1
        sizes.append(tuple((s + 2 * (dilation * (kernel // 2)) - reach) // stride + 1 for s in sizes[-1]))
    operands = [integers(2, 8, *sizes[0], dtype=torch.float64, seed=seed)]
    for kernel, _, _, kind, _ in layers:
        groups = {"dense": 1, "groups": 2, "depthwise": channels[-1]}[kind]
        channels.append(channels[-1] if kind == "depthwise" else 4 + 2 * len(channels))
        shape = (channels[-1], channels[-2] // groups, kernel, kernel)
        operands.append(integers(*shape, low=-1, high=2, dtype=torch.float64, seed=seed + len(channels)))
    operands = [t.to(target.device) for t in operands]
    with target.use():
        masks = [ActiveSites(random_mask(2, *sizes[-1], density, seed).to(target.device))]
        for (kernel, stride, dilation, *_), size in zip(layers[:0:-1], sizes[-2:0:-1], strict=True):
            masks.insert(0, masks[0].touched(size, kernel, stride, dilation * (kernel // 2), dilation))
        actual = run_chain(layers, masks, operands, is_packed=True)
    with backend("reference"):
        expected = run_chain(layers, masks, operands, is_packed=False)
    for name, want, have in zip(["output", "input", *"abcd"], expected, actual, strict=False):
        assert torch.equal(want, have.cpu()), name  # integers: exact in any order


@settings(max_examples=60, deadline=None)
@given(chains(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_random_chains_on_the_cpu(layers, density, seed):
    check_chain(Cpu, layers, density, seed)


@pytest.mark.gpu
@settings(max_examples=5, deadline=None)
@given(chains(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_random_chains_in_triton(layers, density, seed):
    from conftest import Target

    check_chain(Target("triton"), layers, density, seed)


class Cpu:
    device = "cpu"
    use = staticmethod(lambda: backend("cpu"))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("groups", [1, 2, 6], ids=["one-group", "groups", "depthwise"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_fused_epilogue(target, activation, groups, packed):
    """activation(gate * conv + residual), fused in inference and in a pass of its own with gradients: both."""
    input, weight = integers(2, 6, 5, 7), integers(6, 6 // groups, 3, 3, seed=1)
    bias, residual, inactive = integers(6, seed=2), integers(2, 6, 5, 7, seed=3), integers(2, 6, 5, 7, seed=4)
    mask = random_mask(2, 5, 7)
    gate = torch.where(mask, integers(2, 1, 5, 7, low=1, seed=5), 0).float() / 4
    grad = integers(2, 6, 5, 7, seed=6)

    def run(backend_used, dtype, device, differentiable):
        tensors = [t.to(device, dtype) for t in (input, weight, bias, residual, inactive, gate)]
        leaves = [t.detach().clone().requires_grad_(differentiable) for t in tensors]
        x, w, b, r, rest, g = leaves
        with backend_used, torch.set_grad_enabled(differentiable):
            sites = ActiveSites(g)
            result = masked_conv2d(
                x, w, b, padding=1, groups=groups, mask=sites, activation=activation,
                residual=pack(r, sites) if packed else r, inactive=None if packed else rest, packed=packed,
            )  # fmt: skip
            output = result.unpack(inactive=rest) if packed else result
            if differentiable:
                output.backward(grad.to(device, dtype))
        return [output.detach()] + [t.grad for t in leaves if differentiable]

    for differentiable in (False, True):
        expected = run(backend("reference"), torch.float64, "cpu", differentiable)
        actual = run(target.use(), torch.float32, target.device, differentiable)
        names = ("output", "input", "weight", "bias", "residual", "inactive", "gate")
        for name, want, have in zip(names, expected, actual, strict=False):
            if activation in (None, "relu", "relu6"):
                assert torch.equal(have.cpu().double(), want), name
            else:
                # What enters the activation is exact; gradients add up to 54 products of integers up to 3 with it.
                scale = want.abs().max().clamp(min=16) * torch.finfo(torch.float32).eps
                assert (have.cpu().double() - want).abs().max() <= 2 * ACTIVATION_ERROR * scale, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_over_their_whole_range(target, activation, dtype):
    """Values and slopes, kinks and tails included, and NaN stays NaN."""
    points = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-3.0, 0.0, 3.0, 6.0, -100.0, 100.0])]).to(dtype)
    sites = ActiveSites(torch.ones(1, 1, 1, len(points), dtype=torch.bool, device=target.device))
    rows = points[:, None].expand(-1, 3).contiguous().to(target.device).requires_grad_()
    exact = points.double().requires_grad_()
    reference.ACTIVATIONS[activation](exact).sum().backward()
    with target.use():
        output = epilogue(PackedFeatures(rows, sites), activation=activation)
        output.sum().backward()
        undefined = epilogue(PackedFeatures(torch.full_like(rows, float("nan")), sites), activation=activation)
    assert undefined.isnan().all()
    want = reference.ACTIVATIONS[activation](points.double())
    single = max(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-15
    bound = ACTIVATION_ERROR * single * points.double().abs().clamp(min=1)
    for column in range(3):
        assert ((output[0, column, 0].cpu().double() - want).abs() <= bound).all()
        assert ((rows.grad[:, column].cpu().double() - exact.grad).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(target, dtype):
    """Of the active rows alone, and sound where the mean is far from zero."""
    mask = random_mask(2, 9, 40, 0.7).to(target.device)
    rows = (torch.randn(2 * 9 * 40, 5, generator=torch.Generator().manual_seed(0)) + 100).to(dtype).to(target.device)
    with target.use():
        sites = ActiveSites(mask)
        _, mean, variance = batch_norm(poisoned(PackedFeatures(rows, sites)))
        _, *empty = batch_norm(poisoned(PackedFeatures(rows, ActiveSites(torch.zeros_like(mask)))))
    exact = rows[: len(sites)].double()
    eps = torch.finfo(mean.dtype).eps
    assert mean.dtype == variance.dtype == torch.promote_types(dtype, torch.float32)
    assert ((mean.double() - exact.mean(0)).abs() <= 100 * 2 * 9 * 40 * eps).all()
    # Each (x - mean)^2 carries the mean's error twice; the sum adds at most one rounding for each row.
    error = (mean.double() - exact.mean(0)).abs().max() * 8 + 2 * 9 * 40 * eps
    assert ((variance.double() - exact.var(0, unbiased=False)).abs() <= error).all()
    assert all(torch.equal(value, torch.zeros_like(value)) for value in empty)


def normalise(x, weight, bias, gate, residual):
    sites = ActiveSites(torch.where(random_mask(2, 3, 4).to(gate.device), gate, 0))
    features = pack(x, sites)
    return batch_norm(features, weight, bias, activation="silu", residual=residual)[0]


def test_gradcheck_of_normalisation_gate_residual_and_activation(target):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 3, 4), (3,), (3,), (2, 1, 3, 4), (2, 3, 3, 4)]
    operands = [torch.randn(s, generator=generator, dtype=torch.float64).to(target.device) for s in shapes]
    operands[3] += operands[3].sign()  # away from zero, where a site would become inactive
    with target.use():
        assert torch.autograd.gradcheck(
            normalise, [t.requires_grad_() for t in operands], fast_mode=target.is_interpreted
        )


class TestBatchNorm:
    def test_over_all_sites_it_is_batch_norm(self, target):
        dense = torch.nn.BatchNorm2d(6, momentum=0.3).double().to(target.device)
        torch.nn.init.normal_(dense.weight)
        masked = MaskedBatchNorm2d(6, momentum=0.3).double().to(target.device)
        masked.load_state_dict(dense.state_dict())
        input = torch.randn(2, 6, 4, 5, dtype=torch.float64, device=target.device)
        with target.use():
            features = pack(input, ActiveSites(torch.ones(2, 1, 4, 5, dtype=torch.bool, device=target.device)))
            assert torch.allclose(masked(features, packed=False), dense(input))
            for name, value in dense.state_dict().items():
                assert torch.allclose(masked.state_dict()[name], value), name
            assert torch.allclose(masked.eval()(features, packed=False), dense.eval()(input))

    def test_statistics_are_those_of_the_active_sites(self, target):
        input, mask = torch.randn(2, 3, 6, 7).to(target.device), random_mask(2, 6, 7).to(target.device)
        norm = MaskedBatchNorm2d(3, momentum=None).to(target.device)
        with target.use():
            sites = ActiveSites(mask)
            output = norm(poisoned(pack(input, sites)))
        rows = input.permute(0, 2, 3, 1)[mask[:, 0]]
        assert torch.allclose(norm.running_mean, rows.mean(0), atol=1e-6)
        assert torch.allclose(norm.running_var, rows.var(0), rtol=1e-5)
        assert torch.allclose(output.rows[: len(sites)], F.batch_norm(rows, None, None, training=True), atol=1e-5)

    def test_no_active_site_changes_no_statistics(self, target):
        norm = MaskedBatchNorm2d(3).to(target.device)
        sites = ActiveSites(torch.zeros(2, 1, 4, 4, dtype=torch.bool, device=target.device))
        with target.use():
            norm(pack(torch.randn(2, 3, 4, 4, device=target.device), sites))
        assert torch.equal(norm.running_mean.cpu(), torch.zeros(3)) and torch.equal(
            norm.running_var.cpu(), torch.ones(3)
        )

    def test_from_dense_shares(self):
        dense = torch.nn.BatchNorm2d(3, affine=False).eval()
        masked = MaskedBatchNorm2d.from_dense(dense)
        assert masked.running_mean is dense.running_mean and masked.weight is None and not masked.training
        with pytest.raises(TypeError, match=r"module: expected an nn\.BatchNorm2d, got Linear"):
            MaskedBatchNorm2d.from_dense(torch.nn.Linear(2, 2))


def test_in_place_scatter_and_add(target):
    mask = random_mask(2, 5, 6).to(target.device)
    features = integers(2, 4, 5, 6).to(target.device)
    start = integers(2, 4, 5, 6, seed=1).to(target.device, memory_format=torch.channels_last)
    with target.use():
        packed = pack(features, ActiveSites(mask))
        out = start.clone(memory_format=torch.preserve_format)
        assert packed.unpack(out=out) is out and torch.equal(out, torch.where(mask, features, start))
        out = start.clone(memory_format=torch.preserve_format)
        packed.unpack(out=out, residual=out, activation="relu")
        assert torch.equal(out, torch.where(mask, (features + start).relu(), start))
        weight = integers(4, 4, 1, 1, seed=2).to(target.device)
        out = start.clone(memory_format=torch.preserve_format)
        masked_conv2d(packed, weight, mask=packed.sites, out=out, residual=out)
        assert torch.equal(out, torch.where(mask, F.conv2d(features, weight) + start, start))


def refused(change, error, match):
    return pytest.param(change, error, match, id=match[:40])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        refused({"mask": None}, ValueError, "mask: expected sites for packed features, got None"),
        refused({"inactive": torch.zeros(1, 4, 3, 3)}, ValueError, "inactive: expected None for a packed output"),
        refused({"residual": torch.zeros(1, 4, 3, 3)}, TypeError, "residual: expected PackedFeatures"),
        refused({"packed": False, "residual": 1.0}, TypeError, "residual: expected a tensor, got float"),
        refused({"packed": False, "residual": torch.zeros(1, 4, 3, 2)}, ValueError, "residual: expected a shape that"),
        refused({"activation": "tanh"}, ValueError, "activation: expected None or one of relu"),
        refused({"out": torch.zeros(1, 4, 3, 3)}, ValueError, "out: expected packed=False"),
        refused({"input": ([[1.0]], None)}, TypeError, "input: expected a tensor or PackedFeatures, got list"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, error, match):
    sites = ActiveSites(torch.ones(1, 1, 3, 3, dtype=torch.bool))
    features = pack(torch.zeros(1, 4, 3, 3), sites)
    if "input" in change:
        change = {"input": PackedFeatures(*change["input"])}
    arguments = {"input": features, "weight": torch.zeros(4, 4, 1, 1), "mask": sites, "packed": True, **change}
    with pytest.raises(error, match=match):
        masked_conv2d(**arguments)


@pytest.mark.parametrize("channels", [1, 4, 16])
@pytest.mark.parametrize("used", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["mean", "scale", "shift", "weight", "bias"])
def test_vectors_of_other_channels_are_refused(name, used, channels):
    """The kernels would read beyond their end."""
    features = pack(integers(2, 8, 6, 7), ActiveSites(random_mask(2, 6, 7)))
    function = batch_norm if name in ("weight", "bias") else epilogue
    with backend(used), pytest.raises(ValueError, match=rf"{name}: expected shape \[8\], got \[{channels}\]"):
        function(features, **{name: torch.ones(channels)})
    for is_training in (False, True):
        norm = MaskedBatchNorm2d(channels).train(is_training)
        with backend(used), pytest.raises(ValueError, match=f"features: expected {channels} channels, got 8"):
            norm(features)
        assert norm.num_batches_tracked == 0


def test_features_of_other_sites_are_refused():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    one, other = ActiveSites(mask), ActiveSites(mask)
    features = pack(torch.zeros(1, 4, 3, 3), one)
    with pytest.raises(ValueError, match="residual: expected features packed for the same ActiveSites"):
        masked_conv2d(features, torch.zeros(4, 4, 1, 1), mask=other, residual=features, packed=True)
    with pytest.raises(ValueError, match=r"input: expected rows \[9 or more, C\]"):
        masked_conv2d(PackedFeatures(features.rows[:8], one), torch.zeros(4, 4, 1, 1), mask=one)
    with pytest.raises(ValueError, match=r"input: expected shape \[1, C, 3, 3\]"):
        pack(torch.zeros(1, 4, 3, 4), one)
    with pytest.raises(TypeError, match="active: expected ActiveSites or ActiveChannels, got Tensor"):
        pack(torch.zeros(1, 4, 3, 3), mask)


class TestRegistration:
    def operands(self, target):
        full = torch.ones(1, 1, 3, 4, dtype=torch.bool, device=target.device)  # no unspecified entries to compare
        with target.use():
            sites = ActiveSites(full)
        vectors = [integers(5, seed=s).to(target.device) for s in (1, 2, 3)]
        gate = integers(1, 1, 3, 4, low=1, seed=4).to(target.device)
        residual = integers(1, 5, 3, 4, seed=5).to(target.device, memory_format=torch.channels_last)
        rows = integers(12, 5).to(target.device)
        return rows, sites, (rows, sites.mask, sites.index, sites.count, *vectors, gate, residual)

    def test_opcheck(self, target):
        rows, sites, operands = self.operands(target)
        name, ops = target.backend, torch.ops.dynconv
        for t in (rows, *operands[4:]):
            t.requires_grad_()
        torch.library.opcheck(ops.epilogue.default, (*operands, None, "silu", False, name))
        torch.library.opcheck(ops.epilogue.default, (*operands[:-1], rows, None, "relu", True, name))
        weight, bias, gate, residual = operands[4], operands[5], *operands[7:]
        normalised = (*operands[:4], weight, bias, gate, residual, None, 1e-3, "silu", False, name)
        torch.library.opcheck(ops.batch_norm.default, normalised)
        normalised = (*operands[:4], None, bias, None, None, None, 1e-3, "none", True, name)
        torch.library.opcheck(ops.batch_norm.default, normalised)
        dense = integers(1, 5, 3, 4).to(target.device).requires_grad_()
        torch.library.opcheck(ops.pack.default, (dense, sites.mask, sites.index, sites.count, name))

    def test_opcheck_without_gradients(self, target):
        rows, _, operands = self.operands(target)
        name, ops = target.backend, torch.ops.dynconv
        out = torch.zeros_like(operands[-1])
        torch.library.opcheck(ops.epilogue_.default, (out, *operands, False, "relu", name))
        torch.library.opcheck(ops.epilogue_.default, (out, *operands[:-1], None, True, "relu", name))
        vectors = operands[4:7]
        for weight in (vectors[0], None):
            norm = (*operands[:4], weight, vectors[1], *operands[7:], 1e-3, "silu", name, weight is None)
            for wanted in ([True] * 4, [True, False, False, False], [False, True, False, True], [False] * 3 + [True]):
                arguments = (operands[-1], vectors[2], vectors[2].abs() + 1, *norm, wanted)
                torch.library.opcheck(ops.batch_norm_backward.default, arguments)
        for grad, residual in ((operands[-1], operands[-1]), (rows, rows)):
            arguments = (grad, *operands[:-1], residual, "hardswish", name, grad.dim() == 4)
            for wanted in ([True] * 4, [True, False, False, False], [False, True, False, True]):
                torch.library.opcheck(ops.epilogue_backward.default, (*arguments, wanted))

    def test_opcheck_packed_convolution(self, target):
        _, sites, _ = self.operands(target)
        with target.use():
            source = [sites.inverse.view(1, 1, 3, 4), sites.index, sites.count]
        rows, weight = integers(12, 4).to(target.device), integers(4, 1, 3, 3, seed=1).to(target.device)
        operands = (rows.requires_grad_(), weight.requires_grad_(), None, sites.mask, sites.index, sites.count)
        where = ((1, 1), (1, 1), (1, 1), 4, target.backend, "sparse")
        arguments = (*operands, [], source, None, None, None, "none", True, *where)
        torch.library.opcheck(torch.ops.dynconv.masked_conv2d.default, arguments)


def test_a_second_derivative_is_refused():
    sites = ActiveSites(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    output = epilogue(PackedFeatures(rows, sites), activation="silu")
    (first,) = torch.autograd.grad(output.sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="epilogue: differentiable once"):
        first.sum().backward()


def test_compiled_chain(target):
    """The whole chain in one graph, training and inference."""
    torch._dynamo.reset()

    def chain(x, mask, first, second, third):
        sites = ActiveSites(mask)
        read = sites.touched((6, 7), 3, 1, 1)
        hidden = masked_conv2d(x, first, mask=read, activation="relu6", packed=True)
        hidden = masked_conv2d(hidden, second, padding=1, groups=8, mask=sites, activation="relu6", packed=True)
        return masked_conv2d(hidden, third, mask=sites, residual=x, inactive=x)

    operands = [integers(*shape, seed=s).to(target.device) for s, shape in enumerate([(2, 4, 6, 7), (8, 4, 1, 1)])]
    operands += [integers(8, 1, 3, 3, seed=3).to(target.device), integers(4, 8, 1, 1, seed=4).to(target.device)]
    mask = random_mask(2, 6, 7).to(target.device)
    with target.use():
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        for requires_grad in (False, True):
            x, *weights = (t.detach().clone().requires_grad_(requires_grad) for t in operands)
            outputs = [call(x, mask, *weights) for call in (chain, compiled)]
            assert torch.equal(*outputs)
            if requires_grad:
                expected, actual = (torch.autograd.grad(output.sum(), [x, *weights]) for output in outputs)
                assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    torch._dynamo.reset()


def everything_finite(tensors):
    return all(t.isfinite().all() for t in tensors if t is not None and t.is_floating_point())


@pytest.fixture
def new_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("density", (0, 0.3, 1))
@pytest.mark.parametrize("groups", (1, 6))
def test_no_op_leaves_a_value_unwritten(target, groups, density, new_memory_is_nan):
    """Rows past the count and all other results, forward and backward, of the ops as graphs call them as well."""
    x, weight = integers(2, 6, 5, 5).to(target.device), integers(6, 6 // groups, 3, 3).to(target.device)
    vector, gate = integers(6).to(target.device), torch.full((2, 1, 5, 5), 0.5).to(target.device)
    mask = random_mask(2, 5, 5, density).to(target.device)
    results = []

    def leaf(tensor):
        return tensor.clone().requires_grad_()

    def note(*values):
        results.extend(v.rows if isinstance(v, PackedFeatures) else v for v in values)
        return values[0]

    name = target.backend
    with target.use():
        sites = ActiveSites(gate * mask)
        operands = [leaf(t) for t in (x, weight, vector, vector, x)]
        features = note(pack(operands[0], sites))
        features = note(masked_conv2d(features, *operands[1:3], 1, 1, 1, groups, mask=sites, packed=True))
        after = {"activation": "silu", "residual": pack(operands[4], sites), "packed": True}
        features = note(*batch_norm(features, *operands[2:4], **after))
        features = note(epilogue(features, shift=operands[3], activation="gelu", packed=True))
        dense = note(masked_conv2d(features, *operands[1:3], 1, 1, 1, groups, mask=sites))
        note(*torch.autograd.grad(dense.square().sum(), operands))
        # As a compiled graph calls them: with room for every site.
        ops, sets, nothing = torch.ops.dynconv, (mask, sites.index, sites.count), (None, None, None, None)
        packed = note(ops.pack(x, *sets, name))
        grad, wanted = torch.ones_like(packed), [True, True, False, True]
        where = ([1, 1], [1, 1], [1, 1], groups, name, "sparse")
        source = [sites.inverse.view(mask.shape), sites.index, sites.count]
        call = (packed, weight, vector, *sets, [], source, None)
        note(ops.masked_conv2d(*call, None, None, "none", True, *where))
        note(*ops.masked_conv2d_backward(grad, *call, *where, [True, True, True, False]))
        call = (packed, *sets, *nothing, packed)
        note(ops.epilogue(*call, None, "relu", True, name))
        note(*ops.epilogue_backward(grad, *call, "relu", name, False, wanted))
        call = (packed, *sets, *nothing[1:], packed)
        normalised = ops.batch_norm(*call, None, 1e-5, "relu", True, name)
        note(*normalised)
        note(*ops.batch_norm_backward(grad, *normalised[1:], *call, 1e-5, "relu", name, False, wanted))
    assert everything_finite(results)


def test_rows_that_are_too_few_are_refused():
    sites = ActiveSites(random_mask(1, 6, 7, 0.9))
    features = pack(integers(1, 5, 6, 7), sites)
    short = features._replace(rows=features.rows[:-1])
    with pytest.raises(ValueError, match="expected rows"):
        short.unpack()
    call = (short.rows, sites.mask, sites.index, sites.count, *[None] * 6, "none", False, "cpu")
    with pytest.raises(ValueError, match="expected rows"):
        torch.ops.dynconv.epilogue(*call)  # as a compiled graph calls it
    source = [sites.inverse.view(1, 1, 6, 7), sites.index, sites.count]
    operands = (features.rows, torch.zeros(5, 5, 1, 1), None, sites.mask, *source[1:], None, source, None)
    where = ([1, 1], [0, 0], [1, 1], 1, "cpu", "automatic")
    with pytest.raises(ValueError, match="residual: expected rows"):
        torch.ops.dynconv.masked_conv2d(*operands, short.rows, None, "none", True, *where)
