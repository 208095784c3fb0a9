"""The numbers of a study for other programs: one row of CSV for each run, and all statistics as JSON.."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ...run.events import finite
from ..records import Record, Study
from ..statistics import CONFIDENCE, Line, find_reference, pair
from ..words import difference, verdict, warnings

_TIMES = ("first", "median", "p95", "worst", "mean")


def to_csv(study: Study) -> str:
    """One row for each run, those of the sweeps included. Missing numbers are empty cells."""
    rows = [_row(record) for entry in study.entries for record in (*entry.tried, *entry.finals)]
    tuned = sorted({name for row in rows for name in row["values"]})
    out = io.StringIO()
    flat = [{**{name: row["values"].get(name, "") for name in tuned}, **{k: v for k, v in row.items() if k != "values"}} for row in rows]
    names = ["label", "stage", "seed", *tuned] + [
        name for name in (flat[0] if flat else {}) if name not in {"label", "stage", "seed", *tuned}
    ]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: "" if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()} for row in flat
    )
    return out.getvalue()


def _row(record: Record) -> dict[str, Any]:
    times = {f"{kind}_{name}": getattr(getattr(record, kind), name) for kind in ("step_ms", "optimizer_ms") for name in _TIMES}
    return {
        "label": record.label,
        "stage": record.stage,
        "seed": record.seed,
        "values": record.values,
        "status": record.status,
        "reason": record.reason,
        "loss": record.loss,
        "updates": record.steps,
        "tokens": record.steps * record.tokens_per_step,
        "seconds": record.seconds_at[-1] if record.seconds_at else math.nan,
        "parameters": record.parameters,
        "planned_state_bytes": "" if record.planned_state_bytes is None else record.planned_state_bytes,
        "measured_state_bytes": record.measured_state_bytes,
        **times,
        "key": record.key,
    }


def to_json(study: Study, lines: Sequence[Line]) -> str:
    """Verdict, statistics, differences of every pair, and the curves of all runs; missing and non-finite numbers are `null`."""
    reference = find_reference(study)
    pairs = [pair(a.entry, b.entry) for number, a in enumerate(lines) for b in lines[number + 1 :]]
    data = {
        "title": study.title,
        "command": study.command,
        "verdict": verdict(study, lines),
        "warnings": warnings(study, lines),
        "units": {"loss": "nats per token", "step": "milliseconds", "state": "bytes"},
        "confidence": CONFIDENCE,
        "seeds": study.seeds,
        "reference": reference.label if reference else None,
        "optimizers": [_line(line) for line in lines],
        "pairs": [{**asdict(found), "words": difference(found)} for found in pairs],
        "runs": list(_runs(study)),
        "problem": study.problem,
        "machine": study.machine,
        "versions": study.versions,
    }
    return json.dumps(finite(data), indent=1, allow_nan=False) + "\n"


def _line(line: Line) -> dict[str, Any]:
    entry = line.entry
    return {
        "label": entry.label,
        "tuned": entry.best,
        "at_edge": entry.at_edge,
        "loss": line.loss,
        "diverged_seeds": line.diverged,
        "to_best": line.to_best,
        "to_reference": line.to_reference,
        "to_reference_loss": line.reached,
        "costs": line.costs,
        "spec": entry.spec,
    }


def _runs(study: Study) -> Iterator[dict[str, Any]]:
    for entry in study.entries:
        for record in (*entry.tried, *entry.finals):
            yield {
                **_row(record),
                "validation": record.validation,
                "seconds_at": record.seconds_at,
                "captured_energy": record.captured_energy,
            }
