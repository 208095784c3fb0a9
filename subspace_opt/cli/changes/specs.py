"""The commands `diff` and `explain-change`: how two specs differ, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from ...lab import meta_model
from ...optimizer import build
from ...spec import Spec, load_spec
from ...spec.difference import Change, differences
from ...spec.summary import call_text, plural
from ..options import AsJson, Dtype, ModelName, Plugins, Vocabulary, parse_overrides, print_json
from ..tables import console, make_table
from .consequences import Consequences, consequences, show_consequences

OldName = Annotated[str, typer.Argument(metavar="OLD", help="Name of a preset, or path of a .yaml or .json file.")]
NewName = Annotated[str, typer.Argument(metavar="NEW", help="The spec to compare it with.")]
SetNew = Annotated[
    list[str], typer.Option("--set", metavar="PATH=VALUE", help="Set a value of NEW by its dotted path. Repeat for several.")
]
SetOld = Annotated[
    list[str], typer.Option("--set-old", metavar="PATH=VALUE", help="Set a value of OLD by its dotted path. Repeat for several.")
]


def diff(
    old: OldName,
    new: NewName,
    set_: SetNew = [],  # noqa: B006
    set_old: SetOld = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show how two specs differ, place by place.

    Values that are equal are left out; defaults are written out. `-` stands for a field, rule or pipeline that one of the two lacks.
    """
    pair = _loaded(old, new, set_old, set_)
    changes = differences(*pair)
    if as_json:
        print_json({"old": pair[0].name, "new": pair[1].name, "changes": [{"path": change.path, **change._asdict()} for change in changes]})
    else:
        _show(changes, *pair)


def explain_change(
    old: OldName,
    new: NewName,
    model: ModelName = "60m",
    vocab: Vocabulary = None,
    dtype: Dtype = "float32",
    set_: SetNew = [],  # noqa: B006
    set_old: SetOld = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show what a change of the spec costs or saves for a model: bytes of state, operations, routes.

    Totals come first, then the bytes of every slot by role, then the parameters whose pipeline, view or rank changes. Operations count
    products and decompositions, not elementwise work. No weights are allocated.
    """
    pair = _loaded(old, new, set_old, set_)
    shapes = meta_model(model, vocab_size=vocab).to(getattr(torch, dtype))
    found: Consequences = consequences(*(build(spec, shapes).plan for spec in pair))
    if as_json:
        print_json({"model": model, "dtype": dtype, "old": pair[0].name, "new": pair[1].name, **found.to_dict()})
    else:
        show_consequences(found, f"{pair[0].name} -> {pair[1].name} on {model}, parameters in {dtype}", console())


def _loaded(old: str, new: str, set_old: list[str], set_new: list[str]) -> tuple[Spec, Spec]:
    return load_spec(old, parse_overrides(set_old)), load_spec(new, parse_overrides(set_new))


def _show(changes: list[Change], old: Spec, new: Spec) -> None:
    out = console()
    if not changes:
        out.print(f"no difference: {old.name} and {new.name} compute the same, with the same defaults", markup=False, soft_wrap=True)
        return
    a, b = (old.name, new.name) if old.name != new.name else (f"{old.name} (old)", f"{new.name} (new)")
    table = make_table("pipeline", "place", "field", escape(a), escape(b))
    for column in table.columns[3:]:
        column.no_wrap = False
    before = ""
    for (pipeline, place), some in groupby(changes, key=lambda change: change[:2]):
        for index, (field, left, right) in enumerate(_lines(list(some))):
            table.add_row(*map(escape, ("" if pipeline == before else pipeline, "" if index else place, field, left, right)))
            before = pipeline
    out.print(table)
    out.print(f"\n{plural(len(changes), 'difference')}")


def _lines(changes: list[Change]) -> Iterator[tuple[str, str, str]]:
    """The changes of one place: field, old and new text. Another kind comes first, and the fields of only one kind share a line."""
    renamed = any(change.field == "kind" for change in changes)
    own = [change for change in changes if renamed and change.field != "kind" and None in (change.old, change.new)]
    for change in sorted((change for change in changes if change not in own), key=lambda change: change.field != "kind"):
        yield change.field, _text(change.old), _text(change.new)
    if own:
        sides = [(change.field, change.old) for change in own], [(change.field, change.new) for change in own]
        left, right = (", ".join(f"{field} {_text(value)}" for field, value in side if value is not None) or "-" for side in sides)
        yield "own fields", left, right


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) and "complement" in value:  # a whole pipeline
        return ", ".join(f"{place}={call_text(part)}" for place, part in value.items() if part not in ([], {}, None))
    return f"{value:g}" if isinstance(value, float) else call_text(value)
