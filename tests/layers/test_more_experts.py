"""PaCA on stacks of experts of families with code of their own, partly outside of transformers' interface."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from models import adapt, base_state, tokens
from paca.layers import PacaExpertStack

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES: dict[str, tuple[str | None, dict[str, Any], list[str]]] = {
    "llama4": (
        "llama4_text",
        {**EXPERTS, "intermediate_size": 48, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}
        | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16},
        STACKS,
    ),
    "jetmoe": (
        "jetmoe",
        {**EXPERTS, "intermediate_size": 48, "kv_channels": 16, "num_key_value_heads": 2, "num_hidden_layers": 2},
        ["mlp.input_linear.weight", "mlp.output_linear.weight", "experts.output_linear.weight"],
    ),
    "longcat_flash": (
        "longcat_flash",
        {**LATENT, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 48, "n_routed_experts": 4, "zero_expert_num": 2}
        | {"moe_topk": 2, "head_dim": 16, "num_layers": 2},
        STACKS,
    ),
    "step3p7": (
        None,
        {**EXPERTS, "intermediate_size": 64, "moe_intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
        | {"num_attention_groups": 2, "mlp_layer_types": ["sparse"] * 2, "sliding_window": 8},
        STACKS,
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    if kind is None:
        model: Any = Step3p7TextModel(Step3p7TextConfig(**{**SIZES, **sizes}))
    else:
        model = AutoModel.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.15)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # torch's grouped kernel has no float64
    return model.to(dtype).eval()


def adapted(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return adapt(model_of(family, dtype), **{"target_parameters": FAMILIES[family][2], **settings})


def stacks(model: Any) -> dict[str, PacaExpertStack]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PacaExpertStack)}


def hidden(model: Any) -> torch.Tensor:
    return model(input_ids=tokens()).last_hidden_state


def loss_of(model: Any) -> torch.Tensor:
    y = hidden(model)
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y.double() - wanted).square().mean()


def columns_of(places: dict[str, nn.Parameter], name: str, layer: PacaExpertStack) -> torch.Tensor:
    """The gradient that the delta would have, from that of the whole stack of the merged model."""
    dense = places[name.removeprefix("base_model.model.")].grad
    assert dense is not None
    dense = dense if layer.base_layer.input_dim == -1 else dense.mT
    return layer.scaling["default"] * dense[:, :, layer.paca_indices["default"]]


def merged_to_train(model: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    twin = copy.deepcopy(model).merge_and_unload()
    places = dict(twin.named_parameters())
    for name in stacks(model):
        places[name.removeprefix("base_model.model.")].requires_grad_()
    return twin, places


@every_family
def test_outputs_and_gradients_equal_those_of_the_whole_stacks(family: str) -> None:
    model = adapted(family, torch.float64)
    assert stacks(model)
    twin, places = merged_to_train(model)
    loss_of(twin).backward()
    assert torch.equal(hidden(model), hidden(twin))
    loss_of(model).backward()
    for name, layer in stacks(model).items():
        expected = columns_of(places, name, layer)
        assert expected.abs().max() > 0
        torch.testing.assert_close(layer.paca_delta["default"].grad, expected, rtol=1e-9, atol=1e-15)


@every_family
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bfloat16_agree_to_its_precision(family: str, autocast: bool) -> None:
    model = adapted(family, torch.float32 if autocast else torch.bfloat16)
    twin, places = merged_to_train(model)
    for each in (model, twin):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss_of(each).backward()
    for name, layer in stacks(model).items():
        gradient, want = layer.paca_delta["default"].grad, columns_of(places, name, layer).float()
        assert gradient.dtype == torch.float32
        assert (gradient - want).norm() < 0.01 * want.norm()


@every_family
def test_a_step_changes_what_is_computed_and_everything_can_be_put_back(family: str) -> None:
    base = model_of(family)
    names, want = list(base.state_dict()), hidden(base).detach()
    model = adapt(base, target_parameters=FAMILIES[family][2], init_weights=True)
    torch.testing.assert_close(hidden(model), want, rtol=0, atol=0)
    originals = base_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(hidden(model), want)
    trained = hidden(model).detach()
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(hidden(merged), trained, rtol=0, atol=0)
    assert torch.equal(hidden(model.unload()), want)


@every_family
def test_saving_and_loading_gives_the_same_model(family: str, tmp_path: Any) -> None:
    model = adapted(family)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(family), tmp_path)
    assert torch.equal(hidden(again), hidden(model))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "jetmoe"])  # which has none
def test_checkpointing_changes_no_gradient(family: str) -> None:
    kept, again = adapted(family, torch.float64).train(), adapted(family, torch.float64).train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (kept, again):
        loss_of(model).backward()
    for layer, other in zip(stacks(kept).values(), stacks(again).values(), strict=True):
        assert torch.equal(layer.paca_delta["default"].grad, other.paca_delta["default"].grad)


def test_of_the_input_of_all_experts_only_the_columns_are_kept() -> None:
    layer = next(iter(stacks(adapted("llama4")).values()))
    x, sizes = torch.randn(4, 40, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        torch.bmm(x, layer).sum().backward()
    assert max(sizes) == 4 * 40 * 3
    assert x.grad is not None


def test_a_batch_of_several_adapters_is_refused_where_a_token_is_in_several_rows() -> None:
    model = adapted("llama4")
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(ValueError, match="can't be told which adapter each has"):
        model(input_ids=tokens(2), adapter_names=["default", "other"])
