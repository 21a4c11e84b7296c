"""The names in a method's `target_modules`, compared with the modules that the model has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean

_LISTED = 20


def check_target_names(method: str, settings: Mapping[str, Any], model: nn.Module, model_name: str) -> None:
    """Refuse a list of targets with a name that no module of the model ends in, and a single name without a list.

    Of a list PEFT leaves such a name out without a word where another one fits; nobody who wrote it meant that. A text
    is a regular expression to PEFT, which has to match whole names.

    Args:
        method: The name of the method's section.
        settings: The section.
        model: The model, with or without weights.
        model_name: Its name, for the message.

    Raises:
        PacaError: Names the target, the nearest module and those that there are.
    """
    targets = settings.get("target_modules")
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str) and re.fullmatch(r"\w+", targets) and targets not in names:
        single: str | None = targets  # neither 'all-linear' nor a pattern
        targets = [targets]
    elif isinstance(targets, (list, tuple, set)):
        single = None
    else:
        return
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if not unknown and single is not None:
        raise PacaError(
            f"The section {method} does not fit {model_name}: {method}.target_modules is the text {single!r}, a "
            f"pattern that matches no whole name. Give a list of the ends of names: [{single}]."
        )
    if not unknown:
        return
    hint = did_you_mean(str(unknown[0]), _layers_with_weights(model), "{}")
    raise PacaError(
        f"The section {method} does not fit {model_name}: it has no module named {', '.join(map(str, unknown))} "
        f"({method}.target_modules).{hint} {told_of_layers(model)}"
    )


def told_of_layers(model: nn.Module) -> str:
    """The names that `target_modules` may have, for people."""
    kinds = _layers_with_weights(model)
    return f"Its layers with weights are {', '.join(kinds[:_LISTED])}{', ...' if len(kinds) > _LISTED else ''}."


def _layers_with_weights(model: nn.Module) -> list[str]:
    """Those that hold weights in their last dimension(s); norms and activations are none that can be adapted."""
    found = dict.fromkeys(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    )
    return [*found]
