"""Calls as a CUDA graph captures them: on tensors that stay and are overwritten, which is all that may change."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dynconv
from dynconv import (
    ActiveChannels,
    ActiveSites,
    deform_aggregate2d,
    deform_conv2d,
    dynamic_filter2d,
    gathered_conv2d,
    gathered_linear,
    masked_conv2d,
    nn,
)
from dynconv.gating import ChannelGate, SlimmableGate, TopKGate, bounds_loss, budget_loss
from dynconv.nn import GatheredBottleneck, MaskedBottleneck, MaskedInvertedResidual

# How much a mask keeps: nothing, a few, everything.
DENSITIES = (0.0, 0.3, 1.0)


@dataclass
class Case:
    """A call with the tensors that it reads.

    Attributes:
        tensors: by name: floating ones, and bool masks; those that want a gradient are leaves.
        forward: their result.
        parameters: what wants a gradient beside them, and keeps its values.
    """

    tensors: dict[str, Tensor]
    forward: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()

    def __post_init__(self):
        self.leaves = [tensor for tensor in self.tensors.values() if tensor.requires_grad] + [*self.parameters]

    @property
    def has_masks(self) -> bool:
        return any(name == "gate" or tensor.dtype == torch.bool for name, tensor in self.tensors.items())

    def run(self) -> list[Tensor]:
        """The result, and the gradients of the leaves of its sum of squares."""
        if not self.leaves:
            with torch.no_grad():
                return [self.forward(**self.tensors)]
        result = self.forward(**self.tensors)
        return [result.detach(), *torch.autograd.grad(result.square().sum(), self.leaves)]

    def refill(self, density: float) -> None:
        """Other values in place, from the CPU's generator: inputs at random, masks that keep about that share."""
        for name, tensor in self.tensors.items():
            keeps, values = torch.rand(tensor.shape) < density, torch.randn(tensor.shape) / 2
            if tensor.dtype == torch.bool:
                values = keeps
            elif name == "gate":
                values *= keeps
            tensor.detach().copy_(values)


def _case(forward: Callable[..., Tensor], device, training: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> Case:
    """Tensors of these shapes, masks where a name ends in "mask"; those named in `training` want a gradient."""
    tensors = {}
    for name, shape in shapes.items():
        dtype = torch.bool if name.endswith("mask") else torch.float32
        made = torch.zeros(shape, dtype=dtype, device=device)
        tensors[name] = made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made
    for name in training:
        tensors[name].requires_grad_()
    return Case(tensors, forward)


X, W, BIAS, MASK, KEPT = (2, 16, 4, 4), (16, 16, 3, 3), (16,), (2, 1, 4, 4), (2, 16)


def _masked(x, w, b, mask):
    return masked_conv2d(x, w, b, padding=1, mask=mask, activation="relu", residual=x, inactive=1.5)


def _masked_training(x, w, b, mask):
    return masked_conv2d(x, w, b, padding=1, mask=mask)


def _gate(x, w, gate):
    return masked_conv2d(x, w, padding=1, stride=2, mask=gate)


def _chain(x, w, v, mask):
    """Sites made within the capture, of the mask as it is then, and shared."""
    sites = ActiveSites(mask)
    rows = masked_conv2d(x, v, mask=sites.touched((4, 4), 3, padding=1), packed=True, activation="relu")
    return masked_conv2d(rows, w, padding=1, mask=sites)


def _depthwise(x, w, mask):
    return masked_conv2d(x, w, padding=1, groups=16, mask=mask)


def _in_place(x, w, out, mask):
    return masked_conv2d(x, w, padding=1, mask=mask, out=out)


def _gathered(x, w, b, in_mask, out_mask, mask):
    return gathered_conv2d(x, w, b, padding=1, in_mask=in_mask, out_mask=out_mask, mask=mask)


def _gathered_chain(x, w, v, in_mask):
    kept = ActiveChannels(in_mask)
    return gathered_conv2d(gathered_conv2d(x, v, out_mask=kept, packed=True, groups=2), w, padding=1)


def _linear(x, w, b, in_mask, out_mask):
    return gathered_linear(x, w, b, in_mask=in_mask, out_mask=out_mask)


def _filter(x, f, mask):
    return dynamic_filter2d(x, f, kernel_size=3, padding=1, normalization="softmax", mask=mask)


def _channel_filter(x, f, c):
    return dynamic_filter2d(x, f, kernel_size=3, padding=1, channel_filters=c)


def _deform(x, offset, w, weights):
    return deform_conv2d(x, offset, w, padding=1, mask=weights)


def _aggregate(x, offset, weights):
    return deform_aggregate2d(x, offset, weights, kernel_size=3, padding=1)


def _block(make: Callable[[], torch.nn.Module], prepared: bool = False, training: bool = False):
    def build(device) -> Case:
        torch.manual_seed(0)
        block = make().to(device).to(memory_format=torch.channels_last).train(training)
        if prepared:
            dynconv.prepare(block)
        gathered = isinstance(block, GatheredBottleneck)
        shape = (2, 8) if gathered else MASK
        # A block in training also moves its statistics, by each call: what it returns does not depend on them.
        case = _case(block, device, ("x",) if training else (), x=(2, 32, 4, 4), mask=shape)
        return Case(case.tensors, lambda x, mask: block(x, mask), tuple(block.parameters()) if training else ())

    return build


def _layer(make: Callable[[], torch.nn.Module], forward=lambda layer, **tensors: layer(**tensors), **shapes):
    """A layer of `dynconv.nn` in training."""

    def build(device) -> Case:
        layer = make().to(device).to(memory_format=torch.channels_last)
        case = _case(layer, device, tuple(name for name in shapes if not name.endswith("mask")), **shapes)
        return Case(case.tensors, lambda **tensors: forward(layer, **tensors), tuple(layer.parameters()))

    return build


def _selectors(device) -> Case:
    """Gates that choose channels, and the losses that train them."""
    selectors = ChannelGate(16, 16), TopKGate(16, 16, 5), SlimmableGate(16, 16, [4, 8, 16])
    for selector in selectors:
        selector.to(device).eval()  # training draws noise, other numbers at each call

    def forward(x, w):
        chosen = [selector(x) for selector in selectors]
        losses = budget_loss([each.rate for each in chosen], 0.5, [1, 2, 3]), bounds_loss([chosen[0].rate, 1], 0.5, 0.5)
        kept = [gathered_conv2d(x, w, padding=1, in_mask=each.channels) for each in chosen]
        return sum(kept) + sum(losses)

    return _case(forward, device, ("x", "w"), x=X, w=W)


def _of(forward, training=(), **shapes):
    return lambda device: _case(forward, device, training, **shapes)


_OFFSET, _FILTERS = (2, 18, 4, 4), (2, 9, 4, 4)
# By name: what makes a case on a device.
CASES: dict[str, Callable[[object], Case]] = {
    "masked": _of(_masked, x=X, w=W, b=BIAS, mask=MASK),
    "masked, training": _of(_masked_training, ("x", "w", "b"), x=X, w=W, b=BIAS, mask=MASK),
    "masked, gate": _of(_gate, ("x", "w", "gate"), x=X, w=W, gate=(2, 1, 2, 2)),
    "masked, chain": _of(_chain, x=X, w=W, v=(16, 16, 1, 1), mask=MASK),
    "masked, chain, training": _of(_chain, ("x", "w", "v"), x=X, w=W, v=(16, 16, 1, 1), mask=MASK),
    "masked, in place": _of(_in_place, x=X, w=W, out=X, mask=MASK),
    "depthwise, training": _of(_depthwise, ("x", "w"), x=X, w=(16, 1, 3, 3), mask=MASK),
    "gathered": _of(_gathered, x=X, w=W, b=BIAS, in_mask=KEPT, out_mask=KEPT, mask=MASK),
    "gathered, training": _of(_gathered, ("x", "w", "b"), x=X, w=W, b=BIAS, in_mask=KEPT, out_mask=KEPT, mask=MASK),
    "gathered, chain, training": _of(_gathered_chain, ("x", "w", "v"), x=X, w=W, v=(16, 8, 1, 1), in_mask=KEPT),
    "linear, training": _of(_linear, ("x", "w", "b"), x=(2, 3, 16), w=(16, 16), b=BIAS, in_mask=KEPT, out_mask=KEPT),
    "dynamic filter, training": _of(_filter, ("x", "f"), x=X, f=_FILTERS, mask=MASK),
    "channel filter, training": _of(_channel_filter, ("x", "f", "c"), x=X, f=_FILTERS, c=(2, 16, 3, 3)),
    "deform, training": _of(_deform, ("x", "offset", "w", "weights"), x=X, offset=_OFFSET, w=W, weights=_FILTERS),
    "aggregate, training": _of(_aggregate, ("x", "offset", "weights"), x=X, offset=_OFFSET, weights=_FILTERS),
    "selectors, training": _selectors,
    "bottleneck": _block(lambda: MaskedBottleneck(32, 8)),
    "bottleneck, prepared": _block(lambda: MaskedBottleneck(32, 8), prepared=True),
    "bottleneck, training": _block(lambda: MaskedBottleneck(32, 8), training=True),
    "inverted residual": _block(lambda: MaskedInvertedResidual(32, 32, 1, 2)),
    "gathered bottleneck": _block(lambda: GatheredBottleneck(32, 8)),
    "gathered bottleneck, training": _block(lambda: GatheredBottleneck(32, 8), training=True),
}


def _packed(layer, input, mask):
    sites = ActiveSites(mask)
    return layer(dynconv.pack(input, sites), activation="silu").unpack(activation="relu", residual=input, inactive=0.5)


def _packed_channels(layer, input, mask, channels_mask):
    kept = ActiveChannels(channels_mask, (2, 16), granularity=4)
    return layer(dynconv.pack(input, kept), mask).unpack()


def _boxes(layer, input, boxes_mask):
    """Of rectangles: the mask only says where those that count are."""
    boxes = boxes_mask * torch.arange(1, 6, device=input.device)
    return layer(input, ActiveSites.from_boxes(boxes, (2, 4, 4)))


# Layers, for what only asks what waits and what is compiled: their values are compared elsewhere.
LAYERS: dict[str, Callable[[object], Case]] = {
    "MaskedConv2d, granularity": _layer(
        lambda: nn.MaskedConv2d(16, 16, 3, padding=1),
        lambda layer, input, mask: layer(input, ActiveSites(mask, (2, 4, 4), granularity=2)),
        input=X, mask=(2, 1, 2, 2),
    ),
    "MaskedConv2d, boxes": _layer(lambda: nn.MaskedConv2d(16, 16, 3, padding=1), _boxes, input=X, boxes_mask=(3, 5)),
    "MaskedBatchNorm2d": _layer(lambda: nn.MaskedBatchNorm2d(16), _packed, input=X, mask=MASK),
    "GatheredBatchNorm2d": _layer(
        lambda: nn.GatheredBatchNorm2d(16), _packed_channels, input=X, mask=MASK, channels_mask=(2, 4)
    ),
    "MaskedBasicBlock, dense statistics": _layer(
        lambda: nn.MaskedBasicBlock(16, 16, statistics="dense"), input=X, mask=MASK
    ),
    "DynamicFilter2d": _layer(lambda: nn.DynamicFilter2d(16, 3, padding=1), input=X, mask=MASK),
    "Involution2d": _layer(lambda: nn.Involution2d(16, 3, group_channels=8), input=X, mask=MASK),
    "CARAFE": _layer(lambda: nn.CARAFE(16), input=X, mask=(2, 1, 8, 8)),
    "DDF": _layer(lambda: nn.DDF(16), input=X, mask=MASK),
    "DDFUp": _layer(lambda: nn.DDFUp(16), input=X),
    "PacPool2d": _layer(lambda: nn.PacPool2d(3, padding=1), input=X, guidance=(2, 4, 4, 4)),
    "DeformConv2d": _layer(lambda: nn.DeformConv2d(16, 16, 3, padding=1), input=X, offset=(2, 18, 4, 4)),
    "DCNv2": _layer(lambda: nn.DCNv2(16, 16, 3, padding=1), input=X),
    "DCNv4": _layer(lambda: nn.DCNv4(64), input=(2, 64, 4, 4)),
}  # fmt: skip
