"""A PEFT LoRA adapter: what it changes, and the changed weights, merged by PEFT one module at a time.

PEFT merges a module here exactly as ``merge_and_unload`` does in a whole model: it sees a tree that holds nothing
else. So every kind of LoRA that PEFT can merge into a linear layer or an embedding comes out as PEFT's, and no more
than one module is in memory.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE, LM_HEAD, match_names, rename
from gircse.runtime.errors import CheckpointError, reason_of

PEFT_PREFIX = "base_model.model."

MERGED_BY_PEFT = frozenset({
    "alpha_pattern", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
"""Fields of adapter_config.json that the merge follows."""

HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "megatron_core",
    "merge_weights", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
"""Fields that change nothing in the merged weights, whatever they say."""

HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": ("gaussian", "eva", "orthogonal", True),  # the others change the base weights when loaded
}
"""Fields that change nothing as long as they have one of these values. Every other field has to be empty."""

MERGE_YOURSELF = "Merge it with PEFT and export the merged model: docs/checkpoints.md shows how."

_ADAPTER_NAME = re.compile(r"(\.lora_\w+|\.trainable_tokens_delta|\.modules_to_save)\.(?!weight$|bias$)\w+(?=\.|$)")
"""PEFT leaves the adapter's name out of what it saves, ``default`` as a rule; other programs do not."""
_LORA = re.compile(r"lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")
_TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
_BASE_LAYER = "base_layer."


@dataclass(frozen=True)
class Adapter:
    """An adapter whose every tensor has its place in the model.

    Attributes:
        directory: of the adapter.
        config: PEFT's config, a ``LoraConfig``.
        tensors: its tensors, under PEFT's names without ``base_model.model.``: the module's name in Hugging Face's
            causal LM, and what it is there.
        lora: name of each module with LoRA factors, to what the factors are called.
        saved: names of the weights that are stored whole.
        token_rows: name of each embedding of which some rows are stored, to their numbers.
        notes: what a user should know, a line each.
    """

    directory: Path
    config: Any
    tensors: SafetensorsIndex
    lora: Mapping[str, tuple[str, ...]]
    saved: frozenset[str]
    token_rows: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, directory: Path, model: nn.Module, *, tied: bool, allow_partial: bool) -> Self:
        """Read the config and the headers.

        Args:
            directory: of the adapter.
            model: the causal LM, on the meta device.
            tied: lm_head is the embedding table.
            allow_partial: accept an adapter with tensors for some of the layers that its config targets.

        Raises:
            CheckpointError: PEFT cannot merge the adapter, or one of its tensors has no place in the model.
        """
        config = _read_config(directory)
        stored = SafetensorsIndex([directory / ADAPTER_WEIGHTS])
        if not stored.entries:
            raise CheckpointError(
                f"--adapter {directory}", "holds no tensors", None, "Train or download the adapter again."
            )
        modules = modules_with_weights(model)
        tensors, owners, notes = _name_tensors(directory, stored, modules)
        lora: dict[str, list[str]] = defaultdict(list)
        saved, token_rows = set(), {}
        for name, module in owners.items():
            part = name.removeprefix(f"{module}.")
            if _LORA.match(part) or part.startswith(_BASE_LAYER):
                lora[module].append(part)
            elif part == _TOKEN_ROWS:
                token_rows[module] = _token_indices(directory, config, module, tensors.entries[name].shape)
            elif isinstance(getattr(model.get_submodule(module), part, None), nn.Parameter):
                saved.add(name)
            else:
                raise CheckpointError(
                    f"--adapter {directory}",
                    f"holds a tensor {name}, which PEFT has no place for",
                    None,
                    "Check that it was saved by PEFT's save_pretrained.",
                )
        adapter = cls(
            directory,
            config,
            tensors,
            lora={module: tuple(parts) for module, parts in lora.items()},
            saved=frozenset(saved),
            token_rows=token_rows,
            notes=(*notes, *_unfilled_targets(directory, config, model, set(lora), allow_partial=allow_partial)),
        )
        adapter._check_patterns()
        adapter._check_saved_modules(model)
        adapter._check_vocabulary(tied=tied)
        return adapter

    @property
    def modules(self) -> set[str]:
        """The modules that it changes."""
        return {*self.lora, *self.token_rows, *(name.rpartition(".")[0] for name in self.saved)}

    @property
    def is_renamed(self) -> bool:
        """Whether its tensors are stored under other names than PEFT's."""
        return any(entry.name != f"{PEFT_PREFIX}{name}" for name, entry in self.tensors.entries.items())

    def save_renamed(self, directory: Path) -> None:
        """Write the tensors under PEFT's names, as a folder that PEFT can load."""
        directory.mkdir()
        tensors = {f"{PEFT_PREFIX}{name}": self.tensors.read_rows(name) for name in self.tensors.entries}
        save_file(tensors, directory / ADAPTER_WEIGHTS)
        self.config.save_pretrained(directory)

    @property
    def unties_vocabulary(self) -> bool:
        """Whether an embedding table and an lm_head that are the same in the base model differ with the adapter.

        A module of ``modules_to_save`` is a copy of its own. What is only saved along replaces the shared weight.
        """
        copies = tuple(self.config.modules_to_save or ())
        own = {name for name in (EMBEDDING_TABLE, LM_HEAD) if name.removesuffix(".weight").endswith(copies)}
        return bool(own & self.saved) and not self.config.ensure_weight_tying

    def merges(self, name: str) -> bool:
        """Return whether LoRA factors change a weight; the bias of a module is its own, but for ``lora_bias``."""
        module, _, parameter = name.rpartition(".")
        parts = self.lora.get(module, ())
        return bool(parts) and (parameter != "bias" or any(part.endswith(".bias") for part in parts))

    def merge(self, name: str, module: nn.Module) -> nn.Module:
        """Merge the LoRA factors of one module.

        Args:
            name: of the module in the causal LM.
            module: a copy of it with the weights of the base model, FP32; PEFT changes it.

        Returns:
            The merged module.

        Raises:
            CheckpointError: PEFT cannot merge it.
        """
        from peft import PeftModel, set_peft_model_state_dict

        parts = {part: self.tensors.read_rows(f"{name}.{part}") for part in self.lora[name]}
        for part in [part for part in parts if part.startswith(_BASE_LAYER)]:  # weights of the base, saved along
            module.register_parameter(
                part.removeprefix(_BASE_LAYER), nn.Parameter(parts.pop(part), requires_grad=False)
            )
        try:
            with quiet_transformers():
                model = PeftModel(_tree(name, module), self._config_for(name))
                state = {f"{PEFT_PREFIX}{name}.{part}": tensor for part, tensor in parts.items()}
                outcome: Any = set_peft_model_state_dict(model, state)
                merged: nn.Module = model.merge_and_unload().get_submodule(name)
        except Exception as err:  # PEFT raises whatever its layers raise
            raise CheckpointError(
                f"--adapter {self.directory}",
                f"cannot be merged into {name}: {reason_of(err)}",
                None,
                f"Check that {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} belong together, and to this model.",
            ) from err
        absent = [key for key in outcome.missing_keys if _LORA.search(key)]
        if absent or outcome.unexpected_keys:
            key, what = (
                (absent[0], "lacks") if absent else (outcome.unexpected_keys[0], "has a tensor that PEFT ignores:")
            )
            raise CheckpointError(
                f"--adapter {self.directory}",
                f"{what} {key.removeprefix(PEFT_PREFIX).replace('.default', '')}",
                f"{ADAPTER_CONFIG} says what it should hold",
                "Train or download the adapter again.",
            )
        return merged

    def merged_rows(self, module: str) -> tuple[Tensor, Tensor]:
        """Return the numbers (n,) int64 and values (n, hidden) float32 of the stored rows of an embedding."""
        return torch.tensor(self.token_rows[module]), self.tensors.read_rows(f"{module}.{_TOKEN_ROWS}")

    def _config_for(self, name: str) -> Any:
        """Return the config that makes PEFT adapt one module; ranks and scalings are looked up by its name."""
        config = copy.copy(self.config)
        config.target_modules = [name]
        config.exclude_modules = config.modules_to_save = config.trainable_token_indices = None
        config.layers_to_transform = config.layers_pattern = None
        config.ensure_weight_tying = False
        return config

    def _check_patterns(self) -> None:
        """Refuse ranks and scalings of modules that are not there: they are meant for others, under another name."""
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self.config, field) or {}:
                if not self._adapts(key):
                    raise CheckpointError(
                        str(self.directory / ADAPTER_CONFIG),
                        f"has {field} for {key!r}, which is none of the adapted modules",
                        None,
                        "Name it as in Hugging Face's causal LM, or remove it.",
                    )

    def _adapts(self, pattern: str) -> bool:
        """Whether a key of a pattern is that of an adapted module, as PEFT looks them up."""
        try:
            return any(re.match(rf"(.*\.)?({pattern})$", name) for name in self.lora)
        except re.error:
            return False

    def _check_saved_modules(self, model: nn.Module) -> None:
        """Refuse an adapter that lacks a module which its config says is stored whole; PEFT compares ends of names."""
        ends = tuple(self.config.modules_to_save or ())
        for name, module in model.named_modules():
            if not ends or not name.endswith(ends):
                continue
            missing = [part for part, _ in module.named_parameters() if f"{name}.{part}" not in self.saved]
            if missing and not (self.config.ensure_weight_tying and f"{name}.weight" == LM_HEAD):
                raise CheckpointError(
                    f"--adapter {self.directory}",
                    f"has no tensor {name}.{missing[0]}",
                    f"modules_to_save of {ADAPTER_CONFIG} names it",
                    "It is incomplete: download it again.",
                )
        if self.config.trainable_token_indices and not self.token_rows:
            raise CheckpointError(
                f"--adapter {self.directory}",
                "has no rows of the embedding",
                f"trainable_token_indices of {ADAPTER_CONFIG} numbers them",
                "It is incomplete: download it again.",
            )

    def _check_vocabulary(self, *, tied: bool) -> None:
        """Refuse what PEFT's merge and its unmerged model disagree on, or what nobody has tried."""
        both = set(self.lora) & {*self.token_rows, *(name.rpartition(".")[0] for name in self.saved)}
        ends = {name.removesuffix(".weight") for name in (EMBEDDING_TABLE, LM_HEAD)}
        if both:
            raise CheckpointError(
                f"--adapter {self.directory}", f"changes {min(both)} in two ways", None, MERGE_YOURSELF
            )
        if tied and (shared := ends & ({*self.lora} | {*self.token_rows} - {EMBEDDING_TABLE.removesuffix(".weight")})):
            raise CheckpointError(
                f"--adapter {self.directory}",
                f"adapts {min(shared)}, which shares its weights with {min(ends - {min(shared)})}",
                "merging would change both",
                "Untie them, merge with PEFT, and export the merged model: docs/checkpoints.md shows how.",
            )


def modules_with_weights(model: nn.Module) -> set[str]:
    """Return the names of the modules that own weights."""
    return {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}


def _read_config(directory: Path) -> Any:
    """Read adapter_config.json: every field is followed by the merge, harmless, or empty, or it is refused by name."""
    path = directory / ADAPTER_CONFIG
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            str(path), f"has peft_type {raw.get('peft_type')!r}", "only LORA can be merged here", MERGE_YOURSELF
        )
    if raw.get("alora_invocation_tokens"):
        raise CheckpointError(
            str(path),
            "has alora_invocation_tokens",
            "an activated LoRA acts on a part of the prompt only, so that it cannot be merged",
            "Use an adapter without them.",
        )
    wrong = [
        f"{name} {value!r}"
        for name, value in raw.items()
        if value and name not in MERGED_BY_PEFT | HARMLESS and value not in HARMLESS_VALUES.get(name, ())
    ]
    if wrong:
        raise CheckpointError(
            str(path), f"has {', '.join(sorted(wrong))}", "which cannot be merged here", MERGE_YOURSELF
        )
    if not all(isinstance(raw.get(name), (int, float)) for name in ("r", "lora_alpha")):
        raise CheckpointError(str(path), "has no number for r or lora_alpha", None, "Replace the file.")
    from peft import LoraConfig

    try:
        with quiet_transformers():
            config = LoraConfig.from_pretrained(str(directory))
    except Exception as err:  # PEFT raises whatever its fields raise
        raise CheckpointError(
            str(path), f"cannot be read by PEFT: {reason_of(err)}", None, "Replace the file."
        ) from err
    config.task_type = None  # it would only choose the class of PEFT's wrapper
    config.init_lora_weights = True  # the weights are loaded in any case
    return config


def _name_tensors(
    directory: Path, stored: SafetensorsIndex, modules: set[str]
) -> tuple[SafetensorsIndex, dict[str, str], list[str]]:
    """Give the tensors PEFT's names without ``base_model.model.``, and find the module that owns each of them."""
    plain = {name: _ADAPTER_NAME.sub(r"\1", name).removeprefix(PEFT_PREFIX) for name in stored.entries}
    plain = {name: short.replace(".modules_to_save.", ".") for name, short in plain.items()}
    parts = {
        name: re.search(r"\.((base_layer|lora_|token_adapter)[\w.]*|weight|bias)$", name) for name in plain.values()
    }
    # The names of modules decide the scheme.
    owners = {name: name[: found.start()] if found else name for name, found in parts.items()}
    matched = match_names(set(owners.values()), modules, where=f"--adapter {directory}")
    unknown = sorted(name for name, owner in owners.items() if owner in matched.left_over)
    if unknown:
        raise CheckpointError(
            f"--adapter {directory}",
            f"adapts {unknown[0]} ({len(unknown)} such)",
            "the model has no such module",
            "The adapter belongs to another model: check --adapter.",
        )
    renamed = {name: rename(short, matched.renames) for name, short in plain.items()}
    if len(set(renamed.values())) < len(renamed):
        raise CheckpointError(f"--adapter {directory}", "holds a tensor under two names", None, "Remove one.")
    notes = []
    if any(name != PEFT_PREFIX + new for name, new in renamed.items()):
        name, new = next((name, new) for name, new in renamed.items() if name != PEFT_PREFIX + new)
        notes.append(f"the adapter names its tensors in another way than PEFT: {name} is taken for {PEFT_PREFIX}{new}")
    owner_of = {renamed[name]: rename(owners[short], matched.renames) for name, short in plain.items()}
    return stored.renamed({new: name for name, new in renamed.items()}), owner_of, notes


def _token_indices(directory: Path, config: Any, module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the rows of an embedding that ``trainable_token_indices`` names."""
    given = config.trainable_token_indices
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if module.endswith(name)), None)
    if (
        not isinstance(given, list)
        or len(given) != shape[0]
        or not all(isinstance(row, int) and row >= 0 for row in given)
    ):
        raise CheckpointError(
            f"--adapter {directory}",
            f"stores {shape[0]} rows of {module}",
            f"trainable_token_indices of {ADAPTER_CONFIG} should number them",
            "The adapter is damaged: train or download it again.",
        )
    return tuple(given)


def _unfilled_targets(
    directory: Path, config: Any, model: nn.Module, adapted: set[str], *, allow_partial: bool
) -> list[str]:
    """Return a note for each kind of module that the config targets and no tensor adapts.

    Raises:
        CheckpointError: the config targets none of the adapted modules, or a kind is adapted in some layers only.
    """
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    try:
        config = _maybe_include_all_linear_layers(copy.copy(config), model)
        targeted = {
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding)) and _is_target(check_target_module_exists(config, name))
        }
    except Exception as err:  # regular expressions and types of the config
        raise CheckpointError(
            str(directory / ADAPTER_CONFIG),
            f"has targets that PEFT cannot read: {reason_of(err)}",
            None,
            "Replace the file.",
        ) from err
    if ignored := sorted(adapted - targeted):
        raise CheckpointError(
            f"--adapter {directory}",
            f"has tensors for {ignored[0]} ({len(ignored)} such)",
            f"its {ADAPTER_CONFIG} does not target it, so PEFT would ignore them",
            "Add it to target_modules, if it was trained.",
        )
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sorted(targeted):
        kinds[re.sub(r"\.\d+\.", ".N.", name)].append(name)
    notes = []
    for kind, names in kinds.items():
        missing = [name for name in names if name not in adapted]
        if not missing:
            continue
        if len(missing) < len(names) and not allow_partial:
            raise CheckpointError(
                f"--adapter {directory}",
                f"has no tensors for {missing[0]} ({len(missing)} such)",
                f"its config targets {len(names)} of the kind, and {len(names) - len(missing)} have tensors",
                "It is incomplete: download it again, or accept it with --allow-partial-adapter.",
            )
        notes.append(f"the adapter's config targets {kind}, and {len(missing)} of {len(names)} have no tensors")
    return notes


def _is_target(answer: object) -> bool:
    """Return what PEFT's answer means: True or a match, and not its marker of an excluded module."""
    return answer is True or isinstance(answer, re.Match)


def _tree(name: str, module: nn.Module) -> nn.Module:
    """Return a module that holds one other, at the place that its name says."""
    *parents, last = name.split(".")
    root = node = nn.Module()
    for parent in parents:
        child = nn.Module()
        node.add_module(parent, child)
        node = child
    node.add_module(last, module)
    return root
