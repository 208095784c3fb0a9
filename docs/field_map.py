"""Write the pages `field.md`, a map of the presets with a picture of each, and `choose.md`, four questions that lead to a preset."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from subspace_opt.algebra import Rule, WeightRule
from subspace_opt.algebra.frame import Frame
from subspace_opt.algebra.pipeline import Pipeline
from subspace_opt.plan.costs import flops
from subspace_opt.registry import kind_of
from subspace_opt.spec import Spec, load_spec, preset_names
from subspace_opt.spec.picture import hidden_pipeline, is_whole, pipeline_svg

SHAPE = (1376, 512)  # a feed-forward matrix of the 60M LLaMA
ADAMW = 2.0  # numbers that AdamW keeps for a weight
CHOICES = Path(__file__).parent / "choose.yaml"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    methods = [method(name, load_spec(name)) for name in preset_names(installed=False)]
    choices = yaml.safe_load(CHOICES.read_text(encoding="utf-8"))
    pages = {"field.md": field_page(methods), "choose.md": choose_page(choices, {m.name: m for m in methods})}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


# ---------------------------------------------------------------------------------------------------------------------- methods


class Method(NamedTuple):
    """A preset with the pipeline of its hidden matrices, and what that costs for a matrix of `SHAPE`.

    `state`: numbers kept for each weight. `update`, `refresh`: operations of an update, and of a refresh. `mean`: of both over a period.
    """

    name: str
    spec: Spec
    pipeline: Pipeline
    frame: Frame
    state: float
    update: float
    refresh: float
    mean: float


def method(name: str, spec: Spec) -> Method:
    pipeline = hidden_pipeline(spec)
    frame = Frame.of(pipeline, *SHAPE)
    update, refresh = flops(frame)
    state = sum(prod(slot.shape) * (slot.dtype.itemsize / 4 if slot.dtype else 1) for slot in frame.slots.values())
    every = pipeline.selector.every if frame.opens else None
    return Method(name, spec, pipeline, frame, state / prod(SHAPE), update, refresh, update + (refresh / every if every else 0.0))


# ------------------------------------------------------------------------------------------------------------------------ groups


GROUPS = {
    "entries": ("Entry by entry", "Every weight has an update of its own. The matrix is never seen as a matrix."),
    "grouped": ("Second moments shared", "Parts of a matrix share one second moment, so most of AdamW's second state is gone."),
    "matrix": (
        "The matrix as a whole",
        "A momentum of full size is orthogonalized, or divided by roots of covariances: all its directions get steps of one length.",
    ),
    "rotated": (
        "In a rotated basis",
        "The gradient is turned into a basis of the whole space, where Adam or one of its relatives works entry by entry.",
    ),
    "full": (
        "Momentum in full space, then a subspace",
        "The momentum sees the whole gradient. The subspace decides which rule each of its parts gets.",
    ),
    "both": (
        "Momentum inside the subspace, a cheap rule outside",
        "State is kept for the coordinates in the subspace. The rest of the gradient moves the weight by a rule with little or no memory.",
    ),
    "inside": (
        "Everything inside the subspace",
        "Only the coordinates in the subspace are kept and used. What lies outside is left out, or fed back into the next gradient.",
    ),
    "set": ("The weight stays in a set", "After the update the weight is brought back: to a sphere, or to an orthogonal matrix."),
    "avoid": ("Beside a subspace", "The update avoids a subspace, which holds what the weights have already learned."),
}


def group(m: Method) -> str:
    """The key of the idea that a method belongs to."""
    p = m.pipeline
    if any(type(rule).landed is not WeightRule.landed and not rule.traits(*m.frame.own).decays for rule in p.apply):
        return "set"
    if not m.frame.opens:
        if m.update:
            return "matrix"
        return "grouped" if any(prod(slot.shape) < prod(SHAPE) for slot in m.frame.slots.values()) else "entries"
    if is_whole(m.frame):
        return "rotated"
    if not p.inside:
        return "avoid"
    if p.momentum or p.feedback:
        return "full"
    return "both" if m.frame.has_complement else "inside"


# ------------------------------------------------------------------------------------------------------------------ the field


def field_page(methods: list[Method]) -> str:
    """The map: a section for each idea, a card for each method, and one table of all."""
    widest, costliest = max(m.state for m in methods), max(m.mean for m in methods)
    parts = [
        "---",
        "hide: [toc]",
        "---",
        "",
        "# The field",
        "",
        "Each picture shows the path of a gradient through one method, from momentum and subspace to the weight. The "
        "first bar is the state that is kept for a weight (AdamW keeps 2 numbers). The second bar is "
        f"the arithmetic of an update, for a matrix of {SHAPE[0]} x {SHAPE[1]} at the preset's own rank, with its share of a refresh. "
        "The presets generate this page. [Which one for me?](choose.md) has four questions instead.",
        "",
    ]
    for key, (title, idea) in GROUPS.items():
        members = [m for m in methods if group(m) == key]
        if members:
            parts += [f"## {title}", "", idea, "", '<div class="cards">']
            parts += [card(m, widest, costliest) for m in sorted(members, key=lambda m: (m.state, m.name))]
            parts += ["</div>", ""]
    return "\n".join([*parts, *table(methods)])


def card(m: Method, widest: float, costliest: float) -> str:
    """One method: its name, a sentence, its picture and its bars."""
    cost = f"{m.mean / 1e9:.2f} GFLOP" if m.mean else "entry by entry"
    return "\n".join(
        [
            f'<div class="card" id="{m.name}">',
            f'<h3><a href="presets/{m.name}.html">{m.name}</a></h3>',
            f"<p>{escape(sentence(m.spec.about))}</p>",
            pipeline_svg(m.pipeline, m.name),
            bar("state", m.state / widest, f"{m.state:.2g} for a weight"),
            bar("work", m.mean / costliest if costliest else 0.0, cost),
            "</div>",
        ]
    )


def bar(name: str, share: float, text: str) -> str:
    """A bar whose length is a share of the longest one."""
    return f'<div class="bar {name}"><span style="width:{max(share, 0.004):.1%}"></span><em>{name}: {escape(text)}</em></div>'


def sentence(text: str) -> str:
    """The first sentence of a text."""
    return text.partition(". ")[0].rstrip(".") + "."


def table(methods: Iterable[Method]) -> list[str]:
    """All methods in one table."""
    head = "method | selector | source | refresh | momentum | inside | complement | finish | apply | decay"
    head += " | state / mn | GFLOP an update | a refresh"
    rows = [f"| {' | '.join(cells(m))} |" for m in methods]
    top = ["## All in one table", "", '<div class="wide" markdown>', "", f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    return [*top, *rows, "", "</div>", ""]


def cells(m: Method) -> list[str]:
    p, selector, opened = m.pipeline, m.pipeline.selector, m.frame.opens
    return [
        f"[{m.name}](presets/{m.name}.md)",
        f"{kind_of(type(selector))}, {p.orient}" if opened else "none",
        selector.source if opened else "",
        schedule(p) if opened else "",
        momentum(p),
        words(p.inside),
        words(p.complement),
        words(p.finish),
        words(p.apply),
        p.decay_beside_rules or ("by a rule" if p.decay == "before" else p.decay),
        f"{m.state:.3f}",
        f"{m.update / 1e9:.2f}" if m.update else "",
        f"{m.refresh / 1e9:.2f}" if m.refresh else "",
    ]


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


# --------------------------------------------------------------------------------------------------------------------- choosing


def choose_page(choices: Any, methods: dict[str, Method]) -> str:
    """Four questions, the presets that their answers lead to, and why. Without a script, all of them are shown with their conditions."""
    questions = choices["questions"]
    parts = ["# Which one for me?", "", " ".join(choices["introduction"].split()), "", '<form class="choose">']
    for key, question in questions.items():
        answers = "".join(
            f'<label><input type="radio" name="{key}" value="{value}">{escape(text)}</label>' for value, text in question["answers"].items()
        )
        parts.append(f"<fieldset><legend>{escape(question['asks'])}</legend>{answers}</fieldset>")
    parts += ["</form>", '<div class="cards choices">']
    parts += [choice(row, questions, methods) for row in choices["presets"]]
    parts += ["</div>", "", '<script src="choose.js"></script>', "", choices["after"].strip(), ""]
    return "\n".join(parts)


def choice(row: Any, questions: Any, methods: dict[str, Method]) -> str:
    """The card of one recommendation."""
    m = methods[row["preset"]]
    unknown = {key: set(row["when"][key]) - set(questions[key]["answers"]) for key in row["when"]}
    if any(unknown.values()):
        raise ValueError(f"{CHOICES.name}: preset '{m.name}' names answers that no question has: {unknown}")
    data = " ".join(f'data-{key}="{" ".join(row["when"].get(key, questions[key]["answers"]))}"' for key in questions)
    wanted = "; ".join(" or ".join(questions[key]["answers"][v] for v in row["when"][key]) for key in questions if key in row["when"])
    rank = getattr(m.pipeline.selector, "rank", None)
    size = "" if rank is None else f", rank {rank:g}" if rank >= 1 else f", rank {rank:.0%} of a side"
    begin = f"learning rate {m.spec.defaults.lr:g}, weight decay {m.spec.defaults.weight_decay:g}{size}"
    share = m.state / ADAMW
    state = f"{share:.0%} of AdamW's state" if share >= 0.01 else "Less than 1% of AdamW's state"
    lines = [
        f'<div class="card" {data}>',
        f'<h3><a href="presets/{m.name}.html">{m.name}</a></h3>',
        f'<p class="when">{escape(wanted)}</p>',
        f"<p>{escape(' '.join(row['why'].split()))}</p>",
        f"<p>Begin with {begin}. {state} for hidden matrices.</p>",
    ]
    if m.spec.published:
        lines.append(f'<p>Published: {escape(m.spec.published[-1])} (<a href="presets/{m.name}.html">sources</a>)</p>')
    return "\n".join([*lines, f"<pre><code>optimizer = subspace_opt.build(&quot;{m.name}&quot;, model)</code></pre>", "</div>"])
