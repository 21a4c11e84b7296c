"""Install a wheel where nothing else is, with each Python that is here, and use it. `make wheel` and `make release`.

python tools/try_wheel.py WHEEL            # what it needs can be had; the program runs. A minute
python tools/try_wheel.py WHEEL --train    # all is installed, and a tiny model is trained. Gigabytes, removed again
python tools/try_wheel.py WHEEL --lowest   # the same once with the lowest versions it allows, and with tests
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
MINORS = (11, 12, 13)
PROGRAM_ALONE = ("typer", "rich", "safetensors")
"""What the program needs until a command begins its work."""
EXTRAS = (
    "gguf", "bitsandbytes", "torchao", "hqq", "vision", "tensorboard", "trackio", "wandb", "runs", "evaluate",
)  # fmt: skip
TESTS = (
    *(f"tests/training/test_{name}.py" for name in ("run", "loss_memory", "packed_samples", "quantized_run")),
    *(f"tests/tuner/test_{name}.py" for name in ("adapter_names", "tuner", "hotswap_kinds", "hotswap")),
    *(f"tests/layers/test_{name}.py" for name in ("linear", "overlaid")),
)
OF_THEIR_TIME = "dill<0.4.1\nfsspec<2026.3\nhuggingface-hub<2\nscikit-learn<1.8\nnumpy<2.3\n"
"""What our dependencies need: newer ones don't go with the lowest versions that we allow of `datasets` and `scipy`."""
WORKSPACE = "from pathlib import Path; from training.tiny_run import save_workspace; save_workspace(Path.cwd())"
WHERE = "import paca, torch, transformers, trl, peft; print(paca.__file__); print(torch.__version__)"


class Trial:
    """A virtual environment with the wheel in it, in a folder that is removed afterwards."""

    def __init__(self, python: Path, wheel: Path, folder: Path) -> None:
        self.wheel, self.folder = wheel, folder
        self._uv(["venv", "--quiet", "--python", str(python), str(folder / "venv")])

    def install(self, *words: str) -> str:
        """Install with uv's words; what it says is returned."""
        python = self.folder / "venv" / "bin" / "python"
        return self._uv(["pip", "install", "--python", str(python), *words])

    def run(self, program: str, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a program of the environment; what it prints is returned.

        Raises:
            SystemExit: It failed.
        """
        return _run([str(self.folder / "venv" / "bin" / program), *words], cwd or self.folder, environment)

    def train(self) -> None:
        """Import paca, train a tiny model two steps, merge it, and print what was installed."""
        place, torch = self.run("python", "-c", WHERE).split()
        if not Path(place).is_relative_to(self.folder):
            sys.exit(f"paca was imported from {place}, which is not the wheel.")
        self.run("python", "-c", WORKSPACE, PYTHONPATH=str(ROOT / "tests"))
        self.run("paca", "train", "config.yaml", "--set", "train.max_steps=2")
        self.run("paca", "merge", "run", "--output", "merged")
        size = sum(file.lstat().st_size for file in (self.folder / "venv").rglob("*") if not file.is_symlink())
        print(f"  imported, trained and merged with torch {torch}; {size / 1e9:.1f} GB installed", flush=True)

    def _uv(self, words: list[str]) -> str:
        return _run([sys.executable, "-m", "uv", "--no-config", *words], self.folder, {})


def _run(words: list[str], cwd: Path, environment: dict[str, str]) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    alone = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf-home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=cwd, env=inherited | alone | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}\nThat failed with exit status {done.returncode}.")
    return done.stdout + done.stderr


def pythons() -> dict[int, Path]:
    """One interpreter for each minor version of `MINORS` that is here: pyenv's, or what the path has."""
    found = {}
    for minor in MINORS:
        name = f"python3.{minor}"
        places = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/*/bin/{name}"))
        if on_path := shutil.which(name):
            places.append(Path(on_path))
        for place in places:
            # pyenv leaves a program of that name in the path for versions that are not active: it fails.
            if subprocess.run([place, "-c", ""], capture_output=True, check=False).returncode == 0:
                found[minor] = place
                break
    return found


def use_the_program(trial: Trial) -> None:
    """Everything it needs can be resolved, with every extra; the program runs, and all of its code compiles."""
    asked = trial.install("--dry-run", f"{trial.wheel}[{','.join(EXTRAS)}]")
    trial.install("--quiet", "--no-deps", str(trial.wheel))
    trial.install("--quiet", *PROGRAM_ALONE)
    print(f"  {trial.run('paca', '--version').strip()}; " + ", ".join(_versions(asked)), flush=True)
    trial.run("paca", "train", "--help")
    (package,) = (trial.folder / "venv").glob("lib/python*/site-packages/paca")
    trial.run("python", "-W", "error", "-m", "compileall", "-q", "-f", str(package))


def _versions(asked: str) -> list[str]:
    return re.findall(r"^ \+ ((?:torch|transformers|peft|trl)==\S+)", asked, re.MULTILINE)


def use_the_lowest(trial: Trial, tests: list[str]) -> None:
    """The lowest versions that the wheel and its extras allow, with a part of the tests."""
    constraints = trial.folder / "constraints.txt"
    constraints.write_text(OF_THEIR_TIME)
    lowest = ("--resolution", "lowest-direct", "--constraints", str(constraints))
    trial.install("--quiet", "--no-deps", str(trial.wheel))
    requirements = _requirements(trial)
    # One by one: what a wheel asks for is not direct to uv 0.13, which takes the newest then.
    said = trial.install(*lowest, *(f"{one.name}{one.specifier}" for one in requirements))
    direct, higher = _direct(requirements, dict(re.findall(r"(?m)^ \+ (\S+?)==(\S+)", said)))
    print("  " + ", ".join(direct), flush=True)
    if higher:
        sys.exit(f"The lowest that go together are {', '.join(higher)}: raise the bounds in pyproject.toml to these.")
    trial.train()
    trial.install("--quiet", "pytest", "hypothesis")
    print(trial.run("python", "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider", *tests, cwd=ROOT), flush=True)


def _requirements(trial: Trial) -> list[Requirement]:
    """What the installed wheel asks for, with its extras."""
    (metadata,) = (trial.folder / "venv").glob("lib/python*/site-packages/paca_tuning-*.dist-info")
    every = map(Requirement, Distribution.at(metadata).requires or ())
    extras = ("", *EXTRAS)
    return [one for one in every if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)]


def _direct(requirements: list[Requirement], installed: dict[str, str]) -> tuple[list[str], list[str]]:
    """What is asked for of the versions that were installed, and which of these are above the bound given."""
    direct, higher = [], []
    for requirement in requirements:
        version = installed.get(canonicalize_name(requirement.name))
        if version is None:
            continue
        direct.append(f"{requirement.name} {version}")
        if not any(Version(version) == Version(bound.version) for bound in requirement.specifier):
            higher.append(f"{requirement.name}>={version}")
    return direct, higher


def main() -> None:
    """Try the wheel."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--lowest", action="store_true")
    parser.add_argument("--minor", type=int, nargs="+", help="of Python 3; all that are here if left out")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="for --lowest")
    chosen = parser.parse_args()
    found = {minor: python for minor, python in pythons().items() if minor in (chosen.minor or MINORS)}
    if not found:
        sys.exit(f"None of Python 3.{', 3.'.join(map(str, chosen.minor or MINORS))} is here.")
    with tempfile.TemporaryDirectory(prefix="paca-wheel-") as folder:
        if chosen.train or chosen.lowest:
            os.environ.setdefault("UV_CACHE_DIR", str(Path(folder, "cache")))  # gigabytes: not to be kept
        for minor, python in found.items():
            print(f"Python 3.{minor} ({python}):", flush=True)
            place = Path(folder, f"3.{minor}")
            place.mkdir()
            trial = Trial(python, chosen.wheel.resolve(), place)
            if chosen.lowest:
                use_the_lowest(trial, list(chosen.tests))
                break  # the oldest Python is enough
            use_the_program(trial)
            if chosen.train:
                trial.install("--quiet", str(trial.wheel))
                trial.train()
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
