from __future__ import annotations

import dataclasses
import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from paca.training.dataclass_source import SourceUnreadable, read_fields
from paca.training.typed_values import expected, matches

PACKAGE = {
    "__init__.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from .settings import Settings as Settings
        else:
            raise RuntimeError("imported")
        """,
    "settings/__init__.py": """
        import dataclasses
        from dataclasses import dataclass, field
        from typing import Any, ClassVar, Literal, Optional
        from ..kinds import Kind
        from .base import Base

        @dataclass
        class Settings(Base):
            '''Documented.'''
            size: float = 0.5
            kind: Kind | str = field(default=Kind.SMALL, metadata={"help": "which", "choices": ["small", "big"]})
            mode: "Optional[Literal['on', False]]" = None
            names: list[str] | dict[str, int] | None = None
            anything: Any = None
            computed: str = field(default="a", metadata={"choices": list("ab")})
            hidden: int = field(init=False, default=1)
            shared: ClassVar[int] = 3
            other: int = dataclasses.field(init=True, default=3)
            def method(self) -> int: ...
        """,
    "settings/base.py": """
        from dataclasses import dataclass
        class Plain:
            no_field: int = 3
        @dataclass
        class Base(Plain):
            first: int = 1
            size: int = 1
        """,
    "kinds.py": """
        import enum
        class Kind(enum.Enum):
            SMALL = "small"
            BIG = "big"
        """,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that must not be imported; its name is new each time, since sources are read once."""
    name = f"sourced_{abs(hash(tmp_path))}"
    for file, text in PACKAGE.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield name
    assert not any(module.startswith(name) for module in sys.modules)


def test_fields_are_those_of_init_in_the_order_of_the_class(package: str) -> None:
    fields = read_fields(package, "Settings")
    names = ["first", "size", "kind", "mode", "names", "anything", "computed", "other"]
    assert list(fields) == names
    assert fields["size"].annotation is float  # the class that inherits decides
    assert fields["mode"].annotation == Literal["on", False] | None
    assert fields["names"].annotation == list[str] | dict[str, int] | None
    assert matches(object(), fields["anything"].annotation)


def test_an_enum_is_told_by_its_values(package: str) -> None:
    kind = read_fields(package, "Settings")["kind"].annotation
    assert matches("big", kind)
    assert not matches("huge", kind)
    assert expected(kind) == "one of small, big"


def test_choices_are_read_where_they_are_listed(package: str) -> None:
    fields = read_fields(package, "Settings")
    assert fields["kind"].choices == ("small", "big")
    assert fields["computed"].choices is None
    assert fields["first"].choices is None


@pytest.mark.parametrize("module", ["no_such_package", "dataclasses.nothing", "math"])
def test_what_has_no_source_is_said(module: str) -> None:
    with pytest.raises(SourceUnreadable, match=module):
        read_fields(module, "Settings")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("first: int", "first: Unknown"),
        ("first: int", "first: make_type()"),
        ("class Base(Plain)", "class Base(make_base())"),
        ("class Base(Plain)", "class Base(Unknown)"),
        ("class Base(Plain)", "class Other(Plain)"),
        ("first: int = 1", "first: int = field(init=not True)"),
        ("first: int = 1", "first: int ="),
    ],
)
def test_a_source_that_is_not_understood_is_refused(package: str, tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / package / "settings" / "base.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(SourceUnreadable):
        read_fields(package, "Settings")


def test_it_agrees_with_dataclasses(package: str) -> None:
    source = read_fields("paca.training.run_config", "ModelSection")
    from paca.training.run_config import ModelSection

    assert list(source) == [field.name for field in dataclasses.fields(ModelSection)]
