"""Run many cases, each of them a stranger's adapter: `python -m hostile_adapters --cases 10000 --seed 0`.

The cases run in a process of their own. One that crashes, or that does not end, is noted, and another
process goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

LONGEST = 5.0
"""Seconds of processor time for a case."""
PATIENCE = 900.0
"""Seconds on the clock: the machine may be busy with other work, or stop this one for a while."""


def work(seed: int, first: int, last: int) -> None:
    """Run the cases and write a line for each."""
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    from hostile_adapters.case import World

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        print(json.dumps("ready"), file=results, flush=True)
        for number in range(first, last):
            print(json.dumps(world.run(seed, number)), file=results, flush=True)


def main() -> int:
    """Run all cases, print what came of them, and return how many went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Stop after these.")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(given.seed, given.first, given.work)
        return 0
    counts: Counter[tuple[str, str]] = Counter()
    wrong, slowest, number, end = 0, 0.0, given.first, time.monotonic() + 60 * given.minutes
    last = given.first + given.cases
    while number < last and time.monotonic() < end:
        command = [sys.executable, "-m", "hostile_adapters", f"--seed={given.seed}", f"--first={number}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0", "HF_HUB_OFFLINE": "0"}
        process = subprocess.Popen(
            [*command, f"--work={last}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
        )
        assert process.stdout is not None
        waiting = b""
        while time.monotonic() < end:
            if not select.select([process.stdout], [], [], PATIENCE)[0]:
                line = b""
                reason = f"no end within {PATIENCE:.0f} s"
            else:
                line = os.read(process.stdout.fileno(), 2**20)
                reason = f"the process ended with {process.poll()}"
            if not line:
                if number < last:
                    wrong += 1
                    counts["?", reason] += 1
                    print(f"{number}: {reason}", flush=True)
                    number += 1
                break
            *lines, waiting = (waiting + line).split(b"\n")
            for one in map(json.loads, lines):
                if one == "ready":
                    continue
                way, outcome, right, seconds, told = one
                slow = seconds > LONGEST
                counts[way, "took too long" if slow else outcome] += 1
                slowest = max(slowest, seconds)
                if slow or not right:
                    wrong += 1
                    print(f"{number}: {way}: {outcome}, {seconds:.1f} s. {told[:600]!r}", flush=True)
                number += 1
        process.kill()
        process.wait()
    for (way, outcome), count in sorted(counts.items()):
        print(f"{count:6} {way}: {outcome}")
    print(f"{number - given.first} cases of seed {given.seed}, {wrong} wrong; the slowest took {slowest:.1f} s.")
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main())
