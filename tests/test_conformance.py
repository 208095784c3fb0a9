"""Every built-in kind and preset passes the conformance kit; broken rules and selectors fail it with the right message."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

import subspace_opt
from subspace_opt import Basis, Change, Dim, LowRank, Rule, Selector, Slot, State, Step, WeightRule, load_spec, registry
from subspace_opt.algebra import Order, averaged
from subspace_opt.registry import Component, unregister
from subspace_opt.spec import preset_names
from subspace_opt.testing import Check, ConformanceError, UnknownComponentError, checks, spec_checks, subjects
from subspace_opt.testing.trial import shrunk

ROOT = Path(__file__).parent.parent

# Built-in kinds with options that change their state or their computation.
VARIANTS = [
    'adam={"beta1": 0.0}',
    'adam={"debias": false, "eps_inside": true}',
    'adam={"amsgrad": true}',
    'soap={"amsgrad": true}',
    'ema={"nesterov": true, "debias": true}',
    'heavy_ball={"nesterov": true, "debias": true}',
    'heavy_ball={"state": "int8"}',
    'heavy_ball={"dampening": 0.9}',
    'confine={"mode": "strict"}',
    'decay={"when": "after"}',
    'hyperball={"radius": 2.0}',
    'match_inside={"per": "matrix"}',
    'muon={"method": "svd"}',
    'orthogonalize={"method": "polar_express"}',
    'orthogonalize={"bound": "spectral"}',
    'orthogonalize={"bound": "schatten4", "coefficients": "quintic"}',
    'orthogonalize={"bound": "aol", "coefficients": "aol", "steps": 4}',
    'subset_norm={"subsets": 2, "beta2": 1.0}',
    'subset_norm={"subsets": -1, "reduce": "mean"}',
    'retract={"by": {"kind": "orthogonalize", "method": "svd"}}',
    'retract={"by": "rms_normalize"}',
    'subset_norm={"subsets": "rows", "of": "signal", "reduce": "mean", "eps_floor": true, "keep_norm": true}',
    'subset_norm={"subsets": "columns", "of": "signal", "keep_norm": true, "eps": 0.0}',
    'subset_norm={"subsets": "entries", "of": "signal"}',
    'subset_norm={"subsets": "matrix"}',
    'muon={"norm": "nuclear"}',
    'muon={"norm": "signal"}',
    'factored_norm={"beta2": 0.9}',
    'shampoo={"beta2": 1.0, "every": 2}',
    'shampoo={"max_dim": 5}',
    'scale={"by": "moonshot"}',
    'scale={"by": "spectral", "sides": "weight"}',
    'eigen={"init": "randomized"}',
    'fft={"transform": "fft", "dictionary": "dct3"}',
    'fft={"dictionary": "random"}',
    'fft={"ranking": "l1", "weighted": true}',
    'fft={"transform": "fft", "ranking": "l1", "weighted": true}',
    'kron_eigen={"timing": "before", "sort": false, "debias": true}',
    'kron_eigen={"solver": "eigh", "sides": "short"}',
    'kron_eigen={"covariance": "kl", "timing": "before", "every": 1}',
    'kron_eigen={"covariance": "kl", "sides": "short", "max_dim": 5}',
    'learned={"optimizer": "sgd"}',
    'learned={"optimizer": "lion", "base_lr": 1.0, "lr": 0.05}',
    'power_iteration={"method": "svd"}',
    'random={"draw": "coordinates"}',
    'random={"draw": "gaussian"}',
    'svd={"sides": "both"}',
    'svd={"method": "randomized", "source": "momentum"}',
    'svd={"method": "gram", "source": "weight", "every": null}',
    'svd={"timing": "after", "offset": 1}',
    'top_norm={"rank": 0.5}',
    'top_norm={"ranking": "l1", "every": 1}',
    'orthogonalize={"coefficients": "dion", "margin": 1.02}',
    'orthogonalize={"coefficients": "deepseek", "steps": 10}',
    'subset_norm={"subsets": "rows", "of": "signal", "keep_idle": true}',
]


def _checks() -> list[Check]:
    found = checks("all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load_entry_points", lambda: None)  # `all` has loaded the plugins; each search for them takes 50 ms
        for variant in VARIANTS:
            found += checks(variant)
    return found


@pytest.mark.parametrize("check", _checks(), ids=str)
def test_built_in_kinds_conform(check: Check) -> None:
    check()


@pytest.mark.parametrize("check", [c for name in preset_names() for c in spec_checks(name)], ids=str)
def test_presets_conform(check: Check) -> None:
    check()


# ------------------------------------------------------------------------------------------------------------ broken rules


class _Average(Rule):
    """A moving average. The broken rules below derive from it."""

    kind: Literal["average"] = "average"

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"mean": Slot((rows, cols))}

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        mean = state["mean"].lerp(x, 0.1)
        return mean, {"mean": mean}


class Undeclared(_Average):
    """Returns a key that it does not declare."""

    kind: Literal["undeclared"] = "undeclared"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x, {"mean": state["mean"], "peak": x.abs().amax((-2, -1))}


class Unheard(_Average):
    """Reads a key that it does not declare."""

    kind: Literal["unheard"] = "unheard"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return state["variance"], {"mean": x}


class Withheld(_Average):
    """Does not return the slot that it declares."""

    kind: Literal["withheld"] = "withheld"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x, {}


class Misshapen(_Average):
    """Returns a slot in another shape."""

    kind: Literal["misshapen"] = "misshapen"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x, {"mean": x.mean(-1, keepdim=True)}


class WritesGradient(_Average):
    """Clips the gradient in place."""

    kind: Literal["writes_gradient"] = "writes_gradient"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return grad.clamp_(-0.1, 0.1), {"mean": state["mean"]}


class WritesState(_Average):
    """Updates its average in place."""

    kind: Literal["writes_state"] = "writes_state"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return state["mean"].mul_(0.9).add_(x), state


class Hasty(_Average):
    """Reads its average after it has written over it."""

    kind: Literal["hasty"] = "hasty"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        m = averaged(state["mean"], x, 0.9, step)
        return m - state["mean"], {"mean": m}


class Mixes(_Average):
    """Divides by the largest entry of the whole stack."""

    kind: Literal["mixes"] = "mixes"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x / (x.abs().max() + 1e-8), {"mean": x}


class Draws(_Average):
    """Adds noise from the global generator."""

    kind: Literal["draws"] = "draws"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x + torch.randn_like(x), {"mean": x}


class Remembers(_Average):
    """Counts its updates outside its state."""

    kind: Literal["remembers"] = "remembers"  # type: ignore[assignment]
    calls: ClassVar[list[int]] = []

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        self.calls.append(1)
        return x / len(self.calls), {"mean": x}


class Single(_Average):
    """Computes in single precision for every dtype of the input."""

    kind: Literal["single"] = "single"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x.float(), {"mean": x}


class OnTheCpu(_Average):
    """Creates a tensor without a device."""

    kind: Literal["on_the_cpu"] = "on_the_cpu"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x * torch.arange(1, x.size(-1) + 1), {"mean": x}


class Unguarded(_Average):
    """Divides by a norm that may be 0."""

    kind: Literal["unguarded"] = "unguarded"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x / x.norm(dim=(-2, -1), keepdim=True), {"mean": x}


class Forgets(_Average):
    """Returns an empty state at a refresh."""

    kind: Literal["forgets"] = "forgets"  # type: ignore[assignment]

    def transport(self, state: State, slots: dict[str, Slot], change: Change, step: Step) -> State:
        return {}


class Alone(_Average):
    """Returns the update without a state."""

    kind: Literal["alone"] = "alone"  # type: ignore[assignment]

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> Any:
        return x


class Undescribed(_Average):
    """Has an option without a description."""

    kind: Literal["undescribed"] = "undescribed"  # type: ignore[assignment]
    beta: float = 0.9


class Loose(_Average):
    """Ignores unknown options."""

    model_config = ConfigDict(extra="ignore")
    kind: Literal["loose"] = "loose"  # type: ignore[assignment]


class Wordless(_Average):
    kind: Literal["wordless"] = "wordless"  # type: ignore[assignment]


class Costly(_Average):
    """Declares a cost of NaN."""

    kind: Literal["costly"] = "costly"  # type: ignore[assignment]

    def flops(self, rows: Dim, cols: Dim) -> float:
        return float("nan")


# -------------------------------------------------------------------------------------------------------- broken selectors


class _Columns(LowRank):
    """The first columns of a QR. The broken selectors below derive from it."""

    kind: Literal["columns"] = "columns"
    every: int | None = Field(2, description="Updates between refreshes.")

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return {"basis": torch.linalg.qr(x.mT @ x)[0][..., : state["basis"].size(-1)]}, None


class Oblique(_Columns):
    """Returns columns that are not orthonormal."""

    kind: Literal["oblique"] = "oblique"  # type: ignore[assignment]

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return {"basis": (x.mT @ x)[..., : state["basis"].size(-1)]}, None


class Fleeting(_Columns):
    """Keeps its basis in a key that it does not declare."""

    kind: Literal["fleeting"] = "fleeting"  # type: ignore[assignment]

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"warm": Slot((cols, self.coords(rows, cols)[1]))}

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        basis = torch.linalg.qr(x.mT @ x)[0][..., : state["warm"].size(-1)]
        return {"warm": basis, "basis": basis}, None


class Unclamped(_Columns):
    """Does not clamp the rank to the shape."""

    kind: Literal["unclamped"] = "unclamped"  # type: ignore[assignment]

    def columns(self, rows: Dim, cols: Dim) -> int:
        return int(self.rank)


class Repeated(_Columns):
    """Picks one column many times."""

    kind: Literal["repeated"] = "repeated"  # type: ignore[assignment]

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"index": Slot((self.coords(rows, cols)[1],), dtype=torch.int64)}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["index"])

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return {"index": torch.full_like(state["index"], x.size(-1) - 1)}, None


class Turned(_Columns):
    """Returns the transpose of its basis."""

    kind: Literal["turned"] = "turned"  # type: ignore[assignment]

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(right=state["basis"].mT)


class Crosses(_Columns):
    """Computes one basis for the whole stack."""

    kind: Literal["crosses"] = "crosses"  # type: ignore[assignment]

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        mean = (x.mT @ x).mean(0, keepdim=True).expand(x.size(0), -1, -1)
        return {"basis": torch.linalg.qr(mean)[0][..., : state["basis"].size(-1)]}, None


class DrawsBasis(_Columns):
    """Draws its basis from the global generator."""

    kind: Literal["draws_basis"] = "draws_basis"  # type: ignore[assignment]

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return {"basis": torch.linalg.qr(torch.randn_like(state["basis"]))[0]}, None


class Listens(_Columns):
    """Returns from `observe` a key that it does not declare."""

    kind: Literal["listens"] = "listens"  # type: ignore[assignment]

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        return {**state, "energy": c.square().sum((-2, -1))}


# broken class -> (the question that it fails, the message)
# ------------------------------------------------------------------------------------------------------- broken weight rules


class Clamps(WeightRule):
    """Clamps the new weight in place."""

    kind: Literal["clamps"] = "clamps"

    def landed(self, after: Tensor, before: Tensor, state: State, step: Step) -> Tensor:
        return after.clamp_(-0.1, 0.1)


class OneNorm(WeightRule):
    """Divides by the norm of the stack, not of the matrix."""

    kind: Literal["one_norm"] = "one_norm"

    def scaled(self, u: Tensor, w: Tensor, state: State, step: Step) -> Tensor:
        return u * (w.norm() / u.norm().clamp_min(1e-12))


class Tells(WeightRule):
    """Returns a key that it does not declare."""

    kind: Literal["tells"] = "tells"

    def observe(self, w: Tensor, u: Tensor, state: State, step: Step) -> State:
        return {"angle": (w * u).sum((-2, -1))}


class Halves(WeightRule):
    """Returns some rows of the weight only."""

    kind: Literal["halves"] = "halves"

    def decayed(self, w: Tensor, u: Tensor, state: State, step: Step) -> Tensor:
        return w[:, :1]


BROKEN: dict[type[Component], tuple[str, str]] = {
    Undeclared: ("slots", "returned state has key 'peak' that `slots` does not declare"),
    Unheard: ("slots", "`apply` reads state 'variance', which `slots` does not declare (declared: mean)"),
    Withheld: ("slots", "returned state lacks key 'mean' that `slots` declares"),
    Misshapen: ("slots", "returned state 'mean' has shape (3, 6, 1), and should have (3, 6, 4)"),
    Forgets: ("slots", "`transport`: returned state lacks key 'mean'"),
    Alone: ("slots", "`apply` returned Tensor, not a pair (update, state)"),
    WritesGradient: ("pure", "`apply` writes to its input `grad`"),
    WritesState: ("pure", "`apply` writes to its input `state['mean']`"),
    Hasty: ("pure", "`apply` returns different numbers when `step.in_place` or `step.spare` lets it write over its inputs"),
    Mixes: ("stacked", "the result for a matrix changes with another matrix of the stack; reduce over the last two dimensions only"),
    Draws: ("deterministic", "the global random number generator is used"),
    Remembers: ("resumed", "a run resumed after update 0 ends with a different"),
    Single: ("precision", "the update of `apply` has dtype torch.float32, and should have torch.float64"),
    OnTheCpu: ("precision", "Create new tensors on the device of x"),
    Unguarded: ("finite", ": update 1 holds NaN or infinity; guard the division"),
    Undescribed: ("documented", "option 'beta' has no description"),
    Loose: ("documented", "refuses unknown options"),
    Wordless: ("documented", "Wordless has no docstring"),
    Costly: ("planned", "`flops` should return finite numbers"),
    Clamps: ("pure", "`landed` writes to its input `after`"),
    OneNorm: ("stacked", "the result for a matrix changes with another matrix of the stack; reduce over the last two dimensions only"),
    Tells: ("slots", "`observe`: returned state has key 'angle' that `slots` does not declare"),
    Halves: ("slots", "the result of `decayed` has shape (3, 1, 4), and should have (3, 6, 4)"),
    Oblique: ("basis", "the columns of the right side are not orthonormal"),
    Fleeting: ("slots", "`basis` reads state 'basis', which `slots` does not declare (declared: warm)"),
    Unclamped: ("basis", "gives 6 x 1000000 coordinates for a matrix 6 x 4"),
    Repeated: ("basis", "picks a column twice"),
    Turned: ("basis", "the right side of the basis has shape (3, 2, 4), and `coords` asks for (B, 4, 2)"),
    Crosses: ("stacked", "reduce over the last two dimensions only"),
    DrawsBasis: ("deterministic", "declare the shape of its draws in `draws` and read them from `step.noise`"),
    Listens: ("slots", "`observe`: returned state has key 'energy' that `slots` does not declare"),
}


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[type[Component]]:
    """A class that is registered during one test."""
    cls: type[Component] = subspace_opt.register(request.param)
    yield cls
    unregister(cls)


@pytest.mark.parametrize("registered", BROKEN, indirect=True, ids=lambda cls: cls.__name__)
def test_what_is_broken_is_told(registered: type[Component]) -> None:
    question, message = BROKEN[registered]
    (asked,) = [check for check in checks(registered) if check.question == question]
    with pytest.raises(ConformanceError) as caught:
        asked()
    assert message in str(caught.value)


def test_an_unregistered_class_is_told() -> None:
    (documented,) = [check for check in checks(_Average) if check.question == "documented"]
    with pytest.raises(ConformanceError, match="_Average is not registered under 'average'"):
        documented()


class History(Rule):
    """Returns the gradient of two updates ago. Its state is its inputs themselves, which is allowed."""

    kind: Literal["history"] = "history"

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"one": Slot((rows, cols)), "two": Slot((rows, cols))}

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return state["two"], {"one": x, "two": state["one"]}


class Keys(Selector):
    """Bases of both sides by a QR of the source. `refresh` returns one more key, and an option has no default."""

    kind: Literal["keys"] = "keys"
    every: int | None = Field(2, description="Updates between refreshes.")
    width: int = Field(description="Columns on each side.", examples=[2])

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        width = min(self.width, rows.size, cols.size)
        return Dim("left", width), Dim("right", width)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        left, right = self.coords(rows, cols)
        return {"left": Slot((rows, left)), "right": Slot((cols, right))}

    def basis(self, state: State, step: Step) -> Basis:
        return Basis(state["left"], state["right"])

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        left = torch.linalg.qr(x @ x.mT)[0][..., : state["left"].size(-1)]
        right = torch.linalg.qr(x.mT @ x)[0][..., : state["right"].size(-1)]
        return {"left": left, "right": right, "energy": x.square().sum((-2, -1))}, None


@pytest.mark.parametrize("registered", [History, Keys], indirect=True, ids=lambda cls: cls.__name__)
def test_what_is_unusual_and_right_conforms(registered: type[Component]) -> None:
    for check in checks(registered):
        check()


# ------------------------------------------------------------------------------------------------------------------ specs


def test_a_spec_that_diverges_is_told() -> None:
    spec = {"name": "wild", "defaults": {"lr": 1e3}, "pipelines": {"all": {"complement": "sgd"}}, "routes": [{"use": "all"}]}
    (asked,) = [check for check in spec_checks(spec) if check.question == "loss_falls"]
    with pytest.raises(ConformanceError, match=r"wild, loss_falls: .*lower `defaults\.lr`"):
        asked()


def test_a_spec_is_made_small_enough_for_a_small_model_to_see_all_of_it() -> None:
    selector = shrunk(load_spec("golore")).pipelines["matrix"].selector.model_dump()
    assert (selector["every"], selector["at"], selector["first"]["rank"], selector["then"]["rank"]) == (3, 4, 3, 3)
    assert shrunk(load_spec("frugal")).pipelines["matrix"].selector.model_dump()["rank"] == 0.25
    assert shrunk(load_spec("adamw")) == load_spec("adamw")


@pytest.mark.parametrize("registered", [Remembers, WritesGradient], indirect=True, ids=lambda cls: cls.__name__)
def test_a_spec_with_a_broken_rule_is_told(registered: type[Component]) -> None:
    question = {Remembers: "resumed", WritesGradient: "gradients_kept"}[registered]
    kind = subjects(registered)[0].kind
    spec = {"pipelines": {"all": {"complement": kind}}, "routes": [{"use": "all"}], "name": "broken"}
    (asked,) = [check for check in spec_checks(spec) if check.question == question]
    with pytest.raises(ConformanceError, match=f"broken, {question}"):
        asked()


# ------------------------------------------------------------------------------------------------------------ names of components


def test_components_are_found_by_every_name_they_have(tmp_path: Path) -> None:
    assert {s.label for s in subjects("none")} == {"rule none", "selector none"}
    assert [s.component.model_dump()["rank"] for s in subjects('svd={"rank": 3}')] == [3]
    assert subjects("subspace_opt.selectors.svd:Svd")[0].kind == "svd"
    assert {s.kind for s in subjects("subspace_opt.rules.grouped")} == {"subset_norm", "column_normalize", "rms_clip"}
    file = tmp_path / "halved.py"
    file.write_text(PLUGIN)
    try:
        assert [s.kind for s in subjects(str(file))] == [s.kind for s in subjects(f"{file}:Halved")] == ["halved"]
        assert [s.kind for s in subjects("halved")] == ["halved"]
    finally:
        unregister(type(subjects("halved")[0].component))


PLUGIN = """
from typing import Literal
from subspace_opt import Rule, register

@register
class Halved(Rule):
    '''`X / 2`.'''
    kind: Literal["halved"] = "halved"
    def apply(self, x, grad, state, step):
        return x / 2, {"lost": x}
"""


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("svdd", "no component or module 'svdd'; did you mean 'svd'?"),
        ("no.such.module:Thing", "module 'no.such.module' cannot be imported"),
        (
            "subspace_opt.selectors.svd:Thing",
            "'Thing' of 'subspace_opt.selectors.svd' is not a component; the module has LowRank, Svd",
        ),
        ("subspace_opt.linalg", "'subspace_opt.linalg' defines no component; it imports none"),
        ("no_such_file.py", "plugin file 'no_such_file.py' does not exist"),
        ("svd={rank: 3}", "the options are not JSON"),
        ("svd=3", "the options are not a mapping"),
        ('svd={"rnak": 3}', "selector 'svd' cannot be built: rnak: Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_found_is_told(asked: str, message: str) -> None:
    with pytest.raises(UnknownComponentError) as caught:
        subjects(asked)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- the command


def _pytest(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "subspace_opt_pytest", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_tests_a_file_and_says_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "halved.py").write_text(PLUGIN)
    (tmp_path / "halved.yaml").write_text("name: h\npipelines: {all: {complement: sgd}}\nroutes: [{use: all}]\n")
    done = _pytest("--pyargs", "subspace_opt.testing", "--component", "halved.py", "--spec", "halved.yaml", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "returned state has key 'lost' that `slots` does not declare" in done.stdout
    assert "test_conformance[halved.yaml-loss_falls]" not in done.stdout  # passed checks are not listed


@pytest.mark.slow
def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    silent = _pytest("--pyargs", "subspace_opt.testing", "-rs", cwd=tmp_path)
    assert silent.returncode == 0
    assert "name the components or specs to test: --component KIND" in silent.stdout.replace("\n", " ")
    unknown = _pytest("--pyargs", "subspace_opt.testing", "--component", "svdd", cwd=tmp_path)
    assert unknown.returncode == 4
    assert "did you mean 'svd'?" in unknown.stderr
    elsewhere = _pytest("--component", "svd", cwd=tmp_path)
    assert elsewhere.returncode == 4
    assert "unrecognized arguments: --component" in elsewhere.stderr


def test_the_plugin_of_pytest_is_light() -> None:
    code = "import sys, subspace_opt_pytest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
