"""Lean blocks around PaCA's own layers."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny_architectures import ARCHITECTURES
from torch import nn

import paca
from paca.bench.saved_activations import measure_saved_activations
from paca.lean import make_lean

RECOMPUTE = [None, "mlp"]


def adapted(model: nn.Module, r: int = 5, lean_first: bool = False, recompute: str | None = None) -> nn.Module:
    if lean_first:
        make_lean(model, recompute)
    model = get_peft_model(model, paca.PacaConfig(r=r, paca_alpha=2 * r, target_modules="all-linear"))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def assert_same_step(got, want) -> None:
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        # bf16 and float32 alike: a few roundings on the way, relative to the largest gradient of the tensor.
        tolerance = 8 * torch.finfo(gradient.dtype).eps * gradient.abs().max()
        if name != "embeddings":  # δ is float32 behind activations of the model's dtype
            tolerance = 8 * torch.finfo(want[0].dtype).eps * gradient.abs().max()
        assert (got[1][name] - gradient).abs().max() <= 4 * tolerance + 1e-6, name


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_composes_in_either_order(tiny_model, run, architecture, dtype, recompute):
    want = run(adapted(tiny_model(architecture, dtype)))
    assert_same_step(run(make_lean(adapted(tiny_model(architecture, dtype)), recompute)), want)
    assert_same_step(run(adapted(tiny_model(architecture, dtype), lean_first=True, recompute=recompute)), want)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_training_follows_the_same_curve(tiny_model, run, recompute):
    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for step in range(6):
            torch.manual_seed(step)
            tokens = torch.randint(1, 31, (2, 9))
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            if step % 2:  # two micro-batches a step
                optimizer.step()
                optimizer.zero_grad()
            curve.append(loss.item())
        return curve

    want = losses(adapted(tiny_model("llama")))
    got = losses(make_lean(adapted(tiny_model("llama")), recompute))
    assert want[0] != want[-1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_reference_pass_between_forward_and_backward(tiny_model):
    """DPO: policy forward, reference forward without the adapter, policy backward."""
    gradients = []
    for recompute in RECOMPUTE:
        model = make_lean(adapted(tiny_model("llama")), recompute)
        torch.manual_seed(5)
        x = torch.randn(2, 5, 24, requires_grad=True)
        loss = model(inputs_embeds=x, use_cache=False).logits.sum()
        with torch.no_grad(), model.disable_adapter():
            reference = model(inputs_embeds=x, use_cache=False).logits
        assert not torch.equal(reference.sum(), loss)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_llama_shaped_blocks_meet_the_targets(tiny_model):
    """DESIGN section 6, with the adapters on: r / h is 8 / 256 here, twice the 64 / 4096 of a 7B model."""
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}
    x = torch.randn(1, 64, 256, dtype=torch.bfloat16, requires_grad=True)

    def kept(model: nn.Module) -> int:
        return measure_saved_activations(lambda: model(inputs_embeds=x, use_cache=False)[0], model).bytes

    def model() -> nn.Module:
        return tiny_model("llama", torch.bfloat16, num_hidden_layers=4, **sizes).requires_grad_(False).model

    frozen = kept(model())
    partly = adapted(model(), r=8)
    assert kept(make_lean(partly)) <= 0.70 * frozen
    assert kept(make_lean(partly, "mlp")) <= 0.32 * frozen


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_mixed_batches_train_in_lean_blocks(tiny_model, recompute):
    def gradients(lean: bool) -> list[torch.Tensor]:
        model = adapted(tiny_model("llama", torch.float32)).eval()
        model.add_adapter("other", paca.PacaConfig(r=3, target_modules="all-linear", init_weights=False))
        model.set_requires_grad(["default", "other"])
        if lean:
            make_lean(model, recompute)
        torch.manual_seed(0)
        tokens = torch.randint(1, 31, (2, 9))
        model(input_ids=tokens, labels=tokens, adapter_names=["default", "other"]).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want)
