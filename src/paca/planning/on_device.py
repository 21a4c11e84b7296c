"""One training step with several methods on a device that is not here: its memory, and its simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from paca.planning.device_rates import DequantizeRate, MatmulRate
from paca.planning.device_time import Efficiency, StepTime, step_time
from paca.planning.devices import Device
from paca.planning.memory_estimate import MemoryEstimate
from paca.planning.methods import Planned, plan_methods
from paca.planning.setting import Setting


@dataclass(frozen=True)
class Simulated(Planned):
    """One method on the device."""

    time: StepTime
    """At sequences of typical length."""

    @property
    def tokens_per_second(self) -> float:
        """Simulated, padding included."""
        return self.typical.setting.tokens_per_step / self.time.total

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
    planned, refused = plan_methods(
        model,
        replace(setting, device="cuda"),
        adapter,
        compare=compare,
        typical_length=typical_length,
        made=made,
        timed=True,
    )
    rows = [Simulated(**vars(row), time=step_time(row.typical.operators, device)) for row in planned]
    dtype = setting.autocast or next(model.parameters()).dtype
    return OnDevice(device, tuple(rows), dtype, tuple(refused))


def rates_on(device: Device, dtype: Any) -> tuple[MatmulRate, DequantizeRate]:
    """What `fit` ranks settings by: the rates of the table, in place of measured ones."""
    efficiency, source = Efficiency(), f"simulated, from the data sheet of {device.title}"
    return (
        MatmulRate({1: device.peak_of(dtype) * efficiency.product}, source),
        DequantizeRate(device.bandwidth * efficiency.bandwidth, source),
    )
