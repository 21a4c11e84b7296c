"""The transformer blocks that can be made lean, by exact class, and where in each the parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from paca.lean.rms_norm import RMSNormStyle


@dataclass(frozen=True)
class Block:
    """One kind of block: qualified names of the classes of its parts, and names of the modules in them."""

    attention: str
    """Class of the attention."""
    activation: str
    """Name of the activation module, in the MLP or, without one, in the block."""
    mlp: str | None = None
    """Class of the MLP; None if its layers are the block's own, so that no forward covers them alone."""
    mlp_norm: str = ""
    """Name in the block of the norm whose output is the MLP's input."""
    hidden: Literal["gated", "fused", "plain"] = "plain"
    """What the last layer gets: `activation(gate) * up` of two projections, the same of one, or `activation(first)`."""
    first: tuple[str, ...] = ()
    """Names in the MLP of the layers before the activation."""
    last: str = ""
    """Name in the MLP of the layer after it."""
    dropout: str | None = None
    norm: str | None = None
    """Class of the RMSNorm, wherever it occurs in the model (q_norm, the final norm); None where there is none."""
    style: RMSNormStyle = "llama"


def _block(model: str, prefix: str, layer: str = "DecoderLayer", mlp: bool = True, **parts: Any) -> dict[str, Block]:
    file = f"transformers.models.{model}.modeling_{model}"
    parts["mlp"] = f"{file}.{prefix}MLP" if mlp else None
    return {f"{file}.{prefix}{layer}": Block(attention=f"{file}.{prefix}Attention", **parts)}


def _gated(model: str, prefix: str, style: RMSNormStyle = "llama", **parts: Any) -> dict[str, Block]:
    layout = {
        "norm": f"transformers.models.{model}.modeling_{model}.{prefix}RMSNorm",
        "style": style,
        "mlp_norm": "post_attention_layernorm" if style == "llama" else "pre_feedforward_layernorm",
        "hidden": "gated",
        "first": ("gate_proj", "up_proj"),
        "last": "down_proj",
        "activation": "act_fn",
    }
    return _block(model, prefix, **{**layout, **parts})


# Names, not classes: looking one up must not import the modelling code of every architecture.
BLOCKS: dict[str, Block] = {
    **_gated("llama", "Llama"),
    **_gated("mistral", "Mistral"),
    **_gated("qwen2", "Qwen2"),
    **_gated("qwen3", "Qwen3"),
    **_gated("smollm3", "SmolLM3"),
    **_gated("gemma2", "Gemma2", "gemma"),
    **_gated("gemma3", "Gemma3", "gemma"),
    **_gated("phi3", "Phi3", hidden="fused", first=("gate_up_proj",), activation="activation_fn"),
    **_block("opt", "OPT", mlp=False, activation="activation_fn"),
    **_block(
        "gpt2", "GPT2", "Block", mlp_norm="ln_2", first=("c_fc",), last="c_proj", activation="act", dropout="dropout"
    ),
    # The vision tower of Gemma 3.
    **_block(
        "siglip",
        "Siglip",
        "EncoderLayer",
        mlp_norm="layer_norm2",
        first=("fc1",),
        last="fc2",
        activation="activation_fn",
    ),
}


def qualified_name(kind: type) -> str:
    """`module.Class`, the form of the keys of `BLOCKS`."""
    return f"{kind.__module__}.{kind.__qualname__}"
