"""What a stranger finds in an adapter's README.md works as it stands there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from rich.console import Console

from paca.cli import app
from paca.pretrained.generation import load_for_generation
from paca.training import RunResult, load_run_config, train

TOKENS = torch.arange(2, 26).reshape(2, 12)
QUICK = ("train.max_steps=4", "eval.before=false", "eval.after=false")


def blocks(adapter: Path, language: str) -> list[str]:
    """The card's blocks of code, for the folder that it lies in."""
    card = (adapter / "README.md").read_text()
    pieces = card.replace("path/to/this/folder", str(adapter)).split(f"```{language}\n")[1:]
    return [piece.split("```")[0] for piece in pieces]


def check_code(adapter: Path) -> None:
    (code,) = blocks(adapter, "python")
    scope: dict[str, Any] = {}
    exec(code, scope)
    with torch.no_grad():
        expected = load_for_generation(adapter).model(TOKENS).logits
        assert torch.equal(scope["model"].eval()(TOKENS).logits, expected)
    assert scope["tokenizer"]("a cat")["input_ids"]


def test_its_code_loads_what_was_trained_and_its_commands_are_known(
    finished: Callable[..., RunResult], tmp_path: Path
) -> None:
    adapter = finished().folder / "adapter"
    check_code(adapter)
    (commands,) = blocks(adapter, "sh")
    group: Any = typer.main.get_command(app)
    names = []
    for line in commands.splitlines():
        program, name, *arguments = shlex.split(line, comments=True)
        assert program == "paca"
        group.commands[name].make_context(name, arguments)  # an option that there is not would end the program
        names.append(name)
    assert names == ["chat", "export", "merge"]


def test_the_system_message_that_all_data_has_is_in_it_as_it_stands(config_file: Path, tmp_path: Path) -> None:
    system = "Be brief.\n\n```\n---\nor *not*"
    rows = [
        {
            "messages": [
                {"role": who, "content": text}
                for who, text in (("system", system), ("user", str(number)), ("assistant", "yes"))
            ]
        }
        for number in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"output.dir={tmp_path / 'run'}",
        f"data.train={tmp_path / 'chats.jsonl'}",
        "data.eval=null",
        "data.template=chatml",
        *QUICK,
    ]
    train(load_run_config(config_file, overrides), console=Console(quiet=True))
    adapter = tmp_path / "run/adapter"
    card = (adapter / "README.md").read_text()
    assert (
        "\n- all begin with this system message, which a question to the model needs too:\n\n      Be brief.\n" in card
    )
    assert "\n      ---\n      or *not*\n\n## Training\n" in card


def test_it_loads_the_base_model_quantized_as_it_was(config_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sections = yaml.safe_load(config_file.read_text())
    del sections["paca"]
    sections["lora"] = {"r": 4}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(sections))
    overrides = [f"output.dir={tmp_path / 'run'}", "model.quantization=int8", *QUICK]
    train(load_run_config(tmp_path / "lora.yaml", overrides), console=Console(quiet=True))
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert "float32, quantized to int8)" in card
    assert "\n- r = 4, lora_alpha = 8\n" in card  # and nothing that PEFT has by default
    assert "`max_steps` | 4 |" in card
    assert " tokens (1 epoch)." in card
    assert "num_train_epochs" not in card  # which it would have taken without max_steps
    check_code(tmp_path / "run" / "adapter")
