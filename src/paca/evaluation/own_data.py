"""A run's own held-out data as a task: exact match, choice, token accuracy or loss, with sample answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from paca.data.examples import ORIGIN
from paca.evaluation.completions import completions
from paca.evaluation.encoding import Example, answer_of, continuation_of, options_of, question_of, question_text
from paca.evaluation.log_likelihood import Likelihood, likelihoods
from paca.evaluation.statistics import mean_with_error, ratio_with_error
from paca.messages.errors import PacaError
from paca.training.run_config import EvalSection

Metric = Literal["exact_match", "choice", "token_accuracy", "loss"]

SAMPLES = 5
"""Answers that are shown to people."""


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how."""

    metric: Metric
    answer_pattern: str | None = None
    """For `exact_match`: a regular expression; its last match is the answer (its first group, where it has one)."""
    max_new_tokens: int = 256
    """Length at which an answer is cut."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Raises:
        PacaError: The pattern is no regular expression.
        """
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise PacaError(
                    f"The answer pattern {self.answer_pattern!r} is no regular expression: {error}. For what follows "
                    r"#### write '####\s*(.+)'."
                ) from error


@dataclass(frozen=True)
class Score:
    """How well a model did."""

    values: dict[str, float]
    """By name; the first is the one asked for."""
    errors: dict[str, float | None]
    """The standard error of each; None where a single example tells none."""
    examples: int
    samples: list[dict[str, str]] = field(default_factory=list)
    """The first examples: `question`, `reference` and `answer`, as texts."""

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        return {
            **self.values,
            **{f"{name}_stderr": error for name, error in self.errors.items()},
            "examples": self.examples,
            "samples": self.samples,
        }


class OwnDataScorer:
    """What `paca.training.train` scores held-out data with."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement

    def check(self, rows: Iterable[Example]) -> None:
        """Raises:
        PacaError: A row lacks what the metric needs.
        """
        check_rows(rows, self.measurement)

    def score(self, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Example]) -> dict[str, Any]:
        """The content of a `Score`."""
        return measure(model, tokenizer, rows, self.measurement).as_dict()


def scorer(section: EvalSection) -> OwnDataScorer | None:
    """What measures the `eval.metric` of a run's config; None where it asks for none.

    Raises:
        PacaError: The answer pattern is no regular expression.
    """
    if section.metric is None:
        return None
    return OwnDataScorer(Measurement(section.metric, section.answer_pattern, section.max_new_tokens))


def check_rows(rows: Iterable[Example], measurement: Measurement) -> None:
    """Check that every row can be scored.

    Raises:
        PacaError: One lacks a question, options, or a reference answer that the pattern finds.
    """
    for row in rows:
        if measurement.metric == "choice":
            options_of(row)
        elif measurement.metric == "exact_match":
            question_text(row)
            if not extract_answer(answer_of(row), measurement.answer_pattern):
                raise PacaError(
                    f"{row[ORIGIN]}: the pattern {measurement.answer_pattern!r} finds no answer in the reference "
                    f"{answer_of(row)!r}. Change eval.answer_pattern, or leave the example out."
                )


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    measurement: Measurement,
) -> Score:
    """Score a model on examples.

    Args:
        model: A causal language model, with or without an adapter; it is left in the mode it was in.
        tokenizer: The model's.
        examples: Rows of `paca.data.Examples.dataset`.
        measurement: What to measure.

    Returns:
        `exact_match`, a share; `choice` and `choice_normalized` (each option's log-probability divided by its tokens),
        shares; `token_accuracy`, the share of answer tokens that were the first guess; `loss`, nats per answer token.

    Raises:
        PacaError: No examples, or one that lacks what the metric needs: a question, options, a reference answer that
            the pattern finds.
    """
    rows = list(examples)
    if not rows:
        raise PacaError("There are no examples to measure on. Give held-out data (data.eval).")
    check_rows(rows, measurement)
    with _evaluating(model):
        if measurement.metric == "exact_match":
            return _exact_match(model, tokenizer, rows, measurement)
        if measurement.metric == "choice":
            return _choice(model, tokenizer, rows, measurement)
        return _over_tokens(model, tokenizer, rows, measurement)


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The answer in a text, made comparable: spaces joined, commas between digits gone; None where nothing matches."""
    if pattern is not None:
        found = list(re.finditer(pattern, text))
        if not found:
            return None
        text = found[-1].group(1 if found[-1].re.groups else 0) or ""
    return re.sub(r"(?<=\d),(?=\d{3})", "", " ".join(text.split()))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    measurement: Measurement,
) -> Score:
    pattern = measurement.answer_pattern
    references = [extract_answer(answer_of(example), pattern) for example in examples]
    answers = _answers(model, tokenizer, examples, measurement)
    right = [
        float(extract_answer(answer, pattern) == reference)
        for answer, reference in zip(answers, references, strict=True)
    ]
    value, error = mean_with_error(right)
    return Score({"exact_match": value}, {"exact_match": error}, len(examples), _samples(examples, answers[:SAMPLES]))


def _choice(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    measurement: Measurement,
) -> Score:
    options = [options_of(example) for example in examples]
    asked = [
        continuation_of(example, tokenizer, option)
        for example, offered in zip(examples, options, strict=True)
        for option in offered
    ]
    found = iter(likelihoods(model, asked, batch_size=measurement.batch_size))
    by_sum, by_token, chosen = [], [], []
    for example, offered in zip(examples, options, strict=True):
        scores = [next(found) for _ in offered]
        best = max(range(len(offered)), key=lambda index: scores[index].log_probability)
        best_per_token = max(range(len(offered)), key=lambda index: scores[index].per_token)
        right = offered.index(answer_of(example))
        by_sum.append(float(best == right))
        by_token.append(float(best_per_token == right))
        chosen.append(offered[best])
    (value, error), (normalized, normalized_error) = mean_with_error(by_sum), mean_with_error(by_token)
    return Score(
        {"choice": value, "choice_normalized": normalized},
        {"choice": error, "choice_normalized": normalized_error},
        len(examples),
        _samples(examples, chosen[:SAMPLES]),
    )


def _over_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    measurement: Measurement,
) -> Score:
    asked = [continuation_of(example, tokenizer) for example in examples]
    found = likelihoods(model, asked, batch_size=measurement.batch_size)

    def per_token(of_one: Callable[[Likelihood], float]) -> tuple[float, float | None]:
        return ratio_with_error([of_one(entry) for entry in found], [entry.tokens for entry in found])

    scores = {
        "token_accuracy": per_token(lambda entry: entry.correct),
        "loss": per_token(lambda entry: -entry.log_probability),
    }
    names = sorted(scores, key=lambda name: name != measurement.metric)
    samples: list[dict[str, str]] = []
    if "text" not in examples[0]:
        first = examples[:SAMPLES]
        samples = _samples(first, _answers(model, tokenizer, first, measurement))
    return Score(
        {name: scores[name][0] for name in names}, {name: scores[name][1] for name in names}, len(examples), samples
    )


def _answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    measurement: Measurement,
) -> list[str]:
    return completions(
        model,
        tokenizer,
        [question_of(example, tokenizer) for example in examples],
        max_new_tokens=measurement.max_new_tokens,
        batch_size=measurement.batch_size,
    )


def _samples(examples: Sequence[Example], answers: list[str]) -> list[dict[str, str]]:
    return [
        {"question": question_text(example), "reference": answer_of(example), "answer": answer}
        for example, answer in zip(examples, answers, strict=False)
    ]
