"""Loading examples from files, and holding some out."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from paca.data import load_examples, split_heldout
from paca.data.sources import find_source
from paca.messages.errors import PacaError

ALPACA = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n + 1)))} for n in range(20)]
CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_form_and_what_became_of_it_are_said_aloud(tmp_path: Path) -> None:
    rows = [{**row, "id": index} for index, row in enumerate(ALPACA)]
    examples = load_examples(jsonl(tmp_path / "a.jsonl", rows))
    assert examples.format == "alpaca"
    assert examples.description == (
        "20 examples of the form alpaca (columns instruction, input, output), taken as prompts and answers, "
        "as chat messages (not used: id)"
    )
    pair = {"prompt": "2+2=", "completion": "4"}
    plain = load_examples(jsonl(tmp_path / "a.jsonl", [pair, pair]), limit=1)
    assert plain.description == (
        "1 example of the form prompt-completion (columns prompt, completion), taken as prompts and answers, plain text"
    )
    assert plain.is_conversational is False
    assert examples.is_conversational is True


def test_examples_say_where_they_come_from(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", ALPACA[2:3])
    jsonl(tmp_path / "a.jsonl", ALPACA[:2])
    (tmp_path / "README.md").write_text("not data")
    examples = load_examples(str(tmp_path))
    assert examples.dataset["origin"][:] == ["a.jsonl, line 1", "a.jsonl, line 2", "b.jsonl, line 1"]


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    rows = [{"input": "a?", "target": "b", "question": "no. 1"}, {"input": "c?", "target": "d", "question": "no. 2"}]
    source = jsonl(tmp_path / "data.jsonl", rows)
    found = load_examples(source, columns={"question": "input", "answer": "target"})
    assert [row["prompt"][0]["content"] for row in found.dataset] == ["a?", "c?"]
    assert [row["completion"][0]["content"] for row in found.dataset] == ["b", "d"]
    swapped = load_examples(source, columns={"question": "target", "answer": "input"})  # no cached conversion
    assert swapped.dataset[0]["prompt"][0]["content"] == "b"


def test_a_named_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    rows = [{"input": "a?", "target": "b"}, {"input": "c?", "aim": "d"}]
    source = jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(PacaError, match=r"line 1: there is no column targt, .*: input, target\. Did you mean 'tar"):
        load_examples(source, columns={"question": "input", "answer": "targt"})
    with pytest.raises(
        PacaError, match=r"line 2: there is no column target, which data\.columns names; found: input, a"
    ):
        load_examples(source, columns={"question": "input", "answer": "target"})


@pytest.mark.parametrize("form", [None, "question-answer"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"questoin": "input", "answer": "target"},
            "names questoin, which is a column of no form of data. Did you mean",
        ),
        (
            {"zzzz": "content"},
            "names zzzz, which is a column of no form of data. They know A, B, C, D, E, answer, answerKey, ",
        ),
        ({"eingabe": "question", "target": "answer"}, "comes first, then yours: {question: eingabe, answer: target}?"),
        ({"answer": "target"}, "data.jsonl has the columns: target, input."),
    ],
)
def test_names_that_no_form_knows_are_told(
    tmp_path: Path, columns: dict[str, str], message: str, form: str | None
) -> None:
    source = jsonl(tmp_path / "data.jsonl", [{"input": "a?", "target": "b"}])
    with pytest.raises(PacaError) as error:
        load_examples(source, format=form, columns=columns)
    assert message in str(error.value)


def test_what_is_named_already_is_in_the_advice(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "data.jsonl", [{"input": "a?", "target": "b"}])
    with pytest.raises(
        PacaError, match=r"data\.columns: \{answer: target, question: input\} \(its name: yours\) in the run's YAML"
    ):
        load_examples(source, columns={"answer": "target"})


def test_a_family_that_there_is_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="no family 'dpo' of examples; expected one of text, preferences, prompts, lab"):
        load_examples(jsonl(tmp_path / "data.jsonl", [{"text": "a"}]), family="dpo")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"prompt": "a?", "chosen": "b", "rejected": "c"},
            "prompt, chosen, rejected. They are those of preference, for train.trainer: dpo or reward (in Python "
            "family='preferences').",
        ),
        ({"question": "a?", "chosen": "b", "rejected": "c"}, "reward (in Python family='preferences')."),
    ],
)
def test_data_for_another_trainer_is_named(tmp_path: Path, record: dict[str, Any], told: str) -> None:
    with pytest.raises(PacaError) as error:
        load_examples(jsonl(tmp_path / "data.jsonl", [record]))
    assert str(error.value).endswith(told)
    assert "data.columns" not in str(error.value)


def test_an_optional_column_may_be_named_and_absent_in_some_rows_but_not_in_all(tmp_path: Path) -> None:
    columns = {"instruction": "task", "input": "context", "output": "out"}
    rows = [{"task": "do", "out": "y"}, {"task": "do", "context": "x", "out": "z"}]
    source = jsonl(tmp_path / "data.jsonl", rows)
    found = load_examples(source, columns=columns)
    assert [row["prompt"][0]["content"] for row in found.dataset] == ["do", "do\n\nx"]
    assert "of the form alpaca (columns task as instruction, out as output)" in found.description
    with pytest.raises(
        PacaError, match=r"there is no column contxt, which data\.columns names; .* Did you mean 'context"
    ):
        load_examples(source, columns={**columns, "input": "contxt"})


@pytest.mark.parametrize(
    ("record", "columns", "family", "hint"),
    [
        ({"question": "1", "frage": "a?", "answer": "b"}, {"question": "fragge"}, "text", r" Did you mean 'frage'\?"),
        ({"question": "a?", "answer": "b"}, {"question": "foo"}, "text", " Leave question out of data.columns: the"),
        ({"text": "a", "label": "b"}, {"label": "lab"}, "labels", r" Did you mean 'label'\?"),
        ({"instruction": "a", "input": "", "output": "b"}, {"input": "context"}, "text", " Leave input out of "),
    ],
)
def test_a_named_column_is_not_taken_for_there_because_the_forms_own_is(
    tmp_path: Path, record: dict[str, str], columns: dict[str, str], family: str, hint: str
) -> None:
    """The data line said that it was used."""
    source = jsonl(tmp_path / "data.jsonl", [record, record])
    (own,) = columns.values()
    for limit in (None, 1):
        with pytest.raises(
            PacaError, match=rf"data\.jsonl: there is no column {own}, which data\.columns names; found: .*\.{hint}"
        ):
            load_examples(source, family=family, columns=columns, limit=limit)
    found = load_examples(source, family=family, columns=columns, own_names_suffice=True)  # beside training data
    assert f"{own} as" not in found.description
    other = jsonl(tmp_path / "other.jsonl", [{own if name in columns else name: text for name, text in record.items()}])
    both = load_examples([source, other], family=family, columns=columns)
    assert len(both.dataset) == 3
    assert both.description.count(f"{own} as {next(iter(columns))}") == 1


def test_a_file_that_has_the_forms_own_names_needs_no_others(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "data.jsonl", [{"question": "a?", "answer": "b"}, {"input": "c?", "target": "d"}])
    found = load_examples(source, columns={"question": "input", "answer": "target"})
    assert [row["prompt"][0]["content"] for row in found.dataset] == ["a?", "c?"]


def test_packed_files_are_data_and_not_read_twice_beside_the_unpacked_ones(tmp_path: Path) -> None:
    for name, rows in (("a.jsonl", ALPACA[:2]), ("b.JSONL", ALPACA[2:3])):
        packed = gzip.compress(Path(jsonl(tmp_path / name, rows)).read_bytes())
        (tmp_path / f"{name}.gz").write_bytes(packed)
    (tmp_path / "b.JSONL").unlink()
    (tmp_path / "c.csv.gz").write_bytes(b"not data")
    assert load_examples(str(tmp_path)).dataset["origin"][:] == [
        "a.jsonl, line 1",
        "a.jsonl, line 2",
        "b.JSONL.gz, line 1",
    ]
    assert len(load_examples(str(tmp_path / "a.jsonl.gz")).dataset) == 2
    with pytest.raises(PacaError, match=r"is of type '\.gz'\. Understood are .*\.jsonl\.gz, \.json\.gz\."):
        load_examples(str(tmp_path / "c.csv.gz"))
    with pytest.raises(PacaError, match=r"no data file or folder 'd\.jsonl\.gz'"):
        load_examples("d.jsonl.gz")
    with pytest.raises(PacaError, match=r"no data file or folder '7\.5%'.* For a share .* give data\.eval: 0\.075\."):
        load_examples("7.5%")


def test_every_message_keeps_its_own_fields(tmp_path: Path) -> None:
    """A table of messages would give each of them all fields of all others, and all argument names of all tools."""
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"function": {"name": "g", "arguments": {"y": ["2"]}}}
    rows = [
        {"messages": CONVERSATION},
        {
            "messages": [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": [call, other]}],
            "tools": [call],
        },
    ]
    examples = load_examples(jsonl(tmp_path / "a.jsonl", rows))
    assert examples.dataset[0]["messages"] == CONVERSATION
    assert examples.dataset[1]["messages"] == rows[1]["messages"]
    assert examples.dataset["tools"][:] == [None, json.dumps([call])]


def test_nulls_that_a_parquet_file_puts_into_messages_are_dropped(tmp_path: Path) -> None:
    rows = [{"messages": [CONVERSATION[0], {**CONVERSATION[1], "name": "bot"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read_back = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert read_back[0]["messages"][0]["name"] is None
    assert load_examples(str(tmp_path / "a.parquet")).dataset[0]["messages"] == rows[0]["messages"]


def test_a_changed_file_is_read_anew_and_an_unchanged_one_comes_from_the_cache(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    first = load_examples(source)
    again = load_examples(source)
    assert again.dataset.cache_files == first.dataset.cache_files
    assert again.dataset._fingerprint == first.dataset._fingerprint
    jsonl(tmp_path / "a.jsonl", [{"text": "two"}])  # the same length
    assert load_examples(source).dataset["text"][:] == ["two"]


def test_the_same_file_read_in_another_form_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{**ALPACA[3], "text": "plain"}, {**ALPACA[4], "text": "text"}])
    assert "prompt" in load_examples(source).dataset.column_names
    assert load_examples(source, format="text").dataset["text"][:] == ["plain", "text"]
    assert len(load_examples(source, limit=1).dataset) == 1


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([*ALPACA[:2], {"instruction": "a", "output": ""}], r"a\.jsonl, line 3: output is empty"),
        (
            [*ALPACA[:2], {"instruction": "a"}],
            r"a\.jsonl, line 3: there is no column output; found: instruction\. Complete the",
        ),
        (
            [*ALPACA[:2], {"question": "a", "answer": "b"}],
            r"a\.jsonl, line 3 is of the form question-answer: it has question and answer, but no instruction and no "
            r"output\. The records from a\.jsonl, line 1 on are of the form alpaca",
        ),
        (
            [{"question": "a", "choices": ["b", "c"], "answer": 1}, {"question": "a", "answer": "b"}],
            r"line 2 is of the form question-answer: it has question and answer, but no choices.* of the form mmlu",
        ),
        ([{"instruction": "a", "output": 5}], r"a\.jsonl, line 1: output is a number"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}],
            r"a\.jsonl, line 2: text and lists of messages are mixed",
        ),
    ],
)
def test_a_bad_example_is_one_error_that_names_it(tmp_path: Path, rows: list[dict[str, Any]], expected: str) -> None:
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(PacaError, match=expected) as error:
        load_examples(source)
    assert error.value.__cause__ is None  # nothing of the machinery in the message


def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ALPACA)
    text = Path(source).read_text().replace('"Count to 7."', '"Count to 7.')
    Path(source).write_text(text)
    with pytest.raises(PacaError, match=r"a\.jsonl, line 8 is not valid JSON"):
        load_examples(source)


def test_rows_in_place_of_a_source_are_told_where_to_go() -> None:
    with pytest.raises(PacaError, match=r"is a dict; expected a text: .*Dataset\.from_list\(rows\).*\.jsonl file"):
        load_examples([{"question": "1+1?", "answer": "2"}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "text\n"), ("a.csv", "")]
)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PacaError, match="empty"):
        load_examples(str(tmp_path / name))


def test_a_missing_file_is_an_error_that_does_not_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for name in [str(tmp_path / "none.jsonl"), "none.jsonl", "data/none.csv", "./none", "a/b/c", "train data"]:
        with pytest.raises(PacaError, match="no data file or folder"):
            load_examples(name)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(PacaError, match=r"type '\.txt'"):
        load_examples(str(tmp_path / "notes.txt"))
    with pytest.raises(PacaError, match="holds no data file"):
        load_examples(str(tmp_path))


def test_a_name_like_a_hub_id_says_that_the_hub_cannot_be_reached() -> None:
    with pytest.raises(PacaError, match=r"no data file or folder 'some/data'.*hub cannot be reached"):
        load_examples("some/data")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:main", ("owner/name", "main", "train")),
        ("owner/name[test]", ("owner/name", None, "test")),
        ("owner/name:main[train[:10%]]", ("owner/name", "main", "train[:10%]")),
    ],
)
def test_a_hub_source_names_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str | None, str]
) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load(hub_id: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_dict({"question": ["2+2?", "3+3?"], "answer": ["4", "6"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = load_examples(source)
    assert asked == [expected]
    assert examples.dataset["origin"][:] == [f"{source}, row 0", f"{source}, row 1"]
    assert examples.dataset[1]["completion"] == [{"role": "assistant", "content": "6"}]
    assert find_source(source, "train").dataset is not None


def test_holding_out_is_reproducible_disjoint_and_complete(tmp_path: Path) -> None:
    examples = load_examples(jsonl(tmp_path / "a.jsonl", ALPACA))
    train, held_out = split_heldout(examples, 0.25, seed=3)
    assert len(held_out.dataset) == 5
    origins = train.dataset["origin"][:] + held_out.dataset["origin"][:]
    assert sorted(origins) == sorted(examples.dataset["origin"][:])
    assert split_heldout(examples, 5, seed=3)[1].dataset["origin"][:] == held_out.dataset["origin"][:]
    assert split_heldout(examples, 5, seed=4)[1].dataset["origin"][:] != held_out.dataset["origin"][:]
    lines = [int(origin.split()[-1]) for origin in train.dataset["origin"][:]]
    assert lines == sorted(lines)
    assert train.description.endswith("; 15 of 20 to train on")
    assert len(split_heldout(examples, 0.001, seed=0)[1].dataset) == 1


@pytest.mark.parametrize("held_out", [20, 0.99, 100])
def test_holding_out_everything_is_an_error(tmp_path: Path, held_out: float) -> None:
    examples = load_examples(jsonl(tmp_path / "a.jsonl", ALPACA))
    with pytest.raises(PacaError, match=r"[Hh]old"):
        split_heldout(examples, held_out, seed=0)


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"),
        ("questions_train.jsonl", "questions_training2.jsonl", "questions.eval.jsonl"),
    ],
)
def test_a_folder_with_files_of_splits_gives_one_of_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        jsonl(tmp_path / name, [{"text": f"{number}{row}"} for row in range(2)])
    assert load_examples(str(tmp_path)).dataset["text"] == ["00", "01", "10", "11"]
    examples = load_examples(str(tmp_path), split="test")
    assert examples.dataset["text"] == ["20", "21"]
    assert "of 1 of the folder's 3 files, by their names those of the split 'test'" in examples.description
    assert load_examples(str(tmp_path), split="evaluation").dataset["text"] == ["20", "21"]
    assert len(load_examples(str(tmp_path), split="all").dataset) == 6
    for unknown in ("validation", "train[:1]", "train+test"):
        with pytest.raises(
            PacaError, match=f"no files of a split {re.escape(repr(unknown))} by their names; it has te"
        ):
            load_examples(str(tmp_path), split=unknown)
    jsonl(tmp_path / "more.jsonl", [{"text": "30"}])
    assert len(load_examples(str(tmp_path)).dataset) == 4  # as datasets does


@pytest.mark.parametrize(
    "names", [("train_a.jsonl", "train_b.jsonl"), ("a.jsonl", "test.jsonl"), ("pretrain.jsonl", "test.jsonl")]
)
def test_a_folder_without_several_splits_is_read_whole(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        jsonl(tmp_path / name, [{"text": name}])
    assert load_examples(str(tmp_path), split="test").dataset["text"] == list(names)


def test_what_datasets_saved_in_a_folder_is_read(tmp_path: Path) -> None:
    one, splits = str(tmp_path / "one"), str(tmp_path / "splits")
    saved = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    saved.save_to_disk(one)
    assert load_examples(one, split="test").dataset["text"] == ["a", "b"]  # it has no splits, as a file has none
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(splits)
    assert load_examples(splits).dataset["text"] == ["a", "b"]
    assert load_examples(splits, split="test").dataset["text"] == ["b"]
    assert len(load_examples(splits, split="all").dataset) == 3
    with pytest.raises(PacaError, match="has no split 'validation'; it has train and test"):
        load_examples(splits, split="validation")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"broken")
    with pytest.raises(PacaError, match=r"saved in '.*one' can't be read: .*Save it again"):
        load_examples(one)


def test_notes_about_a_dataset_are_none_of_its_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    for name in ("dataset_info.json", "dataset_infos.json"):
        (tmp_path / name).write_text('{"description": "of these"}')
    examples = load_examples(str(tmp_path))
    assert examples.dataset["text"] == ["a"]
    assert "left out" not in examples.description


def test_a_folder_of_folders_names_those_that_hold_data(tmp_path: Path) -> None:
    for name in ("data", "more/a", "more/b", "more/c"):
        (tmp_path / name).mkdir(parents=True)
        jsonl(tmp_path / name / "train.jsonl", [{"text": "a"}])
    (tmp_path / "README.md").write_text("about it")
    with pytest.raises(PacaError, match=r"holds no data file .* There are some in \S*/data, .*/b and 1 more: give one"):
        load_examples(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PacaError, match=r"holds no data file \(.*gz\)\.$"):
        load_examples(str(tmp_path / "empty"))


def test_what_holds_no_data_is_told_what_it_is(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("Once upon a time.")
    with pytest.raises(
        PacaError, match=r"is of type '\.txt'\. .* Write its texts into a \.jsonl file, \{\"text\": \.\.\.\}"
    ):
        load_examples(str(text))
    for name, key in (("config.json", "model_type"), ("adapter_config.json", "peft_type")):
        folder = tmp_path / key
        folder.mkdir()
        (folder / name).write_text(json.dumps({key: "llama", "architectures": ["LlamaForCausalLM"]}, indent=2))
        with pytest.raises(PacaError, match=rf"holds an? (model|adapter) \({name}\), not data\. .* is model\.name"):
            load_examples(str(folder))
    data = tmp_path / "data"
    data.mkdir()
    jsonl(data / "train.jsonl", ALPACA[:1])
    assert len(load_examples(str(data)).dataset) == 1
