"""Whether a config, and what it names, are still those of the run that is to be continued."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from paca.data import Examples
from paca.data.file_content import hash_of
from paca.messages.errors import PacaError
from paca.messages.processes import launched_processes
from paca.messages.program import program, resume_command
from paca.messages.shown import setting
from paca.pretrained import Pretrained
from paca.pretrained.adapter_folder import weight_file
from paca.pretrained.base_weights import KEY, rows_of_weights
from paca.pretrained.content import model_content
from paca.pretrained.whole_output import write_whole
from paca.training.config.adapter_settings import with_defaults
from paca.training.config.run_config import MEASURED_BY, RunConfig
from paca.training.config.strict_yaml import read_yaml
from paca.training.config.train_settings import keys_of_files
from paca.training.folder.run_folder import RunFolder
from paca.training.trainers.reward_functions import reward_files

FREE_TO_CHANGE = {
    "output.dir",  # a run folder may be moved
    "output.overwrite",
    "train.report_to",
    "train.run_name",
    "train.project",
    "train.save_total_limit",
    "train.dataloader_num_workers",
    "train.dataloader_pin_memory",
}
"""Keys that change neither the weights nor which steps are logged, evaluated and saved."""
_SHARED_OUT = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""What, times the number of processes, is the number of sequences per step."""
_MODEL, _PROCESSES = "model.name", "processes"
PRODUCTS = "products"
"""In what products of 16-bit matrices are made on a CPU, among what is recorded of a run: it keeps to that."""


def check_same_run(folder: RunFolder, config: RunConfig, inputs: dict[str, str]) -> None:
    """Refuse to continue a run under other settings, on other data or with another template than it began with.

    The number of processes may be another, as long as a step has as many sequences.

    Args:
        folder: Of the run.
        config: The resolved config of now.
        inputs: From `inputs_of`, of now.

    Raises:
        PacaError: Names each key that differs, with both values, or with the file whose content does.
    """
    recorded = folder.config
    if not recorded.is_file():
        raise PacaError(f"{recorded} is not there, so {folder.path} can't be continued. Put it back, or start anew.")
    before, now = _recorded_settings(recorded), _with_defaults(config.as_dict())
    contents = _recorded_inputs(folder, {"data.train", _PROCESSES, _MODEL})
    free = set(FREE_TO_CHANGE)
    processes = (contents.get(_PROCESSES, inputs[_PROCESSES]), inputs[_PROCESSES])
    if processes[0] != processes[1]:
        _check_sequences(
            folder,
            [math.prod(values.get(key, 1) for key in _SHARED_OUT) for values in (before, now)],
            *map(int, processes),
        )
        free.update(_SHARED_OUT)
    changed = sorted(
        key for key in before.keys() | now.keys() if key not in free and not _same(before.get(key), now.get(key))
    )
    if changed:
        lines = "\n".join(f"  {key}: {setting(before.get(key))} → {setting(now.get(key))}" for key in changed)
        raise PacaError(
            f"The settings differ from those that the run in {folder.path} began with:\n{lines}\n"
            f"To continue it with its own: {resume_command(recorded)}. To train with the new ones, give another "
            "output.dir."
        )
    files = [
        key
        for key, content in contents.items()
        if key not in (_MODEL, KEY, _PROCESSES, PRODUCTS) and content != inputs.get(key)
    ]
    if files:  # the key of a reward names its function and its file itself
        raise _other_content(folder, [f"{key} ({now[key]})" if key in now else key for key in files])


def _same(before: Any, now: Any) -> bool:
    """Whether a setting is what it was, or the same path, made absolute since."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return all(map(_same, before, now))
    return bool(before == now) or (
        isinstance(before, str) and os.path.isabs(str(now)) and os.path.abspath(before) == now
    )


def told_of_finished(folder: RunFolder, config: RunConfig) -> str:
    """What to say to somebody who continues a run that is finished.

    Args:
        folder: Of the run.
        config: As it was given now. What it leaves to paca (`auto`), and what its section train leaves out, but for
            `max_steps`, follow from the model and are not looked at, so the steps are told.

    Raises:
        PacaError: It asks for other settings than the run had.
    """
    if folder.config.is_file():
        had, method = _recorded_settings(folder.config), config.method
        now = _with_defaults({**config.as_dict(), method: with_defaults(method, config.adapter)})
        for settings in (had, now):
            settings.setdefault("train.max_steps", -1)
        filled = ("data.template", f"{method}.modules_to_save", f"{method}.original_weights")  # by the run, if left out
        left = {*FREE_TO_CHANGE, *(key for key in filled if now.get(key) is None)}
        left.add("train.gradient_checkpointing")  # an older name, recorded under the newer one
        other = [
            key for key, value in now.items() if key not in left and value != "auto" and not _same(had.get(key), value)
        ]
        if other:
            lines = "\n".join(f"  {key}: {setting(had.get(key))} → {setting(now[key])}" for key in sorted(other))
            again = " ".join(f"--set {key}=..." for key in sorted(other))
            measured = f"To measure its result so: {program()} evaluate {shlex.quote(str(folder.path))} {again}\n"
            if not set(other) <= set(MEASURED_BY):
                measured = ""
            raise PacaError(
                f"The run in {folder.path} is finished, with other settings:\n{lines}\n"
                f"{measured}To train with the new ones, leave --resume out, and give another output.dir. To train its "
                f"result on, also --set {shlex.quote(_trained_on(folder, config))}"
            )
    steps = f"{folder.read_summary()['steps']:,}"
    return (
        f"The run in {folder.path} is finished, after {steps} steps with the settings in its config.yaml; there is "
        "nothing to resume."
    )


def _trained_on(folder: RunFolder, config: RunConfig) -> str:
    return f"model.name={folder.model}" if config.method == "full" else f"model.adapter={folder.path}"


def check_same_model(folder: RunFolder, config: RunConfig, found: Pretrained, *, resume: bool) -> None:
    """Record what the model of a run is, or refuse to continue it with another one.

    What is recorded of its weights' files is for who loads the adapter later: `warn_of_other_base`.

    Args:
        folder: Of the run.
        config: The resolved config.
        found: The model and its tokenizer as they came.
        resume: Whether the run is continued.

    Raises:
        PacaError: The weights, the settings or the tokenizer are others than the run began with.
    """
    inputs, content = _recorded_inputs(folder, set()), model_content(found.model, found.tokenizer)
    if resume and inputs.get(_MODEL) != content:
        raise _other_content(folder, [f"{_MODEL} ({config.model.name}: its weights, its config or its tokenizer)"])
    if inputs.get(_MODEL) != content:
        rows = rows_of_weights(found.name_or_path, config.model.revision)
        write_whole(folder.inputs, json.dumps({**inputs, _MODEL: content} | ({} if rows is None else {KEY: rows})))


def check_same_settings(config: RunConfig) -> None:
    """Refuse processes that were started with other settings than each other; all of them have to call this.

    Args:
        config: The resolved config of this process. A path may be another, as on another machine.

    Raises:
        PacaError: Names a setting that differs, with both values.
    """
    first, *others = map(_flat, gather_object([config.as_dict()]))
    for process, other in enumerate(others, 1):
        for key in sorted((first.keys() | other.keys()) - FREE_TO_CHANGE):
            values = first.get(key), other.get(key)
            paths = len({len(_listed(value)) for value in values}) == 1 and all(
                isinstance(one, str) and os.path.isabs(one) for value in values for one in _listed(value)
            )
            if values[0] != values[1] and not paths:
                raise PacaError(
                    f"The processes of this run have different settings: {key} is {values[0]!r} in process 0, and "
                    f"{values[1]!r} in process {process}. Start all of them with the same config."
                )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _recorded_settings(recorded: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says; raise `PacaError` if it is not as paca wrote it."""
    content = read_yaml(recorded)[0]
    try:
        found = _with_defaults(content)
        if all(type(found.get(key, 1)) is int for key in _SHARED_OUT):
            return found
    except (AttributeError, TypeError):
        pass
    raise PacaError(f"{recorded} is damaged: it is not as paca wrote it. Put it back, or start anew.")


def _recorded_inputs(folder: RunFolder, needed: set[str]) -> dict[str, str]:
    """What the file of hashes says, of the keys in `needed` at least.

    Raises:
        PacaError: It is not there or damaged, so that there is nothing to compare with.
    """
    found = folder.recorded_inputs()
    texts = found and needed <= found.keys() and all(isinstance(v, str) for v in found.values())
    if texts and re.fullmatch(r"[1-9]\d{0,5}", found.get(_PROCESSES, "1")):
        return found
    raise PacaError(
        f"{folder.inputs} is not there or damaged, and it says what {folder.path} was trained on: --resume can't know "
        "whether data and model are still the same. Put it back, or start anew."
    )


def _other_content(folder: RunFolder, what: list[str]) -> PacaError:
    return PacaError(
        f"The content of {' and '.join(what)} is no longer what the run in {folder.path} began with. Restore it "
        "to continue the run; to train with the new content, give another output.dir."
    )


def _check_sequences(folder: RunFolder, each: list[int], processes: int, processes_now: int) -> None:
    before, now = each[0] * processes, each[1] * processes_now
    if before != now:
        raise PacaError(
            f"The run in {folder.path} began with {processes} processes and {before} sequences per step; with "
            f"{processes_now} this would be {now}, and other steps. Let {' x '.join(_SHARED_OUT)} be "
            f"{before / processes_now:g}."
        )


def inputs_of(config: RunConfig, train: Examples, held_out: Examples | None) -> dict[str, str]:
    """The number of processes, and a hash of the content of each key that names data, a file or functions.

    Args:
        config: Of the run.
        train: Its training data, as read.
        held_out: Its held-out data.
    """
    data, found = config.data, {"data.train": train.content()}
    found[_PROCESSES] = str(launched_processes())
    if held_out is not None:
        key = "data.eval" if isinstance(data.eval, str) else "data.train"
        found[key] = found.get(key, "") + held_out.content()
    if data.template is not None and Path(data.template).is_file():
        found["data.template"] = hash_of(Path(data.template))
    if config.model.adapter is not None:
        found["model.adapter"] = hash_of(weight_file(Path(config.model.adapter)))
    for name, file in _named_files(config.train):
        found[f"train.{name}"] = hash_of(file)
    for name, file in reward_files(config.train):
        found[f"train.reward_funcs ({name}, {file})"] = hash_of(file)
    return found


def _named_files(train: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The settings that take a dictionary or a file that holds one, where it is a file."""
    for name in keys_of_files(train):
        value = train.get(name)
        if isinstance(value, str) and os.path.isfile(value):
            yield name, Path(value)


def _with_defaults(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"data.unusable": "refuse", **_flat(sections)}


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
