"""Where the documentation says how each operation and each row is done. Paths are those below `docs/`."""

from __future__ import annotations

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
    "merged checkpoint": "guides/serving.md",
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
    _LAYERS: ("linear", "conv1d-gpt2"),
    f"{_CHOOSING}#columns": ("linear-blocks",),
    _CONVOLUTIONS: ("conv1d", "conv2d", "conv2d-groups", "conv3d", "depthwise", "transposed"),
    _EMBEDDINGS: ("embedding", "max-norm", "sparse"),
    _TIED: ("lm-head", "untied", "tied-embedding", "tied-head"),
    _EXPERTS: ("experts-grouped-mm", "experts-batched-mm", "experts-eager", "experts-transposed"),
    f"{_LAYERS}#what-is-refused": ("subclass", "bilinear", "unknown", "float8", "bnb-embedding"),
    f"{_QUANTIZED}#training": ("nf4", "nf4-double", "fp4", "int8"),
    _OTHERS: (
        *("torchao-int8", "torchao-int8-group", "torchao-int4", "hqq", "no-sizes"),
        *("gptq", "awq", "eetq", "aqlm", "inference-only"),
    ),
    _OFFLOADED: (
        *("linear-cpu-offload", "linear-disk-offload", "conv1d-gpt2-cpu-offload", "dispatched"),
        *("torchao-int8-cpu-offload", "torchao-int4-cpu-offload"),
        *("nf4-cpu-offload", "int8-cpu-offload", "hqq-cpu-offload"),
        *("conv2d-offload", "embedding-offload", "experts-offload"),
    ),
    _QUANTIZED: ("int8-fp16", "torchao-activations"),
}
ROWS_IN_GUIDES = {key: place for place, keys in _PLACES.items() for key in keys}
"""By the key of the row, refused ones too."""
