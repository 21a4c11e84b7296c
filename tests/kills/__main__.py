"""`python -m kills`: kill runs, merges and exports until a number of kills is reached; print what was killed where."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch

from kills.jobs import RUNS, Chances, KilledRun, outputs
from training.tiny_run import save_workspace


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(prog="python -m kills", description=__doc__)
    options.add_argument("--count", type=int, default=200, help="how many kills")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=60, help="stop after so long, whatever was reached")
    asked = options.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * asked.minutes
    chances = Chances(asked.seed, timed=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        datasets.config.HF_DATASETS_CACHE = folder / "datasets-cache"
        config = save_workspace(folder)
        runs = [KilledRun(config, folder / name, name, chances, counts) for name in RUNS]
        written = outputs(runs[0].whole, folder / "outputs", chances, counts)
        done = resumed = turn = 0
        while done < asked.count and time.monotonic() < end:
            done += runs[turn % len(runs)].kill_until_done(4)
            resumed += 1
            done += sum(job.kill() for job in written[: 1 + turn % len(written)])
            turn += 1
            print(f"{done} kills, {resumed} runs resumed to the same bits", file=sys.stderr, flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:5} {name}")
    print(f"{done} kills; {resumed} runs and {written and turn} rounds of outputs ended as the uninterrupted ones")


if __name__ == "__main__":
    main()
