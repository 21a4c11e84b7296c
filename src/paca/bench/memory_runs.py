"""Peak memory of every method in a process of its own, and the largest size within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from paca.bench.child_process import ChildFailed, MeasuringChild
from paca.bench.limits import Limit, Probe, largest_that_fits
from paca.bench.recorder import Recorder
from paca.bench.settings import BenchSettings, Point


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
    found: dict[Point, dict[str, tuple[Probe, int]]] = {point: {} for point in ordered}
    for name in names:
        say(f"peak memory of {name}")
        try:
            with MeasuringChild(settings, name) as child:
                for point in ordered:
                    probe = child.run(point)
                    found[point][name] = probe._replace(reason=probe.reason or child.source), child.weights
        except ChildFailed as error:
            for point in ordered:
                found[point].setdefault(name, (Probe(False, None, str(error)), 0))
    for point, by_method in found.items():
        for metric, above in (("peak_memory", False), ("peak_above_weights", True)):
            peaks = {
                name: ([] if probe.peak is None else [float(probe.peak - above * weights)], probe.reason)
                for name, (probe, weights) in by_method.items()
            }
            recorder.record(metric, "B", point, peaks)


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
    if measure == "max-seq" and vision:
        say("max-seq does not apply to images")
        return
    if measure == "max-seq":
        points, metric, unit = [Point(batch, 0) for batch in settings.batch], "longest_sequence", "tokens"
    else:
        points = [Point(0, seq) for seq in ((0,) if vision else settings.seq)]
        metric, unit = "largest_batch", "images" if vision else "sequences"
    for point in points:
        found: dict[str, tuple[list[float], str]] = {}
        for name in names:
            try:
                limit = _search(settings, name, measure, point)
            except ChildFailed as error:
                found[name] = [], str(error)
                continue
            found[name] = [float(limit.largest)], f"{limit.smallest_too_large} did not fit; {limit.probes} probes"
            say(f"{metric.replace('_', ' ')} of {name}: {limit.largest}")
        recorder.record(metric, unit, point, found, budget=settings.memory)


def _search(settings: BenchSettings, name: str, measure: str, point: Point) -> Limit:
    assert settings.memory is not None
    by_seq = measure == "max-seq"
    # A CUDA process survives running out of memory; one whose resident set was too large is gone.
    reusable = settings.torch_device.type == "cuda"
    child: MeasuringChild | None = None

    def probe(size: int) -> Probe:
        nonlocal child
        if child is None or not reusable:
            if child is not None:
                child.close()
            child = MeasuringChild(settings, name)
        found = child.run(point._replace(**{"seq" if by_seq else "batch": size}))
        return found if found.peak is None else found._replace(peak=found.peak - child.libraries)

    try:
        return largest_that_fits(
            probe,
            start=min(settings.seq if by_seq else settings.batch),
            step=16 if by_seq else 1,
            highest=2**20 if by_seq else 2**16,
            budget=settings.memory,
        )
    finally:
        if child is not None:
            child.close()
