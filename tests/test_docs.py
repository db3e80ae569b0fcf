"""The documentation: it builds without a warning, names everything public, and says what records and code say."""

import ast
import html
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import dynconv

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ("dynconv", "dynconv.nn", "dynconv.gating", "dynconv.reference", "dynconv.roofline")


def public(module: str) -> list[str]:
    """The names of a module for users: its `__all__`, or else the functions and classes that it defines."""
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__all__"):
        return list(loaded.__all__)
    defined = inspect.getmembers(loaded, lambda value: inspect.isfunction(value) or inspect.isclass(value))
    return [name for name, value in defined if value.__module__ == module and not name.startswith("_")]


CALLABLES = [
    f"{module}.{name}" for module in MODULES for name in public(module) if callable(getattr(sys.modules[module], name))
]


def find(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules[module], attribute)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The pages as `make docs` builds them, for a file system without network."""
    pytest.importorskip("sphinx", reason="`make test` and `make docs` install Sphinx, what runs here did not")
    folder = tmp_path_factory.mktemp("docs")
    options = ("--quiet", "--fresh-env", "--fail-on-warning", "--keep-going", "--builder", "html")
    command = (sys.executable, "-m", "sphinx", *options, "docs", str(folder))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    recipe = (ROOT / "Makefile").read_text()
    assert f"-m sphinx {' '.join(options)} docs build/docs" in recipe, "make docs builds otherwise"
    return folder


def test_every_public_name_is_in_the_api_reference(built):
    header, _, body = (built / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert header.startswith(b"# Sphinx inventory version 2")
    lines = zlib.decompress(body).decode().splitlines()
    documented = {line.split(" py:")[0] for line in lines if " py:" in line}
    missing = {f"{module}.{name}" for module in MODULES for name in public(module)} - documented
    assert not missing, f"without a page: {sorted(missing)}"


def test_the_pages_ask_no_other_machine_for_anything(built):
    loaded = r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"|@import|url\((?:https?:)?//"
    for page in (*built.glob("*.html"), *built.rglob("*.css")):
        assert not re.findall(loaded, page.read_text()), page.name


@pytest.mark.parametrize("name", CALLABLES)
def test_a_docstring_has_an_example_and_only_parameters_that_there_are(name):
    value = find(name)
    text = inspect.getdoc(value)
    assert name.startswith("dynconv.reference.") or ">>> " in text, "no example"
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{text}\n", re.M)
    named = re.findall(r"^    (\w[\w, ]*):", section[1], re.M) if section else []
    assert bool(section) == bool(named)
    there = inspect.signature(value).parameters
    assert {part for entry in named for part in entry.split(", ")} <= set(there)


def documented_functions():
    """The public functions, and the public methods that have a docstring."""
    for name in CALLABLES:
        value = find(name)
        for part, found in ({"": value} if inspect.isfunction(value) else vars(value)).items():
            function = getattr(found, "__func__", found)
            if not part.startswith("_") and inspect.isfunction(function) and function.__doc__:
                yield f"{name}.{part}".rstrip("."), function


@pytest.mark.parametrize("name, function", list(documented_functions()))
def test_a_function_says_first_what_it_does(name, function):
    first, *_ = function.__doc__.split()
    assert re.fullmatch("[A-Z][a-z]+", first) and first not in ("The", "An", "Of", "As", "For", "With", "What"), first


@pytest.mark.parametrize("name", [name for name in CALLABLES if inspect.isclass(find(name))])
def test_no_propertys_docstring_is_taken_for_a_type(name):
    """Napoleon takes what stands before a colon in its first line for the type."""
    for part in vars(find(name)).values():
        text = inspect.getdoc(part) if isinstance(part, property) else None
        assert not re.match(r"[^(`]*: ", (text or "").partition("\n")[0]), text


def anchors(page: Path) -> set[str]:
    """What a link can name behind the #: a heading in small letters, without punctuation, a hyphen for each space."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        assert "://" not in target, f"{target}: nobody checks it"
        linked = page if not file else (page.parent / file)
        assert linked.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def recorded():
    """benchmarks/readme.py, and the record that the README was written from."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    (folder,) = set(re.findall(r"\.\./(benchmarks/results/[\w-]+)/bench\.json", readme.RESULTS.read_text()))
    return readme, ROOT / folder / "bench.json"


def test_the_measured_tables_are_those_of_the_record():
    readme, record = recorded()
    assert readme.README.read_text() == readme.between(readme.README, readme.readme_section(record))
    assert readme.RESULTS.read_text() == readme.between(readme.RESULTS, readme.section(record))
    assert len(readme.short_table(record)) <= 2 + 12


def test_the_picture_is_that_of_the_record():
    readme, record = recorded()
    (description,) = re.findall(r"<dc:description>(.*?)</dc:description>", readme.PICTURE.read_text())
    drawn = {title: list(map(tuple, points)) for title, points in json.loads(html.unescape(description)).items()}
    assert drawn == readme.curves(record) and len(drawn) == 4


def test_the_newcomers_walk_names_functions_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    walk = text.partition("## A newcomer's walk\n")[2].partition("\n## ")[0]
    stations = re.findall(r"`([\w/]+\.py)`:((?: `[\w.]+`,?)+)", walk)
    assert len(stations) >= 6
    for file, names in stations:
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        named = set(re.findall(r"`([\w.]+)`", names))
        assert named <= defined, f"{file}: {named - defined} is not there"


def test_the_environment_variables_of_the_pages_are_read_somewhere():
    code = "".join(path.read_text() for path in (ROOT / "dynconv").rglob("*.py"))
    named = {name for page in PAGES for name in re.findall(r"\bDYNCONV_[A-Z]+\b", page.read_text())}
    assert {name for name in named if f'"{name}"' not in code} == set()
    assert dynconv.__version__
