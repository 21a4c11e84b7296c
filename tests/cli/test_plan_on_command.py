"""`paca plan` for devices that are not here: how much memory programs get, how far off it is, what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import paca
from paca.cli import app
from tiny_checkpoint import WIDE, save_base

ROOT = Path(__file__).parents[2]
GAUDI = str(ROOT / "recipes/paper/guanaco-llama3-8b-gaudi2-paca.yaml")
ADVICE = "Leave 5 to 10 % of the budget free"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base(tmp_path_factory.mktemp("base"), num_hidden_layers=1, **WIDE))


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], terminal_width=200, catch_exceptions=False)
    assert result.exit_code == 0
    return " ".join(result.output.split())


def plan_json(*arguments: str) -> Any:
    return json.loads(plan(*arguments, "--json"))


def test_what_programs_do_not_get_is_not_planned_with() -> None:
    arguments = ("llama3-8b", "--on", "a100-80gb", "--seq", "11420", "--r", "8", "--loss", "full")
    content = plan_json(*arguments)
    assert content["budget"] == int(79.25 * 2**30) < content["total"] < 80 * 2**30
    assert not content["simulated"]["methods"]["paca"]["fits"]
    assert "issue" in content["simulated"]["usable_memory"]["source"]


def test_a_budget_above_what_the_device_gives_is_that_of_the_device(base: str) -> None:
    arguments = (base, "--on", "a100-80gb", "--seq", "64", "--batch-size", "16", "--memory")
    assert "budget │ 79.25 GiB" in plan(*arguments, "80GiB")
    assert "budget │ 4.00 GiB" in plan(*arguments, "4GiB")


@pytest.mark.parametrize(("share", "advised"), [(0.89, False), (0.92, True), (0.999, True)])
def test_a_plan_close_to_its_budget_advises_to_leave_some_free(base: str, share: float, advised: bool) -> None:
    arguments = (base, "--seq", "64", "--device", "cpu", "--rate", "1", "--quantization", "none", "--lean")
    total = plan_json(*arguments)["total"]
    text = plan(*arguments, "--memory", str(int(total / share)), "--global-batch", "1")
    assert (ADVICE in text) == advised
    assert "does not fit" not in text


def test_the_errors_stand_in_the_line_itself(base: str) -> None:
    on_l40s, elsewhere = (plan(base, "--seq", "64", "--on", name) for name in ("l40s", "rtx4090"))
    assert "simulations missed the time of a step by -26 to +2 % and memory by -1 to +3 %." in on_l40s
    assert "No simulation was compared with a measurement on this device." in elsewhere
    for text in (on_l40s, elsewhere):
        assert ".md" not in text  # no file that an installed wheel lacks


def test_the_way_out_of_an_unknown_device_works(base: str) -> None:
    with pytest.raises(paca.PacaError, match="leave out --on and --steps, and give its --rate"):
        plan(base, "--on", "abacus", "--compare", "lora")
    text = plan(
        base, "--seq", "64", "--device", "cuda", "--rate", "300", "--bandwidth", "2000", "--memory", "8GiB",
        "--quantization", "none", "--compare", "lora",
    )  # fmt: skip
    assert "Time floor" in text
    assert "Peak memory of each method" in text
    with pytest.raises(paca.PacaError, match="--rate and --bandwidth can't stand in for one"):
        plan(base, "--rate", "300", "--steps", "3")


@pytest.mark.slow(reason="simulates models over and over")
def test_an_accelerator_is_planned_by_its_name_in_the_table() -> None:
    run = (GAUDI, "--set", "model.name=smollm2-135m", "--seq", "64")
    with pytest.raises(paca.PacaError, match=r"'hpu'.*leave it out.*--on gaudi2"):
        plan(*run, "--device", "hpu")
    text = plan(*run, "--on", "gaudi2")
    assert "Simulated on Intel Gaudi 2 96 GB" in text
    assert "Programs get 94.08 GiB of the device's 96.00 GiB (an estimate: 98 % of it)." in text
