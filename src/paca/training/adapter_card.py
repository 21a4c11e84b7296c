"""The README.md beside trained weights: what they are, what they were trained on and how, and how to load them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.convert.pefts_paca import PEFT, saved_layers, why_not
from paca.pretrained.adapter_folder import adapter_settings, find_base
from paca.pretrained.purpose import Classifier, classifier_in
from paca.training.scores import score_lines

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

_INSTALL = (
    "It needs the Python package `paca-tuning`, which is not on PyPI yet; the `paca` there is another package. Install "
    "it\nfrom the folder of its source: `pip install ./paca`. PEFT up to 0.21 knows PaCA through `import paca` alone, "
    "and\nwithout it raises `KeyError: 'PACA'`.\n\n"
)
_LACKS = (
    "That PaCA adapts linear layers alone, gives all layers one rank and one scale, chooses columns at random, and has "
    "no\nbatches of several adapters. (Read in its source: no release with it was on PyPI when this was written.)"
)
_IMPORT = "import paca  # makes PaCA known to PEFT\n"
_EXPORT = "`paca export --to peft` writes one that does, or names the layer for which there is none."
_LOAD = """```python
{first}
from transformers import AutoTokenizer

model = {model_class}.from_pretrained("path/to/this/folder"){comment}
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


_PIPELINES = {
    "reward": "text-classification",
    "classification": "text-classification",
    "image_classification": "image-classification",
}
_HERE = "path/to/this/folder"


def write_card(folder: Path, summary: dict[str, Any], trained: nn.Module) -> None:
    """Write the card of a finished run's adapter or model, in place of the empty one that PEFT or TRL leaves.

    Args:
        folder: Where the adapter or the model lies.
        summary: The content of `summary.json`.
        trained: The trained model, with the adapter.
    """
    model, data, train = summary["model"], summary["data"], summary["config"]["train"]
    name = summary["method"]["name"]
    base = model["name"] if name == "full" else find_base(folder)
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    library, tags = ("transformers", []) if name == "full" else ("peft", [name, "peft"])
    head: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": _PIPELINES.get(summary["trainer"], "text-generation"),
        "tags": tags,
    }
    if not os.path.isabs(base):  # of a hub id the hub makes a link; it refuses a path
        head["base_model"] = base
    settings = [f"| `{name}` | {train[name]} |" for name in _SHOWN_SETTINGS if train.get(name) is not None]
    seen = f"{summary['tokens']:,} {summary['counts']}"
    results = [f"{summary['steps']:,} steps over {seen} ({summary['epochs']:.3g} epochs)."]
    if after is not None:
        held_out = f"{data['eval_examples']:,} held-out examples"
        start = "" if before is None else f"{before:.4f} before training and "
        results.append(f"Loss on {held_out}: {start}{after:.4f} after.")
    results += [f"Held-out {metric}: {values}." for metric, values in score_lines(summary["scores"])]
    classifier = classifier_in(folder)
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    named = f"`{model['name']}` ({model['architecture']}, {model['parameters']:,} parameters, {model['dtype']})"
    text = f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {summary["name"]}

{_what_it_is(name, named)}

## Method

{_method(summary)}

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

{_how_to_load(name, folder, base, trained) if classifier is None else _how_to_load_classifier(classifier, name, base)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _what_it_is(name: str, model: str) -> str:
    if name == "full":
        return f"{model}, trained in full: every parameter, without an adapter."
    if name != "paca":
        return f"An adapter for {model}, by the method {name.upper()} of [PEFT](https://huggingface.co/docs/peft)."
    paper = "[arXiv 2503.01905](https://arxiv.org/abs/2503.01905)"
    return (
        f"A PaCA adapter (Partial Connection Adaptation, {paper}) for\n{model}: of each adapted\n"
        "weight matrix a few input columns were trained, and nothing else."
    )


def _method(summary: dict[str, Any]) -> str:
    settings = summary["method"]["settings"]
    counted = (
        f"- {summary['trainable_parameters']:,} trained parameters ({summary['trainable_percent']:.3f} % of the model)"
    )
    if summary["targets"]:
        counted += f" in\n  {summary['adapted_layers']} layers: {', '.join(summary['targets'])}"
    if summary["method"]["name"] == "paca":
        columns = (
            f"r = {settings['r']}, paca_alpha = {settings['paca_alpha']}; columns chosen by `{settings['selection']}`"
        )
        return f"{counted}\n- {columns}"
    given = ", ".join(f"{key} = {value}" for key, value in settings.items() if value not in (None, False, {}, []))
    return f"{counted}\n- {given}" if given else counted


def _how_to_load_classifier(classifier: Classifier, name: str, base: str) -> str:
    auto = classifier.auto_class
    labels = f"Its labels: {', '.join(classifier.labels)}.\n\n"
    if name == "full":
        return f'{labels}```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{_HERE}")\n```'
    of_paca = name == "paca"
    return f"""{_INSTALL if of_paca else ""}{labels}```python
{_IMPORT if of_paca else ""}from peft import PeftModel
from transformers import AutoConfig, {auto}

config = AutoConfig.from_pretrained("{_HERE}")  # with the labels
model = {auto}.from_pretrained("{base}", config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, "{_HERE}")
```

`paca merge` writes it as a plain checkpoint."""


def _how_to_load(name: str, folder: Path, base: str, trained: nn.Module) -> str:
    if name == "full":
        return _LOAD.format(
            first="from transformers import AutoModelForCausalLM", model_class="AutoModelForCausalLM", comment=""
        )
    first = "from peft import AutoPeftModelForCausalLM"
    if name == "paca":
        first = _IMPORT + first
    code = _LOAD.format(first=first, model_class="AutoPeftModelForCausalLM", comment=f"  # with its base, {base}")
    if name != "paca":
        return f"{code}\n\n`paca merge` writes it as a plain checkpoint."
    stored = adapter_settings(folder)  # as saved: a rotated adapter has more columns than its config asked for
    reason = why_not(stored["r"], stored["paca_alpha"], saved_layers(trained))
    loads = "yes." if reason is None else f"no, because {reason}. {_EXPORT}"
    return (
        f"{_INSTALL}{code}\n\nLoads in the PaCA of {PEFT}, without paca: {loads}\n{_LACKS}\n\n"
        "`paca export` writes it as LoRA for programs that don't know PaCA, and `paca merge` as a plain checkpoint."
    )


class NoCardsOfCheckpoints(TrainerCallback):
    """Removes the cards that TRL and PEFT write with each checkpoint: templates with nothing filled in."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After each checkpoint."""
        if not state.is_world_process_zero:
            return
        checkpoints = Path(str(args.output_dir))
        for folder in (checkpoints, checkpoints / f"checkpoint-{state.global_step}"):
            (folder / "README.md").unlink(missing_ok=True)
