"""What no command shows: notes from one library to another."""

from __future__ import annotations

import warnings


def hide_library_notes() -> None:
    """Hide warnings about the next releases of libraries; nothing a user of a command can act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
