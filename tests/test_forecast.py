"""Are the planned temporaries the measured ones? Does a budget give a spec that keeps it? Are parameters found in files and functions?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import give, optimizer, parameters, small
from selection import covering
from torch import nn

from subspace_opt import Entry, build, load_spec, make_plan
from subspace_opt.engine.work import Options
from subspace_opt.forecast import Budget, BudgetError, ModelError, costs_of, entries_of, find_parameters, fit
from subspace_opt.forecast.rehearsal import rehearse
from subspace_opt.lab.run.measure import peak_temporaries
from subspace_opt.spec import parse_spec

SIDE = 64
WITHIN = 1.35  # the planned peak and the measured one differ by at most this factor
WIDER = {"shampoo": 1.8}  # its roots are iterated on a CPU, in place of products of a stack
TOGETHER: dict[str, Any] = {"stacking": "always", "batch_bytes": 3 * 4 * SIDE * 2 * SIDE}


@pytest.mark.parametrize("preset", sorted(covering()))
def test_planned_temporaries_are_the_measured_ones(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step without a refresh and in one with it. Newton-Schulz then computes in one dtype on both devices."""
    monkeypatch.setattr("subspace_opt.linalg.cpu_has_bfloat16", lambda: True)
    params = parameters({**{f"w{i}": (SIDE, 2 * SIDE) for i in range(4)}, "u": (SIDE, SIDE)})
    opt = optimizer(small(preset, rank=16, every=5), params, nonfinite="propagate", **TOGETHER)
    for step in range(3):
        give(params, step)
        if step < 2:
            opt.step()
    peaks = rehearse(opt.plan.rows, Options(**TOGETHER))
    measured = peak_temporaries(opt.step, torch.device("cpu"))
    opt.refresh_bases()
    at_refresh = peak_temporaries(opt.step, torch.device("cpu"))
    for planned, found in ((peaks.at_step, measured), (peaks.at_refresh, at_refresh)):
        within = WIDER.get(preset, WITHIN)
        assert found / within <= planned + 64 <= found * within + 128, (planned, found)


def test_copies_of_views_count_for_all_parameters() -> None:
    """Rows of q, k and v that alternate by head are copied, and each copy stays until the step ends."""
    spec = load_spec("muon")
    many = [Entry(f"experts.{i}", (4, 48, 32)) for i in range(40)]
    split = parse_spec("name: cut\npipelines:\n  matrix: {complement: muon}\nroutes:\n  - {use: matrix, heads: 4}\n", "cut")
    plain, cut = (rehearse(make_plan(one, many).rows) for one in (spec, split))
    assert plain.step["hidden", "matrix"].copies == cut.step["hidden", "matrix"].copies == 0
    grouped = nn.Module()
    grouped.query_key_value = nn.Linear(32, 96, bias=False, device="meta")  # type: ignore[assignment]
    grouped.config = {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 32}  # type: ignore[assignment]
    (entry,) = entries_of(grouped)
    rows = make_plan(spec, [Entry(f"w{i}", entry.shape, role=entry.role) for i in range(30)]).rows
    found = rehearse(rows, Options(batch_bytes=32 * 32 * 4))
    assert found.step["fused", "matrix"].copies == 30 * 2 * 96 * 32 * 4  # weights and gradients


# ------------------------------------------------------------------------------------------------------------------------ fit

LAYERS = [Entry(f"layers.{i}.w", (256, 512)) for i in range(4)]
MODEL = [Entry("embed_tokens.weight", (1000, 256)), *LAYERS, Entry("norm.weight", (256,))]


def state(spec: Any) -> int:
    return make_plan(load_spec(spec), MODEL).total_bytes


def test_a_spec_that_fits_stays_as_it_is() -> None:
    spec = load_spec("galore")
    found = fit(spec, MODEL, Budget.read("1GiB", None))
    assert (found.spec, found.turns) == (spec, ())


@pytest.mark.parametrize("preset", ["galore", "apollo"])
def test_every_budget_is_kept_by_the_widest_candidate(preset: str) -> None:
    """The bytes fall with the budget, and the spec that is found reads back and keeps it."""
    whole, steps = state(preset), []
    for share in (0.9, 0.5, 0.2):
        bound = int(share * whole)
        found = fit(load_spec(preset), MODEL, Budget(state=bound))
        again = parse_spec(found.spec.to_yaml())
        assert make_plan(again, MODEL).total_bytes == found.costs.state_bytes <= bound
        steps.append([turn.what for turn in found.turns])
        sizes = [found.start.state_bytes, *(turn.costs.state_bytes for turn in found.turns)]
        assert sizes == sorted(sizes, reverse=True)
    assert steps[0] == ["first moments in bf16"]
    assert steps[-1][-1] in ("lower rank", "AdamW's moments in 4 bits")
    with pytest.raises(BudgetError, match=f"no variant of '{preset}' fits into 0.00 MiB for the state"):
        fit(load_spec(preset), MODEL, Budget(state=1000))


def test_the_rank_is_the_largest_that_fits() -> None:
    """One grain more does not fit."""
    found = fit(load_spec("galore"), MODEL, Budget(state=state("galore") // 6))
    rank = found.spec.pipelines["matrix"].selector.rank  # type: ignore[attr-defined]
    assert rank % 16 == 0
    assert rank < 128
    more = load_spec(found.spec, {"matrix.selector.rank": rank + 16})
    assert state(more) > state("galore") // 6 >= state(found.spec)


def test_ranks_begin_where_the_caller_says() -> None:
    found = fit(load_spec("golore"), MODEL, Budget.read("1GiB", None), max_rank=200)
    selector = found.spec.pipelines["matrix"].selector
    assert (selector.first.rank, selector.then.rank) == (200, 200)  # type: ignore[attr-defined]
    with pytest.raises(BudgetError, match="no selector of 'muon' has a rank"):
        fit(load_spec("muon"), MODEL, Budget.read("1GiB", None), max_rank=200)


def test_state_that_is_narrow_already_is_not_widened() -> None:
    spec = load_spec("galore", {"matrix.state_dtype": {"exp_avg": "4bit"}})
    found = fit(spec, MODEL, Budget(state=int(0.6 * state(spec))))
    assert found.turns
    assert found.spec.pipelines["matrix"].state_dtype["exp_avg"] == "4bit"


def test_a_budget_for_training_counts_all_that_is_held() -> None:
    spec = load_spec("galore")
    whole = costs_of(make_plan(spec, MODEL))
    numel = sum(entry.numel for entry in MODEL)
    assert whole.training_bytes == 8 * numel + whole.state_bytes + whole.temporaries
    found = fit(spec, MODEL, Budget(training=whole.training_bytes - whole.state_bytes // 3))
    assert found.costs.training_bytes <= whole.training_bytes - whole.state_bytes // 3 < whole.training_bytes
    with pytest.raises(
        BudgetError, match=r"The smallest needs [\d.]+ MiB without activations: weights 2.98 MiB.*Weights and gradients alone"
    ):
        fit(spec, MODEL, Budget.read("5MiB", None))


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24 GiBs", "0GiB", "0x", "x", "nan"])
def test_a_budget_needs_a_size(text: str) -> None:
    with pytest.raises(BudgetError, match="for example"):
        Budget.read(text, None)


def test_sizes_have_units() -> None:
    assert Budget.read("24GiB", None).training == 24 * 2**30
    assert Budget.read("1.5 gb", "8MiB") == Budget(training=1_500_000_000, state=8 * 2**20)
    assert Budget.read("0.4x", None).state_bound(1000) == 400


# ----------------------------------------------------------------------------------------------------------------- parameters


def safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file with a header alone."""
    header = {name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def test_parameters_from_files(tmp_path: Path) -> None:
    """A file, an index and a folder; buffers are left out, and `dtype` replaces that of the files."""
    safetensors(tmp_path / "a.safetensors", {"embed_tokens.weight": ("BF16", (100, 16)), "bn.num_batches_tracked": ("I64", ())})
    safetensors(tmp_path / "b.safetensors", {"layers.0.up_proj.weight": ("F32", (32, 16)), "bn.running_mean": ("F32", (16,))})
    found = find_parameters(str(tmp_path), None)
    assert found is not None
    assert [(e.name, e.shape, e.dtype) for e in found.entries] == [
        ("embed_tokens.weight", (100, 16), torch.bfloat16),
        ("layers.0.up_proj.weight", (32, 16), torch.float32),
    ]
    assert "from names and shapes" in found.remarks[0]
    assert "2 tensors are buffers" in found.remarks[1]
    assert [row.role.name for row in make_plan(load_spec("cosmos"), found.entries)] == ["embedding", "hidden"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.0.up_proj.weight": "b.safetensors"}}))
    for path in (index, tmp_path):
        own = find_parameters(str(path), torch.bfloat16)
        assert own is not None
        assert [(e.name, e.dtype) for e in own.entries] == [("layers.0.up_proj.weight", torch.bfloat16)]
    assert find_parameters("60m", None) is None


def test_a_file_gives_the_plan_of_its_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(100, 16), "up_proj": nn.Linear(16, 32), "norm": nn.LayerNorm(16)})
    safetensors(tmp_path / "m.safetensors", {name: ("F32", tuple(p.shape)) for name, p in model.named_parameters()})
    found = find_parameters(str(tmp_path / "m.safetensors"), None)
    assert found is not None
    ours, theirs = make_plan(load_spec("cosmos"), found.entries), build("cosmos", model).plan
    assert [(row.pipeline, row.state_bytes) for row in ours] == [(row.pipeline, row.state_bytes) for row in theirs]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK\x03\x04 this is a zip file", "this is no safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "damaged"),
        ((25).to_bytes(8, "little") + b'{"w": {"dtype": "F32"}}  ', "damaged"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=rf"m\.safetensors: .*{told}"):
        find_parameters(str(tmp_path / "m.safetensors"), None)


def test_weights_that_are_not_trained_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors(path, {"w": ("F8_E4M3", (64, 64))})
    with pytest.raises(ModelError, match=r"'w' is stored as F8_E4M3.*--dtype bfloat16"):
        find_parameters(str(path), None)
    assert find_parameters(str(path), torch.bfloat16) is not None
    safetensors(path, {"w.qweight": ("I32", (8, 64))})
    with pytest.raises(ModelError, match=r"'w\.qweight' is stored as I32, which is quantized"):
        find_parameters(str(path), torch.bfloat16)


def test_parameters_from_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on the meta device, and its module tells roles."""
    made = "nn.Sequential(nn.Embedding(10**7, 2048), nn.Linear(2048, 64))"
    (tmp_path / "own_model.py").write_text(f"from torch import nn\ndef make(): return {made}\ndef number(): return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = find_parameters("own_model:make", None)
    assert found is not None
    assert (found.entries[0].shape, str(found.entries[0].role)) == ((10**7, 2048), "embedding by module Embedding")
    for wrong, told in (
        ("own_model:number", "gives int"),
        ("own_model:none", "has no attribute"),
        ("no_model:f", "No module named 'no_model'"),
    ):
        with pytest.raises(ModelError, match=told):
            find_parameters(wrong, None)
