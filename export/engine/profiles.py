"""Optimization profiles: from ranges of batch and tokens to the shape range of every engine input.

An unrolled engine has one profile for each name. A stepwise engine of TensorRT has two, one optimized for the prompt
and one for a step; their ranges overlap, because fixed sizes would be folded into kernels with separate weights
(measured with TensorRT for RTX: a plan of 2.1 times the weights). TensorRT for RTX compiles its kernels for the shapes
that it meets, so there one profile serves both passes, and a second one would only add to build time and plan.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from gircse.runtime import tensor_names
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import EngineProfile, ShapeRange, Stage

MAX_SIZE = 2**31 - 1
"""TensorRT silently truncates larger ones to 32 bits (measured with TensorRT for RTX 1.7)."""


class SizeRange(NamedTuple):
    """The min, opt and max size of a dimension."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``8``, ``1:64`` (min and max) or ``1:8:64``.

        Raises:
            OptionError: another form, or sizes that are not in order, below 1 or above ``MAX_SIZE``.
        """
        example = "Write for example 1:8:64."
        if not re.fullmatch(r"\d+(:\d+){0,2}", text):
            raise OptionError(repr(text), "is not MIN:OPT:MAX, MIN:MAX or one number", None, example)
        sizes = [int(part) for part in text.split(":")]
        found = cls(sizes[0], sizes[len(sizes) // 2] if len(sizes) == 3 else sizes[-1], sizes[-1])
        if not 1 <= found.min <= found.opt <= found.max <= MAX_SIZE:
            raise OptionError(repr(text), f"is not a range of sizes from 1 to {MAX_SIZE}, in order", None, example)
        return found


DEFAULT_BATCH = SizeRange(1, 8, 64)
DEFAULT_TOKENS = 64
"""The sizes to optimize for, unless the user names others."""


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
        """Read ``NAME=BATCH`` or ``NAME=BATCHxTOKENS``; ``tokens`` is the default of the latter.

        Raises:
            OptionError: another form.
        """
        flag = f"--profiles {text!r}"
        name, _, sizes = text.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not sizes:
            example = "Write for example latency=1x1:64:512."
            raise OptionError(flag, "is not NAME=BATCH or NAME=BATCHxTOKENS", None, example)
        batch, cross, own = sizes.partition("x")
        try:
            return cls(name, SizeRange.parse(batch), SizeRange.parse(own) if cross else tokens)
        except OptionError as err:
            raise OptionError(f"{flag}: {err.where}", err.got, err.expected, err.hint) from err


def default_specs(provider: Provider, batch: SizeRange, tokens: SizeRange) -> list[ProfileSpec]:
    """Return a latency profile at batch 1 and a throughput profile; for RTX the latter alone, which covers both."""
    throughput = ProfileSpec("throughput", batch, tokens)
    if provider is Provider.TENSORRT_RTX or batch.max == 1:
        return [throughput]
    return [ProfileSpec("latency", SizeRange(1, 1, 1), tokens), throughput]


def engine_profiles(
    specs: Sequence[ProfileSpec],
    facts: GraphFacts,
    *,
    layout: Layout,
    provider: Provider,
    layer_outputs: bool = False,
) -> list[EngineProfile]:
    """Return the profiles of an engine, in its order.

    Args:
        specs: as users see them.
        facts: what the graph computes.
        layout: of the graph.
        provider: which TensorRT.
        layer_outputs: with the inputs that replace the values between the layers of the stepwise layout.

    Raises:
        OptionError: a prompt longer than the bundle takes, or two profiles of one name.
    """
    for spec in specs:
        if spec.tokens.max > facts.max_tokens:
            raise OptionError(
                f"profile {spec.name}",
                f"has prompts of {spec.tokens.max} tokens",
                f"the bundle takes at most {facts.max_tokens}",
                f"Lower --tokens, or export again with --max-tokens {spec.tokens.max}.",
            )
    if len({spec.name for spec in specs}) < len(specs):
        raise OptionError("--profiles", f"names a profile twice: {', '.join(spec.name for spec in specs)}")
    if layout is Layout.UNROLLED:
        return [EngineProfile(spec.name, Stage.ANY, _prompt_shapes(spec)) for spec in specs]
    stages = (Stage.ANY,) if provider is Provider.TENSORRT_RTX else (Stage.PROMPT, Stage.STEP)
    if not facts.steps:
        stages = (Stage.PROMPT,)
    return [
        EngineProfile(spec.name, stage, _stepwise_shapes(spec, facts, stage, layer_outputs=layer_outputs))
        for spec in specs
        for stage in stages
    ]


def _prompt_shapes(spec: ProfileSpec) -> dict[str, ShapeRange]:
    shapes = ShapeRange(*zip(spec.batch, spec.tokens, strict=True))
    return {tensor_names.INPUT_IDS: shapes, tensor_names.ATTENTION_MASK: shapes}


def _stepwise_shapes(
    spec: ProfileSpec, facts: GraphFacts, stage: Stage, *, layer_outputs: bool
) -> dict[str, ShapeRange]:
    """Return ranges that hold every stage, their opt sizes being those of this one.

    The min sizes of one stage fit together: a prompt without past, or a step after the shortest prompt. Those of both
    stages cannot: no tokens and no soft token is not a run at all, about which TensorRT only warns.
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
    found = {tensor_names.INPUT_IDS: shapes(new), tensor_names.ATTENTION_MASK: shapes(total), **hidden, **cache}
    if layer_outputs:
        sizes = [
            new,
            *([soft] if steps else []),
            *[SizeRange(*map(sum, zip(new, soft, strict=True)))] * facts.num_layers,
        ]
        names = tensor_names.layer_inputs(facts.num_layers, prompt=True, step=steps > 0)
        found[tensor_names.FORCE] = ShapeRange(*[(1, 1, 1)] * 3)
        for name, size in zip(names, sizes, strict=True):
            found[name + tensor_names.FORCED] = shapes(size, facts.hidden_size)
    return found
