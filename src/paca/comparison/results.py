"""What the rows say: each method at its rate over the seeds, the first one against the others, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paca.comparison.comparable import unlike
from paca.comparison.contrast import Contrast
from paca.comparison.edges import Edge, caveats_of
from paca.comparison.method_result import MethodResult
from paca.comparison.rows import Row

_STEADY = 1.5
"""Where equal work takes up to so many times as long, a machine is idle enough for its times to be quoted alone."""
_FEW_STEPS = 100
"""Fewer than so many steps are a quick try, for which higher rates are the best than for a longer training."""


@dataclass(frozen=True)
class ComparisonResult:
    """All of it."""

    methods: list[MethodResult]
    """The first is the one that the others are compared with."""
    notes: list[str]
    """What a reader has to know of how it was made."""
    equal: tuple[str, ...] = ()
    """What was made the same for all methods."""
    edges: Mapping[str, Edge] = field(default_factory=dict)
    """Of the methods, by name, whose best rate may lie beyond those tried. The notes hold theirs."""

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
        sentences = [self._at_their_rates(contrast) + contrast.sentence() for contrast in contrasts]
        if len(set(terms)) == 1:  # said once, for all
            found = terms[0] + "; ".join(sentences)
        else:
            found = "; ".join(term + sentence for term, sentence in zip(terms, sentences, strict=True))
        found = "; ".join([found, *caveats_of(self.edges)])
        return found[0].upper() + found[1:] + "." if found.startswith(("no ", "at ", "not ")) else found + "."

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
                name = contrast.other.name
                work = {"steps", "sequences in a step"} & {*unlike([*contrast.leader.rows, *contrast.other.rows])}
                compared = not ranges and (not work or "time" in self.equal)
                its = "its" if compared else f"{name}'s"
                timed = f"{time:.2f} × the training time of {name}{contrast.interval_of('train_time')} and "
                held = f"{memory:.2f} × {its} peak memory{contrast.interval_of('accelerator_memory_max')}"
                tensors = contrast.tensor_memory
                counted = (
                    "" if tensors is None else f" ({tensors:.2f} × by the bytes of tensors, which were made equal)"
                )
                once = "By one run of each, " * (max(len(contrast.leader.rows), len(contrast.other.rows)) < 2)
                sentences.append(
                    f"{once}{contrast.leader.name} takes {timed * compared}{held}, weights included{counted}; it "
                    f"trains {parameters:.2f} × the parameters."
                )
        if ranges and sentences:
            sentences.append(
                f"Their times tell too little to be compared: steps of the same work took {', '.join(ranges)}, so the "
                "machine did something else meanwhile. Steps that are timed in turn tell more: paca bench, or --equal "
                "time."
            )
        return sentences

    @property
    def few_steps(self) -> list[str]:
        """A sentence on runs that are too short to tell of longer ones, where the longest of them is."""
        return few_steps_text(max((row["steps"] or 0 for method in self.methods for row in method.rows), default=0))

    def as_dict(self) -> dict[str, Any]:
        """For `comparison.json`."""
        return {
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "score_before": self.score_before,
            "equal": list(self.equal),
            "verdict": self.verdict,
            "methods": [method.as_dict() for method in self.methods],
            "contrasts": [
                {**contrast.as_dict(), "rates_open": self._open_rates(contrast)} for contrast in self.contrasts
            ],
            "notes": [*self.few_steps, *self.notes],
        }

    def _open_rates(self, contrast: Contrast) -> list[str]:
        """Of the two, those whose best rate may lie beyond the ones tried."""
        return [one.name for one in (contrast.leader, contrast.other) if one.name in self.edges]

    def _at_their_rates(self, contrast: Contrast) -> str:
        """How a finding begins that a better rate of the one that is behind might turn."""
        behind = {"better": contrast.other, "worse": contrast.leader}.get(contrast.finding)
        return "at the rates tried, " if behind is not None and behind.name in self.edges else ""

    @property
    def _first(self) -> Row:
        return next(row for method in self.methods for row in method.tried)


def few_steps_text(most: int) -> list[str]:
    """A sentence on runs of `most` steps, if these are too few to tell of longer training."""
    if not 0 < most < _FEW_STEPS:
        return []
    return [f"The runs have {most} step{'s' * (most > 1)} at most: so few tell little of a longer training."]
