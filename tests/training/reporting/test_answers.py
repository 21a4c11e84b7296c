"""Runs and adapters of a folder that answer side by side, as the page of `paca runs` shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModelForCausalLM

from paca.pretrained.claims import Claim
from paca.training.reporting import answers as answers_module
from paca.training.reporting.answers import BASE, Shown, SideBySide
from tiny_checkpoint import save_adapter, save_run
from training.chat_answers import chats
from training.written_run import write_run

LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: `done`, another of the same base, one that stopped early, and one whose end was cut off; and an adapter."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("done", "other"):
        write_run(folder / name, steps=3, scores={})
    save_run(folder / "done")
    save_adapter(folder / "other" / "adapter", folder / "done" / "base", seed=2)
    save_adapter(folder / "copied", folder / "done" / "base", seed=3)
    write_run(folder / "cut off", steps=2)
    write_run(folder / "going", steps=2)
    return folder


def last(
    sides: SideBySide, left: str, right: str, prompt: str = "Hello", system: str | None = None
) -> tuple[Shown, Shown]:
    settings: Any = {"system": system, "max_new_tokens": LENGTH, "temperature": 0.0}
    return list(sides.answers(left, right, prompt, **settings))[-1]


def test_both_sides_answer_as_in_a_chat_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = SideBySide(folder)
    done, base, other = (
        chats(folder / "done", length=LENGTH),
        chats(folder / "done", length=LENGTH, base=True),
        chats(folder / "other", length=LENGTH),
    )
    assert len({done, base, other}) == 3
    for left, right, expected in (("done", "other", (done, other)), ("done", BASE, (done, base)), (BASE, "other", ())):
        shown = last(sides, left, right)
        if expected:
            assert (shown[0].answer, shown[1].answer) == expected
    assert shown[1].answer == other
    brief = last(sides, "done", "other", system="Be brief.")
    assert brief[0].answer == chats(folder / "done", length=LENGTH, system="Be brief.") != done
    with monkeypatch.context() as trained:
        trained.setattr("paca.pretrained.conversation.system_of_training", lambda _: "Be brief.")
        assert last(sides, "done", "other")[0].answer == brief[0].answer
        assert last(sides, "done", "other", system="")[0].answer == done


def test_the_left_one_streams_first_then_the_right_one(folder: Path) -> None:
    settings: Any = {"system": None, "max_new_tokens": LENGTH, "temperature": 0.0}
    seen = list(SideBySide(folder).answers("done", "other", "Hello", **settings))
    lengths = [(len(left.answer), len(right.answer)) for left, right in seen]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 6
    assert seen[0][0].note == "Loading ..."
    assert seen[-1][0].note == f"{folder / 'done' / 'base'} with {folder / 'done' / 'adapter'}"


def test_choices_say_which_can_not_answer_yet(folder: Path) -> None:
    with Claim(folder / "going" / ".lock") as claim:
        assert claim.take()
        choices = SideBySide(folder).choices()
        shown = last(SideBySide(folder), "going", "done")
        [base, _] = last(SideBySide(folder), BASE, "going")
    assert {label for label, _ in choices[:3]} == {"done", "other", "copied"}
    assert set(choices[3:]) == {
        ("going (still in training)", "going"),
        ("cut off (not finished)", "cut off"),
    }
    assert shown[0].answer == ""
    assert "is still going" in shown[0].note
    assert base.note.startswith("No answer: The base model is loaded with the adapter of the other side. The run in")
    assert shown[1].answer == chats(folder / "done", length=LENGTH)  # the other one answers all the same


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (BASE, BASE, "Choose a run"),
        ("cut off", "done", "is not finished"),
        ("../done", "done", "There is no '../done'"),
    ],
)
def test_what_is_wrong_is_one_sentence_on_its_side(folder: Path, left: str, right: str, message: str) -> None:
    note = last(SideBySide(folder), left, right)[0].note
    assert note.startswith("No answer: ")
    assert message in note


def test_a_failure_of_the_model_is_told_and_the_next_prompt_is_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = SideBySide(folder)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModelForCausalLM, "generate", fails)
        shown = last(sides, "done", BASE)
    assert len(shown) == 2
    for side in shown:
        assert side.note.startswith("No answer: The adapter in ")
        assert "RuntimeError: no kernel" in side.note
    assert last(sides, "done", BASE)[0].answer == chats(folder / "done", length=LENGTH)


def test_stop_ends_both_and_an_abandoned_prompt_blocks_no_other(folder: Path) -> None:
    sides = SideBySide(folder)
    settings: Any = {"system": None, "max_new_tokens": 200, "temperature": 0.0}
    stream = sides.answers("done", "other", "Hello", **settings)
    for left, _ in stream:
        if left.answer:
            break
    assert last(sides, "done", "other")[0].note.startswith("Another prompt")
    sides.stop()
    left, right = list(stream)[-1]
    assert left.note.endswith("(stopped)")
    assert len(left.answer) < 150
    assert right == Shown(note="Stopped.")
    abandoned = sides.answers("done", "other", "Hello", **settings)
    next(abandoned)
    abandoned.close()
    assert last(sides, "done", "other")[1].answer == chats(folder / "other", length=LENGTH)


def test_one_base_model_is_loaded_for_all_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    load: Callable[..., object] = answers_module.ModelsInTurn.load

    def counted(*arguments: object, **options: object) -> object:
        loads.append(loaded := load(*arguments, **options))
        return loaded

    monkeypatch.setattr(answers_module.ModelsInTurn, "load", counted)
    sides = SideBySide(folder)
    last(sides, "done", "other")
    last(sides, "other", BASE)
    assert len(loads) == 4
    assert len({id(loaded.model.get_base_model()) for loaded in loads}) == 1  # type: ignore[attr-defined]
