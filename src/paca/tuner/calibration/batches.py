"""Batches as users have them: what the model is called with, what of it is padding, and what its loss is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from peft.peft_model import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paca.tuner.model import PacaModel

_IGNORED = -100  # the label of a token that does not count, in transformers
_CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


class Batch:
    """One batch, on the device of the model that it is for; `number` counts from 1, for messages. `content` is a
    mapping of keyword arguments, a tensor, or a tuple or list whose first elements are the positional arguments: as
    many as the model takes, or a mapping alone. Raise `ValueError` if it is something else, or empty, or has padding
    that can't be told from tokens."""

    def __init__(self, content: Any, model: nn.Module, number: int) -> None:
        self.number = number
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        tensors = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
        device = next((t.device for t in tensors), torch.device("cpu"))
        content = recursively_apply(lambda tensor: tensor.detach().to(device), content)
        self.content = content  # as a user's loss takes it
        first = content[0] if isinstance(content, (tuple, list)) and content else content
        if isinstance(first, Mapping):
            self.kwargs = dict(first)
        elif isinstance(first, Tensor):
            self.args, self.kwargs = _as_taken((first,) if first is content else tuple(content), model)
        else:
            raise ValueError(
                f"Batch {number} is a {type(content).__name__} that the model can't be called with. Give mappings of "
                "its keyword arguments (as tokenizers and collators make them), tensors, or tuples that start with "
                "tensors."
            )
        given = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]
        if not given:
            raise ValueError(
                f"Batch {number} holds no tensor ({', '.join(self.kwargs)}). Tokenize and collate the examples first, "
                "with return_tensors='pt'."
            )
        if given[0].numel() == 0:
            raise ValueError(f"Batch {number} gives no tokens: it is empty, of shape {tuple(given[0].shape)}.")
        self.real = _real_tokens(self.kwargs.get("attention_mask"), number)
        """`(samples, tokens)`, False for padding; None for a batch without any."""
        if self.real is not None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"Batch {number} has padding, and its attention_mask says so for the encoder only. Give batches "
                "without padding to a model with a decoder of its own."
            )

    def add_labels(self, model: nn.Module) -> None:
        """Let a causal language model that is given no labels learn the input itself, without its padding."""
        tokens = self.kwargs.get("input_ids")
        if "labels" in self.kwargs or tokens is None or type(base_model(model)).__name__ not in _CAUSAL:
            return
        self.kwargs["labels"] = tokens
        if self.real is not None:
            real = self.real.clone()
            real[:, 1:] &= self.real[:, :-1]  # what comes after padding would be predicted from padding
            self.kwargs["labels"] = tokens.masked_fill(~real, _IGNORED)


def loss_of(output: Any) -> Tensor:
    """The scalar among what the model returned; `ValueError` if there is none."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None:
        found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
        raise ValueError(
            "gradient_norm needs a loss, and the model returned none. Give batches with labels, or "
            "paca.select(..., loss=lambda output, batch: ...), which computes it."
        )
    return found


def base_model(model: Any) -> Any:
    """The model itself, without what PEFT puts around it."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, PacaModel) else model


def without_padding(values: Tensor, real: Tensor | None, key: str) -> Tensor:
    """`values (..., channels)` of the layer `key` as rows `(n, channels)`, those of padding left out; `ValueError` if
    the batch has padding and the rows are not its tokens."""
    leading, rows = values.shape[:-1], values.reshape(-1, values.shape[-1])
    if real is None or leading == real.shape[:1]:  # one row a sample, as in a classifier's head
        return rows
    if leading in (real.shape, (real.numel(),)):
        return rows[real.to(values.device).flatten()]
    raise ValueError(
        f"{key}: its input has shape {tuple(values.shape)}, which does not fit the attention_mask {tuple(real.shape)} "
        "of its batch, so that padding can't be told from tokens. Give batches without padding (one sequence each, or "
        "all of one length), or leave the layer out of target_modules."
    )


def _real_tokens(mask: Any, number: int) -> Tensor | None:
    if not isinstance(mask, Tensor):
        return None
    if mask.numel() and not bool(mask.any()):
        raise ValueError(f"Batch {number} gives no tokens: its attention_mask is 0 everywhere.")
    if bool(mask.all()):
        return None
    if mask.dim() != 2:
        raise ValueError(
            f"Batch {number}: its attention_mask has shape {tuple(mask.shape)}, which does not say which tokens are "
            "padding. Give one of (samples, tokens), or batches without padding and without a mask."
        )
    return mask != 0


def _as_taken(values: tuple[Any, ...], model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for the model's forward of values in its order, as many as it takes: by name, where it has names."""
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    kinds = {p.kind for p in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return values[:1], {}
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        return values[: sum(p.kind != inspect.Parameter.KEYWORD_ONLY for p in parameters)], {}
    names = [p.name for p in parameters if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return (), dict(zip(names, values, strict=False))
