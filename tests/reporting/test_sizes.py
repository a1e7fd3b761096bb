"""Sizes as people read them."""

from gircse.reporting.sizes import gib, peak_memory


def test_gib() -> None:
    assert gib(5 << 28) == "1.25 GiB"


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory()
    block = bytearray(b"x") * (64 << 20)
    assert 10 << 20 < before <= peak_memory() < 1 << 40
    assert len(block) == 64 << 20
