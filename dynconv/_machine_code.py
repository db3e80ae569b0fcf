"""What a compiled kernel is made of: registers, instructions, and the loops around matrix instructions (SASS).

`decode` gives NVIDIA's instructions one by one, with what the assembler tells the hardware of each: how long the warp
waits before the next one, and for which results. Of these bits NVIDIA has published nothing; they are as Jia et al.
found them for Volta (https://arxiv.org/abs/1804.06826) and have been the same since.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from typing import NamedTuple

MATRIX = re.compile(r"\b(HGMMA|HMMA|DMMA)\b")
# An asynchronous copy from global to shared memory; predicated by what is never true it is padding.
COPY, BARRIER = re.compile(r"\bLDGSTS\b"), re.compile(r"\bBAR\.SYNC\b")
WAIT = re.compile(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)")


class Loop(NamedTuple):
    """An innermost loop that holds a matrix instruction; counts are of one step."""

    instructions: int
    barriers: int
    copies: int
    copies_before: int  # from the instruction behind the loop before, or the kernel's first, on
    waits: tuple[int, ...]  # groups of copies that may still be in flight where it waits

    @property
    def is_pipelined(self) -> bool:
        """Whether copies for later steps are in flight while this one multiplies."""
        return self.copies > 0 and any(self.waits) and self.copies_before > 0


class Resources(NamedTuple):
    """What a program of a kernel takes."""

    registers: int  # of a thread
    spills: int  # bytes of a thread that registers did not hold
    scalar_spills: int  # of AMD: scalar registers that wait in lanes of vector registers
    shared: int  # bytes
    instructions: int  # all that there are of them, whether they run or not


def resources(kernel) -> Resources:
    """Of a kernel that Triton has compiled."""
    shared = kernel.metadata.shared
    if "ptx" not in kernel.asm:
        return _amd_resources(kernel.asm["amdgcn"], shared)
    cubin = kernel.asm["cubin"]
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "--dump-resource-usage", cubin)))
    spills = int(found["STACK"]) + int(found["LOCAL"])
    return Resources(int(found["REG"]), spills, 0, shared, _code_bytes(cubin) // 16)


def sass(kernel) -> str:
    """The machine code of a kernel that Triton has compiled for NVIDIA; takes about as long as to compile it."""
    return _tool("nvdisasm", "-c", kernel.asm["cubin"])


class Instruction(NamedTuple):
    """One of a program, as a warp issues it."""

    text: str  # as the disassembler prints it, its predicate included
    opcode: str  # such as "LDG.E.128"
    stall: int  # cycles until the warp issues the next one, at least
    sets: int | None  # the barrier, 0..5, that it lifts when its result is there
    reads: int | None  # the barrier that it lifts when it has read its operands
    waits: tuple[int, ...]  # barriers that have to be lifted before it
    target: int | None  # where a branch goes, as the number of an instruction

    @property
    def is_conditional(self) -> bool:
        """Whether a predicate decides if it does anything."""
        return self.text.startswith("@")

    @property
    def name(self) -> str:
        """Of the opcode, without what specifies it."""
        return self.opcode.partition(".")[0]


class Span(NamedTuple):
    """A loop: the instructions from `begin` on and before `end`, the last of which branches back."""

    begin: int
    end: int


class Code(NamedTuple):
    """The instructions of a kernel and its loops, in order; the outer one of two that begin together comes first."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Span, ...]


_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


def decode(kernel) -> Code:
    """Of a kernel that Triton has compiled for NVIDIA; takes about as long as to compile it."""
    return decode_text(_tool("nvdisasm", "-c", kernel.asm["cubin"], "-hex"))


def decode_text(text: str) -> Code:
    """Of what `nvdisasm -c -hex` prints of one kernel."""
    found: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+|\$[\w$]+):", line):
            labels[label.group(1)] = len(found)
        elif instruction := _LINE.match(line):
            found.append((instruction.group(2), 0))
        elif (control := _CONTROL.match(line)) and found:
            found[-1] = found[-1][0], int(control.group(1), 16) >> 41
    instructions = tuple(_instruction(text, bits, labels) for text, bits in found)
    spans = {
        Span(one.target, number + 1)
        for number, one in enumerate(instructions)
        if one.name == "BRA" and one.target is not None and one.target < number
    }
    return Code(instructions, tuple(sorted(spans, key=lambda span: (span.begin, -span.end))))


def _instruction(text: str, bits: int, labels: dict[str, int]) -> Instruction:
    opcode = re.match(r"(?:@!?\w+\s+)?(\S+)", text).group(1)
    target = re.search(r"`\((\.L_x_\d+|\$[\w$]+)\)", text) if opcode.startswith(("BRA", "CALL")) else None
    barrier = lambda value: None if value == 7 else value
    waits = tuple(number for number in range(6) if bits >> (11 + number) & 1)
    where = labels.get(target.group(1)) if target else None
    return Instruction(text, opcode, bits & 15, barrier(bits >> 5 & 7), barrier(bits >> 8 & 7), waits, where)


def _code_bytes(elf: bytes) -> int:
    """Bytes of the executable sections of a 64-bit ELF file.

    An instruction takes 16 of them since sm_70, and to disassemble a cubin for their number takes as long as to compile
    it.
    """
    (offset,) = struct.unpack_from("<Q", elf, 40)  # of the section headers
    size, number = struct.unpack_from("<2H", elf, 58)
    total = 0
    for start in range(offset, offset + number * size, size):
        flags, _, _, length = struct.unpack_from("<4Q", elf, start + 8)
        total += length if flags & 4 else 0
    return total


def _amd_resources(assembly: str, shared: int) -> Resources:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))

    instructions = re.findall(r"^\t[a-z]\w+", assembly, re.MULTILINE)
    spills = field("vgpr_spill_count") + field("private_segment_fixed_size")
    return Resources(field("vgpr_count"), spills, field("sgpr_spill_count"), shared, len(instructions))


def _tool(name: str, flag: str, cubin: bytes, *more: str) -> str:
    """What one of the tools that Triton brings prints of a cubin."""
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, *more, file.name], check=True, capture_output=True, text=True).stdout


def matrix_loops(sass: str) -> list[Loop]:
    """Of the text that `nvdisasm -c` prints, in order."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction.group(1).strip())
    spans = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\S*\s+.*?(\.L_x_\d+)", instruction)
        if target and (begin := labels.get(target.group(1), end + 1)) <= end:
            spans.append((begin, end + 1))
    innermost = [one for one in spans if not any(_is_inside(other, one) for other in spans)]
    loops, before = [], 0
    for begin, end in sorted(innermost):
        body = _real(instructions[begin:end])
        if any(map(MATRIX.search, body)):
            waits = tuple(int(found.group(1), 16) for found in map(WAIT.search, body) if found)
            count = lambda pattern, lines: sum(bool(pattern.search(line)) for line in lines)
            copies_before = count(COPY, _real(instructions[before:begin]))
            loops.append(Loop(len(body), count(BARRIER, body), count(COPY, body), copies_before, waits))
        before = end
    return loops


def _is_inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _real(instructions: list[str]) -> list[str]:
    """Without what a predicate that is never true leaves out."""
    return [instruction for instruction in instructions if "@!PT" not in instruction]
