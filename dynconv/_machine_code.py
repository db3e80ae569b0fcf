"""What a compiled kernel is made of: registers, instructions, and the loops around matrix instructions (SASS)."""

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


def _tool(name: str, flag: str, cubin: bytes) -> str:
    """What one of the tools that Triton brings prints of a cubin."""
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, file.name], check=True, capture_output=True, text=True).stdout


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
