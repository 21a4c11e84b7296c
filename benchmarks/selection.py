"""Which columns should PaCA train? Ways of choosing them, compared by the held-out loss of a small language model.

    python benchmarks/selection.py --model .cache/demo/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data encyclopedia=.cache/demo/data/train.jsonl:.cache/demo/data/test.jsonl \\
        --data gsm8k=gsm8k_train.jsonl:gsm8k_test.jsonl
    python benchmarks/selection.py --report

Every strategy has the same budget of columns, steps and tokens. It runs at three learning rates with seed 0 (1e-3,
3e-3, and 1e-2 or 3e-4, on the side of the better of the two), and at the best of them with two more seeds. A seed
decides the order of the data, hence what is trained on and what columns are chosen by, and the columns of `random`. The
held-out examples are always the same. LoRA of rank 8 trains about as many parameters as PaCA of rank 16.

One row is appended for each run as it ends. Started again it goes on with what is missing; several processes side by
side share the work. The report says which of the planned runs are there.
"""

from __future__ import annotations

import argparse
import copy
import csv
import fcntl
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
import selection_columns
import torch
from selection_report import print_report
from torch import Tensor
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

import paca
from paca.bench.provenance import provenance
from paca.data import load_examples
from paca.pretrained import load_pretrained
from paca.training.summary import now

STRATEGIES = (
    "random",
    "activation_variance",
    "gradient_norm",
    "lora",
    "activation_norm",
    "pivoted_answer_variance",
    "weighted_variance",
    "weight_norm",
)
RANK, LORA_RANK, ALPHA = 16, 8, 16
SEEDS = (1, 2)  # besides 0
ANSWER_TOKENS = 32  # an example must have so many left when it is cut
WARMUP_STEPS = 2
SAME = ("steps", "batch", "max_tokens", "held_out")
"""Settings that make rows comparable."""


@dataclass(frozen=True)
class Run:
    """What is trained."""

    data: str
    strategy: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Row:
    """One finished run."""

    date: str
    commit: str
    dirty: str
    machine: str
    device: str
    threads: str
    versions: str
    command: str
    model: str
    dtype: str
    data: str
    strategy: str
    rank: int
    alpha: int
    trainable: int
    rate: float
    seed: int
    steps: int
    batch: int
    max_tokens: int
    calibration: int
    """Training examples that columns were chosen by; 0 where none were needed."""
    tokens: int
    """Trained on, prompts included."""
    answer_tokens: int
    """Those that the loss fell on."""
    held_out: int
    """Examples that the loss is measured on."""
    loss_before: float
    loss_after: float
    seconds_choosing: float
    seconds_training: float
    """Beside other work: says nothing about speed."""


@dataclass(frozen=True)
class Data:
    """A data set's examples, tokenized: ``input_ids`` and ``labels`` each."""

    train: list[dict[str, list[int]]]
    held_out: list[dict[str, list[int]]]


def tokenized(file: str, tokenizer: Any, max_tokens: int) -> list[dict[str, list[int]]]:
    """The examples of ``file``, cut to ``max_tokens``; those with too little answer left are dropped."""
    examples = []
    for row in load_examples(file).dataset:
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][:max_tokens]
        if len(whole) - len(prompt) >= ANSWER_TOKENS:
            assert whole[: len(prompt)] == prompt
            labels = [-100] * len(prompt) + whole[len(prompt) :]
            examples.append({"input_ids": whole, "labels": labels})
    return examples


def collated(examples: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """One batch, padded on the right."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", -100)}


def loss_of(model: Any, batch: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """The model's loss on the labels, with logits made only where there are any."""
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    return F.cross_entropy(model.lm_head(hidden[:, :-1][counted]).float(), labels[counted], reduction=reduction)


class Experiment:
    """The model, the data and the settings that all runs share."""

    def __init__(self, settings: argparse.Namespace, tables: dict[str, tuple[str, str]]) -> None:
        self.settings = settings
        loaded = load_pretrained(settings.model, dtype="bfloat16")
        self.model, self.pad = loaded.model.eval(), loaded.tokenizer.pad_token_id
        self.model.config.use_cache = False
        self.data = {
            name: Data(
                tokenized(train, loaded.tokenizer, settings.max_tokens),
                tokenized(test, loaded.tokenizer, settings.max_tokens)[: settings.held_out],
            )
            for name, (train, test) in tables.items()
        }
        for name, data in self.data.items():
            if len(data.held_out) < settings.held_out or len(data.train) < settings.steps * settings.batch:
                raise SystemExit(
                    f"{name} has {len(data.train)} training and {len(data.held_out)} held-out examples with "
                    f"{ANSWER_TOKENS} answer tokens within --max-tokens; that is too few."
                )
        self.loss_before = {name: self.held_out_loss(self.model, name) for name in tables}
        self.shared = {
            **provenance(torch.device("cpu")),
            "command": shlex.join(["python", "benchmarks/selection.py", *sys.argv[1:]]),
            "model": Path(settings.model).name,
            "dtype": "bfloat16",
        }

    @torch.no_grad()
    def held_out_loss(self, model: Any, data: str) -> float:
        """Per answer token, over all held-out examples."""
        total, tokens = 0.0, 0
        examples = self.data[data].held_out
        for start in range(0, len(examples), 8):
            batch = collated(examples[start : start + 8], self.pad)
            total += float(loss_of(model, batch, reduction="sum"))
            tokens += int((batch["labels"] != -100).sum())
        return total / tokens

    def batches(self, run: Run, examples: int) -> list[dict[str, Tensor]]:
        """The first ``examples`` of the training data in the order of the run's seed."""
        train, size = self.data[run.data].train, self.settings.batch
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))[:examples].tolist()
        return [collated([train[i] for i in order[s : s + size]], self.pad) for s in range(0, examples, size)]

    def config(self, run: Run, model: Any) -> tuple[peft.PeftConfig, int]:
        """The adapter's, with its columns chosen, and how many examples that took."""
        if run.strategy == "lora":
            return peft.LoraConfig(r=LORA_RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"), 0
        shared: dict[str, Any] = {"r": RANK, "paca_alpha": ALPHA, "task_type": "CAUSAL_LM", "random_seed": run.seed}
        own = run.strategy in selection_columns.STRATEGIES
        if not own:
            shared["selection"] = run.strategy
        config = paca.PacaConfig(**shared)
        if run.strategy in ("random", "weight_norm"):
            return paca.select(model, config), 0
        batches = self.batches(run, self.settings.calibration)
        if own:
            config.indices = selection_columns.choose(run.strategy, model, RANK, batches, loss_of)
        else:
            config = paca.select(model, config, batches, progress=False)
        return config, self.settings.calibration

    def train(self, run: Run) -> Row:
        """Do one run."""
        torch.manual_seed(run.seed)
        steps, batch = self.settings.steps, self.settings.batch
        model = copy.deepcopy(self.model)
        started = time.perf_counter()
        config, calibration = self.config(run, model)
        chosen = time.perf_counter()
        torch.manual_seed(run.seed)
        adapted = peft.get_peft_model(model, config).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
        tokens = answer_tokens = 0
        for content in self.batches(run, steps * batch):
            loss_of(model, content).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += int(content["attention_mask"].sum())
            answer_tokens += int((content["labels"] != -100).sum())
        ended = time.perf_counter()
        return Row(
            **{**self.shared, "date": now()},
            **{name: getattr(run, name) for name in ("data", "strategy", "rate", "seed")},
            **{name: getattr(self.settings, name) for name in SAME},
            rank=LORA_RANK if run.strategy == "lora" else RANK,
            alpha=ALPHA,
            trainable=sum(p.numel() for p in trained),
            calibration=calibration,
            tokens=tokens,
            answer_tokens=answer_tokens,
            loss_before=self.loss_before[run.data],
            loss_after=self.held_out_loss(model.eval(), run.data),
            seconds_choosing=chosen - started,
            seconds_training=ended - chosen,
        )


def planned(tables: list[str], strategies: list[str], done: dict[Run, float]) -> Iterator[Run | None]:
    """All runs in the order of their use; None for one that waits for others to show which it is."""
    for data in tables:
        for number in range(3):
            for strategy in strategies:
                yield _rate_run(Run(data, strategy, 0.0, 0), number, done)
    for seed in SEEDS:
        for data in tables:
            for strategy in strategies:
                tried = [_rate_run(Run(data, strategy, 0.0, 0), number, done) for number in range(3)]
                known = [run for run in tried if run is not None and run in done]
                best = min(known, key=lambda run: done[run]) if len(known) == 3 else None
                yield None if best is None else Run(data, strategy, best.rate, seed)


def _rate_run(run: Run, number: int, done: dict[Run, float]) -> Run | None:
    low, high = (Run(run.data, run.strategy, rate, run.seed) for rate in (1e-3, 3e-3))
    if number < 2:
        return (low, high)[number]
    if low not in done or high not in done:
        return None
    return Run(run.data, run.strategy, 1e-2 if done[high] < done[low] else 3e-4, run.seed)


def read_done(path: Path, settings: argparse.Namespace) -> dict[Run, float]:
    """The held-out loss of the runs with these settings in the file; infinite where it is not a number."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        Run(row["data"], row["strategy"], float(row["rate"]), int(row["seed"])): _loss(row["loss_after"])
        for row in rows
        if all(int(row[name]) == getattr(settings, name) for name in SAME)
    }


def _loss(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.inf


def append(path: Path, row: Row) -> None:
    """Write one row, whole, whoever else writes."""
    names = [field.name for field in fields(Row)]
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.writer(file, lineterminator="\n")
        if path.stat().st_size == 0:
            writer.writerow(names)
        values = [getattr(row, name) for name in names]
        writer.writerow([f"{value:.8g}" if isinstance(value, float) else value for value in values])


@contextmanager
def claimed(folder: Path, run: Run) -> Iterator[bool]:
    """Whether the run is ours now. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{run.data}-{run.strategy}-{run.rate:g}-{run.seed}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def work(experiment: Experiment, tables: list[str], settings: argparse.Namespace) -> None:
    """Do what is missing, until nothing is."""
    while True:
        done = read_done(settings.output, settings)
        runs = list(planned(tables, settings.strategies, done))
        missing = [run for run in runs if run is not None and run not in done]
        if not missing and None not in runs:
            return
        for run in missing:
            with claimed(settings.locks, run) as ours:
                if ours and run not in read_done(settings.output, settings):
                    row = experiment.train(run)
                    append(settings.output, row)
                    print(f"{row.date} {run}: {row.loss_before:.4f} -> {row.loss_after:.4f}", flush=True)
                    break
        else:
            time.sleep(5)  # another process has what is missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file, a folder or a hub id")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=TRAIN:TEST", help="two files; repeatable")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/selection.csv"))
    parser.add_argument("--locks", type=Path, default=Path(".cache/selection-locks"))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=112)
    parser.add_argument("--calibration", type=int, default=32, help="training examples that columns are chosen by")
    parser.add_argument("--held-out", type=int, default=48, help="examples that the loss is measured on")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and train nothing")
    settings = parser.parse_args()
    if settings.report:
        same = {name: getattr(settings, name) for name in SAME}
        print_report(settings.output, settings.strategies, (0, *SEEDS), same)
        return
    if settings.model is None or not settings.data:
        parser.error("--model and --data are needed")
    tables = {name: tuple(files.split(":")) for name, _, files in (text.partition("=") for text in settings.data)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    work(Experiment(settings, tables), list(tables), settings)


if __name__ == "__main__":
    main()
