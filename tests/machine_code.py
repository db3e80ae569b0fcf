"""What the loops around matrix instructions look like in a compiled kernel's machine code (SASS, sm_80 and sm_90)."""

from __future__ import annotations

import re
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


def disassemble(cubin: bytes, nvdisasm: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], check=True, capture_output=True, text=True).stdout


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
