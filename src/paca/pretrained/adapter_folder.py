"""Where an adapter lies, and where its base model does: folders and JSON, before anything is loaded."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from paca.messages.disk import writing
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean_path
from paca.messages.program import resume_command
from paca.messages.shown import shown
from paca.pretrained.claims import holder_of
from paca.tuner.adapter_entries import check_entries

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DTYPE_NAMES = ("bfloat16", "float16", "float32")
"""What a base model's weights can be in, as runs name it."""
_LARGEST = 64 * 2**20  # bytes of a JSON file: the columns of 50,000 layers, listed one by one, have 20 million
_LONGEST = 1_000  # characters of a name


def find_adapter(path: str | Path, *, or_model: bool = True, or_hub: bool = False) -> Path | None:
    """The adapter folder that `path` (a run or an adapter folder) stands for; None when it is a plain model.

    Args:
        path: As given by the user.
        or_model: Whether a plain model is of use too; messages then say so.
        or_hub: Whether it may be the hub id of one: a name like `owner/name`, where there is no folder `owner` here.

    Raises:
        PacaError: There is no such folder, it is neither a run, an adapter nor a model, or a file is none of its own.
    """
    folder = expanded(path)
    if not os.path.exists(folder):
        if or_hub and len(folder.parts) == 2 and folder.parts[0] != "runs" and not folder.parent.exists():
            from paca.pretrained.location import locate  # the hub's client, which most commands need not wait for

            if locate(str(path)).source == "hub":
                return None
        wanted = ", an adapter's folder or a model's" if or_model else " or an adapter's folder"
        raise PacaError(f"No such folder: {folder}.{run_hint(folder)} Give a run of `paca train`{wanted}.")
    if not folder.is_dir():
        if folder.suffix.lower() == ".gguf":
            return None
        wanted = ", of an adapter or of a model (or a .gguf file)" if or_model else " or of an adapter"
        raise PacaError(f"{folder} is a file. Give the folder of a run{wanted}.")
    for candidate in (folder / "adapter", folder):
        if (candidate / ADAPTER_CONFIG).is_file():
            return checked(candidate)
    if any((path / "config.json").is_file() for path in (folder, folder / "model")):  # the second: of a run
        return None
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file():
        trainer = holder_of(folder / ".lock")
        if trainer is not None:
            raise PacaError(f"The run in {folder} is still going: {trainer} trains it. Its adapter comes at the end.")
        raise PacaError(
            f"The run in {folder} is not finished: it has no adapter/ or model/. Continue it: "
            + resume_command(folder / "config.yaml")
        )
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise PacaError(
        f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}, nor adapter/{ADAPTER_CONFIG} as a run does"
        f"{', nor the config.json of a model' if or_model else ''}. It holds: {found}."
    )


def run_hint(folder: Path) -> str:
    """`" Did you mean ...?"` for a folder that is not there: one of nearly that name, also in `runs/`."""
    in_runs = Path("runs", folder)
    if in_runs.is_dir():
        return f" Did you mean {str(in_runs)!r}?"
    return did_you_mean_path(folder, Path.is_dir) or did_you_mean_path(in_runs, Path.is_dir)


def checked(adapter: Path) -> Path:
    """The folder; PacaError if its config is broken, or a file is none of its own, such as a pipe or a link."""
    try:
        check_entries(adapter)
    except ValueError as error:
        raise PacaError(str(error)) from error
    adapter_settings(adapter)  # here, where nothing was loaded yet
    return adapter


def expanded(path: str | Path) -> Path:
    """The path with the home folder for `~`; as it is where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # the home of nobody
        return Path(path)


def find_base(adapter: Path, given: str | None = None) -> str:
    """Name or path of the model that an adapter was trained on: the `given` one, or the one that its config names.

    A run that was moved or copied brings its own `base/` along: that one is taken, and logged, when the recorded
    folder is gone.

    Raises:
        PacaError: The adapter's config cannot be read, or names no model.
    """
    if given is not None:
        return given
    base, file = text_setting(adapter, "base_model_name_or_path"), adapter / ADAPTER_CONFIG
    if not base:
        raise PacaError(f"{file} does not name the model it was trained on. Give it: --base-model NAME_OR_FOLDER")
    beside = adapter.resolve().parent / "base"
    if Path(base).name == "base" and not os.path.exists(base) and (beside / "config.json").is_file():
        logger.warning("%r is gone; taking the base model that lies beside the adapter, %s.", base, beside)
        return str(beside)
    return base


def find_revision(adapter: Path, base: str) -> str | None:
    """The branch, tag or commit of `base`, from `find_base`, that an adapter was trained on, where its config says so.

    Raises:
        PacaError: It is no name of one.
    """
    revision = text_setting(adapter, "revision")
    if revision is None or base != text_setting(adapter, "base_model_name_or_path") or os.path.exists(expanded(base)):
        return None
    if revision.startswith("/") or ".." in revision:  # the hub's client looks for a file of this name
        raise PacaError(
            f"{adapter / ADAPTER_CONFIG} is broken: revision is {shown(revision)}, which names no revision."
        )
    return revision


def text_setting(adapter: Path, name: str) -> str | None:
    """A text in an adapter's config, or None.

    Raises:
        PacaError: It is something else, is longer than any name, or holds what can't be seen.
    """
    value = adapter_settings(adapter).get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _LONGEST or not value.isprintable():
        raise PacaError(f"{adapter / ADAPTER_CONFIG} is broken: {name} must be a text or null; it is {shown(value)}.")
    return value


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """The content of an adapter's config.

    Raises:
        PacaError: It is no JSON object.
    """
    return json_object(adapter / ADAPTER_CONFIG)


def json_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file that somebody may have made to do harm.

    Raises:
        PacaError: It is too large, can't be read, or is no JSON object; names it.
    """
    try:
        size = file.stat().st_size
        content = json.loads(file.read_text(encoding="utf-8")) if size <= _LARGEST else {}
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PacaError(f"{file} is broken: {reason}. It should be a JSON object; copy or save it again.") from error
    if size > _LARGEST:
        raise PacaError(f"{file} has {size:,} bytes; {_LARGEST:,} are the most.")
    if not isinstance(content, dict):
        raise PacaError(f"{file} is broken: it should hold a JSON object. Copy or save it again.")
    return content


def find_quantization(adapter: Path) -> str | None:
    """How the base model was quantized as it was loaded for training: PaCA's configs say so, for others their run."""
    return text_setting(adapter, "base_quantization") or _said_by_the_run(adapter, "model", "quantization")


def find_dtype(adapter: Path | None) -> str:
    """What the base model was in as the adapter was trained, if its run says one of `DTYPE_NAMES`; else "auto"."""
    said = None if adapter is None else _said_by_the_run(adapter, "model", "dtype")
    return said if said in DTYPE_NAMES else "auto"


def find_gguf(adapter: Path) -> str | None:
    """The GGUF file that an adapter's run unpacked its `base/` from, if its run says so and the file is still there."""
    said = _said_by_the_run(adapter, "model", "name")
    return said if said is not None and said.lower().endswith(".gguf") and os.path.isfile(said) else None


def base_of_whole(folder: str | Path) -> str | None:
    """Name or path of the model that a run of the method `full` trained, for the run's `model/`; else None."""
    try:
        return _said_by_the_run(Path(folder), "model", "name") if Path(folder).name == "model" else None
    except PacaError:  # a summary that is none
        return None


def system_of_training(trained: Path) -> str | None:
    """The system message that all began with of what a run's `adapter/` or `model/` saw, if the run says so."""
    return _said_of_data(trained, "system")


def form_of_training(trained: Path) -> Literal["texts", "template"] | None:
    """Whether a run's `adapter/` or `model/` saw texts as they stand or a chat template; None where no run says so."""
    said = _said_of_data(trained, "template")
    return None if said is None else "texts" if said.startswith("none") else "template"


def _said_of_data(trained: Path, name: str) -> str | None:
    try:
        return _said_by_the_run(trained, "data", name)
    except PacaError:  # a summary that is none
        return None


def _said_by_the_run(trained: Path, part: str, name: str) -> str | None:
    """A text in the summary of the run of which `trained` is the result, or in the config of one whose checkpoint it
    is."""
    if trained.parent.name == "checkpoints":
        content = _config_of(trained.parent.parent).get(part)
        said = content.get(name) if isinstance(content, dict) else None
        return said if isinstance(said, str) else None
    summary = trained.parent / "summary.json"
    if trained.name not in ("adapter", "model") or not summary.is_file():
        return None
    content = json_object(summary).get(part)
    said = content.get(name) if isinstance(content, dict) else None
    return said if isinstance(said, str) else None


def _config_of(run: Path) -> dict[str, Any]:
    import yaml  # here, for `paca --version` works where little is installed

    try:
        content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def weight_file(adapter: Path) -> Path:
    """The file with an adapter's weights.

    Raises:
        PacaError: The folder has none, or it can't be opened.
    """
    for file in (adapter / name for name in ADAPTER_WEIGHTS):
        if file.is_file():
            with writing(file), file.open("rb"):  # safetensors says "no such file", whatever the reason
                return file
    raise PacaError(f"The adapter in {adapter} has no {ADAPTER_WEIGHTS[0]}: its weights are missing. Copy it again.")


def is_in(dtype: str, path: Path) -> bool:
    """Whether an adapter's file is all in the 16 bits `dtype`, such as `"torch.bfloat16"`."""
    name = {"torch.bfloat16": "BF16", "torch.float16": "F16"}.get(dtype)
    if name is None or path.suffix != ".safetensors":
        return False
    with safe_open(path, framework="pt") as file:
        return {str(file.get_slice(one).get_dtype()) for one in file.keys()} == {name}  # noqa: SIM118


def tensor_names(path: Path) -> list[str]:
    """The names in an adapter's safetensors file; none for a file of another kind.

    Raises:
        PacaError: It can't be read.
    """
    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise PacaError(f"{path} is broken: {error}. Copy the file again, or train again.") from error
