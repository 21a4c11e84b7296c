"""The guide names every trainer. (Its blocks are run by `tests/test_code_blocks.py`.)"""

from __future__ import annotations

import re
from pathlib import Path

from paca.training.trainers import TRAINERS

GUIDE = (Path(__file__).parents[3] / "docs" / "guides" / "trainers.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)


def test_every_trainer_has_a_block_and_a_row() -> None:
    shown = {re.findall(r"trainer: (\w+)", block)[0] for block in BLOCKS}
    assert shown == TRAINERS.keys() - {"sft"}
    assert all(f"| `{name}`" in GUIDE for name in TRAINERS)
