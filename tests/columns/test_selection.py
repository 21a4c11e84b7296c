from __future__ import annotations

import pytest
import torch

from paca.columns import scores as scores_module
from paca.columns.scores import explicit_columns, select_columns, weight_norms
from paca.columns.selection import check_strategy, random_columns


@pytest.mark.parametrize(("in_features", "r"), [(1, 1), (7, 7), (1000, 1), (1000, 64)])
def test_random_columns_are_sorted_unique_and_in_range(in_features, r):
    indices = random_columns(in_features, r, seed=0, module_name="model.layers.0.q_proj")
    assert indices.dtype == torch.int64
    assert indices.shape == (r,)
    assert bool((indices[1:] > indices[:-1]).all())
    assert int(indices[0]) >= 0
    assert int(indices[-1]) < in_features


def test_random_columns_depend_on_seed_and_name_alone():
    first = random_columns(500, 8, 3, "a")
    torch.manual_seed(99)
    random_columns(500, 8, 3, "another")
    state = torch.get_rng_state()
    assert torch.equal(random_columns(500, 8, 3, "a"), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(random_columns(500, 8, 4, "a"), first)
    assert not torch.equal(random_columns(500, 8, 3, "b"), first)


def test_random_columns_are_those_of_earlier_releases():
    # The seed is part of what makes a run repeatable, so the draw must never change.
    assert random_columns(576, 6, 0, "model.layers.0.self_attn.q_proj").tolist() == [10, 160, 197, 267, 374, 418]


@pytest.mark.parametrize(
    ("in_features", "r", "blocks"),
    [(64, 16, [16]), (64, 40, [8, 16, 16]), (64, 5, [5]), (40, 40, [8, 16, 16]), (7, 3, [3]), (1, 1, [1])],
)
def test_random_blocks_are_whole_but_for_the_last(in_features, r, blocks):
    for seed in range(20):
        columns = random_columns(in_features, r, seed, "x", "random_blocks")
        assert columns.tolist() == sorted(set(columns.tolist()))
        assert columns.numel() == r
        assert int(columns[-1]) < in_features
        counts = torch.bincount(columns // 16)
        assert sorted(counts[counts > 0].tolist()) == blocks


def test_random_blocks_are_drawn_alike_and_from_seed_and_name_alone():
    counts = torch.zeros(4)
    for seed in range(2000):
        counts[int(random_columns(64, 16, seed, "x", "random_blocks")[0]) // 16] += 1
    assert counts.min() > 400  # expectation 500, standard deviation 19
    assert counts.max() < 600
    again = random_columns(576, 16, 0, "model.layers.0.self_attn.q_proj", "random_blocks")
    assert again.tolist() == list(range(160, 176))


def test_random_columns_are_spread_evenly():
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[random_columns(20, 5, seed, "x")] += 1
    assert counts.min() > 400  # expectation 500, standard deviation 19
    assert counts.max() < 600


def test_explicit_columns_are_sorted():
    assert explicit_columns([5, 0, 3], 6, "x").tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "non-empty"),
        ([1.5], "whole numbers"),
        ([True], "whole numbers"),
        ([[1]], "whole numbers"),
        ([6], "column 6 is out of range"),
        ([-1], "column -1 is out of range"),
        ([2, 1, 2], "column 2 is named more than once"),
    ],
)
def test_wrong_columns_are_refused_by_name(columns, message):
    with pytest.raises(ValueError, match=f"^block.q: .*{message}"):
        explicit_columns(columns, 6, "block.q")


@pytest.mark.parametrize("r", [0, -1, 7])
def test_a_rank_outside_the_layer_is_refused(r):
    with pytest.raises(ValueError, match=r"block.q: r=.* 6 input columns"):
        random_columns(6, r, 0, "block.q")


@pytest.mark.parametrize(
    ("r", "expected"), [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4])]
)
def test_the_largest_scores_win_and_of_equal_ones_the_first(r, expected):
    scores = torch.tensor([2.0, 3.0, 3.0, 1.0, 1.5])
    scores[4] = 2.0 - 1e-7
    found = select_columns("weight_norm", r, scores, "x")
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    flat = select_columns("activation_norm", r, torch.ones(5), "x")
    assert flat.tolist() == list(range(r))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weight_norms_are_those_of_float64(dtype, monkeypatch):
    monkeypatch.setattr(scores_module, "_ROWS_AT_ONCE", 40)
    torch.manual_seed(0)
    weight = torch.randn(9, 7, 3).to(dtype) * 200  # their squares overflow float16
    expected = weight.double().square().sum((0, 2)).sqrt()
    torch.testing.assert_close(weight_norms(weight, 1), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(weight_norms(weight[..., 0], 0), weight[..., 0].double().norm(dim=1), rtol=1e-13, atol=0)


def test_an_unknown_strategy_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"selection='activation_var' is unknown.*Did you mean 'activation_variance'\?"
    ):
        check_strategy("activation_var")


@pytest.mark.parametrize("strategy", ["random", "random_blocks"])
def test_another_default_device_changes_nothing(strategy):
    want = random_columns(100, 32, 0, "a", strategy)
    with torch.device("meta"):
        assert torch.equal(random_columns(100, 32, 0, "a", strategy), want)
