"""Write a checkpoint, its LoRA merged, as the Q8_0 GGUF file that llama.cpp runs.

Q8_0 is llama.cpp's 8-bit format: blocks of 32 weights of a row share one FP16 scale. Vectors, and matrices whose rows
do not divide into blocks, stay FP32. The tied vocabulary is stored once. The file carries no tokenizer: llama.cpp is
fed token ids.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from gircse.checkpoint.demo import cache_directory
from gircse.checkpoint.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, read_json
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CheckpointError, ProviderError
from gircse.runtime.numerics import Float32

ARCHITECTURE = "llama"
_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")


def gguf_of(checkpoint: Checkpoint) -> Path:
    """Return the merged model as Q8_0 GGUF, written into the cache the first time.

    Args:
        checkpoint: as for :func:`write_q8_0_gguf`. Another file of it, or another adapter, gives another GGUF.

    Raises:
        CheckpointError: another architecture.
        ProviderError: gguf is not installed.
    """
    _check_supported(checkpoint.directory)
    contents = [checkpoint.model.config_sha256, *(file_sha256(shard) for shard in checkpoint.shards)]
    if checkpoint.adapter is not None and checkpoint.adapter_directory is not None:
        contents += [checkpoint.adapter.sha256, file_sha256(checkpoint.adapter_directory / ADAPTER_CONFIG)]
    key = hashlib.sha256("".join(contents).encode()).hexdigest()[:16]
    path = cache_directory() / f"{ARCHITECTURE}-{key}-q8_0.gguf"
    if not path.is_file():
        write_q8_0_gguf(checkpoint, path)
    return path


def embedding_table(checkpoint: Checkpoint) -> Float32:
    """Read E, (vocabulary, hidden) float32. Imports torch only for BF16, unknown to numpy.

    Raises:
        CheckpointError: the checkpoint has none, or the adapter changes it.
    """
    if checkpoint.adapter_directory is not None:
        with safe_open(checkpoint.adapter_directory / ADAPTER_WEIGHTS, framework="np") as file:
            if any("embed_tokens" in name or "lm_head" in name for name in file.keys()):
                raise CheckpointError(
                    str(checkpoint.adapter_directory),
                    "changes the vocabulary",
                    None,
                    "Leave llama-cpp out of --against.",
                )
    for shard in checkpoint.shards:
        with safe_open(shard, framework="np") as file:
            name = next((name for name in file.keys() if name.endswith("embed_tokens.weight")), None)
            if name is None:
                continue
            if file.get_slice(name).get_dtype() != "BF16":
                return np.asarray(file.get_tensor(name), dtype=np.float32)
        with safe_open(shard, framework="pt") as file:
            table: Float32 = file.get_tensor(name).float().numpy()
            return table
    raise CheckpointError(str(checkpoint.directory), "has no embedding table", None, "Use a model of a supported type.")


def write_q8_0_gguf(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the merged model to ``destination``, atomically. Holds the model in FP32.

    Args:
        checkpoint: a model of type ``llama`` without rotary scaling, and the adapter to merge.
        destination: the GGUF file; an existing one is replaced.

    Raises:
        CheckpointError: another architecture.
        ProviderError: gguf is not installed.
    """
    gguf = _gguf()
    _check_supported(checkpoint.directory)
    from gircse.checkpoint.reference import load_reference  # with torch, which a measured process must not hold

    model = load_reference(checkpoint)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as scratch:
        partial = Path(scratch) / destination.name
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        try:
            _add_metadata(writer, model.config)
            for name, tensor in _named_tensors(model):
                writer.add_tensor(name, *_encode(tensor))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        os.replace(partial, destination)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as err:
        raise ProviderError(
            "gguf",
            "is not installed",
            "it writes the GGUF file of llama.cpp",
            "Install it: pip install 'gircse-deploy[llama-cpp]'",
        ) from err
    return gguf


def _check_supported(directory: Path) -> None:
    """Refuse what this file would write wrongly: llama.cpp would silently compute something else."""
    config = read_json(directory / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key, found, expected in (
        ("model_type", config.get("model_type"), ARCHITECTURE),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)), 1.0),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
    ):
        if found != expected:
            raise CheckpointError(
                str(directory),
                f"has {key} {found}",
                f"gircse-bench writes GGUF files only for {key} {expected}",
                "Convert the merged model with llama.cpp's convert_hf_to_gguf.py --outtype q8_0 and pass the file with "
                "--gguf.",
            )


def _add_metadata(writer: Any, config: Any) -> None:
    gguf = _gguf()
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _named_tensors(model: Any) -> Iterator[tuple[str, Float32]]:
    """Yield each weight under llama.cpp's name, its rotary rows in llama.cpp's order."""
    gguf = _gguf()
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        if any(projection in name for projection in _ROTARY):
            rows = _interleave_rotary_rows(rows, config.head_dim)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), rows


def _interleave_rotary_rows(rows: Float32, head_dim: int) -> Float32:
    """Reorder a query or key projection: llama.cpp rotates neighbors, Hugging Face the halves of a head.

    Args:
        rows: (heads * head_dim, ...) float32, weight or bias.
        head_dim: rows of one head.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _encode(tensor: Float32) -> tuple[Any, None, Any]:
    """Return what ``GGUFWriter.add_tensor`` takes after the name: data, shape (that of the data) and type."""
    gguf = _gguf()
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    block_size, _ = gguf.GGML_QUANT_SIZES[q8_0]
    if tensor.ndim < 2 or tensor.shape[-1] % block_size:
        return tensor, None, gguf.GGMLQuantizationType.F32
    return gguf.quantize(tensor, q8_0), None, q8_0
