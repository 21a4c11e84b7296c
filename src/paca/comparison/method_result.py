"""What the rows say of one method: its score at its rate over the seeds, what it took, and what failed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from paca.comparison.comparable import at
from paca.comparison.rows import SHARES, Row
from paca.comparison.statistics import Interval, interval_as_dict, mean_interval


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
    equal_memory: int | None = None
    """The bytes by which its memory was made equal: those of tensors on a CPU, else of the CUDA allocator. None where
    it does not fit, and where memory was not made equal."""

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
        """The runs that failed, or came to no finite score."""
        return [row for row in self.tried if row["score"] is None]

    @property
    def lost(self) -> list[Row]:
        """Those of them with its best rate: seeds that its score lacks."""
        return [row for row in self.failed if row["learning_rate"] == self.rate]

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """The fastest and the slowest run's, over the rates and seeds, which ask for the same work."""
        steps = [
            time / row["steps"] for row in self.tried if (time := row["train_info"]["train_time"]) and row["steps"]
        ]
        return (min(steps), max(steps)) if steps else None

    @property
    def level_rates(self) -> list[float]:
        """The rates among which the loss decided: their shares lie within one standard error of the highest, by the
        seed that rates are searched with. None where the score decided."""
        searched = [row for row in self.tried if row["seed"] == self.tried[0]["seed"] and row["score"] is not None]
        if self.rate is None or not searched or searched[0]["metric"] not in SHARES:
            return []
        top = max(searched, key=lambda row: row["score"])
        bound = top["score"] - (top["score_stderr"] or 0.0) * (1 + 1e-9) - 1e-12  # as `paca.comparison.schedule`
        found = sorted(row["learning_rate"] for row in searched if row["score"] >= bound)
        return found if len(found) > 1 and self.rate in found else []

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
            "score": None if score is None else interval_as_dict(score),
            "loss": self.mean("loss"),
            "num_trainable_params": self.mean("train_info", "num_trainable_params"),
            "train_time": self.mean("train_info", "train_time"),
            "tokens_per_second": self.mean("tokens_per_second"),
            "tokens": self.mean("tokens"),
            "steps": self.mean("steps"),
            "accelerator_memory_max": self.mean("train_info", "accelerator_memory_max"),
            "equal_memory": self.equal_memory,
            "file_size": self.mean("train_info", "file_size"),
            "failed": {row["name"]: why_failed(row) for row in self.failed},
        }


def why_failed(row: Row) -> str:
    """Why a run has no score, in words; it may have finished."""
    return row["run_info"]["error_msg"] or f"its {row['metric']} on held-out data is not finite"
