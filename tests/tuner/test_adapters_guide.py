"""The snippets of docs/guides/adapters.md run, and do what is said around them."""

from __future__ import annotations

from pathlib import Path

import torch

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "adapters.md"


def test_the_guides_snippets_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = GUIDE.read_text(encoding="utf-8")
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    names: dict = {}
    exec(compile(code, str(GUIDE), "exec"), names)
    assert names["answers"].shape == (4, 9 + 5)
    model, again, ids = names["model"], names["again"].eval(), names["ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits[2], names["logits"][2])
