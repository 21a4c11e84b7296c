"""SHADOW, for a plan: PEFT keeps its second network beside the model, and a plan runs the model inside.

Not counted are the keys and values of that network while answers are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.shadow.model import ShadowModel
from torch import nn

NAME = "shadow_network"


class ShadowNetwork(nn.ModuleList):
    """What SHADOW puts beside the model: a second one of few blocks, a projection, and a classifier's head."""

    def __init__(self, tuner: ShadowModel) -> None:
        super().__init__((tuner.shadow_backbone, tuner.shadow_projection, tuner.shadow_head))
        self.tuner = (tuner,)  # no module of this one: it holds the whole model


def put_inside(adapted: PeftModel) -> None:
    """Let the model in `adapted`, if its method is SHADOW, hold the second network and add its loss, as PEFT's wrapper
    does.
    """
    if isinstance(adapted.base_model, ShadowModel):
        root: Any = adapted.get_base_model()
        root.add_module(NAME, ShadowNetwork(adapted.base_model))
        root.register_forward_hook(_add_its_loss, with_kwargs=True)


def find_ends(model: nn.Module) -> None:
    """The network's states enter at the first block of the model and leave at the last: let a copy with fewer blocks
    find its own.
    """
    if isinstance(network := getattr(model, NAME, None), ShadowNetwork):
        network.tuner[0]._register_boundary_hooks()


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """`model` without the network, as PEFT leaves it."""
    network = model._modules.pop(NAME, None)
    try:
        yield
    finally:
        if network is not None:
            model.add_module(NAME, network)


def _add_its_loss(model: Any, args: Any, given: dict[str, Any], output: Any) -> None:
    tuner = getattr(model, NAME).tuner[0]
    if given.get("labels") is None or output.loss is None or not tuner._shadow_path_active():
        return
    loss = tuner.shadow_auxiliary_loss(given["labels"], attention_mask=given.get("attention_mask"))
    weight = tuner.peft_config[tuner.active_adapters[0]].auxiliary_loss_weight
    if loss is not None and weight > 0:
        output.loss = output.loss + weight * loss
