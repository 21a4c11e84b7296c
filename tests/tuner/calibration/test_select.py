from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import paca
from expert_models import STACKS, mixtral
from models import Perceptron, gpt2, llama, perceptron, tokens
from paca.columns.selection import FROM_BATCHES, STRATEGIES
from paca.tuner.calibration.observers import Observer
from paca.tuner.calibration.selecting import collect_scores
from paca.tuner.calibration.targets import find_targets
from quantized_layers import forward_only_stack, stack
from tuner.calibration.naive import Convolutions, best, reference_gradient_norms, reference_inputs

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def padded_batches() -> list[dict[str, Tensor]]:
    """Left padding, right padding, and none."""
    made = []
    for seed, padding in ((0, slice(0, 4)), (1, slice(6, 9)), (2, slice(0, 0))):
        ids = tokens(2, 9, seed)
        mask = torch.ones_like(ids)
        mask[0, padding] = 0
        labels = ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)  # padding predicts nothing
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def scores_of(model: Any, strategy: str, batches: Any, **settings: Any) -> dict[str, Tensor]:
    config = paca.PacaConfig(r=1, selection=strategy, **settings)
    return collect_scores(model, find_targets(model, config), strategy, batches, progress=False)


@pytest.mark.parametrize("strategy", FROM_BATCHES)
def test_scores_are_those_of_the_naive_reference_without_padding(strategy):
    model, batches = llama().double(), padded_batches()
    scores = scores_of(model, strategy, batches, target_modules=["q_proj", "down_proj"])
    assert len(scores) == 4
    for name in (Q, DOWN):
        x = reference_inputs(model, name, batches)
        expected = {
            "activation_norm": lambda x=x: x.norm(dim=0),
            "activation_variance": lambda x=x: x.var(0, correction=0),
            "gradient_norm": lambda name=name: reference_gradient_norms(model, name, batches),
        }[strategy]()
        torch.testing.assert_close(scores[name], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("strategy", FROM_BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_accumulated_in_float64(strategy, dtype):
    model, batches = llama().to(dtype), padded_batches()
    score = scores_of(model, strategy, batches, target_modules=["q_proj"])[Q]
    assert score.dtype == torch.float64
    if strategy == "gradient_norm":  # the model's own arithmetic differs from the reference's by its dtype
        reference = reference_gradient_norms(model, Q, batches)
        torch.testing.assert_close(score, reference, rtol=8 * torch.finfo(dtype).eps, atol=0)
    else:
        x = reference_inputs(model, Q, batches)
        expected = x.norm(dim=0) if strategy == "activation_norm" else x.var(0, correction=0)
        torch.testing.assert_close(score, expected, rtol=1e-9, atol=0)


def test_a_causal_model_without_labels_learns_its_input_but_not_the_padding():
    model = llama().double()
    with_labels = padded_batches()
    without = [{k: v for k, v in batch.items() if k != "labels"} for batch in with_labels]
    one, other = (scores_of(model, "gradient_norm", b, target_modules=["q_proj"]) for b in (with_labels, without))
    assert torch.equal(one[Q], other[Q])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [1, 5, 32])
def test_select_lists_sorted_columns_of_every_layer_and_get_peft_model_takes_them(strategy, r):
    config = paca.PacaConfig(r=r, selection=strategy, target_modules=["q_proj", "o_proj"])
    selected = paca.select(llama(), config, padded_batches(), progress=False)
    assert config.indices is None
    assert selected.selection == strategy
    assert len(selected.indices) == 4
    model = peft.get_peft_model(llama(), selected)
    for name, columns in selected.indices.items():
        assert columns == sorted(set(columns))
        assert len(columns) == r
        assert model.base_model.model.get_submodule(name).paca_indices["default"].tolist() == columns


def test_the_default_targets_stay_those_of_the_config_without_indices():
    selected = paca.select(llama(), paca.PacaConfig(r=2, selection="activation_norm"), padded_batches())
    plain = peft.get_peft_model(llama(), paca.PacaConfig(r=2))
    assert peft.get_peft_model(llama(), selected).targeted_module_names == plain.targeted_module_names
    assert list(selected.indices) == plain.targeted_module_names


def test_ranks_by_pattern_and_columns_by_hand_are_kept():
    config = paca.PacaConfig(
        r=3,
        selection="activation_norm",
        target_modules=["q_proj", "k_proj"],
        rank_pattern={"k_proj": 2},
        indices={"layers.0.self_attn.q_proj": [7, 1]},
    )
    selected = paca.select(llama(), config, padded_batches())
    assert {name: len(columns) for name, columns in selected.indices.items()} == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 3,
        "model.layers.0.self_attn.k_proj": 2,
        "model.layers.1.self_attn.k_proj": 2,
    }
    assert selected.indices["model.layers.0.self_attn.q_proj"] == [1, 7]


def test_columns_come_in_the_order_of_their_scores():
    model = llama().double()
    x = reference_inputs(model, Q, padded_batches())
    config = paca.PacaConfig(r=6, selection="activation_variance", target_modules=["q_proj"])
    assert paca.select(model, config, padded_batches()).indices[Q] == best(x.var(0, correction=0), 6)


# -- other layers -------------------------------------------------------------------------------------------------


def test_a_conv1d_and_its_weight_norm():
    model = gpt2().double()
    name, ids = "transformer.h.0.mlp.c_fc", tokens(2, 6)
    batches = [{"input_ids": ids, "labels": ids}]
    expected = reference_gradient_norms(model, name, batches, input_dim=0)
    found = scores_of(model, "gradient_norm", batches, target_modules=["c_fc"])[name]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    selected = paca.select(model, paca.PacaConfig(r=4, selection="weight_norm", target_modules=["c_fc"]))
    assert selected.indices[name] == best(model.transformer.h[0].mlp.c_fc.weight.norm(dim=1), 4)


@pytest.mark.parametrize("strategy", FROM_BATCHES)
def test_an_embedding_is_scored_by_the_values_it_looks_up(strategy):
    model, name = llama(pad_token_id=0).double(), "model.embed_tokens"
    batches = padded_batches()
    score = scores_of(model, strategy, batches, target_modules=["embed_tokens"])[name]
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    rows = model.model.embed_tokens.weight.detach()[ids]
    if strategy == "gradient_norm":
        expected = reference_gradient_norms(model, name, batches)
    else:
        expected = rows.norm(dim=0) if strategy == "activation_norm" else rows.var(0, correction=0)
    torch.testing.assert_close(score, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("strategy", FROM_BATCHES)
def test_a_convolution_is_scored_by_input_channel_across_its_groups(strategy):
    torch.manual_seed(0)
    model = Convolutions().double()
    images = [torch.randn(3, 6, 9, 8).double() + torch.arange(6)[:, None, None] for _ in range(2)]
    scores = scores_of(model, strategy, images, target_modules=["first", "second"])
    x = torch.cat(images).movedim(1, -1).reshape(-1, 3)  # (positions * groups, channels of a group)
    if strategy == "gradient_norm":
        squares = {"first": 0, "second": 0}
        for batch in images:
            model.zero_grad()
            model(batch).backward()
            for name in squares:
                gradient = model.get_submodule(name).weight.grad
                squares[name] = squares[name] + gradient.square().sum((0, 2, 3))
        for name, square in squares.items():
            torch.testing.assert_close(scores[name], square.sqrt(), rtol=1e-9, atol=0)
    else:
        expected = x.norm(dim=0) if strategy == "activation_norm" else x.var(0, correction=0)
        torch.testing.assert_close(scores["first"], expected, rtol=1e-9, atol=0)


def test_stacks_of_experts_go_by_the_weight_and_are_refused_for_activations():
    model = mixtral()
    config = paca.PacaConfig(r=4, selection="weight_norm", target_parameters=STACKS)
    selected = paca.select(model, config)
    name = "model.layers.1.mlp.experts.down_proj"
    expected = model.get_parameter(name).detach().double().square().sum((0, 1)).sqrt()
    assert selected.indices[name] == best(expected, 4)
    adapted = peft.get_peft_model(mixtral(), config)
    assert adapted.base_model.model.get_submodule(name).paca_indices["default"].tolist() == selected.indices[name]
    config.selection = "activation_norm"
    with pytest.raises(ValueError, match=r"experts\.\w+ is a stack of experts.*Use selection='weight_norm'"):
        paca.select(model, config, padded_batches())


def test_quantized_weights_are_scored_dequantized_and_by_what_runs_through_them():
    model = stack("nf4", torch.float32)
    x = torch.randn(40, 64)
    config = paca.PacaConfig(r=4, selection="weight_norm", target_modules=["lin1", "lin2"])
    from paca.quantized import quantization_of

    dense = quantization_of(model.lin1).dequantize(model.lin1).double()
    chosen = paca.select(model, config)
    assert chosen.indices["lin1"] == best(dense.norm(dim=0), 4)
    assert type(model.lin1).__name__ == "Linear4bit"
    adapted = peft.get_peft_model(stack("nf4", torch.float32), config)
    assert adapted.base_model.model.lin1.paca_indices["default"].tolist() == chosen.indices["lin1"]
    config.selection = "activation_norm"
    assert paca.select(model, config, [x]).indices["lin1"] == best(x.double().norm(dim=0), 4)
    config.selection = "gradient_norm"
    chosen = paca.select(model, config, [x], loss=lambda y, _: y.square().mean())
    leaf = (x @ dense.float().T + model.lin1.bias).detach().requires_grad_()
    model.lin2(torch.tanh(leaf)).square().mean().backward()
    assert chosen.indices["lin1"] == best((leaf.grad.T @ x).norm(dim=0), 4)


@pytest.mark.parametrize("repacks", [False, True])
def test_whether_a_quantized_layer_repacks_its_weight_stays(repacks):
    """Repacked, as on CPUs with AVX512-BF16 in evaluation mode, it has no backward pass."""
    model = stack("nf4", torch.float32)
    for layer in (model.lin1, model.lin2):
        layer.support_avx512bf16_for_cpu = repacks
    config = paca.PacaConfig(r=4, selection="activation_norm", target_modules=["lin1"])
    config = paca.select(model, config, [torch.randn(4, 64)])
    assert model.lin1.support_avx512bf16_for_cpu is model.lin2.support_avx512bf16_for_cpu is repacks
    adapted = peft.get_peft_model(model, config)
    assert adapted.base_model.model.lin1.base_layer.support_avx512bf16_for_cpu is False
    assert paca.select(adapted, config, [torch.randn(4, 64)]).indices == config.indices
    assert adapted.base_model.model.lin1.base_layer.support_avx512bf16_for_cpu is False
    assert adapted.unload().lin1.support_avx512bf16_for_cpu is repacks
    assert not [name for name in vars(model.lin1) if "paca" in name]


def test_a_weight_that_can_not_be_read_is_refused_for_weight_norm_alone():
    model = forward_only_stack("gptqmodel.nn_modules")
    config = paca.PacaConfig(r=2, selection="weight_norm", target_modules=["lin1"])
    for attempt in (paca.select, peft.get_peft_model):
        with pytest.raises(ValueError, match=r"lin1: selection='weight_norm' reads the weight.*activation_norm"):
            attempt(model, config)
    config.selection = "activation_norm"
    x = torch.randn(9, 64)
    assert paca.select(model, config, [x]).indices["lin1"] == best(x.norm(dim=0), 2)


def test_an_adapted_model_is_scored_by_its_pretrained_weight():
    model = peft.get_peft_model(llama(), paca.PacaConfig(r=8, target_modules=["q_proj"], init_weights=False))
    model(tokens())  # the columns are in the weight now
    config = paca.PacaConfig(r=4, selection="weight_norm", target_modules=["q_proj"])
    expected = paca.select(llama(), config).indices
    assert paca.select(model, config).indices == expected
    model.add_adapter("second", config)
    layer = model.base_model.model.get_submodule(Q)
    assert layer.paca_indices["second"].tolist() == expected[Q]
    x = reference_inputs(model.base_model.model, Q, padded_batches())
    config.selection = "activation_norm"
    assert paca.select(model, config, padded_batches()).indices[Q] == best(x.norm(dim=0), 4)


# -- the model is left as it was ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(strategy, fails):
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def snapshot() -> Any:
        return (
            {k: v.clone() for k, v in model.state_dict().items()},
            [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()],
            [(n, type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()],
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
            (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
            hasattr(model, "peft_config"),
        )

    def noisy() -> Any:
        for batch in padded_batches():
            torch.rand(1), random.random(), np.random.rand()
            yield batch
        if fails:
            yield {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}

    before = snapshot()
    config = paca.PacaConfig(r=2, selection=strategy, modules_to_save=["lm_head"])
    expected = (
        pytest.raises(ValueError, match="Batch 4 gives no tokens")
        if fails and strategy in FROM_BATCHES
        else contextlib.nullcontext()
    )
    with expected:
        paca.select(model, config, noisy())
    after = snapshot()
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[3], before[3], rtol=0, atol=0)
    assert torch.equal(after[4][0], before[4][0])
    assert after[1:3] == before[1:3]
    assert after[4][1:] == before[4][1:]
    assert after[5] == before[5]


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("strategy", ["activation_norm", "activation_variance"])
def test_activation_strategies_allocate_nothing_of_the_weights_size(strategy):
    model = nn.Sequential(nn.Linear(200, 300, dtype=torch.bfloat16))
    config = paca.PacaConfig(r=3, selection=strategy, target_modules=["0"])
    with Sizes() as sizes:
        paca.select(model, config, [torch.randn(5, 200, dtype=torch.bfloat16)], progress=False)
    assert 200 <= sizes.largest <= 5 * 300


def test_the_gradient_of_a_layer_is_there_a_few_columns_at_a_time(monkeypatch):
    from paca.tuner.calibration import observers

    monkeypatch.setattr(observers, "_AT_ONCE", 300 * 10)
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200))
    config = paca.PacaConfig(r=3, selection="gradient_norm", target_modules=["0", "1"])
    with Sizes() as sizes:
        paca.select(model, config, [torch.randn(5, 200)], progress=False, loss=lambda y, _: y.square().sum())
    assert sizes.largest <= 300 * 15


def test_nothing_of_a_layer_is_kept_between_batches_but_numbers_per_column():
    observer = Observer("x", nn.Linear(7, 5), 7, "activation_norm")
    observer.see_forward(observer.module, (torch.randn(1000, 7),), {}, torch.empty(0))
    kept = [t for t in (*vars(observer).values(), *vars(observer._moments).values()) if isinstance(t, Tensor)]
    assert sum(t.numel() for t in kept) <= 3 * 7


# -- batches as users have them -----------------------------------------------------------------------------------


def test_tensors_tuples_and_mappings_mean_the_same():
    x, target = torch.randn(6, 7), torch.randn(6, 5)
    config = paca.PacaConfig(r=3, selection="activation_norm", target_modules=["lin1", "lin2"])
    found = [
        paca.select(perceptron(), config, [b]).indices for b in (x, (x, target), [x], {"x": x}, ({"x": x}, target))
    ]
    assert all(indices == found[0] for indices in found)
    ids = tokens()
    config = paca.PacaConfig(r=3, selection="activation_norm")
    mask = torch.ones_like(ids)
    mask[:, 2:] = 0
    cut = paca.select(llama(), config, [ids[:, :2]]).indices
    for batch in ((ids, mask), {"input_ids": ids, "attention_mask": mask}):
        assert paca.select(llama(), config, [batch]).indices == cut
    config = paca.PacaConfig(r=3, selection="gradient_norm")
    learned = [paca.select(llama(), config, [b]).indices for b in (ids, (ids,), {"input_ids": ids, "labels": ids})]
    assert learned[0] == learned[1] == learned[2]


def test_a_loss_of_the_users_own_sees_the_batch():
    torch.manual_seed(0)
    x, target = torch.randn(6, 7), torch.randn(6, 5)
    config = paca.PacaConfig(r=3, selection="gradient_norm", target_modules=["lin1"])
    model = perceptron()
    chosen = paca.select(model, config, [(x, target)], loss=lambda y, batch: (y - batch[1]).square().mean())
    (model(x) - target).square().mean().backward()
    assert chosen.indices["lin1"] == best(model.lin1.weight.grad.norm(dim=0), 3)


def test_batches_may_be_a_generator_and_progress_is_shown_where_asked(capsys):
    from rich.console import Console

    console = Console(force_terminal=True, width=80)
    config = paca.PacaConfig(r=3, selection="activation_norm")
    paca.select(llama(), config, (batch for batch in padded_batches()), console)
    assert "Choosing columns" in capsys.readouterr().out
    paca.select(llama(), config, padded_batches())
    assert capsys.readouterr() == ("", "")


# -- refusals -----------------------------------------------------------------------------------------------------

IDS = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({"r": 33}, [IDS], r"q_proj: r=33 columns were asked for, but this layer has 32"),
        ({"indices": {"q_proj": [1, 1]}}, [IDS], r"q_proj: column 1 is named more than once"),
        ({}, None, r"selection='activation_norm' chooses columns by what batches .* paca.select"),
        ({}, [], r"needs batches, and there was none"),
        ({}, [IDS, {"input_ids": torch.ones(2, 0, dtype=torch.int64)}], r"Batch 2 gives no tokens: it is empty"),
        ({}, [{**IDS, "attention_mask": torch.zeros(2, 3)}], r"Batch 1 gives no tokens: its attention_mask is 0"),
        ({}, [{**IDS, "attention_mask": torch.tensor([[[[0.0, 1.0]]]])}], r"Batch 1: its attention_mask has shape"),
        ({}, ["some text"], r"Batch 1 is a str that the model can't be called with"),
        ({}, [{"text": ["some"]}], r"Batch 1 holds no tensor \(text\)"),
        ({"selection": "gradient_norm"}, [{**IDS, "labels": torch.full((2, 3), -100)}], r"Batch 1: its loss is nan"),
        ({"target_modules": ["nowhere"]}, [IDS], r"nowhere"),
    ],
)
def test_what_can_not_work_is_refused_with_the_reason(settings, batches, message):
    config = paca.PacaConfig(**{"r": 16, "selection": "activation_norm", "target_modules": ["q_proj"], **settings})
    with pytest.raises(ValueError, match=message):
        paca.select(llama(), config, batches)


@pytest.mark.parametrize("strategy", ["weight_norm", "activation_norm", "activation_variance"])
def test_values_that_are_not_finite_are_refused_naming_the_layer(strategy):
    model = perceptron()
    if strategy == "weight_norm":
        model.lin1.weight.data[2, 4] = float("nan")
    x = torch.randn(3, 7)
    x[1, 4] = float("inf")
    config = paca.PacaConfig(r=2, selection=strategy, target_modules=["lin1"])
    with pytest.raises(ValueError, match=r"^lin1: its .* hold.* NaN or infinite values \(1 columns, the first is 4\)"):
        paca.select(model, config, [x])


def test_a_layer_that_no_token_reaches_is_named():
    model = perceptron()
    model.unused = nn.Linear(4, 4)
    config = paca.PacaConfig(r=2, selection="activation_norm", target_modules=["lin1", "unused"])
    with pytest.raises(ValueError, match=r"^unused: no token of the batches reached this layer"):
        paca.select(model, config, [torch.randn(3, 7)])


def test_padding_that_can_not_be_told_from_tokens_is_refused():
    class Regrouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.lin(x.unflatten(-1, (2, 4)))

    batch = {"x": torch.randn(2, 3, 8), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    config = paca.PacaConfig(r=2, selection="activation_norm", target_modules=["lin"])
    with pytest.raises(ValueError, match=r"lin: its input has shape \(2, 3, 2, 4\).*does not fit the attention_mask"):
        paca.select(Regrouped(), config, [batch])


def test_no_loss_is_said():
    config = paca.PacaConfig(r=2, selection="gradient_norm", target_modules=["lin1"])
    with pytest.raises(ValueError, match="gradient_norm needs a loss"):
        paca.select(perceptron(), config, [torch.randn(3, 7)])


def test_get_peft_model_says_to_call_select_first_and_leaves_the_model():
    model = llama()
    with pytest.raises(
        ValueError, match=r"q_proj: selection='gradient_norm'.*paca\.select\(model, config, batches\) first"
    ):
        peft.get_peft_model(model, paca.PacaConfig(selection="gradient_norm"))
    assert type(model.get_submodule(Q)) is nn.Linear
    assert not hasattr(model, "peft_config")


def test_a_weight_on_the_meta_device_is_refused_for_weight_norm():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match=r"q_proj: selection='weight_norm' reads the weight, which is not there"):
        peft.get_peft_model(model, paca.PacaConfig(selection="weight_norm"))


def test_a_saved_adapter_loads_without_data(tmp_path):
    """Also one whose config does not list the columns: the file of its weights does."""
    config = paca.select(llama(), paca.PacaConfig(r=3, selection="activation_norm"), padded_batches())
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
        assert loaded.base_model.model.get_submodule(Q).paca_indices["default"].tolist() == config.indices[Q]
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "indices": None}))


@pytest.mark.parametrize("strategy", FROM_BATCHES)
def test_lean_blocks_that_recompute_give_the_same_scores(strategy):
    batches = padded_batches()
    plain = scores_of(llama().double(), strategy, batches)
    lean = scores_of(paca.make_lean(llama().double(), "mlp"), strategy, batches)
    for name, score in plain.items():
        torch.testing.assert_close(lean[name], score, rtol=1e-6, atol=0)  # lean norms compute in float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_scores(reentrant):
    class Checkpointed(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant).square().mean()

    x = torch.randn(6, 7, dtype=torch.float64)
    torch.manual_seed(0)
    model = Checkpointed().double()
    scores = scores_of(model, "gradient_norm", [{"x": x}], target_modules=["lin2"]) if not reentrant else None
    if reentrant:  # torch gives no gradient through it where no input requires one: said, not silent
        with pytest.raises(ValueError, match="Batch 1: its loss does not depend on the target layers"):
            scores_of(model, "gradient_norm", [{"x": x}], target_modules=["lin2"])
        return
    Perceptron.forward(model, x).square().mean().backward()
    torch.testing.assert_close(scores["lin2"], model.lin2.weight.grad.norm(dim=0), rtol=1e-9, atol=0)
