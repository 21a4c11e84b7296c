"""What `--lr` and `--seeds` say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean

AUTO = "auto"
STEP = 1.6
"""Between rates that nobody chose. A coarser grid favours the method whose best rate is in it."""

Number = TypeVar("Number", int, float)
Grid = list[float] | None
"""Rates to choose from. None: those around the rate that `train.learning_rate: auto` gives the method."""


@dataclass
class Rates:
    """The rates that each method has to choose from."""

    shared: Grid = None
    own: dict[str, Grid] = field(default_factory=dict)
    """Of methods that have others, by name."""

    def of(self, method: str) -> Grid:
        """The rates of a method."""
        return self.own.get(method, self.shared)

    def check(self, methods: Sequence[str]) -> None:
        """Raises:
        PacaError: A method that has its own is not compared.
        """
        for name in self.own:
            if name not in methods:
                raise PacaError(
                    f"--lr {name}=...: no method of that name is compared.{did_you_mean(name, methods)} --methods has "
                    f"{', '.join(methods)}."
                )


def around(rate: float) -> list[float]:
    """Three rates, the middle one given; the search goes on beyond them while the first or last is the best.

    Raises:
        PacaError: It is not above zero.
    """
    if not rate > 0:
        raise PacaError(f"train.learning_rate is {rate:g}, and no rates lie around it. Leave it out, or give --lr.")
    return [float(f"{each:.3g}") for each in (rate / STEP, rate, rate * STEP)]


def rates_of(texts: Iterable[str]) -> Rates:
    """The rates of `--lr`, which may be given several times: for all methods once, and once for each of them.

    Args:
        texts: `RATE,RATE,...` or `auto` each, or either after `METHOD=`.

    Raises:
        PacaError: One is no number above zero, or comes twice, or a method's come twice.
    """
    found: dict[str | None, Grid] = {}
    for text in texts:
        name, _, grid = text.rpartition("=")
        method = name.strip() or None
        if method in found:
            raise PacaError(
                f"--lr comes twice{f' for {method}' if method else ''}. Give all rates at once, with commas between, "
                "or a method's own ones as METHOD=RATE,RATE."
            )
        found[method] = None if grid.strip() == AUTO else _grid(grid)
    shared = found.pop(None, None)
    return Rates(shared, {name: grid for name, grid in found.items() if name is not None})


def _grid(text: str) -> list[float]:
    rates = []
    for word in _words(text, "--lr", "1e-3,1.6e-3"):
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise PacaError(
                f"--lr: {word!r} is no rate; a number above zero was expected, such as 1e-3, or auto alone."
            )
        rates.append(rate)
    return _without_repeats(rates, "--lr")


def seeds_of(text: str) -> list[int]:
    """The seeds of `--seeds`.

    Raises:
        PacaError: One is no whole number of zero or more that fits 32 bits, or comes twice.
    """
    seeds = []
    for word in _words(text, "--seeds", "0,1,2"):
        if not word.isdecimal() or int(word) >= 2**32:
            raise PacaError(f"--seeds: {word!r} is no seed; a whole number from 0 to {2**32 - 1} was expected.")
        seeds.append(int(word))
    return _without_repeats(seeds, "--seeds")


def _words(text: str, flag: str, example: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise PacaError(f"{flag} is empty. Give numbers with commas between, such as {example}.")
    return words


def _without_repeats(values: list[Number], flag: str) -> list[Number]:
    # Folders are named by a rate's first six digits.
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    for value in shown:
        if shown.count(value) > 1:
            raise PacaError(f"{flag} has {value} twice. Leave one out.")
    return values
