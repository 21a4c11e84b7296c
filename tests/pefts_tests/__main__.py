"""`python -m pefts_tests`: PEFT's own tests, with PaCA in the place of LoRA.

Fetches the source of the installed PEFT from the package index, and what its tests import, into `.cache/`; makes tiny
models under the names that they take from the hub; and runs those that are parametrized with LoRA's config
(`pefts_tests.plugin`). Further arguments are pytest's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from pefts_tests.stand_ins import save_stand_ins

FILES = (
    "config",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "initialization",
    "low_level_api",
    "other",
    "seq_classifier",
    "target_parameters",
    "token_classification_qa",
)
"""Those of PEFT's files of tests that have some with LoRA's config as a parameter, and whose models are small."""
IMPORTED = ("diffusers", "parameterized", "importlib_metadata", "zipp")
"""What they import and paca does not need; without what these would bring along."""


def fetch(folder: Path) -> None:
    """Put PEFT's tests into `folder`, as the package `peft_tests`."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    print(f"Fetching PEFT's tests into {folder} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    wanted = f"peft=={version('peft')}"
    source = ["--no-deps", "--no-binary", "peft", "--no-build-isolation", "--dest", str(folder)]
    subprocess.run([*pip, "download", *source, wanted], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), *IMPORTED], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = next(folder.glob("peft-*/tests")).rename(folder / "peft_tests")
    (tests / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider\n")
    save_stand_ins(folder)


def main() -> int:
    """Run them; the exit status is pytest's."""
    folder = Path(".cache/pefts-tests", version("peft")).absolute()
    if not (folder / "pytest.ini").is_file():
        fetch(folder)
    here = Path(__file__).parent.parent
    paths = [str(folder), str(folder / "site"), str(here), str(here.parent / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    plugins = ["-p", "pefts_tests.plugin", "-p", "no:warnings", "--tb=line", "-rfX"]
    chosen = [argument for argument in sys.argv[1:] if argument.endswith(".py") or ".py::" in argument]
    files = [] if chosen else [f"peft_tests/test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", *plugins, *files, *sys.argv[1:]]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
