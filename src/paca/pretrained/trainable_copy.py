"""Save a loaded model as a plain folder that an adapter can point to."""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import transformers
import xxhash
from transformers import AutoTokenizer

from paca.messages.errors import PacaError
from paca.pretrained.gguf import VERSION
from paca.pretrained.loading import Pretrained, load_pretrained
from paca.pretrained.quiet import without_progress_bars
from paca.pretrained.whole_output import whole_output

logger = logging.getLogger(__name__)

_RECORD, _ORIGIN = "paca_source.json", "paca_unpacked.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")

# Digits after blank lines, runs of spaces and other scripts: where pre-tokenizers differ.
_PROBE = "Steps:\n\n1. Mix 250 g\n2. don't  stir\t10x\n\n\nПример 漢字 😀 1234567"


def save_trainable_copy(pretrained: Pretrained, folder: str | os.PathLike[str]) -> Path:
    """Save model and tokenizer to `folder`, which `from_pretrained` then reads back to the same model.

    The folder appears whole or not at all: it is written beside its final place and renamed. When it already holds a
    copy of the same model in the same dtype, nothing is done. Returns its absolute path.

    Raises:
        PacaError: The folder exists and holds something else, or its tokenizer would split text differently.
    """
    target = Path(folder).expanduser().resolve()
    record = _record(pretrained)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        _check_same(target, record)
        return target
    with whole_output(target) as partial:
        _write(pretrained, partial, record)
    logger.info("Saved a trainable copy of %s to %s.", pretrained.name_or_path, target)
    return target


def unpack(file: str, folder: Path, dtype: str, tokenizer: str | None) -> None:
    """Save the model of a GGUF file to `folder`, as `save_trainable_copy` does.

    Where a run beside this one holds the same already, its weights are linked: they take no room a second time.

    Args:
        file: The `.gguf` file.
        folder: Within a run's folder. Becomes the copy; must not exist.
        dtype, tokenizer: As in `load_pretrained`.

    Raises:
        PacaError: As `load_pretrained` and `save_trainable_copy` do.
    """
    same = unpacked(file, folder, dtype, tokenizer)
    if same is not None:
        with suppress(OSError):  # it goes just now
            with whole_output(folder, overwrite=False) as partial:
                shutil.copytree(same, partial, copy_function=_link_weights)
            logger.info("Linked the copy of %s in %s.", file, same)
            return
    pretrained = load_pretrained(file, dtype, tokenizer=tokenizer)
    with whole_output(folder) as partial:
        _write(pretrained, partial, _record(pretrained))
        origin = {"asked": _asked(file, dtype, tokenizer), "holds": _contents(partial)}
        (partial / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    logger.info("Saved a trainable copy of %s to %s.", file, folder)


def unpacked(file: str, folder: Path, dtype: str, tokenizer: str | None) -> Path | None:
    """Where what `unpack` would make is there already, of the GGUF file in its present state; None if it is not."""
    asked = _asked(file, dtype, tokenizer)
    for there in sorted(folder.parent.parent.glob(f"*/{folder.name}")):
        with suppress(OSError, ValueError):  # it is no copy, or goes just now
            origin = json.loads((there / _ORIGIN).read_text(encoding="utf-8"))
            if origin == {"asked": asked, "holds": _contents(there)}:  # nobody changed it since
                return there
    return None


def _asked(file: str, dtype: str, tokenizer: str | None) -> dict[str, object]:
    """What a copy follows from."""
    state = Path(file).expanduser().stat()
    return {
        "file": str(Path(file).expanduser().resolve()),
        "bytes": state.st_size,
        "modified": state.st_mtime_ns,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "tokenizer_files": {} if tokenizer is None else _contents(Path(tokenizer).expanduser()),
        "transformers": transformers.__version__,
        "rules": VERSION,
    }


def _contents(folder: Path) -> dict[str, str | int]:
    """The files of a folder by their names: of weights the size, else a hash; none if there is no such folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return {
        file.name: file.stat().st_size if file.suffix in _WEIGHTS else xxhash.xxh128_hexdigest(file.read_bytes())
        for file in files
        if file.name != _ORIGIN
    }


def _link_weights(source: str, target: str) -> None:
    """Link what is large, where the disk can; a text that somebody edits in one run's folder is that run's."""
    if source.endswith(".safetensors"):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def copied_from(folder: str | os.PathLike[str]) -> str | None:
    """The GGUF file that a folder was unpacked from; None if it was not, or that file is gone."""
    try:
        source = json.loads((Path(folder) / _RECORD).read_text(encoding="utf-8"))["model"]
        return source if source.lower().endswith(".gguf") and Path(source).is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(pretrained: Pretrained, folder: Path, record: dict[str, object]) -> None:
    with without_progress_bars():
        pretrained.model.save_pretrained(folder)
    pretrained.tokenizer.save_pretrained(folder)
    reread = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if reread(_PROBE)["input_ids"] != pretrained.tokenizer(_PROBE)["input_ids"]:
        raise PacaError(
            f"The tokenizer of {pretrained.name_or_path!r} splits text differently after saving and loading it with "
            f"this transformers ({transformers.__version__}), so an adapter trained on it would not fit. Train the "
            "original checkpoint instead."
        )
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _record(pretrained: Pretrained) -> dict[str, object]:
    record: dict[str, object] = {"model": pretrained.name_or_path, "dtype": str(pretrained.model.dtype)}
    if pretrained.source == "gguf":
        record["bytes"] = Path(pretrained.name_or_path).stat().st_size
    return record


def _check_same(target: Path, record: dict[str, object]) -> None:
    try:
        found = json.loads((target / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != record:
        raise PacaError(
            f"{str(target)!r} exists, and is not the copy that is needed here (needed: {record}, found: {found}). "
            "Give another output folder, or delete this one."
        )
