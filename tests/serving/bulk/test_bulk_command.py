"""``gircse-bulk`` in one process: what it writes, what it goes on with, and what it refuses."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.bulk_job import rejected_of, text_of, vectors_of, write_lines, write_parquet
from support.small_models import SmallModels

from gircse.runtime import Embedder
from gircse.serving.bulk import bulk_command, worker


@pytest.fixture(scope="module")
def bundle(small_models: SmallModels) -> Path:
    return small_models.bundle("qwen2")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert bulk_command.main([*map(str, arguments), "--provider", "cpu"]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert bulk_command.main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def expected(bundle: Path, texts: list[str], **options: object) -> np.ndarray:
    with Embedder(bundle, provider="cpu") as embedder:
        return embedder.encode(texts, **options)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_vectors_are_those_of_the_embedder(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(50))
    numbers = list(range(50, 90))
    table = write_parquet(tmp_path / "b.parquet", {"id": numbers, "text": list(map(text_of, numbers))}, group=17)
    flags = ["--fragment-rows", 16, "--streams", 2]
    said = run(capsys, bundle, lines, table, "--output", tmp_path / "out", *flags)
    assert "90 vectors of 90 rows" in said
    found = vectors_of(tmp_path / "out")
    assert sorted(found) == list(range(90))
    wanted = expected(bundle, [text_of(number) for number in range(90)])
    np.testing.assert_allclose([found[number] for number in range(90)], wanted, atol=1e-5)
    fragment = pq.read_table(next((tmp_path / "out/vectors").glob("a-*-0000000016-0000000032.parquet")))
    assert fragment.schema.field("vector").type == pa.list_(pa.float32(), wanted.shape[1])
    assert fragment.num_rows == 16
    recipe = json.loads(fragment.schema.metadata[b"gircse"])
    assert (recipe["precision"], recipe["provider"], recipe["steps"]) == ("fp32", "cpu", 5)


def test_instruction_and_steps_reach_the_model(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(6))
    run(capsys, bundle, lines, "--output", tmp_path / "out", "--instruction", "Find the bird", "--steps", 2)
    wanted = expected(bundle, list(map(text_of, range(6))), instruction="Find the bird", steps=2)
    found = vectors_of(tmp_path / "out")
    np.testing.assert_allclose([found[number] for number in range(6)], wanted, atol=1e-5)


@pytest.mark.parametrize(("kind", "error"), [("float16", 2**-11), ("int8", 1 / 254)])
def test_smaller_numbers_stay_near(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, error: float
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(9))
    run(capsys, bundle, lines, "--output", tmp_path / "out", "--vector-type", kind)
    wanted = expected(bundle, list(map(text_of, range(9))))
    found = vectors_of(tmp_path / "out")
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs([found[number] for number in range(9)] - wanted) <= largest * error + 1e-6).all()
    column = pq.read_table(tmp_path / "out/vectors").schema.field("vector").type
    assert str(column.value_type) == {"float16": "halffloat", "int8": "int8"}[kind]


def test_malformed_rows_are_rejected_and_the_others_embedded(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        b'{"id": 1, "text"': "is no JSON",
        b"[1]": "is no JSON object",
        b'{"id": 2}': "text is missing",
        b'{"id": 3, "text": null}': "text is null",
        b'{"id": 4, "text": 7}': "text is no string",
        b'{"text": "no id"}': "id is missing",
        b'{"id": "five", "text": "x"}': "id is not a 64-bit integer, as the ids of this job are",
        b'{"id": true, "text": "x"}': "id is not a 64-bit integer",
        b'{"id": 99999999999999999999, "text": "x"}': "id is not a 64-bit integer",
        b'{"id": 6, "text": "\\ud800"}': "is no JSON",
        b'{"id": 7, "text": "\xff"}': "is no JSON",
    }
    lines = write_lines(tmp_path / "a.jsonl", range(100, 103), bad=[*bad, b"", b"  "])
    lines.write_bytes(b'\xef\xbb\xbf{"id": 99, "text": "after a byte order mark"}\n' + lines.read_bytes())
    said = run(capsys, bundle, lines, "--output", tmp_path / "out")
    assert f"4 vectors of 17 rows in 0 s; {len(bad)} of the rows were rejected" in said
    assert sorted(vectors_of(tmp_path / "out")) == [99, 100, 101, 102]
    rejected = rejected_of(tmp_path / "out")
    assert [row["row"] for row in rejected] == list(range(1, len(bad) + 1))
    for row, (content, reason) in zip(rejected, bad.items(), strict=True):
        assert row["reason"].startswith(reason)
        assert row["input"] == str(lines)
        assert row["content"] == content.decode("utf-8", "backslashreplace")


def test_parquet_rows_are_rejected_too(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff\xfe"]).buffers()[1:]])
    text = pa.concat_arrays([pa.array(["good", None]), bad, pa.array(["good too"])])
    table = write_parquet(tmp_path / "b.parquet", {"id": pa.array(["a", "b", "c", None]), "text": text})
    run(capsys, bundle, table, "--output", tmp_path / "out")
    assert list(vectors_of(tmp_path / "out")) == ["a"]
    assert [(row["row"], row["reason"]) for row in rejected_of(tmp_path / "out")] == [
        (1, "text is null"),
        (2, "text is not UTF-8: invalid start byte at byte 0"),
        (3, "id is null"),
    ]


def test_a_vector_that_is_not_finite_is_rejected(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = worker.Worker._embed

    def overflowing(self: worker.Worker, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        vectors, truncated = embed(self, texts)
        vectors[1, 3] = np.inf
        return vectors, truncated

    monkeypatch.setattr(worker.Worker, "_embed", overflowing)
    lines = write_lines(tmp_path / "a.jsonl", range(3))
    run(capsys, bundle, lines, "--output", tmp_path / "out")
    assert sorted(vectors_of(tmp_path / "out")) == [0, 2]
    (row,) = rejected_of(tmp_path / "out")
    assert (row["row"], row["content"]) == (1, text_of(1))
    assert "is not finite" in row["reason"]


def test_texts_that_are_too_long_are_marked(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"id": [1, 2, 3], "text": ["short", "long " * 500, "short too"]}
    said = run(capsys, bundle, write_parquet(tmp_path / "b.parquet", rows), "--output", tmp_path / "out")
    assert "1 of the texts were too long and were cut" in said
    table = pq.read_table(tmp_path / "out/vectors")
    assert table["truncated"].to_pylist() == [False, True, False]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_column(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: pa.DataType
) -> None:
    texts = pa.array(["a bird", "a ship", "a bird"], pa.string()).cast(kind)
    table = write_parquet(tmp_path / "b.parquet", {"id": pa.array([1, 2, 3], pa.uint16()), "text": texts})
    run(capsys, bundle, table, "--output", tmp_path / "out")
    found = vectors_of(tmp_path / "out")
    np.testing.assert_allclose([found[1], found[2]], expected(bundle, ["a bird", "a ship"]), atol=1e-6)


def test_rows_get_ids_of_their_own(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "b.parquet", {"text": [folder, "same"]})
    run(capsys, bundle, tmp_path / "x", tmp_path / "y", "--output", tmp_path / "out", "--row-ids")
    found = vectors_of(tmp_path / "out")
    assert len(found) == 4
    assert all(key.startswith("b-") and key[-11:] in ("-0000000000", "-0000000001") for key in found)
    names = {path.stem.rsplit("-", 2)[0] for path in (tmp_path / "out/vectors").iterdir()}
    assert {key.rsplit("-", 1)[0] for key in found} == names


def test_packed_lines_are_read(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(30))
    run(capsys, bundle, lines, "--output", tmp_path / "plain", "--fragment-rows", 7)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()[:400]) + gzip.compress(lines.read_bytes()[400:]))
    run(capsys, bundle, packed, "--output", tmp_path / "packed", "--fragment-rows", 7)
    plain = vectors_of(tmp_path / "plain")
    for number, vector in vectors_of(tmp_path / "packed").items():
        np.testing.assert_array_equal(vector, plain.pop(number))
    assert not plain


def test_a_run_does_only_what_is_missing(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = [bundle, write_lines(tmp_path / "a.jsonl", range(40)), "--output", output, "--fragment-rows", 8]
    run(capsys, *command)
    complete = snapshot(output)
    assert "0 vectors of 0 rows in 0 s; 40 rows were done before" in run(capsys, *command)
    lost = sorted((output / "vectors").iterdir())[2]
    lost.unlink()
    scratch = lost.with_name(f".{lost.name}.0123456789abcdef")
    scratch.write_bytes(b"of a run that was killed")
    kept = {path: path.stat().st_mtime_ns for path in (output / "vectors").glob("a-*")}
    assert "8 vectors of 8 rows" in run(capsys, *command)
    assert snapshot(output) == complete
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_other_inputs_join_a_job(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A glob that matches more files than yesterday embeds those; so does a call with the new file alone."""
    write_lines(tmp_path / "day-1.jsonl", range(5))
    command = [bundle, tmp_path / "day-*.jsonl", "--output", tmp_path / "out"]
    run(capsys, *command)
    write_lines(tmp_path / "day-2.jsonl", range(5, 9))
    assert "4 vectors of 4 rows in 0 s; 5 rows were done before" in run(capsys, *command)
    write_lines(tmp_path / "day-3.jsonl", range(9, 10))
    run(capsys, bundle, tmp_path / "day-3.jsonl", "--output", tmp_path / "out")
    assert sorted(vectors_of(tmp_path / "out")) == list(range(10))


def test_the_output_is_no_input(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", range(3), bad=[b"bad"])
    command = [bundle, tmp_path, "--output", tmp_path / "out"]
    run(capsys, *command)
    assert "4 rows were done before" in run(capsys, *command)


def test_changed_settings_are_refused(
    bundle: Path, small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    lines = write_lines(tmp_path / "a.jsonl", range(3))
    run(capsys, bundle, lines, "--output", output)
    (next((output / "vectors").iterdir())).unlink()
    before = snapshot(output)
    for flags, said in {
        ("--steps", "2"): "steps was 5 and is 2",
        ("--instruction", "Find it", "--steps", "1"): "steps was 5 and is 1; instruction was '' and is 'Find it'",
        ("--vector-type", "int8"): "vector type was 'float32' and is 'int8'",
        ("--fragment-rows", "2"): "--fragment-rows was 1024 and is 2",
        ("--row-ids",): "--id-column was 'id' and is '(made of row numbers)'.",
        ("--precision", "int8"): "precision was 'fp32' and is 'int8'",
        ("--provider", "cuda"): "provider was 'cpu' and is 'cuda'",
    }.items():
        message = refusal(capsys, bundle, lines, "--output", output, *flags)
        assert f"--output {output} holds vectors of another job: {said}" in message
    other = small_models.bundle("qwen2", steps=1)
    assert "the bundle was '" in refusal(capsys, other, lines, "--output", output)
    assert snapshot(output) == before


def test_a_changed_input_is_refused_and_one_that_was_copied_is_not(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(3))
    command = [bundle, lines, "--output", tmp_path / "out"]
    run(capsys, *command)
    os.utime(lines, (1, 1))
    assert "3 rows were done before" in run(capsys, *command)
    write_lines(lines, range(1, 4))
    os.utime(lines, (1, 1))  # the same size, and another content
    with lines.open("ab") as file:
        file.write(b'{"id": 9, "text": "more"}\n')
    assert f"{lines} has changed since {tmp_path / 'out'} was begun: 3 rows then, 4 now" in refusal(capsys, *command)


def test_an_input_that_changes_while_it_is_read_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(8))
    opening = worker.Worker.open

    def slow(self: worker.Worker) -> object:
        write_lines(lines, range(4))
        return opening(self)

    monkeypatch.setattr(worker.Worker, "open", slow)
    assert "has changed while it was read" in refusal(capsys, bundle, lines, "--output", tmp_path / "out")
    assert not list((tmp_path / "out/vectors").iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["{lines}", "--text-column", "txt"],
            "{lines} has no column txt; it has id, text. Name it with --text-column.",
        ),
        (["{lines}", "--id-column", "nr"], "has no column nr; it has id, text. Name it with --id-column, or give"),
        (["{table}", "--text-column", "id"], "{table}, column id, has type int64; string is expected"),
        (["{table}", "--id-column", "f"], "column f, has type double; int64 or string is expected"),
        (["{lines}", "{named}"], "{lines} has ids of type int64, and {named} of type string"),
        (["{lines}", "--row-ids", "--id-column", "id"], "--row-ids is given with --id-column"),
        (["{lines}", "--fragment-rows", "0"], "--fragment-rows is 0; it has to be at least 1"),
        (["{lines}", "--streams", "0"], "--streams is 0; it has to be at least 1"),
        (["{lines}", "--threads", "0"], "--threads is 0; it has to be at least 1"),
        (["{lines}", "--batch-size", "0"], "batch_size is 0; it has to be at least 1"),
        (["{lines}", "--steps", "6"], "steps is 6; this bundle has 0 to 5"),
        (["{lines}", "--workers", "none"], "--workers is none; a number from 1 on, or auto"),
        (["{lines}", "--precision", "int8"], "has no precision 'int8'"),
        (["{broken}"], "{broken} cannot be read: "),
        (["{missing}"], "{missing} does not exist"),
        (["{folder}/*.csv"], "{folder}/*.csv matches no file"),
        (["{csv}"], "{csv} cannot be read; a name ends in .parquet, .jsonl or .jsonl.gz"),
        (["{empty}"], "{empty} holds no texts"),
        (["foo://x"], "foo://x cannot be used: "),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    places = {name: tmp_path / f"{name}.jsonl" for name in ("lines", "named", "missing")}
    places |= {"folder": tmp_path, "empty": tmp_path / "empty", "csv": tmp_path / "t.csv"}
    places |= {"table": tmp_path / "table.parquet", "broken": tmp_path / "broken.parquet"}
    write_lines(places["lines"], range(3))
    places["named"].write_text('{"id": "one", "text": "x"}\n', encoding="utf-8")
    write_parquet(places["table"], {"id": [1], "text": ["x"], "f": [0.5]})
    places["broken"].write_bytes(places["table"].read_bytes()[:-9])
    places["empty"].mkdir()
    places["csv"].touch()
    if "{csv}" not in flags[0]:
        places["csv"].unlink()
    message = refusal(capsys, bundle, *(flag.format(**places) for flag in flags), "--output", tmp_path / "out")
    assert said.format(**places) in message
    assert not (tmp_path / "out").exists()


def test_an_output_of_something_else_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "a.jsonl", range(3))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert f"--output {other} is not empty and has no job.json" in refusal(capsys, bundle, lines, "--output", other)
    assert f"--output {lines} is a file" in refusal(capsys, bundle, lines, "--output", lines)
    (other / "job.json").write_text("{}", encoding="utf-8")
    assert "job.json cannot be read" in refusal(capsys, bundle, lines, "--output", other)
    assert (other / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_a_bundle_that_fails_its_self_test_embeds_nothing(
    small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[: len(weights) // 2] *= 1.05
    weights.tofile(path)
    command = [small_bundle, write_lines(tmp_path / "a.jsonl", range(3)), "--output", tmp_path / "out", "--no-verify"]
    assert "failed its self-test: smallest cosine" in refusal(capsys, *command, "--provider", "cpu")
    assert not (tmp_path / "out").exists()


def test_workers_need_ray(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gircse.serving.bulk.ray_pool", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    command = [bundle, write_lines(tmp_path / "a.jsonl", range(3)), "--output", tmp_path / "out"]
    assert "pip install 'gircse-deploy[bulk,cpu,ray]'" in refusal(capsys, *command, "--workers", "2")
    assert not (tmp_path / "out").exists()
    run(capsys, *command)


def test_the_examples_of_the_documentation_run(bundle: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "bulk.md").read_text(encoding="utf-8")
    shell = re.search(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    python = re.search(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shell is not None
    assert python is not None
    (tmp_path / "gircse-demo-8").symlink_to(bundle)
    (tmp_path / "corpus").mkdir()
    write_lines(tmp_path / "texts.jsonl", range(3))
    write_parquet(tmp_path / "corpus" / "b.parquet", {"id": [3, 4], "text": ["a ship", "a bird"]})
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = f"{shell[1]}\npython - <<'END'\n{python[1]}\nprint(vectors.shape)\nEND\n"
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 vectors of 5 rows" in done.stdout
    assert done.stdout.endswith("(5, 48)\n")
