"""Rows of an embedding that an adapter trains beside columns (`trainable_token_indices`), held and trained by PEFT."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from paca.config import PacaConfig
from paca.layers import PacaLayer

TOKENS = "token_adapter.trainable_tokens_delta"


def check_tokens(model: nn.Module, config: PacaConfig) -> None:
    """Raise `ValueError` for tokens that a layer does not have, or whose rows the adapter's file lacks, and for layers
    of which columns are trained, or which are trained whole."""
    tokens: Any = config.trainable_token_indices or {}
    for ending, numbers in (tokens if isinstance(tokens, dict) else {None: tokens}).items():
        for name, module in _layers(model, ending):
            if isinstance(module, PacaLayer):
                raise ValueError(
                    f"trainable_token_indices trains rows of {name}, of which columns are trained: leave the layer out "
                    "of one of them."
                )
            whole = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            rows = whole.weight.shape[0]
            wrong = [number for number in numbers or () if not 0 <= number < rows]
            if wrong or not numbers or len(set(numbers)) < len(numbers):
                said = (
                    f"holds token {wrong[0]}" if wrong else "names no token" if not numbers else "names a token twice"
                )
                raise ValueError(
                    f"trainable_token_indices {said}: {name} has the tokens 0 to {rows - 1}. New tokens need rows "
                    "before: model.resize_token_embeddings(len(tokenizer))."
                )
            stored = f"base_model.model.{name}.{TOKENS}"
            if config.reading and config.shapes is not None and stored not in config.shapes:
                raise ValueError(f"The adapter has no tensor {stored}, which its trainable_token_indices promise.")


def _layers(model: Any, ending: str | None) -> list[tuple[str, Any]]:
    """The layers that PEFT takes, by name: those of this ending; without one, the input embedding, or, in a model that
    does not say which that is, `embed_tokens`."""
    embedding = None
    with suppress(AttributeError, NotImplementedError):  # transformers' models of images have the method alone
        embedding = model.get_input_embeddings() if ending is None else None
    if embedding is not None:
        return [(name, module) for name, module in model.named_modules() if module is embedding]
    return [(n, module) for n, module in model.named_modules() if f".{n}".endswith(f".{ending or 'embed_tokens'}")]
