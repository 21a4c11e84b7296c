"""The names in a method's `target_modules`, compared with the modules that the model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from paca.messages.errors import PacaError
from paca.tuner.target_names import problem_of


def check_target_names(method: str, settings: Mapping[str, Any], model: nn.Module, model_name: str) -> None:
    """Refuse a list of targets with a name that no module of the model ends in, and a single name without a list.

    Args:
        method: The section's name.
        settings: Its content.
        model: The base model.
        model_name: For the message.

    Raises:
        PacaError: Names the targets without a module and those that there are.
    """
    problem = problem_of(settings.get("target_modules"), model, f"{method}.target_modules")
    if problem is not None:
        raise PacaError(f"The section {method} does not fit {model_name}: {problem}")
