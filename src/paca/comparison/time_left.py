"""How long a comparison will still take, by the runs that ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def seconds_left(
    left: Mapping[str, int],
    taken: Mapping[str, Sequence[float]],
    current: str,
    elapsed: float,
    expected: float | None,
) -> float | None:
    """How long one process alone will be busy.

    Args:
        left: How many runs of each method have not ended, the current one included.
        taken: Seconds of the runs of each method that ended.
        current: The method of the run that is going on.
        elapsed: Seconds since that began.
        expected: Seconds that it will take, as its own steps foretell it; None before its first step.
    """
    means = {method: sum(seconds) / len(seconds) for method, seconds in taken.items() if seconds}
    if expected is not None:
        means.setdefault(current, max(expected, elapsed))
    if not means:
        return None
    overall = sum(means.values()) / len(means)
    whole = sum(count * means.get(method, overall) for method, count in left.items())
    return max(0.0, whole - min(elapsed, means.get(current, overall)))
