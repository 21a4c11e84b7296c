"""An adapter on the output layer, which TRL's loss does not pass through."""

from __future__ import annotations

from typing import Any

from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper

from paca.messages.errors import PacaError


def check_output_layer(model: Any) -> None:
    """Refuse an adapter that TRL's trainers of language models, which multiply by the layer's weight, would not train.

    Args:
        model: With its adapter, from PEFT or without its wrapper.

    Raises:
        PacaError: There is one on the output layer.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensLayer | TrainableTokensWrapper):
        raise PacaError(
            "Single tokens can't be trained in this model: its input embedding and its output layer are one weight "
            "(tied), so PEFT trains their rows in both, and TRL's trainers compute the loss from the weight of the "
            "output layer alone. Leave the tokens out, train in a loop of your own, or give a copy of the model in "
            "which each has its own weight (paca.untie_embeddings, save_pretrained)."
        )
    if isinstance(head, BaseTunerLayer):
        raise PacaError(
            "An adapter on the output layer (lm_head) would not be trained: TRL's trainers compute the loss from its "
            "weight alone. Leave it out of target_modules; modules_to_save trains a copy of the layer."
        )
