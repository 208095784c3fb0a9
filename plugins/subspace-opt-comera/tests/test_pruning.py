"""Pruning keeps the function, shrinks parameters and state together and exactly, goes on after a resume, and is refused with a reason."""

from __future__ import annotations

import copy
import gc
import io
import re
import weakref
from typing import Any

import pytest
import torch
from subspace_opt_comera import PruneError, RankObjective, TTEmbedding, TTLinear, prune, tensorize
from subspace_opt_comera.trains import trains_in
from torch import Tensor, nn

from subspace_opt import SubspaceOptimizer, build, step_in_backward
from subspace_opt.spec import preset_names

F64 = torch.float64
OWN = ("comera", "comera-muon")
EXACT = {"adamw", "muon", "muon-moonshot", "muon-spectral", "powerstep"}  # presets whose state is cut
REFUSED = {"adam-sn", "cosmos", "galore", "soap"}  # presets with a basis of a side, or with statistics that a cut would mix


class Small(nn.Module):
    """An embedding, two linear layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table, self.norm = nn.Embedding(30, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)

    def forward(self, index: Tensor) -> Tensor:
        h = self.table(index)
        return self.head(self.norm(h + self.down(torch.tanh(self.up(h)))))


def small(dtype: torch.dtype = F64, **options: Any) -> nn.Module:
    model = Small().to(dtype)
    tensorize(model, rank=6, min_side=16, parts=2, **options)
    return model


def index_of(t: int) -> Tensor:
    return torch.randint(0, 30, (8, 4), generator=torch.Generator().manual_seed(t))


def train(model: nn.Module, optimizer: SubspaceOptimizer, steps: range) -> list[float]:
    losses = []
    for t in steps:
        optimizer.zero_grad()
        target = index_of(t) % 5
        loss = nn.functional.cross_entropy(model(index_of(t)).flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(model: nn.Module, value: float = 0.0) -> dict[str, list[list[int]]]:
    """Close some gates of every train; return the open ones."""
    still_open = {}
    with torch.no_grad():
        for name, tt in trains_in(model).items():
            for i, gate in enumerate(tt.gates):
                gate[i % 2 :: 3] = value
            still_open[name] = [mask.nonzero().flatten().tolist() for mask in tt.open_gates()]
    return still_open


def state_of(optimizer: SubspaceOptimizer) -> dict[str, dict[str, Tensor]]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = [row.entry.name for row in optimizer.plan.rows]
    return {
        name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in zip(names, params, strict=True) if p in optimizer.state
    }


def held_bytes(optimizer: SubspaceOptimizer) -> int:
    return sum(v.numel() * v.element_size() for slots in optimizer.state.values() for v in slots.values())


def expected_cut(value: Tensor, name: str, model: nn.Module, kept: dict[str, list[list[int]]], ranks: dict[str, tuple[int, ...]]) -> Tensor:
    """A core, a gate, or a slot of the same shape, cut in its tensor form."""
    layer, _, own = name.rpartition(".")
    tt, i, keep = trains_in(model)[layer], int(own.rpartition("_")[2]), kept[layer]
    if "gate" in own:
        return value[..., keep[i]]
    left, right = ranks[layer][i], ranks[layer][i + 1]
    tensor = value.reshape(left, tt.modes[i], right)
    tensor = tensor[keep[i - 1]] if i else tensor
    return tensor[..., keep[i]] if i < len(keep) else tensor


@pytest.mark.parametrize("preset", OWN)
def test_parameters_and_state_shrink_together_and_keep_their_entries(preset: str) -> None:
    model = small()
    optimizer = build(preset, model)
    train(model, optimizer, range(3))
    kept, ranks = close(model), {name: tt.ranks for name, tt in trains_in(model).items()}
    before, values = state_of(optimizer), {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    output, bytes_before = model(index_of(9)), optimizer.plan.total_bytes
    assert held_bytes(optimizer) == bytes_before

    done = prune(model, optimizer)

    torch.testing.assert_close(model(index_of(9)), output, rtol=1e-12, atol=1e-12)
    assert {p.name for p in done} == {"table", "up", "down"}
    assert all(p.change == 0 and p.entries < p.entries_before and p.ranks < p.ranks_before for p in done)
    assert sum(p.entries for p in done) == sum(core.numel() for tt in trains_in(model).values() for core in tt.cores)
    after, checked = state_of(optimizer), 0
    assert list(after) == list(before)
    for name, p in model.named_parameters():
        if "tt_" not in name:
            assert torch.equal(p, values[name])
            assert all(torch.equal(after[name][key], value) for key, value in before[name].items())
            continue
        for mine, old in [(p, values[name]), (p.grad, gradients[name]), *((after[name][k], v) for k, v in before[name].items() if v.dim())]:
            assert torch.equal(mine.reshape(-1), expected_cut(old, name, model, kept, ranks).reshape(-1))
            checked += 1
        assert after[name]["step"] == before[name]["step"] == 3
    assert checked >= 3 * 13
    assert held_bytes(optimizer) == optimizer.plan.total_bytes < bytes_before
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_a_pruned_run_goes_on_as_if_the_ranks_had_never_been() -> None:
    """With AdamW, ranks whose gates are closed take no part: a run with smaller cores from the start has the same weights."""
    full, lean = small(), small()
    for model in (full, lean):
        close(model, -10.0)
    prune(lean)
    one, other = (build("comera", model, weight_decay=0.0) for model in (full, lean))
    train(full, one, range(4))
    train(lean, other, range(4))
    prune(full, one)
    train(full, one, range(4, 8))
    train(lean, other, range(4, 8))
    for (name, a), (_, b) in zip(full.named_parameters(), lean.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


def test_storage_that_parameters_share_is_freed() -> None:
    """Cores of one shape are computed in one stack, whose state has one storage."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))).double()
    tensorize(model, rank=6, min_side=16, parts=2)
    optimizer = build("comera-muon", model, stacking="always")
    for t in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 16, dtype=F64, generator=torch.Generator().manual_seed(t))).square().sum().backward()
        optimizer.step()
    bases = [weakref.ref(v._base) for s in optimizer.state.values() for v in s.values() if v._base is not None]
    assert bases
    assert all(base() is not None for base in bases)
    close(model)
    prune(model, optimizer)
    optimizer.step()
    gc.collect()
    assert all(base() is None for base in bases)
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for s in optimizer.state.values() for v in s.values()}
    assert sum(storages.values()) == optimizer.plan.total_bytes


def test_a_higher_threshold_changes_the_function_by_what_it_reports() -> None:
    model = small()
    with torch.no_grad():
        for tt in trains_in(model).values():
            for gate in tt.gates:
                gate.copy_(torch.linspace(0.02, 1.0, gate.numel(), dtype=F64))
    before = {name: tt.dense().detach().clone() for name, tt in trains_in(model).items()}
    whole = {name: tt.contracted().detach().clone() for name, tt in trains_in(model).items()}
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for tt in trains_in(zeroed).values():
            for gate in tt.gates:
                gate[gate <= 0.3] = 0.0
    done = prune(model, threshold=0.3)
    assert len(done) == 3
    for record in done:
        tt = trains_in(model)[record.name]
        torch.testing.assert_close(tt.dense(), trains_in(zeroed)[record.name].dense(), rtol=1e-12, atol=1e-12)
        change = (tt.contracted() - whole[record.name]).norm() / whole[record.name].norm()
        assert record.change == pytest.approx(change.item(), rel=1e-10)
        assert record.change > 1e-3
        assert not torch.equal(tt.dense(), before[record.name])
    assert not prune(model, threshold=0.3)


# ---------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("preset", OWN)
def test_a_pruned_run_resumes_to_the_bit_and_prunes_again(preset: str) -> None:
    def saved(*things: Any) -> list[Any]:
        buffer = io.BytesIO()
        torch.save([thing.state_dict() for thing in things], buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    model = small(torch.float32)
    optimizer, objective = build(preset, model), RankObjective(model)
    train(model, optimizer, range(3))
    close(model)
    objective.prune(optimizer)
    train(model, optimizer, range(3, 5))
    kept = saved(model, optimizer, objective)

    fresh = small(torch.float32)
    resumed = build(preset, fresh)  # before loading: the parameters stay the same objects
    fresh.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    again = RankObjective(fresh)  # it sees the pruned model alone, until it loads its own state
    assert again.sizes() != objective.sizes()
    again.load_state_dict(kept[2])
    assert again.sizes() == objective.sizes()
    assert [tt.ranks for tt in trains_in(fresh).values()] == [tt.ranks for tt in trains_in(model).values()]
    for run, opt, goal in ((model, optimizer, objective), (fresh, resumed, again)):
        train(run, opt, range(5, 7))
        close(run)
        assert goal.prune(opt)
        train(run, opt, range(7, 9))
    for (name, a), (_, b) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(state_of(optimizer).values(), state_of(resumed).values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a | b)


def test_states_from_before_and_after_pruning_load_into_each_other() -> None:
    model = small()
    optimizer = build("comera", model)
    train(model, optimizer, range(2))
    close(model)
    large = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    prune(model, optimizer)
    lean = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for states in (large, lean, large):
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        now = [model.state_dict(), optimizer.state_dict()]
        assert all(torch.equal(now[0][key], value) for key, value in states[0].items())
        for i, slots in states[1]["state"].items():
            assert all(torch.equal(now[1]["state"][i][key], value) for key, value in slots.items())
        train(copy.deepcopy(model), build("comera", small()), range(1))
    train(model, optimizer, range(1))


def test_a_core_that_fits_no_rank_is_refused_by_name() -> None:
    model = small()
    state = model.state_dict()
    state["up.tt_core_1"] = torch.zeros(3, 3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.tt_core_1"):
        model.load_state_dict(state)


# -------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("preset", sorted(preset_names(installed=False)))
def test_every_preset_trains_cores_and_prunes_or_says_why_not(preset: str) -> None:
    model = small(torch.float32)
    optimizer = build(preset, model, lr=1e-3, overrides=_small_ranks(preset))
    losses = train(model, optimizer, range(3))
    assert all(loss == loss and loss < 5 for loss in losses)
    rows = {row.entry.name: row for row in optimizer.plan.rows}
    assert {row.role.name for name, row in rows.items() if "tt_core" in name} == {"hidden"}
    assert held_bytes(optimizer) == optimizer.plan.total_bytes
    close(model)
    output, before = model(index_of(9)), copy.deepcopy((model.state_dict(), state_of(optimizer)))
    refusal = ""
    try:
        prune(model, optimizer)
        assert preset not in REFUSED
    except PruneError as error:
        refusal = str(error)
    if refusal:
        assert preset not in EXACT
        assert re.match(r"'\w+\.tt_\w+_\d' shrinks from .*, and its state cannot: .*uncuttable='reset'", refusal)
        assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
        assert all(torch.equal(v, before[1][n][k]) for n, slots in state_of(optimizer).items() for k, v in slots.items())
        assert prune(model, optimizer, uncuttable="reset")
    torch.testing.assert_close(model(index_of(9)), output)
    train(model, optimizer, range(3, 6))
    assert held_bytes(optimizer) == optimizer.plan.total_bytes


def _small_ranks(preset: str) -> dict[str, Any]:
    from subspace_opt import load_spec

    pipelines = load_spec(preset).pipelines
    return {f"{name}.selector.rank": 3 for name, pipeline in pipelines.items() if hasattr(pipeline.selector, "rank")}


def pipeline_spec(**pipeline: Any) -> dict[str, Any]:
    return {"name": "own", "pipelines": {"all": pipeline}, "routes": [{"use": "all"}]}


@pytest.mark.parametrize(
    ("pipeline", "options", "reason"),
    [
        ({"selector": {"kind": "svd", "rank": 2}, "inside": "adam"}, {}, "selector 'svd' has a basis of the side that shrinks"),
        ({"complement": {"kind": "subset_norm", "subsets": 2}}, {}, "slot 'complement.exp_avg_sq' runs along 'subsets'"),
        ({"complement": [{"kind": "muon"}, {"kind": "ema", "beta": 0.9}], "orient": "short"}, {}, "turns it over"),
    ],
    ids=["basis", "subsets", "turned"],
)
def test_the_reason_of_a_refusal(pipeline: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    tensorize(model, rank=[2, 6, 2], min_side=16, parts=2, include=["0"])
    optimizer = build(pipeline_spec(**pipeline), model, **options)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[0].tt_gate_1[3:] = 0.0  # core 1 turns from 8 x 6 to 8 x 3, core 2 from 24 x 2 to 12 x 2
        if "turns" in reason:
            model[0].tt_gate_0[1] = 0.0  # core 1: 4 x 6 to ... x 3
            model[0].tt_gate_1[:] = 1.0
    with pytest.raises(PruneError, match=reason):
        prune(model, optimizer)
    assert prune(model, optimizer, uncuttable="reset")
    optimizer.step()


def test_a_basis_of_the_other_side_is_no_obstacle() -> None:
    """With a basis of the columns alone, rows of the moments can go, and the moments keep their entries."""
    model = nn.Sequential(nn.Linear(16, 16))
    tensorize(model, rank=[4, 6, 4], min_side=16, parts=2)
    optimizer = build(pipeline_spec(selector={"kind": "svd", "rank": 2}, inside="adam"), model)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    last = optimizer.state[model[0].tt_core_3]
    moment = last["inside.exp_avg"].clone()
    with torch.no_grad():
        model[0].tt_gate_2[1] = 0.0
    with pytest.raises(PruneError, match="tt_core_2"):
        prune(model, optimizer)
    prune(model, optimizer, uncuttable="reset")
    kept = optimizer.state[model[0].tt_core_3]
    assert torch.equal(kept["inside.exp_avg"], moment[[0, 2, 3]])
    assert not optimizer.state[model[0].tt_core_2]


def test_bad_calls_are_refused_and_change_nothing() -> None:
    model = small()
    optimizer = build("comera", model)
    train(model, optimizer, range(1))
    close(model)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(TypeError, match=r"optimizer of subspace_opt\.build, not AdamW"):
        prune(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    hooked = small()
    stepping = step_in_backward(hooked, "comera")
    close(hooked)
    with pytest.raises(PruneError, match="has hooks"):
        prune(hooked, stepping)
    with pytest.raises(PruneError, match="parameters that shrink are not in the optimizer"):
        prune(model, build("comera", small()))
    handle = model.up.tt_core_0.register_hook(lambda grad: grad)
    with pytest.raises(PruneError, match="has hooks"):
        prune(model, optimizer)
    handle.remove()
    with pytest.raises(PruneError, match=r"'up': no gate of tt_gate_0 is above 1e\+09"):
        prune(nn.ModuleDict({"up": model.up}), threshold=1e9)
    for part in ("tt_gate_1", "tt_core_1"):
        shared = nn.Sequential(TTLinear(16, 16, 4, seed=0), TTLinear(16, 16, 4, seed=1))
        setattr(shared[1], part, getattr(shared[0], part))
        with torch.no_grad():
            shared[0].tt_gate_1[0] = 0.0
        with pytest.raises(PruneError, match="'0' shares a core or a gate with another layer"):
            prune(shared)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert prune(model, optimizer)


def test_state_stored_as_codes_is_refused() -> None:
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Linear(256, 256))
    tensorize(model, rank=16, parts=2)
    optimizer = build("comera", model, state_dtype="8bit")
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    close(model)
    with pytest.raises(PruneError, match=r"slot 'complement\.exp_avg' is stored as .*8.*, whose blocks reach over rows and columns"):
        prune(model, optimizer)
    assert prune(model, optimizer, uncuttable="reset")
    optimizer.step()


def test_kahan_compensation_is_cut() -> None:
    model = small(torch.bfloat16)
    optimizer = build("comera", model, rounding="kahan")
    train(model, optimizer, range(3))
    close(model)
    prune(model, optimizer)
    core = model.up.tt_core_1
    assert optimizer.state[core]["compensation"].shape == core.shape
    train(model, optimizer, range(3, 5))
    assert held_bytes(optimizer) == optimizer.plan.total_bytes


def test_pruning_while_an_old_graph_lives() -> None:
    model = small()
    optimizer = build("comera", model)
    loss = model(index_of(0)).square().sum()
    loss.backward()
    optimizer.step()
    close(model)
    prune(model, optimizer)
    model(index_of(1)).square().sum().backward()  # `loss` still holds the graph of the larger cores
    assert model.up.tt_core_0.grad.shape == model.up.tt_core_0.shape
    assert isinstance(model.table, TTEmbedding)
    assert loss.grad_fn is not None
