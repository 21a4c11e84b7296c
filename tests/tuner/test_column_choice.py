"""The seed that columns are drawn from, and adapters of PEFT >= 0.22, which have none by default."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, distributed, multiprocessing

import paca
import pefts_own_paca
from forked_process import FORKS
from models import adapt, adapted_perceptron, llama, perceptron, tokens

LAYERS = [f"model.layers.{block}.{name}" for block in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]


def columns(model: Any) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if ".paca_indices." in name]


@pytest.mark.parametrize("order", ["sorted", "as drawn"])
def test_an_adapter_of_pefts_own_paca_loads_with_its_columns_and_its_scale(tmp_path: Path, order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in LAYERS:
        module = llama().get_submodule(name)
        indices = torch.randperm(module.in_features, generator=generator)[:4]
        delta = torch.randn(module.out_features, 4, generator=generator)
        layers[name] = (delta, indices.sort().values if order == "sorted" else indices)
    config = pefts_own_paca.TheirConfig(
        r=4, paca_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    pefts_own_paca.save(tmp_path / "theirs", config, layers)
    expected = pefts_own_paca.load(llama(), tmp_path / "theirs")(input_ids=tokens()).logits
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "theirs"))
    assert torch.equal(loaded(input_ids=tokens()).logits, expected)
    assert not torch.allclose(expected, llama()(input_ids=tokens()).logits, atol=0.01)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["random_seed"] is None
    again = pefts_own_paca.load(llama(), tmp_path / "again")
    assert torch.equal(again(input_ids=tokens()).logits, expected)


def drawn(bases: int = 1, **settings: Any) -> list[Any]:
    """Adapted models; the base models are made, and torch's random state is set, before any seed is drawn."""
    models = [perceptron() for _ in range(bases)]
    torch.manual_seed(3)
    return [adapt(model, **{"random_seed": None, "target_modules": ["lin2"], **settings}) for model in models]


def seed_of(model: Any) -> int | None:
    return model.peft_config["default"].random_seed


def test_a_new_adapter_without_a_seed_draws_one_and_saves_it(tmp_path: Path) -> None:
    first, second = drawn(2)
    assert isinstance(seed_of(first), int)
    assert seed_of(first) != seed_of(second)
    assert not torch.equal(columns(first)[0], columns(second)[0])
    first.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["random_seed"] == seed_of(first)
    (same,) = drawn(random_seed=seed_of(first))
    assert torch.equal(columns(first)[0], columns(same)[0])


def test_the_drawn_seed_follows_torchs_random_state() -> None:
    assert seed_of(drawn()[0]) == seed_of(drawn()[0])


def test_columns_given_by_hand_need_no_seed() -> None:
    (model,) = drawn(indices={"lin2": [0, 3]}, init_weights=True)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), after)
    assert seed_of(model) is None


def test_a_loaded_adapter_without_a_seed_can_be_rotated(tmp_path: Path) -> None:
    config = pefts_own_paca.TheirConfig(r=2, paca_alpha=2, target_modules=["lin2"])
    pefts_own_paca.save(tmp_path / "theirs", config, {"lin2": (torch.ones(5, 2), torch.tensor([1, 7]))})
    loaded = peft.PeftModel.from_pretrained(perceptron(), str(tmp_path / "theirs"), is_trainable=True)
    before = loaded(torch.ones(1, 7))
    paca.rotate(loaded, None, 1)
    assert torch.equal(loaded(torch.ones(1, 7)), before)
    assert not set(columns(loaded)[0].tolist()) & {1, 7}


def test_processes_that_are_not_connected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"random_seed is null.*not connected yet.*Give random_seed a number"):
        adapted_perceptron(random_seed=None)
    adapted_perceptron(random_seed=1)


def test_all_processes_of_a_run_draw_the_same_seed(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(_draw, args=(port, str(tmp_path)), nprocs=2, start_method=FORKS.get_start_method())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["seed"] == second["seed"]
    assert all(torch.equal(a, b) for a, b in zip(first["columns"], second["columns"], strict=True))


def _draw(rank: int, port: int, folder: str) -> None:
    base = perceptron()
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(rank)  # their own random states: left to those, they would draw different seeds
    model = adapt(base, random_seed=None, target_modules=["lin2"])
    torch.save({"seed": seed_of(model), "columns": columns(model)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
