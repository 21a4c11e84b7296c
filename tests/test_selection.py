from __future__ import annotations

import pytest
import torch

from paca.selection import explicit_columns, random_columns


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
