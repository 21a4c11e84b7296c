"""`make install`, with a stand-in for the environment's Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


PIP = """#!/bin/sh
[ "$3" = install ] || exit 0
echo "Obtaining file:///paca"
echo "Collecting torch>=2.12 (from paca)"
echo "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (888.1 MB)"
echo "Collecting types_PyYAML (from paca)"
echo "  Downloading types_pyyaml-6.0-py3-none-any.whl (20 kB)"
echo "Requirement already satisfied: numpy in /somewhere"
echo "Installing collected packages: torch, types-PyYAML, numpy"
"""


def make_install(folder: Path, pip: str) -> subprocess.CompletedProcess[str]:
    (folder / "tools").mkdir()
    for name in ("Makefile", "pyproject.toml", "tools/make_venv.sh"):
        shutil.copy(ROOT / name, folder / name)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(pip)
    python.chmod(0o755)
    command = ["make", "install", f"PYTHON={sys.executable}"]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    return subprocess.run(command, cwd=folder, env=outer, capture_output=True, text=True)


def test_an_installation_says_how_long_it_takes_what_it_is_at_and_how_to_use_it(tmp_path: Path) -> None:
    done = make_install(tmp_path, PIP)
    assert done.returncode == 0, done.stderr
    told, *packages, ready = done.stdout.splitlines()
    assert "about two minutes, and up to ten" in told
    assert packages == [
        "Collecting torch>=2.12 (from paca)",
        "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (888.1 MB)",
        "Collecting types_PyYAML (from paca)",
        "Installing collected packages: torch, types-PyYAML, numpy",
    ]
    assert ready == "Ready. For paca on your path: . .venv/bin/activate"


def test_an_installation_that_fails_ends_with_pips_message(tmp_path: Path) -> None:
    done = make_install(tmp_path, f"{PIP}echo 'ERROR: no space' >&2\nexit 1\n")
    assert done.returncode != 0
    assert "ERROR: no space" in done.stderr
    assert "The installation failed; pip's message is above." in done.stderr
    assert "Ready." not in done.stdout
    assert not (tmp_path / ".venv" / ".installed").exists()
