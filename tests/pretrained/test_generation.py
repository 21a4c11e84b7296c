"""Loading for generation, and streaming replies."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from paca.messages.errors import PacaError
from paca.pretrained.generation import LoadedModel, load_for_generation, load_saved, stream_reply
from paca.pretrained.in_turn import ModelsInTurn
from tiny_checkpoint import CONTEXT, byte_tokenizer, ending_tokenizer, save_adapter, save_base, save_run

TOKENS = torch.arange(2, 26).reshape(2, 12)
QUESTION = [{"role": "user", "content": "What is a kernel?"}]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedModel:
    return load_for_generation(run)


def test_a_run_and_its_adapter_folder_load_as_peft_loads_them(run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, run / "adapter"))
    assert not torch.allclose(plain, expected, atol=0.1)  # else the comparisons below say nothing
    for path in (run, run / "adapter"):
        loaded = load_for_generation(path)
        assert loaded.adapter == run / "adapter"
        assert not loaded.model.training
        assert torch.equal(logits(loaded.model), expected)
        with loaded.model.disable_adapter():
            assert torch.equal(logits(loaded.model), plain)


def test_a_plain_model_loads_without_an_adapter(run: Path) -> None:
    loaded = load_for_generation(run / "base")
    assert loaded.adapter is None
    assert torch.equal(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(run / "base")))


def test_adapters_of_other_methods_load_too(run: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    lora = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    assert torch.equal(logits(load_for_generation(tmp_path / "lora").model), logits(lora))


@pytest.mark.parametrize("fast", [True, False])
def test_an_adapter_in_16_bits_computes_as_it_was_trained(run: Path, tmp_path: Path, fast: bool) -> None:
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    lora = get_peft_model(base, config, autocast_adapter_dtype=not fast)
    lora.save_pretrained(tmp_path / "lora")
    loaded = load_for_generation(tmp_path / "lora", dtype="bfloat16").model
    kind = torch.bfloat16 if fast else torch.float32
    assert {p.dtype for name, p in loaded.named_parameters() if "lora_" in name} == {kind}
    assert torch.equal(logits(loaded), logits(lora))


def test_the_dtype_of_the_weights_can_be_chosen(run: Path) -> None:
    assert load_for_generation(run, dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_run_is_in_the_dtype_that_it_was_trained_in(run: Path, tmp_path: Path) -> None:
    """`paca evaluate` took the checkpoint's float32 for a run in bfloat16, and had other scores than the run."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "summary.json").write_text(json.dumps({"model": {"dtype": "bfloat16"}}))
    for path in (copy, copy / "adapter"):
        assert load_for_generation(path).model.dtype == torch.bfloat16
        assert load_for_generation(path, dtype="float16").model.dtype == torch.float16
        assert load_saved(path).model.dtype == torch.float32  # as `paca merge` has it
    (copy / "summary.json").write_text(json.dumps({"model": {"dtype": "float64"}}))  # no run can ask for that
    assert load_for_generation(copy).model.dtype == torch.float32
    (copy / "summary.json").write_text(json.dumps({"model": {"dtype": "bfloat16"}}))
    models = ModelsInTurn()
    first = models.load(copy)
    assert models.load(run, beside=copy).model.dtype == torch.float32
    assert models.load(copy).model is first.model


def test_the_adapters_own_tokenizer_wins(run: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", run / "base")
    assert load_for_generation(adapter).tokenizer.chat_template == byte_tokenizer().chat_template
    byte_tokenizer("{{ messages[0]['content'] }}").save_pretrained(adapter)
    assert load_for_generation(adapter).tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_moved_run_finds_the_base_that_moved_along(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "first")
    config_file = tmp_path / "first/adapter/adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = str(tmp_path / "first/base")
    config_file.write_text(json.dumps(config))
    expected = logits(load_for_generation(tmp_path / "first").model)
    (tmp_path / "first").rename(tmp_path / "second")
    loaded = load_for_generation(tmp_path / "second")
    assert torch.equal(logits(loaded.model), expected)
    assert str(tmp_path / "second/base") in caplog.text


def test_a_missing_base_model_is_named_with_the_way_to_give_it(run: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(PacaError, match=r"(?s)needs its base model, .*model, which cannot.*--base-model"):
        load_for_generation(adapter)
    assert load_for_generation(adapter, base_model=str(tmp_path / "elsewhere")).adapter == adapter


def test_an_adapter_that_names_no_base_model_asks_for_one(run: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(PacaError, match=r"does not name the model.*--base-model"):
        load_for_generation(adapter)


def test_the_wrong_base_model_is_refused(run: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    smaller = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(smaller).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(PacaError, match="cannot be put on the model"):
        load_for_generation(run, base_model=str(tmp_path / "other"))


def test_a_plain_model_takes_no_base_model(run: Path) -> None:
    with pytest.raises(PacaError, match="whole model"):
        load_for_generation(run / "base", base_model="other")


def test_paths_that_are_no_adapter_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="No such folder"):
        load_for_generation(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("x")
    with pytest.raises(PacaError, match=r"is not an adapter.*It holds: notes.txt"):
        load_for_generation(tmp_path / "folder")
    with pytest.raises(PacaError, match="is a file"):
        load_for_generation(tmp_path / "folder/notes.txt")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(PacaError, match=r"not finished.*--resume"):
        load_for_generation(tmp_path / "run")


@pytest.mark.parametrize(
    "damage", ["cut short", "not safetensors", "missing", "config cut short", "tokenizer cut short"]
)
def test_a_damaged_adapter_is_one_clear_error_that_names_the_file(run: Path, tmp_path: Path, damage: str) -> None:
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    named = weights
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "not safetensors":
        weights.write_bytes(b"<html>404</html>" * 10)
    elif damage == "missing":
        weights.unlink()
    elif damage == "config cut short":
        config.write_text(config.read_text()[:40])
        named = config
    else:
        (adapter / "tokenizer.json").write_text("{")
        named = adapter
    with pytest.raises(PacaError) as caught:
        load_for_generation(adapter)
    assert named.name in str(caught.value)


def greedy_tokens(loaded: LoadedModel, count: int) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    inputs = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    reply = loaded.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return reply[0, ids.shape[1] :].tolist()


def test_the_pieces_of_a_reply_are_what_generate_decodes(loaded: LoadedModel) -> None:
    expected = loaded.tokenizer.decode(greedy_tokens(loaded, 24), skip_special_tokens=True)
    pieces = list(stream_reply(loaded, QUESTION, max_new_tokens=24))
    assert "".join(pieces) == expected
    assert "" not in pieces


@pytest.mark.parametrize("named_by", ["model", "tokenizer"])
def test_a_reply_stops_at_the_end_of_the_turn(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    tokens = greedy_tokens(loaded, 24)
    assert loaded.tokenizer.eos_token_id not in tokens
    end = tokens[8]  # from now on this token ends a turn
    if named_by == "model":
        monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [end, 0])
    else:
        monkeypatch.setattr(loaded, "tokenizer", byte_tokenizer())
        loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(end)
    expected = loaded.tokenizer.decode(tokens[: tokens.index(end) + 1], skip_special_tokens=True)
    assert "".join(stream_reply(loaded, QUESTION, max_new_tokens=24)) == expected


def test_sampling_differs_from_the_greedy_answer_and_follows_the_seed(loaded: LoadedModel) -> None:
    def sampled(seed: int) -> str:
        torch.manual_seed(seed)
        return "".join(stream_reply(loaded, QUESTION, max_new_tokens=24, temperature=5.0))

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def test_closing_the_stream_stops_the_model(loaded: LoadedModel) -> None:
    steps = 0

    def running() -> int:  # a timer that was cancelled may be there for a moment
        return sum(not isinstance(thread, threading.Timer) for thread in threading.enumerate())

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    hook = loaded.model.get_base_model().register_forward_pre_hook(count)
    threads = running()
    stream = stream_reply(loaded, QUESTION, max_new_tokens=200)
    next(stream)
    assert running() == threads + 1
    stream.close()
    hook.remove()
    assert running() == threads
    assert 0 < steps < 150


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("probabilities contain nan\nat line 3"), "RuntimeError: probabilities contain nan"),
        (TypeError("expected str"), "TypeError: expected str"),
        (MemoryError(), "out of memory"),
    ],
)
def test_an_error_while_generating_is_one_line(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(loaded.model, "generate", broken)
    with pytest.raises(PacaError, match=words) as caught:
        list(stream_reply(loaded, QUESTION))
    assert "\n" not in str(caught.value)
    assert (str(loaded.adapter) in str(caught.value)) == (words != "out of memory")
    with pytest.raises(PacaError, match=f"The model .*{words}"):
        list(stream_reply(LoadedModel(loaded.model, loaded.tokenizer, None, loaded.base), QUESTION))


def test_earlier_turns_change_the_answer(loaded: LoadedModel) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "zzz"}, *QUESTION]
    assert "".join(stream_reply(loaded, turns, max_new_tokens=16)) != "".join(
        stream_reply(loaded, QUESTION, max_new_tokens=16)
    )


def test_without_a_chat_template_the_text_is_continued(run: Path, loaded: LoadedModel) -> None:
    plain = LoadedModel(loaded.model, byte_tokenizer(None), loaded.adapter, loaded.base)
    inputs = plain.tokenizer("The sum", return_tensors="pt")
    tokens = plain.model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False
    )[0]
    expected = plain.tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    messages = [*QUESTION, {"role": "user", "content": "The sum"}]
    assert "".join(stream_reply(plain, messages, max_new_tokens=8)) == expected
    with pytest.raises(PacaError, match="prompt is empty"):
        list(stream_reply(plain, [{"role": "user", "content": ""}]))


def test_a_text_that_the_tokenizer_would_end_is_gone_on_with(loaded: LoadedModel) -> None:
    answers = []
    for tokenizer in (byte_tokenizer(None), ending_tokenizer()):
        plain = LoadedModel(loaded.model, tokenizer, loaded.adapter, loaded.base)
        answers.append(list(stream_reply(plain, QUESTION, max_new_tokens=8)))
    assert answers[0] == answers[1]


def test_the_end_of_the_context_cuts_an_answer(loaded: LoadedModel) -> None:
    prompt_tokens = len(loaded.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"])
    room = CONTEXT - prompt_tokens
    expected = loaded.tokenizer.decode(greedy_tokens(loaded, room), skip_special_tokens=True)
    assert "".join(stream_reply(loaded, QUESTION, max_new_tokens=10 * CONTEXT)) == expected


def test_values_out_of_range_and_too_long_conversations_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(PacaError, match="max_new_tokens is 0"):
        list(stream_reply(loaded, QUESTION, max_new_tokens=0))
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PacaError, match="temperature is"):
            list(stream_reply(loaded, QUESTION, temperature=temperature))
    with pytest.raises(PacaError, match=f"no room for an answer in the model's context of {CONTEXT}"):
        list(stream_reply(loaded, [{"role": "user", "content": "x" * CONTEXT}]))
    strict = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PacaError, match="chat template refuses this conversation: roles must alternate"):
        list(stream_reply(LoadedModel(loaded.model, strict, loaded.adapter, loaded.base), QUESTION))
