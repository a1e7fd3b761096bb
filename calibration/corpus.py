"""Texts to calibrate on: a file of one text a line, read as every command reads texts."""

from gircse.runtime.text_lines import read_texts

__all__ = ["read_texts"]
