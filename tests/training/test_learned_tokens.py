"""Methods of PEFT that learn tokens, or keys and values in their place: what a run leaves, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM, MambaConfig, PreTrainedConfig, Qwen3NextConfig
from trl.trainer.utils import add_fused_lm_head

from models import llama
from paca.data.tokens import IGNORED
from paca.evaluation.own_data import scorer
from paca.evaluation.own_run import config_of_run, held_out_of
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation
from paca.pretrained.generation_settings import sampling_settings
from paca.training import describe, load_run_config
from paca.training.context_tuning import train_on_context
from paca.training.learned_tokens import check_learned_tokens
from paca.training.sharding import check_sharding
from training.method_runs import LEARN_TOKENS, write_config
from training.test_run_methods import FinishedBy


@pytest.mark.parametrize("method", LEARN_TOKENS)
def test_what_is_loaded_answers_as_what_was_trained(method: str, finished_by: FinishedBy) -> None:
    result, _ = finished_by(method)
    loaded = load_for_generation(result.folder)
    assert result.summary is not None
    config = config_of_run(result.folder)
    measured = scorer(config.eval)
    assert measured is not None
    given = {"tokenizer": loaded.tokenizer, "rows": held_out_of(result.folder, config)[0].dataset, "when": "again"}
    assert measured.score(loaded.model, **given) == result.summary["scores"]["after"]
    with loaded.model.disable_adapter():
        assert measured.score(loaded.model, **given) == result.summary["scores"]["before"]

    said = asked = torch.arange(3, 9)[None]
    options = sampling_settings(loaded.model, loaded.tokenizer, 0) | {"eos_token_id": None, "pad_token_id": 0}
    written = loaded.model.generate(input_ids=asked, max_new_tokens=8, **options)
    for _ in range(8):
        with torch.no_grad():
            said = torch.cat([said, loaded.model(input_ids=said).logits[:, -1].argmax(-1)[:, None]], dim=1)
    assert torch.equal(written, said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{peft_type: PREFIX_TUNING}", "peft.num_virtual_tokens is missing: how many tokens are learned"),
        ("{peft_type: ADAPTION_PROMPT, adapter_layers: 2}", "peft.adapter_len is missing: how many tokens each layer"),
        (
            "{peft_type: PROMPT_TUNING, num_virtual_tokens: 5000}",
            r"num_virtual_tokens asks for 5,000 tokens before each text, and LlamaForCausalLM was made for 256 posit",
        ),
        ("{peft_type: CPT}", "peft.cpt_token_ids is missing: the tokens of the examples that CPT begins with"),
        ("{peft_type: CPT, cpt_token_ids: [1, 999]}", "the model has tokens 0 to 258, and not 999"),
        ("{peft_type: CPT, cpt_token_ids: [1, 2], cpt_mask: [1]}", "must have the same length"),
        (
            "{peft_type: CPT, cpt_token_ids: [1, 2], cpt_tokens_type_mask: [4, 8]}",
            "peft.cpt_tokens_type_mask leaves nothing to learn",
        ),
        ("{peft_type: ADAPTION_PROMPT, adapter_len: 4}", "peft.adapter_layers is missing: how many layers learn"),
    ],
)
def test_tokens_that_can_not_be_learned_are_refused_before_a_run(
    config_file: Path, tmp_path: Path, settings: str, message: str
) -> None:
    with pytest.raises(PacaError, match=message):
        describe(load_run_config(config_file, ["paca=null", f"peft={settings}", f"output.dir={tmp_path / 'run'}"]))


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("prefix_tuning", "train.gradient_checkpointing=true", "blocks keep no keys and values, which PREFIX_TUNING"),
        ("cartridge", "train.activation_checkpointing=true", "blocks keep no keys and values, which CARTRIDGE"),
        ("prefix_tuning", "train.trainer=reward", "peft.peft_type is PREFIX_TUNING, with which PEFT trains no classif"),
        ("adaption_prompt", "train.trainer=classification", "ADAPTION_PROMPT, with which PEFT trains no classifier"),
        ("prefix_tuning", "train.packing=true", "does not go with PREFIX_TUNING: with keys and values before"),
        ("p_tuning", "train.label_smoothing_factor=0.1", "does not go with P_TUNING: transformers smooths over"),
        ("cpt", "train.loss_type=dft", "train.loss_type does not go with CPT, which has a loss of its own"),
        ("cpt", "train.trainer=dpo", "is CPT, whose loss goes with train.trainer: sft, not dpo"),
    ],
)
def test_what_would_leave_out_what_is_learned_is_refused(
    config_file: Path, tmp_path: Path, method: str, override: str, message: str
) -> None:
    overrides = [override, *(["eval.metric=null"] if "trainer" in override else [])]
    with pytest.raises(PacaError, match=message):
        load_run_config(write_config(config_file, tmp_path / "run", method), overrides)


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning-projected"])
def test_the_loss_before_training_is_that_of_the_model_as_it_came(method: str, finished_by: FinishedBy) -> None:
    """What is learned begins at random: a run that left the model worse was told as one that made it better."""
    learned, plain = (finished_by(name)[0].summary for name in (method, "lora"))
    assert learned is not None
    assert plain is not None
    assert learned["eval_loss_before"] == pytest.approx(plain["eval_loss_before"], rel=1e-6)
    assert learned["eval_loss_after"] != pytest.approx(plain["eval_loss_before"], rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        (Qwen3NextConfig(num_hidden_layers=4), "a state"),
        (MambaConfig(num_hidden_layers=1), "a state"),
        (PreTrainedConfig(num_hidden_layers=1, kv_lora_rank=8), "what it computes keys and values from"),
    ],
)
def test_models_that_keep_no_keys_and_values_learn_none(shape: PreTrainedConfig, kept: str) -> None:
    model: Any = SimpleNamespace(config=shape, named_modules=list)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(PacaError, match=rf"PREFIX_TUNING learns keys and values of each layer, and \S+ keeps {kept}"):
        check_learned_tokens(prefix, model)
    check_learned_tokens(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), model)
    plain = llama()
    assert isinstance(plain, LlamaForCausalLM)
    check_learned_tokens(prefix, plain)


@pytest.mark.parametrize("sharded", [{"fsdp": True, "fsdp_config": {}}, {"deepspeed_plugin": object()}])
@pytest.mark.parametrize("method", ["prefix_tuning", "cartridge", "adaption_prompt"])
def test_shards_were_not_tried(method: str, sharded: dict[str, Any], config_file: Path, tmp_path: Path) -> None:
    arguments: Any = SimpleNamespace(**{"fsdp": None, "deepspeed_plugin": None, "world_size": 2, **sharded})
    config = load_run_config(write_config(config_file, tmp_path / "run", method))
    with pytest.raises(PacaError, match=rf"^peft\.peft_type: {method.upper()} was not tried with FSDP"):
        check_sharding(arguments, config)


@pytest.mark.parametrize(
    ("adapter", "reason", "failure"),
    [
        (peft.PolyConfig(n_tasks=1, target_modules=["q_proj"]), "wants the task of each record", "task_ids should not"),
        (peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=1), "wants the task of each", "task_ids can"),
    ],
    ids=["POLY", "MULTITASK_PROMPT_TUNING"],
)
def test_what_peft_does_not_train_with_trl_is_refused_with_the_reason(
    tmp_path: Path, adapter: Any, reason: str, failure: str
) -> None:
    file, kind = tmp_path / "run.yaml", adapter.peft_type.value
    file.write_text(f"model: {{name: some/model}}\ndata: {{train: some/data}}\npeft: {{peft_type: {kind}}}\n")
    with pytest.raises(PacaError, match=rf"line 3: peft\.peft_type: {kind} can't be trained here: .*{reason}"):
        load_run_config(file)
    adapter.task_type = "CAUSAL_LM"
    model, tokens = peft.get_peft_model(llama(), adapter), torch.arange(1, 5)[None]
    add_fused_lm_head(model.get_base_model())
    with pytest.raises(ValueError, match=failure):
        model(input_ids=tokens, labels=tokens, fused_lm_head=True)


def test_cpt_minimizes_what_peft_says_and_is_measured_on_the_texts() -> None:
    kinds = [1, 2, 3, 4, 5, 6, 7, 8]
    asked = {"cpt_token_ids": kinds, "cpt_tokens_type_mask": kinds, "opt_weighted_loss_type": "decay"}
    adapter = peft.CPTConfig(task_type="CAUSAL_LM", **asked, opt_loss_decay_factor=0.5)
    base = llama()
    plain, fused = (peft.get_peft_model(copy.deepcopy(base), adapter) for _ in range(2))
    texts = torch.arange(1, 22).reshape(3, 7)
    labels = texts.clone()
    labels[:, :3] = labels[1, 5:] = IGNORED
    add_fused_lm_head(fused.get_base_model())
    counted: list[Any] = []
    trainer = SimpleNamespace(model=fused, _get_num_items_in_batch=lambda batches, _: counted.extend(batches))
    train_on_context(trainer)

    expected = plain(input_ids=texts, labels=labels).loss
    found = fused.train()(input_ids=texts, labels=labels, fused_lm_head=True).log_probs
    trainer._get_num_items_in_batch([{"labels": labels}], None)
    loss = -found.sum() / (counted[0]["labels"][:, 1:] != IGNORED).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [
        torch.autograd.grad(value, model.prompt_encoder["default"].delta_embedding.weight)[0]
        for model, value in ((plain, expected), (fused, loss))
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)

    measured = fused.eval()(input_ids=texts, labels=labels, fused_lm_head=True)
    logits = plain(input_ids=texts).logits[:, len(kinds) :]
    of_texts = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert measured.loss.item() == pytest.approx(of_texts.item(), rel=1e-5)
