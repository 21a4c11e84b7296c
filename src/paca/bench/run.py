"""A whole benchmark: prepares the methods, takes the measurements, hands out the rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from paca.bench.base_model import BaseModel, build_base_model
from paca.bench.compilation import room_for_many_models
from paca.bench.four_bit import require_bitsandbytes
from paca.bench.memory_runs import measure_limits, measure_peaks
from paca.bench.method import Adaptation, Method, MethodUnavailable, apply_method
from paca.bench.methods import find_methods
from paca.bench.recorder import Recorder
from paca.bench.rows import Row
from paca.bench.saved_activations import measure_saved_activations
from paca.bench.saved_per_layer import measure_saved_per_layer
from paca.bench.settings import BenchSettings, Point
from paca.bench.step import TrainingStep
from paca.bench.step_budget import PHASES, profile_step, time_phases
from paca.bench.switching import add_second_adapter, count_recompilations, time_switches
from paca.bench.timing import time_rounds
from paca.messages.errors import PacaError
from paca.messages.out_of_memory import failure_reason

_SWITCH_POINT = Point(1, 8)  # small, so that the forward pass beside the switch is short
_SWITCH_ROUNDS = 20


def run_benchmark(settings: BenchSettings, write: Callable[[list[Row]], None], say: Callable[[str], None]) -> None:
    """Measure, and hand out the rows as they come; what was measured before an interruption is not lost.

    Args:
        settings: what to measure.
        write: takes the rows of one measurement.
        say: takes lines about the progress.

    Raises:
        PacaError: unknown names, settings that don't go with the model, or no method that can run.
    """
    methods = find_methods(settings.methods)
    settings = replace(settings, methods=tuple(method.name for method in methods))
    if settings.baseline not in settings.methods:
        raise PacaError(
            f"The baseline {settings.baseline!r} is not among the methods ({', '.join(settings.methods)}). Add it, or "
            "choose another with --baseline."
        )
    say(f"making {settings.model} on {settings.torch_device}")
    base = build_base_model(settings)
    recorder = Recorder(settings, base, write)
    with room_for_many_models() if settings.compile else nullcontext():
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
        self.adaptation = Adaptation(settings.rank, base.targets)
        self.points = settings.points(base.vision)
        self._four_bit: BaseModel | None = None
        self.models: dict[str, nn.Module] = {}
        self.unavailable: dict[str, str] = {}
        self.methods: dict[str, Method] = {}
        for method in methods:
            try:
                model = self.prepared(method)
            except MethodUnavailable as error:
                self.unavailable[method.name] = str(error)
                say(f"{method.name} is unavailable: {error}")
                continue
            self.methods[method.name], self.models[method.name] = method, model
            recorder.trainable[method.name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.unavailable:
            nothing: dict[str, list[float]] = {name: [] for name in self.unavailable}
            recorder.record("method", "", nothing, Point(0, 0), notes=self.unavailable)
        if not self.models:
            raise PacaError(f"None of the methods can run here. {next(iter(self.unavailable.values()))}")

    def prepared(self, method: Method) -> nn.Module:
        """A model of the method's own over the shared weights."""
        if not method.four_bit:
            return apply_method(method, self.base.copy_sharing_weights(), self.adaptation)
        require_bitsandbytes()
        if self._four_bit is None:
            self._four_bit = build_base_model(self.settings, four_bit=True)
        return apply_method(method, self._four_bit.copy_sharing_weights(), self.adaptation)

    def run(self) -> None:
        settings = self.settings
        variants = ["eager", *(["compiled"] if settings.compile else [])]
        for point in self.points:
            for variant in variants:
                if "time" in settings.measure:
                    self.time(point, variant)
                if "saved" in settings.measure:
                    self.saved(point, variant)
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

    def step(self, name: str, point: Point, variant: str) -> TrainingStep:
        return TrainingStep(self.models[name], self.base, self.settings, point, compiled=variant == "compiled")

    def time(self, point: Point, variant: str) -> None:
        """Step times, and what follows from them."""
        settings = self.settings
        self.say(f"timing batch {point.batch}, seq {point.seq}, {variant}: {settings.rounds} rounds")
        timings = time_rounds(
            {name: self.step(name, point, variant) for name in self.models},
            rounds=settings.rounds,
            warmup=settings.warmup,
            steps_per_round=settings.steps,
            device=settings.torch_device,
        )
        failures = {name: timing.failure for name, timing in timings.items() if timing.failure}
        seconds = {name: timing.seconds for name, timing in timings.items()}
        self.recorder.record("step_time", "s", seconds, point, variant=variant, notes=failures, failed=True)
        items, unit = (point.batch, "images/s") if self.base.vision else (point.batch * point.seq, "tokens/s")
        rates = {name: [items / value for value in values] for name, values in seconds.items()}
        self.recorder.record("throughput", unit, rates, point, variant=variant, notes=failures, failed=True)
        if variant == "compiled":
            for metric in ("graphs", "recompilations"):
                counts = {name: [float(getattr(t, metric))] for name, t in timings.items() if not t.failure}
                self.recorder.record(metric, "graphs", counts, point, variant=variant, compare=False)
        if any(timing.interrupted for timing in timings.values()):
            self.say(f"interrupted after {max(map(len, seconds.values()))} rounds, which are kept")
            raise KeyboardInterrupt

    def saved(self, point: Point, variant: str) -> None:
        """Saved activations: of the model, and of one block per token."""
        self.say(f"saved activations, batch {point.batch}, seq {point.seq}, {variant}")
        total: dict[str, list[float]] = {}
        per_token: dict[str, list[float]] = {}
        units: dict[str, list[float]] = {}
        notes: dict[str, str] = {}
        for name in self.models:
            step = self.step(name, point, variant)
            try:
                total[name] = [float(measure_saved_activations(step.forward, step.model).bytes)]
                layer = measure_saved_per_layer(step, self.base, point) if variant == "eager" else None
            except RuntimeError as error:
                total[name], notes[name] = [], failure_reason(error)
            if name in notes:
                step.abandon()
                continue
            if layer is not None:
                per_token[name], units[name] = [layer.bytes_per_token], [layer.units]
        self.recorder.record("saved", "B", total, point, variant=variant, notes=notes, failed=True)
        if per_token:
            self.recorder.record("saved_per_token_and_layer", "B", per_token, point, variant=variant)
            self.recorder.record("saved_units_per_layer", "hidden states", units, point, variant=variant)

    def profile(self, point: Point) -> None:
        """Phases, interleaved like the step times, then the kinds of operators."""
        self.say(f"profiling batch {point.batch}, seq {point.seq}")
        steps = {name: self.step(name, point, "eager") for name in self.models}
        failures: dict[str, str] = {}
        for name, step in steps.items():
            try:
                for _ in range(max(1, self.settings.warmup)):
                    time_phases(step)
            except RuntimeError as error:
                failures[name] = failure_reason(error)
        for name, reason in failures.items():
            self.say(f"{name} can't be profiled: {reason}")
            steps.pop(name).abandon()
        samples: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in steps} for phase in PHASES}
        order = list(steps.items())
        for _ in range(self.settings.rounds):
            order.append(order.pop(0))
            for name, step in order:
                for phase, seconds in time_phases(step).items():
                    samples[phase][name].append(seconds)
        for phase, by_method in samples.items():
            self.recorder.record(f"phase: {phase}", "s", by_method, point, compare=False)
        budgets = {name: profile_step(step, self.settings.rank) for name, step in steps.items()}
        for kind in dict.fromkeys(kind for budget in budgets.values() for kind in budget):
            values = {name: [budget.get(kind, 0.0)] for name, budget in budgets.items()}
            self.recorder.record(f"kind: {kind}", "s", values, point, compare=False)

    def switches(self) -> None:
        """Time from one adapter to another."""
        self.say("switching adapters")
        seconds: dict[str, list[float]] = {}
        notes: dict[str, str] = {}
        point = Point(1, 0) if self.base.vision else _SWITCH_POINT
        for name, method in self.methods.items():
            try:
                model = self.prepared(method)
                add_second_adapter(model, method)
            except MethodUnavailable as error:
                seconds[name], notes[name] = [], str(error)
                continue
            step = TrainingStep(model, self.base, self.settings, point)
            seconds[name] = time_switches(step, _SWITCH_ROUNDS)
        self.recorder.record("switch_time", "s", seconds, point, notes=notes)

    def recompilations(self) -> None:
        """Graphs that a compiled model makes after its first steps and after a switch of adapters."""
        self.say("counting recompilations")
        point = self.points[0]
        counts: dict[str, dict[str, list[float]]] = {"steps": {}, "first_switch": {}, "switch_back": {}}
        notes: dict[str, str] = {}
        for name, method in self.methods.items():
            try:
                model = self.prepared(method)
                add_second_adapter(model, method)
            except MethodUnavailable as error:
                notes[name] = str(error)
                for by_method in counts.values():
                    by_method[name] = []
                continue
            found = count_recompilations(TrainingStep(model, self.base, self.settings, point, compiled=True))
            for metric, by_method in counts.items():
                by_method[name] = [float(getattr(found, metric))]
        for metric, values in counts.items():
            self.recorder.record(
                f"recompilations: {metric}", "graphs", values, point, variant="compiled", notes=notes, compare=False
            )
