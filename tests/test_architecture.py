"""Imports point one way, heavy packages wait until they are needed, and no file knows the machine it was written on."""

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

# What each room (a folder, or a module beside them) may import of the others; `public` is `subspace_opt` itself, the names that users have.
ARROWS: dict[str, set[str]] = {
    "registry": set(),
    "algebra": {"registry"},
    "rules": {"algebra", "registry"},
    "selectors": {"algebra", "registry"},
    "spec": {"algebra", "registry", "rules", "selectors"},
    "plan": {"algebra", "spec"},
    "engine": {"algebra", "plan", "registry"},
    "distributed": {"algebra", "engine", "plan"},
    "checkpoint": {"engine", "plan", "spec"},
    "arguments": {"algebra", "plan", "registry", "spec"},
    "planned": {"arguments", "checkpoint", "engine", "plan", "registry", "spec"},
    "optimizer": {"algebra", "arguments", "checkpoint", "distributed", "engine", "plan", "planned", "spec"},
    "in_backward": {"arguments", "engine", "optimizer", "plan"},
    "public": {"algebra", "checkpoint", "engine", "in_backward", "optimizer", "plan", "registry", "spec"},
    "snapshots": {"checkpoint", "optimizer", "public"},
    "lab": {"checkpoint", "distributed", "public"},
}
ON_TOP = {"testing": set(), "cli": {"testing"}}  # may import whatever they test or show; nothing else imports them


def part(module: str) -> str:
    """The part of the package that a module belongs to: its first name below `subspace_opt`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "public"


def imported(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, at its top or inside a function."""
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


def test_frame_knows_no_concrete_kind() -> None:
    """The frame asks rules and selectors what they are; a name of a kind in it would be a special case."""
    from subspace_opt.registry import kinds

    tree = ast.parse((PACKAGE / "algebra" / "frame.py").read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    classes = {cls.__name__ for family in ("rule", "selector") for cls in kinds(family).values()}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert words & {*kinds("rule"), *kinds("selector")} <= {"none"}
    assert not names & classes


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
    """torch is what an import costs; whatever else takes a second is imported when it is used."""
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(heavy) & set(done.stdout.split())


def test_no_file_knows_the_machine() -> None:
    """A path that exists on one machine only works on one machine."""
    own = (".ci", "benchmarks", "docs", "plugins", "subspace_opt", "tests")  # caches and environments lie beside them
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
