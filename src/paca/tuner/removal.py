"""Taking an adapter out of a model that could not be put in or loaded, and putting back what was there before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from paca.layers import PacaLayer, paca_layers
from paca.layers.experts import ExpertStack, put_parameter_back
from paca.tuner import entry
from paca.tuner.adapter_file import folder_being_read
from paca.tuner.registration import PREFIX

_TABLES = ("paca_delta", "paca_indices", "r", "paca_alpha", "scaling", "folded")
"""What an adapted layer has by the name of an adapter."""


class Replaced:
    """What a model has under an adapter's name, before another adapter comes under the same one."""

    def __init__(self, model: Any, adapter_name: str) -> None:
        self.config = model.peft_config.get(adapter_name)
        self.name, self.is_entered = adapter_name, entry.entry_of(model) is not None
        modules = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        self.saved_whole = [m for m in modules if adapter_name in m._adapters]
        layers = {layer: layer.base_layer.columns for layer in paca_layers(model) if adapter_name in layer.r}
        self.layers = {
            layer: (
                {name: table[adapter_name] for name in _TABLES if adapter_name in (table := getattr(layer, name))},
                columns.revisions.get(adapter_name, 0),
                adapter_name in columns.trusted,
                (layer._active_adapter, layer._disable_adapters),
            )
            for layer, columns in layers.items()
        }

    def put_back(self, layer: PacaLayer) -> None:
        """Give `layer` its adapter again; the weight is yet to be written."""
        tables, revision, is_trusted, (layer._active_adapter, layer._disable_adapters) = self.layers[layer]
        for name, value in tables.items():
            getattr(layer, name)[self.name] = value
        if "folded" not in tables:
            layer.folded.pop(self.name, None)
        columns = layer.base_layer.columns
        columns.revisions[self.name] = revision
        (columns.trusted.add if is_trusted else columns.trusted.discard)(self.name)


@contextmanager
def replacing(model: Any, configs: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """A block in which an adapter is put into a model that has adapters already, maybe one of its name.

    Raises:
        ValueError: It is made for the `PeftModel` around them, as where a script or a notebook's cell runs twice.
    """
    config: Any = configs if isinstance(configs, PeftConfig) else configs[adapter_name]
    is_made = not (getattr(config, "loading", False) or folder_being_read())
    if is_made and isinstance(model, PeftModel) and getattr(model.base_model, "prefix", None) == PREFIX:
        names = ", ".join(map(repr, model.peft_config))
        raise ValueError(
            f"This model has a PaCA adapter already ({names}), and get_peft_model would put another model around it, "
            "whose adapter fits no base model. For another adapter in its place, load the base model anew, or take it "
            "back first: model = model.unload(). For one beside it: model.add_adapter(name, config)."
        )
    config.replaced = Replaced(model, adapter_name)
    yield
    if not getattr(config, "reading", None):  # else it may still fail
        config.replaced = None


def remove_adapter(model: nn.Module, configs: dict[str, Any], adapter_name: str, config: Any) -> None:
    """Take an adapter out again, and restore what was trainable and what it replaced.

    Layers that have no other adapter become stock modules again.

    Args:
        model: The adapted model, which may be a `PeftModel` with adapters of its own.
        configs: Those of the model's adapters.
        config: The adapter's; it knows what was there before.
    """
    before: Replaced | None = getattr(config, "replaced", None)
    if before is not None and before.config is not None:
        configs[adapter_name] = before.config
    else:
        configs.pop(adapter_name, None)
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            if before is not None and module in before.saved_whole:
                continue
            active = [other for other in module.active_adapters if other != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=active)
            empty = not module._adapters
        elif isinstance(module, PacaLayer):
            if before is not None and module in before.layers:
                before.put_back(module)
            elif adapter_name in module.r:  # it may have got no delta yet
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
    if not paca_layers(model) or (before is not None and not before.is_entered):
        entry.remove(model)
        if vars(model).get("peft_config") == {}:
            del model.peft_config
    for module in model.modules():
        if (of_module := entry.entry_of(module)) is not None:
            of_module.take(paca_layers(module))  # without the layers that went
    config.replaced = config.reading = None
    for name, parameter in model.named_parameters():
        if name in config.trainable_before:
            parameter.requires_grad_(config.trainable_before[name])
    entry.write_layers(paca_layers(model))  # what was parked meanwhile


def remove_unloaded(model: Any, adapter_name: str, config: Any) -> None:
    """Take out an adapter that was only just put into a `PeftModel`, or a model without one, to be loaded into."""
    tuner = getattr(model, "base_model", None)
    remove_adapter(tuner.model if isinstance(tuner, BaseTuner) else model, model.peft_config, adapter_name, config)


def refuse_to_generate(tuner: BaseTuner, model: nn.Module, holder: PeftModel) -> None:
    """Take out the adapter that was just put into `model`, and raise `ValueError`: what PEFT makes around it, by the
    adapter's task, generates text, and the model does not."""
    name = tuner.active_adapters[0]
    remove_adapter(model, tuner.peft_config, name, tuner.peft_config[name])
    kind, wanted = type(model).__name__, type(holder).__name__
    raise ValueError(
        f"The task_type of adapter {name!r} asks for a {wanted}, which generates text, and {kind} has no "
        "prepare_inputs_for_generation. Load the model with its head (AutoModelForCausalLM, or AutoModelForSeq2SeqLM); "
        "or give an adapter that is made for this model no task_type."
    )
