"""Settings have the ranges that models have, and flags that are not given leave no trace."""

import argparse
import math
from typing import Any

import pytest

from gircse.checkpoint.model_settings import ModelSettings, add_model_flags
from gircse.runtime.errors import OptionError
from gircse.runtime.manifest import Pooling, TokenizerKind


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": -1}, r"^--steps is -1; it can be 0 to 64\.$"),
        ({"steps": 65}, r"^--steps is 65; it can be 0 to 64\.$"),
        ({"temperature": 0.0}, r"^--temperature is 0\.0; it can be a finite number above 0; "),
        ({"temperature": math.nan}, r"^--temperature is nan; "),
        ({"temperature": math.inf}, r"^--temperature is inf; "),
        ({"pooling": "max"}, r"^--pooling is 'max'; it has to be one of mean, last\.$"),
        ({"tokenizer": "fast"}, r"^--tokenizer is 'fast'; it has to be one of json, auto\.$"),
        ({"max_tokens": 0}, r"^--max-tokens is 0; it can be at least 1\.$"),
    ],
)
def test_values_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ModelSettings(**setting)


def test_a_plain_string_becomes_a_pooling() -> None:
    assert ModelSettings(pooling="last").pooling is Pooling.LAST  # type: ignore[arg-type]


def test_only_given_flags_are_parsed() -> None:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    assert vars(parser.parse_args([])) == {}
    given = vars(parser.parse_args(["--steps", "3", "--pooling", "last", "--adapter", "none", "--max-tokens", "9"]))
    assert given == {"steps": 3, "pooling": Pooling.LAST, "adapter": "none", "max_tokens": 9}
    assert vars(parser.parse_args(["--tokenizer", "auto", "--no-add-eos"])) == {
        "tokenizer": TokenizerKind.AUTO,
        "add_eos": False,  # over a calibration that has it
    }
    settings = ModelSettings(**given)
    assert (settings.steps, settings.model, settings.temperature) == (3, "demo", 1.0)
