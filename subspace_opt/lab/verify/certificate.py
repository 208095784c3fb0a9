"""The result of a trial: the difference of each parameter, the bytes of each rank, and the verdicts drawn from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LabError
from .trial import Trial

# The largest difference, relative to the distance that the parameter has moved. float64: round-off, amplified at most by a discontinuous
# rule. bfloat16: neighbouring numbers are 1/256 apart, and 20 steps move a weight by only a few such gaps.
TOLERANCES = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 0.25}


class CertificateError(LabError):
    """A rank failed, was killed, or did not end in time."""


@dataclass(frozen=True)
class Difference:
    """The difference of one parameter between one process and all ranks."""

    name: str
    largest: float
    way: float  # the largest distance that an entry has moved since the start

    @property
    def part(self) -> float:
        """`largest` relative to `way`; infinite if the parameter differs and has not moved."""
        return 0.0 if self.largest == 0 else self.largest / self.way if self.way else math.inf


@dataclass(frozen=True)
class RankBytes:
    """Bytes that one rank held at the end and sent in a step, beside the bytes that the plan expects.

    The first step refreshes every basis; a later step refreshes some of them or none. Later steps send fewer bytes if a rank sends only
    coordinates between refreshes.
    """

    rank: int
    held: int
    planned: int
    sent_first: int
    sent_least: int
    sent_most: int
    expected_first: int
    expected: int  # in a step without a refresh
    agreed: int  # handed to all-reduces, in the step with the most

    @property
    def holds(self) -> bool:
        """True if all bytes are as planned; later steps must send between `expected` and `expected_first`."""
        later = sorted((self.expected, self.expected_first))
        between = later[0] <= self.sent_least <= self.sent_most <= later[1]
        return self.held == self.planned and self.sent_first == self.expected_first and between


@dataclass(frozen=True)
class Certificate:
    """The outcome of a trial."""

    trial: Trial
    spec_name: str
    device: str
    parameters: int
    full: tuple[str, ...]  # parameters with the full rank: they have no residual, so the trial does not test their complement
    one_process_bytes: int
    tolerance: float
    differences: tuple[Difference, ...]
    ranks: tuple[RankBytes, ...]

    @property
    def largest(self) -> Difference:
        """The difference with the largest `part`."""
        return max(self.differences, key=lambda each: each.part)

    @property
    def weights_hold(self) -> bool:
        """True if every parameter is within the tolerance."""
        return all(each.part <= self.tolerance for each in self.differences)

    @property
    def bytes_hold(self) -> bool:
        """True if the bytes of every rank are as planned."""
        return all(rank.holds for rank in self.ranks)

    @property
    def holds(self) -> bool:
        """True if weights and bytes hold."""
        return self.weights_hold and self.bytes_hold

    def to_dict(self) -> dict[str, Any]:
        """All fields and verdicts, ready for JSON."""
        return {
            **asdict(self),
            "differences": [{**asdict(each), "part": each.part} for each in self.differences],
            "weights_hold": self.weights_hold,
            "bytes_hold": self.bytes_hold,
            "holds": self.holds,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Certificate:
        """The certificate that `to_dict` has written."""
        shape = data["trial"]["shape"]
        trial = Trial(**{**data["trial"], "shape": shape and tuple(shape), "plugins": tuple(data["trial"]["plugins"])})
        differences = tuple(Difference(each["name"], each["largest"], each["way"]) for each in data["differences"])
        fields = {key: data[key] for key in ("spec_name", "device", "parameters", "one_process_bytes", "tolerance")}
        fields["full"] = tuple(data["full"])
        return Certificate(trial=trial, differences=differences, ranks=tuple(RankBytes(**each) for each in data["ranks"]), **fields)
