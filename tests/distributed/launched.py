"""What `torchrun` and `accelerate launch` start: one training in every process, against the same one in one process.

PYTHONPATH=src:tests accelerate launch --config_file recipes/launch/KIND.yaml --num_processes N \
    tests/distributed/launched.py KIND OUTPUT [VARIANT ...]

It trains each variant in all processes, and writes to `OUTPUT-RANK.json` how far this process' columns, the gathered
adapter, outputs and losses are from those of one process. Models are in float64 where the library can (DeepSpeed:
float32). What has to be refused is tried, too.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distributed.as_accelerators import shard_on_cpus
from models import adapt, llama, tokens
from paca.layers import paca_layers

STEPS = 3
LENGTH = 7
TRAINED = ("plain", "odd rows", "accumulation", "clipping", "checkpointing", "all at once", "bf16", "nf4")
REFUSED = {
    "fsdp2": {"Adafactor": "Adafactor can't step parameters that FSDP2 shards"},
    "deepspeed-zero1": {"cast to bf16": "DeepSpeed's bf16 and fp16 cast weights: load the model in that type"},
    "deepspeed-zero2": {"cast to bf16": "DeepSpeed's bf16 and fp16 cast weights: load the model in that type"},
    "deepspeed-zero3": {"adapted before": "ZeRO-3 took weights apart that PaCA keeps columns in"},
}
"""By kind: variants that have to fail, and what the error has to say."""
VARIANTS = {kind: (*TRAINED, "collectives", *REFUSED.get(kind, ())) for kind in ("ddp", *REFUSED)}
"""By kind: the variants."""
FSDP2 = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "FULL_STATE_DICT"}
"""What `recipes/launch/fsdp2.yaml` says."""
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def build(variant: str, double: bool) -> Any:
    """An adapted model, the same in every process."""
    odd = variant in ("odd rows", "all at once")
    # 49 rows are 25 and 24 in two processes; 13, 13, 13 and 10 in four. 33 tokens as well.
    model = llama(intermediate_size=49, vocab_size=65) if odd else llama()
    model = model.double() if double and variant not in ("bf16", "nf4") else model
    if variant == "bf16" and not double:  # DeepSpeed has no autocast: it casts parameters, also the deltas
        model = model.bfloat16()
    if variant == "nf4":
        from quantized_layers import quantized_linear

        for block in model.model.layers:
            block.mlp.up_proj = quantized_linear("nf4", block.mlp.up_proj)
    model = adapt(model, target_modules=TARGETS, r=5, paca_alpha=10)
    if variant in ("checkpointing", "all at once"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def accumulates(variant: str) -> int:
    """How many passes a step has."""
    return 2 if variant in ("accumulation", "all at once") else 1


def clips(variant: str) -> float | None:
    """The largest norm of the gradients, where it is bounded: far below what they have."""
    return 1e-3 if variant in ("clipping", "all at once") else None


def batch(number: int, world: int) -> Tensor:
    """`(2 * world, LENGTH)` tokens."""
    return tokens(2 * world, LENGTH, seed=number)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.square().mean()


def outputs_of(model: nn.Module, ids: Tensor, variant: str) -> Tensor:
    """As accelerate wraps a model in mixed precision."""
    with torch.autocast("cpu", torch.bfloat16, enabled=variant == "bf16"):
        logits = model(input_ids=ids).logits
    return logits.float() if variant == "bf16" else logits


def optimizer_of(model: nn.Module, variant: str) -> torch.optim.Optimizer:
    """In 16 bits SGD: AdamW makes whole steps of gradients that are rounding alone."""
    kind, rate = {"bf16": (torch.optim.SGD, 50.0), "Adafactor": (torch.optim.Adafactor, 0.02)}.get(
        variant, (torch.optim.AdamW, 0.02)
    )
    return kind([p for p in model.parameters() if p.requires_grad], lr=rate)


def one_process(variant: str, world: int, double: bool) -> tuple[Any, list[float]]:
    """The training as one process does it, which sees the whole batch. In the order of `world` processes' sums."""
    model = build(variant, double)
    optimizer, losses = optimizer_of(model, variant), []
    for number in range(STEPS):
        for part in range(accumulates(variant)):
            ids = batch(number * accumulates(variant) + part, world)
            for rank in range(world):
                loss = outputs_of(model, ids[rank::world], variant).square().mean()
                (loss / world / accumulates(variant)).backward()
                losses.append(loss.item())
        if clips(variant):
            nn.utils.clip_grad_norm_(model.parameters(), clips(variant))
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


class Collectives(TorchDispatchMode):
    """Counts the collectives that run below it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "c10d" in name and "wait" not in name:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def collectives(kind: str) -> dict[str, Any]:
    """Those of one step, the third, with PaCA and with LoRA on the same layers."""
    counts, double = {}, not kind.startswith("deepspeed")
    for method in ("paca", "lora"):
        accelerator = accelerator_of(kind, "collectives")
        model = build("plain", double)
        if method == "lora":
            stock = llama().double() if double else llama()
            model = peft.get_peft_model(stock, peft.LoraConfig(r=5, target_modules=TARGETS)).train()
        model, optimizer = accelerator.prepare(model, optimizer_of(model, "plain"))
        for number in range(3):
            with Collectives() as seen:
                accelerator.backward(loss_of(model, batch(number, 1)))
                optimizer.step()
                optimizer.zero_grad()
        counts[method] = dict(sorted(seen.counts.items()))
    if not counts["lora"] or counts["paca"] != counts["lora"]:
        raise AssertionError(f"the collectives of a step: {counts}")
    return {"collectives": counts["paca"]}


def accelerator_of(kind: str, variant: str) -> Accelerator:
    """As the launcher's environment asks for it. accelerate shards on accelerators only: to it each process has one."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    precision = "bf16" if variant in ("bf16", "cast to bf16") else "no"
    if kind == "ddp":
        # DDP sends buffers before each forward pass unless told otherwise: the numbers of the columns too.
        quiet = [DistributedDataParallelKwargs(broadcast_buffers=variant != "collectives")]
        settings = {"gradient_accumulation_steps": accumulates(variant), "mixed_precision": precision}
        return Accelerator(cpu=True, kwargs_handlers=quiet, **settings)
    shard_on_cpus()
    # accelerate's launcher tells what the file says. For torchrun the script says the same.
    if kind == "fsdp2":
        fsdp = None if "FSDP_VERSION" in os.environ else FullyShardedDataParallelPlugin(**FSDP2)
        return Accelerator(
            gradient_accumulation_steps=accumulates(variant), mixed_precision=precision, fsdp_plugin=fsdp
        )
    stage = int(kind[-1])
    told = "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ
    plugin = DeepSpeedPlugin() if told else DeepSpeedPlugin(zero_stage=stage, zero3_save_16bit_model=stage == 3)
    assert plugin.zero_stage == stage
    plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=accumulates(variant),
        gradient_clipping=clips(variant) or 0.0,
        zero_allow_untested_optimizer=True,
    )
    if stage == 3:
        plugin.deepspeed_config["zero_optimization"].update(stage3_param_persistence_threshold=0)
    return Accelerator(deepspeed_plugin=plugin, mixed_precision=precision)


def columns(layers: list[Any], alone: list[Any]) -> float:
    """How far this process' columns are: its rows of the weights, or the deltas where weights don't hold them."""
    far = 0.0
    for layer, other in zip(layers, alone, strict=True):
        got, want = layer.paca_delta["default"], other.paca_delta["default"].detach()
        if layer.mode == "resident":
            got, want = layer.base_layer.weight, other.base_layer.weight.detach()
            want = want[:, other.paca_indices["default"]]
        elif hasattr(got, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([got]):
                got = got.detach().clone()
        if isinstance(got, DTensor):
            want = distribute_tensor(want, got.device_mesh, got.placements, src_data_rank=None).to_local()
            got = got.to_local()
        if layer.mode == "resident":
            got = got[:, layer.paca_indices["default"]]
        far = max(far, difference(got.detach(), want))
    return far


def together(kind: str, variant: str) -> dict[str, float]:
    """Train in all processes, and compare with one."""
    world, rank, double = dist.get_world_size(), dist.get_rank(), not kind.startswith("deepspeed")
    if variant == "adapted before":
        unset_hf_deepspeed_config()
        early = build(variant, double)
    accelerator = accelerator_of(kind, variant)
    alone, expected = one_process(variant, world, double)  # after it: under ZeRO-3 it adds its columns as well
    model = early if variant == "adapted before" else build(variant, double)
    layers = paca_layers(model)
    model, optimizer = accelerator.prepare(model, optimizer_of(model, variant))
    losses = []
    for number in range(STEPS):
        for part in range(accumulates(variant)):
            ids = batch(number * accumulates(variant) + part, world)[rank::world]
            with accelerator.accumulate(model):
                loss = loss_of(model, ids)
                accelerator.backward(loss)
                if clips(variant) and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clips(variant))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    with torch.no_grad():  # the columns of every process, through what it computes with them
        ids = batch(99, world)
        got, want = model(input_ids=ids).logits, outputs_of(alone, ids, variant)
    found = {"outputs": difference(got.to(want), want), "columns": columns(layers, paca_layers(alone))}
    state = accelerator.get_state_dict(model)
    if kind == "ddp" or rank == 0:
        unwrapped = accelerator.unwrap_model(model)
        mine = get_peft_model_state_dict(unwrapped, state_dict=state)
        theirs = get_peft_model_state_dict(alone)
        if mine.keys() != theirs.keys():
            raise AssertionError(f"the adapter has {sorted(mine)[:3]}, not {sorted(theirs)[:3]}")
        found["adapter"] = max(difference(mine[name].to(value), value) for name, value in theirs.items())
        base = build(variant, double).state_dict()
        wrong = [n for n, v in base.items() if n.endswith("base_layer.weight") and not torch.equal(v, state[n].to(v))]
        if wrong and variant != "bf16":
            raise AssertionError(f"not the pretrained weights: {wrong}")
    mine_of_all = expected[rank::world]
    found["losses"] = max(abs(a - b) / abs(b) for a, b in zip(losses, mine_of_all, strict=True))
    return found


def difference(got: Tensor, want: Tensor) -> float:
    """The largest one, as a part of the largest value; 0 if there is none."""
    if want.numel() == 0 == got.numel():
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))


def main() -> None:
    kind, output, *variants = sys.argv[1:]
    torch.set_num_threads(1)
    if not dist.is_initialized() and not kind.startswith("deepspeed"):
        dist.init_process_group("gloo")
    elif kind.startswith("deepspeed"):
        from deepspeed import comm

        comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    results: dict[str, Any] = {}
    for variant in variants or VARIANTS[kind]:
        try:
            results[variant] = collectives(kind) if variant == "collectives" else together(kind, variant)
        except Exception as error:
            results[variant] = {"trouble": traceback.format_exc(), "said": f"{type(error).__name__}: {error}"}
            if variant not in REFUSED.get(kind, {}):
                break  # processes may be at different places now
    rank = os.environ["RANK"]
    Path(f"{output}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
