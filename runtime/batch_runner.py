"""From texts to vectors, batch by batch, on one session: what every way to encode shares."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gircse.runtime.batch_planner import (
    PASS_TOKENS,
    PASS_TOKENS_GPU,
    TokenBatch,
    pad_batch,
    plan_batches,
    stream_batch_size,
)
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import MAX_STEPS, Manifest
from gircse.runtime.numerics import Float32
from gircse.runtime.prefix_cache import Prefix, PrefixCache, PrefixCacheInfo, PrefixSession
from gircse.runtime.session import Session, StepOutputs
from gircse.runtime.tokenization import Overflow, PromptTokenizer


@dataclass(frozen=True)
class EncodeOptions:
    """How texts are embedded; the fields are arguments of ``Embedder.encode``."""

    instruction: str
    prompt: str | None
    steps: int | None
    batch_size: int
    batch_tokens: int
    all_steps: bool
    on_overflow: Overflow | str


class BatchRunner:
    """Runs texts and token ids of any number through a session."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: PromptTokenizer,
        session: Session,
        *,
        on_gpu: bool = False,
        streams: int = 1,
        prefix_cache: bool | None = None,
    ) -> None:
        """Take a session; ``close`` closes it.

        Args:
            manifest: of the bundle.
            tokenizer: of the bundle.
            session: runs its graphs.
            on_gpu: whether on a GPU.
            streams: batches that run at once on the CPU.
            prefix_cache: as in ``Embedder``.
        """
        self._manifest, self._tokenizer, self._session = manifest, tokenizer, session
        self._pass_tokens = PASS_TOKENS_GPU if on_gpu else PASS_TOKENS
        self._streams = 1 if on_gpu else streams
        self._prefixes: PrefixCache | None = None
        if isinstance(session, PrefixSession) and session.takes_prefixes:
            wanted = not session.on_gpu if prefix_cache is None else prefix_cache
            self._prefixes = PrefixCache(session) if wanted else None
        self._closed = False

    def prefix_cache_info(self) -> PrefixCacheInfo:
        """Return what ``Embedder.prefix_cache_info`` does."""
        return PrefixCacheInfo(0, 0, 0, 0, 0) if self._prefixes is None else self._prefixes.info()

    def close(self) -> None:
        """Close the session; closing twice does nothing."""
        self._closed, self._prefixes = True, None
        self._session.close()

    def embed(
        self, texts: Sequence[str], options: EncodeOptions, advance: Callable[[int], object], *, first_row: int = 0
    ) -> tuple[Float32, list[int]]:
        """Embed a list of texts; the errors are those of ``Embedder.encode``.

        Args:
            texts: a sequence of strings; an empty one checks the options.
            options: how to embed them.
            advance: told how many texts were just done.
            first_row: number of the first text, for errors.

        Returns:
            The vectors in the order of the texts, and the positions of the texts that were cut.
        """
        steps = self.check_steps(options.steps)
        token_ids, cut = self._tokenizer.tokenize(
            texts,
            instruction=options.instruction,
            prompt=options.prompt,
            on_overflow=options.on_overflow,
            first_row=first_row,
        )
        hidden = self._manifest.graph.hidden_size
        result = np.empty((len(texts), steps, hidden) if options.all_steps else (len(texts), hidden), np.float32)
        for rows, outputs in self.run_batches(
            token_ids,
            steps=steps,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            instruction_tokens=self._tokenizer.instruction_tokens(
                token_ids, instruction=options.instruction, prompt=options.prompt
            ),
        ):
            if options.all_steps:
                result[list(rows)] = outputs.step_embeddings
            else:
                result[list(rows)] = outputs.embedding
            advance(len(rows))
        return result, cut

    def run_batches(
        self,
        token_ids: Sequence[list[int]],
        *,
        steps: int | None,
        batch_size: int,
        batch_tokens: int,
        instruction_tokens: int | None,
    ) -> Iterator[tuple[tuple[int, ...], StepOutputs]]:
        """Run token ids batch by batch, as ``Embedder.run_batches`` describes."""
        steps = self.check_steps(steps)
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise OptionError(name, f"is {value}", "it has to be at least 1")
        run = self._batch_run(token_ids, steps, instruction_tokens, batch_size=batch_size)
        batches = plan_batches(
            [len(ids) for ids in token_ids],
            batch_size=stream_batch_size(len(token_ids), batch_size=batch_size, streams=self._streams),
            batch_tokens=batch_tokens,
            batch_cost=self._pass_tokens * (steps + 1),
        )
        if self._streams == 1 or len(batches) < 2:
            yield from zip(batches, map(run, batches), strict=True)
        else:
            with ThreadPoolExecutor(min(self._streams, len(batches)), "gircse stream") as pool:
                yield from zip(batches, pool.map(run, batches), strict=True)

    def run_batch(
        self, token_ids: Sequence[list[int]], *, steps: int | None, instruction_tokens: int | None
    ) -> StepOutputs:
        """Run token ids as one batch, as ``Embedder.run_batch`` describes."""
        if not token_ids:
            raise OptionError("token_ids", "is empty", "a batch has at least one text")
        run = self._batch_run(token_ids, self.check_steps(steps), instruction_tokens, batch_size=len(token_ids))
        return run(tuple(range(len(token_ids))))

    def check_steps(self, steps: int | None) -> int:
        """Return the number of steps to run; None is K.

        Raises:
            OptionError: the bundle does not have as many.
        """
        most = self._manifest.graph.steps
        if steps is None:
            return most
        if not 0 <= steps <= most:
            export = f", or export with --steps {steps}" if most < steps <= MAX_STEPS else "."
            raise OptionError("steps", f"is {steps}", f"this bundle has 0 to {most}", f"Choose one of these{export}")
        return steps

    def _batch_run(
        self, token_ids: Sequence[list[int]], steps: int, instruction_tokens: int | None, *, batch_size: int
    ) -> Callable[[tuple[int, ...]], StepOutputs]:
        """Return what runs the prompts at some positions as one batch, after the beginning that all prompts share."""
        if self._closed:
            raise OptionError("embedder", "is closed", None, "Open the bundle again: Embedder(path).")
        prefix = Prefix(0, self._session.run)
        prefixes = self._prefixes  # another thread may close meanwhile
        if prefixes is not None and token_ids and instruction_tokens is not None:
            prefix = prefixes.choose(token_ids, fixed=instruction_tokens, batch_size=batch_size) or prefix
            token_ids = [ids[prefix.tokens :] for ids in token_ids]

        def run(rows: tuple[int, ...]) -> StepOutputs:
            return self._run(pad_batch(rows, token_ids, pad_token_id=self._manifest.pad_token_id), steps, prefix)

        return run

    def _run(self, batch: TokenBatch, steps: int, prefix: Prefix) -> StepOutputs:
        """Run a batch, in several parts where the session takes fewer texts at once."""
        texts, tokens = batch.input_ids.shape
        most = self._session.max_batch(prefix.tokens + tokens) or texts
        parts = [
            prefix.run(batch.input_ids[at : at + most], batch.attention_mask[at : at + most], steps=steps)
            for at in range(0, texts, most)
        ]
        return parts[0] if len(parts) == 1 else StepOutputs(*map(np.concatenate, zip(*parts, strict=True)))
