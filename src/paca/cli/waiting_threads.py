"""How torch's threads wait for each other: set in the environment, which OpenMP reads when torch is imported."""

from __future__ import annotations

import os

ON_A_FREE_MACHINE, ON_A_BUSY_ONE = "50000", "10000"


def let_waiting_threads_sleep() -> None:
    """Make a thread that waits for another spin only for a moment, unless the user has said how it shall wait.

    By default it spins so long that on a machine with other work it takes the core from the thread it waits for. Where
    cores are free, spinning longer bridges the Python between two products. Measured on 2 cores with the default, with
    50,000, with 10,000 and with OMP_WAIT_POLICY=PASSIVE (10 blocks of SmolLM2's shape, 4 x 140 tokens, bfloat16): a
    training step of 598, 576, 590 and 703 ms on a free machine; at a load of 7, 10 steps did not end within 40 s with
    the default, and took 1.2 s each with 10,000 (docs/notes/demo-tuning.md, with more counts).
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = ON_A_FREE_MACHINE if _is_free() else ON_A_BUSY_ONE


def _is_free() -> bool:
    """Whether less than half of the cores had work within the last minute, as far as the system says."""
    try:
        return os.getloadavg()[0] < (os.cpu_count() or 1) / 2
    except (AttributeError, OSError):  # not on Windows
        return False
