"""`python -m dynconv verify`: every op, in every quantity it returns, against the float64 reference."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import dynconv

from .._geometry import Geometry
from . import console, options, table
from .bounds import Arithmetic, Verdict, arithmetic, judge
from .chains import BlockTraining, EvalBlock, MaskedChain
from .deform import Deformable
from .environment import environment, is_installed, write_json
from .filters import DynamicFilter
from .gathered import Gathered
from .layers import MASKS

BACKENDS = ("cpu", "triton")
WAYS = ("sparse", "dense")
# "tf32" is float32 with the switch that F.conv2d obeys turned on.
DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One convolution and one mask; the tensors follow from it."""

    name: str
    batch: int = 2
    in_channels: int = 24
    out_channels: int = 40
    size: tuple[int, int] = (13, 11)
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 1
    dilation: int = 1
    groups: int = 1
    mask: str = "blob"
    density: float = 0.4
    bias: bool = True
    gate: bool = False
    inactive: bool = False
    channels_last: bool = True


CASES = (
    Case("3x3", inactive=True),
    Case("3x3 gate", mask="random", gate=True, inactive=True),
    Case("3x3 contiguous", mask="random", channels_last=False, bias=False),
    Case("3x3 stride 2", stride=2, gate=True),
    Case("3x3 dilation 2", padding=2, dilation=2),
    Case("1x1", kernel=(1, 1), padding=0, in_channels=64, out_channels=48, gate=True),
    Case("1x1 stride 2", kernel=(1, 1), padding=0, stride=2),
    Case("5x2 same", kernel=(5, 2), padding="same", in_channels=17, out_channels=19, inactive=True),
    Case("7x7 stride 2", kernel=(7, 7), stride=2, padding=3, in_channels=3, out_channels=32, size=(32, 24)),
    Case("3x3 stride 1x2", stride=(1, 2), padding=(0, 1), in_channels=1, out_channels=1),
    Case("3x3 wide", in_channels=144, out_channels=136, size=(9, 9), density=0.3),
    Case("3x3 groups 2", groups=2),
    Case("3x3 groups of 16", in_channels=48, out_channels=48, groups=3, stride=2, gate=True),
    Case("depthwise 3x3", in_channels=40, groups=40, gate=True, inactive=True),
    Case("depthwise 5x5 stride 2", in_channels=40, groups=40, kernel=(5, 5), stride=2, padding=2, mask="random"),
    Case("3x3 samples", batch=3, mask="samples"),
    Case("3x3 empty", density=0.0, inactive=True),
    Case("3x3 full", density=1.0, gate=True),
)


@dataclass
class Row:
    """One quantity of one op on one backend in one dtype, over all cases."""

    op: str
    backend: str
    dtype: str
    quantity: str
    source: str
    cases: int = 0
    elements: int = 0
    error: float = 0.0
    bound: float = 0.0
    worst: float = 0.0
    failures: dict[str, list[str]] = field(default_factory=dict)  # what happened -> in which cases

    def add(self, case: str, verdict: Verdict, elements: int, reason: str = "out of bound") -> None:
        """Take in the verdict of one case, and the reason to give if it is not good."""
        self.cases += 1
        self.elements += elements
        self.error, self.bound = max(self.error, verdict.error), max(self.bound, verdict.bound)
        self.worst = max(self.worst, verdict.worst)
        if not verdict.passed:
            self.failures.setdefault(reason, []).append(case)

    @property
    def passed(self) -> bool:
        return self.cases > 0 and not self.failures


class MaskedConv2d:
    """masked_conv2d: forward, in place, and the gradient of every operand."""

    op = "masked_conv2d"
    cases = CASES

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype = case, dtype
        # The same numbers for every backend and run, rounded once to the type under test.
        generator = torch.Generator().manual_seed(CASES.index(case) if case in CASES else len(CASES))

        def tensor(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        self.options = dict(stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups)
        terms = case.in_channels // case.groups * case.kernel[0] * case.kernel[1]
        input = tensor(case.batch, case.in_channels, *case.size)
        weight = tensor(case.out_channels, case.in_channels // case.groups, *case.kernel, scale=terms**-0.5)
        geometry = Geometry.of(case.kernel, case.stride, case.padding, case.dilation)
        shape = (case.batch, case.out_channels, *geometry.output_size(*case.size))
        self.leaves = {"input": input, "weight": weight}
        if case.bias:
            self.leaves["bias"] = tensor(case.out_channels)
        if case.mask == "samples":
            self.mask = (torch.arange(case.batch) % 2 == 0).view(-1, 1, 1, 1)
        else:
            self.mask = MASKS[case.mask](shape[0], *shape[2:], case.density, generator)
        if case.gate:
            gate = tensor(*self.mask.shape)
            self.leaves["gate"] = torch.where(self.mask, torch.where(gate == 0, 1, gate), 0)
        if case.inactive:
            self.leaves["inactive"] = tensor(*shape)
        self.cache, self.grad = tensor(*shape), tensor(*shape)
        if case.channels_last:
            self.leaves = {name: _channels_last(leaf) for name, leaf in self.leaves.items()}
        self.cache = _channels_last(self.cache)
        self.leaves = {name: leaf.to(device) for name, leaf in self.leaves.items()}
        self.mask, self.cache, self.grad = self.mask.to(device), self.cache.to(device), self.grad.to(device)
        self.products, self.outputs = terms, case.out_channels // case.groups * case.kernel[0] * case.kernel[1]
        self.sites = int(self.mask.expand(shape[0], 1, *shape[2:]).sum())

    def source(self, quantity: str) -> str:
        """What n of the bound counts."""
        return self.terms(quantity)[1]

    def expect(self, rules: Callable[..., Arithmetic], backend: str) -> None:
        """The float64 reference and, of the same sums over absolute values, the bounds."""
        reference = dynconv.reference.masked_conv2d
        self.expected = self.run(reference, lambda tensor: tensor.double())
        magnitude = self.run(reference, lambda tensor: tensor.double().abs())
        gated = backend == "triton" and self.case.gate
        self.bounds = {
            quantity: self.bound(
                quantity, value, magnitude[quantity], rules(gated and quantity in ("grad input", "grad weight"))
            )
            for quantity, value in self.expected.items()
        }

    def actual(self) -> dict[str, Tensor]:
        """Every quantity of the op under test."""
        return self.run(dynconv.masked_conv2d, lambda tensor: tensor)

    def judge(self, quantity: str, actual: Tensor) -> Verdict:
        """Of one quantity."""
        return judge(actual, self.expected[quantity], self.bounds[quantity])

    def terms(self, quantity: str) -> tuple[int, str]:
        """How many roundings a product goes through in a quantity, and in words what is summed."""
        bias_and_gate = 2
        return {
            "output": (self.products + bias_and_gate, "Cin·kH·kW products, bias, gate"),
            "in place": (self.products + bias_and_gate, "Cin·kH·kW products, bias, gate"),
            "grad input": (self.outputs + 1, "Cout·kH·kW products, gate"),
            "grad weight": (self.sites + 1, "active sites' products, gate"),
            "grad bias": (self.sites + 1, "active sites, gate"),
            "grad gate": (self.products + self.case.out_channels + 4, "Cin·kH·kW products, bias, Cout"),
            "grad inactive": (0, "exact"),
        }[quantity]

    def run(self, operation: Callable[..., Tensor], transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Every quantity of `operation` on the transformed tensors (another type, absolute values)."""
        leaves = {name: transform(leaf.detach()).requires_grad_() for name, leaf in self.leaves.items()}
        operands = [leaves.get(name) for name in ("input", "weight", "bias")]
        mask = leaves.get("gate", self.mask)
        output = operation(*operands, **self.options, mask=mask, inactive=leaves.get("inactive"))
        grads = torch.autograd.grad(output, list(leaves.values()), transform(self.grad))
        with torch.no_grad():
            out = operation(*operands, **self.options, mask=mask, out=transform(self.cache).clone())
        quantities = {"output": output.detach(), "in place": out}
        return quantities | {f"grad {name}": grad for name, grad in zip(leaves, grads)}

    def bound(self, quantity: str, expected: Tensor, magnitude: Tensor, rules: Arithmetic) -> Tensor:
        """The elementwise bound; zero where nothing is computed and the result has to be exact."""
        terms, _ = self.terms(quantity)
        if terms == 0:
            return torch.zeros_like(expected)
        bound = rules.bound(expected, magnitude, terms)
        return torch.where(self.mask, bound, 0) if quantity in ("output", "in place", "grad gate") else bound


# Each is made of (case, dtype, device) and has `cases`, the `op` that the table names, source(quantity),
# expect(rules, backend), `expected` by quantity, actual(), and judge(quantity, actual).
OPERATIONS = (MaskedConv2d, MaskedChain, EvalBlock, BlockTraining, Gathered, DynamicFilter, Deformable)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def unavailable(backend: str, dtype: str) -> str | None:
    """Why a backend cannot run a dtype here and, where that can be changed, how; None if it can."""
    if backend == "cpu":
        if not is_installed("numba"):
            return "Numba is not installed"
        return "the CPU has no TF32" if dtype == "tf32" else None
    if not is_installed("triton"):
        return "Triton is not installed"
    if torch.cuda.is_available():
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device; TRITON_INTERPRET=1 python -m dynconv verify runs it in Triton's interpreter"
    if dtype == "bfloat16":
        return "Triton's interpreter computes bfloat16 products wrongly; needs a GPU"
    return "the interpreter has no TF32; needs a GPU" if dtype == "tf32" else None


QUICK = (
    "3x3", "3x3 gate", "3x3 stride 2", "1x1", "3x3 empty", "relu6 depthwise 3x3", "inverted residual packed",
    "bottleneck", "3x3 width", "packed width at sites", "linear width",
    "filters, softmax", "filters of channels", "filters to twice the size", "deformable", "aggregation, softmax",
)  # fmt: skip


def cases_of(quick: bool, names: Sequence[str] | None = None) -> list[tuple[type, Sequence]]:
    """The operations with their cases; of those, the named ones."""
    chosen = lambda name: (not quick or name in QUICK) and (names is None or name in names)
    return [(kind, [case for case in kind.cases if chosen(case.name)]) for kind in OPERATIONS]


def verify(
    backend: str, dtype: str, operations: Sequence[tuple[type, Sequence]], ways: Sequence[str] = WAYS
) -> Iterator[Row]:
    """Compare every op with the reference; a row for each quantity. An exception is a failure of that case.

    Each case runs in each of the ways, "sparse" and "dense", that `dynconv.execution` can force.
    """
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    for operation, cases in operations:
        rows: dict[tuple[str, str], Row] = {}
        for case in cases:
            checked = operation(case, kind, device)
            with _tf32(dtype == "tf32"):
                checked.expect(lambda gated=False: arithmetic(kind, device, gated), backend)
            for way in ways:
                try:
                    # Memory that an op does not write holds NaN, so an element it forgets is seen.
                    with (
                        dynconv.backend(backend),
                        dynconv.execution(way),
                        _tf32(dtype == "tf32"),
                        _poisoned_memory(),
                    ):
                        actual = checked.actual()
                except Exception as error:
                    actual = {}
                    reason = f"{type(error).__name__}: {error}"
                for quantity, value in checked.expected.items():
                    made = Row(checked.op, backend, dtype, quantity, checked.source(quantity))
                    row, name = rows.setdefault((checked.op, quantity), made), f"{case.name} ({way})"
                    if quantity not in actual:
                        row.add(name, Verdict(float("inf"), 0.0, float("inf"), False), 0, reason)
                        continue
                    tensors = value if isinstance(value, tuple) else (value,)
                    row.add(name, checked.judge(quantity, actual[quantity]), sum(t.numel() for t in tensors))
        yield from rows.values()


class _tf32:
    """Set the switch that F.conv2d obeys for float32 on CUDA, and put it back."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.enabled

    def __exit__(self, *exception) -> None:
        torch.backends.cudnn.allow_tf32 = self.before


class _poisoned_memory:
    """torch.empty returns NaN inside: PyTorch fills it in its deterministic mode."""

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *exception) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    few, all = (sum(len(cases) for _, cases in cases_of(quick)) for quick in (True, False))
    parser.add_argument("--quick", action="store_true", help=f"{few} cases of {all}")
    names = dict.fromkeys(case.name for _, cases in cases_of(False) for case in cases)
    parser.add_argument("--cases", nargs="+", choices=tuple(names), metavar="NAME", help="only these, of every op")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of execution, forced in turn")
    parser.add_argument("--json", type=options.output_file(), metavar="FILE", help="write every row there")


def main(arguments: argparse.Namespace) -> int:
    """Print the table; 0 if everything that could run passed and something ran."""
    shown = table(
        "dynconv verify: against the float64 reference on the same rounded inputs",
        "<op|<backend|<dtype|<quantity|cases|elements|max error|max bound|error/bound|<bound: gamma(n), n =|<result",
        "error/bound: the worst element. Bound: gamma(n) · sum of absolute products, for each element on the actual "
        "data; half types add one rounding of the result. Chains and blocks in eval mode: what each layer adds, passed "
        "on through the next ones. Training: error norms in units of plain PyTorch's.",
    )
    rows: list[Row] = []
    skipped: list[dict] = []
    with console(stderr=True).status("") as status:
        for backend, dtype in itertools.product(arguments.backends, arguments.dtypes):
            reason = unavailable(backend, dtype)
            if reason:
                skipped.append({"backend": backend, "dtype": dtype, "reason": reason})
                continue
            status.update(f"{backend} {dtype}")
            made = list(verify(backend, dtype, cases_of(arguments.quick, arguments.cases), arguments.ways))
            rows += made
            for row in made:
                result = "[green]PASS" if row.passed else "[red]FAIL"
                shown.add_row(
                    row.op, row.backend, row.dtype, row.quantity, str(row.cases), str(row.elements), f"{row.error:.1e}",
                    f"{row.bound:.1e}", f"{row.worst:.3f}", row.source, result,
                )  # fmt: skip
            shown.add_section()
    out = console()
    out.print(shown)
    for skip in skipped:
        out.print(f"SKIPPED {skip['backend']} {skip['dtype']}: {skip['reason']}", style="yellow")
    failed = [row for row in rows if not row.passed]
    for row in failed:
        for reason, names in row.failures.items():
            what = f"FAILED {row.op} {row.backend} {row.dtype} {row.quantity}"
            out.print(f"{what}: {reason}, in {len(names)} of {row.cases} cases: {', '.join(names)}", markup=False)
    passed = bool(rows) and not failed
    out.print(
        f"{len(rows) - len(failed)} of {len(rows)} quantities within their bounds" if rows else "Nothing could run"
    )
    if arguments.json:
        record = {"environment": environment("cuda" if torch.cuda.is_available() else "cpu"), "passed": passed}
        write_json(
            arguments.json,
            record | {"rows": [vars(row) | {"passed": row.passed} for row in rows], "skipped": skipped},
        )
    return 0 if passed else 1
