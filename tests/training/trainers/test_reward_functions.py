"""The built-in rewards of GRPO."""

from __future__ import annotations

import inspect
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import trl.rewards

from paca.data import load_examples
from paca.messages.errors import PacaError
from paca.training.trainers.reward_functions import BY_TRL, ExactMatch, check_columns, find_rewards


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "expected"),
    [
        (None, "42", 42, 1.0),
        (None, " 42 \n", "42", 1.0),
        (None, "it is 42", "42", 0.0),
        (r"####\s*(.+)", "6 * 7\n#### 42", "#### 42", 1.0),
        (r"####\s*(.+)", "#### 1,234", "1234", 1.0),
        (r"####\s*(.+)", "#### 41", "text #### 42", 0.0),
        (r"####\s*(.+)", "42", "#### 42", 0.0),
        (r"<answer>(.*?)</answer>", "<answer>a</answer><answer>b</answer>", "b", 1.0),
    ],
)
@pytest.mark.parametrize("messages", [False, True])
def test_an_answer_counts_if_it_is_the_records(
    pattern: str | None, completion: str, answer: object, expected: float, messages: bool
) -> None:
    written = [{"role": "assistant", "content": completion}] if messages else completion
    assert ExactMatch(pattern)(completions=[written], answer=[answer], prompts=["?"]) == [expected]


def test_trls_rewards_are_there() -> None:
    assert all(callable(getattr(trl.rewards, name)) for name in BY_TRL)


FUNCTIONS = """
def fails(completions, **kwargs):
    return [1 / 0 for _ in completions]
def writes(completions, **kwargs):
    return ["good" for _ in completions]
def stops(completions, **kwargs):
    return [1.0]
def divides(completions, **kwargs):
    return [1.0, float("nan")]
def bans(completions, **kwargs):
    return [1.0, -float("inf")]
def nothing(completions, **kwargs):
    return None
def works(completions, answer, **kwargs):
    return [1, None]
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"own_rewards:fails fails with ZeroDivisionError: division by zero \(.*own_rewards.py, line 3\)"),
        ("nothing", "a number or None for each of 2 completions; it returned None"),
        ("writes", "a number or None for each of 2 completions; it returned 'good' among them"),
        ("stops", "for each of 2 completions; it returned 1 values"),
        ("divides", "a number or None for each of 2 completions; it returned nan among them"),
        ("bans", "a number or None for each of 2 completions; it returned -inf among them"),
    ],
)
def test_a_function_that_gives_no_numbers_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    failing, working = find_rewards({"reward_funcs": [f"own_rewards:{name}", "own_rewards:works"]})
    assert failing.function is not None
    with pytest.raises(PacaError, match=message):
        failing.function(prompts=["?", "?"], completions=["a", "b"])
    assert working.function is not None
    assert working.function(completions=["a", "b"], answer=["", ""]) == [1, None]
    assert list(inspect.signature(working.function).parameters) == ["completions", "answer", "kwargs"]
    assert working.function.__name__ == "works"


def test_a_language_models_adapter_is_no_reward_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(PacaError, match=r"holds an adapter of a language model, which gives no reward\. Give a run of"):
        find_rewards({"reward_funcs": str(tmp_path)})


def test_columns_whose_names_the_trainer_takes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_rewards.py").write_text(
        "def reads(completions, completion, **kwargs):\n    return [1.0 for _ in completions]\n"
        "def works(completions, **kwargs):\n    return [1.0 for _ in completions]\n"
        "def short(completions):\n    return [1.0 for _ in completions]\n"
        "def needs(completions, answer, **kwargs):\n    return [1.0 for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"named_rewards:{name}" for name in ("reads", "works", "short", "needs")]
    reads, works, short, needs = find_rewards({"reward_funcs": names})
    for column, rewards, message in (
        (
            "completion",
            [reads],
            "named_rewards:reads asks for completion, which TRL does not give: it gives completions",
        ),
        (
            "completions",
            [works],
            "data.jsonl has the column completions, a name under which TRL gives rewards something",
        ),
        ("completion", [works], None),
        ("solution", [short], r"named_rewards:short takes completions, and TRL gives .* Add \*\*kwargs to"),
        ("solution", [needs], r"needs the column answer, which .* It has: solution\."),
    ):
        (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "p", column: "x"}) + "\n")
        examples = load_examples(str(tmp_path / "data.jsonl"), family="prompts")
        with pytest.raises(PacaError, match=message) if message else nullcontext():
            check_columns(rewards, examples)
