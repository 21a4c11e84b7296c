"""Peak memory of every method in a process of its own, and the largest size within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from paca.bench.child_process import ChildFailed, MeasuringChild
from paca.bench.limits import Limit, Probe, largest_that_fits
from paca.bench.method import MethodUnavailable
from paca.bench.recorder import Recorder
from paca.bench.settings import BenchSettings, Point

_SEQ_STEP, _BATCH_STEP = 16, 1
_HIGHEST_SEQ, _HIGHEST_BATCH = 2**20, 2**16


def measure_peaks(
    settings: BenchSettings,
    names: Sequence[str],
    points: Sequence[Point],
    recorder: Recorder,
    say: Callable[[str], None],
) -> None:
    """Record the peak of two steps per method and size, small ones first: absolute, and above the model's weights."""
    settings = replace(settings, memory=None, measure=("memory",))
    ordered = sorted(points, key=lambda point: point.batch * max(1, point.seq))
    peaks: dict[Point, dict[str, list[float]]] = {point: {} for point in ordered}
    above: dict[Point, dict[str, list[float]]] = {point: {} for point in ordered}
    notes: dict[Point, dict[str, str]] = {point: {} for point in ordered}
    for name in names:
        say(f"peak memory of {name}")
        try:
            with MeasuringChild(settings, name) as child:
                for point in ordered:
                    found = child.run(point)
                    peak = found["peak"]
                    peaks[point][name] = [] if peak is None else [float(peak)]
                    above[point][name] = [] if peak is None else [float(peak - child.weights)]
                    notes[point][name] = found["reason"] or child.source
        except (ChildFailed, MethodUnavailable) as error:
            for point in ordered:
                if name not in peaks[point]:
                    peaks[point][name], above[point][name], notes[point][name] = [], [], str(error)
    for point in ordered:
        recorder.record("peak_memory", "B", peaks[point], point, notes=notes[point], failed=True)
        recorder.record("peak_above_weights", "B", above[point], point, notes=notes[point], failed=True)


def measure_limits(
    measure: str,
    settings: BenchSettings,
    names: Sequence[str],
    vision: bool,
    recorder: Recorder,
    say: Callable[[str], None],
) -> None:
    """Record the longest sequence (`max-seq`, per batch size) or largest batch (`max-batch`, per length) per method."""
    assert settings.memory is not None
    if measure == "max-seq":
        fixed = [] if vision else [Point(batch, 0) for batch in settings.batch]
        metric, unit, start = "longest_sequence", "tokens", min(settings.seq)
        if vision:
            say("max-seq does not apply to images")
    else:
        fixed = [Point(0, seq) for seq in ((0,) if vision else settings.seq)]
        metric, unit, start = "largest_batch", "images" if vision else "sequences", min(settings.batch)
    for point in fixed:
        found: dict[str, list[float]] = {}
        notes: dict[str, str] = {}
        for name in names:
            try:
                limit = _search(settings, name, measure, point, start)
            except (ChildFailed, MethodUnavailable) as error:
                found[name], notes[name] = [], str(error)
                continue
            found[name] = [float(limit.largest)]
            notes[name] = f"{limit.smallest_too_large} did not fit; {limit.probes} probes"
            say(f"{metric.replace('_', ' ')} of {name}: {limit.largest}")
        recorder.record(metric, unit, found, point, budget=settings.memory, notes=notes, failed=True)


def _search(settings: BenchSettings, name: str, measure: str, point: Point, start: int) -> Limit:
    budget = settings.memory
    assert budget is not None
    # A CUDA process survives running out of memory; one whose resident set was too large is gone.
    reusable = settings.torch_device.type == "cuda"
    child: MeasuringChild | None = None

    def probe(size: int) -> Probe:
        nonlocal child
        if child is None or not reusable:
            if child is not None:
                child.close()
            child = MeasuringChild(settings, name)
        found = child.run(point._replace(**{"seq" if measure == "max-seq" else "batch": size}))
        peak = None if found["peak"] is None else found["peak"] - child.libraries
        return Probe(found["fits"], peak)

    by_seq = measure == "max-seq"
    try:
        return largest_that_fits(
            probe,
            start=start,
            step=_SEQ_STEP if by_seq else _BATCH_STEP,
            highest=_HIGHEST_SEQ if by_seq else _HIGHEST_BATCH,
            budget=budget,
        )
    finally:
        if child is not None:
            child.close()
