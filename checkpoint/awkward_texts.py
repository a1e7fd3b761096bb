"""Texts that tokenizers read differently where they differ at all: spaces, special tokens, Unicode, code, long runs."""

import random
from collections.abc import Iterable

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "a\x00b",
    "\ufeffbyte order mark",
    "ok",
    " one leading space",
    "  two leading spaces",
    "one trailing space ",
    "two  inner   spaces    of     length",
    "line\nbreak\n\nand a blank line\n",
    "\n leading newline",
    "carriage\r\nreturn\r",
    "tab\tand\t\ttabs",
    "no\u00a0break \u2003em \u3000ideographic \u200bzero-width spaces",
    "The quick brown fox jumps over the lazy dog.",
    "ALL CAPS and MiXeD cAsE",
    "don't, we've, I'LL, y'all'd've",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "\u212b \u2126 \ufb01ne \u00bd \u2460 \uff26\uff55\uff4c\uff4c",
    "\u0130stanbul \u0131\u015f\u0131k STRASSE Stra\u00dfe \u1e9e",
    "Z\u0351\u036b\u0343a\u0321\u034al\u0321\u0356g\u0322o\u0337",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\u4e2d\u6587 mixed with English \u548c\u6570\u5b57 123",
    "\uc548\ub155\ud558\uc138\uc694 \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u202eright to left\u202c",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f\u200d\U0001f525 1\ufe0f\u20e3",
    "\U0001d54f\U0001d555 \U00020000 \U0010ffff \ue000",
    "0 1 12 123 1234 12345 1,234,567.89 -1e-10 0x1F",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u216b",
    "7*6=42; a<b && c>d || !e",
    "def f(x):\n    return {k: v[1:-1] for k, v in x.items()}\n",
    "if (a) {\n\t\tb();\n\t} // comment",
    '<div class="a">&amp;&#39;</div>',
    "https://example.org/a_b-c?d=%20e#f mail@example.org",
    "C:\\path\\file $HOME ~/x `y` \\n",
    "***bold*** __init__ --- ... \u2026 \u2013 \u2014 \u201cquotes\u201d \u00abguillemets\u00bb",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "\u2581 \u2581\u2581word \u2581",
    "\u0120Hello \u010a",
    "<0x0A> <0xFF> [UNK] [PAD] [CLS] [SEP] [MASK]",
    "<s> </s> <unk> <pad> <bos> <eos> <|endoftext|> <|im_start|>user<|im_end|>",
    "text</s>text </s> text <s>text <s> text",
    "</s>",
    " </s>",
    "</s> ",
    "[INST] <<SYS>> hi <</SYS>> [/INST]",
    "<|begin_of_text|><|eot_id|> <start_of_turn>user\n<end_of_turn>",
    "\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "\u0085 \u2028 \u2029",
    "Instruct: Find it\nQuery: a query",
    "a" * 500,
    " " * 200,
    "ab " * 200,
    "\n" * 100,
    "\u6f22" * 200,
    "1" * 300,
    "=" * 150,
)
"""Fixed texts, whatever the tokenizer."""


def awkward_texts(tokens: Iterable[str], *, random_texts: int = 200, seed: int = 0) -> list[str]:
    """Return the fixed texts, texts around the added tokens of a tokenizer, and random concatenations of all these.

    Args:
        tokens: the added tokens of one or more tokenizers.
        random_texts: number of the concatenations.
        seed: of the concatenations.
    """
    around = [text for token in dict.fromkeys(tokens) for text in (token, f"a{token}b", f" {token} c {token}{token} ")]
    draw = random.Random(seed)
    pieces, added = [text for text in TEXTS if len(text) < 100], around or list(TEXTS)
    mixed = [
        "".join(draw.choice(pieces if draw.random() < 0.7 else added) for _ in range(draw.randint(2, 6)))
        for _ in range(random_texts)
    ]
    return [*TEXTS, *around, *mixed]
