"""The loss after a change of the optimizer in the middle of a run: with a converted state, with an empty state, and without a change.

    python benchmarks/convergence/convert.py --from adamw --to cosmos --model tiny --steps 400 --seeds 3

Each seed trains with the first optimizer for half of the updates. From there three runs go on with the same batches and the same schedule:
with the first optimizer, with the second one and a converted state, with the second one and an empty state. The second one runs alone, too.
The rates are given, or chosen from a grid by full runs of one seed: `--from-lr auto --to-lr auto`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import subspace_opt
from subspace_opt.lab import Corpus, TrainConfig, make_model

AFTER = (1, 5, 10, 20, 50, 100)  # updates after the change at which the validation loss is shown
RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """Validation losses of one run, by number of updates."""

    name: str
    seed: int
    losses: dict[int, float]


class Problem:
    """A model, its text and its schedule."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self.config, self.corpus = config, corpus
        self.windows = corpus.validation_windows(config.eval_batches * config.batch_size, config.length)

    def model(self, seed: int) -> nn.Module:
        return make_model(self.config.model, max_length=self.config.length, seed=seed)

    def loss(self, model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=windows[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].long().flatten())

    @torch.no_grad()
    def validation(self, model: nn.Module) -> float:
        parts = self.windows.split(self.config.batch_size)
        return sum(self.loss(model, part).item() * len(part) for part in parts) / len(self.windows)

    def train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, steps: range, seed: int, seen: Callable[[int], bool]
    ) -> dict[int, float]:
        """Train and return the validation loss after each number of updates that `seen` accepts."""
        losses = {}
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = lr * self.config.lr_factor(step)
            batch = self.corpus.batch(step, self.config.batch_size, self.config.length, seed)
            optimizer.zero_grad()
            self.loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.config.clip)
            optimizer.step()
            if seen(step + 1):
                losses[step + 1] = self.validation(model)
        return losses


def compare(problem: Problem, old: str, new: str, old_lr: float, new_lr: float, seed: int, overrides: dict[str, float]) -> list[Run]:
    """The four runs of one seed."""
    steps = problem.config.steps
    half = steps // 2
    points = {half + k for k in AFTER} | {half, steps}
    first = problem.model(seed)
    optimizer = subspace_opt.build(old, first)
    problem.train(first, optimizer, old_lr, range(half), seed, lambda t: False)
    weights, state = {k: v.clone() for k, v in first.state_dict().items()}, optimizer.state_dict()
    at_change = problem.validation(first)

    def go_on(name: str, spec: str, lr: float, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Run:
        model = problem.model(seed)
        model.load_state_dict(weights)
        losses = problem.train(model, make(model), lr, range(half, steps), seed, points.__contains__)
        return Run(name, seed, {half: at_change, **losses})

    def unchanged(model: nn.Module) -> torch.optim.Optimizer:
        made = subspace_opt.build(old, model)
        made.load_state_dict(state)
        return made

    def converted(model: nn.Module) -> torch.optim.Optimizer:
        made = subspace_opt.build(new, model, overrides=overrides)
        made.load_state_dict(subspace_opt.convert(state, new, model=model, overrides=overrides).state_dict)
        return made

    alone = problem.model(seed)
    losses = problem.train(alone, subspace_opt.build(new, alone, overrides=overrides), new_lr, range(steps), seed, points.__contains__)
    return [
        go_on(f"{old}, no change", old, old_lr, unchanged),
        go_on(f"{old} -> {new}, converted", new, new_lr, converted),
        go_on(f"{old} -> {new}, empty state", new, new_lr, lambda model: subspace_opt.build(new, model, overrides=overrides)),
        Run(f"{new} from the start", seed, losses),
    ]


def chosen_lr(problem: Problem, spec: str, overrides: dict[str, float], grid: tuple[float, ...]) -> tuple[float, dict[float, float]]:
    """The learning rate with the least final loss of a full run, and all losses. The grid grows while the best is at its edge."""
    found: dict[float, float] = {}
    rates = list(grid)
    while rates:
        lr = rates.pop()
        model = problem.model(0)
        optimizer = subspace_opt.build(spec, model, overrides=overrides)
        found[lr] = problem.train(model, optimizer, lr, range(problem.config.steps), 0, lambda t: t == problem.config.steps)[
            problem.config.steps
        ]
        print(f"  {spec} lr {lr:g}: {found[lr]:.4f}", flush=True)
        best = min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)
        if not rates and best == max(found):
            rates = [best * 2]
        elif not rates and best == min(found):
            rates = [best / 2]
    return best, found


def table(runs: list[Run], half: int) -> str:
    """Mean validation losses over seeds, and in brackets their mean difference to the empty state."""
    names = list(dict.fromkeys(run.name for run in runs))
    points = sorted(runs[0].losses)
    lines = ["| run | " + " | ".join(f"+{p - half}" for p in points) + " |", "| --- |" + " ---: |" * len(points)]
    for name in names:
        mine = [run for run in runs if run.name == name]
        cells = [f"{statistics.mean(run.losses[p] for run in mine):.4f}" if all(p in run.losses for run in mine) else "" for p in points]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parsed()
    overrides = {path: float(value) if "." in value else int(value) for path, value in (item.split("=") for item in args.set)}
    data = tuple(args.data)
    config = TrainConfig(model=args.model, data=data, steps=args.steps, batch_size=args.batch_size, length=args.length, eval_batches=8)
    problem = Problem(config, Corpus.load(data))
    rates, grids = {}, {}
    for which, spec, given, own in (("from", args.old, args.from_lr, {}), ("to", args.new, args.to_lr, overrides)):
        grids[which] = {}
        rates[which], grids[which] = chosen_lr(problem, spec, own, (5e-4, 1e-3, 2e-3, 4e-3)) if given == "auto" else (float(given), {})
    runs: list[Run] = []
    for seed in range(args.seeds):
        runs += compare(problem, args.old, args.new, rates["from"], rates["to"], seed, overrides)
        print(f"seed {seed} done", flush=True)
    print(f"validation loss in nats a byte, {args.seeds} seeds, {args.steps} updates, lr {rates['from']:g} -> {rates['to']:g}\n")
    print(table(runs, args.steps // 2))
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"convert-{args.old}-{args.new}.json"
    settings = vars(args) | {"corpus": problem.corpus.describe(), "torch": torch.__version__}
    kept = {"settings": settings, "rates": rates, "grids": grids, "runs": [asdict(run) for run in runs]}
    out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {out}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="old", default="adamw", help="spec of the first half")
    parser.add_argument("--to", dest="new", default="cosmos", help="spec of the second half")
    parser.add_argument("--from-lr", default="auto", help="peak learning rate, or auto")
    parser.add_argument("--to-lr", default="auto", help="peak learning rate, or auto")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="value of the second spec")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", nargs="*", default=[], help="files or folders; none: the source of Python's standard library")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
