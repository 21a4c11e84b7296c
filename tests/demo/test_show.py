"""What the demo prints at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo.prepare import CACHE
from rich.console import Console

from demo import show as demo_show
from paca.training import load_run_config

ROOT = Path(__file__).parents[2]
WRITTEN = [
    {"question": "What is [red]zero[/red]?", "reference": '{"zero": 0}', "answer": 'A number.\n\n{"zero":'},
    {"question": "One?", "reference": '{"one": 1}', "answer": '{"one": 2}'},
    {"question": "Two?", "reference": '{"two": 2}', "answer": "Two"},
    {"question": "Three?", "reference": '{"three": 3}', "answer": "Three"},
]
LEARNED = [sample | {"answer": sample["reference"]} for sample in WRITTEN]
LEARNED[1]["answer"] = '{"one": 7}'
SUMMARY = {
    "eval_loss_before": 2.71828,
    "eval_loss_after": 0.61803,
    "scores": {
        "before": {"exact_match": 0.0, "examples": 48, "samples": WRITTEN},
        "after": {"exact_match": 45 / 48, "examples": 48, "samples": LEARNED},
    },
    "data": {"train_examples": 1234},
    "trainable_parameters": 2_488_320,
    "trainable_percent": 1.85,
    "tokens_per_second": 314.1,
    "train_seconds": 78.4,
    "peak_memory_bytes": 3 * 2**30,
}


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    with open("/dev/null", "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        demo_show.show(tmp_path, console)
    return console.export_text().splitlines()


def test_it_shows_the_numbers_of_the_run(lines: list[str]) -> None:
    text = "\n".join(lines)
    for expected in (
        "0 of 48 before, 45 of 48 after",
        "2.718 before, 0.618 after",
        "1,234",
        "2,488,320",
        "78 s, 314 tokens/s",
        "3.00 GiB",
    ):
        assert expected in text


def test_it_shows_three_answers_before_and_after_beside_the_expected_one(lines: list[str]) -> None:
    table = [line.split(maxsplit=1) for line in lines]
    shown = [tuple(map(str.rstrip, row)) for row in table if row and row[0] in ("asked", "before", "after", "expected")]
    assert shown == [
        ("asked", "What is [red]zero[/red]?"),
        ("before", 'A number. {"zero":  wrong'),
        ("after", '{"zero": 0}  right'),
        ("expected", '{"zero": 0}'),
        ("asked", "One?"),
        ("before", '{"one": 2}  wrong'),
        ("after", '{"one": 7}  wrong'),
        ("expected", '{"one": 1}'),
        ("asked", "Two?"),
        ("before", "Two  wrong"),
        ("after", '{"two": 2}  right'),
        ("expected", '{"two": 2}'),
    ]


def test_the_recipe_is_a_valid_run_of_the_prepared_files() -> None:
    config = load_run_config(ROOT / "recipes/demo.yaml")
    assert config.model.name.endswith(str(CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert config.data.train.endswith(str(CACHE / "data/train.jsonl"))
    assert str(config.data.eval).endswith("data/test.jsonl")
    assert config.eval.metric == "exact_match"
    assert Path(config.output.dir).relative_to(Path.cwd()) == demo_show.RUN


def test_a_run_of_another_recipe_is_no_demo(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"scores": None}))
    with pytest.raises(SystemExit, match="another recipe"):
        demo_show.show(tmp_path, Console(quiet=True))
