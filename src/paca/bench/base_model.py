"""The model that all methods start from: a preset with random weights, or a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from paca.bench.four_bit import quantized
from paca.bench.model_choice import check_model_choice
from paca.bench.presets import PRESETS, TextShape
from paca.bench.settings import BenchSettings
from paca.bench.targets import target_modules


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
    """0 where the width isn't one number."""
    layers: int
    """Transformer blocks; 0 for a convolutional network."""
    parameters: int
    targets: str | list[str]

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
        settings: the model, its sizes, dtype and device.
        four_bit: quantize its linear layers, one by one, so that no more than one is ever held in full.

    Raises:
        PacaError: the model is unknown, or a size does not go with it.
    """
    check_model_choice(settings)
    preset = PRESETS.get(settings.model)
    if preset is None:
        return _loaded(settings, four_bit)
    if isinstance(preset, TextShape):
        shape = preset.resized(settings)
        outline = outline_of(shape, settings)
        _fill(outline, settings, four_bit)
        return _described(outline, settings, hidden=shape.hidden_size, layers=shape.num_hidden_layers)
    image = preset.resized(settings)
    with init_empty_weights(include_buffers=False):
        outline = image.make().to(settings.torch_dtype)
    _fill(outline, settings, four_bit)
    return _described(
        outline,
        settings,
        hidden=image.hidden_size or 0,
        layers=image.num_hidden_layers,
        vocab=image.num_labels,
        image_size=image.image_size,
    )


def outline_of(shape: TextShape, settings: BenchSettings) -> nn.Module:
    """The model without weights: parameters on the meta device, buffers real."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if settings.scope == "blocks" else AutoModelForCausalLM
    with _quiet(), init_empty_weights(include_buffers=False):
        model: Any = kind.from_config(shape.config(), dtype=settings.torch_dtype)
    model.tie_weights()
    return model


def _loaded(settings: BenchSettings, four_bit: bool) -> BaseModel:
    from paca.pretrained import load_pretrained

    model: Any = load_pretrained(settings.model, settings.dtype).model
    if settings.scope == "blocks":
        model = model.base_model
    model.to(settings.torch_device)
    if four_bit:
        for name, module in list(model.named_modules()):
            if _quantizable(model, module):
                _replace(model, name, quantized(module))
    config = model.config.get_text_config()
    return _described(model, settings, hidden=config.hidden_size, layers=config.num_hidden_layers)


def _described(
    model: Any, settings: BenchSettings, hidden: int, layers: int, vocab: int = 0, image_size: int = 0
) -> BaseModel:
    model.requires_grad_(False)
    model.train()
    return BaseModel(
        model=model,
        vision=bool(image_size),
        vocab_size=vocab or model.config.get_text_config().vocab_size,
        image_size=image_size,
        hidden_size=hidden,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        targets=target_modules(model),
    )


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
        if four_bit and _quantizable(model, module):
            _replace(model, name, quantized(module))


def _quantizable(model: Any, module: nn.Module) -> bool:
    """Linear layers but the output layer, as transformers quantizes them."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else model.classifier
    return type(module) is nn.Linear and module is not output


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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
