"""The model to export: its checkpoint, with what its small files and the headers of its shards say."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gircse.calibration.int8.scheme import check_architecture
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.source import Checkpoint, pad_token_id, resolve_checkpoint
from gircse.export.graph.architecture import DecoderShape, check_limits, decoder_shape
from gircse.export.options import ExportOptions
from gircse.runtime.errors import CheckpointError
from gircse.runtime.manifest import GraphFacts
from gircse.runtime.precision import SPECS
from gircse.runtime.tokenization import load_tokenizer


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
        pad_token_id: fills padding, and stands for an empty prompt.
    """

    checkpoint: Checkpoint
    weights: ModelWeights
    config: Any
    shape: DecoderShape
    facts: GraphFacts
    tokenizer: Tokenizer
    pad_token_id: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the checkpoint, a line each."""
        return (*self.checkpoint.notes, *self.weights.notes)


def open_source(options: ExportOptions) -> SourceModel:
    """Find a checkpoint and read everything but its weights.

    Raises:
        CheckpointError: model, adapter or tokenizer cannot be used.
        CalibrationError: an INT8 variant is wanted, which does not exist for the model.
        OptionError: the model cannot hold the options.
    """
    checkpoint = resolve_checkpoint(options.model, adapter=options.adapter, revision=options.revision)
    config = read_model_config(checkpoint.directory)
    if any(SPECS[precision].calibrated for precision in options.precisions):
        check_architecture(config.model_type)
    shape = decoder_shape(config)
    check_limits(config, steps=options.steps, max_tokens=options.max_tokens)
    tokenizer = _open_tokenizer(checkpoint.directory)
    pad = pad_token_id(checkpoint.directory, tokenizer.get_vocab())
    if max(tokenizer.get_vocab_size() - 1, pad) >= shape.vocab_size:
        raise CheckpointError(
            str(checkpoint.directory / "tokenizer.json"),
            f"has {tokenizer.get_vocab_size()} tokens",
            f"config.json allows at most {shape.vocab_size}",
            "The tokenizer belongs to another model.",
        )
    weights = ModelWeights.open(
        checkpoint, config, steps=options.steps, allow_partial_adapter=options.allow_partial_adapter
    )
    shape, facts = dataclasses.replace(shape, tied=weights.tied), _graph_facts(options, shape)
    return SourceModel(checkpoint, weights, config, shape, facts, tokenizer, pad)


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


def _open_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            str(path),
            "is missing",
            None,
            'Make it once: python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')\"",
        )
    return load_tokenizer(path)
