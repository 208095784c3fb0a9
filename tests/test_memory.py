"""Does a step stay within `batch_bytes`, and does a long run with many events hold no more memory than a short one?"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from common import copied, give, optimizer, parameters, small
from torch import Tensor, nn

from subspace_opt import SubspaceOptimizer, load_spec, step_in_backward
from subspace_opt.lab.run.measure import peak_temporaries

MATRICES, SIDE = 32, 64
ALL_OF_THEM = MATRICES * SIDE * SIDE * 4

# The largest number of temporaries of a stack's size that exist at once in a step of these presets. SOAP has four squares of that size.
AT_ONCE = {"cosmos": 12, "galore": 8, "muon": 8, "soap": 24, "trion": 12, "ldadam": 12, "adam-snsm": 12}


def peak(preset: str, batch_bytes: int, **options: Any) -> int:
    """Bytes of temporaries in the third step of many equal matrices."""
    params = parameters({f"w{i}": (SIDE, SIDE) for i in range(MATRICES)})
    opt = optimizer(small(preset, rank=16), params, stacking="always", batch_bytes=batch_bytes, **options)
    for step in range(3):
        give(params, step)
        if step < 2:
            opt.step()
    return peak_temporaries(opt.step, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", AT_ONCE)
@pytest.mark.parametrize("parts", [4, 8, 32])
def test_temporaries_of_stacks_keep_to_batch_bytes(preset: str, parts: int) -> None:
    """A stack cut into k parts needs a k-th of the temporaries."""
    held = peak(preset, ALL_OF_THEM // parts)
    assert held <= AT_ONCE[preset] * ALL_OF_THEM // parts
    assert held < peak(preset, ALL_OF_THEM)


@pytest.mark.parametrize("word", ["bf16", "8bit", "4bit"])
@pytest.mark.parametrize("preset", ["muon", "cosmos"])
def test_state_in_fewer_bits_is_not_unfolded_all_at_once(preset: str, word: Any) -> None:
    """A step decodes one stack at a time."""
    parts = 16
    assert peak(preset, ALL_OF_THEM // parts, state_dtype=word) <= 2 * AT_ONCE[preset] * ALL_OF_THEM // parts


@pytest.mark.parametrize("word", ["bf16", "8bit", "4bit"])
def test_a_large_matrix_is_coded_in_runs(word: Any) -> None:
    """Coding takes several temporaries of 8 bytes an entry, which is too much for a whole embedding."""
    params = parameters({"embedding": (8192, 256)})
    opt = optimizer("adamw", params, state_dtype=word)
    for step in range(2):
        give(params, step)
        if not step:
            opt.step()
    own = params["embedding"].numel() * 4
    assert peak_temporaries(opt.step, torch.device("cpu")) < own


# ------------------------------------------------------------------------------------------------------------------- a long run


def living() -> tuple[int, int]:
    """The number of tensors that Python knows, and the bytes of their storages."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    inner = [getattr(t, name) for t in tensors if hasattr(t, "codes") for name in ("codes", "scale", "qmap")]
    plain = [t for t in (*tensors, *inner) if not hasattr(t, "codes") and t.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    return len(tensors), sum(storages.values())


SHAPES = {**{f"w{i}": (16, 24) for i in range(4)}, "wide": (32, 64), "experts": (2, 16, 16), "coded": (64, 96), "bias": (48,), "number": ()}
PERIOD = 12


def event(opt: SubspaceOptimizer, params: dict[str, nn.Parameter], step: int, reload: bool) -> tuple[str, ...]:
    """Make the event before a step and return the parameters without a gradient in it; every period has the same events."""
    at = step % PERIOD
    if at in (3, 5):
        params["w1"].requires_grad_(at == 5)
    elif at == 4:
        opt.refresh_bases()
    elif at == 6:
        for group in opt.param_groups:
            group["lr"] = 1e-4 * (1 + step // PERIOD % 3)
    elif at == 7:
        opt.explain()
    elif at == 8 and reload:
        opt.load_state_dict(opt.state_dict())
    elif at == 11:
        opt.zero_grad()
    return ("w2", "wide") if at in (1, 2, 10) else ("w1",) if 3 <= at < 5 else ()


@pytest.mark.slow
@pytest.mark.usefixtures("new_objects_only")
@pytest.mark.parametrize("preset", ["cosmos", "galore"])
@pytest.mark.parametrize(("reload", "options"), [(True, {}), (False, {}), (True, {"state_dtype": "8bit"})], ids=str)
def test_memory_does_not_grow_over_twenty_eventful_periods(preset: str, reload: bool, options: dict[str, Any]) -> None:
    """The optimizer keeps nothing of frozen parameters, replaced states and old bases."""
    params = parameters(SHAPES)
    opt = optimizer(small(preset, rank=8), params, stacking="always", **options)
    seen = []
    for step in range(20 * PERIOD):
        give(params, step % 7, missing=event(opt, params, step, reload))
        opt.step()
        if step % PERIOD == PERIOD - 1:
            seen.append((*living(), len(opt._memory.tables), sum(map(len, opt._memory.homes.values())), len(opt._memory.counts)))
    assert all(p.isfinite().all() for p in params.values())
    late = seen[3:]
    # Stacks may be cut differently in each period, but their number and bytes are bounded by those of earlier periods.
    assert {line[1] for line in late} == {late[0][1]}
    assert max(line[0] for line in late[-3:]) <= max(line[0] for line in late[:3])
    assert max(line[3] for line in late[-3:]) <= max(line[3] for line in late[:3])
    assert {(line[2], line[4]) for line in late} == {(late[0][2], late[0][4])}


@pytest.mark.slow
@pytest.mark.usefixtures("new_objects_only")
@pytest.mark.parametrize("preset", ["cosmos", "galore"])
def test_nor_do_updates_in_backward(preset: str) -> None:
    model = nn.Sequential(nn.Embedding(30, 32), nn.Linear(32, 48), nn.Linear(48, 30))
    opt = step_in_backward(model, load_spec(preset, {"matrix.selector.rank": 8}), lr=1e-4)
    words = torch.arange(30)
    seen = []
    for step in range(10 * PERIOD):
        model[1].weight.requires_grad_(not 3 <= step % PERIOD < 5)
        if step % PERIOD == 4:
            opt.refresh_bases()
        if step % PERIOD == 8:
            opt.load_state_dict(opt.state_dict())
        nn.functional.cross_entropy(model(words), words.flip(0)).backward()
        opt.step()
        if step % PERIOD == PERIOD - 1:
            seen.append((*living(), len(opt._hooks), len(model[1].weight._post_accumulate_grad_hooks)))
    assert len(set(seen[2:])) == 1


@pytest.mark.slow
def test_a_replaced_state_is_let_go() -> None:
    """After a large state is loaded, the optimizer holds one state, not two."""
    params = parameters({f"w{i}": (256, 256) for i in range(4)})
    opt = optimizer(small("muon"), params, stacking="always")
    twin = optimizer(small("muon"), copied(params))

    def reload(times: int) -> int:
        for step in range(times):
            opt.load_state_dict(opt.state_dict())
            give(params, step)
            opt.step()
        return living()[1]

    reload(2)  # tensors that the process makes once exist now
    twin.load_state_dict(opt.state_dict())
    before = reload(1)
    twin.load_state_dict(opt.state_dict())
    assert reload(3) == before


@pytest.mark.slow
def test_a_new_plan_finds_the_state_where_it_is() -> None:
    """A plan is made again when a parameter freezes or `explain` is called; stacked state stays in the same tensors."""

    def run() -> list[tuple[int, list[int]]]:
        params = parameters({f"w{i}": (16, 24) for i in range(4)})
        opt = optimizer(small("cosmos"), params, stacking="always")
        held = []
        for step in range(8):
            give(params, step)
            opt.step()
            opt.explain()
            homes = [home for homes in opt._memory.homes.values() for home in homes]
            held.append((living()[1], [home.slots["selector.basis"].data_ptr() for home in homes]))
        return held

    run()  # the process makes some tensors once: numbers that every later optimizer shares
    held = run()
    assert len(held[1][1]) == 1
    assert all(line == held[1] for line in held[1:])
