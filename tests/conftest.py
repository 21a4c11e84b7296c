"""What all tests share: quiet libraries, and one thread per process so that workers don't fight over cores."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import accelerate.utils.imports
import accelerate.utils.memory
import huggingface_hub.constants
import jinja2
import pytest
import torch
from accelerate.utils.imports import _is_package_available

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: what tests start would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


gc.disable()  # until all that tests import is there: what is collected of it is little, and takes 5 s of each worker


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of the site come first: at the end workers take tests from each other, and each would build it anew."""
    items.sort(key=lambda item: item.path.name != "test_site.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """All that tests import is imported: the collector need not walk through it again, at 0.3 s each time.

    Every training run collects once or more, and is not much longer than that. By itself it collects less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _what_is_kept_of_gguf_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lies below this folder: apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        yield


@pytest.fixture
def in_time() -> Iterator[None]:
    """A test that would wait for ever (for a lock, for an answer) fails after two minutes."""

    def late(*_: object) -> None:
        raise TimeoutError("the test waits for something that does not come")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def named_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each name that pages name, and data."""
    from documented_names import stand_ins

    return stand_ins(tmp_path_factory.mktemp("named"))


@pytest.fixture
def named_here(named_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with these models and data in it. Trainers do one step, on the CPU."""
    from documented_names import do_one_step

    for file in named_models.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    do_one_step(monkeypatch)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """It matters to power cuts alone, and costs 40 ms a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _without_what_libraries_do_anew_each_time() -> Iterator[None]:
    """accelerate looks for garbage among all objects as a run begins: 0.4 s, where all libraries are in memory.

    And it searches all folders of packages for each question whether one is installed, PEFT compiles the template of
    its card for each adapter that is saved, and torch writes down for each seed who gave it, for a GPU that may come.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.utils.memory, "clear_device_cache", lambda garbage_collection=False: None)
        patch.setattr(accelerate.utils.imports, "_is_package_available", functools.cache(_is_package_available))
        patch.setattr(jinja2.Environment, "compile", functools.lru_cache(64)(jinja2.Environment.compile))
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture
def few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the harness has copies of two of its own folders only: it takes 5 s to read all of its 15,000 files."""
    import shutil

    import lm_eval

    folder, own = tmp_path / "harness" / "tasks", Path(lm_eval.__file__).parent / "tasks"
    for name in ("arc", "mmlu/default"):
        shutil.copytree(own / name, folder / name)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    return folder
