"""A comparison whose runs the fake trainer makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from paca.comparison.flags import Rates
from paca.comparison.methods import methods_of
from paca.comparison.settings import Comparison
from paca.comparison.work import Work

FAKE = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
COMMON: dict[str, dict[str, Any]] = {
    "model": {"name": "some/model"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
    "paca": {"r": 16, "paca_alpha": 32},
    "train": {"max_steps": 6},
}

IN_A_PROCESS = """
import sys
from pathlib import Path
from comparison.small_comparison import small_work
try:
    small_work(Path(sys.argv[1])).run()
except KeyboardInterrupt:
    sys.exit(130)
"""
"""The work on a folder, for a process that can be killed or interrupted."""


def small_comparison(folder: Path, methods: str = "paca,lora", **changed: Any) -> Comparison:
    """Two methods, two rates, two seeds."""
    settings: dict[str, Any] = {"rates": Rates([1e-3, 3e-3]), "seeds": [0, 1], "extend": False, **changed}
    return Comparison(folder, COMMON, methods_of(methods, COMMON), **settings)


def small_work(folder: Path, methods: str = "paca,lora", **changed: Any) -> Work:
    """Its work, without a word."""
    comparison = small_comparison(folder, methods, **changed)
    return Work(comparison, {"paca": 6, "lora": 6}, Console(quiet=True), FAKE)
