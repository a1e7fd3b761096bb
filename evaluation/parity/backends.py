"""The two kinds of sides that are compared: the PyTorch reference, and one precision of a bundle.

Both take token ids and sort them into the same batches of like length, so that nothing but the computation differs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import psutil

from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.source import Checkpoint, resolve_checkpoint
from gircse.evaluation.parity.emulation import emulated_graph
from gircse.evaluation.parity.graph_probe import GraphProbe
from gircse.evaluation.parity.step_trace import (
    Advance,
    Batches,
    StepTrace,
    StepValues,
    check_finite,
    collect_states,
    collect_trace,
)
from gircse.evaluation.tasks.prompts import Prompt
from gircse.runtime import Embedder
from gircse.runtime.bundle import Bundle
from gircse.runtime.embedder import DEFAULT_BATCH_SIZE, DEFAULT_BATCH_TOKENS
from gircse.runtime.errors import MeasurementError
from gircse.runtime.manifest import Layout, Manifest
from gircse.runtime.numerics import Float32, l2_normalize, pool_states
from gircse.runtime.ort_session import open_session
from gircse.runtime.precision import Precision, precision_spec
from gircse.runtime.provider import Provider
from gircse.runtime.tokenization import format_prompt, open_tokenizer, padded_batches

TokenIds = Sequence[list[int]]

TORCH_BYTES = 5 << 28
"""Memory of torch, transformers and one batch besides the weights."""


class Backend(Protocol):
    """Computes embeddings of token ids."""

    @property
    def name(self) -> str:
        """What it is, for reports."""

    def embed(self, token_ids: TokenIds, advance: Advance) -> Float32:
        """Return z_0..z_K (n, K + 1, hidden) float32, where z_0 is the normalized prompt state."""

    def embed_and_trace(self, token_ids: TokenIds, advance: Advance) -> tuple[Float32, StepTrace]:
        """Return the same, and what is computed on the way."""


class TorchBackend:
    """The reference loop in PyTorch, on the checkpoint that a bundle was exported from."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, *, device: str, dtype: str, threads: int | None) -> None:
        """Load the model.

        Args:
            bundle: gives K, pooling and temperature.
            checkpoint: the model and adapter, see ``source_checkpoint``.
            device: a torch device.
            dtype: ``fp32``, ``fp16`` or ``bf16``.
            threads: threads on the CPU; None leaves it to torch.

        Raises:
            MeasurementError: the device is not there, or memory does not suffice.
        """
        import torch

        from gircse.checkpoint.reference import load_reference

        if threads is not None:
            torch.set_num_threads(threads)
        self._manifest, self._tokens = bundle.manifest, token_count(bundle)
        self._device = device
        _check_memory(bundle.manifest)
        try:
            self._model = load_reference(checkpoint, device=device, precision=Precision(dtype))
        except (RuntimeError, AssertionError) as err:  # what torch raises for a device that is not there
            raise MeasurementError(
                f"--device {device}: {str(err).splitlines()[0]} | a device of this machine's torch | choose cpu"
            ) from err
        self.name = f"PyTorch {dtype} on {device}"

    def embed(self, token_ids: TokenIds, advance: Advance) -> Float32:
        """Return z_0..z_K (n, K + 1, hidden) float32."""
        facts = self._manifest.graph
        batches = self._refine(token_ids)
        states = collect_states(self.name, batches, facts, texts=len(token_ids), advance=advance)
        return l2_normalize(pool_states(states, facts.pooling))

    def embed_and_trace(self, token_ids: TokenIds, advance: Advance) -> tuple[Float32, StepTrace]:
        """Return z_0..z_K (n, K + 1, hidden) float32, and what is computed on the way."""
        facts, batches = self._manifest.graph, self._refine(token_ids)
        trace = collect_trace(self.name, batches, facts, texts=len(token_ids), tokens=self._tokens, advance=advance)
        return l2_normalize(pool_states(trace.states, facts.pooling)), trace

    def _refine(self, token_ids: TokenIds) -> Batches:
        for batch in padded_batches(
            token_ids,
            pad_token_id=self._manifest.pad_token_id,
            batch_size=DEFAULT_BATCH_SIZE,
            batch_tokens=DEFAULT_BATCH_TOKENS,
        ):
            yield list(batch.rows), self._run(batch.input_ids, batch.attention_mask)

    def _run(self, input_ids: Any, attention_mask: Any) -> Iterator[StepValues]:
        import torch

        from gircse.checkpoint.reference import refine

        ids, mask = (torch.from_numpy(array).to(self._device) for array in (input_ids, attention_mask))
        facts = self._manifest.graph
        for state in refine(self._model, ids, mask, steps=facts.steps, temperature=facts.temperature):
            yield StepValues(_numpy(state.hidden), _numpy(state.soft_token), _numpy(state.probabilities))


class BundleBackend:
    """One precision of a bundle: embeddings from the runtime itself, the rest from a probe of the same graphs."""

    def __init__(
        self,
        bundle: Bundle,
        precision: str,
        *,
        layout: Layout | None = None,
        provider: Provider = Provider.CPU,
        threads: int | None = None,
    ) -> None:
        """Load nothing yet: the runtime and the probe are opened when they are needed, and dropped.

        Args:
            bundle: an opened bundle.
            precision: name of one of its variants. On the CPU, FP16 and BF16 are emulated.
            layout: which of its graphs; None is its default.
            provider: where the runtime runs; the probe runs on the CPU.
            threads: threads of one run; None lets ONNX Runtime take the physical cores.
        """
        self._emulated = precision_spec(precision).emulated and provider is Provider.CPU
        place = ", emulated" if self._emulated else "" if provider is Provider.CPU else f" on {provider}"
        self.name = f"{bundle.directory.name}:{precision}{place}"
        self._bundle, self._precision, self._layout = bundle, precision, layout
        self._provider, self._threads = provider, threads
        self._facts, self._tokens = bundle.manifest.graph, token_count(bundle)

    def open_embedder(self) -> Embedder:
        """Load the runtime."""
        session = None
        if self._emulated:
            layout = self._bundle.layout(self._precision, self._layout)
            content = ir.to_proto(emulated_graph(self._bundle.graph(self._precision, layout))).SerializeToString()
            session = open_session(self._bundle, self._precision, layout=layout, threads=self._threads, content=content)
        return Embedder(
            self._bundle.directory,
            precision=self._precision,
            provider=self._provider,
            layout=self._layout,
            threads=self._threads,
            session=session,
        )

    def embed(self, token_ids: TokenIds, advance: Advance) -> Float32:
        """Return z_0..z_K (n, K + 1, hidden) float32."""
        return self.embed_with(self.open_embedder(), token_ids, advance)

    def embed_with(
        self, embedder: Embedder, token_ids: TokenIds, advance: Advance, *, batch_size: int = DEFAULT_BATCH_SIZE
    ) -> Float32:
        """Return z_0..z_K (n, K + 1, hidden) float32 of an embedder that is open already."""
        result = np.empty((len(token_ids), self._facts.steps + 1, self._facts.hidden_size), np.float32)
        for rows, outputs in embedder.run_batches(token_ids, batch_size=batch_size):
            result[list(rows), 0] = outputs.prompt_embedding
            result[list(rows), 1:] = outputs.step_embeddings
            advance(len(rows))
        check_finite(self.name, "embedding z", result, first_step=0)
        return result

    def embed_and_trace(self, token_ids: TokenIds, advance: Advance) -> tuple[Float32, StepTrace]:
        """Return z_0..z_K (n, K + 1, hidden) float32 of the runtime, and what a probe sees on the way."""
        return self.embed(token_ids, lambda _: None), self._trace(self._open_probe(), token_ids, advance)

    def trace_and_force(self, token_ids: TokenIds, soft_tokens: Float32, advance: Advance) -> tuple[StepTrace, Float32]:
        """Return what is computed on the way, and the states when every step is fed another side's soft tokens.

        Args:
            token_ids: token ids of each text.
            soft_tokens: (n, K, hidden) float32 of the other side.
            advance: told how many texts were just done; each is counted twice.

        Returns:
            The free-running trace, and the teacher-forced states (n, K + 1, hidden) float32.
        """
        probe = self._open_probe()
        trace = self._trace(probe, token_ids, advance)
        batches = probe.refine(token_ids, forced=soft_tokens)
        name = f"{self.name}, teacher-forced"
        return trace, collect_states(name, batches, self._facts, texts=len(token_ids), advance=advance)

    def _open_probe(self) -> GraphProbe:
        return GraphProbe(self._bundle, self._precision, layout=self._layout, threads=self._threads)

    def _trace(self, probe: GraphProbe, token_ids: TokenIds, advance: Advance) -> StepTrace:
        batches = probe.refine(token_ids)
        return collect_trace(
            self.name, batches, self._facts, texts=len(token_ids), tokens=self._tokens, advance=advance
        )


def _check_memory(manifest: Manifest) -> None:
    """Refuse to load a model that cannot fit, where the FP32 weights of the bundle tell its size."""
    variant = manifest.variants.get("fp32")
    if variant is None:
        return
    needed = TORCH_BYTES + int(1.2 * manifest.files[variant.weights].bytes)  # PEFT merges layer by layer
    free = psutil.virtual_memory().available
    if needed > free:
        raise MeasurementError(
            f"memory: {free / 2**30:.1f} GiB available | {needed / 2**30:.1f} GiB for the PyTorch model in FP32 | use a "
            "larger machine, or another bundle or precision as --reference"
        )


def _numpy(tensor: Any) -> Any:
    return None if tensor is None else tensor.float().cpu().numpy()


def source_checkpoint(manifest: Manifest, *, model: str | None = None, adapter: str | None = None) -> Checkpoint:
    """Find the checkpoint that a bundle was exported from, and make sure that it is the same.

    Args:
        manifest: of the bundle.
        model: where the model lies now, if not where the manifest says.
        adapter: where the adapter lies now.

    Raises:
        CheckpointError: it cannot be found.
        MeasurementError: its config or its adapter has another hash than at the export.
    """
    revision = manifest.model.revision if model is None else None
    recorded = manifest.adapter.name if manifest.adapter else "none"
    checkpoint = resolve_checkpoint(model or manifest.model.name, adapter=adapter or recorded, revision=revision)
    ours = (checkpoint.model.config_sha256, checkpoint.adapter.sha256 if checkpoint.adapter else None)
    theirs = (manifest.model.config_sha256, manifest.adapter.sha256 if manifest.adapter else None)
    for what, came, expected in zip(("config.json", "adapter"), ours, theirs, strict=True):
        if came != expected:
            raise MeasurementError(
                f"{checkpoint.directory}: {what} with SHA-256 {came} | {expected}, as when the bundle was exported | "
                "export again, or name the right checkpoint with --model and --adapter"
            )
    return checkpoint


def checkpoint_token_ids(checkpoint: Checkpoint, bundle: Bundle, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokenize prompts as the training code does, with the checkpoint's own tokenizer, for comparison with ours."""
    from transformers import AutoTokenizer

    manifest = bundle.manifest
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    texts = [format_prompt(prompt.instruction, prompt.text, template=manifest.prompt_template) for prompt in prompts]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids[: manifest.graph.max_tokens] or [manifest.pad_token_id] for ids in found]


def token_count(bundle: Bundle) -> int:
    """Return the number of vocabulary rows that belong to a token; the rows after them are padding."""
    vocabulary = open_tokenizer(bundle).tokenizer.get_vocab()
    return max(*vocabulary.values(), bundle.manifest.pad_token_id) + 1


def check_same_task(ours: Bundle, theirs: Bundle) -> None:
    """Refuse a reference bundle that computes something else; layout and weights' precision may differ.

    Raises:
        MeasurementError: K, pooling, sizes, prompt or tokenizer differ.
    """

    def facts(bundle: Bundle) -> dict[str, Any]:
        manifest = bundle.manifest
        names = ("architecture", "steps", "pooling", "temperature", "max_tokens", "hidden_size", "vocab_size")
        return {
            **{name: getattr(manifest.graph, name) for name in names},
            "prompt_template": manifest.prompt_template,
            "tokenizer.json": manifest.files["tokenizer.json"].sha256,
        }

    left, right = facts(ours), facts(theirs)
    for name, value in left.items():
        if value != right[name]:
            raise MeasurementError(
                f"--reference {theirs.directory}: {name} {right[name]} | {value}, as {ours.directory} has | choose a "
                "reference that was exported with the same settings"
            )


def parse_bundle_reference(text: str) -> tuple[Path, str | None]:
    """Split ``BUNDLE[:PRECISION]``; a directory whose own name has a colon is taken as it is."""
    if Path(text).is_dir() or ":" not in text:
        return Path(text), None
    path, _, precision = text.rpartition(":")
    return Path(path), precision
