"""Several ranks give the numbers of one process, for every preset and every placement of parameters on a mesh."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import run_ranks
from ranks import differences, give, gradient, make_fused, make_zoo, mesh_of, place, whole_weights
from selection import covering
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import subspace_opt
from subspace_opt.distributed.exchange import ShardingError
from subspace_opt.lab.run.measure import measured_bytes
from subspace_opt.spec import preset_names

STEPS = 10
STEPS_OF_FOUR = 6  # beyond two ranks, four test other cuts of shapes and meshes of two dimensions
MESHES = [("fsdp", 2), ("fsdp", 4), ("ddp", 2), ("ddp", 4), ("tp", 2), ("tp", 4), ("hsdp", 4), ("fsdp+tp", 4)]
FOR_ALL = [("fsdp", 2), ("fsdp+tp", 4)]  # the meshes of all presets; the others get a covering set

# Bases are refreshed at every fourth update, so a run on two ranks has three refreshes, and one on four ranks has two. A rank of 3 is below
# the short sides, so there is a complement.
SHORT = {"rank": 3, "every": 4}


@cache
def shortened(preset: str) -> subspace_opt.Spec:
    """The preset with ranks and periods so small that a few steps contain several refreshes."""
    spec = subspace_opt.load_spec(preset)
    out: dict[str, Any] = {}
    for name, pipeline in spec.pipelines.items():
        for key, value in SHORT.items():
            now = getattr(pipeline.selector, key, None)
            if isinstance(now, int | float) and now > value:
                out[f"{name}.selector.{key}"] = value
    return subspace_opt.load_spec(spec, out)


def build(preset: str, model: nn.Module, kind: str | None, **options: Any) -> subspace_opt.SubspaceOptimizer:
    group = dist.group.WORLD if kind == "ddp" else None
    return subspace_opt.build(shortened(preset), model, lr=1e-2, process_group=group, **options)


def trained(
    preset: str, kind: str | None, mesh: Any, steps: int = STEPS, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, subspace_opt.SubspaceOptimizer]:
    """A zoo after some steps: on one process (`kind` None), or on a mesh."""
    model = make_zoo(dtype)
    if kind is not None:
        place(model, kind, mesh)
    optimizer = build(preset, model, kind, **options)
    for step in range(steps):
        give(model, step)
        optimizer.step()
    return model, optimizer


# ------------------------------------------------------------------------------------------------------ equal to one process


@cache
def alone(preset: str, steps: int = STEPS) -> dict[str, Tensor]:
    """The weights after the same steps on one process."""
    return whole_weights(trained(preset, None, None, steps)[0])


def compare_presets(kind: str, presets: dict[str, dict[str, Tensor]], steps: int, options: dict[str, Any]) -> list[str]:
    """The weights that differ from those of one process, given by preset, and the parameters whose planned and allocated bytes differ."""
    mesh = mesh_of(kind, dist.get_world_size())
    wrong = []
    for preset, weights in presets.items():
        model, optimizer = trained(preset, kind, mesh, steps, **options)
        for name, gap in differences(model, weights):
            if not gap < 1e-9:
                wrong.append(f"{preset}: {name} differs by {gap:.1e}")
        planned = sum(sharding.bytes_held(group.rank) for group, sharding in optimizer._shardings().values())
        if planned != measured_bytes(optimizer):
            wrong.append(f"{preset}: {planned} bytes planned, {measured_bytes(optimizer)} held")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), MESHES)
def test_every_preset_equals_one_process(kind: str, world: int, pytestconfig: pytest.Config) -> None:
    steps = STEPS_OF_FOUR if world == 4 else STEPS
    everything = (kind, world) in FOR_ALL or pytestconfig.getoption("all_presets")
    presets = preset_names() if everything else sorted(covering())
    wrong = run_ranks(world, compare_presets, kind, {preset: alone(preset, steps) for preset in presets}, steps, {})
    assert wrong == [[]] * world


@pytest.mark.slow
def test_small_buckets_and_stacks_change_nothing() -> None:
    presets = {preset: alone(preset) for preset in ("cosmos", "muon", "galore", "soap", "adamw", "sumo")}
    assert run_ranks(2, compare_presets, "fsdp", presets, STEPS, {"batch_bytes": 500}) == [[]] * 2
    assert run_ranks(2, compare_presets, "fsdp", presets, STEPS, {"stacking": "always"}) == [[]] * 2


def differing_copies(kind: str, presets: tuple[str, ...]) -> list[str]:
    """The parameters whose copies on several ranks differ by a bit after some steps in float32."""
    mesh, wrong = mesh_of(kind, dist.get_world_size()), []
    for preset in presets:
        model, _ = trained(preset, kind, mesh, dtype=torch.float32)
        for name, p in model.named_parameters():
            if isinstance(p, DTensor) and all(placement.is_replicate() for placement in p.placements):
                own = p.to_local().detach()
                copies = [torch.empty_like(own) for _ in range(dist.get_world_size())]
                dist.all_gather(copies, own)
                wrong += [f"{preset}: {name}"] * any(not torch.equal(own, copy) for copy in copies)
    return wrong


@pytest.mark.slow
def test_copies_on_several_ranks_stay_equal_to_the_bit() -> None:
    assert run_ranks(2, differing_copies, "tp", ("galore", "adamw", "cosmos", "muon")) == [[]] * 2


def trained_fused(preset: str, kind: str | None, **options: Any) -> tuple[nn.Module, subspace_opt.SubspaceOptimizer]:
    """Weights that are cut into parts after some steps: on one process (`kind` None), or on a mesh."""
    model = make_fused()
    if kind is not None:
        place(model, kind, mesh_of(kind, dist.get_world_size()))
    optimizer = build(preset, model, kind, **options)
    for step in range(STEPS_OF_FOUR):
        give(model, step)
        optimizer.step()
    return model, optimizer


@cache
def fused_alone(preset: str) -> dict[str, Tensor]:
    return whole_weights(trained_fused(preset, None)[0])


def compare_fused(kind: str, presets: dict[str, dict[str, Tensor]], options: dict[str, Any]) -> list[str]:
    """The parameters of fused weights that differ from those of one process, given by preset."""
    wrong = []
    for preset, weights in presets.items():
        model, optimizer = trained_fused(preset, kind, **options)
        cut = [row.entry.name for row in optimizer.plan if len(row.splits) > 1]
        assert len(cut) == 6, cut
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in differences(model, weights) if not gap < 1e-9]
        planned = sum(sharding.bytes_held(group.rank) for group, sharding in optimizer._shardings().values())
        if planned != measured_bytes(optimizer):
            wrong.append(f"{preset}: {planned} bytes planned, {measured_bytes(optimizer)} held")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("ddp", 2), ("hsdp", 4)])
def test_weights_cut_by_their_roles_equal_one_process(kind: str, world: int) -> None:
    presets = {preset: fused_alone(preset) for preset in ("cosmos", "galore", "muon-hyperball", "spel")}
    assert run_ranks(world, compare_fused, kind, presets, {}) == [[]] * world


@pytest.mark.slow
def test_weights_cut_by_their_roles_in_small_buckets_equal_one_process() -> None:
    presets = {preset: fused_alone(preset) for preset in ("muon", "soap")}
    assert run_ranks(2, compare_fused, "tp", presets, {"batch_bytes": 500}) == [[]] * 2


# ------------------------------------------------------------------------------------------------------- gradients that are missing or bad


def compare_odd_gradients(kind: str) -> dict[str, Any]:
    """A run with missing gradients: on all ranks for some steps, on all ranks always, and, if shards differ, on some ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = mesh_of(kind, world)
    apart = kind in ("fsdp", "tp")

    def without(name: str, step: int) -> bool:
        return (name == "tall.weight" and step < 3) or (name == "wide.weight" and step % 3 == 1) or name == "norm.weight"

    out = {}
    for preset in ("cosmos", "muon", "galore", "adamw", "soap"):
        alone = make_zoo()
        own = build(preset, alone, None)
        model = place(make_zoo(), kind, mesh)
        optimizer = build(preset, model, kind)
        for step in range(8):
            give(alone, step, without)
            give(model, step, without)
            if apart and step == 5:  # the last rank has no gradient of `square`; its rows count as 0
                p = model.square.weight
                if rank == world - 1:
                    p.grad = None
                whole = gradient("square.weight", p.shape, step, p.dtype)
                shard = distribute_tensor(torch.arange(8.0).reshape(8, 1).expand(8, 8).contiguous(), mesh, p.placements)
                first = shard.to_local().flatten()[0].item() if shard.to_local().numel() else 8.0
                starts = [torch.zeros(1) for _ in range(world)]
                dist.all_gather(starts, torch.tensor([first]))
                if p.placements[0].dim == 0:
                    whole[int(starts[-1].item()) :] = 0
                else:
                    whole[:, 8 - (8 // world) :] = 0
                alone.square.weight.grad = whole
            own.step()
            optimizer.step()
        out[preset] = {name: gap for name, gap in differences(model, alone) if not gap < 1e-9}
        counts = [None] * world
        dist.all_gather_object(counts, [int(optimizer.state[p]["step"]) if optimizer.state.get(p) else -1 for p in model.parameters()])
        assert all(count == counts[0] for count in counts), counts
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_missing_gradients(kind: str) -> None:
    for result in run_ranks(2, compare_odd_gradients, kind):
        assert result == {preset: {} for preset in result}


def bad_gradients(policy: str) -> list[str]:
    """The effect of a NaN in the shard of one rank."""
    mesh = mesh_of("fsdp", dist.get_world_size())
    model = place(make_zoo(), "fsdp", mesh)
    optimizer = build("cosmos", model, "fsdp", nonfinite=policy)
    give(model, 0)
    optimizer.step()
    before = whole_weights(model)
    give(model, 1)
    if dist.get_rank() == 1:
        for p, place_of, value in ((model.square.weight, (0, 0), torch.nan), (model.tall.weight, (1, 1), torch.inf)):
            p.grad = p.grad.clone()
            p.grad.to_local()[place_of] = value
    try:
        optimizer.step()
    except subspace_opt.NonFiniteGradient as error:
        text = str(error)
    else:
        text = ""
    after = whole_weights(model)
    assert "square.weight" in text or text == ""
    return [*sorted(name for name in before if torch.equal(before[name], after[name])), f"skipped {optimizer.skipped}"]


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_is_met_by_all_together() -> None:
    raised = run_ranks(2, bad_gradients, "raise")
    assert raised[0] == raised[1]
    assert len(raised[0]) == len(list(make_zoo().named_parameters())) + 1  # nothing was changed on either rank
    skipped = run_ranks(2, bad_gradients, "skip")
    assert skipped[0] == skipped[1]
    assert skipped[0] == ["frozen.weight", "square.weight", "tall.weight", "skipped {'square.weight': 1, 'tall.weight': 1}"]


def failing_decomposition() -> tuple[list[int], list[float], list[str]]:
    """The owner of a matrix fails to decompose it once, and then three times in a row."""
    import warnings

    mesh = mesh_of("fsdp", dist.get_world_size())
    model = place(make_zoo(), "fsdp", mesh)
    optimizer = build("galore", model, "fsdp")
    real = torch.linalg.householder_product
    for step in range(2):
        give(model, step)
        optimizer.step()
    broken = {"left": 0}

    def product(a: Tensor, *arguments: Any, **named: Any) -> Any:
        if broken["left"] and a.shape[-2:] == (8, 8):
            raise torch.linalg.LinAlgError("broken on purpose")
        return real(a, *arguments, **named)

    seen: list[str] = []
    torch.linalg.householder_product = product
    broken["left"] = 1
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(2, 5):
                give(model, step)
                optimizer.refresh_bases()
                try:
                    optimizer.step()
                except torch.linalg.LinAlgError as error:
                    seen.append(str(error))
        seen += sorted({str(one.message).split(":")[0] for one in told if one.category is RuntimeWarning})
    finally:
        torch.linalg.householder_product = real
    counts = [int(optimizer.state[p]["step"]) for p in model.parameters() if p.requires_grad]
    return counts, [float(w.sum()) for w in whole_weights(model).values()], seen


@pytest.mark.slow
def test_a_decomposition_that_fails_on_its_owner_is_known_to_all() -> None:
    one, other = run_ranks(2, failing_decomposition)
    assert one[0] == other[0]
    assert one[1] == other[1]
    assert len(one[2]) == len(other[2]) == 3  # an error after three in a row, two warned of, on both ranks
    assert "3 times in a row" in one[2][0]
    assert "3 times in a row" in other[2][0]


# --------------------------------------------------------------------------------------------------------------- bytes and messages


def counted_bytes(preset: str, kind: str, refresh: bool) -> tuple[int, int, int, int]:
    """Bytes that this rank sends in a step, counted and by the formula; bytes of reductions; the number of matrices that send coordinates
    only.
    """
    mesh = mesh_of(kind, dist.get_world_size())
    never = {
        f"{name}.selector.every": 10**6 for name in subspace_opt.load_spec(preset).pipelines if preset == "galore" and name == "matrix"
    }
    model = place(make_zoo(torch.float32), kind, mesh)
    group = dist.group.WORLD if kind == "ddp" else None
    optimizer = subspace_opt.build(shortened(preset), model, lr=1e-2, overrides=never, process_group=group)
    for step in range(4):
        give(model, step)
        optimizer.step()
    for group in optimizer.param_groups:  # at the counted step, all bases refresh or none does
        group["refresh"] = refresh
    sent = [0, 0]
    exchange, reduce = dist.all_to_all_single, dist.all_reduce

    def all_to_all(got: Tensor, own: Tensor, arriving: list[int], leaving: list[int], **named: Any) -> Any:
        sent[0] += own.numel() * own.itemsize
        return exchange(got, own, arriving, leaving, **named)

    def all_reduce(value: Tensor, *arguments: Any, **named: Any) -> Any:
        sent[1] += value.numel() * value.itemsize
        return reduce(value, *arguments, **named)

    dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce
    try:
        give(model, 4)
        optimizer.step()
    finally:
        dist.all_to_all_single, dist.all_reduce = exchange, reduce
    shardings = list(optimizer._shardings().values())
    formula = sum(sharding.bytes_sent(group.rank, refresh=refresh) for group, sharding in shardings)
    return sent[0], formula, sent[1], sum(sharding.basis_dim is not None for _, sharding in shardings)


@pytest.mark.slow
def test_bytes_sent_are_those_of_the_formula() -> None:
    for kind in ("fsdp", "ddp"):
        for preset in ("cosmos", "muon", "galore", "soap", "adamw"):
            between, at = run_ranks(2, counted_bytes, preset, kind, False), run_ranks(2, counted_bytes, preset, kind, True)
            for sent, formula, reductions, _ in between + at:
                assert sent == formula
                assert reductions < 2000
            if preset == "adamw":
                assert (sum(rank[0] for rank in between) == 0) == (kind == "fsdp")  # elementwise: shards exchange nothing
            if preset == "galore" and kind == "fsdp":
                assert between[0][3] > 0
                assert sum(rank[0] for rank in between) < sum(rank[0] for rank in at)


def whole_experts() -> tuple[int, float]:
    """Experts whose matrices are whole on their ranks are not sent."""
    mesh = mesh_of("fsdp", dist.get_world_size())
    alone, model = nn.Module(), nn.Module()
    for one in (alone, model):
        one.weight = nn.Parameter(gradient("experts", torch.Size([4, 6, 8]), 0, torch.float64))
    place(model, "fsdp", mesh)
    own = subspace_opt.build("cosmos", alone, lr=1e-2, overrides={"matrix.selector.rank": 2})
    optimizer = subspace_opt.build("cosmos", model, lr=1e-2, overrides={"matrix.selector.rank": 2})
    for step in range(5):
        for one, opt in ((alone, own), (model, optimizer)):
            give(one, step)
            opt.step()
    gap = dict(differences(model, alone))["weight"]
    return sum(sharding.bytes_sent(group.rank) for group, sharding in optimizer._shardings().values()), gap


@pytest.mark.slow
def test_whole_experts_do_not_travel() -> None:
    for sent, gap in run_ranks(2, whole_experts):
        assert sent == 0
        assert gap < 1e-12


# --------------------------------------------------------------------------------------------------------------------- refused


def refused() -> list[str]:
    mesh = mesh_of("fsdp", 1)
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    optimizer = subspace_opt.SubspaceOptimizer([("w", partial)], "muon")
    partial.grad = partial.detach().clone()
    seen = []
    try:
        optimizer.step()
    except ShardingError as error:
        seen.append(str(error))
    plain = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = subspace_opt.SubspaceOptimizer([("w", plain)], "muon")
    from torch.distributed.fsdp import FullyShardedDataParallel

    for options in ({}, {"use_orig_params": True}):
        wrapped = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)), device_id=torch.device("cpu"), **options)
        try:
            subspace_opt.build("muon", wrapped)
        except ValueError as error:
            seen.append(str(error))
    flat = nn.Linear(4, 4)
    flat.weight = nn.Parameter(torch.ones(16))
    try:
        subspace_opt.build("muon", flat)
    except ValueError as error:
        seen.append(str(error))
    return seen


@pytest.mark.slow
def test_what_cannot_be_right_is_refused_with_the_reason() -> None:
    partial, flat, original, view = run_ranks(1, refused)[0]
    assert "'w'" in partial
    assert "Partial" in partial
    assert "fully_shard" in flat
    assert "fully_shard" in original
    assert "1-D view of a matrix" in view


# ---------------------------------------------------------------------------------------------------------------------- groups


def grouped(kind: str) -> list[str]:
    """Groups with their own rates, specs and pipelines. One is added between two steps, and a parameter is frozen and unfrozen."""
    wrong: list[str] = []
    runs = []
    for ranked in (False, True):
        model = make_zoo()
        if ranked:
            place(model, kind, mesh_of(kind, dist.get_world_size()))
        group = dist.group.WORLD if ranked and kind == "ddp" else None
        named = dict(model.named_parameters())
        first = [(name, named[name]) for name in ("wide.weight", "square.weight", "tall.weight")]
        second = [(name, named[name]) for name in ("embedding.weight", "norm.weight")]
        optimizer = subspace_opt.SubspaceOptimizer(
            [
                {"params": first, "lr": 1e-2, "overrides": {"matrix.selector.rank": 2}},
                {"params": second, "lr": 3e-3, "use": "other", "weight_decay": 0.2, "maximize": True},
            ],
            "cosmos",
            modules={"wide.weight": frozenset({"linear"})},
            process_group=group,
        )
        before: dict[str, int] = {}
        for step in range(12):
            if step == 4:
                before = {name: sharding.parts[0].owners[0] for name, sharding in by_name(optimizer)}
                late = [(name, named[name]) for name in ("twin.weight", "conv.weight", "experts.weight")]
                optimizer.add_param_group({"params": late, "spec": "galore", "lr": 1e-2, "maximize": True})
            named["tall.weight"].requires_grad_(step not in (6, 7))
            give(model, step)
            if step in (6, 7):
                named["tall.weight"].grad = None
            optimizer.step()
        after = {name: sharding.parts[0].owners[0] for name, sharding in by_name(optimizer)}
        wrong += [f"the owner of {name} changed" for name in before if after[name] != before[name]]
        runs.append(model)
    return wrong + [f"{name} differs by {gap:.1e}" for name, gap in differences(runs[1], runs[0]) if not gap < 1e-9]


def by_name(optimizer: subspace_opt.SubspaceOptimizer) -> list[tuple[str, Any]]:
    return [(sharding.row.entry.name, sharding) for _, sharding in optimizer._shardings().values()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_groups_of_shared_parameters(kind: str) -> None:
    assert run_ranks(2, grouped, kind) == [[]] * 2


@cache
def in_low_precision() -> tuple[dict[str, dict[str, Tensor]], dict[tuple[str, str], dict[str, Tensor]]]:
    """The weights of one process: in float32 by preset, in bfloat16 by rounding and preset."""
    singles = {
        preset: whole_weights(trained(preset, None, None, dtype=torch.float32, stacking="never")[0])
        for preset in ("cosmos", "muon", "galore", "adamw")
    }
    halves = {}
    for rounding, preset in product(("nearest", "stochastic", "kahan"), ("muon", "adamw", "muon-hyperball")):
        model, _ = trained(preset, None, None, steps=6, dtype=torch.bfloat16, rounding=rounding, stacking="never")
        halves[rounding, preset] = whole_weights(model)
    return singles, halves


def low_precision(kind: str, singles: dict[str, dict[str, Tensor]], halves: dict[tuple[str, str], dict[str, Tensor]]) -> list[str]:
    """float32 up to round-off, and bfloat16 with each rounding. The draws are the same on every rank."""
    mesh = mesh_of(kind, dist.get_world_size())
    wrong = []
    for preset, weights in singles.items():
        model, _ = trained(preset, kind, mesh, dtype=torch.float32)
        wrong += [f"{preset}: {n} differs by {gap:.1e}" for n, gap in differences(model, weights) if not gap < 1e-3]
    for (rounding, preset), weights in halves.items():
        model, _ = trained(preset, kind, mesh, steps=6, dtype=torch.bfloat16, rounding=rounding)
        other = whole_weights(model)
        for name, one in weights.items():
            apart = (one != other[name]).float().mean().item()  # an entry halfway between two neighbours may round to either
            if apart > 0.1 or not torch.allclose(one.float(), other[name].float(), rtol=2e-2, atol=1e-3):
                wrong.append(f"{preset}, {rounding}: {name} differs in {apart:.0%} of the entries")
    return wrong


# Rules in `apply` that no preset has: entries apart, whole matrices, coordinates that ranks would else exchange alone.
APPLIED: dict[str, tuple[str, dict[str, Any]]] = {
    "cautious adamw": ("adamw", {"all.apply": "cautious"}),
    "cautious galore": ("galore", {"matrix.apply": "cautious", "matrix.decay": "before"}),
    "relative muon": ("muon", {"matrix.apply": ["cautious", "relative"], "other.apply": "cautious"}),
    "braked cosmos": ("cosmos", {"matrix.apply": "radial_brake", "matrix.decay": "after"}),
}


def applied(label: str, kind: str | None) -> nn.Module:
    """A zoo after some steps with other rules in `apply`: on one process (`kind` None), or on a mesh."""
    preset, overrides = APPLIED[label]
    model = make_zoo()
    if kind is not None:
        place(model, kind, mesh_of(kind, dist.get_world_size()))
    optimizer = subspace_opt.build(shortened(preset), model, lr=1e-2, weight_decay=0.3, overrides=overrides)
    for step in range(STEPS_OF_FOUR):
        give(model, step, lambda name, step: name == "square.weight" and step < 2)
        if model.twin.weight.grad is not None and step < 2:
            model.twin.weight.grad.zero_()  # it waits, and decays
        optimizer.step()
    return model


@cache
def applied_alone(label: str) -> dict[str, Tensor]:
    return whole_weights(applied(label, None))


def compare_applied(kind: str, ends: dict[str, dict[str, Tensor]]) -> list[str]:
    """The weights that differ from those of one process, with other rules in `apply`."""
    return [
        f"{label}: {name} differs by {gap:.1e}"
        for label, weights in ends.items()
        for name, gap in differences(applied(label, kind), weights)
        if not gap < 1e-9
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("tp", 2), ("fsdp+tp", 4)])
def test_weight_rules_equal_one_process(kind: str, world: int) -> None:
    assert run_ranks(world, compare_applied, kind, {label: applied_alone(label) for label in APPLIED}) == [[]] * world


def sums_with_compensation(model: nn.Module, optimizer: subspace_opt.SubspaceOptimizer) -> dict[str, Tensor]:
    """The weights of matrices in float64, with Kahan's compensation."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    found = {}
    for number, slots in state["state"].items():
        p = dict(model.named_parameters())[names[number]].detach()
        w, lost = (x.full_tensor() if isinstance(x, DTensor) else x for x in (p, slots["compensation"]))
        if w.dim() > 1:
            found[names[number]] = w.double() + lost.double()
    return found


def compensated(kind: str | None) -> dict[str, Tensor]:
    """Matrices after some steps in bfloat16, with Kahan's compensation: on one process (`kind` None), or on a mesh."""
    mesh = None if kind is None else mesh_of(kind, dist.get_world_size())
    return sums_with_compensation(*trained("spel", kind, mesh, steps=6, dtype=torch.bfloat16, rounding="kahan"))


def compare_compensated(kind: str, alone: dict[str, Tensor]) -> list[str]:
    """Matrices that leave one process because their owner did not see Kahan's compensation, as rules in `apply` do there."""
    return [f"{name} differs by {gap:.1e}" for name, gap in differences(compensated(kind), alone) if not gap < 1e-4]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_weight_rules_see_the_compensation_on_ranks(kind: str) -> None:
    assert run_ranks(2, compare_compensated, kind, compensated(None)) == [[]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_low_precision_on_ranks(kind: str) -> None:
    assert run_ranks(2, low_precision, kind, *in_low_precision()) == [[]] * 2
