"""One tiny workspace for all tests of runs, runs that several tests look at, and a data cache apart from the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console

from paca.training import RunResult, load_run_config, train
from paca.training import run as run_module
from paca.training.reporting import report
from training.method_runs import answers_of_trained, write_config
from training.method_runs import run as run_and_score
from training.tiny_run import QUICK, place_of_curve, place_of_curves, save_workspace


@pytest.fixture(autouse=True)
def bare_runs() -> Iterator[None]:
    """Left out: the pictures of reports and the forecast of memory, most of the time of a run this short.

    `test_report.py` and `test_memory_check.py`, which are about them, have a fixture of this name that leaves them in.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "curve", place_of_curve)
        patch.setattr(report, "loss_curves", place_of_curves)
        patch.setattr(run_module, "memory_warning", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A config whose run takes half a second; tests give it an `output.dir` of their own."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        yield save_workspace(folder, QUICK)


@pytest.fixture(scope="session")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunResult]:
    """Trains with some settings changed, once for all tests that ask for the same: they leave its folder as it is."""

    @functools.cache
    def run(*overrides: str) -> RunResult:
        folder = tmp_path_factory.mktemp("finished") / "run"
        return train(load_run_config(config_file, [f"output.dir={folder}", *overrides]), console=Console(quiet=True))

    return run


@pytest.fixture(scope="session")
def finished_by(
    config_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[RunResult, torch.Tensor]]:
    """Trains with a method of `method_runs`, probed, once for all tests: they leave its folder as it is.

    With what the trained model answers in memory.
    """

    @functools.cache
    def run(method: str) -> tuple[RunResult, torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            answers = answers_of_trained(patch)
            file = write_config(config_file, tmp_path_factory.mktemp("finished") / "run", method)
            return run_and_score(file, probe=True), answers[-1]

    return run
