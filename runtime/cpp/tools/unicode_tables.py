"""Writes ``src/tokenizer/unicode_tables.cpp``: what Hugging Face ``tokenizers`` knows of every code point.

Its regular expressions (Oniguruma), its Rust libraries and its NFC each have their own version of Unicode, so that no
table of Unicode's would give the same token ids. The installed ``tokenizers`` is asked instead, and compared with the
``unicodedata`` of Python where both know a character.

``python runtime/cpp/tools/unicode_tables.py`` writes the file; with ``--check`` it compares the file that is there, and
exits with 1 if a newer ``tokenizers`` gives another one.
"""

import argparse
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

TABLES = Path(__file__).parents[1] / "src" / "tokenizer" / "unicode_tables.cpp"

CATEGORIES = tuple("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn".split())
"""General categories in the order of their bits; surrogates (Cs) are in no text."""

SPACE, NOT_SPACE, WORD, TRIMMED, NUMERIC, NFC_ACTIVE = (1 << bit for bit in range(len(CATEGORIES), len(CATEGORIES) + 6))
"""The other bits; their meaning is in ``unicode_tables.h``."""

MOST_MOVED = 50
"""Characters that were put into another category between Python's version of Unicode and that of ``tokenizers``."""

LAST = 0x10FFFF
PAGE = 256
CODE_POINTS = tuple(code for code in range(LAST + 1) if not 0xD800 <= code <= 0xDFFF)
EVERYTHING = "".join(map(chr, CODE_POINTS))
HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)
HANGUL_FOLLOWERS = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))

NFC, NFD = normalizers.NFC(), normalizers.NFD()


def matching(pattern: str) -> set[int]:
    """Return the code points that a class of Oniguruma's holds; ``pattern`` is its complement."""
    return set(map(ord, normalizers.Replace(Regex(pattern), "").normalize_str(EVERYTHING)))


def alone(pre_tokenizer: pre_tokenizers.PreTokenizer, frame: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each code point, and the pieces that a pre-tokenizer splits it and its frame into."""
    for code in CODE_POINTS:
        yield code, [piece for piece, _ in pre_tokenizer.pre_tokenize_str(frame.format(chr(code)))]


def properties() -> dict[int, int]:
    """Return the bits of every code point, without those of NFC.

    Raises:
        ValueError: a code point is in no category or in several, or many are in others than Python knows.
    """
    bits = dict.fromkeys(CODE_POINTS, 0)
    moved = []
    for bit, category in enumerate(CATEGORIES):
        for code in matching(rf"\P{{{category}}}+"):
            if bits[code]:
                raise ValueError(f"U+{code:04X} is in two categories")
            if unicodedata.category(chr(code)) not in (category, "Cn"):
                moved.append(f"U+{code:04X}")
            bits[code] = 1 << bit
    if none := [code for code in CODE_POINTS if not bits[code]]:
        raise ValueError(f"U+{none[0]:04X} is in no category")
    if len(moved) > MOST_MOVED:
        raise ValueError(f"{', '.join(moved[:MOST_MOVED])} and more are in other categories than Python knows")
    spaces = matching(r"\S+")
    for code in CODE_POINTS:
        bits[code] |= SPACE if code in spaces else NOT_SPACE
    for code, pieces in alone(pre_tokenizers.Whitespace(), "a{}"):  # \w+|[^\w\s]+ of Rust's regex
        bits[code] |= WORD if len(pieces[0]) == 2 else TRIMMED if len(pieces) == 1 else 0
    for code, pieces in alone(pre_tokenizers.Digits(individual_digits=True), "a{}"):
        bits[code] |= NUMERIC if len(pieces) == 2 else 0
    return bits


def each(normalizer: normalizers.Normalizer, texts: Iterable[str]) -> list[str]:
    """Normalize many texts without line feeds, which neither decompose nor compose."""
    normalized: list[str] = normalizer.normalize_str("\n".join(texts)).split("\n")
    return normalized


def decompositions() -> dict[int, str]:
    """Return the full canonical decomposition of each code point that has one, without Hangul syllables.

    Raises:
        ValueError: one is not what Python knows.
    """
    codes = [code for code in CODE_POINTS if code != ord("\n")]
    found = {code: text for code, text in zip(codes, each(NFD, map(chr, codes)), strict=True) if text != chr(code)}
    for code, text in found.items():
        if text != unicodedata.normalize("NFD", chr(code)):
            raise ValueError(f"U+{code:04X} is decomposed otherwise than by Python")
    return {code: text for code, text in found.items() if code not in HANGUL_SYLLABLES}


def combining_classes() -> dict[int, int]:
    """Return the canonical combining class of each code point that is put in order.

    Raises:
        ValueError: two marks are not ordered by the classes that Python knows.
    """
    known: dict[int, int] = {}
    low, high = "\u0334", "\u05b0"  # classes 1 and 10
    codes = [code for code in CODE_POINTS if code != ord("\n")]
    after_low = each(NFD, (f"a{chr(code)}{low}" for code in codes))
    before_high = each(NFD, (f"a{high}{chr(code)}" for code in codes))
    for code, first, second in zip(codes, after_low, before_high, strict=True):
        if first[1] == low or second[-1] == high:
            known[code] = unicodedata.combining(chr(code))
    marks = [code for code in known if not unicodedata.decomposition(chr(code))]
    by_class = {known[code]: code for code in marks}
    pairs = [(mark, other) for mark in marks for other in by_class.values()]
    ordered = each(NFD, (f"a{chr(mark)}{chr(other)}" for mark, other in pairs))
    for (mark, other), text in zip(pairs, ordered, strict=True):
        if (text == f"a{chr(other)}{chr(mark)}") != (known[mark] > known[other] or mark == other):
            raise ValueError(f"U+{mark:04X} and U+{other:04X} are not in the order of their classes")
    return known


def compositions(decomposed: Mapping[int, str]) -> dict[tuple[int, int], int]:
    """Return which two code points NFC composes to one, without Hangul."""
    found = {}
    for code, text in decomposed.items():
        first = NFC.normalize_str(text[:-1])
        if len(first) == 1 and NFC.normalize_str(first + text[-1]) == chr(code):
            found[ord(first), ord(text[-1])] = code
    return found


def ranges(values: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Join neighbors with the same value: (first, last, value)."""
    found: list[tuple[int, int, int]] = []
    for code, value in sorted(values.items()):
        if found and found[-1][1:] == (code - 1, value):
            found[-1] = (found[-1][0], code, value)
        else:
            found.append((code, code, value))
    return found


def rows(values: Iterable[str], width: int = 118) -> str:
    """Lay out the elements of an array."""
    lines, line = [], ""
    for value in values:
        if len(line) + len(value) + 2 > width:
            lines.append(line)
            line = ""
        line += f" {value}," if line else f"{value},"
    return "\n".join(f"  {line}" for line in [*lines, line] if line)


def array(declaration: str, values: Sequence[str]) -> str:
    """Return the definition of an array."""
    return f"{declaration} = {{\n{rows(values)}\n}};\n"


def braced(*numbers: int) -> str:
    """Return an aggregate of code points, the last number as decimal."""
    return "{" + ", ".join([*(f"0x{number:X}" for number in numbers[:-1]), str(numbers[-1])]) + "}"


def generate() -> str:
    """Return the content of the tables' file."""
    bits = properties()
    decomposed = decompositions()
    classes = combining_classes()
    composed = compositions(decomposed)
    changed = {code for code, text in decomposed.items() if NFC.normalize_str(text) != chr(code)}
    active = {*classes, *changed, *(second for _, second in composed), *HANGUL_FOLLOWERS}
    for code in active:
        bits[code] |= NFC_ACTIVE
    kinds = sorted(set(bits.values()))
    kind_of = [kinds.index(bits.get(code, 1 << CATEGORIES.index("Cn") | NOT_SPACE)) for code in range(LAST + 1)]
    pages: dict[tuple[int, ...], int] = {}
    page_of = [pages.setdefault(tuple(kind_of[at : at + PAGE]), len(pages)) for at in range(0, LAST + 1, PAGE)]
    parts: list[str] = []
    entries: list[str] = []
    for code, text in sorted(decomposed.items()):
        entries.append(braced(code, len(parts), len(text)))
        parts += [f"0x{ord(char):X}" for char in text]
    classes_rows = [braced(*row) for row in ranges(classes)]
    pairs = [f"{{0x{a:X}, 0x{b:X}, 0x{code:X}}}" for (a, b), code in sorted(composed.items())]
    return "\n".join(
        [
            "// Generated by tools/unicode_tables.py: do not edit.",
            '#include "tokenizer/unicode_tables.h"',
            "",
            "namespace gircse::core::unicode {",
            "",
            array("const std::uint64_t kKinds[]", [f"0x{kind:X}" for kind in kinds]),
            array("const std::uint8_t kPageOf[]", [str(page) for page in page_of]),
            array(
                f"const std::uint8_t kPages[][{PAGE}]",
                ["{" + ", ".join(str(kind) for kind in page) + "}" for page in pages],
            ),
            array("const char32_t kDecomposed[]", parts),
            array("const Decomposition kDecompositions[]", entries),
            f"const std::size_t kDecompositionCount = {len(entries)};\n",
            array("const CombiningRange kCombiningRanges[]", classes_rows),
            f"const std::size_t kCombiningRangeCount = {len(classes_rows)};\n",
            array("const Composition kCompositions[]", pairs),
            f"const std::size_t kCompositionCount = {len(pairs)};\n",
            "}  // namespace gircse::core::unicode",
            "",
        ]
    )


def main() -> str | None:
    """Write or check the tables; returns what is wrong."""
    parser = argparse.ArgumentParser(description="Write the Unicode tables of the C++ tokenizer.")
    parser.add_argument("--check", action="store_true", help="compare the file that is there")
    check = parser.parse_args().check
    content = generate()
    if not check:
        TABLES.write_text(content, encoding="ascii")
        return None
    same = TABLES.read_text(encoding="ascii") == content
    return None if same else f"{TABLES}: the installed tokenizers knows Unicode otherwise; generate it again"


if __name__ == "__main__":
    sys.exit(main())
