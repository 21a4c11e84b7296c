"""How long the texts are that a model was made for."""

from __future__ import annotations

from typing import Any


def context_length(config: Any) -> int | None:
    """Positions that a model was made for, by its configuration; None where nothing says so, as of recurrent models.

    Rotary positions that are scaled reach further than `max_position_embeddings` where that is still the length before
    scaling, as in Qwen2.5's advice for YaRN; where it is the length after (Llama 3.1, Phi-3) it holds. ALiBi's have no
    end.
    """
    text = config.get_text_config()
    made_for = getattr(text, "max_position_embeddings", None)
    if not isinstance(made_for, int) or made_for < 1 or getattr(text, "alibi", False):
        return None
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [value for value in rotary.values() if isinstance(value, dict)] or [rotary]  # one for each kind of layer
    reaches = [
        float(kind.get("factor") or 1) * (kind.get("original_max_position_embeddings") or made_for)
        for kind in kinds
        if kind.get("rope_type", kind.get("type", "default")) != "default"
    ]
    return max(made_for, *map(int, reaches)) if reaches else made_for
