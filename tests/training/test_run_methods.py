"""The same run with each method: trained, stopped and resumed to the same bits, asked, and merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import paca
from paca.convert.merged import merge_to_folder
from paca.evaluation.sides import sides_of
from paca.messages.errors import PacaError
from paca.planning import estimate
from paca.pretrained.conversation import answering
from paca.pretrained.generation import load_for_generation, stream_reply
from paca.training import RunResult, describe, load_run_config, train
from paca.training import run as run_module
from paca.training.lora_start import LoraStart
from paca.training.planned_run import target_of_run
from tiny_checkpoint import byte_tokenizer, save_base
from training.method_runs import LEARN_TOKENS, METHODS, TOKENS_ASKED, run, weights, write_config
from training.test_run import SignalAtStep
from training.tiny_run import curve

FinishedBy = Callable[[str], tuple[RunResult, torch.Tensor]]
SAVED_OTHERWISE = ("lora-corda", "lora-lora_ga", "lora-pissa_niter", "adalora", "adamss")
"""Than they trained: as a LoRA on the model as it came; cut to its ranks."""


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_resumed_bit_for_bit_answers_and_merges(
    method: str, config_file: Path, finished_by: FinishedBy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, in_memory = finished_by(method)
    monkeypatch.setattr(run_module, "StopOnSignal", SignalAtStep)
    monkeypatch.setattr(SignalAtStep, "step", 3)
    parts = write_config(config_file, tmp_path / "parts", method)
    assert run(parts).summary is None
    assert list(tmp_path.glob("parts/checkpoints/checkpoint-*"))
    assert not list(tmp_path.glob("parts/checkpoints/**/README.md"))  # TRL's and PEFT's, with nothing filled in
    monkeypatch.setattr(LoraStart, "_made", None)  # starts are kept
    resumed = run(parts, resume=True)

    assert whole.summary is not None
    assert resumed.summary is not None
    first, second = weights(whole.folder), weights(resumed.folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert curve(whole.folder) == curve(resumed.folder)
    assert whole.summary["scores"] == resumed.summary["scores"]
    check_summary(whole.summary, method)
    for name in ("report.html", f"{'model' if method == 'full' else 'adapter'}/README.md"):
        assert whole.summary["method"]["name"] in (whole.folder / name).read_text().lower()

    loaded = load_for_generation(whole.folder)
    assert "".join(stream_reply(loaded, [{"role": "user", "content": "a cat"}], max_new_tokens=4)) is not None
    expected = loaded.model(TOKENS_ASKED).logits
    rounding = 16 * torch.finfo(in_memory.dtype).eps if method in SAVED_OTHERWISE else 0
    assert (in_memory - expected).abs().max() <= rounding * expected.abs().max()
    if method in LEARN_TOKENS:
        with pytest.raises(PacaError, match="adds to what the model reads, not to its weights"):
            merge_to_folder(whole.folder, tmp_path / "merged")
        card = (whole.folder / "adapter/README.md").read_text()
        assert "paca merge" not in card
        assert ("answers as the base does, without an error" in card) == (method.startswith(("prefix", "cartridge")))
        return
    merged = merge_to_folder(whole.folder, tmp_path / "merged")
    assert merged.difference is not None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    found = plain(TOKENS_ASKED).logits
    # What rounding explains: a run in bfloat16 answers in it, and its checkpoint stays float32.
    coarser = max(torch.finfo(dtype).eps for dtype in (plain.dtype, loaded.model.dtype))
    assert (found - expected).abs().max() <= 32 * coarser * expected.abs().max()
    base = AutoModelForCausalLM.from_pretrained(whole.summary["model"]["name"], dtype=plain.dtype)
    assert not torch.equal(base(TOKENS_ASKED).logits, found)


def check_summary(summary: dict[str, Any], method: str) -> None:
    assert summary["method"]["name"] == method.partition("-")[0]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert {side["examples"] for side in summary["scores"].values()} == {8}
    assert list(summary["scores"]) == ["before", "after"]
    assert summary["scores"]["before"]["loss"] > summary["scores"]["after"]["loss"]
    for name in ("trainable_parameters", "tokens", "train_seconds", "tokens_per_second", "peak_memory_bytes"):
        assert summary[name] > 0
    assert summary["versions"]["peft"]
    assert (summary["trainable_parameters"] == summary["model"]["parameters"]) == (method == "full")
    section = "peft" if "peft" in METHODS[method] else method.partition("-")[0]
    assert summary["method"]["settings"] == summary["config"][section]


def test_a_method_that_changes_the_weights_is_held_against_the_base_model_itself(
    config_file: Path, finished_by: FinishedBy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its adapter another model is left: that was measured as "before training", and as the base."""
    start = {"r": 4, "init_lora_weights": "pissa", "target_modules": "all-linear"}
    monkeypatch.setitem(METHODS, "pissa", {"lora": start})
    changed, plain = run(write_config(config_file, tmp_path / "pissa", "pissa")), finished_by("lora")[0]
    assert changed.summary is not None
    assert plain.summary is not None
    assert changed.summary["scores"]["before"] == plain.summary["scores"]["before"]
    loaded = load_for_generation(changed.folder)
    assert sides_of(loaded) == ("adapter",)
    assert sides_of(load_for_generation(plain.folder)) == ("base", "adapter")
    left = r"without the adapter another model than \S+ is left, as init_lora_weights: pissa takes a part out"
    with pytest.raises(PacaError, match=left), answering(loaded, base=True):
        pass


def test_a_fast_adapter_has_the_type_of_the_weights_also_after_a_resume(
    config_file: Path, finished_by: FinishedBy, tmp_path: Path
) -> None:
    file = write_config(config_file, tmp_path / "run", "lora-tuned")
    folder = shutil.copytree(finished_by("lora-tuned")[0].folder, tmp_path / "run")
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    # Every step is made: the weights come from the checkpoint alone.
    trained = weights(folder)
    for name in ("summary.json", "adapter/adapter_model.safetensors"):
        (folder / name).unlink()
    run(file, resume=True)
    again = weights(folder)
    assert all(torch.equal(trained[name], again[name]) and again[name].dtype == torch.bfloat16 for name in trained)


def test_the_plan_of_each_method_is_what_it_trains(config_file: Path, tmp_path: Path) -> None:
    counted = {
        method: describe(load_run_config(write_config(config_file, tmp_path / method, method))) for method in METHODS
    }
    assert counted["full"].trainable_parameters == counted["full"].parameters
    assert counted["full"].targets == []
    assert counted["lora"].targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert counted["ia3"].method == "ia3"
    assert "columns" not in dict(counted["lora"].lines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paca: {}\nlora: {r: 8}\n", "one method, and these are given: paca (FILE, line 3) and lora (FILE, line 4)"),
        ("lora: {rank: 8}\n", "line 3: there is no key lora.rank. Did you mean lora.r?"),
        ("lora: {paca_alpha: 8}\n", "lora.paca_alpha. Did you mean lora.lora_alpha or paca.paca_alpha?"),
        ("lora: {learning_rate: 1}\n", "there is no key lora.learning_rate. Did you mean train.learning_rate?"),
        ("lora: {r: x}\n", "line 3: lora.r must be a whole number, not the text 'x'."),
        ("lora: {layers_pattern: [h]}\n", "section lora: When `layers_pattern` is specified, `layers_to_transform`"),
        ("lora: {init_lora_weights: eva}\ntrain: {trainer: reward}\n", "which goes by batches as train.trainer: sft"),
        ("lora: {init_lora_weights: pissa_niter_x}\n", "lora.init_lora_weights must be true or false or one of"),
        ("lora: {init_lora_weights: corda}\ntrain: {trainer: dpo}\n", "is the model without its adapter: init_lora"),
        ("lora: {init_lora_weights: lora_ga}\nmodel: {name: a, quantization: nf4}\n", "quantized ones can't be chan"),
        ("peft: {peft_type: ADALORA, init_lora_weights: eva}\n", "eva is a start of plain LoRA, which has a section"),
        ("lora: {lora_ga_config: {scal: unit}}\n", "line 3: there is no key lora.lora_ga_config.scal. Did you mean"),
        ("lora: {eva_config: 2}\n", "line 3: lora.eva_config must be a mapping (key: value) or null, not the number 2"),
        ("lora: {arrow_config: {}}\n", "lora.arrow_config can't be trained here: it mixes adapters that are trained"),
        ("lora: {bias: all}\ntrain: {trainer: dpo}\n", "line 3: lora.bias does not go with train.trainer: dpo"),
        ("lora: {init_lora_weights: olora}\ntrain: {trainer: dpo}\n", "is the model without its adapter: init_l"),
        ("lora: {layer_replication: [[0, 2], [0, 2]]}\n", "line 3: lora.layer_replication can't be trained here"),
        ("lora: {megatron_config: {a: 1}}\n", "load no adapter that sets it, as PEFT imports a module that it"),
        ("peft: {peft_type: SHADOW, shadow_model : a}\n", "peft.shadow_model can't be trained here"),
        ("paca: {rank: 8}\n", "there is no key paca.rank. Did you mean paca.r?"),
        ("paca: {lora_alpha: 8}\n", "paca.lora_alpha. Did you mean paca.paca_alpha or lora.lora_alpha?"),
        ("train: {r: 8}\n", "there is no key train.r. Did you mean paca.r?"),
        ("lora: {}\ntrain: {rank: 8}\n", "there is no key train.rank. Did you mean lora.r?"),
        ("train: {batch_size: 2}\n", "train.batch_size. Did you mean train.per_device_train_batch_size?"),
        ("lora: {batch_size: 2}\n", "lora.batch_size. Did you mean train.per_device_train_batch_size?"),
        ("data: {train: a, lean: true}\n", "there is no key data.lean. Did you mean model.lean?"),
        ("full: {r: 8}\n", "there is no key full.r."),
        ("full:\nmodel: {name: a, quantization: nf4}\n", "model.quantization does not go with full"),
        ("full:\ntrain: {autocast_adapter_dtype: false}\n", "full has none. Leave it out; model.dtype is"),
        ("lora: {}\ntrain: {factor_rank: 8}\n", "deltas, and lora has none. Leave it out; to compare methods,"),
        ("train: {factor_rank: 8, optim: sgd}\n", "train.factor_rank is AdamW's, and train.optim is sgd."),
        ("train: {factor_rank: 8, optim_args: a=1}\n", "train.factor_rank takes none of train.optim_args"),
        ("train: {factor_rank: 0}\n", "train.factor_rank must be above zero, not 0."),
        ("peft: {r: 8}\n", "peft.peft_type is missing; it names the method, such as IA3"),
        ("peft: {peft_type: LORA}\n", "line 3: peft.peft_type: LORA has a section of its own, lora."),
        ("peft: {peft_type: LOHAA}\n", "method of the installed PEFT, not the text 'LOHAA'. Did you mean LOHA?"),
        ("peft: {peft_type: IA3, r: 8}\n", "there is no key peft.r."),
        ("peft: {peft_type: X_LORA}\n", "Did you mean XLORA?"),
        ("peft: {peft_type: XLORA}\n", "XLORA can't be trained here: it mixes adapters that are trained already"),
        ("lroa: {r: 8}\n", "there is no section 'lroa'. Did you mean lora?"),
    ],
)  # fmt: skip
def test_a_key_in_the_wrong_place_says_where_it_belongs(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    needed = {"model": "{name: some/model}", "data": "{train: some/data}"}
    file.write_text("".join(f"{name}: {keys}\n" for name, keys in needed.items() if f"{name}:" not in text) + text)
    with pytest.raises(PacaError) as caught:
        load_run_config(file)
    assert message.replace("FILE", str(file)) in str(caught.value)


TOKENS = [
    ["paca.trainable_token_indices=[1, 2]"],
    ["lora.target_modules=[q_proj]", "lora.trainable_token_indices=[1, 2]"],
    ["peft.peft_type=TRAINABLE_TOKENS", "peft.token_indices=[1, 2]"],
]


@pytest.mark.parametrize("method", TOKENS)
def test_single_tokens_are_refused_before_training_where_embeddings_are_tied(
    config_file: Path, tmp_path: Path, method: list[str]
) -> None:
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    overrides = [*method] if method[0].startswith("paca.") else ["paca=null", *method]
    assert describe(load_run_config(config_file, overrides)).trainable_parameters > 0
    overrides.append(f"model.name={tied}")
    with pytest.raises(PacaError, match=r"^The section .* does not fit .*tied: Single tokens can't be trained .*tied"):
        describe(load_run_config(config_file, overrides))
    target = target_of_run(config_file, overrides, "cpu", None, None)
    with pytest.raises(PacaError, match=r"^Single tokens can't be trained"):
        estimate(target.model, target.setting, target.adapter)
    model = AutoModelForCausalLM.from_pretrained(tied)
    paca.untie_embeddings(model)
    model.save_pretrained(tmp_path / "untied")
    byte_tokenizer().save_pretrained(tmp_path / "untied")
    overrides += [f"model.name={tmp_path / 'untied'}", f"output.dir={tmp_path / 'run'}", "train.max_steps=1"]
    assert train(load_run_config(config_file, overrides), console=Console(quiet=True)).summary is not None


def test_factors_as_wide_as_the_deltas_are_refused(config_file: Path) -> None:
    with pytest.raises(PacaError, match=r"train\.factor_rank is 4 and paca\.r 4: .* Give a quarter of paca\.r\."):
        describe(load_run_config(config_file, ["train.factor_rank=4"]))


def test_a_method_may_come_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: some/model}\ndata: {train: some/data}\n")
    config = load_run_config(file, ["lora.r=4"])
    assert (config.method, config.adapter) == ("lora", {"r": 4})
    assert load_run_config(file).method == "paca"
    file.write_text(file.read_text() + "paca: {r: 4}\n")
    with pytest.raises(PacaError, match=r"paca \(.*line 3\) and lora \(--set\)"):
        load_run_config(file, ["lora.r=4"])


def test_a_plan_knows_the_method(config_file: Path, tmp_path: Path) -> None:
    fast, full = (
        target_of_run(write_config(config_file, tmp_path / method, method), (), "cpu", 128, 4)
        for method in ("lora-tuned", "full")
    )
    slow = replace(fast.setting, autocast_adapter_dtype=True)
    # PEFT casts the input of each adapted layer for an adapter in float32, and autograd keeps the copy.
    assert (
        estimate(fast.model, slow, fast.adapter).activations
        > estimate(fast.model, fast.setting, fast.adapter).activations
    )
    whole = estimate(full.model, full.setting, full.adapter)
    assert (whole.trainable, whole.weights) == (whole.parameters, "float32")


def test_a_run_in_full_is_evaluated_as_a_model(config_file: Path, finished_by: FinishedBy, tmp_path: Path) -> None:
    folder = finished_by("full")[0].folder
    loaded = load_for_generation(folder)
    assert (loaded.adapter, loaded.base) == (None, str(folder / "model"))
    again = load_run_config(config_file, [f"model.name={folder}", f"output.dir={tmp_path / 'again'}"])
    assert describe(again).source == "folder"  # and may be trained further
    with pytest.raises(PacaError, match="leave --base-model out"):
        load_for_generation(folder, base_model="some/model")


def test_a_run_of_one_step_trains(config_file: Path, tmp_path: Path) -> None:
    config = load_run_config(config_file, ["train.max_steps=1", f"output.dir={tmp_path / 'run'}"])
    result = train(config, console=Console(quiet=True))
    assert any(tensor.any() for name, tensor in weights(result.folder).items() if name.endswith("paca_delta"))
    config.train["warmup_steps"] = 1
    with pytest.raises(PacaError, match=r"would train nothing. Leave out train\.warmup_steps"):
        describe(config)


def test_settings_that_train_nothing_are_refused_before_the_model_is_loaded(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "tokens", {"peft": {"peft_type": "TRAINABLE_TOKENS"}})
    config = load_run_config(write_config(config_file, tmp_path / "run", "tokens"))
    with pytest.raises(PacaError, match=r"leave nothing to train\. .*TRAINABLE_TOKENS: token_indices"):
        describe(config)
