"""The damages are what they claim to be: what fails to damage anything tests nothing."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import NESTING, damaged_bytes, damaged_document, damaged_json, damaged_safetensors

DOCUMENT = {"name": "a", "sizes": [1, 2, {"deep": True}], "none": None}
CONTENT = json.dumps(DOCUMENT).encode()


def drawn(strategy: st.SearchStrategy[bytes]) -> list[bytes]:
    seen: list[bytes] = []

    @settings(max_examples=500)
    @given(strategy)
    def collect(content: bytes) -> None:
        seen.append(content)

    collect()
    return seen


def read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as err:
        return type(err)


def test_a_json_document_becomes_many_others_and_some_that_no_parser_takes() -> None:
    seen = drawn(damaged_json(DOCUMENT))
    read_back = [read(content) for content in seen]
    assert len(set(map(repr, read_back))) > 150
    assert read_back.count(DOCUMENT) < 100
    assert RecursionError in read_back
    for odd in (rb"\ud800", b"Infinity", b"18446744073709551616", b"[" * NESTING):
        assert any(odd in content for content in seen)
    assert any(content.count(b'"name": ') == 2 for content in seen)


def test_bytes_are_cut_and_flipped() -> None:
    seen = drawn(damaged_bytes(CONTENT))
    assert sum(content != CONTENT for content in seen) > 450
    assert any(CONTENT.startswith(content) for content in seen)
    assert any(len(content) == len(CONTENT) and content != CONTENT for content in seen)
    assert UnicodeDecodeError in map(read, seen)
    assert json.JSONDecodeError in map(read, seen)


def test_a_document_is_damaged_in_both_ways() -> None:
    seen = drawn(damaged_document(CONTENT))
    assert any(CONTENT.startswith(content) for content in seen)
    assert any(b"Infinity" in content for content in seen)


def test_a_safetensors_header_can_lie_about_its_length() -> None:
    intact = len(CONTENT).to_bytes(8, "little") + CONTENT + b"tensors"
    seen = drawn(damaged_safetensors(intact))
    assert any(content[:8] == b"\xff" * 8 for content in seen)
    assert any(content[:8] == bytes(8) and content[8:] == intact[8:] for content in seen)
    assert any(content.endswith(b"tensors") and content[:8] != intact[:8] for content in seen)
