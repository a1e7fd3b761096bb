"""Small files of tasks."""

import gzip
import json
from pathlib import Path

STS = "sentence1\tscore\tsentence2\n" + "".join(f"left {i}\t{i % 6}\tright {i}\n" for i in range(12))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def beir(directory: Path, *, qrels: str = "qrels/test.tsv") -> Path:
    documents = [{"_id": f"d{i}", "title": f"T{i}" if i % 2 else "", "text": f"document {i}"} for i in range(15)]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(5)]
    write(directory / "corpus.jsonl", "".join(json.dumps(row) + "\n" for row in documents))
    write(directory / "queries.jsonl.gz", "".join(json.dumps(row) + "\n" for row in queries))
    judgments = [(f"q{i}", f"d{j}", 1 + (i + j) % 2) for i in range(4) for j in (i, i + 5, i + 9)]
    write(directory / qrels, "query-id\tcorpus-id\tscore\n" + "".join("\t".join(map(str, j)) + "\n" for j in judgments))
    return directory
