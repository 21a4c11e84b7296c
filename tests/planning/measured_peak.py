"""Trains models for two steps each in this process and prints how far its resident set rose (bytes, a JSON list).

Run as `python measured_peak.py CASES`, a JSON list of `[architecture, options of its config, setting]`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from architectures import config
from quantized_checkpoint import quantized_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import paca
from paca.lean import make_lean
from paca.lean.loss import loss_for


def fix_thresholds() -> None:
    """glibc raises them by itself as blocks are freed, and then keeps freed memory that belongs to no tensor any more.
    So every tensor that counts is a mapping of its own, and goes when it is freed."""
    for of_trimming_or_mapping in (-1, -3):
        assert ctypes.CDLL(None).mallopt(of_trimming_or_mapping, 2**16)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def adapter(fields: dict[str, Any] | None) -> peft.PeftConfig:
    """PaCA's, or another method's `peft_type` and fields."""
    if fields is None:
        return paca.PacaConfig(r=8)
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(fields["peft_type"])]
    return kind(task_type="CAUSAL_LM", **{name: value for name, value in fields.items() if name != "peft_type"})


def train(architecture: str, options: dict[str, Any], setting: dict[str, Any]) -> None:
    """Two optimizer steps; the first, on a few tokens, makes the optimizer's state, which is in the second's peak."""
    shape = config(architecture, **options)
    quantization = setting.get("quantization")
    base = quantized_model(shape, quantization) if quantization else AutoModelForCausalLM.from_config(shape)
    gc.collect()
    model = base if setting.get("full") else peft.get_peft_model(base, adapter(setting.get("adapter")))
    model.train()
    if setting.get("lean"):
        make_lean(model, recompute=setting.get("recompute"))
    if setting.get("checkpointing"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
    loss_options = {}
    if setting["chunked_loss"]:
        more = ("mean_logits",) if setting.get("trainer") == "dpo" else ()
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1", *more))
        loss_options = {"fused_lm_head": True}
    trained = [p for p in model.parameters() if p.requires_grad]
    rank = setting.get("optimizer", "").removeprefix("factored_adamw_")
    optimizer: Any = paca.FactoredAdamW(trained, rank=int(rank)) if rank else torch.optim.AdamW(trained, fused=True)
    Path("/proc/self/clear_refs").write_text("5")  # making the weights takes more than training: forget that peak
    for length in (8, setting["sequence_length"]):
        ids = torch.randint(1, 400, (setting["batch_size"], length))
        mask = torch.ones_like(ids)
        if setting.get("padded"):
            mask[0, -3:] = 0
        if setting.get("answers"):
            make_answers(model, setting, length)
        for _ in range(setting.get("gradient_accumulation", 1)):
            with loss_for(ids.device):
                inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False, **loss_options}
                loss = preference_loss(model, inputs) if setting.get("trainer") == "dpo" else model(**inputs).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def preference_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """As TRL's DPOTrainer, of pairs that are one batch after the other."""
    inputs = {name: value.repeat(2, 1) if torch.is_tensor(value) else value for name, value in inputs.items()}
    result = model(**inputs)
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs).log_probs.sum(1)
    chosen, rejected = (result.log_probs.sum(1) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def make_answers(model: Any, setting: dict[str, Any], length: int) -> None:
    """As TRL's GRPOTrainer: samples, none of which ends early."""
    made = min(setting["answer_length"], length // 2)
    prompts = torch.randint(1, 400, (setting["answers"], length - made))
    with torch.no_grad():
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": made, "min_new_tokens": made}
        options["use_cache"] = not model.active_peft_config.is_prompt_learning
        model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)


def measure(architecture: str, options: dict[str, Any], setting: dict[str, Any]) -> int:
    options = {**options, "dtype": getattr(torch, options["dtype"])}
    # Code is read from disk as it is first run, and stays resident: a tiny model of the kind runs all of it.
    train(architecture, {"dtype": options["dtype"]}, {**setting, "batch_size": 2, "sequence_length": 8})
    gc.collect()
    before = resident("VmRSS")
    train(architecture, options, setting)
    peak = resident("VmHWM")
    gc.collect()
    return peak - before


if __name__ == "__main__":
    fix_thresholds()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported is not walked through again each time
    print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
