"""The registry: every module in this package defines one `METHOD`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from paca.bench.method import Method
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean


def _registry() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for module in pkgutil.iter_modules(__path__, __name__ + "."):
        method = importlib.import_module(module.name).METHOD
        if method.name in found:
            raise ValueError(f"two files in {__name__} define the method {method.name!r}")
        found[method.name] = method
    return dict(sorted(found.items()))


METHODS = _registry()


def find_methods(names: Sequence[str]) -> list[Method]:
    """The methods of those names; `all` stands for every one.

    Raises:
        PacaError: there is no method of that name.
    """
    chosen: dict[str, Method] = {}
    for name in names:
        if name == "all":
            chosen.update(METHODS)
        elif name in METHODS:
            chosen[name] = METHODS[name]
        else:
            raise PacaError(
                f"There is no method {name!r}.{did_you_mean(name, METHODS)} Known are: all, {', '.join(METHODS)}."
            )
    return list(chosen.values())
