"""Write the skeleton of a plugin package. The skeleton passes its own conformance tests."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Literal, get_args

from .. import __all__ as public_names
from .. import __version__
from ..registry import RegistryError, find, owner
from ..spec import presets

Kind = Literal["selector", "rule", "weight_rule", "preset"]

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
TAKEN = {*public_names, "Field", "Literal", "Order", "Tensor"}  # names that the generated modules import


class ScaffoldError(RegistryError):
    """A plugin cannot be created under this name or in this folder. Nothing was written."""


def new_plugin(name: str, directory: str | Path = ".", kind: Kind = "selector") -> Path:
    """Write the package `subspace-opt-NAME` into a directory and return its folder.

    The package has a working component or preset, a spec that uses it, tests that run the conformance kit, and a README.

    Raises:
        ScaffoldError: the name is invalid or in use, or the folder exists.
    """
    word = name.removeprefix("subspace-opt-")
    if kind not in get_args(Kind):
        raise ScaffoldError(f"a plugin must be one of {', '.join(get_args(Kind))}, not '{kind}'")
    if not NAME.fullmatch(word) or keyword.iskeyword(word):
        raise ScaffoldError(f"'{name[:80]}' is not a valid name: use lower-case letters, digits and single hyphens, such as top-peaks")
    if _class_name(word) in TAKEN:
        raise ScaffoldError(f"the class name '{_class_name(word)}' is used by the library; choose another name")
    _check_free(word, kind)
    folder = Path(directory) / f"subspace-opt-{word.replace('_', '-')}"
    if folder.exists():
        raise ScaffoldError(f"the folder '{folder}' exists; remove it, or choose another name")
    for path, text in _files(word, kind).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def _class_name(word: str) -> str:
    return "".join(part.capitalize() for part in re.split("[-_]", word))


def _check_free(word: str, kind: Kind) -> None:
    if kind == "preset":
        if (taken := presets.find(word)) is not None:
            raise ScaffoldError(f"the preset '{word}' exists: {taken.file}; choose another name")
    elif (cls := find(kind, word.replace("-", "_"))) is not None:
        raise ScaffoldError(f"the {kind} '{word.replace('-', '_')}' exists: {owner(cls)}; choose another name")


def _files(word: str, kind: Kind) -> dict[str, str]:
    """The text of each file, by its path in the package."""
    snake, dashed = word.replace("-", "_"), word.replace("_", "-")
    words = {
        "PACKAGE": f"subspace_opt_{snake}",
        "PROJECT": f"subspace-opt-{dashed}",
        "CLASS": _class_name(word),
        "KIND": snake,
        "PRESET": word,
        "FAMILY": kind,
        "NOUN": kind.replace("_", " "),
        "VERSION": ".".join(__version__.split(".")[:2]),
        "GROUP": presets.GROUP if kind == "preset" else "subspace_opt.plugins",
        "USE": USES[kind],
    }
    files = {
        "pyproject.toml": PYPROJECT,
        "README.md": README[kind],
        "src/@PACKAGE@/__init__.py": SOURCES[kind],
        "tests/test_@KIND@.py": TESTS[kind],
        "src/@PACKAGE@/@PRESET@.yaml" if kind == "preset" else "example.yaml": EXAMPLE if kind != "preset" else PRESET,
    }
    return {_filled(path, words): _filled(text, words) for path, text in files.items()}


def _filled(text: str, words: dict[str, str]) -> str:
    for _ in range(2):  # a replacement may contain another mark
        for name, word in words.items():
            text = text.replace(f"@{name}@", word)
    return text


# -------------------------------------------------------------------------------------------------------------- templates

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "@PROJECT@"
version = "0.1.0"
description = "A @NOUN@ for subspace_opt."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["subspace-opt>=@VERSION@"]

[project.optional-dependencies]
test = ["pytest>=8"]

# This entry point registers the plugin.
[project.entry-points."@GROUP@"]
@KIND@ = "@PACKAGE@"

[tool.hatch.build.targets.wheel]
packages = ["src/@PACKAGE@"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

SOURCES: dict[Kind, str] = {
    "selector": '''\
"""The selector `@KIND@`."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from subspace_opt import Basis, Dim, LowRank, Slot, State, Step, register
from subspace_opt.algebra import Order
from torch import Tensor


@register
class @CLASS@(LowRank):
    """The `rank` columns with the largest norm `|X|_p`, as a basis of r indices (name your source here)."""

    kind: Literal["@KIND@"] = "@KIND@"
    power: float = Field(4.0, ge=1.0, description="The p of the norm. A larger p gives single large entries more weight.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"index": Slot((self.coords(rows, cols)[1],), dtype=torch.int64)}  # (B, r)

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["index"])  # integers pick columns; a float (B, n, r) holds orthonormal columns

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        size = torch.linalg.vector_norm(x, ord=self.power, dim=-2)  # (B, n)
        # Ascending order: a column that stays selected keeps about the same position.
        return {"index": size.topk(state["index"].size(-1)).indices.sort().values}, None
''',
    "rule": '''\
"""The rule `@KIND@`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from subspace_opt import Dim, Rule, Slot, State, Step, Transport, register
from torch import Tensor


@register
class @CLASS@(Rule):
    """`M <- beta M + (1 - beta) X; M min(1, limit / rms(M))` (name your source here)."""

    kind: Literal["@KIND@"] = "@KIND@"
    beta: float = Field(0.9, ge=0.0, lt=1.0, description="Fraction of the average that is kept at each update.")
    limit: float = Field(1.0, gt=0.0, description="Upper bound of the root mean square of the result.")
    on_refresh: Transport = Field("keep", description="How the average changes at a refresh: keep, reset or project.")

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"exp_avg": Slot((rows, cols), self.on_refresh)}

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        m = state["exp_avg"].lerp(x, 1 - self.beta)  # (B, m, n)
        rms = m.square().mean((-2, -1), keepdim=True).sqrt()
        return m * (self.limit / rms.clamp_min(self.limit)), {"exp_avg": m}
''',
    "weight_rule": '''\
"""The weight rule `@KIND@`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from subspace_opt import State, Step, WeightRule, register
from torch import Tensor


@register
class @CLASS@(WeightRule):
    """`W' = clamp(W - lr U, -bound, bound)` (name your source here)."""

    kind: Literal["@KIND@"] = "@KIND@"
    bound: float = Field(1.0, gt=0.0, description="Largest magnitude of an entry of the weight.")

    def landed(self, after: Tensor, before: Tensor, state: State, step: Step) -> Tensor:
        return after.clamp(-self.bound, self.bound)  # (B, m, n)
''',
    "preset": '''\
"""Presets for subspace_opt: each .yaml file beside this module is a preset with the name of the file."""
''',
}

USES: dict[Kind, str] = {
    "selector": "    selector: {kind: @KIND@, rank: 32, every: 100}\n    inside: adam",
    "rule": "    selector: {kind: svd, rank: 32, every: 100}\n    inside: {kind: @KIND@}\n    complement: {kind: @KIND@}",
    "weight_rule": "    complement: adam\n    apply: {kind: @KIND@}",
    "preset": "",
}

EXAMPLE = """\
# The name `@KIND@` alone loads the plugin.
version: 1
name: @KIND@-example
defaults: {lr: 1.0e-3, weight_decay: 0.0}
pipelines:
  matrix:
    orient: short
@USE@
"""

PRESET = """\
version: 1
name: @PRESET@
source: [name your source here]
notes: Adam in the leading singular directions of the gradient. The rest of the gradient is dropped.
defaults: {lr: 1.0e-3, weight_decay: 0.0}
pipelines:
  matrix:
    orient:   short
    selector: {kind: svd, rank: 128, every: 200}
    inside:   {kind: adam, beta1: 0.9, beta2: 0.999}
  other:
    complement: {kind: adam, beta1: 0.9, beta2: 0.999}
routes:
  - {role: [hidden, fused, conv], use: matrix}
  - {use: other}
"""

_COMPONENT_TESTS = '''\
"""The @NOUN@ passes the conformance kit, and specs find it by its name."""

from pathlib import Path

import pytest
from subspace_opt.registry import find
from subspace_opt.testing import Check, checks, spec_checks

from @PACKAGE@ import @CLASS@

EXAMPLE = Path(__file__).parent.parent / "example.yaml"


@pytest.mark.parametrize("check", checks(@CLASS@), ids=str)
def test_the_@FAMILY@_conforms(check: Check) -> None:
    check()


@pytest.mark.parametrize("check", spec_checks(EXAMPLE), ids=str)
def test_the_example_conforms(check: Check) -> None:
    check()


def test_the_kind_is_found_by_its_name() -> None:
    assert find("@FAMILY@", "@KIND@") is @CLASS@
'''

TESTS: dict[Kind, str] = {
    "selector": _COMPONENT_TESTS,
    "rule": _COMPONENT_TESTS,
    "weight_rule": _COMPONENT_TESTS,
    "preset": '''\
"""The preset is found by its name and passes the conformance kit."""

import pytest
from subspace_opt import load_spec
from subspace_opt.testing import Check, spec_checks


def test_the_preset_is_found_by_its_name() -> None:
    assert load_spec("@PRESET@").name == "@PRESET@"


@pytest.mark.parametrize("check", spec_checks("@PRESET@"), ids=str)
def test_the_preset_conforms(check: Check) -> None:
    check()
''',
}

_COMPONENT_README = """\
# @PROJECT@

A @NOUN@ for `subspace_opt`.

```yaml
@USE@
```

`example.yaml` is a complete spec that uses it: `build("example.yaml", model)`.

## Work on it

```console
$ pip install -e '.[test]'
$ pytest                                                          # the conformance kit and your own tests
$ pytest --pyargs subspace_opt.testing --component @KIND@         # the kit alone
$ subspace-opt list                                               # lists it
```
"""

README: dict[Kind, str] = {
    "selector": _COMPONENT_README,
    "rule": _COMPONENT_README,
    "weight_rule": _COMPONENT_README,
    "preset": """\
# @PROJECT@

Presets for `subspace_opt`: each YAML file beside `src/@PACKAGE@/__init__.py` is a preset with the name of the file.

## Work on it

```console
$ pip install -e '.[test]'
$ pytest                                                          # the conformance kit and your own tests
$ pytest --pyargs subspace_opt.testing --spec @PRESET@            # the kit alone
$ subspace-opt show @PRESET@
```
""",
}
