"""Whether a config still describes the run that it is to continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.training.run_config import RunConfig
from paca.training.strict_yaml import read_yaml

_FREE_TO_CHANGE = {
    "output.dir",  # a run folder may be moved
    "output.overwrite",
    "train.report_to",
    "train.run_name",
    "train.save_total_limit",
    "train.dataloader_num_workers",
    "train.dataloader_pin_memory",
}
"""Keys that change neither the weights nor which steps are logged, evaluated and saved."""


def check_same_run(recorded: Path, config: RunConfig) -> None:
    """Refuse to continue a run under other settings than it began with.

    Args:
        recorded: ``config.yaml`` of the run folder.
        config: The resolved config of now.

    Raises:
        PacaError: Names each key that differs, with both values.
    """
    before, now = _flat(read_yaml(recorded)[0]), _flat(config.as_dict())
    changed = sorted(
        key for key in before.keys() | now.keys() if key not in _FREE_TO_CHANGE and before.get(key) != now.get(key)
    )
    if not changed:
        return
    lines = "\n".join(f"  {key}: {before.get(key)!r} → {now.get(key)!r}" for key in changed)
    raise PacaError(
        f"The settings differ from those that the run in {recorded.parent} began with:\n{lines}\n"
        f"To continue it, use its own config ({recorded}); to train with the new settings, give another output.dir."
    )


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
