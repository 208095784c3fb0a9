"""Two more pages that are written from what they describe: the map of the field from the presets, fidelity from the trajectories."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from subspace_opt.algebra import Rule
from subspace_opt.algebra.frame import Frame
from subspace_opt.algebra.pipeline import Pipeline
from subspace_opt.plan.costs import flops
from subspace_opt.registry import kind_of
from subspace_opt.spec import Spec, load_spec, preset_names
from subspace_opt.testing.parity import Parity, measure_all

ROOT = Path(__file__).parent.parent
WIDE = ["---", "hide: [navigation, toc]", "---", ""]  # a table of a dozen columns needs the whole page
SHAPE = (1376, 512)  # the feed-forward matrix of the 60M LLaMA


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"field.md": field_page(), "fidelity.md": fidelity_page(measure_all(ROOT / "tests" / "golden"))}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


# ------------------------------------------------------------------------------------------------------------------ the field


def field_page() -> str:
    head = (
        "method | selector | source | refresh | momentum | inside | complement | moments at a refresh | finish | decay "
        "| state / mn | GFLOP an update | a refresh"
    )
    rows = [field_row(name, load_spec(name)) for name in preset_names(installed=False)]
    return "\n".join(
        [
            *WIDE,
            "# The field",
            "",
            "Every method as the spec sees it: where its momentum lives, what opens its subspace and when, what runs inside and outside. "
            f"State and operations are those of one matrix of {SHAPE[0]} x {SHAPE[1]} at the preset's own rank, products and "
            "decompositions counted with two operations a multiply-add. The table is written from the presets.",
            "",
            '<div class="wide" markdown>',
            "",
            f"| {head} |",
            "|" + " --- |" * (head.count("|") + 1),
            *rows,
            "",
            "</div>",
            "",
        ]
    )


def matrix_pipeline(spec: Spec) -> Pipeline:
    """The pipeline that a hidden matrix takes."""
    return spec.pipelines.get("matrix") or next(iter(spec.pipelines.values()))


def field_row(name: str, spec: Spec) -> str:
    pipeline = matrix_pipeline(spec)
    split, selector = Frame.of(pipeline, *SHAPE), pipeline.selector
    update, refresh = flops(split)
    state = sum(prod(slot.shape) * (slot.dtype.itemsize / 4 if slot.dtype else 1) for slot in split.slots.values())
    opens = split.opens
    kept = {getattr(rule, "on_refresh", None) for rule in pipeline.inside} - {None}
    cells = [
        f"[{name}](presets/{name}.md)",
        f"{kind_of(type(selector))}, {pipeline.orient}" if opens else "none",
        selector.source if opens else "",
        schedule(pipeline) if opens else "",
        momentum(pipeline),
        words(pipeline.inside),
        words(pipeline.complement),
        "by LDAdam's formula" if "ldadam" in words(pipeline.inside) else ", ".join(sorted(kept)),
        words(pipeline.finish),
        pipeline.decay,
        f"{state / prod(SHAPE):.3f}",
        f"{update / 1e9:.2f}" if update else "",
        f"{refresh / 1e9:.2f}" if refresh else "",
    ]
    return "| " + " | ".join(cells) + " |"


def schedule(pipeline: Pipeline) -> str:
    selector = pipeline.selector
    if selector.every is None:
        return "on call"
    every = "every step" if selector.every == 1 else f"every {selector.every}"
    return every + (", after" if selector.timing == "after" else "") + (", first only primes" if selector.traits().primes else "")


def momentum(pipeline: Pipeline) -> str:
    where = []
    if pipeline.momentum:
        where.append(f"full: {words(pipeline.momentum)}")
    if pipeline.feedback is not None:
        where.append(f"feedback {pipeline.feedback:g}")
    if any(getattr(rule, "beta1", 0) or rule.kind in ("ema", "heavy_ball") for rule in pipeline.inside):  # type: ignore[attr-defined]
        where.append("inside")
    if not pipeline.inside and any(getattr(rule, "beta1", 0) for rule in pipeline.complement):
        where.append("in the rule")
    return "; ".join(where) or "none"


def words(rules: tuple[Rule, ...]) -> str:
    return " + ".join(rule.kind for rule in rules)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------------- fidelity


INTRODUCTION = """
A preset claims to be the method of its paper, so it is held against the authors' own code: from the same start and the
same gradients, 8 to 14 steps in float64, the parameters must agree step by step. The error is the largest over steps
and parameters of |p - reference| / |reference - start|, relative to how far the reference has moved. Tolerances are
fifty times what a change of two units in the last place of a gradient does. Of {count} trajectories {held} hold; the
worst error is {worst:.1e} of its tolerance. Random draws and the signs of singular vectors, which are arbitrary, are
taken from the file.

`subspace-opt parity` measures this table anew. Deliberate mistakes (eps in another place, a refresh off by one, decay
after instead of before) are shown by tests to exceed the tolerances.
"""

DEFECTS = """
## Defects that are not reproduced

Some files pin what can only be a slip in the authors' code. The parameters it touches are compared with that slip
written as a rule in the tests, where they agree to the same tolerance: the difference is that and nothing else.
"""


def fidelity_page(measured: list[Parity]) -> str:
    held = "all" if all(p.holds for p in measured) else str(sum(p.holds for p in measured))
    worst = max(p.error / p.tolerance for p in measured)
    introduction = INTRODUCTION.format(count=len(measured), held=held, worst=worst)
    slips = [f"| `{p.file}` | {', '.join(names)} | {why} |" for p in measured for why, names in by_defect(p).items()]
    slips.append("| `muon_kj_wd` | conv | the shape factor is that of the unflattened kernel, 1; the spec of the test says so |")
    differences = [
        f"- **[{name}](presets/{name}.md)**: {spec.notes}" for name in preset_names(installed=False) if (spec := load_spec(name)).notes
    ]
    head = ["| preset | file | reference | what it pins down | tolerance | error |", "| --- | --- | --- | --- | --- | --- |"]
    slip_head = ["| file | parameters | what the reference does |", "| --- | --- | --- |"]
    table = ['<div class="wide" markdown>', "", *head, *(parity_row(p) for p in measured), "", "</div>", ""]
    paper = ["", "## Where paper and code differ", "", *differences, ""]
    return "\n".join([*WIDE, "# Fidelity", introduction, *table, DEFECTS, *slip_head, *slips, *paper])


def parity_row(p: Parity) -> str:
    cells = (f"[{p.preset}](presets/{p.preset}.md)", f"`{p.file}`", p.reference, p.pins, f"{p.tolerance:.0e}", error(p))
    return f"| {' | '.join(cells)} |"


def error(p: Parity) -> str:
    return f"{p.error:.1e}" if p.compared else "by the tests alone"


def by_defect(p: Parity) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, why in p.left_out.items():
        out.setdefault(why, []).append(name)
    return out
