"""The first method against another one: the difference, in words too, and what both take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paca.comparison.comparable import at, incomparable
from paca.comparison.method_result import MethodResult
from paca.comparison.rows import SHARES
from paca.comparison.statistics import (
    Interval,
    bound,
    difference,
    half_with_examples,
    interval_as_dict,
    seeds_in_pairs,
    signed,
)
from paca.training.memory import OF_CUDA

_COST_OF = {"parameters": "num_trainable_params", "time": "train_time", "memory": "accelerator_memory_max"}
_ROUNDING = 1e-9
_STILL_EQUAL = 1.1
"""A ratio beyond this one is not called equal."""
_MORE_PARAMETERS = 1.25
"""A ratio of trained parameters beyond this one is told with each finding, also where nobody asked for equal ones."""

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
        """What it shows of the leader; `none` where the interval has zero in it, `unknown` where there is none.

        `unknown` too where the one that seems better lost seeds: those that fail might be those that it is worse with.
        """
        found = self.difference
        if found is None or found.low is None or found.high is None:
            return "unknown"
        if found.low <= 0 <= found.high:
            return "none"
        leader_ahead = (found.high < 0) == self.lower_is_better
        if (self.leader if leader_ahead else self.other).lost:
            return "unknown"
        return "better" if leader_ahead else "worse"

    @property
    def lost(self) -> str:
        """How many runs of each failed at its best rate, in words; empty for none."""
        told = [
            f"{len(one.lost)} of {one.name}'s {len(one.rows) + len(one.lost)}"
            for one in (self.leader, self.other)
            if one.lost
        ]
        return f"{' and '.join(told)} runs failed" if told else ""

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
        failed = f"; {self.lost}" if self.lost else ""
        if found.half is None:
            why = (
                "one seed gives no interval"
                if found.count < 2
                else "all seeds differ by the same, which gives no interval"
            )
            return f"no difference shown between {leader} and {other}, as {why} ({scores}{failed})"
        by = f"{scores}; difference {signed(found.mean)}, 95 % interval {bound(found.low)} to {bound(found.high)}"  # type: ignore[arg-type]
        if self.finding == "none":
            return f"no difference shown between {leader} and {other} ({by}{failed})"
        if self.finding == "unknown":
            return f"no difference shown between {leader} and {other}, as {self.lost} ({by})"
        return f"{leader} is {self.finding} than {other} ({by}{failed})"

    def terms(self, equal: Sequence[str]) -> str:
        """What was equal, as the start of a sentence, or how far it was not; empty where that is not known.

        How far trained parameters were not is said whatever was made equal.
        """
        ratios = {what: found for what in equal if (found := self._ratio_of(what)) is not None}
        trained = self._ratio_of("parameters")
        if trained is not None and not 1 / _MORE_PARAMETERS <= trained <= _MORE_PARAMETERS:
            ratios["parameters"] = trained
        same = [what for what, ratio in ratios.items() if 1 / _STILL_EQUAL <= ratio <= _STILL_EQUAL]
        terms = [f"equal {' and '.join(same)}"] if same else []
        terms += [f"{times(ratios[what])} × the {what} of {self.other.name}" for what in ratios if what not in same]
        start = f"at {' and '.join(terms)}, " if terms else ""
        if "memory" in equal and self._does_not_fit:
            start += f"{'but ' if terms else ''}not at equal memory, as {self.other.name} does not fit, "
        return start

    @property
    def tensor_memory(self) -> float | None:
        """The bytes of tensors that were made equal, the leader's as a multiple of the other one's. None where nothing
        was, or where the runs themselves measure the same: the CUDA allocator's bytes."""
        measured = {at(row, ("train_info", "accelerator_memory_of")) for one in self.compared for row in one.rows}
        return None if measured == {OF_CUDA} else ratio(self.leader.equal_memory, self.other.equal_memory)

    @property
    def _does_not_fit(self) -> bool:
        return self.leader.equal_memory is not None and self.other.equal_memory is None

    def _ratio_of(self, what: str) -> float | None:
        if what == "memory" and self._does_not_fit:
            return None
        tensors = self.tensor_memory if what == "memory" else None
        return self.cost()[_COST_OF[what]] if tensors is None else tensors

    def as_dict(self) -> dict[str, Any]:
        """For `comparison.json`."""
        found, costs = self.difference, {**self.cost(), "tensor_memory": self.tensor_memory}
        return {
            "method": self.leader.name,
            "against": self.other.name,
            "finding": self.finding,
            "difference": None if found is None else {**interval_as_dict(found), "paired": found.paired},
            "cost": {name: found for name, found in costs.items() if found is not None},
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


def times(value: float) -> str:
    """A ratio, for people: `4.00`, and `0.0021` of what two decimals would show as nothing."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
