from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.utils
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from paca.lean import loss, token_log_probs

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Whose function each loss calls, how many positions it projects, and the width of its tiles."""
    counts: list[tuple[str, int, int]] = []

    def counting(name: str, function: Any) -> Any:
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            counts.append((name, hidden.shape[0], rest[4]))
            return function.apply(hidden, *rest)

        return SimpleNamespace(apply=apply)

    theirs = trl.trainer.utils._ChunkedLogProbFunction
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", counting("trl", theirs))
    monkeypatch.setattr(loss, "TokenLogProbs", counting("paca", loss.TokenLogProbs))
    return counts


def outcome(model: Any, labels: torch.Tensor) -> list[torch.Tensor]:
    """Loss, what the metrics are made of, and gradients."""
    model.zero_grad()
    ids = torch.arange(labels.numel()).reshape(labels.shape) % SHAPE["vocab_size"]
    result = model(input_ids=ids, labels=labels, fused_lm_head=True)
    result.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    return [result.loss.detach(), result.log_probs, result.entropy, result.is_top1, *gradients]


@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), ("cpu", True), ("cuda", False)])
@pytest.mark.parametrize("labelled", [5, 0])
@pytest.mark.parametrize("trained_head", [False, True])
def test_on_cpus_labels_alone_are_projected_in_blocks_and_nothing_else_changes(
    labelled: int, device: str, compiled: bool, trained_head: bool, projected: list[tuple[str, int, int]]
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).float()
    model.lm_head.requires_grad_(trained_head)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    labels = torch.full((2, 12), -100)
    if labelled:
        labels[0, 3:5] = 7
        labels[1, 9:] = 11
    before = outcome(model, labels)
    with loss.loss_for(torch.device(device), compiled):
        within = outcome(model, labels)
    again = outcome(model, labels)
    everything = ("trl", 2 * 11, 32768)
    changed = ("paca", labelled, loss.TILE)
    assert projected == [everything, changed if (device, compiled) == ("cpu", False) else everything, everything]
    for whole, other, restored in zip(before, within, again, strict=True):
        torch.testing.assert_close(other, whole)
        assert torch.equal(restored, whole)


def test_a_trl_whose_function_takes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(lambda ctx, hidden: None))
    with loss.loss_for(torch.device("cpu")):
        assert trl.trainer.utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_a_plan_may_be_made_within_a_run() -> None:
    with loss.loss_for(torch.device("cpu")), loss.in_blocks(torch.device("cpu")), loss.every_position():
        assert trl.trainer.utils._ChunkedLogProbFunction is loss.TokenLogProbs
    assert trl.trainer.utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def values_and_gradients(
    function: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *settings: Any, entropy: float
) -> list[torch.Tensor]:
    x = hidden.clone().requires_grad_()
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    logprobs, uncertainty, _, mean, top1 = function.apply(x, weight, None, targets, *settings, names)
    arriving = torch.linspace(0.3, -0.7, len(targets), dtype=logprobs.dtype)
    (logprobs @ arriving + (entropy * uncertainty.sum() if entropy else 0)).backward()
    assert x.grad is not None
    assert not mean.requires_grad
    return [logprobs.detach(), uncertainty.detach(), top1, x.grad, mean]


def exactly(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *settings: Any, entropy: float
) -> list[torch.Tensor]:
    """The same from its definition, in float64."""
    temperature, _, softcap, scale = settings
    x = hidden.to(torch.float64, copy=True).requires_grad_()
    z = x @ weight.double().T * scale
    z = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature
    every = z.log_softmax(1)
    logprobs = every.gather(1, targets[:, None]).squeeze(1)
    uncertainty = -(every.exp() * every).sum(1)
    arriving = torch.linspace(0.3, -0.7, len(targets), dtype=torch.float64)
    (logprobs @ arriving + (entropy * uncertainty.sum() if entropy else 0)).backward()
    assert x.grad is not None
    return [logprobs.detach(), uncertainty.detach(), z.argmax(1) == targets, x.grad, z.detach().mean(1)]


@pytest.mark.parametrize("settings", [(1.0, 64, None, 1.0), (0.7, 64, None, 1.3), (0.7, 64, 4.0, 1.3)])
@pytest.mark.parametrize("entropy", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probs_in_blocks_are_as_exact_as_trls(
    dtype: torch.dtype, entropy: float, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_log_probs, "BLOCK", 40 * 300 * 2)  # several blocks, also in float64, the last one shorter
    monkeypatch.setattr(token_log_probs, "TILE", 64)
    torch.manual_seed(0)
    hidden, weight = torch.randn(75, 24).to(dtype), torch.randn(300, 24).to(dtype)
    targets = torch.randint(300, (75,))
    targets[:20] = (hidden[:20].float() @ weight.float().T).argmax(1)
    truth = exactly(hidden, weight, targets, *settings, entropy=entropy)
    ours = values_and_gradients(token_log_probs.TokenLogProbs, hidden, weight, targets, *settings, entropy=entropy)
    theirs = values_and_gradients(ChunkedLogProbFunction, hidden, weight, targets, *settings, entropy=entropy)
    assert torch.equal(ours[2], theirs[2])
    assert ours[2].any()
    assert not ours[2].all()
    assert ours[3].dtype == dtype
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        off, theirs_off = ((result.double() - true.double()).norm() / true.double().norm() for result in (mine, other))
        assert off <= 1.1 * theirs_off + 2e-7


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ("a bias", {"bias": torch.zeros(30)}),
        ("another dtype", {"weight": torch.randn(30, 8, dtype=torch.bfloat16)}),
        ("further outputs", {"outputs": ("log_probs", "log_sum_sq_probs")}),
        ("a trained weight", {"weight": torch.randn(30, 8, requires_grad=True)}),
    ],
)
def test_what_blocks_do_not_know_is_left_to_trl(change: str, arguments: dict[str, Any]) -> None:
    usual = {"bias": None, "weight": torch.randn(30, 8), "outputs": ("log_probs",), **arguments}
    hidden, targets = torch.randn(5, 8), torch.randint(30, (5,))
    rest = (usual["weight"], usual["bias"], targets, 1.0, 16, None, 1.0, usual["outputs"])
    ours = token_log_probs.TokenLogProbs.apply(hidden, *rest)
    theirs = ChunkedLogProbFunction.apply(hidden, *rest)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)
