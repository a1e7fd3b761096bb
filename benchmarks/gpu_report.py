"""The table of gpu.py, from the reports of ``gircse-parity``, ``gircse-bench`` and torch_steps.py."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from timed_commands import Outcome, Status

from gircse.evaluation.bench.backends import Baseline
from gircse.evaluation.bench.report_schema import BenchReport
from gircse.evaluation.bench.roofline import weight_bytes_read
from gircse.evaluation.environment import describe_environment
from gircse.evaluation.parity.report_schema import CandidateReport, ParityReport
from gircse.reporting.files import markdown_table, write_files
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout

PARITY_COLUMNS = ("gates", "smallest cosine", "rank correlation", "top-10 overlap", "batch difference")


@dataclass
class Row:
    """A line of the table.

    Attributes:
        parity: cells of ``PARITY_COLUMNS``: the worst step.
        milliseconds: batch x tokens to the median time of a run.
        roofline_ms: time that reading the weights takes at the measured bandwidth.
    """

    parity: dict[str, str] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    roofline_ms: float | None = None

    def texts_per_s(self) -> float:
        """Return the throughput of the setting where it is largest."""
        return max(1000 * int(setting.partition(" ")[0]) / time for setting, time in self.milliseconds.items())


def write_report(outcomes: Sequence[Outcome], results: Path, bundle: Path) -> str:
    """Write results.md and results.json into the folder of results, and return the former."""
    done = {outcome.name: outcome for outcome in outcomes if outcome.status is Status.DONE}
    bandwidth = json.loads(done["bandwidth"].last_line) if "bandwidth" in done else None
    rows: dict[str, Row] = {}
    for outcome in done.values():
        if outcome.argv[0] == "gircse-parity":
            _add_parity(rows, outcome)
        elif outcome.argv[0] == "gircse-bench":
            _add_latency(rows, outcome, Bundle.open(bundle), bandwidth)
    torch_steps = _torch_steps(done.get("torch-steps"))
    for entry in torch_steps:
        row = rows.setdefault(_loop_name(entry), Row())
        row.milliseconds[f"{entry['batch']} x {entry['tokens']}"] = entry["milliseconds"]["total"]
    environment = describe_environment()
    facts = {
        "environment": environment,
        "bandwidth": bandwidth,
        "rows": {name: dataclasses.asdict(row) for name, row in rows.items()},
        "torch_steps": torch_steps,
        "commands": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    text = _markdown(rows, torch_steps, outcomes, environment, bandwidth)
    write_files({"results.json": json.dumps(facts, indent=1).encode(), "results.md": text.encode()}, results)
    return text


def _add_parity(rows: dict[str, Row], outcome: Outcome) -> None:
    content = (Path(_flag(outcome, "--report")) / "parity.json").read_bytes()
    report = msgspec.json.decode(content, type=ParityReport)
    for candidate in report.candidates:
        row = rows.setdefault(_row_name(outcome, candidate.precision, report.steps), Row())
        row.parity = dict(zip(PARITY_COLUMNS, _parity_cells(candidate), strict=True))


def _parity_cells(candidate: CandidateReport) -> tuple[str, ...]:
    return (
        "passed" if candidate.passed else "FAILED",
        f"{min(step.cosine_min for step in candidate.steps):.7f}",
        f"{min(step.rank_correlation for step in candidate.steps):.7f}",
        f"{min(step.neighbor_overlap for step in candidate.steps):.4f}",
        f"{candidate.batch_variance.max_difference:.1e}",
    )


def _add_latency(rows: dict[str, Row], outcome: Outcome, bundle: Bundle, bandwidth: float | None) -> None:
    content = (Path(_flag(outcome, "--report")) / "bench.json").read_bytes()
    layout = Layout(_flag(outcome, "--layout"))
    for entry in msgspec.json.decode(content, type=BenchReport).latencies:
        if entry.backend.startswith(Baseline.TORCH):
            row = rows.setdefault(f"{entry.backend}, beside {_row_name(outcome, 'fp16', entry.steps)}", Row())
        else:
            precision = entry.backend.partition(":")[2].partition(" ")[0]
            row = rows.setdefault(_row_name(outcome, precision, entry.steps), Row())
            if bandwidth:
                read = weight_bytes_read(bundle, precision, layout=layout, steps=entry.steps)
                row.roofline_ms = 1000 * read / bandwidth
        row.milliseconds[f"{entry.batch} x {entry.tokens}"] = 1000 * entry.seconds.median


def _torch_steps(outcome: Outcome | None) -> list[dict[str, Any]]:
    """Return the measurements of torch_steps.py."""
    if outcome is None:
        return []
    found: list[dict[str, Any]] = json.loads(Path(_flag(outcome, "--output")).read_bytes())
    return found


def _loop_name(entry: Mapping[str, Any]) -> str:
    without = "" if entry["last_vocabulary"] else " without the last vocabulary pass"
    return f"torch {entry['dtype']}, official loop{without}, k = {entry['steps']}"


def _parts_table(torch_steps: Sequence[Mapping[str, Any]]) -> str:
    """Return where the time of the official loop goes, for each setting."""
    parts = list(dict.fromkeys(part for entry in torch_steps for part in entry["milliseconds"]))
    cells = [
        (
            f"{entry['batch']} x {entry['tokens']}",
            *(f"{entry['milliseconds'][part]:.2f}" if part in entry["milliseconds"] else "" for part in parts),
        )
        for entry in torch_steps
        if entry["last_vocabulary"]
    ]
    return markdown_table(("official loop in PyTorch", *(f"{part}, ms" for part in parts)), cells)


def _row_name(outcome: Outcome, precision: str, steps: int) -> str:
    return f"{_flag(outcome, '--provider')}, {_flag(outcome, '--layout')}, {precision}, k = {steps}"


def _flag(outcome: Outcome, name: str) -> str:
    return outcome.argv[outcome.argv.index(name) + 1]


def _markdown(
    rows: Mapping[str, Row],
    torch_steps: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Outcome],
    environment: Mapping[str, str],
    bandwidth: float | None,
) -> str:
    settings = list(dict.fromkeys(setting for row in rows.values() for setting in row.milliseconds))
    cells = [
        (
            name,
            *(row.parity.get(column, "") for column in PARITY_COLUMNS),
            *(f"{row.milliseconds[setting]:.1f}" if setting in row.milliseconds else "" for setting in settings),
            f"{row.texts_per_s():.0f}" if row.milliseconds else "",
            "" if row.roofline_ms is None else f"{row.roofline_ms:.2f}",
        )
        for name, row in rows.items()
    ]
    header = (
        "what",
        *PARITY_COLUMNS,
        *(f"{setting}, ms" for setting in settings),
        "most texts/s",
        "reading the weights, ms",
    )
    parts = [
        "; ".join(f"{name} {value}" for name, value in environment.items()) + ".",
        markdown_table(header, cells),
        "Parity: against PyTorch in FP32 on the same device, the worst of all texts and steps. Times: medians.",
    ]
    if bandwidth:
        parts.append(f"Reading the weights: at {bandwidth / 1e9:.0f} GB/s, which a copy reaches, reading and writing.")
    if torch_steps:
        parts += [_parts_table(torch_steps), "One step and its vocabulary pass: means over the steps, by CUDA events."]
    others = [
        (outcome.name, outcome.last_line)
        for outcome in outcomes
        if outcome.status is Status.DONE and ("--self-test" in outcome.argv or outcome.name == "tests")
    ]
    if others:
        parts.append(markdown_table(("command", "its last line"), others))
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status is not Status.DONE:
            reasons.setdefault(f"{outcome.status}: {outcome.last_line}", []).append(outcome.name)
    if reasons:
        parts.append(
            markdown_table(("why", "without a result"), [(why, ", ".join(names)) for why, names in reasons.items()])
        )
    return "\n\n".join(parts) + "\n"
