"""Adapters of PEFT's other methods: what is checked before PEFT loads one that somebody else made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft.utils import PeftType
from torch import nn
from transformers import dynamic_module_utils

from paca.messages.errors import PacaError
from paca.messages.shown import shown
from paca.pretrained.adapter_folder import ADAPTER_CONFIG, adapter_settings, weight_file
from paca.pretrained.changed_base import not_saved
from paca.tuner.pickled_adapter import tensors_in_pickle
from paca.tuner.registration import NAME
from paca.tuner.strange_expressions import try_expressions

_REFUSED = {
    "megatron_config": "PEFT imports a module that it names",
    "layer_replication": "it copies layers of the model as often as it likes",
    "shadow_model": "PEFT loads another model, and asks whether its code may run",
    "prompt_tuning_init_state_dict_path": "PEFT reads a file that it names, wherever that is",
}
_HARMLESS = {"shadow_model": "mirror"}  # made of the model itself


def refused(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings of an adapter of PEFT that paca does not load, each with the reason."""
    given = ((name, settings.get(name)) for name in _REFUSED)
    return [(name, _REFUSED[name]) for name, value in given if value and value != _HARMLESS.get(name)]


def check_saved(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse an adapter whose start PEFT did not save.

    Args:
        settings: Of its config.
        file: Where they are.

    Raises:
        PacaError: It is one.
    """
    if not_saved(settings):
        raise PacaError(
            f"{file} has init_lora_weights: {settings['init_lora_weights']}, and PEFT did not save what that takes out "
            "of the weights beneath: what was trained does not come back. The adapter that a run of paca leaves is a "
            "plain LoRA; let PEFT save it as one (path_initial_model_for_weight_conversion)."
        )


@contextmanager
def without_asking() -> Iterator[None]:
    """A block in which transformers runs no code of a folder that PEFT gives it, and asks nobody whether it may."""
    with patch.object(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0):  # seconds that it waits for an answer
        yield


def check_method(adapter: Path, model: nn.Module) -> None:
    """Check an adapter that is not PaCA's, before PEFT puts it on `model`; PaCA's are checked as they are put on.

    Raises:
        PacaError: Its method or a setting could do more than adapt the model; names it.
        ValueError: A regular expression that takes too long, or a file that is none of tensors; names it.
    """
    settings, file = adapter_settings(adapter), adapter / ADAPTER_CONFIG
    kind = settings.get("peft_type")
    if kind == NAME:
        return
    if not isinstance(kind, str) or kind not in PeftType.__members__:
        raise PacaError(f"{file} names no method that this PEFT knows: peft_type is {shown(kind)}.")
    if kind == "XLORA":
        raise PacaError(f"{file} is for XLORA, which loads other adapters, from wherever it says. Load it with PEFT.")
    for setting, reason in refused(settings):
        raise PacaError(f"{file} sets {setting}, which paca does not load: {reason}. Load it with PEFT.")
    check_saved(settings, file)
    tokens = settings.get("alora_invocation_tokens")  # PEFT looks at them when it generates, and not before
    if tokens is not None and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise PacaError(
            f"{file} is broken: alora_invocation_tokens must be a list of tokens' numbers or null; it is "
            f"{shown(tokens)}. Copy the file again, or train again."
        )
    try_expressions(settings, model, file)
    weights = weight_file(adapter)
    if weights.suffix == ".bin":
        tensors_in_pickle(weights)
