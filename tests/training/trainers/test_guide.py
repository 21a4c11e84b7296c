"""The YAML in the guide: each block is a whole run that is read as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paca.training import load_run_config
from paca.training.trainers import TRAINERS

GUIDE = (Path(__file__).parents[3] / "docs" / "guides" / "trainers.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[re.findall(r"trainer: (\w+)", block)[0] for block in BLOCKS])
def test_a_block_is_a_run(tmp_path: Path, block: str) -> None:
    (tmp_path / "run.yaml").write_text(block)
    assert load_run_config(tmp_path / "run.yaml").train["trainer"] in TRAINERS


def test_every_trainer_has_a_block_and_a_row() -> None:
    shown = {re.findall(r"trainer: (\w+)", block)[0] for block in BLOCKS}
    assert shown == TRAINERS.keys() - {"sft"}
    assert all(f"| `{name}`" in GUIDE for name in TRAINERS)
