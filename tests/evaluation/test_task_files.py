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


def test_a_misspelt_path_is_told_with_the_nearest(tmp_path: Path) -> None:
    file = save_task(tmp_path, "letters", 2)
    with pytest.raises(PacaError, match=rf"no task file .*Did you mean '{file}'\? Check the path"):
        load_tasks([str(file).replace("letters", "leters")])


def test_a_file_that_is_wrong_is_not_taken_for_data_that_is_missing(tmp_path: Path) -> None:
    file = save_task(tmp_path, "mine", 3)
    file.write_text(file.read_text().replace("{{question}}", "{{query}}"))
    with pytest.raises(PacaError, match=r"cannot be loaded: 'query' is undefined\n.*names a field, a metric"):
        load_tasks([str(file)])


@pytest.mark.usefixtures("few_tasks")
def test_names_are_looked_for_before_the_data_of_any_task_is_fetched(tmp_path: Path) -> None:
    file = save_task(tmp_path, "mine", 3)
    file.write_text(file.read_text().replace("{{question}}", "{{query}}"))  # which loading it would find
    with pytest.raises(PacaError, match="no task 'arc_eazy'"):
        load_tasks([str(file), "arc_eazy"])


def test_a_task_file_that_came_with_the_adapter_is_not_run(tmp_path: Path) -> None:
    adapter, ran = tmp_path / "adapter", tmp_path / "ran"
    adapter.mkdir()
    file = save_task(adapter, "mine", 3)
    (adapter / "functions.py").write_text(f"open({str(ran)!r}, 'w')\ndef same(rows):\n    return rows\n")
    file.write_text(file.read_text() + "\nprocess_docs: !function functions.same\n")
    (tmp_path / "link.yaml").symlink_to(file)
    for path in (file, tmp_path / "adapter" / ".." / "adapter" / file.name, tmp_path / "link.yaml"):
        with pytest.raises(PacaError, match="runs the code that is in such a file"):
            load_tasks([str(path)], strangers=adapter)
    assert not ran.exists()
    load_tasks([str(file)])
    assert ran.exists()  # which is why


@pytest.mark.parametrize("content", [b"\xff\xfe", b"group: 3\ntask: [a]\n", b"group: [x]\n", b"[1]", b"task: x\n"])
def test_a_file_that_is_no_task_is_told_in_one_message(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    (tmp_path / "other.yaml").write_text("task: other\n")  # whose name cannot be sorted with a number
    with pytest.raises(PacaError, match=r"mine\.yaml|cannot be listed"):
        load_tasks([str(file)])
