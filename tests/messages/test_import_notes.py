"""What libraries say while they are imported: a few notes are held back, and everything else is shown."""

from __future__ import annotations

import logging

import pytest
import torch

from paca.messages.import_notes import hold_import_notes

KERNELS = "Failed to load /site-packages/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library"
SKIPPED = "Skipping import of cpp extensions due to incompatible torch version."


@pytest.fixture(autouse=True)
def _torchao_speaks(caplog: pytest.LogCaptureFixture) -> None:
    """Also where a command that ran in this process before hid its notes."""
    caplog.set_level(logging.WARNING, "torchao")


@pytest.mark.parametrize(("cuda", "shown"), [(None, [SKIPPED]), ("13.0", [KERNELS, SKIPPED])])
def test_kernels_for_cuda_are_missed_only_where_torch_has_cuda(
    cuda: str | None, shown: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    caplog.set_level(logging.INFO)
    torchao = logging.getLogger("torchao")
    with hold_import_notes():
        torchao.warning(KERNELS)
        torchao.warning(SKIPPED)
    assert [record.getMessage() for record in caplog.records if record.name == "torchao"] == shown
    passed_on = [record for record in caplog.records if record.name == "paca"]
    assert [record.levelno for record in passed_on] == [logging.INFO] * (2 - len(shown))
    assert all(record.getMessage().endswith(KERNELS) for record in passed_on)


def test_nothing_is_held_back_once_the_import_is_over(caplog: pytest.LogCaptureFixture) -> None:
    with hold_import_notes():
        pass
    logging.getLogger("torchao").warning(KERNELS)
    assert [record.name for record in caplog.records] == ["torchao"]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no such file"),
        (
            "kernels._internals.hf_hub",
            "Skipping publisher trust check for 'kernels-community/x' because of offline mode.",
        ),
    ],
)
def test_a_kernel_that_nobody_asked_for_is_not_missed(name: str, note: str, caplog: pytest.LogCaptureFixture) -> None:
    for logger in (name, "paca"):
        caplog.set_level(logging.INFO, logger)
    with hold_import_notes():
        logging.getLogger(name).warning(note)
        logging.getLogger(name).warning("anything else")
    assert [(record.name, record.getMessage().endswith(note)) for record in caplog.records] == [
        ("paca", True),
        (name, False),
    ]
