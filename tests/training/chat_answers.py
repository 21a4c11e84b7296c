"""What `paca chat` answers, to compare with what others show."""

from __future__ import annotations

import functools
from pathlib import Path

from paca.pretrained.conversation import answering, opening
from paca.pretrained.generation import load_for_generation, stream_reply


@functools.cache
def chats(path: Path, *, length: int = 256, system: str | None = None, base: bool = False) -> str:
    """The answer to `Hello` of a run or an adapter that is loaded alone; with `base` without its adapter."""
    loaded = load_for_generation(path)
    messages = [*opening(loaded, system), {"role": "user", "content": "Hello"}]
    with answering(loaded, base):
        return "".join(stream_reply(loaded, messages, max_new_tokens=length))
