"""The model that all methods start from: a published shape with random weights, or a checkpoint."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from paca.bench.methods import MethodUnavailable
from paca.bench.settings import BenchSettings
from paca.pretrained import load_pretrained
from paca.pretrained.published_shapes import Shape


@dataclass(frozen=True)
class BaseModel:
    """A frozen model, with what the measurements have to know about it."""

    model: nn.Module
    vision: bool
    """Takes `pixel_values` and gives logits per image; else `input_ids`, and logits per token."""
    vocab_size: int
    """Number of tokens, or of labels."""
    image_size: int
    """0 for text."""
    hidden_size: int
    layers: int
    """Transformer blocks."""

    def copy_sharing_weights(self) -> nn.Module:
        """A model with modules of its own over the same weights, so that all methods fit into one process.

        PaCA writes its columns into the shared weights and `full` trains them, so what another method computes
        changes a little over the rounds; what it costs does not.
        """
        memo: dict[int, Any] = {}
        for parameter in self.model.parameters():
            plain = type(parameter) is nn.Parameter
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if plain else parameter
        for buffer in self.model.buffers():
            memo[id(buffer)] = buffer
        return copy.deepcopy(self.model, memo)


def build_base_model(settings: BenchSettings, four_bit: bool = False) -> BaseModel:
    """Make or load the model on its device.

    Args:
        settings: The model, its sizes, dtype and device.
        four_bit: Quantize its linear layers, one by one, so that no more than one is ever held in full.

    Raises:
        PacaError: The model is unknown, or a size does not go with it.
        MethodUnavailable: bitsandbytes is not installed.
    """
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise MethodUnavailable("needs bitsandbytes for its 4-bit weights: pip install 'paca-tuning[bitsandbytes]'")
    shape = settings.shape()
    if shape is None:
        model: Any = load_pretrained(settings.model, settings.dtype).model
        if settings.scope == "blocks":
            model = model.base_model
        model.to(settings.torch_device)
        if four_bit:
            for name, module in list(model.named_modules()):
                _quantize_if_linear(model, name, module)
    else:
        model = _outline(shape, settings)
        _fill(model, settings, four_bit)
    model.requires_grad_(False)
    model.train()
    config = model.config.get_text_config()
    image_size = getattr(config, "image_size", 0)
    return BaseModel(
        model=model,
        vision=bool(image_size),
        vocab_size=config.num_labels if image_size else config.vocab_size,
        image_size=image_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
    )


def _outline(shape: Shape, settings: BenchSettings) -> nn.Module:
    """The model without weights: parameters on the meta device, buffers real."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

    kind: Any = AutoModel if settings.scope == "blocks" else AutoModelForCausalLM
    if shape.vision:
        kind = AutoModelForImageClassification
    with _quiet(), init_empty_weights(include_buffers=False):
        model: Any = kind.from_config(shape.config(), dtype=settings.torch_dtype)
    model.tie_weights()
    return model


def _fill(model: nn.Module, settings: BenchSettings, four_bit: bool) -> None:
    """Give a model without weights random ones, module by module, on the device: matrices N(0, 0.02²), norms 1."""
    device, generator = settings.torch_device, torch.Generator(settings.torch_device).manual_seed(settings.seed)
    made: dict[int, nn.Parameter] = {}  # tied weights are one parameter
    for name, module in list(model.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.dim() > 1:
                    data.normal_(0, 0.02, generator=generator)
                else:
                    data.fill_(0 if key == "bias" else 1)
                made[id(parameter)] = nn.Parameter(data, requires_grad=False)
            module._parameters[key] = made[id(parameter)]
        for key, buffer in list(module._buffers.items()):
            module._buffers[key] = None if buffer is None else buffer.to(device)
        if four_bit:
            _quantize_if_linear(model, name, module)


def _quantize_if_linear(model: Any, name: str, module: nn.Module) -> None:
    """To NF4 with double quantization, as QLoRA does: every linear layer but the output layer."""
    if type(module) is not nn.Linear or module in (model.get_output_embeddings(), getattr(model, "classifier", None)):
        return
    import bitsandbytes

    nf4: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    layer: Any = bitsandbytes.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=module.weight.dtype,
        device="meta",
        **nf4,
    )
    layer.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, module=layer, **nf4)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.data, requires_grad=False)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.to(module.weight.device))  # the move quantizes


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the generation config that transformers prints for every causal model made from a config."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        yield
    finally:
        logging.set_verbosity(level)
