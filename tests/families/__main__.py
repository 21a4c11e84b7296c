"""`python -m families [NAME ...]`: a first run on a tiny model of every family of causal language models.

Each is made from its config, saved, trained for three steps by what `paca train` runs with its defaults, and loaded
again. A family that can't be made so small is told and left out; one that ends in an error fails the run, unless it is
in `REFUSED`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console

from families.shrunk import FAMILIES, write_first_run
from paca.pretrained.generation import load_for_generation
from paca.training import load_run_config, train

REFUSED = {
    r"It is an encoder": "encoders, as language models",
    r"cannot be loaded: Unrecognized configuration class": "the text part of a larger model, saved by itself",
    r"merged, unmerged or loaded between forward": "RWKV divides its weights where it is evaluated",
}
"""What an error says that is by design, and of what."""
SECONDS = 120.0


def first_run(family: str, folder: Path) -> str:
    """Train one; what came of it, in words that begin with `trained`, `not made` or an error's name."""
    try:
        config = write_first_run(family, folder)
    except Exception as error:  # whatever a config that is not meant to be small raises
        return f"not made: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    summary = train(load_run_config(config), console=Console(quiet=True)).summary
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    if not after < before:
        raise AssertionError(f"the held-out loss went from {before:.4f} to {after:.4f}")
    model = load_for_generation(folder / "run").model
    return f"trained: {before:.3f} to {after:.3f}, {model.num_parameters():,} parameters"


def in_a_process(family: str) -> str:
    """The same in a fork, which may end in any way, or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.txt")
        process = os.fork()
        if not process:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            try:
                told.write_text(first_run(family, Path(folder)))
            except BaseException as error:
                told.write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            os._exit(0)
        until = time.monotonic() + SECONDS
        while os.waitpid(process, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                os.kill(process, 9)
                os.waitpid(process, 0)
                return f"not made: not within {SECONDS:.0f} s"
            time.sleep(0.05)
        return told.read_text() if told.exists() else "died: the process ended"


def main() -> int:
    """Run them; 0 if all that could be made trained, or were refused by design."""
    torch.set_num_threads(1)
    counts = {"trained": 0, "refused": 0, "not made": 0, "failed": 0}
    for family in sys.argv[1:] or FAMILIES:
        told = in_a_process(family)
        kind = told.partition(":")[0]
        if kind not in counts:
            why = next((of for said, of in REFUSED.items() if re.search(said, told)), None)
            kind, told = ("failed", told) if why is None else ("refused", f"refused: {why}")
        counts[kind] += 1
        print(f"{family:<28} {told if kind == 'failed' else told.splitlines()[0][:150]}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
