"""The token ids of the C++ tokenizer are those of Hugging Face tokenizers, for everything that it does not refuse."""

import functools
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cpp_tokenizer import CppTokenizer, CppTokenizerError
from support.small_models import DATA
from support.tokenizer_cases import CASES, write_case
from support.tokenizer_corpus import CODE, SENTENCES, tokenizer_corpus
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from gircse.checkpoint.tokenizer import open_checkpoint_tokenizer
from gircse.runtime.errors import CheckpointError
from gircse.runtime.manifest import TokenizerKind

UNICODE_TABLES = Path(__file__).parents[3] / "runtime" / "cpp" / "tools" / "unicode_tables.py"

CORPUS = tokenizer_corpus(["<|end|>", "<x>", "<x>y"])
SAMPLE = CORPUS[::6]

BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASES_OF_WORDS = rf"{BEFORE}{UPPER}*{LOWER}+%s|{BEFORE}{UPPER}+{LOWER}*%s|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
WORDS = rf"{SUFFIXES}|{BEFORE}\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
PATTERNS = {
    "llama3": WORDS % r"\p{N}{1,3}",
    "qwen": WORDS % r"\p{N}",
    "o200k": CASES_OF_WORDS % (f"{SUFFIXES}?", f"{SUFFIXES}?", r"\p{N}{1,3}"),
    "tekken": CASES_OF_WORDS % ("", "", r"\p{N}"),
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "classes": r"[!-/:-@\[-`{-~][A-Za-z]+|["
    "\u4e00-\u9fa5\u3040-\u30ff"
    r"]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+",
    "lazy": r"\p{L}+?(?=\p{N}|\s)|\d{2,3}|\P{L}??\s|(?:ab|a)c?|\D{2,}|[\-\]\\a^]+|\S",
}
PRE_TOKENIZERS: dict[str, Any] = {
    "none": None,
    "gpt2": {**BYTE_LEVEL, "use_regex": True},
    "prefix space": {**BYTE_LEVEL, "use_regex": True, "add_prefix_space": True},
    "whole text": BYTE_LEVEL,
    "digits": {"type": "Digits", "individual_digits": False},
    "starcoder": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    **{
        f"metaspace {scheme} {split}": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme,
            "split": split,
        }
        for scheme in ("first", "always", "never")
        for split in (True, False)
    },
    **{
        f"{behavior} {invert}": {
            "type": "Split",
            "pattern": {"Regex": r"\s|\p{P}+"},
            "behavior": behavior,
            "invert": invert,
        }
        for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
        for invert in (True, False)
    },
    "gemma": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    **{
        name: [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]
        for name, pattern in PATTERNS.items()
    },
    "gpt4o": [
        {"type": "Split", "pattern": {"Regex": PATTERNS["o200k"]}, "behavior": "Removed", "invert": True},
        BYTE_LEVEL,
    ],
}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
NORMALIZERS: dict[str, Any] = {
    "none": None,
    "nfc": {"type": "NFC"},
    "llama2": [{"type": "Prepend", "prepend": "\u2581"}, REPLACE],
    "gemma": REPLACE,
    "mistral": [REPLACE, {"type": "Replace", "pattern": {"Regex": "\\A\u2581"}, "content": "\u2581\u2581"}],
    "pattern": {"type": "Replace", "pattern": {"Regex": r"\p{P}{2,}|\s+(?=\S)"}, "content": "-"},
    "nested": [[{"type": "NFC"}, [REPLACE]], {"type": "Prepend", "prepend": "ab"}],
    "deleted": [{"type": "Replace", "pattern": {"String": "a"}, "content": ""}, {"type": "NFC"}],
}


def as_json(part: Any, field: str) -> Any:
    """Return a normalizer or pre-tokenizer; a list is a Sequence."""
    return {"type": "Sequence", field: [as_json(step, field) for step in part]} if isinstance(part, list) else part


@functools.cache
def trained(normalizer: str = "none", pre_tokenizer: str = "none", *, byte_fallback: bool = True) -> str:
    """Train a tokenizer on the sentences of the corpus."""
    empty = json.loads(Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)).to_str())
    empty["normalizer"] = as_json(NORMALIZERS[normalizer], "normalizers")
    empty["pre_tokenizer"] = as_json(PRE_TOKENIZERS[pre_tokenizer], "pretokenizers")
    tokenizer = Tokenizer.from_str(json.dumps(empty))
    byte_level = "ByteLevel" in json.dumps(empty["pre_tokenizer"])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else [*"\u2581abcdefghijklmnopqrstuvwxyz .,'"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", *fallback], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, *CODE] * 2, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:2]
    return json.dumps(document)


def document_of(name: str = "tokenizer.json") -> dict[str, Any]:
    """Return a tokenizer of the test data."""
    content: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return content


def utf8_fault(text: bytes) -> str | None:
    try:
        text.decode()
    except UnicodeDecodeError as err:
        return f"{err.reason} at byte {err.start}"
    return None


@pytest.fixture
def cpp_tokenizer(cpp_build: Path, tmp_path: Path) -> CppTokenizer:
    return CppTokenizer(cpp_build / "tests" / "tokenize_texts", tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "sentencepiece/tokenizer.json"])
def test_ids_of_the_whole_corpus(cpp_tokenizer: CppTokenizer, name: str) -> None:
    assert len(CORPUS) > 5000
    assert cpp_tokenizer.differences(document_of(name), CORPUS) == []


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_ids_with_each_pre_tokenizer(cpp_tokenizer: CppTokenizer, pre_tokenizer: str) -> None:
    assert cpp_tokenizer.differences(json.loads(trained("none", pre_tokenizer)), SAMPLE) == []


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizer, pre_tokenizer)
        for normalizer in NORMALIZERS
        for pre_tokenizer in ("none", "qwen", "metaspace first False", "metaspace always True")
        if not ("first" in pre_tokenizer and normalizer in ("nfc", "nested", "deleted"))
    ],
)
def test_ids_with_each_normalizer(cpp_tokenizer: CppTokenizer, normalizer: str, pre_tokenizer: str) -> None:
    assert cpp_tokenizer.differences(json.loads(trained(normalizer, pre_tokenizer)), SAMPLE) == []


@pytest.mark.parametrize("case", json.loads(CASES.read_text(encoding="utf-8"))["cases"], ids=lambda case: case["name"])
def test_ids_of_what_the_exporter_writes(cpp_tokenizer: CppTokenizer, case: dict[str, Any], tmp_path: Path) -> None:
    directory, written = write_case(case, tmp_path / "checkpoint"), 0
    for kind in TokenizerKind:
        try:
            tokenizer = open_checkpoint_tokenizer(directory, kind, vocab_size=1 << 30)
        except CheckpointError:
            continue
        written += 1
        assert cpp_tokenizer.differences(json.loads(tokenizer.content), SAMPLE) == [], kind
    assert written


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@pytest.mark.parametrize("flags", [*itertools.product([False, True], repeat=4)], ids=str)
@pytest.mark.parametrize("normalizer", ["none", "llama2", "deleted"])
def test_ids_with_added_tokens_of_every_kind(
    cpp_tokenizer: CppTokenizer, normalizer: str, flags: tuple[bool, ...]
) -> None:
    contents = ("<x>", "<x>y", "<x", "e\u0301", "the", "\u2581\u2581", "\n", "  ", "\u4e2d", "b<", "<s>")
    document = json.loads(trained(normalizer))
    plain = dict.fromkeys(FLAGS, False)
    tokens = [{"id": 1000 + i, "content": text, **plain} for i, text in enumerate(contents)]
    for token in tokens[:-4]:
        token |= dict(zip(FLAGS, (*flags, True), strict=True))
    document["added_tokens"] += tokens
    draw = random.Random(1)
    pieces = (*contents, "a", " ", "_", "\u3000", "1", "\u00e9", "\t", "b", "\u200d", "\u2160")
    texts = ["".join(draw.choice(pieces) for _ in range(draw.randint(1, 12))) for _ in range(1500)]
    assert cpp_tokenizer.differences(document, texts) == []


def test_ids_where_added_tokens_come_twice_or_with_other_ids(cpp_tokenizer: CppTokenizer) -> None:
    document = document_of()
    flags = dict.fromkeys(FLAGS, False)
    contents = ("new", "new", "newer", "the", "", "\u00e9", "newest")
    document["added_tokens"] += [{"id": 7, "content": text, **flags} for text in contents]
    document["added_tokens"].append({"id": 9, "content": "newer", **flags, "lstrip": True})
    assert cpp_tokenizer.differences(document, ["new newer the newest \u00e9", "the", *SAMPLE]) == []


def test_ids_where_the_vocabulary_has_gaps(cpp_tokenizer: CppTokenizer) -> None:
    document = document_of()
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {token: 2 * index for token, index in vocabulary.items()}
    document["added_tokens"].append({"id": 1, "content": "new", **dict.fromkeys(FLAGS, False)})
    document["added_tokens"].append({"id": 1, "content": "newer", **dict.fromkeys(FLAGS, False)})
    assert cpp_tokenizer.differences(document, ["a new newer text", *SAMPLE]) == []


@pytest.mark.parametrize("unknown", ["<unk>", None])
@pytest.mark.parametrize("options", [*itertools.product([False, True], repeat=3)], ids=str)
def test_ids_with_each_option_of_the_model(
    cpp_tokenizer: CppTokenizer, options: tuple[bool, ...], unknown: str | None
) -> None:
    document = json.loads(trained())
    document["model"] |= dict(zip(("byte_fallback", "fuse_unk", "ignore_merges"), options, strict=True))
    document["model"]["unk_token"] = unknown
    for byte in (0xC3, 0xE4, 0x0A):  # some characters then have only a part of their bytes
        del document["model"]["vocab"][f"<0x{byte:02X}>"]
    assert cpp_tokenizer.differences(document, SAMPLE) == []


def test_ids_where_the_vocabulary_lacks_bytes(cpp_tokenizer: CppTokenizer) -> None:
    document = document_of()
    used = {token for merge in document["model"]["merges"] for token in (*merge, "".join(merge))}
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {
        token: index for token, index in vocabulary.items() if token in used or index % 3 != 1
    }
    assert cpp_tokenizer.differences(document, SAMPLE) == []
    document["model"] |= {"unk_token": "<|end|>", "byte_fallback": True}
    assert cpp_tokenizer.differences(document, SAMPLE) == []


def test_merges_in_the_old_form_and_repeated_ones(cpp_tokenizer: CppTokenizer) -> None:
    document = document_of()
    merges = document["model"]["merges"]
    document["model"]["merges"] = [*merges, merges[0], merges[20]]  # the last rank counts
    assert cpp_tokenizer.differences(document, SAMPLE) == []
    document["model"]["merges"] = ["#version: 0.2", *(" ".join(merge) for merge in document["model"]["merges"])]
    assert cpp_tokenizer.differences(document, SAMPLE) == []


def test_ids_of_half_of_all_code_points(cpp_tokenizer: CppTokenizer) -> None:
    """Of planes 0 and 1, where most letters, numbers and marks are."""
    codes = [code for code in range(0x20000) if not 0xD800 <= code <= 0xDFFF]
    framed = [f"a{chr(code)} {chr(code)}\u0301'{chr(code)}1" for code in codes]
    texts = ["".join(framed[at : at + 32]) for at in range(0, len(framed), 32)]
    assert cpp_tokenizer.differences(json.loads(trained("nfc", "o200k")), texts) == []


def test_the_tables_are_those_of_the_installed_tokenizers() -> None:
    done = subprocess.run([sys.executable, UNICODE_TABLES, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_offset_of_invalid_utf8(cpp_tokenizer: CppTokenizer) -> None:
    draw = random.Random(2)
    valid = "a\u00e9\u4e2d\U0001f600 abcdefgh\x00".encode()
    texts = [bytes(draw.choice([*valid, draw.randrange(256)]) for _ in range(draw.randint(0, 20))) for _ in range(5000)]
    texts += [valid[:at] for at in range(len(valid))]
    texts += [
        bytes([0x61, *lead, 0x62])
        for lead in itertools.product(
            [0xC1, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5],
            [0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0],
            [0x80, 0x20],
        )
    ]
    found = cpp_tokenizer.encode_bytes((DATA / "tokenizer.json").read_text(encoding="utf-8"), texts)
    for text, result in zip(texts, found, strict=True):
        if (fault := utf8_fault(text)) is None:
            assert isinstance(result, list), text
        else:
            assert result == fault, text


def test_a_text_that_needs_a_missing_unknown_token(cpp_tokenizer: CppTokenizer) -> None:
    document = json.loads(trained(byte_fallback=False))
    document["model"]["unk_token"] = "missing"
    fine, failed = cpp_tokenizer.encode(json.dumps(document), ["the", "\u2603"])
    assert isinstance(fine, list)
    assert failed == "the unknown token 'missing' is not in the vocabulary, and the text needs it"


@pytest.mark.parametrize("normalizer", ["none", "nfc", "llama2"])
@pytest.mark.parametrize("pre_tokenizer", ["none", "gpt2", "o200k"])
def test_long_runs_take_no_more_than_their_length(
    cpp_tokenizer: CppTokenizer, normalizer: str, pre_tokenizer: str
) -> None:
    units = ("a", "A", " ", "\n", " \n", "1", "=", "\u0301", "e\u0301", "\u4e2d", "\u2581", "'s", "Aa", "\u0345\u0301")
    texts = [unit * (200_000 // len(unit)) for unit in units]
    for text, ids in zip(texts, cpp_tokenizer.encode(trained(normalizer, pre_tokenizer), texts), strict=True):
        assert isinstance(ids, list), (text[:10], ids)


def edited(**changes: Any) -> dict[str, Any]:
    return {**document_of(), **changes}


def with_model(**changes: Any) -> dict[str, Any]:
    return edited(model={**document_of()["model"], **changes})


def with_split(pattern: Any, **changes: Any) -> dict[str, Any]:
    return edited(
        pre_tokenizer={"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False, **changes}
    )


def with_regex(pattern: str) -> dict[str, Any]:
    return with_split({"Regex": pattern})


def with_token(**changes: Any) -> dict[str, Any]:
    token = {"id": 0, "content": "x", **dict.fromkeys(FLAGS, False), **changes}
    return edited(added_tokens=[{name: value for name, value in token.items() if value is not None}])


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "top level field": (lambda: edited(extra=1), "it has the field 'extra', which is not supported"),
    "version": (lambda: edited(version="2.0"), "it has the version '2.0', which is not supported"),
    "decoder": (lambda: edited(decoder=5), "it has a 'decoder' of a wrong type"),
    "lowercase": (lambda: edited(normalizer={"type": "Lowercase"}), "the normalizer Lowercase is not supported"),
    "nfkc": (
        lambda: edited(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}),
        "the normalizer NFKC is not supported",
    ),
    "strip": (
        lambda: edited(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        "the normalizer Strip is not supported",
    ),
    "prepended nothing": (
        lambda: edited(normalizer={"type": "Prepend", "prepend": ""}),
        "the normalizer Prepend prepends nothing, which is not supported",
    ),
    "replaced nothing": (
        lambda: edited(normalizer={**REPLACE, "pattern": {"String": ""}}),
        "the pattern of the normalizer Replace is an empty String, which is not supported",
    ),
    "normalizer field": (
        lambda: edited(normalizer={"type": "NFC", "form": "D"}),
        "the normalizer NFC has the field 'form', which is not supported",
    ),
    "nested too deep": (lambda: edited(normalizer=nested(200)), "it is nested too deep"),
    "whitespace": (
        lambda: edited(pre_tokenizer={"type": "Whitespace"}),
        "the pre-tokenizer Whitespace is not supported",
    ),
    "after ByteLevel": (
        lambda: edited(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [BYTE_LEVEL, {"type": "Digits", "individual_digits": True}],
            }
        ),
        "the pre-tokenizer Digits comes after ByteLevel, which is not supported",
    ),
    "first after NFC": (
        lambda: edited(
            normalizer={"type": "NFC"},
            pre_tokenizer={"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True},
        ),
        "the pre-tokenizer Metaspace has the prepend_scheme 'first' after NFC or Metaspace, which is not supported",
    ),
    "contradiction": (
        lambda: edited(pre_tokenizer={"type": "Metaspace", "replacement": "_", "add_prefix_space": False}),
        "the pre-tokenizer Metaspace has an add_prefix_space that its prepend_scheme contradicts",
    ),
    "behavior": (
        lambda: with_split({"String": "a"}, behavior="Both"),
        "the pre-tokenizer Split has the behavior 'Both', which is not supported",
    ),
    "pattern": (
        lambda: with_split({"Glob": "*"}),
        "the pre-tokenizer Split has a pattern that is neither a String nor a Regex",
    ),
    "model": (lambda: with_model(type="Unigram"), "the model is a Unigram, which is not supported"),
    "no model": (lambda: edited(model=None), "the model is not an object"),
    "model field": (lambda: with_model(extra=1), "the model has the field 'extra', which is not supported"),
    "dropout": (lambda: with_model(dropout=0.1), "the model sets dropout, which is not supported"),
    "prefix": (
        lambda: with_model(continuing_subword_prefix="##"),
        "the model sets continuing_subword_prefix, which is not supported",
    ),
    "suffix": (
        lambda: with_model(end_of_word_suffix="</w>"),
        "the model sets end_of_word_suffix, which is not supported",
    ),
    "no merges": (
        lambda: edited(model={k: v for k, v in document_of()["model"].items() if k != "merges"}),
        "the model has no 'merges'",
    ),
    "vocabulary": (lambda: with_model(vocab=["a"]), "the model has a 'vocab' of a wrong type"),
    "merge of three": (
        lambda: with_model(merges=[["a", "b", "c"]]),
        "model.merges has a merge of more than two tokens",
    ),
    "merge of one": (lambda: with_model(merges=[["a"]]), "model.merges has a merge of fewer than two tokens"),
    "merge as text": (lambda: with_model(merges=["a b c"]), "model.merges has 'a b c', which is not two tokens"),
    "merge of nothing": (
        lambda: with_model(merges=[["zz", "yy"]]),
        "a merge names 'zz', which is not in the vocabulary",
    ),
    "merge to nothing": (
        lambda: with_model(merges=[["z", "\u0143"]]),
        "a merge names 'z\u0143', which is not in the vocabulary",
    ),
    "mixed merges": (
        lambda: with_model(merges=[["a", "b"], "a b"]),
        "model.merges has both strings and arrays",
    ),
    "id": (lambda: with_model(vocab={"a": "1"}), "model.vocab has a value that is not an id"),
    "negative id": (lambda: with_model(vocab={"a": -1}), "model.vocab has a value that is not an id"),
    "large id": (lambda: with_model(vocab={"a": 1 << 32}, merges=[]), "model.vocab has the id 4294967296"),
    "clash": (lambda: with_model(vocab={"a": 1, "b": 1}, merges=[]), "model.vocab has two tokens with the id 1"),
    "token without flag": (lambda: with_token(lstrip=None), "an added token has no flag 'lstrip'"),
    "token field": (lambda: with_token(mask=True), "an added token has the field 'mask', which is not supported"),
    "token id": (lambda: with_token(id=-1), "an added token has no id"),
    "long token": (lambda: with_token(content="x" * 2000), "an added token of more than 1024 bytes is not supported"),
    "token twice": (
        lambda: edited(
            normalizer=REPLACE,
            added_tokens=[
                {"id": 0, "content": text, **dict.fromkeys(FLAGS, False), "normalized": True}
                for text in ("a b", "a\u2581b")
            ],
        ),
        "the added token 'a\u2581b' comes twice, as it is normalized",
    ),
    "token of nothing": (
        lambda: edited(
            normalizer={**REPLACE, "content": ""},
            added_tokens=[{"id": 0, "content": " ", **dict.fromkeys(FLAGS, False), "normalized": True}],
        ),
        "the added token ' ' is normalized to nothing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(cpp_tokenizer: CppTokenizer, name: str) -> None:
    document, message = REFUSED[name][0](), REFUSED[name][1]
    with pytest.raises(CppTokenizerError) as caught:
        cpp_tokenizer.encode(json.dumps(document), [])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"\w+", r"the unsupported escape '\w'"),
        (r"\bx", r"the unsupported escape '\b'"),
        (r"\p{Han}+", "the unsupported property 'Han'"),
        (r"\p{^L}", "the unsupported property '^L'"),
        (r"\pL", "a property without '{' and '}'"),
        (r"^a", "the unsupported '^'"),
        (r"a.b", "the unsupported '.'"),
        (r"(?<=a)b", "the unsupported group '(?<'"),
        (r"(?>a+)b", "the unsupported group '(?>'"),
        (r"(?i)a", "the unsupported group '(?i'"),
        (r"(?:ab)+", "a quantifier of a group other than '?'"),
        (r"(?:ab)??x", "a quantifier of a group other than '?'"),
        (r"(?:a?)?b", "an optional group that can match nothing"),
        (r"(?=a)?b", "a quantifier of an assertion"),
        (r"a{2}{3}", "a quantifier of a quantifier"),
        (r"a{1,2}?", "an interval with '?' or '+'"),
        (r"a{,2}", "an interval that is not {n}, {n,} or {n,m}"),
        (r"a{3,2}", "an interval out of order"),
        (r"a{2000}", "an interval above 1000"),
        (r"[a[b]]", "a class in a class"),
        (r"[[:alpha:]]", "a class in a class"),
        (r"[a-z&&[^x]]", "an intersection of classes"),
        (r"[]a]", "an empty class"),
        (r"[z-a]", "a range out of order"),
        (r"[a-c-e]", "a '-' that is not a range"),
        (r"[a", "an end too early"),
        (r"(a", "a '(' without ')'"),
        (r"a)", "a ')' without '('"),
        (r"(?i:\u00e9)", "a character that is not ASCII in (?i:)"),
        (r"(?i:[^a])", "a negated class in (?i:)"),
        (r"(?i:\p{L})", "a property in (?i:)"),
        (r"(?i:ss)", "letters of a ligature in (?i:)"),
        ("(?:" * 20 + "a" + ")" * 20, "groups nested too deep"),
        (r"a*", "can match nothing, which is not supported"),
        (r"a|(?!b)", "can match nothing, which is not supported"),
        ("a" * 70_000, "a pattern of more than 65536 bytes"),
    ],
)
def test_a_pattern_that_is_not_supported_is_refused_by_name(
    cpp_tokenizer: CppTokenizer, pattern: str, message: str
) -> None:
    with pytest.raises(CppTokenizerError, match=r"^the pattern ") as caught:
        cpp_tokenizer.encode(json.dumps(with_regex(pattern.replace(r"\u00e9", "\u00e9"))), [])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "5",
        "\ufeff{}",
        '{"model": {"vocab": {}}',
        '{"a": 1} {}',
        '{"a": "\\ud800"}',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=lambda content: content[:12],
)
def test_what_is_not_a_tokenizer_is_refused(cpp_tokenizer: CppTokenizer, content: str) -> None:
    with pytest.raises(CppTokenizerError):
        cpp_tokenizer.encode(content, [])


def test_normalizers_that_the_tests_use_are_those_of_hugging_face() -> None:
    assert json.loads(Tokenizer.from_str(trained("llama2")).to_str())["normalizer"] == {
        "type": "Sequence",
        "normalizers": [NORMALIZERS["llama2"][0], NORMALIZERS["llama2"][1]],
    }
    assert isinstance(Tokenizer.from_str(trained("nfc")).normalizer, normalizers.NFC)
