"""The original 16-bit values of selected columns, read from the checkpoint that a quantized model was made from.

Only those columns are read, as slices of the safetensors shards that hold them (design, section 7).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paca.messages.errors import PacaError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class OriginalWeights:
    """The safetensors checkpoint `name`, a folder or a hub id (of which a `revision`); of the hub only the shards that
    are needed are fetched. Raise `PacaError` if there is none."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, revision
        self._files: dict[str, Any] = {}
        self._unreached = ""
        index = self._find(INDEX)
        if index is not None:
            self._shard_of: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif self._find(SINGLE) is not None:
            self._shard_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise PacaError(
                f"original_weights={name!r} is no checkpoint that columns can be read from: there is neither {INDEX} "
                f"nor {SINGLE}{self._unreached}. Give the folder or hub id of the original 16-bit model, or leave "
                "original_weights out."
            )

    def columns(
        self, module_name: str, indices: Tensor, shape: tuple[int, int], *, stored_transposed: bool = False
    ) -> Tensor:
        """Read `(out_features, r)` on CPU, as stored: the columns `indices (r,)` of the linear layer that the model
        calls `module_name`, whose weight must have `shape`. `stored_transposed` if it was a `Conv1D` before it was
        quantized. `PacaError` if the checkpoint holds no such weight, or one of another shape."""
        key = self._key_of(module_name)
        part = self._open(self._shard_of[key]).get_slice(key)
        if stored_transposed:
            shape = shape[::-1]
        if tuple(part.get_shape()) != shape:
            raise PacaError(
                f"{key} in {self.name!r} has shape {tuple(part.get_shape())}, but the layer {module_name} of the model "
                f"has {shape}. Give the checkpoint that the model was quantized from."
            )
        return part[indices.tolist()].t().contiguous() if stored_transposed else part[:, indices.tolist()]

    def _key_of(self, module_name: str) -> str:
        """The name of a module's weight in the checkpoint: the same, or with more or fewer names in front."""
        wanted = f"{module_name}.weight"
        if wanted in self._shard_of:
            return wanted
        found = [key for key in self._shard_of if key.endswith(f".{wanted}") or wanted.endswith(f".{key}")]
        if len(found) != 1:
            others = f"only names like {next(iter(self._shard_of))}"
            there = f"several ({', '.join(sorted(found)[:3])})" if found else others
            raise PacaError(
                f"The checkpoint {self.name!r} has no single weight for the layer {module_name}: there are {there}. "
                "Give the checkpoint that the model was quantized from, or leave original_weights out."
            )
        return found[0]

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            path = self._find(file_name)
            if path is None:
                raise PacaError(
                    f"The checkpoint {self.name!r} is not complete: {file_name} is missing{self._unreached}."
                )
            try:
                self._files[file_name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise PacaError(f"{path} can't be read ({error}): the file is broken. Copy it again.") from error
        return self._files[file_name]

    def _find(self, file_name: str) -> Path | None:
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return folder / file_name if (folder / file_name).is_file() else None
        try:
            return Path(hf_hub_download(self.name, file_name, revision=self.revision))
        except LocalEntryNotFoundError:  # of a file that need not be there
            self._unreached = " in the local cache, and the hub can't be reached"
            return None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, ValueError) as error:
            raise PacaError(f"original_weights={self.name!r} can't be read from the hub: {error}") from error
