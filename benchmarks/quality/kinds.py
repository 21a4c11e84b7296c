"""What an encyclopedia entry is about: texts with a label each, which follows from the entry's short description."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

CHARACTERS = 300  # of an entry
KINDS = {
    "person": "actor|actress|singer|writer|politician|player|president|king|queen|emperor|scientist|physicist"
    "|mathematician|philosopher|composer|artist|author|monarch|director|rapper|musician|footballer|general|leader|poet"
    "|painter",
    "place": "city|town|country|capital|river|island|state|province|region|sea|mountain|lake|county|district|village"
    "|continent",
    "organism": "species|genus|family of|animal|plant|bird|fish|breed|mammal|order of|class of",
    "work": "film|novel|album|song|book|series|video game|painting|poem|opera|play by",
    "event": "war|battle|conflict|event|revolution|festival|treaty|competition|epidemic|disaster",
    "science": "theorem|chemical|compound|particle|disease|disorder|theory|process|physical|element|equation"
    "|medication|mathematical|substance|medical",
    "organisation": "company|organization|organisation|party|university|club|band|agency|team|military|association",
}


def kinds(conversations: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """`text` and `label` of each entry whose description names one kind alone; others are left out.

    Args:
        conversations: As of `build_examples`.
    """
    patterns = {kind: re.compile(rf"\b({words})\b") for kind, words in KINDS.items()}
    for conversation in conversations:
        question, answer = (message["content"] for message in conversation["messages"])
        description = question.rpartition("In a few words: ")[2].lower()
        found = [kind for kind, words in patterns.items() if words.search(description)]
        if len(found) == 1:
            yield {"text": answer[:CHARACTERS], "label": found[0]}
