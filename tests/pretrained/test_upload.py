"""`paca push` and `--push-to-hub`, against a hub on loopback that speaks what huggingface_hub speaks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from paca.cli import app
from paca.messages.errors import PacaError
from paca.pretrained.upload import check_login, upload
from pretrained.writable_hub import TOKEN, Hub, writable_hub
from training.conftest import config_file  # noqa: F401 - a fixture
from training.tiny_run import save_workspace

# Of huggingface_hub with the HTTP library of the day.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with writable_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as `paca train` leaves it, but for its weights."""
    folder = tmp_path / "run"
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/here/base", "r": 4}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# run\n\nwith its base, /here/base\n")
    (adapter / ".hidden").write_text("mine")
    (folder / "config.yaml").write_text("model: {}\n")
    return folder


def test_an_adapter_arrives_file_by_file(hub: Hub, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    done = upload(run, "me/answers")
    adapter = run / "adapter"
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert done.files == sorted(names)
    assert hub.files == {"me/answers": {name: (adapter / name).read_bytes() for name in names}}
    assert hub.stored  # the weights went through LFS
    assert hub.repositories["me/answers"]["visibility"] == "private"
    assert done.url == f"{hub.url}/me/answers"
    assert done.bytes == sum((adapter / name).stat().st_size for name in names)
    assert done.local_base == "/here/base"
    assert caplog.records
    assert TOKEN not in caplog.text


def test_a_second_push_replaces_the_files_of_the_same_repository(hub: Hub, run: Path) -> None:
    upload(run, "answers", public=True)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"others")
    upload(run, "me/answers")
    assert hub.files["me/answers"]["adapter_model.safetensors"] == b"others"
    assert hub.repositories["me/answers"]["visibility"] == "public"


def test_another_base_model_is_named_there_and_not_here(hub: Hub, run: Path) -> None:
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "revision": "v1"}))  # of the old one
    done = upload(run / "adapter", "me/answers", base_model="org/base")
    assert done.local_base is None
    there = hub.files["me/answers"]
    assert json.loads(there["adapter_config.json"]) == {"base_model_name_or_path": "org/base", "r": 4}
    _, head, text = there["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "peft", "base_model": "org/base"}
    assert "with its base, org/base\n" in text
    assert "/here/base" in (run / "adapter" / "README.md").read_text()


def test_a_whole_model_is_pushed_from_its_run(hub: Hub, tmp_path: Path) -> None:
    save_workspace(tmp_path / "w")
    shutil.copytree(tmp_path / "w" / "model", tmp_path / "full" / "model")
    upload(tmp_path / "full", "me/whole")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files["me/whole"])
    with pytest.raises(PacaError, match="is a whole model; --base-model goes with an adapter"):
        upload(tmp_path / "full", "me/whole", base_model="org/base")


def test_what_the_hub_refuses_is_one_message(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuses = "repos/create"
    with pytest.raises(
        PacaError, match=r"^org/answers can't be put on the hub: .*Is the token allowed to write there"
    ) as no:
        upload(run, "org/answers")
    assert "\n" not in str(no.value)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(PacaError, match=r"Invalid user token.*hf auth login") as no:
        check_login("me/answers")
    assert "hf_another" not in str(no.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("paca.pretrained.upload.get_token", lambda: None)
    with pytest.raises(PacaError, match="Nobody is logged in to the hub"):
        check_login("me/answers")
    with pytest.raises(PacaError, match="'a/b/c' is no name of a repository"):
        check_login("a/b/c")
    assert not hub.files


def test_an_error_that_holds_the_token_is_shown_without_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError(f"Illegal header value b'Bearer {TOKEN}'")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", fail)
    with pytest.raises(PacaError, match=r"b'Bearer \[token\]'") as error:
        check_login("me/answers")
    assert error.value.__suppress_context__


def paca(*arguments: object) -> tuple[int, str]:
    """Exit status, and the output or the error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, str(result.exception) if isinstance(result.exception, PacaError) else result.output


def test_the_command_says_what_is_where_and_loads_no_torch(hub: Hub, run: Path) -> None:
    code = "import sys; from paca_command import main; main()"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, "push", str(run), "--to", "me/answers"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said, warning, torch_is_there = done.stdout.splitlines()
    assert said.startswith(f"On the hub: {hub.url}/me/answers (3 files, ")
    assert warning.startswith("Warning: the adapter names /here/base as its base model, which only this machine has.")
    assert torch_is_there == "False"
    assert done.stderr == ""
    assert set(hub.files["me/answers"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow(reason="starts the program anew")
def test_a_run_is_pushed_when_it_is_finished(hub: Hub, config_file: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = ["--set", f"output.dir={tmp_path / 'run'}", "--set", "train.max_steps=1"]
    status, output = paca("train", config_file, *settings, "--push-to-hub", "me/trained")
    assert status == 0, output
    assert f"On the hub: {hub.url}/me/trained" in output
    there = hub.files["me/trained"]
    assert there["adapter_model.safetensors"] == (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    assert not any(TOKEN.encode() in content for content in there.values())
    hub.refuses = "/commit/"
    status, output = paca("train", config_file, *settings, "--resume", "--push-to-hub", "me/trained")
    assert status == 1
    assert "The run is finished, but not on the hub. me/trained can't be put" in output
    assert output.endswith(f"push {tmp_path / 'run'} --to me/trained")


def test_nothing_is_trained_where_nothing_could_be_pushed(hub: Hub, config_file: Path, tmp_path: Path) -> None:  # noqa: F811
    hub.refuses = "whoami"
    settings = ["--set", f"output.dir={tmp_path / 'run'}", "--set", "model.name=no/model"]
    status, output = paca("train", config_file, *settings, "--push-to-hub", "me/trained")
    assert status == 1
    assert output.startswith("me/trained can't be put on the hub")
    assert not (tmp_path / "run").exists()


def test_no_file_of_elsewhere_is_pushed_for_a_link_to_it(hub: Hub, run: Path, tmp_path: Path) -> None:
    secret, model = tmp_path / "id_rsa", tmp_path / "model"
    secret.write_text("a key")
    model.mkdir()
    (model / "config.json").write_text("{}")
    for link in (run / "adapter/notes/key.txt", run / "adapter/notes/deep/key", model / "key.json"):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(secret)
        with pytest.raises(PacaError, match=f"{link.name} is a link out of its folder, to {secret}"):
            upload(model if link.parent == model else run, "me/answers")
        assert "me/answers" not in hub.files
        link.unlink()
    (model / "own.json").symlink_to(model / "config.json")
    assert upload(model, "me/answers").files == ["config.json", "own.json"]


@pytest.mark.parametrize(("name", "config"), [("adapter", "adapter_config.json"), ("model", "config.json")])
def test_no_folder_of_elsewhere_is_pushed_for_a_link_to_it(hub: Hub, tmp_path: Path, name: str, config: str) -> None:
    private, got = tmp_path / "private", tmp_path / "got"
    for folder in (private, got):
        folder.mkdir()
    (private / config).write_text("{}")
    (got / name).symlink_to(private)
    with pytest.raises(PacaError, match=f"{got / name} is a link out of its folder, to {private}"):
        upload(got, "me/answers")
    assert "me/answers" not in hub.files
    (tmp_path / "mine").symlink_to(private)  # the user's own link, given as such
    assert upload(tmp_path / "mine", "me/answers").files == [config]


def test_a_card_that_is_none_is_named(hub: Hub, run: Path) -> None:
    for card in (
        b"---\n- a\n---\nx",
        b"---\nno end",
        b"---\n{\n---\nx",
        b"---\n" + b"- " * 2_000 + b"\n---\n",
        b"\xff",
    ):
        (run / "adapter" / "README.md").write_bytes(card)
        with pytest.raises(PacaError, match=r"README\.md is no card"):
            upload(run, "me/answers", base_model="org/base")
    (run / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": [1]}')
    with pytest.raises(PacaError, match="base_model_name_or_path must be a text"):
        upload(run, "me/answers")
