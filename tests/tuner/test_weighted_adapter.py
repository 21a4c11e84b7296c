"""Weighted sums of adapters, and several adapters at once."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

import paca
from models import adapt, gpt2, llama, perceptron, tokens
from paca.columns.state import AdapterColumns
from paca.layers import PacaLayer, paca_layers
from paca.tuner.weighted import weighted_sum


def three_adapters(kind="linear", dtype=torch.float32, scales=(2.0, 0.5, 1.0)):
    """Ranks 3, 5 and 2; `second` shares columns with `default`, `third` is in lin2 only and shares none there."""
    columns = {
        "default": {"lin1": [0, 2, 5], "lin2": [0, 1, 2]},
        "second": {"lin1": [1, 2, 3, 4, 5], "lin2": [2, 3, 4, 5, 6]},
        "third": {"lin2": [10, 11]},
    }
    model = None
    for (name, indices), scale in zip(columns.items(), scales, strict=True):
        r = len(indices["lin2"])
        settings = {"r": r, "paca_alpha": scale * r, "indices": indices, "target_modules": list(indices)}
        if model is None:
            model = adapt(perceptron(kind, dtype), name, **settings)
        else:
            model.add_adapter(name, paca.PacaConfig(init_weights=False, **settings))
    return model


def inputs(dtype=torch.float32):
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense(model, names, weights):
    """Each layer's weight with the weighted adapters, in float64."""
    result = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, PacaLayer):
            weight = layer.base_layer.state_dict()["weight"].double()
            for adapter, w in zip(names, weights, strict=True):
                if adapter in layer.paca_delta:
                    weight = weight + w * layer.get_delta_weight(adapter).double()
            result[name] = weight
    return result


def resident(model):
    """Each layer's weight as a forward pass sees it."""
    paca.refresh(model)
    return {
        name: layer.base_layer.weight.detach().clone()
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, PacaLayer)
    }


# -- the sum itself -------------------------------------------------------------------------------------------------


def test_the_sum_has_the_union_of_columns():
    a = AdapterColumns("a", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 4]), 0.5)
    b = AdapterColumns("b", torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]), torch.tensor([0, 1, 7]), 2.0)
    got = weighted_sum([a, b], [3.0, -1.0], torch.float32)
    assert got.indices.tolist() == [0, 1, 4, 7]
    assert got.delta.tolist() == [[-20.0, 1.5 - 40.0, 3.0, -60.0], [-80.0, 4.5 - 100.0, 6.0, -120.0]]


def test_columns_of_a_convolution_are_summed():
    first, second = (torch.randn(4, r, 3, 2, dtype=torch.float64) for r in (2, 3))
    a = AdapterColumns("a", first, torch.tensor([1, 4]), 0.5)
    b = AdapterColumns("b", second, torch.tensor([0, 4, 7]), 2.0)
    got = weighted_sum([a, b], [1.0, 1.0], torch.float64)
    want = torch.stack([2 * second[:, 0], first[:, 0] / 2, first[:, 1] / 2 + 2 * second[:, 1], 2 * second[:, 2]], 1)
    assert torch.equal(got.delta, want)


def test_the_sum_is_rounded_once():
    tiny = AdapterColumns("a", torch.tensor([[2.0**-24]]), torch.tensor([3]), 1.0)
    one = AdapterColumns("b", torch.tensor([[1.0]]), torch.tensor([3]), 1.0)
    got = weighted_sum([one, tiny, tiny], [1.0, 1.0, 1.0], torch.float32)
    assert got.delta.item() == 1.0 + 2.0**-23  # in float32, each addition alone would round to 1


# -- in a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.3, 1.9), (0.0, 1.0, -2.0)])
@torch.no_grad()
def test_the_sum_changes_the_weights_as_the_adapters_do_together(kind, dtype, weights):
    model = three_adapters(kind, dtype)
    names = ["default", "second", "third"]
    model.add_weighted_adapter(names, weights, "sum")
    assert model.active_adapters == ["default"]
    want = dense(model, names, weights)
    model.set_adapter("sum")
    for name, got in resident(model).items():
        # Once in the delta (float32 or wider), once in the weight.
        bound = torch.finfo(dtype).eps * want[name].abs() + 1e-7 * (want[name].abs() + 3) * (dtype != torch.float64)
        assert bool(((got.double() - want[name]).abs() <= bound + 1e-15).all())
    assert {layer.scaling["sum"] for layer in paca_layers(model)} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_shared_columns_and_with_powers_of_two_the_sum_is_bitwise(dtype):
    model = three_adapters(dtype=dtype)
    names = ["default", "third"]
    model.add_weighted_adapter(names, [1, 1], "sum")
    model.base_model.set_adapter(names)
    together = resident(model)
    y = model(inputs(dtype))
    model.set_adapter("sum")
    for name, weight in resident(model).items():
        assert torch.equal(weight, together[name])
    assert torch.equal(model(inputs(dtype)), y)


@torch.no_grad()
def test_one_adapter_can_be_copied_scaled_and_taken_away_again():
    model = three_adapters()
    x = inputs()
    with model.disable_adapter():
        base = model(x)
    model.add_weighted_adapter(["second"], [1.0], "twin", combination_type="linear")
    model.add_weighted_adapter(["second", "twin"], [1.0, -1.0], "nothing")
    model.add_weighted_adapter(["second"], [-1.0], "minus")
    model.set_adapter("second")
    want = model(x)
    model.set_adapter("twin")
    assert torch.equal(model(x), want)
    model.set_adapter("nothing")
    assert torch.equal(model(x), base)
    model.base_model.set_adapter(["minus", "second"])
    torch.testing.assert_close(model(x), base)  # (W - d) + d in float32: not always W to the last bit


def changes(model, names):
    """What each adapter adds to each weight, whole, in float64."""
    with model.disable_adapter():
        base = {name: weight.double() for name, weight in resident(model).items()}
    found = []
    for name in names:
        model.set_adapter(name)
        found.append({key: weight.double() - base[key] for key, weight in resident(model).items()})
    return base, found


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("method", ["total", "frequency"])
@torch.no_grad()
def test_ties_averages_where_the_kept_values_of_adapters_have_the_sign_of_most(kind, method):
    model = three_adapters(kind, torch.float64)
    names, weights = ["default", "second", "third"], [1.0, 2.0, 0.5]
    base, each = changes(model, names)
    settings = {"combination_type": "ties", "density": 0.5, "majority_sign_method": method}
    model.add_weighted_adapter(names, weights, "sum", **settings)
    model.set_adapter("sum")
    for layer_name, got in resident(model).items():
        kept = []
        for change in (one[layer_name] for one in each):
            own = change.flatten()[change.flatten() != 0]
            if own.numel():  # not each has this layer
                smallest = own.abs().sort(descending=True).values[int(0.5 * own.numel()) - 1]
                kept.append(torch.where(change.abs() >= smallest, change, 0))
            else:
                kept.append(change)
        voices = torch.stack(kept if method == "total" else [one.sign() for one in kept]).sum(0)
        right = [one.sign() == torch.where(voices >= 0, 1, -1) for one in kept]
        total = sum(w * torch.where(ok, one, 0) for w, ok, one in zip(weights, right, kept, strict=True))
        want = base[layer_name] + total / sum(ok.double() for ok in right).clamp(min=1)
        torch.testing.assert_close(got.double(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties", "magnitude_prune"])
@torch.no_grad()
def test_pruned_sums_keep_a_share_of_each_adapter(combination):
    model = three_adapters(dtype=torch.float64)
    base, (each,) = changes(model, ["second"])
    torch.manual_seed(0)
    model.add_weighted_adapter(["second"], [2.0], "sum", combination_type=combination, density=0.25)
    model.set_adapter("sum")
    for name, got in resident(model).items():
        change, own = got.double() - base[name], each[name]
        left = change.abs() > 1e-12
        scale = 2.0 if combination == "magnitude_prune" else 2.0 / 0.25  # what DARE leaves stands for all
        torch.testing.assert_close(change[left], scale * own[left], rtol=1e-9, atol=1e-12)
        share = left.sum() / (own != 0).sum()
        assert 0.05 < share < 0.5
        if combination == "magnitude_prune":
            assert own[left].abs().min() >= own[~left].abs().max()


@torch.no_grad()
def test_with_all_values_kept_a_pruned_sum_is_the_sum():
    model = three_adapters(dtype=torch.float64)
    names, weights = ["default", "second", "third"], [1.0, -0.5, 2.0]
    model.add_weighted_adapter(names, weights, "sum")
    model.add_weighted_adapter(names, weights, "all", combination_type="dare_linear", density=1)
    outputs = {}
    for name in ("sum", "all"):
        model.set_adapter(name)
        outputs[name] = model(inputs(torch.float64))
    torch.testing.assert_close(outputs["sum"], outputs["all"], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_scale_that_was_set_counts():
    model = three_adapters()
    for layer in paca_layers(model):
        layer.set_scale("default", 0.25)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    y = model(inputs())
    model.set_adapter("sum")
    assert torch.equal(model(inputs()), y)


@torch.no_grad()
def test_the_sum_is_in_the_adapters_layers_and_no_others():
    model = three_adapters()
    model.add_weighted_adapter(["third"], [1.0], "sum")
    layers = {n for n, m in model.named_modules() if hasattr(m, "paca_delta") and "sum" in m.paca_delta}
    assert layers == {"base_model.model.lin2"}

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)
            self.inner = nn.Sequential()
            self.inner.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner.lin(self.lin(x))

    model = adapt(Nested(), target_modules="lin")
    assert len(paca_layers(model)) == 1
    model.add_adapter("second", paca.PacaConfig(r=2, target_modules=r"inner\.lin", init_weights=False))
    model.add_weighted_adapter(["default"], [2.0], "sum")
    layers = {n for n, m in model.named_modules() if hasattr(m, "paca_delta") and "sum" in m.paca_delta}
    assert layers == {"base_model.model.lin"}


def other_adapters(model):
    for seed, r in ((1, 2), (2, 9)):
        model.add_adapter(f"seed{seed}", paca.PacaConfig(r=r, random_seed=seed, init_weights=False))
    return model.eval()


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_the_sum_is_saved_and_loaded_with_the_rank_of_each_layer(tmp_path, make):
    model = other_adapters(adapt(make(), task_type="CAUSAL_LM", r=6))
    model.add_weighted_adapter(["default", "seed1", "seed2"], [1.0, -0.5, 0.25], "sum")
    model.set_adapter("sum")
    want = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    ranks = {layer.r["sum"] for layer in paca_layers(model)}
    assert len(ranks) > 1
    assert config["peft_type"] == "PACA"
    assert {config["r"], *config["rank_pattern"].values()} == ranks
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["indices"] is None
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "sum")
    assert torch.equal(loaded(input_ids=tokens()).logits, want)
    for mine, theirs in zip(paca_layers(model), paca_layers(loaded), strict=True):
        assert torch.equal(mine.paca_indices["sum"], theirs.paca_indices["default"])
        assert theirs.scaling["default"] == 1.0


def test_the_sum_can_be_trained_further():
    model = three_adapters()
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".sum"))
    model.set_adapter("sum")
    losses = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        loss = model(inputs()).square().sum()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{lin}.paca_delta.sum" for lin in ("lin1", "lin2")
    }


@torch.no_grad()
def test_a_module_that_one_adapter_trained_whole_is_taken_over():
    torch.manual_seed(0)
    model = adapt(LlamaForSequenceClassification(llama().config), modules_to_save=["score"], target_modules=["q_proj"])
    model.add_adapter("plain", paca.PacaConfig(r=2, init_weights=False, target_modules=["v_proj"]))
    score = model.base_model.model.score
    score.modules_to_save["default"].weight.normal_()
    model.add_weighted_adapter(["plain", "default"], [0.5, 1], "sum")
    assert torch.equal(score.modules_to_save["sum"].weight, score.modules_to_save["default"].weight)
    assert model.peft_config["sum"].modules_to_save == ["score"]
    with pytest.raises(ValueError, match=r"score is trained whole \(modules_to_save\) by default, sum"):
        model.add_weighted_adapter(["default", "sum"], [1, 1], "more")
    with pytest.raises(ValueError, match="At most one of the adapters may have it, with weight 1"):
        model.add_weighted_adapter(["default"], [0.5], "more")
    assert set(model.peft_config) == {"default", "plain", "sum"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": ["default", "nobody"]}, "no adapter 'nobody'; loaded are default, second, third"),
        ({"weights": [1.0]}, "one weight per adapter; got 2 adapters and 1 weights"),
        ({"adapters": [], "weights": []}, "got 0 adapters and 0 weights"),
        ({"weights": [1.0, float("nan")]}, "weight of adapter 'second' must be a finite number; got nan"),
        ({"weights": [1.0, "1"]}, "must be a finite number; got '1'"),
        ({"adapter_name": "third"}, "an adapter 'third' already"),
        (
            {"combination_type": "ties_svd"},
            "'ties_svd' is not there for PaCA.*'cat' or 'linear'.*'ties', 'dare_linear'",
        ),
        ({"combination_type": "ties"}, "combination_type='ties' needs density, the share .* got None"),
        ({"combination_type": "dare_linear", "density": 1.5}, "above 0, 1 at most; got 1.5"),
        (
            {"combination_type": "dare_ties", "density": 0.5, "majority_sign_method": "most"},
            "majority_sign_method must be 'total' or 'frequency'; got 'most'",
        ),
        ({"combination_type": "svd"}, "combination_type='svd' is not there for PaCA"),
    ],
)
def test_what_can_not_be_summed_is_refused_and_adds_nothing(change, message):
    model = three_adapters()
    arguments = {"adapters": ["default", "second"], "weights": [1.0, 2.0], "adapter_name": "sum"}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{**arguments, **change})
    assert set(model.peft_config) == {"default", "second", "third"}


# -- several adapters at once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@torch.no_grad()
def test_several_adapters_of_other_ranks_and_shared_columns_are_saved_and_loaded_each(tmp_path, kind):
    model = three_adapters(kind)
    names = ["default", "second", "third"]
    model.save_pretrained(tmp_path)
    places = {"default": tmp_path, "second": tmp_path / "second", "third": tmp_path / "third"}
    loaded = peft.PeftModel.from_pretrained(perceptron(kind), places["third"], adapter_name="third")
    for name in ("second", "default"):
        loaded.load_adapter(places[name], name)
    x = inputs()
    for active in (["second"], names, ["third", "default"], list(reversed(names))):
        model.base_model.set_adapter(active)
        loaded.base_model.set_adapter(active)
        want = dense(model, active, [1] * len(active))
        for weights in (resident(model), resident(loaded)):
            for name, weight in weights.items():
                torch.testing.assert_close(weight, want[name].float(), rtol=3e-7, atol=3e-7)  # summed in float32
        assert torch.equal(model(x), loaded(x))


def test_several_active_adapters_train_their_shared_columns_each():
    model = three_adapters()
    model.base_model.set_adapter(["default", "second"])
    model(inputs()).square().sum().backward()
    for layer in paca_layers(model):
        first, second = (layer.paca_indices[n].tolist() for n in ("default", "second"))
        shared = sorted(set(first) & set(second))
        assert shared
        mine = layer.paca_delta["default"].grad[:, [first.index(c) for c in shared]] / layer.scaling["default"]
        theirs = layer.paca_delta["second"].grad[:, [second.index(c) for c in shared]] / layer.scaling["second"]
        torch.testing.assert_close(mine, theirs)
