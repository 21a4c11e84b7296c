"""The README.md beside trained weights: what they are, what they were trained on and how, and how to load them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import nn

from paca.convert.pefts_paca import PEFT, saved_layers, why_not
from paca.messages.adapter_notes import EXPORT, IMPORT, INSTALL, LACKS
from paca.pretrained.adapter_folder import adapter_settings, find_base, find_revision
from paca.pretrained.generation_settings import learns_a_cache
from paca.pretrained.purpose import Classifier, classifier_in, loading_code
from paca.pretrained.quantizing import quantization_config
from paca.training.config.adapter_settings import config_type
from paca.training.reporting.scores import score_lines

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

_HERE = "path/to/this/folder"
_WHOLE = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{_HERE}")
tokenizer = AutoTokenizer.from_pretrained("{_HERE}")
```"""
_COMMANDS = {
    "chat": f"paca chat {_HERE}",
    "lora": f"paca export {_HERE} --to lora --output as-lora  # an adapter for programs that don't know PaCA",
    "merge": f"paca merge {_HERE} --output merged  # a plain checkpoint",
}


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
    classifier = classifier_in(folder)
    library, tags = ("transformers", []) if name == "full" else ("peft", [name, "peft"])
    head: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation" if classifier is None else classifier.pipeline_tag,
        "tags": tags,
    }
    if not os.path.isabs(base):  # of a hub id the hub makes a link; it refuses a path
        head["base_model"] = base
    ignored = "max_steps" if (train.get("max_steps") or -1) < 1 else "num_train_epochs"  # the other one ends a run
    shown = [key for key in _SHOWN_SETTINGS if train.get(key) is not None and key != ignored]
    settings = [f"| `{key}` | {train[key]} |" for key in shown]
    seen = f"{summary['tokens']:,} {summary['counts']}"
    epochs = f"{summary['epochs']:.3g}"
    first = summary["config"]["model"].get("adapter")
    begun = "" if first is None else f"Trained on from the adapter in `{first}`. "
    results = [f"{begun}{summary['steps']:,} steps over {seen} ({epochs} {'epoch' if epochs == '1' else 'epochs'})."]
    if after is not None:
        held_out = f"{data['eval_examples']:,} held-out examples"
        start = "" if before is None else f"{before:.4f} before training and "
        results.append(f"Loss on {held_out}: {start}{after:.4f} after.")
    results += [f"Held-out {metric}: {values}." for metric, values in score_lines(summary["scores"])]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    stored = (
        model["dtype"] if model["quantization"] is None else f"{model['dtype']}, quantized to {model['quantization']}"
    )
    named = f"`{model['name']}` ({model['architecture']}, {model['parameters']:,} parameters, {stored})"
    if classifier is not None:
        load = _how_to_load_classifier(classifier, name, base, None if name == "full" else find_revision(folder, base))
    else:
        load = _WHOLE if name == "full" else _how_to_load(name, folder, base, model, trained)
    text = f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {summary["name"]}

{_what_it_is(summary["method"], named)}

## Method

{_method(summary)}

## Data

- trained on {data["train_examples"]:,} examples of {_sources(data["train"])}
- form of the records: {data["description"]}
{_system(data["system"])}
## Training

{" ".join(results)}

| setting | value |
|---|---|
{chr(10).join(settings)}

Every setting is in the `config.yaml` of the run, which is not part of this folder. Made with {versions}.

## How to load it

{load}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _sources(train: str | list[str]) -> str:
    return " and ".join(f"`{name}`" for name in ([train] if isinstance(train, str) else train))


def _system(text: str | None) -> str:
    if text is None:
        return ""
    return (
        f"- all begin with this system message, which a question to the model needs too:\n\n{indent(text, ' ' * 6)}\n"
    )


def _what_it_is(method: Mapping[str, Any], model: str) -> str:
    name, whole = method["name"], method["settings"].get("modules_to_save")
    if name == "full":
        return f"{model}, trained in full: every parameter, without an adapter."
    if name != "paca":
        return f"An adapter for {model}, by the method {name.upper()} of [PEFT](https://huggingface.co/docs/peft)."
    paper = "[arXiv 2503.01905](https://arxiv.org/abs/2503.01905)"
    return (
        f"A PaCA adapter (Partial Connection Adaptation, {paper}) for\n{model}: of each adapted\n"
        f"weight matrix a few input columns were trained, and {f'{_listed(whole)} whole' if whole else 'nothing else'}."
    )


def _listed(names: Sequence[str]) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


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
    if summary["method"]["name"] == "full":
        return counted
    known = config_type("peft" if "peft_type" in settings else "lora", settings)
    usual = {field.name: field.default for field in dataclasses.fields(known)}
    given = ", ".join(
        f"{key} = {value}"
        for key, value in settings.items()
        if value not in (None, False, {}, []) and (value != usual.get(key) or key == "r" or key.endswith("_alpha"))
    )
    return f"{counted}\n- {given}" if given else counted


def _how_to_load_classifier(classifier: Classifier, name: str, base: str, revision: str | None) -> str:
    auto = classifier.auto_class
    labels = f"Its labels: {', '.join(classifier.labels)}.\n\n"
    if name == "full":
        return f'{labels}```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{_HERE}")\n```'
    of_paca = name == "paca"
    return f"""{INSTALL if of_paca else ""}{labels}```python
{IMPORT if of_paca else ""}{loading_code(classifier, _HERE, base, revision)}
```

`paca merge {_HERE} --output merged` writes it as a plain checkpoint."""


def _how_to_load(name: str, folder: Path, base: str, model: dict[str, Any], trained: nn.Module) -> str:
    of_paca, quantization, dtype = name == "paca", model["quantization"], model["dtype"]
    imported, before, options = "AutoTokenizer", "", ""
    if quantization is not None:
        imported, options = "AutoTokenizer, BitsAndBytesConfig", ", quantization_config=as_trained"
        given = quantization_config(quantization, getattr(torch, dtype)).to_diff_dict().items()
        kept = [f"{key}={value!r}" for key, value in given if not key.startswith("_") and key != "quant_method"]
        before = f"as_trained = BitsAndBytesConfig({', '.join(kept)})\n"
    code = f"""{INSTALL if of_paca else ""}```python
{IMPORT if of_paca else ""}from peft import AutoPeftModelForCausalLM
from transformers import {imported}

{before}model = AutoPeftModelForCausalLM.from_pretrained("{_HERE}"{options})  # with its base, {base}
tokenizer = AutoTokenizer.from_pretrained("{_HERE}")
```"""
    if of_paca:
        stored = adapter_settings(folder)  # as saved: a rotated adapter has more columns than its config asked for
        reason = why_not(stored, saved_layers(trained))
        loads = "yes." if reason is None else f"no, because {reason}. {EXPORT}"
        code += f"\n\nLoads in the PaCA of {PEFT}, without paca: {loads}\n{LACKS}"
    if learns_a_cache(trained):
        code += (
            "\n\nOn transformers 5.24, `generate` of PEFT 0.21 answers as the base does, without an error. `paca chat` "
            "answers with it, in Python `paca.pretrained.generation.load_for_generation`."
        )
    left_out = {"lora"} if not of_paca else set()
    if not hasattr(trained, "merge_and_unload"):
        left_out.add("merge")
    lines = [line for key, line in _COMMANDS.items() if key not in left_out]
    return f"""{code}

On the command line, with paca:

```sh
{chr(10).join(lines)}
```

The base model is looked for by the name in `adapter_config.json`. If it lies elsewhere, add `--base-model
NAME_OR_FOLDER` to each; in Python, load it and give it to `PeftModel.from_pretrained`."""


def write_no_empty_cards(trainer: Any) -> None:
    """Keep TRL and PEFT from writing cards with each checkpoint: templates with nothing filled in."""
    trainer.create_model_card = _no_card
    model: Any = trainer.model
    if isinstance(trainer.model, PeftModel):
        model.create_or_update_model_card = _no_card


def _no_card(*_: Any, **__: Any) -> None:
    pass
