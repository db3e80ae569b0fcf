"""Selectors: the ways the literature picks channels for each sample, and the losses that hold them to a budget.

A selector looks at the features before a layer and chooses which of the layer's output channels to compute:

    selection = gate(x)                                                   # a Selection
    x = gathered_conv2d(x, weight, in_mask=kept, out_mask=selection.channels).relu()
    kept = selection.kept                                                 # what the next layer reads

**What trains a gate.** A skipped channel is not computed, so the task's gradient reaches the gates of kept channels
only: it can close them or hold them open, but says nothing about the others. Those train by three things: the noise of
training, which keeps every channel now and then; `Selection.rate`, whose gradient reaches every gate through
`budget_loss` and `bounds_loss`; and gates that begin open (`initial_rate`). Where that is not enough, train the first
epochs densely: in `conv2d(x, weight) * selection.channels.gate[:, :, None, None]` every gate gets the task's gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._arguments import kind_of
from ._backend import refuse_tracer
from .channels import ActiveChannels, check_int

__all__ = [
    "ChannelGate",
    "Selection",
    "SlimmableGate",
    "TopKGate",
    "bounds_loss",
    "budget_loss",
    "l1_loss",
    "product_rates",
]


class Selection(NamedTuple):
    """What a selector chose for a batch.

    Attributes:
        channels: the `out_mask` of the layer. A gate, which gets a gradient, where one is wanted; otherwise (under
            `torch.no_grad()`) only a mask, unless the gate's values are more than 0 and 1.
        rate: [N], in 0..1. Its value is the share of the channels that each sample keeps; its gradient is that of the
            expected share, at every gate. Constant where the budget fixes it.
        scores: [N, groups], or [N, widths] for `SlimmableGate`: the logits or saliencies behind the choice.

    Example:
        >>> chosen = dynconv.gating.ChannelGate(8, 32, granularity=16)(torch.randn(4, 8, 6, 6))
        >>> chosen.channels.shape, chosen.rate.shape, chosen.scores.shape
        ((4, 32), torch.Size([4]), torch.Size([4, 2]))
    """

    channels: ActiveChannels
    rate: Tensor
    scores: Tensor

    @property
    def kept(self) -> ActiveChannels:
        """The same channels without the gate, for the next layer's `in_mask`, as a gate multiplies only once."""
        return self.channels.ungated


class _Selector(nn.Module):
    """Squeezes features to [N, in_channels], scores them, and makes the selection of `channels` channels."""

    def __init__(self, in_channels: int, channels: int, granularity: int = 1) -> None:
        super().__init__()
        self.in_channels = check_int("in_channels", in_channels)
        self.channels = check_int("channels", channels)
        self.granularity = check_int("granularity", granularity)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_tracer("torch.jit.script")

    @property
    def groups(self) -> int:
        """How many groups of channels there are; the last may be smaller."""
        return -(-self.channels // self.granularity)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.channels}, granularity={self.granularity}"

    def _squeeze(self, input: Tensor, magnitude: bool = False) -> Tensor:
        """Global average pooling: [N, in_channels, H, W] -> [N, in_channels]."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {kind_of(input)}")
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise ValueError(f"input: expected shape [N, {self.in_channels}, H, W], got {list(input.shape)}")
        return (input.abs() if magnitude else input).mean((2, 3))

    def _select(
        self,
        gate: Tensor,
        scores: Tensor,
        expected: Tensor | None = None,
        capacity: int | None = None,
        binary: bool = True,
    ) -> Selection:
        """Of a gate for each group; `capacity` where the budget fixes the most channels of a sample."""
        if binary and not gate.requires_grad:
            gate = gate != 0  # to multiply by one would be a pass over the features
        size = (gate.shape[0], self.channels)
        channels = ActiveChannels(gate, size, granularity=self.granularity, capacity=capacity)
        rate = channels.count.to(torch.promote_types(scores.dtype, torch.float32)) / self.channels
        return Selection(channels, rate if expected is None else _straight_through(rate, expected), scores)


class ChannelGate(_Selector):
    """Keeps or skips each group of channels by itself: squeeze, a small network, one logit a group.

    In training a group is kept where its logit plus logistic noise is positive, so with probability sigmoid(logit): the
    binary Gumbel trick, hard forward and straight-through backward. The gate is exactly 1 or 0, its gradient that of
    sigmoid((logit + noise) / temperature). In evaluation a group is kept where its logit is positive; `gate.eval()` in
    the last epochs trains the network for that. The gradient of the rate is that of sigmoid(logit), whatever the
    temperature. Skipped channels send no gradient back; the module's docstring says what trains their gates.

    ConvNet-AIG (Veit and Belongie, ECCV 2018), DynConv (Verelst and Tuytelaars, CVPR 2020), LAUDNet (Han et al., 2023).

    Args:
        in_channels: channels of the features to look at.
        channels: channels to choose from.
        granularity: channels that share a gate, at least 1; the last group may be smaller.
        hidden: width of a hidden layer with batch normalisation and a ReLU, as in ConvNet-AIG (16 there); None for a
            linear gate.
        temperature: above 0; a low one gives the gradient to close decisions only. An attribute, to be annealed.
        initial_rate: the share that is kept at first, in 0..1 (exclusive), through the last layer's bias.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> gate = dynconv.gating.ChannelGate(8, 32, granularity=16)
        >>> chosen = gate(torch.randn(4, 8, 6, 6))
        >>> y = dynconv.gathered_conv2d(torch.randn(4, 8, 6, 6), torch.randn(32, 8, 1, 1), out_mask=chosen.channels)
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        granularity: int = 1,
        *,
        hidden: int | None = None,
        temperature: float = 1.0,
        initial_rate: float = 0.85,
    ) -> None:
        super().__init__(in_channels, channels, granularity)
        _check_temperature(temperature)
        if not 0 < initial_rate < 1:
            raise ValueError(f"initial_rate: expected between 0 and 1, got {initial_rate}")
        self.temperature = temperature
        if hidden is None:
            self.head = last = nn.Linear(in_channels, self.groups)
        else:
            hidden = check_int("hidden", hidden)
            last = nn.Linear(hidden, self.groups)
            self.head = nn.Sequential(nn.Linear(in_channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), last)
        nn.init.constant_(last.bias, math.log(initial_rate / (1 - initial_rate)))
        # The last group may be smaller, so it counts for less.
        sizes = torch.full((self.groups,), granularity / channels)
        sizes[-1] = 1 - granularity * (self.groups - 1) / channels
        self.register_buffer("shares", sizes, persistent=False)

    def forward(self, input: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """Map [N, in_channels, H, W] to a Selection of [N, channels]; the generator is for the noise of training.

        Raises TypeError or ValueError for an input that is no tensor or of another shape.
        """
        logits = self.head(self._squeeze(input))
        noisy = logits + torch.logit(_uniform(logits, generator)) if self.training else logits
        gate = _straight_through(noisy > 0, (noisy / self.temperature).sigmoid())
        return self._select(gate, logits, logits.sigmoid() @ self.shares.to(logits.dtype))


class TopKGate(_Selector):
    """Keeps the k groups of channels with the highest scores in each sample: a fixed budget.

    With `boost`, FBS: the saliency `relu(linear(mean |input|))` of a winner multiplies its channels, and losers are
    skipped. A winner whose saliency is zero is skipped too, so k is then the most. Nothing is random, and only
    `l1_loss` of the saliencies reaches the losers; the bias begins at 1, so that at first all are salient.

    Without, exactly k groups are kept, with gates of exactly 1 and 0 and the gradient of sigmoid(score). Gumbel noise
    in training samples k groups without replacement, so that losers get their turn.

    FBS: Gao et al., Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019. The noise: Kool et al.,
    Stochastic Beams and Where to Find Them, ICML 2019.

    Args:
        in_channels: channels of the features to look at.
        channels: channels to choose from.
        k: groups that a sample keeps, in 1..ceil(channels / granularity).
        granularity: channels that share a score, at least 1; the last group may be smaller.
        boost: whether the saliency multiplies the channels.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> gate = dynconv.gating.TopKGate(8, 32, k=1, granularity=16, boost=False)
        >>> gate(torch.randn(4, 8, 6, 6)).rate.tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    def __init__(self, in_channels: int, channels: int, k: int, granularity: int = 1, *, boost: bool = True) -> None:
        super().__init__(in_channels, channels, granularity)
        k = check_int("k", k, most=self.groups)
        self.k, self.boost = k, boost
        self.head = nn.Linear(in_channels, self.groups)
        if boost:
            nn.init.kaiming_normal_(self.head.weight)
            nn.init.ones_(self.head.bias)

    def forward(self, input: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """Map [N, in_channels, H, W] to a Selection of [N, channels]; the generator is for the noise without `boost`.

        Raises TypeError or ValueError for an input that is no tensor or of another shape.
        """
        scores = self.head(self._squeeze(input, magnitude=self.boost))
        if self.boost:
            scores = scores.relu()
        noisy = scores if self.boost or not self.training else scores + _gumbel(scores, generator)
        winners = torch.zeros_like(scores, dtype=torch.bool).scatter(1, noisy.topk(self.k, 1).indices, True)
        gate = torch.where(winners, scores, 0) if self.boost else _straight_through(winners, scores.sigmoid())
        return self._select(gate, scores, capacity=self.k * self.granularity, binary=not self.boost)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, boost={self.boost}"


class SlimmableGate(_Selector):
    """Picks one of a few widths for each sample and keeps the first so many channels.

    In training the width is sampled by the Gumbel-softmax trick, hard forward and straight-through backward: the gates
    are exactly 1 and 0, and the gradient is that of softmax((logits + noise) / temperature). In evaluation it is the
    width with the highest logit. The gradient of the selection's rate is that of the expected width under
    softmax(logits). A wider choice is never computed, so the task's gradient compares narrower ones only.

    DS-Net (Li et al., Dynamic Slimmable Network, CVPR 2021) over slimmable networks (Yu et al., ICLR 2019).

    Args:
        in_channels: channels of the features to look at.
        channels: channels to choose from.
        widths: the numbers of channels to choose from, ascending, each in 1..channels.
        temperature: above 0. An attribute, to be annealed.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.

    Example:
        >>> gate = dynconv.gating.SlimmableGate(8, 32, widths=(8, 16, 32))
        >>> set(gate(torch.randn(4, 8, 6, 6)).channels.count.tolist()) <= {8, 16, 32}
        True
    """

    def __init__(self, in_channels: int, channels: int, widths: Sequence[int], *, temperature: float = 1.0) -> None:
        widths = [check_int("widths", width) for width in widths]
        super().__init__(in_channels, channels, math.gcd(*widths) or 1)
        if not widths or widths[-1] > channels or any(a >= b for a, b in itertools.pairwise(widths)):
            raise ValueError(f"widths: expected ascending numbers in 1 to {channels}, got {list(widths)}")
        _check_temperature(temperature)
        self.widths, self.temperature = tuple(widths), temperature
        self.head = nn.Linear(in_channels, len(self.widths))
        prefixes = torch.arange(self.groups) * self.granularity < torch.tensor(self.widths)[:, None]
        self.register_buffer("prefixes", prefixes, persistent=False)  # [widths, groups]

    def forward(self, input: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """Map [N, in_channels, H, W] to a Selection of [N, channels]; the generator is for the noise of training.

        Raises TypeError or ValueError for an input that is no tensor or of another shape.
        """
        logits = self.head(self._squeeze(input))
        noisy = logits + _gumbel(logits, generator) if self.training else logits
        chosen = F.one_hot(noisy.argmax(1), len(self.widths))
        gate = _straight_through(chosen, (noisy / self.temperature).softmax(1)) @ self.prefixes.to(noisy.dtype)
        # The widths, from what is on the device already: a copy from the host would wait for it.
        widths = (self.prefixes.sum(1) * self.granularity).to(logits.dtype)
        expected = logits.softmax(1) @ widths / self.channels
        return self._select(gate, logits, expected, capacity=self.widths[-1])

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.channels}, widths={list(self.widths)}"


def product_rates(rates: Sequence[Tensor | float]) -> list[Tensor | float]:
    """Return the share of its products that each layer of a chain computes: (kept in) * (kept out).

    Args:
        rates: one more than there are layers: the shares of the channels before, between and after them, each [N] from
            a `Selection`, or a number (1 for what is not gated).

    Returns:
        A share for each layer. Each times the layer's multiply-adds, summed, is what a sample is expected to need; with
        the multiply-adds as weights, `budget_loss` of the shares holds the whole chain to a budget.

    Example:
        >>> dynconv.gating.product_rates([1, 0.5, 0.5])
        [0.5, 0.25]
    """
    return [before * after for before, after in itertools.pairwise(rates)]


def budget_loss(rates: Sequence[Tensor], target: float, weights: Sequence[float] | None = None) -> Tensor:
    """Hold all layers together to a budget: `(sum(weight * mean rate) / sum(weights) - target)^2`.

    The network loss of DynConv (Verelst and Tuytelaars, CVPR 2020), with the layers' costs as weights. For each layer
    its own target, as in ConvNet-AIG (Veit and Belongie, ECCV 2018): `bounds_loss` with progress 0.

    Args:
        rates: for each layer the shares that the samples keep, [N] or a scalar: `Selection.rate`, or `product_rates`.
            A number is a layer without a gate, among others with one.
        target: the share to keep, in 0..1.
        weights: for each layer its cost, not negative; None weighs all alike.

    Raises:
        TypeError: rates that are no sequence of tensors.
        ValueError: no rates, a target outside of its range, or weights that do not match the rates.

    Example:
        >>> dynconv.gating.budget_loss([torch.tensor([0.5, 1.0])], target=0.5).item()
        0.0625
    """
    means = _layer_means("rates", rates)
    _check_share("target", target)
    if weights is None:
        return (means.mean() - target) ** 2
    if len(weights) != len(rates):
        raise ValueError(f"weights: expected {len(rates)}, one for each rate, got {len(weights)}")
    if min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights: expected costs that are not negative, and not all zero, got {list(weights)}")
    # Filled, not copied from the host, which would wait for a GPU.
    shares = torch.stack([means.new_full((), weight / sum(weights)) for weight in weights])
    return (means @ shares - target) ** 2


def bounds_loss(rates: Sequence[Tensor], target: float, progress: float) -> Tensor:
    """Keep layers from closing, or staying open, too early: the mean of `relu(rate - upper)^2 + relu(lower - rate)^2`.

    With a = cos(progress * pi / 2)^2, upper = 1 - a * (1 - target) and lower = a * target: both begin at the target and
    widen to 0 and 1. The block loss of DynConv (Verelst and Tuytelaars, CVPR 2020), which takes progress from 0 to 1 in
    the first third of training. With progress 0, the loss of ConvNet-AIG (Veit and Belongie, ECCV 2018).

    Args:
        rates: for each layer the shares that the samples keep, [N] or a scalar: `Selection.rate`, or `product_rates`.
        target: the share to keep, in 0..1.
        progress: at least 0; what is above 1 counts as 1, where the loss is zero.

    Raises:
        TypeError: rates that are no sequence of tensors.
        ValueError: no rates, or a target or a progress outside of its range.

    Example:
        >>> rates = [torch.tensor([0.5, 1.0])]
        >>> [dynconv.gating.bounds_loss(rates, target=0.5, progress=progress).item() for progress in (0, 1)]
        [0.0625, 0.0]
    """
    means = _layer_means("rates", rates)
    _check_share("target", target)
    if not progress >= 0:
        raise ValueError(f"progress: expected at least 0, got {progress}")
    annealed = math.cos(min(progress, 1) * math.pi / 2) ** 2
    upper, lower = 1 - annealed * (1 - target), annealed * target
    return ((means - upper).relu() ** 2 + (lower - means).relu() ** 2).mean()


def l1_loss(scores: Sequence[Tensor]) -> Tensor:
    """Sum over layers the mean over samples of `sum(|score|)`: makes saliencies sparse, losers' as well.

    The regularisation of FBS (Gao et al., ICLR 2019), there times 1e-8.

    Args:
        scores: for each layer [N, groups]: `Selection.scores`.

    Raises:
        TypeError: scores that are no sequence of tensors.
        ValueError: no scores.

    Example:
        >>> dynconv.gating.l1_loss([torch.tensor([[1.0, -2.0], [3.0, 0.0]])]).item()
        3.0
    """
    return _layer_means("scores", scores, lambda layer: layer.abs().sum(-1)).sum()


def _layer_means(name: str, layers: Sequence[Tensor], of=lambda layer: layer) -> Tensor:
    """[layers]. A single tensor would pass for as many layers as it has samples, so it is refused."""
    known = [layer for layer in layers if isinstance(layer, Tensor)]
    if known and not isinstance(layers, Tensor):  # a number is a layer without a gate
        number = lambda layer: known[0].new_full((), float(layer))
        layers = [number(layer) if isinstance(layer, (int, float)) else layer for layer in layers]
    if isinstance(layers, Tensor) or not all(isinstance(layer, Tensor) for layer in layers):
        kind = "a tensor" if isinstance(layers, Tensor) else [type(layer).__name__ for layer in layers]
        raise TypeError(f"{name}: expected a sequence of tensors, one for each layer, got {kind}")
    if not layers:
        raise ValueError(f"{name}: expected a tensor for each layer, got none")
    return torch.stack([of(layer).mean() for layer in layers])


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, exactly, and the gradient of `soft`; NaN features close nothing and open nothing."""
    return hard + (soft - soft.detach()).nan_to_num(0)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """In 0..1; at least float32, as half types come too close to 0 and 1."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    # Without the keyword where there is none: with it, PyTorch's rand takes no symbolic batch size.
    options = {} if generator is None else {"generator": generator}
    return torch.rand(like.shape, dtype=dtype, device=like.device, **options)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return -torch.log(-torch.log(_uniform(like, generator)))


def _check_temperature(value: float) -> None:
    if not value > 0:
        raise ValueError(f"temperature: expected above 0, got {value}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected between 0 and 1, got {value}")
