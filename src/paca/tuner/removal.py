"""Taking an adapter out of a model that could not be put in or loaded."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from paca.layers import PacaLayer, paca_layers
from paca.layers.experts import ExpertStack, put_parameter_back
from paca.tuner import entry


def remove_adapter(model: nn.Module, adapter_name: str, trainable_before: dict[str, bool]) -> None:
    """Take an adapter out again, and restore what was trainable.

    Layers that have no other adapter become stock modules again.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            active = [other for other in module.active_adapters if other != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=active)
            empty = not module._adapters
        elif isinstance(module, PacaLayer):
            if adapter_name in module.r:  # it may have got no delta yet
                module.delete_adapter(adapter_name)
            empty = not module.paca_delta
        else:
            continue
        if empty:
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            stock = module.unload_and_optionally_merge_module(False, False, None)
            if isinstance(stock, ExpertStack):
                put_parameter_back(parent, child, stock)
            else:
                setattr(parent, child, stock)
    if paca_layers(model):
        entry.install(model)  # without the layers that went
    else:
        entry.remove(model)
        if getattr(model, "peft_config", None) == {}:
            del model.peft_config
    for name, parameter in model.named_parameters():
        if name in trainable_before:
            parameter.requires_grad_(trainable_before[name])
    entry.write_layers(paca_layers(model))  # what was parked meanwhile


def remove_unloaded(model: Any, adapter_name: str, trainable_before: dict[str, bool]) -> None:
    """Take out an adapter that was only just put into a `PeftModel`, or a model without one, to be loaded into."""
    tuner = getattr(model, "base_model", None)
    model.peft_config.pop(adapter_name, None)
    remove_adapter(tuner.model if isinstance(tuner, BaseTuner) else model, adapter_name, trainable_before)
