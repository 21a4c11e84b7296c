"""The wheel holds what the code needs and nothing else, and the program runs from it. The long form: `make release`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BUILD = "from hatchling.build import build_wheel; print(build_wheel('wheel'))"


def run(*words: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, with what lies beside the sources of one."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def files(checkout: Path) -> set[str]:
    """Of the sources, without what Python leaves among them."""
    found = (file for file in checkout.glob("src/**/*") if file.is_file() and file.parent.name != "__pycache__")
    return {file.relative_to(checkout / "src").as_posix() for file in found}


@pytest.fixture(scope="module")
def wheel(checkout: Path, files: set[str]) -> Path:
    return checkout / "wheel" / run(sys.executable, "-c", BUILD, cwd=checkout).split()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


def test_it_holds_the_files_of_the_sources_and_nothing_else(wheel: Path, files: set[str]) -> None:
    held = set(ZipFile(wheel).namelist())
    assert {name for name in held if ".dist-info/" not in name} == files
    assert "paca/py.typed" in files


def test_nothing_is_left_in_the_sources(wheel: Path, checkout: Path) -> None:
    """What setuptools left in build/ was in the next wheel again, modules that were gone included."""
    assert {entry.name for entry in checkout.iterdir()} == {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src",
        "tests",
        "wheel",
    }


def test_it_names_every_extra_with_what_it_installs(installed: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (metadata,) = installed.glob("*.dist-info")
    named: dict[str, set[str]] = {extra: set() for extra in extras}
    for line in Distribution.at(metadata).requires or ():
        if found := re.fullmatch(r"""(.*?) ?; extra == ["'](.*)["']""", line):
            named[found[2]].add(found[1])

    def packages_of(extra: str) -> set[str]:
        own = [Requirement(package) for package in extras[extra]]
        others = [packages_of(other) for one in own if one.name == "paca-tuning" for other in one.extras]
        return {str(one).lower() for one in own if one.name != "paca-tuning"}.union(*others)

    assert named == {extra: packages_of(extra) for extra in extras}


def test_the_program_runs_from_it_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    version = run(installed / "bin" / "paca", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    (metadata,) = installed.glob("*.dist-info")
    assert version == f"paca {Distribution.at(metadata).version}\n"
    where = "import paca_command as p; p.enter_package(); import paca.cli; print(p.__file__, paca.cli.__file__)"
    for place in run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(installed)).split():
        assert Path(place).is_relative_to(installed)
