"""The objective is the formula, a model is tensorized as asked, and a run falls to the target size with its loss held."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from subspace_opt_comera import FactorError, RankObjective, TTEmbedding, TTLinear, prune, tensorize
from torch import nn

from subspace_opt import build, load_spec
from subspace_opt.testing import Check, spec_checks

F64 = torch.float64
README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("check", [check for name in ("comera", "comera-muon") for check in spec_checks(name)], ids=str)
def test_a_preset_conforms(check: Check) -> None:
    check()


def two_layers() -> nn.Module:
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    tensorize(model, rank=4, min_side=16, parts=2, start="random")
    return model


# ---------------------------------------------------------------------------------------------------------------------- presets


def test_the_preset_sends_cores_gates_and_the_rest_to_their_pipelines() -> None:
    model = two_layers()
    rows = {row.entry.name: row for row in build("comera", model).plan.rows}
    assert load_spec("comera").name == "comera"
    assert {row.pipeline for name, row in rows.items() if "tt_core" in name} == {"cores"}
    assert {row.pipeline for name, row in rows.items() if "tt_gate" in name} == {"gates"}
    assert {row.pipeline for name, row in rows.items() if "tt_" not in name} == {"other"}
    assert {row.pipeline: row.lr_scale * 1e-4 for row in rows.values()} == pytest.approx({"cores": 1e-4, "gates": 1e-3, "other": 5e-5})


def test_the_preset_is_adamw_with_three_learning_rates() -> None:
    ours = two_layers()
    theirs = copy.deepcopy(ours)
    optimizer = build("comera", ours)
    named = dict(theirs.named_parameters())
    rates = {"tt_core": 1e-4, "tt_gate": 1e-3}
    groups = [{"params": [p], "lr": next((lr for part, lr in rates.items() if part in name), 5e-5)} for name, p in named.items()]
    reference = torch.optim.AdamW(groups, weight_decay=1e-2)
    for t in range(4):
        index = torch.arange(t, t + 8)
        for model, opt in ((ours, optimizer), (theirs, reference)):
            opt.zero_grad()
            model(index).square().sum().backward()
            opt.step()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-5, atol=1e-7, msg=name)


# -------------------------------------------------------------------------------------------------------------------- objective


def test_early_and_late_are_the_formulas() -> None:
    model = two_layers()
    objective = RankObjective(model, target_ratio=0.5, target_loss=0.4)
    trains = [m for m in model.modules() if isinstance(m, TTLinear | TTEmbedding)]
    with torch.no_grad():
        trains[0].tt_gate_0[:] = torch.tensor([0.5, 0.01, -2.0, 0.02])
    gates = [g for tt in trains for gate in tt.gates for g in gate.tolist() if g > 0.01]
    rank, start = sum(gates) / len(gates), objective.sizes().start
    assert objective.rank().item() == pytest.approx(rank)
    target, size = int(0.5 * start), sum(tt.core_entries() for tt in trains)
    assert objective.sizes() == (size, start, start, target, 20 * 16 + 16 * 16)
    assert size < start
    for value in (0.41, 0.5, 0.9, 5.0):
        loss = torch.tensor(value, requires_grad=True)
        assert objective.early(loss).item() == pytest.approx(value + 0.01 * rank)
        lam = 1.0 if (value - 0.4) / value < (size - target) / size else 0.0
        late = objective.late(loss)
        assert late.item() == pytest.approx(0.1 * value + 0.01 * rank + lam * rank + (1 - lam) * value)
        (slope,) = torch.autograd.grad(late, loss, retain_graph=True)
        assert slope.item() == pytest.approx(0.1 + (1 - lam))
        (of_gate,) = torch.autograd.grad(late, trains[0].tt_gate_0)
        assert of_gate.tolist() == pytest.approx([(0.01 + lam) / len(gates) if g > 0.01 else 0.0 for g in [0.5, 0.01, -2.0, 0.02]])
    assert (0.41 - 0.4) / 0.41 < (size - target) / size < (5 - 0.4) / 5  # both cases occur


def test_bad_objectives_are_refused() -> None:
    model = two_layers()
    for options, message in (
        ({"target_ratio": 0.0}, "target_ratio is 0.0; give a share"),
        ({"target_ratio": 1.5}, "target_ratio is 1.5"),
        ({"rank_weight": -1.0}, "rank_weight is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            RankObjective(model, **options)
    with pytest.raises(ValueError, match="no tensor train; call `tensorize` first"):
        RankObjective(nn.Linear(2, 2))


# -------------------------------------------------------------------------------------------------------------------- tensorize


def test_tensorize_replaces_what_it_is_asked_to_and_says_what_it_did() -> None:
    model = nn.ModuleDict(
        {"a": nn.Linear(16, 32), "b": nn.Linear(16, 4), "c": nn.Linear(32, 16, bias=False), "d": nn.Embedding(30, 16, padding_idx=2)}
    )
    dense = {name: module.weight.detach().clone() for name, module in model.items()}
    bias, kept = model["a"].bias, model["b"]
    model["d"].weight.requires_grad_(False)
    model.eval()
    done = tensorize(model, rank=64, min_side=16, parts=2, exclude=["c"])
    assert set(done.layers) == {"a", "d"}
    assert done.skipped == {"b": "a side of (4, 16) is below min_side 16", "c": "by include and exclude"}
    assert model["b"] is kept
    assert model["a"].bias is bias
    assert not model["a"].training
    assert {p.requires_grad for p in model["d"].parameters()} == {False}
    torch.testing.assert_close(model["a"].dense(), dense["a"], rtol=1e-5, atol=1e-6)  # the rank is enough for any weight
    torch.testing.assert_close(model["d"].dense(), dense["d"], rtol=1e-5, atol=1e-6)
    cores = sum(core.numel() for train in done.layers.values() for core in train.cores)
    assert done.ratio == pytest.approx((16 * 32 + 30 * 16) / cores)
    assert re.search(r"a: TTLinear\(modes=\(4, 8, 4, 4\).*\n.*\nb: unchanged, a side .*\n.*\ncompression ratio", str(done), re.DOTALL)


def test_random_starts_differ_between_layers_and_repeat_with_the_seed() -> None:
    def made(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        tensorize(model, rank=4, min_side=16, start="random", seed=seed)
        return model

    a, b, c = made(0), made(0), made(1)
    assert torch.equal(a[0].dense(), b[0].dense())
    assert not torch.equal(a[0].dense(), a[1].dense())
    assert not torch.equal(a[0].dense(), c[0].dense())


def test_models_that_cannot_be_tensorized_are_refused_and_unchanged() -> None:
    tied = nn.ModuleDict({"table": nn.Embedding(16, 16), "head": nn.Linear(16, 16, bias=False)})
    tied["head"].weight = tied["table"].weight
    for model, error, message in (
        (
            nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 13)),
            FactorError,
            r"'1': out_features: 13 is prime.*pass pad=True.*exclude=\['1'\]",
        ),
        (nn.Sequential(nn.LayerNorm(4)), ValueError, "no layer to replace"),
        (nn.Sequential(nn.Linear(4, 4)), ValueError, r"no layer to replace.*\n  0: a side of \(4, 4\) is below min_side 5"),
        (tied, ValueError, r"the weight of 'table' is shared with another module"),
        (nn.Sequential(nn.Embedding(16, 16, max_norm=1.0)), ValueError, "embedding '0' has max_norm"),
        (nn.Linear(16, 16), ValueError, "the model itself is a Linear"),
    ):
        before = str(model)
        with pytest.raises(error, match=message):
            tensorize(model, rank=4, min_side=5)
        assert str(model) == before
    with pytest.raises(ValueError, match="start is 'zeros'; use 'weight' or 'random'"):
        tensorize(nn.Sequential(nn.Linear(16, 16)), rank=4, start="zeros")  # type: ignore[arg-type]


def test_a_transformer_layer_reads_the_weight_of_its_linear_layers() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    tensorize(layer, rank=64, min_side=16)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    layer.eval()
    slow = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow)
    assert type(layer.self_attn.out_proj) is not TTLinear


# ----------------------------------------------------------------------------------------------------------------------- a run


def test_a_run_falls_to_the_target_size_with_its_loss_held() -> None:
    teacher = TTLinear(16, 16, 2, seed=3, parts=2, bias=False, dtype=F64)
    x = torch.randn(64, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = teacher(x).detach()
    y /= y.std()
    model = nn.Sequential(nn.Linear(16, 16)).double()
    tensorize(model, rank=6, min_side=16, parts=2, start="random")
    optimizer, objective = build("comera", model, lr=3e-3), RankObjective(model, target_ratio=0.5, target_loss=0.01)
    losses, sizes, state = [], [objective.sizes().now], []
    for t in range(500):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        (objective.early(loss) if t < 200 else objective.late(loss)).backward()
        optimizer.step()
        losses.append(loss.item())
        if t % 50 == 49:
            objective.prune(optimizer)
            sizes.append(objective.sizes().stored)
            state.append(optimizer.plan.total_bytes)
    assert losses[0] > 0.5
    assert losses[-1] < 0.05
    assert sizes[-1] <= objective.sizes().target
    assert sizes == sorted(sizes, reverse=True)
    assert state == sorted(state, reverse=True)
    assert objective.sizes().ratio > 256 / sizes[0]
    before = model[0].dense()
    model[0].fold()
    torch.testing.assert_close(model[0].dense(), before, rtol=1e-12, atol=1e-12)
    assert not prune(model)


def test_the_readme_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    exec(compile(blocks[0], "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    shown = re.findall(r"^```text\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)[0].splitlines()
    assert printed[:2] == shown[:2]  # later lines may differ in the last digits from machine to machine
    assert len(printed) == len(shown)
    assert names["loss"].item() < 0.05
    assert names["objective"].sizes().stored <= names["objective"].sizes().target
    assert names["optimizer"].plan.total_bytes < 9952 / 2
    for block in blocks[1:]:
        exec(compile(block, "README.md", "exec"), names)
