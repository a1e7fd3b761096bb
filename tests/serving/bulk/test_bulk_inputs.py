"""Fragments of inputs, whatever the inputs are: together they are the whole file, and each row comes once."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from gircse.runtime import TextFileError
from gircse.serving.bulk import inputs
from gircse.serving.bulk.inputs import inspect
from gircse.serving.bulk.job import Columns, IdType, Job, Recipe, VectorType
from gircse.serving.bulk.rows import Rejected, Rows, read_rows
from gircse.serving.bulk.storage import Place, find_inputs, locate

COLUMNS = Columns("text", "id")
RECIPE = Recipe("0" * 64, "fp32", "cpu", 5, "", VectorType.FLOAT32)
LINES = st.lists(
    st.one_of(
        st.text(max_size=9).map(lambda text: json.dumps({"id": len(text), "text": text}).encode()),
        st.text(max_size=9).map(lambda text: json.dumps({"id": 1, "text": text}, ensure_ascii=False).encode()),
        st.binary(max_size=9).map(lambda content: content.replace(b"\n", b"")),
        st.sampled_from([b"", b"  ", b"\r", b"{}", b'{"id": 1, "text": "x"}\r', b"[" * 3000]),
    ),
    max_size=40,
)


def read_fragments(path: Path, fragment_rows: int) -> list[Rows]:
    found = inspect(locate(str(path)), COLUMNS, fragment_rows, None)
    job = Job(COLUMNS, fragment_rows, RECIPE, IdType.INTEGER, {str(path): found})
    fragments = list(job.fragments(str(path)))
    assert sum(fragment.rows for fragment in fragments) == found.rows
    assert len({fragment.name for fragment in fragments}) == len(fragments)
    return [read_rows(fragment, COLUMNS, IdType.INTEGER) for fragment in fragments]


@given(lines=LINES, last_ends=st.booleans(), fragment_rows=st.integers(1, 9), block=st.integers(1, 50))
def test_fragments_of_lines_are_the_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], last_ends: bool, fragment_rows: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [b'{"id": 0, "text": "probe"}', *lines]
    path.write_bytes(b"\n".join(lines) + (b"\n" if last_ends else b""))
    if not last_ends and not lines[-1]:
        lines = lines[:-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "BLOCK_BYTES", block)
        found = read_fragments(path, fragment_rows)
    texts, rejected = {}, {}
    for rows in found:
        assert not (texts.keys() | rejected.keys()) & {*rows.numbers, *(row.row for row in rows.rejected)}
        texts |= dict(zip(rows.numbers, rows.texts, strict=True))
        rejected |= {row.row: row for row in rows.rejected}
    blank = {number for number, line in enumerate(lines) if not line.strip()}
    assert texts.keys() | rejected.keys() | blank == set(range(len(lines)))
    for number, text in texts.items():
        assert json.loads(lines[number])["text"] == text
    for row in rejected.values():
        assert isinstance(row, Rejected)
        assert row.reason


@given(groups=st.integers(1, 12), fragment_rows=st.integers(1, 9), rows=st.integers(0, 40))
def test_fragments_of_parquet_are_the_rows(
    tmp_path_factory: pytest.TempPathFactory, groups: int, fragment_rows: int, rows: int
) -> None:
    path = tmp_path_factory.mktemp("table") / "b.parquet"
    texts = [f"text {number}" for number in range(rows)]
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.string()), "id": pa.array(range(rows), pa.int32())}),
        path,
        row_group_size=groups,
    )
    found = read_fragments(path, fragment_rows)
    assert [text for part in found for text in part.texts] == texts
    assert [number for part in found for number in part.ids] == list(range(rows))


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    """One process may do several jobs, and keeps the last row group that it has read."""
    path = tmp_path / "b.parquet"
    for text in ("one", "two"):
        pq.write_table(pa.table({"text": [text], "id": [1]}), path)
        assert [part.texts for part in read_fragments(path, 4)] == [[text]]


def test_globs_and_directories(tmp_path: Path) -> None:
    for name in ("a.jsonl", "x/b.parquet", "x/y/c.jsonl.gz", "x/_hidden/d.jsonl", "x/.e.jsonl", "x/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def names(*patterns: str) -> list[str]:
        found = find_inputs([pattern.replace("T", str(tmp_path)) for pattern in patterns])
        return [place.name.removeprefix(f"{tmp_path}/").removeprefix(f"file://{tmp_path}/") for place in found]

    assert names("T") == ["a.jsonl", "x/b.parquet", "x/y/c.jsonl.gz"]
    assert names("T/x", "T/a.jsonl", "T/*.jsonl") == ["a.jsonl", "x/b.parquet", "x/y/c.jsonl.gz"]
    assert names("T/*/*.parquet") == ["x/b.parquet"]
    assert names("T/**/*.gz") == ["x/y/c.jsonl.gz"]
    assert names("file://T/x/**/*.gz") == ["x/y/c.jsonl.gz"]
    assert names("T/[a].jsonl") == ["a.jsonl"]
    with pytest.raises(TextFileError, match=r"notes\.txt cannot be read; a name ends in"):
        names("T/x/*")
    with pytest.raises(TextFileError, match="matches no file"):
        names("T/x/*.jsonl.zst")
    (tmp_path / "a[1].jsonl").touch()
    assert names("T/a[1].jsonl") == ["a[1].jsonl"]


def test_a_store_gets_files_whole(tmp_path: Path) -> None:
    store = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    place = Place("store://out", store, "out") / "a.parquet"
    (tmp_path / "out").mkdir()
    place.write(b"one")
    place.write(b"two")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"a.parquet": b"two"}

    class Broken:
        def open_output_stream(self, path: str) -> Any:
            return store.open_output_stream(path)

        def move(self, source: str, target: str) -> None:
            raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        Place("store://out", Broken(), "out/a.parquet").write(b"three")
    assert (tmp_path / "out/a.parquet").read_bytes() == b"two"
