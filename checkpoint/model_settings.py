"""The model to export or calibrate and its refinement: settings and flags that both commands share."""

import argparse
import math
from dataclasses import dataclass

from gircse.runtime.errors import OptionError, member_of
from gircse.runtime.manifest import MAX_STEPS, Pooling, TokenizerKind

DEFAULT_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model, its adapter, and the refinement.

    Attributes:
        steps: K, 0 to 64.
        model: ``demo``, a local directory or a Hugging Face id.
        adapter: directory or Hugging Face id of a LoRA, ``none``, or None for the model's default.
        revision: revision of a Hugging Face model.
        pooling: ``mean`` or ``last``.
        temperature: divisor of the logits.
        max_tokens: longest prompt.
        allow_partial_adapter: accept an adapter with tensors for some of the layers that its config targets.
        tokenizer: ``json`` or ``auto``: which token ids are those of the model.
        add_eos: append the end-of-sequence token to every prompt.
    """

    steps: int = DEFAULT_STEPS
    model: str = "demo"
    adapter: str | None = None
    revision: str | None = None
    pooling: Pooling = Pooling.MEAN
    temperature: float = 1.0
    max_tokens: int = 512
    allow_partial_adapter: bool = False
    tokenizer: TokenizerKind = TokenizerKind.JSON
    add_eos: bool = False

    def __post_init__(self) -> None:
        """Take plain strings for the enums, and refuse values that no model has.

        Raises:
            OptionError: a value is out of its range.
        """
        object.__setattr__(self, "pooling", member_of(Pooling, "--pooling", self.pooling))
        object.__setattr__(self, "tokenizer", member_of(TokenizerKind, "--tokenizer", self.tokenizer))
        check_range("--steps", self.steps, 0 <= self.steps <= MAX_STEPS, f"0 to {MAX_STEPS}")
        finite = math.isfinite(self.temperature) and self.temperature > 0
        check_range("--temperature", self.temperature, finite, "a finite number above 0; models are trained with 1")
        check_range("--max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")


def check_range(flag: str, value: object, fits: bool, allowed: str) -> None:
    """Refuse a flag whose value does not fit.

    Raises:
        OptionError: it does not.
    """
    if not fits:
        raise OptionError(flag, f"is {value}", f"it can be {allowed}")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``ModelSettings``; what is not given is absent from the parsed arguments."""
    group = parser.add_argument_group("model")
    defaults = ModelSettings()
    group.add_argument(
        "--model", default=argparse.SUPPRESS, help="'demo', a directory or a Hugging Face id (default: demo)"
    )
    group.add_argument(
        "--adapter", default=argparse.SUPPRESS, help="directory or Hugging Face id of a PEFT LoRA, or 'none'"
    )
    group.add_argument(
        "--allow-partial-adapter",
        action="store_true",
        default=argparse.SUPPRESS,
        help="accept an adapter that lacks some of the layers that its config targets",
    )
    group.add_argument("--revision", default=argparse.SUPPRESS, help="branch, tag or commit of a Hugging Face model")
    group.add_argument(
        "--steps",
        type=int,
        default=argparse.SUPPRESS,
        metavar="K",
        help=f"refinement steps, 0 to {MAX_STEPS} (default: {defaults.steps})",
    )
    group.add_argument(
        "--pooling",
        type=Pooling,
        choices=list(Pooling),
        default=argparse.SUPPRESS,
        metavar="mean|last",
        help=f"what becomes of the step states (default: {defaults.pooling})",
    )
    group.add_argument(
        "--temperature", type=float, default=argparse.SUPPRESS, metavar="T", help="divisor of the logits (default: 1)"
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"longest prompt in tokens (default: {defaults.max_tokens})",
    )
    group.add_argument(
        "--tokenizer",
        type=TokenizerKind,
        choices=list(TokenizerKind),
        default=argparse.SUPPRESS,
        metavar="json|auto",
        help="token ids of tokenizer.json and what the files beside it add, as transformers 4 read them, "
        f"or those of AutoTokenizer here (default: {defaults.tokenizer})",
    )
    group.add_argument(
        "--add-eos",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="append the end-of-sequence token to every prompt, for models that were trained so (default: no)",
    )
