"""Shards equal PyTorch's, parts cover each parameter once, messages fill every part, and owners share the work evenly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from subspace_opt import Entry, Plan, build, load_spec, make_plan
from subspace_opt.distributed import meshes
from subspace_opt.distributed.boxes import Box, Cut, full_box, shard_boxes
from subspace_opt.distributed.meshes import MESH_KINDS, MeshError, make_mesh, place
from subspace_opt.distributed.placement import Layout, Sharding
from subspace_opt.lab import meta_model
from subspace_opt.plan import Row

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
MESHES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def placed(draw: st.DrawFn, *, copies: bool = True) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Cut | None, ...]]:
    """A shape, a mesh, and the placements that FSDP2, HSDP and tensor parallelism make, in any order."""
    shape, mesh = draw(SHAPES), draw(MESHES)
    dims = st.sampled_from([None, *range(len(shape))] if copies else range(len(shape)))
    return shape, mesh, tuple(None if (dim := draw(dims)) is None else Cut(dim) for _ in mesh)


# --- shards


@given(placed())
def test_shards_are_pytorchs_own(case: tuple[tuple[int, ...], tuple[int, ...], tuple[Cut | None, ...]]) -> None:
    shape, mesh, cuts = case
    check_against_torch(shape, mesh, cuts)


@pytest.mark.parametrize("shape", [(16, 6), (8, 3), (24, 5), (48, 1)])
@pytest.mark.parametrize("mesh", [(2, 2), (4, 2), (2, 4)])
def test_shards_of_fsdp_over_tensor_parallel_are_pytorchs_own(shape: tuple[int, ...], mesh: tuple[int, ...]) -> None:
    check_against_torch(shape, mesh, (Cut(0, strided=True), Cut(0)))


def check_against_torch(shape: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> None:
    found = shard_boxes(shape, mesh, cuts)
    assert len(found) == prod(mesh)
    placements = [place_of(cuts, i, mesh) for i in range(len(mesh))]
    for rank, box in enumerate(found):
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(rank), mesh))
        own, offset = _compute_local_shape_and_global_offset(shape, mesh, lambda dim, at=at: at[dim], placements)
        assert box.shape == own
        if prod(own):
            assert box.start == offset


def place_of(cuts: Sequence[Cut | None], i: int, mesh: Sequence[int]) -> Any:
    cut = cuts[i]
    if cut is None:
        return Replicate()
    right = prod(mesh[j] for j in range(i + 1, len(mesh)) if (other := cuts[j]) is not None and other.dim == cut.dim)
    return _StridedShard(cut.dim, split_factor=right) if cut.strided else Shard(cut.dim)


# --- parts and messages

VIEWS: dict[str, tuple[dict[str, Any], tuple[int, ...], frozenset[str]]] = {
    "matrix": ({}, (12, 8), frozenset()),
    "transposed": ({"transposed": True}, (12, 8), frozenset()),
    "heads": ({"heads": 6}, (12, 8), frozenset()),
    "heads, transposed": ({"heads": 4, "transposed": True}, (12, 8), frozenset()),
    "fused": ({"split": {"q": 6, "k": 3, "v": 3}}, (12, 8), frozenset()),
    "conv": ({}, (6, 4, 3, 3), frozenset({"conv"})),
    "experts": ({"view": "stack"}, (6, 5, 4), frozenset()),
    "experts of heads": ({"view": "stack", "heads": 2}, (5, 4, 3), frozenset()),
    "two stacks": ({"view": "stack"}, (2, 3, 5, 4), frozenset()),
    "vector": ({}, (13,), frozenset()),
    "number": ({}, (), frozenset()),
}
PIPELINES = ["cosmos", "soap", "muon", "adamw", "galore", "trion"]


@cache
def row_of(view: str, spec: str, name: str = "w", compensated: bool = False) -> Row:
    route, shape, modules = VIEWS[view]
    # With a rank this small, some selectors send only coordinates.
    loaded = load_spec(spec, {"matrix.selector.rank": 2} if spec in ("cosmos", "galore", "trion") else None)
    pipeline = next((use for use in loaded.pipelines if use in ("matrix", "all")), "")
    data = {"pipelines": {pipeline: loaded.model_dump(mode="json", exclude_unset=True)["pipelines"][pipeline]}}
    spec_ = load_spec({**data, "routes": [{"use": pipeline, **(route if len(shape) > 1 else {})}]})
    dtype = torch.bfloat16 if compensated else torch.float32
    return make_plan(spec_, [Entry(name, shape, dtype, modules)], compensated=compensated).rows[0]


@st.composite
def any_sharding(draw: st.DrawFn) -> Sharding:
    """Parameters of any view, sharded in any way on any mesh."""
    row = row_of(draw(st.sampled_from(sorted(VIEWS))), draw(st.sampled_from(PIPELINES)), compensated=draw(st.booleans()))
    mesh = draw(MESHES)
    replicated = draw(st.booleans())
    shape = row.entry.shape
    dims = st.sampled_from([None, *range(len(shape))])
    cuts = tuple(None if replicated or (dim := draw(dims)) is None else Cut(dim) for _ in mesh)
    layout = Layout(prod(mesh), replicated, draw(st.lists(st.integers(0, 9), min_size=prod(mesh), max_size=prod(mesh))))
    return layout.add([row], [shard_boxes(shape, mesh, cuts)], [() if replicated else cuts])[0]


def marks(boxes: Sequence[Box], shape: tuple[int, ...]) -> torch.Tensor:
    """The number of boxes that cover each entry."""
    out = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        out[box.slices_in(full_box(shape))] += 1
    return out


@given(any_sharding())
def test_parts_cover_a_parameter_once(sharding: Sharding) -> None:
    covered = marks([part.box for part in sharding.parts], sharding.row.entry.shape)
    assert covered.eq(1).all()
    owners = [owner for part in sharding.parts for owner in part.owners]
    assert len(set(owners)) == len(owners)  # no rank has two
    assert all(part.box.numel for part in sharding.parts)
    assert sum(part.row.entry.numel for part in sharding.parts) == sharding.row.entry.numel


@given(any_sharding())
def test_slots_are_covered_once_by_what_ranks_keep(sharding: Sharding) -> None:
    row = sharding.row
    for key, (shape, _) in row.state.items():
        if key in ("step", "refreshed"):
            continue
        boxes = {box for rank in range(len(sharding.boxes)) if (box := sharding.state_box(key, rank)) is not None}
        assert marks(sorted(boxes), shape).eq(1).all(), key
        for part in sharding.parts:
            if key in part.row.state:
                assert prod(part.row.state[key][0]) == part.state[key].numel


@given(any_sharding())
def test_messages_bring_each_part_all_of_itself(sharding: Sharding) -> None:
    """An owner gets every entry of a gradient once, from a rank that has it. Every shard gets each entry of its update once."""
    shape = sharding.row.entry.shape
    arriving = list(sharding.gradient_messages())
    for message in arriving:
        assert sharding.boxes[message.source].contains(message.box)
    for part in sharding.parts:
        for owner in part.owners:
            got = marks([m.box for m in arriving if m.target == owner], shape)
            assert torch.equal(got, marks([] if sharding.updates_in_place else [part.box], shape))
    leaving = list(sharding.update_messages())
    for message in leaving:
        part = sharding.part_of(message.source)
        assert part is not None
        assert part.box.contains(message.box)
    had = {(message.target, message.box) for message in leaving}
    for message in sharding.replica_messages():
        assert (message.source, message.box) in had  # a rank passes on received entries
        leaving.append(message)
    for rank, box in enumerate(sharding.boxes):
        got = [m.box for m in leaving if m.target == rank]
        own = sharding.part_of(rank)
        if sharding.updates_in_place and own is not None:
            got.append(own.box)
        assert torch.equal(marks(got, shape).clamp(max=1), marks([box], shape))
        assert marks(got, shape).max() <= 1 or sharding.updates_in_place


@given(any_sharding(), st.booleans())
def test_all_ranks_at_once_are_each_rank(sharding: Sharding, frozen: bool) -> None:
    """The planner's sums equal the totals of single messages. Plans of thousands of ranks need the sums."""
    ranks = len(sharding.boxes)
    assert meshes.total_bytes_held([sharding, sharding], ranks) == [2 * sharding.bytes_held(rank) for rank in range(ranks)]
    for refresh in (False, True):
        assert meshes.total_bytes_sent([sharding, sharding], ranks, refresh=refresh) == [
            2 * sharding.bytes_sent(rank, refresh=refresh) for rank in range(ranks)
        ]


def test_where_coordinates_are_enough_no_gradient_travels() -> None:
    row = row_of("matrix", "galore")
    (sharding,) = Layout(2).add([row], [shard_boxes((12, 8), (2,), (Cut(1),))], [(Cut(1),)])
    assert sharding.basis_dim == 1
    assert meshes.total_bytes_sent([sharding], 2) == [12 * 2 * 4] * 2  # coordinates of 12 x 2 in float32, to the owner and back
    assert meshes.total_bytes_sent([sharding], 2, refresh=True) > [12 * 4 * 4] * 2


# --- owners


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize(("number", "ranks"), [(64, 8), (61, 8), (5, 8), (100, 7)])
def test_equal_matrices_are_owned_evenly(number: int, ranks: int, replicated: bool) -> None:
    rows = [row_of("matrix", "muon", f"w{i}") for i in range(number)]
    boxes = shard_boxes((12, 8), (ranks,), (None if replicated else Cut(0),))
    owners = Counter(
        part.owners[0] for sharding in Layout(ranks, replicated).add(rows, [boxes] * number, [()] * number) for part in sharding.parts
    )
    counts = [owners[rank] for rank in range(ranks)]
    assert sum(counts) == number
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.sampled_from(["matrix", "experts", "vector", "conv"]), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 5))
def test_a_group_added_later_moves_nobody(views: list[str], cut: int, ranks: int) -> None:
    rows = [row_of(view, "cosmos", f"w{i}") for i, view in enumerate(views)]
    boxes = [shard_boxes(row.entry.shape, (ranks,), (Cut(0),)) for row in rows]
    first, rest = slice(0, cut), slice(cut, None)
    alone = Layout(ranks).add(rows[first], boxes[first], [()] * len(rows[first]))
    layout = Layout(ranks)
    before = layout.add(rows[first], boxes[first], [()] * len(rows[first]))
    layout.add(rows[rest], boxes[rest], [()] * len(rows[rest]))
    assert owners_of(before) == owners_of(alone)


@given(st.permutations(range(9)), st.integers(1, 5))
def test_the_order_of_parameters_changes_no_owner(order: list[int], ranks: int) -> None:
    rows = [row_of(("matrix", "experts", "fused")[i % 3], "muon", f"w{i}") for i in range(9)]
    boxes = [shard_boxes(row.entry.shape, (ranks,), (Cut(0),)) for row in rows]
    straight = Layout(ranks).add(rows, boxes, [()] * 9)
    mixed = Layout(ranks).add([rows[i] for i in order], [boxes[i] for i in order], [()] * 9)
    assert owners_of(straight) == owners_of([mixed[order.index(i)] for i in range(9)])


def owners_of(shardings: Sequence[Sharding]) -> list[tuple[int, ...]]:
    return [part.owners for sharding in shardings for part in sharding.parts]


# --- meshes without processes


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {spec: build(spec, meta_model("tiny", vocab_size=250)).plan for spec in ("cosmos", "soap", "galore", "adamw", "trion")}


@pytest.mark.parametrize("kind", MESH_KINDS)
@pytest.mark.parametrize("ranks", [2, 6])
def test_the_ranks_of_a_mesh_hold_the_plan(kind: str, ranks: int, plans: dict[str, Plan]) -> None:
    """The bytes of all ranks, with copies counted once, are the plan's total and a few counters."""
    for spec, plan in plans.items():
        found = place(plan, make_mesh(kind, ranks))
        copies = [1 if axes == tuple(range(len(found.mesh.shape))) else found.mesh.shape[-1] for axes in found.axes]
        resting = sum(row.state_bytes * (ranks if not axes else copy) for row, axes, copy in zip(plan, found.axes, copies, strict=True))
        elementwise_copies = sum(found.bytes_held) - resting
        counters = 8 * ranks * len(plan)
        if kind == "hsdp":  # elementwise: every replica updates its own shard
            assert elementwise_copies >= 0, spec
        else:
            assert 0 <= elementwise_copies <= counters, spec
        assert len(found.bytes_sent) == ranks


def test_a_rank_has_its_place_among_those_that_share() -> None:
    mesh = make_mesh("fsdp+tp", 6, (3, 2))
    assert [mesh.position(rank, (0, 1)) for rank in range(6)] == list(range(6))
    assert [mesh.position(rank, (0,)) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert str(mesh) == "fsdp+tp 3x2"


@pytest.mark.parametrize(
    ("kind", "ranks", "shape", "told"),
    [
        ("zero", 4, None, "mesh 'zero' is unknown; choose one of fsdp, hsdp"),
        ("hsdp", 5, None, "give an even number, or the shape: --shape 1x5"),
        ("hsdp", 8, (2, 3), "shape 2x3 does not fit mesh hsdp of 8 ranks: it takes 2 numbers, product 8"),
        ("fsdp", 8, (2, 4), "shape 2x4 does not fit mesh fsdp of 8 ranks: it takes 1 number, product 8"),
    ],
)
def test_a_mesh_that_is_none(kind: str, ranks: int, shape: tuple[int, ...] | None, told: str) -> None:
    with pytest.raises(MeshError, match=told):
        make_mesh(kind, ranks, shape)


def test_tensor_parallelism_needs_layers_that_it_knows() -> None:
    plan = make_plan(load_spec("muon"), [Entry("conv.weight", (8, 8))])
    with pytest.raises(MeshError, match=r"mesh tp cuts q_proj, .* the model has none of these; choose fsdp"):
        place(plan, make_mesh("tp", 2))


def test_thousands_of_ranks_are_planned() -> None:
    """A layout that compared every pair of ranks would take hours."""
    found = place(build("cosmos", meta_model("350m")).plan, make_mesh("fsdp", 1024))
    assert sum(found.bytes_held) >= found.plan.total_bytes
    assert min(found.bytes_sent) > 0


@pytest.mark.parametrize(("gpus", "spec"), [(8, "cosmos"), (256, "soap")])
def test_the_page_tells_what_the_planner_computes(gpus: int, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "benchmarks")
    import on_paper

    page = (root / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert f"{on_paper.line('7b', gpus, spec)}\n" in page
    assert page.count("| 70b | ") == page.count("| moe-400b | ") == 15
