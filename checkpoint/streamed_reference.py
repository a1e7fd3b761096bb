"""The PyTorch reference for a model that does not fit into memory: K + 1 sweeps over its layers for a group of batches.

The numbers are those of the whole model, bit for bit, as long as the vocabulary is one block of rows; with several
blocks the soft token is summed up in another order (a test measures the difference). Hidden states and the KV caches of
a group stay in memory, so a group is as large as that allows.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.checkpoint.model_weights import rows_of_block
from gircse.checkpoint.reference import (
    EXACT,
    Advance,
    BatchState,
    Variation,
    first_positions,
    soft_capped,
    tensors_of,
)
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.streaming_time import StreamingRates
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE
from gircse.runtime.batch_planner import TokenBatch


class StreamedReference:
    """The reference with one decoder layer in memory at a time.

    Attributes:
        model: Hugging Face's causal LM, for hooks.
        notes: what was chosen and why.
    """

    def __init__(self, streamed: StreamedModel, *, group_bytes: int, notes: tuple[str, ...] = ()) -> None:
        """Take a model.

        Args:
            streamed: the model.
            group_bytes: of hidden states, caches and probabilities that are held at once.
            notes: what was chosen and why.
        """
        self.model = streamed.model
        self.notes = notes
        self._streamed, self._group_bytes = streamed, group_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint that were read so far."""
        return self._streamed.weights.bytes_read

    def refine(
        self,
        batches: Sequence[TokenBatch],
        *,
        steps: int,
        temperature: float,
        variations: Sequence[Variation] = (EXACT,),
        advance: Advance = lambda _: None,
    ) -> Iterator[BatchState]:
        """Run all batches and variations of a group through one layer after another; see ``Reference``."""
        for group in self._groups(batches, steps=steps, variations=len(variations)):
            runs = [
                _Run(number, variations[number], index, batches[index], self._streamed.device, self.model.config)
                for number, index in group
            ]
            texts = sum(len(batches[index].rows) for _, index in group)
            passes = (steps + 1) * self.model.config.num_hidden_layers
            self._embed_prompts(runs)
            for step in range(steps + 1):
                self._run_layers(runs, functools.partial(advance, texts / passes))
                for run in runs:
                    yield run.state(step)
                if step < steps:
                    self._make_soft_tokens(runs, temperature)

    @functools.cached_property
    def rates(self) -> StreamingRates:
        """What a layer takes on this machine; measured once, when it is asked for."""
        return StreamingRates.measure(self._streamed)

    def estimate_seconds(self, batches: Sequence[TokenBatch], *, steps: int, variations: int = 1) -> float:
        """Return how long ``refine`` will take, from what one layer takes now."""
        rates, resident = self.rates, self._streamed.resident_layers
        table = self.model.get_input_embeddings().weight
        blocks = table.shape[0] / rows_of_block(table.shape)
        layers_of_table = table.numel() / sum(value.numel() for value in self.model.model.layers[0].parameters())
        seconds = self._streamed.missing_layers * rates.read
        for group in self._groups(batches, steps=steps, variations=variations):
            texts = sum(len(batches[index].rows) for _, index in group)
            tokens = sum(batches[index].input_ids.size for _, index in group)
            for rows in (tokens, *[texts] * steps):
                kept, read = (rates.layer(rows=rows, batches=len(group), read=read) for read in (0, rates.read))
                seconds += resident * kept + (self._streamed.num_layers - resident) * read
            read = blocks * rates.block / layers_of_table
            seconds += 2 * steps * layers_of_table * rates.layer(rows=texts, batches=len(group), read=read)
        return seconds

    def _groups(self, batches: Sequence[TokenBatch], *, steps: int, variations: int) -> Iterator[list[tuple[int, int]]]:
        """Split the runs into groups that fit into memory; a single run that does not is a group of its own.

        Yields:
            Runs, each the number of a variation and of a batch.
        """
        group: list[tuple[int, int]] = []
        held = 0
        for run in itertools.product(range(variations), range(len(batches))):
            needed = self._bytes_of(batches[run[1]], steps)
            if group and held + needed > self._group_bytes:
                yield group
                group, held = [], 0
            group.append(run)
            held += needed
        if group:
            yield group

    def _bytes_of(self, batch: TokenBatch, steps: int) -> int:
        """Return what a batch holds from step to step: keys and values, a hidden state, probabilities and logits."""
        config = self.model.config
        heads, head_size = int(config.num_key_value_heads), _head_size(config)
        texts, tokens = batch.input_ids.shape
        cached = 2 * config.num_hidden_layers * heads * head_size * (tokens + steps)
        values = cached + 2 * tokens * int(config.hidden_size) + 3 * int(config.vocab_size)
        return int(texts * values * self._streamed.dtype.itemsize)

    def _embed_prompts(self, runs: Sequence["_Run"]) -> None:
        for run in runs:
            run.inputs = self._streamed.embed(run.input_ids)

    def _run_layers(self, runs: Sequence["_Run"], advance: Callable[[], None]) -> None:
        """Run one step of all batches through all layers and the final norm."""
        forwards = {
            run: self._streamed.begin(
                inputs_embeds=run.inputs, attention_mask=run.mask, position_ids=run.positions, cache=run.cache
            )
            for run in runs
        }
        for layer in self._streamed.layers():
            for variation, members in itertools.groupby(runs, _variation):
                with variation.changed(self.model, layer, slice(None)):
                    for run in members:
                        forwards[run].run(layer)
            advance()
        with torch.inference_mode():
            for run, forward in forwards.items():
                run.hidden = self.model.model.norm(forward.hidden[:, -1:])[:, 0]

    def _make_soft_tokens(self, runs: Sequence["_Run"], temperature: float) -> None:
        """Make the next input of all batches: softmax over the vocabulary, and the sum of the rows of E."""
        size = self.model.lm_head.weight.shape[0]
        logits = {run: run.hidden.new_empty(len(run.hidden), size) for run in runs}
        with torch.inference_mode():
            for rows in self._streamed.head_blocks():
                for variation, members in itertools.groupby(runs, _variation):
                    with variation.changed(self.model, "lm_head", rows):
                        for run in members:
                            logits[run][:, rows] = self.model.lm_head(run.hidden)
            weighed = []
            for run, found in logits.items():
                run.probabilities = F.softmax(soft_capped(self.model, found) / temperature, dim=-1)
                weighed.append(run.variation.reweight(run.probabilities))
            del logits
            sums = [torch.zeros_like(run.hidden) for run in runs]
            for rows, block in self._streamed.blocks(EMBEDDING_TABLE):
                for total, (weights, _) in zip(sums, weighed, strict=True):
                    total += weights[:, rows] @ block
            for run, total, (_, rest) in zip(runs, sums, weighed, strict=True):
                run.feed(total if rest is None else total + rest)


_variation = operator.attrgetter("variation")
"""The runs of a variation lie side by side; changing weights for it is most of their work."""


class _Run:
    """One batch in one variation, between the steps."""

    def __init__(
        self, number: int, variation: Variation, index: int, batch: TokenBatch, device: torch.device, config: Any
    ) -> None:
        from transformers import DynamicCache

        self.number, self.variation, self.batch = number, variation, index
        self.input_ids, self.mask = tensors_of(batch, device)
        self.positions = first_positions(self.mask)
        self.cache = DynamicCache(config=config)
        self.inputs: Tensor
        self.hidden: Tensor
        self.probabilities: Tensor | None = None
        self.soft_token: Tensor | None = None

    def state(self, step: int) -> BatchState:
        """Return the state after a step."""
        return BatchState(self.hidden, self.probabilities, self.soft_token, self.number, self.batch, step)

    def feed(self, soft_token: Tensor) -> None:
        """Let the next step read a soft token (batch, hidden)."""
        self.soft_token = soft_token
        self.inputs = soft_token[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = F.pad(self.mask, (0, 1), value=1)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
