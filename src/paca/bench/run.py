"""A whole benchmark: prepares the methods, takes the measurements, hands out the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from paca.bench.base_model import BaseModel, build_base_model
from paca.bench.compilation import room_for_many_models
from paca.bench.memory_runs import measure_limits, measure_peaks
from paca.bench.methods import Method, MethodUnavailable, find_methods
from paca.bench.per_layer import per_layer
from paca.bench.recorder import Measured, Recorder
from paca.bench.rows import Row
from paca.bench.saved_activations import measure_saved_activations
from paca.bench.settings import BenchSettings, Point
from paca.bench.step import TrainingStep
from paca.bench.step_budget import PHASES, count_launches, profile_step, time_phases
from paca.bench.switching import RECOMPILATIONS, add_second_adapter, count_recompilations, time_switches
from paca.bench.timing import time_rounds
from paca.messages.errors import PacaError
from paca.messages.out_of_memory import failure_reason

_SWITCH_POINT = Point(1, 8)  # small, so that the forward pass beside the switch is short
_SWITCH_ROUNDS = 20
_Result = TypeVar("_Result")


def run_benchmark(settings: BenchSettings, write: Callable[[list[Row]], None], say: Callable[[str], None]) -> None:
    """Measure, and hand out the rows as they come; what was measured before an interruption is not lost.

    Args:
        settings: What to measure.
        write: Takes the rows of one measurement.
        say: Takes lines about the progress.

    Raises:
        PacaError: Unknown names, settings that don't go with the model, or no method that can run.
    """
    methods = find_methods(settings.methods)
    settings = replace(settings, methods=tuple(method.name for method in methods))
    if settings.baseline is not None and settings.baseline not in settings.methods:
        raise PacaError(
            f"The baseline {settings.baseline!r} is not among the methods ({', '.join(settings.methods)}). Add it, or "
            "choose another with --baseline."
        )
    say(f"making {settings.model} on {settings.torch_device}")
    base = build_base_model(settings)
    recorder = Recorder(settings, base, write)
    with room_for_many_models() if settings.variants[1:] else nullcontext():
        _Benchmark(settings, base, recorder, methods, say).run()


class _Benchmark:
    def __init__(
        self,
        settings: BenchSettings,
        base: BaseModel,
        recorder: Recorder,
        methods: list[Method],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.base, self.recorder, self.say = settings, base, recorder, say
        self.points = settings.points(base.vision)
        self._four_bit: BaseModel | None = None
        self.models: dict[str, nn.Module] = {}
        self.methods: dict[str, Method] = {}
        unavailable = Measured("method", "", Point(0, 0), missing="unavailable")
        for method in methods:
            try:
                model = self.prepared(method)
            except MethodUnavailable as error:
                unavailable.add(method.name, [], str(error))
                say(f"{method.name} is unavailable: {error}")
                continue
            self.methods[method.name], self.models[method.name] = method, model
            recorder.trainable[method.name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if unavailable.samples:
            recorder.record(unavailable)
        if not self.models:
            raise PacaError(f"None of the methods can run here. {next(iter(unavailable.notes.values()))}")
        recorder.baseline = settings.baseline or ("frozen" if "frozen" in self.models else next(iter(self.models)))
        if settings.baseline is None and recorder.baseline != "frozen":
            say(f"ratios are to {recorder.baseline}, the first method, as frozen is not among them")

    def prepared(self, method: Method) -> nn.Module:
        """A model of the method's own over the shared weights."""
        base = self.base
        if method.four_bit:
            base = self._four_bit = self._four_bit or build_base_model(self.settings, four_bit=True)
        return method.apply(base.copy_sharing_weights(), self.settings.rank)

    def run(self) -> None:
        settings = self.settings
        for point in self.points:
            for variant in settings.variants:
                if variant == "cuda-graphs" and settings.torch_device.type != "cuda":
                    self.say(f"CUDA graphs need a CUDA device, and this is {settings.torch_device}: left out")
                    continue
                if "time" in settings.measure:
                    self.time(point, variant)
                if "saved" in settings.measure:
                    self.saved(point, variant)
                if "launches" in settings.measure:
                    self.launches(point, variant)
            if settings.profile:
                self.profile(point)
        if "switch" in settings.measure:
            self.switches()
        if settings.compile:
            self.recompilations()
        # The children need the memory that the models of this process hold.
        names = list(self.models)
        self.models.clear()
        self._four_bit = None
        self.base.model.to("meta")
        if settings.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        if "memory" in settings.measure:
            measure_peaks(settings, names, self.points, self.recorder, self.say)
        for measure in ("max-seq", "max-batch"):
            if measure in settings.measure:
                measure_limits(measure, settings, names, self.base.vision, self.recorder, self.say)

    def step(self, name: str, point: Point, variant: str = "eager") -> TrainingStep:
        return TrainingStep(self.models[name], self.base, self.settings, point, variant)

    def time(self, point: Point, variant: str) -> None:
        """Step times, and what follows from them."""
        settings = self.settings
        self.say(f"timing batch {point.batch}, seq {point.seq}, {variant}: {settings.rounds} rounds")
        timings = time_rounds(
            {name: self.step(name, point, variant) for name in self.models},
            rounds=settings.rounds,
            warmup=settings.warmup,
            steps_per_round=settings.steps,
        )
        items, unit = (point.batch, "images/s") if self.base.vision else (point.batch * point.seq, "tokens/s")
        seconds = Measured("step_time", "s", point, variant)
        rates = Measured("throughput", unit, point, variant)
        graphs = [Measured(name, "graphs", point, variant, compare=False) for name in ("graphs", "recompilations")]
        for name, timing in timings.items():
            seconds.add(name, timing.seconds, timing.failure)
            rates.add(name, [items / value for value in timing.seconds], timing.failure)
            if variant != "eager" and not timing.failure:
                for counted in graphs:
                    counted.add(name, [float(getattr(timing, counted.metric))])
        self.recorder.record(seconds, rates, *graphs)
        if any(timing.interrupted for timing in timings.values()):
            self.say(f"interrupted after {max(map(len, seconds.samples.values()))} rounds, which are kept")
            raise KeyboardInterrupt

    def saved(self, point: Point, variant: str) -> None:
        """Saved activations: of the model, and of one block per token."""
        self.say(f"saved activations, batch {point.batch}, seq {point.seq}, {variant}")
        total = Measured("saved", "B", point, variant)
        per_token = Measured("saved_per_token_and_layer", "B", point, variant)
        units = Measured("saved_units_per_layer", "hidden states", point, variant)
        one_hidden_state = self.base.hidden_size * self.settings.torch_dtype.itemsize
        for name in self.models:
            step = self.step(name, point, variant)
            found, failure = _attempt(step, lambda step: _saved_bytes(step, self.base, variant))
            total.add(name, [] if found is None else [found[0]], failure)
            if found is not None and found[1] is not None:
                bytes_per_token = found[1] / (point.batch * max(1, point.seq))
                per_token.add(name, [bytes_per_token])
                units.add(name, [bytes_per_token / one_hidden_state])
        self.recorder.record(total, per_token, units)

    def launches(self, point: Point, variant: str) -> None:
        """Kernels launched in a step, and in the forward and backward pass of one block."""
        self.say(f"kernel launches, batch {point.batch}, seq {point.seq}, {variant}")
        cuda = self.settings.torch_device.type == "cuda"
        unit, note = ("launches", "") if cuda else ("operators", "a CPU launches no kernels: operators called")
        whole, layer = (Measured(f"launches_per_{of}", unit, point, variant) for of in ("step", "layer"))
        for name in self.models:
            step = self.step(name, point, variant)
            found, failure = _attempt(step, lambda step: _launches(step, self.base))
            whole.add(name, [] if found is None else [found[0]], failure or note)
            if found is not None and found[1] is not None:
                layer.add(name, [found[1]], note)
        self.recorder.record(whole, layer)

    def profile(self, point: Point) -> None:
        """Phases, interleaved like the step times, then the kinds of operators."""
        self.say(f"profiling batch {point.batch}, seq {point.seq}")
        steps: dict[str, TrainingStep] = {}
        for name in self.models:
            step = self.step(name, point)
            _, failure = _attempt(step, lambda step: [time_phases(step) for _ in range(self.settings.warmup + 1)])
            if failure:
                self.say(f"{name} can't be profiled: {failure}")
            else:
                steps[name] = step
        samples: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in steps} for phase in PHASES}
        order = list(steps.items())
        for _ in range(self.settings.rounds):
            order.append(order.pop(0))
            for name, step in order:
                for phase, seconds in time_phases(step).items():
                    samples[phase][name].append(seconds)
        ranks = {name: dict(method.chosen).get("r", self.settings.rank) for name, method in self.methods.items()}
        budgets = {name: profile_step(step, ranks[name]) for name, step in steps.items()}
        kinds = dict.fromkeys(kind for budget in budgets.values() for kind in budget)
        values = {f"phase: {phase}": by_method for phase, by_method in samples.items()} | {
            f"kind: {kind}": {name: [budget.get(kind, 0.0)] for name, budget in budgets.items()} for kind in kinds
        }
        self.recorder.record(*(Measured(m, "s", point, compare=False, samples=dict(v)) for m, v in values.items()))

    def switches(self) -> None:
        """Time from one adapter to another."""
        self.say("switching adapters")
        point = Point(1, 0) if self.base.vision else _SWITCH_POINT
        found = Measured("switch_time", "s", point, missing="unavailable")
        self.with_two_adapters([found], lambda step: [time_switches(step, _SWITCH_ROUNDS)])

    def recompilations(self) -> None:
        """Graphs that a compiled model makes after its first steps and after a switch of adapters."""
        self.say("counting recompilations")
        shared: dict[str, Any] = {"variant": "compiled", "compare": False, "missing": "unavailable"}
        found = [Measured(f"recompilations: {kind}", "graphs", self.points[0], **shared) for kind in RECOMPILATIONS]
        self.with_two_adapters(found, lambda step: [[float(count)] for count in count_recompilations(step)])

    def with_two_adapters(
        self, found: Sequence[Measured], measure: Callable[[TrainingStep], Sequence[Sequence[float]]]
    ) -> None:
        """Take measurements of models that have two adapters, and record them."""
        first = found[0]
        for name, method in self.methods.items():
            try:
                model = self.prepared(method)
                add_second_adapter(model, method)
            except MethodUnavailable as error:
                for one in found:
                    one.add(name, [], str(error))
                continue
            step = TrainingStep(model, self.base, self.settings, first.point, first.variant)
            for one, samples in zip(found, measure(step), strict=True):
                one.add(name, samples)
        self.recorder.record(*found)


def _saved_bytes(step: TrainingStep, base: BaseModel, variant: str) -> tuple[float, float | None]:
    """Of the whole model, and of one block."""

    def measure() -> float:
        return float(measure_saved_activations(step.forward, step.model).bytes)

    return measure(), per_layer(measure, step, base) if variant == "eager" else None


def _launches(step: TrainingStep, base: BaseModel) -> tuple[float, float | None]:
    """In a whole step, and in the forward and backward pass of one block."""
    return count_launches(step), per_layer(lambda: count_launches(step, optimizer=False), step, base)


def _attempt(step: TrainingStep, measure: Callable[[TrainingStep], _Result]) -> tuple[_Result | None, str | None]:
    """What `measure` gives, or why it failed; the other methods are measured all the same."""
    try:
        return measure(step), None
    except (RuntimeError, MemoryError) as error:
        failure = failure_reason(error)
    step.abandon()  # not in the except clause: there the error still holds the graph
    return None, failure
