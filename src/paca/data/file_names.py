"""Names of data files, and what is said of one that is not there; without libraries, whose import takes seconds."""

from __future__ import annotations

import re
from pathlib import Path

from paca.messages.nearest import did_you_mean_path

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz")


def suffix_of(file: Path) -> str:
    """The type of a file by its name, in lower case: one of `SUFFIXES` where it is a data file."""
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), file.suffix.lower())


def is_here_or_nowhere(name: str) -> bool:
    """Whether a data source's name is a path: the hub has no dataset of that name."""
    return name.startswith(("/", ".", "~")) or suffix_of(Path(name)) in SUFFIXES


def not_there(name: str) -> str:
    """The message for a source that is neither here nor on the hub."""
    share = re.fullmatch(r"\s*(\d{1,2}(?:\.\d+)?)\s*%\s*", name)
    hint = f" For a share of data.train give data.eval: {float(share[1]) / 100:g}." if share else ""
    return f"There is no data file or folder {name!r} (working folder: {Path.cwd()}).{hint}{neighbour_hint(name)}"


def neighbour_hint(name: str) -> str:
    """`" Did you mean ...?"`, where something of nearly that name is."""
    return did_you_mean_path(Path(name).expanduser(), lambda there: there.is_dir() or suffix_of(there) in SUFFIXES)
