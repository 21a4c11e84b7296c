"""What a conversion can refuse before it imports torch: a wrong path, an output that is in use."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean_path
from paca.pretrained.adapter_folder import ADAPTER_CONFIG, checked, expanded, find_adapter, find_base, text_setting
from paca.pretrained.purpose import classifier_in

_CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth")
"""How files with tensors end."""


def adapter_in(path: str | Path) -> Path:
    """The folder of the adapter that `path`, a run or an adapter folder, stands for; PacaError without one."""
    adapter = find_adapter(path, or_model=False)
    if adapter is None:
        model = Path(path).expanduser() / "model"
        if model.is_dir():
            raise PacaError(f"{path} is a run that trained the whole model, so it has no adapter; see {model}.")
        raise PacaError(f"{path} is a whole model, not an adapter. Give the folder of a run or of an adapter.")
    return adapter


def adapter_output(
    path: str | Path, output: str | Path, base_model: str | None, overwrite: bool, job: str = "export"
) -> Path:
    """The folder, absolute, for the adapter in `path` in another form; PacaError if it is in use."""
    reads = [path, base_model or path] if job == "import" else _read_from(path, base_model)
    return _free_folder(output, overwrite, reads, job, "an adapter", ADAPTER_CONFIG)


def _read_from(path: str | Path, base_model: str | None) -> list[str | Path]:
    """What an export or a merge of an adapter must leave alone."""
    return [path, adapter := adapter_in(path), find_base(adapter, base_model)]


def merge_output(path: str | Path, output: str | Path, base_model: str | None, overwrite: bool) -> Path:
    """The folder, absolute, for `path` merged into its base model.

    Raises:
        PacaError: It is in use, or the adapter names no base model, or is for a task whose head is not known.
    """
    whole = find_adapter(path, or_model=False) is None and (Path(path).expanduser() / "model").is_dir()
    if whole and base_model is None:  # a run that trained the whole model: it is merged already
        return _free_folder(output, overwrite, [path], "merge", "a model", "config.json")
    adapter = adapter_in(path)
    task = text_setting(adapter, "task_type")
    if task not in (None, "CAUSAL_LM") and classifier_in(adapter) is None:
        raise PacaError(
            f"The adapter in {adapter} was trained for the task {task}, and no config.json beside it says with which "
            "labels. "
            "In Python: load the base model with the transformers class of that task, the adapter with "
            "PeftModel.from_pretrained, then merge_and_unload().save_pretrained(folder)."
        )
    return _free_folder(output, overwrite, _read_from(path, base_model), "merge", "a model", "config.json")


def gguf_output(path: str | Path, output: str | Path, base_model: str | None, overwrite: bool) -> Path:
    """The file, absolute, for `path` as LoRA in GGUF; PacaError if it is in use, or not named as such a file is."""
    output = _named(output)
    if output.suffix != ".gguf":
        raise PacaError(f"The output {output} should be a file whose name ends in .gguf.")
    _check_apart(output, _read_from(path, base_model), "export", "file")
    if output.is_dir():
        raise PacaError(f"The output {output} is a folder. Give the name of the file to write.")
    if output.exists() and not overwrite:
        raise PacaError(f"The output {output} exists. Give another one, or --overwrite to replace it.")
    if output.exists() and not _is_gguf_adapter(output):
        raise PacaError(f"The output {output} is no LoRA adapter in GGUF, so it is not overwritten. Give another one.")
    return output


def _is_gguf_adapter(file: Path) -> bool:
    """Whether the first pairs of a GGUF file, text by text, say that it is an adapter."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF" and b"general.type" + struct.pack("<IQ", 8, 7) + b"adapter" in opened.read(
            4096
        )


def import_source(path: str | Path) -> Path:
    """The folder of a foreign adapter's config, for the folder or the file of its tensors.

    Raises:
        PacaError: There is nothing of that name, the file is no checkpoint, or no config lies beside it.
    """
    given = expanded(path)
    if not os.path.exists(given):
        hint = did_you_mean_path(given, Path.exists)
        raise PacaError(f"No such file or folder: {given}.{hint} Give the folder of an adapter, or the file in it.")
    if given.is_file() and given.suffix.lower() not in _CHECKPOINTS:
        raise PacaError(
            f"{given} is a file of type {given.suffix or '(none)'!r}, which is no checkpoint. Give the folder of an "
            f"adapter, or the file with its tensors ({', '.join(_CHECKPOINTS)}), with its {ADAPTER_CONFIG} beside it."
        )
    folder = given.parent if given.is_file() else given
    if not (folder / ADAPTER_CONFIG).is_file():
        if given.is_dir() and (given / "adapter" / ADAPTER_CONFIG).is_file():
            raise PacaError(f"{folder} is the folder of a run. Give that of its adapter: {folder / 'adapter'}")
        raise PacaError(
            f"{folder.absolute()} has no {ADAPTER_CONFIG}, which gives r and alpha: without them the tensors mean "
            "nothing. Put the one that was saved with them beside them."
        )
    return checked(folder)


def _free_folder(
    output: str | Path, overwrite: bool, reads: Iterable[str | Path], job: str, holds: str, marker: str
) -> Path:
    """Refuse a folder whose replacement would delete something else than a predecessor, known by the file `marker`."""
    output = _named(output)
    _check_apart(output, reads, job, "folder")
    if output.exists() and not output.is_dir():
        raise PacaError(f"The output {output} is a file. Give a folder that does not exist yet.")
    if not output.exists() or not any(output.iterdir()):
        return output
    if not overwrite:
        raise PacaError(f"The output {output} exists and is not empty. Give another one, or --overwrite to replace it.")
    if not (output / marker).is_file():
        raise PacaError(f"The output {output} does not hold {holds} (no {marker}), so it is not overwritten.")
    return output


def _named(output: str | Path) -> Path:
    """The output, absolute. `PacaError` for a name that libraries which write files can't take."""
    output = Path(output).expanduser().absolute()
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise PacaError(f"The output {output} has a name that is not UTF-8. Give another output.") from None
    return output


def _check_apart(output: Path, reads: Iterable[str | Path], job: str, kind: str) -> None:
    for path in map(Path, reads):
        if os.path.exists(path) and path.resolve().is_relative_to(output.resolve()):
            raise PacaError(f"The output {output} holds {path}, which the {job} reads. Give another output {kind}.")
