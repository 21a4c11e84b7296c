"""One tiny workspace for all tests of runs, and a cache of data that stays out of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from training.tiny_run import save_workspace


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A config whose run takes about a second; tests give it an ``output.dir`` of their own."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets-cache")
        yield save_workspace(folder)
