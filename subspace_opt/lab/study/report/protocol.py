"""How the study was made and the limits of its conclusions, in plain words. All pure."""

from __future__ import annotations

from collections.abc import Iterable

from ..records import Study
from ..statistics import find_reference
from ..words import counted, listed, seeds_of
from .sweeps import swept_fields, tried_values


def method(study: Study) -> list[str]:
    """What was tuned and how, and what is paired."""
    return [
        "Every run trains the same model on the same text. With one seed, all optimizers start from the same weights and see the same "
        "batches in the same order.",
        *_sweep(study),
        _finals(study),
        "Differences are paired: for each seed, the loss of one optimizer minus the loss of the other. An interval is the mean over seeds "
        "plus and minus Student's t at 95 % times the standard error. A diverged run counts as above every finished run and has no part in "
        "means.",
        *_reference(study),
        _times(study),
    ]  # fmt: skip


def _times(study: Study) -> str:
    text = (
        "A step is one update: forward, backward, clipping and optimizer. The first update, with allocation and first basis, is left out. "
        "The optimizer's share is its mean time divided by the mean time of the step."
    )
    if turns := study.problem.get("turns"):
        return (
            f"{text} Times were measured by turns, after the runs: all optimizers made one update each, in a new order in each of {turns} "
            "rounds, so other load on the machine slowed all of them alike. Seconds of training are updates times the mean of these."
        )
    return f"{text} Times are those of the final runs: median and 95 % are medians over seeds, the worst is that of all seeds."


def _finals(study: Study) -> str:
    steps = [record.steps for entry in study.entries for record in entry.finals]
    if not steps:
        return "There are no final runs."
    return (
        f"The final runs make {_span(steps)} updates with the values that the sweep found, to the end of the learning-rate schedule, with "
        f"{seeds_of(study.seeds)}."
    )


def _sweep(study: Study) -> list[str]:
    tuned = [entry for entry in study.entries if entry.tried]
    if not tuned:
        return ["No optimizer was tuned: each runs with the values of its spec."]
    runs = [record for entry in tuned for record in entry.tried]
    fields = list(dict.fromkeys(name for entry in tuned for name in swept_fields(entry)))
    counts = _span(len(tried_values(entry, field).values) for entry in tuned for field in swept_fields(entry))
    seeds = sorted({record.seed for record in runs})
    apart = "" if set(seeds) & set(study.seeds) else " No final run has a seed of the sweep."
    text = [
        f"A sweep tunes {listed(fields)} of each optimizer in the same way: runs of {_span(r.steps for r in runs)} updates with "
        f"{seeds_of(seeds)}, on a grid by factors of two that widens until the best value has a worse one on each side. "
        f"It tried {counts} values a field, in {counted(len(runs), 'run')}.{apart}",
        f"All other settings, such as decay rates of moments, are those of the specs: only {listed(fields)} was tuned.",
    ]
    untuned = [entry.label for entry in study.entries if not entry.tried]
    return [*text, *([f"Not tuned: {listed(untuned)}."] if untuned else [])]


def _reference(study: Study) -> list[str]:
    reference = find_reference(study)
    if reference is None:
        return []
    name = reference.label
    return [
        f"Tokens and seconds to {name}'s final loss are ratios: those at which the validation curve first reaches that loss, interpolated "
        f"between validations, divided by {name}'s own in the same seed. A ratio of 0.8 is a speed-up of 1 / 0.8 = 1.25."
    ]


def limits(study: Study) -> list[str]:
    """Conclusions that the study does not support."""
    text = [
        "The result holds for this model, text, batch size and number of updates. A larger model or a longer run may order the "
        "optimizers in another way.",
        _uncertainty(len(study.seeds)),
    ]
    if any(entry.tried for entry in study.entries):
        text.append(
            "The sweep is shorter than the final runs. An optimizer whose best value moves with the number of updates is at a disadvantage."
        )
    if find_reference(study) is not None:
        text.append(
            "A loss that is reached before the end is reached at a high learning rate. A run planned to end there would end lower, so the "
            "ratios understate the saving."
        )
    text.append("Times hold for this machine and its load. They change with the size of the model more than the losses do.")
    return text


def _uncertainty(seeds: int) -> str:
    if seeds < 2:
        return "One seed gives no intervals. Another seed may order the optimizers in another way."
    return (
        f"The intervals cover the variation over {counted(seeds, 'seed')}, not that over models, texts or tuning. Each is a 95 % "
        "interval by itself: among many differences, some exclude 0 by chance, and the lead of the best is slightly overstated "
        "because it was chosen after the runs."
    )


def _span(numbers: Iterable[int]) -> str:
    """`600`, or `4 to 7` if the numbers differ."""
    found = sorted(set(numbers))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
