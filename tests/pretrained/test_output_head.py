"""The output head while answers are made: one product for all sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import paca
from paca.pretrained import load_pretrained
from tiny_checkpoint import save_base


class Products(TorchDispatchMode):
    """Notes the shapes of batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.batched: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.batched.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", [paca.PacaConfig(r=4), LoraConfig(r=4)], ids=["paca", "lora"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_prompts_are_cut_to_their_ends_and_multiplied_together(
    tmp_path: Path, adapter: PeftConfig, sequences: int
) -> None:
    model = load_pretrained(str(save_base(tmp_path))).model
    vocabulary = model.config.vocab_size
    tokens = torch.randint(2, 26, (sequences, 7))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[:, -1:]
    adapted = get_peft_model(model, adapter)
    with torch.no_grad(), Products() as products:
        found = adapted(input_ids=tokens, logits_to_keep=1).logits
    torch.testing.assert_close(found, expected)
    assert not [shape for shape in products.batched if vocabulary in shape]
