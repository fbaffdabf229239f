"""What a user sees when reading data: the right shape, or one sentence that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keeptune.errors import DataError
from keeptune.rows import Shape, answer, answered, leaked, options, question, read_rows

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
PAIR = {"prompt": "2+2=", "completion": "4"}


def file(tmp_path: Path, name: str, *lines: str) -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "shape", "asked", "expected"),
    [
        ({"messages": [USER, BOT]}, Shape.MESSAGES, [USER], "Hello"),
        ({"messages": [USER, BOT], "text": "x"}, Shape.MESSAGES, [USER], "Hello"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": 1}, Shape.CHOICE, "q", "b"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": "a"}, Shape.CHOICE, "q", "a"),
        ({"prompt": "q", "choices": ["1", "0"], "answer": "1"}, Shape.CHOICE, "q", "1"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": "1"}, Shape.CHOICE, "q", "b"),
        (PAIR | {"label": 1, "text": "x"}, Shape.COMPLETION, "2+2=", "4"),
        ({"prompt": [USER], "completion": [BOT]}, Shape.COMPLETION, [USER], "Hello"),
        (PAIR | {"choices": None, "answer": 0}, Shape.COMPLETION, "2+2=", "4"),
        ({"text": "t", "label": "spam"}, Shape.LABEL, "t", "spam"),
        ({"text": "t", "id": 3}, Shape.TEXT, "t", ""),
    ],
)
def test_shape_question_and_answer(row, shape, asked, expected):
    rows = read_rows([row])
    assert rows.shape is shape
    assert question(rows.rows[0], shape) == asked
    assert answer(rows.rows[0], shape) == expected


def test_the_last_assistant_turn_is_the_answer():
    talk = [USER, BOT, USER, {"role": "assistant", "content": "Bye"}, USER]
    row = read_rows([{"messages": talk}]).rows[0]
    assert question(row, Shape.MESSAGES) == talk[:3]
    assert answer(row, Shape.MESSAGES) == "Bye"


def test_every_source_gives_the_same_rows_and_hash(tmp_path):
    data = [{"prompt": "a\u2028b", "completion": 'é,\n"x"'}, {"prompt": "c", "completion": "d"}]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "d.parquet")
    datasets.Dataset.from_list(data).to_csv(tmp_path / "d.csv", index=False)
    sources = [
        data,
        datasets.Dataset.from_list(data),
        file(tmp_path, "d.jsonl", *[json.dumps(r, ensure_ascii=False) for r in data], "", ""),
        file(tmp_path, "e.json", json.dumps(data, indent=1)),
        file(tmp_path, "f.json", *[json.dumps(r) for r in data]),
        tmp_path / "d.parquet",
        str(tmp_path / "d.csv"),
    ]
    read = [read_rows(source) for source in sources]
    assert [r.rows for r in read] == [data] * len(sources)
    assert len({r.sha256 for r in read}) == 1
    assert read_rows(data[::-1]).sha256 != read[0].sha256
    assert len(read[0]) == 2


def test_reading_leaves_the_users_rows_alone():
    row = {"prompt": "q", "choices": ["a", "b"], "answer": "b"}
    assert read_rows([row]).rows[0]["answer"] == 1
    assert row["answer"] == "b"


def test_csv_may_hold_lists_as_json(tmp_path):
    path = file(tmp_path, "d.csv", "prompt,choices,answer", 'q,"[""a"", ""b""]",b')
    assert read_rows(path).rows == [{"prompt": "q", "choices": ["a", "b"], "answer": 1}]


def test_a_text_file_becomes_blocks_of_whole_lines(tmp_path):
    text = "".join(f"This is line number {i}.\n" for i in range(200))
    rows = read_rows(file(tmp_path, "d.txt", text))
    blocks = [row["text"] for row in rows.rows]
    assert rows.shape is Shape.TEXT
    assert "".join(blocks) == text
    assert all(1000 <= len(b) < 1050 and b.endswith("\n") for b in blocks[:-1])


def test_options_of_a_completion_row_need_the_completion_among_them():
    assert options(PAIR | {"choices": [" 4", "5"]}, Shape.COMPLETION) == ([" 4", "5"], 0)
    assert options(PAIR | {"choices": ["3", "5"]}, Shape.COMPLETION) is None
    assert options(PAIR | {"choices": "4"}, Shape.COMPLETION) is None
    assert options(PAIR, Shape.COMPLETION) is None


def test_leaks_are_counted_across_shapes_and_white_space():
    train = read_rows([PAIR, {"prompt": "3+3=", "completion": "6"}])
    evaluation = read_rows(
        [{"prompt": "2+2= ", "completion": " 4\n"}, PAIR, PAIR | {"prompt": "x"}]
    )
    assert leaked(train, evaluation) == 2
    asked = read_rows([{"prompt": "3+3=", "choices": ["5", "6"], "answer": 1}])
    assert leaked(train, asked) == 1
    assert leaked(read_rows([{"text": "a"}]), train) == 0


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "d.jsonl",
            ['{"text": "a"}'] * 16 + ['{"text": "b"'],
            "broken JSON at line 17 of .*d.jsonl",
        ),
        ("d.json", ["[", '{"text": 1},', "]"], "broken JSON at line 3 of"),
        ("d.json", ["{", '"data": [{"text": "a"}]', "}"], "one object over several lines"),
        ("d.jsonl", ["[" * 20_000], "JSON at line 1 of .* is too much"),
        ("d.json", ["[" + "1" * 5_000 + "]"], "JSON in .* is too much"),
        ("d.jsonl", [], "d.jsonl is empty: it needs at least one row"),
        ("d.txt", ["", " "], "is empty"),
        ("d.csv", ["prompt,completion"], "is empty"),
        ("d.jsonl", ["", "[1]"], "line 2 of .*d.jsonl is a list; a row needs the columns messages"),
        (
            "d.jsonl",
            ['{"prompt": "a", "answer": 1}'],
            "line 1 of .* has the columns prompt, answer",
        ),
        ("d.jsonl", ["{}"], "has the columns none"),
        (
            "d.jsonl",
            ['{"text": "a"}', '{"text": "a", "label": 1}'],
            "line 2 of .* has the shape label, but line 1 of .* has text",
        ),
        ("d.jsonl", ['{"text": 7}'], r"`text` in line 1 of .* is 7 \(int\); it must be text"),
        ("d.jsonl", [r'{"text": "\ud800"}'], "half of a surrogate pair"),
        ("d.jsonl", ['{"text": "a", "label": 0.5}'], r"`label` in .* is 0.5 \(float\)"),
        ("d.csv", ["prompt,completion", "a,b", "c"], "line 3 of .* another number of cells"),
        ("d.csv", ["prompt,completion", "a,b,c"], "line 2 of .* another number of cells"),
        ("d.csv", ["text", '"a'], "broken CSV at line 2"),
        ("d.csv", ["prompt,choices,answer", "a,b|c,b"], "`choices` in line 2 of .* list in JSON"),
        ("d.parquet", ["PAR"], "d.parquet is not a readable Parquet file"),
        (
            "d.xlsx",
            ["x"],
            "d.xlsx is not a data file; .* ends in .jsonl, .json, .csv, .parquet, .txt",
        ),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, lines, message):
    with pytest.raises(DataError, match=message) as caught:
        read_rows(file(tmp_path, name, *lines))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"`messages` in row 1 of a list of 1 rows is \[\]"),
        ({"messages": [{"role": "user"}]}, "a message needs `role` and `content`"),
        ({"messages": [USER | {"content": None}]}, "a content of `messages` .* is None"),
        ({"messages": [USER]}, "has no assistant turn"),
        ({"messages": [BOT, USER]}, "begins with the assistant"),
        ({"prompt": [USER], "completion": "x"}, "`completion` in row 1 .* must be a list of mess"),
        ({"prompt": "x", "completion": [BOT]}, "`completion` in row 1 .* must be text"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "must be a list of 2 or more"),
        ({"prompt": "x", "choices": ["a", 1], "answer": 0}, "one of `choices` .* must be text"),
        ({"prompt": "x", "choices": ["a", "a"], "answer": 0}, "must be different from each other"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "index from 0 to 1"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "is True; it must be one of"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "c"}, "is 'c'; it must be one of"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(DataError, match=message):
        read_rows([row])


def test_other_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"^tasks\[0\]\.train: there is no file nowhere\.jsonl"):
        read_rows("nowhere.jsonl", field="tasks[0].train")
    with pytest.raises(DataError, match="is not a data file"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="not int"):
        read_rows(7)
    with pytest.raises(DataError, match="it is not the id of a hub data set"):
        read_rows("no such file at all")
    latin = tmp_path / "d.txt"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 3\)"):
        read_rows(latin)

    def offline(name, split):
        raise ConnectionError(f"Couldn't reach {name}.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"split 'train' cannot be loaded: Couldn't reach a/b\.$"):
        read_rows("a/b")


def test_a_hub_data_set_may_name_its_split(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("openai/gsm8k:test[:5]", split="train").rows == [PAIR]
    assert read_rows("squad", split="validation").source == "squad:validation"
    assert asked == [("openai/gsm8k", "test[:5]"), ("squad", "validation")]


def test_a_row_is_answered_with_each_of_its_choices() -> None:
    choice = {"prompt": "Q", "choices": ["no", "yes"], "answer": 1}
    assert [r["answer"] for r in answered(choice, Shape.CHOICE)] == [0, 1]
    # The right one stays as it is written.
    text = {"prompt": "Q", "completion": " yes", "choices": ["no", "yes"]}
    assert [r["completion"] for r in answered(text, Shape.COMPLETION)] == ["no", " yes"]
    talk = {"prompt": [USER], "completion": [BOT], "choices": ["Hello", "Bye"]}
    hello, bye = (r["completion"] for r in answered(talk, Shape.COMPLETION))
    assert (hello, bye) == ([BOT], [BOT | {"content": "Bye"}])
    assert answered(PAIR, Shape.COMPLETION) == []


def test_a_cell_may_be_long_and_a_path_may_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.csv").write_text("text\n" + "x" * 200_000 + "\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_rows("~/d.csv").rows[0]["text"]) == 200_000


def test_a_name_that_no_file_can_have_is_a_sentence() -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_rows("x" * 300 + ".jsonl")
