"""Find what a data source's name stands for: files, a folder of them, or a dataset, on the hub or saved here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import xxhash
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from paca.data.file_content import add_file
from paca.data.file_names import SUFFIXES, is_here_or_nowhere, neighbour_hint, not_there, suffix_of
from paca.data.hub import error_instead, without_waiting_for_the_hub
from paca.data.named_columns import renamed
from paca.data.rows import Row, rows_of, with_label_names, without_null_fields
from paca.messages.errors import PacaError
from paca.pretrained.hub import refusal

_NOTES = ("dataset_info.json", "dataset_infos.json")
"""Beside data files, about them."""
_TEXTS = (".txt", ".text", ".md")
"""Of files that hold texts alone."""
_MOST_FOLDERS = 3
"""That a message names."""

HUB_SOURCE = re.compile(r"(?P<id>[^\[\]:]+)(:(?P<config>[^\[\]]+))?(\[(?P<split>.+)\])?")


@dataclass(frozen=True)
class Source:
    """Where rows come from: data files, or one split of a dataset."""

    name: str
    """As the user wrote it."""

    files: tuple[Path, ...] = ()
    left_out: int = 0
    """Files of the folder that are of other splits, or of none."""
    dataset: datasets.Dataset | None = None
    columns: tuple[tuple[str, str], ...] = ()
    """Names that a form knows, each with the data's own column for it."""
    optional: frozenset[str] = frozenset()
    """Those of the names that a row may lack."""

    def fingerprint(self) -> str:
        """A hash of the content, so that a cached conversion is used only for the very same rows."""
        if self.dataset is not None:
            return str(self.dataset._fingerprint)
        content = xxhash.xxh128()
        for file in self.files:
            content.update(f"\n{file.name}\n".encode())
            add_file(content, file)
        return content.hexdigest()

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield `(place, row)`; the place names file and line, as in `"train.jsonl, line 7"`.

        Raises:
            PacaError: A file cannot be parsed, or a row lacks one of `columns`.
        """
        yield from renamed(self._rows(), dict(self.columns), self.optional)

    def _rows(self) -> Iterator[tuple[str, Row]]:
        if self.dataset is not None:
            for index, row in enumerate(self.dataset):
                yield f"{self.name}, row {index}", without_null_fields(with_label_names(row, self.dataset.features))
            return
        for file in self.files:
            yield from rows_of(file)


def find_source(name: str, split: str) -> Source:
    """Find what `name` stands for (see `paca.data.load_examples`). What exists locally comes first.

    Raises:
        PacaError: It is no text, there is no such file, the type of file is unknown, or the hub has no such dataset.
    """
    if not isinstance(name, str):
        raise PacaError(
            f"The data source is a {type(name).__name__}; expected a text: a file ({', '.join(SUFFIXES)}), a folder or "
            "a hub id. Rows in memory go to the trainer themselves, as datasets.Dataset.from_list(rows); or write "
            "them to a .jsonl file."
        )
    if not name.strip():
        raise PacaError(f"The data source is empty. Give a file ({', '.join(SUFFIXES)}), a folder or a hub id.")
    path = Path(name).expanduser()
    if path.is_dir():
        if (saved := _saved(path, name, split)) is not None:
            return Source(name, dataset=saved)
        _refuse_model(path, name)
        found = {file for file in path.iterdir() if _is_data(file)}
        # What was unpacked beside its archive is not read twice.
        files = tuple(
            sorted(file for file in found if file.suffix.lower() != ".gz" or file.with_suffix("") not in found)
        )
        if not files:
            raise PacaError(f"The folder {name!r} holds no data file ({', '.join(SUFFIXES)}).{_folders_below(path)}")
        of_split = _of_split(files, name, split)
        return Source(name, of_split, left_out=len(files) - len(of_split))
    if path.is_file():
        if suffix_of(path) not in SUFFIXES:
            how = ' Write its texts into a .jsonl file, {"text": ...} a line.' if suffix_of(path) in _TEXTS else ""
            raise PacaError(
                f"The data file {name!r} is of type {path.suffix or '(none)'!r}. Understood are "
                f"{', '.join(SUFFIXES)}.{how}"
            )
        return Source(name, (path,))
    hub = None if is_here_or_nowhere(name) else load_from_hub(name, split)
    if hub is None:
        raise PacaError(f"{not_there(name)} Check the path (data.train, data.eval).")
    return Source(name, dataset=hub)


def _refuse_model(folder: Path, name: str) -> None:
    """Say so where `folder` holds a model or an adapter, whose settings lie in files that data might lie in."""
    for file, key, what in (
        ("config.json", "model_type", "a model"),
        ("adapter_config.json", "peft_type", "an adapter"),
    ):
        try:
            is_one = key in json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, RecursionError):  # there is none, or another
            continue
        if is_one:
            raise PacaError(
                f"The folder {name!r} holds {what} ({file}), not data. Give a file or folder of examples (data.train, "
                "data.eval); the model to train is model.name."
            )


def _is_data(file: Path) -> bool:
    return suffix_of(file) in SUFFIXES and file.name not in _NOTES and file.is_file()


def _folders_below(folder: Path) -> str:
    """Which folders in `folder` hold data files, as a dataset copied from the hub has them in `data`."""
    there = sorted({str(file.parent) for file in folder.rglob("*") if _is_data(file)})
    more = f" and {len(there) - _MOST_FOLDERS:,} more" if len(there) > _MOST_FOLDERS else ""
    return f" There are some in {', '.join(there[:_MOST_FOLDERS])}{more}: give one of these." if there else ""


def _saved(folder: Path, name: str, split: str) -> datasets.Dataset | None:
    """What `save_to_disk` of a `datasets.Dataset`, or of a dictionary of splits, left in `folder`; None for others."""
    of_one = all((folder / part).is_file() for part in ("state.json", "dataset_info.json"))
    if not of_one and not (folder / "dataset_dict.json").is_file():
        return None
    try:
        found = datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise PacaError(f"The dataset that was saved in {name!r} can't be read: {error}. Save it again.") from error
    if isinstance(found, datasets.Dataset):
        return found
    if split == "all":
        return datasets.concatenate_datasets([*found.values()])
    if split not in found:
        raise PacaError(
            f"The dataset that was saved in {name!r} has no split {split!r}; it has {' and '.join(found)}. Name one of "
            "them, or all (data.split, data.eval_split)."
        )
    return found[split]


def _of_split(files: tuple[Path, ...], folder: str, split: str) -> tuple[Path, ...]:
    """Those of a folder's files that are of the split by their names, as datasets takes them; all of them, if these
    tell of no two splits, or the split is called `all`."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(f"[{NON_WORDS_CHARS}]", file.name.lower())
        named = [str(each) for each, keywords in SPLIT_KEYWORDS.items() if not {*keywords}.isdisjoint(words)]
        for each in named if len(named) == 1 else ():
            splits.setdefault(each, []).append(file)
    if len(splits) < 2 or split == "all":
        return files
    asked = next((str(each) for each, keywords in SPLIT_KEYWORDS.items() if split.lower() in keywords), split)
    if asked not in splits:
        raise PacaError(
            f"The folder {folder!r} has no files of a split {split!r} by their names; it has {' and '.join(splits)}. "
            "Name one of them, or all (data.split, data.eval_split), or give a file."
        )
    return tuple(splits[asked])


def load_from_hub(name: str, split: str) -> datasets.Dataset | None:
    """One split of a dataset on the hub: the one that `name` gives, else `split`. None for what can be no hub id.

    Raises:
        PacaError: There is no such dataset, configuration or split, or the hub cannot be reached.
    """
    match = HUB_SOURCE.fullmatch(name)
    if name.startswith(("/", ".", "~")) or match is None:
        return None
    try:
        validate_repo_id(match["id"])
    except HFValidationError:
        return None
    split = match["split"] or split
    try:
        with without_waiting_for_the_hub():
            return datasets.load_dataset(match["id"], match["config"], split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise PacaError(_why_not_loaded(name, split, error)) from error


def _why_not_loaded(name: str, split: str, error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        if "gated dataset" in str(error):
            return f"{name!r} is gated on the hub. Accept its terms there, then log in with `hf auth login`."
        return (
            f"There is no {name!r}: no such file or folder here, and no such (public) dataset on the hub. Check the "
            "name; for a private dataset log in with `hf auth login`."
        )
    if (answered := refusal(name, error)) is not None:
        return answered
    if isinstance(error, ConnectionError):
        return error_instead(name) or (
            f"There is no data file or folder {name!r} here.{neighbour_hint(name)} It looks like a dataset on "
            "the hub, but the hub cannot be reached and there is no copy in the local cache. Connect to the internet, "
            "or give a file."
        )
    return (
        f"The dataset {name!r} on the hub cannot be loaded: {str(error).strip()}\n"
        f"A configuration is given as owner/name:config, a split as owner/name[split] (default: {split!r})."
    )
