"""The first method against another one: the difference, in words too, and what both take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paca.comparison.comparable import incomparable
from paca.comparison.method_result import MethodResult
from paca.comparison.rows import SHARES
from paca.comparison.statistics import (
    Interval,
    difference,
    half_with_examples,
    interval_as_dict,
    seeds_in_pairs,
    signed,
)

_COST_OF = {"parameters": "num_trainable_params", "time": "train_time", "memory": "accelerator_memory_max"}
_ROUNDING = 1e-9
_STILL_EQUAL = 1.1
"""A ratio beyond this one is not called equal."""

Finding = Literal["better", "worse", "none", "unknown"]


@dataclass(frozen=True)
class Contrast:
    """The first method against another one."""

    leader: MethodResult
    other: MethodResult
    metric: str
    lower_is_better: bool

    @property
    def judged_apart(self) -> list[str]:
        """The settings in which their runs differ so that their scores can't be compared; empty for none."""
        return incomparable([*self.leader.rows, *self.other.rows])

    @property
    def compared(self) -> tuple[MethodResult, MethodResult]:
        """Both, with the seeds that both have where these are compared in pairs; else with all of each."""
        if not (pairs := seeds_in_pairs(self.leader.scores, self.other.scores)):
            return self.leader, self.other
        both = (self.leader, self.other)
        leader, other = (
            dataclasses.replace(one, rows=[row for row in one.rows if row["seed"] in pairs]) for one in both
        )
        return leader, other

    @property
    def difference(self) -> Interval | None:
        """The leader's score minus the other's; None where one has none, or they can't be compared."""
        if not (self.leader.rows and self.other.rows) or self.judged_apart:
            return None
        found = difference(self.leader.scores, self.other.scores)
        if found.half is None:
            return found
        half = found.half
        if self.metric in SHARES:
            half = half_with_examples(half, *(one.rows for one in self.compared))
        # Seeds that all differ by the very same, but for rounding, or not at all, tell nothing about chance.
        certain = half < _ROUNDING
        return dataclasses.replace(found, half=None if certain else half)

    @property
    def finding(self) -> Finding:
        """What it shows of the leader; `none` where the interval has zero in it, `unknown` where there is none."""
        found = self.difference
        if found is None or found.low is None or found.high is None:
            return "unknown"
        if found.low <= 0 <= found.high:
            return "none"
        return "better" if (found.high < 0) == self.lower_is_better else "worse"

    def sentence(self) -> str:
        """The finding in words, without a full stop."""
        leader, other = self.leader.name, self.other.name
        found, apart = self.difference, self.judged_apart
        if apart:
            what = ", ".join(apart)
            return f"no difference shown between {leader} and {other}, as they were not judged by the same: {what}"
        if found is None:
            missing = " and ".join(one.name for one in (self.leader, self.other) if not one.rows)
            return f"no difference shown between {leader} and {other}, as every run of {missing} failed"
        first, second = self.compared
        scores = f"{self.metric} {first.score.mean:.4f} against {second.score.mean:.4f}"  # type: ignore[union-attr]
        if len(first.rows) < len(self.leader.rows) or len(second.rows) < len(self.other.rows):
            scores += f" over the {len(first.rows)} seeds that both have"
        if found.half is None:
            why = (
                "one seed gives no interval"
                if found.count < 2
                else "all seeds differ by the same, which gives no interval"
            )
            return f"no difference shown between {leader} and {other}, as {why} ({scores})"
        by = f"{scores}; difference {signed(found.mean)}, 95 % interval {signed(found.low)} to {signed(found.high)}"  # type: ignore[arg-type]
        if self.finding == "none":
            return f"no difference shown between {leader} and {other} ({by})"
        return f"{leader} is {self.finding} than {other} ({by})"

    def terms(self, equal: Sequence[str]) -> str:
        """What was equal, as the start of a sentence, or how far it was not; empty where that is not known."""
        ratios = {what: found for what in equal if (found := self.cost()[_COST_OF[what]]) is not None}
        same = [what for what, ratio in ratios.items() if 1 / _STILL_EQUAL <= ratio <= _STILL_EQUAL]
        terms = [f"equal {' and '.join(same)}"] if same else []
        terms += [f"{ratios[what]:.2f} × the {what} of {self.other.name}" for what in ratios if what not in same]
        return f"at {' and '.join(terms)}, " if terms else ""

    def as_dict(self) -> dict[str, Any]:
        """For `comparison.json`."""
        found = self.difference
        return {
            "method": self.leader.name,
            "against": self.other.name,
            "finding": self.finding,
            "difference": None if found is None else {**interval_as_dict(found), "paired": found.paired},
            "cost": {name: ratio for name, ratio in self.cost().items() if ratio is not None},
        }

    def cost(self) -> dict[str, float | None]:
        """What the leader takes, as a multiple of what the other one does."""
        leader, other = self.compared
        return {
            name: ratio(leader.mean("train_info", name), other.mean("train_info", name))
            for name in ("train_time", "accelerator_memory_max", "num_trainable_params")
        }

    def interval_of(self, quantity: str) -> str:
        """The 95 % interval of the ratio of what runs take, a field of `train_info`, over the seeds, in words; empty
        where there is none."""
        logs = [
            {row["seed"]: math.log(value) for row in one.rows if (value := row["train_info"][quantity])}
            for one in (self.leader, self.other)
        ]
        found = difference(*logs) if all(logs) else None
        if found is None or found.low is None or found.high is None or found.low == found.high:
            return ""
        return f" (95 % interval {math.exp(found.low):.2f} to {math.exp(found.high):.2f})"


def ratio(one: float | None, other: float | None) -> float | None:
    """`one / other`, where both are known."""
    return one / other if one is not None and other else None
