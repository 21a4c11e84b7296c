"""Labelled images from folders and Parquet files, opened when they are needed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from data.loopback_hub import serving
from paca.data import images as images_module
from paca.data import load_images, open_image
from paca.messages.errors import PacaError

COLOURS = {"blue": (10, 20, 200), "red": (200, 20, 10)}


def save_folder(folder: Path, count: int = 3) -> Path:
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (5, 4), colour).save(folder / label / f"{number}.png")
    return folder


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_folder_of_folders_is_labelled_by_their_names(tmp_path: Path) -> None:
    images = load_images(str(save_folder(tmp_path / "pictures")))
    names = images.dataset.features["label"].names
    assert names == ["blue", "red"]
    for row in images.dataset:
        image = open_image(row)
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == COLOURS[names[row["label"]]]
    assert images.description == "6 images with 2 labels: blue, red"


def test_the_hub_gives_what_a_folder_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "hub" / "train")
    with serving(tmp_path / "hub", "some/pets", monkeypatch, tmp_path / "cache"):
        images = load_images("some/pets[train]")
    names = images.dataset.features["label"].names
    assert names == ["blue", "red"]
    for row in images.dataset:
        assert open_image(row).getpixel((0, 0)) == COLOURS[names[row["label"]]]


def opened(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return open_image({"image": {"bytes": buffer.getvalue(), "path": None}, "origin": "a, image 0"})


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_become_eight(kind: str) -> None:
    shades = np.array([[0, 257, 10 * 257 + 3], [128 * 257, 65534, 65535]], dtype=np.uint16)
    image = opened(Image.fromarray(shades), kind)
    assert image.mode == "RGB"
    assert np.asarray(image)[:, :, 1].tolist() == [[0, 1, 10], [128, 254, 255]]


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), 70_000, np.int32)])
def test_images_of_other_values_are_refused(values: np.ndarray) -> None:
    with pytest.raises(PacaError, match=r"a, image 0.*can't be read as an image: its values.* bits"):
        opened(Image.fromarray(values), "TIFF")


def pattern() -> Image.Image:
    return Image.fromarray((np.arange(6 * 4 * 3).reshape(4, 6, 3) * 3).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_that_was_taken_sideways_is_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    pattern().save(buffer, format="PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(buffer))
    assert np.array_equal(np.asarray(opened(pattern(), exif=exif)), np.asarray(upright))


def test_a_photo_with_damaged_notes_is_read_as_it_is_stored() -> None:
    assert opened(pattern(), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff").size == (6, 4)


def test_eight_bits_that_are_stored_in_32_stay_what_they_are() -> None:
    shades = np.array([[0, 100], [200, 255]], dtype=np.int32)
    assert np.asarray(opened(Image.fromarray(shades), "TIFF"))[:, :, 0].tolist() == shades.tolist()


def test_a_split_is_a_folder_within(tmp_path: Path) -> None:
    save_folder(tmp_path / "pictures" / "train")
    save_folder(tmp_path / "pictures" / "test", count=1)
    assert len(load_images(str(tmp_path / "pictures"), split="test").dataset) == 2
    assert len(load_images(str(tmp_path / "pictures")).dataset) == 6


@pytest.mark.parametrize("split", ["train", "test", "validation", "mine"])
def test_a_folder_without_splits_is_its_only_one(tmp_path: Path, split: str) -> None:
    folder = str(save_folder(tmp_path / "test"))
    assert len(load_images(folder, split=split).dataset) == 6
    assert len(load_images(folder, split=f"{split}[:4]").dataset) == 4


def test_splits_are_folders_of_labels_whatever_they_are_called_exactly(tmp_path: Path) -> None:
    save_folder(tmp_path / "sets" / "pets" / "Train set")
    save_folder(tmp_path / "sets" / "pets" / "val-2024", count=1)
    save_folder(tmp_path / "sets" / "pets" / "more", count=2)
    images = load_images(str(tmp_path / "sets" / "pets"))
    assert len(images.dataset) == 6
    assert images.description == "6 images with 2 labels: blue, red; images in more are in no split, and left out"
    assert len(load_images(str(tmp_path / "sets"), split="validation").dataset) == 2  # in the one folder of this one
    assert len(load_images(str(tmp_path / "sets"), split="all").dataset) == 8


def test_a_label_or_an_image_that_is_called_as_a_split_makes_none(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pictures")
    (folder / "blue").rename(folder / "train")
    (folder / "red").rename(folder / "train-steam")
    image = next((folder / "train").iterdir())
    image.rename(image.with_name("crash test 0.png"))
    images = load_images(str(folder))
    assert images.description == "6 images with 2 labels: train, train-steam"
    assert len(load_images(str(folder), split="test").dataset) == 6


def test_labels_that_are_links_count_and_what_is_no_image_is_told(tmp_path: Path) -> None:
    save_folder(tmp_path / "elsewhere")
    folder = save_folder(tmp_path / "pictures" / "train").parent
    save_folder(folder / "test", count=1)
    (folder / "train" / "light green").symlink_to(tmp_path / "elsewhere" / "blue")
    (folder / "train" / "red" / "up").symlink_to(folder)  # leads back
    (folder / "train" / "yellow").mkdir()
    for name in ("yellow/0.heic", "yellow/1.HEIC", "red/without", "red/.hidden"):
        (folder / "train" / name).write_bytes(b"")
    (folder / "test" / "red" / "a.heic").write_bytes(b"")
    images = load_images(str(folder))
    assert images.description == (
        "9 images with 3 labels: blue, light green, red; files that are no images known here are left out (.heic: 2, "
        "no ending: 1), all of yellow"
    )
    assert load_images(str(folder), split="test").description.endswith("(.heic: 1)")
    (tmp_path / "links").mkdir()
    for label in COLOURS:
        (tmp_path / "links" / label).symlink_to(tmp_path / "elsewhere" / label)
    assert load_images(str(tmp_path / "links")).description == "6 images with 2 labels: blue, red"


def test_a_space_beside_a_label_is_no_part_of_it(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("RGB", (5, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog \n2.png, cat\n3.png,dog\n")
    assert load_images(str(tmp_path)).description == "4 images with 2 labels: cat, dog"


@pytest.mark.parametrize("has", [["train"], ["train", "validation"]])
def test_a_folder_that_lacks_a_split_says_which_it_has(tmp_path: Path, has: list[str]) -> None:
    for name in has:
        save_folder(tmp_path / "pictures" / name)
    with pytest.raises(PacaError, match=rf"pictures has no split 'test'; it has: {', '.join(has)}\. Name one of them"):
        load_images(str(tmp_path / "pictures"), split="test")
    assert len(load_images(str(tmp_path / "pictures"), split="all").dataset) == 6 * len(has)


def test_a_limit_takes_images_of_every_label(tmp_path: Path) -> None:
    labels = load_images(str(save_folder(tmp_path / "pictures")), limit=2).dataset["label"]
    assert sorted(labels) == [0, 1]


@pytest.mark.parametrize(
    ("column", "labels", "names"), [("label", [3, 1], ["1", "3"]), ("labels", ["b", "a"], ["a", "b"])]
)
def test_a_parquet_file_needs_no_schema_of_images(
    tmp_path: Path, column: str, labels: list[object], names: list[str]
) -> None:
    colours = list(COLOURS.values())
    stored = [{"bytes": png(colour), "path": None} for colour in colours]
    pq.write_table(pa.table({"img": stored, column: labels}), tmp_path / "images.parquet")
    images = load_images(str(tmp_path / "images.parquet"))
    assert images.dataset.features["label"].names == names
    assert [open_image(row).getpixel((0, 0)) for row in images.dataset] == colours


def test_grey_images_become_colour(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "grey" / label).mkdir(parents=True)
        Image.new("L", (3, 3), 100).save(tmp_path / "grey" / label / "1.png")
    assert open_image(load_images(str(tmp_path / "grey")).dataset[0]).getpixel((0, 0)) == (100, 100, 100)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pictures")
    (folder / "blue" / "1.png").write_bytes(b"no image")
    rows = list(load_images(str(folder)).dataset)
    with pytest.raises(PacaError, match=r"pictures, image 1 \(.*blue/1.png\) can't be read as an image"):
        [open_image(row) for row in rows]


def test_an_image_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes it for an attack, with an error of its own kind."""
    rows = list(load_images(str(save_folder(tmp_path / "pictures"))).dataset)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(PacaError, match=r"pictures, image 0 .* can't be read as an image: Image size"):
        open_image(rows[0])


def test_of_several_labels_one_is_named(tmp_path: Path) -> None:
    names = {"fine": ["oak", "rose", "elm"], "coarse": ["tree", "flower"]}
    labels = {column: datasets.ClassLabel(names=names[column]) for column in names}
    features = datasets.Features({"img": datasets.Image(), **labels})
    rows = [{"img": {"bytes": png((0, 90, 0)), "path": None}, "fine": 2, "coarse": 0}] * 2
    source = str(tmp_path / "plants.parquet")
    datasets.Dataset.from_list(rows, features=features).to_parquet(source)
    images = load_images(source, label="fine").dataset
    assert (images.features["label"].names, images["label"][0]) == (names["fine"], 2)
    with pytest.raises(
        PacaError, match=r"2 columns that may be the label: fine, coarse\..*Name one of them with data\.la"
    ):
        load_images(source)
    told = r"has no column 'kind', which data\.label names\. Its columns: img \(Image\), fine \(ClassLabel\), coarse"
    with pytest.raises(PacaError, match=told):
        load_images(source, label="kind")


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PacaError, match="cannot be read as labelled images"):
        load_images(str(tmp_path / "empty"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "metadata.csv").write_text("file_name,label\n../1.png,cat\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside" / "1.png")
    with pytest.raises(PacaError, match=r"cannot be read as labelled images: .*'\.\./1\.png'"):
        load_images(str(tmp_path / "outside"))
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(PacaError, match=r"Give a folder of images, or a .parquet file"):
        load_images(str(tmp_path / "data.csv"))
    with pytest.raises(PacaError, match="no folder of images '/nowhere/pets'"):
        load_images("/nowhere/pets")
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    with pytest.raises(PacaError, match="has 0 columns of images; expected one"):
        load_images(str(tmp_path / "text.parquet"))


@pytest.mark.parametrize("split", ["", "train"])
def test_an_image_beside_the_folders_of_labels_is_refused(tmp_path: Path, split: str) -> None:
    folder = save_folder(tmp_path / "pictures" / split)
    (folder / "cover.png").write_bytes(png((1, 2, 3)))
    with pytest.raises(PacaError, match=r"holds images, such as .*cover.png, and the folder .*blue in it holds others"):
        load_images(str(tmp_path / "pictures"))


def test_the_column_that_is_named_may_hold_plain_labels(tmp_path: Path) -> None:
    stored = [{"bytes": png(colour), "path": None} for colour in COLOURS.values()]
    pq.write_table(pa.table({"img": stored, "fine": ["b", "a"], "coarse": [0, 0]}), tmp_path / "images.parquet")
    images = load_images(str(tmp_path / "images.parquet"), label="fine").dataset
    assert (images.features["label"].names, list(images["label"])) == (["a", "b"], [1, 0])


SOURCES = ["metadata.csv", "metadata.jsonl", "parquet", "hub"]


def as_source(kind: str, folder: Path, columns: dict[str, list[object]], patched: pytest.MonkeyPatch) -> str:
    """Images of three colours with these columns beside them, as one of `SOURCES`."""
    count = len(next(iter(columns.values())))
    stored = [{"bytes": png((number, 0, 0)), "path": None} for number in range(count)]
    if kind == "hub":
        found = datasets.Dataset.from_dict({"image": stored, **columns}).cast_column("image", datasets.Image())
        patched.setattr(images_module, "load_from_hub", lambda name, split: found)
        return "some/pets"
    folder = folder / "pets"
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.table({"image": stored, **columns}), folder / "pets.parquet")
        return str(folder / "pets.parquet")
    for number, image in enumerate(stored):
        (folder / f"{number}.png").write_bytes(image["bytes"])
    table = pa.table({"file_name": [f"{number}.png" for number in range(count)], **columns}).to_pandas()
    if kind == "metadata.csv":
        table.to_csv(folder / kind, index=False)
    else:
        rows = [json.dumps({name: values[n] for name, values in columns.items()})[1:] for n in range(count)]
        lines = [f'{{"file_name": "{number}.png", {row}\n' for number, row in enumerate(rows)]
        (folder / kind).write_text("".join(lines))
    return str(folder)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("columns", "named", "names", "numbers"),
    [
        ({"label": ["dog", "cat", "dog"]}, None, ["cat", "dog"], [1, 0, 1]),
        ({"labels": [10, 9, 10], "width": [1, 2, 3]}, None, ["9", "10"], [1, 0, 1]),
        ({"breed": ["pug", "poodle", "pug"], "label": [7, 7, 7]}, "breed", ["poodle", "pug"], [1, 0, 1]),
    ],
)
def test_names_and_whole_numbers_are_labels_wherever_they_are_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    columns: dict[str, list[object]],
    named: str | None,
    names: list[str],
    numbers: list[int],
) -> None:
    images = load_images(as_source(source, tmp_path, columns, monkeypatch), label=named).dataset
    assert images.column_names == ["image", "label", "origin"]
    assert (images.features["label"].names, list(images["label"])) == (names, numbers)
    assert [open_image(row).getpixel((0, 0))[0] for row in images] == [0, 1, 2]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"width": [1.5, 2.0, 3.0]}, r"no label with each .*: image \(Image\), width \(\w+\)\. Add one called label\."),
        ({"breed": ["a", "b", "b"]}, r"no label with each .*If breed holds the label, name it with data\.label\."),
        ({"label": [0.5, 1.0, 2.0]}, r"column 'label' of .*pets.* holds (float64|double); expected .*label \("),
        ({"label": ["a", None, "b"]}, r"1 of 3 rows of .*pets.* no label in the column 'label'; the first is row 1\."),
        ({"label": [3, None, 4]}, r"1 of 3 rows of .*pets.* no label in the column 'label'; the first is row 1\."),
        (
            {"label": [1, 2, 1], "labels": ["a", "b", "a"]},
            r"2 columns .*: label, labels\. .* Name one of them with data",
        ),
    ],
)
def test_what_is_no_label_is_told_alike_wherever_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, columns: dict[str, list[object]], told: str
) -> None:
    name = as_source(source, tmp_path, columns, monkeypatch)
    with pytest.raises(PacaError, match=told):
        load_images(name)


def test_class_labels_that_stand_for_none_are_refused(tmp_path: Path) -> None:
    """As those of a hub's test split often do."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"image": {"bytes": png((0, 0, 0)), "path": None}, "label": label} for label in (1, -1)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(PacaError, match=r"1 of 2 rows of .* have no label in the column 'label'; the first is row 1"):
        load_images(str(tmp_path / "a.parquet"))
