"""The rotary tables that the trace stores, against Hugging Face's own."""

import numpy as np
import pytest
import torch
from support.small_models import CONFIGS, SmallModels

from gircse.export.graph.trace import rotary_tables


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_tables_are_hugging_faces_own(small_models: SmallModels, name: str) -> None:
    model = small_models.load(name)
    cos, sin = rotary_tables(model.model, 40)
    theirs_cos, theirs_sin = model.model.rotary_emb(torch.zeros(1), torch.arange(40)[None])
    np.testing.assert_array_equal(torch.cat([cos, cos], -1), theirs_cos[0])
    np.testing.assert_array_equal(torch.cat([sin, sin], -1), theirs_sin[0])
