"""Columns of a 4-bit model that start at the original 16-bit values, against those that start at the dequantized ones.

    python benchmarks/original_weights.py --model FOLDER --data encyclopedia=test.jsonl gsm8k=gsm8k_test.jsonl \\
        --train train.jsonl --output benchmarks/original-weights.csv

FOLDER holds a 16-bit checkpoint in safetensors; it is quantized by bitsandbytes as it is loaded. Measured is the
held-out loss on the answers: before any training, for several ranks and draws of random columns; and after a short
training from both starts with the same columns, batches and rate. The samples of a row are one per draw, and both
starts of a draw are compared with each other (the ratios).

Data are JSONL with `messages` (the last one is the answer), or with `question` and `answer`.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

import paca
from paca.bench.rows import append_rows, summarized
from paca.layers import paca_layers
from paca.training.folder.provenance import row_provenance

STARTS = ("dequantized", "original")
QUANTIZATIONS = {"nf4": False, "nf4-double": True}


class Example(NamedTuple):
    """A conversation in tokens."""

    tokens: list[int]
    answer: int
    """Where the answer begins."""


def read_examples(path: Path, tokenizer: Any, limit: int, longest: int) -> list[Example]:
    """The first `limit` examples of the file that have at most `longest` tokens."""
    examples: list[Example] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            messages = record.get("messages") or [
                {"role": "user", "content": record["question"]},
                {"role": "assistant", "content": record["answer"]},
            ]
            whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            prompt = tokenizer.apply_chat_template(
                messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            if len(whole) <= longest and whole[: len(prompt)] == prompt:
                examples.append(Example(whole, len(prompt)))
            if len(examples) == limit:
                break
    return examples


def batches(examples: Sequence[Example], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, attention mask and labels `(size, longest)`, padded on the right; -100 is no label."""
    for start in range(0, len(examples), size):
        chosen = examples[start : start + size]
        longest = max(len(e.tokens) for e in chosen)
        tokens, labels = (torch.full((len(chosen), longest), fill) for fill in (0, -100))
        for row, (content, answer) in enumerate(chosen):
            tokens[row, : len(content)] = torch.tensor(content)
            labels[row, answer : len(content)] = tokens[row, answer : len(content)]
        lengths = torch.tensor([len(e.tokens) for e in chosen])
        yield tokens, (torch.arange(longest) < lengths[:, None]).long(), labels


def loss_of(model: Any, tokens: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The summed loss of the labels, and how many there are; logits are made for them only."""
    causal = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    hidden = causal.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = causal.lm_head(hidden[:, :-1][wanted]).float()
    return F.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum"), int(wanted.sum())


@torch.no_grad()
def heldout_loss(model: Any, examples: Sequence[Example], size: int) -> float:
    total, count = 0.0, 0
    for batch in batches(sorted(examples, key=lambda e: len(e.tokens)), size):
        loss, labels = loss_of(model, *batch)
        total, count = total + float(loss), count + labels
    return total / count


def quantized(folder: Path, double: bool) -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings).eval()


def adapted(model: Any, rank: int, seed: int, originals: str | None) -> Any:
    """PaCA on all linear layers, with a scale of 1; a rank of 0 trains every column."""
    linear = {m.in_features for m in model.modules() if type(m).__name__ == "Linear4bit"}
    every = {"r": min(linear), "rank_pattern": {"down_proj": max(linear)}} if rank == 0 else {"r": rank}
    alphas = {name: float(r) for name, r in every.get("rank_pattern", {}).items()}
    config = paca.PacaConfig(
        **every,
        paca_alpha=float(every["r"]),
        alpha_pattern=alphas,
        random_seed=seed,
        task_type="CAUSAL_LM",
        original_weights=originals,
    )
    return peft.get_peft_model(model, config)


def train(model: Any, examples: Sequence[Example], steps: int, size: int, rate: float) -> None:
    """AdamW without weight decay; the rate rises over a tenth of the steps and falls to 0 as a cosine."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rise, 1.0, rise - 1 or 1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - rise),
        ],
        [rise],
    )
    model.train()
    for batch in batches(examples, size):
        loss, labels = loss_of(model, *batch)
        (loss / labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def relative_errors(folder: Path, double: bool) -> tuple[list[float], float]:
    """`|W_4bit - W| / |W|` of each linear layer, and of a normally distributed weight as the yardstick."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = adapted(quantized(folder, double), 1, 0, None)
    errors = []
    for name, layer in model.named_modules():
        if layer in paca_layers(model):
            stored = plain.get_submodule(name.removeprefix("base_model.model.")).weight.float()
            found = layer.base_layer.quantization.dequantize(layer.base_layer).float()
            errors.append(float((found - stored).norm() / stored.norm()))
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    normal = torch.randn(576, 1536, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(normal, blocksize=64, quant_type="nf4", compress_statistics=double)
    return errors, float((dequantize_4bit(codes, state) - normal).norm() / normal.norm())


class Measurement:
    """One quantization of one model, on all data sets."""

    def __init__(self, chosen: argparse.Namespace, quantization: str, data: dict[str, list[Example]]) -> None:
        self.chosen, self.quantization, self.data = chosen, quantization, data
        self.folder = Path(chosen.model)
        self.model = quantized(self.folder, QUANTIZATIONS[quantization])
        config = self.model.config
        self.shared: dict[str, Any] = {
            "run": secrets.token_hex(4),
            **row_provenance(torch.device("cpu")),
            "model": f"{chosen.name}, {quantization}",
            "loss": "lm",
            "dtype": "bfloat16",
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "vocab": config.vocab_size,
            "image_size": 0,
            "budget": 0,
            "seq": chosen.longest,
            "variant": "eager",
        }

    def losses(self, model: Any) -> dict[str, float]:
        return {name: heldout_loss(model, examples, self.chosen.eval_batch) for name, examples in self.data.items()}

    def write(
        self,
        method: str,
        metric: str,
        rank: int,
        samples: dict[str, list[float]],
        against: dict[str, list[float]] | None = None,
        *,
        trainable: int = 0,
        note: str = "",
        unit: str = "nats",
    ) -> None:
        trained = "after" in metric
        for name, values in samples.items():
            row = {
                **self.shared,
                "scope": name,
                "method": method,
                "metric": metric,
                "unit": unit,
                "rank": rank,
                "trainable": trainable,
                "optimizer": "adamw" if trained else "",
                "batch": self.chosen.batch if trained else self.chosen.eval_batch,
                "baseline": "dequantized" if against else "",
                "note": note,
                **summarized(values, against[name] if against else None),
            }
            append_rows(self.chosen.output, [row])
            shown = " ".join(f"{value:.4f}" for value in values)
            print(f"{self.quantization:11} {metric:24} r={rank:<4} {method:12} {name:13} {shown}", flush=True)

    def at_the_start(self) -> None:
        chosen = self.chosen
        plain = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()
        whole = {name: [loss] for name, loss in self.losses(plain).items()}
        del plain
        self.write("16-bit model", "heldout_loss", 0, whole)
        # Deltas of zero patch the weight with its own values, so one rank and draw stand for all.
        model = adapted(self.model, 1, 0, None)
        without = {name: [loss] for name, loss in self.losses(model).items()}
        model.unload()
        self.write("dequantized", "heldout_loss_at_start", 0, without, note="no column differs: the same at every rank")
        for rank in chosen.ranks:
            seeds = chosen.seeds if rank else 1
            found: dict[str, list[float]] = {name: [] for name in self.data}
            for seed in range(seeds):
                model = adapted(self.model, rank, seed, str(self.folder))
                for name, loss in self.losses(model).items():
                    found[name].append(loss)
                trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                model.unload()
            against = {name: values * seeds for name, values in without.items()}
            note = "every column" if rank == 0 else ""
            self.write("original", "heldout_loss_at_start", rank, found, against, trainable=trainable, note=note)

    def after_training(self, examples: Sequence[Example]) -> None:
        chosen = self.chosen
        for rank in chosen.train_ranks:
            found = {start: {name: [] for name in self.data} for start in STARTS}
            for seed in range(chosen.train_seeds):
                drawn = random.Random(seed).sample(list(examples), chosen.steps * chosen.batch)
                for start in STARTS:
                    began = time.perf_counter()
                    model = adapted(self.model, rank, seed, str(self.folder) if start == "original" else None)
                    train(model, drawn, chosen.steps, chosen.batch, chosen.rate)
                    took = time.perf_counter() - began
                    for name, loss in self.losses(model).items():
                        found[start][name].append(loss)
                    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                    model.unload()
                    print(f"  draw {seed}, {start}: {took:.0f} s", flush=True)
            note = f"{chosen.steps} steps, rate {chosen.rate:g}, trained on {chosen.train.name}"
            metric = f"heldout_loss_after_{chosen.steps}"
            for start in STARTS:
                against = None if start == "dequantized" else found["dequantized"]
                self.write(start, metric, rank, found[start], against, trainable=trainable, note=note)

    def errors(self) -> None:
        layers, normal = relative_errors(self.folder, QUANTIZATIONS[self.quantization])
        note = f"median of {len(layers)} linear layers: |W4 - W| / |W|"
        self.write("this model", "weight_error", 0, {"": [statistics.median(layers)]}, unit="1", note=note)
        self.write("normal", "weight_error", 0, {"": [normal]}, unit="1", note="a normally distributed weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the 16-bit checkpoint")
    parser.add_argument("--name", help="of the model, in the rows; default: the folder's")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE", help="held-out examples")
    parser.add_argument("--train", type=Path, help="examples to train on; without it, only the start is measured")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/original-weights.csv"))
    parser.add_argument("--quantizations", nargs="+", choices=QUANTIZATIONS, default=["nf4"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64, 128, 0], help="0: every column")
    parser.add_argument("--seeds", type=int, default=3, help="draws of random columns")
    parser.add_argument("--examples", type=int, default=48, help="per held-out data set")
    parser.add_argument("--longest", type=int, default=256, help="tokens; longer examples are left out")
    parser.add_argument("--eval-batch", type=int, default=8)
    parser.add_argument("--train-ranks", nargs="+", type=int, default=[64])
    parser.add_argument("--train-seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    chosen = parser.parse_args()
    chosen.name = chosen.name or chosen.model.name
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    data = {}
    for name, _, path in (entry.partition("=") for entry in chosen.data):
        data[name] = read_examples(Path(path), tokenizer, chosen.examples, chosen.longest)
        print(f"{name}: {len(data[name])} examples, {sum(len(e.tokens) for e in data[name])} tokens")
    for quantization in chosen.quantizations:
        measurement = Measurement(chosen, quantization, data)
        measurement.errors()
        measurement.at_the_start()
        if chosen.train is not None:
            measurement.after_training(read_examples(chosen.train, tokenizer, 10**9, chosen.longest))


if __name__ == "__main__":
    main()
