"""lm-evaluation-harness on one copy of the weights: right results, kept answers, clear refusals."""

from __future__ import annotations

import json
import math
import pickle
import resource
import sqlite3
import statistics
from pathlib import Path
from typing import Any

import lm_eval
import peft
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

import paca
from evaluation.question_tasks import READ, WRITTEN, save_group, save_task
from evaluation.tally import Tally
from paca.convert.merged import merge_to_folder
from paca.evaluation.harness import HarnessSettings, evaluate_tasks
from paca.evaluation.side_by_side import rows_of
from paca.evaluation.task_files import load_tasks
from paca.messages.errors import PacaError
from paca.pretrained.generation import LoadedModel, load_for_generation
from tiny_checkpoint import save_base


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> LoadedModel:
    return load_for_generation(run_folder)


def evaluated(loaded: LoadedModel, output: Path, *tasks: Path, tally: Tally | None = None, **settings: Any) -> Any:
    found = load_tasks(list(map(str, tasks)))
    return evaluate_tasks(loaded, found, HarnessSettings(**settings), output, tally or Tally())


def alone(model: Path, task: Path) -> dict[str, Any]:
    """What the harness itself says of a plain checkpoint."""
    lm = HFLM(pretrained=str(model), device="cpu", batch_size=3)
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=[str(task)], task_manager=manager, log_samples=False)["results"]


@pytest.fixture(scope="module")
def merged(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_to_folder(run_folder, folder)
    return folder


@pytest.mark.parametrize("template", [None, WRITTEN, READ], ids=["choice", "written", "read"])
def test_base_and_adapter_score_as_the_harness_scores_them_as_plain_checkpoints(
    loaded: LoadedModel,
    run_folder: Path,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    template: str | None,
) -> None:
    task = save_task(tmp_path, "sums", 20, *([template] if template else []))
    results = evaluated(loaded, tmp_path / "out", task)
    assert "Running " not in capsys.readouterr().err  # the harness's own bars
    monkeypatch.chdir(tmp_path)  # where the harness itself looks for data files
    assert list(results) == ["base", "adapter"]
    assert results["base"]["results"] == alone(run_folder / "base", task)
    assert results["adapter"]["results"] == alone(merged, task)


def test_the_adapter_is_active_again_afterwards_and_one_copy_serves_both(loaded: LoadedModel, tmp_path: Path) -> None:
    weights = {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()}
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    evaluated(loaded, tmp_path / "out", save_task(tmp_path, "sums", 4))
    assert {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()} == weights
    assert all(parameter.equal(before[name]) for name, parameter in loaded.model.named_parameters())


def test_the_files_are_the_harness_s_own_results(loaded: LoadedModel, run_folder: Path, tmp_path: Path) -> None:
    results = evaluated(loaded, tmp_path / "out", save_task(tmp_path, "sums", 6), limit=5)
    adapter = json.loads((tmp_path / "out" / "results.json").read_text())
    base = json.loads((tmp_path / "out" / "base" / "results.json").read_text())
    assert adapter["results"] == results["adapter"]["results"]
    assert base["results"] == results["base"]["results"]
    assert adapter["n-samples"] == {"sums": {"original": 6, "effective": 5}}
    assert adapter["config"]["model_args"]["peft"] == str(run_folder / "adapter")
    assert "peft" not in base["config"]["model_args"]
    assert {"configs", "versions", "n-shot", "higher_is_better", "lm_eval_version", "date"} <= adapter.keys()
    assert "samples" not in adapter


def test_what_is_finished_is_not_computed_again(loaded: LoadedModel, tmp_path: Path) -> None:
    first, second = save_task(tmp_path, "first", 5), save_task(tmp_path, "second", 3)
    tally = Tally()
    evaluated(loaded, tmp_path / "out", first, tally=tally)
    assert tally.begun == [("base", 15), ("adapter", 15)]
    again, more = Tally(), Tally()
    same = evaluated(loaded, tmp_path / "out", first, tally=again)
    assert again.begun == []
    both = evaluated(loaded, tmp_path / "out", first, second, tally=more)
    assert more.begun == [("base", 9), ("adapter", 9)]
    assert both["adapter"]["results"]["first"] == same["adapter"]["results"]["first"]


def test_results_of_other_tasks_or_settings_stay_beside_the_new_ones(loaded: LoadedModel, tmp_path: Path) -> None:
    task, output = save_task(tmp_path, "sums", 5), tmp_path / "out"
    evaluated(loaded, output, task)
    evaluated(loaded, output, task)  # the same again
    assert not list(output.rglob("results_*.json"))
    first = [json.loads((output / name / "results.json").read_text()) for name in ("", "base")]
    evaluated(loaded, output, task, limit=2)
    kept = [next((output / name).glob("results_*.json")) for name in ("", "base")]
    assert [json.loads(path.read_text()) for path in kept] == first
    assert json.loads((output / "results.json").read_text())["n-samples"]["sums"]["effective"] == 2


@pytest.mark.parametrize("stop_after", [7, 15 + 8], ids=["in the base model", "in the adapter"])
def test_an_interrupted_evaluation_goes_on_and_ends_as_if_it_had_not_been(
    loaded: LoadedModel, tmp_path: Path, stop_after: int
) -> None:
    task = save_task(tmp_path, "sums", 5)
    with pytest.raises(KeyboardInterrupt):
        evaluated(loaded, tmp_path / "out", task, tally=Tally(stop_after), batch_size=1)
    rest = Tally()
    results = evaluated(loaded, tmp_path / "out", task, tally=rest, batch_size=1)
    assert sum(total for _, total in rest.begun) == 2 * 15 - stop_after
    whole = evaluated(loaded, tmp_path / "whole", task, batch_size=1)
    assert [results[side]["results"] for side in results] == [whole[side]["results"] for side in whole]


def test_answers_of_another_model_are_never_taken(
    loaded: LoadedModel, run_folder: Path, merged: Path, tmp_path: Path
) -> None:
    task = save_task(tmp_path, "sums", 3)
    evaluated(loaded, tmp_path / "out", task)
    with pytest.raises(PacaError, match="holds the evaluation of another model"):
        evaluated(load_for_generation(merged), tmp_path / "out", task)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    with pytest.raises(PacaError, match="holds results of something else"):
        evaluated(loaded, tmp_path / "other", task)
    assert (tmp_path / "other" / "results.json").read_text() == "{}"


def test_a_plain_model_is_evaluated_alone(run_folder: Path, tmp_path: Path) -> None:
    plain = load_for_generation(run_folder / "base")
    results = evaluated(plain, tmp_path / "out", save_task(tmp_path, "sums", 4))
    assert list(results) == ["model"]
    assert [list(row.values) for row in rows_of(results)] == [["model"], ["model"]]
    assert all(row.difference is None for row in rows_of(results))


def test_groups_show_their_members_below_them_and_average_over_questions(loaded: LoadedModel, tmp_path: Path) -> None:
    for name, questions in (("algebra", 4), ("geometry", 8), ("history", 6)):
        save_task(tmp_path, name, questions)
    save_group(tmp_path, "maths", ["algebra", "geometry"])
    group = save_group(tmp_path, "school", ["maths", "history"])
    rows = [row for row in rows_of(evaluated(loaded, tmp_path / "out", group)) if row.metric == "acc"]
    assert [(row.task, row.depth) for row in rows] == [
        ("school", 0),
        ("maths", 1),
        ("algebra", 2),
        ("geometry", 2),
        ("history", 1),
    ]
    value = {row.task: row.values["adapter"][0] for row in rows}
    assert value["maths"] == pytest.approx((4 * value["algebra"] + 8 * value["geometry"]) / 12)
    assert all(row.difference is not None and row.difference[1] is not None for row in rows)


def test_the_error_of_the_difference_is_that_of_the_differences_question_by_question(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    results = evaluated(loaded, tmp_path / "out", save_task(tmp_path, "sums", 20))
    row = rows_of(results)[0]
    pairs = zip(*(results[side]["samples"]["sums"] for side in ("base", "adapter")), strict=True)
    differences = [adapter["acc"] - base["acc"] for base, adapter in pairs]
    assert len(set(differences)) > 1
    assert row.difference == (
        pytest.approx(statistics.mean(differences)),
        pytest.approx(statistics.stdev(differences) / math.sqrt(20)),
    )
    value, error = row.values["base"]
    assert error == pytest.approx(math.sqrt(value * (1 - value) / 19))


def test_few_shot_examples_and_the_chat_template_reach_the_prompt(loaded: LoadedModel, tmp_path: Path) -> None:
    task = save_task(tmp_path, "sums", 6)
    results = evaluated(loaded, tmp_path / "out", task, num_fewshot=2, limit=2)
    prompt = results["adapter"]["samples"]["sums"][0]["arguments"][0][0]
    assert prompt.count("Answer:") == 3
    chatting = evaluated(loaded, tmp_path / "out", task, limit=2, chat_template=True)
    prompt = chatting["adapter"]["samples"]["sums"][0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>user\n")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("missing.yaml", "no task file 'missing.yaml'"),
        ("arc_easy", r"arc_easy cannot be loaded: .*\n.*comes from the hub unless a task file points at local files"),
    ],
)
@pytest.mark.usefixtures("few_tasks")
def test_a_task_that_cannot_be_had_is_explained(task: str, expected: str) -> None:
    with pytest.raises(PacaError, match=expected):
        load_tasks([task])


@pytest.mark.usefixtures("few_tasks")
def test_a_name_that_no_task_has_is_looked_for_among_all_of_the_harness_s() -> None:
    with pytest.raises(PacaError, match=r"no task 'arc_esy'\. Did you mean .*arc_easy"):
        load_tasks(["arc_esy"])


def test_a_chat_template_is_needed_to_ask_in_its_form(loaded: LoadedModel, tmp_path: Path) -> None:
    template, loaded.tokenizer.chat_template = loaded.tokenizer.chat_template, None
    try:
        with pytest.raises(PacaError, match="needs a tokenizer with a chat template"):
            evaluated(loaded, tmp_path / "out", save_task(tmp_path, "sums", 2), chat_template=True)
    finally:
        loaded.tokenizer.chat_template = template


def test_an_adapter_of_untied_embeddings_stays_on_untied_ones(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    model = LlamaForCausalLM.from_pretrained(base)
    paca.untie_embeddings(model)
    adapted = peft.get_peft_model(model, paca.PacaConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "paca_delta" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_for_generation(tmp_path / "adapter", base_model=str(base))
    tokens = torch.arange(20)[None]
    before = loaded.model(tokens).logits
    results = evaluated(loaded, tmp_path / "out", save_task(tmp_path, "sums", 8))
    assert torch.equal(loaded.model(tokens).logits, before)
    assert results["base"]["samples"] != results["adapter"]["samples"]


@pytest.mark.parametrize(("kind", "right"), [(peft.PromptTuningConfig, False), (peft.PrefixTuningConfig, True)])
def test_answers_of_a_learned_prompt_are_those_that_it_gives(tmp_path: Path, kind: Any, right: bool) -> None:
    """With a cache, which the harness asks for, PEFT loses learned tokens after the first answered one."""
    base = save_base(tmp_path / "base")
    torch.manual_seed(0)
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=6)
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    adapted.prompt_encoder["default"].embedding.weight.data.normal_(std=2.0)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_for_generation(tmp_path / "adapter", base_model=str(base))
    task = save_task(tmp_path, "sums", 8, WRITTEN)
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    longer = [{**row, "question": "well, " * number + row["question"]} for number, row in enumerate(rows)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    results = evaluated(loaded, tmp_path / "out", task)
    (samples,) = results["adapter"]["samples"].values()
    for sample in samples:
        question, options = sample["arguments"][0]
        asked = loaded.tokenizer(question, return_tensors="pt", add_special_tokens=False)
        length = asked["input_ids"].shape[1]
        for cache, same in ((False, True), (True, right)):
            given = {"max_new_tokens": options["max_gen_toks"], "do_sample": False, "use_cache": cache}
            written = loaded.tokenizer.decode(loaded.model.generate(**asked, **given)[0, length:])
            cut = min((written.find(end) for end in options["until"] if end in written), default=len(written))
            assert (written[:cut] == sample["resps"][0][0]) == same, (written, sample["resps"])


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


def test_a_strangers_kept_answers_run_no_code(loaded: LoadedModel, tmp_path: Path) -> None:
    task, ran, output = save_task(tmp_path, "letters", 2), tmp_path / "ran", tmp_path / "out"
    evaluated(loaded, output, task)
    for bad in (pickle.dumps(Touch(ran)), b"damaged"):
        for file in (output / "answers").glob("*.db"):
            with sqlite3.connect(file) as connection:
                connection.execute("UPDATE unnamed SET value = ?", (bad,))
            connection.close()
        with pytest.raises(PacaError, match=r"Answers can't be kept in .*db: (it names|could not find)"):
            evaluated(loaded, output, task)
    assert not ran.exists()


def test_answers_for_which_there_is_no_room_are_told_in_one_message(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, output = save_task(tmp_path, "letters", 2), tmp_path / "out"
    found, limit = load_tasks([str(task)]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(PacaError, match="model could not be written"):
            evaluate_tasks(loaded, found, HarnessSettings(), output, Tally())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("sqlitedict.SqliteDict.__setitem__", full)
        with pytest.raises(PacaError, match=r"Answers can't be kept in .*: database or disk is full\. .*make room"):
            evaluated(loaded, output, task)
    evaluated(loaded, output, task)
    assert (output / "results.json").is_file()
