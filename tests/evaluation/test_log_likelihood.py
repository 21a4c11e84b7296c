from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from models import adapt, gpt2, llama
from paca.evaluation import log_likelihood
from paca.evaluation.completions import completions
from paca.evaluation.log_likelihood import Continuation, likelihoods
from paca.messages.errors import PacaError
from paca.pretrained.generation_settings import find_learned_cache
from tiny_checkpoint import byte_tokenizer


def test_a_model_whose_output_is_nan_is_refused_by_name() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(PacaError, match=r"output is NaN, in float32, so that nothing can be scored"):
        likelihoods(model, [Continuation([1, 2], [3])], batch_size=1)


@pytest.mark.parametrize("make", [llama, gpt2, lambda: adapt(llama())])
def test_long_answers_are_scored_in_pieces_of_one_pass(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of all their tokens would be the largest tensor of an evaluation."""
    model, words = make().eval(), random.Random(0)
    asked = [Continuation([1, 2, 3][:n], words.choices(range(64), k=length)) for n, length in ((1, 29), (3, 8), (2, 1))]
    monkeypatch.setattr(log_likelihood, "TOGETHER", 12)
    passes, made = [], []
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    model.get_output_embeddings().register_forward_hook(lambda *_: made.append(_[2].shape[:2].numel()))
    found = likelihoods(model, asked, batch_size=3)
    assert len(passes) == 1
    assert sum(made) == 3 * 29
    assert max(made) <= 12
    for one, (prompt, answer) in zip(found, asked, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, -len(answer) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert one.log_probability == pytest.approx(float(wanted), abs=1e-4)
        assert one.tokens == len(answer)
        assert one.correct == (logits.argmax(-1) == torch.tensor(answer)).sum()


LEARNED = [PromptTuningConfig, PrefixTuningConfig, CartridgeConfig]


def with_a_learned_prompt(kind: Any) -> PeftModel:
    base = llama()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(30)  # so that it matters how far what is learned stands from a token
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    find_learned_cache(model)
    torch.manual_seed(0)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", LEARNED)
def test_answers_after_a_learned_prompt_are_scored_where_they_stand(kind: Any) -> None:
    model, asked = with_a_learned_prompt(kind), [Continuation([1, 2, 3, 4], [5, 6]), Continuation([7, 8], [9])]
    for (prompt, answer), found in zip(asked, likelihoods(model, asked, batch_size=2), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, -len(answer) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        assert found.log_probability == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("kind", LEARNED)
def test_answers_after_a_learned_prompt_are_the_likeliest_tokens(kind: Any) -> None:
    """Also in batches of several lengths: padding would stand between what is learned and the shorter ones."""
    model, tokenizer, numbers = with_a_learned_prompt(kind), byte_tokenizer(), random.Random(0)
    prompts = [[numbers.randrange(1, 60) for _ in range(length)] for length in (1, 2, 2, 3, 5, 8, 13, 21, 21, 34)]
    model.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id = None, None, 0
    found = completions(model, tokenizer, prompts, max_new_tokens=6, batch_size=6)
    for prompt, text in zip(prompts, found, strict=True):
        said = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                said.append(int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(said[len(prompt) :], skip_special_tokens=True)


def test_without_learned_keys_and_values_the_base_model_answers() -> None:
    """Also after an answer with them, and with padding on the left."""
    model, plain = with_a_learned_prompt(PrefixTuningConfig), with_a_learned_prompt(PrefixTuningConfig).get_base_model()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    asked = {"input_ids": torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]]), "attention_mask": mask}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    adapted = model.generate(**asked, **options)
    with model.disable_adapter():
        found = model.generate(**asked, **options)
    assert torch.equal(found, plain.generate(**asked, **options))
    assert not torch.equal(found, adapted)
