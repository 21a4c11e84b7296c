"""How far simulated steps were off where a measurement was published: docs/notes/plan-on.md has each row."""

from __future__ import annotations

from dataclasses import dataclass

from paca.planning.devices import DEVICES, Device

Range = tuple[int, int]


@dataclass(frozen=True)
class Errors:
    """Least and greatest error of the simulation on one device, in percent: -5 is 5 % too little."""

    time: Range
    """Of the milliseconds of a step; some of these rows were fitted."""
    batch: Range | None = None
    """Of the largest batch that fits."""
    memory: Range | None = None
    """Of the memory of a step."""

    def __str__(self) -> str:
        known = (("the time of a step", self.time), ("memory", self.memory), ("the largest batch", self.batch))
        said = [f"{name} by {least:+d} to {most:+d} %" for name, (least, most) in _present(known)]
        return " and ".join(said)


def _present(known: tuple[tuple[str, Range | None], ...]) -> list[tuple[str, Range]]:
    return [(name, errors) for name, errors in known if errors is not None]


ERRORS = {
    "a100-80gb": Errors(time=(-9, 12), batch=(0, 7)),
    "l40s": Errors(time=(-26, 2), memory=(-1, 3)),
}
"""By device, from benchmarks/plan_on_simulated.csv; a test compares them."""


def errors_in_words(device: Device) -> str:
    """How far simulations on `device` were off; for one that nobody compared, on those that were."""
    if device.name in ERRORS:
        return f"Against what others published of this device, simulations missed {ERRORS[device.name]}."
    others = "; ".join(f"on the {DEVICES[name].title} {errors}" for name, errors in ERRORS.items())
    unknown = "No simulation was compared with a measurement on this device."
    return f"{unknown} Elsewhere they missed what others published: {others}."
