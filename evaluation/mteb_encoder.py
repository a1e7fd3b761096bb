"""A bundle as a model of mteb, the Massive Text Embedding Benchmark.

The instruction of a text is the first of these: ``prompts`` under the task's name and the prompt type
(``SciFact-query``), the task's name, its type and the prompt type (``Retrieval-query``), its type, the prompt type
(``query``); the prompt in the task's metadata; mteb's own for that kind of task.

A text that mteb calls a document carries none, unless a key of ``prompts`` names documents
(``AskUbuntuDupQuestions-document``). Where a task has no queries and documents (STS, clustering, classification, ...),
every text carries the instruction.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gircse.runtime import Embedder, Manifest
from gircse.runtime.batch_planner import DEFAULT_BATCH_SIZE
from gircse.runtime.errors import OptionError, sentence
from gircse.runtime.numerics import Float32

try:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.abs_encoder import AbsEncoder, get_prompt
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import BatchedInput, PromptType
except ImportError as err:
    raise ImportError(
        sentence(
            "mteb",
            f"cannot be imported: {err}",
            "version 2.10 or later is needed",
            "Install it: pip install 'gircse-deploy[mteb]'",
        ),
        name="mteb",
    ) from err

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class MtebEncoder(AbsEncoder):
    """Runs mteb's tasks on a bundle; follows mteb's ``EncoderProtocol``.

    Attributes:
        model: the embedder.
        mteb_model_meta: what mteb records of the model and finds its cached results by.

    Example:
        >>> import mteb
        >>> mteb.evaluate(MtebEncoder("gircse-demo-8"), mteb.get_tasks(tasks=["STSBenchmark", "SciFact"]))
    """

    model: Embedder

    def __init__(
        self,
        bundle: str | Path | Embedder,
        *,
        precision: str | None = None,
        steps: int | None = None,
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        """Open a bundle, or take an open embedder.

        Args:
            bundle: bundle directory, or an embedder of one.
            precision: variant to load; None takes the default of ``Embedder``.
            steps: refinement steps, 0 to the bundle's K; None is K.
            prompts: instructions that replace the tasks' own, under the keys that the module describes; an empty text
                means none. mteb warns of keys that it does not know, but they count: your own task may have that name.

        Raises:
            BundleError: the bundle cannot be used.
            OptionError: ``steps`` is out of range, or ``precision`` is given with an open embedder.
        """
        self.model = bundle if isinstance(bundle, Embedder) else Embedder(bundle, precision=precision)
        if self.model is bundle and precision is not None:
            raise OptionError(
                "precision",
                f"is {precision!r}",
                "an open embedder has a precision already",
                "Pass the path of the bundle instead of an embedder.",
            )
        self.model.encode([], steps=steps)  # a wrong number shows here, not after the download of a task's data
        self._steps = steps
        self._prompts = dict(prompts or {})
        self.validate_task_to_prompt_name(self._prompts, raise_for_invalid_keys=False)
        self.mteb_model_meta = model_meta_from_manifest(
            self.model.manifest, precision=self.model.precision, steps=steps, prompts=self._prompts
        )

    def encode(
        self,
        inputs: "DataLoader[BatchedInput]",
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        show_progress_bar: bool = True,
        precision: str = "float32",
    ) -> Float32:
        """Embed the texts of a task.

        Args:
            inputs: batches with their texts under ``text``.
            task_metadata: the task, which determines the instruction.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: query, document, or None where the task does not distinguish them.
            batch_size: maximum texts per batch; ``mteb.evaluate`` passes 32 unless its ``encode_kwargs`` say otherwise.
            show_progress_bar: show a progress bar on stderr.
            precision: element type of the vectors, which mteb calls so; not the variant of the bundle.

        Returns:
            (n, hidden) float32 unit vectors, in the order of ``inputs``.

        Raises:
            OptionError: ``precision`` is not ``float32``, or ``batch_size`` is below 1.
        """
        if precision != "float32":
            raise OptionError(
                "encode_kwargs: precision",
                f"is {precision!r}",
                "a bundle gives 'float32' vectors only",
                "Leave it out; MtebEncoder(bundle, precision=...) chooses the graphs.",
            )
        return self.model.encode(
            [text for batch in inputs for text in batch["text"]],
            instruction=self.get_instruction(task_metadata, prompt_type),
            steps=self._steps,
            batch_size=batch_size,
            show_progress=show_progress_bar,
        )

    def get_instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """Return the instruction of a task's texts, empty for none; the arguments are those of ``encode``."""
        if prompt_type is not PromptType.document:
            prompt = get_prompt(self._prompts, task_metadata, prompt_type)
            return super().get_instruction(task_metadata, prompt_type) if prompt is None else prompt
        # What a task's prompt or name says is for its queries; mteb would put it before the documents too.
        of_documents = {key: text for key, text in self._prompts.items() if f"-{key}".endswith("-document")}
        return get_prompt(of_documents, task_metadata, prompt_type) or ""


def model_meta_from_manifest(
    manifest: Manifest, *, precision: str, steps: int | None, prompts: Mapping[str, str]
) -> ModelMeta:
    """Return what mteb records of a bundle run in this way; what the manifest does not tell stays empty.

    mteb finds cached results by name, revision and experiment. The revision is the SHA-256 of the manifest, which holds
    that of every file; the experiment is all that differs from the bundle's defaults.
    """
    graph, source = manifest.graph, manifest.adapter or manifest.model
    experiment = {
        "precision": precision if len(manifest.variants) > 1 else None,
        "steps": None if steps == graph.steps else steps,
        "prompts": dict(prompts) or None,
    }
    return ModelMeta.create_empty(
        {
            # mteb requires organization/model; only a Hugging Face snapshot, which has a revision, has such a name.
            "name": source.name if source.revision else f"local/{Path(source.name).name}",
            "revision": hashlib.sha256(manifest.to_json()).hexdigest(),
            "adapted_from": manifest.model.name if manifest.adapter and manifest.model.revision else None,
            "embed_dim": graph.hidden_size,
            "max_tokens": graph.max_tokens,
            "memory_usage_mb": manifest.weight_bytes(precision) / 2**20,
            "n_embedding_parameters": graph.vocab_size * graph.hidden_size,
            "framework": ["ONNX"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "experiment_kwargs": {key: value for key, value in experiment.items() if value is not None} or None,
        }
    )
