from __future__ import annotations

import enum
from typing import Any, Literal, Optional

import pytest

from paca.training.config.typed_values import choices, expected, matches, shown


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [0, -3], [1.0, True, "1", None]),
        (float, [0.5, 1], [True, "1e-4", None]),
        (bool, [True, False], [0, 1, "true"]),
        (str, ["a", ""], [1, True, None, ["a"]]),
        (int | None, [1, None], [1.5, "null"]),
        (Optional[float], [1, 0.5, None], ["x"]),  # noqa: UP045 - libraries still annotate so
        (Mode, ["fast"], ["fsat", 1]),
        (Mode | str, ["fast", "slow"], ["fsat", 1]),
        (Literal["a", "b", False], ["a", False], ["c", 0, True]),
        (list[str], [["a"], []], ["a", ["a", 1]]),
        (list[str] | str | None, ["a", ["a"], None], [1, [1]]),
        (set[str] | None, [["a"], None], ["a"]),
        (dict[str, int], [{"a": 1}, {}], [{"a": 1.5}, [1], {1: 1}]),
        (dict[str, list[int]], [{"a": [1]}], [{"a": 1}]),
        (dict, [{"a": 1}], [[1]]),
        (Any, [1, "a", None, {}], []),
    ],
)
def test_values_match_their_annotation(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert matches(value, annotation), value
    for value in bad:
        assert not matches(value, annotation), value


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "a whole number or null"),
        (Mode | str, "one of fast, slow"),
        (None | list[str] | str, "a list of texts or text or null"),
        (Literal["x", "y"], "one of x, y"),
        (bool, "true or false"),
        (dict[str, int], "a mapping (key: value)"),
    ],
)
def test_expectations_are_put_in_words(annotation: Any, words: str) -> None:
    assert expected(annotation) == words


def test_choices_are_what_an_annotation_names() -> None:
    assert choices(Mode | str | None) == ["fast", "slow"]
    assert choices(Literal["x"] | None) == ["x"]
    assert choices(list[str]) == []


def test_shown_values_say_their_kind_and_stay_short() -> None:
    assert shown(None) == "nothing (null)"
    assert shown(True) == "true"
    assert shown(1.5) == "the number 1.5"
    assert shown("fast") == "the text 'fast'"
    assert len(shown(["x" * 500])) < 80
