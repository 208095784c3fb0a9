"""Imports point one way, heavy packages are imported when needed, and no file has a path of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "subspace_opt"

# The rooms that each room (a folder, or a module beside them) may import. `public` is `subspace_opt` itself, the public names.
ARROWS: dict[str, set[str]] = {
    "registry": set(),
    "linalg": set(),
    "schedules": {"registry"},
    "algebra": {"linalg", "registry", "schedules"},
    "rules": {"algebra", "linalg", "registry"},
    "selectors": {"algebra", "linalg", "registry"},
    "spec": {"algebra", "registry", "rules", "schedules", "selectors"},
    "plan": {"algebra", "registry", "spec"},
    "engine": {"algebra", "linalg", "plan", "registry"},
    "distributed": {"algebra", "engine", "plan"},
    "checkpoint": {"engine", "plan", "spec"},
    "arguments": {"algebra", "plan", "registry", "spec"},
    "diagnostics": {"algebra", "checkpoint", "engine", "linalg", "plan", "registry", "spec"},
    "planned": {"algebra", "arguments", "checkpoint", "diagnostics", "engine", "plan", "spec"},
    "optimizer": {"algebra", "arguments", "checkpoint", "distributed", "engine", "plan", "planned", "spec"},
    "forecast": {"algebra", "arguments", "distributed", "engine", "plan", "spec"},
    "conversion": {"algebra", "arguments", "checkpoint", "engine", "linalg", "optimizer", "plan", "registry", "spec"},
    "in_backward": {"arguments", "engine", "optimizer", "plan"},
    "public": {"algebra", "checkpoint", "conversion", "engine", "in_backward", "optimizer", "plan", "registry", "spec"},
    "snapshots": {"checkpoint", "optimizer", "public"},
    "lab": {"checkpoint", "distributed", "public"},
    "integrations": {"algebra", "arguments", "engine", "optimizer", "plan", "public", "snapshots", "spec"},
}
ON_TOP = {"testing": set(), "cli": {"testing"}}  # may import everything; no other room imports them


def part(module: str) -> str:
    """The part of the package that a module belongs to: its first name below `subspace_opt`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "public"


def imported(file: Path) -> Iterator[str]:
    """Modules of this package that a file imports, at its top or inside a function."""
    module = list(file.relative_to(ROOT).with_suffix("").parts)
    package = module[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            # `from . import x` imports the module x, if there is one of that name.
            yield from (".".join([*base, alias.name] if is_module([*base, alias.name]) else base) for alias in node.names)


def is_module(names: list[str]) -> bool:
    path = ROOT.joinpath(*names)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    own = part(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    found = {part(name) for name in imported(file) if name.split(".")[0] == "subspace_opt"}
    if own in ON_TOP:
        assert found & set(ON_TOP) <= {own} | ON_TOP[own]
    else:
        assert own in ARROWS, f"{own} is new: say in ARROWS what it may import"
        assert found <= {own, *ARROWS[own]}, f"{own} may import {sorted(ARROWS[own])}"


def test_arrows_make_no_circle() -> None:
    left = {name: below - {name} for name, below in ARROWS.items()}
    while left:
        ends = {name for name, below in left.items() if not below & set(left)}
        assert ends, f"a circle among {sorted(left)}"
        left = {name: below for name, below in left.items() if name not in ends}


def test_the_documented_rooms_are_the_rooms() -> None:
    """The table in docs/how-it-works.md names every room and its arrows."""
    table = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split("| room | owns | imports |")[1].split("\n\n")[0]
    cells = [line.split("|")[1:4] for line in table.splitlines()[2:]]
    found = {name.strip(" `"): set(re.findall(r"`(\w+)`", below)) for name, _, below in cells}
    drawn = {name: below for name, below in ARROWS.items() if name != "public"}
    assert {name: below for name, below in found.items() if name not in ON_TOP} == drawn
    assert {name: found[name] for name in ON_TOP} == ON_TOP
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert found.keys() >= folders


def rooms() -> list[Path]:
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


CATALOGUES = {"rules", "selectors"}  # one idea a file: these rooms have no limit on the number of files


@pytest.mark.parametrize("folder", rooms(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_room_is_small_and_says_what_it_is(folder: Path) -> None:
    """A room has at most a dozen modules. Its docstring says in a few lines what the room does, and its input and output."""
    modules = sorted(folder.glob("*.py"))
    if folder == PACKAGE:
        assert len(modules) <= 7, "at most six modules beside the package's own"
        return
    if folder.name not in CATALOGUES:
        assert len(modules) <= 12
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert said, f"{folder} has no docstring"
    assert re.search(r"^In: ", said, re.M), f"{folder}: say what enters, in a line `In: ...`"
    assert re.search(r"\bOut: ", said), f"{folder}: say what leaves, as `Out: ...`"
    assert len(said.splitlines()) <= 20


TABLES = {"testing/trajectories/cases.py"}  # rows, no code


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_fit_on_a_screen(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if str(file.relative_to(PACKAGE)) not in TABLES:
        assert text.count("\n") <= 350, "cut the file along an idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if len(node.body) > 1 and ast.get_docstring(node) else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= 40, f"{node.name} has {length} lines"


def test_one_file_knows_torch_distributed() -> None:
    """Among files that take part in a step. Snapshots and certificates make their own process groups."""
    found = set()
    for file in FILES:
        room = file.relative_to(PACKAGE).parts[0]
        if room not in ("snapshots", "lab", "cli", "testing") and "torch.distributed" in imported_outside(file):
            found.add(str(file.relative_to(PACKAGE)))
    assert found == {"distributed/exchange.py"}


def imported_outside(file: Path) -> str:
    """Names of other packages' modules that importing the file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return " ".join(names)


def test_frame_knows_no_concrete_kind() -> None:
    """The frame reads traits of rules and selectors; a kind's name in it would be a special case."""
    from subspace_opt.registry import kinds

    tree = ast.parse((PACKAGE / "algebra" / "frame.py").read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    classes = {cls.__name__ for family in ("rule", "selector") for cls in kinds(family).values()}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert words & {*kinds("rule"), *kinds("selector")} <= {"none"}
    assert not names & classes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (
            "subspace_opt",
            [
                "torchao",
                "transformers",
                "matplotlib",
                "typer",
                "rich",
                "hypothesis",
                "pytest",
                "numpy.testing",
                "torch.distributed.checkpoint",
                "torch.distributed.tensor",
            ],
        ),
        ("subspace_opt.lab", ["transformers", "matplotlib", "typer"]),
        ("subspace_opt.cli", ["transformers", "matplotlib", "hypothesis", "pytest"]),
    ],
)
def test_import_is_light(module: str, heavy: list[str]) -> None:
    """Importing the package imports torch; other heavy packages are imported when they are used."""
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(heavy) & set(done.stdout.split())


def test_no_file_knows_the_machine() -> None:
    """No file contains a path that exists on one machine only."""
    own = (".ci", "benchmarks", "docs", "plugins", "subspace_opt", "tests")  # caches and virtual environments are in the same folder
    files = [file for top in own for file in (ROOT / top).rglob("*")] + list(ROOT.glob("*"))
    suspicious = re.compile(r"(?<![\w.:/-])(?:/(?:home|Users|root|work|mnt|srv)/[\w.]|[A-Z]:\\\\?Users)")
    found = []
    for file in files:
        inside = file.relative_to(ROOT).parts
        made = any(name == "__pycache__" or (name[0] == "." and name != ".ci") for name in inside)
        if file.is_file() and not made and file.suffix not in (".npz", ".png"):
            text = file.read_text(encoding="utf-8", errors="ignore")
            found += [f"{file.relative_to(ROOT)}: {match[0]}" for match in suspicious.finditer(text)]
            if str(ROOT) in text and len(ROOT.parts) > 2:
                found.append(f"{file.relative_to(ROOT)}: {ROOT}")
    assert found == []
