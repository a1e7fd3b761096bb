"""Which profiles run a batch."""

import pytest
from msgspec.structs import replace
from support.engine_rig import MakeRig, make_facts, profile, random_batch, stage_profiles

from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import Layout
from gircse.runtime.trt.engine_manifest import Stage


@pytest.mark.parametrize(
    ("batch", "tokens", "expected"),
    [(1, 5, {1, 2}), (3, 9, {3, 4}), (4, 1, {3, 4}), (2, 10, {0}), (8, 2, {0}), (1, 12, {1, 2})],
)
def test_selects_the_stage_then_the_smallest_batch(rig: MakeRig, batch: int, tokens: int, expected: set[int]) -> None:
    made = rig(profiles=stage_profiles(make_facts()))
    made.run(batch, tokens)
    assert {context.index for context in made.module.contexts} == expected


def test_switches_between_profiles(rig: MakeRig) -> None:
    made = rig(profiles=stage_profiles(make_facts()))
    for seed in range(4):
        for batch, tokens in ((1, 5), (3, 9), (8, 2), (4, 1)):
            made.run(batch, tokens, seed=seed)


def test_prefixes_need_profiles_that_take_all_of_them(rig: MakeRig) -> None:
    """Padding to a minimum could make a prompt too long after its prefix that fits as a whole."""
    facts = make_facts()
    free = [profile(facts, Layout.STEPWISE, name=stage, stage=stage) for stage in Stage]
    assert rig(profiles=free).session.takes_prefixes
    for tied in (
        profile(facts, Layout.STEPWISE, tokens=(2, 12)),
        replace(free[0], shapes={name: replace(one, min=(2, *one.min[1:])) for name, one in free[0].shapes.items()}),
    ):
        assert not rig(profiles=[*free, tied]).session.takes_prefixes
    assert not rig(facts=make_facts(steps=0)).session.takes_prefixes  # its ranges hold no past
    assert not rig(Layout.UNROLLED).session.takes_prefixes


def test_prompts_are_as_long_as_without_a_prefix(rig: MakeRig) -> None:
    made = rig()
    made.run_after(4, 2, 8)
    prefix = made.session.compute_prefix([1, 2, 3, 4])
    with pytest.raises(OptionError, match=r"^input_ids has shape \(2, 13\); .*tokens 1..12\."):
        made.session.run_after(prefix, *random_batch(2, 9, 0), steps=1)


def test_largest_batch_of_a_width(rig: MakeRig) -> None:
    session = rig(profiles=stage_profiles(make_facts())[1:]).session
    assert [session.max_batch(tokens) for tokens in (1, 9, 10, 12, 13)] == [4, 4, 1, 1, 0]


def test_a_batch_that_no_profile_takes(rig: MakeRig) -> None:
    made = rig()
    ids, mask = random_batch(5, 7, 0)
    with pytest.raises(OptionError, match=r"^input_ids has shape \(5, 7\); .*batch 1..4, tokens 1..12\.") as caught:
        made.session.run(ids, mask, steps=1)
    assert (caught.value.hint or "").endswith("--batch 1:2:4 --sm 8.9")
    with pytest.raises(OptionError, match=r"^input_ids has shape \(2, 13\)"):
        made.session.run(*random_batch(2, 13, 0), steps=1)
    with pytest.raises(OptionError, match=r"^input_ids has shape \(2, 0\)"):
        made.session.run(ids[:2, :0], mask[:2, :0], steps=1)
    made.run(4, 12)
