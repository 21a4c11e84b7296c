from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import config
from measured_peak import adapter

from forked_process import run_forked
from paca.planning import Setting, estimate
from paca.planning.memory_estimate import FRAMEWORK
from paca.planning.setting import Answering

GATED = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
}
GPT2 = {"n_embd": 512, "n_layer": 2, "n_head": 8, "vocab_size": 4000}
OPT = {
    "hidden_size": 512,
    "word_embed_proj_dim": 512,
    "ffn_dim": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # In bfloat16, and of shapes of their own: a product's program stays once it is compiled.
    "llama, bf16": ("llama", {**GATED, "vocab_size": 8000, "dtype": "bfloat16"}, {}),
    "llama, padded": ("llama", {**GATED, "dtype": "float32"}, {"padded": True}),
    "llama, MLP recomputed": ("llama", {**GATED, "dtype": "float32"}, {"lean": True, "recompute": "mlp"}),
    "llama, checkpointed": ("llama", {**GATED, "dtype": "float32"}, {"checkpointing": True}),
    "llama, all of it": ("llama", {**GATED, "dtype": "float32"}, {"full": True, "gradient_accumulation": 2}),
    "llama, nf4": (
        "llama",
        {**GATED, "vocab_size": 8000, "dtype": "bfloat16"},
        {"quantization": "nf4", "batch_size": 3},
    ),
    "gemma2": ("gemma2", {**GATED, "head_dim": 64, "dtype": "float32"}, {}),
    "phi3": ("phi3", {**GATED, "dtype": "float32"}, {}),
    "gpt2": ("gpt2", {**GPT2, "dtype": "float32"}, {}),
    "llama, chunked loss of a small vocabulary": (
        "llama",
        {**GATED, "dtype": "float32"},
        {"chunked_loss": True, "lean": True, "recompute": "mlp"},
    ),
    "opt, chunked loss": (
        "opt",
        {**OPT, "vocab_size": 32768, "dtype": "float32"},
        {"chunked_loss": True, "batch_size": 2},
    ),
    "llama, pairs against the model without its adapter": (
        "llama",
        {**GATED, "dtype": "float32"},
        {"chunked_loss": True, "trainer": "dpo", "reference": "without adapter", "padded": True},
    ),
    "llama, making answers takes most": (
        "llama",
        {**GATED, "dtype": "float32"},
        {
            "chunked_loss": True,
            "trainer": "grpo",
            "batch_size": 1,
            "sequence_length": 160,
            "answers": 32,
            "answer_length": 6,
        },
    ),
    "llama, answers after a learned prompt": (
        "llama",
        {**GATED, "dtype": "float32"},
        {
            "adapter": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20},
            "chunked_loss": True,
            "trainer": "grpo",
            "batch_size": 1,
            "sequence_length": 160,
            "answers": 12,
            "answer_length": 2,
        },
    ),
    "llama, factors of many columns": (
        "llama",
        {**GATED, "dtype": "float32"},
        {"adapter": {"peft_type": "PACA", "r": 128}, "optimizer": "factored_adamw_8", "sequence_length": 64},
    ),
    "llama, SHADOW": ("llama", {**GATED, "dtype": "float32"}, {"adapter": {"peft_type": "SHADOW"}}),
    "llama, SHiRA": (
        "llama",
        {**GATED, "dtype": "float32"},
        {"adapter": {"peft_type": "SHIRA", "r": 8, "target_modules": ["q_proj", "down_proj"]}},
    ),
}
DEFAULTS = {"batch_size": 2, "sequence_length": 256, "chunked_loss": False}


def _measure() -> dict[str, int]:
    cases = [(name, options, {**DEFAULTS, **setting}) for name, options, setting in CASES.values()]
    script = Path(__file__).with_name("measured_peak.py")
    run = run_forked(script.read_text(), json.dumps(cases))
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(CASES, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow(reason="measures the memory of processes")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_peak_memory_is_within_a_tenth_of_the_measured_resident_set() -> None:
    """In one test: all cases are measured in one process, for which pytest's other workers need not wait."""
    measured = _measure()
    wrong = {}
    for name, (architecture, options, setting) in CASES.items():
        planned = _planned(architecture, options, {**DEFAULTS, **setting})
        print(f"{name}: planned {planned / 2**20:.0f} MiB, measured {measured[name] / 2**20:.0f} MiB")
        if planned != pytest.approx(measured[name], rel=0.1):
            wrong[name] = planned, measured[name]
    assert not wrong


def _planned(architecture: str, options: dict[str, Any], settings: dict[str, Any]) -> int:
    other = settings.pop("adapter", None)
    method = None if settings.pop("full", False) else adapter(other)
    shape = config(architecture, **{**options, "dtype": getattr(torch, options["dtype"])})
    if "answers" in settings:
        made = {"length": settings.pop("answer_length"), "generation_batch_size": settings.pop("answers")}
        settings["answering"] = Answering(**made)
    planned = estimate(shape, Setting(**settings), method)
    return planned.total - planned.parts[FRAMEWORK]
