"""Write the page `fidelity.md` from the trajectories in `tests/golden`."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from subspace_opt.spec import load_spec, preset_names
from subspace_opt.testing.trajectories.parity import Parity, measure_all

ROOT = Path(__file__).parent.parent
WIDE = ["---", "hide: [navigation, toc]", "---", ""]  # a table of a dozen columns needs the whole page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    content = fidelity_page(measure_all(ROOT / "tests" / "golden"))
    files.append(File.generated(config, "fidelity.md", content=content))
    return files


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
