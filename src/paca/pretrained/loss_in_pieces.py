"""What TRL's loss in pieces asks of a model, where transformers' classes say it otherwise."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def answer_for_loss(model: nn.Module) -> None:
    """Let TRL (1.x) find the part below the output head as `base_model`, how many experts there are, and whether there
    are any.

    The text model of Llama 4 names a part that only the whole of it has. Llama 4, Granite and Phi count their experts
    as `num_local_experts`, as Mixtral does, which gives the other name to the same number. Of some families, such as
    Doge, only a few models have experts whose load there is to balance.
    """
    if getattr(model, "base_model", None) is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        model.base_model_prefix = "model"
    if not isinstance(model, PreTrainedModel):
        return
    config: Any = model.config.get_text_config()
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        kind = type(config)
        kind.attribute_map = {**kind.attribute_map, "num_experts": "num_local_experts"}  # in no file
    routers = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    router = getattr(routers, "target_class", routers)
    without = isinstance(router, type) and not any(isinstance(module, router) for module in model.modules())
    if without and hasattr(config, "router_aux_loss_coef"):
        config.router_aux_loss_coef = 0.0
