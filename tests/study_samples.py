"""Synthetic studies: curves from formulas, so that tests of the report train nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from subspace_opt.lab.study.records import Entry, Points, Record, Status, StepTimes, Study

MACHINE = {"cpu": "a CPU with 2 cores", "gpu": "none", "threads": "1"}
VERSIONS = {"subspace-opt": "0.1.0", "torch": "2.13.0", "python": "3.12.3"}


def times(median: float) -> StepTimes:
    return StepTimes(first=4 * median, median=median, p95=1.2 * median, worst=2.5 * median, mean=1.05 * median)


def record(label: str, end: float, seed: int = 0, **changes: Any) -> Record:
    """A run whose validation loss falls from 5.5 to `end`."""
    steps, status = changes.get("steps", 600), changes.get("status", "finished")
    at = [0, *range(steps // 12, steps + 1, steps // 12)]
    curve: Points = tuple((u, end + (5.5 - end) * math.exp(-6 * u / steps) * (1 - u / steps)) for u in at)
    if status == "diverged":
        curve = (*curve[:5], (at[5], math.nan))
    ms = changes.pop("ms", 40.0)
    fields: dict[str, Any] = {
        "key": f"{label}-{seed}-{end}", "stage": "final", "label": label, "seed": seed, "values": {"lr": 0.004}, "steps": steps,
        "status": status, "reason": "the loss is nan at update 250" if status == "diverged" else "", "validation": curve, "train": curve,
        "seconds_at": tuple(u * ms / 1e3 for u, _ in curve), "tokens_per_step": 1024, "parameters": 870_000,
        "planned_state_bytes": 4_000_000, "measured_state_bytes": 4_000_000, "optimizer_ms": times(ms / 5), "step_ms": times(ms),
        "machine": MACHINE, "versions": VERSIONS,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def sweep(label: str, best: float, lrs: Sequence[float], at: float, *, lost: Mapping[float, Status] | None = None) -> tuple[Record, ...]:
    """One run for each learning rate; the loss grows with the square of the distance to `at` in octaves."""
    return tuple(
        record(
            label,
            best + 0.05 * math.log2(lr / at) ** 2,
            stage="sweep",
            steps=120,
            values={"lr": lr},
            status=(lost or {}).get(lr, "finished"),
        )
        for lr in lrs
    )


def entry(
    label: str, ends: Sequence[float], *, lr: float = 0.004, kind: str = "adam", at_edge: tuple[str, ...] = (), **changes: Any
) -> Entry:
    """An optimizer with one final run for each loss of `ends`; nan is a diverged run."""
    spec = changes.pop("spec", None)
    if spec is None:
        spec = {"version": 1, "name": label, "pipelines": {"all": {"complement": {"kind": kind}}}, "routes": [{"use": "all"}]}
    lrs = [lr * 2.0**k for k in (range(-2, 1) if at_edge else range(-2, 3))]
    finals = tuple(
        record(label, 9.0 if math.isnan(end) else end, seed, values={"lr": lr}, spec=spec,
               status="diverged" if math.isnan(end) else "finished", **changes)
        for seed, end in enumerate(ends)
    )  # fmt: skip
    return Entry(label, spec, {"lr": lr}, sweep(label, min(ends) + 0.4 if ends else 3.0, lrs, lr), finals, at_edge)


def study(*entries: Entry, title: str = "Optimizers on old novels", seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    problem = {"model": "mini", "text": "four old novels, 2.9 MB", "steps": 600, "batch": "8 windows of 128 bytes", "sweep steps": 120}
    command = "subspace-opt compare cosmos muon adamw --model mini --data novels --steps 600 --seeds 3"
    return Study(title, entries, seeds, problem, command, MACHINE, VERSIONS)


def usual() -> Study:
    """Five optimizers over three seeds, with AdamW and without surprises."""
    energy = tuple((u, 0.5 + 0.4 * u / 600) for u in range(0, 601, 50))
    return study(
        entry("cosmos", (1.885, 1.893, 1.895), kind="muon", ms=52, measured_state_bytes=2_600_000, captured_energy=energy),
        entry("soap", (1.970, 1.976, 1.979), lr=0.008, kind="soap", ms=66, measured_state_bytes=7_900_000),
        entry("muon", (1.960, 1.966, 1.975), lr=0.016, kind="muon", ms=47, measured_state_bytes=2_100_000),
        entry("galore", (2.071, 2.069, 2.088), lr=0.008, kind="lion", ms=43, measured_state_bytes=1_800_000,
              captured_energy=tuple((u, v - 0.2) for u, v in energy)),
        entry("adamw", (2.131, 2.137, 2.143), ms=38, measured_state_bytes=6_960_000),
    )  # fmt: skip


def crowded() -> Study:
    """Ten optimizers with long labels, special characters, a diverged seed, a sweep that ends at an edge, and no plan; three are tuned."""
    ends = [1.90 + 0.013 * n for n in range(10)]
    labels = [
        '<b>&"bold"</b>',
        "cosmos with rank 128, a long label and no spaces/in-this-part-of-it.yaml",
        "soap",
        "muon",
        "adamw",
        "galore",
    ]
    labels += ["dion", "trion", "sumo", "lion"]
    changes: list[dict[str, Any]] = [{"ms": 40 + 3 * n, "measured_state_bytes": 2_000_000 + 90_000 * n} for n in range(10)]
    changes[2] |= {"at_edge": ("lr",)}
    changes[3] |= {"planned_state_bytes": None}
    rows = [
        entry(label, [end, end + 0.004 + 0.001 * (len(label) % 3), end - 0.003], **more)
        for label, end, more in zip(labels, ends, changes, strict=True)
    ]
    rows[7] = entry("trion", [1.95, math.nan, 1.96], ms=61, measured_state_bytes=2_050_000)
    rows = [replace(row, tried=()) if number > 2 else row for number, row in enumerate(rows)]
    return study(*rows, title="Ten optimizers <and> one & problem")


def troubled() -> Study:
    """No final run after a failed sweep; two tuned fields; every final run diverged; nothing tuned, with a spec that cannot be read."""
    lost = tuple(record("lost", 9.0, stage="sweep", steps=120, values={"lr": lr}, status="diverged") for lr in (0.1, 0.2))
    pairs = [(lr, rank) for rank in (16.0, 32.0, 64.0) for lr in (0.002, 0.004, 0.008)]
    ends = [2.3 + 20 * abs(lr - 0.004) + 0.001 * abs(rank - 32) for lr, rank in pairs]
    grid = tuple(
        record("two", end, stage="sweep", steps=120, values={"lr": lr, "rank": rank}) for end, (lr, rank) in zip(ends, pairs, strict=True)
    )
    two = entry("two", (1.90, 1.93, 1.91), kind="muon")
    unread = {"version": 1, "name": "unread", "pipelines": {"all": {"complement": "no_such_kind"}}, "routes": [{"use": "all"}]}
    return study(
        Entry("lost", {"name": "lost"}, {}, lost, ()),
        Entry("two", two.spec, {"lr": 0.004, "rank": 32.0}, grid, two.finals),
        entry("all diverged", (math.nan,) * 3, kind="muon"),
        Entry("untuned", unread, {}, (), entry("untuned", (1.94, 1.91, 1.95), kind="muon", spec=unread).finals),
    )
