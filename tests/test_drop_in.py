"""Drop-in: what PyTorch's functions accept is accepted with the same value, what they refuse is refused by name."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynconv
from dynconv import (
    ActiveChannels,
    ActiveSites,
    backend,
    deform_aggregate2d,
    deform_conv2d,
    dynamic_filter2d,
    gathered_conv2d,
    gathered_linear,
    masked_conv2d,
)

BACKENDS = ("cpu", "reference")
EVERYWHERE = (*BACKENDS, pytest.param("triton", marks=pytest.mark.gpu))
WHOLE = torch.ones(1, 1, 1, 1, dtype=torch.bool)
# Each with a mask that keeps all, which does not change the value, and without one.
CONVOLUTIONS = {
    "masked": lambda *a, **k: masked_conv2d(*a, mask=WHOLE, **k),
    "masked, no mask": masked_conv2d,
    "gathered": lambda *a, **k: gathered_conv2d(*a, out_mask=WHOLE[0, 0], **k),
    "gathered, no mask": gathered_conv2d,
}
SIZES = {
    "int": 2, "numpy int64": np.int64(2), "numpy uint8": np.uint8(2), "one in a tensor": torch.tensor(2),
    "tuple of one": (2,), "list of one": [2], "Size of one": torch.Size([2]), "pair": (1, 2), "list": [1, 2],
    "Size": torch.Size([1, 2]), "numpy in a tuple": (np.int64(1), np.int32(2)), "zero": 0, "negative": -1,
    "zero in a pair": (0, 1), "bool": True, "numpy bool": np.True_, "pair of bools": (True, True), "float": 2.0,
    "pair of floats": (2.0, 2.0), "numpy float": np.float64(2), "three": (1, 1, 1), "none": (), "None": None,
    "str": "2", "str in a tuple": ("same",), "numpy array": np.array([1, 2]), "range": range(1, 3), "dict": {1: 1},
}  # fmt: skip


def integers(*shape: int) -> torch.Tensor:
    """Small whole numbers, so that every backend gives the same bits."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def outcome(function, *arguments, **keywords):
    """The result, or None where the arguments are refused."""
    try:
        return function(*arguments, **keywords)
    except (TypeError, ValueError, RuntimeError):
        return None


@pytest.mark.parametrize("op", CONVOLUTIONS)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
def test_takes_and_refuses_the_sizes_that_conv2d_does(op, name):
    input, weight = integers(2, 4, 8, 9), integers(4, 2 if name == "groups" else 4, 3, 3)
    forms = {**SIZES, "same": "same", "valid": "valid"} if name == "padding" else SIZES
    # Whatever is right comes first: what is refused must not pass for its like, which is remembered.
    for form in forms.values():
        expected = outcome(F.conv2d, input, weight, **{name: form})
        if expected is not None:
            assert torch.equal(CONVOLUTIONS[op](input, weight, **{name: form}), expected), form
    for form in forms.values():
        if outcome(F.conv2d, input, weight, **{name: form}) is None:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
                CONVOLUTIONS[op](input, weight, **{name: form})


@pytest.mark.parametrize("kind", [dynconv.nn.MaskedConv2d, dynconv.nn.GatheredConv2d])
def test_modules_take_the_sizes_that_conv2d_does(kind):
    input = integers(2, 4, 8, 9)
    for form in (np.int64(2), (2,), [2], [1, 2], torch.Size([2]), np.array([1, 2]), range(1, 3)):
        keywords = dict(kernel_size=2, stride=form, padding=form, dilation=form, groups=np.int64(2))
        dense = nn.Conv2d(4, 4, **keywords, dtype=torch.float64)
        layer = kind(4, 4, **keywords, dtype=torch.float64)
        layer.load_state_dict(dense.state_dict())
        expected = dense(input)
        torch.testing.assert_close(layer(input), expected)
        # The mask of a gathered layer's second argument is one of input channels.
        whole = WHOLE if kind is dynconv.nn.MaskedConv2d else WHOLE[0, 0]
        torch.testing.assert_close(kind.from_dense(dense)(input, whole), expected)


@pytest.mark.parametrize("size", [np.int64(3), np.uint8(3)])
def test_filters_of_pixels_take_numpy_sizes(size):
    input = integers(1, 4, 6, 6)
    filters = integers(1, 9, 6, 6)
    expected = dynamic_filter2d(input, filters, kernel_size=3, padding=1)
    assert torch.equal(dynamic_filter2d(input, filters, kernel_size=(size,), padding=[np.int64(1)]), expected)
    assert dynamic_filter2d(
        input, filters, kernel_size=size, padding=1, stride=2, scale_factor=np.int32(2)
    ).shape == (1, 4, 6, 6)  # fmt: skip
    for layer in (
        dynconv.nn.DynamicFilter2d(np.int64(4), size, padding=1), dynconv.nn.Involution2d(np.int64(16), size),
        dynconv.nn.CARAFE(np.int64(4), np.int64(2), size), dynconv.nn.DDF(np.int64(8), size),
        dynconv.nn.DCNv2(4, np.int64(4), size, padding=1), dynconv.nn.DCNv4(np.int64(4), size),
        dynconv.nn.PacPool2d((size,)),
    ):  # fmt: skip
        assert all(type(v) is not type(size) for v in vars(layer).values())


@pytest.mark.parametrize("used", EVERYWHERE)
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_takes_one_image_as_conv2d_does(used, op):
    """[C, H, W] in, [C, H, W] out: values and every gradient are those of a batch of one."""
    mask, keep = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0, 2, 3])
    image = {
        "masked": dict(mask=mask.round(), inactive=integers(4, 6, 5), activation="relu"),
        "masked, no mask": dict(residual=integers(4, 6, 5)),
        "gathered": dict(in_mask=keep, out_mask=keep > 1, mask=mask[0] > 0.5, residual=integers(4, 1, 5)),
        "gathered, no mask": dict(activation="relu"),
    }[op]
    run = masked_conv2d if op.startswith("masked") else gathered_conv2d
    device = "cuda" if used == "triton" and torch.cuda.is_available() else "cpu"
    image = {name: value if name == "activation" else value.to(device) for name, value in image.items()}
    results = []
    for batch in (False, True):
        leaves = {
            name: value.clone().requires_grad_()
            for name, value in image.items()
            if name != "activation" and value.dtype != torch.bool
        }
        operands = [integers(*shape).to(device).requires_grad_() for shape in ((4, 6, 5), (4, 4, 3, 3), (4,))]
        with backend(used):
            input = operands[0][None] if batch else operands[0]
            result = run(input, *operands[1:], padding=1, **{**image, **leaves})
        (result.square().sum() / 8).backward()
        results.append([result[0] if batch else result, *(t.grad for t in (*operands, *leaves.values()))])
    assert results[0][0].shape == (4, 6, 5)
    for alone, in_batch in zip(*results, strict=True):
        assert alone is not None and torch.equal(alone, in_batch)
    if op == "masked, no mask":
        assert torch.equal(results[0][0], F.conv2d(*operands, padding=1).add(image["residual"]))


@pytest.mark.parametrize("used", BACKENDS)
def test_updates_one_image_in_place(used):
    input, weight, mask = integers(4, 6, 5), integers(3, 4, 3, 3), torch.rand(6, 5) < 0.5
    before = integers(6, 5, 3).permute(2, 0, 1)
    out = before.clone(memory_format=torch.preserve_format)
    with backend(used), torch.no_grad():
        assert masked_conv2d(input, weight, padding=1, mask=mask, out=out) is out
    assert torch.equal(out, torch.where(mask, F.conv2d(input, weight, padding=1), before))
    with pytest.raises(ValueError, match=r"out: expected shape \[Cout, Ho, Wo\]"):
        masked_conv2d(input, weight, padding=1, mask=mask, out=out[None])


@pytest.mark.parametrize("used", BACKENDS)
def test_takes_one_sample_as_linear_does(used):
    input, weight, bias = integers(16).requires_grad_(), integers(5, 16), integers(5)
    keep = integers(16)
    with backend(used):
        assert torch.equal(gathered_linear(input, weight, bias), F.linear(input, weight, bias))
        result = gathered_linear(input, weight, bias, in_mask=keep, out_mask=torch.ones(1, 5) > 0)
    expected = F.linear(input * keep, weight, bias)
    assert torch.equal(result, expected)
    assert torch.equal(*(torch.autograd.grad(r.square().sum(), input)[0] for r in (result, expected)))


def test_a_ponder_map_counts_one_image():
    layer, mask = dynconv.nn.MaskedConv2d(4, 4, 3, padding=1).double(), torch.rand(6, 5) < 0.5
    with dynconv.ponder_map() as ponder:
        layer(layer(IMAGE[0], mask))
    assert torch.equal(ponder.count(), mask.float().add(1).view(1, 1, 6, 5))


@pytest.mark.parametrize("kind", [dynconv.nn.MaskedConv2d, dynconv.nn.GatheredConv2d])
def test_modules_take_one_image(kind):
    modes = ("zeros", "reflect", "circular") if kind is dynconv.nn.MaskedConv2d else ("zeros",)
    for mode in modes:
        layer = kind(4, 3, 3, padding=1, padding_mode=mode).double()
        input = integers(4, 6, 5)
        torch.testing.assert_close(layer(input), nn.Conv2d.forward(layer, input))
        whole = torch.ones(6, 5) > 0 if kind is dynconv.nn.MaskedConv2d else torch.ones(4) > 0
        torch.testing.assert_close(layer(input, whole), nn.Conv2d.forward(layer, input))


IMAGE, SITES, CHANNELS = integers(2, 4, 6, 5), torch.ones(2, 1, 6, 5) > 0, torch.ones(2, 4) > 0
KERNEL = integers(4, 4, 3, 3)
# The error, by its beginning and the cure it names, of each call that is natural to try and cannot be right.
REFUSED = {
    "uint8 mask": (r"mask: .*uint8 \(\.bool\(\)", lambda: masked_conv2d(IMAGE, KERNEL, padding=1, mask=SITES.byte())),
    "int mask": (
        r"mask: .*int64 \(\.bool\(\)",
        lambda: dynamic_filter2d(IMAGE, IMAGE, kernel_size=2, padding="same", mask=SITES.long()),
    ),
    "numpy mask": ("mask: .*from_numpy", lambda: masked_conv2d(IMAGE, KERNEL, padding=1, mask=SITES.numpy())),
    "mask [N, H, W]": (
        r"mask: .*unsqueeze\(1\)", lambda: masked_conv2d(IMAGE, KERNEL, padding=1, mask=SITES[:, 0]),
    ),
    "sites [N, H, W]": (r"mask: .*unsqueeze\(1\)", lambda: ActiveSites(SITES[:, 0])),
    "gathered mask [N, H, W]": (
        r"mask: .*unsqueeze\(1\)", lambda: gathered_conv2d(IMAGE, KERNEL, padding=1, mask=SITES[:, 0]),
    ),
    "mask of the input's size": (
        r"mask: .*\[2, 1, 3, 3\], got \[2, 1, 6, 5\].*of the output, not of the input",
        lambda: masked_conv2d(IMAGE, KERNEL, padding=1, stride=2, mask=SITES),
    ),
    "mask of every channel": (
        "mask: .*one channel", lambda: masked_conv2d(IMAGE, KERNEL, padding=1, mask=SITES.expand(-1, 4, -1, -1)),
    ),
    "size of four": (r"size: expected \(N, Ho, Wo\)", lambda: ActiveSites(SITES, SITES.shape)),
    "channels [N, C, 1, 1]": (
        r"in_mask: .*flatten\(1\)", lambda: gathered_conv2d(IMAGE, KERNEL, in_mask=CHANNELS[:, :, None, None]),
    ),
    "channels [C, 1, 1]": (
        r"in_mask: .*flatten\(\)", lambda: gathered_conv2d(IMAGE, KERNEL, in_mask=CHANNELS[0, :, None, None]),
    ),
    "size of one": (r"size: expected \(N, Ho, Wo\), got 2", lambda: ActiveSites(SITES, 2)),
    "size of a map": (r"size: expected \(N, C\), got \(2, 4, 6, 5\)", lambda: ActiveChannels(CHANNELS, IMAGE.shape)),
    "uint8 channels": (r"out_mask: .*\.bool\(\)", lambda: gathered_conv2d(IMAGE, KERNEL, out_mask=CHANNELS.byte())),
    "numpy channels": (
        "in_mask: .*from_numpy", lambda: gathered_conv2d(IMAGE, KERNEL, in_mask=CHANNELS.numpy()),
    ),
    "numpy input": ("input: .*from_numpy", lambda: masked_conv2d(IMAGE.numpy(), KERNEL)),
    "numpy input, gathered": ("input: .*from_numpy", lambda: gathered_conv2d(IMAGE.numpy(), KERNEL)),
    "numpy weight": ("weight: .*from_numpy", lambda: masked_conv2d(IMAGE, KERNEL.numpy())),
    "numpy to a layer": ("input: .*from_numpy", lambda: dynconv.nn.DDF(8)(IMAGE.numpy())),
    "numpy to pack": ("input: .*from_numpy", lambda: dynconv.pack(IMAGE.numpy(), ActiveChannels(CHANNELS))),
    "packed of one image": (
        r"packed: .*unsqueeze\(0\)", lambda: masked_conv2d(IMAGE[0], KERNEL, padding=1, mask=SITES[0], packed=True),
    ),
    "packed channels of one image": (
        r"packed: .*unsqueeze\(0\)", lambda: gathered_conv2d(IMAGE[0], KERNEL, out_mask=CHANNELS[0], packed=True),
    ),
    "one image, dynamic filters": (
        r"input: .*unsqueeze\(0\)", lambda: dynamic_filter2d(IMAGE[0], IMAGE[0], kernel_size=2),
    ),
    "one image, deformable": (
        r"input: .*unsqueeze\(0\)", lambda: deform_conv2d(IMAGE[0], IMAGE[0], KERNEL),
    ),
    "one image, aggregation": (
        r"input: .*unsqueeze\(0\)", lambda: deform_aggregate2d(IMAGE[0], IMAGE[0], IMAGE[0], kernel_size=3),
    ),
    "one image, layer of filters": (r"input: .*unsqueeze\(0\)", lambda: dynconv.nn.CARAFE(4)(IMAGE[0].float())),
    "a video": (r"input: expected shape \[N, Cin, H, W\] or \[Cin", lambda: masked_conv2d(IMAGE[None], KERNEL)),
    "two dimensions": (
        r"input: expected shape \[N, Cin, H, W\] or \[Cin", lambda: gathered_conv2d(IMAGE[0, 0], KERNEL),
    ),
    "dense features to a packed layer": (
        "features: expected PackedFeatures .*dynconv.pack", lambda: dynconv.nn.MaskedBatchNorm2d(4)(IMAGE.float()),
    ),
    "inactive that does not broadcast": (
        r"inactive: expected a shape that broadcasts to \[2, 4, 6, 5\]",
        lambda: masked_conv2d(IMAGE, KERNEL, padding=1, mask=SITES, inactive=IMAGE[:, :3]),
    ),
    "residual of too many dimensions": (
        "residual: expected a shape that broadcasts",
        lambda: masked_conv2d(IMAGE, KERNEL, padding=1, mask=SITES, residual=IMAGE[None]),
    ),
    "out that broadcasts": (
        r"out: expected shape \[2, 4, 6, 5\]",
        lambda: masked_conv2d(IMAGE, KERNEL, padding=1, mask=SITES, out=IMAGE[:, :1]),
    ),
    "a bool for inactive": ("inactive: .*bool", lambda: masked_conv2d(IMAGE, KERNEL, mask=WHOLE, inactive=True)),
    "truth of sites": ("truth of ActiveSites is ambiguous", lambda: ActiveSites(SITES) or None),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_the_cure(case):
    message, call = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_shared_masks_broadcast_as_tensors_do():
    """[1, H, W] and [H, W] are one mask for all samples: there it is right, with any number of samples."""
    mask = torch.rand(6, 5) < 0.5
    for samples in (1, 2, 6):
        input = integers(samples, 4, 6, 5)
        expected = torch.where(mask, F.conv2d(input, KERNEL, padding=1), 0)
        for shape in ((6, 5), (1, 6, 5), (1, 1, 6, 5)):
            assert torch.equal(masked_conv2d(input, KERNEL, padding=1, mask=mask.view(shape)), expected)


@pytest.mark.parametrize("used", BACKENDS)
@pytest.mark.parametrize("op", ["masked", "gathered", "unpack"])
@pytest.mark.parametrize("shape", [(), (5,), (6, 1), (4, 1, 1), (1, 4, 1, 1), (2, 1, 1, 1), (1, 1, 6, 5), (2, 4, 6, 1)])
def test_inactive_and_residual_broadcast(used, op, shape):
    """Their gradients are those of the same operands expanded, added up."""
    mask = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    results = []
    for expand in (False, True):
        residual, inactive = integers(*shape).requires_grad_(), (integers(*shape) + 1).requires_grad_()
        whole = (2, 4, 6, 5) if expand else shape
        finish = dict(residual=residual.expand(whole), inactive=inactive.expand(whole), activation="relu")
        with backend(used):
            if op == "unpack":
                result = dynconv.pack(IMAGE, ActiveSites(mask)).unpack(**finish)
            else:
                run = masked_conv2d if op == "masked" else gathered_conv2d
                result = run(IMAGE, KERNEL, padding=1, mask=mask, **finish)
        result.square().sum().backward()
        results.append((result, residual.grad, inactive.grad))
    dense = IMAGE if op == "unpack" else F.conv2d(IMAGE, KERNEL, padding=1)
    assert torch.equal(results[0][0], torch.where(mask, (dense + residual).relu(), inactive))
    for broadcast, wanted in zip(*results, strict=True):
        assert broadcast.shape == wanted.shape and torch.equal(broadcast, wanted)


@pytest.mark.parametrize("used", BACKENDS)
@pytest.mark.parametrize("value", [0, -1.5, float("-inf"), np.float32(2)])
def test_inactive_may_be_a_number(used, value):
    mask = torch.rand(2, 1, 6, 5) < 0.5
    expected = torch.where(mask, F.conv2d(IMAGE, KERNEL, padding=1), value)
    with backend(used):
        assert torch.equal(masked_conv2d(IMAGE, KERNEL, padding=1, mask=mask, inactive=value), expected)
        assert torch.equal(gathered_conv2d(IMAGE, KERNEL, padding=1, mask=mask, inactive=value), expected)
        half = masked_conv2d(IMAGE.half(), KERNEL.half(), padding=1, mask=mask, inactive=value)
    assert half.dtype == torch.float16 and torch.equal(half, torch.where(mask, half, value))


@pytest.mark.parametrize("part", [np.s_[:, :1], np.s_[:1], np.s_[..., :1], np.s_[:1, :1, :1, :1]], ids=str)
def test_a_residual_that_broadcasts_from_out_is_refused_or_read_before_it_is_overwritten(part):
    mask = torch.rand(2, 1, 6, 5) < 0.7
    before = FORMATS["channels_last"](IMAGE)
    expected = torch.where(mask, F.conv2d(IMAGE, KERNEL, padding=1) + before[part], before)
    packed = masked_conv2d(IMAGE, KERNEL, padding=1, mask=ActiveSites(mask), packed=True)
    out = before.clone(memory_format=torch.preserve_format)
    for run in (masked_conv2d, lambda *a, mask, padding, **k: packed.unpack(**k)):
        out.copy_(before)
        result = outcome(run, IMAGE, KERNEL, padding=1, mask=mask, residual=out[part], out=out)
        assert torch.equal(out, before if result is None else expected)


FORMATS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("used", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_without_a_mask_the_memory_format_is_that_of_conv2d(used, format):
    layers = [
        kind(4, 4, 3, padding=1, bias=bias, dtype=torch.float64)
        for kind in (dynconv.nn.MaskedConv2d, dynconv.nn.GatheredConv2d)
        for bias in (True, False)
    ]
    layers.append(dynconv.nn.MaskedBasicBlock(4, 4).double().eval())
    layers.append(dynconv.nn.GatheredBasicBlock(4, 4).double().eval())
    layers.append(copy.deepcopy(layers[0]).to(memory_format=torch.channels_last))
    input = FORMATS[format](IMAGE)
    for layer in layers:
        dense = nn.Conv2d.forward(layer, input) if isinstance(layer, nn.Conv2d) else dense_block(layer, input)
        with backend(used):
            result = layer(input)
        assert torch.equal(result, dense) and result.stride() == dense.stride()


def dense_block(block: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """The basic block of torchvision."""
    result = block.bn1(block.conv1(input)).relu()
    return (block.bn2(block.conv2(result)) + input).relu()


def test_without_a_mask_compiled_strides_are_the_real_ones():
    run = lambda x, w: (masked_conv2d(x, w, activation="relu"), gathered_conv2d(x, w, residual=x[:, :1, :1, :1]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for format in ("contiguous", "channels_last"):
        input = FORMATS[format](IMAGE)
        for actual, expected in zip(compiled(input, KERNEL), run(input, KERNEL), strict=True):
            assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def test_one_image_and_broadcasts_compile():
    def run(input, mask, inactive):
        image = masked_conv2d(input[0], KERNEL, padding=(1,), mask=mask[0], inactive=-1.0)
        return image, masked_conv2d(input, KERNEL, padding=[1], mask=ActiveSites(mask), inactive=inactive)

    operands = (IMAGE, torch.rand(2, 1, 6, 5) < 0.5, integers(4, 1, 1))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)(*operands)
    for actual, expected in zip(compiled, run(*operands), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_sites_and_channels_move_to_a_device(gated):
    """Meta tensors stand for another device: they have one of their own, and no values."""
    mask = torch.rand(2, 1, 6, 5)
    mask = mask.requires_grad_() if gated else mask < 0.5
    keep = torch.rand(2, 4).requires_grad_() if gated else CHANNELS
    for active in (ActiveSites(mask), ActiveChannels(keep)):
        assert active.to("cpu") is active and active.to(torch.device("cpu"), non_blocking=True) is active
        assert not active.inverse.is_meta  # made before; must not stay behind
        moved = active.to("meta")
        assert type(moved) is type(active) and moved.shape == active.shape
        tensors = [moved.mask, moved.index, moved.count, moved.inverse] + [moved.gate] * gated
        assert all(t.is_meta for t in tensors)
        assert (moved.gate is None) != gated
        if gated:
            assert moved.gate.requires_grad and moved.gate.grad_fn is not None
        assert not active.mask.is_meta and not active.inverse.is_meta


@pytest.mark.parametrize("used", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("made", ["inside", "derived inside", "mask inside"])
def test_sites_of_inference_mode_train(used, gated, made):
    """Sites, channels, masks and whatever is derived from them in inference mode serve a backward pass outside."""
    torch.manual_seed(0)
    mask, keep = (torch.rand(shape).round() for shape in ((2, 1, 6, 5), (2, 4)))
    mask, keep = (mask, keep) if gated else (mask > 0, keep > 0)
    channelwise, filters = integers(4, 1, 3, 3), integers(2, 9, 6, 5)

    def run(sites, channels, input, weight):
        packed = masked_conv2d(input, weight, padding=1, mask=sites, packed=True)
        gathered = gathered_conv2d(input, weight, in_mask=channels, out_mask=channels, packed=True)
        return [
            masked_conv2d(packed, weight, padding=1, mask=sites, activation="relu"),
            masked_conv2d(input, channelwise.clone().requires_grad_(), padding=1, groups=4, mask=sites),
            dynamic_filter2d(input, filters, kernel_size=3, padding=1, mask=sites),
            gathered_conv2d(gathered, weight, out_mask=channels),
            gathered_linear(input[:, :, 0, 0], weight[:, :, 0, 0], in_mask=channels, out_mask=channels),
        ]

    def train(sites, channels):
        input, weight = IMAGE.clone().requires_grad_(), KERNEL.clone().requires_grad_()
        results = run(sites, channels, input, weight)
        sum(result.square().sum() for result in results).backward()
        return [*results, input.grad, weight.grad]

    with backend(used):
        expected = train(ActiveSites(mask), ActiveChannels(keep))
        sites, channels = ActiveSites(mask), ActiveChannels(keep)
        with torch.inference_mode():
            if made == "inside":
                sites, channels = ActiveSites(mask), ActiveChannels(keep)
            elif made == "mask inside":
                sites, channels = mask.clone(), keep.clone()
            run(sites, channels, IMAGE, KERNEL)
        for actual, wanted in zip(train(sites, channels), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_a_gate_keeps_its_graph_through_inference_mode():
    gate = torch.rand(2, 1, 6, 5, dtype=torch.float64).requires_grad_()
    with torch.inference_mode():
        sites = ActiveSites(gate)
    result = masked_conv2d(IMAGE, KERNEL, padding=1, mask=sites)
    (grad,) = torch.autograd.grad(result.sum(), gate)
    torch.testing.assert_close(grad, F.conv2d(IMAGE, KERNEL, padding=1).sum(1, keepdim=True))


def test_empty_sites_are_not_none():
    nothing = ActiveSites(SITES & False)
    assert len(nothing) == 0
    assert not masked_conv2d(IMAGE, KERNEL, padding=1, mask=nothing).any()
    assert ActiveChannels(CHANNELS & False) and dynconv.pack(IMAGE, nothing)


@pytest.mark.parametrize(
    "densities", [0.5, 1, np.float32(0.5), [0.5], (0.5, 0.5), np.array([0.5, 1]), torch.tensor([0.5])]
)
def test_calibrates_at_a_number_or_some(densities):
    layer = dynconv.nn.MaskedConv2d(4, 4, 3, padding=1)
    try:
        found = dynconv.calibrate(
            lambda: layer(IMAGE.float(), SITES), densities=densities, seconds=0.0, store=False
        )  # fmt: skip
    finally:
        dynconv.calibration.forget()
    assert len(found) == 1


@pytest.mark.parametrize(
    "densities, error",
    [
        ("0.5", TypeError), (None, TypeError), (["0.5"], TypeError), (True, TypeError), ([[0.5]], TypeError),
        ((), ValueError), (0, ValueError), (1.5, ValueError), (float("nan"), ValueError),
        ([0.5, float("nan")], ValueError),
    ],
)  # fmt: skip
def test_calibration_refuses_other_densities(densities, error):
    with pytest.raises(error, match=r"^densities: expected"):
        dynconv.calibrate(lambda: pytest.fail("run"), densities=densities)


@pytest.mark.parametrize(
    "kind, dense",
    [
        (dynconv.nn.MaskedConv2d, nn.Conv2d),
        (dynconv.nn.GatheredConv2d, nn.Conv2d),
        (dynconv.nn.GatheredLinear, nn.Linear),
    ],
)
def test_constructors_have_the_signature_of_what_they_replace(kind, dense):
    assert inspect.signature(kind).parameters == inspect.signature(dense).parameters


def test_sites_and_layers_pickle():
    sites = pickle.loads(pickle.dumps(ActiveSites(SITES)))
    layer = copy.deepcopy(dynconv.nn.MaskedConv2d(4, 4, 3, padding=1).double())
    copied = pickle.loads(pickle.dumps(layer))
    assert torch.equal(copied(IMAGE, sites), layer(IMAGE, SITES))


def huge(channels, height, width, dtype=torch.float32):
    """A map of that many pixels, in no memory."""
    return torch.zeros(1, dtype=dtype).expand(1, channels, height, width)


BIG, ONE = 2**16, torch.ones(1, 1, 1, 1)  # BIG x BIG pixels are more than int32 can number
KEPT = ONE[0, 0].bool()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("input", lambda: masked_conv2d(huge(1, BIG, BIG), ONE, stride=2**8, mask=huge(1, 256, 256, torch.bool))),
        (
            "mask",
            lambda: masked_conv2d(huge(1, 4, 4), ONE, padding=BIG, mask=huge(1, 2 * BIG + 4, 2 * BIG + 4, torch.bool)),
        ),
        ("input", lambda: gathered_conv2d(huge(1, BIG, BIG), ONE, in_mask=KEPT)),
        ("padding", lambda: gathered_conv2d(huge(1, 4, 4), ONE, padding=BIG, out_mask=KEPT)),
        ("input", lambda: dynamic_filter2d(huge(1, BIG, BIG), huge(1, 256, 256), kernel_size=1, stride=2**8)),
        (
            "filters",
            lambda: dynamic_filter2d(huge(1, BIG, BIG // 4), huge(1, 2 * BIG, BIG // 2), kernel_size=1, scale_factor=2),
        ),
        ("input", lambda: deform_conv2d(huge(1, BIG, BIG), huge(2, 256, 256), ONE, stride=2**8)),
        ("offset", lambda: deform_conv2d(huge(1, 4, 4), huge(2, 2 * BIG + 4, 2 * BIG + 4), ONE, padding=BIG)),
    ],
)
def test_maps_that_int32_cannot_number_are_refused(name, call):
    """Kernels number pixels and sites in int32: beyond them an address would be that of another pixel."""
    with pytest.raises(ValueError, match=rf"^{name}: expected fewer than 2\^31"):
        call()
