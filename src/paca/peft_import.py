"""Calls something at the moment `peft` gets imported, so that `import paca` need not import it.

`peft` brings torch and transformers along: seconds that a command line which only refuses a misspelt key need not
cost.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PEFT = "peft"
OURS = "paca."


def when_peft_is_imported(callback: Callable[[], None]) -> None:
    """Call `callback` once: now if `peft` is imported already, else within the import of it, before that returns.

    What `callback` needs may itself be half imported by then: where a module of this package is what imports `peft`,
    the call waits until that module is complete. An error of `callback`, or of `peft`, is the importer's to see; the
    next import of `peft` tries again.
    """
    finder = _Finder(callback)
    sys.meta_path.insert(0, finder)
    if PEFT in sys.modules:  # looked up after the finder stands: an import in another thread finds one or the other
        finder.fire()


class _Finder(MetaPathFinder):
    """Finds nothing itself; has the others' loaders of `peft` and of this package's modules tell when they are done."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PEFT and not fullname.startswith(OURS):
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Announcing(spec.loader, self)
                return spec
        return None

    def execute(self, loader: Loader, module: ModuleType) -> None:
        """Run the module; after the outermost one of this thread, call back if `peft` is there."""
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            loader.exec_module(module)
        finally:
            self._thread.depth -= 1
        if self._thread.depth == 0 and PEFT in sys.modules:
            self.fire()

    def fire(self) -> None:
        self._callback()
        if self in sys.meta_path:  # a second thread may have been here at the same time
            sys.meta_path.remove(self)


class _Announcing(Loader):
    """Another loader, which tells the finder when a module is complete, and steps aside."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on resources, sources and pickles are asked of the module's own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.execute(self._loader, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
