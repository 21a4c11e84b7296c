"""The numbers of README.md, and of the table in docs/notes/quality.md, are those of the committed rows."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from paca.bench.rows import read_rows, round_ratios, spread

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = re.sub(r"\s+", " ", re.sub(r"\]\([^)]*\)", "]", README))


def row_of_table(name: str) -> list[list[str]]:
    """The numbers in each cell behind the first of the table's row whose first cell begins so."""
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {name}"))
    return [re.findall(r"\d+\.\d+", cell) for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize(("number", "machine"), [(0, "cpu-core"), (1, "cpu-core-epyc")])
def test_step_times_are_ratios_taken_round_by_round(number: int, machine: str) -> None:
    rows = read_rows(ROOT / "benchmarks" / f"{machine}.csv")
    rows = rows[(rows.model == "SmolLM2-135M-Instruct") & (rows.metric == "step_time")]
    samples = {method: rows[rows.method == method].samples.item() for method in ("paca", "lora", "lora-tuned")}
    for cell, method in zip(row_of_table("time of a step"), ("lora", "lora-tuned"), strict=True):
        assert cell[number] == f"{spread(round_ratios(samples['paca'], samples[method])).median:.2f}"


def test_a_block_of_llama_8b_is_the_range_of_both_machines_and_loras() -> None:
    found = []
    for machine in ("cpu-core", "cpu-core-epyc"):
        rows = read_rows(ROOT / "benchmarks" / f"{machine}.csv")
        samples = rows[(rows.hidden == 4096) & (rows.metric == "step_time")].set_index("method").samples
        found += [spread(round_ratios(samples["paca"], samples[name])).median for name in ("lora", "lora-tuned")]
    assert f"Llama 8B's width takes [{min(found):.2f} to {max(found):.2f} ×]" in TEXT


def test_longest_sequences_are_those_of_the_rows() -> None:
    rows = read_rows(ROOT / "benchmarks" / "cpu-longest.csv").set_index("method")["median"]
    for cell, method in zip(row_of_table("longest sequence"), ("lora", "lora-tuned"), strict=True):
        assert cell == [f"{rows[own] / rows[method]:.1f}" for own in ("paca", "paca+lean")]


def means(page: str, value: str) -> dict[str, float]:
    """Of each method of a comparison, at the rate that all seeds ran with."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for line in (ROOT / "benchmarks" / "quality" / page / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["method"], row["learning_rate"]].append({**row, **row["train_info"]}[value])
    return {method: fmean(values) for (method, _), values in found.items() if len(values) == 3}


def test_the_accuracy_on_arc_is_that_of_its_page() -> None:
    accuracy = means("arc-long-time", "score")
    for cell, method in zip(row_of_table("ARC, same time"), ("lora", "lora-tuned"), strict=True):
        assert cell == [f"{accuracy['paca']:.3f}", f"{accuracy[method]:.3f}"]


@pytest.mark.parametrize(
    ("name", "page", "steps"),
    [
        ("loss, GSM8K, same time", "gsm8k-long-time", "GSM8K: {}, {}, and {}. "),
        ("encyclopedia, loss", "encyclopedia-long-time", "encyclopedia {}, {}, {};"),
    ],
)
def test_losses_in_the_same_time_are_those_of_their_pages(name: str, page: str, steps: str) -> None:
    loss, made = means(page, "loss"), means(page, "steps")
    for cell, method in zip(row_of_table(name), ("lora", "lora-tuned"), strict=True):
        assert cell == [f"{loss['paca-256']:.3f}", f"{loss[method]:.3f}"]
    told = steps.format(*(f"{made[method]:.0f}" for method in ("paca-256", "lora", "lora-tuned")))
    assert told in " ".join(TEXT.split())


@pytest.mark.parametrize(
    ("name", "task", "value"),
    [
        ("loss, encyclopedia", "encyclopedia", "loss"),
        ("loss, GSM8K |", "gsm8k", "loss"),
        ("right, ARC", "arc", "score"),
    ],
)
def test_losses_and_answers_are_those_of_their_pages(name: str, task: str, value: str) -> None:
    for cell, equal in zip(row_of_table(name), ("parameters", "time", "memory"), strict=True):
        found = means(f"{task}-{equal}", value)
        assert cell == [f"{found[method]:.3f}" for method in ("paca", "lora", "lora-tuned")]


def test_losses_of_more_columns_at_equal_memory_are_those_of_their_page() -> None:
    for page, said in (("encyclopedia", "(encyclopedia, 300 steps"), ("gsm8k", "GSM8K")):
        found = means(f"{page}-long-memory", "loss")
        told = ", ".join(f"{found[method]:.3f}" for method in ("paca-256", "lora", "lora-tuned"))
        assert f"{said}: {told};" in TEXT


def test_shares_of_all_of_arcs_questions_are_those_of_the_rows() -> None:
    with (ROOT / "benchmarks/quality/held_back/arc.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    told = [
        fmean(fmean(float(row[run]) for row in rows) for run in rows[0] if run.startswith(f"{name}-lr"))
        for name in ("arc-wide-memory/paca-wide", "arc-memory/lora", "arc-memory/lora-tuned")
    ]
    assert f"all of ARC's questions: {', '.join(f'{share:.3f}' for share in told)})" in TEXT


def test_solved_problems_are_those_of_the_rows() -> None:
    answered: dict[str, list[float]] = defaultdict(list)
    with (ROOT / "benchmarks" / "quality" / "gsm8k-time" / "answers.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not float(row["towards_end"]):
                answered[row["run"].partition("-lr")[0]].append(float(row["exact_match"]))
    wide, tuned, paca = (100 * fmean(answered[method]) for method in ("paca-256", "lora-tuned", "paca"))
    told = f"{paca:.1f} % of GSM8K's shorter problems, tuned LoRA {tuned:.1f} %; 256 in the same time {wide:.1f} %"
    assert told in TEXT


def test_numbers_of_the_table_of_all_comparisons_are_those_of_their_pages() -> None:
    table = (ROOT / "docs" / "notes" / "quality.md").read_text(encoding="utf-8").partition("| task | equal |")[2]
    page, compared = "", set()
    for line in itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()[2:]):
        task, _, *told, where = (cell.strip() for cell in line.strip("|").split("|"))
        page = where.partition("quality/")[2].partition("/")[0] or page  # else the same runs as in the row before
        if "held_back" in where:
            continue
        found = means(page, "loss" if "loss" in task else "score")
        names = [{name for name in found if name.startswith("paca")}, {"lora"}, {"lora-tuned"}]
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
    whole = [line.split("|") for line in long if "not run" not in line]
    rows = [(cells[1], [float(cell.split()[0]) for cell in cells[3:6]]) for cells in whole]
    seen = 0
    for line in re.findall(r"^\| (?:loss|right), .*", short, flags=re.MULTILINE):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        kind, task = name.split(", ")
        for cell in cells:
            triple = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
            of_it = [means for where, means in rows if task in where and ("loss" in where) == (kind == "loss")]
            assert triple in [[round(mean, 3) for mean in means] for means in of_it], (name, cell)
            seen += 1
    assert seen == 15
