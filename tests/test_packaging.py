"""However dynconv is installed, `dynconv.kernels` is ours and the top-level name `kernels` is not.

Every layout gets a fresh virtual environment, without network: the packages of the running Python are linked
into it, except dynconv itself, and a stand-in for the other project named `kernels` is installed beside them.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import dynconv
from dynconv import _flops

ROOT = Path(__file__).resolve().parent.parent

# What is built or cached in a working tree and would end up in a package made from it.
NOT_SOURCE = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "shared", "*.egg-info"),
    *("__pycache__", ".*_cache", ".benchmarks", ".hypothesis"),
)

# Runs in the environment under test; prints what it found as the last line.
PROBE = """
import importlib.metadata, json, os, sys

import dynconv
loaded = sorted({name.partition(".")[0] for name in sys.modules})
import dynconv.kernels
try:
    import kernels
except ImportError:
    kernels = None
try:
    metadata_version = importlib.metadata.version("dynconv")
except importlib.metadata.PackageNotFoundError:
    metadata_version = None
print(json.dumps({
    "dynconv": dynconv.__file__,
    "dynconv.kernels": dynconv.kernels.__file__,
    "name": dynconv.kernels.__name__,
    "kernels": getattr(kernels, "OWNER", kernels and kernels.__file__),
    "version": dynconv.__version__,
    "metadata_version": metadata_version,
    "loaded": loaded,
    "cached": [f for key in ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR") for f in os.listdir(os.environ[key])],
}))
"""


def run(*command, cwd, **environment):
    ours = ("PYTHON", "DYNCONV", "VIRTUAL_ENV")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind, tree, into):
    """Call the build backend as pip does, in `tree`; return the archive it made."""
    hook = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    run(sys.executable, "-c", hook, cwd=tree)
    return next(into.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


class Environment:
    """A virtual environment that holds every package of the running Python but dynconv."""

    def __init__(self, path, dependencies):
        run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
        self.path = path
        self.python = path / "bin" / "python"
        self.site = next(path.glob("lib/python*/site-packages"))
        (self.site / "dependencies.pth").write_text(f"{dependencies}\n")
        (self.site / "kernels").mkdir()
        (self.site / "kernels" / "__init__.py").write_text('OWNER = "another project"\n')

    def install(self, *what, cwd):
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir")
        run(*pip, "install", *options, *what, cwd=cwd)
        return self

    def probe(self, cwd, **environment):
        for key in ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"):
            environment[key] = str(self.path / key)
            (self.path / key).mkdir()
        output = run(self.python, "-c", PROBE, cwd=cwd, **environment)
        return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dependencies")
    for entry in map(Path, sys.path):
        if not any(entry.glob("*.dist-info")):
            continue
        for item in entry.iterdir():
            left_out = item.name.startswith(("dynconv", "__editable__", "kernels", "__pycache__"))
            if not left_out and item.suffix != ".pth" and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item)
    return folder


@pytest.fixture
def environment(tmp_path, dependencies):
    return Environment(tmp_path / "environment", dependencies)


@pytest.fixture
def tree(tmp_path):
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=NOT_SOURCE))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, made once from a clean copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    copy = Path(shutil.copytree(ROOT, folder / "tree", ignore=NOT_SOURCE))
    archives = {}
    for kind in ("sdist", "wheel"):
        (folder / kind).mkdir()
        archives[kind] = build(kind, copy, folder / kind)
    return archives


def modules(folder, package):
    """Names of the Python files under `folder`, as they appear in a wheel that holds it as `package`."""
    return {f"{package}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*.py")}


@pytest.mark.parametrize(
    "layout",
    [
        "wheel",
        "wheel, in the repository root",
        "sdist",
        "editable",
        "editable_mode=compat",
        "editable_mode=strict",
        "source tree on PYTHONPATH",
        "source tree, in the repository root",
    ],
)
def test_kernels_are_ours_inside_dynconv_and_only_there(layout, environment, tree, built, tmp_path):
    archive = layout.partition(",")[0]
    if archive in built:
        environment.install(built[archive], cwd=tmp_path)
    elif layout == "editable":
        environment.install("-e", tree, cwd=tmp_path)
    elif layout.startswith("editable_mode="):
        environment.install("--config-settings", layout, "-e", tree, cwd=tmp_path)
    in_root = layout.endswith("in the repository root")
    variables = {"PYTHONPATH": str(tree)} if layout.endswith("PYTHONPATH") else {}

    found = environment.probe(cwd=tree if in_root else tmp_path, **variables)

    home = environment.site if layout in built else tree
    assert Path(found["dynconv"]).is_relative_to(home)
    assert Path(found["dynconv.kernels"]).is_relative_to(home)
    assert found["name"] == "dynconv.kernels"
    if in_root or variables:  # Python looks in the tree first, so its folder `kernels` hides every other
        assert Path(found["kernels"]).is_relative_to(tree)
    else:
        assert found["kernels"] == "another project"

    installed = not layout.startswith("source tree")
    assert found["version"] == dynconv.__version__
    assert found["metadata_version"] == (dynconv.__version__ if installed else None)
    assert not {"numba", "triton"} & set(found["loaded"]), "import dynconv loads a compiler"
    assert found["cached"] == [], "import dynconv compiles"


def test_dynconv_alone_provides_no_top_level_kernels(environment, built, tmp_path):
    shutil.rmtree(environment.site / "kernels")
    assert environment.install(built["wheel"], cwd=tmp_path).probe(tmp_path)["kernels"] is None


def test_wheel_holds_every_module_and_nothing_else(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        info = f"dynconv-{dynconv.__version__}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert {name.partition("/")[0] for name in names} == {"dynconv", info}
    expected = modules(ROOT / "dynconv", "dynconv") | modules(ROOT / "kernels", "dynconv/kernels")
    assert {name for name in names if name.endswith(".py")} == expected
    assert {f"{info}/licenses/LICENSE", "dynconv/py.typed"} <= names
    assert metadata["Version"] == dynconv.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = {line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {line.split(">")[0].split(";")[0] for line in required} == {"torch", "triton", "numpy", "numba"}


def test_the_classifiers_are_the_pythons_that_are_asked_for(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        info = f"dynconv-{dynconv.__version__}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    named = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") if "Python :: 3." in line]
    assert metadata["Requires-Python"] == f">={named[0]}"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named


@pytest.mark.parametrize("order", ["dynconv, torch.utils.flop_counter", "torch.utils.flop_counter, dynconv"])
def test_the_flop_counter_knows_the_ops_whoever_is_imported_first(order):
    """Its module imports Triton, so `import dynconv` does not import it to hand over the formulas."""
    count = "sum('dynconv.' in str(op) for op in torch.utils.flop_counter.flop_registry)"
    ops = "sum(name.startswith('dynconv::') for name in torch._C._dispatch_get_all_op_names())"
    found = run(sys.executable, "-c", f"import {order}, torch; print({count}, {ops})", cwd=ROOT)
    formulas, schemas = map(int, found.split())
    assert 15 <= formulas <= schemas


def test_two_finders_of_the_flop_counter_do_not_ask_each_other_for_ever(monkeypatch):
    """As a reload leaves them."""
    finders = [_flops._CounterFinder(), _flops._CounterFinder()]
    monkeypatch.setattr(sys, "meta_path", [*finders, *sys.meta_path])
    for finder in finders:
        assert finder.find_spec("torch.utils.flop_counter", torch.utils.__path__).origin.endswith("flop_counter.py")


def test_a_star_import_hides_nothing_of_the_callers():
    names = {}
    exec("from torch import nn\nfrom dynconv import *", names)
    assert names["nn"] is torch.nn
    assert not any(isinstance(getattr(dynconv, name), type(dynconv)) for name in dynconv.__all__)
    for module in ("nn", "gating", "reference", "roofline"):  # which stay where they were
        assert isinstance(getattr(dynconv, module), type(dynconv))


def test_sdist_holds_the_whole_source_tree(built):
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "Makefile", ".ci/run", "dynconv/py.typed"}
    expected |= {f"docs/{page.name}" for page in (ROOT / "docs").iterdir() if page.is_file()}
    for folder in ("dynconv", "kernels", "tests", "benchmarks"):
        expected |= modules(ROOT / folder, folder)
    assert expected <= names, f"missing: {sorted(expected - names)}"
