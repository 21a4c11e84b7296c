"""The fastest way to train a model within a memory budget."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from peft import PeftConfig
from transformers import PreTrainedConfig

from paca.messages.errors import PacaError
from paca.messages.units import format_bytes
from paca.planning.device_rates import DequantizeRate, MatmulRate, fixed_rate
from paca.planning.memory_estimate import FRAMEWORK, MemoryEstimate, PlannedModel, estimate, prepare_model
from paca.planning.setting import PAIRED, Setting
from paca.planning.step_trace import WEIGHTS

LEAN_TIME, LEAN_TIME_ON_CPU = 1.02, 0.97
"""Time of a step with lean blocks over one without: a preference where both fit the same batch, not a forecast. On CPUs
0.96 to 1.04 were measured, an AMX Xeon with the least of them (docs/notes/speed.md); elsewhere nothing was, so stock
blocks are preferred there."""


class Technique(NamedTuple):
    """What is done to save memory; as in `Setting`."""

    lean: bool
    recompute: Literal["mlp"] | None
    checkpointing: bool


TECHNIQUES = (
    *(Technique(False, None, False), Technique(True, None, False), Technique(True, "mlp", False)),
    *(Technique(False, None, True), Technique(True, None, True)),
)
"""From the fewest operations to the most. A checkpointed block is recomputed whole."""


@dataclass(frozen=True)
class Candidate:
    """The largest batch that fits with one choice of techniques."""

    estimate: MemoryEstimate
    seconds: float
    """Time floor of one optimizer step."""
    fits: bool

    @property
    def setting(self) -> Setting:
        return self.estimate.setting


@dataclass(frozen=True)
class Fit:
    """What was found."""

    candidates: tuple[Candidate, ...]
    """One for each choice of techniques, fastest first; those that do not fit come last, with a batch of one."""
    refused: tuple[str, ...]
    """Choices that this model does not allow, and why."""
    weights_reason: str | None = None
    """Why the best has its weights as it has; None if there was no choice."""

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
    dequantize: DequantizeRate | None = None,
    techniques: Sequence[Technique] = TECHNIQUES,
    batch_size: int | None = None,
    any_loss: bool = False,
    quantizations: Sequence[str | None] | None = None,
    fastest_weights: bool = False,
) -> Fit:
    """Find the fastest setting for `base.sequence_length` within `memory`.

    All choices of lean blocks, recomputed MLPs and activation checkpointing are tried, each with the largest batch that
    fits among the divisors of `global_batch`; the rest of it is gradient accumulation.

    Args:
        model: As in `paca.planning.memory_estimate`.
        base: What is not searched: sequence length, padding, autocast, optimizer, device, and the loss. Batches of
            more than one sequence are taken to hold padding whatever it says.
        memory: The budget in bytes, the framework's overhead included.
        global_batch: Sequences per optimizer step.
        adapter: Put into the model first.
        rate: Of the device's matrix products; without it every batch size is taken to run at the same rate.
        dequantize: How fast it unpacks quantized weights; without it that is left out of the times.
        techniques: Those to choose among, the one with the fewest operations first.
        batch_size: Sequences in a forward pass, instead of the most that fit.
        any_loss: Also choose between the chunked and the full loss.
        quantizations: Ways to keep the weights (see `Setting.quantization`), the preferred one first: a later one is
            chosen only where none before it fits. Without them, that of `base`.
        fastest_weights: Choose the fastest of them instead.

    Raises:
        PacaError: Nothing fits, or the model can't be planned.
    """
    if global_batch < 1:
        raise PacaError(f"The global batch is {global_batch} sequences; it must be 1 or more.")
    if batch_size is not None and (batch_size < 1 or global_batch % batch_size):
        raise PacaError(
            f"The global batch is {global_batch} sequences, which batches of {batch_size} don't make up. Give a "
            "multiple of the batch."
        )
    sizes = [
        size
        for size in range(1, global_batch + 1)
        if global_batch % size == 0
        and batch_size in (None, size)
        and replace(base, batch_size=size, gradient_accumulation=global_batch // size).answers_go_round
    ]
    if not sizes:
        raise PacaError(
            f"No batch of the {global_batch} answers in a step makes whole groups of answers to a prompt "
            "(train.num_generations). Give another --global-batch or --batch-size."
        )
    quantizations = quantizations or (base.quantization,)
    rate = rate or fixed_rate(1e12)
    refused: dict[str, None] = {}
    candidates: list[Candidate] = []
    for quantization in quantizations:
        try:
            autocast = base.autocast_adapter_dtype
            prepared = prepare_model(model, adapter, quantization, autocast_adapter_dtype=autocast)
        except PacaError as error:
            if not candidates and not refused:
                raise
            refused[str(error)] = None
            continue
        found: list[Candidate] = []
        for choice in _choices(replace(base, quantization=quantization), techniques, any_loss):
            try:
                tried = _largest_batch(prepared, choice, memory, global_batch, sizes)
            except PacaError as error:
                if not choice.lean:  # without lean blocks the model itself can't be planned
                    raise
                refused[str(error)] = None
                continue
            seconds = step_seconds(tried, rate, dequantize)
            found.append(Candidate(tried, seconds, fits=tried.total <= memory))
            # No technique makes weights and framework smaller, or this one faster.
            if _fixed(tried) > memory or _at_its_fastest(found[-1], global_batch):
                break
        candidates += found
        if any(_at_its_fastest(candidate, global_batch) for candidate in found):
            break
    if not candidates:  # the model allows none of the techniques
        raise PacaError(next(iter(refused)))
    by_time = fastest_weights and (dequantize is not None or quantizations == (None,))
    ranks = {quantization: 0 if by_time else rank for rank, quantization in enumerate(quantizations)}
    candidates.sort(key=lambda c: (not c.fits, ranks[c.setting.quantization], c.seconds))
    if not candidates[0].fits:
        raise PacaError(_nothing_fits(candidates, memory))
    reason = _weights_reason(candidates) if len(quantizations) > 1 else None
    return Fit(tuple(candidates), tuple(refused), reason)


def step_seconds(estimate_: MemoryEstimate, rate: MatmulRate, dequantize: DequantizeRate | None = None) -> float:
    """Least time of one optimizer step in seconds: its matrix products and attention, and the unpacking of weights;
    with what lean blocks were measured to add or save."""
    unpacking = 0.0 if dequantize is None else estimate_.dequantized / dequantize.bytes_per_second
    seconds = estimate_.flops / rate.at(estimate_.setting.tokens_per_pass) + unpacking
    return seconds * (_lean_time(estimate_.setting) if estimate_.setting.lean else 1)


def _largest_batch(
    model: PlannedModel, choice: Setting, memory: int, global_batch: int, sizes: Sequence[int]
) -> MemoryEstimate:
    """With as many sequences at a time as fit into `memory`; with the fewest of `sizes` where not even they fit."""

    @cache
    def tried(size: int) -> MemoryEstimate:
        return estimate(model, replace(choice, batch_size=size, gradient_accumulation=global_batch // size))

    fitting = bisect(sizes, memory, key=lambda size: tried(size).total)
    return tried(sizes[max(0, fitting - 1)])


def _at_its_fastest(candidate: Candidate, global_batch: int) -> bool:
    """Whether no technique can make it faster: the fewest operations, at the highest rate."""
    setting = candidate.setting
    fastest_blocks = setting.lean == (_lean_time(setting) < 1) and not (setting.recompute or setting.checkpointing)
    return candidate.fits and fastest_blocks and setting.batch_size == global_batch


def _lean_time(setting: Setting) -> float:
    return LEAN_TIME_ON_CPU if setting.device == "cpu" else LEAN_TIME


def _weights_reason(candidates: Sequence[Candidate]) -> str:
    """Why the first of the sorted `candidates` has its weights as it has, for people."""
    best = candidates[0]
    others = [c for c in candidates if c.setting.quantization != best.setting.quantization]
    chosen = f"Weights in {best.estimate.weights}"
    held = format_bytes(best.estimate.parts[WEIGHTS])
    if not others:
        plain = not (best.setting.recompute or best.setting.checkpointing)
        why = ": with them nothing has to be computed twice" if plain else "; no others were possible"
        return f"{chosen} ({held}){why}."
    other = others[0]
    named = f"{other.estimate.weights} ({format_bytes(other.estimate.parts[WEIGHTS])} of weights)"
    if not other.fits:
        return f"{chosen} ({held}), because {named} fits in no way that was tried."
    times = f"{other.seconds / best.seconds:.2f} of the time floor"
    if other.seconds >= best.seconds:
        return f"{chosen} ({held}): the fastest; {named} would take {times}."
    return (
        f"{chosen} ({held}), because they fit and are exact; {named} would take {times}: --quantization "
        f"{other.setting.quantization or 'none'} chooses that."
    )


def _choices(base: Setting, techniques: Sequence[Technique], any_loss: bool) -> Iterator[Setting]:
    for technique in techniques:
        for chunked in (False, True) if any_loss else (base.chunked_loss,):
            yield replace(base, **technique._asdict(), chunked_loss=chunked, padded=base.padded or None)


def _nothing_fits(candidates: list[Candidate], memory: int) -> str:
    smallest = min(candidates, key=lambda candidate: candidate.estimate.total).estimate
    fixed = _fixed(smallest)
    nothing = f"Nothing fits into {format_bytes(memory)}"
    if fixed > memory:  # so nothing else was tried
        fewer = " or fewer bits a weight (--quantization nf4)" if smallest.setting.quantization is None else ""
        return (
            f"{nothing}: the weights ({smallest.weights}) and the framework alone take {format_bytes(fixed)} and leave "
            f"no room. Take a smaller model{fewer}."
        )
    size, pairs = smallest.setting.batch_size, smallest.setting.trainer in PAIRED
    batch = f"one {'pair' if pairs else 'sequence'}" if size == 1 else f"{size} {'pairs' if pairs else 'sequences'}"
    made = smallest.setting.answers
    answers = f" and with fewer answers at a time (now {made}; train.steps_per_generation)" if made else ""
    return (
        f"{nothing}: the least is {format_bytes(smallest.total)}, with {batch} at a time and "
        f"{smallest.setting.techniques()}. Of that, {format_bytes(fixed)} are weights and framework; the rest shrinks "
        f"with the sequence length (now {smallest.setting.sequence_length}){answers}."
    )


def _fixed(estimate_: MemoryEstimate) -> int:
    return sum(estimate_.parts[name] for name in (WEIGHTS, FRAMEWORK) if name in estimate_.parts)
