"""Arguments that code written for sentence-transformers passes to ``SentenceTransformer.encode``.

``prompt``, ``prompt_name``, ``batch_size`` and ``show_progress_bar`` work. ``normalize_embeddings`` may have both
values: False, the default there, promises no other length. The rest are accepted with the value that a bundle honors
anyway; any other value is refused by name, never ignored.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

from gircse.runtime.errors import OptionError
from gircse.runtime.tokenization import Overflow


class EncodeArguments(TypedDict, total=False):
    """The keyword arguments of ``Embedder.encode``, for the methods that pass them on."""

    instruction: str | None
    steps: int | None
    batch_size: int
    batch_tokens: int
    all_steps: bool
    on_overflow: Overflow | str
    show_progress: bool
    prompt: str | None
    prompt_name: str | None
    show_progress_bar: bool | None
    output_value: str | None
    precision: str
    convert_to_numpy: bool
    convert_to_tensor: bool
    device: object
    normalize_embeddings: bool
    truncate_dim: int | None


class _Accepted(NamedTuple):
    """The one value of an argument that a bundle honors, why, and what to do instead of another."""

    value: object
    reason: str
    hint: str


_ACCEPTED: Mapping[str, _Accepted] = {
    "output_value": _Accepted(
        "sentence_embedding",
        "a bundle gives sentence embeddings only",
        "Leave it out; all_steps=True gives the vector of every refinement step.",
    ),
    "precision": _Accepted(
        "float32",
        "a bundle gives float32 vectors only",
        "Quantize the vectors yourself; Embedder(path, precision=...) chooses the precision of the graphs.",
    ),
    "convert_to_numpy": _Accepted(True, "the vectors are one numpy array", "Leave it out."),
    "convert_to_tensor": _Accepted(
        False, "the runtime has no torch", "Leave it out and wrap the result: torch.from_numpy(vectors)."
    ),
    "device": _Accepted(
        None, "the device is chosen when a bundle is opened", "Leave it out; use Embedder(path, provider='cuda')."
    ),
    "truncate_dim": _Accepted(
        None,
        "GIRCSE models are not trained for shorter vectors",
        "Leave it out; if you must, slice the vectors and normalize them again.",
    ),
}


def check_fixed_arguments(**given: object) -> None:
    """Refuse the arguments that have another value than a bundle honors.

    Raises:
        OptionError: one of them does.
    """
    for name, value in given.items():
        accepted = _ACCEPTED[name]
        if value != accepted.value:
            raise OptionError(name, f"is {value!r}", accepted.reason, accepted.hint)


def named_instruction(prompt_name: str | None, query_instruction: str) -> str:
    """Return the instruction that a prompt name stands for.

    Raises:
        OptionError: the name is neither ``query`` nor ``document``.
    """
    if prompt_name not in (None, "query", "document"):
        raise OptionError(
            "prompt_name",
            f"is {prompt_name!r}",
            "a bundle has query and document",
            "Pass the text itself as instruction.",
        )
    return query_instruction if prompt_name == "query" else ""
