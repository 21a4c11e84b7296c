"""`paca export` and `paca import`, each run as a process."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import paca_command
from cli.paca_process import forked_paca
from paca.cli.export import _prompts_form
from paca.pretrained.generation import load_for_generation
from paca.pretrained.trainable_copy import copied_from
from tiny_checkpoint import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_export_to_lora_and_import_give_the_adapter_back(run: Path, tmp_path: Path) -> None:
    done = forked_paca("export", run, "--to", "lora", "--output", tmp_path / "lora")
    assert done.returncode == 0, done.stderr
    assert (
        f"Written: {tmp_path / 'lora'} (LoRA, exact but for rounding: 14 layers of rank 5, each at scale 1)"
        in done.stdout
    )
    assert re.search(r"It has \S+ KiB, the adapter \S+ KiB: LoRA's A, which picks the columns", done.stdout)
    assert "quantized" not in done.stdout
    assert (tmp_path / "lora/tokenizer.json").is_file()
    done = forked_paca("import", tmp_path / "lora", "--base", run / "base", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"Read: LoRA with a one-hot A, 14 layers of rank 5, on {run / 'base'}",
        f"Written: {tmp_path / 'back'}",
        f'Load it onto {run / "base"} with PeftModel.from_pretrained(model, "{tmp_path / "back"}"), after import paca.',
    ]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (run / "adapter", tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)  # the scale is 5 / 5


def test_export_to_gguf(run: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    output = tmp_path / "lora.gguf"
    done = forked_paca("export", run / "adapter", "--to", "gguf", "--output", output, "--base-model", run / "base")
    assert done.returncode == 0, done.stderr
    assert f"Written: {output} (LoRA, 14 layers, for 'llama' models of llama.cpp)" in done.stdout
    how = "as a GGUF file, which llama.cpp's convert_hf_to_gguf.py makes of its folder: llama-cli -m MODEL.gguf"
    assert f"Use it with {run / 'base'} {how} --lora {output}" in done.stdout
    assert len(gguf.GGUFReader(output).tensors) == 28


@pytest.mark.parametrize("form", ["lora", "merged", "gguf"])
def test_what_is_exported_needs_the_system_message_of_the_training_data(run: Path, tmp_path: Path, form: str) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    own = shutil.copytree(run, tmp_path / "own")
    (own / "summary.json").write_text(json.dumps({"data": {"system": "Be brief."}}))
    done = forked_paca("export", own, "--to", form, "--output", tmp_path / "out.gguf", "--base-model", run / "base")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("All training data began with the system message 'Be brief.': begin with it too.\n")
    assert (" --system-prompt 'Be brief.'\n" in done.stdout) == (form == "gguf")


@pytest.mark.parametrize("command", ["merge", "export --to lora", "export --to gguf", "export --to peft"])
def test_ctrl_c_while_it_writes_is_told_in_a_line_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    written: list[bool] = []

    def interrupted(made: Path) -> None:
        written.append(made.exists())
        raise KeyboardInterrupt

    monkeypatch.setattr("paca.pretrained.whole_output.sync", interrupted)
    monkeypatch.setattr("sys.argv", ["paca", *command.split(), str(run), "--output", str(tmp_path / "out.gguf")])
    with pytest.raises(SystemExit) as end:
        paca_command.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped."
    assert written == [True]
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_llama_cpp_names_the_file_and_only_the_options_that_are_needed(tmp_path: Path) -> None:
    adapter, base, file = tmp_path / "adapter", tmp_path / "base", tmp_path / "model.Q4_1.gguf"
    for folder in (adapter, base):
        folder.mkdir()
    assert copied_from(base) is None
    (base / "paca_source.json").write_text(json.dumps({"model": str(file)}))
    assert copied_from(base) is None  # it is gone
    file.touch()
    assert copied_from(base) == str(file)
    assert _prompts_form(adapter, base) == ""
    (adapter / "tokenizer_config.json").touch()
    assert _prompts_form(adapter, base) == " -no-cnv"
    template = adapter / "chat_template.jinja"
    template.write_text("{{ messages }}")
    assert _prompts_form(adapter, base) == f" --jinja --chat-template-file {template}"
    shutil.copy(template, base)
    assert _prompts_form(adapter, base) == ""


def test_export_to_peft_says_what_it_wrote(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_quantization": "nf4"}))
    arguments = ("export", tmp_path / "adapter", "--to", "peft", "--base-model", run / "base")
    done = forked_paca(*arguments, "--output", tmp_path / "theirs")
    assert done.returncode == 0, done.stderr
    written = f"Written: {tmp_path / 'theirs'} (PaCA for PEFT >= 0.22, here is {peft.__version__}: 14 layers of "
    written += "rank 5, each at scale 1)"
    assert written in done.stdout
    assert "made for weights quantized as nf4" in done.stdout


def test_export_to_merged_is_what_merge_writes(run: Path, tmp_path: Path) -> None:
    done = forked_paca("export", run, "--to", "merged", "--output", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    tokens = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        expected = load_for_generation(run).model(input_ids=tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=tokens).logits, expected)


def test_what_is_wrong_is_one_message(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"short")
    done = forked_paca("export", tmp_path / "adapter", "--to", "lora", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "adapter_model.safetensors is broken" in done.stderr
    assert "Traceback" not in done.stderr
    done = forked_paca("export", run, "--to", "onnx", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "--to is 'onnx'; it can be lora, merged, gguf, peft." in done.stderr
    assert not (tmp_path / "out").exists()
