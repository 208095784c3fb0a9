"""Write two more pages: `field.md` from the presets, and `fidelity.md` from the trajectories in `tests/golden`."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from subspace_opt.algebra import Rule, WeightRule
from subspace_opt.algebra.frame import Frame
from subspace_opt.algebra.pipeline import Pipeline
from subspace_opt.plan.costs import flops
from subspace_opt.registry import kind_of
from subspace_opt.spec import Spec, load_spec, preset_names
from subspace_opt.testing.trajectories.parity import Parity, measure_all

ROOT = Path(__file__).parent.parent
WIDE = ["---", "hide: [navigation, toc]", "---", ""]  # a table of a dozen columns needs the whole page
SHAPE = (1376, 512)  # a feed-forward matrix of the 60M LLaMA


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"field.md": field_page(), "fidelity.md": fidelity_page(measure_all(ROOT / "tests" / "golden"))}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


# ------------------------------------------------------------------------------------------------------------------ the field


def field_page() -> str:
    """The page with one row for each preset."""
    head = (
        "method | selector | source | refresh | momentum | inside | complement | moments at a refresh | finish | apply | decay "
        "| state / mn | GFLOP an update | a refresh"
    )
    rows = [field_row(name, load_spec(name)) for name in preset_names(installed=False)]
    return "\n".join(
        [
            *WIDE,
            "# The field",
            "",
            "Each row shows one method: the place of its momentum, the selector and schedule of its subspace, and the rules inside and "
            f"outside. State and operations are for one matrix of {SHAPE[0]} x {SHAPE[1]} at the preset's own rank. Only products "
            "and decompositions count as operations, a multiply-add as two. The presets generate this table.",
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
    """The pipeline that a hidden matrix uses."""
    return spec.pipelines.get("matrix") or next(iter(spec.pipelines.values()))


def field_row(name: str, spec: Spec) -> str:
    """The row of one preset."""
    pipeline = matrix_pipeline(spec)
    frame, selector = Frame.of(pipeline, *SHAPE), pipeline.selector
    update, refresh = flops(frame)
    state = sum(prod(slot.shape) * (slot.dtype.itemsize / 4 if slot.dtype else 1) for slot in frame.slots.values())
    opens = frame.opens
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
        words(pipeline.apply),
        pipeline.decay_beside_rules or ("by a rule" if pipeline.decay == "before" else pipeline.decay),
        f"{state / prod(SHAPE):.3f}",
        f"{update / 1e9:.2f}" if update else "",
        f"{refresh / 1e9:.2f}" if refresh else "",
    ]
    return "| " + " | ".join(cells) + " |"


def schedule(pipeline: Pipeline) -> str:
    """When the basis is refreshed, in words."""
    selector = pipeline.selector
    if selector.every is None:
        return "on call"
    every = "every step" if selector.every == 1 else f"every {selector.every}"
    return (
        every
        + (", after" if selector.timing == "after" else "")
        + (", first gradient only sets the basis" if selector.traits().primes else "")
    )


def momentum(pipeline: Pipeline) -> str:
    """The places that keep a momentum, in words."""
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


def words(rules: tuple[Rule | WeightRule, ...]) -> str:
    """The kinds of a list of rules."""
    return " + ".join(rule.kind for rule in rules)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------------- fidelity


INTRODUCTION = """
A preset claims to be the method of its paper, so tests compare it with the authors' own code. Both start from the same weights and get
the same gradients for 8 to 14 steps in float64, and the parameters must agree at every step. The error is |p - reference| /
|reference - start|, the largest over all steps and parameters; the denominator is the distance that the reference has moved. A tolerance
is fifty times the effect of a change of two units in the last place of a gradient. {held} of {count} trajectories stay within their
tolerance, and the largest error is {worst:.1e} of its tolerance. The replay reads random draws, and the arbitrary signs of singular
vectors, from the file.

`subspace-opt parity` measures this table again. Tests show that deliberate mistakes exceed the tolerances, such as eps in another place,
a refresh off by one, or weight decay after the update instead of before.
"""

DEFECTS = """
## Defects that are not reproduced

Some trajectories contain a mistake in the authors' code. For the parameters that it affects, the tests write the mistake as a rule and
compare with that rule. They agree to the same tolerance, so the mistake explains the whole difference.
"""


def fidelity_page(measured: list[Parity]) -> str:
    """The page that lists all trajectories, the defects of reference codes, and where paper and code differ."""
    held = "all" if all(p.holds for p in measured) else str(sum(p.holds for p in measured))
    worst = max(p.error / p.tolerance for p in measured)
    introduction = INTRODUCTION.format(count=len(measured), held=held, worst=worst)
    slips = [f"| `{p.file}` | {', '.join(names)} | {why} |" for p in measured for why, names in by_defect(p).items()]
    slips += [f"| `{p.file}` | all, first update | {p.rounded} |" for p in measured if p.rounded]
    slips.append("| `muon_kj_wd` | conv | the shape factor is that of the unflattened kernel, 1; the spec of the test sets it |")
    differences = [
        f"- **[{name}](presets/{name}.md)**: {spec.notes}" for name in preset_names(installed=False) if (spec := load_spec(name)).notes
    ]
    head = ["| preset | file | reference | covers | tolerance | error |", "| --- | --- | --- | --- | --- | --- |"]
    slip_head = ["| file | parameters | behaviour of the reference code |", "| --- | --- | --- |"]
    table = ['<div class="wide" markdown>', "", *head, *(parity_row(p) for p in measured), "", "</div>", ""]
    paper = ["", "## Where paper and code differ", "", *differences, ""]
    return "\n".join([*WIDE, "# Fidelity", introduction, *table, DEFECTS, *slip_head, *slips, *paper])


def parity_row(p: Parity) -> str:
    cells = (f"[{p.preset}](presets/{p.preset}.md)", f"`{p.file}`", p.reference, p.pins, f"{p.tolerance:.0e}", error(p))
    return f"| {' | '.join(cells)} |"


def error(p: Parity) -> str:
    return f"{p.error:.1e}" if p.compared else "compared by tests only"


def by_defect(p: Parity) -> dict[str, list[str]]:
    """The parameters that are left out of a comparison, by the defect that affects them."""
    out: dict[str, list[str]] = {}
    for name, why in p.left_out.items():
        out.setdefault(why, []).append(name)
    return out
