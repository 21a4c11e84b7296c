"""Oasst1's message trees: of each tree, the conversation that follows the best-ranked reply at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from paca.data.rows import Row
from paca.messages.errors import PacaError

SPEAKERS = {"prompter": "user", "assistant": "assistant"}

FLAT_COLUMNS = ("message_id", "parent_id", "text", "role")
"""Columns of the flat layout: one message a row, as on the hub (`OpenAssistant/oasst1`)."""

OF_USE = ("rank", "deleted")
"""Columns of the flat layout that are read where they are there."""

TREE_COLUMNS = ("message_tree_id", "prompt")
"""Columns of the nested layout: one tree a row, its messages in `prompt` and their `replies`."""


def trees_of_messages(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """Gather rows of single messages into one row for each tree that holds an answer.

    Args:
        rows: `(place, message)`; a parent may come after its replies.

    Yields:
        `(place, tree)`: the tree's first message and its place, with the columns of the nested layout added.

    Raises:
        PacaError: A message has no id, two have the same one, a reply's parent is nowhere, or parents go in a circle.
    """
    places: dict[str, str] = {}
    messages: dict[str, dict[str, Any]] = {}
    for place, row in rows:
        name = row.get("message_id")
        if not isinstance(name, str) or not name:
            raise PacaError(f"{place}: message_id is {name!r}; expected the message's own id.")
        if name in messages:
            raise PacaError(f"{place}: the message_id {name!r} stands in {places[name]} as well; each message has one.")
        places[name], messages[name] = place, {**row, "replies": []}
    for name, message in messages.items():
        parent = message.get("parent_id")
        if parent and (not isinstance(parent, str) or parent not in messages):
            raise PacaError(f"{places[name]}: the parent_id {parent!r} is no message of this data. Give whole trees.")
        if parent:
            messages[parent]["replies"].append(message)
    roots = {name: message for name, message in messages.items() if not message.get("parent_id")}
    found, reached = list(roots.values()), set(roots)
    for message in found:  # which grows
        found += message["replies"]
        reached |= {reply["message_id"] for reply in message["replies"]}
    if len(reached) < len(messages):
        name = next(name for name in messages if name not in reached)
        raise PacaError(
            f"{places[name]}: the parents of the message {name!r} go in a circle. A tree has a first message."
        )
    for name, message in roots.items():
        if _is_answered(places[name], message):
            yield places[name], {**message, "message_tree_id": name, "prompt": message}


def best_path(root: dict[str, Any]) -> list[dict[str, str]]:
    """The best-ranked conversation of a tree, up to its last answer.

    People ranked the replies to one message: rank 0 is the best. A reply without a rank comes after those with one, in
    the order of the data. Deleted messages, and all below them, are left out.

    Args:
        root: The first message, with `text`, `role` and `replies`.

    Returns:
        Messages with `role` and `content`; empty when nobody answered.

    Raises:
        PacaError: A message is neither of the prompter nor of the assistant, has no text, a rank that is no number or
            a `deleted` that is neither true nor false, or its replies are no messages.
    """
    path: list[dict[str, str]] = []
    message: dict[str, Any] | None = None if _is_deleted(root) else root
    while message is not None:
        role, text = message.get("role"), message.get("text")
        if not isinstance(role, str) or role not in SPEAKERS:
            raise PacaError(f"a message is of the role {role!r}; known are: {', '.join(SPEAKERS)}.")
        if not isinstance(text, str):
            raise PacaError(f"the text of a message is {type(text).__name__}; expected text.")
        path.append({"role": SPEAKERS[role], "content": text})
        replies = message.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise PacaError(f"replies is {replies!r}; expected a list of messages.")
        message = min((reply for reply in replies if not _is_deleted(reply)), key=_rank, default=None)
    while path and path[-1]["role"] != "assistant":
        path.pop()
    return path


def _is_deleted(message: dict[str, Any]) -> bool:
    deleted = message.get("deleted")
    if isinstance(deleted, str):  # CSV has only texts
        deleted = {"": None, "false": False, "true": True}.get(deleted.lower(), deleted)
    if deleted is None or deleted != deleted:  # pandas writes NaN for what is not there
        return False
    if deleted not in (False, True):
        raise PacaError(f"deleted is {deleted!r} at a message; expected true, false or null.")
    return bool(deleted)


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    if isinstance(rank, str):  # CSV has only texts
        rank = _number_in(rank)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float))):
        raise PacaError(f"the rank of a message is {rank!r}; expected a number or null.")
    return math.inf if rank is None or math.isnan(rank) else rank  # pandas writes NaN for what is not there


def _number_in(text: str) -> float | str | None:
    """What a field of CSV means as a number: nothing where it is empty, and the text itself where it is none."""
    try:
        return float(text) if text else None
    except ValueError:
        return text


def answered_trees(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """The rows of the nested layout that hold an answer."""
    for place, row in rows:
        root = row.get("prompt")
        if not isinstance(root, dict):
            raise PacaError(f"{place}: prompt is {type(root).__name__}; expected the first message of a tree.")
        if _is_answered(place, root):
            yield place, row


def _is_answered(place: str, root: dict[str, Any]) -> bool:
    try:
        return bool(best_path(root))
    except PacaError as error:
        raise PacaError(f"{place}: in this tree, {error}") from None
