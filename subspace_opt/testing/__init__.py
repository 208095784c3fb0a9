"""A conformance kit for authors of components and specs.

In: a rule, a selector, a weight rule or a spec. Out: checks. A check passes, or raises a `ConformanceError` with a remedy. The folder
`trajectories` holds trajectories of authors' code; it needs numpy.

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

from ..algebra import Selector
from ..registry import Component
from ..spec import Spec, load_spec
from . import contract, trial
from .probe import ConformanceError
from .subject import Subject, Testable, UnknownComponentError, subjects

__all__ = ["Check", "ConformanceError", "Subject", "UnknownComponentError", "checks", "spec_checks", "subjects"]


@dataclass(frozen=True)
class Check:
    """One question about one component or spec. A call returns None or raises `ConformanceError`."""

    subject: str
    question: str
    asks: str
    ask: Callable[[], None]

    def __call__(self) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the matrices are too small to gain from threads
        try:
            self.ask()
        except ConformanceError as error:
            raise ConformanceError(f"{self.subject}, {self.question}: {error}") from error.__cause__
        finally:
            torch.set_num_threads(threads)

    def __str__(self) -> str:
        return f"{self.subject}-{self.question}"


def checks(asked: str | type[Component] | Testable) -> list[Check]:
    """All checks of a component. It is given as a class, an instance, or the text of `--component` (see `subjects`).

    Raises:
        UnknownComponentError: no component has that name, or the component cannot be built.
    """
    found = []
    for subject in subjects(asked):
        exam = contract.Examination(subject)
        for name, question in contract.QUESTIONS.items():
            if name != "basis" or isinstance(subject.component, Selector):
                found.append(_check(subject.label, name, question, exam))
    return found


def spec_checks(source: Spec | Mapping[str, Any] | str | os.PathLike[str]) -> list[Check]:
    """All checks of a spec. It is given as a preset's name, a file, a mapping or a `Spec`.

    Raises:
        SpecError: the spec is invalid.
    """
    spec = load_spec(source)
    label = source if isinstance(source, str) else Path(source).name if isinstance(source, os.PathLike) else spec.name
    tried = trial.of_spec(spec)
    return [_check(label, name, question, tried) for name, question in trial.QUESTIONS.items()]


def _check(label: str, name: str, question: Callable[[Any], None], of: Any) -> Check:
    return Check(label, name, (question.__doc__ or "").strip(), lambda: question(of))
