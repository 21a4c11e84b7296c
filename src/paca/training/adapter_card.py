"""adapter/README.md: what the adapter is, what it was trained on and how, and how to load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.convert.pefts_paca import PEFT, saved_layers, why_not
from paca.tuner.adapter_folder import adapter_settings, find_base

_SHOWN_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "optim",
    "weight_decay",
    "seed",
)

_EXPORT = "`paca export --to peft` writes one that does, or names the layer for which there is none."


def write_adapter_card(folder: Path, summary: dict[str, Any], trained: nn.Module) -> None:
    """Write the card of a finished run's adapter, in place of the empty one that PEFT leaves.

    Args:
        folder: The adapter's folder.
        summary: The content of `summary.json`.
        trained: The trained model, with the adapter.
    """
    base = find_base(folder)
    config = summary["config"]
    model, data, adapter, train = summary["model"], summary["data"], config["paca"], config["train"]
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["paca", "peft"]}
    if not os.path.isabs(base):  # of a hub id the hub makes a link; it refuses a path
        head["base_model"] = base
    settings = [f"| `{name}` | {train[name]} |" for name in _SHOWN_SETTINGS if train.get(name) is not None]
    results = [f"{summary['steps']:,} steps over {summary['tokens']:,} tokens ({summary['epochs']:.3g} epochs)."]
    if after is not None:
        held_out = f"{data['eval_examples']:,} held-out examples"
        start = "" if before is None else f"{before:.4f} before training and "
        results.append(f"Loss on {held_out}: {start}{after:.4f} after.")
    stored = adapter_settings(folder)  # as saved: a rotated adapter has more columns than its config asked for
    reason = why_not(stored["r"], stored["paca_alpha"], saved_layers(trained))
    loads = "yes." if reason is None else f"no, because {reason}. {_EXPORT}"
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    text = f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {summary["name"]}

A PaCA adapter (Partial Connection Adaptation, [arXiv 2503.01905](https://arxiv.org/abs/2503.01905)) for
`{model["name"]}` ({model["architecture"]}, {model["parameters"]:,} parameters, {model["dtype"]}): of each adapted
weight matrix a few input columns were trained, and nothing else.

## Method

- {summary["trainable_parameters"]:,} trained parameters ({summary["trainable_percent"]:.3f} % of the model) in
  {summary["adapted_layers"]} layers: {", ".join(summary["targets"])}
- r = {adapter["r"]}, paca_alpha = {adapter["paca_alpha"]}; columns chosen by `{adapter["selection"]}`

## Data

- trained on {data["train_examples"]:,} examples of `{data["train"]}`
- form of the records: {data["description"]}

## Training

{" ".join(results)}

| setting | value |
|---|---|
{chr(10).join(settings)}

Every setting is in the run's `config.yaml`. Made with {versions}.

## How to load it

```python
import paca  # makes PaCA known to PEFT; pip install paca-tuning
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")  # with its base, {base}
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Loads in the PaCA of {PEFT}, without paca: {loads}

`paca export` writes it as LoRA for programs that don't know PaCA, and `paca merge` as a plain checkpoint.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


class NoCardsOfCheckpoints(TrainerCallback):
    """Removes the cards that TRL and PEFT write with each checkpoint: templates with nothing filled in."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After each checkpoint."""
        if not state.is_world_process_zero:
            return
        checkpoints = Path(str(args.output_dir))
        for folder in (checkpoints, checkpoints / f"checkpoint-{state.global_step}"):
            (folder / "README.md").unlink(missing_ok=True)
