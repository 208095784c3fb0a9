"""The pages of docs/integrations: the table equals the marks of the tests, and every page's script runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from matrix import table

FOLDER = str(Path(__file__).parent)
PAGES = Path(__file__).parents[2] / "docs" / "integrations"
SCRIPT = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def needed_by(page: str, scripts: list[str]) -> set[str]:
    """The libraries that a page's scripts import, and those of the extras that it names."""
    extras = tomllib.loads((PAGES.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [extra for text in re.findall(r"subspace-opt\[([\w,]+)\]", (PAGES / page).read_text()) for extra in text.split(",")]
    asked = {re.split(r"\W", line.replace("-core", ""))[0] for extra in named for line in extras[extra]}
    return asked | set(re.findall(r"^(?:import|from) (\w+)", "\n".join(scripts), re.MULTILINE))


def test_the_table_is_that_of_the_tests() -> None:
    assert table() in (PAGES / "index.md").read_text(), "run: python tests/integrations/matrix.py, and put its output into the page"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(p.name for p in PAGES.glob("*.md") if p.name != "index.md"))
def test_a_script_runs_as_written(page: str, tmp_path: Path) -> None:
    scripts = SCRIPT.findall((PAGES / page).read_text())
    assert scripts, f"{page} has no script"
    for library in needed_by(page, scripts):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    (tmp_path / "script.py").write_text("\n".join(scripts))
    command = f"import sys, runpy; sys.path.append({FOLDER!r}); import vision; runpy.run_path('script.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
