"""Whether the base model of a run's adapter still has the weights that it was trained on: some rows of them tell."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import find_revision, json_object
from paca.pretrained.location import locate
from paca.pretrained.weight_size import finder, places_of

logger = logging.getLogger(__name__)

RECORD, KEY = "inputs.json", "rows of model.name"
"""The file in a run's folder, and what it calls these rows there."""
_TENSORS = 256
"""At most, spread evenly over the model: a large one has them in hundreds of files."""

_told: set[tuple[Path, str, str]] = set()


def rows_of_weights(name: str, revision: str | None = None) -> str | None:
    """Two hashes with a colon between: the form of a model's tensors in its files, and one row of each of some.

    Nothing is fetched, and a few megabytes are read, however large the model is.

    Args:
        name: As for `load_pretrained`.
        revision: Branch, tag or commit, for a hub id only.

    Returns:
        None where there are no safetensors to be read.
    """
    try:
        location = locate(name)
        if location.source == "gguf":
            return None
        find = finder(location, revision)
        places = places_of(find)
        names = sorted(places)
        by_file: dict[str, list[str]] = defaultdict(list)
        for tensor in names[:: -(-len(names) // _TENSORS)]:
            by_file[places[tensor]].append(tensor)
        found = {tensor: row for file, tensors in by_file.items() for tensor, row in _rows(find(file), tensors)}
    except Exception as error:  # of files of any kind, and of the hub's client: the model's loader says more
        logger.info("The weights of %s can't be compared: %s", name, error)
        return None
    form, values = hashlib.sha256("\n".join(names).encode()), hashlib.sha256()
    for tensor in sorted(found):  # not in the order of files, of which another copy may have others
        kind, row = found[tensor]
        form.update(f"\n{tensor} {kind}".encode())
        values.update(row)
    return f"{form.hexdigest()[:32]}:{values.hexdigest()[:32]}"


def _rows(file: Path, tensors: list[str]) -> Iterator[tuple[str, tuple[str, bytes]]]:
    """Of each, its dtype and shape, and the bytes of the row in its middle."""
    with safe_open(file, framework="pt") as opened:
        for tensor in tensors:
            part = opened.get_slice(tensor)
            shape = part.get_shape()
            if shape and 0 not in shape:
                row = part[tuple(size // 2 for size in shape[:-1]) or slice(None)].contiguous()
                yield tensor, (f"{part.get_dtype()} {shape}", row.view(torch.uint8).numpy().tobytes())


def warn_of_other_base(adapter: Path, base: str) -> None:
    """Log a warning, once, if `base` has other weights than the model that the adapter's run was trained on.

    Weights in another form, such as another dtype or quantized ones, can't be compared: nothing is said of them.

    Args:
        adapter: Its folder, in a run's.
        base: The model that it is put on.
    """
    recorded = _recorded(adapter)
    now = None if recorded is None else rows_of_weights(base, find_revision(adapter, base))
    if recorded is None or now is None or now == recorded or now.partition(":")[0] != recorded.partition(":")[0]:
        return
    if (adapter, base, now) not in _told:
        _told.add((adapter, base, now))
        logger.warning(
            "Warning: the base model %s is not the one that the adapter in %s was trained on. Its tensors have the "
            "same names and shapes, and other values. What the adapter learned belongs to the old ones: put those "
            "back, say where they lie (--base-model NAME_OR_FOLDER), or train again.",
            base,
            adapter,
        )


def _recorded(adapter: Path) -> str | None:
    """What the run that `adapter` lies in wrote of its model, as its result or in one of its checkpoints."""
    adapter = adapter.absolute()
    runs = {"adapter": adapter.parent, "checkpoints": adapter.parent.parent}
    run = runs.get(adapter.name) or runs.get(adapter.parent.name)
    if run is None or not (run / RECORD).is_file():
        return None
    try:
        found = json_object(run / RECORD).get(KEY)
    except PacaError:  # it is damaged; --resume says so
        return None
    return found if isinstance(found, str) else None
