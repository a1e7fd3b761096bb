"""The tokenizer of a checkpoint, as one ``tokenizer.json`` that gives the same ids without the files beside it.

``tokenizer.json`` alone is not the whole tokenizer: tokenizer_config.json, special_tokens_map.json and
added_tokens.json add tokens and change flags, and older checkpoints have other files instead of it. Nor is
``AutoTokenizer`` simply the truth: that of transformers 5 rebuilds some tokenizers (``LlamaTokenizer``) with other ids
than transformers 4, which the public adapters were trained with. ``TokenizerKind`` names the two readings.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.source import read_json
from gircse.runtime.errors import CheckpointError, OptionError
from gircse.runtime.manifest import TokenizerKind, TruncationSide
from gircse.runtime.tokenization import PROMPT_TEMPLATE, PromptTokenizer, parse_tokenizer

_CONFIG = "tokenizer_config.json"
_TEKKEN = "tekken.json"
_CONVERTIBLE = ("tokenizer.model", "tiktoken.model", "vocab.json", _TEKKEN)
_LLAMA_CLASSES = {"LlamaTokenizer", "LlamaTokenizerFast"}
_LLAMA_MODEL_TYPES = {"llama", "mistral", "mixtral", "phi3"}
_SPACE = "\u2581"

MOST_NAMED = 5
"""Tokens that a note names one by one."""


@dataclass(frozen=True)
class CheckpointTokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
        directory: the checkpoint.
        kind: which reading of it this is.
        hugging_face: the tokenizer of transformers that defines the ids.
        pad_token_id: the end-of-sequence token, which is the padding, as in the reference code.
        notes: what a user should know of it, one line each.
    """

    directory: Path
    kind: TokenizerKind
    hugging_face: Any
    pad_token_id: int
    notes: tuple[str, ...]

    @property
    def eos_token(self) -> str | None:
        """The end-of-sequence token."""
        token: str | None = self.hugging_face.eos_token
        return token

    @property
    def truncation_side(self) -> TruncationSide:
        """The side on which transformers cuts a text that is too long."""
        return TruncationSide(self.hugging_face.truncation_side)

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that are found in a text before anything else."""
        return list(self.hugging_face.added_tokens_encoder)

    @cached_property
    def content(self) -> str:
        """The tokenizer as the content of a ``tokenizer.json``."""
        content: str = self.hugging_face.backend_tokenizer.to_str()
        return content

    @cached_property
    def serialized(self) -> Tokenizer:
        """What a reader makes of the content."""
        try:
            return parse_tokenizer(self.content)
        except ValueError as err:
            raise CheckpointError(
                str(self.directory),
                f"has a tokenizer that no tokenizer.json can hold: {err}",
                None,
                f"Try {option_of(other_kind(self.kind))}.",
            ) from err

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids that transformers gives to each text, without special tokens around it.

        Raises:
            CheckpointError: the tokenizer has no token for a part of a text.
        """
        with _quiet_and_translated(self.directory):
            ids: list[list[int]] = self.hugging_face(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def prompt_tokenizer(self, *, max_tokens: int, add_eos: bool = False) -> PromptTokenizer:
        """Return what turns texts into the ids that the model sees: here, and in the bundle.

        Raises:
            OptionError: ``add_eos`` is set, and there is no end-of-sequence token.
        """
        if add_eos and self.eos_token not in self.hugging_face.get_vocab():
            raise OptionError(
                "--add-eos",
                f"needs an end-of-sequence token, but that of {self.directory} is {self.eos_token!r}",
                None,
                f"Name the eos_token in {_CONFIG}, or leave --add-eos out.",
            )
        return PromptTokenizer(
            self.serialized,
            PROMPT_TEMPLATE,
            self.pad_token_id,
            max_tokens,
            prompt_suffix=self.eos_token or "" if add_eos else "",
            truncation_side=self.truncation_side,
        )


def open_checkpoint_tokenizer(directory: Path, kind: TokenizerKind, *, vocab_size: int) -> CheckpointTokenizer:
    """Open the tokenizer of a checkpoint.

    Args:
        directory: of the model.
        kind: which reading of its files.
        vocab_size: rows of the embedding table. Added tokens without a row, such as a ``[PAD]`` that never reaches the
            model, are left out, so that a text that holds one is read as ordinary text.

    Raises:
        CheckpointError: there is no tokenizer, it cannot be read or written as a tokenizer.json, it has no
            end-of-sequence token, or it is that of a larger model.
    """
    hugging_face = _load_json(directory) if kind is TokenizerKind.JSON else _load_auto(directory)
    if getattr(hugging_face, "backend_tokenizer", None) is None:
        raise CheckpointError(
            str(directory),
            f"has a {type(hugging_face).__name__} for {option_of(kind)}",
            "only tokenizers of the tokenizers library can be exported",
            f"Export with {option_of(other_kind(kind))}.",
        )
    if hugging_face.split_special_tokens:
        raise CheckpointError(
            str(directory / _CONFIG),
            "sets split_special_tokens",
            "a tokenizer.json cannot hold it",
            "Remove the setting, if the model was trained without it.",
        )
    hugging_face.backend_tokenizer.no_truncation()  # both are ours to do
    hugging_face.backend_tokenizer.no_padding()
    notes = [*_added_note(directory, hugging_face)] if kind is TokenizerKind.JSON else []
    hugging_face, left_out = _within(hugging_face, vocab_size, directory)
    if left_out:
        verb = "has no row" if len(left_out) == 1 else "have no rows"
        notes.append(f"{_named(left_out)} {verb} in the embedding table ({vocab_size} rows): read as ordinary text")
    pad = _pad_token_id(directory, hugging_face, vocab_size)
    return CheckpointTokenizer(directory, kind, hugging_face, pad, tuple(notes))


def _load_json(directory: Path) -> Any:
    """Load what transformers 4 would: tokenizer.json, or a conversion, with what the other files add."""
    import transformers

    config = _tokenizer_config(directory)
    present = [name for name in ("tokenizer.json", *_CONVERTIBLE) if (directory / name).is_file()]
    if not present:
        raise CheckpointError(
            str(directory / "tokenizer.json"),
            "is missing",
            f"and so is everything that it could be made of: {', '.join(_CONVERTIBLE)}",
            "Copy the tokenizer files of the model into this directory.",
        )
    if present[0] == "vocab.json":  # only the class of the model knows how to split words
        named: Any = getattr(transformers, str(config.get("tokenizer_class")).removesuffix("Fast"), None)
        if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedTokenizerBase)):
            named = transformers.AutoTokenizer
        return _from_pretrained(named.from_pretrained, directory)
    tokenizer = _from_pretrained(transformers.PreTrainedTokenizerFast.from_pretrained, directory)
    if "backend" in config:  # saved by transformers 5, whose tokenizer.json already has the prefix space or not
        return tokenizer
    if _is_llama(directory, config):
        _apply_llama_prefix_space(tokenizer.backend_tokenizer, config, converted=present[0] != "tokenizer.json")
    elif isinstance(prefix := config.get("add_prefix_space", False), bool):
        _apply_prefix_space(tokenizer.backend_tokenizer, prefix)
    return tokenizer


def _load_auto(directory: Path) -> Any:
    from transformers import AutoTokenizer

    _tokenizer_config(directory)
    return _from_pretrained(AutoTokenizer.from_pretrained, directory)


def _from_pretrained(load: Callable[..., Any], directory: Path) -> Any:
    with _quiet_and_translated(directory):
        return load(directory, trust_remote_code=False)


@contextlib.contextmanager
def _quiet_and_translated(directory: Path) -> Iterator[None]:
    """Silence transformers, and say in our words what it raises: anything, or a panic, which is not even Exception."""
    try:
        with quiet_transformers():
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as err:
        hint = "Complete the checkpoint's tokenizer files."
        if (directory / _TEKKEN).is_file() and not (directory / "tokenizer.json").is_file():
            hint = f"{_TEKKEN} is read with mistral-common: pip install mistral-common"
        reason = (str(err).strip() or type(err).__name__).splitlines()[0].partition(". ")[0]
        raise CheckpointError(
            f"The tokenizer of {directory}", f"cannot be used by transformers: {reason}", None, hint
        ) from err


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    return read_json(path) if path.is_file() else {}


def _is_llama(directory: Path, config: Mapping[str, Any]) -> bool:
    model = read_json(directory / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    return str(name) in _LLAMA_CLASSES if name else str(model.get("model_type")) in _LLAMA_MODEL_TYPES


def _apply_prefix_space(backend: Tokenizer, prefix: bool) -> None:
    """Apply ``add_prefix_space`` to a ``ByteLevel``; transformers 5 does so only where it rebuilds the tokenizer."""
    split = json.loads(backend.to_str())["pre_tokenizer"] or {}
    if split.pop("type", None) == "ByteLevel":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{**split, "add_prefix_space": prefix})


def _apply_llama_prefix_space(backend: Tokenizer, config: Mapping[str, Any], *, converted: bool) -> None:
    """Apply ``add_prefix_space`` to a Llama tokenizer, which transformers 4 converted anew where it was set.

    A null sets nothing, unless there is no tokenizer.json, so that the tokenizer is ``converted`` anyway.
    """
    prefix = config.get("add_prefix_space")
    if "add_prefix_space" not in config or (prefix is None and not converted):
        return
    if "ByteLevel" in str(backend.pre_tokenizer):
        _apply_prefix_space(backend, bool(prefix))
    elif config.get("legacy") in (None, True):
        prepend = [normalizers.Prepend(_SPACE)] if prefix else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
        backend.pre_tokenizer = None
    else:
        scheme = "first" if prefix else "never"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)


def _within(hugging_face: Any, vocab_size: int, directory: Path) -> tuple[Any, list[str]]:
    """Return a tokenizer without the added tokens beyond the embedding table, and those tokens.

    Raises:
        CheckpointError: an ordinary token has no row.
    """
    from transformers import PreTrainedTokenizerFast

    backend: Tokenizer = hugging_face.backend_tokenizer
    ordinary = backend.get_vocab(with_added_tokens=False)
    if (last := max(ordinary.values(), default=0)) >= vocab_size:
        raise CheckpointError(
            f"The tokenizer of {directory}",
            f"has tokens up to id {last}",
            f"the model's embedding table has {vocab_size} rows",
            "Use the tokenizer of this model.",
        )
    beyond = [token for token, index in backend.get_vocab().items() if index >= vocab_size]
    if not beyond:
        return hugging_face, []
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    kept = PreTrainedTokenizerFast(
        tokenizer_object=parse_tokenizer(json.dumps(content)),
        eos_token=hugging_face.eos_token if hugging_face.eos_token not in beyond else None,
        truncation_side=hugging_face.truncation_side,
    )
    return kept, beyond


def _added_note(directory: Path, hugging_face: Any) -> Iterable[str]:
    """Say which tokens the other files of the folder add to tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        yield f"no tokenizer.json in {directory}: converted with transformers {version('transformers')}"
        return
    content = read_json(path)
    known = {token["content"] for token in content.get("added_tokens", [])}
    backend: Tokenizer = hugging_face.backend_tokenizer
    if added := [token for token in hugging_face.added_tokens_encoder if token not in known]:
        ids = ", ".join(str(backend.token_to_id(token)) for token in added[:MOST_NAMED])
        yield f"the files beside tokenizer.json add {_named(added)} (id {ids}{' ...' if added[MOST_NAMED:] else ''})"


def _pad_token_id(directory: Path, hugging_face: Any, vocab_size: int) -> int:
    vocabulary, eos = hugging_face.get_vocab(), hugging_face.eos_token
    if eos in vocabulary:
        return int(vocabulary[eos])
    config = read_json(directory / "config.json")
    text = config.get("text_config")  # of a multimodal model
    ids = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    first = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(first, int):
        raise CheckpointError(
            str(directory),
            f"has no eos_token in {_CONFIG} and no eos_token_id in config.json",
            "short texts are padded with that token",
            "Add one of the two.",
        )
    if not 0 <= first < vocab_size:
        raise CheckpointError(
            str(directory / "config.json"),
            f"has the eos_token_id {first}",
            f"the embedding table has {vocab_size} rows",
            "Correct the eos_token_id.",
        )
    return first


def other_kind(kind: TokenizerKind) -> TokenizerKind:
    """Return the other reading."""
    return TokenizerKind.AUTO if kind is TokenizerKind.JSON else TokenizerKind.JSON


def option_of(kind: TokenizerKind) -> str:
    """Return the flag that chooses a reading, for messages."""
    return f"--tokenizer {kind}"


def _named(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - MOST_NAMED} more" if tokens[MOST_NAMED:] else ""
    return ", ".join(repr(token) for token in tokens[:MOST_NAMED]) + more
