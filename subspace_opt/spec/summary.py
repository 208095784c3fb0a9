"""Short text and HTML tables for a prompt or a notebook: pipelines in the words of a spec, one line each."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def call_text(value: Any) -> str:
    """A plain value of a spec as one word or call: `muon`, `eigen(rank=64)`, `[whole, norm_growth(gamma=1.1)]`."""
    if isinstance(value, Mapping):
        if "kind" not in value:
            return f"{{{', '.join(f'{key}: {call_text(part)}' for key, part in value.items())}}}"
        fields = [f"{key}={call_text(part)}" for key, part in value.items() if key != "kind"]
        return f"{value['kind']}({', '.join(fields)})" if fields else str(value["kind"])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(call_text, value))}]"
    return str(value)


def pipeline_text(places: Mapping[str, Any]) -> str:
    """A pipeline's places on one line, those with default values left out."""
    return ", ".join(f"{place}={call_text(value)}" for place, value in places.items())


def spec_text(name: str, pipelines: Mapping[str, Mapping[str, Any]], routes: Sequence[tuple[str, str]]) -> str:
    """A spec in a few lines: its name, a line per pipeline, a line with the routes in order.

    Args:
        routes: Pairs of (condition, pipeline).
    """
    width = max(map(len, [*pipelines, "routes"]))
    lines = [f"  {pipeline.ljust(width)}  {pipeline_text(places)}" for pipeline, places in pipelines.items()]
    sent = "; ".join(f"{condition} -> {pipeline}" for condition, pipeline in routes)
    return "\n".join([f"Spec('{name}')", *lines, f"  {'routes'.ljust(width)}  {sent}"])


def spec_html(name: str, pipelines: Mapping[str, Mapping[str, Any]], routes: Sequence[tuple[str, str]]) -> str:
    """The same as two tables: a column per pipeline with a row per place, and the routes in order."""
    places = list(dict.fromkeys(place for parts in pipelines.values() for place in parts))
    body = [(place, *(call_text(parts[place]) if place in parts else "" for parts in pipelines.values())) for place in places]
    table = html_table(("", *pipelines), body, caption=f"Spec '{name}'")
    return table + html_table(("parameters", "pipeline"), routes, caption="routes, the first match wins")


def html_table(head: Sequence[str], body: Iterable[Sequence[str]], *, caption: str = "", note: str = "") -> str:
    """A table whose text is escaped. It sets no colours, so it follows a light or a dark page."""
    top = "".join(f'<th style="text-align:left">{html.escape(cell)}</th>' for cell in head)
    rows = "".join(f"<tr>{''.join(_cell(cell) for cell in line)}</tr>" for line in body)
    title = f'<caption style="text-align:left">{html.escape(caption)}</caption>' if caption else ""
    after = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<table>{title}<thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>{after}"


def _cell(text: str) -> str:
    return f'<td style="text-align:left">{html.escape(text)}</td>'


def plural(count: int, word: str, many: str = "") -> str:
    """`1 matrix`, `3 matrices`: a count with its word."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"
