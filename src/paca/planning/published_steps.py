"""How far simulated steps were off where a measurement was published: docs/notes/plan-on.md has each row."""

from __future__ import annotations

from paca.planning.devices import DEVICES, Device

ERRORS: dict[str, dict[str, tuple[int, int]]] = {
    "a100-80gb": {"the time of a step": (-9, 11), "the largest batch": (0, 7)},
    "l40s": {"the time of a step": (-26, 2), "memory": (-1, 3)},
}
"""Least and greatest error by device, from benchmarks/plan_on_simulated.csv, in percent: -5 is 5 % too little. A test
compares them. Some of the rows of times were fitted."""


def errors_in_words(device: Device) -> str:
    """How far simulations on `device` were off; for one that nobody compared, on those that were."""
    if device.name in ERRORS:
        return f"Against what others published of this device, simulations missed {_in_words(device.name)}."
    others = "; ".join(f"on the {DEVICES[name].title} {_in_words(name)}" for name in ERRORS)
    unknown = "No simulation was compared with a measurement on this device."
    return f"{unknown} Elsewhere they missed what others published: {others}."


def _in_words(device: str) -> str:
    return " and ".join(f"{what} by {least:+d} to {most:+d} %" for what, (least, most) in ERRORS[device].items())
