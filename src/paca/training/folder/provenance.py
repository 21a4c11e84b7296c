"""Where a number comes from: the code, the machine, the versions, the command, the time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "paca-tuning",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "bitsandbytes",
    "torchao",
    "hqq",
    "liger-kernel",
    "triton",
)
_PACKAGE = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers; one that is not installed has none."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with the build, which the package's own number may lack


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine: operating system, CPU, cores that torch uses, and the accelerator."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
        found["device_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def git_state(folder: Path, *, only_inside: bool = False) -> dict[str, Any] | None:
    """Commit of the repository that `folder` is in, and whether files differ from it; None outside of one.

    Args:
        folder: Any folder of the repository.
        only_inside: Whether only the files of `folder` count, new ones as well, instead of all that git tracks.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    counted = ("--", ".") if only_inside else ("--untracked-files=no",)
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", *counted))}


def code_state() -> dict[str, Any] | None:
    """Commit of the repository that this package's files lie in, and whether they differ; None of an installed copy."""
    return git_state(_PACKAGE, only_inside=True)


def command_line() -> str:
    """The command of this process, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def row_provenance(device: torch.device) -> dict[str, str]:
    """The columns that all rows of one measurement share.

    What differs from the commit counts within the package only: rows and plots that a benchmark wrote don't.
    """
    machine, code = hardware(device), code_state()
    return {
        "date": now(),
        "commit": code["commit"] if code else "",  # none in an installed copy
        "dirty": str(code["dirty"]).lower() if code else "",
        "machine": f"{machine['cpu']}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "device": machine.get("device_name", machine["device"]),
        "threads": str(machine["torch_threads"]),
        "versions": json.dumps(versions()),
        "command": command_line(),
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a repository on a dead disk
        return None
    return done.stdout.strip() if done.returncode == 0 else None
