"""The PyTorch reference: defines what the vectors should be.

K soft tokens with a KV cache on Hugging Face's own model (arXiv 2509.24291; repository Roytsai27/GIRCSE)::

    h_0 = state of the prompt's last token (after the final norm)
    s_k = softmax(lm_head(h_{k-1}) / T) @ E
    h_k = state of the model fed s_k as the next input embedding
    z_k = normalized mean of h_1..h_k, or normalized h_k

E is the bare table, also where the model scales the rows that it looks up for the prompt (Gemma): the official code
multiplies with ``get_input_embeddings().weight`` and feeds the sum as ``inputs_embeds``, past the scale. Logits are
those of the causal LM, soft cap included.

Unlike the official code it passes explicit position ids, so padding does not shift the rotary phase, and it runs
K vocabulary projections, not K + 1.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gircse.checkpoint.adapter import Adapter
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.source import ADAPTER_CONFIG, Checkpoint
from gircse.checkpoint.tensor_naming import LM_HEAD
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.errors import CheckpointError, reason_of
from gircse.runtime.precision import SPECS, Precision

Advance = Callable[[float], None]


@dataclass(frozen=True)
class RefinementState:
    """State of the loop after the prompt (step 0) or after a refinement step.

    Attributes:
        hidden: (batch, hidden), h_k.
        probabilities: (batch, vocab), softmax that the soft token was made of; None for the prompt.
        soft_token: (batch, hidden), s_k, which was fed in; None for the prompt.
    """

    hidden: Tensor
    probabilities: Tensor | None = None
    soft_token: Tensor | None = None


@dataclass(frozen=True)
class BatchState(RefinementState):
    """State of one batch in one variation.

    Attributes:
        variation: number of the variation.
        batch: number of the batch.
        step: 0 after the prompt.
    """

    variation: int = 0
    batch: int = 0
    step: int = 0


Changed = Callable[[nn.Module, str, slice], AbstractContextManager[None]]
"""Changes a model while the block runs. Takes the causal LM, the name of the module that has its weights (empty: all of
them), and which rows of ``lm_head.weight`` these are, if that is the module."""

Reweight = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Takes probabilities (batch, vocab); returns weights (batch, vocab) of the rows of E, and what is added to their sum,
(batch, hidden) or None."""


def _unchanged(_model: nn.Module, _loaded: str, _rows: slice) -> AbstractContextManager[None]:
    return nullcontext()


def all_probabilities(probabilities: Tensor) -> tuple[Tensor, None]:
    """Weigh the rows of E as the formula says."""
    return probabilities, None


@dataclass(frozen=True)
class Variation:
    """How a run differs from the exact model.

    Attributes:
        changed: changes the loaded part of the model around each use.
        reweight: makes soft tokens of probabilities in another way.
    """

    changed: Changed = _unchanged
    reweight: Reweight = all_probabilities


EXACT = Variation()


class Reference(Protocol):
    """The reference, whole or streamed."""

    @property
    def model(self) -> Any:
        """Hugging Face's causal LM, for hooks.

        Its parameters may be on the meta device between uses, and lm_head may be called once per block of its rows.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen and why, a line each."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint that ``refine`` has read so far."""

    def refine(
        self,
        batches: Sequence[TokenBatch],
        *,
        steps: int,
        temperature: float,
        variations: Sequence[Variation] = (EXACT,),
        advance: Advance = lambda _: None,
    ) -> Iterator[BatchState]:
        """Run the prompt and K refinement steps of every batch in every variation.

        Args:
            batches: prompts, padded on the left.
            steps: K.
            temperature: T.
            variations: of the model.
            advance: told amounts that add up to the number of texts, times the variations.

        Yields:
            Every state once. The steps of a batch come in order, with other batches in between or not.
        """

    def estimate_seconds(self, batches: Sequence[TokenBatch], *, steps: int, variations: int = 1) -> float | None:
        """Return how long ``refine`` will take, from a short measurement; None where nobody has to wait for it."""


@dataclass(frozen=True)
class WholeReference:
    """The reference with the whole model in memory.

    Attributes:
        model: Hugging Face's causal LM, see ``load_reference``.
        notes: none.
        bytes_read: none; the model was read before.
    """

    model: Any
    notes: tuple[str, ...] = ()
    bytes_read: int = 0

    def refine(
        self,
        batches: Sequence[TokenBatch],
        *,
        steps: int,
        temperature: float,
        variations: Sequence[Variation] = (EXACT,),
        advance: Advance = lambda _: None,
    ) -> Iterator[BatchState]:
        """Run one batch after another; see ``Reference``."""
        for number, variation in enumerate(variations):
            with variation.changed(self.model, "", slice(None)):
                for index, batch in enumerate(batches):
                    ids, mask = tensors_of(batch, self.model.device)
                    states = refine(
                        self.model, ids, mask, steps=steps, temperature=temperature, reweight=variation.reweight
                    )
                    for step, state in enumerate(states):
                        yield BatchState(state.hidden, state.probabilities, state.soft_token, number, index, step)
                    advance(len(batch.rows))

    def estimate_seconds(self, batches: Sequence[TokenBatch], *, steps: int, variations: int = 1) -> None:
        """Estimate nothing: a model that is in memory is quick."""


def tensors_of(batch: TokenBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask of a batch, (batch, tokens) int64 each."""
    return torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.attention_mask).to(device)


def load_reference(
    checkpoint: Checkpoint,
    *,
    device: str = "cpu",
    precision: Precision = Precision.FP32,
    steps: int = 1,
    allow_partial_adapter: bool = True,
) -> Any:
    """Load the causal LM in FP32, merge its adapter with PEFT, then move it to its device and precision.

    Hugging Face and PEFT read the files themselves; where tensors have other names than theirs, they are given the
    renames that an export uses.

    Args:
        checkpoint: model and adapter.
        device: a torch device, such as ``cpu`` or ``cuda``.
        precision: type of weights and arithmetic: FP32, FP16 or BF16.
        steps: K; without steps the checkpoint may lack an lm_head.
        allow_partial_adapter: see ``Adapter.open``.

    Returns:
        A ``transformers`` causal LM in eval mode.

    Raises:
        CheckpointError: config, model or adapter cannot be read, loaded or merged.
    """
    config = read_model_config(checkpoint.directory)
    weights = ModelWeights.open(checkpoint, config, steps=steps, allow_partial_adapter=allow_partial_adapter)
    with tempfile.TemporaryDirectory(prefix="gircse-") as scratch, quiet_transformers():
        try:
            model = _load_base(checkpoint, config, weights, Path(scratch))
            if weights.adapter is not None:
                model = _merge_adapter(model, weights.adapter, Path(scratch))
        except CheckpointError:
            raise
        except Exception as err:  # transformers and PEFT raise whatever their parts raise
            raise CheckpointError(
                str(checkpoint.directory),
                f"cannot be loaded by PyTorch: {type(err).__name__}: {reason_of(err)}",
                None,
                "Check the checkpoint and the adapter.",
            ) from err
    model = model.to(device)
    for parameter in model.parameters():  # not the buffers: Hugging Face keeps the rotary frequencies in FP32 too
        parameter.data = parameter.data.to(getattr(torch, SPECS[precision].dtype))
    return model.eval()


def _load_base(checkpoint: Checkpoint, config: Any, weights: ModelWeights, scratch: Path) -> Any:
    from transformers import AutoModelForCausalLM

    directory = checkpoint.directory
    if (directory / ADAPTER_CONFIG).is_file():  # Hugging Face would load the adapter too
        directory = scratch / "model"
        directory.mkdir()
        for path in checkpoint.directory.iterdir():
            if not path.name.startswith("adapter_"):
                (directory / path.name).symlink_to(path.resolve())
    loaded_model: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="sdpa",
        use_safetensors=True,
        key_mapping=dict(weights.names.renames) or None,
        output_loading_info=True,
    )
    model, loaded = loaded_model
    missing = set(loaded["missing_keys"]) - (set() if LM_HEAD in weights.base.entries else {LM_HEAD})
    if unset := missing or set(loaded["mismatched_keys"]):
        raise CheckpointError(
            str(checkpoint.directory),
            f"leaves weights without a value in Hugging Face's model, such as {min(unset)}",
            None,
            "Check that config.json and weights belong together.",
        )
    return model


def _merge_adapter(model: Any, adapter: Adapter, scratch: Path) -> Any:
    """Let PEFT load and merge an adapter, from its own folder or from a copy with PEFT's names."""
    from peft import PeftModel

    directory = adapter.directory
    if adapter.is_renamed:
        directory = scratch / "adapter"
        adapter.save_renamed(directory)
    return PeftModel.from_pretrained(model, directory, config=copy.copy(adapter.config)).merge_and_unload()


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Project states (batch, hidden) to the vocabulary as the causal LM does, Gemma's soft cap included."""
    return soft_capped(model, model.lm_head(hidden))


def soft_capped(model: Any, projected: Tensor) -> Tensor:
    """Apply the soft cap that Gemma's causal LM has to what lm_head makes."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return projected if cap is None else cap * torch.tanh(projected / cap)


def first_positions(attention_mask: Tensor) -> Tensor:
    """Return the position (batch, tokens) of every token of left-padded prompts; padding has 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def step_states(model: Any, input_ids: Tensor, attention_mask: Tensor, *, steps: int, temperature: float) -> Tensor:
    """Return the states of every step of one batch.

    Args:
        model: a ``transformers`` causal LM.
        input_ids: (batch, tokens) int64, padded on the left.
        attention_mask: (batch, tokens) int64.
        steps: K.
        temperature: T.

    Returns:
        (batch, K + 1, hidden): h_0..h_K, not normalized, in the model's precision.
    """
    states = refine(model, input_ids, attention_mask, steps=steps, temperature=temperature)
    return torch.stack([state.hidden for state in states], dim=1)


def refine(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    steps: int,
    temperature: float,
    reweight: Reweight = all_probabilities,
) -> Iterator[RefinementState]:
    """Run the prompt and K refinement steps of one batch.

    Args:
        model: a ``transformers`` causal LM.
        input_ids: (batch, tokens) int64, padded on the left.
        attention_mask: (batch, tokens) int64.
        steps: K.
        temperature: T.
        reweight: weighs the rows of E by the probabilities, unless an INT8 variant is emulated.

    Yields:
        The state after the prompt and after each step, K + 1 in all.
    """
    from transformers import DynamicCache

    table = model.get_input_embeddings().weight
    cache = DynamicCache(config=model.config)
    positions = first_positions(attention_mask)
    inputs: dict[str, Tensor] = {"input_ids": input_ids}
    probabilities = soft_token = None
    for step in range(steps + 1):
        with torch.inference_mode():
            output = model.model(
                **inputs, attention_mask=attention_mask, position_ids=positions, cache=cache, use_cache=True
            )
        hidden = output.last_hidden_state[:, -1]
        yield RefinementState(hidden, probabilities, soft_token)
        if step < steps:
            with torch.inference_mode():
                probabilities = F.softmax(logits(model, hidden) / temperature, dim=-1)
                weights, rest = reweight(probabilities)
                soft_token = weights @ table if rest is None else weights @ table + rest
            inputs = {"inputs_embeds": soft_token[:, None]}
            positions = positions[:, -1:] + 1
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
