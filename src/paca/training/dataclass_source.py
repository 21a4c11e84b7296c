"""The fields of a dataclass as its source code has them: names, types and choices, with nothing imported.

`trl.SFTConfig` and `paca.PacaConfig` bring torch and transformers along: seconds before a misspelt key is refused.
"""

from __future__ import annotations

import ast
import builtins
import enum
import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_IMPORTED = ("typing", "collections.abc")  # light, so their names are the real ones


class SourceUnreadable(Exception):
    """The source is not there, or says it in a way that this file does not know. Import the class instead."""


@dataclass(frozen=True)
class SourceField:
    """One field that `__init__` takes."""

    annotation: Any
    """Its type. Classes of the source are stand-ins of the same name: an enum of the same values, or an empty class."""
    choices: tuple[Any, ...] | None
    """What its metadata allow, where they list it; None where they don't, or compute the list."""


def read_fields(module: str, name: str) -> dict[str, SourceField]:
    """The fields of a dataclass and of the dataclasses it inherits from.

    Args:
        module: where the class is defined, or imported from somewhere else by `from ... import`.
        name: of the class.

    Raises:
        SourceUnreadable: the source can't be found, or a field's type can't be told from it.
    """
    return _fields(*_find(module, name))


def _fields(module: str, node: ast.ClassDef) -> dict[str, SourceField]:
    found: dict[str, SourceField] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and not hasattr(builtins, base.id):
            found |= _fields(*_find(module, base.id))
        elif not isinstance(base, ast.Name):
            raise SourceUnreadable(f"{module}.{node.name} has a base {ast.unparse(base)}")
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return found
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        options = _options(statement.value)
        if (
            ast.unparse(statement.annotation).startswith(("ClassVar", "InitVar"))
            or _literal(options.get("init")) is False
        ):
            continue
        found[statement.target.id] = SourceField(_resolve(module, statement.annotation), _choices(options))
    return found


def _options(value: ast.expr | None) -> dict[str | None, ast.expr]:
    """The keyword arguments of `field(...)`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        return {keyword.arg: keyword.value for keyword in value.keywords}
    return {}


def _choices(options: dict[str | None, ast.expr]) -> tuple[Any, ...] | None:
    metadata = options.get("metadata")
    for key, value in zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ():
        if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, (ast.List, ast.Tuple)):
            return tuple(_literal(value))
    return None


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError as error:
        raise SourceUnreadable(f"{ast.unparse(node) if node else node} is no literal") from error


def _resolve(module: str, node: ast.expr) -> Any:
    """The type that an annotation in `module` means."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _resolve(module, ast.parse(node.value, mode="eval").body)
        return node.value
    if isinstance(node, ast.Name):
        if isinstance(getattr(builtins, node.id, None), type):
            return getattr(builtins, node.id)
        return _class_named(module, node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _resolve(module, node.left) | _resolve(module, node.right)
    if isinstance(node, ast.Subscript):
        generic = _resolve(module, node.value)
        elements = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if ast.unparse(node.value).rpartition(".")[2] == "Literal":
            arguments = tuple(_literal(element) for element in elements)
        else:
            arguments = tuple(_resolve(module, element) for element in elements)
        return generic[arguments if len(arguments) > 1 else arguments[0]]
    raise SourceUnreadable(f"{module} has an annotation {ast.unparse(node)}")


def _class_named(module: str, name: str) -> Any:
    place = _definition(module, name)
    if place[0] in _IMPORTED:
        return getattr(importlib.import_module(place[0]), name)
    return _stand_in(*_find(module, name))


@functools.cache
def _stand_in(module: str, node: ast.ClassDef) -> Any:
    if not any(ast.unparse(base).endswith("Enum") for base in node.bases):
        return type(node.name, (), {"__module__": module})
    members = {
        statement.targets[0].id: _literal(statement.value)
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    return enum.Enum(node.name, members, module=module)


def _find(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """The module that defines a class, and the definition."""
    place, node = _definition(module, name)
    if not isinstance(node, ast.ClassDef):
        raise SourceUnreadable(f"{module}.{name} is no class that its source defines")
    return place, node


@functools.cache
def _definition(module: str, name: str) -> tuple[str, ast.ClassDef | None]:
    if module in _IMPORTED:
        return module, None
    tree, is_package = _parsed(module)
    for statement in _statements(tree):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return module, statement
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_imported_module(module, is_package, statement), alias.name)
    raise SourceUnreadable(f"{module} does not say what {name} is")


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Those that run at import, also under `if`, `try` and `with`; most packages import lazily under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _statements(node)


def _imported_module(module: str, is_package: bool, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    kept = len(parts) - statement.level + is_package
    return ".".join([*parts[:kept], *([statement.module] if statement.module else [])])


@functools.cache
def _parsed(module: str) -> tuple[ast.Module, bool]:
    """A module's source, found without importing the packages around it; and whether it is a package."""
    try:
        name, locations = "", None
        for part in module.split("."):
            name = f"{name}.{part}" if name else part
            # Not importlib.util.find_spec: it imports the packages around a module, and asks the modules that are
            # imported already, of which some (transformers) have made up specs of themselves.
            spec = next(filter(None, (finder.find_spec(name, locations) for finder in sys.meta_path)))
            locations = spec.submodule_search_locations
        return ast.parse(spec.loader.get_source(module)), locations is not None  # type: ignore[union-attr]
    except (StopIteration, ImportError, AttributeError, ValueError, TypeError, OSError, SyntaxError) as error:
        raise SourceUnreadable(f"the source of {module} can't be read: {error}") from error
