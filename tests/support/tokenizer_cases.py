"""Tokenizers whose ids transformers 4 has recorded: ``tests/data/tokenizer_cases.json``.

``python tests/support/tokenizer_cases.py PYTHON`` records them again, where PYTHON is the interpreter of an environment
with transformers 4.57, sentencepiece and protobuf; no part of the toolkit has a say in the ids.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
CASES = DATA / "tokenizer_cases.json"

RECORD = """
import json, sys, transformers
found = {}
texts = json.loads(sys.argv[1])
for directory in sys.argv[2:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    found[directory.rpartition("/")[2]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
print(json.dumps({"version": transformers.__version__, "ids": found}))
"""


def write_case(case: dict[str, Any], directory: Path) -> Path:
    """Write the files of a case: of its base, and its own, which replace or, as null, remove those."""
    directory.mkdir(parents=True, exist_ok=True)
    byte_level = case["base"] == "byte-level"
    for path in [DATA / "tokenizer.json"] if byte_level else (DATA / "sentencepiece").iterdir():
        shutil.copyfile(path, directory / path.name)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    if case.get("edit"):
        (directory / "tokenizer.json").write_text(json.dumps({**tokenizer, **case["edit"]}))
    config = {"model_type": "qwen2" if byte_level else "llama", "eos_token_id": 0 if byte_level else 2}
    for name, content in {"config.json": config, **case["files"]}.items():
        if content is None:
            (directory / name).unlink()
        elif name == "vocab.json":
            model = tokenizer["model"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            (directory / name).write_text(json.dumps(model["vocab"]))
            (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        else:
            (directory / name).write_text(json.dumps(content))
    return directory


def main(python: str) -> None:
    """Record the ids of every case."""
    recorded = json.loads(CASES.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as root:
        directories = [str(write_case(case, Path(root) / case["name"])) for case in recorded["cases"]]
        command = [python, "-c", RECORD, json.dumps(recorded["texts"]), *directories]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    recorded["transformers"] = found["version"]
    for case in recorded["cases"]:
        case["ids"] = found["ids"][case["name"]]
    cases = ",\n".join(json.dumps(case, ensure_ascii=False) for case in recorded.pop("cases"))
    head = json.dumps(recorded, ensure_ascii=False, indent=1)
    CASES.write_text(head.removesuffix("\n}") + ',\n "cases": [\n' + cases + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
