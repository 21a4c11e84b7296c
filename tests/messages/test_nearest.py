from __future__ import annotations

from pathlib import Path

import pytest

from paca.messages.nearest import did_you_mean, did_you_mean_path, nearest

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


def test_a_name_in_another_case_is_the_nearest() -> None:
    assert did_you_mean("DPO", ["sft", "dpo", "DPA"]) == " Did you mean 'dpo'?"
    assert nearest("Seed", NAMES, cutoff=0.9) == "seed"
    assert nearest("dpo", ["DPO", "dpo"]) == "dpo"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("answer.yaml", "answers.yaml"),
        ("run/answers", "runs/answers"),  # the folder's name is wrong
        ("runs/answer", "runs/answers"),
        ("runs/answer/adapter", "runs/answers/adapter"),
        ("runs/answer/none", None),
        ("qqq", None),
        ("nothere.yaml", None),  # alike by the suffix alone
        ("runs/\0", None),
    ],
)
def test_one_part_of_a_path_may_be_misspelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, meant: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/answers/adapter").mkdir(parents=True)
    Path("answers.yaml").touch()
    assert did_you_mean_path(wrong, Path.exists) == ("" if meant is None else f" Did you mean {meant!r}?")


def test_only_what_is_of_the_wanted_kind_is_offered(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers.yaml").touch()
    assert did_you_mean_path(tmp_path / "answer", Path.is_file) == f" Did you mean '{tmp_path / 'answers.yaml'}'?"
