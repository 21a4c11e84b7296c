"""Peak memory of every method in a process of its own, and the largest size within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from paca.bench.child_process import ChildFailed, MeasuringChild
from paca.bench.limits import Limit, Probe, largest_that_fits
from paca.bench.recorder import Measured, Recorder
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
    peaks = {point: Measured("peak_memory", "B", point) for point in ordered}
    above = {point: Measured("peak_above_weights", "B", point) for point in ordered}
    for name in names:
        say(f"peak memory of {name}")
        measured = set()
        try:
            with MeasuringChild(settings, name) as child:
                for point in ordered:
                    found = child.run(point)
                    note = found["reason"] or child.source
                    for kind, below in ((peaks, 0), (above, child.weights)):
                        values = [] if found["peak"] is None else [float(found["peak"] - below)]
                        kind[point].add(name, values, note)
                    measured.add(point)
        except ChildFailed as error:
            for point in ordered:
                if point not in measured:
                    peaks[point].add(name, [], str(error))
                    above[point].add(name, [], str(error))
    for point in ordered:
        recorder.record(peaks[point])
        recorder.record(above[point])


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
        found = Measured(metric, unit, point, budget=settings.memory)
        for name in names:
            try:
                limit = _search(settings, name, measure, point)
            except ChildFailed as error:
                found.add(name, [], str(error))
                continue
            note = f"{limit.smallest_too_large} did not fit; {limit.probes} probes"
            found.add(name, [float(limit.largest)], note)
            say(f"{metric.replace('_', ' ')} of {name}: {limit.largest}")
        recorder.record(found)


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
        return Probe(found["fits"], None if found["peak"] is None else found["peak"] - child.libraries)

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
