"""How often the programs of a launch take each loop, and which bytes they read and write: its scalars, evaluated.

A kernel's compiled form holds its program in Triton's IR. The bounds of its loops and what decides its branches are
scalars, which follow from the number of the program, the arguments and a few elements of tensors, such as the count of
active sites. `trace` evaluates them for all programs of a grid together, as vectors. Of a few programs it evaluates the
tensors as well, as far as addresses and masks need them: integers as they are, and floating point numbers that are
loaded, such as offsets, as zeros. That says which sectors of memory a program touches, and how often.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

# Iterations of a loop around other loops that are evaluated one by one; beyond it the first stands for all.
EVALUATED = 64
# Programs of which tensors are evaluated, with loops and without, and iterations of each of their loops.
SAMPLED_PROGRAMS, SAMPLED_STRAIGHT, SAMPLED_ITERATIONS = 12, 64, 16
SECTOR = 32  # bytes that memory and L2 move at least
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}


@dataclass(frozen=True)
class Access:
    """A load or a store of the source, over the whole grid.

    Attributes:
        argument: the name of the tensor.
        is_store: whether it writes.
        shape: of the tile that one execution moves; empty for a scalar.
        element: bytes of one element.
        loop: the number of the innermost loop around it, or -1.
        executions: of all programs together.
        sectors: that one execution touches, on average; where addresses are unknown, all that a full tile has.
    """

    argument: str
    is_store: bool
    shape: tuple[int, ...]
    element: int
    loop: int
    executions: float
    sectors: float

    @property
    def bytes(self) -> float:
        """Of all programs, in whole sectors."""
        return self.sectors * SECTOR * self.executions


@dataclass(frozen=True)
class LoopTrips:
    """A loop of the source, in order: how often the programs with work enter it and take it, on average."""

    depth: int
    entries: float
    trips: float

    @property
    def per_entry(self) -> float:
        """Trips each time the loop is entered."""
        return self.trips / self.entries if self.entries else 0.0


@dataclass(frozen=True)
class Trace:
    """What a launch's programs do.

    Attributes:
        programs: of the grid.
        working: those that store anything and take a loop, where there is one; the others return early.
        storing: those that store anything.
        loops: of the source, in order, an outer one before those inside it.
        accesses: loads and stores, in order.
        touched: bytes that a storing program touches of each argument, each sector once: by (argument, is_store).
        unknown: what could not be evaluated, in words: a loop counts as taken once then, and of two branches the one in
            which there is more to do.
    """

    programs: int
    working: int
    storing: int
    loops: tuple[LoopTrips, ...]
    accesses: tuple[Access, ...]
    touched: dict[tuple[str, bool], float]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class _Pointer:
    """Into an argument: the element for each program, of each lane of a tensor of them."""

    argument: str
    offset: np.ndarray


@dataclass
class _Block:
    """Operations up to a terminator; a `_Loop`, an `_If` or a line each."""

    label: str = ""
    arguments: tuple[str, ...] = ()
    body: list = field(default_factory=list)


@dataclass
class _Region:
    """A loop (`scf.for`) or a branch (`scf.if`) with its lines inside."""

    head: str
    body: list
    other: list
    number: int = -1
    depth: int = 0


def trace(ir: str, arguments: dict[str, object], grid: tuple[int, int, int], is_known: Callable[[str], bool]) -> Trace:
    """Evaluate the scalars of a kernel.

    Args:
        ir: of the kernel, `asm["ttir"]`.
        arguments: by name, as `flattened` gives them; those that the kernel's IR has, and others.
        grid: programs in three axes.
        is_known: whether the elements of the tensor argument of that name are what they will be when the kernel runs.
    """
    whole = _Tracer(ir, arguments, grid, is_known)
    whole.run()
    storing = np.flatnonzero(whole.stored)
    entered = np.any([trips > 0 for _, trips in whole.trips], axis=0) if whole.trips else whole.stored
    working = np.flatnonzero(whole.stored & entered) if np.any(whole.stored & entered) else storing
    number = min(len(storing), SAMPLED_PROGRAMS if whole.loops else SAMPLED_STRAIGHT)
    sample = storing[np.linspace(0, len(storing) - 1, number).astype(int)]
    sampled = _Tracer(ir, arguments, grid, is_known, sample)
    if len(sample):
        sampled.run()
    share = lambda values: float(values[working].mean()) if len(working) else 0.0
    loops = tuple(
        LoopTrips(loop.depth, share(entries), share(trips))
        for loop, (entries, trips) in zip(whole.loops, whole.trips, strict=True)
    )
    accesses = tuple(
        Access(*values[:-2], values[-2], sampled.sectors_of(number, values))
        for number, values in whole.accesses.items()
    )
    unknown = tuple(dict.fromkeys((*whole.unknown, *sampled.unknown)))
    return Trace(whole.programs, len(working), len(storing), loops, accesses, sampled.touched(), unknown)


def flattened(arguments: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a launch, and of those that are tuples each element as well: "name.0", "name.1", and so on."""
    return {**arguments, **{f"{name}.{place}": leaf for name, value in arguments.items() if isinstance(value, tuple)
                            for place, leaf in enumerate(_leaves(value))}}  # fmt: skip


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


class _Tracer:
    """Of all programs and without tensors, or of some and with them."""

    def __init__(self, ir, arguments, grid, is_known, sample: np.ndarray | None = None) -> None:
        self.arguments, self.grid, self.is_known = arguments, grid, is_known
        number = np.arange(math.prod(grid), dtype=np.int64) if sample is None else sample
        self.programs, self.has_tensors = len(number), sample is not None
        self.axes = dict(x=number % grid[0], y=number // grid[0] % grid[1], z=number // (grid[0] * grid[1]))
        self.values: dict[str, object] = {}
        self.bases: dict[str, str] = {}  # pointers, tensors of them included -> the argument that they point into
        self.accesses: dict[int, list] = {}  # by the number of a line
        self.seen: dict[tuple[str, bool], list[list[np.ndarray]]] = {}  # sectors, for each program
        self.sectors: dict[int, list[float]] = {}  # of a line: sectors and executions
        self.stored = np.zeros(self.programs, bool)
        self.loops: list[_Region] = []
        self.trips: list[list] = []  # of each loop: (entries, trips) of each program
        self.unknown: list[str] = []
        self.inside = -1  # the loop whose body runs
        self.blocks = self._parse(ir)

    def run(self) -> None:
        masks = {block.label: np.zeros(self.programs) for block in self.blocks}
        masks[self.blocks[0].label] += 1.0
        for block in self.blocks:  # Triton's order: no branch goes back
            weight = masks[block.label]
            if weight.any():
                self._block(block, weight, masks)

    def sectors_of(self, number: int, access: list) -> float:
        """Of one execution of a line, on average."""
        total, executions = self.sectors.get(number, (0.0, 0.0))
        _, _, shape, element, *_ = access
        return total / executions if executions else max(1.0, math.prod(shape) * element / SECTOR)

    def touched(self) -> dict[tuple[str, bool], float]:
        """Bytes that a program touches of each argument, on average."""
        count = lambda parts: len(np.unique(np.concatenate(parts))) if parts else 0
        return {
            key: SECTOR * sum(map(count, programs)) / self.programs
            for key, programs in self.seen.items()
            if self.programs
        }

    # What the IR looks like.

    def _parse(self, ir: str) -> list[_Block]:
        lines = [re.sub(r"\s+loc\(.*\)\s*$", "", line).strip() for line in ir.splitlines()]
        begin = next(n for n, line in enumerate(lines) if line.startswith("tt.func public"))
        names = re.findall(r"(%[\w$.-]+): (!?[\w.]+(?:<[^>]*>)?)", lines[begin])
        given = self._given(ir, [name for name, _ in names])
        for (name, kind), key in zip(names, given, strict=True):
            value = self.arguments.get(key)
            if kind.startswith("!tt.ptr"):
                self.values[name] = _Pointer(key, np.zeros(self.programs, np.int64))
                self.bases[name] = key
            elif isinstance(value, (int, bool)):
                self.values[name] = np.full(self.programs, int(value), np.int64)
        self.at, self.lines = begin + 1, lines
        blocks = [_Block()]
        while not lines[self.at].startswith("}"):
            line = lines[self.at]
            if label := re.match(r"(\^\w+)(?:\((.*)\))?:", line):
                blocks.append(_Block(label.group(1), tuple(re.findall(r"(%[\w$.-]+):", label.group(2) or ""))))
                self.at += 1
            else:
                blocks[-1].body.append(self._item(0))
        return blocks

    def _given(self, ir: str, names: list[str]) -> list[str]:
        """The parameters' names: Triton before 3.7 prints numbers, and the name beside them."""
        line = next(line for line in ir.splitlines() if "tt.func public" in line)
        named = re.findall(r'(%[\w$.-]+): [^%]*?loc\("(\w+)"\(', line)
        keys = [dict(named).get(name, name.lstrip("%")) for name in names]
        for key in {key for key in keys if isinstance(self.arguments.get(key), tuple)}:
            # Of a tuple the IR has those elements that it does not take for constants, as it does None and 1.
            leaves = {
                f"{key}.{place}": leaf for place, leaf in enumerate(_leaves(self.arguments[key])) if leaf is not None
            }
            vary = [name for name, leaf in leaves.items() if leaf is not True and leaf != 1]
            chosen = next((some for some in (list(leaves), vary) if len(some) == keys.count(key)), [])
            for place, name in zip([place for place, given in enumerate(keys) if given == key], chosen):
                keys[place] = name
        return keys

    def _item(self, depth: int):
        """The next line, or the loop or branch that begins there."""
        line, number = self.lines[self.at], self.at
        self.at += 1
        if not line.endswith("{") or "scf." not in line:
            if line.endswith("{"):  # a region of tensors, such as a reduction's
                self._skip()
            return number, line
        region = _Region(line, [], [], depth=depth)
        inside = depth + ("scf.for" in line or "scf.while" in line)
        if inside > depth:
            region.number = len(self.loops)
            self.loops.append(region)
            self.trips.append([np.zeros(self.programs), np.zeros(self.programs)])
        into = region.body
        while not (end := self.lines[self.at]).startswith("}"):
            into.append(self._item(inside))
        while end.startswith(("} else {", "} do {")):
            self.at += 1
            into = region.other
            while not (end := self.lines[self.at]).startswith("}"):
                into.append(self._item(inside))
        self.at += 1
        return number, region

    def _skip(self) -> None:
        depth = 1
        while depth:
            line = self.lines[self.at]
            depth += line.endswith("{") - line.startswith("}") * (not line.endswith("{"))
            self.at += 1

    # What it does.

    def _block(self, block: _Block, weight: np.ndarray, masks: dict[str, np.ndarray]) -> None:
        for number, item in block.body:
            if isinstance(item, str) and item.startswith("cf."):
                self._branch(item, weight, masks)
            else:
                self._run([(number, item)], weight)

    def _branch(self, line: str, weight: np.ndarray, masks: dict[str, np.ndarray]) -> None:
        ways = re.findall(r"(\^\w+)(?:\(([^)]*)\))?", line)
        parts = [weight]
        if line.startswith("cf.cond_br"):
            # Where nobody knows, programs go where there is more to do.
            size = lambda way: len(self._labelled(way[0]).body)
            taken = self._condition(
                re.search(r"cf\.cond_br (%[\w$.-]+)", line).group(1), line, size(ways[0]) > size(ways[1])
            )
            parts = [weight * taken, weight * ~taken]
        for (label, passed), part in zip(ways, parts, strict=True):
            masks[label] = masks[label] + part
            for name, value in zip(self._labelled(label).arguments, _NAME.findall(passed.split(":")[0])):
                self._pass(name, value, part > 0)

    def _labelled(self, label: str) -> _Block:
        return next(block for block in self.blocks if block.label == label)

    def _pass(self, name: str, value: str, where: np.ndarray) -> None:
        """Give a block's argument what a branch hands over."""
        new, old = self.values.get(value), self.values.get(name)
        if isinstance(new, np.ndarray):
            self.values[name] = np.where(where, new, old) if isinstance(old, np.ndarray) else new
        self._same_base(name, value)

    def _same_base(self, name: str, value: str) -> None:
        if value in self.bases:
            self.bases[name] = self.bases[value]

    def _condition(self, name: str, line: str, otherwise: bool = True) -> np.ndarray:
        value = self.values.get(name)
        if isinstance(value, np.ndarray):
            return value != 0
        self.unknown.append(f"what decides `{line.split(' -> ')[0][:60]}`")
        return np.full(self.programs, otherwise)

    def _run(self, items: list, weight: np.ndarray) -> None:
        for number, item in items:
            if isinstance(item, str):
                self._line(number, item, weight)
            elif item.number >= 0:
                self._loop(item, weight)
            else:
                self._if(item, weight)

    def _loop(self, loop: _Region, weight: np.ndarray) -> None:
        if "scf.while" in loop.head:
            self.unknown.append("a `while` loop")
            self._count_loop(loop, weight, weight)
            self._run(loop.body + loop.other, weight)
            return
        head = re.search(r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)", loop.head)
        name, *bounds = head.groups()
        begin, end, step = (self.values.get(bound) for bound in bounds)
        carried = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", loop.head.partition("iter_args(")[2])
        for argument, initial in carried:
            self.values.pop(argument, None)
            self._same_base(argument, initial)
        if any(not isinstance(value, np.ndarray) for value in (begin, end, step)):
            self.unknown.append(f"the bounds of `{head.group(0)}`")
            trips = np.where(weight > 0, 1, 0)
            begin = step = np.zeros(self.programs, np.int64)
        else:
            trips = np.maximum(0, -(-(end - begin) // np.maximum(step, 1)))
        self._count_loop(loop, weight, weight * trips)
        most = int(trips[weight > 0].max(initial=0))
        around, self.inside = self.inside, loop.number
        if self.has_tensors:
            for argument, initial in carried:
                self._copy(argument, initial)
            chosen = np.unique(np.linspace(0, most - 1, min(most, SAMPLED_ITERATIONS)).astype(int)) if most else []
            for iteration in chosen:
                self.values[name] = begin + iteration * step
                self._run(loop.body, weight * (trips > iteration) * (most / len(chosen)))
                yielded = loop.body[-1][1] if loop.body and isinstance(loop.body[-1][1], str) else ""
                handed = _NAME.findall(yielded.partition("scf.yield")[2].split(" : ")[0])
                values = [self.values.get(value) for value in handed]
                for (argument, _), value in zip(carried, values):
                    self._set(argument, value)
        elif any(not isinstance(item, str) for _, item in loop.body) and most <= EVALUATED:
            for iteration in range(most):
                self.values[name] = begin + iteration * step
                self._run(loop.body, weight * (trips > iteration))
        elif most:
            self.values[name] = begin
            self._run(loop.body, weight * trips)
        self.inside = around
        results = re.match(r"(%[\w$.-]+)(?::(\d+))? = ", loop.head)
        if results:
            for place, (argument, initial) in enumerate(carried):
                named = results.group(1) + (f"#{place}" if results.group(2) else "")
                self._set(named, self.values.get(argument) if self.has_tensors else None)
                self._same_base(named, initial)

    def _set(self, name: str, value: object) -> None:
        if value is None:
            self.values.pop(name, None)
        else:
            self.values[name] = value

    def _copy(self, name: str, source: str) -> None:
        self._set(name, self.values.get(source))

    def _count_loop(self, loop: _Region, entries: np.ndarray, trips: np.ndarray) -> None:
        counts = self.trips[loop.number]
        counts[0] = counts[0] + entries
        counts[1] = counts[1] + trips

    def _if(self, branch: _Region, weight: np.ndarray) -> None:
        taken = self._condition(re.search(r"scf\.if (%[\w$.-]+(?:#\d+)?)", branch.head).group(1), branch.head)
        given = []
        for body, part in ((branch.body, weight * taken), (branch.other, weight * ~taken)):
            if part.any():
                self._run(body, part)
            last = body[-1][1] if body else ""
            given.append(_NAME.findall(last.partition("scf.yield")[2].split(" : ")[0])
                         if isinstance(last, str) else [])  # fmt: skip
        results = re.match(r"(%[\w$.-]+)(?::(\d+))? = ", branch.head)
        if not results:
            return
        for place, (then, other) in enumerate(zip(*given)):
            named = results.group(1) + (f"#{place}" if results.group(2) else "")
            values = self.values.get(then), self.values.get(other)
            if all(isinstance(value, np.ndarray) for value in values):
                self.values[named] = np.where(taken, *values)
            elif taken.all() and then in self.values:
                self.values[named] = self.values[then]
            elif not taken.any() and other in self.values:
                self.values[named] = self.values[other]
            self._same_base(named, then)

    def _line(self, number: int, line: str, weight: np.ndarray) -> None:
        if "tt.load" in line or "tt.store" in line or "tt.atomic" in line:
            self._access(number, line, weight)
            return
        made = re.match(r"(%[\w$.-]+)(?::\d+)? = ([\w.]+)\s*(.*)", line)
        if not made:
            return
        name, op, rest = made.groups()
        operands = _NAME.findall(rest.split(" : ")[0])
        for operand in operands:
            if operand in self.bases:
                self.bases[name] = self.bases[operand]
                break
        if "tensor<" not in rest:
            self._set(name, self._scalar(op, rest, operands))
        elif self.has_tensors:
            self._set(name, self._tensor(op, rest, operands))

    def _tensor(self, op: str, rest: str, operands: list[str]):
        """The value of a tensor, with the programs as its first dimension; None where it is not known."""
        shape = tuple(int(size) for size in re.findall(r"tensor<((?:\d+x)+)", rest)[-1].split("x")[:-1])
        if op == "arith.constant":
            text = re.search(r"dense<([^>]*)>", rest).group(1)
            constant = {"true": 1, "false": 0}.get(text)
            if constant is None:
                try:
                    constant = float(text) if re.search(r"[.eE]", text) else int(text, 0)
                except ValueError:
                    return None
            return np.full((1, *shape), constant, np.float64 if isinstance(constant, float) else np.int64)
        if op == "tt.make_range":
            first = int(re.search(r"start = (\d+)", rest).group(1))
            return (first + np.arange(shape[0], dtype=np.int64))[None]
        values = [self.values.get(operand) for operand in operands]
        if not values or any(value is None for value in values):
            return None
        if isinstance(values[0], _Pointer):
            if op in ("tt.addptr", "tt.bitcast"):
                return self._moved(op, rest, *values)
            moved = self._shaped(op, rest, values[0].offset, shape)
            return None if moved is None else _Pointer(values[0].argument, moved)
        if any(isinstance(value, _Pointer) for value in values):
            return None
        if (moved := self._shaped(op, rest, values[0], shape)) is not None:
            return moved
        if op == "arith.select":
            return np.where(values[0] != 0, values[1], values[2])
        name = op.partition(".")[2]
        if name == "cmpi":
            return _compare(rest.split(",")[0].strip(), *values).astype(np.int64)
        if name == "cmpf":
            return _compare(rest.split(",")[0].strip()[1:], *values, is_float=True).astype(np.int64)
        return _ARITHMETIC[name](*values, *([rest] if name in _NEEDS_TYPE else [])) if name in _ARITHMETIC else None

    @staticmethod
    def _moved(op: str, rest: str, pointer: _Pointer, steps: np.ndarray | None = None) -> _Pointer | None:
        """A pointer so many elements further, or to elements of another type."""
        if op == "tt.addptr" and isinstance(steps, np.ndarray):
            return _Pointer(pointer.argument, pointer.offset + steps)
        if op == "tt.bitcast":
            before, after = (_BYTES[element] for element in re.findall(r"!tt\.ptr<(\w+)>", rest))
            return _Pointer(pointer.argument, pointer.offset * before // after)
        return None

    def _shaped(self, op: str, rest: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
        if op == "tt.splat":
            return value.reshape(-1, *(1 for _ in shape))
        if op == "tt.expand_dims":
            return np.expand_dims(value, 1 + int(re.search(r"axis = (\d+)", rest).group(1)))
        if op in ("tt.broadcast", "ttg.convert_layout"):
            return value  # numpy does when it is used
        if op in ("tt.reshape", "tt.trans"):
            given = tuple(int(size) for size in re.findall(r"tensor<((?:\d+x)+)", rest)[0].split("x")[:-1])
            value = np.broadcast_to(value, (len(value), *given))
            if op == "tt.reshape":
                return value.reshape(len(value), *shape)
            order = [int(axis) for axis in re.search(r"order = array<i32: ([^>]*)>", rest).group(1).split(",")]
            return value.transpose(0, *(axis + 1 for axis in order))
        return None

    def _scalar(self, op: str, rest: str, operands: list[str]):
        if op == "tt.get_program_id":
            return self.axes[rest.split()[0]]
        if op == "tt.get_num_programs":
            return np.full(self.programs, self.grid["xyz".index(rest.split()[0])], np.int64)
        if op == "arith.constant":
            text = rest.split(" : ")[0].strip()
            integer = {"true": 1, "false": 0}.get(text)
            if integer is None and not re.fullmatch(r"-?\d+", text):
                return None
            return np.full(self.programs, int(text) if integer is None else integer, np.int64)
        values = [self.values.get(operand) for operand in operands]
        if values and isinstance(values[0], _Pointer):
            return self._moved(op, rest, *values)
        if op == "arith.select" and isinstance(values[0], np.ndarray):
            if all(isinstance(value, np.ndarray) for value in values):
                return np.where(values[0] != 0, values[1], values[2])
            return None
        if not values or not all(isinstance(value, np.ndarray) for value in values):
            return None
        name = op.partition(".")[2]
        if name == "cmpi":
            return _compare(rest.split(",")[0].strip(), *values).astype(np.int64)
        return _ARITHMETIC[name](*values, *([rest] if name in _NEEDS_TYPE else [])) if name in _ARITHMETIC else None

    def _access(self, number: int, line: str, weight: np.ndarray) -> None:
        is_store = "tt.load" not in line
        operands = _NAME.findall((line if is_store else line.partition(" = ")[2]).split(" : ")[0])
        dimensions, element = re.search(r": (?:tensor<((?:\d+x)+))?!tt\.ptr<(\w+)>", line).groups()
        shape = tuple(int(size) for size in (dimensions or "").split("x") if size)
        argument = self.bases.get(operands[0], "")
        access = self.accesses.setdefault(number, [argument, is_store, shape, _BYTES[element], self.inside, 0.0, 0.0])
        access[-2] += float(weight.sum())
        if is_store:
            self.stored |= weight > 0
        pointer = self.values.get(operands[0])
        guard = operands[2 if is_store else 1 :]
        mask = self.values.get(guard[0]) if guard else np.ones((1, *(1 for _ in shape)), np.int64)
        name = None if is_store else line.split()[0]
        if name:
            self._set(name, None)
        if not isinstance(pointer, _Pointer) or (shape and not self.has_tensors):
            return
        full = (self.programs, *shape)
        offset = np.broadcast_to(pointer.offset, full)
        active = np.broadcast_to(weight.reshape(-1, *(1 for _ in shape)) > 0, full)
        if mask is not None:
            active = active & np.broadcast_to(mask != 0, full)
        if self.has_tensors:
            self._touch(number, argument, is_store, offset, active, weight, _BYTES[element])
        if name and element.startswith("i"):
            self._set(name, self._element(pointer.argument, offset, active))
        elif name:
            self._set(name, np.zeros((1, *(1 for _ in shape))))

    def _touch(self, number, argument, is_store, offset, active, weight, element) -> None:
        programs = self.seen.setdefault((argument, is_store), [[] for _ in range(self.programs)])
        counts = self.sectors.setdefault(number, [0.0, 0.0])
        for program in np.flatnonzero(weight > 0):
            sectors = np.unique(offset[program][active[program]] * element // SECTOR)
            programs[program].append(sectors)
            counts[0] += len(sectors) * float(weight[program])
            counts[1] += float(weight[program])

    def _element(self, argument: str, offset: np.ndarray, active: np.ndarray) -> np.ndarray | None:
        """Elements of a tensor argument, and 0 where they are not read."""
        tensor = self.arguments.get(argument)
        if not isinstance(tensor, Tensor):
            return None
        if not self.is_known(argument):
            self.unknown.append(f"the elements of {argument}")
            return np.zeros_like(offset) if self.has_tensors and offset.ndim > 1 else None
        if tensor.is_floating_point():  # read by words
            return np.zeros_like(offset)
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        flat = tensor.detach().as_strided((size,), (1,)).cpu().numpy()
        asked = np.where(active, offset, 0)
        if asked.min() < 0 or asked.max() >= size:
            raise IndexError(f"{argument}: expected elements below {size} to be read, got {asked.max()}")
        return np.where(active, flat[asked], 0).astype(np.int64)


def _divide(a, b):
    """As C does, towards zero."""
    safe = np.where(b == 0, 1, b)
    return np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))


def _unsigned(a, rest: str):
    return a & (0xFFFFFFFF if "i32" in rest else 0x7FFFFFFFFFFFFFFF)


def _high(a, b):
    product = (a & 0xFFFFFFFF).astype(np.uint64) * (b & 0xFFFFFFFF).astype(np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)


_NEEDS_TYPE = {"shrui", "divui", "remui"}
_ARITHMETIC = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b,
    "divsi": _divide, "remsi": lambda a, b: a - _divide(a, b) * b,
    "divui": lambda a, b, rest: _divide(_unsigned(a, rest), b),
    "remui": lambda a, b, rest: _unsigned(a, rest) % np.where(b == 0, 1, b),
    "ceildivsi": lambda a, b: -_divide(-a, b),
    "minsi": np.minimum, "minui": np.minimum, "maxsi": np.maximum, "maxui": np.maximum,
    "andi": np.bitwise_and, "ori": np.bitwise_or, "xori": np.bitwise_xor,
    "shli": np.left_shift, "shrsi": np.right_shift, "shrui": lambda a, b, rest: _unsigned(a, rest) >> b,
    "extsi": lambda a: a, "extui": lambda a: a, "trunci": lambda a: a, "index_cast": lambda a: a,
    "bitcast": lambda a: a, "mulhiui": _high,
    "addf": lambda a, b: a + b, "subf": lambda a, b: a - b, "mulf": lambda a, b: a * b,
    "divf": lambda a, b: a / np.where(b == 0, 1, b), "negf": lambda a: -a, "floor": np.floor, "ceil": np.ceil,
    "sitofp": lambda a: a.astype(np.float64), "uitofp": lambda a: a.astype(np.float64),
    "fptosi": lambda a: a.astype(np.int64), "extf": lambda a: a, "truncf": lambda a: a,
    "maxnumf": np.maximum, "minnumf": np.minimum, "maximumf": np.maximum, "minimumf": np.minimum,
}  # fmt: skip


def _compare(kind: str, a: np.ndarray, b: np.ndarray, is_float: bool = False) -> np.ndarray:
    if kind.startswith("u") and not is_float:
        a, b = _unsigned(a, "i64"), _unsigned(b, "i64")
    return {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal}[kind[-2:]](a, b)  # fmt: skip
