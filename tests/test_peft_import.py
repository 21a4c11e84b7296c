"""`import paca` is light, and PEFT knows the method all the same. Each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from forked_process import run_forked
from tiny_checkpoint import save_adapter, save_base

LIGHT = """
    import sys
    import paca
    heavy = [name for name in ("torch", "transformers", "peft") if name in sys.modules]
    assert not heavy, heavy
"""
BEFORE_PEFT = """
    import sys
    import paca
    assert "peft" not in sys.modules
"""
REGISTERED = """
    import sys
    import paca.peft_import
    from peft import mapping
    from peft.utils.peft_types import PeftType
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PACA] is paca.PacaConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PACA] is paca.PacaModel
    assert sys.modules["paca.tuner.model"].PacaModel is paca.PacaModel
    assert not any(type(finder).__module__ == "paca.peft_import" for finder in sys.meta_path)
    assert callable(paca.refresh) and callable(paca.make_lean)
    for name in ("peft", "paca.config", "paca.tuner.model"):
        if name in sys.modules:
            assert type(sys.modules[name].__loader__).__name__ == "SourceFileLoader"
            assert sys.modules[name].__spec__.loader is sys.modules[name].__loader__
"""


def run(*scripts: str) -> subprocess.CompletedProcess[str]:
    """In a process started from nothing if it has to see that torch is not imported, else in a fork."""
    script = "\n".join(textwrap.dedent(s) for s in scripts)
    if LIGHT not in scripts:
        return run_forked(script)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)


def check(*scripts: str) -> None:
    result = run(*scripts)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("before", "route"), [(LIGHT, "import peft"), (BEFORE_PEFT, "from paca.tuner.entry import refresh")]
)
def test_peft_knows_the_method_as_soon_as_it_is_imported(before: str, route: str) -> None:
    check(before, route, REGISTERED)


def test_it_does_whichever_way_peft_comes_in() -> None:
    """In forks of one process that has imported what takes long, but not peft."""
    routes = [
        "from peft import get_peft_model",
        "import peft.tuners.lora.layer",
        "import trl; trl.SFTTrainer",
        "paca.PacaConfig",
        "paca.tuner.entry",
        "from paca import make_lean",
        # Modules of our own that are half imported when they import peft:
        "import paca.config",
        "from paca.layers import PacaLayer",
        "import paca.training.adapter_settings",
    ]
    check(
        f"""
        import os, sys, transformers, transformers.pytorch_utils
        import paca
        assert "peft" not in sys.modules
        def checked(route):
            exec(route, globals())
            exec({textwrap.dedent(REGISTERED)!r}, globals())
        failed = []
        for route in {routes!r}:
            child = os.fork()
            if child == 0:
                try:
                    checked(route)
                except BaseException as error:
                    print(route, repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                failed.append(route)
        assert not failed, failed
        """
    )


def test_peft_that_is_imported_already_knows_the_method_at_once() -> None:
    check("import peft, paca", REGISTERED)


def test_an_adapter_loads_without_a_name_of_ours_being_touched(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))
    check(
        f"""
        import paca
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})
        assert type(model.base_model) is paca.PacaModel
        assert any("paca_delta" in name for name, _ in model.named_parameters())
        """
    )


def test_threads_that_import_peft_together_all_find_the_method() -> None:
    check(
        LIGHT,
        """
        import threading
        found, start = [], threading.Barrier(4)
        def work(statement):
            start.wait()
            exec(statement)
            from peft import mapping
            found.append([key.value for key in mapping.PEFT_TYPE_TO_CONFIG_MAPPING].count("PACA"))
        statements = ["import peft", "from peft import PeftModel", "import paca; paca.PacaConfig", "paca.PacaModel"]
        threads = [threading.Thread(target=work, args=(s,)) for s in statements]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert found == [1, 1, 1, 1], found
        """,
        REGISTERED,
    )


def test_the_error_of_an_import_stays_what_it_was(tmp_path: Path) -> None:
    """A peft that breaks while it is imported, and one that is there at the second try."""
    (tmp_path / "peft.py").write_text("raise ImportError('peft is broken here')")
    result = run(
        BEFORE_PEFT,
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        for use in ("import peft", "paca.PacaConfig", "from paca import refresh"):
            try:
                exec(use)
            except ImportError as error:
                assert str(error) == "peft is broken here", error
            else:
                raise AssertionError(use)
        assert "peft" not in sys.modules
        del sys.path[0]
        import peft
        """,
        REGISTERED,
    )
    assert result.returncode == 0, result.stderr


def test_without_peft_the_import_error_names_it() -> None:
    result = run(
        """
        import sys, paca
        class Missing:
            def find_spec(self, name, path, target=None):
                if name == "peft":
                    raise ModuleNotFoundError("No module named 'peft'", name="peft")
        sys.meta_path.insert(1, Missing())
        import peft
        """
    )
    assert result.returncode == 1
    assert result.stderr.strip().endswith("ModuleNotFoundError: No module named 'peft'")


def test_our_own_error_is_not_hidden() -> None:
    result = run(
        """
        import sys, paca
        sys.modules["paca.tuner.model"] = None
        import peft
        """
    )
    assert result.returncode == 1
    assert "paca.tuner.model" in result.stderr.strip().splitlines()[-1]


def test_names_are_those_of_all() -> None:
    check(
        LIGHT,
        """
        assert set(paca.__all__) <= set(dir(paca))
        try:
            paca.PacaConfi
        except AttributeError as error:
            assert "PacaConfi" in str(error)
        else:
            raise AssertionError
        assert "torch" not in sys.modules
        from paca import *
        assert PacaConfig(r=3).r == 3
        assert sorted(paca._MODULES) == sorted(set(paca.__all__) - {"PacaError"})
        """,
    )
