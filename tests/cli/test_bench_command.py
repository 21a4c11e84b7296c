"""`paca bench`, as a process; and the commands of the scripts in benchmarks/."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.paca_process import forked_paca
from paca.bench.rows import read_rows
from paca.cli import app, main

REPOSITORY = Path(__file__).parents[2]
TINY = shlex.split(
    "--model smollm2-135m --layers 2 --hidden 192 --vocab 50 --scope blocks --seq 16 --rank 4 --device cpu"
)


def test_rows_become_tables_and_pictures(tmp_path: Path) -> None:
    rows, readme = tmp_path / "rows.csv", tmp_path / "README.md"
    readme.write_text("top\n<!-- bench:begin -->\n<!-- bench:end -->\nbottom\n")
    done = forked_paca(
        "bench", *TINY, "--methods", "frozen,paca,lora", "--rounds", 3, "--measure", "time,saved", "--output", rows
    )
    assert done.returncode == 0, done.stderr
    assert "**Batch 1, 16 tokens**" in done.stdout
    measured = read_rows(rows)
    assert set(measured["method"]) == {"frozen", "paca", "lora"}
    assert "bench --model smollm2-135m" in measured["command"][0]
    shown = CliRunner().invoke(
        app, ["bench", "report", str(rows), "--plots", str(tmp_path / "plots"), "--readme", str(readme)]
    )
    assert shown.exit_code == 0, shown.output
    text = readme.read_text()
    assert text.startswith("top\n<!-- bench:begin -->\n![rows](plots/rows.png)")
    assert "| `paca` |" in text
    assert "[rows.csv](rows.csv)" in text
    assert text.endswith("<!-- bench:end -->\nbottom\n")
    assert (tmp_path / "plots/rows.png").is_file()


def test_wrong_settings_are_one_message_and_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other, binary, at = tmp_path / "other.csv", tmp_path / "binary.csv", "--dry-run"
    other.write_text("a,b\n1,2\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for wrong, message in (
        (["--methods", "pacca"], "Did you mean 'paca'?"),
        (["--seq", "many"], "whole numbers"),
        (["--measure", "max-seq", "--memory", "much"], "no amount of memory"),
        (["--measure", "time", "--memory", "1GiB"], "would change nothing for time"),
        ([at, "--methods", "paca,lora", "--baseline", "frozen"], "'frozen' is not among the methods"),
        ([at, "--device", "abacus"], "device is 'abacus'"),
        ([at, "--output", str(other)], "does not have the columns"),
        ([at, "--output", str(binary)], "is no text with commas"),
        ([at, "--output", str(tmp_path)], "is a folder; a CSV file was expected"),
        ([at, "--output", str(other / "new.csv")], "other.csv is a file and no folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["paca", "bench", *TINY, *wrong])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        assert message in capsys.readouterr().err


def test_methods_and_presets_are_listed() -> None:
    shown = CliRunner().invoke(app, ["bench", "methods"])
    assert shown.exit_code == 0
    assert "paca+lean+recompute" in shown.output
    assert "vit-b16" in shown.output


@pytest.mark.parametrize("script", ["gpu", "cpu"])
def test_every_command_of_the_scripts_is_accepted(script: str) -> None:
    printed = subprocess.run(
        ["bash", REPOSITORY / f"benchmarks/{script}.sh", "--dry-run"],
        env={**os.environ, "DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert len(commands) >= 8
    for timeout, seconds, program, *arguments in commands:
        assert (timeout, program) == ("timeout", "paca")
        assert int(seconds) <= 900
        checked = CliRunner().invoke(app, [*arguments, "--dry-run"])
        assert checked.exit_code == 0, f"{arguments}: {checked.exception or checked.output}"
    if script == "gpu":
        assert sum(int(command[1]) for command in commands) <= 1800


@pytest.mark.slow(reason="starts the program anew")
def test_the_script_for_a_gpu_runs_tiny_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, without the compiler and the parts that start processes: those take minutes."""
    rows = tmp_path / "gpu.csv"
    shrink = "--layers 2 --hidden 512 --intermediate 64 --vocab 64 --rank 4"
    parts = ("four-bit", "launches")
    printed = subprocess.run(
        ["bash", REPOSITORY / "benchmarks/gpu.sh", "--dry-run", *parts],
        env={**os.environ, "DEVICE": "cpu", "LENGTHS": "16", "ROUNDS": "1", "SHRINK": shrink, "OUTPUT": str(rows)},
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [shlex.split(line)[3:] for line in printed.stdout.splitlines()]
    assert len(commands) == len(parts)
    kept: list[bool] = []
    monkeypatch.setattr("paca.training.freed_memory.keep_freed_memory", lambda: kept.append(True))
    for arguments in commands:
        arguments = [argument for argument in arguments if argument != "--compile"]
        ran = CliRunner().invoke(app, [*arguments, "--warmup", "0"])
        assert ran.exit_code == 0, f"{arguments}: {ran.exception or ran.output}"
    assert len(kept) == len(parts)  # as training does on a CPU
    measured = read_rows(rows)
    assert not (measured["status"] == "failed").any(), measured[measured["status"] == "failed"][["method", "note"]]
    assert {"step_time", "saved", "launches_per_layer"} <= set(measured["metric"])
    counted = set(measured.loc[measured["metric"] == "launches_per_layer", "method"])
    assert {"frozen", "paca", "qpaca", "qlora"} <= counted


def test_a_script_runs_what_is_not_done_yet(tmp_path: Path) -> None:
    """With a stand-in for paca that fails for one part, in a copy of the folder."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("parts.sh", "gpu.sh"):
        (folder / name).write_text((REPOSITORY / "benchmarks" / name).read_text())
    fake = tmp_path / "paca"
    fake.write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname "$0")/ran"\ncase "$*" in *"--measure time --compile"*) exit 1;; esac\n'
    )
    fake.chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", folder / "gpu.sh", *arguments]
        return subprocess.run(command, env={"PATH": "/usr/bin:/bin", "PACA": str(fake)}, capture_output=True, text=True)

    first = run()
    assert first.returncode == 1
    assert "Unfinished: compiled" in first.stdout
    count = len((tmp_path / "ran").read_text().splitlines())
    run()
    assert len((tmp_path / "ran").read_text().splitlines()) == count + 1  # only the unfinished part again
    assert run("speed", "memory").returncode == 0
    assert run("--redo", "speed").returncode == 0
    assert len((tmp_path / "ran").read_text().splitlines()) == count + 2
    assert run("--unknown").returncode == 2
