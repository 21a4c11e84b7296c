"""The README.md beside an exported adapter: what it is, how exact it is, and how PEFT loads it without paca."""

from __future__ import annotations

import os
import shlex
from typing import Any, Literal

import yaml

from paca.convert.adapter import Adapter
from paca.pretrained.purpose import loading_code, quoted

_HERE = "path/to/this/folder"
_PAPER = "[arXiv 2503.01905](https://arxiv.org/abs/2503.01905)"


def export_card(adapter: Adapter, to: Literal["lora", "peft"]) -> str:
    """The card of `adapter` as `to_lora` or `to_pefts_paca` writes it.

    One of a language model, and of a classifier whose labels are known, says with code how to load it.
    """
    config = adapter.config
    base, classifier = config.base_model_name_or_path, adapter.classifier
    generates = base is not None and classifier is None and config.task_type in (None, "CAUSAL_LM")
    head: dict[str, Any] = {
        "library_name": "peft",
        "tags": ["lora", "paca", "peft"] if to == "lora" else ["paca", "peft"],
    }
    if generates:
        head["pipeline_tag"] = "text-generation"
    elif classifier is not None:
        head["pipeline_tag"] = classifier.pipeline_tag
    if base is not None and not os.path.isabs(base):  # of a hub id the hub makes a link; it refuses a path
        head["base_model"] = base
    kinds = sorted({name.rpartition(".")[2] for name in adapter.layers})
    ranks = ", ".join(map(str, adapter.ranks)) if to == "lora" else f"{max(adapter.ranks)}"
    lines = [f"- {len(adapter.layers)} layers ({', '.join(kinds)}) of rank {ranks}, each at scale 1"]
    if adapter.saved_whole:
        lines.append("- besides them whole modules, which PEFT loads, and other programs may not")
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}
---

# {"LoRA" if to == "lora" else "PaCA"} adapter for {"its base model" if base is None else base}

{_WRITTEN[to]}

{chr(10).join(lines)}

## How exact it is

{_EXACT[to]}{_quantized(adapter.quantization)}

## How to load it

{_how_to_load(adapter, to) if generates or classifier is not None else _LOADS[to] + _WITHOUT_CODE}
"""


_WRITTEN = {
    "lora": f"A PaCA adapter (Partial Connection Adaptation, {_PAPER}), written as LoRA by `paca export --to lora`.",
    "peft": f"A PaCA adapter (Partial Connection Adaptation, {_PAPER}), written by `paca export --to peft` in\nthe "
    "form that the PaCA of PEFT >= 0.22 takes.",
}
_EXACT = {
    "lora": """\
PaCA trains a few input columns of a weight. LoRA says the same: `lora_A` picks these inputs (a single 1 in each row),
and `lora_B` is the change of their columns, rounded once to float32. With float32 weights the outputs agree to the last
digits. With 16-bit weights they differ by rounding: PaCA rounds the changed weight, LoRA adds a product that is rounded
on its own.""",
    "peft": """\
Each layer's scale is multiplied into its columns' changes, so that one of 1 is right for all; layers with fewer columns
than others have further ones that change nothing. So the outputs are the same: bit for bit where each scale was a power
of two, else to the rounding of that product to float32.""",
}
_LOADS = {
    "lora": "PEFT is enough; paca is not needed.",
    "peft": "PEFT >= 0.22 is enough (none was on PyPI when this was written). With an earlier one `import paca` comes\n"
    "first, of the package `paca-tuning`.",
}
_WITHOUT_CODE = (
    f' Load the base model as for training, and give it to PEFT:\n`PeftModel.from_pretrained(model, "{_HERE}")`.'
)


def _quantized(kind: str | None) -> str:
    if kind is None:
        return ""
    return (
        f"\n\nIt was trained on weights quantized as {kind}, and is exact on those alone. Load the base model quantized"
        "\nin the same way (`quantization_config`). On others, the 16-bit originals too, results differ a little."
    )


def _how_to_load(adapter: Adapter, to: Literal["lora", "peft"]) -> str:
    classifier, base = adapter.classifier, adapter.base
    labels, code = "", _code(base, adapter.config.revision)
    if classifier is not None:
        labels = f" Its labels: {' '.join(', '.join(classifier.labels).split())}."  # a line, whatever they hold
        code = loading_code(classifier, _HERE, base, adapter.config.revision)
    back = f"\n\n`paca import {_HERE} --base {shlex.quote(base)} --output FOLDER` makes it a PaCA adapter again."
    return f"""{_LOADS[to]}{labels}

```python
{code}
```{back if to == "lora" else ""}"""


def _code(base: str, revision: str | None) -> str:
    options = 'dtype="auto"' if revision is None else f'dtype="auto", revision={quoted(revision)}'
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({quoted(base)}, {options})
model = PeftModel.from_pretrained(model, "{_HERE}")"""
