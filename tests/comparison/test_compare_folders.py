"""A report on runs that are there already, whatever their folders are called and hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from comparison.fake_trainer import summary
from comparison.small_comparison import COMMON
from paca.comparison.compare import compare_folders
from paca.comparison.rows import row_of
from paca.messages.errors import PacaError
from paca.training.folder.run_folder import RunFolder


def run(folder: Path, rank: int, seed: int = 0, sections: Mapping[str, Any] | None = None, **changed: Any) -> Path:
    """A finished one."""
    folder.mkdir(parents=True)
    config = {**COMMON, "paca": {"r": rank}, "train": {"learning_rate": 1e-3, "seed": seed}, **(sections or {})}
    (folder / "summary.json").write_text(json.dumps({**summary(config, float(rank)), **changed}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval_loss": float(rank)}) + "\n")
    return folder


def test_folders_of_the_same_name_keep_their_own_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Path] = {}
    monkeypatch.setattr("paca.comparison.compare.write_report", lambda output, result, folders: drawn.update(folders))
    (tmp_path / "report").mkdir()
    paths = [run(tmp_path / parent / "run", rank) for parent, rank in (("x", 4), ("y", 8))]
    found = compare_folders(paths, tmp_path / "report")
    assert [drawn[method.rows[0]["name"]].path for method in found.methods] == paths  # type: ignore[attr-defined]


def test_seeds_of_a_comparison_are_one_method_though_one_run_alone_scored_the_model_as_it_came(tmp_path: Path) -> None:
    paths = [
        run(tmp_path / f"{rank}-seed{seed}", rank, seed, {"eval": {"before": rank + seed == 4}})
        for rank in (4, 8)
        for seed in (0, 1)
    ]
    found = compare_folders(paths, tmp_path / "report")
    assert [len(method.rows) for method in found.methods] == [2, 2]


def test_a_comparison_that_was_stopped_stands_for_its_finished_runs(tmp_path: Path) -> None:
    (stopped := tmp_path / "stopped").mkdir()
    (stopped / "settings.json").write_text("{}")
    rows = []
    for name, rank in (("second-lr1-seed0", 4), ("first-lr1-seed0", 8)):
        rows.append(row_of(RunFolder(run(stopped / "runs" / name, rank)), name))
        assert rows[-1] is not None
        rows[-1]["name"] = name
    (stopped / "runs" / "unfinished").mkdir()
    (stopped / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare_folders([stopped], tmp_path / "report")
    assert [method.rows[0]["name"] for method in found.methods] == [
        "second-lr1-seed0",
        "first-lr1-seed0",
    ]  # as they ended
    (stopped / "runs.jsonl").unlink()
    with pytest.raises(PacaError, match="holds a comparison of which no run is finished yet"):
        compare_folders([stopped], tmp_path / "report")


def test_the_best_rate_so_far_of_the_first_method_leads_the_page_of_a_stopped_comparison(tmp_path: Path) -> None:
    """Whichever rate had ended first did, and all else was measured against it."""
    (stopped := tmp_path / "stopped").mkdir()
    (stopped / "settings.json").write_text("{}")
    rows = []
    for method, score in (("paca", 6), ("paca", 4), ("paca", 5), ("lora", 3)):
        folder = run(stopped / "runs" / f"{method}-lr{score}-seed0", score)
        row = row_of(RunFolder(folder), method)
        assert row is not None
        rows.append({**row, "name": folder.name})
    (stopped / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare_folders([stopped], tmp_path / "report")
    names = [method.rows[0]["name"] for method in found.methods]
    assert names == ["paca-lr4-seed0", "paca-lr6-seed0", "paca-lr5-seed0", "lora-lr3-seed0"]


@pytest.mark.parametrize(
    ("file", "told"),
    [("settings.json", "holds a comparison that trains its runs"), ("summary.json", "folder of a run")],
)
def test_a_report_does_not_go_into_a_folder_of_something_else(tmp_path: Path, file: str, told: str) -> None:
    paths = [run(tmp_path / str(rank), rank) for rank in (4, 8)]
    (paths[0] / file).touch()
    with pytest.raises(PacaError, match=told):
        compare_folders(paths, paths[0])
    assert not (paths[0] / "runs.jsonl").exists()


def test_what_neither_trains_nor_judges_makes_no_other_method(tmp_path: Path) -> None:
    """Each seed of a method was a method of its own."""
    paths = []
    for rank in (4, 8):
        for seed in (0, 1):
            train = {"learning_rate": 1e-3, "seed": seed, "run_name": f"r{rank}-{seed}", "project": f"of seed {seed}"}
            train["dataloader_num_workers"] = seed
            paths.append(run(tmp_path / f"{rank}-seed{seed}", rank, seed, {"train": train}))
    found = compare_folders(paths, tmp_path / "report")
    assert [len(method.rows) for method in found.methods] == [2, 2]


def test_a_folder_is_named_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "one" / "sub", 16)
    run(tmp_path / "other", 8)
    (tmp_path / "one" / "summary.json").write_text((tmp_path / "one" / "sub" / "summary.json").read_text())
    monkeypatch.chdir(tmp_path / "one")
    found = compare_folders([Path("."), Path("../other")], tmp_path / "report")
    assert [method.name for method in found.methods] == ["one", "other"]
    monkeypatch.chdir(tmp_path / "one" / "sub")
    found = compare_folders([Path(".."), Path("../../other")], tmp_path / "report")
    assert [method.name for method in found.methods] == ["one", "other"]
    assert [row["name"] for row in found.methods[0].rows] == ["one"]


def test_a_run_alone_is_told_of(tmp_path: Path) -> None:
    alone = run(tmp_path / "a", 4)
    with pytest.raises(PacaError, match=r"a is one run alone; two or more were expected"):
        compare_folders([alone], tmp_path / "report")


@pytest.mark.parametrize("text", ['{"name": "a", ', "[1]", "[" * 100_000])
def test_a_broken_summary_is_told_by_its_path(tmp_path: Path, text: str) -> None:
    paths = [run(tmp_path / "a", 4), run(tmp_path / "b", 8)]
    (paths[1] / "summary.json").write_text(text)
    with pytest.raises(PacaError, match=r"b.summary\.json (is broken|holds no JSON object)"):
        compare_folders(paths, tmp_path / "report")


@pytest.mark.parametrize(
    "changed", [{"config": [1]}, {"config": {"train": None}}, {"model": None}, {"eval_loss_after": "low"}]
)
def test_a_summary_of_another_shape_is_told_by_its_path(tmp_path: Path, changed: dict[str, Any]) -> None:
    paths = [run(tmp_path / "a", 4), run(tmp_path / "b", 8, **changed)]
    with pytest.raises(PacaError, match=r"b.summary\.json is not as a run leaves it \(.* Train the run again"):
        compare_folders(paths, tmp_path / "report")


def test_damaged_records_of_a_finished_run_do_not_keep_it_from_being_compared(tmp_path: Path) -> None:
    paths = [run(tmp_path / "a", 4), run(tmp_path / "b", 8)]
    (paths[1] / "inputs.json").write_text('{"data.train": [1]}')
    for content in (b"\xff\n", b"null\n", b'{"loss": 1.0}\n', b"[" * 100_000):
        (paths[1] / "metrics.jsonl").write_bytes(content)
        assert compare_folders(paths, tmp_path / "report").methods[1].rows[0]["score"] == 8.0


def test_what_is_not_finite_is_null_in_the_rows(tmp_path: Path) -> None:
    row = row_of(RunFolder(run(tmp_path / "a", 4, eval_loss_after=math.nan, tokens_per_second=math.inf)), "paca")
    assert row is not None
    assert (row["score"], row["loss"], row["tokens_per_second"]) == (None, None, None)
    json.dumps(row, allow_nan=False)


def test_two_folders_of_one_method_and_seed_are_refused(tmp_path: Path) -> None:
    paths = [run(tmp_path / name, rank) for name, rank in (("a", 4), ("b", 8), ("again", 4))]
    with pytest.raises(PacaError, match=r"a and .*again hold the same settings and the same seed, 0\. Leave one out"):
        compare_folders(paths, tmp_path / "report")


def test_runs_judged_by_different_metrics_are_refused(tmp_path: Path) -> None:
    """One table would show an exact match as a loss of 0."""
    judged: Any = {"sections": {"eval": {"metric": "exact_match"}}, "scores": {"after": {"exact_match": 0.0}}}
    paths = [run(tmp_path / "a", 4), run(tmp_path / "b", 8, **judged)]
    with pytest.raises(PacaError, match=r"different metrics \(loss of a, exact_match of b\)"):
        compare_folders(paths, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_it_is_said_that_runs_were_trained_unlike_each_other(tmp_path: Path) -> None:
    train = {"learning_rate": 1e-3, "seed": 0}
    others = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
    small = {**others, "per_device_train_batch_size": 1}
    paths = [run(tmp_path / name, 4, sections={"train": train | own}) for name, own in (("a", others), ("b", small))]
    summary = json.loads((paths[0] / "summary.json").read_text())
    (paths[0] / "summary.json").write_text(json.dumps(summary | {"code": {"commit": "abc", "dirty": True}}))
    told = "\n".join(compare_folders(paths, tmp_path / "report").notes)
    assert re.search(r"Not the same for all runs: sequences in a step, .*state of paca's code\.", told)
    assert "paca's own files had changes that were not committed." in told
    assert "working folder had changes" not in told
    alike = {**others, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "optim": "adamw_torch"}
    paths = [paths[0], run(tmp_path / "c", 4, sections={"train": train | alike})]
    told = "\n".join(compare_folders(paths, tmp_path / "report2").notes)
    assert "sequences in a step" not in told
    assert "optimizer" in told


def with_inputs(folder: Path, **inputs: str) -> Path:
    RunFolder(folder).inputs.write_text(json.dumps(inputs))
    return folder


def test_runs_of_which_the_data_meant_something_else_are_told_apart(tmp_path: Path) -> None:
    """They were one method, or 'all train on the same data'."""
    train = {"data.train": "one"}
    seeds = [with_inputs(run(tmp_path / f"a-seed{seed}", 4, seed), **train) for seed in (0, 1)]
    other = with_inputs(run(tmp_path / "b", 4, 2), **{"data.train": "two"})
    found = compare_folders([*seeds, other], tmp_path / "report")
    assert [len(method.rows) for method in found.methods] == [2, 1]
    assert any("content of the training data" in note for note in found.notes)
    kept = [json.loads(line) for line in (tmp_path / "report" / "runs.jsonl").read_text().splitlines()]
    assert [row["run_info"]["contents"]["data.train"] for row in kept] == ["one", "one", "two"]


def test_runs_that_other_reward_functions_judged_have_no_verdict(tmp_path: Path) -> None:
    key = "train.reward_funcs (rew:score, /{}/rew.py)"
    paths = [with_inputs(run(tmp_path / name, rank), **{key.format(name): name}) for name, rank in (("a", 4), ("b", 8))]
    verdict = compare_folders(paths, tmp_path / "report").verdict
    assert "not judged by the same: the content of train.reward_funcs (rew:score)" in verdict


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_of_the_weights_is_what_they_were_in_not_what_was_asked_for(tmp_path: Path, dtype: str) -> None:
    paths = []
    for name, rank, asked, found in (("a", 4, "auto", dtype), ("b", 8, "float32", "float32")):
        paths.append(run(tmp_path / name, rank, sections={"model": {**COMMON["model"], "dtype": asked}}))
        file = paths[-1] / "summary.json"
        summary = json.loads(file.read_text())
        file.write_text(json.dumps(summary | {"model": {**summary["model"], "dtype": found}}))
    told = "\n".join(compare_folders(paths, tmp_path / "report").notes)
    assert ("type of the weights" in told) == (dtype != "float32")
