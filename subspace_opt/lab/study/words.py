"""Statistics in words: numbers with their intervals, differences, the verdict, and the warnings that belong to it. All pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .records import Entry, Study
from .statistics import Costs, Estimate, Line, Pairing, Reached, find_reference

MINUS = "−"


def decimals(half: float) -> int:
    """Decimals of a loss and its half-width: 3, or up to 5 if the half-width needs them."""
    if not math.isfinite(half) or half < 1e-6:
        return 3
    return min(5, max(3, -math.floor(math.log10(half))))


def plus_minus(value: Estimate, places: int | None = None) -> str:
    """`1.891 ± 0.012`; without an interval `1.891`; without a value `-`."""
    if not value.count:
        return "-"
    places = decimals(value.half) if places is None else places
    mean = f"{round(value.mean, places) + 0.0:.{places}f}".replace("-", MINUS)  # adding 0 turns -0.0 into 0.0
    return mean if math.isnan(value.half) else f"{mean} ± {value.half:.{places}f}"


def signed(value: Estimate, places: int | None = None) -> str:
    """As `plus_minus`, with the sign of a positive mean."""
    text = plus_minus(value, places)
    return f"+{text}" if value.count and value.mean > 0 else text


def number(value: float) -> str:
    """A tuned value with at most three digits: `0.004`, `64`, `1e-05`."""
    return f"{value:.3g}" if abs(value) < 1000 or value != int(value) else f"{value:.0f}"


def values(tuned: dict[str, float]) -> str:
    """`lr 0.004, rank 64`."""
    return ", ".join(f"{name} {number(value)}" for name, value in tuned.items()) or "-"


def listed(items: Iterable[object], last: str = "and") -> str:
    """`a, b and c`."""
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}" if texts else "none"


def counted(count: int, one: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count} {one}" if count == 1 else f"{count:,} {one}s"


def shorten(label: str, most: int = 24) -> str:
    """A label of at most `most` characters; the middle of a longer one is left out."""
    if len(label) <= most:
        return label
    tail = most // 3
    return f"{label[: most - tail - 1]}…{label[-tail:]}"


# ------------------------------------------------------------------------------------------------------------ differences


def difference(pairing: Pairing) -> str:
    """`cosmos below muon in 3 of 3 seeds, by 0.061 ± 0.010`, with the diverged runs and the doubt that belong to it."""
    count = len(pairing.seeds)
    if not count:
        return f"{pairing.first} and {pairing.second} share no seed in which one of them finished"
    if not pairing.below and not pairing.above:
        return f"{pairing.first} equal to {pairing.second} in {count} of {counted(count, 'seed')}"
    side, wins = side_and_wins(pairing)
    text = f"{pairing.first} {side} {pairing.second} in {wins} of {counted(count, 'seed')}"
    return text + _amount(pairing, side) + _lost(pairing) + _doubt(pairing)


def side_and_wins(pairing: Pairing) -> tuple[str, int]:
    """(`below` or `above`, number of seeds on that side): the first's side by its mean difference, by the seeds if that is 0 or missing."""
    mean = pairing.difference.mean
    is_below = pairing.below >= pairing.above if math.isnan(mean) or mean == 0 else mean < 0
    return ("below", pairing.below) if is_below else ("above", pairing.above)


def _amount(pairing: Pairing, side: str) -> str:
    value = pairing.difference
    if not value.count:
        return ""
    mean = -value.mean if side == "below" else value.mean
    where = "" if value.count == len(pairing.seeds) else f" where both finished ({counted(value.count, 'seed')})"
    return f", by {plus_minus(Estimate(mean, value.half, value.count))}{where}"


def _lost(pairing: Pairing) -> str:
    texts = [
        f"; {label} diverged in {seeds_of(seeds)}"
        for label, seeds in ((pairing.first, pairing.first_diverged), (pairing.second, pairing.second_diverged))
        if seeds
    ]
    return "".join(texts)


def _doubt(pairing: Pairing) -> str:
    """The remark on a difference that the seeds do not establish."""
    value = pairing.difference
    if value.count < 2 or value.excludes_zero:
        return ""
    return "; the interval contains 0"


def seeds_of(seeds: Sequence[int]) -> str:
    """`seed 1`, `seeds 0 and 2`."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}"


def ratio(value: Estimate) -> str:
    """`0.41 ± 0.03`."""
    return plus_minus(value, 2)


def reached(found: Reached | None) -> tuple[str, str]:
    """Tokens and seconds to the reference's final loss, as ratios."""
    if found is None or not found.seeds:
        return "-", "-"
    if not found.reached:
        return "not reached", "not reached"
    return ratio(found.tokens), ratio(found.seconds)


# ---------------------------------------------------------------------------------------------------------------- verdict


def verdict(study: Study, lines: Sequence[Line]) -> list[str]:
    """The outcome in a few sentences: the best optimizer, its lead over the next and over the reference, and its costs."""
    found = [line for line in lines[1:] if line.to_best is not None and line.to_best.seeds]
    reference = find_reference(study)
    leads = found[:1] + [line for line in found[1:] if line.entry is reference]
    subject = f"{lines[0].entry.label} "
    texts = [difference(line.to_best.turned()) for line in leads if line.to_best is not None]
    return [headline(lines), *(f"It is {text.removeprefix(subject)}." for text in texts), *costs_and_savings(study, lines)]


def headline(lines: Sequence[Line]) -> str:
    """One sentence: the best optimizer and its loss."""
    best = lines[0]
    if not best.loss.count:
        return "No final run has finished, so the study has no result."
    mean = "with 1 seed" if best.loss.count == 1 else f"mean over {counted(best.loss.count, 'seed')} with its 95 % interval"
    loss = f"{plus_minus(best.loss)} nats per token, {mean}"
    if len(lines) == 1:
        return f"{best.entry.label} ends at a validation loss of {loss}; no other optimizer is in this study."
    return f"{best.entry.label} has the lowest final validation loss: {loss}."


def costs_and_savings(study: Study, lines: Sequence[Line]) -> list[str]:
    """How soon the best optimizer reaches the reference's final loss, and its memory and time relative to the reference's."""
    reference, best = find_reference(study), lines[0]
    base = next((line for line in lines if line.entry is reference), None)
    if base is None or len(lines) == 1 or not best.loss.count:
        return []
    name, text = base.entry.label, []
    if base is best:
        return [f"No optimizer of this study ends below {name}, the reference."]
    if best.reached is not None and best.reached.reached:
        tokens, seconds = reached(best.reached)
        part = "" if best.reached.reached == best.reached.seeds else f" in {best.reached.reached} of {counted(best.reached.seeds, 'seed')}"
        words = f"after {tokens} of {name}'s tokens and {seconds} of its training time"
        text.append(f"{best.entry.label} reaches {name}'s final loss{part} {words}.")
    if best.costs and base.costs:
        text.append(_costs(best.costs, base.costs, name))
    return text


def _costs(ours: Costs, theirs: Costs, name: str) -> str:
    state, step = (_part(ours.measured_state_bytes, theirs.measured_state_bytes), _part(ours.step_median, theirs.step_median))
    return f"Its state takes {state} of {name}'s bytes, and its median step {step} of {name}'s time."


def _part(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "-"


def warnings(study: Study, lines: Sequence[Line]) -> list[str]:
    """Facts that limit the verdict, one sentence each."""
    text = []
    most = max((line.loss.count for line in lines), default=0)
    if most == 1:
        text.append("One seed: differences have no interval, and a second seed may reverse them.")
    for line in lines:
        label = line.entry.label
        if not line.entry.finals:
            text.append(f"{label} has no final run: {_no_final(line.entry)}.")
        if line.diverged:
            count = len(line.entry.finals)
            rest = "its mean covers the others" if line.loss.count else "it has no mean"
            text.append(f"{label} diverged in {len(line.diverged)} of {counted(count, 'seed')} ({seeds_of(line.diverged)}); {rest}.")
        if line.entry.at_edge:
            fields = listed(line.entry.at_edge)
            text.append(f"{label}: the best {fields} is at the edge of the values tried, so a better value may be outside.")
    doubtful = [line for line in lines if line.to_best is not None and line.to_best.difference.count > 1 and line.loss.count]
    close = [line.entry.label for line in doubtful if line.to_best is not None and not line.to_best.difference.excludes_zero]
    if close:
        text.append(f"These seeds do not separate {listed(close)} from {lines[0].entry.label}.")
    if find_reference(study) is None:
        text.append("No AdamW in this study, so no ratios to AdamW's final loss.")
    return text


def _no_final(entry: Entry) -> str:
    return "every run of its sweep diverged" if entry.tried and all(r.status == "diverged" for r in entry.tried) else "none has ended yet"
