"""Whether examples that are packed into one sequence stay apart in the model at hand."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from paca.messages.errors import PacaError

_LENGTH = 4  # tokens of each of the two examples


def check_apart(trainer: Any) -> None:
    """Refuse to pack examples that would read each other.

    TRL joins them into one sequence without an attention mask, and numbers the positions of each from 0. Most models of
    transformers make the mask from these numbers, under SDPA too. Some have no look at them (OPT), and recurrent layers
    need kernels for it. So it is tried: the gradient of the second example's logits by the first one's embeddings has
    to be zero, exactly.

    Args:
        trainer: TRL's, before it trains.

    Raises:
        PacaError: They would read each other, or the model says itself that it can't keep them apart.
    """
    if not trainer.padding_free or trainer.is_deepspeed_enabled or not PartialState().is_main_process:
        return  # DeepSpeed's model runs in its engine alone; other processes may have no weights yet
    key = "packing" if trainer.args.packing else "padding_free"
    name = type(getattr(trainer.model, "get_base_model", lambda: trainer.model)()).__name__
    try:
        with trainer.accelerator.autocast():  # as in training: FlashAttention takes 16 bits alone
            gradient = gradient_by_the_first(trainer.model, trainer.data_collator)
    except ValueError as error:
        raise PacaError(f"train.{key} does not go with {name} here: {error} Or leave out train.{key}.") from error
    if bool(gradient.abs().max() > 0):
        raise PacaError(
            f"train.{key} would let the examples of a sequence read each other: as it is set up here, {name} "
            f"takes no notice of where one begins. Leave out train.{key}."
        )


def gradient_by_the_first(model: Any, collator: Any) -> Tensor:
    """How the logits of the second of two packed examples depend on the embeddings of the first: (tokens, hidden)."""
    ids = [number % model.get_input_embeddings().weight.shape[0] for number in range(1, 2 * _LENGTH + 1)]
    packed = {"input_ids": ids, "labels": ids, "seq_lengths": [_LENGTH, _LENGTH]}
    device = next(model.parameters()).device
    batch = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in collator([packed]).items()
        if name != "labels"
    }
    embedded: list[Tensor] = []

    def keep(module: Any, given: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    training = model.training
    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        model.eval()  # no dropout: the random generators stay as they are
        with torch.enable_grad():
            logits = model(**batch, use_cache=False).logits[0, -_LENGTH:]
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded[:1])
    finally:
        hook.remove()
        model.train(training)
    return gradient[0, :_LENGTH]
