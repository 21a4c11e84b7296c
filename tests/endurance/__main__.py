"""`python -m endurance`: train twice for 2,000 steps, look at every weight after every step, and compare the hashes."""

from __future__ import annotations

import argparse

import torch

from endurance.steps import train_and_look


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(prog="python -m endurance", description=__doc__)
    options.add_argument("--steps", type=int, default=2000)
    steps = options.parse_args().steps
    torch.set_num_threads(1)
    first, second = train_and_look(steps), train_and_look(steps)
    for found in (first, second):
        process = ", ".join(f"{size / 2**20:.1f}" for size in found.process_bytes)
        print(f"{steps} steps, {found.layers} layers equal to their deltas after each; hash {found.hash[:16]}")
        print(f"  live tensors, bytes: {sorted(set(found.tensor_bytes))}; process, MiB: {process}")
        assert len(set(found.tensor_bytes)) == 1
    assert first.hash == second.hash


if __name__ == "__main__":
    main()
