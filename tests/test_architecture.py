"""docs/architecture.md is what the code is: its rooms, its arrows, its picture, and the functions it names."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from tools.draw_architecture import (
    PAGE,
    PICTURE,
    ROOMS,
    SOURCE,
    arrows_in,
    as_text,
    direct,
    draw,
    levels_of,
    table,
    table_in,
)
from torch import nn

import paca

ADVICE = "run: python tools/draw_architecture.py"


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "house"


def names_in(path: Path) -> set[str]:
    """The functions, classes and methods that a file defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_page_has_the_rooms_and_arrows_of_the_code():
    assert table_in(PAGE.read_text(encoding="utf-8")) == table(arrows_in(SOURCE)), ADVICE


def test_the_picture_was_drawn_from_the_arrows_of_the_code():
    with Image.open(PICTURE) as picture:
        assert picture.info["Description"] == as_text(arrows_in(SOURCE)), ADVICE


def test_every_function_that_the_page_names_is_where_it_says():
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 30
    missing = [f"{file}: {name}" for file, name in named if name not in names_in(SOURCE / file)]
    assert missing == []


def what_runs(folder: Path) -> set[tuple[str, str]]:
    """The files of paca and the functions that run while two layers go the way of the page."""
    ran = set()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(f"{SOURCE}/"):
            ran.add((frame.f_code.co_filename.removeprefix(f"{SOURCE}/"), frame.f_code.co_name))

    x = torch.randn(4, 32)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        model = get_peft_model(two_layers(), paca.PacaConfig(r=8, target_modules=["0", "1"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss = model(x).square().sum()
        model.state_dict()  # parks: the backward pass has to put its columns back
        loss.backward()
        optimizer.step()
        with model.disable_adapter():
            model(x)
        model.save_pretrained(folder)
        PeftModel.from_pretrained(two_layers(), folder)(x)
        model.unload()
    finally:
        sys.setprofile(before)
    return ran


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 8))


def test_every_function_on_the_way_of_one_layer_runs_there(tmp_path):
    way = PAGE.read_text(encoding="utf-8").partition("## The way of one layer")[2].partition("\n## ")[0]
    named = {(file, name.rpartition(".")[2]) for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", way)}
    before_it = {("config.py", "PacaConfig"), ("tuner/registration.py", "register")}  # a class; runs at the import
    assert len(named) > 25
    assert before_it <= named
    assert named - before_it - what_runs(tmp_path) == set()


def test_every_file_and_folder_that_the_page_names_is_there():
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page)
    assert named
    assert [name for name in named if not (SOURCE / name).exists() and not (SOURCE.parents[1] / name).exists()] == []


def test_rooms_are_folders_and_arrows_are_imports_of_every_kind(tmp_path):
    source = package(
        tmp_path,
        {
            "__init__.py": "from house.roof.tiles import lay",
            "door.py": "import house.roof",
            "roof/__init__.py": "",
            "roof/tiles.py": "def lay():\n    import house.walls.brick",
            "walls/__init__.py": "from __future__ import annotations",
            "walls/brick.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house import floor",
            "walls/inner/__init__.py": "from .. import brick",
            "walls/inner/plaster.py": "from ...cellar.sand import grain\nimport housekeeping.roof",
            "floor/__init__.py": "from house.walls_of_others import none",
            "cellar/__init__.py": "",
            "notes/text.txt": "no room: no code",
        },
    )
    assert arrows_in(source) == {
        "cellar": (),
        "floor": (),
        "roof": ("walls",),
        "walls": ("cellar", "floor"),
    }


def test_nothing_but_a_program_of_its_own_imports_the_program_which_leads_to_all():
    importing = [path for path in SOURCE.rglob("*.py") if "paca_command import" in path.read_text(encoding="utf-8")]
    assert [path.relative_to(SOURCE).as_posix() for path in importing] == ["cli/train_counting_memory.py"]


def test_the_picture_leaves_out_what_follows_and_what_all_may_use():
    arrows = {"top": ("bottom", "messages", "middle"), "middle": ("bottom",), "bottom": ("messages",), "messages": ()}
    assert levels_of(arrows) == {"messages": 0, "bottom": 1, "middle": 2, "top": 3}
    assert direct(arrows) == [("top", "middle"), ("middle", "bottom")]


def test_no_files_import_each_other_also_not_later_or_for_types():
    files = {".".join(("paca", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in SOURCE.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        imported = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        wanted = {one for node in imported for one in (node.module, *(f"{node.module}.{a.name}" for a in node.names))}
        graph[name] = wanted & files.keys()  # a package's __init__ collects what lies in it, and is no part of circles
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_rooms_that_import_each_other_are_named():
    with pytest.raises(ValueError, match="among one, two"):
        levels_of({"free": (), "one": ("two", "free"), "two": ("one",)})


def test_a_room_that_nobody_described_is_asked_for():
    assert "attic" not in ROOMS
    with pytest.raises(ValueError, match="'attic' is for"):
        table({"attic": ()})


def test_a_drawn_picture_says_what_it_was_drawn_from(tmp_path):
    arrows = {"columns": ("functional",), "functional": (), "layers": ("columns",)}
    draw(arrows, tmp_path / "made" / "picture.png")
    with Image.open(tmp_path / "made" / "picture.png") as picture:
        assert picture.info["Description"] == "columns -> functional; functional -> ; layers -> columns"
