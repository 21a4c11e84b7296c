"""What the wheel requires, without extras, is all that paca imports: a run trains where nothing else is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import paca
from training.tiny_run import save_workspace

SOURCE = Path(paca.__file__).parents[1]
OF_EXTRAS = {"lm_eval", "gradio"}
"""What modules of `evaluate` and `runs` import at their beginning."""

PROGRAM = """
import importlib, json, pkgutil, sys
sys.path += [{packages!r}, {source!r}]
import paca
missing = []
for module in pkgutil.walk_packages(paca.__path__, "paca."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing.append(error.name)
with open({told!r}, "w") as file:
    json.dump(missing, file)
from paca_command import main
sys.argv = ["paca", "train", {config!r}, "--set", "train.max_steps=2"]
main()
"""


def required() -> set[str]:
    """The distributions that paca requires, and those that these require, by name."""
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: set[tuple[str, str]] = set()
    left = [(Requirement(line).name, "") for line in project["dependencies"]]
    while left:
        name, extra = left.pop()
        if (name, extra) in found:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # for another system
            continue
        found.add((name, extra))
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(requirement.name, extra) for extra in ("", *requirement.extras)]
    return {name for name, _ in found}


@pytest.mark.slow(reason="trains where nothing else is installed")
def test_a_run_trains_where_only_what_is_required_is_installed(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in {"paca-tuning", *required()}:  # itself for its version
        one = distribution(name)
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists() and not top.endswith(".pth"):
                (packages / top).symlink_to(one.locate_file(top))
    save_workspace(tmp_path)
    places = {"packages": str(packages), "source": str(SOURCE), "told": str(tmp_path / "missing.json")}
    program = PROGRAM.format(**places, config=str(tmp_path / "config.yaml"))
    command = [sys.executable, "-S", "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert set(json.loads((tmp_path / "missing.json").read_text())) == OF_EXTRAS
    assert done.returncode == 0, done.stderr
    assert "adapter" in done.stdout
