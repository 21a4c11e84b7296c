"""The runs and adapters in a folder, and what they are called there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from paca.messages.errors import PacaError
from paca.messages.install import how_to_install
from paca.messages.nearest import did_you_mean_path
from paca.pretrained.adapter_folder import ADAPTER_CONFIG
from paca.pretrained.claims import holder_of
from paca.training.folder.run_folder import RunFolder

_DEEPEST = 3  # below the folder: a comparison keeps its runs two folders down


def find_runs(folder: Path) -> list[Path]:
    """The folders of runs in `folder`, itself among them."""
    return _folders_with("metrics.jsonl", folder)


def runs_to_show(folder: Path) -> list[Path]:
    """The runs in `folder`, for the page of `paca runs`.

    Raises:
        PacaError: There is no such folder, no run in it, or a package of the page is not installed.
    """
    if not folder.is_dir():
        hint = did_you_mean_path(folder, Path.is_dir)
        raise PacaError(f"No such folder: {folder}.{hint} Give a folder with runs of `paca train`, or one run.")
    found = find_runs(folder)
    if not found:
        raise PacaError(f"There are no runs in {folder}: no metrics.jsonl in it, nor in its folders. Give another one.")
    missing = [package for package in ("trackio", "gradio") if find_spec(package) is None]
    if missing:
        raise PacaError(f"paca runs needs {' and '.join(missing)}. {how_to_install('runs', *missing)}")
    return found


def find_answering(folder: Path) -> list[Path]:
    """The folders of runs, and of adapters that belong to none of them, the newest first."""
    runs = find_runs(folder)
    adapters = [path for path in _folders_with(ADAPTER_CONFIG, folder) if not any(run in path.parents for run in runs)]
    return sorted({*runs, *adapters}, key=lambda path: path.stat().st_mtime, reverse=True)


def name_in(folder: Path, found: Path) -> str:
    """What a run or an adapter is called that was found in `folder`."""
    return str(found.relative_to(folder)) if found != folder else found.resolve().name


def state_of(found: Path) -> str | None:
    """Why a run can't answer yet, if so."""
    run = RunFolder(found)
    if (found / ADAPTER_CONFIG).is_file() or run.finished():
        return None
    return "not finished" if holder_of(run.lock) is None else "still in training"


def _folders_with(name: str, folder: Path) -> list[Path]:
    depths = ("/".join(["*"] * depth + [name]) for depth in range(_DEEPEST + 1))
    found = (file for pattern in depths for file in folder.glob(pattern))
    return sorted(file.parent for file in found if file.is_file())  # a pipe would be waited for
