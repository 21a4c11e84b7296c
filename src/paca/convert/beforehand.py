"""What a conversion can refuse before it imports torch: a wrong path, an output that is in use."""

from __future__ import annotations

from pathlib import Path

from paca.convert.output import check_output_file, check_output_folder
from paca.messages.errors import PacaError
from paca.tuner.adapter_folder import ADAPTER_CONFIG, find_adapter, find_base, find_task


def adapter_in(path: str | Path) -> Path:
    """The folder of the adapter that ``path``, a run or an adapter folder, stands for.

    Raises:
        PacaError: there is none.
    """
    adapter = find_adapter(path, or_model=False)
    if adapter is None:
        raise PacaError(f"{path} is a whole model, not an adapter. Give the folder of a run or of an adapter.")
    return adapter


def lora_output(path: str | Path, output: str | Path, base_model: str | None, overwrite: bool) -> Path:
    """The folder, absolute, for ``path`` as LoRA.

    Raises:
        PacaError: it is in use.
    """
    output = _absolute(output)
    reads = [Path(path), Path(base_model or path)]
    check_output_folder(output, overwrite, reads=reads, job="export", holds="an adapter", marker=ADAPTER_CONFIG)
    return output


def gguf_output(path: str | Path, output: str | Path, overwrite: bool) -> Path:
    """The file, absolute, for ``path`` as LoRA in GGUF.

    Raises:
        PacaError: it is in use, or not named as such a file is.
    """
    output = _absolute(output)
    if output.suffix != ".gguf":
        raise PacaError(f"The output {output} should be a file whose name ends in .gguf.")
    check_output_file(output, overwrite, reads=[Path(path)], job="export")
    return output


def merge_output(path: str | Path, output: str | Path, base_model: str | None, overwrite: bool) -> Path:
    """The folder, absolute, for ``path`` merged into its base model.

    Raises:
        PacaError: it is in use, or the adapter names no base model, or is for something else than language models.
    """
    output, adapter = _absolute(output), adapter_in(path)
    task = find_task(adapter)
    if task not in (None, "CAUSAL_LM"):
        raise PacaError(
            f"The adapter in {adapter} was trained for the task {task}; only causal language models are merged here. "
            "In Python: load the base model with the transformers class of that task, the adapter with "
            "PeftModel.from_pretrained, then merge_and_unload().save_pretrained(folder)."
        )
    base = base_model if base_model is not None else find_base(adapter)
    reads = [Path(path), adapter, Path(base)]
    check_output_folder(output, overwrite, reads=reads, job="merge", holds="a model", marker="config.json")
    return output


def import_source(path: str | Path) -> Path:
    """The folder of a foreign adapter's config, for the folder or the file of its tensors.

    Raises:
        PacaError: there is nothing, or no config.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise PacaError(f"No such file or folder: {given}. Give the folder of an adapter, or the file in it.")
    folder = given.parent if given.is_file() else given
    if not (folder / ADAPTER_CONFIG).is_file():
        raise PacaError(
            f"{folder} has no {ADAPTER_CONFIG}, which gives r and alpha: without them the tensors mean nothing. Put "
            "the one that was saved with them beside them."
        )
    return folder


def import_output(folder: Path, output: str | Path, base_model: str | None, overwrite: bool) -> Path:
    """The folder, absolute, for the foreign adapter in ``folder``.

    Raises:
        PacaError: it is in use.
    """
    output = _absolute(output)
    reads = [folder, Path(base_model or folder)]
    check_output_folder(output, overwrite, reads=reads, job="import", holds="an adapter", marker=ADAPTER_CONFIG)
    return output


def _absolute(output: str | Path) -> Path:
    return Path(output).expanduser().absolute()
