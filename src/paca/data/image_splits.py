"""The splits of a folder of images: folders named train, test, ... in it that hold folders of labels, or metadata."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS, get_data_patterns
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from paca.data.image_files import ARCHIVES, METADATA

_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


def image_splits(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The patterns of each split's files, as datasets takes them; none where the folder is one split.

    A label may be called train, and a file "crash test.png": neither makes a split.

    Returns:
        The patterns, and the names of what lies beside the splits and holds images.

    Raises:
        OSError: The folder can't be read.
    """
    inside = sorted(part for part in folder.iterdir() if not part.name.startswith((".", "__")))
    folders = [part for part in inside if part.is_dir()]
    splits = {part: split for part in folders if (split := _split_of(part.name)) and _holds_a_set(part)}
    if splits:
        found = {
            split: [f"{glob.escape(part.name)}/**" for part, its in splits.items() if its == split]
            for split in dict.fromkeys(_WORDS.values())
            if split in splits.values()
        }
        return found, [part.name for part in folders if part not in splits and _holds_images(part)]
    if any(part.suffix.lower() in ARCHIVES for part in inside):
        patterns = {str(split): list(each) for split, each in get_data_patterns(str(folder)).items()}
        return ({} if list(patterns.values()) == [["**"]] else patterns), []
    if len(folders) == 1 and not any(_is_image(part) or part.name in METADATA for part in inside):
        within, beside = image_splits(folders[0])
        prefix = glob.escape(folders[0].name)
        return {split: [f"{prefix}/{each}" for each in patterns] for split, patterns in within.items()}, beside
    return {}, []


def _split_of(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def _holds_a_set(folder: Path) -> bool:
    """Not just images, as the folder of a label does."""
    return any(part.is_dir() or part.name in METADATA for part in folder.iterdir() if part.name[0] != ".")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ImageFolder.EXTENSIONS and path.is_file()


def _holds_images(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.rglob("*"))
