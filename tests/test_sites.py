"""ActiveSites: order, count, inverse, neighbour table and the pixels that a mask reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dynconv
from dynconv import ActiveSites


def random_mask(n, height, width, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, height, width, generator=generator) < density


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 1, 1), (2, 7, 5), (3, 40, 33)], ids=str)
def test_index_is_ordered_and_inverse_undoes_it(target, shape, density):
    mask = random_mask(*shape, density).to(target.device)
    with target.use():
        sites = ActiveSites(mask)
        expected = mask.flatten().nonzero().flatten()
        assert len(sites) == expected.numel()
        assert sites.index.dtype == torch.int32 and sites.index.shape == (mask.numel(),)
        assert torch.equal(sites.index[: len(sites)].long(), expected)
        inverse = torch.full_like(sites.index, -1)
        inverse[expected] = torch.arange(expected.numel(), dtype=torch.int32, device=target.device)
        assert torch.equal(sites.inverse, inverse)
        assert sites.shape == shape
        assert sites.density == pytest.approx(expected.numel() / max(1, mask.numel()))


def test_compaction_across_many_blocks(target):
    mask = random_mask(3, 97, 101, 0.3).to(target.device)
    with target.use():
        sites = ActiveSites(mask)
    assert torch.equal(sites.index[: len(sites)].long(), mask.flatten().nonzero().flatten())


def table_by_definition(mask, input_size, kernel, stride, padding, dilation):
    height, width = input_size
    rows = []
    for n, oy, ox in mask[:, 0].nonzero().tolist():
        row = []
        for ky in range(kernel[0]):
            for kx in range(kernel[1]):
                y = oy * stride[0] - padding[0] + ky * dilation[0]
                x = ox * stride[1] - padding[1] + kx * dilation[1]
                inside = 0 <= y < height and 0 <= x < width
                row.append((n * height + y) * width + x if inside else -1)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, kernel[0] * kernel[1])


pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))


@settings(max_examples=40, deadline=None)
@given(
    size=pairs(1, 7), kernel=pairs(1, 4), stride=pairs(1, 3), padding=pairs(0, 3), dilation=pairs(1, 2),
    seed=st.integers(0, 99), backend=st.sampled_from(["cpu", "triton"]),
)  # fmt: skip
def test_neighbours_and_touched_follow_their_definition(size, kernel, stride, padding, dilation, seed, backend):
    output = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in zip(size, kernel, stride, padding, dilation)]
    if min(output) < 1 or any(s + 2 * p < d * (k - 1) + 1 for s, k, p, d in zip(size, kernel, padding, dilation)):
        return
    mask = random_mask(2, *output, 0.4, seed)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    with dynconv.backend(backend):
        sites = ActiveSites(mask.to(device))
        table = sites.neighbours(size, kernel, stride, padding, dilation)
        expected = table_by_definition(mask, size, kernel, stride, padding, dilation)
        assert torch.equal(table[: len(sites)].cpu(), expected)
        touched = torch.zeros(2 * size[0] * size[1], dtype=torch.bool)
        touched[expected[expected >= 0].long()] = True
        assert torch.equal(sites.touched(size, kernel, stride, padding, dilation).mask.cpu().flatten(), touched)


def test_tables_are_made_once():
    sites = ActiveSites(random_mask(1, 6, 6, 0.5))
    assert sites.neighbours((6, 6), 3, 1, 1) is sites.neighbours((6, 6), (3, 3), (1, 1), "same")
    assert sites.touched((6, 6), 3, 1, 1) is sites.touched((6, 6), 3, padding=1)
    assert sites.inverse is sites.inverse


@pytest.mark.parametrize(
    ("mask", "size", "error", "match"),
    [
        ([1, 0], None, TypeError, "mask: expected a bool or floating tensor, got list"),
        (torch.ones(1, 1, 2, 2, dtype=torch.int64), None, TypeError, "mask: .*got torch.int64"),
        (torch.ones(2, 2, dtype=torch.bool), None, ValueError, r"mask: expected shape \[N, 1, Ho, Wo\]"),
        (torch.ones(1, 3, 2, 2, dtype=torch.bool), None, ValueError, r"mask: expected shape \[N, 1, Ho, Wo\]"),
        (torch.ones(1, 1, 2, 3, dtype=torch.bool), (1, 2, 2), ValueError, r"broadcasts to \[1, 1, 2, 2\]"),
        (torch.ones(1, 1, 1, 2, 2, dtype=torch.bool), (1, 2, 2), ValueError, "broadcasts to"),
        (torch.ones(1, 1, 1, 1, dtype=torch.bool), (2**11, 2**10, 2**10), ValueError, r"fewer than 2\^31"),
    ],
    ids=["list", "int64", "2-d", "channels", "width", "5-d", "too-many"],
)
def test_bad_masks_are_refused(mask, size, error, match):
    with pytest.raises(error, match=match):
        ActiveSites(mask, size)


def test_sites_of_another_geometry_are_refused():
    with pytest.raises(ValueError, match=r"mask: expected \[4, 4\] sites"):
        ActiveSites(random_mask(1, 6, 6, 0.5)).neighbours((6, 6), 3)


def test_broadcast_masks_expand_to_every_site():
    sites = ActiveSites(torch.tensor([True, False]).view(2, 1, 1, 1), (2, 3, 4))
    assert sites.shape == (2, 3, 4) and len(sites) == 12 and sites.density == 0.5


def test_gate_keeps_its_graph_and_its_zeros_are_inactive():
    gate = torch.tensor([0.0, 0.5, -0.0, 2.0]).view(1, 1, 2, 2).requires_grad_()
    sites = ActiveSites(gate)
    assert sites.index[: len(sites)].tolist() == [1, 3]
    assert sites.gate.requires_grad


@pytest.mark.parametrize("cell", [1, 2, 3, (4, 1), (5, 7)], ids=str)
def test_a_coarser_grid(target, cell):
    """Each cell stands for a patch of sites; the last ones are cut where the size is no multiple."""
    vertical, horizontal = (cell, cell) if isinstance(cell, int) else cell
    size = (2, 10, 7)
    coarse = random_mask(2, -(-10 // vertical), -(-7 // horizontal), 0.5).to(target.device)
    expected = torch.zeros(2, 1, 10, 7, dtype=torch.bool, device=target.device)
    for n, y, x in coarse[:, 0].nonzero().tolist():
        expected[n, 0, y * vertical : (y + 1) * vertical, x * horizontal : (x + 1) * horizontal] = True
    with target.use():
        assert torch.equal(ActiveSites(coarse, size, granularity=cell).mask, expected)
        one = ActiveSites(coarse[:1, :, :1, :1].expand(1, 1, 1, 1), size, granularity=cell)
    assert one.mask.all() == coarse[0, 0, 0, 0] and one.shape == size


def test_a_coarse_gate_sums_its_gradient_over_the_patch(target):
    gate = torch.tensor([[[[2.0, 0.0], [0.5, 1.0]]]], device=target.device, requires_grad=True)
    with target.use():
        sites = ActiveSites(gate, (1, 4, 3), granularity=2)
    sites.gate.sum().backward()
    assert torch.equal(gate.grad.cpu(), torch.tensor([[[[4.0, 2.0], [4.0, 2.0]]]]))
    assert len(sites) == 4 + 4 + 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-2, 9)] * 5), max_size=5))
def test_boxes(boxes):
    size = (3, 7, 6)
    expected = torch.zeros(3, 1, 7, 6, dtype=torch.bool)
    for n, top, left, bottom, right in boxes:
        if 0 <= n < 3:
            expected[n, 0, max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    sites = ActiveSites.from_boxes(torch.tensor(boxes, dtype=torch.int64).view(-1, 5), size)
    assert torch.equal(sites.mask, expected)


def test_bad_grids_and_boxes_are_refused():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"size: expected \(N, Ho, Wo\) beside a granularity"):
        ActiveSites(mask, granularity=2)
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \[1, 1, 3, 2\]"):
        ActiveSites(mask, (1, 5, 4), granularity=2)
    with pytest.raises(ValueError, match="granularity: expected values of at least 1, got 0"):
        ActiveSites(mask, (1, 4, 4), granularity=0)
    with pytest.raises(TypeError, match=r"boxes: expected a tensor of int32 or int64, got torch\.float32"):
        ActiveSites.from_boxes(torch.zeros(1, 5), (1, 4, 4))
    with pytest.raises(ValueError, match=r"boxes: expected shape \[K, 5\], got \[1, 4\]"):
        ActiveSites.from_boxes(torch.zeros(1, 4, dtype=torch.int64), (1, 4, 4))
    none = torch.zeros(0, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"size: expected \(N, Ho, Wo\), got \(4, 4\)"):
        ActiveSites.from_boxes(none, (4, 4))
    with pytest.raises(ValueError, match=r"mask: expected fewer than 2\^31 sites"):
        ActiveSites.from_boxes(none, (1, 2**16, 2**15))


def test_touched_pixels_of_a_kernel_wider_than_the_image(target):
    """Whole columns of taps lie in the padding; nothing outside of the map may be written."""
    for width, kernel, padding in ((1, 9, 8), (3, 17, 16), (2, 40, 39)):
        mask = torch.ones(2, 1, 1, width + 2 * padding - kernel + 1, dtype=torch.bool, device=target.device)
        with target.use():
            touched = ActiveSites(mask).touched((1, width), (1, kernel), 1, (0, padding))
        assert touched.mask.all() and touched.shape == (2, 1, width)


def byte_mask(shape, one, seed=0):
    """A bool tensor whose true elements are the byte `one`."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5).byte().mul(one).view(torch.bool)


X, WEIGHT = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3)
BASIC = dynconv.nn.MaskedBasicBlock(8, 8).eval().requires_grad_(False)
INVERTED = dynconv.nn.MaskedInvertedResidual(8, 8, 1, 2).eval().requires_grad_(False)


def conv(mask, **keywords):
    return dynconv.masked_conv2d(X, WEIGHT, None, 1, 1, mask=mask, **keywords)


def gathered(**keywords):
    return dynconv.gathered_conv2d(X, WEIGHT, None, 1, 1, **keywords)


OF_SITES = {
    "masked_conv2d": conv,
    "masked_conv2d inactive": lambda mask: conv(mask, inactive=X, residual=X),
    "masked_conv2d out": lambda mask: conv(mask, out=X.clone(memory_format=torch.channels_last)),
    "masked_conv2d packed": lambda mask: conv(mask, packed=True).unpack(),
    "gathered_conv2d": lambda mask: gathered(mask=mask, residual=X),
    "dynamic_filter2d": lambda mask: dynconv.dynamic_filter2d(X, X[:, :1], kernel_size=1, mask=mask),
    "shared": lambda mask: conv(ActiveSites(mask)),
    "pack": lambda mask: dynconv.pack(X, ActiveSites(mask)).unpack(),
    "sites": lambda mask: ActiveSites(mask).mask.view(torch.uint8),
    "touched": lambda mask: ActiveSites(mask).touched((9, 9), 3, padding=1).mask.view(torch.uint8),
    "coarse": lambda mask: ActiveSites(mask[..., :5, :5], (2, 9, 9), granularity=2).mask.view(torch.uint8),
    "basic block": lambda mask: BASIC(X, mask),
    "inverted residual": lambda mask: INVERTED(X.clone(memory_format=torch.channels_last), mask),
}
OF_CHANNELS = {
    "gathered_conv2d in": lambda mask: gathered(in_mask=mask),
    "gathered_conv2d out": lambda mask: gathered(out_mask=mask, packed=True).unpack(),
    "gathered_linear": lambda mask: dynconv.gathered_linear(
        X[..., 0, 0], WEIGHT[..., 0, 0], in_mask=mask, out_mask=mask
    ),
    "channels": lambda mask: dynconv.ActiveChannels(mask).mask.view(torch.uint8),
    "from_groups": lambda mask: dynconv.ActiveChannels.from_groups(mask.repeat_interleave(8, 1)).mask.view(torch.uint8),
}


@pytest.mark.parametrize("one", (2, 255))
@pytest.mark.parametrize("mode", ("sparse", "dense"))
@pytest.mark.parametrize("with_grad", (False, True))
@pytest.mark.parametrize("call", [*OF_SITES, *OF_CHANNELS])
def test_any_byte_but_zero_is_true(call, with_grad, mode, one):
    """A view of a byte image as bool: NumPy's masks come so."""
    run, shape = (OF_SITES[call], (2, 1, 9, 9)) if call in OF_SITES else (OF_CHANNELS[call], (2, 8))
    with dynconv.execution(mode), torch.set_grad_enabled(with_grad):
        for _ in range(2):  # the second time from what is remembered
            assert torch.equal(run(byte_mask(shape, one)), run(byte_mask(shape, 1)))


@pytest.mark.parametrize("packed", (False, True))
def test_tables_do_not_pile_up_over_frames(packed):
    """Sites that stay, a region of interest, and a source of features that is new in every frame."""
    roi = ActiveSites(random_mask(1, 12, 12, 0.5))
    weight = torch.randn(8, 1, 3, 3).requires_grad_()  # depthwise: with tables of readers for the backward as well
    kept = ("_tables", "_packed_tables", "_reader_tables", "_touched")

    def frame(seed):
        source = ActiveSites(random_mask(1, 12, 12, 0.5, seed))
        features = dynconv.pack(torch.randn(1, 8, 12, 12).requires_grad_(), source)
        for _ in range(2):
            dynconv.masked_conv2d(features, weight, None, 1, 1, 1, 8, mask=roi, packed=packed)
        return [len(getattr(roi, name)) for name in kept]

    held = [frame(seed) for seed in range(300)]
    assert held[0] == [0, 1, 1, 0]  # two layers share a frame's tables
    assert held[-1] == held[50] and max(held[-1]) <= 16


def test_a_floating_mask_that_skips_nothing_is_told():
    logits = torch.randn(2, 1, 9, 9)
    with pytest.warns(UserWarning, match="keeps all that is not zero"):
        conv(logits.sigmoid())
    with pytest.warns(UserWarning, match="keeps all that is not zero"):
        gathered(out_mask=torch.rand(2, 8) + 0.1)
    for silent in (torch.ones(2, 1, 9, 9), logits.sigmoid() * (logits > 0), torch.zeros(2, 1, 9, 9), logits[:0]):
        ActiveSites(silent)
    with dynconv.explain() as explanation:
        conv(torch.ones(2, 1, 9, 9))
    assert explanation.decisions[0].density == 1
    assert "no mask skips anything" in str(explanation)
