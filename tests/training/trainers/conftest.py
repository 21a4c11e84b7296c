"""One workspace for all tests of the other trainers, and finished runs that several tests look at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from paca.training import RunResult, load_run_config, train
from training.trainers.tiny_runs import save_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models, data and configs; it is the working folder, where reward functions are found."""
    folder = tmp_path_factory.mktemp("trainers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        patch.syspath_prepend(folder)
        yield save_workspace(folder)


@pytest.fixture(autouse=True)
def _in_the_workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "workspace" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("workspace"))


@pytest.fixture(scope="session")
def finished(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunResult]:
    """Trains by the config of a name, once for all tests that ask for the same: they leave its folder as it is."""

    @functools.cache
    def run(name: str, *overrides: str) -> RunResult:
        folder = tmp_path_factory.mktemp("finished") / name
        config = load_run_config(workspace / f"{name}.yaml", [f"output.dir={folder}", *overrides])
        return train(config, console=Console(quiet=True))

    return run
