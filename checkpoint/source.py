"""Resolves a model and an adapter to local directories with safetensors weights.

Nothing in a checkpoint is ever executed: no remote code, no pickled weights.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gircse.checkpoint.demo import ADAPTER_DIRECTORY, DEMO_NAME, demo_checkpoint
from gircse.checkpoint.hub import Download, download_snapshot
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CheckpointError, OptionError
from gircse.runtime.manifest import AdapterSource, ModelSource

NO_ADAPTER = "none"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "model*.safetensors",
    "*.safetensors.index.json",
    ADAPTER_CONFIG,
)
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A model, and the adapter to merge into it, on local disk.

    Attributes:
        directory: holds config.json, tokenizer.json and the safetensors shards.
        shards: the safetensors files.
        adapter_directory: directory of the PEFT LoRA, or None.
        model: where the model came from.
        adapter: where the adapter came from, or None.
        notes: what a user should know of the choice of files, a line each.
    """

    directory: Path
    shards: tuple[Path, ...]
    adapter_directory: Path | None
    model: ModelSource
    adapter: AdapterSource | None
    notes: tuple[str, ...] = ()


def resolve_checkpoint(
    model: str, *, adapter: str | None = None, revision: str | None = None, download: Download = download_snapshot
) -> Checkpoint:
    """Find a model and its adapter, and download what is not local.

    Args:
        model: ``demo``, a local directory or a Hugging Face id.
        adapter: a local directory or Hugging Face id of a PEFT LoRA, or ``none``. None means the demo's own adapter
            for ``demo`` and no adapter for any other model.
        revision: branch, tag or commit of a Hugging Face model.
        download: fetches a repository from Hugging Face.

    Raises:
        CheckpointError: something is missing, cannot be downloaded, or is pickled.
        OptionError: a revision was given for a local model.
    """
    directory, name, commit = _resolve_model(model, revision, download)
    if revision is not None and commit is None:
        raise OptionError(
            "--revision",
            f"is {revision}, but {model} is not a Hugging Face id",
            None,
            "Leave --revision out.",
        )
    if adapter is None:
        _refuse_unasked_adapter(directory, model)
        adapter = DEMO_NAME if model == DEMO_NAME else NO_ADAPTER
    adapter_directory, adapter_source = _resolve_adapter(adapter, download)
    config = directory / "config.json"
    raw = read_json(config)  # missing or damaged: say so before it is hashed
    if raw.get("transformers_weights"):
        raise CheckpointError(
            str(config),
            f"names a file of weights of its own, transformers_weights {raw['transformers_weights']!r}",
            f"weights are read from {_WEIGHTS} or {_INDEX}",
            "Save the model again with save_pretrained.",
        )
    shards, notes = _find_shards(directory)
    if adapter_directory is not None and adapter_source is not None and adapter_source.name != DEMO_NAME:
        notes += _other_base(adapter_directory, name)
    return Checkpoint(
        directory=directory,
        shards=shards,
        adapter_directory=adapter_directory,
        model=ModelSource(name, commit, file_sha256(config)),
        adapter=adapter_source,
        notes=tuple(notes),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or does not hold a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(str(path), "is missing", None, "Complete the checkpoint: every one has this file.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(str(path), f"cannot be read as JSON: {err}", None, "Replace the file.") from err
    if not isinstance(value, dict):
        raise CheckpointError(
            str(path), f"holds a JSON {type(value).__name__}", "it should hold a JSON object", "Replace the file."
        )
    return value


def check_in_reach(flag: str, source: ModelSource | AdapterSource) -> None:
    """Refuse to look for what was a local directory under its name alone, unless it is here.

    Args:
        flag: says where it is.
        source: as a bundle or a calibration recorded it.

    Raises:
        OptionError: it has to be named.
    """
    if source.revision is None and source.name != DEMO_NAME and not Path(source.name).is_dir():
        raise OptionError(
            flag, f"is needed: what was used is a local directory, {source.name}", None, "Name where it is."
        )


def _resolve_model(model: str, revision: str | None, download: Download) -> tuple[Path, str, str | None]:
    if model == DEMO_NAME:
        return demo_checkpoint(), DEMO_NAME, None
    return _resolve_directory(model, revision, _MODEL_FILES, "--model", download)


def _resolve_adapter(adapter: str, download: Download) -> tuple[Path | None, AdapterSource | None]:
    if adapter == NO_ADAPTER:
        return None, None
    if adapter == DEMO_NAME:
        directory, name, commit = ADAPTER_DIRECTORY, DEMO_NAME, None
    else:
        directory, name, commit = _resolve_directory(adapter, None, _ADAPTER_FILES, "--adapter", download)
    weights = directory / ADAPTER_WEIGHTS
    if not weights.is_file():
        _refuse_pickles(directory, "peft.PeftModel.from_pretrained(model, DIR).save_pretrained(DIR)")
        raise CheckpointError(str(weights), "is missing", "--adapter takes a PEFT LoRA", "Check --adapter.")
    return directory, AdapterSource(name, commit, file_sha256(weights))


def _resolve_directory(
    name: str, revision: str | None, patterns: Sequence[str], flag: str, download: Download
) -> tuple[Path, str, str | None]:
    local = Path(name).expanduser()
    if local.is_dir():
        return local, local.resolve().name, None  # not the path, which says more of the machine than of the model
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{flag} {name}", "is neither a directory nor a Hugging Face id", None, "Check the path.")
    snapshot = download(name, revision, patterns)
    return snapshot, name, snapshot.name


def _refuse_unasked_adapter(directory: Path, model: str) -> None:
    """Refuse to guess what becomes of an adapter in the model's own folder; Hugging Face would load it."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"--model {model}", "is an adapter", None, f"Name its base with --model, and add --adapter {model}."
        )
    raise CheckpointError(
        f"--model {model}",
        "has an adapter in its folder",
        None,
        f"Add --adapter {model} to merge it, or --adapter none to leave it out.",
    )


def _other_base(adapter: Path, model: str) -> list[str]:
    """Return a note if the adapter's config names another base model."""
    base = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or Path(base).name.casefold() == Path(model).name.casefold():
        return []
    return [f"the adapter was trained on {base}; it is merged into {model}"]


def _find_shards(directory: Path) -> tuple[tuple[Path, ...], list[str]]:
    """Choose the files of weights as Hugging Face does: the single file, else those of the index.

    Returns:
        The files, and a note on those that are ignored.
    """
    index = directory / _INDEX
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if (directory / _WEIGHTS).is_file():
        names = [_WEIGHTS]
    elif index.is_file():
        names = _indexed(index)
    else:
        _refuse_pickles(directory, "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)")
        found = f"has {', '.join(present)}, but neither" if present else "has neither"
        raise CheckpointError(str(directory), f"{found} {_WEIGHTS} nor {_INDEX}", None, "Check --model.")
    for name in names:
        if Path(name).name != name or not os.path.isfile(directory / name):  # not Path's: a name can be too long
            raise CheckpointError(
                str(directory / name), "is missing", f"{index.name} lists it", "Download the checkpoint again."
            )
    used = {*names, ADAPTER_WEIGHTS}
    ignored = [name for name in present if name not in used]
    if names == [_WEIGHTS] and index.is_file():
        ignored.append(_INDEX)
    notes = [f"ignored, as by Hugging Face: {', '.join(ignored)}"] if ignored else []
    return tuple(directory / name for name in names), notes


def _indexed(index: Path) -> list[str]:
    """Return the files that an index lists."""
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError(
            str(index), "lists no files", "its weight_map should give one for every tensor", "Download it again."
        )
    return sorted(set(weights.values()))


def _refuse_pickles(directory: Path, how: str) -> None:
    for pattern in _PICKLES:
        for path in directory.glob(pattern):
            raise CheckpointError(
                str(path),
                "holds pickled weights",
                "only safetensors are read, because unpickling can run code",
                f"Convert it once, where you trust it: {how}",
            )
