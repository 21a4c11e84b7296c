"""What the code of pages takes for given: the models and files that they name, and names from outside of a block."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import paca
from expert_models import mixtral
from models import adapt, llama, tokens
from rotating import trainable
from tiny_checkpoint import WIDE, save_adapter, save_base

Names = dict[str, Any]

LLAMA = "my-models/llama"
ALSO = ("HuggingFaceTB/SmolLM2-135M-Instruct",)
"""Models that pages name."""


def stand_ins(folder: Path) -> Path:
    """A folder with a tiny model of each of these names, an adapter of one, and data."""
    base = save_base(folder / LLAMA, tie_word_embeddings=True, **WIDE)
    for name in ALSO:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(base)
    save_adapter(folder / "runs" / "sft" / "adapter", base)
    write(folder / "answers.jsonl", [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(8)])
    options = {"options": ["yes", "no"]}
    write(folder / "heldout.jsonl", [{"question": f"Is {n} even?", "answer": "yes", **options} for n in (2, 4)])
    return folder


def do_one_step(patch: pytest.MonkeyPatch) -> None:
    """TRL's trainers do one step, on the CPU, and models are not compiled to machine code.

    A page's code may be for a GPU, as TRL's defaults are.
    """
    for kind in (trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.RewardConfig):
        patch.setattr(kind, "__init__", _of_one_step(kind.__init__))
    patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def _of_one_step(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def short(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **{**settings, "max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True})

    return short


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Vision(nn.Module):
    """The layers that the page on layers names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.expand_conv = nn.Conv2d(8, 16, 1)
        self.project_conv = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 4)


def _batches() -> list[dict[str, Any]]:
    return [{"input_ids": tokens(seed=seed), "labels": tokens(seed=seed)} for seed in range(3)]


def _in_training(model: Any) -> Names:
    return {"model": model, "optimizer": torch.optim.AdamW(trainable(model))}


def _method(_: Names) -> Names:
    batches = _batches()
    return {**_in_training(adapt(llama(), task_type="CAUSAL_LM")), "ids": batches[0]["input_ids"], "batches": batches}


def _one_process(_: Names) -> Names:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return {"base": llama()}


def _trainer(_: Names) -> Names:
    data = Dataset.from_list([{"text": "A cat sleeps."}] * 4)
    return {"model": LLAMA, "args": trl.SFTConfig("out", bf16=False), "data": data}


def _columns(names: Names) -> Names:
    return {**_trainer(names), "config": paca.PacaConfig(r=4, paca_alpha=4, task_type="CAUSAL_LM")}


def _loop(_: Names) -> Names:
    rotating = adapt(llama(), task_type="CAUSAL_LM", rotate_every=100)
    return {**_in_training(rotating), "step": 100}


def _kept(names: Names) -> Names:
    names["model"].save_pretrained("kept")
    columns, state = paca.trained_columns(names["model"]), names["optimizer"].state_dict()
    return {"folder": "kept", "columns": columns, "state": state}


def _scored(_: Names) -> Names:
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    return {
        "model": adapt(llama(vocab_size=len(tokenizer)), task_type="CAUSAL_LM"),
        "tokenizer": tokenizer,
    }


def _merged_classifier(_: Names) -> Names:
    classifier = AutoModelForSequenceClassification.from_pretrained(LLAMA)
    for saved in (classifier, AutoTokenizer.from_pretrained(LLAMA)):
        saved.save_pretrained("merged/reviews")
    return {}


GIVEN: Mapping[str, Mapping[int, Callable[[Names], Names]]] = {
    "docs/method.md": {0: _method},
    "docs/guides/choosing.md": {0: lambda _: {"model": llama(), "batches": _batches()}, 1: _columns},
    "docs/guides/evaluation.md": {0: _scored},
    "docs/guides/layers.md": {0: lambda _: {"vision_model": Vision(), "expert_model": mixtral()}},
    "docs/guides/processes.md": {0: _one_process},
    "docs/guides/rotation.md": {0: _trainer, 1: _loop, 2: _kept},
    "docs/guides/serving.md": {0: lambda _: {"model": adapt(llama(), task_type="CAUSAL_LM")}},
    "docs/guides/trainers.md": {0: _merged_classifier},
}
"""By page and number of the block: names that are given before it, from those that are there."""


def _mixed_batches_are_right(names: Names) -> None:
    assert names["answers"].shape == (4, 9 + 5)
    model, again, ids = names["model"], names["again"].eval(), names["ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits[2], names["logits"][2])


def _all_trained(names: Names) -> None:
    assert {one["label"] for one in names["label"](["a", "b"])} <= {"LABEL_0", "LABEL_1"}
    assert {folder.name for folder in Path("runs").iterdir()} == {"sft", "dpo", "reward"}


def _rotated(names: Names) -> None:
    assert names["columns"] == paca.trained_columns(names["model"])


AFTERWARDS: Mapping[str, Callable[[Names], None]] = {
    "docs/guides/trainers.md": _all_trained,
    "docs/guides/adapters.md": _mixed_batches_are_right,
    "docs/guides/processes.md": lambda _: torch.distributed.destroy_process_group(),
    "docs/guides/rotation.md": _rotated,
}
"""What must hold when the page's code has run, or has to be put away."""
