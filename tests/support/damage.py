"""Hypothesis strategies that damage files: JSON that nobody meant to write, and bytes that were not kept."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from hypothesis import strategies as st

NESTING = 5_000
"""Deeper than a parser of JSON goes."""

ODD_STRINGS = (
    *('""', '" "', '"1"', '"NaN"', '"unknown"', r'"\ud800"', r'"x\u0000y"', r'"a\nb\u2028c"', '"' + "x" * 70_000 + '"'),
    *('".."', '"../outside"', '"/etc/hostname"', '"."', '"~"', '"a/../../b"', '"file:///etc/hostname"'),
)
ODD_VALUES = (
    *("null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"": null}'),
    *("0", "-0", "1", "-1", "2", "7", "519", "520", "1.5", "-1e-300", "1e400", "NaN", "Infinity", "-Infinity"),
    *(str(2**31), str(2**63), str(-(2**63) - 1), str(2**64), "9" * 5_000, "1e" + "9" * 5_000),
    *ODD_STRINGS,
    "[" * 100 + "]" * 100,
    "[" * 900 + "]" * 900,
    "[" * NESTING + "]" * NESTING,
    '{"a":' * NESTING + "1" + "}" * NESTING,
)
"""Values as they stand in a file. A parser may take them; no writer writes them."""

Path = tuple[str | int, ...]


class _Kind(Enum):
    """What happens to one value.

    It becomes an odd one, a copy of another one or a little different, or goes to another name; or it vanishes, or is
    there again, under another name or with another value.
    """

    REPLACE = auto()
    COPY = auto()
    NUDGE = auto()
    RENAME = auto()
    REMOVE = auto()
    REPEAT = auto()
    CONTRADICT = auto()


@dataclass(frozen=True)
class _Change:
    kind: _Kind
    path: Path
    odd: str
    odd_name: str
    other: Path


@dataclass(frozen=True)
class _Raw:
    """JSON text that stands for itself."""

    text: str


@dataclass
class _Node:
    """An object or a list: names, or places, and values. A name can stand there twice."""

    brackets: str
    entries: list[tuple[Any, Any]]


def damaged_json(document: Any) -> st.SearchStrategy[bytes]:
    """Return files with one or two changes of the values in a JSON document, which is not empty."""
    paths = _paths(document)
    change = st.builds(_Change, st.sampled_from(_Kind), paths, _one_of(ODD_VALUES), _one_of(ODD_STRINGS), paths)
    few = st.one_of(st.tuples(change), st.tuples(change), st.tuples(change, change))
    return few.map(lambda changes: _changed(document, changes))


def damaged_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Return files that were cut, or have bytes flipped, inserted, removed or appended."""
    places = st.integers(0, max(len(content) - 1, 0))
    marks = st.sampled_from([b"\0", b"\xff\xfe", b"\xc3(", b"{", b"]", b'"', b","])
    junk = st.one_of(marks, st.binary(min_size=1, max_size=16))
    return st.one_of(
        places.map(lambda at: content[:at]),
        st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=4).map(
            lambda bits: _flipped(content, bits)
        ),
        st.tuples(places, junk).map(lambda cut: content[: cut[0]] + cut[1] + content[cut[0] :]),
        st.tuples(places, st.integers(1, 64)).map(lambda cut: content[: cut[0]] + content[cut[0] + cut[1] :]),
        junk.map(lambda tail: content + tail),
        st.sampled_from([b"\xef\xbb\xbf" + content, content * 2, b"\0" * len(content), content[::-1]]),
    )


def damaged_document(content: bytes) -> st.SearchStrategy[bytes]:
    """Return damages of a JSON file: of its values or, less often, of its bytes."""
    values = damaged_json(json.loads(content))
    return st.one_of(values, values, damaged_bytes(content))


def damaged_safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """Return damages of a safetensors file: of its header, of the header's length, or of any byte."""
    size = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + size], content[8 + size :]
    sizes = st.one_of(st.sampled_from([0, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]), st.integers(0, 2 * size))
    return st.one_of(
        damaged_document(header).map(lambda damaged: len(damaged).to_bytes(8, "little") + damaged + tensors),
        sizes.map(lambda stated: stated.to_bytes(8, "little") + header + tensors),
        damaged_bytes(content),
    )


def _one_of(values: Sequence[str]) -> st.SearchStrategy[str]:
    """Draw a value by its place, so that reports of Hypothesis do not spell out all of them."""
    return st.sampled_from(range(len(values))).map(values.__getitem__)


@st.composite
def _paths(draw: st.DrawFn, document: Any) -> Path:
    """Draw a path from the top down, so that a long list does not outweigh everything else."""
    path: Path = ()
    node = document
    while isinstance(node, (dict, list)) and node and (not path or draw(st.integers(0, 4))):
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        path, node = (*path, key), node[key]
    return path


def _changed(document: Any, changes: Sequence[_Change]) -> bytes:
    tree = _tree(document)
    for change in changes:
        _apply(tree, change, _tree(_value_at(document, change.other)))
    return _text(tree).encode()


def _apply(tree: _Node, change: _Change, other: Any) -> None:
    """Change a tree in place; a path that an earlier change took away is left alone."""
    *above, key = change.path
    parent: Any = tree
    for step in above:
        parent = dict(parent.entries).get(step) if isinstance(parent, _Node) else None
    if not isinstance(parent, _Node) or key not in dict(parent.entries):
        return
    place = [name for name, _ in parent.entries].index(key)
    value, odd, odd_name = parent.entries[place][1], _Raw(change.odd), _Raw(change.odd_name)
    changed = {
        _Kind.REPLACE: [(key, odd)],
        _Kind.COPY: [(key, other)],
        _Kind.NUDGE: [(key, _nudged(value))],
        _Kind.RENAME: [(odd_name, value)],
        _Kind.REMOVE: [],
        _Kind.REPEAT: [(key, value), (odd_name, value)],
        _Kind.CONTRADICT: [(key, value), (key, odd)],
    }
    parent.entries[place : place + 1] = changed[change.kind]


def _nudged(value: Any) -> Any:
    """Return a value of the same type that is close to another one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value[:-1]
        case _:
            return value


def _value_at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def _tree(document: Any) -> Any:
    match document:
        case dict():
            return _Node("{}", [(name, _tree(value)) for name, value in document.items()])
        case list():
            return _Node("[]", [(place, _tree(value)) for place, value in enumerate(document)])
        case _:
            return document


def _text(node: Any) -> str:
    match node:
        case _Raw():
            return node.text
        case _Node("{}"):
            return "{" + ", ".join(f"{_text(name)}: {_text(value)}" for name, value in node.entries) + "}"
        case _Node():
            return "[" + ", ".join(_text(value) for _, value in node.entries) + "]"
        case _:
            return json.dumps(node)


def _flipped(content: bytes, bits: Sequence[tuple[int, int]]) -> bytes:
    damaged = bytearray(content)
    for place, bit in bits:
        if damaged:
            damaged[place] ^= 1 << bit
    return bytes(damaged)
