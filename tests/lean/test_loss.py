from __future__ import annotations

from typing import Any

import pytest
import torch
import trl.trainer.utils
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from paca.lean import loss

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many positions each loss projects onto the vocabulary, and how many tokens of it at a time."""
    counts: list[tuple[int, int]] = []
    function = trl.trainer.utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            counts.append((hidden.shape[0], rest[4]))
            return function.apply(hidden, *rest)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counting)
    return counts


def outcome(model: Any, labels: torch.Tensor) -> list[torch.Tensor]:
    """Loss, what the metrics are made of, and gradients."""
    model.zero_grad()
    ids = torch.arange(labels.numel()).reshape(labels.shape) % SHAPE["vocab_size"]
    result = model(input_ids=ids, labels=labels, fused_lm_head=True)
    result.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return [result.loss.detach(), result.log_probs, result.entropy, result.is_top1, *gradients]


@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), ("cpu", True), ("cuda", False)])
@pytest.mark.parametrize("labelled", [5, 0])
def test_on_cpus_labels_alone_are_projected_in_narrow_tiles_and_nothing_else_changes(
    labelled: int, device: str, compiled: bool, projected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "TILE", 16)  # less than the vocabulary
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    labels = torch.full((2, 12), -100)
    if labelled:
        labels[0, 3:5] = 7
        labels[1, 9:] = 11
    before = outcome(model, labels)
    with loss.loss_for(torch.device(device), compiled):
        within = outcome(model, labels)
    again = outcome(model, labels)
    everything = (2 * 11, 32768)
    assert projected == [everything, (labelled, 16) if (device, compiled) == ("cpu", False) else everything, everything]
    for whole, other, restored in zip(before, within, again, strict=True):
        torch.testing.assert_close(other, whole)
        assert torch.equal(restored, whole)
