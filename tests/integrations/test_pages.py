"""The pages of docs/integrations: the table equals the marks of the tests, and every page's script runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from matrix import table

PAGES = Path(__file__).parents[2] / "docs" / "integrations"
SCRIPT = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_table_is_that_of_the_tests() -> None:
    assert table() in (PAGES / "index.md").read_text(), "run: python tests/integrations/matrix.py, and put its output into the page"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(p.name for p in PAGES.glob("*.md") if p.name != "index.md"))
def test_a_script_runs_as_written(page: str, tmp_path: Path) -> None:
    scripts = SCRIPT.findall((PAGES / page).read_text())
    assert scripts, f"{page} has no script"
    for library in re.findall(r"^(?:import|from) (\w+)", "\n".join(scripts), re.MULTILINE):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    (tmp_path / "script.py").write_text("\n".join(scripts))
    command = f"import sys, runpy; sys.path.append({str(Path(__file__).parent)!r}); import vision; runpy.run_path('script.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
