"""Texts on which tokenizers differ where they differ at all: more than 7,000, of every script.

They are drawn with a seed, so that every machine has the same.
"""
# ruff: noqa: RUF001 - characters that look like others are the point

import random
import unicodedata
from collections.abc import Iterable, Iterator

from gircse.checkpoint.awkward_texts import awkward_texts

BLOCKS = (
    (0x0020, 0x007E),  # ASCII
    (0x0080, 0x00FF),  # controls, Latin-1
    (0x0100, 0x024F),  # Latin Extended
    (0x0250, 0x02FF),  # IPA, modifier letters
    (0x0300, 0x036F),  # combining marks
    (0x0370, 0x03FF),  # Greek
    (0x0400, 0x052F),  # Cyrillic
    (0x0530, 0x058F),  # Armenian
    (0x0590, 0x05FF),  # Hebrew
    (0x0600, 0x06FF),  # Arabic
    (0x0900, 0x097F),  # Devanagari
    (0x0980, 0x09FF),  # Bengali
    (0x0B80, 0x0BFF),  # Tamil
    (0x0E00, 0x0E7F),  # Thai
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x10A0, 0x10FF),  # Georgian
    (0x1100, 0x11FF),  # Hangul Jamo
    (0x1200, 0x137F),  # Ethiopic
    (0x13A0, 0x13FF),  # Cherokee
    (0x1780, 0x17FF),  # Khmer
    (0x1E00, 0x1EFF),  # Latin Extended Additional
    (0x1F00, 0x1FFF),  # Greek Extended
    (0x2000, 0x206F),  # punctuation and spaces
    (0x2070, 0x20FF),  # super- and subscripts, currencies, combining marks for symbols
    (0x2100, 0x22FF),  # letter-like, numbers, arrows, operators
    (0x2460, 0x25FF),  # enclosed, boxes, shapes
    (0x3000, 0x30FF),  # CJK punctuation, kana
    (0x4E00, 0x9FFF),  # CJK ideographs
    (0xAC00, 0xD7A3),  # Hangul syllables
    (0xF900, 0xFAFF),  # CJK compatibility
    (0xFE00, 0xFFEF),  # variation selectors, half and full width forms
    (0x1D100, 0x1D7FF),  # musical and mathematical symbols
    (0x1F300, 0x1F9FF),  # emoji
)

SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2000"
    "\u2003\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
DIGITS = "0123456789\u0660\u0661\u0669\u0966\u096f\uff10\uff19\u2160\u00b2\u00bd\u2460\U0001d7ce\U0001d2c3"
SUFFIXES = ("'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'ll", "'d", "'\u017f", "\u2019s", "'", "''s")
TOKENS = ("<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "<0x0A>", "<bos>", "\u2581")
EMOJI = ("\U0001f468", "\U0001f469", "\U0001f467", "\U0001f3fd", "\u200d", "\ufe0f", "\u2764", "\U0001f1e9", "\u20e3")

SENTENCES = (
    "All human beings are born free and equal in dignity and rights.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Все люди рождаются свободными.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由である。",
    "모든 인간은 태어날 때부터 자유로우며.",
    "يولد جميع الناس أحرارًا.",
    "כל בני האדם נולדו בני חורין.",
    "सभी मनुष्य जन्म से स्वतंत्र हैं।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "Tất cả mọi người sinh ra đều được tự do.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności.",
    "Všichni lidé rodí se svobodní a sobě rovní.",
    "Minden emberi lény szabadon születik.",
    "பிறப்புரிமையில் சகலரும்",
    "មនុស្សទាំងអស់កើតមក",
)

CODE = (
    "def f(x: int) -> dict[str, list[int]]:\n    return {k: v[1:-1] for k, v in x.items()}  # \u00e9\n",
    "for (size_t i = 0; i < n; ++i) {\n\t\tif (a[i] != 0x1Fu) return !b;\n\t}\r\n",
    "<div class=\"a-b_c\" id='x'>&amp;&#39;</div>\n\n\n",
    "SELECT COUNT(*) FROM t WHERE a>=1.5e-3 AND b LIKE '%x_';",
    "https://example.org/a_b-c?d=%20e#f user@mail.example",
    '{"key": [1, 2.50, null, "\\u00e9\\n"]}',
    "\\frac{a_{1}}{\\sqrt{b^2}} $x$ ~~~ `y`",
)


def tokenizer_corpus(tokens: Iterable[str] = (), *, seed: int = 0) -> list[str]:
    """Return the texts.

    Args:
        tokens: more tokens to write into texts.
        seed: of what is drawn.
    """
    draw = random.Random(seed)
    words = (*TOKENS, *tokens)
    kinds = (_blocks, _mixed, _anything, _marks, _spaces, _digits, _contractions, _emoji, _sentences, _code)
    texts = [text for kind in kinds for text in kind(draw)]
    texts += _around_tokens(draw, words)
    return [*awkward_texts(TOKENS, seed=seed), *texts, *_runs()]


def _draw(draw: random.Random, first: int, last: int) -> str:
    while 0xD800 <= (code := draw.randint(first, last)) <= 0xDFFF:
        pass
    return chr(code)


def _from_block(draw: random.Random, most: int) -> str:
    block = draw.choice(BLOCKS)
    return "".join(_draw(draw, *block) for _ in range(draw.randint(1, most)))


def _blocks(draw: random.Random) -> Iterator[str]:
    for block in BLOCKS:
        for _ in range(20):
            text = "".join(_draw(draw, *block) for _ in range(draw.randint(1, 30)))
            yield text
            yield " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def _mixed(draw: random.Random) -> Iterator[str]:
    for _ in range(1200):
        yield "".join(_from_block(draw, 5) + draw.choice(("", "", " ", "\n", "  ")) for _ in range(draw.randint(1, 6)))


def _anything(draw: random.Random) -> Iterator[str]:
    for _ in range(500):
        yield "".join(_draw(draw, 0, 0x10FFFF) for _ in range(draw.randint(1, 12)))


def _marks(draw: random.Random) -> Iterator[str]:
    """Yield decomposed and half composed text, marks in any order, and Jamo."""
    marks = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]
    bases = [*"aeiouAEIOUcnsz", *map(chr, range(0x0391, 0x03CA)), *map(chr, range(0x0905, 0x0940))]
    bases += [*map(chr, range(0x1100, 0x1113)), *map(chr, range(0xAC00, 0xAC60)), "\u3046", "\u09c7", "\u1025"]
    follow = [*map(chr, range(0x1161, 0x1176)), *map(chr, range(0x11A7, 0x11C3)), "\u3099", "\u09be", "\u102e"]
    for _ in range(1000):
        parts = (
            draw.choice(bases)
            + "".join(draw.choice(marks if draw.random() < 0.7 else follow) for _ in range(draw.randint(0, 4)))
            for _ in range(draw.randint(1, 6))
        )
        yield "".join(parts)
    for sentence in SENTENCES:
        for form in ("NFD", "NFC", "NFKD", "NFKC"):
            yield unicodedata.normalize(form, sentence)


def _spaces(draw: random.Random) -> Iterator[str]:
    for space in SPACES:
        yield from (f"a{space}b", f"{space}a", f"a{space}", f"a {space}b", f"a{space} b", f"a{space}{space}\n{space}b")
    for _ in range(500):
        parts = (
            "".join(draw.choice(SPACES) for _ in range(draw.randint(0, 4))) + draw.choice("ab1.\u4e2d")
            for _ in range(5)
        )
        yield "".join(parts)


def _digits(draw: random.Random) -> Iterator[str]:
    for _ in range(300):
        yield "".join(draw.choice(DIGITS + " .,a") for _ in range(draw.randint(1, 20)))


def _contractions(draw: random.Random) -> Iterator[str]:
    for _ in range(300):
        words = (draw.choice(("I", "don", "\u00e9", "X1", "", " ", "\u4e2d")) + draw.choice(SUFFIXES) for _ in range(4))
        yield draw.choice(("", " ")).join(words)


def _emoji(draw: random.Random) -> Iterator[str]:
    for _ in range(200):
        yield "".join(draw.choice((*EMOJI, " ", "a")) for _ in range(draw.randint(1, 10)))


def _sentences(draw: random.Random) -> Iterator[str]:
    yield from SENTENCES
    for _ in range(300):
        pair = draw.choice(SENTENCES), draw.choice(SENTENCES)
        at, end = sorted(draw.randrange(len(pair[0])) for _ in range(2))
        yield pair[0][at:] + draw.choice((" ", "\n", "", "  ", "\t")) + pair[1][:end]


def _code(draw: random.Random) -> Iterator[str]:
    yield from CODE
    for _ in range(200):
        text = draw.choice(CODE)
        yield text[draw.randrange(len(text)) :] + draw.choice(CODE)


def _around_tokens(draw: random.Random, tokens: tuple[str, ...]) -> Iterator[str]:
    for _ in range(800):
        pieces = (draw.choice(("a", " ", "\n", "\u00e9 ", "x1", "_", "\u3000", draw.choice(tokens))) for _ in range(8))
        yield "".join(pieces) + draw.choice(tokens)


def _runs() -> Iterator[str]:
    for unit in (
        "a",
        "A",
        " ",
        "\n",
        "\r\n",
        "\t",
        "1",
        "=",
        ".",
        "'",
        "\u00e9",
        "e\u0301",
        "\u4e2d",
        "\u0301",
        "\U0001f600",
        "ab ",
        "\u2581",
        " \n",
    ):
        for count in (2, 3, 5, 8, 16, 33, 100, 1000, 4000):
            yield unit * count
            yield f"x{unit * count}y"
