"""Whether better rates of a method may lie beyond those tried, and what is said of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from comparison.result_maker import row
from comparison.small_comparison import small_comparison, small_work
from paca.cli.compare import show_result
from paca.comparison.compare import compare
from paca.comparison.divergence import diverged
from paca.comparison.edges import edge_of
from paca.comparison.equal import CameOut
from paca.comparison.flags import Rates
from paca.comparison.method_result import MethodResult
from paca.comparison.results import ComparisonResult
from paca.comparison.work import Work
from paca.evaluation.log_likelihood import _likelihood
from paca.messages.errors import PacaError
from paca.training.finite_loss import StopOnNonFiniteLoss

DIVERGED = "The training loss is nan at step 3, so the weights are of no use from here on."
RATES = [1e-3, 3e-3, 9e-3, 2.7e-2]


@pytest.mark.parametrize(
    ("best", "rates", "told"),
    [
        (3e-3, [1e-3, 3e-3, 9e-3], None),
        (
            1e-3,
            [3e-3, 1e-3, 9e-3],
            "The best rate of paca, 0.001, is the lowest that was tried; lower ones may be better.",
        ),
        (
            9e-3,
            [1e-3, 3e-3, 9e-3],
            "0.009, is the highest that was tried; higher ones may be better. Add some to --lr.",
        ),
        (1e-3, [1e-3, 1e-3], "paca was tried at one rate, 0.001; others may be better. Add some to --lr."),
        (None, [1e-3, 3e-3], None),  # all failed
    ],
)
def test_a_best_rate_at_the_edge_of_those_tried_is_told(
    best: float | None, rates: list[float], told: str | None
) -> None:
    tried = [row("paca", 0, 1.0, learning_rate=rate) for rate in rates]
    edge = edge_of(MethodResult("paca", "r 8", best, tried[:1], tried), Path("runs"))
    assert (edge is None) if told is None else (told in str(edge))


def failure(rate: float, message: str) -> dict[str, Any]:
    failed = row("lora", 0, None, learning_rate=rate, name=f"lora-lr{rate:g}-seed0")
    failed["run_info"]["error_msg"] = message
    return failed


@pytest.mark.parametrize(
    ("best", "failing", "told"),
    [
        (3e-3, [9e-3], [9e-3]),
        (3e-3, [1e-3], [1e-3]),
        (3e-3, [1e-3, 9e-3], [1e-3, 9e-3]),
        (1e-3, [3e-3, 9e-3], [3e-3, 9e-3]),  # 2.7e-2 alone is known to be worse
        (3e-3, [2.7e-2], []),  # 9e-3 is worse already
        (1e-3, [9e-3], []),
    ],
)
def test_a_failed_run_up_to_the_next_score_leaves_the_best_rate_open(
    best: float, failing: list[float], told: list[float]
) -> None:
    tried = [failure(rate, "No network.") if rate in failing else row("lora", 0, 1.0, learning_rate=rate)
             for rate in RATES]  # fmt: skip
    edge = edge_of(MethodResult("lora", "r 8", best, [], tried), Path("runs"))
    assert (() if edge is None else edge.failed) == tuple(f"lora-lr{rate:g}-seed0" for rate in told)
    for rate in told:
        assert f"lora-lr{rate:g}-seed0 failed, and its rate may be better than the best one of lora" in str(edge)


def test_a_rate_that_diverged_is_the_end_of_a_grid() -> None:
    tried = [row("lora", 0, 1.0, learning_rate=rate) for rate in RATES[:2]] + [failure(9e-3, DIVERGED)]
    assert edge_of(MethodResult("lora", "r 8", 3e-3, tried[:1], tried), Path("runs")) is None
    ended = row("lora", 0, None, learning_rate=9e-3)  # its held-out loss is not finite
    ended["run_info"]["error_msg"], ended["train_info"]["status"] = "", "success"
    assert edge_of(MethodResult("lora", "r 8", 3e-3, tried[:1], [*tried[:2], ended]), Path("runs")) is None


def test_a_seed_that_failed_at_the_best_rate_is_no_edge() -> None:
    tried = [row("lora", 0, 1.0, learning_rate=rate) for rate in RATES[:3]]
    lost = row("lora", 1, None, learning_rate=3e-3)
    assert edge_of(MethodResult("lora", "r 8", 3e-3, [tried[1]], [*tried, lost]), Path("runs")) is None


def words_of_a_loss(tmp_path: Path) -> str:
    with pytest.raises(PacaError) as caught:
        StopOnNonFiniteLoss().on_log(
            TrainingArguments(str(tmp_path)), TrainerState(global_step=3), TrainerControl(), {"loss": float("inf")}
        )
    return str(caught.value)


def words_of_weights(tmp_path: Path) -> str:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, torch.inf)
    with pytest.raises(PacaError) as caught:
        StopOnNonFiniteLoss().on_train_end(
            TrainingArguments(str(tmp_path)), TrainerState(global_step=3), TrainerControl(), model=model
        )
    return str(caught.value)


def words_of_scoring(_: Path) -> str:
    with pytest.raises(PacaError) as caught:
        _likelihood(torch.full((1, 4), torch.nan), torch.tensor([1]))
    return str(caught.value)


def words_of_drawing(_: Path) -> str:
    with pytest.raises(RuntimeError) as caught:
        torch.multinomial(torch.full((4,), torch.nan), 1)
    return f"RuntimeError: {caught.value}"


@pytest.mark.parametrize("words", [words_of_a_loss, words_of_weights, words_of_scoring, words_of_drawing])
def test_what_a_run_says_that_diverged_is_known(words: Any, tmp_path: Path) -> None:
    assert diverged(failure(9e-3, words(tmp_path)))
    assert not diverged(failure(9e-3, "The training loss has no column at step 3"))
    assert not diverged(row("lora", 0, 1.0))


def ended(folder: Path) -> tuple[ComparisonResult, str]:
    """The comparison in a folder, to its end, and what it said."""
    comparison = small_comparison(folder, rates=Rates([1e-3, 3e-3, 9e-3]), seeds=[0, 1, 2])
    console = Console(file=io.StringIO(), width=2000)
    Work(comparison, {}, console, small_work(folder).program).run()
    planned: Any = [
        SimpleNamespace(method=method, came_out=CameOut(method), plan=SimpleNamespace(steps=6))
        for method in comparison.methods
    ]
    found = compare(comparison, planned, Console(quiet=True))
    show_result(found, folder, console)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow(reason="trains several times")
def test_a_search_cut_short_is_told_with_the_verdict_and_until_it_is_tried_again(tmp_path: Path) -> None:
    """The verdict said that paca is better, and only a note below that a rate of lora had not been tried."""
    name = "lora-lr0.009-seed0"
    (tmp_path / "away").write_text(f"{name}\n")
    found, said = ended(tmp_path)
    caveat = f"; better rates of lora may lie beyond those tried, as {name} failed."
    again = f"To try it again, delete {tmp_path}/runs/{name}/failed.json and give the same command again."
    why = "There is no folder of a model, some/model. Give one"
    edge = f"{name} failed, and its rate may be better than the best one of lora, 0.003: {why}. {again}"
    assert found.verdict.startswith("At the rates tried, paca is better than lora (")  # lora's may lie beyond
    assert found.as_dict()["contrasts"][0]["rates_open"] == ["lora"]
    assert found.verdict.endswith(caveat)
    assert f"{caveat}\n" in said
    assert f"\n{edge}\n" in said
    assert f"{name} failed: {why} (all it said: {tmp_path}/runs/{name}/log.txt). {again}\n" in said
    assert "failed before" not in said
    texts = [(tmp_path / f"comparison.{kind}").read_text() for kind in ("md", "html", "json")]
    assert all(caveat in text and edge in text for text in texts)
    assert sum(name in note for note in found.notes) == 1  # once, not among other failures too

    (tmp_path / "away").unlink()
    found, said = ended(tmp_path)
    assert f"{name} failed before, and is not tried again: {why}. {again}\n" in said
    assert found.verdict.endswith(caveat)

    (tmp_path / "runs" / name / "failed.json").unlink()
    found, said = ended(tmp_path)
    assert " failed" not in said
    assert "may lie beyond" not in found.verdict


def test_a_killed_run_is_said_to_be_tried_by_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "lora-lr0.009-seed0"
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text(json.dumps({"exit_status": -9, "error_msg": "killed by SIGKILL"}))
    lora = [row("lora", 0, 1.0, learning_rate=rate) for rate in RATES[:2]] + [failure(9e-3, "killed by SIGKILL")]
    edge = edge_of(MethodResult("lora", "r 8", 3e-3, lora[:1], lora), tmp_path / "runs")
    assert edge is not None
    assert edge.note.endswith(": killed by SIGKILL. The same command tries it again.")
