from __future__ import annotations

from pathlib import Path

import paca
from paca.messages.install import how_to_install


def test_an_extra_or_a_package_is_told() -> None:
    assert how_to_install("gguf") == 'Install paca\'s extra gguf: pip install "./paca[gguf]", or: pip install gguf'
    assert how_to_install("runs", "trackio", "gradio").endswith('"./paca[runs]", or: pip install trackio gradio')
    assert how_to_install(None, "math-verify") == "Install it: pip install math-verify"


def test_what_is_missing_is_told_in_one_place() -> None:
    root = Path(paca.__file__).parent
    telling = {file.relative_to(root).as_posix() for file in root.rglob("*.py") if "pip install" in file.read_text()}
    assert telling == {"messages/install.py", "messages/adapter_notes.py"}  # cards say it to others
