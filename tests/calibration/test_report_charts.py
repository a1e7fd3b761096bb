"""What the charts draw."""

import msgspec
from support.small_calibration import small_calibration

from gircse.calibration.calibration_file import Fidelity
from gircse.calibration.int8.scheme import InputKind, decoder_inputs
from gircse.calibration.report_charts import calibrated_inputs, excluded_count, measured_parts, rank_loss


def test_order_is_that_of_the_computation() -> None:
    calibration = small_calibration()
    shuffled = msgspec.structs.replace(calibration, inputs=dict(sorted(calibration.inputs.items(), reverse=True)))
    assert list(calibrated_inputs(shuffled)) == list(decoder_inputs(2))


def test_points_of_a_curve() -> None:
    assert [excluded_count(point) for point in small_calibration().sensitivity.curve] == [0, 1, 2]
    assert rank_loss(Fidelity("x", 1 + 1e-16, 1.0)) == 0
    assert rank_loss(Fidelity("x", 1 - 1e-15, 1.0)) == 0
    assert rank_loss(Fidelity("x", 0.75, 1.0)) == 0.25


def test_without_steps_four_kinds_were_measured() -> None:
    assert measured_parts(small_calibration(steps=0)) == list(InputKind)[:4]
    assert measured_parts(small_calibration()) == [*InputKind, "soft-token embedding"]
