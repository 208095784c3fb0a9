"""The table of integrations and features, read from the marks of the tests: `python tests/integrations/matrix.py` prints it.

A test names the features that it shows: `@pytest.mark.shows("builds", "names")`. Its file names the library: `LIBRARY = "timm"`. A
feature that an integration cannot have has its reason in that file: `NOT = {"AMP": "timm builds the optimizer only"}`. The marks are
read from the source, so the table is the same whether or not the libraries are installed.
"""

from __future__ import annotations

import ast
from pathlib import Path

FEATURES = ("builds", "names", "decay groups", "schedulers", "clipping", "accumulation", "AMP", "resume bit-equal", "FSDP2")
FOLDER = Path(__file__).parent


def table() -> str:
    """The table as Markdown: `yes` if a test shows the feature, else the number of a note with the reason."""
    lines = ["| | " + " | ".join(FEATURES) + " |", "| --- |" + " --- |" * len(FEATURES)]
    notes: list[str] = []
    for file in sorted(FOLDER.glob("test_*.py")):
        library, shown, reasons = marks(file)
        if library is None:
            continue
        cells = []
        for feature in FEATURES:
            if feature in shown:
                cells.append("yes")
            else:
                reason = f"{library}: {reasons[feature]}" if feature in reasons else None
                assert reason, f"{file.name}: no test shows '{feature}', and NOT gives no reason"
                notes.append(reason)
                cells.append(f"({len(notes)})")
        lines.append(f"| [{library}]({library}.md) | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]).rstrip() + "\n"


def marks(file: Path) -> tuple[str | None, set[str], dict[str, str]]:
    """Library, features that tests show, and reasons for features that the library cannot have."""
    tree = ast.parse(file.read_text())
    named = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name) and target.id in ("LIBRARY", "NOT")
    }
    shown: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.shows":
                    shown |= {ast.literal_eval(argument) for argument in mark.args}
    unknown = (shown | set(named.get("NOT", {}))) - set(FEATURES)
    assert not unknown, f"{file.name} names features that are not in the table: {unknown}"
    return named.get("LIBRARY"), shown, named.get("NOT", {})


if __name__ == "__main__":
    print(table(), end="")
