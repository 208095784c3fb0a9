"""The statistics and the report of a study: are the numbers right, are they said in the right words, is the page complete and safe?

Studies are synthetic: tests train nothing.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import study_samples as samples
from rich.console import Console

from subspace_opt.lab.errors import LabError
from subspace_opt.lab.study import statistics as stats
from subspace_opt.lab.study import table, words
from subspace_opt.lab.study.records import Study
from subspace_opt.lab.study.report import pareto, protocol, specs, svg, sweeps, write_report
from subspace_opt.lab.study.summary import summary

LONG = "cosmos with rank 128, a long label and no spaces/in-this-part-of-it.yaml"

# -------------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 4, 2.77645),
        (0.975, 9, 2.26216),
        (0.95, 10, 1.81246),
        (0.995, 7, 3.49948),
        (0.975, 1000, 1.96234),
        (0.025, 2, -4.30265),
        (0.5, 5, 0.0),
    ],
)
def test_quantiles_are_those_of_printed_tables(probability: float, freedom: int, quantile: float) -> None:
    assert stats.student_quantile(probability, freedom) == pytest.approx(quantile, abs=6e-5)


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 2), (1.0, 2), (0.975, 0)])
def test_a_quantile_that_does_not_exist_is_an_error(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="freedom >= 1"):
        stats.student_quantile(probability, freedom)


def test_an_interval_is_students() -> None:
    found = stats.estimate([1.0, 2.0, 3.0, math.nan, math.inf])
    assert (found.mean, found.count) == (2, 3)
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert math.isnan(stats.estimate([1.0]).half)
    assert not stats.estimate([1.0]).excludes_zero
    assert stats.estimate([]).count == 0
    assert stats.estimate([1.0, 1.1, 1.2]).excludes_zero
    assert not stats.estimate([-1.0, 1.1, 1.2]).excludes_zero


def pairing(first: list[float], second: list[float]) -> stats.Pairing:
    return stats.pair(samples.entry("a", first), samples.entry("b", second))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1.0, 1.1, 1.2], [1.06, 1.16, 1.27], "a below b in 3 of 3 seeds, by 0.063 ± 0.014"),
        ([1.06, 1.16, 1.27], [1.0, 1.1, 1.2], "a above b in 3 of 3 seeds, by 0.063 ± 0.014"),
        ([1.0, 1.1, 1.2], [1.1, 1.09, 1.3], "a below b in 2 of 3 seeds, by 0.063 ± 0.158; the interval contains 0"),
        ([1.0], [1.06], "a below b in 1 of 1 seed, by 0.060"),
        ([1.0, 1.0], [1.0, 1.0], "a equal to b in 2 of 2 seeds"),
        (
            [1.0, 1.1, 1.2],
            [1.06, math.nan, 1.27],
            "a below b in 3 of 3 seeds, by 0.065 ± 0.064 where both finished (2 seeds); b diverged in seed 1",
        ),
        ([math.nan, 1.1], [1.0, math.nan], "a below b in 1 of 2 seeds; a diverged in seed 0; b diverged in seed 1"),
        ([math.nan], [math.nan], "a and b share no seed in which one of them finished"),
        ([1.0, 1.2], [1.0001, 1.2003], "a below b in 2 of 2 seeds, by 0.000 ± 0.001; the interval contains 0"),
    ],
)
def test_paired_differences_in_words(first: list[float], second: list[float], said: str) -> None:
    found = pairing(first, second)
    assert words.difference(found) == said
    assert words.difference(found.turned().turned()) == said


def test_runs_are_paired_by_seed_and_not_by_position() -> None:
    ours, theirs = samples.entry("a", [1.0, 2.0]), samples.entry("b", [1.5, 2.5])
    found = stats.pair(ours, replace(theirs, finals=theirs.finals[::-1]))
    assert found.difference.mean == pytest.approx(-0.5)
    assert found.difference.half == pytest.approx(0, abs=1e-9)


def test_the_ranking_puts_diverged_runs_last() -> None:
    lost = samples.entry("lost", [1.0, math.nan, 1.0])
    none = replace(lost, label="none", finals=())
    ranked = stats.ranking([none, lost, samples.entry("worse", [2.0] * 3), samples.entry("best", [1.5] * 3)])
    assert [one.label for one in ranked] == ["best", "worse", "lost", "none"]


def straight(label: str, end: float, ms: float = 10, seed: int = 0, tokens: int = 1024) -> Any:
    """A run whose loss falls on a line from 4 to `end` within 100 updates."""
    curve = tuple((u, 4 + (end - 4) * u / 100) for u in (0, 25, 50, 75, 100))
    seconds = tuple(u * ms / 1e3 for u, _ in curve)
    return replace(samples.record(label, end, seed), validation=curve, seconds_at=seconds, tokens_per_step=tokens)


def test_the_way_to_the_references_loss_is_interpolated() -> None:
    target = straight("adamw", 3.0)
    run = straight("x", 2.0, ms=20)
    assert stats.crossing(run, 3.3) == pytest.approx((35, 0.7))
    assert stats.crossing(run, 4.5) == (0, 0)
    assert stats.crossing(run, 1.9) is None
    ours, theirs = replace(samples.entry("x", []), finals=(run,)), replace(samples.entry("adamw", []), finals=(target,))
    found = stats.reach(ours, theirs)
    assert (found.tokens.mean, found.seconds.mean) == pytest.approx((0.5, 1.0))
    double = stats.reach(replace(ours, finals=(straight("x", 2.0, tokens=2048),)), theirs)
    assert (double.tokens.mean, double.seconds.mean) == pytest.approx((1.0, 0.5))
    back = stats.reach(theirs, ours)
    assert (back.reached, back.seeds) == (0, 1)
    assert words.reached(back) == ("not reached", "not reached")
    itself = stats.reach(theirs, theirs)
    assert (itself.tokens.mean, itself.seconds.mean) == (1, 1)


def test_a_diverged_run_reaches_nothing_and_is_not_counted() -> None:
    theirs = samples.entry("adamw", [2.0, 2.0, math.nan])
    found = stats.reach(samples.entry("x", [1.9, math.nan, 1.9]), theirs)
    assert (found.reached, found.seeds) == (1, 1)


ADAM = {"kind": "adam", "beta1": 0.9}


@pytest.mark.parametrize(
    ("label", "spec", "is_found"),
    [
        ("AdamW", {}, True),
        ("mine", {"name": "adamw"}, True),
        ("mine", {"optimizer": "torch.optim.AdamW"}, True),
        ("mine", {"pipelines": {"all": {"complement": "adam"}}}, False),
        (
            "mine",
            {"pipelines": {"all": {"complement": ADAM}, "b": {"complement": [ADAM], "selector": {"kind": "none"}, "finish": []}}},
            True,
        ),
        ("mine", {"pipelines": {"all": {"complement": ADAM}, "b": {"complement": {"kind": "muon"}}}}, False),
        ("mine", {"pipelines": {"all": {"complement": ADAM, "finish": [{"kind": "scale"}]}}}, False),
        ("mine", {"pipelines": {"all": {"complement": ADAM, "selector": {"kind": "svd"}, "inside": ADAM}}}, False),
        ("dct-adamw", {"name": "dct-adamw"}, False),
    ],
)
def test_the_reference_is_adamw(label: str, spec: dict[str, Any], is_found: bool) -> None:
    one = samples.entry(label, [2.0], spec=spec or {"name": "x"}, kind="muon")
    other = samples.entry("other", [2.0], kind="muon")
    found = stats.find_reference(samples.study(other, one))
    assert (found is one) == is_found
    named = samples.entry("adamw", [2.0])
    assert stats.find_reference(samples.study(one, named)) is (one if label == "AdamW" else named)


def test_costs_are_medians_and_the_worst_of_all_seeds() -> None:
    runs = [samples.record("x", 2.0, seed, ms=ms) for seed, ms in enumerate((10, 20, 60))]
    found = stats.costs(replace(samples.entry("x", []), finals=tuple(runs)))
    assert found is not None
    assert (found.step_median, found.step_worst, found.optimizer_median) == pytest.approx((20, 150, 4))
    assert found.share == pytest.approx(0.2)
    assert stats.costs(samples.entry("x", [])) is None


def test_the_front_has_no_point_that_another_beats() -> None:
    points = [(3, 1.0), (1, 3.0), (2, 2.0), (2, 2.5), (4, 1.0), (2.5, 2.0), (math.nan, 0.0)]
    assert stats.pareto_front(points) == [1, 2, 0]


# ------------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (stats.Estimate(1.8912, 0.0123, 3), "1.891 ± 0.012"),
        (stats.Estimate(1.8912, 0.00012, 3), "1.8912 ± 0.0001"),
        (stats.Estimate(1.8912, math.nan, 1), "1.891"),
        (stats.Estimate(-0.0001, 0.1, 2), "0.000 ± 0.100"),
        (stats.Estimate(-0.25, 0.1, 2), "−0.250 ± 0.100"),
        (stats.Estimate(math.nan, math.nan, 0), "-"),
    ],
)
def test_numbers_have_as_many_digits_as_their_interval(value: stats.Estimate, text: str) -> None:
    assert words.plus_minus(value) == text


def test_the_verdict_names_lead_savings_and_costs() -> None:
    study = samples.usual()
    text = " ".join(words.verdict(study, stats.summarize(study)))
    assert text.startswith("cosmos has the lowest final validation loss: 1.891 ± 0.013 nats per token, mean over 3 seeds")
    assert "It is below muon in 3 of 3 seeds, by 0.076 ± 0.009. It is below adamw in 3 of 3 seeds, by 0.246 ± 0.005." in text
    assert "cosmos reaches adamw's final loss after 0.38 ± 0.00 of adamw's tokens and 0.52 ± 0.00 of its training time." in text
    assert "Its state takes 0.37 of adamw's bytes, and its median step 1.37 of adamw's time." in text
    assert words.warnings(study, stats.summarize(study)) == []


def test_what_limits_the_verdict_is_said() -> None:
    def said(study: Study) -> str:
        return " ".join(words.warnings(study, stats.summarize(study)))

    crowded, troubled = said(samples.crowded()), said(samples.troubled())
    assert "soap: the best lr is at the edge of the values tried" in crowded
    assert "trion diverged in 1 of 3 seeds (seed 1); its mean covers the others." in crowded
    assert 'These seeds do not separate trion from <b>&"bold"</b>.' in crowded
    assert "lost has no final run: every run of its sweep diverged." in troubled
    assert "all diverged diverged in 3 of 3 seeds (seeds 0, 1 and 2); it has no mean." in troubled
    assert "No AdamW in this study" in troubled
    assert "One seed: differences have no interval" in said(samples.study(samples.entry("a", [1.0]), samples.entry("b", [2.0])))


def test_a_best_adamw_is_said() -> None:
    study = samples.study(samples.entry("adamw", [1.0, 1.1]), samples.entry("x", [2.0, 2.1], kind="muon"))
    assert words.verdict(study, stats.summarize(study))[-1] == "No optimizer of this study ends below adamw, the reference."


def test_a_row_shows_part_of_the_seeds() -> None:
    study = samples.study(samples.entry("adamw", [2.0, 2.0]), samples.entry("x", [1.9, 2.1], kind="muon"))
    rows = {line.entry.label: table.row(line, has_reference=True) for line in stats.summarize(study)}
    assert (rows["x"].reached_seeds, rows["adamw"].reached_seeds) == ("in 1 of 2", "")
    assert (rows["adamw"].to_reference, rows["adamw"].tokens) == ("reference", "1")


def test_the_protocol_says_how_the_sweep_was_made() -> None:
    text = " ".join(protocol.method(samples.usual()))
    assert "tunes lr of each optimizer in the same way: runs of 120 updates with seed 0" in text
    assert "It tried 5 values a field, in 25 runs." in text
    assert "No final run has a seed of the sweep" not in text
    apart = replace(samples.usual(), seeds=(1, 2, 3))
    assert "No final run has a seed of the sweep." in " ".join(protocol.method(apart))
    assert "Not tuned: untuned." in " ".join(protocol.method(samples.troubled()))


# ---------------------------------------------------------------------------------------------------------------- pictures


def test_labels_in_the_pareto_picture_do_not_overlap() -> None:
    inside, size = (0.0, 0.0, 400.0, 300.0), (80.0, 14.0)
    centres = [(200.0 + 9 * n, 150.0 + 5 * (n % 3)) for n in range(8)]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    for centre in centres:
        taken.append(pareto.place(centre, size, taken, inside))
    labels = taken[len(centres) :]
    assert all(pareto._overlap(a, b) == 0 for a, b in combinations(labels, 2))
    assert all(pareto._overlap(label, marker) == 0 for label in labels for marker in taken[: len(centres)])
    assert all(pareto._outside(label, inside) == 0 for label in labels)


def test_a_sweep_of_two_fields_is_seen_along_each() -> None:
    two = next(entry for entry in samples.troubled().entries if entry.label == "two")
    assert sweeps.swept_fields(two) == ["lr", "rank"]
    found = sweeps.tried_values(two, "rank")
    assert found.values == [16, 32, 64]
    assert found.best_loss == pytest.approx([2.316, 2.3, 2.332])
    assert len(found.runs) == 9


def test_pictures_take_their_colours_from_the_page() -> None:
    def picture() -> str:
        return svg.render("x", lambda axes: axes.plot([0, 1], [0, 1], color=svg.series(8)), width=100, height=80, description='<"&')

    text = picture()
    assert picture() == text
    assert text.startswith('<svg class="picture" role="img" aria-label="&lt;&quot;&amp;" viewBox="0 0 100 80"')
    assert "var(--series-1)" in text
    assert "var(--ink)" in text
    assert not re.search(r"#[0-9a-fA-F]{6}\b", text), "a fixed colour is wrong in light or dark"
    assert "matplotlib.pyplot" not in sys.modules


def test_specs_are_split_into_a_shared_part_and_the_rest() -> None:
    def spec(name: str, inside: str) -> dict[str, Any]:
        matrix = {"selector": {"kind": "svd", "rank": 8}, "inside": {"kind": inside}}
        return {"version": 1, "name": name, "about": "prose", "pipelines": {"m": matrix, "o": {"complement": {"kind": "adam"}}},
                "routes": [{"use": "m", "min_dims": 2}, {"use": "o"}]}  # fmt: skip

    shared, texts = specs.spec_texts([samples.entry(k, [1.0], spec=spec(k, k)) for k in ("adam", "soap")])
    assert "selector: {kind: svd, rank: 8}" in shared
    assert "complement: adam" in shared
    assert "prose" not in shared
    assert [text.rest for text in texts] == [f"name: {k}\npipelines:\n  m: {{inside: {k}}}\n" for k in ("adam", "soap")]
    assert "selector" in texts[0].whole


# -------------------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """The tags and texts of a page; raises on tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]


STUDIES: dict[str, Callable[[], Study]] = {"crowded": samples.crowded, "troubled": samples.troubled, "usual": samples.usual}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return {name: write_report(make(), tmp_path_factory.mktemp(name) / "new") for name, make in STUDIES.items()}


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_stands_alone(name: str, reports: dict[str, dict[str, Path]]) -> None:
    text = reports[name]["report.html"].read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids()) == len(set(page.ids()))
    assert not {"script", "link", "img", "iframe", "b"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for key in ("href", "xlink:href", "src"):
            assert str(attributes.get(key, "#")).startswith("#"), "the page loads nothing"
        for target in re.findall(r"url\(#([^)]+)\)|^#(.+)", str(attributes.get("clip-path") or attributes.get("href") or "")):
            assert "".join(target) in page.ids()
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))


def test_the_page_has_every_section(reports: dict[str, dict[str, Path]]) -> None:
    page = Page(reports["usual"]["report.html"].read_text(encoding="utf-8"))
    wanted = ["table", "loss", "pareto", "sweeps", "energy", "specs", "protocol"]
    assert [name for name in page.ids() if name in wanted] == wanted
    for said in (
        "It is below muon in 3 of 3 seeds, by 0.076\u00a0±\u00a00.009",
        "On the front, from the cheapest on: galore, muon, cosmos.",
        "0.42 ± 0.00",
        "subspace-opt compare cosmos muon adamw",
        "a CPU with 2 cores",
        "2.13.0",
        "four old novels, 2.9 MB",
        "above in 3 of 3",
    ):
        assert said in page.text
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and attributes.get("class") == "picture"]
    assert len(pictures) == 3 + 2 + 5 + 1


def test_labels_with_special_characters_are_shown_as_written(reports: dict[str, dict[str, Path]]) -> None:
    page = Page(reports["crowded"]["report.html"].read_text(encoding="utf-8"))
    for said in ('<b>&"bold"</b>', LONG, "Ten optimizers <and> one & problem", "1 diverged", "at the edge", "lr, best at the edge"):
        assert said in page.text
    assert "diverged: the loss is nan at update 250" not in page.text


def test_trouble_is_on_the_page(reports: dict[str, dict[str, Path]]) -> None:
    page = Page(reports["troubled"]["report.html"].read_text(encoding="utf-8"))
    assert "diverged: the loss is nan at update 250" in page.text
    assert "shown as stored, because this installation cannot read it" in page.text
    assert "final loss, relative" not in page.text
    assert "To adamw" not in page.text


@pytest.mark.parametrize("name", STUDIES)
def test_the_numbers_are_also_csv_and_json(name: str, reports: dict[str, dict[str, Path]]) -> None:
    study = STUDIES[name]()
    rows = list(csv.DictReader(io.StringIO(reports[name]["results.csv"].read_text(encoding="utf-8"))))
    records = [record for entry in study.entries for record in (*entry.tried, *entry.finals)]
    assert [(row["label"], row["stage"], int(row["seed"])) for row in rows] == [(r.label, r.stage, r.seed) for r in records]
    assert [row["loss"] for row in rows] == [str(r.loss) if math.isfinite(r.loss) else "" for r in records]
    found = json.loads(reports[name]["results.json"].read_text(encoding="utf-8"))
    count = len(study.entries)
    assert len(found["pairs"]) == count * (count - 1) // 2
    assert found["optimizers"][0]["label"] == stats.summarize(study)[0].entry.label
    assert len(found["runs"]) == len(records)


def test_a_report_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match="no optimizers"):
        write_report(samples.study(), tmp_path)
    (tmp_path / "file").write_text("")
    small = samples.study(samples.Entry("a", {"name": "a"}, {}, (), ()))  # no pictures
    assert "There are no final runs." in write_report(small, tmp_path / "empty")["report.html"].read_text(encoding="utf-8")
    with pytest.raises(LabError, match="cannot be written"):
        write_report(small, tmp_path / "file" / "folder")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(LabError, match=r"jinja2 is not installed. Run: pip install 'subspace-opt\[lab\]'"):
        write_report(small, tmp_path)


# ----------------------------------------------------------------------------------------------------------------- console


def shown(study: Study, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for part in summary(study):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    return str(text)


@pytest.mark.parametrize(
    ("width", "there", "missing"),
    [
        (80, ["final loss", "tokens", "state"], ["tuned", "seconds ", "worst"]),
        (120, ["tuned", "seconds"], ["worst"]),
        (200, ["tuned", "seconds", "to adamw", "95 %", "worst"], []),
    ],
)
def test_the_console_shows_what_fits(width: int, there: list[str], missing: list[str]) -> None:
    text = shown(samples.usual(), width)
    head = text.splitlines()[0]
    assert all(word in head for word in there)
    assert not any(word in head for word in missing)
    assert "  cosmos below muon in 3 of 3 seeds, by 0.076 ± 0.009\n" in text


@pytest.mark.parametrize("name", ["crowded", "troubled"])
def test_every_optimizer_has_a_row_on_a_narrow_console(name: str) -> None:
    study = STUDIES[name]()
    lines = shown(study, 80).splitlines()
    for number, line in enumerate(stats.summarize(study)):
        assert lines[1 + number].startswith(words.shorten(line.entry.label, 16))
    assert any(line.startswith("note: ") for line in lines)
