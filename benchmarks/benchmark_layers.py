"""Masked and gathered layers against PyTorch's dense ones: pytest benchmarks --benchmark-only.

Each group holds one layer at one density in one mode: dense, and dynconv, whose result is checked first. A few
layers by default, all with DYNCONV_BENCHMARKS=full. On a GPU use `python -m dynconv bench --device cuda`, which
times with the GPU's own clock.
"""

import os

import pytest
import torch
from layers import LAYERS, modes_of

from dynconv import execution
from dynconv.cli.bench import BATCH, DENSITIES, MODES, WIDTH_BATCH, check_mode, prepare
from dynconv.cli.layers import Width

FULL = os.environ.get("DYNCONV_BENCHMARKS") == "full"


def cases():
    """(layer, density, mode, who); without FULL a few layers at two densities."""
    layers = [layer for family in LAYERS.values() for layer in family]
    if not FULL:
        layers = [*LAYERS["resnet50"][:4], *LAYERS["sige-ddpm"][1:], *LAYERS["laudnet"][:4]]
    for layer in layers:
        densities = layer.densities or DENSITIES
        for density in densities if FULL else (densities[len(densities) // 2], densities[-1]):
            for mode in modes_of(layer, MODES):
                group = f"{layer.family} {layer.name} {density:g} {mode}".replace("->", "to").replace(" ", "-")
                for who in CALLS:
                    yield pytest.param(layer, density, mode, group, who, id=f"{group}-{who}")


def dense(bench, check, mask, mode):
    if mode == "backward":
        return lambda: bench.gradients(bench.dense, 0)
    return lambda: bench.dense(0)


def dynconv(bench, check, mask, mode):
    _, failure = check_mode(bench, check, mask, mode)
    assert failure is None, failure
    if mode == "backward":
        return lambda: bench.gradients(bench.sparse, 0, mask)
    if mode == "plain":
        return lambda: bench.sparse(0, mask)
    sites = bench.compact(mask)
    return lambda: bench.sparse(0, sites, bench.caches[0])


CALLS = {"dense": dense, "dynconv": dynconv}


@pytest.mark.parametrize("layer, density, mode, group, who", list(cases()))
def test_layer(layer, density, mode, group, who, benchmark):
    usual = WIDTH_BATCH if isinstance(layer, Width) else BATCH
    bench, check = prepare(layer, layer.batch or usual["cpu"], torch.float32, "cpu")
    mask = layer.active(density, "blob", bench.batch, bench.generator)
    benchmark.group = group
    benchmark.extra_info.update(density=mask.float().mean().item(), ideal=1 / bench.work(mask))
    with execution("sparse"), torch.set_grad_enabled(mode == "backward"):  # whatever is calibrated here
        call = CALLS[who](bench, check, mask, mode)
        call()
        benchmark.pedantic(call, rounds=7, warmup_rounds=1)
