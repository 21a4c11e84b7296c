"""Every block of code in the README and in docs/ is run, with a tiny model in the place of the named ones.

Python runs; the YAML of a run is read as `paca train` reads it; commands are parsed by the real parsers.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from safetensors.torch import save_file

from code_blocks import PAGES, ROOT, Block, blocks, commands_of, quoted_commands
from documented_names import AFTERWARDS, GIVEN
from paca.cli import app
from paca.comparison.methods import methods_of
from paca.pretrained.published_shapes import SHAPES
from paca.training import load_run_config

ALL = blocks()
RUN = [block for block in ALL if block.skipped is None]
PYTHON = [block for block in RUN if block.language == "python"]
YAML = [block for block in RUN if block.language == "yaml"]
SHELL = [block for block in RUN if block.language == "sh" or (not block.language and block.page == "README.md")]
NOT_RUN = 2
"""How many blocks say that they are not run. One more is a decision."""
ELSEWHERE = {"llama-cli": "llama.cpp", "accelerate": "accelerate"}
"""Programs of others, which are not here to be asked."""


def test_every_block_has_a_language_and_few_are_not_run() -> None:
    known = {"python", "yaml", "sh", "text"}
    assert not [block.name for block in ALL if block.language not in known and block.page != "README.md"]
    assert len([block for block in ALL if block.skipped is not None]) == NOT_RUN
    assert len(PYTHON) > 20
    assert len(YAML) > 10
    assert len(SHELL) > 20
    code = re.compile(r"^(paca|make|pip|python|import|from) ", re.M)
    assert not [block.name for block in ALL if block.language == "text" and code.search(block.text)]


def test_programs_of_others_are_named_by_a_page() -> None:
    assert ELSEWHERE.keys() <= {words[0] for block in SHELL for words in commands_of(block.text)}


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_runs(page: str, named_here: Path) -> None:
    """The blocks of a page run one after another."""
    names: dict[str, Any] = {}
    for number, block in enumerate(block for block in PYTHON if block.page == page):
        names |= GIVEN.get(page, {}).get(number, lambda _: {})(names)
        code = "\n" * block.line + block.text  # so that a traceback has the page's own lines
        exec(compile(code, page, "exec"), names)
    AFTERWARDS.get(page, lambda _: None)(names)


def test_nothing_is_given_to_pages_that_are_not_there() -> None:
    assert {*GIVEN, *AFTERWARDS} <= {block.page for block in PYTHON}


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.name)
def test_yaml_is_read(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(block.text)
    if "task" in content:  # of lm-evaluation-harness
        config = importlib.import_module("lm_eval.api.task").TaskConfig(**content)
        assert config.task == content["task"]
        return
    named = re.match(r"# (\S+), for --methods (\S+)\n", block.text)
    if named is not None:
        (tmp_path / named[1]).write_text(block.text)
        common = {"model": {"name": "llama"}, "data": {"train": "train.jsonl", "eval": 0.1}}
        assert [method.kind for method in methods_of(named[2], common)] == ["paca", "lora"]
        return
    content = {"model": {}, "data": {}, **content}  # a page may show a part of a run
    content["model"] = {"name": "llama", **content["model"]}
    content["data"] = {"train": "train.jsonl", **content["data"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    load_run_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_commands_are_known(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands_of(block.text):
        if words[:2] == ["torchrun", "--nproc-per-node"]:
            words = words[words.index("paca") :]
        program = words[0]
        if (ROOT / program).is_dir():  # the README's list of folders
            assert not [word for word in words if word.endswith("/") and not (ROOT / word).is_dir()]
        elif Path(program).name == "paca":
            check_paca(words[1:], tmp_path)
        elif program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert not [word for word in words[1:] if "=" not in word and word not in targets]
        elif program == "pip":
            check_pip(words[1:])
        elif program in ("python", "bash"):
            assert (ROOT / words[1]).is_file()
            check_flags(words)
        elif (ROOT / program).is_file():
            text = (ROOT / program).read_text()
            assert not [word for word in words[1:] if word not in text]
        else:
            assert program in ELSEWHERE, f"{block.name}: {program} is no program that is known"


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Which command `paca` finds, and the arguments it reads."""
    group: Any = typer.main.get_command(app)
    name, command, rest = group.resolve_command(group.context_class(group, info_name="paca"), list(words))
    if getattr(command, "commands", None) and rest and rest[0] in command.commands:
        name, command, rest = command.resolve_command(command.context_class(command, info_name=name), rest)
    return name, command.make_context(name, list(rest)).params


def check_paca(words: list[str], folder: Path) -> None:
    """Parse the arguments as `paca` does, and what stands in them where that is quick."""
    name, given = parsed(words)
    run = folder / "run.yaml"
    run.write_text("model: {name: llama}\ndata: {train: train.jsonl, eval: 0.1}\n")
    file = given.get("config") or given.get("target") or ""
    changes = given.get("set_") or []
    for change in (one for one in changes if one.startswith("model.adapter=")):
        write_adapter(folder / change.partition("=")[2])
    if changes or str(file).startswith("recipes/"):
        load_run_config(ROOT / file if str(file).startswith("recipes/") else run, changes)
    if name == "bench" and "/" not in given["model"]:
        assert given["model"] in SHAPES or given["model"].startswith("SmolLM2")
    if name == "compare" and given["methods"] and "=" not in given["methods"]:
        assert methods_of(given["methods"], yaml.safe_load(run.read_text()))


def write_adapter(folder: Path) -> None:
    """What a run looks at of an adapter before it loads any."""
    folder.mkdir(parents=True)
    config = {"peft_type": "PACA", "r": 64, "base_model_name_or_path": "llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, folder / "adapter_model.safetensors")


def test_commands_in_recipes_are_known() -> None:
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        header = recipe.read_text().partition("\nmodel:")[0].replace("\n#   ", "\n")
        found = re.findall(r"^paca (?:.*\\\n)*.*$", header, re.M)
        for words in commands_of("\n".join(found)):
            parsed(words[1:])


def check_pip(words: list[str]) -> None:
    """Extras exist, and what they install is what it is said to be."""
    extras = dict(re.findall(r"^(\w+) = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M))
    known = set(re.findall(r'"([\w-]+)', "".join(extras.values())))
    for word in words[1:]:
        name, _, wanted = word.partition("[")
        assert name in {"./paca", "FOLDER", *known}, word
        assert set(filter(None, wanted.rstrip("]").split(","))) <= extras.keys(), word


def check_flags(words: list[str]) -> None:
    text = (ROOT / words[1]).read_text()
    assert not [word for word in words[2:] if word.startswith("--") and word not in text], words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_lines_are_known(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in quoted_commands(page):
        command = group
        for word in words[1:]:
            if word.startswith("--"):
                flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
                assert word.partition("=")[0] in flags, shlex.join(words)
            elif command is group or word in getattr(command, "commands", {}):
                command = command.commands.get(word)
                assert command is not None or not re.fullmatch("[a-z]+", word), shlex.join(words)
                if command is None:  # `paca ...`
                    break
