"""Ways to do better at a task, one run each: other optimizers, other columns, a part of LoRA frozen.

    python -m benchmarks.quality.probes NAME    trains it in runs/probes/NAME, and adds its row
    python -m benchmarks.quality.probes         prints the table of benchmarks/quality/probes.csv

`WAYS` names them. No example is seen twice, so the mean loss of the last 100 of 200 steps, each taken before its
update, is a held-out loss of 800 examples: less noisy between two ways than that of the 64 held-out ones. `BASE` is
what the table compares with, step by step.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch
import yaml
from benchmarks.quality.rotation import InTurns, Rotation
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import paca
from paca.evaluation.encoding import continuation_of
from paca.training import load_run_config, train
from paca.training.config.run_config import RunConfig
from paca.training.trainers import trainer_kind
from paca.tuner.calibration.selecting import collect_scores
from paca.tuner.calibration.targets import find_targets

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_suffix(".csv")
BASE = "lora"
EXAMPLES = 32  # that columns over all layers are chosen by
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
LINEAR = {"lr_scheduler_type": "linear"}
LATE = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 60}}
TWICE = {"gradient_accumulation_steps": 2, "max_steps": 100}


@dataclass(frozen=True)
class Way:
    """How a run differs from the task's file. `method` takes the place of its `paca` section."""

    rate: float
    method: dict[str, Any] | None = None
    columns: dict[str, Any] | None = None  # laid over its `paca` section
    train: dict[str, Any] | None = None  # laid over its `train` section
    optimizer: str | None = None  # "muon", or "shared": Adam with one second moment for a row of the columns
    frozen: str | None = None  # parameters whose name holds this
    rates_by: str | None = None  # each layer's rate in proportion to its weights' "size", or its "outputs" over inputs
    rotation: Rotation | None = None
    over_all_layers: bool = False  # columns with the largest gradients for their parameters, in all layers together


def _columns(r: int, **settings: Any) -> dict[str, Any]:
    return {"r": r, "paca_alpha": r, **settings}


def _lora(r: int) -> dict[str, Any]:
    return {"lora": {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}}


WAYS = {
    BASE: Way(4.87e-4, method=_lora(60), train=HALVES),
    "lora-faster": Way(7.8e-4, method=_lora(60), train=HALVES),
    "lora-a-frozen": Way(7.8e-4, method=_lora(64), frozen="lora_A"),
    "lora-a-frozen-faster": Way(1.25e-3, method=_lora(64), frozen="lora_A"),
    "lora-a-frozen-slower": Way(4.87e-4, method=_lora(64), frozen="lora_A"),
    "lora-a-frozen-slowest": Way(3.04e-4, method=_lora(64), frozen="lora_A"),
    "paca": Way(7.8e-4),
    "paca-faster": Way(1.25e-3),
    "paca-r16": Way(5e-3, columns=_columns(16)),
    "paca-r16-slower": Way(3.2e-3, columns=_columns(16)),
    "paca-r128": Way(7.8e-4, columns=_columns(128)),
    "paca-r256": Way(4.87e-4, columns=_columns(256), train=HALVES),
    "paca-r256-slower": Way(3.04e-4, columns=_columns(256), train=HALVES),
    "paca-r256-faster": Way(7.8e-4, columns=_columns(256), train=HALVES),
    "paca-r448": Way(1.9e-4, columns=_columns(448), train=HALVES),
    "two-kinds": Way(1.25e-3, columns=_columns(288, target_modules=["o_proj", "down_proj"])),
    "two-kinds-slowest": Way(4.87e-4, columns=_columns(288, target_modules=["o_proj", "down_proj"])),
    "two-kinds-slower": Way(7.8e-4, columns=_columns(288, target_modules=["o_proj", "down_proj"])),
    "two-kinds-faster": Way(2e-3, columns=_columns(288, target_modules=["o_proj", "down_proj"])),
    "activation-norm": Way(4.87e-4, columns={"selection": "activation_norm"}),
    "activation-norm-faster": Way(7.8e-4, columns={"selection": "activation_norm"}),
    "gradient-norm": Way(4.87e-4, columns={"selection": "gradient_norm"}),
    "factors": Way(7.8e-4, columns=_columns(256), train={"factor_rank": 64, **HALVES}),
    "factors-r128-32": Way(7.8e-4, columns=_columns(128), train={"factor_rank": 32}),
    "factors-r64-32": Way(7.8e-4, train={"factor_rank": 32}),
    "muon": Way(1.25e-3, optimizer="muon"),
    "muon-slower": Way(4.87e-4, optimizer="muon"),
    "muon-faster": Way(3.2e-3, optimizer="muon"),
    "muon-fastest": Way(8e-3, optimizer="muon"),
    "rates-by-size": Way(1.25e-3, rates_by="size"),
    "rates-by-outputs": Way(1.25e-3, rates_by="outputs"),
    "linear": Way(1.25e-3, train=LINEAR),
    "lora-linear": Way(4.87e-4, method=_lora(60), train=LINEAR | HALVES),
    "paca-r256-linear": Way(3.04e-4, columns=_columns(256), train=LINEAR | HALVES),
    "late-decay": Way(1.25e-3, train=LATE),
    "late-decay-slower": Way(7.8e-4, train=LATE),
    "lora-late-decay": Way(7.8e-4, method=_lora(33), train=LATE),
    "rotated": Way(7.8e-4, columns={"rotate_every": 50}),
    "rotated-in-turns": Way(7.8e-4, rotation=Rotation(every=40, groups=4, rewarm=10)),
    "rotated-in-turns-carried": Way(7.8e-4, rotation=Rotation(every=40, groups=4, carry=True)),
    "over-all-layers": Way(4.87e-4, over_all_layers=True),
    "paca-batch-16": Way(1.25e-3, train=TWICE),
    "paca-batch-16-faster": Way(2e-3, train=TWICE),
    "lora-batch-16": Way(7.8e-4, method=_lora(33), train=TWICE),
    "lora-batch-16-faster": Way(1.25e-3, method=_lora(33), train=TWICE),
    "shared-moment": Way(4.87e-4, optimizer="shared"),
    "shared-moment-faster": Way(1.25e-3, optimizer="shared"),
}


class SharedMoment(torch.optim.Optimizer):
    """Adam whose second moment is the mean over each row, so that columns with larger gradients move further."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state, squares = self.state[p], p.grad.square().mean(1, keepdim=True)
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(p.grad), "squares": torch.zeros_like(squares)}
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 - first)
                state["squares"].lerp_(squares, 1 - second)
                scale = (state["squares"] / (1 - second ** state["step"])).sqrt() + 1e-8
                p.sub_(state["mean"] / scale, alpha=group["lr"] / (1 - first ** state["step"]))


def change_optimizer(way: Way) -> None:
    """Let transformers' Trainer make the optimizer of `way`."""
    made = {"muon": torch.optim.Muon, "shared": SharedMoment}.get(way.optimizer or "")
    options = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0} if way.optimizer == "muon" else {}
    if made is not None:
        chosen = lambda args, model=None: (made, {"lr": args.learning_rate, **options})  # noqa: E731
        Trainer.get_optimizer_cls_and_kwargs = staticmethod(chosen)
    create = Trainer.create_optimizer

    def created(self: Trainer, *args: Any, **settings: Any) -> Any:
        if way.frozen:
            for name, parameter in self.model.named_parameters():
                if way.frozen in name:
                    parameter.requires_grad_(False)
        optimizer = create(self, *args, **settings)
        if way.rates_by:
            optimizer.param_groups[:] = by_layer(self.model, optimizer.param_groups, way.rates_by)
        if way.rotation:
            names = {
                id(parameter): name.removeprefix("base_model.model.").rpartition(".paca_delta")[0]
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
            self.add_callback(InTurns(way.rotation, optimizer, names))
        return optimizer

    Trainer.create_optimizer = created


def by_layer(model: torch.nn.Module, groups: list[dict[str, Any]], rates_by: str) -> list[dict[str, Any]]:
    """A group for each delta, whose rates have the geometric mean that all had."""
    weights = {
        layer.paca_delta["default"]: layer.base_layer.weight
        for layer in model.modules()
        if isinstance(getattr(layer, "paca_delta", None), torch.nn.ParameterDict)
    }
    logs = {
        delta: (weight.float().square().mean().sqrt() if rates_by == "size" else weight.shape[0] / weight.shape[1])
        for delta, weight in weights.items()
    }
    logs = {delta: math.log(float(value)) for delta, value in logs.items()}
    middle = fmean(logs.values())
    return [
        {**group, "params": [delta], "lr": group["lr"] * math.exp(logs[delta] - middle)}
        for group in groups
        for delta in group["params"]
    ]


def over_all_layers(config: RunConfig) -> dict[str, Any]:
    """A `paca` section with as many parameters as the run's, whose columns have the largest sums of squares of the
    gradient for each of their parameters; every layer has some."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype="bfloat16", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    data = trainer_kind(config.train).read(config).train.dataset.select(range(EXAMPLES))
    batches = []
    for row in data:
        prompt, answer = continuation_of(row, tokenizer)
        tokens, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        batches.append({"input_ids": tokens, "labels": labels})
    targets = find_targets(model, paca.PacaConfig(r=1, target_modules="all-linear", selection="gradient_norm"))
    scores = collect_scores(model, targets, "gradient_norm", batches)
    heights = {name: target.module.weight.shape[0] for name, target in targets.items()}
    budget = config.adapter["r"] * sum(heights.values())
    of_all = [
        (float(score) ** 2 / heights[name], name, column)
        for name, found in scores.items()
        for column, score in enumerate(found)
    ]
    columns: dict[str, list[int]] = {name: [int(found.argmax())] for name, found in scores.items()}
    budget -= sum(heights.values())
    for _, name, column in sorted(of_all, reverse=True):
        if budget < heights[name]:
            break
        if column not in columns[name]:
            columns[name].append(column)
            budget -= heights[name]
    ranks = {f"^{re.escape(name)}": len(found) for name, found in columns.items()}
    return {"indices": {name: sorted(found) for name, found in columns.items()}, "rank_pattern": ranks,
            "alpha_pattern": ranks}  # fmt: skip


def run(name: str, task: str) -> None:
    """Train one way, in `runs/probes/NAME`."""
    way, folder = WAYS[name], ROOT / "runs" / "probes" / name
    settings = yaml.safe_load((ROOT / f"benchmarks/quality/{task}.yaml").read_text())
    settings["train"] |= {"learning_rate": way.rate, "seed": 0, **(way.train or {})}
    settings["output"] = {"dir": str(folder)}
    settings["eval"] = {**settings.get("eval", {}), "before": False}
    if way.method:
        del settings["paca"]
        settings |= way.method
    else:
        settings["paca"] |= way.columns or {}
    if way.over_all_layers:
        plain = folder.with_suffix(".plain.yaml")
        plain.parent.mkdir(parents=True, exist_ok=True)
        plain.write_text(yaml.safe_dump(settings, sort_keys=False))
        settings["paca"] |= over_all_layers(load_run_config(plain))
    change_optimizer(way)
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    train(load_run_config(file))
    add_row(name, task, folder)


def add_row(name: str, task: str, folder: Path) -> None:
    """Write what a run's folder tells into the table, in place of an earlier row of the same way."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: round(row["loss"], 4) for row in rows if "loss" in row}
    row = {
        "task": task,
        "way": name,
        "learning_rate": WAYS[name].rate,
        "eval_loss": round(summary["eval_loss_after"], 4),
        "tokens": summary["tokens"],
        "commit": (summary["git"] or {}).get("commit", "")[:7],
        "losses": " ".join(str(losses[step]) for step in sorted(losses)),
    }
    found = pd.read_csv(ROWS) if ROWS.is_file() else pd.DataFrame(columns=list(row))
    found = found[(found["task"] != task) | (found["way"] != name)]
    pd.concat([found, pd.DataFrame([row])]).to_csv(ROWS, index=False)


def table() -> pd.DataFrame:
    """Mean losses of each quarter of the steps, less those of `BASE`; of the last half; and on held-out data."""
    rows = pd.read_csv(ROWS)
    losses = {(row.task, row.way): torch.tensor([float(x) for x in row.losses.split()]) for row in rows.itertuples()}
    rows["whole"], shown = rows.groupby("task").tokens.transform("max"), []
    for row in rows.itertuples():
        ours, base = losses[row.task, row.way], losses.get((row.task, BASE))
        if base is not None:
            if row.tokens > row.whole / 2 and 2 * len(ours) == len(base):  # batches of twice the size
                base = base.view(-1, 2).mean(1)
            apart, size = ours - base[: len(ours)], len(base) // 4
            parts = {f"quarter {n + 1}": f"{float(apart[n * size : (n + 1) * size].mean()):+.4f}" for n in range(4)}
            last = f"{float(ours[len(base) // 2 :].mean()):.4f}"
            shown.append(
                {
                    "task": row.task,
                    "way": row.way,
                    "rate": row.learning_rate,
                    **parts,
                    "last": last,
                    "held out": row.eval_loss,
                }
            )
    return pd.DataFrame(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", nargs="?", choices=list(WAYS))
    parser.add_argument("--task", default="encyclopedia")
    args = parser.parse_args()
    if args.way is None:
        print(table().to_string(index=False))
    else:
        run(args.way, args.task)


if __name__ == "__main__":
    main()
