"""A parity report for people and for CI: the terminal table, ``parity.md`` and ``parity.xml`` (JUnit)."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from rich import box
from rich.table import Table

from gircse.evaluation.parity.gates import GateResult
from gircse.evaluation.parity.report_layers import layer_markdown, layer_table
from gircse.evaluation.parity.report_schema import CandidateReport, CrossSteps, ParityReport, StepParity, TaskParity
from gircse.evaluation.tasks.prompts import Prompt
from gircse.reporting.files import markdown_table

STEP_COLUMNS = ("k", "1-cos max", "mean", "norm ratio", "max diff", "rank corr", "top-10", "h_k free", "h_k forced")
STEP_LEGEND = (
    "1-cos (1 - cosine), norm ratio (before normalization, the one farthest from 1) and max diff: z_k of each text "
    "against the reference; rank corr: Spearman of the similarities of all pairs of texts; top-10: common nearest "
    "neighbors; h_k: largest 1 - cosine of the state, running freely and fed the reference's soft tokens "
    "(teacher-forced); k = 0 is the prompt"
)
WORST_TEXTS = 5


def terminal_tables(report: ParityReport) -> list[Table]:
    """Return for each candidate its steps with the verdicts below them, and where it departs, if that was located."""
    tables = []
    for candidate in report.candidates:
        tables.append(_terminal_table(report, candidate))
        if candidate.layers is not None:
            tables.append(layer_table(f"{report.bundle}:{candidate.precision}", candidate.layers))
    return tables


def _terminal_table(report: ParityReport, candidate: CandidateReport) -> Table:
    table = Table(
        title=f"{report.bundle}:{candidate.precision} against {report.reference}, {report.texts} texts",
        caption="\n".join([*map(_scores, candidate.tasks), *map(_verdict, candidate.gates)]),
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,  # with headers on two lines, it fits a terminal of 80 columns
    )
    for column in STEP_COLUMNS:
        table.add_column(column, justify="right")
    for step in candidate.steps:
        table.add_row(*_step_cells(step))
    return table


def _verdict(gate: GateResult) -> str:
    word = "[green]pass[/]" if gate.passed else "[bold red]FAIL[/]"
    return f"{word}  {gate.name} {_number(gate.value)} {gate.comparison} {gate.limit:g}"


def _scores(task: TaskParity) -> str:
    return (
        f"{task.task}, {task.metric}: {task.candidate[-1]:.4f}, reference {task.reference[-1]:.4f} (95 % of the "
        f"difference {task.difference_low:+.4f} to {task.difference_high:+.4f})"
    )


def markdown(report: ParityReport, prompts: Sequence[Prompt]) -> str:
    """Return the content of ``parity.md``.

    Args:
        report: the numbers.
        prompts: the texts, of which the worst are shown.
    """
    parts = [
        f"# Parity of {report.bundle}: {'passed' if report.passed else 'FAILED'}",
        f"{report.texts} texts ({report.texts_source}) against {report.reference}, K = {report.steps}. "
        f"Manifest SHA-256 `{report.manifest_sha256[:16]}`.",
    ]
    for candidate in report.candidates:
        parts += _candidate_markdown(report, candidate, prompts)
    if report.steps:
        parts += ["## Soft tokens", _soft_token_table(report)]
    parts += ["## Environment", markdown_table(("what", "value"), list(report.environment.items()))]
    return "\n\n".join(parts) + "\n"


def _candidate_markdown(report: ParityReport, candidate: CandidateReport, prompts: Sequence[Prompt]) -> list[str]:
    gates = [
        (
            "pass" if gate.passed else "**FAIL**",
            gate.name,
            _number(gate.value),
            f"{gate.comparison} {gate.limit:g}",
        )
        for gate in candidate.gates
    ]
    variance = candidate.batch_variance
    parts = [
        f"## {candidate.precision}",
        markdown_table(("verdict", "gate", "measured", "limit"), gates),
        markdown_table(STEP_COLUMNS, [_step_cells(step) for step in candidate.steps]),
        f"{STEP_LEGEND}.",
        f"Batch variance: {variance.texts} texts alone against in batches: largest difference "
        f"{variance.max_difference:.1e}, largest 1 - cosine {_error(variance.cosine_min)}.",
    ]
    if (shared := candidate.prefix_variance) is not None:
        parts.append(
            f"Prefix variance: {shared.texts} texts after an instruction that was run once against whole prompts: "
            f"largest difference {shared.max_difference:.1e}, largest 1 - cosine {_error(shared.cosine_min)}."
        )
    parts += [_task_table(task) for task in candidate.tasks]
    if candidate.cross_steps:
        parts.append(_cross_table(candidate.cross_steps))
    worst = sorted(range(len(prompts)), key=lambda row: candidate.texts[row].cosine[-1])[:WORST_TEXTS]
    rows = [(str(row), _error(candidate.texts[row].cosine[-1]), _excerpt(prompts[row].text)) for row in worst]
    return [
        *parts,
        f"Texts furthest from the reference, K = {report.steps}:",
        markdown_table(("text", "1-cos", "begins"), rows),
        *(layer_markdown(candidate.layers) if candidate.layers else []),
    ]


def _task_table(task: TaskParity) -> str:
    rows = [
        (str(step), f"{reference:.4f}", f"{candidate:.4f}", f"{candidate - reference:+.4f}")
        for step, (reference, candidate) in enumerate(zip(task.reference, task.candidate, strict=True))
    ]
    table = markdown_table(("k", f"{task.metric}, reference", "candidate", "difference"), rows)
    return (
        f"### {task.task}\n\n{table}\n\n95 % bootstrap interval of the difference, K = {len(rows) - 1}: "
        f"{task.difference_low:+.4f} to {task.difference_high:+.4f}."
    )


def _cross_table(cross: CrossSteps) -> str:
    """Queries refined by k steps in rows, documents by j in columns."""
    steps = range(1, len(cross.matrix) + 1)
    rows = [(str(k), *(f"{value:.4f}" for value in row)) for k, row in zip(steps, cross.matrix, strict=True)]
    of = f"{cross.metric} of {cross.task}" if cross.task else f"{cross.metric} with the reference at K steps"
    table = markdown_table(("query k \\ document j", *map(str, steps)), rows)
    return f"### Queries with k steps, documents with j steps\n\n{of}\n\n{table}"


def _soft_token_table(report: ParityReport) -> str:
    backends = [("reference", report.reference_soft_tokens)]
    for candidate in report.candidates:
        backends.append((candidate.precision, tuple(step.soft_tokens for step in candidate.steps if step.soft_tokens)))
    rows = [
        (
            str(k),
            name,
            f"{tokens.entropy:.3f}",
            f"{tokens.top1_mass:.3f}",
            f"{tokens.padded_mass:.1e}",
            f"{tokens.norm:.3f}",
        )
        for name, steps in backends
        for k, tokens in enumerate(steps, start=1)
    ]
    return markdown_table(("k", "backend", "entropy (nats)", "top-1 mass", "mass on padded rows", "norm of s_k"), rows)


def junit(report: ParityReport) -> bytes:
    """Return the content of ``parity.xml``: one suite for each candidate, one case for each gate."""
    root = ET.Element("testsuites", name="gircse-parity")
    for candidate in report.candidates:
        failed = sum(not gate.passed for gate in candidate.gates)
        name = f"{report.bundle}:{candidate.precision}"
        suite = ET.SubElement(
            root, "testsuite", name=name, tests=str(len(candidate.gates)), failures=str(failed), errors="0"
        )
        for gate in candidate.gates:
            case = ET.SubElement(suite, "testcase", classname=name, name=gate.name)
            statement = f"{gate.name}: {_number(gate.value)}, limit {gate.comparison} {gate.limit:g}"
            if not gate.passed:
                ET.SubElement(case, "failure", message=statement)
            ET.SubElement(case, "system-out").text = statement
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _step_cells(step: StepParity) -> tuple[str, ...]:
    return (
        str(step.step),
        _error(step.cosine_min),
        _error(step.cosine_mean),
        f"{max(step.norm_ratio_min, step.norm_ratio_max, key=lambda ratio: abs(ratio - 1)):.4f}",
        f"{step.max_difference:.1e}",
        f"{step.rank_correlation:.5f}",
        f"{step.neighbor_overlap:.3f}",
        _error(step.state_cosine_min),
        _error(step.forced_state_cosine_min),
    )


def _error(cosine: float) -> str:
    """Return how far a cosine is from 1, which shows at every scale; rounding may put it above 1."""
    return f"{max(0.0, 1 - cosine):.1e}"


def _number(value: float) -> str:
    """Seven decimals near 1, where cosines live; few digits for the rest."""
    if value == int(value):
        return str(int(value))
    return f"{value:.7f}" if 0.9 < value < 1 else f"{value:.3g}"


def _excerpt(text: str) -> str:
    short = text if len(text) <= 60 else text[:59] + "…"
    return short.replace("|", "\\|").replace("\n", " ")
