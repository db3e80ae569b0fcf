"""What lies where in a kernel's arguments: read off the signature of its body, which names every field once.

All threads get one array of int64: the shared counters, then the caller's addresses, sizes and flags in the order of
the body's parameters. A parameter's annotation says how the body sees its number; without one it is that number. A
NamedTuple as annotation has a place for each of its fields.
"""

from __future__ import annotations

from array import array as array_of
from collections.abc import Callable
from typing import get_type_hints

from numba import njit

COUNTERS = 2  # places ahead of the caller's: the next piece of work, and the next worker's number
# Parameters of a body that no caller gives: the counters, and the types that it is compiled for.
GIVEN = {"shared": "address", "storage": "storage", "compute": "compute"}


class Elements:
    """A tensor's elements, or those at an address: the body sees an array of no length, the caller may give None."""

    type: str  # as the entry names it


class Storage(Elements):
    """Elements of the type that a kernel is started for."""

    type = "storage"


class Compute(Elements):
    """Elements of the type that this one is computed in."""

    type = "compute"


class UInt8(Elements):
    """Bytes, of a bool tensor above all."""

    type = "numpy.uint8"


class Int32(Elements):
    """Indices and counts."""

    type = "numpy.int32"


class Int64(Elements):
    """Offsets."""

    type = "numpy.int64"


class Flag:
    """A number that the body sees as a bool."""


class Result:
    """A number that the body may write, as element 0 of an array; the caller reads it at the same place."""


def record(kind: type) -> Callable:
    """A function that reads a NamedTuple of numbers out of an array, from a place on; for a kernel to call."""
    numbers = ", ".join(f"numbers[at + {place}]" for place in range(len(kind._fields)))
    names = {"kind": kind, "__name__": kind.__module__}
    exec(f"def read(numbers, at):\n    return kind({numbers})\n", names)
    return njit(inline="always")(names["read"])


class Layout:
    """The places of a body's parameters.

    Args:
        body: a function whose parameters are those of `GIVEN`, in any order, and what the caller gives.

    Attributes:
        at: by name, the place of each number, those of a NamedTuple's fields included.
        size: of the whole array.
    """

    def __init__(self, body: Callable) -> None:
        hints, code = get_type_hints(body), body.__code__
        self._body, self._parameters = body, {n: hints.get(n) for n in code.co_varnames[: code.co_argcount]}
        places = [place for name, kind in self._parameters.items() for place in _places(name, kind)]
        if len(set(places)) < len(places):
            raise TypeError(f"{body.__qualname__}: expected every name once, got {places}")
        self.at = type("Places", (), {"__slots__": places})()  # no look-up is faster
        for place, name in enumerate(places, COUNTERS):
            setattr(self.at, name, place)
        self.size = COUNTERS + len(places)

    def callers(self, start: Callable) -> tuple[Callable, Callable]:
        """`pack(*, ...)`, which makes the array, and `run(dtype, threads, *, ...)`, which starts the kernel with it.

        Of each parameter they take, by its name: a tensor or None for `Elements`, as many numbers as it has fields for
        a NamedTuple, and a number otherwise. They raise TypeError for another name and a missing one.
        """
        callers = {name: kind for name, kind in self._parameters.items() if name not in GIVEN}
        packed = f"array_of('q', (0, 0, {', '.join(_number(name, kind) for name, kind in callers.items())}))"
        if any(_is_group(kind) for kind in callers.values()):
            packed = f"checked({packed})"

        def checked(numbers: array_of) -> array_of:
            if len(numbers) != self.size:
                raise TypeError(f"{self._body.__qualname__}: expected {self.size} numbers, got {len(numbers)}")
            return numbers

        names = {"array_of": array_of, "checked": checked, "start": start}
        keywords = ", ".join(callers)
        return (
            self._compiled(f"def made(*, {keywords}):\n    return {packed}\n", names),
            self._compiled(
                f"def made(_dtype, _threads, /, *, {keywords}):\n    start(_dtype, _threads, {packed})\n", names
            ),
        )

    def entry(self, names: dict[str, object]) -> Callable:
        """Return Numba's source: a function of the array's address that calls `body`, one of its globals `names`."""
        seen, place, groups = [], COUNTERS, {}
        for name, kind in self._parameters.items():
            seen.append(f"{name}={GIVEN.get(name) or _seen(kind, place)}")
            if _is_group(kind):
                groups[kind.__name__] = kind
            place += len(_places(name, kind))
        source = f"def made(address):\n    a = carray(address, ({self.size},))\n    body({', '.join(seen)})\n"
        return self._compiled(source, names | groups)

    def _compiled(self, source: str, names: dict[str, object]) -> Callable:
        """The function `made` of a source text, named after the body."""
        names = names | {"__name__": self._body.__module__}
        exec(compile(source, f"<arguments of {self._body.__qualname__}>", "exec"), names)
        names["made"].__name__ = names["made"].__qualname__ = self._body.__name__
        return names["made"]


def _is_group(kind: type | None) -> bool:
    return kind is not None and issubclass(kind, tuple)


def _places(name: str, kind: type | None) -> tuple[str, ...]:
    """The names of a parameter's places."""
    return () if name in GIVEN else kind._fields if _is_group(kind) else (name,)


def _number(name: str, kind: type | None) -> str:
    """The source text of what is packed of a keyword."""
    if _is_group(kind):
        return f"*{name}"
    return f"0 if {name} is None else {name}.data_ptr()" if kind and issubclass(kind, Elements) else name


def _seen(kind: type | None, place: int) -> str:
    """The source text of what the body gets from a place on."""
    if _is_group(kind):
        hints = get_type_hints(kind)
        fields = (_seen(hints[name], place + number) for number, name in enumerate(kind._fields))
        return f"{kind.__name__}({', '.join(fields)})"
    if kind is Flag:
        return f"a[{place}] != 0"
    if kind is Result:
        return f"a[{place}:]"
    return f"array(a[{place}], {kind.type})" if kind and issubclass(kind, Elements) else f"a[{place}]"
