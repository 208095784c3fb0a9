"""Options with which one algorithm becomes another: both give the same numbers in float64, up to round-off."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import subspace_opt
from subspace_opt import Basis, Dim, LowRank, Selector, Slot, State, Step, SubspaceOptimizer
from subspace_opt.algebra import Order
from subspace_opt.algebra.frame import Frame
from subspace_opt.algebra.pipeline import Pipeline
from subspace_opt.registry import unregister

SHAPES = {"tall": (9, 5), "wide": (4, 7), "square": (6, 6)}
STEPS = 9
LR, DECAY = 0.05, 0.1

Params = dict[str, nn.Parameter]
Spec = str | dict[str, Any]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameters() -> Params:
    return {name: nn.Parameter(normal(*shape, seed=i)) for i, (name, shape) in enumerate(SHAPES.items())}


def gradient(name: str, t: int) -> Tensor:
    return normal(*SHAPES[name], seed=100 * list(SHAPES).index(name) + t)


def optimizer(params: Params, spec: Spec, overrides: dict[str, Any] | None = None, decay: float = DECAY) -> SubspaceOptimizer:
    """An optimizer that sends all parameters through the pipeline `matrix`, or through the only pipeline."""
    pipelines = subspace_opt.load_spec(spec).pipelines
    group = {"params": list(params.items()), "use": "matrix" if "matrix" in pipelines else next(iter(pipelines))}
    return SubspaceOptimizer([group], spec, overrides=overrides, lr=LR, weight_decay=decay)


def trained(spec: Spec, overrides: dict[str, Any] | None = None, decay: float = DECAY) -> dict[str, Tensor]:
    params = parameters()
    opt = optimizer(params, spec, overrides, decay)
    for t in range(STEPS):
        for name, p in params.items():
            p.grad = gradient(name, t)
        opt.step()
    return {name: p.detach() for name, p in params.items()}


Memory = dict[str, Tensor]


def by_hand(step: Callable[[Tensor, Tensor, int, Memory], Tensor], skipped: int = 0) -> dict[str, Tensor]:
    """The parameters after the same gradients, by the test's formula: (weight, gradient, t, memory) -> weight."""
    out = {}
    for name, p in parameters().items():
        w, memory = p.detach(), Memory()
        for t in range(skipped, STEPS):
            w = step(w, gradient(name, t), t + 1 - skipped, memory)
        out[name] = w
    return out


def hugging_face(b1: float, b2: float, eps: float) -> Callable[[Tensor, Tensor, int, Memory], Tensor]:
    """Adam as in Hugging Face's AdamW: eps is not bias-corrected, decay follows the update."""

    def step(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        memory["m"] = b1 * memory.get("m", torch.zeros_like(g)) + (1 - b1) * g
        memory["v"] = b2 * memory.get("v", torch.zeros_like(g)) + (1 - b2) * g * g
        size = LR * math.sqrt(1 - b2**t) / (1 - b1**t)
        w = w - size * memory["m"] / (memory["v"].sqrt() + eps)
        return w - LR * DECAY * w

    return step


def torch_adamw(b1: float, b2: float, eps: float) -> dict[str, Tensor]:
    params = parameters()
    opt = torch.optim.AdamW(params.values(), lr=LR, betas=(b1, b2), eps=eps, weight_decay=DECAY)
    for t in range(STEPS):
        for name, p in params.items():
            p.grad = gradient(name, t)
        opt.step()
    return {name: p.detach() for name, p in params.items()}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, start in parameters().items():
        moved = (theirs[name] - start.detach()).norm()
        assert (ours[name] - theirs[name]).norm() <= tolerance * moved, name


class Identity(LowRank):
    """The first `rank` columns of the identity, as a dense basis."""

    kind: Literal["fixed_identity"] = "fixed_identity"

    def limit(self, rows: Dim, cols: Dim) -> int:
        return cols.size

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        return {"basis": torch.eye(x.size(-1), state["basis"].size(-1), dtype=x.dtype).expand_as(state["basis"])}, None


class Turning(LowRank):
    """A constant subspace whose basis changes at every refresh, by signs or by a rotation."""

    kind: Literal["turning"] = "turning"
    by: Literal["nothing", "signs", "rotations"]

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        n, r = state["basis"].shape[-2:]
        u = torch.linalg.qr(normal(n, r, seed=7))[0]
        if self.by == "signs":
            u = u * normal(r, seed=int(step.t)).sign()
        if self.by == "rotations":
            u = u @ torch.linalg.qr(normal(r, r, seed=int(step.t)))[0]
        return {"basis": u.expand_as(state["basis"])}, None


@pytest.fixture(autouse=True)
def _kinds() -> Iterator[None]:
    for cls in (Identity, Turning):
        subspace_opt.register(cls)
    yield
    for cls in (Identity, Turning):
        unregister(cls)


FULL = {"kind": "fixed_identity", "rank": 1000}


# ------------------------------------------------------------------------------------------------------ full rank is Adam


def test_galore_at_full_rank_is_adam() -> None:
    ours = trained("galore", {"matrix.selector": FULL, "matrix.mix.inside": 1.0})
    assert_alike(ours, by_hand(hugging_face(0.9, 0.999, 1e-6)))


def test_fira_at_full_rank_is_adam() -> None:
    ours = trained("fira", {"matrix.selector": FULL, "matrix.mix.inside": 1.0, "matrix.complement.0.share": 0.0})
    assert_alike(ours, by_hand(hugging_face(0.9, 0.999, 1e-6)))


def test_dct_adamw_at_full_rank_is_adamw() -> None:
    assert_alike(trained("dct-adamw", {"matrix.selector": FULL, "matrix.feedback": None}), torch_adamw(0.9, 0.999, 1e-8))


def test_dct_adamw_feeds_nothing_back_at_full_rank() -> None:
    """The update transmits the whole signal, so error feedback keeps 0."""
    assert_alike(trained("dct-adamw", {"matrix.selector": FULL}), torch_adamw(0.9, 0.999, 1e-8))


def test_frugal_at_full_rank_is_adamw_until_it_resets() -> None:
    assert_alike(trained("frugal", {"matrix.selector": {**FULL, "every": 100}}), torch_adamw(0.9, 0.999, 1e-8))


def test_ldadam_in_a_basis_that_stays_is_adamw() -> None:
    overrides = {"matrix.selector": FULL, "matrix.inside.beta1": 0.9, "matrix.inside.beta2": 0.999}
    assert_alike(trained("ldadam", overrides), torch_adamw(0.9, 0.999, 1e-8))


def test_subsets_of_one_entry_are_adam() -> None:
    assert_alike(trained("adam-sn", {"matrix.finish.0.subsets": 1}), by_hand(hugging_face(0.9, 0.999, 1e-6)))


def test_soap_with_identity_sides_is_adam_one_gradient_late() -> None:
    ours = trained("soap", {"matrix.selector.max_dim": 1})
    assert_alike(ours, by_hand(hugging_face(0.95, 0.95, 1e-8), skipped=1))


# ---------------------------------------------------------------------------------------------- full rank is Muon, or SGD


@pytest.mark.parametrize("selector", [{**FULL, "every": 1}, {"kind": "fft", "rank": 1000}], ids=["identity", "fft"])
def test_trion_at_full_rank_is_muon_with_a_heavy_ball(selector: dict[str, Any]) -> None:
    """If the whole signal is transmitted, feedback keeps its share of the signal: M <- mu M + G."""
    muon = {"matrix.momentum": {"kind": "heavy_ball", "beta": 0.8}}
    trion = {"matrix.selector": selector, "matrix.feedback": 0.8}
    assert_alike(trained("trion", trion), trained("muon", muon), tolerance=1e-9)


def test_powerstep_with_exponent_one_is_heavy_ball_sgd() -> None:
    def sgd(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        memory["m"] = 0.9 * memory.get("m", torch.zeros_like(g)) + g
        return w * (1 - LR * DECAY) - LR * memory["m"]

    assert_alike(trained("powerstep", {"all.complement.beta": 1.0}), by_hand(sgd))


def test_powerstep_tends_to_sign_descent() -> None:
    """`sign(m) |m|^beta = sign(m) (1 + beta log |m| + ...)`, so a tenth of the exponent gives a tenth of the distance."""

    def sign(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        memory["m"] = 0.9 * memory.get("m", torch.zeros_like(g)) + g
        return w * (1 - LR * DECAY) - LR * memory["m"].sign()

    exact = by_hand(sign)
    gaps = []
    for beta in (1e-3, 1e-4, 1e-5):
        ours = trained("powerstep", {"all.complement.beta": beta})
        gaps.append(max(float((ours[name] - exact[name]).norm()) for name in ours))
    assert gaps[0] < 1e-2
    for larger, smaller in itertools.pairwise(gaps):
        assert smaller == pytest.approx(larger / 10, rel=0.05)


def test_cosmos_with_gamma_zero_stays_in_the_span_of_its_basis() -> None:
    params = parameters()
    opt = optimizer(params, "cosmos", {"matrix.selector.rank": 3, "matrix.mix.complement": 0.0}, decay=0.0)
    for t in range(STEPS):
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = gradient(name, t)
        opt.step()
        for name, p in params.items():
            update, u = before[name] - p.detach(), opt.state[p]["selector.basis"]
            assert (update - update @ u @ u.T).norm() <= 1e-12 * update.norm(), (name, t)


# -------------------------------------------------------------------------------------------------------- split identities

SELECTORS: list[dict[str, Any]] = [
    {"kind": "svd", "rank": 2, "every": 3},
    {"kind": "svd", "rank": 2, "every": 3, "sides": "both"},
    {"kind": "eigen", "rank": 3},
    {"kind": "random", "rank": 2, "every": 2},
    {"kind": "random", "rank": 2, "every": 2, "draw": "coordinates"},
    {"kind": "fft", "rank": 3},
    {"kind": "top_norm", "rank": 2, "every": 3},
    {"kind": "power_iteration", "rank": 2},
    {"kind": "dion", "rank": 2},
    {"kind": "kron_eigen", "every": 2, "timing": "before"},
    {"kind": "blocks", "every": 2, "share": 0.5},
]


def named(selector: dict[str, Any]) -> str:
    return "-".join(str(v) for k, v in selector.items() if k in ("kind", "sides", "draw"))


def sgd(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
    return w * (1 - LR * DECAY) - LR * g


@pytest.mark.parametrize("orient", ["right", "left", "short", "long"])
@pytest.mark.parametrize("selector", SELECTORS, ids=named)
def test_identity_everywhere_gives_the_gradient_back(selector: dict[str, Any], orient: str) -> None:
    pipeline = {"orient": orient, "selector": selector, "inside": "identity", "complement": "sgd"}
    spec = {"pipelines": {"matrix": pipeline}, "routes": [{"use": "matrix"}]}
    assert_alike(trained(spec), by_hand(sgd))


@pytest.mark.parametrize("selector", [s for s in SELECTORS if "rank" in s and "sides" not in s], ids=named)
def test_full_rank_leaves_no_residual(selector: dict[str, Any]) -> None:
    """The rank is clamped to the side. A full basis has no complement, and its coordinates hold the whole gradient."""
    pipeline = {"orient": "short", "selector": {**selector, "rank": 1000}, "inside": "identity", "complement": "sign"}
    assert not any(Frame.of(Pipeline.model_validate(pipeline), *shape).has_complement for shape in SHAPES.values())
    spec = {"pipelines": {"matrix": pipeline}, "routes": [{"use": "matrix"}]}
    assert_alike(trained(spec), by_hand(sgd))


def test_an_orthonormal_basis_on_both_sides_leaves_a_residual_unless_the_matrix_is_square() -> None:
    pipeline = Pipeline.model_validate(
        {"selector": {"kind": "svd", "rank": 1000, "sides": "both"}, "inside": "identity", "complement": "sgd"}
    )
    assert {shape: Frame.of(pipeline, *shape).has_complement for shape in SHAPES.values()} == {(9, 5): True, (4, 7): True, (6, 6): False}


# --------------------------------------------------------------------------------------------------------------- transport


def _turned(by: str, inside: Any, feedback: float | None = None) -> dict[str, Tensor]:
    selector = {"kind": "turning", "by": by, "rank": 3, "every": 2}
    pipeline = {"orient": "short", "selector": selector, "inside": inside, "feedback": feedback}
    return trained({"pipelines": {"matrix": pipeline}, "routes": [{"use": "matrix"}]})


@pytest.mark.parametrize("by", ["signs", "rotations"])
@pytest.mark.parametrize("kind", ["ema", "heavy_ball"])
def test_a_projected_momentum_does_not_see_the_basis_turn(kind: str, by: str) -> None:
    inside = {"kind": kind, "on_refresh": "project"}
    assert_alike(_turned(by, inside), _turned("nothing", inside))
    kept = {"kind": kind, "on_refresh": "keep"}
    assert (_turned(by, kept)["tall"] - _turned("nothing", kept)["tall"]).norm() > 1e-3


@pytest.mark.parametrize("inside", [{"kind": "adam", "on_refresh": "project"}, {"kind": "ldadam"}], ids=["adam", "ldadam"])
def test_projected_moments_of_adam_do_not_see_signs(inside: dict[str, Any]) -> None:
    """A sign flips the first moment and leaves the second, and Adam depends on nothing else."""
    assert_alike(_turned("signs", inside), _turned("nothing", inside))


def test_an_orthogonalized_momentum_does_not_see_the_basis_turn() -> None:
    inside = [{"kind": "heavy_ball", "on_refresh": "project"}, {"kind": "orthogonalize", "method": "svd"}]
    assert_alike(_turned("rotations", inside), _turned("nothing", inside), tolerance=1e-11)


def test_feedback_does_not_see_the_basis_turn() -> None:
    assert_alike(_turned("rotations", "identity", feedback=0.9), _turned("nothing", "identity", feedback=0.9))


# -------------------------------------------------------------------------------------------------------------------- OSFT


def leading(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(w.detach())
    return u[:, :rank], vh[:rank].T


def osft(params: Params, mode: str) -> SubspaceOptimizer:
    return optimizer(params, "osft", {"matrix.selector.rank": 0.5, "matrix.complement.1.mode": mode}, decay=0.0)


def _give(params: Params, t: int) -> None:
    for name, p in params.items():
        p.grad = gradient(name, t)


@pytest.mark.parametrize("mode", ["core", "strict"])
def test_osft_never_moves_the_leading_singular_directions(mode: str) -> None:
    params = parameters()
    opt = osft(params, mode)
    started = {name: p.detach().clone() for name, p in params.items()}
    for t in range(STEPS):
        _give(params, t)
        opt.step()
    for row in opt.plan:
        name = row.entry.name
        moved = params[name].detach() - started[name]
        left, right = leading(started[name], row.ranks[0])
        assert (left.T @ moved @ right).norm() <= 1e-12 * moved.norm(), name
        sides = (left.T @ moved).norm() + (moved @ right).norm()
        assert (sides <= 1e-12 * moved.norm()) == (mode == "strict"), name


def test_osft_takes_a_new_basis_when_it_is_told_and_only_then() -> None:
    params = parameters()
    opt = osft(params, "core")
    for t in range(4):
        _give(params, t)
        opt.step()
    kept = {name: opt.state[p]["selector.basis"].clone() for name, p in params.items()}
    _give(params, 4)
    opt.step()
    assert all(torch.equal(kept[name], opt.state[p]["selector.basis"]) for name, p in params.items())
    now = {name: p.detach().clone() for name, p in params.items()}
    opt.refresh_bases()
    _give(params, 5)
    opt.step()
    for row in opt.plan:
        name = row.entry.name
        left, right = leading(now[name], row.ranks[0])
        basis = opt.state[params[name]]["selector.basis"]
        assert not torch.equal(kept[name], basis)
        assert (basis.T @ right).abs().sub(torch.eye(row.ranks[0])).norm() <= 1e-10
        moved = params[name].detach() - now[name]
        assert (left.T @ moved @ right).norm() <= 1e-12 * moved.norm()
    taken = {name: opt.state[p]["selector.basis"].clone() for name, p in params.items()}
    _give(params, 6)
    opt.step()
    assert all(torch.equal(taken[name], opt.state[p]["selector.basis"]) for name, p in params.items())


def test_a_request_for_new_bases_survives_a_checkpoint() -> None:
    params = parameters()
    opt = osft(params, "core")
    _give(params, 0)
    opt.step()
    opt.refresh_bases()
    saved, weights = copy.deepcopy(opt.state_dict()), {name: p.detach().clone() for name, p in params.items()}

    resumed = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
    again = osft(resumed, "core")
    again.load_state_dict(saved)
    for t in (1, 2):
        for given, used in ((params, opt), (resumed, again)):
            _give(given, t)
            used.step()
    for name, p in params.items():
        assert torch.equal(p, resumed[name])
        right = leading(weights[name], again.state[resumed[name]]["selector.basis"].size(-1))[1]
        assert (again.state[resumed[name]]["selector.basis"].T @ right).abs().sub(torch.eye(right.size(-1))).norm() <= 1e-10


def test_the_local_selectors_are_what_they_claim() -> None:
    """The basis of `fixed_identity` is the identity, and the subspace of `turning` is the same in every basis."""
    for selector in (Identity(rank=3), Turning(rank=3, by="rotations")):
        bases = [_basis(selector, t) for t in (1, 2)]
        torch.testing.assert_close(bases[0] @ bases[0].mT, bases[1] @ bases[1].mT)
    assert not torch.allclose(bases[0], bases[1])


def _basis(selector: Selector, t: int) -> Tensor:
    rows, cols = Dim("rows", 6), Dim("cols", 5)
    when = torch.tensor(float(t), dtype=torch.float64)
    step = Step(t=when, age=when, rows=rows, cols=cols)
    slots: dict[str, Slot] = selector.slots(rows, cols)
    empty = {name: torch.zeros(1, *slot.shape, dtype=torch.float64) for name, slot in slots.items()}
    basis = selector.basis(selector.refresh(normal(1, 6, 5, seed=0), empty, step)[0], step)
    assert isinstance(basis, Basis)
    assert isinstance(basis.right, Tensor)
    return basis.right
