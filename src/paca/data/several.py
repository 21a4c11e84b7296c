"""Several sources of training data as one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Json, List

from paca.data.conversion import ORIGIN, RENDERED
from paca.data.examples import Examples
from paca.data.formats import Example
from paca.messages.errors import PacaError
from paca.pretrained.quiet import without_progress_bars


def joined(parts: Sequence[Examples]) -> Examples:
    """All examples, those of the first source first.

    Questions with answers become conversations where others are. A column that one source lacks, such as `tools`, is
    null in its examples. An `origin` that is in two sources gets their paths.

    Args:
        parts: One or more, of one family.

    Raises:
        PacaError: Some hold texts and others messages, or a question with earlier answers would be a conversation, all
            of whose answers are trained.
    """
    if len(parts) == 1:
        return parts[0]
    with without_progress_bars(datasets):
        tables = [part.dataset for part in _of_one_kind(parts)]
        tables = list(_told_apart([part.source for part in parts], tables))
        columns: dict[str, Any] = {}
        for table in tables:
            columns |= {name: feature for name, feature in table.features.items() if name not in columns}
        whole = datasets.concatenate_datasets([_with_columns(table, columns) for table in tables])
    each = "; ".join(f"{part.source}: {part.description}" for part in parts)
    description = f"{len(whole):,} examples of {len(parts)} sources. {each}"
    forms, names = (dict.fromkeys(words) for words in zip(*((part.format, part.source) for part in parts), strict=True))
    parts_of = tuple(table.select_columns(ORIGIN) for table in tables)
    return Examples(whole, " and ".join(forms), ", ".join(names), description, parts_of)


def _of_one_kind(parts: Sequence[Examples]) -> list[Examples]:
    """All with the same columns that are rendered or read."""
    kinds = [_kind(part) for part in parts]
    if any("messages" in kind for kind in kinds) and all(part.is_conversational for part in parts):
        return [
            part if "messages" in kind else _as_conversations(part) for part, kind in zip(parts, kinds, strict=True)
        ]
    for part, kind in zip(parts, kinds, strict=True):
        if kind != kinds[0] or part.is_conversational != parts[0].is_conversational:
            raise PacaError(
                f"{_words(parts[0])}, and {_words(part)}: they can't be trained together. Plain text is trained as it "
                "stands, messages are rendered by a chat template. Bring both into one form (data.train)."
            )
    return list(parts)


def _kind(part: Examples) -> set[str]:
    """What is rendered of it; a column of such a name that rewards read is not."""
    features = part.dataset.features
    return {name for name in RENDERED if name in features and not isinstance(features[name], Json)}


def _words(part: Examples) -> str:
    what = "messages" if part.is_conversational else " and ".join(sorted(_kind(part), key=RENDERED.index))
    return f"{part.source} (form {part.format}) gives {what}{'' if part.is_conversational else ' as plain text'}"


def _as_conversations(part: Examples) -> Examples:
    table = part.dataset
    others = {name: feature for name, feature in table.features.items() if name not in ("prompt", "completion")}
    features = Features({"messages": List(Json()), **others})
    return replace(part, dataset=table.map(_conversation, remove_columns=["prompt", "completion"], features=features))


def _conversation(example: Example) -> Example:
    if any(message["role"] == "assistant" for message in example["prompt"]):
        raise PacaError(
            f"{example[ORIGIN]}: the prompt has answers, of which none is trained. Beside conversations, all of whose "
            "answers are, it can't be told from them. Give the other sources as prompt and completion too (data.train)."
        )
    return {"messages": [*example["prompt"], *example["completion"]]}


def _told_apart(names: Sequence[str], tables: Sequence[Dataset]) -> Iterator[Dataset]:
    """With the source in front of all origins of those that share one, as files of one name do. Of a source that is
    named twice both copies keep theirs."""
    origins = [table[ORIGIN][:] for table in tables]
    times = Counter(origin for of_one in dict(zip(names, origins, strict=True)).values() for origin in of_one)
    short = dict(zip(names, _short(names), strict=True))
    for name, table, of_one in zip(names, tables, origins, strict=True):
        if any(times[origin] > 1 for origin in of_one):
            own = [_with_source(short[name], origin) for origin in of_one]
            table = table.remove_columns(ORIGIN).add_column(ORIGIN, own)
        yield table


def _short(names: Sequence[str]) -> list[str]:
    """Paths from the folder on that all of them are below, whatever the working folder is; hub ids as they are."""
    paths = {name: os.path.abspath(os.path.expanduser(name)) for name in names}
    local = {name: path for name, path in paths.items() if os.path.exists(path)}
    folder = os.path.commonpath([os.path.dirname(path) for path in local.values()]) if local else ""
    return [os.path.relpath(local[name], folder) if name in local else name for name in names]


def _with_source(name: str, origin: str) -> str:
    """Such as `b/train.jsonl, line 7` for `train.jsonl, line 7`."""
    file = Path(name).name
    return name + origin.removeprefix(file) if origin.startswith(f"{file}, ") else f"{name}/{origin}"


def _with_columns(table: Dataset, columns: dict[str, Any]) -> Dataset:
    for name, feature in columns.items():
        if name not in table.features:
            table = table.add_column(name, [None] * len(table), feature=feature)
    return table.select_columns(list(columns))
