"""Tasks of lm-evaluation-harness, by name or as YAML files; those may point at data that lies beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager

from paca.data.hub import error_instead, without_waiting_for_the_hub
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean, did_you_mean_path

_SUFFIXES = (".yaml", ".yml")
_GROUP = re.compile(r"^group:", re.MULTILINE)


def load_tasks(names: Sequence[str], strangers: Path | None = None) -> tuple[TaskManager, list[Any]]:
    """Load tasks with their data.

    Args:
        names: Each a task, group or tag of the harness, or a YAML file of a task or of a group. Paths inside of a file
            are relative to its folder; a group finds the tasks of its folder and those of the harness.
        strangers: The folder of what is evaluated, which somebody else may have made. No file in it is a task: the
            harness runs Python functions that a task file names, and its templates can run anything.

    Returns:
        The harness's list of all tasks, and of these the tasks and groups that were named.

    Raises:
        PacaError: There is no such task or file, it is a stranger's, or its data cannot be loaded.
    """
    # Whole paths, since a task is loaded in its own folder.
    files = {name: Path(name).expanduser().resolve() for name in names if name.lower().endswith(_SUFFIXES)}
    for name, file in files.items():
        if not file.is_file():
            hint = did_you_mean_path(name, lambda there: there.suffix.lower() in _SUFFIXES and there.is_file())
            raise PacaError(f"There is no task file {name!r} (working folder: {Path.cwd()}).{hint} Check the path.")
        if strangers is not None and file.is_relative_to(strangers.expanduser().resolve()):
            raise PacaError(
                f"The task file {name!r} came with what is evaluated, and lm-evaluation-harness runs the code that is "
                "in such a file. Read it. If you trust it, copy it with its data to a folder of your own."
            )
    manager = _manager(list(files.values()), all_files=len(files) == len(names))
    for name in names:  # all of them, before data is fetched for any
        if name not in files and name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks, "{}", count=3)
            raise PacaError(
                f"lm-evaluation-harness has no task {name!r}.{hint} `lm-eval ls tasks` lists them; a task of your own "
                "is given as a .yaml file."
            )
    loaded = [task for name in names for task in _load(manager, name, files.get(name))]
    return manager, loaded


def _manager(files: list[Path], all_files: bool) -> TaskManager:
    """The list of tasks in which groups of `files` find their members."""
    groups = [file for file in files if _GROUP.search(file.read_text(encoding="utf-8", errors="replace"))]
    folders = [file.parent for file in groups]
    try:
        manager = TaskManager(include_path=list(folders), include_defaults=False)
        # The harness's own 15,000 files take seconds to read: only where something is among them.
        if not all_files or not _has_all_members(manager):
            manager = TaskManager(include_path=list(folders))
    except Exception as error:  # what the harness raises for a file beside a group depends on what is in it
        said = f"{type(error).__name__}: {error}"
        raise PacaError(f"The task files in {', '.join(map(str, folders))} cannot be listed: {said}") from error
    return manager


def _load(manager: TaskManager, name: str, file: Path | None) -> list[Any]:
    answers = True  # the hub, as far as it was asked
    try:
        with chdir(file.parent if file else Path.cwd()), ExitStack() as stack:
            if file is None:  # else its data may well lie here
                answers = stack.enter_context(without_waiting_for_the_hub())
            found = manager.load([_group_in(manager, file) if file else name])
    except Exception as error:  # of the harness, of datasets, of the code that a task file brings
        said = str(error).strip()
        reason = type(error).__name__ if said in ("", "None") else said
        advice = "The file, or the harness, names a field, a metric or a filter that is not there."
        if isinstance(error, (OSError, DatasetsError)):
            advice = (
                "Its data comes from the hub unless a task file points at local files (dataset_path: json, with "
                "dataset_kwargs: data_files)."
            )
            if not answers:
                reason = error_instead(name) or (
                    "the hub cannot be reached, and the local cache does not hold all of its data."
                )
        raise PacaError(f"The task {name} cannot be loaded: {reason}\n{advice}") from error
    members = {member for group in found.get("groups", {}).values() for member in group.child_names}
    top: list[Any] = [group for key, group in found.get("groups", {}).items() if key not in members]
    inside = {task.task_name for group in top for task in group.get_all_tasks()}
    return top + [task for key, task in found["tasks"].items() if key not in inside]


def _has_all_members(manager: TaskManager) -> bool:
    for entry in manager.task_index.values():
        members = (entry.cfg or {}).get("task") if (entry.cfg or {}).get("group") else None
        for member in members if isinstance(members, list) else []:
            name = member if isinstance(member, str) else member.get("task") or member.get("group")
            if name not in manager.task_index:
                return False
    return True


def _group_in(manager: TaskManager, file: Path) -> str:
    """The name of a file's group, for lm-eval 0.4.13 loads groups by name only; else the path."""
    entries = manager.task_index.items()
    return next((name for name, entry in entries if entry.yaml_path and entry.yaml_path.resolve() == file), str(file))
