"""The C++ tokenizer, through the program ``tokenize_texts`` of its tests."""

import json
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_FAILED = 0xFFFFFFFF


@dataclass(frozen=True)
class CppTokenizer:
    """Runs the program on one tokenizer.json after another.

    Attributes:
        program: the file of ``tokenize_texts``.
        directory: for the tokenizer.json.
    """

    program: Path
    directory: Path

    def encode(self, tokenizer: str, texts: Sequence[str]) -> list[list[int] | str]:
        """Return the ids of each text, or the message where it has none.

        Args:
            tokenizer: content of the tokenizer.json.
            texts: what to tokenize.

        Raises:
            CppTokenizerError: the tokenizer is refused.
        """
        return self.encode_bytes(tokenizer, [text.encode() for text in texts])

    def encode_bytes(self, tokenizer: str, texts: Sequence[bytes]) -> list[list[int] | str]:
        """Do the same for bytes that need not be UTF-8."""
        path = self.directory / "tokenizer.json"
        path.write_text(tokenizer, encoding="utf-8")
        return list(_results(run_program(self.program, path, texts)[0]))

    def differences(self, tokenizer: dict[str, Any], texts: Sequence[str]) -> list[tuple[str, object, object]]:
        """Return the texts that get other ids than from Hugging Face, with both."""
        content = json.dumps(tokenizer, ensure_ascii=False)
        theirs = Tokenizer.from_str(content).encode_batch(texts, add_special_tokens=False)
        ours = self.encode(content, texts)
        return [
            (text, mine, yours.ids) for text, mine, yours in zip(texts, ours, theirs, strict=True) if mine != yours.ids
        ]


class CppTokenizerError(Exception):
    """A tokenizer was refused."""


def run_program(program: Path, tokenizer: Path, texts: Sequence[bytes]) -> tuple[bytes, dict[str, float]]:
    """Return what the program writes, and the seconds that it says.

    Raises:
        CppTokenizerError: the tokenizer is refused.
    """
    framed = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    done = subprocess.run([program, tokenizer], input=framed, capture_output=True, check=False)
    said = done.stderr.decode()
    if done.returncode == 1:
        raise CppTokenizerError(said.strip())
    done.check_returncode()
    return done.stdout, {name: float(seconds) for name, seconds in map(str.split, said.splitlines())}


def _results(output: bytes) -> Iterator[list[int] | str]:
    at = 0
    while at < len(output):
        (count,) = struct.unpack_from("<I", output, at)
        at += 4
        if count == _FAILED:
            (size,) = struct.unpack_from("<I", output, at)
            at += 4 + size
            yield output[at - size : at].decode()
        else:
            at += 4 * count
            yield list(struct.unpack_from(f"<{count}I", output, at - 4 * count))
