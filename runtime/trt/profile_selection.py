"""Which optimization profiles of an engine run a batch. Pure: shapes in, indices out.

A profile can run a pass whose shapes lie in its ranges. Of several, one made for the stage comes first, then one for
any stage; among equals the one with the smallest maximum batch, whose kernels were selected for such sizes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from gircse.runtime import tensor_names
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import Layout
from gircse.runtime.trt.engine_manifest import EngineManifest, EngineProfile, Stage
from gircse.runtime.trt.memory_layout import MemoryLayout


@dataclass(frozen=True)
class ProfileSelection:
    """How a batch is run.

    Attributes:
        prompt: index of the profile of pass 0.
        step: index of the profile of the passes after it; the same as ``prompt`` when there are none.
        tokens: width that the batch is padded to, the least that the prompt's profile takes; a prefix not counted.
    """

    prompt: int
    step: int
    tokens: int


@dataclass(frozen=True)
class ProfileSelector:
    """Selects among the profiles of one engine.

    Attributes:
        manifest: of the engine.
        memory: shapes of its passes.
        build_command: builds it again; for messages.
    """

    manifest: EngineManifest
    memory: MemoryLayout
    build_command: str

    @property
    def takes_prefixes(self) -> bool:
        """Whether it computes prefixes, and runs after them all that it runs whole."""
        return self.manifest.layout is Layout.STEPWISE and all(
            self._holds(index, 1, 1, 0) and self._holds(index, 1, widest, 0, prefix=widest - 1)
            for index, profile in enumerate(self.manifest.profiles)
            if profile.stage is not Stage.STEP
            for widest in (self._max_tokens(profile),)
        )

    def select(self, batch: int, tokens: int, prefix: int = 0) -> ProfileSelection:
        """Return how to run a batch, with any number of steps, ``tokens`` wide without its prefix.

        Raises:
            OptionError: no profile takes it.
        """
        selection = self._find(batch, tokens, prefix)
        if selection is None:
            raise OptionError(
                tensor_names.INPUT_IDS,
                f"has shape {(batch, prefix + tokens)}",
                "; ".join(self._limits(profile) for profile in self.manifest.profiles),
                f"Split the batch, or rebuild with larger sizes; it was built by: {self.build_command}",
            )
        return selection

    def max_batch(self, tokens: int) -> int:
        """Return the largest batch of prompts that are ``tokens`` wide; 0 when they are too wide for every profile."""
        sizes = {profile.shapes[tensor_names.INPUT_IDS].max[0] for profile in self.manifest.profiles}
        return next((size for size in sorted(sizes, reverse=True) if self._find(size, tokens)), 0)

    def limits(self, selection: ProfileSelection) -> tuple[int, int]:
        """Return the largest batch and the largest width that the selected profiles take together."""
        prompt, step = self.manifest.profiles[selection.prompt], self.manifest.profiles[selection.step]
        batch = min(profile.shapes[tensor_names.INPUT_IDS].max[0] for profile in (prompt, step))
        return batch, min(
            self._max_tokens(prompt), step.shapes[tensor_names.ATTENTION_MASK].max[1] - self.memory.last_pass
        )

    def buffer_bytes(self) -> int:
        """Return the size of the buffers of the largest batches that any profiles take together."""
        pairs = itertools.product(range(len(self.manifest.profiles)), repeat=2)
        limits = (self.limits(ProfileSelection(prompt, step, 1)) for prompt, step in pairs)
        return max(sum(self.memory.buffer_bytes(*sizes).values()) for sizes in limits)

    def _find(self, batch: int, tokens: int, prefix: int = 0) -> ProfileSelection | None:
        last = self.memory.last_pass
        for prompt in self._by_preference(Stage.PROMPT):
            own = max(tokens, _min_tokens(self.manifest.profiles[prompt]))
            width = prefix + own
            # The buffers are as large as whole prompts need, so those have to fit too.
            if tokens < 1 or not all(self._holds(prompt, batch, width, 0, prefix=size) for size in {0, prefix}):
                continue
            if not last:
                return ProfileSelection(prompt, prompt, own)
            for step in self._by_preference(Stage.STEP):
                # Every size grows with the step, so the first and the last step are enough.
                if self._holds(step, batch, width, 1) and self._holds(step, batch, width, last):
                    return ProfileSelection(prompt, step, own)
        return None

    def _by_preference(self, stage: Stage) -> Iterator[int]:
        def rank(index: int) -> tuple[int, int]:
            profile = self.manifest.profiles[index]
            order = {stage: 0, Stage.ANY: 1}
            return order.get(profile.stage, 2), profile.shapes[tensor_names.INPUT_IDS].max[0]

        return iter(sorted(range(len(self.manifest.profiles)), key=rank))

    def _holds(self, index: int, batch: int, tokens: int, number: int, *, prefix: int = 0) -> bool:
        ranges = self.manifest.profiles[index].shapes
        shapes = self.memory.input_shapes(batch, tokens, number, prefix=prefix)
        return all(ranges[name].holds(shape) for name, shape in shapes.items())

    def _max_tokens(self, profile: EngineProfile) -> int:
        return min(profile.shapes[name].max[1] for name in (tensor_names.INPUT_IDS, tensor_names.ATTENTION_MASK))

    def _limits(self, profile: EngineProfile) -> str:
        ids = profile.shapes[tensor_names.INPUT_IDS]
        tokens = min(
            self._max_tokens(profile), profile.shapes[tensor_names.ATTENTION_MASK].max[1] - self.memory.last_pass
        )
        return f"profile {profile.name} takes batch {ids.min[0]}..{ids.max[0]}, tokens {_min_tokens(profile)}..{tokens}"


def _min_tokens(profile: EngineProfile) -> int:
    return max(profile.shapes[name].min[1] for name in (tensor_names.INPUT_IDS, tensor_names.ATTENTION_MASK))
