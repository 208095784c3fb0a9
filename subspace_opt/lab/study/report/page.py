"""The page, and the files of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import LabError
from ..records import Entry, Study
from ..statistics import Line, find_reference, summarize
from ..table import row
from ..words import number, verdict, warnings
from .curves import energy_picture, loss_pictures
from .legend import swatch
from .numbers import to_csv, to_json
from .pareto import pareto_pictures
from .protocol import limits, method
from .specs import spec_texts
from .sweeps import outcome, sweep_pictures, swept_fields


def write_report(study: Study, folder: Path) -> dict[str, Path]:
    """Write `report.html`, `results.csv` and `results.json` into a folder, and return their paths by these names.

    Raises:
        LabError: the study has no entries, jinja2 or matplotlib is not installed, or a file cannot be written.
    """
    if not study.entries:
        raise LabError("report: the study has no optimizers. Give at least one spec")
    lines = summarize(study)
    texts = {"report.html": to_html(study, lines), "results.csv": to_csv(study), "results.json": to_json(study, lines)}
    paths = {name: folder / name for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            paths[name].write_text(text, encoding="utf-8")
    except OSError as error:
        raise LabError(f"report: {folder} cannot be written: {error.strerror}. Choose another place") from error
    return paths


def to_html(study: Study, lines: Sequence[Line]) -> str:
    """The page of a study as HTML.

    Raises:
        LabError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise LabError("report: jinja2 is not installed. Run: pip install 'subspace-opt[lab]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_resource("page.html"))
    context = sections(study, lines)
    return str(template.render(**context, css=Markup(_resource("page.css")), svg=Markup, unbroken=_unbroken)) + "\n"


def _unbroken(text: str) -> str:
    """The text with numbers that stay on one line with their intervals and units."""
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def sections(study: Study, lines: Sequence[Line]) -> dict[str, Any]:
    """The content of the page by section."""
    reference = find_reference(study)
    shared, specs = spec_texts([line.entry for line in lines])
    energy = energy_picture(lines)
    return {
        "title": study.title,
        "verdict": verdict(study, lines),
        "warnings": warnings(study, lines),
        "rows": [(swatch(line.number), row(line, has_reference=reference is not None), line) for line in lines],
        "reference": reference.label if reference else "",
        "legend": [(swatch(line.number), line.entry.label) for line in lines],
        "loss": loss_pictures(lines),
        "pareto": pareto_pictures(lines),
        "sweeps": sweep_pictures(lines),
        "tried": [_tried(line.entry) for line in lines if line.entry.tried],
        "energy": energy,
        "shared": shared,
        "specs": specs,
        "facts": [("Problem", _facts(study.problem)), ("Machine", _facts(study.machine)), ("Versions", _facts(study.versions))],
        "command": study.command,
        "method": method(study),
        "limits": limits(study),
    }


def _tried(entry: Entry) -> dict[str, Any]:
    """The list of all runs of one sweep, in the order they were made."""
    fields = swept_fields(entry)
    best = [all(record.values.get(name) == entry.best.get(name) for name in fields) for record in entry.tried]
    runs = [
        ([number(record.values[name]) if name in record.values else "-" for name in fields], outcome(record), is_best)
        for record, is_best in zip(entry.tried, best, strict=True)
    ]
    return {"label": entry.label, "fields": fields, "runs": runs}


def _facts(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key), _fact(value)) for key, value in given.items()]


def _fact(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
