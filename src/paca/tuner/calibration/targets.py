"""Which layers of a model a config would adapt, found without touching the model."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from paca.columns.selection import check_rank
from paca.config import PacaConfig
from paca.layers import PacaLayer
from paca.layers.modes import mode_of
from paca.layers.overlaid_weight import features
from paca.quantized import quantization_of
from paca.tuner.calibration.batches import base_model
from paca.tuner.column_choice import for_layer, given_columns
from paca.tuner.model import PacaModel
from paca.tuner.targets import check_module, resident_class_of


class Target(NamedTuple):
    """A layer that would be adapted."""

    module: Any
    """The layer; a stack of experts in a module of its own."""
    in_features: int
    is_parameter: bool
    """Whether the model has it as a parameter, and never calls it."""


def find_targets(model: nn.Module, config: PacaConfig) -> dict[str, Target]:
    """The layers that `get_peft_model(model, config)` would adapt, by the names that the model has for them. Raise
    `ValueError` if one can't be adapted, or not with that rank or those columns, or if there is none."""
    finder = _Finder(base_model(model), copy.deepcopy(config))
    for key, target in finder.found.items():
        if given_columns(config, target.in_features, key) is None:
            check_rank(for_layer(key, config.rank_pattern, config.r), target.in_features, key)
    return finder.found


class _AllFound(Exception):
    """Ends PEFT's search before it would change anything."""


class _Finder(PacaModel):
    """Goes through PEFT's search for targets and writes them down."""

    def __init__(self, model: nn.Module, config: PacaConfig) -> None:
        nn.Module.__init__(self)
        self.found: dict[str, Target] = {}
        vars(self)["model"] = model  # not a submodule: nothing may reach the model through this
        self.targeted_module_names, self.targeted_parameter_names = [], []
        self.peft_config, self.active_adapter = {"default": config}, "default"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # get_peft_model says the same again
                BaseTuner.inject_adapter(self, model, "default")
        except _AllFound:
            return
        raise AssertionError("PEFT did not activate the adapter")

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise _AllFound

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, **names: Any
    ) -> None:
        if isinstance(target, PacaLayer):
            in_features = target.in_features
        else:
            check_module(target, current_key, self.model)
            if mode_of(target, current_key, self.model) == "resident":
                in_features = target.weight.shape[resident_class_of(target, current_key, self.model).input_dim]
            else:
                quantization = quantization_of(target)
                in_features = (features(target) if quantization is None else quantization.shape(target))[1]
        self.found[current_key] = Target(target, in_features, names.get("parameter_name") is not None)
