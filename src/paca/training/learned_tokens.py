"""PEFT's methods that learn tokens, or keys and values in their place: what they need of a run and its model."""

from __future__ import annotations

from typing import Any

from peft import CPTConfig, PeftConfig
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from paca.messages.errors import PacaError
from paca.pretrained.context_length import context_length
from paca.pretrained.generation_settings import LEARNED_CACHES
from paca.training.context_tuning import check_context

_NEEDED = {
    "num_virtual_tokens": "how many tokens are learned. Give it, such as 20.",
    "adapter_len": "how many tokens each layer learns. Give it, such as 10.",
    "adapter_layers": "how many layers learn tokens, counted from the last. Give it, such as 8.",
}
"""Fields that PEFT has no default for, and asks for too late or not at all."""


def check_learned_tokens(adapter: PeftConfig, model: PreTrainedModel) -> None:
    """Refuse what PEFT could not train.

    Args:
        adapter: Of any method.
        model: It is to be put on, without weights.

    Raises:
        PacaError: A field is missing, or keys and values are to be learned for a model that keeps something else.
    """
    for name, what in _NEEDED.items():
        asked = name.startswith("adapter_") or getattr(adapter, "is_prompt_learning", False)
        if asked and hasattr(adapter, name) and getattr(adapter, name) is None:
            raise PacaError(f"peft.{name} is missing: {what}")
    learned, positions = getattr(adapter, "num_virtual_tokens", None), context_length(model)
    if learned is not None and positions is not None and learned >= positions:
        key = "cpt_token_ids" if isinstance(adapter, CPTConfig) else "num_virtual_tokens"
        raise PacaError(
            f"peft.{key} asks for {learned:,} tokens before each text, and {type(model).__name__} was made for "
            f"{positions:,} positions: none would be left for the text. Give fewer."
        )
    if isinstance(adapter, CPTConfig):
        check_context(adapter, model)
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    if kind not in LEARNED_CACHES:
        return
    text: Any = model.config.get_text_config()
    states = any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=text).layers)
    if states or getattr(text, "kv_lora_rank", None) is not None:
        kept = "a state" if states else "what it computes keys and values from"
        raise PacaError(
            f"peft.peft_type: {kind} learns keys and values of each layer, and "
            f"{type(model).__name__} keeps {kept} in their place. Choose another method, such as prompt tuning "
            "(PROMPT_TUNING)."
        )
