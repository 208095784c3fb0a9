"""The code in the README and the documentation runs without changes."""

from __future__ import annotations

import doctest
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import subspace_opt
from subspace_opt import registry
from subspace_opt.spec import parse_spec

ROOT = Path(__file__).parent.parent
PAGES = [
    "docs/compare.md",
    "docs/comparison-report.md",
    "docs/convert.md",
    "docs/diagnostics.md",
    "docs/gpu.md",
    "docs/plugins.md",
    "docs/quick-start.md",
    "docs/schedules.md",
    "docs/snapshots.md",
    "docs/waits.md",
]


@pytest.fixture(autouse=True)
def kinds_of_their_own() -> Iterator[None]:
    """Remove after each page the kinds that it registered."""
    before = {family: dict(table) for family, table in registry._kinds.items()}
    yield
    registry._kinds.clear()
    registry._kinds.update(before)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_sessions_run_as_written(page: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the page itself is about parameters without a model
        result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_docstrings_run_as_written() -> None:
    results = [
        doctest.testmod(module) for module in (subspace_opt.optimizer, subspace_opt.in_backward, subspace_opt.linalg, subspace_opt.spec)
    ]
    assert sum(r.attempted for r in results) > 0
    assert sum(r.failed for r in results) == 0


def test_readmes_python_runs() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10))
    found = blocks("README.md", "python")
    assert len(found) >= 2
    for source in found:
        exec(compile(source, "README.md", "exec"), {"model": model, "__name__": "readme"})


@pytest.mark.parametrize("page", ["README.md", "docs/quick-start.md", "docs/memory.md", "docs/roles.md", "docs/schedules.md"])
def test_specs_in_pages_parse_and_plan(page: str) -> None:
    found = blocks(page, "yaml")
    assert found
    for text in found:
        spec = parse_spec(text)
        assert subspace_opt.make_plan(spec, [subspace_opt.Entry("w", (16, 8)), subspace_opt.Entry("b", (8,))]).total_bytes > 0


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {subspace_opt.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_evidence_has_the_numbers_of_its_results() -> None:
    text = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    for study in ("main", "claims", "longer"):
        results = json.loads((ROOT / f"benchmarks/convergence/results/{study}/results.json").read_text(encoding="utf-8"))
        for one in results["optimizers"]:
            loss = one["loss"]
            assert f"| {one['label']} | {one['tuned']['lr']:g} | {loss['mean']:.3f} ± {loss['half']:.3f} |" in text
