"""The transformer blocks that can be made lean, by exact class, and where in each the parts are."""

from __future__ import annotations

from dataclasses import dataclass

from paca.lean.rms_norm import RMSNormStyle


@dataclass(frozen=True)
class GatedParts:
    """RMSNorm and a gated MLP with one or two input projections."""

    norm: str
    """Qualified class name of the RMSNorm, wherever it occurs in the model (q_norm, k_norm and the final norm too)."""
    style: RMSNormStyle
    mlp: str
    """Qualified class name of the MLP."""
    attention: str
    """Qualified class name of the attention."""
    mlp_norm: str
    """Name in the block of the norm whose output is the MLP's input."""
    activation: str
    """Name in the MLP of the activation module."""
    fused: bool = False
    """Whether one projection gives gate and up."""


@dataclass(frozen=True)
class PlainParts:
    """LayerNorm and `second(activation(first(x)))`."""

    attention: str
    activation: str
    """Name of the activation module, in the MLP or, without one, in the block."""
    mlp: str | None = None
    """Qualified class name of the MLP; None if its layers are the block's own, so that no forward covers them alone."""
    mlp_norm: str | None = None
    first: str = ""
    second: str = ""
    dropout: str | None = None


def _gated(
    model: str, prefix: str, style: RMSNormStyle, mlp_norm: str, activation: str = "act_fn", fused: bool = False
) -> GatedParts:
    file = f"transformers.models.{model}.modeling_{model}"
    return GatedParts(
        norm=f"{file}.{prefix}RMSNorm",
        style=style,
        mlp=f"{file}.{prefix}MLP",
        attention=f"{file}.{prefix}Attention",
        mlp_norm=mlp_norm,
        activation=activation,
        fused=fused,
    )


_LLAMA_NORM, _GEMMA_NORM = "post_attention_layernorm", "pre_feedforward_layernorm"

# Names, not classes: looking one up must not import the modelling code of every architecture.
BLOCKS: dict[str, GatedParts | PlainParts] = {
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": _gated("llama", "Llama", "llama", _LLAMA_NORM),
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": _gated(
        "mistral", "Mistral", "llama", _LLAMA_NORM
    ),
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": _gated("qwen2", "Qwen2", "llama", _LLAMA_NORM),
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer": _gated("qwen3", "Qwen3", "llama", _LLAMA_NORM),
    "transformers.models.smollm3.modeling_smollm3.SmolLM3DecoderLayer": _gated(
        "smollm3", "SmolLM3", "llama", _LLAMA_NORM
    ),
    "transformers.models.gemma2.modeling_gemma2.Gemma2DecoderLayer": _gated("gemma2", "Gemma2", "gemma", _GEMMA_NORM),
    "transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer": _gated("gemma3", "Gemma3", "gemma", _GEMMA_NORM),
    "transformers.models.phi3.modeling_phi3.Phi3DecoderLayer": _gated(
        "phi3", "Phi3", "llama", _LLAMA_NORM, activation="activation_fn", fused=True
    ),
    "transformers.models.opt.modeling_opt.OPTDecoderLayer": PlainParts(
        attention="transformers.models.opt.modeling_opt.OPTAttention", activation="activation_fn"
    ),
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": PlainParts(
        attention="transformers.models.gpt2.modeling_gpt2.GPT2Attention",
        activation="act",
        mlp="transformers.models.gpt2.modeling_gpt2.GPT2MLP",
        mlp_norm="ln_2",
        first="c_fc",
        second="c_proj",
        dropout="dropout",
    ),
    # The vision tower of Gemma 3.
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": PlainParts(
        attention="transformers.models.siglip.modeling_siglip.SiglipAttention",
        activation="activation_fn",
        mlp="transformers.models.siglip.modeling_siglip.SiglipMLP",
        mlp_norm="layer_norm2",
        first="fc1",
        second="fc2",
    ),
}


def qualified_name(kind: type) -> str:
    """`module.Class`, the form of the keys of `BLOCKS`."""
    return f"{kind.__module__}.{kind.__qualname__}"
