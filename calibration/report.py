"""Writes a calibration as a report, ``calibration.md`` and charts; all numbers are those of ``calibration.json``."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from gircse.calibration.calibration_file import (
    Calibration,
    Fidelity,
    InputCalibration,
    Sensitivity,
    SensitivityMode,
)
from gircse.calibration.int8.scheme import InputKind
from gircse.calibration.report_charts import (
    calibrated_inputs,
    draw_calibration_charts,
    excluded_count,
    inputs_by_kind,
    label,
    measured_parts,
    rank_loss,
)
from gircse.reporting.files import markdown_table, write_files
from gircse.runtime.errors import OutputError
from gircse.runtime.manifest import AdapterSource, ModelSource

SHOWN = 10
"""Maximum rows of a table of extremes."""


def write_report(calibration: Calibration, directory: Path) -> list[Path]:
    """Write calibration.md and the charts.

    Args:
        calibration: what to report.
        directory: an existing directory, see ``open_report_directory``.

    Returns:
        The files.

    Raises:
        OutputError: they cannot be written.
    """
    try:
        charts = draw_calibration_charts(calibration, directory)
        return [*write_files({"calibration.md": markdown(calibration).encode()}, directory), *charts]
    except OSError as err:
        raise OutputError(
            f"--report {directory}",
            f"cannot be written: {err.strerror or err}",
            "the calibration itself has been written",
            "Free some space or choose another directory.",
        ) from err


def markdown(calibration: Calibration) -> str:
    """Return the content of ``calibration.md``, which shows the charts in the same directory."""
    parts = [
        *_heading(calibration),
        *_fidelity(calibration),
        *_kinds(calibration),
        *_layers(calibration),
        *_ratios(calibration),
        f"Made with {', '.join(f'{name} {version}' for name, version in calibration.tools.items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _heading(calibration: Calibration) -> list[str]:
    fingerprint, texts = calibration.fingerprint, calibration.texts
    rows = [
        ("model", _source(fingerprint.model)),
        ("adapter", _source(fingerprint.adapter) if fingerprint.adapter else "none"),
        ("K", f"{fingerprint.steps}, pooling {fingerprint.pooling}, temperature {fingerprint.temperature:g}"),
        ("texts", f"{texts.samples} with {texts.tokens} tokens, seed {texts.seed}, SHA-256 `{texts.sha256[:16]}`"),
        ("PyTorch", f"{calibration.dtype} on {calibration.device}"),
        ("thresholds", f"by `{calibration.method}`"),
    ]
    return ["# Calibration", markdown_table(("what", "value"), rows)]


def _source(source: ModelSource | AdapterSource) -> str:
    name = source.name.replace("|", "\\|")
    return f"`{name}`, revision `{source.revision}`" if source.revision else f"`{name}`"


def _fidelity(calibration: Calibration) -> list[str]:
    found = calibration.sensitivity
    if found.result is None:
        return [
            "## Fidelity of `int8`",
            "**Not measured** (`--sensitivity off`): no input is excluded from quantization, and how far the vectors "
            "of `int8` are from those of FP32 is unknown. `gircse-parity` measures it on an exported bundle.",
        ]
    row = (
        f"{found.result.rank_correlation:.4f}",
        f"{found.result.overlap:.3f}",
        f"{len(found.excluded)} of {len(calibration.inputs)}",
    )
    parts = [
        "## Fidelity of `int8`",
        markdown_table(("rank correlation", "top-10 overlap", "inputs excluded from quantization"), [row]),
        f"Against FP32 with K = {calibration.fingerprint.steps}, emulated in PyTorch. Rank correlation: Spearman's, of "
        "all pairwise similarities of texts; top-10 overlap: share of common nearest neighbors; loss, below: 1 - rank "
        "correlation.",
        _excluded(found, found.result, calibration.max_drop),
    ]
    if found.curve:
        parts.append(_chart("trade-off"))
    return parts


def _excluded(found: Sensitivity, result: Fidelity, max_drop: float) -> str:
    """Say which inputs are excluded from quantization, and why."""
    loss = rank_loss(result)
    still = " **This is still more than `--max-drop`.**" if loss > max_drop else ""
    if not found.excluded:
        return (
            f"No input is excluded from quantization: with all quantized the loss is {_number(loss)}, and `--max-drop` "
            f"is {max_drop:g}.{still}"
        )
    everything = next((_number(rank_loss(point)) for point in found.curve if not excluded_count(point)), "more")
    names = ", ".join(f"`{name}`" for name in found.excluded)
    if found.mode is SensitivityMode.FULL:
        search = "each input was quantized alone, and the fewest of the most sensitive ones were excluded that meet it"
    else:
        search = (
            "inputs were ranked by the error of their product, and the fewest of the first ones were excluded that "
            "were found to meet it (`--sensitivity kinds`, with a few runs)"
        )
    return (
        f"Excluded, the most sensitive first: {names}. With all inputs quantized the loss would be {everything}, and "
        f"`--max-drop` is {max_drop:g}. So {search}: the loss is {_number(loss)}.{still}"
    )


def _kinds(calibration: Calibration) -> list[str]:
    calibrated = inputs_by_kind(calibration)
    points = {point.name: point for point in calibration.sensitivity.kinds}
    rows = [
        (
            label(part),
            *(_kind_cells(calibrated[InputKind(part)]) if part in calibrated else ["-"] * 4),
            _loss(points.get(part)),
        )
        for part in measured_parts(calibration)
    ]
    header = ("kind", "inputs", "range in the prompt", "range in the steps", "error", "loss")
    return [
        "## Kinds of input",
        markdown_table(header, rows),
        "Ranges: the largest of all layers, after smoothing, without outlier channels. Error: relative error of the "
        "quantized product, median over the layers. Loss: with this kind quantized alone.",
        *([_chart("sensitivity")] if points else []),
        _chart("error"),
        _chart("migration"),
    ]


def _kind_cells(inputs: Sequence[InputCalibration]) -> tuple[str, ...]:
    return (
        str(len(inputs)),
        _range(max(found.ranges[0] for found in inputs)),
        _range(max((largest for found in inputs for largest in found.ranges[1:]), default=0.0)),
        f"{median(found.error for found in inputs):.2g}",
    )


def _layers(calibration: Calibration) -> list[str]:
    layers = calibration.sensitivity.layers
    if not layers:
        return []
    chosen = sorted(layers, key=rank_loss, reverse=True)[:SHOWN]
    return [
        "## Most sensitive layers",
        markdown_table(("layer", "loss"), [(f"`{point.name}`", _loss(point)) for point in chosen]),
        f"Each quantized alone; {len(chosen)} of {len(layers)}.",
    ]


def _ratios(calibration: Calibration) -> list[str]:
    """Compare the prompt with the steps where ranges differ most; where either range is 0 there is no ratio."""
    parts = ["## Ranges in the prompt and in the steps"]
    compared = {
        quantized_input.name: (found.ranges[0], max(found.ranges[1:]))
        for quantized_input, found in calibrated_inputs(calibration).items()
        if found.ranges[0] > 0 and max(found.ranges[1:], default=0.0) > 0
    }
    if compared:
        ratios = {name: prompt / steps for name, (prompt, steps) in compared.items()}
        chosen = sorted(ratios, key=lambda name: -max(ratios[name], 1 / ratios[name]))[:SHOWN]
        rows = [(f"`{name}`", *map(_range, compared[name]), f"{ratios[name]:.3g}") for name in chosen]
        parts += [
            markdown_table(("input", "prompt", "steps", "prompt / steps"), rows),
            f"The {len(rows)} inputs where the two differ most. A static scale covers the larger one, so a ratio of 10 "
            "leaves the steps 13 of the 127 levels of a limb.",
        ]
    return [*parts, _chart("ranges-by-step")]


def _loss(point: Fidelity | None) -> str:
    return "-" if point is None else _number(rank_loss(point))


def _number(loss: float) -> str:
    return f"{loss:.2g}"


def _range(value: float) -> str:
    """Return a magnitude as text; the vocabulary projection has none in the prompt, and with K = 0 no step has one."""
    return f"{value:.3g}" if value else "-"


def _chart(name: str) -> str:
    return f"![{name}]({name}.png)"
