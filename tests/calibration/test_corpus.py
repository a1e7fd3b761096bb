"""Texts are drawn by the seed, and the held-out ones are others where the file has enough."""

from pathlib import Path

import pytest
from support.small_calibration_run import write_texts
from support.small_models import CALIBRATION_TEXTS, SmallModels

from gircse.calibration.corpus import HELD_OUT_TOKENS, MIN_TEXTS, draw_texts, tokenize_texts
from gircse.checkpoint.tokenizer import open_checkpoint_tokenizer
from gircse.runtime.errors import GircseError
from gircse.runtime.manifest import TokenizerKind


def test_held_out_texts_are_not_observed(tmp_path: Path) -> None:
    path = write_texts(tmp_path, [*CALIBRATION_TEXTS, *CALIBRATION_TEXTS[:9]])  # 80 different ones
    drawn = draw_texts(path, samples=40, seed=0)
    assert (len(drawn.observed), len(drawn.held_out)) == (40, 40)
    assert {*drawn.observed, *drawn.held_out} == set(CALIBRATION_TEXTS)
    assert draw_texts(path, samples=40, seed=0) == drawn
    assert draw_texts(path, samples=40, seed=1).observed != drawn.observed


def test_too_few_others_are_not_held_out(tmp_path: Path) -> None:
    drawn = draw_texts(write_texts(tmp_path), samples=80 - MIN_TEXTS + 1, seed=0)
    assert set(drawn.held_out) <= set(drawn.observed)


def test_texts_are_cut_and_counted(small_models: SmallModels, tmp_path: Path) -> None:
    texts = [f"{text} " * 30 for text in CALIBRATION_TEXTS]
    drawn = draw_texts(write_texts(tmp_path, texts), samples=40, seed=3)
    checkpoint = small_models.checkpoint("llama")
    tokenizer = open_checkpoint_tokenizer(checkpoint, TokenizerKind.JSON, vocab_size=520)
    corpus = tokenize_texts(drawn, tokenizer.prompt_tokenizer(max_tokens=20))
    assert {batch.input_ids.shape[1] for batch in corpus.observed} == {20}
    assert {batch.input_ids.shape[1] for batch in corpus.held_out} == {HELD_OUT_TOKENS}
    assert (corpus.used.samples, corpus.used.tokens, corpus.used.seed) == (40, 40 * 20, 3)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            CALIBRATION_TEXTS[:5],
            r"^--texts .*texts\.txt has 5 different texts; a calibration needs at least 32\. Add texts",
        ),
        (["the same"] * 100, r"has 1 different text; a calibration needs at least 32\."),
        ([""], "no text"),
    ],
)
def test_too_few_texts(tmp_path: Path, texts: list[str], message: str) -> None:
    with pytest.raises(GircseError, match=message):
        draw_texts(write_texts(tmp_path, texts), samples=40, seed=0)


def test_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("für\n".encode("latin-1") * 40)
    with pytest.raises(GircseError, match="UTF-8"):
        draw_texts(path, samples=40, seed=0)
