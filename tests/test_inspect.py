"""Does `inspect` read every kind of checkpoint, and does it judge spectra that are known?"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import optimizer, parameters, train
from rich.console import Console
from test_cli import Left, Run, leave, run  # noqa: F401  fixtures

import subspace_opt
from subspace_opt import SubspaceOptimizer, load_spec, snapshots
from subspace_opt.cli.inspection.show import show_layers
from subspace_opt.diagnostics.saved import SavedLayer, saved_layers

SHAPES = {"tall": (24, 16), "wide": (16, 40), "experts": (3, 12, 16), "bias": (4,)}


def trained(preset: str = "cosmos", steps: int = 3, **overrides: Any) -> SubspaceOptimizer:
    """An optimizer after some steps with rank 8."""
    spec = load_spec(preset, {"matrix.selector.rank": 8, **overrides})
    params = parameters(SHAPES)
    opt = optimizer(spec, params)
    train(opt, params, range(steps))
    return opt


def by_name(opt: SubspaceOptimizer) -> dict[str, SavedLayer]:
    return {layer.name: layer for layer in saved_layers(opt.state_dict())}


# ------------------------------------------------------------------------------------------------------------------ the truth


@pytest.mark.parametrize("preset", ["cosmos", "galore", "soap-one-sided", "trion", "muon", "adafactor"])
def test_bytes_and_sizes_are_those_of_the_plan(preset: str) -> None:
    params = parameters(SHAPES)
    opt = optimizer(preset, params)
    train(opt, params, range(3))
    layers = saved_layers(opt.state_dict())
    assert {layer.name: layer.state_bytes for layer in layers} == {row.entry.name: row.state_bytes for row in opt.plan}
    assert {layer.pipeline for layer in layers} == {row.pipeline for row in opt.plan}
    for layer, row in zip(layers, opt.plan, strict=True):
        frame = row.splits[0][1]
        assert layer.matrices == row.view.count or not frame.slots
        if layer.rows is not None and layer.cols is not None:
            assert (layer.rows, layer.cols) == (frame.rows.size, frame.cols.size)
        if frame.opens and preset != "soap-one-sided":
            assert layer.rank == frame.rank


def test_fused_parts_and_low_bits_are_layers_with_their_bytes() -> None:
    params = parameters({"qkv": (48, 64)})
    routes = [{"name": "qkv", "use": "matrix", "split": {"q": 16, "k": 16, "v": 16}}, {"use": "other"}]
    data = {**load_spec("galore", {"matrix.selector.rank": 16}).model_dump(mode="json"), "routes": routes}
    opt = optimizer(data, params, state_dtype={"exp_avg_sq": "8bit"})
    train(opt, params, range(2))
    layers = saved_layers(opt.state_dict())
    assert [layer.name for layer in layers] == ["qkv.q", "qkv.k", "qkv.v"]
    assert all(layer.rank == 16 and layer.spectrum_of == "inside.exp_avg_sq" for layer in layers)
    assert sum(layer.state_bytes for layer in layers) >= opt.plan.total_bytes


def test_captured_momentum_is_that_in_the_basis() -> None:
    opt = trained()
    found = by_name(opt)
    for name in ("tall", "wide"):
        p = next(p for group in opt.param_groups for n, p in zip(group["param_names"], group["params"], strict=True) if n == name)
        m, u = (opt.state[p][key].double() for key in ("momentum.momentum_buffer", "selector.basis"))
        energy = torch.linalg.svdvals(m) ** 2
        assert found[name].captured_momentum == pytest.approx(float((m @ u).square().sum() / m.square().sum()), rel=1e-5)
        assert found[name].captured_momentum_best == pytest.approx(float(energy[:8].sum() / energy.sum()), rel=1e-5)
        assert sum(found[name].spectrum) == pytest.approx(1)
        assert found[name].to_dict()["name"] == name
    assert "captured_momentum" not in found["bias"].to_dict()


@pytest.mark.parametrize(
    ("energies", "captured", "verdict"),
    [
        ([8, 7, 6, 5, 4, 3, 3, 3], 0.5, "too small"),  # the last direction holds 0.6 of the mean
        ([8, 7, 6, 5, 4, 3, 3, 3], 0.95, "fits"),  # the momentum is captured all the same
        ([100, 50, 20, 10, 5, 5, 5, 2], 0.5, "fits"),
        ([1000, 100, 10, 5, 1, 0.1, 0.1, 0], 0.5, "wasted"),  # 0.99 of the energy in 3 of 8
        ([1, 1, 1, 1, 0.01, 0, 0, 0], 0.5, "wasted"),  # in 4 of 8, the edge
    ],
)
def test_verdicts_of_known_spectra(energies: list[float], captured: float, verdict: str) -> None:
    opt = trained(steps=1)
    state = opt.state_dict()
    tall = next(slots for slots in state["state"].values() if slots.get("selector.basis", torch.empty(0)).shape == (16, 8))
    tall["selector.covariance"] = torch.diag(torch.tensor(energies, dtype=torch.float32))
    basis = torch.eye(16)
    inside, outside = basis[:, :8], basis[:, 8:]
    tall["selector.basis"] = inside.contiguous()
    rows = torch.eye(24)[:, :16]
    tall["momentum.momentum_buffer"] = rows[:, :8] @ inside.T * captured**0.5 + rows[:, 8:] @ outside.T * (1 - captured) ** 0.5
    layer = next(layer for layer in saved_layers(state) if layer.name == "tall")
    assert layer.captured_momentum == pytest.approx(captured, rel=1e-5)
    assert layer.verdict == verdict


def test_random_directions_get_no_verdict() -> None:
    assert by_name(trained("apollo"))["tall"].verdict is None
    golore = load_spec("golore", {"matrix.selector.first.rank": 8, "matrix.selector.then.rank": 8})
    params = parameters(SHAPES)
    opt = optimizer(golore, params)
    train(opt, params, range(2))
    layer = by_name(opt)["tall"]
    assert (layer.rank, layer.verdict) == (8, None)
    assert layer.spectrum


# ------------------------------------------------------------------------------------------------------------------- the command


def test_every_kind_of_checkpoint(run: Run, tmp_path: Path) -> None:  # noqa: F811
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 8))
    opt = subspace_opt.build("cosmos", model, overrides={"matrix.selector.rank": 4})
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    opt.step()
    state = opt.state_dict()
    folders = {name: tmp_path / name for name in ("alone", "lab", "lightning")}
    for folder in folders.values():
        folder.mkdir()
    torch.save(state, folders["alone"] / "optimizer.pt")
    torch.save({"format": 1, "step": 1, "optimizer": state}, folders["lab"] / "last.pt")
    torch.save({"optimizer_states": [state]}, folders["lightning"] / "epoch.ckpt")
    one = snapshots.save(tmp_path / "shots", model, opt, step=1)
    places = [folders["alone"], folders["alone"] / "optimizer.pt", folders["lab"], folders["lightning"] / "epoch.ckpt", one.parent, one]
    found = [json.loads(run("inspect", str(place), "--json")) for place in places]
    assert found[0]["step"] == 1
    assert found[0]["state_bytes"] == opt.plan.total_bytes
    assert [layer["name"] for layer in found[0]["layers"]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(other["layers"] == found[0]["layers"] for other in found)
    assert found[0]["too_small"] + found[0]["wasted"]


def test_the_table_at_two_widths_and_the_pictures(run: Run, tmp_path: Path) -> None:  # noqa: F811
    torch.save(trained().state_dict(), tmp_path / "state.pt")
    wide = run("inspect", str(tmp_path / "state.pt"), width=120)
    assert all(word in wide for word in ("matrix", "tail", "best", "24x16", "3 of 12x16", "rank too small in", "after 3 updates"))
    narrow = run("inspect", str(tmp_path / "state.pt"), width=80)
    assert max(len(line.rstrip()) for line in narrow.splitlines()[1:]) <= 80
    pictures = [tmp_path / f"x.{kind}" for kind in ("svg", "html")]
    for picture in pictures:
        assert f"picture: {picture}" in run("inspect", str(tmp_path / "state.pt"), "--out", str(picture), width=120)
        text = picture.read_text(encoding="utf-8")
        assert all(word in text for word in ("spectra inside the subspace", "momentum captured", "bytes of state", "<svg"))
    svg, page = (picture.read_text(encoding="utf-8") for picture in pictures)
    assert svg[svg.index("<svg") :] in page, "the same state gives the same picture"


def test_long_lists_of_layers_are_grouped() -> None:
    from subspace_opt.cli.inspection.picture import MOST_BARS, by_group

    some = [SavedLayer(f"blocks.{i}.{part}.weight", 1, "matrix", 1, 4, 4, 2, i, {}) for i in range(60) for part in "ab"]
    groups = by_group(some)
    assert len(groups) == MOST_BARS
    assert groups[0][0] == "blocks.20"
    assert [layer.name for layer in groups[0][1]] == ["blocks.20.a.weight", "blocks.20.b.weight"]
    out = Console(width=120, record=True, file=io.StringIO())
    show_layers(Path("x.pt"), [SavedLayer("w", 1, "other", 1, 4, 4, None, 128, {"complement": 128})], out)
    assert "no verdict" in out.export_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file or folder"),
        (b"not a checkpoint", "no file of torch.save"),
        ({"model": {}}, "has no state dictionary of an optimizer. It has model. Save optimizer.state_dict()"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).state_dict(), "another optimizer saved this checkpoint"),
        ("fresh", "the optimizer has no state yet; save it after the first step"),
        (Path, "objects that are unsafe to load"),
    ],
)
def test_bad_checkpoints(leave: Any, tmp_path: Path, content: Any, message: str) -> None:  # noqa: F811
    file = tmp_path / "state.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is Path:
        torch.save({"optimizer": Path("x")}, file)
    elif content == "fresh":
        torch.save(optimizer("cosmos", parameters(SHAPES)).state_dict(), file)
    elif content is not None:
        torch.save(content, file)
    left: Left = leave("inspect", str(file))
    assert left.status == 2
    assert left.err.startswith(f"Error: {file}") or "another optimizer" in left.err
    assert message in left.err


def test_bad_places_for_the_picture(leave: Any, tmp_path: Path) -> None:  # noqa: F811
    for out, message in (
        (tmp_path / "x.pdf", "the name should end in .svg, .png, .html"),
        (tmp_path / "no" / "x.svg", "there is no folder"),
    ):
        left: Left = leave("inspect", str(tmp_path), "--out", str(out))
        assert (left.status, left.out) == (2, "")
        assert message in left.err
    left = leave("inspect", str(tmp_path))
    assert left.status == 2
    assert "has no complete snapshot" in left.err
