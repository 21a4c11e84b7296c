"""`paca train` under each file of `recipes/launch`, in two processes, against one process; then resumed.

PYTHONPATH=src:tests python -m distributed.launched_runs [KIND ...]

The processes are forks that get what accelerate's launcher reads from the file. DeepSpeed is run where it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distributed.as_accelerators import shard_on_cpus
from distributed.launches import ROOT, from_file
from forked_process import FORKS
from paca.training import load_run_config, train
from paca.training.reporting import report
from training.tiny_run import adapter, place_of_curve, place_of_curves, save_workspace

SETTINGS = ["train.max_steps=4", "train.save_steps=2"]
BOUND = 1e-3
"""How far a delta may be from one process's, as a part of the largest: all is in float32, and Adam divides by small
gradients."""


def run(config: Path, settings: list[str], output: Path, resume: bool) -> None:
    """One process of a run; what it says goes beside its folder."""
    report.curve, report.loss_curves = place_of_curve, place_of_curves
    torch.set_num_threads(1)
    with open(f"{output}-{os.environ.get('RANK', 'alone')}.txt", "w") as file:
        try:
            given = load_run_config(config, [*SETTINGS, *settings, f"output.dir={output}"])
            train(given, resume=resume, console=Console(file=file, width=300))
        except BaseException:
            traceback.print_exc(file=file)


def run_launched(made: dict[str, str], *arguments: Any) -> None:
    """One process of a run as accelerate's launcher starts it."""
    os.environ.update(made)
    if "ACCELERATE_USE_DEEPSPEED" in made:
        from deepspeed import comm

        comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    else:
        torch.distributed.init_process_group("gloo")
    if "ACCELERATE_USE_DEEPSPEED" in made or "ACCELERATE_USE_FSDP" in made:
        shard_on_cpus()
    run(*arguments)


def in_two(kind: str, config: Path, output: Path, resume: bool = False) -> None:
    """A run in two processes, with half of the batch in each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = {**from_file(kind, 2), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in map(str, range(2)):
        mine = {**made, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        settings = ["train.per_device_train_batch_size=2"]
        processes.append(FORKS.Process(target=run_launched, args=(mine, config, settings, output, resume)))
        processes[-1].start()
    for process in processes:
        process.join()


def difference(one: Path, other: Path) -> float:
    """The largest one of a delta's values, as a part of its largest value."""
    first, second = adapter(one), adapter(other)
    if first.keys() != second.keys():
        raise AssertionError(f"other tensors: {sorted(first.keys() ^ second.keys())[:3]}")
    return max(float((value - second[name]).abs().max() / value.abs().max()) for name, value in first.items())


def look_at(kind: str, config: Path, folder: Path) -> str:
    """What came of one kind, in words."""
    whole, again = folder / kind, folder / f"{kind}-again"
    try:
        in_two(kind, config, whole)
        far = difference(folder / "one", whole)
        shutil.copytree(whole, again)
        for part in ("adapter", "checkpoints/checkpoint-4"):
            shutil.rmtree(again / part)
        (again / "summary.json").unlink()
        in_two(kind, config, again, resume=True)
        resumed = difference(whole, again)
    except Exception as error:
        said = "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob(f"{kind}*.txt")))
        return f"failed: {error}\n{said}"
    verdict = "ok" if far <= BOUND and resumed <= BOUND else "failed"
    return f"{verdict}: {far:.1e} from one process; resumed after step 2: {resumed:.1e} from not stopped"


def main() -> int:
    """Run all, and print a line for each."""
    kinds = sys.argv[1:] or sorted(path.stem for path in (ROOT / "recipes/launch").glob("*.yaml"))
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = save_workspace(folder)
        model = folder / "model" / "config.json"  # of what is dropped out each process draws its own
        model.write_text(model.read_text().replace('"attention_dropout": 0.2', '"attention_dropout": 0.0'))
        alone = FORKS.Process(target=run, args=(config, ["train.per_device_train_batch_size=4"], folder / "one", False))
        alone.start()
        alone.join()
        for kind in kinds:
            if kind.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
                print(f"{kind}: not run, DeepSpeed is not installed")
                continue
            found = look_at(kind, config, folder)
            failed += not found.startswith("ok")
            print(f"{kind:16} {found}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    FORKS.set_forkserver_preload(["distributed.launched_runs"])  # in place of what tests need
    sys.exit(main())
