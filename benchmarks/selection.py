"""Which columns should PaCA train? Ways of choosing them, compared by the held-out loss of a small language model.

    python benchmarks/selection.py --model .cache/demo/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data encyclopedia=.cache/quality/encyclopedia/train.jsonl:.cache/quality/encyclopedia/test.jsonl \\
        --data gsm8k=gsm8k_train.jsonl:gsm8k_test.jsonl
    python benchmarks/selection.py --report

Every strategy has the same budget of columns, steps and tokens. It runs at three learning rates with seed 0 (1e-3,
3e-3, and 1e-2 or 3e-4, on the side of the better of the two; one beyond where that is the best), and at the best of
them with two more seeds. A seed decides the order of the data, hence what is trained on and what columns are chosen
by, and the columns that are random. The held-out examples are always the same. `rotated_blocks` trains other blocks
after every eighth step. LoRA of rank 8 trains about as many parameters as PaCA of rank 16.

One row is appended for each run as it ends. Started again it goes on with what is missing; several processes side by
side share the work. The report says which of the planned runs are there.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import peft
import selection_columns
import torch
from selection_data import ANSWER_TOKENS, Data, collated, tokenized
from selection_report import print_report
from selection_runs import SAME, SEEDS, Row, Run, append, claimed, planned, read_done
from torch import Tensor
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

import paca
from paca.columns.selection import FROM_BATCHES
from paca.pretrained import load_pretrained
from paca.training.folder.provenance import now, row_provenance

STRATEGIES = (
    "random",
    "random_blocks",
    "rotated_blocks",
    "activation_variance",
    "gradient_norm",
    "pivoted_answer_variance",
    "lora",
    "activation_norm",
    "pivoted_gradient_variance",
    "weight_norm",
)
RANK, LORA_RANK, ALPHA = 16, 8, 16
LOOKING_AT_DATA = {*FROM_BATCHES, *selection_columns.STRATEGIES}
WARMUP_STEPS = 2
ROTATE_EVERY = 8  # steps, for rotated_blocks


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
        self._chosen: dict[tuple[str, str, int], tuple[peft.PeftConfig, float]] = {}
        self.loss_before = {name: self.held_out_loss(self.model, name) for name in tables}
        self.shared = {
            **row_provenance(torch.device("cpu")),
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
        """The first `examples` of the training data in the order of the run's seed."""
        train, size = self.data[run.data].train, self.settings.batch
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))[:examples].tolist()
        return [collated([train[i] for i in order[s : s + size]], self.pad) for s in range(0, examples, size)]

    def config(self, run: Run, model: Any) -> peft.PeftConfig:
        """The adapter's, with its columns chosen."""
        if run.strategy == "lora":
            return peft.LoraConfig(r=LORA_RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        batches = self.batches(run, self.settings.calibration)
        settings: dict[str, Any] = {"r": RANK, "paca_alpha": ALPHA, "task_type": "CAUSAL_LM", "random_seed": run.seed}
        if run.strategy in selection_columns.STRATEGIES:
            columns = selection_columns.choose(run.strategy, model, RANK, batches, loss_of)
            return paca.PacaConfig(indices=columns, target_modules="all-linear", **settings)
        selection = "random_blocks" if run.strategy == "rotated_blocks" else run.strategy
        config = paca.PacaConfig(selection=selection, **settings)
        return paca.select(model, config, batches if selection in FROM_BATCHES else None, progress=False)

    def chosen(self, run: Run) -> tuple[peft.PeftConfig, float]:
        """The same, found once for all rates, and the seconds it took."""
        key = (run.data, run.strategy, run.seed)
        if key not in self._chosen:
            started = time.perf_counter()
            config = self.config(run, copy.deepcopy(self.model))
            self._chosen[key] = (config, time.perf_counter() - started)
        config, seconds = self._chosen[key]
        return copy.deepcopy(config), seconds

    def train(self, run: Run) -> Row:
        """Do one run."""
        steps, batch = self.settings.steps, self.settings.batch
        config, seconds_choosing = self.chosen(run)
        model = copy.deepcopy(self.model)
        started = time.perf_counter()
        torch.manual_seed(run.seed)  # of LoRA's first values
        adapted = peft.get_peft_model(model, config).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
        tokens = answer_tokens = 0
        for step, content in enumerate(self.batches(run, steps * batch)):
            if run.strategy == "rotated_blocks" and step and step % ROTATE_EVERY == 0:
                paca.rotate(adapted, optimizer, step // ROTATE_EVERY)
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
            calibration=self.settings.calibration if run.strategy in LOOKING_AT_DATA else 0,
            tokens=tokens,
            answer_tokens=answer_tokens,
            loss_before=self.loss_before[run.data],
            loss_after=self.held_out_loss(model.eval(), run.data),
            seconds_choosing=seconds_choosing,
            seconds_training=ended - started,
        )


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
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=TRAIN:TEST", help="two files; for each data set"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/selection.csv"))
    parser.add_argument("--locks", type=Path, default=Path(".cache/selection-locks"))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=112)
    parser.add_argument("--calibration", type=int, default=32, help="training examples that columns are chosen by")
    parser.add_argument("--held-out", type=int, default=48, help="examples that the loss is measured on")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and train nothing")
    settings = parser.parse_args()
    if settings.report:
        same = {name: getattr(settings, name) for name in SAME}
        done = read_done(settings.output, settings)
        names = [text.partition("=")[0] for text in settings.data] or sorted({run.data for run in done})
        missing = sum(run not in done for run in planned(names, settings.strategies, done))
        print_report(settings.output, names, settings.strategies, (0, *SEEDS), same, missing)
        return
    if settings.model is None or not settings.data:
        parser.error("--model and --data are needed")
    tables = {name: tuple(files.split(":")) for name, _, files in (text.partition("=") for text in settings.data)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    work(Experiment(settings, tables), list(tables), settings)


if __name__ == "__main__":
    main()
