"""Batches as users have them: what of them the model is called with, and what its loss is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft.peft_model import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paca.tuner.calibration.padding import Padding
from paca.tuner.model import PacaModel

_IGNORED = -100  # the label of a token that does not count, in transformers


class Batch:
    """One batch, on the model's device.

    Args:
        content: a mapping of keyword arguments, a tensor, or a tuple or list whose first elements are the positional
            arguments: as many as the model takes, or a mapping alone.
        model: what it is for.
        number: of the batch, from 1, for messages.

    Raises:
        ValueError: if it is something else, or empty.
    """

    def __init__(self, content: Any, model: nn.Module, number: int) -> None:
        self.number = number
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        content = _moved(content, _device(model))
        if isinstance(content, (tuple, list)) and content and isinstance(content[0], Mapping):
            content = content[0]
        if isinstance(content, Mapping):
            self.kwargs = dict(content)
        elif isinstance(content, Tensor):
            self.args = (content,)
        elif isinstance(content, (tuple, list)) and content and isinstance(content[0], Tensor):
            self.args = tuple(content[: _positional(model)])
        else:
            raise ValueError(
                f"Batch {number} is a {type(content).__name__} that the model can't be called with. Give mappings of "
                "its keyword arguments (as tokenizers and collators make them), tensors, or tuples that start with "
                "tensors."
            )
        tensors = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]
        if not tensors:
            raise ValueError(
                f"Batch {number} holds no tensor ({', '.join(self.kwargs)}). Tokenize and collate the examples first, "
                "with return_tensors='pt'."
            )
        if tensors[0].numel() == 0:
            raise ValueError(f"Batch {number} gives no tokens: it is empty, of shape {tuple(tensors[0].shape)}.")
        self.padding = Padding(self.kwargs.get("attention_mask"), number)
        config = getattr(model, "config", None)
        if self.padding.real is not None and getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"Batch {number} has padding, and its attention_mask says so for the encoder only. Give batches "
                "without padding to a model with a decoder of its own."
            )

    def add_labels(self, model: nn.Module) -> None:
        """Let a causal language model that is given no labels learn the input itself, without its padding."""
        tokens = self.kwargs.get("input_ids")
        base = base_model(model)
        if "labels" in self.kwargs or tokens is None or type(base).__name__ not in _CAUSAL:
            return
        self.kwargs["labels"] = tokens
        if self.padding.real is not None:
            real = self.padding.real.clone()
            real[:, 1:] &= self.padding.real[:, :-1]  # what comes after padding would be predicted from padding
            self.kwargs["labels"] = tokens.masked_fill(~real, _IGNORED)

    def loss_of(self, output: Any) -> Tensor:
        """The scalar among what the model returned.

        Raises:
            ValueError: if there is none.
        """
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
        if found is None:
            found = output
        if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
            raise ValueError(
                "gradient_norm needs a loss, and the model returned none. Give batches with labels, or "
                "paca.select(..., loss=lambda output, batch: ...), which computes it."
            )
        return found


_CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _moved(content: Any, device: torch.device) -> Any:
    if isinstance(content, Tensor):
        return content.detach().to(device)
    if isinstance(content, Mapping):
        return {key: _moved(value, device) for key, value in content.items()}
    if isinstance(content, (tuple, list)):
        return type(content)(_moved(value, device) for value in content) if type(content) in (tuple, list) else content
    return content


def base_model(model: Any) -> Any:
    """The model itself, without what PEFT puts around it."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, PacaModel) else model


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def _positional(model: Any) -> int:
    """How many positional arguments the model's forward takes."""
    kinds = [p.kind for p in inspect.signature(base_model(model).forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 1
    return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)
