"""The model to export: its checkpoint, with what its small files and the headers of its shards say."""

from dataclasses import dataclass
from typing import Any

from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.checkpoint.source import Checkpoint, read_json, resolve_checkpoint
from gircse.checkpoint.tokenizer import (
    CheckpointTokenizer,
    adapter_note,
    check_serialized,
    difference_note,
    open_checkpoint_tokenizer,
)
from gircse.export.graph.architecture import DecoderShape, check_limits, decoder_shape
from gircse.export.options import ExportOptions
from gircse.runtime.errors import CheckpointError
from gircse.runtime.manifest import GraphFacts
from gircse.runtime.tokenization import PromptTokenizer


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint that can be exported.

    Attributes:
        checkpoint: where its files are.
        weights: its tensors.
        config: its ``transformers`` config.
        shape: sizes of the decoder.
        facts: what its graphs compute.
        tokenizer: its tokenizer.
        prompts: turns texts into the token ids that the graphs see, as in the bundle.
        notes: what a user should know of it, one line each.
    """

    checkpoint: Checkpoint
    weights: SafetensorsIndex
    config: Any
    shape: DecoderShape
    facts: GraphFacts
    tokenizer: CheckpointTokenizer
    prompts: PromptTokenizer
    notes: tuple[str, ...]


def open_source(options: ExportOptions) -> SourceModel:
    """Find a checkpoint and read everything but its weights.

    Raises:
        CheckpointError: model, adapter or tokenizer cannot be used.
        OptionError: the model cannot hold the options.
        ExportError: the model cannot be exported.
    """
    from transformers import AutoConfig

    checkpoint = resolve_checkpoint(options.model, adapter=options.adapter, revision=options.revision)
    raw = read_json(checkpoint.directory / "config.json")
    if raw.get("model_type") is None or raw.get("auto_map"):
        raise CheckpointError(
            str(checkpoint.directory / "config.json"),
            "needs code of its own (auto_map)" if raw.get("auto_map") else "names no model_type",
            "code of a checkpoint is never executed",
            "Use a checkpoint of a supported architecture.",
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    except Exception as err:  # transformers raises what its validators raise
        raise CheckpointError(
            str(checkpoint.directory / "config.json"),
            f"cannot be read by transformers: {str(err).splitlines()[0]}",
            None,
            "Check the checkpoint.",
        ) from err
    shape = decoder_shape(config)
    check_limits(config, steps=options.steps, max_tokens=options.max_tokens)
    tokenizer = open_checkpoint_tokenizer(checkpoint.directory, options.tokenizer, vocab_size=shape.vocab_size)
    prompts = tokenizer.prompt_tokenizer(max_tokens=options.max_tokens, add_eos=options.add_eos)
    check_serialized(tokenizer)
    weights, facts = SafetensorsIndex(checkpoint.shards), _graph_facts(options, shape)
    return SourceModel(
        checkpoint, weights, config, shape, facts, tokenizer, prompts, _notes(checkpoint, tokenizer, shape)
    )


def _graph_facts(options: ExportOptions, shape: DecoderShape) -> GraphFacts:
    """Return what the graphs compute, for the manifest and the graphs' own metadata."""
    return GraphFacts(
        architecture=shape.architecture,
        layout=options.layout,
        steps=options.steps,
        pooling=options.pooling,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        kv_size=shape.kv_size,
        vocab_size=shape.vocab_size,
    )


def _notes(checkpoint: Checkpoint, tokenizer: CheckpointTokenizer, shape: DecoderShape) -> tuple[str, ...]:
    """Return what a user should know of the tokenizer."""
    found = (
        difference_note(tokenizer, vocab_size=shape.vocab_size),
        adapter_note(checkpoint.directory, checkpoint.adapter_directory),
    )
    return (*tokenizer.notes, *(note for note in found if note is not None))
