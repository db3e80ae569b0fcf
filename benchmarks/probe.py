"""Call one family of ops, forward and backward, for somebody who watches: a sanitizer, a CUDA graph, a compiler.

    python benchmarks/probe.py masked [--device cpu] [--graph] [--target sm_90]

Small, as sanitizers are slow; in float16 rows of whole 16-byte pieces, in float32 with single elements left over.
--graph captures the calls in a CUDA graph, replays it on other operands and expects the bits of calls without one.
--target compiles for a GPU that is not here.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dynconv
from dynconv._launches import TARGETS, recorded
from dynconv.nn import MaskedBottleneck

SIZE, FILTERS = (15, 13), 40


class Operands:
    """Random tensors of one element type; `renew` gives all of them other values, and masks other sites."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.channels = 64 if dtype == torch.float16 else 17
        self.generator = torch.Generator(device).manual_seed(0)
        self.leaves: list[Tensor] = []
        self.masks: list[tuple[Tensor, float]] = []

    def normal(self, *shape: int) -> Tensor:
        made = torch.randn(shape, device=self.device, generator=self.generator).to(self.dtype)
        self.leaves.append(made.requires_grad_())
        return made

    def mask(self, *shape: int, density: float = 0.4) -> Tensor:
        made = torch.rand(shape, device=self.device, generator=self.generator) < density
        self.masks.append((made, density))
        return made

    def renew(self) -> None:
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.normal_(generator=self.generator)
            for mask, density in self.masks:
                mask.copy_(torch.rand(mask.shape, device=self.device, generator=self.generator) < density)


def masked(make: Operands, is_depthwise: bool = False) -> Callable[[], Tensor]:
    groups, outputs = (make.channels, make.channels) if is_depthwise else (1, FILTERS)
    input, weight = make.normal(2, make.channels, *SIZE), make.normal(outputs, make.channels // groups, 3, 3)
    bias = make.normal(outputs)
    gate, sites = make.normal(2, 1, 8, 7), make.mask(2, 1, 8, 7)
    return lambda: dynconv.masked_conv2d(input, weight, bias, 2, 1, groups=groups, mask=torch.where(sites, gate, 0))


def in_place(make: Operands) -> Callable[[], Tensor]:
    input, weight = make.normal(2, make.channels, *SIZE), make.normal(FILTERS, make.channels, 3, 3)
    sites, cache = make.mask(2, 1, *SIZE), make.normal(2, FILTERS, *SIZE)

    @torch.no_grad()
    def call() -> Tensor:
        return dynconv.masked_conv2d(
            input, weight, None, 1, 1, mask=sites, out=cache.clone(memory_format=torch.channels_last)
        )

    return call


def gathered(make: Operands) -> Callable[[], Tensor]:
    input, weight = make.normal(2, make.channels, *SIZE), make.normal(FILTERS, make.channels, 3, 3)
    bias, sites = make.normal(FILTERS), make.mask(2, 1, *SIZE)
    ins, outs = make.mask(2, make.channels, density=0.5), make.mask(2, FILTERS, density=0.5)
    return lambda: dynconv.gathered_conv2d(input, weight, bias, 1, 1, in_mask=ins, out_mask=outs, mask=sites)


def linear(make: Operands) -> Callable[[], Tensor]:
    input, weight, bias = make.normal(6, make.channels), make.normal(FILTERS, make.channels), make.normal(FILTERS)
    ins, outs = make.mask(6, make.channels, density=0.5), make.mask(6, FILTERS, density=0.5)
    return lambda: dynconv.gathered_linear(input, weight, bias, in_mask=ins, out_mask=outs)


def filters(make: Operands) -> Callable[[], Tensor]:
    input, made, sites = make.normal(2, make.channels, *SIZE), make.normal(2, 9, *SIZE), make.mask(2, 1, *SIZE)
    options = dict(kernel_size=3, padding=1, normalization="softmax")
    return lambda: dynconv.dynamic_filter2d(input, made, **options, mask=sites)


def deform(make: Operands) -> Callable[[], Tensor]:
    input, weight, bias = (
        make.normal(2, make.channels, *SIZE),
        make.normal(FILTERS, make.channels, 3, 3),
        make.normal(FILTERS),
    )
    offset, weights = make.normal(2, 18, *SIZE), make.normal(2, 9, *SIZE)
    return lambda: dynconv.deform_conv2d(input, offset, weight, bias, 1, 1, mask=weights)


def aggregate(make: Operands) -> Callable[[], Tensor]:
    input, offset, weights = make.normal(2, make.channels, *SIZE), make.normal(2, 18, *SIZE), make.normal(2, 9, *SIZE)
    return lambda: dynconv.deform_aggregate2d(input, offset, weights, kernel_size=3, padding=1)


def block(make: Operands) -> Callable[[], Tensor]:
    """A bottleneck in inference: packed rows between its layers, and their epilogues."""
    module = dynconv.prepare(MaskedBottleneck(32, 8).eval().to(make.device, make.dtype))
    input, sites = make.normal(2, 32, *SIZE), make.mask(2, 1, *SIZE)
    return torch.no_grad()(lambda: module(input, sites))


FAMILIES = {
    "masked": masked, "depthwise": functools.partial(masked, is_depthwise=True), "in-place": in_place,
    "gathered": gathered, "linear": linear, "filters": filters, "deform": deform, "aggregate": aggregate,
    "block": block,
}  # fmt: skip


def results(call: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of what it depends on."""
    output = call()
    if not output.requires_grad:
        return [output]
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


def captured(call: Callable[[], Tensor], make: Operands) -> Iterator[bool]:
    """Replay a CUDA graph of the call on three sets of operands: for each, whether the bits are the call's own."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and lets autograd and the libraries set themselves up
        for _ in range(3):
            results(call, make.leaves)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(call, make.leaves)
    for _ in range(3):
        make.renew()
        graph.replay()
        replayed = [tensor.clone() for tensor in found]
        yield all(torch.equal(*pair) for pair in zip(replayed, results(call, make.leaves), strict=True))


def main() -> int:
    """Make the calls; 1 if a replayed graph has other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--target", choices=TARGETS)
    arguments = parser.parse_args()
    wrong = 0
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        make = Operands("cpu" if arguments.target else arguments.device, dtype)
        call = FAMILIES[arguments.family](make)
        if arguments.target:
            with recorded(arguments.target) as launches, torch.no_grad():
                call()
            print(name, "compiled:", " ".join(f"{one.name} ({one.seconds:.1f} s)" for one in launches))
        elif arguments.graph:
            same = list(captured(call, make))
            wrong += same.count(False)
            print(name, f"{same.count(True)} of {len(same)} replays have the bits of calls without a graph")
        else:
            print(name, "results:", *(list(tensor.shape) for tensor in results(call, make.leaves)))
            if make.device == "cuda":
                torch.cuda.synchronize()
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
