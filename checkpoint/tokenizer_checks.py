"""Compares the readings of a checkpoint's tokenizer on awkward texts, before a bundle takes one of them."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from gircse.checkpoint.awkward_texts import awkward_texts
from gircse.checkpoint.tokenizer import CheckpointTokenizer, open_checkpoint_tokenizer, option_of, other_kind
from gircse.runtime.errors import CheckpointError
from gircse.runtime.manifest import TokenizerKind
from gircse.runtime.tokenization import tokenize


def check_serialized(tokenizer: CheckpointTokenizer, texts: Iterable[str] = ()) -> None:
    """Make sure that the serialized tokenizer gives the ids of transformers, on awkward texts.

    Args:
        tokenizer: of a checkpoint.
        texts: more texts to try.

    Raises:
        CheckpointError: one text has other ids.
    """
    tried = [*awkward_texts(tokenizer.added_tokens), *texts]
    pad = tokenizer.pad_token_id
    wanted = [ids or [pad] for ids in tokenizer.token_ids(tried)]
    found = tokenize(tokenizer.serialized, tried, empty_token_id=pad)
    for text, theirs, ours in zip(tried, wanted, found, strict=True):
        if theirs != ours:
            raise CheckpointError(
                str(tokenizer.directory),
                f"has a tokenizer that no tokenizer.json can hold: {_shown(text)} becomes {_shown(ours)}",
                f"{type(tokenizer.hugging_face).__name__} of transformers gives {_shown(theirs)}",
                f"Try {option_of(other_kind(tokenizer.kind))}.",
            )


def difference_note(tokenizer: CheckpointTokenizer, *, vocab_size: int) -> str | None:
    """Compare the token ids with those of the other kind on awkward texts.

    Returns:
        One line that shows a difference and says how to choose, or None if there is none.
    """
    kind, second = tokenizer.kind, other_kind(tokenizer.kind)
    try:
        other = open_checkpoint_tokenizer(tokenizer.directory, second, vocab_size=vocab_size)
        texts = awkward_texts([*tokenizer.added_tokens, *other.added_tokens])
        pairs = list(zip(texts, tokenizer.token_ids(texts), other.token_ids(texts), strict=True))
    except CheckpointError as err:
        return f"{option_of(second)} cannot be compared: {err}"
    different = [pair for pair in pairs if pair[1] != pair[2]]
    if not different:
        return None
    text, ours, theirs = min(different, key=lambda pair: max(len(pair[1]), len(pair[2])))
    auto = (tokenizer if kind is TokenizerKind.AUTO else other).hugging_face
    cause = f"AutoTokenizer of transformers {version('transformers')} makes a {type(auto).__name__}"
    return (
        f"the token ids are those of {option_of(kind)}; {option_of(second)} gives others for {len(different)} of "
        f"{len(texts)} awkward texts ({_shown(text)} is {_shown(ours)} here, {_shown(theirs)} there): {cause}. "
        "Choose what the model was trained with"
    )


def adapter_note(model: Path, adapter: Path | None) -> str | None:
    """Return one line if an adapter's folder has a tokenizer.json that is not the model's, else None."""
    theirs, ours = (adapter or model) / "tokenizer.json", model / "tokenizer.json"
    if adapter is None or not theirs.is_file() or (ours.is_file() and ours.read_bytes() == theirs.read_bytes()):
        return None
    return f"the adapter's own {theirs} is not used: the tokenizer is the model's, as in the official code"


def _shown(value: str | Sequence[int]) -> str:
    """Return a text or its ids, shortened."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:40]}...")
    return f"[{', '.join(str(token) for token in value[:8])}{', ...' if value[8:] else ''}]"
