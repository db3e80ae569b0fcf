"""Compiled kernels on disk: each in a file of its own, checked before it is read, compiled by one process at a time.

Numba's own cache keeps one index for all functions of one source line, which all kernels here are: two processes that
fill it at once can give one kernel the code of another, and a damaged file raises in every process from then on. Here
a file carries a digest of all that its code depends on. Whatever does not match it is not there, and is written again.

The first of these folders that can be written keeps new files, and all of them are read, so what was compiled into a
container image is used where that is read-only: `NUMBA_CACHE_DIR`, `__pycache__` beside the source, and
`dynconv/kernels` in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import pickle
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from .._folders import user_cache

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may compile the same kernel
    fcntl = None

log = logging.getLogger("dynconv")

_SOURCE = Path(__file__).resolve().parent
# Seconds after which a kernel is compiled here although another process has begun to: longer than any takes.
PATIENCE = 120.0


@functools.cache
def _source_digest() -> bytes:
    """Changes with the source of any kernel, which call each other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_SOURCE.rglob("*.py")))).digest()


@functools.cache
def folders() -> tuple[Path, ...]:
    """Where compiled kernels may lie, the most wanted first."""
    own = hashlib.sha256(str(_SOURCE).encode()).hexdigest()[:16]  # what several installations share
    found = [_SOURCE / "__pycache__"]
    if numba.config.CACHE_DIR:
        found.insert(0, Path(numba.config.CACHE_DIR) / f"dynconv_{own}")
    user = user_cache()
    if user is not None:
        found.append(user / "kernels" / own)
    return tuple(found)


@functools.cache
def writable_folder() -> Path | None:
    """Where new files go; None, said once, where no folder can be written."""
    for folder in folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    log.warning(
        "dynconv: every process compiles its CPU kernels anew, which takes seconds, as none of these folders can be "
        "written: %s. Set NUMBA_CACHE_DIR to one that can.",
        ", ".join(map(str, folders())),
    )
    return None


class _KernelFile(NullCache):
    """The cache that Numba asks for a compiled function before it compiles one, and hands it to afterwards."""

    def __init__(self, name: str, target_context) -> None:
        self.name = name
        machine = (*target_context.codegen().magic_tuple(), numba.__version__, sys.implementation.cache_tag)
        # Machines that share a folder, and environments that share a source tree, keep files beside each other.
        self.file = f"{name}-{hashlib.sha256(repr(machine).encode()).hexdigest()[:12]}.kernel"
        self._stamp = hashlib.sha256(repr((name, machine)).encode() + _source_digest()).digest()

    def _digest(self, content: bytes) -> bytes:
        return hashlib.sha256(self._stamp + content).digest()

    def read(self) -> bytes | None:
        """The first file's content that is whole and of this source."""
        for folder in folders():
            with contextlib.suppress(OSError):
                read = (folder / self.file).read_bytes()
                if read[:32] == self._digest(read[32:]):
                    return read[32:]
        return None

    def load_overload(self, sig, target_context):
        """Numba's compiled function of the file, or None: it is then compiled."""
        content = self.read()
        if content is None:
            return None
        target_context.refresh()
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(content))
        except Exception as error:  # a library that the file needs is another one than its version says
            log.info("dynconv: compiling %s anew, as its file cannot be loaded: %r", self.name, error)
            return None

    def save_overload(self, sig, data):
        """Write the file at once, for whoever reads it meanwhile; where that fails, this process has its kernel."""
        folder = writable_folder()
        if folder is None or data.library.has_dynamic_globals:
            return
        content = dumps(data._reduce())
        part = folder / f"{self.file}.{uuid.uuid4().hex}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned up
            part.write_bytes(self._digest(content) + content)
            part.replace(folder / self.file)
        except OSError as error:
            log.warning("dynconv: %s is not kept: %s", self.name, error)
            with contextlib.suppress(OSError):
                part.unlink()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out while a file is made; the system lets them in when this one dies.

    Who has waited for long goes on as if it were alone, and so does everyone where there are no locks.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                lock = stack.enter_context(path.open("ab"))
                end = time.monotonic() + PATIENCE
                while time.monotonic() < end:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        time.sleep(0.05)
                    else:
                        stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)  # a forked child has the file open as well
                        break
        yield


def compiled(name: str, entry: Callable, signature, **options) -> CFunc:
    """The C function that Numba makes of `entry`, read from its file or compiled and kept there.

    `name` says what is compiled, to people and in the file's name: the body and the types that `entry` has as globals.
    """
    made = CFunc(entry, (signature.args, signature.return_type), {}, options)
    made._cache = file = _KernelFile(name, made._targetdescr.target_context)
    if file.read() is not None:
        made.compile()
        return made
    folder = writable_folder()
    with contextlib.nullcontext() if folder is None else _alone(folder / f"{file.file}.lock"):
        begin = time.perf_counter()
        is_here = file.read() is not None  # another process has compiled it while this one waited
        if not is_here:
            where = "this process alone" if folder is None else f"this machine, in {folder}"
            log.info("dynconv: compiling %s, once for %s", name, where)
        made.compile()
        if not is_here:
            log.info("dynconv: %s took %.1f s", name, time.perf_counter() - begin)
    return made
