"""A run's own held-out data as a task: exact match, choice, token accuracy or loss, with sample answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from paca.data.conversion import ORIGIN
from paca.evaluation.completions import completions
from paca.evaluation.encoding import (
    Example,
    answer_of,
    calls_a_tool,
    continuation_of,
    options_of,
    question_of,
    question_text,
)
from paca.evaluation.kept_lines import KeptAnswers
from paca.evaluation.log_likelihood import likelihoods
from paca.evaluation.sides import Watcher
from paca.evaluation.statistics import Mean, as_numbers, ratio_with_error
from paca.messages.errors import PacaError
from paca.messages.shown import shown
from paca.pretrained.answer_pattern import check_pattern, extract_answers
from paca.pretrained.context_length import context_length
from paca.training.config.run_config import EvalSection

SAMPLES = 5
"""Answers that are shown to people."""


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how. It is what `paca.training.train` scores held-out data with."""

    metric: Literal["exact_match", "choice", "token_accuracy", "loss"]
    answer_pattern: str | None = None
    """For `exact_match`: a regular expression; its last match is the answer (its first group, where it has one)."""
    max_new_tokens: int = 256
    """Length at which an answer is cut."""
    batch_size: int = 8
    samples: bool = True
    """Whether a few questions are answered for people to read, where the metric takes no answers."""
    watcher: Watcher | None = field(default=None, compare=False)
    """Told how far `score` is."""

    def __post_init__(self) -> None:
        """Raises:
        PacaError: The pattern is no regular expression.
        """
        check_pattern(self.answer_pattern)

    def check(self, rows: Iterable[Example], model: Any) -> None:
        """Check that every row can be scored.

        Args:
            rows: The examples.
            model: What is going to answer. Only its config is read.

        Raises:
            PacaError: One lacks a question, options, or a reference answer that the pattern finds; or answers would
                be as long as the model's context.
        """
        for row in (rows := list(rows)):
            if self.metric == "choice":
                options_of(row)
            elif self.metric == "exact_match":
                question_text(row)
                if calls_a_tool(row):
                    raise PacaError(
                        f"{row[ORIGIN]}: the last answer calls a tool, and eval.metric: exact_match compares texts "
                        "alone. Take token_accuracy or loss, which count the call, or leave the example out."
                    )
        for row, found in zip(rows, self.references(rows), strict=True) if self.metric == "exact_match" else ():
            if not found:
                raise PacaError(
                    f"{row[ORIGIN]}: the pattern {shown(self.answer_pattern)} finds no answer in the reference "
                    f"{answer_of(row)!r}. Change eval.answer_pattern, or leave the example out."
                )
        context = context_length(model)
        if self.metric == "exact_match" and context is not None and self.max_new_tokens >= context:
            raise PacaError(
                f"eval.max_new_tokens is {self.max_new_tokens:,}, and the model's context has {context:,}: answers of "
                "that length leave no room for a question. Make it smaller."
            )

    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Example], when: str
    ) -> dict[str, Any]:
        """The content of a `Score`; `when` names it for the watcher."""
        counted = None if self.watcher is None else KeptAnswers(when, self.watcher, None)
        return measure(model, tokenizer, rows, self, counted).as_dict()

    def extract(self, texts: list[str]) -> list[str | None]:
        """The answer in each text; see `paca.pretrained.answer_pattern.extract_answers`."""
        return extract_answers(texts, self.answer_pattern)

    def references(self, rows: list[Example]) -> list[str | None]:
        """The answer in the reference of each row."""
        return self.extract([answer_of(row) for row in rows])

    def answers(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Example], kept: KeptAnswers | None = None
    ) -> list[str]:
        """What the model says to the questions."""
        prompts = [question_of(row, tokenizer) for row in rows]
        length, context, what = self.max_new_tokens, context_length(model), "answers written"
        if self.metric != "exact_match":  # they are for people to read
            what = "sample answers written"
            length = length if context is None else min(length, max(1, context // 2))
        size = self.batch_size
        return completions(model, tokenizer, prompts, max_new_tokens=length, batch_size=size, kept=kept, what=what)


@dataclass(frozen=True)
class Score:
    """How well a model did."""

    sums: dict[str, list[float]] = field(repr=False)
    """By name, the one asked for first: what each example adds to a value, in order."""
    weights: list[float] = field(repr=False)
    """What the sums are divided by: 1 for each example, or the tokens of its answer."""
    samples: list[dict[str, str]]
    """The first examples: `question`, `reference` and `answer`, as texts."""

    @property
    def examples(self) -> int:
        """How many there were."""
        return len(self.weights)

    @cached_property
    def means(self) -> dict[str, Mean]:
        """By name, with standard errors: None where a single example tells none, 0 where all examples are alike."""
        return {name: ratio_with_error(of_examples, self.weights) for name, of_examples in self.sums.items()}

    @property
    def values(self) -> dict[str, float]:
        """Those means, without their errors."""
        return {name: mean[0] for name, mean in self.means.items()}

    @property
    def errors(self) -> dict[str, float | None]:
        """The standard errors of those means."""
        return {name: mean[1] for name, mean in self.means.items()}

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`; `right` has 1 or 0 for each example, where the metric asked for counts them so."""
        asked, right = next(iter(self.sums)), {}
        if asked in ("exact_match", "choice", "accuracy"):
            right["right"] = "".join(f"{one:.0f}" for one in self.sums[asked])
        return {**as_numbers(self.means), "examples": self.examples, **right, "samples": self.samples}


def scorer(section: EvalSection, watcher: Watcher | None = None) -> Measurement | None:
    """What measures the `eval.metric` of a run's config, and tells `watcher`; None where it asks for none.

    Raises:
        PacaError: The answer pattern is no regular expression.
    """
    if section.metric is None:
        return None
    return Measurement(section.metric, section.answer_pattern, section.max_new_tokens, watcher=watcher)


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    measurement: Measurement,
    kept: KeptAnswers | None = None,
) -> Score:
    """Score a model on examples.

    Args:
        model: A causal language model, with or without an adapter; it is left in the mode it was in.
        tokenizer: The model's.
        examples: Rows of `paca.data.Examples.dataset`.
        measurement: What to measure.
        kept: Where the model's answers are kept, if anywhere; those that it has are not asked for again.

    Returns:
        `exact_match`, a share; `choice` and `choice_normalized` (each option's log-probability divided by its tokens),
            shares; `token_accuracy`, the share of answer tokens that were the first guess; `loss`, nats per answer
            token.

    Raises:
        PacaError: No examples, or one that lacks what the metric needs: a question, options, a reference answer that
            the pattern finds.
    """
    rows = list(examples)
    if not rows:
        raise PacaError("There are no examples to measure on. Give held-out data (data.eval).")
    measurement.check(rows, model)
    run = {"exact_match": _exact_match, "choice": _choice}.get(measurement.metric, _over_tokens)
    was_training = model.training
    model.eval()
    try:
        sums, weights, answers = run(model, tokenizer, rows, measurement, kept)
    finally:
        model.train(was_training)
    samples = [
        {"question": question_text(row), "reference": answer_of(row), "answer": answer}
        for row, answer in zip(rows[:SAMPLES], answers, strict=False)
    ]
    return Score(sums, weights, samples)


Found = tuple[dict[str, list[float]], list[float], list[str]]
"""`sums` and `weights` of a `Score`, and answers to at least the first examples."""


def _exact_match(
    model: Any, tokenizer: Any, rows: list[Example], measurement: Measurement, kept: KeptAnswers | None
) -> Found:
    _warn_of_long_references(tokenizer, rows, measurement.max_new_tokens)
    answers = measurement.answers(model, tokenizer, rows, kept)
    pairs = zip(measurement.extract(answers), measurement.references(rows), strict=True)
    right = [float(found == reference) for found, reference in pairs]
    return {"exact_match": right}, [1.0] * len(rows), answers


def _warn_of_long_references(tokenizer: Any, rows: list[Example], most: int) -> None:
    tokens = tokenizer([answer_of(row) for row in rows], add_special_tokens=False)["input_ids"]
    longer = sum(len(one) > most for one in tokens)
    if longer:
        warnings.warn(
            f"{longer:,} of {len(rows):,} reference answers {'has' if longer == 1 else 'have'} more than "
            f"eval.max_new_tokens = {most:,} tokens. Answers are cut there, so as long ones count as wrong.",
            stacklevel=2,
        )


def _choice(
    model: Any, tokenizer: Any, rows: list[Example], measurement: Measurement, kept: KeptAnswers | None
) -> Found:
    asked = [continuation_of(row, tokenizer, option) for row in rows for option in options_of(row)]
    found = iter(likelihoods(model, asked, batch_size=measurement.batch_size, kept=kept))
    by_sum, by_token, chosen = [], [], []
    for row in rows:
        options = options_of(row)
        scores, right = [next(found) for _ in options], options.index(answer_of(row))
        best = max(range(len(options)), key=lambda index: scores[index].log_probability)
        best_per_token = max(range(len(options)), key=lambda index: scores[index].per_token)
        by_sum.append(float(best == right))
        by_token.append(float(best_per_token == right))
        chosen.append(options[best])
    return {"choice": by_sum, "choice_normalized": by_token}, [1.0] * len(rows), chosen


def _over_tokens(
    model: Any, tokenizer: Any, rows: list[Example], measurement: Measurement, kept: KeptAnswers | None
) -> Found:
    asked = [continuation_of(row, tokenizer) for row in rows]
    found = likelihoods(model, asked, batch_size=measurement.batch_size, kept=kept)
    sums = {
        "token_accuracy": [float(entry.correct) for entry in found],
        "loss": [-entry.log_probability for entry in found],
    }
    names = sorted(sums, key=lambda name: name != measurement.metric)
    shows = measurement.samples and "text" not in rows[0]
    answers = [] if not shows else measurement.answers(model, tokenizer, rows[:SAMPLES], kept)
    return {name: sums[name] for name in names}, [float(entry.tokens) for entry in found], answers
