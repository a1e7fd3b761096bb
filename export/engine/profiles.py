"""Optimization profiles: from ranges of batch and tokens to the shape range of every engine input.

An unrolled engine has one profile for each name. A stepwise engine of TensorRT has two, one that expects a prompt and
one that expects a step; their ranges overlap, because fixed sizes would be folded into kernels with weights of their
own (measured with TensorRT for RTX: a plan of 2.1 times the weights). TensorRT for RTX compiles its kernels for the
shapes that it meets, so there one profile serves both passes, and a second one would only add to build time and plan.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from gircse.runtime import tensor_names
from gircse.runtime.errors import ExportError
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import EngineProfile, ShapeRange, Stage

MAX_SIZE = 2**31 - 1
"""TensorRT cuts larger ones to 32 bits and says nothing (measured with TensorRT for RTX 1.7)."""


class SizeRange(NamedTuple):
    """Smallest, expected and largest size of a dimension."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``8``, ``1:64`` (smallest and largest) or ``1:8:64``.

        Raises:
            ValueError: another form, or sizes that are not in order, below 1 or above ``MAX_SIZE``.
        """
        if not re.fullmatch(r"\d+(:\d+){0,2}", text):
            raise ValueError(f"{text!r} | MIN:EXPECTED:MAX, MIN:MAX or one number | write for example 1:8:64")
        sizes = [int(part) for part in text.split(":")]
        found = cls(sizes[0], sizes[len(sizes) // 2] if len(sizes) == 3 else sizes[-1], sizes[-1])
        if not 1 <= found.min <= found.opt <= found.max <= MAX_SIZE:
            raise ValueError(f"{text!r} | sizes of 1 to {MAX_SIZE}, in order | write for example 1:8:64")
        return found


DEFAULT_BATCH = SizeRange(1, 8, 64)
DEFAULT_TOKENS = 64
"""What a run is expected to be, unless the user says otherwise."""


@dataclass(frozen=True)
class ProfileSpec:
    """A named profile as users see it.

    Attributes:
        name: such as ``latency``.
        batch: texts of a run.
        tokens: tokens of a prompt.
    """

    name: str
    batch: SizeRange
    tokens: SizeRange

    @classmethod
    def parse(cls, text: str, *, tokens: SizeRange) -> Self:
        """Read ``NAME=BATCH`` or ``NAME=BATCHxTOKENS``; ``tokens`` is taken where the text has none.

        Raises:
            ValueError: another form.
        """
        name, _, sizes = text.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not sizes:
            raise ValueError(f"{text!r} | NAME=BATCH or NAME=BATCHxTOKENS | write for example latency=1x1:64:512")
        batch, cross, own = sizes.partition("x")
        return cls(name, SizeRange.parse(batch), SizeRange.parse(own) if cross else tokens)


def default_specs(provider: Provider, batch: SizeRange, tokens: SizeRange) -> list[ProfileSpec]:
    """Return a latency profile at batch 1 and a throughput profile; for RTX the latter alone, which covers both."""
    throughput = ProfileSpec("throughput", batch, tokens)
    if provider is Provider.TENSORRT_RTX or batch.max == 1:
        return [throughput]
    return [ProfileSpec("latency", SizeRange(1, 1, 1), tokens), throughput]


def engine_profiles(
    specs: Sequence[ProfileSpec], facts: GraphFacts, *, layout: Layout, provider: Provider
) -> list[EngineProfile]:
    """Return the profiles of an engine, in its order.

    Raises:
        ExportError: a prompt longer than the bundle takes, or two profiles of one name.
    """
    for spec in specs:
        if spec.tokens.max > facts.max_tokens:
            raise ExportError(
                f"profile {spec.name}: {spec.tokens.max} tokens | at most the {facts.max_tokens} of the bundle | "
                "lower --tokens, or export again with --max-tokens"
            )
    if len({spec.name for spec in specs}) < len(specs):
        raise ExportError(
            f"--profiles: {', '.join(spec.name for spec in specs)} | one profile of each name | rename one"
        )
    if layout is Layout.UNROLLED:
        return [EngineProfile(spec.name, Stage.ANY, _prompt_shapes(spec)) for spec in specs]
    stages = (Stage.ANY,) if provider is Provider.TENSORRT_RTX else (Stage.PROMPT, Stage.STEP)
    if not facts.steps:
        stages = (Stage.PROMPT,)
    return [EngineProfile(spec.name, stage, _stepwise_shapes(spec, facts, stage)) for spec in specs for stage in stages]


def _prompt_shapes(spec: ProfileSpec) -> dict[str, ShapeRange]:
    shapes = ShapeRange(*zip(spec.batch, spec.tokens, strict=True))
    return {tensor_names.INPUT_IDS: shapes, tensor_names.ATTENTION_MASK: shapes}


def _stepwise_shapes(spec: ProfileSpec, facts: GraphFacts, stage: Stage) -> dict[str, ShapeRange]:
    """Return ranges that hold the stage, and expect it.

    The smallest sizes of a stage fit together, a prompt without past or a step after the shortest prompt. Those of both
    stages cannot: no tokens and no soft token is no run at all, which TensorRT remarks on and goes on.
    """
    steps, tokens = facts.steps, spec.tokens
    step = stage is Stage.STEP
    middle = tokens.opt + steps // 2
    new = SizeRange(0 if stage is not Stage.PROMPT else tokens.min, 0 if step else tokens.opt, tokens.max)
    past = SizeRange(tokens.min if step else 0, middle if step else 0, tokens.max + max(steps - 1, 0))
    total = SizeRange(tokens.min + step, middle + 1 if step else tokens.opt, tokens.max + steps)
    soft = SizeRange(int(step), int(step), int(steps > 0))

    def shapes(size: SizeRange, *rest: int) -> ShapeRange:
        return ShapeRange(*((batch, dim, *rest) for batch, dim in zip(spec.batch, size, strict=True)))

    cache = dict.fromkeys(tensor_names.cache_names("past", facts.num_layers), shapes(past, facts.kv_size))
    hidden = {tensor_names.HIDDEN: shapes(soft, facts.hidden_size)} if steps else {}
    return {tensor_names.INPUT_IDS: shapes(new), tensor_names.ATTENTION_MASK: shapes(total), **hidden, **cache}
