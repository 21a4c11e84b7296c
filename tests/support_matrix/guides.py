"""Where the documentation says how each operation and each row is done. Paths are those below `docs/`."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"

_ADAPTERS, _CHOOSING = "guides/adapters.md", "guides/choosing.md"
_LAYERS, _QUANTIZED = "guides/layers.md", "guides/quantized.md"
_BY_DATA = f"{_CHOOSING}#columns-chosen-by-data"
_LOOP = "guides/trainers.md#a-loop-of-your-own"
_MIXED = f"{_ADAPTERS}#mixed-batches-an-adapter-per-sample"
_OFF = f"{_ADAPTERS}#off-merged-unloaded-copied"

OPERATIONS_IN_GUIDES = {
    "select by weight": f"{_CHOOSING}#columns",
    "select by activations": _BY_DATA,
    "select by gradients": _BY_DATA,
    "train": "guides/quick-start.md#2-train-on-your-own-data",
    "rotation": "guides/rotation.md",
    "checkpointing": _LOOP,
    "autocast": _LOOP,
    "`torch.compile`": "method.md#torchcompile",
    "FSDP2": "guides/processes.md#fsdp2-a-model-larger-than-one-device",
    "save, load": _LOOP,
    "disable": _OFF,
    "several adapters": _ADAPTERS,
    "mixed batch": _MIXED,
    "train on a mixed batch": _MIXED,
    "hot swap": f"{_ADAPTERS}#hot-swap-other-values-in-the-same-tensors",
    "weighted sum": f"{_ADAPTERS}#sums-several-adapters-as-one",
    "merge, unmerge": _OFF,
    "merge and unload": _OFF,
    "unload": _OFF,
    "merged checkpoint": f"{_QUANTIZED}#merging-and-export",
    "to LoRA": "guides/serving.md#lora",
    "to GGUF": "guides/serving.md#llamacpp",
    "state dict": _OFF,
    "copies": _OFF,
}
"""By the title of the column."""

_CONVOLUTIONS, _EMBEDDINGS = f"{_LAYERS}#convolutions", f"{_LAYERS}#embeddings"
_TIED, _EXPERTS = f"{_LAYERS}#output-layers-and-tied-weights", f"{_LAYERS}#mixture-of-experts"
_OFFLOADED, _OTHERS = f"{_QUANTIZED}#offloaded-weights", f"{_QUANTIZED}#torchao-hqq-and-gptq"

_PLACES = {
    _LAYERS: {"linear": "`nn.Linear`", "conv1d-gpt2": "`Conv1D`"},
    f"{_CHOOSING}#columns": {"linear-blocks": "blocks"},
    _CONVOLUTIONS: {
        **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "convolutions"),
        "conv2d-groups": "`groups`",
        "depthwise": "depthwise",
        "transposed": "transposed",
    },
    _EMBEDDINGS: {"embedding": "embeddings", "max-norm": "`max_norm`", "sparse": "`sparse=True`"},
    _TIED: {
        "lm-head": "`lm_head`",
        "untied": "paca.untie_embeddings",
        "tied-embedding": "input embedding",
        "tied-head": "share the output layer's weight",
    },
    _EXPERTS: {
        "experts-grouped-mm": "grouped_mm",
        "experts-batched-mm": "batched_mm",
        "experts-eager": "`eager`",
        "experts-transposed": "gpt-oss",
    },
    f"{_LAYERS}#what-is-refused": {
        "subclass": "subclasses",
        "bnb-embedding": "subclasses",
        "float8": "floats of 16 bits",
        **dict.fromkeys(("bilinear", "unknown"), "unknown class"),
    },
    f"{_QUANTIZED}#training": {"nf4": "nf4", "nf4-double": "double", "fp4": "fp4", "int8": "int8"},
    _OTHERS: {
        "torchao-int8": "Int8WeightOnlyConfig",
        "torchao-int8-group": "PerGroup",
        "hqq": "HQQ",
        "torchao-int4": "IntxWeightOnlyConfig",
        "gptq": "GPTQ",
        "awq": "AWQ",
        "eetq": "EETQ",
        "aqlm": "AQLM",
        "inference-only": "kernel",
        "no-sizes": "`in_features`",
    },
    _OFFLOADED: {
        "linear-cpu-offload": "`nn.Linear`",
        "linear-disk-offload": "disk",
        "conv1d-gpt2-cpu-offload": "`Conv1D`",
        "dispatched": "device_map",
        "nf4-cpu-offload": "bitsandbytes",
        "int8-cpu-offload": "bitsandbytes",
        **dict.fromkeys(("torchao-int8-cpu-offload", "torchao-int4-cpu-offload"), "torchao"),
        "hqq-cpu-offload": "HQQ",
        "conv2d-offload": "convolutions",
        "embedding-offload": "embeddings",
        "experts-offload": "experts",
    },
    _QUANTIZED: {"int8-fp16": "`has_fp16_weights=True`", "torchao-activations": "quantized activations"},
}
"""By the place, the rows that it is about, each with what the section there calls it."""

ROWS_IN_GUIDES = {key: place for place, rows in _PLACES.items() for key in rows}
"""By the key of the row, refused ones too."""


def unsaid() -> list[str]:
    """The rows whose section does not name them."""
    return [
        f"{key}: {place} does not say {word!r}"
        for place, rows in _PLACES.items()
        for key, word in rows.items()
        if word.lower() not in _section(place).lower()
    ]


def _section(place: str) -> str:
    """The text of a section without those below it, on one line; for a page, what stands before its first."""
    page, _, anchor = place.partition("#")
    sections = re.split(r"^(?=#+ )", (DOCS / page).read_text(encoding="utf-8"), flags=re.M)
    found = [text for text in sections if text.startswith("# " if not anchor else "##") and _is(text, anchor)]
    return " ".join(found[0].split())


def _is(section: str, anchor: str) -> bool:
    heading = section.partition("\n")[0].lower()
    return not anchor or re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-") == anchor
