"""One step of parameters that several ranks share: look together, bring matrices to their owners, compute there, bring updates home.

    shards of gradients --one all-to-all a bucket--> whole matrices on their owners --the engine--> updates --one all-to-all--> shards

What lies where it is computed does not travel. While one bucket is computed the next is on its way. All ranks run the same collectives
in the same order, whatever gradients they have.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..engine import step as engine
from ..engine.gradients import judged, largest, nonfinite, transferred
from ..engine.homes import Memory
from ..engine.work import Options, Work, allocate
from ..plan import COUNTERS
from .boxes import Box
from .coordinates import gather_bases, refreshes, runs, scatter_bases, update_in_coordinates
from .exchange import Exchange, ShardingError, Team
from .parts import Part
from .placement import BASIS, Message, Share
from .shards import Item, apply, given, messages

FAILED, SILENT, HELD = 1, 2, 4  # what became of a part: a decomposition failed; there is no update; and the first one is not counted


@dataclass
class Bucket:
    """Parameters whose gradients travel together, and what is under way for them."""

    items: list[Item]
    gradients: Exchange | None = None
    weights: Exchange | None = None
    updates: Exchange | None = None
    status: Tensor | None = None
    outboxes: dict[int, Tensor] = field(default_factory=dict)

    @property
    def resident(self) -> bool:
        return self.items[0].share.resident


# --------------------------------------------------------------------------------------------------------------------- look


def survey(items: list[Item], options: Options) -> tuple[list[Item], list[str]]:
    """As `survey.survey`, with the same answer on all ranks: what is to be updated, and what is skipped.

    Raises:
        NonFiniteGradient: with policy `raise`; nothing has been changed.
    """
    found = [pair for team, own in _by_team(items).items() for pair in look(team, own, options)]
    bad = judged((item.work, size) for item, size in found if options.nonfinite != "propagate" or item.work.count == 0)
    if bad and options.nonfinite == "raise":
        raise nonfinite(bad)
    skipped = set(bad) if options.nonfinite == "skip" else set()
    return [item for item, _ in found if item.name not in skipped], sorted(skipped)


def _by_team(items: Sequence[Item]) -> dict[Team, list[Item]]:
    teams: dict[Team, list[Item]] = {}
    for item in items:
        teams.setdefault(item.team, []).append(item)
    return teams


def look(team: Team, items: Sequence[Item], options: Options) -> list[tuple[Item, float]]:
    """The items that have a gradient on any rank, with its size: the same list on every rank. A shard without one counts as 0.

    Raises:
        ShardingError: copies of a parameter, of which some have a gradient and some have none.
    """
    if not items:
        return []
    device = items[0].weight.device
    seen = [_own_gradient(team, item) if options.nonfinite != "propagate" or item.work.count == 0 else None for item in items]
    squares = [size**2 for size in _sizes(seen, norms=True)]
    table = torch.tensor([squares, [float(item.grad is not None) for item in items]], dtype=torch.float64, device=device)
    sums, holders = team.sum(table).tolist()
    found = []
    for item, square, count in zip(items, sums, holders, strict=True):
        if count == 0:
            continue
        if count < team.size and _copied(item.share):
            raise ShardingError(
                f"'{item.name}' has a gradient on {int(count)} of {team.size} ranks that hold copies of it; average gradients over all of "
                "them, as DistributedDataParallel(find_unused_parameters=True) does"
            )
        if item.grad is None:
            item.grad = torch.zeros_like(item.weight)
        found.append((item, math.sqrt(square) if square >= 0 else square))
    unsure = [
        i
        for i, (item, size) in enumerate(found)
        if (options.nonfinite != "propagate" or item.work.count == 0) and not 0.0 < size <= largest(item.share.row.compute_dtype)
    ]
    if unsure:
        # NaN counts as infinity: not every backend carries it through a maximum.
        tops = [math.inf if math.isnan(top) else top for top in _sizes([found[i][0].grad for i in unsure], norms=False)]
        peaks = team.max(torch.tensor(tops, dtype=torch.float64, device=device)).tolist()
        for i, peak in zip(unsure, peaks, strict=True):
            found[i] = (found[i][0], peak)
    return found


def _own_gradient(team: Team, item: Item) -> Tensor | None:
    """The part of a gradient that no other rank counts; None for nothing."""
    if item.grad is None or not item.grad.numel():
        return None
    own = item.share.boxes[team.rank]
    if item.share.resident:
        part = item.part
        return None if part is None or part.owners[0] != team.rank else item.grad[part.box.slices_in(own)]
    return item.grad if item.share.replica_index[team.rank] == 0 else None


def _sizes(grads: Sequence[Tensor | None], *, norms: bool) -> list[float]:
    """The size of each, 0 for nothing, by one transfer."""
    there = [i for i, grad in enumerate(grads) if grad is not None and grad.numel()]
    out = [0.0] * len(grads)
    for i, size in zip(there, transferred([grad for grad in (grads[i] for i in there) if grad is not None], norms=norms), strict=True):
        out[i] = size
    return out


def _copied(share: Share) -> bool:
    held = [box for box in share.boxes if box.numel]
    return len(set(held)) < len(held)


# --------------------------------------------------------------------------------------------------------------------- step


def take_step(items: list[Item], state: Any, options: Options, memory: Memory, failures: dict[str, int]) -> None:
    """Update parameters that all ranks have found to have a gradient. `state`: the optimizer's.

    Raises:
        LinAlgError: as `engine.take_step`, on all ranks together.
    """
    for item in items:
        item.work.state = state[item.param]
    for team, own in _by_team(items).items():
        _step(team, own, options, memory, failures)


def _step(team: Team, items: list[Item], options: Options, memory: Memory, failures: dict[str, int]) -> None:
    items = sorted(items, key=lambda item: item.name)
    for item in items:
        _allocate(team, item)
    errors: dict[str, Exception] = {}
    thin = [item for item in items if item.share.along is not None and item.work.count > 0 and not refreshes(item)]
    whole = [item for item in items if item.share.along is not None and item not in thin]
    gather_bases(team, whole)
    for run in runs(thin, options.batch_bytes * team.size):
        update_in_coordinates(team, run, options, memory)
    buckets = list(_buckets([item for item in items if not item.share.local and item not in thin], options, team))
    if buckets:
        _send_gradients(team, buckets[0])
    local = [item.work for item in items if item.share.local and item.part is not None]
    for item in items:
        if item.share.local and item.part is not None:
            own = item.share.boxes[team.rank]
            item.work.param, item.work.grad = item.weight[item.part.box.slices_in(own)], given(item)[item.part.box.slices_in(own)]
    engine.compute(local, options, memory, errors)
    engine.write_back(local)
    for number, bucket in enumerate(buckets):
        if number + 1 < len(buckets):
            _send_gradients(team, buckets[number + 1])
        here = _receive_gradients(team, bucket)
        # A basis that is whole for this step alone has no place in storage that is kept.
        engine.compute(here, replace(options, stacking="never") if bucket.items[0].share.along is not None else options, memory, errors)
        engine.write_back(here)
        _send_updates(team, bucket, errors)
        if number:
            _receive_updates(team, buckets[number - 1], options, errors)
    if buckets:
        _receive_updates(team, buckets[-1], options, errors)
    scatter_bases(team, whole)
    works = [item.work for item in items]
    engine.close(works, memory)
    engine.report(works, errors, failures)


def _allocate(team: Team, item: Item) -> None:
    """State of this rank's part; for what other ranks keep, empty tensors of the same names."""
    state = item.work.state
    if state:
        return
    if item.part is not None:
        allocate(item.part.row, item.weight, state)
    else:
        for key, (_, dtype) in item.share.row.state.items():
            counter = key in COUNTERS
            state[key] = torch.zeros(() if counter else (0,), dtype=dtype, device="cpu" if counter else item.weight.device)
    if item.share.along is not None:
        rows = item.share.state_box(BASIS, team.rank)
        state[BASIS] = torch.zeros((0,) if rows is None else rows.shape, dtype=item.share.row.compute_dtype, device=item.weight.device)
    box = item.share.state_box("compensation", team.rank) if item.share.row.compensated else None
    if box is not None:
        state["compensation"] = torch.zeros(box.shape, dtype=item.share.row.entry.dtype, device=item.weight.device)


def _buckets(items: list[Item], options: Options, team: Team) -> Iterator[Bucket]:
    """Items in runs of one shape, dtype and way of travelling, so many that the whole matrices of a rank stay within `batch_bytes`."""
    kinds: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        row = item.share.row
        weighted = any(split.needs_weight for _, split in row.splits)
        kinds[
            (item.share.resident, weighted, item.share.along is None, item.weight.dtype, row.compute_dtype, row.entry.shape, row.pipeline)
        ].append(item)
    waiting: dict[Any, list[Item]] = {}
    held: dict[Any, int] = {}
    limit = options.batch_bytes * team.size
    for (resident, weighted, apart, dtype, compute, _, _), alike in kinds.items():
        key = (resident, weighted, apart, dtype, compute)
        for item in alike:
            size = item.share.row.entry.numel * compute.itemsize
            if held.get(key, 0) + size > limit and waiting.get(key):
                yield Bucket(waiting.pop(key))
                held[key] = 0
            waiting.setdefault(key, []).append(item)
            held[key] = held.get(key, 0) + size
    for rest in waiting.values():
        yield Bucket(rest)


def _send_gradients(team: Team, bucket: Bucket) -> None:
    own, travels = messages(team, bucket.items, "incoming")
    first = bucket.items[0]

    def gradient(message: Message) -> Tensor:
        item = bucket.items[message.item]
        return given(item)[message.box.slices_in(item.share.boxes[team.rank])].to(first.weight.dtype)

    def weight(message: Message) -> Tensor:
        item = bucket.items[message.item]
        return item.weight[message.box.slices_in(item.share.boxes[team.rank])]

    bucket.gradients = Exchange(team, own, travels, gradient, first.weight.dtype, first.weight.device)
    if any(split.needs_weight for _, split in first.share.row.splits):
        bucket.weights = Exchange(team, own, travels, weight, first.weight.dtype, first.weight.device)


def _receive_gradients(team: Team, bucket: Bucket) -> list[Work]:
    """The work of this rank: whole matrices of a bucket."""
    own = [(i, item, item.part) for i, item in enumerate(bucket.items) if item.part is not None]
    if bucket.resident:
        for _, item, part in own:
            here = part.box.slices_in(item.share.boxes[team.rank])
            item.work.param, item.work.grad = item.weight[here], given(item)[here]
        return [item.work for _, item, _ in own]
    for i, item, part in own:
        item.work.grad = torch.empty(part.box.shape, dtype=item.weight.dtype, device=item.weight.device)
        bucket.outboxes[i] = torch.zeros(part.box.shape, dtype=item.share.row.compute_dtype, device=item.weight.device)
        item.work.outbox = bucket.outboxes[i]
        item.work.param = bucket.outboxes[i] if bucket.weights is None else torch.empty_like(item.work.grad)
    for exchange, name in ((bucket.gradients, "grad"), (bucket.weights, "param")):
        if exchange is not None:
            for message, tensor in exchange.wait():
                item = bucket.items[message.item]
                assert item.part is not None
                getattr(item.work, name)[message.box.slices_in(item.part.box)] = tensor
    bucket.gradients = bucket.weights = None
    return [item.work for _, item, _ in own]


def _send_updates(team: Team, bucket: Bucket, errors: dict[str, Exception]) -> None:
    own, travels = messages(team, bucket.items, "outgoing")
    first = bucket.items[0]

    def update(message: Message) -> Tensor:
        item = bucket.items[message.item]
        assert item.part is not None
        if bucket.resident:
            return item.weight[message.box.slices_in(item.share.boxes[team.rank])]
        return bucket.outboxes[message.item][message.box.slices_in(item.part.box)]

    dtype = first.weight.dtype if bucket.resident else first.share.row.compute_dtype
    bucket.updates = Exchange(team, own, travels, update, dtype, first.weight.device)
    for item in bucket.items:  # their place is taken until the exchange is over by the buffers of the exchange alone
        item.work.outbox = None
    if any(item.fallible for item in bucket.items):
        codes = [code for item in bucket.items for part in item.share.parts for code in _codes(item, part, team, errors)]
        bucket.status = team.max(torch.tensor(codes, dtype=torch.int32, device=first.weight.device))


def _codes(item: Item, part: Part, team: Team, errors: dict[str, Exception]) -> list[int]:
    """What became of each matrix of a part, as its owner knows."""
    if team.rank not in part.owners:
        return [0] * len(part.matrices)
    work = item.work
    code = FAILED * (item.name in errors) + HELD * work.held
    return [code + SILENT * (i in work.silent) for i in range(len(part.matrices))]


def _receive_updates(team: Team, bucket: Bucket, options: Options, errors: dict[str, Exception]) -> None:
    told = iter(() if bucket.status is None else bucket.status.tolist())
    moving: dict[tuple[int, Box], list[Box]] = {}  # by part, its matrices that are updated
    for i, item in enumerate(bucket.items):
        for part in item.share.parts:
            codes = [next(told, 0) for _ in part.matrices]
            moving[i, part.box] = [box for box, code in zip(part.matrices, codes, strict=True) if not code & SILENT]
            if any(code & FAILED for code in codes):
                errors.setdefault(item.name, RuntimeError(f"on rank {team.members[part.owners[0]]}"))
            item.work.held |= any(code & HELD for code in codes)
    assert bucket.updates is not None
    arrived = list(bucket.updates.wait())
    copies, travels = messages(team, bucket.items, "copies")
    if travels:
        here = {(message.item, message.box): tensor for message, tensor in arrived}
        first = bucket.items[0]

        def update(message: Message) -> Tensor:
            return here[message.item, message.box]

        arrived += Exchange(team, copies, travels, update, first.share.row.compute_dtype, first.weight.device).wait()
    for message, tensor in arrived:
        item = bucket.items[message.item]
        own = item.share.boxes[team.rank]
        if bucket.resident:
            item.weight[message.box.slices_in(own)] = tensor
            continue
        part = next(part for part in item.share.parts if part.box.contains(message.box))
        boxes = moving[message.item, part.box]
        for box in [message.box] if len(boxes) == len(part.matrices) else [b for m in boxes if (b := message.box.intersection(m))]:
            apply(team, item, box, item.weight[box.slices_in(own)], tensor[box.slices_in(message.box)], options)
    bucket.updates = None
    bucket.outboxes.clear()
