"""Hot swap in every kind of layer: the swapped model is the one that loads the folder."""

from __future__ import annotations

import peft
import pytest
import torch
from accelerate import cpu_offload

import paca
from expert_models import FAMILIES, STACKS, mixtral
from layers.small_networks import NETWORKS, TARGETS, example, network
from models import adapt, llama, tokens
from paca.layers import paca_layers
from quantized_layers import REAL, Stack, forward_only_stack, stack

FORWARD_ONLY = "gptqmodel.nn_modules.qlinear.torch"


def swapped_and_loaded(make, folder, run, **settings):
    """A model whose adapter was swapped after it ran, and one that loaded the folder."""
    torch.manual_seed(9)
    adapt(make(), random_seed=5, paca_alpha=1.5, **settings).save_pretrained(folder)
    torch.manual_seed(7)
    model = adapt(make(), **settings).eval()
    before = run(model).detach()  # the first adapter's columns are in the weights
    own = [(layer.paca_delta["default"], layer.paca_indices["default"]) for layer in paca_layers(model)]
    paca.hotswap_adapter(model, folder, "default")
    for layer, (delta, indices) in zip(paca_layers(model), own, strict=True):
        assert layer.paca_delta["default"] is delta
        assert layer.paca_indices["default"] is indices
    assert not torch.allclose(run(model), before)
    return model, peft.PeftModel.from_pretrained(make(), folder).eval()


def gradients(model, run):
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad_("paca_delta" in name)
    run(model).square().sum().backward()
    return [layer.paca_delta["default"].grad for layer in paca_layers(model)]


def check(make, folder, run, **settings):
    model, loaded = swapped_and_loaded(make, folder, run, **settings)
    assert torch.equal(run(model), run(loaded))
    for got, want in zip(gradients(model, run), gradients(loaded, run), strict=True):
        assert torch.equal(got, want)
    with torch.no_grad(), model.disable_adapter(), loaded.disable_adapter():
        assert torch.equal(run(model), run(loaded))


@pytest.mark.parametrize("kind", NETWORKS)
def test_convolutions_and_embeddings(kind, tmp_path):
    x = example(kind)
    check(lambda: network(kind), tmp_path, lambda model: model(x), r=2, target_modules=TARGETS)


@pytest.mark.parametrize("kind", [*REAL, FORWARD_ONLY])
def test_quantized_layers(kind, tmp_path):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def make():
        return stack(kind, torch.float32) if kind in REAL else forward_only_stack(kind)

    check(make, tmp_path, lambda model: model(x), target_modules=["lin1", "lin2"])


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8", "hqq"])
def test_columns_over_those_of_inference_tensors_which_have_no_version(kind, tmp_path):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def make(seed):
        torch.manual_seed(3)
        plain = Stack() if kind == "plain" else stack(kind, torch.float32)
        return adapt(plain, random_seed=seed, target_modules=["lin1", "lin2"])

    other = make(5)
    other.save_pretrained(tmp_path)
    its = {name: tensor.clone() for name, tensor in other.state_dict().items() if "paca_" in name}
    with torch.inference_mode():
        model, swapped = make(0), make(0)
        assert not torch.allclose(model(x), other(x))
        assert not torch.allclose(swapped(x), other(x))
        assert paca_layers(model)[0].paca_indices["default"].is_inference()
        model.load_state_dict(its, strict=False)
    paca.hotswap_adapter(swapped, tmp_path, "default")
    with torch.inference_mode():
        for one in (model, swapped):
            assert torch.equal(one(x), other(x))
            with one.disable_adapter(), other.disable_adapter():
                assert torch.equal(one(x), other(x))


def test_offloaded_layers(tmp_path):
    check(lambda: cpu_offload(llama().eval()), tmp_path, lambda model: model(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_of_experts(family, tmp_path):
    check(
        lambda: FAMILIES[family](), tmp_path, lambda model: model(input_ids=tokens()).logits, target_parameters=STACKS
    )


def test_a_pass_that_is_pending_over_a_quantized_weight_raises(tmp_path):
    for kind in ("nf4", FORWARD_ONLY):

        def make(kind=kind):
            return stack(kind, torch.float32) if kind in REAL else forward_only_stack(kind)

        adapt(make(), random_seed=5, target_modules=["lin1", "lin2"]).save_pretrained(tmp_path / kind)
        model = adapt(make(), target_modules=["lin1", "lin2"])
        loss = model(torch.randn(3, 64, requires_grad=True)).sum()
        paca.hotswap_adapter(model, tmp_path / kind, "default")
        with pytest.raises(RuntimeError, match="modified between forward and backward"):
            loss.backward()


def test_an_adapter_of_another_quantization_warns(tmp_path):
    adapt(stack("fp4", torch.float32), target_modules=["lin1", "lin2"]).save_pretrained(tmp_path)
    model = adapt(stack("int8", torch.float32), target_modules=["lin1", "lin2"])
    with pytest.warns(UserWarning, match=r"made for weights quantized as 'fp4.*but those of this model are 'int8'"):
        paca.hotswap_adapter(model, tmp_path, "default")


def test_other_ranks_of_a_stack_are_refused_and_nothing_is_changed(tmp_path):
    adapt(mixtral(), r=2, target_parameters=STACKS).save_pretrained(tmp_path)
    model = adapt(mixtral(), target_parameters=STACKS).eval()
    with torch.no_grad():
        want = model(input_ids=tokens()).logits
        with pytest.raises(ValueError, match=r"gate_up_proj has r=2 in the folder, but adapter 'default' has r=3"):
            paca.hotswap_adapter(model, tmp_path, "default")
        assert torch.equal(model(input_ids=tokens()).logits, want)
