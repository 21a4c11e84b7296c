"""The parts of benchmarks/selection.py that its rows depend on."""

from __future__ import annotations

import torch
from benchmarks.selection_columns import Covariance, choose, pivoted
from benchmarks.selection_runs import Run, planned
from torch.nn import functional as F

from models import llama


def test_a_channel_that_another_foretells_is_not_chosen():
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 3.0, 2.0, 1.0, 0.5, 0.1]
    )
    rows[:, 1] = 1.1 * rows[:, 0]  # the largest variance, and the same as channel 0
    assert pivoted(torch.cov(rows.T.double()), 3) == [1, 2, 3]


def test_the_covariance_is_that_of_weighted_rows_in_pieces():
    generator = torch.Generator().manual_seed(1)
    rows = 1000 + torch.randn(90, 5, generator=generator)
    weights = torch.rand(90, generator=generator)
    covariance = Covariance()
    for start in (0, 20, 50):
        end = {0: 20, 20: 50, 50: 90}[start]
        covariance.add(rows[start:end], weights[start:end])
    expected = torch.cov(rows.double().T, aweights=weights.double(), correction=0)
    torch.testing.assert_close(covariance.matrix(), expected, rtol=1e-3, atol=1e-4)


def test_gradients_count_no_token_that_the_loss_does_not_depend_on():
    model = llama()
    tokens = torch.randint(1, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill((torch.arange(20) < 4) | (torch.arange(20) >= 12), -100)
    other = torch.cat([tokens[:, :12], tokens[:, 12:].flip(1)], 1)  # after the last label

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    for strategy in ("pivoted_answer_variance", "pivoted_gradient_variance"):
        chosen = [choose(strategy, model, 4, [{"input_ids": ids, "labels": labels}], loss) for ids in (tokens, other)]
        assert chosen[0] == chosen[1]
        assert all(len(set(columns)) == 4 for columns in chosen[0].values())


def test_the_third_rate_lies_on_the_side_of_the_better_of_two():
    low, high = Run("a", "random", 1e-3, 0), Run("a", "random", 3e-3, 0)
    assert next(iter(planned(["a"], ["random"], {}))) == low
    assert Run("a", "random", 1e-2, 0) in planned(["a"], ["random"], {low: 2.0, high: 1.0})
    assert Run("a", "random", 3e-4, 0) in planned(["a"], ["random"], {low: 1.0, high: 2.0})


def test_a_best_rate_at_the_edge_is_looked_beyond_before_further_seeds_run():
    low, high, third = (Run("a", "random", rate, 0) for rate in (1e-3, 3e-3, 3e-4))
    done = {low: 2.0, high: 3.0, third: 1.0}
    beyond = Run("a", "random", 1e-4, 0)
    runs = list(planned(["a"], ["random"], done))
    assert beyond in runs
    assert runs.count(None) == 2
    assert Run("a", "random", 3e-4, 1) in planned(["a"], ["random"], {**done, beyond: 1.5})
    assert Run("a", "random", 1e-4, 1) in planned(["a"], ["random"], {**done, beyond: 0.5})
    inside = {**done, third: 2.5}
    assert beyond not in planned(["a"], ["random"], inside)


def test_further_seeds_run_at_the_best_rate_and_wait_for_it():
    done = {Run("a", "random", 1e-3, 0): 2.0, Run("a", "random", 3e-3, 0): 1.0}
    assert list(planned(["a"], ["random"], done)).count(None) == 2
    done[Run("a", "random", 1e-2, 0)] = 1.5
    assert Run("a", "random", 3e-3, 2) in planned(["a"], ["random"], done)
