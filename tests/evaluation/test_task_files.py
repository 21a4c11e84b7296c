"""Task files of one's own: where they and their data are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.question_tasks import save_task
from paca.evaluation.task_files import load_tasks
from paca.messages.errors import PacaError


def test_a_task_file_is_found_by_a_path_with_a_folder_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    file = save_task(tmp_path / "tasks", "letters", 2)
    monkeypatch.chdir(tmp_path)
    _, tasks = load_tasks([f"tasks/{file.name}"])
    assert [task.task_name for task in tasks] == [file.stem]
    assert Path.cwd() == tmp_path


def test_a_file_that_is_wrong_is_not_taken_for_data_that_is_missing(tmp_path: Path) -> None:
    file = save_task(tmp_path, "mine", 3)
    file.write_text(file.read_text().replace("{{question}}", "{{query}}"))
    with pytest.raises(PacaError, match=r"cannot be loaded: 'query' is undefined\n.*names a field, a metric"):
        load_tasks([str(file)])
