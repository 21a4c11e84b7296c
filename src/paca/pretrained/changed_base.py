"""Adapters of PEFT that leave another model than their base behind when they are disabled, or taken off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BECOMES_A_PART = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Starts of LoRA (and how their names begin) that take from the weights what the adapter begins with."""


def left_by(settings: Mapping[str, Any]) -> str | None:
    """What an adapter does to the model beneath it, besides adapting it; None for most.

    Args:
        settings: Of its config, by name.

    Returns:
        The setting and what it does, for a message: "bias: all trains the model's own biases".
    """
    bias, start = settings.get("bias"), settings.get("init_lora_weights")
    if isinstance(bias, str) and bias != "none":
        return f"bias: {bias} trains the model's own biases"
    if isinstance(start, str) and start.lower().startswith(_BECOMES_A_PART):
        return f"init_lora_weights: {start} takes a part out of the weights"
    if settings.get("kasa_config"):
        return "kasa_config cuts the weights"
    return None


def left_on(model: Any) -> str | None:
    """The same of the adapters on a model; None for one without."""
    configs = getattr(model, "peft_config", None) or {}
    return next((words for config in configs.values() if (words := left_by(vars(config))) is not None), None)


def not_saved(settings: Mapping[str, Any]) -> bool:
    """Whether what an adapter takes out of the weights is lost when PEFT saves it: it follows from random numbers, or
    from data, and PEFT keeps the adapter alone."""
    return str(settings.get("init_lora_weights")).lower().startswith(("pissa_niter", "corda", "lora_ga"))
