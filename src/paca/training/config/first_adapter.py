"""`model.adapter`: a run that trains on from an adapter has its method, its settings, its base and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.messages.shown import setting, shown
from paca.training.config.key_checks import Origins
from paca.training.config.run_config import METHODS

_OWN = {"PACA": "paca", "LORA": "lora"}
"""Methods that have a section of their own."""
_STARTS = (
    *("selection", "indices", "random_seed", "init_weights", "original_weights"),
    *("corda_config", "eva_config", "lora_ga_config"),
)
"""Fields of PaCA's and LoRA's that say how an adapter begins: this one has begun."""
_NOT_TRAINED_ON = {
    "ADALORA": "its file is cut to the ranks that it ended with",
    **dict.fromkeys(
        ("CARTRIDGE", "CPT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
        "PEFT loads learned tokens, keys and values for answering alone",
    ),
}
"""Methods whose adapters can't be trained on, and why (PEFT 0.21.2)."""


def take_adapter(sections: dict[str, dict[str, Any]], origins: Origins) -> None:
    """Fill in what an adapter that training goes on from decides, where the config leaves it out.

    Args:
        sections: As given, `model.adapter` among them. Changed: `model` gets the adapter's folder, its base and how
            that was loaded; the method's section what the adapter's config says.
        origins: Where.

    Raises:
        PacaError: There is no such adapter, it can't be trained on, or the config asks for another one.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from paca.pretrained.adapter_folder import ADAPTER_CONFIG, adapter_settings
    from paca.pretrained.foreign_methods import check_saved
    from paca.training.config.adapter_settings import (
        FROM_DATA,
        NOT_HERE,
        adapter_config,
        adapter_fields,
        check_adapter_settings,
        plain,
    )

    place, named = origins.of("model.adapter"), sections["model"]["adapter"]
    adapter = _found(named, place)
    settings = adapter_settings(adapter)
    method, kind = _method_of(settings, place, named)
    for other in METHODS:
        if other != method and other in sections:
            called = method if method != "peft" else f"peft ({kind})"
            raise PacaError(
                f"{origins.of_section(other)}: the run trains on from {named} (model.adapter), whose method is "
                f"{called}. Leave the section {other} out (--set {other}=null)."
            )
    start = {"peft_type": kind} if method == "peft" else {}
    if method == "peft" and (kind in NOT_HERE or kind not in PEFT_TYPE_TO_CONFIG_MAPPING):
        sections[method] = start  # which is refused where the section is checked
        return
    fresh = adapter_config(method, start)
    fields = adapter_fields(method, start)
    had = {name: settings[name] for name in fields if name in settings and name not in _STARTS}
    if had.get("init_lora_weights") in FROM_DATA:
        del had["init_lora_weights"]
    if kind == "ADAPTION_PROMPT":  # whose target is of PEFT's making
        had.pop("target_modules", None)
    defaults = {name: plain(getattr(fresh, name, None)) for name in fields}
    own = start | {name: value for name, value in had.items() if value != defaults[name] and value is not None}
    if method == "paca":  # of quantized weights, null as well
        own["original_weights"] = settings.get("original_weights")
    check_adapter_settings(method, own, Origins(adapter / ADAPTER_CONFIG, {}))
    check_saved(settings, adapter / ADAPTER_CONFIG)
    section = sections.get(method, {})
    asked = start | {name: value for name, value in section.items() if name in fields}
    check_adapter_settings(method, asked, origins)
    for name, given in asked.items():
        was = had.get(name, defaults[name])
        if name not in _STARTS and not name.startswith("init_") and _differ(given, was):
            raise PacaError(
                f"{origins.of(f'{method}.{name}')}: {method}.{name} is {_told(given)}, and {_told(was)} in the "
                f"adapter that the run trains on from ({named}). Leave it out, or begin anew without model.adapter."
            )
    sections[method] = {name: value for name, value in section.items() if name not in fields} | own  # refused there
    base, given = _base_of(adapter, place), sections["model"].get("name")
    if given is not None and _place(given) != _place(base.get("name")):  # a copy, or where it moved
        base = {key: value for key, value in base.items() if key == "quantization"}
    sections["model"] = base | sections["model"] | {"adapter": str(adapter)}


def _found(named: str, place: str) -> Path:
    from paca.pretrained.adapter_folder import expanded, find_adapter, weight_file
    from paca.pretrained.hub_adapter import adapter_of_hub

    try:
        adapter = find_adapter(named, or_model=False, or_hub=True) or adapter_of_hub(named)
        if adapter is None:
            if not os.path.exists(expanded(named)):
                raise PacaError(f"{named} is no folder here, and no adapter on the hub, as far as that can be asked.")
            raise PacaError(f"{named} is no adapter. To train a whole model on, give it as model.name.")
        weight_file(adapter)
    except PacaError as error:
        raise PacaError(f"{place}: model.adapter: {error}") from error
    return adapter.absolute()


def _method_of(settings: Mapping[str, Any], place: str, named: str) -> tuple[str, str]:
    """The section of an adapter's method, and its `peft_type`."""
    kind = str(settings.get("peft_type"))
    reason = _NOT_TRAINED_ON.get(kind)
    if reason is not None:
        raise PacaError(
            f"{place}: model.adapter: {named} can't be trained on ({kind}): {reason}. Put it into a model, give that "
            "as model.name, and begin a new adapter."
        )
    return _OWN.get(kind, "peft"), kind


def _base_of(adapter: Path, place: str) -> dict[str, Any]:
    """Keys of the section `model`: what lies beneath an adapter, as its run loaded it."""
    from paca.pretrained.adapter_folder import (
        find_base,
        find_dtype,
        find_gguf,
        find_quantization,
        find_revision,
        text_setting,
    )
    from paca.pretrained.quantizing import QUANTIZATIONS

    if text_setting(adapter, "base_model_name_or_path") is None:
        return {}
    try:
        base, quantization = find_base(adapter), find_quantization(adapter)
        # Of a GGUF file the run is to have a copy of its own, as the one in the adapter's run may go.
        found = {
            "name": find_gguf(adapter) or base,
            "dtype": find_dtype(adapter),
            "revision": find_revision(adapter, base),
        }
    except PacaError as error:
        raise PacaError(f"{place}: model.adapter: {error}") from error
    found["quantization"] = quantization if quantization in QUANTIZATIONS else None
    return {key: value for key, value in found.items() if value is not None}


def _told(value: Any) -> str:
    """A setting in a message, in YAML's words where Python has others."""
    return setting(value) if value is None or isinstance(value, bool) else shown(value)


def _place(model: Any) -> str:
    from paca.pretrained.adapter_folder import expanded

    return os.path.abspath(expanded(str(model)))  # of a hub id as good as any other words for it


def _differ(given: Any, had: Any) -> bool:
    """Whether two settings are surely different ones: null and nothing leave it to the adapter, and layers may have
    other names, as `all-linear` is a list in the adapter."""
    if isinstance(given, dict) and given:
        return not isinstance(had, dict) or any(key not in had or _differ(one, had[key]) for key, one in given.items())
    if isinstance(given, list) and given:
        return had is None or (isinstance(had, list) and not (_within(given, had) and _within(had, given)))
    simple = (bool, int, float, str)
    return isinstance(given, simple) and (had is None or isinstance(had, simple)) and given != had


def _within(some: list[Any], others: list[Any]) -> bool:
    """Whether each is among the others, layers perhaps by a longer or a shorter name."""
    return all(
        any(one == other or f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}") for other in others)
        for one in some
    )
