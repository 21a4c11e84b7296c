"""Threads that infer while another one trains. The long form of `layers/test_threads.py`:

PYTHONPATH=src:tests python -m distributed.threads
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
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


def check_at_once(passes: list[Callable[[], Tensor]], repeats: int = 8) -> None:
    """Run each of `passes` in a thread of its own, again and again, and compare with what it gives alone, bit for bit.

    Every second thread records gradients, if this one does.
    """
    want, trouble, start = [run().detach() for run in passes], [], threading.Barrier(len(passes))
    assert len({str(result.tolist()) for result in want}) > 1, "all give the same alone"
    gradients = torch.is_grad_enabled()

    def again(number: int) -> None:
        try:
            start.wait(30)
            with torch.set_grad_enabled(gradients and number % 2 == 0):
                wrong = sum(not torch.equal(passes[number]().detach(), want[number]) for _ in range(repeats))
            if wrong:
                trouble.append(f"{wrong} of {repeats} passes of thread {number} are wrong")
        except BaseException as error:
            trouble.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=again, args=(number,)) for number in range(len(passes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not trouble
    assert all(torch.equal(run().detach(), w) for run, w in zip(passes, want, strict=True))


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


@torch.no_grad()
def beside_mixed_batches(repeats: int) -> None:
    """4 threads of ordinary passes and 4 of mixed batches of a tiny Llama. Raises if a pass is not what it is alone."""
    from models import adapt, llama, tokens

    model, ids = adapt(llama(), task_type="CAUSAL_LM"), tokens(3, 4)
    model.add_adapter("small", paca.PacaConfig(r=1, init_weights=False, random_seed=1))
    model.eval()
    mixed = (["small", "__base__", "default"], ["default", "small", "__base__"], ["default"] * 3, ["small"] * 3)
    passes = [{}] * 4 + [{"adapter_names": names} for names in mixed]
    check_at_once([lambda names=names: model(input_ids=ids, **names).logits for names in passes], repeats)


def main() -> int:
    """Run all, and print a table."""
    torch.set_num_threads(1)
    beside_mixed_batches(1000)
    print("4 threads of 1,000 ordinary passes beside 4 of 1,000 mixed batches: each pass is what it is alone")
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
