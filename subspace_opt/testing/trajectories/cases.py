"""The preset of each golden file, and the spec options for the options of its reference.

A new parity test needs one row of `CASES`: a function from the file's options to an optimizer, and the parameters left out with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...optimizer import SubspaceOptimizer
from ...spec import load_spec
from .golden import Golden

Make = Callable[[Golden, dict[str, torch.nn.Parameter]], SubspaceOptimizer]


def options(golden: Golden, group: dict[str, Any] | None = None) -> dict[str, Any]:
    """The reference's options for a group, by the reference's names."""
    return {**golden.meta["reference_defaults"], **golden.meta["optimizer_kwargs"], **(group or {})}


def built(golden: Golden, params: dict[str, torch.nn.Parameter], spec: Any, groups: list[dict[str, Any]]) -> SubspaceOptimizer:
    """An optimizer whose groups are given by parameter names."""
    named = [{**g, "params": [(n, params[n]) for n in g["params"]]} for g in groups if g["params"]]
    return SubspaceOptimizer(named, spec)


# ---------------------------------------------------------------------------------------------------------------- one row a preset


def cosmos(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    o = options(golden)
    b1, b2 = o["betas"]
    overrides = {
        "matrix.momentum.beta": b1,
        "matrix.selector.rank": o["rank"],
        "matrix.selector.beta": b2,
        "matrix.inside.beta2": b2,
        "matrix.mix.complement": o["gamma"],
        "matrix.finish.scale": o["lr_ratio"],
        "other.complement.beta1": b1,
        "other.complement.beta2": b2,
    }
    return built(
        golden,
        params,
        load_spec("cosmos", overrides),
        [
            {
                "params": [n for n, p in params.items() if p.dim() == 2],
                "use": "matrix",
                "lr": o["lr"],
                "weight_decay": o["weight_decay"],
            },
            {
                "params": [n for n, p in params.items() if p.dim() < 2],
                "use": "other",
                "lr": o["lr"],
                "weight_decay": o["weight_decay"],
            },
        ],
    )


# Presets use a randomized basis and spread refreshes over steps. The references use a thin SVD and refresh everything at one step.
EXACT: dict[str, Any] = {"matrix.selector.method": "exact", "matrix.selector.offset": 0}


def galore(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    sides = {
        "std": {"matrix.orient": "short"},
        "reverse_std": {"matrix.orient": "long", "matrix.square": "left"},
        "left": {"matrix.orient": "left"},
        "right": {"matrix.orient": "right"},
        "full": {"matrix.orient": "right", "matrix.selector.sides": "both"},
    }
    groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        b1, b2 = o["betas"]
        overrides: dict[str, Any] = {}
        for place, finish in (("matrix.inside", "matrix.finish"), ("other.complement", "other.finish")):
            overrides |= {f"{place}.beta1": b1, f"{place}.beta2": b2, f"{place}.eps": o["eps"]}
            overrides |= {f"{finish}.beta1": b1, f"{finish}.beta2": b2}
        if "rank" in o:
            overrides |= {"matrix.selector.rank": o["rank"], "matrix.selector.every": o["update_proj_gap"]}
            overrides |= {"matrix.mix.inside": o["scale"], **sides[o["proj_type"]], **EXACT}
        groups.append(
            {
                "params": o["params"],
                "use": "matrix" if "rank" in o else "other",
                "overrides": overrides,
                "lr": o["lr"],
                "weight_decay": o["weight_decay"],
            }
        )
    return built(golden, params, "galore", groups)


def muon_keller(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        if o.get("use_muon", True):
            flat = [n for n in o["params"] if params[n].dim() > 2]
            overrides = {"matrix.momentum.beta": o["momentum"]}
            rates = {"lr": o["lr"], "weight_decay": o["weight_decay"]}
            groups.append({"params": [n for n in o["params"] if n not in flat], "use": "matrix", "overrides": overrides, **rates})
            if flat:
                # A defect of the authors' code: it takes the shape factor from the unflattened gradient, kh / kw = 1, not out / in.
                overrides = {**overrides, "matrix.finish": {"kind": "scale", "by": "none"}}
                groups.append({"params": flat, "use": "matrix", "overrides": overrides, **rates})
        else:
            b1, b2 = o["betas"]
            overrides = {
                "other.complement.beta1": b1,
                "other.complement.beta2": b2,
                "other.complement.eps": o["eps"],
                "other.lr_scale": 1.0,
            }
            groups.append(
                {
                    "params": o["params"],
                    "use": "other",
                    "overrides": overrides,
                    "lr": o["lr"],
                    "weight_decay": o["weight_decay"],
                }
            )
    return built(golden, params, "muon", groups)


def muon_torch(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    o = options(golden)
    overrides = {
        "matrix.momentum.beta": o["momentum"],
        "matrix.momentum.nesterov": o["nesterov"],
        "matrix.complement.steps": o["ns_steps"],
        "matrix.complement.coefficients": [list(o["ns_coefficients"])],
        "matrix.complement.eps": o["eps"],
        "matrix.complement.eps_floor": True,
    }
    if o["adjust_lr_fn"] == "match_rms_adamw":
        overrides["matrix.finish"] = {"kind": "scale", "by": "moonshot", "factor": 0.2}
    rates = {"lr": o["lr"], "weight_decay": o["weight_decay"]}
    return built(golden, params, "muon", [{"params": list(params), "use": "matrix", "overrides": overrides, **rates}])


# The published polynomials with a safety factor of 1.01, rounded to the four decimals of the reference.
NEMO_POLAR_EXPRESS = [
    [8.2051, -22.9019, 16.4607],
    [4.0664, -2.8612, 0.5184],
    [3.9096, -2.8234, 0.5250],
    [3.2856, -2.4153, 0.4853],
    [2.2779, -1.6198, 0.3985],
    [1.8726, -1.2307, 0.3585],
    [1.8564, -1.2132, 0.3568],
    [1.8750, -1.2500, 0.3750],
]


NEMO_SCALES = {"spectral": "moonshot", "shape_scaling": "keller", "unit_rms_norm": "spectral"}


def muon_nemo(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    o = options(golden)
    by = NEMO_SCALES[o["scale_mode"]]
    overrides: dict[str, Any] = {
        "matrix.momentum.beta": o["momentum"],
        "matrix.momentum.nesterov": o["nesterov"],
        "matrix.complement.steps": o["num_ns_steps"],
        "matrix.complement.eps": 1e-15,
        "matrix.complement.eps_floor": True,
        "matrix.finish": {"kind": "scale", "by": by, "factor": o["extra_scale_factor"]},
    }
    if o["coefficient_type"] == "polar_express":
        overrides |= {"matrix.complement.coefficients": NEMO_POLAR_EXPRESS}
    else:
        overrides |= {"matrix.complement.coefficients": o["coefficient_type"]}
    rates = {"lr": o["lr"], "weight_decay": o["weight_decay"]}
    return built(golden, params, "muon", [{"params": list(params), "use": "matrix", "overrides": overrides, **rates}])


def nemo(preset: str, extra: Callable[[dict[str, Any]], dict[str, Any]] = lambda o: {}) -> Make:
    """NVIDIA's optimizers on a momentum: an EMA, a polar factor, a scale, decoupled decay; `extra` gives the overrides of one of them."""

    def make(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
        o = options(golden)
        overrides = {"matrix.momentum.beta": o["momentum"], **extra(o)}
        rates = {"lr": o["lr"], "weight_decay": o.get("weight_decay", 1.0)}  # Scion's decay is part of its update
        return built(golden, params, preset, [{"params": list(params), "use": "matrix", "overrides": overrides, **rates}])

    return make


def _moment2(o: dict[str, Any]) -> dict[str, Any]:
    """The second moment of NVIDIA's adaptive Muon, after the polar factor, and its scale."""
    return {
        "matrix.momentum.nesterov": o["nesterov"],
        "matrix.complement.1.beta2": o["beta2"],
        "matrix.complement.1.eps": o["eps"],
        "matrix.finish": {"kind": "scale", "by": NEMO_SCALES[o["scale_mode"]], "factor": o["extra_scale_factor"]},
    }


def muon_applied(preset: str, apply: dict[str, Any]) -> Make:
    """NVIDIA's Muon with a hook around the update of the weight. `apply`: fields of the rule, with reference options in place of names."""

    def make(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
        o = options(golden)
        o |= o.get("hook_kwargs", {})
        rule = {field: o[value] if field != "kind" and isinstance(value, str) else value for field, value in apply.items()}
        overrides: dict[str, Any] = {
            "matrix.momentum.beta": o["momentum"],
            "matrix.momentum.nesterov": o.get("nesterov", False),
            "matrix.complement": {"kind": "muon", "coefficients": "quintic", "eps": 1e-15, "eps_floor": True, "norm": "none"},
            "matrix.finish": {"kind": "scale", "by": "moonshot"} if preset == "muon" else "none",
        }
        overrides |= {"matrix.apply": rule} if rule else {}
        rates = {"lr": o["lr"], "weight_decay": o["weight_decay"]}
        return built(golden, params, preset, [{"params": list(params), "use": "matrix", "overrides": overrides, **rates}])

    return make


def normuon_dion(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    o = options(golden)
    overrides = {
        "matrix.momentum": {"kind": "heavy_ball", "beta": o["mu"], "nesterov": o["nesterov"]},
        "matrix.complement.1.beta2": o["muon_beta2"],
        "matrix.finish.by": {"spectral_norm": "spectral"}[o["adjust_lr"]],
    }
    overrides |= {"matrix.apply": {"kind": "cautious"}} if o["cautious_wd"] else {}
    rates = {"lr": o["lr"], "weight_decay": o["weight_decay"]}
    return built(golden, params, "normuon-dion", [{"params": list(params), "use": "matrix", "overrides": overrides, **rates}])


def muon_dion(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        b1, b2 = o["betas"]
        rates = {"lr": o["lr"], "weight_decay": o["weight_decay"], "params": o["params"]}
        match o.get("algorithm", "muon"):
            case "muon":
                momentum = {"kind": "heavy_ball", "beta": o["mu"], "nesterov": o["nesterov"]}
                overrides = {
                    "matrix.momentum": momentum,
                    "matrix.complement.eps": o["epsilon"],
                    "matrix.finish": {"kind": "scale", "by": "spectral"},
                }
                groups.append({"use": "matrix", "overrides": overrides, **rates})
            case "adamw":
                adam = {"kind": "adam", "beta1": b1, "beta2": b2, "eps": o["epsilon"], "debias": False}
                finish = {"kind": "debias", "beta1": b1, "beta2": b2}
                overrides = {"other.complement": adam, "other.finish": finish, "other.lr_scale": 1.0}
                groups.append({"use": "other", "overrides": overrides, **rates})
            case "lion":
                overrides = {"other.complement": {"kind": "lion", "beta1": b1, "beta2": b2}, "other.lr_scale": 1.0}
                groups.append({"use": "other", "overrides": overrides, **rates})
    return built(golden, params, "muon", groups)


def adamw(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    o = options(golden)
    b1, b2 = o["betas"]
    overrides = {
        "all.complement.beta1": b1,
        "all.complement.beta2": b2,
        "all.complement.eps": o["eps"],
        "all.complement.amsgrad": o["amsgrad"],
    }
    rates = {"lr": o["lr"], "weight_decay": o["weight_decay"]}
    return built(golden, params, "adamw", [{"params": list(params), "overrides": overrides, **rates}])


def adafactor(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
    o = options(golden)
    overrides = {
        "all.complement.0.decay": -o["decay_rate"],
        "all.complement.0.eps": o["eps"][0],
        "all.complement.1.limit": o["clip_threshold"],
    }
    rates = {"lr": o["lr"], "weight_decay": o["weight_decay"]}
    return built(golden, params, "adafactor", [{"params": list(params), "overrides": overrides, **rates}])


# ------------------------------------------------------------------------------------------------------------------- the GaLore line

Groups = list[dict[str, Any]]
Params = dict[str, torch.nn.Parameter]

# The references' names of sides -> the names of this library.
SIDES: dict[str, dict[str, Any]] = {
    "std": {"matrix.orient": "short"},
    "reverse_std": {"matrix.orient": "long", "matrix.square": "left"},
    "left": {"matrix.orient": "left"},
    "right": {"matrix.orient": "right"},
    "full": {"matrix.orient": "right", "matrix.selector.sides": "both"},
    "continuous": {"matrix.orient": "short"},
    "continuous_sgd": {"matrix.orient": "short"},
}


def adam_at(place: str, o: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """The overrides of Adam at a place, and of the bias correction in `finish`."""
    b1, b2 = o.get("betas") or o["beta"]
    out = {f"{place}.beta1": b1, f"{place}.beta2": b2, f"{place}.eps": o["eps"]}
    return out if finish is None else {**out, f"{finish}.beta1": b1, f"{finish}.beta2": b2}


def rates(o: dict[str, Any]) -> dict[str, Any]:
    return {"params": o["params"], "lr": o["lr"], "weight_decay": o["weight_decay"]}


def other(o: dict[str, Any], place: str = "other.complement", finish: str | None = "other.finish") -> dict[str, Any]:
    """A group for parameters that are not matrices."""
    return {**rates(o), "use": "other", "overrides": adam_at(place, o, finish)}


def low_rank(preset: str, extra: Callable[[dict[str, Any]], dict[str, Any]]) -> Make:
    """Groups with a `rank` get the matrix pipeline with Adam inside and the overrides of `extra`; the others get Hugging Face's AdamW."""

    def make(golden: Golden, params: Params) -> SubspaceOptimizer:
        groups: Groups = []
        for group in golden.meta["param_groups"]:
            o = options(golden, group)
            if "rank" not in o:
                groups.append(other(o))
                continue
            overrides = adam_at("matrix.inside", o, "matrix.finish") | SIDES[o["proj_type"]] | extra(o)
            groups.append({**rates(o), "use": "matrix", "overrides": overrides})
        return built(golden, params, preset, groups)

    return make


def _golore(o: dict[str, Any]) -> dict[str, Any]:
    rank = o["rank"]
    selector = {
        "kind": "switch",
        "every": o["update_proj_gap"],
        "at": o["rand_epoch"],
        "first": {"kind": "svd", "rank": rank, "method": "exact"},
        "then": {"kind": "random", "rank": rank},
    }
    return {"matrix.selector": selector, "matrix.mix.inside": o["scale"]}


def _online(o: dict[str, Any]) -> dict[str, Any]:
    optimizer = "sgd" if o["proj_type"].endswith("sgd") else "adamw"
    rate = {"lr": 1 / o["update_proj_gap"], "base_lr": o["lr"]}
    selector = {"kind": "learned", "rank": o["rank"], "optimizer": optimizer, "init": "exact", **rate}
    return {"matrix.selector": selector, "matrix.mix.inside": o["scale"]}


def _fira(o: dict[str, Any]) -> dict[str, Any]:
    return {
        "matrix.selector.rank": o["rank"],
        "matrix.selector.every": o["update_proj_gap"],
        "matrix.mix.inside": o["alpha"],
        "matrix.complement.0.share": 1 - o["alpha"],
        **EXACT,
    }


def _apollo(o: dict[str, Any]) -> dict[str, Any]:
    selector: dict[str, Any] = {"kind": "random", "draw": "gaussian"} if o["proj"] == "random" else {"kind": "svd", "method": "exact"}
    match = {"kind": "match_inside", "per": "matrix" if o["scale_type"] == "tensor" else "line"}
    scale = {"kind": "scale", "factor": math.sqrt(o["scale"])}
    limit = [] if o["disable_nl"] else [{"kind": "norm_growth", "gamma": 1.01}]
    sized = [scale, *limit] if o["scale_front"] else [*limit, scale]
    return {
        "matrix.selector": {**selector, "rank": o["rank"], "every": o["update_proj_gap"]},
        "matrix.complement": ["whole", match, *sized],
    }


def frugal(golden: Golden, params: Params) -> SubspaceOptimizer:
    groups: Groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        if not o["is_proj_params"]:
            groups.append(other(o, finish=None))
            continue
        overrides = adam_at("matrix.inside", o) | {
            "matrix.inside.on_refresh": "reset" if o["reset_statistics"] else "keep",
            "matrix.complement": {"sign_sgd": "sign", "sgd": "sgd", "no": "none"}[o["inactive_update_rule"]],
            "matrix.mix.complement": o["inactive_lr_scale"],
        }
        if "block_order" in o:
            selector = {"kind": "blocks", "every": o["update_gap"], "share": o["density"], "order": o["block_order"]}
            groups.append({**rates(o), "use": "matrix", "overrides": {**overrides, "matrix.selector": selector}})
            continue
        for name in o["params"]:
            rows, cols = params[name].shape
            if o.get("coord_choice") == "columns":
                selector = {"kind": "random", "draw": "coordinates", "rank": int(cols * o["density"])}
                side = {"matrix.orient": "right"}
            else:
                selector = {"kind": "svd", "method": "exact", "rank": round(min(rows, cols) * o["density"])}
                side = SIDES[o["proj_side"]]
            place = {"matrix.selector": {**selector, "every": o["update_gap"]}, **side}
            groups.append({**rates(o), "params": [name], "use": "matrix", "overrides": overrides | place})
    return built(golden, params, "frugal", groups)


def ldadam(golden: Golden, params: Params) -> SubspaceOptimizer:
    groups: Groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        if not o["enable_lowrank"]:
            groups.append(other(o, finish=None))
            continue
        method = "svd" if o["proj_method"] == "svd" else "power"
        selector = {
            "rank": o["rank"],
            "rho": o["rho"],
            "beta1": o["betas"][0],
            "method": method,
            "init": "exact",
            "kind": "power_iteration",
        }
        overrides = adam_at("matrix.inside", o) | {
            "matrix.selector": selector,
            "matrix.feedback": 0.0 if o["error_feedback"] else None,
        }
        groups.append({**rates(o), "use": "matrix", "overrides": overrides})
    return built(golden, params, "ldadam", groups)


def dion(golden: Golden, params: Params) -> SubspaceOptimizer:
    simple = golden.meta["reference_key"] == "dion_simple"
    groups: Groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        match o.get("algorithm", "dion"):
            case "dion":
                for name in o["params"]:
                    short = min(params[name].shape)
                    rank = min(o["rank"], short) if simple else math.ceil(o["rank_fraction"] * short)
                    overrides = {
                        "matrix.orient": "left" if simple else "long",
                        "matrix.feedback": o["mu"],
                        "matrix.selector": {"kind": "dion", "rank": rank, "iterations": o.get("power_iters", 1), "eps": o["epsilon"]},
                        "matrix.inside": {"kind": "column_normalize", "eps": o["epsilon"]},
                    }
                    groups.append({**rates(o), "params": [name], "use": "matrix", "overrides": overrides})
            case "adamw":
                o["eps"] = o["epsilon"]
                adam = other(o, finish=None)
                adam["overrides"] |= {"other.lr_scale": 1.0}
                groups.append(adam)
            case "lion":
                b1, b2 = o["betas"]
                lion = {"kind": "lion", "beta1": b1, "beta2": b2}
                overrides = {"other.complement": lion, "other.lr_scale": 1.0}
                groups.append({**rates(o), "use": "other", "overrides": overrides})
    return built(golden, params, "dion", groups)


def dion2(golden: Golden, params: Params) -> SubspaceOptimizer:
    o = options(golden)
    groups: Groups = []
    for name, p in params.items():
        rank = math.ceil(o["fraction"] * min(p.shape))  # a preset's share of the lines is rounded, the authors' is rounded up
        overrides = {"matrix.feedback": o["ef_decay"], "matrix.selector.rank": rank}
        groups.append({**rates({**o, "params": [name]}), "use": "matrix", "overrides": overrides})
    return built(golden, params, "dion2", groups)


# ------------------------------------------------------------------------------------------------------------- cosine dictionaries


def trion(golden: Golden, params: Params) -> SubspaceOptimizer:
    groups: Groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        if not o["use_muon"]:
            plain = other(o, finish=None)
            plain["overrides"] |= {"other.lr_scale": 1.0}
            groups.append(plain)
            continue
        for name in o["params"]:
            rows, cols = params[name].shape
            fft = o.get("use_makhoul", False)
            overrides = {
                "matrix.feedback": o["momentum"],
                "matrix.selector.rank": o["rank"],
                "matrix.selector.transform": "fft" if fft else "table",
                # The authors' table mode uses the DCT-III for tall and square weights and the DCT-II for wide ones.
                "matrix.selector.dictionary": "dct2" if fft or rows < cols else "dct3",
                "matrix.finish.by": {"kj": "keller", "dion": "spectral"}[o["scaling_type"]],
            }
            groups.append({**rates(o), "params": [name], "use": "matrix", "overrides": overrides})
    return built(golden, params, "trion", groups)


def dct_adamw(golden: Golden, params: Params) -> SubspaceOptimizer:
    o = options(golden)
    overrides = (
        adam_at("matrix.inside", o)
        | adam_at("other.complement", o)
        | {
            "matrix.feedback": 0.0 if o["use_ef"] else None,
            "matrix.inside.on_refresh": "project" if o["rotate_subspace"] else "keep",
            "matrix.selector.rank": o["rank"],
            "matrix.selector.every": o["update_proj_gap"],
            "matrix.selector.ranking": f"l{abs(o['ell_norm'])}",
            "matrix.selector.weighted": o["ell_norm"] == -1,
        }
    )
    common = {"lr": o["lr"], "weight_decay": o["weight_decay"], "overrides": overrides}
    matrices = [n for n, p in params.items() if p.dim() == 2]
    vectors = [n for n in params if n not in matrices]
    groups = [{"params": matrices, "use": "matrix", **common}, {"params": vectors, "use": "other", **common}]
    return built(golden, params, "dct-adamw", groups)


# -------------------------------------------------------------------------------------------- subset norm and subspace momentum


def subset_norm(golden: Golden, params: Params) -> SubspaceOptimizer:
    groups: Groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        b1, b2 = o["betas"]
        preset, pipeline = "adam-snsm", "matrix"
        overrides: dict[str, Any] = {}
        finish: list[dict[str, Any]] = []
        if "subset_size" in o:
            size = o["subset_size"]
            finish.append({"kind": "subset_norm", "subsets": "lines" if size == "heuristics" else size, "beta2": b2, "eps": o["eps"]})
        elif b2 and "rank" in o:
            # A full second moment is a subset norm whose subsets have one entry each.
            finish.append({"kind": "subset_norm", "subsets": 1, "beta2": b2, "eps": o["eps"]})
        if o["correct_bias"]:
            finish.append({"kind": "debias", "beta1": b1, "beta2": b2})
        if "rank" in o:
            overrides |= {
                "matrix.inside.beta": b1,
                "matrix.inside.on_refresh": "keep" if o.get("overlap_state") else "reset",
                "matrix.selector": {
                    **{"svd": {"kind": "svd", "method": "exact"}, "topk": {"kind": "top_norm"}}[o["proj_type"]],
                    "rank": o["rank"],
                    "every": o["update_proj_gap"],
                    "offset": 1,
                },
            }
            overrides |= {"matrix.orient": "long", "matrix.square": "left"} if o["proj_type"] == "topk" else {}
        elif "subset_size" in o:
            preset, overrides = "adam-sn", {"matrix.momentum.beta": b1}
        elif b2:
            pipeline, overrides = "other", adam_at("other.complement", o)
            finish = [{"kind": "debias", "beta1": b1, "beta2": b2}]
        else:
            pipeline, overrides = "other", {"other.complement": {"kind": "ema", "beta": b1}}
        overrides[f"{pipeline}.finish"] = finish
        groups.append({**rates(o), "use": pipeline, "spec": preset, "overrides": overrides})
    return built(golden, params, "adam-snsm", groups)


# -------------------------------------------------------------------------------------------------------------------------- SOAP


def soap(golden: Golden, params: Params) -> SubspaceOptimizer:
    o = options(golden)
    b1, b2 = o["betas"]
    cov = b2 if o["shampoo_beta"] < 0 else o["shampoo_beta"]
    groups: Groups = []
    for name, p in params.items():
        place = "matrix" if p.dim() > 1 or o["precondition_1d"] else "other"
        finish: list[dict[str, Any]] = [{"kind": "debias", "beta1": b1, "beta2": b2}] if o["correct_bias"] else []
        finish += [{"kind": "rms_normalize", "eps": 1e-30}] if o["normalize_grads"] else []
        momentum, soap = ("matrix.inside.0", "matrix.inside.1") if place == "matrix" else ("other.momentum", "other.inside")
        overrides = {f"{momentum}.beta": b1, f"{soap}.beta2": b2, f"{soap}.eps": o["eps"], f"{place}.finish": finish}
        if place == "matrix":
            overrides |= {
                "matrix.selector.offset": 1,
                "matrix.selector.beta": cov,
                "matrix.selector.every": o["precondition_frequency"],
                "matrix.selector.max_dim": o["max_precond_dim"],
            }
        group = {"params": [name], "lr": o["lr"], "weight_decay": o["weight_decay"], "overrides": overrides}
        groups.append(group if p.dim() > 2 else {**group, "use": place})
        if p.dim() > 2:
            overrides["routes"] = [{"use": "matrix", "view": "modes", "min_dims": 3}, {"use": "other"}]
    return built(golden, params, "soap", groups)


def nemo_soap(golden: Golden, params: Params) -> SubspaceOptimizer:
    o = options(golden)
    b1, b2 = o["betas"]
    overrides = {
        "matrix.momentum": {"kind": "ema", "beta": b1, "nesterov": o["nesterov"], "debias": o["correct_bias"]},
        "matrix.selector": {
            "kind": "kron_eigen",
            "every": 1,
            "timing": "before",
            "beta": o["shampoo_beta"],
            "debias": o["correct_bias"],
            "skip_first": False,
            "solver": "eigh" if o["use_eigh"] else "power",
            "sort": False,
        },
        "matrix.inside": {"kind": "soap", "beta2": b2, "eps": o["eps"], "debias": o["correct_bias"]},
        "matrix.finish": {"kind": "rms_clip", "limit": o["max_update_rms"]} if o["max_update_rms"] else "none",
        "matrix.decay": {"decoupled": "before", "l2": "coupled"}[o["weight_decay_method"]],
    }
    group = {"params": list(params), "use": "matrix", "lr": o["lr"], "weight_decay": o["weight_decay"], "overrides": overrides}
    return built(golden, params, "soap-qr", [group])


def kl_soap(preset: str) -> Make:
    def make(golden: Golden, params: Params) -> SubspaceOptimizer:
        o = options(golden)
        b1, b2 = o["betas"]
        overrides = {
            "matrix.momentum.beta": b1,
            "matrix.selector.beta": o["shampoo_beta"],
            "matrix.selector.floor": o["eps"],  # of the mean; the authors' floor is absolute, and no eigenvalue is as small
            "matrix.selector.skip_first": False,
            "matrix.finish": "none",
            "matrix.selector.start": o["eps"],  # the authors start from eigenvalues of 0, which their floor makes eps
            "matrix.inside.beta2": b2,
            "matrix.inside.eps": o["eps"],
        }
        group = {"params": list(params), "use": "matrix", "lr": o["lr"], "weight_decay": o["weight_decay"], "overrides": overrides}
        return built(golden, params, preset, [group])

    return make


# -------------------------------------------------------------------------------------------------------------------------- SUMO


def sumo(golden: Golden, params: Params) -> SubspaceOptimizer:
    groups: Groups = []
    for group in golden.meta["param_groups"]:
        o = options(golden, group)
        if o["group_name"] == "regular_params":
            plain = other({**o, "lr": o["lr_adam"], "weight_decay": o["weight_decay_adam"]})
            groups.append(plain)
            continue
        mu = o["momentum"]
        inside: list[dict[str, Any]] = [
            {"kind": "heavy_ball", "beta": mu**2 if o["nesterov"] else mu},
            {"kind": "orthogonalize", "method": "svd"},
        ]
        inside += [{"kind": "norm_growth", "gamma": o["gamma"]}] if o["norm_growth_limiter"] else []
        inside += [{"kind": "scale", "by": "moonshot", "factor": 0.2}]
        kept = 1 - o["scale"] * o["gradient_perpendicular_scale"]
        overrides = {
            "matrix.selector.rank": o["rank"],
            "matrix.selector.every": o["update_proj_gap"],
            "matrix.inside": inside,
            "matrix.mix.inside": o["scale"],
            "matrix.complement": {"kind": "whole", "share": kept} if kept else "sgd",
            "matrix.finish.factor": o["alpha"],
            "matrix.selector.method": "exact",
            "matrix.selector.offset": 1,
            **SIDES[o["proj_type"]],
        }
        groups.append({**rates(o), "use": "matrix", "overrides": overrides})
    return built(golden, params, "sumo", groups)


# ------------------------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    """One golden file: its preset, a function that builds its optimizer, and the parameters left out, with the defect of the reference."""

    preset: str
    make: Make
    left_out: dict[str, str] = field(default_factory=dict)
    rounded: str = ""  # why round-off decides the first update of the reference: the comparison then starts after it


def _all(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


DISCARDED = "without Nesterov the momentum is updated and never read"
GAIN = "the first moment takes 0.1 of the gradient and is corrected for beta1 = 0.9, even if beta1 is another number"
STALE = "a refresh uses the old momentum once more in the new basis, and stores 0"
ONE_SHOT = "a refresh uses the carried first moment for one update and does not store it"
FIRST_IS_ROUND_OFF = "in the eigenbasis of the first gradient, coordinates off the diagonal are round-off, which eps 1e-8 divides"
UNSORTED = "the columns are sorted after the QR, but their second moment is not"

CASES: dict[str, Case] = {
    "cosmos_nesterov_wd": Case("cosmos", cosmos, {"bias": GAIN}),
    "cosmos_missing_grads_gamma1": Case("cosmos", cosmos, {"bias": GAIN}),
    "cosmos_fullrank_gamma0": Case("cosmos", cosmos),
    "cosmos_plain_nowd": Case("cosmos", cosmos, _all("tall wide square", DISCARDED)),
    "soap_square": Case("soap", soap),
    "soap_rect_fixedspace": Case("soap", soap),
    "soap_onesided": Case("soap", soap),
    "soap_normalize_nobias_conv": Case("soap", soap),
    "nemo_soap_qr": Case("soap-qr", nemo_soap, _all("square square2", UNSORTED)),
    "nemo_soap_eigh_nesterov": Case("soap-qr", nemo_soap),
    "kl_soap_eigh_nemo": Case("rekls", kl_soap("rekls"), rounded=FIRST_IS_ROUND_OFF),
    "kl_soap_qr_nemo": Case("kl-soap", kl_soap("kl-soap"), rounded=FIRST_IS_ROUND_OFF),
    "muon_kj_wd": Case("muon", muon_keller),
    "muon_kj_auxadam": Case("muon", muon_keller),
    "muon_torch_original": Case("muon", muon_torch),
    "muon_torch_rms_plain": Case("muon", muon_torch),
    "muon_nemo_polar_express": Case("muon", muon_nemo),
    "muon_nemo_quintic_nesterov": Case("muon", muon_nemo),
    "normuon_nemo": Case("normuon", nemo("normuon", _moment2)),
    "adamuon_nemo": Case("adamuon", nemo("adamuon", _moment2)),
    "namo_nemo": Case("namo", nemo("namo", _moment2)),
    "polargrad_nemo": Case(
        "polargrad",
        nemo("polargrad", lambda o: {"matrix.momentum.nesterov": o["nesterov"], "matrix.finish.factor": o["extra_scale_factor"]}),
    ),
    "mop_nemo": Case("mop", nemo("mop")),
    "scion_nemo": Case("scion", nemo("scion", lambda o: {"matrix.finish.factor": o["spectral_radius"]})),
    "muon_dionref_spectral": Case("muon", muon_dion),
    "muon_relative_nemo": Case("muon", muon_applied("muon", {"kind": "relative"})),
    "muon_hyperball_nemo": Case("muon-hyperball", muon_applied("muon-hyperball", {"kind": "hyperball", "radius": "hyperball_radius"})),
    "muon_radial_brake_nemo": Case(
        "muon", muon_applied("muon", {"kind": "radial_brake", "outward": "outward_scale", "inward": "inward_scale"})
    ),
    "normuon_dion_cautious": Case("normuon-dion", normuon_dion),
    "spel_nemo": Case("spel", muon_applied("spel", {})),
    "adamw_torch": Case("adamw", adamw),
    "adafactor_hf": Case("adafactor", adafactor),
    "galore_std_wd": Case("galore", galore),
    "galore_sides": Case("galore", galore),
    "galore_full": Case("galore", galore),
    "golore_adamw_svd": Case("golore", low_rank("golore", _golore), _all("tall wide square", ONE_SHOT)),
    "golore_adamw_random": Case("golore", low_rank("golore", _golore), _all("wide square", ONE_SHOT)),
    "osd_continuous_adamw": Case("online-subspace-descent", low_rank("online-subspace-descent", _online)),
    "osd_continuous_sgd": Case("online-subspace-descent", low_rank("online-subspace-descent", _online)),
    "fira_std": Case("fira", low_rank("fira", _fira)),
    "apollo_channel_random": Case("apollo", low_rank("apollo", _apollo)),
    "apollo_mini_tensor": Case("apollo-mini", low_rank("apollo-mini", _apollo)),
    "apollo_svd_nolimiter": Case("apollo", low_rank("apollo", _apollo)),
    "frugal_galore_signsgd": Case("frugal", frugal),
    "frugal_coord_columns": Case("frugal", frugal),
    "frugal_block_ascending": Case("frugal", frugal),
    "ldadam_power_ef": Case("ldadam", ldadam),
    "ldadam_svd_noef": Case("ldadam", ldadam),
    "dion2": Case("dion2", dion2),
    "dion_simple": Case("dion", dion),
    "dion_ref_qr": Case("dion", dion),
    "dion_ref_rcqr_full": Case("dion", dion),
    "trion_kj": Case("trion", trion),
    "trion_makhoul_dion": Case("trion", trion),
    "dct_adamw_rotate_ef": Case("dct-adamw", dct_adamw),
    "dct_adamw_norotate_gap4": Case("dct-adamw", dct_adamw),
    "adamwsn_sng": Case("adam-sn", subset_norm),
    "sn_heuristics": Case("adam-sn", subset_norm),
    "sn_int_subsets": Case("adam-sn", subset_norm),
    "sm_svd_adam_overlap": Case("adam-snsm", subset_norm),
    "snsm_svd_heuristics": Case("adam-snsm", subset_norm, _all("tall wide square small", STALE)),
    "snsm_topk_int": Case("adam-snsm", subset_norm, _all("tall wide square small", STALE)),
    "sgd_sm_topk": Case("subspace-momentum", subset_norm, _all("tall wide square", STALE)),
    "sumo_std": Case("sumo", sumo),
    "sumo_plain_perp": Case("sumo", sumo),
}
