"""Streams the reference's activations into statistics of constant size, separately for the prompt and each step.

The statistics do not grow with the number of texts: for each input, the largest magnitude of every channel in the
prompt and in each step, a sample of rows, and the second moments that weights are rounded by; for the softmax over the
vocabulary, the mean embedding of the tokens outside the top-k ones. Padding is never counted. Batches are observed one
at a time and the statistics can be saved in between: the same batches give the same statistics, bit for bit.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gircse.calibration.int8.gptq import add_moments, no_moments
from gircse.calibration.int8.scheme import TOP_K, InputKind, QuantizedInput
from gircse.calibration.moments_file import moment_name, moment_tensors
from gircse.checkpoint.reference import refine
from gircse.runtime.errors import CheckpointError
from gircse.runtime.tokenization import TokenBatch

SAMPLE_ROWS = 256
"""Rows of each input that are sampled from the prompts, and as many from the steps."""

Watch = Callable[[QuantizedInput, int, Tensor], None]
"""Takes an input, the step (0 for the prompt), and the rows (n, in) float32 of real tokens."""


@contextmanager
def watched(model: Any, inputs: Sequence[QuantizedInput], watch: Watch) -> Iterator["Position"]:
    """Call ``watch`` with the real rows of every input while the block runs the model.

    Yields:
        Where the model is; ``run_batch`` keeps it up to date.
    """
    position = Position()
    modules: Mapping[str, nn.Module] = dict(model.named_modules())

    def hook(quantized_input: QuantizedInput, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].flatten(0, -2)
        if rows.shape[0] == position.real.numel():  # the prompt; a step has no padding
            rows = rows[position.real]
        watch(quantized_input, position.step, rows)

    with ExitStack() as hooks:
        for quantized_input in inputs:
            module = modules[quantized_input.projections[0]]
            hooks.callback(module.register_forward_pre_hook(functools.partial(hook, quantized_input)).remove)
        yield position


class Position:
    """Which step a model is in, and which tokens of the prompt are real.

    Attributes:
        step: 0 for the prompt.
        real: (batch * tokens,) bool, False for padding; empty in a step, which has none.
    """

    def __init__(self) -> None:
        self.step = 0
        self.real = torch.ones(0, dtype=torch.bool)


def run_batch(model: Any, batch: TokenBatch, position: Position, *, steps: int, temperature: float) -> Iterator[Any]:
    """Run the refinement loop of one batch, yield its states, and keep ``position`` up to date."""
    ids, mask = (torch.from_numpy(array).to(model.device) for array in (batch.input_ids, batch.attention_mask))
    position.step, position.real = 0, mask.flatten().bool()
    for state in refine(model, ids, mask, steps=steps, temperature=temperature):
        yield state
        position.step += 1
        position.real = torch.ones(0, dtype=torch.bool)


class Observer:
    """The statistics of the batches observed so far.

    Attributes:
        channel_maxima: input name to (K + 1, in) float32, prompt first.
        rows: input name to (2, SAMPLE_ROWS, in) float32, of prompts and of steps; see ``sampled_rows``.
        moments: input name to the blocks of H, of every input but that of the vocabulary; see ``int8/gptq.py``.
        batches: number of batches observed.
    """

    def __init__(self, model: Any, inputs: Sequence[QuantizedInput], *, steps: int, seed: int) -> None:
        """Start with no batches.

        Args:
            model: a ``transformers`` causal LM in FP32.
            inputs: what to observe.
            steps: K.
            seed: chooses the sampled rows.
        """
        self._model, self._inputs, self._steps, self._seed = model, inputs, steps, seed
        modules = dict(model.named_modules())
        widths = {found.name: modules[found.projections[0]].in_features for found in inputs}
        hidden = model.get_input_embeddings().weight.shape[1]
        self.channel_maxima = {name: torch.zeros(steps + 1, width) for name, width in widths.items()}
        self.rows = {name: torch.zeros(2, SAMPLE_ROWS, width) for name, width in widths.items()}
        rounded = {found.name for found in inputs if found.kind is not InputKind.VOCABULARY}
        self.moments = {name: no_moments(width) for name, width in widths.items() if name in rounded}
        # Bottom-k sampling: every row draws a random number, and the rows with the smallest numbers stay.
        self._draws = {name: torch.full((2, SAMPLE_ROWS), torch.inf, dtype=torch.float64) for name in widths}
        self._tail = torch.zeros(hidden, dtype=torch.float64)
        self._tail_mass = torch.zeros((), dtype=torch.float64)
        self.batches = 0

    def observe(self, batch: TokenBatch, *, temperature: float) -> None:
        """Run one batch and add it to the statistics.

        Raises:
            CheckpointError: an activation is NaN or infinite.
        """
        table = self._model.get_input_embeddings().weight.detach()
        with watched(self._model, self._inputs, self._watch) as position:
            for state in run_batch(self._model, batch, position, steps=self._steps, temperature=temperature):
                if state.probabilities is not None:
                    self._observe_tail(state.probabilities, table)
        self.batches += 1

    def _watch(self, quantized_input: QuantizedInput, step: int, rows: Tensor) -> None:
        name = quantized_input.name
        maxima = rows.abs().amax(0).cpu()
        if not torch.isfinite(maxima).all():
            raise CheckpointError(
                name,
                f"has NaN or infinite values {f'at step {step}' if step else 'in the prompt'}, in FP32",
                None,
                "The checkpoint or the adapter is damaged: download it again.",
            )
        found = self.channel_maxima[name][step]
        torch.maximum(found, maxima, out=found)
        self._sample(name, int(step > 0), step, rows)
        if name in self.moments:
            add_moments(self.moments[name], rows)

    def _sample(self, name: str, part: int, step: int, rows: Tensor) -> None:
        draws = torch.from_numpy(np.random.default_rng((self._seed, self.batches, step)).random(len(rows)))
        smallest = self._draws[name][part]
        chosen = (draws < smallest.max()).nonzero().squeeze(1)
        if not len(chosen):
            return
        every = torch.cat([smallest, draws[chosen]])
        best = every.topk(SAMPLE_ROWS, largest=False, sorted=True).indices
        self.rows[name][part] = torch.cat([self.rows[name][part], rows[chosen].cpu()])[best]
        self._draws[name][part] = every[best]

    def _observe_tail(self, probabilities: Tensor, table: Tensor) -> None:
        top = probabilities.topk(min(TOP_K, probabilities.shape[1])).indices
        rest = probabilities.scatter(1, top, 0.0)
        self._tail += (rest @ table).double().sum(0).cpu()
        self._tail_mass += rest.double().sum().cpu()

    def sampled_rows(self, name: str) -> Tensor:
        """Return the sample of an input's rows (n, in) float32, n <= 2 * SAMPLE_ROWS."""
        return self.rows[name][torch.isfinite(self._draws[name])]

    def tail(self) -> Tensor:
        """Return the mean embedding (hidden,) float32 of the tokens outside the top-k ones, weighted by probability."""
        return (self._tail / self._tail_mass.clamp(min=1e-300)).float()

    def state(self) -> dict[str, Tensor]:
        """Return everything observed so far, for ``load_state``."""
        tensors = {"tail": self._tail, "tail_mass": self._tail_mass, "batches": torch.tensor(self.batches)}
        for name in self.rows:
            tensors[f"maxima.{name}"] = self.channel_maxima[name]
            tensors[f"rows.{name}"] = self.rows[name]
            tensors[f"draws.{name}"] = self._draws[name]
        return tensors | moment_tensors(self.moments)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what ``state`` returned."""
        self._tail, self._tail_mass = tensors["tail"], tensors["tail_mass"]
        self.batches = int(tensors["batches"])
        for name in self.rows:
            self.channel_maxima[name] = tensors[f"maxima.{name}"]
            self.rows[name] = tensors[f"rows.{name}"]
            self._draws[name] = tensors[f"draws.{name}"]
        for name, blocks in self.moments.items():
            self.moments[name] = [tensors[moment_name(name, index)] for index in range(len(blocks))]
