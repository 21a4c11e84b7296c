"""`import paca` registers PaCA with PEFT, whoever imports what first. Each case in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from forked_process import run_forked
from tiny_checkpoint import save_adapter, save_base

REGISTERED = """
    import paca
    from peft import mapping
    from peft.utils.peft_types import PeftType
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PACA] is paca.PacaConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PACA] is paca.PacaModel
    assert [key.value for key in mapping.PEFT_TYPE_TO_CONFIG_MAPPING].count("PACA") == 1
    for name in paca.__all__:
        assert callable(getattr(paca, name)), name
"""
TOGETHER = """
    import threading
    failed, start = [], threading.Barrier(len(statements))
    def work(statement):
        start.wait()
        try:
            exec(statement)
        except BaseException as error:
            failed.append((statement, error))
    threads = [threading.Thread(target=work, args=(statement,)) for statement in statements]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failed, failed
"""


def joined(*scripts: str) -> str:
    return "\n".join(textwrap.dedent(script) for script in scripts)


AS_IF_STARTED = """
    import sys
    for name in [name for name in sys.modules if name.partition(".")[0] in ("peft", "trl")]:
        del sys.modules[name]  # with which the process was forked: when they are imported is what is tested here
"""


def check(*scripts: str) -> None:
    result = run_forked(joined(AS_IF_STARTED, *scripts))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "route", ["import peft, paca", "import paca, peft", "from paca.tuner.refresh import refresh", "import paca.layers"]
)
def test_peft_knows_the_method_whichever_is_imported_first(route: str) -> None:
    check(route, REGISTERED)


def test_threads_that_import_it_and_peft_together_all_find_the_method() -> None:
    statements = [
        "import peft",
        "from peft import PeftModel",
        "import paca; paca.PacaConfig",
        "from paca import select",
    ]
    check(f"statements = {statements!r}", TOGETHER, REGISTERED)


def test_what_writes_a_line_where_cuda_is_missing_is_not_imported() -> None:
    check("""
        import sys, paca, paca.comparison.compare, paca.planning, paca.training
        assert "torch.utils.cpp_extension" not in sys.modules
    """)


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


def test_the_error_of_an_import_stays_what_it_was(tmp_path: Path) -> None:
    """A peft that breaks while it is imported, and one that is there at the second try."""
    (tmp_path / "peft.py").write_text("raise ImportError('peft is broken here')")
    check(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        for use in ("import paca", "from paca import refresh", "import paca.config"):
            try:
                exec(use)
            except ImportError as error:
                assert str(error) == "peft is broken here", error
            else:
                raise AssertionError(use)
        del sys.path[0]
        """,
        REGISTERED,
    )


PROGRAM = """
    import sys
    from paca_command import main
    sys.argv = ["paca", "--version"]
    try:
        main()
    except SystemExit as error:
        assert not error.code, error
    assert "peft" not in sys.modules
    import paca
    from paca.cli.starting import import_libraries
    assert not hasattr(paca, "PacaConfig")  # else there is nothing to see below
    import_libraries()
    assert sys.modules["paca"] is paca and sys.modules["paca.cli"] is paca.cli
    version = paca.__version__
    import_libraries()  # the second time does nothing
    assert paca.__version__ is version
"""


def test_the_program_makes_the_package_whole_when_its_work_begins() -> None:
    check(PROGRAM, REGISTERED)


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The program, and a process that it spawned: started from nothing, where threads import the package together.

    A fork has transformers already, and torchao, which leaves notes when it is imported.
    """
    statements = ["import transformers", "import paca"]
    script = tmp_path_factory.mktemp("spawning") / "paca"
    script.write_text(
        joined(
            f"""
            import multiprocessing, sys
            from paca_command import main
            def child():
                exec({joined(f"statements = {statements!r}", TOGETHER, REGISTERED)!r}, {{}})
                import paca
                sys.exit(paca.PacaConfig(r=3).r)
            if __name__ == "__main__":
                sys.argv = ["paca", "--version"]
                try:
                    main()
                except SystemExit:
                    process = multiprocessing.get_context("spawn").Process(target=child)
                    process.start()
                    process.join()
                    assert process.exitcode == 3, process.exitcode
            """
        )
    )
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow(reason="starts the program anew")
def test_a_process_that_the_program_spawns_imports_the_whole_package(
    spawned: subprocess.CompletedProcess[str],
) -> None:
    assert spawned.returncode == 0, spawned.stderr


@pytest.mark.slow(reason="starts the program anew")
def test_it_waits_for_a_transformers_that_another_thread_imports_and_prints_nothing(
    spawned: subprocess.CompletedProcess[str],
) -> None:
    assert re.fullmatch(r"paca \S+\n", spawned.stdout)  # the program's own line
    assert spawned.stderr == ""
