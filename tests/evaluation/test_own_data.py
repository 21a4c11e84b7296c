"""Scoring a model on its own data, against sums taken one example and one token at a time."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

from paca.data import load_examples
from paca.data.conversion import ORIGIN
from paca.evaluation import own_data
from paca.evaluation.completions import completions
from paca.evaluation.encoding import continuation_of, question_of
from paca.evaluation.log_likelihood import Continuation, Likelihood, likelihoods
from paca.evaluation.own_data import Measurement, Score, measure
from paca.evaluation.statistics import mean_with_error, ratio_with_error, share_may_be_off
from paca.messages.errors import PacaError
from paca.pretrained.answer_pattern import extract_answers
from paca.pretrained.generation import LoadedModel, load_for_generation, stream_reply

QUESTIONS = [
    {"question": "2+2?", "choices": ["3", "4", "five"], "answer": 1},
    {"question": "Which is much, much longer than the others?", "choices": ["a", "b"], "answer": 0},
    {"question": "?", "choices": ["x", "y", "z", "w"], "answer": 3},
]
SUMS = [{"prompt": f"{n}+1=", "completion": f"so it is #### {n + 1}"} for n in range(7)]


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> LoadedModel:
    return load_for_generation(run_folder)


def examples(folder: Path, rows: list[dict[str, Any]]) -> Any:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(file)).dataset


def naive(model: Any, continuation: Continuation) -> list[tuple[float, bool]]:
    """Log-probability of each token of the answer and whether it is the likeliest, in float64, one at a time."""
    found = []
    for index, token in enumerate(continuation.answer):
        tokens = torch.tensor([continuation.prompt + continuation.answer[:index]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, -1].double()
        found.append((float(torch.log_softmax(logits, -1)[token]), int(logits.argmax()) == token))
    return found


AWKWARD = [
    Continuation([1, 2, 3], [4]),
    Continuation([5], [6, 7, 8, 9, 10]),
    Continuation(list(range(20, 60)), list(range(60, 75))),
    Continuation([9, 9], [9, 9, 9]),
    Continuation([5], [6, 7]),
]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_likelihoods_of_a_padded_batch_are_those_of_each_answer_alone(loaded: LoadedModel, batch_size: int) -> None:
    found = likelihoods(loaded.model, AWKWARD, batch_size=batch_size)
    for likelihood, continuation in zip(found, AWKWARD, strict=True):
        expected = naive(loaded.model, continuation)
        total = sum(value for value, _ in expected)
        # float32 sums: the logits' rounding, 2^-23 of up to about 100 terms of magnitude 10, and the softmax's.
        assert likelihood.log_probability == pytest.approx(total, rel=2e-5)
        assert likelihood.per_token == pytest.approx(total / len(expected), rel=2e-5)
        assert (likelihood.tokens, likelihood.correct) == (len(expected), sum(right for _, right in expected))


def test_a_prompt_that_is_too_long_loses_its_beginning(loaded: LoadedModel) -> None:
    tokens = [index % 200 for index in range(300)]
    long, fitting = likelihoods(loaded.model, [Continuation(tokens, [5, 6]), Continuation(tokens[-255:], [5, 6])])
    assert long == fitting
    with pytest.raises(PacaError, match=r"answer is 257 tokens long; the model's context is 256"):
        likelihoods(loaded.model, [Continuation([1], tokens[:257])])


def test_likelihoods_follow_the_adapter(loaded: LoadedModel) -> None:
    adapted = likelihoods(loaded.model, AWKWARD)
    with loaded.model.disable_adapter():
        base = likelihoods(loaded.model, AWKWARD)
        assert base[1].log_probability == pytest.approx(sum(v for v, _ in naive(loaded.model, AWKWARD[1])), rel=2e-5)
    assert base != adapted
    assert likelihoods(loaded.model, AWKWARD) == adapted


@pytest.mark.parametrize("batch_size", [1, 3])
def test_completions_of_a_padded_batch_are_those_of_each_prompt_alone(loaded: LoadedModel, batch_size: int) -> None:
    texts = ["hi", "What is the longest of these prompts?", "x", "Count."]
    messages = [[{"role": "user", "content": text}] for text in texts]
    alone = ["".join(stream_reply(loaded, asked, max_new_tokens=12)) for asked in messages]
    prompts = [question_of({"prompt": asked, "origin": ""}, loaded.tokenizer) for asked in messages]
    assert completions(loaded.model, loaded.tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == alone
    assert len(set(alone)) > 1


def test_an_answer_needs_room_in_the_context(loaded: LoadedModel) -> None:
    with pytest.raises(PacaError, match="leave no room for a prompt in the model's context of 256"):
        completions(loaded.model, loaded.tokenizer, [[1]], max_new_tokens=256)


def test_choice_takes_the_likeliest_option_and_the_likeliest_per_token(loaded: LoadedModel, tmp_path: Path) -> None:
    data = examples(tmp_path, QUESTIONS)
    right, right_normalized = [], []
    for row, example in zip(QUESTIONS, data, strict=True):
        scores = [
            [value for value, _ in naive(loaded.model, continuation_of(example, loaded.tokenizer, label))]
            for label in example["options"]
        ]
        sums = [sum(values) for values in scores]
        means = [sum(values) / len(values) for values in scores]
        right.append(float(sums.index(max(sums)) == row["answer"]))
        right_normalized.append(float(means.index(max(means)) == row["answer"]))
    score = measure(loaded.model, loaded.tokenizer, data, Measurement("choice", batch_size=2))
    assert score.values == {"choice": statistics.mean(right), "choice_normalized": statistics.mean(right_normalized)}
    assert score.means["choice"][1] == pytest.approx(statistics.stdev(right) / math.sqrt(3))
    assert [sample["reference"] for sample in score.samples] == ["B", "A", "D"]
    assert all(sample["answer"] in "ABCD" for sample in score.samples)


def test_the_normalized_choice_may_be_a_longer_option(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = examples(tmp_path, [{**QUESTIONS[1], "answer": 1}])
    said = [Likelihood(-2.0, 1, 0), Likelihood(-3.0, 4, 0)]
    monkeypatch.setattr(own_data, "likelihoods", lambda *_, **__: said)
    score = measure(loaded.model, loaded.tokenizer, data, Measurement("choice"))
    assert score.values == {"choice": 0.0, "choice_normalized": 1.0}
    assert [error for _, error in score.means.values()] == [None, None]


@pytest.mark.parametrize("columns", [("instruction", "output"), ("prompt", "completion")])
def test_loss_and_token_accuracy_are_per_answer_token_over_all_examples(
    loaded: LoadedModel, tmp_path: Path, columns: tuple[str, str]
) -> None:
    asked, answered = columns
    rows = [{asked: f"Say {n} words.", answered: "word " * n} for n in (1, 2, 9)]
    data = examples(tmp_path, rows)
    all_tokens = [naive(loaded.model, continuation_of(example, loaded.tokenizer)) for example in data]
    flat = [entry for tokens in all_tokens for entry in tokens]
    score = measure(loaded.model, loaded.tokenizer, data, Measurement("loss", max_new_tokens=4))
    assert list(score.values) == ["loss", "token_accuracy"]
    assert score.values["loss"] == pytest.approx(-statistics.mean(value for value, _ in flat), rel=2e-5)
    assert score.values["token_accuracy"] == pytest.approx(statistics.mean(right for _, right in flat))
    assert [sample["reference"] for sample in score.samples] == [row[answered] for row in rows]
    accuracy = measure(loaded.model, loaded.tokenizer, data, Measurement("token_accuracy", max_new_tokens=4))
    assert list(accuracy.values) == ["token_accuracy", "loss"]
    assert accuracy.values == score.values


def test_answers_that_only_people_read_fit_the_models_context(loaded: LoadedModel, tmp_path: Path) -> None:
    data = examples(tmp_path, SUMS[:2])
    score = measure(loaded.model, loaded.tokenizer, data, Measurement("loss", max_new_tokens=10_000))
    assert (
        score.samples == measure(loaded.model, loaded.tokenizer, data, Measurement("loss", max_new_tokens=128)).samples
    )


def test_plain_text_has_a_loss_and_no_question(loaded: LoadedModel, tmp_path: Path) -> None:
    data = examples(tmp_path, [{"text": "Once upon a time"}, {"text": "The end"}])
    score = measure(loaded.model, loaded.tokenizer, data, Measurement("loss"))
    tokens = [naive(loaded.model, continuation_of(example, loaded.tokenizer)) for example in data]
    assert [len(found) for found in tokens] == [len("Once upon a time"), len("The end")]  # of bytes, and the end token
    assert score.values["loss"] == pytest.approx(-statistics.mean(v for found in tokens for v, _ in found), rel=2e-5)
    assert score.samples == []
    with pytest.raises(PacaError, match="line 1: plain text has no question"):
        question_of(data[0], loaded.tokenizer)


def test_the_last_answer_of_a_conversation_is_the_one_that_counts(loaded: LoadedModel, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "no"), ("user", "why")]
    [example] = examples(tmp_path, [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    decoded = loaded.tokenizer.decode(continuation_of(example, loaded.tokenizer).answer)
    assert decoded == "no<|im_end|>\n"
    asked = loaded.tokenizer.decode(question_of(example, loaded.tokenizer))
    assert asked.endswith("more<|im_end|>\n<|im_start|>assistant\n")


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    """The model, whatever it is asked, says this."""
    monkeypatch.setattr(own_data, "completions", lambda *_, **__: answers)


def exact_match(loaded: LoadedModel, data: Any, pattern: str | None) -> Score:
    return measure(loaded.model, loaded.tokenizer, data, Measurement("exact_match", pattern, max_new_tokens=9))


def test_exact_match_compares_what_the_pattern_finds_last(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["#### 1", "#### 1 no, #### 2", "3", "well ####  4 ", "#### 5 apples", "#### 7", "#### 7"]
    answering(monkeypatch, answers)
    score = exact_match(loaded, examples(tmp_path, SUMS), r"####\s*(.+?)(?=\s*(?:no|$))")
    right = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert score.values == {"exact_match": pytest.approx(statistics.mean(right))}
    assert score.means["exact_match"][1] == pytest.approx(statistics.stdev(right) / math.sqrt(7))
    assert [sample["answer"] for sample in score.samples] == answers[:5]


def test_references_that_are_longer_than_answers_may_be_are_told(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, ["four", "x"])
    rows = [{"prompt": "2 + 2?", "completion": text} for text in ("four", "as many as two and two are")]
    with pytest.warns(UserWarning, match=r"^1 of 2 reference answers has more than eval\.max_new_tokens = 9 tokens"):
        exact_match(loaded, examples(tmp_path, rows), None)


def test_exact_match_asks_the_model(loaded: LoadedModel, tmp_path: Path) -> None:
    data = examples(tmp_path, SUMS[:3])
    prompts = [question_of(example, loaded.tokenizer) for example in data]
    said = completions(loaded.model, loaded.tokenizer, prompts, max_new_tokens=9)
    rows = [{"prompt": row["prompt"], "completion": text} for row, text in zip(SUMS, said, strict=False)]
    told = examples(tmp_path, rows)
    score = measure(loaded.model, loaded.tokenizer, told, Measurement("exact_match", max_new_tokens=9))
    assert score.values == {"exact_match": 1.0}
    with loaded.model.disable_adapter():
        base = measure(loaded.model, loaded.tokenizer, told, Measurement("exact_match", max_new_tokens=9))
    assert base.values["exact_match"] < 1


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("a  b\n c ", None, "a b c"),
        ("x #### 1,450", r"####\s*(.+)", "1450"),
        ("1,2,3", None, "1,2,3"),
        ("no answer", r"####\s*(.+)", None),
        ("answer: 5", r"\d+", "5"),
        ("", None, ""),
        ("so y", r"x(.)|y", ""),
        ("\ud800 é 7", r"é (.)", "7"),
    ],
)
def test_answers_are_made_comparable(text: str, pattern: str | None, expected: str | None) -> None:
    assert extract_answers([text, ""], pattern)[0] == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(.+)+!", "takes too long on 2 texts"),
        ("a{99999999999}", "is no regular expression .OverflowError"),
        ("(" * 5000 + ")" * 5000, "is no regular expression .RecursionError"),
    ],
)
def test_a_strangers_pattern_ends(loaded: LoadedModel, pattern: str, message: str) -> None:
    row = {"prompt": "?", "completion": "a" * 40, ORIGIN: "here"}
    with pytest.raises(PacaError, match=rf"^eval\.answer_pattern: .*{message}") as error:
        Measurement("exact_match", pattern).check([row] * 2, loaded.model)
    assert len(str(error.value)) < 500


def test_what_a_metric_lacks_is_said(loaded: LoadedModel, tmp_path: Path) -> None:
    data = examples(tmp_path, SUMS)
    with pytest.raises(PacaError, match="line 1: there are no options to choose from"):
        measure(loaded.model, loaded.tokenizer, data, Measurement("choice"))
    other = examples(tmp_path, [{"question": "Which?", "answer": "z", "options": ["x", "y"]}])
    with pytest.raises(PacaError, match=r"line 1: the answer 'z' is not among the options \['x', 'y'\]\."):
        measure(loaded.model, loaded.tokenizer, other, Measurement("choice"))
    with pytest.raises(PacaError, match=r"line 1: the pattern '= \(.\)' finds no answer in the reference"):
        exact_match(loaded, data, "= (.)")
    with pytest.raises(PacaError, match=r"'\(' is no regular expression"):
        Measurement("exact_match", "(")
    with pytest.raises(PacaError, match="no examples to measure on"):
        measure(loaded.model, loaded.tokenizer, [], Measurement("loss"))


def test_measuring_leaves_the_model_in_its_mode(loaded: LoadedModel, tmp_path: Path) -> None:
    data = examples(tmp_path, QUESTIONS)
    loaded.model.train()
    try:
        measure(loaded.model, loaded.tokenizer, data, Measurement("choice"))
        assert loaded.model.training
    finally:
        loaded.model.eval()


def test_answers_that_are_all_right_leave_room_as_wilsons_interval_says() -> None:
    for count in (1, 20, 1000):
        low = scipy.stats.binomtest(count, count).proportion_ci(0.95, "wilson").low
        assert share_may_be_off(count) == pytest.approx(1 - low, rel=1e-4)


def test_standard_errors_are_those_of_a_mean_and_of_a_ratio() -> None:
    assert mean_with_error([1.0, 0.0, 0.0, 1.0]) == (0.5, pytest.approx(statistics.stdev([1, 0, 0, 1]) / 2))
    assert mean_with_error([0.25]) == (0.25, None)
    # Equal ratios in every example leave no doubt, however much their sizes differ.
    assert ratio_with_error([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == (2.0, 0.0)
    # Measured by drawing: the estimate's spread over many samples is what the formula says of one.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (400, 200), generator=generator).double()
    sums = weights * (2 + torch.randn(400, 200, generator=generator, dtype=torch.float64))
    drawn = [ratio_with_error(s.tolist(), w.tolist()) for s, w in zip(sums, weights, strict=True)]
    spread = statistics.stdev(ratio for ratio, _ in drawn)
    assert statistics.mean(error for _, error in drawn if error is not None) == pytest.approx(spread, rel=0.1)


def test_an_answer_that_calls_a_tool_is_no_text_to_match(loaded: LoadedModel, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    rows = examples(tmp_path, [{"messages": [{"role": "user", "content": "a"}, call]}])
    with pytest.raises(PacaError, match=r"line 1: the last answer calls a tool.*Take token_accuracy or loss"):
        Measurement("exact_match").check(rows, loaded.model)
    Measurement("loss").check(rows, loaded.model)
