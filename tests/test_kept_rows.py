"""Rows in files are the rows that memory would hold, through every change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune import rowfiles
from keeptune.buffer import Buffer, Policy
from keeptune.method import State
from keeptune.rowstore import Rows
from pencil import examples, stored

settings.register_profile("keeptune", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("keeptune")

BLOCK = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.kept.BLOCK", BLOCK)
    monkeypatch.setattr("keeptune.buffer.BLOCK", 3)


def numbered(first: int, count: int, *, kind: str = "answers") -> Dataset:
    """Rows of unlike lengths that say which they are."""
    if kind == "classes":
        return examples(*[(n, n % 3) for n in range(first, first + count)])
    ids = [[n] * (1 + n % 5) for n in range(first, first + count)]
    shift = 0 if kind == "answers" else 1
    labels = [[-100 if i % 2 else n + shift for i, n in enumerate(row)] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def outputs(first: int) -> Any:
    def extras(rows: Any) -> Any:
        return {"top": [np.full(((first + row) % 3, 2), first + row, np.float16) for row in rows]}

    return extras


def contents(buffer: Buffer, like: Dataset) -> tuple[Any, ...]:
    every = list(range(len(buffer)))
    if not every:
        return ()
    rows = buffer.rows(every, like)[:]
    assert [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)] == (
        [{k: np.asarray(v).tolist() for k, v in row.items()} for row in buffer.examples(every)]
    )
    extras = {name: values.tolist() for name, values in buffer.extras(every).items()}
    return rows, extras, buffer.counts(), buffer.tokens(every)


changes = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 14)),
        st.tuples(st.just("delete"), st.integers(0, 5)),
        st.tuples(st.just("reload"), st.just(0)),
    ),
    min_size=1,
    max_size=7,
)


@given(
    changes,
    st.sampled_from(get_args(Policy)[:3]),
    st.one_of(st.none(), st.integers(1, 20)),
    st.sampled_from(["answers", "tokens", "classes"]),
    st.booleans(),
)
@settings(max_examples=25)
def test_files_hold_what_memory_would(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, int]],
    policy: Policy,
    size: int | None,
    kind: str,
    besides: bool,
) -> None:
    root = tmp_path_factory.mktemp("kept")
    folder = root / "files"
    there, here = Buffer(size, policy), Buffer(size, policy)
    seen = 0
    like = numbered(0, 1, kind=kind)
    for step, (change, count) in enumerate(changes):
        if change == "add":
            for buffer, place in ((there, folder), (here, None)):
                buffer.add(
                    numbered(seen, count, kind=kind),
                    f"t{step % 2}",
                    np.random.default_rng(step),
                    extras=outputs(seen) if besides else None,
                    folder=place,
                )
            seen += count
        elif change == "delete":
            count = min(count, len(here))
            gone = np.random.default_rng(step).choice(len(here), count, replace=False)
            there.delete(gone, folder)
            here.delete(gone)
            assert all(len(rowfiles.read(f)) for f in there.state().files.values())
        else:
            saved = kept_apart(there.state(), root / f"state-{step}")
            there = Buffer(size, policy)
            there.restore(saved, folder)
        assert contents(there, like) == contents(here, like)
        draws = [b.draw(3, np.random.default_rng(step), weights={"t0": 2}) for b in (there, here)]
        assert draws[0] == draws[1]
        files = there.state().files
        assert all(file.parent == folder for file in files.values())
        in_files = sum(len(rowfiles.read(file)) for file in files.values())
        assert in_files < 2 * len(there) + BLOCK, "less than half and one block is dead"


def kept_apart(state: State, folder: Path) -> State:
    """A state as it is saved: with files of its own."""
    folder.mkdir()
    files = {name: Path(shutil.copy(file, folder / name)) for name, file in state.files.items()}
    return State({n: t.clone() for n, t in state.tensors.items()}, state.values, files)


def test_a_few_rows_are_in_memory_and_full_blocks_in_files(tmp_path: Path) -> None:
    buffer = Buffer(None)
    buffer.add(numbered(0, 3), "a", np.random.default_rng(0), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert buffer.on_disk() == 0
    buffer.add(numbered(3, 6), "a", np.random.default_rng(0), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert buffer.on_disk() == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert len(buffer._rows._loose) == 1


def test_a_file_is_plain_arrow(tmp_path: Path) -> None:
    buffer = Buffer(None)
    buffer.add(
        numbered(0, BLOCK), "a", np.random.default_rng(0), extras=outputs(0), folder=tmp_path
    )
    (file,) = tmp_path.iterdir()
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table["input_ids"].to_pylist() == numbered(0, BLOCK)["input_ids"][:]
    assert table["labels"].to_pylist()[2] == [True, False, True]
    assert table["extras/top"].to_pylist()[2] == [[2, 2], [2, 2]]


def test_nothing_is_copied_when_a_file_is_read(tmp_path: Path) -> None:
    rows = stored(numbered(0, 50))
    rowfiles.write(tmp_path / "rows.arrow", rows)
    found = rowfiles.read(tmp_path / "rows.arrow")
    for array in found.arrays().values():
        assert not array.flags.owndata
        assert not array.flags.writeable


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    write = rowfiles.write

    def counted(path: Path, rows: Rows) -> None:
        sizes.append(len(rows))
        write(path, rows)

    monkeypatch.setattr(rowfiles, "write", counted)
    return sizes


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_row_that_is_added_is_written_at_most_twice(
    batch: int, tmp_path: Path, written: list[int]
) -> None:
    buffer, added = Buffer(30), 0
    for step in range(120 // batch):
        buffer.add(numbered(step * batch, batch), "a", np.random.default_rng(step), folder=tmp_path)
        added += batch
    assert sum(written) <= 2 * added


def test_what_did_not_change_is_linked_and_not_written_again(
    tmp_path: Path, written: list[int]
) -> None:
    from keeptune import state
    from keeptune.chain import Chain
    from keeptune.methods.replay import Replay
    from pencil import Softmax, context

    method = Replay(size=100)
    ctx = context(Softmax([[0.0]]), numbered(0, 10), folder=tmp_path / "files")
    method.end_task(ctx)
    (tmp_path / "state").mkdir()
    before = sum(written)
    sizes = state.write_methods(tmp_path / "state", Chain([method]))
    files = sorted((tmp_path / "state").glob("*.arrow"))
    assert [f.stat().st_nlink for f in files] == [2, 2]
    assert sizes["replay"] >= sum(f.stat().st_size for f in files)
    assert sum(written) == before == 8
    again = Replay(size=100)
    state.read_methods(tmp_path / "state", Chain([again]), ctx)
    like = numbered(0, 1)
    assert contents(again._buffer, like) == contents(method._buffer, like)
    shutil.rmtree(tmp_path / "state")
    assert contents(again._buffer, like) == contents(method._buffer, like)
