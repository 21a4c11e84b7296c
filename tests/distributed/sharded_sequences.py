"""Operations in any order on a model that FSDP2 shards, beside the same model in one process that sees whole batches.

PYTHONPATH=src:tests python -m distributed.sharded_sequences --sequences 500 --processes 4 [--seed N] [--compiled 0.05]

A sequence is drawn by its number alone: the parts that are sharded, whether they are gathered again for the backward
pass, offloading, replicas, checkpointing, the optimizer, the columns of two adapters, and the operations. All processes
draw the same one, and compare losses, outputs, gradients and weights, all in float64.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

import paca
from distributed import sharded_scenarios as scenarios
from distributed.sharded_scenarios import averaged, check_gradients, check_state, loss_of, mesh, mine, sharded, whole
from forked_process import FORKS
from models import adapt, llama
from paca.layers import paca_layers

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda deltas: torch.optim.AdamW(deltas, lr=0.02, foreach=False),
    "AdamW, foreach": lambda deltas: torch.optim.AdamW(deltas, lr=0.02, foreach=True),
    "AdamW, fused": lambda deltas: torch.optim.AdamW(deltas, lr=0.02, fused=True),
    "SGD with momentum": lambda deltas: torch.optim.SGD(deltas, lr=0.5, momentum=0.9),
}
ADAPTERS = ["default", "other"]
LAYERS = ["q_proj", "o_proj", "down_proj"]
COUNTS: Counter[str] = Counter()
"""What this process did."""


class Both:
    """The two models, and what can be done to them; each operation compares them."""

    def __init__(self, number: int, compiled: float) -> None:
        self.draw, self.number, self.batches = random.Random(number), number, 0
        draw = self.draw.choice
        parts = draw(["blocks", "root", "layers"])
        settings: dict[str, Any] = {}
        gathered = draw([None, None, True, False])
        if gathered is not None:
            settings["reshard_after_forward"] = gathered
        if draw([True, False, False]):
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if dist.get_world_size() == 4 and draw([True, False, False]):
            settings["mesh"] = mesh(2, 2)
        checkpointing = draw([None, None, "reentrant", "not reentrant"])
        targets = LAYERS if parts == "layers" else [*LAYERS, "embed_tokens", "lm_head"]
        others = draw([targets, ["q_proj", "v_proj"]])
        optimizer = draw(list(OPTIMIZERS))
        is_compiled = self.draw.random() < compiled
        self.alone = self._model(targets, others, checkpointing)
        self.together = sharded(self._model(targets, others, checkpointing), parts, **settings)
        if is_compiled:
            for block in self.together.get_base_model().model.layers:
                block.compile(backend="aot_eager")
        self.models = (self.alone, self.together)
        self.optimizers = [
            OPTIMIZERS[optimizer]([p for name, p in model.named_parameters() if "paca_delta" in name])
            for model in self.models
        ]
        self.active, self.merged = ["default"], False
        self.held: list[dict[str, Any]] = []  # state dicts
        state = self.alone.state_dict()
        self.pretrained = {name: value.clone() for name, value in state.items() if "base_layer" in name}
        self.log = [f"{parts}, {settings}, checkpointing {checkpointing}, {optimizer}, compiled {is_compiled}", ""]

    @staticmethod
    def _model(targets: list[str], others: list[str], checkpointing: str | None) -> Any:
        model = adapt(llama().double(), target_modules=targets)
        model.add_adapter(
            "other", paca.PacaConfig(r=5, paca_alpha=3, init_weights=False, random_seed=3, target_modules=others)
        )
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        return model.train()

    def run(self) -> None:
        """Up to 14 operations."""
        for _ in range(self.draw.randint(4, 14)):
            name = self.draw.choice(OPERATIONS)
            if self.merged and name not in WHILE_MERGED:
                name = "unmerge"
            COUNTS[name] += 1
            self.log[-1] += f"{name}; "
            getattr(self, name)()
            for held in self.held:  # before anything parks
                for weight, value in held.items():
                    assert torch.equal(whole(value), self.pretrained[weight]), f"{weight} of a held state dict"
        if self.merged:
            self.unmerge()
        self.forward()
        check_state(*self.models)

    def batch(self) -> torch.Tensor:
        self.batches += 1
        return scenarios.batch(100 * self.number + self.batches)

    def each(self, ids: torch.Tensor) -> tuple[tuple[Any, torch.Tensor], ...]:
        """Each model with its part of the batch; either may come first."""
        both = ((self.alone, ids), (self.together, mine(ids)))
        return both if self.draw.random() < 0.5 else both[::-1]

    def reshard(self) -> None:
        """What a pass without gradients, or writing, needs after it (docs/guides/processes.md)."""
        for module in self.together.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def take_step(self) -> None:
        check_gradients(*self.models)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def forward(self) -> None:
        ids = self.batch()
        with torch.no_grad():
            outputs = {model: model(input_ids=ids).logits for model, _ in self.each(ids)}
        self.reshard()
        torch.testing.assert_close(outputs[self.together], outputs[self.alone], rtol=1e-8, atol=1e-10)

    # -- operations ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        losses = {}
        for model, ids in self.each(self.batch()):
            losses[model] = loss_of(model, ids)
            losses[model].backward()
        loss = averaged(losses[self.together].detach())
        torch.testing.assert_close(loss, losses[self.alone].detach(), rtol=1e-8, atol=1e-10)
        self.take_step()

    def accumulate(self) -> None:
        parts, always = self.draw.randint(2, 3), self.draw.random() < 0.5
        for part in range(parts):
            self.together.set_requires_gradient_sync(always or part == parts - 1)
            for model, ids in self.each(self.batch()):
                (loss_of(model, ids) / parts).backward()
        self.together.set_requires_gradient_sync(True)
        self.take_step()

    def evaluate(self) -> None:
        for model in self.models:
            model.eval()
        self.forward()
        for model in self.models:
            model.train()

    def disable(self) -> None:
        ids, outputs = self.batch(), {}
        for model, _ in self.each(ids):
            with torch.no_grad(), model.disable_adapter():
                outputs[model] = model(input_ids=ids).logits
        self.reshard()
        torch.testing.assert_close(outputs[self.together], outputs[self.alone], rtol=1e-8, atol=1e-10)

    def reference_between(self) -> None:
        """As DPO does it."""
        for model, ids in self.each(self.batch()):
            policy = model(input_ids=ids).logits
            with torch.no_grad(), model.disable_adapter():
                reference = model(input_ids=ids).logits
            (policy - reference).square().mean().backward()
        self.take_step()

    def other_between(self) -> None:
        others = self._some_adapters()
        for model, ids in self.each(self.batch()):
            first = model(input_ids=ids).logits
            model.base_model.set_adapter(others, inference_mode=True)
            with torch.no_grad():
                second = model(input_ids=ids).logits
            model.base_model.set_adapter(self.active)
            (first - second).square().mean().backward()
        self.take_step()

    def switch(self) -> None:
        self.active = self._some_adapters()
        for model in self.models:
            model.base_model.set_adapter(self.active)

    def _some_adapters(self) -> list[str]:
        return self.draw.choice([["default"], ["other"], ADAPTERS])

    def scale(self) -> None:
        name, scale = self.draw.choice(ADAPTERS), self.draw.choice([0.5, 1.0, 2.0])
        for model in self.models:
            for layer in paca_layers(model):
                if name in layer.paca_delta:
                    layer.set_scale(name, scale)

    def write(self) -> None:
        """Deltas, where autograd does not see it."""
        factor = self.draw.choice([0.5, 1.5])
        self.reshard()
        for model in self.models:
            for name, parameter in model.named_parameters():
                if "paca_delta" in name:
                    getattr(parameter, "_local_tensor", parameter).data.mul_(factor)
            paca.refresh(model)

    def refresh(self) -> None:
        for model in self.models:
            paca.refresh(model)

    def merge(self) -> None:
        self.merged = True
        for model in self.models:
            model.merge_adapter()
        self.forward()

    def unmerge(self) -> None:
        self.merged = False
        for model in self.models:
            model.unmerge_adapter()

    def state_dict(self) -> None:
        check_state(*self.models, exact=() if self.merged else ("base_layer",))

    def hold(self) -> None:
        """A state dict, whose pretrained weights stay what they are while training goes on."""
        state = self.together.state_dict()
        self.held.append({name: state[name] for name in self.pretrained})

    def reload_optimizer(self) -> None:
        for optimizer in self.optimizers:
            optimizer.load_state_dict(optimizer.state_dict())


WHILE_MERGED = ("forward", "evaluate", "merge", "unmerge", "state_dict", "refresh")
OPERATIONS = [
    *("step", "step", "step", "accumulate", "forward", "evaluate", "disable", "reference_between", "other_between"),
    *("switch", "scale", "write", "refresh", "merge", "state_dict", "hold", "reload_optimizer"),
]


def run_sequences(rank: int, world: int, port: int, numbers: range, compiled: float, folder: str) -> None:
    """What a process does. Of a sequence that fails it leaves a file in `folder`, and at the end its counts."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # a sequence has more modes and adapters than a program
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    for number in numbers:
        own = dist.PrefixStore(str(number), store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        both = None
        try:
            both = Both(number, compiled)
            both.run()
        except Exception:
            said = "\n".join(both.log) if both else ""
            Path(folder, f"{number}-{rank}.txt").write_text(f"{said}\n{traceback.format_exc()}")
        store.add(f"{number} is done", 1)
        while store.add(f"{number} is done", 0) < world:  # after a mistake processes may be at different places
            time.sleep(0.01)
        dist.destroy_process_group()
        torch._dynamo.reset()
        if rank == 0 and (number + 1 - numbers.start) % 25 == 0:
            print(f"{number + 1 - numbers.start} of {len(numbers)} sequences", flush=True)
    if rank == 0:
        Path(folder, "counts.txt").write_text(", ".join(f"{name} {count}" for name, count in COUNTS.most_common()))


def failures(numbers: range, world: int, compiled: float, folder: Path) -> list[str]:
    """Run the sequences in `world` processes. What went wrong, in each process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (world, store.port, numbers, compiled, str(folder))
    mp.start_processes(run_sequences, arguments, world, start_method=FORKS.get_start_method())
    return [f"sequence {path.stem}: {path.read_text()}" for path in sorted(folder.glob("*-*.txt"))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="distributed.sharded_sequences", description=__doc__)
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2, choices=(2, 4))
    parser.add_argument("--seed", type=int, default=0, help="the number of the first sequence")
    parser.add_argument("--compiled", type=float, default=0.05, help="the share whose blocks are compiled")
    arguments = parser.parse_args()
    numbers = range(arguments.seed, arguments.seed + arguments.sequences)
    with tempfile.TemporaryDirectory() as folder:
        failed = failures(numbers, arguments.processes, arguments.compiled, Path(folder))
        print(f"{len(numbers)} sequences in {arguments.processes} processes: {Path(folder, 'counts.txt').read_text()}")
    print(*failed, sep="\n")
    print(f"failed: {len(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
