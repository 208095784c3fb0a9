"""A conformance kit for authors of components and specs.

In: a rule, a selector or a spec. Out: checks, each of which passes or raises a `ConformanceError` that says what to do. The trajectories of
authors' code are in `trajectories`, which needs numpy.

    pytest --pyargs subspace_opt.testing --component my_pkg:MySelector --spec my.yaml

or, in a package's own tests:

    @pytest.mark.parametrize("check", subspace_opt.testing.checks(MySelector), ids=str)
    def test_contract(check):
        check()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..algebra import Rule, Selector
from ..registry import Component
from ..spec import Spec, load_spec
from . import contract, trial
from .probe import ConformanceError
from .subject import Subject, UnknownComponentError, subjects

__all__ = ["Check", "ConformanceError", "Subject", "UnknownComponentError", "checks", "spec_checks", "subjects"]


@dataclass(frozen=True)
class Check:
    """One question to one component or spec; called, it returns or raises `ConformanceError`."""

    subject: str
    question: str
    asks: str
    ask: Callable[[], None]

    def __call__(self) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
        try:
            self.ask()
        except ConformanceError as error:
            raise ConformanceError(f"{self.subject}, {self.question}: {error}") from error.__cause__
        finally:
            torch.set_num_threads(threads)

    def __str__(self) -> str:
        return f"{self.subject}-{self.question}"


def checks(asked: str | type[Component] | Rule | Selector) -> list[Check]:
    """All questions to a component: a class, an instance, or text as `--component` takes it (see `subjects`).

    Raises:
        UnknownComponentError: nothing is found under that name, or it cannot be made.
    """
    found = []
    for subject in subjects(asked):
        exam = contract.Examination(subject)
        for name, question in contract.QUESTIONS.items():
            if name != "basis" or isinstance(subject.component, Selector):
                found.append(_check(subject.label, name, question, exam))
    return found


def spec_checks(source: Spec | Mapping[str, Any] | str | os.PathLike[str]) -> list[Check]:
    """All questions to a spec: a preset's name, a file, a mapping or a `Spec`.

    Raises:
        SpecError: a spec that cannot be used.
    """
    spec = load_spec(source)
    label = source if isinstance(source, str) else Path(source).name if isinstance(source, os.PathLike) else spec.name
    tried = trial.of_spec(spec)
    return [_check(label, name, question, tried) for name, question in trial.QUESTIONS.items()]


def _check(label: str, name: str, question: Callable[[Any], None], of: Any) -> Check:
    return Check(label, name, (question.__doc__ or "").strip(), lambda: question(of))
