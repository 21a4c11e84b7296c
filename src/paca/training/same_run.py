"""Whether a config, and what it names, are still those of the run that is to be continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from paca.data import Examples
from paca.messages.errors import PacaError
from paca.training.run_config import RunConfig
from paca.training.run_folder import RunFolder
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


def check_same_run(folder: RunFolder, config: RunConfig, inputs: dict[str, str]) -> None:
    """Refuse to continue a run under other settings, on other data or with another template than it began with.

    Args:
        folder: Of the run.
        config: The resolved config of now.
        inputs: From `inputs_of`, of now.

    Raises:
        PacaError: Names each key that differs, with both values, or with the file whose content does.
    """
    recorded = folder.config
    before, now = _flat(read_yaml(recorded)[0]), _flat(config.as_dict())
    changed = sorted(
        key for key in before.keys() | now.keys() if key not in _FREE_TO_CHANGE and before.get(key) != now.get(key)
    )
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r} → {now.get(key)!r}" for key in changed)
        raise PacaError(
            f"The settings differ from those that the run in {folder.path} began with:\n{lines}\n"
            f"To continue it, use its own config ({recorded}); to train with the new settings, give another output.dir."
        )
    contents = json.loads(folder.inputs.read_text(encoding="utf-8")) if folder.inputs.is_file() else {}
    files = [f"{key} ({now[key]})" for key, content in contents.items() if content != inputs.get(key)]
    if files:
        raise PacaError(
            f"The content of {' and '.join(files)} is no longer what the run in {folder.path} began with. Restore it "
            "to continue the run; to train with the new content, give another output.dir."
        )


def inputs_of(config: RunConfig, train: Examples, held_out: Examples | None) -> dict[str, str]:
    """A hash of the content of each key that names data or a template file.

    Args:
        config: Of the run.
        train: Its training data, as read.
        held_out: Its held-out data.
    """
    data, found = config.data, {"data.train": train.content()}
    if held_out is not None:
        key = "data.eval" if isinstance(data.eval, str) else "data.train"
        found[key] = found.get(key, "") + held_out.content()
    if data.template is not None and Path(data.template).is_file():
        found["data.template"] = xxhash.xxh128_hexdigest(Path(data.template).read_bytes())
    return found


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
