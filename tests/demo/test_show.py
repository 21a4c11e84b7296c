"""What the demo prints at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from demo import show as demo_show
from paca.pretrained import generation
from paca.training import load_run_config
from tiny_checkpoint import save_run

ROOT = Path(__file__).parents[2]
SUMMARY = {
    "eval_loss_before": 2.71828,
    "eval_loss_after": 1.61803,
    "data": {"train_examples": 1234, "eval_examples": 56},
    "trainable_parameters": 2_488_320,
    "trainable_percent": 1.85,
    "tokens_per_second": 314.1,
    "tokens": 54321,
    "peak_memory_bytes": 3 * 2**30,
    "seconds": 240,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = save_run(tmp_path / "run")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    turns = [{"role": "user", "content": "What is [red]zero[/red]?"}, {"role": "assistant", "content": "A number."}]
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    monkeypatch.setattr(demo_show, "TEST", tmp_path / "test.jsonl")
    return folder


def printed(run: Path) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    demo_show.show(run, console)
    return console.export_text()


def test_it_shows_the_numbers_of_the_run_and_both_answers(run: Path) -> None:
    text = printed(run)
    for expected in (
        "2.718 before, 1.618 after",
        "1,234",
        "56",
        "2,488,320",
        "314 tokens/s",
        "3.00 GiB",
        "4.0 minutes",
    ):
        assert expected in text
    assert "What is [red]zero[/red]?" in text
    assert "A number." in text
    loaded = generation.load_for_generation(run)
    question = [{"role": "user", "content": "What is [red]zero[/red]?"}]
    made = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    assert made["after"] == "".join(generation.stream_reply(loaded, question, max_new_tokens=demo_show.ANSWER_TOKENS))
    with loaded.model.disable_adapter():
        before = "".join(generation.stream_reply(loaded, question, max_new_tokens=demo_show.ANSWER_TOKENS))
    assert made["before"] == before != made["after"]


def test_the_second_time_no_model_is_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = printed(run)
    monkeypatch.setattr(generation, "load_for_generation", lambda *_: pytest.fail("loads the model again"))
    assert printed(run) == first


def test_the_recipe_is_a_valid_run_of_the_prepared_files() -> None:
    config = load_run_config(ROOT / "recipes/demo.yaml")
    assert config.model.name.endswith(str(demo_show.CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert config.data.train.endswith(str(demo_show.CACHE / "data/train.jsonl"))
    assert str(config.data.eval).endswith("data/test.jsonl")
    assert Path(config.output.dir).relative_to(Path.cwd()) == demo_show.RUN
