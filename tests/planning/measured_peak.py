"""Trains models for two steps each in this process and prints how far its resident set rose (bytes, a JSON list).

Run as `python measured_peak.py CASES`, a JSON list of `[architecture, options of its config, setting]`. The environment
has to fix malloc's thresholds: glibc raises them by itself as blocks are freed, and then keeps freed memory that
belongs to no tensor any more.
"""

from __future__ import annotations

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


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(architecture: str, options: dict[str, Any], setting: dict[str, Any]) -> None:
    """Two optimizer steps; the first, on a few tokens, makes the optimizer's state, which is in the second's peak."""
    shape = config(architecture, **options)
    quantization = setting.get("quantization")
    base = quantized_model(shape, quantization) if quantization else AutoModelForCausalLM.from_config(shape)
    gc.collect()
    model = base if setting.get("full") else peft.get_peft_model(base, paca.PacaConfig(r=8))
    model.train()
    if setting.get("lean"):
        make_lean(model, recompute=setting.get("recompute"))
    if setting.get("checkpointing"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
    loss_options = {}
    if setting["chunked_loss"]:
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        loss_options = {"fused_lm_head": True}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    Path("/proc/self/clear_refs").write_text("5")  # making the weights takes more than training: forget that peak
    for length in (8, setting["sequence_length"]):
        ids = torch.randint(1, 400, (setting["batch_size"], length))
        mask = torch.ones_like(ids)
        if setting.get("padded"):
            mask[0, -3:] = 0
        for _ in range(setting.get("gradient_accumulation", 1)):
            with loss_for(ids.device):
                loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, **loss_options).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


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
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported is not walked through again each time
    print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
