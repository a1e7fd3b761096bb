"""What tensors are called: one table of the schemes that checkpoints and adapters come in.

Everything in the toolkit uses the names of Hugging Face's causal LM (``model.layers.0...``, ``lm_head.weight``). A
scheme renames what was stored to these; the PyTorch reference is given the same renames.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gircse.runtime.errors import CheckpointError

EMBEDDING_TABLE = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

Renames = tuple[tuple[str, str], ...]
"""Regular expressions and what replaces their matches, in order."""

WRAPPERS: Renames = ((r"\b_orig_mod\.", ""), (r"\b_fsdp_wrapped_module\.", ""), (r"^module\.", ""))
"""What ``torch.compile``, FSDP and DataParallel put into names, anywhere or in front."""


@dataclass(frozen=True)
class NamingScheme:
    """How one kind of checkpoint names its tensors.

    Attributes:
        description: says so, as the rest of "tensors are named ...".
        renames: from these names to those of Hugging Face's causal LM.
        partial: the checkpoint holds more than the language model, which is left out.
    """

    description: str
    renames: Renames
    partial: bool = False


SCHEMES = (
    NamingScheme("as in Hugging Face's causal LM", ()),
    NamingScheme("without the prefix 'model.'", ((r"^(layers\.|embed_tokens\.|norm\.)", r"model.\1"),)),
    NamingScheme("as a multimodal model's 'model.language_model.'", ((r"^model\.language_model\.", "model."),), True),
    NamingScheme(
        "as a multimodal model's 'language_model.'",
        ((r"^language_model\.(model\.|lm_head\.)", r"\1"), (r"^language_model\.(?=\w)", "model.")),
        True,
    ),
)


@dataclass(frozen=True)
class MatchedNames:
    """Stored names, matched with those of Hugging Face's causal LM.

    Attributes:
        stored: name in the causal LM to the name that is stored.
        left_over: stored names that are none of its.
        renames: what leads from the stored names to the causal LM's; empty where they are the same.
        scheme: the scheme.
    """

    stored: Mapping[str, str]
    left_over: tuple[str, ...]
    renames: Renames
    scheme: NamingScheme


def match_names(stored: Collection[str], wanted: Collection[str], *, where: str) -> MatchedNames:
    """Find the scheme by which the most stored names are wanted ones.

    Args:
        stored: names of tensors.
        wanted: names in the causal LM, of tensors or of the modules that own them.
        where: the file or folder, for errors.

    Raises:
        CheckpointError: two stored names mean the same tensor.
    """
    wrapped: Renames = tuple(rename for rename in WRAPPERS if any(re.search(rename[0], name) for name in stored))
    tried = [(scheme, {name: rename(name, (*wrapped, *scheme.renames)) for name in stored}) for scheme in SCHEMES]
    scheme, names = max(tried, key=lambda found: sum(name in wanted for name in found[1].values()))
    matched: dict[str, str] = {}
    for name in sorted(stored):
        if names[name] not in wanted:
            continue
        if (other := matched.get(names[name])) is not None:
            raise CheckpointError(where, f"holds {names[name]} twice, as {other} and as {name}", None, "Remove one.")
        matched[names[name]] = name
    left_over = tuple(sorted(set(stored) - set(matched.values())))
    return MatchedNames(matched, left_over, (*wrapped, *scheme.renames), scheme)


def rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """Apply renames in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
