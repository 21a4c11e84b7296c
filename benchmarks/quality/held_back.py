"""The loss of trained models on all encyclopedia entries that were kept from training, entry by entry.

    python -m benchmarks.quality.held_back RUN [RUN ...]    adds a column for each that held_back.csv lacks
    python -m benchmarks.quality.held_back                  prints the means, and differences to `lora` seed by seed

A RUN is a folder of `paca train` with benchmarks/quality/encyclopedia.yaml, whose own evaluation takes the first 64 of
them. Columns are named as the runs; `tokens` is the number of tokens of an entry's answer.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd
from benchmarks.quality.prepare import CACHE

from paca.evaluation.encoding import continuation_of
from paca.evaluation.log_likelihood import likelihoods
from paca.pretrained.generation import load_for_generation
from paca.training import load_run_config
from paca.training.trainers import trainer_kind

ROWS = Path(__file__).with_suffix(".csv")
ENTRIES = CACHE / "encyclopedia/held_back.jsonl"
BATCH = 16
RUN = re.compile(r"(?P<method>.+)-lr(?P<rate>[^-]+(?:e-\d+)?)-seed(?P<seed>\d+)")
BASE = "lora"
OWN = 64
"""Entries by which the runs judged themselves: the first of the file."""


def losses(run: Path) -> pd.DataFrame:
    """`tokens` of each entry's answer, and their mean loss in nats under the run's name."""
    config = load_run_config(run / "config.yaml", [f"data.eval={ENTRIES}"])
    held_back = trainer_kind(config.train).read(config).eval
    assert held_back is not None
    loaded = load_for_generation(str(run))
    asked = [continuation_of(row, loaded.tokenizer) for row in held_back.dataset]
    found = likelihoods(loaded.model.eval(), asked, batch_size=BATCH)
    return pd.DataFrame({"tokens": [one.tokens for one in found], run.name: [-one.per_token for one in found]})


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """By run: the loss over all tokens, that of the first `OWN` entries, and the difference to `BASE` with its seed.

    `error` is the standard error of that difference, entries drawn by chance.
    """
    runs = {name: found.groupdict() for name in rows.columns if (found := RUN.fullmatch(name))}
    bases = {run["seed"]: name for name, run in runs.items() if run["method"] == BASE}
    weights = rows.tokens / rows.tokens.sum()
    lines = []
    for name, run in runs.items():
        own = rows.iloc[:OWN]
        difference = rows[name] - rows[bases[run["seed"]]]
        mean = (weights * difference).sum()
        lines.append(
            {
                "run": name,
                "loss": (weights * rows[name]).sum(),
                f"first {OWN}": (own.tokens * own[name]).sum() / own.tokens.sum(),
                f"minus {BASE}": mean,
                "error": ((weights * (difference - mean)) ** 2).sum() ** 0.5,
            }
        )
    return pd.DataFrame(lines).set_index("run")


def main() -> None:
    """Add the columns that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*")
    rows = pd.read_csv(ROWS) if ROWS.exists() else pd.DataFrame()
    for run in parser.parse_args().runs:
        if run.name not in rows:
            found = losses(run)
            assert rows.empty or rows.tokens.equals(found.tokens)
            rows = found if rows.empty else rows.join(found[run.name])
            rows.to_csv(ROWS, index=False, float_format="%.5f", lineterminator="\n")
            print(run.name, flush=True)
    print(table(rows).to_string(float_format="%.4f"))


if __name__ == "__main__":
    main()
