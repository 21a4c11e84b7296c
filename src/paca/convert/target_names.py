"""How a PEFT config says exactly which modules it means."""

from __future__ import annotations

import re
from collections.abc import Collection


def exact_targets(adapted: Collection[str], module_names: Collection[str]) -> list[str] | str:
    """`target_modules` that match the modules named `adapted` and no other of `module_names`.

    For each module the shortest ending of its name that no other kind of module shares ("q_proj", if all of those are
    adapted), as a list; one regular expression, if a full name is itself the ending of another's.
    """
    taken = {ending for name in set(module_names) - set(adapted) for ending in _endings(name)}
    chosen = {next((ending for ending in _endings(name) if ending not in taken), None) for name in adapted}
    if None in chosen:
        return "|".join(re.escape(name) for name in sorted(adapted))
    return sorted(ending for ending in chosen if ending is not None)


def _endings(name: str) -> list[str]:
    """ "a.b.c" -> "c", "b.c", "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
