"""PaCA against PEFT's LoRA on stacks of experts: time, peak memory and largest allocation of a training step on a CPU.

    python benchmarks/experts.py --output benchmarks/experts.csv --rounds 7

A Mixtral-shaped model with random weights; every stack of experts is adapted and nothing else. Times are taken in
interleaved rounds; memory is what torch's CPU allocator handed out within one step (after a first step has made the
optimizer's state), beyond what was there before: activations, gradients, temporaries.
"""

from __future__ import annotations

import argparse
import gc
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import paca
from paca.bench.rows import Row, append_rows, summarized
from paca.training.folder.provenance import row_provenance

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
BATCH, SEQ, LAYERS, HIDDEN, MLP, EXPERTS, VOCAB = 2, 256, 2, 512, 1024, 8, 1024


def base(dtype: torch.dtype, implementation: str) -> Any:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM._from_config(config, experts_implementation=implementation).to(dtype)


def frozen(model: Any) -> Any:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def with_paca(rank: int) -> Callable[[Any], Any]:
    settings: dict[str, Any] = {"target_parameters": STACKS, "task_type": "CAUSAL_LM"}
    return lambda model: peft.get_peft_model(model, paca.PacaConfig(r=rank, **settings))


def with_lora(rank: int, autocast_adapter_dtype: bool) -> Callable[[Any], Any]:
    settings: dict[str, Any] = {"target_parameters": STACKS, "target_modules": [], "task_type": "CAUSAL_LM"}
    return lambda model: peft.get_peft_model(
        model, peft.LoraConfig(r=rank, **settings), autocast_adapter_dtype=autocast_adapter_dtype
    )


# PaCA of rank 26 trains as many parameters as LoRA of rank 16: r * out against r * (in + out), over both stacks.
METHODS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "frozen": (0, frozen),
    "paca": (16, with_paca(16)),
    "paca-equal-parameters": (26, with_paca(26)),
    "lora": (16, with_lora(16, True)),
    "lora-tuned": (16, with_lora(16, False)),
}


class Step:
    """One method's training step."""

    def __init__(self, make: Callable[[Any], Any], model: Any) -> None:
        self.model: nn.Module = make(model).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))

    def __call__(self) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def allocations(step: Step) -> tuple[int, int]:
    """The peak of what was allocated within `step` and its largest single allocation, in bytes."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    return peak, largest


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(dtype: torch.dtype, implementation: str, rounds: int) -> list[Row]:
    steps = {name: Step(make, base(dtype, implementation)) for name, (_, make) in METHODS.items()}
    for step in steps.values():
        step()
        step()
    memory = {name: allocations(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    shared: dict[str, Any] = {
        "run": secrets.token_hex(4),
        **row_provenance(torch.device("cpu")),
        "model": f"mixtral {EXPERTS} experts x {MLP}, {implementation}",
        "scope": "experts",
        "loss": "lm",
        "dtype": str(dtype).removeprefix("torch."),
        "layers": LAYERS,
        "hidden": HIDDEN,
        "vocab": VOCAB,
        "image_size": 0,
        "optimizer": "adamw",
        "batch": BATCH,
        "seq": SEQ,
        "budget": 0,
        "variant": "eager",
        "baseline": "lora",
    }
    rows = []
    for name, (rank, _) in METHODS.items():
        found = {
            ("step_time", "s"): (times[name], times["lora"]),
            ("step_peak_allocated", "bytes"): ([memory[name][0]], [memory["lora"][0]]),
            ("step_largest_allocation", "bytes"): ([memory[name][1]], [memory["lora"][1]]),
        }
        for (metric, unit), (samples, against) in found.items():
            rows.append(
                {
                    **shared,
                    "method": name,
                    "rank": rank,
                    "trainable": steps[name].trainable,
                    "metric": metric,
                    "unit": unit,
                    **summarized(samples, against),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/experts.csv"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"])
    chosen = parser.parse_args()
    for dtype in chosen.dtypes:
        for implementation in chosen.implementations:
            rows = measure(getattr(torch, dtype), implementation, chosen.rounds)
            append_rows(chosen.output, rows)
            print(f"\n{dtype}, {implementation} ({rows[0]['machine']})")
            for name in METHODS:
                mine = {row["metric"]: row for row in rows if row["method"] == name}
                took, peak, largest = (mine[m] for m in ("step_time", "step_peak_allocated", "step_largest_allocation"))
                print(
                    f"  {name:22} {took['trainable']:9,} trained  {took['median']:.3f} s ({took['ratio']:.2f} x lora)  "
                    f"peak {peak['median'] / 2**20:6.1f} MiB ({peak['ratio']:.2f} x)  "
                    f"largest {largest['median'] / 2**20:5.1f} MiB"
                )


if __name__ == "__main__":
    main()
