"""The calibration from end to end, as a list of stages. ``calibrate`` is what ``gircse-calibrate`` calls.

A first pass makes the soft tokens of the texts. A second one sweeps once over the decoder layers, with prompts and soft
tokens side by side, and calibrates each layer while its weights are loaded; both hold one layer in memory where the
model does not fit. Then the sensitivity is measured on held-out texts, as far as there is time for it, and the second
moments are written next to the calibration. Finished parts are kept in a folder, from which a killed run resumes.
"""

import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gircse.calibration.calibration_file import (
    SCHEMA_VERSION,
    Calibration,
    ModelFingerprint,
    Sensitivity,
    SensitivityMode,
    SoftTokenCalibration,
)
from gircse.calibration.corpus import MIN_TEXTS, Corpus, draw_texts, tokenize_texts
from gircse.calibration.estimate import LayerShapes
from gircse.calibration.fingerprint import fingerprint_of
from gircse.calibration.int8.scheme import TOP_K, VOCABULARY_INPUT, check_architecture, decoder_inputs, layer_inputs
from gircse.calibration.int8.thresholds import Method
from gircse.calibration.layers import (
    InputCalibrations,
    LayerSweep,
    Search,
    calibrate_vocabulary,
    finished_layers,
    read_calibrations,
    read_moments,
    read_rounded,
    rounded,
)
from gircse.calibration.moments_file import moments_path, write_moments
from gircse.calibration.plan import Plan, make_plan
from gircse.calibration.resume import ResumeFolder
from gircse.calibration.sensitivity import SensitivityStudy, measure_sensitivity
from gircse.calibration.soft_tokens import SoftTokens, gather_soft_tokens, make_soft_tokens, unfinished_batches
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_settings import ModelSettings, check_range
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference import Reference
from gircse.checkpoint.reference_choice import ReferenceBudget, ReferenceOptions, open_reference
from gircse.checkpoint.source import Checkpoint, resolve_checkpoint
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE
from gircse.checkpoint.tokenizer import open_checkpoint_tokenizer
from gircse.reporting.progress import StageProgress
from gircse.reporting.sizes import gib
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import OutputError, member_of, readable
from gircse.runtime.precision import Precision

TOOLS = ("gircse-deploy", "torch", "transformers", "peft", "safetensors", "tokenizers")

_PLAN = "plan"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(ModelSettings):
    """What to calibrate, and how; the fields are the flags of ``gircse-calibrate``.

    Attributes:
        texts: file with one text per line.
        output: file to write.
        method: how thresholds are chosen.
        smooth: migration strength of every input, or None to search one for each.
        samples: maximum number of texts to observe.
        seed: chooses the texts and the sampled rows.
        max_drop: largest allowed loss of rank correlation; beyond it inputs are excluded from quantization.
        sensitivity: what it is measured on; None chooses by the estimated time.
        device: a torch device.
        dtype: type that the model computes in; statistics are in FP32.
        memory: bytes that the PyTorch model may take; None takes what is free.
    """

    texts: Path
    output: Path
    method: Method = Method.MAX
    smooth: float | None = None
    samples: int = 512
    seed: int = 0
    max_drop: float = 0.005
    sensitivity: SensitivityMode | None = None
    device: str = "cpu"
    dtype: Precision = Precision.FP32
    memory: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            OptionError: a flag is out of its range.
        """
        super().__post_init__()
        check_range("--samples", self.samples, self.samples >= MIN_TEXTS, f"at least {MIN_TEXTS}")
        check_range("--smooth", self.smooth, self.smooth is None or 0 <= self.smooth <= 1, "0 to 1, or auto")
        check_range("--max-drop", self.max_drop, 0 <= self.max_drop <= 1, "0 to 1")
        check_range("--seed", self.seed, self.seed >= 0, "0 or more")
        if self.sensitivity is not None:
            object.__setattr__(self, "sensitivity", member_of(SensitivityMode, "--sensitivity", self.sensitivity))

    @property
    def reference(self) -> ReferenceOptions:
        """How the PyTorch model runs."""
        return ReferenceOptions(self.device, self.dtype, self.memory)


@dataclass(frozen=True)
class _Run:
    """What the stages share.

    Attributes:
        options: of the command.
        checkpoint: model and adapter.
        fingerprint: of the model with these options.
        corpus: the texts.
        streamed: the model, without its layers and its vocabulary.
        budget: memory of the PyTorch model, for both passes that it serves.
        folder: finished parts.
        progress: shows the stages.
    """

    options: CalibrationOptions
    checkpoint: Checkpoint
    fingerprint: ModelFingerprint
    corpus: Corpus
    streamed: StreamedModel
    budget: ReferenceBudget
    folder: ResumeFolder
    progress: StageProgress

    @property
    def layer_names(self) -> list[str]:
        """Names of the decoder layers."""
        return [f"model.layers.{layer}" for layer in range(self.streamed.num_layers)]

    def search(self, plan: Plan) -> Search:
        """Return how inputs are calibrated."""
        options = self.options
        return Search(
            method=options.method,
            smooth=options.smooth,
            steps=options.steps,
            seed=options.seed,
            round_weights=plan.sensitivity is not SensitivityMode.OFF,
        )

    def open_reference(self) -> Reference:
        """Open the PyTorch model, whole or streamed."""
        options = self.options
        with self.progress.stage("load the PyTorch reference"):
            reference = open_reference(
                self.checkpoint,
                options.reference,
                steps=options.steps,
                allow_partial_adapter=options.allow_partial_adapter,
                budget=self.budget,
            )
        for note in reference.notes:
            self.progress.note(f"  {readable(note)}")
        return reference


def calibrate(options: CalibrationOptions, *, progress: StageProgress | None = None) -> Calibration:
    """Calibrate a model and write the file.

    Args:
        options: what to calibrate, and how.
        progress: shows the stages; None makes one on stderr.

    Returns:
        What was written.

    Raises:
        TextFileError: the texts cannot be read.
        CalibrationError: there are too few texts, or INT8 does not exist for the model.
        CheckpointError: the model or adapter cannot be found, read or used, or does not fit into the memory.
        OptionError: torch cannot use the device.
        OutputError: the file cannot be written.
    """
    _check_output(options.output)
    try:
        run = _prepare(options, progress or StageProgress())
        soft_tokens, plan = _make_soft_tokens(run)
        inputs = _calibrate_inputs(run, soft_tokens, plan)
        soft_token = _soft_token(run, soft_tokens) if options.steps else None
        sensitivity = _measure(run, inputs, soft_token, plan)
        calibration = Calibration(
            schema_version=SCHEMA_VERSION,
            fingerprint=run.fingerprint,
            texts=run.corpus.used,
            method=options.method,
            max_tokens=options.max_tokens,
            tokenizer=options.tokenizer,
            add_eos=options.add_eos,
            dtype=options.dtype,
            device=options.device,
            max_drop=options.max_drop,
            inputs=inputs,
            soft_token=soft_token,
            moments_sha256="",
            sensitivity=sensitivity,
            tools={name: importlib.metadata.version(name) for name in TOOLS},
        )
        calibration = _write(run, calibration)
    except OSError as err:
        raise OutputError(
            f"--output {options.output}",
            f"cannot be written: {err.strerror or err}",
            None,
            "Free some space or choose another --output; the same command resumes from what is done.",
        ) from err
    run.folder.remove()
    return calibration


def _check_output(path: Path) -> None:
    """Check that the directory can be written before the long work, not after it."""
    test = path.parent / f"{path.name}.partial.test"
    try:
        with atomic_write(test):
            pass
        test.unlink()
    except OSError as err:
        raise OutputError(
            f"--output {path}", f"cannot be written: {err.strerror or err}", None, "Choose a file in another directory."
        ) from err


def _prepare(options: CalibrationOptions, progress: StageProgress) -> _Run:
    """Read the texts, then find the model and what an interrupted run has left."""
    texts = draw_texts(options.texts, samples=options.samples, seed=options.seed)
    with progress.stage(f"find the model {options.model}"):
        checkpoint = resolve_checkpoint(options.model, adapter=options.adapter, revision=options.revision)
        config = read_model_config(checkpoint.directory)
        check_architecture(config.model_type)
        fingerprint = fingerprint_of(checkpoint, options)
        weights = ModelWeights.open(
            checkpoint, config, steps=options.steps, allow_partial_adapter=options.allow_partial_adapter
        )
        rows, _ = weights.shape(EMBEDDING_TABLE) or (0, 0)
        tokenizer = open_checkpoint_tokenizer(checkpoint.directory, options.tokenizer, vocab_size=rows)
        prompts = tokenizer.prompt_tokenizer(max_tokens=options.max_tokens, add_eos=options.add_eos)
        corpus = tokenize_texts(texts, prompts)
        has_variations = options.sensitivity is not SensitivityMode.OFF
        budget = ReferenceBudget.of(weights, config, options.reference, variations=has_variations)
        streamed = StreamedModel(
            config, weights, device=options.device, precision=options.dtype, reads_ahead=budget.reads_ahead
        )
    for note in checkpoint.notes:
        progress.note(f"  {readable(note)}")
    path = options.output.with_name(f"{options.output.name}.partial")
    folder = ResumeFolder(path, identity=_identity(options, fingerprint, corpus))
    return _Run(options, checkpoint, fingerprint, corpus, streamed, budget, folder, progress)


def _identity(options: CalibrationOptions, fingerprint: ModelFingerprint, corpus: Corpus) -> str:
    """Return everything that a part of the calibration may depend on."""
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("texts", "output", "max_drop", "memory", "model", "adapter", "revision")
    }
    versions = {name: importlib.metadata.version(name) for name in TOOLS}
    return msgspec.json.encode((fingerprint, corpus.used, settings, versions)).decode()


def _make_soft_tokens(run: _Run) -> tuple[SoftTokens, Plan]:
    """Make the soft tokens of the observed texts, after an estimate of how long everything will take."""
    folder, options, used = run.folder, run.options, run.corpus.used
    plan = _read_plan(run)
    if plan is None or unfinished_batches(folder, run.corpus.observed, steps=options.steps):
        reference = run.open_reference()
        plan = plan or _make_plan(run, reference)
        with run.progress.stage(
            f"make soft tokens of {used.samples} texts, {used.tokens} tokens", total=used.samples
        ) as advance:
            make_soft_tokens(
                reference,
                run.corpus.observed,
                steps=options.steps,
                temperature=options.temperature,
                folder=folder,
                advance=advance,
            )
    return gather_soft_tokens(folder, run.streamed.weights, run.corpus.observed, steps=options.steps), plan


def _read_plan(run: _Run) -> Plan | None:
    """Return the plan of an interrupted run, after saying what it has done; None if there is none."""
    if (facts := run.folder.facts(_PLAN)) is None:
        return None
    observed, layers, texts = run.corpus.observed, run.streamed.num_layers, run.corpus.used.samples
    left = unfinished_batches(run.folder, observed, steps=run.options.steps)
    run.progress.note(
        f"  resumes after the soft tokens of {texts - sum(len(observed[index].rows) for index in left)} of {texts} "
        f"texts, and {finished_layers(run.folder, layers)} of {layers} layers"
    )
    return msgspec.json.decode(facts, type=Plan)


def _make_plan(run: _Run, reference: Reference) -> Plan:
    """Decide what there is time for, say how long it will take, and keep to it from now on."""
    options = run.options
    with run.progress.stage("estimate the time"):
        plan, estimate = make_plan(
            reference,
            run.streamed,
            run.corpus,
            steps=options.steps,
            method=options.method,
            smooth=options.smooth,
            sensitivity=options.sensitivity,
        )
    run.progress.note(f"  {estimate}")
    _check_disk(run, plan)
    run.folder.save(_PLAN, {}, msgspec.json.encode(plan).decode())
    return plan


def _check_disk(run: _Run, plan: Plan) -> None:
    """Refuse a disk that the parts do not fit on, before the long work.

    Raises:
        OutputError: it has too little space.
    """
    shapes, layers = LayerShapes.of(run.streamed.weights), run.streamed.num_layers
    hidden = run.streamed.model.config.hidden_size * run.streamed.dtype.itemsize
    tokens = sum(batch.input_ids.size + len(batch.rows) * run.options.steps for batch in run.corpus.observed)
    needed = 2 * layers * 4 * shapes.moments + 2 * tokens * hidden  # the moments in parts, then in one file
    if run.search(plan).round_weights:
        needed += layers * shapes.parameters
    free = shutil.disk_usage(run.folder.path).free
    if needed > free:
        raise OutputError(
            f"--output {run.options.output}",
            f"has {gib(free)} of free disk",
            f"the calibration needs {gib(needed)} while it runs",
            "Free some space or choose another --output.",
        )


def _calibrate_inputs(run: _Run, soft_tokens: SoftTokens, plan: Plan) -> InputCalibrations:
    """Calibrate the inputs of all layers and of the vocabulary projection."""
    search = run.search(plan)
    with run.progress.stage("calibrate the layers", total=run.streamed.num_layers) as advance:
        LayerSweep(run.streamed, run.corpus.observed, soft_tokens, search).run(run.folder, advance)
    run.streamed.free_buffers()  # the sensitivity has counted on their memory
    inputs: InputCalibrations = {}
    for name in run.layer_names:
        inputs |= read_calibrations(run.folder, name)
    if run.options.steps:  # without steps the vocabulary projection is never computed
        with run.progress.stage("calibrate the vocabulary"):
            found = calibrate_vocabulary(run.streamed.weights, soft_tokens, search)
            inputs[VOCABULARY_INPUT.name] = found
    return inputs


def _soft_token(run: _Run, soft_tokens: SoftTokens) -> SoftTokenCalibration:
    vocabulary, _ = run.streamed.weights.shape(EMBEDDING_TABLE) or (0, 0)
    return SoftTokenCalibration(min(TOP_K, vocabulary), rounded(soft_tokens.tail.tolist()))


def _measure(
    run: _Run, calibrations: InputCalibrations, soft_token: SoftTokenCalibration | None, plan: Plan
) -> Sensitivity:
    """Measure the sensitivity on the held-out texts."""
    options = run.options
    study = SensitivityStudy(
        open_reference=run.open_reference,
        inputs=tuple(one for one in decoder_inputs(run.streamed.num_layers) if one.name in calibrations),
        calibrations=calibrations,
        weights=lambda projection: read_rounded(run.folder, projection),
        soft_token=soft_token,
        batches=run.corpus.held_out,
        steps=options.steps,
        pooling=options.pooling,
        temperature=options.temperature,
        folder=run.folder,
    )
    return measure_sensitivity(
        study,
        plan.sensitivity,
        max_drop=options.max_drop,
        progress=run.progress,
        evaluations=plan.evaluations,
    )


def _write(run: _Run, calibration: Calibration) -> Calibration:
    """Write the moments and the calibration that names them, both or neither; returns the latter."""
    path = run.options.output
    widths = {
        one.name: width
        for layer in range(run.streamed.num_layers)
        for one, (_, width, _) in zip(layer_inputs(layer), LayerShapes.of(run.streamed.weights).inputs, strict=True)
    }
    with atomic_write(path) as file, atomic_write(moments_path(path)) as moments_file:
        sha256 = write_moments(moments_file, widths, lambda name: read_moments(run.folder, name))
        moments_file.flush()  # a full disk shows before the other file appears
        named = msgspec.structs.replace(calibration, moments_sha256=sha256)
        file.write(named.to_json())
        file.flush()
    return named
