"""Does each option of a kind compute its equations, and the same in a stack, on several ranks and after a resume?"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import LINEAR, Params, copied, give, gradient, parameters, same, snapshot, train
from plain import Plain
from pool import run_ranks
from ranks import differences, make_zoo, mesh_of, place, whole_weights
from ranks import give as give_shards
from test_state_dtype import LARGE
from test_strategies import STRATEGIES
from torch import Tensor, nn

import subspace_opt
from subspace_opt import SubspaceOptimizer, load_spec
from subspace_opt.integrations.measures import captured_energy
from subspace_opt.lab.run.measure import measured_bytes
from subspace_opt.plan.views import make_view
from subspace_opt.selectors.fft import Fft

LR, DECAY, STEPS = 0.02, 0.1, 9
SHAPES = {"tall": (7, 4), "mate": (7, 4), "wide": (4, 7), "square": (5, 5)}
ALL: dict[str, tuple[int, ...]] = {**SHAPES, "experts": (2, 4, 3), "bias": (4,)}

Memory = dict[str, Tensor]


def spec(**pipeline: Any) -> dict[str, Any]:
    """A spec that sends every parameter through one pipeline."""
    return {"name": "option", "pipelines": {"all": pipeline}, "routes": [{"use": "all"}]}


COSMOS = {
    "momentum": {"kind": "heavy_ball", "beta": 0.9, "nesterov": True, "debias": True},
    "selector": {"kind": "eigen", "rank": 3},
    "complement": {"kind": "muon"},
    "mix": {"complement": 0.2},
    "finish": {"kind": "rms_normalize", "scale": 0.2},
}

# One row for each option, with settings that change state or algorithm.
OPTIONS: dict[str, dict[str, Any]] = {
    "adam amsgrad": spec(complement={"kind": "adam", "beta2": 0.5, "amsgrad": True}),
    "adam amsgrad inside": spec(
        orient="short",
        selector={"kind": "svd", "rank": 3, "every": 3},
        inside={"kind": "adam", "beta2": 0.5, "amsgrad": True, "on_refresh": "project"},
        complement="sgd",
    ),
    "soap amsgrad": spec(**COSMOS, inside={"kind": "soap", "beta2": 0.5, "amsgrad": True}),
    "soap amsgrad, own rotation": spec(
        orient="short", selector={"kind": "svd", "rank": 3, "every": 3}, inside={"kind": "soap", "beta2": 0.5, "amsgrad": True}
    ),
    "learned, follows the rate": spec(
        orient="short", selector={"kind": "learned", "rank": 2, "lr": 0.1, "base_lr": 0.01, "init": "exact"}, inside="adam"
    ),
    "learned by lion": spec(
        orient="short",
        selector={"kind": "learned", "rank": 2, "optimizer": "lion", "beta2": 0.99, "base_lr": 0.02, "init": "exact"},
        inside="adam",
    ),
    "random dictionary": spec(
        orient="short",
        feedback=0.0,
        selector={"kind": "fft", "rank": 2, "dictionary": "random", "ranking": "l1", "weighted": True, "every": 2},
        inside={"kind": "adam", "on_refresh": "project"},
    ),
    "weighted ranking by fft": spec(
        orient="short",
        feedback=0.9,
        selector={"kind": "fft", "rank": 2, "transform": "fft", "ranking": "l1", "weighted": True},
        inside={"kind": "orthogonalize", "method": "svd"},
    ),
    "spectral bound": spec(complement={"kind": "muon", "bound": "spectral", "norm": "none"}),
    "schatten-4 bound": spec(complement={"kind": "muon", "bound": "schatten4", "coefficients": "quintic"}),
    "aol": spec(complement={"kind": "orthogonalize", "bound": "aol", "coefficients": "aol", "steps": 4}),
    "dampening": spec(complement={"kind": "heavy_ball", "beta": 0.9, "dampening": 0.8}),
    "dampening, int8": spec(complement={"kind": "heavy_ball", "beta": 0.9, "dampening": 0.8, "state": "int8"}),
    "golore as momentum sgd": spec(
        orient="short",
        selector={"kind": "switch", "every": 3, "at": 4, "first": {"kind": "svd", "rank": 2}, "then": {"kind": "random", "rank": 2}},
        inside={"kind": "heavy_ball", "beta": 0.9, "dampening": 0.8, "on_refresh": "project"},
        mix={"inside": 0.25},
    ),
    "dampening, reset": spec(
        orient="short",
        selector={"kind": "svd", "rank": 3, "every": 3},
        inside={"kind": "heavy_ball", "dampening": 0.8, "on_refresh": "reset"},
    ),
    "scale by the weight's sides": spec(
        orient="long",
        selector={"kind": "svd", "rank": 3, "every": 3},
        inside=["heavy_ball", {"kind": "scale", "by": "spectral", "sides": "weight"}],
        complement={"kind": "scale", "by": "keller", "sides": "weight"},
    ),
}
MERGED = {"conv": (2, 3, 3, 3), "twin": (2, 3, 3, 3), "whole": (2, 2, 2, 2)}


def merging(most: int, preset: str = "soap", **overrides: Any) -> subspace_opt.Spec:
    """A preset whose matrix pipeline takes every parameter of two or more dimensions, with neighbours joined up to `most`."""
    routes = [{"use": "matrix", "view": "modes", "merge": most, "min_dims": 2}, {"use": "other"}]
    values = {"routes": routes, **{f"matrix.{key.replace('__', '.')}": value for key, value in overrides.items()}}
    return load_spec(preset, values)


OPTIONS["merged dimensions"] = spec(complement="adam", selector="none")
OPTIONS["merged dimensions"]["routes"] = [{"use": "all", "view": "modes", "merge": 60}]
OPTIONS["merged dimensions of a subspace"] = spec(
    orient="short", selector={"kind": "svd", "rank": 2, "every": 3}, inside="adam", complement="sgd"
)
OPTIONS["merged dimensions of a subspace"]["routes"] = [{"use": "all", "view": "modes", "merge": 20}]
each_option = pytest.mark.parametrize("name", OPTIONS)


def made(given: Any, params: Params, **options: Any) -> SubspaceOptimizer:
    return SubspaceOptimizer(params.items(), given, modules=dict.fromkeys(params, LINEAR), **{"lr": LR, "weight_decay": DECAY, **options})


# ------------------------------------------------------------------------------------------------------------ promises of the engine


@each_option
def test_every_strategy_is_the_plain_frame(name: str) -> None:
    start, plain, wrong = parameters(ALL, torch.float64), None, []
    for strategy, (options, prepare) in STRATEGIES.items():
        own = copied(start)
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch)
            opt = made(OPTIONS[name], own, **options)
            train(opt, own, range(5))
        if plain is None:
            plain = Plain(opt.plan, start, LR, DECAY)
            for step in range(5):
                give(start, step)
                plain.step({key: p.grad for key, p in start.items() if p.grad is not None})
        for key, p in own.items():
            far = float((p.detach() - plain.weights[key]).abs().max() / plain.weights[key].abs().max())
            wrong += [f"{strategy}: {key} is off by {far:.1e}"] * (not far <= 1e-9)
    assert not wrong, "\n".join(wrong)


@each_option
@pytest.mark.parametrize(("dtype", "word"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "bf16")], ids=str)
def test_every_cut_goes_on_to_the_bit(name: str, dtype: torch.dtype, word: Any) -> None:
    params = parameters(ALL, dtype)
    opt = made(OPTIONS[name], params, state_dtype=word)
    for cut in range(6):
        saved = copy.deepcopy({"optimizer": opt.state_dict(), "params": {n: p.detach() for n, p in params.items()}})
        others = parameters(ALL, dtype, seed=7)
        resumed = made(OPTIONS[name], others, lr=0.5, state_dtype=word)
        torch.manual_seed(100 + cut)
        train(resumed, others, range(1), seed=9)
        with torch.no_grad():
            for key, p in others.items():
                p.copy_(saved["params"][key])
        resumed.load_state_dict(saved["optimizer"])
        train(resumed, others, range(cut, cut + 2))
        train(opt, params, range(cut, cut + 1))
        ahead = copied(params)
        twin = made(OPTIONS[name], ahead, state_dtype=word)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(twin, ahead, range(cut + 1, cut + 2))
        assert same(snapshot(resumed, others), snapshot(twin, ahead)), f"cut at {cut}"


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("word", [None, "bf16", "8bit", "4bit"])
def test_planned_bytes_are_allocated_bytes(name: str, word: Any, dtype: torch.dtype) -> None:
    params = parameters(LARGE, dtype)
    opt = made(OPTIONS[name], params, state_dtype=word)
    train(opt, params, range(4))
    assert measured_bytes(opt) == opt.plan.total_bytes
    assert all(bool(p.isfinite().all()) for p in params.values())


def zoo(given: Any, kind: str | None, steps: int = 6) -> tuple[nn.Module, SubspaceOptimizer]:
    model = make_zoo()
    group = torch.distributed.group.WORLD if kind == "ddp" else None
    if kind is not None:
        place(model, kind, mesh_of(kind, torch.distributed.get_world_size()))
    opt = subspace_opt.build(given, model, lr=1e-2, weight_decay=DECAY, process_group=group)
    for step in range(steps):
        give_shards(model, step)
        opt.step()
    return model, opt


def far_from_one_process(kind: str, alone: dict[str, dict[str, Tensor]]) -> list[str]:
    wrong = []
    for name, weights in alone.items():
        model, opt = zoo(OPTIONS[name], kind)
        wrong += [f"{name}: {key} differs by {gap:.1e}" for key, gap in differences(model, weights) if not gap < 1e-9]
        planned = sum(sharding.bytes_held(group.rank) for group, sharding in opt._shardings().values())
        wrong += [f"{name}: {planned} bytes planned, {measured_bytes(opt)} held"] * (planned != measured_bytes(opt))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp", "tp"])
def test_ranks_equal_one_process(kind: str) -> None:
    alone = {name: whole_weights(zoo(given, None)[0]) for name, given in OPTIONS.items()}
    assert run_ranks(2, far_from_one_process, kind, alone) == [[]] * 2


# ------------------------------------------------------------------------------------------------------------ the page of settings

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
ROW = re.compile(r"^\| .+ \| `([\w-]+)` \| `(\{.+\})` \|$", re.MULTILINE)


@pytest.mark.parametrize(("preset", "overrides"), ROW.findall(PAGE.read_text(encoding="utf-8")))
def test_settings_of_the_page_are_specs(preset: str, overrides: str) -> None:
    values = yaml.safe_load(overrides)
    changed = load_spec(preset, values)
    assert changed.pipelines != load_spec(preset).pipelines or changed.routes != load_spec(preset).routes
    params = parameters(ALL)
    opt = SubspaceOptimizer(params.items(), changed, modules=dict.fromkeys(params, LINEAR))
    train(opt, params, range(3))
    assert all(bool(p.isfinite().all()) for p in params.values())


# --------------------------------------------------------------------------------------------------------------------- equations


def rate(t: int) -> float:
    """A schedule of the learning rate with a warm-up and a decay."""
    return LR * (t / 3 if t < 3 else 0.5 ** (t - 3))


def follows(
    given: Any,
    formula: Callable[[Tensor, Tensor, int, Memory], Tensor],
    *,
    start: int = 1,
    tolerance: float = 1e-10,
    rates: Callable[[int], float] = lambda t: LR,
) -> None:
    """Assert that an optimizer makes the updates of a formula: (weight, gradient, number of the update, memory) -> new weight.

    Args:
        start: The number of the gradient that makes the first update.
        rates: The learning rate by the number of the gradient.
    """
    params = parameters(SHAPES, torch.float64)
    opt = made(given, params)
    weights = {name: p.detach().clone() for name, p in params.items()}
    memories: dict[str, Memory] = {name: {} for name in params}
    for t in range(1, STEPS + 1):
        give(params, t)
        opt.param_groups[0]["lr"] = rates(t)
        opt.step()
        for name, p in params.items():
            before = weights[name]
            if t >= start:
                weights[name] = formula(before, gradient(name, SHAPES[name], t, torch.float64), t - start + 1, memories[name])
            gap = (p.detach() - weights[name]).norm() / (weights[name] - before).norm().clamp_min(1e-300)
            assert gap <= tolerance, f"{name}, update {t}: {gap:.1e}"


@pytest.mark.parametrize("kernel", [True, False])
def test_adam_with_amsgrad_is_torchs(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr("subspace_opt.engine.fused.fits_kernel", lambda item: False)
        monkeypatch.setattr("subspace_opt.rules.adaptive.Adam._fits", lambda *given: False)
    ours, theirs = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    opt = made(OPTIONS["adam amsgrad"], ours)
    other = torch.optim.AdamW(theirs.values(), lr=LR, betas=(0.9, 0.5), weight_decay=DECAY, amsgrad=True)
    train(opt, ours, range(STEPS))
    train(other, theirs, range(STEPS))
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-13)
        torch.testing.assert_close(opt.state[p]["complement.max_exp_avg_sq"], other.state[theirs[name]]["max_exp_avg_sq"])


def test_soap_with_amsgrad_divides_by_the_largest_second_moment() -> None:
    """Without a rotation SOAP is Adam that starts at the second gradient."""
    identity = {"kind": "kron_eigen", "max_dim": 1}
    inside = [{"kind": "ema", "beta": 0.9}, {"kind": "soap", "beta2": 0.5, "eps": 1e-3, "amsgrad": True}]

    def formula(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
        v = memory["v"] = 0.5 * memory.get("v", 0.0) + 0.5 * g * g
        top = memory["top"] = torch.maximum(memory.get("top", torch.zeros_like(v)), v)
        return w * (1 - LR * DECAY) - LR * m / ((top / (1 - 0.5**t)).sqrt() + 1e-3)

    follows(spec(selector=identity, inside=inside), formula, start=2)


def leading(g: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(g)[2][:rank].mT


@pytest.mark.parametrize("by", ["moonshot", "keller", "spectral"])
@pytest.mark.parametrize("orient", ["left", "right", "short", "long"])
def test_a_scale_inside_may_take_the_sides_of_the_weight(orient: str, by: str) -> None:
    """SUMO's scale is 0.2 sqrt(max(m, n)) of the weight, on whichever side the basis is."""
    inside = {"kind": "scale", "by": by, "factor": 0.2, "sides": "weight"}
    selector = {"kind": "svd", "method": "exact", "rank": 2, "every": 4}

    def formula(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        m, n = w.shape
        left = {"left": True, "right": False, "short": m < n, "long": m > n}[orient]
        if (t - 1) % 4 == 0:
            memory["u"] = leading(g.mT if left else g, 2)
        u = memory["u"]
        kept = u @ u.mT @ g if left else g @ u @ u.mT
        size = {"moonshot": max(m, n) ** 0.5, "keller": max(1.0, m / n) ** 0.5, "spectral": (m / n) ** 0.5}[by]
        return w * (1 - LR * DECAY) - LR * 0.2 * size * kept

    follows(spec(orient=orient, selector=selector, inside=inside), formula)


def test_dampening_is_torchs() -> None:
    ours, theirs = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    opt = made(OPTIONS["dampening"], ours, weight_decay=0.0)
    other = torch.optim.SGD(theirs.values(), lr=LR, momentum=0.9, dampening=0.8)
    train(opt, ours, range(STEPS))
    train(other, theirs, range(STEPS))
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-13)


def test_golore_as_momentum_sgd() -> None:
    """`M <- beta M U_old' U + (1 - d) G U`, `W <- W (1 - lr wd) - lr scale M U'`; U by an SVD up to update 4, then a random draw."""
    params = parameters(SHAPES, torch.float64)
    opt = made(OPTIONS["golore as momentum sgd"], params)
    kept: dict[str, Memory] = {name: {} for name in params}
    for t in range(1, STEPS + 1):
        before = {name: p.detach().clone() for name, p in params.items()}
        give(params, t)
        opt.step()
        for name, p in params.items():
            left, memory = p.size(0) < p.size(1), kept[name]
            assert p.grad is not None
            g = p.grad.mT if left else p.grad
            u = opt.state[p]["selector.basis"].clone()  # orthonormal, and on the leading directions up to update 4
            torch.testing.assert_close(u.mT @ u, torch.eye(2, dtype=u.dtype), rtol=0, atol=1e-12)
            if t == 1:
                memory["m"] = g @ u
            else:
                memory["m"] = 0.9 * memory["m"] @ memory["u"].mT @ u + 0.2 * g @ u
            if t in (1, 4):
                assert (g @ u).norm() > 0.95 * torch.linalg.svdvals(g)[:2].norm()
            memory["u"] = u
            update = 0.25 * memory["m"] @ u.mT
            expected = before[name] * (1 - LR * DECAY) - LR * (update.mT if left else update)
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-13)


def slope(u: Tensor, g: Tensor) -> Tensor:
    """The gradient of `|G U U' - G|_F^2` in U, by autograd."""
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad((g @ u @ u.mT - g).square().sum(), u)
    return found


def adamw_step(u: Tensor, d: Tensor, t: int, lr: float, memory: Memory) -> Tensor:
    m = memory["basis m"] = 0.9 * memory.get("basis m", 0.0) + 0.1 * d
    v = memory["basis v"] = 0.999 * memory.get("basis v", 0.0) + 0.001 * d * d
    return u - lr * 0.01 * u - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def lion_step(u: Tensor, d: Tensor, t: int, lr: float, memory: Memory) -> Tensor:
    m = memory.get("basis m", torch.zeros_like(d))
    memory["basis m"] = 0.99 * m + 0.01 * d
    return u - lr * 0.1 * u - lr * torch.sign(0.9 * m + 0.1 * d)


BASIS_STEPS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor, int, float, Memory], Tensor]]] = {
    "adamw": ({}, adamw_step),
    "sgd": ({}, lambda u, d, t, lr, memory: u - lr * d),
    "lion": ({"beta2": 0.99, "weight_decay": 0.1}, lion_step),
}


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("optimizer", BASIS_STEPS)
def test_online_subspace_descent(optimizer: str, scheduled: bool) -> None:
    """The basis of one update is the step from that of the update before, with the rate `lr lr_t / lr_0` or `lr`."""
    fields, step = BASIS_STEPS[optimizer]
    selector = {"kind": "learned", "rank": 2, "init": "exact", "lr": 0.2, "optimizer": optimizer, **fields}
    if scheduled:
        selector["base_lr"] = LR

    def formula(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        left = w.size(0) < w.size(1)
        x = g.mT if left else g
        u = memory["u"] if t > 1 else leading(x, 2)
        c = x @ u
        m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * c
        v = memory["v"] = 0.95 * memory.get("v", 0.0) + 0.05 * c * c
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6) @ u.mT
        inner = 0.2 * rate(t) / LR if scheduled else 0.2
        memory["u"] = step(u, slope(u, x / x.norm()), t - 1, inner, memory) if t > 1 else u
        return w * (1 - rate(t) * DECAY) - rate(t) * (update.mT if left else update)

    follows(spec(orient="short", selector=selector, inside={"kind": "adam", "beta2": 0.95, "eps": 1e-6}), formula, rates=rate)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_groups_of_different_rates_keep_their_bases_apart(as_tensor: bool) -> None:
    """Matrices of one shape, in groups with different rates, move as each would alone."""
    given, ends = OPTIONS["learned, follows the rate"], []
    for together in (True, False):
        params = parameters({"tall": (7, 4), "mate": (7, 4)}, torch.float64)
        rates = {"tall": 0.02, "mate": 0.005}
        lrs: dict[str, Any] = {name: torch.tensor(lr) for name, lr in rates.items()} if as_tensor else dict(rates)
        groups = [{"params": [(name, p)], "lr": lrs[name]} for name, p in params.items()]
        modules = dict.fromkeys(params, LINEAR)
        sets = [groups] if together else [[group] for group in groups]
        opts = [SubspaceOptimizer(some, given, modules=modules, stacking="always") for some in sets]
        for step in range(5):
            give(params, step)
            for opt in opts:
                opt.step()
        ends.append({name: p.detach() for name, p in params.items()})
    assert same(*ends)


def test_a_reset_momentum_begins_with_the_whole_signal() -> None:
    def formula(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        left = w.size(0) < w.size(1)
        x = g.mT if left else g
        if (t - 1) % 3 == 0:
            memory["u"] = leading(x, 3)
            memory["m"] = x @ memory["u"]
        else:
            memory["m"] = 0.95 * memory["m"] + 0.2 * x @ memory["u"]
        update = memory["m"] @ memory["u"].mT
        return w * (1 - LR * DECAY) - LR * (update.mT if left else update)

    follows(load_spec(OPTIONS["dampening, reset"], {"all.selector.method": "exact"}), formula)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("dictionary", "transform"), [("random", "table"), ("dct2", "table"), ("dct2", "fft"), ("dct3", "table"), ("dct3", "fft")]
)
def test_dct_adamw_with_any_dictionary(dictionary: str, transform: str, weighted: bool) -> None:
    """Adam on the columns of `A Q` with the largest norms (times those of the atoms); moments stay with their atoms."""
    selector = {
        "kind": "fft",
        "rank": 2,
        "dictionary": dictionary,
        "transform": transform,
        "ranking": "l1",
        "weighted": weighted,
        "every": 2,
    }
    given = spec(orient="short", feedback=0.0, selector=selector, inside={"kind": "adam", "on_refresh": "project"})
    tables = {n: table_of(dictionary, n) for n in (4, 5)}

    def formula(w: Tensor, g: Tensor, t: int, memory: Memory) -> Tensor:
        left = w.size(0) < w.size(1)
        a = (g.mT if left else g) + memory.get("e", 0.0)
        q = tables[a.size(1)]
        if (t - 1) % 2 == 0:
            size = (a @ q).abs().sum(0) * (q.abs().sum(0) if weighted else 1.0)
            memory["chosen"] = torch.zeros(a.size(1), dtype=a.dtype).index_fill(0, size.topk(2).indices, 1.0)
        chosen = memory["chosen"]  # moments of all atoms; those of atoms that are not chosen are 0
        c = a @ q * chosen
        memory["e"] = a - c @ q.mT
        m = memory["m"] = (0.9 * memory.get("m", torch.zeros_like(c)) + 0.1 * c) * chosen
        v = memory["v"] = (0.999 * memory.get("v", torch.zeros_like(c)) + 0.001 * c * c) * chosen
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) @ q.mT
        return w * (1 - LR * DECAY) - LR * (update.mT if left else update)

    follows(given, formula)


def table_of(dictionary: str, n: int) -> Tensor:
    """The atoms as columns: cosines by their formula, or the random matrix that an optimizer of seed 0 has for this width."""
    if dictionary == "random":
        return drawn_table(n, seed=0)
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = (2 / n) ** 0.5 * torch.cos(torch.pi * i * (2 * j + 1) / (2 * n))
    rows[0] *= 0.5**0.5  # row i is atom i of the DCT-II
    return rows.mT if dictionary == "dct2" else rows


def drawn_table(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    params = parameters({"w": (n + 3, n)}, dtype)
    opt = made(OPTIONS["random dictionary"], params, seed=seed)
    train(opt, params, range(1))
    (found,) = opt._memory.tables.values()
    return found


def test_the_random_dictionary_depends_on_seed_and_width_alone() -> None:
    before = torch.random.get_rng_state()
    one = drawn_table(6, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(one.mT @ one, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(one, drawn_table(6, seed=3))
    assert torch.equal(one.float(), drawn_table(6, seed=3, dtype=torch.float32))
    assert not torch.allclose(one, drawn_table(6, seed=4))
    assert not torch.allclose(one[:5, :5], drawn_table(5, seed=3))


def test_the_captured_energy_is_that_in_the_optimizers_dictionary() -> None:
    params = parameters({"w": (7, 4)}, torch.float64)
    opt = made(OPTIONS["random dictionary"], params, seed=3)
    train(opt, params, range(1))
    (q,), g = opt._memory.tables.values(), params["w"].grad
    assert g is not None
    inside = (g @ q)[:, opt.state[params["w"]]["selector.index"]]
    assert captured_energy(opt)["w"] == pytest.approx(float((inside.norm() / g.norm()) ** 2), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ranking_in_bfloat16_first_takes_the_same_weighted_columns(seed: int) -> None:
    selector = Fft(rank=16, dictionary="dct2", ranking="l1", weighted=True)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(seed))
    atoms = table_of("dct2", 64).float()
    exact = ((x @ atoms).abs().sum(-2) * atoms.abs().sum(0)).topk(16).indices.sort().values
    assert torch.equal(selector._chosen_roughly(x, atoms, 16).sort().values, exact)


@pytest.mark.parametrize(
    ("shape", "most", "rows", "cols", "modes"),
    [
        ((6, 4, 3, 3), 64, 24, 9, ()),
        ((6, 4, 3, 3), 10, 6, 36, (4, 9)),
        ((6, 4, 3, 3), 1, 6, 36, (4, 3, 3)),
        ((6, 4, 3, 3), 216, 1, 216, ()),
        ((50, 1, 3, 3), 10, 50, 9, ()),
        ((1, 50, 3, 3), 10, 50, 9, ()),
        ((1, 1), 5, 1, 1, ()),
        ((4, 5), 20, 1, 20, ()),
        ((4, 5), 19, 4, 5, ()),
    ],
    ids=str,
)
def test_dimensions_are_joined_as_by_the_authors(shape: tuple[int, ...], most: int, rows: int, cols: int, modes: tuple[int, ...]) -> None:
    """The authors multiply sizes from the left while the product is at most `max_precond_dim`; sizes of 1 get no dimension."""
    view = make_view(shape, layout="modes", merge=most)
    assert (view.count, view.rows, view.cols, view.modes) == (1, rows, cols, modes)


def along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """A tensor multiplied by a matrix along one of its dimensions."""
    return torch.tensordot(x, matrix, dims=([axis], [0])).movedim(-1, axis)


class SoapByHand:
    """SOAP (arXiv:2409.11321) on a tensor, as its authors' code orders the operations."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.covariances = [torch.zeros(n, n, dtype=torch.float64) for n in sizes]
        self.bases: list[Tensor] = []
        self.m, self.v = torch.zeros(sizes, dtype=torch.float64), torch.zeros(sizes, dtype=torch.float64)

    def observe(self, g: Tensor) -> None:
        for axis, p in enumerate(self.covariances):
            flat = g.movedim(axis, 0).flatten(1)
            p.mul_(0.95).add_(flat @ flat.mT, alpha=0.05)

    def step(self, w: Tensor, g: Tensor, t: int) -> Tensor:
        if t == 0:  # the first gradient only sets the bases
            self.observe(g)
            self.bases = [torch.linalg.eigh(p)[1].flip(-1) for p in self.covariances]
            return w
        self.m = 0.95 * self.m + 0.05 * g
        m, turned = self.m, g
        for axis, q in enumerate(self.bases):
            m, turned = along(m, q, axis), along(turned, q, axis)
        self.v = 0.95 * self.v + 0.05 * turned**2
        update = m / (self.v.sqrt() + 1e-8)
        for axis, q in enumerate(self.bases):
            update = along(update, q.mT, axis)
        w = w - LR * (1 - 0.95**t) ** 0.5 / (1 - 0.95**t) * update
        w = w * (1 - LR * DECAY)
        self.observe(g)
        if t % 2 == 0:
            self.refresh()
        return w

    def refresh(self) -> None:
        for axis, (p, q) in enumerate(zip(self.covariances, self.bases, strict=True)):
            order = (q.mT @ p @ q).diagonal().argsort(descending=True)
            self.v = self.v.index_select(axis, order)
            self.bases[axis] = torch.linalg.qr(p @ q[:, order])[0]


@pytest.mark.parametrize("most", [4, 6])
def test_soap_with_merged_dimensions(most: int) -> None:
    """SOAP on tensors: a covariance and a basis for each joined dimension, second moments permuted with the sorted bases."""
    given = merging(most, selector__every=2, selector__offset=1)
    params = parameters(MERGED, torch.float64)
    opt = SubspaceOptimizer(params.items(), given, modules=dict.fromkeys(params, frozenset({"conv"})), lr=LR, weight_decay=DECAY)
    ends = {}
    for name, shape in MERGED.items():
        sizes = {4: (2, 3, 3, 3), 6: (6, 3, 3)}[most] if name != "whole" else {4: (4, 4), 6: (4, 4)}[most]
        w, tensors = params[name].detach().clone(), SoapByHand(sizes)
        for t in range(7):
            w = tensors.step(w.reshape(sizes), gradient(name, shape, t, torch.float64).reshape(sizes), t).reshape(shape)
        ends[name] = w
    train(opt, params, range(7))
    for name, p in params.items():
        assert (p.detach() - ends[name]).norm() < 1e-10 * ends[name].norm(), name
