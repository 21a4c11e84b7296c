"""Labelled images for training a vision model: a folder with one folder a label, or a dataset on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets

from paca.data.sources import HUB_SOURCE, is_hub_id, load_from_hub
from paca.messages.errors import PacaError


@dataclass(frozen=True)
class LabelledImages:
    """Images and what is on them."""

    dataset: datasets.Dataset
    """The columns `image` (a PIL image once it is read) and `label` (a number)."""

    names: list[str]
    """What each number stands for."""


def load_images(source: str, *, split: str = "train", limit: int | None = None) -> LabelledImages:
    """Load labelled images.

    Args:
        source: A folder that holds a folder of images for each label (those in turn may lie in `train/`, `test/`), or a
            dataset on the hub: `owner/name`, `owner/name:config`, `owner/name[split]`.
        split: The split of `source` when it names none.
        limit: Use only so many, spread evenly: folders are read label by label.

    Raises:
        PacaError: The source does not exist, holds no images, or says no label with each.
    """
    if limit is not None and limit < 1:
        raise PacaError(f"The limit of images is {limit}; expected at least 1.")
    folder = Path(source).expanduser()
    dataset = _from_folder(folder, split) if folder.is_dir() else _from_hub(source, split)
    image = _only_column(dataset, datasets.Image, "images", source)
    label = _only_column(dataset, datasets.ClassLabel, "labels", source)
    if limit is not None and limit < len(dataset):
        dataset = dataset.select([index * len(dataset) // limit for index in range(limit)])
    names = list(dataset.features[label].names)
    dataset = dataset.select_columns([image, label]).rename_columns(
        {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    )
    return LabelledImages(dataset, names)


def _from_folder(folder: Path, split: str) -> datasets.Dataset:
    try:
        # Without `drop_labels`, folders of which only some split has several labels would lose them.
        return datasets.load_dataset("imagefolder", data_dir=str(folder.resolve()), split=split, drop_labels=False)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise PacaError(
            f"The folder {folder} cannot be read as labelled images: {str(error).strip()}\n"
            f"Expected: {folder}/LABEL/image.png, or {folder}/{split}/LABEL/image.png."
        ) from error


def _from_hub(source: str, split: str) -> datasets.Dataset:
    match = HUB_SOURCE.fullmatch(source)
    if source.startswith(("/", ".", "~")) or match is None or not is_hub_id(match["id"]):
        raise PacaError(f"There is no folder of images {source!r} (working folder: {Path.cwd()}). Check the path.")
    return load_from_hub(source, match["id"], match["config"], match["split"] or split)


def _only_column(dataset: datasets.Dataset, kind: type, what: str, source: str) -> str:
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items())
        raise PacaError(
            f"{source} has {len(found)} columns of {what}; expected one. Its columns: {listed or '(none)'}."
        )
    return found[0]
