"""What users import: a bundle, opened once, that turns texts into vectors."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from tqdm import tqdm

from gircse.runtime.batch_planner import DEFAULT_BATCH_SIZE, DEFAULT_BATCH_TOKENS
from gircse.runtime.batch_runner import BatchRunner, EncodeOptions
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError, OptionError, member_of
from gircse.runtime.manifest import Layout, Manifest
from gircse.runtime.numerics import Float32
from gircse.runtime.open_arguments import OpenArguments, reopen, reopen_arguments
from gircse.runtime.prefix_cache import PrefixCacheInfo
from gircse.runtime.provider import Provider
from gircse.runtime.provider_selection import SessionHandle, SessionOptions, open_provider
from gircse.runtime.self_test import (
    SelfTestReport,
    all_vectors,
    check_golden_tokens,
    compare_with_golden,
    read_golden_vectors,
)
from gircse.runtime.sentence_transformers_arguments import EncodeArguments, check_fixed_arguments, named_instruction
from gircse.runtime.session import Session, StepOutputs
from gircse.runtime.tokenization import Overflow, PromptTokenizer, iterate_texts, open_tokenizer

WINDOW_BATCHES = 32
"""Full batches that ``encode_iter`` reads ahead by default, so that texts of similar length meet in a batch."""


class Embedder:
    """Embeds texts with a bundle. One instance may be called from several threads.

    Attributes:
        tokenizer: gives the token ids of texts, as the graphs see them.
        path: bundle directory, as it was given.
        arguments: what it was opened with besides, and what a pickle opens it with; None ``from_session``.

    Example:
        >>> with Embedder("gircse-demo-8") as embedder:
        ...     embedder.encode(["How do I reset my PIN?"]).shape
        (1, 576)
    """

    arguments: OpenArguments | None

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str | None = None,
        provider: Provider | str = Provider.AUTO,
        layout: Layout | str | None = None,
        threads: int | None = None,
        streams: int = 1,
        verify: bool = True,
        prefix_cache: bool | None = None,
    ) -> None:
        """Open a bundle and load its graphs or its engine.

        Args:
            path: bundle directory.
            precision: variant to load; None takes FP32 on the CPU and FP16 on a GPU, if the bundle has them,
                and INT8 only where there is nothing else.
            provider: where to run; ``auto`` takes the best provider that is installed and usable, and logs which.
            layout: ``unrolled`` or ``stepwise``; None takes the one that suits the provider (``Bundle.layout``), or
                the engine that there is.
            threads: threads of one run on the CPU; None lets ONNX Runtime take the physical cores, or one with several
                streams.
            streams: batches of a call that run at once on the CPU. With as many as there are cores most texts a second
                are embedded, and a single text takes longer.
            verify: compare the SHA-256 of every file that is used with the manifest while the graphs load, and the
                token ids of the golden texts with those of the export.
            prefix_cache: run what the prompts of a call begin with once, where that saves work, and keep its keys and
                values for the next call, in the stepwise layout: a third less work for queries with an instruction on a
                CPU. The last bits of a vector then depend on it. None is on the CPU, where it was measured; True also
                on a GPU (``cuda``, ``tensorrt``, ``tensorrt-rtx``), where it was not.

        Raises:
            BundleError: the bundle cannot be used.
            ProviderError: the provider is not installed or cannot run the bundle.
            OptionError: there is no such provider or layout, or ``threads`` or ``streams`` is below 1.
        """
        where = member_of(Provider, "provider", provider)
        options = SessionOptions(
            precision=precision,
            layout=None if layout is None else member_of(Layout, "layout", layout),
            threads=threads,
            streams=streams,
            verify=verify,
        )
        bundle = Bundle.open(path)
        tokenizer = open_tokenizer(bundle)  # first: the session reuses the memory that reading it took
        opened = open_provider(bundle, where, options)
        try:
            if verify:
                check_golden_tokens(bundle, tokenizer)  # after the hashes, which explain a damaged file better
        except BundleError:
            opened.session.close()
            raise
        self._take(bundle, tokenizer, opened, streams=streams, prefix_cache=prefix_cache)
        self.path = str(path)
        self.arguments = {
            "precision": precision,
            "provider": where.value,
            "layout": options.layout and options.layout.value,
            "threads": threads,
            "streams": streams,
            "verify": verify,
            "prefix_cache": prefix_cache,
        }

    @classmethod
    def from_session(cls, bundle: Bundle, session: Session, *, precision: str) -> Self:
        """Return an embedder on a session that is open already; it reports the CPU as its provider.

        Args:
            bundle: an opened bundle.
            session: runs the bundle's graphs, or others in their place; ``close`` closes it.
            precision: the variant of the bundle that it stands for.
        """
        embedder = cls.__new__(cls)
        handle = SessionHandle(session, Provider.CPU, precision)
        embedder._take(bundle, open_tokenizer(bundle), handle, streams=1, prefix_cache=None)
        embedder.path, embedder.arguments = str(bundle.directory), None
        return embedder

    def _take(
        self,
        bundle: Bundle,
        tokenizer: PromptTokenizer,
        opened: SessionHandle,
        *,
        streams: int,
        prefix_cache: bool | None,
    ) -> None:
        self._bundle, self.tokenizer, self._opened = bundle, tokenizer, opened
        self._runner = BatchRunner(
            bundle.manifest,
            tokenizer,
            opened.session,
            on_gpu=opened.provider is not Provider.CPU,
            streams=streams,
            prefix_cache=prefix_cache,
        )

    def close(self) -> None:
        """Free the graphs or the engine. Closing twice does nothing; embedding afterwards is an ``OptionError``."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return reopen, reopen_arguments(type(self), self.path, self.arguments)

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

    @property
    def embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.manifest.graph.hidden_size

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens, the instruction included."""
        return self.manifest.graph.max_tokens

    @property
    def steps(self) -> int:
        """K, the most refinement steps that the bundle can run."""
        return self.manifest.graph.steps

    def prefix_cache_info(self) -> PrefixCacheInfo:
        """Return what the cache of ``prefix_cache`` did and holds; all zeros where there is none."""
        return self._runner.prefix_cache_info()

    def get_embedding_dimension(self) -> int:
        """Return ``embedding_dimension``, under the name that sentence-transformers has for it."""
        return self.embedding_dimension

    get_sentence_embedding_dimension = get_embedding_dimension  # until sentence-transformers 5

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        instruction: str | None = None,
        steps: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        all_steps: bool = False,
        on_overflow: Overflow | str = Overflow.TRUNCATE,
        show_progress: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
    ) -> Float32:
        """Embed texts; row i belongs to text i and does not depend on the other texts.

        An empty text without instruction is embedded as the single padding token. Prompts longer than the bundle's
        ``max_tokens`` are cut on the right, and a warning is logged with their number.

        The arguments from ``prompt`` on are those of sentence-transformers.

        Args:
            texts: one text, or any iterable of texts: a list, a generator, a one-dimensional array or Series.
            instruction: task description put before every text; leave it out for documents to be retrieved.
            steps: refinement steps, 0 to the bundle's K; None is K. 0 is the normalized prompt state.
            batch_size: maximum texts per batch.
            batch_tokens: maximum tokens per batch, padding included.
            all_steps: return z_1..z_steps of every text.
            on_overflow: ``truncate`` or ``error`` for prompts that are too long.
            show_progress: show a progress bar on stderr.
            prompt: put before every text as it is; instead of ``instruction``.
            prompt_name: ``query`` for the bundle's query instruction or ``document`` for nothing, where neither
                ``instruction`` nor ``prompt`` is given.
            show_progress_bar: same as ``show_progress``.
            output_value: only ``sentence_embedding``.
            precision: only ``float32``; ``Embedder(path, precision=...)`` chooses that of the graphs.
            convert_to_numpy: only True.
            convert_to_tensor: only False.
            device: only None.
            normalize_embeddings: True or False: the graphs give unit vectors.
            truncate_dim: only None: the models are not trained for shorter vectors.

        Returns:
            (n, hidden) float32 unit vectors, or (n, steps, hidden) with ``all_steps``; of one text without the n.

        Raises:
            TypeError: ``texts`` is neither a string nor an iterable of strings.
            OptionError: an argument is out of range or not supported, UTF-8 cannot hold a text, or a prompt is too long
                and ``on_overflow`` is ``error``.
        """
        check_fixed_arguments(
            output_value=output_value,
            precision=precision,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            device=device,
            truncate_dim=truncate_dim,
        )
        options = EncodeOptions(
            instruction=self._instruction(instruction, prompt=prompt, prompt_name=prompt_name),
            prompt=prompt,
            steps=steps,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            all_steps=all_steps,
            on_overflow=on_overflow,
        )
        single = isinstance(texts, str)
        listed = [texts] if isinstance(texts, str) else list(iterate_texts(texts))
        with tqdm(total=len(listed), unit="text", disable=not (show_progress or show_progress_bar)) as bar:
            vectors, cut = self._runner.embed(listed, options, bar.update)
        self.tokenizer.log_cut(len(cut), len(listed))
        return vectors[0] if single else vectors

    def encode_query(self, texts: str | Iterable[str], **arguments: Unpack[EncodeArguments]) -> Float32:
        """Embed queries: ``encode`` with the bundle's query instruction, unless one or a prompt is given."""
        if arguments.get("prompt_name") is None:
            arguments["prompt_name"] = "query"
        return self.encode(texts, **arguments)

    def encode_document(self, texts: str | Iterable[str], **arguments: Unpack[EncodeArguments]) -> Float32:
        """Embed documents: ``encode`` with nothing before the text, unless an instruction or a prompt is given."""
        if arguments.get("prompt_name") is None:
            arguments["prompt_name"] = "document"
        return self.encode(texts, **arguments)

    def encode_iter(
        self,
        texts: Iterable[str],
        *,
        window: int | None = None,
        instruction: str | None = None,
        steps: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        all_steps: bool = False,
        on_overflow: Overflow | str = Overflow.TRUNCATE,
        show_progress: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Iterator[Float32]:
        """Embed any number of texts in flat memory: read ``window`` texts, yield their vectors, read the next.

        The other arguments are those of ``encode``. ``texts`` is read no further than the window that is being
        embedded; None is a window of 32 full batches.

        Texts meet those of similar length only inside their window. A larger window wastes less padding; a smaller one
        needs less memory and yields its first vectors sooner. As texts share batches with other texts than in
        ``encode``, the last bits of a vector may differ.

        The number of texts that were cut is logged once, after the last window.

        Returns:
            An iterator over the windows: (n_i, hidden) float32 unit vectors in the order of the texts, or
            (n_i, steps, hidden) with ``all_steps``.

        Raises:
            TypeError: as in ``encode``; one string is refused too.
            OptionError: as in ``encode``. A wrong argument is refused at once, a text when its window is read.
        """
        options = EncodeOptions(
            instruction=self._instruction(instruction, prompt=prompt, prompt_name=prompt_name),
            prompt=prompt,
            steps=steps,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            all_steps=all_steps,
            on_overflow=on_overflow,
        )
        self._runner.embed([], options, lambda _: None)  # a wrong argument shows now, not with the first window
        if window is None:
            window = WINDOW_BATCHES * batch_size
        if window < 1:
            raise OptionError("window", f"is {window}", "it has to be at least 1")
        every = iterate_texts(texts)
        total = len(texts) if isinstance(texts, Sized) else None
        return self._windows(every, options, window, total=total, show_progress=show_progress)

    def run_batches(
        self,
        token_ids: Sequence[list[int]],
        *,
        steps: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        instruction_tokens: int | None = None,
    ) -> Iterator[tuple[tuple[int, ...], StepOutputs]]:
        """Run token ids batch by batch; the lower half of ``encode``. Those of like length, longest first, are a batch.

        Args:
            token_ids: token ids of each text, at least one.
            steps: as in ``encode``.
            batch_size: as in ``encode``.
            batch_tokens: as in ``encode``.
            instruction_tokens: how many tokens at the beginning of every prompt are an instruction, for the prefix
                cache; None runs whole prompts.

        Returns:
            An iterator over the positions of a batch's texts, and their embeddings at every step.

        Raises:
            OptionError: an argument is out of range, or the embedder is closed.
        """
        return self._runner.run_batches(
            token_ids,
            steps=steps,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            instruction_tokens=instruction_tokens,
        )

    def run_batch(
        self, token_ids: Sequence[list[int]], *, steps: int | None = None, instruction_tokens: int | None = None
    ) -> StepOutputs:
        """Run token ids as one batch, whatever its size, and return their embeddings in the order given.

        The arguments and errors are those of ``run_batches``; no text at all is an error too.
        """
        return self._runner.run_batch(token_ids, steps=steps, instruction_tokens=instruction_tokens)

    def self_test(self) -> SelfTestReport:
        """Embed the golden texts and compare every step with the PyTorch reference in the bundle.

        Raises:
            BundleError: the bundle holds no golden vectors.
            OptionError: the embedder is closed.
        """
        golden = read_golden_vectors(self._bundle)
        vectors = all_vectors(self.run_batch(golden.token_ids))
        return compare_with_golden(vectors, golden.vectors, precision=self.precision)

    def _windows(
        self, texts: Iterator[str], options: EncodeOptions, window: int, *, total: int | None, show_progress: bool
    ) -> Iterator[Float32]:
        done = cut = 0
        with tqdm(total=total, unit="text", disable=not show_progress) as bar:
            while listed := list(itertools.islice(texts, window)):
                vectors, cut_here = self._runner.embed(listed, options, bar.update, first_row=done)
                done, cut = done + len(listed), cut + len(cut_here)
                yield vectors
        self.tokenizer.log_cut(cut, done)

    def _instruction(self, instruction: str | None, *, prompt: str | None, prompt_name: str | None) -> str:
        named = named_instruction(prompt_name, self.manifest.query_instruction)
        if instruction is None:
            return named if prompt is None else ""
        return instruction
