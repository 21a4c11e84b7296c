"""What lies beside an adapter's weights and goes with them into another form: its tokenizer, a classifier's labels."""

from __future__ import annotations

import os
from pathlib import Path

from paca.pretrained.location import tokenizer_files
from paca.pretrained.purpose import classifier_in


def files_beside(folder: Path) -> list[Path]:
    """Those files of an adapter's folder.

    Raises:
        PacaError: A config beside the adapter is broken.
    """
    found = tokenizer_files(folder)
    if classifier_in(folder) is not None:
        found += [folder / name for name in ("config.json", "preprocessor_config.json")]
    return [file for file in found if os.path.isfile(file)]
