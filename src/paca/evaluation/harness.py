"""lm-evaluation-harness on a loaded model: base and adapter after each other, on one copy of the weights.

Every answer is kept as it comes, apart for each model. Who runs the same command again goes on where it stopped: what
is finished is read back, not computed.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from paca.evaluation.identity import identity
from paca.evaluation.sides import BASE, Watcher, sides_of
from paca.messages.errors import PacaError
from paca.pretrained.conversation import answering
from paca.pretrained.generation import LoadedModel
from paca.pretrained.generation_settings import learns_a_prompt, without_cache
from paca.pretrained.whole_output import write_whole


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are evaluated."""

    num_fewshot: int | None = None
    """Examples before each question; None leaves it to the task."""
    limit: int | None = None
    """Only so many questions of each task, from the start."""
    batch_size: int = 8
    chat_template: bool = False
    """Ask in the form of the tokenizer's chat template."""


def evaluate_tasks(
    loaded: LoadedModel, found: tuple[TaskManager, list[Any]], settings: HarnessSettings, output: Path, watcher: Watcher
) -> dict[str, dict[str, Any]]:
    """Evaluate, and write the harness's results: `results.json`, and for the base model `base/results.json`.

    Results of other tasks or settings that are there are renamed to `results_TIME.json`.

    Args:
        loaded: From `paca.pretrained.generation.load_for_generation`.
        found: The tasks, from `paca.evaluation.task_files.load_tasks`.
        settings: How.
        output: A folder; answers of an earlier, interrupted evaluation in it are used.
        watcher: Told how far it is.

    Returns:
        The harness's results for `base` and `adapter`, or for `model`, with the `samples` that the files leave out.

    Raises:
        PacaError: A task that does not fit the model, or a folder with another model's results.
    """
    sides = sides_of(loaded)
    if settings.chat_template and loaded.tokenizer.chat_template is None:
        raise PacaError("--chat-template needs a tokenizer with a chat template, and this model's has none.")
    _claim(output, identity(loaded, sides[-1]))
    manager, tasks = found
    results = {}
    for side in sides:
        with answering(loaded, base=side == BASE):
            results[side] = _evaluate(loaded, side, manager, tasks, settings, output, watcher)
        _write(output / "results.json" if side != BASE else output / BASE / "results.json", results[side])
    return results


def _claim(output: Path, name: str) -> None:
    """Mark a folder as that of one model."""
    marker = output / "answers" / "model"
    if marker.is_file() and marker.read_text(encoding="utf-8") != name:
        raise PacaError(
            f"{output} holds the evaluation of another model, or of this one before it changed. Give another --output, "
            "or remove that folder."
        )
    if not marker.is_file() and (output / "results.json").exists():
        raise PacaError(f"{output} holds results of something else (results.json). Give another --output.")
    write_whole(marker, name)  # half of it would be another model's name


def _evaluate(
    loaded: LoadedModel,
    side: str,
    manager: TaskManager,
    tasks: list[Any],
    settings: HarnessSettings,
    output: Path,
    watcher: Watcher,
) -> dict[str, Any]:
    model = _WatchedModel(loaded, side, settings.batch_size, watcher)
    kept = output / "answers" / f"{side}-{identity(loaded, side)}"
    # Outside of a repository it lets git complain on standard error; results then say null as well.
    with _explained(kept), patch.object(evaluator, "get_git_commit_hash", lambda: None):
        try:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,  # else it reads all its files again
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                batch_size=settings.batch_size,
                use_cache=str(kept),
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )
        finally:
            model.close()
    assert results is not None  # None comes from other processes than the first
    name = loaded.base if side == BASE else str(loaded.adapter or loaded.base)
    results["config"]["model"] = "hf"
    results["config"]["model_args"] = {"pretrained": loaded.base} | ({} if name == loaded.base else {"peft": name})
    results["config"]["chat_template"] = settings.chat_template
    results["model_source"], results["model_name"] = "hf", name
    return dict(results)


@contextlib.contextmanager
def _explained(kept: Path) -> Iterator[None]:
    """Errors of the harness, and of the file in which it keeps answers, as one message."""
    try:
        yield
    except PacaError:
        raise
    except (sqlite3.Error, pickle.UnpicklingError) as error:
        raise PacaError(
            f"Answers can't be kept in {kept}_rank0.db: {error}. If the disk is full, make room and give the same "
            "command again. If the file is damaged, remove it."
        ) from error
    except (ValueError, AssertionError) as error:
        raise PacaError(f"lm-evaluation-harness cannot evaluate these tasks: {error}") from error


def _asked(results: dict[str, Any]) -> tuple[Any, ...]:
    """What results are of: the tasks with their examples before a question, and what else changes the numbers."""
    config = results.get("config", {})
    return results.get("n-shot"), config.get("limit"), config.get("chat_template", False)


def _write(path: Path, results: dict[str, Any]) -> None:
    """Write results; earlier ones of other tasks or settings stay beside them, named by their time."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if _asked(earlier) != _asked(json.loads(json.dumps(results, default=handle_non_serializable))):
            time = datetime.fromtimestamp(earlier["date"]).isoformat(timespec="seconds").replace(":", "-")
            path.replace(path.with_name(f"results_{time}.json"))
    content = {key: value for key, value in results.items() if key != "samples"}
    write_whole(path, json.dumps(content, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")


class _WatchedModel(HFLM):
    """The harness's own model, which tells of every answer."""

    def __init__(self, loaded: LoadedModel, who: str, batch_size: int, watcher: Watcher) -> None:
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        self._who = who
        self._watcher = watcher

    def set_cache_hook(self, cache_hook: Any) -> None:
        self.cache_hook = _CountingHook(cache_hook, self._watcher)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._watcher.begin(self._who, "options compared", len(requests), self.batch_size_per_gpu)
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._watcher.begin(self._who, "texts read", len(requests), self.batch_size_per_gpu)
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        # The harness shows a bar for each batch of texts, whatever it is told above.
        return list(super()._loglikelihood_tokens(requests, **{**options, "disable_tqdm": True}))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        one = 1 if learns_a_prompt(self.model) else self.batch_size_per_gpu  # padding would come after what is learned
        self._watcher.begin(self._who, "answers written", len(requests), one)
        with patch.object(self, "batch_size_per_gpu", one):
            return list(super().generate_until(requests, disable_tqdm=True))

    def _model_generate(self, *args: Any, **options: Any) -> Any:
        with without_cache(self.model):  # the harness always asks for one
            return super()._model_generate(*args, **options)

    def close(self) -> None:
        """Have the kept answers on disk: another thread writes them."""
        if isinstance(self.cache_hook, _CountingHook):
            self.cache_hook.dbdict.close()


class _CountingHook:
    """Keeps an answer, as the harness's hook does, and counts it."""

    def __init__(self, hook: Any, watcher: Watcher) -> None:
        self._hook = hook
        self._watcher = watcher
        self.dbdict = hook.dbdict
        self.dbdict.decode = _answer_in
        # Ctrl-C within a request to its writing thread can lose it, and closing would wait for it without end.
        self.dbdict.conn.execute = _uninterrupted(self.dbdict.conn.execute)

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        self._hook.add_partial(attribute, request, answer)
        self._watcher.advance()


class _NoObjects(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an answer")


def _answer_in(stored: Any) -> Any:
    """An answer that was kept: numbers and texts. The file may be a stranger's, and a pickle can run anything."""
    try:
        return _NoObjects(io.BytesIO(bytes(stored))).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # what a damaged pickle raises is of all kinds
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def _uninterrupted(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same; Ctrl-C and SIGTERM that come within it take effect after it."""

    def run(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return call(*arguments, **options)
        came: list[int] = []
        found: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {
            number: handler for number, handler in found.items() if handler is not None
        }  # else it is not Python's
        try:
            for number in handlers:
                signal.signal(number, lambda number, frame: came.append(number))
            return call(*arguments, **options)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for number in came:
                signal.raise_signal(number)

    return run
