"""Profiles of an engine, from the command line's text to shapes."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from gircse.export.engine.profiles import (
    DEFAULT_BATCH,
    MAX_SIZE,
    ProfileSpec,
    SizeRange,
    default_specs,
    engine_profiles,
)
from gircse.runtime import tensor_names
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import GraphFacts, Layout, Pooling
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import EngineProfile, ShapeRange, Stage
from gircse.runtime.trt.library import MODULES
from gircse.runtime.trt.memory_layout import MemoryLayout
from gircse.runtime.trt.profile_selection import ProfileSelector

STEPS = (0, 1, 2, 5, 20)
SIZES = [
    (SizeRange(1, 8, 64), SizeRange(1, 64, 512)),
    (SizeRange(1, 1, 1), SizeRange(1, 1, 1)),
    (SizeRange(2, 3, 5), SizeRange(7, 30, 33)),
    (SizeRange(4, 4, 4), SizeRange(512, 512, 512)),
]


def make_facts(steps: int, layout: Layout = Layout.STEPWISE) -> GraphFacts:
    return GraphFacts(
        architecture="tiny",
        layout=layout,
        steps=steps,
        pooling=Pooling.MEAN,
        temperature=1.0,
        max_tokens=512,
        hidden_size=10,
        num_layers=2,
        kv_size=6,
        vocab_size=50,
    )


def make_profiles(
    steps: int,
    layout: Layout,
    provider: Provider,
    sizes: tuple[SizeRange, SizeRange],
    *,
    layer_outputs: bool = False,
) -> list[EngineProfile]:
    return engine_profiles(
        default_specs(provider, *sizes),
        make_facts(steps),
        layout=layout,
        provider=provider,
        layer_outputs=layer_outputs,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", (8, 8, 8)), ("1:64", (1, 64, 64)), ("1:8:64", (1, 8, 64)), ("5:5:5", (5, 5, 5)), ("1:2147483647", None)],
)
def test_size_range(text: str, expected: tuple[int, int, int] | None) -> None:
    assert SizeRange.parse(text) == (expected or (1, MAX_SIZE, MAX_SIZE))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "MIN:OPT:MAX"),
        ("1:", "MIN:OPT:MAX"),
        (":8", "MIN:OPT:MAX"),
        ("1:2:3:4", "MIN:OPT:MAX"),
        ("-1:8", "MIN:OPT:MAX"),
        ("1.5", "MIN:OPT:MAX"),
        (" 8", "MIN:OPT:MAX"),
        ("8\n", "MIN:OPT:MAX"),
        ("1x64", "MIN:OPT:MAX"),
        ("0:8:64", "in order"),
        ("0", "in order"),
        ("8:1:64", "in order"),
        ("1:64:8", "in order"),
        ("64:8", "in order"),
        ("1:8:2147483648", "sizes from 1 to 2147483647"),
    ],
)
def test_invalid_sizes(text: str, expected: str) -> None:
    with pytest.raises(OptionError, match=r"Write for example 1:8:64\.$") as caught:
        SizeRange.parse(text)
    assert caught.value.where == repr(text)
    assert expected in caught.value.got


def test_profile_spec() -> None:
    tokens = SizeRange(1, 64, 512)
    assert ProfileSpec.parse("latency=1", tokens=tokens) == ProfileSpec("latency", SizeRange(1, 1, 1), tokens)
    assert ProfileSpec.parse("my-own_2=1:8:64x16:300", tokens=tokens) == ProfileSpec(
        "my-own_2", SizeRange(1, 8, 64), SizeRange(16, 300, 300)
    )
    # The name may contain the letter that separates batch and tokens.
    assert ProfileSpec.parse("xx=2x3", tokens=tokens) == ProfileSpec("xx", SizeRange(2, 2, 2), SizeRange(3, 3, 3))


@pytest.mark.parametrize("text", ["", "latency", "=1", "latency=", "a b=1", "a/b=1", "1:8:64"])
def test_profile_specs_without_name_or_sizes(text: str) -> None:
    match = r"^--profiles '.*' is not NAME=BATCH or NAME=BATCHxTOKENS\. Write for example latency=1x1:64:512\.$"
    with pytest.raises(OptionError, match=match):
        ProfileSpec.parse(text, tokens=SizeRange(1, 1, 1))


@pytest.mark.parametrize("text", ["a=0", "a=8:1", "a=b", "a=1x", "a=x8", "a=1x8x9", "a=1X8", "a=1x0", "a==1"])
def test_profile_specs_with_bad_sizes(text: str) -> None:
    with pytest.raises(OptionError, match=rf"^--profiles '{text}': '.*' is not .*\. Write for example 1:8:64\.$"):
        ProfileSpec.parse(text, tokens=SizeRange(1, 1, 1))


def test_default_specs() -> None:
    tokens = SizeRange(1, 64, 512)
    latency, throughput = default_specs(Provider.TENSORRT, DEFAULT_BATCH, tokens)
    assert latency == ProfileSpec("latency", SizeRange(1, 1, 1), tokens)
    assert throughput == ProfileSpec("throughput", DEFAULT_BATCH, tokens)
    assert default_specs(Provider.TENSORRT_RTX, DEFAULT_BATCH, tokens) == [throughput]
    # At batch 1 both would be the same.
    (only,) = default_specs(Provider.TENSORRT, SizeRange(1, 1, 1), tokens)
    assert only.batch == (1, 1, 1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("provider", MODULES)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("steps", STEPS)
def test_ranges_are_in_order(
    steps: int, layout: Layout, provider: Provider, sizes: tuple[SizeRange, SizeRange]
) -> None:
    for profile in make_profiles(steps, layout, provider, sizes):
        assert set(profile.shapes) == set(MemoryLayout(make_facts(steps), layout, 2).input_shapes(1, 1, 0))
        for name, shape in profile.shapes.items():
            for low, expected, high in zip(shape.min, shape.opt, shape.max, strict=True):
                assert 0 <= low <= expected <= high, (profile.name, profile.stage, name)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("provider", MODULES)
@pytest.mark.parametrize("steps", STEPS)
def test_prompts_may_begin_with_a_prefix(steps: int, provider: Provider, sizes: tuple[SizeRange, SizeRange]) -> None:
    """Without a minimum of texts or tokens; with one, a remainder could not be padded to it."""
    batch, tokens = sizes
    profiles = make_profiles(steps, Layout.STEPWISE, provider, sizes)
    manifest: Any = SimpleNamespace(layout=Layout.STEPWISE, profiles=profiles)
    selector = ProfileSelector(manifest, MemoryLayout(make_facts(steps), Layout.STEPWISE, 2), "")
    assert selector.takes_prefixes == (batch.min == tokens.min == 1)
    if selector.takes_prefixes:
        for prefix in range(1, tokens.max):
            selector.select(1, prefix)
            for own in {1, tokens.max - prefix}:
                assert selector.select(batch.max, own, prefix).tokens == own


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("provider", MODULES)
@pytest.mark.parametrize(
    ("layout", "layers"), [(Layout.UNROLLED, False), (Layout.STEPWISE, False), (Layout.STEPWISE, True)]
)
@pytest.mark.parametrize("steps", STEPS)
def test_every_pass_lies_in_a_profile_of_its_stage(
    steps: int, layout: Layout, provider: Provider, sizes: tuple[SizeRange, SizeRange], *, layers: bool
) -> None:
    """At the corners of batch and tokens; one profile holds the prompt, and one all of its steps."""
    profiles = make_profiles(steps, layout, provider, sizes, layer_outputs=layers)
    memory = MemoryLayout(make_facts(steps), layout, 2, layer_outputs=layers)

    def holders(stage: Stage, batch: int, tokens: int, number: int) -> set[str]:
        shapes = memory.input_shapes(batch, tokens, number)
        return {
            profile.name
            for profile in profiles
            if profile.stage in (stage, Stage.ANY)
            and all(profile.shapes[name].holds(shape) for name, shape in shapes.items())
        }

    for batch, tokens in itertools.product(*map(set, sizes)):
        passes = [(Stage.PROMPT, 0), *((Stage.STEP, number) for number in range(1, memory.last_pass + 1))]
        names = [holders(stage, batch, tokens, number) for stage, number in passes]
        expected = {"throughput"} | ({"latency"} if batch == 1 and sizes[0].max > 1 else set())
        if provider is Provider.TENSORRT_RTX:
            expected = {"throughput"}
        assert all(found == expected for found in names), (batch, tokens, names)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("steps", STEPS)
def test_what_is_out_of_range_lies_in_no_profile(steps: int, layout: Layout) -> None:
    profiles = make_profiles(steps, layout, Provider.TENSORRT, (SizeRange(2, 3, 5), SizeRange(7, 30, 33)))
    memory = MemoryLayout(make_facts(steps), layout, 2)
    for batch, tokens in ((6, 7), (2, 6), (2, 34)):
        shapes = memory.input_shapes(batch, tokens, 0)
        prompts = [profile for profile in profiles if profile.stage is not Stage.STEP]
        assert prompts
        assert not any(all(p.shapes[name].holds(shape) for name, shape in shapes.items()) for p in prompts)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", STEPS)
def test_min_and_opt_sizes_of_a_stage_are_a_run(steps: int, sizes: tuple[SizeRange, SizeRange]) -> None:
    """Old, new and soft tokens make up the mask; TensorRT tries a profile's min shapes together, and its opt shapes."""
    profiles = make_profiles(steps, Layout.STEPWISE, Provider.TENSORRT, sizes, layer_outputs=True)
    assert {profile.stage for profile in profiles} == ({Stage.PROMPT, Stage.STEP} if steps else {Stage.PROMPT})
    for profile in profiles:
        for which in ("min", "opt"):
            new, total, past = (
                getattr(profile.shapes[name], which)[1] for name in ("input_ids", "attention_mask", "past.1.value")
            )
            soft = getattr(profile.shapes[tensor_names.HIDDEN], which)[1] if steps else 0
            assert new + soft + past == total
            assert (new == 0, past > 0, soft == 1) == (profile.stage is Stage.STEP,) * 3
            assert getattr(profile.shapes["decoder/layer.1.forced"], which)[1] == new + soft
        batches = {
            (shape.min[0], shape.opt[0], shape.max[0])
            for name, shape in profile.shapes.items()
            if name != tensor_names.FORCE
        }
        assert batches == {(1, 1, 1) if profile.name == "latency" else tuple(sizes[0])}


def test_profiles_come_in_pairs_of_prompt_and_step() -> None:
    facts, tokens = make_facts(5), SizeRange(1, 64, 512)
    specs = [ProfileSpec("a", SizeRange(1, 1, 1), tokens), ProfileSpec("b", SizeRange(1, 2, 3), tokens)]
    found = engine_profiles(specs, facts, layout=Layout.STEPWISE, provider=Provider.TENSORRT)
    pairs = [("a", Stage.PROMPT), ("a", Stage.STEP), ("b", Stage.PROMPT), ("b", Stage.STEP)]
    assert [(profile.name, profile.stage) for profile in found] == pairs
    for layout, provider in ((Layout.STEPWISE, Provider.TENSORRT_RTX), *((Layout.UNROLLED, name) for name in MODULES)):
        found = engine_profiles(specs, facts, layout=layout, provider=provider)
        assert [(profile.name, profile.stage) for profile in found] == [("a", Stage.ANY), ("b", Stage.ANY)]


@pytest.mark.parametrize("provider", MODULES)
def test_without_steps_there_is_only_the_prompt(provider: Provider) -> None:
    profiles = make_profiles(0, Layout.STEPWISE, provider, SIZES[0])
    assert {profile.stage for profile in profiles} == {Stage.PROMPT}
    assert all(tensor_names.HIDDEN not in profile.shapes for profile in profiles)
    assert profiles[-1].shapes[tensor_names.ATTENTION_MASK] == ShapeRange((1, 1), (8, 64), (64, 512))


def test_shapes_by_hand() -> None:
    """K = 5, batch 2:3:5, tokens 7:30:33: a step reads up to 33 + 4 old tokens and masks 38."""
    _, _, prompt, step = make_profiles(
        5, Layout.STEPWISE, Provider.TENSORRT, (SizeRange(2, 3, 5), SizeRange(7, 30, 33))
    )
    assert prompt.shapes["input_ids"] == ShapeRange((2, 7), (3, 30), (5, 33))
    assert prompt.shapes["attention_mask"] == ShapeRange((2, 7), (3, 30), (5, 38))
    assert prompt.shapes["past.0.key"] == ShapeRange((2, 0, 6), (3, 0, 6), (5, 37, 6))
    assert prompt.shapes["hidden"] == ShapeRange((2, 0, 10), (3, 0, 10), (5, 1, 10))
    assert step.shapes["input_ids"] == ShapeRange((2, 0), (3, 0), (5, 33))
    assert step.shapes["attention_mask"] == ShapeRange((2, 8), (3, 33), (5, 38))
    assert step.shapes["past.0.key"] == ShapeRange((2, 7, 6), (3, 32, 6), (5, 37, 6))
    assert step.shapes["hidden"] == ShapeRange((2, 1, 10), (3, 1, 10), (5, 1, 10))


def test_profiles_that_the_bundle_cannot_have() -> None:
    facts, one = make_facts(5), SizeRange(1, 1, 1)
    match = r"profile long has prompts of 513 tokens; the bundle takes at most 512\. Lower .* --max-tokens 513\."
    with pytest.raises(OptionError, match=match):
        engine_profiles(
            [ProfileSpec("fits", one, one), ProfileSpec("long", one, SizeRange(1, 64, 513))],
            facts,
            layout=Layout.UNROLLED,
            provider=Provider.TENSORRT,
        )
    with pytest.raises(OptionError, match=r"--profiles names a profile twice: a, b, a\."):
        engine_profiles(
            [ProfileSpec(name, one, one) for name in "aba"],
            facts,
            layout=Layout.STEPWISE,
            provider=Provider.TENSORRT_RTX,
        )
