"""A PaCA adapter as a LoRA adapter in a GGUF file, as llama.cpp takes it with `--lora`.

The conventions are those of llama.cpp's convert_lora_to_gguf.py and convert_hf_to_gguf.py (read at the version that
llama-cpp-python 0.3.36 brings, and compared with their output tensor by tensor: docs/notes/conversion.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from paca.convert.adapter import Adapter
from paca.convert.lora import lora_factors
from paca.messages.errors import PacaError
from paca.pretrained.gguf import require_gguf
from paca.tuner.rotation.union_config import default_and_pattern


class _Architecture(NamedTuple):
    """How llama.cpp stores the models of one `model_type` of transformers."""

    name: str
    """In GGUF files, `general.architecture`."""
    reorders_heads: bool = False
    """Whether the rows of q_proj and k_proj are stored in another order than transformers': for rotary embeddings of
    neighbouring pairs of dimensions, in place of the two halves of a head."""


ARCHITECTURES = {
    "llama": _Architecture("llama", reorders_heads=True),  # SmolLM and SmolLM2 too
    "mistral": _Architecture("llama", reorders_heads=True),
    "smollm3": _Architecture("smollm3", reorders_heads=True),
    "gemma3_text": _Architecture("gemma3"),
    **{name: _Architecture(name) for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2")},
}


def gguf_tensors(adapter: Adapter) -> tuple[float, dict[str, Tensor]]:
    """`adapter.lora.alpha` and the tensors of the file, by their names there.

    llama.cpp scales each layer by alpha / (that layer's rank). Alpha is the commonest rank; where a layer has another
    one, its B makes up for it, so that every layer is scaled by 1.

    Raises:
        PacaError: An architecture whose names in llama.cpp are not known here, a layer that it does not have, or
            modules that were saved whole.
    """
    gguf = require_gguf("Writing")
    known = architecture_of(adapter)
    if adapter.saved_whole:
        raise PacaError(
            f"The adapter also holds {', '.join(sorted(adapter.saved_whole))} whole, which a LoRA adapter in "
            "GGUF can't carry. Export the merged model instead (--to merged), and convert that with llama.cpp."
        )
    if adapter.untied:
        raise PacaError(
            "The adapter has columns in one of two embeddings that are one weight in the base model, and in its GGUF "
            "file. Export the merged model instead (--to merged), and convert that with llama.cpp."
        )
    text_config: Any = adapter.base_config.get_text_config()  # type: ignore[union-attr]
    places = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(places[known.name], text_config.num_hidden_layers)
    alpha, _ = default_and_pattern({name: layer.r for name, layer in adapter.layers.items()})
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        target = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if target is None:
            raise PacaError(f"{name} has no counterpart among the tensors of llama.cpp's {known.name!r} models.")
        a, b = lora_factors(name, layer)
        if known.reorders_heads and name.endswith((".q_proj", ".k_proj")):
            heads = text_config.num_attention_heads if name.endswith(".q_proj") else text_config.num_key_value_heads
            b = pairs_of_neighbours(b, heads)
        b = b if layer.r == alpha else b * (layer.r / alpha)
        tensors[f"{target}.lora_a"], tensors[f"{target}.lora_b"] = a, b
    return float(alpha), tensors


def pairs_of_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorder the output rows of a q_proj or k_proj, `(heads * head_dim, ...)`, from transformers' order to ggml's.

    transformers rotates dimension i of a head together with i + head_dim / 2, ggml's "normal" mode 2i with 2i + 1.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def architecture_of(adapter: Adapter) -> _Architecture:
    """How llama.cpp stores the base model; raises PacaError where that is not known here."""
    model_type = None if adapter.base_config is None else adapter.base_config.model_type
    if model_type not in ARCHITECTURES:
        raise PacaError(
            f"Models of type {model_type!r} can't be exported to GGUF: their names in llama.cpp are not known here. "
            f"Known are {', '.join(ARCHITECTURES)}. Export --to merged, and convert that with llama.cpp."
        )
    return ARCHITECTURES[model_type]


def write_gguf(adapter: Adapter, file: Path) -> None:
    """Write the adapter as LoRA for llama.cpp to `file` (errors as of `gguf_tensors`)."""
    gguf = require_gguf("Writing")
    alpha, tensors = gguf_tensors(adapter)
    writer = gguf.GGUFWriter(file, architecture_of(adapter).name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    # float32 for A too, though 16 bits would hold it: llama.cpp would round the layer's inputs to match.
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
