"""Which model an answer came from, so that answers kept from an earlier evaluation are never another model's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from paca.evaluation.sides import BASE
from paca.pretrained.adapter_folder import ADAPTER_CONFIG, weight_file
from paca.pretrained.generation import LoadedModel

_OF_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def identity(loaded: LoadedModel, side: str) -> str:
    """A hash of all that decides the answers: base model, tokenizer, and the adapter's content if that answers.

    Weights of the base model count by the names, sizes and times of their files, or by the hub's commit.
    """
    found = hashlib.sha256()

    def add(*parts: Any) -> None:
        found.update("\0".join([*map(str, parts), "\n"]).encode())

    config = loaded.model.config
    add(loaded.base, getattr(config, "_commit_hash", None), config.to_json_string(use_diff=False), loaded.model.dtype)
    for file in _weight_files(Path(loaded.base)):
        add(file.name, file.stat().st_size, file.stat().st_mtime_ns)
    tokenizer: Any = loaded.tokenizer  # or an image processor
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(tokenizer, "get_vocab"):
        add(tokenizer.to_json_string())
    else:
        add(backend.to_str() if backend is not None else tokenizer.get_vocab(), tokenizer.chat_template)
    if side != BASE and loaded.adapter is not None:
        for file in (loaded.adapter / ADAPTER_CONFIG, weight_file(loaded.adapter)):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _weight_files(base: Path) -> list[Path]:
    if base.is_file():
        return [base]
    return sorted(file for pattern in _OF_WEIGHTS for file in base.glob(pattern)) if base.is_dir() else []
