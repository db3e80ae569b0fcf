"""Compiled kernels on disk: no damage, no other process and no missing folder may change a result."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dynconv.cpu import _cache, _threads
from dynconv.cpu._layout import Int64

fcntl = pytest.importorskip("fcntl", reason="without it no kernel file is locked")
ROOT = Path(__file__).resolve().parent.parent


def _seven(found: Int64):
    found[0] = 7


def use(monkeypatch, *folders):
    monkeypatch.setattr(_cache, "folders", lambda: folders)
    _cache.writable_folder.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, caplog):
    """The only folder for compiled kernels; what is logged is kept."""
    caplog.set_level(logging.INFO, "dynconv")
    use(monkeypatch, tmp_path / "kernels")
    yield tmp_path / "kernels"
    _cache.writable_folder.cache_clear()
    _threads.KERNELS.pop("test_cache._seven", None)


def run():
    """Call the kernel as a process does that has not called it before."""
    found = torch.zeros(1, dtype=torch.int64)
    _threads.kernel(_seven)(torch.float32, 1, found=found)
    assert found.item() == 7


def compilations(caplog):
    """How many kernels have been compiled since the last look."""
    count = sum("compiling" in record.message for record in caplog.records)
    caplog.clear()
    return count


def checked(file):
    """What reads the file."""
    return _cache._KernelFile(file.name.rpartition("-")[0], _cache.CFunc._targetdescr.target_context)


@pytest.fixture
def kept(folder, caplog):
    """The kernel's file, which is there, is whole, and is used."""
    run()
    (file,) = folder.glob("*.kernel")
    assert compilations(caplog) == 1
    run()
    assert compilations(caplog) == 0
    assert checked(file).read() is not None
    return file


def dangling(file):
    file.unlink()
    file.symlink_to("nowhere/at/all")


def whole(content):
    """A file that is as it was written, but whose content is not what Numba makes."""

    def damage(file):
        file.write_bytes(checked(file)._digest(content) + content)
        assert checked(file).read() == content

    return damage


class Raises:
    def __reduce__(self):
        return (eval, ("1 / 0",))


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    **{f"cut at {n}": lambda file, n=n: file.write_bytes(file.read_bytes()[:n]) for n in (1, 32, 33, 5000, -1)},
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "noise": lambda file: file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size)),
    "another pickle": lambda file: file.write_bytes(pickle.dumps({"an": "index"})),
    "dangling": dangling,
    "not a pickle": whole(b"kernel"),
    "too few parts": whole(pickle.dumps((1, 2, 3))),
    "raises when loaded": whole(pickle.dumps(Raises())),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_again(kept, damage, caplog):
    damage(kept)
    run()
    assert compilations(caplog) == 1
    run()
    assert compilations(caplog) == 0


def test_no_flipped_bit_is_run(kept):
    """Not even in the machine code, where nothing else would see it."""
    content = kept.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(content), 100):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 8)
        kept.write_bytes(flipped)
        assert checked(kept).read() is None


def test_a_file_that_cannot_be_replaced_costs_a_line(kept, caplog):
    kept.unlink()
    kept.mkdir()
    for _ in range(2):
        run()
        assert any("is not kept" in record.message for record in caplog.records)
        assert compilations(caplog) == 1
    assert not list(kept.parent.glob("*.part"))


def test_another_source_is_compiled_anew(kept, monkeypatch, caplog):
    before = kept.read_bytes()
    monkeypatch.setattr(_cache, "_source_digest", lambda: b"changed")
    run()
    assert compilations(caplog) == 1
    assert kept.read_bytes() != before
    assert list(kept.parent.glob("*.kernel")) == [kept]


@pytest.mark.parametrize("place", ["module.py", "llvm/module.py"])
def test_every_source_counts(place, tmp_path, monkeypatch):
    """Those of `cpu/llvm` as well: kernels are compiled with what they call."""
    monkeypatch.setattr(_cache, "_SOURCE", tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    digests = []
    for text in ("ROWS = 6", "ROWS = 8"):
        (tmp_path / place).write_text(text)
        digests.append(_cache._source_digest.__wrapped__())
    assert digests[0] != digests[1]
    assert (Path(_threads.__file__).parent / "llvm" / "build.py").is_file()


def test_a_folder_that_cannot_be_written_is_read(kept, tmp_path, monkeypatch, caplog):
    """What a container image was warmed up with is used where it is read-only; new files go to the next folder."""
    (tmp_path / "file").touch()
    for folders in ((kept.parent, tmp_path / "file" / "below"), (tmp_path / "file" / "below", kept.parent)):
        use(monkeypatch, *folders)
        run()
        assert compilations(caplog) == 0
    kept.unlink()
    run()
    assert compilations(caplog) == 1
    assert kept.exists()


def test_without_a_folder_it_is_said_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    use(monkeypatch, tmp_path / "file" / "below")
    for _ in range(2):
        run()
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "NUMBA_CACHE_DIR" in warning and str(tmp_path / "file" / "below") in warning
    assert compilations(caplog) == 2


def test_the_folders(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_cache.numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    parents = [folder.parent for folder in _cache.folders.__wrapped__()]
    assert parents == [tmp_path / "numba", Path(_cache.__file__).parent, tmp_path / "dynconv" / "kernels"]


def test_who_holds_a_lock_for_ever_is_not_waited_for(kept, monkeypatch, caplog):
    (lock,) = kept.parent.glob("*.lock")
    kept.unlink()
    monkeypatch.setattr(_cache, "PATIENCE", 0.2)
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run()
    assert compilations(caplog) == 1
    assert kept.exists()


def test_processes_share_the_work(tmp_path):
    """Each kernel is compiled by one process, and every process runs its own: each kernel writes another number."""
    bodies = "".join(f"def number_{n}(found: Int64):\n    found[0] = {n}\n\n" for n in range(4))
    script = tmp_path / "many_kernels.py"
    script.write_text(
        f"""
import logging, sys
import torch
from dynconv.cpu import _threads
from dynconv.cpu._layout import Int64
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
{bodies}
print("ready", flush=True)
input()
found = torch.zeros(1, dtype=torch.int64)
for n in sys.argv[1]:
    _threads.kernel(globals()["number_" + n])(torch.float32, 1, found=found)
    assert found.item() == int(n), (n, found)
"""
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), order], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for order in ("0123", "0123")
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all begin at once
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=100) for process in processes]
    assert [(process.returncode, errors) for process, (_, errors) in zip(processes, told)] == [(0, "")] * 2
    assert sum(output.count("compiling") for output, _ in told) == 4
