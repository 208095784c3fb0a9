"""The space of a search: for each place of the pipeline the parts that it may hold, and the candidates that they form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ... import SpecError, load_spec
from ..errors import LabError
from ..study.plan import Candidate

PLACES = ("momentum", "selector", "inside", "complement", "mix", "finish", "apply")
NAMED = ("selector", "inside", "complement", "apply")  # places whose parts make up a candidate's name, if they have a choice
LR, WEIGHT_DECAY = 2e-3, 0.1  # of candidates before the search; the finish brings all updates to one size, so one rate suits all at first
OTHER = {"complement": {"kind": "adam", "beta1": 0.95, "beta2": 0.95}}


@dataclass(frozen=True)
class Space:
    """Parts by place."""

    parts: dict[str, tuple[Any, ...]]

    @classmethod
    def load(cls, path: Path | None = None) -> Space:
        """Read a space from a YAML file; without one, the space of this package.

        Raises:
            LabError: the file cannot be read, or is not a mapping of places to lists of parts.
        """
        name = str(path or "space.yaml")
        try:
            text = (path or files(__package__).joinpath("space.yaml")).read_text(encoding="utf-8")
            data = YAML(typ="safe").load(text)
        except (OSError, UnicodeDecodeError, YAMLError) as error:
            raise LabError(f"--space {name}: this file cannot be read: {str(error).partition(chr(10))[0]}") from error
        if not isinstance(data, dict) or not all(isinstance(value, list) and value for value in data.values()):
            raise LabError(f"--space {name}: give a mapping of places to lists of parts, such as `complement: [muon, sign]`")
        if unknown := sorted(set(data) - set(PLACES)):
            raise LabError(f"--space {name}: {unknown[0]} is no place. Places: {', '.join(PLACES)}")
        return cls({place: tuple(parts) for place, parts in data.items()})

    def candidates(self) -> list[Candidate]:
        """Every combination that is a valid spec, each once, by name.

        Raises:
            LabError: no combination is valid; the message has the first reason.
        """
        found: dict[str, Candidate] = {}
        reasons = []
        for chosen in product(*(self.parts.get(place, (None,)) for place in PLACES)):
            pipeline = _pipeline(dict(zip(PLACES, chosen, strict=True)))
            name = self._name(pipeline)
            try:
                candidate = Candidate(label=name, spec=_spec(name, pipeline))
                candidate.loaded()
            except SpecError as error:
                reasons.append(str(error))
            else:
                found.setdefault(name, candidate)
        if not found:
            raise LabError(f"search: no combination of the space is a valid spec. The first reason: {reasons[0]}")
        return list(found.values())

    def _name(self, pipeline: Mapping[str, Any]) -> str:
        """Such as eigen25-soap-muon-cautious: a part for each place that has a choice, and what tells it from others of its kind."""
        words = ["whole"] if "selector" not in pipeline and len(self.parts.get("selector", ())) > 1 else []
        for place in NAMED:
            part = pipeline.get(place)
            if part is not None and len(self.parts.get(place, ())) > 1:
                alike = [other for other in self.parts[place] if _kind(other) == _kind(part)]
                words.append(_kind(part) + (_difference(part, alike) if len(alike) > 1 else ""))
        return "-".join(words) or "candidate"


def _pipeline(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen parts without those that the pipeline does not use: `inside` and `mix` need a subspace."""
    whole = chosen["selector"] in (None, "none")
    unused = {"selector", "inside", "mix"} if whole else set()
    return {place: part for place, part in chosen.items() if part is not None and place not in unused}


def _spec(name: str, pipeline: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    return load_spec({"name": name, "defaults": defaults, "pipelines": {"matrix": dict(pipeline), "other": OTHER}}).model_dump(mode="json")


def _kind(part: Any) -> str:
    first = part[0] if isinstance(part, list) and part else part
    return str(first.get("kind", "")) if isinstance(first, Mapping) else str(first)


def _difference(part: Any, alike: Sequence[Any]) -> str:
    """The rank in percent, if the parts differ in it; else the number of the part."""
    ranks = [other.get("rank") for other in alike if isinstance(other, Mapping)]
    if isinstance(part, Mapping) and len(set(map(str, ranks))) == len(alike):
        rank = part["rank"]
        return f"{100 * rank:g}" if isinstance(rank, float) else str(rank)
    return f"_{list(alike).index(part) + 1}"
