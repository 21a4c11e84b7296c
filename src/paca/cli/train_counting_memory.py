"""`paca train` with its tensors' bytes counted: a program that `paca compare` starts, with `train CONFIG`."""

from __future__ import annotations

import sys
from pathlib import Path

from paca.comparison.counted_memory import count
from paca_command import main as train

if __name__ == "__main__":
    config = Path(sys.argv[2])
    count(train, config)
