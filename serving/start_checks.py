"""What is looked at before a bundle is served: its self-test, and the keys."""

import logging
from pathlib import Path

from gircse.runtime import Embedder, OptionError

logger = logging.getLogger(__name__)


def passes_self_test(embedder: Embedder) -> bool:
    """Run the self-test, where the bundle has one; the log says what is wrong."""
    if not embedder.manifest.golden:
        logger.warning("no self-test: the bundle holds no golden vectors")
        return True
    report = embedder.self_test()
    if not report.passed:
        logger.error("the self-test failed: smallest cosine to PyTorch %.7f", report.min_cosine)
    return report.passed


def read_keys(path: Path) -> tuple[str, ...]:
    """Read API keys, one per line; blank lines do not count.

    Raises:
        OptionError: there is none, or it is no ASCII.
    """
    keys = tuple(line for line in map(str.strip, path.read_text(encoding="utf-8").splitlines()) if line)
    if not keys or not all(key.isascii() for key in keys):
        raise OptionError(f"--api-key-file {path}", "holds no keys", "one key of ASCII characters stands on a line")
    return keys
