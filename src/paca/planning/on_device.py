"""One training step with several methods on a device that is not here: its memory, and its simulated time."""

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
from paca.planning.device_rates import DequantizeRate, MatmulRate
from paca.planning.device_time import Efficiency, StepTime, step_time
from paca.planning.devices import Device
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
class Simulated:
    """One method on the device."""

    method: str
    r: int | None
    alpha: float | None
    """Of the adapter; None where it has no such number."""
    estimate: MemoryEstimate
    """At the longest sequences: what it takes in memory."""
    time: StepTime
    """At sequences of typical length."""
    tokens: int
    """Per step, of these."""

    @property
    def tokens_per_second(self) -> float:
        """Simulated, padding included."""
        return self.tokens / self.time.total

    @property
    def adapter(self) -> str:
        """What is trained, in words."""
        known = [f"{name} {value:g}" for name, value in (("r", self.r), ("alpha", self.alpha)) if value is not None]
        layers = [f"{self.estimate.layers:,} layers"] if self.estimate.layers else []
        return ", ".join([*known, *layers, f"{self.estimate.trainable:,} parameters trained"])

    def hours(self, steps: int) -> float:
        """Simulated, of `steps` optimizer steps."""
        return steps * self.time.total / 3600


@dataclass(frozen=True)
class OnDevice:
    """What was simulated."""

    device: Device
    rows: tuple[Simulated, ...]
    dtype: torch.dtype
    """What its matrix products are computed in."""
    refused: tuple[str, ...] = ()
    """Methods that can't be planned here, and why."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the device lacks, for people: nothing, or bfloat16 and what is older than it."""
        if self.device.has_bfloat16:
            return ()
        units = f"The {self.device.title} has no units for bfloat16."
        if self.dtype == torch.bfloat16:
            units += " Products are counted at its rate in float32. float16 is faster: --dtype, or a run's model.dtype."
        else:
            units += f" This is planned in {str(self.dtype).removeprefix('torch.')}."
        return (
            units,
            "torch has no flash attention for it, and the simulation takes it to have one. So attention takes longer "
            "than shown, and in models with grouped heads more memory (which --padded counts).",
        )


def simulate_on(
    model: PreTrainedModel,
    setting: Setting,
    adapter: PeftConfig | None,
    device: Device,
    *,
    compare: bool = False,
    typical_length: int | None = None,
    made: Sequence[MemoryEstimate] = (),
) -> OnDevice:
    """Simulate a step on `device`, of which nothing is measured.

    Args:
        model: On the meta device, without its adapter.
        setting: How it is trained.
        adapter: Of what is planned; None for a full training.
        device: As of `find_device`.
        compare: Also with the other methods, of as many parameters: PaCA, LoRA with PEFT's defaults and tuned, and
            both on NF4 weights. Beside a full training they have r 16.
        typical_length: Tokens to which batches are padded on average, for the time; those of `setting` if None.
        made: Estimates with `adapter` that need not be made again; for the time, with operators.

    Raises:
        PacaError: The model can't be planned.
    """
    rows: list[Simulated] = []
    refused: list[str] = []
    for method, config, change in _methods(model, setting, adapter, compare):
        wanted = replace(setting, device="cuda", **change)
        if config is not None and isinstance(setting.reference, torch.dtype):  # of a model that is trained in full
            wanted = replace(wanted, reference="without adapter" if setting.trainer == "dpo" else None)
        try:
            if rows and adapter is not None and config is not None:
                config = _with_parameters(model, config, rows[0].estimate.trainable)
            known = () if rows else made
            longest = _known(known, wanted, typical_length is None)
            longest = longest or estimate(model, wanted, config, timed=typical_length is None)
            typical = longest
            if typical_length is not None:
                shorter = replace(wanted, sequence_length=typical_length)
                typical = _known(known, shorter, True) or estimate(model, shorter, config, timed=True)
        except PacaError as error:
            if not rows:
                raise
            refused.append(f"{method}: {error}")
            continue
        time = step_time(typical.operators, device)
        alpha = getattr(config, "paca_alpha", getattr(config, "lora_alpha", None))
        rows.append(
            Simulated(method, getattr(config, "r", None), alpha, longest, time, typical.setting.tokens_per_step)
        )
    dtype = setting.autocast or next(model.parameters()).dtype
    return OnDevice(device, tuple(rows), dtype, tuple(refused))


def _known(made: Sequence[MemoryEstimate], setting: Setting, timed: bool) -> MemoryEstimate | None:
    return next((one for one in made if one.setting == setting and (one.operators or not timed)), None)


def rates_on(device: Device, dtype: Any) -> tuple[MatmulRate, DequantizeRate]:
    """What `fit` ranks settings by: the rates of the table, in place of measured ones."""
    efficiency, source = Efficiency(), f"simulated, from the data sheet of {device.title}"
    return (
        MatmulRate({1: device.peak_of(dtype) * efficiency.product}, source),
        DequantizeRate(device.bandwidth * efficiency.bandwidth, source),
    )


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
