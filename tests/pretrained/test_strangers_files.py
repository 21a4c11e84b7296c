"""The files of an adapter's folder, as chat, merge, export and import take them from somebody else."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cli.paca_process import forked_paca
from hostile_adapters.damage import Bomb
from hostile_adapters.watch import watching
from paca.cli import starting
from paca.cli.chat import shown_piece
from paca.convert.exported import export_adapter
from paca.convert.merged import merge_to_folder
from paca.messages.errors import PacaError
from paca.messages.say import put, say
from paca.messages.shown import printable
from paca.pretrained import adapter_tokenizer, hub
from paca.pretrained.bounded_template import check_template_ends, conversation_text
from paca.pretrained.generation import load_for_generation, stream_reply
from paca.tuner import bounded_process, strange_expressions
from paca.tuner.adapter_entries import check_entries
from paca.tuner.pickled_adapter import tensors_in_pickle
from tiny_checkpoint import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))


def answer(adapter: Path, run: Path) -> str:
    loaded = load_for_generation(adapter, base_model=str(run / "base"))
    return "".join(stream_reply(loaded, [{"role": "user", "content": "Hi"}], max_new_tokens=3))


TEMPLATES = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a gigantic string": "{{ 'x' * 10 ** 11 }}",
    "doubled": "{% set n = namespace(s='x') %}{% for i in range(70) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a gigantic number": "{{ 10 ** (10 ** 9) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_end_is_an_error_that_names_it(
    adapter: Path, run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_process, "SECONDS", 0.3)
    (adapter / "chat_template.jinja").write_text(TEMPLATES[name])
    with pytest.raises(PacaError, match=r"chat template of .*adapter does not come to an end.*chat_template\.jinja"):
        answer(adapter, run)


def test_evaluate_tries_a_template_before_it_is_run_on_data(
    adapter: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_process, "SECONDS", 0.3)
    (adapter / "chat_template.jinja").write_text(TEMPLATES["doubled"])
    question = {"question_id": 81, "category": "writing", "turns": ["Hello", "Again"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    asked = (
        "--mt-bench",
        "questions.jsonl",
        "--judge-url",
        "http://127.0.0.1:9",
        "--judge-model",
        "j",
        "--output",
        "out",
    )
    done = forked_paca("evaluate", adapter, *asked, "--base-model", run / "base", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"^Error: The chat template of .*adapter does not come to an end", done.stderr, flags=re.MULTILINE)


@pytest.mark.parametrize("template", ["{{ raise_exception('a system message first') }}", None])
def test_a_template_that_wants_another_conversation_is_none_without_end(run: Path, template: str | None) -> None:
    loaded = load_for_generation(run)
    loaded.tokenizer.chat_template = template
    check_template_ends(loaded.tokenizer)


def test_a_template_says_the_same_as_in_this_process(run: Path) -> None:
    loaded = load_for_generation(run)
    messages = [{"role": "system", "content": "s <|im_end|>"}, {"role": "user", "content": "Ünï 😀\x1b"}]
    expected = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert conversation_text(loaded.tokenizer, messages) == expected
    refusing = "{{ raise_exception('never') if messages|length > 1 }}"
    loaded.tokenizer.chat_template = "{{ bos_token }}|{{ eos_token }}|" + refusing
    assert conversation_text(loaded.tokenizer, messages[:1]) == "<|im_start|>|<|im_end|>|"
    with pytest.raises(PacaError, match="refuses this conversation: never"):
        conversation_text(loaded.tokenizer, messages)


def put_pipe(place: Path) -> None:
    os.mkfifo(place)


PLACES: dict[str, Callable[[Path], None]] = {
    "pipe": put_pipe,
    "folder": lambda place: place.mkdir(),
    "endless": lambda place: place.symlink_to("/dev/zero"),
    "elsewhere": lambda place: place.symlink_to("/etc/hostname"),
    "beside": lambda place: place.symlink_to("../secret"),
}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "tokenizer.json"])
@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_file_of_the_folder_is_refused(adapter: Path, run: Path, what: str, name: str) -> None:
    (adapter.parent / "secret").write_text("a key")
    (adapter / name).unlink(missing_ok=True)
    PLACES[what](adapter / name)
    with pytest.raises(ValueError, match=rf"{name} is (no file|a link out of its folder)"):
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(run / "base"), adapter)
    base, output = str(run / "base"), adapter.parent / "output"
    for take in (
        lambda: answer(adapter, run),
        lambda: merge_to_folder(adapter, output, base_model=base),
        lambda: export_adapter(adapter, output, "lora", base_model=base),
    ):
        with pytest.raises(PacaError, match=name):
            take()
    assert not output.exists()


def test_a_link_of_any_name_is_refused(adapter: Path, run: Path) -> None:
    """Tokenizers that are written in Python bring files of other endings, which merging would copy."""
    (adapter / "tokenizer.json").unlink()
    change_json(adapter / "tokenizer_config.json", tokenizer_class="PhobertTokenizer")
    (adapter / "vocab.txt").write_text("a 1\n")
    (adapter.parent / "secret").write_text("a key\n")
    (adapter / "bpe.codes").symlink_to("../secret")
    with pytest.raises(PacaError, match=r"bpe\.codes is a link out of its folder"):
        merge_to_folder(adapter, adapter.parent / "output", base_model=str(run / "base"))


def test_links_of_the_hubs_cache_and_within_the_folder_are_fine(adapter: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(adapter.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    check_entries(snapshot)
    (snapshot / "second").mkdir()  # PEFT saves further adapters so
    (snapshot / "second" / "adapter_config.json").symlink_to("../../../blobs/0")
    check_entries(snapshot / "second")
    (adapter / "again.json").symlink_to("tokenizer.json")
    check_entries(adapter)
    (tmp_path / "link").symlink_to(adapter)
    check_entries(tmp_path / "link")


PICKLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "memory": lambda tensors: tensors | {"a": Bomb(bytearray, 10**12)},
    "a program": lambda tensors: tensors | {"a": Bomb(os.system, "true")},
    "one number, repeated": lambda tensors: {"a": torch.zeros(1).expand(10**6, 10**6)},
    "a list": lambda tensors: list(tensors.values()),
    "numbers": lambda tensors: dict.fromkeys(tensors, 3),
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_is_more_than_its_tensors(adapter: Path, what: str) -> None:
    file = adapter / "adapter_model.bin"
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, file)
    assert tensors_in_pickle(file).keys() == tensors.keys()
    torch.save(PICKLES[what](tensors), file)
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        tensors_in_pickle(file)


def test_a_pickle_before_an_innocent_archive_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.bin"
    torch.save({"a": torch.zeros(2)}, file)
    innocent = file.read_bytes()
    torch.save({"a": Bomb(bytearray, 10**6)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes() + innocent)
    assert zipfile.is_zipfile(file)
    with pytest.raises(ValueError, match=r"adapter_model\.bin .*no file of torch\.save"):
        tensors_in_pickle(file)


def test_a_pickle_that_names_things_otherwise_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.bin"
    torch.save({"a": Bomb(os.system, "true")}, file, pickle_protocol=4)  # STACK_GLOBAL
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        tensors_in_pickle(file)


def test_a_compressed_pickle_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.bin"
    torch.save({"a": torch.zeros(2**22)}, file)
    with zipfile.ZipFile(file) as whole:
        content = {entry: whole.read(entry) for entry in whole.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as small:
        for name, data in content.items():
            small.writestr(name, data)
    with pytest.raises(ValueError, match="compressed"):
        tensors_in_pickle(file)


SETTINGS: dict[str, Any] = {
    "holds a JSON object|hold a JSON object": "[]",
    "nested too deeply": '{"a":' * 100_000,
    "Expecting property name": "{",
}


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("message", SETTINGS)
def test_json_that_is_none(adapter: Path, run: Path, message: str, name: str) -> None:
    (adapter / name).write_text(SETTINGS[message])
    with pytest.raises(PacaError, match=rf"{name} is broken.*({message})"):
        answer(adapter, run)


def change(adapter: Path, **settings: Any) -> None:
    change_json(adapter / "adapter_config.json", **settings)


def change_json(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LORA", "target_modules": "(.+)+!"},
        {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "hostile"},
        {"peft_type": "LORA", "layer_replication": [[0, 2]] * 99},
        {"peft_type": "LORA", "alora_invocation_tokens": {"a": 1}},
        {"peft_type": "LORA", "alora_invocation_tokens": [[1]]},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": list(range(6_000))},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/dev/zero"},
        {"peft_type": "SHADOW", "shadow_model": "somebody/else"},
        {"peft_type": "XLORA", "adapters": {"a": "somebody/else"}},
        {"peft_type": "NONE"},
        {"peft_type": [1]},
    ],
    ids=lambda settings: str(settings)[:60],
)
def test_other_methods_may_not_do_more_than_adapt(adapter: Path, run: Path, settings: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strange_expressions, "SECONDS", 0.1)
        change(adapter, **settings)
        with pytest.raises(PacaError, match=r"adapter_config\.json"):
            answer(adapter, run)


def test_a_tokenizer_that_lets_texts_grow_is_refused(adapter: Path) -> None:
    content = json.loads((adapter / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [step] * 60}
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PacaError, match=r"tokenizer\.json makes texts"):
        adapter_tokenizer.load_adapter_tokenizer(adapter)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_a_token_of_a_huge_number_is_refused(adapter: Path, name: str) -> None:
    content: dict[str, Any] = {"a": 2**31}  # who writes such a vocabulary fills gigabytes with the numbers below
    if name == "tokenizer.json":
        content = json.loads((adapter / name).read_text())
        content["model"]["vocab"]["a"] = 2**31
    (adapter / name).write_text(json.dumps(content))
    with pytest.raises(PacaError, match=rf"{name} has a token of number 2,147,483,648.*Delete the tokenizer's files"):
        adapter_tokenizer.load_adapter_tokenizer(adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "BertTokenizer", "vocab": "SECRET"},
        {"tokenizer_class": "GPT2Tokenizer", "vocab": "SECRET", "merges": "SECRET"},
        {"tokenizer_class": "BertTokenizer", "init_inputs": ["SECRET"]},
        {"tokenizer_class": "LlamaTokenizer", "gguf_file": "SECRET"},
        {"tokenizer_class": "MistralCommonBackend", "tokenizer_path": "SECRET"},
        {"tokenizer_class": "BertTokenizer", "vocab": "/dev/stdin"},
    ],
    ids=lambda settings: "-".join(name for name in settings if name != "tokenizer_class"),
)
def test_a_tokenizer_may_not_name_files_elsewhere(adapter: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nSECRET\n")
    (adapter / "tokenizer.json").unlink()
    text = json.dumps(settings).replace('"SECRET"', json.dumps(str(secret)))
    (adapter / "tokenizer_config.json").write_text(text)
    with pytest.raises(PacaError, match=r"tokenizer_config\.json names a file elsewhere in \w+: .*Delete the tok"):
        adapter_tokenizer.load_adapter_tokenizer(adapter)


@pytest.mark.parametrize("name", ["extra_ids", "offset"])
def test_a_tokenizer_that_makes_millions_of_tokens_is_refused(adapter: Path, name: str) -> None:
    change_json(adapter / "tokenizer_config.json", **{name: 10_000_000})
    with pytest.raises(PacaError, match=f"{name}=10,000,000; 10,000 are the most"):
        adapter_tokenizer.load_adapter_tokenizer(adapter)


def test_labels_that_are_none(adapter: Path, run: Path) -> None:
    for config in (
        {"architectures": 5},
        {"architectures": ["LlamaForSequenceClassification"], "id2label": [1]},
        {"architectures": ["LlamaForSequenceClassification"], "id2label": {"a": 1}},
        {"architectures": ["LlamaForSequenceClassification"], "id2label": {str(n): "a" for n in range(200_000)}},
    ):
        (adapter / "config.json").write_text(json.dumps(config))
        if config["architectures"] == 5:
            assert answer(adapter, run)
            continue
        with pytest.raises(PacaError, match=r"config\.json (is broken|names 200,000 labels)"):
            answer(adapter, run)


def test_a_tokenizer_of_another_model_is_an_error(adapter: Path, run: Path) -> None:
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["added_tokens"] += [{**content["added_tokens"][0], "id": 5_000, "content": "Hi"}]
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PacaError, match=r"embeds|cannot be loaded"):
        answer(adapter, run)


NAMES = [
    *("x" * 300, "~nobody9/x", "/" + "y" * 5_000, "a\0b", "../" * 99, "\x1b]0;title\x07", "a/b/c"),
    *("", 5, ["a"], {"a": 1}),
]


@pytest.mark.parametrize("base", NAMES, ids=lambda base: repr(base)[:20])
def test_a_base_model_that_is_no_name_is_one_message_without_network(
    adapter: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    change(adapter, base_model_name_or_path=base)
    for take in (load_for_generation, lambda path: export_adapter(path, path.parent / "output", "lora")):
        with watching(adapter.parent) as watch, pytest.raises(PacaError, match=r"adapter|model"):
            take(adapter)
        assert watch.asked == []


def test_a_base_model_that_holds_an_adapter_is_refused(adapter: Path, run: Path) -> None:
    """Transformers would put it on, and nobody has checked it: here, the expression would never end."""
    shutil.copytree(run / "base", adapter, dirs_exist_ok=True)
    change(adapter, base_model_name_or_path=str(adapter), peft_type="LORA", target_modules="(.+)+!")
    with pytest.raises(PacaError, match="holds a model and an adapter"):
        load_for_generation(adapter)


def test_the_network_is_asked_for_a_hubs_name_and_never_offline(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(adapter, base_model_name_or_path="somebody/model")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "_answers", {})
    for offline in (True, False):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        hub.only_from_cache.cache_clear()
        with watching(adapter.parent) as watch, pytest.raises(PacaError, match="somebody/model"):
            load_for_generation(adapter)
        assert bool(watch.asked) is not offline
    hub.only_from_cache.cache_clear()


def test_a_terminal_obeys_no_name_nor_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "a\x1b]0;title\x07b\x9b2Jc\u202ed\ud800\x00é😀 f\ng"
    told = "a\\x1b]0;title\\x07b\\x9b2Jc\\u202ed\\ud800\\x00é😀 f\ng"
    say(Console(file=sys.stdout, force_terminal=False, width=200), hostile)
    put(hostile)
    assert capsys.readouterr().out == f"{told}\n{told}\n"
    assert len(printable("x" * 10**6)) < 5_000
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert shown_piece("a\x1b[2Jb\x9bc\r\n😀\u200d") == "a�[2Jb�c�\n😀\u200d"


@pytest.mark.parametrize("place", ["a tensor", "a setting"])
def test_no_error_of_loading_holds_an_escape_sequence(adapter: Path, run: Path, place: str) -> None:
    if place == "a tensor":
        file = adapter / "adapter_model.safetensors"
        save_file({**load_file(file), "\x1b[2J": torch.zeros(1)}, file)
    else:
        change(adapter, task_type="\x1b[2J")
    with pytest.raises(ValueError, match=r"\\x1b\[2J") as raised:
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(run / "base"), adapter)
    assert "\x1b" not in str(raised.value)


def test_notes_and_warnings_of_libraries_show_escapes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        factory, written = logging.getLogRecordFactory(), io.StringIO()
        try:
            starting.show_escapes()
            logger = logging.Logger("a library")
            logger.addHandler(logging.StreamHandler(written))
            logger.warning("a name: %s", "\x1b[2J")
            assert written.getvalue() == "a name: \\x1b[2J\n"
            assert "\x1b" not in warnings.formatwarning("\x1b[2J", UserWarning, "file.py", 3)
            assert warnings.formatwarning("\x1b", UserWarning, starting.__file__, 3) == "Warning: \\x1b\n"
        finally:
            logging.setLogRecordFactory(factory)
