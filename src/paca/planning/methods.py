"""One training step with several methods, of as many parameters: what each takes in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.planning.memory_estimate import MemoryEstimate, estimate, prepare_model
from paca.planning.setting import Setting

RANK = 16
"""Of the methods that a full training is compared with."""
_WHERE = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("target_parameters", "modules_to_save"),
)
"""Fields of PEFT's configs that say where an adapter goes."""


@dataclass(frozen=True)
class Planned:
    """One method."""

    method: str
    r: int | None
    alpha: float | None
    """Of the adapter; None where it has no such number."""
    estimate: MemoryEstimate
    """At the longest sequences: what it takes in memory."""
    typical: MemoryEstimate
    """At sequences of typical length: what a step takes in time."""

    @property
    def adapter(self) -> str:
        """What is trained, in words."""
        known = [f"{name} {value:g}" for name, value in (("r", self.r), ("alpha", self.alpha)) if value is not None]
        layers = [f"{self.estimate.layers:,} layers"] if self.estimate.layers else []
        return ", ".join([*known, *layers, f"{self.estimate.trainable:,} parameters trained"])


def plan_methods(
    model: PreTrainedModel,
    setting: Setting,
    adapter: PeftConfig | None,
    *,
    compare: bool,
    typical_length: int | None = None,
    made: Sequence[MemoryEstimate] = (),
    timed: bool = False,
) -> tuple[list[Planned], list[str]]:
    """Plan a step, and which methods can't be planned here, with the reason.

    Args:
        model: On the meta device, without its adapter.
        setting: How it is trained.
        adapter: Of what is planned, which is the first; None for a full training.
        compare: Also with the other methods, of as many parameters: PaCA, LoRA with PEFT's defaults and tuned, and
            both on NF4 weights. Beside a full training they have r 16.
        typical_length: Tokens to which batches are padded on average; those of `setting` if None.
        made: Estimates with `adapter` that need not be made again; if `timed`, with operators.
        timed: List the operators of steps of that length.

    Raises:
        PacaError: The model can't be planned.
    """
    rows: list[Planned] = []
    refused: list[str] = []
    for method, config, change in _methods(model, setting, adapter, compare):
        wanted = replace(setting, **change)
        if config is not None and isinstance(setting.reference, torch.dtype):  # of a model that is trained in full
            wanted = replace(wanted, reference="without adapter" if setting.trainer == "dpo" else None)
        try:
            if rows and adapter is not None and config is not None:
                config = _with_parameters(model, config, rows[0].estimate.trainable)
            known = () if rows else made
            longest = _known(known, wanted, timed and typical_length is None)
            longest = longest or estimate(model, wanted, config, timed=timed and typical_length is None)
            typical = longest
            if typical_length is not None:
                shorter = replace(wanted, sequence_length=typical_length)
                typical = _known(known, shorter, timed) or estimate(model, shorter, config, timed=timed)
        except PacaError as error:
            if not rows:
                raise
            refused.append(f"{method}: {error}")
            continue
        alpha = getattr(config, "paca_alpha", getattr(config, "lora_alpha", None))
        rows.append(Planned(method, getattr(config, "r", None), alpha, longest, typical))
    return rows, refused


def _known(made: Sequence[MemoryEstimate], setting: Setting, timed: bool) -> MemoryEstimate | None:
    return next((one for one in made if one.setting == setting and (one.operators or not timed)), None)


def _methods(
    model: PreTrainedModel, setting: Setting, adapter: PeftConfig | None, compare: bool
) -> Iterator[tuple[str, PeftConfig | None, dict[str, Any]]]:
    """The name, the adapter and the changes of the setting of each: what is planned first."""
    planned = method_name(adapter, setting)
    yield planned, adapter, {}
    if not compare:
        return
    rank = getattr(adapter, "r", RANK)
    places = {"target_modules": "all-linear"} if adapter is None else _places(model, adapter)
    paca = PacaConfig(r=rank, task_type="CAUSAL_LM", **places)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **places)
    plain, packed = {"quantization": None}, {"quantization": "nf4"}
    others: Sequence[tuple[str, PeftConfig, dict[str, Any]]] = (
        ("paca", paca, plain),
        ("lora", lora, {**plain, "autocast_adapter_dtype": True}),
        ("lora-tuned", lora, {**plain, "autocast_adapter_dtype": False}),
        ("qpaca", paca, packed),
        ("qlora", lora, {**packed, "autocast_adapter_dtype": True}),
    )
    yield from (other for other in others if other[0] != planned)


def _places(model: PreTrainedModel, adapter: PeftConfig) -> dict[str, Any]:
    """Where `adapter` goes, for another method to go there too, as PEFT resolved it for `model`."""
    prepared: Any = prepare_model(model, adapter)
    resolved = prepared.peft_config["default"]
    places = {name: getattr(resolved, name, None) for name in _WHERE}
    places["target_modules"] = places["target_modules"] or (set() if places["target_parameters"] else "all-linear")
    return {name: value for name, value in places.items() if value not in (None, [])}


def _with_parameters(model: PreTrainedModel, config: Any, wanted: int) -> PeftConfig:
    """With the r that comes closest to `wanted` trained parameters, a part of which has nothing to do with r."""

    def with_rank(r: int) -> Any:
        changed = copy.copy(config)
        changed.r = r
        if isinstance(changed, LoraConfig):
            changed.lora_alpha = 2 * r
        return changed

    def trained(r: int) -> int:
        return sum(p.numel() for p in prepare_model(model, with_rank(r)).parameters() if p.requires_grad)

    first = trained(1)
    return with_rank(1 + max(0, round((wanted - first) / (trained(2) - first))))


def method_name(adapter: PeftConfig | None, setting: Setting) -> str:
    """As the tables of `paca bench` have it."""
    if adapter is None:
        return "full"
    name = str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower()
    if setting.quantization is not None:
        return f"q{name}"
    return f"{name}-tuned" if name == "lora" and not setting.autocast_adapter_dtype else name
