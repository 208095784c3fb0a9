"""Which cases of the tests run: all, or fewer presets where presets made of the same kinds ask the same question.

Tests marked `all_presets` hold what each preset must show by itself; `all_presets(dtype=[...])` says so for some values of another
argument. Other tests that list all presets ask about the engine: a *covering* set of presets gets all their cases, and every other preset
gets one case in six, chosen by a checksum of the case's name. So do options of a kind in the conformance kit. `--all-presets` runs all.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from subspace_opt import load_spec
from subspace_opt.algebra.frame import Frame
from subspace_opt.engine.strategies import fused, is_in_coordinates
from subspace_opt.spec import preset_names

FIRST = ("cosmos", "galore")  # in every selection
SHARE = 6  # one case in so many of those that are thinned out
LONG = 12  # cases beyond which `--quick` thins a test out

# `--quick` keeps these rows of tests that run for every preset, or for every component of the conformance kit.
QUICK_PRESETS = frozenset({"cosmos"})
QUICK_SUBJECTS = frozenset({"cosmos", "rule adam", "selector svd"})


NAMES = frozenset(preset_names(installed=False))


@cache
def covering() -> frozenset[str]:
    """Presets that use all places and declarations that some preset uses. The engine knows nothing else: it has no names of kinds."""
    features = {name: frozenset(_features(name)) for name in NAMES}
    chosen = list(FIRST)
    rest = frozenset().union(*features.values()).difference(*(features[name] for name in chosen))
    while rest:
        chosen.append(max(features, key=lambda name: (len(features[name] & rest), name)))
        rest -= features[chosen[-1]]
    return frozenset(chosen)


def _features(preset: str) -> Iterator[tuple[Any, ...]]:
    for pipeline in load_spec(preset).pipelines.values():
        frame, selector = Frame.of(pipeline, 12, 8), pipeline.selector
        yield from (("orient", pipeline.orient), ("decay", pipeline.decay), ("feedback", pipeline.feedback is not None))
        yield from (
            ("kernel", fused(frame) is not None),
            ("in coordinates", is_in_coordinates(frame)),
            ("by entries", frame.is_elementwise),
        )
        for place in ("momentum", "inside", "complement", "finish", "apply"):
            rules = getattr(pipeline, place)
            yield (place, min(len(rules), 2))
            for rule in rules:
                sides = frame.inner if place == "inside" else (frame.rows, frame.cols)
                yield from ((place, trait) for trait, declared in rule.traits(*sides)._asdict().items() if declared)
        if frame.opens:
            yield from (("timing", selector.timing), ("source", selector.source), ("traits", selector.traits()))
            yield from (("draws", selector.draws(frame.rows, frame.cols, 1, True) is not None), ("every update", selector.every == 1))
            yield from (("tables", bool(selector.constants(frame.rows, frame.cols))), ("complement", frame.has_complement))


def selected(items: list[pytest.Item], *, all_presets: bool, quick: bool) -> list[pytest.Item]:
    """The cases that run, in their order."""
    kept = [item for item in items if all_presets or _is_needed(item)]
    if not quick:
        return kept
    kept = [item for item in kept if _is_quick(item)]
    cases = Counter(map(_test, kept))
    return [item for item in kept if cases[_test(item)] <= LONG or _is_drawn(item)]


def _is_needed(item: pytest.Item) -> bool:
    given, mark = _given(item), item.get_closest_marker("all_presets")
    if mark is not None and all(given[name] in values for name, values in mark.kwargs.items()):
        return True
    if "check" in given:
        subject = given["check"].subject
        return _is_drawn(item) or ("=" not in subject and (subject in covering() or subject not in NAMES))
    if mark is None and not any(map(_lists_all, item.iter_markers("parametrize"))):
        return True
    preset = given["preset"]
    return preset in covering() or preset not in NAMES or _is_drawn(item)


def _lists_all(mark: pytest.Mark) -> bool:
    """True if a mark gives every preset to the argument `preset`."""
    names, values = mark.args[:2]
    return names == "preset" and len(values) == len(NAMES)


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
