"""How torch's threads wait for each other: set in the environment, which OpenMP reads when torch is imported."""

from __future__ import annotations

import os

SPIN_COUNT = "10000"


def let_waiting_threads_sleep() -> None:
    """Make a thread that waits for another spin only for a moment, unless the user has said how it shall wait.

    By default it spins so long that on a machine with other work it takes the core from the thread it waits for.
    Measured on 2 cores, 10 blocks of SmolLM2's shape, 4 x 140 tokens, bfloat16, with the default, with this count and
    with OMP_WAIT_POLICY=PASSIVE: a training step of 598, 590 and 703 ms on a free machine (a token 17.6, 19.6, 24 ms);
    at a load of 7, 10 steps did not end within 40 s, and took 1.2 and 1.5 to 2.3 s each (docs/notes/demo-tuning.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
