"""What is done to an adapter's files: each function takes random choices and the files, by name, and changes them."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

Files = dict[str, bytes]
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
EXPLODING = (
    "(.+)+!",
    "(x+x+)+y",
    "(a|a)*" * 9 + "!",
    r"(.*\.)?((.+)+)+!",
    "(" * 300 + "a" + ")" * 300,
    "[",
    "(?P<a",
    "*",
)
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10 ** 11 }}",
    "{% set n = namespace(s='xy') %}{% for i in range(70) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ raise_exception('\x1b[31mno') }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.join(['%0999999999d' % 1]) }}",
    "{% include '/etc/passwd' %}",
    "{% if",
    "",
)


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def any_value(random: Random) -> Any:
    """Something that a JSON file may hold, and nobody expects."""
    kind = random.randrange(8)
    if kind == 0:
        return random.choice([None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf])
    if kind == 1:
        return random.choice(["", " ", "x", "x" * 5_000, "../..", "/", "/dev/zero", "~nobody9/x", "a\0b", "\ud800"])
    if kind == 2:
        return random.choice(["\x1b]0;owned\x07", "\u202eevil", "q_proj", "all-linear", "PACA", "cuda:9", "\n" * 99])
    if kind == 3:
        return random.choice(EXPLODING)
    if kind == 4:
        inner = [] if random.random() < 0.2 else [any_value(random) for _ in range(random.randrange(4))]
        return inner if random.random() < 0.5 else {str(number): one for number, one in enumerate(inner)}
    if kind == 5:
        return {random.choice(["q_proj", *EXPLODING]): any_value(random)}
    if kind == 6:
        return deep(random.choice([1, 5, 150, 700]))
    return [f"name{number}" for number in range(random.choice([3, 400, 20_000]))]


def change_json(random: Random, files: Files, name: str) -> None:
    """Put a wrong value at any place of a JSON file, or take the place away, or add one."""
    try:
        content = json.loads(files[name])
    except (KeyError, ValueError, RecursionError):
        return
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        one = waiting.pop()
        inner = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, value in inner:
            places.append((one, key))
            waiting.append(value)
    if places:
        owner, key = random.choice(places[:400])
        how = random.randrange(6)
        if how == 0:
            del owner[key]
        elif how == 1 and isinstance(owner, dict):
            owner[random.choice(["__class__", "runtime_config", "r" * 999, "peft_type", "lora_alpha"])] = any_value(
                random
            )
        else:
            owner[key] = any_value(random)
    with suppress(RecursionError):  # nested deeper than Python writes: it stays as it was
        files[name] = json.dumps(content).encode()


def change_text(random: Random, files: Files, name: str) -> None:
    """Damage a file's bytes: flip, cut, repeat, empty, nest."""
    content = files.get(name)
    if content is None:
        return
    how = random.randrange(7)
    if how == 0:
        content = content[: random.randrange(len(content) + 1)]
    elif how == 1:
        content = random.choice([b"", b"[]", b"null", b'"PACA"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 9_000])
    elif how == 2:
        content = content + random.randbytes(random.randrange(64))
    elif content:
        changed = bytearray(content)
        first = len(changed) if how == 3 else min(len(changed), 400)  # the beginning says what the rest is
        for _ in range(random.choice([1, 1, 3, 30])):
            changed[random.randrange(first)] ^= 1 << random.randrange(8)
        content = bytes(changed)
    files[name] = content


def change_header(random: Random, files: Files) -> None:
    """Let the header of the weights claim other shapes, types, places or names."""
    content = files.get(WEIGHTS)
    if content is None or len(content) < 8:
        return
    (size,) = struct.unpack("<Q", content[:8])
    try:
        header = json.loads(content[8 : 8 + size])
        entry = header[random.choice([name for name in header if name != "__metadata__"])]
        key = random.choice(["shape", "dtype", "data_offsets"])
        wrong = {
            "shape": [[2**40, 2**40], [-1], [], [0], [2**62], "x", [1] * 999],
            "dtype": ["F64", "BF16", "F8_E4M3", "F4", "BOOL", "I8", "C64", "x", 3],
            "data_offsets": [[0, 2**50], [5, 3], [-1, 4], [0, 0], [3]],
        }
        entry[key] = random.choice(wrong[key])
    except (ValueError, IndexError, TypeError, AttributeError, RecursionError):
        return
    text = json.dumps(header).encode()
    size = random.choice([len(text), len(text), 2**40, 0]) if random.random() < 0.3 else len(text)
    files[WEIGHTS] = struct.pack("<Q", size) + text + content[8 + size :] if size < 2**30 else content


def change_tensors(random: Random, files: Files) -> None:
    """Other shapes, types, values, names and numbers of tensors, in a file that is whole."""
    try:
        tensors = load(files[WEIGHTS])
    except Exception:  # damaged already, or of the other kind
        return
    for _ in range(random.choice([1, 1, 2])):
        if not tensors:
            break
        name = random.choice(sorted(tensors))
        value, how = tensors[name], random.randrange(9)
        if how == 0:
            del tensors[name]
        elif how == 1:
            kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]
            tensors[name] = value.to(random.choice(kinds))
        elif how == 2:
            tensors[name] = random.choice([value.flatten(), value[:0], value[None], value.new_zeros(3, 3), value[:-1]])
        elif how == 3:
            tensors[name] = torch.full_like(value, random.choice([0, 1, 99, 127]))
        elif how == 4 and value.is_floating_point():
            tensors[name] = value * random.choice([math.nan, math.inf, 1e38, 0.0])
        elif how == 5:
            tensors[another_name(random, name)] = tensors.pop(name)
        elif how == 6:
            tensors[another_name(random, name)] = value.clone()
        elif how == 7:
            tensors |= {f"{name}.{number}": torch.zeros(0) for number in range(random.choice([2, 900]))}
        else:
            tensors[name] = value.roll(1, 0)
    files[WEIGHTS] = save({name: tensor.contiguous() for name, tensor in tensors.items()})


def another_name(random: Random, name: str) -> str:
    beginning = "base_model.model.model."
    return random.choice(
        [
            *("", "../../../etc/x", "__class__", "a" * 3_000, f"{name}.default", f"{beginning}{name}", "\x1b[2J"),
            *(f"{beginning}layers.0.self_attn.q_proj.weight", f"{beginning}embed_tokens.weight", "lm_head.weight"),
            *(f"{beginning}layers.-1.mlp.up_proj.paca_delta", f"{beginning}layers.0.mlp.paca_delta", name.upper()),
        ]
    )


class Bomb:
    """Asks for memory, or for a program, when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.made_by = (call, arguments)

    def __reduce__(self) -> Any:
        return self.made_by


def as_pickle(random: Random, files: Files) -> None:
    """The weights as `torch.save` leaves them, or what somebody made of them."""
    try:
        tensors: Any = load(files.pop(WEIGHTS))
    except Exception:  # none, or damaged
        return
    wrong: list[Any] = [
        *(list(tensors.values()), dict.fromkeys(tensors, 3), [1, 2], 5, None, {"state_dict": tensors}),
        *({1: torch.zeros(2)}, {"a": torch.zeros(1).expand(10**6, 10**6)}, {"a": torch.eye(3).to_sparse()}),
        *(
            {"a": Bomb(bytearray, 10**11)},
            {"a": Bomb(os.system, "touch /tmp/paca-fuzz-ran")},
            {"a": Bomb(print, "ran")},
        ),
    ]
    stream = io.BytesIO()
    content = tensors if random.random() < 0.5 else random.choice(wrong)
    if random.random() < 0.1:
        stream.write(pickle.dumps(content if random.random() < 0.5 else Bomb(bytearray, 10**11)))
    else:
        torch.save(content, stream)
    files[PICKLE] = stream.getvalue()


def change_entries(random: Random, folder: Path, secret: Path) -> None:
    """Something else than a file where one is read."""
    name = random.choice([CONFIG, WEIGHTS, PICKLE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    place = folder / name
    place.unlink(missing_ok=True)
    how = random.randrange(4)
    if how == 0:
        os.mkfifo(place)
    elif how == 1:
        place.mkdir()
    else:
        place.symlink_to(random.choice([secret, Path("/dev/zero"), Path("/dev/stdin"), folder, folder / "gone"]))


def damage(random: Random, files: Files) -> list[str]:
    """Damage an adapter's files in one to three ways; their names are given back."""
    done = []
    for _ in range(random.choice([1, 1, 2, 3])):
        how = random.choices(
            ["config", "text", "header", "tensors", "pickle", "tokenizer", "template"], [8, 5, 2, 5, 2, 2, 1]
        )[0]
        if how == "config":
            change_json(random, files, CONFIG)
        elif how == "text":
            change_text(random, files, random.choice([CONFIG, WEIGHTS, WEIGHTS, PICKLE, *sorted(files)]))
        elif how == "header":
            change_header(random, files)
        elif how == "tensors":
            change_tensors(random, files)
        elif how == "pickle":
            as_pickle(random, files)
        elif how == "tokenizer":
            change_json(random, files, random.choice(["tokenizer_config.json", "tokenizer.json"]))
        else:
            files["chat_template.jinja"] = random.choice(TEMPLATES).encode()
        done.append(how)
    return done
