"""The Triton launchers of gathered convolution against the dense reference: interpreted where there is no GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_kernels import DEVICE, NOT_A_SITE, channels_last, dtypes, integers

from dynconv import ActiveChannels, kernels, reference

gathered_conv, compaction = kernels.gathered_conv, kernels.compaction

pytestmark = pytest.mark.gpu


def random_channels(n, channels, granularity, seed):
    """About half of them; of three samples or more one keeps none, and another all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, math.ceil(channels / granularity), generator=generator) < 0.5
    mask = mask.repeat_interleave(granularity, 1)[:, :channels].clone()
    if n > 2:
        mask[seed % n], mask[(seed + 1) % n] = False, True
    return ActiveChannels(mask.to(DEVICE))


def pack(dense, channels, capacity):
    """[N, capacity, H, W]: the kept channels of each sample, then NaN: it is not to be used."""
    packed = dense.new_full((len(dense), capacity, *dense.shape[2:]), torch.nan)
    for sample, count in enumerate(channels.count.tolist()):
        packed[sample, :count] = dense[sample, channels.index[sample, :count].long()]
    return channels_last(packed)


def unpack(packed, channels, background, listed):
    """background with the packed channels in their places. Columns past count have to be zeros at the listed sites."""
    dense = background.clone()
    listed = torch.ones_like(background[:, :1], dtype=torch.bool) if listed is None else listed
    for sample, count in enumerate(channels.count.tolist()):
        past = packed[sample, count:]
        assert torch.equal(past.isnan(), ~listed[sample].expand_as(past)) and not past.nan_to_num().any()
        dense[sample, channels.index[sample, :count].long()] = packed[sample, :count]
    return dense


def listed(mask):
    """(index, starts) of the active sites of a mask [N, 1, H, W]; what lies past the last one is not to be used."""
    _, index, count, _ = compaction.compact(mask)
    index[count.item() :] = NOT_A_SITE
    starts = F.pad(mask.flatten(1).sum(1).cumsum(0), (1, 0)).int()
    return index, starts


class Case:
    """Operands of one gathered convolution, and its dense results in fp64.

    What is not kept, and what only sites not listed would read, is NaN. `packed` names what is packed: "", "input",
    "output" or "input+output"; the grad goes with the output.
    """

    def __init__(
        self, n=3, cin=5, cout=7, size=(3, 4), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
        granularity=1, density=None, packed="", spare=1, gated=False, residual=False, activation="none",
        dtype=torch.float32,
    ):  # fmt: skip
        self.geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        self.size, self.kernel, self.granularity, self.dtype, self.activation = (
            size,
            kernel,
            granularity,
            dtype,
            activation,
        )
        self.ins, self.outs = random_channels(n, cin, granularity, 3), random_channels(n, cout, granularity, 4)
        self.weight = integers(cout, cin // groups, *kernel, dtype=dtype, seed=1)
        self.bias = integers(cout, dtype=dtype, seed=2)
        self.gate = integers(n, cout, dtype=dtype, low=1, seed=6) if gated else None
        shape = F.conv2d(torch.zeros(n, cin, *size), torch.zeros(self.weight.shape), **self.geometry).shape
        self.site_size = tuple(shape[2:])
        self.grad = self.poisoned(integers(*shape, dtype=dtype, seed=5), self.outs)
        self.cache = channels_last(integers(*shape, dtype=dtype, seed=7))
        self.residual = channels_last(integers(*shape, dtype=dtype, low=-9, high=9, seed=8)) if residual else None
        self.input = self.poisoned(integers(n, cin, *size, dtype=dtype), self.ins)
        self.active = None
        if density is not None:
            generator = torch.Generator().manual_seed(9)
            self.active = (torch.rand(n, 1, *self.site_size, generator=generator) < density).to(DEVICE)
            self.active[0] = False
            self.grad = channels_last(torch.where(self.active, self.grad, torch.nan))
            if residual:
                self.residual = channels_last(torch.where(self.active, self.residual, torch.nan))
            reads = compaction.Reads(size, kernel, stride, padding, dilation)
            self.touched = compaction.compact(self.active, reads=reads, with_mask=True).mask
            self.input = channels_last(torch.where(self.touched, self.input, torch.nan))
        self.packed_source, self.packed_out = "input" in packed, "output" in packed
        self.capacity = [
            min(max(kept.count.tolist(), default=0) + spare, kept.shape[1]) for kept in (self.ins, self.outs)
        ]

    @staticmethod
    def poisoned(tensor, channels):
        return channels_last(torch.where(channels.mask[:, :, None, None], tensor, torch.nan))

    @property
    def computed(self):
        """bool [N, Cout, Ho, Wo]: where the output is a product."""
        kept = self.outs.mask[:, :, None, None].expand(self.cache.shape)
        return kept if self.active is None else kept & self.active

    def rows(self):
        return None if self.active is None else listed(self.active)

    def common(self):
        return dict(
            input_size=self.size, site_size=self.site_size, **self.geometry, packed_source=self.packed_source,
            packed_out=self.packed_out, granularity=self.granularity, allow_tf32=False,
        )  # fmt: skip

    def sets(self):
        return (self.ins.index, self.ins.count), (self.outs.index, self.outs.count)

    def as_packed(self, tensor, side):
        kept = (self.ins, self.outs)[side]
        is_packed = (self.packed_source, self.packed_out)[side]
        return pack(tensor, kept, self.capacity[side]) if is_packed else tensor

    def expected_output(self):
        operands = (self.input.nan_to_num().double(), self.weight.double(), self.bias.double())
        result = reference.gathered_conv2d(*operands, **self.geometry, in_mask=self.ins, out_mask=self.outs)
        if self.gate is not None:
            result = result * self.gate.double()[:, :, None, None]
        if self.residual is not None:
            result = result + self.residual.double()
        result = getattr(F, self.activation)(result) if self.activation != "none" else result
        # Of a packed output, which has no others, the test's background stands at the others.
        written = self.computed if self.packed_out else torch.ones_like(result, dtype=torch.bool)
        written = written if self.active is None else written & self.active
        return torch.where(written, result, self.cache.double())

    def actual_output(self, aliased=False):
        background = self.cache
        if aliased:
            background = self.residual
            if self.active is not None:
                background = torch.where(self.active, background, self.cache)
        out = self.as_packed(channels_last(background.clone()), 1)
        residual = None if self.residual is None else out if aliased else self.as_packed(self.residual, 1)
        gathered_conv.forward(
            self.as_packed(self.input, 0), self.weight, self.bias, self.gate, residual, out, *self.sets(), self.rows(),
            activation=self.activation, **self.common(),
        )  # fmt: skip
        return unpack(out, self.outs, self.cache, self.active) if self.packed_out else out

    def check(self):
        self.check_output()
        self.check_grads()

    def check_output(self, aliased=False):
        have, want = self.actual_output(aliased), self.expected_output()
        assert torch.equal(have.double(), want), f"{(have.double() - want).abs().max()} apart"

    def expected_grads(self):
        """By input, weight and bias, of the kept channels at the sites that are computed."""
        leaves = [t.double().requires_grad_() for t in (self.input.nan_to_num(), self.weight, self.bias)]
        result = reference.gathered_conv2d(*leaves, **self.geometry, in_mask=self.ins, out_mask=self.outs)
        return torch.autograd.grad(torch.where(self.computed, result, 0), leaves, self.grad.double())

    def pixels(self):
        """The rows of input_grad."""
        if self.active is None:
            return None
        sites, starts = self.rows()
        return compaction.inverse_map(sites, starts[-1:].clone(), self.active.numel()), *listed(self.touched)

    def actual_grads(self):
        input, grad = self.as_packed(self.input, 0), self.as_packed(self.grad, 1)
        zeros = channels_last(torch.zeros_like(self.input))
        is_read = torch.ones_like(zeros[:, :1], dtype=torch.bool) if self.active is None else self.touched
        grad_input = self.as_packed(channels_last(torch.where(is_read, torch.nan, zeros)), 0)
        gathered_conv.input_grad(grad, self.weight, grad_input, *self.sets(), self.pixels(), **self.common())
        return [
            unpack(grad_input, self.ins, zeros, is_read) if self.packed_source else grad_input,
            gathered_conv.weight_grad(input, grad, self.weight, *self.sets(), self.rows(), **self.common()),
            gathered_conv.bias_grad(grad, self.sets()[1], self.rows(), self.packed_out),
        ]

    def check_grads(self):
        for name, want, have in zip(
            ("input", "weight", "bias"), self.expected_grads(), self.actual_grads(), strict=True
        ):
            assert have.dtype == self.weight.dtype and have.shape == want.shape, name
            assert torch.equal(have.double(), want), f"{name}: {(have.double() - want).abs().max()} apart"


GEOMETRIES = {
    "3x3": dict(),
    "1x1": dict(kernel=(1, 1), padding=(0, 0), cin=19, cout=33),
    "stride_2": dict(stride=(2, 2)),
    "uneven": dict(kernel=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), size=(6, 5)),
    "stride_and_dilation": dict(stride=(2, 3), dilation=(3, 2), padding=(3, 2), size=(5, 6)),
    "more_taps_than_bits": dict(kernel=(3, 11), padding=(1, 5), n=1, cin=2, cout=2, size=(2, 3)),
    "one_channel": dict(cin=1, cout=1),
    "one_pixel": dict(size=(1, 1), kernel=(1, 1), padding=(0, 0), n=5, cin=20, cout=18),
    "several_tiles": dict(cin=40, cout=136, size=(9, 8), kernel=(1, 1), padding=(0, 0)),
    "no_samples": dict(n=0),
}
GROUPS = {
    "groups_of_3_to_2": dict(cin=6, cout=4, groups=2),
    "groups_of_16": dict(cin=32, cout=48, groups=2, granularity=8),
    "depthwise": dict(cin=5, cout=5, groups=5),
}
GRANULAR = {
    "runs_of_8": dict(cin=40, cout=24, granularity=8, kernel=(2, 1), padding=(1, 0)),
    "runs_of_16": dict(cin=32, cout=64, granularity=16, kernel=(1, 3), padding=(0, 1)),
    "last_run_cut": dict(cin=20, cout=28, granularity=8, kernel=(1, 2), padding=(0, 1)),
    "tiles_of_runs": dict(cin=72, cout=136, granularity=8, kernel=(1, 1), padding=(0, 0), size=(2, 2)),
}
CASES = GEOMETRIES | GROUPS | GRANULAR
EVERYTHING = "input+output"


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name):
    Case(**CASES[name]).check()


@pytest.mark.parametrize("name, packed", [
    ("stride_2", "input"), ("stride_2", "output"), ("stride_2", EVERYTHING), ("groups_of_3_to_2", EVERYTHING),
    ("last_run_cut", "input"), ("last_run_cut", "output"),
])  # fmt: skip
def test_packed(name, packed):
    Case(**CASES[name], packed=packed).check()


def test_packed_capacity_of_whole_runs():
    Case(**CASES["runs_of_8"], packed=EVERYTHING, spare=8).check()


@pytest.mark.parametrize("name, packed", [
    ("3x3", ""), ("uneven", EVERYTHING), ("groups_of_3_to_2", "input"), ("runs_of_8", "output"),
])  # fmt: skip
def test_listed_sites(name, packed):
    Case(**CASES[name], packed=packed, density=0.4).check()


@pytest.mark.parametrize("packed", ["", "output"], ids=["dense", "packed"])
@pytest.mark.parametrize("density", [None, 0.4], ids=["all_sites", "listed_sites"])
def test_epilogue_of_forward(density, packed):
    case = Case(packed=packed, density=density, gated=True, residual=True, activation="relu6")
    case.check_output()
    case.check_output(aliased=True)


@pytest.mark.parametrize("name", ["stride_2", "runs_of_8"])
@pytest.mark.parametrize("dtype", dtypes(torch.float64, torch.float16, torch.bfloat16))
def test_equals_reference_in(dtype, name):
    # At most 80 products, of mean zero and 4 at most: integers that bfloat16 holds, up to 256.
    Case(**CASES[name], dtype=dtype).check()


def test_weight_gradient_in_chunks_and_parts(monkeypatch):
    case = Case(n=5, cin=5, cout=6, size=(7, 7), kernel=(1, 1), padding=(0, 0), density=0.9)
    monkeypatch.setattr(kernels.masked_conv, "WEIGHT_GRAD_STEPS", 1)  # 49 sites in 4 parts of 16
    monkeypatch.setattr(gathered_conv, "PARTIAL_BYTES", 2 * 4 * case.weight.numel() * 4)  # 2 samples of 4 parts
    case.check_grads()


def test_a_weight_of_2_31_elements_is_refused():
    """Its offsets are of 32 bits."""
    source, out = (channels_last(torch.zeros(1, columns, 1, 1)) for columns in (2**15, 2**16))
    every = [
        (torch.zeros(1, columns, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)) for columns in (2**15, 2**16)
    ]
    where = dict(input_size=(1, 1), site_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    where |= dict(packed_source=False, packed_out=False, granularity=1, allow_tf32=False, activation="none")
    weight = torch.empty(2**16, 2**15, 1, 1, device="meta")
    with pytest.raises(ValueError, match="weight: expected fewer than 2\\*\\*31 elements, got 2147483648"):
        gathered_conv.forward(source, weight, None, None, None, out, *every, None, **where)
