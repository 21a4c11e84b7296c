"""The model that the methods share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bench.tiny_bench import prepared, settings
from paca.bench.base_model import build_base_model
from paca.bench.methods import MethodUnavailable
from paca.bench.settings import BenchSettings
from paca.messages.errors import PacaError
from tiny_checkpoint import save_run


def test_weights_are_random_reproducible_and_frozen() -> None:
    first, again = build_base_model(settings()), build_base_model(settings())
    other = build_base_model(settings(seed=1))
    names = dict(first.model.named_parameters())
    assert all(torch.equal(p, dict(again.model.named_parameters())[n]) for n, p in names.items())
    query = names["layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(query, other.model.get_submodule("layers.0.self_attn.q_proj").weight)
    assert 0.018 < query.float().std() < 0.022
    assert torch.equal(names["norm.weight"], torch.ones_like(names["norm.weight"]))
    assert not any(p.requires_grad for p in names.values())
    assert all(not buffer.is_meta for buffer in first.model.buffers())
    assert (first.hidden_size, first.layers, first.vocab_size) == (192, 2, 50)


def test_tied_embeddings_stay_tied() -> None:
    model = build_base_model(settings(scope="model")).copy_sharing_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]


def test_copies_share_the_weights_but_not_the_modules() -> None:
    base = build_base_model(settings())
    adapted, full = prepared(base, "paca"), prepared(base, "full")
    weight = base.model.get_submodule("layers.1.mlp.up_proj").weight
    copied = full.get_submodule("layers.1.mlp.up_proj").weight
    assert copied.data_ptr() == weight.data_ptr()
    assert copied.requires_grad
    assert not weight.requires_grad
    assert all(type(m) is not nn.Linear or not hasattr(m, "paca_delta") for m in base.model.modules())
    resident = adapted.get_submodule("base_model.model.layers.1.mlp.up_proj.base_layer").weight
    assert resident.data_ptr() == weight.data_ptr()


def test_a_folder_is_measured_like_a_preset(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run") / "base"
    base = build_base_model(settings(model=str(folder), layers=None, hidden=None, vocab=None))
    assert base.layers > 0
    assert base.hidden_size > 0
    assert not hasattr(base.model, "lm_head")  # scope blocks
    assert prepared(base, "lora") is not None


def test_settings_that_do_not_go_with_the_model_are_refused() -> None:
    with pytest.raises(PacaError, match="resizes presets only"):
        build_base_model(BenchSettings(model="some/folder", layers=2))
    with pytest.raises(PacaError, match="for language models"):
        build_base_model(BenchSettings(model="vit-b16", scope="blocks", device="cpu"))


def test_four_bit_weights_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MethodUnavailable, match="pip install bitsandbytes"):
        build_base_model(settings(), four_bit=True)
