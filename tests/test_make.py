"""`make install`, with a stand-in for the environment's Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_installation_says_how_long_it_takes_before_it_starts_and_how_to_use_it(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("Makefile", "pyproject.toml", "tools/make_venv.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$3"\n')
    python.chmod(0o755)
    command = ["make", "install", f"PYTHON={sys.executable}"]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    done = subprocess.run(command, cwd=tmp_path, env=outer, capture_output=True, text=True, check=True)
    told, pip, ready = done.stdout.splitlines()
    assert "about two minutes" in told
    assert pip == "install"
    assert ready == "Ready. For paca on your path: . .venv/bin/activate"
