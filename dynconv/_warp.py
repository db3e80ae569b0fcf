"""How long one warp takes over a kernel's machine code, and how much it asks of each unit of its multiprocessor.

A walk along the instructions in the order of the program: loops as often as somebody says, code that a branch may skip
as if it did not. The warp issues one instruction after the other, as the assembler tells it: after so many cycles, and
where an operand comes from a unit of variable latency, once the barrier for it is lifted. Other warps are not there.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ._machine_code import BARRIER, MATRIX, Code, Instruction, Span

# Iterations of a loop that are walked one by one, and those at the end of them whose mean all others take: as many as a
# pattern of 2, 3, 4 or 6 buffers fits into.
WALKED, STEADY = 20, 12
# Threads of a warp over results that a quarter of a multiprocessor gives each cycle: the table "Throughput of Native
# Arithmetic Instructions" of the CUDA C++ Programming Guide, of compute capability 8.0 and 9.0.
PIPES = {
    "fma": (1, "FADD FMUL FFMA HADD2 HMUL2 HFMA2 HMNMX2 IMAD32I"),
    "fma, wide": (2, "IMAD IDP"),
    "integer": (2, "IADD3 VIADD LOP3 SHF LEA ISETP SEL PRMT FSETP FSEL FMNMX PLOP3 P2R R2P IABS IMNMX VIMNMX FCHK F2FP "
                "HSETP2 HSET2 FSET BMSK SGXT IADD3X VIADDMNMX LOP IADD I2FP"),
    "special": (8, "MUFU I2F F2I F2F FRND POPC FLO BREV I2I"),
    "double": (4, "DADD DMUL DFMA DSETP"),
    # The L1 cache is of the same memory.
    "shared": (4, "LDG STG LDS STS LDGSTS LDSM STSM SHFL ATOM ATOMS ATOMG RED LDL STL LD ST LDC"),
}  # fmt: skip
_PIPE_OF = {name: (pipe, cost) for pipe, (cost, names) in PIPES.items() for name in names.split()}
# Cycles from issue to result, of units that take as long as they take. Assumed, of the order that microbenchmarks of
# single instructions find.
LATENCY = {
    "LDS": 30, "LDSM": 30, "LDC": 40, "S2R": 30, "S2UR": 30, "SHFL": 24, "MUFU": 24, "I2F": 14, "F2I": 14, "F2F": 14,
    "POPC": 14, "FLO": 14, "R2UR": 12, "ATOMS": 60,
}  # fmt: skip
OTHER_LATENCY = 12
BARRIER_CYCLES = 20  # of bar.sync, with nobody late
OPERAND_CYCLES = 12  # until a unit of variable latency has read what it was given
WAIT = re.compile(r"DEPBAR\.LE (SB0|gsb0), 0x([0-9a-f]+)")
# Matrix instructions: products a cycle of a quarter of a multiprocessor, by architecture and bytes of an operand.
PRODUCTS = {80: {1: 512, 2: 256, 4: 128, 8: 16}, 90: {1: 1024, 2: 512, 4: 256, 8: 32}}
SHARED_BYTES = 128  # a cycle of a multiprocessor, of shared memory


@dataclass
class Step:
    """One iteration of a loop, as one warp issues it."""

    instructions: int = 0
    barriers: int = 0
    cycles: float = 0.0  # of the warp alone
    tensor: float = 0.0  # of its tensor core
    copied: int = 0  # bytes that its asynchronous copies bring


@dataclass
class Walk:
    """What one warp of a program issues in all, and how long it takes alone.

    Attributes:
        cycles: until the last instruction.
        inside: of these, in the loop that takes most.
        issued: instructions.
        pipes: cycles that each unit is taken; of "tensor", by matrix instructions.
        step: of the loop that takes most; None without loops.
        trips: of that loop, in all.
        missed: loops with trips that the walk did not come to.
    """

    cycles: float = 0.0
    inside: float = 0.0
    issued: float = 0.0
    pipes: Counter = field(default_factory=Counter)
    step: Step | None = None
    trips: float = 0.0
    missed: int = 0

    @property
    def busiest(self) -> tuple[str, float]:
        """The unit that is taken longest, issuing instructions included, and for how many cycles."""
        name, cycles = max(self.pipes.items(), key=lambda item: item[1], default=("", 0.0))
        return (name, cycles) if cycles > self.issued else ("instructions", self.issued)


def walk(code: Code, trips: Sequence[float], *, latency: float, arch: int, until_exit: bool = False) -> Walk:
    """Walk along a kernel.

    Args:
        code: of the kernel.
        trips: of each of its loops, each time it is entered.
        latency: cycles that a load from global memory takes.
        arch: 80 or 90.
        until_exit: stop where programs without work return.

    Raises ValueError where trips has another length than there are loops.
    """
    if len(trips) != len(code.loops):
        raise ValueError(f"trips: expected one for each of {len(code.loops)} loops, got {len(trips)}")
    return _Walker(code, trips, latency, arch, until_exit).run()


def memory_bytes(instruction: Instruction) -> int:
    """Of a thread, that a load, a store or a copy moves."""
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", instruction.opcode)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width.group(1)] if width else 4


def matrix_cycles(instruction: Instruction, arch: int) -> tuple[float, float]:
    """Of the tensor core of a warp, and of the shared memory that gives it operands."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)\b", instruction.opcode)
    element = 8 if instruction.name == "DMMA" else 4 if "TF32" in instruction.opcode else 2
    if instruction.name == "HGMMA":  # the four warps of a group multiply 16 rows each
        rows, columns, depth = (int(number) for number in shape.groups())
        # With A in registers it is "R24, R4, gdesc[UR8], R24".
        read = (0 if re.search(r"R\d+, R\d+, gdesc", instruction.text) else rows) + columns
        multiplied = rows * columns * depth / 4 / PRODUCTS[arch][element]
        return multiplied, read * depth * element / SHARED_BYTES
    if shape:  # DMMA.8x8x4
        products = int(shape.group(1)) * int(shape.group(2)) * int(shape.group(3))
    else:  # HMMA.16816: 16 x 8 x 16
        digits = re.search(r"\.(\d{3,5})\b", instruction.opcode).group(1)
        products = {"884": 256, "1684": 512, "1688": 1024, "16816": 2048, "16832": 4096}[digits]
    return products / PRODUCTS[arch][element], 0.0


class _Walker:
    def __init__(self, code: Code, trips: Sequence[float], latency: float, arch: int, until_exit: bool) -> None:
        self.code, self.latency, self.arch, self.until_exit = code, latency, arch, until_exit
        self.trips = dict(zip(code.loops, trips, strict=True))
        self.now = 0.0
        self.lifted = [0.0] * 6  # when each barrier is
        self.free: Counter = Counter()  # when each unit is
        self.pending: deque[float] = deque()  # groups of copies, when they are there
        self.open = 0.0  # the last copy of the group that is being filled
        self.products: deque[float] = deque()  # the same of matrix instructions
        self.made = Walk()
        self.weight = 1.0
        self.steps: dict[Span, list] = {}  # a step of each loop, and the cycles of all
        self.inside: list[Step] = []
        self.is_done = False

    def run(self) -> Walk:
        self._walk(0, len(self.code.instructions), None)
        self.made.cycles = self.now
        self.made.missed = sum(trips > 0 and span not in self.steps for span, trips in self.trips.items())
        if self.steps:
            step, cycles, trips = max(self.steps.values(), key=lambda found: found[1])
            self.made.step, self.made.inside, self.made.trips = step, cycles, trips
        return self.made

    def _walk(self, begin: int, end: int, loop: Span | None) -> None:
        """From an instruction to another; `loop` is what they are the body of."""
        at = begin
        while at < end and not self.is_done:
            entered = next((span for span in self.code.loops if span.begin == at and span != loop
                            and (loop is None or span.end <= loop.end)), None)  # fmt: skip
            if entered:
                self._loop(entered)
                at = entered.end
                continue
            instruction = self.code.instructions[at]
            self._issue(instruction)
            at += 1
            if instruction.name == "EXIT" and (self.until_exit or not instruction.is_conditional):
                self.is_done = True
            elif instruction.name == "BRA" and instruction.target is not None and self._branches(at, instruction):
                at = max(at, instruction.target)

    def _branches(self, at: int, branch: Instruction) -> bool:
        """Whether a branch that stands before `at` goes forward.

        One with a condition only does if the code that it skips leaves out a loop that is taken: where the compiler put
        the case without iterations first.
        """
        if not branch.is_conditional or branch.target <= at:
            return not branch.is_conditional
        leaves = ("BRA", "EXIT")
        skipped = self.code.instructions[at : branch.target]
        last = next((one for one in skipped if one.name in leaves and not one.is_conditional), None)
        if last is None:
            return False
        end = last.target if last.name == "BRA" and last.target is not None else len(self.code.instructions)
        return any(span.begin >= branch.target and span.end <= end and trips for span, trips in self.trips.items())

    def _loop(self, span: Span) -> None:
        trips = self.trips[span]
        before, weight, step = self.now, self.weight, Step()
        walked = min(WALKED, max(1, int(trips)))
        ends = []
        for iteration in range(walked):
            is_last = iteration == walked - 1
            if is_last:  # it stands for all that are left, of which there may be a part of one
                self.weight = weight * (trips - walked + 1)
                self.inside.append(step)
            self._walk(span.begin, span.end, span)
            ends.append(self.now)
        self.inside.remove(step)
        steady = min(STEADY, walked - 1) if walked == WALKED else walked
        step.cycles = (ends[-1] - (ends[-1 - steady] if steady < walked else before)) / steady
        self._later(step.cycles * (trips - walked))
        self.weight = weight
        found = self.steps.setdefault(span, [step, 0.0, 0.0])
        found[0] = step
        found[1] += (self.now - before) * weight
        found[2] += trips * weight

    def _later(self, cycles: float) -> None:
        """Let time pass as if nothing else happened in it."""
        self.now += cycles
        self.lifted = [at + cycles for at in self.lifted]
        self.free = Counter({name: at + cycles for name, at in self.free.items()})
        self.pending = deque(at + cycles for at in self.pending)
        self.products = deque(at + cycles for at in self.products)
        self.open += cycles

    def _issue(self, one: Instruction) -> None:
        for number in one.waits:
            self.now = max(self.now, self.lifted[number])
        if wait := WAIT.search(one.text):
            queue = self.pending if wait.group(1) == "SB0" else self.products
            while len(queue) > int(wait.group(2), 16):
                self.now = max(self.now, queue.popleft())
        pipe, cost, read = self._unit(one)
        latency = LATENCY.get(one.name, OTHER_LATENCY)
        start = self.now
        if pipe:
            if pipe != "tensor" or one.name != "HGMMA":  # which waits in a queue of its own
                self.now = start = max(self.now, self.free[pipe])
            self.free[pipe] = max(start, self.free[pipe]) + cost
        if one.name in ("LDG", "LDGSTS", "LD", "ATOMG", "ATOM"):
            latency = self.latency
        if one.name == "LDGSTS":
            self.open = max(self.open, start + latency)
        elif one.name == "LDGDEPBAR":
            self.pending.append(max(self.open, start))
        elif one.name == "HGMMA" and "gsb0" in one.text:
            self.products.append(self.free["tensor"])
        elif BARRIER.search(one.text):
            self.now += BARRIER_CYCLES
        if one.sets is not None and one.name != "LDGDEPBAR":
            self.lifted[one.sets] = max(self.lifted[one.sets], start + latency)
        if one.reads is not None:
            self.lifted[one.reads] = max(self.lifted[one.reads], start + OPERAND_CYCLES)
        self.now += max(one.stall, 1)
        self._count(one, pipe, cost, read)

    def _count(self, one: Instruction, pipe: str, cost: float, read: float) -> None:
        self.made.issued += self.weight
        if pipe:
            self.made.pipes[pipe] += cost * self.weight
        if read:
            self.made.pipes["shared"] += read * self.weight
        for step in self.inside:
            step.instructions += 1
            step.barriers += bool(BARRIER.search(one.text))
            step.tensor += cost if pipe == "tensor" else 0.0
            step.copied += 32 * memory_bytes(one) if one.name == "LDGSTS" else 0

    def _unit(self, one: Instruction) -> tuple[str, float, float]:
        """The unit that an instruction goes to, for how many cycles, and how long shared memory is read for it."""
        if "@!PT" in one.text:
            return "", 0.0, 0.0
        if MATRIX.search(one.opcode):
            return "tensor", *matrix_cycles(one, self.arch)
        pipe, cost = _PIPE_OF.get(one.name, ("", 0.0))
        if one.name in ("LDSM", "STSM"):  # 8 rows of 16 bytes for each matrix
            cost *= 4 if ".4" in one.opcode else 2 if ".2" in one.opcode else 1
        elif pipe == "shared" and one.name not in ("SHFL", "LDC"):
            cost *= max(1.0, memory_bytes(one) / 4)  # the four quarters share SHARED_BYTES a cycle
        elif pipe == "double" and self.arch == 90:
            cost /= 2
        return ("fma" if pipe == "fma, wide" else pipe), cost, 0.0  # both kinds run on the same unit
