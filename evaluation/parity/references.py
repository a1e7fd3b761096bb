"""What a bundle is compared with: the checkpoint that it was exported from, or a bundle that computes the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gircse.checkpoint.source import Checkpoint, check_in_reach, resolve_checkpoint
from gircse.checkpoint.tokenizer import open_checkpoint_tokenizer
from gircse.evaluation.tasks.prompts import Prompt
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import CheckpointError, MeasurementError
from gircse.runtime.manifest import Manifest, TruncationSide
from gircse.runtime.tokenization import format_prompt


def source_checkpoint(manifest: Manifest, *, model: str | None = None, adapter: str | None = None) -> Checkpoint:
    """Find the checkpoint that a bundle was exported from, and make sure that it is the same.

    Args:
        manifest: of the bundle.
        model: where the model is now, if not where the manifest says.
        adapter: where the adapter is now.

    Raises:
        CheckpointError: it cannot be found, or its config or adapter is not the one that was exported.
        OptionError: it was a local directory, and nothing says where that is.
    """
    if model is None:
        check_in_reach("--model", manifest.model)
    if adapter is None and manifest.adapter is not None:
        check_in_reach("--adapter", manifest.adapter)
    revision = manifest.model.revision if model is None else None
    recorded = manifest.adapter.name if manifest.adapter else "none"
    checkpoint = resolve_checkpoint(model or manifest.model.name, adapter=adapter or recorded, revision=revision)
    found = (checkpoint.model.config_sha256, checkpoint.adapter.sha256 if checkpoint.adapter else "none")
    exported = (manifest.model.config_sha256, manifest.adapter.sha256 if manifest.adapter else "none")
    for name, ours, theirs in zip(("config.json", "adapter"), found, exported, strict=True):
        if ours != theirs:
            raise CheckpointError(
                f"{checkpoint.directory}: the SHA-256 of the {name}",
                f"is {ours}",
                f"when the bundle was exported, it was {theirs}",
                "Export again, or name the right checkpoint with --model and --adapter.",
            )
    return checkpoint


def checkpoint_token_ids(checkpoint: Checkpoint, bundle: Bundle, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokenize prompts with transformers and the checkpoint's own tokenizer, for comparison with the bundle's.

    Raises:
        CheckpointError: the tokenizer cannot be read.
    """
    manifest = bundle.manifest
    tokenizer = open_checkpoint_tokenizer(
        checkpoint.directory, manifest.tokenizer, vocab_size=manifest.graph.vocab_size
    )
    texts = [
        format_prompt(prompt.instruction, prompt.text, template=manifest.prompt_template) + manifest.prompt_suffix
        for prompt in prompts
    ]
    found = [ids or [manifest.pad_token_id] for ids in tokenizer.token_ids(texts)]
    most = manifest.graph.max_tokens
    return [ids[-most:] if tokenizer.truncation_side is TruncationSide.LEFT else ids[:most] for ids in found]


def check_same_task(bundle: Bundle, reference: Bundle) -> None:
    """Refuse a reference bundle that computes something else; layout and the precision of the weights may differ.

    Raises:
        MeasurementError: K, pooling, sizes, prompt or tokenizer differ.
    """
    theirs = _task_facts(reference)
    for name, value in _task_facts(bundle).items():
        if value != theirs[name]:
            raise MeasurementError(
                f"--reference {reference.directory}",
                f"has {name} {theirs[name]}",
                f"{bundle.directory} has {value}",
                "Choose a reference that was exported with the same settings.",
            )


def parse_bundle_reference(text: str) -> tuple[Path, str | None]:
    """Split ``BUNDLE[:PRECISION]``; a directory whose own name has a colon is taken as it is."""
    if Path(text).is_dir() or ":" not in text:
        return Path(text), None
    path, _, precision = text.rpartition(":")
    return Path(path), precision


def _task_facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    names = ("architecture", "steps", "pooling", "temperature", "max_tokens", "hidden_size", "vocab_size")
    return {
        **{name: getattr(manifest.graph, name) for name in names},
        "prompt_template": manifest.prompt_template,
        "prompt_suffix": manifest.prompt_suffix,
        "truncation_side": manifest.truncation_side,
        "tokenizer.json": manifest.files["tokenizer.json"].sha256,
    }
