"""The content of a file, for hashes that say whether data is still the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import xxhash
from datasets import Features, Image

_SAMPLES, _SAMPLE = 64, 1 << 14
"""Of a large file: how many parts of it, and how many bytes of each."""


def add_file(content: xxhash.xxh128, file: Path) -> None:
    """Add all bytes of `file` to a hash.

    Raises:
        OSError: It can't be read.
    """
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)


def add_image_files(content: xxhash.xxh128, rows: pa.RecordBatch, features: Features) -> None:
    """Add all bytes of the images of these rows that lie in files (errors as of `add_file`)."""
    for name, feature in features.items():
        if isinstance(feature, Image):
            images = rows.column(name)
            outside = images.filter(images.field("bytes").is_null())
            for path in outside.field("path").drop_null().to_pylist():
                if Path(path).is_file():  # else whoever opens it says so
                    add_file(content, Path(path))
                content.update(b"\n")


def hash_of(file: Path) -> str:
    """A hash of all bytes of `file` (errors as of `add_file`)."""
    content = xxhash.xxh128()
    add_file(content, file)
    return content.hexdigest()


def samples_of(files: Iterable[Path]) -> str:
    """A hash of names, sizes and a megabyte of each file, spread over it: for weights, which change all at once.

    Raises:
        OSError: One can't be read.
    """
    content = xxhash.xxh128()
    for file in files:
        size = file.stat().st_size
        content.update(f"\n{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for part in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE) * part // (_SAMPLES - 1))
                content.update(stream.read(_SAMPLE))
    return content.hexdigest()
