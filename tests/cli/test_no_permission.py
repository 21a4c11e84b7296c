"""Folders and files that the user may not write or read, on a real file system: one line says what and where."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from forked_process import run_forked
from paca.training import RunResult
from training.conftest import bare_runs, config_file, finished  # noqa: F401 - fixtures

# All in one process, which loads the libraries once.
PROGRAM = """
import contextlib, io, json, sys
from no_privileges import give_up_privileges
give_up_privileges()
from paca_command import main
told = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["paca", *words.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
    told.append((status, errors.getvalue()))
print(json.dumps(told))
"""


def test_what_may_not_be_written_or_read_is_one_line(
    config_file: Path,  # noqa: F811
    finished: Callable[..., RunResult],  # noqa: F811
    tmp_path: Path,
) -> None:
    run, resumed, shut = tmp_path / "run", tmp_path / "resumed", tmp_path / "shut"
    for copy in (run, resumed):
        shutil.copytree(finished("train.save_steps=4").folder, copy)
    for part in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(resumed / part)
    (resumed / "summary.json").unlink()
    shut.mkdir()
    half, unread = tmp_path / "half", tmp_path / "unread"
    for copy in (half, unread):
        shutil.copytree(run / "adapter", copy)
    weights = half / "adapter_model.safetensors"
    here = "could not be opened or written: permission denied"
    cases = {
        f"train {config_file} --set output.dir={shut}/run": rf"The run folder {shut}/run \(output.dir\) can't",
        f"train {config_file} --set output.dir={resumed} --set train.save_steps=4 --resume": (
            rf"{resumed}/checkpoints/\S+ {here}\. .* checkpoint-4"
        ),
        f"merge {run} --output {shut}/merged": f"{shut} cannot be written to: .*Permission denied",
        f"export {run} --to lora --output {shut}/lora": f"{shut} cannot be written to: .*Permission denied",
        f"evaluate {run} --output {shut}/results": f"{shut}/results {here}",
        f"push {unread} --to me/x": rf"{unread}/\S+ {here}",
        f"merge {half} --output {tmp_path}/merged": f"{weights} {here}",
        f"export {half} --to lora --output {tmp_path}/lora": f"{weights} {here}",
    }
    modes = {shut: 0o555, resumed / "checkpoints": 0o555, unread: 0, weights: 0}
    for path, mode in modes.items():
        path.chmod(mode)
    try:
        done = run_forked(PROGRAM, json.dumps([*cases]))
    finally:
        for path in modes:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    for (status, said), (words, message) in zip(json.loads(done.stdout), cases.items(), strict=True):
        assert (status, said.count("\n")) == (1, 1), (words, said)
        assert re.match(f"Error: {message}", said), (words, said)
    assert not any(shut.iterdir())
