"""Numbers that follow schedules, and numbers that a parameter group sets: exact, resumed, the same on ranks, refused if wrong."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from common import copied, give, optimizer, parameters, small
from common import train as advance
from pool import run_ranks
from ranks import differences, make_zoo, mesh_of, place
from ranks import give as give_model
from test_sharding import shortened
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import subspace_opt
from subspace_opt import CheckpointError, Spec, SpecError, load_spec, registry
from subspace_opt.algebra import Basis, Dim, Order, Rule, Selector, SelectorTraits, Slot, State, Step
from subspace_opt.algebra.frame import Frame
from subspace_opt.algebra.pipeline import with_values
from subspace_opt.engine import moment
from subspace_opt.schedules import last_refresh
from subspace_opt.spec import json_schema, parse_spec

STEPS = 10
WARM = {"schedule": "linear", "from": 0.85, "to": 0.95, "over": 6}
FADE = {"schedule": "cosine", "from": 1.0, "to": 0.2, "over": 6}
BEND = {"schedule": "piecewise", "points": [[0, 0.5], [3, 0.9], [7, 0.6]]}
DROP = {"schedule": "exponential", "from": 1.0, "to": 0.01, "over": 8, "delay": 2}
GROW = {"schedule": "linear", "from": 1, "to": 5, "over": 8}


def line(a: float, b: float, part: float) -> float:
    return (1 - part) * a + part * b


def warm(n: int) -> float:
    return line(0.85, 0.95, min(n / 6, 1))


def fade(n: int) -> float:
    return line(1.0, 0.2, (1 - math.cos(math.pi * min(n / 6, 1))) / 2)


def bend(n: int) -> float:
    return line(0.5, 0.9, n / 3) if n < 3 else line(0.9, 0.6, min((n - 3) / 4, 1))


def drop(n: int) -> float:
    part = min(max(n - 2, 0) / 8, 1)
    return 0.01**part if 0 < part < 1 else 1.0 if part == 0 else 0.01


Curve = Callable[[int], float]

# preset, the path, the schedule, and its value after n updates, written by hand
CASES: dict[str, tuple[str, str, Any, Curve]] = {
    "momentum warm-up of Muon": ("muon", "matrix.momentum.beta", WARM, warm),
    "annealed complement of COSMOS": ("cosmos", "matrix.mix.complement", FADE, fade),
    "decay rate of COSMOS's selector": ("cosmos", "matrix.selector.beta", BEND, bend),
    "feedback of Trion": ("trion", "matrix.feedback", BEND, bend),
    "decay rate inside SOAP": ("soap", "matrix.inside.1.beta2", BEND, bend),
    "momentum of a fused kernel": ("adamw", "all.complement.beta1", BEND, bend),
    "weight of GaLore's inside": ("galore", "matrix.mix.inside", FADE, fade),
    "epsilon": ("fira", "matrix.inside.eps", DROP, drop),
    "learning rate of a pipeline": ("muon", "other.lr_scale", DROP, drop),
    "weight decay of a pipeline": ("muon", "matrix.decay_scale", FADE, fade),
}


def path_in(preset: str, path: str) -> str:
    """The path in a preset's only pipeline, whatever it is called, if the path names no pipeline of it."""
    name, _, rest = path.partition(".")
    pipelines = load_spec(preset).pipelines
    return f"{name if name in pipelines else next(iter(pipelines))}.{rest}"


def run(preset: str, overrides: dict[str, Any], by_hand: Callable[[int], dict[str, float]] | None = None) -> dict[str, Tensor]:
    """Weights after some steps. `by_hand`: the `values` of the group before each step."""
    params = parameters()
    opt = optimizer(load_spec(small(preset), overrides), params, lr=0.02, weight_decay=0.1)
    for step in range(STEPS):
        if by_hand is not None:
            opt.param_groups[0]["values"] = by_hand(step)
        give(params, step)
        opt.step()
    return {name: p.detach() for name, p in params.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_equals_the_number_set_by_hand_before_each_step(case: str) -> None:
    preset, path, schedule, curve = CASES[case]
    path = path_in(preset, path)
    # A first gradient of SOAP sets the basis only, and is not an update.
    primed = preset == "soap"
    followed = run(preset, {path: schedule})
    set_by_hand = run(preset, {}, lambda step: {path: curve(max(step - primed, 0))})
    assert equal(followed, set_by_hand)
    assert not equal(followed, run(preset, {path: curve(0)}))


@pytest.mark.parametrize("over", [1, 7, 300])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize(("start", "to"), [(0.7, 0.1), (0.01, 0.47), (0.28, 0.11)])
def test_a_ramp_begins_and_ends_exactly_and_stays_between(schedule: str, over: int, start: float, to: float) -> None:
    spec = load_spec("muon", {"matrix.momentum.beta": {"schedule": schedule, "from": start, "to": to, "over": over, "delay": 2}})
    at = spec.pipelines["matrix"].momentum[0].schedules["beta"].at
    values = [at(n) for n in range(over + 4)]
    assert values[:3] == [start] * 3
    assert values[-2:] == [to] * 2
    assert values == sorted(values, reverse=to < start)
    assert len(set(values)) == over + 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_round_off_does_not_leave_the_range(schedule: str) -> None:
    """A value outside both ends might be outside the field's range."""
    for value in (0.95, 0.1, 0.7):
        given = {"schedule": schedule, "from": value, "to": value, "over": 300}
        at = load_spec("muon", {"matrix.momentum.beta": given}).pipelines["matrix"].momentum[0].schedules["beta"].at
        assert {at(n) for n in range(301)} == {value}


def test_a_jump_of_a_piecewise_schedule() -> None:
    spec = load_spec("muon", {"matrix.momentum.beta": {"schedule": "piecewise", "points": [[2, 0.5], [5, 0.5], [6, 0.9]]}})
    at = spec.pipelines["matrix"].momentum[0].schedules["beta"].at
    assert [at(n) for n in range(9)] == [0.5] * 6 + [0.9] * 3


def test_muons_warm_up_over_300_updates() -> None:
    """Every value of the warm-up of the speed runs, as their training loop computes it."""
    at = load_spec("muon", {"matrix.momentum.beta": {**WARM, "over": 300}}).pipelines["matrix"].momentum[0].schedules["beta"].at
    for n in range(400):
        frac = min(n / 300, 1)
        assert at(n) == (1 - frac) * 0.85 + frac * 0.95


def test_adam_with_a_moving_beta_is_torchs_adam_whose_betas_are_set() -> None:
    """Bias correction takes the decay rate of the present update, as torch's own does."""
    params = {"w": nn.Parameter(torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))}
    others = copied(params)
    overrides = {"complement.beta1": BEND, "complement.beta2": {**WARM, "from": 0.9, "to": 0.99}}
    spec = load_spec("adamw", {path_in("adamw", f"all.{path}"): value for path, value in overrides.items()})
    opt = optimizer(spec, params, lr=0.1, weight_decay=0.0)
    eps = next(iter(spec.pipelines.values())).complement[0].model_dump()["eps"]
    ref = torch.optim.AdamW(others.values(), lr=0.1, weight_decay=0.0, eps=eps)
    for step in range(STEPS):
        give(params, step)
        give(others, step)
        ref.param_groups[0]["betas"] = (bend(step), line(0.9, 0.99, min(step / 6, 1)))
        opt.step()
        ref.step()
    torch.testing.assert_close(params["w"], others["w"], rtol=1e-12, atol=1e-12)


def test_parameters_of_different_counts_do_not_share_a_number() -> None:
    """`late` has the shape of `early`, begins two steps later, and follows its own count."""
    spec = load_spec(small("cosmos"), {"matrix.momentum.beta": WARM, "matrix.mix.complement": FADE})
    shapes = {"early": (7, 4), "late": (7, 4), "other": (7, 4)}

    def weights(names: tuple[str, ...]) -> dict[str, Tensor]:
        params = {name: p for name, p in parameters(shapes, torch.float64).items() if name in names}
        opt = optimizer(spec, params, lr=0.02)
        for step in range(STEPS):
            give(params, step, missing=("late",) if step < 2 else ("other",) if step == 4 else ())
            opt.step()
        return {name: p.detach() for name, p in params.items()}

    together = weights(tuple(shapes))
    for name in shapes:
        torch.testing.assert_close(together[name], weights((name,))[name], rtol=1e-12, atol=1e-12)


def test_updates_in_backward_follow_schedules() -> None:
    spec = load_spec(small("cosmos"), {"matrix.momentum.beta": WARM, "matrix.selector.every": GROW, "matrix.mix.complement": FADE})
    runs = []
    for make in (lambda *given, **options: subspace_opt.build(*given[::-1], **options), subspace_opt.step_in_backward):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 20))
        opt = make(model, spec, lr=0.01, stacking="never")
        for step in range(STEPS):
            x = torch.randint(0, 20, (16,), generator=torch.Generator().manual_seed(step))
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), x).backward()
            opt.step()
        runs.append({name: p.detach() for name, p in model.named_parameters()})
    assert equal(*runs)


# --------------------------------------------------------------------------------------------------------- growing `every`


def refreshes(selector: Selector, until: int) -> list[int]:
    return [t for t in range(1, until) if selector.refreshes(t)]


@pytest.mark.parametrize("offset", [0, 1, 3, 11])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("kind", ["svd", "kron_eigen"])
def test_a_schedule_that_does_not_change_refreshes_as_a_number_does(kind: str, every: int, offset: int) -> None:
    fixed, constant = (
        load_spec(
            {"pipelines": {"matrix": {"selector": {"kind": kind, "every": given, "offset": offset}, "inside": "adam"}}}
        ).pipelines["matrix"].selector
        for given in (every, {"schedule": "linear", "from": every, "to": every, "over": 9})
    )  # fmt: skip
    for t in range(1, 40):
        assert fixed.refreshes(t) == constant.refreshes(t)
        assert fixed.age(t) == constant.age(t)
    assert [fixed.period(t) for t in refreshes(fixed, 40)] == [constant.period(t) for t in refreshes(constant, 40)]


def test_each_refresh_says_when_the_next_one_comes() -> None:
    selector = load_spec(small("galore"), {"matrix.selector.every": GROW}).pipelines["matrix"].selector
    value = [math.floor(1 + 4 * min(n / 8, 1) + 0.5) for n in range(100)]
    expected = [1]
    while expected[-1] < 60:
        expected.append(expected[-1] + value[expected[-1] - 1])
    assert refreshes(selector, 60) == expected[:-1] == [1, 2, 4, 7, 11, 16, 21, 26, 31, 36, 41, 46, 51, 56]
    assert [selector.age(t) for t in range(1, 9)] == [1, 1, 2, 1, 2, 3, 1, 2]
    spread = load_spec(small("galore"), {"matrix.selector.every": {**GROW, "from": 4, "to": 9}, "matrix.selector.offset": "spread"})
    turns = {t: [s for s in range(1, 60) if spread.pipelines["matrix"].selector.refreshes(s, t)] for t in (0.0, 0.3, 0.9)}
    assert turns[0.0][:3] == [1, 5, 12]
    assert turns[0.3][:3] == [1, 4, 10]
    assert turns[0.9][:3] == [1, 2, 7]


def test_a_long_schedule_is_looked_up_at_once() -> None:
    every = (
        load_spec("galore", {"matrix.selector.every": {**GROW, "to": 200, "over": 20_000}}).pipelines["matrix"].selector.schedules["every"]
    )
    last, index = last_refresh(every, 0, 10**9)
    assert 10**9 - 200 < last <= 10**9
    assert last_refresh(every, 0, last - 1)[1] == index - 1


def bases(opt: Any, name: str, params: dict[str, nn.Parameter]) -> Tensor:
    return next(value for key, value in opt.state[params[name]].items() if key.endswith("selector.basis")).clone()


def test_a_step_takes_a_new_basis_when_the_schedule_says() -> None:
    assert steps_with_a_new_basis({}) == [1, 2, 4, 7, 11, 16]


def test_a_group_that_sets_every_wins_over_the_schedule() -> None:
    assert steps_with_a_new_basis({5: {"matrix.selector.every": 6}, 14: {}}) == [1, 2, 4, 7, 13, 16]


def steps_with_a_new_basis(values: dict[int, dict[str, float]]) -> list[int]:
    """The updates of a growing period that change the basis; `values`: what the group sets from a step on."""
    params = parameters({"tall": (7, 4)})
    opt = optimizer(load_spec(small("galore"), {"matrix.selector.every": GROW}), params, lr=0.02)
    seen, before = [], torch.zeros(())
    for step in range(20):
        if step in values:
            opt.param_groups[0]["values"] = values[step]
        give(params, step)
        opt.step()
        now = bases(opt, "tall", params)
        if not torch.equal(now, before):
            seen.append(step + 1)
        before = now
    return seen


def test_turns_of_whole_parameters_follow_a_growing_period() -> None:
    """Every parameter of FRUGAL's block mode has its turn when the length of a turn grows."""
    blocks = {"kind": "blocks", "every": {"schedule": "linear", "from": 2, "to": 4, "over": 6}, "share": 0.25}
    spec = load_spec({"pipelines": {"matrix": {"selector": blocks, "inside": "adam"}}})
    names = {f"w{i}": (4, 3) for i in range(4)}
    params = parameters(names)
    opt = optimizer(spec, params, lr=0.1)
    turns = []
    for step in range(14):
        before = {name: p.detach().clone() for name, p in params.items()}
        give(params, step)
        opt.step()
        turns.append([i for i, name in enumerate(names) if not torch.equal(before[name], params[name])])
    assert turns == [[0]] * 2 + [[1]] * 3 + [[2]] * 4 + [[3]] * 4 + [[0]]


# ------------------------------------------------------------------------------------------------------------------ resume

MIXED: dict[str, dict[str, Any]] = {
    "muon": {"matrix.momentum.beta": WARM},
    "cosmos": {"matrix.selector.every": GROW, "matrix.mix.complement": {**FADE, "to": 0.0}, "matrix.momentum.beta": WARM},
    "galore": {"matrix.selector.every": {**GROW, "from": 2}, "matrix.inside.beta1": BEND},
    "frugal": {
        "matrix.selector.every": {**GROW, "from": 2},
        "matrix.mix.complement": {**FADE, "to": 0.0},
    },  # moments that reset
    "soap": {"matrix.selector.every": GROW, "matrix.inside.1.beta2": BEND},
    "trion": {"matrix.feedback": BEND},
    "ldadam": {"matrix.inside.beta1": BEND},
}


def with_schedules(preset: str) -> Spec:
    return load_spec(small(preset), MIXED[preset])


@pytest.mark.parametrize("preset", MIXED)
def test_a_cut_goes_on_to_the_bit(preset: str) -> None:
    params = parameters()
    opt = optimizer(with_schedules(preset), params, lr=0.02)
    advance(opt, params, range(5))
    again = copied(params)
    resumed = optimizer(with_schedules(preset), again, lr=0.02)
    resumed.load_state_dict(opt.state_dict())
    advance(opt, params, range(5, 14))
    advance(resumed, again, range(5, 14))
    assert equal(params, again)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_schedule_is_refused() -> None:
    params = parameters()
    opt = optimizer(with_schedules("muon"), params)
    advance(opt, params, range(2))
    other = optimizer(load_spec(with_schedules("muon"), {"matrix.momentum.beta.to": 0.9}), params)
    with pytest.raises(CheckpointError, match=r"pipelines\.matrix\.momentum\.0\.beta\.to is 0\.95 there and 0\.9 here"):
        other.load_state_dict(opt.state_dict())
    with pytest.raises(CheckpointError, match=r"pipelines\.matrix\.momentum\.0\.beta is"):
        optimizer("muon", params).load_state_dict(opt.state_dict())


# ------------------------------------------------------------------------------------------------------------------- ranks


def on_ranks(kind: str) -> list[str]:
    """The parameters that differ from one process, with schedules and with numbers set at a step."""
    wrong = []
    for preset, overrides in MIXED.items():
        runs = []
        for where in (None, kind):
            model = make_zoo()
            if where is not None:
                place(model, kind, mesh_of(kind, dist.get_world_size()))
            group = dist.group.WORLD if where == "ddp" else None
            opt = subspace_opt.build(load_spec(shortened(preset), overrides), model, lr=1e-2, process_group=group)
            for step in range(STEPS):
                give_model(model, step)
                if "matrix.selector.every" in overrides and step >= 7:
                    opt.param_groups[0]["values"] = {"matrix.selector.every": 2}
                opt.step()
            runs.append(model)
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in differences(runs[1], runs[0]) if not gap < 1e-9]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_ranks_follow_schedules(kind: str) -> None:
    assert run_ranks(2, on_ranks, kind) == [[]] * 2


# -------------------------------------------------------------------------------------------------------------------- cost


class Calls(TorchDispatchMode):
    """The names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["muon", "cosmos", "galore"])
def test_a_schedule_adds_no_operation_and_reads_no_tensor(preset: str) -> None:
    seen = []
    overrides = {path: value for path, value in MIXED[preset].items() if not path.endswith("every")}
    for spec in (small(preset), load_spec(small(preset), overrides)):
        params = parameters()
        opt = optimizer(spec, params, lr=0.02)
        advance(opt, params, range(4))
        give(params, 4)
        moment._clock.cache_clear()
        with Calls() as calls:
            opt.step()
        seen.append(calls.names)
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_a_thousand_steps_keep_a_few_frames() -> None:
    over = {"schedule": "linear", "from": 0.5, "to": 0.9, "over": 1000}
    spec = load_spec(
        small("muon"), {"matrix.momentum.beta": over, "other.complement.beta1": over, "matrix.complement.eps": {**over, "from": 1e-7}}
    )
    params = parameters({"tall": (7, 4), "wide": (4, 7), "bias": (4,)})
    opt = optimizer(spec, params, lr=1e-3)
    frames = []
    for step in range(1000):
        give(params, step % 5)
        opt.step()
        if step in (50, 999):
            gc.collect()
            frames.append(sum(isinstance(thing, Frame) for thing in gc.get_objects()))
    assert frames[0] == frames[1]


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter  # late: importing dynamo takes seconds

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    opt = subspace_opt.build(load_spec("muon", {"matrix.momentum.beta": WARM}), model, lr=0.02, roles={"*.weight": "hidden"})

    def training_step(x: Tensor) -> None:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()

    counter = CompileCounter()
    compiled = torch.compile(training_step, backend=counter)
    graphs = []
    for step in range(6):
        compiled(torch.randn(3, 6, generator=torch.Generator().manual_seed(step)))
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[-1] == graphs[2]


# -------------------------------------------------------------------------------------------------------- part of the spec


@pytest.mark.parametrize("preset", MIXED)
def test_text_and_json_read_back_as_the_same_spec(preset: str) -> None:
    spec = with_schedules(preset)
    for full in (False, True):
        assert parse_spec(spec.to_yaml(full=full)) == spec
    again = Spec.model_validate_json(spec.to_json())
    assert again.pipelines == spec.pipelines
    assert again.to_json() == spec.to_json()
    assert load_spec(spec.model_dump(mode="json")) == spec
    assert spec != small(preset)


def test_a_schedule_is_shown() -> None:
    spec = with_schedules("muon")
    assert "beta={schedule: linear, from: 0.85, to: 0.95, over: 6}" in str(spec)
    params = parameters()
    row = optimizer(spec, params).explain().rows[0]
    assert row.why.endswith("; scheduled: momentum.beta")
    assert row.state_bytes == optimizer("muon", params).explain().rows[0].state_bytes


def test_overrides_reach_into_a_schedule() -> None:
    spec = load_spec(with_schedules("muon"), {"matrix.momentum.beta.to": 0.9, "matrix.momentum.beta.over": 3})
    assert spec.pipelines["matrix"].momentum[0].schedules["beta"].at(3) == 0.9
    plain = load_spec(spec, {"matrix.momentum.beta": 0.8})
    assert plain.pipelines["matrix"].momentum[0].schedules == {}


def test_the_schema_lets_every_number_follow_a_schedule() -> None:
    defs = json_schema()["$defs"]
    follows = {"$ref": "#/$defs/schedule"}
    assert follows in defs["rule.adam"]["properties"]["beta1"]["anyOf"]
    assert follows in defs["Mix"]["properties"]["complement"]["anyOf"]
    assert follows in defs["Pipeline"]["properties"]["feedback"]["anyOf"]
    assert follows in defs["selector.svd"]["properties"]["every"]["anyOf"]
    assert "schedule" not in json.dumps(defs["rule.muon"]["properties"]["steps"])
    assert set(defs["Ramp"]["properties"]) == {"schedule", "from", "to", "over", "delay"}


BETA = "matrix.momentum.beta"
BAD: list[tuple[dict[str, Any], str]] = [
    ({BETA: {**WARM, "to": 1.5}}, r"momentum\.beta\.to: should be less than 1, not 1\.5"),
    ({BETA: {**WARM, "from": -0.5}}, r"momentum\.beta\.from: should be greater than or equal to 0, not -0\.5"),
    ({BETA: {**BEND, "points": [[0, 0.5], [3, 1.0]]}}, r"beta\.points\.1\.1: should be less than 1, not 1\.0"),
    ({BETA: {**BEND, "points": [[3, 0.5], [3, 0.6]]}}, r"must be in increasing order of updates, and 3 comes after 3; sort them"),
    ({BETA: {**BEND, "points": []}}, r"beta\.points: "),
    ({BETA: {**WARM, "schedule": "lin"}}, r"beta\.schedule: should be linear, cosine, exponential or piecewise, not 'lin'"),
    ({BETA: {**WARM, "over": 0}}, r"beta\.over: should be greater than 0, not 0"),
    ({BETA: {**WARM, "until": 3}}, r"beta\.until: unknown key 'until'; known: delay, from, over, schedule, to"),
    ({BETA: {"from": 0.5, "to": 0.6, "over": 3}}, r"beta\.schedule: required, but missing"),
    ({BETA: {"schedule": "linear", "from": 0.5, "to": 0.6}}, r"beta\.over: required, but missing"),
    ({BETA: {**WARM, "to": "x"}}, r"beta\.to: should be a number, not 'x'"),
    ({BETA: {**DROP, "from": 0.0}}, r"`from` and `to` must be above 0; use `linear`"),
    ({"matrix.complement.steps": {**GROW}}, r"steps: this field cannot follow a schedule; only `every` and fields with fractions can"),
    ({"other.complement.beta1": {**WARM, "to": 0.0}}, r"complement\.beta1\.to: with 0\.0 here, .* would keep other state"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), BAD, ids=range(len(BAD)))
def test_a_bad_schedule_is_refused_with_its_place(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        load_spec("muon", overrides)


def test_a_whole_number_stays_whole() -> None:
    with pytest.raises(SpecError, match=r"selector\.every\.to: should be a whole number, not 2\.5"):
        load_spec("galore", {"matrix.selector.every": {**GROW, "to": 2.5}})
    with pytest.raises(SpecError, match=r"selector\.every\.from: should be greater than 0, not 0"):
        load_spec("galore", {"matrix.selector.every": {**GROW, "from": 0}})


def test_an_error_names_the_line() -> None:
    rule = ["kind: adam", "beta1:", "  schedule: linear", "  from: 0.5", "  over: 3", "  to: 2"]
    text = "\n".join(["pipelines:", "  matrix:", "    complement:", *("      " + line for line in rule)])
    with pytest.raises(SpecError, match=r"^<string>:9:9: pipelines\.matrix\.complement\.beta1\.to: should be less than 1, not 2"):
        parse_spec(text)


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.5), (4, 8), (0.5, 2)])
def test_ranks_cannot_follow_a_schedule(low: float, high: float) -> None:
    """A number that sizes state is found by the state, not by its name."""
    with pytest.raises(SpecError, match=r"selector\.rank\.to: with .* would keep other state"):
        load_spec("galore", {"matrix.selector.rank": {"schedule": "linear", "from": low, "to": high, "over": 9}})


def test_traits_cannot_follow_a_schedule() -> None:
    class Fickle(Rule):
        """Declares another trait for numbers above one half."""

        kind: Literal["fickle"] = "fickle"
        size: float = 0.1

        def traits(self, rows: Dim, cols: Dim) -> Any:
            return super().traits(rows, cols)._replace(scale_free=self.size > 0.5)

        def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
            return x * self.size, state

    registry.register(Fickle)
    try:
        for end, fits in ((0.4, True), (0.9, False)):
            rule = {"kind": "fickle", "size": {"schedule": "linear", "from": 0.1, "to": end, "over": 3}}
            spec = {"pipelines": {"matrix": {"complement": rule}}}
            if fits:
                assert load_spec(spec).pipelines["matrix"].complement[0].schedules["size"].at(3) == end
            else:
                with pytest.raises(SpecError, match=r"complement\.size\.to: with 0\.9 here, .* declare other traits"):
                    load_spec(spec)
    finally:
        registry.unregister(Fickle)


def test_a_plugins_selector_follows_schedules_too() -> None:
    class First(Selector):
        """The first columns, times a number."""

        kind: Literal["first_columns"] = "first_columns"
        turn: float = 1.0

        @cached_property
        def twice(self) -> float:
            return 2 * self.turn

        def traits(self) -> SelectorTraits:
            return SelectorTraits(decomposes=False)

        def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
            return rows, Dim("first", 2)

        def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
            return {"basis": Slot((cols, Dim("first", 2))), "seen": Slot(())}

        def basis(self, state: State, step: Step) -> Basis:
            return Basis(right=state["basis"])

        def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
            eye = torch.eye(x.size(-1), 2, dtype=x.dtype).expand(x.size(0), -1, -1)
            return {**state, "basis": eye, "seen": torch.full_like(state["seen"], self.turn)}, None

    registry.register(First)
    try:
        selector = {"kind": "first_columns", "every": GROW, "turn": {"schedule": "linear", "from": 0, "to": 10, "over": 10}}
        params = parameters({"tall": (7, 4)})
        opt = optimizer(load_spec({"pipelines": {"matrix": {"selector": selector, "inside": "adam"}}}), params, lr=0.01)
        seen = []
        for step in range(8):
            give(params, step)
            opt.step()
            seen.append(float(opt.state[params["tall"]]["selector.seen"]))
        assert seen == [0, 1, 1, 3, 3, 3, 6, 6]
        pipeline = load_spec({"pipelines": {"matrix": {"selector": selector, "inside": "adam"}}}).pipelines["matrix"]
        assert pipeline.selector.twice == 0  # type: ignore[attr-defined]
        assert with_values(pipeline, (("selector.turn", 5.0),)).selector.twice == 10  # type: ignore[attr-defined]
    finally:
        registry.unregister(First)


# ------------------------------------------------------------------------------------------------------ values of a group


def test_values_of_a_group_win_over_schedules_and_momentum() -> None:
    for others in ({}, {"momentum": 0.5}):
        params = parameters()
        opt = optimizer(with_schedules("muon"), params, lr=0.02)
        opt.param_groups[0].update(others, values={BETA: 0.7})
        advance(opt, params, range(6))
        assert equal({n: p for n, p in params.items() if p.ndim == 2}, run_to("muon", {BETA: 0.7}, 6))


def test_momentum_of_a_group_wins_over_schedules() -> None:
    params = parameters()
    opt = optimizer(with_schedules("muon"), params, lr=0.02)
    opt.param_groups[0]["momentum"] = 0.7
    advance(opt, params, range(6))
    assert equal({n: p for n, p in params.items() if p.ndim == 2}, run_to("muon", {BETA: 0.7}, 6))


def run_to(preset: str, overrides: dict[str, Any], steps: int) -> dict[str, Tensor]:
    params = parameters()
    advance(optimizer(load_spec(small(preset), overrides), params, lr=0.02), params, range(steps))
    return {name: p.detach() for name, p in params.items() if p.ndim == 2}


def test_values_are_saved_and_loaded_as_copies() -> None:
    params = parameters()
    opt = optimizer("cosmos", params, lr=0.02)
    opt.param_groups[0]["values"] = {"matrix.mix.complement": 0.5, "matrix.selector.every": 2}
    advance(opt, params, range(4))
    saved = opt.state_dict()
    again = copied(params)
    resumed = optimizer("cosmos", again, lr=0.02)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["values"] == {"matrix.mix.complement": 0.5, "matrix.selector.every": 2}
    advance(opt, params, range(4, 8))
    advance(resumed, again, range(4, 8))
    assert equal(params, again)  # type: ignore[arg-type]
    opt.param_groups[0]["values"]["matrix.mix.complement"] = 0.1
    assert saved["param_groups"][0]["values"]["matrix.mix.complement"] == 0.5
    assert resumed.param_groups[0]["values"]["matrix.mix.complement"] == 0.5
    assert "'matrix.mix.complement': 0.1" in repr(opt)
    resumed.param_groups[0]["values"]["matrix.mix.complement"] = 0.2
    assert saved["param_groups"][0]["values"]["matrix.mix.complement"] == 0.5


def test_a_value_changed_in_place_counts_at_once() -> None:
    runs = []
    for change in (0.5, None):
        params = parameters()
        opt = optimizer("cosmos", params, lr=0.02)
        opt.param_groups[0]["values"] = {"matrix.mix.complement": 1.0}
        advance(opt, params, range(2))
        if change is not None:
            opt.param_groups[0]["values"]["matrix.mix.complement"] = change
        advance(opt, params, range(2, 4))
        runs.append({name: p.detach() for name, p in params.items()})
    assert not equal(*runs)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
def test_a_weight_of_0_keeps_the_state_of_the_complement(weights: list[float]) -> None:
    """The complement's rules go on while their weight is 0, by a schedule or by a group."""
    points = [[n, value] for n, value in enumerate(weights)]
    spec = load_spec(small("fira"), {"matrix.mix.complement": {"schedule": "piecewise", "points": points}})
    params, others = parameters(), parameters()
    one, other = optimizer(spec, params, lr=0.02), optimizer("fira", others, lr=0.02)
    for step, value in enumerate(weights):
        other.param_groups[0]["values"] = {"matrix.mix.complement": value}
        for some, opt in ((params, one), (others, other)):
            give(some, step)
            opt.step()
    assert equal(params, others)  # type: ignore[arg-type]


WRONG: list[tuple[Any, str]] = [
    ({"matrx.momentum.beta": 0.9}, r"'matrx\.momentum\.beta' of spec 'muon': no pipeline is named 'matrx'; did you mean 'matrix'\?"),
    ({"matrix.momentum.bet": 0.9}, r"this path leads to no number that may change; did you mean 'momentum\.beta'\?"),
    ({"matrix.complement.steps": 4}, r"leads to no number that may change"),
    ({BETA: 1.5}, r"1\.5 cannot be used: it should be less than 1"),
    ({BETA: math.nan}, r"nan cannot be used: it should be a finite number"),
    ({BETA: "0.9"}, r"give a dotted path and a number of Python"),
    ({BETA: torch.tensor(0.9)}, r"give a dotted path and a number of Python"),
    ({"other.complement.beta1": 0.0}, r"0\.0 would change the state that the rules keep"),
    ([0.9], r"it must be a mapping, such as"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), WRONG, ids=range(len(WRONG)))
def test_bad_values_are_refused_at_once_and_at_a_step(values: Any, said: str) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=said):
        subspace_opt.SubspaceOptimizer([{"params": list(params.items()), "values": values}], "muon", roles={"*": "hidden"})
    opt = optimizer("muon", params)
    before = {name: p.detach().clone() for name, p in params.items()}
    opt.param_groups[0]["values"] = values
    give(params, 0)
    with pytest.raises(ValueError, match=said):
        opt.step()
    assert equal(before, params)  # type: ignore[arg-type]


def test_a_weight_without_state_cannot_be_turned_on() -> None:
    params = parameters()
    opt = optimizer(load_spec(small("cosmos"), {"matrix.mix.complement": 0.0}), params)
    opt.param_groups[0]["values"] = {"matrix.mix.complement": 0.5}
    give(params, 0)
    with pytest.raises(ValueError, match="the spec gives this weight 0, so that part of the update has no state"):
        opt.step()
