"""A limit on held-out data takes records from all of it, as files are often sorted."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

from paca.data.evenly import spread_evenly
from paca.training.config.config_file import load_run_config
from paca.training.trainers.kind import read_split, reader


@pytest.mark.parametrize(
    ("limit", "taken"), [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (2, [0, 2]), (1, [0])]
)
def test_rows_lie_at_equal_distances(limit: int | None, taken: list[int]) -> None:
    assert spread_evenly(Dataset.from_dict({"n": range(5)}), limit)["n"][:] == taken


@pytest.mark.parametrize("held_out", ["sorted.jsonl", 60])
def test_held_out_data_is_limited_over_all_kinds_of_a_sorted_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: str | int
) -> None:
    monkeypatch.chdir(tmp_path)
    records = [{"question": f"{kind} {n}", "answer": "yes"} for kind in ("easy", "hard") for n in range(50)]
    path = tmp_path / "sorted.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "run.yaml").write_text("model: {name: any}\ndata: {train: sorted.jsonl}\neval: {limit: 20}\n")
    config = load_run_config(tmp_path / "run.yaml", [f"data.eval={held_out}", f"output.dir={tmp_path / 'run'}"])
    _, found = read_split(config, partial(reader, family="text"))
    assert found is not None
    kinds = [row["prompt"][0]["content"].split()[0] for row in found.dataset]
    assert len(kinds) == 20
    assert 5 <= kinds.count("hard") <= 15
