"""Is the picture of a pipeline well-formed, complete and within its frame?"""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from common import PRESETS

from subspace_opt import load_spec
from subspace_opt.algebra.pipeline import Pipeline
from subspace_opt.algebra.shaped import Shaped
from subspace_opt.registry import kind_of
from subspace_opt.spec.picture import LARGE, WIDTH, is_whole, pipeline_svg


def drawn(pipeline: Pipeline, name: str = "a <b>") -> ET.Element:
    return ET.fromstring(pipeline_svg(pipeline, name))


def pipelines(preset: str) -> list[Pipeline]:
    return list(load_spec(preset).pipelines.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_kind_is_named(preset: str) -> None:
    for pipeline in pipelines(preset):
        words = " ".join(text.text or "" for text in drawn(pipeline).iter("text")).split()
        used = [rule for place in ("momentum", "inside", "finish", "apply") for rule in getattr(pipeline, place)]
        shaped = Shaped.of(pipeline, LARGE, LARGE)
        used += pipeline.complement if not shaped.opens or (shaped.has_complement and not is_whole(shaped)) else ()
        used += [pipeline.selector] if shaped.opens else []
        assert [kind for part in used if (kind := kind_of(type(part))) not in [w.strip(",:\N{HORIZONTAL ELLIPSIS}") for w in words]] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_boxes_lie_within_the_picture_and_apart(preset: str) -> None:
    for pipeline in pipelines(preset):
        picture = drawn(pipeline)
        height = float(picture.attrib["viewBox"].split()[3])
        boxes = [tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height")) for box in picture.iter("rect")]
        for i, (x, y, width, tall) in enumerate(boxes):
            assert x >= 0
            assert x + width <= WIDTH
            assert y + tall <= height
            assert all(x + width <= a or a + w <= x or y + tall <= b or b + h <= y for a, b, w, h in boxes[i + 1 :])


def test_a_part_whose_weight_grows_from_0_is_drawn() -> None:
    grows = {"matrix.mix.complement": {"schedule": "linear", "from": 0.0, "to": 0.2, "over": 10}}
    words = [text.text for text in drawn(load_spec("cosmos", grows).pipelines["matrix"]).iter("text")]
    assert "muon" in words
    assert "left out" not in words


def test_names_are_escaped_and_no_line_is_blank() -> None:
    (pipeline, *_) = pipelines("cosmos")
    assert (title := drawn(pipeline).find("title")) is not None
    assert title.text == "a <b>: from gradient to weight"
    assert all(pipeline_svg(pipeline).split("\n"))  # markdown ends an HTML block at a blank line
