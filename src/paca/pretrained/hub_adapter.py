"""Adapters on the hub: found by their repository's id, and fetched into the local cache, where they are checked."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub

from paca.messages.errors import PacaError, first_line
from paca.pretrained.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, checked, expanded, find_adapter
from paca.pretrained.hub import has_adapter, without_waiting
from paca.pretrained.location import TOKENIZER_FILES

_FETCHED = (
    *(ADAPTER_CONFIG, *ADAPTER_WEIGHTS, "config.json", *TOKENIZER_FILES),
    *("chat_templates/*", "additional_chat_templates/*"),
)
"""What is read of an adapter, and no more of a repository that may hold gigabytes of checkpoints."""


def adapter_of_hub(path: str | Path) -> Path | None:
    """The adapter that a hub id stands for: its folder in the hub's cache, whose entries were checked.

    Returns:
        None for whatever exists here, for a model's hub id, and for a name of no repository.

    Raises:
        PacaError: The repository can't be read, or a file in the cache is none of its own.
    """
    if os.path.exists(expanded(path)):
        return None
    find_adapter(path, or_hub=True)  # raises for what could be no hub id: the hub is not asked for that
    name = str(path)
    if not has_adapter(name, None):
        return None
    with without_waiting(name, None):
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FETCHED)))
        except Exception as error:  # of the hub's client, and of whichever HTTP library it is made with
            raise PacaError(f"The adapter {name!r} on the hub cannot be fetched: {first_line(error)}") from error
    if not (folder / ADAPTER_CONFIG).is_file():
        raise PacaError(f"The repository {name!r} is not whole in the local cache: it lacks {ADAPTER_CONFIG}.")
    return checked(folder)
