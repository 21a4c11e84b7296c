"""Where a row comes from: code, machine, versions, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import paca
from paca.training.summary import command_line, hardware, now

_PACKAGES = (
    "paca-tuning",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
    "triton",
)


def provenance(device: torch.device) -> dict[str, str]:
    """The columns that every row of a run shares."""
    machine = hardware(device)
    return {
        "date": now(),
        **_code_state(Path(paca.__file__).parent),
        "machine": f"{machine['cpu']}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "device": machine.get("device_name", machine["device"]),
        "threads": str(machine["torch_threads"]),
        "versions": json.dumps(_versions()),
        "command": command_line(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one; its absence is what the row then says
    return found


def _code_state(package: Path) -> dict[str, str]:
    """The commit, and whether the package's code differs from it; rows and plots that a benchmark wrote don't count."""
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:  # an installed copy
        return {"commit": "", "dirty": ""}
    return {"commit": commit, "dirty": str(bool(_git(package, "status", "--porcelain", "--", "."))).lower()}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
