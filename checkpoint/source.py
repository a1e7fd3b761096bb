"""Resolve a model and an adapter to local folders that hold safetensors only.

Nothing of a checkpoint is ever executed: no remote code, no pickled weights.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gircse.checkpoint.demo import ADAPTER_DIRECTORY, DEMO_NAME, demo_checkpoint
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CheckpointError
from gircse.runtime.manifest import AdapterSource, ModelSource

NO_ADAPTER = "none"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model*.safetensors",
    "*.safetensors.index.json",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A model, and the adapter to merge into it, on the local disk.

    Attributes:
        directory: folder with config.json, tokenizer.json and the safetensors shards.
        shards: the safetensors files.
        adapter_directory: folder of the PEFT LoRA, or None.
        model: where the model came from.
        adapter: where the adapter came from, or None.
    """

    directory: Path
    shards: tuple[Path, ...]
    adapter_directory: Path | None
    model: ModelSource
    adapter: AdapterSource | None


def resolve_checkpoint(model: str, *, adapter: str | None = None, revision: str | None = None) -> Checkpoint:
    """Find, and where needed download, a model and its adapter.

    Args:
        model: ``demo``, a local directory or a Hugging Face id.
        adapter: a local directory or Hugging Face id of a PEFT LoRA, or ``none``. None means the demo's own adapter
            for ``demo`` and no adapter for any other model.
        revision: branch, tag or commit of a Hugging Face model.

    Raises:
        CheckpointError: something is missing, cannot be downloaded, or is pickled.
    """
    directory, name, commit = _resolve_model(model, revision)
    if revision is not None and commit is None:
        raise CheckpointError(
            f"--revision {revision}: {model} is no Hugging Face id | a revision only with one | leave --revision out"
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
        CheckpointError: the file is missing or holds no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing | every checkpoint has a {path.name} | complete the checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path}: {err} | a JSON object | replace the file") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__} | a JSON object | replace the file")
    return value


def pad_token_id(directory: Path, tokens: dict[str, int]) -> int:
    """Return the id of the end-of-sequence token, which pads as in the reference code.

    Args:
        directory: the model's folder.
        tokens: the tokenizer's vocabulary, token to id.

    Raises:
        CheckpointError: neither tokenizer_config.json nor config.json names one.
    """
    tokenizer_config = directory / "tokenizer_config.json"
    eos = read_json(tokenizer_config).get("eos_token") if tokenizer_config.is_file() else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos in tokens:
        return tokens[eos]
    ids = read_json(directory / "config.json").get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(first, int):
        raise CheckpointError(
            f"{directory}: no eos_token in tokenizer_config.json and no eos_token_id in config.json | one of them: "
            "it pads short texts | add it"
        )
    return first


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
        raise CheckpointError(f"{weights}: missing | a PEFT LoRA folder | check --adapter")
    return directory, AdapterSource(name, commit, file_sha256(weights))


def _resolve_directory(
    name: str, revision: str | None, patterns: Sequence[str], flag: str
) -> tuple[Path, str, str | None]:
    local = Path(name).expanduser()
    if local.is_dir():
        return local, str(local.resolve()), None
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{flag} {name}: no such directory | a directory or a Hugging Face id | check the path")
    snapshot = _download(name, revision, patterns)
    return snapshot, name, snapshot.name


def _download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as err:  # hub, HTTP and socket errors share only Exception
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repository}{at}: cannot be downloaded ({type(err).__name__}: {str(err).splitlines()[0]}) | a reachable "
            "Hugging Face repository | check the name and the network, run 'hf auth login' for gated models, or pass "
            "a local directory"
        ) from err


def _find_shards(directory: Path) -> tuple[Path, ...]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        _refuse_pickles(directory, "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)")
        raise CheckpointError(f"{directory}: no *.safetensors | a checkpoint with safetensors weights | check --model")
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(
                f"{directory / name}: missing | a shard that {index.name} lists | download the checkpoint again"
            )
    return tuple(directory / name for name in names)


def _refuse_pickles(directory: Path, how: str) -> None:
    for pattern in _PICKLES:
        for path in directory.glob(pattern):
            raise CheckpointError(
                f"{path}: pickled weights | safetensors; unpickling can run code, so it is never done | convert it "
                f"once, where you trust it: {how}"
            )
