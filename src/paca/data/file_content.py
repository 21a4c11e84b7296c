"""The content of a file, for hashes that say whether data is still the same."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import xxhash
from datasets import Features, Image


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
