from __future__ import annotations

import dataclasses
import logging
import typing
from pathlib import Path

import peft
import pytest
import trl

import paca
from paca.messages.errors import PacaError
from paca.training import free_sections
from paca.training.adapter_settings import adapter_fields
from paca.training.dataclass_source import SourceUnreadable
from paca.training.free_sections import OWNED, adapter_source_fields, check_free_sections, train_source_fields
from paca.training.key_checks import Origins
from paca.training.train_settings import train_fields
from paca.training.typed_values import expected

NOWHERE = Origins(Path("run.yaml"), {})


def test_the_source_of_sft_config_says_what_the_class_says() -> None:
    source, fields = train_source_fields(), train_fields()
    assert source.keys() == fields.keys()
    assert {name: expected(field.annotation) for name, field in source.items()} == {
        name: expected(annotation) for name, annotation in fields.items()
    }
    listed = {field.name: field.metadata.get("choices") for field in dataclasses.fields(trl.SFTConfig)}
    assert any(field.choices for field in source.values())
    for name, field in source.items():
        if field.choices is not None:
            assert list(field.choices) == list(listed[name])


def test_the_source_of_paca_config_says_what_the_class_says() -> None:
    assert {name: field.annotation for name, field in adapter_source_fields().items()} == adapter_fields()
    annotations = typing.get_type_hints(paca.PacaConfig)
    bookkeeping = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    assert adapter_source_fields().keys() == annotations.keys() - bookkeeping - {
        "__dataclass_fields__",
        "base_quantization",
    }


def test_keys_with_another_place_are_fields() -> None:
    assert set(OWNED) <= set(train_source_fields())


def test_a_source_that_cannot_be_read_leaves_the_check_to_the_classes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = {"paca": {}, "train": {"learning_rat": 1}}
    with pytest.raises(PacaError, match="learning_rat"):
        check_free_sections(wrong, NOWHERE)

    def unreadable(*_: str) -> None:
        raise SourceUnreadable("trl is a zip of bytecode")

    monkeypatch.setattr(free_sections, "read_fields", unreadable)
    with caplog.at_level(logging.INFO, logger="paca"):
        check_free_sections(wrong, NOWHERE)
    assert "trl is a zip of bytecode" in caplog.text
