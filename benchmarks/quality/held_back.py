"""Trained models on all that was kept from training, example by example: less noisy than what a run judges itself by.

    python -m benchmarks.quality.held_back encyclopedia RUN [RUN ...]    adds a column for each that the file lacks
    python -m benchmarks.quality.held_back arc                           prints the means, and differences to `lora`

A RUN is a folder of `paca compare` with a YAML of this folder: `.../encyclopedia-memory/runs/lora-lr0.00078-seed0` is
the column `encyclopedia-memory/lora-lr0.00078-seed0` of held_back/encyclopedia.csv. Values are losses in nats per token
(encyclopedia: 273 entries, of which a run takes the first 64), or 1 for a right answer (arc: 3,548 questions, of which
a run takes 600); `weight` is the tokens of an entry's answer, or 1.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from benchmarks.quality.prepare import CACHE

from paca.evaluation.own_data import Measurement, measure, scorer
from paca.pretrained.generation import load_for_generation
from paca.training import load_run_config
from paca.training.trainers import trainer_kind

FOLDER = Path(__file__).with_suffix("")
EXAMPLES = {"encyclopedia": CACHE / "encyclopedia/held_back.jsonl", "arc": CACHE / "arc/test.jsonl"}
PARTS = {"arc": {"ARC-Easy": slice(2376), "ARC-Challenge": slice(2376, None)}}
BATCH = 16
RUN = re.compile(r"(?P<page>[^/]+)/(?P<method>.+)-lr(?P<rate>[^-]+(?:e-\d+)?)-seed(?P<seed>\d+)")
BASE = "lora"


def name_of(run: Path) -> str:
    """Of a run's column."""
    run = run.resolve()
    return f"{run.parents[1].name}/{run.name}"


def scores(run: Path, examples: Path) -> pd.DataFrame:
    """`weight` of each example, and what the run has for it, under its name."""
    config = load_run_config(run / "config.yaml", [f"data.eval={examples}", "eval.limit=null"])
    held_back = trainer_kind(config.train).read(config).eval
    assert held_back is not None
    loaded = load_for_generation(str(run))
    measurement = replace(scorer(config.eval) or Measurement("loss"), batch_size=BATCH)
    found = measure(loaded.model.eval(), loaded.tokenizer, held_back.dataset, measurement)
    values = pd.Series(found.sums[measurement.metric]) / found.weights
    return pd.DataFrame({"weight": found.weights, name_of(run): values})


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """By run: its weighted mean, and the difference to the run of `BASE` with its page and seed.

    `error` is the standard error of that difference, examples drawn by chance. Without such a run it is compared with
    itself.
    """
    runs = {name: found.groupdict() for name in rows.columns if (found := RUN.fullmatch(name))}
    bases = {(run["page"], run["seed"]): name for name, run in runs.items() if run["method"] == BASE}
    lines = []
    for name, run in runs.items():
        base = bases.get((run["page"], run["seed"]), name)
        mean, _ = _mean(rows, [rows[name]])
        difference, error = _mean(rows, [rows[name] - rows[base]])
        lines.append({"run": name, "mean": mean, f"minus {BASE}": difference, "error": error})
    return pd.DataFrame(lines).set_index("run")


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """By page and method: the same of all seeds together, which have the same examples."""
    runs = {name: found for name in rows.columns if (found := RUN.fullmatch(name))}
    columns: dict[tuple[str, str], list[str]] = {}
    for name, found in runs.items():
        columns.setdefault((found["page"], found["method"]), []).append(name)
    lines = []
    for (page, method), names in columns.items():
        mean, _ = _mean(rows, [rows[name] for name in names])
        base = [rows[name] for name in columns.get((page, BASE), names)]
        own = rows[names].mean(axis=1)
        difference, error = _mean(rows, [own - sum(base) / len(base)])
        lines.append({"page": page, "method": method, "mean": mean, f"minus {BASE}": difference, "error": error})
    return pd.DataFrame(lines).set_index(["page", "method"])


def _mean(rows: pd.DataFrame, columns: Sequence[pd.Series]) -> tuple[float, float]:
    """The weighted mean over the examples of the mean of columns, and its standard error."""
    values, weights = sum(columns) / len(columns), rows.weight / rows.weight.sum()
    mean = (weights * values).sum()
    return mean, ((weights * (values - mean)) ** 2).sum() ** 0.5


def main() -> None:
    """Add the columns that are missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="*")
    given = parser.parse_args()
    file = FOLDER / f"{given.task}.csv"
    rows = pd.read_csv(file).astype(float) if file.exists() else pd.DataFrame()
    for run in given.runs:
        if name_of(run) not in rows:
            found = scores(run, EXAMPLES[given.task])
            assert rows.empty or rows.weight.equals(found.weight)
            rows = found if rows.empty else rows.join(found[name_of(run)])
            rows.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
            print(name_of(run), flush=True)
    for found in (table, over_seeds) if len(rows) else ():
        print(found(rows).to_string(float_format="%.4f"))
    for name, part in PARTS.get(given.task, {}).items() if len(rows) else ():
        print(f"{name} alone:\n{over_seeds(rows[part]).to_string(float_format='%.4f')}")


if __name__ == "__main__":
    main()
