"""Runs are trained, shared, stopped and taken up again; a fake stands in for the training itself."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from comparison.fake_trainer import save_checkpoint
from comparison.small_comparison import IN_A_PROCESS, small_comparison, small_work
from forked_process import start_forked
from paca.comparison.flags import Rates
from paca.comparison.kept_rows import KeptRows
from paca.comparison.rows import Row
from paca.messages.errors import PacaError
from paca.pretrained.claims import Claim

NAMES = [f"{method}-lr{rate}-seed{seed}" for method in ("paca", "lora") for rate, seed in
         (("0.001", 0), ("0.003", 0), ("0.003", 1))]  # fmt: skip


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().split("\n") if line]


def comparable(folder: Path) -> list[dict[str, Any]]:
    """The rows without what differs by place."""
    return json.loads(json.dumps(rows_in(folder)).replace(str(folder), "FOLDER"))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    small_work(folder).run()
    return folder


def test_every_run_is_a_run_folder_and_a_row(uninterrupted: Path) -> None:
    assert sorted(row["name"] for row in rows_in(uninterrupted)) == sorted(NAMES)
    assert sorted(path.name for path in (uninterrupted / "runs").iterdir()) == sorted(NAMES)
    assert all((uninterrupted / "runs" / name / "adapter").is_dir() for name in NAMES)


def test_a_rate_that_is_added_to_a_grid_is_told_once(tmp_path: Path) -> None:
    work = small_work(tmp_path, "paca", extend=True)  # 3e-3 is the best, and the last of two
    work.console = Console(file=io.StringIO(), width=200)
    work.run()
    text = work.console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("0.009 is tried as well: the best rate of paca so far is the lowest or the highest") == 1
    assert text.count("is tried as well") == 1


def test_finished_runs_are_kept(uninterrupted: Path) -> None:
    def written() -> list[int]:
        return [(uninterrupted / "runs" / name / "summary.json").stat().st_mtime_ns for name in NAMES]

    before, rows = written(), rows_in(uninterrupted)
    small_work(uninterrupted).run()
    assert written() == before
    assert rows_in(uninterrupted) == rows


def test_a_finished_run_whose_folder_is_gone_counts_by_its_row(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "runs.jsonl").write_text((uninterrupted / "runs.jsonl").read_text())
    work = small_work(folder, seeds=[0, 1, 2])
    work.console = Console(file=io.StringIO(), width=2000)
    work.run()
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["lora-lr0.003-seed2", "paca-lr0.003-seed2"]
    assert [row for row in rows_in(folder) if row["seed"] < 2] == rows_in(uninterrupted)
    assert sorted(job.name for job in work.by_row) == sorted(NAMES)
    assert "as their folders are gone: paca-lr0.001-seed0, " in work.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_row_of_a_failure_does_not_count_and_stays_where_it_is_not_asked_for(
    uninterrupted: Path, tmp_path: Path
) -> None:
    rows = rows_in(uninterrupted)
    rows[0]["train_info"]["status"] = rows[1]["train_info"]["status"] = "failed"
    rows[1]["seed"], rows[1]["name"] = 9, "paca-lr0.001-seed9"
    rows[2]["score"] = None  # it ended all the same
    path = "a\u2028b"  # a line's end for `str.splitlines`
    rows[2]["meta_info"]["command"] = path
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    small_work(tmp_path).run()
    trained = {path.name for path in (tmp_path / "runs").iterdir()}
    assert rows[0]["name"] in trained
    assert rows[2]["name"] not in trained
    assert rows[1] in rows_in(tmp_path)


def test_processes_that_ask_for_other_runs_keep_each_others_rows(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reads the file, another one adds to it, the first one writes."""
    told: list[str] = []

    def others(self: KeptRows, rows: list[Row]) -> list[Row]:
        with small_comparison(tmp_path).claim("rows") as claim:
            told.append(str(claim.take()))
        return []

    monkeypatch.setattr(KeptRows, "others", others)
    small_work(tmp_path, "paca", seeds=[0]).run()
    assert set(told) == {"False"}


def test_rows_that_a_call_does_not_ask_for_stay(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text((uninterrupted / "runs.jsonl").read_text())
    small_work(tmp_path, seeds=[0]).run()
    small_work(tmp_path, "paca", rates=Rates([3e-3, 9e-3])).run()
    small_work(tmp_path).run()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["paca-lr0.009-seed0"]
    rows = {row["name"]: row for row in rows_in(tmp_path)}
    assert rows.pop("paca-lr0.009-seed0")["score"] is not None
    assert rows == {row["name"]: row for row in rows_in(uninterrupted)}


def test_a_broken_row_is_told(tmp_path: Path) -> None:
    for broken in (b'{"name": "paca-lr0.001-seed0", "sco', b'{"name": "a"}', b"[1]", b"\xff"):
        (tmp_path / "runs.jsonl").write_bytes(b"\n" + broken + b"\n")
        with pytest.raises(PacaError, match="line 2 is no row of a run"):
            small_work(tmp_path).run()


def test_further_seeds_add_their_runs_alone(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    small_work(folder, seeds=[0]).run()
    assert len(rows_in(folder)) == 4
    small_work(folder, seeds=[0, 1]).run()
    assert comparable(folder) == comparable(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_comparison_that_was_stopped_ends_as_one_that_was_not(
    uninterrupted: Path, tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "hold").touch()
    process = start_forked(IN_A_PROCESS, folder, streams=tmp_path)
    metrics = folder / "runs" / NAMES[0] / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"step": 4' in metrics.read_text())
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(300)
    if number == signal.SIGINT:
        assert process.exitcode == 130
        assert (folder / "runs" / NAMES[0] / "checkpoints" / "checkpoint-4").is_dir()
        assert not (folder / "runs" / NAMES[0] / "failed.json").exists()
    assert not (folder / "runs.jsonl").exists()
    (folder / "hold").unlink()
    small_work(folder).run()
    assert comparable(folder) == comparable(uninterrupted)
    assert not list(folder.glob("runs/*/checkpoints"))  # which were to go on from
    if number == signal.SIGINT:
        assert "Resuming after step 4." in (folder / "runs" / NAMES[0] / "log.txt").read_text()


def test_two_processes_share_the_work(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "hold").touch()
    processes = []
    for number in range(2):
        streams = tmp_path / str(number)
        streams.mkdir()
        processes.append(start_forked(IN_A_PROCESS, folder, streams=streams))
    # Both hold a run at its fourth step, so they work at the same time, and not on the same.
    wait_until(lambda: len(list((folder / "runs").glob("*/metrics.jsonl"))) == 2)
    (folder / "hold").unlink()
    for number, process in enumerate(processes):
        process.join(300)
        assert process.exitcode == 0, (tmp_path / str(number) / "stderr").read_text()
    assert comparable(folder) == comparable(uninterrupted)
    logs = [(folder / "runs" / name / "log.txt").read_text() for name in NAMES]
    assert logs == [""] * len(NAMES)  # no run was resumed, or told anything twice


def test_a_run_that_another_process_ends_meanwhile_is_not_started(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "meanwhile"
    shutil.copytree(uninterrupted, folder)
    summary = folder / "runs" / NAMES[2] / "summary.json"
    text = summary.read_text()
    summary.unlink()
    take = Claim.take

    def ends_before_it_is_taken(claim: Claim, **how: bool) -> bool:
        summary.write_text(text)
        return take(claim, **how)

    monkeypatch.setattr(Claim, "take", ends_before_it_is_taken)
    work = small_work(folder)
    work.program = (sys.executable, "-c", "print('started')")
    work.run()
    assert (folder / "runs" / NAMES[2] / "log.txt").read_text() == ""
    assert rows_in(folder) == rows_in(uninterrupted)


def test_a_run_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("train: {weight_decay: 13}\n")
    work = small_work(tmp_path / "out", f"paca,bad={file}")
    work.run()
    rows = {row["name"]: row for row in rows_in(tmp_path / "out")}
    assert sorted(rows) == sorted(["bad-lr0.001-seed0", "bad-lr0.003-seed0", *NAMES[:3]])
    failed = rows["bad-lr0.003-seed0"]
    assert failed["train_info"]["status"] == "failed"
    assert failed["run_info"]["error_msg"] == "The training loss is nan at step 3."
    assert failed["score"] is None
    assert (failed["learning_rate"], failed["seed"]) == (3e-3, 0)
    assert failed["run_info"]["config"]["train"]["weight_decay"] == 13
    assert work.schedule().chosen == {"paca": 3e-3}
    # It stays failed: the same command does not train it again.
    written = (tmp_path / "out" / "runs" / "bad-lr0.003-seed0" / "failed.json").stat().st_mtime_ns
    small_work(tmp_path / "out", f"paca,bad={file}").run()
    assert (tmp_path / "out" / "runs" / "bad-lr0.003-seed0" / "failed.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("status", "message"),
    [(-9, "killed by SIGKILL"), (1, "The disk is full: checkpoint-4 could not be written."),
     (1, "Your disk quota is used up: checkpoint-4 could not be written.")],
)  # fmt: skip
def test_a_run_that_was_killed_or_found_no_room_goes_on_with_the_next_call(
    tmp_path: Path, uninterrupted: Path, status: int, message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    killed = out / "runs" / NAMES[3]
    (killed / "summary.json").unlink()
    save_checkpoint(killed / "checkpoints" / "checkpoint-2", 2)
    (killed / "failed.json").write_text(json.dumps({"exit_status": status, "error_msg": message}))
    small_work(out).run()
    assert not (killed / "failed.json").exists()
    assert (killed / "log.txt").read_text().splitlines()[-1] == "Resuming after step 2."
    assert {row["name"]: row["train_info"]["status"] for row in rows_in(out)} == dict.fromkeys(NAMES, "success")


def test_a_run_whose_failure_can_not_be_read_is_tried_again(tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    failed = out / "runs" / NAMES[3]
    (failed / "summary.json").unlink()
    (failed / "failed.json").write_text('{"exit')
    small_work(out).run()
    assert {row["name"]: row["train_info"]["status"] for row in rows_in(out)} == dict.fromkeys(NAMES, "success")


def test_a_full_disk_stops_the_comparison_at_the_first_run_that_finds_it(tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "full").touch()
    work = small_work(out)
    with pytest.raises(PacaError, match=r"The disk is full: .* the same command goes on") as raised:
        work.run()
    assert NAMES[0] in str(raised.value)
    assert [path.name for path in (out / "runs").iterdir()] == [NAMES[0]]
    assert not (out / "runs" / NAMES[0] / "failed.json").exists()  # for others who share the work
    (out / "full").unlink()
    small_work(out).run()
    assert (out / "runs" / NAMES[0] / "log.txt").read_text().splitlines()[-1] == "Resuming after step 2."
    assert comparable(out) == comparable(uninterrupted)


def test_finished_runs_tell_how_long_the_others_will_take(tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "out"
    assert small_work(out).told_of_time() is None
    shutil.copytree(uninterrupted, out)
    assert small_work(out).told_of_time() == "6 of these runs are finished, which took 0:13 each"
    assert small_work(out, seeds=[0, 1, 2]).told_of_time() == (
        "6 of these runs are finished, which took 0:13 each; by that the others take about 0:26"
    )
    summary = out / "runs" / NAMES[1] / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "seconds": 25.0}))
    (out / "runs.jsonl").unlink()
    shutil.rmtree(out / "runs" / NAMES[5])
    assert small_work(out).told_of_time() == (
        "5 of these runs are finished, which took 0:13 to 0:25 each; by that the others take about 0:13"
    )


def test_rows_have_the_names_of_pefts_method_comparison(uninterrupted: Path) -> None:
    row = next(row for row in rows_in(uninterrupted) if row["name"] == "lora-lr0.003-seed1")
    assert (row["method"], row["learning_rate"], row["seed"], row["metric"]) == ("lora", 3e-3, 1, "loss")
    assert row["score"] == row["loss"] == pytest.approx(1.2 + 1 / 7, abs=0.02)
    assert row["loss_before"] == row["score_before"] > row["loss"]
    info = row["run_info"]
    assert info["train_config"]["optimizer_kwargs"]["lr"] == 3e-3
    assert info["train_config"]["model_id"] == "some/model"
    assert info["peft_config"] == {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    train = row["train_info"]
    assert (train["status"], train["train_time"], train["accelerator_memory_max"]) == ("success", 12.0, 2**30)
    assert (train["file_size"], train["num_trainable_params"], train["num_total_params"]) == (64, 10, 1000)
    assert [entry["step"] for entry in train["metrics"]] == [0, 6]
    assert train["metrics"][1]["valid loss"] == row["loss"]
    assert row["meta_info"]["package_info"] == {"torch-version": "2.13.0"}
    assert row["meta_info"]["git"] == {"commit": "abc", "dirty": False}
    assert row["meta_info"]["code"] == {"commit": "def", "dirty": True}


def test_a_seed_sets_the_data_order_and_the_columns(uninterrupted: Path) -> None:
    configs = {row["name"]: row["run_info"]["config"] for row in rows_in(uninterrupted)}
    assert configs["paca-lr0.003-seed1"]["train"] == {"max_steps": 6, "learning_rate": 3e-3, "seed": 1}
    assert configs["paca-lr0.003-seed1"]["paca"] == {"r": 16, "paca_alpha": 32, "random_seed": 1}
    assert "random_seed" not in configs["lora-lr0.003-seed1"]["lora"]
    assert "paca" not in configs["lora-lr0.003-seed1"]
