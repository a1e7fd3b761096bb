"""What users import: a bundle, opened once, that turns texts into vectors."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.numpy import load_file
from tqdm import tqdm

from gircse.runtime import tokenization
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError, ProviderError
from gircse.runtime.manifest import Layout, Manifest
from gircse.runtime.numerics import Float32, row_cosine
from gircse.runtime.precision import precision_spec
from gircse.runtime.provider import Provider
from gircse.runtime.provider_selection import SessionHandle, SessionOptions, open_provider
from gircse.runtime.session import Session, StepOutputs
from gircse.runtime.tokenization import Overflow, TokenBatch

Choice = TypeVar("Choice", bound=StrEnum)

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 32
DEFAULT_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class SelfTestReport:
    """How far the golden texts are from the PyTorch reference, over every text and step.

    Attributes:
        texts: number of golden texts.
        min_cosine: smallest cosine.
        max_difference: largest difference of an element.
        limit: smallest cosine that passes at this precision.
    """

    texts: int
    min_cosine: float
    max_difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether every vector is within tolerance; NaN fails."""
        return self.min_cosine >= self.limit


class Embedder:
    """Embeds texts with a bundle. One instance may be called from several threads.

    Attributes:
        tokenizer: gives the token ids of texts, as the graphs see them.

    Example:
        >>> embedder = Embedder("gircse-demo-8")
        >>> embedder.encode(["How do I reset my PIN?"]).shape
        (1, 576)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str | None = None,
        provider: Provider | str = Provider.AUTO,
        layout: Layout | str | None = None,
        threads: int | None = None,
        verify: bool = True,
        session: Session | None = None,
    ) -> None:
        """Open a bundle and load its graphs or its engine.

        Args:
            path: bundle directory.
            precision: variant to load; None takes FP32 on the CPU and FP16 on a GPU, if the bundle has them,
                and INT8 only where there is nothing else.
            provider: where to run; ``auto`` takes the best provider that is installed and usable, and logs which.
            layout: ``unrolled`` or ``stepwise``; None takes the bundle's default if the variant has it, else
                ``stepwise``, or the engine that there is.
            threads: threads of one run on the CPU; None lets ONNX Runtime take the physical cores.
            verify: compare the SHA-256 of every file that is used with the manifest while the graphs load.
            session: one of this bundle that is open already, to run on instead; ``precision`` has to name its variant.

        Raises:
            BundleError: the bundle cannot be used.
            ProviderError: the provider is unknown or not installed.
            ValueError: ``threads`` is below 1.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads: {threads} | at least 1 | leave it out to use every physical core")
        self._bundle = Bundle.open(path)
        self.tokenizer = tokenization.open_tokenizer(self._bundle)
        if session is not None:
            self._opened = SessionHandle(session, Provider.CPU, precision or self._bundle.default_precision(()))
            return
        options = SessionOptions(
            precision=precision,
            layout=None if layout is None else _enum(Layout, "layout", layout),
            threads=threads,
            verify=verify,
        )
        self._opened = open_provider(self._bundle, _enum(Provider, "provider", provider), options)

    @property
    def provider(self) -> Provider:
        """Where it runs."""
        return self._opened.provider

    @property
    def precision(self) -> str:
        """The variant that it runs."""
        return self._opened.precision

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self._bundle.manifest

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        steps: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        all_steps: bool = False,
        on_overflow: Overflow | str = Overflow.TRUNCATE,
        show_progress: bool = False,
        prompt: str | None = None,
        convert_to_numpy: bool = True,
        normalize_embeddings: bool = True,
    ) -> Float32:
        """Embed texts; row i belongs to ``texts[i]`` and does not depend on the other texts.

        An empty text without instruction is embedded as the single padding token. Prompts longer than the bundle's
        ``max_tokens`` are cut on the right, and a warning is logged with their number.

        Args:
            texts: the texts.
            instruction: task description put before every text; leave it empty for documents to be retrieved.
            steps: refinement steps, 0 to the bundle's K; None is K. 0 is the normalized prompt state.
            batch_size: most texts of a batch.
            batch_tokens: most tokens of a batch, padding included.
            all_steps: return z_1..z_steps of every text.
            on_overflow: ``truncate`` or ``error`` for prompts that are too long.
            show_progress: show a progress bar on stderr.
            prompt: put before every text as it stands, as sentence-transformers does; instead of ``instruction``.
            convert_to_numpy: as in sentence-transformers; there is no other kind of result.
            normalize_embeddings: as in sentence-transformers; the graphs give unit vectors only.

        Returns:
            (n, hidden) float32 unit vectors, or (n, steps, hidden) with ``all_steps``.

        Raises:
            TypeError: ``texts`` is not a sequence of strings.
            ValueError: an argument is out of range, a text cannot be UTF-8, or a prompt is too long and
                ``on_overflow`` is ``error``.
        """
        if not (convert_to_numpy and normalize_embeddings):
            raise ValueError(
                f"convert_to_numpy {convert_to_numpy}, normalize_embeddings {normalize_embeddings} | True: a bundle "
                "gives unit vectors as numpy arrays | leave them out"
            )
        steps = self._check_steps(steps)
        token_ids = self.tokenizer(texts, instruction=instruction, prompt=prompt, on_overflow=on_overflow)
        manifest = self.manifest
        shape = (
            (len(texts), steps, manifest.graph.hidden_size) if all_steps else (len(texts), manifest.graph.hidden_size)
        )
        result = np.empty(shape, np.float32)
        with tqdm(total=len(texts), unit="text", disable=not show_progress) as bar:
            for rows, outputs in self.run_batches(
                token_ids, steps=steps, batch_size=batch_size, batch_tokens=batch_tokens
            ):
                if all_steps:
                    result[list(rows)] = outputs.step_embeddings
                else:
                    result[list(rows)] = outputs.step_embeddings[:, -1] if steps else outputs.prompt_embedding
                bar.update(len(rows))
        return result

    def run_batches(
        self,
        token_ids: Sequence[list[int]],
        *,
        steps: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
    ) -> Iterator[tuple[tuple[int, ...], StepOutputs]]:
        """Run token ids batch by batch, longest first; the lower half of ``encode``.

        Args:
            token_ids: token ids of each text, at least one.
            steps: as in ``encode``.
            batch_size: as in ``encode``.
            batch_tokens: as in ``encode``.

        Yields:
            The positions of a batch's texts, and their embeddings at every step.

        Raises:
            ValueError: an argument is out of range.
        """
        steps = self._check_steps(steps)
        if batch_size < 1 or batch_tokens < 1:
            raise ValueError(f"batch_size {batch_size}, batch_tokens {batch_tokens} | at least 1 each | raise them")
        for batch in tokenization.padded_batches(
            token_ids, pad_token_id=self.manifest.pad_token_id, batch_size=batch_size, batch_tokens=batch_tokens
        ):
            yield batch.rows, self._run(batch, steps)

    def self_test(self) -> SelfTestReport:
        """Embed the golden texts and compare every step with the PyTorch reference in the bundle.

        Raises:
            BundleError: the bundle holds no golden vectors.
        """
        if not self.manifest.golden:
            raise BundleError(
                f"{self._bundle.directory}: no golden vectors ({self.manifest.golden_missing_reason}) | "
                "golden.json and golden.safetensors | export again on a machine where the reference can run"
            )
        cases = json.loads(self._bundle.file("golden.json").read_text(encoding="utf-8"))["cases"]
        expected = load_file(self._bundle.file("golden.safetensors"))
        # One batch, whose rows come back longest first.
        every = {"batch_size": len(cases), "batch_tokens": sys.maxsize}
        ((rows, outputs),) = self.run_batches([case["token_ids"] for case in cases], **every)
        ours = np.concatenate([outputs.prompt_embedding[:, None], outputs.step_embeddings], axis=1)
        theirs = np.concatenate([expected["prompt_embedding"][:, None], expected["step_embeddings"]], axis=1)[
            list(rows)
        ]
        return SelfTestReport(
            texts=len(cases),
            min_cosine=float(row_cosine(ours, theirs).min()),
            max_difference=float(np.abs(ours - theirs).max()),
            limit=precision_spec(self.precision).self_test_min_cosine,
        )

    def _run(self, batch: TokenBatch, steps: int) -> StepOutputs:
        """Run a batch, in several parts where the session takes no more texts at once."""
        texts, tokens = batch.input_ids.shape
        session = self._opened.session
        most = session.max_batch(tokens) or texts
        parts = [
            session.run(batch.input_ids[at : at + most], batch.attention_mask[at : at + most], steps=steps)
            for at in range(0, texts, most)
        ]
        return parts[0] if len(parts) == 1 else StepOutputs(*map(np.concatenate, zip(*parts, strict=True)))

    def _check_steps(self, steps: int | None) -> int:
        if steps is None:
            return self.manifest.graph.steps
        if not 0 <= steps <= self.manifest.graph.steps:
            raise ValueError(
                f"steps: {steps} | this bundle has 0..{self.manifest.graph.steps} | "
                f"choose one of these or export with --steps {steps}"
            )
        return steps


def _enum(kind: type[Choice], name: str, value: str) -> Choice:
    try:
        return kind(value)
    except ValueError as err:
        raise ProviderError(f"{name} {value!r}: unknown | one of {', '.join(kind)} | choose one of these") from err
