"""Floors: FLOPs against PyTorch's own count of the ops, bytes against counts by hand, tiles, ceilings, the command."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dynconv
from dynconv import roofline
from dynconv.__main__ import main
from dynconv._masks import blob_mask
from dynconv.cli.blocks import BlockBench
from dynconv.cli.floors import estimate, together
from dynconv.cli.layers import FILTERS, LAYERS, Block, Filter, Layer, Width
from dynconv.roofline import DATA_SHEETS, Device, Tiles, Work

ON = Device("test", 1e9, {"float32": 1e9}, {"float32": 5e8}, 0, "cpu")


def flops(call, *leaves):
    """FLOPs that PyTorch's counter finds in a call, and in the call with the gradients of the leaves."""
    found = []
    for wants in (False, True):
        operands = [leaf.detach().requires_grad_(wants) for leaf in leaves]
        with FlopCounterMode(display=False) as counter:
            output = call(*operands)
            if wants:
                torch.autograd.grad(output, operands, torch.ones_like(output))
        found.append(counter.get_total_flops())
    return found


def generator():
    return torch.Generator().manual_seed(0)


def test_masked_conv2d():
    mask = blob_mask(2, 5, 4, 0.4, generator())
    input, weight = torch.randn(2, 6, 9, 8), torch.randn(10, 3, 3, 3)
    options = dict(stride=2, padding=1, groups=2)
    works = [roofline.masked_conv2d(input.shape, weight.shape, mask, **options, mode=mode) for mode in roofline.MODES]
    plain, in_place, backward = works
    with dynconv.execution("sparse"):
        call = lambda x, w: dynconv.masked_conv2d(x, w, **options, mask=mask)
        assert flops(call, input, weight) == [plain.flops, backward.flops]
    active = int(mask.sum())
    read = len(dynconv.ActiveSites(mask).touched((9, 8), 3, 2, 1))
    weights, sites = 10 * 3 * 9, 2 * 5 * 4
    assert plain.bytes == 4 * (read * 6 + weights + sites * 10) + sites
    assert in_place == Work(plain.flops, 4 * (read * 6 + weights + active + active * 10))
    assert backward.bytes == plain.bytes + 4 * (active * 10 + read * 6 + weights + 2 * 72 * 6 + weights)
    # A stride beyond the kernel leaves pixels unread, with a mask or without.
    for some in (None, torch.ones(2, 1, 5, 4)):
        strided = roofline.masked_conv2d((2, 6, 9, 8), (10, 6, 1, 1), some, stride=2)
        assert strided.bytes == 4 * (2 * 20 * 6 + 60 + 2 * 20 * 10) + (0 if some is None else 40)
    dense = roofline.masked_conv2d(input.shape, weight.shape, **options)
    assert dense == Work(2 * sites * 10 * 3 * 9, 4 * (2 * 72 * 6 + weights + sites * 10))
    assert not roofline.masked_conv2d((1, 4, 5, 5), (4, 1, 3, 3), padding=1, groups=4).is_product


def test_gathered():
    ins, outs = torch.rand(3, 8, generator=generator()) < 0.5, torch.rand(3, 12, generator=generator()) < 0.5
    input, weight = torch.randn(3, 8, 6, 5), torch.randn(12, 8, 3, 3)
    call = lambda x, w: dynconv.gathered_conv2d(x, w, padding=1, in_mask=ins, out_mask=outs)
    shapes = input.shape, weight.shape
    plain, backward = (
        roofline.gathered_conv2d(*shapes, ins, outs, padding=1, mode=mode) for mode in ("plain", "backward")
    )
    assert flops(call, input, weight) == [plain.flops, backward.flops]
    # Of the weight the pairs that some sample keeps both of.
    weights = 9 * int(torch.stack([i[:, None] & o for i, o in zip(ins, outs)]).any(0).sum())
    assert plain.bytes == 4 * (int(ins.sum()) * 30 + weights + 3 * 12 * 30) + 3 * 20
    assert roofline.gathered_conv2d(*shapes, ins, padding=1).bytes == 4 * (
        int(ins.sum()) * 30 + int(ins.any(0).sum()) * 12 * 9 + 3 * 12 * 30
    ) + 3 * 8  # fmt: skip
    # A linear layer is a convolution of positions.
    linear = roofline.gathered_linear((3, 7, 8), (12, 8), ins, outs)
    assert linear.flops == flops(
        lambda x, w: dynconv.gathered_linear(x, w, in_mask=ins, out_mask=outs), torch.randn(3, 7, 8), torch.randn(12, 8)
    )[0]  # fmt: skip


def test_filters_of_pixels():
    input, filters, shares = torch.randn(2, 6, 5, 4), torch.randn(2, 18, 10, 8), torch.randn(2, 6, 3, 3)
    options = dict(kernel_size=3)
    call = lambda x, w, v: dynconv.dynamic_filter2d(x, w, channel_filters=v, padding=1, scale_factor=2, **options)
    plain, backward = (
        roofline.dynamic_filter2d(input.shape, filters.shape, channel_filters=True, mode=mode, **options)
        for mode in ("plain", "backward")
    )
    assert flops(call, input, filters, shares) == [plain.flops, backward.flops]
    operands = input.numel() + filters.numel() + shares.numel()
    assert plain.bytes == 4 * (operands + 2 * 6 * 80)
    assert backward.bytes == 4 * (3 * operands + 2 * 2 * 6 * 80)
    mask = blob_mask(2, 10, 8, 0.3, generator())
    some = roofline.dynamic_filter2d(input.shape, filters.shape, mask=mask, **options)
    assert some.flops == 2 * int(mask.sum()) * 6 * 9


def test_deformable():
    input, offset, weight = torch.randn(2, 6, 5, 4), torch.randn(2, 36, 5, 4), torch.randn(8, 3, 3, 3)
    mask = torch.randn(2, 18, 5, 4)
    shapes = input.shape, offset.shape
    conv = [roofline.deform_conv2d(*shapes, weight.shape, masked=True, mode=mode) for mode in ("plain", "backward")]
    call = lambda x, o, w, m: dynconv.deform_conv2d(x, o, w, mask=m, padding=1)
    assert flops(call, input, offset, weight, mask) == [work.flops for work in conv]
    operands = input.numel() + offset.numel() + weight.numel() + mask.numel()
    assert conv[0].bytes == 4 * (operands + 2 * 8 * 20)
    both = [roofline.deform_aggregate2d(*shapes, kernel_size=3, mode=mode) for mode in ("plain", "backward")]
    call = lambda x, o, w: dynconv.deform_aggregate2d(x, o, w, kernel_size=3, padding=1)
    assert flops(call, input, offset, mask) == [work.flops for work in both]
    assert both[0].bytes == 4 * (input.numel() + offset.numel() + mask.numel() + 2 * 6 * 20)


def test_floor():
    assert ON.floor(Work(2_000, 1_000), torch.float32) == (2e-6, "FLOPs")
    assert ON.floor(Work(500, 1_000), torch.float32) == (1e-6, "bytes")
    assert ON.floor(Work(2_000, 1_000, False), torch.float32) == (4e-6, "FLOPs")
    assert ON.floor(Work(2_000, 1_000), torch.float32, Tiles(0.5, 0.8)) == (5e-6, "FLOPs")
    # Where nobody knows the rate, the bytes are the floor.
    assert ON.floor(Work(2_000, 1_000), torch.float16) == (1e-6, "bytes")
    assert roofline.compaction((2, 1, 8, 8), 10) == Work(0, 168, False)
    # A quarter of the FLOPs, of which tiles waste half: half of the ideal.
    assert ON.predicted_share(Work(8_000, 0), Work(2_000, 0), torch.float32, tiles=Tiles(0.5)) == 0.5
    assert Work(1, 2).plus(Work(3, 4, False)) == Work(4, 6, False)


def test_tiles():
    assert roofline.fill(100, 64, (64, 64)) == Tiles(100 / 128, 1.0)
    # 2 * 2 tiles, three times, on 5 multiprocessors: three waves of 15 places.
    assert roofline.fill(100, 100, (64, 64), 5, 3) == Tiles(100 * 100 / (4 * 64 * 64), 12 / 15)
    rows, columns = torch.tensor([10, 20, 0]), torch.tensor([8, 3, 5])
    assert roofline.fill(rows, columns, (16, 8)) == Tiles(140 / (3 * 128), 1.0)
    assert roofline.fill(0, 64, (64, 64), 5) == Tiles()
    for sheet in DATA_SHEETS.values():
        rows, columns = roofline.conv_tile(64, 64, torch.bfloat16, sheet)
        assert rows in (64, 128, 256)
        assert columns == 64
    assert roofline.conv_tile(64, 64, torch.float32, ON)[0] == 6


def test_measured_ceilings():
    found = roofline.measure("cpu", [torch.float32, torch.float64], seconds=0.05)
    assert found.multiprocessors == 0
    assert 1e8 < found.copy < 1e13
    assert set(found.products) == {"float32", "float64"}
    assert all(1e8 < rate < 1e14 for rate in found.products.values())
    assert found.arithmetic == found.products
    assert json.dumps(found.record())
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got 'tpu'"):
        roofline.measure("tpu")
    with pytest.raises(ValueError, match="mode: expected one of plain, in-place, backward, got 'packed'"):
        roofline.masked_conv2d((1, 1, 3, 3), (1, 1, 3, 3), mode="packed")


@pytest.mark.parametrize("on", [ON, *DATA_SHEETS.values()], ids=lambda on: on.name)
def test_every_published_layer_has_a_floor(on):
    """The FLOPs are those that `bench` counts, and nothing is predicted beyond the ideal but for rounding."""
    for layer in (layer for layers in (*LAYERS.values(), *FILTERS.values()) for layer in layers):
        if isinstance(layer, Filter):
            assert estimate(layer, None, "backward", 1, torch.float32, on).predicted is None
            continue
        mask = layer.active(0.25, "blob", 1, generator())
        found = estimate(layer, mask, "plain", 1, torch.float32, on)
        full = estimate(layer, torch.ones_like(mask), "plain", 1, torch.float32, on)
        assert 0 < found.floor_ms <= full.floor_ms
        assert 0 < found.predicted <= 1.35  # a mask's tiles may waste less of the last wave than the dense ones
        assert full.predicted <= 1 + 1e-9
        if isinstance(layer, Block):
            maker = BlockBench(layer, 1, torch.float32, "cpu") if layer.height * layer.width < 1000 else None
            assert maker is None or found.flops / full.flops == pytest.approx(maker.work(mask))
        assert 0 < found.tiles.filled <= 1
        assert 0 < found.tiles.waves <= 1
        share = mask.float().mean().item()
        if isinstance(layer, Layer):
            assert found.flops == pytest.approx(share * full.flops)
        elif isinstance(layer, Width):
            ins, outs = mask[:, : layer.in_channels], mask[:, layer.in_channels :]
            assert found.flops / full.flops == pytest.approx((ins.float().mean() * outs.float().mean()).item())
    both = together([found, full])
    assert (both.flops, both.predicted) == (found.flops + full.flops, None)


def test_the_command(tmp_path, capsys):
    results = tmp_path / "roofline.json"
    options = ["--shapes", "resnet50", "dcn", "--layers", "7x7", "--density", "0.5", "--json", str(results)]
    assert main(["roofline", "--device", "H200", *options, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200 SXM: 4,800.0 GB/s" in printed
    assert "(data sheet)" in printed
    record = json.loads(results.read_text())
    assert {row["family"] for row in record["rows"]} == {"resnet50", "dcn"}
    assert record["ceilings"]["measured"] == []
