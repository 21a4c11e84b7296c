"""What the rows say: each method at its rate over the seeds, the first one against the others, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paca.comparison.comparable import unlike
from paca.comparison.contrast import Contrast, times
from paca.comparison.edges import Edge, caveats_of
from paca.comparison.method_result import MethodResult
from paca.comparison.rows import Row

_STEADY = 1.5
"""Where equal work takes up to so many times as long, a machine is idle enough for its times to be quoted alone."""
_FEW_STEPS = 100
"""Fewer than so many steps are a quick try, for which higher rates are the best than for a longer training."""
_FEW_EXAMPLES = 30
"""A mean over fewer held-out examples than that moves by far with a few others."""


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
    def good_sign(self) -> str:
        """The same in words."""
        return f"{'lower' if self.lower_is_better else 'higher'} is better"

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
                    f"trains {times(parameters)} × the parameters."
                )
        if ranges and sentences:
            sentences.append(
                f"Their times tell too little to be compared: steps of the same work took {', '.join(ranges)}, so the "
                "machine did something else meanwhile. Steps that are timed in turn tell more: paca bench, or --equal "
                "time."
            )
        return sentences

    @property
    def eval_examples(self) -> list[int]:
        """How many held-out examples a run was judged by, least first: one number, unless runs can't be compared."""
        counts = {row.get("eval_examples") for method in self.methods for row in method.rows}
        return sorted(count for count in counts if count)

    @property
    def judged_by(self) -> list[str]:
        """A sentence on that, where it is known."""
        counts = self.eval_examples
        if not counts:
            return []
        shown = " or ".join(f"{count:,}" for count in counts)
        told = f"Judged by {self.metric} on {shown} held-out example{'s' * (counts[-1] > 1)}."
        level = [
            f"{one.name} ({', '.join(map('{:g}'.format, one.level_rates))})" for one in self.methods if one.level_rates
        ]
        if level:
            told += f" Rates that are level by it, among which the held-out loss decided: {'; '.join(level)}."
        return [told]

    @property
    def too_few(self) -> list[str]:
        """Sentences on runs too short to tell of longer ones, where the longest is, and on too few examples."""
        steps = max((row["steps"] or 0 for method in self.methods for row in method.rows), default=0)
        return few_steps_text(steps) + few_examples_text(self.eval_examples)

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
            "notes": [*self.judged_by, *self.too_few, *self.notes],
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


def few_examples_text(counts: Sequence[int]) -> list[str]:
    """A sentence on held-out data, if the fewest examples of `counts` are too few to tell of others."""
    fewest = min(counts, default=_FEW_EXAMPLES)
    if fewest >= _FEW_EXAMPLES:
        return []
    there_are = f"There {'are' if fewest > 1 else 'is'} {fewest} held-out example{'s' * (fewest > 1)}"
    return [f"{there_are}: so few tell little of others, and the verdict speaks of these alone."]
