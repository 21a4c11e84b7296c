"""The model that all methods start from: a published shape with random weights, or a checkpoint."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from paca.bench.methods import MethodUnavailable
from paca.bench.settings import BenchSettings
from paca.messages.install import how_to_install
from paca.pretrained import load_pretrained
from paca.pretrained.published_shapes import Shape
from paca.pretrained.quantizing import quantized_linear


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
        memo: dict[int, Any] = {id(buffer): buffer for buffer in self.model.buffers()}
        for parameter in self.model.parameters():
            if type(parameter) is nn.Parameter:
                memo[id(parameter)] = shared = nn.Parameter(parameter.data, requires_grad=False)
                shared.holds_columns_of_many = True  # type: ignore[attr-defined]  # nobody reads what comes out
            else:
                memo[id(parameter)] = parameter
        return copy.deepcopy(self.model, memo)


def build_base_model(settings: BenchSettings, four_bit: bool = False) -> BaseModel:
    """Make or load the model on its device; `four_bit`: as QLoRA does, one layer at a time is held in full.

    Raises:
        PacaError: The model is unknown, or a size does not go with it.
        MethodUnavailable: The package bitsandbytes is not installed.
    """
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise MethodUnavailable(f"needs bitsandbytes for its 4-bit weights. {how_to_install('bitsandbytes')}")
    shape = settings.shape()
    if shape is None:
        model: Any = load_pretrained(settings.model, settings.dtype).model
        model = (model.base_model if settings.scope == "blocks" else model).to(settings.torch_device)
    else:
        model = _outline(shape, settings)
    generator = torch.Generator(settings.torch_device).manual_seed(settings.seed)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights are one parameter
    for name, module in list(model.named_modules()):
        if shape is not None:
            _fill(module, generator, made)
        if four_bit and _is_quantized_by_qlora(model, module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized_linear(module, "nf4"))
    model.requires_grad_(False)
    model.train()
    config = model.config.get_text_config()
    image_size = getattr(config, "image_size", 0)
    vocab_size = config.num_labels if image_size else config.vocab_size
    return BaseModel(model, bool(image_size), vocab_size, image_size, config.hidden_size, config.num_hidden_layers)


def _outline(shape: Shape, settings: BenchSettings) -> nn.Module:
    """The model without weights: parameters on the meta device, buffers real."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
    from transformers.utils import logging

    kind: Any = AutoModel if settings.scope == "blocks" else AutoModelForCausalLM
    if shape.vision:
        kind = AutoModelForImageClassification
    level = logging.get_verbosity()
    logging.set_verbosity_warning()  # else the generation config of every causal model is printed
    try:
        with init_empty_weights(include_buffers=False):
            model: Any = kind.from_config(shape.config(), dtype=settings.torch_dtype)
    finally:
        logging.set_verbosity(level)
    model.tie_weights()
    return model


def _fill(module: nn.Module, generator: torch.Generator, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Give a module without weights random ones on the generator's device: matrices N(0, 0.02²), norms 1, biases 0."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        if parameter not in made:
            data = torch.empty_like(parameter, device=generator.device, requires_grad=False)
            if parameter.dim() > 1:
                data.normal_(0, 0.02, generator=generator)
            else:
                data.fill_(0 if key == "bias" else 1)
            made[parameter] = nn.Parameter(data, requires_grad=False)
        setattr(module, key, made[parameter])
    for key, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, key, buffer.to(generator.device))


def _is_quantized_by_qlora(model: Any, module: nn.Module) -> bool:
    """Every linear layer is, but the output layer."""
    return type(module) is nn.Linear and module not in (
        model.get_output_embeddings(),
        getattr(model, "classifier", None),
    )
