"""TRL's and transformers' trainers, unchanged: the policy trains, and the reference is the base model bit for bit."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

import paca
from models import base_state, llama
from tiny_checkpoint import byte_tokenizer

PAIRS = Dataset.from_list(
    [
        {"prompt": f"count to {n}:", "chosen": " one two three"[: 4 * n], "rejected": " no" * n}
        for n in (1, 2, 3, 1, 3, 2)
    ]
)


def config(**settings):
    return paca.PacaConfig(**{"r": 4, "paca_alpha": 8, "task_type": "CAUSAL_LM", **settings})


def causal_model(dtype=torch.float32):
    tokenizer = byte_tokenizer()
    return llama(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    ).to(dtype)


def arguments(kind, folder, **settings):
    return kind(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.05,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "logging_steps": 1,
            **settings,
        }
    )


def stock_with_log_probs(model, trainer):
    """A model that never met PaCA, with the log-probabilities that TRL adds to the one it trains."""
    add_fused_lm_head(model, temperature=getattr(trainer, "temperature", 1.0))
    return model


def record_references(trainer):
    """Note what the model is asked and answers in passes without gradients, which are the reference's."""
    inner, seen = trainer.model.get_base_model(), []
    forward, layer = inner.forward, inner.model.layers[0].self_attn.q_proj

    @functools.wraps(forward)
    def recording(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if kwargs.get("fused_lm_head") and not torch.is_grad_enabled():
            who = "base" if layer.disable_adapters else "+".join(layer.active_adapters)
            seen.append((who, kwargs, outputs.log_probs.clone()))
        return outputs

    inner.forward = recording
    return seen


def deltas(model, adapter="default"):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f"paca_delta.{adapter}" in n}


def check_trained(model, before):
    after = deltas(model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def check_references(seen, who, stock, policy):
    """Each reference pass gave `stock`'s log-probabilities bit for bit, and the policy now gives others."""
    assert seen
    assert {name for name, _, _ in seen} == {who}
    with torch.no_grad():
        for _, kwargs, log_probs in list(seen):
            assert torch.equal(stock(**kwargs).log_probs, log_probs)
            assert not torch.equal(policy(**kwargs).log_probs, log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_with_the_adapter_disabled_as_reference(tmp_path, dtype, precompute):
    base = causal_model(dtype)
    stock, originals = copy.deepcopy(base), base.state_dict()
    originals = {name: value.clone() for name, value in originals.items()}
    trainer = DPOTrainer(
        base,
        args=arguments(DPOConfig, tmp_path, precompute_ref_log_probs=precompute),
        train_dataset=PAIRS,
        processing_class=byte_tokenizer(),
        peft_config=config(),
    )
    seen, before = record_references(trainer), deltas(trainer.model)
    trainer.train()
    check_trained(trainer.model, before)
    assert trainer.ref_model is None
    if precompute:  # TRL computes them in the constructor's model, before training; ask once more, after it
        with trainer.model.disable_adapter():
            batch = next(iter(trainer.get_train_dataloader()))
            trainer.compute_ref_log_probs(trainer.model, batch)
    check_references(seen, "base", stock_with_log_probs(stock, trainer), trainer.model)
    for name, value in base_state(trainer.model).items():
        assert torch.equal(value, originals[name])


def loaded_adapter(folder, dtype=torch.float32):
    """An adapter whose columns are not those that its config would draw, as another selection leaves them."""
    adapted = peft.get_peft_model(causal_model(dtype), config(init_weights=False))
    adapted.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith("paca_indices"):
            others = torch.tensor([n for n in range(32) if n not in value.tolist()])
            tensors[name] = others[: len(value)].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return peft.PeftModel.from_pretrained(causal_model(dtype), folder, is_trainable=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dpo_with_a_named_reference_adapter(tmp_path, dtype):
    """TRL gives a loaded adapter a frozen twin, "ref", with its config and a copy of its parameters."""
    stock = loaded_adapter(tmp_path / "adapter", dtype).merge_and_unload()
    trainer = DPOTrainer(
        peft.PeftModel.from_pretrained(causal_model(dtype), tmp_path / "adapter", is_trainable=True),
        args=arguments(DPOConfig, tmp_path),
        train_dataset=PAIRS,
        processing_class=byte_tokenizer(),
    )
    assert set(trainer.model.peft_config) == {"default", "ref"}
    seen, before, frozen = record_references(trainer), deltas(trainer.model), deltas(trainer.model, "ref")
    trainer.train()
    check_trained(trainer.model, before)
    check_references(seen, "ref", stock_with_log_probs(stock, trainer), trainer.model)
    for name, value in deltas(trainer.model, "ref").items():
        assert torch.equal(value, frozen[name])
        assert torch.equal(value, before[name.replace(".ref", ".default")])


def test_only_trls_reference_starts_as_a_copy():
    model = peft.get_peft_model(causal_model(), config(init_weights=False))
    model.peft_config["default"].init_weights = True
    for name, settings in (("other", model.peft_config["default"]), ("ref", config())):
        model.add_adapter(name, settings)  # another name, and another config
        assert deltas(model, name)
        assert not any(value.any() for value in deltas(model, name).values())


def test_an_adapter_on_the_output_layer_is_refused_by_trl_itself(tmp_path):
    """TRL multiplies by the output layer's weight directly, so its columns would get no gradient; it says so."""
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        DPOTrainer(
            causal_model(),
            args=arguments(DPOConfig, tmp_path),
            train_dataset=PAIRS,
            processing_class=byte_tokenizer(),
            peft_config=config(target_modules=["lm_head", "q_proj"]),
        )


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("named", [False, True])
def test_grpo_and_rloo_with_a_reference(tmp_path, trainer_class, config_class, named):
    stock = loaded_adapter(tmp_path / "adapter").merge_and_unload() if named else causal_model()
    model = loaded_adapter(tmp_path / "adapter") if named else causal_model()
    trainer = trainer_class(
        model,
        args=arguments(
            config_class, tmp_path, num_generations=2, max_completion_length=5, beta=0.1, temperature=0.8, max_steps=3
        ),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": "say"}, {"prompt": "something"}] * 3),
        processing_class=byte_tokenizer(),
        peft_config=None if named else config(),
    )
    seen, before = record_references(trainer), deltas(trainer.model)
    trainer.train()
    check_trained(trainer.model, before)
    references = [s for s in seen if s[0] != "default"]  # the policy's own sampling passes have no gradients either
    check_references(references, "ref" if named else "base", stock_with_log_probs(stock, trainer), trainer.model)


# -- heads that are trained whole ------------------------------------------------------------------------------------


def classifier(labels, seed=0):
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=labels,
        )
    )


def check_head(trainer, tmp_path, labels, before):
    """The head and the columns were trained and saved, and load into the same model."""
    model = trainer.model
    check_trained(model, before)
    inner = model.get_base_model()
    assert isinstance(inner.score.modules_to_save["default"], nn.Linear)
    assert not torch.equal(inner.score.modules_to_save["default"].weight, inner.score.original_module.weight)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.score.weight"], inner.score.modules_to_save["default"].weight)
    assert not any("score.paca" in name for name in saved)
    loaded = peft.PeftModel.from_pretrained(classifier(labels), tmp_path / "saved")
    tokens = torch.tensor([[1, 2, 3, 4]])
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, classifier(labels).eval()(input_ids=tokens).logits)


def test_a_classifier_without_its_head_in_the_file_is_refused(tmp_path):
    adapted = peft.get_peft_model(classifier(2), config(task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if "score" not in n}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds no tensor of"):
        peft.PeftModel.from_pretrained(classifier(2), tmp_path)


def test_reward_model_with_its_head(tmp_path):
    trainer = RewardTrainer(
        classifier(1),
        args=arguments(RewardConfig, tmp_path),
        train_dataset=PAIRS,
        processing_class=byte_tokenizer(),
        peft_config=config(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    before = deltas(trainer.model)
    trainer.train()
    check_head(trainer, tmp_path, 1, before)


def test_sequence_classification_with_its_head(tmp_path):
    model = peft.get_peft_model(classifier(3), config(task_type="SEQ_CLS", modules_to_save=["score"]))
    rows = [{"input_ids": [n, n + 1, n + 2], "labels": n % 3} for n in range(1, 9)]
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path), train_dataset=Dataset.from_list(rows))
    before = deltas(model)
    trainer.train()
    check_head(trainer, tmp_path, 3, before)
