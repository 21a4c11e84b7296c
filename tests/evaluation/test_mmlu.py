"""The harness's own MMLU, its data fetched from a hub on loopback."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from data.loopback_hub import serving
from evaluation.tally import Tally
from paca.evaluation.harness import HarnessSettings, evaluate_tasks
from paca.evaluation.side_by_side import rows_of
from paca.evaluation.task_files import load_tasks
from paca.pretrained.generation import load_for_generation

CATEGORIES = ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]


def save_hub(folder: Path, subjects: list[str]) -> Path:
    """A repository of the layout of `cais/mmlu`: each subject a configuration."""
    configurations = []
    for number, subject in enumerate(subjects):
        (folder / subject).mkdir(parents=True)
        for split, count in (("test", 2), ("dev", 2)):
            rows = [
                {"question": f"{subject} {n}?", "subject": subject, "choices": list("wxyz"), "answer": (number + n) % 4}
                for n in range(count)
            ]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / subject / f"{split}-0.parquet")
        files = [{"split": split, "path": f"{subject}/{split}-*"} for split in ("test", "dev")]
        configurations.append({"config_name": subject, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configurations})}---\n")
    return folder


def two_of_each(tasks: Path) -> list[str]:
    """The subjects that stay when of each category all but two of its 12 to 19 are removed."""
    kept: dict[str, list[str]] = {}
    for file in sorted(tasks.glob("mmlu_*.yaml")):
        subjects = kept.setdefault(re.findall(r'"tag": "(\w+)"', file.read_text())[0], [])
        if len(subjects) == 2:
            file.unlink()
        else:
            subjects.append(file.stem.removeprefix("mmlu_"))
    assert len(kept) == len(CATEGORIES)
    return sorted(subject for subjects in kept.values() for subject in subjects)


def test_mmlu_comes_by_category_and_subject(
    run_folder: Path, few_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = two_of_each(few_tasks / "mmlu" / "default")
    assert len(subjects) == 8
    hub = save_hub(tmp_path / "hub", subjects)
    with serving(hub, "cais/mmlu", monkeypatch, tmp_path / "cache"):
        settings = HarnessSettings(num_fewshot=1, limit=1)
        loaded, found = load_for_generation(run_folder), load_tasks(["mmlu"])
        results = evaluate_tasks(loaded, found, settings, tmp_path / "out", Tally())
    rows = rows_of(results)
    assert (rows[0].task, rows[0].depth) == ("mmlu", 0)
    assert [row.task for row in rows if row.depth == 1] == CATEGORIES
    leaves = [row for row in rows if row.depth == 2]
    assert sorted(row.task for row in leaves) == [f"mmlu_{subject}" for subject in subjects]
    assert rows[0].values["base"][0] == pytest.approx(sum(row.values["base"][0] for row in leaves) / 8)
    assert rows[0].difference is not None
    assert rows[0].difference[1] is not None
