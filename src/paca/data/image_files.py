"""What a folder of images holds beside images, and through links: `datasets` passes over both without a word."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst")
_ANY = "**"  # what ends a pattern of all files of a folder


def with_links(folder: Path, patterns: Iterable[str]) -> tuple[list[str], str]:
    """The patterns, and one for each link to a folder below theirs; and in words which files they leave out, or "".

    Args:
        folder: That the patterns start from.
        patterns: As `datasets` takes them. Below those that are not of a whole folder nothing is looked for.

    Raises:
        OSError: A folder can't be read.
    """
    found, kinds, without = list(patterns), Counter[str](), list[str]()
    for pattern in patterns:
        start = folder / pattern.removesuffix(_ANY).replace("[[]", "[").replace("[*]", "*").replace("[?]", "?")
        if not pattern.endswith(_ANY) or not start.is_dir():
            continue
        for place in _folders(start, tuple(map(os.path.realpath, start.parents))):
            if place.is_symlink() and place != start:
                found.append(f"{glob.escape(str(place.relative_to(folder)))}/{_ANY}")
            files = [part for part in os.scandir(place) if part.is_file() and not part.name.startswith((".", "__"))]
            others = [part.name for part in files if not _is_known(part.name)]
            kinds.update(Path(name).suffix.lower() or "no ending" for name in others)
            if others and len(others) == len(files):
                without.append(place.name)
    if not kinds:
        return found, ""
    few = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.most_common(4)) + (", ..." if len(kinds) > 4 else "")
    said = f"files that are no images known here are left out ({few})"
    if without:
        listed = ", ".join(without[:4]) + (", ..." if len(without) > 4 else "")
        said += f", all of {listed}"
    return found, said


def _folders(folder: Path, within: tuple[str, ...]) -> Iterator[Path]:
    """The folder and those below it, also through links, but not those that it is `within`; hidden ones left out."""
    real = os.path.realpath(folder)
    if real in within:
        return
    yield folder
    inside = sorted(part.name for part in os.scandir(folder) if part.is_dir())
    for name in inside:
        if not name.startswith((".", "__")):
            yield from _folders(folder / name, (*within, real))


def _is_known(name: str) -> bool:
    return name in METADATA or os.path.splitext(name)[1].lower() in (*ARCHIVES, *ImageFolder.EXTENSIONS)
