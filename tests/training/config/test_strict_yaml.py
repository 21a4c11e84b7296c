from __future__ import annotations

import math
from pathlib import Path

import pytest

from paca.messages.errors import PacaError
from paca.training.config.strict_yaml import parse_value, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # text in YAML 1.1
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("7", 7),
        ("-7", -7),
        ("010", 10),  # 8 in YAML 1.1
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("1_000", "1_000"),
        ("no", "no"),  # false in YAML 1.1
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("'5'", "5"),
        ("[q_proj, 1, 0.5]", ["q_proj", 1, 0.5]),
        ("{q_proj: 8}", {"q_proj": 8}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_keys_come_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# a comment\nmodel:\n  name: x\n\n  dtype: auto\ntrain: {seed: 1}\n")
    content, lines = read_yaml(file)
    assert content == {"model": {"name": "x", "dtype": "auto"}, "train": {"seed": 1}}
    assert lines == {"model": 2, "model.name": 3, "model.dtype": 5, "train": 6, "train.seed": 6}


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("model:\n  name: a: b\n", "line 2, column 10", "mapping values are not allowed"),
        ("train:\n  seed: 1\n  seed: 2\n", "line 3, column 3", "the key 'seed' is given twice (first on line 2)"),
        ("train:\n\tseed: 1\n", "line 2, column 1", "cannot start any token"),
        ("model:\n  name: x\n   dtype: auto\n", "line 3, column 9", "the line is indented more than its neighbours"),
        ("model:\n  name: x\n data: y\n", "line 3, column 2", "give the keys of a section the same indentation"),
        ("train: [1, 2\nseed: 1\n", "line 2, column 5", "is not closed, or lacks a comma"),
        ("a: 'x\n", "line 2, column 1", "A quote that was opened is not closed"),
        ("train:\n\tseed: 1\n", "line 2, column 1", "Indent by spaces"),
        ("? [a]\n: 1\n", "line 1, column 3", "a key must be plain text"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1", "A file describes one run: leave out the line ---"),
        ("1: a\n", "line 1, column 1", "the key '1' is not text"),
        ("train: {null: a}\n", "line 1, column 9", "the key 'null' is not text"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4", "could not determine a constructor"),
    ],
)
def test_an_error_names_file_line_and_column(tmp_path: Path, text: str, place: str, problem: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(PacaError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}, {place}: not valid YAML: ")
    assert problem in str(caught.value)


def test_characters_that_yaml_does_not_allow_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: \0\n")
    with pytest.raises(PacaError, match=r"a\.yaml: not valid YAML: unacceptable character #x0000") as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(PacaError, match="is not a valid YAML value"):
        parse_value("\x07")


def test_unreadable_files_are_errors_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"a: \xe9\n")
    for name, problem in (
        ("none.yaml", "There is no file"),
        (".", "is a folder"),
        ("latin1.yaml", "not UTF-8 text .* Save it as"),
    ):
        with pytest.raises(PacaError, match=problem) as caught:
            read_yaml(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("text", ["model: " + "[" * 20_000, "- " * 20_000 + "a", "a: " + "{a: " * 20_000])
def test_what_is_nested_too_deeply_is_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(PacaError, match=r"config\.yaml.*: not valid YAML: it is nested too deeply"):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "value", ["!!int abc", "!!bool maybe", "!!float x", "!!timestamp hello", "!!timestamp 2020-99-99", "7" * 5000]
)
def test_a_value_that_can_not_be_made_is_no_traceback(tmp_path: Path, value: str) -> None:
    with pytest.raises(PacaError, match="not a valid YAML value: a value with a tag, or a number, can't be made"):
        parse_value(value)
    (tmp_path / "config.yaml").write_text(f"train: {{max_steps: {value}}}\n")
    with pytest.raises(PacaError, match=r"config\.yaml.*: not valid YAML: a value"):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"####\s*(.+)", r"####\s*(.+)"),
        (r"#### (\S+) # and more", r"#### (\S+) # and more"),
        ("Answer #(.+)", "Answer #(.+)"),
        ("'#### (.+)'", "#### (.+)"),
        ("", None),
        ("{a: 1} # one", {"a": 1}),
    ],
)
def test_what_is_set_has_no_comments(text: str, value: object) -> None:
    """A pattern that began with # became null, and every answer was compared whole."""
    assert parse_value(text) == value


@pytest.mark.parametrize("pattern", [r"####\s*(.+)", r"#### (\S+)", "it's #(.+)  "])
def test_a_pattern_that_yaml_takes_for_a_comment_is_refused(tmp_path: Path, pattern: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"eval:\n  metric: exact_match\n  answer_pattern: {pattern}\n")
    with pytest.raises(
        PacaError, match=r"line 3: eval\.answer_pattern: in YAML what comes after # is a comment"
    ) as told:
        read_yaml(file)
    file.write_text(f"eval: {{}}\ntrain:\n  {str(told.value).partition('in quotes: ')[2]}\n")
    assert read_yaml(file)[0]["train"]["answer_pattern"] == pattern.rstrip()
    file.write_text(
        "eval:\n  answer_pattern: '#### (.+)' #mine\n  before: true #too\ntrain:\n  answer_pattern: a # b\n"
    )
    assert read_yaml(file)[0] == {
        "eval": {"answer_pattern": "#### (.+)", "before": True},
        "train": {"answer_pattern": "a"},
    }
