"""Threads that infer while another one trains. The long form of `layers/test_threads.py`:

PYTHONPATH=src:tests python -m distributed.threads
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field

import peft
import torch
from torch import Tensor, nn

import paca
from paca.layers import paca_layers


class Counting:
    """A model in which each step adds 8 to every output of every layer, so that each output says which step it saw.

    Inputs of ones, weights of zero, and 1 more in each of 8 columns by each step: the columns of a layer are all of one
    step, or its outputs differ.
    """

    def __init__(self, layers: int = 2, width: int = 16, out: int = 6) -> None:
        class Rows(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleList(nn.Linear(width, out, dtype=torch.float64) for _ in range(layers))

            def forward(self, x: Tensor) -> Tensor:
                return torch.stack([part(x) for part in self.parts])

        stock = Rows()
        for parameter in stock.parameters():
            nn.init.zeros_(parameter)
        config = {"target_modules": r"parts\.\d+", "r": 8, "paca_alpha": 8, "init_weights": True}
        self.model = peft.get_peft_model(stock, paca.PacaConfig(**config))
        self.model.add_adapter("other", paca.PacaConfig(**{**config, "init_weights": False}))
        self.model.set_adapter("default")
        self.deltas = [layer.paca_delta["default"] for layer in paca_layers(self.model)]
        self.optimizer = torch.optim.SGD(self.deltas, lr=1.0)
        self.x = torch.ones(1, width, dtype=torch.float64)

    def step(self) -> None:
        """Forward, backward and a step, which adds exactly one to each delta."""
        (-self.model(self.x)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def write_by_hand(self) -> None:
        """What the version counters show, and the next pass writes."""
        for delta in self.deltas:
            delta.add_(1)


def outputs_at_once(model: nn.Module, xs: list[Tensor], repeats: int = 1) -> list[Tensor]:
    """What as many threads as there are inputs get, which start at the same time; raises what one of them raised."""
    start, got, trouble = threading.Barrier(len(xs)), [torch.empty(0)] * len(xs), []

    def infer(number: int) -> None:
        try:
            with torch.no_grad():
                start.wait(30)
                for _ in range(repeats):
                    got[number] = model(xs[number])
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=infer, args=(number,)) for number in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if trouble:
        raise trouble[0]
    return got


@dataclass
class Outcome:
    """What threads saw that inferred while another one trained."""

    passes: int = 0
    steps_seen: set[float] = field(default_factory=set)
    mixed: int = 0
    """Passes in which outputs of one layer were of different steps."""
    between_layers: int = 0
    """Passes in which layers were of different steps; these may be."""
    trouble: list[BaseException] = field(default_factory=list)


def race(readers: int, steps: int, *, width: int = 16, out: int = 6, layers: int = 2) -> Outcome:
    """Let `readers` threads infer, with and without gradients, while this one takes `steps` steps."""
    training, outcome, done = Counting(layers, width, out), Outcome(), threading.Event()
    lock = threading.Lock()

    def infer(number: int) -> None:
        first = True
        try:
            while first or not done.is_set():
                first = False
                with torch.set_grad_enabled(number % 2 == 1):
                    y = training.model(training.x).detach()[:, 0]  # (layers, out)
                lowest, highest = y.amin(1), y.amax(1)
                with lock:
                    outcome.passes += 1
                    outcome.steps_seen.update(lowest.tolist())
                    outcome.mixed += int(not torch.equal(lowest, highest))
                    outcome.between_layers += int(bool((lowest != lowest[0]).any()))
        except BaseException as error:
            outcome.trouble.append(error)

    threads = [threading.Thread(target=infer, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(steps):
            training.step()
    except BaseException as error:
        outcome.trouble.append(error)
    done.set()
    for thread in threads:
        thread.join(60)
    with torch.no_grad():
        last = training.model(training.x)
    if not outcome.trouble and not bool((last == 8 * steps).all()):
        outcome.trouble.append(AssertionError(f"after {steps} steps the outputs are {last.unique().tolist()}"))
    return outcome


def main() -> int:
    """Run all, and print a table."""
    torch.set_num_threads(1)
    failed = 0
    print(f"{'layers':>24} {'readers':>7} {'steps':>6} {'passes':>7} {'seen':>5} {'between':>8} {'mixed':>6}  trouble")
    for layers, width, out in ((2, 16, 6), (8, 64, 257), (2, 512, 4001), (1, 16, 100_003)):
        for readers in (1, 8):
            steps = 400 if out < 1000 else 150
            o = race(readers, steps, width=width, out=out, layers=layers)
            failed += o.mixed + len(o.trouble)
            print(
                f"{f'{layers} of {out} x {width}':>24} {readers:7} {steps:6} {o.passes:7} {len(o.steps_seen):5} "
                f"{o.between_layers:8} {o.mixed:6}  {o.trouble or ''}",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
