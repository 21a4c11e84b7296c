"""Training runs: from a YAML file to a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paca.training.config.config_file import load_run_config
from paca.training.config.run_config import RunConfig

if TYPE_CHECKING:
    from paca.training.plan import Plan
    from paca.training.prepare import describe
    from paca.training.run import RunResult, train

__all__ = ["Plan", "RunConfig", "RunResult", "describe", "load_run_config", "train"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: they import trl, which a misspelt key in a config should not have to wait for.
    if name in ("Plan", "describe"):
        from paca.training import prepare

        return getattr(prepare, name)
    if name in ("RunResult", "train"):
        from paca.training import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
