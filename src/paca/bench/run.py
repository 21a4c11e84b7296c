"""A whole benchmark: prepares the methods, takes the measurements, hands out the rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import nn

from paca.bench.base_model import BaseModel, build_base_model
from paca.bench.memory_runs import measure_limits, measure_peaks
from paca.bench.methods import Method, MethodUnavailable, check_baseline, find_methods
from paca.bench.recorder import Recorder
from paca.bench.rows import Row
from paca.bench.saved_activations import measure_saved_activations
from paca.bench.settings import BenchSettings, Point
from paca.bench.step import TrainingStep
from paca.bench.step_budget import PHASES, count_launches, profile_step, time_phases
from paca.bench.switching import RECOMPILATIONS, add_second_adapter, count_recompilations, time_switches
from paca.bench.timing import time_rounds
from paca.lean.float32_products import fastest_products
from paca.messages.errors import PacaError
from paca.pretrained.out_of_memory import failure_reason

_SWITCH_POINT = Point(1, 8)  # small, so that the forward pass beside the switch is short
_SWITCH_ROUNDS = 20
_Result = TypeVar("_Result")


def run_benchmark(settings: BenchSettings, write: Callable[[list[Row]], None], say: Callable[[str], None]) -> None:
    """Measure, and `write` the rows as they come; what was measured before an interruption is not lost.

    Progress goes to `say`, line by line.

    Raises:
        PacaError: Unknown names, settings that don't go with the model, or no method that can run.
    """
    methods = find_methods(settings.methods)
    settings = replace(settings, methods=tuple(method.name for method in methods))
    check_baseline(settings.baseline, methods)
    say(f"making {settings.model} on {settings.torch_device}")
    base = build_base_model(settings)
    # By default dynamo gives up after 8 graphs of one function and runs it eagerly from then on, without an error.
    limits: Any = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits) if settings.variants[1:] else nullcontext():
        _Benchmark(settings, base, Recorder(settings, base, write), methods, say).run()


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
        unavailable: dict[str, tuple[list[float], str]] = {}
        for method in methods:
            try:
                model = self.prepared(method)
            except MethodUnavailable as error:
                unavailable[method.name] = [], str(error)
                say(f"{method.name} is unavailable: {error}")
                continue
            self.methods[method.name], self.models[method.name] = method, model
            recorder.trainable[method.name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if unavailable:
            recorder.record("method", "", Point(0, 0), unavailable, missing="unavailable")
        if not self.models:
            raise PacaError(f"None of the methods can run here. {next(iter(unavailable.values()))[1]}")
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
                for name, measure in (("time", self.time), ("saved", self.saved), ("launches", self.launches)):
                    if name in settings.measure:
                        measure(point, variant)
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
        for limit in ("max-seq", "max-batch"):
            if limit in settings.measure:
                measure_limits(limit, settings, names, self.base.vision, self.recorder, self.say)

    def step(self, name: str, point: Point, variant: str = "eager") -> TrainingStep:
        return TrainingStep(self.models[name], self.base, self.settings, point, variant)

    def time(self, point: Point, variant: str) -> None:
        """Step times, and what follows from them."""
        settings = self.settings
        self.say(f"timing batch {point.batch}, seq {point.seq}, {variant}: {settings.rounds} rounds")
        steps = {name: self.step(name, point, variant) for name in self.models}
        with fastest_products(settings.torch_device, settings.torch_dtype):  # as paca train
            timings = time_rounds(steps, rounds=settings.rounds, warmup=settings.warmup)
        items, unit = (point.batch, "images/s") if self.base.vision else (point.batch * point.seq, "tokens/s")
        seconds = {name: (timing.seconds, timing.failure) for name, timing in timings.items()}
        rates = {name: ([items / value for value in values], failure) for name, (values, failure) in seconds.items()}
        self.recorder.record("step_time", "s", point, seconds, variant=variant)
        self.recorder.record("throughput", unit, point, rates, variant=variant)
        for metric in ("graphs", "recompilations") if variant != "eager" else ():
            counts = {n: ([float(getattr(timing, metric))], None) for n, timing in timings.items() if timing.seconds}
            self.recorder.record(metric, "graphs", point, counts, variant=variant, compare=False)
        if any(timing.interrupted for timing in timings.values()):
            rounds = max(len(timing.seconds) for timing in timings.values())
            self.say(f"interrupted after {rounds} rounds, which are kept")
            raise KeyboardInterrupt

    def saved(self, point: Point, variant: str) -> None:
        """Saved activations: of the model, and of one block per token."""
        self.say(f"saved activations, batch {point.batch}, seq {point.seq}, {variant}")

        def measure(step: TrainingStep) -> tuple[float, float | None]:
            def saved() -> float:
                return float(measure_saved_activations(step.forward, step.model).bytes)

            return saved(), step.per_block(saved) if variant == "eager" else None

        total, blocks = self.whole_and_block(point, variant, measure)
        self.recorder.record("saved", "B", point, total, variant=variant)
        tokens = point.batch * max(1, point.seq)
        one_hidden_state = self.base.hidden_size * self.settings.torch_dtype.itemsize
        for metric, unit, share in (
            ("saved_per_token_and_layer", "B", tokens),
            ("saved_units_per_layer", "hidden states", tokens * one_hidden_state),
        ):
            found = {name: ([value / share], None) for name, value in blocks.items()}
            self.recorder.record(metric, unit, point, found, variant=variant)

    def launches(self, point: Point, variant: str) -> None:
        """Kernels launched in a step, and in the forward and backward pass of one block."""
        self.say(f"kernel launches, batch {point.batch}, seq {point.seq}, {variant}")
        cuda = self.settings.torch_device.type == "cuda"
        unit, note = ("launches", "") if cuda else ("operators", "a CPU launches no kernels: operators called")

        def measure(step: TrainingStep) -> tuple[float, float | None]:
            return count_launches(step), step.per_block(lambda: count_launches(step, optimizer=False))

        total, blocks = self.whole_and_block(point, variant, measure)
        noted = {name: (samples, failure or note) for name, (samples, failure) in total.items()}
        self.recorder.record("launches_per_step", unit, point, noted, variant=variant)
        per_block = {name: ([value], note) for name, value in blocks.items()}
        self.recorder.record("launches_per_layer", unit, point, per_block, variant=variant)

    def whole_and_block(
        self, point: Point, variant: str, measure: Callable[[TrainingStep], tuple[float, float | None]]
    ) -> tuple[dict[str, tuple[list[float], str | None]], dict[str, float]]:
        """What `measure` gives of the whole step, or why not; and of one block, where it gives that."""
        whole: dict[str, tuple[list[float], str | None]] = {}
        blocks: dict[str, float] = {}
        for name in self.models:
            step = self.step(name, point, variant)
            found, failure = _attempt(step, measure)
            whole[name] = ([] if found is None else [found[0]]), failure
            if found is not None and found[1] is not None:
                blocks[name] = found[1]
        return whole, blocks

    def profile(self, point: Point) -> None:
        """Phases, interleaved like the step times, then the kinds of operators; with products in their own dtype."""
        self.say(f"profiling batch {point.batch}, seq {point.seq}")
        steps: dict[str, TrainingStep] = {}
        for name in self.models:
            step = self.step(name, point)
            _, failure = _attempt(step, lambda step: [time_phases(step) for _ in range(self.settings.warmup + 1)])
            if failure:
                self.say(f"{name} can't be profiled: {failure}")
            else:
                steps[name] = step
        values: dict[str, dict[str, list[float]]] = {f"phase: {p}": {name: [] for name in steps} for p in PHASES}
        order = list(steps.items())
        for _ in range(self.settings.rounds):
            order = order[1:] + order[:1]
            for name, step in order:
                for phase, seconds in time_phases(step).items():
                    values[f"phase: {phase}"][name].append(seconds)
        ranks = {name: dict(method.chosen).get("r", self.settings.rank) for name, method in self.methods.items()}
        budgets = {name: profile_step(step, ranks[name]) for name, step in steps.items()}
        for kind in dict.fromkeys(kind for budget in budgets.values() for kind in budget):
            values[f"kind: {kind}"] = {name: [budget.get(kind, 0.0)] for name, budget in budgets.items()}
        for metric, by_method in values.items():
            found = {name: (samples, None) for name, samples in by_method.items()}
            self.recorder.record(metric, "s", point, found, compare=False)

    def switches(self) -> None:
        """Time from one adapter to another."""
        self.say("switching adapters")
        point = Point(1, 0) if self.base.vision else _SWITCH_POINT

        def measure(step: TrainingStep) -> list[list[float]]:
            return [time_switches(step, _SWITCH_ROUNDS)]

        self.with_two_adapters(point, "eager", measure, ["switch_time"], "s", compare=True)

    def recompilations(self) -> None:
        """Graphs that a compiled model makes after its first steps and after a switch of adapters."""
        self.say("counting recompilations")

        def measure(step: TrainingStep) -> list[list[float]]:
            return [[float(count)] for count in count_recompilations(step)]

        metrics = [f"recompilations: {kind}" for kind in RECOMPILATIONS]
        self.with_two_adapters(self.points[0], "compiled", measure, metrics, "graphs", compare=False)

    def with_two_adapters(
        self,
        point: Point,
        variant: str,
        measure: Callable[[TrainingStep], list[list[float]]],
        metrics: list[str],
        unit: str,
        compare: bool,
    ) -> None:
        """Record the `metrics` that `measure` takes, in their order, of models that have two adapters."""
        found: dict[str, tuple[list[list[float]], str | None]] = {}
        unavailable: dict[str, tuple[list[float], str | None]] = {}
        for name, method in self.methods.items():
            try:
                model = self.prepared(method)
                add_second_adapter(model, method)
            except MethodUnavailable as error:
                unavailable[name] = [], str(error)
                continue
            samples, failure = _attempt(TrainingStep(model, self.base, self.settings, point, variant), measure)
            found[name] = samples or [[] for _ in metrics], failure
        for number, metric in enumerate(metrics):
            one = {name: (samples[number], failure) for name, (samples, failure) in found.items()}
            self.recorder.record(metric, unit, point, one, variant=variant, compare=compare)
            if unavailable:
                self.recorder.record(metric, unit, point, unavailable, variant=variant, missing="unavailable")


def _attempt(step: TrainingStep, measure: Callable[[TrainingStep], _Result]) -> tuple[_Result | None, str | None]:
    """What `measure` gives, or why it failed; the other methods are measured all the same."""
    try:
        return measure(step), None
    except Exception as error:  # whatever one method throws
        failure = failure_reason(error)
    step.abandon()  # not in the except clause: there the error still holds the graph
    return None, failure
