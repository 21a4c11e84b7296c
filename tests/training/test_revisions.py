"""`model.revision`: what a run trained on is what its results are loaded on, and what it is compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from paca.convert.exported import export_adapter
from paca.convert.merged import merge_to_folder
from paca.pretrained.generation import load_saved
from paca.pretrained.in_turn import ModelsInTurn
from paca.training import RunResult, describe, load_run_config, train
from paca.training.trainers.grpo import Grpo
from tiny_checkpoint import save_base
from training.tiny_run import rows

NAME = "acme/tiny"
SHORT = ["train.max_steps=1", "train.save_strategy=no", "eval.before=false", "train.learning_rate=0.01"]


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub's with two revisions of a model, of which the default one is wrong everywhere here."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        save_base(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    model = AutoModelForCausalLM.from_pretrained(repository / "snapshots" / ("a" * 40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    model.save_pretrained(repository / "snapshots" / ("a" * 40))
    return cache


@pytest.fixture(autouse=True)
def cached(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))


@pytest.fixture
def run(config_file: Path, tmp_path: Path) -> Callable[..., RunResult]:
    def run(*overrides: str, **sections: Any) -> RunResult:
        file = tmp_path / "run.yaml"
        text = config_file.read_text().replace("paca:\n  r: 4\n", "")
        file.write_text(text.replace("  max_length: 128\n", "") if "train.trainer=grpo" in overrides else text)
        named = [f"model.name={NAME}", "model.revision=v1", f"output.dir={tmp_path / 'run'}"]
        whole = [f"{name}={json.dumps(values)}" for name, values in sections.items()]
        return train(load_run_config(file, [*named, *whole, *SHORT, *overrides]), console=Console(quiet=True))

    return run


def trained_embeddings(hub: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(
        hub / "models--acme--tiny/snapshots" / ("b" * 40)
    ).model.embed_tokens.weight


@pytest.mark.parametrize("sections", [{"paca": {"r": 4}}, {"lora": {"r": 2}}, {"peft": {"peft_type": "IA3"}}])
def test_an_adapter_is_put_on_the_revision_that_it_was_trained_on(
    run: Callable[..., RunResult], hub: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    folder, expected = run(**sections).folder, trained_embeddings(hub)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"
    assert torch.equal(load_saved(folder).model.get_input_embeddings().weight, expected)
    assert torch.equal(ModelsInTurn().load(folder).model.get_input_embeddings().weight, expected)
    merge_to_folder(folder, tmp_path / "merged", verify=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.model.embed_tokens.weight, expected)
    other = load_saved(folder, base_model=str(save_base(tmp_path / "other", context=512)))
    assert other.model.config.max_position_embeddings == 512  # another base model, which has no such revision
    if "paca" in sections:
        adapter = export_adapter(folder, tmp_path / "lora", "lora").adapter
        assert (adapter.base, adapter.config.revision) == (NAME, "v1")


def test_columns_on_quantized_weights_start_from_the_same_revision(run: Callable[..., RunResult], hub: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = run("model.quantization=nf4", "train.learning_rate=0", paca={"r": 4})
    model = load_saved(result.folder).model
    original = AutoModelForCausalLM.from_pretrained(hub / "models--acme--tiny/snapshots" / ("b" * 40))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    columns = layer.paca_indices["default"]
    found = layer.base_layer.patched_weight(torch.float32, (layer.columns_of("default"),))[:, columns]
    assert torch.allclose(found, original.model.layers[0].self_attn.q_proj.weight[:, columns], atol=1e-3)


PAIR = {"question": "why?", "chosen": "yes", "rejected": "no, never"}


def test_the_reference_of_a_run_in_full_is_the_same_revision(run: Callable[..., RunResult], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(8)))
    result = run(
        f"data.train={tmp_path / 'pairs.jsonl'}",
        "data.eval=2",
        "train.trainer=dpo",
        "train.disable_dropout=true",
        full={},
    )
    losses = [row["loss"] for row in rows(result.folder) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # of a model that is its own reference


def test_the_reference_of_rewards_is_the_same_revision(
    run: Callable[..., RunResult], hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "why?", "answer": "so"}\n' * 8)
    made: list[Any] = []
    make = Grpo.make
    monkeypatch.setattr(Grpo, "make", lambda *given, **parts: made.append(make(*given, **parts)) or made[0])
    settings = ["train.trainer=grpo", "train.reward_funcs=exact_match", "train.num_generations=2", "train.beta=0.1"]

    run(f"data.train={tmp_path / 'questions.jsonl'}", "data.eval=null", *settings, full={})
    assert torch.equal(made[0].ref_model.model.embed_tokens.weight, trained_embeddings(hub))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"paca": {"r": 4}}, "the model without its adapter; no second copy is held"),
        ({"full": {}}, "the model as it came: a second copy of it, held beside the one that is trained"),
        ({"full": {}, "precompute_ref_log_probs": True}, "the model as it came; what it says of the pairs"),
    ],
)
def test_the_plan_says_what_the_reference_is(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(8)))
    content: dict[str, Any] = {
        "model": {"name": NAME, "revision": "v1"},
        "data": {"train": str(tmp_path / "pairs.jsonl")},
        "train": {"trainer": "dpo", **{k: v for k, v in sections.items() if k.startswith("precompute")}},
        **{k: v for k, v in sections.items() if k in ("paca", "full")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    assert dict(describe(load_run_config(tmp_path / "run.yaml")).lines())["reference"].startswith(words)
