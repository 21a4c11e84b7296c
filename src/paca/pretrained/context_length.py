"""How long the texts are that a model was made for."""

from __future__ import annotations

from typing import Any

from torch import nn


def context_length(model: Any) -> int | None:
    """Positions that a model was made for, by its configuration; None where nothing says so, as of recurrent models.

    Of a table of positions, as of BERT and GPT-2, some may be set aside: RoBERTa's first ones are.

    Rotary positions that are scaled reach further than `max_position_embeddings` where that is still the length before
    scaling, as in Qwen2.5's advice for YaRN; where it is the length after (Llama 3.1, Phi-3) it holds. ALiBi's have no
    end.
    """
    text = model.config.get_text_config()
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
    if reaches:
        return max(made_for, *map(int, reaches))
    return position_table(model) or made_for


def position_table(model: Any) -> int | None:
    """Positions that a model has learned one by one, so that it fails beyond them; None where it computes them."""
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if made_for is None:
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[-1]
        if not isinstance(module, nn.Embedding) or not (last == "wpe" or "position" in last):
            continue
        # RoBERTa counts positions from the one after its padding's; OPT and BART have rows beside those they count.
        aside = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
        if made_for <= module.num_embeddings <= made_for + aside:
            return int(module.num_embeddings - aside)
    return None
