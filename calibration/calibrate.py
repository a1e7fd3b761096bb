"""The calibration from end to end, as a list of stages. ``calibrate`` is what ``gircse-calibrate`` calls.

A first pass streams the texts through the reference and collects channel ranges, sampled rows, second moments and the
tail of the soft token; the smoothing is searched on the sampled rows. A method that clips needs a second pass, for
histograms of the smoothed inputs. The weights are rounded by the inputs' second moments, which are written next to the
calibration, and the sensitivity is measured on held-out texts.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from gircse.calibration.calibration_file import (
    SCHEMA_VERSION,
    Calibration,
    InputCalibration,
    ModelFingerprint,
    Sensitivity,
    SoftTokenCalibration,
)
from gircse.calibration.corpus import MIN_TEXTS, Corpus, draw_texts, tokenize_texts
from gircse.calibration.fingerprint import fingerprint_of
from gircse.calibration.int8.fake_quantization import round_weights
from gircse.calibration.int8.gptq import RoundedWeight
from gircse.calibration.int8.histogram import MagnitudeHistogram
from gircse.calibration.int8.scheme import (
    LIMBS,
    OUTLIER_CHANNELS,
    SMOOTHED,
    TOP_K,
    InputKind,
    QuantizedInput,
    check_architecture,
    decoder_inputs,
)
from gircse.calibration.int8.smoothing import MIGRATIONS, Migrations, Smoothing, range_without, search_smoothing
from gircse.calibration.int8.thresholds import Method, threshold
from gircse.calibration.moments_file import moments_content, moments_path
from gircse.calibration.observe import Observer, run_batch, watched
from gircse.calibration.resume import ResumeState
from gircse.calibration.sensitivity import SensitivityStudy, measure_sensitivity
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_settings import ModelSettings, check_range
from gircse.checkpoint.reference import load_reference
from gircse.checkpoint.source import resolve_checkpoint
from gircse.checkpoint.tokenizer import open_checkpoint_tokenizer
from gircse.reporting.progress import StageProgress
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import OutputError, readable

TOOLS = ("gircse-deploy", "torch", "transformers", "peft", "safetensors", "tokenizers")


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
    """

    texts: Path
    output: Path
    method: Method = Method.MAX
    smooth: float | None = None
    samples: int = 512
    seed: int = 0
    max_drop: float = 0.005

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


@dataclass(frozen=True)
class _Run:
    """What the stages share.

    Attributes:
        options: of the command.
        fingerprint: of the model with these options.
        corpus: the texts.
        model: the PyTorch reference, in FP32.
        inputs: what is quantized; without steps the vocabulary projection is never computed.
        progress: shows the stages.
    """

    options: CalibrationOptions
    fingerprint: ModelFingerprint
    corpus: Corpus
    model: Any
    inputs: tuple[QuantizedInput, ...]
    progress: StageProgress

    @property
    def resume_state(self) -> ResumeState:
        """The file from which an interrupted observation resumes."""
        facts = (
            self.fingerprint,
            self.corpus.used,
            self.options.max_tokens,
            self.options.tokenizer,
            self.options.add_eos,
            "observe",
            str(torch.__version__),
        )
        identity = msgspec.json.encode(facts).decode()
        output = self.options.output
        return ResumeState(output.with_name(f"{output.name}.partial"), identity=identity)


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
        CheckpointError: the model or adapter cannot be found, read or used.
        OutputError: the file cannot be written.
    """
    _check_output(options.output)
    run = _prepare(options, progress or StageProgress())
    try:
        observer = _observe(run)
        smoothings = _search_smoothing(run, observer)
        inputs = _calibrate_inputs(run, observer, smoothings)
        weights = _round_weights(run, observer, inputs)
        soft_token = _soft_token(run, observer) if options.steps else None
        sensitivity = _measure(run, inputs, weights, soft_token)
        moments = moments_content(observer.moments)
        calibration = Calibration(
            schema_version=SCHEMA_VERSION,
            fingerprint=run.fingerprint,
            texts=run.corpus.used,
            method=options.method,
            max_tokens=options.max_tokens,
            tokenizer=options.tokenizer,
            add_eos=options.add_eos,
            max_drop=options.max_drop,
            inputs=inputs,
            soft_token=soft_token,
            moments_sha256=hashlib.sha256(moments).hexdigest(),
            sensitivity=sensitivity,
            tools={name: importlib.metadata.version(name) for name in TOOLS},
        )
        _write(calibration, moments, options.output)
    except OSError as err:
        raise OutputError(
            f"--output {options.output}",
            f"cannot be written: {err.strerror or err}",
            None,
            "Free some space or choose another --output; the same command resumes from what was observed so far.",
        ) from err
    run.resume_state.remove()
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
    """Read the texts, then find the model and load it."""
    texts = draw_texts(options.texts, samples=options.samples, seed=options.seed)
    with progress.stage(f"find the model {options.model}"):
        checkpoint = resolve_checkpoint(options.model, adapter=options.adapter, revision=options.revision)
        check_architecture(read_model_config(checkpoint.directory).model_type)
        fingerprint = fingerprint_of(checkpoint, options)
    for note in checkpoint.notes:
        progress.note(f"  {readable(note)}")
    with progress.stage("load the PyTorch reference"):
        model = load_reference(checkpoint, steps=options.steps, allow_partial_adapter=options.allow_partial_adapter)
    rows = model.get_input_embeddings().num_embeddings
    tokenizer = open_checkpoint_tokenizer(checkpoint.directory, options.tokenizer, vocab_size=rows)
    prompts = tokenizer.prompt_tokenizer(max_tokens=options.max_tokens, add_eos=options.add_eos)
    corpus = tokenize_texts(texts, prompts)
    inputs = decoder_inputs(model.config.num_hidden_layers)
    if not options.steps:
        inputs = tuple(found for found in inputs if found.kind is not InputKind.VOCABULARY)
    return _Run(options, fingerprint, corpus, model, inputs, progress)


def _observe(run: _Run) -> Observer:
    """Collect the statistics of the observed texts; resumes after an interruption."""
    observer = Observer(run.model, run.inputs, steps=run.options.steps, seed=run.options.seed)
    resume_state, batches, used = run.resume_state, run.corpus.observed, run.corpus.used
    if (state := resume_state.load()) is not None:
        observer.load_state(state)
        run.progress.note(f"  resumes after {observer.batches} of {len(batches)} batches")
    with run.progress.stage(f"observe {used.samples} texts, {used.tokens} tokens", total=len(batches)) as advance:
        advance(observer.batches)
        try:
            for batch in batches[observer.batches :]:
                observer.observe(batch, temperature=run.options.temperature)
                resume_state.save_if_due(observer.state)
                advance(1)
        except KeyboardInterrupt:
            resume_state.save(observer.state())
            raise
    return observer


def _search_smoothing(run: _Run, observer: Observer) -> dict[str, Smoothing]:
    """Search the smoothing and the outlier channels of every input, by name."""
    smoothings = {}
    with run.progress.stage("search the smoothing", total=len(run.inputs)) as advance:
        for quantized_input in run.inputs:
            smoothings[quantized_input.name] = _smooth(run, quantized_input, observer)
            advance(1)
    return smoothings


def _smooth(run: _Run, quantized_input: QuantizedInput, observer: Observer) -> Smoothing:
    kind, smooth = quantized_input.kind, run.options.smooth
    migrations: Migrations = ()
    if kind in SMOOTHED:
        migrations = MIGRATIONS if smooth is None else (smooth,)
    weights = [run.model.get_submodule(name).weight.detach() for name in quantized_input.projections]
    return search_smoothing(
        observer.sampled_rows(quantized_input.name),
        weights,
        observer.channel_maxima[quantized_input.name].amax(0),
        limbs=LIMBS[kind],
        outlier_channels=OUTLIER_CHANNELS[kind],
        migrations=migrations,
    )


def _calibrate_inputs(
    run: _Run, observer: Observer, smoothings: Mapping[str, Smoothing]
) -> dict[str, InputCalibration]:
    """Choose the thresholds of every input in the prompt and at each step, and record them by name."""
    method = run.options.method
    histograms = {} if method is Method.MAX else _fill_histograms(run, smoothings)
    calibrations = {}
    for name, smoothing in smoothings.items():
        ranges = [
            range_without(maxima / smoothing.scales, smoothing.outlier_channels)
            for maxima in observer.channel_maxima[name]
        ]
        chosen = [threshold(histogram, method) for histogram in histograms[name]] if histograms else ranges
        calibrations[name] = _input_calibration(smoothing, ranges, chosen)
    return calibrations


def _fill_histograms(run: _Run, smoothings: Mapping[str, Smoothing]) -> dict[str, list[MagnitudeHistogram]]:
    """Stream the texts again, for a histogram of every smoothed input in the prompt and at each step."""
    steps, temperature = run.options.steps, run.options.temperature
    histograms = {name: [MagnitudeHistogram() for _ in range(steps + 1)] for name in smoothings}

    def watch(quantized_input: QuantizedInput, step: int, rows: torch.Tensor) -> None:
        name = quantized_input.name
        smoothed = rows / smoothings[name].scales
        smoothed[:, list(smoothings[name].outlier_channels)] = 0
        histograms[name][step].add(smoothed.cpu().numpy(), where=name)

    with run.progress.stage("fill the histograms", total=len(run.corpus.observed)) as advance:
        for batch in run.corpus.observed:
            with watched(run.model, run.inputs, watch) as position:
                for _ in run_batch(run.model, batch, position, steps=steps, temperature=temperature):
                    pass
            advance(1)
    return histograms


def _input_calibration(smoothing: Smoothing, ranges: Sequence[float], thresholds: Sequence[float]) -> InputCalibration:
    scales = smoothing.scales
    return InputCalibration(
        smoothing.migration,
        () if bool((scales == 1).all()) else tuple(_rounded(scales.tolist())),
        smoothing.outlier_channels,
        tuple(_rounded(ranges)),
        tuple(_rounded(thresholds)),
        float(f"{smoothing.error**0.5:.4g}"),
    )


def _round_weights(
    run: _Run, observer: Observer, calibrations: Mapping[str, InputCalibration]
) -> dict[str, RoundedWeight]:
    """Round every weight that reads an input, by projection."""
    weights: dict[str, RoundedWeight] = {}
    with run.progress.stage("round the weights", total=len(run.inputs)) as advance:
        for quantized_input in run.inputs:
            name = quantized_input.name
            weights |= round_weights(run.model, quantized_input, calibrations[name], observer.moments.get(name))
            advance(1)
    return weights


def _soft_token(run: _Run, observer: Observer) -> SoftTokenCalibration:
    return SoftTokenCalibration(min(TOP_K, run.model.config.vocab_size), tuple(_rounded(observer.tail().tolist())))


def _measure(
    run: _Run,
    calibrations: Mapping[str, InputCalibration],
    weights: Mapping[str, RoundedWeight],
    soft_token: SoftTokenCalibration | None,
) -> Sensitivity:
    """Measure the sensitivity on the held-out texts."""
    options = run.options
    study = SensitivityStudy(
        model=run.model,
        inputs=run.inputs,
        calibrations=calibrations,
        weights=weights,
        soft_token=soft_token,
        batches=run.corpus.held_out,
        steps=options.steps,
        pooling=options.pooling,
        temperature=options.temperature,
    )
    return measure_sensitivity(study, max_drop=options.max_drop, progress=run.progress)


def _write(calibration: Calibration, moments: bytes, path: Path) -> None:
    """Write the calibration and its moments, both or neither."""
    content = calibration.to_json()
    with atomic_write(path) as file, atomic_write(moments_path(path)) as moments_file:
        file.write(content)
        file.flush()  # a full disk shows before the other file appears
        moments_file.write(moments)


def _rounded(numbers: Sequence[float]) -> list[float]:
    """Round to six digits: more would only make the file longer, INT8 cannot tell them apart."""
    return [float(f"{number:.6g}") for number in numbers]
