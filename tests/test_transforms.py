"""Forward mode and torch.func: a right value or an error for every op, block and route, never a tangent of zero."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import dynconv
from dynconv import ActiveSites

# PyTorch's own: at its first use of forward mode, and where it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

N, C, H = 2, 8, 5
MASK = torch.rand(N, 1, H, H, generator=torch.Generator().manual_seed(1)) < 0.5
CHANNELS = torch.rand(N, C, generator=torch.Generator().manual_seed(2)) < 0.5


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def block(kind, *arguments):
    torch.manual_seed(0)
    return kind(*arguments).eval().requires_grad_(False)


def batch_norm(x):
    return NORM(dynconv.pack(x, ActiveSites(MASK)), packed=False)


def in_place(x, weight):
    out = torch.zeros(N, C, H, H).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return dynconv.masked_conv2d(x, weight, None, 1, 1, mask=MASK, out=out)


def masked(**keywords):
    return lambda x, weight, bias: dynconv.masked_conv2d(x, weight, bias, 1, 1, mask=MASK, **keywords)


X, WEIGHT, BIAS = randn(N, C, H, H), randn(C, C, 3, 3), randn(C)
GATE, WIDE = randn(N, 1, H, H) * MASK, randn(N, C)
OFFSET, FILTERS = randn(N, 18, H, H), randn(N, 9, H, H)
MASKED_BLOCKS = {
    "bottleneck": block(dynconv.nn.MaskedBottleneck, C, C // 4),
    "basic": block(dynconv.nn.MaskedBasicBlock, C, C),
    "inverted": block(dynconv.nn.MaskedInvertedResidual, C, C, 1, 2),
    "conv": block(dynconv.nn.MaskedConv2d, C, C, 3, 1, 1),
}
NORM = block(dynconv.nn.MaskedBatchNorm2d, C, 1e-5, 0.1, True, False)  # by the statistics of its input
GATHERED_BLOCK = block(dynconv.nn.GatheredBasicBlock, C, C)
# A function and the tensors that it is differentiated in.
CASES = {
    "masked_conv2d": (masked(), (X, WEIGHT, BIAS)),
    "masked_conv2d fused": (masked(activation="relu", residual=X, inactive=X), (X, WEIGHT, BIAS)),
    "masked_conv2d packed": (lambda *o: masked(packed=True)(*o).unpack(), (X, WEIGHT, BIAS)),
    "masked_conv2d residual": (
        lambda r: dynconv.masked_conv2d(X, WEIGHT, None, 1, 1, mask=MASK, residual=r, activation="silu"),
        (X,),
    ),
    "masked_conv2d inactive": (lambda r: dynconv.masked_conv2d(X, WEIGHT, None, 1, 1, mask=MASK, inactive=r), (X,)),
    "masked_conv2d gate": (lambda x, g: dynconv.masked_conv2d(x, WEIGHT, None, 1, 1, mask=g), (X, GATE)),
    "masked_conv2d depthwise": (
        lambda x, w: dynconv.masked_conv2d(x, w, None, 1, 1, 1, C, mask=MASK),
        (X, WEIGHT[:, :1]),
    ),
    "masked_conv2d out": (in_place, (X, WEIGHT)),
    "pack": (lambda x: dynconv.pack(x, ActiveSites(MASK)).unpack(activation="relu"), (X,)),
    "batch_norm": (batch_norm, (X,)),
    "gathered_conv2d": (
        lambda x, w: dynconv.gathered_conv2d(x, w, None, 1, 1, in_mask=CHANNELS, out_mask=CHANNELS, mask=MASK),
        (X, WEIGHT),
    ),
    "gathered_conv2d gate": (
        lambda x, g: dynconv.gathered_conv2d(x, WEIGHT, None, 1, 1, out_mask=g),
        (X, WIDE * CHANNELS),
    ),
    "pack channels": (lambda x: dynconv.pack(x, dynconv.ActiveChannels(CHANNELS)).unpack(), (X,)),
    "gathered_linear": (lambda x, w: dynconv.gathered_linear(x, w, in_mask=CHANNELS), (WIDE, WEIGHT[:, :, 0, 0])),
    "gathered_linear positions": (
        lambda x, w: dynconv.gathered_linear(x, w, in_mask=CHANNELS),
        (randn(N, 9, C), WEIGHT[:, :, 0, 0]),
    ),
    "dynamic_filter2d": (
        lambda x, f: dynconv.dynamic_filter2d(x, f, kernel_size=3, padding=1, mask=MASK, normalization="softmax"),
        (X, FILTERS),
    ),
    "deform_conv2d": (lambda x, o, w: dynconv.deform_conv2d(x, o, w, None, 1, 1), (X, OFFSET, WEIGHT)),
    "deform_aggregate2d": (
        lambda x, o, w: dynconv.deform_aggregate2d(x, o, w, kernel_size=3, padding=1, normalization="sigmoid"),
        (X, OFFSET, FILTERS),
    ),
    **{name: (lambda x, g, b=b: b(x, g), (X, GATE)) for name, b in MASKED_BLOCKS.items()},
    "bottleneck weight": (
        lambda w: torch.func.functional_call(MASKED_BLOCKS["bottleneck"], {"conv2.weight": w}, (X, MASK)),
        (MASKED_BLOCKS["bottleneck"].conv2.weight.detach(),),
    ),
    "gathered block": (lambda x: GATHERED_BLOCK(x, CHANNELS), (X,)),
}


def dual(function, operands, tangents):
    with forward_ad.dual_level():
        duals = [o if t is None else forward_ad.make_dual(o, t) for o, t in zip(operands, tangents)]
        return forward_ad.unpack_dual(function(*duals)).tangent


def chosen(function, operands, tangents):
    """The function of what has a tangent."""
    which = [i for i, t in enumerate(tangents) if t is not None]

    def of(*values):
        every = list(operands)
        for i, value in zip(which, values):
            every[i] = value
        return function(*every)

    return of, tuple(operands[i] for i in which), tuple(tangents[i] for i in which)


def jvp(function, operands, tangents):
    return torch.func.jvp(*chosen(function, operands, tangents))[1]


def linearize(function, operands, tangents):
    of, values, tangents = chosen(function, operands, tangents)
    return torch.func.linearize(of, *values)[1](*tangents)


def in_batches(function, operands, tangents):
    of, values, tangents = chosen(function, operands, tangents)
    twice = [torch.stack((t, t)) for t in tangents]
    return torch.func.vmap(lambda *t: torch.func.jvp(of, values, t)[1])(*twice)[1]


TRANSFORMS = {"dual numbers": dual, "jvp": jvp, "linearize": linearize, "vmap of jvp": in_batches}


@pytest.fixture(scope="module")
def expected():
    """The derivative along all tangents, or along one, by two passes in reverse through the reference."""
    known = {}

    def of(name, function, operands, tangents):
        if name == "masked_conv2d out":
            function = lambda x, w: dynconv.masked_conv2d(x, w, None, 1, 1, mask=MASK)
        key = name, tuple(t is None for t in tangents)
        if key not in known:
            with dynconv.backend("reference"):
                known[key] = torch.autograd.functional.jvp(*chosen(function, operands, tangents))[1]
        return known[key]

    return of


def outcome(run, *arguments):
    """What it returns, and None; or None and its error's words."""
    try:
        return run(*arguments), None
    except (RuntimeError, ValueError) as error:
        return None, str(error)


ROUTES = [(r, t) for r in ("cpu", "cpu weights with grad", "reference") for t in ("dual numbers", "jvp")]
ROUTES += [("dense", "jvp"), *(("cpu without grad", t) for t in TRANSFORMS)]


@pytest.mark.parametrize(("route", "transform"), ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_a_tangent_is_carried_or_refused(case, route, transform, expected):
    function, operands = CASES[case]
    ones = [torch.ones_like(o) for o in operands]
    directions = [ones]
    if len(ones) > 1:
        directions += [[t if i == k else None for k, t in enumerate(ones)] for i in range(len(ones))]
    is_out = case == "masked_conv2d out"
    for tangents in directions:
        with contextlib.ExitStack() as stack:
            stack.enter_context(dynconv.execution("dense" if route == "dense" else "sparse"))
            stack.enter_context(dynconv.backend("reference" if route == "reference" else "cpu"))
            if route == "cpu without grad":
                stack.enter_context(torch.no_grad())
            given = [o.clone().requires_grad_(route == "cpu weights with grad" and not is_out) for o in operands]
            function(*given)  # what is remembered of a plain call must not answer
            result, error = outcome(TRANSFORMS[transform], function, given, tangents)
        if error is None:
            torch.testing.assert_close(result, expected(case, function, operands, tangents), rtol=1e-4, atol=1e-4)
        elif transform in ("dual numbers", "jvp"):  # the others trace or batch, of which PyTorch may say that it cannot
            assert route != "reference", error
            assert "expected `" in error


@pytest.mark.parametrize("case", [name for name in CASES if name != "masked_conv2d out"])
def test_torch_func_grad_is_right_or_refused(case):
    function, operands = CASES[case]
    loss = lambda *o: function(*o).square().sum()
    result, error = outcome(torch.func.grad(loss), *operands)
    if error is not None:
        assert "expected `" in error
    else:
        given = [operands[0].clone().requires_grad_(), *operands[1:]]
        torch.testing.assert_close(result, torch.autograd.grad(loss(*given), given[0])[0], rtol=1e-4, atol=1e-4)


def test_what_carries_no_tangent_is_computed():
    head = nn.Linear(C, 3)
    plain = masked(activation="relu")(X, WEIGHT, BIAS)
    with forward_ad.dual_level():
        features = masked(activation="relu")(X, WEIGHT, BIAS)
        assert torch.equal(features, plain)
        assert forward_ad.unpack_dual(head(forward_ad.make_dual(features.mean((2, 3)), WIDE))).tangent is not None
