"""One optimizer step: forward, backward, optimizer, zero_grad."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from paca.bench.base_model import BaseModel
from paca.bench.settings import BenchSettings, Point

_LEARNING_RATE = 1e-5  # nothing is learned from random tokens; small, so that values stay finite over a long run


class TrainingStep:
    """A model with a batch and an optimizer.

    Args:
        model: what a method prepared.
        base: the model that the method started from.
        settings: scope, loss, optimizer, seed.
        point: the size of the batch.
        compiled: run the inner model through torch.compile, for exactly this size.
    """

    def __init__(
        self, model: nn.Module, base: BaseModel, settings: BenchSettings, point: Point, compiled: bool = False
    ) -> None:
        self.model = model
        self.device = settings.torch_device
        self.element_size = settings.torch_dtype.itemsize
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.trained, settings.optimizer)
        inner = inner_model(model)
        fused = settings.scope == "model" and settings.loss == "fused" and not base.vision
        if fused and not compiled:
            _add_fused_loss(inner)
        elif fused:
            raise ValueError("the fused loss can't be compiled along; measure compiled models with loss=logits")
        call: Callable[..., Any] = torch.compile(inner, dynamic=False) if compiled else model
        self._inputs, self._forward, self._gradient = _workload(call, base, settings, point, fused)

    def forward(self) -> Tensor:
        """The forward pass: the loss, or with scope `blocks` the hidden states `(batch, seq, hidden)`."""
        return self._forward()

    def backward(self, result: Tensor) -> None:
        """The backward pass of what `forward` returned."""
        result.backward(self._gradient)

    def update(self) -> None:
        """The optimizer's part, and dropping the gradients."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for tensor in self._inputs:
            tensor.grad = None

    def run(self) -> None:
        """The whole step."""
        self.backward(self.forward())
        self.update()

    def abandon(self) -> None:
        """After a failure: drop the gradients, and give what they and the graph held back to the device."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _optimizer(parameters: list[nn.Parameter], name: str) -> torch.optim.Optimizer | None:
    if not parameters:
        return None
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=_LEARNING_RATE)
    return torch.optim.AdamW(parameters, lr=_LEARNING_RATE, fused=True)


def _add_fused_loss(model: Any) -> None:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)


def _workload(
    call: Callable[..., Any], base: BaseModel, settings: BenchSettings, point: Point, fused: bool
) -> tuple[list[Tensor], Callable[[], Tensor], Tensor | None]:
    """The inputs that require grad, the forward pass, and the gradient that the backward pass starts from."""
    device, dtype = settings.torch_device, settings.torch_dtype
    generator = torch.Generator(device).manual_seed(settings.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def integers(*shape: int) -> Tensor:
        return torch.randint(base.vocab_size, shape, device=device, generator=generator)

    if base.vision:
        images, classes = normal(point.batch, 3, base.image_size, base.image_size), integers(point.batch)

        def classify() -> Tensor:
            output = call(pixel_values=images)
            return F.cross_entropy(output if isinstance(output, Tensor) else output.logits, classes)

        return [], classify, None
    if settings.scope == "blocks":
        hidden_states = normal(point.batch, point.seq, base.hidden_size).requires_grad_(True)
        gradient = normal(point.batch, point.seq, base.hidden_size)
        return (
            [hidden_states],
            lambda: call(inputs_embeds=hidden_states, use_cache=False).last_hidden_state,
            gradient,
        )
    tokens = integers(point.batch, point.seq)
    more = {"fused_lm_head": True} if fused else {}
    return [], lambda: call(input_ids=tokens, labels=tokens, use_cache=False, **more).loss, None
