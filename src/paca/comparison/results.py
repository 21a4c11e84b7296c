"""What the rows say: each method at its rate over the seeds, the first one against the others, and the verdict."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from paca.comparison.comparable import at, incomparable, unlike
from paca.comparison.rows import SHARES, Row
from paca.comparison.statistics import (
    Interval,
    difference,
    half_with_examples,
    mean_interval,
    seeds_in_pairs,
    signed,
)

_COST_OF = {"parameters": "num_trainable_params", "time": "train_time", "memory": "accelerator_memory_max"}
_ROUNDING = 1e-9
_STILL_EQUAL = 1.1
"""A ratio beyond this one is not called equal."""
_STEADY = 1.5
"""Where equal work takes up to so many times as long, a machine is idle enough for its times to be quoted alone."""

Finding = Literal["better", "worse", "none", "unknown"]


@dataclass(frozen=True)
class MethodResult:
    """One method over its seeds."""

    name: str
    settings: str
    rate: float | None
    """The best one; None where all runs failed, or the runs have several."""
    rows: list[Row]
    """Of its seeds at that rate; those that failed are not among them."""
    tried: list[Row]
    """Of every run."""

    @property
    def scores(self) -> dict[int, float]:
        """By seed."""
        return {row["seed"]: row["score"] for row in self.rows}

    @property
    def score(self) -> Interval | None:
        """Over the seeds."""
        return mean_interval(list(self.scores.values())) if self.rows else None

    @property
    def failed(self) -> list[Row]:
        """The runs that failed."""
        return [row for row in self.tried if row["score"] is None]

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """The fastest and the slowest run's, over the rates and seeds, which ask for the same work."""
        steps = [
            time / row["steps"] for row in self.tried if (time := row["train_info"]["train_time"]) and row["steps"]
        ]
        return (min(steps), max(steps)) if steps else None

    def mean(self, *path: str) -> float | None:
        """Over the seeds, of a number in the rows, such as `mean("train_info", "train_time")`."""
        values = [value for row in self.rows if (value := at(row, path)) is not None]
        return statistics.fmean(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """For `comparison.json`."""
        score = self.score
        return {
            "method": self.name,
            "settings": self.settings,
            "learning_rate": self.rate,
            "scores": {str(seed): value for seed, value in self.scores.items()},
            "score": None if score is None else _interval(score),
            "loss": self.mean("loss"),
            "num_trainable_params": self.mean("train_info", "num_trainable_params"),
            "train_time": self.mean("train_info", "train_time"),
            "tokens_per_second": self.mean("tokens_per_second"),
            "tokens": self.mean("tokens"),
            "steps": self.mean("steps"),
            "accelerator_memory_max": self.mean("train_info", "accelerator_memory_max"),
            "file_size": self.mean("train_info", "file_size"),
            "failed": {row["name"]: row["run_info"]["error_msg"] for row in self.failed},
        }


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
            "difference": None if found is None else {**_interval(found), "paired": found.paired},
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


@dataclass(frozen=True)
class ComparisonResult:
    """All of it."""

    methods: list[MethodResult]
    """The first is the one that the others are compared with."""
    notes: list[str]
    """What a reader has to know of how it was made."""
    equal: tuple[str, ...] = ()
    """What was made the same for all methods."""
    edges: Mapping[str, str] = field(default_factory=dict)
    """Those notes that say of a method, by its name, that its best rate may lie beyond those tried."""

    @property
    def metric(self) -> str:
        """What the runs are judged by."""
        return self._first["metric"]

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower score is the better one."""
        return self._first["lower_is_better"]

    @property
    def score_before(self) -> float | None:
        """Of the model as it came, where it was measured."""
        found = (row["score_before"] for method in self.methods for row in method.tried)
        return next((value for value in found if value is not None), None)

    @property
    def contrasts(self) -> list[Contrast]:
        """The first method against each of the others."""
        leader, *others = self.methods
        return [Contrast(leader, other, self.metric, self.lower_is_better) for other in others]

    @property
    def verdict(self) -> str:
        """One sentence."""
        contrasts = self.contrasts
        if not contrasts:
            return f"There is one method, {self.methods[0].name}, and nothing to compare it with."
        terms = [contrast.terms(self.equal) for contrast in contrasts]
        sentences = [contrast.sentence() for contrast in contrasts]
        if len(set(terms)) == 1:  # said once, for all
            found = terms[0] + "; ".join(sentences)
        else:
            found = "; ".join(term + sentence for term, sentence in zip(terms, sentences, strict=True))
        if self.edges:
            found += f"; better rates of {' and '.join(self.edges)} may lie beyond those tried"
        return found[0].upper() + found[1:] + "." if found.startswith(("no ", "at ")) else found + "."

    @property
    def cost(self) -> list[str]:
        """What the first method takes next to the others, a sentence each."""
        ranges = [
            f"{method.name} {found[0]:.3g} to {found[1]:.3g} s"
            for method in self.methods
            if (found := method.step_seconds) is not None and found[1] > _STEADY * found[0]
        ]
        sentences = []
        for contrast in self.contrasts:
            time, memory, parameters = contrast.cost().values()
            if time is not None and memory is not None and parameters is not None:
                name, its = contrast.other.name, f"{contrast.other.name}'s" if ranges else "its"
                work = {"steps", "sequences in a step"} & {*unlike([*contrast.leader.rows, *contrast.other.rows])}
                compared = not ranges and (not work or "time" in self.equal)
                timed = f"{time:.2f} × the training time of {name}{contrast.interval_of('train_time')} and "
                held = f"{memory:.2f} × {its} peak memory{contrast.interval_of('accelerator_memory_max')}"
                once = "By one run of each, " * (max(len(contrast.leader.rows), len(contrast.other.rows)) < 2)
                sentences.append(
                    f"{once}{contrast.leader.name} takes {timed * compared}{held}, weights included; it trains "
                    f"{parameters:.2f} × the parameters."
                )
        if ranges and sentences:
            sentences.append(
                f"Their times tell too little to be compared: steps of the same work took {', '.join(ranges)}, so the "
                "machine did something else meanwhile. Steps that are timed in turn tell more: paca bench, or --equal "
                "time."
            )
        return sentences

    def as_dict(self) -> dict[str, Any]:
        """For `comparison.json`."""
        return {
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "score_before": self.score_before,
            "equal": list(self.equal),
            "verdict": self.verdict,
            "methods": [method.as_dict() for method in self.methods],
            "contrasts": [contrast.as_dict() for contrast in self.contrasts],
            "notes": self.notes,
        }

    @property
    def _first(self) -> Row:
        return next(row for method in self.methods for row in method.tried)


def ratio(one: float | None, other: float | None) -> float | None:
    """`one / other`, where both are known."""
    return one / other if one is not None and other else None


def _interval(found: Interval) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "count": found.count}
