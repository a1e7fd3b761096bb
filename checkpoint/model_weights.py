"""The weights of a model with its adapter merged: named as in Hugging Face's causal LM, read a few rows at a time."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gircse.checkpoint.adapter import Adapter, modules_with_weights
from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.source import Checkpoint
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE, LM_HEAD, MatchedNames, match_names
from gircse.runtime.errors import CheckpointError, reason_of

BLOCK_ELEMENTS = 1 << 24
"""Most elements of a tensor that are read at once, unless an adapter changes it or the caller wants more rows."""

ReadRows = Callable[[slice], Tensor]
"""Reads rows of a tensor."""


def rows_of_block(shape: tuple[int, ...]) -> int:
    """Return how many rows of a tensor ``BLOCK_ELEMENTS`` allows, at least one."""
    return max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a checkpoint; only headers have been read.

    Attributes:
        model: the causal LM, on the meta device.
        base: tensors of the checkpoint, under the causal LM's names.
        names: how the checkpoint's names were matched with the causal LM's.
        adapter: the adapter, or None.
        tied: lm_head is the embedding table, with the adapter merged.
        notes: what a user should know, a line each.
    """

    model: nn.Module
    base: SafetensorsIndex
    names: MatchedNames
    adapter: Adapter | None
    tied: bool
    notes: tuple[str, ...]

    @classmethod
    def open(cls, checkpoint: Checkpoint, config: Any, *, steps: int, allow_partial_adapter: bool = False) -> Self:
        """Match a checkpoint and its adapter with the model that its config describes.

        Args:
            checkpoint: model and adapter.
            config: its ``transformers`` config.
            steps: K; without steps no lm_head is needed.
            allow_partial_adapter: see ``Adapter.open``.

        Raises:
            CheckpointError: a tensor is missing, left over, ambiguous or of another shape, or the adapter cannot be
                merged.
        """
        model = _meta_model(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
        stored = SafetensorsIndex(checkpoint.shards)
        names = match_names(stored.entries.keys(), shapes.keys(), where=str(checkpoint.directory))
        base = stored.renamed(names.stored)
        notes = _check_leftovers(stored, names)
        tied = bool(config.tie_word_embeddings) and _tie(base, notes)
        _check_tensors(str(checkpoint.directory), base, shapes, unneeded=set() if steps else {LM_HEAD})
        adapter = None
        if checkpoint.adapter_directory is not None:
            adapter = Adapter.open(checkpoint.adapter_directory, model, tied=tied, allow_partial=allow_partial_adapter)
            _check_saved(adapter, shapes)
            modules = len(modules_with_weights(model))
            notes += [*adapter.notes, f"the adapter changes {len(adapter.modules)} of the model's {modules} modules"]
            tied = tied and not adapter.unties_vocabulary
        return cls(model, base, names, adapter, tied, tuple(notes))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a weight, or None if there is no such weight."""
        entry = self.base.entries.get(name)
        return entry.shape if entry is not None else None

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights in FP32, a shared one counted once."""
        return 4 * sum(math.prod(entry.shape) for entry in set(self.base.entries.values()))

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's tensors in FP32."""
        entries = self.adapter.tensors.entries.values() if self.adapter is not None else ()
        return 4 * sum(math.prod(entry.shape) for entry in entries)

    @property
    def largest_read_bytes(self) -> int:
        """FP32 bytes of the largest piece that is in memory at once, as far as it is not the caller's choice."""
        pieces = {name: math.prod(entry.shape) for name, entry in self.base.entries.items()}
        for name in (EMBEDDING_TABLE, LM_HEAD):  # all others are transposed, which takes the whole tensor
            if name in pieces and not (self.adapter is not None and self.adapter.merges(name)):
                pieces[name] = min(pieces[name], BLOCK_ELEMENTS)
        return 4 * max(pieces.values(), default=0)

    def blocks(self, name: str, *, rows_at_once: int | None = None) -> Iterator[Tensor]:
        """Yield a weight with the adapter merged, FP32, some rows at a time.

        Args:
            name: of the weight.
            rows_at_once: None takes as many as ``BLOCK_ELEMENTS`` allows.

        Raises:
            CheckpointError: a value is NaN or infinite, or the adapter does not change the weight.
        """
        shape = self.base.entries[name].shape
        rows = rows_at_once or rows_of_block(shape)
        read = self._reader(name)
        for start in range(0, shape[0], rows):
            block = read(slice(start, start + rows))
            self._check_finite(name, block)
            yield block

    def read(self, name: str, out: Tensor) -> None:
        """Read a whole weight with the adapter merged into a tensor of its shape, which may be of another type.

        Into an FP32 one it is merged in place, as far as PEFT does so.

        Raises:
            CheckpointError: as for ``blocks``.
        """
        name = self._shared(name)
        if (index := self._stored_as_is(name)) is not None:
            index.copy_to(name, out)
        elif self.adapter is not None and self.adapter.merges(name):
            place = out if out.dtype is torch.float32 else torch.empty(out.shape)
            merged = self._merge(self.adapter, name, place)
            if not merged.is_set_to(out):
                out.copy_(merged)
        else:
            out.copy_(self._reader(name)(slice(0, len(out))))
        self._check_finite(name, out)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read from files so far."""
        return self.base.bytes_read + (self.adapter.tensors.bytes_read if self.adapter is not None else 0)

    def read_rows(self, name: str, numbers: Tensor) -> Tensor:
        """Return some rows (n, ...) FP32 of a weight with the adapter merged; ``numbers`` is (n,) int64.

        Raises:
            CheckpointError: as for ``blocks``.
        """
        name = self._shared(name)
        if (index := self._stored_as_is(name)) is not None:
            rows = index.gather(name, numbers)
        else:
            read = self._reader(name)
            rows = torch.cat([read(slice(number, number + 1)) for number in numbers.tolist()])
        self._check_finite(name, rows)
        return rows

    def _check_finite(self, name: str, values: Tensor) -> None:
        # Many times faster than isfinite: NaN passes through both, and infinity is one of them.
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(values)):
            raise CheckpointError(
                str(self.base.entries[name].file),
                f"has NaN or infinity in {self.base.entries[name].name}",
                None,
                "The checkpoint or the adapter is damaged: download it again.",
            )

    def _reader(self, name: str) -> ReadRows:
        """Return what reads rows of a weight: of the checkpoint, or of what the adapter makes of it."""
        name, adapter = self._shared(name), self.adapter
        module = name.rpartition(".")[0]
        if adapter is not None and adapter.merges(name):
            return self._merge(adapter, name, torch.empty(self.base.entries[name].shape)).__getitem__
        if adapter is not None and module in adapter.token_rows:
            return functools.partial(self._read_with_token_rows, name, *adapter.merged_rows(module))
        return functools.partial((self._stored_as_is(name) or self.base).read_rows, name)

    def _stored_as_is(self, name: str) -> SafetensorsIndex | None:
        """Return where a weight lies that is used as it is stored; None if an adapter changes it."""
        adapter = self.adapter
        if adapter is None:
            return self.base
        if name in adapter.saved:
            return adapter.tensors
        return None if adapter.merges(name) or name.rpartition(".")[0] in adapter.token_rows else self.base

    def _shared(self, name: str) -> str:
        """Return the name under which the adapter may have changed a weight that has two."""
        if not self.tied or self.adapter is None or name not in (EMBEDDING_TABLE, LM_HEAD):
            return name
        return (
            LM_HEAD if LM_HEAD in self.adapter.saved and EMBEDDING_TABLE not in self.adapter.saved else EMBEDDING_TABLE
        )

    def _read_with_token_rows(self, name: str, numbers: Tensor, values: Tensor, rows: slice) -> Tensor:
        block = self.base.read_rows(name, rows)
        inside = (numbers >= rows.start) & (numbers < rows.stop)
        block[numbers[inside] - rows.start] = values[inside]
        return block

    def _merge(self, adapter: Adapter, name: str, place: Tensor) -> Tensor:
        """Return a weight of a module with LoRA factors, merged by PEFT, which is given the base weight in a place."""
        path, _, parameter = name.rpartition(".")
        module = copy.deepcopy(self.model.get_submodule(path))
        for part in [part for part, _ in module.named_parameters(recurse=False) if adapter.merges(f"{path}.{part}")]:
            weight = place if part == parameter else torch.empty(self.base.entries[f"{path}.{part}"].shape)
            self.base.copy_to(f"{path}.{part}", weight)
            module.register_parameter(part, nn.Parameter(weight, requires_grad=False))
        before = torch.hash_tensor(module.get_parameter("weight"))  # a copy would be as large as the weight
        merged = adapter.merge(path, module)
        if torch.hash_tensor(merged.get_parameter("weight")) == before:
            raise CheckpointError(
                f"--adapter {adapter.directory}",
                f"leaves {path}.weight as it is",
                "a trained adapter changes every weight that it names",
                "The adapter is untrained or damaged: check --adapter.",
            )
        return merged.get_parameter(parameter).detach()


def _equal(one: ReadRows, other: ReadRows, shape: tuple[int, ...]) -> bool:
    """Compare two tensors of a shape, a block of rows at a time."""
    rows = rows_of_block(shape)
    blocks = (slice(start, start + rows) for start in range(0, shape[0], rows))
    return all(torch.equal(one(block), other(block)) for block in blocks)


def _meta_model(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as err:  # what torch and transformers raise at a model of impossible sizes
        raise CheckpointError(
            "config.json",
            f"describes a model that transformers cannot build: {reason_of(err)}",
            None,
            "Check that its numbers are those of the checkpoint.",
        ) from err
    return model


def _tie(base: SafetensorsIndex, notes: list[str]) -> bool:
    """Give an embedding table and an lm_head that are the same both names; return whether they are the same.

    Hugging Face does not tie what is stored twice with different values, whatever config.json says.
    """
    entries = base.entries
    for name, other in ((EMBEDDING_TABLE, LM_HEAD), (LM_HEAD, EMBEDDING_TABLE)):
        if name not in entries and other in entries:
            entries[name] = entries[other]
    table, head = entries.get(EMBEDDING_TABLE), entries.get(LM_HEAD)
    if table is None or head is None or table == head:
        return True
    if table.shape == head.shape:
        read_table, read_head = (functools.partial(base.read_rows, name) for name in (EMBEDDING_TABLE, LM_HEAD))
        if _equal(read_table, read_head, table.shape):
            entries[LM_HEAD] = table
            return True
    notes.append(
        "config.json ties lm_head to the embedding table, but the checkpoint has different values for it: not tied"
    )
    return False


def _check_leftovers(stored: SafetensorsIndex, names: MatchedNames) -> list[str]:
    """Refuse tensors that the model has no place for, unless the model is known to be a part of the checkpoint.

    Returns:
        A note on what is left out.
    """
    # Old checkpoints store the rotary frequencies, which the config determines.
    unknown = [name for name in names.left_over if not name.endswith("rotary_emb.inv_freq")]
    notes = [f"tensors are named {names.scheme.description}"] if names.renames else []
    if unknown and not names.scheme.partial:
        raise CheckpointError(
            str(stored.entries[unknown[0]].file),
            f"has a tensor {unknown[0]} ({len(unknown)} such) that has no place in the model",
            None,
            "Check that config.json and weights belong together.",
        )
    if unknown:
        notes.append(f"{len(unknown)} tensors outside the language model are left out, such as {unknown[0]}")
    return notes


def _check_tensors(
    where: str, base: SafetensorsIndex, shapes: Mapping[str, tuple[int, ...]], *, unneeded: set[str]
) -> None:
    """Refuse weights that are missing or of another shape."""
    for name, shape in shapes.items():
        if name not in base.entries:
            if name in unneeded:
                continue
            if name == LM_HEAD:
                raise CheckpointError(
                    where,
                    f"has no tensor {LM_HEAD}, which refinement steps read",
                    "config.json does not tie it to the embedding table",
                    "Use the causal LM's checkpoint, or export the plain encoder with --steps 0.",
                )
            raise CheckpointError(
                where,
                f"has no tensor {name}",
                None,
                "It is incomplete, or its config.json belongs to another model: download it again.",
            )
        entry = base.entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                str(entry.file),
                f"has {entry.name} of shape {list(entry.shape)}",
                f"config.json says {list(shape)}",
                "The config belongs to another model: download the checkpoint again.",
            )


def _check_saved(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights of an adapter that are not of the model's shape, and rows beyond the end of its vocabulary."""
    for name in sorted(adapter.saved):
        got, wanted = adapter.tensors.entries[name].shape, shapes[name]
        if got != wanted:
            hint = "The tokenizer was enlarged for the adapter: merge it with PEFT and export the merged model."
            raise CheckpointError(
                f"--adapter {adapter.directory}",
                f"has {name} of shape {list(got)}",
                f"the model has {list(wanted)}",
                hint if got[1:] == wanted[1:] else "The adapter belongs to another model: check --adapter.",
            )
    for module, rows in adapter.token_rows.items():
        if max(rows, default=0) >= shapes[f"{module}.weight"][0]:
            raise CheckpointError(
                f"--adapter {adapter.directory}",
                f"changes row {max(rows)} of {module}",
                f"the model has {shapes[f'{module}.weight'][0]}",
                "The adapter belongs to another model: check --adapter.",
            )
