"""The fastest way to train a model within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from peft import PeftConfig
from transformers import PreTrainedConfig

from paca.errors import PacaError
from paca.planning.estimate import FRAMEWORK, MemoryEstimate, PlannedModel, estimate, prepare_model
from paca.planning.matmul_rate import MatmulRate, fixed_rate
from paca.planning.setting import Setting
from paca.planning.simulated_step import WEIGHTS
from paca.training.memory import format_bytes

LEAN_SLOWDOWN = 1.02
"""Time of a step with lean blocks over one without, beyond matrix products: a preference for stock blocks where both
fit the same batch, not a forecast."""


@dataclass(frozen=True)
class Candidate:
    """The largest batch that fits with one choice of techniques."""

    estimate: MemoryEstimate
    seconds: float
    """Time floor of one optimizer step."""
    fits: bool

    @property
    def setting(self) -> Setting:
        """Its setting."""
        return self.estimate.setting


@dataclass(frozen=True)
class Fit:
    """What was found."""

    candidates: tuple[Candidate, ...]
    """One for each choice of techniques, fastest first; those that do not fit come last, with a batch of one."""
    refused: tuple[str, ...]
    """Choices that this model does not allow, and why."""

    @property
    def best(self) -> Candidate:
        """The fastest that fits."""
        return self.candidates[0]

    @property
    def setting(self) -> Setting:
        """The fastest setting that fits."""
        return self.best.setting


def fit(
    model: str | PreTrainedConfig | PlannedModel,
    base: Setting,
    *,
    memory: int,
    global_batch: int,
    adapter: PeftConfig | None = None,
    rate: MatmulRate | None = None,
    any_loss: bool = False,
) -> Fit:
    """Find the fastest setting for `base.sequence_length` within `memory`.

    All choices of lean blocks, recomputed MLPs and activation checkpointing are tried, each with the largest batch that
    fits among the divisors of `global_batch`; the rest of it is gradient accumulation.

    Args:
        model: as in :func:`paca.planning.estimate`.
        base: what is not searched: sequence length, padding, autocast, optimizer, device, and the loss.
        memory: the budget in bytes, the framework's overhead included.
        global_batch: sequences per optimizer step.
        adapter: put into the model first.
        rate: of the device's matrix products; without it every batch size is taken to run at the same rate.
        any_loss: also choose between the chunked and the full loss.

    Raises:
        PacaError: nothing fits, or the model can't be planned.
    """
    if global_batch < 1:
        raise PacaError(f"The global batch is {global_batch} sequences; it must be 1 or more.")
    prepared = prepare_model(model, adapter)
    rate = rate or fixed_rate(1e12)
    candidates, refused = [], []
    for choice in _choices(base, any_loss):
        try:
            candidate = _largest_batch(prepared, choice, memory, global_batch, rate)
        except PacaError as error:
            if not choice.lean:  # without lean blocks the model itself can't be planned
                raise
            if str(error) not in refused:
                refused.append(str(error))
            continue
        candidates.append(candidate)
        if _fixed(candidate.estimate) > memory:
            break  # no technique changes that
        if len(candidates) == 1 and candidates[0].fits and candidates[0].setting.batch_size == global_batch:
            break  # the fewest operations at the highest rate: nothing is faster
    candidates.sort(key=lambda candidate: (not candidate.fits, candidate.seconds))
    if not candidates[0].fits:
        raise PacaError(_nothing_fits(candidates, memory))
    return Fit(tuple(candidates), tuple(refused))


def step_seconds(estimate_: MemoryEstimate, rate: MatmulRate) -> float:
    """Least time of one optimizer step in seconds: its matrix products and attention at the measured rate."""
    return estimate_.flops / rate.at(estimate_.setting.tokens_per_pass)


_LEAN: tuple[tuple[bool, Literal["mlp"] | None], ...] = ((False, None), (True, None), (True, "mlp"))


def _choices(base: Setting, any_loss: bool) -> Iterator[Setting]:
    """From the fewest operations to the most."""
    for checkpointing in (False, True):
        for lean, recompute in _LEAN:
            if checkpointing and recompute:
                continue  # a checkpointed block is recomputed whole already
            for chunked in (False, True) if any_loss else (base.chunked_loss,):
                yield replace(base, lean=lean, recompute=recompute, checkpointing=checkpointing, chunked_loss=chunked)


def _largest_batch(model: PlannedModel, choice: Setting, memory: int, global_batch: int, rate: MatmulRate) -> Candidate:
    divisors = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
    found: MemoryEstimate | None = None
    low, high = 0, len(divisors)  # those below low fit, those from high on do not
    while low < high:
        middle = (low + high) // 2
        batch_size = divisors[middle]
        setting = replace(choice, batch_size=batch_size, gradient_accumulation=global_batch // batch_size)
        tried = estimate(model, setting)
        if tried.total <= memory:
            found, low = tried, middle + 1
        else:
            high = middle
            if middle == 0:
                return Candidate(tried, _seconds(tried, rate), fits=False)
    assert found is not None
    return Candidate(found, _seconds(found, rate), fits=True)


def _seconds(estimate_: MemoryEstimate, rate: MatmulRate) -> float:
    return step_seconds(estimate_, rate) * (LEAN_SLOWDOWN if estimate_.setting.lean else 1.0)


def _nothing_fits(candidates: list[Candidate], memory: int) -> str:
    smallest = min(candidates, key=lambda candidate: candidate.estimate.total).estimate
    fixed = _fixed(smallest)
    advice = (
        "The weights alone leave no room; take a smaller model or a 16-bit dtype."
        if fixed > memory
        else f"Of that, {format_bytes(fixed)} are weights and framework; the rest shrinks with the sequence length "
        f"(now {smallest.setting.sequence_length})."
    )
    return (
        f"Nothing fits into {format_bytes(memory)}: the least is {format_bytes(smallest.total)}, with one sequence at "
        f"a time and {smallest.setting.techniques()}. {advice}"
    )


def _fixed(estimate_: MemoryEstimate) -> int:
    return sum(estimate_.parts[name] for name in (WEIGHTS, FRAMEWORK) if name in estimate_.parts)
