from __future__ import annotations

from paca.messages.nearest import did_you_mean, nearest

NAMES = {"learning_rate": 1, "seed": 2}


def test_the_closest_name_is_found_and_nothing_where_none_is_close() -> None:
    assert nearest("learning_rat", NAMES) == "learning_rate"
    assert nearest("qqq", NAMES) is None
    assert nearest("learn", NAMES, cutoff=0.9) is None


def test_the_question_is_ready_to_be_put_after_a_sentence() -> None:
    assert did_you_mean("sed", NAMES, "train.{}") == " Did you mean train.seed?"
    assert did_you_mean("qqq", NAMES) == ""
