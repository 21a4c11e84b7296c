"""The program `paca`: it enters the package by its path, and runs `paca/__init__` when a command begins its work.

Python runs a package's `__init__` before any module in it, and ours imports torch, transformers and PEFT: seconds that
`--help`, a misspelt option or a config that is not there need not cost. So this module, which lies outside the package,
puts a module of that name and path in place, still empty, and the command line is imported through it. A command that
begins its work calls `import_libraries` (`paca/cli/starting.py`), which runs `paca/__init__` in that same module.
Whoever imports `paca` in this process from then on, a model's own code too, gets the full package. Processes that are
started from here run none of this: `import paca` is plain in them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Run the command line."""
    try:
        enter_package()
        from paca.cli import main as command_line

        command_line()
    except KeyboardInterrupt:  # before a command began: it ends its work itself
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def enter_package() -> None:
    """Put an empty `paca` in place, through which its modules can be imported; not where it is imported already."""
    if "paca" not in sys.modules:
        spec = find_spec("paca")  # without importing it
        assert spec is not None
        sys.modules["paca"] = module_from_spec(spec)


if __name__ == "__main__":
    main()
