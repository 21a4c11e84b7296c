"""`benchmarks/quality.sh` makes the committed rows of benchmarks/quality again."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from paca.comparison.flags import rates_of
from paca.comparison.methods import methods_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.parent.name for path in ROOT.glob("benchmarks/quality/*/runs.jsonl"))


def command_of(page: str, folder: Path) -> list[str]:
    """The `paca compare` that the script runs for a page, word by word."""
    paca = folder / "paca"
    paca.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 1\n')  # so that nothing is copied from its runs
    paca.chmod(0o755)
    task, _, equal = page.rpartition("-")
    environment = {"PATH": os.environ["PATH"], "PACA": str(paca), "RUNS": str(folder), "EQUAL": equal}
    script = ["bash", "benchmarks/quality.sh", task]
    return subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_the_committed_rows_began_with_the_rates_of_the_script(page: str, tmp_path: Path) -> None:
    command = command_of(page, tmp_path)
    given = rates_of(word for flag, word in pairwise(command) if flag == "--lr")
    tried: dict[str, set[float]] = defaultdict(set)
    for line in (ROOT / "benchmarks" / "quality" / page / "runs.jsonl").read_text().splitlines():
        row = json.loads(line)
        tried[row["method"]].add(row["learning_rate"])
    for method, rates in tried.items():
        grid = set(given.of(method) or [])
        assert grid, method
        assert grid <= rates, method
        beyond = rates - grid
        assert not any(min(grid) < rate < max(grid) for rate in beyond), method


@pytest.mark.parametrize("page", PAGES)
def test_the_files_of_methods_say_all_that_their_runs_have(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid over a task's YAML they change nothing: the committed rows were made when a file stood for itself."""
    monkeypatch.chdir(ROOT)
    command = command_of(page, tmp_path)
    text = command[command.index("--methods") + 1]
    common = yaml.safe_load(Path(command[1]).read_text())
    for word, method in zip(text.split(","), methods_of(text, common), strict=True):
        if "=" in word:
            assert method.sections == yaml.safe_load(Path(word.partition("=")[2]).read_text())
