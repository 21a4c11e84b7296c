"""The operation that writes an adapter for llama.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models import adapt
from paca.convert.adapter import adapter_in_model
from paca.convert.exported import export_adapter
from paca.convert.gguf_adapter import gguf_tensors
from paca.messages.errors import PacaError
from support_matrix.case import Case, Explained, randomize

PLACES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""What llama.cpp calls the layers."""


def export(case: Case) -> None:
    """For each layer of a Llama or GPT-2 model, LoRA factors whose product is the change of the weight, with its rows
    where llama.cpp has them."""
    gguf = __import__("gguf")
    model = case.model
    if case.subject.language_model is not None:
        targets = {"target_modules": list(PLACES), "task_type": "CAUSAL_LM"}
        model = adapt(case.subject.language_model(case.folder / "language"), r=2, paca_alpha=3, **targets).eval()
        randomize(model, "default", 3)
    elif getattr(model.get_base_model(), "config", None) is None:
        try:
            gguf_tensors(adapter_in_model(model))
        except PacaError as error:
            raise Explained("llama.cpp has no models with such layers") from error
        raise AssertionError("that should have been refused")
    base = case.folder / "config"
    model.get_base_model().config.save_pretrained(base)
    model.save_pretrained(case.folder / "adapter")
    export_adapter(case.folder / "adapter", case.folder / "adapter.gguf", "gguf", base_model=str(base))
    reader = gguf.GGUFReader(case.folder / "adapter.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    (alpha,) = reader.get_field("adapter.lora.alpha").parts[-1]
    layers = case.layers(model)
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        a, b = (tensors.pop(f"{_place(name)}.weight.lora_{which}").double() for which in "ab")
        delta, columns = layer.paca_delta["default"].detach().double(), layer.paca_indices["default"]
        change = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        change[:, columns] = delta * layer.scaling["default"]
        if name.endswith(("q_proj", "k_proj")):
            change = _neighbours(change, model.get_base_model().config, name)
        torch.testing.assert_close(b @ a * (float(alpha) / a.shape[0]), change, rtol=1e-6, atol=1e-6)


def _place(name: str) -> str:
    if name == "lm_head":
        return "output"
    block = next(part for part in name.split(".") if part.isdigit())
    (place,) = {there for ours, there in PLACES.items() if name.endswith(f".{ours}")}
    return f"blk.{block}.{place}"


def _neighbours(rows: Tensor, config: Any, name: str) -> Tensor:
    """Row i of a head and row i + half of it, which rotate together, side by side."""
    heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
    size = rows.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]
