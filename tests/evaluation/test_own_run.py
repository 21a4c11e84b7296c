"""A run's own data, base and adapter: told as it goes, and resumed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from evaluation.tally import Tally
from paca.cli.evaluate import columns_of_flag
from paca.cli.evaluate_tables import number
from paca.data import Examples
from paca.evaluation.completions import completions
from paca.evaluation.own_data import Score
from paca.evaluation.own_run import (
    config_of_run,
    evaluate_run,
    has_turns,
    held_out_of,
    load_run,
    metric_of,
    other_data,
    other_form,
    rows_of_run,
    trained_on,
    write_scores,
)
from paca.evaluation.side_by_side import note_on_errors
from paca.messages.errors import PacaError
from paca.pretrained.generation import LoadedModel, load_for_generation
from paca.training.config.run_config import RunConfig
from paca.training.folder.same_run import inputs_of
from paca.training.trainers import trainer_kind

ROWS = [{"question": f"Which, of {n}?", "choices": ["a", "b", "c"], "answer": n % 3} for n in range(4)]


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    content = {"model": {"name": str(folder / "base")}, "data": {"train": str(data), "eval": str(data)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> LoadedModel:
    return load_for_generation(run_folder)


def config_with(run: Path, metric: str) -> RunConfig:
    return config_of_run(run, overrides=[f"eval.metric={metric}", "eval.max_new_tokens=3"])


def test_another_metric_leaves_out_the_pattern_of_the_run_s_own(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["eval"] = {"metric": "exact_match", "answer_pattern": "#### (.*)"}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert config_of_run(run, overrides=["eval.metric=loss"]).eval.answer_pattern is None
    assert config_of_run(run, overrides=["eval.metric=exact_match"]).eval.answer_pattern == "#### (.*)"


def held_out(run: Path) -> Examples:
    return held_out_of(run, config_of_run(run))[0]


@pytest.mark.parametrize(
    ("metric", "asked"),
    [("choice", [12, 12]), ("exact_match", [4, 4]), ("loss", [4, 4, 4, 4])],  # the loss, then answers to show
)
def test_what_was_answered_before_ctrl_c_is_not_asked_again(
    run: Path, loaded: LoadedModel, metric: str, asked: list[int]
) -> None:
    config = config_with(run, metric)
    whole = Tally()
    expected = evaluate_run(loaded, config, held_out(run), None, 2, run / "whole", whole)
    assert [total for _, total in whole.begun] == asked
    assert [who for who, _ in whole.begun] == ["base"] * (len(asked) // 2) + ["adapter"] * (len(asked) // 2)
    assert whole.done == sum(asked)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(loaded, config, held_out(run), None, 2, run / "out", Tally(stop_after=asked[0] + 3))
    rest = Tally()
    assert evaluate_run(loaded, config, held_out(run), None, 2, run / "out", rest) == expected
    assert rest.done == sum(asked) - asked[0] - 3
    again = Tally()
    assert evaluate_run(loaded, config, held_out(run), None, 2, run / "out", again) == expected
    assert again.begun == []


@pytest.mark.parametrize("metric", ["loss", "choice"])
def test_the_difference_has_the_error_of_the_differences_one_by_one(
    run: Path, loaded: LoadedModel, metric: str, tmp_path: Path
) -> None:
    scores = evaluate_run(loaded, config_with(run, metric), held_out(run), None, 2, None, Tally())
    before, after = scores["base"], scores["adapter"]
    count, tokens = len(ROWS), after.weights
    row = rows_of_run(scores)[0]
    assert row.difference is not None
    assert row.difference[0] == pytest.approx(after.values[metric] - before.values[metric])
    one_by_one = [new - old for old, new in zip(before.sums[metric], after.sums[metric], strict=True)]
    squares = sum((one - row.difference[0] * n) ** 2 for one, n in zip(one_by_one, tokens, strict=True))
    assert row.difference[1] == pytest.approx((count / (count - 1) * squares) ** 0.5 / sum(tokens))
    written = json.loads(write_scores(tmp_path, scores, "new.jsonl").read_text())
    assert written["data"] == "new.jsonl"
    assert (written["difference"][metric], written["difference"][f"{metric}_stderr"]) == row.difference
    assert written["base"] == before.as_dict()


def test_all_right_and_all_wrong_is_said_to_be_no_certainty() -> None:
    def score(right: float) -> Score:
        return Score({"choice": [right] * 20}, [1.0] * 20, [])

    rows = rows_of_run({"base": score(0), "adapter": score(1)})
    assert rows[0].difference == (1.0, 0.0)
    assert note_on_errors(rows) == (
        "A number without ± has no standard error: all questions came out alike. With 20 questions, a share of 0 or "
        "1 may be off by 0.16 (95 %, Wilson)."
    )
    assert number((1.0, 0.0)) == "1.0000"
    half = Score({"choice": [0.0, 1.0]}, [1.0] * 2, [])
    assert note_on_errors(rows_of_run({"model": half})) is None


def test_a_share_of_tokens_is_none_of_questions() -> None:
    tokens = Score({"token_accuracy": [2.0] * 8}, [2.0] * 8, [])
    note = note_on_errors(rows_of_run({"model": tokens}))
    assert note == "A number without ± has no standard error: all questions came out alike."


def test_a_run_is_measured_without_the_gguf_file_that_its_base_is_from(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["model"]["name"] = str(run.parent / "gone.gguf")
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert len(held_out(run).dataset) == len(ROWS)


@pytest.mark.parametrize(("answers", "several"), [(1, False), (2, True)])
def test_of_conversations_with_turns_it_is_said_that_the_last_answer_counts(
    run: Path, tmp_path: Path, answers: int, several: bool
) -> None:
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}] * answers
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    assert has_turns(other_data(run, config_of_run(run, str(file)))) is several


def test_without_a_folder_nothing_is_kept(run: Path, loaded: LoadedModel) -> None:
    before = sorted(run.rglob("*"))
    evaluate_run(loaded, config_with(run, "choice"), held_out(run), 2, 2, None, Tally())
    assert sorted(run.rglob("*")) == before


def test_without_a_folder_no_answers_are_written_for_people_to_read(run: Path, loaded: LoadedModel) -> None:
    tally = Tally()
    scores = evaluate_run(loaded, config_with(run, "loss"), held_out(run), None, 2, None, tally)
    assert [total for _, total in tally.begun] == [4, 4]
    assert not scores["adapter"].samples


def record(run: Path) -> None:
    """What a training leaves in the folder."""
    config = config_of_run(run)
    data = trainer_kind(config.train).read(config)
    (run / "inputs.json").write_text(json.dumps(inputs_of(config, data.train, data.eval)))


def test_held_out_data_that_is_not_what_it_was_is_told(run: Path, tmp_path: Path) -> None:
    record(run)
    assert held_out_of(run, config_of_run(run))[1] is None
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + json.dumps(ROWS[0]) + "\n")
    examples, note = held_out_of(run, config_of_run(run))
    assert len(examples.dataset) == len(ROWS) + 1
    assert note == f"data.eval ({data}) is not what it was in training: these are other examples."


def test_held_out_data_is_not_split_off_anew_from_other_data(run: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "data": {**content["data"], "eval": 2}}))
    record(run)
    config = config_of_run(run)
    config.eval.limit = 1
    assert held_out_of(run, config)[1] is None
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(PacaError, match="examples that it was trained on would be among it"):
        held_out_of(run, config_of_run(run))


@pytest.mark.parametrize("split_off", [False, True])
def test_more_examples_than_training_measured_can_be_asked_for(run: Path, split_off: bool) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text()) | {"eval": {"limit": 1}}
    content["data"]["eval"] = 3 if split_off else content["data"]["eval"]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    record(run)
    for asked, counts in ((None, 1), (1, 1), (2, 2), (100, 3 if split_off else 4)):
        examples, note = held_out_of(run, config_of_run(run), asked)
        assert (len(examples.dataset), note) == (counts, None)


def test_other_data_need_not_be_of_the_form_that_the_run_names(run: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "data": {**content["data"], "format": "alpaca"}}))
    file = tmp_path / "new.jsonl"
    for row, form in (
        ({"instruction": "Say a.", "output": "a", "text": "Say a. a"}, "alpaca"),
        ({"question": "Say a.", "answer": "a"}, "question-answer"),
    ):
        file.write_text(json.dumps(row) + "\n")
        assert other_data(run, config_of_run(run, str(file))).format == form
    file.write_text(json.dumps({"instruction": "Say a.", "output": ""}) + "\n")
    with pytest.raises(PacaError, match="line 1"):
        other_data(run, config_of_run(run, str(file)))


def test_other_data_than_the_runs_own_is_measured(run: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    """All of it, although the run says how much of its own; and the training data may be gone."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["data"]["train"] = str(tmp_path / "gone.jsonl")
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "eval": {"metric": "choice", "limit": 1}}))
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    config = config_of_run(run, str(tmp_path / "new.jsonl"))
    scores = evaluate_run(loaded, config, other_data(run, config), None, 2, None, Tally())
    assert {side: score.examples for side, score in scores.items()} == {"base": 3, "adapter": 3}
    assert scores == evaluate_run(loaded, config_with(run, "choice"), other_data(run, config), None, 2, None, Tally())
    assert rows_of_run(scores, "new.jsonl")[0].task == "new.jsonl, 3 examples"
    assert trained_on(run, other_data(run, config)) is None


def test_of_an_adapter_that_no_run_left_the_loss_is_measured(run: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    adapter = shutil.copytree(run / "adapter", tmp_path / "saved")
    config = config_of_run(adapter, str(tmp_path / "new.jsonl"))
    held_out = other_data(adapter, config)
    scores = evaluate_run(load_run(adapter, config), config, held_out, None, 2, None, Tally())
    of_run = evaluate_run(loaded, config_with(run, "loss"), held_out, None, 2, None, Tally())
    assert {side: score.values for side, score in scores.items()} == {
        side: score.values for side, score in of_run.items()
    }
    assert trained_on(adapter, held_out) is None
    (adapter / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(PacaError, match="is a classifier, which --data measures by its run"):
        config_of_run(adapter, str(tmp_path / "new.jsonl"))


def test_of_an_adapter_that_no_run_left_another_metric_is_measured_on_request(
    run: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    data, adapter = str(tmp_path / "new.jsonl"), shutil.copytree(run / "adapter", tmp_path / "saved")
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    config = config_of_run(adapter, data, None, ["eval.metric=choice"])
    assert metric_of(config) == "choice"
    held_out = other_data(adapter, config)
    scores = evaluate_run(load_run(adapter, config), config, held_out, None, 2, None, Tally())
    assert scores == evaluate_run(loaded, config_with(run, "choice"), held_out, None, 2, None, Tally())
    with pytest.raises(PacaError, match=r"--set: eval\.answer_pattern goes with eval\.metric: exact_match"):
        config_of_run(adapter, data, None, ["eval.answer_pattern=sum"])
    with pytest.raises(PacaError, match=r"there is no key eval\.metrik"):
        config_of_run(adapter, data, None, ["eval.metrik=choice"])


def test_other_data_that_was_trained_on_is_told(run: Path, tmp_path: Path) -> None:
    """But not the part of it that was held out."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "data": {**content["data"], "eval": 1}}))
    config = config_of_run(run, content["data"]["train"])
    told = "3 of the 4 examples are in the run's training data: it has seen their answers."
    assert trained_on(run, other_data(run, config)) == told
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"question": "Another?", "answer": "Yes"}) + "\n")
    both = {"train": [content["data"]["train"], str(more)], "eval": 1}
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "data": both}))
    told = trained_on(run, other_data(run, config)) or ""
    assert re.match("[34] of the 4 examples are in the run's training data", told)  # one of five is held out


@pytest.mark.parametrize(("trainer", "writes"), [("dpo", True), ("reward", False)])
def test_a_run_without_reference_answers_is_told_where_its_scores_are(run: Path, trainer: str, writes: bool) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "train": {"trainer": trainer}}))
    with pytest.raises(PacaError, match="What training measured is in") as caught:
        config_of_run(run)
    assert str(run / "summary.json") in str(caught.value)
    assert ("--mt-bench" in str(caught.value)) == writes


def test_other_data_may_have_other_names_of_columns(run: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "fragen.csv"
    file.write_text("Frage,Antwort\n" + "".join(f'"{row["question"]}","{row["answer"]}"\n' for row in ROWS[:3]))
    plain = tmp_path / "rows.jsonl"
    rows = [{"question": row["question"], "answer": str(row["answer"])} for row in ROWS[:3]]
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PacaError, match=r"`paca evaluate --data`: --columns question=Frage,answer=Antwort; in Python"):
        other_data(run, config_of_run(run, str(file)))
    named = columns_of_flag("question=Frage, answer=Antwort")
    found = [other_data(run, config_of_run(run, str(file), named)), other_data(run, config_of_run(run, str(plain)))]
    config = config_with(run, "loss")
    one, other = (evaluate_run(loaded, config, data, None, 2, None, Tally()) for data in found)
    assert {side: score.values for side, score in one.items()} == {side: score.values for side, score in other.items()}
    with pytest.raises(
        PacaError, match=r"--data: .*rows\.jsonl: there is no column foo, which data\.columns names; fou"
    ):
        other_data(run, config_of_run(run, str(plain), {"question": "foo"}), columns_given=True)
    with pytest.raises(PacaError, match="expected a form's names, each with yours"):
        columns_of_flag("question=Frage", "Frage")
    assert columns_of_flag("question=Frage", "answer=Antwort, tools=Werkzeuge") == {
        "question": "Frage",
        "answer": "Antwort",
        "tools": "Werkzeuge",
    }


def test_data_of_another_form_than_was_trained_on_is_told(run: Path, tmp_path: Path) -> None:
    """It was scored as plain text, in a table that looked like any other."""
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "Some text.", "label": "a"}) + "\n")
    other = other_data(run, config_of_run(run, str(file)))
    assert other_form(run, other, "loss") is None  # an unfinished run's form is not known
    (run / "summary.json").write_text(json.dumps({"data": {"format": "question-answer"}}))
    assert other_form(run, other, "loss") == (
        "The run was trained on data of the form question-answer. This is of the form text: every token of its texts "
        "will be scored."
    )
    assert other_form(run, held_out(run), "loss") is None
    assert other_form(run, other, "exact_match") is None


def test_answers_take_the_likeliest_token_whatever_a_checkpoint_asks_for(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty for repetition chose other tokens: digits that come again, for one."""
    prompts = [loaded.tokenizer("What is 7?")["input_ids"]]
    plain = completions(loaded.model, loaded.tokenizer, prompts, max_new_tokens=12)
    for name, value in {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3, "min_length": 9}.items():
        monkeypatch.setattr(loaded.model.generation_config, name, value)
        assert completions(loaded.model, loaded.tokenizer, prompts, max_new_tokens=12) == plain, name
