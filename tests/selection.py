"""Which cases of the tests run: all, or fewer presets where presets made of the same kinds ask the same question.

Tests marked `all_presets` hold what each preset must show by itself. Other tests that list all presets ask about the engine: a *covering*
set of presets gets all their cases, and every other preset gets one case in three, chosen by a checksum of the case's name. The option
`--all-presets` runs everything.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from subspace_opt import load_spec
from subspace_opt.spec import preset_names

FIRST = ("cosmos", "galore")  # in every selection
SHARE = 3  # one case in so many of those that are thinned out
LONG = 12  # cases beyond which `--quick` thins a test out

# `--quick` keeps these rows of tests that run for every preset, or for every component of the conformance kit.
QUICK_PRESETS = frozenset({"cosmos"})
QUICK_SUBJECTS = frozenset({"cosmos", "rule adam", "selector svd"})


@cache
def covering() -> frozenset[str]:
    """Presets in which every kind stands at every place where some preset has it, with every orientation, source, timing and decay."""
    features = {name: frozenset(_features(name)) for name in preset_names(installed=False)}
    chosen = list(FIRST)
    rest = frozenset().union(*features.values()).difference(*(features[name] for name in chosen))
    while rest:
        chosen.append(max(features, key=lambda name: (len(features[name] & rest), name)))
        rest -= features[chosen[-1]]
    return frozenset(chosen)


def _features(preset: str) -> Iterator[tuple[Any, ...]]:
    for pipeline in load_spec(preset).pipelines.values():
        parts = pipeline.model_dump()
        selector = parts["selector"]
        yield from (("orient", parts["orient"]), ("decay", parts["decay"]), ("feedback", parts["feedback"] is not None))
        yield from (("timing", selector.get("timing")), ("source", selector.get("source")))
        for place, part in parts.items():
            yield from ((place, kind) for kind in _kinds(part))


def _kinds(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("kind"), str):
            yield part["kind"]
        for value in part.values():
            yield from _kinds(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _kinds(value)


def selected(items: list[pytest.Item], *, all_presets: bool, quick: bool) -> list[pytest.Item]:
    """The cases that run, in their order."""
    kept = [item for item in items if all_presets or _is_needed(item)]
    if not quick:
        return kept
    kept = [item for item in kept if _is_quick(item)]
    cases = Counter(map(_test, kept))
    return [item for item in kept if cases[_test(item)] <= LONG or _is_drawn(item)]


def _is_needed(item: pytest.Item) -> bool:
    if item.get_closest_marker("all_presets") or not any(map(_lists_all, item.iter_markers("parametrize"))):
        return True
    return _given(item)["preset"] in covering() or _is_drawn(item)


def _lists_all(mark: pytest.Mark) -> bool:
    """True if a mark gives every preset to the argument `preset`."""
    names, values = mark.args[:2]
    return names == "preset" and len(values) == len(preset_names(installed=False))


def _is_quick(item: pytest.Item) -> bool:
    """True if a test is not slow, and if it runs for every preset, its preset is one of the few."""
    given = _given(item)
    if item.get_closest_marker("slow") or given.get("preset", "cosmos") not in QUICK_PRESETS:
        return False
    return "check" not in given or given["check"].subject.partition("=")[0] in QUICK_SUBJECTS


def _is_drawn(item: pytest.Item) -> bool:
    return zlib.crc32(item.name.encode()) % SHARE == 0


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _given(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a case."""
    return item.callspec.params if hasattr(item, "callspec") else {}
