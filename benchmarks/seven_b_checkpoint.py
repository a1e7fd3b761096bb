"""A checkpoint of random weights in the exact shape of a published model, with a LoRA adapter as PEFT saves it.

python benchmarks/seven_b_checkpoint.py qwen-7b DIR             # 15.2 GB in DIR, 162 MB in DIR-adapter
python benchmarks/seven_b_checkpoint.py qwen-7b DIR --layers 2  # the first two of its layers

Every tensor but the final norm depends on its name and the seed alone, so fewer layers are the first ones of the whole
model. What makes the activations behave like those of a trained model:

- each layer multiplies the residual stream by the same factor, a third of the added variance from attention. All
  together add ``ADDED_VARIANCE`` for each channel, so that a token stands out alike in narrow and in wide states;
- some channels grow ``OUTLIER_GAIN`` times as large, and the norms damp them again: the first of ``OUTLIERS``, one for
  ``CHANNELS_AN_OUTLIER`` of them;
- two tokens are attention sinks, as first tokens and delimiters are: the first of every prompt with an instruction,
  and the line break. They alone use ``SINK_CHANNEL``, on which one neuron of layer 0 writes values of about a thousand
  into ``MASSIVE``, and they are hardly ever predicted;
- the rows of lm_head are those of the embeddings, one further (in a tied model the same), so that a token predicts
  one other, ``TOP_MARGIN`` nats ahead of all the rest together.

The last point makes the model insensitive to rounding, as trained ones are. With independent rows for lm_head every
step multiplies the error of its input, through the layers and the softmax, by ten to a hundred: in FP32 the fourth
step is noise.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from gircse.checkpoint.demo import demo_checkpoint
from gircse.checkpoint.model_weights import rows_of_block

SHARD_BYTES = 4_000_000_000
EMBEDDING_STD = 0.02
ADDED_VARIANCE = (1.04**56 - 1) / 3584  # 4 % in each of the 28 layers of qwen-7b
TOP_MARGIN = 3.0
OUTLIERS, OUTLIER_GAIN, CHANNELS_AN_OUTLIER = (11, 170, 402, 555, 701, 860), 8.0, 512
MASSIVE = {303: 0.4, 619: -0.2}
SINK_CHANNEL, SINK_VALUE, SINK_NEURON = 137, 0.8, 77
DAMPED_GAIN = 0.05  # of the norms for outliers, and of whatever could be mistaken for a sink
SILU_RMS = 0.6  # of silu(a) * b for normal a and b
RANK, ALPHA, ADAPTER_SHARE = 16, 64, 0.1
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}  # those of the tokenizer
_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    **_SPECIAL_TOKENS,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "qwen-7b": {
        **_QWEN25,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        **_SPECIAL_TOKENS,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "1.5b": {
        **_QWEN25,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "0.5b": {
        **_QWEN25,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
}
"""``config.json`` of Qwen2.5-7B, Mistral-7B-v0.1, Qwen2.5-1.5B and Qwen2.5-0.5B, but for the ids of special tokens."""


def main() -> None:
    """Make the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=CONFIGS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--adapter", type=Path, help="folder of the adapter (default: DIRECTORY-adapter)")
    parser.add_argument("--layers", type=int, help="number of layers (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    adapter = args.adapter or args.directory.with_name(f"{args.directory.name}-adapter")
    make_checkpoint(args.shape, args.directory, layers=args.layers, seed=args.seed)
    make_adapter(args.shape, adapter, base=args.directory.name, layers=args.layers, seed=args.seed)
    print(args.directory)


def make_checkpoint(shape: str, directory: Path, *, layers: int | None = None, seed: int = 0) -> None:
    """Write config, tokenizer and BF16 shards; nothing but a block of rows is ever in memory.

    Args:
        shape: a key of ``CONFIGS``.
        directory: where to write; it appears when it is complete.
        layers: how many of the shape's layers; None takes all.
        seed: of the weights.
    """
    config = _config(shape, layers)
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    sinks = _write_tokenizer(unfinished, config["vocab_size"])
    recipe = Recipe(config, growth=_growth(CONFIGS[shape]), sinks=sinks, seed=seed)
    shapes = _tensor_shapes(config)
    shards = _shards(shapes)
    weight_map = {}
    for number, members in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (unfinished / name).open("wb") as file:
            _write_shard(file, members, recipe)
        weight_map |= dict.fromkeys(members, name)
    total = sum(_bytes(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    unfinished.rename(directory)


def make_adapter(shape: str, directory: Path, *, base: str, layers: int | None = None, seed: int = 0) -> None:
    """Write a LoRA adapter of rank 16 on the seven projections, for the model called ``base``."""
    config = _config(shape, layers)
    recipe = Recipe(config, growth=_growth(CONFIGS[shape]), sinks=(), seed=seed)
    tensors = {}
    for name, tensor_shape in _tensor_shapes(config).items():
        if not name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS)):
            continue
        outputs, inputs = tensor_shape
        module = f"base_model.model.{name.removesuffix('.weight')}"
        # alpha / r * B A x has ADAPTER_SHARE of the size of W x.
        b_std = ADAPTER_SHARE * recipe.std(name) * math.sqrt(inputs) * RANK / ALPHA / math.sqrt(RANK)
        for factor, size, std in (("A", (RANK, inputs), inputs**-0.5), ("B", (outputs, RANK), b_std)):
            key = f"{module}.lora_{factor}.weight"
            tensors[key] = torch.randn(size, generator=recipe.generator(key)) * std
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        base_model_name_or_path=base,
        inference_mode=True,
        lora_alpha=ALPHA,
        r=RANK,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    ).save_pretrained(str(directory))


@dataclass(frozen=True)
class Recipe:
    """How the values of each tensor are drawn.

    Attributes:
        config: content of config.json.
        growth: factor by which a layer multiplies the residual stream.
        sinks: ids of the tokens that are attention sinks.
        seed: of all tensors.
    """

    config: Mapping[str, Any]
    growth: float
    sinks: tuple[int, ...]
    seed: int

    def generator(self, name: str) -> torch.Generator:
        """Return the source of randomness of a tensor; lm_head shares that of the embeddings."""
        name = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """Yield a tensor in BF16, some rows at a time."""
        generator, gains, spikes = self.generator(name), self._row_gains(name), self._spikes(name)
        center, std = self._center(name), self.std(name)
        for start in range(0, shape[0], rows_of_block(shape)):
            rows = range(start, min(start + rows_of_block(shape), shape[0]))
            block = torch.randn(len(rows), *shape[1:], generator=generator).mul_(std).add_(center)
            for row in gains.keys() & set(rows):
                block[row - start] *= gains[row]
            if name == "model.embed_tokens.weight":
                block[:, SINK_CHANNEL] *= DAMPED_GAIN
            for (row, *column), value in spikes.items():
                if row in rows:
                    block[(row - start, *column)] = value
            yield (block.roll(1, 0) if name == "lm_head.weight" else block).bfloat16()

    def std(self, name: str) -> float:
        """Return the standard deviation of a tensor's values."""
        hidden, intermediate = self.config["hidden_size"], self.config["intermediate_size"]
        if name.endswith("norm.weight"):
            return 0.2 * self._center(name)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            return EMBEDDING_STD
        if name.endswith("v_proj.bias"):
            return 0.1
        if name.endswith(".bias"):
            return 0.5
        if name.endswith("q_proj.weight"):
            return 1.5 / math.sqrt(hidden)
        added = EMBEDDING_STD * self.growth ** int(name.split(".")[2]) * math.sqrt(self.growth**2 - 1)
        if name.endswith("o_proj.weight"):
            return added * math.sqrt(1 / 3 / hidden)
        if name.endswith("down_proj.weight"):
            return added * math.sqrt(2 / 3 / intermediate) / SILU_RMS
        return 1 / math.sqrt(hidden)

    @property
    def _outliers(self) -> tuple[int, ...]:
        return OUTLIERS[: self.config["hidden_size"] // CHANNELS_AN_OUTLIER]

    def _center(self, name: str) -> float:
        """Return the mean of a tensor's values."""
        if name == "model.norm.weight":
            # What is left of the token's embedding in the state, times its own row, is a logit of log(V) + TOP_MARGIN.
            left = self.growth ** -self.config["num_hidden_layers"]
            scale = (math.log(self.config["vocab_size"]) + TOP_MARGIN) / left
            return scale / EMBEDDING_STD / self.config["hidden_size"]
        return 1.0 if name.endswith("norm.weight") else 0.0

    def _row_gains(self, name: str) -> dict[int, float]:
        """Return the rows of a tensor that are larger or smaller than the others."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return dict.fromkeys(self.sinks, DAMPED_GAIN)
        if name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"):
            return {SINK_NEURON: DAMPED_GAIN}
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return {**dict.fromkeys(self._outliers, OUTLIER_GAIN), SINK_CHANNEL: DAMPED_GAIN}
        return {}

    def _spikes(self, name: str) -> dict[tuple[int, ...], float]:
        """Return the values of a tensor that are not drawn."""
        if name == "model.embed_tokens.weight":
            return {(token, SINK_CHANNEL): SINK_VALUE for token in self.sinks}
        if name.endswith("norm.weight"):
            damped = {*self._outliers, *MASSIVE}
            if name != "model.layers.0.post_attention_layernorm.weight":
                damped.add(SINK_CHANNEL)
            return {(channel,): DAMPED_GAIN * self._center(name) for channel in damped}
        if name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"):
            return {(SINK_NEURON, SINK_CHANNEL): 1.0}
        if name == "model.layers.0.mlp.down_proj.weight":
            return {(channel, SINK_NEURON): value for channel, value in MASSIVE.items()}
        return {}


def _config(shape: str, layers: int | None) -> dict[str, Any]:
    config = dict(CONFIGS[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config


def _growth(config: Mapping[str, Any]) -> float:
    return float((1 + ADDED_VARIANCE * config["hidden_size"]) ** (0.5 / config["num_hidden_layers"]))


def _tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return what Hugging Face's own model saves."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _write_tokenizer(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """Write the demo's byte-level BPE, cut to the vocabulary where that is smaller.

    Returns:
        The tokens that become attention sinks.
    """
    content = json.loads((demo_checkpoint() / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    vocab = {token: number for token, number in model["vocab"].items() if number < vocab_size}
    content["model"] = {**model, "vocab": vocab, "merges": [pair for pair in model["merges"] if "".join(pair) in vocab]}
    text = json.dumps(content, ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    config = (demo_checkpoint() / "tokenizer_config.json").read_text(encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(config, encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    return tokenizer.encode("Instruct:").ids[0], tokenizer.encode("\n").ids[0]


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Distribute tensors in their order, as ``save_pretrained`` does."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + _bytes(shape) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += _bytes(shape)
    return shards


def _write_shard(file: BinaryIO, members: Mapping[str, tuple[int, ...]], recipe: Recipe) -> None:
    """Write a safetensors file block by block, which the library's own writer cannot."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in members.items():
        begin, end = end, end + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)
    for name, shape in members.items():
        for block in recipe.blocks(name, shape):
            file.write(block.view(torch.uint8).numpy().data)
    os.fsync(file.fileno())  # what is measured next should not wait for these pages


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


if __name__ == "__main__":
    sys.exit(main())
