"""Code that a folder brings is never run, whatever is asked and answered, unless the model's flag says so."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import paca
from cli.paca_process import forked_paca
from paca.messages.errors import PacaError
from paca.pretrained import foreign_methods
from paca.pretrained.generation import load_for_generation
from tiny_checkpoint import save_adapter, save_base

SOURCES = Path(paca.__file__).parent
AUTO = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "auto_class")
CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast
class Hostile(PreTrainedTokenizerFast):
    pass
"""


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Every call by which transformers chooses a class for files that it is given."""
    found = []
    for file in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            named = isinstance(owner, ast.Name) and owner.id.startswith(AUTO)
            if named and node.func.attr in ("from_pretrained", "from_config"):
                found.append((f"{file.relative_to(SOURCES)}:{node.lineno}", node))
    return found


def test_every_loading_call_says_whether_code_may_run() -> None:
    calls = loading_calls()
    assert len(calls) > 8
    for place, call in calls:
        # `options` is made by `_open` and by gguf.py, where it has the flag; the tests below go through them.
        names = {keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords}
        assert names & {"trust_remote_code", "options"}, place


def test_options_have_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paca.pretrained import gguf, loading

    monkeypatch.setattr(gguf, "require_gguf", lambda: None)
    assert gguf.file_options(str(tmp_path / "a.gguf"))["trust_remote_code"] is False
    save_base(tmp_path / "base")
    for given in (False, True):
        assert loading._open(str(tmp_path / "base"), None, given)[1]["trust_remote_code"] is given


def hostile(folder: Path, mark: Path) -> None:
    """Let the folder's tokenizer name a class of its own, in a file that leaves a mark when it runs."""
    (folder / "hostile.py").write_text(CODE.format(mark=str(mark)))
    settings = folder / "tokenizer_config.json"
    content: dict[str, Any] = json.loads(settings.read_text()) if settings.is_file() else {}
    content |= {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": [None, "hostile.Hostile"]}}
    settings.write_text(json.dumps(content))


@pytest.mark.parametrize("which", ["adapter", "base"])
@pytest.mark.parametrize("command", ["chat", "merge"])
def test_a_yes_on_standard_input_runs_nothing(tmp_path: Path, which: str, command: str) -> None:
    base, adapter, mark = tmp_path / "base", tmp_path / "adapter", tmp_path / "mark"
    save_base(base)
    save_adapter(adapter, base)
    hostile(tmp_path / which, mark)
    more = ["--max-new-tokens", "2"] if command == "chat" else ["--output", tmp_path / "merged"]
    done = forked_paca(command, adapter, *more, typed="yes\ny\nyes\n")
    assert not mark.exists()
    assert "[y/N]" not in done.stdout + done.stderr  # nobody was asked
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1)


@pytest.mark.parametrize("known", [True, False])
def test_a_method_that_loads_another_model_runs_none_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """PEFT's SHADOW does, without saying whether code may run. `known`: whether paca knows that of the method."""
    base, adapter, mark = tmp_path / "base", tmp_path / "adapter", tmp_path / "mark"
    save_adapter(adapter, save_base(base))
    settings = {"peft_type": "SHADOW", "shadow_model": str(adapter), "target_modules": ["q_proj"]}
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "hostile.py").write_text(CODE.format(mark=str(mark)))
    named = {"AutoConfig": "hostile.Hostile", "AutoModel": "hostile.Hostile"}
    (adapter / "config.json").write_text(json.dumps({"model_type": "hostile", "auto_map": named}))
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    if not known:
        monkeypatch.setattr(foreign_methods, "_REFUSED", {})
    with pytest.raises(PacaError, match="shadow_model" if known else "adapter"):
        load_for_generation(adapter)
    assert not mark.exists()
