"""How a PEFT config says which modules it means, and which of them have a rank of their own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import TypeVar

Number = TypeVar("Number", int, float)


def exact_targets(adapted: Collection[str], module_names: Collection[str]) -> list[str] | str:
    """``target_modules`` that match the ``adapted`` modules and no other.

    Args:
        adapted: their full names.
        module_names: the full names of all modules.

    Returns:
        For each module the shortest ending of its name that no other kind of module shares ("q_proj", if all of those
        are adapted), as a list; one regular expression, if a full name is itself the ending of another's.
    """
    taken = {ending for name in set(module_names) - set(adapted) for ending in _endings(name)}
    chosen = {next((ending for ending in _endings(name) if ending not in taken), None) for name in adapted}
    if None in chosen:
        return "|".join(re.escape(name) for name in sorted(adapted))
    return sorted(ending for ending in chosen if ending is not None)


def _endings(name: str) -> Iterator[str]:
    """ "a.b.c" -> "c", "b.c", "a.b.c"."""
    parts = name.split(".")
    for start in reversed(range(len(parts))):
        yield ".".join(parts[start:])


def default_and_pattern(values: dict[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The commonest value, and a ``rank_pattern`` or ``alpha_pattern`` of the modules that have another one.

    Args:
        values: by full module name; not empty.
    """
    default = Counter(values.values()).most_common(1)[0][0]
    # PEFT matches a pattern as the ending of a name; anchored, it is the whole name.
    return default, {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
