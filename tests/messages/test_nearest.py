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


def test_several_names_can_be_offered() -> None:
    tasks = ["arc_easy", "ai2_arc_easy", "mmlu"]
    assert did_you_mean("arc_eazy", tasks, "{}", count=3) == " Did you mean arc_easy or ai2_arc_easy?"
    assert did_you_mean("arc_eazy", tasks, "{}") == " Did you mean arc_easy?"
