"""The numbers of README.md, and of the table in docs/notes/quality.md, are those of the committed rows."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from paca.bench.rows import read_rows, round_ratios, spread

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = re.sub(r"\s+", " ", re.sub(r"\]\([^)]*\)", "]", README))


def row_of_table(name: str) -> list[list[str]]:
    """The numbers in each cell behind the first of the table's row whose first cell begins so."""
    (line,) = (line for line in README.splitlines() if line.startswith((f"| {name} |", f"| [{name}]", f"|[{name}]")))
    return [re.findall(r"\d+\.\d+", cell) for cell in line.split("|")[2:-1]]


def step_times(machine: str) -> list[str]:
    """LoRA's and tuned LoRA's, as a multiple of PaCA's."""
    rows = read_rows(ROOT / "benchmarks" / f"{machine}.csv")
    rows = rows[(rows.model == "SmolLM2-135M-Instruct") & (rows.metric == "step_time")]
    samples = {method: rows[rows.method == method].samples.item() for method in ("paca", "lora", "lora-tuned")}
    return [f"{spread(round_ratios(samples[method], samples['paca'])).median:.2f}" for method in ("lora", "lora-tuned")]


@pytest.mark.parametrize(
    ("name", "machine"),
    [("AMX Xeon", "cpu-core"), ("EPYC", "cpu-core-epyc"), ("Xeon without AMX", "cpu-real-avx512")],
)
def test_step_times_are_ratios_taken_round_by_round(name: str, machine: str) -> None:
    told = row_of_table(f"time of a step, {name}")[1:]
    assert told == [[time] for time in step_times(machine)]


def test_steps_of_many_columns_are_those_that_were_timed_in_turn() -> None:
    page = (ROOT / "benchmarks" / "quality" / "gsm8k-long-time" / "comparison.md").read_text(encoding="utf-8")
    (timed,) = re.findall(r"a step of lora-tuned took (\S+) × that of paca-256", page)
    assert f"(tuned LoRA's takes {timed} × r 256's)" in TEXT


def test_longest_sequences_are_those_of_the_rows() -> None:
    rows = read_rows(ROOT / "benchmarks" / "cpu-longest.csv").set_index("method")["median"]
    (line,) = (line for line in README.splitlines() if line.startswith("| [longest sequence"))
    told = [re.findall(r"(?<= )\d[\d,]*\d(?=[ ,])", cell) for cell in line.split("|")[2:-1]]
    shown = [[f"{rows[name]:,.0f}" for name in names] for names in (("paca", "paca+lean"), ("lora",), ("lora-tuned",))]
    assert told == shown


def means(page: str, value: str) -> dict[str, float]:
    """Of each method of a comparison, at the rate that all seeds ran with; of several, the one that its page names."""
    text = (ROOT / "benchmarks" / "quality" / page / "comparison.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| ([\w-]+) \| (\d\S*) \| \d+ \|", text, flags=re.MULTILINE))
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for line in (ROOT / "benchmarks" / "quality" / page / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["method"], row["learning_rate"]].append({**row, **row["train_info"]}[value])
    whole = {key: fmean(values) for key, values in found.items() if len(values) >= 3}
    several = {method for method, count in Counter(method for method, _ in whole).items() if count > 1}
    chosen = {key for key in whole if key[0] not in several or math.isclose(key[1], float(named[key[0]]), rel_tol=1e-2)}
    return {method: whole[method, rate] for method, rate in chosen}


@pytest.mark.parametrize(
    ("name", "page", "value"),
    [
        ("equal time, encyclopedia", "encyclopedia-long-time", "loss"),
        ("equal time, GSM8K", "gsm8k-long-time", "loss"),
        ("equal time, GSM8K: share of right answers", "gsm8k-long-time", "score"),
        ("equal time, ARC", "arc-long-time", "score"),
        ("equal time, ARC, Gemma 270M", "arc-gemma-long-time", "loss"),
        ("equal memory, encyclopedia", "encyclopedia-long-memory", "loss"),
        ("equal memory, GSM8K", "gsm8k-long-memory", "score"),
        ("equal memory, ARC", "arc-long-memory", "score"),
        ("equal parameters, encyclopedia", "encyclopedia-long-parameters", "loss"),
        ("equal parameters, ARC", "arc-long-parameters", "score"),
    ],
)
def test_losses_and_answers_are_those_of_their_pages(name: str, page: str, value: str) -> None:
    found = means(page, value)
    own = "paca" if page == "arc-long-time" or "parameters" in page else "paca-256"
    assert row_of_table(name) == [[f"{found[method]:.3f}"] for method in (own, "lora", "lora-tuned")]


def test_the_loss_of_factors_is_that_of_their_rows_of_three_seeds() -> None:
    rows = ROOT / "benchmarks" / "quality" / "arc-gemma-long-time" / "factors.jsonl"
    made = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in made if (row["steps"], row["learning_rate"]) == (330, 3.04e-4)]
    assert len(losses) == 3
    assert f"Gemma's [factors] of r 256 have {fmean(losses):.3f}." in TEXT


def test_solved_problems_are_those_of_the_rows() -> None:
    answered: dict[str, list[float]] = defaultdict(list)
    with (ROOT / "benchmarks" / "quality" / "gsm8k-time" / "answers.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not float(row["towards_end"]):
                answered[row["run"].partition("-lr")[0]].append(float(row["exact_match"]))
    wide, tuned, paca = (100 * fmean(answered[method]) for method in ("paca-256", "lora-tuned", "paca"))
    text = " ".join(TEXT.split())
    assert f"{paca:.1f} % of 666 of [GSM8K's problems], 256 columns {wide:.1f}, tuned LoRA {tuned:.1f}." in text


def test_numbers_of_the_table_of_all_comparisons_are_those_of_their_pages() -> None:
    table = (ROOT / "docs" / "notes" / "quality.md").read_text(encoding="utf-8").partition("| task | equal |")[2]
    page, compared = "", set()
    for line in itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()[2:]):
        task, _, *told, where = (cell.strip() for cell in line.strip("|").split("|"))
        page = where.partition("quality/")[2].partition("/")[0] or page  # else the same runs as in the row before
        if "held_back" in where:
            continue
        found = means(page, "loss" if "loss" in task else "score")
        plain = {name for name in found if name.startswith("lora") and name != "lora-tuned"}
        names = [{name for name in found if name.startswith("paca")}, plain, {"lora-tuned"}]
        for cell, methods in zip(told, names, strict=True):
            if cell == "not run":
                assert not methods & found.keys()
                continue
            number = cell.partition(" ")[0]
            assert number in {f"{found[name]:.{len(number) - 2}f}" for name in methods}, (page, cell)
        compared.add(page)
    pages = {path.parent.name for path in (ROOT / "benchmarks" / "quality").glob("*/comparison.md")}
    assert compared == pages


def test_the_means_in_short_are_rows_of_the_table_of_all_comparisons() -> None:
    short, _, rest = (ROOT / "docs" / "notes" / "quality.md").read_text(encoding="utf-8").partition("| task | equal |")
    long = list(itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[2:]))
    whole = [line.split("|") for line in long]
    rows = [(cells[1], [float(cell.split()[0]) for cell in cells[3:6] if "not run" not in cell]) for cells in whole]
    seen = 0
    for line in re.findall(r"^\| (?:loss|right), .*", short, flags=re.MULTILINE):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        kind, task = name.split(", ")
        for cell in cells:
            triple = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
            of_it = [means for where, means in rows if task in where and ("loss" in where) == (kind == "loss")]
            assert triple in [[round(mean, 3) for mean in means] for means in of_it], (name, cell)
            seen += 1
    assert seen == 18
