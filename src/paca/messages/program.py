"""What to type for the program `paca`: its name alone works only where the environment is activated."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """`paca` where a shell would find this installation's, else the path to it, for a command to be typed here."""
    beside = Path(sys.executable).with_name("paca")
    if not beside.is_file():
        return "paca"
    found = shutil.which("paca")
    if found is not None and os.path.samefile(found, beside):
        return "paca"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def resume_command(config: Path) -> str:
    """What goes on with the run of a config file, to be typed here."""
    return f"{program()} train {shlex.quote(str(config))} --resume"
