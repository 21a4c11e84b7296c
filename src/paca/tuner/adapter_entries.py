"""The files in an adapter's folder: of the usual kind, and its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_READ = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".gguf")
"""Endings of what is read."""
_FOLDERS = ("chat_templates", "additional_chat_templates")


def check_entries(folder: Path) -> None:
    """Raise `ValueError` if one of the files that are read, or copied along with a tokenizer, is no file (a pipe, a
    device), or a link out of the folder. Links of the hub's cache are fine: from a snapshot to the blobs beside it."""
    for file in _files(folder):
        check_link(file, folder)
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is no file: a folder, a pipe or a device. Copy the adapter again.")


def check_link(file: Path, folder: Path) -> None:
    """Raise ValueError if a file of an adapter or a model, anywhere below `folder`, is a link to elsewhere."""
    own, target = folder.resolve(), file.resolve()
    blobs = [above.parent / "blobs" for above in own.parents if above.name == "snapshots"]
    if file.is_symlink() and not target.is_relative_to(own) and target.parent not in blobs:
        raise ValueError(
            f"{file} is a link out of its folder, to {target}. An adapter or a model brings its own files: put a copy "
            "there, or delete the link."
        )


def _files(folder: Path) -> Iterable[Path]:
    for entry in folder.iterdir():
        if entry.name in _FOLDERS and entry.is_dir():
            yield from entry.iterdir()
        linked = entry.is_symlink() and not entry.is_dir()  # there are tokenizers that copy files of other endings
        if linked or entry.suffix in _READ or (entry.name in _FOLDERS and entry.is_symlink()):
            yield entry
