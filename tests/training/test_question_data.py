"""Training on questions with options: the column that lists them travels along and disturbs nothing."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from paca.training import load_run_config, train
from training.tiny_run import save_workspace


def test_questions_with_options_train_like_any_other_answers(tmp_path: Path) -> None:
    config = save_workspace(tmp_path)
    rows = [{"question": f"Is it {n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(load_run_config(config, ["train.max_steps=3", "data.eval=4"]), console=Console(quiet=True))
    assert result.summary is not None
    assert result.summary["data"]["format"] == "mmlu"
    assert result.summary["eval_loss_after"] != result.summary["eval_loss_before"]
