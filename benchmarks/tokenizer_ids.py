"""Compare the tokenizer that a bundle gets with transformers, on 2,000 awkward strings of each checkpoint.

python benchmarks/tokenizer_ids.py --transformers4 ENVIRONMENT/bin/python FOLDER...

Each folder holds the tokenizer files and the config.json of a checkpoint. ``json`` has to give the ids of AutoTokenizer
in transformers 4, which runs in an environment of its own (``pip install "transformers==4.57.*" sentencepiece tiktoken
protobuf``), and ``auto`` those of AutoTokenizer here. Prints a table in Markdown; exits with 1 if an id differs.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gircse.checkpoint.awkward_texts import awkward_texts
from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.tokenizer import CheckpointTokenizer, open_checkpoint_tokenizer
from gircse.runtime.manifest import TokenizerKind

EVERY_TOKEN = 1 << 30
"""A vocabulary size that leaves no token out."""

TRANSFORMERS_4 = """
import json, sys, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(json.load(sys.stdin), add_special_tokens=False)["input_ids"]
print(json.dumps([transformers.__version__, type(tokenizer).__name__, ids]))
"""

HEADER = """\
| tokenizer | strings | transformers 4 | AutoTokenizer here | `json` differs | `auto` differs | `json` from `auto` |
|---|---|---|---|---|---|---|"""


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--transformers4", required=True, metavar="PYTHON")
    parser.add_argument("--strings", type=int, default=2000, metavar="N", help="random strings of each (default: 2000)")
    args = parser.parse_args()
    print(f"tokenizers {version('tokenizers')}, transformers {version('transformers')} here\n\n{HEADER}")
    return int(sum(_compare(folder, args.transformers4, args.strings) for folder in args.folders) > 0)


def _compare(folder: Path, python: str, strings: int) -> int:
    """Print the row of a folder; returns the number of wrong strings."""
    ours = {kind: open_checkpoint_tokenizer(folder, kind, vocab_size=EVERY_TOKEN) for kind in TokenizerKind}
    added = [token for tokenizer in ours.values() for token in tokenizer.added_tokens]
    texts = awkward_texts(added, random_texts=strings)
    command = [python, "-c", TRANSFORMERS_4, str(folder)]
    done = subprocess.run(command, input=json.dumps(texts), stdout=subprocess.PIPE, check=True, text=True)
    release, fast, truth = json.loads(done.stdout)
    with quiet_transformers():
        auto = AutoTokenizer.from_pretrained(folder)
    ids = {kind: _serialized_ids(tokenizer, texts) for kind, tokenizer in ours.items()}
    wrong_json = _differences(ids[TokenizerKind.JSON], truth)
    wrong_auto = _differences(ids[TokenizerKind.AUTO], auto(texts, add_special_tokens=False)["input_ids"])
    between = _differences(ids[TokenizerKind.JSON], ids[TokenizerKind.AUTO])
    row = (folder.name, len(texts), f"{release} {fast}", type(auto).__name__, wrong_json, wrong_auto, between)
    print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)
    return wrong_json + wrong_auto


def _serialized_ids(tokenizer: CheckpointTokenizer, texts: list[str]) -> list[list[int]]:
    encodings = Tokenizer.from_str(tokenizer.content).encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _differences(ours: list[list[int]], theirs: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
