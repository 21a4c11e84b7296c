"""Models that answer in turn: the adapters of one base model share it in memory."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import NamedTuple

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import (
    adapter_settings,
    expanded,
    find_adapter,
    find_base,
    find_dtype,
    find_quantization,
    find_revision,
)
from paca.pretrained.adapter_tokenizer import saved_tokenizer
from paca.pretrained.changed_base import left_by
from paca.pretrained.generation import LoadedModel, load_for_generation
from paca.pretrained.loading import load_tokenizer
from paca.pretrained.purpose import check_answers
from paca.pretrained.put_adapter import put_adapter_on
from paca.pretrained.quantizing import QUANTIZATIONS
from paca.tuner.registration import NAME

logger = logging.getLogger(__name__)

_NAMES = ("default", "beside")
"""What PEFT calls the adapters on a model, in the order in which they were put on; there are no more."""


class _Base(NamedTuple):
    """A model in memory: adapters for which this is the same can share it."""

    name: str
    """A hub id or a path."""
    revision: str | None
    """Branch, tag or commit of a hub id."""
    quantization: str | None
    """How it is quantized as it is loaded."""
    dtype: str
    """Its dtype, as the run of the adapter has it, or "auto"."""
    alone: Path | None
    """The one adapter that goes with it, where it can't be taken off again; or the model, to be left without any."""


class ModelsInTurn:
    """Gives runs, adapters and models, each ready to answer until the next. Not for several threads at once."""

    def __init__(self) -> None:
        self._held: dict[_Base, dict[Path | None, LoadedModel]] = {}

    def load(self, path: str | Path, *, beside: str | Path | None = None) -> LoadedModel:
        """Load a run, an adapter or a model, or make it the active one of those in memory.

        Args:
            path: Its folder, or a .gguf file; a text may be a model's hub id.
            beside: Another, which stays in memory if it is there. All else is dropped.

        Raises:
            PacaError: As from `load_for_generation`.
        """
        check_answers(path)
        base, adapter = _base_of(path)
        self._drop_all_but({base, *_base_if_any(beside)})
        on_it = self._held.pop(base, {})  # comes back once all is well with it
        if not on_it:
            on_it[adapter] = load_for_generation(path)
        elif adapter is not None and adapter not in on_it:
            on_it = _with_another(on_it, adapter)
        loaded = on_it[adapter]
        if adapter is not None:
            loaded.model.set_adapter(_NAMES[list(on_it).index(adapter)])
        self._held[base] = on_it
        return loaded

    def _drop_all_but(self, wanted: set[_Base]) -> None:
        dropped = self._held.keys() - wanted
        for base in dropped:
            del self._held[base]
        if dropped:
            gc.collect()  # PEFT's models hold each other in circles


def _base_if_any(path: str | Path | None) -> list[_Base]:
    try:
        return [] if path is None else [_base_of(path)[0]]
    except PacaError:  # told when it is to answer
        return []


def _base_of(path: str | Path) -> tuple[_Base, Path | None]:
    adapter = find_adapter(path, or_hub=isinstance(path, str))  # a `Path` was found here
    if adapter is None:
        plain = expanded(path).resolve()
        return _Base(str(plain), None, None, "auto", plain), None
    settings = adapter_settings(adapter)
    can_be_taken_off = settings.get("peft_type") in (NAME, "LORA") and left_by(settings) is None
    recorded = find_quantization(adapter)
    quantization = recorded if recorded in QUANTIZATIONS else None
    base = find_base(adapter)
    alone = None if can_be_taken_off else adapter
    return _Base(base, find_revision(adapter, base), quantization, find_dtype(adapter), alone), adapter


def _with_another(on_it: dict[Path | None, LoadedModel], adapter: Path) -> dict[Path | None, LoadedModel]:
    """The adapters on a model after one more was put on it: beside the others, or in their place."""
    held = next(iter(on_it.values()))
    tokenizer = saved_tokenizer(adapter)
    if tokenizer is None:
        tokenizer = load_tokenizer(held.base, find_revision(adapter, held.base))
    if len(on_it) < len(_NAMES):
        try:
            model = put_adapter_on(held.model, adapter, held.base, _NAMES[len(on_it)])
            return {**on_it, adapter: LoadedModel(model, tokenizer, adapter, held.base)}
        except PacaError as error:  # such as of another method, which PEFT puts beside no other
            logger.info("%s takes the place of the adapter on the model: %s", adapter, error)
    model = put_adapter_on(held.model.unload(), adapter, held.base, _NAMES[0])
    return {adapter: LoadedModel(model, tokenizer, adapter, held.base)}
