"""Helpers of all test files: presets made small, parameters and gradients from a seed, and comparisons of two runs.

`PRESETS` lists the package's YAML files, so a new preset is tested without a new row.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from subspace_opt import Spec, SubspaceOptimizer, load_spec
from subspace_opt.spec import preset_names

PRESETS = preset_names(installed=False)
RANK, EVERY = 3, 3
LINEAR = frozenset({"linear"})

Params = dict[str, nn.Parameter]
Shapes = Mapping[str, tuple[int, ...]]

# Every orientation, two matrices that share a stack, a vector and a number.
SHAPES: Shapes = {"tall": (7, 4), "wide": (4, 7), "square": (5, 5), "mate": (7, 4), "bias": (4,), "scalar": ()}


@cache
def small(name: str, rank: float = RANK, every: int = EVERY) -> Spec:
    """A preset with at most `rank` columns in each low-rank selector, and a refresh at every `every` updates.

    All matrices refresh together, also if the preset spreads them by name, because tests compare a matrix with its copy of another name.
    """
    spec = load_spec(name)
    overrides: dict[str, Any] = {}
    for pipeline, parts in spec.pipelines.items():
        _shrink(f"{pipeline}.selector", parts.selector.model_dump(), rank, every, overrides)
    return load_spec(spec, overrides)


def _shrink(place: str, selector: dict[str, Any], rank: float, every: int, overrides: dict[str, Any]) -> None:
    if "rank" in selector:
        overrides[f"{place}.rank"] = rank
    if (selector.get("every") or 1) > 1:
        overrides[f"{place}.every"] = every
    if selector.get("offset") == "spread":
        overrides[f"{place}.offset"] = 1 if selector["kind"] == "kron_eigen" else 0
    if "at" in selector:
        overrides[f"{place}.at"] = every + 1  # one refresh before the switch, the next after it
    for part in ("first", "then"):
        if isinstance(selector.get(part), dict):
            _shrink(f"{place}.{part}", selector[part], rank, every, overrides)


def parameters(shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0) -> Params:
    """Parameters whose values depend on their name and the seed alone."""
    return {name: nn.Parameter(_normal(shape, seed, "value", name).to(dtype)) for name, shape in shapes.items()}


def copied(params: Params) -> Params:
    return {name: copy.deepcopy(p) for name, p in params.items()}


def optimizer(spec: Any, params: Params, **options: Any) -> SubspaceOptimizer:
    """An optimizer of named parameters, each declared as the weight of a linear layer."""
    spec = small(spec) if isinstance(spec, str) and spec in PRESETS else spec
    return SubspaceOptimizer(params.items(), spec, modules=dict.fromkeys(params, LINEAR), **options)


def _normal(shape: tuple[int, ...], *words: object) -> Tensor:
    seed = zlib.crc32("/".join(map(str, words)).encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(name: str, shape: tuple[int, ...], step: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A gradient that depends on name, step and seed alone."""
    return _normal(shape, seed, "grad", name, step).to(dtype)


def give(params: Params, step: int, seed: int = 0, missing: tuple[str, ...] = ()) -> None:
    """Set the gradients of one step; those of `missing` parameters are None."""
    for name, p in params.items():
        p.grad = None if name in missing else gradient(name, tuple(p.shape), step, p.dtype, seed)


def train(opt: torch.optim.Optimizer, params: Params, steps: range | list[int], seed: int = 0) -> None:
    for step in steps:
        give(params, step, seed)
        opt.step()


# ------------------------------------------------------------------------------------------------------------------ comparing


def flat(opt: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Every state tensor, by parameter name (or number) and key."""
    names = [n for g in opt.param_groups for n in g.get("param_names", map(str, range(len(g["params"]))))]
    order = [p for g in opt.param_groups for p in g["params"]]
    for name, p in sorted(zip(names, order, strict=True), key=lambda pair: pair[0]):
        for key, value in sorted(opt.state.get(p, {}).items()):
            yield f"{name}/{key}", value


def snapshot(opt: torch.optim.Optimizer, params: Params) -> dict[str, Tensor]:
    """Copies of all parameters and all state."""
    out = {name: p.detach().clone() for name, p in params.items()}
    return out | {key: value.clone() for key, value in flat(opt)}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal to the bit, dtypes and shapes included; NaN equals NaN."""
    return a.keys() == b.keys() and all(same_tensor(a[key], b[key]) for key in a)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(whole[x.itemsize]) if x.is_floating_point() else x


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of every entry, relative to the larger of 1 and the entry's own size."""
    assert a.keys() == b.keys()
    out = {}
    for key in a:
        x, y = a[key].double(), b[key].double()
        out[key] = float((x - y).abs().max() / x.abs().max().clamp_min(1.0)) if x.numel() else 0.0
    return out


def finite(values: Mapping[str, Tensor]) -> bool:
    return all(bool(v.isfinite().all()) for v in values.values())
