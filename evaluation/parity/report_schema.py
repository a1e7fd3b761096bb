"""The result of a parity run as data: the content of ``parity.json``, whose JSON schema is in docs/.

All numbers are finite. Step 0 is the prompt (z_0: the normalized h_0), steps 1..K are the refinement.
"""

from gircse.evaluation.parity.gates import GateResult
from gircse.runtime.records import Record, encode_record

SCHEMA_VERSION = 1


class SoftTokens(Record, frozen=True):
    """Soft tokens of one step over all texts.

    Attributes:
        entropy: mean, in nats.
        top1_mass: mean probability of the top-1 token.
        padded_mass: largest probability on vocabulary rows that belong to no token.
        norm: mean length of s_k.
    """

    entropy: float
    top1_mass: float
    padded_mass: float
    norm: float


class StepParity(Record, frozen=True):
    """One step against the reference.

    Attributes:
        step: k; 0 is the prompt.
        cosine_min: smallest cosine of z_k to the reference's, over the texts.
        cosine_mean: their mean.
        norm_ratio_min: smallest length of the pooled vector before normalization, over the reference's.
        norm_ratio_max: largest.
        max_difference: largest difference of an element of z_k.
        rank_correlation: Spearman correlation of the similarities of all pairs of texts.
        neighbor_overlap: mean share of common ten nearest neighbors.
        state_cosine_min: smallest cosine of the state h_k, running freely: this step's error and the drift before it.
        forced_state_cosine_min: the same when every step is fed the reference's soft token: the local error.
        soft_tokens: the candidate's; None for the prompt.
    """

    step: int
    cosine_min: float
    cosine_mean: float
    norm_ratio_min: float
    norm_ratio_max: float
    max_difference: float
    rank_correlation: float
    neighbor_overlap: float
    state_cosine_min: float
    forced_state_cosine_min: float
    soft_tokens: SoftTokens | None


class TextParity(Record, frozen=True):
    """One text against the reference; each list holds the steps 0..K.

    Attributes:
        cosine: of z_k.
        norm_ratio: of the pooled vector before normalization.
        max_difference: of an element of z_k.
    """

    cosine: tuple[float, ...]
    norm_ratio: tuple[float, ...]
    max_difference: tuple[float, ...]


class TaskParity(Record, frozen=True):
    """Scores of both backends on one task.

    Attributes:
        task: name of the file or folder.
        metric: ``Spearman``, ``nDCG@10`` or ``1-NN accuracy``.
        reference: score at each step 0..K.
        candidate: score at each step 0..K.
        difference_low: lower end of the 95 % bootstrap interval of candidate - reference, with K steps.
        difference_high: upper end.
    """

    task: str
    metric: str
    reference: tuple[float, ...]
    candidate: tuple[float, ...]
    difference_low: float
    difference_high: float


class CrossSteps(Record, frozen=True):
    """Queries refined by k steps against documents refined by j steps.

    Attributes:
        metric: ``nDCG@10`` of a task, or ``rank correlation`` with the reference's similarities at K steps.
        task: the task, or None.
        matrix: row k - 1, column j - 1.
    """

    metric: str
    task: str | None
    matrix: tuple[tuple[float, ...], ...]


class BatchVariance(Record, frozen=True):
    """Texts alone against the same texts in batches, or after a beginning that was run once against whole prompts.

    Attributes:
        texts: how many were run both ways.
        max_difference: largest difference of an element, over every step.
        cosine_min: smallest cosine, over every step.
    """

    texts: int
    max_difference: float
    cosine_min: float


class LayerJump(Record, frozen=True):
    """A part of the graph whose own error stands out.

    Attributes:
        step: k; 0 is the prompt.
        part: ``embeddings``, ``soft token``, ``layer i`` or ``final norm``.
        error: its error alone.
        times: how many times the median of the layers in this step that is.
    """

    step: int
    part: str
    error: float
    times: float


class LayerReport(Record, frozen=True):
    """The residual stream of one text, layer by layer. Each matrix has a row for each of the steps 0..K.

    A row holds the embeddings of the prompt or the soft token of a step, the layers in their order, and the final norm.

    Attributes:
        text: which one, the text furthest from the reference.
        alone: own error of each part, which is fed what the reference computes: of a layer relative to what it adds to
            the residual stream, of the others to what they make.
        running: error of the residual stream after each part relative to its length, running freely.
        jumps: where the error alone stands out, in the order of the computation.
    """

    text: int
    alone: tuple[tuple[float, ...], ...]
    running: tuple[tuple[float, ...], ...]
    jumps: tuple[LayerJump, ...]


class CandidateReport(Record, frozen=True):
    """One precision of the bundle.

    Attributes:
        precision: its name.
        passed: whether every gate has passed.
        gates: the verdicts.
        steps: steps 0..K.
        texts: each text, in the order of the input.
        batch_variance: influence of the other texts in a batch.
        tasks: scores, if tasks were given.
        cross_steps: the matrix, if it was asked for.
        layers: where it departs from the reference, if that was asked for.
        prefix_variance: influence of the cache for what prompts begin with, where the runtime has one.
    """

    precision: str
    passed: bool
    gates: tuple[GateResult, ...]
    steps: tuple[StepParity, ...]
    texts: tuple[TextParity, ...]
    batch_variance: BatchVariance
    tasks: tuple[TaskParity, ...]
    cross_steps: CrossSteps | None
    layers: LayerReport | None = None
    prefix_variance: BatchVariance | None = None


class ParityReport(Record, frozen=True):
    """A parity run.

    Attributes:
        schema_version: version of these fields.
        bundle: the bundle's directory name.
        manifest_sha256: SHA-256 of its gircse.json, which holds the hash of every file.
        reference: what it was compared with.
        steps: K.
        texts: number of different texts.
        texts_source: the file, or ``built-in``.
        reference_soft_tokens: of the reference, steps 1..K.
        candidates: one for each precision.
        environment: machine and versions.
    """

    schema_version: int
    bundle: str
    manifest_sha256: str
    reference: str
    steps: int
    texts: int
    texts_source: str
    reference_soft_tokens: tuple[SoftTokens, ...]
    candidates: tuple[CandidateReport, ...]
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every gate of every candidate has passed."""
        return all(candidate.passed for candidate in self.candidates)

    def to_json(self) -> bytes:
        """Return the content of ``parity.json``."""
        return encode_record(self, indent=1)
