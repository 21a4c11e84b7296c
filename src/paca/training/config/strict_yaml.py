"""YAML as its 1.2 core schema reads it, with the place of every key.

PyYAML follows YAML 1.1, where `1e-4` is text, `no` is false and `1:30` is ninety. In a training config each of
these changes a run silently (`learning_rate: 1e-4`, `save_strategy: no`), so the 1.2 rules are set here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean_path

_DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".gz")
_DEEPEST = 100  # brackets within brackets: the parser takes minutes for thousands


class _CoreSchemaLoader(yaml.SafeLoader):
    """The safe loader with the scalar types of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # types-PyYAML: an instance's

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        first_lines: dict[str, int] = {}
        for key_node, _ in node.value:
            problem = None
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be plain text"
            elif key_node.tag != "tag:yaml.org,2002:str":
                problem = f"the key {key_node.value!r} is not text; if it is meant as text, put it in quotes"
            elif key_node.value in first_lines:
                problem = f"the key {key_node.value!r} is given twice (first on line {first_lines[key_node.value]})"
            if problem is not None:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            first_lines[key_node.value] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)
    return int(text, base)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


# YAML 1.2.2, section 10.3.2 (core schema: tag resolution)
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    _CoreSchemaLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(path: Path) -> tuple[Any, dict[str, int]]:
    """Read a YAML file.

    Args:
        path: The file.

    Returns:
        Its content, and the line (from 1) of each key of the two upper levels, by dotted path (`"train.optim"`).

    Raises:
        PacaError: The file is missing, unreadable, not UTF-8, not valid YAML or has a key twice.
    """
    if path.is_dir():
        of_run = path / "config.yaml"
        hint = f" Did you mean {str(of_run)!r}?" if of_run.is_file() else ""
        raise PacaError(f"{path} is a folder; a YAML file was expected.{hint}")
    if path.suffix.lower() in _DATA:
        raise PacaError(f"{path} is data, by its name; a run's YAML file was expected, which names it as data.train.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = did_you_mean_path(path, _is_yaml) or (
            f" (Working folder: {Path.cwd()}.) A YAML file describes a run: model.name and data.train are enough."
        )
        raise PacaError(f"There is no file {path}.{hint}") from None
    except UnicodeDecodeError as error:
        raise PacaError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise PacaError(f"{path} can't be read: {error}.") from error
    try:
        root, content = _parse(text)
    except yaml.YAMLError as error:
        raise PacaError(f"{path}{_place(error)}: not valid YAML: {_problem(error)}.{_advice(error)}") from error
    lines = _lines(root)
    _check_patterns(path, text.splitlines(), lines)
    return content, lines


def _check_patterns(path: Path, text: list[str], lines: dict[str, int]) -> None:
    """Raise PacaError for a pattern that YAML takes for a comment, or a part of it: `answer_pattern: ####(.+)`."""
    for key, number in lines.items():
        found = re.match(r"\s*answer_pattern:\s+((?!['\"])(?:.*\s)?#\S.*)$", text[number - 1])
        if key.endswith(".answer_pattern") and found is not None:
            quoted = "'" + found[1].rstrip().replace("'", "''") + "'"
            raise PacaError(
                f"{path}, line {number}: {key}: in YAML what comes after # is a comment, and no part of the pattern. "
                f"Put it in quotes: answer_pattern: {quoted}"
            )


def _is_yaml(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml") and path.is_file()


def parse_value(text: str) -> Any:
    """The value of `--set key=TEXT`: what the text would mean in a YAML file, but that it has no comments.

    So a pattern such as `####\\s*(.+)` is that text.

    Raises:
        PacaError: The text is not valid YAML.
    """
    try:
        root, value = _parse(text)
    except yaml.YAMLError as error:
        raise PacaError(f"{text!r} is not a valid YAML value: {_problem(error)}.{_advice(error)}") from error
    plain = root is None or (isinstance(root, yaml.ScalarNode) and root.style is None)
    comment = text[0 if root is None else root.end_mark.index :].strip()
    return text.strip() if plain and comment.startswith("#") else value


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    loader = _CoreSchemaLoader(text)  # refuses characters that YAML does not allow
    try:
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:  # PyYAML's own constructors
        raise yaml.YAMLError(f"a value with a tag, or a number, can't be made: {error}") from None
    finally:
        loader.dispose()


def _lines(root: Any) -> dict[str, int]:
    lines: dict[str, int] = {}
    if not isinstance(root, yaml.MappingNode):
        return lines
    for section, content in root.value:
        lines[section.value] = section.start_mark.line + 1
        if isinstance(content, yaml.MappingNode):
            for key, _ in content.value:
                lines[f"{section.value}.{key.value}"] = key.start_mark.line + 1
    return lines


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""


_ADVICE = {
    "but found '<block mapping start>'": "The line is indented more than the one above it, or otherwise than its "
    "neighbours; give the keys of a section the same indentation, by spaces.",
    "expected <block end>": "Often a line is indented otherwise than its neighbours, or a quote or bracket before it "
    "is not closed.",
    "mapping values are not allowed": "A value that holds ': ' needs quotes; or the line is indented more than its "
    "neighbours.",
    "could not find expected ':'": "A key is followed by a colon and a space.",
    "cannot start any token": "Indent by spaces, not by tabs; a value that begins with such a character needs quotes.",
    "expected ',' or": "A list [...] or mapping {...} is not closed, or lacks a comma.",
    "unexpected end of stream": "A quote that was opened is not closed.",
    "but found another document": "A file describes one run: leave out the line --- and what follows.",
    "could not determine a constructor": "A value that begins with ! needs quotes.",
}
"""What most often lies behind the parser's words."""


def _advice(error: yaml.YAMLError) -> str:
    problem = _problem(error)
    return next((f" {advice}" for words, advice in _ADVICE.items() if words in problem), "")


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split()).rstrip(".")
