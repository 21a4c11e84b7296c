"""One whole plan: what a training takes here, or on a device that is simulated, and what fits into a budget."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import torch

from paca.messages.errors import PacaError
from paca.planning.budget import available_memory
from paca.planning.device_rates import (
    DequantizeRate,
    MatmulRate,
    fixed_rate,
    given_bandwidth,
    measure_dequantize_rate,
    measure_rate,
)
from paca.planning.devices import Device
from paca.planning.fitting import TECHNIQUES, Fit, Technique, fit, step_seconds
from paca.planning.memory_estimate import MemoryEstimate, estimate
from paca.planning.methods import Planned, plan_methods
from paca.planning.on_device import OnDevice, rates_on, simulate_on
from paca.planning.passes import task_of
from paca.planning.setting import Setting
from paca.planning.target import Target

STEPS = 1000
"""Optimizer steps whose hours are told where nothing says how many there are."""


@dataclass(frozen=True)
class Wanted:
    """What is to be planned of a target."""

    memory: int | None = None
    """A budget in bytes: the fastest setting that fits is searched."""
    global_batch: int = 16
    """Sequences in an optimizer step, for the search."""
    lean: bool = False
    recompute: bool = False
    checkpointing: bool = False
    padded: bool = False
    """These four: also where the target's setting has them off. A search then tries nothing without them."""
    batch_size: int | None = None
    """Sequences in a forward pass, for a search that tries no others."""
    quantization: str | None = None
    """`none`, `nf4`, `fp4` or `int8`; for a search also `auto` (16 bits if they fit) and `any` (the faster). None: as
    the target has it, or `auto`."""
    loss: str = "chunked"
    """`chunked`, `full`, or for a search `any`."""
    rate: float | None = None
    """Operations per second of the device; None: measured, if it is here."""
    bandwidth: float | None = None
    """Bytes per second, for unpacking quantized weights; None: measured, if it is here."""
    on: Device | None = None
    """Simulate this one, of which nothing is measured."""
    compare: bool = False
    """Plan other methods as well."""
    steps: int | None = None
    """Optimizer steps whose hours are told; None: the target's, else `STEPS`."""


@dataclass(frozen=True)
class Outcome:
    """What was planned."""

    target: Target
    result: MemoryEstimate
    typical: MemoryEstimate
    """As `result`, for sequences of typical length: what a step takes in time."""
    rate: MatmulRate | None
    unpacking: DequantizeRate | None
    budget: int | None
    found: Fit | None
    simulated: OnDevice | None
    """What stands in place of the time floor. No number of it is measured."""
    steps: int
    """Whose hours are told."""
    methods: tuple[Planned, ...] = ()
    """The planned one and others, to compare them on this machine."""
    refused: tuple[str, ...] = ()
    """Those that can't be planned, and why."""

    def seconds(self) -> float | None:
        """Time floor of a step."""
        return None if self.rate is None else step_seconds(self.typical, self.rate, self.unpacking)


def plan(target: Target, wanted: Wanted) -> Outcome:
    """Plan all that is wanted.

    Args:
        target: The model with its adapter, and the setting to start from.
        wanted: Its budget, or what else to change.

    Raises:
        PacaError: Nothing fits, the model can't be planned, or it does not go with what is wanted.
    """
    ways = _ways_to_keep_weights(target, wanted)
    setting = _setting(target, wanted)
    rate, unpacking = _rates(target, wanted, setting.device, ways)
    found, budget = None, wanted.memory
    if budget is not None:
        budget = budget if wanted.on is None else min(budget, wanted.on.usable)
        found = fit(
            target.model,
            setting,
            memory=budget,
            global_batch=wanted.global_batch,
            adapter=target.adapter,
            techniques=_techniques(wanted),
            batch_size=wanted.batch_size,
            rate=rate,
            dequantize=unpacking,
            any_loss=wanted.loss == "any",
            quantizations=ways,
            fastest_weights=wanted.quantization == "any",
        )
    elif wanted.on is not None:
        budget = wanted.on.usable
    else:
        with suppress(PacaError):  # a plan for a GPU that is not here
            budget = available_memory(setting.device)
    timed = wanted.on is not None
    result = typical = (
        estimate(target.model, setting, target.adapter, timed=timed and target.typical_length is None)
        if found is None
        else found.best.estimate
    )
    simulated = None
    if target.typical_length is not None:
        shorter = replace(result.setting, sequence_length=target.typical_length)
        typical = estimate(target.model, shorter, target.adapter, timed)
    if wanted.on is not None:
        simulated = simulate_on(
            target.model,
            result.setting,
            target.adapter,
            wanted.on,
            compare=wanted.compare,
            typical_length=target.typical_length,
            made=(result, typical),
        )
    methods: list[Planned] = []
    refused: list[str] = []
    if wanted.compare and wanted.on is None:
        methods, refused = plan_methods(target.model, result.setting, target.adapter, compare=True, made=(result,))
    steps = wanted.steps or target.steps or STEPS
    return Outcome(
        target, result, typical, rate, unpacking, budget, found, simulated, steps, tuple(methods), tuple(refused)
    )


def _ways_to_keep_weights(target: Target, wanted: Wanted) -> tuple[str | None, ...]:
    """Those that a search tries, the preferred one first; without a search, the only one."""
    asked = wanted.quantization
    classifies = task_of(target.model) != "text"
    if classifies and (wanted.compare or asked not in (None, "none")):
        raise PacaError("--compare and --quantization go with language models, not with classifiers. Leave them out.")
    as_it_is = _quantization(target.setting, asked)
    if wanted.memory is None or asked not in (None, "auto", "any") or as_it_is is not None or classifies:
        return (as_it_is,)  # of a classifier a head would be quantized before it is trained
    return (None, "nf4")


def _quantization(setting: Setting, asked: str | None) -> str | None:
    if asked is None:
        return setting.quantization
    return None if asked in ("none", "auto", "any") else asked


def _setting(target: Target, wanted: Wanted) -> Setting:
    given = target.setting
    return replace(
        given,
        quantization=_quantization(given, wanted.quantization),
        lean=given.lean or wanted.lean or wanted.recompute,
        recompute="mlp" if wanted.recompute else given.recompute,
        checkpointing=given.checkpointing or wanted.checkpointing,
        padded=True if wanted.padded else given.padded,
        chunked_loss=given.chunked_loss and wanted.loss != "full",
    )


def _techniques(wanted: Wanted) -> tuple[Technique, ...]:
    """Those that a search tries: all that have what is asked for."""
    asked = Technique(wanted.lean or wanted.recompute, "mlp" if wanted.recompute else None, wanted.checkpointing)
    having = (
        each
        for each in TECHNIQUES
        if each.lean >= asked.lean
        and asked.recompute in (None, each.recompute)
        and each.checkpointing >= asked.checkpointing
    )
    return tuple(having) or (asked,)


def _rates(
    target: Target, wanted: Wanted, device: str, ways: tuple[str | None, ...]
) -> tuple[MatmulRate | None, DequantizeRate | None]:
    """How fast the device is, as far as that is given or can be measured."""
    if wanted.on is not None:
        return rates_on(wanted.on, target.dtype)
    here = device == "cpu" or torch.cuda.is_available()
    rate, unpacking = None, None
    if wanted.rate is not None:
        rate = fixed_rate(wanted.rate)
    elif here:
        rate = measure_rate(device, target.dtype, target.hidden_size)
    if wanted.bandwidth is not None:
        unpacking = given_bandwidth(wanted.bandwidth)
    elif here and (quantization := ways[-1]) is not None:
        with suppress(PacaError) if len(ways) > 1 else nullcontext():  # the search says what it can't consider
            unpacking = measure_dequantize_rate(device, target.dtype, target.hidden_size, quantization)
    return rate, unpacking
