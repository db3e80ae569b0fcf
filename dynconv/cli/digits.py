"""The scene `channels` of `python -m dynconv demo`: a network learns which channels each digit needs.

Handwritten digits of 8 x 8 pixels (scikit-learn's), a network whose layers choose their channels for each of them, and
its dense twin: the same layers, seed and epochs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynconv
from dynconv import gating

from . import console, extra, table
from .bounds import Arithmetic, judge
from .environment import environment, write_json

WIDTHS = (64, 64, 64)
EPOCHS = 20
BATCH = 32
# The share of the products to keep; a little below a half, as the budget is a pull and no wall.
TARGET = 0.48
GRANULARITY = 8
# Timed passes over the test set, after one that does not count.
PASSES = 5


@dataclass
class Digits:
    """Images [N, 1, 8, 8] in 0..1 and their labels [N], to train on and to test with."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, trained: int = 1200) -> Digits:
        """The 1797 digits in a fixed order; the first so many to train on."""
        found = extra("sklearn.datasets").load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        images = torch.from_numpy(found.images).float().unsqueeze(1)[order] / 16
        labels = torch.from_numpy(found.target)[order]
        return cls(images[:trained], labels[:trained], images[trained:], labels[trained:])


class Network(nn.Module):
    """3x3 convolutions with ReLUs, pooled before the last, and a linear classifier; gated or dense."""

    def __init__(self, gated: bool, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        channels = (1, *widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(channels, widths)
        ).to(memory_format=torch.channels_last)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
        self.classifier = nn.Linear(widths[-1] * 16, 10)
        self.gates = nn.ModuleList(
            gating.ChannelGate(before, after, GRANULARITY, hidden=16)
            for before, after in zip(channels, widths) if gated
        )  # fmt: skip

    @property
    def products(self) -> list[int]:
        """Multiply-adds of each convolution for one image, with all channels."""
        sites = [64] * (len(self.convs) - 1) + [16]
        return [count * conv.weight.numel() for count, conv in zip(sites, self.convs)]

    def forward(self, input: Tensor, watch=None, dense: bool = False) -> tuple[Tensor, list[gating.Selection]]:
        """[N, 1, 8, 8] -> [N, 10] and what each layer chose.

        `watch` sees each gated layer's operands and result. With `dense` the gates multiply what is computed in full,
        so that skipped ones get the task's gradient too.
        """
        kept, selections = None, []
        for i, conv in enumerate(self.convs):
            if i == len(self.convs) - 1:
                input = F.max_pool2d(input, 2)
            if self.gates:
                selections.append(self.gates[i](input))
                chosen = selections[-1].channels
                if dense:
                    output = conv(input) * chosen.gate[:, :, None, None]
                else:
                    options = {"padding": 1, "in_mask": kept, "out_mask": chosen}
                    output = dynconv.gathered_conv2d(input, conv.weight, conv.bias, **options)
                if watch is not None:
                    watch(conv, input, kept, selections[-1].kept, output)
                kept = selections[-1].kept
            else:
                output = conv(input)
            input = output.relu()
        return self.classifier(input.flatten(1)), selections


@dataclass
class Outcome:
    """A trained network: its accuracy on the test set after each epoch, and the seconds that training took."""

    network: Network
    accuracy: list[float]
    seconds: float


def train(gated: bool, digits: Digits, epochs: int, widths: tuple[int, ...] = WIDTHS) -> Outcome:
    """Adam and a cosine on shifted images, and a pull of the products to the target.

    In the first third the gates multiply dense convolutions, in the last they decide as in inference.
    """
    torch.manual_seed(1)
    network = Network(gated, widths)
    layers = [p for name, p in network.named_parameters() if not name.startswith("gates")]
    optimizer = torch.optim.Adam([{"params": layers}, {"params": network.gates.parameters(), "lr": 5e-3}], 2e-3)
    steps = -(-len(digits.train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    shuffle = torch.Generator().manual_seed(2)
    accuracy, seconds = [], 0.0
    for epoch in range(epochs):
        begin = time.perf_counter()
        network.train()
        network.gates.train(epoch < 2 * epochs // 3)
        for batch in torch.randperm(len(digits.train), generator=shuffle).split(BATCH):
            images = shifted(digits.train[batch], shuffle)
            output, selections = network(images, dense=epoch < epochs // 3)
            loss = F.cross_entropy(output, digits.train_labels[batch])
            if gated:
                rates = [selection.rate for selection in selections]
                shares = gating.product_rates([1.0, *rates])
                bounds = gating.bounds_loss(rates, TARGET**0.5, 3 * epoch / epochs)
                loss = loss + 4 * (gating.budget_loss(shares, TARGET, network.products) + bounds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - begin
        network.eval()
        with torch.no_grad():
            predicted = network(digits.test)[0].argmax(1)
        accuracy.append((predicted == digits.test_labels).float().mean().item())
    return Outcome(network, accuracy, seconds)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images moved together by at most a pixel each way."""
    height, width = images.shape[2:]
    top, left = torch.randint(3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1))[..., top : top + height, left : left + width]


@torch.no_grad()
def layer_records(network: Network, digits: Digits) -> list[dict]:
    """For each layer, over the test set: what was kept and computed, and how far it is from a dense convolution."""
    records = []

    def watch(conv: nn.Conv2d, input: Tensor, kept: dynconv.ActiveChannels | None, chosen, output: Tensor) -> None:
        inside = torch.ones(input.shape[:2], dtype=torch.bool) if kept is None else kept.mask
        source = torch.where(inside[:, :, None, None], input, 0)
        dense = lambda x, w, b: torch.where(chosen.mask[:, :, None, None], F.conv2d(x, w, b, padding=1), 0)
        expected = dense(source.double(), conv.weight.double(), conv.bias.double())
        magnitude = dense(source.abs().double(), conv.weight.abs().double(), conv.bias.abs().double())
        bound = Arithmetic(torch.float32).bound(expected, magnitude, conv.weight[0].numel() + 1)
        verdict = judge(output, expected, bound)
        computed = int((inside.sum(1) * chosen.mask.sum(1)).sum())
        records.append({
            "in": conv.in_channels, "out": conv.out_channels, "kept": chosen.density,
            "kept_by_class": [chosen.mask[digits.test_labels == digit].float().mean().item() for digit in range(10)],
            "always": chosen.mask.all(0).float().mean().item(), "never": (~chosen.mask.any(0)).float().mean().item(),
            "computed": computed, "all": inside.numel() * conv.out_channels,
            "passed": verdict.passed, "of_bound": verdict.worst,
        })  # fmt: skip

    network.eval()
    network(digits.test, watch)
    for record, products in zip(records, network.products):
        record["products"], record["share"] = products, record["computed"] / record["all"]
    return records


@torch.no_grad()
def inference_seconds(networks: list[Network], images: Tensor) -> list[float]:
    """Medians of passes over the images, the networks in turn."""
    spent: list[list[float]] = [[] for _ in networks]
    for _ in range(1 + PASSES):
        for network, times in zip(networks, spent):
            begin = time.perf_counter()
            network.eval()(images)
            times.append(time.perf_counter() - begin)
    return [median(times[1:]) for times in spent]


@torch.enable_grad()
def channels(digits: Digits | None = None, epochs: int = EPOCHS, widths: tuple[int, ...] = WIDTHS) -> dict:
    """Train both networks, measure them on the test set; the record, whose "passed" says that each layer was right."""
    digits = Digits.load() if digits is None else digits
    # What Numba compiles, or reads from its cache, is no part of training.
    train(True, Digits(digits.train[:BATCH], digits.train_labels[:BATCH], digits.test, digits.test_labels), 1, widths)
    gated, dense = (train(choice, digits, epochs, widths) for choice in (True, False))
    layers = layer_records(gated.network, digits)
    times = inference_seconds([gated.network, dense.network], digits.test)
    computed = sum(layer["share"] * layer["products"] for layer in layers) / sum(gated.network.products)
    return {
        "images": {"train": len(digits.train), "test": len(digits.test)},
        "epochs": epochs, "target": TARGET, "granularity": GRANULARITY, "layers": layers, "products": computed,
        "passed": all(layer["passed"] for layer in layers),
        "gated": {"accuracy": gated.accuracy, "training_s": gated.seconds, "inference_s": times[0]},
        "dense": {"accuracy": dense.accuracy, "training_s": dense.seconds, "inference_s": times[1]},
    }  # fmt: skip


def report(title: str, record: dict) -> None:
    """The tables of the scene."""
    shown = table(
        f"\n{title}",
        "<layer|channels kept|always|never|products|ideal|of its bound|<result",
        "products: the share of (channels in) * (channels out) that was computed, measured on the test set.",
    )
    for number, layer in enumerate(record["layers"], 1):
        shown.add_row(
            f"conv {number}: {layer['in']} to {layer['out']}", f"{layer['kept']:.0%}", f"{layer['always']:.0%}",
            f"{layer['never']:.0%}", f"{layer['share']:.0%}", f"{1 / max(layer['share'], 1e-9):.2f}x",
            f"{layer['of_bound']:.3f}", "[green]equal" if layer["passed"] else "[red]WRONG",
        )  # fmt: skip
    shown.add_section()
    shown.add_row("all layers", "", "", "", f"{record['products']:.0%}", f"{1 / max(record['products'], 1e-9):.2f}x")
    out = console()
    out.print(shown)
    compared = table("", "<network|accuracy|training s|inference ms")
    for name in ("dense", "gated"):
        row = record[name]
        compared.add_row(
            name, f"{row['accuracy'][-1]:.2%}", f"{row['training_s']:.1f}", f"{row['inference_s'] * 1e3:.1f}"
        )
    out.print(compared)
    gap = record["gated"]["accuracy"][-1] - record["dense"]["accuracy"][-1]
    dense, gated = record["dense"], record["gated"]
    training, inference = (dense[key] / gated[key] for key in ("training_s", "inference_s"))
    out.print(
        f"{gap * 100:+.2f} points of accuracy at {record['products']:.0%} of the products: training {training:.2f}x, "
        f"inference of {record['images']['test']} images at once {inference:.2f}x as fast as dense, gates included"
    )


def draw(title: str, record: dict, path: str) -> None:
    """Accuracy by epoch, and the kept share by layer and digit."""
    from .plots import pyplot, save

    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained", width_ratios=(1, 1.3))
    figure.suptitle(f"{title}: {record['products']:.0%} of the channel products", fontsize=12)
    for name, color in (("dense", "0.5"), ("gated", "C0")):
        accuracy = record[name]["accuracy"]
        left.plot(range(1, len(accuracy) + 1), accuracy, ".-", color=color, label=f"{name}: {accuracy[-1]:.1%}")
    left.set(xlabel="epoch", title="accuracy on the test set")
    left.legend(loc="lower right")
    kept = [layer["kept_by_class"] for layer in record["layers"]]
    drawn = right.imshow(kept, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, shares in enumerate(kept):
        for digit, share in enumerate(shares):
            tone = "black" if share > 0.6 else "white"
            right.text(digit, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=tone)
    right.set_xticks(range(10))
    right.set_yticks(range(len(kept)), [f"conv {number}" for number in range(1, len(kept) + 1)])
    right.grid(visible=False)
    right.set(xlabel="digit", title="share of channels kept")
    figure.colorbar(drawn, ax=right, fraction=0.03, pad=0.02)
    save(figure, path)


def scene(folder: Path) -> bool:
    """Run the scene, with its table, `channels.json` and `channels.png` in the folder; whether each layer was right."""
    title = "Channels: a network that chooses the channels each digit needs"
    with console(stderr=True).status("channels ..."):
        record = channels()
    report(title, record)
    draw(title.partition(":")[0], record, str(folder / "channels.png"))
    write_json(str(folder / "channels.json"), {"environment": environment("cpu"), **record})
    console().print(f"picture: {folder / 'channels.png'}, figures: {folder / 'channels.json'}")
    return record["passed"]
