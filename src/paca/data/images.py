"""Labelled images for training a vision model: a folder (with one a label, or metadata), a Parquet file, or the hub."""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from paca.data.conversion import ORIGIN
from paca.data.evenly import spread_evenly
from paca.data.examples import Examples
from paca.data.image_files import with_links
from paca.data.image_splits import image_splits
from paca.data.label_column import columns_of, with_class_labels
from paca.data.sources import load_from_hub
from paca.messages.errors import PacaError
from paca.pretrained.quiet import without_progress_bars


def load_images(source: str, *, split: str = "train", limit: int | None = None, label: str | None = None) -> Examples:
    """Load labelled images. They stay in their files until `open_image` opens them.

    Args:
        source: A folder that holds a folder of images for each label (those in turn may lie in `train/`, `test/`), or
            images and a `metadata.csv` or `metadata.jsonl` of `file_name` and `label`; a Parquet file with images and
            labels; or a dataset on the hub: `owner/name`, `owner/name:config`, `owner/name[split]`.
        split: The split of `source` when it names none. A folder without folders of splits is any one of them.
        limit: Use only so many, 1 or more, spread evenly: folders are read label by label.
        label: The column with the label, where it has another name than `label`, or several could be it.

    Returns:
        The columns `image` (undecoded), `label` (a number, whose names are those of the feature) and `origin`.

    Raises:
        PacaError: The source does not exist, holds no images, or says no label with each.
    """
    path = Path(source).expanduser()
    left_out: list[str] = []
    with without_progress_bars(datasets):
        if path.is_dir():
            dataset, left_out = _from_folder(path, split)
        elif path.is_file():
            dataset = _from_file(path)
        elif (found := load_from_hub(source, split)) is not None:
            dataset = found
        else:
            raise PacaError(f"There is no folder of images {source!r} (working folder: {Path.cwd()}). Check the path.")
        dataset, image = _with_images(dataset, source)
        dataset, label = with_class_labels(dataset, source, label)
        dataset = spread_evenly(dataset, limit)
        dataset = dataset.select_columns([image, label]).rename_columns(
            {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        )
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
        dataset = dataset.add_column(ORIGIN, [f"{path.name}, image {n}" for n in range(len(dataset))])
    names = dataset.features["label"].names
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    description = f"{len(dataset):,} images with {len(names)} labels: {shown}"
    return Examples(dataset, "images", source, "; ".join([description, *left_out]))


def open_image(row: Mapping[str, Any]) -> Image.Image:
    """The image of a row of `load_images`, in colour and upright; 16 bits of grey become 8.

    Raises:
        PacaError: It is none, is broken, or has other values than 8 or 16 bits.
    """
    try:
        image = _upright(Image.open(io.BytesIO(image_bytes(row))))
        if image.mode.startswith("I"):
            image = _in_8_bits(image)
        elif image.mode == "F":
            raise ValueError("its values are floating-point numbers; 8 or 16 bits can be read")
        return image.convert("RGB")
    except PacaError:
        raise
    except Exception as error:  # whatever Pillow's readers raise; of its own kinds, not all are OSErrors
        raise _unreadable(row, error) from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each orientation in Exif upright."""
_ORIENTATION = 0x0112


def _upright(image: Image.Image) -> Image.Image:
    """The image as its orientation says. Pillow's own way also writes all other entries anew, and fails at odd ones."""
    turn = None
    with suppress(Exception):  # damaged entries: it stays as it is stored
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The same shades of grey: Pillow's own conversion cuts off whatever is brighter than 255."""
    values = np.asarray(image).astype(np.int64)
    if image.mode == "I" and values.min() >= 0 and values.max() < 256:  # 8 bits, stored in 32
        return Image.fromarray(values.astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values lie between {values.min()} and {values.max()}, beyond 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def image_bytes(row: Mapping[str, Any]) -> bytes:
    """The file of the image, undecoded; errors as of `open_image`."""
    stored = row["image"]
    try:
        return bytes(stored["bytes"]) if stored["bytes"] else Path(stored["path"]).read_bytes()
    except (OSError, TypeError) as error:  # an empty cell is None
        raise _unreadable(row, error) from error


def _unreadable(row: Mapping[str, Any], error: Exception) -> PacaError:
    stored = row["image"]
    said = "its form is not known" if isinstance(error, UnidentifiedImageError) else error
    return PacaError(
        f"{row[ORIGIN]} ({stored and stored['path']}) can't be read as an image: {said}. Remove or replace it. (A run "
        "goes on with the data that it began with: one that has begun must begin anew.)"
    )


def _from_folder(folder: Path, split: str) -> tuple[datasets.Dataset, list[str]]:
    """Its split, and in words what is left out of it."""
    where, asked = str(folder.resolve()), re.split(r"\W", split)[0]  # `test`, of `test[:100]`
    try:
        splits, beside = image_splits(Path(where))
        known = [*splits, "all"]
        if not splits:
            splits, known, split = {"train": ["**"]}, [asked], "train" + split[len(asked) :]
        if asked in known:
            left_out = [f"images in {', '.join(beside)} are in no split, and left out"] if beside else []
            for name, patterns in splits.items():
                splits[name], others = with_links(Path(where), patterns)
                if others and (asked in (name, "all") or known == [asked]):
                    left_out.append(others)
            # Without `drop_labels`, folders of which only some split has several labels would lose them.
            found = datasets.load_dataset(
                "imagefolder", data_dir=where, data_files=splits, split=split, drop_labels=False
            )
            _check_all_in_folders(found)
            return found, left_out
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)  # which says no more than that
        said = str(error.__cause__ if generating and error.__cause__ else error).strip()
        raise PacaError(
            f"The folder {folder} cannot be read as labelled images: {said}\n"
            f"Expected: {folder}/LABEL/image.png, {folder}/{asked}/LABEL/image.png, or beside images a metadata.csv or "
            "metadata.jsonl with file_name and label."
        ) from error
    raise PacaError(
        f"The folder {folder} has no split {asked!r}; it has: {', '.join(splits)}. Name one of them (data.split, "
        "data.eval_split), or give the folder of images itself."
    )


def _check_all_in_folders(dataset: datasets.Dataset) -> None:
    """Refuse images that lie beside a folder of images: each would be a label, the folder that holds both as well.

    Raises:
        PacaError: Naming it.
    """
    if not isinstance(dataset.features.get("label"), datasets.ClassLabel) or "image" not in dataset.features:
        return
    stored = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False)).with_format("arrow")[:]
    paths = [path for chunk in stored["image"].chunks for path in pc.struct_field(chunk, "path").to_pylist() if path]
    first = {path.rpartition("/")[0]: path for path in reversed(paths)}
    folders = sorted(first)
    for folder in folders:
        place = bisect_left(folders, f"{folder}/")
        inner = folders[place] if place < len(folders) else ""
        if inner.startswith(f"{folder}/"):
            raise PacaError(
                f"The folder {folder} holds images, such as {first[folder]}, and the folder {inner} in it holds "
                "others: each folder that holds images is a label. Move the ones or the others."
            )


def _from_file(path: Path) -> datasets.Dataset:
    if path.suffix.lower() != ".parquet":
        raise PacaError(f"{path} holds no images that can be read. Give a folder of images, or a .parquet file.")
    try:
        return datasets.Dataset.from_parquet(str(path))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise PacaError(f"{path} is not a readable Parquet file: {str(error).strip()}") from error


def _with_images(dataset: datasets.Dataset, source: str) -> tuple[datasets.Dataset, str]:
    """The dataset and its one column of images; a Parquet file need not say that a struct of bytes and path is one."""
    for name, feature in dataset.features.items():
        if isinstance(feature, dict) and "bytes" in feature:
            dataset = dataset.cast_column(name, datasets.Image())
    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise PacaError(
            f"{source} has {len(found)} columns of images; expected one. {columns_of(dataset.features)} Leave one of "
            "images (of objects with bytes, in a Parquet file)."
        )
    return dataset, found[0]
