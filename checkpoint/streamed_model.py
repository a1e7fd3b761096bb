"""A model whose decoder layers come and go: what the PyTorch reference is where the whole model does not fit.

Hugging Face's own causal LM is built without weights. For every step its ``forward`` runs once per batch with empty
layers, which tells what it would call each layer with: masks, rotary phases, cache. Then one layer after another gets
its weights, with the adapter merged, runs all batches, and is empty again; meanwhile a thread reads the next one, if
there is memory for it. So K + 1 sweeps over the layers serve any number of batches, and no architecture has code of its
own here.
"""

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gircse.checkpoint.model_weights import ModelWeights, rows_of_block
from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE, LM_HEAD
from gircse.runtime.precision import SPECS, Precision

State = Mapping[str, Tensor]
"""Parameters of a module by name."""

T = TypeVar("T")

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a decoder layer after the hidden state."""


class StreamedModel:
    """A causal LM in which the decoder layers have weights only while they are used.

    Attributes:
        model: Hugging Face's causal LM. Hooks on its modules see every call; ``lm_head`` is called once per block of
            rows of its weight. Parameters that are not loaded are on the meta device.
        weights: where they come from.
        device: where it computes.
        dtype: of weights and arithmetic.
        num_layers: number of decoder layers.
        reads_ahead: whether the next layer is read while one computes, which takes the memory of another layer.
        resident_layers: how many of them, from the first on, keep their weights once these have been read.
    """

    def __init__(
        self,
        config: Any,
        weights: ModelWeights,
        *,
        device: str = "cpu",
        precision: Precision = Precision.FP32,
        reads_ahead: bool = True,
        resident_layers: int = 0,
        resident_vocabulary: bool = False,
    ) -> None:
        """Build the model, and load what is neither a decoder layer nor as large as the vocabulary.

        Args:
            config: of ``read_model_config``.
            weights: of the checkpoint, with its adapter.
            device: a torch device.
            precision: type of weights and arithmetic.
            reads_ahead: see the attribute.
            resident_layers: see the attribute.
            resident_vocabulary: whether the embeddings and lm_head stay on the device too, once they have been read.

        Raises:
            CheckpointError: a weight cannot be read or merged, or is not finite.
            RuntimeError: torch cannot use the device.
        """
        self.weights = weights
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, SPECS[precision].dtype)
        self.model: Any = _model_without_weights(config)
        _move_buffers(self.model, self.device)
        self._layers = [f"model.layers.{index}" for index in range(config.num_hidden_layers)]
        self.num_layers = len(self._layers)
        self.reads_ahead = reads_ahead
        self.resident_layers = resident_layers
        self._resident: dict[str, State] = {}
        self._resident_blocks: dict[str, list[Tensor]] | None = {} if resident_vocabulary else None
        self._spare: list[State] = []
        self._places = {name: place for place, name in enumerate(weights.base.entries)}
        self._empty = {name: self.model.get_submodule(name).state_dict() for name in self._layers}
        for name, parameter in list(self.model.named_parameters()):
            if name not in (EMBEDDING_TABLE, LM_HEAD) and not name.startswith("model.layers."):
                value = torch.empty(parameter.shape, dtype=self.dtype)
                weights.read(name, value)
                _replace(self.model, name, value.to(self.device))
        self._recorders = [_Recorder() for _ in self._layers]
        self._outline: Any = copy.copy(self.model.model)
        self._outline.__dict__["_modules"] = {
            **self.model.model._modules,
            "layers": nn.ModuleList(self._recorders),
            "norm": nn.Identity(),
        }

    def layers(self, *, start: int = 0) -> Iterator[str]:
        """Load one decoder layer after another, and empty it again when the next one is asked for.

        Args:
            start: number of the first one.

        Yields:
            The name of the layer that has its weights.

        Raises:
            CheckpointError: a weight cannot be read or merged, or is not finite.
        """
        names = self._layers[start:]
        states: Iterator[State] = map(self._read, names)
        for name, state in zip(names, _one_ahead(states) if self.reads_ahead else states, strict=True):
            layer = self.model.get_submodule(name)
            layer.load_state_dict({part: value.to(self.device) for part, value in state.items()}, assign=True)
            try:
                yield name
            finally:
                layer.load_state_dict(self._empty[name], assign=True)
                if name not in self._resident:
                    self._spare.append(state)  # another layer is read into it

    def free_buffers(self) -> None:
        """Give up the memory that layers were read into; the next sweep takes new one."""
        self._spare.clear()

    def begin(
        self,
        *,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Any = None,
    ) -> "LayerwiseForward":
        """Start a forward pass, to be run layer by layer.

        Args:
            inputs_embeds: (batch, tokens, hidden).
            attention_mask: (batch, past + tokens) int64.
            position_ids: (batch, tokens) int64.
            cache: a ``transformers`` cache with all layers at the same length, or None to keep no keys and values.
        """
        with torch.inference_mode():
            output = self._outline(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=cache is not None,
            )
        calls = {name: recorder.taken() for name, recorder in zip(self._layers, self._recorders, strict=True)}
        return LayerwiseForward(self.model, output.last_hidden_state, calls)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up the rows (batch, tokens, hidden) of token ids (batch, tokens); only these rows are read."""
        numbers, at = input_ids.cpu().unique(return_inverse=True)
        rows = self.weights.read_rows(EMBEDDING_TABLE, numbers).to(self.dtype)
        lookup: nn.Module = copy.copy(self.model.get_input_embeddings())
        lookup.__dict__["_parameters"] = {"weight": nn.Parameter(rows.to(self.device), requires_grad=False)}
        lookup.__dict__["padding_idx"] = None  # a row of the whole table
        with torch.inference_mode():
            embeddings: Tensor = lookup(at.to(self.device))
        return embeddings

    @property
    def missing_layers(self) -> int:
        """How many of the resident layers have not been read yet."""
        return self.resident_layers - len(self._resident)

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield a weight as blocks of rows on the device, with their range; the next is read meanwhile."""
        resident = self._resident_blocks
        if resident is not None and name not in resident:
            resident[name] = list(self._read_blocks(name))
        start = 0
        for block in self._read_blocks(name) if resident is None else resident[name]:
            yield slice(start, start + len(block)), block
            start += len(block)

    def _read_blocks(self, name: str) -> Iterator[Tensor]:
        step = rows_of_block(self.model.get_parameter(name).shape)
        for block in _one_ahead(self.weights.blocks(name, rows_at_once=step)):
            yield block.to(device=self.device, dtype=self.dtype)

    def head_blocks(self) -> Iterator[slice]:
        """Give ``lm_head`` one block of rows of its weight after another; yields their range."""
        empty = self.model.lm_head.weight
        try:
            for rows, block in self.blocks(LM_HEAD):
                self.model.lm_head.weight = nn.Parameter(block, requires_grad=False)
                yield rows
        finally:
            self.model.lm_head.weight = empty

    def _read(self, name: str) -> State:
        """Read a layer, into memory that another one has left if there is some."""
        if name in self._resident:
            return self._resident[name]
        empty = self._empty[name]
        if self._spare and all(self._spare[-1][part].shape == value.shape for part, value in empty.items()):
            state = self._spare.pop()
        else:
            pinned = self.device.type == "cuda"
            state = {
                part: torch.empty(value.shape, dtype=self.dtype, pin_memory=pinned) for part, value in empty.items()
            }
        for part in sorted(state, key=lambda part: self._places[f"{name}.{part}"]):  # no disk likes to jump
            self.weights.read(f"{name}.{part}", state[part])
        if name not in self._layers[: self.resident_layers]:
            return state
        self._resident[name] = {part: value.to(self.device) for part, value in state.items()}
        if self.device.type != "cpu":  # where a copy was made
            self._spare.append(state)
        return self._resident[name]


class LayerwiseForward:
    """A forward pass of one batch that is run layer by layer.

    Attributes:
        hidden: (batch, tokens, hidden), what the next layer reads; after the last one, what the final norm reads.
    """

    def __init__(self, model: nn.Module, hidden: Tensor, calls: Mapping[str, Call]) -> None:
        """Take what ``StreamedModel.begin`` recorded."""
        self.hidden = hidden
        self._model, self._calls = model, calls

    def run(self, layer: str) -> None:
        """Run a decoder layer, which has to be the next one and to have its weights."""
        arguments, options = self._calls[layer]
        with torch.inference_mode():
            self.hidden = self._model.get_submodule(layer)(self.hidden, *arguments, **options)


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self._call = (arguments, options)
        return hidden

    def taken(self) -> Call:
        """Return the arguments, and forget them."""
        call = self._call
        del self._call
        return call


def _one_ahead(values: Iterator[T]) -> Iterator[T]:
    """Yield the values of an iterator, while a thread takes the next one from it."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, values, None)
        while (value := coming.result()) is not None:
            coming = thread.submit(next, values, None)
            yield value


def _model_without_weights(config: Any) -> Any:
    """Return the causal LM with its parameters on the meta device; buffers, which no checkpoint holds, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module), parameter, nn.Parameter(value, requires_grad=False))
