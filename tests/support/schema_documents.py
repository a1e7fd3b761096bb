"""The JSON schemas in docs/ are those of the code."""

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec

DOCS = Path(__file__).parents[2] / "docs"


def schema_of(struct: Any) -> dict[str, Any]:
    """Return a type's schema as docs/ has it, the same under every Python."""
    schema = msgspec.json.schema(struct)
    for part in schema["$defs"].values():
        if "description" in part:  # a docstring, whose indentation Python strips from 3.13 on
            part["description"] = inspect.cleandoc(part["description"])
    return schema


def documented(name: str) -> dict[str, Any]:
    """Return a schema of docs/."""
    content: dict[str, Any] = json.loads((DOCS / name).read_text(encoding="utf-8"))
    return content
