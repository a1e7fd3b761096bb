"""Every TensorRT call that can fail, and what is said of it."""

import pytest
from support.engine_rig import MakeRig

from gircse.runtime.errors import ProviderError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create_execution_context", r"^create_execution_context failed: TensorRT gives no reason\. Free memory"),
        ("set_optimization_profile_async", r"^optimization profile 0 is refused: .* again: gircse-build .* --sm 8\.9$"),
        ("set_input_shape", r"^shape \(2, 6\) of input_ids is refused: "),
        ("set_tensor_address", "^address 0x7f.* of input_ids is refused: "),
        (
            "infer_shapes",
            r"^infer_shapes failed: sizes of a concatenation; the input shapes are .*'input_ids': \(2, 6\)",
        ),
        ("infer_shapes of past", r"^infer_shapes misses the shapes of past\.0\.key\. Build the engine again: gircse-b"),
        ("get_tensor_shape", r"^next_hidden has shape \(1, 2, 3\); its place holds \(2, 1, 10\)\. "),
        (
            "execute_async_v3",
            r"^execute_async_v3 failed: a kernel failed; the input shapes are .*'input_ids': \(2, 6\)",
        ),
    ],
)
def test_every_tensorrt_call_that_fails_is_reported(rig: MakeRig, call: str, message: str) -> None:
    made = rig()
    made.module.refuse.add(call)
    with pytest.raises(ProviderError, match=message):
        made.run(2, 6)
    assert made.cuda.left() == {}
    made.module.refuse.clear()
    made.run(2, 6)


def test_rtx_without_a_runtime_configuration(rig: MakeRig) -> None:
    made = rig(rtx=True)
    made.module.refuse.add("create_runtime_config")
    with pytest.raises(ProviderError, match=r"^create_runtime_config failed: "):
        made.run(2, 6)
