"""One optimizer step: forward, backward, optimizer, zero_grad."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from paca.bench.base_model import BaseModel
from paca.bench.settings import BenchSettings, Point
from paca.lean.loss import loss_for

_LEARNING_RATE = 1e-5  # nothing is learned from random tokens; small, so that values stay finite over a long run


class TrainingStep:
    """A model with a batch and an optimizer.

    Args:
        model: What a method prepared.
        base: The model that the method started from.
        settings: Scope, loss, device, seed.
        point: The size of the batch.
        variant: `eager`, or how the inner model is compiled, for exactly this size: `compiled`, `cuda-graphs`.
    """

    def __init__(
        self, model: nn.Module, base: BaseModel, settings: BenchSettings, point: Point, variant: str = "eager"
    ) -> None:
        self.model, self.blocks = model, base.layers
        self.device = settings.torch_device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=_LEARNING_RATE, fused=True) if self.trained else None
        inner: Any = inner_model(model)
        fused = settings.scope == "model" and settings.loss == "fused" and not base.vision
        if fused:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(inner)
        self._graphs = variant == "cuda-graphs"
        call: Callable[..., Any] = model
        if variant != "eager":
            call = torch.compile(inner, dynamic=False, mode="reduce-overhead" if self._graphs else None)
        self._inputs, self._forward, self._gradient = _workload(call, base, settings, point, fused, variant != "eager")

    def forward(self) -> Tensor:
        """The forward pass: the loss, or with scope `blocks` the hidden states `(batch, seq, hidden)`."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the graph may take back the memory of the last step's results
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

    def clock(self) -> float:
        """Seconds, read when the device has done what was asked of it; a CPU always has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def abandon(self) -> None:
        """After a failure: drop the gradients, and give what they and the graph held back to the device."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def per_block(self, measure: Callable[[], float]) -> float | None:
        """What one block adds to `measure()`; None for a model with fewer than two, or if it is unclear which.

        Measured with all blocks and with the first alone, so that the final norm, the loss and the rotary embeddings,
        which a model has once, don't count.
        """
        if self.blocks < 2:
            return None
        inner = inner_model(self.model)
        found = [
            path
            for path, module in inner.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.blocks
        ]
        # A block may hold lists of its own, such as experts.
        outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
        if len(outer) != 1:
            return None
        above, _, name = outer[0].rpartition(".")
        parent, blocks = inner.get_submodule(above), inner.get_submodule(outer[0])
        whole = measure()
        assert isinstance(blocks, nn.ModuleList)
        setattr(parent, name, blocks[:1])
        try:
            return (whole - measure()) / (self.blocks - 1)
        finally:
            setattr(parent, name, blocks)


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _workload(
    call: Callable[..., Any], base: BaseModel, settings: BenchSettings, point: Point, fused: bool, compiled: bool
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
        return [], lambda: F.cross_entropy(call(pixel_values=images).logits, classes), None
    if settings.scope == "blocks":
        hidden_states = normal(*point, base.hidden_size).requires_grad_(True)
        run = lambda: call(inputs_embeds=hidden_states, use_cache=False).last_hidden_state  # noqa: E731
        return [hidden_states], run, normal(*point, base.hidden_size)
    tokens = integers(*point)
    more = {"fused_lm_head": True} if fused else {}

    def loss() -> Tensor:
        with loss_for(device, compiled):
            return call(input_ids=tokens, labels=tokens, use_cache=False, **more).loss

    return [], loss, None
