"""Does a matrix in a stack get the same updates as alone?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import LINEAR, PRESETS, differences, give, gradient, optimizer, parameters, same, small, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_opt import Dim, Rule, Selector, State, Step, SubspaceOptimizer, linalg, load_spec
from subspace_opt.algebra import lift, project
from subspace_opt.algebra.frame import Frame
from subspace_opt.algebra.pipeline import Pipeline
from subspace_opt.engine import step as step_module
from subspace_opt.engine.work import Piece
from subspace_opt.registry import Component, kinds

every_preset = pytest.mark.parametrize("preset", PRESETS)

# Several matrices of one shape, in one parameter and in several, and other shapes.
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (7, 4),
    "b": (7, 4),
    "c": (7, 4),
    "wide": (4, 7),
    "wide2": (4, 7),
    "experts": (3, 7, 4),
    "bias": (4,),
    "bias2": (4,),
}


def run(preset: str, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    """Make seven updates. Some parameters start late and some pause, so that ages within a shape differ."""
    shapes = {n: tuple(5 if side in (4, 7) else side for side in s) for n, s in SHAPES.items()} if preset in DEGENERATE else SHAPES
    params = parameters(shapes, dtype)
    opt = optimizer(preset, params, **options)
    for step in range(7):
        give(params, step, missing={0: ("b", "bias"), 2: ("c",), 3: ("c", "wide")}.get(step, ()))
        opt.step()
    return snapshot(opt, params)


# Round-off decides the eigenvectors of eigenvalue 0 of a covariance. One gradient determines bases of both sides only for a square matrix.
DEGENERATE = [
    preset
    for preset in PRESETS
    if any(getattr(p.selector, "max_dim", 0) > 1 and getattr(p.selector, "sides", "") == "both" for p in small(preset).pipelines.values())
    or preset == "shampoo"
]


# ------------------------------------------------------------------------------------------------------------- the same trajectory


@every_preset
@pytest.mark.parametrize("batch_bytes", [1, 500, 64 * 2**20])
def test_stacked_is_alone(preset: str, batch_bytes: int) -> None:
    """Stacks of one matrix, of two, and of all give the same result."""
    alone = run(preset, stacking="never")
    for stacking in ("always", "auto"):
        gap = differences(run(preset, stacking=stacking, batch_bytes=batch_bytes), alone)
        assert max(gap.values()) < (1e-10 if preset in DEGENERATE else 1e-12), max(gap.items(), key=lambda item: item[1])


@every_preset
def test_random_rounding_does_not_depend_on_how_stacks_are_cut(preset: str) -> None:
    """The updates may differ by round-off, so the weights are compared under decay alone."""
    ends = []
    for options in ({"stacking": "never"}, {"stacking": "always"}, {"stacking": "always", "batch_bytes": 400}):
        params = parameters(SHAPES, torch.bfloat16)
        opt = optimizer(preset, params, rounding="stochastic", lr=1e-2, weight_decay=0.5, **options)
        for p in params.values():
            p.grad = torch.zeros_like(p)  # decay alone
        opt.step()
        ends.append(snapshot(opt, params))
    assert not same(ends[0], {**ends[0], **{n: p.detach() for n, p in parameters(SHAPES, torch.bfloat16).items()}})
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_random_rounding_draws_for_every_matrix_of_a_parameter() -> None:
    """Two experts with the same draws would move alike."""
    params = parameters({"experts": (2, 8, 8)}, torch.bfloat16)
    with torch.no_grad():
        params["experts"][1] = params["experts"][0]
    opt = optimizer("adamw", params, rounding="stochastic", lr=1e-2, weight_decay=0.5)
    params["experts"].grad = torch.zeros_like(params["experts"])
    opt.step()
    assert not torch.equal(params["experts"][0], params["experts"][1])


@pytest.mark.parametrize(("batch_bytes", "most"), [(1, 1), (500, 2), (700, 3), (64 * 2**20, 6)])
def test_a_temporary_of_a_stack_is_bounded(batch_bytes: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six matrices of 7 x 4 in float64 have 224 bytes each. A matrix that exceeds the bound is a stack of its own."""
    sizes: list[int] = []
    own = step_module._computed

    def computed(frame: Frame, given: Any) -> Any:
        sizes.append(given.grad.size(0))
        return own(frame, given)

    monkeypatch.setattr(step_module, "_computed", computed)
    params = parameters({n: s for n, s in SHAPES.items() if s[-2:] == (7, 4)}, torch.float64)
    opt = optimizer("muon", params, stacking="always", batch_bytes=batch_bytes)
    give(params, 0)
    opt.step()
    assert max(sizes) == most
    assert sum(sizes) == 6


@pytest.mark.parametrize("decay", [{"a": 0.0, "b": 0.5}, {"a": 0.25, "b": 0.25}])
@pytest.mark.parametrize("stacking", ["always", "never"])
def test_groups_that_differ_share_no_stack_where_it_matters(stacking: Any, decay: dict[str, float]) -> None:
    """Coupled decay is part of the gradient that rules see, and a refresh may be asked for one group."""
    spec = load_spec(small("galore", every=100), {"matrix.decay": "coupled"})
    shapes = dict.fromkeys("ab", (7, 4))
    params, alone = parameters(shapes, torch.float64), parameters(shapes, torch.float64)
    opt = SubspaceOptimizer(
        [{"params": [(n, params[n])], "weight_decay": decay[n]} for n in "ab"],
        spec,
        stacking=stacking,
        modules=dict.fromkeys("ab", LINEAR),
    )
    lone = {n: optimizer(spec, {n: alone[n]}, weight_decay=decay[n]) for n in "ab"}
    for step in range(4):
        give(params, step)
        give(alone, step)
        if step == 2:
            opt.param_groups[1]["refresh"] = True
            lone["b"].refresh_bases()
        for one in (opt, *lone.values()):
            one.step()
    for n in "ab":
        gap = differences({"w": params[n].detach(), **opt.state[params[n]]}, {"w": alone[n].detach(), **lone[n].state[alone[n]]})
        assert max(gap.values()) < 1e-12


@every_preset
@pytest.mark.parametrize("stacking", ["always", "never"])
def test_two_copies_of_a_matrix_stay_copies(preset: str, stacking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(piece: Piece, call: int, shape: tuple[int, ...], seed: int) -> Tensor:
        # Their names differ, so their draws would differ too.
        return torch.randn(shape, generator=torch.Generator().manual_seed(call)).expand(piece.stop - piece.start, *shape)

    monkeypatch.setattr("subspace_opt.engine.moment._noise", noise)
    params = parameters(dict.fromkeys(("one", "other", "two"), (5, 5) if preset in DEGENERATE else (7, 5)), torch.float64)
    with torch.no_grad():
        params["two"].copy_(params["one"])
    opt = optimizer(preset, params, stacking=stacking)
    for step in range(7):
        give(params, step)
        assert params["one"].grad is not None
        params["two"].grad = params["one"].grad.clone()
        opt.step()
    gap = differences(
        {"weight": params["one"].detach(), **opt.state[params["one"]]}, {"weight": params["two"].detach(), **opt.state[params["two"]]}
    )
    assert max(gap.values()) < 1e-12  # rounding in a batched product may depend on the index
    assert not torch.equal(params["one"], params["other"])


@pytest.mark.parametrize("preset", DEGENERATE)
def test_round_off_chooses_no_basis(preset: str) -> None:
    """The covariance of one gradient that is not square has a null space. A change in the last bit must not rotate it."""
    ends = []
    for change in (0.0, 1e-15):
        params = parameters({"w": (7, 4)}, torch.float64)
        opt = optimizer(preset, params)
        for step in range(7):
            give(params, step)
            assert params["w"].grad is not None
            params["w"].grad *= 1 + change * torch.arange(28, dtype=torch.float64).reshape(7, 4)
            opt.step()
        ends.append(params["w"].detach())
    assert float((ends[0] - ends[1]).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("replaced", [[5, 6], [2, 6], [3]], ids=str)
def test_a_completion_depends_on_the_columns_that_are_held(replaced: list[int], dtype: torch.dtype) -> None:
    """Columns of round-off, at the end or between others, in one matrix of two: their noise changes nothing, and small columns stay."""
    draws, eps = torch.Generator().manual_seed(0), torch.finfo(dtype).eps
    start = torch.randn(2, 7, 7, generator=draws, dtype=torch.float64).to(dtype) * torch.logspace(0, -3, 7, dtype=dtype)
    found = []
    for _ in range(2):
        y = start.clone()
        noise = torch.randn(7, len(replaced), generator=draws, dtype=torch.float64).to(dtype)
        y[0, :, replaced] = noise * 0.1 * eps * torch.linalg.vector_norm(y[0])
        found.append(linalg.complete(y))
    q = found[0]
    assert torch.allclose(q.mT @ q, torch.eye(7, dtype=dtype).expand(2, 7, 7), atol=20 * eps)
    assert float((q - found[1]).abs().max()) < 1e3 * eps
    first = replaced[0]  # a later column is orthogonal to what replaces an earlier one
    assert torch.allclose(q[0, :, :first], linalg.orthonormal(start[:1, :, :first])[0], atol=1e4 * eps)
    assert torch.allclose(q[1], linalg.orthonormal(start[1:])[0], atol=1e4 * eps)


# --------------------------------------------------------------------------------------------------- every kind, any shape and rank


# Options without a default.
NEEDED: dict[str, dict[str, Any]] = {
    "debias": {"beta1": 0.9, "beta2": 0.99},
    "switch": {"at": 2, "first": {"kind": "svd"}, "then": {"kind": "random"}},
}


def built_in(family: str) -> dict[str, type[Component]]:
    return {n: c for n, c in kinds(family).items() if c.__module__.startswith("subspace_opt.")}


def pipeline_around_rule(kind: str, place: str) -> dict[str, Any]:
    """A pipeline with the rule in one place."""
    rule = {"kind": kind, **NEEDED.get(kind, {})}
    rest: dict[str, Any] = {"selector": {"kind": "svd", "every": 2}, "inside": "identity", "complement": "sgd"}
    return {**rest, place: [rest[place], rule] if place in ("complement",) else [rule]}


def pipeline_around_selector(kind: str, rank: int) -> dict[str, Any]:
    cls = built_in("selector")[kind]
    options: dict[str, Any] = {"kind": kind, **NEEDED.get(kind, {})}
    if "rank" in cls.model_fields:
        options["rank"] = rank
    if kind == "switch":
        options |= {part: {**options[part], "rank": rank} for part in ("first", "then")}
    every = cls.model_fields["every"].default
    if every is not None and every > 1:
        options["every"] = 2
    inside = "adam" if kind != "none" else "none"
    return {"selector": options, "inside": inside, "complement": "none" if kind != "none" else "adam"}


PLACES = {
    "rule": [
        (kind, place)
        for kind in built_in("rule")
        for place in ("momentum", "inside", "complement", "finish")
        # These rules need a subspace, and `none` computes nothing.
        if kind != "none"
        and not (kind in ("whole", "match_inside", "confine") and place != "complement")
        and not (kind == "ldadam" and place != "inside")
        and (kind, place) != ("soap", "complement")  # a residual has no full rank, see `DEGENERATE`
    ]
}


def frame_of(plain: dict[str, Any], rows: int, cols: int, rank: int) -> Frame:
    if isinstance(plain.get("selector"), dict) and plain["selector"]["kind"] == "svd":
        plain = {**plain, "selector": {**plain["selector"], "rank": rank}}
    return Frame.of(Pipeline.model_validate(plain), rows, cols)


def draws(frame: Frame, call: int, rows: list[int], dtype: torch.dtype) -> Tensor | None:
    shape = frame.pipeline.selector.draws(frame.rows, frame.cols, call, call == 1) if frame.opens else None
    if shape is None:
        return None
    return torch.stack([gradient(f"noise{b}", shape, call, dtype) for b in rows])


def drive(
    frame: Frame, stack: list[int], device: str = "cpu", check: Callable[[State, State], None] | None = None
) -> list[tuple[Tensor | None, State]]:
    """Make five updates of the matrices with these indices, with a refresh at every second one. Returns the update and the state after
    each.
    """
    dtype = torch.float64
    shape = (frame.cols.size, frame.rows.size) if frame.turned else (frame.rows.size, frame.cols.size)
    state: State = {
        key: torch.zeros(len(stack), *slot.shape, dtype=slot.dtype or dtype, device=device) for key, slot in frame.slots.items()
    }
    selector = frame.pipeline.selector
    constants = {name: make().to(device, dtype) for name, make in selector.constants(frame.rows, frame.cols).items()} if frame.opens else {}
    weight = torch.stack([gradient(f"weight{b}", shape, 0, dtype) for b in stack]).to(device)
    out: list[tuple[Tensor | None, State]] = []
    for call in range(1, 6):
        t = call - 1 if frame.primes else call
        noise = draws(frame, call, stack, dtype)
        step = Step(
            t=torch.tensor(float(t), dtype=torch.float64),
            age=torch.tensor(float(selector.age(max(t, 1))), dtype=torch.float64),
            first=call == 1,
            refresh=frame.opens and (call == 1 or selector.refreshes(t)),
            rows=frame.rows,
            cols=frame.cols,
            position=torch.tensor([[b, 4] for b in stack]),
            noise=None if noise is None else noise.to(device),
            constants=constants,
        )
        grad = torch.stack([gradient(f"grad{b}", shape, call, dtype) for b in stack]).to(device)
        before = {key: value.clone() for key, value in {**state, "#grad": grad, "#weight": weight}.items()}
        given = dict(state)
        if call == 1 and frame.primes:
            update, new = None, frame.prime(grad, weight, given, step)
        else:
            expression, new = frame.update(grad, weight, given, step)
            update = expression.dense()
        if device == "cpu":
            assert same({**state, "#grad": grad, "#weight": weight}, before), "an input was written to"
            assert given.keys() == state.keys(), "the given dictionary was changed"
        # Keep declared slots only: a selector may return additional values for one update.
        assert new.keys() >= frame.slots.keys()
        for key, slot in frame.slots.items():
            assert tuple(new[key].shape) == (len(stack), *slot.shape), key
            assert new[key].dtype == (slot.dtype or dtype), key
            assert new[key].device.type == device, key
        assert all(key.startswith("selector.") for key in new.keys() - frame.slots.keys())
        if update is not None:
            assert tuple(update.shape) == (len(stack), *shape)
            assert update.dtype == dtype
        state = {key: new[key] for key in frame.slots}
        out.append((update, new))
    return out


def check_rows_are_independent(frame: Frame) -> None:
    """Compare each matrix of a stack with the same matrix among others, and alone."""
    stacks = [drive(frame, stack) for stack in ([0, 1, 2], [2, 3], [1])]
    for call in range(5):
        (u, s), (v, r), (w, q) = (stack[call] for stack in stacks)
        pairs = [] if u is None or v is None or w is None else [(u[2], v[0]), (u[1], w[0])]
        pairs += [(s[key][2], r[key][0]) for key in frame.slots] + [(s[key][1], q[key][0]) for key in frame.slots]
        for mine, theirs in pairs:
            assert torch.allclose(mine.double(), theirs.double(), rtol=1e-6, atol=1e-6)  # a leak from another matrix would show at index 0


sides = st.integers(1, 6)
ranks = st.integers(1, 5)
few = settings(max_examples=8)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "place"), PLACES["rule"])
@few
@given(rows=sides, cols=sides, rank=ranks, orient=st.sampled_from(["right", "left", "short", "long"]))
def test_a_rule_treats_every_matrix_of_a_stack_by_itself(kind: str, place: str, rows: int, cols: int, rank: int, orient: str) -> None:
    """It is also pure, and returns the state that it declares."""
    if kind in ("soap", "shampoo"):
        rows = cols  # see `DEGENERATE`
    check_rows_are_independent(frame_of({**pipeline_around_rule(kind, place), "orient": orient}, rows, cols, rank))


@pytest.mark.parametrize("kind", built_in("selector"))
@few
@given(rows=sides, cols=sides, rank=ranks, orient=st.sampled_from(["right", "left", "short", "long"]))
def test_a_selector_treats_every_matrix_of_a_stack_by_itself(kind: str, rows: int, cols: int, rank: int, orient: str) -> None:
    if kind == "kron_eigen":
        rows = cols  # see `DEGENERATE`
    check_rows_are_independent(frame_of({**pipeline_around_selector(kind, rank), "orient": orient}, rows, cols, rank))


@pytest.mark.parametrize("kind", [kind for kind in built_in("selector") if kind != "none"])
@few
@given(rows=sides, cols=sides, rank=ranks)
def test_a_basis_is_orthonormal(kind: str, rows: int, cols: int, rank: int) -> None:
    """Projecting a lift returns its coordinates, and a full basis loses nothing."""
    frame = frame_of(pipeline_around_selector(kind, rank), rows, cols, rank)
    selector = frame.pipeline.selector
    if not selector.traits().orthonormal:
        return
    constants = {name: make() for name, make in selector.constants(frame.rows, frame.cols).items()}
    step = Step(torch.ones(()), torch.ones(()), rows=frame.rows, cols=frame.cols, constants=constants)
    c = torch.stack([gradient(f"c{b}", (frame.inner[0].size, frame.inner[1].size), 0, torch.float64) for b in range(3)])
    x = torch.stack([gradient(f"x{b}", (rows, cols), 0, torch.float64) for b in range(3)])
    for _, state in drive(frame, [0, 1, 2]):
        basis = selector.basis({k.removeprefix("selector."): v for k, v in state.items() if k.startswith("selector.")}, step)
        gate = torch.ones(3, 1, 1) if basis.gate is None else basis.gate[:, None, None]
        assert torch.allclose(project(lift(c, basis, rows, cols), basis), c * gate, atol=1e-9)
        if (frame.inner[0].size, frame.inner[1].size) == (rows, cols):
            assert torch.allclose(lift(project(x, basis), basis, rows, cols), x * gate, atol=1e-9)


def test_a_switch_keeps_its_rank() -> None:
    """The matrix has fewer rows than the rank."""
    drive(frame_of(pipeline_around_selector("switch", 3), 2, 5, 3), [0, 1])


@pytest.mark.parametrize("inside", ["adam", "ema"])
def test_dion_takes_rules_with_state(inside: str) -> None:
    """Their transport is `keep`, which needs no old basis."""
    drive(frame_of({"selector": {"kind": "dion", "rank": 2}, "inside": inside}, 5, 4, 2), [0, 1])


def test_a_gaussian_draw_says_that_it_is_not_orthonormal() -> None:
    assert not Pipeline.model_validate({"selector": {"kind": "random", "draw": "gaussian"}, "inside": "adam"}).selector.traits().orthonormal
    assert Pipeline.model_validate({"selector": "random", "inside": "adam"}).selector.traits().orthonormal


@every_preset
@settings(max_examples=5)
@given(rows=sides, cols=sides, rank=ranks)
def test_a_pipeline_runs_on_the_meta_device(preset: str, rows: int, cols: int, rank: int) -> None:
    """All results have the right shapes, and no tensor is made on another device."""
    for pipeline in small(preset, rank, every=2).pipelines.values():
        frame = Frame.of(pipeline, rows, cols)
        for (update, state), (real, values) in zip(drive(frame, [0, 1], "meta"), drive(frame, [0, 1]), strict=True):
            assert (update is None) == (real is None)
            if update is not None and real is not None:
                assert update.shape == real.shape
                assert update.device.type == "meta"
            assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in values.items()}


@every_preset
@settings(max_examples=6)
@given(rows=st.integers(2, 6), extra=st.integers(0, 1), rank=ranks)
def test_every_pipeline_treats_every_matrix_by_itself(preset: str, rows: int, extra: int, rank: int) -> None:
    for pipeline in small(preset, rank, every=2).pipelines.values():
        check_rows_are_independent(Frame.of(pipeline, rows, rows + (extra if preset not in DEGENERATE else 0)))


def test_every_family_has_its_kinds_under_test() -> None:
    assert {kind for kind, _ in PLACES["rule"]} | {"none"} == set(built_in("rule"))
    assert all(issubclass(cls, Rule) for cls in built_in("rule").values())
    assert all(issubclass(cls, Selector) for cls in built_in("selector").values())
    assert Dim("rows", 3).size == 3
