from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_architectures import ARCHITECTURES
from torch import nn

from paca.bench.saved_activations import measure_saved_activations
from paca.lean import is_lean, make_lean, undo_lean

RECOMPUTE = [None, "mlp"]
LORA = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False}


def lora(model: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(**{**LORA, **options}))


def assert_same_step(got, want, factor: float = 37) -> None:
    """Equal logits; gradients equal up to the roundings of the widest sum, relative to the largest of each tensor."""
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        tolerance = factor * torch.finfo(gradient.dtype).eps * (gradient.abs().max() + 1e-6)
        assert (got[1][name] - gradient).abs().max() <= tolerance, name


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_composes_with_lora_in_either_order(tiny_model, run, architecture, recompute):
    want = run(lora(tiny_model(architecture)))
    assert_same_step(run(make_lean(lora(tiny_model(architecture)), recompute)), want)
    model = lora(make_lean(tiny_model(architecture), recompute))
    assert_same_step(run(model), want)
    assert_same_step(run(undo_lean(model)), want, factor=0)
    merged = make_lean(model, recompute).merge_and_unload()
    assert is_lean(merged)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_trained_norms_and_lora_dropout(tiny_model, run, architecture):
    norm = "post_attention_layernorm" if architecture == "llama" else "ln_2"
    options = {"lora_dropout": 0.3, "modules_to_save": [norm]}

    def step(model: nn.Module):
        torch.manual_seed(3)
        return run(model)

    want = step(lora(tiny_model(architecture), **options))
    for model in (
        make_lean(lora(tiny_model(architecture), **options), "mlp"),
        lora(make_lean(tiny_model(architecture), "mlp"), **options),
    ):
        assert_same_step(step(model), want)


def test_the_mlps_input_is_not_kept(tiny_model):
    sizes = {"hidden_size": 64, "intermediate_size": 224}
    for architecture in ("llama", "gemma3", "gpt2"):
        if architecture == "gpt2":
            sizes = {"n_embd": 64, "n_inner": 224}
        model = make_lean(tiny_model(architecture, torch.bfloat16, **sizes), "mlp").requires_grad_(False)
        x = torch.randn(1, 40, 64, dtype=torch.bfloat16, requires_grad=True)

        def kept(model: nn.Module = model, x: torch.Tensor = x) -> int:
            return measure_saved_activations(lambda: model(inputs_embeds=x, use_cache=False).logits, model).bytes

        with_source = kept()
        # A hook that hands on a copy: the norm's output can't be made again from its input, so it is kept.
        names = ("post_attention_layernorm", "pre_feedforward_layernorm", "ln_2")
        for name, module in model.named_modules():
            feeds = name.endswith("pre_feedforward_layernorm" if architecture == "gemma3" else names)
            if feeds:
                module.register_forward_hook(lambda module, args, output: output.clone())
        assert kept() == with_source + 2 * 40 * 64 * 2, architecture


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_that_change_the_norms_output_are_respected(tiny_model, run, in_place):
    def hook(module, args, output):
        return output.mul_(1.5) if in_place else output * 1.5

    model = tiny_model("llama").requires_grad_(False)
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(hook)
    want = run(model)
    assert_same_step(run(make_lean(model, "mlp")), want)


def test_hooks_on_gate_run_again(tiny_model, run):
    model = tiny_model("llama")
    gate = model.model.layers[0].mlp.gate_proj
    gate.register_forward_hook(lambda module, args, output: output.tanh())
    want = run(model)
    assert_same_step(run(make_lean(model, "mlp")), want)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "opt", "gpt2"])
def test_composes_with_activation_checkpointing(tiny_model, run, architecture, use_reentrant, recompute):
    model = lora(tiny_model(architecture))
    want = run(model)
    make_lean(model, recompute)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_step(run(model), want)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast(tiny_model, run, architecture, recompute):
    model = lora(tiny_model(architecture))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model)

    want = step()
    make_lean(model, recompute)
    got = step()
    assert torch.equal(got[0], want[0])
    for name, gradient in want[1].items():
        # Gradients are float32, but passed through bfloat16 in every linear layer.
        assert (got[1][name] - gradient).norm() <= 2 * torch.finfo(torch.bfloat16).eps * gradient.norm(), name


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_autocast_leaves_float64_alone(tiny_model, run, architecture):
    model = tiny_model(architecture).double()

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model)

    want = step()
    make_lean(model)
    got = step()
    assert got[0].dtype == torch.float64
    assert torch.equal(got[0], want[0])
    for name, gradient in want[1].items():
        # The norms compute in float32, also in float64 models.
        assert (got[1][name] - gradient).norm() <= 8 * torch.finfo(torch.float32).eps * gradient.norm(), name


def test_frozen_input_and_unused_gradient(tiny_model):
    """Token ids under a frozen embedding: the first MLP's input requires no grad, only its adapters do."""
    tokens = torch.arange(1, 11).view(2, 5)

    def step(model: nn.Module):
        logits = model(tokens, use_cache=False).logits
        logits.sum().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    options = {"target_modules": r".*layers\.0\.mlp\.(gate|up|down)_proj"}
    want = step(lora(tiny_model("llama"), **options))
    assert_same_step(step(make_lean(lora(tiny_model("llama"), **options), "mlp")), want)


def test_backward_twice_through_a_retained_graph(tiny_model):
    model = make_lean(lora(tiny_model("llama")), "mlp")
    x = torch.randn(2, 5, 24, requires_grad=True)
    loss = model(inputs_embeds=x, use_cache=False).logits.sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


def test_changes_between_forward_and_backward_raise(tiny_model):
    def start() -> tuple[nn.Module, torch.Tensor]:
        model = make_lean(lora(tiny_model("llama")), "mlp")
        x = torch.randn(1, 5, 24, requires_grad=True)
        return model, model(inputs_embeds=x, use_cache=False).logits.sum()

    model, loss = start()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="adapters were"):
        loss.backward()

    model, loss = start()
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.gate_proj.lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()

    model, loss = start()
    model.base_model.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="hooks were added"):
        loss.backward()

    model, loss = start()
    with torch.no_grad(), model.disable_adapter():  # the reference model of DPO: back to the same state afterwards
        model(inputs_embeds=torch.randn(1, 5, 24))
    loss.backward()


def test_state_is_not_shared_between_copies(tiny_model, run):
    model = make_lean(lora(tiny_model("qwen3")), "mlp")
    want = run(model)
    assert_same_step(run(copy.deepcopy(model)), want, factor=0)


@pytest.mark.slow(reason="compiles")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_compiles_without_graph_breaks_and_stays_lean(tiny_model, architecture, recompute):
    """With the partitioner that inductor uses, and without inductor: what it keeps is decided there."""
    model = lora(tiny_model(architecture), target_modules=[{"gpt2": "c_attn"}.get(architecture, "o_proj")])
    eager = copy.deepcopy(model)
    make_lean(model, recompute)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(2, 9, 24, requires_grad=True)

    def step(module: nn.Module):
        module.zero_grad()
        x.grad = None
        logits = module(inputs_embeds=x, use_cache=False).logits
        logits.sum().backward()
        return logits.detach(), x.grad.clone()

    for got, want in zip(step(compiled), step(eager), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    step(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    def kept(module: nn.Module) -> int:
        return measure_saved_activations(lambda: module(inputs_embeds=x, use_cache=False).logits, model).bytes

    # Flattened or transposed, the compiler keeps the same bytes, and a few constants of its own.
    assert kept(compiled) <= 1.1 * kept(model)
