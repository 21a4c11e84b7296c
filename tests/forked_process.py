"""Runs a program in a process of its own, forked from one that has the large libraries in memory: 5 s sooner.

It has its own streams, signals and exit status, and it has not imported paca yet. What libraries print while they are
imported, and whether a program imports them at all, only a process started from nothing shows.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "torch", "transformers.modeling_utils", "accelerate", "bitsandbytes", "datasets", "matplotlib.figure", "pandas",
    "peft", "requests", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.grpo_trainer",
])  # fmt: skip


def run_forked(
    program: str, *arguments: object, typed: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `typed` is what standard input holds."""
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder)
        process = start_forked(program, *arguments, streams=streams, typed=typed, cwd=cwd)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} did not end; it wrote {(streams / 'stderr').read_text()}")
        # Bytes first: a tiny model's answers are random bytes, which text mode would translate.
        output, errors = ((streams / name).read_bytes().decode() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([*map(str, arguments)], process.exitcode, output, errors)


def start_forked(
    program: str, *arguments: object, streams: Path, typed: str = "", cwd: Path | None = None
) -> BaseProcess:
    """Leave it running; its `stdin`, `stdout` and `stderr` are files of the folder `streams`."""
    (streams / "stdin").write_text(typed)
    words = [*map(str, arguments)]
    process = FORKS.Process(target=_run, args=(program, words, streams, cwd or Path.cwd(), dict(os.environ)))
    process.daemon = True
    process.start()
    return process


def _run(program: str, arguments: list[str], streams: Path, cwd: Path, environment: dict[str, str]) -> None:
    gc.freeze()  # so that collecting neither walks through what the server imported nor copies its pages
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        with open(streams / name, mode) as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    # What these read from the environment when they were imported.
    import datasets
    import torch

    torch.set_num_threads(1)
    if "HF_DATASETS_CACHE" in environment:
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
