"""Which stacks of experts a config's `target_parameters` name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.integrations import init_empty_weights
from torch import nn

from paca.layers.experts import PacaExpertStack, is_transposed, stack_of
from paca.layers.offloading_hooks import has_offloaded_params
from paca.messages.nearest import did_you_mean

IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


class AdaptsStacks(BaseTuner):
    """Mixin for `PacaModel`."""

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        targets = expert_targets(model, peft_config)
        for key, (experts, name) in targets.items():
            target = experts._modules.get(name) or stack_of(experts, name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(peft_config, adapter_name, target, name, experts, key, parameter_name=name)
        return list(targets)


@contextmanager
def quiet_about_stacks() -> Iterator[None]:
    """Without warnings of PEFT's that count modules only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
        yield


Stacks = dict[str, tuple[nn.Module, str]]
"""By a parameter's full name in the model: the module that has it, and its name there."""


def expert_targets(model: nn.Module, config: Any) -> Stacks:
    """Find the stacks that `config.target_parameters` (full names or endings of names) selects; `exclude_modules`,
    `layers_to_transform` and `layers_pattern` apply to them as they do to modules. Raise `ValueError` if a name matches
    nothing, or something that is no stack of experts."""
    places = {
        f"{module_name}.{name}": (module, name)
        for module_name, module in model.named_modules()
        for name in (
            *(n for n, p in module._parameters.items() if p is not None),
            *(n for n, m in module.named_children() if isinstance(m, PacaExpertStack)),
        )
        if not isinstance(module, PacaExpertStack)
    }
    for wanted in config.target_parameters:
        if not any(key == wanted or key.endswith(f".{wanted}") for key in places):
            raise ValueError(f"target_parameters: the model has no parameter {wanted!r}. {_advice(wanted, places)}")
    as_modules = copy.copy(config)
    as_modules.target_modules = set(config.target_parameters)
    found = {key: place for key, place in places.items() if check_target_module_exists(as_modules, key)}
    if not found:
        raise ValueError(
            f"exclude_modules, modules_to_save or layers_to_transform leave none of the parameters that "
            f"target_parameters={sorted(config.target_parameters)} names."
        )
    for key, (experts, name) in found.items():
        _check(key, experts, name)
    return found


def _check(key: str, experts: nn.Module, name: str) -> None:
    weight: Any = getattr(experts, name)
    if isinstance(weight, PacaExpertStack):
        return
    if len(weight.shape) != 3:
        raise ValueError(
            f"{key} has shape {tuple(weight.shape)}, but target_parameters takes stacks of experts, which have "
            "three dimensions. A linear layer's weight is adapted through target_modules, by the layer's name."
        )
    kind = type(experts)
    if is_transposed(experts) is None:
        raise ValueError(
            f"{key} belongs to a {kind.__module__}.{kind.__qualname__}, which takes no part in transformers' "
            "experts interface (use_experts_implementation): it does not say which dimension of its weights runs over "
            "the inputs, so PaCA can't adapt it."
        )
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{key}: the experts run with experts_implementation={implementation!r}, whose kernels PaCA can't "
            "train columns through. Call model.set_experts_implementation('grouped_mm') first; 'batched_mm' and "
            "'eager' work too."
        )
    if has_offloaded_params(experts):
        raise ValueError(
            f"{key} is offloaded by accelerate, which PaCA can't adapt yet. Load the model with a device_map "
            "that keeps the experts on one device, or without one."
        )


def _advice(wanted: str, places: Stacks) -> str:
    stacks = sorted({name for experts, name in places.values() if len(getattr(experts, name).shape) == 3})
    if not stacks:
        return "It has no stacks of experts at all; linear layers are adapted through target_modules."
    hint = did_you_mean(wanted.rpartition(".")[2], stacks)
    return f"{hint} Its stacks of experts are called {', '.join(stacks)}.".lstrip()
