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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from transformers import Trainer

from paca.training import load_run_config, train

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_suffix(".csv")
BASE = "lora"
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
STEPS = 200


@dataclass(frozen=True)
class Way:
    """How a run differs from the task's file. `method` takes the place of its `paca` section."""

    rate: float
    method: dict[str, Any] | None = None
    columns: dict[str, Any] | None = None  # laid over its `paca` section
    train: dict[str, Any] | None = None  # laid over its `train` section
    optimizer: str | None = None  # "muon", or "shared": Adam with one second moment for a row of the columns
    frozen: str | None = None  # parameters whose name holds this


def _columns(r: int, **settings: Any) -> dict[str, Any]:
    return {"r": r, "paca_alpha": r, **settings}


def _lora(r: int) -> dict[str, Any]:
    return {"lora": {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}}


WAYS = {
    BASE: Way(4.87e-4, method=_lora(60), train=HALVES),
    "lora-faster": Way(7.8e-4, method=_lora(60), train=HALVES),
    "lora-a-frozen": Way(7.8e-4, method=_lora(64), frozen="lora_A"),
    "lora-a-frozen-faster": Way(1.25e-3, method=_lora(64), frozen="lora_A"),
    "paca": Way(7.8e-4),
    "paca-r256": Way(4.87e-4, columns=_columns(256), train=HALVES),
    "activation-norm": Way(4.87e-4, columns={"selection": "activation_norm"}),
    "gradient-norm": Way(4.87e-4, columns={"selection": "gradient_norm"}),
    "factors": Way(7.8e-4, columns=_columns(256), train={"factor_rank": 64, **HALVES}),
    "factors-r128-32": Way(7.8e-4, columns=_columns(128), train={"factor_rank": 32}),
    "factors-r64-32": Way(7.8e-4, train={"factor_rank": 32}),
    "muon": Way(1.25e-3, optimizer="muon"),
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
        return create(self, *args, **settings)

    Trainer.create_optimizer = created


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
    """Mean losses of 50 steps each, as differences from `BASE`, and the held-out losses."""
    rows = pd.read_csv(ROWS)
    losses = {(row.task, row.way): torch.tensor([float(x) for x in row.losses.split()]) for row in rows.itertuples()}
    shown = []
    for row in rows.itertuples():
        ours, base = losses[row.task, row.way], losses.get((row.task, BASE))
        if base is not None:
            apart = ours - base[: len(ours)]
            parts = {f"{at + 1}-{at + 50}": f"{float(apart[at : at + 50].mean()):+.4f}" for at in range(0, STEPS, 50)}
            last = f"{float(ours[STEPS // 2 :].mean()):.4f}"
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
