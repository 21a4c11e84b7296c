"""Which runs are needed, and in which order."""

from __future__ import annotations

import math

import pytest

from paca.comparison.schedule import FAILED, MOST_BEYOND, Job, Outcome, Schedule, schedule
from paca.evaluation.statistics import mean_with_error

RATES, SEEDS = [1e-3, 3e-3, 9e-3], [0, 1, 2]


def worked_off(best_at: dict[str, float], *, extend: bool = True, failing: tuple[float, ...] = ()) -> Schedule:
    """The schedule at the end, where each method's loss is lowest at its rate."""
    ended: dict[Job, Outcome] = {}

    def now() -> Schedule:
        return schedule(dict.fromkeys(best_at, RATES), SEEDS, ended.get, extend=extend)

    while todo := [job for job in now().jobs if job not in ended]:
        job = todo[0]
        loss = abs(math.log(job.rate / best_at[job.method])) + 0.001 * job.seed
        ended[job] = FAILED if any(math.isclose(job.rate, rate) for rate in failing) else Outcome(loss, loss)
    return now()


def runs(plan: Schedule, method: str) -> list[tuple[float, int]]:
    return [(job.rate, job.seed) for job in plan.jobs if job.method == method]


def test_rates_are_searched_with_the_first_seed_and_the_best_goes_on_with_the_others() -> None:
    plan = worked_off({"paca": 3e-3})
    assert runs(plan, "paca") == [(1e-3, 0), (3e-3, 0), (9e-3, 0), (3e-3, 1), (3e-3, 2)]
    assert plan.chosen == {"paca": 3e-3}
    assert plan.expected == {"paca": 5}


def test_more_runs_may_come_until_every_search_has_ended() -> None:
    ended: dict[Job, Outcome] = {}
    grids, grew = {"paca": RATES, "lora": [1e-3]}, []
    best = {"paca": 2.7e-2, "lora": 1e-3}
    while todo := [job for job in schedule(grids, SEEDS, ended.get, extend=True).jobs if job not in ended]:
        grew.append(schedule(grids, SEEDS, ended.get, extend=True).growing)
        assert not schedule(grids, SEEDS, ended.get, extend=False).growing
        loss = abs(math.log(todo[0].rate / best[todo[0].method]))
        ended[todo[0]] = Outcome(loss, loss)
    assert grew == sorted(grew, reverse=True)
    after = [job for job in ended if job.method == "paca" and job.seed == 0]
    assert len(after) == 5  # two beyond the grid
    assert grew[list(ended).index(after[-1])]
    assert grew.count(False) == 2  # paca's other seeds
    failed = dict.fromkeys(ended, FAILED)
    assert not schedule(grids, SEEDS, failed.get, extend=True).growing


def test_each_method_has_its_own_rate_and_methods_take_turns() -> None:
    plan = worked_off({"paca": 3e-3, "lora": 1e-3}, extend=False)
    assert plan.chosen == {"paca": 3e-3, "lora": 1e-3}
    assert [job.method for job in plan.jobs] == ["paca", "lora"] * 5


@pytest.mark.parametrize(
    ("best", "beyond"),
    [(2.7e-2, [2.7e-2, 8.1e-2]), (8.1e-2, [2.7e-2, 8.1e-2, 0.243]), (1e-3, [0.000333]), (3.3e-4, [0.000333, 0.000111])],
)
def test_a_grid_whose_edge_is_best_grows_by_its_ratio_until_it_is_not(best: float, beyond: list[float]) -> None:
    plan = worked_off({"paca": best})
    tried = [rate for rate, seed in runs(plan, "paca") if seed == 0]
    assert tried == [*RATES, *beyond]
    assert plan.chosen["paca"] == pytest.approx(best, rel=0.02)


def test_among_level_scores_the_lower_loss_decides_and_may_lead_beyond_the_grid() -> None:
    by_rate = {
        1e-3: Outcome(-0.90, 0.3, 0.02), 3e-3: Outcome(-0.95, 0.2, 0.015), 9e-3: Outcome(-0.94, 0.1, 0.015),
        2.7e-2: Outcome(-0.93, 0.05, 0.015),
    }  # fmt: skip
    plan = schedule({"paca": RATES}, [0], lambda job: by_rate[job.rate], extend=True)
    assert [job.rate for job in plan.jobs] == [1e-3, 3e-3, 9e-3, 2.7e-2]  # 9e-3 is level with 3e-3, and at the edge
    assert plan.chosen == {"paca": 9e-3}  # 2.7e-2 is not


def test_a_score_just_one_standard_error_away_is_level_whatever_rounding_makes_of_it() -> None:
    for n in range(4, 200):  # one and two wrong answers of n; one has a standard error of one answer
        scores = [mean_with_error([-float(answer >= wrong) for answer in range(n)]) for wrong in (1, 2)]
        one, two = (Outcome(mean, 0.3 / wrong, error or 0.0) for wrong, (mean, error) in enumerate(scores, 1))
        by_rate = {1e-3: one, 3e-3: two}
        plan = schedule({"paca": [1e-3, 3e-3]}, [0], lambda job, found=by_rate: found.get(job.rate), extend=False)
        assert plan.chosen == {"paca": 3e-3}, n


def test_a_fine_grid_grows_to_rates_that_it_does_not_have() -> None:
    plan = schedule({"paca": [1e-3, 1.001e-3]}, [0], lambda job: Outcome(-job.rate, 1.0), extend=True)
    tried = [job.rate for job in plan.jobs]
    assert len(set(tried)) == len(tried) == 2 + MOST_BEYOND


def test_without_extending_the_edge_is_taken() -> None:
    plan = worked_off({"paca": 1.0}, extend=False)
    assert plan.chosen == {"paca": 9e-3}
    assert len(plan.jobs) == 5


def test_a_grid_does_not_grow_forever() -> None:
    plan = worked_off({"paca": 1e9})
    assert len({rate for rate, _ in runs(plan, "paca")}) == len(RATES) + MOST_BEYOND
    assert "paca" in plan.chosen


def test_rates_that_fail_are_passed_over() -> None:
    plan = worked_off({"paca": 9e-3}, failing=(9e-3,))
    assert plan.chosen == {"paca": 3e-3}


def test_a_method_whose_rates_all_fail_has_none_and_no_further_runs() -> None:
    plan = worked_off({"paca": 3e-3}, failing=tuple(RATES))
    assert plan.chosen == {}
    assert plan.expected == {"paca": 3}
    assert runs(plan, "paca") == [(rate, 0) for rate in RATES]


def test_the_lower_loss_decides_among_equal_scores() -> None:
    losses = {1e-3: 2.0, 3e-3: 1.5, 9e-3: 1.8}
    plan = schedule({"paca": RATES}, [0], lambda job: Outcome(0.0, losses[job.rate]), extend=True)
    assert plan.chosen == {"paca": 3e-3}


def test_one_rate_is_taken_as_it_is() -> None:
    plan = schedule({"paca": [1e-3]}, [5], lambda job: Outcome(1.0, 1.0), extend=True)
    assert plan.chosen == {"paca": 1e-3}
    assert [job.name for job in plan.jobs] == ["paca-lr0.001-seed5"]


def test_while_a_run_is_missing_no_rate_is_chosen() -> None:
    ended = {Job("paca", rate, 0): Outcome(rate, rate) for rate in RATES[:2]}
    plan = schedule({"paca": RATES}, SEEDS, ended.get, extend=True)
    assert plan.chosen == {}
    assert plan.expected == {"paca": 5}
    assert len(plan.jobs) == 3


def test_methods_may_have_grids_of_their_own() -> None:
    grids = {"paca": [1e-3, 2e-3], "lora": [1e-4, 2e-4, 4e-4]}
    ended = {Job(name, rate, 0): Outcome(rate, rate) for name, rates in grids.items() for rate in rates}
    plan = schedule(grids, [0], ended.get, extend=False)
    assert runs(plan, "paca") == [(1e-3, 0), (2e-3, 0)]
    assert runs(plan, "lora") == [(1e-4, 0), (2e-4, 0), (4e-4, 0)]
    assert plan.chosen == {"paca": 1e-3, "lora": 1e-4}


def test_without_extension_rates_that_ran_before_count_all_the_same() -> None:
    ran = {1e-3: 0.3, 3e-3: 0.2, 9e-3: 0.1, 2.7e-2: 0.05, 8.1e-2: 0.04}

    def outcome(job: Job) -> Outcome | None:
        return Outcome(ran[job.rate], ran[job.rate]) if job.rate in ran and job.seed == 0 else None

    plan = schedule({"paca": RATES}, SEEDS, outcome, extend=False)
    assert plan.chosen == {"paca": 8.1e-2}
    assert [job.rate for job in plan.jobs if job.seed == 0] == list(ran)
