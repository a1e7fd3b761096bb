"""Stream the reference model's activations into statistics of constant size, the prompt and every step apart.

What is kept does not grow with the number of texts: of each input, the largest magnitude of every channel in the
prompt and in each step, a sample of rows, and the second moments that weights are rounded by; of the softmax over the vocabulary, the mean of what its likeliest
tokens leave over. Padding is never counted. Batches can be observed one after the other, with a save between: the
same batches give the same statistics, bit for bit.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gircse.calibration.int8.gptq import add_moments, no_moments
from gircse.calibration.int8.scheme import InputKind, QuantizedInput
from gircse.calibration.moments_file import moment_name, moment_tensors
from gircse.checkpoint.reference import refine
from gircse.runtime.errors import CheckpointError
from gircse.runtime.tokenization import TokenBatch

SAMPLE_ROWS = 256
"""Rows of each input that are kept from the prompts, and as many from the steps."""

TOP_K = 128
"""Likeliest tokens that the mixture of an INT8 variant adds up one by one; the rest is one calibrated vector."""

FLAT_MASS = 0.35
"""Probability left by the likeliest tokens above which the tail says too little and all tokens are added up: so flat is
the softmax of a prompt of one token, which decoder LLMs use as an attention sink. Demo: error of the soft token at most
14 % below, 24 % and more above."""

Watch = Any
"""A function of (site, step, rows): rows (n, in) float32 of real tokens."""


@contextmanager
def watched(model: Any, sites: Sequence[QuantizedInput], watch: Watch) -> Iterator["Position"]:
    """Call ``watch`` with the real rows of every site's input while the block runs the model.

    Yields:
        Where the model is; whoever runs it keeps it true.
    """
    position = Position()
    modules: Mapping[str, nn.Module] = dict(model.named_modules())

    def hook(site: QuantizedInput, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        if rows.shape[0] == position.real.numel():  # the prompt; a step has no padding
            rows = rows[position.real]
        watch(site, position.step, rows)

    with ExitStack() as hooks:
        for site in sites:
            handle = modules[site.projections[0]].register_forward_pre_hook(functools.partial(hook, site))
            hooks.callback(handle.remove)
        yield position


class Position:
    """Which step a model is in, and which tokens of the prompt (batch x tokens, flat) are no padding."""

    def __init__(self) -> None:
        self.step = 0
        self.real = torch.ones(0, dtype=torch.bool)


def run_batch(model: Any, batch: TokenBatch, position: Position, *, steps: int, temperature: float) -> Iterator[Any]:
    """Run the refinement loop of one batch and keep ``position`` true; yields its states."""
    ids, mask = (torch.from_numpy(array).to(model.device) for array in (batch.input_ids, batch.attention_mask))
    position.step, position.real = 0, mask.flatten().bool()
    for state in refine(model, ids, mask, steps=steps, temperature=temperature):
        yield state
        position.step += 1
        position.real = torch.ones(0, dtype=torch.bool)


class Observer:
    """The statistics of the batches seen so far.

    Attributes:
        channel_maxima: site name to (K + 1, in) float32, prompt first.
        rows: site name to (2, SAMPLE_ROWS, in) float32, of prompts and of steps; see ``sampled_rows``.
        moments: site name to the blocks of H, of every input but that of the vocabulary; see ``rounding.py``.
    """

    def __init__(self, model: Any, sites: Sequence[QuantizedInput], *, steps: int, seed: int) -> None:
        """Start with nothing seen.

        Args:
            model: a ``transformers`` causal LM in FP32.
            sites: what to observe.
            steps: K.
            seed: chooses the sampled rows.
        """
        self._model, self._sites, self._steps, self._seed = model, sites, steps, seed
        modules = dict(model.named_modules())
        widths = {site.name: modules[site.projections[0]].in_features for site in sites}
        hidden = model.get_input_embeddings().weight.shape[1]
        self.channel_maxima = {name: torch.zeros(steps + 1, width) for name, width in widths.items()}
        self.rows = {name: torch.zeros(2, SAMPLE_ROWS, width) for name, width in widths.items()}
        rounded = {site.name for site in sites if site.kind is not InputKind.VOCABULARY}
        self.moments = {name: no_moments(width) for name, width in widths.items() if name in rounded}
        # Bottom-k sampling: every row draws a number, and the rows with the smallest numbers stay.
        self._draws = {name: torch.full((2, SAMPLE_ROWS), torch.inf, dtype=torch.float64) for name in widths}
        self._tail = torch.zeros(hidden, dtype=torch.float64)
        self._tail_mass = torch.zeros((), dtype=torch.float64)
        self.batches = 0

    def observe(self, batch: TokenBatch, *, temperature: float) -> None:
        """Run one batch and add it to the statistics.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        table = self._model.get_input_embeddings().weight.detach()
        with watched(self._model, self._sites, self._watch) as position:
            for state in run_batch(self._model, batch, position, steps=self._steps, temperature=temperature):
                if state.probabilities is not None:
                    self._observe_mixture(state.probabilities, table)
        self.batches += 1

    def _watch(self, site: QuantizedInput, step: int, rows: Tensor) -> None:
        maxima = rows.abs().amax(0).cpu()
        if not torch.isfinite(maxima).all():
            raise CheckpointError(
                f"{site.name}: NaN or infinity {f'at step {step}' if step else 'in the prompt'}, in FP32 | finite values | "
                "the checkpoint or the adapter is damaged: download it again"
            )
        found = self.channel_maxima[site.name][step]
        torch.maximum(found, maxima, out=found)
        self._sample(site.name, int(step > 0), step, rows)
        if site.name in self.moments:
            add_moments(self.moments[site.name], rows)

    def _sample(self, name: str, part: int, step: int, rows: Tensor) -> None:
        draws = torch.from_numpy(np.random.default_rng((self._seed, self.batches, step)).random(len(rows)))
        kept = self._draws[name][part]
        chosen = (draws < kept.max()).nonzero().squeeze(1)
        if not len(chosen):
            return
        every = torch.cat([kept, draws[chosen]])
        best = every.topk(SAMPLE_ROWS, largest=False, sorted=True).indices
        self.rows[name][part] = torch.cat([self.rows[name][part], rows[chosen].cpu()])[best]
        self._draws[name][part] = every[best]

    def _observe_mixture(self, probabilities: Tensor, table: Tensor) -> None:
        top = probabilities.topk(min(TOP_K, probabilities.shape[1])).indices
        rest = probabilities.scatter(1, top, 0.0)
        self._tail += (rest @ table).double().sum(0).cpu()
        self._tail_mass += rest.double().sum().cpu()

    def sampled_rows(self, name: str) -> Tensor:
        """Return the sample of an input's rows (n, in) float32, n <= 2 * SAMPLE_ROWS."""
        return self.rows[name][torch.isfinite(self._draws[name])]

    def tail(self) -> Tensor:
        """Return the mean embedding (hidden,) float32 of the tokens after the likeliest, weighted by probability."""
        return (self._tail / self._tail_mass.clamp(min=1e-300)).float()

    def state(self) -> dict[str, Tensor]:
        """Return everything seen so far, for ``load_state``."""
        tensors = {"tail": self._tail, "tail_mass": self._tail_mass, "batches": torch.tensor(self.batches)}
        for name in self.rows:
            tensors[f"maxima.{name}"] = self.channel_maxima[name]
            tensors[f"rows.{name}"] = self.rows[name]
            tensors[f"draws.{name}"] = self._draws[name]
        return tensors | moment_tensors(self.moments)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""
        self._tail, self._tail_mass = tensors["tail"], tensors["tail_mass"]
        self.batches = int(tensors["batches"])
        for name in self.rows:
            self.channel_maxima[name] = tensors[f"maxima.{name}"]
            self.rows[name] = tensors[f"rows.{name}"]
            self._draws[name] = tensors[f"draws.{name}"]
        for name, blocks in self.moments.items():
            self.moments[name] = [tensors[moment_name(name, index)] for index in range(len(blocks))]
