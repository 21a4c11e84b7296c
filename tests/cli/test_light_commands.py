"""What a command can say without a model, it says before torch and the libraries around it are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "matplotlib")
RUN = f"""
import sys
from paca.cli import main
try:
    main()
finally:
    print("\\nimported:", [name for name in {HEAVY!r} if name in sys.modules])
"""
MODEL_AND_DATA = "model: {name: some/model}\ndata: {train: some/data}\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("command", ["", "train", "chat", "merge", "plan", "bench"])
def test_help_imports_nothing_heavy(command: str) -> None:
    done = run(*([command] if command else []), "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no file"),
        ("model: {name: some/model}\n", "data.train is missing"),
        (MODEL_AND_DATA + "trian: {seed: 1}\n", "there is no section 'trian'. Did you mean train?"),
        (MODEL_AND_DATA + "eval: {befor: true}\n", "there is no key eval.befor. Did you mean eval.before?"),
        (MODEL_AND_DATA + "paca: {ranc: 4}\n", "there is no key paca.ranc. The keys of paca are "),
        (MODEL_AND_DATA + "paca: {r: many}\n", "paca.r must be a whole number, not the text 'many'."),
        (MODEL_AND_DATA + "train: {learning_rat: 1}\n", "there is no key train.learning_rat. Did you mean"),
        (MODEL_AND_DATA + "train: {max_steps: 1.5}\n", "train.max_steps must be a whole number, not the number 1.5."),
        (MODEL_AND_DATA + "train: {optim: adamv}\n", "train.optim must be one of adamw_torch, "),
        (MODEL_AND_DATA + "train: {packing_strategy: best}\n", "must be one of bfd, bfd_split, wrapped, not the text"),
        (MODEL_AND_DATA + "train: {output_dir: x}\n", "train.output_dir can't be set here: the run folder is"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_heavy_is_imported(
    tmp_path: Path, text: str | None, message: str
) -> None:
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_text(text)
    done = run("train", str(config))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize("command", [["chat", "missing"], ["merge", "missing", "--output", "merged"]])
def test_a_missing_adapter_is_refused_before_anything_heavy_is_imported(command: list[str]) -> None:
    done = run(*command)
    assert done.returncode == 1
    assert "No such folder: missing." in done.stderr
    assert done.stdout.endswith("imported: []\n")
