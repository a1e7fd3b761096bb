"""Resolves a model and an adapter to local directories with safetensors weights.

Nothing in a checkpoint is ever executed: no remote code, no pickled weights.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gircse.checkpoint.demo import ADAPTER_DIRECTORY, DEMO_NAME, demo_checkpoint
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CheckpointError, OptionError
from gircse.runtime.manifest import AdapterSource, ModelSource

NO_ADAPTER = "none"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
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
    """

    directory: Path
    shards: tuple[Path, ...]
    adapter_directory: Path | None
    model: ModelSource
    adapter: AdapterSource | None


def resolve_checkpoint(model: str, *, adapter: str | None = None, revision: str | None = None) -> Checkpoint:
    """Find a model and its adapter, and download what is not local.

    Args:
        model: ``demo``, a local directory or a Hugging Face id.
        adapter: a local directory or Hugging Face id of a PEFT LoRA, or ``none``. None means the demo's own adapter
            for ``demo`` and no adapter for any other model.
        revision: branch, tag or commit of a Hugging Face model.

    Raises:
        CheckpointError: something is missing, cannot be downloaded, or is pickled.
        OptionError: a revision was given for a local model.
    """
    directory, name, commit = _resolve_model(model, revision)
    if revision is not None and commit is None:
        raise OptionError(
            "--revision",
            f"is {revision}, but {model} is not a Hugging Face id",
            None,
            "Leave --revision out.",
        )
    if adapter is None:
        adapter = DEMO_NAME if model == DEMO_NAME else NO_ADAPTER
    adapter_directory, adapter_source = _resolve_adapter(adapter)
    config = directory / "config.json"
    read_json(config)  # missing or damaged: say so before it is hashed
    return Checkpoint(
        directory=directory,
        shards=_find_shards(directory),
        adapter_directory=adapter_directory,
        model=ModelSource(name, commit, file_sha256(config)),
        adapter=adapter_source,
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
    except (OSError, ValueError) as err:
        raise CheckpointError(str(path), f"cannot be read as JSON: {err}", None, "Replace the file.") from err
    if not isinstance(value, dict):
        raise CheckpointError(
            str(path), f"holds a JSON {type(value).__name__}", "it should hold a JSON object", "Replace the file."
        )
    return value


def _resolve_model(model: str, revision: str | None) -> tuple[Path, str, str | None]:
    if model == DEMO_NAME:
        return demo_checkpoint(), DEMO_NAME, None
    return _resolve_directory(model, revision, _MODEL_FILES, "--model")


def _resolve_adapter(adapter: str) -> tuple[Path | None, AdapterSource | None]:
    if adapter == NO_ADAPTER:
        return None, None
    if adapter == DEMO_NAME:
        directory, name, commit = ADAPTER_DIRECTORY, DEMO_NAME, None
    else:
        directory, name, commit = _resolve_directory(adapter, None, _ADAPTER_FILES, "--adapter")
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        _refuse_pickles(directory, "peft.PeftModel.from_pretrained(model, DIR).save_pretrained(DIR)")
        raise CheckpointError(str(weights), "is missing", "--adapter takes a PEFT LoRA", "Check --adapter.")
    return directory, AdapterSource(name, commit, file_sha256(weights))


def _resolve_directory(
    name: str, revision: str | None, patterns: Sequence[str], flag: str
) -> tuple[Path, str, str | None]:
    local = Path(name).expanduser()
    if local.is_dir():
        return local, str(local.resolve()), None
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{flag} {name}", "is neither a directory nor a Hugging Face id", None, "Check the path.")
    snapshot = _download(name, revision, patterns)
    return snapshot, name, snapshot.name


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as err:  # hub, HTTP and socket errors share only Exception
        at = f" at revision {revision}" if revision else ""
        reason = (str(err) or "no message").splitlines()[0]
        raise CheckpointError(
            f"{repository}{at}",
            f"cannot be downloaded from Hugging Face ({type(err).__name__}: {reason})",
            None,
            "Check the name and the network, run 'hf auth login' for a gated model, or pass a local directory.",
        ) from err


def _find_shards(directory: Path) -> tuple[Path, ...]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        _refuse_pickles(directory, "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)")
        raise CheckpointError(str(directory), "holds no *.safetensors", None, "Check --model.")
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(
                str(directory / name), "is missing", f"{index.name} lists it", "Download the checkpoint again."
            )
    return tuple(directory / name for name in names)


def _refuse_pickles(directory: Path, how: str) -> None:
    for pattern in _PICKLES:
        for path in directory.glob(pattern):
            raise CheckpointError(
                str(path),
                "holds pickled weights",
                "only safetensors are read, because unpickling can run code",
                f"Convert it once, where you trust it: {how}",
            )
