"""How trained models answer GSM8K: all held-out problems, where answers end, and the loss of each kind of token.

    python -m benchmarks.quality.gsm8k_answers benchmarks/quality/gsm8k-time/answers.csv RUN [RUN ...] [--towards-end 2]

A RUN is a folder of `paca train` with benchmarks/quality/gsm8k.yaml. Adds a row for each that the file lacks.
`--towards-end` is added to the logit of the mark that ends an answer: what a model scores if it stops sooner.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import paca  # noqa: F401  (registers PaCA with PEFT)
from paca.evaluation.encoding import answer_of, continuation_of
from paca.evaluation.own_data import scorer
from paca.evaluation.statistics import mean_with_error
from paca.pretrained.generation import load_for_generation
from paca.training import load_run_config
from paca.training.trainers import trainer_kind

BATCH = 64  # problems answered at once
END = "####"  # begins the last line of each answer
RESULT = "result"
KINDS = ("end", "next line", RESULT, "rest")
"""Where an answer's tokens stand: at the mark that ends it; at the start of any other line but the first; behind the
`=` of a calculation; elsewhere."""


@dataclass
class Row:
    """One model. Losses are nats per token of the references, with what comes before them as in the reference."""

    run: str
    towards_end: float
    problems: int
    exact_match: float
    exact_match_stderr: float
    without_end: float  # share of answers that have no last line within the length asked for
    calculations: float  # a problem's answer, mean
    reference_calculations: float
    loss: float
    loss_end: float
    loss_next_line: float
    loss_result: float
    loss_rest: float
    tokens_end: int
    tokens_next_line: int
    tokens_result: int
    tokens_rest: int
    mark_at_ends: float  # its mean probability where a reference ends
    mark_elsewhere: float  # and at the start of its other lines but the first
    mark_auc: float  # how often a line where a reference ends has the higher one, of all pairs


def answers_of(run: Path, towards_end: float) -> Row:
    """Ask a run's model all problems of its held-out file."""
    config = load_run_config(run / "config.yaml", ["eval.limit=null"])
    measurement = scorer(config.eval)
    held_out = trainer_kind(config.train).read(config).eval
    assert measurement is not None
    assert held_out is not None
    measurement = replace(measurement, batch_size=BATCH)
    rows = list(held_out.dataset)
    loaded = load_for_generation(str(run))
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    losses, marks = losses_by_kind(model, tokenizer, rows)
    (mark,) = tokenizer(END, add_special_tokens=False)["input_ids"]
    if towards_end:
        model.generation_config.sequence_bias = [[[mark], towards_end]]
    answers = measurement.answers(model, tokenizer, rows)
    found, references = measurement.extract(answers), measurement.references(rows)
    right = mean_with_error([float(a == b) for a, b in zip(found, references, strict=True)])
    parts = {f"loss_{kind.replace(' ', '_')}": mean(losses[kind]) for kind in KINDS}
    counts = {f"tokens_{kind.replace(' ', '_')}": len(losses[kind]) for kind in KINDS}
    return Row(
        run=run.name,
        towards_end=towards_end,
        problems=len(rows),
        exact_match=right[0],
        exact_match_stderr=right[1] or 0.0,
        without_end=mean(float(END not in answer) for answer in answers),
        calculations=mean(answer.count("<<") for answer in answers),
        reference_calculations=mean(answer_of(row).count("<<") for row in rows),
        loss=mean(loss for kind in KINDS for loss in losses[kind]),
        **parts,
        **counts,
        mark_at_ends=mean(marks[True]),
        mark_elsewhere=mean(marks[False]),
        mark_auc=mean(float(at > other) for at in marks[True] for other in marks[False]),
    )


@torch.no_grad()
def losses_by_kind(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]]
) -> tuple[dict[str, list[float]], dict[bool, list[float]]]:
    """The loss of each token of the reference answers, by kind; and the probability of the mark at the start of a line
    (but the first), by whether the reference has it there."""
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    marks: dict[bool, list[float]] = {True: [], False: []}
    (mark,) = tokenizer(END, add_special_tokens=False)["input_ids"]
    for row in rows:
        prompt, answer = continuation_of(row, tokenizer)
        tokens = torch.tensor([prompt + answer], device=model.device)
        log_probs = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
        said = ""
        for place, token in enumerate(answer):
            text = tokenizer.decode([token])
            kind = _kind(said, text)
            losses[kind].append(-float(log_probs[place, token]))
            if kind in ("end", "next line"):
                marks[kind == "end"].append(float(log_probs[place, mark].exp()))
            said += text
    return losses, marks


def _kind(said: str, token: str) -> str:
    line = said.rpartition("\n")[2]
    if said.endswith("\n"):
        return "end" if token.startswith("#") else "next line"
    calculation = line.rpartition("<<")[2] if line.count("<<") > line.count(">>") else ""
    return RESULT if "=" in calculation and ">" not in token else "rest"


def main() -> None:
    """Add the rows that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--towards-end", type=float, default=0.0)
    given = parser.parse_args()
    known = set()
    if given.output.exists():
        with given.output.open(newline="", encoding="utf-8") as file:
            known = {(row["run"], float(row["towards_end"])) for row in csv.DictReader(file)}
    for run in given.runs:
        if (run.name, given.towards_end) in known:
            continue
        row = asdict(answers_of(run, given.towards_end))
        shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
        with given.output.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(shown), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(shown)
        print(shown, flush=True)


if __name__ == "__main__":
    main()
