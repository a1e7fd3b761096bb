"""The model to export: its checkpoint, with what its small files and the headers of its shards say."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from gircse.calibration.int8.scheme import check_architecture
from gircse.checkpoint.hub import Download, download_snapshot
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.source import Checkpoint, resolve_checkpoint
from gircse.checkpoint.tokenizer import CheckpointTokenizer, open_checkpoint_tokenizer
from gircse.checkpoint.tokenizer_checks import adapter_note, check_serialized, difference_note
from gircse.export.graph.architecture import DecoderShape, check_limits, decoder_shape
from gircse.export.options import ExportOptions
from gircse.runtime.manifest import GraphFacts
from gircse.runtime.precision import SPECS
from gircse.runtime.tokenization import PromptTokenizer


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint that can be exported.

    Attributes:
        checkpoint: where its files are.
        weights: its weights, the adapter merged.
        config: its ``transformers`` config.
        shape: sizes of the decoder.
        facts: what its graphs compute.
        tokenizer: its tokenizer.
        prompts: turns texts into the token ids that the graphs see, as in the bundle.
        notes: what a user should know of it, one line each.
    """

    checkpoint: Checkpoint
    weights: ModelWeights
    config: Any
    shape: DecoderShape
    facts: GraphFacts
    tokenizer: CheckpointTokenizer
    prompts: PromptTokenizer
    notes: tuple[str, ...]


def open_source(options: ExportOptions, *, download: Download = download_snapshot) -> SourceModel:
    """Find a checkpoint and read everything but its weights.

    Args:
        options: what to export.
        download: fetches a repository from Hugging Face.

    Raises:
        CheckpointError: model, adapter or tokenizer cannot be used.
        CalibrationError: an INT8 variant is wanted, which does not exist for the model.
        OptionError: the model cannot hold the options.
    """
    checkpoint = resolve_checkpoint(
        options.model, adapter=options.adapter, revision=options.revision, download=download
    )
    config = read_model_config(checkpoint.directory)
    if any(SPECS[precision].calibrated for precision in options.precisions):
        check_architecture(config.model_type)
    shape = decoder_shape(config)
    check_limits(config, steps=options.steps, max_tokens=options.max_tokens)
    tokenizer = open_checkpoint_tokenizer(checkpoint.directory, options.tokenizer, vocab_size=shape.vocab_size)
    prompts = tokenizer.prompt_tokenizer(max_tokens=options.max_tokens, add_eos=options.add_eos)
    check_serialized(tokenizer)
    weights = ModelWeights.open(
        checkpoint, config, steps=options.steps, allow_partial_adapter=options.allow_partial_adapter
    )
    shape, facts = dataclasses.replace(shape, tied=weights.tied), _graph_facts(options, shape)
    notes = (*checkpoint.notes, *weights.notes, *_tokenizer_notes(checkpoint, tokenizer, shape))
    return SourceModel(checkpoint, weights, config, shape, facts, tokenizer, prompts, notes)


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


def _tokenizer_notes(checkpoint: Checkpoint, tokenizer: CheckpointTokenizer, shape: DecoderShape) -> tuple[str, ...]:
    """Return what a user should know of the tokenizer."""
    found = (
        difference_note(tokenizer, vocab_size=shape.vocab_size),
        adapter_note(checkpoint.directory, checkpoint.adapter_directory),
    )
    return (*tokenizer.notes, *(note for note in found if note is not None))
